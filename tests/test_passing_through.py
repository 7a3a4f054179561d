"""What goes in comes out: heads, bodies and statuses of every kind of request."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import random
from time import perf_counter

import pytest

from sseproxy import config
from sseproxy.config.options import Secret
from sseproxy.relay.heads import ResponseHeads
from sseproxy.relay.upstream import RelayProtocol

from .conftest import StartProxy
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    RunningProxy,
    ScriptedUpstream,
    begin,
    chunk,
    delta,
    post,
    until,
    usage,
)


async def test_a_stream_arrives_byte_for_byte(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(post())
    api = await upstream.accept()
    request = await api.message()
    assert request.start_line == "POST /v1/chat/completions HTTP/1.1"
    assert request.body == b'{"model":"m","stream":true,"messages":[]}'
    api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(delta(" there")), chunk(DONE), LAST_CHUNK)
    response = await client.message()
    assert response.status == 200
    assert response.body == delta("Hi") + delta(" there") + DONE
    assert response.complete
    assert await proxy.ended() == {"completed": 1}


async def test_a_chunk_is_with_the_client_before_the_upstream_sends_another(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD)
    head = await client.head()
    assert head.status == 200
    for text in ("one", "two", "three"):
        api.send(chunk(delta(text)))
        assert await client.read(len(chunk(delta(text)))) == chunk(delta(text))
    api.send(LAST_CHUNK)
    assert await client.read(5) == LAST_CHUNK


async def test_the_head_is_with_the_client_before_any_body(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD)
    head = await client.head()
    assert head.get("content-type") == "text/event-stream; charset=utf-8"
    assert head.get("cache-control") == "no-cache, no-transform"
    assert head.get("x-accel-buffering") == "no"
    assert head.get("server") is None


@pytest.mark.parametrize(
    ("status", "reason", "fields", "body"),
    [
        (429, "Too Many Requests", [("Retry-After", "7"), ("x-ratelimit-remaining-tokens", "0")], b'{"error":{}}'),
        (503, "Service Unavailable", [("Retry-After", "1"), ("Server", "uvicorn")], b"busy"),
        (401, "Unauthorized", [("WWW-Authenticate", "Bearer"), ("x-request-id", "req_upstream")], b'{"error":{}}'),
        (500, "Oh no", [], b""),
        (302, "Found", [("Location", "https://elsewhere.example/")], b""),
    ],
)
async def test_what_the_upstream_answers_passes_unchanged(
    proxy: RunningProxy,
    upstream: ScriptedUpstream,
    status: int,
    reason: str,
    fields: list[tuple[str, str]],
    body: bytes,
) -> None:
    client, api = await begin(proxy, upstream)
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    api.send(f"HTTP/1.1 {status} {reason}\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode(), body)
    response = await client.message()
    assert response.start_line == f"HTTP/1.1 {status} {reason}"
    assert [field for field in response.fields if field in fields] == fields
    assert response.body == body
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("requests_total", code=str(status)) == 1


async def test_json_with_usage_passes_and_is_counted(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    body = b'{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":7,"completion_tokens":2}}'
    api.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body), body)
    response = await client.message()
    assert response.body == body
    await proxy.idle()
    assert proxy.sample("tokens_total", type="input") == 7
    assert proxy.sample("tokens_total", type="output") == 2
    assert proxy.sample("streams_without_usage_total") == 0


async def test_head_keeps_its_length_and_has_no_body(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(b"HEAD /v1/files/f HTTP/1.1\r\nHost: proxy\r\n\r\n")
    api = await upstream.accept()
    assert (await api.message()).start_line == "HEAD /v1/files/f HTTP/1.1"
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n")
    response = await client.message(bodiless=True)
    assert response.get("content-length") == "12345"
    # A body may follow all the same: neither connection is used again.
    await api.gone()
    client.send(b"DELETE /v1/files/f HTTP/1.1\r\nHost: proxy\r\n\r\n")
    api = await upstream.accept()
    assert (await api.message()).start_line == "DELETE /v1/files/f HTTP/1.1"
    api.send(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
    response = await client.message()
    assert (response.status, response.get("content-length")) == (204, None)
    await api.gone()


async def test_an_upload_is_streamed_not_collected(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 10\r\n\r\n")
    api = await upstream.accept()
    head = await api.head()
    assert head.get("content-length") == "10"
    client.send(b"first")
    assert await api.read(5) == b"first"
    client.send(b"again")
    assert await api.read(5) == b"again"
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (await client.message()).body == b"ok"
    await proxy.idle()
    assert proxy.sample("request_bytes_total") == 10


async def test_a_chunked_upload_is_reframed_without_extensions_and_trailers(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nTransfer-Encoding: chunked\r\n\r\n")
    api = await upstream.accept()
    assert (await api.head()).get("transfer-encoding") == "chunked"
    client.send(b"3;name=value\r\nabc\r\n")
    assert await api.read_until(b"abc\r\n") == b"3\r\nabc\r\n"
    client.send(b"0\r\nX-Trailer: secret\r\n\r\n")
    assert await api.read(5) == LAST_CHUNK
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert (await client.message()).status == 200


async def test_a_client_that_waits_for_100_continue_is_told_to_go_on(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
    assert await client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    api = await upstream.accept()
    assert (await api.head()).get("expect") is None
    client.send(b"body")
    assert await api.read(4) == b"body"
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert (await client.message()).status == 200


async def test_an_early_answer_to_an_upload_reaches_the_client(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 1000000\r\n\r\nstart")
    api = await upstream.accept()
    await api.head()
    api.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
    response = await client.message()
    assert (response.status, response.body) == (413, b"big")
    assert response.get("connection") == "close"
    await api.gone()


async def test_a_binary_download_passes_at_any_size(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    content = random.Random(1).randbytes(3_000_000)
    client = await proxy.connect()
    client.send(b"GET /v1/files/f/content HTTP/1.1\r\nHost: proxy\r\n\r\n")
    api = await upstream.accept()
    await api.message()
    api.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 3000000\r\n\r\n", content)
    assert (await client.message()).body == content
    await proxy.idle()
    assert proxy.sample("response_bytes_total") == len(content)


async def test_a_close_delimited_response_is_framed_for_the_client(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", delta("Hi"), DONE)
    api.close()
    response = await client.message()
    assert response.get("transfer-encoding") == "chunked"
    assert (response.body, response.complete) == (delta("Hi") + DONE, True)
    assert await proxy.ended() == {"completed": 1}


async def test_an_http_1_0_client_gets_no_chunks(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
    api = await upstream.accept()
    assert (await api.message()).start_line.endswith("HTTP/1.1")
    api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(DONE), LAST_CHUNK)
    response = await client.message()
    assert response.get("transfer-encoding") is None
    assert response.get("connection") == "close"
    assert (response.body, response.complete) == (delta("Hi") + DONE, True)


async def test_chunks_are_forwarded_however_the_upstream_cuts_them(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    body = delta("Hi") + delta(" there") + DONE
    framed = chunk(body[:20]) + b"%X;ext=1\r\n" % len(body[20:]) + body[20:] + b"\r\n0\r\nTrailer: x\r\n\r\n"
    client = await proxy.connect()
    for cut in range(1, len(framed), 7):
        client.send(post())
        api = await upstream.accept()
        await api.message()
        api.send(STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), framed[:cut])
        await api.drain()
        head = await client.head()
        assert head.get("connection") is None
        api.send(framed[cut:])
        received = bytearray()
        while size := int(await client.read_until(b"\r\n"), 16):
            received += (await client.read(size + 2))[:-2]
        assert await client.read(2) == b"\r\n"
        assert bytes(received) == body


async def test_connections_are_reused_on_both_sides(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(post())
    api = await upstream.accept()
    for turn in range(5):
        await api.message()
        api.send(STREAM_HEAD, chunk(delta(f"{turn}")), chunk(DONE), LAST_CHUNK)
        assert (await client.message()).complete
        if turn < 4:
            client.send(post())
    assert upstream.connections == 1
    assert await proxy.ended() == {"completed": 5}
    assert proxy.sample("upstream_connections", state="idle") == 1


async def test_the_connection_that_was_used_last_is_used_first(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    one, first = await begin(proxy, upstream)
    other, second = await begin(proxy, upstream)
    for client, api in ((one, first), (other, second)):
        api.send(STREAM_HEAD, chunk(DONE), LAST_CHUNK)
        assert (await client.message()).complete
    # As long as one request follows another, the first connection is not needed any more.
    for _ in range(3):
        one.send(post())
        await second.message()
        second.send(STREAM_HEAD, chunk(DONE), LAST_CHUNK)
        assert (await one.message()).complete
    assert upstream.connections == 2
    assert await proxy.ended() == {"completed": 5}


def aged(upstream: ScriptedUpstream, age: float) -> tuple[config.Upstream, ...]:
    return (config.Upstream(name="up", url=f"{upstream.url}/v1", max_connection_age=age),)


async def test_a_connection_that_has_its_age_ends_after_the_response_that_is_on_it(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, upstreams=aged(upstream, 0.05))
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(delta("Hi"))
    (connection,) = proxy.worker.proxy.upstreams["up"].endpoints[0]._connector._acquired
    assert isinstance(connection, RelayProtocol)
    await until(lambda: connection.is_old)
    api.send(chunk(delta(" there")), chunk(DONE), LAST_CHUNK)
    assert (await client.read_until(LAST_CHUNK)).endswith(delta(" there") + DONE + b"\r\n" + LAST_CHUNK)
    assert await api.rest() == (b"", "fin")
    client.send(post())
    await (await upstream.accept()).message()
    assert upstream.connections == 2
    client.close()
    assert await proxy.ended() == {"completed": 1, "client_gone_before_head": 1}


async def test_a_connection_that_has_its_age_while_it_is_idle_takes_no_other_request(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, upstreams=aged(upstream, 3600.0))
    client, api = await begin(proxy, upstream)
    answer = STREAM_HEAD + chunk(DONE) + LAST_CHUNK
    api.send(answer)
    assert (await client.message()).complete
    client.send(post())
    await api.message()
    api.send(answer)
    assert (await client.message()).complete
    assert upstream.connections == 1
    (connection,) = proxy.worker.proxy.upstreams["up"].endpoints[0]._idle
    assert isinstance(connection.protocol, RelayProtocol)
    connection.protocol._old_at = 0.0
    client.send(post())
    second = await upstream.accept()
    await second.message()
    second.send(answer)
    assert (await client.message()).complete
    assert await api.rest() == (b"", "fin")
    assert await proxy.ended() == {"completed": 3}


async def test_connections_that_are_made_together_do_not_end_together() -> None:
    loop = asyncio.get_running_loop()
    heads = ResponseHeads(loop, 1024)
    began = perf_counter()
    ages = [RelayProtocol(loop, heads, max_age=1000.0)._old_at for _ in range(200)]
    took = perf_counter() - began
    assert min(age - began for age in ages if age is not None) >= 900
    assert max(age - began for age in ages if age is not None) <= 1000 + took
    assert len({round(age) for age in ages if age is not None}) > 20
    assert not RelayProtocol(loop, heads).is_old


async def test_a_key_of_the_upstream_replaces_the_clients(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, api_key="sk-of-the-upstream")
    client = await proxy.connect()
    client.send(post().replace(b"Host:", b"Authorization: Bearer sk-of-the-client\r\nx-api-key: other\r\nHost:"))
    request = await (await upstream.accept()).message()
    assert request.all("authorization") == ["Bearer sk-of-the-upstream"]
    assert request.get("x-api-key") is None


async def test_the_request_goes_on_as_it_came(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(
        b"GET /v1/models/org%2Fname?q=a+b&c=%20&d HTTP/1.1\r\nHost: proxy:80\r\nAuthorization: Bearer k\r\n"
        b"X-Odd: caf\xc3\xa9 \xff\r\nX-Two: 1\r\nx-two: 2\r\nConnection: close, X-Drop\r\nX-Drop: 1\r\n"
        b"X-Forwarded-For: 6.6.6.6\r\n\r\n"
    )
    request = await (await upstream.accept()).message()
    assert request.start_line == "GET /v1/models/org%2Fname?q=a+b&c=%20&d HTTP/1.1"
    assert request.get("host") == f"127.0.0.1:{upstream.port}"
    assert request.get("authorization") == "Bearer k"
    assert request.get("x-odd") == "caf\xc3\xa9 \xff"
    assert request.all("x-two") == ["1", "2"]
    assert request.get("x-drop") is None
    assert request.get("user-agent") is None
    assert request.get("content-type") is None
    assert request.all("x-forwarded-for") == ["127.0.0.1"]
    assert request.get("x-forwarded-host") == "proxy:80"


async def test_the_model_picks_the_route_and_the_body_stays_as_it_was(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    upstreams = tuple(config.Upstream(name=name, url=f"{upstream.url}/{name}") for name in ("small", "large"))
    routes = (
        config.Route(name="small", match=config.Match(path="/v1"), upstream=(config.Target(name="small"),)),
        config.Route(
            name="large", match=config.Match(path="/v1", model=("gpt-*",)), upstream=(config.Target(name="large"),)
        ),
    )
    proxy = await start(upstream.url, upstreams=upstreams, routes=routes, max_body=64)
    client = await proxy.connect()
    for model, path in (("gpt-x", "/large/chat/completions"), ("llama", "/small/chat/completions")):
        body = b'{ "model" : "%b" , "x":1.0e1 }' % model.encode()
        client.send(post(body))
        api = await upstream.accept()
        request = await api.message()
        assert request.start_line == f"POST {path} HTTP/1.1"
        assert request.body == body
        api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert (await client.message()).status == 200
    client.send(post(b" " * 65))
    response = await client.message()
    assert response.status == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert proxy.sample("requests_rejected_total", reason="body_too_large") == 1


@pytest.mark.parametrize(
    ("request_head", "status", "code"),
    [
        (b"GET /v2 HTTP/1.1\r\nHost: p\r\n\r\n", 404, "no_route"),
        (b"GET /v1/../admin HTTP/1.1\r\nHost: p\r\n\r\n", 400, "bad_target"),
        (b"GET /v1/%2e%2E/admin HTTP/1.1\r\nHost: p\r\n\r\n", 400, "bad_target"),
        (b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n", 501, "method"),
        (b"POST /v1 HTTP/1.1\r\nHost: p\r\nExpect: a-pony\r\nContent-Length: 0\r\n\r\n", 417, "expectation"),
        (b"NOT HTTP\r\n\r\n", 400, "bad_request"),
        (b"POST /v1 HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "bad_request"),
        (b"GET /v1 HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (b"POST /v1 HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, "bad_request"),
    ],
)
async def test_what_cannot_be_relayed_is_answered_here(
    proxy: RunningProxy, upstream: ScriptedUpstream, request_head: bytes, status: int, code: str
) -> None:
    client = await proxy.connect()
    client.send(request_head)
    response = await client.message()
    assert response.status == status
    assert response.json()["error"]["code"] == code
    assert response.get("content-type") == "application/json"
    assert response.get("server") is None
    assert await proxy.ended() == {"rejected": 1}
    assert proxy.sample("requests_rejected_total", reason=code) == 1
    assert upstream.connections == 0


async def test_a_compressed_stream_passes_unread(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    compressed = gzip.compress(delta("Hi") + DONE)
    client = await proxy.connect()
    client.send(post().replace(b"Host:", b"Accept-Encoding: gzip, deflate\r\nHost:"))
    api = await upstream.accept()
    assert (await api.message()).all("accept-encoding") == ["identity"]
    api.send(STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), chunk(compressed), LAST_CHUNK)
    response = await client.message()
    assert response.get("content-encoding") == "gzip"
    assert response.body == compressed
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("bodies_not_read_total", reason="encoded") == 1
    assert proxy.sample("streams_without_usage_total", reason="not_read") == 1
    assert proxy.sample("stream_ends_total") == 0


async def test_an_event_too_large_to_be_read_passes_and_the_next_is_read(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    large = delta("x" * (config.Limits().event + 1))
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(large), chunk(usage(3, 2)), chunk(DONE), LAST_CHUNK)
    assert (await client.message()).body == delta("Hi") + large + usage(3, 2) + DONE
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("bodies_not_read_total", reason="oversize") == 1
    assert proxy.sample("tokens_total", type="output") == 2
    assert proxy.sample("stream_ends_total", end="marker") == 1
    assert proxy.sample("stream_events_total") == 4


async def test_a_clean_end_without_a_marker_is_told_apart(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")), LAST_CHUNK)
    assert (await client.message()).complete
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("stream_ends_total", end="eof") == 1
    assert proxy.sample("stream_ends_total", end="marker") == 0


async def test_what_is_fetched_is_not_counted_as_generated(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(b"GET /v1/responses/resp_1 HTTP/1.1\r\nHost: p\r\n\r\n")
    api = await upstream.accept()
    await api.message()
    body = b'{"object":"response","usage":{"input_tokens":7,"output_tokens":2}}'
    api.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body), body)
    assert (await client.message()).body == body
    await proxy.idle()
    assert proxy.sample("tokens_total") == 0


async def test_what_follows_a_connect_is_not_taken_for_a_request(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n", post())
    assert (await client.message()).get("connection") == "close"
    await client.gone()
    assert await proxy.ended() == {"rejected": 1}
    assert upstream.connections == 0


async def test_an_upgrade_is_ignored_and_the_connection_goes_on(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    upgrade = b"GET /v1/ws HTTP/1.1\r\nHost: p\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    client.send(upgrade, post())
    api = await upstream.accept()
    request = await api.message()
    assert (request.get("upgrade"), request.get("connection")) == (None, None)
    api.send(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n")
    assert (await client.message()).status == 426
    assert (await api.message()).start_line.startswith("POST")
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (await client.message()).body == b"ok"


@pytest.mark.parametrize(
    ("method", "head"),
    [("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"), ("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n")],
)
async def test_a_body_where_none_may_be_reaches_nobody(
    proxy: RunningProxy, upstream: ScriptedUpstream, method: str, head: bytes
) -> None:
    client = await proxy.connect()
    client.send(f"{method} /v1/files HTTP/1.1\r\nHost: p\r\n\r\n".encode())
    api = await upstream.accept()
    await api.message()
    api.send(head, b"evil")
    await client.message(bodiless=True)
    await api.gone()
    client.send(post())
    api = await upstream.accept()
    await api.message()
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
    assert (await client.message()).body == b"good"


async def test_a_route_can_say_which_dialect_is_spoken(start: StartProxy, upstream: ScriptedUpstream) -> None:
    route = config.Route(
        name="api", match=config.Match(path="/v1"), upstream=(config.Target(name="up"),), dialect="messages"
    )
    proxy = await start(upstream.url, routes=(route,))
    client, api = await begin(proxy, upstream, post(path="/v1/claude"))
    event = b'data: {"type":"content_block_delta","delta":{"text":"Hi"}}\n\n'
    api.send(STREAM_HEAD, chunk(event), chunk(b'data: {"type":"message_stop"}\n\n'), LAST_CHUNK)
    assert (await client.message()).complete
    await proxy.idle()
    assert proxy.sample("time_to_first_token_seconds_count") == 1
    assert proxy.sample("stream_ends_total", end="marker") == 1


async def test_a_connection_whose_last_read_blocked_a_client_serves_the_next(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, timeouts={"head": 3.0})
    slow = await proxy.connect()
    slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
    slow.send(b"GET /v1/files/f HTTP/1.1\r\nHost: p\r\n\r\n")
    api = await upstream.accept()
    await api.message()
    api.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    (connection,) = proxy.worker.proxy.server.connections
    assert connection.transport is not None
    while connection.transport.get_write_buffer_size() < 15_000:
        api.send(chunk(b"x" * 15_000))
        await api.drain()
        await asyncio.sleep(0.002)  # until the kernel takes no more
    assert not connection.writing_paused
    api.send(chunk(b"y" * 25_000), LAST_CHUNK)
    await until(lambda: proxy.sample("upstream_connections", state="idle") == 1)
    slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert (await slow.message()).complete
    client = await proxy.connect()
    client.send(post())
    await api.message()
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (await client.message()).body == b"ok"


@pytest.mark.parametrize(("network", "believed"), [("127.0.0.0/8", True), ("::1", False), ("10.0.0.0/8", False)])
async def test_only_trusted_proxies_say_where_a_request_comes_from(
    start: StartProxy, upstream: ScriptedUpstream, network: str, believed: bool
) -> None:
    proxy = await start(upstream.url, trusted_proxies=(ipaddress.ip_network(network),))
    client = await proxy.connect()
    client.send(b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 203.0.113.9\r\n\r\n")
    request = await (await upstream.accept()).message()
    assert request.get("x-forwarded-for") == ("203.0.113.9, 127.0.0.1" if believed else "127.0.0.1")


async def test_a_key_may_stand_alone_in_a_field_of_its_own(start: StartProxy, upstream: ScriptedUpstream) -> None:
    up = config.Upstream(name="up", url=f"{upstream.url}/v1", api_key=Secret("sk-x"), api_key_header="x-api-key")
    proxy = await start(upstream.url, upstreams=(up,))
    client = await proxy.connect()
    client.send(post().replace(b"\r\n", b"\r\nAuthorization: Bearer client\r\nX-API-Key: client\r\n", 1))
    request = await (await upstream.accept()).message()
    assert request.all("x-api-key") == ["sk-x"]
    assert request.get("authorization") is None
