"""Options and sections: how they are read, written and described. The options themselves are in test_config."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.config.options import (
    INVALID,
    TEXT,
    Expected,
    ListOf,
    OrNone,
    Problem,
    Reading,
    Schema,
    Secret,
    Section,
    SectionOf,
    Value,
    options_of,
    schema_of,
    text_or_list,
    written,
)


def _even(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value % 2 == 0:
        return value // 2
    raise Expected("an even number")


EVEN = Value(_even, {"type": "integer"}, write=lambda half: 2 * half)


class Inner(Section):
    """What is inside."""

    half: Annotated[int, EVEN]
    """Half of what is written."""
    on: bool = False


class Outer(Section):
    described: ClassVar[Schema] = {"minProperties": 1}
    no_options: ClassVar = frozenset({"told"})

    inner: Inner = Inner(half=1)
    other: Inner | None = None
    several: Annotated[tuple[int, ...], ListOf(EVEN, text_or_list, least=1)] = (1,)
    sections: Annotated[tuple[Inner, ...], ListOf(SectionOf(Inner))] = ()
    secret: Annotated[Secret | None, OrNone(Value(Secret, TEXT))] = None
    told: str = ""

    def check(self) -> None:
        if self.inner.on and self.secret is None:
            raise Expected("secret beside on", "nothing")


def read(value: object) -> tuple[object, list[Problem]]:
    reading = Reading()
    return SectionOf(Outer).read(value, (), reading), reading.problems


def messages(value: object) -> list[tuple[tuple[str | int, ...], str]]:
    found, problems = read(value)
    assert found is INVALID
    return [(problem.loc, problem.message) for problem in problems]


EVENS = st.integers(-10, 10).map(lambda half: 2 * half)
INNER = st.fixed_dictionaries({"half": EVENS}, optional={"on": st.booleans()})


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "other": st.none() | INNER,
            "several": EVENS | st.lists(EVENS, min_size=1).map(tuple),
            "sections": st.lists(INNER).map(tuple),
        },
    )
)
def test_what_is_written_is_read_as_the_same(data: dict[str, Any]) -> None:
    section, problems = read(data)
    assert isinstance(section, Outer)
    assert not problems
    again: dict[str, Any] = written(section)
    lists = {name: tuple(again[name]) for name in ("several", "sections")}
    assert read(again | lists) == (section, [])
    assert again["told" if "told" in again else "inner"] == {"half": 2, "on": False}


def test_every_problem_is_found_and_none_twice() -> None:
    assert messages({"inner": {"halt": 1, "on": 1}, "several": (2, 3, INVALID), "sections": 5, "other": INVALID}) == [
        (("inner", "half"), "required key is missing"),
        (("inner", "halt"), "unknown key; expected one of half, on; did you mean 'half'?"),
        (("inner", "on"), "expected true or false"),
        (("several", 1), "expected an even number"),
        (("sections",), "expected a list (each entry begins with a dash and a space)"),
    ]
    assert messages({"several": ()}) == [(("several",), "expected at least one entry")]
    assert messages({"several": INVALID}) == messages(INVALID) == []
    assert messages("half:1") == [((), "expected options with values, such as {inner: ..., other: ...}")]


def test_options_are_checked_together_only_if_each_is_valid() -> None:
    contradiction: dict[str, Any] = {"inner": {"half": 2, "on": True}}
    assert messages(contradiction) == [((), "expected secret beside on")]
    assert messages(contradiction | {"several": 1}) == [(("several", 0), "expected an even number")]
    assert read(contradiction | {"secret": "s"})[1] == []


def test_a_secret_is_in_no_text() -> None:
    section, _ = read({"secret": "s3cret"})
    assert isinstance(section, Outer)
    assert section.secret == Secret("s3cret")
    assert section.secret != Secret("another")
    assert len({section.secret, Secret("s3cret"), Secret("another")}) == 2
    assert "s3cret" not in repr(section) + str(section) + str(written(section))


def test_a_schema_has_what_a_section_has() -> None:
    sections: dict[str, Schema] = {}
    whole = schema_of(Outer, sections)
    assert [*whole["properties"]] == [*options_of(Outer)] == ["inner", "other", "several", "sections", "secret"]
    assert whole["minProperties"] == 1
    assert whole["properties"]["inner"]["default"] == {"half": 2, "on": False}
    inner = sections["Inner"]
    assert (inner["description"], inner["required"]) == ("What is inside.", ["half"])
    assert inner["properties"]["half"]["description"] == "Half of what is written."
    assert "default" not in inner["properties"]["half"]
    assert TEXT == {"type": "string"}


@pytest.mark.parametrize("annotation", [int, int | str, tuple[int, ...], int | None])
def test_a_field_that_cannot_be_read_is_a_mistake(annotation: Any) -> None:
    kind = type("Wrong", (Section,), {"__annotations__": {"x": annotation}, "x": None})
    with pytest.raises(TypeError, match="does not say how the option is read"):
        options_of(kind)
