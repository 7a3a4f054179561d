"""What events mean in the APIs that are not chat completions, and which API is spoken where."""

from __future__ import annotations

import json
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple, replace

from sseproxy import config
from sseproxy.wire.dialects import DIALECTS, Dialect, dialect_of, models_in
from sseproxy.wire.meaning import END, NOTHING, Meaning, Usage

from .conftest import StartProxy
from .harness import STREAM_HEAD, ScriptedUpstream, begin, chunk, post

BY_NAME = {dialect.name: dialect for dialect in DIALECTS}


def read(name: str, document: dict[str, Any], kind: str = "") -> Meaning:
    return BY_NAME[name].read(kind.encode(), json.dumps(document).encode())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "chat"),
        ("/chat/completions", "chat"),
        ("/openai/deployments/gpt/chat/completions", "chat"),
        ("/v1/completions", "completions"),
        ("/v1/chat/completions/", "chat"),
        ("/v1/Chat/Completions", "chat"),
        ("/v1/chat%2Fcompletions", "chat"),
        ("/v1/chat%5ccompletions", "chat"),
        ("/v1//chat//completions//", "chat"),
        ("/v1/chat;a=1/completions;b/;c", "chat"),
        ("/v1/chat/completions;b/chatcmpl-1", "generic"),
        ("/v1beta/models/gemini-x%3AgenerateContent", "gemini"),
        ("/v1/chat/completions/chatcmpl-1", "generic"),
        ("/v1/xcompletions", "generic"),
        ("/v1/responses", "responses"),
        ("/v1/responses/resp_1", "responses"),
        ("/v1/responses/resp_1/cancel", "responses"),
        ("/v1/responses/resp_1/input_items", "generic"),
        ("/v1/responses/compact", "responses"),
        ("/v1/responses/input_tokens", "generic"),
        ("/v1/messages", "messages"),
        ("/v1/messages/count_tokens", "generic"),
        ("/v1/projects/p/locations/l/publishers/anthropic/models/claude:streamRawPredict", "messages"),
        ("/v1/projects/p/locations/l/publishers/anthropic/models/claude:rawPredict", "messages"),
        ("/v1/projects/p/locations/l/publishers/mistralai/models/mistral:streamRawPredict", "chat"),
        ("/v1/threads/runs", "assistants"),
        ("/v1/threads/t/runs", "assistants"),
        ("/v1/threads/t/runs/r/submit_tool_outputs", "assistants"),
        ("/v1/threads/messages", "generic"),
        ("/v1beta/models/gemini-x:streamGenerateContent", "gemini"),
        ("/v1beta/models/gemini-x:generateContent", "gemini"),
        ("/v1/audio/speech", "speech"),
        ("/v1/audio/transcriptions", "transcriptions"),
        ("/v1/audio/translations", "transcriptions"),
        ("/v1/images/generations", "images"),
        ("/v1/images/edits", "images"),
        ("/v1/embeddings", "generic"),
        ("/", "generic"),
        ("", "generic"),
    ],
)
def test_the_path_tells_the_dialect(path: str, name: str) -> None:
    assert dialect_of(path).name == name


