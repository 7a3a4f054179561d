"""How much a client uses: limits hold over workers, whatever ends how, and charges are what the upstream reports."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sseproxy import config
from sseproxy.config.values import Rate
from sseproxy.errors import ConfigError
from sseproxy.relay.clients import unreported
from sseproxy.relay.exchange import Exchange
from sseproxy.wire.credentials import digest
from sseproxy.wire.demand import Demand
from sseproxy.wire.extract import WHOLE
from sseproxy.wire.meaning import Usage
from sseproxy.wire.request import RequestReader

from .conftest import PlayScript, StartProxy
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    chunk,
    delta,
    until,
    usage,
    valid,
)
from .served import ConfigFile, Served
from .splits import splits, steps
from .test_clients import ANSWER, FILE, KEY, ONE, OTHER, bearer, client, reaches, refused, request

CHAT = {"usage": config.UsageOptions(request=True)}
STREAM = b'{"model":"m","stream":true,"stream_options":{"include_usage":true},"max_tokens":10,"messages":[]}'
TEXT = -(-len(STREAM) // 4)


def limits(**limits: Any) -> config.ClientLimits:
    return valid(config.ClientLimits, limits)


class Charged:
    """What is counted of a client in the ledger."""

    def __init__(self, proxy: RunningProxy, name: str = "team-a", seconds: int = 60) -> None:
        row = proxy.row
        self.active = row.count(f"client {name}") if f"client {name}" in row._columns else None
        self.reserved = row.count(f"reserved {name}")
        self.used = row.window(f"tokens {name}", seconds)

    @property
    def tokens(self) -> int:
        even, odd = self.used.columns
        use = self.used.use(even.all(), odd.all(), perf_counter())
        return use.present + use.last


async def asked(
    proxy: RunningProxy, upstream: ScriptedUpstream, body: bytes = STREAM, **more: Any
) -> tuple[Peer, Peer]:
    peer = await proxy.connect()
    peer.send(request(bearer(), body=body, **more))
    api = await upstream.accept()
    await api.message()
    return peer, api


async def test_requests_are_limited_within_a_time_and_a_limited_client_is_told_so(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, clients=(client(limits=limits(requests="2/1d")), client("b", OTHER)))
    upstreams = b"x-ratelimit-remaining-requests: 999\r\nAnthropic-RateLimit-Tokens-Limit: 5\r\n"
    remaining = []
    for _ in range(2):
        peer, api = await asked(proxy, upstream)
        api.send(ANSWER.replace(b"\r\n", b"\r\n" + upstreams, 1))
        answer = await peer.message()
        remaining.append(answer.all("x-ratelimit-remaining-requests"))
        assert answer.get("anthropic-ratelimit-tokens-limit") is None
        assert answer.get("x-ratelimit-limit-requests") == "2"
        api.close()
    assert remaining == [["1"], ["0"]]
    answer = await refused(proxy, request(bearer()))
    assert answer.status == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert answer.json()["error"]["type"] == "requests"
    assert re.match(
        r"This key has reached its limit of 2 requests per day; try again in [\d.e+]+ seconds\.",
        answer.json()["error"]["message"],
    )
    seconds, milliseconds = int(answer.get("retry-after") or 0), int(answer.get("retry-after-ms") or 0)
    assert 0 < milliseconds <= 2 * 86_400_000
    assert seconds == -(-milliseconds // 1000)
    assert answer.get("x-ratelimit-remaining-requests") == "0"
    assert re.fullmatch(r"\d+ms", answer.get("x-ratelimit-reset-requests") or "")
    # Nobody else is limited, nor loses what the upstream says.
    peer = await proxy.connect()
    peer.send(request(bearer(OTHER)))
    api = await upstream.accept()
    await api.message()
    api.send(ANSWER.replace(b"\r\n", b"\r\n" + upstreams, 1))
    assert (await peer.message()).get("x-ratelimit-remaining-requests") == "999"
    await proxy.idle()
    assert proxy.sample("client_limited_total", client="team-a", limit="requests") == 1
    assert proxy.sample("client_requests_total", client="team-a") == 3


async def test_anthropics_clients_are_told_in_anthropics_words(start: StartProxy, upstream: ScriptedUpstream) -> None:
    route = {"dialect": "messages"}
    proxy = await start(upstream.url, route=route, clients=(client(limits=limits(requests="1/1m", tokens="5000/1m")),))
    body = b'{"model":"m","max_tokens":100,"messages":[]}'
    peer, api = await asked(proxy, upstream, body, path="/v1/messages")
    api.send(ANSWER)
    told = await peer.message()
    assert told.get("anthropic-ratelimit-requests-limit") == "1"
    assert told.get("anthropic-ratelimit-requests-remaining") == "0"
    assert told.get("anthropic-ratelimit-tokens-remaining") == str(5000 - 100 - -(-len(body) // 4))
    assert datetime.fromisoformat(told.get("anthropic-ratelimit-tokens-reset") or "").tzinfo is not None
    assert told.get("x-ratelimit-limit-requests") is None
    answer = await refused(proxy, request(bearer(), path="/v1/messages"))
    assert (answer.status, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert answer.get("anthropic-ratelimit-requests-remaining") == "0"
    assert 0 < int(answer.get("retry-after") or 0) <= 120


async def test_active_requests_are_limited_and_places_come_back_at_once(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, clients=(client(limits=limits(active_requests=1)),))
    peer, api = await asked(proxy, upstream)
    answer = await refused(proxy, request(bearer()))
    assert (answer.status, answer.get("retry-after"), answer.get("retry-after-ms")) == (429, "1", "1000")
    assert answer.json()["error"]["type"] == "active_requests"
    peer.reset()
    await api.gone()
    await proxy.idle()
    await reaches(proxy, upstream, request(bearer()))


async def test_tokens_are_reserved_before_and_charged_after(start: StartProxy, upstream: ScriptedUpstream) -> None:
    most = TEXT + 10 + 4
    proxy = await start(upstream.url, route=CHAT, clients=(client(limits=limits(tokens=f"{most}/1d")),))
    charged = Charged(proxy, seconds=86_400)
    peer, api = await asked(proxy, upstream)
    assert (charged.reserved.total(), charged.tokens) == (TEXT + 10, 0)
    answer = await refused(proxy, request(bearer(), body=STREAM))
    assert (answer.status, answer.json()["error"]["type"]) == (429, "tokens")
    assert answer.get("x-ratelimit-remaining-tokens") == "4"
    api.send(STREAM_HEAD, chunk(delta("a")), chunk(usage(3, 2)), chunk(DONE), LAST_CHUNK)
    assert (await peer.message()).get("x-ratelimit-remaining-tokens") == "4"
    await proxy.idle()
    assert (charged.reserved.total(), charged.tokens) == (0, 5)
    assert proxy.sample("client_tokens_total", client="team-a", type="input") == 3
    assert proxy.sample("client_tokens_total", client="team-a", type="output") == 2
    assert proxy.sample("client_tokens_total", client="team-a", type="estimated") == 0
    answer = await refused(proxy, request(bearer(), body=STREAM))
    assert answer.get("x-ratelimit-remaining-tokens") == str(most - 5)
    assert proxy.sample("client_limited_total", client="team-a", limit="tokens") == 2


@pytest.mark.parametrize("path", ["chat%2Fcompletions", "chat/completions/", "chat//completions", "Chat/Completions"])
async def test_no_spelling_of_a_path_is_free_of_charge(
    start: StartProxy, upstream: ScriptedUpstream, path: str
) -> None:
    proxy = await start(upstream.url, route=CHAT, clients=(client(limits=limits(tokens="100000/1d")),))
    charged = Charged(proxy, seconds=86_400)
    peer, api = await asked(proxy, upstream, path=f"/v1/{path}")
    assert charged.reserved.total() == TEXT + 10
    api.send(STREAM_HEAD, chunk(delta("a")), chunk(delta("b")))
    await peer.read_until(chunk(delta("b")))
    peer.reset()
    await api.gone()
    await proxy.idle()
    assert (charged.reserved.total(), charged.tokens) == (0, TEXT + 2)


async def test_a_request_that_needs_more_than_the_limit_is_let_in_alone(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, route=CHAT, clients=(client(limits=limits(tokens="100/1d")),))
    charged = Charged(proxy, seconds=86_400)
    peer, api = await asked(proxy, upstream, b'{"model":"m","max_tokens":9999999}')
    assert charged.reserved.total() == 100
    assert (await refused(proxy, request(bearer()))).status == 429
    api.send(ANSWER)
    await peer.message()
    await proxy.idle()
    assert charged.reserved.total() == 0


@pytest.mark.parametrize(
    ("path", "method"), [("/v1/models", "GET"), ("/v1/responses/resp_1", "GET"), ("/v1/files", "POST")]
)
async def test_what_generates_nothing_costs_nothing(
    start: StartProxy, upstream: ScriptedUpstream, path: str, method: str
) -> None:
    proxy = await start(upstream.url, route=CHAT, clients=(client(limits=limits(tokens="1/1d")),))
    for _ in range(2):
        await reaches(proxy, upstream, request(bearer(), path=path, method=method, body=b"x" * 50, kind=None))
    await proxy.idle()
    charged = Charged(proxy, seconds=86_400)
    assert charged.tokens == charged.reserved.total() == 0


async def test_a_fetched_stream_is_charged_also_if_the_client_leaves_before_its_usage(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, route=CHAT, clients=(client(limits=limits(tokens="1000/1d")),))
    charged = Charged(proxy, seconds=86_400)
    path, deltas = "/v1/responses/resp_1?stream=true", [chunk(response_delta(text)) for text in "abc"]
    answer = {"id": "resp_1", "background": True, "usage": {"input_tokens": 5, "output_tokens": 3}}
    end = chunk(b"data: %b\n\n" % msgspec.json.encode({"type": "response.completed", "response": answer}))
    for expected, leaves in ((3, True), (3 + 8, False), (3 + 8, False)):
        peer = await proxy.connect()
        peer.send(request(bearer(), path=path, method="GET", body=b"", kind=None))
        api = await upstream.accept()
        await api.message()
        api.send(STREAM_HEAD, *deltas)
        await peer.read_until(deltas[-1])
        if leaves:
            peer.reset()
            await api.gone()
        else:
            api.send(end, LAST_CHUNK)
            assert (await peer.message()).complete
            api.close()
        await proxy.idle()
        assert (charged.tokens, charged.reserved.total()) == (expected, 0)
    assert proxy.sample("client_tokens_total", client="team-a", type="estimated") == 3


def response_delta(text: str) -> bytes:
    event = {"type": "response.output_text.delta", "delta": text}
    return b"data: %b\n\n" % msgspec.json.encode(event)


async def test_what_generates_nothing_and_reports_tokens_is_refused_when_none_are_left(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, route=CHAT, clients=(client(limits=limits(tokens="5/1d")),))
    charged = Charged(proxy, seconds=86_400)
    peer, api = await asked(proxy, upstream, path="/v1/embeddings")
    answer = msgspec.json.encode({"data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}})
    api.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer), answer)
    assert (await peer.message()).status == 200
    api.close()
    await proxy.idle()
    assert (charged.tokens, charged.reserved.total()) == (7, 0)
    refusal = await refused(proxy, request(bearer(), path="/v1/embeddings"))
    assert (refusal.status, refusal.json()["error"]["type"]) == (429, "tokens")
    await reaches(proxy, upstream, request(bearer(), path="/v1/models", method="GET", body=b"", kind=None))
    await reaches(
        proxy, upstream, request(bearer(), path="/v1/files", body=b"x", kind="multipart/form-data; boundary=b")
    )


async def test_an_upload_of_a_limited_client_is_forwarded_as_it_comes(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, route=CHAT, clients=(client(limits=limits(tokens="5/1d")),))
    peer = await proxy.connect()
    sent = request(bearer(), path="/v1/files", body=b"x" * 50, kind=None)
    peer.send(sent[:-1])
    api = await upstream.accept()
    await api.read_until(b"x" * 49)
    peer.send(sent[-1:])
    api.send(ANSWER)
    assert (await peer.message()).status == 200


async def ends(start: StartProxy, upstream: ScriptedUpstream, how: str) -> tuple[RunningProxy, Charged]:
    """A proxy after an exchange that ended in this way."""
    timeouts = {"head": 0.05} if how == "timeout" else {}
    url = "http://127.0.0.1:1" if how == "nobody" else upstream.url
    client_limits = limits(tokens="100000/1d", active_requests=5)
    proxy = await start(url, route=CHAT, timeouts=timeouts, clients=(client(limits=client_limits),))
    if how == "nobody":
        assert (await refused(proxy, request(bearer(), body=STREAM))).status == 502
    else:
        peer, api = await asked(proxy, upstream)
        three = [chunk(delta(text)) for text in "abc"]
        if how == "left before a head":
            peer.reset()
            await api.gone()
        elif how == "timeout":
            assert (await peer.message()).status == 504
        elif how == "refused":
            api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}")
            await peer.message()
        elif how == "silent":
            api.send(STREAM_HEAD, *three, chunk(DONE), LAST_CHUNK)
            await peer.message()
        elif how == "zero":
            api.send(STREAM_HEAD, *three, chunk(usage(0, 0)), chunk(DONE), LAST_CHUNK)
            await peer.message()
        elif how == "JSON without usage":
            api.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 24\r\n\r\n"
                + b'{"choices":[{"text":""}]}'[:24]
            )
            await peer.message()
        else:
            api.send(STREAM_HEAD, *three)
            await peer.read_until(three[-1])
            if how == "left in mid-stream":
                peer.reset()
                await api.gone()
            else:
                api.reset()
                await peer.rest()
    await proxy.idle()
    return proxy, Charged(proxy, seconds=86_400)


@pytest.mark.parametrize(
    ("how", "tokens"),
    [
        ("nobody", 0),
        ("refused", 0),
        ("left before a head", TEXT),
        ("timeout", TEXT),
        ("silent", TEXT + 3),
        ("zero", TEXT + 3),
        ("left in mid-stream", TEXT + 3),
        ("cut", TEXT + 3),
        ("JSON without usage", TEXT + 6),
    ],
)
async def test_what_nobody_reports_is_charged_as_it_was_seen_and_called_an_estimate(
    start: StartProxy, upstream: ScriptedUpstream, how: str, tokens: int
) -> None:
    proxy, charged = await ends(start, upstream, how)
    assert charged.active is not None
    assert (charged.tokens, charged.reserved.total(), charged.active.total()) == (tokens, 0, 0)
    assert proxy.sample("client_tokens_total", type="estimated") == tokens
    assert proxy.sample("tokens_total") == 0


@pytest.mark.parametrize(
    ("told", "events", "tokens"),
    [
        (None, 4, 7 + 4),
        (Usage(), 4, 7 + 4),
        (Usage(input=0, output=0), 4, 7 + 4),
        (Usage(input=5), 4, 4),
        (Usage(output=5), 4, 7),
        (Usage(input=5, output=6), 4, 0),
        (Usage(seconds=3.0), 0, 0),
    ],
)
def test_only_what_was_not_reported_is_estimated(told: Usage | None, events: int, tokens: int) -> None:
    exchange = Exchange("", "", None, "", 0.0)  # type: ignore[arg-type]
    exchange.request_bytes, exchange.head_at, exchange.status, exchange.is_stream = 1, 1.0, 200, True
    exchange.usage, exchange.events = told, events
    assert unreported(exchange, 7, 1000) == tokens
    exchange.repeats = True
    assert unreported(exchange, 7, 1000) == 0


# --- what a request may need ---

BASE64 = "iVBORw0KGgo" * 400


def new_demand() -> Demand:
    reader = RequestReader()
    return Demand(reader, reader.feed)


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8, "max_tokens": 7, "n": 3}, 24),
        ({"max_output_tokens": 9}, 9),
        ({"generationConfig": {"maxOutputTokens": 5, "candidateCount": 2}}, 10),
        ({"generation_config": {"max_output_tokens": 5, "candidateCount": 2}}, 10),
        ({"generationConfig": {"maxOutputTokens": 5}, "generation_config": {"candidate_count": 3}}, 15),
        ({"best_of": 4, "n": 2, "max_tokens": 3}, 12),
        ({"max_tokens": "7", "n": None}, 1000),
        ({"max_tokens": -7, "n": 0.5}, 1000),
        ({"max_tokens": 10**13}, 1000),
        ({"generationConfig": 5}, 1000),
        ([], 1000),
    ],
)
def test_the_output_is_what_the_request_limits_it_to(body: object, output: int) -> None:
    small = msgspec.json.encode(body)
    # Of a large body, only the members that are wanted are kept.
    large = msgspec.json.encode({"messages": ["Hi"] * WHOLE, **body}) if isinstance(body, dict) else small
    for text in (small, large):
        demand = new_demand()
        for piece in steps(text, 1_000):
            demand.feed(piece)
        assert demand.output == output


@given(st.data(), st.text(max_size=300), st.booleans())
def test_text_is_counted_in_any_split_and_base64_is_not(data: st.DataObject, text: str, picture: bool) -> None:
    plain = msgspec.json.encode({"max_tokens": 5, "text": text})
    body = plain[:-1] + (b',"url":"data:image/png;base64,%b"}' % BASE64.encode() if picture else b"}")
    demand = new_demand()
    for piece in data.draw(splits(body)):
        demand.feed(piece)
    assert demand.output == 5
    # Where a read ends within base64, what is left of it in the next one may be too short to be recognised.
    around = len(body) - (len(BASE64) if picture else 0)
    assert -(-around // 4) <= demand.input <= -(-(around + 13 * 400) // 4)


def test_a_body_is_looked_at_in_a_short_time_whatever_is_in_it() -> None:
    from time import perf_counter

    for worst in (b"a" * 199 + b" ", b"a", b'"', b"=", b"a=", b"\\u0041"):
        demand = new_demand()
        begun = perf_counter()
        for _ in range(16):
            demand.feed(worst * (65_536 // len(worst)))
        assert perf_counter() - begun < 1


# --- the configuration ---


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "f", {})
    return caught.value.problems


@pytest.mark.parametrize(
    "rate", ["600", "600/m", "600/2m", "0/1m", "-1/1m", "1.5/1m", "600/1w", "1/1m ", "9999999999999/1m"]
)
def test_a_rate_is_a_number_within_a_time(rate: str) -> None:
    text = FILE + f"  - {{name: a, keys: '{ONE}', limits: {{requests: '{rate}'}}}}"
    (problem,) = problems(text)
    assert "limits.requests: expected a number within a time, such as 600/1m, with 1s, 1m, 1h or 1d, or off" in problem


@pytest.mark.parametrize(
    ("text", "rate"), [("5/1s", (5, 1)), ("600/1m", (600, 60)), ("1/1h", (1, 3600)), ("7/1d", (7, 86_400))]
)
def test_a_rate_is_written_as_it_is_read(text: str, rate: tuple[int, int]) -> None:
    made = config.parse(FILE + f"  - {{name: a, keys: '{ONE}', limits: {{tokens: off, requests: {text}}}}}", "f", {})
    assert made.clients is not None
    assert made.clients[0].limits.requests == Rate(*rate)
    assert f"requests: {text}" in config.resolved(made)
    again = config.parse(config.resolved(made), "f", {})
    assert replace(again, places=()) == replace(made, places=())


@pytest.mark.parametrize(
    ("route", "right"),
    [
        ("", False),
        ("usage: {request: true}", True),
        ("dialect: chat", False),
        ("dialect: completions", False),
        ("dialect: messages", True),
        ("open: true", True),
    ],
)
@pytest.mark.parametrize("used", ["", "routes: [api]", "routes: [other]"])
def test_a_limit_of_tokens_needs_the_usage_of_streams(route: str, right: bool, used: str) -> None:
    text = (
        'upstreams: [{name: up, url: "http://h"}]\nroutes:\n'
        f"  - {{name: api, match: {{path: /v1}}, upstream: up, {route}}}\n"
        "  - {name: other, match: {path: /v2}, upstream: up, usage: {request: true}}\n"
        f"clients: [{{name: a, keys: '{ONE}', limits: {{tokens: 5/1m}}, {used}}}]\n"
    )
    if right or "other" in used:
        assert config.parse(text, "f", {}).clients
    else:
        assert problems(text) == (
            "f:3:6: routes[0].name: expected usage: {request: true}, because client a has a limit of tokens",
        )


# --- nothing leaks ---


class Tired:
    """An upstream that answers with usage, and cuts its answer as often as not. It knows what it has reported."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    async def __call__(self, api: Peer) -> None:
        while True:
            await api.message()
            events = [chunk(delta(f"{n}")) for n in range(self.dice.randrange(4))]
            whole = b"".join([STREAM_HEAD, *events, chunk(usage(4, len(events))), chunk(DONE), LAST_CHUNK])
            end = self.dice.choice([len(whole), self.dice.randrange(len(whole))])
            api.send(whole[:end])
            if end < len(whole):
                self.dice.choice([Peer.close, Peer.reset])(api)
                raise ConnectionResetError


