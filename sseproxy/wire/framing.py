"""Where the body of a response ends (RFC 9112, sections 6.3 and 7.1), read strictly.

`whole_chunks` answers the common question, is this read whole chunks and nothing else; a body decoder walks everything
else, in any split. What is not exactly HTTP/1.1 is a `ProtocolError`: a lenient reading here is how
responses are smuggled.
"""

from __future__ import annotations

import re
from typing import Literal, Protocol

from ..errors import BrokenBodyError, ProtocolError
from .headers import Field, Fields

Framing = int | Literal["chunked", "close"]
"""Where a body ends: after so many bytes, as its chunks say, or with the connection."""

# 16 hexadecimal digits are a 64-bit size; nothing longer can be meant honestly.
_CHUNK_START = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
# chunk-size plus chunk extensions. LLM servers send no extensions; 256 bytes are more than any CDN adds.
MAX_SIZE_LINE = 256
# Trailers are discarded (RFC 9110, section 6.5.1), so they only need a bound.
MAX_TRAILERS = 8192
# No trailer may say where a message ends (RFC 9110, section 6.5.1); one that does means to be read by somebody else.
_FRAMING_FIELDS = (b"content-length", b"transfer-encoding")

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_FIELD_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_CRLF = b"\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def _usual_starts(most: int) -> tuple[bytes, ...]:
    """What whole chunks of fewer than `most` bytes, with their framing, begin with, by that length."""
    starts = [b""] * most
    for size in range(1, most):
        start = b"%x\r\n" % size
        length = len(start) + size + 2
        if length < most:
            starts[length] = start
    return tuple(starts)


USUAL_STARTS = _usual_starts(4096)
"""What a chunk begins with, as usually written, by its length with its framing; empty where none has that length."""


def whole_chunks(data: bytes) -> list[bytes]:
    """The chunks of `data`, each with its framing; none if it is not all whole chunks with a payload and no extensions.

    If there are, `data` can be forwarded as it is.
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
    """What is in one of the `whole_chunks`."""
    return chunk[chunk.index(b"\n") + 1 : -2]


def frame(payload: bytes) -> bytes:
    """`payload`, which must not be empty, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def response_framing(method: str, status: int, version: tuple[int, int], fields: Fields) -> Framing | None:
    """How the body of a response is framed; None if it has none.

    Raises `ProtocolError` where the head is ambiguous: lengths that differ, a length together with a transfer coding,
    a coding other than a lone chunked, or any coding from HTTP/1.0.
    """
    lengths = {length.strip(b" \t") for value in fields.named(b"content-length") for length in value.split(b",")}
    codings = fields.tokens(b"transfer-encoding")
    if fields.named(b"transfer-encoding") and (lengths or codings != [b"chunked"] or version != (1, 1)):
        raise ProtocolError("the transfer coding of the response is not a lone chunked")
    if len(lengths) > 1 or any(_DIGITS.fullmatch(length) is None for length in lengths):
        raise ProtocolError("the Content-Length of the response is not one number")
    if method == "HEAD" or status in (204, 304):
        return None
    if codings:
        return "chunked"
    return int(lengths.pop()) if lengths else "close"


def framing_fields(framing: Framing | None) -> list[Field]:
    """The fields that announce `framing`."""
    if framing == "chunked":
        return [(b"Transfer-Encoding", b"chunked")]
    return [(b"Content-Length", b"%d" % framing)] if isinstance(framing, int) else []


class BodyDecoder(Protocol):
    """Takes the framing off a body. `done` is true once the body is complete, `excess` bytes came after it."""

    done: bool
    excess: int

    def feed(self, data: bytes) -> bytes:
        """The payload within `data`. Raises `BrokenBodyError`, with the payload before the break."""

    def end(self) -> bool:
        """The connection has ended. True if the body was complete by that."""


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
    """A body that ends with its connection."""

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
    """A chunked body. `at_start` is true between chunks, where `whole_chunks` may be asked instead."""

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
                raise ProtocolError("a line of the chunked framing is too long or does not end where it must")
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
