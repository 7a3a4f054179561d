"""What an event can mean in any API, and how the APIs' counts are read."""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

import msgspec

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)
"""What a decoder raises for bytes that are not JSON, no Unicode, nested too deep, or not of its types."""

# A `model` is short text, or none. The longest in use, paths of cloud resources, have some hundred characters.
MAX_MODEL: Final = 128
NULL: Final = msgspec.Raw(b"null")
_EMPTY: Final = frozenset({b"null", b'""', b"[]", b"{}"})
# No count of tokens has more digits; what has is garbage, and must not reach a counter.
_MAX_DIGITS: Final = 15
_MOST: Final = 10**_MAX_DIGITS - 1


class Usage(NamedTuple):
    """An upstream's own counts, in one meaning for all APIs. None: not told.

    `input` is all of the prompt, and `cached_input` and `cache_write` are parts of it: read from a cache, and written
    to one. `output` is all that was generated, and `reasoning` is a part of it, whether it was streamed or not.
    `seconds` is for audio that is not counted in tokens. `read_usage` has the mapping for each API.

    `final`: the answer's end is in it; otherwise it is what had been counted by then.
    """

    input: int | None = None
    output: int | None = None
    cached_input: int | None = None
    reasoning: int | None = None
    seconds: float | None = None
    cache_write: int | None = None
    final: bool = True

    def updated(self, later: Usage) -> Usage:
        """These counts and those of `later`, of the same answer: counts are cumulative, and never fall."""
        counts = {name: max(count, getattr(self, name) or 0) for name, count in later.told().items()}
        return self._replace(**counts, final=later.final)

    @property
    def is_zero(self) -> bool:
        """Nothing was counted."""
        return not any(self.told().values())

    def told(self) -> dict[str, Any]:
        """The counts that are told, by name."""
        return {name: count for name, count in self._asdict().items() if count is not None and name != "final"}


class Meaning(NamedTuple):
    """What an event says.

    `delta`: it carries generated content, which is `reasoning` or not. `usage`: counts of all that came so far.
    `finish`: why a choice ended. `end`: nothing follows that matters. `more`: what ended before was one of several
    candidates, or images. `error`: the upstream reports a failure. `complaint`: it says a code or a message and nothing
    else, which is a failure if nothing else comes. `understood`: it could be decoded. `kept_as`: the name under which
    the upstream keeps the answer, for whoever asks for it later.
    """

    delta: bool = False
    usage: Usage | None = None
    finish: str | None = None
    end: bool = False
    error: bool = False
    understood: bool = True
    more: bool = False
    complaint: bool = False
    reasoning: bool = False
    kept_as: str | None = None


NOTHING: Final = Meaning()
DELTA: Final = Meaning(delta=True)
REASONING: Final = Meaning(delta=True, reasoning=True)
END: Final = Meaning(end=True)
GARBLED: Final = Meaning(understood=False)
FAILED: Final = Meaning(error=True)


# The fields are Raw, because a known key may hold anything: a wrong type in one, or a string that is no Unicode, must
# not hide the others.
class _Details(msgspec.Struct, gc=False):
    cached_tokens: msgspec.Raw = NULL
    cache_write_tokens: msgspec.Raw = NULL
    reasoning_tokens: msgspec.Raw = NULL
    thinking_tokens: msgspec.Raw = NULL


class _CacheCreation(msgspec.Struct, gc=False):
    ephemeral_5m_input_tokens: msgspec.Raw = NULL
    ephemeral_1h_input_tokens: msgspec.Raw = NULL


