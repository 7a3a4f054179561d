"""Several machines on one ledger: a real Redis server, which answers, does not, dies and is started again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from sseproxy import config
from sseproxy.config.plain import Rate
from sseproxy.errors import ConfigError
from sseproxy.ledger import remote
from sseproxy.ledger.remote import Limits, Machine, Remote, Unavailable

from .conftest import StartProxy
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    chunk,
    delta,
    kept_port,
    until,
    usage,
)
from .served import program
from .test_client_limits import CHAT, STREAM, TEXT, asked
from .test_clients import ANSWER, FILE, bearer, client, refused, request


class Server:
    """A Redis server on a port of its own."""

    def __init__(self, port: int, directory: Path) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self._port = port
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(program("redis-server"), "--port", str(self._port), "--bind", "127.0.0.1"),
            *("--dir", str(self._directory), "--save", "", "--appendonly", "yes", "--appendfsync", "always"),
            stdout=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(15):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                except OSError:
                    await asyncio.sleep(0.05)
                    continue
                writer.transport.abort()
                return

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    async def kill(self) -> None:
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    with kept_port() as port:
        made = Server(port, tmp_path)
        await made.start()
        yield made
        await made.kill()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, an answer may take longer than is waited for it."""
    monkeypatch.setattr(remote, "_DEADLINE", 5.0)


Machines = Callable[..., Any]


@pytest.fixture
def machines(start: StartProxy, upstream: ScriptedUpstream, server: Server) -> Machines:
    async def begin(number: int = 2, on_failure: str = "local", **limits: Any) -> list[RunningProxy]:
        made = client(limits=config.ClientLimits(**limits))
        ledger = config.Ledger(url=server.url, on_failure=on_failure)  # type: ignore[arg-type]
        return [await start(upstream.url, route=CHAT, clients=(made,), ledger=ledger) for _ in range(number)]

    return begin


async def answered(proxy: RunningProxy, upstream: ScriptedUpstream) -> str | None:
    """One exchange with two tokens; returns how many requests are left."""
    peer, api = await asked(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("a")), chunk(usage(1, 1)), chunk(DONE), LAST_CHUNK)
    answer = await peer.message()
    assert answer.status == 200
    api.close()
    peer.close()
    await proxy.idle()
    await told(proxy)
    return answer.get("x-ratelimit-remaining-requests")


async def told(proxy: RunningProxy) -> None:
    """Waits until the server was told of the end of the last exchange."""
    assert proxy.worker.proxy.clients is not None
    server = proxy.worker.proxy.clients.server
    assert server is not None
    while server._tasks:
        await asyncio.wait(server._tasks)


@pytest.mark.usefixtures("patient")
async def test_requests_of_all_machines_count_together(machines: Machines, upstream: ScriptedUpstream) -> None:
    one, two = await machines(requests=Rate(3, 86_400))
    assert [await answered(proxy, upstream) for proxy in (one, two, one)] == ["2", "1", "0"]
    for proxy in (one, two):
        answer = await refused(proxy, request(bearer()))
        assert (answer.status, answer.json()["error"]["type"]) == (429, "requests")
        assert answer.get("x-ratelimit-remaining-requests") == "0"
        assert int(answer.get("retry-after-ms") or 0) > 0


@pytest.mark.usefixtures("patient")
async def test_active_requests_of_all_machines_count_together_and_come_back(
    machines: Machines, upstream: ScriptedUpstream
) -> None:
    one, two = await machines(active_requests=1)
    peer, api = await asked(one, upstream)
    answer = await refused(two, request(bearer()))
    assert (answer.status, answer.json()["error"]["type"]) == (429, "active_requests")
    peer.reset()
    await api.gone()
    await one.idle()
    await told(one)
    await answered(two, upstream)


@pytest.mark.usefixtures("patient")
async def test_tokens_of_all_machines_count_together(machines: Machines, upstream: ScriptedUpstream) -> None:
    one, two = await machines(tokens=Rate(TEXT + 10 + 3, 86_400))
    peer, api = await asked(one, upstream)
    # What one has reserved, the other one cannot.
    assert (await refused(two, request(bearer(), body=STREAM))).json()["error"]["type"] == "tokens"
    api.send(STREAM_HEAD, chunk(delta("a")), chunk(usage(1, 1)), chunk(DONE), LAST_CHUNK)
    await peer.message()
    api.close()
    await one.idle()
    await told(one)
    # Two of the three are used.
    await answered(two, upstream)
    answer = await refused(one, request(bearer(), body=STREAM))
    assert (answer.status, answer.get("x-ratelimit-remaining-tokens")) == (429, str(TEXT + 10 + 3 - 4))


@pytest.mark.usefixtures("patient")
@pytest.mark.timeout(40)
async def test_places_of_a_machine_that_has_died_come_back_and_those_of_a_long_stream_stay(server: Server) -> None:
    limits = Limits(1, None, None)
    dies, lives, other = (Remote(server.url, name, lambda: None, refuses=False) for name in ("dies", "lives", "other"))

    async def let_in(asking: Remote, client: str) -> bool:
        return not (await asking.admit(client, limits, 0, lambda: Machine(1, 0))).limit

    assert await let_in(dies, "a")
    assert await let_in(lives, "b")
    assert dies._renewing is not None
    dies._renewing.cancel()
    assert not await let_in(other, "a")
    async with asyncio.timeout(15):
        while not await let_in(other, "a"):  # noqa: ASYNC110 - another process's clock
            await asyncio.sleep(0.2)
    assert not await let_in(other, "b")
    for each in (dies, lives, other):
        await each.close()


