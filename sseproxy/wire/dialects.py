"""What one event, or one JSON body, means in each API.

A `Dialect` is a name, the paths it is spoken on, and a function from an event to its `Meaning`. To add one, write
that function and a line in `DIALECTS`; nothing else knows the APIs apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

_NULL: Final = msgspec.Raw(b"null")
_EMPTY: Final = frozenset({b"null", b'""', b"[]", b"{}"})
# No count of tokens has more digits; what has is garbage, and must not reach a counter.
_MAX_DIGITS: Final = 15


class Usage(NamedTuple):
    """An upstream's own counts. None: not told. `cached_input` is part of `input`, `reasoning` part of `output`."""

    input: int | None = None
    output: int | None = None
    cached_input: int | None = None
    reasoning: int | None = None


class Meaning(NamedTuple):
    """What an event says.

    `delta`: it carries generated content. `usage`: counts that replace all earlier ones. `finish`: why a choice ended.
    `end`: nothing follows that matters. `error`: the upstream reports a failure. `understood`: it could be decoded.
    """

    delta: bool = False
    usage: Usage | None = None
    finish: str | None = None
    end: bool = False
    error: bool = False
    understood: bool = True


NOTHING: Final = Meaning()
DELTA: Final = Meaning(delta=True)
END: Final = Meaning(end=True)
GARBLED: Final = Meaning(understood=False)


class Dialect(NamedTuple):
    """`read(type, data)` is the meaning of an event; `paths` are suffixes of the path on the upstream's side."""

    name: str
    paths: tuple[str, ...]
    read: Callable[[bytes, bytes], Meaning]


# The fields are Raw, because a known key may hold anything: a wrong type in one, or a string that is no Unicode, must
# not hide the others.
class _Delta(msgspec.Struct, gc=False):
    content: msgspec.Raw = _NULL
    reasoning_content: msgspec.Raw = _NULL
    reasoning: msgspec.Raw = _NULL
    refusal: msgspec.Raw = _NULL
    tool_calls: msgspec.Raw = _NULL
    function_call: msgspec.Raw = _NULL
    audio: msgspec.Raw = _NULL


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: msgspec.Raw = _NULL
    finish_reason: msgspec.Raw = _NULL


class _Groq(msgspec.Struct, gc=False):
    usage: msgspec.Raw = _NULL


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = _NULL
    x_groq: _Groq | None = None
    error: msgspec.Raw = _NULL


class _Details(msgspec.Struct, gc=False):
    cached_tokens: msgspec.Raw = _NULL
    reasoning_tokens: msgspec.Raw = _NULL


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: msgspec.Raw = _NULL
    completion_tokens: msgspec.Raw = _NULL
    prompt_tokens_details: msgspec.Raw = _NULL
    completion_tokens_details: msgspec.Raw = _NULL


_decode_chunk: Final = msgspec.json.Decoder(_Chunk).decode
_decode_usage: Final = msgspec.json.Decoder(_Usage).decode
_decode_details: Final = msgspec.json.Decoder(_Details).decode
_decode_text: Final = msgspec.json.Decoder(str).decode


def _filled(value: msgspec.Raw) -> bool:
    return value is not _NULL and bytes(value) not in _EMPTY


def _text(value: msgspec.Raw) -> str | None:
    try:
        return _decode_text(value)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _count(value: msgspec.Raw) -> int | None:
    digits = bytes(value)
    return int(digits) if digits.isdigit() and len(digits) <= _MAX_DIGITS else None


def _details(value: msgspec.Raw) -> _Details:
    try:
        return _decode_details(value)
    except msgspec.MsgspecError:
        return _Details()


def _usage(value: msgspec.Raw) -> Usage | None:
    try:
        usage = _decode_usage(value)
    except msgspec.MsgspecError:
        return None
    counts = Usage(
        input=_count(usage.prompt_tokens),
        output=_count(usage.completion_tokens),
        cached_input=_count(_details(usage.prompt_tokens_details).cached_tokens),
        reasoning=_count(_details(usage.completion_tokens_details).reasoning_tokens),
    )
    return None if counts.input is None and counts.output is None else counts


def _generated(choice: _Choice) -> bool:
    delta = choice.delta
    return _filled(choice.text) or (
        delta is not None
        and (
            _filled(delta.content)
            or _filled(delta.reasoning_content)
            or _filled(delta.reasoning)
            or _filled(delta.tool_calls)
            or _filled(delta.refusal)
            or _filled(delta.function_call)
            or _filled(delta.audio)
        )
    )


def read_completion(kind: bytes, data: bytes) -> Meaning:
    """Chat completions and completions: the event `data` of type `kind`, or a whole JSON body.

    https://platform.openai.com/docs/api-reference/chat-streaming
    """
    if data == b"[DONE]":
        return END
    try:
        chunk = _decode_chunk(data)
    except (msgspec.MsgspecError, RecursionError):
        return Meaning(error=True, understood=False) if kind == b"error" else GARBLED
    choices = chunk.choices or ()
    delta = any(map(_generated, choices))
    usage = _usage(chunk.usage) if _filled(chunk.usage) else None
    if usage is None and chunk.x_groq is not None:
        usage = _usage(chunk.x_groq.usage)
    finish = next((_text(choice.finish_reason) for choice in choices if _filled(choice.finish_reason)), None)
    error = kind == b"error" or _filled(chunk.error)
    if usage is None and finish is None and not error:
        return DELTA if delta else NOTHING
    return Meaning(delta, usage, finish, error=error)


DIALECTS: Final = (
    Dialect("chat", ("/chat/completions",), read_completion),
    Dialect("completions", ("/completions",), read_completion),
)
"""Tried in this order. Responses, Messages, audio, images, assistants and Gemini take their places here."""


def dialect_of(path: str) -> Dialect | None:
    """The dialect spoken on `path`, the path of the request that goes upstream; None if it is not known."""
    return next((dialect for dialect in DIALECTS if path.endswith(dialect.paths)), None)
