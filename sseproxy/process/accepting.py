"""Accepting connections, evenly among the workers.

All workers listen on the same sockets, and the first one that wakes up accepts a connection. Without further
measures, a few workers would get nearly all connections. So a worker that has clearly more connections than the least
busy one stops listening. It listens again when the others have as many. It also does so when a connection waits and
the others do not accept it, so a worker that hangs delays nobody.

To stop and to start, uvloop's server on a duplicate of each socket is closed and created. `accept` in our own code
would cost 40 us more for each connection: 107 instead of 66.
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

# The names in the ledger: whether a worker accepts, and how often one that does not listen has looked at the others.
_ACCEPTING, _LOOKS = NAMES = ("accepting", "looks")
# Seconds until a worker that does not listen looks at the others: at first, at most, and while a connection waits.
_FIRST_LOOK, _LAST_LOOK, _WHILE_ONE_WAITS = 0.001, 0.008, 0.004
# Seconds. A worker that neither accepts nor looks for so long, while a connection waits, hangs. This is longer than the
# time between two looks.
_HANGS_AFTER: Final = 0.012
# A worker's number of connections, and of looks.
_Progress = tuple[int, int]


def ahead_of(least: int) -> int:
    """The most connections with which a worker still listens, if the least busy one has `least`."""
    return least + 1 + least // 4


class Accepting:
    """Accepts connections on `sockets`, as long as other workers do not have clearly fewer.

    `protocol` creates the protocol of a connection. `row` is the worker's row in the ledger.
    """

    def __init__(self, sockets: Sequence[socket.socket], protocol: Callable[[], asyncio.Protocol], row: Row) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._protocol = protocol
        self._row = row.number
        self._accepts = row.count(_ACCEPTING)
        self._connections = row.count(CONNECTIONS)
        self._looks = row.count(_LOOKS)
        self._servers: list[asyncio.Server] = []
        # Connections that were accepted and are not counted in the ledger yet.
        self._coming = 0
        # Workers that hang, with their progress at that time. They are ignored until there is more.
        self._hanging: dict[int, _Progress] = {}
        # When a waiting connection was first seen, and the progress of the others at that time.
        self._since: tuple[float, dict[int, _Progress]] | None = None
        self._look: asyncio.TimerHandle | None = None
        self._coming_back: asyncio.Task[None] | None = None
        self._waiting = select.poll()
        for sock in sockets:
            self._waiting.register(sock, select.POLLIN)

    async def start(self) -> None:
        self._accepts.add(1)
        await self._open()

    def stop(self) -> None:
        """Stops for good, and closes the sockets. Connections that wait are left to other workers."""
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
                # Nobody else has the copy.
                copy.close()
                raise
            self._servers.append(server)
        if not self._accepts.own:
            # `stop` was called meanwhile.
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

    def _others(self) -> dict[int, _Progress]:
        """The progress of the other workers that accept, by row. Workers that hang are left out."""
        accepting, connections, looks = self._accepts.each(), self._connections.each(), self._looks.each()
        others = {row: (connections[row], looks[row]) for row, accepts in enumerate(accepting) if accepts}
        others.pop(self._row, None)
        return {row: progress for row, progress in others.items() if self._hanging.get(row) != progress}

    def _is_ahead(self) -> bool:
        least = min((connections for connections, _ in self._others().values()), default=None)
        return least is not None and self._connections.own + self._coming > ahead_of(least)

    def _look_in(self, seconds: float) -> None:
        self._look = self._loop.call_later(seconds, self._look_again, seconds)

    def _look_again(self, waited: float) -> None:
        """Listens again, or looks again later."""
        self._looks.add(1)
        waits = bool(self._waiting.poll(0))
        if waits:
            self._find_hanging()
        else:
            self._since = None
        if not self._is_ahead():
            self._look = self._since = None
            self._coming_back = self._loop.create_task(self._come_back())
        else:
            self._look_in(_WHILE_ONE_WAITS if waits else min(2 * waited, _LAST_LOOK))

    async def _come_back(self) -> None:
        try:
            await self._open()
        except OSError:
            # There is no file descriptor left. There will be some when connections end.
            self._close()
            if self._accepts.own:
                self._look_in(_LAST_LOOK)

    def _find_hanging(self) -> None:
        now, others = self._loop.time(), self._others()
        if self._since is None:
            self._since = now, others
        elif now - self._since[0] >= _HANGS_AFTER:
            _, before = self._since
            self._hanging |= {row: progress for row, progress in others.items() if before.get(row) == progress}
            self._since = None
