"""Requests whose body comes in parts, and what can go wrong with it on either side."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI

from sseproxy import config
from sseproxy.relay.body import RequestBody

from .conftest import StartProxy
from .harness import LAST_CHUNK, Peer, RunningProxy, ScriptedUpstream, begin, chunk, post, until
from .splits import steps

# Long enough for a loaded machine to do what it has to before, short enough to wait for.
SHORT = 0.3
CHUNKED = b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 1000000000\r\n\r\n"
# What no chunk begins with, and what must not be taken for a request then.
BROKEN = b"ZZZ\r\n" + post() * 2


def by_model(**timeouts: float) -> dict[str, Any]:
    """A route for which the whole body is read first."""
    match = config.Match(path="/v1", model=("m*",))
    return {
        "routes": (
            config.Route(
                name="m", match=match, upstream=(config.Target(name="up"),), timeouts=config.Timeouts(**timeouts)
            ),
        )
    }


async def refused(client: Peer) -> None:
    """Waits for a 400 and for nothing after it."""
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (400, "bad_request")
    assert response.get("connection") == "close"
    assert (await client.rest())[0] == b""


async def upload_until_blocked(proxy: RunningProxy, upstream: ScriptedUpstream) -> tuple[Peer, Peer]:
    """A client whose upload is not taken by the upstream, so that nothing more of it is read from the client."""
    client = await proxy.connect()
    client.send(ENDLESS)
    api = await upstream.accept()
    await api.head()
    api.writer.transport.pause_reading()  # type: ignore[attr-defined]
    async with asyncio.timeout(10):
        while not proxy.worker.proxy.server.hangups._watched:
            client.send(b"x" * 16384)
            await client.drain()
            await asyncio.sleep(0)
    return client, api


async def test_a_broken_chunk_is_refused_at_once_and_the_upstream_let_go(
    proxy: RunningProxy, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    client = await proxy.connect()
    client.send(CHUNKED, chunk(b"abc"))
    api = await upstream.accept()
    await api.head()
    assert await api.read_until(b"abc\r\n") == chunk(b"abc")
    client.send(BROKEN)
    await refused(client)
    assert await api.rest() == (b"", "fin")
    assert await proxy.ended() == {"rejected": 1}
    assert proxy.sample("requests_rejected_total", reason="bad_request", route="api") == 1
    assert proxy.sample("request_bytes_total") == 3
    assert proxy.sample("upstream_connections") == 0
    assert upstream.connections == 1
    assert not caplog.records


async def test_a_broken_chunk_that_comes_with_its_head_never_goes_upstream(
    proxy: RunningProxy, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    client = await proxy.connect()
    client.send(CHUNKED, chunk(b"abc"), BROKEN)
    await refused(client)
    assert await proxy.ended() == {"rejected": 1}
    assert proxy.sample("requests_rejected_total", reason="bad_request") == 1
    assert upstream.connections == 0
    assert not caplog.records


async def test_a_broken_chunk_of_a_body_that_is_read_for_its_model(
    start: StartProxy, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await start(upstream.url, **by_model())
    client = await proxy.connect()
    client.send(CHUNKED, chunk(b'{"model":'))
    await proxy.busy()
    client.send(BROKEN)
    await refused(client)
    assert await proxy.ended() == {"rejected": 1}
    assert proxy.sample("requests_rejected_total", reason="bad_request") == 1
    assert upstream.connections == 0
    assert not caplog.records


async def test_a_broken_chunk_of_a_request_that_waits_does_not_touch_the_one_before_it(
    proxy: RunningProxy, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    client, api = await begin(proxy, upstream)
    client.send(CHUNKED, chunk(b"abc"))
    (connection,) = proxy.worker.proxy.server.connections
    await until(lambda: bool(connection._requests))
    client.send(BROKEN)
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    await client.read_until(b"\r\n\r\n")
    api.send(b"first")
    assert await client.read(5) == b"first"
    await refused(client)
    assert await proxy.ended() == {"completed": 1, "rejected": 1}
    assert upstream.connections == 1
    assert not caplog.records


async def test_a_broken_chunk_after_the_upload_was_answered_ends_the_connection(
    proxy: RunningProxy, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    client = await proxy.connect()
    client.send(CHUNKED, chunk(b"abc"))
    api = await upstream.accept()
    await api.head()
    api.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
    assert (await client.message()).body == b"big"
    await proxy.idle()
    client.send(BROKEN)
    assert (await client.rest())[0] == b""
    assert await proxy.ended() == {"completed": 1}
    assert upstream.connections == 1
    assert not caplog.records


@pytest.mark.parametrize("sent", [b"", chunk(b"abc")], ids=["nothing", "something"])
async def test_a_client_that_stalls_its_upload_is_told_so_and_the_upstream_let_go(
    start: StartProxy, upstream: ScriptedUpstream, sent: bytes
) -> None:
    proxy = await start(upstream.url, timeouts={"body": SHORT})
    client = await proxy.connect()
    client.send(CHUNKED, sent)
    api = await upstream.accept()
    await api.head()
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (408, "stalled_client")
    assert response.get("connection") == "close"
    assert await api.rest() == (sent, "fin")
    assert await proxy.ended() == {"stalled_client": 1}
    assert proxy.sample("requests_total", code="408", upstream="up") == 1
    assert proxy.sample("upstream_errors_total") == 0


async def test_a_client_that_stalls_a_body_that_is_read_for_its_model_is_told_so(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, **by_model(body=SHORT))
    client = await proxy.connect()
    client.send(CHUNKED, chunk(b'{"model":'))
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (408, "stalled_client")
    assert response.get("connection") == "close"
    assert await proxy.ended() == {"stalled_client": 1}
    assert upstream.connections == 0


@pytest.mark.parametrize("route", ["any", "model"])
async def test_a_slow_upload_is_not_a_stalled_one(start: StartProxy, upstream: ScriptedUpstream, route: str) -> None:
    patience = {"body": 2 * SHORT}
    options = by_model(**patience) if route == "model" else {"timeouts": patience}
    proxy = await start(upstream.url, limits=config.Limits(request_body_rate=None), **options)
    client = await proxy.connect()
    client.send(CHUNKED)
    body = b'{"model":"m"}'
    for start_at in range(0, len(body), 2):
        # To take its time is what makes an upload slow.
        await asyncio.sleep(SHORT / 2)
        client.send(chunk(body[start_at : start_at + 2]))
    client.send(LAST_CHUNK)
    api = await upstream.accept()
    assert (await api.message()).body == body
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (await client.message()).body == b"ok"
    assert await proxy.ended() == {"completed": 1}


@pytest.mark.parametrize(
    "answer",
    [
        b"Content-Length: 3\r\n\r\nbig",
        b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"big") + LAST_CHUNK,
        b"Content-Length: 0\r\n\r\n",
        b"Connection: close\r\n\r\nbig",
    ],
    ids=["length", "chunked", "empty", "close"],
)
async def test_an_answer_to_an_upload_that_the_upstream_does_not_take_is_whole_and_ends_the_upload(
    proxy: RunningProxy, upstream: ScriptedUpstream, answer: bytes
) -> None:
    client, api = await upload_until_blocked(proxy, upstream)
    (relay,) = proxy.worker.proxy.active
    assert relay._asking is not None
    assert relay._asking.attempt is not None
    assert relay._asking.attempt.connection is not None
    transport = relay._asking.attempt.connection.transport
    assert transport.get_write_buffer_size()
    api.send(b"HTTP/1.1 413 Content Too Large\r\n", answer)
    if b"close" in answer:
        api.half_close()
    response = await client.message()
    assert (response.status, response.complete) == (413, True)
    assert response.body == (b"" if b": 0" in answer else b"big")
    assert response.get("connection") == "close"
    # The upstream has not taken what waited for it, and nobody waits for that.
    await until(lambda: not transport.get_write_buffer_size())
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("requests_total", code="413") == 1
    assert proxy.sample("upstream_connections") == 0


@pytest.mark.parametrize("end", [Peer.half_close, Peer.reset], ids=["fin", "rst"])
async def test_an_upstream_that_goes_without_taking_the_upload_is_a_502_at_once(
    proxy: RunningProxy, upstream: ScriptedUpstream, end: Any
) -> None:
    client, api = await upload_until_blocked(proxy, upstream)
    end(api)
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (502, "upstream_disconnected")
    assert response.get("connection") == "close"
    assert await proxy.ended() == {"upstream_error": 1}
    assert proxy.sample("upstream_errors_total", type="reset") == 1


async def test_a_client_is_told_to_continue_once(start: StartProxy, upstream: ScriptedUpstream) -> None:
    """Also where its body is looked at first, and is too large for that."""
    proxy = await start(upstream.url, max_body=1000, route={"usage": config.UsageOptions(request=True)})
    client = await proxy.connect()
    body = b'{"stream":true,"user":"%b"}' % (b"x" * 5_000)
    head = post(body)[: -len(body)]
    client.send(head[:-2] + b"Expect: 100-continue\r\n\r\n")
    assert await client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(body[:3_000])
    api = await upstream.accept()
    await api.head()
    client.send(body[3_000:])
    assert await api.read(len(body)) == body
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert (await client.head()).status == 200


@pytest.mark.parametrize("route", ["any", "model"])
async def test_a_client_of_http_1_0_is_never_told_to_continue(
    start: StartProxy, upstream: ScriptedUpstream, route: str
) -> None:
    """RFC 9110, section 10.1.1: it could not tell an interim response from the final one."""
    proxy = await start(upstream.url, **(by_model() if route == "model" else {}))
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n")
    if route == "any":
        # It has the head while there is no body yet.
        api = await upstream.accept()
        await api.head()
        client.send(b'{"model":"m"}')
        assert await api.read(13) == b'{"model":"m"}'
    else:
        await proxy.busy()
        client.send(b'{"model":"m"}')
        api = await upstream.accept()
        assert (await api.message()).body == b'{"model":"m"}'
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (await client.head()).status == 200
    assert await client.rest() == (b"ok", "fin")
    assert await proxy.ended() == {"completed": 1}


@pytest.mark.parametrize("follows", [b"", post()], ids=["alone", "pipelined"])
async def test_an_upload_of_blank_lines_costs_no_more_than_another(
    proxy: RunningProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, follows: bytes
) -> None:
    parsed = 0
    feed = RequestBody.feed

    def counting(self: RequestBody, data: bytes) -> int:
        nonlocal parsed
        parsed += 1
        return feed(self, data)

    monkeypatch.setattr(RequestBody, "feed", counting)
    payload = b"\r\n\r\n" * 100_000
    client = await proxy.connect()
    client.send(
        CHUNKED,
        *(chunk(payload[start : start + 50_000]) for start in range(0, len(payload), 50_000)),
        LAST_CHUNK + follows,
    )
    api = await upstream.accept()
    assert (await api.message()).body == payload
    # A piece of it has 2 KiB or more.
    assert parsed < len(payload) // 2048 + 50
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (await client.message()).body == b"ok"
    if follows:
        assert (await api.message()).body


# --- bodies that name their model in another form than plain JSON ---

BR = b"\x1b\x02\x00\x00\xa4\xb0\xb2\xea\x81\x47\x02\x8a"
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + b"RIFF\r\n--" * 20_000 + b"\r\n"
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--x--\r\n'
)
JSON = b'{"input":"%b","model":"whisper-1"}' % (b"x" * 100_000)
BODIES = {
    "form": (b"Content-Type: multipart/form-data; boundary=x", FORM),
    "compressed form": (
        b"Content-Type: multipart/form-data; boundary=x\r\nContent-Encoding: gzip",
        gzip.compress(FORM),
    ),
    "gzip": (b"Content-Type: application/json\r\nContent-Encoding: gzip", gzip.compress(JSON)),
    "deflate": (b"Content-Type: application/json\r\nContent-Encoding: deflate", zlib.compress(JSON)),
    "small": (b"Content-Encoding: x-gzip", gzip.compress(b'{"model":"whisper-1"}')),
}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def models(*models: str) -> tuple[config.Route, ...]:
    """A route for `models`, and one for all others."""
    return (
        config.Route(name="named", match=config.Match(path="/v1", model=models), upstream=(config.Target(name="up"),)),
        config.Route(name="rest", match=config.Match(path="/v1"), upstream=(config.Target(name="up"),)),
    )


def transcription(fields: bytes, body: bytes, *, chunked: bool = False) -> list[bytes]:
    """A request in its head and parts of its body."""
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: proxy\r\n" + fields
    if not chunked:
        return [head + b"\r\nContent-Length: %d\r\n\r\n" % len(body), *steps(body, 30_000)]
    return [head + b"\r\nTransfer-Encoding: chunked\r\n\r\n", *map(chunk, steps(body, 30_000)), LAST_CHUNK]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("kind", BODIES)
async def test_a_form_and_what_is_compressed_take_the_route_of_their_model_and_pass_unchanged(
    start: StartProxy, upstream: ScriptedUpstream, kind: str, chunked: bool
) -> None:
    fields, body = BODIES[kind]
    labels = config.Metrics(models=("whisper-*",))
    proxy = await start(upstream.url, routes=models("whisper-*"), metrics=labels)
    client = await proxy.connect()
    for part in transcription(fields, body, chunked=chunked):
        client.send(part)
        await client.drain()
    api = await upstream.accept()
    request = await api.message()
    assert request.body == body
    assert [request.get("content-type"), request.get("content-encoding")] == [
        next((line.partition(b": ")[2].decode() for line in fields.split(b"\r\n") if line.startswith(name)), None)
        for name in (b"Content-Type", b"Content-Encoding")
    ]
    api.send(OK)
    assert (await client.message()).body == b"ok"
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("requests_total", route="named") == 1
    assert proxy.worker.proxy.admission.empty


async def test_a_transcription_of_the_sdk_takes_the_route_of_its_model(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, routes=models("whisper-*"))
    client = AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="sk-x", max_retries=0)
    file = ("speech.wav", b"RIFF\r\n--" * 10_000)
    async with client:
        asked = asyncio.get_running_loop().create_task(
            client.audio.transcriptions.create(model="whisper-1", file=file, language="en")
        )
        api = await upstream.accept()
        assert file[1] in (await api.message()).body
        api.send(
            OK.replace(b"Length: 2", b"Type: application/json\r\nContent-Length: 13").replace(b"ok", b'{"text":"Hi"}')
        )
        assert (await asked).text == "Hi"
    await proxy.idle()
    assert proxy.sample("requests_total", route="named") == 1


@pytest.mark.parametrize("coding", [b"br", b"zstd", b"gzip, gzip", b"nonsense"])
async def test_a_body_in_a_coding_that_is_not_read_is_refused_where_a_route_needs_its_model(
    start: StartProxy, upstream: ScriptedUpstream, coding: bytes
) -> None:
    proxy = await start(upstream.url, routes=models("m"))
    client = await proxy.connect()
    fields = b"Content-Type: application/json\r\nContent-Encoding: " + coding
    client.send(*transcription(fields, BR))
    response = await client.message()
    assert (response.status, response.get("accept-encoding")) == (415, "gzip, deflate")
    error = response.json()["error"]
    assert (error["code"], "gzip" in error["message"]) == ("encoding", True)
    # The connection goes on, and what has no body needs no coding.
    client.send(b"GET /v1/models HTTP/1.1\r\nHost: proxy\r\n" + fields + b"\r\n\r\n")
    api = await upstream.accept()
    await api.message()
    api.send(OK)
    assert (await client.message()).body == b"ok"
    assert await proxy.ended() == {"rejected": 1, "completed": 1}
    assert proxy.sample("requests_rejected_total", reason="encoding") == 1


async def test_it_passes_where_no_route_needs_its_model(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(
        upstream.url, metrics=config.Metrics(models=("m",)), route={"usage": config.UsageOptions(request=True)}
    )
    client = await proxy.connect()
    client.send(*transcription(b"Content-Type: application/json\r\nContent-Encoding: br", BR))
    api = await upstream.accept()
    assert (await api.message()).body == BR
    api.send(OK)
    assert (await client.message()).body == b"ok"


async def test_what_is_broken_or_no_form_has_no_model(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, routes=models("*"))
    client = await proxy.connect()
    broken = (
        (b"Content-Encoding: gzip", b'{"model":"m"}'),
        (b"Content-Encoding: gzip", gzip.compress(b'{"model":"m"}')[:-12]),
        (b"Content-Type: multipart/form-data", FORM),
        (b"Content-Type: multipart/form-data; boundary=y", FORM),
    )
    api: Peer | None = None
    for fields, body in broken:
        client.send(*transcription(fields, body))
        api = api or await upstream.accept()
        assert (await api.message()).body == body
        api.send(OK)
        assert (await client.message()).body == b"ok"
    await proxy.idle()
    assert proxy.sample("requests_total", route="rest") == len(broken)


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress], ids=["gzip", "deflate"])
async def test_bombs_are_too_large_and_others_have_their_turns_meanwhile(
    start: StartProxy, upstream: ScriptedUpstream, compress: Callable[[bytes], bytes]
) -> None:
    proxy = await start(upstream.url, routes=models("whisper-*"), max_body=8 << 20)
    coding = b"gzip" if compress is gzip.compress else b"deflate"
    bomb = compress(b'{"model":"whisper-1","input":"' + b" " * (64 << 20) + b'"}')
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    clients = [await proxy.connect() for _ in range(10)]
    counting = asyncio.get_running_loop().create_task(count_turns())
    tracemalloc.start()
    try:
        for client in clients:
            client.send(*transcription(b"Content-Encoding: " + coding, bomb))
        responses = [await client.message() for client in clients]
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        counting.cancel()
    for response in responses:
        assert (response.status, response.json()["error"]["code"]) == (413, "body_too_large")
    # What it stands for is looked at in pieces of 32 KiB.
    assert turns > len(clients) * (8 << 20) // (32 << 10)
    assert held < 8 << 20
    assert proxy.worker.proxy.admission.empty
    assert upstream.connections == 0
