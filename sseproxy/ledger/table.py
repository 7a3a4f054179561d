"""The table: one file in memory (memfd_create(2)), mapped by the supervisor and by every worker.

It has a row for each worker and a column for each number. A worker writes only its own row, and reads all rows. So no
locks are needed. A sum is exact, except for changes while it is read. So no request is refused below a limit, and a
limit is exceeded for a moment by fewer than there are workers.

The supervisor assigns a row to each worker and a column to each name. The workers of all generations are in the same
table. When a worker has ended, in whatever way, its row is set to zero. The supervisor has a row of its own, before
those of the workers, with what it has decided, and what workers that have ended had counted in windows of time
(`windows`), which still counts.

The cells of a row are next to each other in memory. So a row that is not used takes no memory, and cores that write do
not share a cache line.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from operator import itemgetter
from time import perf_counter
from typing import Final

import msgspec

from . import windows

# The version of the layout. After an upgrade, the new code may not know the layout of the old code.
_LAYOUT: Final = 2
_CELL: Final = 8
# The first cells: the layout, the number of rows, and the number of rows up to the last one that is in use.
_AT_LAYOUT, _AT_ROWS, _AT_HEIGHT = range(3)
_SECRET: Final = slice(64, 96)
_HEADER: Final = 512
# Columns. Each limit and route needs one, each client up to six, each endpoint seven, and each upstream with `resolve`
# 577.
_COLUMNS: Final = 128 * 1024
# The lines and the cells of a line in the sketch of a row. Its cells have 32 bits.
_DEPTH: Final = 8
_BREADTH: Final = 32 * 1024
# The names that a worker has seen: buckets, and names in a bucket.
_BUCKETS: Final = 1024
_IN_A_BUCKET: Final = 8
# What rests: first until when anything does, then so many names, then until when each rests. It is a page of memory.
_RESTS: Final = 255
_REST_CELLS: Final = 2 + 2 * _RESTS
_WIDTH: Final = _COLUMNS + _DEPTH * _BREADTH // 2 + _BUCKETS * _IN_A_BUCKET + _REST_CELLS
# Where the last two begin in a row.
_AT_RESTS: Final = _WIDTH - _REST_CELLS
_AT_SEEN: Final = _AT_RESTS - _BUCKETS * _IN_A_BUCKET
# The first row is the supervisor's. This is the first cell of the first worker's row.
_FIRST: Final = _HEADER + _WIDTH
# The supervisor's row, counted from the first worker's.
_OWN: Final = -1
# Bytes for what the old code leaves to the new code in an upgrade: the names of the columns.
_DIRECTORY: Final = 8 << 20


class Count:
    """One number: the part of this row, and the sum of all rows."""

    __slots__ = ("_cells", "_own", "column")

    def __init__(self, cells: memoryview[int], row: int, column: int) -> None:
        self._cells = cells
        self.column = _FIRST + column
        """Its cell in the row of the first worker."""
        self._own = self.column + row * _WIDTH

    def add(self, number: int) -> None:
        """Adds `number` to the part of this worker."""
        self._cells[self._own] += number

    @property
    def own(self) -> int:
        """The part of this row."""
        return self._cells[self._own]

    def put(self, value: int) -> None:
        """Sets the part of this row."""
        self._cells[self._own] = value

    def all(self) -> list[int]:
        """What the supervisor has kept of workers that have ended, and the part of each worker."""
        cells = self._cells
        return cells[self.column - _WIDTH : self.column + cells[_AT_HEIGHT] * _WIDTH : _WIDTH].tolist()

    def each(self) -> list[int]:
        """The part of each worker, by row. It is 0 in rows that are not used."""
        cells = self._cells
        return cells[self.column : self.column + cells[_AT_HEIGHT] * _WIDTH : _WIDTH].tolist()

    def total(self) -> int:
        """The sum of all workers."""
        return sum(self.each())


class Loads:
    """The sums of several `counts`, in the order of their columns, read in one step: this is done for each request.

    `marks` are numbers that the supervisor writes.
    """

    __slots__ = ("_calm", "_cells", "_counts", "_each", "_first", "_height", "_marks", "_unpack")

    def __init__(self, counts: Sequence[Count], marks: Sequence[Count]) -> None:
        self._cells = counts[0]._cells
        self._counts = sorted(count.column for count in counts)
        self._marks = sorted(mark._own for mark in marks)
        self._height = -1
        # `_unpack` reads the height of the table and the marks, and from `_first` on, for each worker, its counts and
        # until when anything rests.
        self._first = 1 + len(self._marks)
        # What is before that, as long as the height is the same and no mark is set.
        self._calm: tuple[int, ...] = ()
        self._unpack = _reader_of([_AT_HEIGHT])
        # This takes, out of that, each count of all workers, and the rests.
        self._each: Callable[[tuple[int, ...]], tuple[tuple[int, ...], ...]] = itemgetter(slice(0), slice(0))

    def read(self) -> Sequence[int] | None:
        """The sum of all workers of each. None if any mark is not 0, or if anything may rest."""
        cells, first = self._unpack(self._cells), self._first
        if cells[:first] != self._calm:
            if cells[0] == self._height:
                return None
            self._measure(cells[0])
            return self.read()
        if self._height == 1:
            # There is nothing to add up.
            return None if cells[-1] else cells[first:-1]
        sums = [*map(sum, self._each(cells))]
        return None if sums.pop() else sums

    def _measure(self, height: int) -> None:
        self._height = height
        self._calm = (height, *[0 for _ in self._marks])
        row = [*self._counts, _FIRST + _AT_RESTS]
        places = [_AT_HEIGHT, *self._marks, *[worker * _WIDTH + place for worker in range(height) for place in row]]
        self._unpack = _reader_of(places)
        self._each = itemgetter(*[slice(self._first + place, None, len(row)) for place in range(len(row))])


def _reader_of(places: Iterable[int]) -> Callable[[memoryview[int]], tuple[int, ...]]:
    """A function that reads the cells at `places`, which ascend, in a fifth of the time that a memoryview takes."""
    spelled, end = "", 0
    for place in places:
        spelled += f"{(place - end) * _CELL}xq"
        end = place + 1
    return struct.Struct(spelled).unpack_from


class Columns:
    """The cells of several `counts`, of the supervisor and of all workers, read in one step, as `Loads` does it."""

    __slots__ = ("_cells", "_columns", "_each", "_height", "_unpack")

    def __init__(self, counts: Sequence[Count]) -> None:
        self._cells = counts[0]._cells
        self._columns = [count.column for count in counts]
        self._height = -1
        self._unpack = _reader_of([_AT_HEIGHT])
        # The cells of each column, out of those of all rows.
        self._each: list[slice] = []

    def read(self) -> list[tuple[int, ...]]:
        """The cells of each, in the order of `counts`: the supervisor's, and each worker's, by row."""
        cells = self._unpack(self._cells)
        if cells[0] != self._height:
            self._measure(cells[0])
            return self.read()
        return [cells[of_one] for of_one in self._each]

    def _measure(self, height: int) -> None:
        self._height = height
        row = sorted(self._columns)
        places = [number * _WIDTH + column for number in range(_OWN, height) for column in row]
        self._unpack = _reader_of([_AT_HEIGHT, *places])
        self._each = [slice(1 + row.index(column), None, len(row)) for column in self._columns]


class Sketch:
    """Counts for each client address. It is a count-min sketch, so its size is fixed.

    Cormode and Muthukrishnan, "An improved data stream summary" (2005). A count is never too low. It is too high if in
    each of the 8 lines another client has the same one of 32,768 cells. For n counted things the probability is
    (1 - e^(-n / 32768))^8: one in 10^12 for 1,000, one in 40,000 for 10,000. Then it is usually too high by one. A
    keyed hash chooses the cells, so nobody can choose an address that has the cells of another one.
    """

    def __init__(self, table: Table, row: int) -> None:
        self._cells = table.cells
        self._small = table.small
        self._key = table.secret
        self._row = row

    def _places(self, client: str) -> Iterable[int]:
        """The cell of `client` in each line, in the row of the first worker."""
        digest = blake2b(client.encode(), digest_size=2 * _DEPTH, key=self._key).digest()
        first = 2 * (_FIRST + _COLUMNS)
        for line, value in enumerate(struct.unpack(f"{_DEPTH}H", digest)):
            yield first + line * _BREADTH + value % _BREADTH

    def add(self, client: str, number: int) -> None:
        """Adds `number` to the count of `client` in this worker."""
        skipped = 2 * self._row * _WIDTH
        for place in self._places(client):
            self._small[skipped + place] += number

    def others(self, client: str) -> int:
        """The count of `client` in all other workers."""
        small, size = self._small, 2 * _WIDTH * self._cells[_AT_HEIGHT]
        if size == 2 * _WIDTH:
            return 0
        own = 2 * self._row * _WIDTH
        return min(sum(small[place : place + size : 2 * _WIDTH]) - small[own + place] for place in self._places(client))


class Seen:
    """The names that workers have seen. Of each worker, about the last 8,000 are remembered.

    A name is stored as a keyed hash of 63 bits, so nobody can choose a name that is confused with another one.
    """

    def __init__(self, table: Table, row: int) -> None:
        self._cells = table.cells
        self._key = table.secret
        self._skipped = row * _WIDTH

    def add(self, name: str) -> bool:
        """Remembers `name`. Returns whether any worker has remembered it before."""
        digest = blake2b(name.encode(errors="surrogatepass"), digest_size=8, key=self._key).digest()
        # A cell that is 0 is empty.
        value = (int.from_bytes(digest, "little") >> 1) or 1
        cells = self._cells
        first = _FIRST + _AT_SEEN + value % _BUCKETS * _IN_A_BUCKET
        for start in range(first, first + cells[_AT_HEIGHT] * _WIDTH, _WIDTH):
            if value in cells[start : start + _IN_A_BUCKET].tolist():
                return True
        own = first + self._skipped
        for place in range(own + _IN_A_BUCKET - 1, own, -1):
            cells[place] = cells[place - 1]
        cells[own] = value
        return False


class Rests:
    """Until when something is not used, by name, as all workers know it. Of each worker, 255 are remembered.

    Times are whole microseconds of `perf_counter`, which is the same in all processes.
    """

    def __init__(self, table: Table, row: int) -> None:
        self._cells = table.cells
        self._key = table.secret
        self._own = _FIRST + _AT_RESTS + row * _WIDTH

    def _value(self, name: str) -> int:
        digest = blake2b(name.encode(errors="surrogatepass"), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little") >> 1

    def add(self, name: str, until: int) -> None:
        """`name` rests until `until`. If there are too many, this replaces the one that rests shortest."""
        value, cells, first = self._value(name), self._cells, self._own + 1
        names, times = cells[first : first + _RESTS].tolist(), cells[first + _RESTS : first + 2 * _RESTS].tolist()
        place = names.index(value) if value in names else times.index(min(times))
        cells[first + place], cells[first + _RESTS + place] = value, until
        times[place] = until
        cells[self._own] = max(times)

    def any(self, now: int) -> bool:
        """Whether anything rests. Forgets what this worker has told, if all of that is over."""
        cells, first = self._cells, _FIRST + _AT_RESTS
        if cells[self._own] <= now:
            cells[self._own] = 0
        return max(cells[first : first + cells[_AT_HEIGHT] * _WIDTH : _WIDTH].tolist()) > now

    def until(self, name: str, now: int) -> int:
        """Until when `name` rests: the latest time that any worker has told. Not after `now` if it does not rest."""
        cells, value, found = self._cells, self._value(name), 0
        for first in range(_FIRST + _AT_RESTS, _FIRST + cells[_AT_HEIGHT] * _WIDTH, _WIDTH):
            start = first + 1
            if cells[first] > now:
                names = cells[start : start + _RESTS].tolist()
                if value in names:
                    found = max(found, cells[start + _RESTS + names.index(value)])
        return found


class Row:
    """A row. `columns` has the columns that it uses, by name."""

    def __init__(self, table: Table, number: int, columns: Mapping[str, int]) -> None:
        self.number = number
        self.clients = Sketch(table, number)
        """The connections of each client."""
        self.counted = Seen(table, number)
        """The responses whose usage was counted and that the upstream keeps."""
        self.rests = Rests(table, number)
        """What is not used for a while."""
        self.machine = blake2b(b"machine", digest_size=12, key=table.secret).hexdigest()
        """A name of the machine, or of the container, on which this table is."""
        self._table = table
        self._columns = columns

    def count(self, name: str) -> Count:
        """Raises `KeyError` if there is no column of that name."""
        return Count(self._table.cells, self.number, self._columns[name])

    def told(self, name: str) -> Count:
        """The number `name` in the supervisor's row, for reading. Raises `KeyError` if there is no such column."""
        return Count(self._table.cells, _OWN, self._columns[name])

    def window(self, name: str, seconds: int) -> windows.Window[Count]:
        """What is used within so many seconds. Raises `KeyError` if there are no columns for it."""
        even, odd = map(self.count, windows.names(name, seconds))
        return windows.Window((even, odd), seconds)


