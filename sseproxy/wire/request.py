"""Reads a request: its model, and, if it is JSON, how to request usage in addition."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import msgspec

from .extract import Extract, Gist, Members, wanted
from .form import FormReader, boundary_of
from .headers import Fields
from .meaning import MAX_MODEL, NULL, OTHER_MODELS, UNREADABLE, text_of

# Bytes of the name in JSON. A character takes at most two escapes.
_MAX_SPELLED: Final = 2 * len(r"\uXXXX") * MAX_MODEL + 2
_TRUE: Final = msgspec.Raw(b"true")
# A type in which every parser reads the same body. In another charset, bytes that are ASCII here may be other text, and
# JSON may be a form as well, with names and values in its texts.
_PARAMETERS: Final = (
    rb'(?:[ \t]*+;[ \t]*+(?:charset="?(?:utf-8|us-ascii)"?|(?!charset|boundary)[!#$&.^_+0-9a-z-]++=[^;,"\\ \t]*+))*'
)
_PLAIN_TYPE: Final = re.compile(
    rb'(?:multipart/form-data%b[ \t]*+;[ \t]*+boundary=(?:"[^"\\]*+"|[^;," \t]*+)'
    rb"|(?!multipart/|application/x-www-form-urlencoded)[^;,\s]*+)%b[ \t]*+;?[ \t]*+" % (_PARAMETERS, _PARAMETERS),
    re.IGNORECASE,
)


class _Request(msgspec.Struct, gc=False):
    model: msgspec.Raw = NULL
    stream: msgspec.Raw = NULL
    stream_options: msgspec.Raw = NULL
    background: msgspec.Raw = NULL
    conversation: msgspec.Raw = NULL
    previous_response_id: msgspec.Raw = NULL


class _Generation(msgspec.Struct, gc=False):
    """Google's names, which may be written in two ways (https://protobuf.dev/programming-guides/json/)."""

    maxOutputTokens: msgspec.Raw = NULL
    max_output_tokens: msgspec.Raw = NULL
    candidateCount: msgspec.Raw = NULL
    candidate_count: msgspec.Raw = NULL


class OutputLimits(msgspec.Struct, gc=False):
    """What limits how much is generated, in all APIs. It is only decoded if it is needed."""

    max_tokens: msgspec.Raw = NULL
    max_completion_tokens: msgspec.Raw = NULL
    max_output_tokens: msgspec.Raw = NULL
    n: msgspec.Raw = NULL
    best_of: msgspec.Raw = NULL
    generationConfig: _Generation | None = None
    generation_config: _Generation | None = None


_decode_request: Final = msgspec.json.Decoder(_Request).decode
_decode_options: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_MEMBERS: Final = wanted(_Request, OutputLimits)


