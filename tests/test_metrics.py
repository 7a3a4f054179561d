"""Counting: in a worker, on the way to the supervisor, and on `/metrics`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from time import perf_counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sseproxy.observe import metrics
from sseproxy.observe.metrics import METRICS, Metric, Recorder, Report
from sseproxy.observe.registry import Registry, exposition
from sseproxy.observe.telemetry import REPORT_INTERVAL, Reports, RouteObserver, Telemetry, encode_report
from sseproxy.relay.exchange import Exchange
from sseproxy.relay.proxy import LoopLag

from .conftest import PlayScript, StartProxy
from .harness import (
    DEADLINE,
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    chunk,
    delta,
    post,
    until,
)
from .splits import cut, splits

R = ("api", "up")

TO_TOKEN = (
    *(
        0.001,
        0.005,
        0.01,
        0.02,
        0.04,
        0.06,
        0.08,
        0.09,
        0.1,
        0.11,
        0.12,
        0.13,
        0.14,
        0.15,
        0.165,
        0.18,
        0.195,
        0.21,
        0.23,
    ),
    *(0.25, 0.275, 0.3, 0.33, 0.36, 0.39, 0.425, 0.46, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
BETWEEN_TOKENS = (
    *(
        0.001,
        0.0025,
        0.0045,
        0.005,
        0.0055,
        0.006,
        0.0065,
        0.007,
        0.0075,
        0.008,
        0.00875,
        0.0095,
        0.01,
        0.011,
        0.012,
        0.013,
    ),
    *(0.014, 0.015, 0.0165, 0.018, 0.0195, 0.021, 0.023, 0.025, 0.0275, 0.03, 0.033, 0.036, 0.039, 0.0425, 0.046),
    *(0.05, 0.055, 0.06, 0.065, 0.07, 0.075, 0.0825, 0.09, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80),
)
DURATION = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)
CONNECT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LAG = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 10)
TOKENS_OF_ONE = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))[:-1]
OWN_DELAY = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 1, 10)
# What dashboards and alerts are written against, once more: (labels, R being route and upstream; buckets or type).
CONTRACT = {
    "requests": ("R model code outcome", "counter"),
    "requests_active": ("R", "gauge"),
    "streams_active": ("R", "gauge"),
    "request_duration_seconds": ("R model stream outcome", DURATION),
    "time_to_response_head_seconds": ("R", TO_TOKEN),
    "time_to_first_event_seconds": ("R", TO_TOKEN),
    "time_to_first_token_seconds": ("R model", TO_TOKEN),
    "inter_token_latency_seconds": ("R model", BETWEEN_TOKENS),
    "time_per_output_token_seconds": ("R model", BETWEEN_TOKENS),
    "tokens": ("R model type", "counter"),
    "tokens_per_request": ("R model type", TOKENS_OF_ONE),
    "finish_reasons": ("R model reason", "counter"),
    "audio_seconds": ("R", "counter"),
    "streams_without_usage": ("R reason", "counter"),
    "answers_without_usage": ("R", "counter"),
    "stream_ends": ("R end", "counter"),
    "bodies_not_read": ("R reason", "counter"),
    "stream_events": ("R", "counter"),
    "stream_deltas": ("R model", "counter"),
    "stream_events_garbled": ("R", "counter"),
    "request_bytes": ("R", "counter"),
    "response_bytes": ("R", "counter"),
    "chunk_forward_seconds": ("R", OWN_DELAY),
    "upstream_release_seconds": ("R", OWN_DELAY),
    "upstream_errors": ("R type", "counter"),
    "attempts": ("upstream endpoint result", "counter"),
    "retries": ("R reason", "counter"),
    "discarded_tokens": ("upstream model type", "counter"),
    "held_seconds": ("R", TO_TOKEN),
    "endpoint_up": ("upstream endpoint", "gauge"),
    "endpoint_requests_active": ("upstream endpoint", "gauge"),
    "endpoint_ejections": ("upstream endpoint reason", "counter"),
    "requests_rejected": ("route reason", "counter"),
    "client_requests": ("client outcome", "counter"),
    "client_requests_active": ("client", "gauge"),
    "client_tokens": ("client model type", "counter"),
    "client_limited": ("client limit", "counter"),
    "client_keys_rejected": ("", "counter"),
    "ledger_failures": ("", "counter"),
    "upstream_connections": ("upstream state", "gauge"),
    "upstream_connect_seconds": ("R", CONNECT),
    "upstream_connections_reused": ("R", "counter"),
    "client_connections": ("", "gauge"),
    "limit": ("limit route", "gauge"),
    "event_loop_lag_seconds": ("", LAG),
    "workers": ("", "gauge"),
    "workers_finishing": ("", "gauge"),
    "worker_cpu_seconds": ("worker", "counter"),
    "worker_resident_memory_bytes": ("worker", "gauge"),
    "worker_open_fds": ("worker", "gauge"),
    "worker_max_fds": ("worker", "gauge"),
    "worker_restarts": ("", "counter"),
    "upstream_up": ("upstream", "gauge"),
    "config_reloads": ("result", "counter"),
    "config_last_reload_successful": ("", "gauge"),
    "config_last_reload_success_timestamp_seconds": ("", "gauge"),
    "build_info": ("version python aiohttp", "gauge"),
}


def sent(report: Report) -> Report:
    """As the supervisor gets it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=Report)


