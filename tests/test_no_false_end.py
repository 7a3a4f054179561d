"""Whatever an upstream does, a response that looks complete is complete, and what arrives is what was sent."""

from __future__ import annotations

import asyncio
import random

import pytest

from .conftest import PlayScript, StartProxy
from .harness import DONE, Peer, RunningProxy, chunk, delta, post, usage

BODY = b"".join(delta(f"{n}" * (1 + n % 7)) for n in range(12)) + usage(3, 12) + DONE
EXCHANGES = 600


def framed(dice: random.Random, body: bytes) -> tuple[bytes, str]:
    """A response with `body`, framed in one of the three ways, and which one."""
    way = dice.choice(["chunked", "length", "close"])
    kind = dice.choice([b"text/event-stream", b"application/json", b"application/octet-stream"])
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % kind
    if way == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body, way
    if way == "close":
        return head + b"\r\n" + body, way
    pieces, position = [], 0
    while position < len(body):
        piece = body[position : position + dice.randrange(1, 400)]
        pieces.append(chunk(piece))
        position += len(piece)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(pieces) + b"0\r\n\r\n", way


async def one(proxy: RunningProxy, number: int, version: bytes) -> tuple[bytes, bool, int]:
    client = Peer(*await asyncio.open_connection("127.0.0.1", proxy.port))
    try:
        client.send(post(path=f"/v1/chat/completions?{number}").replace(b"HTTP/1.1", version))
        response = await client.message()
        return response.body, response.complete, response.status
    except (asyncio.IncompleteReadError, ConnectionError):
        return b"", False, 0
    finally:
        client.writer.transport.abort()


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"], ids=["1.1", "1.0"])
async def test_a_complete_response_is_complete_and_any_other_a_prefix(
    start: StartProxy, play: PlayScript, version: bytes
) -> None:
    whole: dict[int, bool] = {}
    ended: dict[int, bool] = {}

    async def misbehave(api: Peer) -> None:
        while True:
            request = await api.message()
            number = int(request.start_line.split()[1].partition("?")[2])
            dice = random.Random(number)
            data, way = framed(dice, BODY)
            cut = dice.choice([len(data), len(data), dice.randrange(len(data))])
            end = dice.choice([Peer.close, Peer.reset])
            # A body that ends with its connection is whole if that ended in order, wherever it did.
            head = data.index(b"\r\n\r\n") + 4
            whole[number] = cut == len(data) if way != "close" else cut >= head and end is Peer.close
            # The end marker is the last thing in the body: behind it there is only framing.
            ended[number] = cut >= len(data) - len(b"\r\n0\r\n\r\n" if way == "chunked" else b"")
            position = 0
            while position < cut:
                step = dice.choice([1, 7, 100, 3000])
                api.send(data[position : min(position + step, cut)])
                position += step
                await asyncio.sleep(0)
            if cut < len(data) or way == "close":
                end(api)
                return

    upstream = await play(misbehave)
    proxy = await start(upstream.url)
    slots = asyncio.Semaphore(20)
    completed = 0

    async def limited(number: int) -> None:
        nonlocal completed
        async with slots:
            body, complete, status = await one(proxy, number, version)
        if status == 200:
            assert BODY.startswith(body) or b"event: error\ndata: " in body
            assert BODY.startswith(body.partition(b"event: error\ndata: ")[0])
            assert whole[number] or not complete, number
        else:
            assert not whole[number] or status == 0
        completed += complete and status == 200

    async with asyncio.TaskGroup() as group:
        for number in range(EXCHANGES):
            group.create_task(limited(number))
    outcomes = await proxy.ended()
    assert sum(outcomes.values()) == EXCHANGES
    assert sum(whole.values()) <= outcomes["completed"]
    assert outcomes["completed"] <= sum(whole[number] or ended[number] for number in whole)
    assert completed >= sum(whole.values()) * 0.99
    assert proxy.sample("requests_active") == 0
