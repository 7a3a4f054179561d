"""Reads a configuration from YAML and from command-line flags, writes it as YAML, and makes the JSON Schema.

All problems of a document are reported together: those of the YAML (`document`), those of single options (the model),
and conflicts between options.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from operator import itemgetter
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError
from yarl import URL

from ..errors import ConfigError
from .document import INVALID, Document, position
from .files import read_configuration
from .model import (
    Admin,
    Client,
    Config,
    Limits,
    Match,
    Places,
    Probe,
    Route,
    Target,
    Upstream,
    conflicts,
    conflicts_of_clients,
)
from .values import DOCUMENT, Loc, PathPrefix, Size, format_size, quoted, read_address, read_url, read_workers

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


def schema() -> dict[str, object]:
    """The JSON Schema of a configuration file, for editors."""
    described = Config.model_json_schema()
    properties = {name: part["properties"] for name, part in [("Config", described), *described["$defs"].items()]}
    for name, option, text in _docstrings():
        # Sorted as pydantic sorts them.
        properties[name][option] = dict(sorted({**properties[name][option], "description": text}.items()))
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "sseproxy",
        **{key: value for key, value in described.items() if key != "title"},
    }


def _docstrings() -> Iterator[tuple[str, str, str]]:
    """For each option of the model: the name of its class, its name, and its docstring.

    pydantic could read the docstrings, too. But it would do so at every import of the model, and take a quarter of the
    time of that import.
    """
    for part in ast.parse(inspect.getsource(sys.modules[Config.__module__])).body:
        for option, below in pairwise(part.body if isinstance(part, ast.ClassDef) else ()):
            match part, option, below:
                case (
                    ast.ClassDef(name=name),
                    ast.AnnAssign(target=ast.Name(id=key)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    yield name, key, inspect.cleandoc(text)


def resolved(config: Config) -> str:
    """`config` as the text of a file that has every option. Secrets are masked."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)
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
    config._variables = frozenset(document.variables)
    marks = [document.parts["routes", index, "match"].place for index in range(len(config.routes))]
    config._places = Places([f"{mark.line + 1}:{mark.column + 1}" for mark in marks])
    return config


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
    path = "/" if URL(target).raw_path == "/" else "/v1"
    return Config(
        upstreams=(Upstream(name="upstream", url=target),),
        routes=(Route(name="api", match=Match(path=path), upstream=(Target(name="upstream"),)),),
    ).model_copy(update=changes)


def override(
    config: Config, *, listen: str | None = None, admin: str | None = None, workers: str | int | None = None
) -> Config:
    """`config` with the values of the command-line flags that are given. Raises `ConfigError` that names flags."""
    problems: list[str] = []
    changes = _changes(problems, config.admin, listen, admin, workers)
    if problems:
        raise ConfigError(problems)
    return config.model_copy(update=changes)


def _changes(
    problems: list[str],
    administration: Admin,
    listen: str | None,
    admin: str | None,
    workers: str | int | None,
) -> dict[str, object]:
    changes: dict[str, object] = {}
    if listen is not None:
        address = _flag(problems, "--listen", read_address, listen)
        changes["listen"] = (address,)
    if admin is not None and (place := _flag(problems, "--admin", read_address, admin)):
        changes["admin"] = administration.model_copy(update={"listen": place})
    if workers is not None:
        number = isinstance(workers, str) and re.fullmatch("[0-9]{1,9}", workers)
        changes["workers"] = _flag(problems, "--workers", read_workers, int(workers) if number else workers)
    return changes


def _flag(problems: list[str], flag: str, read: Callable[[object], T], value: object) -> T | None:
    try:
        return read(value)
    except PydanticCustomError as error:
        got = f", got {quoted(str(value))}" if error.type == "expected" else ""
        problems.append(f"{flag}: {error.message()}{got}")
        return None


_TYPE_PROBLEMS = {
    "tuple_type": "expected a list (each entry begins with a dash and a space)",
    "string_type": "expected text",
    "bool_type": "expected true or false",
}
_NO_SPACE = "; is a space missing after a colon?"


def _report_invalid(document: Document, kind: str, loc: Loc, message: str) -> None:
    """Adds the problem that pydantic calls `kind` to `document`.

    Nothing is added for a conflict, which `_validate` has already reported, or for a value whose problem is known.
    """
    if kind == "conflict":
        return
    place = _place(document, loc)
    if kind == "missing":
        document.report((*place, loc[-1]), "required key is missing", document.parts[place].node.start_mark)
        return
    if kind == "extra_forbidden":
        known = sorted(_model_at(loc[:-1]).model_fields)
        key = str(loc[-1])
        close = difflib.get_close_matches(key, known, n=1)
        hint = _NO_SPACE if ":" in key else f"; did you mean '{close[0]}'?" if close else ""
        document.report(place, f"unknown key; expected one of {', '.join(known)}{hint}")
        return

    part = document.parts[place]
    if part.value is INVALID:
        return
    if kind == "too_short":
        if part.value == ():  # and not for the items that are not valid
            document.report(place, "expected at least one entry")
    elif kind == "expected_secret":
        document.report(place, message)
    elif kind == "model_type":
        hint = _NO_SPACE if isinstance(part.value, str) and ":" in part.node.value else ""
        document.report(place, f"{_options_of(_model_at(loc))}, got {part.kind()}{hint}")
    elif kind in _TYPE_PROBLEMS:
        document.report(place, f"{_TYPE_PROBLEMS[kind]}, got {part.kind()}")
    else:
        document.report(place, f"{message}, got {part.written()}")


