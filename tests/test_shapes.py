"""Recorded streams of many servers (`tests/wire`): read as their recorders say, and passed on byte for byte.

`NAME.sse` is a response body, `NAME.json` the truth about it. Events are counted as WHATWG dispatches them, `[DONE]`
included; indices are 0-based among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sseproxy import config
from sseproxy.wire.dialects import dialect_of
from sseproxy.wire.meaning import Usage
from sseproxy.wire.sse import EventParser

from .conftest import StartProxy
from .harness import LAST_CHUNK, Peer, RunningProxy, ScriptedUpstream, chunk, post, total
from .splits import cut, splits, steps

WIRE = Path(__file__).parent / "wire"


@dataclass(frozen=True)
class Shape:
    name: str
    body: bytes = field(repr=False)
    truth: dict[str, Any] = field(repr=False)

    @property
    def path(self) -> str:
        return str(self.truth["endpoint"]).replace("{m}", "gemini")

    @property
    def usage(self) -> Usage | None:
        """The truth's counts in our words, in which `counts` are."""
        if self.truth.get("counts") is not None:
            return Usage(**self.truth["counts"])
        usage = self.truth.get("usage")
        if usage is None:
            return None

        def told(*names: str) -> int | None:
            """The count under the first of `names` that there is, a dot for each level."""
            for name in names:
                outer, _, inner = name.partition(".")
                found = usage.get(outer, {}).get(inner) if inner else usage.get(outer)
                if found is not None:
                    return int(found)
            return None

        thoughts = told("thoughtsTokenCount")
        read, written = told("cache_read_input_tokens"), told("cache_creation_input_tokens")
        output = told("completion_tokens", "output_tokens", "candidatesTokenCount")
        return Usage(
            # Anthropic's leaves out what came from its cache and went there; the others' is all of the prompt.
            input=(told("prompt_tokens", "input_tokens", "promptTokenCount") or 0) + (read or 0) + (written or 0),
            output=(output or 0) + (thoughts or 0),
            cached_input=told("prompt_tokens_details.cached_tokens", "input_tokens_details.cached_tokens")
            if read is None
            else read,
            reasoning=told("completion_tokens_details.reasoning_tokens", "output_tokens_details.reasoning_tokens")
            if thoughts is None
            else thoughts,
            cache_write=told("input_tokens_details.cache_write_tokens") if written is None else written,
        )

    @property
    def finish(self) -> str | None:
        """The reason that is told last; where several choices end, their recorder says which ended how, not when."""
        finish: str | None = LAST_FINISH.get(self.name, self.truth["finish"])
        return finish


LAST_FINISH = {"openai_chat_n2": "length"}
# Events that are no JSON object of their own.
GARBLED = {"invalid_json_event": 1, "empty_data_and_ping_events": 1, "single_newline_events": 1}
# Above this size a shape is not read byte by byte.
LARGE = 100_000

SHAPES = [
    Shape(file.stem, file.read_bytes(), json.loads(file.with_suffix(".json").read_text()))
    for file in sorted(WIRE.glob("*.sse"))
]
STREAMS = [shape for shape in SHAPES if shape.truth["content_type"] == "text/event-stream"]


def named(shape: Shape) -> str:
    return shape.name


@dataclass
class Seen:
    """What was understood of a stream."""

    events: int = 0
    comments: int = 0
    garbled: int = 0
    first_content_event: int | None = None
    usage: Usage | None = None
    usage_event: int | None = None
    finish: str | None = None
    ended: bool = False
    error_event: int | None = None


def expected(shape: Shape) -> Seen:
    truth = shape.truth
    return Seen(
        events=truth["events"],
        comments=truth["comments"],
        garbled=GARBLED.get(shape.name, 0),
        first_content_event=truth["first_content_event"],
        usage=shape.usage,
        usage_event=truth["usage_event"],
        finish=shape.finish,
        ended=truth["terminal"] is not None,
        error_event=truth["error_event"],
    )


def read(shape: Shape, pieces: Iterable[bytes]) -> Seen:
    dialect = dialect_of(shape.path.partition("?")[0])
    parser, seen = EventParser(1 << 22), Seen()
    for piece in pieces:
        for kind, data in parser.feed(piece):
            assert data is not None
            meaning = dialect.meaning_of(kind, data)
            if meaning.delta and seen.first_content_event is None:
                seen.first_content_event = seen.events
            if meaning.usage is not None:
                seen.usage = meaning.usage if seen.usage is None else seen.usage.updated(meaning.usage)
                seen.usage_event = seen.events
            if (meaning.error or meaning.complaint) and seen.error_event is None:
                seen.error_event = seen.events
            seen.finish = meaning.finish or seen.finish
            seen.ended |= meaning.end
            seen.garbled += not meaning.understood
            seen.events += 1
    seen.comments = parser.comments
    assert parser.oversize == 0
    # A tail is an event without its blank line, or a part of one.
    assert parser.at_boundary == (shape.truth["tail_bytes"] == 0)
    return seen


