"""Whether some globs match all that another one matches."""

from __future__ import annotations

from fnmatch import fnmatchcase
from itertools import product
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sseproxy.relay.globs import within

# Enough characters, and long enough, to tell apart what globs of a few tokens match.
TEXTS = ["".join(text) for length in range(5) for text in product("ab-]![^x", repeat=length)]
TOKENS = ["a", "b", "-", "]", "[", "!", "*", "*", "?", "[ab]", "[!a]", "[a-b]", "[b-a]", "[]a]", "[!]-]", "[^a]"]
GLOBS = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=3).map("".join)


@settings(max_examples=300, deadline=None)
@given(GLOBS, st.lists(GLOBS, max_size=3))
def test_it_is_so_exactly_where_no_text_tells_otherwise(glob: str, others: list[str]) -> None:
    alone = [text for text in TEXTS if fnmatchcase(text, glob) and not any(fnmatchcase(text, one) for one in others)]
    assert within(glob, others) == (not alone)


@pytest.mark.parametrize(
    ("glob", "others", "expected"),
    [
        ("gpt-4*", ["gpt-*"], True),
        ("gpt-*", ["gpt-4*"], False),
        ("gpt-4o", ["gpt-?o"], True),
        ("gpt-[45]*", ["gpt-4*", "gpt-5*"], True),
        ("gpt-[4-6]*", ["gpt-4*", "gpt-5*"], False),
        ("*", ["?*"], False),
        ("*", ["", "?*"], True),
        ("*a*", ["*"], True),
        ("a*b", ["*b", "c"], True),
        ("[!a]*", ["[!a-c]*", "b*", "c*"], True),
        ("[b-a]", [], True),
        ("[[]", ["["], True),
        ("*[é-ü]", ["*[é-ö]", "*[ö-ü]"], True),
        ("\U0010ffff*", ["[!\0-\U0010fffe]*"], True),
        ("org/*", ["*/*"], True),
        ("**", ["*"], True),
    ],
)
def test_some_globs_match_all_that_another_one_does(glob: str, others: list[str], expected: bool) -> None:
    assert within(glob, others) is expected


def test_what_would_take_long_to_find_out_is_not_said_to_be_so() -> None:
    began = perf_counter()
    assert not within("*" + "?*" * 20 + "a" * 20, [f"*{'?' * n}a*b" for n in range(30)])
    assert perf_counter() - began < 10
