"""Three sick endpoints, at random and reproducibly: whatever fails, a client gets one answer, of one endpoint, or none.

The exchanges are spread over fleets with different options. `make faults` runs it for longer: EXCHANGES many, from SEED
on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import re
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import pytest

from sseproxy import config
from sseproxy.config.options import Secret
from sseproxy.config.values import RETRIES, Source
from sseproxy.relay.attempt import Attempt

from .conftest import StartProxy
from .fleet import FAULT, ROLE, fleet, occupied
from .harness import DONE, LAST_CHUNK, STREAM_HEAD, Message, Peer, RunningProxy, chunk, delta, kept_port, until, usage
from .harness import ScriptedUpstream as Server

EXCHANGES = int(os.environ.get("EXCHANGES", "400"))
SEED = int(os.environ.get("SEED", "1"))
# Exchanges of one fleet.
IN_A_FLEET = 80
AT_ONCE = 20
PATIENCE = 0.2
MAX_BODY = 150_000
ASKS = b'"stream_options":{"include_usage":true}'
TOO_LONG = b'{"error":{"message":"This model\'s maximum context length is 10 tokens.","from":"%b"}}'
STATUSES = [500, 502, 503, 504, 429, 529, 401]
# What an endpoint does; as often as not, what it should.
WAYS = [
    *["well"] * 12,
    *["status"] * 8,
    "early status",
    "too long",
    "refuses",
    "closes",
    "resets",
    "hangs",
    "garbage",
    "fault first",
    "fault later",
    "dies first",
    "dies later",
    "stalls first",
    "stalls later",
    "empty",
    "interim",
    "JSON",
]
LEAVES = ["never"] * 8 + ["in its request", "at once", "in a response"]


class Sent(NamedTuple):
    """The request of an exchange."""

    path: bytes
    body: bytes

    @property
    def keeps_state(self) -> bool:
        """Whether it belongs to something that the endpoint keeps, or starts something that goes on by itself."""
        return b"threads" in self.path or b"background" in self.body or b"previous" in self.body


def sent(number: int) -> Sent:
    dice = random.Random(f"sent {number}")
    size = dice.choice([1, 10, 3_000, 3_000, 100_000])
    path = dice.choice([b"/v1/chat/completions"] * 4 + [b"/v1/responses", b"/v1/files", b"/v1/threads/t/runs"])
    extra = dice.choice([b"", b',"background":true', b',"previous_response_id":"r"']) if b"resp" in path else b""
    stream = b"false" if dice.random() < 0.2 else b"true"
    body = b'{"model":"m","stream":%b,"input":["%b"],"user":"u%d"%b}' % (stream, b"x" * size, number % 9, extra)
    return Sent(path, body)


class Given(NamedTuple):
    """What an endpoint has answered in one attempt, without what only sseproxy asked for, and whether it was all."""

    name: bytes
    body: bytes
    whole: bool


class Story:
    """What is known of one exchange."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """The endpoints, in the order in which they were asked."""
        self.excused: Counter[str] = Counter()
        """How often each may have been asked once more."""
        self.given: list[Given] = []
        self.begun = 0
        """Attempts that were begun."""


class Fleet:
    """The options of a fleet, by its number, and what its endpoints have seen."""

    def __init__(self, number: int) -> None:
        self.dice = dice = random.Random(f"fleet {number}")
        self.stories: defaultdict[int, Story] = defaultdict(Story)
        self.wrong: list[str] = []
        on = tuple(dice.sample(RETRIES, dice.randrange(len(RETRIES) + 1)))
        self.retry: dict[str, Any] = {
            "on": dice.choice([on, RETRIES, config.Retry().on]),
            "attempts": dice.choice([1, 2, 3, 5]),
            "until": dice.choice(["head", "first_token", "end"]),
            "wait": dice.choice([0.01, 3.0]),
            "within": dice.choice([0.1, 30.0, 30.0]),
            "max_body": dice.choice([1_000, 1 << 20, 1 << 20]),
            "hold": dice.choice([600, 1 << 20, 1 << 20]),
        }
        self.models = dice.choice([(None,), (None, None), (None, "other")])
        self.key = dice.choice([None, Secret("sk-ours")])
        self.affinity = dice.choice([(), (Source("field", "user"), Source("prefix", "64"))])
        self.route: dict[str, Any] = {
            "heartbeat": dice.choice([None, 0.01]),
            "usage": config.UsageOptions(request=dice.random() < 0.5),
        }
        self.limits = config.Limits(held=dice.choice([MAX_BODY, 64 << 20, 64 << 20]), request_head_time=1.0)
        self.refuses = dice.random() < 0.5
        self.total = dice.choice([None, 0.5])

    @property
    def same(self) -> bool:
        return "same" in self.retry["on"]

    @property
    def whole_or_none(self) -> bool:
        """Whether half an answer must never be seen: nothing is ever too large to be held back."""
        return bool(self.retry["until"] == "end" and self.retry["hold"] > 1_000 and self.limits.held > 1 << 20)

    def options(self, urls: list[str]) -> dict[str, Any]:
        """Those of the proxy in front of `urls`; with a second upstream, it has the last two."""
        split = len(urls) - 2 if len(self.models) > 1 else len(urls)
        ends = [tuple(config.Endpoint(url=url) for url in part) for part in (urls[:split], urls[split:]) if part]
        upstreams = [
            config.Upstream(name=name, urls=urls, affinity=self.affinity, api_key=self.key)
            for name, urls in zip("ab", ends, strict=False)
        ]
        timeouts = dict.fromkeys(("connect", "head", "first_token", "idle"), PATIENCE)
        timeouts |= {"body": 1.0, "write": 1.0} | ({} if self.total is None else {"total": self.total})
        made = fleet(*upstreams, models=self.models, retry=self.retry, timeouts=timeouts, **self.route)
        return made | {"limits": self.limits, "max_body": MAX_BODY}


class Endpoint:
    """Answers a request according to its number."""

    def __init__(self, of: Fleet, name: str) -> None:
        self.of = of
        self.name = name

    async def __call__(self, api: Peer) -> None:
        reused = False
        while True:
            head = await api.head()
            number = int(head.start_line.split()[1].partition("?")[2])
            story = self.of.stories[number]
            story.asked.append(self.name)
            name = f"{number}.{self.name}.{len(story.asked)}"
            dice = random.Random(name)
            way = dice.choice(WAYS)
            if reused and way in ("closes", "resets"):
                # The connection may have been closed before the request came.
                story.excused[self.name] += 1
            if not await self._answer(api, head, number, name.encode(), way, dice):
                (api.reset if dice.random() < 0.5 else api.close)()
                return
            reused = True

    async def _body(self, api: Peer, head: Message, number: int) -> bytes:
        body, complete = await api._body(head)
        if not complete:
            raise ConnectionResetError
        known = sent(number).body
        bare = body.replace(b"," + ASKS, b"").replace(b'"other"', b'"m"')
        if bare != known:
            self.of.wrong.append(f"{number}: the request is not what was sent: {body[:99]!r}")
        return body

    async def _answer(self, api: Peer, head: Message, number: int, name: bytes, way: str, dice: random.Random) -> bool:
        """Whether the connection can be used again."""
        story = self.of.stories[number]
        if way == "early status":
            self._status(api, story, name, dice)
            return False
        if way == "resets" and dice.random() < 0.5:
            return False
        body = await self._body(api, head, number)
        if way in ("closes", "resets"):
            return False
        if way == "hangs":
            await api.gone()
            return False
        if way == "garbage":
            api.send(b"junk\r\n\r\n")
            return False
        if way == "status":
            self._status(api, story, name, dice)
            return True
        if way == "too long":
            self._json(api, story, name, 400, TOO_LONG % name)
            return True
        if way == "refuses" and ASKS in body:
            story.excused[self.name] += 1
            self._json(api, story, name, 400, b'{"error":{"message":"stream_options? %b"}}' % name)
            return True
        if way == "JSON" or b'"stream":true' not in body:
            self._json(api, story, name, 200, b'{"from":"%b","choices":[{"message":{"content":"Hi"}}]}' % name)
            return True
        if way == "interim":
            api.send(b"HTTP/1.1 103 Early Hints\r\nLink: </%b>\r\n\r\n" % name)
        return await self._stream(api, story, name, way, dice, asks=ASKS in body)

    def _status(self, api: Peer, story: Story, name: bytes, dice: random.Random) -> None:
        wait = dice.choice([b""] * 3 + [b"Retry-After-Ms: 1\r\n", b"Retry-After: 30\r\n"])
        self._json(api, story, name, dice.choice(STATUSES), b'{"error":{"message":"%b"}}' % name, wait)

    def _json(self, api: Peer, story: Story, name: bytes, code: int, body: bytes, more: bytes = b"") -> None:
        story.given.append(Given(name, body, whole=True))
        api.send(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nX-Attempt: %b\r\n" % (code, name),
            b"%bContent-Length: %d\r\n\r\n%b" % (more, len(body), body),
        )

    async def _stream(self, api: Peer, story: Story, name: bytes, way: str, dice: random.Random, *, asks: bool) -> bool:
        text = [delta(f"<{name.decode()}>" + "x" * dice.choice([0, 90])) for _ in range(dice.randrange(1, 12))]
        events = {
            "fault first": [ROLE, FAULT],
            "fault later": [ROLE, *text, FAULT],
            "dies first": [ROLE],
            "dies later": [ROLE, *text],
            "stalls first": [ROLE],
            "stalls later": [ROLE, *text],
            "empty": [ROLE, DONE],
        }.get(way, [ROLE, *text, DONE])
        stays = not way.startswith(("dies", "stalls"))
        story.given.append(Given(name, b"".join(events), stays))
        if asks and stays:
            events.insert(-1, usage(1, len(text)))
        data = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nX-Attempt: %b\r\n\r\n" % name) + b"".join(map(chunk, events))
        await send_in_pieces(api, dice, data + (LAST_CHUNK if stays else b""))
        if way.startswith("stalls"):
            await api.gone()
        return stays


async def send_in_pieces(peer: Peer, dice: random.Random, data: bytes) -> None:
    """Dribbles, pauses and bursts."""
    while data:
        size = dice.choice([40, 3000, 100_000])
        peer.send(data[:size])
        data = data[size:]
        for _ in range(dice.choice([0, 0, 1, 30])):
            await asyncio.sleep(0)


# --- the clients ---


class Seen:
    """What clients have got."""

    def __init__(self) -> None:
        self.begun = 0
        self.answers: Counter[str] = Counter()
        """Responses, by whose they are."""
        self.tried_again = 0
        """Whole answers that were not the first attempt's."""


