"""Compressed request bodies (RFC 9110, section 8.4), read in steps of bounded time and memory.

A few bytes may stand for a million. So what they stand for comes in pieces, and who reads stops where it is too much.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

READABLE: Final = (b"gzip", b"deflate")
"""The codings that are read."""
# What is none; some write "none", which is no coding that is registered.
_PLAIN: Final = frozenset({b"identity", b"none"})
# The second name of gzip (section 8.4.1.3).
_NAMES: Final = {b"gzip": b"gzip", b"x-gzip": b"gzip", b"deflate": b"deflate"}
# What is looked at in a turn of the loop.
_PIECE: Final = 32 * 1024
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


class Inflater:
    """Reads a body that is coded as `coding`, one of `READABLE`, and stands for `most` bytes at most."""

    __slots__ = ("_begin", "_coding", "_ended", "_room", "_stream")

    def __init__(self, coding: bytes, most: int) -> None:
        self._coding = coding
        self._room = most
        self._begin = b""
        self._stream: zlib._Decompress | None = None
        self._ended = False

    @property
    def too_much(self) -> bool:
        """It stands for more; nothing of that is given."""
        return self._room < 0

    def pieces(self, part: bytes) -> Iterator[bytes]:
        """What `part` adds, which may be nothing. What is broken ends with what was sound."""
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
            # There may be more of it than fits, although all bytes were taken.
            more = len(piece) == _PIECE
            if self._stream.eof:
                # A gzip body may have several members (RFC 1952, section 2.2).
                data, more = self._stream.unused_data, False
                self._stream, self._ended = None, self._coding != b"gzip"
            yield piece

    def _format(self, data: bytes) -> int:
        if self._coding == b"gzip":
            return _GZIP
        # Some send deflate without the zlib format around it, which begins so (RFC 1950, section 2.2).
        return _ZLIB if data[0] & 15 == 8 and not (data[0] * 256 + data[1]) % 31 else _RAW


def coding_of(tokens: list[bytes]) -> bytes | None:
    """The coding of a body whose Content-Encoding has these `tokens`: empty for none; None if it is not read."""
    codings = [token for token in tokens if token not in _PLAIN]
    if not codings:
        return b""
    return _NAMES.get(codings[0]) if len(codings) == 1 else None
