"""What is wanted of a JSON text: what a parser of all of it finds, at every split, within bounds whatever it holds."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from random import Random
from types import FrameType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sseproxy.wire.dialects import DIALECTS, Dialect
from sseproxy.wire.extract import WHOLE, Extract, Gist, Items, Members, Wanted, wanted
from sseproxy.wire.sse import EventParser

from .splits import splits, steps

WANTED = Members(
    {
        b"model": None,
        b"stream": None,
        b"one": Members({b"a": None, b"two": Members({b"b": None})}),
        b"list": Items(Members({b"a": None, b"items": Items(None)})),
    }
)
# As it is read: what the hot path reads at once.
READ = 32 * 1024


def extracted(pieces: list[bytes], members: Members = WANTED) -> Extract:
    extract = Extract(members)
    for piece in pieces:
        extract.feed(piece)
    return extract


def projected(value: Any, of: Wanted) -> Any:
    """What is wanted of a value, plainly."""
    if isinstance(of, Members) and isinstance(value, dict):
        return {name: projected(held, of[name.encode()]) for name, held in value.items() if _names(name, of)}
    if isinstance(of, Items) and isinstance(value, list):
        return [projected(item, of.item) for item in value]
    return value


def _names(name: str, members: Members) -> bool:
    return name.encode("utf-8", "surrogatepass") in members


NAMES = st.sampled_from(
    ["model", "stream", "one", "two", "list", "items", "a", "b", "", "é", 'a"', "\\", "}", "model "]
)
TEXTS = st.text(max_size=6) | st.sampled_from(['"', "\\", '\\"', "[{", "}]", "\ud800", '","model":"x'])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.lists(st.tuples(NAMES, inner), max_size=4).map(tuple),
    max_leaves=25,
)
SPACES = ["", "", " ", "\n", "\t \r\n"]


def spelled(value: Any, dice: Random) -> str:
    """JSON of `value`, where a tuple is an object's members, which may have the same names."""
    space = dice.choice(SPACES)
    if isinstance(value, tuple):
        members = (f"{space}{named(name, dice)}{space}:{space}{spelled(held, dice)}{space}" for name, held in value)
        return "{" + ",".join(members) + space + "}"
    if isinstance(value, list):
        return "[" + ",".join(space + spelled(item, dice) + space for item in value) + space + "]"
    return json.dumps(value, ensure_ascii=dice.random() < 0.5 or (isinstance(value, str) and not _is_unicode(value)))


def named(name: str, dice: Random) -> str:
    """A name, plain or with every character escaped."""
    return dice.choice([json.dumps(name), '"' + "".join(f"\\u{ord(char):04x}" for char in name) + '"'])


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


# Drawn by dice: to draw each space and each name costs more than all else.
OBJECTS = st.builds(
    spelled, st.lists(st.tuples(NAMES, VALUES), max_size=5).map(tuple), st.randoms(use_true_random=True)
)


@pytest.mark.timeout(90)
@settings(max_examples=200, deadline=None)
@given(st.data(), OBJECTS, st.sampled_from(SPACES))
def test_what_is_wanted_is_what_a_parser_finds(data: st.DataObject, text: str, space: str) -> None:
    body = f"{space}{text}{space}".encode()
    truth = json.loads(body)
    for pieces in ([body], steps(body), data.draw(splits(body))):
        extract = extracted(pieces)
        found = extract.text()
        assert found is not None
        assert json.loads(found) == projected(truth, WANTED)
        for name in ("model", "stream"):
            span = extract.spans.get(name.encode())
            assert (span is not None) == (name in truth)
            if span is not None:
                assert json.loads(body[slice(*span)]) == truth[name]
        assert body[extract.closed_at :].strip() == b"}"


@pytest.mark.timeout(90)
@settings(max_examples=200, deadline=None)
@given(st.data(), OBJECTS, st.binary(max_size=3) | st.sampled_from([b'"', b"\\", b"]", b"}", b",", b"{", b"[["]))
def test_what_is_no_json_never_raises_and_is_the_same_at_any_split(
    data: st.DataObject, text: str, change: bytes
) -> None:
    body = text.encode()
    at, dropped = data.draw(st.integers(0, len(body))), data.draw(st.integers(0, 3))
    changed = body[:at] + change + body[at + dropped :]
    whole = extracted([changed])
    for pieces in (steps(changed), data.draw(splits(changed))):
        assert extracted(pieces).text() == whole.text()
    try:
        truth = json.loads(changed.decode(), parse_constant=_refuse)
    except ValueError:
        return
    found = whole.text()
    assert (found is not None) == isinstance(truth, dict)
    assert found is None or json.loads(found) == projected(truth, WANTED)


def _refuse(_: str) -> None:
    raise ValueError("not JSON")


