"""Every part of aiohttp that the relay leans on and that aiohttp does not promise. One that moves fails here, by name.

The relay's own tests would fail as well, but not say why.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections import deque
from functools import partial

import aiohttp
import pytest
from aiohttp import ClientTimeout, TCPConnector, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError, LineTooLong
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy, HttpResponseParser, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import ERROR, RequestHandler, RequestPayloadError, _ErrInfo
from aiohttp.web_request import BaseRequest
from aiohttp.web_server import Server

from sseproxy.relay.downstream import Request

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
        (BaseProtocol, "resume_reading", ["self", "resume_parser"]),
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
        (RequestHandler, "start", ["self"]),
        (RequestHandler, "close", ["self"]),
        (RequestHandler, "_process_keepalive", ["self"]),
        (RequestHandler, "_resume_reading_if_drained", ["self"]),
        (_ErrInfo, "__init__", ["self", "status", "exc", "message"]),
        (HttpRequestParser, "feed_data", ["self", "incoming_data"]),
        (HttpRequestParser, "message_consumed", ["self"]),
        (HttpRequestParser, "set_upgraded", ["self", "val"]),
        (StreamReader, "set_exception", ["self", "exc", "exc_cause"]),
        (StreamReader, "is_eof", ["self"]),
        (StreamReader, "read_nowait", ["self", "n"]),
        (StreamReader, "readany", ["self"]),
        (Server, "__call__", ["self"]),
        (Server, "connection_made", ["self", "handler", "transport"]),
        (Server, "connection_lost", ["self", "handler", "exc"]),
        (Server, "shutdown", ["self", "timeout"]),
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

    async def handler(request: BaseRequest) -> web.StreamResponse:
        raise NotImplementedError

    server = Server(handler, handler_cancellation=True)
    assert server._connections == {}
    assert server.connections == []
    assert server._loop is loop
    connection = RequestHandler(server, loop=loop)
    for name in (
        *("_current_request", "_loop", "_manager", "_parser", "_task_handler", "_waiter", "peername", "ssl_context"),
        *("_max_msg_queue_size", "_msg_queue_resume_size", "_message_tail", "_messages", "_request_count", "_upgraded"),
        *("_buffer_paused", "_close", "_force_close", "_handler_waiter", "_request_in_progress"),
        *("_keepalive", "_keepalive_handle", "_next_keepalive_close_time"),
    ):
        assert hasattr(connection, name), name
    assert connection._request_count == 0
    assert not connection._messages
    assert EMPTY_PAYLOAD.is_eof()
    assert hasattr(server, "requests_count")


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


def request_parser(waiting: int = 0) -> HttpRequestParser:
    """As a `DownstreamProtocol` has one."""

    async def handler(request: BaseRequest) -> web.StreamResponse:
        raise NotImplementedError

    loop = asyncio.get_running_loop()
    return HttpRequestParser(
        RequestHandler(Server(handler), loop=loop),
        loop,
        65536,
        max_line_size=100,
        max_field_size=100,
        payload_exception=RequestPayloadError,
        auto_decompress=False,
        max_msg_queue_size=waiting,
    )


CHUNKED = b"POST / HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
GET = b"GET / HTTP/1.1\r\nHost: p\r\n\r\n"


async def test_a_body_whose_chunk_is_broken_is_dropped_and_never_fails() -> None:
    """If it failed, `DownstreamProtocol` would not have to see to that."""
    parser = request_parser()
    ((_, body),), _, _ = parser.feed_data(CHUNKED)
    assert body.read_nowait() == b"abc"
    with pytest.raises(HttpProcessingError):
        parser.feed_data(b"ZZZ\r\n")
    assert body.exception() is None
    assert not body.is_eof()


async def test_a_line_that_is_too_long_is_told_apart() -> None:
    assert issubclass(LineTooLong, BadHttpMessage)
    for line in (b"GET /%b HTTP/1.1\r\n" % (b"y" * 100), GET[:-2] + b"X: %b\r\n" % (b"y" * 101)):
        with pytest.raises(LineTooLong):
            request_parser().feed_data(line)


async def test_a_request_parser_goes_on_after_an_upgrade_that_is_none() -> None:
    parser = request_parser()
    upgrade = GET[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    messages, upgraded, tail = parser.feed_data(upgrade + GET)
    assert (len(messages), upgraded, tail) == (1, True, GET)
    parser.set_upgraded(False)
    messages, upgraded, tail = parser.feed_data(tail)
    assert (len(messages), upgraded, tail) == (1, False, b"")


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


def test_a_message_gives_the_parts_of_a_request() -> None:
    for name in ("method", "path", "version", "raw_headers", "headers", "should_close", "chunked"):
        assert hasattr(RawRequestMessage, name), name
    assert ERROR.headers.get("Content-Length") is None


def test_what_is_asked_of_a_request_that_is_current_ours_has() -> None:
    asked = set(re.findall(r"\b_current_request\.(\w+)", inspect.getsource(RequestHandler)))
    assert asked == {"_cancel"}
    assert asked <= set(dir(Request))


async def test_what_starts_a_connection_s_task_is_replaced() -> None:
    """`start` is ours. What else of aiohttp's touched requests and responses, nobody calls any more."""
    callers = [
        name
        for name, method in inspect.getmembers(RequestHandler, inspect.isfunction)
        if re.search(r"self\.(_handle_request|finish_response|handle_error)\(", inspect.getsource(method))
    ]
    assert set(callers) <= {"start", "_handle_request", "_make_error_handler"}


async def test_the_body_of_a_request_holds_its_bytes_in_a_queue_of_its_own() -> None:
    body = StreamReader(BaseProtocol(asyncio.get_running_loop()), 1000)
    body.feed_data(b"abc")
    assert [*body._buffer] == [b"abc"]
    body.read_nowait()
    body.feed_eof()
    body._buffer = deque(maxlen=0)
    assert body.is_eof()


async def test_a_request_parser_takes_the_last_trailer_for_a_field_of_the_next_request() -> None:
    """The reason for a new parser after every chunked body. Once this fails, that can go."""
    loop = asyncio.get_running_loop()
    parser = HttpRequestParser(BaseProtocol(loop), loop, 65536)
    head = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    parser.feed_data(head + b"0\r\nX-Trailer: t\r\n\r\n")
    messages, _, _ = parser.feed_data(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert messages[0][0].raw_headers == ((b"X-Trailer", b"t"), (b"Host", b"h"))


async def test_a_request_parser_forgets_what_follows_an_upgrade_that_it_does_not_know() -> None:
    """A reason for feeding it one request at a time. Once this fails, that can go."""
    loop = asyncio.get_running_loop()
    parser = HttpRequestParser(BaseProtocol(loop), loop, 65536)
    following = b"GET /next HTTP/1.1\r\nHost: h\r\n\r\n"
    messages, upgraded, tail = parser.feed_data(
        b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + following
    )
    assert (len(messages), upgraded, tail) == (1, False, b"")


async def test_a_request_parser_loses_the_requests_before_a_broken_one() -> None:
    """Another reason for feeding it one request at a time. Once this fails, that can go."""
    loop = asyncio.get_running_loop()
    parser = HttpRequestParser(BaseProtocol(loop), loop, 65536)
    with pytest.raises(HttpProcessingError):
        parser.feed_data(b"GET / HTTP/1.1\r\nHost: h\r\n\r\njunk\r\n\r\n")
