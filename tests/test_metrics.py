"""Counting: in a worker, on the way to the supervisor, and on `/metrics`."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sseproxy.observe import metrics
from sseproxy.observe.metrics import METRICS, ExemplarValue, Metric, Recorder, Registry, Report, exposition
from sseproxy.observe.telemetry import encode_report, read_reports

from .conftest import PlayScript, StartProxy
from .harness import Peer, post
from .splits import cut, splits

R = ("api", "up")


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
        recorder.histogram(metrics.GAPS, R).observe(amount)
        registry.add(worker, sent(recorder.report()))
    active = 'requests_active{route="api",upstream="up"}'
    events = 'stream_events_total{route="api",upstream="up"}'
    assert (samples(registry)[active], samples(registry)[events]) == (5, 5)
    assert registry.drop(1) == {R: 2}
    assert (samples(registry)[active], samples(registry)[events]) == (3, 5)
    assert registry.drop(1) == {}
    assert samples(registry)['inter_token_latency_seconds_sum{route="api",upstream="up"}'] == 5


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


def test_a_report_that_could_not_be_sent_is_not_lost() -> None:
    recorder, registry = Recorder(), Registry()
    for value in (1.0, 3.0):
        recorder.count(metrics.EVENTS, R)
        recorder.histogram(metrics.GAPS, R).observe(value)
        recorder.take_back(recorder.report())
    registry.add(1, sent(recorder.report()))
    assert samples(registry)['stream_events_total{route="api",upstream="up"}'] == 2
    assert samples(registry)['inter_token_latency_seconds_count{route="api",upstream="up"}'] == 2
    assert samples(registry)['inter_token_latency_seconds_sum{route="api",upstream="up"}'] == 4


@given(st.lists(st.floats(min_value=0, max_value=5000), max_size=50))
def test_buckets_are_cumulative_and_include_their_bound(values: list[float]) -> None:
    recorder, registry = Recorder(), Registry()
    histogram = recorder.histogram(metrics.TO_FIRST_TOKEN, R)
    for value in values:
        histogram.observe(value)
    histogram.observe(metrics.TO_TOKEN[3])
    values = [*values, metrics.TO_TOKEN[3]]
    registry.add(1, sent(recorder.report()))
    found = samples(registry)
    for bound in metrics.TO_TOKEN:
        line = f'time_to_first_token_seconds_bucket{{le="{bound!r}",route="api",upstream="up"}}'
        assert found[line] == sum(value <= bound for value in values)
    assert found['time_to_first_token_seconds_bucket{le="+Inf",route="api",upstream="up"}'] == len(values)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_exposed_in_both_formats_as_it_is_declared(metric: Metric) -> None:
    recorder, registry = Recorder(), Registry()
    labels = tuple(f'{name} "of" \\ ours' for name in metric.labels)
    if metric.kind == "counter":
        recorder.count(metric, labels, 2)
    elif metric.kind == "gauge":
        recorder.set(metric, labels, 2)
    else:
        histogram = recorder.histogram(metric, labels)
        histogram.exemplars[histogram.observe(2)] = ExemplarValue(2, "request", 1.5)
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
        assert family.type == metric.kind
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


REPORTS = st.lists(
    st.builds(
        Report,
        counters=st.lists(st.tuples(st.just("stream_events"), st.just(R), st.floats(0, 1e6)), max_size=3),
        gauges=st.just([]),
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
        return [report async for report in read_reports(reader)]

    assert asyncio.run(receive()) == reports


def test_a_report_that_breaks_off_is_none() -> None:
    async def receive(stream: bytes) -> list[Report]:
        reader = asyncio.StreamReader()
        reader.feed_data(stream)
        reader.feed_eof()
        return [report async for report in read_reports(reader)]

    report = Report(counters=[("stream_events", R, 1.0)], gauges=[], histograms=[])
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
    client = await proxy.connect()

    async def request(path: str, method: str, model: str) -> None:
        body = b'{"model":"%b"}' % model.encode()
        client.send(post(body, path).replace(b"POST", method.encode(), 1))
        assert (await client.message()).status in (200, 404)

    await request("/v1/x", "POST", "m")
    await request("/y", "POST", "m")
    await proxy.idle()
    before = set(proxy.samples())
    dice = random.Random(7)
    for _ in range(150):
        word = "".join(dice.choices("abcdefghij", k=8))
        await request(f"/v1/{word}?{word}", dice.choice(["POST", "PUT", "DELETE", "PATCH"]), word)
        await request(f"/{word}", dice.choice(["POST", "PUT", "DELETE", "PATCH"]), word)
    await proxy.idle()
    assert set(proxy.samples()) == before
