"""The access log: one line for each exchange that has ended. Never content, keys, paths or queries.

Lines are records of the logger `sseproxy.access`. They are collected, and written by a thread every so often, so that
whoever reads them, or does not, holds up no exchange.
"""

from __future__ import annotations

import logging
import queue
import random
import statistics
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from ..config import AccessLog as Options
from ..errors import Outcome
from ..relay.exchange import Exchange

_logger: Final = logging.getLogger("sseproxy.access")
# Bytes that wait for a reader that does not read; what is more is dropped, and counted.
_MAX_WAITING: Final = 1 << 20
# Of the name of a model, or a finish reason.
_MAX_NAME: Final = 128
# How long the end of the process waits for the last lines to be taken.
_LAST_LINES: Final = 1.0


def _shown(said_by_others: str | None) -> str | None:
    """What a client or an upstream calls something, so that it is harmless in a line."""
    if said_by_others is None:
        return None
    return "".join(c if c.isprintable() else "?" for c in said_by_others[:_MAX_NAME])


def describe(exchange: Exchange) -> dict[str, Any]:
    """What a line says of `exchange`, in its order; what is not known is not in it. Durations are in seconds."""
    received_at = exchange.received_at

    def since(instant: float | None) -> float | None:
        return None if instant is None else round(instant - received_at, 6)

    gaps = exchange.gaps
    usage = {} if exchange.usage is None else {k: v for k, v in exchange.usage._asdict().items() if v is not None}
    said = {
        "request_id": exchange.request_id,
        "client": exchange.client,
        "route": exchange.route,
        "upstream": exchange.upstream,
        "api": exchange.api,
        "model": _shown(exchange.model),
        "method": exchange.method,
        "status": exchange.status,
        "outcome": exchange.outcome,
        "reason": exchange.reason,
        "stream": exchange.is_stream,
        "head_seconds": since(exchange.head_at),
        "first_token_seconds": since(exchange.first_token_at),
        "duration_seconds": since(exchange.ended_at),
        "gap_p50_seconds": round(statistics.median(gaps), 6) if gaps else None,
        "gap_max_seconds": round(exchange.longest_gap, 6) if gaps else None,
        "events": exchange.events if exchange.is_stream else None,
        "request_bytes": exchange.request_bytes,
        "response_bytes": exchange.response_bytes,
        "usage": usage,
        "finish_reason": _shown(exchange.finish_reason),
        "traceparent": exchange.traceparent,
    }
    return {name: value for name, value in said.items() if value not in (None, "", {})}


def _at(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, beginning with the time at which the exchange ended (RFC 3339)."""

    def format(self, record: logging.LogRecord) -> str:
        time = _at(record).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return msgspec.json.encode({"time": time, **record.__dict__["said"]}).decode()


class TextFormatter(logging.Formatter):
    """For people who watch a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        said = record.__dict__["said"]
        if "dropped" in said:
            return f"{_at(record):%H:%M:%S} {said['dropped']} lines were dropped: nobody read them"
        usage = said.get("usage", {})
        parts = [
            f"{_at(record):%H:%M:%S} {said.get('status', '---')} {said['outcome']:<22}",
            f"{said.get('route', '-')} -> {said.get('upstream', '-')}",
            said.get("model", ""),
            f"first token {said['first_token_seconds']:.2f}s" if "first_token_seconds" in said else "",
            f"total {said['duration_seconds']:.2f}s",
            f"{said['events']} events" if "events" in said else "",
            f"tokens {usage.get('input', '?')}+{usage.get('output', '?')}" if usage else "",
            said.get("reason", ""),
            said["request_id"],
        ]
        return "  ".join(filter(None, parts))


class _Batches(logging.Handler):
    """Collects lines; `write` is called with many at once, in a thread of its own."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        super().__init__()
        self._write = write
        self._lines: list[str] = []
        self._size = 0
        self._waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._dropped = 0
        threading.Thread(target=self._run, name="access-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._size > _MAX_WAITING:
            self._dropped += 1
            return
        line = self.format(record)
        self._lines.append(line)
        self._size += len(line)

    def take_dropped(self) -> int:
        """How many lines were dropped, once there is room again to say so."""
        if self._size:
            return 0
        dropped, self._dropped = self._dropped, 0
        return dropped

    def flush(self) -> None:
        """Hands over what was collected, unless what was handed over before is still being written."""
        if self._lines and self._idle.is_set():
            self._idle.clear()
            self._waiting.put("".join(f"{line}\n" for line in self._lines).encode())
            self._lines.clear()
            self._size = 0

    def finish(self) -> None:
        """Writes the last lines, if somebody takes them."""
        self._idle.wait(_LAST_LINES)
        self.flush()
        self._idle.wait(_LAST_LINES)

    def _run(self) -> None:
        while True:
            batch = self._waiting.get()
            try:
                self._write(batch)
            except OSError:
                # Whoever read has gone; there is nobody to tell.
                pass
            finally:
                self._idle.set()


class AccessLog:
    """Writes what `options` want to know. `write` takes bytes, and may wait for whoever reads them."""

    def __init__(self, options: Options, write: Callable[[bytes], object], *, terminal: bool) -> None:
        self._all = options.exchanges == "all"
        self._sample = options.sample
        self._handler = _Batches(write)
        text = options.format == "text" or (options.format == "auto" and terminal)
        self._handler.setFormatter(TextFormatter() if text else JsonFormatter())
        _logger.setLevel(logging.INFO)
        _logger.propagate = False
        _logger.handlers = [self._handler]

    def ended(self, exchange: Exchange) -> None:
        """An exchange has its outcome."""
        if exchange.outcome is Outcome.COMPLETED and (exchange.status or 0) < 400:
            if not self._all or (self._sample < 1 and random.random() >= self._sample):
                return
        dropped = self._handler.take_dropped()
        if dropped:
            _logger.warning("dropped", extra={"said": {"dropped": dropped}})
        _logger.info("ended", extra={"said": describe(exchange)})

    def flush(self) -> None:
        self._handler.flush()

    def close(self) -> None:
        self._handler.finish()


def to_standard_output(options: Options) -> AccessLog | None:
    """The access log of a process; None if none is wanted."""
    if options.exchanges == "off":
        return None
    out = sys.stdout.buffer

    def write(batch: bytes) -> None:
        out.write(batch)
        out.flush()

    return AccessLog(options, write, terminal=sys.stdout.isatty())
