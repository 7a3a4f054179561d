"""Reads of bounded size, and for chunks that are alike plain ones.

uvloop reads up to 256,000 bytes at once, unless a protocol brings the buffer; to bring one is a call more for each
read, and to go by the usual way is one more again. So chunks that are alike, which are small, are read plainly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

# What is read at once: with a full write buffer it is what is held for a client that does not read, and it bounds for
# how long the bytes of one connection keep those of others waiting.
MAX_READ: Final = 32 * 1024
# More is read at once where events are large, where a body comes as fast as the network takes it, or where the worker
# is late.
_SMALL: Final = 4 * 1024


class _Reads:
    """Stands between a transport and its `protocol`, which is told everything but what was read."""

    __slots__ = ("_protocol",)

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


class BoundedReads(_Reads, asyncio.BufferedProtocol):
    """At most `MAX_READ` bytes at once."""

    __slots__ = ("deliver", "small")

    # One for all: a read is handed over before there is another.
    _buffer = memoryview(bytearray(MAX_READ))

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__(protocol)
        self.deliver: Callable[[bytes], None] = protocol.data_received
        """Takes what was read; who takes it may change."""
        self.small = True
        """Whether all reads have been. What the kernel buffers grows with what a connection has carried."""

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.take(bytes(self._buffer[:nbytes]))

    def take(self, data: bytes) -> None:
        """`data` was read."""
        if len(data) > _SMALL:
            self.small = False
        self.deliver(data)


class PlainReads(_Reads, asyncio.Protocol):
    """What a subclass does with a read of any size.

    That may be as large as what the kernel has buffered: for a connection that has carried only what was small, some
    128 KB.
    """

    __slots__ = ()
