"""Google's Gemini."""

from __future__ import annotations

import json
import re
from typing import Final

import msgspec
from msgspec.structs import replace

from ...errors import ExchangeError
from ..deltas import text_under
from ..extract import wanted
from ..meaning import NULL, UNREADABLE, Meaning, Rest, filled, read_rest, read_usage, text_of
from .dialect import Dialect
from .style import Style, document


class _Part(msgspec.Struct, gc=False):
    text: msgspec.Raw = NULL
    thought: msgspec.Raw = NULL
    functionCall: msgspec.Raw = NULL
    functionResponse: msgspec.Raw = NULL
    toolCall: msgspec.Raw = NULL
    toolResponse: msgspec.Raw = NULL
    inlineData: msgspec.Raw = NULL
    fileData: msgspec.Raw = NULL
    executableCode: msgspec.Raw = NULL
    codeExecutionResult: msgspec.Raw = NULL


class _Content(msgspec.Struct, gc=False):
    parts: list[_Part] | None = None


class _Candidate(msgspec.Struct, gc=False):
    content: _Content | None = None
    finishReason: msgspec.Raw = NULL


class _Feedback(msgspec.Struct, gc=False):
    blockReason: msgspec.Raw = NULL


class _Generation(msgspec.Struct, gc=False):
    candidates: list[_Candidate] | None = None
    promptFeedback: _Feedback | None = None
    usageMetadata: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


class _Wrapped(_Generation, gc=False):
    """Code Assist has one in another."""

    response: _Generation | None = None


_decode_generation: Final = msgspec.json.Decoder(_Wrapped).decode
_MEMBERS: Final = wanted(_Wrapped, Rest)


def _generated(part: _Part) -> bool:
    made = (part.text, part.functionCall, part.toolCall, part.inlineData, part.executableCode)
    return any(map(filled, (*made, part.functionResponse, part.toolResponse, part.fileData, part.codeExecutionResult)))


def read_gemini(kind: bytes, data: bytes) -> Meaning:
    """https://ai.google.dev/api/generate-content

    There is no end marker. The last event has a finish reason.
    """
    try:
        outer = _decode_generation(data)
    except UNREADABLE:
        return read_rest(kind, data)
    event = outer.response or outer
    candidates = event.candidates or []
    contents = [candidate.content for candidate in candidates if candidate.content is not None]
    reasons = (text_of(candidate.finishReason) for candidate in candidates if filled(candidate.finishReason))
    finish = next(filter(None, reasons), None)
    if not candidates and event.promptFeedback is not None:
        finish = text_of(event.promptFeedback.blockReason)
    parts = [part for content in contents for part in content.parts or () if _generated(part)]
    usage = read_usage(event.usageMetadata)
    return Meaning(
        delta=bool(parts),
        usage=usage if usage is None or finish is not None else replace(usage, final=False),
        finish=finish,
        end=finish is not None,
        error=kind == b"error" or filled(event.error) or filled(outer.error),
        more=bool(parts) and finish is None,
        reasoning=any(bytes(part.thought) == b"true" for part in parts),
    )


# https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto has the HTTP status of each; another status
# below 500 is the client's fault, and from there on the API's.
_STATUSES: Final = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    429: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def _error(error: ExchangeError) -> dict[str, object]:
    status = _STATUSES.get(error.status, "INVALID_ARGUMENT" if error.status < 500 else "INTERNAL")
    return {"error": {"code": error.status, "message": error.message, "status": status}}


def _error_event(error: ExchangeError, number: int) -> bytes:
    # Google's clients take a line of another field than data for JSON. google-genai for Python looks for `error` as the
    # first member, and all look for a `code` that is a number.
    return b"data: " + json.dumps(_error(error)).encode() + b"\n\n"


GOOGLE: Final = Style(
    # They do so with a comment as well, or lose the event after it. A blank line is nothing to them.
    b"\n\n",
    lambda error: document(_error(error)),
    _error_event,
    # Below openai, and below an endpoint of Vertex AI, Google has OpenAI's API.
    re.compile(
        r":(?:count|compute|embed|generate|batch|asyncBatch|predict|fetchPredict)[A-Za-z]*$"
        r"|/v1(?:alpha|beta)[0-9]*/(?!openai/|projects/[^/]*/locations/[^/]*/endpoints/)"
    ),
)


GEMINI: Final = Dialect(
    "gemini",
    re.compile(r":(streamG|g)enerateContent$", re.IGNORECASE),
    read_gemini,
    _MEMBERS,
    text_under("text"),
    style=GOOGLE,
    natural="STOP",
)
