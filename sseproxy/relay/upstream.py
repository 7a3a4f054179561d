"""The upstream's side: connects, sends requests, receives response heads.

aiohttp's connector resolves names, connects and does TLS, and aiohttp's parser reads response heads. Bodies are not
handled by aiohttp: a `RelayProtocol` passes the bytes after the head directly from the transport to a `Pump`, with no
task in between.

This module translates aiohttp's exceptions and `OSError` into `UpstreamError`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import re
import select
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from time import perf_counter
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

from ..errors import ProtocolError, TooManyConnects, UpstreamError
from ..wire import headers
from ..wire.headers import check_beginning
from .heads import ResponseHead, ResponseHeads, rule_of
from .idle import Idle
from .reads import BoundedReads, PlainReads
from .routes import client_path

if TYPE_CHECKING:
    from ..config import Endpoint as EndpointConfig
    from ..config import Limits, Route, UpstreamTLS
    from ..config import Upstream as UpstreamConfig
    from ..ledger.endpoints import Standing
    from ..ledger.table import Count

# Connections that were opened together are closed at different times, within this share of their age. As in gRPC.
_JITTER = 0.1
# Bytes of a body that may wait for the pump. The pump is attached one turn of the loop after the head was read.
_HELD_LIMIT = 64 * 1024

# A reference to a path, with or without its host (RFC 3986, section 4.2).
_REFERENCE = re.compile(r"(?:(?:https?:)?//([^/?#]*)(?=[/?#]|$)|(?=/))([^?#]*)", re.IGNORECASE)

_NO_TIMEOUT = ClientTimeout()
_NO_QUEUE: deque[Any] = deque(maxlen=0)


@functools.cache
def _tls_of(options: UpstreamTLS) -> ssl.SSLContext:
    # Cached, because to load the system's CA certificates takes 20 ms. A worker has one configuration for all its
    # life, so it does not need to read the files again.
    return options.context()


class BodySink(Protocol):
    """Receives the bytes that follow a response head."""

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, clean: bool) -> None:
        """The connection has ended. `clean`: by a FIN or close_notify of the upstream, and not by a reset."""


class RelayProtocol(ResponseHandler):
    """One upstream connection.

    It is idle, or waits for a response head (`expect_head`), or passes a body to its sink (`feed_to`).
    Bytes that arrive in any other state are unexpected, and the connection is aborted.
    """

    # The base class has none. With these, its dictionary is small enough to share its keys with all others.
    __slots__ = (
        "_answered",
        "_closed_cleanly",
        "_head",
        "_heads",
        "_held",
        "_held_paused",
        "_interim",
        "_interim_size",
        "_method",
        "_old_at",
        "_plain",
        "_poll",
        "_reads",
        "_saw_eof",
        "_sink",
        "_tls",
        "answer_begun",
        "requests",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, heads: ResponseHeads, max_age: float | None = None) -> None:
        super().__init__(loop)
        # The base class has a queue per connection, which is never used here. All connections share an empty one.
        self._buffer = _NO_QUEUE
        self._heads = heads
        self._reads = BoundedReads(self)
        self._method = ""
        self.requests = 0
        """How many requests were sent on this connection."""
        self.answer_begun = False
        """Whether any byte of the response to the last request has been received."""
        self._head: asyncio.Future[ResponseHead] | None = None
        self._interim: Callable[[ResponseHead], None] | None = None
        # Bytes of interim responses, together.
        self._interim_size = 0
        self._answered = False
        self._held = b""
        self._sink: BodySink | None = None
        self._closed_cleanly = False
        self._saw_eof = False
        self._held_paused = False
        self._plain = False
        self._old_at = None if max_age is None else perf_counter() + max_age * (1 - _JITTER * random.random())
        self._tls: ssl.SSLObject | None = None
        # Asks the kernel what has arrived. Made when it is needed first.
        self._poll: select.poll | None = None

    @property
    def should_close(self) -> bool:
        return self._should_close

    @property
    def is_old(self) -> bool:
        """Whether it has reached its age, and takes no other request."""
        return self._old_at is not None and perf_counter() >= self._old_at

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._tls = transport.get_extra_info("ssl_object")
        transport.set_protocol(self._reads)

    def expect_head(self, method: str, interim: Callable[[ResponseHead], None]) -> None:
        """Call this before a request with `method` is sent. Then `head` waits for the response head.

        `interim` is called with each interim response (1xx) before it.
        """
        self._method = method
        self._interim, self._interim_size = interim, 0
        self.requests += 1
        self.answer_begun = False
        self._head = self._loop.create_future()

    def head(self) -> Awaitable[ResponseHead]:
        """The expected response head, as an awaitable that raises `UpstreamError`."""
        assert self._head is not None
        return self._head

    def feed_to(self, sink: BodySink) -> None:
        """Passes the body to `sink` from now on, starting with the bytes that have been held back."""
        self._sink = sink
        self._reads.deliver = sink.data_received
        held, self._held = self._held, b""
        if held and self._connection_lost_called:
            # `connection_lost` of the sink is called below, so all bytes must be delivered before.
            sink.data_received(held)
        elif held:
            self._reads.put_back(held)
        if self._held_paused:
            self._held_paused = False
            self.resume()
        if self._connection_lost_called and self._sink is not None:
            sink.connection_lost(self._closed_cleanly)

    def unread(self, data: bytes) -> None:
        """Takes the body back from its sink. The next sink gets `data` again, the bytes that this one has received."""
        self._take_back()
        self._held = data

    def _take_back(self) -> None:
        """Delivers bytes to this object again."""
        self._sink = None
        self._reads.deliver = self.data_received
        self.read_bounded()

    def read_plainly(self, reads: PlainReads) -> None:
        """Lets `reads` receive all bytes until `read_bounded`. Does nothing if reads may be large."""
        if self._reads.small and self.transport is not None and not self._reads.paused:
            self.transport.set_protocol(reads)
            self._plain = True

    def read_bounded(self) -> BoundedReads:
        """Lets `BoundedReads` receive all bytes again, and returns it."""
        if self._plain and self.transport is not None:
            self.transport.set_protocol(self._reads)
            self._plain = False
        return self._reads

    def finish(self, *, reusable: bool) -> None:
        """The exchange has ended. Unless it is `reusable`, the connection has to be closed."""
        self._head, self._interim, self._answered = None, None, False
        self._take_back()
        if not reusable or self._held or self._reads.ahead or self.is_old:
            self._should_close = True
        self._held = b""
        if not self._should_close:
            # The last write may have filled the client's buffer, and so paused this connection. The next exchange needs
            # it to read.
            self.resume()

    def pause(self) -> None:
        """Stops reading until `resume`."""
        # The kernel still buffers meanwhile, and a plain read would return all of it at once.
        self._reads.small = False
        self.read_bounded().pause()

    def resume(self) -> None:
        self._reads.resume()

    def eof_received(self) -> None:
        """The upstream has closed its side: by a FIN, or in TLS by close_notify."""
        self._saw_eof = True
        if self.transport is not None:
            # A plain close would first wait until the rest of an upload is written.
            self.transport.abort()

    async def send(self, data: bytes) -> None:
        """Writes `data`, and waits until the upstream accepts more. Raises `ConnectionError` if it has disconnected."""
        if self.transport is None:
            raise ConnectionResetError("the upstream has closed the connection")
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
            self.answer_begun = True
            self._held += data
            try:
                self._read_head()
            except (ProtocolError, HttpProcessingError, ValueError) as error:
                self._fail_head(UpstreamError("protocol", cause=rule_of(error)))
                self.abort()

    def _read_head(self) -> None:
        """Parses the head when all of it has been received.

        All interim responses (1xx) before it together may be no longer than one head.
        """
        awaited = self._head
        assert awaited is not None
        while not self._answered:
            end = self._held.find(b"\r\n\r\n") + 4
            if max(end, len(self._held) if end < 4 else 0) > self._heads.limit:
                raise ProtocolError("the response head is too long")
            if end < 4:
                check_beginning(self._held)
                return
            raw, self._held = self._held[:end], self._held[end:]
            head = ResponseHead(self._method, self._heads.parse(raw))
            if head.status >= 200:
                awaited.set_result(head)
                self._head, self._interim, self._answered = None, None, True
            else:
                self._interim_size += end
                if self._interim_size > self._heads.limit:
                    raise ProtocolError("there are too many interim responses")
                if self._interim is not None:
                    self._interim(head)

    def _fail_head(self, error: UpstreamError) -> None:
        if self._head is not None and not self._head.done():
            self._head.set_exception(error)

    def _left_in_tls(self) -> bytes:
        """Bytes that uvloop's TLS has received and not delivered. uvloop drops them if a FIN arrives during a pause."""
        parts: list[bytes] = []
        if self._tls is not None:
            try:
                while part := self._tls.read(1 << 18):
                    parts.append(part)
                self._saw_eof = True
            except ssl.SSLZeroReturnError:
                self._saw_eof = True
            except ssl.SSLError:
                # There is no close_notify, so the body may be truncated (RFC 8446, section 6.1).
                pass
        return b"".join(parts)

    def connection_lost(self, exc: BaseException | None) -> None:
        # All of these run, the last one first, even if another one raises.
        with ExitStack() as ends:
            ends.callback(self._report_end)
            ends.callback(super().connection_lost, exc)
            left = self._left_in_tls()
            self._closed_cleanly = exc is None and self._saw_eof
            if left and self._sink is not None:
                self._sink.data_received(left)

    def _report_end(self) -> None:
        # The base class keeps the exception for its queue, which is not used.
        self._exception = None
        self._fail_head(
            UpstreamError("reset", cause="the connection was closed" if self._saw_eof else "the connection was reset")
        )
        if self._sink is not None:
            self._sink.connection_lost(self._closed_cleanly)

    def is_quiet(self) -> bool:
        """Whether an idle connection can be used: no bytes and no FIN have arrived since the last response.

        This includes bytes that are still in the kernel. With TLS these may be a harmless record of the protocol. This
        is rare after a response; then a new connection is made for nothing.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN | select.EPOLLRDHUP)
        return not (self._poll.poll(0) or self._reads.ahead or self._left_in_tls() or self._saw_eof)


class _Target:
    """The attributes of an `aiohttp.ClientRequest` that the connector reads. One object serves all requests."""

    proxy = proxy_auth = proxy_headers = None
    server_hostname: str | None = None

    def __init__(self, url: URL, tls: ssl.SSLContext | Literal[True], address: str | None) -> None:
        if address is not None:
            # The name that the certificate must have, and that is told to the server (SNI).
            self.server_hostname = url.raw_host
            url = url.with_host(address)
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
    """The error text of the system or of OpenSSL."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or "handshake failed").lower().replace("_", " ")
    # If several addresses were tried, the text has the errors of all. That of one has the address, and not the reason.
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno and text.startswith("Connect call failed"):
        text = os.strerror(error.errno)
    return text.lower()


