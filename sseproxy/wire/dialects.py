"""What one event, or one JSON body, means in each API.

A `Dialect` is a name, the paths it is spoken on, and a function from an event to its `Meaning`. To add one, write that
function and a line in `DIALECTS`; nothing else knows the APIs apart.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import msgspec

from .framing import USUAL_STARTS

_NULL: Final = msgspec.Raw(b"null")
_EMPTY: Final = frozenset({b"null", b'""', b"[]", b"{}"})
# No count of tokens has more digits; what has is garbage, and must not reach a counter.
_MAX_DIGITS: Final = 15


class Usage(NamedTuple):
    """An upstream's own counts, as it counts them. None: not told.

    Whether `cached_input` is part of `input`, and `reasoning` of `output`, is the API's way: OpenAI's are parts,
    Anthropic's cache reads and Gemini's thoughts come on top. `seconds` is for audio that is not counted in tokens.
    """

    input: int | None = None
    output: int | None = None
    cached_input: int | None = None
    reasoning: int | None = None
    seconds: float | None = None

    def overlaid(self, later: Usage) -> Usage:
        """These counts, with those that `later` tells in their place."""
        return self._replace(**{name: count for name, count in later._asdict().items() if count is not None})


class Meaning(NamedTuple):
    """What an event says.

    `delta`: it carries generated content. `usage`: counts that replace all earlier ones, or, with `overlay`, only those
    that it tells. `finish`: why a choice ended. `end`: nothing follows that matters. `more`: what ended before was one
    of several candidates, or images. `error`: the upstream reports a failure. `understood`: it could be decoded.
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
# Of a stream that has an end for each of its parts.
_DELTA_OF_A_PART: Final = Meaning(delta=True, more=True)
END: Final = Meaning(end=True)
GARBLED: Final = Meaning(understood=False)
FAILED: Final = Meaning(error=True)


# What ends or escapes in a JSON string, and what may not be in one (RFC 8259, section 7).
_NOT_PLAIN: Final = bytes([*range(0x20), *b'"\\\x7f'])
_MAX_ALIKE: Final = len(USUAL_STARTS)
_TEXT: Final = re.compile(
    rb'"(?:content|reasoning_content|reasoning|text|thinking|partial_json|arguments|delta)": ?"([^"\\\x00-\x1f\x7f]+)"'
)
# OpenAI's padding, against guesses by length, and its count of events; where streams have them, all events differ.
_PADDING: Final = re.compile(rb'"obfuscation": ?"([^"\\\x00-\x1f\x7f]*)"')
_NUMBER: Final = re.compile(rb'"sequence_number": ?([0-9]+)')


def _is_plain(part: bytes) -> bool:
    return part.translate(None, _NOT_PLAIN) == part


def _is_text(part: bytes) -> bool:
    return bool(part) and _is_plain(part)


def _is_number(part: bytes) -> bool:
    return part.isdigit() and (part[0] != 0x30 or part == b"0")


class Alike:
    """Recognises reads that are one chunk, with an event like one before but for what varies.

    That is between `prefix` and `suffix`: what `last` accepts, after what each of `between` accepts, up to its literal.
    """

    __slots__ = ("_around", "_between", "_last", "_prefix", "_suffix")

    def __init__(
        self,
        prefix: bytes,
        between: Sequence[tuple[bytes, Callable[[bytes], bool]]],
        last: Callable[[bytes], bool],
        suffix: bytes,
    ) -> None:
        self._prefix = prefix
        self._between = between
        self._last = last
        self._suffix = suffix
        self._around = len(prefix) + len(suffix)

    def size_of(self, data: bytes) -> int:
        """The size of the event if `data` is such a read, or 0."""
        length = len(data)
        if length >= _MAX_ALIKE:
            return 0
        start = USUAL_STARTS[length]
        rest = data.removeprefix(start).removeprefix(self._prefix).removesuffix(self._suffix)
        size = length - len(start)
        # As long as it is then, all three were there.
        if not start or len(rest) + self._around != size:
            return 0
        if not self._between:
            return size - 2 if rest and rest.translate(None, _NOT_PLAIN) == rest else 0
        for literal, check in self._between:
            part, there, rest = rest.partition(literal)
            if not there or not check(part):
                return 0
        return size - 2 if self._last(rest) else 0


