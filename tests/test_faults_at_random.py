"""Both sides at their worst, at random and reproducibly: whatever they do, nothing false is told and nothing is left.

`make faults` runs it for longer: EXCHANGES many, from SEED on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random

import pytest

from sseproxy import config

from .conftest import PlayScript, StartProxy
from .harness import DONE, LAST_CHUNK, Peer, RunningProxy, chunk, delta, until, usage

EXCHANGES = int(os.environ.get("EXCHANGES", "1000"))
SEED = int(os.environ.get("SEED", "1"))
AT_ONCE = 20
WAYS = ["well"] * 6 + ["early", "cut", "cut", "garbage", "silent", "204", "length", "short", "close"]
GARBAGE = [b"junk\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"\x00" * 40_000]
UPLOAD = b'{"stream":true,"model":"m","messages":["' + b"x" * 3000 + b'"]}'


def answer(dice: random.Random) -> bytes:
    """The payload of a stream."""
    texts = [dice.choice(["", "Hi", "x" * 5000]) for _ in range(dice.randrange(10))]
    return b"".join(delta(text) for text in texts) + usage(1, len(texts)) + DONE


async def send_in_pieces(peer: Peer, dice: random.Random, data: bytes) -> None:
    """Dribbles, pauses and bursts."""
    while data:
        size = dice.choice([1, 20, 3000, 100_000])
        peer.send(data[:size])
        data = data[size:]
        if dice.random() < 0.3:
            await asyncio.sleep(0)


class Upstream:
    """Answers a request according to its number; `whole` are the numbers of the answers that were sent to their end."""

    def __init__(self) -> None:
        self.whole: set[int] = set()

    async def __call__(self, api: Peer) -> None:
        while True:
            head = await api.head()
            number = int(head.start_line.split()[1].partition("?")[2])
            dice = random.Random(number)
            way = dice.choice(
                ["well"] * 6 + ["early", "cut", "cut", "garbage", "silent", "204", "length", "short", "close"]
            )
            if way == "early":
                api.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
                return
            if way == "silent":
                await api.rest()
                return
            await api._body(head)
            payload = answer(dice)
            if way == "garbage":
                api.send(
                    dice.choice([b"junk\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"\x00" * 40_000])
                )
                return
            if way == "204":
                api.send(b"HTTP/1.1 204 No Content\r\n\r\n")
                continue
            if way in ("length", "short"):
                framing = b"Content-Length: %d\r\n" % (len(payload) + (way == "short"))
            else:
                framing = b"" if way == "close" else b"Transfer-Encoding: chunked\r\n"
            sent = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + framing + b"\r\n"
            if framing.startswith(b"T"):
                position = 0
                while position < len(payload):
                    size = dice.choice([7, 300, 9000])
                    sent += chunk(payload[position : position + size])
                    position += size
                sent += LAST_CHUNK
            else:
                sent += payload
            if way == "cut":
                sent = sent[: dice.randrange(len(sent))]
            else:
                self.whole.add(number)
            await send_in_pieces(api, dice, sent)
            if way in ("cut", "short", "close"):
                (api.reset if way != "close" and dice.random() < 0.5 else api.close)()
                return


async def exchange(proxy: RunningProxy, upstream: Upstream, number: int) -> bool:
    """One request of a client of any kind. Whether it got what it asked for, whole."""
    dice = random.Random(~number)
    client = await proxy.connect()
    line = b"POST /v1/chat/completions?%d HTTP/1.%d\r\n" % (number, dice.random() < 0.9)
    head = line + b"Host: p\r\nContent-Type: application/json\r\n"
    if dice.random() < 0.3 and b"1.1" in line:
        request = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(UPLOAD[:999]) + chunk(UPLOAD[999:]) + LAST_CHUNK
    else:
        request = head + b"Content-Length: %d\r\n\r\n" % len(UPLOAD) + UPLOAD
    leaves = dice.choice(["never"] * 5 + ["in its request", "at once", "in the response", "broken"])
    try:
        if leaves == "in its request":
            await send_in_pieces(client, dice, request[: dice.randrange(len(request))])
            return False
        if leaves == "broken":
            await send_in_pieces(client, dice, head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello!!")
            await client.rest()
            return False
        await send_in_pieces(client, dice, request)
        if leaves == "at once":
            return False
        if leaves == "in the response":
            await client.reader.read(dice.randrange(1, 400))
            return False
        response = await client.message()
    except (ConnectionError, asyncio.IncompleteReadError):
        return False
    finally:
        dice.choice([client.close, client.reset, client.writer.transport.abort])()
        proxy.peers.remove(client)
    if response.status != 200:
        return False
    wanted = answer_of(number)
    got = response.body.replace(b": heartbeat\n", b"").partition(b"event: error\ndata: ")[0]
    assert wanted.startswith(got), number
    assert not response.complete or (got == wanted and number in upstream.whole), number
    return response.complete


def answer_of(number: int) -> bytes:
    """What the client is to get of the answer: that it only tells usage was asked for here."""
    dice = random.Random(number)
    dice.choice(WAYS)
    payload = answer(dice)
    start = payload.index(b'data: {"id":"c","choices":[],')
    return payload[:start] + DONE


@pytest.mark.timeout(60 + EXCHANGES // 10)
async def test_nothing_false_is_told_and_nothing_is_left(
    start: StartProxy, play: PlayScript, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    upstream = Upstream()
    scripted = await play(upstream)
    proxy = await start(
        scripted.url,
        route={"usage": config.UsageOptions(request=True), "heartbeat": 0.01},
        timeouts={"head": 0.5, "first_token": 1.0, "idle": 1.0, "body": 1.0, "write": 1.0},
    )
    await exchange(proxy, upstream, SEED - 1)
    await proxy.idle()
    gc.collect()
    loop_tasks, descriptors = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
    begun = sum(proxy.outcomes().values())
    slots, whole = asyncio.Semaphore(AT_ONCE), 0

    async def limited(number: int) -> None:
        nonlocal whole
        async with slots:
            got_it_whole = await exchange(proxy, upstream, number)
        whole += got_it_whole

    async with asyncio.TaskGroup() as group:
        for number in range(SEED, SEED + EXCHANGES):
            group.create_task(limited(number))
    outcomes = await proxy.ended()
    # A request that never became whole, or a connection that came to nothing, is none.
    assert EXCHANGES * 0.8 < sum(outcomes.values()) - begun <= EXCHANGES
    assert whole <= outcomes["completed"]
    assert whole > EXCHANGES / 10
    assert "proxy_error" not in outcomes
    for name in ("requests_active", "streams_active"):
        assert proxy.sample(name) == 0
    await until(lambda: proxy.sample("upstream_connections", state="active") == 0)
    await scripted.hang_up()
    await until(lambda: proxy.sample("upstream_connections") == 0)
    await until(proxy.worker.proxy.server.empty.is_set)
    await until(lambda: len(asyncio.all_tasks()) <= loop_tasks)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert not proxy.worker.proxy.server.hangups._watched
    assert [record.getMessage() for record in caplog.records] == []
