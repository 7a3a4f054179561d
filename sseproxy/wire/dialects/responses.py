"""OpenAI's Responses."""

from __future__ import annotations

import re
from typing import Final

import msgspec
from msgspec.structs import replace

from ...errors import ExchangeError
from ..deltas import text_under
from ..extract import wanted
from ..meaning import (
    DELTA,
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
from .style import OPENAI, event_with, openai_error


class _Answer(msgspec.Struct, gc=False):
    id: msgspec.Raw = NULL
    status: msgspec.Raw = NULL
    background: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


class _Item(msgspec.Struct, gc=False):
    type: str = ""


class _Part(msgspec.Struct, gc=False):
    text: msgspec.Raw = NULL


class _ResponseEvent(_Answer, gc=False):
    """An event, or an answer that is no stream."""

    type: str = ""
    delta: msgspec.Raw = NULL
    partial_image_b64: msgspec.Raw = NULL
    response: _Answer | None = None
    item: _Item | None = None
    part: _Part | None = None


_decode_response_event: Final = msgspec.json.Decoder(_ResponseEvent).decode
_MEMBERS: Final = wanted(_ResponseEvent, Rest)
_RESPONSE_ENDS: Final = frozenset(
    {"response.completed", "response.incomplete", "response.failed", "response.cancelled", "response.done"}
)
_ENDED: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})
# What the model asks for, beside the calls.
_REQUESTS: Final = frozenset({"program", "mcp_approval_request"})


def _of_answer(answer: _Answer, *, end: bool) -> Meaning:
    """What `answer` says, which is in the last event, or all of the body."""
    status = text_of(answer.status)
    return Meaning(
        usage=read_usage(answer.usage),
        finish=status if end or status in _ENDED else None,
        end=end,
        error=status == "failed" or filled(answer.error),
        kept_as=text_of(answer.id) if bytes(answer.background) == b"true" else None,
    )


def read_response(kind: bytes, data: bytes) -> Meaning:
    """https://platform.openai.com/docs/api-reference/responses-streaming"""
    try:
        event = _decode_response_event(data)
    except UNREADABLE:
        return read_rest(kind, data)
    name = event.type
    if name in _RESPONSE_ENDS:
        meaning = _of_answer(event.response or _Answer(), end=True)
        failed = name == "response.failed" or filled(event.error)
        return replace(meaning, error=True) if failed else meaning
    if name == "error" or kind == b"error" or (name and filled(event.error)):
        return FAILED
    if name.endswith(".delta"):
        if not filled(event.delta):
            return NOTHING
        return REASONING if name == "response.reasoning_text.delta" else DELTA
    if name == "response.output_item.added":
        begun = event.item is not None and (event.item.type.endswith("_call") or event.item.type in _REQUESTS)
        return DELTA if begun else NOTHING
    if name == "response.content_part.added":
        return DELTA if event.part is not None and filled(event.part.text) else NOTHING
    if name == "response.image_generation_call.partial_image":
        return DELTA if filled(event.partial_image_b64) else NOTHING
    if name == "response.output_text.annotation.added":
        return DELTA
    return NOTHING if name else _of_answer(event, end=False)


def _error_event(error: ExchangeError, number: int) -> bytes:
    # The API has these fields at the top level; the SDKs raise on what is nested.
    flat = {"code": error.code, "message": error.message, "param": None}
    return event_with({"type": "error", "sequence_number": number, **flat, "error": openai_error(error)})


RESPONSES: Final = Dialect(
    "responses",
    re.compile(r"/responses(/(?!input_tokens$)[^/]+(/cancel)?)?$", re.IGNORECASE),
    read_response,
    _MEMBERS,
    text_under("delta"),
    style=replace(OPENAI, error_event=_error_event),
    keeps=True,
    natural="completed",
)