@settings(max_examples=300, deadline=None)
@given(st.data(), st.binary(max_size=60))
def test_arbitrary_bytes_never_raise(data: st.DataObject, body: bytes) -> None:
    assert extracted(data.draw(splits(body))).text() == extracted([body]).text()


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b" ",
            b"{",
            b"}",
            b"[]",
            b'"model"',
            b"null",
            b"{}{}",
            b"{},",
            b'{"model"}',
            b'{"model":}',
            b"{model:1}",
        ),
        *(b'{"model":"m",}', b'{,"model":"m"}', b'{"model" "m"}', b'{"model":"m"', b'{"model":"m"]', b'{"model":tru}'),
        *(b'{"model":01}', b'{"model":+1}', b'{"model":1.}', b'{"model":NaN}', b'{"list":[{},]}', b'{"list":[,]}'),
        *(b'{"list":[{}}', b'{"x":[[]}', b'\xef\xbb\xbf{"model":"m"}', b'{"\xff":1}', b"{'model':1}", b"model=m&x=1"),
    ],
)
def test_what_is_no_object_has_nothing(body: bytes) -> None:
    assert extracted([body]).text() is None
    assert extracted(steps(body)).text() is None


def test_what_is_too_long_is_only_told_to_be_something() -> None:
    long = "x" * 5000
    body = json.dumps({"model": long, "one": {"a": [long], "two": {"b": {"b": long}}}, "list": [{"a": long}]}).encode()
    text = b'{"model":[0],"one":{"a":[0],"two":{"b":[0]}},"list":[{"a":[0]}]}'
    for pieces in ([body], steps(body, 999)):
        assert extracted(pieces).text() == text


def test_the_rest_of_a_long_list_is_passed_over() -> None:
    body = b'{"list":[' + b'{"a":[]},' * 100_000 + b'{"a":1}],"model":"m"}'
    for pieces in ([body], steps(body, 1000)):
        text = extracted(pieces).text()
        assert text is not None
        found = json.loads(text)
        assert found["model"] == "m"
        assert len(found["list"]) == 128


def test_an_object_of_too_many_members_is_too_much() -> None:
    body = b"{" + b'"x":1,' * 100_000 + b'"model":"m"}'
    assert extracted([body]).too_much
    assert extracted([body]).text() is None


class Inner(msgspec.Struct):
    a: msgspec.Raw = msgspec.Raw()


class Outer(msgspec.Struct):
    inner: Inner | None = None
    items: list[Inner] | None = None
    text: str = ""


def test_a_struct_says_what_is_wanted() -> None:
    members = wanted(Outer)
    assert members[b"inner"] == {b"a": None}
    assert isinstance(members[b"items"], Items)
    assert members[b"items"].item == {b"a": None}
    assert members[b"text"] is None


def test_what_is_small_is_whole() -> None:
    for body in (b"no JSON", b'{ "x": 1 }', b"x" * WHOLE):
        gist = Gist(WANTED)
        for piece in steps(body, 1000):
            gist.feed(piece)
        assert gist.text() == body
    gist.feed(b"x")
    assert gist.text() == b""


