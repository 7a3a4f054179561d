"""Recognising events that mean the same as one before, by their bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from .framing import USUAL_STARTS

# What ends or escapes in a JSON string, and what may not be in one (RFC 8259, section 7).
_NOT_PLAIN: Final = bytes([*range(0x20), *b'"\\\x7f'])
_MAX_ALIKE: Final = len(USUAL_STARTS)
# OpenAI's padding, against guesses by length, and its count of events; where streams have them, all events differ.
_PADDING: Final = re.compile(rb'"obfuscation": ?"([^"\\\x00-\x1f\x7f]*)"')
_NUMBER: Final = re.compile(rb'"sequence_number": ?([0-9]+)')


def _is_plain(part: bytes) -> bool:
    return part.translate(None, _NOT_PLAIN) == part


def _is_text(part: bytes) -> bool:
    return bool(part) and _is_plain(part)


def _is_number(part: bytes) -> bool:
    return part.isdigit() and (part[0] != 0x30 or part == b"0")


class Alike:
    """Recognises reads that are one chunk, with an event like one before but for what varies.

    That is between `prefix` and `suffix`: what `last` accepts, after what each of `between` accepts, up to its literal.
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
        """The size of the event if `data` is such a read, or 0."""
        length = len(data)
        if length >= _MAX_ALIKE:
            return 0
        start = USUAL_STARTS[length]
        rest = data.removeprefix(start).removeprefix(self._prefix).removesuffix(self._suffix)
        size = length - len(start)
        # As long as it is then, all three were there.
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
    """Finds text without escapes that is not empty, as the value of one of `keys`."""
    return re.compile(rb'"(?:%b)": ?"([^"\\\x00-\x1f\x7f]+)"' % "|".join(keys).encode())


def alike(event: bytes, text: re.Pattern[bytes]) -> Alike | None:
    """Recognises what means the same as `event`, as it came: a delta and nothing else. None if `text` finds none.

    An event that has the same bytes, but for that text, its padding and its number, means the same; so do nearly all
    events of a stream. The text is that of a JSON string without escapes, of which no reader asks more than whether it
    is empty. It is recognised in one HTTP chunk without extensions, which can be forwarded as it is.
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
    return Alike(event[: varied[0][0][0]], between, varied[-1][1], event[varied[-1][0][1] :] + b"\r\n")
