"""The life of a request, in numbered phases, of which the last always runs and records.

1. *Admit*: the request takes its place among those under way; its head is checked.
2. *Route*: the route is found; where something depends on the model, the body is collected for it.
3. *Connect*: a connection to the upstream, pooled or new.
4. *Send*: the head at once, the body as it comes.
5. *Head*: the upstream's response head is awaited, and sent downstream before any byte of the body.
6. *Body*: the pump moves it.
7. *End*: whatever happened, all that was occupied is given back, both sides are released, and the exchange gets its one
   outcome.

Phases 3 to 5 are an *attempt*. A client that leaves cancels whichever phase it is in; a deadline or the end of a drain
makes it fail.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Final

from ..errors import (
    ExchangeError,
    InternalError,
    Outcome,
    RequestError,
    StalledClient,
    UpstreamError,
    UpstreamTimeout,
)
from ..wire import headers
from ..wire.dialects import Dialect, asks_for_stream, dialect_of, model_in
from ..wire.framing import Framing, framing_fields
from ..wire.request import RequestReader, Splice
from ..wire.usage import REFUSAL_STATUSES, REFUSED, UsageStripper
from . import routes
from .admission import Ticket
from .answers import Answer, status_line
from .attempt import Attempt, Outgoing
from .clock import Clock
from .downstream import Request
from .exchange import Exchange
from .heads import ResponseHead
from .inspect import Inspector, JsonInspector, StreamInspector
from .pump import Peek, Pump
from .upstream import Upstream

if TYPE_CHECKING:
    from ..config import Route, Timeouts
    from .proxy import Proxy

log = logging.getLogger(__name__)

# What a backend says of an option that it does not know is short.
_MAX_REFUSAL: Final = 64 * 1024
# A request may come through here more than once on purpose; this often it goes in circles.
_MAX_PASSES: Final = 8
# Of a body that is sent as it comes, so much is kept in case that it has to be sent again.
_MAX_REPEATED: Final = 1024 * 1024
# Methods that change nothing (RFC 9110, section 9.2.1), of those that are relayed.
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Relay:
    """One exchange under way. `run` it once."""

    def __init__(self, proxy: Proxy, request: Request) -> None:
        downstream = request.connection
        task = asyncio.current_task()
        assert task is not None
        self._proxy = proxy
        self._request = request
        self._downstream = downstream
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._received_at = max(downstream.read_at, downstream.free_at)
        self._request_id = headers.request_id(request.fields) or b"%016x" % random.getrandbits(64)
        # What is read of the request's body, once all of it has come.
        self._read: RequestReader | None = None
        # What is read of it while it is relayed.
        self._passing: RequestReader | None = None
        self._ticket: Ticket | None = None
        self._exchange: Exchange | None = None
        self._clock: Clock | None = None
        self._attempt: Attempt | None = None
        self._pump: Pump | None = None
        self._flushing = False
        self._framing_out: Framing | None = None
        self._continued = False
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
            self._pump.fail(error)
            self._error = error

    def _missed(self, error: ExchangeError) -> None:
        """A deadline has passed: that of the attempt, or of the exchange."""
        of_attempt = isinstance(error, UpstreamTimeout) and error.phase in ("connect", "head")
        if not (of_attempt and self._attempt is not None and self._attempt.fail(error)):
            self.fail(error)

    def _gone(self) -> None:
        """The client is gone."""
        if self._attempt is not None:
            self._attempt.end()
        if self._pump is not None:
            self._pump.stop()
        self._task.cancel()

    async def run(self) -> Answer:
        """Phases 1 to 7."""
        outcome = Outcome.PROXY_ERROR
        try:
            try:
                self._proxy.active.add(self)
                self._downstream.on_gone = self._gone
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
                    outcome = self._cancelled()
                    raise
                self._task.uncancel()
                outcome = self._failed(self._error)
                return self._refuse(self._error)
        except Exception:
            # The client gets an answer, and the exchange its outcome, also from a mistake of ours, wherever that is.
            log.exception("an exchange failed in a way that nobody foresaw")
            return self._refuse(InternalError())
        finally:
            self._end(outcome)

    def _cancelled(self) -> Outcome:
        """The outcome if the client is gone, unless the body had ended and this task was only about to hear of it."""
        if self._downstream.gone_at is None:
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
        exchange.reason, exchange.cause = error.code, error.cause
        if isinstance(error, UpstreamError):
            exchange.observer.upstream_failed(error.kind, answered=exchange.head_at is not None)
        elif isinstance(error, RequestError):
            exchange.observer.rejected(error.reason)
        return outcome

    def _end(self, outcome: Outcome) -> None:
        """Phase 7: End. Raises nothing: the answer has been given."""
        try:
            # Each of these happens, the last one first, whatever the others raise.
            with ExitStack() as ends:
                ends.callback(self._record, outcome)
                if self._clock is not None:
                    ends.callback(self._clock.stop)
                if self._attempt is not None:
                    ends.callback(self._attempt.end)
                if self._pump is not None:
                    ends.callback(self._pump.stop)
                ends.callback(self._request.body.close)
                if self._ticket is not None:
                    ends.callback(self._ticket.give_back)
        except Exception:
            log.exception("the end of an exchange failed")
        # These refer to this object in turn: together they would wait for the garbage collector.
        del self._task
        self._ticket = self._clock = self._attempt = self._pump = None

    def _record(self, outcome: Outcome) -> None:
        self._proxy.active.discard(self)
        self._downstream.on_gone = None
        self._downstream.free_at = perf_counter()
        exchange = self._exchange or self._recorded()
        if self._passing is not None:
            exchange.model = exchange.model or self._passing.model_so_far
        self._proxy.kept.settle(exchange)
        exchange.finish(outcome)

    def _recorded(self, route: str = "", upstream: str = "") -> Exchange:
        """The exchange's record, begun here if it has not got so far as to have one."""
        if self._exchange is None:
            observer = self._proxy.observer(route, upstream, routes.OTHER)
            exchange = Exchange(route, upstream, observer, self._request_id.decode(), self._received_at)
            self._exchange = exchange
            exchange.begin()
            exchange.client = headers.client_address(self._request.fields, self._downstream.address, self._proxy.trusts)
            exchange.method = self._request.method
            exchange.path = self._request.target.partition("?")[0]
            exchange.traceparent = headers.traceparent(self._request.fields)
        return self._exchange

    def _can_keep_alive(self) -> bool:
        """The connection can take another request: this one has come to its end, and its response is framed."""
        return (
            self._request.keep_alive
            and not (self._proxy.draining or self._proxy.retiring)
            and self._request.body.ended
            and self._framing_out != "close"
        )

    def _refuse(self, error: ExchangeError) -> Answer:
        """The response if its head was not sent yet; otherwise the connection is cut short of a clean end."""
        if self._head_sent:
            self._downstream.cut(flush=self._framing_out != "close" and not isinstance(error, StalledClient))
            return Answer(keep_alive=False)
        exchange = self._recorded()
        exchange.status = error.status
        extra = [(b"X-Request-Id", self._request_id)]
        if error.status in (429, 503):
            # Another replica, or this one's successor, takes it now.
            extra.append((b"Retry-After", b"1"))
        misread = error.code in ("bad_request", "head_too_large")
        if misread:
            # A request that parsers may read differently ends the connection.
            self._downstream.read_no_more()
        last = misread or self._downstream.refused is not None
        answer = Answer.of(error, keep_alive=not last and self._can_keep_alive(), extra=extra)
        exchange.response_bytes += 0 if self._request.method == "HEAD" else len(answer.body)
        return answer

    async def _relay(self) -> None:
        """Phases 1 to 5, and the beginning of 6."""
        self._admit()
        route, path, query = await self._route()
        proxy, request = self._proxy, self._request
        upstream = proxy.upstreams[route.upstream]
        exchange = self._recorded(route.name, upstream.name)
        assert self._ticket is not None
        self._ticket.enter(route.name)
        clock = self._start_clock(route.timeouts)
        target = routes.upstream_path(route, upstream.base_path, path)
        known_as = routes.normal_path(target)
        dialect = dialect_of(known_as, route.dialect)

        is_json = headers.is_json(request.fields) and not headers.is_encoded(request.fields)
        wants_usage = route.usage.request and dialect.asks_usage and is_json
        if wants_usage or (proxy.models and is_json):
            await self._collect(clock, route.timeouts.body)
        elif is_json and (dialect.generates or proxy.names_models) and not (self._read or self._read_what_came()):
            # It is relayed as it comes, and read in passing: who asks for a stream gets one, whatever it is labelled.
            self._passing = RequestReader()
            request.body.watched_by(self._passing.feed)
        read, self._read = self._read, None
        model = (None if read is None else read.model) or model_in(known_as)
        exchange.model, exchange.api = model, dialect.name
        exchange.fetches = dialect.keeps and request.method != "POST"
        exchange.observer = proxy.observer(route.name, upstream.name, routes.model_label(proxy.models, model))
        asking: Splice | None = None
        if wants_usage and read is not None and upstream.takes_stream_options(model) is not False:
            asking = read.with_usage()
            if asking is not None and not upstream.takes_stream_options(model) and not request.body.hold():
                # If it were refused, the client's own body could not be sent.
                asking = None

        # Anything else is fetched, not generated, and may come as compressed as the client wants it.
        inspect = dialect.generates or request.method == "POST"
        target += query if upstream.credential is None else routes.without_key(query)
        head = await self._ask(upstream, target, asking, model, clock, inspect=inspect)
        if asking is not None and await self._refuses_stream_options(head, clock):
            asking = None
            head = await self._ask(upstream, target, None, model, clock, inspect=inspect)
            # A refusal may only quote what the client wrote, or take the request for one without a stream;
            # that it streams without proves what was refused.
            if head.status < 300 and headers.body_kind(head.fields) in ("events", "open"):
                upstream.remember_stream_options(model, taken=False)
        elif asking is not None and head.status < 300:
            upstream.remember_stream_options(model, taken=True)
        kind = headers.body_kind(head.fields)
        asked = (
            kind == "events"
            or asks_for_stream(known_as, query)
            or headers.accepts_events(request.fields)
            or any(reader is not None and reader.streams for reader in (read, self._passing))
        )
        # What only the way upstream has needed is forgotten: a stream may be long.
        del read
        request.answered()
        self._respond(head, kind, dialect, clock, route.heartbeat, asked=asked, strip=asking is not None)

    def _admit(self) -> None:
        """Phase 1: Admit."""
        request, limits = self._request, self._proxy.limits
        self._ticket = self._proxy.admission.ticket(request.body, self.fail)
        if self._downstream.refused is not None:
            raise self._downstream.refused
        self._ticket.admit()
        routes.check_method(request.method)
        if request.head_size > limits.request_head:
            raise RequestError("head_too_large")
        problem = request.problem or request.body.problem
        if problem is not None:
            raise problem
        if headers.passes(request.fields) > _MAX_PASSES:
            raise RequestError("loop")
        if not {b"100-continue"}.issuperset(map(bytes.lower, request.fields.named(b"expect"))):
            raise RequestError("expectation")

    async def _route(self) -> tuple[Route, str, str]:
        """Phase 2: Route. The route, the path and the query."""
        path, query = routes.split_target(self._request.target)
        candidates = self._proxy.router.candidates(self._request.method, path)
        model: str | None = None
        if any(route.match.model for route in candidates):
            # Whichever of them it will be, it would wait no longer.
            silence = max(route.timeouts.body for route in candidates)
            totals = [route.timeouts.total for route in candidates]
            total = None if None in totals else max(total for total in totals if total is not None)
            clock = self._start_clock(candidates[0].timeouts.model_copy(update={"body": silence, "total": total}))
            await self._collect(clock, silence)
            if self._read is None:
                raise RequestError("body_too_large")
            model = self._read.model
        route = routes.choose(candidates, model)
        if route is None:
            raise self._proxy.router.no_route(self._request.method, routes.normal_path(path), model)
        return route, path, query

    def _start_clock(self, timeouts: Timeouts) -> Clock:
        if self._clock is not None:
            self._clock.stop()
        self._clock = Clock(self._loop, timeouts, self._received_at, self._missed)
        return self._clock

    async def _collect(self, clock: Clock, patience: float) -> None:
        """Waits for the body, and reads it, unless it is larger than what is collected of one."""
        body, most, size = self._request.body, self._proxy.max_body, 0
        if self._read is not None or self._read_what_came():
            return
        clock.enter("body", perf_counter())
        self._continue()
        read = RequestReader()
        assert self._ticket is not None
        self._ticket.collects = True
        try:
            while size <= most and (part := await body.collect(patience)):
                clock.touched = perf_counter()
                read.feed(part)
                size += len(part)
        finally:
            self._ticket.collects = False
        if size <= most:
            self._read = read

    def _read_what_came(self) -> bool:
        """Reads the body if all of it has come; returns whether it has."""
        whole = self._request.body.whole
        if whole is None:
            return False
        if sum(map(len, whole)) <= self._proxy.max_body:
            self._read = RequestReader()
            for part in whole:
                self._read.feed(part)
        return True

    def _continue(self) -> None:
        """Tells a client that asked to, once, that it may send its body (RFC 9110, section 10.1.1)."""
        request, transport = self._request, self._downstream.transport
        if (
            request.fields.named(b"expect")
            and request.version == (1, 1)
            and not (request.body.ended or self._continued)
            and transport is not None
        ):
            self._continued = True
            transport.write(_CONTINUE)

    async def _ask(
        self, upstream: Upstream, target: str, asking: Splice | None, model: str | None, clock: Clock, *, inspect: bool
    ) -> ResponseHead:
        """Phases 3 to 5: one attempt, or two if the first met a connection that was already dead.

        The client's body is sent, with `asking` put into it if there is such a change.
        """
        request, body, ticket = self._request, self._request.body, self._ticket
        exchange = self._recorded()
        assert ticket is not None
        # Whether the upstream takes what is asked for is known afterwards; if it does not, the client's own is sent.
        ticket.spare = asking is None or upstream.takes_stream_options(model) is True
        idempotent = request.method in _SAFE_METHODS or bool(request.fields.named(b"idempotency-key"))

        def outgoing(reused: bool) -> Outgoing:
            whole = body.whole
            framing = request.framing
            if whole is None:
                body.keeps = _MAX_REPEATED if reused else 0
                parts = []
            else:
                body.keeps = sum(map(len, whole)) if reused or not ticket.spare else 0
                parts = body.take() if asking is None else list(asking.into(body.take()))
                framing = None if framing is None else sum(map(len, parts))
            head = self._head_out(upstream, target, framing, inspect=inspect)
            rest = body if whole is None else None
            if rest is not None:
                self._continue()
            return Outgoing(request.method, head, parts, rest, framing == "chunked", idempotent)

        again = False
        while True:
            attempt = self._attempt = Attempt(upstream, exchange, clock, self.fail, self._released)
            try:
                return await attempt.head(outgoing, fresh=again)
            except UpstreamError:
                attempt.end()
                if again or not attempt.can_be_repeated or not body.begin_again():
                    raise
                again = True

    def _head_out(self, upstream: Upstream, target: str, framing: Framing | None, *, inspect: bool) -> bytes:
        """The head of the request as it goes upstream."""
        request, peer = self._request, self._downstream.address
        return headers.serialize(
            b"%b %b HTTP/1.1" % (request.method.encode(), target.encode("utf-8", "surrogateescape")),
            headers.to_upstream(
                request.fields,
                host=upstream.host,
                framing=framing_fields(framing),
                peer=peer.encode() or b"unknown",
                trusted=self._proxy.trusts(peer),
                scheme=b"https" if self._downstream.is_tls else b"http",
                request_id=self._request_id,
                credential=upstream.credential,
                inspect=inspect,
            ),
        )

    def _released(self) -> None:
        gone_at = self._downstream.gone_at
        if gone_at is not None:
            self._recorded().observer.released(perf_counter() - gone_at)

    async def _refuses_stream_options(self, head: ResponseHead, clock: Clock) -> bool:
        """Whether the response says so; it is given up then, and otherwise still to be forwarded."""
        assert self._attempt is not None
        connection = self._attempt.connection
        assert connection is not None
        if head.status not in REFUSAL_STATUSES or not head.framing or not self._request.body.begin_again():
            return False
        clock.enter("idle", perf_counter())
        peek = Peek(connection, head.framing, _MAX_REFUSAL)
        if REFUSED not in await peek.look():
            peek.put_back()
            return False
        if peek.whole and not self._attempt.uploads:
            connection.release(reusable=head.reusable)
        # What still uploads, writes on the connection.
        self._attempt.end()
        return True

    def _respond(
        self,
        head: ResponseHead,
        kind: headers.BodyKind,
        dialect: Dialect,
        clock: Clock,
        heartbeat: float | None,
        *,
        asked: bool,
        strip: bool,
    ) -> None:
        """Sends the head downstream, and begins phase 6, Body, which is labelled as `kind`.

        `asked`: the client wants a stream. `strip`: usage was asked for that it does not want.
        """
        request, downstream, transport = self._request, self._downstream, self._downstream.transport
        attempt, exchange = self._attempt, self._exchange
        assert attempt is not None
        connection = attempt.connection
        assert connection is not None
        assert exchange is not None
        assert transport is not None
        succeeded = 200 <= head.status < 300
        event_stream = head.framing is not None and (kind == "events" or (kind == "open" and asked and succeeded))
        # A stream that is labelled as JSON has no length before it has ended.
        maybe = event_stream or (kind == "json" and asked and succeeded and not isinstance(head.framing, int))
        strips = strip and maybe and head.framing not in (None, 0) and not headers.is_encoded(head.fields)
        stripper = UsageStripper() if strips else None
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
        exchange.upstream_request_id = headers.upstream_request_id(head.fields)
        if attempt.uploads:
            request.body.forget()
        else:
            request.body.close()
        reusable = head.reusable and not attempt.uploads
        if head.framing is None or head.framing == 0:
            transport.write(head_out)
            connection.release(reusable=reusable)
        else:
            assert self._framing_out is not None
            self._pump = Pump(
                connection,
                downstream,
                exchange,
                self._inspector(head, kind, dialect, exchange),
                clock,
                framing_in=head.framing,
                framing_out=self._framing_out,
                reusable=reusable,
                # Whoever does not know that it is a stream must not find one in it.
                heartbeat=heartbeat if kind == "events" else None,
                stripper=stripper,
            )
            self._pump.start(head_out)

    async def _flush(self) -> None:
        """The end of phase 6: the client takes the last bytes."""
        downstream, transport = self._downstream, self._downstream.transport
        if transport is not None and transport.get_write_buffer_size():
            assert self._clock is not None
            self._flushing = True
            self._clock.only_client(downstream.stall_detector())
            await downstream.flushed()

    def _inspector(self, head: ResponseHead, kind: headers.BodyKind, dialect: Dialect, exchange: Exchange) -> Inspector:
        """What reads the body, by what was asked and by the `kind` that it is labelled as."""
        # What another GET fetches was counted when it was generated.
        posted = self._request.method == "POST"
        if not (kind == "events" or posted or dialect.keeps):
            return Inspector(exchange)
        if headers.is_encoded(head.fields):
            exchange.unread = "encoded"
            return Inspector(exchange)
        may_stream = exchange.is_stream or (dialect.generates and exchange.succeeded)
        if kind == "json" and not (may_stream and not isinstance(head.framing, int)):
            return JsonInspector(exchange, dialect)
        if may_stream and kind != "other":
            return StreamInspector(exchange, dialect, self._proxy.limits.event)
        if posted and exchange.succeeded:
            exchange.unread = "unknown"
        return Inspector(exchange)
