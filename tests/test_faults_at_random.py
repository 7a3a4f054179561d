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
from .harness import DONE, Message, Peer, RunningProxy, chunk, delta, until, usage

EXCHANGES = int(os.environ.get("EXCHANGES", "1000"))
SEED = int(os.environ.get("SEED", "1"))
AT_ONCE = 20
WAYS = (
    *(["well"] * 6 + ["early"] * 2 + ["cut", "cut", "garbage", "silent", "204", "length", "short", "close"]),
    *("dies", "dies", "noise", "quits"),
)
GARBAGE = [b"junk\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"\x00" * 40_000]
CHAT = b'{"stream":true,"model":"m","messages":["' + b"x" * 3000 + b'"]}'
ASKING = CHAT[:-1] + b',"stream_options":{"include_usage":true}}'
# More than a chunk extension may have.
TOO_LONG = b"x" * 300


def way_of(number: int) -> tuple[random.Random, str]:
    """The upstream's dice for a request, and what it does."""
    dice = random.Random(number)
    return dice, dice.choice(WAYS)


def answer(dice: random.Random, way: str) -> bytes:
    """The payload of a stream."""
    if way == "noise":
        # No JSON, no Unicode, no events.
        return b"".join(
            dice.choice([b"data: \xff\xfe\n\n", b"data: {\n\n", b"\x00\r\r", b"data:[]\n\n", dice.randbytes(700)])
            for _ in range(20)
        )
    texts = [dice.choice(["", "Hi", "x" * 5000]) for _ in range(dice.randrange(10))]
    return b"".join(delta(text) for text in texts) + usage(1, len(texts)) + DONE


def answer_of(number: int) -> bytes:
    """What the client is to get of the answer: that it only tells usage was asked for here, of chats alone."""
    dice, way = way_of(number)
    payload = answer(dice, way)
    if way == "noise" or body_of(number)[0] != "chat":
        return payload
    start = payload.index(b'data: {"id":"c","choices":[],')
    return payload[:start] + DONE


def body_of(number: int) -> tuple[str, bytes]:
    """What the client sends: a chat, a file, or what it calls JSON."""
    dice = random.Random(-number)
    kind = dice.choice(["chat", "chat", "chat", "file", "no JSON"])
    if kind == "chat":
        return kind, CHAT
    if kind == "file":
        return kind, dice.randbytes(dice.choice([10, 3000, 200_000]))
    return kind, dice.choice([b"{" * 2000, b"\xff" * 500, b'{"model":' + b"[" * 1500, dice.randbytes(900)])


async def send_in_pieces(peer: Peer, dice: random.Random, data: bytes) -> None:
    """Dribbles, pauses and bursts."""
    while data:
        size = dice.choice([1, 20, 3000, 100_000])
        peer.send(data[:size])
        data = data[size:]
        if dice.random() < 0.3:
            await asyncio.sleep(0)


def chunked(dice: random.Random, payload: bytes, sizes: list[int], *, ends: bool = True) -> bytes:
    """`payload` in chunks, some of them with extensions, and with or without trailers."""
    sent, position = b"", 0
    while position < len(payload):
        part = payload[position : position + dice.choice(sizes)]
        position += len(part)
        size, rest = chunk(part).split(b"\r\n", 1)
        sent += size + dice.choice([b"", b"", b";a=b", b' ; c="d"']) + b"\r\n" + rest
    trailers = dice.choice([b"", b"", b"X-Trailer: 1\r\n", b"Authorization: Bearer t\r\nX-Other: 2\r\n"])
    return sent + (b"0\r\n" + trailers + b"\r\n" if ends else b"")


class Upstream:
    """Answers a request according to its number.

    `whole` are the numbers of the answers that were sent to their end, `repeated` those of requests that came again
    after a connection had died; `wrong` is what should not have come.
    """

    def __init__(self) -> None:
        self.whole: set[int] = set()
        self.died: set[int] = set()
        self.repeated: set[int] = set()
        self.wrong: list[str] = []

    def _check(self, number: int, head: Message, body: bytes, *, complete: bool) -> None:
        """What came of a request is what the client sent, and whole if it ended."""
        kind, sent = body_of(number)
        wanted = [sent, ASKING] if kind == "chat" else [sent]
        if not any(body == whole if complete else whole.startswith(body) for whole in wanted):
            self.wrong.append(f"{number}: {len(body)} bytes of a body of {len(sent)}, complete: {complete}")
        if head.get("authorization") or head.get("x-other"):
            self.wrong.append(f"{number}: a trailer became a field")

    async def __call__(self, api: Peer) -> None:
        requests = 0
        while True:
            head = await api.head()
            requests += 1
            number = int(head.start_line.split()[1].partition("?")[2])
            dice, way = way_of(number)
            payload = answer(dice, way)
            if way == "dies" and requests > 1:
                # As if it had gone while it was idle; the request goes to another connection, where it is kept.
                self.died.add(number)
                (api.reset if dice.random() < 0.5 else api.close)()
                return
            if number in self.died:
                self.repeated.add(number)
            if way == "early":
                status = dice.choice([b"413 Too Large", b"200 OK"])
                api.send(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\nno")
                if dice.random() < 0.5:
                    return
                # It goes on to read what it is sent, slowly.
                for _ in range(5):
                    await asyncio.sleep(0)
                body, complete = await api._body(head)
                self._check(number, head, body, complete=complete)
                return
            if way == "silent":
                await api.rest()
                return
            body, complete = await api._body(head)
            self._check(number, head, body, complete=complete)
            if not complete:
                return
            if way == "garbage":
                api.send(dice.choice(GARBAGE))
                return
            if way == "204":
                api.send(b"HTTP/1.1 204 No Content\r\n\r\n")
                continue
            framing = b"Transfer-Encoding: chunked\r\n"
            if way in ("length", "short"):
                framing = b"Content-Length: %d\r\n" % (len(payload) + (way == "short"))
            elif way == "close":
                framing = b""
            sent = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + framing + b"\r\n"
            sent += chunked(dice, payload, [7, 300, 9000]) if framing.startswith(b"T") else payload
            if way == "cut":
                sent = sent[: dice.randrange(len(sent))]
            else:
                self.whole.add(number)
            await send_in_pieces(api, dice, sent)
            if way in ("cut", "short", "close", "quits"):
                (api.reset if way in ("cut", "short") and dice.random() < 0.5 else api.close)()
                return


async def exchange(proxy: RunningProxy, upstream: Upstream, number: int) -> bool:
    """One request of a client of any kind. Whether it got what it asked for, whole."""
    dice = random.Random(~number)
    client = await proxy.connect()
    kind, body = body_of(number)
    path, type_ = (
        (b"/v1/files", b"application/octet-stream")
        if kind == "file"
        else (b"/v1/chat/completions", b"application/json")
    )
    line = b"POST %b?%d HTTP/1.%d\r\n" % (path, number, dice.random() < 0.9)
    head = line + b"Host: p\r\nContent-Type: %b\r\n" % type_
    if dice.random() < 0.3 and b"1.1" in line:
        request = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(dice, body, [999, 70_000])
    else:
        request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    leaves = dice.choice(["never"] * 5 + ["in its request", "at once", "in the response", "broken", "too long"])
    try:
        if leaves == "in its request":
            await send_in_pieces(client, dice, request[: dice.randrange(len(request))])
            return False
        if leaves in ("broken", "too long"):
            bad = b"5\r\nhello!!" if leaves == "broken" else b"5;" + TOO_LONG + b"\r\nhello\r\n0\r\nX-Other: 1\r\n\r\n"
            await send_in_pieces(client, dice, head + b"Transfer-Encoding: chunked\r\n\r\n" + bad)
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
    if response.status != 200 or response.body == b"no":
        return False
    wanted = answer_of(number)
    got = response.body.replace(b": heartbeat\n", b"").partition(b"event: error\ndata: ")[0]
    assert wanted.startswith(got), number
    assert not response.complete or (got == wanted and number in upstream.whole), number
    return response.complete


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
    assert not upstream.wrong
    assert upstream.repeated
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
