"""A client connection: it receives requests, one after the other, and notices when the client leaves.

A client that closes its sending side (FIN) during a response counts as gone. nginx does the same, and so does HAProxy
with `abortonclose`. The alternative would be to wait until a write fails, and meanwhile the model would generate tokens
that nobody reads.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import RequestError
from ..wire import headers
from .body import RequestBody
from .hangups import Watch
from .heads import RequestHead, RequestHeads
from .reads import BoundedReads

if TYPE_CHECKING:
    from .server import DownstreamServer

log = logging.getLogger(__name__)

# Seconds, as nginx's keepalive_timeout.
KEEPALIVE = 75.0
# Bytes of a response that may wait for the client. Above that, reading from the upstream is paused. Together with one
# more read, and everything else that an exchange holds, this is less than 128 KiB (measured by bench/memory.py).
WRITE_BUFFER = 32 * 1024
# Requests that a client may send before it has received the responses to earlier ones.
MAX_PIPELINED = 4
# Seconds that a close waits until the client has read the last bytes, or has stopped sending. As nginx (lingering_time)
# and Apache httpd (MAX_SECS_TO_LINGER).
LINGER = 30.0
# Seconds without a byte from the client after which it has stopped sending (Apache httpd's SECONDS_TO_LINGER).
SILENCE = 2.0

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_NO_FIELDS = headers.Fields(())
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def address_of(transport: asyncio.BaseTransport) -> str:
    """The address of the peer of `transport`, without its port; empty if it has none."""
    peer = transport.get_extra_info("peername")
    return headers.plain_address(str(peer[0])) if isinstance(peer, tuple) else ""


class FlowControlled(Protocol):
    """A writer to the client. It is paused while the client's write buffer is full."""

    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


def new_request_id() -> bytes:
    """An id for a request whose client has none for it."""
    return b"%016x" % random.getrandbits(64)


class Request:
    """A request on a `connection`: the parsed head, and the `body` that is being received."""

    __slots__ = (
        "body",
        "connection",
        "continued",
        "fields",
        "framing",
        "head_size",
        "id",
        "keep_alive",
        "method",
        "problem",
        "target",
        "version",
    )

    def __init__(self, connection: DownstreamProtocol, head: RequestHead, body: RequestBody) -> None:
        self.connection = connection
        self.method = head.method
        self.target = head.target
        self.version = head.version
        self.fields = head.fields
        self.framing = head.framing
        self.head_size = head.size
        self.keep_alive = head.keep_alive and head.problem is None and head.method != "CONNECT"
        self.problem = head.problem
        self.body = body
        self.id = headers.request_id(head.fields) or new_request_id()
        """The client's id of the request, or one that was made for it."""
        self.continued = False
        """Whether the client was told to continue (RFC 9110, section 10.1.1)."""

    def send_continue(self) -> None:
        """Sends `100 Continue`, once, to a client that expects it before its body."""
        transport = self.connection.transport
        if (
            self.fields.named(b"expect")
            and self.version == (1, 1)
            and not (self.body.ended or self.continued)
            and transport is not None
        ):
            self.continued = True
            transport.write(_CONTINUE)

    def send_interim(self, status: int, head: bytes) -> None:
        """Sends `head`, that of an interim response, unless the client expects none."""
        transport = self.connection.transport
        # A client of HTTP/1.0 knows none, and one that was told to continue waits for no other 100.
        if self.version == (1, 0) or (status == 100 and self.continued):
            return
        if transport is not None and not transport.is_closing():
            self.continued = self.continued or status == 100
            transport.write(head)

    def answered(self) -> None:
        """Drops the header fields. They are not needed after the response head, and a stream may take long."""
        self.fields = _NO_FIELDS


