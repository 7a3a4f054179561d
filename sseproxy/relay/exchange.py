"""The record of one exchange, its clock, and the inspector that reads along.

An `Exchange` is created when a request head was received and finished exactly once. What happens in between it tells
to an `Observer` at the moment it happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import ExchangeError, Outcome, Phase, StalledClient, UpstreamTimeout
from ..wire.dialects import DELTA, NOTHING, Alike, Dialect, Meaning, Usage, alike
from ..wire.sse import EventParser

if TYPE_CHECKING:
    from ..config import Timeouts

# A stream whose events have not been alike for so many is none whose events are.
_TRIES = 8
# Of so many, or half of them, the median is told well enough.
_MAX_GAPS = 32


class Observer(Protocol):
    """What an exchange tells while it lives. Durations are in seconds."""

    def started(self) -> None: ...
    def rejected(self, reason: str) -> None: ...
    def upstream_failed(self, kind: str, *, answered: bool) -> None: ...
    def response_head(self, seconds: float) -> None: ...
    def stream_started(self) -> None: ...
    def first_event(self, seconds: float, /) -> None: ...
    def first_token(self, seconds: float, request_id: str) -> None: ...
    def gap(self, seconds: float, /) -> None: ...
    def forwarded(self, seconds: float, /) -> None: ...
    def released(self, seconds: float, /) -> None: ...
    def finished(self, exchange: Exchange) -> None: ...


class Exchange:
    """One request and its response, as an operator wants to know it. Instants are `perf_counter` readings."""

    __slots__ = (
        "_passed_over",
        "api",
        "client",
        "ended_at",
        "events",
        "finish_reason",
        "first_delta_at",
        "first_event_at",
        "first_token_at",
        "gaps",
        "garbled",
        "head_at",
        "is_stream",
        "last_delta_at",
        "longest_gap",
        "marker_seen",
        "method",
        "model",
        "observer",
        "outcome",
        "reason",
        "received_at",
        "request_bytes",
        "request_id",
        "response_bytes",
        "route",
        "status",
        "stream_error",
        "traceparent",
        "unread",
        "upstream",
        "usage",
    )

    def __init__(self, route: str, upstream: str, observer: Observer, request_id: str, received_at: float) -> None:
        self.route = route
        self.upstream = upstream
        self.observer = observer
        self.request_id = request_id
        self.received_at = received_at
        self.client = self.method = self.api = ""
        self.model: str | None = None
        """As the request has it."""
        self.traceparent: str | None = None
        self.reason: str | None = None
        """The code of the error that ended it."""
        self.head_at: float | None = None
        self.first_event_at: float | None = None
        self.first_token_at: float | None = None
        self.first_delta_at: float | None = None
        self.last_delta_at = 0.0
        self.longest_gap = 0.0
        """The longest gap between deltas, in seconds."""
        self.gaps: list[float] = []
        """The gaps between deltas, in seconds; of more than a few, every other, every fourth, and so on."""
        self._passed_over = 0
        self.ended_at: float | None = None
        self.status: int | None = None
        self.is_stream = False
        self.events = 0
        self.garbled = 0
        self.request_bytes = 0
        self.response_bytes = 0
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.marker_seen = False
        """The dialect's end was seen, and forwarded."""
        self.stream_error = False
        self.unread: Literal["encoded", "oversize"] | None = None
        """Why the body, or a part of it, could not be read in passing."""
        self.outcome: Outcome | None = None
        observer.started()

    def head_received(self, status: int, event_stream: bool) -> None:
        self.status = status
        self.is_stream = event_stream
        self.head_at = perf_counter()
        self.observer.response_head(self.head_at - self.received_at)
        if event_stream:
            self.observer.stream_started()

    def happened(self, meaning: Meaning, read_at: float) -> None:
        """An event, read at `read_at`, was written downstream."""
        if meaning.delta and self.first_token_at is not None:
            self.generated(0, read_at)
        else:
            self._begins(meaning, read_at)
        if meaning is DELTA:
            return
        if meaning.usage is not None:
            earlier = self.usage if meaning.overlay else None
            self.usage = meaning.usage if earlier is None else earlier.overlaid(meaning.usage)
        if meaning.finish is not None:
            self.finish_reason = meaning.finish
        if meaning.end or meaning.more:
            self.marker_seen = meaning.end
        if meaning.error:
            self.stream_error = True
        if not meaning.understood:
            self.garbled += 1

    def _begins(self, meaning: Meaning, read_at: float) -> None:
        """The first event, the first token, or what comes before it or means none."""
        self.events += 1
        if self.first_event_at is None:
            self.first_event_at = perf_counter()
            self.observer.first_event(self.first_event_at - self.received_at)
        if meaning.delta:
            self.first_delta_at = self.last_delta_at = read_at
            self.first_token_at = perf_counter()
            self.observer.first_token(self.first_token_at - self.received_at, self.request_id)

    def generated(self, size: int, read_at: float) -> None:
        """A delta that is not the first one, in an event of `size` bytes of which nothing is counted yet."""
        self.events = events = self.events + 1
        self.response_bytes += size
        gap, observe = read_at - self.last_delta_at, self.observer.gap
        self.last_delta_at = read_at
        observe(gap)
        if gap > self.longest_gap:
            self.longest_gap = gap
        if not events & self._passed_over:
            self._sample(gap)

    def _sample(self, gap: float) -> None:
        self.gaps.append(gap)
        if len(self.gaps) == _MAX_GAPS:
            del self.gaps[::2]
            self._passed_over = 2 * self._passed_over + 1

    def completed(self) -> Outcome:
        """The outcome if all of the response was forwarded."""
        return Outcome.UPSTREAM_ERROR if self.stream_error else Outcome.COMPLETED

    def failed(self, error: ExchangeError) -> Outcome:
        """The outcome if `error` ends it now. What follows the end marker concerns nobody."""
        return self.completed() if self.marker_seen and not isinstance(error, StalledClient) else error.outcome

    def client_left(self) -> Outcome:
        """The outcome if the client leaves now."""
        if self.marker_seen:
            return self.completed()
        if self.head_at is None:
            return Outcome.CLIENT_GONE_BEFORE_HEAD
        if self.is_stream and self.first_token_at is None:
            return Outcome.CLIENT_GONE_BEFORE_FIRST_TOKEN
        return Outcome.CLIENT_GONE_MID_STREAM

    def finish(self, outcome: Outcome) -> None:
        """Records the end. Called once, by the last phase of every exchange."""
        assert self.outcome is None, f"a second outcome {outcome}, after {self.outcome}"
        self.outcome = outcome
        self.ended_at = perf_counter()
        self.observer.finished(self)


