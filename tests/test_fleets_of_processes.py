"""Fleets in front of real processes: workers that share what they know, and servers that are killed under load."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from .clients import NODE, NODE_DIRECTORY
from .harness import DONE, LAST_CHUNK, STREAM_HEAD, Message, Peer, ScriptedUpstream, chunk, delta, post, until
from .served import ConfigFile, Served

STREAMS = 300
WORKERS = 4


async def whole(peer: Peer) -> Message:
    """The next response, on a machine that is busy."""
    async with asyncio.timeout(60):
        return await peer.message()


# --- workers agree ---


class Paced:
    """An endpoint that streams until `go` is set. A token of it takes so many turns of the loop."""

    def __init__(self, turns: int) -> None:
        self.turns = turns
        self.active = 0
        self.go = asyncio.Event()

    async def __call__(self, api: Peer) -> None:
        while True:
            await api.message()
            self.active += 1
            try:
                api.send(STREAM_HEAD)
                for number in range(4):
                    api.send(chunk(delta(str(number))))
                    for _ in range(self.turns):
                        await asyncio.sleep(0)
                api.send(chunk(delta("last")))
                loop = asyncio.get_running_loop()
                waits = [loop.create_task(self.go.wait()), loop.create_task(api.reader.read(1))]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                if not self.go.is_set():
                    return
                api.send(chunk(DONE), LAST_CHUNK)
            finally:
                self.active -= 1


async def test_endpoints_of_different_speed_have_as_many_streams(tmp_path: Path) -> None:
    speeds = [Paced(turns) for turns in (1, 10, 100)]
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(ScriptedUpstream(paced)) for paced in speeds]
        urls = ", ".join(f"'{server.url}/v1'" for server in servers)
        file = ConfigFile(tmp_path, servers[0], workers=str(WORKERS), upstreams=f"[{{name: gpus, urls: [{urls}]}}]")
        file.path.write_text(file.path.read_text().replace("upstream: up", "upstream: gpus"))
        proxy = await stack.enter_async_context(file.serve())
        clients = [await proxy.connect() for _ in range(STREAMS)]
        for client in clients:
            client.send(post())
        await asyncio.gather(*(client.read_until(delta("last")) for client in clients))
        # Workers look at the same moment at numbers that change: a few of them may choose the same one.
        assert [paced.active for paced in speeds] == pytest.approx([STREAMS / 3] * 3, abs=2 * WORKERS)
        for server, paced in zip(servers, speeds, strict=True):
            label = rf'.*endpoint="127.0.0.1:{server.port}".*'
            assert await proxy.sample(rf"endpoint_requests_active{{{label}}}") == paced.active
        # Half of the clients of the slowest leave; the next streams fill that up.
        for client in clients[: STREAMS // 2]:
            client.reset()
        await until(lambda: sum(paced.active for paced in speeds) == STREAMS - STREAMS // 2)
        await proxy.until("requests_active.*", STREAMS - STREAMS // 2)
        more = [await proxy.connect() for _ in range(STREAMS // 2)]
        for client in more:
            client.send(post())
        await asyncio.gather(*(client.read_until(delta("last")) for client in more))
        assert [paced.active for paced in speeds] == pytest.approx([STREAMS / 3] * 3, abs=2 * WORKERS)
        for paced in speeds:
            paced.go.set()
        answers = await asyncio.gather(*(whole_rest(client) for client in (*clients[STREAMS // 2 :], *more)))
        assert all(answers)
        await proxy.until("endpoint_requests_active.*", 0)


async def whole_rest(client: Peer) -> bool:
    return (await client.read_until(LAST_CHUNK)).endswith(LAST_CHUNK)


# --- servers that are killed ---

DEMO = """
import asyncio, sys
from aiohttp import web
from sseproxy.demo import Pace, backend

async def serve():
    runner = web.AppRunner(backend(Pace(ttft=0.05, rate=100, tokens=12)), handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(serve())
"""


@asynccontextmanager
async def aimock() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        *(str(NODE), "aimock.mjs"),
        cwd=NODE_DIRECTORY,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield process, f"http://127.0.0.1:{msgspec.json.decode(await process.stdout.readline())['port']}/v1"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def demo_backend() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DEMO), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process, f"http://127.0.0.1:{int(await process.stdout.readline())}/v1"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Load:
    """Clients that ask one thing after the other. `killed` is set when an endpoint has been killed."""

    def __init__(self, proxy: Served, wanted: int) -> None:
        self.proxy = proxy
        self.left = wanted
        self.enough = asyncio.Event()
        self.killed = asyncio.Event()
        self.before: Counter[str] = Counter()
        """What became of the requests that were sent before an endpoint was killed."""
        self.after: Counter[str] = Counter()

    async def client(self) -> None:
        peer = await self.proxy.connect()
        while self.left or self.after.total() < 30:
            self.left -= bool(self.left)
            counted = self.after if self.killed.is_set() else self.before
            peer.send(post(b'{"model":"m","stream":true,"messages":[{"role":"user","content":"paced"}]}'))
            answer = await whole(peer)
            good = answer.status == 200 and answer.complete and answer.body.endswith(DONE)
            counted["good" if good else f"{answer.status} {answer.body[-200:].decode()}"] += 1
            if self.before.total() > 12:
                self.enough.set()
            if not answer.complete:
                peer = await self.proxy.connect()

    async def run(self, clients: int, victim: asyncio.subprocess.Process) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self.client())
            await self.enough.wait()
            os.kill(victim.pid, signal.SIGKILL)
            await victim.wait()
            self.killed.set()


@pytest.mark.timeout(90)
@pytest.mark.parametrize("victim", ["aimock", "demo"])
@pytest.mark.parametrize("until_", ["head", "end"])
async def test_one_of_two_servers_is_killed_under_load(tmp_path: Path, victim: str, until_: str) -> None:
    """With `until: end`, and as few requests as the budget allows, nobody notices. Without, only who was cut does."""
    clients = 6 if until_ == "end" else 24
    async with aimock() as (mock, one), demo_backend() as (demo, other), ScriptedUpstream() as unused:
        file = ConfigFile(tmp_path, unused, workers="2", upstreams=f"[{{name: both, urls: ['{one}', '{other}']}}]")
        route = f"upstream: both, retry: {{until: {until_}}}"
        file.path.write_text(file.path.read_text().replace("upstream: up", route))
        async with file.serve() as proxy:
            load = Load(proxy, 150)
            await load.run(clients, mock if victim == "aimock" else demo)
            assert set(load.after) == {"good"}
            if until_ == "end":
                assert set(load.before) == {"good"}
            else:
                assert load.before.total() - load.before["good"] <= clients
            # Whether a request was refused before that is known depends on which worker is faster.
            killed = (one if victim == "aimock" else other).removeprefix("http://").removesuffix("/v1")
            await proxy.until(f'endpoint_up.*endpoint="{killed}.*', 0)
            await proxy.until("requests_active.*", 0)
            await proxy.until("endpoint_requests_active.*", 0)
