"""What a request asks for, found in its body's parts, and a body that is changed in one place."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sseproxy.wire.extract import WHOLE
from sseproxy.wire.request import RequestReader, Splice

from .splits import cut, splits, steps
from .test_extract import MOST, READ, WORST, calls, held, spelled

# What makes a body one that is not decoded whole.
PADDING = '"x":["' + WHOLE * "y" + '"],'


def reader_of(*parts: bytes) -> RequestReader:
    reader = RequestReader()
    for part in parts:
        reader.feed(part)
    return reader


def asking(*parts: bytes) -> bytes | None:
    splice = reader_of(*parts).with_usage()
    return None if splice is None else b"".join(splice.into(parts))


MODELS: st.SearchStrategy[Any] = st.sampled_from(
    ["m", "", 'a"b', "é😀", "x" * 128, "x" * 129, "é" * 128, None, 4, [], {}, "x" * 20_000]
)
OPTIONS: st.SearchStrategy[Any] = st.sampled_from(
    [None, (), (("include_usage", None),), (("include_usage", True),), (("a", [1]),), [], 1]
)
MEMBERS = (
    st.tuples(st.just("model"), MODELS)
    | st.tuples(st.just("stream"), st.sampled_from([True, True, False, None, "true"]))
    | st.tuples(st.just("stream_options"), OPTIONS)
    | st.tuples(st.sampled_from(["", "messages", "a"]), st.sampled_from(["é", (("model", "n"),), [[], "}"], 1.5]))
)


@settings(max_examples=400, deadline=None)
@given(st.data(), st.lists(MEMBERS, max_size=6), st.randoms(use_true_random=True), st.booleans())
def test_a_request_is_read_as_a_parser_reads_it(
    data: st.DataObject, members: list[tuple[str, Any]], dice: Random, large: bool
) -> None:
    text = spelled(tuple(members), dice)
    if large and members:
        text = "{" + PADDING + text[1:]
    body = text.encode()
    truth = json.loads(body)
    named = truth.get("model")
    options = truth.get("stream_options")
    wants = truth.get("stream") is True and (
        options is None or (isinstance(options, dict) and options.get("include_usage") is None)
    )
    for parts in ([body], steps(body, 1000 if large else 1), data.draw(splits(body))):
        reader = reader_of(*parts)
        assert reader.model == (named if isinstance(named, str) and len(named) <= 128 else None)
        changed = asking(*parts)
        assert (changed is not None) == wants
        if changed is not None:
            assert json.loads(changed) == truth | {"stream_options": (options or {}) | {"include_usage": True}}
            # All that was changed is in one place.
            splice = reader.with_usage()
            assert splice is not None
            assert changed == body[: splice.start] + splice.put + body[splice.stop :]
            assert len(changed) == len(body) + len(splice.put) - (splice.stop - splice.start)


@given(st.data(), st.binary(max_size=20), st.binary(max_size=5))
def test_a_splice_is_the_same_in_any_parts(data: st.DataObject, body: bytes, put: bytes) -> None:
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(body)), st.integers(0, len(body)))))
    splice = Splice(min(start, max(len(body) - 1, 0)), stop, put)
    if body and splice.start <= splice.stop:
        parts = [part for part in data.draw(splits(body)) if part]
        assert b"".join(splice.into(parts)) == body[: splice.start] + put + body[splice.stop :]


def test_parts_that_do_not_change_are_the_same_ones() -> None:
    parts = cut(b'{"x":1,"stream":true,"y":2}', [7, 14])
    splice = reader_of(*parts).with_usage()
    assert splice is not None
    assert list(splice.into(parts))[:2] == parts[:2]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.binary(max_size=60))
def test_arbitrary_bytes_never_raise(data: st.DataObject, body: bytes) -> None:
    reader = reader_of(*data.draw(splits(body)))
    assert reader.model is None
    assert reader.with_usage() is None


@pytest.mark.parametrize("padding", ["", PADDING], ids=["small", "large"])
@pytest.mark.parametrize(
    "value",
    [
        *(
            b'"\xff"',
            b'"\xed\xa0\x80"',
            b'"\\ud800"',
            b'"\\x"',
            b"[" * 1100 + b"]" * 1100,
            b"[" * 100_000,
            b'"m',
            b"NaN",
        ),
        *(b'{"a":' * 1100 + b"1" + b"}" * 1100, b"[[],[]]", b'{"model":"m"}', b"true", b"1e5", b"9" * 5000, b""),
    ],
)
def test_what_is_no_text_is_no_model(value: bytes, padding: str) -> None:
    body = b'{%b"model":%b}' % (padding.encode(), value)
    for parts in ([body], steps(body, 999)):
        assert reader_of(*parts).model is None


@pytest.mark.parametrize("padding", ["", PADDING], ids=["small", "large"])
def test_what_is_no_unicode_asks_for_nothing(padding: str) -> None:
    body = b'{%b"model":"m","stream":true,"user":"%b"}'
    for user, model in ((b"\xc3\xa9", "m"), (b"\xc3", None), (b"\xff", None)):
        whole = body % (padding.encode(), user)
        for parts in ([whole], steps(whole)):
            assert reader_of(*parts).model == model
            assert (asking(*parts) is not None) == (model is not None)


def test_the_body_so_far_is_what_is_told_of() -> None:
    told: list[str | None] = []
    reader = RequestReader()
    for part in (b'{"model":"m"', b"}", b"{"):
        reader.feed(part)
        told.append(reader.model)
    assert told == [None, "m", None]


@pytest.mark.parametrize("kind", WORST)
def test_whatever_it_holds_the_work_for_a_part_and_memory_are_bounded(kind: str) -> None:
    def reading() -> Callable[[bytes], object]:
        reader = RequestReader()

        def read(part: bytes) -> None:
            reader.feed(part)
            assert reader.model is None
            assert reader.with_usage() is None

        return read

    assert calls(reading(), WORST[kind]) < 2 * READ
    assert held(reading(), WORST[kind]) < MOST


@pytest.mark.parametrize("length", [WHOLE - 100, WHOLE + 100], ids=["small", "large"])
def test_a_body_in_tiny_parts_is_no_work_of_a_moment(length: int) -> None:
    body = b'{"model":"m","user":"' + b"x" * length
    reader = RequestReader()
    assert calls(reader.feed, body, size=1) < 200
    assert calls(lambda _: reader.model_so_far, b" ") < 200
    assert reader.model_so_far == "m"


def test_names_may_be_escaped() -> None:
    assert reader_of(b'{"mod\\u0065l":"m"}').model == "m"
    assert reader_of(b'{%b"mod\\u0065l":"m"}' % PADDING.encode()).model == "m"
