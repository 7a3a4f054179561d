"""The memory of a served proxy, and what its peers need to bring it into a situation.

Memory is what processes have allocated: `Anonymous` of /proc/PID/smaps_rollup (proc(5)). Their RSS and PSS have the
pages of libraries as well, which come and go with other processes. TCP buffers belong to the kernel, which bounds them
itself (tcp_rmem, tcp_wmem).
"""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.harness import Peer
from tests.served import Served

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# In asyncio's debug mode, for which any value will do, futures and handles remember where they were made.
NO_DEBUG = {"PYTHONASYNCIODEBUG": ""}
# Looks at the processes, and seconds between two of them.
LOOK = 0.02
# So many looks without progress are a standstill: half a second in which loopback moves nothing.
STANDSTILL = 25
# What the tool's own sockets buffer, so that the bytes sent are not the kernel's.
SOCKET_BUFFER = 64 * KIB
GET = b"GET /v1/models HTTP/1.1\r\nHost: proxy\r\n\r\n"


def held(pid: int) -> int:
    """What a process has allocated and touched, in bytes."""
    (kib,) = re.findall(r"^Anonymous:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return int(kib) * KIB


class Watch:
    """Looks at the memory of some processes for as long as it is open."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self.before = self.most = self.now()

    def now(self) -> int:
        return sum(map(held, self._pids))

    @property
    def growth(self) -> int:
        self.most = max(self.most, self.now())
        return self.most - self.before

    async def look(self) -> None:
        while True:
            self.most = max(self.most, self.now())
            await asyncio.sleep(LOOK)


@asynccontextmanager
async def watching(served: Served) -> AsyncIterator[Watch]:
    """The memory of the supervisor and the worker, from now on."""
    await served.get("/metrics")
    watch = Watch([served.pid, *served.workers])
    looking = asyncio.get_running_loop().create_task(watch.look())
    try:
        yield watch
    finally:
        looking.cancel()


def small_buffers(peer: Peer) -> None:
    sock = peer.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)


async def standstill(progress: Callable[[], int]) -> int:
    """Waits until `progress` has begun and does not go on, and tells how far it got."""
    last, since = 0, 0
    while since < STANDSTILL or not last:
        await asyncio.sleep(LOOK)
        now = progress()
        last, since = now, since + 1 if now == last else 0
    return last


def stop_reading(peer: Peer) -> None:
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]


def human(size: float) -> str:
    return f"{size / MIB:.1f} MiB" if size >= MIB else f"{size / KIB:.1f} KiB"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
