"""What the documents say is so."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest

from sseproxy import cli, config
from sseproxy.errors import Outcome, RequestError, UpstreamError
from sseproxy.observe import access
from sseproxy.observe.metrics import METRICS, Metric

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DEFINITIONS = (ROOT / "grafana" / "metrics.md").read_text()
OPERATIONS = (ROOT / "configs" / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def exposed_name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.kind == "counter" else metric.name


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    assert len(README.splitlines()) <= 180
    assert re.findall(r"^    (make \w+)$", README, re.M) == ["make demo", "make test"]


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
    named = set(re.findall(r"`make ([\w-]+)", README + CONTRIBUTING)) | set(
        re.findall(r"^    make (\w+)", README, re.M)
    )
    assert named <= targets


def test_contributing_names_every_target() -> None:
    phony = " ".join(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M))
    assert set(phony.split()) - {"clean"} == set(re.findall(r"`make ([\w-]+)", CONTRIBUTING))


def test_the_readmes_configuration_loads() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert len(block.splitlines()) == 10
    settings = config.parse(block, "README.md", {"OPENAI_API_KEY": "sk-x"})
    assert [route.name for route in settings.routes] == ["openai", "local"]


def test_the_readmes_commands_parse() -> None:
    parser = cli._parser()
    for command in ("serve --upstream https://api.openai.com/v1", "serve -c sseproxy.yaml"):
        assert f"sseproxy {command}" in README
        assert parser.parse_args(command.split()).run is not None


def row(metric: Metric) -> str:
    kind = "gauge" if metric.kind == "state" else metric.kind
    return f"| `sseproxy_{exposed_name(metric)}` | {kind} | {', '.join(metric.labels)} | {metric.help.rstrip('.')} |"


def test_the_definitions_are_the_codes() -> None:
    documented = [line for line in DEFINITIONS.splitlines() if line.startswith("| `sseproxy_")]
    assert documented == [row(metric) for metric in METRICS]


def test_the_readmes_sample_has_lines_of_the_exposition() -> None:
    families = {exposed_name(metric): metric for metric in METRICS}
    for name, labels in re.findall(r"^sseproxy_(\w+)\{(.*)\} [\d.]+$", README, re.M):
        metric = families[re.sub(r"_(sum|count)$", "", name)]
        assert sorted(re.findall(r"(\w+)=", labels)) == sorted(metric.labels)


def test_every_outcome_and_error_type_is_explained() -> None:
    for outcome in Outcome:
        assert f"`{outcome.value}`" in DEFINITIONS
    for kind in UpstreamError._TABLE:
        assert kind in DEFINITIONS
    assert RequestError("no_route").status == 404


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    table = CONTRIBUTING[CONTRIBUTING.index("## Dependencies") :]
    for requirement in declared:
        name = re.split(r"[<>=\[]", requirement)[0]
        assert re.search(rf"\b{re.escape(name)}\b", table), name


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "README.md",
    *(ROOT / "configs").rglob("*.md"),
    *(ROOT / "grafana").glob("*.md"),
    *(ROOT / "sseproxy").rglob("*.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        led_to = page.parent / target if target else page
        assert led_to.exists(), target
        assert not anchor or anchor in anchors(led_to), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_field_of_the_access_log_is_explained() -> None:
    source = inspect.getsource(access.describe)
    table = OPERATIONS[OPERATIONS.index("| field |") :]
    for name in ["time", *re.findall(r'^        "(\w+)":', source, re.M)]:
        assert f"`{name}`" in table, name


def test_every_command_of_the_operations_page_is_one() -> None:
    assert "curl -X POST http://localhost:9464/-/reload" in OPERATIONS
    for command in re.findall(r"`sseproxy ([a-z-]+)", README + OPERATIONS):
        assert command in cli._parser().format_help(), command
