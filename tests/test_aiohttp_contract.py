"""Every part of aiohttp that the relay leans on and that aiohttp does not promise. One that moves fails here, by name.

The relay's own tests would fail as well, but not say why.
"""

from __future__ import annotations

import asyncio
import inspect
from functools import partial

import aiohttp
import pytest
from aiohttp import ClientTimeout, TCPConnector, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy, HttpResponseParser
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from aiohttp.web_request import BaseRequest
from aiohttp.web_server import Server

from .harness import RunningProxy, ScriptedUpstream, post


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
        (BaseProtocol, "_pause_transport_reading", ["self"]),
        (BaseProtocol, "_resume_transport_reading", ["self"]),
        (BaseProtocol, "_drain_helper", ["self"]),
        (BaseProtocol, "pause_writing", ["self"]),
        (BaseProtocol, "resume_writing", ["self"]),
        (ResponseHandler, "data_received", ["self", "data"]),
        (ResponseHandler, "connection_lost", ["self", "exc"]),
        (ResponseHandler, "abort", ["self"]),
        (RequestHandler, "data_received", ["self", "data"]),
        (RequestHandler, "eof_received", ["self"]),
        (RequestHandler, "connection_lost", ["self", "exc"]),
        (RequestHandler, "force_close", ["self"]),
        (RequestHandler, "handle_error", ["self", "request", "status", "exc", "message"]),
        (Server, "__call__", ["self"]),
        (Connection, "release", ["self"]),
        (Connection, "close", ["self"]),
        (web.StreamResponse, "prepare", ["self", "request"]),
        (web.StreamResponse, "write_eof", ["self", "data"]),
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

    async def handler(request: BaseRequest) -> web.StreamResponse:
        raise NotImplementedError

    server = RequestHandler(Server(handler, handler_cancellation=True), loop=loop)
    for name in ("_current_request", "_waiter", "_loop", "peername", "ssl_context"):
        assert hasattr(server, name), name
    assert hasattr(web.StreamResponse(), "_keep_alive")


async def test_a_connector_makes_its_protocols_with_its_factory_and_keeps_them_in_its_pool() -> None:
    connector = TCPConnector(limit=0)
    assert isinstance(connector._factory, partial)
    assert connector._factory.func is ResponseHandler
    assert not connector._conns
    assert not connector._acquired
    assert parameters(connector.connect) == ["req", "traces", "timeout"]
    await connector.close()


async def test_a_connector_asks_no_more_of_a_request_than_a_target_has(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    api = proxy.worker.proxy.upstreams["up"]
    connection = await api._connector.connect(api._target, [], ClientTimeout())
    await upstream.accept()
    assert type(connection.protocol).__name__ == "RelayProtocol"
    assert api.connections() == (1, 0)
    connection.release()
    assert api.connections() == (0, 1)
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


async def test_a_request_is_current_while_its_handler_runs_and_the_handler_is_cancelled(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(post())
    await upstream.accept()
    (connection,) = proxy.worker.proxy.server.connections
    assert connection._current_request is not None
    assert issubclass(RequestPayloadError, Exception)
    client.reset()
    await proxy.idle()
    assert connection._current_request is None


def test_a_request_gives_its_raw_parts() -> None:
    for name in ("raw_headers", "raw_path", "content", "protocol", "keep_alive", "version", "body_exists"):
        assert hasattr(BaseRequest, name), name