def samples(registry: Registry) -> dict[str, float]:
    text = exposition(registry, "text/plain")[0].decode()
    found = (line.rpartition(" ") for line in text.splitlines() if line.startswith("sseproxy_"))
    return {name.removeprefix("sseproxy_"): float(value) for name, _, value in found}


def test_workers_add_up_counters_stay_and_gauges_go() -> None:
    registry = Registry()
    for worker, amount in ((1, 2), (2, 3)):
        recorder = Recorder()
        recorder.count(metrics.EVENTS, R, amount)
        recorder.move(metrics.REQUESTS_ACTIVE, R, amount)
        recorder.histogram(metrics.RELEASE, R).observe(amount)
        registry.add(worker, sent(recorder.report()))
    active = 'requests_active{route="api",upstream="up"}'
    events = 'stream_events_total{route="api",upstream="up"}'
    assert (samples(registry)[active], samples(registry)[events]) == (5, 5)
    assert registry.drop(1) == {R: 2}
    assert (samples(registry)[active], samples(registry)[events]) == (3, 5)
    assert registry.drop(1) == {}
    assert samples(registry)['upstream_release_seconds_sum{route="api",upstream="up"}'] == 5


def test_a_report_tells_what_changed_since_the_last_one() -> None:
    recorder = Recorder()
    recorder.count(metrics.EVENTS, R)
    recorder.histogram(metrics.GAPS, R).observe(1)
    recorder.move(metrics.STREAMS_ACTIVE, R, 1)
    first, second = recorder.report(), recorder.report()
    assert [*first.counters] == [("stream_events", R, 1)]
    assert len(first.histograms) == 1
    assert (second.counters, second.histograms) == ([], [])
    assert second.gauges == [("streams_active", R, 1)]


def test_of_a_state_the_last_word_counts_whoever_said_it() -> None:
    registry = Registry()
    up, down = Recorder(), Recorder()
    up.set(metrics.UPSTREAM_UP, ("up",), 1)
    registry.add(1, sent(up.report()))
    down.set(metrics.UPSTREAM_UP, ("up",), 0)
    registry.add(2, sent(down.report()))
    # It has nothing new to say.
    registry.add(1, sent(up.report()))
    registry.drop(2)
    assert samples(registry)['upstream_up{upstream="up"}'] == 0


def test_a_report_that_could_not_be_sent_is_not_lost() -> None:
    recorder, registry = Recorder(), Registry()
    recorder.set(metrics.UPSTREAM_UP, ("up",), 1)
    for value in (1.0, 3.0):
        recorder.count(metrics.EVENTS, R)
        recorder.histogram(metrics.RELEASE, R).observe(value)
        recorder.take_back(recorder.report())
    registry.add(1, sent(recorder.report()))
    assert samples(registry)['upstream_up{upstream="up"}'] == 1
    assert samples(registry)['stream_events_total{route="api",upstream="up"}'] == 2
    assert samples(registry)['upstream_release_seconds_count{route="api",upstream="up"}'] == 2
    assert samples(registry)['upstream_release_seconds_sum{route="api",upstream="up"}'] == 4