class _Usage(msgspec.Struct, gc=False):
    """Every name under which the APIs tell their counts."""

    prompt_tokens: msgspec.Raw = NULL
    input_tokens: msgspec.Raw = NULL
    promptTokenCount: msgspec.Raw = NULL
    completion_tokens: msgspec.Raw = NULL
    output_tokens: msgspec.Raw = NULL
    candidatesTokenCount: msgspec.Raw = NULL
    prompt_tokens_details: msgspec.Raw = NULL
    input_tokens_details: msgspec.Raw = NULL
    prompt_cache_hit_tokens: msgspec.Raw = NULL
    cached_tokens: msgspec.Raw = NULL
    cachedContentTokenCount: msgspec.Raw = NULL
    cache_read_input_tokens: msgspec.Raw = NULL
    cache_creation_input_tokens: msgspec.Raw = NULL
    cache_creation: msgspec.Raw = NULL
    toolUsePromptTokenCount: msgspec.Raw = NULL
    completion_tokens_details: msgspec.Raw = NULL
    output_tokens_details: msgspec.Raw = NULL
    thoughtsTokenCount: msgspec.Raw = NULL
    total_tokens: msgspec.Raw = NULL
    seconds: msgspec.Raw = NULL


_decode_usage: Final = msgspec.json.Decoder(_Usage).decode
_decode_details: Final = msgspec.json.Decoder(_Details).decode
_decode_creation: Final = msgspec.json.Decoder(_CacheCreation).decode
_decode_text: Final = msgspec.json.Decoder(str).decode
_decode_seconds: Final = msgspec.json.Decoder(float).decode


def filled(value: msgspec.Raw) -> bool:
    """Whether `value` holds something: it is there, and neither null nor empty."""
    return value is not NULL and bytes(value) not in _EMPTY


def text_of(value: msgspec.Raw) -> str | None:
    """The string that `value` is; None if it is none."""
    try:
        return _decode_text(value)
    except UNREADABLE:
        return None


def _count(*values: msgspec.Raw) -> int | None:
    """The first of `values` that is a count."""
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
    """The counts in a usage object of any API; None if it has none that is a count."""
    if not filled(value):
        return None
    try:
        usage = _decode_usage(value)
    except UNREADABLE:
        return None
    if any(told is not NULL for told in (usage.promptTokenCount, usage.candidatesTokenCount, usage.thoughtsTokenCount)):
        counts = _of_gemini(usage)
    elif usage.prompt_tokens is NULL and usage.completion_tokens is NULL:
        counts = _of_messages_or_responses(usage)
    else:
        counts = _of_chat(usage)
    return None if counts.input is None and counts.output is None and counts.seconds is None else counts


def _of_chat(usage: _Usage) -> Usage:
    """The prompt includes what was cached; the completion includes the reasoning, but for xAI's, which comes on top."""
    into, out = _details(usage.prompt_tokens_details), _details(usage.completion_tokens_details)
    input, output = (
        _count(usage.prompt_tokens, usage.input_tokens),
        _count(usage.completion_tokens, usage.output_tokens),
    )
    reasoning = _count(out.reasoning_tokens)
    if reasoning and output is not None and _count(usage.total_tokens) == _sum(input, output, reasoning):
        output = _sum(output, reasoning)
    cached = _count(
        into.cached_tokens, usage.prompt_cache_hit_tokens, usage.cached_tokens, usage.cache_read_input_tokens
    )
    written = _count(into.cache_write_tokens, usage.cache_creation_input_tokens)
    return Usage(input, output, cached, reasoning, _seconds(usage.seconds), written)


def _of_messages_or_responses(usage: _Usage) -> Usage:
    """The names are the same: Anthropic's input leaves out what was read from its cache and written to it, OpenAI's
    includes it, and has other names for the parts.
    """
    into, out = _details(usage.input_tokens_details), _details(usage.output_tokens_details)
    input, read = _count(usage.input_tokens), _count(usage.cache_read_input_tokens)
    written = _count(usage.cache_creation_input_tokens)
    if written is None and filled(usage.cache_creation):
        written = _by_lifetimes(usage.cache_creation)
    return Usage(
        input=None if input is None else _sum(input, read, written),
        output=_count(usage.output_tokens),
        cached_input=_count(into.cached_tokens, usage.cached_tokens) if read is None else read,
        reasoning=_count(out.reasoning_tokens, out.thinking_tokens),
        seconds=_seconds(usage.seconds),
        cache_write=_count(into.cache_write_tokens) if written is None else written,
    )


