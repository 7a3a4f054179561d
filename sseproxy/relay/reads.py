"""Reads of bounded size.

uvloop reads up to 256,000 bytes at once, unless a protocol brings the buffer; to bring one is a call more for each
read. So an upstream's reads are plain as long as they are small, which those of tokens are.
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

    __slots__ = ("_protocol", "deliver")

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        self.deliver: Callable[[bytes], None] = protocol.data_received
        """Takes what was read; who takes it may change."""

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

    __slots__ = ()

    # One for all: a read is handed over before there is another.
    _buffer = memoryview(bytearray(MAX_READ))

    def bound(self) -> None:
        """As they are."""

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.deliver(bytes(self._buffer[:nbytes]))


class PlainReads(_Reads, asyncio.Protocol):
    """Plain reads from `transport`, until one is not small, or until `bound`; from then on, bounded ones.

    The read that ends it may be as large as what the kernel had buffered by then, which for a connection that has
    carried little is some 128 KB. It stays ended, because that grows with what a connection has carried.
    """

    __slots__ = ("_transport",)

    def __init__(self, protocol: asyncio.Protocol, transport: asyncio.Transport) -> None:
        super().__init__(protocol)
        self._transport: asyncio.Transport | None = transport

    def data_received(self, data: bytes) -> None:
        if len(data) > _SMALL:
            self.bound()
        deliver = self.deliver
        deliver(data)

    def bound(self) -> None:
        """No more plain reads."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.set_protocol(BoundedReads(self))
