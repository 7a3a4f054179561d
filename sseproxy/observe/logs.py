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
from datetime import UTC, datetime
from select import PIPE_BUF
from typing import TYPE_CHECKING, Final, TextIO

import msgspec

if TYPE_CHECKING:
    from ..config import Config

log = logging.getLogger(__name__)

# Bytes that wait for a reader that does not read; what is more is dropped, and counted.
_MAX_WAITING: Final = 1 << 20
# How long the end of the process waits for the last lines to be taken.
_LAST_LINES: Final = 1.0
_CUT: Final = b" [...]"
_DROPPED: Final = "{} lines were dropped: nobody took them"

STANDARD_OUTPUT: Final = 1
_STANDARD_ERROR: Final = 2


class Lines(io.RawIOBase):
    """Collects lines; a thread writes them to `descriptor` when they are flushed. `write` and `flush` never wait.

    `say_dropped` makes a line of how many were dropped before it, because the reader was too slow or there was none.
    """

    def __init__(self, descriptor: int, say_dropped: Callable[[int], str] = _DROPPED.format) -> None:
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


class _Text(logging.Formatter):
    """A line for people: when, how grave, who says it, what. A traceback follows in lines of its own."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return moment(record.created)


class _Json(logging.Formatter):
    """One JSON object, short enough to be a line that nobody cuts."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": moment(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _unicode(record.getMessage()),
        }
        if record.exc_info:
            said["exception"] = _unicode(self.formatException(record.exc_info))
        line = msgspec.json.encode(said)
        # Every character may take six bytes. Of a traceback, the end says most.
        if len(line) >= PIPE_BUF:
            said["message"] = said["message"][: PIPE_BUF // 24]
            if "exception" in said:
                said["exception"] = said["exception"][-PIPE_BUF // 12 :]
            line = msgspec.json.encode(said)
        return line.decode()


def _unicode(text: str) -> str:
    """`text`, whatever bytes somebody has made it of."""
    return text.encode(errors="backslashreplace").decode()


def moment(created: float) -> str:
    """The point in time `created`, in seconds since 1970, as RFC 3339 has it."""
    return datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_TEXT: Final = _Text("%(asctime)s %(levelname)s %(name)s: %(message)s")
_JSON: Final = _Json()


def wants_text(form: str) -> bool:
    """Whether lines in the format `form` (`access_log.format`) are for people: by default, on a terminal."""
    return form == "text" or (form == "auto" and os.isatty(STANDARD_OUTPUT))


class _Handler(logging.StreamHandler[TextIO]):
    """Writes what is logged to standard error, by way of `Lines`."""

    def say_dropped(self, number: int) -> str:
        said = {"name": __name__, "levelname": "WARNING", "msg": _DROPPED.format(number)}
        return self.format(logging.makeLogRecord(said))


def set_up_logging() -> None:
    """From now on nothing that this process logs, or writes to `sys.stderr`, waits for whoever reads it."""
    for descriptor in range(_STANDARD_ERROR + 1):
        try:
            os.fstat(descriptor)
        except OSError:
            # It was started without: a socket must not get its number.
            os.open(os.devnull, os.O_RDWR)
    handler = _Handler()
    lines = Lines(_STANDARD_ERROR, handler.say_dropped)
    atexit.register(lines.finish)
    sys.stderr = io.TextIOWrapper(
        lines, encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=True
    )
    handler.setStream(sys.stderr)
    handler.setFormatter(_TEXT if wants_text("auto") else _JSON)
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.INFO)


def finish() -> None:
    """Waits until what was logged was written, if somebody takes it in time."""
    lines = getattr(sys.stderr, "buffer", None)
    if isinstance(lines, Lines):
        lines.finish()


def log_as(config: Config) -> None:
    """What is logged from now on, and how, is as `config` has it."""
    for handler in logging.root.handlers:
        if isinstance(handler, _Handler):
            handler.setFormatter(_TEXT if wants_text(config.access_log.format) else _JSON)
            logging.root.setLevel(config.log.level.upper())
