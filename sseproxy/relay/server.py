"""The connections of all clients of a worker, from being accepted to their end."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, cast

from aiohttp.base_protocol import BaseProtocol

from ..errors import RequestError
from .admission import Connections
from .answers import Answer
from .downstream import DownstreamProtocol, Request, address_of
from .hangups import HangupWatch

if TYPE_CHECKING:
    from ..config import Limits


class _Accepted(asyncio.Protocol):
    """A connection that was accepted. It has a place from then on, also while TLS is being agreed on."""

    def __init__(self, server: DownstreamServer, loop: asyncio.AbstractEventLoop, tls: ssl.SSLContext) -> None:
        self._server = server
        self._loop = loop
        self._tls = tls
        self._early = b""
        self._lost = False
        self._agreed: asyncio.Future[asyncio.Transport | None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        accepted, places = cast(asyncio.Transport, transport), self._server.places
        with ExitStack() as ends:
            ends.callback(accepted.abort)
            ends.callback(places.gone, self)
            refused = places.come(self, address_of(accepted))
            # To tell a client that it has too many would take a handshake for each of them.
            if not places.crowded and (refused is None or refused.reason == "connections"):
                self._server.agree(self._handshake(accepted))
                ends.pop_all()

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, exc: BaseException | None) -> None:
        # It ended before TLS was asked for, of which nobody else would hear.
        self._lost = True
        if self._agreed is not None:
            self._agreed.cancel()

    async def _handshake(self, transport: asyncio.Transport) -> None:
        with ExitStack() as ends:
            ends.callback(transport.abort)
            ends.callback(self._server.places.gone, self)
            protocol = DownstreamProtocol(self._server, self._loop)
            encrypted = await self._agree(transport, protocol)
            if encrypted is not None and not encrypted.is_closing():
                # From here on it has a place as any other.
                self._server.places.gone(self)
                protocol.connection_made(encrypted)
                ends.pop_all()

    async def _agree(self, transport: asyncio.Transport, protocol: DownstreamProtocol) -> asyncio.Transport | None:
        """The encrypted transport of `protocol`; None if the client speaks no TLS, or none that is accepted here."""
        if self._lost or transport.is_closing():
            return None
        patience = self._server.limits.request_head_time
        agreed = self._agreed = asyncio.ensure_future(
            self._loop.start_tls(transport, protocol, self._tls, server_side=True, ssl_handshake_timeout=patience)
        )
        try:
            # The next turn of the loop begins to agree. What was read before it is handed over in the one after.
            await asyncio.sleep(0)
            if self._early:
                self._loop.call_soon(self._hand_over, transport)
            # uvloop's own time does not run where the connection ended in between.
            done, _ = await asyncio.wait([agreed], timeout=patience)
            return agreed.result() if done and not agreed.cancelled() and agreed.exception() is None else None
        finally:
            agreed.cancel()

    def _hand_over(self, transport: asyncio.Transport) -> None:
        # uvloop's, for TLS.
        protocol = cast(asyncio.BufferedProtocol, transport.get_protocol())
        early = memoryview(self._early)
        while early and not transport.is_closing():
            room = memoryview(protocol.get_buffer(len(early)))[: len(early)]
            room[:] = early[: len(room)]
            protocol.buffer_updated(len(room))
            early = early[len(room) :]


class DownstreamServer:
    """The connections of all clients.

    `handle` answers a request. `malformed` answers what could not become one.
    """

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[Answer]],
        malformed: Callable[[RequestError], Answer],
        limits: Limits,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.handle = handle
        self.malformed = malformed
        self.limits = limits
        self.places = Connections(limits)
        self.hangups = HangupWatch(self._loop)
        self.parsed_for = BaseProtocol(self._loop)
        """What aiohttp's parser wants a protocol for, which is to pause it."""
        self.requests_count = 0
        self.connections: set[DownstreamProtocol] = set()
        """Those that have not ended; of one whose client is gone, its task may still end."""
        self._handshakes: set[asyncio.Task[None]] = set()
        self.empty = asyncio.Event()
        """Set while there is no connection, no handshake, nor an exchange that has still to end after one."""
        self.empty.set()

    def __call__(self, tls: ssl.SSLContext | None = None) -> asyncio.Protocol:
        """The protocol of a connection that was accepted, which is to be encrypted as `tls` has it."""
        return DownstreamProtocol(self, self._loop) if tls is None else _Accepted(self, self._loop, tls)

    def agree(self, handshake: Awaitable[None]) -> None:
        """A connection is about to be encrypted."""
        task = asyncio.ensure_future(handshake)
        self._handshakes.add(task)
        self.empty.clear()
        task.add_done_callback(self._agreed)

    def _agreed(self, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        self._check_empty()

    def made(self, connection: DownstreamProtocol) -> RequestError | None:
        """There is a new `connection`. Why no request of it may be taken, or None.

        Far above the limit it is closed at once.
        """
        self.connections.add(connection)
        self.empty.clear()
        refused = self.places.come(connection, connection.address)
        if self.places.crowded and connection.transport is not None:
            connection.transport.abort()
        return refused

    def lost(self, connection: DownstreamProtocol, task: asyncio.Task[None] | None) -> None:
        """The `connection` is gone; `task` may still have to end what was on it."""
        try:
            self.places.gone(connection)
        finally:
            if task is None or task.done():
                self._forget(connection)
            else:
                task.add_done_callback(lambda _: self._forget(connection))

    def _forget(self, connection: DownstreamProtocol) -> None:
        self.connections.discard(connection)
        self._check_empty()

    def _check_empty(self) -> None:
        if not (self.connections or self._handshakes):
            self.empty.set()

    def close_idle_for(self, seconds: float) -> None:
        """Closes the connections that have been without a request for so long."""
        for connection in list(self.connections):
            connection.close_if_idle(seconds)

    async def shutdown(self, seconds: float) -> None:
        """Ends every connection; what is under way has so many `seconds` to end by itself."""
        for handshake in list(self._handshakes):
            handshake.cancel()
        self.close_idle_for(0.0)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.empty.wait()
        for connection in list(self.connections):
            connection.end()
        await self.empty.wait()