class Endpoint:
    """One address that serves an upstream, and the connections to it. Create and close it in the running loop.

    It is `config` of the upstream `of`. `pending` counts the connections to the upstream that are being established.
    `standing` is what all workers know of it; None if nothing is counted. With an `address`, connections go there, and
    everything else is as for the host in the URL.
    """

    def __init__(
        self,
        config: EndpointConfig,
        of: UpstreamConfig,
        limits: Limits,
        pending: Count,
        label: str,
        standing: Standing | None = None,
        address: str | None = None,
    ) -> None:
        url = URL(config.url, encoded=True)
        self.label = label
        """What it is called in metrics and in the log."""
        self.standing = standing
        key = config.key or of.key
        self.credential = None if key is None else headers.credential(of.api_key_header, key.reveal())
        self.base_path = url.raw_path.rstrip("/")
        self.port = url.port or 0
        self.host = (url.host_port_subcomponent or "").encode("ascii")
        # As which it may know itself: by the Host that it is sent, or with its port told all the same.
        self._names = {self.host.decode().lower(), f"{url.host_subcomponent}:{url.port}".lower()}
        self._target = cast(ClientRequest, _Target(url, _tls_of(of.tls) if url.scheme == "https" else True, address))
        loop = asyncio.get_running_loop()
        # Without a limit. With one, requests would wait in a queue of aiohttp that no metric shows.
        self._connector = TCPConnector(limit=0, ttl_dns_cache=10)
        self._connector._factory = cast(
            "functools.partial[ResponseHandler]",
            functools.partial(
                RelayProtocol,
                loop=loop,
                heads=ResponseHeads(loop, limits.response_head),
                max_age=of.max_connection_age,
            ),
        )
        self._idle = Idle()
        self._max_pending = limits.pending_connects
        self._pending = pending

    def rewrite_location(self, fields: headers.Fields, route: Route) -> headers.Fields:
        """`fields`, with a Location that leads to this upstream led through `route`, as nginx's proxy_redirect does.

        What is nowhere under the base URL has no address here, and stays as it is.
        """
        locations = fields.named(b"location")
        if len(locations) != 1:
            return fields
        location = locations[0].decode("latin-1")
        reference = _REFERENCE.match(location)
        if reference is None or (reference[1] is not None and reference[1].lower() not in self._names):
            return fields
        here = client_path(route, self.base_path, reference[2])
        if here is None:
            return fields
        return fields.with_only(b"Location", (here + location[reference.end() :]).encode("latin-1"))

    def reuse(self, on_abort: Callable[[], None]) -> UpstreamConnection | None:
        """An idle connection, for one exchange. None if there is none.

        `on_abort` is called if the connection is aborted.
        """
        while (connection := self._idle.take()) is not None:
            try:
                protocol = connection.protocol
                # It must be quiet: bytes on it would be taken for the response.
                if isinstance(protocol, RelayProtocol) and protocol.is_quiet() and not protocol.is_old:
                    return UpstreamConnection(connection, self._idle, on_abort)
            except BaseException:
                # Nobody else has the connection.
                connection.close()
                raise
            connection.close()
        return None

    async def connect(self, on_abort: Callable[[], None]) -> UpstreamConnection:
        """A new connection, for one exchange.

        `on_abort` is called if the connection is aborted. Raises `UpstreamError`, or `TooManyConnects`.
        """
        if self._pending.total() >= self._max_pending:
            raise TooManyConnects
        self._pending.add(1)
        try:
            connection = await self._connector.connect(self._target, [], _NO_TIMEOUT)
            try:
                return UpstreamConnection(connection, self._idle, on_abort)
            except BaseException:
                # Nobody else has the connection.
                connection.close()
                raise
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
            self._pending.add(-1)

    def connections(self) -> tuple[int, int]:
        """How many connections are (in use, idle)."""
        # Those that are closed already, on this side, are not counted by the connector.
        idle = [protocol for one in self._idle if (protocol := one.protocol) is not None]
        return len(self._connector._acquired) - len(idle), sum(protocol.is_connected() for protocol in idle)

    async def close(self) -> None:
        self._idle.close()
        await self._connector.close()


