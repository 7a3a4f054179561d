"""The rules of a fleet without a fleet: whom to ask, how often, and what workers know of endpoints."""

from __future__ import annotations

import asyncio
import os
import string
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise
from time import perf_counter, thread_time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sseproxy import config
from sseproxy.config.values import RETRIES, Source
from sseproxy.ledger import endpoints as ends
from sseproxy.ledger.endpoints import MAX_ADDRESSES, Addresses, Standing
from sseproxy.ledger.table import Ledger, Row, alone, opened
from sseproxy.relay.admission import counted
from sseproxy.relay.affinity import key_of
from sseproxy.relay.pool import Upstream, micros
from sseproxy.relay.retry import Course, Failure, Repeatable, Step, retry_after
from sseproxy.wire.headers import Fields
from sseproxy.wire.refusals import is_too_long

# --- which endpoint is asked ---


@asynccontextmanager
async def upstreams(*sizes: int, affinity: bool = False) -> AsyncIterator[list[Upstream]]:
    """One upstream for each of `sizes`, with so many endpoints."""
    made = [
        config.Upstream(
            name=f"up{number}",
            urls=tuple(config.Endpoint(url=f"http://node-{number}-{one}.test/v1") for one in range(size)),
        )
        for number, size in enumerate(sizes)
    ]
    targets = tuple(config.Target(name=one.name) for one in made)
    route = config.Route(name="api", match=config.Match(path="/v1"), upstream=targets)
    settings = config.Config(upstreams=tuple(made), routes=(route,))
    row = alone(counted(settings))
    pools = [Upstream(one, settings.limits, row, row.count(f"pending {one.name}"), counted=True) for one in made]
    try:
        yield pools
    finally:
        for pool in pools:
            await pool.close()


def active(pool: Upstream) -> list[int]:
    return [end.standing.active.total() for end in pool.endpoints if end.standing is not None]


async def play_choice(size: int, steps: list[int | None], keys: int) -> None:
    async with upstreams(size) as (pool,):
        under_way: list[Standing] = []
        for step in steps:
            if step is None:
                before = active(pool)
                endpoint = pool.choose("m", b"%d" % (len(under_way) % keys) if keys else None)
                assert endpoint is not None
                assert endpoint.standing is not None
                mine, mean = endpoint.standing.active.total(), (sum(before) + 1) / size
                if keys:
                    # Never above the bound while another one has less.
                    assert mine < 1.25 * mean
                    assert mine + 1 <= 1.25 * mean + 1
                else:
                    assert mine == min(before)
                endpoint.standing.active.add(1)
                under_way.append(endpoint.standing)
            elif under_way:
                under_way.pop(step % len(under_way)).active.add(-1)


@given(st.integers(1, 6), st.lists(st.none() | st.integers(0, 50), max_size=60), st.integers(0, 4))
@property_settings(max_examples=60)
def test_the_least_active_is_chosen_and_none_is_overloaded(size: int, steps: list[int | None], keys: int) -> None:
    asyncio.run(play_choice(size, steps, keys))


async def test_equal_ones_take_turns() -> None:
    async with upstreams(4) as (pool,):
        chosen = [pool.choose(None, None) for _ in range(12)]
        assert Counter(chosen) == dict.fromkeys(pool.endpoints, 3)
        assert len(set(chosen[:4])) == 4


async def test_endpoints_that_come_and_go_move_few_keys() -> None:
    """Only the keys of an endpoint that is gone move, and only to a new endpoint."""
    keys = [b"%016d" % number for number in range(600)]
    async with upstreams(5) as (pool,):
        before = {key: pool.choose(None, key) for key in keys}
        assert {key: pool.choose(None, key) for key in keys} == before
        # They are spread.
        assert min(Counter(before.values()).values()) > 60
        gone = pool.endpoints[2]
        assert gone.standing is not None
        gone.standing.eject(1, None)
        after = {key: pool.choose(None, key) for key in keys}
        assert {key for key in keys if before[key] is not after[key]} == {k for k in keys if before[k] is gone}
        gone.standing.admit(0)
        assert {key: pool.choose(None, key) for key in keys} == before


