"""The verdict, for hops that are simulated: what they do is known, so what is found can be checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.doctor.arrival import Arrival, arrival, arrival_without_probe, needs_another, round_size
from sseproxy.doctor.examine import Plan
from sseproxy.doctor.observed import Event, Hop, Leaving, Silence, Stream, Upload
from sseproxy.doctor.remedies import PROGRAMS, changes, remedies
from sseproxy.doctor.verdict import Kind, claims_of, diagnose, sentence

PLAN = Plan()
Delivery = Callable[[Sequence[float], int], list[float]]
"""From when events of a size were sent to when they come out of a hop."""


def sent_at(count: int, every: float) -> list[float]:
    return [PLAN.wait + index * every for index in range(count)]


def at_once(sent: Sequence[float], size: int) -> list[float]:
    return list(sent)


def whole(sent: Sequence[float], size: int) -> list[float]:
    return [sent[-1]] * len(sent)


def by_bytes(most: int, *, cuts: bool) -> Delivery:
    """A buffer of `most` bytes, which is emptied when it is full. With `cuts`, exactly so many bytes leave it."""

    def deliver(sent: Sequence[float], size: int) -> list[float]:
        ends = list(accumulate([size] * len(sent)))
        out, left = [sent[-1]] * len(sent), 0
        for moment, end in zip(sent, ends, strict=True):
            if end - left >= most:
                left += (end - left) // most * most if cuts else end - left
                out = [min(one, moment) if last <= left else one for one, last in zip(out, ends, strict=True)]
        return out

    return deliver


def by_tick(interval: float, phase: float) -> Delivery:
    """All that has come is sent at fixed times."""

    def deliver(sent: Sequence[float], size: int) -> list[float]:
        ticks = (((one - phase) // interval + 1) * interval + phase for one in sent)
        return [min(tick, sent[-1]) for tick in ticks]

    return deliver


def by_timer(interval: float) -> Delivery:
    """The first event that is held starts a timer."""

    def deliver(sent: Sequence[float], size: int) -> list[float]:
        out: list[float] = []
        fires = -1.0
        for one in sent:
            if one > fires:
                fires = one + interval
            out.append(min(fires, sent[-1]))
        return out

    return deliver


def jittered(out: Sequence[float], seed: int, usual: float, stalls: float) -> list[float]:
    """A busy machine: each event is a little late, and now and then nothing happens for up to `stalls` seconds."""
    chance = random.Random(seed)
    late: list[float] = []
    until = 0.0
    for one in out:
        if chance.random() < 0.03:
            until = one + chance.uniform(0, stalls)
        late.append(max(one + chance.uniform(0, usual), until))
    return list(accumulate(late, max))


def stream_through(
    deliver: Delivery,
    count: int,
    every: float,
    size: int,
    *,
    seed: int = 0,
    usual: float = 0.002,
    stalls: float = 0.0,
    offset: float = 0.0,
) -> list[Event]:
    sent = sent_at(count, every)
    out = jittered(deliver(sent, size), seed, usual, stalls)
    return [Event(one, received + offset, size) for one, received in zip(sent, out, strict=True)]


def examined(
    deliver: Delivery, *, seed: int = 0, usual: float = 0.002, stalls: float = 0.0, offset: float = 0.0
) -> Arrival:
    """As `examine` does it: a second stream if the first one is in doubt."""
    more = {"usual": usual, "stalls": stalls, "offset": offset}
    first = stream_through(deliver, PLAN.events, PLAN.every, 256, seed=seed, **more)
    match needs_another(first):
        case "":
            return arrival(first)
        case "faster":
            second = stream_through(deliver, 150, PLAN.every * 0.4, 256, seed=seed + 1, **more)
        case _:
            second = stream_through(deliver, 240, PLAN.every * 0.4, 2097, seed=seed + 1, **more)
    lag = 0.9 * usual
    pace = min(max(4 * PLAN.every, 8 * lag), 1.0)
    return arrival(first, second, stream_through(deliver, 20, pace, 256, seed=seed + 2, **more), lag)


SEEDS = st.integers(0, 2**32)
OFFSETS = st.floats(-1e6, 1e6)


@given(SEEDS, st.floats(0, 0.12), st.floats(0, 0.5), OFFSETS)
def test_a_right_path_on_a_busy_machine_is_no_alarm(seed: int, usual: float, stalls: float, offset: float) -> None:
    assert examined(at_once, seed=seed, usual=usual, stalls=stalls, offset=offset).how == "alone"


@given(st.integers(768, 96 * 1024), st.booleans(), SEEDS, OFFSETS)
def test_a_buffer_is_found_with_its_size(most: int, cuts: bool, seed: int, offset: float) -> None:
    found = examined(by_bytes(most, cuts=cuts), seed=seed, offset=offset)
    assert found.how == "bytes"
    step = 256 if most < 256 * PLAN.events / 2 else 2097
    assert 0.8 * most - step <= found.size <= 1.2 * most + step


@given(st.integers(510_000, 10**9), st.booleans(), SEEDS, OFFSETS)
def test_a_buffer_that_is_never_full_holds_the_whole(most: int, cuts: bool, seed: int, offset: float) -> None:
    for deliver in (by_bytes(most, cuts=cuts), whole):
        found = examined(deliver, seed=seed, offset=offset)
        assert found.how == "whole"
        assert 10_000 < found.size


@given(st.floats(0.15, 0.9), SEEDS, OFFSETS)
def test_a_timer_is_found_with_its_interval(interval: float, seed: int, offset: float) -> None:
    for deliver in (by_tick(interval, 0.01), by_timer(interval)):
        found = examined(deliver, seed=seed, offset=offset)
        assert found.how == "time", (found, deliver)
        assert 0.6 * interval - 0.05 <= found.seconds <= 1.4 * interval + 0.05


def at_random(seed: int) -> Delivery:
    chance = random.Random(seed)

    def deliver(sent: Sequence[float], size: int) -> list[float]:
        out: list[float] = []
        fires = -1.0
        for one in sent:
            if one > fires:
                fires = one + 10 ** chance.uniform(-1.3, 0)
            out.append(min(fires, sent[-1]))
        return out

    return deliver


@given(SEEDS, OFFSETS)
def test_what_is_held_at_random_is_held(seed: int, offset: float) -> None:
    assert examined(at_random(seed), seed=seed, offset=offset).how not in ("alone", "whole")


def test_what_is_held_at_random_is_neither_a_buffer_nor_a_timer() -> None:
    assert {examined(at_random(seed), seed=seed).how for seed in range(100)} == {"irregularly"}


def test_one_stream_of_two_that_is_held_is_no_alarm() -> None:
    held = stream_through(by_bytes(1024, cuts=False), PLAN.events, PLAN.every, 256)
    alone = stream_through(at_once, 150, PLAN.every * 0.4, 256)
    assert arrival(held).how == "bytes"
    assert arrival(held, alone).how == arrival(alone).how == "alone"


@pytest.mark.parametrize(("measured", "size"), [(3986, 4096), (3840, 4096), (16_100, 16_384), (6000, 6000), (61, 64)])
def test_a_size_is_told_as_people_would(measured: float, size: int) -> None:
    assert round_size(measured) == size


# --- without a probe ---


def of_a_model(seed: int, *, count: int = 120, first: float = 0.4, groups: int = 1) -> list[Event]:
    """As a model writes: at irregular times, in events of different sizes, at most so many at once."""
    chance = random.Random(seed)
    events: list[Event] = []
    now = first
    while len(events) < count:
        events += [Event(None, now, 180 + chance.randint(0, 12)) for _ in range(chance.randint(1, groups))]
        now += chance.uniform(0.01, 0.05)
    return events


def delivered(events: Sequence[Event], deliver: Delivery) -> list[Event]:
    size = sum(event.size for event in events) // len(events)
    times = deliver([event.received for event in events], size)
    return [Event(None, time, event.size) for event, time in zip(events, times, strict=True)]


@given(SEEDS, st.integers(1, 3), st.floats(0.05, 30))
def test_a_model_that_writes_some_tokens_at_a_time_is_no_alarm(seed: int, groups: int, first: float) -> None:
    assert arrival_without_probe(of_a_model(seed, groups=groups, first=first)).how == "alone"


@given(SEEDS)
def test_an_api_that_answers_all_at_once_is_held(seed: int) -> None:
    assert arrival_without_probe(delivered(of_a_model(seed), whole)).how == "whole"


@given(SEEDS, st.integers(1200, 3500))
def test_an_api_behind_a_buffer_is_held(seed: int, most: int) -> None:
    found = arrival_without_probe(delivered(of_a_model(seed, count=200), by_bytes(most, cuts=False)))
    assert found.how == "bytes"
    assert 0.7 * most <= found.size <= 1.4 * most + 200


@given(SEEDS, st.floats(0.2, 0.5))
def test_an_api_behind_a_timer_is_held(seed: int, interval: float) -> None:
    found = arrival_without_probe(delivered(of_a_model(seed, count=200), by_tick(interval, 0.0)))
    assert found.how in ("time", "bytes")
    assert found.how == "bytes" or 0.7 * interval <= found.seconds <= 1.3 * interval


def test_few_events_say_nothing() -> None:
    few = [Event(None, 3.0, 180)] * 7
    assert arrival_without_probe(few).how == arrival(few).how == "alone"
    assert not needs_another(few)


# --- findings ---


HEAD = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


def stream(**more: object) -> Stream:
    fields = HEAD | {"server": "sseproxy-probe"}
    usual = {
        "status": 200,
        "version": "1.1",
        "fields": fields,
        "head_at": 0.001,
        "events": stream_through(at_once, PLAN.events, PLAN.every, 256),
        "end": "complete",
        "ended_at": 3.3,
        "asked_in": "1.1",
    }
    return Stream(**(usual | more))  # type: ignore[arg-type]


BROKEN = stream(end="fin")


def hop(**more: object) -> Hop:
    usual = {
        "url": "http://edge/v1",
        "steady": stream(),
        "deaths": {"fin": BROKEN, "reset": BROKEN},
        "leaving": [Leaving(when="in mid-stream", silent=2.0, noticed=0.001)],
        "upload": Upload(size=20 << 20, status=200, pause=0.5, took=0.52),
        "reused": True,
        "continued": True,
    }
    return Hop(**(usual | more))  # type: ignore[arg-type]


def kinds(one: Hop) -> list[str]:
    (diagnosis,) = diagnose([one])
    return [finding.kind for finding in diagnosis.findings]


def text_of(one: Hop) -> str:
    (diagnosis,) = diagnose([one])
    (finding,) = diagnosis.findings
    return finding.text


def held(deliver: Delivery) -> dict[str, Stream]:
    return {
        "steady": stream(events=stream_through(deliver, PLAN.events, PLAN.every, 256)),
        "again": stream(events=stream_through(deliver, 150, PLAN.every * 0.4, 256)),
    }


def named(server: str, **more: str) -> Stream:
    return stream(fields=HEAD | {"server": server} | more)


def cut_at(seconds: float, **more: object) -> Stream:
    before = [event for event in stream().events if event.received < 0.4]
    return stream(**({"end": "reset", "events": before, "ended_at": before[-1].received + seconds} | more))


def test_nothing_is_wrong_with_a_right_hop() -> None:
    assert kinds(hop()) == []
    assert kinds(hop(silence=Silence(seconds=65, before=stream(), quiet=stream()))) == []
    assert kinds(hop(probed=False, deaths={}, leaving=[], upload=None, reused=None, continued=None)) == []
    verdict = sentence([hop()], diagnose([hop()]))
    assert verdict.startswith("No fault found: this path is unbuffered, and each event arrives alone")


PAGE = Stream(status=504, version="1.1", head_at=60.0, end="complete", ended_at=60.0, message="Gateway Time-out")
WRONG: dict[str, dict[str, Any]] = {
    "collects 1 KiB before it forwards": held(by_bytes(1024, cuts=True)),
    "holds the answer back until it ends, or until there is more than 37.5 KiB": held(whole),
    "holds events back for about 300 ms, by a timer": held(by_timer(0.3)),
    "cuts an answer after 3.25 s, although events come, by a reset": {"steady": stream(end="reset", ended_at=4.3)},
    "does not end an answer that its origin has ended": {"steady": stream(end="unread")},
    "cuts an answer after 60 s of silence, by a reset; a heartbeat every 15 s keeps it open": {
        "silence": Silence(seconds=65, before=stream(), quiet=cut_at(60), beats=stream(), every=15)
    },
    "cuts an answer after 60 s of silence, by a reset, or one that has not begun, with an error page (504)": {
        "silence": Silence(seconds=65, before=PAGE, quiet=cut_at(60))
    },
    "cuts an answer if it has not begun after 60 s, with an error page (504)": {
        "silence": Silence(seconds=65, before=PAGE, quiet=stream())
    },
    "cuts an answer after 15.4 s, although events come, by closing the connection": {
        "silence": Silence(
            seconds=65, before=stream(), quiet=cut_at(15, end="fin"), beats=cut_at(15, end="fin"), every=15
        )
    },
    "makes an answer look complete although the origin closes the connection in the middle": {
        "deaths": {"fin": stream(), "reset": BROKEN}
    },
    "makes an answer look complete although the origin closes the connection or resets the connection in the middle": {
        "deaths": {"fin": stream(), "reset": stream()}
    },
    "leaves the client waiting when the origin resets the connection in the middle": {
        "deaths": {"fin": BROKEN, "reset": stream(end="unread")}
    },
    "never tells the origin that a client has left in mid-stream": {
        "leaving": [Leaving(when="in mid-stream", silent=2.0)]
    },
    "notices that a client has left before the head only when the next event comes": {
        "leaving": [Leaving(when="before the head", silent=2.0, noticed=2.01)]
    },
    "notices only after 1.5 s that a client has left before the head": {
        "leaving": [Leaving(when="before the head", silent=3.0, noticed=1.5)]
    },
    "compresses the stream (gzip)": {"steady": named("x", **{"content-encoding": "gzip"})},
    "changes the Content-Type of a stream to text/plain": {
        "steady": stream(fields=HEAD | {"content-type": "text/plain"})
    },
    "takes Cache-Control: no-cache away, so a cache may keep answers": {
        "steady": stream(fields=HEAD | {"cache-control": "public, max-age=60"})
    },
    "gives a stream a Content-Length, so it has collected all of it": {"steady": named("x", **{"content-length": "9"})},
    "sends the response head only together with the first event": {"steady": stream(head_at=0.3)},
    "loses, repeats or changes events": {"steady": stream(garbled=True)},
    "writes events anew: their text is the same, their bytes are not": {"steady": stream(rewritten=True)},
    "refuses requests of more than 1 MiB (413)": {
        "upload": Upload(size=20 << 20, status=413, accepted=1 << 20, refused=1572864)
    },
    "refuses requests of 20 MiB (400)": {"upload": Upload(size=20 << 20, status=400, refused=20 << 20)},
    "collects an upload of 20 MiB before it forwards it": {
        "upload": Upload(size=20 << 20, status=200, pause=0.5, took=0.02)
    },
    "asks the next hop with HTTP/1.0, whose answers have no recognisable end": {"steady": stream(asked_in="1.0")},
    "closes the connection after an answer": {"reused": False},
    "does not answer Expect: 100-continue": {"continued": False},
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_said(text: str) -> None:
    assert text_of(hop(**WRONG[text])) == text


def test_a_head_that_came_late_once_was_read_late() -> None:
    late = stream(head_at=0.3)
    assert kinds(hop(steady=late, following=stream())) == []
    assert kinds(hop(steady=late, following=late)) == ["head"]


def test_the_hop_that_is_blamed_is_the_first_that_does_it() -> None:
    right = hop(url="http://one/v1")
    wrong = hop(url="https://edge.example", **held(by_bytes(1024, cuts=True)))
    after = hop(url="http://three/v1", **held(by_bytes(1024, cuts=True)))
    wrong_and_named = hop(
        url="https://edge.example",
        **held(by_bytes(1024, cuts=True))
        | {"steady": stream(**_of(held(by_bytes(1024, cuts=True))["steady"], "nginx"))},
    )
    diagnoses = diagnose([right, wrong_and_named, after])
    assert [len(one.own) for one in diagnoses] == [0, 1, 0]
    assert sentence([right, wrong_and_named, after], diagnoses) == (
        "The second hop, https://edge.example, which says it is nginx, collects 1 KiB before it forwards."
    )
    assert sentence([wrong, after], diagnose([wrong, after])).startswith(
        "The first hop, https://edge.example, collects"
    )
    assert sentence([wrong], diagnose([wrong])).startswith("This path, https://edge.example, collects")


def _of(one: Stream, server: str) -> dict[str, object]:
    return {"events": one.events, "fields": one.fields | {"server": server}}


def test_a_hop_that_makes_it_worse_is_blamed_as_well() -> None:
    hops = [hop(**held(by_bytes(1024, cuts=True))), hop(**held(whole))]
    assert [len(one.own) for one in diagnose(hops)] == [1, 1]
    hops = [hop(reused=False), hop(reused=False, **held(whole))]
    assert "1 more" not in sentence(hops, diagnose(hops)), "a note is no finding"


@pytest.mark.parametrize(
    ("fields", "claims"),
    [
        ({"server": "nginx/1.22.1"}, ["nginx"]),
        ({"server": "openresty"}, ["nginx"]),
        ({"server": "envoy", "via": "1.1 sseproxy"}, ["Envoy", "sseproxy"]),
        ({"via": "1.1 Caddy, 1.1 sseproxy"}, ["Caddy", "sseproxy"]),
        ({"server": "cloudflare", "cf-ray": "8a"}, ["Cloudflare"]),
        ({"server": "awselb/2.0"}, ["ALB"]),
        ({"apigw-requestid": "x"}, ["API Gateway"]),
        ({"x-azure-ref": "x"}, ["Azure Front Door"]),
        ({"x-powered-by": "Express"}, ["Express"]),
        ({"x-powered-by": "Next.js"}, ["Next.js"]),
        ({"server": "uvicorn"}, ["FastAPI"]),
        ({"server": "Apache/2.4"}, ["Apache"]),
        ({}, []),
    ],
)
def test_what_a_hop_says_it_is(fields: dict[str, str], claims: list[str]) -> None:
    assert claims_of(fields) == claims


def test_there_is_something_to_change_for_every_finding() -> None:
    for kind in get_args(Kind):
        assert remedies(kind, []), kind
        for program, change in remedies(kind, ["nginx"]):
            assert program in (*PROGRAMS, "")
            assert change
    assert [program for program, _ in remedies("buffered", ["nginx"])] == ["nginx", "ingress-nginx"]
    assert [program for program, _ in remedies("buffered", ["sseproxy"])] == list(PROGRAMS[:-1])
    assert [program for program, _ in remedies("refused", ["sseproxy"])] == ["sseproxy"]


def test_a_change_that_an_earlier_finding_of_the_hop_has_is_not_repeated() -> None:
    http_1_1 = 'nginx.ingress.kubernetes.io/proxy-http-version: "1.1"'
    _, truncation, http10 = changes(["buffered", "truncation", "http10"], ["nginx"])
    assert truncation == [("nginx", "as above"), ("ingress-nginx", http_1_1)]
    assert http10 == [("nginx", 'proxy_set_header Connection "";'), ("ingress-nginx", "as above")]
    assert changes(["http10"], ["nginx"]) == [remedies("http10", ["nginx"])]
