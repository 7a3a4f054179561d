"""The life of a request, in numbered phases. The last phase always runs, and records the exchange.

1. *Admit*: checks the limits and the head of the request.
2. *Route*: finds out who calls, and finds the route. If it depends on the model, the body is collected first.
3. *Connect*: gets a connection to the upstream, pooled or new.
4. *Send*: sends the request head immediately, and the body as it arrives.
5. *Head*: waits for the response head, and sends it to the client before any byte of the body.
6. *Body*: the pump forwards the body.
7. *End*: releases everything that the request occupies, and both connections, and records the one outcome.

Phases 3 to 5 are an *attempt*. There may be several: see `asking`. If the client leaves, the current phase is
cancelled. If a deadline passes, or the drain timeout, the current phase fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from operator import attrgetter
from time import perf_counter
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from ..errors import (
    ExchangeError,
    InternalError,
    LimitExceeded,
    Outcome,
    ProtocolError,
    RequestError,
    StalledClient,
    UpstreamError,
    UpstreamTimeout,
)
from ..wire import headers
from ..wire.coding import READABLE, Inflater, coding_of
from ..wire.credentials import has, has_key, is_astray, keys_in, strays, without_key
from ..wire.dialects import Dialect, Style, as_read, dialect_of, model_in, style_of
from ..wire.form import FormReader
from ..wire.framing import Framing, framing_fields
from ..wire.request import RequestReader, reader_of
from ..wire.sse import MarkStripper, Stripper
from ..wire.target import is_for_the_server, split_target, without_host
from ..wire.usage import UsageStripper
from . import routes
from .admission import Ticket
from .answers import Answer, date, response_head, status_line
from .asking import DO_NOT_RETRY, Asked, Asking, Question
from .clients import Clients, Visit
from .clock import Clock
from .downstream import Request, new_request_id
from .exchange import Exchange
from .inspect import inspector_of
from .models import asks_for_models, merged
from .pump import Pump

if TYPE_CHECKING:
    from ..config import Route, Timeouts
    from .proxy import Proxy

log = logging.getLogger(__name__)

# A request may pass through sseproxy several times on purpose. More often than this, it is a loop.
_MAX_PASSES: Final = 8
# Statuses with which a Location says where to go on (RFC 9110, section 10.2.2).
_WITH_LOCATION: Final = frozenset({201, 300, 301, 302, 303, 307, 308})
# Bytes of a key that is also looked for where it is not expected.
_MIN_STRAY: Final = 20
_IS_OPEN: Final = attrgetter("open")


def _is_preflight(request: Request) -> bool:
    """Whether it is a CORS preflight (https://fetch.spec.whatwg.org/#cors-preflight-request)."""
    fields = request.fields
    return (
        request.method == "OPTIONS"
        and bool(fields.named(b"origin") and fields.named(b"access-control-request-method"))
        and not request.framing
    )


class Relay:
    """One active exchange. Call `run` once."""

    def __init__(self, proxy: Proxy, request: Request) -> None:
        downstream = request.connection
        task = asyncio.current_task(downstream.loop)
        assert task is not None
        self._proxy = proxy
        self._request = request
        self._downstream = downstream
        self._task = task
        self._received_at = max(downstream.read_at, downstream.free_at)
        # The path that was asked, and the name of its dialect: they tell which style of errors the client understands.
        self._asked_as = (request.target.partition("?")[0], "auto")
        self._coding = coding_of(request.fields.tokens(b"content-encoding"))
        # Reads the whole body before the request is sent.
        self._read: RequestReader | FormReader | None = None
        # Reads the body while it is being forwarded.
        self._passing: RequestReader | FormReader | None = None
        # What a client may and does use, if there are clients and this is the request of one.
        self._visit: Visit | None = None
        # It is a CORS preflight. It needs no key of a client, so the upstream's key is not sent with it.
        self._keyless = False
        self._ticket: Ticket | None = None
        self._exchange: Exchange | None = None
        self._clock: Clock | None = None
        self._asking: Asking | None = None
        self._pump: Pump | None = None
        self._flushing = False
        self._framing_out: Framing | None = None
        self._head_sent = False
        self._keep_alive = False
        self._error: ExchangeError | None = None

    @property
    def exchange(self) -> Exchange | None:
        """The record of the exchange, once there is one."""
        return self._exchange

    def fail(self, error: ExchangeError) -> None:
        """Ends the exchange with `error`, from another task or a callback. Only the first error counts."""
        if self._error is not None:
            return
        if self._pump is None or self._flushing:
            self._error = error
            self._task.cancel()
        elif not self._pump.done.done():
            self._pump.fail(error)
            self._error = error

    def _deadline_passed(self, error: ExchangeError) -> None:
        """Fails the attempt, if `error` is about one of its deadlines, or else the exchange."""
        of_attempt = isinstance(error, UpstreamTimeout) and error.phase != "total"
        attempt = self._asking.attempt if self._asking is not None else None
        if not (of_attempt and attempt is not None and attempt.fail(error)):
            self.fail(error)

    def _gone(self) -> None:
        """Called when the client has left."""
        if self._asking is not None:
            self._asking.end()
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
                if (answer := await self._relay()) is not None:
                    outcome = self._recorded().completed()
                    return answer
                # This waits here and not in `_relay`, so that the frames of `_relay` are freed: a stream may take long.
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
            # Even after an internal error, the client gets a response, and the exchange gets an outcome.
            log.exception("internal error in an exchange")
            return self._refuse(InternalError())
        finally:
            self._end(outcome)

    def _cancelled(self) -> Outcome:
        """The outcome when this task was cancelled. Usually the client has left.

        If the body had already ended and this task had not noticed yet, it is the outcome of the body.
        """
        if self._downstream.gone_at is None:
            # The client has not left: the worker is ending.
            return Outcome.DRAINED
        body = self._pump.done if self._pump is not None else None
        if body is None or not body.done() or body.cancelled() or self._flushing:
            return self._recorded().client_left()
        error = body.exception()
        return self._failed(error) if isinstance(error, ExchangeError) else self._recorded().completed()

    def _failed(self, error: ExchangeError) -> Outcome:
        exchange = self._recorded()
        outcome = exchange.failed(error)
        if isinstance(error, UpstreamError):
            error.attempts = exchange.attempts
        if outcome is not error.outcome:
            return outcome
        exchange.reason, exchange.cause = error.code, error.cause
        if isinstance(error, UpstreamError):
            exchange.observer.upstream_failed(error.kind, answered=exchange.head_at is not None)
        elif isinstance(error, RequestError):
            exchange.observer.rejected(error.reason)
            if isinstance(error, LimitExceeded):
                exchange.observer.limited(exchange.client_name, error.limit)
        return outcome

    def _end(self, outcome: Outcome) -> None:
        """Phase 7: End. Raises nothing: an error here must not replace the response."""
        ends: list[Callable[[], object]] = []
        if self._ticket is not None:
            ends.append(self._ticket.give_back)
        ends.append(self._request.body.close)
        if self._pump is not None:
            ends.append(self._pump.stop)
        if self._asking is not None:
            ends.append(self._asking.end)
        if self._clock is not None:
            ends.append(self._clock.stop)
        if self._asking is not None:
            ends.append(partial(self._asking.judge, outcome))
        ends.append(partial(self._record, outcome))
        if self._visit is not None:
            ends.append(self._visit.release)
        # All of these run, even if another one raises. Only the log tells of that.
        for end in ends:
            try:
                end()
            except Exception:
                log.exception("internal error at the end of an exchange")
        # This breaks reference cycles, so that all these objects are freed now, without the garbage collector.
        if self._asking is not None:
            self._asking.attempt = None
        del self._task
        self._ticket = self._clock = self._asking = self._pump = None

    def _record(self, outcome: Outcome) -> None:
        self._proxy.active.discard(self)
        self._downstream.on_gone = None
        self._downstream.free_at = perf_counter()
        exchange = self._exchange or self._recorded()
        try:
            if self._passing is not None:
                exchange.model = exchange.model or self._passing.model_so_far
            exchange.count_once(self._proxy.counted)
            if self._visit is not None:
                self._visit.settle(exchange)
        finally:
            exchange.finish(outcome)

    def _recorded(self, route: str = "", upstream: str = "") -> Exchange:
        """The record of the exchange. Creates it if there is none yet."""
        if self._exchange is None:
            observer = self._proxy.observer(route, upstream, routes.OTHER)
            exchange = Exchange(route, upstream, observer, self._request.id.decode(), self._received_at)
            self._exchange = exchange
            if self._visit is not None:
                exchange.client_name = self._visit.client.name
            exchange.begin()
            exchange.client = self._client_address()
            exchange.method = self._request.method
            target = self._request.target
            # The host of an absolute target may have a user and a password before it.
            exchange.path = (target if target[0] == "/" else without_host(target)).partition("?")[0]
            exchange.traceparent = headers.traceparent(self._request.fields)
        return self._exchange

    def _client_address(self) -> str:
        return headers.client_address(self._request.fields, self._downstream.address, self._proxy.trusts)

    @property
    def _style(self) -> Style:
        """The style in which the client understands what sseproxy itself writes."""
        path, name = self._asked_as
        return style_of(routes.normal_path(path), name)

    def _can_keep_alive(self) -> bool:
        """Whether the connection can be used for another request.

        It can if all of this request has been received and the end of its response does not close the connection.
        """
        return (
            self._request.keep_alive
            and not (self._proxy.draining or self._proxy.retiring)
            and self._request.body.ended
            and self._framing_out != "close"
        )

    def _refuse(self, error: ExchangeError) -> Answer:
        """The error response. If a response head was sent already, breaks the connection instead."""
        early = self._asking.early if self._asking is not None else None
        if early is not None and early.sent and self._pump is None:
            early.write(early.style.error_event(error, 0))
        if self._head_sent:
            self._downstream.cut(flush=self._framing_out != "close" and not isinstance(error, StalledClient))
            return Answer(keep_alive=False)
        exchange = self._recorded()
        exchange.status = error.status
        extra = [(b"X-Request-Id", self._request.id)]
        exhausted = self._asking is not None and self._asking.exhausted and isinstance(error, UpstreamError)
        if error.final or exhausted:
            # An operator has ended it, or all attempts have failed. SDKs would send it again, twice.
            extra.append(DO_NOT_RETRY)
        elif error.status in (429, 503):
            extra.append((b"Retry-After", b"%d" % ceil(error.retry_after)))
        if error.status == 401:
            # RFC 9110, section 15.5.2.
            extra.append((b"WWW-Authenticate", b"Bearer"))
        if error.status == 415:
            # RFC 9110, section 12.5.3.
            extra.append((b"Accept-Encoding", b", ".join(READABLE)))
        misread = error.code in ("bad_request", "version", "head_too_large")
        if misread:
            # Other parsers may read such a request differently, so nothing after it can be trusted.
            self._downstream.read_no_more()
        last = misread or self._downstream.refused is not None or error.code == "too_many_wrong_keys"
        style = self._style
        if isinstance(error, LimitExceeded) and self._visit is not None:
            # The SDKs of OpenAI and Anthropic look for it first.
            extra.append((b"Retry-After-Ms", b"%d" % ceil(error.retry_after * 1000)))
            extra += self._visit.allowances(style) or ()
        answer = Answer.of(error, style, keep_alive=not last and self._can_keep_alive(), extra=extra)
        exchange.response_bytes += 0 if self._request.method == "HEAD" else len(answer.body)
        return answer

    async def _relay(self) -> Answer | None:
        """Phases 1 to 5, and the beginning of 6; or the answer, where the request is for this server itself."""
        self._admit()
        if self._request.method == "OPTIONS" and self._ends_here():
            self._recorded().status = 200
            keep_alive = self._can_keep_alive()
            return Answer.to_options(keep_alive=keep_alive, extra=[(b"X-Request-Id", self._request.id)])
        route, path, query = await self._route()
        proxy, request = self._proxy, self._request
        upstream = proxy.upstreams[route.upstream[0].name]
        exchange = self._recorded(route.name, upstream.name)
        assert self._ticket is not None
        self._ticket.enter(route.name)
        clock = self._start_clock(route.timeouts)
        known_as = routes.normal_path(routes.upstream_path(route, upstream.base_path, path))
        self._asked_as = known_as, route.dialect
        dialect = dialect_of(known_as, route.dialect)

        if route.merge_models and asks_for_models(request.method, routes.normal_path(path), route.match.path):
            return await self._list_models(route, dialect.style, clock)
        is_json, plain = headers.is_json(request.fields), self._coding == b""
        # Other forms are files, which have no model and may be large.
        tells_model = is_json or (dialect.generates and headers.is_form(request.fields))
        wants_usage = route.usage.request and dialect.asks_usage and is_json and plain
        visit = self._visit
        if (
            wants_usage
            or (proxy.models and tells_model and self._coding is not None)
            or (route.name in proxy.reads_bodies and is_json and plain)
            or (
                visit is not None
                and visit.reads_body(generates=dialect.generates and not headers.is_form(request.fields))
            )
        ):
            await self._collect(clock, route.timeouts.body)
        elif (
            tells_model
            and plain
            and (dialect.generates or proxy.names_models)
            and self._read is None
            and not self._read_what_came()
        ):
            # The body is forwarded as it arrives, and read at the same time. If it asks for a stream, the response is
            # one, whatever its Content-Type is.
            self._passing = reader_of(request.fields)
            request.body.watched_by(self._passing.feed)
        read, self._read = self._read, None
        if visit is not None:
            # In a coding that is not known, bytes that can be read may mean something else.
            readable = read is not None and self._coding is not None
            visit.check_model(known_as, read=readable, has_body=bool(request.framing))
            posts = request.method == "POST"
            asking_server = visit.begin(generates=dialect.generates and posts, reports=is_json and posts)
            if asking_server is not None:
                await asking_server
        model = (None if read is None else read.model) or model_in(known_as)
        exchange.model, exchange.api = model, dialect.name
        exchange.fetches = dialect.keeps and request.method != "POST"
        exchange.observer = proxy.observer(route.name, upstream.name, routes.model_label(proxy.models, model))
        # Responses to other requests are not generated. They are not inspected, so the upstream may compress them.
        inspect = dialect.generates or request.method == "POST"
        question = Question(
            route,
            path,
            query,
            dialect,
            model,
            read,
            self._passing,
            self._coding,
            wants_usage,
            inspect,
            with_key=not self._keyless,
        )
        asking = self._asking = Asking(
            proxy, request, exchange, self._ticket, clock, question, self.fail, self._early_head
        )
        asked = await asking.answer()
        if self._passing is not None:
            exchange.model = exchange.model or self._passing.model_so_far
        kind = headers.body_kind(asked.head.fields)
        # Only what is labelled as JSON without a length, or as nothing in particular, may be a stream all the same.
        unclear = kind == "open" or (kind == "json" and not isinstance(asked.head.framing, int))
        streams = unclear and asking.streams(kind)
        # These are only needed to send the request. They are freed, because a stream may take long.
        del read, question
        asking.forget()
        request.answered()
        if asked.head.status in _WITH_LOCATION:
            asked.head.fields = asked.endpoint.rewrite_location(asked.head.fields, route)
        self._respond(asking, asked, kind, dialect, clock, route.heartbeat, streams=streams)
        return None

    async def _list_models(self, route: Route, style: Style, clock: Clock) -> Answer:
        """The models of all endpoints of `route` that the client may use."""
        extra, allowed = [(b"X-Request-Id", self._request.id)], None
        if self._visit is not None:
            if (asking_server := self._visit.begin(generates=False, reports=False)) is not None:
                await asking_server
            allowed = self._visit.client.may_use
        clock.enter("head", perf_counter())
        listed = await self._proxy.models_of[route.name].get(self._request.fields)
        exchange, body = self._recorded(), merged(listed.of.values(), allowed)
        exchange.status = 200
        exchange.response_bytes += len(body)
        if self._visit is not None:
            extra += self._visit.allowances(style) or ()
        return Answer.of_json(body, keep_alive=self._can_keep_alive(), extra=extra)

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
        if not {b"100-continue"}.issuperset(request.fields.tokens(b"expect")):
            raise RequestError("expectation")
        if request.target[0] != "/" and self._is_misdirected():
            raise RequestError("misdirected")

    def _is_misdirected(self) -> bool:
        """Whether it is for a resource of https and did not come over TLS (RFC 9110, section 7.4)."""
        told = self._request.target.lower().startswith("https:")
        return told and not (self._downstream.is_tls or self._proxy.trusts(self._downstream.address))

    def _ends_here(self) -> bool:
        """Whether an OPTIONS request is for this server itself: it says so, or may not be forwarded any more."""
        request = self._request
        if is_for_the_server(request.target):
            return True
        try:
            fields = headers.one_hop_less(request.fields)
        except ProtocolError as error:
            raise RequestError("bad_request", cause=str(error)) from None
        if fields is not None:
            request.fields = fields
        return fields is None

    async def _route(self) -> tuple[Route, str, str]:
        """Phase 2: Route. Returns the route, the path and the query."""
        path, query = split_target(self._request.target)
        candidates = self._proxy.router.candidates(self._request.method, path)
        if self._proxy.clients is not None:
            query = self._identify(self._proxy.clients, candidates, path, query)
        model: str | None = None
        if any(route.match.model for route in candidates):
            if self._coding is None and self._request.framing:
                raise RequestError("encoding")
            # The route is not known yet, so the longest timeouts of all candidates hold.
            silence = max(route.timeouts.body for route in candidates)
            totals = [route.timeouts.total for route in candidates]
            total = None if None in totals else max(total for total in totals if total is not None)
            clock = self._start_clock(replace(candidates[0].timeouts, body=silence, total=total))
            await self._collect(clock, silence)
            if self._read is None:
                raise RequestError("body_too_large")
            model = self._read.model
        # A preflight names no model, and whoever has no key is not told which ones there are.
        route = candidates[0] if self._keyless else routes.choose(candidates, model)
        if route is None:
            raise self._proxy.router.no_route(self._request.method, routes.normal_path(path), model)
        if self._visit is not None and self._visit.client.routes:
            # The upstream may read the path as one of other routes.
            others = self._proxy.router.candidates(self._request.method, as_read(path))
            for one in (route, *(others if others != candidates else ())):
                self._visit.client.check_route(one)
        return route, path, query

    def _identify(self, clients: Clients, candidates: Sequence[Route], path: str, query: str) -> str:
        """Finds out who calls, before anything of the body is read. Returns the query without the client's key.

        A key is needed, unless all routes that the request may take are open. A CORS preflight never has one (Fetch,
        section 3.2.2): it may have no body then, and the upstream's key is not sent with it.
        """
        request, found = self._request, keys_in(self._request.fields, query)
        keys = set(found)
        if candidates:
            self._asked_as = self._asked_as[0], candidates[0].dialect
        target = request.target.encode(errors="surrogateescape")
        for key in keys:
            # A shorter text may occur elsewhere by chance, and is no random key. Nearly all keys are where they belong,
            # and only there.
            if len(key) >= _MIN_STRAY and (b"%" in target or is_astray(key, found.count(key), request.fields, target)):
                query = self._hide(key, path, query)
        if candidates and _is_preflight(request):
            self._keyless = True
        elif not candidates or not all(map(_IS_OPEN, candidates)):
            self._visit = Visit(clients.caller(keys, self._client_address), clients.server)
        return query

    def _hide(self, key: bytes, path: str, query: str) -> str:
        """Removes `key`, where it is not expected, from what is forwarded and logged. Returns the query without it."""
        request = self._request
        if has(request.id, key):
            request.id = new_request_id()
        if has_key(path, key):
            request.target = "/"
            raise RequestError("bad_target", "The request target has a key in its path.")
        if names := strays(request.fields, key):
            request.fields = request.fields.without(names)
        return without_key(query, key) if has_key(query, key) else query

    def _start_clock(self, timeouts: Timeouts) -> Clock:
        if self._clock is not None:
            self._clock.stop()
        self._clock = Clock(self._downstream.loop, timeouts, self._received_at, self._deadline_passed)
        return self._clock

    async def _collect(self, clock: Clock, grace: float) -> None:
        """Waits for the whole body, and reads it, unless it is larger than `max_body`."""
        body, most, size = self._request.body, self._proxy.max_body, 0
        if self._read is not None or self._read_what_came():
            return
        clock.enter("body", perf_counter())
        self._request.send_continue()
        read, feed = self._reader()
        assert self._ticket is not None
        self._ticket.collects = True
        try:
            while size <= most and (part := await body.collect(grace)):
                clock.touched = perf_counter()
                if not self._coding:
                    feed(part)
                size += len(part)
        finally:
            self._ticket.collects = False
        if size <= most and (not self._coding or await self._inflate(self._coding, feed, clock)):
            self._read = read

    def _reader(self) -> tuple[RequestReader | FormReader, Callable[[bytes], None]]:
        """What reads the body, and what takes its parts."""
        fields = self._request.fields
        read = reader_of(fields)
        return read, read.feed if self._visit is None else self._visit.feeding(read, fields)

    async def _inflate(self, coding: bytes, feed: Callable[[bytes], None], clock: Clock) -> bool:
        """Reads the compressed body that was collected. Returns False if it is larger than `max_body` without that."""
        inflater = Inflater(coding, self._proxy.max_body)
        # One at a time, because a few bytes of a client can cost much CPU.
        async with self._proxy.inflating:
            for part in self._request.body.whole or ():
                for piece in inflater.pieces(part):
                    feed(piece)
                    # A few bytes may stand for many: others have their turns in between.
                    clock.touched = perf_counter()
                    await asyncio.sleep(0)
        return not inflater.too_much

    def _read_what_came(self) -> bool:
        """Reads the body if all of it has been received and it is not compressed. Returns whether that is so."""
        whole = self._request.body.whole
        if whole is None or self._coding:
            return False
        if sum(map(len, whole)) <= self._proxy.max_body:
            self._read, feed = self._reader()
            for part in whole:
                feed(part)
        return True

    def _early_head(self, content_type: bytes) -> bytes:
        """The head of an event stream that is sent now, before it is known which endpoint will answer."""
        request, exchange = self._request, self._recorded()
        self._framing_out = "chunked" if request.version == (1, 1) else "close"
        self._keep_alive = self._can_keep_alive()
        self._head_sent = True
        exchange.head_received(200, event_stream=True)
        return headers.serialize(
            status_line(200),
            headers.to_downstream(
                headers.Fields([(b"Content-Type", content_type)]),
                version=(1, 1),
                framing=framing_fields(self._framing_out),
                event_stream=True,
                request_id=request.id,
                connection=self._connection_option(),
                date=date(),
                allowances=None if self._visit is None else self._visit.allowances(self._style),
            ),
        )

    def _connection_option(self) -> bytes | None:
        """The value of Connection in the response, if it has one."""
        if not self._keep_alive:
            return b"close"
        return b"keep-alive" if self._request.version == (1, 0) else None

    def _respond(
        self,
        asking: Asking,
        asked: Asked,
        kind: headers.BodyKind,
        dialect: Dialect,
        clock: Clock,
        heartbeat: float | None,
        *,
        streams: bool,
    ) -> None:
        """Sends the response head to the client, and begins phase 6, Body. `kind` is what the body is labelled as.

        `streams`: the client wants a stream, and the label does not say that this is none.
        """
        request, downstream, transport = self._request, self._downstream, self._downstream.transport
        head, attempt, exchange = asked.head, asking.attempt, self._exchange
        assert attempt is not None
        connection = attempt.connection
        assert connection is not None
        assert exchange is not None
        assert transport is not None
        succeeded = 200 <= head.status < 300
        event_stream = head.framing is not None and (kind == "events" or (kind == "open" and streams and succeeded))
        # A stream that is labelled as JSON has no length before it has ended.
        maybe = event_stream or (kind == "json" and streams and succeeded and not isinstance(head.framing, int))
        strips = asked.strip and maybe and head.framing not in (None, 0) and not headers.is_encoded(head.fields)
        stripper: Stripper | None = UsageStripper() if strips else None
        begun = asking.early is not None and asking.early.sent
        if begun:
            # A heartbeat has gone out already.
            stripper = MarkStripper(stripper)
            head_out = b""
        else:
            if head.framing is None or (isinstance(head.framing, int) and stripper is None):
                self._framing_out = head.framing
            else:
                self._framing_out = "chunked" if request.version == (1, 1) else "close"
            self._keep_alive = self._can_keep_alive()
            head_out = response_head(
                head,
                request.id,
                # Responses to HEAD, and 304, have the length of a body that is not sent; a 204 has no such field.
                framing=None if head.framing is None and head.status != 204 else framing_fields(self._framing_out),
                event_stream=event_stream,
                connection=self._connection_option(),
                date=date(),
                allowances=None if self._visit is None else self._visit.allowances(dialect.style),
            )
            self._head_sent = True
            exchange.head_received(head.status, event_stream)
        exchange.upstream_request_id = headers.upstream_request_id(head.fields)
        if attempt.uploads:
            request.body.forget()
        else:
            request.body.close()
        reusable = head.reusable and not attempt.uploads
        if head.framing is None or (head.framing == 0 and not begun):
            transport.write(head_out)
            connection.release(reusable=reusable)
        else:
            assert self._framing_out is not None
            self._pump = Pump(
                connection,
                downstream,
                exchange,
                inspector_of(request.method, head, kind, dialect, exchange, self._proxy.limits.event),
                clock,
                framing_in=head.framing,
                framing_out=self._framing_out,
                reusable=reusable,
                began_at=attempt.began_at,
                # Heartbeats are only sent if the Content-Type says that it is an event stream.
                heartbeat=heartbeat if kind == "events" else None,
                stripper=stripper,
            )
            self._pump.start(head_out)

    async def _flush(self) -> None:
        """The end of phase 6: waits until the client has read the last bytes."""
        downstream, transport = self._downstream, self._downstream.transport
        if transport is not None and transport.get_write_buffer_size():
            assert self._clock is not None
            self._flushing = True
            self._clock.only_client(downstream.stall_detector())
            await downstream.flushed()
