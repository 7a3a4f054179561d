"""Chat completions and completions, and APIs with the same format."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from ..deltas import text_under
from ..extract import wanted
from ..meaning import DELTA, END, NOTHING, NULL, UNREADABLE, Meaning, Rest, filled, read_rest, read_usage, text_of
from .dialect import Dialect


class _Delta(msgspec.Struct, gc=False):
    content: msgspec.Raw = NULL
    reasoning_content: msgspec.Raw = NULL
    reasoning: msgspec.Raw = NULL
    refusal: msgspec.Raw = NULL
    tool_calls: msgspec.Raw = NULL
    function_call: msgspec.Raw = NULL
    audio: msgspec.Raw = NULL
    images: msgspec.Raw = NULL


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: msgspec.Raw = NULL
    finish_reason: msgspec.Raw = NULL


class _Groq(msgspec.Struct, gc=False):
    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = NULL
    x_groq: _Groq | None = None
    error: msgspec.Raw = NULL


class _Kind(msgspec.Struct, gc=False):
    object: msgspec.Raw = NULL


_decode_kind: Final = msgspec.json.Decoder(_Kind).decode
_decode_chunk: Final = msgspec.json.Decoder(_Chunk).decode
_MEMBERS: Final = wanted(_Chunk, _Kind, Rest)


def _generated(choice: _Choice) -> bool:
    delta = choice.delta
    return filled(choice.text) or (
        delta is not None
        and (
            # The most frequent ones first.
            filled(delta.content)
            or filled(delta.reasoning_content)
            or filled(delta.reasoning)
            or filled(delta.tool_calls)
            or filled(delta.refusal)
            or filled(delta.function_call)
            or filled(delta.audio)
            or filled(delta.images)
        )
    )


def _is_error(data: bytes) -> bool:
    """Whether `data` is an object of type `error`, as older versions of vLLM and FastChat send it."""
    try:
        return text_of(_decode_kind(data).object) == "error"
    except UNREADABLE:
        return False


def read_completion(kind: bytes, data: bytes) -> Meaning:
    """https://platform.openai.com/docs/api-reference/chat-streaming, and the deviations of other servers."""
    if data == b"[DONE]":
        return END
    try:
        chunk = _decode_chunk(data)
    except UNREADABLE:
        return read_rest(kind, data)
    delta, finish = False, None
    for choice in chunk.choices or ():
        delta = delta or _generated(choice)
        if filled(choice.finish_reason):
            finish = text_of(choice.finish_reason) or finish
    usage = read_usage(chunk.usage)
    if usage is None and chunk.x_groq is not None:
        usage = read_usage(chunk.x_groq.usage)
    # OpenRouter reports an error as the finish reason.
    error = kind == b"error" or filled(chunk.error) or finish == "error"
    error |= chunk.x_groq is not None and filled(chunk.x_groq.error)
    if chunk.choices is None and not error:
        error = _is_error(data)
    if usage is None and finish is None and not error:
        return DELTA if delta else NOTHING
    return Meaning(delta, usage, finish, error=error)


_TEXT: Final = text_under("content", "reasoning_content", "reasoning", "text", "arguments")
CHAT: Final = Dialect("chat", re.compile(r"/chat/completions$"), read_completion, _MEMBERS, _TEXT, asks_usage=True)
COMPLETIONS: Final = Dialect(
    "completions", re.compile(r"/completions$"), read_completion, _MEMBERS, _TEXT, asks_usage=True
)
GENERIC: Final = Dialect("generic", re.compile(r""), read_completion, _MEMBERS, _TEXT, generates=False)
