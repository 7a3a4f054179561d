"""Every part of aiohttp that the relay leans on and that aiohttp does not promise. One that moves fails here, by name.

The relay's own tests would fail as well, but not say why.
"""

from __future__ import annotations

import asyncio
import inspect
from contextlib import suppress
from functools import partial

import aiohttp
import pytest
from aiohttp import ClientTimeout, TCPConnector
from aiohttp.base_protocol import BaseProtocol
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError, LineTooLong
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy, HttpResponseParser, RawRequestMessage

from sseproxy.relay.routes import METHODS

from .harness import RunningProxy, ScriptedUpstream


def parameters(function: object) -> list[str]:
    assert callable(function)
    return list(inspect.signature(function).parameters)


def test_the_minor_version_is_the_one_this_was_written_for() -> None:
    assert aiohttp.__version__.startswith("3.14.")


def test_the_parsers_are_the_c_ones() -> None:
    assert HttpRequestParser is not HttpRequestParserPy
    assert HttpResponseParser.__module__ == "aiohttp._http_parser"


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        (BaseProtocol, "_drain_helper", ["self"]),
        (BaseProtocol, "pause_writing", ["self"]),
        (BaseProtocol, "resume_writing", ["self"]),
        (ResponseHandler, "data_received", ["self", "data"]),
        (ResponseHandler, "connection_lost", ["self", "exc"]),
        (ResponseHandler, "abort", ["self"]),
        (HttpRequestParser, "feed_data", ["self", "incoming_data"]),
        (Connection, "release", ["self"]),
        (Connection, "close", ["self"]),
    ],
)
def test_a_method_is_there_with_its_parameters(owner: type, name: str, expected: list[str]) -> None:
    assert parameters(getattr(owner, name)) == expected


async def test_the_protocols_have_the_attributes_that_are_read() -> None:
    loop = asyncio.get_running_loop()
    client = ResponseHandler(loop)
    for name in ("_should_close", "_exception", "_connection_lost_called", "_loop", "writing_paused"):
        assert hasattr(client, name), name
    assert isinstance(inspect.getattr_static(ResponseHandler, "should_close"), property)


async def test_a_connector_makes_its_protocols_with_its_factory_and_counts_them() -> None:
    connector = TCPConnector(limit=0)
    assert isinstance(connector._factory, partial)
    assert connector._factory.func is ResponseHandler
    assert not connector._acquired
    assert parameters(connector.connect) == ["req", "traces", "timeout"]
    await connector.close()


async def test_a_connector_asks_no_more_of_a_request_than_a_target_has(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    (api,) = proxy.worker.proxy.upstreams["up"].endpoints
    connection = await api._connector.connect(api._target, [], ClientTimeout())
    await upstream.accept()
    assert type(connection.protocol).__name__ == "RelayProtocol"
    assert api.connections() == (1, 0)
    connection.close()
    assert api.connections() == (0, 0)
    assert set(ConnectionKey._fields) == {
        "host",
        "port",
        "is_ssl",
        "ssl",
        "proxy",
        "proxy_auth",
        "proxy_headers_hash",
        "server_hostname",
    }


def request_parser() -> HttpRequestParser:
    """As `relay.heads` has one."""
    loop = asyncio.get_running_loop()
    return HttpRequestParser(
        BaseProtocol(loop),
        loop,
        65536,
        max_line_size=100,
        max_headers=5,
        max_field_size=100,
        response_with_body=False,
        auto_decompress=False,
    )


GET = b"GET / HTTP/1.1\r\nHost: p\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        GET,
        b"POST / HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: p\r\nContent-Length: 100\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: p\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"CONNECT p:443 HTTP/1.1\r\nHost: p\r\n\r\n",
    ],
)
async def test_a_request_parser_gives_a_message_with_the_last_byte_of_its_head_and_not_before(head: bytes) -> None:
    for split in range(len(head)):
        parser = request_parser()
        assert not parser.feed_data(head[:split])[0]
        messages, _, _ = parser.feed_data(head[split:])
        assert len(messages) == 1
        assert messages[0][0].method == head.split()[0].decode()


async def test_a_request_parser_knows_the_methods_that_a_route_can_be_for() -> None:
    for method in [*METHODS, "PRI", "TRACK", "FOO", "get", "Get", "DEBUG", "DESCRIBE", "UPDATE", "LABEL"]:
        known = False
        with suppress(HttpProcessingError):
            known = bool(request_parser().feed_data(f"{method} / HTTP/1.1\r\nHost: p\r\n\r\n".encode())[0])
        assert known == (method in METHODS), method


async def test_a_request_parser_refuses_as_soon_as_it_can() -> None:
    for start in (b"\x16\x03\x01", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost : p\r\n"):
        with pytest.raises(HttpProcessingError):
            request_parser().feed_data(start)


async def test_a_line_that_is_too_long_is_told_apart() -> None:
    assert issubclass(LineTooLong, BadHttpMessage)
    for line in (b"GET /%b HTTP/1.1\r\n" % (b"y" * 100), GET[:-2] + b"X: %b\r\n" % (b"y" * 101)):
        with pytest.raises(LineTooLong):
            request_parser().feed_data(line)


async def test_a_response_parser_without_bodies_takes_one_head_after_another() -> None:
    loop = asyncio.get_running_loop()
    parser = HttpResponseParser(
        ResponseHandler(loop),
        loop,
        65536,
        max_line_size=100,
        max_field_size=100,
        max_headers=5,
        response_with_body=False,
        read_until_eof=False,
        auto_decompress=False,
    )
    for head in (
        b"HTTP/1.1 103 Early Hints\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Odd: \xff\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 10\r\nConnection: close\r\n\r\n",
    ):
        messages, upgraded, tail = parser.feed_data(head)
        assert (len(messages), upgraded, tail) == (1, False, b"")
        message = messages[0][0]
        assert message.code == int(head[9:12])
        assert message.version == (1, 1)
        assert message.should_close == (b"close" in head)
    assert message.raw_headers == ((b"Content-Length", b"10"), (b"Connection", b"close"))
    assert message.reason == "Not Found"


async def test_a_response_parser_refuses_with_its_own_exception() -> None:
    loop = asyncio.get_running_loop()
    parser = HttpResponseParser(ResponseHandler(loop), loop, 65536, response_with_body=False)
    with pytest.raises(HttpProcessingError):
        parser.feed_data(b"junk\r\n\r\n")


def test_a_message_gives_the_parts_of_a_request() -> None:
    for name in ("method", "path", "version", "raw_headers", "headers", "should_close", "chunked"):
        assert hasattr(RawRequestMessage, name), name
