"""Google's Gemini."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from ..deltas import text_under
from ..extract import wanted
from ..meaning import NULL, UNREADABLE, Meaning, Rest, filled, read_rest, read_usage, text_of
from .dialect import Dialect


class _Part(msgspec.Struct, gc=False):
    text: msgspec.Raw = NULL
    functionCall: msgspec.Raw = NULL
    inlineData: msgspec.Raw = NULL
    executableCode: msgspec.Raw = NULL
    codeExecutionResult: msgspec.Raw = NULL


class _Content(msgspec.Struct, gc=False):
    parts: list[_Part] | None = None


class _Candidate(msgspec.Struct, gc=False):
    content: _Content | None = None
    finishReason: msgspec.Raw = NULL


class _Generation(msgspec.Struct, gc=False):
    candidates: list[_Candidate] | None = None
    usageMetadata: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


_decode_generation: Final = msgspec.json.Decoder(_Generation).decode
_MEMBERS: Final = wanted(_Generation, Rest)


def _generated_part(part: _Part) -> bool:
    return any(
        map(filled, (part.text, part.functionCall, part.inlineData, part.executableCode, part.codeExecutionResult))
    )


def read_gemini(kind: bytes, data: bytes) -> Meaning:
    """https://ai.google.dev/api/generate-content

    There is no end marker. The last event has a finish reason.
    """
    try:
        event = _decode_generation(data)
    except UNREADABLE:
        return read_rest(kind, data)
    candidates = event.candidates or []
    contents = [candidate.content for candidate in candidates if candidate.content is not None]
    finish = next((text_of(candidate.finishReason) for candidate in candidates if filled(candidate.finishReason)), None)
    delta = any(_generated_part(part) for content in contents for part in content.parts or ())
    return Meaning(
        delta=delta,
        usage=read_usage(event.usageMetadata),
        finish=finish,
        end=finish is not None,
        error=filled(event.error),
        more=delta and finish is None,
    )


GEMINI: Final = Dialect(
    "gemini", re.compile(r":(streamG|g)enerateContent$"), read_gemini, _MEMBERS, text_under("text"), large=True
)
