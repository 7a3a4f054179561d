"""Draws the dashboard from a real Prometheus: `make dashboard-picture` writes `grafana/dashboard.png`.

It starts a proxy in front of a scripted backend, lets clients use it for a while, and lets Prometheus scrape it. Then it
sends every query of every panel to Prometheus and draws the answers as a page, each at the place of its panel. Headless
Chromium takes a picture of the page. Grafana is not used, and the picture says so.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import json
import math
import random
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from aiohttp import ClientSession

from tests.harness import DONE, LAST_CHUNK, STREAM_HEAD, Peer, ScriptedUpstream, chunk, delta, post, usage
from tests.served import ConfigFile, Served
from tests.test_grafana import Prometheus, prometheus

from .generate import dashboard

HERE = Path(__file__).parent
# Pixels: the width of a column and the height of a row of Grafana's grid, and the space between panels.
COLUMN, ROW, GAP = 68, 30, 8
COLORS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#ffa6b0", "#96d98d", "#fade2a")
# Seconds to the first token, tokens per second, and failures in percent.
MODELS = {"gpt-4o": (0.25, 60.0, 5), "llama-70b": (0.6, 30.0, 3), "o3": (2.0, 45.0, 2)}
# Seconds between two points of a graph.
STEP = 2

CSS = """
body { margin: 0; background: #111217; color: #ccccdc; font: 12px Inter, "DejaVu Sans", sans-serif; width: 1640px; }
header { padding: 12px 16px 4px; } h1 { font-size: 20px; margin: 0 0 2px; } header p { margin: 0; color: #8e8e99; }
main { position: relative; margin: 8px; }
section { position: absolute; background: #181b1f; border: 1px solid #25272e; border-radius: 2px; overflow: hidden;
          box-sizing: border-box; }
section h2 { font-size: 13px; font-weight: 500; margin: 6px 10px 0; white-space: nowrap; }
.row { background: none; border: none; font-size: 15px; font-weight: 500; padding: 4px 2px; }
.legend { position: absolute; bottom: 3px; left: 10px; right: 6px; font-size: 11px; line-height: 14px; }
.legend span { margin-right: 12px; } .legend i { display: inline-block; width: 12px; height: 3px; margin: 0 5px 3px 0; }
.stat { font-size: 34px; font-weight: 500; text-align: center; line-height: 74px; }
text { fill: #8e8e99; font-size: 11px; }
"""


async def backend(api: Peer) -> None:
    """Answers at the pace of the model, with some variation. A few requests fail: no answer, 429, a cut or gzip."""
    while True:
        request = json.loads((await api.message()).body or b"{}")
        model = request.get("model", "gpt-4o")
        ttft, rate, trouble = MODELS[model]
        dice = random.random() * 100
        if dice < trouble / 2:
            return
        if dice < trouble:
            api.send(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")
            continue
        if dice > 99.5:
            packed = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
            api.send(packed, chunk(b"\x1f\x8b"), LAST_CHUNK)
            continue
        await asyncio.sleep(random.lognormvariate(math.log(ttft), 0.5))
        api.send(STREAM_HEAD)
        tokens = random.randrange(20, 120)
        for _ in range(tokens):
            await asyncio.sleep(random.lognormvariate(math.log(1 / rate), 0.4))
            api.send(chunk(delta(" token")))
        if dice > 100 - trouble:
            return
        reason = b"stop" if dice > 20 else b"length"
        finish = b'data: {"choices":[{"delta":{},"finish_reason":"%b"}]}\n\n' % reason
        api.send(chunk(finish), chunk(usage(random.randrange(50, 2000), tokens)), chunk(DONE), LAST_CHUNK)


async def client(served: Served, seconds: float) -> None:
    """Sends one request after the other. Sometimes it leaves before the end of the answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await asyncio.sleep(random.expovariate(0.7))
        peer = Peer(*await asyncio.open_connection("127.0.0.1", served.port))
        try:
            model = random.choices(list(MODELS), (6, 3, 1))[0]
            path = "/v2/chat/completions" if model == "llama-70b" else "/v1/chat/completions"
            if random.random() < 0.02:
                path = "/nowhere"
            peer.send(post(json.dumps({"model": model, "stream": True}).encode(), path=path))
            await (asyncio.wait_for(peer.message(), 1.5) if random.random() < 0.05 else peer.rest())
        except (TimeoutError, ConnectionError):
            pass
        finally:
            peer.writer.transport.abort()


def concrete(expr: str) -> str:
    """`expr` with everything selected, and a rate interval that fits a run of a minute or two."""
    for name in ("job", "instance", "route", "upstream"):
        expr = expr.replace(f"${name}", ".*")
    return expr.replace("$__rate_interval", "15s")


async def ask(asked: Prometheus, expr: str, start: float, end: float) -> list[dict[str, Any]]:
    query = {"query": concrete(expr), "start": str(start), "end": str(end), "step": str(STEP)}
    async with (
        ClientSession() as session,
        session.get(f"http://127.0.0.1:{asked.port}/api/v1/query_range", params=query) as response,
    ):
        found: list[dict[str, Any]] = (await response.json())["data"]["result"]
        return found


def shown(value: float, unit: str) -> str:
    """`value` with its unit, as Grafana writes it."""
    if unit == "s":
        if value >= 60:
            return f"{value / 60:.3g} min"
        for factor, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if value >= factor or name == "µs":
                return "0" if not value else f"{value / factor:.3g} {name}"
    if unit == "percentunit":
        return f"{value * 100:.3g}%"
    suffix = {"reqps": " req/s", "Bps": "B/s", "bytes": "B"}.get(unit, "")
    for factor, name in ((1e6, "M"), (1e3, "k"), (1, "")):
        if abs(value) >= factor or factor == 1:
            return f"{value / factor:.3g}{' ' if suffix[:1] == 'B' else ''}{name}{suffix}"
    return ""


def points(series: dict[str, Any]) -> list[tuple[float, float]]:
    """The times and values of `series`. A quantile of nothing is NaN, and is left out."""
    return [(float(at), float(value)) for at, value in series["values"] if value not in ("NaN", "+Inf")]


def named(legend: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        legend = legend.replace(f"{{{{{name}}}}}", value)
    # Prometheus treats an empty label as a missing one.
    return re.sub(r"{{\w+}}", "(none)", legend)


class Area:
    """The drawing area of a panel, and its axes: from time and value to pixels."""

    def __init__(self, width: int, height: int, start: float, end: float, top: float) -> None:
        # Below the graph there is room for the times and for a legend of three lines.
        self.left, self.right, self.upper, self.lower = 74, width - 12, 12, height - 90
        self.start, self.end = start, end
        # The y axis has four steps of a round size.
        exact = (top or 1.0) / 4
        power = 10.0 ** math.floor(math.log10(exact))
        self.step: float = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= exact * 0.999)
        self.top = 4 * self.step

    def x(self, at: float) -> float:
        return self.left + (at - self.start) / (self.end - self.start) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.lower - value / self.top * (self.lower - self.upper)

    def axes(self, unit: str) -> str:
        parts = []
        for tick in range(5):
            value = self.step * tick
            y = self.y(value)
            parts.append(f'<line x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#25272e"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{shown(value, unit)}</text>')
        return "".join(parts) + self.times()

    def times(self) -> str:
        first = math.ceil(self.start / 20) * 20
        return "".join(
            f'<text x="{self.x(at):.1f}" y="{self.lower + 15}" text-anchor="middle">'
            f"{time.strftime('%H:%M:%S', time.localtime(at))}</text>"
            for at in range(first, int(self.end) - 4, 20)
        )


def timeseries(panel: dict[str, Any], found: list[tuple[str, list[tuple[float, float]]]], area: Area) -> str:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    below: dict[float, float] = {}
    lines = []
    for index, (_, values) in enumerate(found):
        color = COLORS[index % len(COLORS)]
        base = [(at, below.get(at, 0.0)) for at, _ in values]
        if stacked:
            values = [(at, value + below.get(at, 0.0)) for at, value in values]
            below.update(values)
        path = " ".join(f"{area.x(at):.1f},{area.y(value):.1f}" for at, value in values)
        under = " ".join(f"{area.x(at):.1f},{area.y(value):.1f}" for at, value in reversed(base if stacked else []))
        if under:
            lines.append(f'<polygon points="{path} {under}" fill="{color}" fill-opacity="0.25"/>')
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    return area.axes(unit) + "".join(lines)


def heatmap(panel: dict[str, Any], found: list[tuple[str, list[tuple[float, float]]]], area: Area) -> str:
    unit = panel["options"]["yAxis"]["unit"]
    buckets = sorted(
        ((float(le.replace("+Inf", "inf")), dict(values)) for le, values in found), key=lambda item: item[0]
    )
    used = [index for index, (_, values) in enumerate(buckets) if index and any(values.values())]
    cells, previous = {}, buckets[0][1]
    for index, (_, values) in enumerate(buckets[1:], 1):
        for at, value in values.items():
            cells[index, at] = max(0.0, value - previous.get(at, 0.0))
        previous = values
    filled = [index for (index, _), count in cells.items() if count > 0] or used
    low, high = min(filled), max(filled)
    most = max(cells.values()) or 1.0
    height = (area.lower - area.upper) / (high - low + 1)
    width = (area.right - area.left) * STEP / (area.end - area.start)
    parts = []
    for (index, at), count in cells.items():
        if count > 0:
            y = area.lower - (index - low + 1) * height
            strength = (count / most) ** 0.5
            parts.append(
                f'<rect x="{max(area.left, area.x(at) - width):.1f}" y="{y:.1f}" width="{width + 0.5:.1f}" height="{height:.1f}" '
                f'fill="#ff9830" fill-opacity="{0.08 + 0.92 * strength:.2f}"/>'
            )
    for index in range(low, high + 1, max(1, (high - low + 1) // 6)):
        y = area.lower - (index - low + 1) * height
        parts.append(
            f'<text x="{area.left - 6}" y="{y + 4:.1f}" text-anchor="end">{shown(buckets[index][0], unit)}</text>'
        )
    return "".join(parts) + area.times()


def drawn(panel: dict[str, Any], found: list[tuple[str, list[tuple[float, float]]]], start: float, end: float) -> str:
    grid = panel["gridPos"]
    width, height = grid["w"] * COLUMN - GAP, grid["h"] * ROW - GAP
    place = f"left:{grid['x'] * COLUMN}px;top:{grid['y'] * ROW}px;width:{width}px;height:{height}px"
    title = html.escape(panel["title"])
    if panel["type"] == "row":
        return f'<section class="row" style="{place}">{title}</section>'
    unit = panel["fieldConfig"]["defaults"]["unit"]
    found = [(name, values) for name, values in found if values]
    if panel["type"] == "stat":
        ((_, values),) = found
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        latest = values[-1][1]
        color = [step["color"] for step in steps if step["value"] is None or latest >= step["value"]][-1]
        color = {"green": COLORS[0], "orange": COLORS[3], "red": COLORS[4]}[color]
        body = f'<div class="stat" style="color:{color}">{shown(latest, unit)}</div>'
        return f'<section style="{place}"><h2>{title}</h2>{body}</section>'
    totals: dict[float, float] = {}
    stacked = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal"
    for _, values in found:
        for at, value in values:
            totals[at] = totals.get(at, 0.0) + value if stacked else max(totals.get(at, 0.0), value)
    area = Area(width, height, start, end, max(totals.values(), default=1.0))
    if panel["type"] == "heatmap":
        picture, legend = heatmap(panel, found, area), ""
    else:
        picture = timeseries(panel, found, area)
        legend = "".join(
            f'<span><i style="background:{COLORS[index % len(COLORS)]}"></i>{html.escape(name)}</span>'
            for index, (name, _) in enumerate(found)
        )
    svg = f'<svg width="{width}" height="{height - 26}">{picture}</svg>'
    return f'<section style="{place}"><h2>{title}</h2>{svg}<div class="legend">{legend}</div></section>'


async def page(seconds: float, directory: Path) -> str:
    """The dashboard as HTML, after `seconds` of traffic."""
    async with ScriptedUpstream(backend) as openai, ScriptedUpstream(backend) as vllm:
        file = ConfigFile(
            directory,
            openai,
            workers="2",
            metrics="{models: [gpt-4o*, llama-*, o3*]}",
            upstreams=f"[{{name: openai, url: '{openai.url}/v1'}}, {{name: vllm, url: '{vllm.url}/v1'}}]",
            routes="[{name: openai, match: {path: /v1}, upstream: openai}, {name: local, match: {path: /v2}, upstream: vllm}]",
        )
        async with file.serve() as served, prometheus(directory, served) as asked:
            loop = asyncio.get_running_loop()
            start = time.time()  # noqa: TID251 - Prometheus is asked by points in time
            clients = [loop.create_task(client(served, seconds)) for _ in range(60)]
            await asyncio.sleep(seconds / 2)
            async with (
                ClientSession() as session,
                session.post(f"http://127.0.0.1:{served.admin}/-/reload") as response,
            ):
                response.raise_for_status()
            await asyncio.sleep(seconds / 2)
            end = time.time()  # noqa: TID251 - as above
            parts = []
            bottom = 0
            for panel in dashboard()["panels"]:
                found = [
                    (named(target["legendFormat"], series["metric"]), points(series))
                    for target in panel.get("targets", ())
                    for series in await ask(asked, target["expr"], start + 10, end)
                ]
                parts.append(drawn(panel, found, start + 10, end))
                bottom = max(bottom, panel["gridPos"]["y"] + panel["gridPos"]["h"])
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    said = (
        "Drawn by grafana/render.py, not a screenshot of Grafana: the answers of a real Prometheus to every query of the "
        f"dashboard, after {seconds:g} seconds of invented traffic through a proxy."
    )
    return (
        f'<!doctype html><meta charset="utf-8"><style>{CSS}</style><header><h1>sseproxy</h1><p>{said}</p></header>'
        f'<main style="height:{bottom * ROW}px">{"".join(parts)}</main>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=100.0)
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not installed: apt-get install chromium prometheus")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        text = asyncio.run(page(options.seconds, directory))
        (directory / "page.html").write_text(text)
        height = _height(text)
        subprocess.run(
            [
                *(chromium, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"),
                f"--window-size=1648,{height}",
                f"--screenshot={HERE / 'dashboard.png'}",
                f"file://{directory / 'page.html'}",
            ],
            check=True,
            capture_output=True,
        )


def _height(text: str) -> int:
    """The height of the page, in pixels."""
    return int(text.partition('<main style="height:')[2].partition("px")[0]) + 70


if __name__ == "__main__":
    main()
