"""Reads a configuration from YAML and from command-line flags, writes it as YAML, and makes the JSON Schema.

All problems of a document are reported together: those of the YAML (`document`), those of single options (the model),
and conflicts between options.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, TypeVar, cast

import yaml
from msgspec.structs import replace

from ..errors import ConfigError
from .document import Document, position
from .files import read_configuration
from .model import (
    Admin,
    Client,
    Config,
    Limits,
    Match,
    Probe,
    Route,
    Target,
    Upstream,
    conflicts,
    conflicts_of_clients,
)
from .options import (
    INVALID,
    Expected,
    Loc,
    Problem,
    Reading,
    Schema,
    Section,
    SectionOf,
    options_of,
    quoted,
    schema_of,
    written,
)
from .values import format_size, read_address, read_url, read_workers

T = TypeVar("T")


def schema() -> dict[str, object]:
    """The JSON Schema of a configuration file, for editors."""
    sections: dict[str, Schema] = {}
    whole = schema_of(Config, sections)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "sseproxy", **whole, "$defs": sections}


def resolved(config: Config) -> str:
    """`config` as the text of a file that has every option. Secrets are masked."""
    text: str = yaml.safe_dump(written(config), sort_keys=False, width=120, allow_unicode=True)
    return text


def load(path: str | os.PathLike[str], env: Mapping[str, str] = os.environ) -> Config:
    """Read a configuration file, or a pipe. Raises `ConfigError`, also if it cannot be read or is not UTF-8."""
    source = os.fspath(path)
    problem = ""
    try:
        data = read_configuration(source)
        text = data.decode("utf-8-sig")
    except OSError as error:
        problem = f"{source}: cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        line, column = position(data[: error.start].decode("utf-8-sig"))
        problem = f"{source}:{line}:{column}: expected UTF-8 text"
    if problem:
        raise ConfigError([problem])
    return parse(text, source, env)


def parse(text: str, source: str, env: Mapping[str, str] = os.environ) -> Config:
    """Read the text of a configuration file, called `source` in messages. Raises `ConfigError` with all its problems.

    `${VAR}`, `${VAR:-default}` and `$$` are expanded in values, after the YAML is parsed.
    """
    document = Document(text, env)
    config = _validate(document)
    if config is None or document.problems:
        raise ConfigError(
            [
                f"{source}:{line}:{column}: {problem}"
                for (line, column), problem in sorted(document.problems, key=itemgetter(0))
            ]
        )
    marks = [document.parts["routes", index, "match"].place for index in range(len(config.routes))]
    places = tuple(f"{mark.line + 1}:{mark.column + 1}" for mark in marks)
    return replace(config, variables=frozenset(document.variables), places=places)


def single(
    url: str, *, listen: str | None = None, admin: str | None = None, workers: str | int | None = None
) -> Config:
    """The configuration of a proxy for one upstream, without a file. Raises `ConfigError` whose problems name flags.

    Requests below `/v1` go to the path of `url`; if it has none, all requests do, with their path unchanged.
    """
    problems: list[str] = []
    target = _flag(problems, "--upstream", read_url, url)
    changes = _changes(problems, Admin(), listen, admin, workers)
    if problems or target is None:
        raise ConfigError(problems)
    # `read_url` returns it without a slash at the end, so a slash after the host begins a path.
    path = "/v1" if "/" in target.partition("://")[2] else "/"
    return Config(
        upstreams=(Upstream(name="upstream", url=target),),
        routes=(Route(name="api", match=Match(path=path), upstream=(Target(name="upstream"),)),),
        **changes,
    )


def override(
    config: Config, *, listen: str | None = None, admin: str | None = None, workers: str | int | None = None
) -> Config:
    """`config` with the values of the command-line flags that are given. Raises `ConfigError` that names flags."""
    problems: list[str] = []
    changes = _changes(problems, config.admin, listen, admin, workers)
    if problems:
        raise ConfigError(problems)
    return replace(config, **changes)


def _changes(
    problems: list[str],
    administration: Admin,
    listen: str | None,
    admin: str | None,
    workers: str | int | None,
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if listen is not None:
        address = _flag(problems, "--listen", read_address, listen)
        changes["listen"] = (address,)
    if admin is not None and (place := _flag(problems, "--admin", read_address, admin)):
        changes["admin"] = replace(administration, listen=place)
    if workers is not None:
        number = isinstance(workers, str) and re.fullmatch("[0-9]{1,9}", workers)
        changes["workers"] = _flag(problems, "--workers", read_workers, int(workers) if number else workers)
    return changes


def _flag(problems: list[str], flag: str, read: Callable[[object], T], value: object) -> T | None:
    try:
        return read(value)
    except Expected as error:
        got = f", got {quoted(str(value))}" if error.shown == "value" else ""
        problems.append(f"{flag}: {error}{got}")
        return None


def _report(document: Document, problem: Problem) -> None:
    """Adds a problem of the model to `document`."""
    if problem.missing:
        *above, name = problem.loc
        place = _place(document, tuple(above))
        document.report((*place, name), problem.message, document.parts[place].node.start_mark)
        return
    place = _place(document, problem.loc)
    part = document.parts[place]
    got = {"value": part.written, "kind": part.kind}.get(problem.shown)
    document.report(place, f"{problem.message}{f', got {got()}' if got else ''}{problem.hint}")


def _place(document: Document, loc: Loc) -> Loc:
    """The location in `document` of what the model has at `loc`: the only item of a list may stand without a list."""
    place: Loc = ()
    for key in loc:
        if (*place, key) in document.parts:
            place = (*place, key)
    return place


def _validate(document: Document) -> Config | None:
    """The configuration in `document`. `None` if it is not valid; the problems are added to `document`."""
    reading = Reading()
    config = SectionOf(Config).read(document.data, (), reading)
    if isinstance(document.data, dict):
        _report_conflicts(document, document.data, reading.sections)
    for problem in reading.problems:
        _report(document, problem)
    return config if isinstance(config, Config) else None


def _report_conflicts(document: Document, data: Mapping[str, object], valid: Mapping[Loc, Section]) -> None:
    """Adds conflicts between options to `document`. `valid` has the sections that are valid by themselves."""
    upstreams, routes = _entries(data, "upstreams"), _entries(data, "routes")
    numbers = range(len(routes))
    between = conflicts(
        [_text(upstream.get("name")) for upstream in upstreams],
        [_text(route.get("name")) for route in routes],
        [cast("Match | None", valid.get(("routes", number, "match"))) for number in numbers],
        [_names(route.get("upstream")) for route in routes],
        _valid(Config, "max_body", data),
        _valid(Limits, "held", data.get("limits", {})),
        _valid(Probe, "path", data.get("probe")),
        shown=lambda loc, value: _shown(document, loc, value),
    )
    of_clients = conflicts_of_clients(
        [cast("Client | None", valid.get(("clients", number))) for number in range(len(_entries(data, "clients")))],
        [cast("Route | None", valid.get(("routes", number))) for number in numbers],
    )
    for loc, message in (*between, *of_clients):
        # The upstream of a route need not be a list.
        loc = loc if loc in document.parts or loc[:-1] not in document.parts or len(loc) < 4 else loc[:-1]
        # A default has no position. If `held` is one, the conflict is reported at `max_body`.
        instead = ("probe",) if loc[0] == "probe" else ("max_body",)
        document.report(loc, message, document.parts[loc if loc in document.parts else instead].place)


def _entries(data: Mapping[str, object], section: str) -> list[dict[str, object]]:
    entries = data.get(section)
    if not isinstance(entries, tuple):
        return []
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def _names(value: object) -> list[str | None]:
    """The names of the upstreams of a route."""
    targets = value if isinstance(value, tuple) else (value,)
    return [_text(target.get("name") if isinstance(target, dict) else target) for target in targets]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _shown(document: Document, loc: Loc, value: str | int) -> str:
    # A target of a route is written as a name, or as options with a name, in a list or by itself.
    for known in ((*loc, "name"), loc, loc[:-1]):
        if known in document.parts and isinstance(document.parts[known].node, yaml.ScalarNode):
            return str(document.parts[known].node.value)
    return f"its default of {format_size(value)}" if isinstance(value, int) else value


def _valid(kind: type[Section], name: str, options: object) -> Any:
    """The value of one option of `kind`, or its default. `None` if it is not valid, or if `options` is no mapping."""
    if not isinstance(options, dict):
        return None
    declared = options_of(kind)[name]
    if name not in options:
        return declared.default
    value = declared.option.read(options[name], (), Reading())
    return None if value is INVALID else value