class Table:
    """The file `fd`, mapped. Raises `ValueError` if it has another layout."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, 0)
        cells = memoryview(self.map)
        self.cells = cells.cast("q")
        self.small = cells.cast("i")
        if self.cells[_AT_LAYOUT] != _LAYOUT:
            raise ValueError(f"the ledger has the layout {self.cells[_AT_LAYOUT]}, not {_LAYOUT}")

    @property
    def secret(self) -> bytes:
        return self.map[_SECRET]


class Ledger:
    """The table in the supervisor, which assigns rows and columns.

    There are `rows` for all workers of all generations that exist at the same time.
    """

    def __init__(self, rows: int = 256) -> None:
        fd = os.memfd_create("sseproxy-ledger")
        os.ftruncate(fd, (_FIRST + rows * _WIDTH) * _CELL + _DIRECTORY)
        os.pwrite(fd, struct.pack("qq", _LAYOUT, rows), 0)
        os.pwrite(fd, secrets.token_bytes(_SECRET.stop - _SECRET.start), _SECRET.start)
        self._table = Table(fd)
        self._taken: set[int] = set()
        self._columns: dict[str, int] = {}

    @classmethod
    def left(cls, fd: int, rows: Iterable[int]) -> Ledger:
        """Opens the ledger that the old code has left in an upgrade. Workers still use `rows`.

        Raises `ValueError` if it has another layout.
        """
        ledger = cls.__new__(cls)
        ledger._table = Table(fd)
        ledger._taken = set(rows)
        start = ledger._directory()
        (size,) = struct.unpack("q", ledger._table.map[start : start + _CELL])
        start += _CELL
        ledger._columns = msgspec.json.decode(ledger._table.map[start : start + size], type=dict[str, int])
        for row in range(ledger._table.cells[_AT_ROWS]):
            if row not in ledger._taken:
                ledger._empty(row)
        ledger._set_height()
        return ledger

    def leave(self) -> int:
        """Stores the names of the columns for the new code in an upgrade. Returns the file descriptor."""
        directory = msgspec.json.encode(self._columns)
        start = self._directory()
        self._table.map[start : start + _CELL + len(directory)] = struct.pack("q", len(directory)) + directory
        return self.fd

    def _directory(self) -> int:
        return (_FIRST + self._table.cells[_AT_ROWS] * _WIDTH) * _CELL

    @property
    def fd(self) -> int:
        return self._table.fd

    def own(self, columns: Mapping[str, int]) -> Row:
        """The row of the supervisor."""
        return self.row(_OWN, columns)

    def withdraw(self, kept: Collection[str]) -> None:
        """Sets what the supervisor tells to zero, except under the names `kept`. So the columns can become free.

        That includes what an earlier version has told.
        """
        own = self.own(self._columns)
        for name in self._columns.keys() - set(kept):
            # Windows have what ended workers have used. This still counts.
            if windows.length(name) is None:
                own.count(name).put(0)

    def take_row(self) -> int:
        """Assigns a row to a worker that is about to be started. Raises `OSError` if there is none left."""
        rows = self._table.cells[_AT_ROWS]
        row = next((row for row in range(rows) if row not in self._taken), None)
        if row is None:
            raise OSError(errno.EAGAIN, f"there may be no more than {rows} workers, those that finish included")
        self._taken.add(row)
        self._set_height()
        return row

    def free_row(self, row: int) -> None:
        """Sets the row of a worker that has ended to zero, and makes it free for another one."""
        self._empty(row)
        self._taken.discard(row)
        self._set_height()

    def _empty(self, row: int) -> None:
        """Sets `row` to zero, and keeps what was counted in it in windows of time."""
        cells, first = self._table.cells, _FIRST + row * _WIDTH
        counted = [
            (column, value)
            for name, column in self._columns.items()
            if windows.length(name) is not None and (value := cells[first + column])
        ]
        # This also gives the memory back.
        self._table.map.madvise(mmap.MADV_REMOVE, first * _CELL, _WIDTH * _CELL)
        for column, value in counted:
            cells[_HEADER + column] = windows.added(cells[_HEADER + column], value)

    def _set_height(self) -> None:
        self._table.cells[_AT_HEIGHT] = max(self._taken, default=-1) + 1

    def columns(self, names: Iterable[str], in_use: Iterable[str]) -> dict[str, int]:
        """Assigns columns to `names`. Columns of other names that are not `in_use`, and count nothing, become free.

        Raises `OSError` if there are too many.
        """
        wanted = list(dict.fromkeys(names))
        kept = {*wanted, *in_use}
        for name, column in list(self._columns.items()):
            if name not in kept and not self._counts(name, column):
                self._table.cells[_HEADER + column] = 0
                del self._columns[name]
        used, free = set(self._columns.values()), 0
        for name in wanted:
            if name not in self._columns:
                while free in used:
                    free += 1
                if free == _COLUMNS:
                    raise OSError(
                        errno.ENOSPC,
                        f"more than {_COLUMNS} counters are needed: configure fewer clients, endpoints or limits",
                    )
                used.add(free)
                self._columns[name] = free
        return {name: self._columns[name] for name in wanted}

    def _counts(self, name: str, column: int) -> bool:
        """Whether anything is counted in the column called `name`."""
        cells, seconds = Count(self._table.cells, 0, column).all(), windows.length(name)
        return any(cells) if seconds is None else not windows.is_over(cells, seconds, perf_counter())

    @property
    def names(self) -> set[str]:
        """The names of all columns."""
        return set(self._columns)

    def row(self, number: int, columns: Mapping[str, int]) -> Row:
        return Row(self._table, number, columns)

    def count(self, name: str) -> Count:
        """The number called `name`, for reading. Raises `KeyError` if there is no such column."""
        return Count(self._table.cells, 0, self._columns[name])

    def close(self) -> None:
        os.close(self.fd)


def alone(names: Iterable[str]) -> Row:
    """A row of a ledger with only one worker."""
    ledger = Ledger(rows=1)
    try:
        return ledger.row(ledger.take_row(), ledger.columns(names, ()))
    finally:
        # The mapping stays.
        ledger.close()


def opened(fd: int, row: int, columns: Mapping[str, int]) -> Row:
    """Opens a worker's row of the ledger in the file `fd`. Closes `fd`; the mapping stays."""
    try:
        return Row(Table(fd), row, columns)
    finally:
        os.close(fd)
