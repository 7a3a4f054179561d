"""Decides how many bytes of a connection are read at once, and when.

One connection must not make all others wait. So the size of a read is limited, and the bytes are delivered in pieces.
If that takes long, the rest waits for another turn of the event loop, and the pieces become smaller. So the code that
receives the bytes does not have to be fast, whatever they contain.

uvloop reads up to 256,000 bytes at once, unless the protocol provides the buffer (`asyncio.BufferedProtocol`). As long
as a read fills the buffer, uvloop reads again in the same turn. But a buffer costs one more Python call for each read,
and `BoundedReads` another one. So runs of similar chunks, which are small, are read without it (`PlainReads`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import thread_time
from typing import Final, Protocol

# Bytes of one read. A client that does not read holds up to so many bytes, in addition to a full write buffer.
MAX_READ: Final = 32 * 1024
# Bytes. A read below this is small. Larger reads happen if events are large, if a body arrives as fast as the network
# allows, or if the worker is late. No read has less room than this.
_SMALL: Final = 4 * 1024
# Bytes. A piece this small is not made smaller.
_LEAST: Final = 2 * 1024
# Line ends and opening braces in one piece. Small events and objects take longest for their size, 3 to 15 us each, and
# each has at least one of these. A large read of ordinary events has fewer.
_MAX_MARKS: Final = 600
# Seconds of CPU that one connection may take in one turn of the loop. A piece that takes half of it is too large. This
# is CPU and not elapsed time: on a busy machine, smaller pieces would only cause more work.
_TURN: Final = 0.002


def piece_size(data: bytes, room: int) -> int:
    """How many bytes of `data` are delivered at once, at most `room`.

    This must be known before: the first piece of a read can only be measured when it has been delivered.
    """
    size = min(len(data), room)
    if size <= _LEAST:
        return size
    marks = sum(data.count(mark, 0, size) for mark in (b"\n", b"\r", b"{"))
    return size if marks <= _MAX_MARKS else max(size * _MAX_MARKS // marks, _LEAST)


class Connection(Protocol):
    """A protocol whose reads are limited. `transport` is None when the connection is lost."""

    @property
    def transport(self) -> asyncio.Transport | None: ...

    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> bool | None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class _Reads:
    """Stands between a transport and its `protocol`. It passes on every call except those with data."""

    __slots__ = ("_protocol",)

    def __init__(self, protocol: Connection) -> None:
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
    """Reads at most `MAX_READ` bytes at once, and limits the work in one turn of the loop."""

    __slots__ = ("_ahead", "_reading", "_room", "_turn", "_worked", "deliver", "paused", "small")

    # One buffer for all connections: each read is copied out of it before the next read begins.
    _buffer = memoryview(bytearray(MAX_READ))

    def __init__(self, protocol: Connection) -> None:
        super().__init__(protocol)
        self.deliver: Callable[[bytes], None] = protocol.data_received
        """Receives the bytes. It may be replaced at any time."""
        self.small = True
        """Whether all reads so far were small. The kernel's receive buffer grows when a connection has carried more."""
        self.paused = False
        """Whether delivery is paused."""
        # Bytes that were read and wait to be delivered, and the size of a piece.
        self._ahead = b""
        self._room = MAX_READ
        # Seconds that delivery has taken in this turn, and the handle of the next turn, if there is something to do.
        self._worked = 0.0
        self._turn: asyncio.Handle | None = None
        self._reading = True

    @property
    def ahead(self) -> bool:
        """Whether bytes were read that wait to be delivered."""
        return bool(self._ahead)

    def pause(self) -> None:
        """Stops reading and delivery until `resume`."""
        self.paused = True
        self._settle()

    def resume(self) -> None:
        self.paused = False
        if self._ahead and self._turn is None:
            self._wait_for_turn()
        self._settle()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer if self._room == MAX_READ else self._buffer[: self._room]

    def buffer_updated(self, nbytes: int) -> None:
        self.take(bytes(self._buffer[:nbytes]))

    def take(self, data: bytes) -> None:
        """Delivers `data`, which was read."""
        # If the read has filled the buffer, which may be as small as this, uvloop may read again in this turn.
        if len(data) >= _SMALL:
            self.small = False
        elif not self._ahead:
            self.deliver(data)
            return
        self._ahead += data
        if not self.paused and self._turn is None:
            self._hand_over()
        self._settle()

    def put_back(self, data: bytes) -> None:
        """Delivers `data` again, before all other bytes, because `deliver` has been replaced."""
        if self._ahead:
            self._ahead = data + self._ahead
        else:
            self.take(data)

    def _hand_over(self) -> None:
        """Delivers bytes, in pieces, as long as this turn allows."""
        began = thread_time()
        while self._ahead and not self.paused:
            size = piece_size(self._ahead, self._room)
            piece, self._ahead = self._ahead[:size], self._ahead[size:]
            self.deliver(piece)
            now = thread_time()
            took, began = now - began, now
            if took > _TURN / 2:
                self._room = max(self._room // 2, _SMALL)
            elif took < _TURN / 8:
                self._room = min(self._room * 2, MAX_READ)
            self._worked += took
            if self._worked > _TURN:
                self._wait_for_turn()
                return

    def _wait_for_turn(self) -> None:
        self._worked = 0.0
        self._turn = asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._turn = None
        try:
            self._hand_over()
        except BaseException:
            # Otherwise the connection would stay open and never be read again. The loop does the same when a protocol
            # raises.
            self._ahead = b""
            if self._protocol.transport is not None:
                self._protocol.transport.abort()
            raise
        self._settle()

    def _settle(self) -> None:
        """Makes the transport read, or pause, as needed."""
        reads = not (self.paused or self._ahead or self._turn)
        transport = self._protocol.transport
        if reads is not self._reading and transport is not None and not transport.is_closing():
            self._reading = reads
            if reads:
                transport.resume_reading()
            else:
                transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._turn is not None:
            self._turn.cancel()
        ahead, self._ahead = self._ahead, b""
        try:
            if ahead:
                self.deliver(ahead)
        finally:
            super().connection_lost(exc)


class PlainReads(_Reads, asyncio.Protocol):
    """Base class of protocols that get reads without a limit, and without the calls that a limit costs.

    A read may be as large as the kernel's receive buffer. For a connection that has only carried small reads, that is
    about 128 KB.
    """

    __slots__ = ()