async def ask(proxy: RunningProxy, of: Fleet, seen: Seen, numbers: range) -> None:
    """The exchanges of `numbers`, one after the other on one connection."""
    dice = random.Random(f"client {numbers[0]}")
    client = await proxy.connect()
    try:
        for number in numbers:
            request, leaves = sent(number), dice.choice(LEAVES)
            head = b"POST %b?%d HTTP/1.1\r\nHost: p\r\nContent-Type: application/json\r\n" % (request.path, number)
            if dice.random() < 0.5:
                data = head + b"Content-Length: %d\r\n\r\n%b" % (len(request.body), request.body)
            else:
                half = len(request.body) // 2
                data = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(request.body[:half])
                data += chunk(request.body[half:]) + LAST_CHUNK
            seen.begun += 1
            if leaves == "in its request":
                await send_in_pieces(client, dice, data[: dice.randrange(len(data))])
                return
            await send_in_pieces(client, dice, data)
            if leaves == "at once":
                return
            if leaves == "in a response":
                await client.reader.read(dice.randrange(1, 400))
                return
            response = await client.message()
            check(response, number, of, seen)
            if not response.complete or response.get("connection") == "close":
                return
            # There is one answer to a request.
            assert not client.reader._buffer, number  # type: ignore[attr-defined]
    except (ConnectionError, asyncio.IncompleteReadError):
        return
    finally:
        dice.choice([client.close, client.reset, client.writer.transport.abort])()
        proxy.peers.remove(client)


