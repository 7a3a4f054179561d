"""Options, and sections of a configuration, which have options: how they are read, written, and described to editors.

The type of an option is annotated with an `Option`, which reads its value from a document. All problems of a document
are collected; none ends the reading. A worker imports this module, so nothing here may import PyYAML.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import NoneType
from typing import Any, ClassVar, Final, Literal, NamedTuple, cast, dataclass_transform, get_args

import msgspec

Loc = tuple[str | int, ...]
"""The location of a part of a configuration: keys and indices, from the top."""

Schema = dict[str, Any]
"""A JSON Schema."""

INVALID: Final = object()
"""Stands for a value with a problem, which is reported already."""

TEXT: Final[Schema] = {"type": "string"}
# Any value may also be text with ${VAR}.
_VARIABLE: Final[Schema] = {"type": "string", "pattern": r"\$\{"}
_NOT_IN_WORD: Final = r"[^A-Za-z0-9_-]"
_NO_SPACE: Final = "; is a space missing after a colon?"

Shown = Literal["value", "kind", "nothing"]
"""What a message may show of a value that is not valid."""


class Expected(ValueError):
    """A value is not what was expected. `shown` is what the message shows of it, and `hint` is added at the end."""

    def __init__(self, what: str, shown: Shown = "value", hint: str = "") -> None:
        super().__init__(f"expected {what}")
        self.shown = shown
        self.hint = hint


class Problem(NamedTuple):
    """What is wrong with the value at `loc`. `missing`: there is none. So the problem is that of the section."""

    loc: Loc
    message: str
    shown: Shown = "nothing"
    hint: str = ""
    missing: bool = False


class Reading:
    """What was found while a document was read: problems, and the sections that are valid, by their locations."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.sections: dict[Loc, Section] = {}


class Secret:
    """A key, token or URL with a password. Its `repr` does not contain it, so it does not get into a log by mistake."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret('**********')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class Option(ABC):
    """A kind of option: how its value is read from a document, and how it is written and described."""

    @abstractmethod
    def read(self, value: object, loc: Loc, reading: Reading) -> object:
        """Reads the `value` at `loc`. If it is not valid, adds a problem and returns `INVALID`.

        If it is `INVALID` already, adds none.
        """

    @abstractmethod
    def write(self, value: object) -> object:
        """The value as it is written in a document. Secrets are masked."""

    @abstractmethod
    def schema(self, sections: dict[str, Schema]) -> Schema:
        """Its JSON Schema. The schemas of sections that it refers to are added to `sections`, by their names."""


def _attempt(read: Callable[[Any], object], value: object, loc: Loc, reading: Reading) -> Any:
    """What `read` returns. `INVALID` if it raises `Expected`, which is added as a problem."""
    if value is INVALID:
        return INVALID
    try:
        return read(value)
    except Expected as error:
        reading.problems.append(Problem(loc, str(error), error.shown, error.hint))
        return INVALID


class Value(Option):
    """An option with a single value. `read` returns it, or raises `Expected`. `write` is the inverse of `read`.

    `schemas` describe the value to editors. One that needs an import is a function, which is called only when the
    schema is printed.
    """

    def __init__(
        self,
        read: Callable[[Any], object],
        *schemas: Schema | Callable[[], Schema],
        write: Callable[[Any], object] | None = None,
    ) -> None:
        self._read = read
        self._schemas = list(schemas) if TEXT in schemas else [*schemas, _VARIABLE]
        self._write = write

    def read(self, value: object, loc: Loc, reading: Reading) -> object:
        return _attempt(self._read, value, loc, reading)

    def write(self, value: object) -> object:
        if self._write is not None:
            return self._write(value)
        return "**********" if isinstance(value, Secret) else value

    def schema(self, sections: dict[str, Schema]) -> Schema:
        return _any_of([known() if callable(known) else known for known in self._schemas])


def _any_of(schemas: list[Schema]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


class OrNone(Option):
    """An option that is another one, or `None`, which a document writes as null."""

    def __init__(self, option: Option) -> None:
        self.option = option

    def read(self, value: object, loc: Loc, reading: Reading) -> object:
        return None if value is None else self.option.read(value, loc, reading)

    def write(self, value: object) -> object:
        return None if value is None else self.option.write(value)

    def schema(self, sections: dict[str, Schema]) -> Schema:
        return {"anyOf": [self.option.schema(sections), {"type": "null"}]}


def _only_a_list(value: object) -> tuple[object, ...]:
    if isinstance(value, tuple):
        return value
    raise Expected("a list (each entry begins with a dash and a space)", "kind")


def text_or_list(value: object) -> tuple[object, ...]:
    """The items of a list whose only item may be written without a list."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, tuple):
        return value
    raise Expected("text or a list")


