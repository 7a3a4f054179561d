"""The registry behind `/metrics`: the numbers of all workers, added up.

It belongs to the supervisor and outlives the workers, so counters never fall.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from .metrics import METRICS, REQUESTS, REQUESTS_ACTIVE, Histogram, Labels, Metric, Report

_OPENMETRICS: Final = "application/openmetrics-text"


class Registry(Collector):
    """The numbers of all workers, added up. Gauges are kept for each worker, and dropped when it ends."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[Labels, float]] = {metric.name: {} for metric in METRICS}
        self._histograms: dict[str, dict[Labels, Histogram]] = {metric.name: {} for metric in METRICS}
        self._gauges: dict[int, dict[tuple[str, Labels], float]] = {}
        self._states: dict[str, dict[Labels, float]] = {metric.name: {} for metric in METRICS}

    def add(self, worker: int, report: Report) -> None:
        for name, labels, amount in report.counters:
            counters = self._counters[name]
            counters[labels] = counters.get(labels, 0) + amount
        gauges = self._gauges.setdefault(worker, {})
        for name, labels, value in report.gauges:
            gauges[name, labels] = value
        for name, labels, value in report.states:
            self._states[name][labels] = value
        for name, labels, delta in report.histograms:
            total = self._histograms[name].setdefault(labels, Histogram([0] * len(delta.counts)))
            total.add(delta)

    def gauge(self, worker: int, metric: Metric, labels: Labels = ()) -> float:
        """The value of a gauge of `worker`, or 0."""
        return self._gauges.get(worker, {}).get((metric.name, labels), 0)

    def ended(self, *outcomes: str) -> int:
        """How many requests have ended with one of `outcomes`."""
        place = REQUESTS.labels.index("outcome")
        return int(sum(n for labels, n in self._counters[REQUESTS.name].items() if labels[place] in outcomes))

    def drop(self, worker: int) -> dict[Labels, int]:
        """Drops the gauges of `worker`, which has ended. Returns its active exchanges, by (route, upstream)."""
        gauges = self._gauges.pop(worker, {})
        return {
            labels: int(value) for (name, labels), value in gauges.items() if name == REQUESTS_ACTIVE.name and value > 0
        }

    def forget_states(self, gone: Iterable[str]) -> None:
        """Drops the states whose first label is one of `gone`, because the configuration no longer has these names."""
        for name in gone:
            for states in self._states.values():
                for labels in [labels for labels in states if labels[0] == name]:
                    del states[labels]

    def keep_endpoints(self, known: Collection[tuple[str, str]]) -> None:
        """Drops the counters of endpoints that are not `known`, as (upstream, endpoint).

        Addresses come and go. Without this, the series would become more and more.
        """
        for metric in METRICS:
            if "endpoint" in metric.labels:
                first, second = metric.labels.index("upstream"), metric.labels.index("endpoint")
                counters = self._counters[metric.name]
                for labels in [labels for labels in counters if (labels[first], labels[second]) not in known]:
                    del counters[labels]

    def collect(self) -> Iterator[Family]:
        for metric in METRICS:
            name = f"sseproxy_{metric.name}"
            if metric.kind == "counter":
                counter = CounterMetricFamily(name, metric.help, labels=metric.labels)
                for labels, value in self._counters[metric.name].items():
                    counter.add_metric(labels, value)
                yield counter
            elif metric.kind in ("gauge", "state"):
                gauge = GaugeMetricFamily(name, metric.help, labels=metric.labels)
                values = self._states[metric.name] if metric.kind == "state" else self._summed(metric)
                for labels, value in values.items():
                    gauge.add_metric(labels, value)
                yield gauge
            else:
                histogram = HistogramMetricFamily(name, metric.help, labels=metric.labels)
                for labels, counted in self._histograms[metric.name].items():
                    histogram.add_metric(labels, list(_cumulative(metric.buckets, counted)), counted.sum)
                yield histogram

    def _summed(self, metric: Metric) -> dict[Labels, float]:
        total: dict[Labels, float] = {}
        for gauges in self._gauges.values():
            for (name, labels), value in gauges.items():
                if name == metric.name:
                    total[labels] = total.get(labels, 0) + value
        return total


class Process(NamedTuple):
    """What the system knows of a process; 0 where it says nothing, as of one that has ended."""

    cpu_seconds: float
    resident_bytes: float
    open_fds: float
    max_fds: float


def of_process(pid: int) -> Process:
    """Reads `/proc`, as is done for the `process_*` metrics."""
    families = ProcessCollector(pid=lambda: pid, registry=None).collect()
    seen = {sample.name: sample.value for family in families for sample in family.samples}
    names = ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "max_fds")
    return Process(*(seen.get(f"process_{name}", 0.0) for name in names))


def exposition(registry: Registry, accept: str) -> tuple[bytes, str]:
    """The body of `/metrics` and its content type, in a format that the `Accept` field `accept` allows."""
    served = CollectorRegistry()
    served.register(registry)
    ProcessCollector(registry=served)
    # The library raises on a version in `Accept` that is not a number, so only the name of the format is passed to it.
    encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS in accept else "")
    return encode(served), content_type


def _cumulative(
    bounds: tuple[float, ...], counted: Histogram
) -> Iterator[tuple[str, float] | tuple[str, float, Exemplar]]:
    """(le, cumulative count, exemplar) of each bucket, for the exposition formats."""
    total = 0
    for index, le in enumerate((*map(repr, bounds), "+Inf")):
        total += counted.counts[index]
        example = counted.exemplars.get(index)
        if example is None:
            yield le, total
        else:
            yield le, total, Exemplar({"request_id": example.request_id}, example.value, example.at)
