"""What an exchange says of itself, as it is on `/metrics`: times and tokens, while it runs and at its end."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import signal
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st

from sseproxy import config
from sseproxy.errors import Outcome, RequestError
from sseproxy.observe import metrics
from sseproxy.observe.metrics import Report
from sseproxy.observe.registry import of_process
from sseproxy.observe.telemetry import Telemetry
from sseproxy.process.admin import takes_gzip
from sseproxy.relay.exchange import Exchange
from sseproxy.wire.meaning import DELTA, NOTHING, REASONING, Meaning, Usage

from .conftest import StartProxy
from .harness import (
    DEADLINE,
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
from .served import ConfigFile


def counts(**usage: object) -> bytes:
    return b"data: " + msgspec.json.encode({"choices": [], "usage": usage}) + b"\n\n"


def message(kind: str, **more: object) -> bytes:
    """An event of Anthropic's Messages."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind} | more))


async def streamed(proxy: RunningProxy, upstream: ScriptedUpstream, *streams: list[bytes]) -> None:
    """Streams of events, one after the other; each event is read by itself."""
    client, api = await begin(proxy, upstream)
    for number, events in enumerate(streams):
        if number:
            client.send(post())
            await api.message()
        api.send(STREAM_HEAD)
        for event in events:
            api.send(chunk(event))
            await client.read_until(event)
        api.send(LAST_CHUNK)
        await client.read_until(LAST_CHUNK)
    await proxy.idle()


def gaps(proxy: RunningProxy) -> float:
    """From the first to the last delta of the only stream, in seconds."""
    return proxy.sample("inter_token_latency_seconds_sum")


