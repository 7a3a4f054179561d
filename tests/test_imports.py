"""Imports go one way: wire <- relay <- process <- cli, and `observe` reads `relay.exchange`."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

import sseproxy

from .harness import ScriptedUpstream
from .served import ConfigFile, python_runs_first, until_true, workers_run_first
from .test_reload import asked

ROOT = Path(sseproxy.__file__).parent
EVERYWHERE = {"config", "errors"}
MAY_IMPORT = {
    "errors": set(),
    "signals": set(),
    "config": {"config", "errors", "wire.dialects"},
    "wire": {"errors", "wire"},
    "ledger": {"ledger"},
    "relay": {"wire", "ledger", "relay"} | EVERYWHERE,
    "observe": {"observe", "relay.exchange", "signals", "wire"} | EVERYWHERE,
    "process": {"wire", "ledger", "relay", "observe", "process", "signals", "doctor.origin"} | EVERYWHERE,
    "doctor": {"wire", "ledger", "doctor"} | EVERYWHERE,
    "demo": set(),
    "top": {"errors"},
    "demonstration": {"process", "demo", "wire"} | EVERYWHERE,
    "cli": {
        "process",
        "signals",
        "top",
        "demo",
        "demonstration",
        "doctor",
        "observe.logs",
        "relay.routes",
        "wire.credentials",
    }
    | EVERYWHERE,
    "__main__": {"cli"},
}
# From the bottom up; the last three, which parse YAML, are for who loads a configuration.
CONFIG = [
    *("config.addresses", "config.files", "config.options", "config.values", "config.named", "config.model"),
    *("config.mistakes", "config.document", "config.loading"),
]
# From the bottom up. What a module imports for its types alone is not counted: a connection knows its server's type.
RELAY = [
    *("relay.reads", "relay.hangups", "relay.globs", "relay.routes", "relay.heads", "relay.answers", "relay.body"),
    *(
        "relay.clients",
        "relay.admission",
        "relay.downstream",
        "relay.server",
        "relay.exchange",
        "relay.clock",
        "relay.inspect",
        "relay.idle",
        "relay.upstream",
    ),
    *("relay.pool", "relay.attempt", "relay.affinity", "relay.retry", "relay.hold", "relay.pump"),
    *("relay.models", "relay.asking", "relay.phases", "relay.proxy"),
]
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """The modules of this package that `path` imports, as dotted names below it."""
    package = ["sseproxy", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("sseproxy.") for alias in node.names if alias.name.startswith("sseproxy")
            )
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin == "sseproxy":
                yield from (alias.name for alias in node.names)
            elif origin.startswith("sseproxy."):
                yield origin.removeprefix("sseproxy.")


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    allowed = MAY_IMPORT[dotted(path).partition(".")[0]]
    for name in imported(path):
        assert name.startswith("__") or any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed), name


def type_checked(path: Path) -> set[str]:
    """What `path` imports for the type checker alone."""
    tree = ast.parse(path.read_text())
    guarded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    return {
        f"{package}.{node.module}"
        for guard in guarded
        for node in ast.walk(guard)
        if isinstance(node, ast.ImportFrom) and node.level == 1
    }


@pytest.mark.parametrize("plan", [CONFIG, RELAY], ids=["config", "relay"])
def test_what_is_above_imports_what_is_below(plan: list[str]) -> None:
    room = plan[0].partition(".")[0]
    assert sorted(plan) == [dotted(path) for path in MODULES if dotted(path).startswith(f"{room}.")]
    for level, name in enumerate(plan):
        path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        others = {other for other in imported(path) if other.startswith(f"{room}.")} - type_checked(path)
        assert others <= set(plan[:level]), name


def printed(code: str, **environment: str) -> list[str]:
    """The words that a fresh interpreter prints which runs `code`."""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return run.stdout.split()


def test_a_worker_starts_without_what_only_its_supervisor_needs() -> None:
    loaded = "from sseproxy.process import start; start.load(); import sys"
    names = printed(f"{loaded}; print(*{{name.partition('.')[0] for name in sys.modules}})")
    assert "aiohttp" in names
    assert not {"yaml", "prometheus_client", "redis"} & set(names)


def test_a_worker_starts_without_the_systems_authorities_and_may_read_them(tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    code = """
from sseproxy.process import start
start.load()
from aiohttp import connector
from sseproxy.config.files import trusting
contexts = (connector._SSL_CONTEXT_VERIFIED, connector._SSL_CONTEXT_UNVERIFIED, trusting(None))
print(*(context.cert_store_stats()["x509_ca"] for context in contexts))
"""
    assert printed(code, SSL_CERT_FILE=str(tmp_path / "ca.pem"), SSL_CERT_DIR=str(tmp_path)) == ["0", "0", "1"]


def modules_of(*arguments: str) -> set[str]:
    """What is imported by a command, from its start to its end."""
    script = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); import sseproxy.__main__"
    found = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    return set(found.stdout.splitlines()[-1].split())


SERVING = {"aiohttp", "asyncio", "uvloop", "prometheus_client", "sseproxy.demo", "sseproxy.process"}
MODEL = {"msgspec", "yaml", "yarl", "sseproxy.config.model"}


@pytest.mark.parametrize(
    ("arguments", "without", "most"),
    [
        (["doctor", "--help"], SERVING | MODEL | {"http.client", "ssl", "rich", "sseproxy.doctor"}, 90),
        (["--help"], SERVING | MODEL | {"http.client", "ssl"}, 90),
        (["demo", "--help"], SERVING | MODEL | {"http.client", "ssl"}, 90),
        (["healthcheck", "--admin", "127.0.0.1:1"], SERVING | MODEL | {"http.client", "ssl", "email"}, 120),
        (["check-config", str(ROOT.parent / "configs" / "minimal.yaml")], SERVING | {"ssl", "yarl"}, 200),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_imports_only_what_it_needs(arguments: list[str], without: set[str], most: int) -> None:
    """Imports are nearly all that a short command costs. Counted, because a time would be the machine's."""
    found = modules_of(*arguments)
    assert "sseproxy.cli" in found
    assert not found & without
    assert len(found) <= most