@pytest.mark.timeout(60)
async def test_while_the_server_is_away_each_machine_has_the_limits_for_itself(
    machines: Machines, upstream: ScriptedUpstream, server: Server
) -> None:
    one, two = await machines(requests=Rate(2, 86_400))
    await server.kill()
    for proxy in (one, two):
        assert [await answered(proxy, upstream) for _ in range(2)] == ["1", "0"]
        assert (await refused(proxy, request(bearer()))).status == 429
        assert proxy.sample("ledger_failures_total") >= 1


@pytest.mark.timeout(60)
async def test_or_requests_are_refused_until_it_is_back(
    machines: Machines, upstream: ScriptedUpstream, server: Server
) -> None:
    (one,) = await machines(1, "refuse", requests=Rate(100, 86_400))
    await server.kill()
    answer = await refused(one, request(bearer()))
    assert (answer.status, answer.json()["error"]["code"], answer.get("retry-after")) == (503, "ledger", "1")
    await server.start()

    async def let_in() -> bool:
        peer = await one.connect()
        peer.send(request(bearer(), path="/v1/models", method="GET", body=b"", kind=None))
        waiting = asyncio.ensure_future(peer.message())
        accepted = asyncio.ensure_future(upstream.accept())
        await asyncio.wait((waiting, accepted), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            accepted.cancel()
            return bool(waiting.result().status == 200)
        api = accepted.result()
        await api.message()
        api.send(ANSWER)
        found = bool((await waiting).status == 200)
        api.close()
        return found

    async with asyncio.timeout(20):
        while not await let_in():  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.1)


@pytest.mark.timeout(60)
async def test_a_server_that_hangs_holds_up_nobody_and_is_left_alone(server: Server) -> None:
    failed: list[int] = []
    asking = Remote(server.url, "machine", lambda: failed.append(1), refuses=False)
    server.signal(signal.SIGSTOP)
    try:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for _ in range(20):
            with pytest.raises(Unavailable):
                await asking.admit("a", Limits(1, None, None), 0, lambda: Machine(1, 0))
        assert loop.time() - begun < 5
        assert 3 <= len(failed) < 20
    finally:
        server.signal(signal.SIGCONT)
        await asking.close()


@pytest.mark.timeout(90)
@pytest.mark.usefixtures("patient")
async def test_a_server_that_is_killed_and_started_again_under_load_loses_nobody_and_no_token(
    machines: Machines, upstream: ScriptedUpstream, server: Server
) -> None:
    both = await machines(tokens=Rate(10**9, 86_400), active_requests=100)
    over = asyncio.Event()
    done = [0, 0]

    async def serve() -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(answer(await upstream.accept()))

    async def answer(api: Peer) -> None:
        await api.message()
        api.send(STREAM_HEAD, chunk(delta("a")), chunk(usage(3, 4)), chunk(DONE), LAST_CHUNK)
        api.close()

    async def load(index: int) -> None:
        while not over.is_set():
            peer = Peer(*await asyncio.open_connection("127.0.0.1", both[index].port))
            peer.send(request(bearer(), "Connection: close", body=STREAM))
            assert (await peer.message()).status == 200
            peer.writer.transport.abort()
            done[index] += 1

    async def more(number: int) -> None:
        wanted = sum(done) + number
        await until(lambda: sum(done) >= wanted)

    loop = asyncio.get_running_loop()
    serving = loop.create_task(serve())
    loads = [loop.create_task(load(index)) for index in (0, 1, 0, 1)]
    try:
        for _ in range(2):
            await more(20)
            await server.kill()
            await more(20)
            await server.start()
        over.set()
        await asyncio.gather(*loads)
    finally:
        serving.cancel()
    for proxy in both:
        await proxy.idle()
    # What was used while it was away is counted when it answers again.
    async with asyncio.timeout(20):
        while True:
            peer = await both[0].connect()
            serving = loop.create_task(serve())
            peer.send(request(bearer(), body=STREAM))
            left = (await peer.message()).get("x-ratelimit-remaining-tokens")
            serving.cancel()
            done[0] += 1
            await both[0].idle()
            if left == str(10**9 - 7 * (sum(done) - 1) - TEXT - 10):
                break
            await asyncio.sleep(0.3)


@pytest.mark.parametrize("url", ["http://h", "redis:h", "127.0.0.1:6379", "5"])
def test_a_url_that_is_none_is_a_mistake_and_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(f"ledger: {{url: '{url}'}}\n{FILE.removesuffix('clients:' + chr(10))}", "f", {})
    assert caught.value.problems == (
        "f:1:10: ledger.url: expected a URL such as redis://127.0.0.1:6379/0, with redis, rediss or unix",
    )


def test_its_password_is_not_shown() -> None:
    text = f"ledger: {{url: 'redis://:s3cret@h:1/0'}}\n{FILE.removesuffix('clients:' + chr(10))}"
    made = config.parse(text, "f", {})
    assert made.ledger.url is not None
    assert "s3cret" in made.ledger.url.get_secret_value()
    assert "s3cret" not in repr(made) + config.resolved(made) + repr(made.plain().ledger.url)


def test_without_the_library_it_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sseproxy.config.model.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="redis is not installed"):
        config.parse(f"ledger: {{url: 'redis://h'}}\n{FILE.removesuffix('clients:' + chr(10))}", "f", {})