class Splice(NamedTuple):
    """A change of a body: replaces the bytes from `start` to `stop`, which may be none, by `put`."""

    start: int
    stop: int
    put: bytes

    def into(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        """The parts of the changed body. Parts without a change are the same objects as in `parts`."""
        at, put = 0, self.put
        for part in parts:
            start, stop = self.start - at, self.stop - at
            at += len(part)
            if start >= len(part) or stop < 0 or (stop == 0 and not put):
                yield part
                continue
            changed = part[: max(start, 0)] + put + part[max(stop, 0) :]
            put = b""
            if changed:
                yield changed


def changed(parts: Iterable[bytes], splices: Iterable[Splice]) -> list[bytes]:
    """The parts of a body with all `splices`, which do not overlap."""
    # From the last to the first, so that each still finds its place.
    for splice in sorted(splices, reverse=True):
        parts = splice.into(parts)
    return list(parts)


class RequestReader:
    """Reads a JSON request body. `feed` takes its parts as they arrive. At most about 64 KiB are kept.

    The properties are about the body so far. A body that is not a JSON object has no model, and no usage is requested.
    """

    __slots__ = ("_decoder", "_gist", "_read", "_request", "_unicode")

    def __init__(self) -> None:
        self._gist = Gist(_MEMBERS)
        # Checks that the body is UTF-8, from the first part on that is not ASCII.
        self._decoder: codecs.IncrementalDecoder | None = None
        self._unicode = True
        self._read = False
        self._request = _NO_REQUEST

    def feed(self, part: bytes) -> None:
        if self._decoder is not None or not part.isascii():
            self._check(part)
        self._gist.feed(part)
        self._read = False

    @property
    def text(self) -> bytes:
        """The body so far. Of a large one, only what is wanted: nothing if that exceeds a limit, or is not JSON."""
        return self._gist.text() or b""

    @property
    def model(self) -> str | None:
        """The name of the model, if it has at most `MAX_MODEL` characters."""
        return _model(self._decoded())

    @property
    def model_so_far(self) -> str | None:
        """The name of the model, even if the body is not complete. Only for the access log."""
        try:
            return _model(self._decoded()) or _model(_decode_request(self._gist.so_far()))
        except UNREADABLE:
            return None

    @property
    def streams(self) -> bool:
        """Whether it asks for a stream."""
        return bytes(self._decoded().stream) == b"true"

    @property
    def belongs_to_state(self) -> bool:
        """Whether it continues something that the upstream keeps, or begins something that goes on by itself."""
        request = self._decoded()
        return bytes(request.background) == b"true" or any(
            bytes(told) != b"null" for told in (request.conversation, request.previous_response_id)
        )

    def with_model(self, model: str) -> Splice | None:
        """The change that replaces the model. None if it has none, or its position is not known."""
        named = self._decoded().model is not NULL
        return self._replaced(b"model", msgspec.json.encode(model)) if named else None

    def with_usage(self) -> Splice | None:
        """The change that requests usage. None if the request does not stream, or has `include_usage` itself."""
        request = self._decoded()
        if not self.streams:
            return None
        if request.stream_options is NULL:
            return self._added(b',"stream_options":{"include_usage":true}')
        options = _with_usage(bytes(request.stream_options))
        return None if options is None else self._replaced(b"stream_options", options)

    def _check(self, part: bytes) -> None:
        if self._decoder is None:
            self._decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            self._decoder.decode(part)
        except UnicodeDecodeError:
            self._unicode = False

    def _decoded(self) -> _Request:
        if not self._read:
            self._read = True
            try:
                self._request = _decode_request(self.text if self._unicode else b"")
            except UNREADABLE:
                self._request = _NO_REQUEST
        return self._request

    def _added(self, put: bytes) -> Splice:
        """Inserts `put` after the last member."""
        extract = self._gist.extract
        at = self.text.rindex(b"}") if extract is None else extract.closed_at
        return Splice(at, at, put)

    def _replaced(self, name: bytes, put: bytes) -> Splice | None:
        """Replaces the value of the member `name` by `put`. None if the position of the value is not known."""
        extract = self._gist.extract
        if extract is None:
            extract = Extract(_MEMBERS)
            extract.feed(self.text)
        return None if extract.text() is None else Splice(*extract.spans[name], put)


_NO_REQUEST: Final = _Request()


def reader_of(fields: Fields) -> RequestReader | FormReader:
    """What reads the body of a request with these `fields`. What is no form may be JSON, whatever its type is."""
    types = fields.named(b"content-type")
    boundary = boundary_of(types[0]) if len(types) == 1 else None
    return RequestReader() if boundary is None else FormReader(boundary)


class _OtherModels(msgspec.Struct, gc=False):
    models: list[str] | None = None
    fallbacks: list[str] | None = None


_decode_others: Final = msgspec.json.Decoder(_OtherModels).decode
# Each is kept as a whole: of a list whose items are read one by one, those after the 128th would be missing.
_OTHER_MEMBERS: Final = Members({name.encode(): None for name in OTHER_MODELS})
_NAMING: Final = OTHER_MODELS | {"model"}


class _ModelMembers(Extract):
    """Finds the members that some parser may take for models, and extracts `OTHER_MODELS`."""

    __slots__ = ("named",)

    def __init__(self) -> None:
        super().__init__(_OTHER_MEMBERS)
        self.named: list[str] = []
        """The names of these members, as they are written."""

    def _member(self, text: bytes, plain: bytes, at: int) -> int:
        end = super()._member(text, plain, at)
        name = self._name.decode()
        # Go's parser does not distinguish upper and lower case, not even of letters such as "\u017f", a long s.
        if end and name.casefold() in _NAMING:
            self.named.append(name)
        return end


class ModelAudit:
    """Finds out whether every parser reads the same models in a body that `reader` reads. `feed` takes its parts.

    `fields` are those of the request.
    """

    __slots__ = ("_fed", "_is_plain", "_members", "_reader")

    def __init__(self, reader: RequestReader | FormReader, fields: Fields) -> None:
        self._reader = reader
        types = fields.named(b"content-type")
        self._is_plain = not types or (len(types) == 1 and _PLAIN_TYPE.fullmatch(types[0]) is not None)
        self._members = _ModelMembers()
        self._fed = False

    def feed(self, part: bytes) -> None:
        self._fed = True
        self._reader.feed(part)
        if isinstance(self._reader, RequestReader):
            self._members.feed(part)

    @property
    def twice(self) -> bool:
        """Whether the body names its model more than once, or has one of `OTHER_MODELS` more than once."""
        if isinstance(self._reader, FormReader):
            return self._reader.models > 1
        named = [*map(str.casefold, self._members.named)]
        return len(set(named)) < len(named)

    @property
    def model(self) -> str | None:
        """The model. None if there is none, or if another parser may read another one.

        What is before the first line of a form is not read. To a parser that does not look at the Content-Type it may
        be JSON, so there must be nothing.
        """
        return self._reader.model if self._is_readable else None

    @property
    def _is_readable(self) -> bool:
        """Whether every parser reads the same in the body so far."""
        reader = self._reader
        return self._is_plain and not (reader.odd if isinstance(reader, FormReader) else self._members.given_up)

    @property
    def others(self) -> list[str] | None:
        """The models that are named in `OTHER_MODELS`. None if another parser may read others, or another `model`.

        None also if one is no list of names, is longer than an `Extract` keeps, or is a field of a form.
        """
        reader = self._reader
        if not self._fed:
            return []
        if not self._is_readable:
            return None
        if isinstance(reader, FormReader):
            return None if reader.names_others or (reader.models and reader.model is None) else []
        # What another parser takes for an object may not be one here: it has a mark, or more after its end.
        text = self._members.text()
        named = {name.casefold(): name for name in self._members.named}
        if not text or ("model" in named and reader.model is None):
            return None
        named.pop("model", None)
        if not named:
            return []
        try:
            told = _decode_others(text)
        except UNREADABLE:
            return None
        return [*(told.models or ()), *(told.fallbacks or ())] if OTHER_MODELS.issuperset(named.values()) else None


def _model(request: _Request) -> str | None:
    spelled = request.model
    if spelled is NULL or memoryview(spelled).nbytes > _MAX_SPELLED:
        return None
    name = text_of(spelled)
    return name if name is None or len(name) <= MAX_MODEL else None


def _with_usage(spelled: bytes) -> bytes | None:
    """The options in the JSON text `spelled`, with usage requested. None if they have `include_usage` already."""
    try:
        options = {} if spelled == b"null" else _decode_options(spelled)
        if bytes(options.get("include_usage", NULL)) != b"null":
            return None
        return msgspec.json.encode(options | {"include_usage": _TRUE})
    except UNREADABLE:
        return None