def alike(event: bytes) -> Alike | None:
    """Recognises what means the same as `event`, as it came: a delta and nothing else. None if it has no plain text.

    An event that has the same bytes, but for that text, its padding and its number, means the same; so do nearly all
    events of a stream. The text is that of a JSON string without escapes, of which no reader asks more than whether it
    is empty. It is recognised in one HTTP chunk without extensions, which can be forwarded as it is.
    """
    text = _TEXT.search(event)
    if text is None:
        return None
    varied = [(text.span(1), _is_text)]
    for pattern, check in ((_PADDING, _is_plain), (_NUMBER, _is_number)):
        found = pattern.search(event)
        if found is not None:
            varied.append((found.span(1), check))
    varied.sort()
    between = [(event[end:start], check) for ((_, end), check), ((start, _), _) in pairwise(varied)]
    return Alike(event[: varied[0][0][0]], between, varied[-1][1], event[varied[-1][0][1] :] + b"\r\n")


class Dialect(NamedTuple):
    """`read(type, data)` is the meaning of an event; `path` matches the path on the upstream's side.

    `generates`: its streams have a first token to wait for. `large`: its events may have megabytes. `numbered`: its
    events carry their number in the stream. `asks_usage`: its streams tell usage only where the request asks for it.
    """

    name: str
    path: re.Pattern[str]
    read: Callable[[bytes, bytes], Meaning]
    generates: bool = True
    large: bool = False
    numbered: bool = False
    asks_usage: bool = False

    def max_event(self, usual: int) -> int:
        """The bytes of an event that are looked at, where `usual` are of events without images.

        A 4096 x 4096 PNG in base64, and a line of 16 MiB with its field name, are within six times 4 MiB.
        """
        return 6 * usual if self.large else usual


# The fields are Raw, because a known key may hold anything: a wrong type in one, or a string that is no Unicode, must
# not hide the others.
class _Details(msgspec.Struct, gc=False):
    cached_tokens: msgspec.Raw = _NULL
    reasoning_tokens: msgspec.Raw = _NULL


class _Usage(msgspec.Struct, gc=False):
    """Every name under which the APIs tell their counts."""

    prompt_tokens: msgspec.Raw = _NULL
    input_tokens: msgspec.Raw = _NULL
    promptTokenCount: msgspec.Raw = _NULL
    completion_tokens: msgspec.Raw = _NULL
    output_tokens: msgspec.Raw = _NULL
    candidatesTokenCount: msgspec.Raw = _NULL
    prompt_tokens_details: msgspec.Raw = _NULL
    input_tokens_details: msgspec.Raw = _NULL
    prompt_cache_hit_tokens: msgspec.Raw = _NULL
    cache_read_input_tokens: msgspec.Raw = _NULL
    cachedContentTokenCount: msgspec.Raw = _NULL
    completion_tokens_details: msgspec.Raw = _NULL
    output_tokens_details: msgspec.Raw = _NULL
    thoughtsTokenCount: msgspec.Raw = _NULL
    seconds: msgspec.Raw = _NULL


_decode_usage: Final = msgspec.json.Decoder(_Usage).decode
_decode_details: Final = msgspec.json.Decoder(_Details).decode
_decode_text: Final = msgspec.json.Decoder(str).decode
_decode_seconds: Final = msgspec.json.Decoder(float).decode


def _filled(value: msgspec.Raw) -> bool:
    return value is not _NULL and bytes(value) not in _EMPTY


def _filled_blob(value: msgspec.Raw) -> bool:
    """`_filled` for base64 of any size, which is not copied."""
    return value is not _NULL and memoryview(value).nbytes > len(b"null")


def _text(value: msgspec.Raw) -> str | None:
    try:
        return _decode_text(value)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _count(*values: msgspec.Raw) -> int | None:
    """The first of `values` that is a count."""
    for value in values:
        if value is not _NULL:
            digits = bytes(value)
            if digits.isdigit() and len(digits) <= _MAX_DIGITS:
                return int(digits)
    return None


def _seconds(value: msgspec.Raw) -> float | None:
    if value is _NULL:
        return None
    try:
        seconds = _decode_seconds(value)
    except msgspec.MsgspecError:
        return None
    return seconds if 0 <= seconds < 10**_MAX_DIGITS else None


def _details(value: msgspec.Raw) -> _Details:
    if value is _NULL:
        return _NO_DETAILS
    try:
        return _decode_details(value)
    except msgspec.MsgspecError:
        return _NO_DETAILS


_NO_DETAILS: Final = _Details()


def read_usage(value: msgspec.Raw) -> Usage | None:
    """The counts in a usage object of any API; None if it has none that is a count."""
    if not _filled(value):
        return None
    try:
        usage = _decode_usage(value)
    except msgspec.MsgspecError:
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