@given(st.lists(st.floats(min_value=0, max_value=5000), max_size=50))
def test_buckets_are_cumulative_and_include_their_bound(values: list[float]) -> None:
    recorder, registry = Recorder(), Registry()
    histogram = recorder.histogram(metrics.TO_HEAD, R)
    for value in values:
        histogram.observe(value)
    histogram.observe(metrics.TO_TOKEN[3])
    values = [*values, metrics.TO_TOKEN[3]]
    registry.add(1, sent(recorder.report()))
    found = samples(registry)
    for bound in metrics.TO_TOKEN:
        line = f'time_to_response_head_seconds_bucket{{le="{bound!r}",route="api",upstream="up"}}'
        assert found[line] == sum(value <= bound for value in values)
    assert found['time_to_response_head_seconds_bucket{le="+Inf",route="api",upstream="up"}'] == len(values)


def quantile(q: float, metric: Metric, values: list[float]) -> float:
    """Prometheus' `histogram_quantile` of what is exposed of `values`."""
    recorder, registry = Recorder(), Registry()
    for value in values:
        recorder.histogram(metric, ()).observe(value)
    registry.add(1, recorder.report())
    (family,) = [family for family in registry.collect() if family.name == f"sseproxy_{metric.name}"]
    buckets = [(float(each.labels["le"]), each.value) for each in family.samples if "le" in each.labels]
    below = (0.0, 0.0)
    for bound, count in buckets:
        if count >= q * len(values):
            return below[0] + (bound - below[0]) * (q * len(values) - below[1]) / (count - below[1])
        below = bound, count
    raise AssertionError