async def test_what_rests_rests_for_its_model_only_and_not_for_ever() -> None:
    async with upstreams(2) as (pool,):
        one, other = pool.endpoints
        pool.rest(one, "m", 1e9)
        assert {pool.choose("m", None) for _ in range(4)} == {other}
        assert {pool.choose("n", None) for _ in range(4)} == {one, other}
        assert pool._rests.until("up0 node-0-0.test:80 m", 0) <= micros() + 60_000_000
        pool.rest(other, None, 5)
        assert {pool.choose("n", None) for _ in range(4)} == {one}
        assert pool.choose("m", None) is None
        assert {pool.choose("m", None, any_state=True) for _ in range(4)} == {one, other}


async def test_a_trial_is_one_request() -> None:
    async with upstreams(2) as (pool,):
        one, other = pool.endpoints
        assert one.standing is not None
        one.standing.eject(7, 0)
        assert [pool.choose(None, None) for _ in range(4)] == [one, other, other, other]
        one.standing.eject(8, 0)
        assert pool.choose(None, b"key") is one
        one.standing.eject(9, None)
        assert pool.choose(None, None) is other


# --- what is tried again ---

REASONS = [*(reason for reason in RETRIES if reason != "same"), "key", "context", "truncated", "error", "empty"]
FAILURES = st.builds(Failure, st.sampled_from(REASONS), st.none() | st.floats(0, 100))


async def play_course(
    sizes: list[int], options: config.Retry, failures: list[Failure], repeatable: Repeatable, age: float
) -> None:
    async with upstreams(*sizes) as pools:
        targets = [(config.Target(name=pool.name), pool) for pool in pools]
        course = Course(options, targets, "m", None, perf_counter() - age)
        step = course.first()
        asked: list[Step] = []
        for failure in failures:
            assert step is not None
            asked.append(step)
            step = course.next(failure, repeatable)
            assert course.attempts == len(asked) + (step is not None)
            if step is None:
                break
            check_step(asked, step, failure, options, repeatable, age)


def check_step(
    asked: list[Step], step: Step, failure: Failure, options: config.Retry, repeatable: Repeatable, age: float
) -> None:
    reason = failure.reason
    assert repeatable == "always" or reason in ("connect", "key", "context", "429", "503", "529")
    assert repeatable != "connect" or reason == "connect"
    opted_in = {"key", "context", "truncated", "error", "empty"} | set(options.on)
    assert reason in opted_in or (options.until != "head" and reason in ("reset", "timeout"))
    assert options.until == "end" or age + step.pause < options.within
    here = [one for one in asked if one.upstream is step.upstream]
    assert len(here) < options.attempts or not here
    again = sum(one.endpoint is step.endpoint for one in here)
    if again:
        assert "same" in options.on
        assert again == 1
        # No other one is left, and it is not asked at once.
        assert {one.endpoint for one in here} == set(step.upstream.endpoints)
        assert reason not in ("timeout", "key", "context")
        assert step.pause > 0 or failure.retry_after == 0
        assert step.pause <= max(options.wait, 0.75)
    elif here:
        assert step.pause == 0
        assert reason != "context"
    # Upstreams are asked in their order.
    assert step.upstream.name >= asked[-1].upstream.name
    assert step.later == (reason != "connect")


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.lists(st.sampled_from(RETRIES), unique=True),
    st.integers(1, 4),
    st.sampled_from(["head", "first_token", "end"]),
    st.lists(FAILURES, min_size=1, max_size=12),
    st.sampled_from(["always", "refused", "connect"]),
    st.sampled_from([0.0, 0.0, 0.0, 29.9, 31.0]),
)
@property_settings(max_examples=200)
def test_a_course_keeps_to_its_rules(
    sizes: list[int],
    on: list[Any],
    attempts: int,
    until: Any,
    failures: list[Failure],
    repeatable: Repeatable,
    age: float,
) -> None:
    options = config.Retry(on=tuple(on), attempts=attempts, until=until)
    asyncio.run(play_course(sizes, options, failures, repeatable, age))


