"""The access log: one line for each exchange that has ended. Never content, keys or queries.

Lines are collected, and regularly given to a thread that writes them. So writing never blocks an exchange.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from ..errors import Outcome
from ..relay.exchange import Exchange
from ..wire.credentials import without_secrets
from ..wire.meaning import Usage
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
    """Text from a client or an upstream, shortened, and without control characters and keys."""
    if not said_by_others:
        return None
    said = without_secrets(said_by_others)[:most]
    return said if said.isprintable() else "".join(c if c.isprintable() else "?" for c in said)


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


class Entry(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True, gc=False):
    """An exchange in the log, with its fields in this order. Unknown ones are left out. Durations are in seconds."""

    time: str
    """When it ended (RFC 3339)."""
    request_id: str
    upstream_request_id: str | None = None
    client: str | None = None
    client_name: str | None = None
    route: str | None = None
    upstream: str | None = None
    endpoint: str | None = None
    attempts: int | None = None
    api: str | None = None
    model: str | None = None
    method: str | None = None
    path: str | None = None
    status: int | None = None
    outcome: str | None = None
    reason: str | None = None
    cause: str | None = None
    stream: bool
    head_seconds: float | None = None
    first_token_seconds: float | None = None
    duration_seconds: float
    gap_p50_seconds: float | None = None
    gap_max_seconds: float | None = None
    events: int | None = None
    request_bytes: int
    response_bytes: int
    usage: Usage | None = None
    finish_reason: str | None = None
    traceparent: str | None = None


class Dropped(msgspec.Struct, frozen=True):
    """An entry that says how many lines were dropped, because nobody read them."""

    time: str
    dropped: int


def describe(exchange: Exchange, at: datetime, paths: Callable[[str], str | None] = _known_path) -> Entry:
    """The entry for `exchange`, which ended `at` this time.

    `paths` turns the path into what may be logged of it.
    """
    received_at, head_at, token_at = exchange.received_at, exchange.head_at, exchange.first_token_at
    upstream_id, gaps, usage = exchange.upstream_request_id, exchange.gaps, exchange.usage
    assert exchange.ended_at is not None
    return Entry(
        time=_timestamp(at),
        request_id=exchange.request_id,
        upstream_request_id=None if upstream_id is None else upstream_id.decode(),
        client=exchange.client or None,
        client_name=exchange.client_name or None,
        route=exchange.route or None,
        upstream=exchange.upstream or None,
        endpoint=exchange.endpoint or None,
        attempts=exchange.attempts if exchange.endpoint else None,
        api=exchange.api or None,
        model=shown(exchange.model),
        method=shown(exchange.method),
        path=paths(exchange.path) or None,
        status=exchange.status,
        outcome=exchange.outcome,
        reason=exchange.reason,
        cause=shown(exchange.cause, _MAX_CAUSE),
        stream=exchange.is_stream,
        head_seconds=None if head_at is None else round(head_at - received_at, 6),
        first_token_seconds=None if token_at is None else round(token_at - received_at, 6),
        duration_seconds=round(exchange.ended_at - received_at, 6),
        gap_p50_seconds=round(statistics.median(gaps), 6) if gaps else None,
        gap_max_seconds=round(exchange.longest_gap, 6) if gaps else None,
        events=exchange.events if exchange.is_stream else None,
        request_bytes=exchange.request_bytes,
        response_bytes=exchange.response_bytes,
        # It leaves out what is not known; whether the counts are the last ones is not told.
        usage=usage if usage is None or usage.final else msgspec.structs.replace(usage, final=True),
        finish_reason=shown(exchange.finish_reason),
        traceparent=exchange.traceparent,
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _timestamp(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


_json: Final = msgspec.json.Encoder().encode


def _text(said: Entry | Dropped) -> bytes:
    """A line for a terminal."""
    time = said.time[len("2026-01-01T") : -len(".000Z")]
    if isinstance(said, Dropped):
        return f"{time} {said.dropped} lines were dropped: nobody read them".encode()
    usage, first_token = said.usage, said.first_token_seconds
    parts = [
        f"{time} {said.status or '---'} {said.outcome:<22}",
        f"{said.route or '-'} -> {said.upstream or '-'}",
        said.model,
        f"first token {first_token:.2f}s" if first_token is not None else None,
        f"total {said.duration_seconds:.2f}s",
        f"{said.events} events" if said.events is not None else None,
        f"tokens {_or_unknown(usage.input)}+{_or_unknown(usage.output)}" if usage is not None else None,
        said.reason,
        said.cause,
        said.request_id,
    ]
    return "  ".join(filter(None, parts)).encode()


def _or_unknown(count: int | None) -> str:
    return "?" if count is None else str(count)


class AccessLog:
    """Writes the access log to `descriptor`, as `options` say."""

    def __init__(self, options: Options, descriptor: int = STANDARD_OUTPUT) -> None:
        self._all = options.exchanges == "all"
        self._sample = options.sample
        self._paths = _PATHS[options.path]
        self._write: Callable[[Entry | Dropped], bytes] = _text if wants_text(options.format) else _json
        self._lines = Lines(descriptor, lambda number: self._write(Dropped(_timestamp(_now()), number)).decode())

    def ended(self, exchange: Exchange) -> None:
        """Writes the line for an exchange that has ended, unless `options` leave it out."""
        if exchange.outcome is Outcome.COMPLETED and (exchange.status or 0) < 400:
            if not self._all or (self._sample < 1 and random.random() >= self._sample):
                return
        self._lines.add(self._write(describe(exchange, _now(), self._paths)))

    def flush(self) -> None:
        """Lets the thread write the collected lines."""
        self._lines.flush()

    def close(self) -> None:
        """Waits up to a second until the last lines are written."""
        self._lines.finish()


def to_standard_output(options: Options) -> AccessLog | None:
    """The access log on standard output. None if it is off."""
    return None if options.exchanges == "off" else AccessLog(options)
