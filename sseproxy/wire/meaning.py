"""What an event can mean in any API, and how token counts are read."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)
"""What a decoder raises for bytes that are not JSON, not Unicode, nested too deeply, or of unexpected types."""

# Characters of the name of a model. The longest ones in use, paths of cloud resources, have about a hundred. Longer
# text is not taken for a model.
MAX_MODEL: Final = 128
OTHER_MODELS: Final = frozenset({"models", "fallbacks"})
"""Members of requests, and fields of forms, that name models to be asked if the first one fails: `models` of OpenRouter
(https://openrouter.ai/docs/features/model-routing), `fallbacks` of LiteLLM
(https://docs.litellm.ai/docs/proxy/client_side_fallbacks)."""
NULL: Final = msgspec.Raw(b"null")
_EMPTY: Final = frozenset({b"null", b'""', b"[]", b"{}"})
# Digits of a count. A number with more digits is not a count of tokens, and must not be added to a counter.
_MAX_DIGITS: Final = 15
_MOST: Final = 10**_MAX_DIGITS - 1


class Usage(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The token counts of an upstream, with the same meaning for all APIs. None means not reported.

    `input` is the whole prompt. `cached_input` and `cache_write` are parts of it: read from a cache, and written to
    one. `output` is all that was generated. `reasoning` is a part of it, whether it was streamed or not. `seconds` is
    for audio that is not counted in tokens. `read_usage` has the mapping for each API.

    `final`: these are the counts at the end of the response, and not those so far.
    """

    input: int | None = None
    output: int | None = None
    cached_input: int | None = None
    reasoning: int | None = None
    seconds: float | None = None
    cache_write: int | None = None
    final: bool = True

    def updated(self, later: Usage) -> Usage:
        """These counts, updated by later ones of the same response. Counts are cumulative, and never fall."""
        counts = {name: max(count, getattr(self, name) or 0) for name, count in later.told().items()}
        return msgspec.structs.replace(self, **counts, final=later.final)

    @property
    def is_zero(self) -> bool:
        """Nothing was counted."""
        return not (
            self.input or self.output or self.cached_input or self.reasoning or self.seconds or self.cache_write
        )

    def told(self) -> dict[str, Any]:
        """The reported counts, by name."""
        return {name: count for name in _COUNTS if (count := getattr(self, name)) is not None}


_COUNTS: Final = tuple(name for name in Usage.__struct_fields__ if name != "final")


class Meaning(msgspec.Struct, frozen=True, gc=False):
    """The meaning of an event.

    `delta`: it has generated content; `reasoning`: that content is reasoning. `usage`: the counts of all that came so
    far. `finish`: why a choice ended. `end`: it is the end marker. `more`: the stream continues, although an end marker
    was seen; that one was only the end of one candidate, or of one image. `error`: the upstream reports an error.
    `complaint`: it has only a code or a message, which is an error if nothing else comes. `understood`: it could be
    decoded. `kept_as`: the name under which the upstream keeps the response, so that it can be fetched later.
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


# The fields are Raw, because a value may be anything. A wrong type, or a string that is not Unicode, in one of them
# must not prevent that the others are read.
class _Details(msgspec.Struct, gc=False):
    cached_tokens: msgspec.Raw = NULL
    cache_write_tokens: msgspec.Raw = NULL
    reasoning_tokens: msgspec.Raw = NULL
    thinking_tokens: msgspec.Raw = NULL


class _CacheCreation(msgspec.Struct, gc=False):
    ephemeral_5m_input_tokens: msgspec.Raw = NULL
    ephemeral_1h_input_tokens: msgspec.Raw = NULL


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
        if value is not NULL and (digits := bytes(value)).isdigit() and len(digits) <= _MAX_DIGITS:
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
    if not (usage.promptTokenCount is usage.candidatesTokenCount is usage.thoughtsTokenCount is NULL):
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
    """The members that are read of an event that its API's decoder cannot decode."""

    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


# The end marker, perhaps with spaces around it.
_DONE: Final = b"[DONE]"
_decode_rest: Final = msgspec.json.Decoder(Rest).decode


def read_rest(kind: bytes, data: bytes) -> Meaning:
    """The meaning of an event that its API's decoder cannot decode. `[DONE]` is the end marker in every dialect."""
    if data.strip() == _DONE:
        return END
    garbled = Meaning(error=kind == b"error", understood=False)
    # One read may have thousands of such events, and this check is faster than an exception.
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
