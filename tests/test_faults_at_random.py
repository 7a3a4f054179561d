"""Both sides at their worst, at random and reproducibly: whatever they do, nothing false is told and nothing is left.

`make faults` runs it for longer: EXCHANGES many, from SEED on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
from collections import Counter
from typing import NamedTuple

import pytest

from sseproxy import config
from sseproxy.wire.framing import MAX_SIZE_LINE, MAX_TRAILERS

from .conftest import PlayScript, StartProxy
from .harness import DONE, LAST_CHUNK, Message, Peer, RunningProxy, ScriptedUpstream, delta, until, usage

EXCHANGES = int(os.environ.get("EXCHANGES", "1000"))
SEED = int(os.environ.get("SEED", "1"))
AT_ONCE = 20
MAX_PIPELINED = 4
ASKS = b',"stream_options":{"include_usage":true}'
GARBAGE = [b"junk\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"\x00" * 40_000]
# What an upstream does; most of it, what it should.
WAYS = ["well"] * 10 + [
    "early",
    "early",
    "cut",
    "cut",
    "garbage",
    "silent",
    "204",
    "length",
    "short",
    "close",
    "refuses",
]
# What it does to a request on a connection that it has kept open.
WAYS_TO_DIE = ["before the body", "before an answer", "in its head"]
# What becomes of a connection that has brought an answer to its end.
AFTERWARDS = ["stays"] * 6 + ["ends", "ends soon", "is reset soon"]
# What clients do, all of them that pipeline included.
LEAVES = ["never"] * 6 + ["in its requests", "at once", "in a response", "broken"]


# --- what is sent, by the number of an exchange ---


class Asked(NamedTuple):
    """The request of exchange `number`."""

    path: bytes
    kind: bytes
    body: bytes


def asked(number: int) -> Asked:
    dice = random.Random(f"asked {number}")
    start = b'{"stream":true,"model":"m%d","number":%d,"messages":["' % (number % 7, number)
    what = dice.choice(["chat"] * 6 + ["no JSON", "no Unicode", "upload", "JSON upload"])
    if what == "chat":
        return Asked(b"/v1/chat/completions", b"application/json", start + b"x" * 3000 + b'"]}')
    if what == "no JSON":
        return Asked(b"/v1/chat/completions", b"application/json", b"%d no JSON " % number + start * 40)
    if what == "no Unicode":
        return Asked(b"/v1/chat/completions", b"application/json", start + b"\xff\xc3" * 900 + b'"]}')
    size = dice.choice([1, 30_000, 300_000])
    kind = b"application/json" if what == "JSON upload" else b"application/octet-stream"
    return Asked(b"/v1/files", kind, start + b"y" * size + b'"]}')


class Answered(NamedTuple):
    """The response to it. `usage` comes before the `end` if it was asked for."""

    kind: bytes
    begin: bytes
    usage: bytes
    end: bytes
    tokens: int

    @property
    def wanted(self) -> bytes:
        """What the client is to get."""
        return self.begin + self.end


def answered(number: int) -> Answered:
    dice = random.Random(f"answered {number}")
    what = dice.choice(["stream"] * 6 + ["JSON", "no JSON", "no Unicode"])
    if what == "JSON":
        body = b'{"id":%d,"usage":{"prompt_tokens":1,"completion_tokens":2}}' % number
        return Answered(b"application/json", body, b"", b"", 2)
    if what in ("no JSON", "no Unicode"):
        body = b'{"id":%d,"\xff\xc3' % number if what == "no Unicode" else b"%d <html>" % number
        return Answered(b"application/json", body * dice.choice([1, 900]), b"", b"", 0)
    events = []
    for _ in range(dice.randrange(10)):
        text = f"{number} " + dice.choice(["", "Hi", "x" * 5000])
        events.append(
            dice.choice([delta(text)] * 8 + [b'data: {"%d\xff\n\n' % number, b"data: \xc3\n\n", b": %d\n" % number])
        )
    return Answered(b"text/event-stream", b"".join(events), usage(1, len(events)), DONE, len(events))


def chunked(dice: random.Random, payload: bytes) -> tuple[bytes, bool]:
    """`payload` in chunks of any size, some with extensions, and perhaps with trailers; and whether that is right."""
    right, framed = True, b""
    extends = dice.random() < 0.2
    while payload:
        size = dice.choice([7, 300, 9000])
        piece, payload = payload[:size], payload[size:]
        line = b"%x" % len(piece)
        if extends and dice.random() < 0.3:
            room = MAX_SIZE_LINE - len(line) - len(b";a=\r\n")
            length = dice.choice([0, 9, room, room] + [room + 1] * (dice.random() < 0.2))
            right = right and length <= room
            line += b";a=" + b"e" * length
        framed += b"%b\r\n%b\r\n" % (line, piece)
    if dice.random() < 0.8:
        return framed + LAST_CHUNK, right
    lines = [b"X-Trailer: 1", b"Authorization: a", b"X: " + b"t" * (MAX_TRAILERS - 100)]
    if dice.random() < 0.2:
        lines, right = [dice.choice([b"X: " + b"t" * MAX_TRAILERS, b"Content-Length: 1", b"no field"])], False
    return framed + b"0\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n", right


async def send_in_pieces(peer: Peer, dice: random.Random, data: bytes) -> None:
    """Dribbles, pauses and bursts."""
    while data:
        size = dice.choice([1, 20, 3000, 100_000])
        peer.send(data[:size])
        data = data[size:]
        if dice.random() < 0.3:
            await asyncio.sleep(0)


# --- the upstream ---


class Upstream:
    """Answers a request according to its number."""

    def __init__(self) -> None:
        self.whole: set[int] = set()
        """The numbers of the answers that were sent to their end."""
        self.tried: Counter[int] = Counter()
        """How often a request has come."""
        self.killed = 0
        """How many requests met a connection that died."""
        self.usage_sent = 0
        """The tokens that were told, of answers that may not have arrived."""

    async def __call__(self, api: Peer) -> None:
        reused = False
        while True:
            head = await api.head()
            number = int(head.start_line.split()[1].partition("?")[2])
            self.tried[number] += 1
            dice = random.Random(f"upstream {number} {self.tried[number]}")
            if reused and dice.random() < 0.2:
                self.killed += 1
                await self._die(api, head, number, dice)
                return
            if not await self._answer(api, head, number, dice):
                return
            afterwards = dice.choice(AFTERWARDS)
            if afterwards.endswith("soon"):
                for _ in range(dice.randrange(30)):
                    await asyncio.sleep(0)
            if afterwards != "stays":
                (api.reset if afterwards == "is reset soon" else api.close)()
                return
            reused = True

    async def _die(self, api: Peer, head: Message, number: int, dice: random.Random) -> None:
        way = dice.choice(WAYS_TO_DIE)
        if way != "before the body":
            await self._body(api, head, number)
        if way == "in its head":
            api.send(b"HTTP/1.1 200 OK\r\nContent-Le")
        dice.choice([api.close, api.reset])()

    async def _body(self, api: Peer, head: Message, number: int) -> bytes:
        """The request's body. What ends cleanly is whole, and of this exchange."""
        body, complete = await api._body(head)
        sent = asked(number).body
        assert not complete or body == sent or body == sent[:-1] + ASKS + b"}", (number, len(body), len(sent))
        if not complete:
            raise ConnectionResetError
        return body

    async def _answer(self, api: Peer, head: Message, number: int, dice: random.Random) -> bool:
        """Whether the connection can be used again."""
        way = dice.choice(WAYS)
        if way == "silent":
            await api.rest()
            return False
        if way == "early":
            return await self._answer_early(api, head, number, dice)
        body = await self._body(api, head, number)
        if way == "garbage":
            api.send(dice.choice(GARBAGE))
            return False
        if way == "204":
            api.send(b"HTTP/1.1 204 No Content\r\n\r\n")
            return True
        if way == "refuses" and ASKS in body:
            refusal = b'{"error":"stream_options? %d"}' % number
            api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(refusal), refusal))
            return True
        return await self._send(api, number, dice, way, asks=ASKS in body)

    async def _answer_early(self, api: Peer, head: Message, number: int, dice: random.Random) -> bool:
        """Answers before the request's body has come; that goes on, slowly, or is not read any more."""
        if dice.random() < 0.5:
            api.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        else:
            await self._send(api, number, dice, "well", asks=False)
        then = dice.choice(["ends", "reads on", "reads slowly", "does not read"])
        if then == "reads on":
            await self._body(api, head, number)
            return True
        if then == "reads slowly":
            while await api.reader.read(2000):  # noqa: ASYNC110 - as slow as the loop is busy
                await asyncio.sleep(0)
        if then == "does not read":
            api.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(dice.randrange(200)):
                await asyncio.sleep(0)
        return False

    async def _send(self, api: Peer, number: int, dice: random.Random, way: str, *, asks: bool) -> bool:
        kind, begin, told, end, tokens = answered(number)
        payload = begin + (told if asks else b"") + end
        if asks or not told:
            self.usage_sent += tokens
        if way in ("length", "short"):
            framing = b"Content-Length: %d\r\n" % (len(payload) + (way == "short"))
        else:
            framing = b"" if way == "close" else b"Transfer-Encoding: chunked\r\n"
        framed, right = chunked(dice, payload) if framing.startswith(b"T") else (payload, True)
        sent = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n%b" % (kind, framing, framed)
        if way == "cut":
            sent = sent[: dice.randrange(len(sent))]
        elif right and way != "short":
            self.whole.add(number)
        await send_in_pieces(api, dice, sent)
        if way not in ("cut", "short", "close"):
            return True
        (api.reset if way != "close" and dice.random() < 0.5 else api.close)()
        return False


