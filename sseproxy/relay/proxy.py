"""The life of a request, in numbered phases, of which the last always runs and records.

1. *Route*: the target is checked, the route found; where something depends on the model, the body is read for it.
2. *Connect*: a connection to the upstream, pooled or new.
3. *Send*: the head at once, the body as it comes.
4. *Head*: the upstream's response head is awaited, and sent downstream before any byte of the body.
5. *Body*: the pump moves it.
6. *End*: whatever happened, both sides are released and the exchange gets its one outcome.

A client that leaves cancels whichever phase it is in; a deadline or the end of a drain makes it fail.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Literal

from aiohttp.web_protocol import RequestPayloadError

from ..config import Config, Route, Timeouts
from ..errors import (
    Draining,
    ExchangeError,
    InternalError,
    Outcome,
    ProtocolError,
    RequestError,
    StalledClient,
    UpstreamError,
)
from ..wire import headers
from ..wire.dialects import Dialect, dialect_of, model_in
from ..wire.framing import LAST_CHUNK, Framing, frame, framing_fields
from ..wire.request import RequestReader
from ..wire.usage import REFUSAL_STATUSES, REFUSED, UsageStripper
from . import routes
from .clock import Clock
from .downstream import Answer, DownstreamServer, Request, status_line
from .exchange import Exchange, Observer
from .inspect import Inspector, JsonInspector, StreamInspector
from .pump import Peek, Pump
from .upstream import ResponseHead, Upstream, UpstreamConnection

log = logging.getLogger(__name__)

# What a backend says of an option that it does not know is short.
_MAX_REFUSAL = 64 * 1024
# A request may come through here more than once on purpose; this often it goes in circles.
_MAX_PASSES = 8
# Once others take the requests: a client that has sent none for so long is not about to.
_IDLE_BEFORE_CLOSE = 5.0
# Often enough to see an overload begin, and end, within a second or so.
_LATENESS_INTERVAL = 0.25
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def _model_of(body: bytes) -> str | None:
    reader = RequestReader()
    reader.feed(body)
    return reader.model


class Lateness:
    """How late the timers of a loop fire. `measured` is told each time, in seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, measured: Callable[[float], None]) -> None:
        self._loop = loop
        self._measured = measured
        self._latest = 0.0
        self.lasting = 0.0
        """Of the latest two timers the one that was less late: a single pause is no overload."""
        self._begin()

    def _begin(self) -> None:
        self._timer = self._loop.call_later(_LATENESS_INTERVAL, self._fired, perf_counter() + _LATENESS_INTERVAL)

    def _fired(self, due: float) -> None:
        before, self._latest = self._latest, max(0.0, perf_counter() - due)
        self.lasting = min(before, self._latest)
        self._measured(self._latest)
        self._begin()

    def stop(self) -> None:
        self._timer.cancel()


