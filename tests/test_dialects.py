"""What events mean, and that nothing in them can hurt."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple, replace

from sseproxy.wire.deltas import delta_matcher
from sseproxy.wire.dialects import DIALECTS
from sseproxy.wire.dialects.chat import CHAT, read_completion
from sseproxy.wire.dialects.responses import RESPONSES
from sseproxy.wire.framing import frame, payload_of, whole_chunks
from sseproxy.wire.meaning import DELTA, END, GARBLED, NOTHING, REASONING, Meaning, Usage
from sseproxy.wire.sse import EventParser

from .harness import DONE, delta


def chunk(*deltas: object, **more: object) -> bytes:
    """A chunk with a choice for each of `deltas`."""
    choices = [{"index": index, "delta": delta, "finish_reason": None} for index, delta in enumerate(deltas)]
    return json.dumps({"id": "c", "choices": choices} | more).encode()


def read(data: bytes | dict[str, Any], kind: bytes = b"") -> Meaning:
    return read_completion(kind, data if isinstance(data, bytes) else json.dumps(data).encode())


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"content": " "},
        {"content": "null"},
        {"content": "[]"},
        {"content": "\u0000"},
        {"content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "a"},
        {"content": "", "reasoning_content": "a"},
        {"content": None, "reasoning": "a"},
        {"refusal": "a"},
        {"audio": {"data": "UklGRg=="}},
        {"reasoning_text": "a"},
        {"content": "", "reasoning_details": [{"type": "reasoning.text", "text": "a"}]},
        {"role": "assistant", "thinking_blocks": [{"thinking": "a"}]},
        {"a name of tomorrow": "a"},
        {"function_call": {"name": "f", "arguments": ""}},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
    ],
)
def test_generated_content_of_any_kind_is_a_delta(delta: dict[str, Any]) -> None:
    for meaning in (read(chunk(delta)), read(chunk({"role": "assistant"}, delta))):
        assert meaning in (DELTA, REASONING)
        assert meaning.reasoning == any(name.startswith("reasoning") for name in delta)


@pytest.mark.parametrize(
    "delta",
    [
        None,
        {},
        {"role": "assistant"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
        {"content": []},
        {"tool_calls": []},
        {"audio": {}},
        {"function_call": None, "reasoning": "", "reasoning_content": None},
        {"name": "a", "id": "c", "type": "x", "unknown": "", "index": 3, "extra": {"a": 1}, "done": True},
    ],
)
def test_a_delta_without_content_is_nothing(delta: dict[str, Any] | None) -> None:
    assert read(chunk(delta)) == NOTHING


@pytest.mark.parametrize(
    ("document", "meaning"),
    [
        ({"choices": [{"text": "a", "index": 0}]}, DELTA),
        ({"choices": [{"text": "", "index": 0}]}, NOTHING),
        ({"choices": [{"index": 0, "content_filter_results": {}}]}, NOTHING),
        ({"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}, NOTHING),
        ({"choices": None, "usage": None}, NOTHING),
        ({"type": "ping"}, NOTHING),
        ({}, NOTHING),
        ({"choices": [{"delta": {"content": "a"}}], "content": "a", "usage": None, "error": None}, DELTA),
        ({"delta": {"content": "a"}, "text": "a", "content": "a"}, NOTHING),
    ],
)
def test_only_choices_generate(document: dict[str, Any], meaning: Meaning) -> None:
    assert read(document) == meaning


def test_the_end_marker_is_exactly_that() -> None:
    for dialect in DIALECTS:
        for marker in (b"[DONE]", b" [DONE] ", b"[DONE]\t"):
            assert dialect.meaning_of(b"", marker) == END
            assert dialect.meaning_of(b"done", marker) == END
    assert read(b'"[DONE]"') == GARBLED
    assert read(chunk({"content": "[DONE]"})) == DELTA
    assert read(chunk({"content": "data: [DONE]\n\n"})) == DELTA


@pytest.mark.parametrize(
    ("kind", "data", "error"),
    [
        (b"error", b'{"message":"flat"}', True),
        (b"error", b'{"error":{"message":"nested"}}', True),
        (b"error", b"not JSON", True),
        (b"error", b"", True),
        (b"", b'{"error":{"message":"nested"}}', True),
        (b"", b'{"error":"text"}', True),
        (b"message", b'{"choices":[],"error":{"code":400}}', True),
        (b"", b'{"error":null}', False),
        (b"", b'{"error":{}}', False),
        (b"", b'{"error":""}', False),
        (b"errors", b'{"message":"flat"}', False),
        (b"", chunk({"content": '{"error":{"message":"quoted"}}'}), False),
        (b"", b'{"choices":[{"delta":{"content":"a"},"error":{"code":1}}]}', False),
        (b"", b'{"object":"error","message":"too long","code":400}', True),
        (b"", b'{"object":"list","data":[]}', False),
        (b"", b'{"choices":[],"x_groq":{"error":"over_capacity"}}', True),
        (b"", b'{"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}', True),
    ],
)
def test_an_error_is_what_the_upstream_calls_one(kind: bytes, data: bytes, error: bool) -> None:
    assert read(data, kind).error == error


def test_finish_reason_is_told_with_and_without_content() -> None:
    assert read({"choices": [{"delta": {}, "finish_reason": "stop"}]}) == Meaning(finish="stop")
    assert read({"choices": [{"delta": {"content": "a"}, "finish_reason": "length"}]}) == Meaning(True, finish="length")
    assert read({"choices": [{"delta": {}, "finish_reason": ""}]}) == NOTHING
    second = [{"delta": {}, "finish_reason": None}, {"delta": {}, "finish_reason": "tool_calls"}]
    assert read({"choices": second}).finish == "tool_calls"


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}, Usage(7, 2)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, Usage(0, 0)),
        ({"prompt_tokens": 8, "total_tokens": 8}, Usage(8)),
        ({"completion_tokens": 8}, Usage(None, 8)),
        ({"prompt_tokens": 10**15 - 1, "completion_tokens": None}, Usage(10**15 - 1)),
        (
            {
                "prompt_tokens": 7,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 5, "audio_tokens": 1},
                "completion_tokens_details": {"reasoning_tokens": 1, "audio_tokens": 1},
            },
            Usage(7, 2, 5, 1),
        ),
        (
            {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": None},
            Usage(7, None, 0, None),
        ),
        ({"prompt_tokens": 7, "prompt_tokens_details": [], "completion_tokens_details": "x"}, Usage(7)),
        ({"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": -1}}, Usage(7)),
        ({"prompt_tokens": "7", "completion_tokens": 2}, Usage(None, 2)),
        ({"queue_time": 0.02, "prompt_tokens": 7, "prompt_time": 1.5, "completion_tokens": 2}, Usage(7, 2)),
    ],
)
def test_usage_is_what_the_upstream_counted(usage: dict[str, Any], expected: Usage) -> None:
    assert read({"choices": [], "usage": usage}) == Meaning(usage=expected)
    # More comes, and will be counted.
    assert read(chunk({"content": "a"}, usage=usage)) == Meaning(delta=True, usage=replace(expected, final=False))
    assert read({"choices": [], "x_groq": {"id": "r", "usage": usage}}) == Meaning(usage=expected)


def test_usage_of_a_choice_counts_where_there_is_none_at_the_top() -> None:
    choices = [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": {"prompt_tokens": 2, "cached_tokens": 1}}]
    assert read({"choices": choices}) == Meaning(usage=Usage(2, None, 1), finish="stop")
    assert read({"choices": choices, "usage": {"prompt_tokens": 1}}).usage == Usage(1)
    assert read({"choices": choices, "usage": None}).usage == Usage(2, None, 1)


def test_usage_at_the_top_goes_before_that_of_groq() -> None:
    usage, groq = {"prompt_tokens": 1}, {"usage": {"prompt_tokens": 2}}
    assert read({"usage": usage, "x_groq": groq}).usage == Usage(1)
    assert read({"usage": None, "x_groq": groq}).usage == Usage(2)
    assert read({"usage": usage, "x_groq": None}).usage == Usage(1)
    assert read({"usage": usage, "x_groq": {"id": "r"}}).usage == Usage(1)


GARBAGE = [
    *(b"-1", b"-0", b"1.0", b"1e3", b"1E400", b"-1e400", b"0.5", b"1" + b"0" * 15, b"9" * 5000, b"true", b"false"),
    *(b'"7"', b'"NaN"', b"null", b"[7]", b'{"value":7}', b'"\xff"', b"[" * 300 + b"]" * 300),
]


@pytest.mark.parametrize("value", GARBAGE)
def test_garbage_is_never_counted_and_hides_nothing_beside_it(value: bytes) -> None:
    beside = b'{"usage":{"prompt_tokens":%b,"completion_tokens":2}}'
    assert read(beside % value) == Meaning(usage=Usage(None, 2))
    beside = b'{"usage":{"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":%b}}}'
    assert read(beside % value) == Meaning(usage=Usage(7))
    assert read(b'{"usage":{"prompt_tokens":%b,"completion_tokens":%b}}' % (value, value)).usage is None


@pytest.mark.parametrize("value", [*GARBAGE, b'""', b"[]", b"{}", b'"\\ud800"', b"NaN"])
@pytest.mark.parametrize(
    "document",
    [
        b'{"usage":%b}',
        b'{"choices":%b,"usage":null}',
        b'{"choices":[%b]}',
        b'{"choices":[{"delta":%b}]}',
        b'{"x_groq":%b}',
        b'{"x_groq":{"usage":%b}}',
        b'{"usage":{"prompt_tokens_details":%b}}',
    ],
)
def test_a_wrong_type_anywhere_is_neither_usage_nor_a_delta(document: bytes, value: bytes) -> None:
    meaning = read(document % value)
    assert (meaning.usage, meaning.delta, meaning.finish, meaning.end, meaning.error) == (
        None,
        False,
        None,
        False,
        False,
    )


@pytest.mark.parametrize("value", [value for value in GARBAGE if value not in (b'"7"', b'"NaN"')])
def test_a_finish_reason_that_is_not_text_hides_nothing_beside_it(value: bytes) -> None:
    document = b'{"choices":[{"delta":{"content":"a"},"finish_reason":%b}],"usage":{"prompt_tokens":7}}'
    assert read(document % value) == Meaning(delta=True, usage=Usage(7, final=False))


@pytest.mark.parametrize(
    "document",
    [
        chunk({"content": '"usage":{"prompt_tokens":1,"completion_tokens":1}'}),
        chunk({"content": 'data: {"usage":{"prompt_tokens":1}}\n\ndata: [DONE]'}),
        chunk({"tool_calls": [{"function": {"arguments": '{"usage":{"prompt_tokens":1},"error":{}}'}}]}),
        chunk({"content": "a", "usage": {"prompt_tokens": 1}, "error": {"message": "x"}}),
        chunk({"content": "a"}, timings={"usage": {"prompt_tokens": 1}}, response={"usage": {"prompt_tokens": 1}}),
    ],
)
def test_what_looks_like_usage_elsewhere_is_not(document: bytes) -> None:
    assert read(document) == DELTA


@pytest.mark.parametrize(
    "data", [b"", b"{", b"{oops", b"null", b"[]", b'""', b"1", b"{}{}", b"\xef\xbb\xbf{}", b"[DONE", b"NaN"]
)
def test_what_cannot_be_decoded_is_said_to_be(data: bytes) -> None:
    assert read(data) == GARBLED
    assert not GARBLED.understood


@pytest.mark.parametrize(
    "opening", [b"[", b'{"a":', b'{"choices":[', b'{"usage":{"prompt_tokens_details":{"cached_tokens":[']
)
@pytest.mark.parametrize("depth", [1, 100, 900, 1000, 1100, 100_000])
def test_no_depth_of_nesting_raises(opening: bytes, depth: int) -> None:
    closing = {b"[": b"]", b"{": b"}"}
    closed = b"".join(closing[bytes([byte])] for byte in reversed(opening) if byte in b"[{")
    for nested in (opening * depth, opening * depth + b"0" + closed * depth):
        assert read(nested) in (GARBLED, NOTHING)
        assert read(b'{"choices":[{"finish_reason":%b}]}' % nested) in (GARBLED, NOTHING)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"error", b"ping"]))
def test_arbitrary_bytes_never_raise(data: bytes, kind: bytes) -> None:
    meaning = read(data, kind)
    assert meaning.usage is None
    assert meaning.error == (kind == b"error")


KEYS = st.sampled_from(
    "choices delta content reasoning tool_calls text finish_reason usage x_groq error prompt_tokens completion_tokens "
    "prompt_tokens_details completion_tokens_details cached_tokens reasoning_tokens other".split()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_arbitrary_documents_never_raise_and_count_only_counts(document: dict[str, Any]) -> None:
    meaning = read(document)
    assert isinstance(meaning.delta, bool)
    assert meaning.finish is None or isinstance(meaning.finish, str)
    for count in () if meaning.usage is None else astuple(meaning.usage):
        assert count is None or 0 <= count < 10**15
    if meaning.understood and meaning.usage is not None and isinstance(document.get("usage"), dict):
        told = document["usage"].get("prompt_tokens")
        if isinstance(told, int) and not isinstance(told, bool) and 0 <= told < 10**15:
            assert meaning.usage.input == told


TEXT = st.text(min_size=1) | st.sampled_from(
    [" token", "\\", '"', "\n", "\x00", "[DONE]", '","finish_reason":"stop', "\x7f", "é"]
)
KEYS = st.sampled_from(["content", "reasoning_content", "refusal"])


def written(document: object, *, spaced: bool, ascii_only: bool) -> bytes:
    separators = (", ", ": ") if spaced else (",", ":")
    return b"data: " + json.dumps(document, separators=separators, ensure_ascii=ascii_only).encode() + b"\n\n"


@given(st.lists(st.tuples(KEYS, TEXT), min_size=2, max_size=2), st.booleans(), st.booleans(), st.booleans())
def test_a_matcher_accepts_a_delta_and_nothing_else(
    deltas: list[tuple[str, str]], spaced: bool, ascii_only: bool, finished: bool
) -> None:
    first, second = (
        written(
            {
                "choices": [{"delta": {key: text}, "finish_reason": "stop" if finished and last else None}],
                "usage": None,
            },
            spaced=spaced,
            ascii_only=ascii_only,
        )
        for last, (key, text) in enumerate(deltas)
    )
    matcher = delta_matcher(first, CHAT.text)
    if matcher is not None and matcher.size_of(frame(second)):
        assert matcher.size_of(frame(second)) == len(second)
        assert means(second) == means(first)
        assert means(second) in ([DELTA], [REASONING])
        assert not finished


def means(event: bytes) -> list[Meaning]:
    return [read_completion(kind, data or b"") for kind, data in EventParser(1 << 20).feed(event)]


@given(
    st.binary(min_size=1, max_size=40), st.integers(0, 150), st.booleans(), st.sampled_from([{}, {"obfuscation": "aB"}])
)
def test_a_matcher_accepts_nothing_that_is_read_otherwise(
    inserted: bytes, at: int, inside: bool, more: dict[str, str]
) -> None:
    matcher = delta_matcher(delta("Hi", **more), CHAT.text)
    assert matcher is not None
    plain = delta("Ho ho", **more) if inside else frame(delta("Ho ho", **more))
    at %= len(plain)
    changed = plain[:at] + inserted + plain[at:]
    changed = frame(changed) if inside else changed
    if matcher.size_of(changed):
        assert whole_chunks(changed) == [changed]
        assert means(payload_of(changed)) == [DELTA]


def test_a_matcher_accepts_chunks_with_another_plain_text() -> None:
    matcher = delta_matcher(delta("Hi"), CHAT.text)
    assert matcher is not None
    assert matcher.size_of(frame(delta("ho"))) == len(delta("ho"))
    for other in ('"', "a\\", "\n", ""):
        assert not matcher.size_of(frame(delta(other)))
    assert not matcher.size_of(frame(delta("ho"))[:-1])
    assert not matcher.size_of(frame(delta("ho") + delta("ho")))
    assert not matcher.size_of(frame(delta("ho")) + frame(delta("ho")))
    assert not matcher.size_of(frame(delta("ho" * 4096)))
    assert delta_matcher(delta(""), CHAT.text) is None
    assert delta_matcher(DONE, CHAT.text) is None


def test_a_matcher_accepts_padding_of_any_length() -> None:
    matcher = delta_matcher(delta("Hi", obfuscation="aB3"), CHAT.text)
    assert matcher is not None
    for padding in ("", "x", "xyZ0" * 9):
        assert matcher.size_of(frame(delta("ho", obfuscation=padding)))
    for other in (
        delta("ho"),
        delta("", obfuscation="x"),
        delta("h\\", obfuscation="x"),
        delta("ho", obfuscation='"'),
        delta("ho", obfuscation=1),
        delta("ho", obfuscation="x", usage={"prompt_tokens": 1}),
        delta("ho", usage={"prompt_tokens": 1}, obfuscation="x"),
    ):
        assert not matcher.size_of(frame(other))


def test_a_matcher_accepts_any_number() -> None:
    def numbered(number: object, text: str, padding: str) -> bytes:
        return b"event: response.output_text.delta\ndata: " + (
            json.dumps(
                {"type": "response.output_text.delta", "sequence_number": number, "delta": text}
                | {"logprobs": [], "obfuscation": padding}
            ).encode()
            + b"\n\n"
        )

    matcher = delta_matcher(numbered(9, "Hi", "abc"), RESPONSES.text)
    assert matcher is not None
    for number in (0, 10, 12345):
        assert matcher.size_of(frame(numbered(number, " ho", "xy")))
    for other in (numbered(-1, "a", "b"), numbered(1.5, "a", "b"), numbered("1", "a", "b"), numbered(1, "", "b")):
        assert not matcher.size_of(frame(other))
    assert not matcher.size_of(frame(numbered(77, "a", "b").replace(b"77", b"07")))


def test_a_matcher_accepts_nothing_without_its_framing() -> None:
    matcher = delta_matcher(delta("Hi"), CHAT.text)
    assert matcher is not None
    # Of whatever length, also of those that no chunk has.
    for length in range(1, 1024):
        text = delta("o" * length)
        assert not matcher.size_of(text)
        assert not matcher.size_of(text + b"\r\n")
