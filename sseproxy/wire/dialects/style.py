"""The style of what sseproxy itself sends to the clients of an API: heartbeats, error responses and error events."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from math import ceil
from typing import Final, Literal

from msgspec import Struct

from ...errors import ExchangeError
from ..headers import Field


class Allowance(Struct, frozen=True, gc=False):
    """What a client may still use of `kind`, requests or tokens: `remaining` of `limit`, and all in `reset` seconds."""

    kind: Literal["requests", "tokens"]
    limit: int
    remaining: int
    reset: float


_OPENAI_FIELDS: Final = {
    kind: tuple(f"x-ratelimit-{what}-{kind}".encode() for what in ("limit", "remaining", "reset"))
    for kind in ("requests", "tokens")
}


def _openai_allowances(allowances: Sequence[Allowance], now: float) -> list[Field]:
    """https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers; a time is written as in Go."""
    found: list[Field] = []
    for allowance in allowances:
        limit, remaining, reset = _OPENAI_FIELDS[allowance.kind]
        found += (
            (limit, b"%d" % allowance.limit),
            (remaining, b"%d" % allowance.remaining),
            (reset, b"%dms" % ceil(allowance.reset * 1000)),
        )
    return found


class Style(Struct, frozen=True):
    """How a client is told that its stream goes on, that something failed, or how much it may still use.

    `heartbeat` is written between two events. It is a comment, or an event that clients ignore. `refusal(error)` is the
    body of an error response. `error_event(error, number)` says why a stream ends after `number` events. `paths` are
    the paths of the API that no dialect reads. `allowances(allowances, now)` are header fields; `now` is the Unix time.
    """

    heartbeat: bytes
    refusal: Callable[[ExchangeError], bytes]
    error_event: Callable[[ExchangeError, int], bytes]
    paths: re.Pattern[str]
    allowances: Callable[[Sequence[Allowance], float], list[Field]] = _openai_allowances


def document(content: dict[str, object]) -> bytes:
    """`content` as the body of a response."""
    return json.dumps(content).encode() + b"\n"


def event_with(content: dict[str, object]) -> bytes:
    """`content` as an event of the type `error`."""
    return b"event: error\ndata: " + json.dumps(content).encode() + b"\n\n"


def openai_error(error: ExchangeError) -> dict[str, object]:
    """The error object of an OpenAI-compatible API."""
    return {"message": error.message, "type": error.type, "param": None, "code": error.code}


def _openai_refusal(error: ExchangeError) -> bytes:
    return document({"error": openai_error(error)})


def _openai_error_event(error: ExchangeError, number: int) -> bytes:
    # `event: error` together with a nested `error` makes every SDK of OpenAI raise, whatever
    # follows it on the connection.
    return event_with({"type": "error", "error": openai_error(error)})


# One line and no blank one: with a blank line, openai for Python fails on streams that have used `id`.
COMMENT: Final = b": heartbeat\n"
OPENAI: Final = Style(COMMENT, _openai_refusal, _openai_error_event, re.compile(r""))