def test_nothing_is_imported_that_an_installation_does_not_have() -> None:
    """Tests run where everything is installed; a user has the dependencies alone, without their dependencies' names."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    # An extra is imported only where it is used.
    extra = {re.split(r"[<>=\[]", requirement)[0] for requirement in project["optional-dependencies"]["redis"]}
    declared = {re.split(r"[<>=\[]", requirement)[0].lower() for requirement in project["dependencies"]}
    modules = {"prometheus-client": "prometheus_client", "pyyaml": "yaml"}
    installed = {modules.get(name, name) for name in declared}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            found = {name.partition(".")[0] for name in names}
            assert found <= installed | extra | sys.stdlib_module_names, path


@pytest.mark.parametrize("path", [path for path in MODULES if dotted(path).startswith("wire")], ids=dotted)
def test_wire_does_no_io(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name.partition(".")[0] for name in names} & {"aiohttp", "asyncio", "socket", "os", "pathlib", "logging"}
    assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(tree))


PURE = ("script", "observed", "arrival", "verdict", "remedies")


@pytest.mark.parametrize("name", PURE)
def test_what_the_doctor_concludes_needs_no_io(name: str) -> None:
    found = set(imported(ROOT / "doctor" / f"{name}.py"))
    assert found <= {f"doctor.{other}" for other in PURE}
    test_wire_does_no_io(ROOT / "doctor" / f"{name}.py")


def test_the_architecture_names_every_module() -> None:
    assert sseproxy.__doc__ is not None
    words = set(sseproxy.__doc__.split())
    assert {dotted(path).rpartition(".")[2] for path in MODULES} - {"__main__"} <= words


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_group_is_possessive(path: Path) -> None:
    """Python before 3.11.5, Debian 12's among them, matches such groups wrongly (CPython, gh-106052)."""
    # Without sets of characters, in which all of these are characters.
    lines = [re.sub(r"\[[^]]*\]", "x", line) for line in path.read_text().splitlines()]
    assert [line for line in lines if re.search(r"\)[*+?]\+|\(\?>", line)] == []


# A worker that tells, when it is told to, what it has imported by itself.
IMPORTING = workers_run_first("""
shared = set(sys.modules)
def tell(*_):
    os.write(2, f"by itself: {sorted(set(sys.modules) - shared)}".encode())
signal.signal(signal.SIGUSR1, tell)
""")


async def test_a_worker_imports_nothing_by_itself(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """So workers start at once, share the memory of all code, and never run code that was installed since."""
    options = {"probe": "{token: a-token-of-16-bytes}", "access_log": "{format: text}"}
    async with ConfigFile(tmp_path, upstream, **options).serve(**python_runs_first(IMPORTING, tmp_path)) as served:
        await asked(served, upstream)
        os.kill(served.workers[0], signal.SIGUSR1)
        await until_true(lambda: "by itself: [" in served.stderr)
        assert "by itself: []" in served.stderr
