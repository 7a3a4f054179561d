"""The upstream's side: connections, request heads and bodies out, response heads in.

aiohttp's connector does names, TCP, TLS and the pool, and its parser reads response heads. The bodies are ours: a
`RelayProtocol` hands what follows the head to a `Pump`, straight from the transport, with no task in between.

aiohttp's exceptions and OSError end here; what leaves this module is an `UpstreamError`.
"""

from __future__ import annotations

import asyncio
import functools
import select
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from aiohttp import ClientRequest, ClientTimeout, TCPConnector
from aiohttp.client_exceptions import (
    ClientConnectorCertificateError,
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientConnectorSSLError,
    ClientError,
)
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from ..errors import ProtocolError, RequestError, UpstreamError
from .heads import ResponseHead, ResponseHeads, rule_of
from .reads import BoundedReads, PlainReads

if TYPE_CHECKING:
    from ..config import Limits
    from ..config import Upstream as UpstreamConfig

# Below the 5 s for which uvicorn and Node.js keep an idle connection, so that we are the side that closes.
KEEPALIVE = 4.0
# Models of one upstream of which it is remembered; clients name them.
_MAX_MODELS = 1024
# Body bytes that may wait for their pump, which is attached one turn of the loop after the head was read.
_HELD_LIMIT = 64 * 1024

_NO_TIMEOUT = ClientTimeout()
_NO_QUEUE: deque[Any] = deque(maxlen=0)


class BodySink(Protocol):
    """Takes the bytes that follow a response head."""

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, clean: bool) -> None:
        """No more will come. `clean`: the upstream closed its side in order."""