async def test_nothing_of_a_limit_leaks_however_thousands_of_exchanges_end(start: StartProxy, play: PlayScript) -> None:
    dice = random.Random(27)
    upstream = await play(Tired(dice))
    most = limits(active_requests=3, tokens="20000/1s", requests="5000/1s")
    proxy = await start(upstream.url, route=CHAT, clients=(client(limits=most),))
    slots = asyncio.Semaphore(30)

    async def one() -> None:
        async with slots:
            peer = Peer(*await asyncio.open_connection("127.0.0.1", proxy.port))
            try:
                sent = request(bearer(), "Connection: close", body=STREAM)
                stops = dice.random() < 0.1
                peer.send(sent[: dice.randrange(len(sent))] if stops else sent)
                patience = 0 if stops else dice.choice([0, dice.randrange(1500), 10_000])
                received = 0
                while received < patience and (part := await peer.reader.read(200)):
                    received += len(part)
                dice.choice([Peer.close, Peer.reset])(peer)
            except ConnectionError:
                pass
            finally:
                peer.writer.transport.abort()

    async with asyncio.TaskGroup() as group:
        for _ in range(2000):
            group.create_task(one())
    await proxy.idle()
    charged = Charged(proxy, seconds=1)
    assert charged.active is not None
    assert (charged.active.total(), charged.reserved.total()) == (0, 0)
    assert proxy.sample("client_requests_active") == 0
    assert proxy.sample("client_limited_total", limit="active_requests") > 0
    assert proxy.sample("client_requests_total") == sum(proxy.outcomes().values()) > 0
    # When all is forgotten, all is allowed again.
    await until(lambda: charged.tokens == 0)


