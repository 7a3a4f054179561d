"""Finds the model in a form (multipart/form-data, RFC 7578) as it arrives, in bounded time and memory.

Only the values of the fields `model` and `stream` are kept, up to the greatest length of a model's name. The rest is
only searched for the delimiter, so a file costs one search through its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Final

from .meaning import MAX_MODEL, OTHER_MODELS

# A boundary has at most 70 characters (RFC 2046, section 5.1.1). It may contain spaces, but not end with one.
_BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
# A parameter of a field, with the semicolon before it. A quoted value must have its closing quotation mark.
_PARAMETER: Final = re.compile(rb'[ \t]*;[ \t]*([^=;" \t]+)=(?:"((?:[^"\\]|\\.)*)"|([^;" \t]*))', re.DOTALL)
_ESCAPED: Final = re.compile(rb"\\(.)", re.DOTALL)
_DISPOSITION: Final = re.compile(rb"\r\ncontent-disposition:[ \t]*form-data", re.IGNORECASE)
# The second has the name in an encoding for characters outside ASCII (RFC 5987).
_FILE_NAMES: Final = frozenset({b"filename", b"filename*"})
# The fields of a part that every parser reads alike: on a line each, one of them the disposition, without escapes that
# some take for the end of a text, and with the parameters that a form has.
_TEXT: Final = rb'(?:"(?:[^"\\\r\n]|\\[^"\r\n])*"|[^;"\\\s]*+)'
_OTHERS: Final = rb"(?:\r\n(?!content-disposition:)[!#-'*+.^_`|~0-9a-z-]++:[^\r\n]*+)*"
_PLAIN_HEAD: Final = re.compile(
    rb"%b\r\ncontent-disposition:[ \t]*+form-data(?:[ \t]*+;[ \t]*+(?:name|filename\*?)=%b){0,3}[ \t]*+;?[ \t]*+%b"
    % (_OTHERS, _TEXT, _OTHERS),
    re.IGNORECASE,
)
# What must follow a delimiter: `--` at the end of the form, otherwise a line end, perhaps after spaces. Below it is the
# beginning of either, when the rest has not arrived yet. Clients write no spaces there, so a limit of 256 does no harm.
_AFTER_DELIMITER: Final = re.compile(rb"--|[ \t]{0,256}(?=\r\n)")
_MAY_COME: Final = re.compile(rb"-?|[ \t]{0,256}\r?")
# The fields of the form that are read.
_WANTED: Final = frozenset({b"model", b"stream"})
_OTHER_MODELS: Final = frozenset(map(str.encode, OTHER_MODELS))
# Limits: bytes of a part's header fields, parameters of one field, and parts. Starlette allows as many parts.
_MAX_HEAD: Final = 4 * 1024
_MAX_PARAMETERS: Final = 16
_MAX_PARTS: Final = 1000
# Bytes of a value with its line end: up to four for each character of a model's name.
_MAX_VALUE: Final = 4 * MAX_MODEL + 2


def boundary_of(content_type: bytes) -> bytes | None:
    """The boundary in `content_type`. None if it is not the type of a form, or the boundary is not valid."""
    media_type, mark, rest = content_type.partition(b";")
    if media_type.strip().lower() != b"multipart/form-data":
        return None
    for name, value in islice(_parameters(mark + rest), _MAX_PARAMETERS):
        if name == b"boundary":
            return value if _BOUNDARY.fullmatch(value) else None
    return None


def _parameters(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while found := _PARAMETER.match(text, at):
        name, quoted, plain = found.groups()
        yield name.lower(), plain if quoted is None else _ESCAPED.sub(rb"\1", quoted)
        at = found.end()


class FormReader:
    """Reads a form with this `boundary`. `feed` takes the bytes of the form, however they are split.

    If a field occurs several times, the last one counts, as with members of a JSON object.
    """

    __slots__ = (
        "_delimiter",
        "_ended",
        "_found",
        "_heads",
        "_name",
        "_parts",
        "_rest",
        "_value",
        "models",
        "names_others",
        "odd",
    )

    def __init__(self, boundary: bytes) -> None:
        self.models = 0
        """How many fields some parser may take for the model."""
        self.names_others = False
        """Whether there is a field that some parser may take for one of `OTHER_MODELS`."""
        self.odd = False
        """Whether some parser may read other fields: the form has a preamble, or a part whose head is not plain."""
        self._delimiter = b"\r\n--" + boundary
        # The bytes that were not processed yet. They begin with a line end, because a form may begin with a delimiter.
        self._rest = b"\r\n"
        self._heads = False
        self._ended = False
        self._parts = 0
        # The wanted field that is being read, and its value with the line end before it. None: no wanted field is read.
        self._name = b""
        self._value: bytearray | None = None
        self._found: dict[bytes, str] = {}

    def feed(self, part: bytes) -> None:
        text, at, goes_on = self._rest + part, 0, True
        while goes_on and not self._ended:
            at, goes_on = self._head(text, at) if self._heads else self._content(text, at)
        self._rest = b"" if self._ended else text[at:]

    @property
    def model(self) -> str | None:
        """The model's name, if it has at most 128 characters."""
        return self._found.get(b"model")

    @property
    def model_so_far(self) -> str | None:
        """The same as `model`: a field counts as soon as it is complete."""
        return self.model

    @property
    def streams(self) -> bool:
        """Whether the request asks for a stream."""
        return self._found.get(b"stream") == "true"

    def with_usage(self) -> None:
        """None: usage cannot be requested in a form."""

    def _content(self, text: bytes, at: int) -> tuple[int, bool]:
        """Reads up to the next delimiter. Returns the position after it, and True; or how far it got, and False."""
        start = at
        while (found := text.find(self._delimiter, start)) >= 0:
            start = found + len(self._delimiter)
            after = _AFTER_DELIMITER.match(text, start)
            if after is not None:
                self._take(text, at, found)
                self._finish()
                self._ended = after[0] == b"--"
                self._heads = True
                return after.end(), True
            if _MAY_COME.fullmatch(text, start):
                self._take(text, at, found)
                return found, False
            # Not a delimiter: its line continues with other bytes.
        end = max(start, len(text) - len(self._delimiter) + 1)
        self._take(text, at, end)
        return end, False

    def _head(self, text: bytes, at: int) -> tuple[int, bool]:
        """Reads the header fields of a part. Returns where its content begins, and True; or `at` and False."""
        end = text.find(b"\r\n\r\n", at)
        head = text[at:] if end < 0 else text[at:end]
        # The last three bytes may be the beginning of the blank line that ends the fields.
        if len(head) - (3 if end < 0 else 0) > _MAX_HEAD or self._delimiter in head:
            self._give_up()
        if end < 0:
            return at, False
        self._parts += 1
        if self._parts > _MAX_PARTS:
            self._give_up()
        disposition = _DISPOSITION.search(head)
        self.odd |= _PLAIN_HEAD.fullmatch(head) is None
        if disposition is not None:
            found = [*islice(_parameters(head[disposition.end() :].partition(b"\r\n")[0]), _MAX_PARAMETERS)]
            parameters = dict(found)
            self.odd |= len(found) > len(parameters)
            names = {value.lower() for key, value in found if key == b"name"}
            self.models += b"model" in names
            # Some parsers read `models[]`, or `models[0]`, as a list.
            self.names_others |= not _OTHER_MODELS.isdisjoint(name.partition(b"[")[0] for name in names)
            # A part with a file name is a file, not a field.
            name = parameters.get(b"name", b"")
            if name in _WANTED and not _FILE_NAMES & parameters.keys():
                self._name, self._value = name, bytearray()
        self._heads = False
        # If the content is empty, the second line end belongs to the delimiter (RFC 2046, section 5.1.1).
        return end + 2, True

    def _take(self, text: bytes, start: int, end: int) -> None:
        self.odd |= not self._parts and start < end
        if self._value is not None and len(self._value) <= _MAX_VALUE:
            self._value += text[start : min(end, start + _MAX_VALUE + 1)]

    def _finish(self) -> None:
        """The content of a part has ended."""
        if self._value is None:
            return
        self._found.pop(self._name, None)
        with suppress(UnicodeDecodeError):
            value = self._value[2:].decode()
            if len(value) <= MAX_MODEL:
                self._found[self._name] = value
        self._value = None

    def _give_up(self) -> None:
        """The form is not valid, or exceeds a limit. Another parser might read it differently, so nothing counts."""
        self._ended = self.odd = True
        self._found.clear()
