"""Body framing (RFC 9112, sections 6.3 and 7.1): where a body ends. The parsers are strict.

`whole_chunks` handles the common case, a read that consists of whole HTTP chunks. A body decoder handles everything
else, however the bytes are split. Everything that is not exactly HTTP/1.1 is a `ProtocolError`, because a lenient
parser makes request and response smuggling possible.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Protocol

from ..errors import BrokenBodyError, ProtocolError
from .headers import Field, Fields

Framing = int | Literal["chunked", "close"]
"""How the end of a body is found: after so many bytes, by chunked framing, or by the close of the connection."""

# 16 hexadecimal digits are a 64-bit size. No honest chunk is longer.
_CHUNK_START = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
# Bytes of a chunk size with its extensions. LLM servers send no extensions, and no CDN adds as much as 256 bytes.
MAX_SIZE_LINE = 256
# Bytes. Trailers are discarded (RFC 9110, section 6.5.1), so they only need a limit.
MAX_TRAILERS = 8192
# Fields that are not allowed in trailers (RFC 9110, section 6.5.1). A message that has one is an attempt at smuggling.
_FRAMING_FIELDS = (b"content-length", b"transfer-encoding")

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_FIELD_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_CRLF = b"\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def _usual_starts(most: int) -> tuple[bytes, ...]:
    """For each length below `most`: the size line of a whole chunk that has this length with its framing."""
    starts = [b""] * most
    for size in range(1, most):
        start = b"%x\r\n" % size
        length = len(start) + size + 2
        if length < most:
            starts[length] = start
    return tuple(starts)


USUAL_STARTS = _usual_starts(4096)
"""The size line of a chunk, as servers usually write it, by the length of the chunk with its framing.

Empty if no chunk has that length.
"""


def whole_chunks(data: bytes) -> list[bytes]:
    """The chunks of `data`, each with its framing, if `data` consists only of whole chunks. Otherwise an empty list.

    Each chunk must have a payload and no extensions. Then `data` can be forwarded as it is.
    """
    chunks: list[bytes] = []
    at, length = 0, len(data)
    while at < length:
        start = _CHUNK_START.match(data, at)
        if start is None:
            return []
        size = int(start[1], 16)
        end = start.end() + size + 2
        if not size or end > length or data[end - 2 : end] != _CRLF:
            return []
        chunks.append(data[at:end])
        at = end
    return chunks


def payload_of(chunk: bytes) -> bytes:
    """The payload of one of the `whole_chunks`."""
    return chunk[chunk.index(b"\n") + 1 : -2]


def frame(payload: bytes) -> bytes:
    """`payload`, which must not be empty, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def response_framing(method: str, status: int, version: tuple[int, int], fields: Fields) -> Framing | None:
    """The framing of a response body, or None if the response has no body.

    Raises `ProtocolError` if the head is ambiguous: if lengths differ, if there is a length and a transfer coding, if
    the coding is not exactly `chunked`, or if there is any coding in HTTP/1.0.
    """
    lengths, codings = fields.named(b"content-length"), fields.named(b"transfer-encoding")
    if codings and (lengths or version != (1, 1) or fields.tokens(b"transfer-encoding") != [b"chunked"]):
        raise ProtocolError("the Transfer-Encoding of the response is not allowed: it must be only chunked")
    length = _one_length(lengths) if lengths else None
    if method == "HEAD" or status in (204, 304):
        return None
    return "chunked" if codings else "close" if length is None else length


def _one_length(values: Sequence[bytes]) -> int:
    """The Content-Length with these `values`. It may be repeated (RFC 9112, section 6.3)."""
    if len(values) == 1 and _DIGITS.fullmatch(values[0]):
        return int(values[0])
    lengths = {length.strip(b" \t") for value in values for length in value.split(b",")}
    length = lengths.pop()
    if lengths or _DIGITS.fullmatch(length) is None:
        raise ProtocolError("the Content-Length of the response is not one number")
    return int(length)


def framing_fields(framing: Framing | None) -> list[Field]:
    """The header fields for a message with `framing`."""
    if framing == "chunked":
        return [(b"Transfer-Encoding", b"chunked")]
    return [(b"Content-Length", b"%d" % framing)] if isinstance(framing, int) else []