class DownstreamProtocol(asyncio.Protocol):
    """One client connection. `on_gone` is called once, when the client leaves while its request is being answered."""

    __slots__ = (
        "_body",
        "_busy",
        "_discards",
        "_drained",
        "_ends",
        "_fd",
        "_head_timer",
        "_heads",
        "_idle_timer",
        "_reads",
        "_requests",
        "_server",
        "_surplus",
        "_task",
        "_unread",
        "_waiter",
        "_watch",
        "address",
        "free_at",
        "gone_at",
        "is_tls",
        "loop",
        "on_gone",
        "pump",
        "read_at",
        "refused",
        "transport",
        "writing_paused",
    )

    def __init__(self, server: DownstreamServer, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self.is_tls = False
        self._fd = -1
        self._task: asyncio.Task[None] | None = None
        self.refused: RequestError | None = None
        """The error for every request on this connection, if it is above a limit."""
        self._heads = RequestHeads(loop, server.parsed_for, server.limits)
        # The body that is being received.
        self._body: RequestBody | None = None
        # Requests that wait to be answered. The last one may be the error of a request that could not be parsed.
        self._requests: list[Request | RequestError] = []
        # `_ends`: no request is read after the current one. `_surplus`: bytes have arrived after that request, or may
        # be about to arrive.
        self._ends = False
        self._surplus = False
        # Bytes that were read and not parsed yet, because `MAX_PIPELINED` requests are waiting.
        self._unread = b""
        self._reads: BoundedReads | None = None
        self._watch: Watch | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._busy = False
        self._discards = False
        self.writing_paused = False
        self.read_at = 0.0
        """When bytes were last read from the client."""
        self.address = ""
        """The client's address, without its port. Empty if it has none, on a Unix socket."""
        self.free_at = 0.0
        """When the previous exchange ended, or when the connection was accepted."""
        self.gone_at: float | None = None
        """When the client left, if that was during an exchange."""
        self.on_gone: Callable[[], None] | None = None
        self.pump: FlowControlled | None = None

    # --- the connection's life ---

    def connection_made(self, made: asyncio.BaseTransport) -> None:
        transport = self.transport = cast(asyncio.Transport, made)
        try:
            self._begin(transport)
        except BaseException:
            # uvloop would leave the connection open.
            self._broke()
            raise

    def _broke(self) -> None:
        """Ends the connection and its requests after an internal error."""
        if self.transport is not None:
            self.transport.abort()
            self.connection_lost(None)

    def _begin(self, transport: asyncio.Transport) -> None:
        self.is_tls = transport.get_extra_info("sslcontext") is not None
        sock = transport.get_extra_info("socket")
        self._fd = sock.fileno()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.address = address_of(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._reads = BoundedReads(self)
        transport.set_protocol(self._reads)
        self.free_at = perf_counter()
        self.refused = self._server.made(self)
        self._task = self.loop.create_task(self._serve())
        self._idle_timer = self.loop.call_later(KEEPALIVE, self._close_if_unused)
        if self._unread:
            # With TLS, bytes may arrive before `connection_made`.
            self._advance()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.transport is None:
            # It has been called already, or the connection ended before `connection_made`.
            return
        self.transport = self._reads = None
        # A cancelled task refers to its frames, and they refer to this object: this breaks the cycle.
        task, self._task = self._task, None
        # All of these run, the last one first, even if another one raises.
        with ExitStack() as ends:
            ends.callback(self._server.lost, self, task)
            if task is not None:
                ends.callback(task.cancel)
            if self._body is not None:
                ends.callback(self._body.close)
            if self._drained is not None and not self._drained.done():
                ends.callback(self._drained.set_exception, ConnectionResetError("the client is gone"))
            if self._busy:
                ends.callback(self._gone)
            if self._watch is not None:
                ends.callback(self._server.hangups.remove, self._watch)
            ends.callback(self._stop_timers)

    def _stop_timers(self) -> None:
        self._stop_head_timer()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _gone(self) -> None:
        if self.gone_at is None:
            self.gone_at = perf_counter()
        if self.on_gone is not None:
            self.on_gone()
        if self.transport is not None:
            self.transport.abort()

    def eof_received(self) -> None:
        """The client has closed its sending side. Returning None makes the transport close the connection."""
        if self._busy:
            self._gone()

    async def _serve(self) -> None:
        """Answers one request after the other, as long as the connection stays open."""
        try:
            while self.transport is not None:
                request = await self._next()
                try:
                    stays = await self._answer(request)
                except ConnectionError:
                    break
                if not stays:
                    break
            if self.transport is not None and self._has_unread_input():
                await self._discard()
        finally:
            if self.transport is not None:
                self.transport.close()

    async def _next(self) -> Request | RequestError:
        if not self._requests:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        request = self._requests.pop(0)
        if self._unread:
            self._advance()
        return request

    async def _answer(self, request: Request | RequestError) -> bool:
        """Answers `request`. Returns whether the connection stays open. Raises `ConnectionError` if the client left."""
        self._busy = True
        self._server.requests_count += 1
        try:
            if isinstance(request, RequestError):
                answer = self._server.malformed(request)
            else:
                try:
                    answer = await self._server.handle(request)
                except Exception:
                    # A part of a response may have been sent already, so no error response is possible.
                    log.exception("an exchange failed outside its own error handling")
                    self.cut(flush=False)
                    return False
                finally:
                    request.body.close()
            if answer.head and self.transport is not None:
                head_only = isinstance(request, Request) and request.method == "HEAD"
                self.transport.write(answer.head if head_only else answer.head + answer.body)
                try:
                    async with asyncio.timeout(LINGER):
                        await self.flushed()
                except TimeoutError:
                    self.cut(flush=False)
            return answer.keep_alive
        finally:
            self._busy = False

    def _has_unread_input(self) -> bool:
        """Whether the client has sent bytes, or is about to send some, that will not be read as a request."""
        return self._surplus or bool(self._unread) or bool(self._heads.size) or self._body is not None

    async def _discard(self) -> None:
        """Closes the sending side, and discards what the client still sends, until it closes or stops sending.

        To close a socket with unread bytes would reset the connection, and the client could lose the response (RFC
        9112, section 9.6).
        """
        self._stop_timers()
        self._requests.clear()
        self._discards, self._unread, self._body = True, b"", None
        self._resume_reading()
        transport = self.transport
        if transport is not None and transport.can_write_eof() and not transport.is_closing():
            transport.write_eof()
        now = began = perf_counter()
        # `connection_lost` cancels this task.
        while (end := min(max(self.read_at, began) + SILENCE, began + LINGER)) > now:
            await asyncio.sleep(end - now)
            now = perf_counter()

    # --- reading ---

    def data_received(self, data: bytes) -> None:
        self.read_at = perf_counter()
        if self._discards:
            return
        self._unread = self._unread + data if self._unread else data
        if self.transport is not None:
            try:
                self._advance()
            except BaseException:
                # With TLS, uvloop would go on reading, and the next bytes would be parsed as if none were missing.
                self._broke()
                raise

    def _advance(self) -> None:
        """Parses heads and bodies from the received bytes, as far as there is room for them."""
        data, self._unread = self._unread, b""
        at, end = 0, len(data)
        while at < end:
            if self._body is not None:
                at = self._read_body(self._body, data, at)
            elif self._ends:
                # Bytes after the last request are ignored.
                self._surplus = True
                break
            elif len(self._requests) >= MAX_PIPELINED:
                self._unread = data[at:]
                break
            else:
                at = self._read_head(data, at)
        if self._unread or (self._body is not None and self._body.full):
            self._pause_reading()
        else:
            self._resume_reading()

    def _read_body(self, body: RequestBody, data: bytes, at: int) -> int:
        excess = body.feed(data[at:] if at else data)
        if body.broken:
            self.read_no_more()
            self._body = None
            return len(data)
        if body.ended:
            self._body = None
        return len(data) - excess

    def _read_head(self, data: bytes, at: int) -> int:
        try:
            head, at = self._heads.feed(data, at)
        except RequestError as error:
            self._refuse(error)
            return len(data)
        if head is None:
            if self._heads.begun and self._head_timer is None:
                self._head_timer = self.loop.call_later(
                    self._server.limits.request_head_time, self._refuse, RequestError("head_timeout")
                )
            return at
        self._stop_head_timer()
        body = RequestBody(head.framing, self._server.limits, self._more)
        request = Request(self, head, body)
        if not body.ended:
            self._body = body
        self._ends = not request.keep_alive
        # After an invalid head, other parsers might expect a body.
        self._surplus = head.problem is not None
        self._enqueue(request)
        return at

    def _enqueue(self, request: Request | RequestError) -> None:
        self._requests.append(request)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _refuse(self, error: RequestError) -> None:
        """Answers invalid input with `error`, after the requests that are waiting, and reads no more requests."""
        self._stop_head_timer()
        self.read_no_more()
        self._enqueue(error)

    def read_no_more(self) -> None:
        """Reads no request after the current one. Further bytes are discarded."""
        self._ends = self._surplus = True

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _more(self) -> None:
        """Called when the body that is being received has room again."""
        if not self._unread:
            self._resume_reading()

    def _pause_reading(self) -> None:
        if self._reads is not None and not self._reads.paused:
            self._reads.pause()
            self._watch = self._server.hangups.add(self._fd, self._gone)

    def _resume_reading(self) -> None:
        if self._reads is not None and self._reads.paused:
            watch, self._watch = self._watch, None
            if watch is not None:
                self._server.hangups.remove(watch)
            self._reads.resume()

    # --- connections without a request ---

    def _close_if_unused(self) -> None:
        self._idle_timer = None
        unused = self._unused_for()
        if unused is not None and unused >= KEEPALIVE:
            self._close()
        else:
            self._idle_timer = self.loop.call_later(KEEPALIVE - (unused or 0.0), self._close_if_unused)

    def _unused_for(self) -> float | None:
        """Seconds since the connection was last in use. None if it is in use: by a request or a part of a head."""
        if self._busy or self._requests or self._heads.begun or self._discards:
            return None
        # Empty lines before a request are no part of a head, so they do not keep the connection open.
        return perf_counter() - self.free_at

    def close_if_idle(self, seconds: float) -> None:
        """Closes the connection if it has not been in use for so many `seconds`."""
        unused = self._unused_for()
        if unused is not None and unused >= seconds:
            self._close()

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def end(self) -> None:
        """Ends the connection and its request now. This does not count as the client leaving."""
        if self._task is not None:
            self._task.cancel()
            self._task.add_done_callback(self._abort)

    def _abort(self, _: object = None) -> None:
        if self.transport is not None:
            self.transport.abort()

    # --- writing ---

    def pause_writing(self) -> None:
        self.writing_paused = True
        if self.pump is not None:
            self.pump.pause_writing()

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self.pump is not None:
            self.pump.resume_writing()

    async def flushed(self) -> None:
        """Waits until the kernel has accepted every byte. Raises `ConnectionError` if the client has left."""
        transport = self.transport
        if transport is None or not transport.get_write_buffer_size():
            return
        transport.set_write_buffer_limits(high=0)
        if self.writing_paused:
            self._drained = self.loop.create_future()
            try:
                await self._drained
            finally:
                self._drained = None
        transport.set_write_buffer_limits(high=WRITE_BUFFER)

    def stall_detector(self) -> Callable[[], bool]:
        """A function that returns whether the client has read nothing since the last call."""
        transport = self.transport
        assert transport is not None
        waiting = transport.get_write_buffer_size()

        def stalled() -> bool:
            nonlocal waiting
            before, waiting = waiting, transport.get_write_buffer_size()
            return waiting >= before

        return stalled

    def cut(self, *, flush: bool) -> None:
        """Ends the connection so that the client notices that the response is not complete.

        With `flush`, bytes in the buffer are still delivered; the response's framing shows that its end is missing. If
        the framing cannot show it, use `flush=False`, which resets the connection.
        """
        transport = self.transport
        if transport is None:
            return
        if flush:
            transport.close()
            if transport.get_write_buffer_size():
                self.loop.call_later(LINGER, transport.abort)
        else:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            transport.abort()