class Proxy:
    """The relay of one worker: its routes, its upstreams, and the exchanges that are under way.

    `observer(route, upstream, model)` gives what these labels are recorded by; the first two are empty where there is
    no route. `lagged` is told how late the loop is. Create, and close, in the running loop.
    """

    def __init__(
        self, config: Config, observer: Callable[[str, str, str], Observer], lagged: Callable[[float], None]
    ) -> None:
        self.lateness = Lateness(asyncio.get_running_loop(), lagged)
        self.limits = config.limits
        self.max_body = config.max_body
        self.models = config.metrics.models
        self.names_models = config.access_log.exchanges != "off"
        self.router = routes.Router(config.routes)
        self.observer = observer
        self.upstreams = {upstream.name: Upstream(upstream, config.limits) for upstream in config.upstreams}
        self._route_limits = {route.name: route.limits.active_requests for route in config.routes}
        self._on_route: Counter[str] = Counter()
        self._trusted = config.trusted_proxies
        self.active: set[_Relay] = set()
        self.retiring = False
        self.draining = False
        self._closing_idle: asyncio.TimerHandle | None = None
        self.server = DownstreamServer(self.handle, self._malformed, self.limits)

    def handle(self, request: Request) -> Coroutine[None, None, Answer]:
        return _Relay(self, request).run()

    def enter(self, route: str) -> None:
        """Another exchange on `route`, until it `leaves`. Raises `RequestError` if there are too many."""
        most = self._route_limits[route]
        if most is not None and self._on_route[route] >= most:
            raise RequestError("active_requests")
        self._on_route[route] += 1

    def leave(self, route: str) -> None:
        self._on_route[route] -= 1

    def trusts(self, address: str) -> bool:
        """Whether a client at `address` is believed where its requests come from."""
        if not self._trusted or not address:
            return False
        host = ipaddress.ip_address(address)
        return any(host in network for network in self._trusted)

    def retire(self) -> None:
        """Others take what comes from now on, and there is no hurry: `server.empty` tells when all has ended.

        A client that was promised that its connection stays may be about to use it, so such connections end after
        their next response, which says so, or when they have been idle for a while.
        """
        self.retiring = True
        self.server.close_idle_for(_IDLE_BEFORE_CLOSE)
        self._closing_idle = asyncio.get_running_loop().call_later(_IDLE_BEFORE_CLOSE / 5, self.retire)

    def drain(self) -> None:
        """Connections end after the exchange that is on them, idle ones now; `server.empty` tells when all have."""
        self.draining = True
        self.server.close_idle_for(0.0)

    def end_exchanges(self) -> None:
        """The drain is over: what is still under way ends with an error."""
        for relay in list(self.active):
            relay.fail(Draining())

    async def close(self) -> None:
        if self._closing_idle is not None:
            self._closing_idle.cancel()
        self.lateness.stop()
        await self.server.shutdown(timeout=1.0)
        self.server.hangups.close()
        for upstream in self.upstreams.values():
            await upstream.close()

    def _malformed(self, error: RequestError) -> None:
        observer = self.observer("", "", routes.OTHER)
        exchange = Exchange("", "", observer, "", perf_counter())
        exchange.status = error.status
        observer.rejected(error.reason)
        exchange.finish(error.outcome)


