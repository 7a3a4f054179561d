"""Many of something: bounded memory, and room for the next."""

from __future__ import annotations

import asyncio
import re
import resource
from pathlib import Path

from .conftest import PlayScript
from .harness import LAST_CHUNK, STREAM_HEAD, Peer, ScriptedUpstream, chunk, post
from .served import serve

ANYWHERE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--workers", "1")
KIB = 1024


def resident(pid: int) -> int:
    """The memory that the process holds, in bytes."""
    (kib,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kib) * KIB


async def test_thousands_of_idle_connections_cost_little_and_stop_nobody(upstream: ScriptedUpstream) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    crowd = min(5000, (hard - 200) // 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle: list[asyncio.StreamWriter] = []
    try:
        async with serve("--upstream", upstream.url, *ANYWHERE) as served:
            (worker,) = served.workers
            before = resident(worker)
            for _ in range(crowd // 50):
                opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", served.port) for _ in range(50)))
                idle += [writer for _, writer in opened]
            client = await served.connect()
            client.send(post())
            api = await upstream.accept()
            await api.message()
            api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            assert (await client.message()).body == b"ok"
            assert (resident(worker) - before) / len(idle) < 32 * KIB
    finally:
        for writer in idle:
            writer.transport.abort()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_million_tiny_chunks_pass_merged(play: PlayScript) -> None:
    """They come as fast as they are read, hundreds at a time, and leave as one each time."""
    size, at_once = 1_000_000, 5_000

    async def trickle(api: Peer) -> None:
        await api.message()
        api.send(STREAM_HEAD)
        for _ in range(size // at_once):
            api.send(chunk(b":") * at_once)
            await api.drain()
        api.send(LAST_CHUNK)
        await api.rest()

    upstream = await play(trickle)
    async with serve("--upstream", upstream.url, *ANYWHERE) as served:
        (worker,) = served.workers
        client = await served.connect()
        client.send(post())
        await client.head()
        before = resident(worker)
        chunks = received = 0
        while length := int(await client.read_until(b"\r\n"), 16):
            assert (await client.read(length + 2)).strip(b":") == b"\r\n"
            chunks, received = chunks + 1, received + length
        assert received == size
        assert chunks < size / 100
        assert resident(worker) - before < 8 * KIB * KIB
