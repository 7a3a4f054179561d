"""Writes log lines without ever blocking a process, even if nobody reads them.

The supervisor and its workers write to the same pipe, socket or file. Each write has whole lines, and at most
`PIPE_BUF` bytes, so lines of several processes are never mixed. For a pipe this is guaranteed (pipe(7)). On a Unix
stream socket, such as journald's, the kernel queues so few bytes as one buffer. A file is locked by the kernel during a
write.
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

from .. import signals

if TYPE_CHECKING:
    from ..config import Config

log = logging.getLogger(__name__)

# Bytes of lines that may wait for the reader. Further lines are dropped and counted.
_MAX_WAITING: Final = 1 << 20
# Seconds that the process waits at its end until the last lines are written.
_LAST_LINES: Final = 1.0
_CUT: Final = b" [...]"
_DROPPED: Final = "{} lines were dropped: nobody read them"

STANDARD_OUTPUT: Final = 1
_STANDARD_ERROR: Final = 2


class Lines(io.RawIOBase):
    """Collects lines. When they are flushed, a thread writes them to `descriptor`. `write` and `flush` never block.

    If lines had to be dropped, because the reader was too slow or there was none, `say_dropped` makes a line of their
    number.
    """

    def __init__(self, descriptor: int, say_dropped: Callable[[int], str] = _DROPPED.format) -> None:
        self._descriptor = descriptor
        self._say_dropped = say_dropped
        # Guards the attributes below. It is reentrant: a finalizer or a signal handler may log while it is held.
        self._changed = threading.Condition(threading.RLock())
        self._lines: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self._begun = b""
        # Whether there are lines to write, or lines that are being written.
        self._due = False
        self._failing = False
        threading.Thread(target=self._run, name=f"lines-{descriptor}", daemon=True).start()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def add(self, line: bytes) -> None:
        """Takes a whole line, without its end."""
        with self._changed:
            self._take(line)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Takes UTF-8 text. An incomplete last line is kept until its end is written."""
        with self._changed:
            *lines, self._begun = (self._begun + data).split(b"\n")
            for line in lines:
                self._take(line)
            # A line is cut to this length, so more need not be kept.
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
        """Lets the thread write the collected lines now."""
        with self._changed:
            if self._lines:
                self._due = True
                self._changed.notify_all()

    def finish(self) -> None:
        """Waits until everything is written, at most `_LAST_LINES` seconds."""
        with self._changed:
            if self._begun:
                self.write(b"\n")
            self.flush()
            self._changed.wait_for(lambda: not self._due, _LAST_LINES)

    def _run(self) -> None:
        signals.hold_back()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due)
                lines, self._lines, self._size = self._lines, [], 0
                dropped = self._dropped
            for batch in _batches(lines):
                if not self._written(batch):
                    with self._changed:
                        self._dropped += batch.count(b"\n")
            # The dropped lines came after the lines above, so the notice about them does, too.
            if dropped and not self._failing and self._written(self._say_dropped(dropped).encode() + b"\n"):
                with self._changed:
                    self._dropped -= dropped
            with self._changed:
                # Further lines may have been collected meanwhile.
                self._due = bool(self._lines)
                self._changed.notify_all()

    def _written(self, batch: bytes) -> bool:
        """Writes `batch`, however long that takes. Returns False if it cannot be written."""
        try:
            while batch:
                try:
                    batch = batch[os.write(self._descriptor, batch) :]
                except BlockingIOError:
                    # Another process that shares the file description has made it non-blocking.
                    poll = select.poll()
                    poll.register(self._descriptor, select.POLLOUT)
                    poll.poll()
        except OSError as error:
            # The reader has ended, or the disk is full.
            if not self._failing:
                self._failing = True
                log.warning("nothing can be written to descriptor %d: %s", self._descriptor, error.strerror)
            return False
        self._failing = False
        return True


def _batches(lines: Sequence[bytes]) -> Iterator[bytes]:
    """`lines` joined to batches of at most `PIPE_BUF` bytes."""
    batch = b""
    for line in lines:
        if len(batch) + len(line) > PIPE_BUF:
            yield batch
            batch = b""
        batch += line
    yield batch


class _Text(logging.Formatter):
    """A plain line: time, level, logger, message. A traceback follows in further lines."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return moment(record.created)


class _Json(logging.Formatter):
    """One JSON object, short enough that the line is not cut."""

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
        # A character may take six bytes. The end of a traceback is kept, because it says most.
        if len(line) >= PIPE_BUF:
            said["message"] = said["message"][: PIPE_BUF // 24]
            if "exception" in said:
                said["exception"] = said["exception"][-PIPE_BUF // 12 :]
            line = msgspec.json.encode(said)
        return line.decode()


def _unicode(text: str) -> str:
    """`text` with escapes for what cannot be encoded, such as the surrogates of invalid UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def moment(created: float) -> str:
    """The time `created`, in seconds since 1970, in the format of RFC 3339."""
    return datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_TEXT: Final = _Text("%(asctime)s %(levelname)s %(name)s: %(message)s")
_JSON: Final = _Json()


def wants_text(form: str) -> bool:
    """Whether the format `form` (`access_log.format`) means plain text. `auto` does on a terminal."""
    return form == "text" or (form == "auto" and os.isatty(STANDARD_OUTPUT))


class _Handler(logging.StreamHandler[TextIO]):
    """Writes log lines to standard error through `Lines`."""

    def say_dropped(self, number: int) -> str:
        said = {"name": __name__, "levelname": "WARNING", "msg": _DROPPED.format(number)}
        return self.format(logging.makeLogRecord(said))


def open_standard_streams() -> None:
    """Opens those that the process was started without. Otherwise a socket could get the number of one."""
    for descriptor in range(_STANDARD_ERROR + 1):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def set_up_logging() -> None:
    """Sets up the log on standard error. From now on neither logging nor writing to `sys.stderr` can block."""
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
    """Waits until all log lines are written, at most `_LAST_LINES` seconds."""
    lines = getattr(sys.stderr, "buffer", None)
    if isinstance(lines, Lines):
        lines.finish()


def log_as(config: Config) -> None:
    """Sets the level and the format of the log as `config` says."""
    for handler in logging.root.handlers:
        if isinstance(handler, _Handler):
            handler.setFormatter(_TEXT if wants_text(config.access_log.format) else _JSON)
            logging.root.setLevel(config.log.level.upper())