def _options_of(model: type[BaseModel]) -> str:
    """What was expected where `model` has its options, with examples: those that are required, or else the first."""
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    shown = required if len(required) > 1 else [*model.model_fields][:2]
    return f"expected options with values, such as {{{', '.join(f'{name}: ...' for name in shown)}}}"


def _place(document: Document, loc: Loc) -> Loc:
    """Where in `document` is what the model has at `loc`. The only item of a list may be written without a list."""
    place: Loc = ()
    for key in loc:
        if (*place, key) in document.parts:
            place = (*place, key)
    return place


def _validate(document: Document) -> Config | None:
    """The configuration in `document`. `None` if it is not valid; the problems are added to `document`."""
    data = document.data
    if not isinstance(data, dict):
        if data is not INVALID:
            _report_invalid(document, "model_type", (), "")
        return None
    upstreams, routes = _entries(data, "upstreams"), _entries(data, "routes")
    between = conflicts(
        [_text(upstream.get("name")) for upstream in upstreams],
        [_text(route.get("name")) for route in routes],
        [_valid(Match, route.get("match")) for route in routes],
        [_names(route.get("upstream")) for route in routes],
        _valid_size(data, Config, "max_body"),
        _valid_size(data.get("limits", {}), Limits, "held"),
        _valid_path_of_probe(data.get("probe")),
        shown=lambda loc, value: _shown(document, loc, value),
    )
    of_clients = conflicts_of_clients(
        [_valid(Client, client) for client in _entries(data, "clients")], [_valid(Route, route) for route in routes]
    )
    for loc, message in (*between, *of_clients):
        # The upstream of a route need not be a list.
        loc = loc if loc in document.parts or loc[:-1] not in document.parts or len(loc) < 4 else loc[:-1]
        # A default has no position. If `held` is one, the conflict is reported at `max_body`.
        instead = ("probe",) if loc[0] == "probe" else ("max_body",)
        document.report(loc, message, document.parts[loc if loc in document.parts else instead].place)
    try:
        return Config.model_validate(data, context=DOCUMENT)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            _report_invalid(document, detail["type"], detail["loc"], detail["msg"])
    return None


def _entries(data: Mapping[str, object], section: str) -> list[dict[str, object]]:
    entries = data.get(section)
    if not isinstance(entries, tuple):
        return []
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def _names(value: object) -> list[str | None]:
    """The names of the upstreams of a route."""
    targets = value if isinstance(value, tuple) else (value,)
    return [_text(target.get("name") if isinstance(target, dict) else target) for target in targets]


def _model_at(loc: Loc) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for key in loc:
        if isinstance(key, str):
            annotation: Any = model.model_fields[key].annotation
            # A list of models, or a model or nothing, or both.
            while parts := get_args(annotation):
                annotation = parts[0]
            model = annotation
    return model


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _shown(document: Document, loc: Loc, value: str | int) -> str:
    # A target of a route is written as a name, or as options with a name, in a list or by itself.
    for known in ((*loc, "name"), loc, loc[:-1]):
        if known in document.parts and isinstance(document.parts[known].node, yaml.ScalarNode):
            return str(document.parts[known].node.value)
    return f"its default of {format_size(value)}" if isinstance(value, int) else value


def _valid_size(options: object, model: type[BaseModel], name: str) -> int | None:
    """The size `name` in `options`, or its default in `model`. `None` if it is not valid."""
    if not isinstance(options, dict):
        return None
    size = options.get(name, model.model_fields[name].default)
    try:
        return TypeAdapter(Size).validate_python(size, context=DOCUMENT if name in options else None)
    except ValidationError:
        return None


def _valid_path_of_probe(options: object) -> str | None:
    """The path of the probe, or its default. `None` if there is no probe, or the path is not valid."""
    path = options.get("path", Probe.model_fields["path"].default) if isinstance(options, dict) else None
    try:
        return TypeAdapter(PathPrefix).validate_python(path, context=DOCUMENT)
    except ValidationError:
        return None


def _valid(model: type[M], value: object) -> M | None:
    try:
        return model.model_validate(value, context=DOCUMENT)
    except ValidationError:
        return None
