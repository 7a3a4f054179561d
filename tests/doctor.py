"""What tests of the doctor stand on: a probe in the loop of the test, a quick plan, hops made for the purpose."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec

from sseproxy.doctor.examine import Plan, examine, target_of
from sseproxy.doctor.observed import Hop
from sseproxy.doctor.origin import NAMES, Origin
from sseproxy.doctor.report import Examined, conclude
from sseproxy.ledger.table import alone

from .harness import Peer

TOKEN = "a-token-of-the-tests"
QUICK = Plan(
    events=30,
    every=0.02,
    wait=0.2,
    pause=0.2,
    leave_after=0.15,
    silent=0.6,
    upload=3 << 20,
    heartbeat=0.3,
    patience=5.0,
)
"""As the plan of the command, but a hop takes two seconds."""


@asynccontextmanager
async def probe(token: str = TOKEN) -> AsyncIterator[int]:
    """A probe, and its port."""
    sock = socket.create_server(("127.0.0.1", 0))
    origin = Origin(token, alone(NAMES))
    await origin.start(sock)
    try:
        yield sock.getsockname()[1]
    finally:
        await origin.close()


def url_of(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1"


async def look_at(port: int, **more: Any) -> Hop:
    """What is observed at `port`. `more` is for the plan."""
    url = url_of(port)
    return await examine(target_of(url, token=TOKEN), url, lambda _: None, msgspec.structs.replace(QUICK, **more))


async def judge(*ports: int, **more: Any) -> Examined:
    return conclude([await look_at(port, **more) for port in ports], [])


def found(examined: Examined, *, notes: bool = False) -> list[list[str]]:
    """The kinds of each hop's own findings."""
    return [
        [finding.kind for finding in diagnosis.own if notes or not finding.note] for diagnosis in examined.diagnoses
    ]


Sent = Callable[[asyncio.StreamReader, Peer], Awaitable[None]]
"""How a hop sends on what comes back from behind it."""


@asynccontextmanager
async def hop(port: int, send_on: Sent) -> AsyncIterator[int]:
    """A hop in front of `port` that passes requests on as they are, and answers by `send_on`. Yields its own port."""
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind = await asyncio.open_connection("127.0.0.1", port)

        async def requests() -> None:
            with suppress(ConnectionError):
                while data := await reader.read(65536):
                    behind.write(data)
                    await behind.drain()

        async def answers() -> None:
            with suppress(ConnectionError):
                await send_on(behind_reader, Peer(reader, writer))

        ways = [asyncio.ensure_future(requests()), asyncio.ensure_future(answers())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            behind.transport.abort()
            writer.close()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(connected(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_END = b"\r\n0\r\n\r\n"


def by_bytes(most: int) -> Sent:
    """Sends `most` bytes at a time, and the rest at the end of an answer."""

    async def send(behind: asyncio.StreamReader, client: Peer) -> None:
        kept = b""
        while data := await behind.read(65536):
            kept += data
            whole = len(kept) if kept.endswith(_END) or _is_short(kept) else len(kept) // most * most
            if whole:
                client.send(kept[:whole])
            kept = kept[whole:]
        client.send(kept)

    return send


def by_time(interval: Callable[[], float]) -> Sent:
    """Sends all that has come when a timer fires, which the first byte starts."""

    async def send(behind: asyncio.StreamReader, client: Peer) -> None:
        while data := await behind.read(65536):
            kept = data
            if not (kept.endswith(_END) or _is_short(kept)):
                with suppress(TimeoutError):
                    async with asyncio.timeout(interval()):
                        while not kept.endswith(_END) and (data := await behind.read(65536)):
                            kept += data
            client.send(kept)

    return send


def at_random(seed: int) -> Sent:
    chance = random.Random(seed)
    return by_time(lambda: 10 ** chance.uniform(-1.7, -0.4))


def _is_short(data: bytes) -> bool:
    """An answer with a length, or an interim one."""
    return b"Content-Length" in data or data.startswith(b"HTTP/1.1 100")


async def completes(behind: asyncio.StreamReader, client: Peer) -> None:
    """Ends every answer, also one that broke off."""
    last = b""
    with suppress(ConnectionError):
        while data := await behind.read(65536):
            last = (last + data)[-len(_END) :]
            client.send(data)
    if last != _END:
        client.send(_END[2:])


def changes(old: bytes, new: bytes) -> Sent:
    """Replaces `old` by `new`, which is as long, wherever it is in one read."""
    assert len(old) == len(new)

    async def send(behind: asyncio.StreamReader, client: Peer) -> None:
        while data := await behind.read(65536):
            client.send(data.replace(old, new))

    return send
