"""What is under way now: a row for each exchange, and what has changed since the previous reading. No I/O, no content.

In each worker, a `Reader` makes rows of exchanges. In the supervisor, a `View` puts the rows of all workers together,
and writes the events of `/live/events`: a snapshot, then changes. A row in the changes has only the fields that differ.

Times are values of `perf_counter`, which all processes of a machine share. In events they are Unix timestamps.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from heapq import nlargest
from time import perf_counter
from typing import Final, TypeVar

import msgspec

from ..errors import Outcome
from ..relay.exchange import Exchange
from .access import shown

MOST_ROWS: Final = 1_000
"""Rows of a reading, and of a snapshot. A thousand take a millisecond of a worker's loop, and 250 kB of a snapshot."""
ID_SIZE: Final = 16
"""Characters of an id. They are random, so an id names one exchange of all workers, and nobody can guess one."""

# Seconds by which the system's clock may differ from what it was when a reading was told first.
_CLOCK_STEP = 0.5

_encode = msgspec.json.Encoder().encode
T = TypeVar("T")


class Row(msgspec.Struct, array_like=True, frozen=True):
    """One exchange. `quiet_since` is None where silence means nothing: in a response that is not a stream."""

    id: str
    since: float
    """When its head was received."""
    route: str
    upstream: str
    endpoint: str
    model: str | None
    client: str
    status: int | None
    stream: bool
    first_token_at: float | None
    quiet_since: float | None
    """When the latest token was read; before the first token, when the head of the request was received."""
    deltas: int
    outcome: str | None = None
    """None while it is under way."""
    ended_at: float | None = None


class Reading(msgspec.Struct, array_like=True, tag="reading"):
    """What a worker has under way, and what has ended since its previous reading. `more` exchanges have no row."""

    rows: list[Row]
    more: int = 0


def _longest_silences(
    items: Collection[T], quiet_since: Callable[[T], float | None], is_known: Callable[[T], bool]
) -> Iterable[T]:
    """At most `MOST_ROWS` of `items`: the longest silences, in whole seconds.

    Of those with the same silence, the known ones stay. Otherwise rows would come and go with each token.
    """
    if len(items) <= MOST_ROWS:
        return items
    now = perf_counter()

    def rank(item: T) -> float:
        since = quiet_since(item)
        return (0 if since is None else int(now - since)) + (0.5 if is_known(item) else 0.0)

    return nlargest(MOST_ROWS, items, rank)


def _epoch() -> float:
    """The Unix timestamp at which `perf_counter` was 0, by the system's clock."""
    return time.time() - perf_counter()  # noqa: TID251 - timestamps are exported


def _quiet_since(exchange: Exchange) -> float | None:
    if exchange.first_token_at is not None:
        return exchange.last_delta_at
    return exchange.received_at if exchange.is_stream or exchange.head_at is None else None


