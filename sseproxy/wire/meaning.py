"""What an event can mean in any API, and how token counts are read."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)
"""What a decoder raises for bytes that are not JSON, not Unicode, nested too deeply, or of unexpected types."""

# Characters of the name of a model. The longest ones in use, paths of cloud resources, have about a hundred. Longer
# text is not taken for a model.
MAX_MODEL: Final = 128
NULL: Final = msgspec.Raw(b"null")
_EMPTY: Final = frozenset({b"null", b'""', b"[]", b"{}"})
# Digits of a count. A number with more digits is not a count of tokens, and must not be added to a counter.
_MAX_DIGITS: Final = 15


class Usage(NamedTuple):
    """The token counts of an upstream, as it reports them. None means not reported.

    In some APIs `cached_input` is a part of `input`, and `reasoning` is a part of `output`: both in OpenAI's. In others
    they are separate: the cache reads of Anthropic and the thoughts of Gemini. `seconds` is for audio that is not
    counted in tokens.
    """

    input: int | None = None
    output: int | None = None
    cached_input: int | None = None
    reasoning: int | None = None
    seconds: float | None = None

    def overlaid(self, later: Usage) -> Usage:
        """These counts, replaced by those that `later` has."""
        return self._replace(**{name: count for name, count in later._asdict().items() if count is not None})


class Meaning(NamedTuple):
    """The meaning of an event.

    `delta`: it has generated content. `usage`: its counts, which replace all earlier counts; with `overlay`, only those
    that it has. `finish`: why a choice ended. `end`: it is the end marker. `more`: the stream continues, although an
    end marker was seen; that one was only the end of one candidate, or of one image. `error`: the upstream reports an
    error. `understood`: it could be decoded.
    """

    delta: bool = False
    usage: Usage | None = None
    finish: str | None = None
    end: bool = False
    error: bool = False
    understood: bool = True
    overlay: bool = False
    more: bool = False


NOTHING: Final = Meaning()
DELTA: Final = Meaning(delta=True)
END: Final = Meaning(end=True)
GARBLED: Final = Meaning(understood=False)
FAILED: Final = Meaning(error=True)


# The fields are Raw, because a value may be anything. A wrong type, or a string that is not Unicode, in one of them
# must not prevent that the others are read.
class _Details(msgspec.Struct, gc=False):
    cached_tokens: msgspec.Raw = NULL
    reasoning_tokens: msgspec.Raw = NULL


class _Usage(msgspec.Struct, gc=False):
    """The names of all counts, in all APIs."""

    prompt_tokens: msgspec.Raw = NULL
    input_tokens: msgspec.Raw = NULL
    promptTokenCount: msgspec.Raw = NULL
    completion_tokens: msgspec.Raw = NULL
    output_tokens: msgspec.Raw = NULL
    candidatesTokenCount: msgspec.Raw = NULL
    prompt_tokens_details: msgspec.Raw = NULL
    input_tokens_details: msgspec.Raw = NULL
    prompt_cache_hit_tokens: msgspec.Raw = NULL
    cache_read_input_tokens: msgspec.Raw = NULL
    cachedContentTokenCount: msgspec.Raw = NULL
    completion_tokens_details: msgspec.Raw = NULL
    output_tokens_details: msgspec.Raw = NULL
    thoughtsTokenCount: msgspec.Raw = NULL
    seconds: msgspec.Raw = NULL


_decode_usage: Final = msgspec.json.Decoder(_Usage).decode
_decode_details: Final = msgspec.json.Decoder(_Details).decode
_decode_text: Final = msgspec.json.Decoder(str).decode
_decode_seconds: Final = msgspec.json.Decoder(float).decode


def filled(value: msgspec.Raw) -> bool:
    """Whether `value` is present, and neither null nor empty."""
    return value is not NULL and bytes(value) not in _EMPTY


def text_of(value: msgspec.Raw) -> str | None:
    """`value` as text. None if it is not a string."""
    try:
        return _decode_text(value)
    except UNREADABLE:
        return None


def _count(*values: msgspec.Raw) -> int | None:
    """The first of `values` that is a count, or None."""
    for value in values:
        if value is not NULL:
            digits = bytes(value)
            if digits.isdigit() and len(digits) <= _MAX_DIGITS:
                return int(digits)
    return None


def _seconds(value: msgspec.Raw) -> float | None:
    if value is NULL:
        return None
    try:
        seconds = _decode_seconds(value)
    except UNREADABLE:
        return None
    return seconds if 0 <= seconds < 10**_MAX_DIGITS else None


def _details(value: msgspec.Raw) -> _Details:
    if value is NULL:
        return _NO_DETAILS
    try:
        return _decode_details(value)
    except UNREADABLE:
        return _NO_DETAILS


_NO_DETAILS: Final = _Details()


def read_usage(value: msgspec.Raw) -> Usage | None:
    """The counts in a usage object of any API. None if it has none."""
    if not filled(value):
        return None
    try:
        usage = _decode_usage(value)
    except UNREADABLE:
        return None
    into, out = _details(usage.prompt_tokens_details), _details(usage.completion_tokens_details)
    into_too, out_too = _details(usage.input_tokens_details), _details(usage.output_tokens_details)
    counts = Usage(
        input=_count(usage.prompt_tokens, usage.input_tokens, usage.promptTokenCount),
        output=_count(usage.completion_tokens, usage.output_tokens, usage.candidatesTokenCount),
        cached_input=_count(
            into.cached_tokens,
            into_too.cached_tokens,
            usage.prompt_cache_hit_tokens,
            usage.cache_read_input_tokens,
            usage.cachedContentTokenCount,
        ),
        reasoning=_count(out.reasoning_tokens, out_too.reasoning_tokens, usage.thoughtsTokenCount),
        seconds=_seconds(usage.seconds),
    )
    return None if counts.input is None and counts.output is None and counts.seconds is None else counts


class Rest(msgspec.Struct, gc=False):
    """The members that are read of an event that its API's decoder cannot decode."""

    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


_decode_rest: Final = msgspec.json.Decoder(Rest).decode


def read_rest(kind: bytes, data: bytes) -> Meaning:
    """The meaning of an event that its API's decoder cannot decode."""
    garbled = Meaning(error=kind == b"error", understood=False)
    # One read may have thousands of such events, and this check is faster than an exception.
    if not data.lstrip(b" \t\r\n").startswith(b"{"):
        return garbled
    try:
        rest = _decode_rest(data)
    except UNREADABLE:
        return garbled
    return Meaning(usage=read_usage(rest.usage), error=kind == b"error" or filled(rest.error), understood=False)
