"""Sliding windows: how much was used within the last minute, hour or day.

Time is divided into fixed windows of that length. What was used within the last one of them counts as if it had been
used evenly: a sliding window has all of the present fixed window, and of the one before it only the share that it still
overlaps. So a limit needs two numbers, and use is forgotten gradually.
https://blog.cloudflare.com/counting-things-a-lot-of-different-things/

A cell has the number of its fixed window, and what was used in it. So both are written at once, and a cell of an
earlier window need not be set to zero. There is a cell for windows with an even number, and one for those with an odd
number.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Final, Generic, Protocol, TypeVar

import msgspec

# Bits of a cell for what was used. The other ones are for the number of the window, which starts again after
# `_NUMBERS`: for windows of a second, after three months.
_BITS: Final = 40
_MOST: Final = (1 << _BITS) - 1
_NUMBERS: Final = 1 << 23
_PREFIX: Final = "window"


def names(name: str, seconds: int) -> tuple[str, str]:
    """The names of the two columns for what `name` uses within so many seconds."""
    return f"{_PREFIX} {seconds} {name} even", f"{_PREFIX} {seconds} {name} odd"


def length(name: str) -> int | None:
    """How many seconds the windows of the column `name` have. None if it is another column."""
    prefix, _, rest = name.partition(" ")
    return int(rest.partition(" ")[0]) if prefix == _PREFIX else None


def cell(number: int, used: int) -> int:
    """The cell for the window `number`."""
    return (number % _NUMBERS) << _BITS | min(used, _MOST)


def used_in(number: int, cells: Iterable[int]) -> int:
    """What was used in the window `number`, according to all of `cells`."""
    first = (number % _NUMBERS) << _BITS
    used = 0
    for value in cells:
        # A cell of this window differs from `first` only in what was used.
        if (of_this := value ^ first) <= _MOST:
            used += of_this
    return used


def added(one: int, other: int) -> int:
    """The cell that counts what both cells count. That of an earlier window counts nothing."""
    if not one or not other:
        return one or other
    later = (one >> _BITS) - (other >> _BITS)
    if not later:
        return cell(one >> _BITS, (one & _MOST) + (other & _MOST))
    return one if later % _NUMBERS < _NUMBERS // 2 else other


class Use(msgspec.Struct, frozen=True, gc=False):
    """What was used in the `present` fixed window, of which `elapsed` of `seconds` have passed, and in the `last`."""

    present: int
    last: int
    elapsed: float
    seconds: int
    total: int
    """What was used in the sliding window, rounded."""

    @classmethod
    def of(cls, present: int, last: int, elapsed: float, seconds: int) -> Use:
        """With the total that follows from the rest."""
        return cls(present, last, elapsed, seconds, present + int(last * (1 - elapsed / seconds) + 0.5))

    def wait(self, limit: int, amount: int) -> float:
        """Seconds until `amount` more fits below `limit`, if nothing else is used. 0 if it fits now."""
        if self.total + amount <= limit:
            return 0.0
        if amount > limit:
            return inf
        room = limit - amount
        if self.present <= room:
            # Enough of the last window will have been forgotten within the present one.
            return self._until(self.last, room - self.present) - self.elapsed
        return self.seconds - self.elapsed + self._until(self.present, room)

    @property
    def reset(self) -> float:
        """Seconds until nothing of it counts any more, if nothing else is used."""
        return 2 * self.seconds - self.elapsed if self.present else self.seconds - self.elapsed if self.last else 0.0

    def _until(self, used: int, room: int) -> float:
        """How much of a window passes until no more than `room` is left of what was `used` in the one before."""
        return max(0.0, self.seconds * (1 - (room + 0.5) / used))


class Number(Protocol):
    """A column of the table, as a worker has it."""

    @property
    def own(self) -> int: ...
    def put(self, value: int) -> None: ...


C = TypeVar("C", bound=Number)


class Window(Generic[C]):
    """What all workers use of one thing within so many seconds. `columns` are those of even and of odd numbers.

    `now` is a time of `perf_counter`, which is the same for all processes of a machine.
    """

    __slots__ = ("columns", "seconds")

    def __init__(self, columns: tuple[C, C], seconds: int) -> None:
        self.columns = columns
        self.seconds = seconds

    def add(self, amount: int, now: float) -> None:
        """Counts `amount` as used now."""
        number = int(now // self.seconds)
        column = self.columns[number & 1]
        # As in `used_in`. This is done for each request, so it is not called.
        first = (number % _NUMBERS) << _BITS
        used = column.own ^ first
        used = amount + (used if used <= _MOST else 0)
        column.put(first | (used if used < _MOST else _MOST))

    def use(self, even: Iterable[int], odd: Iterable[int], now: float, more: int = 0) -> Use:
        """What was used, according to the cells of both columns, as if so much `more` had been."""
        seconds = self.seconds
        number = int(now // seconds)
        present, last = (odd, even) if number & 1 else (even, odd)
        return Use.of(more + used_in(number, present), used_in(number - 1, last), now - number * seconds, seconds)


def is_over(cells: Iterable[int], seconds: int, now: float) -> bool:
    """Whether none of `cells` counts any more, in a column of windows of so many seconds."""
    number = int(now // seconds)
    cells = list(cells)
    return not (used_in(number, cells) or used_in(number - 1, cells))
