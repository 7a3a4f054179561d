"""Google's Gemini."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from ..alike import text_under
from ..extract import wanted
from ..meaning import NULL, UNREADABLE, Meaning, Rest, filled, read_rest, read_usage, text_of
from .dialect import Dialect


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
    """https://ai.google.dev/api/generate-content: no end marker; the finish reason comes with the last event."""
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
        usage=usage if usage is None or finish is not None else usage._replace(final=False),
        finish=finish,
        end=finish is not None,
        error=kind == b"error" or filled(event.error) or filled(outer.error),
        more=bool(parts) and finish is None,
        reasoning=any(bytes(part.thought) == b"true" for part in parts),
    )


GEMINI: Final = Dialect("gemini", re.compile(r":(streamG|g)enerateContent$"), read_gemini, _MEMBERS, text_under("text"))
