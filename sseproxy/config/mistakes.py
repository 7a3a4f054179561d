"""Text that is not YAML: where the mistake is, and what to do about it.

PyYAML says in a parser's words where it could not go on. The mistake is often in an earlier line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import yaml

_OPTION: Final = "write `option: value`, with a colon and a space"
# A part of PyYAML's message, and what to do. The first that fits is taken. `{}` is the character at the mistake.
_ADVICE: Final = (
    ("character '\\t'", "use spaces, not tabs"),
    ("scanning an alias", "put text that starts with * in quotes"),
    ("scanning an anchor", "put text that starts with & in quotes"),
    ("tag", "put text that starts with ! in quotes"),
    ("escape", "put text that contains \\ in single quotes"),
    ("scanning a quoted scalar", "a closing quote is missing"),
    ("scanning a simple key", _OPTION),
    ("scanning a block scalar", "put text that starts with > or | in quotes"),
    ("scanning a directive", "put text that starts with % in quotes"),
    ("cannot start any token", "put text that starts with {} in quotes"),
    ("parsing a block node", "put text that starts with {} in quotes"),
    ("parsing a flow node", "a value is missing before this, or text that starts with [ or {{ needs quotes"),
    ("sequence entries", "begin the list in a line of its own"),
)
# PyYAML notices these at the end of the text or in the next line. They are where they began.
_LATE: Final = ("while scanning a simple key", "while scanning a quoted scalar")

_Place = tuple[int, int]


def explained(text: str, error: yaml.MarkedYAMLError) -> tuple[_Place, str]:
    """The line and the column of the mistake, from 1, and what to do about it. PyYAML's words are at the end."""
    # PyYAML quotes the tag handle, which is text of the document and may be secret. So it is cut off.
    words = str(error.problem).partition(" handle ")[0] + (f", {error.context}" if error.context else "")
    # The end of a text that ends with a line break is in a line of its own.
    (line, column), advice = _found([*text.splitlines(), ""], error, words)
    return (line + 1, column + 1), f"{advice} (not valid YAML: {words})" if advice else f"not valid YAML: {words}"


def _found(lines: Sequence[str], error: yaml.MarkedYAMLError, words: str) -> tuple[_Place, str]:
    assert error.problem_mark is not None
    mark = error.problem_mark
    line = lines[mark.line]
    place, before = (mark.line, mark.column), line[: mark.column]
    since = error.context_mark or mark
    if "mapping values" in words or "<document start>" in words:
        return _misplaced(lines, place)
    if "<block end>" in words:
        return place, _after_a_block(before, line[mark.column :], words)
    if "expected ','" in words:
        if before.endswith("$"):
            return place, "put ${VAR} in quotes between brackets"
        missing = f"a comma or the closing {'}' if 'mapping' in words else ']'} is missing"
        if since.line < mark.line and _indent(line) <= _indent(lines[since.line]):
            return (since.line, since.column), missing
        return place, f"{missing}, or text with a special character needs quotes"
    advice = next((advice for part, advice in _ADVICE if part in words), "")
    if error.context in _LATE:
        place = since.line, since.column
    return place, advice.format(line[mark.column : mark.column + 1])


def _misplaced(lines: Sequence[str], place: _Place) -> tuple[_Place, str]:
    """The mistake when an option cannot be at `place`: in its line, or in the one above."""
    number, column = place
    if re.search(r":\s", lines[number][:column]):
        return place, "put text that contains a colon and a space, or ends with a colon, in quotes"
    earlier = [at for at in range(number) if lines[at].strip() and not lines[at].lstrip().startswith("#")]
    if not earlier:
        return place, _OPTION
    above = lines[earlier[-1]]
    if re.match(r"\s*-[^\s-]", above):
        return (earlier[-1], _indent(above)), "put a space after the dash"
    if re.search(r":(\s|$)", above):
        indent = _indent(lines[number])
        return (number, indent), "this line is indented too far" if indent else "nothing can follow the last bracket"
    return (earlier[-1], _indent(above)), _OPTION


def _after_a_block(before: str, rest: str, words: str) -> str:
    """What to do where a block should have ended. Its line has `before`, and then `rest`."""
    if "'-'" in words:
        return "indent this entry like the other entries of its list"
    if not before.strip(" -") and not rest.startswith((",", "]", "}")):
        return "indent this line like the lines that it belongs to"
    if before.endswith(("'", '"')) and before.count(before[-1]) % 2:
        return "a closing quote is missing in an earlier line"
    return "nothing can follow a closing quote or bracket: remove it, or put the whole value in quotes"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
