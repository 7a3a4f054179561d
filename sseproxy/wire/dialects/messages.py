"""Anthropic's Messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from math import ceil
from typing import Final

import msgspec
from msgspec.structs import replace

from ...errors import ExchangeError
from ..deltas import text_under
from ..extract import wanted
from ..headers import Field
from ..meaning import (
    DELTA,
    END,
    FAILED,
    NOTHING,
    NULL,
    REASONING,
    UNREADABLE,
    Meaning,
    Rest,
    filled,
    read_rest,
    read_usage,
    text_of,
)
from .dialect import Dialect
from .style import COMMENT, Allowance, Style, document, event_with


class _Delta(msgspec.Struct, gc=False):
    text: msgspec.Raw = NULL
    thinking: msgspec.Raw = NULL
    partial_json: msgspec.Raw = NULL
    citation: msgspec.Raw = NULL
    content: msgspec.Raw = NULL
    stop_reason: msgspec.Raw = NULL


class _Block(msgspec.Struct, gc=False):
    type: str = ""
    text: msgspec.Raw = NULL
    thinking: msgspec.Raw = NULL
    content: msgspec.Raw = NULL


class _Message(msgspec.Struct, gc=False):
    usage: msgspec.Raw = NULL


class _MessageEvent(msgspec.Struct, gc=False):
    type: str = ""
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: msgspec.Raw = NULL
    stop_reason: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


# Blocks whose content comes in deltas, and those that say something else. All others, calls of tools, their results,
# what is redacted, begin with something that was generated.
_EMPTY_AT_FIRST: Final = frozenset({"", "text", "thinking", "compaction", "fallback", "mcp_tool_listing"})
_decode_message_event: Final = msgspec.json.Decoder(_MessageEvent).decode
_MEMBERS: Final = wanted(_MessageEvent, Rest)


def read_message(kind: bytes, data: bytes) -> Meaning:
    """https://docs.anthropic.com/en/docs/build-with-claude/streaming

    Usage is in two events, `message_start` and `message_delta`. Its counts are cumulative.
    """
    try:
        event = _decode_message_event(data)
    except UNREADABLE:
        return read_rest(kind, data)
    delta = event.delta or _Delta()
    match event.type:
        case "content_block_delta":
            if filled(delta.thinking):
                return REASONING
            # A signature is none of it.
            parts = (delta.text, delta.partial_json, delta.citation, delta.content)
            return DELTA if any(map(filled, parts)) else NOTHING
        case "content_block_start":
            block = event.content_block or _Block()
            begun = any(map(filled, (block.text, block.thinking, block.content)))
            return DELTA if begun or block.type not in _EMPTY_AT_FIRST else NOTHING
        case "message_start":
            # What it tells of the output is before anything was generated.
            usage = read_usage(event.message.usage) if event.message is not None else None
            return Meaning(usage=None if usage is None else replace(usage, output=None, reasoning=None, final=False))
        case "message_delta":
            return Meaning(usage=read_usage(event.usage), finish=text_of(delta.stop_reason))
        case "message_stop":
            return END
        case "error":
            return FAILED
        case "message" | "":
            # An answer that is no stream, which some leave without its type; or a bare error.
            finish = text_of(event.stop_reason) if filled(event.stop_reason) else None
            error = kind == b"error" or filled(event.error)
            return Meaning(usage=read_usage(event.usage), finish=finish, error=error)
    return FAILED if kind == b"error" or filled(event.error) else NOTHING


# https://docs.anthropic.com/en/api/errors; another status below 500 is the client's fault, and from there on the API's.
_ERROR_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _error(error: ExchangeError) -> dict[str, object]:
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    return {"type": "error", "error": {"type": _ERROR_TYPES.get(error.status, usual), "message": error.message}}


def _allowances(allowances: Sequence[Allowance], now: float) -> list[Field]:
    """https://docs.anthropic.com/en/api/rate-limits#response-headers; a time is written as in RFC 3339."""
    return [
        (b"anthropic-ratelimit-%b-%b" % (allowance.kind.encode(), what), value)
        for allowance in allowances
        for what, value in (
            (b"limit", b"%d" % allowance.limit),
            (b"remaining", b"%d" % allowance.remaining),
            (b"reset", f"{datetime.fromtimestamp(ceil(now + allowance.reset), UTC):%Y-%m-%dT%H:%M:%SZ}".encode()),
        )
    ]


ANTHROPIC: Final = Style(
    COMMENT,
    lambda error: document(_error(error)),
    lambda error, number: event_with(_error(error)),
    re.compile(r"/messages/(?:count_tokens|batches)"),
    _allowances,
)


MESSAGES: Final = Dialect(
    "messages",
    # Messages of threads, and of stored completions, are OpenAI's.
    re.compile(
        r"^(?!.*/(?:threads|completions)(?:/[^/]*)?/messages$).*/messages$|:(?:streamR|r)awPredict$", re.IGNORECASE
    ),
    read_message,
    _MEMBERS,
    text_under("text", "thinking", "partial_json"),
    style=ANTHROPIC,
    natural="end_turn",
)