# --- the clients ---


class Seen:
    """What clients have sent and got."""

    def __init__(self) -> None:
        self.begun = 0
        """Requests of which something was sent."""
        self.statuses: Counter[int] = Counter()
        self.whole = 0
        """Answers of the upstream that came whole."""
        self.bytes = 0
        """Of the bodies of these."""


def request_of(number: int, dice: random.Random, *, old: bool) -> tuple[bytes, bool]:
    """The request of exchange `number`, and whether its framing is right."""
    path, kind, body = asked(number)
    head = b"POST %b?%d HTTP/1.%d\r\nHost: p\r\nContent-Type: %b\r\n" % (path, number, not old, kind)
    if old or dice.random() < 0.5:
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body), True
    framed, right = chunked(dice, body)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + framed, right


async def ask(proxy: RunningProxy, upstream: Upstream, seen: Seen, numbers: range) -> None:
    """The exchanges of `numbers`, on one connection, of a client of any kind."""
    dice = random.Random(f"client {numbers[0]}")
    client = await proxy.connect()
    old = len(numbers) == 1 and dice.random() < 0.1
    requests = [request_of(number, dice, old=old) for number in numbers]
    sent = b"".join(request for request, _ in requests)
    leaves = dice.choice(LEAVES)
    try:
        seen.begun += len(numbers)
        if leaves == "in its requests":
            await send_in_pieces(client, dice, sent[: dice.randrange(len(sent))])
            return
        if leaves == "broken":
            await send_in_pieces(
                client, dice, sent.partition(b"\r\n")[0] + b"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello!!"
            )
            await client.rest()
            return
        if leaves == "in a response":
            await send_in_pieces(client, dice, sent)
            await client.reader.read(dice.randrange(1, 400))
            return
        await send_in_pieces(client, dice, sent)
        if leaves == "at once":
            return
        for number, (_, right) in zip(numbers, requests, strict=True):
            response = await client.message()
            check(response, number, upstream, seen, right=right)
            if not response.complete or response.get("connection") == "close":
                return
    except (ConnectionError, asyncio.IncompleteReadError):
        return
    finally:
        dice.choice([client.close, client.reset, client.writer.transport.abort])()
        proxy.peers.remove(client)


