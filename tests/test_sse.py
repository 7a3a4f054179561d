"""Events from bytes: as WHATWG has it, at every split, within a limit."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sseproxy.wire import sse
from sseproxy.wire.extract import Members
from sseproxy.wire.sse import Event, EventParser

from .reference import Reference
from .splits import cut, splits, steps

BOM = b"\xef\xbb\xbf"

# What event streams are made of, and what they are not.
TOKENS = st.sampled_from(
    [
        *(b"data", b"data:", b"data: ", b"data:  ", b"event", b"event:", b"event: ", b"id: 7", b"retry: 3000"),
        *(b"Data: x", b"other: x", b":", b": comment", b" ", b"x", b"0:1", b"[DONE]", b'{"usage":1}'),
        *("é😀".encode(), b"\x00", BOM, b"\xff", b"\xe2\x82", b"\x0b", b"\x0c", b"\x1c", "\u2028\x85".encode()),
        *(
            b"\n",
            b"\n",
            b"\r",
            b"\r\n",
            b"\r\n",
            b"\n\n",
            b"\r\r",
            b"\r\n\r\n",
            b"data: a\n\n",
            b"event: b\ndata: c\n\n",
        ),
    ]
)
STREAMS = st.tuples(st.sampled_from([b"", b"", BOM, BOM[:2]]), st.lists(TOKENS, max_size=30)).map(
    lambda parts: parts[0] + b"".join(parts[1])
)


def parse(pieces: list[bytes], limit: int = 1 << 20) -> tuple[EventParser, list[Event]]:
    parser = EventParser(limit)
    return parser, [event for piece in pieces for event in parser.feed(piece)]


def decoded(events: list[Event]) -> list[tuple[str, str | None]]:
    return [
        (kind.decode("utf-8", "replace"), None if data is None else data.decode("utf-8", "replace"))
        for kind, data in events
    ]


@settings(max_examples=300, deadline=None)
@given(st.data(), STREAMS)
def test_any_split_of_any_stream_is_read_by_the_specification(data: st.DataObject, stream: bytes) -> None:
    reference = Reference(stream)
    for pieces in ([stream], steps(stream), data.draw(splits(stream))):
        parser, events = parse(pieces)
        assert decoded(events) == reference.events
        assert parser.comments == reference.comments
        assert parser.oversize == 0


@settings(max_examples=150, deadline=None)
@given(STREAMS)
@example(BOM + b"data: a\r\n\r\ndata: b\r\r: c\n\nid: 1\n\n")
def test_bytes_may_be_added_exactly_where_no_line_and_no_event_is_pending(stream: bytes) -> None:
    parser = EventParser(1 << 22)
    assert parser.at_boundary
    for size, byte in enumerate(steps(stream), 1):
        parser.feed(byte)
        assert parser.at_boundary == (not Reference(stream[:size]).pending)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        pytest.param(b"data: YHOO\ndata: +2\ndata: 10\n\n", [(b"", b"YHOO\n+2\n10")], id="stocks"),
        pytest.param(
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n",
            [(b"", b"first event"), (b"", b"second event")],
            id="comment, ids, and a third event without its blank line",
        ),
        pytest.param(b"data\n\ndata\ndata\n\ndata:", [(b"", b""), (b"", b"\n")], id="empty data"),
        pytest.param(b"data:test\n\ndata: test\n\n", [(b"", b"test"), (b"", b"test")], id="optional space"),
        pytest.param(
            b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n",
            [(b"add", b"73857293"), (b"remove", b"2153"), (b"add", b"113411")],
            id="types",
        ),
        pytest.param(
            b"data: This is the first message.\n\ndata: This is the second message, it\ndata: has two lines.\n\n",
            [(b"", b"This is the first message."), (b"", b"This is the second message, it\nhas two lines.")],
            id="messages",
        ),
    ],
)
def test_the_examples_of_the_specification(stream: bytes, events: list[Event]) -> None:
    for text in (stream, stream.replace(b"\n", b"\r\n"), stream.replace(b"\n", b"\r"), BOM + stream):
        for offset in range(len(text) + 1):
            assert parse(cut(text, [offset]))[1] == events
        assert parse(steps(text))[1] == events
        assert Reference(text).events == decoded(events)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        pytest.param(b"data: a\r\rdata: b\r\n\r\n", [(b"", b"a"), (b"", b"b")], id="a lone CR ends a line"),
        pytest.param(b"data: a\r\n\ndata: b\n\r\n", [(b"", b"a"), (b"", b"b")], id="endings may be mixed"),
        pytest.param(b"event: x\n\ndata: a\n\n", [(b"", b"a")], id="a type without data is forgotten"),
        pytest.param(b"event: x\nevent: y\ndata: a\n\n", [(b"y", b"a")], id="the last type counts"),
        pytest.param(b"data: a\nevent: x\n\n", [(b"x", b"a")], id="the type may follow the data"),
        pytest.param(b"data: a\x00b\n\n", [(b"", b"a\x00b")], id="NUL is data"),
        pytest.param("data: a\u2028b\x85c\n\n".encode(), [(b"", "a\u2028b\x85c".encode())], id="no other line ends"),
        pytest.param(b"\n\n\ndata: a\n\n\n\n", [(b"", b"a")], id="blank lines alone are nothing"),
        pytest.param(b"DATA: a\n\n data: b\n\ndata : c\n\n", [], id="names are exact"),
        pytest.param(b"data: a\n\n" + BOM + b"data: b\n\n", [(b"", b"a")], id="a BOM elsewhere is part of a name"),
        pytest.param(BOM * 2 + b"data: a\n\n", [], id="only one BOM is taken off"),
        pytest.param(b"data: a: b\n\n", [(b"", b"a: b")], id="the first colon counts"),
        pytest.param(b"data: a\n: x\ndata: b\n\n", [(b"", b"a\nb")], id="a comment within an event"),
        pytest.param(b"data: a", [], id="an event without an end is dropped"),
    ],
)
def test_corners_of_the_format(stream: bytes, events: list[Event]) -> None:
    for offset in range(len(stream) + 1):
        assert parse(cut(stream, [offset]))[1] == events
    assert parse(steps(stream))[1] == events
    assert Reference(stream).events == decoded(events)


@pytest.mark.parametrize(
    "large",
    [
        pytest.param(b"data: " + b"x" * 100 + b"\n\n", id="one line"),
        pytest.param(b"data:" + b"x" * 60 + b"\n\n", id="just above"),
        pytest.param(b"data: xxxxxxxxx\n" * 8 + b"\n", id="many lines"),
        pytest.param(b"data\n" * 100 + b"\n", id="many empty lines"),
        pytest.param(b"data: a\ndata: " + b"x" * 100 + b"\ndata: b\n\n", id="a line in the middle"),
        pytest.param(b"id: 1\r\ndata: " + b"x" * 100 + b"\r\n\r\n", id="CRLF"),
        pytest.param(b"event: " + b"x" * 100 + b"\ndata: a\n\n", id="the type"),
        pytest.param(b"event: " + b"x" * 50 + b"\ndata: xxxxxxxxxxxxxx\n\n", id="type and data together"),
        pytest.param(b"data: " + b"x" * 50 + b"\nevent: xxxxxxxxxxxxxx\n\n", id="data and type together"),
    ],
)
def test_the_content_of_an_event_above_the_limit_is_let_go_but_not_the_next(large: bytes) -> None:
    stream = b"data: before\n\n" + large + b"event: e\ndata: after\n\n"
    # A type is told if there was room for it.
    kind = b"x" * 50 if large.startswith(b"event: " + b"x" * 50 + b"\n") else b""
    for pieces in ([stream], steps(stream), steps(stream, 7), *(cut(stream, [at]) for at in range(len(stream)))):
        parser, events = parse(pieces, limit=64)
        assert [data for _, data in events] == [b"before", None, b"after"]
        assert [kind for kind, _ in events] == [b"", kind, b"e"]
        assert parser.oversize == 1
        assert parser.at_boundary


def test_the_type_of_an_event_above_the_limit_is_told_if_it_is_within() -> None:
    assert parse([b"event: error\ndata: ", b"x" * 100, b"\n\n"], limit=64)[1] == [(b"error", None)]


@pytest.mark.parametrize("cuts", [(), (25_000,), (12, 25_000), (25_000, 41_000)])
def test_of_an_event_above_the_limit_nothing_is_extracted_at_any_split(cuts: tuple[int, ...]) -> None:
    stream = b'data: {"x":"' + b"y" * 42_000 + b'"}\n\n'
    parser = EventParser(20_000, Members({b"choices": None}))
    events = [event for piece in cut(stream, {*cuts}) for event in parser.feed(piece)]
    assert [data for _, data in events] == [None]
    assert parser.oversize == 1


def test_an_event_as_large_as_the_limit_is_whole() -> None:
    stream = b"data: " + b"x" * 58 + b"\n\n"
    for pieces in ([stream], steps(stream), [stream[:-1], b"\n"]):
        parser, events = parse(pieces, limit=64)
        assert events == [(b"", b"x" * 58)]
        assert parser.oversize == 0


@pytest.mark.parametrize("line", [b": " + b"x" * 200, b"id: " + b"x" * 200, b"x" * 200, b"x" * 12 + b"data: " * 40])
def test_a_long_line_that_is_not_data_is_no_event(line: bytes) -> None:
    stream = line + b"\n\ndata: a\n\n"
    for pieces in ([stream], steps(stream), steps(stream, 7)):
        parser, events = parse(pieces, limit=64)
        assert events == [(b"", b"a")]
        assert parser.oversize == 0
        assert parser.comments == (1 if line.startswith(b":") else 0)


@settings(max_examples=300, deadline=None)
@given(st.data(), STREAMS, st.integers(16, 40))
def test_any_split_of_any_stream_is_read_alike_within_a_limit(data: st.DataObject, stream: bytes, limit: int) -> None:
    reference = Reference(stream)
    whole, events = parse([stream], limit)
    assert len(events) == len(reference.events)
    assert whole.oversize == sum(data is None for _, data in events)
    for found, expected in zip(decoded(events), reference.events, strict=True):
        if found[1] is not None:
            assert found == expected
        else:
            assert len(stream) > limit
    for pieces in (steps(stream), data.draw(splits(stream))):
        parser, again = parse(pieces, limit)
        assert again == events
        assert (parser.oversize, parser.comments) == (whole.oversize, whole.comments)


@pytest.mark.parametrize("start", [b"", b"data: ", b": ", b"event: ", b"data: x\n" * 1000 + b"event: "])
def test_memory_is_bounded_whatever_comes(start: bytes) -> None:
    limit, piece = 64 * 1024, b"x" * 40_000
    parser = EventParser(limit)
    tracemalloc.start()
    try:
        parser.feed(start)
        for _ in range(5 * 1024 * 1024 // len(piece)):
            parser.feed(piece)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A growing bytearray is allowed its eighth of spare room, and a moment in which old and new both exist.
    assert kept < 1.25 * limit
    assert peak < 3 * limit
    assert not parser.at_boundary
    parser.feed(b"\n\n")
    assert parser.feed(b"data: next\n\n") == [(b"", b"next")]
    assert parser.at_boundary


def test_lines_of_data_without_end_are_not_kept() -> None:
    limit, piece = 64 * 1024, b"event: yyyyyyyyyy\ndata: xxxxxxxxxx\n" * 1000
    parser = EventParser(limit)
    tracemalloc.start()
    try:
        for _ in range(40):
            parser.feed(piece)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1.25 * limit
    assert parser.feed(b"\n") == [(b"yyyyyyyyyy", None)]


# Large events, in lines of any length, among others.
SPELLED = st.sampled_from(
    [
        ['{"a":1,"x":[', "[]," * 90, '"}"],', '"a":"b"}'],
        ['{"a":"' + "y" * 300 + '","x":"' + '\\"' * 100 + '"}'],
        ['{"x":"' + "z" * 90 + '"}', "no more"],
        ["", "", '{"a":{"b":', *[" "] * 90, "1}}"],
        ['{"a":7}'],
        ["[DONE]"],
        ["x" * 200],
    ]
)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), events=st.lists(st.tuples(SPELLED, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=4))
def test_of_large_events_an_extract_is_read_at_any_split(
    data: st.DataObject, events: list[tuple[list[str], bytes]]
) -> None:
    members = Members({b"a": None})
    stream = data.draw(st.sampled_from([b"", BOM]))
    for lines, end in events:
        kind = data.draw(st.sampled_from(["event: e\n", ": comment\n", "id: 7\n", ""]))
        text = kind + "".join(f"data: {line}\n" for line in lines) + "\n" * data.draw(st.integers(1, 3))
        stream += text.replace("\n", end.decode()).encode()
    _, whole = parse([stream])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sse, "WHOLE", 64)
        for pieces in ([stream], steps(stream), data.draw(splits(stream))):
            parser = EventParser(1 << 20, members)
            found = [event for piece in pieces for event in parser.feed(piece)]
            assert [kind for kind, _ in found] == [kind for kind, _ in whole]
            for (_, extract), (_, full) in zip(found, whole, strict=True):
                assert full is not None
                if len(full) <= 64:
                    assert extract == full
                else:
                    assert compact(extract or b"") == wanted_of(full)
            # A byte order mark may still be the beginning of a line.
            assert parser.at_boundary or not events
            assert parser.oversize == 0


def compact(extract: bytes) -> bytes:
    """The same JSON as `wanted_of` spells it."""
    return json.dumps(json.loads(extract)).encode() if extract else b""


def wanted_of(text: bytes) -> bytes:
    """What is wanted of an object, compactly, the last one of each name; nothing of what is no object."""
    try:
        value = json.loads(text)
    except ValueError:
        return b""
    return json.dumps({"a": value["a"]} if "a" in value else {}).encode()
