"""The ledger: whatever workers do, and in whatever order, sums are right, and nothing is left when they have ended."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sseproxy.ledger.table import Columns, Count, Ledger, Loads, Row, alone, opened

NAMES = ["connections", "active", "route a"]
MARKS = ["ejected a", "ejected b"]
CLIENTS = [f"192.0.2.{number}" for number in range(5)]


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger(rows=4)
    yield ledger
    ledger.close()


def worker(ledger: Ledger, names: list[str] | None = None) -> Row:
    """As a process that has inherited the file."""
    columns = ledger.columns(NAMES if names is None else names, ())
    return opened(os.dup(ledger.fd), ledger.take_row(), columns)


class Workers(RuleBasedStateMachine):
    """Workers come, count and end in any order; the table is compared with dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(rows=4)
        self.rows: dict[Row, Counter[str]] = {}
        self.clients: dict[Row, Counter[str]] = {}
        # As some worker reads them that has seen others come and go.
        self.loads: dict[Row, Loads] = {}
        self.columns: dict[Row, tuple[list[Count], Columns]] = {}
        self.marks: Counter[str] = Counter()
        self.resting: set[Row] = set()

    def teardown(self) -> None:
        for row in self.rows:
            self.ledger.free_row(row.number)
        assert [self.ledger.count(name).each() for name in self.ledger.names] == [[]] * len(self.ledger.names)
        self.ledger.close()

    @precondition(lambda self: len(self.rows) < 4)
    @rule()
    def begins(self) -> None:
        row = worker(self.ledger, [*NAMES, *MARKS])
        self.rows[row], self.clients[row] = Counter(), Counter()
        self.loads[row] = Loads([row.count(name) for name in NAMES], [row.told(name) for name in MARKS])
        counts = [row.count(name) for name in (*MARKS, *reversed(NAMES))]
        self.columns[row] = counts, Columns(counts)

    @rule(name=st.sampled_from(MARKS), serial=st.integers(0, 3))
    def marks_or_not(self, name: str, serial: int) -> None:
        self.ledger.own(self.ledger.columns([*NAMES, *MARKS], ())).count(name).put(serial)
        self.marks[name] = serial

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), rests=st.booleans())
    def rests_or_not(self, data: st.DataObject, rests: bool) -> None:
        row = data.draw(st.sampled_from([*self.rows]))
        if rests:
            row.rests.add("a", 9)
            self.resting.add(row)
        else:
            row.rests.any(10)
            self.resting.discard(row)

    @invariant()
    def loads_are_the_sums_as_long_as_nothing_rests_or_is_marked(self) -> None:
        usual = not (self.resting or any(self.marks.values()))
        sums = [sum(counts[name] for counts in self.rows.values()) for name in NAMES]
        for loads in self.loads.values():
            found = loads.read()
            assert (None if found is None else list(found)) == (sums if usual else None)

    @invariant()
    def columns_are_the_same_as_one_by_one(self) -> None:
        for counts, columns in self.columns.values():
            assert columns.read() == [tuple(count.all()) for count in counts]

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), name=st.sampled_from(NAMES), number=st.integers(1, 1 << 40))
    def takes(self, data: st.DataObject, name: str, number: int) -> None:
        row = data.draw(st.sampled_from([*self.rows]))
        row.count(name).add(number)
        self.rows[row][name] += number

    @precondition(lambda self: any(map(any, map(Counter.values, self.rows.values()))))
    @rule(data=st.data())
    def gives_back(self, data: st.DataObject) -> None:
        row, name = data.draw(st.sampled_from([(row, name) for row in self.rows for name in +self.rows[row]]))
        row.count(name).add(-self.rows[row][name])
        del self.rows[row][name]

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), client=st.sampled_from(CLIENTS))
    def client_comes(self, data: st.DataObject, client: str) -> None:
        row = data.draw(st.sampled_from([*self.rows]))
        row.clients.add(client, 1)
        self.clients[row][client] += 1

    @precondition(lambda self: any(map(any, map(Counter.values, self.clients.values()))))
    @rule(data=st.data())
    def client_goes(self, data: st.DataObject) -> None:
        row, client = data.draw(
            st.sampled_from([(row, client) for row in self.clients for client in +self.clients[row]])
        )
        row.clients.add(client, -1)
        self.clients[row][client] -= 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        """In whatever state it is."""
        row = data.draw(st.sampled_from([*self.rows]))
        self.ledger.free_row(row.number)
        del self.rows[row], self.clients[row]
        self.resting.discard(row)

    @invariant()
    def sums_are_right(self) -> None:
        for name in self.ledger.names:
            count = self.ledger.count(name)
            assert count.total() == sum(counted[name] for counted in self.rows.values())
            assert min(count.each(), default=0) >= 0
        for row, counted in self.rows.items():
            assert {name: row.count(name).own for name in +counted} == +counted
            for client in CLIENTS:
                others = sum(self.clients[other][client] for other in self.rows if other is not row)
                assert others <= row.clients.others(client) <= sum(map(Counter.total, self.clients.values()))


