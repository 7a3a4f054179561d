"""Every metric with its name, labels, buckets and meaning, and the `Recorder` that a worker counts with.

A worker counts into its own `Recorder`, and sends the changes as a `Report`. The supervisor adds up the reports of all
workers in its `registry`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Final, Literal

import msgspec

# Where times are compared, no bound is more than a tenth above the one before it: a quantile is estimated within a
# bucket, so it is wrong by a tenth at most. That is from 100 to 500 ms to the first token, and from 5 to 100 ms between
# tokens. OpenTelemetry's GenAI buckets are among both, so that panels overlay.
TO_TOKEN: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.09,
    0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.165, 0.18, 0.195, 0.21, 0.23, 0.25, 0.275, 0.3, 0.33, 0.36, 0.39, 0.425, 0.46,
    0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS: Final = (
    0.001, 0.0025, 0.0045,
    0.005, 0.0055, 0.006, 0.0065, 0.007, 0.0075, 0.008, 0.00875, 0.0095,
    0.01, 0.011, 0.012, 0.013, 0.014, 0.015, 0.0165, 0.018, 0.0195, 0.021, 0.023,
    0.025, 0.0275, 0.03, 0.033, 0.036, 0.039, 0.0425, 0.046, 0.05, 0.055, 0.06, 0.065, 0.07, 0.075, 0.0825, 0.09,
    0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
DURATION: Final = (
    0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0,
)  # fmt: skip
# Seconds until a connection to an upstream is made, in a rack or over an ocean.
CONNECT: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Delays that sseproxy itself causes: from the usual tens of microseconds to values that need an alert.
OWN_DELAY: Final = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 1.0, 10.0)
# Between the pauses of a busy worker and those of one that its control group stops for a part of every 100 ms.
LAG: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 10.0)
# As vLLM has them.
TOKENS_OF_ONE: Final = (
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0, 100000.0,
    200000.0, 500000.0, 1000000.0, 2000000.0,
)  # fmt: skip

Labels = tuple[str, ...]


class Metric(msgspec.Struct, frozen=True):
    """One metric family. `labels` take values from the configuration and from closed sets only.

    The gauges of several workers are added up. A `state` is a gauge whose latest value counts, from whichever worker.
    """

    name: str
    kind: Literal["counter", "gauge", "state", "histogram"]
    labels: Labels
    help: str
    buckets: tuple[float, ...] = ()


_R: Final = ("route", "upstream")
_RM: Final = (*_R, "model")

REQUESTS = Metric(
    "requests",
    "counter",
    (*_RM, "code", "outcome"),
    "Requests that have ended. `code` is the status that the client got, `outcome` is why it ended.",
)
REQUESTS_ACTIVE = Metric("requests_active", "gauge", _R, "Requests in progress.")
STREAMS_ACTIVE = Metric("streams_active", "gauge", _R, "Event streams in progress.")
REQUEST_DURATION = Metric(
    "request_duration_seconds",
    "histogram",
    (*_RM, "stream", "outcome"),
    "Time from receiving the request head to the end of the request, for every outcome.",
    DURATION,
)
TO_HEAD = Metric(
    "time_to_response_head_seconds",
    "histogram",
    _R,
    "Time from receiving the request head to receiving the upstream's response head.",
    TO_TOKEN,
)
TO_FIRST_EVENT = Metric(
    "time_to_first_event_seconds",
    "histogram",
    _R,
    "Time from receiving the request head to the first complete event of any kind; comments are not events.",
    TO_TOKEN,
)
TO_FIRST_TOKEN = Metric(
    "time_to_first_token_seconds",
    "histogram",
    _RM,
    "Time from receiving the request head to writing the first event with generated content to the client.",
    TO_TOKEN,
)
GAPS = Metric(
    "inter_token_latency_seconds",
    "histogram",
    _RM,
    "Time between two consecutive events with generated content, as they were read from the upstream.",
    BETWEEN_TOKENS,
)
TPOT = Metric(
    "time_per_output_token_seconds",
    "histogram",
    _RM,
    "Time from the first to the last event with generated content, divided by (tokens that were streamed - 1); "
    "for completed streams with token counts and two such events at least.",
    BETWEEN_TOKENS,
)
TOKENS = Metric(
    "tokens",
    "counter",
    (*_RM, "type"),
    "Tokens as the upstream counts them: the last counts of each response, never summed over events, never estimated.",
)
TOKENS_PER_REQUEST = Metric(
    "tokens_per_request",
    "histogram",
    (*_RM, "type"),
    "Tokens of one completed response, as the upstream counts them, by type: input or output.",
    TOKENS_OF_ONE,
)
FINISHED = Metric(
    "finish_reasons",
    "counter",
    (*_RM, "reason"),
    "Responses in which the model said why it stopped, by reason: stop, length, tool_calls, content_filter, error, "
    "other.",
)
WITHOUT_USAGE = Metric(
    "streams_without_usage",
    "counter",
    (*_R, "reason"),
    "Event streams that ended without token counts, by reason.",
)
ANSWERS_WITHOUT_USAGE = Metric(
    "answers_without_usage",
    "counter",
    _R,
    "Complete JSON answers of an API that generates, without token counts.",
)
STREAM_ENDS = Metric(
    "stream_ends",
    "counter",
    (*_R, "end"),
    "Completed event streams, by what ended them: the API's end marker (marker), or only the end of the body (eof).",
)
NOT_READ = Metric(
    "bodies_not_read",
    "counter",
    (*_R, "reason"),
    "Response bodies that were forwarded but not fully read: compressed (encoded), too large (oversize), neither JSON "
    "nor an event stream (unknown), or a fault in sseproxy (failed).",
)
SECONDS = Metric(
    "audio_seconds", "counter", _R, "Seconds of audio, for upstreams that count seconds instead of tokens."
)
EVENTS = Metric("stream_events", "counter", _R, "Events in event streams.")
DELTAS = Metric("stream_deltas", "counter", _RM, "Events with generated content in event streams.")
EVENTS_GARBLED = Metric(
    "stream_events_garbled", "counter", _R, "Events that could not be decoded; they are forwarded unchanged."
)
REQUEST_BYTES = Metric("request_bytes", "counter", _R, "Bytes of request bodies sent to the upstream.")
RESPONSE_BYTES = Metric(
    "response_bytes", "counter", _R, "Bytes of response bodies sent to clients, also of those made by sseproxy."
)
FORWARD = Metric(
    "chunk_forward_seconds",
    "histogram",
    _R,
    "Time from reading a chunk from the upstream to writing it to the client's socket, or to its buffer if "
    "the client is slow; in a run of similar chunks, one in sixteen is measured.",
    OWN_DELAY,
)
RELEASE = Metric(
    "upstream_release_seconds",
    "histogram",
    _R,
    "Time from noticing that the client has left to closing its upstream connection.",
    OWN_DELAY,
)
UPSTREAM_ERRORS = Metric(
    "upstream_errors",
    "counter",
    (*_R, "type"),
    "Failures of upstreams, by type: dns, connect, tls, timeout, reset, protocol, answer.",
)
_E: Final = ("upstream", "endpoint")

ATTEMPTS = Metric(
    "attempts",
    "counter",
    (*_E, "result"),
    "Attempts at endpoints, by how they ended; only for upstreams with a choice of endpoints.",
)
RETRIES = Metric(
    "retries",
    "counter",
    (*_R, "reason"),
    "Attempts that were followed by another one, by reason; the labels are those of the attempt that failed.",
)
DISCARDED_TOKENS = Metric(
    "discarded_tokens",
    "counter",
    ("upstream", "model", "type"),
    "Tokens of attempts that were thrown away, as far as the upstream reported them; they are not in tokens_total.",
)
HELD = Metric(
    "held_seconds",
    "histogram",
    _R,
    "How long the beginning of an answer, or all of it, was held back (retry.until), for those that were sent.",
    TO_TOKEN,
)
ENDPOINT_UP = Metric("endpoint_up", "gauge", _E, "1 if the endpoint is in use, 0 if it is ejected.")
ENDPOINT_ACTIVE = Metric(
    "endpoint_requests_active",
    "gauge",
    _E,
    "Requests that the endpoint is answering, of all workers.",
)
ENDPOINT_EJECTIONS = Metric(
    "endpoint_ejections",
    "counter",
    (*_E, "reason"),
    "Ejections of the endpoint, by reason: failures, refused (no connection could be made) or health (checks failed).",
)
REJECTED = Metric(
    "requests_rejected",
    "counter",
    ("route", "reason"),
    "Requests that sseproxy refused, by reason; a part of the body may have been sent before that.",
)
CLIENT_REQUESTS = Metric(
    "client_requests",
    "counter",
    ("client", "outcome"),
    "Requests of a client that have ended. `outcome` is why.",
)
CLIENT_ACTIVE = Metric("client_requests_active", "gauge", ("client",), "Requests with the key of a client in progress.")
CLIENT_TOKENS = Metric(
    "client_tokens",
    "counter",
    ("client", "model", "type"),
    "Tokens of a client as the upstream counts them; the type estimated is for answers that it has not counted.",
)
CLIENT_LIMITED = Metric(
    "client_limited",
    "counter",
    ("client", "limit"),
    "Requests that were refused because a limit of the client is reached.",
)
KEYS_REJECTED = Metric(
    "client_keys_rejected", "counter", (), "Requests that were refused because their key was wrong, or two differed."
)
LEDGER_FAILURES = Metric(
    "ledger_failures", "counter", (), "Commands that the server of ledger.url did not answer in time."
)
CONNECT_TIME = Metric(
    "upstream_connect_seconds",
    "histogram",
    _R,
    "Time to make a new connection to the upstream: name resolution, TCP and TLS.",
    CONNECT,
)
REUSED = Metric(
    "upstream_connections_reused", "counter", _R, "Requests that were sent on a connection that was already open."
)
CONNECTIONS = Metric(
    "upstream_connections",
    "gauge",
    ("upstream", "state"),
    "Connections to the upstream, by state: connecting, active (carries a request) or idle (kept for the next one).",
)
CLIENT_CONNECTIONS = Metric("client_connections", "gauge", (), "Connections of clients, with or without a request.")
LIMIT = Metric(
    "limit",
    "gauge",
    ("limit", "route"),
    "The numbers that the configuration allows, by the name of the option under limits; without those that are off.",
)
LOOP_LAG = Metric("event_loop_lag_seconds", "histogram", (), "How late a timer of a worker's event loop fires.", LAG)
WORKERS = Metric("workers", "gauge", (), "Workers that accept requests.")
WORKERS_FINISHING = Metric(
    "workers_finishing",
    "gauge",
    (),
    "Workers of earlier configurations, or from before an upgrade, that only finish their requests.",
)
_WORKER: Final = ("worker",)
WORKER_CPU = Metric("worker_cpu_seconds", "counter", _WORKER, "CPU time that workers have used, user and system.")
WORKER_MEMORY = Metric(
    "worker_resident_memory_bytes",
    "gauge",
    _WORKER,
    "Resident memory of each worker, including the memory that all of them share.",
)
WORKER_FDS = Metric("worker_open_fds", "gauge", _WORKER, "File descriptors that workers have open.")
WORKER_MAX_FDS = Metric("worker_max_fds", "gauge", _WORKER, "File descriptors that workers may have open.")
RESTARTS = Metric("worker_restarts", "counter", (), "Workers that ended unexpectedly and were replaced.")
RELOADS = Metric(
    "config_reloads", "counter", ("result",), "Reloads of the configuration, by result: success or failure."
)
RELOADED = Metric(
    "config_last_reload_successful", "gauge", (), "1 if the latest reload or upgrade succeeded, 0 if it was refused."
)
RELOADED_AT = Metric(
    "config_last_reload_success_timestamp_seconds",
    "gauge",
    (),
    "When the configuration in use was loaded, as a Unix timestamp.",
)
UPSTREAM_UP = Metric(
    "upstream_up",
    "state",
    ("upstream",),
    "1 if the latest request to the upstream got a response head, 0 if it failed before that.",
)
BUILD_INFO = Metric(
    "build_info", "gauge", ("version", "python", "aiohttp"), "The versions of sseproxy, Python and aiohttp; always 1."
)

METRICS: Final = (
    REQUESTS,
    REQUESTS_ACTIVE,
    STREAMS_ACTIVE,
    REQUEST_DURATION,
    TO_HEAD,
    TO_FIRST_EVENT,
    TO_FIRST_TOKEN,
    GAPS,
    TPOT,
    TOKENS,
    TOKENS_PER_REQUEST,
    FINISHED,
    SECONDS,
    WITHOUT_USAGE,
    ANSWERS_WITHOUT_USAGE,
    STREAM_ENDS,
    NOT_READ,
    EVENTS,
    DELTAS,
    EVENTS_GARBLED,
    REQUEST_BYTES,
    RESPONSE_BYTES,
    FORWARD,
    RELEASE,
    UPSTREAM_ERRORS,
    REJECTED,
    UPSTREAM_UP,
    CONNECTIONS,
    CONNECT_TIME,
    REUSED,
    ENDPOINT_UP,
    ENDPOINT_ACTIVE,
    ENDPOINT_EJECTIONS,
    ATTEMPTS,
    RETRIES,
    DISCARDED_TOKENS,
    HELD,
    CLIENT_REQUESTS,
    CLIENT_ACTIVE,
    CLIENT_TOKENS,
    CLIENT_LIMITED,
    KEYS_REJECTED,
    LEDGER_FAILURES,
    CLIENT_CONNECTIONS,
    LIMIT,
    LOOP_LAG,
    WORKERS,
    WORKERS_FINISHING,
    WORKER_CPU,
    WORKER_MEMORY,
    WORKER_FDS,
    WORKER_MAX_FDS,
    RESTARTS,
    RELOADS,
    RELOADED,
    RELOADED_AT,
    BUILD_INFO,
)

_FINISH_REASONS: Final = {
    "stop": "stop stop_sequence end_turn eos eos_token complete completed",
    "length": "length max_tokens max_output_tokens model_length model_context_window_exceeded incomplete",
    "tool_calls": "tool_calls tool_call tool_use function_call",
    "content_filter": "content_filter content_filtered refusal safety image_safety recitation image_recitation "
    "blocklist prohibited_content image_prohibited_content spii guardrail_intervened sensitive error_toxic",
    "error": "error failed abort cancelled insufficient_system_resource network_error malformed_function_call "
    "malformed_response unexpected_tool_call too_many_tool_calls",
}
_REASON_OF: Final = {word: reason for reason, words in _FINISH_REASONS.items() for word in words.split()}


def reason_label(said: str) -> str:
    """The label of a finish reason, for what an API has `said`; each has words of its own for it."""
    return _REASON_OF.get(said.lower(), "other")


class ExemplarValue(msgspec.Struct, array_like=True):
    """The latest observation of one bucket, with the exchange that made it. `at` is wall-clock seconds."""

    value: float
    request_id: str
    at: float


class Histogram(msgspec.Struct, array_like=True):
    """Counts per bucket, and the sum of all values. The last bucket has the values above all bounds."""

    counts: list[int]
    sum: float = 0.0
    exemplars: dict[int, ExemplarValue] = {}

    def add(self, other: Histogram, *, later: bool = True) -> None:
        """Adds the counts of `other`. The exemplars of the later histogram are kept: of `other`, if it is `later`."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum
        self.exemplars = self.exemplars | other.exemplars if later else other.exemplars | self.exemplars


