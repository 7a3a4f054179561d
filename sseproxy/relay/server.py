"""All client connections of a worker, from accept to their end."""

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
    """An accepted connection until its TLS handshake is complete. It is already counted among the connections."""

    def __init__(self, server: DownstreamServer, loop: asyncio.AbstractEventLoop, tls: ssl.SSLContext) -> None:
        self._server = server
        self._loop = loop
        self._tls = tls
        self._early = b""
        self._lost = False
        self._start_tls_task: asyncio.Future[asyncio.Transport | None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        accepted, slots = cast(asyncio.Transport, transport), self._server.slots
        with ExitStack() as ends:
            ends.callback(accepted.abort)
            ends.callback(slots.remove, self)
            refused = slots.add(self, address_of(accepted))
            # An error response would need a handshake. A client with too many connections does not get one.
            if not slots.crowded and (refused is None or refused.reason == "connections"):
                self._server.start_handshake(self._handshake(accepted))
                ends.pop_all()

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, exc: BaseException | None) -> None:
        # The connection ended before `start_tls` has replaced this protocol.
        self._lost = True
        if self._start_tls_task is not None:
            self._start_tls_task.cancel()

    async def _handshake(self, transport: asyncio.Transport) -> None:
        with ExitStack() as ends:
            ends.callback(transport.abort)
            ends.callback(self._server.slots.remove, self)
            protocol = DownstreamProtocol(self._server, self._loop)
            encrypted = await self._start_tls(transport, protocol)
            if encrypted is not None and not encrypted.is_closing():
                # From here on the `DownstreamProtocol` is counted instead of this object.
                self._server.slots.remove(self)
                protocol.connection_made(encrypted)
                ends.pop_all()

    async def _start_tls(self, transport: asyncio.Transport, protocol: DownstreamProtocol) -> asyncio.Transport | None:
        """The encrypted transport of `protocol`. None if the handshake fails."""
        if self._lost or transport.is_closing():
            return None
        timeout = self._server.limits.request_head_time
        task = self._start_tls_task = asyncio.ensure_future(
            self._loop.start_tls(transport, protocol, self._tls, server_side=True, ssl_handshake_timeout=timeout)
        )
        try:
            # `start_tls` begins in the next turn of the loop. Bytes that were read before it are passed on in the turn
            # after that.
            await asyncio.sleep(0)
            if self._early:
                self._loop.call_soon(self._hand_over, transport)
            # uvloop's own timeout does not run if the connection has ended meanwhile.
            done, _ = await asyncio.wait([task], timeout=timeout)
            return task.result() if done and not task.cancelled() and task.exception() is None else None
        finally:
            task.cancel()

    def _hand_over(self, transport: asyncio.Transport) -> None:
        # The transport's protocol is uvloop's own, which decrypts.
        protocol = cast(asyncio.BufferedProtocol, transport.get_protocol())
        early = memoryview(self._early)
        while early and not transport.is_closing():
            room = memoryview(protocol.get_buffer(len(early)))[: len(early)]
            room[:] = early[: len(room)]
            protocol.buffer_updated(len(room))
            early = early[len(room) :]


class DownstreamServer:
    """All client connections.

    `handle` answers a request. `malformed` answers one that could not be parsed. `slots` counts and limits the
    connections.
    """

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[Answer]],
        malformed: Callable[[RequestError], Answer],
        limits: Limits,
        slots: Connections,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.handle = handle
        self.malformed = malformed
        self.limits = limits
        self.slots = slots
        self.hangups = HangupWatch(self._loop)
        self.parsed_for = BaseProtocol(self._loop)
        """A protocol for aiohttp's parser, which would use it to pause reading."""
        self.requests_count = 0
        self.connections: set[DownstreamProtocol] = set()
        """The open connections, and those that are closed but whose task has not ended yet."""
        self._handshakes: set[asyncio.Task[None]] = set()
        self.empty = asyncio.Event()
        """Set while there is no connection, no handshake and no exchange."""
        self.empty.set()

    def __call__(self, tls: ssl.SSLContext | None = None) -> asyncio.Protocol:
        """The protocol for a newly accepted connection; with TLS if there is a `tls` context."""
        return DownstreamProtocol(self, self._loop) if tls is None else _Accepted(self, self._loop, tls)

    def start_handshake(self, handshake: Awaitable[None]) -> None:
        """Runs the TLS handshake of a connection as a task."""
        task = asyncio.ensure_future(handshake)
        self._handshakes.add(task)
        self.empty.clear()
        task.add_done_callback(self._handshake_ended)

    def _handshake_ended(self, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        self._check_empty()

    def made(self, connection: DownstreamProtocol) -> RequestError | None:
        """Adds a new `connection`. Returns the error for every request on it, or None if it is within the limits.

        If there are far too many connections, it is closed immediately.
        """
        self.connections.add(connection)
        self.empty.clear()
        refused = self.slots.add(connection, connection.address)
        if self.slots.crowded and connection.transport is not None:
            connection.transport.abort()
        return refused

    def lost(self, connection: DownstreamProtocol, task: asyncio.Task[None] | None) -> None:
        """The `connection` is closed. It is forgotten when `task`, which answers its requests, has ended."""
        try:
            self.slots.remove(connection)
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
        """Closes the connections that have had no request for so many `seconds`."""
        for connection in list(self.connections):
            connection.close_if_idle(seconds)

    async def shutdown(self, seconds: float) -> None:
        """Ends every connection. Those with a request have so many `seconds` to end by themselves."""
        for handshake in list(self._handshakes):
            handshake.cancel()
        self.close_idle_for(0.0)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.empty.wait()
        for connection in list(self.connections):
            connection.end()
        await self.empty.wait()
