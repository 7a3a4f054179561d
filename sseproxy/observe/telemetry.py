"""Counts what happens in exchanges, and sends the numbers from a worker to its supervisor.

A worker sends reports through its channel. A report is a frame: a length of four bytes, and so many bytes of msgpack.
In the other direction, the supervisor sends a byte. `?` requests a report now, `l` a reading for the live view, which
is a frame as well. `x`, followed by the id of an exchange, cancels that exchange.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from time import perf_counter
from typing import Final, NamedTuple

import msgspec

from ..errors import Outcome
from ..relay.exchange import Exchange, Observer
from ..wire.meaning import Usage
from . import metrics
from .access import AccessLog
from .live import ID_SIZE, Reading
from .metrics import Labels, Metric, Recorder, Report

# Seconds between two reports that were not requested. A worker that dies loses the numbers since its last report. Each
# report takes half a millisecond of a core, which the supervisor and the worker may share.
REPORT_INTERVAL = 1.0
# Seconds between two sortings of observed values into buckets. To sort more values at once would block the loop longer.
_SETTLE_INTERVAL = 0.1
# Active exchanges of which a report counts what they have moved. More would block the loop longer: 1,000 take 2 ms.
_COUNTED_AT_ONCE = 1_000
# nginx's status code for a client that closed the connection before it got a response.
_CLIENT_CLOSED_REQUEST = 499
# Characters. OpenMetrics allows 128 for the label names and values of an exemplar. Clients may choose longer ids.
_EXEMPLAR_ID = 128 - len("request_id")

# Why a request with a wrong key is refused.
_WRONG_KEYS = frozenset({"invalid_api_key", "too_many_wrong_keys"})

_HEADER = struct.Struct("!I")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Report | Reading).decode
LOOK: Final = b"l"
CANCEL: Final = b"x"


def encode_report(report: Report | Reading) -> bytes:
    body = _encode(report)
    return _HEADER.pack(len(body)) + body


async def questions(reader: asyncio.StreamReader) -> AsyncIterator[tuple[bytes, str]]:
    """What the supervisor asks a worker: the byte that says what, and an id if it has one. Ends with the channel."""
    with suppress(asyncio.IncompleteReadError):
        while question := await reader.read(1):
            yield question, (await reader.readexactly(ID_SIZE)).decode() if question == CANCEL else ""


class Reports:
    """Iterates over the reports of one worker, until the worker closes its end of the channel.

    `reader` reads from the channel, `write` writes to it. `look` gets the readings for the live view.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        write: Callable[[bytes], object],
        look: Callable[[Reading], object] = lambda reading: None,
    ) -> None:
        self._reader = reader
        self._write = write
        self._look = look
        self._answered = asyncio.Event()
        self._answered.set()
        self._looked = asyncio.Event()
        self._looked.set()
        self.number = 0
        """How many frames have been received."""

    async def __aiter__(self) -> AsyncIterator[Report]:
        try:
            while True:
                (size,) = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
                report = _decode(await self._reader.readexactly(size))
                self.number += 1
                if isinstance(report, Reading):
                    self._look(report)
                    self._looked.set()
                    continue
                yield report
                if report.asked:
                    self._answered.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self._answered.set()
            self._looked.set()

    def ask(self) -> None:
        """Requests a report from the worker, unless the last request has not been answered yet."""
        if self._answered.is_set():
            self._answered.clear()
            self._write(b"?")

    async def latest(self) -> None:
        """Requests a report. Returns when the iteration has passed it, or when there are no more reports."""
        self.ask()
        await self._answered.wait()

    async def looked(self) -> None:
        """Requests a reading, unless one is on its way. Returns when it has come, or when there are no more."""
        if self._looked.is_set():
            self._looked.clear()
            self._write(LOOK)
        await self._looked.wait()

    def cancel(self, id: str) -> None:
        """Cancels the exchange that has this id in the latest reading."""
        self._write(CANCEL + id.encode())


class _Moved(NamedTuple):
    """What an exchange has moved so far."""

    events: int = 0
    deltas: int = 0
    request_bytes: int = 0
    response_bytes: int = 0


_NOTHING_YET = _Moved()


