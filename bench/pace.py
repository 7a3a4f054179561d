"""A paced stream through a proxy. Its largest gap shows how long other clients wait while the proxy is attacked.

The upstream and the client of this stream are a separate process, `python -m bench.pace`, so that work of the tool
itself is not measured. The tool and this process exchange lines: the process prints the port of its upstream, reads the
port of the proxy, and then answers each line with the largest gap since the last one, in seconds.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

import uvloop

from tests.harness import STREAM_HEAD, Peer, ScriptedUpstream, chunk, delta, post

from .watch import say

# Seconds from one event to the next.
PACE = 0.005
EVENT = chunk(delta(" token"))
PATH = "/paced"


class Pace:
    """The tool's side of the process. Gaps are in seconds."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port
        """The port of its upstream."""

    async def begin(self, port: int, *, tls: bool) -> None:
        """Starts the stream, through the proxy on `port`."""
        await self._ask(f"{port} {'tls' if tls else 'plain'}")

    async def gap(self) -> float:
        """The largest gap since the last call."""
        return float(await self._ask("gap"))

    async def _ask(self, line: str) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n".encode())
        return await self._process.stdout.readline()


@asynccontextmanager
async def pace() -> AsyncIterator[Pace]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.pace", stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    try:
        yield Pace(process, int(await process.stdout.readline()))
    finally:
        process.kill()
        await process.wait()


class Arrivals(asyncio.Protocol):
    def __init__(self) -> None:
        self._last = 0.0
        self._most = 0.0
        self.begun = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if self._last:
            self._most = max(self._most, now - self._last)
            self.begun.set()
        self._last = now

    def connection_lost(self, error: Exception | None) -> None:
        sys.exit()

    def gap(self) -> float:
        most, self._most = max(self._most, perf_counter() - self._last), 0.0
        return most


async def send(api: Peer) -> None:
    """Sends an event every `PACE` seconds. Events that are already late are skipped."""
    await api.message()
    api.send(STREAM_HEAD)
    due = perf_counter()
    while True:
        api.send(EVENT)
        due = max(due + PACE, perf_counter())
        await asyncio.sleep(due - perf_counter())


async def main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with ScriptedUpstream(send) as upstream:
        say(str(upstream.port))
        port, how = (await reader.readline()).split()
        context = None
        if how == b"tls":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        transport, arrivals = await loop.create_connection(Arrivals, "127.0.0.1", int(port), ssl=context)
        transport.write(post(path=f"{PATH}/chat/completions"))
        await arrivals.begun.wait()
        gc.disable()
        say("begun")
        while await reader.readline():
            say(str(arrivals.gap()))


if __name__ == "__main__":
    uvloop.run(main())