def check(response: Message, number: int, of: Fleet, seen: Seen) -> None:
    """A response is the last attempt's, and only its; and it is never whole if that was not."""
    story = of.stories[number]
    text = response.body.replace(b": heartbeat\n\n", b"").replace(b": heartbeat\n", b"")
    body, _, ours = text.partition(b"event: error\ndata: ")
    names = {name.encode() for name in response.all("x-attempt")} | set(re.findall(rb"<(\d+\.\d\.\d+)>", body))
    assert len(names) <= 1, (number, names)
    if not names:
        # Our own error, or the beginning of a stream of which nothing was generated.
        seen.answers["ours"] += 1
        assert response.status >= 400 or ours or body.startswith(b"data: ") or not response.complete, (number, body)
        return
    (name,) = names
    assert name.startswith(b"%d." % number), (number, name)
    # Nobody was asked after the one whose answer it is.
    assert int(name.rpartition(b".")[2]) == len(story.asked), (number, name, story.asked)
    (given,) = (one for one in story.given if one.name == name)
    assert given.body.startswith(body), (number, body, given.body)
    if response.complete and not ours:
        assert body == given.body, number
        assert given.whole, number
        seen.tried_again += len(story.asked) > 1 and response.status == 200
    if of.whole_or_none and response.status == 200 and b"</v1/" not in body:
        stream = sent(number).path in (b"/v1/chat/completions",)
        # An error without content before it is the upstream's own, and a whole answer.
        halves = FAULT in body and re.search(rb"<\d", body)
        assert not stream or (body == given.body and given.whole and not halves), (number, body)
    seen.answers["theirs"] += 1


# --- all of it ---


