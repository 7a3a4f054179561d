"""What a process writes for people to read, so that nobody who reads it slowly, or not at all, ever holds it up.

The supervisor and its workers write to the same pipe, socket or file. Each write to it has whole lines, and at most
`PIPE_BUF` bytes: what several processes write so never mixes within a line. Of a pipe that is promised (pipe(7)); the
kernel queues so few bytes on a Unix stream socket, such as journald's, as one buffer; and it locks a file that it
writes to.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from select import PIPE_BUF
from typing import Final

log = logging.getLogger(__name__)

# Bytes that wait for a reader that does not read; what is more is dropped, and counted.
_MAX_WAITING: Final = 1 << 20
# How long the end of the process waits for the last lines to be taken.
_LAST_LINES: Final = 1.0
_CUT: Final = b" [...]"

STANDARD_OUTPUT: Final = 1
_STANDARD_ERROR: Final = 2


def _dropped(number: int) -> str:
    return f"WARNING {__name__}: {number} lines were dropped: nobody took them"


class Lines(io.RawIOBase):
    """Collects lines; a thread writes them to `descriptor` when they are flushed. `write` and `flush` never wait.

    `say_dropped` makes a line of how many were dropped before it, because the reader was too slow or there was none.
    """

    def __init__(self, descriptor: int, say_dropped: Callable[[int], str] = _dropped) -> None:
        self._descriptor = descriptor
        self._say_dropped = say_dropped
        # Guards what follows. A finalizer or a signal that logs while it is held may do so: the lock is reentrant.
        self._changed = threading.Condition(threading.RLock())
        self._lines: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self._begun = b""
        # Lines are to be written, or are being written.
        self._due = False
        self._failing = False
        threading.Thread(target=self._run, name=f"lines-{descriptor}", daemon=True).start()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Takes UTF-8. What does not end with a line end waits for the rest of its line."""
        with self._changed:
            *lines, self._begun = (self._begun + data).split(b"\n")
            for line in lines:
                self._take(line)
            # No line is longer.
            self._begun = self._begun[:PIPE_BUF]
        return len(data)

    def _take(self, line: bytes) -> None:
        if self._size > _MAX_WAITING:
            self._dropped += 1
            return
        if len(line) >= PIPE_BUF:
            line = line[: PIPE_BUF - 1 - len(_CUT)].decode(errors="ignore").encode() + _CUT
        self._lines.append(line + b"\n")
        self._size += len(line) + 1

    def flush(self) -> None:
        """What was collected is to be written now."""
        with self._changed:
            if self._lines:
                self._due = True
                self._changed.notify_all()

    def finish(self) -> None:
        """Waits until everything was written, if somebody takes it in time."""
        with self._changed:
            if self._begun:
                self.write(b"\n")
            self.flush()
            self._changed.wait_for(lambda: not self._due, _LAST_LINES)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due)
                lines, self._lines, self._size = self._lines, [], 0
                dropped = self._dropped
            for batch in _batches(lines):
                if not self._written(batch):
                    with self._changed:
                        self._dropped += batch.count(b"\n")
            # After the lines that were waiting when there was no room for more.
            if dropped and not self._failing and self._written(self._say_dropped(dropped).encode() + b"\n"):
                with self._changed:
                    self._dropped -= dropped
            with self._changed:
                # What came meanwhile as well.
                self._due = bool(self._lines)
                self._changed.notify_all()

    def _written(self, batch: bytes) -> bool:
        """Writes `batch`, however long that takes; False if that cannot be done."""
        try:
            while batch:
                try:
                    batch = batch[os.write(self._descriptor, batch) :]
                except BlockingIOError:
                    # Somebody who has it as well has made it so.
                    poll = select.poll()
                    poll.register(self._descriptor, select.POLLOUT)
                    poll.poll()
        except OSError as error:
            # Whoever read has gone, or the disk is full.
            if not self._failing:
                self._failing = True
                log.warning("nothing can be written to descriptor %d: %s", self._descriptor, error.strerror)
            return False
        self._failing = False
        return True


def _batches(lines: Sequence[bytes]) -> Iterator[bytes]:
    """`lines` in as few writes as there may be."""
    batch = b""
    for line in lines:
        if len(batch) + len(line) > PIPE_BUF:
            yield batch
            batch = b""
        batch += line
    yield batch


def set_up_logging() -> None:
    """From now on nothing that this process logs, or writes to `sys.stderr`, waits for whoever reads it."""
    for descriptor in range(_STANDARD_ERROR + 1):
        try:
            os.fstat(descriptor)
        except OSError:
            # It was started without: a socket must not get its number.
            os.open(os.devnull, os.O_RDWR)
    lines = Lines(_STANDARD_ERROR)
    atexit.register(lines.finish)
    sys.stderr = io.TextIOWrapper(
        lines, encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=True
    )
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
