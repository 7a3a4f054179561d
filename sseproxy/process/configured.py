"""The numbers that a configuration determines: its limits, and the counters that start at 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from ..config import Config
from ..errors import Outcome, UpstreamErrorType
from ..observe import metrics
from ..observe.metrics import Labels, Recorder
from ..relay.routes import OTHER

# Status codes and outcomes of requests that are rare. They are reported as 0 before the first one.
_RARE_OUTCOMES = (("", Outcome.PROXY_ERROR), ("200", Outcome.TRUNCATED), ("502", Outcome.UPSTREAM_ERROR))


def limits(config: Config) -> Iterator[tuple[str, Labels, float]]:
    """The gauges of the numbers that `config` allows."""
    for option in ("connections", "connections_per_client", "active_requests", "pending_connects"):
        if (most := getattr(config.limits, option)) is not None:
            yield metrics.LIMIT.name, (option, ""), most
    for route in config.routes:
        if route.limits.active_requests is not None:
            yield metrics.LIMIT.name, ("active_requests", route.name), route.limits.active_requests


def start_at_zero(config: Config, recorder: Recorder) -> None:
    """Counts 0 where `config` has something to count, so that the first event is an increase that an alert can see."""
    named = config.metrics
    models = (*named.models, OTHER) if named.detail == "full" else ("",)
    for route in config.routes:
        for target in route.upstream:
            labels = route.name, target.name
            for code, outcome in _RARE_OUTCOMES:
                for model in models if outcome is not Outcome.PROXY_ERROR else ("",):
                    recorder.count(metrics.REQUESTS, (*labels, model, code, outcome.value), 0)
            for kind in get_args(UpstreamErrorType):
                recorder.count(metrics.UPSTREAM_ERRORS, (*labels, kind), 0)
    for client in config.clients or ():
        recorder.count(metrics.CLIENT_REQUESTS, (client.name, Outcome.COMPLETED.value), 0)
        for limit in ("active_requests", "requests", "tokens"):
            if getattr(client.limits, limit) is not None:
                recorder.count(metrics.CLIENT_LIMITED, (client.name, limit), 0)
        for metric in (metrics.KEYS_REJECTED, metrics.LEDGER_FAILURES):
            recorder.count(metric, (), 0)
