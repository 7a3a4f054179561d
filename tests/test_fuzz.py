"""Streams as vendors could send them, with what goes wrong in them: what is measured is what a plain reading says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sseproxy.relay.exchange import Exchange, Observer
from sseproxy.relay.inspect import StreamInspector
from sseproxy.wire.dialects import dialect_of
from sseproxy.wire.meaning import Usage

from . import reference
from .splits import splits, steps

TEXTS = st.one_of(
    st.sampled_from(["", "Hi", "é😀", '"usage":{"prompt_tokens":9}', "data: [DONE]\n\n", "\u2028", "\\"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
COUNTS: st.SearchStrategy[Any] = st.one_of(
    st.integers(0, 2000),
    st.sampled_from([None, -1, 1.0, 1e300, "7", True, [], {}, {"prompt_tokens": 1}, 10**14, 10**15, 10**40, 0]),
)
ODD: st.SearchStrategy[Any] = st.sampled_from([None, "", "x", 1, -1.5, True, [], {}, [1], {"a": 1}, [{}], [None]])


def members(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of the members, one of which may be odd."""
    return st.fixed_dictionaries(
        {}, optional={name: st.one_of(value, value, value, ODD) for name, value in values.items()}
    )


USAGE = members(
    prompt_tokens=COUNTS,
    completion_tokens=COUNTS,
    input_tokens=COUNTS,
    output_tokens=COUNTS,
    prompt_tokens_details=members(cached_tokens=COUNTS, cache_write_tokens=COUNTS),
    input_tokens_details=members(cached_tokens=COUNTS, cache_write_tokens=COUNTS),
    completion_tokens_details=members(reasoning_tokens=COUNTS),
    output_tokens_details=members(reasoning_tokens=COUNTS, thinking_tokens=COUNTS),
    prompt_cache_hit_tokens=COUNTS,
    cached_tokens=COUNTS,
    cache_read_input_tokens=COUNTS,
    cache_creation_input_tokens=COUNTS,
    cache_creation=members(ephemeral_5m_input_tokens=COUNTS, ephemeral_1h_input_tokens=COUNTS),
    total_tokens=COUNTS,
)
ERROR = st.sampled_from([{"message": "no", "type": "server_error"}, "no", None])
CHOICE = members(
    index=st.integers(0, 3),
    delta=members(
        role=TEXTS,
        content=TEXTS,
        reasoning_content=TEXTS,
        reasoning=TEXTS,
        refusal=TEXTS,
        tool_calls=st.lists(members(index=st.integers(0, 2)), max_size=2),
        reasoning_text=TEXTS,
        reasoning_details=st.lists(members(text=TEXTS), max_size=1),
        audio=members(data=TEXTS),
        name=TEXTS,
        something_new=TEXTS,
    ),
    text=TEXTS,
    finish_reason=st.sampled_from([None, "", "stop", "length", "tool_calls", "error", "network_error"]),
    usage=USAGE,
)
# What an error in an answer of status 200 says.
SAID: dict[str, st.SearchStrategy[Any]] = {
    "code": st.sampled_from([0, 200, "success", "1301", 400, True]),
    "message": st.sampled_from(["", "OK", "no such model"]),
    "base_resp": members(status_code=st.sampled_from([0, 1008]), status_msg=st.sampled_from(["success", "no"])),
}
EVENTS = {
    "chat": members(
        id=TEXTS,
        object=st.sampled_from(["error", "chat.completion.chunk"]),
        choices=st.lists(CHOICE, max_size=3),
        usage=USAGE,
        x_groq=members(usage=USAGE, error=ERROR),
        error=ERROR,
        **SAID,
    ),
    "responses": members(
        type=st.sampled_from(
            [
                *("response.created", "response.output_text.delta", "response.function_call_arguments.delta"),
                *("response.completed", "response.incomplete", "response.failed", "response.done", "error", ""),
                *("response.output_item.added", "response.content_part.added", "response.output_text.annotation.added"),
                *("response.reasoning_text.delta", "response.image_generation_call.partial_image"),
            ]
        ),
        delta=TEXTS,
        partial_image_b64=TEXTS,
        item=members(type=st.sampled_from(["message", "function_call", "program", "reasoning", "x_call_output"])),
        part=members(text=TEXTS),
        response=members(status=st.sampled_from(["completed", "failed", "queued"]), usage=USAGE, error=ERROR),
        status=st.sampled_from(["completed", "failed", "queued"]),
        usage=USAGE,
        error=ERROR,
        **SAID,
    ),
    "messages": members(
        type=st.sampled_from(
            [
                "message_start",
                "ping",
                "content_block_start",
                "content_block_delta",
                "message_delta",
                "message_stop",
                "message",
                "error",
                "",
            ]
        ),
        message=members(id=TEXTS, usage=USAGE),
        content_block=members(
            type=st.sampled_from(["text", "thinking", "tool_use", "redacted_thinking", "compaction", "fallback"]),
            text=TEXTS,
            content=TEXTS,
        ),
        delta=members(
            type=TEXTS,
            text=TEXTS,
            thinking=TEXTS,
            partial_json=TEXTS,
            stop_reason=TEXTS,
            signature=TEXTS,
            content=TEXTS,
        ),
        stop_reason=TEXTS,
        usage=USAGE,
        error=ERROR,
        code=SAID["code"],
    ),
    "gemini": members(
        candidates=st.lists(
            members(
                content=members(
                    parts=st.lists(
                        members(
                            text=TEXTS,
                            thought=st.booleans(),
                            thoughtSignature=TEXTS,
                            functionCall=members(name=TEXTS),
                            toolCall=members(id=TEXTS),
                            fileData=members(fileUri=TEXTS),
                        ),
                        max_size=2,
                    )
                ),
                finishReason=st.sampled_from(["STOP", "MAX_TOKENS", None]),
            ),
            max_size=2,
        ),
        usageMetadata=members(
            promptTokenCount=COUNTS,
            candidatesTokenCount=COUNTS,
            thoughtsTokenCount=COUNTS,
            toolUsePromptTokenCount=COUNTS,
            cachedContentTokenCount=COUNTS,
        ),
        error=ERROR,
        **SAID,
    ),
}
NO_JSON = st.sampled_from(
    ["", "x", "[DONE]", "[DONE] ", "{", '{"usage":{"prompt_tokens":1}', "[1]", "null", '{"usage":NaN}']
)
BETWEEN = st.sampled_from(["", "", "", ": comment\n", ": comment\n\n", "retry: 3\n\n", "id: 7\n", "\n", "other\n"])
KINDS = st.sampled_from(["", "", "", "event: error\n", "event: message\n", "event:x\n"])


