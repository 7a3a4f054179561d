"""The record of one exchange.

An `Exchange` is created when a request head was received and finished exactly once. What happens in between it tells
to an `Observer` at the moment it happens.
"""

from __future__ import annotations

from time import perf_counter
from typing import Literal, Protocol

from ..errors import ExchangeError, Outcome, StalledClient
from ..wire.meaning import DELTA, Meaning, Usage

# Of so many, or half of them, the median is told well enough.
_MAX_GAPS = 32
# Answers are asked for until they are there, and soon after that. Each takes some 100 bytes.
_MAX_KEPT = 10_000


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


class Kept:
    """The answers that upstreams keep and that were counted here, the latest ones: each is counted once.

    This is of one worker, because none knows what others have counted.
    """

    def __init__(self) -> None:
        self._counted: dict[int, None] = {}

    def settle(self, exchange: Exchange) -> None:
        """Says of an exchange that has ended whether it repeats what was counted."""
        if exchange.usage is None:
            return
        if exchange.kept_as is None:
            # One that is not generated in the background was counted with the answer to its POST.
            exchange.repeats = exchange.fetches
        else:
            # Names may have any length; their hashes are not chosen by anybody.
            name = hash((exchange.upstream, exchange.kept_as))
            exchange.repeats = name in self._counted
            self._counted[name] = None
            if len(self._counted) > _MAX_KEPT:
                del self._counted[next(iter(self._counted))]
        if exchange.repeats:
            exchange.usage = None


class Exchange:
    """One request and its response, as an operator wants to know it. Instants are `perf_counter` readings."""

    __slots__ = (
        "_passed_over",
        "api",
        "cause",
        "client",
        "complained",
        "ended_at",
        "events",
        "fetches",
        "finish_reason",
        "first_delta_at",
        "first_event_at",
        "first_token_at",
        "gaps",
        "garbled",
        "head_at",
        "is_stream",
        "kept_as",
        "lacks_usage",
        "last_delta_at",
        "longest_gap",
        "marker_seen",
        "method",
        "model",
        "observer",
        "outcome",
        "path",
        "reason",
        "received_at",
        "repeats",
        "reported_error",
        "request_bytes",
        "request_id",
        "response_bytes",
        "route",
        "status",
        "streamed_reasoning",
        "traceparent",
        "unread",
        "upstream",
        "upstream_request_id",
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
        self.cause: str | None = None
        """What exactly failed then, where more is known."""
        self.path = ""
        """That of the request, as it came, without its query."""
        self.upstream_request_id: bytes | None = None
        """What the upstream calls the request."""
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
        self.lacks_usage = False
        """A JSON answer tells no usage, and should."""
        self.fetches = False
        """It asks for an answer that was generated before, or is."""
        self.repeats = False
        """Its usage is counted already, as that of another exchange."""
        self.kept_as: str | None = None
        """The name under which the upstream keeps the answer, for whoever asks for it later."""
        self.streamed_reasoning = False
        """Some of the reasoning was among the deltas."""
        self.finish_reason: str | None = None
        self.marker_seen = False
        """The dialect's end was seen, and forwarded."""
        self.reported_error = False
        """The upstream has said that it failed."""
        self.complained = False
        """It has said a code or a message, which is a failure if nothing else comes."""
        self.unread: Literal["encoded", "oversize", "unknown", "failed"] | None = None
        """Why the body, or a part of it, could not be read in passing."""
        self.outcome: Outcome | None = None

    def begin(self) -> None:
        """From now on it is under way, until it is finished."""
        self.observer.started()

    def head_received(self, status: int, event_stream: bool) -> None:
        self.status = status
        self.head_at = perf_counter()
        if event_stream:
            self.streams()
        self.observer.response_head(self.head_at - self.received_at)

    def streams(self) -> None:
        """Its response is a stream."""
        if not self.is_stream:
            self.is_stream = True
            self.observer.stream_started()

    @property
    def succeeded(self) -> bool:
        """Its response is no error, nor another answer that generates nothing."""
        return self.status is not None and 200 <= self.status < 300

    def happened(self, meaning: Meaning, read_at: float) -> None:
        """An event, read at `read_at`, was written downstream."""
        if meaning.delta and self.first_token_at is not None:
            self.generated(0, read_at)
        else:
            self._begins(meaning, read_at)
        if meaning is DELTA:
            return
        if meaning.usage is not None:
            self.usage = meaning.usage if self.usage is None else self.usage.updated(meaning.usage)
        if meaning.finish is not None:
            self.finish_reason = meaning.finish
        if meaning.end or meaning.more:
            self.marker_seen = meaning.end
        if meaning.error:
            self.reported_error = True
        if meaning.complaint:
            self.complained = True
        if meaning.reasoning:
            self.streamed_reasoning = True
        if meaning.kept_as is not None:
            self.kept_as = meaning.kept_as
        if not meaning.understood:
            self.garbled += 1

    def answered(self, meaning: Meaning) -> None:
        """The whole of a JSON body was written downstream."""
        self.usage, self.finish_reason, self.kept_as = meaning.usage, meaning.finish, meaning.kept_as
        # Where the status says that it is an error, the client knows; and what is fetched failed before.
        self.reported_error = (meaning.error or meaning.complaint) and self.succeeded and not self.fetches

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
        counted = self.usage is not None and not self.usage.is_zero
        empty = self.first_token_at is None and not counted and self.finish_reason is None
        failed = self.reported_error or (self.complained and empty)
        return Outcome.UPSTREAM_ERROR if failed else Outcome.COMPLETED

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
