"""The dashboard and the rules: current, complete, and, asked of a real Prometheus, all with an answer."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import ClientError, ClientSession

from sseproxy import config
from sseproxy.observe.metrics import METRICS

from .harness import DONE, LAST_CHUNK, STREAM_HEAD, Peer, ScriptedUpstream, chunk, delta, kept_port, post
from .served import ConfigFile, Served, program

GRAFANA = Path(__file__).parent.parent / "grafana"
GUIDE = (GRAFANA / "README.md").read_text()
RULES = sorted((GRAFANA / "rules").glob("*.yaml"))
DASHBOARD = json.loads((GRAFANA / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# In no panel, and why.
NOT_SHOWN = {
    "audio_seconds_total": "few APIs count audio in seconds; those who need it know its name",
    "build_info": "what the dashboard's variables are made of",
}
EXPOSED = {f"{metric.name}_total" if metric.kind == "counter" else metric.name for metric in METRICS}
WINDOW = "10s"


def rules() -> Iterator[dict[str, Any]]:
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


ALERTS = [rule["alert"] for rule in rules() if "alert" in rule]


def queries() -> Iterator[tuple[str, str]]:
    """What is asked, and by whom."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for rule in rules():
        yield rule.get("record") or rule["alert"], rule["expr"]


def metrics_in(expr: str) -> set[str]:
    found = re.findall(r"\bsseproxy_(\w+?)(?:_bucket|_sum|_count)?(?=[{\[),\s]|$)", expr)
    return set(found)


def test_the_dashboard_is_what_its_script_writes() -> None:
    written = subprocess.run([sys.executable, GRAFANA / "generate.py"], capture_output=True, text=True, check=True)
    assert (GRAFANA / "dashboard.json").read_text() == written.stdout


def test_every_panel_says_what_it_means_in_a_unit() -> None:
    for panel in PANELS:
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            for window in re.findall(r"\[([^]]+)\]", target["expr"]):
                assert window == "$__rate_interval"


def test_no_panel_covers_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_what_is_asked_for_exists_and_what_exists_is_asked_for() -> None:
    asked = set().union(*(metrics_in(expr) for _, expr in queries()))
    assert asked <= EXPOSED
    shown = set().union(*(metrics_in(target["expr"]) for panel in PANELS for target in panel["targets"]))
    assert EXPOSED - shown == set(NOT_SHOWN)


def test_every_alert_says_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning")
            assert rule["for"]
            assert len(rule["annotations"]["description"]) > 40


def test_the_guide_has_a_section_for_each_alert_with_its_severity() -> None:
    sections = re.findall(r"^### (Sseproxy\w+) \((\w+)\)$", GUIDE, re.M)
    assert sections == [(rule["alert"], rule["labels"]["severity"]) for rule in rules() if "alert" in rule]


