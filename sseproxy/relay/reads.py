"""Reads of bounded size."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

# What is read at once: with a full write buffer it is what is held for a client that does not read, and it bounds for
# how long the bytes of one connection keep those of others waiting.
MAX_READ: Final = 32 * 1024


class BoundedReads(asyncio.BufferedProtocol):
    """Reads for `protocol`, a little at a time: uvloop would take up to 256,000 bytes at once."""

    # One for all: a read is handed over before there is another.
    _buffer = memoryview(bytearray(MAX_READ))

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self.deliver: Callable[[bytes], None] = protocol.data_received
        """Takes what was read; who takes it may change."""
        self.eof_received = protocol.eof_received  # type: ignore[method-assign]
        self.connection_lost = protocol.connection_lost  # type: ignore[method-assign]
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.deliver(bytes(self._buffer[:nbytes]))