@pytest.mark.parametrize("worst", ["/models/a:", "/models/a:count", "/a:predict", "/models/", "//;", "%2f", "/a:x1"])
def test_a_path_is_looked_at_in_a_short_time_whatever_is_in_it(worst: str) -> None:
    path = worst[:10] + worst[-5:] * (65_536 // 5) + "1"
    begun = perf_counter()
    models_in(path)
    dialect_of(path)
    assert perf_counter() - begun < 1


def test_dialects_have_names_of_their_own() -> None:
    assert len(BY_NAME) == len(DIALECTS)


RESPONSE = {"status": "completed", "usage": {"input_tokens": 3, "output_tokens": 2}}
TEXT_DELTA = {"type": "content_block_delta", "index": 0}
GEMINI_TEXT = {"content": {"parts": [{"text": "Hi"}]}}


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("responses", {"type": "response.output_text.delta", "delta": "Hi"}),
        ("responses", {"type": "response.refusal.delta", "delta": "No"}),
        ("responses", {"type": "response.reasoning_summary_text.delta", "delta": "Hm"}),
        ("responses", {"type": "response.function_call_arguments.delta", "delta": "{"}),
        ("responses", {"type": "response.image_generation_call.partial_image", "partial_image_b64": "iVBORw0KGgo"}),
        ("messages", TEXT_DELTA | {"delta": {"type": "text_delta", "text": "Hi"}}),
        ("messages", TEXT_DELTA | {"delta": {"type": "thinking_delta", "thinking": "Hm"}}),
        ("messages", TEXT_DELTA | {"delta": {"type": "input_json_delta", "partial_json": "{"}}),
        ("responses", {"type": "response.output_item.added", "item": {"type": "function_call", "arguments": ""}}),
        ("responses", {"type": "response.content_part.added", "part": {"type": "output_text", "text": "Hi"}}),
        ("responses", {"type": "response.output_text.annotation.added", "annotation": {"type": "url_citation"}}),
        ("messages", TEXT_DELTA | {"delta": {"type": "citations_delta", "citation": {"url": "u"}}}),
        ("messages", TEXT_DELTA | {"delta": {"type": "compaction_delta", "content": "In short"}}),
        ("messages", {"type": "content_block_start", "content_block": {"type": "tool_use", "input": {}}}),
        ("messages", {"type": "content_block_start", "content_block": {"type": "redacted_thinking", "data": "x"}}),
        ("messages", {"type": "content_block_start", "content_block": {"type": "a_block_of_tomorrow"}}),
        ("transcriptions", {"object": "transcription.chunk", "choices": [{"delta": {"content": " And"}}]}),
        ("gemini", {"candidates": [GEMINI_TEXT]}),
        ("gemini", {"response": {"candidates": [GEMINI_TEXT]}}),
        ("gemini", {"candidates": [{"content": {"parts": [{"text": "Hm", "thought": True}]}}]}),
        ("gemini", {"candidates": [{"content": {"parts": [{"fileData": {"fileUri": "u"}}]}}]}),
        ("gemini", {"candidates": [{"content": {"parts": [{"functionCall": {"name": "f"}}]}}]}),
        ("speech", {"type": "speech.audio.delta", "audio": "UklGRg=="}),
        ("transcriptions", {"type": "transcript.text.delta", "delta": "Hi"}),
        ("transcriptions", {"type": "transcript.text.segment", "text": "Hi"}),
        ("images", {"type": "image_generation.partial_image", "b64_json": "iVBORw0KGgo"}),
        ("assistants", {"object": "thread.message.delta", "delta": {"content": [{"text": {"value": "Hi"}}]}}),
        ("assistants", {"object": "thread.run.step.delta", "delta": {"step_details": {"type": "tool_calls"}}}),
    ],
)
def test_generated_content_is_a_delta(name: str, document: dict[str, Any]) -> None:
    meaning = read(name, document)
    assert meaning.delta
    assert replace(meaning, delta=False, more=False, reasoning=False) == NOTHING


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("responses", {"type": "response.created", "response": RESPONSE | {"usage": None, "status": "in_progress"}}),
        ("responses", {"type": "response.output_text.delta", "delta": ""}),
        ("responses", {"type": "response.output_text.done", "text": "usage"}),
        ("responses", {"type": "response.output_item.added", "item": {"type": "message", "content": []}}),
        ("responses", {"type": "response.output_item.added", "item": {"type": "function_call_output"}}),
        ("messages", {"type": "ping"}),
        ("messages", {"type": "content_block_start", "content_block": {"type": "compaction", "content": None}}),
        ("messages", {"type": "content_block_start", "content_block": {"type": "fallback"}}),
        ("gemini", {"candidates": [{"content": {"parts": [{"thoughtSignature": "x"}]}}]}),
        ("messages", {"type": "content_block_start", "content_block": {"type": "text", "text": ""}}),
        ("messages", TEXT_DELTA | {"delta": {"type": "input_json_delta", "partial_json": ""}}),
        ("messages", TEXT_DELTA | {"delta": {"type": "signature_delta", "signature": "EqQB"}}),
        ("gemini", {"candidates": [{"content": {"parts": [{"text": ""}]}}]}),
        ("gemini", {"candidates": [{"content": {"role": "model"}}]}),
        ("speech", {"type": "speech.audio.delta", "audio": ""}),
        ("transcriptions", {"type": "transcript.text.delta", "delta": ""}),
        ("assistants", {"object": "thread", "id": "t"}),
        ("assistants", {"object": "thread.message.delta", "delta": {"content": [{"text": {"value": ""}}]}}),
        ("assistants", {"object": "thread.run.step", "usage": {"prompt_tokens": 20, "completion_tokens": 11}}),
    ],
)
def test_what_generates_nothing_means_nothing(name: str, document: dict[str, Any]) -> None:
    assert read(name, document) == NOTHING