def test_the_guides_configurations_are_valid(tmp_path: Path) -> None:
    ours, theirs = re.findall(r"```yaml\n(.*?)```", GUIDE, re.S)
    minimal = yaml.safe_load((GRAFANA.parent / "configs" / "minimal.yaml").read_text())
    config.parse(yaml.safe_dump(minimal | yaml.safe_load(ours)), "sseproxy.yaml", {"OPENAI_API_KEY": "sk-x"})
    shutil.copytree(GRAFANA / "rules", tmp_path / "rules")
    (tmp_path / "prometheus.yml").write_text(theirs)
    found = subprocess.run(
        [program("promtool"), "check", "config", tmp_path / "prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_panels_that_the_guide_names_exist() -> None:
    named = re.findall(r"(?:panels?|and) \*([^*]+)\*", GUIDE)
    assert named
    assert set(named) <= {panel["title"] for panel in PANELS}


def test_the_guide_has_the_rows_of_the_dashboard() -> None:
    table = GUIDE[GUIDE.index("| row |") : GUIDE.index("The lists at the top")]
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert re.findall(r"^\| (.*?) \|", table, re.M)[1:] == rows


def test_prometheus_takes_the_rules() -> None:
    subprocess.run([program("promtool"), "check", "rules", *RULES], capture_output=True, check=True)


def test_every_alert_fires_when_it_should_and_not_when_it_should_not() -> None:
    tests = yaml.safe_load((GRAFANA / "tests" / "alerts.yaml").read_text())["tests"]
    shown = {(alert, how): 0 for alert in ALERTS for how in ("fires", "is silent")}
    for test in tests[:-1]:
        alert, how = re.findall(r"^(\w+) (fires|is silent): ", test["name"])[0]
        for asked in test["promql_expr_test"]:
            assert asked["expr"] == f'ALERTS{{alertname="{alert}", alertstate="firing"}}'
            assert bool(asked["exp_samples"]) == (how == "fires")
        shown[alert, how] += 1
    assert all(shown.values()), shown
    found = subprocess.run(
        [program("promtool"), "test", "rules", GRAFANA / "tests" / "alerts.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def usage(model: str) -> bytes:
    counts = {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    return b"data: " + json.dumps({"model": model, "choices": [], "usage": counts}).encode() + b"\n\n"


async def backend(api: Peer) -> None:
    """Does as the request's model says."""
    while True:
        request = await api.message()
        model = request.json()["model"]
        if model == "slow":
            await api.gone()
            return
        if model == "dead":
            return
        if model in ("busy", "sick"):
            api.send(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % (b"429 Busy" if model == "busy" else b"500 Sick"))
            continue
        if model == "torn":
            # It says what it has read, and dies before the first token.
            api.send(STREAM_HEAD, chunk(usage(model)))
            return
        if model == "packed":
            api.send(
                STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), chunk(b"\x1f\x8b"), LAST_CHUNK
            )
            continue
        if model == "whole":
            api.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
            continue
        api.send(STREAM_HEAD)
        for number in range(5):
            api.send(chunk(delta(str(number))))
            await asyncio.sleep(0.02)
        if model == "broken":
            return
        api.send(chunk(b"data: {nonsense\n\n"), *([chunk(usage(model))] if model != "silent" else []))
        api.send(chunk(b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'))
        if model != "unmarked":
            api.send(chunk(DONE))
        api.send(LAST_CHUNK)


async def load(served: Served) -> None:
    """All that can happen, again and again."""
    while True:
        for model in (
            "gpt-a",
            "gpt-b",
            "silent",
            "unmarked",
            "broken",
            "dead",
            "packed",
            "whole",
            "slow",
            "nowhere",
            "busy",
            "sick",
            "torn",
        ):
            client = Peer(*await asyncio.open_connection("127.0.0.1", served.port))
            body = json.dumps({"model": model, "stream": True}).encode()
            path = {"nowhere": "/nowhere", "torn": "/fleet/completions", "gpt-b": "/fleet/chat/completions"}
            try:
                asked = post(body, path=path.get(model, "/v1/chat/completions"))
                client.send(asked.replace(b"Host: proxy", b"Host: proxy\r\nAuthorization: Bearer test"))
                if model == "slow":
                    # Its client does not wait.
                    await asyncio.sleep(0.05)
                else:
                    await client.message()
            finally:
                client.writer.transport.abort()


class Prometheus:
    def __init__(self, port: int) -> None:
        self.port = port

    async def ask(self, expr: str) -> list[dict[str, Any]]:
        async with (
            ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.port}/api/v1/query", params={"query": expr}) as response,
        ):
            answer = await response.json()
            assert answer["status"] == "success", (expr, answer)
            result: list[dict[str, Any]] = answer["data"]["result"]
            return result

    async def answers(self, expr: str) -> list[dict[str, Any]]:
        """The answer once there is one."""
        for _ in range(100):
            found = [series for series in await self.ask(expr) if series["value"][1] != "NaN"]
            if found:
                return found
            await asyncio.sleep(0.2)
        raise AssertionError(f"no answer to {expr}")


@asynccontextmanager
async def prometheus(directory: Path, served: Served, **scrape: object) -> AsyncIterator[Prometheus]:
    """A Prometheus that scrapes `served`, with further options in `scrape`."""
    # As the rules are, but quick.
    for path in RULES:
        text = re.sub(r"\[\d+m\]", f"[{WINDOW}]", path.read_text()).replace(
            "  - name: ", "  - interval: 1s\n    name: "
        )
        (directory / path.name).write_text(text)
    written = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "rule_files": [str(directory / path.name) for path in RULES],
        "scrape_configs": [
            {"job_name": "sseproxy", "static_configs": [{"targets": [f"127.0.0.1:{served.admin}"]}], **scrape},
        ],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(written))
    with kept_port() as port:
        process = await asyncio.create_subprocess_exec(
            program("prometheus"),
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            running = Prometheus(port)
            async with asyncio.timeout(20):
                while True:
                    try:
                        if await running.ask("up == 1"):
                            break
                    except (ClientError, OSError, AssertionError, ValueError):
                        pass
                    await asyncio.sleep(0.2)
            yield running
        finally:
            process.kill()
            await process.wait()


def concrete(expr: str) -> str:
    """`expr` as Grafana sends it with everything selected."""
    for name in ("job", "instance", "route", "upstream"):
        expr = expr.replace(f"${name}", ".*")
    return expr.replace("$__rate_interval", WINDOW)


def without_threshold(expr: str) -> str:
    """The left side of an alert's comparison, whatever traffic there is."""
    left = re.sub(r"\s(?:==|>|<=?)\s*[\d.]+\s*$", "", expr.strip())
    assert left != expr.strip(), expr
    left = re.sub(r" > [\d.]+(?=\))", "", left)
    return re.sub(r"\[\d+m\]", f"[{WINDOW}]", left)


@pytest.mark.timeout(120)
async def test_a_real_prometheus_answers_every_panel_and_every_rule(tmp_path: Path) -> None:
    program("prometheus")
    async with ScriptedUpstream(backend) as upstream:
        url = f"{upstream.url}/v1"
        fleet = "{name: fleet, match: {path: /fleet}, upstream: gpus, retry: {until: first_token}}"
        key = f"sha256:{sha256(b'test').hexdigest()}"
        file = ConfigFile(
            tmp_path,
            upstream,
            metrics="{models: [gpt-a, gpt-b]}",
            limits="{active_requests: 2}",
            upstreams=f"[{{name: up, url: '{url}'}}, {{name: gpus, urls: ['{url}', '{url}']}}]",
            routes=f"[{{name: api, match: {{path: /v1}}, upstream: up}}, {fleet}]",
            clients=f"[{{name: team-a, keys: '{key}', limits: {{active_requests: 1000}}}}]",
        )
        async with file.serve() as served, prometheus(tmp_path, served) as asked:
            loads = [asyncio.get_running_loop().create_task(load(served)) for _ in range(3)]
            try:
                async with ClientSession() as session:
                    for _ in range(2):
                        async with session.post(f"http://127.0.0.1:{served.admin}/-/reload") as response:
                            assert response.status == 200
                for title, expr in (
                    (panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]
                ):
                    assert await asked.answers(concrete(expr)), title
                for rule in rules():
                    if "record" in rule:
                        assert await asked.answers(rule["record"]), rule["record"]
                    elif rule["alert"] == "SseproxyNotScraped":
                        assert not await asked.ask(rule["expr"])
                    else:
                        assert await asked.answers(without_threshold(rule["expr"])), rule["alert"]
                async with (
                    ClientSession() as session,
                    session.get(
                        f"http://127.0.0.1:{asked.port}/api/v1/query_exemplars",
                        params={
                            "query": "sseproxy_time_to_first_token_seconds_bucket",
                            "start": "2000-01-01T00:00:00Z",
                            "end": "2100-01-01T00:00:00Z",
                        },
                    ) as response,
                ):
                    series = (await response.json())["data"]
                    assert any("request_id" in exemplar["labels"] for one in series for exemplar in one["exemplars"])
            finally:
                for task in loads:
                    task.cancel()
                await asyncio.gather(*loads, return_exceptions=True)
