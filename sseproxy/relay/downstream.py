"""The client's side: aiohttp's server protocol, taught to notice at once that a client leaves.

A client that ends its sending side (FIN) while its request is answered has left: so nginx sees it, and HAProxy if
asked to (abortonclose), and so do we, because waiting for the next write to fail keeps a model generating for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError, _ErrInfo
from aiohttp.web_server import Server

from ..errors import BrokenBodyError, ExchangeError, InternalError, ParserError, RequestError
from ..wire import headers
from ..wire.framing import ChunkedDecoder
from .reads import BoundedReads

if TYPE_CHECKING:
    from ..config import Limits

log = logging.getLogger(__name__)

# nginx's keepalive_timeout.
KEEPALIVE = 75.0
# Bytes of an upload that wait for the upstream; aiohttp pauses at twice this.
READ_BUFFER = 16 * 1024
# Bytes of a response that wait for the client before the upstream is paused. With the read that may follow, and all
# else that an exchange holds, that is measured to be less than 128 KiB (bench/memory.py).
WRITE_BUFFER = 32 * 1024
# Connections above their limit that are still told so; more are closed without a word.
_TOLD = 500
# Requests that a client may send ahead of their responses.
MAX_PIPELINED = 4
# A close that waits for a client, to take the last bytes or to stop sending, waits so long at most: as nginx
# (lingering_time) and Apache httpd (MAX_SECS_TO_LINGER).
LINGER = 30.0
# One that has sent nothing for so long has stopped (Apache httpd's SECONDS_TO_LINGER).
SILENCE = 2.0

_BLANK_LINE = b"\r\n\r\n"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def check_parser() -> None:
    """Raises `ParserError` if aiohttp has no other parser than the one in Python, which is lax, and slow."""
    if HttpRequestParser is HttpRequestParserPy:
        raise ParserError


class FlowControlled(Protocol):
    """Writes into a downstream and is told when to stop."""

    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class HangupWatch:
    """Sees that a peer hung up while nothing is read from its socket.

    An event loop learns of a FIN by reading. Where reading is paused, an epoll set of its own, which waits for
    nothing but hang-ups, tells it (epoll_ctl(2), EPOLLRDHUP).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        loop.add_reader(self._epoll.fileno(), self._ready)

    def add(self, fd: int, hung_up: Callable[[], None]) -> None:
        if fd not in self._watched:
            self._epoll.register(fd, select.EPOLLRDHUP)
        self._watched[fd] = hung_up

    def remove(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _ready(self) -> None:
        for fd, _ in self._epoll.poll(0):
            hung_up = self._watched.get(fd)
            if hung_up is not None:
                self.remove(fd)
                hung_up()

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._watched.clear()
        self._epoll.close()


_NO_FIELDS = headers.Fields(())
_NO_BODY: deque[bytes] = deque(maxlen=0)


class _Messages(list[Any]):
    """The queue of a connection's requests; nearly always it is empty, and an empty deque takes 700 bytes."""

    __slots__ = ()

    def popleft(self) -> Any:
        return self.pop(0)


class Request:
    """A request: its head, and its `body` as it comes.

    It keeps less of the head than aiohttp's messages do, for as long as a response takes.
    """

    __slots__ = (
        "body",
        "chunked",
        "fields",
        "head_size",
        "keep_alive",
        "length",
        "method",
        "protocol",
        "target",
        "version",
    )

    def __init__(
        self, protocol: DownstreamProtocol, message: RawRequestMessage, body: StreamReader, head_size: int
    ) -> None:
        self.protocol = protocol
        self.method = message.method
        self.target = message.path
        self.version: tuple[int, int] = message.version
        self.fields = headers.Fields(message.raw_headers)
        self.head_size = head_size
        self.keep_alive = not message.should_close
        self.chunked = message.chunked
        length = message.headers.get("Content-Length")
        self.length = None if length is None else int(length)
        self.body = body

    def answered(self) -> None:
        """Forgets what is needed only until there is a response."""
        self.fields = _NO_FIELDS
        if self.body.is_eof():
            # An empty queue of its own takes 700 bytes.
            self.body._buffer = _NO_BODY

    def _cancel(self, exc: BaseException) -> None:
        """aiohttp's, for a connection that is lost while the request is on it."""
        self.body.set_exception(exc)


class DownstreamProtocol(RequestHandler):
    """One client connection. `on_leave` is called, once, the moment the client is seen gone while it is `busy`."""

    __slots__ = (
        "_body_left",
        "_chunks",
        "_fd",
        "_head_timer",
        "_incoming",
        "_last_request",
        "_limits",
        "_server",
        "_surplus",
        "_tail",
        "_unparsed",
        "_unread",
        "address",
        "free_at",
        "left_at",
        "on_leave",
        "pump",
        "read_at",
        "refused",
    )

    def __init__(self, server: DownstreamServer, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=KEEPALIVE,
            read_bufsize=READ_BUFFER,
            access_log=cast(logging.Logger, None),
        )
        self._max_msg_queue_size, self._msg_queue_resume_size = MAX_PIPELINED, MAX_PIPELINED // 2
        self._messages = cast("deque[Any]", _Messages())
        self._limits = server.limits
        self._parser = self._new_parser()
        self._server = server
        self._fd = -1
        self.refused: RequestError | None = None
        """Why no request of this connection is taken, if none is."""
        self._head_timer: asyncio.TimerHandle | None = None
        # The body of the request that was read last, and whether it is the last one of the connection.
        self._incoming: StreamReader = EMPTY_PAYLOAD
        self._last_request = False
        # Whether bytes came, or are to be expected, after that.
        self._surplus = False
        # Of the body that is being received: where its chunks end, or how much of its length is to come.
        self._chunks: ChunkedDecoder | None = None
        self._body_left = 0
        # Of a head, how much has come; the last bytes that were parsed.
        self._unparsed = 0
        self._tail = b""
        # What waits for a place in the queue, or in the body's buffer.
        self._unread = b""
        self.read_at = 0.0
        """When bytes were last read from the client."""
        self.address = ""
        """The client's, without its port; empty if it has none."""
        self.free_at = 0.0
        """When the exchange before this one ended, or the connection began."""
        self.left_at: float | None = None
        """When the client was seen gone, if it left during an exchange."""
        self.on_leave: Callable[[], None] | None = None
        self.pump: FlowControlled | None = None

    def _new_parser(self) -> HttpRequestParser:
        return HttpRequestParser(
            self,
            self._loop,
            READ_BUFFER,
            max_line_size=self._limits.request_head,
            max_headers=self._limits.request_fields,
            max_field_size=self._limits.request_head,
            payload_exception=RequestPayloadError,
            auto_decompress=False,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._fd = transport.get_extra_info("socket").fileno()
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            # A socket for both tells an IPv4 client as ::ffff:192.0.2.1.
            self.address = str(peer[0]).removeprefix("::ffff:")
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=WRITE_BUFFER)
        self.free_at = perf_counter()
        super().connection_made(transport)
        transport.set_protocol(BoundedReads(self))
        self.refused = self._server.admit(self)

    async def start(self) -> None:
        """Answers one request after the other, for as long as the connection may stay.

        In place of aiohttp's, which makes a task, and a writer that nobody needs, for each.
        """
        while not self._force_close:
            if not self._messages:
                self._waiter = self._loop.create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            message = cast("Request | _ErrInfo", self._messages.popleft()[0])
            assert self._parser is not None
            self._parser.message_consumed()
            if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
                self._resume_reading_if_drained()
            self._server.requests_count += 1
            try:
                self._keepalive = await self._answer(message)
            except ConnectionError:
                break
            except BaseException:
                self.force_close()
                raise
            if not self._keepalive or self._close:
                break
            self._next_keepalive_close_time = self._loop.time() + KEEPALIVE
            if self._keepalive_handle is None:
                self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        if not self._force_close and self._more_may_come():
            await self._discard()
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    async def _answer(self, message: Request | _ErrInfo) -> bool:
        """Has `message` answered; returns whether the connection may stay. Raises ConnectionError if it is gone."""
        self._request_in_progress = True
        try:
            if isinstance(message, _ErrInfo):
                answer = self._malformed(message)
            else:
                self._current_request = cast(web.BaseRequest, message)
                try:
                    answer = await self._server.handle(message)
                except Exception:
                    log.exception("an exchange failed outside its own error handling")
                    answer = Answer.of(InternalError())
                finally:
                    self._current_request = None
            if answer.head and self.transport is not None:
                head_only = isinstance(message, Request) and message.method == "HEAD"
                self.transport.write(answer.head if head_only else answer.head + answer.body)
                try:
                    async with asyncio.timeout(LINGER):
                        await self.flushed()
                except TimeoutError:
                    self.cut(flush=False)
            return answer.keep_alive
        finally:
            self._request_in_progress = False
            if self._handler_waiter is not None:
                self._handler_waiter.set_result(None)

    def _more_may_come(self) -> bool:
        """Whether the client has sent, or is about to send, what is not read."""
        unread = self._unparsed or self._unread or self._buffer_paused
        return bool(unread) or self._surplus or not self._incoming.is_eof()

    async def _discard(self) -> None:
        """Tells the client that nothing more comes, and reads what it still sends, until it closes or is silent.

        A close with bytes unread would be a reset, which can overtake the answer (RFC 9112, section 9.6).
        """
        self._stop_head_timer()
        self._messages.clear()
        self._incoming, self._last_request, self._unread = EMPTY_PAYLOAD, True, b""
        self._resume_transport_reading()
        transport = self.transport
        if transport is not None and transport.can_write_eof() and not transport.is_closing():
            transport.write_eof()
        now = began = perf_counter()
        # The end of the connection ends this task.
        while (end := min(max(self.read_at, began) + SILENCE, began + LINGER)) > now:
            await asyncio.sleep(end - now)
            now = perf_counter()

    def _malformed(self, message: _ErrInfo) -> Answer:
        """Answers what is not HTTP/1.1, without a byte of it."""
        error = message.exc
        if not isinstance(error, RequestError):
            error = RequestError("head_too_large" if isinstance(error, LineTooLong) else "bad_request")
        self._server.malformed(error)
        return Answer.of(error)

    def data_received(self, data: bytes) -> None:
        """Parses heads and bodies one after the other: in one call, a broken head would cost the request before it."""
        if self._close or self._force_close:
            return
        self.read_at = perf_counter()
        if not data:
            # The parser goes on with what it has kept.
            self._parse(b"")
        data, self._unread = self._unread + data, b""
        start = 0
        while start < len(data):
            if self._last_request and self._incoming.is_eof():
                # What follows a request that closes the connection is nobody's.
                self._surplus = True
                return
            if self._reading_paused or len(self._messages) >= MAX_PIPELINED:
                self._unread = data[start:]
                return
            end = self._end_of_part(data, start)
            self._parse(data[start:end])
            start = end

    def _end_of_part(self, data: bytes, start: int) -> int:
        """Where in `data` the head, or the body, may end that is being read at `start`."""
        if not self._incoming.is_eof():
            if self._chunks is None:
                return min(start + self._body_left, len(data))
            if self._chunks.done:
                return len(data)
            try:
                self._chunks.feed(data[start:])
            except BrokenBodyError:
                # The parser, too, will say so.
                return len(data)
            return len(data) - self._chunks.excess
        # So end heads; perhaps it had begun before.
        end = (self._tail + data[start : start + len(_BLANK_LINE) - 1]).find(_BLANK_LINE)
        if end >= 0:
            return start + end + len(_BLANK_LINE) - len(self._tail)
        end = data.find(_BLANK_LINE, start)
        return end + len(_BLANK_LINE) if end >= 0 else len(data)

    def _parse(self, data: bytes) -> None:
        received, in_body = self._request_count, not self._incoming.is_eof()
        self._body_left = max(0, self._body_left - len(data))
        self._tail = (self._tail + data[-len(_BLANK_LINE) :])[-len(_BLANK_LINE) + 1 :]
        assert self._parser is not None
        super().data_received(data)
        if self._upgraded:
            # Nothing is upgraded here: the next bytes are the next request.
            self._parser.set_upgraded(False)
            self._upgraded = False
        if self._request_count != received:
            message, incoming = self._messages[-1]
            if isinstance(message, _ErrInfo):
                self._break_off()
            else:
                request = Request(self, message, incoming, self._unparsed + len(data))
                self._messages[-1] = (cast(RawRequestMessage, request), incoming)
                self._last_request = not request.keep_alive or request.method == "CONNECT"
                self._body_left = request.length or 0
                self._chunks = ChunkedDecoder() if request.chunked else None
            self._incoming = incoming
            self._tail = b""
        elif not in_body:
            self._unparsed += len(data)
            if self._unparsed > self._limits.request_head:
                self._refuse_head("head_too_large")
            elif data.strip(b"\r\n") and self._head_timer is None:
                # aiohttp bounds the size of each line, and no time.
                self._head_timer = self._loop.call_later(
                    self._limits.request_head_time, self._refuse_head, "head_timeout"
                )
            return
        elif self._chunks is not None and self._incoming.is_eof():
            # aiohttp's parser would take the last trailer for a field of the next request.
            self._parser = self._new_parser()
            self._tail = b""
        self._unparsed = 0
        self._stop_head_timer()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _break_off(self) -> None:
        """What was read cannot be parsed. A body that it was part of fails: aiohttp's parser only forgets it."""
        self.read_no_more()
        if not self._incoming.is_eof():
            self._incoming.set_exception(RequestPayloadError("the request body is broken"))

    def read_no_more(self) -> None:
        """No request after this one is read, whatever comes."""
        self._last_request = self._surplus = True

    def _refuse_head(self, reason: str) -> None:
        self._stop_head_timer()
        error = RequestError(reason)
        self._messages.append((_ErrInfo(status=error.status, exc=error, message=""), EMPTY_PAYLOAD))
        # What waits before it is still answered.
        self.read_no_more()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def eof_received(self) -> None:
        if self._current_request is not None:
            self._leave()

    def _process_keepalive(self) -> None:
        if self._head_timer is None:
            super()._process_keepalive()
        else:
            # A head that has begun has a time of its own.
            self._keepalive_handle = None

    def close_if_idle(self, seconds: float) -> None:
        """Closes the connection if no request is on it, nor a part of a head, and none has been for so long."""
        fresh = self._request_count == 0 and self._waiter is None
        idle = fresh or (self._waiter is not None and not self._waiter.done())
        if idle and self._head_timer is None and perf_counter() - max(self.free_at, self.read_at) >= seconds:
            self.force_close()

    def _leave(self) -> None:
        if self.left_at is None:
            self.left_at = perf_counter()
        if self.on_leave is not None:
            self.on_leave()
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_head_timer()
        self._server.hangups.remove(self._fd)
        if self._current_request is not None:
            self._leave()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.pump is not None:
            self.pump.pause_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.pump is not None:
            self.pump.resume_writing()

    def resume_reading(self, resume_parser: bool = True) -> None:
        # aiohttp calls this for each read of a body, and its end, whether reading was paused or not.
        if self._reading_paused or self._unread:
            super().resume_reading(resume_parser)

    def _pause_transport_reading(self) -> None:
        super()._pause_transport_reading()
        if self.transport is not None:
            self._server.hangups.add(self._fd, self._leave)

    def _resume_transport_reading(self) -> None:
        self._server.hangups.remove(self._fd)
        super()._resume_transport_reading()

    async def flushed(self) -> None:
        """Waits until the client's kernel, or ours, has taken every byte. Raises ConnectionError if it is gone."""
        transport = self.transport
        if transport is not None and transport.get_write_buffer_size():
            transport.set_write_buffer_limits(high=0)
            await self._drain_helper()
            transport.set_write_buffer_limits(high=WRITE_BUFFER)

    def stall_detector(self) -> Callable[[], bool]:
        """A function that tells whether the client has taken nothing since it was last asked."""
        transport = self.transport
        assert transport is not None
        waiting = transport.get_write_buffer_size()

        def stalled() -> bool:
            nonlocal waiting
            before, waiting = waiting, transport.get_write_buffer_size()
            return waiting >= before

        return stalled

    def cut(self, *, flush: bool) -> None:
        """Ends the connection so that the client cannot take what it has for the whole response.

        With `flush` the bytes on their way are still delivered: the framing that the head announced shows that the end
        is missing. Without, only a reset can tell.
        """
        transport = self.transport
        if transport is None:
            return
        if flush:
            transport.close()
            if transport.get_write_buffer_size():
                self._loop.call_later(LINGER, transport.abort)
        else:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            transport.abort()


class Answer(NamedTuple):
    """What is left to do for a request: to send an error made here, or nothing where the response was already sent.

    It is bytes, because a proxy invents no Server, Date or Content-Type for others.
    """

    keep_alive: bool
    head: bytes = b""
    body: bytes = b""

    @staticmethod
    def of(error: ExchangeError, *, keep_alive: bool = False, extra: Sequence[headers.Field] = ()) -> Answer:
        body = error.body()
        fields = [
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"%d" % len(body)),
            *extra,
            *(() if keep_alive else ((b"Connection", b"close"),)),
        ]
        return Answer(keep_alive, headers.serialize(status_line(error.status), fields), body)


