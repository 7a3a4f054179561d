"""Writes the dashboard: `python grafana/generate.py > grafana/dashboard.json`.

`ROWS` is what it shows. A panel has a title, what it means and what to do about it, and its queries; where it stands
follows from its width. Queries are of what the dashboard's variables select.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# What is selected, of a metric with route and upstream, with upstream alone, and of the process.
R = 'job=~"$job",instance=~"$instance",route=~"$route",upstream=~"$upstream"'
U = 'job=~"$job",instance=~"$instance",upstream=~"$upstream"'
P = 'job=~"$job",instance=~"$instance"'
RATE = "$__rate_interval"
WIDTH, HEIGHT = 24, 8


class Query(NamedTuple):
    """A query and the name of its series. `exemplar` also asks for exemplars, `heatmap` for buckets."""

    expr: str
    legend: str = ""
    exemplar: bool = False
    heatmap: bool = False


class Panel(NamedTuple):
    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 8
    kind: str = "timeseries"
    stacked: bool = False
    whole: bool = False
    thresholds: tuple[tuple[str, float | None], ...] = ()


class Row(NamedTuple):
    title: str
    panels: tuple[Panel, ...]


def rate(metric: str, by: str = "", selected: str = R) -> str:
    return f"sum {f'by ({by}) ' if by else ''}(rate(sseproxy_{metric}{{{selected}}}[{RATE}]))"


def quantile(q: float, metric: str, by: str = "", selected: str = R) -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', labels, selected)})"


def quantiles(metric: str, selected: str = R, *, exemplar: bool = False) -> tuple[Query, ...]:
    return tuple(
        Query(quantile(q, metric, selected=selected), f"p{q * 100:g}", exemplar and q == 0.99) for q in (0.5, 0.9, 0.99)
    )


def heatmap(metric: str) -> tuple[Query, ...]:
    return (Query(f"sum by (le) (increase(sseproxy_{metric}_bucket{{{R}}}[{RATE}]))", "{{le}}", heatmap=True),)


NOT_COMPLETED = f'sum(rate(sseproxy_requests_total{{{R},outcome!="completed"}}[{RATE}]))'

ROWS = (
    Row(
        "Now",
        (
            Panel(
                "Requests",
                "Exchanges that end, per second. A fall without a fall of clients means that they do not get here.",
                (Query(rate("requests_total"), "requests"),),
                "reqps",
                4,
                "stat",
            ),
            Panel(
                "Streams active",
                "Event streams under way. Each holds a connection on both sides; scale by this.",
                (Query(f"sum(sseproxy_streams_active{{{R}}})", "streams"),),
                "short",
                4,
                "stat",
            ),
            Panel(
                "TTFT p90",
                "Nine of ten requests have their first token within this. Compare with time to response head: if that is "
                "high as well, the upstream queues.",
                (Query(quantile(0.9, "time_to_first_token_seconds"), "p90"),),
                "s",
                4,
                "stat",
            ),
            Panel(
                "Not completed",
                "The share of exchanges that did not complete, clients that left included. Why is in the next row.",
                (Query(f"{NOT_COMPLETED} / {rate('requests_total')}", "share"),),
                "percentunit",
                4,
                "stat",
                thresholds=(("green", None), ("orange", 0.05), ("red", 0.2)),
            ),
            Panel(
                "Workers",
                "Workers that take requests. Zero is an outage; fewer than configured means that one is being replaced.",
                (Query(f"sum(sseproxy_workers{{{P}}})", "workers"),),
                "short",
                4,
                "stat",
                thresholds=(("red", None), ("green", 1)),
            ),
            Panel(
                "Configuration",
                "1 if what was last read is in use. 0: a reload was refused, and the log says why; the old one goes on.",
                (Query(f"min(sseproxy_config_last_reload_successful{{{P}}})", "in use"),),
                "short",
                4,
                "stat",
                thresholds=(("red", None), ("green", 1)),
            ),
        ),
    ),
    Row(
        "Traffic and outcomes",
        (
            Panel(
                "Requests by status",
                "499 are clients that left before there was a status. Statuses of upstreams pass through: look at 429 and 5xx.",
                (Query(rate("requests_total", "code"), "{{code}}"),),
                "reqps",
                stacked=True,
            ),
            Panel(
                "What did not complete, by why",
                "truncated and upstream_* are the upstream's, client_gone_* and stalled_client the client's, rejected, drained "
                "and proxy_error this proxy's.",
                (
                    Query(
                        f'sum by (outcome) (rate(sseproxy_requests_total{{{R},outcome!="completed"}}[{RATE}]))',
                        "{{outcome}}",
                    ),
                ),
                "reqps",
                stacked=True,
            ),
            Panel(
                "Requests by route",
                "Where the traffic goes.",
                (Query(rate("requests_total", "route"), "{{route}}"),),
                "reqps",
                stacked=True,
            ),
            Panel(
                "Under way",
                "Exchanges and, of them, event streams. Exchanges that pile up without streams wait for response heads.",
                (
                    Query(f"sum(sseproxy_requests_active{{{R}}})", "exchanges"),
                    Query(f"sum(sseproxy_streams_active{{{R}}})", "streams"),
                ),
            ),
            Panel(
                "Duration",
                "From request head to last byte, whatever the outcome. Of streams it is mostly the length of the answer.",
                quantiles("request_duration_seconds"),
                "s",
            ),
            Panel(
                "Bytes",
                "Bodies as they were relayed, without framing.",
                (
                    Query(rate("request_bytes_total"), "requests"),
                    Query(rate("response_bytes_total"), "responses"),
                ),
                "Bps",
            ),
        ),
    ),
    Row(
        "Time to first token",
        (
            Panel(
                "TTFT",
                "Request head received to the first generated token written to the client. Exemplars lead to request ids.",
                quantiles("time_to_first_token_seconds", exemplar=True),
                "s",
            ),
            Panel(
                "TTFT, all of them",
                "Two bands are two kinds of requests: cached and not, short and long prompts, two models.",
                heatmap("time_to_first_token_seconds"),
                "s",
                kind="heatmap",
            ),
            Panel(
                "TTFT p90 by model",
                "Models are told apart by metrics.models of the configuration; the rest is other.",
                (Query(quantile(0.9, "time_to_first_token_seconds", "model"), "{{model}}"),),
                "s",
            ),
            Panel(
                "Before the first token",
                "p90 of the steps to it: the response head, the first event, the first token. Between head and token is prefill.",
                (
                    Query(quantile(0.9, "time_to_response_head_seconds"), "response head"),
                    Query(quantile(0.9, "time_to_first_event_seconds"), "first event"),
                    Query(quantile(0.9, "time_to_first_token_seconds"), "first token"),
                ),
                "s",
                24,
            ),
        ),
    ),
    Row(
        "Tokens",
        (
            Panel(
                "Gaps between tokens",
                "Between events with generated content, as they were read from the upstream. p99 is what users see as stalls.",
                quantiles("inter_token_latency_seconds"),
                "s",
            ),
            Panel(
                "Gaps, all of them",
                "A second band far above the first is a batch that is interrupted by others' prefills.",
                heatmap("inter_token_latency_seconds"),
                "s",
                kind="heatmap",
            ),
            Panel(
                "Time per output token",
                "(last - first token) / (output tokens - 1), by model, on average. Its inverse is the speed of one stream.",
                (
                    Query(
                        f"{rate('time_per_output_token_seconds_sum', 'model')} / {rate('time_per_output_token_seconds_count', 'model')}",
                        "{{model}}",
                    ),
                ),
                "s",
            ),
            Panel(
                "Tokens by type",
                "The upstreams' own counts. cached_input and reasoning are parts of input and output with OpenAI.",
                (Query(rate("tokens_total", "type"), "{{type}}"),),
                "short",
            ),
            Panel(
                "Output tokens by model",
                "What is generated, per second.",
                (
                    Query(
                        f'sum by (model) (rate(sseproxy_tokens_total{{{R},type="output"}}[{RATE}]))',
                        "{{model}}",
                    ),
                ),
                "short",
                stacked=True,
            ),
            Panel(
                "Streams without usage",
                "Streams whose tokens are not counted, by why. not_reported: let the route ask, with usage: {request: true}.",
                (Query(rate("streams_without_usage_total", "reason"), "{{reason}}"),),
                "reqps",
            ),
            Panel(
                "Events",
                "Events of streams, and those that could not be decoded, which are forwarded all the same.",
                (
                    Query(rate("stream_events_total"), "events"),
                    Query(rate("stream_events_garbled_total"), "garbled"),
                ),
                "short",
                12,
            ),
            Panel(
                "Ends of streams",
                "marker: the API said so. eof: the body only ended; if a backend should send a marker, it was cut.",
                (Query(rate("stream_ends_total", "end"), "{{end}}"),),
                "reqps",
                12,
            ),
        ),
    ),
    Row(
        "Upstreams",
        (
            Panel(
                "Up",
                "1 if the latest exchange got a response head. Nothing is probed: without traffic it stays as it was.",
                (Query(f"min by (upstream) (sseproxy_upstream_up{{{U}}})", "{{upstream}}"),),
            ),
            Panel(
                "Errors",
                "dns, connect and tls: it was not reached. timeout: see the route's timeouts. reset: it broke off.",
                (Query(rate("upstream_errors_total", "upstream, type"), "{{upstream}} {{type}}"),),
                "reqps",
            ),
            Panel(
                "Connections",
                "active carry an exchange, idle wait in the pool for at most four seconds.",
                (
                    Query(
                        f"sum by (upstream, state) (sseproxy_upstream_connections{{{U}}})",
                        "{{upstream}} {{state}}",
                    ),
                ),
            ),
        ),
    ),
    Row(
        "The proxy itself",
        (
            Panel(
                "Its own delay",
                "From a chunk read to its being handed to the kernel, or to the buffer of a slow client. Normal is below 0.1 ms.",
                quantiles("chunk_forward_seconds"),
                "s",
            ),
            Panel(
                "Letting go",
                "From a client seen gone to its upstream connection closed: what a model generates for nobody.",
                quantiles("upstream_release_seconds"),
                "s",
            ),
            Panel(
                "Event loop lag",
                "How late timers fire. Above a tenth of a second a worker is at its limit: more workers, or more replicas.",
                quantiles("event_loop_lag_seconds", P),
                "s",
            ),
            Panel(
                "Refused here",
                "Never sent upstream, by why. no_route: a client's mistake. Limits are in the configuration.",
                (
                    Query(
                        f'sum by (reason) (rate(sseproxy_requests_rejected_total{{{P},route=~"$route|"}}[{RATE}]))',
                        "{{reason}}",
                    ),
                ),
                "reqps",
            ),
            Panel(
                "Bodies not read",
                "Relayed but not read, so without tokens: compressed by the upstream, or with an event that is too large.",
                (Query(rate("bodies_not_read_total", "reason"), "{{reason}}"),),
                "reqps",
            ),
            Panel(
                "Workers",
                "accepting, and of earlier configurations that finish what they have. Restarts are of workers that died.",
                (
                    Query(f"sum(sseproxy_workers{{{P}}})", "accepting"),
                    Query(f"sum(sseproxy_workers_finishing{{{P}}})", "finishing"),
                    Query(f"sum(increase(sseproxy_worker_restarts_total{{{P}}}[{RATE}]))", "restarts"),
                ),
                whole=True,
            ),
            Panel(
                "Reloads",
                "A failure left the configuration before it in use.",
                (Query(f"sum by (result) (increase(sseproxy_config_reloads_total{{{P}}}[{RATE}]))", "{{result}}"),),
                whole=True,
            ),
            Panel(
                "Age of the configuration",
                "How long ago what is in use was read.",
                (Query(f"time() - max(sseproxy_config_last_reload_success_timestamp_seconds{{{P}}})", "age"),),
                "s",
            ),
            Panel(
                "Descriptors of the supervisor",
                "It has no clients; a rise is a leak.",
                (Query(f"sum by (instance) (process_open_fds{{{P}}})", "{{instance}}"),),
            ),
            Panel(
                "Memory of the supervisor",
                "Resident; workers are not in it.",
                (Query(f"sum by (instance) (process_resident_memory_bytes{{{P}}})", "{{instance}}"),),
                "bytes",
            ),
            Panel(
                "CPU of the supervisor",
                "It adds up what workers report, and answers scrapes.",
                (Query(f"sum by (instance) (rate(process_cpu_seconds_total{{{P}}}[{RATE}]))", "{{instance}}"),),
                "percentunit",
            ),
        ),
    ),
)


def _panel(number: int, panel: Panel, x: int, y: int, height: int) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "exemplar": query.exemplar,
            "format": "heatmap" if query.heatmap else "time_series",
            "instant": False,
            "range": True,
        }
        for index, query in enumerate(panel.queries)
    ]
    steps = [{"color": color, "value": value} for color, value in panel.thresholds or (("green", None),)]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["min"] = 0
        if panel.whole:
            defaults["decimals"] = 0
        defaults["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 25 if panel.stacked else 5,
            "lineWidth": 1,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        options = {"colorMode": "value", "graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"]}}
    elif panel.kind == "heatmap":
        options = {
            "calculate": False,
            "cellGap": 0,
            "color": {"mode": "scheme", "scheme": "Oranges", "exponent": 0.5, "steps": 64},
            "yAxis": {"unit": panel.unit},
        }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 1, 0
    for row in ROWS:
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        }
        number, y, x = number + 1, y + 1, 0
        height = 4 if all(panel.kind == "stat" for panel in row.panels) else HEIGHT
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            yield _panel(number, panel, x, y, height)
            number, x = number + 1, x + panel.width
        y += height


def _variable(name: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {name})"
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "sseproxy",
        "title": "sseproxy",
        "description": "Streams of LLM APIs: how soon, how fast, how many tokens, and why they ended.",
        "tags": ["sseproxy", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "links": [],
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "datasource",
                    "type": "datasource",
                    "query": "prometheus",
                    "current": {},
                    "refresh": 1,
                },
                _variable("job", "sseproxy_build_info"),
                _variable("instance", 'sseproxy_build_info{job=~"$job"}'),
                _variable("route", "sseproxy_requests_active"),
                _variable("upstream", "sseproxy_requests_active"),
            ]
        },
        "panels": list(_panels()),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=2) + "\n")
