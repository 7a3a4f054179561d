"""Decompresses request bodies (RFC 9110, section 8.4) in steps of bounded time and memory.

A few compressed bytes may become millions. So the result comes in pieces, and decompression stops at a limit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

READABLE: Final = (b"gzip", b"deflate")
"""The encodings that can be read."""
# These mean that the body is not compressed. "none" is not registered, but some clients send it.
_PLAIN: Final = frozenset({b"identity", b"none"})
# x-gzip is another name of gzip (section 8.4.1.3).
_NAMES: Final = {b"gzip": b"gzip", b"x-gzip": b"gzip", b"deflate": b"deflate"}
# Bytes that are decompressed in one step.
_PIECE: Final = 32 * 1024
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


class Inflater:
    """Decompresses a body with the encoding `coding`, one of `READABLE`, up to `most` bytes."""

    __slots__ = ("_begin", "_coding", "_ended", "_room", "_stream")

    def __init__(self, coding: bytes, most: int) -> None:
        self._coding = coding
        self._room = most
        self._begin = b""
        self._stream: zlib._Decompress | None = None
        self._ended = False

    @property
    def too_much(self) -> bool:
        """Whether the decompressed body is larger than allowed."""
        return self._room < 0

    def pieces(self, part: bytes) -> Iterator[bytes]:
        """The decompressed bytes that `part` adds, perhaps none. If the data is corrupt, only the bytes before that."""
        data, more = self._begin + part, False
        self._begin = b""
        while (data or more) and not self._ended:
            if self._stream is None and len(data) < 2:
                self._begin = data
                return
            if self._stream is None:
                self._stream = zlib.decompressobj(self._format(data))
            try:
                piece = self._stream.decompress(data, _PIECE)
            except zlib.error:
                self._ended = True
                return
            self._room -= len(piece)
            if self.too_much:
                self._ended = True
                return
            data = self._stream.unconsumed_tail
            # A full piece: more output may be waiting, even if all input was consumed.
            more = len(piece) == _PIECE
            if self._stream.eof:
                # A gzip body may have several members (RFC 1952, section 2.2).
                data, more = self._stream.unused_data, False
                self._stream, self._ended = None, self._coding != b"gzip"
            yield piece

    def _format(self, data: bytes) -> int:
        if self._coding == b"gzip":
            return _GZIP
        # Some clients send raw deflate, without the zlib header that is tested for here (RFC 1950, section 2.2).
        return _ZLIB if data[0] & 15 == 8 and not (data[0] * 256 + data[1]) % 31 else _RAW


def coding_of(tokens: list[bytes]) -> bytes | None:
    """The coding that Content-Encoding names in `tokens`: empty if there is none, None if it cannot be read."""
    codings = [token for token in tokens if token not in _PLAIN]
    if not codings:
        return b""
    return _NAMES.get(codings[0]) if len(codings) == 1 else None