@pytest.mark.parametrize(("under_way", "most"), [(0, 3), (10, 3), (15, 3), (20, 4), (100, 20)])
async def test_later_attempts_are_a_fifth_at_most(under_way: int, most: int) -> None:
    async with upstreams(2) as (pool,):
        standing = pool.endpoints[0].standing
        assert standing is not None
        assert pool.later is not None
        standing.active.add(under_way)
        made = 0
        while True:
            course = Course(config.Retry(), [(config.Target(name="up0"), pool)], None, None, perf_counter())
            assert course.first() is not None
            # What could not be connected to is always tried elsewhere.
            assert Course.next(course, Failure("connect"), "always") is not None
            course = Course(config.Retry(), [(config.Target(name="up0"), pool)], None, None, perf_counter())
            course.first()
            if course.next(Failure("429"), "always") is None:
                break
            pool.later.add(1)
            made += 1
        assert made == most


# --- what an answer says of when to come back ---


@given(st.binary(max_size=60) | st.text(string.digits + ".-+eE ", max_size=20).map(str.encode))
def test_a_time_to_wait_is_a_time_or_none(value: bytes) -> None:
    for name in (b"Retry-After", b"retry-after-ms"):
        found = retry_after(Fields([(name, value)]))
        assert found is None or 0 <= found < float("inf")


@given(st.integers(1, 12), st.integers(1, 10**30), st.integers(0, 10**30), st.sampled_from("+-"))
def test_a_date_may_be_none_that_there_is(month: int, year: int, zone: int, sign: str) -> None:
    value = f"Mon, {month} {'Jan Feb Mar Apr'.split()[month % 4]} {year} {zone}:00:00 {sign}{zone}".encode()
    found = retry_after(Fields([(b"Retry-After", value)]))
    assert found is None or found >= 0


@given(st.integers(0, 999_999), st.integers(0, 99))
def test_seconds_and_milliseconds_are_told_apart(seconds: int, hundredths: int) -> None:
    value = b"%d.%02d" % (seconds, hundredths)
    assert retry_after(Fields([(b"Retry-After", value)])) == float(value)
    found = retry_after(Fields([(b"Retry-After", b"7"), (b"retry-after-ms", value)]))
    assert found == pytest.approx(float(value) / 1000)


@given(st.integers(5, 10_000_000))
def test_a_date_is_seconds_from_now(seconds: int) -> None:
    value = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True).encode()
    found = retry_after(Fields([(b"Retry-After", value)]))
    assert found is not None
    assert seconds - 3 < found <= seconds


# --- what a request is assigned by ---

SOURCES = (Source("header", "X-Session"), Source("field", "prompt_cache_key"), Source("prefix", "40"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.dictionaries(
    st.sampled_from(["prompt_cache_key", "messages", "input", "contents", "prompt", "user", "model"]), VALUES
).map(msgspec.json.encode)


@given(BODIES | st.binary(max_size=60), st.lists(st.integers(0, 200), max_size=8))
def test_a_key_is_the_same_however_a_body_is_split(body: bytes, cuts: list[int]) -> None:
    at = sorted({0, len(body), *(min(cut, len(body)) for cut in cuts)})
    parts = [body[start:stop] for start, stop in pairwise(at)]

    async def keys() -> None:
        nothing = Fields([])
        whole = await key_of(SOURCES, nothing, [body])
        assert await key_of(SOURCES, nothing, parts) == whole
        assert await key_of(SOURCES, nothing, list(map(bytes, zip(body, strict=False)))) == whole
        # The first source counts, and values of different sources are never the same.
        header = await key_of(SOURCES, Fields([(b"x-session", b"1")]), parts)
        assert header is not None
        assert header != whole
        assert await key_of(SOURCES, nothing, None) is None

    asyncio.run(keys())


@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30), VALUES)
def test_a_field_decides_alone(one: str, other: str, rest: object) -> None:
    def body(key: str, more: object) -> list[bytes]:
        return [msgspec.json.encode({"messages": more, "prompt_cache_key": key})]

    async def keys() -> None:
        found = await key_of(SOURCES, Fields([]), body(one, rest))
        assert found == await key_of(SOURCES, Fields([]), body(one, [rest, "more"]))
        assert (found == await key_of(SOURCES, Fields([]), body(other, rest))) == (one == other)

    asyncio.run(keys())


# --- prompts that are too long ---

