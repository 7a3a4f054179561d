"""Nothing is left behind, however exchanges end."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from sseproxy import config
from sseproxy.relay.asking import Asking
from sseproxy.relay.attempt import Attempt
from sseproxy.relay.clock import Clock
from sseproxy.relay.downstream import WRITE_BUFFER
from sseproxy.relay.exchange import Exchange
from sseproxy.relay.heads import ResponseHead
from sseproxy.relay.hold import Hold
from sseproxy.relay.inspect import Inspector
from sseproxy.relay.pump import Pump
from sseproxy.relay.reads import MAX_READ
from sseproxy.relay.retry import Course

from .conftest import PlayScript, StartProxy
from .fleet import ROLE, fleet, occupied
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    begin,
    chunk,
    delta,
    post,
    until,
    usage,
)

OF_EXCHANGES = (Asking, Attempt, Clock, Course, Exchange, Hold, Inspector, Pump, ResponseHead)
EXCHANGES = 2000
AT_ONCE = 50


class CuttingUpstream:
    """Answers with a short stream, and cuts it at a random moment as often as not. `cuts` counts which way it did."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.cuts: Counter[str] = Counter()
        self.seen_gone = 0

    async def __call__(self, api: Peer) -> None:
        try:
            while True:
                await api.message()
                await self._answer(api)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.seen_gone += 1
            raise

    async def _answer(self, api: Peer) -> None:
        pieces = [STREAM_HEAD, *(chunk(delta(f"{n}")) for n in range(4)), chunk(usage(4, 4)), chunk(DONE), LAST_CHUNK]
        whole = b"".join(pieces)
        end = self.dice.choice([len(whole), self.dice.randrange(len(whole))])
        for start in range(0, end, 150):
            api.send(whole[start : min(start + 150, end)])
            await asyncio.sleep(0)
        if end < len(whole):
            how = self.dice.choice([Peer.close, Peer.reset])
            self.cuts[how.__name__] += 1
            how(api)
            raise ConnectionResetError


async def one_exchange(proxy: RunningProxy, dice: random.Random) -> None:
    """A client that reads for a random while and then leaves, or to the end."""
    client = Peer(*await asyncio.open_connection("127.0.0.1", proxy.port))
    try:
        request = post().replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        stop_in_request = dice.random() < 0.1
        client.send(request[: dice.randrange(len(request))] if stop_in_request else request)
        if not stop_in_request:
            patience = dice.choice([0, dice.randrange(1500), 10_000])
            received = 0
            while received < patience and (part := await client.reader.read(200)):
                received += len(part)
        dice.choice([Peer.close, Peer.reset])(client)
    except ConnectionError:
        pass
    finally:
        client.writer.transport.abort()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_after_thousands_of_cut_exchanges_everything_is_as_before(start: StartProxy, play: PlayScript) -> None:
    dice = random.Random(20_26)
    cutting = CuttingUpstream(dice)
    upstream = await play(cutting)
    proxy = await start(upstream.url)
    await one_exchange(proxy, random.Random(1))
    await settled(proxy, upstream)
    tasks, fds = len(asyncio.all_tasks()), descriptors()
    before = sum(proxy.outcomes().values())

    slots = asyncio.Semaphore(AT_ONCE)

    async def limited() -> None:
        async with slots:
            await one_exchange(proxy, dice)

    async with asyncio.TaskGroup() as group:
        for _ in range(EXCHANGES):
            group.create_task(limited())
    await settled(proxy, upstream)

    assert len(asyncio.all_tasks()) == tasks
    assert descriptors() == fds
    assert cutting.seen_gone == upstream.connections
    assert proxy.sample("requests_active") == 0
    assert proxy.sample("streams_active") == 0
    assert proxy.sample("upstream_connections") == 0
    outcomes = proxy.outcomes()
    # A request whose head never arrived whole is no exchange; one that was sent upstream is exactly one.
    assert before < sum(outcomes.values()) <= EXCHANGES + before
    assert sum(outcomes.values()) == proxy.sample("request_duration_seconds_count")
    assert set(outcomes) <= {
        "completed",
        "truncated",
        "upstream_error",
        "client_gone_before_head",
        "client_gone_before_first_token",
        "client_gone_mid_stream",
    }
    assert min(outcomes[name] for name in ("completed", "truncated", "client_gone_mid_stream")) > 0


async def settled(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    """Waits until both sides have ended everything. All that may be open until then is idle in the pool."""
    await proxy.idle()
    await until(lambda: upstream.open == proxy.sample("upstream_connections", state="idle"))
    assert proxy.sample("upstream_connections", state="active") == 0
    await upstream.hang_up()
    await until(lambda: not proxy.worker.proxy.server.connections and not proxy.sample("upstream_connections"))
    gc.collect()
    await asyncio.sleep(0)


JSON_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def answered(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    client, api = await begin(proxy, upstream)
    api.send(JSON_ANSWER)
    await client.message()
    return "completed"


async def streamed(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("a")), chunk(DONE), LAST_CHUNK)
    await client.message()
    return "completed"


async def cut(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("a")))
    await client.read_until(b"data: ")
    api.reset()
    await client.rest()
    return "truncated"