@pytest.mark.parametrize(
    ("metric", "lowest", "highest"),
    [
        (metrics.TO_FIRST_TOKEN, 0.1, 0.5),
        (metrics.TO_HEAD, 0.1, 0.5),
        (metrics.GAPS, 0.005, 0.1),
        (metrics.TPOT, 0.005, 0.1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@given(st.data())
def test_a_median_is_told_to_within_a_tenth_whatever_the_others_are(
    metric: Metric, lowest: float, highest: float, data: st.DataObject
) -> None:
    median = data.draw(st.floats(lowest, highest))
    side = data.draw(st.integers(0, 10))
    lower = data.draw(st.lists(st.floats(0, median), min_size=side, max_size=side))
    higher = data.draw(st.lists(st.floats(median, 100), min_size=side, max_size=side))
    assert quantile(0.5, metric, [*lower, median, *higher]) == pytest.approx(median, rel=0.1001)


@given(st.text(max_size=40))
def test_of_a_finish_reason_only_words_that_are_known_are_labels(said: str) -> None:
    assert metrics.reason_label(said) in {"stop", "length", "tool_calls", "content_filter", "error", "other"}


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("stop", "stop"),
        ("end_turn", "stop"),
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("incomplete", "length"),
        ("function_call", "tool_calls"),
        ("SAFETY", "content_filter"),
        ("abort", "error"),
        ("pause_turn", "other"),
        ("", "other"),
    ],
)
def test_each_api_has_words_of_its_own_for_the_same_reason(said: str, label: str) -> None:
    assert metrics.reason_label(said) == label


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_exposed_in_both_formats_as_it_is_declared(metric: Metric) -> None:
    recorder, registry = Recorder(), Registry()
    labels = tuple(f'{name} "of" \\ ours' for name in metric.labels)
    if metric.kind == "counter":
        recorder.count(metric, labels, 2)
    elif metric.kind in ("gauge", "state"):
        recorder.set(metric, labels, 2)
    else:
        histogram = recorder.histogram(metric, labels)
        histogram.observe(2)
        histogram.example(2, "request", 1.5)
    registry.add(1, sent(recorder.report()))
    openmetrics, content_type = exposition(registry, "application/openmetrics-text; version=1.0.0")
    text, plain_type = exposition(registry, "*/*")
    assert content_type.startswith("application/openmetrics-text")
    assert plain_type.startswith("text/plain")
    for families in (
        parse_openmetrics(openmetrics.decode()),  # type: ignore[no-untyped-call]
        parse_text(text.decode()),
    ):
        (family,) = [family for family in families if family.name == f"sseproxy_{metric.name}"]
        assert family.type == ("gauge" if metric.kind == "state" else metric.kind)
        assert family.documentation == metric.help
        assert not any(sample.name.endswith("_created") for sample in family.samples)
        for sample in family.samples:
            assert tuple(sample.labels[name] for name in metric.labels) == labels
    parsed = parse_openmetrics(openmetrics.decode())  # type: ignore[no-untyped-call]
    exemplars = [sample.exemplar for family in parsed for sample in family.samples]
    assert [found.labels for found in exemplars if found is not None] == (
        [{"request_id": "request"}] if metric.kind == "histogram" else []
    )


def test_names_are_told_once() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_names_labels_types_and_buckets_are_what_dashboards_know() -> None:
    recorder, registry = Recorder(), Registry()
    for metric in METRICS:
        if metric.kind == "histogram":
            recorder.histogram(metric, metric.labels).observe(1)
        elif metric.kind == "counter":
            recorder.count(metric, metric.labels)
        else:
            recorder.set(metric, metric.labels, 1)
    registry.add(1, sent(recorder.report()))
    found: dict[str, tuple[str, object]] = {}
    for family in parse_text(exposition(registry, "")[0].decode()):
        if not family.name.startswith("process_"):
            les = tuple(float(sample.labels.pop("le")) for sample in family.samples if "le" in sample.labels)
            assert les[-1:] in ((), (float("inf"),))
            (labels,) = {" ".join(sample.labels) for sample in family.samples}
            found[family.name.removeprefix("sseproxy_")] = (labels, les[:-1] or family.type)
    expected = {name: (labels.replace("R", "route upstream"), kind) for name, (labels, kind) in CONTRACT.items()}
    assert {name: (set(labels.split()), kind) for name, (labels, kind) in found.items()} == {
        name: (set(labels.split()), kind) for name, (labels, kind) in expected.items()
    }


@pytest.mark.parametrize(
    ("accept", "version"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/plain;version=odd", "text/plain; version=0.0.4"),
        ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=odd", "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=99.0.0", "application/openmetrics-text; version=1.0.0"),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.4",
            "application/openmetrics-text; version=1.0.0",
        ),
    ],
)
def test_a_scraper_gets_the_format_it_asks_for_in_the_version_there_is(accept: str, version: str) -> None:
    body, content_type = exposition(Registry(), accept)
    assert content_type == f"{version}; charset=utf-8"
    assert body.endswith(b"# EOF\n") == accept.startswith("application/openmetrics-text")


def test_a_report_that_could_not_be_sent_keeps_the_latest_exemplar_of_each_bucket() -> None:
    recorder, registry = Recorder(), Registry()
    histogram = recorder.histogram(metrics.TO_FIRST_TOKEN, R)

    def first_token(seconds: float, request_id: str) -> None:
        histogram.observe(seconds)
        histogram.example(seconds, request_id, 1.0)

    first_token(0.6, "early")
    first_token(3.0, "slow")
    unsent = recorder.report()
    first_token(0.7, "late")
    recorder.take_back(unsent)
    registry.add(1, sent(recorder.report()))
    families = parse_openmetrics(exposition(registry, "application/openmetrics-text")[0].decode())  # type: ignore[no-untyped-call]
    samples = [sample for family in families for sample in family.samples if sample.exemplar is not None]
    assert {sample.labels["le"]: sample.exemplar.labels["request_id"] for sample in samples} == {
        "0.75": "late",
        "5.0": "slow",
    }