# --- chat completions and completions, and whatever looks like them ---


class _Delta(msgspec.Struct, gc=False):
    content: msgspec.Raw = _NULL
    reasoning_content: msgspec.Raw = _NULL
    reasoning: msgspec.Raw = _NULL
    refusal: msgspec.Raw = _NULL
    tool_calls: msgspec.Raw = _NULL
    function_call: msgspec.Raw = _NULL
    audio: msgspec.Raw = _NULL
    images: msgspec.Raw = _NULL


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: msgspec.Raw = _NULL
    finish_reason: msgspec.Raw = _NULL


class _Groq(msgspec.Struct, gc=False):
    usage: msgspec.Raw = _NULL
    error: msgspec.Raw = _NULL


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = _NULL
    x_groq: _Groq | None = None
    error: msgspec.Raw = _NULL


class _Rest(msgspec.Struct, gc=False):
    """What can still be told of an event whose choices are not what they should be."""

    usage: msgspec.Raw = _NULL
    error: msgspec.Raw = _NULL


class _Kind(msgspec.Struct, gc=False):
    object: msgspec.Raw = _NULL


_decode_kind: Final = msgspec.json.Decoder(_Kind).decode
_decode_chunk: Final = msgspec.json.Decoder(_Chunk).decode
_decode_rest: Final = msgspec.json.Decoder(_Rest).decode


def _generated(choice: _Choice) -> bool:
    delta = choice.delta
    return _filled(choice.text) or (
        delta is not None
        and (
            # In the order of how often they are what is filled.
            _filled(delta.content)
            or _filled(delta.reasoning_content)
            or _filled(delta.reasoning)
            or _filled(delta.tool_calls)
            or _filled(delta.refusal)
            or _filled(delta.function_call)
            or _filled(delta.audio)
            or _filled_blob(delta.images)
        )
    )


def _read_rest(kind: bytes, data: bytes) -> Meaning:
    try:
        rest = _decode_rest(data)
    except (msgspec.MsgspecError, RecursionError):
        return Meaning(error=kind == b"error", understood=False)
    return Meaning(usage=read_usage(rest.usage), error=kind == b"error" or _filled(rest.error), understood=False)


def read_completion(kind: bytes, data: bytes) -> Meaning:
    """https://platform.openai.com/docs/api-reference/chat-streaming, and how others deviate from it."""
    if data == b"[DONE]":
        return END
    try:
        chunk = _decode_chunk(data)
    except (msgspec.MsgspecError, RecursionError):
        return _read_rest(kind, data)
    delta, finish = False, None
    for choice in chunk.choices or ():
        delta = delta or _generated(choice)
        if _filled(choice.finish_reason):
            finish = _text(choice.finish_reason) or finish
    usage = read_usage(chunk.usage)
    if usage is None and chunk.x_groq is not None:
        usage = read_usage(chunk.x_groq.usage)
    # OpenRouter ends with a reason, vLLM and FastChat have sent an object of its own.
    error = kind == b"error" or _filled(chunk.error) or finish == "error"
    error |= chunk.x_groq is not None and _filled(chunk.x_groq.error)
    if chunk.choices is None and not error:
        error = _text(_decode_kind(data).object) == "error"
    if usage is None and finish is None and not error:
        return DELTA if delta else NOTHING
    return Meaning(delta, usage, finish, error=error)


# --- responses ---


class _Response(msgspec.Struct, gc=False):
    status: msgspec.Raw = _NULL
    usage: msgspec.Raw = _NULL


class _ResponseEvent(msgspec.Struct, gc=False):
    type: str = ""
    delta: msgspec.Raw = _NULL
    partial_image_b64: msgspec.Raw = _NULL
    response: _Response | None = None
    status: msgspec.Raw = _NULL
    usage: msgspec.Raw = _NULL
    error: msgspec.Raw = _NULL


_decode_response_event: Final = msgspec.json.Decoder(_ResponseEvent).decode
_RESPONSE_ENDS: Final = frozenset(
    {"response.completed", "response.incomplete", "response.failed", "response.cancelled"}
)