class ListOf(Option):
    """An option that is a list of at least `least` items.

    `items` returns the items of a value, or raises `Expected`. With it, the only item may be written without a list.
    """

    def __init__(
        self, item: Option, items: Callable[[object], tuple[object, ...]] = _only_a_list, *, least: int = 0
    ) -> None:
        self.item = item
        self._items = items
        self._least = least

    def read(self, value: object, loc: Loc, reading: Reading) -> object:
        items = _attempt(self._items, value, loc, reading)
        if items is INVALID:
            return INVALID
        if len(items) < self._least:
            reading.problems.append(Problem(loc, "expected at least one entry"))
            return INVALID
        found = tuple(self.item.read(item, (*loc, index), reading) for index, item in enumerate(items))
        return INVALID if any(item is INVALID for item in found) else found

    def write(self, value: object) -> object:
        return [self.item.write(item) for item in cast("Sequence[object]", value)]

    def schema(self, sections: dict[str, Schema]) -> Schema:
        item = self.item.schema(sections)
        several: Schema = {"type": "array", "items": item} | ({"minItems": self._least} if self._least else {})
        return several if self._items is _only_a_list else _any_of([item, several])


class SectionOf(Option):
    """An option that is a section. If `text` names one of its options, a text stands for that option alone."""

    def __init__(self, kind: type[Section], *, text: str = "") -> None:
        self.kind = kind
        self._text = text

    def _options(self, value: object) -> Mapping[str, object]:
        if self._text and isinstance(value, str):
            return {self._text: value}
        if isinstance(value, dict):
            return value
        options = options_of(self.kind)
        required = [name for name, option in options.items() if option.required]
        examples = ", ".join(f"{name}: ..." for name in (required if len(required) > 1 else [*options][:2]))
        hint = _NO_SPACE if isinstance(value, str) and ":" in value else ""
        raise Expected(f"options with values, such as {{{examples}}}", "kind", hint)

    def read(self, value: object, loc: Loc, reading: Reading) -> object:
        found = _attempt(self._options, value, loc, reading)
        return INVALID if found is INVALID else _read_section(self.kind, found, loc, reading)

    def write(self, value: object) -> object:
        options = written(cast("Section", value))
        others = {name: option.default for name, option in options_of(self.kind).items() if name != self._text}
        if self._text and all(getattr(value, name) == default for name, default in others.items()):
            return options[self._text]
        return options

    def schema(self, sections: dict[str, Schema]) -> Schema:
        name = self.kind.__name__
        if name not in sections:
            sections[name] = schema_of(self.kind, sections)
        section = {"$ref": f"#/$defs/{name}"}
        return {"anyOf": [TEXT, section]} if self._text else section