class BodyDecoder(Protocol):
    """Removes the framing of a body. `done`: the body is complete. `excess`: how many bytes came after it."""

    done: bool
    excess: int

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Raises `BrokenBodyError`, which has the payload before the invalid bytes."""

    def end(self) -> bool:
        """Call this when the connection has ended. Returns whether the body is complete."""


class LengthDecoder:
    """A body of `length` bytes."""

    __slots__ = ("_remaining", "done", "excess")

    def __init__(self, length: int) -> None:
        self._remaining = length
        self.done = not length
        self.excess = 0

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._remaining:
            self.excess += len(data) - self._remaining
            data = data[: self._remaining]
        self._remaining -= len(data)
        self.done = not self._remaining
        return data

    def end(self) -> bool:
        return self.done


class CloseDecoder:
    """A body that ends with the connection."""

    __slots__ = ("done", "excess")

    def __init__(self) -> None:
        self.done = False
        self.excess = 0

    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> bool:
        self.done = True
        return True


def decoder(framing: Framing) -> BodyDecoder:
    if framing == "chunked":
        return ChunkedDecoder()
    return CloseDecoder() if framing == "close" else LengthDecoder(framing)


class ChunkedDecoder:
    """A chunked body. `at_start` is true between chunks; there, `whole_chunks` may be used instead of `feed`."""

    __slots__ = ("_expect_crlf", "_in_trailers", "_line", "_remaining", "_trailers", "done", "excess")

    def __init__(self) -> None:
        self._line = b""
        self._remaining = 0
        self._expect_crlf = False
        self._in_trailers = False
        self._trailers = 0
        self.done = False
        self.excess = 0

    def end(self) -> bool:
        return self.done

    @property
    def at_start(self) -> bool:
        return not (self._remaining or self._expect_crlf or self._in_trailers or self._line or self.done)

    def feed(self, data: bytes) -> bytes:
        payload: list[bytes] = []
        try:
            self._walk(data, payload)
        except ProtocolError as error:
            raise BrokenBodyError(str(error), b"".join(payload)) from None
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def _walk(self, data: bytes, payload: list[bytes]) -> None:
        pos, end = 0, len(data)
        while pos < end and not self.done:
            if self._remaining:
                piece = data[pos : pos + self._remaining]
                payload.append(piece)
                pos += len(piece)
                self._remaining -= len(piece)
                self._expect_crlf = not self._remaining
                continue
            line, pos = self._take_line(data, pos)
            if line is None:
                break
            if self._expect_crlf:
                if line:
                    raise ProtocolError("a chunk is longer than its size")
                self._expect_crlf = False
            elif self._in_trailers:
                self._trailer(line)
            else:
                self._size_line(line)
        self.excess += end - pos

    def _take_line(self, data: bytes, pos: int) -> tuple[bytes | None, int]:
        limit = 2 if self._expect_crlf else MAX_TRAILERS if self._in_trailers else MAX_SIZE_LINE
        newline = data.find(b"\n", pos, pos + limit + 1)
        line = self._line + data[pos : newline + 1 if newline >= 0 else pos + limit + 1]
        if newline < 0:
            if len(line) > limit or (self._expect_crlf and not _CRLF.startswith(line)):
                raise ProtocolError("a line of the chunked framing is too long, or a chunk does not end in CRLF")
            self._line = line
            return None, len(data)
        if len(line) > limit or not line.endswith(_CRLF):
            raise ProtocolError("a line of the chunked framing does not end in CRLF")
        self._line = b""
        return line[:-2], newline + 1

    def _size_line(self, line: bytes) -> None:
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise ProtocolError("a chunk size is not hexadecimal")
        self._remaining = int(match[1], 16)
        self._in_trailers = not self._remaining

    def _trailer(self, line: bytes) -> None:
        if not line:
            self.done = True
            return
        self._trailers += len(line)
        if self._trailers > MAX_TRAILERS or _FIELD_LINE.fullmatch(line) is None:
            raise ProtocolError("the trailer section is malformed or too long")
        if line.partition(b":")[0].lower() in _FRAMING_FIELDS:
            raise ProtocolError("a trailer field says where the message ends")
