"""The access log: one line for each exchange that has ended. Never content, keys or queries.

Lines are collected, and regularly given to a thread that writes them. So writing never blocks an exchange.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ..errors import Outcome
from ..relay.exchange import Exchange
from .logs import STANDARD_OUTPUT, Lines, wants_text

if TYPE_CHECKING:
    from ..config import AccessLog as Options

# Characters of names, causes and paths in a line. With these limits, a line fits into one atomic write (`logs`).
_MAX_NAME: Final = 128
_MAX_CAUSE: Final = 300
_MAX_PATH: Final = 512
# The fixed segments in the paths of known APIs. Other segments may be ids or names of users.
_WORDS: Final = frozenset(
    (
        "v1 v1beta v1alpha v2 api openai anthropic chat completions responses embeddings models files uploads batches "
        "images generations edits variations audio speech transcriptions translations moderations fine_tuning jobs "
        "vector_stores file_batches assistants threads messages runs steps submit_tool_outputs cancel content search "
        "count_tokens conversations items input_items input_tokens compact realtime sessions client_secrets containers "
        "evals organization projects locations publishers google deployments cachedContents operations rerank score "
        "tokenize detokenize generate generateContent streamGenerateContent countTokens embedContent "
        "batchEmbedContents predict rawPredict streamRawPredict parts complete events checkpoints videos health"
    ).split()
)


def shown(said_by_others: str | None, most: int = _MAX_NAME) -> str | None:
    """Text from a client or an upstream, shortened, and without control characters."""
    if said_by_others is None:
        return None
    return "".join(c if c.isprintable() else "?" for c in said_by_others[:most])


def _whole_path(path: str) -> str | None:
    return shown(path, _MAX_PATH)


# Cached, because most requests have one of a few paths.
@functools.lru_cache(maxsize=64)
def _known_path(path: str) -> str:
    """`path` with `*` for each segment that is not in `_WORDS`, because it may be an id, a name or a secret."""
    return "/".join(map(_known_segment, path[:_MAX_PATH].split("/")))


def _known_segment(segment: str) -> str:
    # A segment of Gemini's API may be `MODEL:METHOD`.
    name, colon, verb = segment.partition(":")
    return (name if name in _WORDS or not name else "*") + (colon + (verb if verb in _WORDS else "*") if colon else "")


_PATHS: Final[Mapping[str, Callable[[str], str | None]]] = {
    "known": _known_path,
    "all": _whole_path,
    "off": lambda path: None,
}


def describe(exchange: Exchange, paths: Callable[[str], str | None] = _known_path) -> dict[str, Any]:
    """The fields of the line for `exchange`, in their order, without unknown ones. Durations are in seconds.

    `paths` turns the path into what may be logged of it.
    """
    received_at = exchange.received_at

    def since(instant: float | None) -> float | None:
        return None if instant is None else round(instant - received_at, 6)

    gaps = exchange.gaps
    usage = {} if exchange.usage is None else exchange.usage.told()
    said = {
        "request_id": exchange.request_id,
        "upstream_request_id": None if exchange.upstream_request_id is None else exchange.upstream_request_id.decode(),
        "client": exchange.client,
        "client_name": exchange.client_name,
        "route": exchange.route,
        "upstream": exchange.upstream,
        "endpoint": exchange.endpoint,
        "attempts": exchange.attempts if exchange.endpoint else None,
        "api": exchange.api,
        "model": shown(exchange.model),
        "method": shown(exchange.method),
        "path": paths(exchange.path),
        "status": exchange.status,
        "outcome": exchange.outcome,
        "reason": exchange.reason,
        "cause": shown(exchange.cause, _MAX_CAUSE),
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
        "finish_reason": shown(exchange.finish_reason),
        "traceparent": exchange.traceparent,
    }
    return {name: value for name, value in said.items() if value not in (None, "", {})}


def _json(at: datetime, said: Mapping[str, object]) -> bytes:
    """A JSON object. Its first field is the time at which the exchange ended (RFC 3339)."""
    time = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return msgspec.json.encode({"time": time, **said})


def _text(at: datetime, said: Mapping[str, Any]) -> bytes:
    """A line for a terminal."""
    if "dropped" in said:
        return f"{at:%H:%M:%S} {said['dropped']} lines were dropped: nobody read them".encode()
    usage = said.get("usage", {})
    parts = [
        f"{at:%H:%M:%S} {said.get('status', '---')} {said['outcome']:<22}",
        f"{said.get('route', '-')} -> {said.get('upstream', '-')}",
        said.get("model", ""),
        f"first token {said['first_token_seconds']:.2f}s" if "first_token_seconds" in said else "",
        f"total {said['duration_seconds']:.2f}s",
        f"{said['events']} events" if "events" in said else "",
        f"tokens {usage.get('input', '?')}+{usage.get('output', '?')}" if usage else "",
        said.get("reason", ""),
        said.get("cause", ""),
        said["request_id"],
    ]
    return "  ".join(filter(None, parts)).encode()


class AccessLog:
    """Writes the access log to `descriptor`, as `options` say."""

    def __init__(self, options: Options, descriptor: int = STANDARD_OUTPUT) -> None:
        self._all = options.exchanges == "all"
        self._sample = options.sample
        self._paths = _PATHS[options.path]
        self._spell = _text if wants_text(options.format) else _json
        self._lines = Lines(descriptor, lambda number: self._line({"dropped": number}).decode())

    def ended(self, exchange: Exchange) -> None:
        """Writes the line for an exchange that has ended, unless `options` leave it out."""
        if exchange.outcome is Outcome.COMPLETED and (exchange.status or 0) < 400:
            if not self._all or (self._sample < 1 and random.random() >= self._sample):
                return
        self._lines.write(self._line(describe(exchange, self._paths)) + b"\n")

    def _line(self, said: Mapping[str, object]) -> bytes:
        return self._spell(datetime.now(UTC), said)

    def flush(self) -> None:
        """Lets the thread write the collected lines."""
        self._lines.flush()

    def close(self) -> None:
        """Waits up to a second until the last lines are written."""
        self._lines.finish()


def to_standard_output(options: Options) -> AccessLog | None:
    """The access log on standard output. None if it is off."""
    return None if options.exchanges == "off" else AccessLog(options)