@pytest.mark.parametrize(
    ("name", "document", "expected"),
    [
        (
            "responses",
            {"type": "response.completed", "response": RESPONSE},
            Meaning(False, Usage(3, 2), "completed", True),
        ),
        (
            "responses",
            {"type": "response.incomplete", "response": RESPONSE | {"status": "incomplete"}},
            Meaning(False, Usage(3, 2), "incomplete", True),
        ),
        (
            "responses",
            {"type": "response.failed", "response": {"status": "failed", "error": {}}},
            Meaning(finish="failed", end=True, error=True),
        ),
        ("responses", {"object": "response", **RESPONSE}, Meaning(usage=Usage(3, 2), finish="completed")),
        ("responses", {"type": "response.done", "response": RESPONSE}, Meaning(False, Usage(3, 2), "completed", True)),
        (
            "responses",
            {"object": "response", "id": "r", "background": True, "status": "queued", "usage": None, "error": None},
            Meaning(kept_as="r"),
        ),
        (
            "gemini",
            {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 3}},
            Meaning(False, Usage(3), "SAFETY", True),
        ),
        ("messages", {"type": "message_stop"}, END),
        (
            "messages",
            {"stop_reason": "end_turn", "usage": {"output_tokens": 2}},
            Meaning(usage=Usage(None, 2), finish="end_turn"),
        ),
        (
            "messages",
            {"type": "message", "stop_reason": "end_turn", "usage": {"input_tokens": 3, "output_tokens": 2}},
            Meaning(usage=Usage(3, 2), finish="end_turn"),
        ),
        (
            "gemini",
            {"candidates": [GEMINI_TEXT | {"finishReason": "STOP"}], "usageMetadata": {"promptTokenCount": 3}},
            Meaning(True, Usage(3), "STOP", True),
        ),
        (
            "speech",
            {"type": "speech.audio.done", "usage": {"input_tokens": 3, "output_tokens": 2}},
            Meaning(False, Usage(3, 2), "speech.audio.done", True),
        ),
        (
            "transcriptions",
            {"type": "transcript.text.done", "text": "Hi", "usage": {"type": "duration", "seconds": 9.5}},
            Meaning(False, Usage(seconds=9.5), "transcript.text.done", True),
        ),
        ("transcriptions", {"text": "Hi", "usage": {"seconds": 3}}, Meaning(usage=Usage(seconds=3.0))),
        (
            "images",
            {
                "type": "image_edit.completed",
                "b64_json": "iVBORw0KGgo",
                "usage": {"input_tokens": 3, "output_tokens": 2},
            },
            Meaning(True, Usage(3, 2), "completed", True),
        ),
        (
            "assistants",
            {"object": "thread.run", "status": "completed", "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
            Meaning(usage=Usage(3, 2), finish="completed"),
        ),
        ("assistants", {"object": "thread.run", "status": "failed"}, Meaning(finish="failed", error=True)),
        ("generic", {"data": [], "usage": {"prompt_tokens": 8}}, Meaning(usage=Usage(8))),
        ("generic", {"results": [], "usage": {"input_tokens": 8}}, Meaning(usage=Usage(8))),
    ],
)
def test_ends_tell_usage_and_why(name: str, document: dict[str, Any], expected: Meaning) -> None:
    assert read(name, document) == expected