class Report(msgspec.Struct, array_like=True, tag="report"):
    """The changes in one worker since its last report, and the current values of gauges.

    Each entry is (metric, labels, value).
    """

    counters: list[tuple[str, Labels, float]]
    gauges: list[tuple[str, Labels, float]]
    states: list[tuple[str, Labels, float]]
    histograms: list[tuple[str, Labels, Histogram]]
    asked: bool = False
    """Whether the supervisor has requested this report."""


class HistogramRecorder:
    """A histogram in a worker. `observe` is on the hot path: it only appends the value; `settle` sorts the values."""

    __slots__ = ("_bounds", "_settled", "_values", "observe")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._values: list[float] = []
        self._settled: Histogram | None = None
        self.observe: Callable[[float], None] = self._values.append

    def example(self, value: float, request_id: str, at: float) -> None:
        """Sets the exemplar of the bucket of `value`: the exchange with `request_id`."""
        self._open().exemplars[bisect_left(self._bounds, value)] = ExemplarValue(value, request_id, at)

    def _open(self) -> Histogram:
        if self._settled is None:
            self._settled = Histogram([0] * (len(self._bounds) + 1))
        return self._settled

    def settle(self) -> None:
        """Sorts the observed values into buckets."""
        if not self._values:
            return
        values = sorted(self._values)
        self._values.clear()
        up_to = [bisect_right(values, bound) for bound in self._bounds]
        counts = [upper - lower for lower, upper in zip([0, *up_to], [*up_to, len(values)], strict=True)]
        self._open().add(Histogram(counts, sum(values)))

    def take(self) -> Histogram | None:
        """The observations since the last call of `take`. None if there are none."""
        self.settle()
        taken, self._settled = self._settled, None
        return taken

    def take_back(self, taken: Histogram) -> None:
        """Adds `taken` again, because it could not be sent."""
        self._open().add(taken, later=False)


