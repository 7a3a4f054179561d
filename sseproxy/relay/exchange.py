"""The record of one exchange.

An `Exchange` is created when a request head has been received, and finished exactly once. In between, it calls its
`Observer` whenever something happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import ExchangeError, Outcome, StalledClient
from ..wire.meaning import DELTA, Meaning, Usage

if TYPE_CHECKING:
    from ..ledger.table import Seen

# At most so many gaps are kept for the median. Between 16 and 32 are enough for a good estimate.
_MAX_GAPS = 32


class Observer(Protocol):
    """Receives what happens in an exchange. Durations are in seconds."""

    def started(self, exchange: Exchange) -> None: ...
    def rejected(self, reason: str) -> None: ...
    def limited(self, client: str, limit: str) -> None: ...
    def ledger_failed(self) -> None: ...
    def upstream_failed(self, kind: str, *, answered: bool) -> None: ...
    def attempted(self, endpoint: str, result: str) -> None: ...
    def retried(self, reason: str) -> None: ...
    def discarded(self, usage: Usage) -> None: ...
    def held(self, seconds: float) -> None: ...
    def of_whole_answers(self) -> Observer: ...
    def handed_over(self, exchange: Exchange, to: Observer) -> None: ...
    def connected(self, seconds: float) -> None: ...
    def reused(self) -> None: ...
    def response_head(self, seconds: float) -> None: ...
    def stream_started(self) -> None: ...
    def first_event(self, seconds: float, /) -> None: ...
    def first_token(self, seconds: float, request_id: str) -> None: ...
    def gap(self, seconds: float, /) -> None: ...
    def forwarded(self, seconds: float, /) -> None: ...
    def released(self, seconds: float, /) -> None: ...
    def finished(self, exchange: Exchange) -> None: ...


# No struct of msgspec: each chunk assigns to some of these attributes, and to those of a struct that takes longer.
@dataclass(slots=True, eq=False)
class Exchange:
    """The record of one request and its response. Times are values of `perf_counter`."""

    route: str
    upstream: str
    observer: Observer
    request_id: str
    received_at: float
    client: str = ""
    method: str = ""
    api: str = ""
    endpoint: str = ""
    """Which endpoint of the upstream was asked last. Empty if it has only one."""
    attempts: int = 1
    """How many attempts were made."""
    on_first_token: Callable[[], None] | None = None
    client_name: str = ""
    """The name of the client whose key the request has. Empty if it has none that is known."""
    model: str | None = None
    """The model that the request names."""
    traceparent: str | None = None
    reason: str | None = None
    """The code of the error that ended the exchange."""
    cause: str | None = None
    """What exactly failed, in words, if it is known."""
    path: str = ""
    """The path of the request as it was received, without the query."""
    upstream_request_id: bytes | None = None
    """The id that the upstream has given to the request."""
    head_at: float | None = None
    first_event_at: float | None = None
    first_token_at: float | None = None
    first_delta_at: float | None = None
    last_delta_at: float = 0.0
    longest_gap: float = 0.0
    """The longest gap between deltas, in seconds."""
    gaps: list[float] = field(default_factory=list)
    """A sample of the gaps between deltas, in seconds. As a stream gets longer: every gap, every second, every fourth,
    and so on."""
    _passed_over: int = 0
    ended_at: float | None = None
    status: int | None = None
    is_stream: bool = False
    events: int = 0
    other_events: int = 0
    """Those of them without generated content."""
    garbled: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    usage: Usage | None = None
    estimated: int = 0
    """Tokens that a client was charged with and the upstream has not reported."""
    lacks_usage: bool = False
    """A JSON answer tells no usage, and should."""
    fetches: bool = False
    """It asks for an answer that was generated before, or is."""
    repeats: bool = False
    """Its usage is counted already, as that of another exchange."""
    kept_as: str | None = None
    """The name under which the upstream keeps the answer, for whoever asks for it later."""
    streamed_reasoning: bool = False
    """Some of the reasoning was among the deltas."""
    finish_reason: str | None = None
    marker_seen: bool = False
    """Whether the end marker of the dialect was seen and forwarded."""
    reported_error: bool = False
    """Whether the upstream has reported an error."""
    complained: bool = False
    """Whether the upstream has sent a code or a message. That is an error if nothing else comes."""
    unread: Literal["encoded", "oversize", "unknown", "failed"] | None = None
    """Why the body, or a part of it, could not be inspected."""
    was_held: bool = False
    """All of it was held back and sent at once, so there are no times between tokens."""
    outcome: Outcome | None = None

    def begin(self) -> None:
        """Counts the exchange as active, until `finish`."""
        self.observer.started(self)

    def goes_to(self, upstream: str, endpoint: str, observer: Observer) -> None:
        """The next attempt is at `endpoint` of `upstream`. From now on, `observer` observes."""
        self.endpoint = endpoint
        if observer is not self.observer:
            self.observer.handed_over(self, observer)
            self.upstream = upstream

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
        """Records an event that was read at `read_at` and has been written to the client."""
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
        """Records an event before the first token, the first token itself, or a later event without a delta."""
        self.events += 1
        if self.first_event_at is None:
            self.first_event_at = perf_counter()
            self.observer.first_event(self.first_event_at - self.received_at)
        if meaning.delta:
            self.first_delta_at = self.last_delta_at = read_at
            self.first_token_at = perf_counter()
            self.observer.first_token(self.first_token_at - self.received_at, self.request_id)
            if self.on_first_token is not None:
                self.on_first_token()
        else:
            self.other_events += 1

    def generated(self, size: int, read_at: float) -> None:
        """Records a delta after the first one, in an event of `size` bytes. `size` is 0 if they are counted already."""
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

    @property
    def deltas(self) -> int:
        """How many events had generated content."""
        return self.events - self.other_events

    def seconds_per_token(self) -> float | None:
        """From the first delta to the last one, divided by the output tokens after the first.

        None unless all of it is known: two deltas at least, and the final counts of a stream that was completed.
        Reasoning that was not streamed is left out.
        """
        usage = self.usage
        if self.outcome is not Outcome.COMPLETED or usage is None or usage.output is None or not usage.final:
            return None
        streamed = usage.output if self.streamed_reasoning else usage.output - (usage.reasoning or 0)
        if self.first_delta_at is None or self.deltas < 2 or streamed < 2 or self.was_held:
            return None
        return (self.last_delta_at - self.first_delta_at) / (streamed - 1)

    def completed(self) -> Outcome:
        """The outcome if the whole response was forwarded."""
        counted = self.usage is not None and not self.usage.is_zero
        empty = self.first_token_at is None and not counted and self.finish_reason is None
        failed = self.reported_error or (self.complained and empty)
        return Outcome.UPSTREAM_ERROR if failed else Outcome.COMPLETED

    def failed(self, error: ExchangeError) -> Outcome:
        """The outcome if `error` ends the exchange now. After the end marker, most errors do not matter any more."""
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

    def count_once(self, counted: Seen) -> None:
        """Drops usage that was counted before. `counted` has the kept responses that were counted."""
        if self.usage is None:
            return
        if self.kept_as is None:
            # A response that is not generated in the background was counted with the answer to its POST.
            self.repeats = self.fetches
        else:
            self.repeats = counted.add(f"{self.upstream} {self.kept_as}")
        if self.repeats:
            self.usage = None

    def finish(self, outcome: Outcome) -> None:
        """Records the end. Called once, by the last phase of every exchange."""
        assert self.outcome is None, f"a second outcome {outcome}, after {self.outcome}"
        self.outcome = outcome
        self.ended_at = perf_counter()
        self.observer.finished(self)