class Clock:
    """The one timer of an exchange: the deadline of its present phase, of a client that blocks it, and of the whole.

    Moving a deadline is an assignment; the timer looks where it stands now when it fires, so that a chunk costs
    nothing here. `fail` is called with the error of the deadline that passed.
    """

    __slots__ = (
        "_armed_for",
        "_blocked_at",
        "_fail",
        "_handle",
        "_limit",
        "_loop",
        "_phase",
        "_stalled",
        "_timeouts",
        "_total_due",
        "touched",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, timeouts: Timeouts, started: float, fail: Callable[[ExchangeError], None]
    ) -> None:
        self.touched = started
        """When the phase's progress was last seen; its time counts from here."""
        self._timeouts = timeouts
        self._loop = loop
        self._fail = fail
        self._phase: Phase | Literal["body"] = "connect"
        self._limit = timeouts.connect
        self._stalled: Callable[[], bool] | None = None
        self._blocked_at = 0.0
        self._total_due = started + timeouts.total if timeouts.total is not None else float("inf")
        self._armed_for = float("inf")
        self._handle: asyncio.TimerHandle | None = None

    def enter(self, phase: Phase | Literal["body"], since: float) -> None:
        """`phase` begins; its time counts from `since`. In `body` it is the client's request that is waited for."""
        self._phase = phase
        self._limit = getattr(self._timeouts, phase)
        self.touched = since
        self._arm()

    def client_blocked(self, stalled: Callable[[], bool]) -> None:
        """The client does not take what it is sent, and the phase's time stands still.

        `stalled` tells whether it has taken nothing since asked last.
        """
        self._stalled = stalled
        self._blocked_at = perf_counter()
        self._arm()

    def client_unblocked(self) -> None:
        """The client takes again what it is sent; the phase's time counts anew."""
        self._stalled = None
        self.touched = perf_counter()
        self._arm()

    def only_client(self, stalled: Callable[[], bool]) -> None:
        """Nothing is waited for any more but that the client takes the last bytes."""
        self._total_due = float("inf")
        self.client_blocked(stalled)

    @property
    def patience(self) -> float:
        """Seconds that the client may take to send something of its request's body."""
        return self._timeouts.body

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _due(self) -> float:
        own = self.touched + self._limit if self._stalled is None else self._blocked_at + self._timeouts.write
        return min(own, self._total_due)

    def _arm(self) -> None:
        due = self._due()
        if self._handle is not None:
            if self._armed_for <= due:
                return
            self._handle.cancel()
        self._armed_for = due
        self._handle = self._loop.call_later(max(0.0, due - perf_counter()), self._fire)

    def _fire(self) -> None:
        self._handle = None
        now = perf_counter()
        if now < self._due():
            self._arm()
        elif now >= self._total_due:
            self._fail(UpstreamTimeout("total", self._timeouts.total or 0.0))
        elif self._stalled is not None:
            if self._stalled():
                self._fail(StalledClient("took", self._timeouts.write))
            else:
                self._blocked_at = now
                self._arm()
        elif self._phase == "body":
            self._fail(StalledClient("sent", self._limit))
        else:
            self._fail(UpstreamTimeout(self._phase, self._limit))


