"""Measures the memory of a running `sseproxy serve` in the worst situations that clients and upstreams can cause.

Each situation has a new proxy with one worker, over loopback. The result is the largest memory of supervisor and worker
together, minus their memory after a first request (see `bench.watch`).

`make memory` prints the table for the README. tests/test_memory.py checks the same bounds at a smaller scale.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import uvloop

from tests.harness import LAST_CHUNK, STREAM_HEAD, Peer, ScriptedUpstream, chunk, delta, post
from tests.served import Served, serve

from .watch import (
    GET,
    GIB,
    KIB,
    LOOK,
    MIB,
    NO_DEBUG,
    Watch,
    human,
    say,
    small_buffers,
    standstill,
    stop_reading,
    watching,
)

ANYWHERE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--workers", "1")
# Seconds after which a situation has failed. All take much less.
PATIENCE = 120.0
PIECE = chunk(delta("x" * 8_000))
EVENT = delta(" token")


@dataclass(frozen=True)
class Bound:
    """The most that a situation may cost, in bytes: for each stream or connection if `each`, otherwise in total."""

    situation: str
    size: int
    each: bool


STALLED = Bound("A client that stops reading", 128 * KIB, each=True)
UPLOADS = Bound("An upstream that does not read an upload", 256 * KIB, each=True)
CLIENT_HEADS = Bound("A request head without end", 64 * KIB, each=True)
UPSTREAM_HEADS = Bound("A response head without end", 96 * KIB, each=True)
IDLE = Bound("A stream between two events", 32 * KIB, each=True)
ENDLESS_LINE = Bound("An event without end", 24 * MIB, each=False)
TINY_CHUNKS = Bound("A stream in chunks of one byte", 8 * MIB, each=False)
TINY_EVENTS = Bound("A stream in chunks of one event", 8 * MIB, each=False)
SHORT = Bound("Requests one after another", 4 * MIB, each=False)


@dataclass(frozen=True)
class Figures:
    bound: Bound
    sent: str
    growth: int
    """The largest memory of the proxy, in bytes above that before the situation."""
    count: int = 1
    """How many streams or connections there were."""

    @property
    def cost(self) -> float:
        """What is compared with `bound`, in bytes."""
        return self.growth / self.count if self.bound.each else self.growth


@asynccontextmanager
async def watched(script: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[tuple[Served, Watch]]:
    """A proxy, and its memory, measured after a first request.

    The upstream answers a GET with a short stream. For any other request it reads the head and then runs `script`.
    """

    async def answer(api: Peer) -> None:
        small_buffers(api)
        while (await api.head()).start_line.startswith("GET"):
            api.send(STREAM_HEAD, chunk(EVENT), LAST_CHUNK)
        await script(api)

    async with (
        asyncio.timeout(PATIENCE),
        ScriptedUpstream(answer) as upstream,
        serve("--upstream", upstream.url, *ANYWHERE, **NO_DEBUG) as served,
    ):
        client = await served.connect()
        client.send(GET)
        await client.message()
        client.close()
        async with watching(served) as watch:
            yield served, watch


async def stalled_clients(count: int = 200, offered: int = 64 * MIB) -> Figures:
    """`count` clients that read nothing of their streams. Each stream has `offered` bytes, sent as fast as possible."""
    taken = finished = 0

    async def flood(api: Peer) -> None:
        nonlocal taken, finished
        api.send(STREAM_HEAD)
        for _ in range(offered // len(PIECE)):
            api.send(PIECE)
            await api.writer.drain()
            taken += len(PIECE)
        finished += 1

    async with watched(flood) as (served, watch):
        for _ in range(count):
            client = await served.connect()
            small_buffers(client)
            stop_reading(client)
            client.send(post())
        # The first of them are flooded meanwhile, which takes most of both cores.
        await served.until(r"streams_active\{.*", count, within=60)
        await standstill(lambda: taken)
        assert not finished, "the proxy took a whole stream, although nobody reads it"
        sent = f"{count} streams of {offered // MIB} MiB, not read"
        return Figures(STALLED, sent, watch.growth, count)


async def uploads(count: int = 500, offered: int = 16 * MIB) -> Figures:
    """`count` clients that send `offered` bytes each. The upstream reads only the head."""
    begun = taken = finished = 0
    release = asyncio.Event()

    async def read_nothing(api: Peer) -> None:
        nonlocal begun
        begun += 1
        # Else the kernel may come to take a whole upload for it: 32 MiB, where tcp_rmem allows that.
        small_buffers(api)
        stop_reading(api)
        await release.wait()

    async def upload(client: Peer) -> None:
        nonlocal taken, finished
        client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: %d\r\n\r\n" % offered)
        piece = b"x" * 64 * KIB
        for _ in range(offered // len(piece)):
            client.send(piece)
            await client.writer.drain()
            taken += len(piece)
        finished += 1

    async with watched(read_nothing) as (served, watch), asyncio.TaskGroup() as group:
        sending: list[asyncio.Task[None]] = []
        for _ in range(count):
            client = await served.connect()
            small_buffers(client)
            sending.append(group.create_task(upload(client)))
        await standstill(lambda: taken + begun)
        assert begun == count, "an upload has not reached the upstream"
        assert not finished, "the proxy took a whole upload, although the upstream does not read it"
        figures = Figures(UPLOADS, f"{count} uploads of {offered // MIB} MiB", watch.growth, count)
        for task in sending:
            task.cancel()
        release.set()
    return figures


async def idle_streams(count: int = 5000) -> Figures:
    """`count` streams that have started and are silent. Each needs two descriptors in the proxy, and two here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    allowed = min(count, (hard - 200) // 2)

    async def begin(api: Peer) -> None:
        api.send(STREAM_HEAD, chunk(EVENT))
        # Keeps the connection open until the proxy closes it.
        await api.reader.read()

    async def open_one(served: Served) -> None:
        client = await served.connect()
        client.send(post())
        await client.read_until(b"\n\n\r\n")

    try:
        async with watched(begin) as (served, watch):
            for opened in range(0, allowed, 50):
                await asyncio.gather(*(open_one(served) for _ in range(min(50, allowed - opened))))
            await served.until(r"streams_active\{.*", allowed)
            forbidden = "" if allowed == count else f", not {count:,}: at most {hard} descriptors (ulimit -Hn)"
            return Figures(IDLE, f"{allowed:,} streams{forbidden}", watch.growth, allowed)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def heads_of_clients(count: int = 500) -> Figures:
    """`count` connections whose request heads grow by one KiB at a time until they are refused."""

    async def never(api: Peer) -> None:
        raise AssertionError("a request has reached the upstream")

    async with watched(never) as (served, watch):
        clients = [await served.connect() for _ in range(count)]
        answers = [asyncio.ensure_future(client.message()) for client in clients]
        for client in clients:
            client.send(b"GET /v1/models HTTP/1.1\r\nHost: proxy\r\nX: ")
        sent = await grow(clients, lambda: all(answer.done() for answer in answers))
        statuses = [answer.result().status for answer in answers]
        assert statuses == [431] * count, statuses
        return Figures(CLIENT_HEADS, f"{count} connections, refused after {sent // KIB} KiB", watch.growth, count)


async def heads_of_upstreams(count: int = 500) -> Figures:
    """`count` requests whose response heads grow by one KiB at a time until they are refused."""
    apis: list[Peer] = []
    all_begun = asyncio.Event()

    async def begin(api: Peer) -> None:
        api.send(b"HTTP/1.1 200 OK\r\nX: ")
        apis.append(api)
        if len(apis) == count:
            all_begun.set()
        await api.reader.read()

    async with watched(begin) as (served, watch):
        clients = [await served.connect() for _ in range(count)]
        answers = [asyncio.ensure_future(client.message()) for client in clients]
        for client in clients:
            client.send(post())
        await all_begun.wait()
        sent = await grow(apis, lambda: all(answer.done() for answer in answers))
        statuses = [answer.result().status for answer in answers]
        assert statuses == [502] * count, statuses
        return Figures(UPSTREAM_HEADS, f"{count} exchanges, refused after {sent // KIB} KiB", watch.growth, count)


async def grow(peers: list[Peer], ended: Callable[[], bool]) -> int:
    """Sends one KiB at a time on each open connection, until `ended`. Returns how many bytes each connection got."""
    sent = 0
    while not ended():
        assert sent < MIB, "a head without end is not refused"
        for peer in peers:
            if not peer.writer.transport.is_closing():
                peer.send(b"x" * KIB)
        sent += KIB
        await asyncio.sleep(LOOK)
    return sent


async def endless_line(size: int = GIB) -> Figures:
    """A stream of one event of `size` bytes. The client reads all of it."""
    piece = b"x" * 64 * KIB
    first = chunk(b"data: " + piece[6:])
    sent = f"{size // MIB:,} MiB without a newline, received whole"
    return await one_stream(ENDLESS_LINE, sent, first, chunk(piece), size // len(piece) - 1, size)


async def tiny_chunks(count: int = 1_000_000) -> Figures:
    """A stream of `count` chunks of one byte each. The client reads all of it."""
    at_once = 1000
    sent = f"{count:,} chunks, received whole"
    return await one_stream(TINY_CHUNKS, sent, b"", chunk(b":") * at_once, count // at_once, count)


async def tiny_events(count: int = 1_000_000) -> Figures:
    """A stream of `count` chunks with one event each. The client reads all of it."""
    at_once = 1000
    size = count * len(EVENT)
    sent = f"{count:,} chunks, {size // MIB} MiB, received whole"
    return await one_stream(TINY_EVENTS, sent, b"", chunk(EVENT) * at_once, count // at_once, size)


async def one_stream(bound: Bound, sent: str, first: bytes, piece: bytes, times: int, size: int) -> Figures:
    """A stream of `first`, then `times` times `piece`. Both are whole chunks. The payload has `size` bytes in total."""

    async def send(api: Peer) -> None:
        api.send(STREAM_HEAD, first)
        for _ in range(times):
            api.send(piece)
            await api.writer.drain()
        api.send(LAST_CHUNK)
        await api.reader.read()

    async with watched(send) as (served, watch):
        client = await served.connect()
        client.send(post())
        await client.head()
        received = 0
        while length := int(await client.reader.readuntil(b"\r\n"), 16):
            await client.reader.readexactly(length + 2)
            received += length
        assert received == size, f"{received} bytes of {size}"
        await served.until(r"requests_total\{code=\"200\",.*outcome=\"completed\".*", 2)
        return Figures(bound, sent, watch.growth)


async def short_requests(count: int = 100_000, connections: int = 8) -> Figures:
    """`count` requests on a few connections. Each is sent after the answer to the one before it."""
    request, answer = post(), b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    body = request.partition(b"\r\n\r\n")[2]

    async def reply(api: Peer) -> None:
        await api.reader.readuntil(body)
        while True:
            api.send(answer)
            await api.reader.readuntil(body)

    async def ask(client: Peer, times: int) -> None:
        for _ in range(times):
            client.send(request)
            await client.reader.readuntil(b"ok")

    async with watched(reply) as (served, watch):
        clients = [await served.connect() for _ in range(connections)]
        await asyncio.gather(*(ask(client, count // connections // 20) for client in clients))
        watch.before = watch.most = watch.now()
        await asyncio.gather(*(ask(client, count // connections) for client in clients))
        return Figures(SHORT, f"{count:,} requests on {connections} connections", watch.growth)


SITUATIONS: tuple[Callable[[], Coroutine[Any, Any, Figures]], ...] = (
    stalled_clients,
    uploads,
    heads_of_clients,
    heads_of_upstreams,
    idle_streams,
    endless_line,
    tiny_chunks,
    tiny_events,
    short_requests,
)


def row(figures: Figures) -> str:
    bound = figures.bound
    limit = f"{bound.size // KIB} KiB each" if bound.each else f"{bound.size // MIB} MiB"
    each = human(figures.cost) if bound.each else ""
    return f"| {bound.situation} | {figures.sent} | {human(figures.growth)} | {each} | {limit} |"


def main() -> int:
    begun = perf_counter()
    say("| situation | sent | growth | each | bound |\n|---|---|---|---|---|")
    broken = []
    for situation in SITUATIONS:
        figures = uvloop.run(situation())
        say(row(figures))
        if figures.cost > figures.bound.size:
            broken.append(figures.bound.situation)
    sys.stderr.write(f"{perf_counter() - begun:.0f} s; over their bound: {', '.join(broken) or 'none'}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
