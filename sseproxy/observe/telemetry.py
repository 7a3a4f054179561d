"""Counts what happens in exchanges, and sends the numbers from a worker to its supervisor.

A worker sends reports through its channel. A report is a frame: a length of four bytes, and so many bytes of msgpack.
In the other direction, the supervisor sends a byte. `?` requests a report now, `l` a reading for the live view, which
is a frame as well. `x`, followed by the id of an exchange, cancels that exchange.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from itertools import islice
from time import perf_counter
from typing import Final, TypeVar

import msgspec

from ..errors import Outcome
from ..relay.exchange import Exchange, Observer
from ..wire.meaning import Usage
from . import metrics
from .access import AccessLog
from .live import ID_SIZE, Reading
from .metrics import HistogramRecorder, Labels, Metric, Number, Recorder, Report

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

# The types of tokens, in the order of `_by_type`.
_TYPES: Final = ("input", "output", "cached_input", "cache_write", "reasoning")
# Why a request with a wrong key is refused.
_WRONG_KEYS = frozenset({"invalid_api_key", "too_many_wrong_keys"})

K = TypeVar("K")
V = TypeVar("V")

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


class _Moved(msgspec.Struct, frozen=True, gc=False):
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
        for observer in self._observers.values():
            observer.settle()
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


class Lazy(dict[K, V]):
    """A dictionary whose values are made by `make` from their keys, when they are looked for first."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make = make

    def __missing__(self, key: K) -> V:
        made = self[key] = self._make(key)
        return made


class _Client:
    """The numbers of one client that are counted for each of its requests, for one model label."""

    __slots__ = ("active", "estimated", "requests", "tokens")

    def __init__(self, recorder: Recorder, name: str, model: str) -> None:
        self.requests: Lazy[Outcome, Number] = Lazy(
            lambda outcome: recorder.counter(metrics.CLIENT_REQUESTS, (name, outcome))
        )
        self.active = recorder.gauge(metrics.CLIENT_ACTIVE, (name,))
        self.tokens = [recorder.counter(metrics.CLIENT_TOKENS, (name, model, kind)) for kind in _TYPES]
        self.estimated = recorder.counter(metrics.CLIENT_TOKENS, (name, model, "estimated"))


