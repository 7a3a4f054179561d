"""The table of behaviours is whole, and the tests that it names exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = [
    (int(row[0]), row[2])
    for line in (HERE / "behaviours.md").read_text().splitlines()
    if line.startswith("| ") and (row := [cell.strip() for cell in line.strip("|").split("|")])[0].isdigit()
]


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((HERE / f"test_{file}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_number_is_there_once() -> None:
    assert [number for number, _ in ROWS] == [*range(1, 275)]


@pytest.mark.parametrize(("number", "shown_by"), ROWS)
def test_what_shows_it_exists(number: int, shown_by: str) -> None:
    named = re.findall(r"(\w+)::(\w+)", shown_by)
    for file, name in named:
        assert f"test_{name}" in functions_of(file), (number, name)
    assert named or shown_by.endswith("."), "neither a test nor a reason"