async def test_time_per_token_is_that_of_the_tokens_that_were_streamed(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    hidden = counts(prompt_tokens=9, completion_tokens=5011, completion_tokens_details={"reasoning_tokens": 5000})
    await streamed(proxy, upstream, [*(delta(str(number)) for number in range(11)), hidden, DONE])
    assert proxy.sample("time_per_output_token_seconds_count") == 1
    assert proxy.sample("time_per_output_token_seconds_sum") == pytest.approx(gaps(proxy) / 10)


async def test_reasoning_that_was_streamed_is_among_the_tokens_that_were(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    thoughts = [b'data: {"choices":[{"delta":{"reasoning_content":"%d"}}]}\n\n' % number for number in range(5)]
    told = counts(prompt_tokens=9, completion_tokens=8, completion_tokens_details={"reasoning_tokens": 5})
    await streamed(proxy, upstream, [*thoughts, *(delta(str(number)) for number in range(3)), told, DONE])
    assert proxy.sample("time_per_output_token_seconds_count") == 1
    assert proxy.sample("time_per_output_token_seconds_sum") == pytest.approx(gaps(proxy) / 7)


@pytest.mark.parametrize(
    "events",
    [
        [delta("all of it"), usage(9, 40), DONE],
        [delta("a"), delta("b"), DONE],
        [delta("a"), delta("b"), usage(9, 1), DONE],
        [
            delta("a"),
            delta("b"),
            counts(prompt_tokens=9, completion_tokens=50, completion_tokens_details={"reasoning_tokens": 50}),
            DONE,
        ],
        [usage(9, 40), DONE],
    ],
    ids=["one delta", "no counts", "one token", "all of it hidden", "no delta"],
)
async def test_without_two_deltas_and_two_tokens_there_is_no_time_per_token(
    proxy: RunningProxy, upstream: ScriptedUpstream, events: list[bytes]
) -> None:
    await streamed(proxy, upstream, events)
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("time_per_output_token_seconds_count") == 0


@pytest.mark.parametrize("who", ["client", "upstream"])
async def test_a_stream_that_is_interrupted_has_no_time_per_token(
    proxy: RunningProxy, upstream: ScriptedUpstream, who: str
) -> None:
    client, api = await begin(proxy, upstream, post(path="/v1/messages"))
    start = message("message_start", message={"usage": {"input_tokens": 15, "output_tokens": 3}})
    text = [message("content_block_delta", delta={"type": "text_delta", "text": word}) for word in ("a", "b", "c")]
    api.send(STREAM_HEAD, *map(chunk, (start, *text)))
    await client.read_until(text[-1])
    (client if who == "client" else api).reset()
    await proxy.ended()
    assert proxy.sample("time_to_first_token_seconds_count") == 1
    assert proxy.sample("tokens_total", type="input") == 15
    assert proxy.sample("tokens_total", type="output") == 0
    assert proxy.sample("time_per_output_token_seconds_count") == 0
    assert proxy.sample("tokens_per_request_count") == 0


async def test_output_that_is_counted_as_it_comes_counts_as_far_as_it_came(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, *(chunk(part) for n in range(1, 4) for part in (delta(str(n)), usage(9, n))))
    await client.read_until(usage(9, 3))
    client.reset()
    assert await proxy.ended() == {"client_gone_mid_stream": 1}
    assert proxy.sample("tokens_total", type="output") == 3
    assert proxy.sample("time_per_output_token_seconds_count") == 0


EVENTS = st.lists(
    st.sampled_from(
        [
            DELTA,
            NOTHING,
            Meaning(usage=Usage(input=9, output=3)),
            Meaning(delta=True, usage=Usage(output=70, reasoning=20)),
            Meaning(usage=Usage(output=5, reasoning=5, final=False)),
            REASONING,
        ]
    ),
    max_size=12,
)


class Nothing:
    """An observer of whom nobody is told."""

    def __getattr__(self, name: str) -> object:
        return lambda *_, **__: None


@given(EVENTS, st.sampled_from(Outcome))
def test_time_per_token_is_known_only_where_all_of_it_is(events: list[Meaning], outcome: Outcome) -> None:
    exchange = Exchange("r", "u", Nothing(), "id", 0.0)  # type: ignore[arg-type]
    for at, meaning in enumerate(events):
        exchange.happened(meaning, float(at))
    exchange.finish(outcome)
    deltas = [at for at, meaning in enumerate(events) if meaning.delta]
    assert exchange.deltas == len(deltas)
    found = exchange.seconds_per_token()
    told = exchange.usage
    known = told is not None and told.output is not None and told.final
    if outcome is Outcome.COMPLETED and known and len(deltas) > 1:
        assert told is not None
        assert told.output is not None
        tokens = told.output - (0 if REASONING in events else told.reasoning or 0)
        assert found == (None if tokens < 2 else (deltas[-1] - deltas[0]) / (tokens - 1))
    else:
        assert found is None


async def test_events_deltas_and_bytes_count_while_a_stream_runs(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD)
    role = delta("")
    words = [delta(str(number)) for number in range(20)]
    moved = 0
    for number, event in enumerate([role, *words]):
        api.send(chunk(event))
        await client.read_until(event)
        moved += len(event)
        assert proxy.sample("stream_events_total") == number + 1
        assert proxy.sample("stream_deltas_total") == number
        assert proxy.sample("response_bytes_total") == moved
    assert proxy.sample("request_bytes_total") == len(post().partition(b"\r\n\r\n")[2])
    assert proxy.sample("requests_total") == 0
    api.send(chunk(DONE), LAST_CHUNK)
    await client.read_until(LAST_CHUNK)
    await proxy.idle()
    assert proxy.sample("stream_events_total") == 22
    assert proxy.sample("stream_deltas_total") == 20
    assert proxy.sample("response_bytes_total") == moved + len(DONE)
    assert not proxy.worker.telemetry.running


async def test_what_runs_is_told_unasked_every_second(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("a")), chunk(delta("b")))
    await client.read_until(delta("b"))
    told = proxy.registry._counters["stream_deltas"]
    await until(lambda: sum(told.values()) == 2)


async def test_of_thousands_of_streams_a_report_counts_some_and_the_next_ones_the_others() -> None:
    reports: list[Report] = []

    def send(report: Report) -> bool:
        reports.append(report)
        return True

    running = Telemetry(asyncio.get_running_loop(), send, list)
    exchanges = [Exchange("api", "up", running.observer("api", "up", ""), str(number), 0.0) for number in range(2_500)]
    for exchange in exchanges:
        exchange.begin()
        exchange.events = exchange.other_events = 1
    told = []
    for _ in range(4):
        running.report()
        told.append(sum(value for name, _, value in reports[-1].counters if name == metrics.EVENTS.name))
    assert told == [1_000, 1_000, 500, 0]
    for exchange in exchanges:
        exchange.events = exchange.other_events = 3
        exchange.finish(Outcome.COMPLETED)
    running.close()
    told.append(sum(value for name, _, value in reports[-1].counters if name == metrics.EVENTS.name))
    assert sum(told) == 7_500


async def test_requests_durations_and_gaps_are_told_apart_by_model_stream_and_outcome(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, metrics=config.Metrics(models=("gpt-*",)))
    client, api = await begin(proxy, upstream, post(b'{"model":"gpt-5","stream":true}'))
    api.send(STREAM_HEAD, *map(chunk, (delta("a"), delta("b"), usage(9, 2), DONE)), LAST_CHUNK)
    await client.message()
    client.send(post(b'{"model":"gpt-5"}'))
    await api.message()
    api.send(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")
    await client.message()
    client.send(post(b'{"model":"llama","stream":true}'))
    await api.message()
    api.send(STREAM_HEAD, chunk(delta("a")))
    await client.read_until(delta("a"))
    client.reset()
    await proxy.idle()
    assert proxy.sample("requests_total", model="gpt-*", code="200", outcome="completed") == 1
    assert proxy.sample("requests_total", model="gpt-*", code="429", outcome="completed") == 1
    assert proxy.sample("requests_total", model="other", outcome="client_gone_mid_stream") == 1
    duration = "request_duration_seconds_count"
    assert proxy.sample(duration, model="gpt-*", stream="true", outcome="completed") == 1
    assert proxy.sample(duration, model="gpt-*", stream="false", outcome="completed") == 1
    assert proxy.sample(duration, model="other", stream="true", outcome="client_gone_mid_stream") == 1
    assert proxy.sample("inter_token_latency_seconds_count", model="gpt-*") == 1
    assert proxy.sample("stream_deltas_total", model="gpt-*") == 2
    assert proxy.sample("stream_deltas_total", model="other") == 1


async def test_basic_detail_has_a_model_where_times_of_tokens_and_tokens_are_and_nowhere_else(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, metrics=config.Metrics(models=("m",), detail="basic"))
    finish = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    await streamed(proxy, upstream, [delta("a"), delta("b"), finish, usage(9, 2), DONE])
    having: dict[str, set[str]] = {}
    for name, labels in proxy.samples():
        said = {label for label, value in labels if value} & {"model", "stream", "outcome"}
        having.setdefault(re.sub("_(total|bucket|sum|count)$", "", name).removeprefix("sseproxy_"), set()).update(said)
    by_model = {"time_to_first_token_seconds", "time_per_output_token_seconds", "tokens"}
    assert {name for name, said in having.items() if "model" in said} == by_model
    assert {name for name, said in having.items() if "outcome" in said} == {"requests"}
    assert not any("stream" in said for said in having.values())
    assert proxy.sample("stream_deltas_total") == 2


async def test_finish_reasons_and_tokens_of_each_request_are_counted(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    ends = [
        b'data: {"choices":[{"delta":{},"finish_reason":"%b"}]}\n\n' % why for why in (b"length", b"one of its own")
    ]
    await streamed(proxy, upstream, *([delta("a"), end, usage(9, 300), DONE] for end in ends))
    assert proxy.sample("finish_reasons_total", reason="length") == 1
    assert proxy.sample("finish_reasons_total", reason="other") == 1
    assert proxy.sample("finish_reasons_total") == 2
    assert proxy.sample("tokens_per_request_sum", type="input") == 18
    assert proxy.sample("tokens_per_request_sum", type="output") == 600
    assert proxy.sample("tokens_per_request_bucket", type="output", le="200.0") == 0
    assert proxy.sample("tokens_per_request_bucket", type="output", le="500.0") == 2


async def test_a_new_connection_is_timed_and_one_that_is_used_again_counted(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    for _ in range(3):
        api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await client.message()
        client.send(post())
        await api.message()
    assert proxy.sample("upstream_connect_seconds_count", route="api", upstream="up") == 1
    assert 0 < proxy.sample("upstream_connect_seconds_sum") < 5
    assert proxy.sample("upstream_connections_reused_total", route="api", upstream="up") == 3


async def test_connections_of_clients_and_their_states_upstream_are_gauges(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    await proxy.connect()
    await until(lambda: proxy.sample("client_connections") == 2)
    assert proxy.sample("upstream_connections", state="active") == 1
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    await client.message()
    client.close()
    await until(lambda: proxy.sample("client_connections") == 1)
    assert proxy.sample("upstream_connections", state="active") == 0
    assert proxy.sample("upstream_connections", state="connecting") == 0
    assert proxy.sample("upstream_connections", state="idle") == 1


async def test_what_is_said_here_is_among_the_bytes_of_responses(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, route={"heartbeat": 0.01})
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("a")))
    received = await client.read_until(b": heartbeat\n\r\n")
    api.reset()
    rest, _ = await client.rest()
    await proxy.idle()
    _, _, framed = (received + rest).partition(b"\r\n\r\n")
    assert b"event: error" in framed
    assert proxy.sample("response_bytes_total") == len(without_framing(framed))


@pytest.mark.parametrize(
    ("request_", "bodiless"),
    [
        (post(path="/nowhere"), False),
        (b"HEAD /nowhere HTTP/1.1\r\nHost: h\r\n\r\n", True),
        (b"GET /v1 HTTP/9.9\r\n\r\n", False),
    ],
    ids=["no route", "head", "malformed"],
)
async def test_so_is_a_refusal(proxy: RunningProxy, request_: bytes, bodiless: bool) -> None:
    client = await proxy.connect()
    client.send(request_)
    answer = await client.message(bodiless=bodiless)
    await until(lambda: proxy.sample("requests_total") == 1)
    assert len(answer.body) > 0 or bodiless
    assert proxy.sample("response_bytes_total") == len(answer.body)


def without_framing(framed: bytes) -> bytes:
    """The payloads of whole chunks."""
    payload = b""
    while framed:
        size, _, framed = framed.partition(b"\r\n")
        payload += framed[: int(size, 16)]
        framed = framed[int(size, 16) + 2 :]
    return payload


async def test_workers_and_limits_are_seen_from_outside(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(
        tmp_path,
        upstream,
        workers="2",
        limits="{connections: 500, active_requests: 40}",
        routes="[{name: api, match: {path: /v1}, upstream: up, limits: {active_requests: 7}}]",
    )
    async with file.serve() as served:
        found = await served.samples()
        # A report takes some CPU, which the kernel tells in hundredths of a second.
        async with asyncio.timeout(DEADLINE):
            while not all(found[f'worker_cpu_seconds_total{{worker="{place}"}}'] for place in "12"):
                found = await served.samples()
        for place, pid in zip("12", sorted(served.workers), strict=True):
            assert found[f'worker_resident_memory_bytes{{worker="{place}"}}'] > 10e6
            assert 5 < found[f'worker_open_fds{{worker="{place}"}}'] < found[f'worker_max_fds{{worker="{place}"}}']
            assert of_process(pid).max_fds == found[f'worker_max_fds{{worker="{place}"}}']
        assert {name: value for name, value in found.items() if name.startswith("limit{")} == {
            'limit{limit="connections",route=""}': 500,
            'limit{limit="active_requests",route=""}': 40,
            'limit{limit="active_requests",route="api"}': 7,
            'limit{limit="pending_connects",route=""}': 1000,
        }
        file.write(upstream, workers="1", limits="{connections: 400}")
        before = sum(value for name, value in found.items() if name.startswith("worker_cpu_seconds_total"))
        async with ClientSession() as session:
            await session.post(f"http://127.0.0.1:{served.admin}/-/reload")
        await served.until(r"workers_finishing", 0)
        found = await served.samples()
        assert {name: value for name, value in found.items() if name.startswith("limit{")} == {
            'limit{limit="connections",route=""}': 400,
            'limit{limit="pending_connects",route=""}': 1000,
        }
        # Times stay counted, and what a process has goes with it.
        assert sum(value for name, value in found.items() if name.startswith("worker_cpu_seconds_total")) >= before
        assert 'worker_open_fds{worker="2"}' not in found


async def test_a_worker_that_is_stopped_half_of_the_time_is_seen_to_be_late(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """As by a CPU limit. What SseproxyLoopLate looks at: more than one time in twenty by more than 10 ms."""
    async with ConfigFile(tmp_path, upstream).serve() as served:
        (worker,) = served.workers
        begun = await served.sample("event_loop_lag_seconds_count")
        late = await served.sample(r'event_loop_lag_seconds_bucket\{le="0.01"\}')
        loop = asyncio.get_running_loop()
        until_then = loop.time() + 6
        while loop.time() < until_then:
            os.kill(worker, signal.SIGSTOP)
            await asyncio.sleep(0.05)
            os.kill(worker, signal.SIGCONT)
            await asyncio.sleep(0.05)
        timers = await served.sample("event_loop_lag_seconds_count") - begun
        in_time = await served.sample(r'event_loop_lag_seconds_bucket\{le="0.01"\}') - late
        assert timers > 10
        assert in_time / timers < 0.95


async def test_what_a_worker_had_told_stays_when_it_is_killed(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream).serve() as served:
        client = await served.connect()
        client.send(post())
        api = await upstream.accept()
        await api.message()
        api.send(STREAM_HEAD, chunk(delta("a")), chunk(delta("b")))
        await client.read_until(delta("b"))
        await served.until(r"stream_deltas_total\{.*\}", 2)
        os.kill(served.workers[0], signal.SIGKILL)
        await client.rest()
        await served.until(r'requests_total\{code="",model="",outcome="proxy_error",route="api",upstream="up"\}', 1)
        found = await served.samples()
        lost = [name for name in found if re.match(r"request_duration_seconds|tokens_total", name)]
        assert lost == []
        assert sum(value for name, value in found.items() if name.startswith("stream_deltas_total")) == 2


def test_nothing_is_known_of_a_process_that_has_ended() -> None:
    assert of_process(2**22 + 1) == (0, 0, 0, 0)


async def test_metrics_are_compressed_where_that_is_asked_for(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream).serve() as served:
        answers = []
        for accepted in (b"", b"Accept-Encoding: gzip\r\n"):
            admin = Peer(*await asyncio.open_connection("127.0.0.1", served.admin))
            admin.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%b\r\n" % accepted)
            answers.append(await admin.message())
            admin.close()
        plain, packed = answers
        assert plain.get("content-encoding") is None
        assert packed.get("content-encoding") == "gzip"
        assert packed.get("vary") == plain.get("vary") == "Accept-Encoding"
        assert b"sseproxy_workers 1.0\n" in gzip.decompress(packed.body)
        assert len(packed.body) < len(plain.body) / 3


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [
        ("", False),
        ("gzip", True),
        ("GZIP;q=0.5", True),
        ("deflate, gzip;q=1.0", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
        ("*", True),
        ("*;q=0", False),
        ("identity", False),
        ("gzipped", False),
    ],
)
def test_gzip_is_taken_by_who_says_so(accepted: str, takes: bool) -> None:
    assert takes_gzip(accepted) == takes


DEFINITIONS = (Path(__file__).parent.parent / "grafana" / "metrics.md").read_text()


@pytest.mark.parametrize("detail", ["full", "basic"])
async def test_there_are_as_many_series_as_the_definitions_say(
    start: StartProxy, upstream: ScriptedUpstream, detail: Literal["full", "basic"]
) -> None:
    """For what is typical: an answer, a refusal, a client that leaves."""
    proxy = await start(upstream.url, metrics=config.Metrics(models=("m",), detail=detail))
    finish = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    cached = counts(prompt_tokens=9, completion_tokens=2, prompt_tokens_details={"cached_tokens": 3})
    await streamed(proxy, upstream, [delta("a"), delta("b"), finish, cached, DONE])
    client, api = await begin_again(proxy, upstream)
    api.send(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")
    await client.message()
    client.send(post())
    await api.message()
    api.send(STREAM_HEAD, chunk(delta("a")))
    await client.read_until(delta("a"))
    client.reset()
    await proxy.idle()
    of_model = of_route = 0
    for _, labels in proxy.samples():
        said = dict(labels)
        if said.get("model"):
            of_model += 1
        elif said.get("upstream"):
            of_route += 1
    column = 1 if detail == "basic" else 0
    rows = {
        "route and upstream": of_route,
        "route, upstream and model": of_model,
    }
    for name, found in rows.items():
        (numbers,) = re.findall(rf"^\| {name} \| (\d+) \| (\d+) \|$", DEFINITIONS, re.M)
        assert found == pytest.approx(int(numbers[column]), rel=0.1), name


async def begin_again(proxy: RunningProxy, upstream: ScriptedUpstream) -> tuple[Peer, Peer]:
    """As `begin`, on a connection to the upstream that is certainly a new one."""
    await upstream.hang_up()
    return await begin(proxy, upstream)


def test_every_reason_is_explained() -> None:
    for reason in (*RequestError._TABLE, "stop", "length", "tool_calls", "content_filter", "error", "other"):
        assert f"`{reason}`" in DEFINITIONS, reason
