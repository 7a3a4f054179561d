"""More than it can: the surplus is refused at once, what runs keeps its pace; a worker takes only its own with it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from time import perf_counter

import pytest

from sseproxy import config

from .conftest import PlayScript, StartProxy
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    ScriptedUpstream,
    begin,
    chunk,
    delta,
    post,
    until,
)
from .served import serve, until_true

CAPACITY = 40
# No assertion on time is tighter: the machine may be busy with something else.
SOON = 1.0


@pytest.fixture(autouse=True)
def nothing_old_is_collected() -> None:
    """The collector looks at all that other tests have left in this process, which may take more than a second."""
    gc.collect()
    gc.freeze()


async def endless(api: Peer) -> None:
    """A model that generates a token every 20 ms, until its client has gone."""
    await api.message()
    api.send(STREAM_HEAD)
    while True:
        api.send(chunk(delta("Hi")))
        await api.drain()
        await asyncio.sleep(0.02)


class Reader:
    """Reads a stream, and knows the longest time for which nothing came."""

    def __init__(self, client: Peer) -> None:
        self.client = client
        self.longest = 0.0
        self.tokens = 0
        self.task = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        await self.client.head()
        last = perf_counter()
        while await self.client.read_until(b"\n\n\r\n"):
            now = perf_counter()
            self.longest = max(self.longest, now - last)
            last = now
            self.tokens += 1


async def test_at_twice_the_capacity_half_is_refused_at_once_and_the_rest_keeps_its_pace(
    start: StartProxy, play: PlayScript
) -> None:
    upstream = await play(endless)
    proxy = await start(upstream.url, limits=config.Limits(active_requests=CAPACITY))
    readers = []
    for _ in range(CAPACITY):
        client = await proxy.connect()
        client.send(post())
        readers.append(Reader(client))
    await until(lambda: all(reader.tokens for reader in readers))

    for _ in range(3):
        clients = [await proxy.connect() for _ in range(CAPACITY)]
        started = perf_counter()
        for client in clients:
            client.send(post())
        refusals = [await client.message() for client in clients]
        assert perf_counter() - started < SOON
        assert {refusal.status for refusal in refusals} == {503}
        assert {refusal.get("retry-after") for refusal in refusals} == {"1"}
        assert {refusal.json()["error"]["code"] for refusal in refusals} == {"active_requests"}

    for reader in readers:
        assert not reader.task.done()
        reader.task.cancel()
        assert reader.longest < SOON
        reader.client.close()
    assert await proxy.ended() == {"rejected": 3 * CAPACITY, "client_gone_mid_stream": CAPACITY}
    assert proxy.sample("requests_rejected_total", reason="active_requests") == 3 * CAPACITY
    await until(lambda: not upstream.open)
    client = await proxy.connect()
    client.send(post())
    assert (await client.head()).status == 200


async def test_a_worker_that_cannot_keep_up_refuses_until_it_does(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, limits=config.Limits(lag=0.05))
    loop_lag = proxy.worker.proxy.loop_lag
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(delta("Hi"))
    loop = asyncio.get_running_loop()

    over = False

    def busy() -> None:
        """As if every turn of the loop had so much work that all timers are late."""
        time.sleep(max(0.0, loop_lag._timer.when() - loop.time()) + 0.1)
        if not over:
            loop.call_soon(busy)

    busy()
    await until(lambda: loop_lag.lasting > 0.05)
    other = await proxy.connect()
    other.send(post())
    refusal = await other.message()
    assert (refusal.status, refusal.get("retry-after")) == (503, "1")
    assert refusal.json()["error"] == {
        "message": "The proxy is overloaded; please try again.",
        "type": "overloaded_error",
        "param": None,
        "code": "overloaded",
    }
    api.send(chunk(DONE), LAST_CHUNK)
    assert (await client.read_until(LAST_CHUNK)).endswith(LAST_CHUNK)
    over = True
    await until(lambda: not loop_lag.lasting > 0.05)
    other.send(post())
    await (api if upstream.connections == 1 else await upstream.accept()).message()
    assert proxy.sample("requests_rejected_total", reason="overloaded") == 1


async def test_a_single_pause_is_no_overload(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, limits=config.Limits(lag=0.3))
    loop_lag = proxy.worker.proxy.loop_lag
    measured = proxy.sample("event_loop_lag_seconds_count")
    time.sleep(1.0)  # noqa: ASYNC251 - it is the pause
    await until(lambda: proxy.sample("event_loop_lag_seconds_count") > measured)
    assert loop_lag._latest > 0.3
    assert loop_lag.lasting < 0.3
    await begin(proxy, upstream)


async def test_a_worker_killed_under_load_costs_its_own_streams_and_nothing_else() -> None:
    async with ScriptedUpstream(endless) as upstream:
        arguments = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--workers", "2")
        async with serve("--upstream", upstream.url, *arguments) as served:
            readers: list[Reader] = []

            async def load(number: int) -> None:
                for _ in range(number):
                    client = await served.connect()
                    client.send(post())
                    readers.append(Reader(client))
                await until_true(lambda: all(reader.tokens for reader in readers))

            first, second = served.workers
            for standing in (first, second):
                # Each has a half.
                os.kill(standing, signal.SIGSTOP)
                await load(CAPACITY // 2)
                os.kill(standing, signal.SIGCONT)
            await served.until(r"streams_active\{.*\}", CAPACITY)
            tokens = await served.sample(r"inter_token_latency_seconds_count\{.*\}")
            os.kill(first, signal.SIGKILL)
            killed_at = perf_counter()
            await served.until("worker_restarts_total", 1)
            await served.until("workers", 2)
            assert perf_counter() - killed_at < 5
            await until_true(lambda: upstream.open < CAPACITY)
            await until_true(lambda: sum(reader.task.done() for reader in readers) == CAPACITY - upstream.open)
            cut = [reader for reader in readers if reader.task.done()]
            assert len(cut) == CAPACITY // 2
            for reader in cut:
                # It ended, and not as a stream does.
                assert isinstance(reader.task.exception(), asyncio.IncompleteReadError | ConnectionError)
                error = reader.task.exception()
                assert LAST_CHUNK not in getattr(error, "partial", b"")
            others = [reader for reader in readers if reader not in cut]
            before = sum(reader.tokens for reader in others)
            await until_true(lambda: sum(reader.tokens for reader in others) > before + 5 * len(others))
            assert second in served.workers
            assert await served.sample(r"inter_token_latency_seconds_count\{.*\}") >= tokens
            assert await served.sample(r'requests_total\{.*outcome="proxy_error".*\}') == len(cut)
            assert await served.sample(r"(streams)_active\{.*\}") == len(others)
            await load(CAPACITY)
            assert len(served.workers) == 2
            for reader in readers:
                reader.task.cancel()
                reader.client.close()
            await served.until(r"requests_total\{.*\}", 2 * CAPACITY)
            await served.until(r"(streams|requests)_active\{.*\}", 0)
            assert await served.sample("worker_restarts_total") == 1