def check(response: Message, number: int, upstream: Upstream, seen: Seen, *, right: bool) -> None:
    """A response of the upstream's is of this exchange, and never whole if it is short."""
    seen.statuses[response.status] += 1
    if response.status != 200:
        return
    answer = answered(number)
    got = response.body.replace(b": heartbeat\n", b"").partition(b"event: error\ndata: ")[0]
    assert answer.wanted.startswith(got), number
    if response.complete:
        assert got == answer.wanted, number
        assert number in upstream.whole, number
        seen.whole += 1
        seen.bytes += len(got)


# --- all of it ---


def in_groups() -> list[range]:
    """The numbers of all exchanges, of which some share a connection."""
    dice, groups, at = random.Random(SEED), [], SEED
    while at < SEED + EXCHANGES:
        number = dice.choice([1, 1, 1, 2, MAX_PIPELINED, MAX_PIPELINED + 2])
        groups.append(range(at, min(at + number, SEED + EXCHANGES)))
        at += number
    return groups


async def nothing_is_left(proxy: RunningProxy, scripted: ScriptedUpstream, tasks: int, descriptors: int) -> None:
    for name in ("requests_active", "streams_active"):
        assert proxy.sample(name) == 0
    await until(lambda: proxy.sample("upstream_connections", state="active") == 0)
    await scripted.hang_up()
    await until(lambda: proxy.sample("upstream_connections") == 0)
    await until(proxy.worker.proxy.server.empty.is_set)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert proxy.worker.proxy.admission.empty
    assert not proxy.worker.proxy.server.slots.open
    assert not proxy.worker.proxy.server.hangups._watched