class Channel:
    """Where a worker's reports go. `open` tells whether they are taken now."""

    def __init__(self) -> None:
        self.open = True
        self.refused = 0
        self.sent: asyncio.Queue[Report] = asyncio.Queue()

    def send(self, report: Report) -> bool:
        if self.open:
            self.sent.put_nowait(report)
        else:
            self.refused += 1
        return self.open

    async def next(self) -> Report:
        async with asyncio.timeout(DEADLINE):
            return await self.sent.get()

    async def observed(self) -> dict[str, int]:
        """How often what was observed, as the next report says in which anything was."""
        while not (histograms := (await self.next()).histograms):
            pass
        return {name: sum(taken.counts) for name, _, taken in histograms}


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
async def telemetry(channel: Channel) -> AsyncIterator[Telemetry]:
    gauges = [(metrics.CONNECTIONS, ("up", "active"), 2), (metrics.CONNECTIONS, ("up", "idle"), 5)]
    running = Telemetry(asyncio.get_running_loop(), channel.send, lambda: gauges)
    yield running
    running.close()


def begun(telemetry: Telemetry) -> RouteObserver:
    """What records an exchange that has just begun."""
    observer = telemetry.observer(*R, "other")
    Exchange(*R, observer, "id", 0.0).begin()
    return observer


async def test_reports_go_out_unasked_while_an_exchange_is_under_way(telemetry: Telemetry, channel: Channel) -> None:
    observer = begun(telemetry)
    gauges = (await channel.next()).gauges
    assert ("requests_active", R, 1) in gauges
    assert ("upstream_connections", ("up", "active"), 2) in gauges
    assert ("upstream_connections", ("up", "idle"), 5) in gauges
    observer.gap(0.03)
    assert await channel.observed() == {metrics.GAPS.name: 1}


async def test_reports_are_not_more_often_than_they_have_to_be(telemetry: Telemetry, channel: Channel) -> None:
    observer = begun(telemetry)
    await channel.next()
    sent_at, gaps = perf_counter(), 0
    while channel.sent.empty():
        observer.gap(0.03)
        gaps += 1
        await asyncio.sleep(0)
    assert perf_counter() - sent_at > REPORT_INTERVAL / 2
    # Those that were counted on the way among them.
    assert await channel.observed() == {metrics.GAPS.name: gaps}


async def test_who_asks_gets_what_is_known_by_then(telemetry: Telemetry, channel: Channel) -> None:
    begun(telemetry)
    assert not (await channel.next()).asked
    telemetry.recorder.count(metrics.EVENTS, R)
    telemetry.report(asked=True)
    report = channel.sent.get_nowait()
    assert report.asked
    assert report.counters == [("stream_events", R, 1)]
    assert not (await channel.next()).asked


async def test_a_question_that_could_not_be_answered_is_answered_later(telemetry: Telemetry, channel: Channel) -> None:
    channel.open = False
    telemetry.report(asked=True)
    channel.open = True
    assert (await channel.next()).asked


async def test_an_answer_is_one_once_it_was_taken_note_of() -> None:
    reader, asked = asyncio.StreamReader(), bytearray()
    reports = Reports(reader, asked.extend)
    taken: list[bool] = []

    async def take() -> None:
        async for report in reports:
            taken.append(report.asked)  # noqa: PERF401 - what it has so far is looked at

    taking = asyncio.ensure_future(take())
    waiting = [asyncio.ensure_future(reports.latest()) for _ in range(2)]
    await until(lambda: bool(asked))
    reader.feed_data(encode_report(Recorder().report()))
    await until(lambda: taken == [False])
    assert not any(waiter.done() for waiter in waiting)
    reader.feed_data(encode_report(Recorder().report(asked=True)))
    await asyncio.gather(*waiting)
    assert taken == [False, True]
    last = asyncio.ensure_future(reports.latest())
    await until(lambda: len(asked) == 2)
    # The worker has died.
    reader.feed_eof()
    await asyncio.gather(last, taking)


async def test_a_channel_that_takes_no_reports_for_a_while_loses_none(telemetry: Telemetry, channel: Channel) -> None:
    channel.open = False
    for times in range(1, 4):
        telemetry.recorder.count(metrics.EVENTS, R, 2)
        telemetry.observer(*R, "other").gap(0.03)
        telemetry.report()
        assert channel.refused == times
    channel.open = True
    report = await channel.next()
    assert report.counters == [("stream_events", R, 6)]
    assert [(name, sum(taken.counts)) for name, _, taken in report.histograms] == [(metrics.GAPS.name, 3)]


