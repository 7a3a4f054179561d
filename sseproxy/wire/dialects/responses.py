"""OpenAI's Responses."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from ...errors import ExchangeError
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
from .form import OPENAI, error_event, openai_error


class _Response(msgspec.Struct, gc=False):
    status: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL


class _ResponseEvent(msgspec.Struct, gc=False):
    type: str = ""
    delta: msgspec.Raw = NULL
    partial_image_b64: msgspec.Raw = NULL
    response: _Response | None = None
    status: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


_decode_response_event: Final = msgspec.json.Decoder(_ResponseEvent).decode
_MEMBERS: Final = wanted(_ResponseEvent, Rest)
_RESPONSE_ENDS: Final = frozenset(
    {"response.completed", "response.incomplete", "response.failed", "response.cancelled"}
)


def read_response(kind: bytes, data: bytes) -> Meaning:
    """https://platform.openai.com/docs/api-reference/responses-streaming"""
    if data == b"[DONE]":
        return END
    try:
        event = _decode_response_event(data)
    except UNREADABLE:
        return read_rest(kind, data)
    if event.type in _RESPONSE_ENDS:
        response = event.response or _Response()
        return Meaning(
            usage=read_usage(response.usage),
            finish=text_of(response.status),
            end=True,
            error=event.type == "response.failed",
        )
    if event.type == "error" or kind == b"error" or (not event.type and filled(event.error)):
        return FAILED
    if event.type.endswith(".delta"):
        return DELTA if filled(event.delta) else NOTHING
    if filled(event.partial_image_b64):
        return DELTA
    return NOTHING if event.type else Meaning(usage=read_usage(event.usage), finish=text_of(event.status))


def _farewell(error: ExchangeError, number: int) -> bytes:
    # The API has these fields at the top level; the SDKs raise on what is nested.
    flat = {"code": error.code, "message": error.message, "param": None}
    return error_event({"type": "error", "sequence_number": number, **flat, "error": openai_error(error)})


RESPONSES: Final = Dialect(
    "responses",
    re.compile(r"/responses(/[^/]+)?$"),
    read_response,
    _MEMBERS,
    text_under("delta"),
    large=True,
    form=OPENAI._replace(farewell=_farewell),
)
