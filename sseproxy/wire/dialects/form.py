"""The form of what sseproxy itself sends to the clients of an API: heartbeats, error responses and error events."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from ...errors import ExchangeError


class Form(NamedTuple):
    """How a client is told that its stream goes on, or that something failed.

    `heartbeat` is written between two events. It is a comment, or an event that clients ignore. `refusal(error)` is the
    body of an error response. `farewell(error, number)` is the event that says why a stream ends after `number` events.
    `paths` are the paths of the API that no dialect reads.
    """

    heartbeat: bytes
    refusal: Callable[[ExchangeError], bytes]
    farewell: Callable[[ExchangeError, int], bytes]
    paths: re.Pattern[str]


def document(content: dict[str, object]) -> bytes:
    """`content` as the body of a response."""
    return json.dumps(content).encode() + b"\n"


def error_event(content: dict[str, object]) -> bytes:
    """`content` as an event of the type `error`."""
    return b"event: error\ndata: " + json.dumps(content).encode() + b"\n\n"


def openai_error(error: ExchangeError) -> dict[str, object]:
    """The error object of an OpenAI-compatible API."""
    return {"message": error.message, "type": error.type, "param": None, "code": error.code}


def _openai_refusal(error: ExchangeError) -> bytes:
    return document({"error": openai_error(error)})


def _openai_farewell(error: ExchangeError, number: int) -> bytes:
    # `event: error` together with a nested `error` is the one form on which every SDK of OpenAI raises, whatever
    # follows it on the connection.
    return error_event({"type": "error", "error": openai_error(error)})


# One line and no blank one: with a blank line, openai for Python fails on streams that have used `id`.
COMMENT: Final = b": heartbeat\n"
OPENAI: Final = Form(COMMENT, _openai_refusal, _openai_farewell, re.compile(r""))