def watch_attempts(of: dict[int, Fleet], patch: pytest.MonkeyPatch) -> list[str]:
    """Looks at each attempt when it begins. Returns what is wrong, which is filled meanwhile."""
    begins, wrong = Attempt.__init__, list[str]()

    def look(self: Attempt, *args: Any, **more: Any) -> None:
        relay = args[4].__self__
        number = int(relay._request.target.partition("?")[2])
        if relay._pump is not None:
            wrong.append(f"{number}: an attempt begins after the commit")
        if relay._downstream.gone_at is not None:
            wrong.append(f"{number}: an attempt begins after the client has left")
        of[number].stories[number].begun += 1
        begins(self, *args, **more)

    patch.setattr(Attempt, "__init__", look)
    return wrong


async def come_and_go(proxy: RunningProxy, dice: random.Random) -> None:
    """Ejects endpoints and takes them back, as the supervisor does."""
    for serial in range(1, 1 << 40):
        standings = [end.standing for one in proxy.worker.proxy.upstreams.values() for end in one.endpoints]
        standing = dice.choice([standing for standing in standings if standing is not None])
        if dice.random() < 0.5:
            standing.admit(0)
        else:
            standing.eject(serial, dice.choice([None, 0]))
        for _ in range(dice.randrange(1, 200)):
            await asyncio.sleep(0)


def check_story(number: int, story: Story, of: Fleet) -> None:
    """How often whom was asked."""
    for name, times in Counter(story.asked).items():
        assert times <= 1 + of.same + story.excused[name], (number, story.asked, story.excused)
    assert story.begun <= of.retry["attempts"] * len(of.models) + story.excused.total(), (number, story.begun)
    assert len(story.asked) <= story.begun
    if sent(number).keeps_state:
        # What could not be connected to was not asked.
        assert len(story.asked) <= 1 + story.excused.total(), (number, story.asked)


async def nothing_is_left(proxy: RunningProxy, servers: list[Server], tasks: int, descriptors: int) -> None:
    await proxy.idle()
    assert occupied(proxy) == 0
    for name in ("requests_active", "streams_active", "endpoint_requests_active"):
        assert proxy.sample(name) == 0, name
    await until(lambda: proxy.sample("upstream_connections", state="active") == 0)
    for server in servers:
        await server.hang_up()
    await until(lambda: proxy.sample("upstream_connections") == 0)
    await until(proxy.worker.proxy.server.empty.is_set)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert proxy.worker.proxy.admission.empty
    assert not proxy.worker.proxy.server.slots.open


@pytest.mark.timeout(60 + EXCHANGES // 10)
async def test_a_client_gets_one_answer_of_one_endpoint_or_none(
    start: StartProxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    fleets: dict[int, Fleet] = {}
    wrong, seen, outcomes = watch_attempts(fleets, monkeypatch), Seen(), Counter[str]()
    retries = 0.0
    for first in range(SEED, SEED + EXCHANGES, IN_A_FLEET):
        of = Fleet(first)
        numbers = range(first, min(first + IN_A_FLEET, SEED + EXCHANGES))
        fleets |= dict.fromkeys(numbers, of)
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(Server(Endpoint(of, str(name)))) for name in range(3)]
            urls = [server.url + "/v1" for server in servers]
            if of.refuses:
                urls.insert(of.dice.randrange(3), f"http://127.0.0.1:{stack.enter_context(kept_port())}/v1")
            proxy = await start("http://unused", **of.options(urls))
            gc.collect()
            tasks, descriptors = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
            ejecting = asyncio.get_running_loop().create_task(come_and_go(proxy, of.dice))
            slots, begun = asyncio.Semaphore(AT_ONCE), seen.begun

            async def limited(some: range, proxy: RunningProxy = proxy, of: Fleet = of, slots: Any = slots) -> None:
                async with slots:
                    await ask(proxy, of, seen, some)

            async with asyncio.TaskGroup() as group:
                at = first
                while at <= numbers[-1]:
                    size = of.dice.randrange(1, 4)
                    group.create_task(limited(range(at, min(at + size, numbers[-1] + 1))))
                    at += size
            ended = await proxy.ended()
            ejecting.cancel()
            await asyncio.wait([ejecting])
            await nothing_is_left(proxy, servers, tasks, descriptors)
            # What /metrics says is what happened.
            assert sum(ended.values()) <= seen.begun - begun
            attempts = proxy.sample("attempts_total")
            assert attempts <= sum(of.stories[number].begun for number in numbers)
            several = sum(of.stories[number].begun > 0 for number in numbers)
            assert attempts - several <= proxy.sample("retries_total")
            retries += proxy.sample("retries_total")
            outcomes.update(ended)
        for number in numbers:
            check_story(number, of.stories[number], of)
        assert of.wrong == []
    assert wrong == []
    assert [record.getMessage() for record in caplog.records] == []
    assert "proxy_error" not in outcomes
    assert outcomes["completed"] > EXCHANGES / 4
    assert seen.answers["theirs"] > EXCHANGES / 4
    assert seen.tried_again > EXCHANGES / 50
    assert retries > EXCHANGES / 20