SIZE = 2 << 20
# Bytes, whatever the size: of a read, all its strings in a list. Of an event that is not decoded whole, less.
MOST, MOST_OF_LARGE = 700_000, 400_000
# What costs most by its kind: brackets, strings, escapes, members, items, and all of these where something is wanted.
WORST = {
    "lists": b'{"model":[' + b"[]," * (SIZE // 3) + b"1]}",
    "depth": b'{"model":' + b"[" * (SIZE // 2) + b"]" * (SIZE // 2) + b"}",
    "saw": b'{"x":[' + (b"[" * 100 + b"]" * 100 + b",") * (SIZE // 201) + b"1]}",
    "empty strings": b'{"x":[' + b'"",' * (SIZE // 3) + b"1]}",
    "short strings": b'{"x":[' + b'"ab",' * (SIZE // 5) + b"1]}",
    "escapes": b'{"x":"' + b'\\"' * (SIZE // 2) + b'"}',
    "backslashes": b'{"x":"' + b"\\" * SIZE + b'"}',
    "members": b"{" + b'"":1,' * (SIZE // 5) + b'"":1}',
    "members with lists": b"{" + b'"":[],' * (SIZE // 6) + b'"":1}',
    "members with longer lists": b"{" + (b'"":[' + b"[]," * 20 + b"1],") * (SIZE // 67) + b'"":1}',
    "a name": b'{"' + b"x" * SIZE + b'":1}',
    "a text": b'{"model":"' + b"x" * SIZE + b'"}',
    "a number": b'{"model":' + b"1" * SIZE + b"}",
    "space": b'{"model":' + b" " * SIZE + b"1}",
    "no JSON": b"x" * SIZE,
    "open strings": b'{"' * (SIZE // 2),
}


def calls(read: Callable[[bytes], object], text: bytes, size: int = READ) -> int:
    """The most calls that a read of `text` takes, which comes in reads of `size`."""
    most = called = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal called
        called += event in ("call", "c_call")

    for piece in steps(text, size):
        called = 0
        sys.setprofile(count)
        try:
            read(piece)
        finally:
            sys.setprofile(None)
        most = max(most, called)
    return most


def held(read: Callable[[bytes], object], text: bytes) -> int:
    """The most bytes that are held at once for reads of `text`."""
    pieces = steps(text, READ)
    tracemalloc.start()
    try:
        for piece in pieces:
            read(piece)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", WORST)
def test_whatever_it_holds_the_work_for_a_part_and_memory_are_bounded(kind: str) -> None:
    assert calls(Gist(WANTED).feed, WORST[kind]) < 2 * READ
    assert held(Gist(WANTED).feed, WORST[kind]) < MOST


# Events of what a dialect reads, over and over.
REPEATED = {
    "choices": (b'{"choices":[', b"{},", b"{}]}"),
    "choices with deltas": (b'{"choices":[', b'{"delta":{"content":"","tool_calls":[]}},', b"{}]}"),
    "many choices": (b"{", b'"choices":[{}],', b'"x":1}'),
    "candidates": (b'{"candidates":[', b"{},", b"{}]}"),
    "parts": (b'{"candidates":[{"content":{"parts":[', b"{},", b"{}]}}]}"),
    "many parts": (b'{"candidates":[', b'{"content":{"parts":[{}]}},', b"{}]}"),
    "output": (b'{"type":"response.completed","response":{"output":[', b"[],", b"1]}}"),
    "responses": (b'{"type":"response.completed",', b'"response":{},', b'"x":1}'),
    "content": (b'{"object":"thread.message.delta","delta":{"content":[', b"{},", b"{}]}}"),
    "pieces": (b'{"object":"thread.message.delta","delta":{"content":[', b'{"text":{"value":""}},', b"{}]}}"),
    "messages": (b'{"type":"message_start","message":{"content":[', b"{},", b"{}]}}"),
    "usage": (b'{"type":"message_delta","usage":{', b'"input_tokens":1,', b'"x":1}}'),
    "an image": (b'{"type":"image_generation.partial_image","b64_json":"', b"AAAA", b'"}'),
    "lines": (b"", b"\ndata: ", b""),
}


@pytest.mark.parametrize("kind", REPEATED)
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_whatever_an_event_holds_the_work_for_a_read_and_memory_are_bounded(dialect: Dialect, kind: str) -> None:
    first, again, last = REPEATED[kind]
    parser = EventParser(32 << 20, dialect.members)

    def read(payload: bytes) -> None:
        for name, data in parser.feed(payload):
            dialect.read(name, data or b"")

    # Each of so many lines takes as long as hundreds of bytes in one.
    largest = SIZE // (32 if kind == "lines" else 8)
    for size in (largest, 2 * WHOLE, WHOLE - 200):
        event = b"data: " + first + again * (size // len(again)) + last + b"\n\n"
        assert calls(read, event) < 2 * READ
        assert held(read, event) < (MOST_OF_LARGE if size > WHOLE else MOST)


def large(**members: object) -> bytes:
    """An event above the size that is decoded whole."""
    return b"data: " + json.dumps({"x": ["y" * WHOLE], **members}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("name", "event", "expected"),
    [
        (
            "responses",
            large(
                type="response.completed",
                response={
                    "output": [{"content": [{"text": "x" * 99}], "logprobs": [1.5] * 99}] * 2000,
                    "status": "completed",
                    "usage": {"input_tokens": 3, "output_tokens": 2},
                },
            ),
            (False, 2, "completed", True),
        ),
        ("responses", large(type="response.output_text.delta", delta="y" * 99_999), (True, None, None, False)),
        ("images", large(type="image_generation.partial_image", b64_json="A" * 5_000_000), (True, None, None, False)),
        (
            "gemini",
            large(candidates=[{"content": {"parts": [{"inlineData": {"data": "A" * 5_000_000}}]}}]),
            (True, None, None, False),
        ),
        (
            "chat",
            large(choices=[{"delta": {"content": ""}}] * 500, usage={"completion_tokens": 2}),
            (False, 2, None, False),
        ),
        ("chat", large(choices=[{"delta": {"images": ["A" * 99_999]}}]), (True, None, None, False)),
        (
            "messages",
            large(type="message_delta", x=[[]] * 99_999, delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2}),
            (False, 2, "end_turn", False),
        ),
        (
            "assistants",
            large(object="thread.run", status="completed", tools=["x"] * 9999, usage={"completion_tokens": 2}),
            (False, 2, "completed", False),
        ),
    ],
)
def test_a_large_event_means_what_it_says(
    name: str, event: bytes, expected: tuple[bool, int | None, str | None, bool]
) -> None:
    dialect = next(dialect for dialect in DIALECTS if dialect.name == name)
    for pieces in ([event], steps(event, READ), steps(event, 777)):
        parser = EventParser(6 << 20, dialect.members)
        (found,) = [found for piece in pieces for found in parser.feed(piece)]
        assert found[1] is not None
        assert len(found[1]) < WHOLE
        meaning = dialect.meaning_of(found[0], found[1])
        output = meaning.usage.output if meaning.usage is not None else None
        assert (meaning.delta, output, meaning.finish, meaning.end) == expected
        assert meaning.understood
        assert parser.at_boundary
