"""Asking for usage: what is put into a request, and what is taken out of a stream."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.wire.request import RequestReader
from sseproxy.wire.sse import EventParser
from sseproxy.wire.usage import UsageStripper

from .harness import DONE, delta, usage
from .splits import splits, steps

# The bytes of the other members, as no JSON library would write them again.
ODD = b'"seed": 1e400, "n":1.0,\t"user":"\\u0041\\ud83d\\ude00"'


def with_usage(*parts: bytes) -> bytes | None:
    """The body of these parts with usage asked for."""
    reader = RequestReader()
    for part in parts:
        reader.feed(part)
    splice = reader.with_usage()
    return None if splice is None else b"".join(splice.into(parts))


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (b'{"stream":true}', {"include_usage": True}),
        (b'{"stream": true , "stream_options":null}', {"include_usage": True}),
        (b'{"stream":true,"stream_options":{}}', {"include_usage": True}),
        (b'{"stream":true,"stream_options":{"include_usage":null}}', {"include_usage": True}),
        (
            b'{"stream":true,"stream_options":{"include_obfuscation":false}}',
            {"include_obfuscation": False, "include_usage": True},
        ),
    ],
)
def test_usage_is_asked_for(body: bytes, options: object) -> None:
    asking = with_usage(body)
    assert asking is not None
    assert json.loads(asking) == {"stream": True, "stream_options": options}


def test_everything_else_is_asked_as_it_was_spelled() -> None:
    body = b'{"messages": [ {"role":"user"} ], "stream":true,' + ODD + b" } "
    added = body[:-3] + b' ,"stream_options":{"include_usage":true}} '
    assert with_usage(body) == with_usage(*steps(body)) == added
    large = b'{"x":"%b",' % (b"x" * 50_000)
    assert with_usage(large + body[1:]) == with_usage(*steps(large + body[1:], 1000)) == large + added[1:]
    there = large + b'"stream":true, "stream_options" : { } ,' + ODD + b"}"
    assert with_usage(there) == there.replace(b"{ }", b'{"include_usage":true}')


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"[1]",
        b'{"stream":true',
        b"{}",
        b'{"stream":false}',
        b'{"stream":1}',
        b'{"stream":"true"}',
        b'{"x":{"stream":true}}',
        b'{"stream":true,"stream_options":{"include_usage":false}}',
        b'{"stream":true,"stream_options":{"include_usage":true}}',
        b'{"stream":true,"stream_options":[]}',
        b'{"stream":true,"stream_options":"x"}',
        b'{"stream":true,"x":' + b"[" * 100_000 + b"}",
        b'{"stream":true,"\xff":1}',
    ],
)
def test_where_there_is_nothing_to_ask_nothing_is_changed(body: bytes) -> None:
    assert with_usage(body) is None


def stripped(*parts: bytes) -> bytes:
    stripper = UsageStripper()
    return b"".join(stripper.feed(part) for part in parts) + stripper.end()


FULL = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","system_fingerprint":null,'
    b'"service_tier":"default","choices" : [ ],"usage":{"prompt_tokens":1},"obfuscation":"x"}\n\n'
)


LLAMA = b'data: {"choices":[],"usage":{"prompt_tokens":1},"timings":{"predicted_n":1}}\n\n'


# As vendors deviate: without choices, with null, with one that says nothing; with keys of their own.
DEVIATIONS = [
    b'data: {"usage":{"prompt_tokens":1}}\n\n',
    b'data: {"choices":null,"usage":{"prompt_tokens":1}}\n\n',
    b'data: {"choices":[{"index":0,"delta":{}}],"usage":{"prompt_tokens":1}}\n\n',
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":null,"logprobs":null}],"usage":{"prompt_tokens":1}}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":1},"metrics":{"ttft":0.1},"provider":"p"}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":1},"prompt_filter_results":[]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":1},"citations":["x"],"error":null}\n\n',
    b'data:{"usage" :\t{"prompt_tokens":1},"choices":[]}\n\n',
]


@pytest.mark.parametrize(
    "event",
    [usage(3, 5), FULL, LLAMA, FULL.replace(b"\n", b"\r\n"), b"id: 3\nevent: x\n" + FULL, *DEVIATIONS],
)
def test_an_event_that_only_tells_usage_is_taken_out(event: bytes) -> None:
    assert stripped(delta("Hi") + event + DONE) == delta("Hi") + DONE
    assert stripped(delta("Hi"), event, DONE) == delta("Hi") + DONE
    assert stripped(*steps(delta("Hi") + event + DONE)) == delta("Hi") + DONE


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[],"usage":null}\n\n',
        b'data: {"choices":[]}\n\n',
        b'data: {"usage":null}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0}]}}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[{"index":0,"content_filter_results":{"hate":1}}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[7],"usage":{"prompt_tokens":1}}\n\n',
        b'{"choices":[],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":"x"}}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":1},"error":{"message":"x"}}\n\n',
        b'data: {"choices":{"x":[]},"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"x":{"choices":[],"usage":{"prompt_tokens":1}}}\n\n',
        delta('"choices":[],"usage":{"prompt_tokens":1}'),
        b'data: {"choices":[],"usage":{"prompt_tokens":1}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":1}}',
        b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n',
        b'data {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
        b': {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
        DONE,
    ],
)
def test_any_other_event_stays(event: bytes) -> None:
    assert stripped(delta("Hi") + event) == delta("Hi") + event
    assert stripped(*steps(delta("Hi") + event)) == delta("Hi") + event


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_a_byte_order_mark_stays_and_hides_nothing(size: int) -> None:
    stream = b"\xef\xbb\xbf: comment\n" + usage(1, 2) + DONE
    assert stripped(*steps(stream, size)) == b"\xef\xbb\xbf: comment\n" + DONE
    assert stripped(b"\xef\xbb") == b"\xef\xbb"
    assert stripped(b"\xef", b"\xbb", b"data: x\n\n") == b"\xef\xbbdata: x\n\n"
    later = b"data: x\n\n\xef\xbb\xbf" + usage(1, 2)
    assert stripped(later) == later


def test_a_comment_in_the_event_stays() -> None:
    assert stripped(b": one\n" + usage(1, 2)[:-1] + b": two\n\n" + DONE) == b": one\n: two\n" + DONE


def test_nothing_but_an_event_that_may_tell_usage_is_held() -> None:
    stripper = UsageStripper()
    assert stripper.feed(b": wait") == b": wait"
    assert stripper.feed(b"ing\n") == b"ing\n"
    assert stripper.feed(b"data: [DO") == b"data: [DO"
    assert stripper.feed(b"NE]\n") == b"NE]\n"
    assert stripper.feed(b"\n") == b"\n"
    assert stripper.feed(b'data: {"cho') == b""
    large = b"x" * 70_000
    assert stripper.feed(large) == b'data: {"cho' + large
    assert stripper.feed(b"y") == b"y"
    assert stripper.feed(b"\n\n") == b"\n\n"
    event = delta("Hi")
    assert stripper.feed(event) is event


EVENTS = st.sampled_from(
    [
        delta("Hi"),
        delta("é\u2028"),
        usage(3, 5),
        FULL,
        *DEVIATIONS,
        b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}\n\n',
        b"event: e\n" + usage(1, 1),
        b"id: 1\n: c\n" + usage(1, 1),
        b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[],"usage":null}\n\n',
        b": comment\n",
        b": comment\n\n",
        b"retry: 3\n\n",
        b"\n",
        DONE,
        b"data: [1]\n\n",
        b"data\n\n",
        b"data:\n\n",
        b'data: {"unfinished',
    ]
)
STREAMS = st.tuples(
    st.sampled_from([b"", b"", b"\xef\xbb\xbf"]), st.lists(st.tuples(EVENTS, st.sampled_from([b"\n", b"\r\n", b"\r"])))
).map(lambda made: made[0] + b"".join(event.replace(b"\n", end) for event, end in made[1]))


def only_usage(data: bytes) -> bool:
    try:
        event = json.loads(data)
    except ValueError:
        return False
    if not isinstance(event, dict) or not event.get("usage") or event.get("error"):
        return False
    said = [value for choice in event.get("choices") or [] for key, value in choice.items() if key != "index"]
    return not any(value not in (None, {}, [], "") for value in said)


@given(st.data(), STREAMS)
def test_every_split_leaves_the_same_and_every_event_in_time(data: st.DataObject, stream: bytes) -> None:
    stripper, before, after = UsageStripper(), EventParser(1 << 22), EventParser(1 << 22)
    sent: list[tuple[bytes, bytes | None]] = []
    received: list[tuple[bytes, bytes | None]] = []
    out = b""
    for part in data.draw(splits(stream)):
        kept = stripper.feed(part)
        out += kept
        sent += before.feed(part)
        received += after.feed(kept)
        assert received == [event for event in sent if not only_usage(event[1] or b"")]
    rest = stripper.end()
    out += rest
    after.feed(rest)
    assert out == stripped(stream)
    assert after.comments == before.comments


@pytest.mark.parametrize(
    "stream",
    [
        b'\n{foo\ndata: {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
        b'{"a":1}\ndata: {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
        b' [\ndata: {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
        b"data: {\n" + b": c\n" * 17_000 + b'data: "choices":[],"usage":{"prompt_tokens":1}}\n\n',
    ],
    ids=["behind a blank line", "JSON", "a list", "large"],
)
def test_what_is_no_usage_event_in_parts_is_none_as_a_whole(stream: bytes) -> None:
    assert stripped(stream) == stream
    for size in (1, 7, len(stream) // 2, 30_000):
        assert stripped(*steps(stream, size)) == stream


@pytest.mark.parametrize("before", [b"", b"\n", b" ", b"\t ", b"\xef\xbb\xbf"])
def test_json_goes_on_at_once_whatever_blanks_are_before_it(before: bytes) -> None:
    stripper = UsageStripper()
    assert stripper.feed(before + b'{"id":"x",') == before + b'{"id":"x",'
    assert stripper.feed(b'"usage":{}}') == b'"usage":{}}'


@given(st.data(), STREAMS.filter(lambda stream: b"usage" not in stream))
def test_without_usage_every_byte_stays(data: st.DataObject, stream: bytes) -> None:
    assert stripped(*data.draw(splits(stream))) == stream