def read_response(kind: bytes, data: bytes) -> Meaning:
    """https://platform.openai.com/docs/api-reference/responses-streaming"""
    if data == b"[DONE]":
        return END
    try:
        event = _decode_response_event(data)
    except (msgspec.MsgspecError, RecursionError):
        return _read_rest(kind, data)
    if event.type in _RESPONSE_ENDS:
        response = event.response or _Response()
        return Meaning(
            usage=read_usage(response.usage),
            finish=_text(response.status),
            end=True,
            error=event.type == "response.failed",
        )
    if event.type == "error" or kind == b"error" or (not event.type and _filled(event.error)):
        return FAILED
    if event.type.endswith(".delta"):
        return DELTA if _filled(event.delta) else NOTHING
    if _filled_blob(event.partial_image_b64):
        return DELTA
    return NOTHING if event.type else Meaning(usage=read_usage(event.usage), finish=_text(event.status))


# --- messages ---


class _Block(msgspec.Struct, gc=False):
    text: msgspec.Raw = _NULL
    thinking: msgspec.Raw = _NULL
    partial_json: msgspec.Raw = _NULL
    citation: msgspec.Raw = _NULL
    stop_reason: msgspec.Raw = _NULL


class _Message(msgspec.Struct, gc=False):
    usage: msgspec.Raw = _NULL


class _MessageEvent(msgspec.Struct, gc=False):
    type: str = ""
    message: _Message | None = None
    delta: _Block | None = None
    usage: msgspec.Raw = _NULL
    stop_reason: msgspec.Raw = _NULL


_decode_message_event: Final = msgspec.json.Decoder(_MessageEvent).decode


def read_message(kind: bytes, data: bytes) -> Meaning:
    """https://docs.anthropic.com/en/docs/build-with-claude/streaming: counts are cumulative, and come in two places."""
    try:
        event = _decode_message_event(data)
    except (msgspec.MsgspecError, RecursionError):
        return _read_rest(kind, data)
    delta = event.delta or _Block()
    match event.type:
        case "content_block_delta":
            filled = any(map(_filled, (delta.text, delta.thinking, delta.partial_json, delta.citation)))
            return DELTA if filled else NOTHING
        case "message_start":
            return Meaning(usage=read_usage(event.message.usage) if event.message is not None else None)
        case "message_delta":
            return Meaning(usage=read_usage(event.usage), finish=_text(delta.stop_reason), overlay=True)
        case "message_stop":
            return END
        case "error":
            return FAILED
        case "message":
            return Meaning(usage=read_usage(event.usage), finish=_text(event.stop_reason))
    return FAILED if kind == b"error" else NOTHING


# --- Gemini ---


class _Part(msgspec.Struct, gc=False):
    text: msgspec.Raw = _NULL
    functionCall: msgspec.Raw = _NULL
    inlineData: msgspec.Raw = _NULL
    executableCode: msgspec.Raw = _NULL
    codeExecutionResult: msgspec.Raw = _NULL


class _Content(msgspec.Struct, gc=False):
    parts: list[_Part] | None = None


class _Candidate(msgspec.Struct, gc=False):
    content: _Content | None = None
    finishReason: msgspec.Raw = _NULL


class _Generation(msgspec.Struct, gc=False):
    candidates: list[_Candidate] | None = None
    usageMetadata: msgspec.Raw = _NULL
    error: msgspec.Raw = _NULL


_decode_generation: Final = msgspec.json.Decoder(_Generation).decode


def _generated_part(part: _Part) -> bool:
    return any(
        map(_filled, (part.text, part.functionCall, part.inlineData, part.executableCode, part.codeExecutionResult))
    )


def read_gemini(kind: bytes, data: bytes) -> Meaning:
    """https://ai.google.dev/api/generate-content: no end marker; the finish reason comes with the last event."""
    try:
        event = _decode_generation(data)
    except (msgspec.MsgspecError, RecursionError):
        return _read_rest(kind, data)
    candidates = event.candidates or []
    contents = [candidate.content for candidate in candidates if candidate.content is not None]
    finish = next((_text(candidate.finishReason) for candidate in candidates if _filled(candidate.finishReason)), None)
    delta = any(_generated_part(part) for content in contents for part in content.parts or ())
    return Meaning(
        delta=delta,
        usage=read_usage(event.usageMetadata),
        finish=finish,
        end=finish is not None,
        error=_filled(event.error),
        more=delta and finish is None,
    )


# --- audio and images ---


class _MediaEvent(msgspec.Struct, gc=False):
    type: str = ""
    audio: msgspec.Raw = _NULL
    delta: msgspec.Raw = _NULL
    text: msgspec.Raw = _NULL
    b64_json: msgspec.Raw = _NULL
    usage: msgspec.Raw = _NULL
    error: msgspec.Raw = _NULL


_decode_media_event: Final = msgspec.json.Decoder(_MediaEvent).decode