def test_all_shapes_are_there_and_are_what_was_recorded() -> None:
    assert (len(SHAPES), len(STREAMS)) == (70, 69)
    for shape in SHAPES:
        assert len(shape.body) == shape.truth["bytes"]


@pytest.mark.parametrize("shape", STREAMS, ids=named)
def test_a_shape_is_read_as_its_recorder_says_whole_and_in_pieces(shape: Shape) -> None:
    truth = expected(shape)
    assert read(shape, [shape.body]) == truth
    assert read(shape, steps(shape.body, 1000 if len(shape.body) > LARGE else 1)) == truth


@pytest.mark.parametrize("shape", [shape for shape in STREAMS if "split_offsets" in shape.truth], ids=named)
def test_a_shape_is_read_alike_at_its_nasty_boundaries(shape: Shape) -> None:
    offsets: list[int] = shape.truth["split_offsets"]
    assert read(shape, cut(shape.body, offsets)) == expected(shape)
    for offset in offsets:
        for near in (offset - 1, offset, offset + 1):
            assert read(shape, cut(shape.body, [near])) == expected(shape)


@pytest.mark.parametrize("shape", [shape for shape in STREAMS if len(shape.body) <= LARGE], ids=named)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_shape_is_read_alike_at_any_split(shape: Shape, data: st.DataObject) -> None:
    assert read(shape, data.draw(splits(shape.body))) == expected(shape)


async def begin(start: StartProxy, upstream: ScriptedUpstream, shape: Shape) -> tuple[RunningProxy, Peer, Peer]:
    """A proxy, its client and its upstream, which has the request."""
    proxy = await start(
        upstream.url,
        upstreams=(config.Upstream(name="up", url=upstream.url),),
        routes=(config.Route(name="all", match=config.Match(path="/"), upstream=(config.Target(name="up"),)),),
    )
    assert counted(proxy) == dict.fromkeys(counted(proxy), 0)
    client = await proxy.connect()
    client.send(post(path=shape.path))
    api = await upstream.accept()
    assert (await api.message()).start_line == f"POST {shape.path} HTTP/1.1"
    return proxy, client, api


def counted(proxy: RunningProxy) -> dict[str, float]:
    """What `/metrics` tells of streams."""
    samples = proxy.samples()
    return {
        "ended": total(samples, "requests_total"),
        "completed": total(samples, "requests_total", outcome="completed"),
        "truncated": total(samples, "requests_total", outcome="truncated"),
        "upstream_error": total(samples, "requests_total", outcome="upstream_error"),
        "input": total(samples, "tokens_total", type="input"),
        "output": total(samples, "tokens_total", type="output"),
        "cached_input": total(samples, "tokens_total", type="cached_input"),
        "reasoning": total(samples, "tokens_total", type="reasoning"),
        "cache_write": total(samples, "tokens_total", type="cache_write"),
        "events": total(samples, "stream_events_total"),
        "garbled": total(samples, "stream_events_garbled_total"),
        "first_tokens": total(samples, "time_to_first_token_seconds_count"),
        "without_usage": total(samples, "streams_without_usage_total"),
        "by_marker": total(samples, "stream_ends_total", end="marker"),
        "by_eof": total(samples, "stream_ends_total", end="eof"),
        "bytes": total(samples, "response_bytes_total"),
        "active": total(samples, "requests_active") + total(samples, "streams_active"),
    }


def truth_counted(shape: Shape) -> dict[str, float]:
    truth, usage = shape.truth, shape.usage
    outcome = "completed"
    if truth["transport"] == "chunked_no_terminator":
        outcome = "truncated"
    elif truth["error_event"] is not None:
        outcome = "upstream_error"
    tokens = {"input": 0, "output": 0, "cached_input": 0, "reasoning": 0, "cache_write": 0}
    if usage is not None:
        tokens = {kind: getattr(usage, kind) or 0 for kind in tokens}
    return {
        "ended": 1,
        "completed": outcome == "completed",
        "truncated": outcome == "truncated",
        "upstream_error": outcome == "upstream_error",
        **tokens,
        "events": truth["events"],
        "garbled": GARBLED.get(shape.name, 0),
        "first_tokens": truth["first_content_event"] is not None,
        "without_usage": usage is None,
        "by_marker": outcome == "completed" and truth["terminal"] is not None,
        "by_eof": outcome == "completed" and truth["terminal"] is None,
        "bytes": len(shape.body),
        "active": 0,
    }