class RelayProtocol(ResponseHandler):
    """One upstream connection.

    Either idle in the pool, or waiting for a response head (`expect_head`), or feeding a body to its sink
    (`feed_to`). Bytes that come in any other state were not asked for, and end the connection.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, heads: ResponseHeads) -> None:
        super().__init__(loop)
        # The base class's queue, which nobody reads from: one for all.
        self._buffer = _NO_QUEUE
        self._heads = heads
        self._reads = BoundedReads(self)
        self._method = ""
        self.requests = 0
        """How many were sent on it."""
        self.heard = False
        """Whether any byte of an answer to the latest has come."""
        self._head: asyncio.Future[ResponseHead] | None = None
        self._answered = False
        self._held = b""
        self._sink: BodySink | None = None
        self._closed_cleanly = False
        self._ended_in_order = False
        self._held_paused = False
        self._plain = False

    @property
    def should_close(self) -> bool:
        return self._should_close

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transport.set_protocol(self._reads)

    def expect_head(self, method: str) -> None:
        """A `method` request is about to be sent, and its `head` to come."""
        self._method = method
        self.requests += 1
        self.heard = False
        self._head = self._loop.create_future()

    def head(self) -> Awaitable[ResponseHead]:
        """The expected head, to be awaited. Raises `UpstreamError`."""
        assert self._head is not None
        return self._head

    def feed_to(self, sink: BodySink) -> None:
        """The body goes to `sink` from now on, what was held back of it first."""
        self._sink = sink
        self._reads.deliver = sink.data_received
        held, self._held = self._held, b""
        if held and self._connection_lost_called:
            # Its end is told now, and nothing may wait behind that.
            sink.data_received(held)
        elif held:
            self._reads.put_back(held)
        if self._held_paused:
            self._held_paused = False
            self.resume()
        if self._connection_lost_called and self._sink is not None:
            sink.connection_lost(self._closed_cleanly)

    def unread(self, data: bytes) -> None:
        """Takes the body back from its sink; what the sink was given, `data`, is for the next one."""
        self._take_back()
        self._held = data

    def _take_back(self) -> None:
        """What is read comes here again."""
        self._sink = None
        self._reads.deliver = self.data_received
        self.read_bounded()

    def read_plainly(self, reads: PlainReads) -> None:
        """`reads` gets what comes, until `read_bounded`, where it may be trusted to be small."""
        if self._reads.small and self.transport is not None and not self._reads.paused:
            self.transport.set_protocol(reads)
            self._plain = True

    def read_bounded(self) -> BoundedReads:
        """What comes goes the usual way again, which is returned."""
        if self._plain and self.transport is not None:
            self.transport.set_protocol(self._reads)
            self._plain = False
        return self._reads

    def finish(self, *, reusable: bool) -> None:
        """The exchange is over. Unless `reusable`, the connection will not be pooled."""
        self._head, self._answered = None, False
        self._take_back()
        if not reusable or self._held or self._reads.ahead:
            self._should_close = True
        self._held = b""
        if not self._should_close:
            # The read that ended the body may have filled the client's buffer, and so paused a connection that others
            # are going to use.
            self.resume()

    def pause(self) -> None:
        """Reads no more until `resume`."""
        # The kernel goes on to buffer, and a plain read takes all of that.
        self._reads.small = False
        self.read_bounded().pause()

    def resume(self) -> None:
        self._reads.resume()

    def eof_received(self) -> None:
        """The upstream has ended its side in order: by a FIN, or in TLS by close_notify."""
        self._ended_in_order = True
        if self.transport is not None:
            # What still waits to be written, the rest of an upload, would hold up the end of the connection.
            self.transport.abort()

    async def send(self, data: bytes) -> None:
        """Writes `data`, and waits until the upstream takes more. Raises ConnectionError if it is gone."""
        if self.transport is None:
            raise ConnectionResetError("the upstream is gone")
        self.transport.write(data)
        await self._drain_helper()

    def data_received(self, data: bytes) -> None:
        if self._sink is not None:
            self._sink.data_received(data)
        elif self._answered:
            self._held += data
            if len(self._held) > _HELD_LIMIT:
                self._held_paused = True
                self.pause()
        elif self._head is None or self._head.done():
            self.abort()
        else:
            self.heard = True
            self._held += data
            try:
                self._read_head()
            except (ProtocolError, HttpProcessingError, ValueError) as error:
                self._fail_head(UpstreamError("protocol", cause=rule_of(error)))
                self.abort()

    def _read_head(self) -> None:
        """Looks for a whole head in what was received; interim (1xx) heads are dropped (RFC 9110, section 15.2)."""
        awaited = self._head
        assert awaited is not None
        while not self._answered:
            end = self._held.find(b"\r\n\r\n") + 4
            if max(end, len(self._held) if end < 4 else 0) > self._heads.limit:
                raise ProtocolError("the response head is too long")
            if end < 4:
                return
            raw, self._held = self._held[:end], self._held[end:]
            message = self._heads.parse(raw)
            if message.code >= 200:
                awaited.set_result(ResponseHead(self._method, message))
                self._head, self._answered = None, True

    def _fail_head(self, error: UpstreamError) -> None:
        if self._head is not None and not self._head.done():
            self._head.set_exception(error)

    def _left_in_tls(self) -> bytes:
        """What uvloop's TLS has received and not delivered: it drops that when the FIN finds it paused."""
        tls = self.transport.get_extra_info("ssl_object") if self.transport is not None else None
        parts: list[bytes] = []
        if tls is not None:
            try:
                while part := tls.read(1 << 18):
                    parts.append(part)
                self._ended_in_order = True
            except ssl.SSLZeroReturnError:
                self._ended_in_order = True
            except ssl.SSLError:
                # No close_notify: the body may have been cut (RFC 8446, section 6.1).
                pass
        return b"".join(parts)

    def connection_lost(self, exc: BaseException | None) -> None:
        # Each of these happens, the last one first, whatever the others raise.
        with ExitStack() as ends:
            ends.callback(self._tell_of_the_end)
            ends.callback(super().connection_lost, exc)
            left = self._left_in_tls()
            self._closed_cleanly = exc is None and self._ended_in_order
            if left and self._sink is not None:
                self._sink.data_received(left)

    def _tell_of_the_end(self) -> None:
        # Nobody reads from the queue that the base class puts its exception into.
        self._exception = None
        self._fail_head(UpstreamError("reset", cause="it ended in order" if self._ended_in_order else "it was reset"))
        if self._sink is not None:
            self._sink.connection_lost(self._closed_cleanly)

    def is_quiet(self) -> bool:
        """Whether nothing has come since the last response, nor an end: what nobody has read yet included.

        In TLS it may be the protocol's own, though after a response that is rare; then a new connection is made.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        poll = select.poll()
        poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN | select.EPOLLRDHUP)
        return not (poll.poll(0) or self._reads.ahead or self._left_in_tls() or self._ended_in_order)


class _Target:
    """What a connector asks of an `aiohttp.ClientRequest` to connect, without one being made for each request."""

    proxy = proxy_auth = proxy_headers = server_hostname = None

    def __init__(self, url: URL, tls: ssl.SSLContext | Literal[True]) -> None:
        self.url = url
        self.ssl = tls
        self.host = url.raw_host
        self.port = url.port
        self.connection_key = ConnectionKey(
            host=url.raw_host or "",
            port=url.port,
            is_ssl=self.is_ssl(),
            ssl=tls,
            proxy=None,
            proxy_auth=None,
            proxy_headers_hash=None,
        )

    def is_ssl(self) -> bool:
        return self.url.scheme == "https"


def _reason(error: BaseException) -> str:
    """What went wrong, in the system's or OpenSSL's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or "handshake failed").lower().replace("_", " ")
    # Where there were several addresses, it has those of all.
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def _credential(config: UpstreamConfig) -> tuple[bytes, bytes] | None:
    """The field that this side identifies itself by."""
    if config.key is None:
        return None
    name, key = config.api_key_header, config.key.get_secret_value()
    return name.encode(), (f"Bearer {key}" if name.lower() == "authorization" else key).encode()


