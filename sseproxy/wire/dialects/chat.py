"""Chat completions and completions, and APIs with the same format."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from ..deltas import text_under
from ..extract import wanted
from ..meaning import (
    DELTA,
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


class _Delta(msgspec.Struct, gc=False):
    content: msgspec.Raw = NULL
    reasoning_content: msgspec.Raw = NULL
    reasoning: msgspec.Raw = NULL
    refusal: msgspec.Raw = NULL
    tool_calls: msgspec.Raw = NULL
    function_call: msgspec.Raw = NULL
    audio: msgspec.Raw = NULL
    images: msgspec.Raw = NULL
    reasoning_text: msgspec.Raw = NULL
    reasoning_details: msgspec.Raw = NULL
    annotations: msgspec.Raw = NULL


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: msgspec.Raw = NULL
    message: _Delta | None = None
    finish_reason: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL


class _Groq(msgspec.Struct, gc=False):
    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


class Chunk(msgspec.Struct, gc=False):
    """What is read of a chunk."""

    choices: list[_Choice] | None = None
    usage: msgspec.Raw = NULL
    x_groq: _Groq | None = None
    error: msgspec.Raw = NULL


class _Kind(msgspec.Struct, gc=False):
    object: msgspec.Raw = NULL


class _OpenChoice(msgspec.Struct, gc=False):
    delta: dict[str, msgspec.Raw] | None = None


class _OpenChunk(msgspec.Struct, gc=False):
    choices: list[_OpenChoice] | None = None


# What is in a delta and no content, whatever it says.
_NO_CONTENT: Final = frozenset(
    "role name id object type status model provider index tool_call_id finish_reason stop_reason".split()
)
# That the upstream could not go on: OpenRouter and Mistral, Cohere, DeepSeek, Zhipu, SGLang.
_FAILURES: Final = frozenset({"error", "ERROR", "insufficient_system_resource", "network_error", "abort"})
_decode_open_chunk: Final = msgspec.json.Decoder(_OpenChunk).decode
_decode_kind: Final = msgspec.json.Decoder(_Kind).decode
_decode_chunk: Final = msgspec.json.Decoder(Chunk).decode
_MEMBERS: Final = wanted(Chunk, _Kind, Rest)


def _generated(choice: _Choice) -> Meaning:
    """What a choice has generated: REASONING, DELTA, or NOTHING."""
    if filled(choice.text):
        return DELTA
    return _content(choice.delta) or _content(choice.message) or NOTHING


def _content(delta: _Delta | None) -> Meaning | None:
    if delta is None:
        return None
    # In the order of how often they are what is filled.
    if filled(delta.content):
        return DELTA
    if any(map(filled, (delta.reasoning_content, delta.reasoning, delta.reasoning_text, delta.reasoning_details))):
        return REASONING
    others = (delta.tool_calls, delta.refusal, delta.function_call, delta.audio, delta.images, delta.annotations)
    return DELTA if any(map(filled, others)) else None


def _has_other_content(data: bytes) -> bool:
    """Whether there is text, or a list, in a delta under a name that is not known here: each vendor has its own."""
    try:
        chunk = _decode_open_chunk(data)
    except UNREADABLE:
        return False
    return any(
        name not in _NO_CONTENT and filled(value) and bytes(value)[:1] in (b'"', b"[")
        for choice in chunk.choices or ()
        for name, value in (choice.delta or {}).items()
    )


def _is_error(data: bytes) -> bool:
    """Whether `data` is an object of type `error`, as older versions of vLLM and FastChat send it."""
    try:
        return text_of(_decode_kind(data).object) == "error"
    except UNREADABLE:
        return False


def read_completion(kind: bytes, data: bytes) -> Meaning:
    """https://platform.openai.com/docs/api-reference/chat-streaming, and the deviations of other servers."""
    try:
        chunk = _decode_chunk(data)
    except UNREADABLE:
        return read_rest(kind, data)
    generated, finish, inner = NOTHING, None, NULL
    for choice in chunk.choices or ():
        if generated is NOTHING:
            generated = _generated(choice)
        if filled(choice.finish_reason):
            finish = text_of(choice.finish_reason) or finish
        if choice.usage is not NULL:
            inner = choice.usage
    usage = read_usage(chunk.usage)
    if usage is None and chunk.x_groq is not None:
        usage = read_usage(chunk.x_groq.usage)
    if usage is None and inner is not NULL:
        usage = read_usage(inner)
    error = kind == b"error" or filled(chunk.error) or (finish is not None and finish in _FAILURES)
    error |= chunk.x_groq is not None and filled(chunk.x_groq.error)
    if chunk.choices is None and not error:
        error = _is_error(data)
    if chunk.choices and generated is NOTHING and _has_other_content(data):
        generated = DELTA
    if usage is None and finish is None and not error:
        return generated
    if usage is not None and generated.delta and finish is None:
        # More comes, and will be counted.
        usage = msgspec.structs.replace(usage, final=False)
    return Meaning(delta=generated.delta, reasoning=generated.reasoning, usage=usage, finish=finish, error=error)


# Vertex AI has Mistral's models, and others, in this API.
_PATHS: Final = r"/chat/completions$|/publishers/(?!anthropic/)[^/]+/models/[^/]+:(streamR|r)awPredict$"
_TEXT: Final = text_under("content", "reasoning_content", "reasoning", "reasoning_text", "text", "arguments")
CHAT: Final = Dialect("chat", re.compile(_PATHS, re.IGNORECASE), read_completion, _MEMBERS, _TEXT, asks_usage=True)
COMPLETIONS: Final = Dialect(
    "completions", re.compile(r"/completions$", re.IGNORECASE), read_completion, _MEMBERS, _TEXT, asks_usage=True
)
GENERIC: Final = Dialect("generic", re.compile(r""), read_completion, _MEMBERS, _TEXT, generates=False)
