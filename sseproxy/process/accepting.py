"""Accepting connections, evenly among the workers.

All workers accept on the same sockets, and whoever comes first has the connection: with nothing more, a few workers
have nearly all of them. So a worker that has clearly more than the least busy one leaves the sockets to the others. It
comes back when they have as many, or when a connection waits and they do not take it: a worker that hangs holds nobody
up.

It is uvloop's server that comes and goes, on a duplicate of each socket. To accept by hand would cost 40 us more for
each connection, 107 instead of 66.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable, Sequence
from typing import Final

from ..ledger.table import Row
from ..relay.admission import CONNECTIONS
from .listeners import BACKLOG

# Under this name it is in the ledger which workers accept.
ACCEPTING: Final = "accepting"
# Seconds until a worker that has left the sockets looks how things stand: the first time, at most, and while somebody
# waits. Even if all others hang, whoever waits is accepted after the last two.
_FIRST_LOOK, _LAST_LOOK, _WHILE_ONE_WAITS = 0.001, 0.016, 0.004


def ahead_of(least: int) -> int:
    """What the least busy worker has and a little more: who has more than this leaves the sockets to others."""
    return least + 1 + least // 4


class Accepting:
    """Accepts on `sockets`, each connection with a new `protocol`, as long as others have not clearly fewer.

    `row` is this worker's in the ledger.
    """

    def __init__(self, sockets: Sequence[socket.socket], protocol: Callable[[], asyncio.Protocol], row: Row) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._protocol = protocol
        self._row = row.number
        self._accepts = row.count(ACCEPTING)
        self._connections = row.count(CONNECTIONS)
        self._servers: list[asyncio.Server] = []
        # Connections that were accepted and are not counted yet.
        self._coming = 0
        # Workers that let connections wait, with what they had then. Until they have more or less, they do not count.
        self._hanging: dict[int, int] = {}
        self._look: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None
        self._waiting = select.poll()
        for sock in sockets:
            self._waiting.register(sock, select.POLLIN)

    async def start(self) -> None:
        self._accepts.add(1)
        await self._open()

    def stop(self) -> None:
        """Accepts nothing any more. Connections that nobody has accepted are for others."""
        if self._accepts.own:
            self._accepts.add(-1)
        if self._look is not None:
            self._look.cancel()
        self._close()
        for sock in self._sockets:
            sock.close()

    async def _open(self) -> None:
        for sock in self._sockets:
            copy = sock.dup()
            try:
                server = await self._loop.create_server(self._accepted, sock=copy, backlog=BACKLOG)
            except BaseException:
                copy.close()
                raise
            self._servers.append(server)
        if not self._accepts.own:
            # It has been stopped meanwhile.
            self._close()

    def _close(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()

    def _accepted(self) -> asyncio.Protocol:
        self._coming += 1
        self._loop.call_soon(self._counted)
        return self._protocol()

    def _counted(self) -> None:
        ahead = self._servers and self._is_ahead()
        self._coming -= 1
        if ahead:
            self._close()
            self._look_in(_FIRST_LOOK)

    def _others(self) -> list[tuple[int, int]]:
        """The other workers that accept: their rows, and how many connections they have."""
        accepting, connections = self._accepts.each(), self._connections.each()
        return [
            (row, connections[row])
            for row, accepts in enumerate(accepting)
            if accepts and row != self._row and self._hanging.get(row) != connections[row]
        ]

    def _is_ahead(self) -> bool:
        least = min((number for _, number in self._others()), default=None)
        return least is not None and self._connections.own + self._coming > ahead_of(least)

    def _look_in(self, seconds: float, others: list[tuple[int, int]] | None = None) -> None:
        self._look = self._loop.call_later(seconds, self._look_again, seconds, others)

    def _look_again(self, waited: float, before: list[tuple[int, int]] | None) -> None:
        """Comes back, or looks again later. If somebody has been waiting, `before` is what others had then."""
        others = self._others()
        if before == others and self._waiting.poll(0):
            own = self._connections.own
            self._hanging |= {row: number for row, number in others if own > ahead_of(number)}
        if not self._is_ahead():
            self._look = None
            self._opening = self._loop.create_task(self._open())
        elif self._waiting.poll(0):
            self._look_in(_WHILE_ONE_WAITS, others)
        else:
            self._look_in(min(2 * waited, _LAST_LOOK))
