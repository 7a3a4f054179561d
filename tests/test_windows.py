"""Sliding windows: no limit is felt too early, none is exceeded in a fixed window, and whoever waits is let in."""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.ledger import windows
from sseproxy.ledger.table import Ledger, Row
from sseproxy.ledger.windows import Use, Window, added, cell, is_over, used_in

USES = st.builds(
    lambda present, last, share, seconds: Use.of(present, last, share * seconds, seconds),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1, 60, 3600, 86_400]),
)


class Column:
    """A column with one worker."""

    def __init__(self) -> None:
        self.own = 0

    def put(self, value: int) -> None:
        self.own = value

    def all(self) -> list[int]:
        return [self.own]


class Readable(Protocol):
    def all(self) -> list[int]: ...


def used(columns: tuple[Readable, Readable], now: float) -> Use:
    """What was used within a minute."""
    even, odd = columns
    return Window((Column(), Column()), 60).use(even.all(), odd.all(), now)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def later(use: Use, seconds: float) -> Use:
    """The same use after so many seconds in which nothing more is used."""
    at = use.elapsed + seconds
    if at < use.seconds:
        return Use.of(use.present, use.last, at, use.seconds)
    if at < 2 * use.seconds:
        return Use.of(0, use.present, at - use.seconds, use.seconds)
    return Use.of(0, 0, 0.0, use.seconds)


@given(USES, st.integers(1, 20_000), st.integers(1, 20_000))
def test_whoever_waits_as_long_as_told_is_let_in(use: Use, limit: int, amount: int) -> None:
    wait = use.wait(limit, amount)
    if amount > limit:
        assert wait == inf
        return
    assert 0 <= wait <= 2 * use.seconds
    assert (wait == 0) == (use.total + amount <= limit)
    # As it is told, in whole milliseconds.
    assert later(use, wait + 0.001).wait(limit, amount) == 0


@given(USES, st.integers(1, 20_000), st.integers(1, 20_000))
def test_nobody_is_told_to_wait_much_longer_than_needed(use: Use, limit: int, amount: int) -> None:
    wait = use.wait(limit, amount)
    if 0 < wait < inf:
        early = later(use, max(0.0, wait - 0.001))
        assert early.wait(limit, amount) > 0 or wait <= 0.001


STEPS = st.lists(st.tuples(st.floats(0, 70), st.integers(1, 30)), max_size=60)


@given(STEPS, st.integers(30, 100))
def test_a_limit_holds_in_each_fixed_window_and_is_not_felt_without_use(
    steps: list[tuple[float, int]], limit: int
) -> None:
    clock = Clock()
    window = Window(columns := (Column(), Column()), 60)
    let_in: list[tuple[float, int]] = []
    for pause, amount in steps:
        clock.now += pause
        if not used(columns, clock.now).wait(limit, amount):
            window.add(amount, clock.now)
            let_in.append((clock.now, amount))
        else:
            # What lies in the two fixed windows at most counts.
            begun = clock.now // 60 * 60 - 60
            assert sum(before for at, before in let_in if at >= begun) + amount > limit
    by_window: Counter[float] = Counter()
    for at, amount in let_in:
        by_window[at // 60] += amount
    assert all(amount <= limit for amount in by_window.values())


@given(st.lists(st.tuples(st.floats(0, 200), st.integers(0, 3), st.integers(1, 1 << 20)), max_size=30))
def test_the_workers_of_a_table_count_together_whoever_has_ended(steps: list[tuple[float, int, int]]) -> None:
    """As dictionaries would, whatever workers end in between."""
    ledger, clock = Ledger(rows=4), Clock()
    columns = ledger.columns(windows.names("a", 60), ())
    rows: dict[int, Row] = {}
    counted: Counter[int] = Counter()
    try:
        for pause, who, amount in steps:
            clock.now += pause
            if who in rows and amount % 3 == 0:
                # As after a kill -9: the supervisor frees the row.
                ledger.free_row(rows.pop(who).number)
            row = rows.setdefault(who, ledger.row(ledger.take_row(), columns) if who not in rows else rows.get(who))  # type: ignore[arg-type]
            window = row.window("a", 60)
            window.add(amount, clock.now)
            number = int(clock.now // 60)
            counted[number] += amount
            use = used(window.columns, clock.now)
            assert (use.present, use.last) == (counted[number], counted[number - 1])
        for row in rows.values():
            ledger.free_row(row.number)
        watcher = ledger.row(ledger.take_row(), columns)
        number = int(clock.now // 60)
        use = used(watcher.window("a", 60).columns, clock.now)
        assert (use.present, use.last) == (counted[number], counted[number - 1])
    finally:
        ledger.close()


CELLS = st.builds(cell, st.integers(0, 40).map(lambda number: 2 * number), st.integers(0, 1 << 41))


@given(CELLS, CELLS, CELLS)
def test_cells_are_added_in_any_order(one: int, two: int, three: int) -> None:
    assert added(one, two) == added(two, one)
    assert added(added(one, two), three) == added(one, added(two, three))
    assert 0 <= added(one, two) < 1 << 63


@given(st.integers(0, 80), st.lists(CELLS | st.just(0)))
def test_what_was_used_in_a_window_is_what_its_cells_say(number: int, cells: list[int]) -> None:
    assert used_in(number, cells) == sum(one & ((1 << 40) - 1) for one in cells if one >> 40 == number)


def test_the_numbers_of_windows_start_again() -> None:
    last = (1 << 23) - 1
    assert added(cell(last, 5), cell(last + 2, 7)) == cell(1, 7)
    assert used_in(last + 2, [cell(1, 7), cell(last, 5)]) == 7
    assert cell(3, 1 << 50) == cell(3, (1 << 40) - 1)


@pytest.mark.parametrize(("now", "over"), [(60.0, False), (119.0, False), (179.0, False), (180.0, True)])
def test_a_window_is_over_when_it_counts_no_more(now: float, over: bool) -> None:
    assert is_over([0, cell(1, 9)], 60, now) == over


def test_columns_that_count_nothing_any_more_are_free_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, clock = Ledger(rows=2), Clock()
    monkeypatch.setattr("sseproxy.ledger.table.perf_counter", clock)
    old, new = windows.names("old", 60), windows.names("new", 60)
    row = ledger.row(ledger.take_row(), columns := ledger.columns(old, ()))
    row.window("old", 60).add(5, clock.now)
    ledger.free_row(row.number)
    ledger.columns(new, ())
    assert set(old) & ledger.names
    clock.now = 180.0
    taken = ledger.columns([*new, "x", "y"], ())
    assert not set(old) & ledger.names
    assert set(columns.values()) & set(taken.values())
    assert [ledger.count(name).all() for name in ("x", "y")] == [[0], [0]]
    ledger.close()


def test_what_was_used_is_kept_over_an_upgrade() -> None:
    ledger = Ledger(rows=3)
    columns = ledger.columns(windows.names("a", 60), ())
    rows = [ledger.row(ledger.take_row(), columns) for _ in range(3)]
    for row in rows:
        row.window("a", 60).add(2, 0.0)
    ledger.free_row(rows[0].number)
    # The second worker ends while nobody looks.
    again = Ledger.left(ledger.leave(), [rows[2].number])
    window = again.row(rows[2].number, columns).window("a", 60)
    assert used(window.columns, 0.0).present == 6
    again.close()
