"""Which endpoints of an upstream are used: the rules. It does no I/O: evidence and the time go in, decisions come out.

An endpoint is ejected after so many failures since its newest success. When its time is over, one worker at a time may
try it with one request. If that passes, the endpoint is used again. If it fails, the endpoint is ejected for longer.
An endpoint whose active checks fail is not used until a check passes.

All times are whole microseconds of `perf_counter`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple

from ..ledger.endpoints import Evidence

Reason = Literal["failures", "refused", "health"]

_SECOND: Final = 1_000_000
# The longest ejection, unless `ejection.time` is longer. A trial of an endpoint that answers with errors, or does not
# answer, is a client's request that may fail.
_LONGEST: Final = 60 * _SECOND
# The same where no connection could be made. There a trial costs less: the request is sent again elsewhere. So an
# endpoint that is back is in use within half a minute, however long it was away.
_LONGEST_REFUSED: Final = 20 * _SECOND
# An endpoint that fails within this time after it came back is ejected for longer than before. So one that passes each
# trial and then fails is not tried every few seconds.
_FORGOTTEN_AFTER: Final = 60 * _SECOND
# A worker that was named has this time to begin its trial. With little traffic the next request may come to another
# worker.
_TO_BEGIN: Final = 1 * _SECOND
# A trial that has begun has this time until another worker is named. A long prompt may take as long to its first token.
# So an endpoint that hangs gets one request in this time, and no more.
_TO_PASS: Final = 10 * _SECOND
# Consecutive checks that have to fail. HAProxy's default (`fall`) is 3. With 1, a check that is lost on a busy machine
# would take an endpoint out of use.
_FAILED_CHECKS: Final = 2


class Ejected(NamedTuple):
    """The endpoint is not used. It was in use, or its trial has failed."""

    endpoint: str
    reason: Reason
    failures: int
    """How many failures there were: since the newest success, or in the trial."""
    time: int
    """How long it takes until it is tried. 0 if that depends on its checks."""
    again: bool = False
    """Whether it was out already, and its trial has failed."""


class OnTrial(NamedTuple):
    """Only the worker with the row `worker` may use the endpoint, once. With None, no worker may any more."""

    endpoint: str
    worker: int | None


class Admitted(NamedTuple):
    """The endpoint is used again, after a `time`. What was seen of it until `at` does not count any more."""

    endpoint: str
    time: int
    at: int


Decision = Ejected | OnTrial | Admitted


class _Endpoint:
    """What is known of one endpoint."""

    __slots__ = (
        "active",
        "admitted_at",
        "due",
        "ejected",
        "ejected_at",
        "failed_checks",
        "failures",
        "in_a_row",
        "named_at",
        "out_since",
        "refusals",
        "sick",
        "worker",
    )

    def __init__(self) -> None:
        self.ejected = False
        self.sick = False
        """Whether it is not used because of its checks."""
        self.failed_checks = 0
        """The checks that have failed since the last one that passed."""
        self.out_since = 0
        self.ejected_at = 0
        self.admitted_at = -_FORGOTTEN_AFTER
        self.in_a_row = 0
        self.due = 0
        """When it may be tried."""
        self.worker: int | None = None
        """The row of the worker that may try it."""
        self.named_at = 0
        self.failures = self.refusals = 0
        """Those that had been seen when that worker was named."""
        self.active = 0
        """The exchanges with it that the worker had then."""

    @property
    def out(self) -> bool:
        return self.ejected or self.sick


class Fleet:
    """The endpoints of one upstream. It is ejected after `failures`, for a `time` in microseconds at first."""

    def __init__(self, failures: int, time: int) -> None:
        self.failures = failures
        self.time = time
        self._endpoints: dict[str, _Endpoint] = {}
        self._last_worker = -1

    def add(self, name: str, now: int, *, out: bool = False) -> None:
        """Adds an endpoint. If it is `out`, an earlier supervisor has ejected it: then it is tried at once."""
        one = self._endpoints[name] = _Endpoint()
        if out:
            one.ejected, one.in_a_row = True, 1
            one.out_since = one.ejected_at = one.due = now

    def remove(self, name: str) -> None:
        del self._endpoints[name]

    def checked(self, name: str, passed: bool) -> None:
        """An active check of the endpoint has passed or failed. Without checks, call it once with `passed`."""
        one = self._endpoints[name]
        one.failed_checks = 0 if passed else one.failed_checks + 1

    def is_used(self, name: str) -> bool:
        return not self._endpoints[name].out

    def decide(self, evidence: Mapping[str, Evidence], workers: Sequence[int], now: int) -> list[Decision]:
        """What has changed. `evidence` is for all endpoints, and `workers` are the rows of workers that can try one."""
        decided = [*self._health(now), *self._trials(evidence, sorted(workers), now)]
        # The evidence of these is from before the decision.
        settled = {decision.endpoint for decision in decided}
        return [*decided, *self._ejections({name: evidence[name] for name in evidence.keys() - settled}, now)]

    def _health(self, now: int) -> Iterator[Decision]:
        for name, one in self._endpoints.items():
            if not one.sick and one.failed_checks >= _FAILED_CHECKS:
                was_out, one.sick = one.out, True
                if not was_out:
                    one.out_since = now
                    yield Ejected(name, "health", one.failed_checks, 0)
                elif one.worker is not None:
                    one.worker = None
                    yield OnTrial(name, None)
            elif one.sick and not one.failed_checks:
                one.sick = False
                if one.ejected:
                    # What its checks have found is over. Whether requests succeed again, a trial shows.
                    one.due = min(one.due, now)
                else:
                    yield Admitted(name, now - one.out_since, now)

    def _trials(self, evidence: Mapping[str, Evidence], workers: Sequence[int], now: int) -> Iterator[Decision]:
        """What becomes of those that traffic has ejected."""
        for name, one in self._endpoints.items():
            if not one.ejected:
                continue
            seen = evidence[name]
            good_at = max(seen.succeeded_at, seen.passed_at)
            if good_at > one.ejected_at:
                one.ejected, one.worker, one.admitted_at = False, None, now
                if not one.sick:
                    yield Admitted(name, now - one.out_since, good_at)
                continue
            if one.worker is None:
                # Failures of exchanges that began before the ejection say nothing new.
                one.failures, one.refusals = seen.failures, seen.refusals
            elif (failures := seen.failures - one.failures) > 0:
                yield self._eject(name, one, failures, seen.refusals - one.refusals, now)._replace(again=True)
            # The row of a worker that has ended counts no more.
            one.failures, one.refusals = min(one.failures, seen.failures), min(one.refusals, seen.refusals)
            if now >= one.due and not one.sick:
                yield from self._name_worker(name, one, seen.active, workers, now)

    def _name_worker(
        self, name: str, one: _Endpoint, active: Sequence[int], workers: Sequence[int], now: int
    ) -> Iterator[OnTrial]:
        """Names the next worker, unless the one that is named may still try the endpoint."""
        if one.worker is not None and one.worker in workers:
            has = active[one.worker]
            one.active = min(one.active, has)
            if now - one.named_at < (_TO_PASS if has > one.active else _TO_BEGIN):
                return
        elif one.worker is None and not workers:
            return
        one.worker = next((row for row in workers if row > self._last_worker), workers[0] if workers else None)
        if one.worker is not None:
            self._last_worker, one.named_at, one.active = one.worker, now, active[one.worker]
        yield OnTrial(name, one.worker)

    def _ejections(self, evidence: Mapping[str, Evidence], now: int) -> Iterator[Decision]:
        """Those that were in use, and fail. Those that refuse are first, because they are ejected in any case."""
        failing = [
            (seen.refusals < seen.failures, -seen.failures, name)
            for name, seen in evidence.items()
            if seen.failures >= self.failures and not self._endpoints[name].out
        ]
        for some_answered, _, name in sorted(failing):
            one, seen = self._endpoints[name], evidence[name]
            out = sum(each.out for each in self._endpoints.values())
            if not some_answered or 2 * (out + 1) <= len(self._endpoints):
                one.out_since = now
                if now - one.admitted_at >= _FORGOTTEN_AFTER:
                    one.in_a_row = 0
                yield self._eject(name, one, seen.failures, seen.refusals, now)

    def _eject(self, name: str, one: _Endpoint, failures: int, refusals: int, now: int) -> Ejected:
        """`refusals` of the `failures` are connections that could not be made."""
        refused = refusals >= failures
        one.ejected, one.ejected_at, one.worker = True, now, None
        one.in_a_row += 1
        time = min(self.time * one.in_a_row, max(self.time, _LONGEST_REFUSED if refused else _LONGEST))
        one.due = now + time
        return Ejected(name, "refused" if refused else "failures", failures, time)
