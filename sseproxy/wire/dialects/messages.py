"""Anthropic's Messages."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from ..deltas import text_under
from ..extract import wanted
from ..meaning import (
    DELTA,
    END,
    FAILED,
    NOTHING,
    NULL,
    UNREADABLE,
    Meaning,
    Rest,
    filled,
    read_rest,
    read_usage,
    text_of,
)
from .dialect import Dialect


class _Block(msgspec.Struct, gc=False):
    text: msgspec.Raw = NULL
    thinking: msgspec.Raw = NULL
    partial_json: msgspec.Raw = NULL
    citation: msgspec.Raw = NULL
    stop_reason: msgspec.Raw = NULL


class _Message(msgspec.Struct, gc=False):
    usage: msgspec.Raw = NULL


class _MessageEvent(msgspec.Struct, gc=False):
    type: str = ""
    message: _Message | None = None
    delta: _Block | None = None
    usage: msgspec.Raw = NULL
    stop_reason: msgspec.Raw = NULL


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
    delta = event.delta or _Block()
    match event.type:
        case "content_block_delta":
            parts = (delta.text, delta.thinking, delta.partial_json, delta.citation)
            return DELTA if any(map(filled, parts)) else NOTHING
        case "message_start":
            return Meaning(usage=read_usage(event.message.usage) if event.message is not None else None)
        case "message_delta":
            return Meaning(usage=read_usage(event.usage), finish=text_of(delta.stop_reason), overlay=True)
        case "message_stop":
            return END
        case "error":
            return FAILED
        case "message":
            return Meaning(usage=read_usage(event.usage), finish=text_of(event.stop_reason))
    return FAILED if kind == b"error" else NOTHING


MESSAGES: Final = Dialect(
    "messages",
    re.compile(r"(?<!/threads)/messages$|:streamRawPredict$"),
    read_message,
    _MEMBERS,
    text_under("text", "thinking", "partial_json"),
)
