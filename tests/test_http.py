"""What RFC 9110 and RFC 9112 require of a gateway, and of a server that answers by itself, one after the other."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import pytest
import trustme
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from sseproxy import config
from sseproxy.errors import ProtocolError
from sseproxy.observe.registry import Registry
from sseproxy.process.admin import application
from sseproxy.relay import routes
from sseproxy.relay.answers import date
from sseproxy.wire import headers
from sseproxy.wire.headers import Fields, check_beginning, one_hop_less

from .conftest import StartProxy
from .harness import LAST_CHUNK, STREAM_HEAD, Message, Peer, RunningProxy, ScriptedUpstream, begin, post
from .served import nobody_looks
from .splits import splits, steps

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def request_for(target: str = "/v1/x", *fields: str, method: str = "GET", version: str = "1.1") -> bytes:
    lines = "".join(f"{field}\r\n" for field in fields)
    return f"{method} {target} HTTP/{version}\r\nHost: proxy.example\r\n{lines}\r\n".encode()


async def forwarded(proxy: RunningProxy, upstream: ScriptedUpstream, request: bytes) -> Message:
    """What arrives of `request` at the upstream."""
    return await (await begin_with(proxy, upstream, request))[1].message()


async def begin_with(proxy: RunningProxy, upstream: ScriptedUpstream, request: bytes) -> tuple[Peer, Peer]:
    client = await proxy.connect()
    client.send(request)
    return client, await upstream.accept()


async def answered_here(proxy: RunningProxy, upstream: ScriptedUpstream, request: bytes) -> Message:
    client = await proxy.connect()
    client.send(request)
    answer = await client.message(bodiless=request.startswith(b"HEAD"))
    assert upstream.connections == 0
    return answer


# --- Date: RFC 9110, section 6.6.1 ---


def is_now(message: Message) -> bool:
    """Whether it has one Date, in the preferred form (section 5.6.7), of about now."""
    (value,) = message.all("date")
    assert re.fullmatch(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", value)
    return abs(parsedate_to_datetime(value) - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.parametrize("fields", [b"", b"Connection: Date\r\nDate: yesterday\r\n"])
async def test_a_response_without_a_date_gets_one(
    proxy: RunningProxy, upstream: ScriptedUpstream, fields: bytes
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\n" + fields + b"Content-Length: 0\r\n\r\n")
    assert is_now(await client.message())
    client.send(post())
    await api.message()
    api.send(STREAM_HEAD.replace(b"\r\n\r\n", b"\r\n" + fields + b"\r\n"), LAST_CHUNK)
    assert is_now(await client.message())


async def test_the_upstreams_date_stays(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\ndate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 0\r\n\r\n")
    assert (await client.message()).all("date") == ["Sun, 06 Nov 1994 08:49:37 GMT"]


OURS = {
    "no route": (request_for("/v2"), 404),
    "a bad path": (request_for("/v1/.."), 400),
    "a method": (request_for(method="TRACE"), 501),
    "an expectation": (request_for("/v1/x", "Expect: a-pony"), 417),
    "the server": (request_for("*", method="OPTIONS"), 200),
    "no HTTP": (b"nonsense\r\n\r\n", 400),
    "another version": (request_for(version="3.0"), 505),
    "no host": (b"GET /v1 HTTP/1.1\r\n\r\n", 400),
    "a long target": (request_for("/v1/" + "y" * 40_000), 414),
    "a large head": (request_for("/v1/x", "X: " + "y" * 40_000), 431),
    "too large a body": (request_for("/v1/x", "Content-Length: 99999999999999", method="POST"), 413),
}


@pytest.mark.parametrize("name", OURS)
async def test_our_own_answer_has_a_date_and_an_id(proxy: RunningProxy, upstream: ScriptedUpstream, name: str) -> None:
    request, status = OURS[name]
    answer = await answered_here(proxy, upstream, request)
    assert answer.status == status
    assert is_now(answer)
    (request_id,) = answer.all("x-request-id")
    assert re.fullmatch("[0-9a-f]{16}", request_id)
    assert len(answer.all("content-length")) == 1


async def test_an_upstream_that_is_not_there_is_answered_for_with_a_date(start: StartProxy) -> None:
    async with ScriptedUpstream() as gone:
        url = gone.url
    proxy = await start(url)
    client = await proxy.connect()
    client.send(request_for())
    answer = await client.message()
    assert (answer.status, is_now(answer)) == (502, True)


def test_a_date_is_written_once_a_second() -> None:
    # Between two of these a second may begin, and no other.
    assert date() is date() or date() is date()


# --- Max-Forwards, and OPTIONS for the server itself: RFC 9110, sections 7.6.2 and 9.3.7 ---


@pytest.mark.parametrize(
    ("said", "told"),
    [("1", "0"), ("10", "9"), ("007", "6"), ("255", "254"), ("256", "255"), ("300", "255"), ("9" * 5000, "255")],
)
async def test_max_forwards_of_options_is_lowered(
    proxy: RunningProxy, upstream: ScriptedUpstream, said: str, told: str
) -> None:
    request = await forwarded(proxy, upstream, request_for("/v1/x", f"max-forwards: {said}", method="OPTIONS"))
    assert request.start_line == "OPTIONS /v1/x HTTP/1.1"
    assert request.all("max-forwards") == [told]


async def test_max_forwards_is_neither_invented_nor_lowered_elsewhere(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    request = await forwarded(proxy, upstream, request_for(method="OPTIONS"))
    assert request.get("max-forwards") is None
    request = await forwarded(proxy, upstream, request_for("/v1/x", "Max-Forwards: 0"))
    assert request.all("max-forwards") == ["0"]


@pytest.mark.parametrize(
    "request_of",
    [
        request_for("/v1/x", "Max-Forwards: 0", method="OPTIONS"),
        request_for("/v1/x", "Max-Forwards: 000", method="OPTIONS"),
        request_for("/nowhere", "Max-Forwards: 0", method="OPTIONS"),
        request_for("*", method="OPTIONS"),
        request_for("*", "Max-Forwards: 5", method="OPTIONS"),
        request_for("http://proxy.example", method="OPTIONS"),
    ],
    ids=lambda request: request.decode().partition("\r\n\r\n")[0],
)
async def test_options_for_this_server_are_answered_here(
    proxy: RunningProxy, upstream: ScriptedUpstream, request_of: bytes
) -> None:
    client = await proxy.connect()
    for _ in range(2):
        client.send(request_of)
        answer = await client.message()
        assert (answer.status, answer.body) == (200, b"")
        assert answer.all("allow") == ["GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"]
    assert upstream.connections == 0
    assert await proxy.ended() == {"completed": 2}
    assert proxy.sample("requests_total", code="200", route="") == 2
    client.send(request_of.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert (await client.message()).get("connection") == "close"
    assert await client.rest() == (b"", "fin")


@pytest.mark.parametrize("value", ["", "-1", "+1", "1.0", "one", "1, 2", "0x1", "1\r\nMax-Forwards: 1"])
async def test_max_forwards_that_is_no_number_is_refused(
    proxy: RunningProxy, upstream: ScriptedUpstream, value: str
) -> None:
    answer = await answered_here(proxy, upstream, request_for("/v1/x", f"Max-Forwards: {value}", method="OPTIONS"))
    assert (answer.status, answer.json()["error"]["code"]) == (400, "bad_request")


@given(st.integers(0, 10**6).map(str) | st.binary(max_size=6).map(lambda value: value.decode("latin-1")))
def test_max_forwards_goes_down_to_nothing_and_no_further(value: str) -> None:
    fields = Fields([(b"A", b"b"), (b"Max-Forwards", value.encode("latin-1"))])
    try:
        left = one_hop_less(fields)
    except ProtocolError:
        assert re.fullmatch("[0-9]+", value) is None
        return
    assert (left is None) == (int(value) == 0)
    if left is not None:
        assert int(left.named(b"max-forwards")[0]) == min(int(value) - 1, 255)
        assert left.named(b"a") == [b"b"]


@pytest.mark.parametrize("value", ["0", "1"])
async def test_trace_goes_no_further_whatever_it_says(
    proxy: RunningProxy, upstream: ScriptedUpstream, value: str
) -> None:
    answer = await answered_here(proxy, upstream, request_for("/v1/x", f"Max-Forwards: {value}", method="TRACE"))
    assert answer.status == 501
    assert b"proxy.example" not in answer.body


# --- versions: RFC 9110, section 2.5, and RFC 9112, section 2.3 ---


@pytest.mark.parametrize("minor", range(2, 10))
async def test_a_later_minor_version_is_1_1(proxy: RunningProxy, upstream: ScriptedUpstream, minor: int) -> None:
    request = request_for("/v1/x", "Expect: 100-continue", "Content-Length: 2", method="POST", version=f"1.{minor}")
    client = await proxy.connect()
    for piece in steps(request, 7):
        client.send(piece)
        await client.drain()
    assert await client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"hi")
    api = await upstream.accept()
    received = await api.message()
    assert (received.start_line, received.body) == ("POST /v1/x HTTP/1.1", b"hi")
    api.send(f"HTTP/1.{minor} 200 Fine\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n".encode())
    response = await client.message()
    assert (response.start_line, response.body, response.get("connection")) == ("HTTP/1.1 200 Fine", b"ok", None)
    client.send(request_for(version=f"1.{minor}"))
    await api.message()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_via_tells_in_which_version_a_message_came(
    proxy: RunningProxy, upstream: ScriptedUpstream, version: str
) -> None:
    client, api = await begin_with(proxy, upstream, request_for("/v1/x", "Via: 1.0 elsewhere", version=version))
    request = await api.message()
    assert request.start_line == "GET /v1/x HTTP/1.1"
    assert request.all("via") == ["1.0 elsewhere", f"{version} sseproxy"]
    api.send(f"HTTP/{version} 200 OK\r\nContent-Length: 0\r\n\r\n".encode())
    response = await client.message()
    assert response.start_line == "HTTP/1.1 200 OK"
    assert response.all("via") == [f"{version} sseproxy"]


# --- request targets: RFC 9112, sections 3.2.2 and 3 ---


async def test_the_host_of_an_absolute_target_is_the_host(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, trusted_proxies=(ipaddress.ip_network("127.0.0.0/8"),))
    request = await forwarded(proxy, upstream, request_for("http://told.example:81/v1/x", "Forwarded: for=192.0.2.1"))
    assert request.start_line == "GET /v1/x HTTP/1.1"
    assert request.all("host") == [f"127.0.0.1:{upstream.port}"]
    assert request.all("x-forwarded-host") == ["told.example:81"]
    assert request.all("forwarded") == ['for=192.0.2.1, for=127.0.0.1;host="told.example:81";proto=http']
    old = b"GET http://told.example/v1/x HTTP/1.0\r\n\r\n"
    assert (await forwarded(proxy, upstream, old)).all("x-forwarded-host") == ["told.example"]


async def test_a_target_of_https_has_to_come_over_tls(start: StartProxy, upstream: ScriptedUpstream) -> None:
    plain = await start(upstream.url)
    request = request_for("HTTPS://proxy.example/v1/x")
    answer = await answered_here(plain, upstream, request)
    assert (answer.status, answer.json()["error"]["code"]) == (421, "misdirected")
    trusting = await start(upstream.url, trusted_proxies=(ipaddress.ip_network("127.0.0.0/8"),))
    assert (await forwarded(trusting, upstream, request)).start_line == "GET /v1/x HTTP/1.1"


async def test_a_target_of_https_may_come_over_tls(start: StartProxy, upstream: ScriptedUpstream) -> None:
    authority = trustme.CA()
    issued, client_side = authority.issue_cert("127.0.0.1"), ssl.create_default_context()
    authority.configure_trust(client_side)
    with issued.private_key_and_cert_chain_pem.tempfile() as pem:
        proxy = await start(upstream.url, listener_tls=config.TLS(cert_file=pem))
        client = Peer(*await asyncio.open_connection("127.0.0.1", proxy.port, ssl=client_side))
    client.send(request_for("https://proxy.example/v1/x"))
    api = await upstream.accept()
    assert (await api.message()).all("x-forwarded-host") == ["proxy.example"]
    api.send(OK)
    assert (await client.message()).body == b"ok"
    client.writer.transport.abort()


# --- interim responses: RFC 9110, section 15.2 ---

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nConnection: X-Own\r\nX-Own: 1\r\nKeep-Alive: 1\r\n\r\n"
PROCESSING = b"HTTP/1.1 102 Processing\r\nContent-Length: 5\r\n\r\n"


@pytest.mark.parametrize("size", [1, 10_000])
async def test_interim_responses_are_forwarded(proxy: RunningProxy, upstream: ScriptedUpstream, size: int) -> None:
    client, api = await begin(proxy, upstream)
    for interim in (HINTS, PROCESSING, b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 199 \r\n\r\n"):
        for piece in steps(interim, size):
            api.send(piece)
        # It is there before anything else comes.
        head = await client.head()
        assert head.start_line.encode() == interim.partition(b"\r\n")[0]
        assert [name for name, _ in head.fields] == ["Link"] * (interim is HINTS) + ["X-Request-Id", "Via"]
    api.send(HINTS + PROCESSING + OK)
    assert [(await client.head()).status for _ in range(2)] == [103, 102]
    response = await client.message()
    assert (response.status, response.body) == (200, b"ok")
    assert await proxy.ended() == {"completed": 1}
    client.send(post())
    await api.message()


async def test_a_client_of_http_1_0_gets_no_interim_response(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream, post().replace(b"HTTP/1.1", b"HTTP/1.0"))
    api.send(HINTS + b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
    assert (await client.head()).status == 200


async def test_a_client_is_told_to_continue_once(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(request_for("/v1/files", "Expect: 100-continue", "Content-Length: 4", method="POST"))
    api = await upstream.accept()
    await api.head()
    api.send(b"HTTP/1.1 100 Continue\r\n\r\n" + HINTS)
    assert [(await client.head()).status for _ in range(2)] == [100, 103]
    client.send(b"body")
    await api.read(4)
    api.send(OK)
    assert (await client.head()).status == 200


async def test_interim_responses_are_bounded(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, limits=config.Limits(response_head=1024))
    client, api = await begin(proxy, upstream)
    api.send(PROCESSING * (1024 // len(PROCESSING)) + OK)
    assert (await client.message()).status == 200
    client.send(post())
    await api.message()
    api.send(PROCESSING * (1024 // len(PROCESSING) + 1) + OK)
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (502, "upstream_protocol")
    await api.gone()


async def test_an_interim_response_for_a_client_that_is_gone_goes_nowhere(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    client.reset()
    api.send(HINTS)
    await api.gone()
    assert await proxy.ended() == {"client_gone_before_head": 1}


@pytest.mark.parametrize("status", ["000", "099", "101"])
async def test_a_status_that_leads_nowhere_is_a_502(
    proxy: RunningProxy, upstream: ScriptedUpstream, status: str
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(f"HTTP/1.1 {status} Odd\r\n\r\n".encode() + OK)
    assert (await client.message()).status == 502
    await api.gone()


@pytest.mark.parametrize("line", ["299 ", "418 I'm a teapot", "599 x", "999 "])
async def test_a_status_that_nobody_knows_passes_with_its_space(
    proxy: RunningProxy, upstream: ScriptedUpstream, line: str
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(f"HTTP/1.1 {line}\r\nContent-Length: 0\r\n\r\n".encode())
    assert (await client.message()).start_line == f"HTTP/1.1 {line}"


async def test_a_status_line_keeps_its_second_space(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n")
    assert (await client.message()).start_line == "HTTP/1.1 200 "


# --- heads of responses: RFC 9112, sections 2.2, 5.1 and 5.2 ---

NO_HEADS = {
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "a bare LF in the fields": b"HTTP/1.1 200 OK\r\nX: y\n",
    "a bare LF after the status line": b"HTTP/1.1 200 OK\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "an alert of TLS": b"\x15\x03\x01\x00\x02\x02\x46",
    "HTTP/0.9": b"<html>",
    "an empty line before it": b"\r\nHTTP/1.1 200 OK\r\n",
}


@pytest.mark.parametrize("name", NO_HEADS)
async def test_what_cannot_become_a_response_head_is_refused_at_once(
    proxy: RunningProxy, upstream: ScriptedUpstream, name: str
) -> None:
    for size in (1, 10_000):
        # The upstream neither goes on nor closes.
        client, api = await begin(proxy, upstream)
        for piece in steps(NO_HEADS[name], size):
            if not api.writer.transport.is_closing():
                api.send(piece)
        response = await client.message()
        assert (response.status, response.json()["error"]["code"]) == (502, "upstream_protocol")
        await api.gone()
    assert await proxy.ended() == {"upstream_error": 2}
    assert proxy.sample("upstream_errors_total", type="protocol") == 2


@given(st.data(), st.lists(st.sampled_from([b"A: b", b"X-Y:", b"Server: \xff"])))
def test_the_beginning_of_a_head_is_never_refused(data: st.DataObject, lines: list[bytes]) -> None:
    head = b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"", b""])
    begun = b""
    for piece in data.draw(splits(head)):
        begun += piece
        check_beginning(begun)


async def test_a_folded_line_of_a_response_is_a_502(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\nX-Long: a\r\n b\r\nContent-Length: 0\r\n\r\n")
    assert (await client.message()).status == 502


# --- Expect: RFC 9110, section 10.1.1 and, of lists, 5.6.1.2 ---


@pytest.mark.parametrize("value", ["100-Continue", ",100-continue", "100-continue , ,", "100-continue, 100-continue"])
async def test_an_expectation_is_a_list(proxy: RunningProxy, upstream: ScriptedUpstream, value: str) -> None:
    client = await proxy.connect()
    client.send(request_for("/v1/x", f"Expect: {value}", "Content-Length: 2", method="POST"))
    assert await client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"hi")
    assert (await (await upstream.accept()).message()).body == b"hi"


@pytest.mark.parametrize("value", ["a-pony", "100-continue, a-pony", "100-continue;a=b"])
async def test_no_other_expectation_is_met(proxy: RunningProxy, upstream: ScriptedUpstream, value: str) -> None:
    answer = await answered_here(proxy, upstream, request_for("/v1/x", f"Expect: {value}"))
    assert (answer.status, answer.json()["error"]["code"]) == (417, "expectation")


# --- conditions and ranges: RFC 9110, sections 13.2.1 and 14.2 ---


async def test_conditions_and_ranges_are_the_upstreams_affair(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    fields = ['If-Match: "a"', 'If-None-Match: W/"b", *', "If-Modified-Since: x", "If-Range: y", "Range: bytes=0-1,5-"]
    client = await proxy.connect()
    api: Peer | None = None
    for status, answer in [
        (206, b"206 Partial Content\r\nContent-Range: bytes 0-1/9\r\nContent-Length: 2\r\n\r\nok"),
        (304, b'304 Not Modified\r\nETag: "a"\r\nContent-Length: 9\r\n\r\n'),
        (412, b"412 Precondition Failed\r\nContent-Length: 0\r\n\r\n"),
        (416, b"416 Range Not Satisfiable\r\nContent-Range: bytes */9\r\nContent-Length: 0\r\n\r\n"),
    ]:
        client.send(request_for("/v1/x", *fields))
        api = api or await upstream.accept()
        request = await api.message()
        assert [f"{name}: {value}" for name, value in request.fields if f"{name}: {value}" in fields] == fields
        api.send(b"HTTP/1.1 " + answer)
        response = await client.message()
        told = [(name, value) for name, value in response.fields if name.startswith(("Content-", "ETag"))]
        assert response.status == status
        assert "\r\n".join(f"{name}: {value}" for name, value in told) in answer.decode()
        if status == 304:
            # A body might follow all the same.
            await api.gone()
            api = None


# --- Location: RFC 9110, section 10.2.2, as nginx's proxy_redirect ---

ELSEWHERE = [
    "https://elsewhere.example/v1/x",
    "http://127.0.0.1/v1/x",
    "//elsewhere.example/v1/x",
    "http://UP@elsewhere.example/v1",
    "http://UP.elsewhere.example/v1",
    "http://u:p@UP/v1/x",
    "http://UP/login",
    "http://UP/v1x",
    "/login",
    "x/",
    "?a=b",
    "",
    "mailto:a@b",
    "http:/v1/x",
    "http:UP/v1/x",
]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("http://UP/v1/x/", "/api/x/"),
        ("HTTP://UP/v1/x?a=http://UP/v1#b", "/api/x?a=http://UP/v1#b"),
        ("https://UP/v1/x/", "/api/x/"),
        ("//UP/v1/x/", "/api/x/"),
        ("http://UP/v1", "/api"),
        ("http://UP/v1?a=/b", "/api?a=/b"),
        ("http://UP/v1/", "/api/"),
        ("http://UP/v1//y", "/api//y"),
        ("http://UP/%761/%7E\xe9", "/api/%7E\xe9"),
        ("/v1/x/", "/api/x/"),
        *((said, said) for said in ELSEWHERE),
    ],
)
async def test_a_location_at_the_upstream_comes_back_here(
    start: StartProxy, upstream: ScriptedUpstream, said: str, told: str
) -> None:
    routed = config.Route(name="api", match=config.Match(path="/api"), upstream=(config.Target(name="up"),))
    proxy = await start(upstream.url, routes=(routed,))
    client = await proxy.connect()
    name = f"127.0.0.1:{upstream.port}"
    for status in (307, 201):
        client.send(request_for("/api/x", method="DELETE"))
        api = await upstream.accept()
        await api.message()
        field = b"Location: " + said.replace("UP", name).encode("latin-1")
        api.send(b"HTTP/1.1 %d X\r\n%b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % (status, field))
        response = await client.message()
        assert response.all("location") == [told.replace("UP", name)]
        api.close()
    # Elsewhere it means something else.
    client.send(request_for("/api/x"))
    api = await upstream.accept()
    await api.message()
    api.send(b"HTTP/1.1 200 OK\r\n" + field + b"\r\nContent-Length: 0\r\n\r\n")
    assert (await client.message()).all("location") == [said.replace("UP", name)]


async def test_two_locations_are_nobodys(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 307 X\r\nLocation: /v1/a\r\nLocation: /v1/b\r\nContent-Length: 0\r\n\r\n")
    assert (await client.message()).all("location") == ["/v1/a", "/v1/b"]


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "/%2fevil.example"])
async def test_a_location_that_comes_back_leads_to_no_other_host(
    start: StartProxy, upstream: ScriptedUpstream, path: str
) -> None:
    routed = config.Route(name="all", match=config.Match(path="/"), upstream=(config.Target(name="up"),))
    up = config.Upstream(name="up", url=upstream.url)
    proxy = await start(upstream.url, routes=(routed,), upstreams=(up,))
    client, api = await begin_with(proxy, upstream, request_for("/x"))
    await api.message()
    said = f"http://127.0.0.1:{upstream.port}{path}"
    api.send(f"HTTP/1.1 307 X\r\nLocation: {said}\r\nContent-Length: 0\r\n\r\n".encode())
    (told,) = (await client.message()).all("location")
    assert told in (said, "/%2fevil.example")


PATHS = st.text("/v1x%2e~7E.\\", max_size=12).map(lambda rest: "/" + rest)


@given(st.sampled_from(["", "/v1", "/%7Ea/b"]), st.sampled_from(["/", "/api", "/a/%2e"]), PATHS)
def test_a_path_that_was_led_there_is_led_back(base: str, prefix: str, path: str) -> None:
    route = config.Route(name="r", match=config.Match(path=prefix), upstream=(config.Target(name="up"),))
    if not routes.Router([route]).candidates("GET", path):
        return
    there = routes.upstream_path(route, base, path)
    here = routes.client_path(route, base, there)
    if here is None:
        assert path[1:2] in ("/", "\\")
    else:
        assert routes.upstream_path(route, base, here) == there


# --- paths ---


@pytest.mark.parametrize(
    "name",
    ["9.41%E2%80%AFAM.png", "a%C2%A0b", "%F0%9F%91%A9%E2%80%8D%F0%9F%9A%80", "caf%E9", "%E2%80%8Ex", "%EF%BB%BF"],
)
async def test_any_name_that_is_no_control_passes(proxy: RunningProxy, upstream: ScriptedUpstream, name: str) -> None:
    request = await forwarded(proxy, upstream, request_for(f"/v1/files/{name}?q={name}"))
    assert request.start_line == f"GET /v1/files/{name}?q={name} HTTP/1.1"


# --- the admin listener, as an origin server ---


@pytest.fixture
async def admin() -> AsyncIterator[int]:
    async def registry() -> Registry:
        return Registry()

    async def reload() -> None:
        raise AssertionError

    async with TestServer(application(registry, lambda: None, reload, config.Admin, nobody_looks())) as server:
        assert server.port is not None
        yield server.port


@pytest.mark.parametrize(
    ("request_of", "status"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET /livez HTTP/1.0\r\n\r\n", 200),
        (b"GET http://localhost/readyz HTTP/1.1\r\nHost: elsewhere\r\n\r\n", 200),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET /livez HTTP/1.0\r\nHost: a b\r\n\r\n", 400),
        (b"GET http:///livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://u@localhost/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"DELETE /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"TRACE /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"POST http://evil.example/-/reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 421),
        (b"POST /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    ],
)
async def test_the_admin_listener_is_an_origin_server(admin: int, request_of: bytes, status: int) -> None:
    peer = Peer(*await asyncio.open_connection("127.0.0.1", admin))
    peer.send(request_of)
    answer = await peer.message(bodiless=request_of.startswith(b"HEAD"))
    assert answer.status == status
    assert is_now(answer)
    assert (answer.get("allow") is not None) == (status == 405)
    peer.close()
    received, _ = await peer.rest()
    assert received == b""


def test_what_is_required_of_a_request_is_required_everywhere() -> None:
    fields = headers.check_request((1, 1), "http://a/", Fields([(b"Host", b"b")]))
    assert fields.named(b"host") == [b"a"]
