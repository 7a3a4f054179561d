"""What is read from a connection, how much of it at once, and when.

One connection must not keep the bytes of all others waiting. So a read is bounded, and what was read is handed over in
pieces; where that takes long, the rest waits for another turn of the loop, and pieces become smaller. That holds for
whatever the bytes mean: nobody who takes them need be fast.

uvloop reads up to 256,000 bytes at once, unless a protocol brings the buffer, and reads again in the same turn as long
as the buffer was filled. To bring a buffer is a call more for each read, and to go by the usual way is one more again.
So runs of similar chunks, which are small, are read plainly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import thread_time
from typing import Final, Protocol

# What is read at once: with a full write buffer it is what is held for a client that does not read.
MAX_READ: Final = 32 * 1024
# More is read at once where events are large, where a body comes as fast as the network takes it, or where the worker
# is late. No less than this is handed over at once.
_SMALL: Final = 4 * 1024
# Seconds of CPU that one connection may take in a turn of the loop; a piece that takes half of it is too large. Not
# seconds of a clock: on a busy machine, smaller pieces would make it busier.
_TURN: Final = 0.002


class Connection(Protocol):
    """A protocol whose reads are bounded: it has a transport until that is lost."""

    @property
    def transport(self) -> asyncio.Transport | None: ...

    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> bool | None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class _Reads:
    """Stands between a transport and its `protocol`, which is told everything but what was read."""

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
    """At most `MAX_READ` bytes at once, and little work in a turn. Who wants no more for now says `pause`."""

    __slots__ = ("_ahead", "_reading", "_room", "_turn", "_worked", "deliver", "paused", "small")

    # One for all: a read is taken over before there is another.
    _buffer = memoryview(bytearray(MAX_READ))

    def __init__(self, protocol: Connection) -> None:
        super().__init__(protocol)
        self.deliver: Callable[[bytes], None] = protocol.data_received
        """Takes what was read; who takes it may change."""
        self.small = True
        """Whether all reads have been. What the kernel buffers grows with what a connection has carried."""
        self.paused = False
        """Whether nothing may be handed over: `pause` and `resume` say so."""
        # What was read and waits to be handed over, and how much of it is at once.
        self._ahead = b""
        self._room = MAX_READ
        # Seconds that handing over has taken since the last time that others came first, and the turn to go on in.
        self._worked = 0.0
        self._turn: asyncio.Handle | None = None
        self._reading = True

    @property
    def ahead(self) -> bool:
        """Whether something was read that waits."""
        return bool(self._ahead)

    def pause(self) -> None:
        """Nothing is handed over, nor read, until `resume`."""
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
        """`data` was read."""
        # A read that filled the buffer, be it at its smallest, may have another behind it in this turn.
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
        """`data` was handed over, and is for somebody else, who gets it first."""
        if self._ahead:
            self._ahead = data + self._ahead
        else:
            self.take(data)

    def _hand_over(self) -> None:
        """What was read goes on, in pieces, as far as this turn allows."""
        began = thread_time()
        while self._ahead and not self.paused:
            piece, self._ahead = self._ahead[: self._room], self._ahead[self._room :]
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
            # As the loop does where it calls. The connection would stay, and nobody read from it.
            self._ahead = b""
            if self._protocol.transport is not None:
                self._protocol.transport.abort()
            raise
        self._settle()

    def _settle(self) -> None:
        """The transport reads, or does not."""
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
    """What a subclass does with a read of any size.

    That may be as large as what the kernel has buffered: for a connection that has carried only what was small, some
    128 KB.
    """

    __slots__ = ()