class Inspector:
    """Reads along with a body that is forwarded elsewhere, and tells the exchange what it meant.

    It can neither stop nor delay the bytes: what it cannot follow it counts, and lets go.
    """

    __slots__ = ()

    alike: Alike | None = None
    """Recognises reads that are like the one that was looked at last, and need not be: each is another delta."""

    def look(self, payload: bytes, read_at: float) -> None:
        """`payload` was written downstream, read from the upstream at `read_at`."""

    def end(self) -> None:
        """The body is complete."""

    def heartbeat(self) -> bytes:
        """What may be forwarded now to show that the body goes on; empty where nothing may."""
        return b""

    def farewell(self, error: ExchangeError) -> bytes:
        """What may still be forwarded to say that `error` ends the body; empty where nothing can be understood."""
        return b""


class StreamInspector(Inspector):
    """An event stream in `dialect`."""

    __slots__ = (
        "_alike_since",
        "_awaits_token",
        "_clock",
        "_exchange",
        "_numbered",
        "_parser",
        "_read",
        "_tries",
        "alike",
    )

    def __init__(self, exchange: Exchange, dialect: Dialect, clock: Clock, max_event: int) -> None:
        self._exchange = exchange
        self._clock = clock
        self._parser = EventParser(dialect.max_event(max_event))
        self._read = dialect.read
        self._numbered = dialect.numbered
        self._awaits_token = dialect.generates
        # For how many events more it is worth to make an `alike`, and how many there had been at the last one.
        self._tries = _TRIES
        self._alike_since = 0
        self.alike = None
        if dialect.generates:
            clock.enter("first_token", exchange.received_at)

    def look(self, payload: bytes, read_at: float) -> None:
        exchange, parser = self._exchange, self._parser
        fresh, meaning = parser.fresh, NOTHING
        if self.alike is not None and exchange.events > self._alike_since:
            self._tries = _TRIES
        events = parser.feed(payload)
        for kind, data in events:
            if data is None:
                exchange.unread = "oversize"
            meaning = NOTHING if data is None else self._read(kind, data)
            exchange.happened(meaning, read_at)
            if not self._awaits_token:
                self._clock.touched = read_at
            elif exchange.first_token_at is not None:
                self._awaits_token = False
                self._clock.enter("idle", read_at)
        self.alike = None
        if meaning is DELTA and len(events) == 1 and fresh and parser.fresh and self._tries:
            self._tries -= 1
            self._alike_since = exchange.events
            self.alike = alike(payload)

    def heartbeat(self) -> bytes:
        # One line and no blank one: with a blank line, openai for Python fails on streams that have used `id`.
        return b": heartbeat\n" if self._parser.at_boundary and not self._exchange.marker_seen else b""

    def farewell(self, error: ExchangeError) -> bytes:
        if not self._parser.at_boundary or self._exchange.marker_seen:
            return b""
        return error.event(self._exchange.events if self._numbered else None)


class JsonInspector(Inspector):
    """A JSON body in `dialect`, looked at as a whole if it is no larger than an event may be."""

    __slots__ = ("_clock", "_exchange", "_limit", "_parts", "_read", "_size")

    def __init__(self, exchange: Exchange, dialect: Dialect, clock: Clock, max_event: int) -> None:
        self._exchange = exchange
        self._read = dialect.read
        self._clock = clock
        self._limit = dialect.max_event(max_event)
        self._parts: list[bytes] = []
        self._size = 0

    def look(self, payload: bytes, read_at: float) -> None:
        self._clock.touched = read_at
        self._size += len(payload)
        if self._size <= self._limit:
            self._parts.append(payload)
        elif self._parts:
            self._parts.clear()
            self._exchange.unread = "oversize"

    def end(self) -> None:
        self._exchange.usage = self._read(b"", b"".join(self._parts)).usage


class OpaqueInspector(Inspector):
    """Bytes that mean nothing here."""

    __slots__ = ("_clock",)

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def look(self, payload: bytes, read_at: float) -> None:
        self._clock.touched = read_at