@st.composite
def streams(draw: st.DrawFn, api: str) -> bytes:
    text = ""
    for _ in range(draw(st.integers(0, 6))):
        spelled = draw(NO_JSON) if draw(st.integers(0, 5)) == 0 else draw(st.deferred(lambda: spellings(EVENTS[api])))
        prefix = draw(st.sampled_from(["data: ", "data:"]))
        lines = "".join(f"{prefix}{line}\n" for line in spelled.split("\n"))
        text += draw(BETWEEN) + draw(KINDS) + lines + draw(st.sampled_from(["\n", "\n", "\n\n", ""]))
    text = text.replace("\n", draw(st.sampled_from(["\n", "\r\n", "\r"])))
    return draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + text.encode()


@st.composite
def spellings(draw: st.DrawFn, events: st.SearchStrategy[dict[str, Any]]) -> str:
    """The same event as different servers write it."""
    event = draw(events)
    if draw(st.booleans()):
        event = dict(reversed(event.items()))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " : ")]))
    return json.dumps(
        event, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, None, 1])), separators=separators
    )


class Recording:
    """An observer that keeps which events had generated content."""

    def __init__(self) -> None:
        self.deltas: list[int] = []
        self.exchange = Exchange("r", "u", self, "id", 0.0)

    def started(self, exchange: Exchange) -> None: ...
    def rejected(self, reason: str) -> None: ...
    def limited(self, client: str, limit: str) -> None: ...
    def ledger_failed(self) -> None: ...
    def upstream_failed(self, kind: str, *, answered: bool) -> None: ...
    def attempted(self, endpoint: str, result: str) -> None: ...
    def retried(self, reason: str) -> None: ...
    def discarded(self, usage: Usage) -> None: ...
    def held(self, seconds: float) -> None: ...
    def of_whole_answers(self) -> Observer:
        return self

    def handed_over(self, exchange: Exchange, to: Observer) -> None: ...
    def connected(self, seconds: float) -> None: ...
    def reused(self) -> None: ...
    def response_head(self, seconds: float) -> None: ...
    def stream_started(self) -> None: ...
    def first_event(self, seconds: float) -> None: ...
    def forwarded(self, seconds: float) -> None: ...
    def released(self, seconds: float) -> None: ...
    def finished(self, exchange: Exchange) -> None: ...

    def first_token(self, seconds: float, request_id: str) -> None:
        assert not self.deltas
        self.deltas.append(self.exchange.events - 1)

    def gap(self, seconds: float) -> None:
        assert self.deltas
        self.deltas.append(self.exchange.events - 1)


def measured(api: str, pieces: list[bytes]) -> reference.Seen:
    recording = Recording()
    exchange = recording.exchange
    inspector = StreamInspector(exchange, dialect_of("", api), 1 << 22)
    for number, piece in enumerate(pieces):
        inspector.look(piece, float(number))
    usage = exchange.usage
    return reference.Seen(
        events=exchange.events,
        deltas=recording.deltas,
        reasoned=exchange.streamed_reasoning,
        usage=None if usage is None else usage.told(),
        final=usage is not None and usage.final,
        finish=exchange.finish_reason,
        ended=exchange.marker_seen,
        failed=exchange.reported_error,
        complained=exchange.complained,
        garbled=exchange.garbled,
    )


@pytest.mark.parametrize("api", list(reference.APIS))
@settings(max_examples=75, deadline=None)
@given(data=st.data())
def test_any_split_of_any_stream_is_measured_as_it_reads(api: str, data: st.DataObject) -> None:
    stream = data.draw(streams(api))
    truth = reference.read(api, stream)
    for pieces in ([stream], steps(stream), data.draw(splits(stream))):
        assert measured(api, pieces) == truth