@pytest.mark.timeout(60 + EXCHANGES // 10)
async def test_nothing_false_is_told_and_nothing_is_left(
    start: StartProxy, play: PlayScript, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    upstream, seen = Upstream(), Seen()
    wrong: list[BaseException] = []

    async def answer(api: Peer) -> None:
        try:
            await upstream(api)
        except AssertionError as error:
            wrong.append(error)

    scripted = await play(answer)
    proxy = await start(
        scripted.url,
        route={"usage": config.UsageOptions(request=True), "heartbeat": 0.01},
        timeouts={"head": 0.5, "first_token": 1.0, "idle": 1.0, "body": 1.0, "write": 1.0},
    )
    await ask(proxy, upstream, seen, range(SEED - 1, SEED))
    await proxy.idle()
    gc.collect()
    tasks, descriptors = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
    slots = asyncio.Semaphore(AT_ONCE)

    async def limited(numbers: range) -> None:
        async with slots:
            await ask(proxy, upstream, seen, numbers)

    async with asyncio.TaskGroup() as group:
        for numbers in in_groups():
            group.create_task(limited(numbers))
    outcomes = await proxy.ended()
    assert wrong == []
    await nothing_is_left(proxy, scripted, tasks, descriptors)
    assert [record.getMessage() for record in caplog.records] == []
    # What /metrics says is what happened.
    assert "proxy_error" not in outcomes
    assert sum(seen.statuses.values()) <= sum(outcomes.values()) <= seen.begun
    for status, number in seen.statuses.items():
        assert number <= proxy.sample("requests_total", code=str(status)), status
    assert EXCHANGES / 10 < seen.whole <= outcomes["completed"]
    assert seen.bytes <= proxy.sample("response_bytes_total")
    assert 0 < proxy.sample("tokens_total", type="output") <= upstream.usage_sent
    assert upstream.killed > EXCHANGES / 200
    refused = ("bad_request", "body_too_large")
    assert outcomes["rejected"] == proxy.sample("requests_rejected_total")
    assert outcomes["rejected"] == sum(proxy.sample("requests_rejected_total", reason=reason) for reason in refused)