def test_counts_of_messages_are_overlaid_and_never_fall() -> None:
    first = {"input_tokens": 25, "cache_read_input_tokens": 900, "output_tokens": 3}
    start = read("messages", {"type": "message_start", "message": {"usage": first}}).usage
    # What it says of the output is no count of it.
    assert start == Usage(925, None, 900, final=False)
    for told in ({"output_tokens": 57}, {"output_tokens": 57, "input_tokens": 0, "cache_read_input_tokens": 0}):
        later = read("messages", {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": told})
        assert later.finish == "end_turn"
        assert later.usage is not None
        assert start.updated(later.usage) == Usage(925, 57, 900)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 9, "prompt_cache_hit_tokens": 4}, Usage(9, None, 4)),
        ({"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4}}, Usage(9, None, 4)),
        ({"output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 4}}, Usage(None, 9, None, 4)),
        ({"promptTokenCount": 9, "cachedContentTokenCount": 4, "thoughtsTokenCount": 2}, Usage(9, 2, 4, 2)),
        ({"promptTokenCount": 9, "toolUsePromptTokenCount": 5, "candidatesTokenCount": 3}, Usage(14, 3)),
        ({"candidatesTokenCount": 3, "thoughtsTokenCount": 4}, Usage(None, 7, None, 4)),
        (
            {"input_tokens": 9, "cache_read_input_tokens": 90, "cache_creation_input_tokens": 900},
            Usage(999, None, 90, cache_write=900),
        ),
        (
            {"input_tokens": 9, "cache_creation": {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 2}},
            Usage(12, cache_write=3),
        ),
        (
            {"output_tokens": 9, "output_tokens_details": {"thinking_tokens": 4}, "cache_read_input_tokens": 7},
            Usage(None, 9, 7, 4),
        ),
        (
            {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3}},
            Usage(9, None, 4, cache_write=3),
        ),
        (
            {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3}},
            Usage(9, None, 4, cache_write=3),
        ),
        # xAI's reasoning comes on top, everybody else's is a part.
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 3,
                "total_tokens": 19,
                "completion_tokens_details": {"reasoning_tokens": 7},
            },
            Usage(9, 10, None, 7),
        ),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 10,
                "total_tokens": 19,
                "completion_tokens_details": {"reasoning_tokens": 7},
            },
            Usage(9, 10, None, 7),
        ),
        ({"input_tokens": 9, "output_tokens": -1}, Usage(9)),
        ({"input_tokens": "9", "output_tokens": 1}, Usage(None, 1)),
        ({"seconds": -1}, None),
        ({"seconds": "9"}, None),
        ({"input_tokens": 10**15}, None),
        ({}, None),
    ],
)
def test_counts_are_found_under_every_name_and_garbage_is_none(usage: dict[str, Any], expected: Usage | None) -> None:
    assert read("speech", {"type": "speech.audio.done", "usage": usage}).usage == expected


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_an_error_event_is_an_error_in_every_dialect(dialect: Dialect) -> None:
    nested = b'{"type":"error","error":{"message":"overloaded"}}'
    assert dialect.read(b"error", nested).error
    assert dialect.read(b"error", b"not json").error
    assert dialect.read(b"", b'{"error":{"message":"overloaded"}}').error


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_usage_beside_what_has_the_wrong_type_is_still_found(dialect: Dialect) -> None:
    meaning = dialect.read(b"", b'{"choices":7,"type":7,"object":7,"candidates":7,"usage":{"prompt_tokens":3}}')
    assert meaning.usage == Usage(3)
    assert not meaning.understood


KEYS = st.sampled_from(
    "type object response message delta content parts candidates text usage usageMetadata status error step_details "
    "audio b64_json input_tokens output_tokens thoughtsTokenCount seconds finishReason other".split()
)
TYPES = st.sampled_from(
    "response.completed response.output_text.delta message_start message_delta content_block_delta speech.audio.done "
    "image_edit.completed thread.run thread.message.delta".split()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TYPES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None)
@given(document=st.dictionaries(KEYS, VALUES | TYPES, max_size=6), kind=st.sampled_from([b"", b"error", b"thread.run"]))
def test_arbitrary_documents_never_raise_and_count_only_counts(document: dict[str, Any], kind: bytes) -> None:
    data = json.dumps(document).encode()
    for dialect in DIALECTS:
        meaning = dialect.read(kind, data)
        assert meaning.finish is None or isinstance(meaning.finish, str)
        for count in () if meaning.usage is None else astuple(meaning.usage):
            assert count is None or 0 <= count < 10**15


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=60))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    for dialect in DIALECTS:
        assert dialect.read(b"", data).usage is None


def candidate(index: int, text: str, finish: str | None = None) -> bytes:
    """An event of one of Gemini's candidates."""
    found = {"index": index, "content": {"parts": [{"text": text}]}} | ({"finishReason": finish} if finish else {})
    return b"data: " + json.dumps({"candidates": [found]}).encode() + b"\n\n"


def picture(kind: str) -> bytes:
    return b"data: " + json.dumps({"type": f"image_generation.{kind}", "b64_json": "iVBORw0KGgo"}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("path", "first", "second", "last"),
    [
        (
            "/v1beta/models/gemini-x:streamGenerateContent",
            candidate(0, "Hi", "STOP"),
            candidate(1, "Ho"),
            candidate(1, "!", "STOP"),
        ),
        ("/v1/images/generations", picture("completed"), picture("partial_image"), picture("completed")),
    ],
    ids=["gemini", "images"],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut"])
async def test_the_end_of_one_of_several_is_not_that_of_the_stream(
    start: StartProxy, upstream: ScriptedUpstream, path: str, first: bytes, second: bytes, last: bytes, whole: bool
) -> None:
    base = path[: path.index("/", 1)]
    up = config.Upstream(name="up", url=f"{upstream.url}{base}")
    route = config.Route(name="api", match=config.Match(path=base), upstream=(config.Target(name="up"),))
    proxy = await start(upstream.url, upstreams=(up,), routes=(route,))
    client, api = await begin(proxy, upstream, post(path=path))
    events = [first, second, last] if whole else [first, second]
    api.send(STREAM_HEAD, *map(chunk, events))
    await client.read_until(events[-1])
    api.close()
    await client.rest()
    assert await proxy.ended() == {"completed" if whole else "truncated": 1}
    assert proxy.sample("stream_ends_total", end="marker") == whole
