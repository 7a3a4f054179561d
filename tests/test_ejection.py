"""Which endpoints are used: the rules, with a ledger, workers that do as a test says, and a clock of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sseproxy.ledger.endpoints import Evidence, Standing, endpoint_counts
from sseproxy.ledger.table import Ledger, opened
from sseproxy.process.ejection import Admitted, Decision, Ejected, Fleet, OnTrial

SECOND = 1_000_000
FAILURES = 5
# As often as the supervisor looks.
TURN = SECOND // 4


@dataclass
class Worker:
    row: int
    standings: dict[str, Standing]


class World:
    """A supervisor that looks at the ledger when it is told to, and workers that come and go."""

    def __init__(self, endpoints: int, workers: int, time: int = 10 * SECOND) -> None:
        self.now = 1000 * SECOND
        self.names = [f"e{number}" for number in range(endpoints)]
        self.ledger = Ledger(rows=16)
        counts = [count for name in self.names for count in endpoint_counts("up", name)]
        self.columns = self.ledger.columns(counts, ())
        row = self.ledger.row(self.ledger.own_row(), self.columns)
        self.standings = {name: Standing(row, "up", name) for name in self.names}
        self.fleet = Fleet(FAILURES, time)
        for name in self.names:
            self.fleet.add(name, self.now)
        self.workers: list[Worker] = []
        self.serial = 0
        for _ in range(workers):
            self.begin()

    def begin(self) -> Worker:
        """Another worker, as a process that has inherited the file."""
        row = opened(os.dup(self.ledger.fd), self.ledger.take_row(), self.columns)
        worker = Worker(row.number, {name: Standing(row, "up", name) for name in self.names})
        self.workers.append(worker)
        return worker

    def die(self, worker: Worker) -> None:
        self.workers.remove(worker)
        self.ledger.free_row(worker.row)

    def evidence(self) -> dict[str, Evidence]:
        return {name: standing.evidence() for name, standing in self.standings.items()}

    def look(self) -> list[Decision]:
        decided = self.fleet.decide(self.evidence(), [worker.row for worker in self.workers], self.now)
        for decision in decided:
            standing = self.standings[decision.endpoint]
            self.serial += 1
            match decision:
                case Ejected():
                    standing.eject(self.serial, None)
                case OnTrial(worker=row):
                    standing.eject(self.serial, row)
                case Admitted(at=at):
                    standing.admit(at)
        return decided

    def turn(self, time: int = TURN) -> list[Decision]:
        self.now += time
        return self.look()

    def fail(self, name: str, times: int = FAILURES, *, refused: bool = False, worker: int = 0) -> None:
        self.now += 1
        for _ in range(times):
            self.workers[worker].standings[name].failed(self.now, refused=refused)

    def succeed(self, name: str, worker: int = 0) -> None:
        self.now += 1
        self.workers[worker].standings[name].succeeded(self.now)

    def request(self, worker: Worker, name: str, answer: Callable[[Standing], None]) -> bool:
        """A request to `name`, if the worker may send one."""
        standing = worker.standings[name]
        if not standing.usable:
            return False
        if standing.on_trial:
            standing.try_once()
        self.now += 1
        answer(standing)
        return True

    def used(self) -> set[str]:
        return {name for name in self.names if self.fleet.is_used(name)}

    def close(self) -> None:
        self.ledger.close()


@pytest.fixture
def world() -> World:
    return World(4, 2)


def test_an_endpoint_is_ejected_after_so_many_failures_of_all_workers_together(world: World) -> None:
    world.fail("e0", 3, worker=0)
    world.fail("e0", 1, worker=1)
    assert world.turn() == []
    world.fail("e0", 1, worker=1)
    assert world.turn() == [Ejected("e0", "failures", 5, 10 * SECOND)]
    assert not any(worker.standings["e0"].usable for worker in world.workers)


def test_a_success_of_any_worker_is_a_new_beginning(world: World) -> None:
    world.fail("e0", 4, worker=0)
    world.succeed("e0", worker=1)
    world.fail("e0", 4, worker=0)
    assert world.turn() == []
    assert world.evidence()["e0"].failures == 4


def test_the_success_of_a_worker_that_has_died_still_counts(world: World) -> None:
    world.fail("e0", 4, worker=0)
    world.succeed("e0", worker=1)
    world.turn()
    world.die(world.workers[1])
    world.fail("e0", 1, worker=0)
    assert world.turn() == []
    assert world.evidence()["e0"].failures == 1


def test_one_worker_after_the_other_tries_it_until_one_has(world: World) -> None:
    first, second = world.workers
    world.fail("e0")
    world.turn()
    assert world.turn(10 * SECOND) == [OnTrial("e0", first.row)]
    assert first.standings["e0"].on_trial
    assert not second.standings["e0"].usable
    assert world.turn() == []
    assert world.turn(SECOND) == [OnTrial("e0", second.row)]
    assert not first.standings["e0"].usable
    second.standings["e0"].try_once()
    assert not second.standings["e0"].usable
    second.standings["e0"].passed(world.now + 1)
    (decision,) = world.turn()
    assert isinstance(decision, Admitted)
    assert all(worker.standings["e0"].usable for worker in world.workers)
    assert world.turn() == []


def test_a_trial_that_goes_on_is_waited_for(world: World) -> None:
    world.fail("e0")
    world.turn()
    world.turn(10 * SECOND)
    first = world.workers[0].standings["e0"]
    first.try_once()
    first.active.add(1)
    for _ in range(39):
        assert world.turn() == []
    assert world.turn() == [OnTrial("e0", world.workers[1].row)]


def test_a_worker_that_ends_is_not_waited_for(world: World) -> None:
    world.fail("e0", worker=1)
    world.turn()
    assert world.turn(10 * SECOND) == [OnTrial("e0", world.workers[0].row)]
    world.die(world.workers[0])
    assert world.turn() == [OnTrial("e0", world.workers[0].row)]
    world.die(world.workers[0])
    assert world.turn() == [OnTrial("e0", None)]
    assert world.turn() == []
    worker = world.begin()
    assert world.turn() == [OnTrial("e0", worker.row)]


def test_a_trial_that_fails_ejects_for_longer_up_to_a_minute(world: World) -> None:
    world.fail("e0")
    times = []
    for _ in range(8):
        (ejected,) = world.turn()
        assert isinstance(ejected, Ejected)
        times.append(ejected.time // SECOND)
        assert [type(decision) for decision in world.turn(ejected.time)] == [OnTrial]
        world.fail("e0", 1)
    assert times == [10, 20, 30, 40, 50, 60, 60, 60]


def test_one_that_refuses_is_tried_more_often(world: World) -> None:
    """A crash first cuts streams, which are failures, and then refuses."""
    world.fail("e0")
    times = []
    for _ in range(4):
        (ejected,) = world.turn()
        assert isinstance(ejected, Ejected)
        times.append((ejected.reason, ejected.time // SECOND))
        world.turn(ejected.time)
        world.fail("e0", 1, refused=True)
    assert times == [("failures", 10), ("refused", 20), ("refused", 20), ("refused", 20)]


def test_failures_of_exchanges_that_began_before_do_not_make_it_longer(world: World) -> None:
    world.fail("e0")
    world.turn()
    world.fail("e0", 20)
    for _ in range(39):
        assert world.turn() == []
    assert [type(decision) for decision in world.turn()] == [OnTrial]
    assert world.turn() == []


def test_ejections_soon_after_each_other_are_in_a_row(world: World) -> None:
    times = []
    for pause in (1, 1, 61):
        world.fail("e0")
        (ejected,) = world.turn()
        assert isinstance(ejected, Ejected)
        times.append(ejected.time // SECOND)
        world.succeed("e0")
        world.turn()
        world.now += pause * SECOND
    world.fail("e0")
    (ejected,) = world.turn()
    assert isinstance(ejected, Ejected)
    assert [*times, ejected.time // SECOND] == [10, 20, 30, 10]


def test_half_of_the_endpoints_stay_in_use_unless_they_refuse(world: World) -> None:
    for name in world.names:
        world.fail(name)
    world.turn()
    assert len(world.used()) == 2
    for name in world.names:
        world.succeed(name)
    world.turn()
    assert len(world.used()) == 4
    for name in world.names:
        world.fail(name, refused=True)
    world.turn()
    assert world.used() == set()


def test_a_single_endpoint_is_only_ejected_if_it_refuses() -> None:
    world = World(1, 1)
    world.fail("e0", 50)
    assert world.turn() == []
    world.succeed("e0")
    world.fail("e0", refused=True)
    (ejected,) = world.turn()
    assert isinstance(ejected, Ejected)
    assert ejected.reason == "refused"
    world.close()


def test_one_whose_checks_fail_is_out_until_one_passes(world: World) -> None:
    world.fleet.checked("e0", False)
    assert world.turn() == []
    world.fleet.checked("e0", False)
    assert world.turn() == [Ejected("e0", "health", 2, 0)]
    # No request tries it, however long it takes.
    assert world.turn(100 * SECOND) == []
    world.fail("e0")
    world.fleet.checked("e0", True)
    (admitted,) = world.turn()
    assert isinstance(admitted, Admitted)
    # What failed while it was out does not count.
    assert world.turn() == []
    assert "e0" in world.used()


def test_checks_may_find_all_endpoints_out(world: World) -> None:
    for name in world.names * 2:
        world.fleet.checked(name, False)
    world.turn()
    assert world.used() == set()


def test_a_passed_check_does_not_lift_what_traffic_has_caused(world: World) -> None:
    world.fail("e0")
    world.turn()
    world.fleet.checked("e0", True)
    assert world.turn() == []
    assert "e0" not in world.used()
    # As long as checks fail, nobody tries it.
    world.fleet.checked("e0", False)
    world.fleet.checked("e0", False)
    assert world.turn(10 * SECOND) == []
    world.fleet.checked("e0", True)
    assert [type(decision) for decision in world.turn()] == [OnTrial]
    assert "e0" not in world.used()
    world.fleet.checked("e0", False)
    world.fleet.checked("e0", False)
    assert world.turn() == [OnTrial("e0", None)]


def test_one_whose_checks_pass_again_is_tried_at_once(world: World) -> None:
    world.fail("e0")
    world.turn()
    world.fleet.checked("e0", False)
    world.fleet.checked("e0", False)
    assert world.turn() == []
    world.fleet.checked("e0", True)
    assert [type(decision) for decision in world.turn()] == [OnTrial]


def test_what_an_earlier_supervisor_has_ejected_is_tried_at_once(world: World) -> None:
    world.fleet.remove("e0")
    world.fleet.add("e0", world.now, out=True)
    assert world.turn() == [OnTrial("e0", world.workers[0].row)]
    world.workers[0].standings["e0"].passed(world.now + 1)
    assert [type(decision) for decision in world.turn()] == [Admitted]


@property_settings(max_examples=50, deadline=None)
@given(
    outage=st.integers(1, 600),
    workers=st.integers(1, 5),
    kinds=st.lists(st.sampled_from(["refused", "failed", "hangs"]), min_size=1, max_size=6),
    busy=st.integers(1, 4),
)
@example(outage=900, workers=4, kinds=["failed"], busy=1)
@example(outage=900, workers=2, kinds=["failed", "refused"], busy=4)
def test_after_an_outage_it_is_soon_in_use_again(outage: int, workers: int, kinds: list[str], busy: int) -> None:
    """Within half a minute if connections were refused, and within a minute and a bit in any case."""
    world = World(2, workers)
    try:
        back_at = world.now + outage * SECOND
        requests, last_kind = 0, ""
        hanging: list[Standing] = []
        while world.now < back_at:
            for worker in world.workers[:busy]:

                def answer(standing: Standing) -> None:
                    nonlocal requests, last_kind
                    requests += 1
                    # It begins with any failures, and then stays as it is.
                    last_kind = kinds[min(requests // FAILURES, len(kinds) - 1)]
                    if last_kind == "hangs":
                        standing.active.add(1)
                        hanging.append(standing)
                    else:
                        standing.failed(world.now, refused=last_kind == "refused")

                world.request(worker, "e0", answer)
            world.turn()
        for standing in hanging:
            standing.active.add(-1)
            standing.failed(world.now, refused=False)
        since = world.now
        while "e0" not in world.used():
            for worker in world.workers:
                world.request(worker, "e0", lambda standing: standing.passed(world.now))
            world.turn()
            assert world.now - since < (30 if last_kind == "refused" else 73) * SECOND
        # Requests at an endpoint that is out are few.
        assert requests < FAILURES * workers + outage // 10 * 2 + 20 or "hangs" in kinds
    finally:
        world.close()


class Endpoints(RuleBasedStateMachine):
    """Workers see successes and failures, begin, and die, in any order. The decisions keep to the rules."""

    @initialize(endpoints=st.integers(1, 5), workers=st.integers(1, 3))
    def begins(self, endpoints: int, workers: int) -> None:
        self.world = World(endpoints, workers)
        self.newest = dict.fromkeys(self.world.names, 0)
        self.good_at = dict.fromkeys(self.world.names, 0)
        self.out: dict[str, Ejected] = {}
        self.ejected_at = dict.fromkeys(self.world.names, 0)
        self.named: dict[str, int | None] = {}

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data(), times=st.integers(1, 7), refused=st.booleans())
    def fails(self, data: st.DataObject, times: int, refused: bool) -> None:
        worker = data.draw(st.integers(0, len(self.world.workers) - 1))
        self.world.fail(data.draw(st.sampled_from(self.world.names)), times, refused=refused, worker=worker)

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data(), trial=st.booleans())
    def goes_well(self, data: st.DataObject, trial: bool) -> None:
        name = data.draw(st.sampled_from(self.world.names))
        worker = data.draw(st.sampled_from(self.world.workers))
        self.world.now += 1
        (worker.standings[name].passed if trial else worker.standings[name].succeeded)(self.world.now)
        self.good_at[name] = self.world.now

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data(), by=st.sampled_from([1, -1]))
    def is_busy(self, data: st.DataObject, by: int) -> None:
        active = data.draw(st.sampled_from(self.world.workers)).standings[self.world.names[0]].active
        active.add(max(by, -active.own))

    @precondition(lambda self: len(self.world.workers) < 6)
    @rule()
    def another_worker(self) -> None:
        self.world.begin()

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data())
    def a_worker_dies(self, data: st.DataObject) -> None:
        # The supervisor has looked since its last success.
        self.looks(0)
        self.world.die(data.draw(st.sampled_from(self.world.workers)))

    @rule(passed=st.booleans(), data=st.data())
    def is_checked(self, passed: bool, data: st.DataObject) -> None:
        self.world.fleet.checked(data.draw(st.sampled_from(self.world.names)), passed)

    @rule(seconds=st.sampled_from([0, 0.25, 1, 5, 10, 60]))
    def looks(self, seconds: float) -> None:
        world = self.world
        world.now += int(seconds * SECOND) + 1
        before = world.evidence()
        used_before = world.used()
        for decision in world.look():
            name = decision.endpoint
            match decision:
                case Ejected(reason=reason, failures=failures, time=time):
                    if reason != "health":
                        assert time <= (20 if reason == "refused" else 60) * SECOND
                        assert failures >= (FAILURES if name in used_before else 1)
                        if name in used_before:
                            assert before[name].failures >= FAILURES
                            if reason == "failures":
                                assert 2 * len(world.used()) >= len(world.names)
                    self.out[name], self.ejected_at[name] = decision, world.now
                    self.named[name] = None
                case OnTrial(worker=row):
                    assert name in self.out
                    assert row is None or row in [worker.row for worker in world.workers]
                    self.named[name] = row
                case Admitted():
                    ejected = self.out.pop(name)
                    if ejected.reason != "health":
                        assert self.good_at[name] > 0
                    assert all(worker.standings[name].usable for worker in world.workers)
        for name in world.names:
            assert (name in world.used()) == (name not in self.out)

    @invariant()
    def newest_success_never_falls(self) -> None:
        if not hasattr(self, "world"):
            return
        for name, seen in self.world.evidence().items():
            assert seen.succeeded_at >= self.newest[name]
            self.newest[name] = seen.succeeded_at

    @invariant()
    def no_more_than_one_worker_uses_what_is_out(self) -> None:
        if not hasattr(self, "world"):
            return
        for name in self.out:
            assert sum(worker.standings[name].usable for worker in self.world.workers) <= 1


TestEndpoints = Endpoints.TestCase
TestEndpoints.settings = property_settings(max_examples=100, stateful_step_count=30, deadline=None)