def _true_or_false(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise Expected("true or false", "kind")


_BOOLEAN: Final = Value(_true_or_false, {"type": "boolean"})


# For mypy only. At run time, `kw_only` is not inherited: a section needs it if a required option follows a default.
@dataclass_transform(frozen_default=True, kw_only_default=True)
class Section(msgspec.Struct, frozen=True):
    """Options that belong together. They cannot be changed, and are not checked if they are given in code."""

    described: ClassVar[Schema] = {}
    """What its JSON Schema has beside its options."""
    no_options: ClassVar[frozenset[str]] = frozenset()
    """The fields that are not in a document."""

    def check(self) -> None:
        """Raises `Expected` if options that are valid by themselves contradict each other."""


class Declared(NamedTuple):
    """An option of a section. A `required` one has no `default`."""

    option: Option
    required: bool
    default: object


@functools.cache
def options_of(kind: type[Section]) -> dict[str, Declared]:
    """The options of a section, by their names."""
    return {
        field.name: Declared(_option_of(field.type), field.required, field.default)
        for field in msgspec.structs.fields(kind)
        if field.name not in kind.no_options
    }


def _option_of(annotation: Any) -> Option:
    for known in getattr(annotation, "__metadata__", ()):
        if isinstance(known, Option):
            return known
    if annotation is bool:
        return _BOOLEAN
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return SectionOf(annotation)
    match get_args(annotation):
        case (other, none) if none is NoneType:
            return OrNone(_option_of(other))
    raise TypeError(f"{annotation} does not say how the option is read")


def _read_section(kind: type[Section], data: Mapping[str, object], loc: Loc, reading: Reading) -> object:
    known = options_of(kind)
    before, values = len(reading.problems), {}
    for name, option in known.items():
        if option.required and name not in data:
            reading.problems.append(Problem((*loc, name), "required key is missing", missing=True))
    for key, value in data.items():
        if key in known:
            values[key] = known[key].option.read(value, (*loc, key), reading)
        else:
            reading.problems.append(Problem((*loc, key), _unknown(key, sorted(known))))
    if len(reading.problems) > before or any(value is INVALID for value in values.values()):
        return INVALID
    section = kind(**values)
    if _attempt(kind.check, section, loc, reading) is INVALID:
        return INVALID
    reading.sections[loc] = section
    return section


def _unknown(key: str, known: Sequence[str]) -> str:
    # A valid configuration does not need it.
    from difflib import get_close_matches

    close = get_close_matches(key, known, n=1)
    hint = _NO_SPACE if ":" in key else f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown key; expected one of {', '.join(known)}{hint}"


def written(section: Section) -> dict[str, object]:
    """All options of `section` as they are written in a document. Secrets are masked."""
    return {name: each.option.write(getattr(section, name)) for name, each in options_of(type(section)).items()}


def schema_of(kind: type[Section], sections: dict[str, Schema]) -> Schema:
    """The JSON Schema of a section. Those of the sections in it are added to `sections`."""
    properties: dict[str, Schema] = {}
    texts, options = _docstrings(kind), options_of(kind)
    for name, each in options.items():
        text = {"description": texts[name]} if name in texts else {}
        default = {} if each.required else {"default": each.option.write(each.default)}
        properties[name] = each.option.schema(sections) | text | default
    return {
        "type": "object",
        "description": inspect.cleandoc(kind.__doc__ or ""),
        "properties": properties,
        "required": [name for name, each in options.items() if each.required],
        "additionalProperties": False,
        **kind.described,
    }


def _docstrings(kind: type[Section]) -> dict[str, str]:
    """The docstrings of options, by their names. They are below the options in the source."""
    tree = ast.parse(inspect.getsource(kind)).body[0]
    found: dict[str, str] = {}
    for option, below in pairwise(tree.body if isinstance(tree, ast.ClassDef) else ()):
        match option, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found


# How messages show locations and values.


def dotted(loc: Loc) -> str:
    """A location as text: `path.to[0].key`.

    Only the first word of a key is shown, and nothing below an `api_key` or a `token`, because both may contain a
    secret: the YAML `{api_key:secret}` has one key that includes it.
    """
    path = ""
    for key in loc:
        if isinstance(key, int):
            path += f"[{key}]"
            continue
        word = re.split(_NOT_IN_WORD, key)[0][:64]
        path += f".{word}" if word == key else f".{word}\N{HORIZONTAL ELLIPSIS}"
        if key in ("api_key", "token"):
            break
    return path.removeprefix(".")


def quoted(text: str) -> str:
    return repr(shortened(text))


def shortened(text: str) -> str:
    return text if len(text) <= 64 else text[:63] + "\N{HORIZONTAL ELLIPSIS}"