class RouteObserver:
    """Implements `relay.exchange.Observer` for one route, upstream and model label."""

    __slots__ = (
        "_active",
        "_attempts",
        "_clients",
        "_connect",
        "_deltas",
        "_detailed",
        "_ends",
        "_events",
        "_first_token",
        "_head",
        "_input",
        "_labels",
        "_of_model",
        "_of_whole",
        "_output",
        "_recorder",
        "_request_bytes",
        "_response_bytes",
        "_reused",
        "_telemetry",
        "_tokens",
        "_up",
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
        # What is counted for most exchanges is looked up only once.
        self._active = recorder.gauge(metrics.REQUESTS_ACTIVE, labels)
        self._reused = recorder.counter(metrics.REUSED, labels)
        self._up = recorder.state(metrics.UPSTREAM_UP, labels[1:])
        self._events = recorder.counter(metrics.EVENTS, labels)
        self._deltas = recorder.counter(metrics.DELTAS, self._detailed)
        self._request_bytes = recorder.counter(metrics.REQUEST_BYTES, labels)
        self._response_bytes = recorder.counter(metrics.RESPONSE_BYTES, labels)
        self._tokens = [recorder.counter(metrics.TOKENS, (*self._of_model, kind)) for kind in _TYPES]
        # Since the last report, by the endpoint and the result.
        self._attempts = Counter[tuple[str, str]]()
        # By the status, the outcome, and whether it is a stream.
        self._ends = Lazy(self._new_end)
        self._clients = Lazy(self._new_client)
        self._connect = recorder.histogram(metrics.CONNECT_TIME, labels)
        self._head = recorder.histogram(metrics.TO_HEAD, labels)
        self._first_token = recorder.histogram(metrics.TO_FIRST_TOKEN, self._of_model)
        self._input = recorder.histogram(metrics.TOKENS_PER_REQUEST, (*self._detailed, "input"))
        self._output = recorder.histogram(metrics.TOKENS_PER_REQUEST, (*self._detailed, "output"))
        self.first_event = recorder.histogram(metrics.TO_FIRST_EVENT, labels).observe
        self.gap = recorder.histogram(metrics.GAPS, self._detailed).observe
        self.forwarded = recorder.histogram(metrics.FORWARD, labels).observe
        self.released = recorder.histogram(metrics.RELEASE, labels).observe

    def started(self, exchange: Exchange) -> None:
        self._telemetry.running[exchange] = _NOTHING_YET
        self._active.value += 1
        if exchange.client_name:
            self._clients[exchange.client_name].active.value += 1
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
            self._up.value = 0

    def attempted(self, endpoint: str, result: str) -> None:
        self._attempts[endpoint, result] += 1

    def settle(self) -> None:
        """Counts the attempts since the last call. Endpoints come and go, so no number of each is kept."""
        for (endpoint, result), number in self._attempts.items():
            self._recorder.count(metrics.ATTEMPTS, (self._labels[1], endpoint, result), number)
        self._attempts.clear()

    def retried(self, reason: str) -> None:
        self._recorder.count(metrics.RETRIES, (*self._labels, reason))

    def discarded(self, usage: Usage) -> None:
        for kind, tokens in zip(_TYPES, _by_type(usage), strict=True):
            if tokens:
                self._recorder.count(metrics.DISCARDED_TOKENS, (*self._of_model[1:], kind), tokens)

    def held(self, seconds: float) -> None:
        self._recorder.histogram(metrics.HELD, self._labels).observe(seconds)

    def of_whole_answers(self) -> RouteObserver:
        """The observer of exchanges that are held back until their end: it records no times between tokens."""
        if self._of_whole is None:
            self._of_whole = RouteObserver(self._telemetry, self._labels, self._of_model[-1])
            self._of_whole.gap = lambda seconds, /: None
            self._of_whole._attempts = self._attempts
        return self._of_whole

    def handed_over(self, exchange: Exchange, to: Observer) -> None:
        """From now on, `to` observes `exchange`, and counts it for its labels. What it has moved so far stays here."""
        assert isinstance(to, RouteObserver)
        running = self._telemetry.running
        running[exchange] = _count_moved(exchange, running[exchange])
        self._active.value -= 1
        to._active.value += 1
        if exchange.is_stream:
            self._recorder.move(metrics.STREAMS_ACTIVE, self._labels, -1)
            self._recorder.move(metrics.STREAMS_ACTIVE, to._labels, 1)
        exchange.observer = to

    def connected(self, seconds: float) -> None:
        self._connect.observe(seconds)

    def reused(self) -> None:
        self._reused.value += 1

    def response_head(self, seconds: float) -> None:
        self._head.observe(seconds)
        self._up.value = 1

    def stream_started(self) -> None:
        self._recorder.move(metrics.STREAMS_ACTIVE, self._labels, 1)

    def first_token(self, seconds: float, request_id: str) -> None:
        self._first_token.observe(seconds)
        if len(request_id) <= _EXEMPLAR_ID:
            self._first_token.example(seconds, request_id, time.time())  # noqa: TID251 - a point in time

    def moved(self, now: _Moved, told: _Moved) -> None:
        """Counts the difference between what an exchange has moved by `now`, and what was `told` of it."""
        self._events.value += now.events - told.events
        self._deltas.value += now.deltas - told.deltas
        self._request_bytes.value += now.request_bytes - told.request_bytes
        self._response_bytes.value += now.response_bytes - told.response_bytes

    def finished(self, exchange: Exchange) -> None:
        recorder, labels, detailed = self._recorder, self._labels, self._detailed
        assert exchange.outcome is not None
        assert exchange.ended_at is not None
        told = self._telemetry.running.pop(exchange, _NOTHING_YET)
        self._active.value -= 1
        client = self._clients[exchange.client_name] if exchange.client_name else None
        if client is not None:
            client.active.value -= 1
            client.requests[exchange.outcome].value += 1
            client.estimated.value += exchange.estimated
        requests, duration = self._ends[exchange.status or _CLIENT_CLOSED_REQUEST, exchange.outcome, exchange.is_stream]
        requests.value += 1
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
        if exchange.usage is not None:
            self._count_usage(exchange.usage, client, completed=exchange.outcome is Outcome.COMPLETED)
        if (pace := exchange.seconds_per_token()) is not None:
            recorder.histogram(metrics.TPOT, self._of_model).observe(pace)
        if self._telemetry.access is not None:
            self._telemetry.access.ended(exchange)
        self._telemetry.changed()

    def _new_end(self, how: tuple[int, Outcome, bool]) -> tuple[Number, HistogramRecorder]:
        """Counts the exchanges that end like this, and how long they take."""
        status, outcome, streamed = how
        more = (str(streamed).lower(), outcome) if self._telemetry.detailed else ("", "")
        return (
            self._recorder.counter(metrics.REQUESTS, (*self._detailed, str(status), outcome)),
            self._recorder.histogram(metrics.REQUEST_DURATION, (*self._detailed, *more)),
        )

    def _new_client(self, name: str) -> _Client:
        return _Client(self._recorder, name, self._of_model[-1])

    def _count_usage(self, usage: Usage, client: _Client | None, *, completed: bool) -> None:
        _add_tokens(self._tokens, usage)
        if client is not None:
            _add_tokens(client.tokens, usage)
        if usage.seconds:
            self._recorder.count(metrics.SECONDS, self._labels, usage.seconds)
        if completed and usage.input is not None:
            self._input.observe(usage.input)
        if completed and usage.output is not None:
            self._output.observe(usage.output)


def _by_type(usage: Usage) -> tuple[int | None, ...]:
    """The tokens of each of `_TYPES`."""
    return usage.input, usage.output, usage.cached_input, usage.cache_write, usage.reasoning


def _add_tokens(numbers: list[Number], usage: Usage) -> None:
    """Adds the tokens of each type to its number. Those that are not told count nothing."""
    for number, tokens in zip(numbers, _by_type(usage), strict=True):
        if tokens:
            number.value += tokens


def _why_without_usage(exchange: Exchange) -> str:
    """The `reason` label of `streams_without_usage`. `not_reported`: the stream was complete and had no usage."""
    if exchange.unread is not None:
        return "not_read"
    if exchange.outcome is Outcome.COMPLETED:
        return "not_reported"
    return "client_gone" if str(exchange.outcome).startswith("client_gone") else "not_completed"