class Number:
    """A counter since the last report, or a gauge. What is counted for each request adds to `value` directly."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class State:
    """A gauge whose latest value counts: the `value` that it got since the last report, or None."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None


class Recorder:
    """The numbers of a worker since its last report."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, Labels], Number] = {}
        # What was counted by name: labels may come and go, as those of addresses do, so nothing of it is kept.
        self._counted: dict[tuple[str, Labels], float] = {}
        self._gauges: dict[tuple[str, Labels], Number] = {}
        self._states: dict[tuple[str, Labels], State] = {}
        self._histograms: dict[tuple[str, Labels], HistogramRecorder] = {}

    def counter(self, metric: Metric, labels: Labels) -> Number:
        """The counter with these labels, for ever. The same labels get the same counter."""
        return _number(self._counters, (metric.name, labels))

    def gauge(self, metric: Metric, labels: Labels) -> Number:
        """The gauge with these labels, for ever. The same labels get the same gauge."""
        return _number(self._gauges, (metric.name, labels))

    def state(self, metric: Metric, labels: Labels) -> State:
        """The state with these labels. The same labels get the same state."""
        key = (metric.name, labels)
        if key not in self._states:
            self._states[key] = State()
        return self._states[key]

    def count(self, metric: Metric, labels: Labels, amount: float = 1) -> None:
        """Counts `amount`. With 0, the series exists before anything is counted."""
        key = (metric.name, labels)
        self._counted[key] = self._counted.get(key, 0) + amount

    def move(self, metric: Metric, labels: Labels, by: int) -> None:
        """Changes a gauge by `by`."""
        self.gauge(metric, labels).value += by

    def set(self, metric: Metric, labels: Labels, value: float) -> None:
        of = self.state(metric, labels) if metric.kind == "state" else self.gauge(metric, labels)
        of.value = value

    def histogram(self, metric: Metric, labels: Labels) -> HistogramRecorder:
        """The histogram with these labels. The same labels get the same histogram."""
        key = (metric.name, labels)
        if key not in self._histograms:
            self._histograms[key] = HistogramRecorder(metric.buckets)
        return self._histograms[key]

    def settle(self) -> None:
        """Sorts the observed values of all histograms into buckets, so that less is left for the next report."""
        for histogram in self._histograms.values():
            histogram.settle()

    def report(self, *, asked: bool = False) -> Report:
        """The changes since the last report. Counters and histograms start at 0 again."""
        counted, self._counted = self._counted, {}
        counters = [(*key, value) for key, value in counted.items()]
        counters += [(*key, number.value) for key, number in self._counters.items() if number.value]
        for number in self._counters.values():
            number.value = 0
        states = [(*key, state.value) for key, state in self._states.items() if state.value is not None]
        for state in self._states.values():
            state.value = None
        return Report(
            counters=counters,
            gauges=[(*key, number.value) for key, number in self._gauges.items()],
            states=states,
            histograms=[
                (*key, taken) for key, found in self._histograms.items() if (taken := found.take()) is not None
            ],
            asked=asked,
        )

    def take_back(self, report: Report) -> None:
        """Adds `report` to the next one, because it could not be sent."""
        for name, labels, amount in report.counters:
            self._counted[name, labels] = self._counted.get((name, labels), 0) + amount
        for name, labels, value in report.states:
            state = self._states[name, labels]
            state.value = value if state.value is None else state.value
        for name, labels, taken in report.histograms:
            self._histograms[name, labels].take_back(taken)


def _number(numbers: dict[tuple[str, Labels], Number], key: tuple[str, Labels]) -> Number:
    found = numbers.get(key)
    if found is None:
        found = numbers[key] = Number()
    return found