class Upstream:
    """A named API and its connections. Create and close it in the running loop."""

    def __init__(self, config: UpstreamConfig, limits: Limits) -> None:
        url = URL(config.url, encoded=True)
        self.name = config.name
        self.credential = _credential(config)
        self.base_path = url.raw_path.rstrip("/")
        self.host = (url.host_port_subcomponent or "").encode("ascii")
        self._target = cast(ClientRequest, _Target(url, config.tls.context() if url.scheme == "https" else True))
        loop = asyncio.get_running_loop()
        # No limit: a request is never queued for a connection where nobody sees it.
        self._connector = TCPConnector(limit=0, keepalive_timeout=KEEPALIVE, ttl_dns_cache=10)
        self._stream_options: dict[str | None, bool] = {}
        self._connector._factory = cast(
            "functools.partial[ResponseHandler]",
            functools.partial(RelayProtocol, loop=loop, heads=ResponseHeads(loop, limits.response_head)),
        )
        self._max_pending = limits.pending_connects
        self._pending = 0

    def takes_stream_options(self, model: str | None) -> bool | None:
        """Whether requests for `model` may have them; None if there was no answer yet that told."""
        return self._stream_options.get(model)

    def remember_stream_options(self, model: str | None, taken: bool) -> None:
        if self._stream_options.get(model) is taken:
            return
        while len(self._stream_options) >= _MAX_MODELS:
            del self._stream_options[next(iter(self._stream_options))]
        self._stream_options[model] = taken

    async def connect(self, on_abort: Callable[[], None], *, fresh: bool = False) -> UpstreamConnection:
        """A connection of its own, from the pool or, always if `fresh`, a new one; `on_abort` is told if it is aborted.

        Raises `UpstreamError`, or `RequestError` if too many connections are being made.
        """
        if self._pending >= self._max_pending:
            raise RequestError("pending_connects")
        self._pending += 1
        try:
            while True:
                connection = await self._connector.connect(self._target, [], _NO_TIMEOUT)
                try:
                    owned = UpstreamConnection(connection, on_abort)
                    # What has come on a reused one, or its end, would meet the next request.
                    if not owned.protocol.requests or (not fresh and owned.protocol.is_quiet()):
                        return owned
                except BaseException:
                    connection.close()
                    raise
                connection.close()
        except ClientConnectorDNSError as error:
            raise UpstreamError("dns", cause=f"{error.host}: {_reason(error.os_error)}") from None
        except ClientConnectorCertificateError as error:
            raise UpstreamError("tls", cause=f"{error.host}: {_reason(error.certificate_error)}") from None
        except ClientConnectorError as error:
            kind: Literal["tls", "connect"] = "tls" if isinstance(error, ClientConnectorSSLError) else "connect"
            raise UpstreamError(kind, cause=f"{error.host}:{error.port}: {_reason(error.os_error)}") from None
        except (ClientError, OSError) as error:
            raise UpstreamError("connect", cause=_reason(error)) from None
        finally:
            self._pending -= 1

    @property
    def connecting(self) -> int:
        """How many of the connections in use are still being made."""
        return self._pending

    def connections(self) -> tuple[int, int]:
        """How many connections are (in use, idle)."""
        pooled = (protocol for pool in self._connector._conns.values() for protocol, _ in pool)
        return len(self._connector._acquired), sum(protocol.is_connected() for protocol in pooled)

    async def close(self) -> None:
        await self._connector.close()


class UpstreamConnection:
    """A connection while it belongs to one exchange. It ends by `release` or `abort`, whichever comes first."""

    __slots__ = ("_connection", "_on_abort", "protocol", "transport")

    def __init__(self, connection: Connection, on_abort: Callable[[], None]) -> None:
        protocol, transport = connection.protocol, connection.transport
        assert isinstance(protocol, RelayProtocol)
        if transport is None:
            raise UpstreamError("reset")
        self._connection: Connection | None = connection
        self._on_abort = on_abort
        self.protocol = protocol
        self.transport = transport

    @property
    def reused(self) -> bool:
        """Whether a request was sent on it before the present one."""
        return self.protocol.requests > 1

    def release(self, *, reusable: bool) -> None:
        """The response is complete: back into the pool if the connection is `reusable`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                self.protocol.finish(reusable=reusable)
                if self.protocol.should_close:
                    # Its close would wait to flush an upload that nobody takes any more.
                    self.protocol.abort()
                connection.release()
            except BaseException:
                # It may be in use by nobody, and not in the pool either.
                self.protocol.abort()
                connection.close()
                raise

    def abort(self) -> None:
        """Closes the connection now, whatever it is doing."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                self.protocol.finish(reusable=False)
                self.protocol.abort()
            finally:
                connection.close()
            self._on_abort()
