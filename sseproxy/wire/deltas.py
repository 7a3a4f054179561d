"""Recognises, by its bytes, an event that differs from an earlier one only in its generated text.

Nearly all events of a stream are like that. Comparing bytes costs much less than parsing each event.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from .framing import USUAL_STARTS

# The characters that end a JSON string or start an escape, and those that are not allowed in one (RFC 8259, section 7).
_NOT_PLAIN: Final = bytes([*range(0x20), *b'"\\\x7f'])
# `USUAL_STARTS` has the chunk header of each length below this one.
_MAX_LENGTH: Final = len(USUAL_STARTS)
# Two members that OpenAI adds and that differ in every event: padding, which hides the length of a token from an
# eavesdropper, and a number that counts the events.
_PADDING: Final = re.compile(rb'"obfuscation": ?"([^"\\\x00-\x1f\x7f]*)"')
_NUMBER: Final = re.compile(rb'"sequence_number": ?([0-9]+)')


def _is_plain(part: bytes) -> bool:
    return part.translate(None, _NOT_PLAIN) == part


def _is_text(part: bytes) -> bool:
    return bool(part) and _is_plain(part)


def _is_number(part: bytes) -> bool:
    return part.isdigit() and (part[0] != 0x30 or part == b"0")


class DeltaMatcher:
    """Matches a read that is exactly one HTTP chunk with one event: a delta that looks like an earlier one.

    The event must start with `prefix` and end with `suffix`. The bytes in between are split at the literals in
    `between`. The part before each literal must pass the check beside it, and the rest must pass `last`.
    """

    __slots__ = ("_around", "_between", "_last", "_prefix", "_suffix")

    def __init__(
        self,
        prefix: bytes,
        between: Sequence[tuple[bytes, Callable[[bytes], bool]]],
        last: Callable[[bytes], bool],
        suffix: bytes,
    ) -> None:
        self._prefix = prefix
        self._between = between
        self._last = last
        self._suffix = suffix
        self._around = len(prefix) + len(suffix)

    def size_of(self, data: bytes) -> int:
        """The size of the event in bytes if `data` matches, or else 0."""
        length = len(data)
        if length >= _MAX_LENGTH:
            return 0
        start = USUAL_STARTS[length]
        rest = data.removeprefix(start).removeprefix(self._prefix).removesuffix(self._suffix)
        size = length - len(start)
        # If the lengths add up, all three were removed: the chunk header, the prefix and the suffix. This is faster
        # than `startswith`, which parses its arguments at each call.
        if not start or len(rest) + self._around != size:
            return 0
        if not self._between:
            return size - 2 if rest and rest.translate(None, _NOT_PLAIN) == rest else 0
        for literal, check in self._between:
            part, there, rest = rest.partition(literal)
            if not there or not check(part):
                return 0
        return size - 2 if self._last(rest) else 0


def text_under(*keys: str) -> re.Pattern[bytes]:
    """A pattern that finds the value of one of `keys`, if it is a string that is not empty and has no escapes."""
    return re.compile(rb'"(?:%b)": ?"([^"\\\x00-\x1f\x7f]+)"' % "|".join(keys).encode())


def delta_matcher(event: bytes, text: re.Pattern[bytes]) -> DeltaMatcher | None:
    """A matcher of events that mean the same as `event`, which must be a delta and nothing else.

    `event` is one event without chunk framing. `text` finds its generated text; if it finds none, the result is None.
    A matching event may differ from `event` in its text, its padding and its number; all other bytes are the same. The
    text must be a JSON string that is not empty and has no escapes, because dialects only check whether it is empty.
    The event must be one HTTP chunk without extensions, so the chunk can be forwarded as it is.
    """
    generated = text.search(event)
    if generated is None:
        return None
    varied = [(generated.span(1), _is_text)]
    for pattern, check in ((_PADDING, _is_plain), (_NUMBER, _is_number)):
        found = pattern.search(event)
        if found is not None:
            varied.append((found.span(1), check))
    varied.sort()
    between = [(event[end:start], check) for ((_, end), check), ((start, _), _) in pairwise(varied)]
    return DeltaMatcher(event[: varied[0][0][0]], between, varied[-1][1], event[varied[-1][0][1] :] + b"\r\n")
