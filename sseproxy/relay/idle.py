"""The connections to an endpoint that wait for another request.

aiohttp's connector makes connections, but its pool is not used: this one takes fewer steps, which are taken for each
request. The connection that was used last is taken first, as in nginx. So after a busy time, those that are not needed
any more stay idle, and are closed. The connector counts all of them as in use.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import Final

from aiohttp.connector import Connection

# Seconds. uvicorn and Node.js close an idle connection after 5 s. With less than that, this side closes it first, so a
# request does not meet a connection that the upstream is just closing.
KEEPALIVE: Final = 4.0


class Idle:
    """Idle connections, for at most `KEEPALIVE` seconds each. Create and close it in the running loop."""

    __slots__ = ("_closed", "_connections", "_loop", "_timer")

    def __init__(self) -> None:
        # Each with the time since when it is idle. The last one has been idle for the shortest time.
        self._connections: deque[tuple[Connection, float]] = deque()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def __iter__(self) -> Iterator[Connection]:
        return (connection for connection, _ in self._connections)

    def add(self, connection: Connection) -> None:
        """Keeps `connection`, or closes it if this is closed already."""
        if self._closed:
            connection.close()
            return
        self._connections.append((connection, perf_counter()))
        if self._timer is None:
            self._timer = self._loop.call_later(KEEPALIVE, self._expire)

    def take(self) -> Connection | None:
        """The connection that has been idle for the shortest time. None if there is none."""
        return self._connections.pop()[0] if self._connections else None

    def _expire(self) -> None:
        self._timer = None
        now = perf_counter()
        try:
            while self._connections and self._connections[0][1] + KEEPALIVE <= now:
                self._connections.popleft()[0].close()
        finally:
            if self._connections:
                due = self._connections[0][1] + KEEPALIVE
                self._timer = self._loop.call_later(max(0.0, due - now), self._expire)

    def close(self) -> None:
        """Closes all of them."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        while self._connections:
            self._connections.popleft()[0].close()