# --- all workers together ---

EXCHANGES = int(os.environ.get("EXCHANGES", "1000"))
SEED = int(os.environ.get("SEED", "1"))
MOST = 10**11


class Model:
    """Answers requests that tell it how, and adds up what it has reported. Those that hang wait for `go`."""

    def __init__(self) -> None:
        self.reported = 0
        self.hanging = 0
        self.go = asyncio.Event()

    async def __call__(self, api: Peer) -> None:
        while True:
            asked = await api.message()
            if asked.start_line.startswith("GET "):
                api.send(ANSWER)
                continue
            body = asked.json()
            do, deltas, prompt = body["do"], body["deltas"], body["prompt"]
            if do == "hang":
                self.hanging += 1
                await self.go.wait()
            pieces = [chunk(delta(f"{n}")) for n in range(deltas)]
            if do == "leave":
                # It never tells its usage: the client leaves after the last delta.
                api.send(STREAM_HEAD, *pieces)
                await api.gone()
                return
            if do == "JSON":
                told = {"prompt_tokens": prompt, "completion_tokens": deltas}
                answer = msgspec.json.encode({"choices": [{"message": {"content": "x"}}], "usage": told})
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
                api.send(head, answer)
            else:
                api.send(STREAM_HEAD, *pieces, chunk(usage(prompt, deltas)), chunk(DONE), LAST_CHUNK)


