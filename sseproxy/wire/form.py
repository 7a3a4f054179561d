"""A form (multipart/form-data, RFC 7578) and the model that it names, found as it comes, in bounded time and memory.

No part is kept but the value of the field `model`, and that only as far as a name may be long. The bytes are looked at
where the delimiter may be, so a file costs what it costs to search it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Final

from .meaning import MAX_MODEL

# The longest boundary (RFC 2046, section 5.1.1), which also stands in quotes, because it may have spaces in it.
_BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
# A parameter of a field, behind what came before it. What does not end its quotation marks is none.
_PARAMETER: Final = re.compile(rb'[ \t]*;[ \t]*([^=;" \t]+)=(?:"((?:[^"\\]|\\.)*)"|([^;" \t]*))', re.DOTALL)
_ESCAPED: Final = re.compile(rb"\\(.)", re.DOTALL)
_DISPOSITION: Final = re.compile(rb"\r\ncontent-disposition:[ \t]*form-data", re.IGNORECASE)
# The second is for other characters than ASCII (RFC 5987).
_FILE_NAMES: Final = frozenset({b"filename", b"filename*"})
# What stands behind the delimiter, where the end or another part follows, and what may become that. Nobody writes the
# white space, so there is little of it.
_AFTER_DELIMITER: Final = re.compile(rb"--|[ \t]{0,256}(?=\r\n)")
_MAY_COME: Final = re.compile(rb"-?|[ \t]{0,256}\r?")
# The fields of the form that are read.
_WANTED: Final = frozenset({b"model", b"stream"})
# The fields of a part: its name, its file's name and its type. Starlette takes as many parts.
_MAX_HEAD: Final = 4 * 1024
_MAX_PARAMETERS: Final = 16
_MAX_PARTS: Final = 1000
# Bytes of a name that may be a model's.
_MAX_VALUE: Final = 4 * MAX_MODEL + 2


def boundary_of(content_type: bytes) -> bytes | None:
    """The boundary of a form; None if `content_type` is not that of one, or has none that is valid."""
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
    """Reads a form whose delimiter has `boundary` in it: `feed` takes its parts as they come.

    As of the members of an object in JSON, the last of several fields counts.
    """

    __slots__ = ("_delimiter", "_ended", "_found", "_heads", "_name", "_parts", "_rest", "_value", "models")

    def __init__(self, boundary: bytes) -> None:
        self.models = 0
        """How many fields some parser may take for the model."""
        self._delimiter = b"\r\n--" + boundary
        # The last bytes that came, if more of them may belong together. The first delimiter may be the first line.
        self._rest = b"\r\n"
        self._heads = False
        self._ended = False
        self._parts = 0
        # The name of the field that is being read, if it is wanted, and its value with the line end before it.
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
        """The same: what has come of a form counts, whatever follows it."""
        return self.model

    @property
    def streams(self) -> bool:
        """Whether it asks for a stream."""
        return self._found.get(b"stream") == "true"

    def with_usage(self) -> None:
        """Of no form usage can be asked."""

    def _content(self, text: bytes, at: int) -> tuple[int, bool]:
        """Reads as far as the next delimiter: where its line ends, and True; or how far it got."""
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
            # Something that only begins with the delimiter.
        end = max(start, len(text) - len(self._delimiter) + 1)
        self._take(text, at, end)
        return end, False

    def _head(self, text: bytes, at: int) -> tuple[int, bool]:
        """Reads the fields of a part, from the end of the delimiter's line on: where its content begins, and True."""
        end = text.find(b"\r\n\r\n", at)
        head = text[at:] if end < 0 else text[at:end]
        # Three bytes of a head that has not ended may be of its end.
        if len(head) - (3 if end < 0 else 0) > _MAX_HEAD or self._delimiter in head:
            self._give_up()
        if end < 0:
            return at, False
        self._parts += 1
        if self._parts > _MAX_PARTS:
            self._give_up()
        disposition = _DISPOSITION.search(head)
        if disposition is not None:
            found = [*islice(_parameters(head[disposition.end() :].partition(b"\r\n")[0]), _MAX_PARAMETERS)]
            parameters = dict(found)
            self.models += any(key == b"name" and value.lower() == b"model" for key, value in found)
            # What has the name of a file is one.
            name = parameters.get(b"name", b"")
            if name in _WANTED and not _FILE_NAMES & parameters.keys():
                self._name, self._value = name, bytearray()
        self._heads = False
        # Where there is no content, the second of these line ends is that of the delimiter (RFC 2046, section 5.1.1).
        return end + 2, True

    def _take(self, text: bytes, start: int, end: int) -> None:
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
        """It is no form, or has more in it than is looked at. Nobody knows what another reader makes of it."""
        self._ended = True
        self._found.clear()