def _of_gemini(usage: _Usage) -> Usage:
    """The thoughts are not among the candidates' tokens, nor what tools have read among the prompt's."""
    thoughts = _count(usage.thoughtsTokenCount)
    return Usage(
        input=_sum(_count(usage.promptTokenCount), _count(usage.toolUsePromptTokenCount)),
        output=_sum(_count(usage.candidatesTokenCount), thoughts),
        cached_input=_count(usage.cachedContentTokenCount),
        reasoning=thoughts,
    )


def _by_lifetimes(value: msgspec.Raw) -> int | None:
    """What was written to Anthropic's cache, where only its parts are told."""
    try:
        creation = _decode_creation(value)
    except UNREADABLE:
        return None
    return _sum(_count(creation.ephemeral_5m_input_tokens), _count(creation.ephemeral_1h_input_tokens))


def _sum(*counts: int | None) -> int | None:
    """The sum of those that are told, which stays a count."""
    told = [count for count in counts if count is not None]
    return min(sum(told), _MOST) if told else None


class Rest(msgspec.Struct, gc=False):
    """What is read of an event that is not what its API says."""

    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


# The end marker, perhaps with spaces around it.
_DONE: Final = b"[DONE]"
_decode_rest: Final = msgspec.json.Decoder(Rest).decode


def read_rest(kind: bytes, data: bytes) -> Meaning:
    """What can be told of an event that is not what its API says. `[DONE]` ends a stream of any."""
    if data.strip() == _DONE:
        return END
    garbled = Meaning(error=kind == b"error", understood=False)
    # Garbage may come by the thousand in one read, and an exception takes longer than a look.
    if not data.lstrip(b" \t\r\n").startswith(b"{"):
        return garbled
    try:
        rest = _decode_rest(data)
    except UNREADABLE:
        return garbled
    return Meaning(usage=read_usage(rest.usage), error=kind == b"error" or filled(rest.error), understood=False)


# An answer that is no error may say how it went, in a code or a word.
_SUCCESSES: Final = frozenset({b"", b"200", b"20000", b"true", b"ok", b"success", b"succeeded"})
_CODES: Final = frozenset(
    "code error_code errorCode errcode err_code status_code statusCode ret success retcode fault errors Error".split()
)
_TEXTS: Final = frozenset(
    "message Message msg detail error_msg errorMsg errmsg err_msg error_message errorMessage status_msg".split()
)
# What the vendors put their codes into.
_AROUND: Final = frozenset({"base_resp", "header", "Response", "ResponseMetadata", "output"})
_decode_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_MENTIONS: Final = re.compile(rb'"(?:%b)"' % b"|".join(name.encode() for name in sorted(_CODES | _TEXTS)))


def _is_success(spelled: bytes) -> bool:
    """Whether a code or a message says that all is well. A code of zeros does."""
    said = spelled.strip(b'"').lower()
    return (said.strip(b"0") if said.isdigit() and said.startswith(b"0") else said) in _SUCCESSES


def complains(data: bytes, *, around: bool = True) -> bool:
    """Whether an object that has neither content nor usage says a code or a message, which makes an error of it.

    So do errors in answers of status 200: MiniMax's `base_resp`, Baidu's `error_code`, DashScope's and Zhipu's `code`
    and `message`, Spark's `header`, Hunyuan's `Response.Error`, FastAPI's `detail`, Bedrock's `message`.
    """
    if not _MENTIONS.search(data):
        return False
    try:
        members = _decode_members(data)
    except UNREADABLE:
        return False
    for name, value in members.items():
        if name in _CODES and filled(value) and not _is_success(bytes(value)):
            return True
        if name in _TEXTS and bytes(value)[:1] == b'"' and filled(value) and not _is_success(bytes(value)):
            return True
        if around and name in _AROUND and complains(bytes(value), around=False):
            return True
    return False