class Reader:
    """Makes readings of the exchanges of one worker. `endpoints` has the address of each upstream with only one."""

    def __init__(self, endpoints: Mapping[str, str]) -> None:
        self._endpoints = endpoints
        # The exchanges that had a row in the latest reading, and their ids.
        self._ids: dict[Exchange, str] = {}

    def choose(self, running: Collection[Exchange]) -> list[Exchange]:
        """Which of the `running` exchanges get a row."""
        return list(_longest_silences(running, _quiet_since, self._ids.__contains__))

    def read(self, chosen: Collection[Exchange], running: int) -> Reading:
        """A reading of the `chosen` exchanges, and of those that had a row before and have ended. So many run."""
        before = self._ids
        self._ids = {
            exchange: before.get(exchange) or secrets.token_hex(ID_SIZE // 2)
            for exchange in chosen
            if exchange.outcome is None
        }
        rows = [self._row(exchange, known) for exchange, known in before.items() if exchange.outcome is not None]
        rows += [self._row(exchange, known) for exchange, known in self._ids.items()]
        return Reading(rows, max(0, running - len(self._ids)))

    def find(self, wanted: str) -> Exchange | None:
        """The exchange with the id `wanted`, if it had a row in the latest reading."""
        return next((exchange for exchange, known in self._ids.items() if known == wanted), None)

    def _row(self, exchange: Exchange, known: str) -> Row:
        return Row(
            known,
            exchange.received_at,
            exchange.route,
            exchange.upstream,
            exchange.endpoint or self._endpoints.get(exchange.upstream, ""),
            shown(exchange.model),
            exchange.client_name or exchange.client,
            exchange.status,
            exchange.is_stream,
            exchange.first_token_at,
            _quiet_since(exchange),
            exchange.deltas if exchange.is_stream else 0,
            exchange.outcome,
            exchange.ended_at,
        )


class View:
    """The rows of all workers. `add` takes a reading, `step` finds what has changed since the previous step."""

    def __init__(self) -> None:
        self._readings: dict[int, tuple[dict[str, Row], int]] = {}
        self._ending: dict[str, Row] = {}
        # The worker and the row of each id that is shown.
        self._shown: dict[str, tuple[int, Row]] = {}
        self._more = 0
        self._told: dict[str, dict[str, object]] = {}
        # The events of this step, once somebody wants them.
        self._snapshot = b""
        # From `perf_counter` to Unix timestamps: one value, so that a time that stays the same is told the same.
        self._epoch = _epoch()
        self.number = 0
        """How many steps had changes."""
        self.changes = b""
        """The event with the changes of the latest step that had any."""
        self.ended: dict[str, Row] = {}
        """What has ended in the latest step."""

    def add(self, worker: int, reading: Reading) -> None:
        """Takes a reading of `worker`, which replaces the one before."""
        running: dict[str, Row] = {}
        for row in reading.rows:
            (running if row.outcome is None else self._ending)[row.id] = row
        self._readings[worker] = running, reading.more

    def drop(self, worker: int) -> None:
        """`worker` has ended. What it still had under way by its last reading is lost."""
        running, _ = self._readings.pop(worker, ({}, 0))
        for row in running.values():
            self._ending[row.id] = msgspec.structs.replace(
                row, outcome=Outcome.PROXY_ERROR.value, ended_at=perf_counter()
            )

    def find(self, id: str) -> tuple[int, Row] | None:
        """The worker and the row with this id, if it is shown."""
        return self._shown.get(id)

    def step(self) -> None:
        """Writes `changes`, if anything has changed since the step before."""
        if abs(self._epoch - _epoch()) > _CLOCK_STEP:
            # The system's clock was set. All rows are told again.
            self._epoch = _epoch()
            self._told.clear()
        before, told = self._shown, self._told
        running = [(worker, row) for worker, (rows, _) in self._readings.items() for row in rows.values()]
        chosen = _longest_silences(running, lambda item: item[1].quiet_since, lambda item: item[1].id in before)
        shown_now = {row.id: (worker, row) for worker, row in chosen}
        self.ended = {id: row for id, row in self._ending.items() if id in before}
        self._ending = {}
        more = sum(more for _, more in self._readings.values()) + len(running) - len(shown_now)

        rows = []
        for row in [*(row for _, row in shown_now.values()), *self.ended.values()]:
            if row.id not in told:
                told[row.id] = self._as_told(row)
                rows.append(told[row.id])
            elif row != before[row.id][1]:
                earlier, now = told[row.id], self._as_told(row)
                if changed := {name: value for name, value in now.items() if value != earlier[name]}:
                    rows.append({"id": row.id, **changed})
                told[row.id] = now
        left = [id for id in before if id not in shown_now and id not in self.ended]
        for id in [*left, *self.ended]:
            told.pop(id, None)
        self._shown, self._snapshot = shown_now, b""
        if rows or left or more != self._more:
            self._more = more
            self.number += 1
            self.changes = self._event(b"changes", {"more": more, "rows": rows, "left": left})

    def snapshot(self, *, cancel: bool) -> bytes:
        """The event with all rows. `cancel`: whether a request can be cancelled."""
        if not self._snapshot:
            content = {"cancel": cancel, "more": self._more, "rows": [*self._told.values()]}
            self._snapshot = self._event(b"snapshot", content)
        return self._snapshot

    def _event(self, kind: bytes, content: dict[str, object]) -> bytes:
        now = {"now": self._unix(perf_counter())}
        # The encoder escapes every control character, so the data is one line.
        return b"event: %b\ndata: %b\n\n" % (kind, _encode(now | content))

    def _unix(self, at: float) -> float:
        return round(at + self._epoch, 3)

    def _as_told(self, row: Row) -> dict[str, object]:
        """A row in the words of the access log."""
        since, first, quiet, ended = row.since, row.first_token_at, row.quiet_since, row.ended_at
        return {
            "id": row.id,
            "since": self._unix(since),
            "route": row.route,
            "upstream": row.upstream,
            "endpoint": row.endpoint,
            "model": row.model,
            "client": row.client,
            "status": row.status,
            "stream": row.stream,
            "first_token_seconds": None if first is None else round(first - since, 3),
            "quiet_since": None if quiet is None else self._unix(quiet),
            "deltas": row.deltas,
            "outcome": row.outcome,
            "duration_seconds": None if ended is None else round(ended - since, 3),
        }