class _Relay:
    """One exchange under way."""

    def __init__(self, proxy: Proxy, request: Request) -> None:
        downstream = request.protocol
        task = asyncio.current_task()
        assert task is not None
        self._proxy = proxy
        self._request = request
        self._downstream = downstream
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._received_at = max(downstream.read_at, downstream.free_at)
        # The request's body as far as it was read in advance, and whether that is all of it.
        self._body = b""
        self._whole = False
        self._reader = RequestReader()
        # Of the request's body: seconds that the client was waited for, and bytes that came.
        self._waited = 0.0
        self._received = 0
        self._on_route = ""
        self._request_id = headers.request_id(request.fields) or b"%016x" % random.getrandbits(64)
        self._exchange: Exchange | None = None
        self._clock: Clock | None = None
        self._connection: UpstreamConnection | None = None
        self._upload: asyncio.Task[None] | None = None
        self._pump: Pump | None = None
        self._flushing = False
        self._framing_out: Framing | None = None
        self._head_sent = False
        self._keep_alive = False
        self._error: ExchangeError | None = None

    def fail(self, error: ExchangeError) -> None:
        """Ends the exchange from outside, with `error`. The first error counts."""
        if self._error is not None:
            return
        if self._pump is None or self._flushing:
            self._error = error
            self._task.cancel()
        elif not self._pump.done.done():
            self._error = error
            self._pump.fail(error)

    def _leave(self) -> None:
        """The client is gone."""
        if self._connection is not None:
            self._connection.abort()
        if self._pump is not None:
            self._pump.stop()
        self._task.cancel()

    async def run(self) -> Answer:
        """Phases 1 to 6."""
        self._proxy.active.add(self)
        self._downstream.on_leave = self._leave
        outcome = Outcome.PROXY_ERROR
        try:
            await self._relay()
            # What the phases before it needed is gone by now, and a stream may be long.
            if self._pump is not None:
                await self._pump.done
            await self._flush()
            outcome = self._recorded().completed()
            return Answer(self._keep_alive and not self._proxy.draining)
        except ExchangeError as error:
            outcome = self._failed(error)
            return self._refuse(error)
        except asyncio.CancelledError:
            if self._error is None:
                outcome = self._left()
                raise
            self._task.uncancel()
            outcome = self._failed(self._error)
            return self._refuse(self._error)
        except Exception:
            # The client gets an answer, and the exchange its outcome, also from a mistake of ours.
            log.exception("an exchange failed in a way that nobody foresaw")
            return self._refuse(InternalError())
        finally:
            self._end(outcome)

    def _left(self) -> Outcome:
        """The outcome if the client has left, unless the body had ended and this task was only about to hear of it."""
        if self._downstream.left_at is None:
            # Nobody left: the worker's end does not wait for this exchange.
            return Outcome.DRAINED
        body = self._pump.done if self._pump is not None else None
        if body is None or not body.done() or body.cancelled() or self._flushing:
            return self._recorded().client_left()
        error = body.exception()
        return self._failed(error) if isinstance(error, ExchangeError) else self._recorded().completed()

    def _failed(self, error: ExchangeError) -> Outcome:
        exchange = self._recorded()
        outcome = exchange.failed(error)
        if outcome is not error.outcome:
            return outcome
        exchange.reason = error.code
        if isinstance(error, UpstreamError):
            exchange.observer.upstream_failed(error.kind, answered=exchange.head_at is not None)
        elif isinstance(error, RequestError):
            exchange.observer.rejected(error.reason)
        return outcome

    def _end(self, outcome: Outcome) -> None:
        """Phase 6: End."""
        self._proxy.active.discard(self)
        self._downstream.on_leave = None
        self._downstream.free_at = perf_counter()
        if self._pump is not None:
            self._pump.stop()
        if self._clock is not None:
            self._clock.stop()
        if self._upload is not None:
            self._upload.cancel()
        if self._connection is not None:
            self._connection.abort()
        if self._on_route:
            self._proxy.leave(self._on_route)
        self._recorded().finish(outcome)
        # These refer to this object in turn: together they would wait for the garbage collector.
        del self._task
        self._clock = self._upload = self._connection = self._pump = None

    def _recorded(self, route: str = "", upstream: str = "") -> Exchange:
        """The exchange's record, begun here if it has not got so far as to have one."""
        if self._exchange is None:
            observer = self._proxy.observer(route, upstream, routes.OTHER)
            exchange = Exchange(route, upstream, observer, self._request_id.decode(), self._received_at)
            exchange.client = headers.client_address(self._request.fields, self._downstream.address, self._proxy.trusts)
            exchange.method = self._request.method
            exchange.traceparent = headers.traceparent(self._request.fields)
            self._exchange = exchange
        return self._exchange

    def _can_keep_alive(self) -> bool:
        """The connection can take another request: this one is wholly read, its response framed.

        What follows a CONNECT was meant for whoever it was to connect to.
        """
        return (
            self._request.keep_alive
            and self._request.method != "CONNECT"
            and not (self._proxy.draining or self._proxy.retiring)
            and self._request.body.is_eof()
            and self._framing_out != "close"
        )

    def _refuse(self, error: ExchangeError) -> Answer:
        """The response if its head was not sent yet; otherwise the connection is cut short of a clean end."""
        if self._head_sent:
            self._downstream.cut(flush=self._framing_out != "close" and not isinstance(error, StalledClient))
            return Answer(keep_alive=False)
        self._recorded().status = error.status
        extra = [(b"X-Request-Id", self._request_id)]
        if error.status in (429, 503):
            # Another replica, or this one's successor, takes it now.
            extra.append((b"Retry-After", b"1"))
        misread = error.code in ("bad_request", "head_too_large")
        if misread:
            # What is not read as others might read it is the last that is read.
            self._downstream.read_no_more()
        last = misread or self._downstream.refused is not None
        return Answer.of(error, keep_alive=not last and self._can_keep_alive(), extra=extra)

    async def _relay(self) -> None:
        """Phases 1 to 4, and the beginning of 5."""
        route, path, query = await self._route()
        upstream = self._proxy.upstreams[route.upstream]
        exchange = self._recorded(route.name, upstream.name)
        self._proxy.enter(route.name)
        self._on_route = route.name
        clock = self._clock = Clock(self._loop, route.timeouts, self._received_at, self.fail)
        target = routes.upstream_path(route, upstream.base_path, path)
        dialect = dialect_of(target, route.dialect)

        is_json = headers.is_json(self._request.fields) and not headers.is_encoded(self._request.fields)
        wants_usage = route.usage.request and dialect.asks_usage and is_json
        if wants_usage or (self._proxy.models and is_json):
            await self._read_body(clock, route.timeouts.body)
        model = (self._reader.model if self._whole else None) or model_in(target)
        exchange.model, exchange.api = model, dialect.name
        exchange.observer = self._proxy.observer(
            route.name, upstream.name, routes.model_label(self._proxy.models, model)
        )
        asking = None
        if wants_usage and self._whole and upstream.takes_stream_options(model):
            splice = self._reader.with_usage()
            asking = b"".join(splice.into([self._body])) if splice is not None else None

        # Anything else is fetched, not generated, and may come as compressed as the client wants it.
        read = dialect.generates or self._request.method == "POST"
        target += query
        head = await self._ask(upstream, target, asking, clock, read=read)
        if asking is not None and await self._refuses_stream_options(head, clock):
            asking = None
            head = await self._ask(upstream, target, None, clock, read=read)
            # One that is refused without them as well may only have been quoted.
            if head.status not in REFUSAL_STATUSES:
                upstream.refuses_stream_options(model)

        if model is None and is_json and self._whole and self._proxy.names_models:
            exchange.model = _model_of(self._body)
        # What only the way upstream has needed is let go: a stream may be long.
        self._body = b""
        self._request.answered()
        self._respond(head, dialect, clock, route.heartbeat, strip=asking is not None)

    async def _ask(
        self, upstream: Upstream, target: str, asking: bytes | None, clock: Clock, *, read: bool
    ) -> ResponseHead:
        """Phases 2 to 4. The request goes upstream, with `asking` for its body if there is such a one."""
        clock.enter("connect", perf_counter())
        await self._connect(upstream)
        return await self._send(upstream, target, asking, clock, read=read)

    async def _refuses_stream_options(self, head: ResponseHead, clock: Clock) -> bool:
        """Whether the response says so; it is let go then, and otherwise still to be forwarded."""
        assert self._connection is not None
        if head.status not in REFUSAL_STATUSES or not head.framing:
            return False
        clock.enter("idle", perf_counter())
        peek = Peek(self._connection, head.framing, _MAX_REFUSAL)
        if REFUSED not in await peek.look():
            peek.put_back()
            return False
        if peek.whole:
            self._connection.release(reusable=head.reusable)
        else:
            self._connection.abort()
        return True

    async def _route(self) -> tuple[Route, str, str]:
        """Phase 1: Route. The route, the path and the query."""
        request, limits = self._request, self._proxy.limits
        if self._downstream.refused is not None:
            raise self._downstream.refused
        if limits.active_requests is not None and len(self._proxy.active) > limits.active_requests:
            raise RequestError("active_requests")
        if limits.lag is not None and self._proxy.lateness.lasting > limits.lag:
            raise RequestError("overloaded")
        if request.method == "CONNECT":
            raise RequestError("method")
        if request.head_size > limits.request_head:
            raise RequestError("head_too_large")
        if limits.request_body is not None and (request.length or 0) > limits.request_body:
            raise RequestError("body_too_large")
        if headers.passes(request.fields) > _MAX_PASSES:
            raise RequestError("loop")
        if request.version not in ((1, 0), (1, 1)) or request.body.exception() is not None:
            raise RequestError("bad_request")
        try:
            headers.check_request(request.version, request.fields)
        except ProtocolError:
            raise RequestError("bad_request") from None
        if not {b"100-continue"}.issuperset(map(bytes.lower, request.fields.named(b"expect"))):
            raise RequestError("expectation")
        path, query = routes.split_target(request.target)
        candidates = self._proxy.router.candidates(request.method, path)
        model: str | None = None
        if any(route.match.model for route in candidates):
            # Whichever of them it will be, it would wait no longer.
            silence = max(route.timeouts.body for route in candidates)
            clock = self._clock = Clock(self._loop, Timeouts(body=silence), self._received_at, self.fail)
            await self._read_body(clock, silence)
            clock.stop()
            if not self._whole:
                raise RequestError("body_too_large")
            model = self._reader.model
        return routes.choose(candidates, model), path, query

    async def _next_part(self, grace: float) -> bytes:
        """The next bytes of the client's body, empty at its end.

        Raises `RequestError` if it is broken or too large, `StalledClient` if it is too slow once `grace` is over.
        """
        before = perf_counter()
        try:
            part = await self._request.body.readany()
        except RequestPayloadError:
            raise RequestError("bad_request") from None
        self._waited += perf_counter() - before
        self._received += len(part)
        limits = self._proxy.limits
        if limits.request_body is not None and self._received > limits.request_body:
            raise RequestError("body_too_large")
        if limits.request_body_rate is not None and self._waited > grace:
            if self._received < limits.request_body_rate * self._waited:
                raise StalledClient("little", self._waited)
        return part

    async def _read_body(self, clock: Clock, grace: float) -> None:
        """Reads the body in advance, as far as its limit allows."""
        if self._whole:
            return
        limit = self._proxy.max_body
        clock.enter("body", perf_counter())
        self._continue()
        parts: list[bytes] = []
        size = 0
        while size <= limit and (part := await self._next_part(grace)):
            clock.touched = perf_counter()
            self._reader.feed(part)
            size += len(part)
            parts.append(part)
        self._body = b"".join(parts)
        self._whole = size <= limit

    def _continue(self) -> None:
        """Tells a client that asked to that it may send its body (RFC 9110, section 10.1.1)."""
        transport = self._downstream.transport
        if (
            self._request.fields.named(b"expect")
            and self._request.version == (1, 1)
            and not self._request.body.is_eof()
            and transport is not None
        ):
            transport.write(_CONTINUE)

    async def _connect(self, upstream: Upstream) -> None:
        """Phase 2: Connect."""
        connection = await upstream.connect()
        self._connection = UpstreamConnection(connection, self._released)

    def _released(self) -> None:
        left_at = self._downstream.left_at
        if left_at is not None:
            self._recorded().observer.released(perf_counter() - left_at)

    async def _send(
        self, upstream: Upstream, target: str, asking: bytes | None, clock: Clock, *, read: bool
    ) -> ResponseHead:
        """Phases 3, Send, and 4, Head: returns the upstream's response head."""
        request, connection, exchange = self._request, self._connection, self._recorded()
        assert connection is not None
        chunked = bool(request.fields.named(b"transfer-encoding"))
        framing: Framing | None = "chunked" if chunked else request.length
        if not self._whole and request.body.is_eof():
            # It came together with its head, as the JSON of a completion does: one write takes both.
            self._body += request.body.read_nowait()
            self._whole = True
            most = self._proxy.limits.request_body
            if most is not None and len(self._body) > most:
                raise RequestError("body_too_large")
        body = self._body if asking is None else asking
        if self._whole and framing is not None:
            framing = len(body)
        peer = self._downstream.address
        head = headers.serialize(
            b"%b %b HTTP/1.1" % (request.method.encode(), target.encode("utf-8", "surrogateescape")),
            headers.to_upstream(
                request.fields,
                host=upstream.host,
                framing=framing_fields(framing),
                peer=peer.encode() or b"unknown",
                trusted=self._proxy.trusts(peer),
                scheme=b"https" if self._downstream.ssl_context else b"http",
                request_id=self._request_id,
                credential=upstream.credential,
                read=read,
            ),
        )
        connection.protocol.expect_head(request.method)
        connection.transport.write(head + (frame(body) if body and framing == "chunked" else body))
        exchange.request_bytes += len(body)
        clock.enter("head" if self._whole else "body", perf_counter())
        if not self._whole:
            self._continue()
            self._upload = self._loop.create_task(self._send_body(connection, exchange, clock, framing == "chunked"))
        # No name for it: one that fails would refer to this frame, and the frame to it.
        return await connection.protocol.head()

    async def _send_body(self, connection: UpstreamConnection, exchange: Exchange, clock: Clock, chunked: bool) -> None:
        def waits_for(phase: Literal["body", "head"]) -> None:
            if exchange.head_at is None:
                clock.enter(phase, perf_counter())

        try:
            while part := await self._next_part(clock.patience):
                exchange.request_bytes += len(part)
                waits_for("head")
                await connection.protocol.send(frame(part) if chunked else part)
                waits_for("body")
            # The upstream's time to answer begins when it has what it is to answer.
            waits_for("head")
            if chunked:
                await connection.protocol.send(LAST_CHUNK)
        except ConnectionError:
            # One side is gone. If it is the upstream, its response, or that there is none, is about to say so.
            return
        except ExchangeError as error:
            self.fail(error)

    def _respond(
        self, head: ResponseHead, dialect: Dialect, clock: Clock, heartbeat: float | None, *, strip: bool
    ) -> None:
        """Sends the head downstream, and begins phase 5, Body."""
        request, connection, downstream = self._request, self._connection, self._downstream
        exchange, transport = self._exchange, self._downstream.transport
        assert connection is not None
        assert exchange is not None
        assert transport is not None
        event_stream = headers.is_event_stream(head.fields) and head.framing is not None
        stripper = UsageStripper() if strip and event_stream and not headers.is_encoded(head.fields) else None
        if head.framing is None or (isinstance(head.framing, int) and stripper is None):
            self._framing_out = head.framing
        else:
            self._framing_out = "chunked" if request.version == (1, 1) else "close"
        self._keep_alive = self._can_keep_alive()
        option = b"close" if not self._keep_alive else b"keep-alive" if request.version == (1, 0) else None
        head_out = headers.serialize(
            status_line(head.status, head.reason),
            headers.to_downstream(
                head.fields,
                # A HEAD and a 304 tell the length of what they do not carry; a 204 has none to tell.
                framing=None if head.framing is None and head.status != 204 else framing_fields(self._framing_out),
                event_stream=event_stream,
                request_id=self._request_id,
                connection=option,
            ),
        )
        self._head_sent = True
        exchange.head_received(head.status, event_stream)
        reusable = head.reusable and (self._upload is None or self._upload.done())
        if head.framing is None or head.framing == 0:
            transport.write(head_out)
            connection.release(reusable=reusable)
        else:
            assert self._framing_out is not None
            self._pump = Pump(
                connection,
                downstream,
                exchange,
                self._inspector(head, event_stream, dialect, exchange),
                clock,
                framing_in=head.framing,
                framing_out=self._framing_out,
                reusable=reusable,
                heartbeat=heartbeat,
                stripper=stripper,
            )
            self._pump.start(head_out)

    async def _flush(self) -> None:
        """The end of phase 5: the client takes the last bytes."""
        downstream, transport = self._downstream, self._downstream.transport
        if transport is not None and transport.get_write_buffer_size():
            assert self._clock is not None
            self._flushing = True
            self._clock.only_client(downstream.stall_detector())
            await downstream.flushed()

    def _inspector(self, head: ResponseHead, event_stream: bool, dialect: Dialect, exchange: Exchange) -> Inspector:
        if headers.is_encoded(head.fields):
            exchange.unread = "encoded"
        elif event_stream:
            return StreamInspector(exchange, dialect, self._proxy.limits.event)
        elif self._request.method == "POST" and headers.is_json(head.fields):
            # What a GET fetches was counted when it was generated.
            return JsonInspector(exchange, dialect)
        return Inspector(exchange)
