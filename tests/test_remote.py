"""Several machines on one ledger: a real Redis server, which answers, does not, dies and is started again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

from sseproxy import config
from sseproxy.config.values import Rate
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
    valid,
)
from .served import program
from .test_client_limits import CHAT, STREAM, TEXT, asked
from .test_clients import ANSWER, FILE, bearer, client, refused, request


class Server:
    """A Redis server on a port of its own."""

    def __init__(self, port: int, directory: Path, *options: str) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self._port = port
        self._options = options
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(program("redis-server"), "--port", str(self._port), "--bind", "127.0.0.1"),
            *("--dir", str(self._directory), "--save", "", "--appendonly", "yes", "--appendfsync", "always"),
            *("--repl-diskless-sync-delay", "0", *self._options),
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
        ledger = valid(config.Ledger, {"url": server.url, "on_failure": on_failure})
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


async def let_in_again(proxy: RunningProxy, upstream: ScriptedUpstream) -> str | None:
    """Asks until a request is not refused; returns how many requests are left."""
    async with asyncio.timeout(20):
        while True:
            peer = await proxy.connect()
            peer.send(request(bearer(), path="/v1/models", method="GET", body=b"", kind=None))
            waiting = asyncio.ensure_future(peer.message())
            accepted = asyncio.ensure_future(upstream.accept())
            await asyncio.wait((waiting, accepted), return_when=asyncio.FIRST_COMPLETED)
            if accepted.done():
                api = accepted.result()
                await api.message()
                api.send(ANSWER)
                answer = await waiting
                assert answer.status == 200
                api.close()
                return answer.get("x-ratelimit-remaining-requests")
            accepted.cancel()
            assert waiting.result().status == 503
            await asyncio.sleep(0.1)


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


async def test_while_the_server_is_away_each_machine_has_the_limits_for_itself(
    machines: Machines, upstream: ScriptedUpstream, server: Server
) -> None:
    one, two = await machines(requests=Rate(2, 86_400))
    await server.kill()
    for proxy in (one, two):
        assert [await answered(proxy, upstream) for _ in range(2)] == ["1", "0"]
        assert (await refused(proxy, request(bearer()))).status == 429
        assert proxy.sample("ledger_failures_total") >= 1


async def test_or_requests_are_refused_until_it_is_back(
    machines: Machines, upstream: ScriptedUpstream, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sseproxy.ledger")
    (one,) = await machines(1, "refuse", requests=Rate(100, 86_400))
    await server.kill()
    for _ in range(5):
        answer = await refused(one, request(bearer()))
        assert (answer.status, answer.json()["error"]["code"], answer.get("retry-after")) == (503, "ledger", "1")
    assert [line.partition(":")[0] for line in caplog.messages] == ["the server of ledger.url cannot be used"]
    assert caplog.messages[0].endswith("; meanwhile, clients with limits get 503")
    await server.start()

    await let_in_again(one, upstream)
    assert caplog.messages[1:] == ["the server of ledger.url answers again"]


@pytest.mark.usefixtures("patient")
async def test_a_replica_that_takes_over_knows_what_was_used(
    machines: Machines, upstream: ScriptedUpstream, server: Server, tmp_path: Path
) -> None:
    """The address stays, as where a name or an address moves. Until the replica may write, it is no server."""
    (one,) = await machines(1, "refuse", requests=Rate(100, 86_400))
    assert await answered(one, upstream) == "99"
    (tmp_path / "replica").mkdir()
    port = server.url.rpartition(":")[2].partition("/")[0]
    with kept_port() as other:
        replica = Server(other, tmp_path / "replica", "--replicaof", "127.0.0.1", port)
        await replica.start()
        try:
            assert await answered(one, upstream) == "98"
            async with Redis.from_url(server.url) as first, Redis.from_url(replica.url) as second:
                assert await first.wait(1, 10_000) == 1
                await server.kill()
                await second.config_set("port", port)
            assert (await refused(one, request(bearer()))).json()["error"]["code"] == "ledger"
            async with Redis.from_url(server.url) as second:
                await second.replicaof("NO", "ONE")
            assert await let_in_again(one, upstream) == "97"
        finally:
            await replica.kill()


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
    assert "s3cret" in made.ledger.url.reveal()
    assert "s3cret" not in repr(made) + config.resolved(made) + repr(made.for_workers().ledger.url)


def test_without_the_library_it_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sseproxy.config.model.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package redis is not installed"):
        config.parse(f"ledger: {{url: 'redis://h'}}\n{FILE.removesuffix('clients:' + chr(10))}", "f", {})


async def test_what_is_owed_to_a_server_that_was_away_is_one_charge_and_takes_no_more_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "_LEFT_ALONE", 0.0)
    answers, charged = False, []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.read(65536):
            if b"EVALSHA" not in asked:
                writer.write(b"+OK\r\n" * asked.count(b"*"))
            elif answers:
                charged.append(int(asked.split(b"\r\n")[-6]))
                writer.write(b":1\r\n")
            else:
                writer.write(b"-LOADING Redis is loading the dataset in memory\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    failed: list[int] = []
    asking = Remote(url, "machine", lambda: failed.append(1), refuses=False)
    try:
        with pytest.raises(Unavailable):
            await asking.admit("a", Limits(None, None, (9, 60)), 0, lambda: Machine(0, 0))
        for number in range(100):
            for _ in range(3):
                asking.settle("a", 1)
            await until(lambda wanted=number + 2: len(failed) >= wanted)  # type: ignore[misc]
        answers = True
        asking.settle("a", 1)
        await until(lambda: sum(charged) == 301)
        assert len(charged) <= 3
    finally:
        await asking.close()
        server.close()


VERDICT = b"*7\r\n$0\r\n\r\n%b:0\r\n$1\r\n0\r\n:0\r\n:0\r\n$1\r\n0\r\n"
LIES = {
    "full": b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    "a replica": b"-READONLY You can't write against a read only replica.\r\n",
    "loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "a cluster": b"-MOVED 3999 127.0.0.1:6381\r\n",
    "a cluster that says nothing": b"-MOVED\r\n",
    "a failure of the script": b"-ERR user_script:1: attempt to compare nil with number\r\n",
    "a script that is never known": b"-NOSCRIPT No matching script.\r\n",
    "no error of text": b"-\xff\xfe\r\n",
    "a word": b"+OK\r\n",
    "a number": b":5\r\n",
    "nothing": b"$-1\r\n",
    "no list": b"*-1\r\n",
    "an empty list": b"*0\r\n",
    "a number that is none": b":abc\r\n",
    "a length that is none": b"$abc\r\n",
    "another protocol": b"HTTP/1.1 200 OK\r\n\r\n",
    "a word in place of a count": VERDICT % b"+x\r\n",
    "nothing in place of a count": VERDICT % b"$-1\r\n",
    "no time": (VERDICT % b":0\r\n").replace(b"$1\r\n0", b"$-1", 1),
    "a long list": b"*1000000000\r\n",
}


async def test_a_question_is_given_up_in_time_wherever_it_is(
    start: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the library swallows the cancellation, as it does at some points of its handshake."""

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.read(65536):
            writer.write(LIES["a long list"] if b"EVALSHA" in asked else b"+OK\r\n" * asked.count(b"*"))
        writer.close()

    monkeypatch.setattr(remote, "_LEFT_ALONE", 0.0)
    lying = await asyncio.start_server(lie, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{lying.sockets[0].getsockname()[1]}/0"
    ledger = valid(config.Ledger, {"url": url, "on_failure": "refuse"})
    made = client(limits=config.ClientLimits(requests=Rate(2, 86_400)))
    proxy = await start(upstream.url, route=CHAT, clients=(made,), ledger=ledger)
    try:
        for step in range(200):
            monkeypatch.setattr(remote, "_DEADLINE", 0.0001 * (step // 4))
            assert (await refused(proxy, request(bearer()))).status == 503
    finally:
        lying.close()
    await proxy.idle()


@pytest.mark.usefixtures("patient")
async def test_a_connection_that_ends_just_before_it_is_used_is_no_fault_of_ours(
    machines: Machines, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library writes to it, and uvloop raises `RuntimeError`, which is no error of the library."""
    (proxy,) = await machines(1, on_failure="refuse", requests=Rate(100, 86_400))
    await answered(proxy, upstream)
    send = AbstractConnection.send_packed_command

    async def too_late(connection: AbstractConnection, *command: Any, **options: Any) -> None:
        assert connection._writer is not None
        connection._writer.transport.abort()
        assert connection._reader is not None
        await until(connection._reader.at_eof)
        await send(connection, *command, **options)

    with monkeypatch.context() as broken:
        broken.setattr(AbstractConnection, "send_packed_command", too_late)
        assert (await refused(proxy, request(bearer()))).status == 503
    await answered(proxy, upstream)
    await proxy.idle()


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("answer", [*LIES.values()], ids=[*LIES])
async def test_a_server_that_answers_something_else_has_not_answered(
    start: StartProxy,
    upstream: ScriptedUpstream,
    answer: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.read(65536):
            writer.write(answer if b"EVALSHA" in asked or b"SCRIPT" in asked else b"+OK\r\n" * asked.count(b"*"))
        writer.close()

    lying = await asyncio.start_server(lie, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{lying.sockets[0].getsockname()[1]}/0"
    made = client(limits=config.ClientLimits(requests=Rate(2, 86_400)))
    if answer == LIES["a long list"]:
        monkeypatch.setattr(remote, "_DEADLINE", 0.05)
    try:
        for on_failure, statuses in (("local", [200, 200, 429]), ("refuse", [503])):
            ledger = valid(config.Ledger, {"url": url, "on_failure": on_failure})
            proxy = await start(upstream.url, route=CHAT, clients=(made,), ledger=ledger)
            for status in statuses:
                if status == 200:
                    await answered(proxy, upstream)
                else:
                    assert (await refused(proxy, request(bearer()))).status == status
            await told(proxy)
            await proxy.idle()
            assert proxy.sample("ledger_failures_total") >= 1
            assert proxy.sample("client_requests_active") == 0
    finally:
        lying.close()
    assert "internal error" not in caplog.text
    assert "never retrieved" not in caplog.text
