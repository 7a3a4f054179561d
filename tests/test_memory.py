"""What a served proxy holds in the worst situations stays within the bounds of the README.

The situations, and how they are measured, are `make memory`'s, with fewer streams and shorter ones: what is held once,
however many streams there are, weighs more here, and still the least of these streams is many times its bound.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench import hostile, memory
from bench.memory import Figures
from bench.watch import KIB, MIB

README = (Path(__file__).parent.parent / "README.md").read_text()
BENCH = (Path(__file__).parent.parent / "bench" / "README.md").read_text()


def within_bound(figures: Figures) -> bool:
    return 0 < figures.cost < figures.bound.size


async def test_a_client_that_does_not_read_holds_little_of_its_stream() -> None:
    assert within_bound(await memory.stalled_clients(50, 64 * MIB))


async def test_an_upstream_that_does_not_read_holds_little_of_an_upload() -> None:
    assert within_bound(await memory.uploads(50, 64 * MIB))


async def test_the_heads_of_many_clients_are_refused_before_they_hold_much() -> None:
    assert within_bound(await memory.heads_of_clients(200))


async def test_the_heads_of_many_responses_are_refused_before_they_hold_much() -> None:
    assert within_bound(await memory.heads_of_upstreams(200))


async def test_streams_between_events_hold_little() -> None:
    assert within_bound(await memory.idle_streams(500))


async def test_an_event_without_end_is_not_kept() -> None:
    assert within_bound(await memory.endless_line(96 * MIB))


async def test_a_hundred_thousand_events_leave_nothing() -> None:
    assert within_bound(await memory.tiny_events(100_000))


async def test_requests_leave_nothing() -> None:
    assert within_bound(await memory.short_requests(8_000))


def test_the_readme_promises_these_bounds() -> None:
    table = README[README.index("## Memory in the worst case") :]
    promised = re.findall(r"^\| ([^|]+) \|.*\| (\d+) ([KM]iB)( each)? \|$", table, re.M)
    bounds = [value for value in vars(memory).values() if isinstance(value, memory.Bound)]
    assert {
        (situation, int(size) * (KIB if unit == "KiB" else MIB), bool(each)) for situation, size, unit, each in promised
    } == {(bound.situation, bound.size, bound.each) for bound in bounds}


def test_the_page_shows_what_the_hostile_may_send() -> None:
    table = BENCH[BENCH.index("largest gap of the stream") :]
    bounds = [value.situation for value in vars(hostile).values() if isinstance(value, hostile.Bound)]
    assert re.findall(r"^\| ([A-Z][^|]+) \|", table, re.M) == bounds