class UpstreamConnection:
    """A connection while it belongs to one exchange: until `release` or `abort`, whichever is called first."""

    __slots__ = ("_connection", "_idle", "_on_abort", "protocol", "transport")

    def __init__(self, connection: Connection, idle: Idle, on_abort: Callable[[], None]) -> None:
        protocol, transport = connection.protocol, connection.transport
        assert isinstance(protocol, RelayProtocol)
        if transport is None:
            raise UpstreamError("reset")
        self._connection: Connection | None = connection
        # Where it goes when it is released.
        self._idle = idle
        self._on_abort = on_abort
        self.protocol = protocol
        self.transport = transport

    @property
    def reused(self) -> bool:
        """Whether an earlier request was sent on this connection."""
        return self.protocol.requests > 1

    def release(self, *, reusable: bool) -> None:
        """The response is complete. If the connection is `reusable`, it is kept for another exchange."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                self.protocol.finish(reusable=reusable)
                if self.protocol.should_close:
                    # A plain close would wait until the rest of an upload is written, which nobody reads any more.
                    self.protocol.abort()
                    connection.close()
                else:
                    self._idle.add(connection)
            except BaseException:
                # Otherwise the connection could leak: not in use, and not idle.
                self.protocol.abort()
                connection.close()
                raise

    def abort(self) -> None:
        """Closes the connection immediately."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                self.protocol.finish(reusable=False)
                self.protocol.abort()
            finally:
                connection.close()
            self._on_abort()
