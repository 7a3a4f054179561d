"""Writes the dashboard: `python grafana/generate.py > grafana/dashboard.json`.

`ROWS` holds the panels. Each has a title, a description of what it means and what to do about it, and its queries. Panels
are placed from left to right, by their width. Every query is restricted to what the variables of the dashboard select.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Selectors for metrics with the labels route and upstream (R), with upstream only (U), and with neither (P).
R = 'job=~"$job",instance=~"$instance",route=~"$route",upstream=~"$upstream"'
U = 'job=~"$job",instance=~"$instance",upstream=~"$upstream"'
P = 'job=~"$job",instance=~"$instance"'
RATE = "$__rate_interval"
WIDTH, HEIGHT = 24, 8


class Query(NamedTuple):
    """A query, and the legend of its series. `exemplar` also requests exemplars; `heatmap` requests buckets."""

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
                "Requests that ended, per second. If this falls although the number of clients is the same, requests do not reach this proxy.",
                (Query(rate("requests_total"), "requests"),),
                "reqps",
                4,
                "stat",
            ),
            Panel(
                "Streams active",
                "Event streams in progress. Each needs a connection on both sides. Use this number to scale.",
                (Query(f"sum(sseproxy_streams_active{{{R}}})", "streams"),),
                "short",
                4,
                "stat",
            ),
            Panel(
                "TTFT p90",
                "Nine of ten streams get their first token within this time. If the time to the response head is high as "
                "well, requests wait in the queue of the upstream.",
                (Query(quantile(0.9, "time_to_first_token_seconds"), "p90"),),
                "s",
                4,
                "stat",
            ),
            Panel(
                "Not completed",
                "The share of requests that did not complete, including clients that left. The next row has the reasons.",
                (Query(f"{NOT_COMPLETED} / {rate('requests_total')}", "share"),),
                "percentunit",
                4,
                "stat",
                thresholds=(("green", None), ("orange", 0.05), ("red", 0.2)),
            ),
            Panel(
                "Workers",
                "Workers that accept requests. Zero is an outage. Fewer than configured: one is being replaced.",
                (Query(f"sum(sseproxy_workers{{{P}}})", "workers"),),
                "short",
                4,
                "stat",
                thresholds=(("red", None), ("green", 1)),
            ),
            Panel(
                "Configuration",
                "1: the latest reload succeeded. 0: it was refused, the earlier configuration stays in use, and the log has the reason.",
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
                "499: the client left before there was a status. Statuses of upstreams are forwarded: look at 429 and 5xx.",
                (Query(rate("requests_total", "code"), "{{code}}"),),
                "reqps",
                stacked=True,
                width=6,
            ),
            Panel(
                "Not completed, by outcome",
                "truncated and upstream_*: the upstream failed. client_gone_* and stalled_client: the client left or stalled. "
                "rejected, drained and proxy_error: this proxy refused, stopped or failed. cancelled: an operator ended it.",
                (
                    Query(
                        f'sum by (outcome) (rate(sseproxy_requests_total{{{R},outcome!="completed"}}[{RATE}]))',
                        "{{outcome}}",
                    ),
                ),
                "reqps",
                stacked=True,
                width=6,
            ),
            Panel(
                "Requests by route",
                "Requests that ended, per second and route.",
                (Query(rate("requests_total", "route"), "{{route}}"),),
                "reqps",
                stacked=True,
                width=6,
            ),
            Panel(
                "Requests by model",
                "Requests that ended, per second and model. The configuration lists models in metrics.models. All others are in other.",
                (Query(rate("requests_total", "model"), "{{model}}"),),
                "reqps",
                stacked=True,
                width=6,
            ),
            Panel(
                "In progress",
                "Requests in progress, and how many of them are event streams. Many requests but few streams: they wait for the upstream.",
                (
                    Query(f"sum(sseproxy_requests_active{{{R}}})", "requests"),
                    Query(f"sum(sseproxy_streams_active{{{R}}})", "streams"),
                ),
                width=6,
            ),
            Panel(
                "Client connections",
                "Connections of clients, with or without a request. Each idle connection takes memory and a descriptor.",
                (Query(f"sum by (instance) (sseproxy_client_connections{{{P}}})", "{{instance}}"),),
                whole=True,
                width=6,
            ),
            Panel(
                "Duration",
                "Time from the request head to the end, for every outcome. For streams it is mostly the length of the answer.",
                quantiles("request_duration_seconds"),
                "s",
                width=6,
            ),
            Panel(
                "Bytes",
                "Bytes of bodies, without HTTP heads and chunk framing. They move while streams run.",
                (
                    Query(rate("request_bytes_total"), "requests"),
                    Query(rate("response_bytes_total"), "responses"),
                ),
                "Bps",
                width=6,
            ),
        ),
    ),
    Row(
        "Time to first token",
        (
            Panel(
                "TTFT",
                "Time from the request head to the first generated content written to the client. The points (exemplars) have request ids.",
                quantiles("time_to_first_token_seconds", exemplar=True),
                "s",
            ),
            Panel(
                "TTFT, distribution",
                "Two bands are two kinds of requests: with and without prompt cache, short and long prompts, two models.",
                heatmap("time_to_first_token_seconds"),
                "s",
                kind="heatmap",
            ),
            Panel(
                "TTFT p90 by model",
                "The configuration lists models in metrics.models. All others are in other.",
                (Query(quantile(0.9, "time_to_first_token_seconds", "model"), "{{model}}"),),
                "s",
            ),
            Panel(
                "Before the first token",
                "p90 of the time to the response head, to the first event and to the first token. Time between head and token is "
                "prefill or hidden reasoning.",
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
                "Time between events with generated content, as read from the upstream. Users see the p99 as pauses.",
                quantiles("inter_token_latency_seconds"),
                "s",
            ),
            Panel(
                "Gaps, distribution",
                "A second band far above the first: the engine interrupts a batch for the prefill of other requests.",
                heatmap("inter_token_latency_seconds"),
                "s",
                kind="heatmap",
            ),
            Panel(
                "Time per output token",
                "Average per model of (last - first token) / (streamed tokens - 1). 1 divided by it is the speed of one stream.",
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
                "As the upstreams count them. cached_input and cache_write are parts of input, and reasoning is a part of output.",
                (Query(rate("tokens_total", "type"), "{{type}}"),),
                "short",
            ),
            Panel(
                "Output tokens by model",
                "Output tokens per second, by model. They are added when a stream ends.",
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
                "Deltas by model",
                "Events with generated content per second, by model, while streams run. An event can hold several tokens.",
                (Query(rate("stream_deltas_total", "model"), "{{model}}"),),
                "short",
                stacked=True,
            ),
            Panel(
                "Tokens per request",
                "Tokens of one response, as the upstream counts them. Long prompts make the first token late, long answers the rest.",
                tuple(
                    Query(quantile(q, "tokens_per_request", selected=f'{R},type="{kind}"'), f"{kind} p{q * 100:g}")
                    for kind in ("input", "output")
                    for q in (0.5, 0.99)
                ),
                "short",
            ),
            Panel(
                "Finish reasons",
                "Why models stopped, per second. length: the answer was cut at its limit. content_filter: it was refused.",
                (Query(rate("finish_reasons_total", "reason"), "{{reason}}"),),
                "reqps",
                stacked=True,
            ),
            Panel(
                "Streams without usage",
                "Streams whose tokens are not counted, by reason, and JSON answers. not_reported: set usage: {request: true} "
                "on the route.",
                (
                    Query(rate("streams_without_usage_total", "reason"), "{{reason}}"),
                    Query(rate("answers_without_usage_total"), "JSON answers"),
                ),
                "reqps",
            ),
            Panel(
                "Events",
                "Events of streams. garbled: could not be decoded, and were forwarded unchanged.",
                (
                    Query(rate("stream_events_total"), "events"),
                    Query(rate("stream_events_garbled_total"), "garbled"),
                ),
                width=12,
            ),
            Panel(
                "Stream ends",
                "marker: the API's end marker came. eof: only the body ended. If the backend normally sends a marker, the stream was cut.",
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
                "1: the latest request got a response head. Nothing is probed: without traffic the value does not change.",
                (Query(f"min by (upstream) (sseproxy_upstream_up{{{U}}})", "{{upstream}}"),),
            ),
            Panel(
                "Errors",
                "dns, connect, tls: it cannot be reached. timeout: see the route's timeouts. reset: it closed the connection. protocol: no valid HTTP.",
                (Query(rate("upstream_errors_total", "upstream, type"), "{{upstream}} {{type}}"),),
                "reqps",
            ),
            Panel(
                "Error responses",
                "Responses of the upstream with an error status, by status. They are complete, so they are not among the errors.",
                (
                    Query(
                        f'sum by (upstream, code) (rate(sseproxy_requests_total{{{R},outcome="completed",code=~"4..|5.."}}[{RATE}]))',
                        "{{upstream}} {{code}}",
                    ),
                ),
                "reqps",
            ),
            Panel(
                "Time to connect",
                "Time to make a new connection to the upstream: name resolution, TCP and TLS.",
                quantiles("upstream_connect_seconds"),
                "s",
            ),
            Panel(
                "Connections used again",
                "The share of requests that were sent on an open connection. With little traffic it is low: idle connections are closed after four seconds.",
                (
                    Query(
                        f"{rate('upstream_connections_reused_total', 'upstream')} / ({rate('upstream_connections_reused_total', 'upstream')}"
                        f" + {rate('upstream_connect_seconds_count', 'upstream')})",
                        "{{upstream}}",
                    ),
                ),
                "percentunit",
            ),
            Panel(
                "Connections",
                "connecting: being established. active: carries a request. idle: waits for the next request, at most four seconds.",
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
        "Fleet",
        (
            Panel(
                "Endpoints",
                "Endpoints in use, and all of them. The others are ejected: requests or checks fail, and the log says why.",
                (
                    Query(f"sum by (upstream) (sseproxy_endpoint_up{{{U}}})", "{{upstream}} in use"),
                    Query(f"count by (upstream) (sseproxy_endpoint_up{{{U}}})", "{{upstream}} all"),
                ),
                whole=True,
            ),
            Panel(
                "Active per endpoint",
                "Requests that each endpoint is answering. Without affinity the numbers are equal: slow endpoints get fewer requests.",
                (
                    Query(
                        f"sum by (upstream, endpoint) (sseproxy_endpoint_requests_active{{{U}}})",
                        "{{upstream}} {{endpoint}}",
                    ),
                ),
            ),
            Panel(
                "Attempts",
                "Attempts at endpoints, by their result. All except completed and client_gone are failures or refusals because of load.",
                (Query(rate("attempts_total", "upstream, result", U), "{{upstream}} {{result}}"),),
                "reqps",
                stacked=True,
            ),
            Panel(
                "Retries",
                "Attempts that were followed by another one, by reason. connect: no connection could be made. A number: the status.",
                (Query(rate("retries_total", "upstream, reason"), "{{upstream}} {{reason}}"),),
                "reqps",
                stacked=True,
            ),
            Panel(
                "Ejections",
                "refused: no connection could be made. failures: errors, stalls, truncations. health: checks failed. A trial that "
                "fails counts as well.",
                (
                    Query(
                        f"sum by (upstream, endpoint, reason) (increase(sseproxy_endpoint_ejections_total{{{U}}}[{RATE}]))",
                        "{{upstream}} {{endpoint}} {{reason}}",
                    ),
                ),
            ),
            Panel(
                "Discarded tokens",
                "Tokens of attempts that were thrown away, as far as the upstream reported them. You pay for them.",
                (Query(rate("discarded_tokens_total", "upstream, type", U), "{{upstream}} {{type}}"),),
            ),
            Panel(
                "Held back",
                "How long answers, or their beginnings, were held back, on routes with until: first_token or until: end.",
                quantiles("held_seconds"),
                "s",
                24,
            ),
        ),
    ),
    Row(
        "The proxy itself",
        (
            Panel(
                "Delay by the proxy",
                "Time from reading a chunk to writing it to the client's socket or buffer. Less than 0.1 ms is normal.",
                quantiles("chunk_forward_seconds"),
                "s",
            ),
            Panel(
                "Cancelling upstream",
                "Time from noticing that a client left to closing its upstream connection. Until then the model generates tokens that nobody reads.",
                quantiles("upstream_release_seconds"),
                "s",
            ),
            Panel(
                "Event loop lag",
                "How late timers fire. Above 10 ms workers are throttled or at their limit: remove CPU limits, add workers or replicas.",
                quantiles("event_loop_lag_seconds", P),
                "s",
            ),
            Panel(
                "Refused",
                "Refused by this proxy and never sent upstream, by reason. no_route: a wrong path or model. Most others are limits.",
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
                "Forwarded but not read, so tokens are missing. encoded: compressed. oversize: too large. unknown: "
                "neither JSON nor an event stream. failed: see the log.",
                (Query(rate("bodies_not_read_total", "reason"), "{{reason}}"),),
                "reqps",
            ),
            Panel(
                "Workers",
                "accepting: take requests. finishing: belong to an earlier configuration. restarts: ended unexpectedly and were replaced.",
                (
                    Query(f"sum(sseproxy_workers{{{P}}})", "accepting"),
                    Query(f"sum(sseproxy_workers_finishing{{{P}}})", "finishing"),
                    Query(f"sum(increase(sseproxy_worker_restarts_total{{{P}}}[{RATE}]))", "restarts"),
                ),
                whole=True,
            ),
            Panel(
                "Reloads",
                "After a failure the earlier configuration stays in use. Failed upgrades count as well.",
                (Query(f"sum by (result) (increase(sseproxy_config_reloads_total{{{P}}}[{RATE}]))", "{{result}}"),),
                whole=True,
            ),
            Panel(
                "Age of the configuration",
                "How long ago the configuration in use was loaded.",
                (Query(f"time() - max(sseproxy_config_last_reload_success_timestamp_seconds{{{P}}})", "age"),),
                "s",
            ),
            Panel(
                "Limits",
                "The share of limits.connections and limits.active_requests that is in use. At 100 % requests are refused.",
                (
                    Query(
                        f'sum by (instance) (sseproxy_client_connections{{{P}}}) / sum by (instance) (sseproxy_limit{{{P},limit="connections"}})',
                        "{{instance}} connections",
                    ),
                    Query(
                        f"sum by (instance) (sseproxy_requests_active{{{P}}}) / sum by (instance) "
                        f'(sseproxy_limit{{{P},limit="active_requests",route=""}})',
                        "{{instance}} active_requests",
                    ),
                ),
                "percentunit",
            ),
            Panel(
                "CPU",
                "CPU of each worker, and of the supervisor. 100 % is one core: a worker that needs it all is late.",
                (
                    Query(rate("worker_cpu_seconds_total", "instance, worker", P), "{{instance}} worker {{worker}}"),
                    Query(
                        f"sum by (instance) (rate(process_cpu_seconds_total{{{P}}}[{RATE}]))", "{{instance}} supervisor"
                    ),
                ),
                "percentunit",
            ),
            Panel(
                "Memory",
                "Resident memory of each worker, and of the supervisor. It should follow the number of requests in progress.",
                (
                    Query(
                        f"sum by (instance, worker) (sseproxy_worker_resident_memory_bytes{{{P}}})",
                        "{{instance}} worker {{worker}}",
                    ),
                    Query(f"sum by (instance) (process_resident_memory_bytes{{{P}}})", "{{instance}} supervisor"),
                ),
                "bytes",
            ),
            Panel(
                "Descriptors",
                "The share of the allowed file descriptors that is open. At 100 % no connection is accepted.",
                (
                    Query(
                        f"max by (instance) (sseproxy_worker_open_fds{{{P}}} / sseproxy_worker_max_fds{{{P}}})",
                        "{{instance}} worker",
                    ),
                    Query(
                        f"max by (instance) (process_open_fds{{{P}}} / process_max_fds{{{P}}})",
                        "{{instance}} supervisor",
                    ),
                ),
                "percentunit",
            ),
        ),
    ),
    Row(
        "Clients",
        (
            Panel(
                "Requests by client",
                "Requests with the key of each client that end per second. Only with clients in the configuration.",
                (Query(rate("client_requests_total", "client", P), "{{client}}"),),
                "reqps",
            ),
            Panel(
                "Active by client",
                "Requests of each client in progress.",
                (Query(f"sum by (client) (sseproxy_client_requests_active{{{P}}})", "{{client}}"),),
                whole=True,
            ),
            Panel(
                "Tokens by client",
                "Input and output tokens of each client per second, as the upstream reports them. estimated: an estimate for answers whose tokens were not reported.",
                (
                    Query(
                        f'sum by (client) (rate(sseproxy_client_tokens_total{{{P},type=~"input|output"}}[{RATE}]))',
                        "{{client}}",
                    ),
                    Query(
                        f'sum by (client) (rate(sseproxy_client_tokens_total{{{P},type="estimated"}}[{RATE}]))',
                        "{{client}} estimated",
                    ),
                ),
            ),
            Panel(
                "Limited clients",
                "Requests that were answered 429 because a limit of the client is reached.",
                (Query(rate("client_limited_total", "client, limit", P), "{{client}} {{limit}}"),),
                "reqps",
            ),
            Panel(
                "Wrong keys",
                "Requests with a key that no client has. Perhaps a deployment still uses an old key: the access log names its "
                "public part.",
                (Query(rate("client_keys_rejected_total", "", P), "wrong keys"),),
                "reqps",
            ),
            Panel(
                "Ledger failures",
                "Commands that the server of ledger.url did not answer in time. Meanwhile each machine applies the limits separately, or refuses.",
                (Query(rate("ledger_failures_total", "instance", P), "{{instance}}"),),
                "reqps",
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
        "description": "Streams of LLM APIs: time to first token, speed, tokens, and why requests ended.",
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
