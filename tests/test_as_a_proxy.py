"""What is expected of any reverse proxy: nothing invented, nothing mixed up, nobody slowed down by another."""

from __future__ import annotations

import asyncio
import gzip
import logging
from ipaddress import ip_network

import pytest

from sseproxy import config
from sseproxy.relay import downstream as relay_downstream
from sseproxy.relay import idle as relay_idle
from sseproxy.relay import routes

from .conftest import PlayScript, StartProxy
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
    until,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
OURS = {"via", "x-request-id"}
# Long enough for a loaded machine to do what it has to before, short enough to wait for.
IDLE = 0.5


async def answer_all(api: Peer) -> None:
    while True:
        await api.message()
        api.send(OK)


async def test_nothing_is_invented_in_either_direction(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi")
    api = await upstream.accept()
    request = await api.message()
    assert {name.lower() for name, _ in request.fields} - OURS == {
        *("host", "content-length", "accept-encoding"),
        *("x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"),
    }
    api.send(OK)
    response = await client.message()
    assert {name.lower() for name, _ in response.fields} - OURS == {"content-length", "date"}


async def test_the_upstreams_own_fields_pass_as_they_are(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    fields = [("Server", "up/1"), ("Date", "yesterday"), ("Set-Cookie", "a=1"), ("Set-Cookie", "a=2"), ("x_Y", "z")]
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    api.send(b"HTTP/1.1 299 Odd Reason\r\n" + lines.encode() + b"Content-Length: 0\r\n\r\n")
    response = await client.message()
    assert response.start_line == "HTTP/1.1 299 Odd Reason"
    assert response.fields[: len(fields)] == fields


@pytest.mark.parametrize("value", [b"caf\xe9", "日本".encode(), b"\xff\xfe", b"a\tb"])
async def test_the_bytes_of_a_field_pass_both_ways(
    proxy: RunningProxy, upstream: ScriptedUpstream, value: bytes
) -> None:
    client = await proxy.connect()
    client.send(b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-Odd: " + value + b"\r\nX_Under: " + value + b"\r\n\r\n")
    api = await upstream.accept()
    request = await api.message()
    assert (request.get("x-odd"), request.get("x_under")) == (value.decode("latin-1"), value.decode("latin-1"))
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Odd: " + value + b"\r\n\r\n")
    assert (await client.message()).get("x-odd") == value.decode("latin-1")


@pytest.mark.parametrize(
    "request_of",
    [
        b"GET /%s HTTP/1.1\r\nHost: EVIL\r\nEVIL: EVIL\r\n\r\n",
        b"GET /v1/../EVIL HTTP/1.1\r\nHost: EVIL\r\n\r\n",
        b"GET /v1/EVIL HTTP/1.1\r\nHost: EVIL\r\nExpect: EVIL\r\n\r\n",
        b"EVIL /v1/EVIL HTTP/1.1\r\nHost: EVIL\r\n\r\n",
        b"EVIL\r\n\r\n",
        b"POST /v1/EVIL HTTP/1.1\r\nHost: EVIL\r\nTransfer-Encoding: EVIL\r\n\r\n",
    ],
)
async def test_an_answer_of_ours_has_nothing_of_the_request(proxy: RunningProxy, request_of: bytes) -> None:
    client = await proxy.connect()
    client.send(request_of)
    received = (await client.message()).body
    assert received
    assert b"EVIL" not in received
    assert str(proxy.worker.proxy.upstreams["up"].endpoints[0].host).encode() not in received


async def test_a_compressed_request_passes_as_it_is(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    packed = gzip.compress(b'{"model":"m","stream":true}' * 100)
    client = await proxy.connect()
    client.send(post(packed).replace(b"Content-Type", b"Content-Encoding: gzip\r\nContent-Type"))
    request = await (await upstream.accept()).message()
    assert (request.body, request.get("content-encoding")) == (packed, "gzip")


async def test_redirects_and_cookies_are_the_clients_business(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(
        b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://elsewhere/\r\nSet-Cookie: who=one; Path=/\r\n"
        b"Content-Length: 0\r\n\r\n"
    )
    response = await client.message()
    assert (response.status, response.get("location")) == (307, "http://elsewhere/")
    other = await proxy.connect()
    other.send(post())
    assert (await api.message()).get("cookie") is None
    assert upstream.connections == 1


async def test_a_slow_reader_delays_no_other(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    slow, api = await begin(proxy, upstream)
    slow.reader._transport.pause_reading()  # type: ignore[attr-defined]
    api.send(STREAM_HEAD)
    (connection,) = proxy.worker.proxy.server.connections
    while not connection.writing_paused:
        api.send(chunk(delta("x" * 10_000)))
        await asyncio.sleep(0)
    quick, other = await begin(proxy, upstream)
    for _ in range(20):
        other.send(STREAM_HEAD, chunk(delta("Hi") + DONE), LAST_CHUNK)
        assert (await quick.message()).complete
        quick.send(post())
        await other.message()
    slow.reader._transport.resume_reading()  # type: ignore[attr-defined]
    await slow.read_until(delta("x" * 10_000))
    slow.close()


async def test_an_upstream_that_takes_nothing_stops_the_reading_of_the_upload(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: h\r\nContent-Length: 100000000\r\n\r\n")
    api = await upstream.accept()
    api.reader._transport.pause_reading()  # type: ignore[attr-defined]
    sent = 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            while sent < 100_000_000:
                client.send(b"x" * 100_000)
                sent += 100_000
                await client.writer.drain()
    # The kernel's buffers took most of it; what is kept here is what counts.
    (relay,) = proxy.worker.proxy.active
    assert relay._asking is not None
    assert relay._asking.attempt is not None
    assert relay._asking.attempt.connection is not None
    held = relay._request.body._size + relay._asking.attempt.connection.transport.get_write_buffer_size()
    assert 0 < held < 1_000_000
    assert sent < 100_000_000
    api.reader._transport.resume_reading()  # type: ignore[attr-defined]
    client.writer.transport.abort()
    await api.gone()


async def test_a_crash_in_one_exchange_touches_no_other(
    proxy: RunningProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, api = await begin(proxy, upstream)
    with monkeypatch.context() as broken:
        broken.setattr(routes, "upstream_path", None)
        other = await proxy.connect()
        other.send(post())
        response = await other.message()
    assert (response.status, response.json()["error"]["code"]) == (500, "internal_error")
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    api.send(STREAM_HEAD, chunk(delta("Hi") + DONE), LAST_CHUNK)
    assert (await client.message()).complete
    assert await proxy.ended() == {"proxy_error": 1, "completed": 1}


async def test_an_idle_connection_to_the_upstream_is_closed_by_us_first(
    start: StartProxy, play: PlayScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below the five seconds of uvicorn and Node.js.
    assert relay_idle.KEEPALIVE < 5
    monkeypatch.setattr(relay_idle, "KEEPALIVE", 0.2)
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def answer(api: Peer) -> None:
        await api.message()
        api.send(OK)
        ended.set_result((await api.rest())[1])

    upstream = await play(answer)
    proxy = await start(upstream.url)
    client = await proxy.connect()
    client.send(post())
    await client.message()
    assert await ended == "fin"
    await until(lambda: proxy.sample("upstream_connections") == 0)


@pytest.mark.parametrize("requests", [0, 1, 2])
async def test_a_connection_that_a_client_leaves_idle_is_closed(
    requests: int, start: StartProxy, play: PlayScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_downstream, "KEEPALIVE", IDLE)
    proxy = await start((await play(answer_all)).url)
    client = await proxy.connect()
    for _ in range(requests):
        client.send(post())
        assert (await client.message()).status == 200
    assert await client.rest() == (b"", "fin")
    assert proxy.outcomes() == ({"completed": requests} if requests else {})


async def test_a_connection_is_not_idle_during_a_silence(
    start: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_downstream, "KEEPALIVE", IDLE)
    proxy = await start(upstream.url)
    client, api = await begin(proxy, upstream)
    done, _ = await asyncio.wait([asyncio.ensure_future(api.rest())], timeout=3 * IDLE)
    assert not done
    api.send(STREAM_HEAD, chunk(delta("Hi") + DONE), LAST_CHUNK)
    assert (await client.message()).complete
    assert await client.rest() == (b"", "fin")
    assert await proxy.ended() == {"completed": 1}


@pytest.mark.parametrize("requests", [0, 1])
async def test_a_connection_is_not_idle_while_a_head_comes(
    requests: int, start: StartProxy, play: PlayScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_downstream, "KEEPALIVE", IDLE)
    proxy = await start((await play(answer_all)).url)
    client = await proxy.connect()
    for _ in range(requests):
        client.send(post())
        assert (await client.message()).status == 200
    client.send(post()[:30])
    done, _ = await asyncio.wait([left := asyncio.ensure_future(client.head())], timeout=3 * IDLE)
    assert not done
    client.send(post()[30:])
    assert (await left).status == 200


async def test_a_client_that_left_is_counted_as_499(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    client.close()
    await api.gone()
    await proxy.idle()
    assert proxy.sample("requests_total", code="499", outcome="client_gone_before_head") == 1
    assert proxy.sample("requests_total") == 1


CLAIMS = {
    "Forwarded": "for=6.6.6.6",
    "X-Forwarded-For": "6.6.6.6",
    "X_Forwarded_For": "6.6.6.6",
    "X-Forwarded-Port": "666",
    "X-Forwarded-Prefix": "/evil",
    "X-Forwarded-User": "root",
    "X-Forwarded-Client-Cert": "Subject=root",
    "X-Real-IP": "6.6.6.6",
    "x_real-ip": "6.6.6.6",
    "True-Client-IP": "6.6.6.6",
    "X-Original-URL": "/admin",
    "SCRIPT_NAME": "/admin",
    "Remote_User": "root",
}


def get(path: str = "/v1/x", **fields: str) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"GET {path} HTTP/1.1\r\nHost: h\r\n{lines}\r\n".encode()


async def test_nobody_says_through_us_what_only_a_proxy_says(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(get(**CLAIMS, X_Mine="mine"))
    request = await (await upstream.accept()).message()
    assert {name.lower() for name, _ in request.fields} - OURS == {
        *("host", "x_mine", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host")
    }
    assert request.all("x-forwarded-for") == ["127.0.0.1"]


async def test_what_a_trusted_proxy_says_passes_and_forwarded_is_added_to(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, trusted_proxies=(ip_network("127.0.0.0/8"),))
    client = await proxy.connect()
    client.send(get(**CLAIMS))
    request = await (await upstream.accept()).message()
    assert request.all("forwarded") == ["for=6.6.6.6, for=127.0.0.1;host=h;proto=http"]
    assert request.all("x-forwarded-for") == ["6.6.6.6, 127.0.0.1"]
    assert (request.get("x-forwarded-port"), request.get("x-real-ip")) == ("666", "6.6.6.6")
    assert not any("_" in name for name, _ in request.fields)


@pytest.mark.parametrize("name", ["x_api_key", "X-Api_Key", "api_key"])
async def test_a_key_replaces_credentials_in_any_spelling(
    start: StartProxy, upstream: ScriptedUpstream, name: str
) -> None:
    proxy = await start(upstream.url, api_key="sk-x")
    client = await proxy.connect()
    client.send(get(**{name: "client"}))
    request = await (await upstream.accept()).message()
    assert (request.get("authorization"), request.get(name.lower())) == ("Bearer sk-x", None)


async def test_trailers_are_not_asked_for_because_they_are_dropped(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(get(TE="trailers", Connection="TE"))
    request = await (await upstream.accept()).message()
    assert (request.get("te"), request.get("connection")) == (None, None)


@pytest.mark.parametrize("line", [b"Content-Length : 5", b"Content-Length\t: 5", b": x", b"X", b"X y: z"])
async def test_a_line_of_a_response_head_that_is_no_field_is_a_502(
    proxy: RunningProxy, upstream: ScriptedUpstream, line: bytes
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\n" + line + b"\r\n\r\nhello and more")
    api.close()
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (502, "upstream_protocol")
    await api.gone()
    assert await proxy.ended() == {"upstream_error": 1}


async def test_a_path_that_is_spelled_otherwise_takes_the_same_route(
    start: StartProxy, upstream: ScriptedUpstream, play: PlayScript
) -> None:
    other = await play(answer_all)
    up = config.Upstream(name="up", url=f"{upstream.url}/base")
    proxy = await start(
        upstream.url,
        upstreams=(up, config.Upstream(name="other", url=other.url)),
        routes=(
            config.Route(name="all", match=config.Match(path="/v1"), upstream=(config.Target(name="other"),)),
            config.Route(name="admin", match=config.Match(path="/v1/admin"), upstream=(config.Target(name="up"),)),
        ),
    )
    client = await proxy.connect()
    api = None
    for path, forwarded in {
        "/v1/admin/%61?%61": "/base/%61?%61",
        "/v1/%61dmin/%61?%61": "/base/%61?%61",
        "/%761/%61%64%6D%69%6e": "/base",
        "/v1/admi%6E/%2fx": "/base/%2fx",
    }.items():
        client.send(get(path))
        api = api or await upstream.accept()
        assert (await api.message()).start_line == f"GET {forwarded} HTTP/1.1"
        api.send(OK)
        assert (await client.message()).status == 200
    assert proxy.sample("requests_total", route="admin") == 4


async def test_a_path_that_is_spelled_otherwise_is_measured_all_the_same(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream, post(path="/v1/respons%65s"))
    generated = b'data: {"type":"response.output_text.delta","delta":"Hi"}\n\n'
    api.send(STREAM_HEAD, chunk(generated), chunk(b'data: {"type":"response.completed"}\n\n'), LAST_CHUNK)
    assert (await client.message()).complete
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("time_to_first_token_seconds_count") == 1


async def test_a_route_for_any_model_reads_no_body_for_the_routes_behind_it(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    files = config.Route(name="files", match=config.Match(path="/v1/files"), upstream=(config.Target(name="up"),))
    chat = config.Route(name="chat", match=config.Match(path="/v1", model=("*",)), upstream=(config.Target(name="up"),))
    proxy = await start(upstream.url, routes=(chat, files), max_body=10)
    client = await proxy.connect()
    body = b"x" * 1000
    client.send(post(body, "/v1/files"))
    api = await upstream.accept()
    assert (await api.message()).body == body
    api.send(OK)
    assert (await client.message()).status == 200
    client.send(post(body, "/v1/chat/completions"))
    assert (await client.message()).status == 413
