"""Measures the memory of a running proxy, and has small tools for the clients and upstreams of `memory` and `hostile`.

Memory is `Anonymous` in /proc/PID/smaps_rollup (proc(5)): what the processes have allocated. RSS and PSS also contain
pages of libraries, which depend on other processes. TCP buffers belong to the kernel, which bounds them itself
(tcp_rmem, tcp_wmem).
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
# Turns off asyncio's debug mode, if the environment has turned it on: with it, futures and handles keep a traceback.
NO_DEBUG = {"PYTHONASYNCIODEBUG": ""}
# Seconds between two readings of the processes' memory.
LOOK = 0.02
# After so many readings without progress nothing moves any more: half a second without a byte on loopback.
STANDSTILL = 25
# The buffers of our own sockets are small, so that bytes are held by the proxy and not by the kernel.
SOCKET_BUFFER = 64 * KIB
GET = b"GET /v1/models HTTP/1.1\r\nHost: proxy\r\n\r\n"


def held(pid: int) -> int:
    """The bytes that a process has allocated and used at least once."""
    (kib,) = re.findall(r"^Anonymous:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return int(kib) * KIB


class Watch:
    """Reads the memory of some processes again and again, and keeps the maximum."""

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
    """Watches the memory of the supervisor and its workers from now on."""
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
    """Waits until `progress` has started and then stopped rising. Returns its last value."""
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