def read_media(kind: bytes, data: bytes) -> Meaning:
    """https://platform.openai.com/docs/api-reference/audio and /images: speech, transcripts and images."""
    if data == b"[DONE]":
        return END
    try:
        event = _decode_media_event(data)
    except (msgspec.MsgspecError, RecursionError):
        return _read_rest(kind, data)
    if event.type == "error" or kind == b"error" or _filled(event.error):
        return FAILED
    if event.type.endswith((".done", ".completed")):
        finish = "completed" if event.type.endswith(".completed") else event.type
        return Meaning(delta=_filled_blob(event.b64_json), usage=read_usage(event.usage), finish=finish, end=True)
    if event.type:
        blob = _filled_blob(event.audio) or _filled_blob(event.b64_json)
        return _DELTA_OF_A_PART if blob or _filled(event.delta) or _filled(event.text) else NOTHING
    return Meaning(usage=read_usage(event.usage))


# --- assistants ---


class _Value(msgspec.Struct, gc=False):
    value: msgspec.Raw = _NULL


class _Piece(msgspec.Struct, gc=False):
    type: str = ""
    text: _Value | None = None


class _ThreadDelta(msgspec.Struct, gc=False):
    content: list[_Piece] | None = None
    step_details: msgspec.Raw = _NULL


class _ThreadEvent(msgspec.Struct, gc=False):
    object: str = ""
    status: msgspec.Raw = _NULL
    delta: _ThreadDelta | None = None
    usage: msgspec.Raw = _NULL


_decode_thread_event: Final = msgspec.json.Decoder(_ThreadEvent).decode
_RUN_ENDS: Final = frozenset({"completed", "incomplete", "failed", "cancelled", "expired", "requires_action"})


def read_run(kind: bytes, data: bytes) -> Meaning:
    """https://platform.openai.com/docs/api-reference/assistants-streaming: a run's usage includes that of its steps."""
    if data == b"[DONE]":
        return END
    if kind == b"error":
        return FAILED
    try:
        event = _decode_thread_event(data)
    except (msgspec.MsgspecError, RecursionError):
        return _read_rest(kind, data)
    if event.object == "thread.run":
        status = _text(event.status)
        return Meaning(
            usage=read_usage(event.usage), finish=status if status in _RUN_ENDS else None, error=status == "failed"
        )
    delta = event.delta or _ThreadDelta()
    pieces = delta.content or []
    if _filled(delta.step_details) or any(piece.text is None or _filled(piece.text.value) for piece in pieces):
        return DELTA
    return NOTHING


DIALECTS: Final = (
    Dialect("chat", re.compile(r"/chat/completions$"), read_completion, asks_usage=True),
    Dialect("completions", re.compile(r"/completions$"), read_completion, asks_usage=True),
    Dialect("responses", re.compile(r"/responses(/[^/]+)?$"), read_response, large=True, numbered=True),
    Dialect("assistants", re.compile(r"/threads/(runs|[^/]+/runs(/[^/]+(/submit_tool_outputs)?)?)$"), read_run),
    Dialect("messages", re.compile(r"(?<!/threads)/messages$|:streamRawPredict$"), read_message),
    Dialect("gemini", re.compile(r":(streamG|g)enerateContent$"), read_gemini, large=True),
    Dialect("speech", re.compile(r"/audio/speech$"), read_media),
    Dialect("transcriptions", re.compile(r"/audio/(transcriptions|translations)$"), read_media),
    Dialect("images", re.compile(r"/images/(generations|edits)$"), read_media, large=True),
    Dialect("generic", re.compile(r""), read_completion, generates=False),
)
"""Tried in this order; the last one takes every path, and finds usage that looks like OpenAI's."""


_MODEL_IN_PATH: Final = re.compile(r"/(?:models|deployments)/([^/:]+)[/:]")

DIALECT_NAMES: Final = tuple(dialect.name for dialect in DIALECTS)


def model_in(path: str) -> str | None:
    """The model that `path` names, as Gemini's, Vertex AI's and Azure's do."""
    match = _MODEL_IN_PATH.search(path)
    return match[1] if match else None


# Few paths are many requests; a path may have as many bytes as a head, and there are few of them here.
@functools.lru_cache(maxsize=64)
def dialect_of(path: str, name: str = "auto") -> Dialect:
    """The dialect `name`, or for `auto` the one spoken on `path`, the path of the request that goes upstream."""
    return next(
        dialect for dialect in DIALECTS if (dialect.path.search(path) if name == "auto" else dialect.name == name)
    )
