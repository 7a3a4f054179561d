"""A YAML document as plain data, with the position of each part.

All problems are collected, each with its position. A message shows a value as it is written in the document, before
`${VAR}` was expanded. So no message contains the value of an environment variable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from .options import INVALID, Loc, dotted, quoted, shortened

_SHARED = "!shared"
_STR, _BOOL, _NULL, _SEQ, _MAP = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "bool", "null", "seq", "map"))
# A configuration has five levels. Much deeper documents could exhaust the stack of the parser.
_MAX_DEPTH = 32

_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|\{(?:(?P<name>[A-Za-z_]\w*)(?::-(?P<default>(?:(?!\$\{)[^}])*))?\})?)", re.A
)


class _Loader(yaml.SafeLoader):
    """Composes nodes. Aliases, and nodes with an anchor, get the tag `_SHARED`; so no alias is ever expanded."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        shared = event.anchor is not None
        event.anchor = None
        if self.check_event(yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            return yaml.ScalarNode(_SHARED, "", event.start_mark, event.end_mark)
        if self.depth == _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if shared and node is not None:
            node.tag = _SHARED
        return node


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a document. `place` is the position of its key, or of itself if it is an item of a list."""

    place: yaml.Mark
    node: yaml.Node
    value: object

    def kind(self) -> str:
        """The kind of the value, for messages. The value itself may hold a secret, so only a boolean is shown."""
        if isinstance(self.node, yaml.MappingNode):
            return "options with values"
        if isinstance(self.node, yaml.SequenceNode):
            return "a list"
        match self.value:
            case None:
                return "nothing"
            case bool():
                return shortened(self.node.value)
            case int() | float():
                return "a number"
        return "text"

    def written(self) -> str:
        """The value as it is written in the document, shortened, for messages."""
        match self.value:
            case str():
                return quoted(self.node.value)
            case bool():
                return self.kind()
            case int() | float():
                return f"{self.kind()} ({shortened(self.node.value)})"
        return self.kind()


class Document:
    """A YAML document: its `data` (`INVALID` if it is not YAML), its `parts` by their locations, and its `problems`.

    A problem is ((line, column), text), counted from 1. The values of `${VAR}` come from `env`. `variables` has the
    names of the variables whose values were used.
    """

    def __init__(self, text: str, env: Mapping[str, str]) -> None:
        self.problems: list[tuple[tuple[int, int], str]] = []
        self._env = env
        self.parts: dict[Loc, Part] = {}
        self.variables: set[str] = set()
        self.data: object = INVALID
        try:
            self._loader = _Loader(text)
            self._read()
        except yaml.reader.ReaderError as error:
            self.problems.append((position(text[: error.position]), "remove this unprintable character"))
        except yaml.MarkedYAMLError as error:
            # A valid configuration does not need it.
            from .mistakes import explained

            self.problems.append(explained(text, error))

    def report(self, loc: Loc, message: str, mark: yaml.Mark | None = None) -> None:
        """Adds a problem of the part at `loc`. Its position is `mark`, or else the `place` of the part."""
        mark = mark or self.parts[loc].place
        path = dotted(loc)
        self.problems.append(((mark.line + 1, mark.column + 1), f"{path}: {message}" if path else message))

    def _read(self) -> None:
        root = self._loader.get_node() if self._loader.check_node() else None
        if self._loader.check_node():
            event = self._loader.peek_event()  # type: ignore[no-untyped-call]
            self.report((), "expected a single YAML document", event.start_mark)
        if root is None:
            start = yaml.Mark("", 0, 0, 0, None, 0)
            root = yaml.ScalarNode(_NULL, "", start, start)
        self.data = self._add((), root, root.start_mark)

    def _add(self, loc: Loc, node: yaml.Node, place: yaml.Mark) -> object:
        self.parts[loc] = Part(place, node, INVALID)
        value = self._value(loc, node)
        self.parts[loc] = Part(place, node, value)
        return value

    def _value(self, loc: Loc, node: yaml.Node) -> object:
        if node.tag == _SHARED:
            self.report(
                loc, "anchors and aliases are not supported; text that starts with & or * has to be put in quotes"
            )
        elif node.tag != self._implicit_tag(node):
            self.report(loc, "tags are not supported; text that starts with ! has to be put in quotes")
        elif isinstance(node, yaml.MappingNode):
            if not any(isinstance(key, yaml.MappingNode) for key, _ in node.value):
                return self._mapping(loc, node)
            self.report(loc, "text that starts with {{ has to be put in quotes")
        elif isinstance(node, yaml.SequenceNode):
            return tuple(self._add((*loc, index), item, item.start_mark) for index, item in enumerate(node.value))
        elif isinstance(node, yaml.ScalarNode):
            return self._scalar(loc, node)
        return INVALID

    def _implicit_tag(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.ScalarNode):
            return self._resolve(node.value) if node.style is None else _STR
        return _MAP if isinstance(node, yaml.MappingNode) else _SEQ

    def _resolve(self, plain: str) -> str:
        return str(self._loader.resolve(yaml.ScalarNode, plain, (True, False)))  # type: ignore[no-untyped-call]

    def _mapping(self, loc: Loc, node: yaml.MappingNode) -> dict[str, object]:
        mapping: dict[str, object] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                self.report(loc, "merge keys (<<) are not supported", key.start_mark)
            elif key.tag not in (_STR, _BOOL):  # YAML 1.1 reads a plain `on` as a boolean
                self.report(loc, "expected a key that is text", key.start_mark)
            elif key.value in mapping:
                first = self.parts[(*loc, key.value)].place.line + 1
                self.report((*loc, key.value), f"duplicate key; the first one is in line {first}", key.start_mark)
            else:
                mapping[key.value] = self._add((*loc, key.value), value, key.start_mark)
        return mapping

    def _scalar(self, loc: Loc, node: yaml.ScalarNode) -> object:
        text = self._expand(loc, node.value)
        if text is None:
            return INVALID
        if node.style is not None:
            return text
        plain = yaml.ScalarNode(self._resolve(text), text, node.start_mark, node.end_mark)
        try:
            match plain.tag.rpartition(":")[2]:
                case "null":
                    return None
                case "bool":
                    return self._loader.construct_yaml_bool(plain)
                case "int":
                    return self._loader.construct_yaml_int(plain)
                case "float":
                    return self._loader.construct_yaml_float(plain)
        except (ValueError, OverflowError):
            pass  # such as 0x_ or a number of thousands of digits
        return text

    def _expand(self, loc: Loc, text: str) -> str | None:
        """`text` with its variables replaced. `None` if one cannot be replaced; this is reported."""
        problems: list[str] = []

        def replacement(match: re.Match[str]) -> str:
            name, default = match["name"], match["default"]
            if match["dollar"]:
                return "$"
            if name is None:
                problems.append("expected ${NAME} or ${NAME:-default}; a literal ${ is written as $${")
                return ""
            value = self._env.get(name)
            if value is not None:
                self.variables.add(name)
            if default is not None:
                return value or default
            if value is None:
                problems.append(f"environment variable {name} is not set")
                return ""
            return value

        expanded = _VARIABLE.sub(replacement, text)
        for problem in problems:
            self.report(loc, problem)
        return None if problems else expanded


def position(before: str) -> tuple[int, int]:
    """Line and column, from 1, of the position after the text `before`."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")