async def unanswered(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    client, api = await begin(proxy, upstream)
    api.close()
    assert (await client.message()).status == 502
    return "upstream_error"


async def left(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("a")))
    await client.read_until(b"data: ")
    client.reset()
    await api.gone()
    return "client_gone_mid_stream"


async def left_early(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    client, api = await begin(proxy, upstream)
    client.reset()
    await api.gone()
    return "client_gone_before_head"


async def refused(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    client = await proxy.connect()
    client.send(post(path="/nowhere"))
    assert (await client.message()).status == 404
    return "rejected"


WELL = (STREAM_HEAD, chunk(ROLE), chunk(delta("a")), chunk(DONE), LAST_CHUNK)


async def in_turn(proxy: RunningProxy, upstream: ScriptedUpstream, *acts: tuple[bytes, ...]) -> None:
    """Each attempt gets the next of `acts`, and its connection is closed then."""
    client = await proxy.connect()
    client.send(post())
    for act in acts:
        api = await upstream.accept()
        await api.message()
        api.send(*act)
        await api.drain()
        api.close()
    await client.message()


async def retried(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    await in_turn(proxy, upstream, (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno",), WELL)
    return "completed"


async def broken_off_and_asked_again(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    await in_turn(proxy, upstream, WELL[:2], WELL)
    return "completed"


async def in_vain(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    await in_turn(proxy, upstream, WELL[:2], WELL[:2])
    return "truncated"


async def left_while_held(proxy: RunningProxy, upstream: ScriptedUpstream) -> str:
    client, api = await begin(proxy, upstream)
    api.send(*WELL[:2])
    (relay,) = proxy.worker.proxy.active
    # It waits for the first token, or the end.
    await until(lambda: relay._asking is not None and relay._asking._connection.protocol.answer_begun)
    client.reset()
    await api.gone()
    return "client_gone_before_head"


@pytest.mark.parametrize(
    ("exchange", "until_"),
    [
        (retried, "head"),
        (retried, "end"),
        (broken_off_and_asked_again, "first_token"),
        (broken_off_and_asked_again, "end"),
        (in_vain, "first_token"),
        (in_vain, "end"),
        (left_while_held, "first_token"),
        (left_while_held, "end"),
    ],
)
async def test_what_attempts_held_is_freed_with_the_end_of_the_exchange(
    start: StartProxy,
    upstream: ScriptedUpstream,
    exchange: Callable[[RunningProxy, ScriptedUpstream], Awaitable[str]],
    until_: str,
) -> None:
    two = tuple(config.Endpoint(url=f"{upstream.url}/{number}") for number in range(2))
    proxy = await start(upstream.url, **fleet(config.Upstream(name="gpus", urls=two), retry={"until": until_}))
    await test_what_an_exchange_held_is_freed_with_its_end(proxy, upstream, exchange)
    assert occupied(proxy) == 0


@pytest.mark.parametrize("exchange", [answered, streamed, cut, unanswered, left, left_early, refused])
async def test_what_an_exchange_held_is_freed_with_its_end(
    proxy: RunningProxy,
    upstream: ScriptedUpstream,
    exchange: Callable[[RunningProxy, ScriptedUpstream], Awaitable[str]],
) -> None:
    gc.collect()
    gc.disable()
    try:
        outcome = await exchange(proxy, upstream)
        await proxy.idle()
        await asyncio.sleep(0)
        held = [kept for kept in gc.get_objects() if isinstance(kept, OF_EXCHANGES)]
    finally:
        gc.enable()
    assert held == []
    assert proxy.outcomes() == {outcome: 1}


async def test_a_stream_holds_no_more_than_its_bound_for_a_client_that_does_not_read(
    start: StartProxy, play: PlayScript
) -> None:
    async def flood(api: Peer) -> None:
        await api.message()
        api.send(STREAM_HEAD)
        while True:
            api.send(chunk(delta("x" * 8_000)))
            await api.writer.drain()

    upstream = await play(flood)
    proxy = await start(upstream.url)
    client = await proxy.connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(post())
    await proxy.busy()
    server = proxy.worker.proxy.server
    await until(lambda: any(connection.writing_paused for connection in server.connections))
    (connection,) = server.connections
    assert connection.transport is not None
    held = connection.transport.get_write_buffer_size()
    # One read may follow a buffer just under its mark.
    assert WRITE_BUFFER < held <= WRITE_BUFFER + MAX_READ + 100 < 128 * 1024


async def test_an_endless_line_is_forwarded_without_being_kept(start: StartProxy, play: PlayScript) -> None:
    size, piece = 64 * 1024 * 1024, b"x" * 65536

    async def endless(api: Peer) -> None:
        await api.message()
        api.send(STREAM_HEAD, chunk(b"data: "))
        for _ in range(size // len(piece)):
            api.send(chunk(piece))
            await api.writer.drain()
        api.send(LAST_CHUNK)
        await api.rest()

    upstream = await play(endless)
    proxy = await start(upstream.url)
    client = await proxy.connect()
    client.send(post())
    await client.read_until(b"\r\n\r\n")
    tracemalloc.start()
    try:
        received = 0
        while part := await client.reader.read(1 << 20):
            received += len(part)
            if part.endswith(LAST_CHUNK):
                break
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert received > size
    assert peak < 24 * 1024 * 1024
    assert await proxy.ended() == {"completed": 1}
