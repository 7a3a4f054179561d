"""Reading along stops nothing: no bytes make a reader raise, and where one raises all the same, the stream goes on."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sseproxy import config
from sseproxy.relay import phases
from sseproxy.wire.dialects import DIALECTS, Dialect, dialect_of
from sseproxy.wire.extract import WHOLE
from sseproxy.wire.meaning import Meaning
from sseproxy.wire.sse import EventParser

from .conftest import StartProxy
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    begin,
    chunk,
    delta,
    post,
    usage,
)
from .splits import splits

SILENCE = 0.5

# What members of any API may be, in bytes, and may not be.
NAMES = (
    "type object status response message delta content parts candidates choices usage usageMetadata x_groq text error "
    "finish_reason finishReason stop_reason seconds prompt_tokens prompt_tokens_details cached_tokens step_details "
    "b64_json audio value other"
).split()
ODD = [
    *(b'"\xff"', b'"\xed\xa0\x80"', b'"\\ud800"', b'"\\x"', b'"\\u12"', b'"a', b"nul", b"NaN", b"-", b"1e999", b"\xff"),
    *(
        b"9" * 400,
        b"[" * 2000,
        b"[" * 1100 + b"]" * 1100,
        b'{"a":' * 1100 + b"1" + b"}" * 1100,
        b"\x00",
        b'"\x00"',
        b"",
    ),
]
TYPES = [b"response.completed", b"message_delta", b"content_block_delta", b"thread.run", b"speech.audio.done", b"error"]
BYTES = st.recursive(
    st.sampled_from([*ODD, b"null", b"true", b"7", b'""', b"[]", b"{}", *(b'"%b"' % kind for kind in TYPES)]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: b"[" + b",".join(items) + b"]")
        | st.lists(st.tuples(st.sampled_from(NAMES), inner), max_size=4).map(
            lambda members: b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in members) + b"}"
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), event=BYTES | st.binary(max_size=40), kind=st.sampled_from([b"", b"error", b"\xff"]))
def test_no_bytes_make_a_reader_raise(data: st.DataObject, event: bytes, kind: bytes) -> None:
    for dialect in DIALECTS:
        assert isinstance(dialect.read(kind, event), Meaning)
    # And as a large event, of which an extract is read.
    if event.startswith(b"{") and not set(event) & set(b"\r\n"):
        large = b'data: {"x":"' + b"y" * WHOLE + b'",' + event[1:] + b"\n\n"
        pieces = data.draw(splits(large))
        for dialect in DIALECTS:
            found = [EventParser(1 << 20, dialect.members).feed(large)]
            parser = EventParser(1 << 20, dialect.members)
            found.append([event for piece in pieces for event in parser.feed(piece)])
            assert found[0] == found[1]
            ((_, extract),) = found[0]
            assert isinstance(dialect.read(kind, extract or b""), Meaning)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("name", NAMES)
def test_no_member_makes_a_reader_raise(dialect: Dialect, name: str) -> None:
    for event in (b'{"%b":%b}', b'{"usage":{"%b":%b}}', b'{"delta":{"%b":%b}}', b'{"choices":[{"%b":%b}]}'):
        for odd in ODD:
            assert isinstance(dialect.read(b"", event % (name.encode(), odd)), Meaning)


PATHS = ["/v1/responses", "/v1/messages", "/v1/audio/speech", "/v1/images/edits", "/v1/threads/runs"]


@pytest.mark.parametrize("path", PATHS)
async def test_what_is_no_unicode_is_garbled_and_the_stream_goes_on(
    proxy: RunningProxy, upstream: ScriptedUpstream, path: str
) -> None:
    client, api = await begin(proxy, upstream, post(path=path))
    stream = [b'data: {"type":"\xff","object":"\xff"}\n\n', b'data: {"usage":{"prompt_tokens":3}}\n\n']
    api.send(STREAM_HEAD, *map(chunk, stream), LAST_CHUNK)
    assert (await client.message()).body == b"".join(stream)
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("stream_events_garbled_total") == 1
    assert proxy.sample("bodies_not_read_total") == 0


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A reader that raises for everything, as none does."""

    def read(kind: bytes, data: bytes) -> Meaning:
        raise LookupError(data)

    def with_broken_reader(path: str, name: str = "auto") -> Dialect:
        return replace(dialect_of(path, name), read=read)

    monkeypatch.setattr(phases, "dialect_of", with_broken_reader)
    caplog.set_level(logging.CRITICAL)


async def failing(start: StartProxy, upstream: ScriptedUpstream, **timeouts: float) -> RunningProxy:
    return await start(upstream.url, timeouts=timeouts)


@pytest.mark.usefixtures("broken")
async def test_a_stream_whose_reader_fails_goes_on_and_is_counted(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await failing(start, upstream, first_token=SILENCE, idle=SILENCE)
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD)
    # Longer in all than any silence may be: every read moves the clock.
    for number in range(8):
        piece = chunk(delta(f"{number}"))
        api.send(piece)
        await client.read_until(piece)
        assert not await _ends_within(client, SILENCE / 4)
    api.send(chunk(usage(1, 2) + DONE), LAST_CHUNK)
    assert (await client.read_until(LAST_CHUNK)).endswith(chunk(usage(1, 2) + DONE) + LAST_CHUNK)
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("bodies_not_read_total", reason="failed") == 1


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("boundary", [True, False])
async def test_a_stream_whose_reader_fails_ends_with_its_silence_and_says_so(
    start: StartProxy, upstream: ScriptedUpstream, boundary: bool
) -> None:
    proxy = await failing(start, upstream, idle=SILENCE)
    client, api = await begin(proxy, upstream)
    sent = delta("Hi") if boundary else delta("Hi") + b'data: {"cho'
    api.send(STREAM_HEAD, chunk(sent))
    rest, _ = await client.rest()
    assert (b"event: error\n" in rest) == boundary
    assert await proxy.ended() == {"upstream_timeout_idle": 1}
    assert proxy.sample("bodies_not_read_total", reason="failed") == 1


@pytest.mark.usefixtures("broken")
async def test_an_answer_whose_reader_fails_is_whole_and_counted(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await failing(start, upstream)
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
    assert (await client.message()).body == b"{}"
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("bodies_not_read_total", reason="failed") == 1


async def test_usage_of_an_answer_of_any_size_is_found(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream, post(path="/v1/embeddings"))
    data: list[Any] = [{"index": index, "embedding": [0.0123456789] * 512} for index in range(6000)]
    body = msgspec.json.encode({"data": data, "usage": {"prompt_tokens": 7, "total_tokens": 7}})
    assert len(body) > config.Limits().event
    api.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body), body)
    assert (await client.message()).body == body
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("tokens_total", type="input") == 7
    assert proxy.sample("bodies_not_read_total") == 0


async def _ends_within(client: Peer, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return not await client.reader.read(1)
    except TimeoutError:
        return False