ORDINARY = [
    b'{"error":{"message":"Invalid value for max_tokens: must be at least 1","code":"invalid_value"}}',
    b'{"error":{"message":"max_tokens is too large: 99. This model supports at most 16 completion tokens"}}',
    b'{"error":{"message":"The model `gpt-9` does not exist","code":"model_not_found"}}',
    b'{"error":{"message":"Your request was rejected by our content filter","code":"content_filter"}}',
    b'{"error":{"message":"Rate limit: too many requests","code":"rate_limit_exceeded"}}',
    b'{"error":{"message":"You exceeded your current quota","code":"insufficient_quota"}}',
    b'{"type":"error","error":{"type":"invalid_request_error","message":"messages: at least one is required"}}',
    b'{"error":{"message":"Unrecognized request argument supplied: stream_options"}}',
    b'{"error":{"message":"image is too large: 9 MB exceeds the maximum of 5 MB"}}',
    b'{"error":{"message":"tools: too many tools, the maximum is 128"}}',
    b'{"error":{"message":"stop: too many stop sequences"}}',
    b'{"error":{"message":"temperature exceeds the maximum of 2"}}',
]


@pytest.mark.parametrize("text", ORDINARY)
def test_other_refusals_are_no_long_prompts(text: bytes) -> None:
    assert not is_too_long(text)


@given(st.text(string.ascii_lowercase + ' {}":,.', max_size=400))
def test_texts_at_random_are_no_long_prompts(text: str) -> None:
    words = ("context", "too long", "tokens", "maximum", "exceed")
    assert not is_too_long(text.encode()) or any(word in text for word in words)