async def send_head(api: Peer, client: Peer, shape: Shape) -> None:
    content_type = shape.truth["content_type"]
    api.send(f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    head = await client.head()
    assert head.start_line == "HTTP/1.1 200 OK"
    assert head.all("content-type") == [content_type]
    assert head.all("transfer-encoding") == ["chunked"]


async def end(proxy: RunningProxy, api: Peer, client: Peer, shape: Shape) -> None:
    """The upstream ends its body as it was recorded to. All of the body was received before."""
    event = b""
    if shape.truth["transport"] == "complete":
        api.send(LAST_CHUNK)
        assert await client.read(5) == LAST_CHUNK
    else:
        api.close()
        rest, _ = await client.rest()
        if shape.truth["tail_bytes"]:
            assert rest == b""
        else:
            size, _, event = rest.partition(b"\r\n")
            assert int(size, 16) == len(event) - 2
            assert event.endswith(b"\n\n\r\n")
            told = json.loads(event.partition(b"data: ")[2])
            assert told["error"]["message"] == "The upstream closed the connection before the response was complete."
    await proxy.idle()
    # What was added is counted as well.
    assert counted(proxy) == truth_counted(shape) | {"bytes": len(shape.body + event.removesuffix(b"\r\n"))}


@pytest.mark.parametrize("shape", STREAMS, ids=named)
async def test_a_shape_passes_chunk_by_chunk_as_it_comes(
    start: StartProxy, upstream: ScriptedUpstream, shape: Shape
) -> None:
    proxy, client, api = await begin(start, upstream, shape)
    await send_head(api, client, shape)
    ends = (at for at in range(1, len(shape.body)) if shape.body[at - 1 : at] == b"\n")
    # A piece that the kernel hands over in one read: a segment is at most half of the window, which can be small.
    for piece in cut(shape.body, {*ends, *range(4_096, len(shape.body), 4_096)}):
        api.send(chunk(piece))
        assert await client.read(len(chunk(piece))) == chunk(piece)
    await end(proxy, api, client, shape)


@pytest.mark.parametrize("shape", STREAMS, ids=named)
async def test_a_shape_passes_at_once_when_chunks_come_in_parts(
    start: StartProxy, upstream: ScriptedUpstream, shape: Shape
) -> None:
    proxy, client, api = await begin(start, upstream, shape)
    await send_head(api, client, shape)
    received = bytearray()
    sizes = cycle(max(size, len(shape.body) // 100 | 1) for size in (37, 1, 101, 3, 7))
    while len(received) < len(shape.body):
        piece = shape.body[len(received) :][: next(sizes)]
        framed = chunk(piece)
        half = len(framed) // 2
        middle = max(0, half - framed.index(b"\r\n") - 2)
        # What a part has of the payload is with the client before the next part is sent.
        for part, payload in ((framed[:half], piece[:middle]), (framed[half:], piece[middle:])):
            api.send(part)
            if payload:
                assert await client.read(len(chunk(payload))) == chunk(payload)
            received += payload
    assert bytes(received) == shape.body
    await end(proxy, api, client, shape)


@pytest.mark.parametrize("shape", STREAMS, ids=named)
async def test_a_shape_passes_when_it_comes_all_at_once(
    start: StartProxy, upstream: ScriptedUpstream, shape: Shape
) -> None:
    proxy, client, api = await begin(start, upstream, shape)
    await send_head(api, client, shape)
    api.send(chunk(shape.body))
    received = bytearray()
    while len(received) < len(shape.body):
        size = int(await client.read_until(b"\r\n"), 16)
        received += (await client.read(size + 2))[:-2]
    assert bytes(received) == shape.body
    await end(proxy, api, client, shape)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in STREAMS], ids=named)
async def test_a_shape_that_is_no_stream_passes_with_its_length(
    start: StartProxy, upstream: ScriptedUpstream, shape: Shape
) -> None:
    proxy, client, api = await begin(start, upstream, shape)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(shape.body)}\r\n\r\n"
    api.send(head.encode(), shape.body)
    response = await client.message()
    assert response.all("content-type") == ["application/json"]
    assert response.all("content-length") == [str(len(shape.body))]
    assert response.body == shape.body
    await proxy.idle()
    expected = {"ended": 1, "completed": 1, "bytes": len(shape.body), "input": shape.truth["usage"]["prompt_tokens"]}
    assert counted(proxy) == dict.fromkeys(counted(proxy), 0) | expected