async def test_the_last_report_has_what_was_left(telemetry: Telemetry, channel: Channel) -> None:
    telemetry.recorder.count(metrics.EVENTS, R)
    telemetry.close()
    assert channel.sent.get_nowait().counters == [("stream_events", R, 1)]


async def test_a_worker_measures_how_late_its_timers_are(telemetry: Telemetry, channel: Channel) -> None:
    loop_lag = LoopLag(asyncio.get_running_loop(), telemetry.lagged)
    assert (await channel.observed())[metrics.LOOP_LAG.name] == 1
    assert (await channel.observed())[metrics.LOOP_LAG.name] > 1
    loop_lag.stop()


@pytest.mark.parametrize(("size", "shown"), [(8, True), (118, True), (119, False), (128, False)])
async def test_an_exemplar_is_never_longer_than_openmetrics_allows(
    proxy: RunningProxy, upstream: ScriptedUpstream, size: int, shown: bool
) -> None:
    client = await proxy.connect()
    client.send(post().replace(b"Host:", b"X-Request-Id: %b\r\nHost:" % (b"x" * size)))
    api = await upstream.accept()
    assert (await api.message()).get("x-request-id") == "x" * size
    api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(DONE), LAST_CHUNK)
    assert (await client.message()).complete
    await proxy.idle()
    families = parse_openmetrics(proxy.exposed("application/openmetrics-text"))  # type: ignore[no-untyped-call]
    exemplars = [sample.exemplar.labels for family in families for sample in family.samples if sample.exemplar]
    assert exemplars == [{"request_id": "x" * size}] * shown
    assert proxy.sample("time_to_first_token_seconds_count") == 1


REPORTS = st.lists(
    st.builds(
        Report,
        counters=st.lists(st.tuples(st.just("stream_events"), st.just(R), st.floats(0, 1e6)), max_size=3),
        gauges=st.just([]),
        states=st.just([]),
        histograms=st.just([]),
    ),
    max_size=4,
)


@settings(deadline=None)
@given(st.data())
def test_reports_arrive_whole_however_the_channel_cuts_them(data: st.DataObject) -> None:
    reports = data.draw(REPORTS)
    stream = b"".join(map(encode_report, reports))
    pieces = data.draw(splits(stream))

    async def receive() -> list[Report]:
        reader = asyncio.StreamReader()
        for piece in pieces:
            reader.feed_data(piece)
        reader.feed_eof()
        return [report async for report in Reports(reader, lambda _: None)]

    assert asyncio.run(receive()) == reports


def test_a_report_that_breaks_off_is_none() -> None:
    async def receive(stream: bytes) -> list[Report]:
        reader = asyncio.StreamReader()
        reader.feed_data(stream)
        reader.feed_eof()
        return [report async for report in Reports(reader, lambda _: None)]

    report = Report(counters=[("stream_events", R, 1.0)], gauges=[], states=[], histograms=[])
    whole = encode_report(report)
    for piece, *_ in (cut(whole, [at]) for at in range(1, len(whole))):
        assert asyncio.run(receive(whole + piece)) == [report]


async def test_no_client_can_make_a_series(start: StartProxy, play: PlayScript) -> None:
    async def answer_all(api: Peer) -> None:
        while True:
            await api.message()
            api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    upstream = await play(answer_all)
    proxy = await start(upstream.url)
    # What a worker tells of itself once a second, it has told.
    proxy.worker.telemetry.lagged(0.0)
    client = await proxy.connect()

    async def request(path: str, method: str, model: str) -> None:
        body = b'{"model":"%b"}' % model.encode()
        client.send(post(body, path).replace(b"POST", method.encode(), 1))
        assert (await client.message()).status in (200, 404)

    for path in ("/v1/x", "/v1/x", "/y"):
        await request(path, "POST", "m")
    await proxy.idle()
    before = set(proxy.samples())
    dice = random.Random(7)
    for _ in range(150):
        word = "".join(dice.choices("abcdefghij", k=8))
        await request(f"/v1/{word}?{word}", dice.choice(["POST", "PUT", "DELETE", "PATCH"]), word)
        await request(f"/{word}", dice.choice(["POST", "PUT", "DELETE", "PATCH"]), word)
    await proxy.idle()
    assert set(proxy.samples()) == before