class Telemetry:
    """The numbers of a worker. `send` sends a report; it returns False if it cannot send one now.

    `gauges` returns the gauges of the worker. It is called for each report. Without `detailed`, there are fewer labels.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        send: Callable[[Report], bool],
        gauges: Callable[[], Iterable[tuple[Metric, Labels, float]]],
        access: AccessLog | None = None,
        *,
        detailed: bool = True,
    ) -> None:
        self.recorder = Recorder()
        self.access = access
        self.detailed = detailed
        self._loop = loop
        self._send = send
        self._gauges = gauges
        self._observers: dict[tuple[str, str, str], RouteObserver] = {}
        self.running: dict[Exchange, _Moved] = {}
        """The active exchanges, each with what was counted of it so far. The one counted longest ago comes first."""
        self._settling: asyncio.TimerHandle | None = None
        self._report_due = 0.0
        self._asked = False
        self._lag = self.recorder.histogram(metrics.LOOP_LAG, ())

    def observer(self, route: str, upstream: str, model: str) -> RouteObserver:
        """The observer of exchanges with these labels. The same labels get the same observer."""
        key = (route, upstream, model)
        found = self._observers.get(key)
        if found is None:
            found = self._observers[key] = RouteObserver(self, (route, upstream), model)
        return found

    def changed(self) -> None:
        """Schedules a report: `REPORT_INTERVAL` after the last one, or soon if that has passed."""
        if self._settling is None:
            self._settling = self._loop.call_later(_SETTLE_INTERVAL, self._settle)

    def _settle(self) -> None:
        self._settling = None
        if perf_counter() >= self._report_due:
            self.report()
        else:
            self.recorder.settle()
            if self.access is not None:
                self.access.flush()
            self.changed()

    def report(self, *, asked: bool = False) -> None:
        """Sends what has changed. `asked`: the supervisor has requested it."""
        self._asked = self._asked or asked
        self._report_due = perf_counter() + REPORT_INTERVAL
        if self.access is not None:
            self.access.flush()
        for exchange in list(islice(self.running, _COUNTED_AT_ONCE)):
            moved = _count_moved(exchange, self.running[exchange])
            # It goes to the end, so the next report begins with those after it.
            del self.running[exchange]
            self.running[exchange] = moved
        for metric, labels, value in self._gauges():
            self.recorder.set(metric, labels, value)
        report = self.recorder.report(asked=self._asked)
        sent = self._send(report)
        if sent:
            self._asked = False
        else:
            self.recorder.take_back(report)
        if self.running or not sent:
            # Events within an exchange do not schedule a report, so an active exchange keeps them going.
            self.changed()

    def close(self) -> None:
        """Sends the last report."""
        self.report()
        if self._settling is not None:
            self._settling.cancel()
        if self.access is not None:
            self.access.close()

    def lagged(self, seconds: float) -> None:
        """Records that a timer of the event loop has fired so many seconds late."""
        self._lag.observe(seconds)
        self.changed()


def _count_moved(exchange: Exchange, told: _Moved) -> _Moved:
    """Counts what `exchange` has moved in addition to `told`. Returns all that it has moved so far."""
    moved = _Moved(exchange.events, exchange.deltas, exchange.request_bytes, exchange.response_bytes)
    if moved != told:
        observer = exchange.observer
        assert isinstance(observer, RouteObserver)
        observer.moved(moved, told)
    return moved


class RouteObserver:
    """Implements `relay.exchange.Observer` for one route, upstream and model label."""

    __slots__ = (
        "_connect",
        "_detailed",
        "_first_token",
        "_head",
        "_labels",
        "_of_model",
        "_of_whole",
        "_recorder",
        "_telemetry",
        "first_event",
        "forwarded",
        "gap",
        "released",
    )

    def __init__(self, telemetry: Telemetry, labels: Labels, model: str) -> None:
        recorder = telemetry.recorder
        self._telemetry = telemetry
        self._recorder = recorder
        self._labels = labels
        self._of_model = (*labels, model)
        self._of_whole: RouteObserver | None = None
        self._detailed = (*labels, model if telemetry.detailed else "")
        self._connect = recorder.histogram(metrics.CONNECT_TIME, labels)
        self._head = recorder.histogram(metrics.TO_HEAD, labels)
        self._first_token = recorder.histogram(metrics.TO_FIRST_TOKEN, self._of_model)
        self.first_event = recorder.histogram(metrics.TO_FIRST_EVENT, labels).observe
        self.gap = recorder.histogram(metrics.GAPS, self._detailed).observe
        self.forwarded = recorder.histogram(metrics.FORWARD, labels).observe
        self.released = recorder.histogram(metrics.RELEASE, labels).observe

    def started(self, exchange: Exchange) -> None:
        self._telemetry.running[exchange] = _NOTHING_YET
        self._recorder.move(metrics.REQUESTS_ACTIVE, self._labels, 1)
        if exchange.client_name:
            self._recorder.move(metrics.CLIENT_ACTIVE, (exchange.client_name,), 1)
        self._telemetry.changed()

    def rejected(self, reason: str) -> None:
        self._recorder.count(metrics.REJECTED, (self._labels[0], reason))
        if reason in _WRONG_KEYS:
            self._recorder.count(metrics.KEYS_REJECTED, ())

    def limited(self, client: str, limit: str) -> None:
        self._recorder.count(metrics.CLIENT_LIMITED, (client, limit))

    def ledger_failed(self) -> None:
        self._recorder.count(metrics.LEDGER_FAILURES, ())

    def upstream_failed(self, kind: str, *, answered: bool) -> None:
        self._recorder.count(metrics.UPSTREAM_ERRORS, (*self._labels, kind))
        if not answered:
            self._recorder.set(metrics.UPSTREAM_UP, self._labels[1:], 0)

    def attempted(self, endpoint: str, result: str) -> None:
        self._recorder.count(metrics.ATTEMPTS, (self._labels[1], endpoint, result))

    def retried(self, reason: str) -> None:
        self._recorder.count(metrics.RETRIES, (*self._labels, reason))

    def discarded(self, usage: Usage) -> None:
        for kind, tokens in _counted(usage):
            self._recorder.count(metrics.DISCARDED_TOKENS, (*self._of_model[1:], kind), tokens)

    def held(self, seconds: float) -> None:
        self._recorder.histogram(metrics.HELD, self._labels).observe(seconds)

    def of_whole_answers(self) -> RouteObserver:
        """The observer of exchanges that are held back until their end: it records no times between tokens."""
        if self._of_whole is None:
            self._of_whole = RouteObserver(self._telemetry, self._labels, self._of_model[-1])
            self._of_whole.gap = lambda seconds, /: None
        return self._of_whole

    def handed_over(self, exchange: Exchange, to: Observer) -> None:
        """From now on, `to` observes `exchange`, and counts it for its labels. What it has moved so far stays here."""
        assert isinstance(to, RouteObserver)
        running = self._telemetry.running
        running[exchange] = _count_moved(exchange, running[exchange])
        self._recorder.move(metrics.REQUESTS_ACTIVE, self._labels, -1)
        self._recorder.move(metrics.REQUESTS_ACTIVE, to._labels, 1)
        if exchange.is_stream:
            self._recorder.move(metrics.STREAMS_ACTIVE, self._labels, -1)
            self._recorder.move(metrics.STREAMS_ACTIVE, to._labels, 1)
        exchange.observer = to

    def connected(self, seconds: float, *, reused: bool) -> None:
        if reused:
            self._recorder.count(metrics.REUSED, self._labels)
        else:
            self._connect.observe(seconds)

    def response_head(self, seconds: float) -> None:
        self._head.observe(seconds)
        self._recorder.set(metrics.UPSTREAM_UP, self._labels[1:], 1)

    def stream_started(self) -> None:
        self._recorder.move(metrics.STREAMS_ACTIVE, self._labels, 1)

    def first_token(self, seconds: float, request_id: str) -> None:
        self._first_token.observe(seconds)
        if len(request_id) <= _EXEMPLAR_ID:
            self._first_token.example(seconds, request_id, time.time())  # noqa: TID251 - a point in time

    def moved(self, now: _Moved, told: _Moved) -> None:
        """Counts the difference between what an exchange has moved by `now`, and what was `told` of it."""
        count, labels = self._recorder.count, self._labels
        if by := now.events - told.events:
            count(metrics.EVENTS, labels, by)
        if by := now.deltas - told.deltas:
            count(metrics.DELTAS, self._detailed, by)
        if by := now.request_bytes - told.request_bytes:
            count(metrics.REQUEST_BYTES, labels, by)
        if by := now.response_bytes - told.response_bytes:
            count(metrics.RESPONSE_BYTES, labels, by)

    def finished(self, exchange: Exchange) -> None:
        recorder, labels, detailed = self._recorder, self._labels, self._detailed
        assert exchange.outcome is not None
        assert exchange.ended_at is not None
        told = self._telemetry.running.pop(exchange, _NOTHING_YET)
        recorder.move(metrics.REQUESTS_ACTIVE, labels, -1)
        if exchange.client_name:
            recorder.move(metrics.CLIENT_ACTIVE, (exchange.client_name,), -1)
        code = exchange.status or _CLIENT_CLOSED_REQUEST
        recorder.count(metrics.REQUESTS, (*detailed, str(code), exchange.outcome.value))
        how = (str(exchange.is_stream).lower(), exchange.outcome.value) if self._telemetry.detailed else ("", "")
        duration = recorder.histogram(metrics.REQUEST_DURATION, (*detailed, *how))
        duration.observe(exchange.ended_at - exchange.received_at)
        if exchange.is_stream:
            recorder.move(metrics.STREAMS_ACTIVE, labels, -1)
            if exchange.garbled:
                recorder.count(metrics.EVENTS_GARBLED, labels, exchange.garbled)
            if exchange.usage is None and not exchange.repeats:
                recorder.count(metrics.WITHOUT_USAGE, (*labels, _why_without_usage(exchange)))
            if exchange.outcome is Outcome.COMPLETED and exchange.unread != "encoded":
                recorder.count(metrics.STREAM_ENDS, (*labels, "marker" if exchange.marker_seen else "eof"))
        elif exchange.lacks_usage and exchange.outcome is Outcome.COMPLETED:
            recorder.count(metrics.ANSWERS_WITHOUT_USAGE, labels)
        _count_moved(exchange, told)
        if exchange.unread is not None:
            recorder.count(metrics.NOT_READ, (*labels, exchange.unread))
        if exchange.finish_reason is not None and not exchange.repeats:
            recorder.count(metrics.FINISHED, (*detailed, metrics.reason_label(exchange.finish_reason)))
        if exchange.client_name:
            self._count_client(exchange, exchange.outcome)
        if exchange.usage is not None:
            self._count_usage(exchange.usage, exchange.client_name, completed=exchange.outcome is Outcome.COMPLETED)
        if (pace := exchange.seconds_per_token()) is not None:
            recorder.histogram(metrics.TPOT, self._of_model).observe(pace)
        if self._telemetry.access is not None:
            self._telemetry.access.ended(exchange)
        self._telemetry.changed()

    def _count_client(self, exchange: Exchange, outcome: Outcome) -> None:
        name = exchange.client_name
        self._recorder.count(metrics.CLIENT_REQUESTS, (name, outcome.value))
        if exchange.estimated:
            self._recorder.count(metrics.CLIENT_TOKENS, (name, self._of_model[-1], "estimated"), exchange.estimated)

    def _count_usage(self, usage: Usage, client: str, *, completed: bool) -> None:
        for kind, tokens in _counted(usage):
            self._recorder.count(metrics.TOKENS, (*self._of_model, kind), tokens)
            if client:
                self._recorder.count(metrics.CLIENT_TOKENS, (client, self._of_model[-1], kind), tokens)
        if usage.seconds:
            self._recorder.count(metrics.SECONDS, self._labels, usage.seconds)
        for kind, of_one in (("input", usage.input), ("output", usage.output)):
            if completed and of_one is not None:
                self._recorder.histogram(metrics.TOKENS_PER_REQUEST, (*self._detailed, kind)).observe(of_one)


def _counted(usage: Usage) -> Iterator[tuple[str, int]]:
    """The tokens of each type, without those that are 0 or not told."""
    for kind in ("input", "output", "cached_input", "cache_write", "reasoning"):
        if tokens := getattr(usage, kind):
            yield kind, tokens


def _why_without_usage(exchange: Exchange) -> str:
    """The `reason` label of `streams_without_usage`. `not_reported`: the stream was complete and had no usage."""
    if exchange.unread is not None:
        return "not_read"
    if exchange.outcome is Outcome.COMPLETED:
        return "not_reported"
    return "client_gone" if str(exchange.outcome).startswith("client_gone") else "not_completed"
