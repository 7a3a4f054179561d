"""Whether some globs match everything that another glob matches. Globs are those of `fnmatch`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final

# A set in brackets, or a single character. A closing bracket that comes first in a set is a member of the set.
_TOKEN: Final = re.compile(r"\[(?:!?\][^\]]*|![^\]]+|[^\]!][^\]]*)\]|.", re.DOTALL)
_PLAIN: Final = re.compile(r"[^*?[]*")
# A step is one character read at one position in a glob. This is enough for globs of some dozens of characters, and
# takes about ten milliseconds.
_MAX_STEPS: Final = 50_000
_LAST: Final = chr(0x10FFFF)

# The states of the automata: pairs of the number of a glob, and the number of its next token.
_Places = frozenset[tuple[int, int]]


def within(glob: str, others: Iterable[str]) -> bool:
    """Whether every text that `glob` matches is matched by one of `others`.

    False also if it would take too long to find out.
    """
    listed = list(others)
    if glob in listed:
        return True
    plain = _plain(glob)
    if plain == glob:
        return any(fnmatchcase(glob, other) for other in listed)
    # Globs with another beginning, and plain names that `glob` does not match, cannot contribute.
    parts = [
        other
        for other, begins in zip(listed, map(_plain, listed), strict=True)
        if (begins.startswith(plain) or plain.startswith(begins)) and (begins != other or fnmatchcase(other, glob))
    ]
    return _finds_nothing_else(list(map(_TOKEN.findall, [glob, *parts])), _characters([glob, *parts]))


def _plain(glob: str) -> str:
    """The characters before the first wildcard of `glob`. Every text that it matches begins with them."""
    found = _PLAIN.match(glob)
    return found[0] if found else ""


def _characters(globs: Iterable[str]) -> list[str]:
    """One character of each class that `globs` can tell apart.

    Ranges begin and end at characters that the globs name. So each named character is a class of its own, and the
    character after it represents all others up to the next named one.
    """
    named = set("".join(globs))
    return sorted(named | {chr(ord(one) + 1) for one in named if one < _LAST} | {"\0"})


def _finds_nothing_else(globs: Sequence[list[str]], characters: Sequence[str]) -> bool:
    """Whether no text made of `characters` is matched by the first of `globs` and by none of the others.

    Each glob is an automaton. All of them are run together, one character at a time.
    """
    known: dict[tuple[str, str], bool] = {}

    def takes(token: str, character: str) -> bool:
        if (token, character) not in known:
            known[token, character] = fnmatchcase(character, token)
        return known[token, character]

    start = _past_stars({(number, 0) for number in range(len(globs))}, globs)
    seen, waiting = {start}, [start]
    steps = 0
    while waiting:
        places = waiting.pop()
        ended = {number for number, at in places if at == len(globs[number])}
        if ended == {0}:
            return False
        steps += len(places) * len(characters)
        if steps > _MAX_STEPS:
            return False
        for character in characters:
            after = _after(places, character, globs, takes)
            if after not in seen and any(number == 0 for number, _ in after):
                seen.add(after)
                waiting.append(after)
    return True


def _after(places: _Places, character: str, globs: Sequence[list[str]], takes: Callable[[str, str], bool]) -> _Places:
    """The states after `character` was read in the states `places`."""
    found: set[tuple[int, int]] = set()
    for number, at in places:
        if at < len(globs[number]):
            token = globs[number][at]
            if token == "*":
                found.add((number, at))
            elif takes(token, character):
                found.add((number, at + 1))
    return _past_stars(found, globs)


def _past_stars(places: set[tuple[int, int]], globs: Sequence[list[str]]) -> _Places:
    """`places`, and the states after each star, because a star may match nothing."""
    found = set(places)
    for number, start in places:
        at = start
        while at < len(globs[number]) and globs[number][at] == "*":
            at += 1
            found.add((number, at))
    return frozenset(found)