def to_do(do: str, deltas: int, prompt: int) -> bytes:
    body = {"model": "m", "stream": do != "JSON", "do": do, "deltas": deltas, "prompt": prompt}
    return msgspec.json.encode(body)


async def exchange(served: Served, model: Model, body: bytes) -> int:
    """One exchange on a connection of its own. Returns how many tokens it costs."""
    asks: dict[str, Any] = msgspec.json.decode(body)
    peer = Peer(*await asyncio.open_connection("127.0.0.1", served.port))
    try:
        peer.send(request(bearer(), "Connection: close", body=body))
        if asks["do"] == "leave":
            last = asks["deltas"] - 1
            await (peer.read_until(chunk(delta(f"{last}"))) if last >= 0 else peer.head())
            peer.reset()
            return -(-len(body) // 4) + int(asks["deltas"])
        try:
            answer = await peer.message()
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0
        assert (answer.status, answer.complete) == (200, True)
        # Counts that are all 0 tell nothing, so an estimate of the input is charged.
        return int(asks["prompt"] + asks["deltas"]) or -(-len(body) // 4)
    finally:
        peer.writer.transport.abort()


async def used(served: Served) -> int:
    """What is charged, as a client is told it, when nothing is under way."""
    peer = await served.connect()
    peer.send(request(bearer(), path="/v1/models", method="GET", body=b"", kind=None))
    answer = await peer.message()
    peer.close()
    return MOST - int(answer.get("x-ratelimit-remaining-tokens") or -1)


def limited(directory: Path, upstream: ScriptedUpstream, limits: str) -> ConfigFile:
    entry = f"sha256:{digest(KEY.encode()).hex()}"
    return ConfigFile(
        directory,
        upstream,
        workers="4",
        clients=f"[{{name: team-a, keys: '{entry}', limits: {limits}}}]",
        routes="[{name: api, match: {path: /v1}, upstream: up, usage: {request: true}}]",
    )


@pytest.mark.timeout(300)
async def test_what_is_charged_is_what_was_reported_to_the_token_whatever_workers_do(
    play: PlayScript, tmp_path: Path
) -> None:
    dice, model = random.Random(SEED), Model()
    upstream = await play(model)
    file = limited(tmp_path, upstream, f"{{tokens: {MOST}/1d, active_requests: 1000}}")
    charged, rounds, at_once = 0, 10, 25
    async with file.serve() as served:
        await served.until("workers", 4)
        slots = asyncio.Semaphore(at_once)

        async def one(body: bytes) -> int:
            async with slots:
                return await exchange(served, model, body)

        for number in range(rounds):
            kinds = [dice.choice(["stream"] * 5 + ["JSON", "leave"]) for _ in range(EXCHANGES // rounds)]
            bodies = [to_do(do, dice.randrange(6), dice.randrange(10_000)) for do in kinds]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(body)) for body in bodies]
            charged += sum(task.result() for task in tasks)
            # Some are in the middle when a worker dies, or when others take over.
            model.go.clear()
            model.hanging = 0
            loop = asyncio.get_running_loop()
            hanging = [
                loop.create_task(exchange(served, model, to_do("hang", dice.randrange(6), dice.randrange(10_000))))
                for _ in range(12)
            ]
            await until(lambda: model.hanging == 12)
            if number % 2:
                served.process.send_signal(signal.SIGHUP)
                await served.until("config_reloads_total.*success.*", number // 2 + 1)
            else:
                os.kill(dice.choice(served.workers), signal.SIGKILL)
                await served.until("worker_restarts_total", number // 2 + 1)
                await served.until("workers", 4)
            model.go.set()
            charged += sum(await asyncio.gather(*hanging))
            await served.until("client_requests_active.*", 0)
        async with asyncio.timeout(10):
            while await used(served) != charged:  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.05)
        assert await used(served) == charged > 0
        assert "internal error" not in served.stderr


async def test_a_limit_is_that_of_all_workers_and_no_death_and_no_reload_resets_it(
    play: PlayScript, tmp_path: Path
) -> None:
    async def script(api: Peer) -> None:
        while True:
            await api.message()
            api.send(ANSWER)

    async def statuses(served: Served, number: int) -> list[int]:
        async def one() -> int:
            peer = Peer(*await asyncio.open_connection("127.0.0.1", served.port))
            try:
                peer.send(request(bearer(), "Connection: close"))
                return (await peer.message()).status
            finally:
                peer.writer.transport.abort()

        return await asyncio.gather(*(one() for _ in range(number)))

    upstream = await play(script)
    async with limited(tmp_path, upstream, "{requests: 60/1d}").serve() as served:
        await served.until("workers", 4)
        found = await statuses(served, 150)
        # Several workers may take the last place at the same moment.
        assert 60 <= found.count(200) <= 63
        assert set(found) == {200, 429}
        for worker in served.workers:
            os.kill(worker, signal.SIGKILL)
        await served.until("worker_restarts_total", 4)
        await served.until("workers", 4)
        assert await statuses(served, 8) == [429] * 8
        served.process.send_signal(signal.SIGHUP)
        await served.until("config_reloads_total.*success.*", 1)
        assert await statuses(served, 8) == [429] * 8
