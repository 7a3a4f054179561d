"""OpenAI's Assistants: threads and their runs."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from ..deltas import text_under
from ..extract import wanted
from ..meaning import (
    DELTA,
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


class _Value(msgspec.Struct, gc=False):
    value: msgspec.Raw = NULL


class _Piece(msgspec.Struct, gc=False):
    type: str = ""
    text: _Value | None = None


class _ThreadDelta(msgspec.Struct, gc=False):
    content: list[_Piece] | None = None
    step_details: msgspec.Raw = NULL


class _ThreadEvent(msgspec.Struct, gc=False):
    id: msgspec.Raw = NULL
    object: str = ""
    status: msgspec.Raw = NULL
    delta: _ThreadDelta | None = None
    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


_decode_thread_event: Final = msgspec.json.Decoder(_ThreadEvent).decode
_MEMBERS: Final = wanted(_ThreadEvent, Rest)
_RUN_ENDS: Final = frozenset({"completed", "incomplete", "failed", "cancelled", "expired", "requires_action"})


def read_run(kind: bytes, data: bytes) -> Meaning:
    """https://platform.openai.com/docs/api-reference/assistants-streaming

    The usage of a run includes the usage of its steps, so that of the steps is not read.
    """
    if kind == b"error":
        return FAILED
    try:
        event = _decode_thread_event(data)
    except UNREADABLE:
        return read_rest(kind, data)
    if filled(event.error) and not event.object:
        return FAILED
    if event.object == "thread.run":
        status = text_of(event.status)
        return Meaning(
            usage=read_usage(event.usage),
            finish=status if status in _RUN_ENDS else None,
            error=status == "failed",
            kept_as=text_of(event.id),
        )
    delta = event.delta or _ThreadDelta()
    pieces = delta.content or []
    if filled(delta.step_details) or any(piece.text is None or filled(piece.text.value) for piece in pieces):
        return DELTA
    return NOTHING


ASSISTANTS: Final = Dialect(
    "assistants",
    re.compile(r"/threads/(runs|[^/]+/runs(/[^/]+(/submit_tool_outputs)?)?)$", re.IGNORECASE),
    read_run,
    _MEMBERS,
    text_under("value", "arguments"),
    keeps=True,
)