_REASONS = {
    400: b"Bad Request",
    404: b"Not Found",
    408: b"Request Timeout",
    413: b"Content Too Large",
    417: b"Expectation Failed",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    508: b"Loop Detected",
}


def status_line(status: int, reason: bytes | None = None) -> bytes:
    return b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b"") if reason is None else reason)


class DownstreamServer(Server):
    """aiohttp's low-level server with our protocol, and the count of its connections.

    `handle` answers a request. `malformed` is told of those that never became exchanges.
    """

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[Answer]],
        malformed: Callable[[RequestError], None],
        limits: Limits,
    ) -> None:
        super().__init__(cast(Any, handle), handler_cancellation=True)
        self.handle = handle
        self.malformed = malformed
        self.limits = limits
        self._clients: Counter[str] = Counter()
        self.hangups = HangupWatch(self._loop)
        self.empty = asyncio.Event()
        """Set while there is no connection, nor an exchange that has still to end after one."""
        self.empty.set()

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self.empty.clear()
        assert isinstance(handler, DownstreamProtocol)
        self._clients[handler.address] += 1

    def admit(self, connection: DownstreamProtocol) -> RequestError | None:
        """Why no request of a new `connection` may be taken, or None. Far above the limit it is closed at once."""
        above = len(self._connections) - self.limits.connections
        if above > _TOLD:
            connection.force_close()
        if above > 0:
            return RequestError("connections")
        most = self.limits.connections_per_client
        if most is not None and self._clients[connection.address] > most:
            return RequestError("connections_per_client")
        return None

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        assert isinstance(handler, DownstreamProtocol)
        address = handler.address
        self._clients[address] -= 1
        if not self._clients[address]:
            del self._clients[address]
        task = handler._task_handler
        super().connection_lost(handler, exc)
        if task is None:
            self._forgot()
        else:
            # The base class forgets a connection when its task has ended.
            task.add_done_callback(self._forgot)

    def _forgot(self, _: object = None) -> None:
        if not self._connections:
            self.empty.set()

    def close_idle_for(self, seconds: float) -> None:
        """Closes the connections that have been without a request for so long."""
        for connection in self.connections:
            assert isinstance(connection, DownstreamProtocol)
            connection.close_if_idle(seconds)

    def __call__(self) -> DownstreamProtocol:
        return DownstreamProtocol(self, self._loop)