TestWorkers = Workers.TestCase
TestWorkers.settings = property_settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_client_is_not_taken_for_others(ledger: Ledger) -> None:
    one, other = worker(ledger), worker(ledger)
    for number in range(1_000):
        other.clients.add(f"2001:db8:0:{number:x}::", 1)
    assert not any(one.clients.others(f"198.51.{number % 256}.{number // 256}") for number in range(1_000))
    assert one.clients.others("2001:db8:0:7::") == 1


def test_workers_that_end_leave_their_rows_to_others(ledger: Ledger) -> None:
    rows = [worker(ledger) for _ in range(4)]
    with pytest.raises(OSError, match="no more than 4 workers"):
        ledger.take_row()
    rows[1].count("active").add(7)
    rows[3].count("active").add(1)
    ledger.free_row(1)
    assert ledger.count("active").each() == [0, 0, 0, 1]
    assert worker(ledger).number == 1
    ledger.free_row(3)
    assert ledger.count("active").each() == [0, 0, 0]


def test_workers_that_have_ended_take_no_memory(ledger: Ledger) -> None:
    rows = [worker(ledger) for _ in range(4)]
    for row in rows:
        for number in range(5_000):
            row.clients.add(f"2001:db8:0:{number:x}::", 1)
    assert os.fstat(ledger.fd).st_blocks * 512 > 4 << 20
    for row in rows:
        ledger.free_row(row.number)
    assert os.fstat(ledger.fd).st_blocks * 512 <= 64 << 10


def test_names_that_come_and_go_take_no_more_room(ledger: Ledger) -> None:
    row = worker(ledger, ["route old", "kept"])
    row.count("route old").add(1)
    old, kept = ledger.columns(["route old", "kept"], ()).values()
    # It is configured no more, and an exchange on it is still under way.
    assert ledger.columns(["route new"], {"kept"})["route new"] not in (old, kept)
    assert "route old" in ledger.names
    row.count("route old").add(-1)
    for number in range(100):
        columns = ledger.columns([f"route {number}"], {"kept"})
        assert columns[f"route {number}"] < 4
    assert ledger.names == {"kept", "route 99"}


def test_there_may_be_too_many_names(ledger: Ledger) -> None:
    with pytest.raises(OSError, match="more than 131072 counters"):
        ledger.columns(map(str, range(200_000)), ())
    assert ledger.columns(["one"], ()) == {"one": 0}


def test_the_code_after_an_upgrade_goes_on_with_it(ledger: Ledger) -> None:
    stays, dies = worker(ledger), worker(ledger)
    for row in (stays, dies):
        row.count("active").add(3)
        row.clients.add("192.0.2.1", 2)
    taken_over = Ledger.left(os.dup(ledger.leave()), [stays.number])
    assert taken_over.names == set(NAMES)
    assert taken_over.count("active").each() == [3]
    new = worker(taken_over)
    assert new.number == 1
    assert new.clients.others("192.0.2.1") == 2
    stays.count("active").add(1)
    assert new.count("active").total() == 4
    taken_over.close()


def test_a_ledger_of_another_layout_is_not_understood(ledger: Ledger) -> None:
    os.pwrite(ledger.fd, b"\x03", 0)
    with pytest.raises(ValueError, match="layout 3"):
        Ledger.left(os.dup(ledger.fd), [])


def test_what_one_worker_has_seen_all_know(ledger: Ledger) -> None:
    one, other = worker(ledger), worker(ledger)
    names = [f"up resp_{number}" for number in range(1_000)]
    assert not any(one.counted.add(name) for name in names)
    assert all(row.counted.add(name) for row in (one, other) for name in names)
    ledger.free_row(one.number)
    assert not other.counted.add(names[0])


def test_the_latest_names_are_remembered_in_bounded_memory(ledger: Ledger) -> None:
    row = worker(ledger)
    for number in range(100_000):
        row.counted.add(f"up resp_{number}")
    assert all(row.counted.add(f"up resp_{number}") for number in range(99_000, 100_000))
    assert sum(row.counted.add(f"up resp_{number}") for number in range(1_000)) == 0
    assert os.fstat(ledger.fd).st_blocks * 512 < 128 << 10


def test_a_worker_alone_has_all() -> None:
    row = alone(NAMES)
    row.count("active").add(2)
    assert (row.count("active").own, row.count("active").total()) == (2, 2)
    assert row.clients.others("192.0.2.1") == 0
    with pytest.raises(KeyError):
        row.count("unknown")