@pytest.mark.parametrize(
    "piece",
    [b"maximum ", b"max context ", b"model's ", b"exceeds the available ", b"input length ", b"tokens + `", b"i", b" "],
)
def test_a_hostile_answer_takes_no_longer_than_its_size(piece: bytes) -> None:
    def took(size: int) -> float:
        body = piece * (size // len(piece))
        times = []
        for _ in range(3):
            begun = thread_time()
            is_too_long(body)
            times.append(thread_time() - begun)
        return min(times)

    took(1 << 12)
    # 16 times as much takes about 16 times as long, not 256 times.
    assert took(1 << 18) < 90 * took(1 << 14) + 0.01


# --- what workers know of endpoints ---


class Workers(RuleBasedStateMachine):
    """Workers fail, succeed and end in any order. What the supervisor learns is compared with a list of events."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(rows=5)
        names = ends.endpoint_counts("up", "node")
        columns = self.ledger.columns(names, ())
        self.supervisor = Standing(self.ledger.own(columns), "up", "node")
        self.columns = columns
        self.workers: dict[int, Standing] = {}
        self.events: list[tuple[int, int, str]] = []
        self.now = 0
        self.serial = 0
        # Which worker is to try it, and whether it has.
        self.out: int | None = None
        self.is_out = self.tried = False

    def teardown(self) -> None:
        self.ledger.close()

    def _later(self) -> int:
        self.now += 1
        return self.now

    @precondition(lambda self: len(self.workers) < 3)
    @rule()
    def begins(self) -> None:
        number = self.ledger.take_row()
        self.workers[number] = Standing(opened(os.dup(self.ledger.fd), number, self.columns), "up", "node")
        if number == self.out:
            # It does not know that the worker before it has tried.
            self.tried = False

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), refused=st.booleans())
    def fails(self, data: st.DataObject, refused: bool) -> None:
        number = data.draw(st.sampled_from([*self.workers]))
        self.workers[number].failed(self._later(), refused=refused)
        self.events.append((self.now, number, "refused" if refused else "failed"))

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def succeeds(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([*self.workers]))
        self.workers[number].succeeded(self._later())
        self.events.append((self.now, number, "succeeded"))

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        # The supervisor looks more often than workers die.
        self.supervisor.evidence()
        number = data.draw(st.sampled_from([*self.workers]))
        self.ledger.free_row(number)
        del self.workers[number]
        self.events = [event for event in self.events if event[1] != number or event[2] == "succeeded"]

    @rule(data=st.data())
    def ejects(self, data: st.DataObject) -> None:
        self.serial += 1
        trial = data.draw(st.none() | st.sampled_from([*self.workers])) if self.workers else None
        self.supervisor.eject(self.serial, trial)
        self.out, self.is_out, self.tried = trial, True, False

    @rule()
    def admits(self) -> None:
        self.supervisor.admit(self._later())
        self.out, self.is_out = None, False
        self.events.append((self.now, -1, "succeeded"))

    @precondition(lambda self: any(standing.on_trial for standing in self.workers.values()))
    @rule()
    def tries(self) -> None:
        (number,) = (number for number, standing in self.workers.items() if standing.on_trial)
        assert number == self.out
        self.workers[number].try_once()
        self.tried = True

    @invariant()
    def the_supervisor_knows_what_happened(self) -> None:
        last = max((at for at, _, what in self.events if what == "succeeded"), default=0)
        late = [what for at, _, what in self.events if at > last and what != "succeeded"]
        evidence = self.supervisor.evidence()
        assert (evidence.failures, evidence.refusals) == (len(late), late.count("refused"))
        assert evidence.succeeded_at == last

    @invariant()
    def one_worker_tries_and_the_others_do_not(self) -> None:
        for number, standing in self.workers.items():
            assert standing.is_out == self.is_out
            assert standing.on_trial == (self.is_out and self.out == number and not self.tried)
            assert standing.usable == (not standing.is_out or standing.on_trial)


TestWorkers = Workers.TestCase
TestWorkers.settings = property_settings(max_examples=60, stateful_step_count=30, deadline=None)

ADDRESSES = st.ip_addresses().filter(lambda one: int(one) != 0 and getattr(one, "ipv4_mapped", None) is None)


@pytest.fixture
def supervisor() -> Iterator[tuple[Row, Row]]:
    ledger = Ledger(rows=2)
    columns = ledger.columns(ends.address_counts("up host:80"), ())
    yield ledger.own(columns), opened(os.dup(ledger.fd), ledger.take_row(), columns)
    ledger.close()


def test_addresses_arrive_as_they_were(supervisor: tuple[Row, Row]) -> None:
    told, read = (Addresses(row, "up host:80") for row in supervisor)

    @given(st.lists(st.dictionaries(st.integers(0, MAX_ADDRESSES - 1), ADDRESSES, max_size=8), max_size=3))
    def check(changes: list[dict[int, IPv4Address | IPv6Address]]) -> None:
        for change in changes:
            version = read.version
            told.replace(change, version + 1)
            assert read.read() == change
            assert read.version != version

    check()
    told.replace({0: ip_address("::ffff:192.0.2.1")}, 9**9)
    assert read.read() == {0: IPv4Address("192.0.2.1")}


class Resting(RuleBasedStateMachine):
    """What any worker has told to rest rests for all."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(rows=3)
        self.rows = [opened(os.dup(self.ledger.fd), self.ledger.take_row(), {}) for _ in range(3)]
        self.until: dict[tuple[int, str], int] = {}
        self.now = 1

    def teardown(self) -> None:
        self.ledger.close()

    @rule(row=st.integers(0, 2), name=st.sampled_from("abc"), seconds=st.integers(1, 50))
    def rests(self, row: int, name: str, seconds: int) -> None:
        self.rows[row].rests.add(name, self.now + seconds)
        self.until[row, name] = self.now + seconds

    @rule(seconds=st.integers(1, 20))
    def passes(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def all_know(self) -> None:
        for row in self.rows:
            assert row.rests.any(self.now) == any(until > self.now for until in self.until.values())
            for name in "abcd":
                known = max((until for (_, of), until in self.until.items() if of == name), default=0)
                found = row.rests.until(name, self.now)
                assert (found > self.now) == (known > self.now)
                assert found <= self.now or found == known


TestResting = Resting.TestCase
TestResting.settings = property_settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_many_rests_take_no_more_room() -> None:
    row = alone([])
    for number in range(1_000):
        row.rests.add(f"name {number}", 1_000 + number)
    assert sum(row.rests.until(f"name {number}", 1) > 1 for number in range(1_000)) == 255
    assert row.rests.until("name 999", 1) == 1_999
    assert row.rests.until("name 0", 1) <= 1
