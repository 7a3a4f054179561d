"""Globs, as `fnmatch` has them, and whether some of them match all that another one matches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final

# A set in brackets, in which a closing bracket that comes first is a character, or any one character.
_TOKEN: Final = re.compile(r"\[(?:!?\][^\]]*|![^\]]+|[^\]!][^\]]*)\]|.", re.DOTALL)
_PLAIN: Final = re.compile(r"[^*?[]*")
# So many steps, for each place in a glob and each character, decide about globs of some dozens of characters. They take
# some ten milliseconds.
_MAX_STEPS: Final = 50_000
_LAST: Final = chr(0x10FFFF)

# Where reading has got to in each of some globs: the numbers of the glob, and of its next token.
_Places = frozenset[tuple[int, int]]


def within(glob: str, others: Iterable[str]) -> bool:
    """Whether every text that `glob` matches is matched by one of `others`.

    False also where that would take long to find out.
    """
    listed = list(others)
    if glob in listed:
        return True
    plain = _plain(glob)
    if plain == glob:
        return any(fnmatchcase(glob, other) for other in listed)
    # Those that begin otherwise have no part in this, nor have names that it does not match.
    parts = [
        other
        for other, begins in zip(listed, map(_plain, listed), strict=True)
        if (begins.startswith(plain) or plain.startswith(begins)) and (begins != other or fnmatchcase(other, glob))
    ]
    return _finds_nothing_else(list(map(_TOKEN.findall, [glob, *parts])), _characters([glob, *parts]))


def _plain(glob: str) -> str:
    """What all that `glob` matches begins with: the characters before its first wildcard."""
    found = _PLAIN.match(glob)
    return found[0] if found else ""


def _characters(globs: Iterable[str]) -> list[str]:
    """One of each kind of characters that `globs` tell apart.

    What a set holds begins and ends at characters that it names. So each of these stands for itself, and the one behind
    it for all as far as the next.
    """
    named = set("".join(globs))
    return sorted(named | {chr(ord(one) + 1) for one in named if one < _LAST} | {"\0"})


def _finds_nothing_else(globs: Sequence[list[str]], characters: Sequence[str]) -> bool:
    """Whether no text, made of `characters`, is matched by the first of `globs` alone.

    All of them are read in step, character by character, as the automata that they are.
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
    """Where reading has got to when `character` was read."""
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
    """`places`, and those behind the stars that are there, which may match nothing."""
    found = set(places)
    for number, start in places:
        at = start
        while at < len(globs[number]) and globs[number][at] == "*":
            at += 1
            found.add((number, at))
    return frozenset(found)
