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

# Under these names it is in the ledger which workers accept, and how often those that have left the sockets looked.
_ACCEPTING, _LOOKS = NAMES = ("accepting", "looks")
# Seconds until a worker that has left the sockets looks how things stand: at first, at most, and while somebody waits.
_FIRST_LOOK, _LAST_LOOK, _WHILE_ONE_WAITS = 0.001, 0.008, 0.004
# Who neither accepts nor looks for so long, while somebody waits, hangs. Longer than the time between two looks.
_HANGS_AFTER: Final = 0.012
# What a worker has done: its connections, and its looks.
_Deeds = tuple[int, int]


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
        self._accepts = row.count(_ACCEPTING)
        self._connections = row.count(CONNECTIONS)
        self._looks = row.count(_LOOKS)
        self._servers: list[asyncio.Server] = []
        # Connections that were accepted and are not counted yet.
        self._coming = 0
        # Workers that let connections wait, with what they had done by then. Until they do more, they do not count.
        self._hanging: dict[int, _Deeds] = {}
        # What others had done when somebody was first seen waiting, and when that was.
        self._since: tuple[float, dict[int, _Deeds]] | None = None
        self._look: asyncio.TimerHandle | None = None
        self._coming_back: asyncio.Task[None] | None = None
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

    def _others(self) -> dict[int, _Deeds]:
        """What the other workers that accept have done, by their rows. Those that hang are not among them."""
        accepting, connections, looks = self._accepts.each(), self._connections.each(), self._looks.each()
        others = {row: (connections[row], looks[row]) for row, accepts in enumerate(accepting) if accepts}
        others.pop(self._row, None)
        return {row: deeds for row, deeds in others.items() if self._hanging.get(row) != deeds}

    def _is_ahead(self) -> bool:
        least = min((connections for connections, _ in self._others().values()), default=None)
        return least is not None and self._connections.own + self._coming > ahead_of(least)

    def _look_in(self, seconds: float) -> None:
        self._look = self._loop.call_later(seconds, self._look_again, seconds)

    def _look_again(self, waited: float) -> None:
        """Comes back, or looks again later."""
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
            # There is no descriptor left, as it may be where connections are many. Some will be free again.
            self._close()
            if self._accepts.own:
                self._look_in(_LAST_LOOK)

    def _find_hanging(self) -> None:
        now, others = self._loop.time(), self._others()
        if self._since is None:
            self._since = now, others
        elif now - self._since[0] >= _HANGS_AFTER:
            _, before = self._since
            self._hanging |= {row: deeds for row, deeds in others.items() if before.get(row) == deeds}
            self._since = None
