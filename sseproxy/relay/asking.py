"""Asks endpoints until one has an answer: phases 3 to 5, as often as necessary.

With one endpoint this is one attempt. Otherwise a `Course` says which endpoint is asked next. The beginning of an
answer may be held back until it is clear that it is usable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Final

import msgspec

from ..errors import ExchangeError, Outcome, RequestError, TooManyConnects, Truncated, UpstreamError
from ..wire import headers
from ..wire.credentials import without_key
from ..wire.dialects import Dialect, asks_for_stream
from ..wire.form import FormReader
from ..wire.framing import Framing, framing_fields
from ..wire.refusals import is_too_long
from ..wire.request import RequestReader, Splice, changed
from ..wire.usage import REFUSAL_STATUSES, REFUSED
from . import affinity, routes
from .admission import Ticket
from .answers import response_head
from .attempt import Attempt, Outgoing, Verdict
from .clock import Clock
from .downstream import Request
from .exchange import Exchange
from .heads import ResponseHead
from .hold import UNOBSERVED, EarlyHead, Hold
from .inspect import inspector_of
from .pool import Upstream, micros
from .pump import Peek
from .retry import Course, Failure, Repeatable, Step, failure_in, failure_of
from .upstream import Endpoint, UpstreamConnection

if TYPE_CHECKING:
    from ..config import Route, Target
    from .proxy import Proxy

# Bytes of an error response that are searched for a refused option. Such responses are short.
_MAX_REFUSAL: Final = 64 * 1024
# Bytes of a body that are kept while it is forwarded, in case it has to be sent again.
_MAX_REPEATED: Final = 1024 * 1024
# Fields that only the first upstream of a route gets, beside the client's key. They may be credentials.
_OF_THE_FIRST: Final = frozenset({b"cookie"})
# The safe methods (RFC 9110, section 9.2.1), except TRACE, which is not relayed.
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
# openai-python, openai-node and others obey it.
DO_NOT_RETRY: Final = (b"X-Should-Retry", b"false")
# What the outcome of an exchange says of the endpoint that was asked last. All others say nothing.
_JUDGEMENTS: Final[dict[Outcome, tuple[str, Verdict]]] = {
    Outcome.COMPLETED: ("completed", "succeeded"),
    Outcome.UPSTREAM_ERROR: ("error", "failed"),
    Outcome.TRUNCATED: ("truncated", "failed"),
    Outcome.UPSTREAM_TIMEOUT_FIRST_TOKEN: ("timeout", "failed"),
    Outcome.UPSTREAM_TIMEOUT_IDLE: ("timeout", "failed"),
    Outcome.CLIENT_GONE_MID_STREAM: ("client_gone", "succeeded"),
    Outcome.CLIENT_GONE_BEFORE_FIRST_TOKEN: ("client_gone", "open"),
    Outcome.CLIENT_GONE_BEFORE_HEAD: ("client_gone", "open"),
}


class Question(msgspec.Struct, frozen=True):
    """The request, in the form that is the same for every endpoint."""

    route: Route
    path: str
    query: str
    dialect: Dialect
    model: str | None
    read: RequestReader | FormReader | None
    """The body, if it was read in advance."""
    passing: RequestReader | FormReader | None
    """What reads the body while it is being forwarded."""
    coding: bytes | None
    wants_usage: bool
    inspect: bool
    with_key: bool
    """Whether the upstream's key is sent."""


class Asked(msgspec.Struct, frozen=True):
    """A response head, the endpoint that sent it, and whether usage was requested that the client does not want."""

    head: ResponseHead
    endpoint: Endpoint
    strip: bool


class Asking:
    """Asks for one exchange. `fail` ends the exchange with an error. Call `answer` once, and `end` at the end.

    `early_head(content_type)` makes the head of a response that goes out before it is known whose answer it is. It is
    called when that is sent.
    """

    __slots__ = (
        "_clock",
        "_early_head",
        "_exchange",
        "_fail",
        "_hold",
        "_proxy",
        "_question",
        "_request",
        "_several",
        "_ticket",
        "attempt",
        "early",
    )

    def __init__(
        self,
        proxy: Proxy,
        request: Request,
        exchange: Exchange,
        ticket: Ticket,
        clock: Clock,
        question: Question,
        fail: Callable[[ExchangeError], None],
        early_head: Callable[[bytes], bytes],
    ) -> None:
        self._proxy = proxy
        self._request = request
        self._exchange = exchange
        self._ticket = ticket
        self._clock = clock
        self._question: Question | None = question
        self._fail = fail
        self._early_head = early_head
        # Whether more than one attempt is possible.
        self._several = False
        # What is held back of an answer, until the client gets it, or nobody does.
        self._hold: Hold | None = None
        self.attempt: Attempt | None = None
        """The last attempt."""
        self.early: EarlyHead | None = None
        """The head that went out before it was known whose answer it is, if one did."""

    async def answer(self) -> Asked:
        """The answer, or the last response if none is an answer. Raises `UpstreamError` or `RequestError`."""
        question, proxy = self.question, self._proxy
        only = proxy.only.get(question.route.name)
        if only is not None:
            return await self._ask(*only, None)
        upstream = proxy.alone.get(question.route.name)
        endpoint = None if upstream is None else upstream.choose(question.model, None)
        if upstream is None or endpoint is None or upstream.some_are_out:
            return await self._ask_in_turn(endpoint)
        # Usually the first one that is asked answers. Then nothing more is needed.
        self._several = upstream.has_several
        self._exchange.endpoint = endpoint.label
        try:
            keeps = question.route.retry.max_body if self._several else 0
            asked = await self._ask(upstream, endpoint, None, keeps=keeps)
        except (UpstreamError, TooManyConnects) as error:
            return await self._ask_in_turn(endpoint, error)
        return asked if asked.head.status < 400 else await self._ask_in_turn(endpoint, asked)

    def forget(self) -> None:
        """Drops what is only needed to ask. A stream may take long."""
        self._question = None

    @property
    def question(self) -> Question:
        """What is asked, until `forget`."""
        assert self._question is not None
        return self._question

    @property
    def exhausted(self) -> bool:
        """Whether more than one attempt was possible, so that it is of no use to ask again."""
        return self._several

    def judge(self, outcome: Outcome) -> None:
        """Records what the outcome of the exchange says of the endpoint that was asked last."""
        self._exchange.on_first_token = None
        if self.attempt is not None and not self.attempt.judged:
            self.attempt.judge(*_JUDGEMENTS.get(outcome, ("abandoned", "open")))

    def end(self) -> None:
        """Ends the attempt that is under way."""
        try:
            if self.attempt is not None:
                self.attempt.end()
        finally:
            try:
                if self.early is not None:
                    self.early.stop()
            finally:
                self._discard()

    def streams(self, kind: headers.BodyKind) -> bool:
        """Whether the client wants a stream, or gets one: the body of the response is labelled as `kind`."""
        question = self.question
        path = routes.normal_path(routes.upstream_path(question.route, "", question.path))
        return (
            kind == "events"
            or asks_for_stream(path, question.query)
            or headers.accepts_events(self._request.fields)
            or any(reader is not None and reader.streams for reader in (question.read, question.passing))
        )

    # --- several attempts ---

    async def _ask_in_turn(self, chosen: Endpoint | None, came: Asked | ExchangeError | None = None) -> Asked:
        """Asks as many endpoints as it takes. The first one may be `chosen`, and asked already: then this `came`."""
        question, exchange, body = self.question, self._exchange, self._request.body
        options = question.route.retry
        await self._learn_models(question.route.name)
        course = await self._course_of(question)
        step = course.first(chosen)
        if step is None:
            raise UpstreamError("dns", cause=f"{question.route.upstream[0].name}: no address is known")
        self._several = course.several
        keeps = options.max_body if course.several else 0
        while True:
            asked, error = None, None
            try:
                first, came = came, None
                if isinstance(first, ExchangeError):
                    raise first
                asked = first
                if asked is None:
                    self._goes_to(step)
                    if step.pause:
                        self._clock.pause()
                        await asyncio.sleep(step.pause)
                    exchange.attempts = course.attempts
                    asked = await self._ask(step.upstream, step.endpoint, step.target, later=step.later, keeps=keeps)
                failure = await self._failure(asked.head, step, course)
            except (UpstreamError, TooManyConnects) as raised:
                error, failure = raised, failure_of(raised, begun=self.attempt is not None and self.attempt.begun)
            if failure is None:
                assert asked is not None
                return self._fitting(asked)
            self._note(failure, step)
            following = course.next(failure, self._repeatable()) if body.repeatable else None
            if following is None:
                if error is not None:
                    raise error
                assert asked is not None
                answer = self._fitting(asked)
                self._release(failure)
                if course.several and failure.retry_after is None:
                    answer.head.fields = answer.head.fields.with_only(*DO_NOT_RETRY)
                return answer
            exchange.observer.retried(failure.reason)
            if isinstance(error, UpstreamError):
                exchange.observer.upstream_failed(error.kind, answered=False)
            assert self.attempt is not None
            self._discard()
            self.attempt.end()
            body.begin_again()
            step = following

    async def _learn_models(self, route: str) -> None:
        """Waits for the lists of models, where requests are routed by them and they have never been fetched."""
        models = self._proxy.models_of.get(route)
        if models is None or not models.differ or models.known(self._request.fields) is not None:
            return
        # Without a list, all upstreams are asked in their order. So this may take long, but fails nothing.
        self._clock.pause()
        with suppress(UpstreamError):
            await models.get(self._request.fields)

    async def _course_of(self, question: Question) -> Course:
        route, proxy, read = question.route, self._proxy, question.read
        sources = proxy.upstreams[route.upstream[0].name].affinity
        parts = self._request.body.whole if read is not None and question.coding == b"" else None
        key = await affinity.key_of(sources, self._request.fields, parts) if sources else None
        targets = [
            (target, proxy.upstreams[target.name])
            for target in route.upstream
            # An upstream whose model cannot be put into the request would not know the one that is in it.
            if target.model is None or question.model is None or _renaming(question, target.model)
        ]
        known = proxy.models_of[route.name].known(self._request.fields) if route.name in proxy.models_of else None
        if known is not None and question.model is not None and (having := known.upstreams_with(question.model)):
            # One whose list is not known, or whose model is set, may have it as well.
            targets = [
                (target, upstream)
                for target, upstream in targets
                if upstream.name in having or target.model is not None or upstream.name not in known.of
            ] or targets
        if not targets:
            if question.coding == b"":
                raise RequestError("body_too_large")
            raise RequestError("encoding", "The model of a compressed body cannot be replaced: send it uncompressed.")
        return Course(route.retry, targets, question.model, key, self._exchange.received_at)

    def _repeatable(self) -> Repeatable:
        """When the request may be repeated, as far as it is known now: its body may still be coming."""
        question, request = self.question, self._request
        dialect, reader = question.dialect, question.read or question.passing
        if request.body.received > question.route.retry.max_body:
            # It may have been kept for other reasons.
            return "connect"
        keeps, known = dialect.keeps and request.method == "POST", isinstance(reader, RequestReader)
        if keeps and (dialect.name == "assistants" or not (known and request.body.ended)):
            return "connect"
        if isinstance(reader, RequestReader) and reader.belongs_to_state:
            return "connect"
        return "always" if dialect.generates or self._is_idempotent else "refused"

    def _goes_to(self, step: Step) -> None:
        question, proxy, exchange = self.question, self._proxy, self._exchange
        upstream, model, observer = step.upstream.name, step.target.model or question.model, exchange.observer
        if (upstream, model) != (exchange.upstream, exchange.model):
            observer = proxy.observer(question.route.name, upstream, routes.model_label(proxy.models, model))
        exchange.model = model
        exchange.goes_to(upstream, step.endpoint.label, observer)
        standing = step.endpoint.standing
        exchange.on_first_token = None
        if standing is not None and standing.is_out:
            # The first token is enough to know that it works again.
            exchange.on_first_token = lambda: standing.passed(micros())

    async def _failure(self, head: ResponseHead, step: Step, course: Course) -> Failure | None:
        """Why the response with `head` is not the answer, or None if it is. Raises `UpstreamError`."""
        failure = failure_in(head.status, head.fields, our_key=self._has_our_key(step.endpoint))
        if failure is not None:
            return failure
        if head.status == 400 and course.has_fallback and await self._is_too_long(head):
            return Failure("context")
        if course.several and 200 <= head.status < 300 and self.question.route.retry.until != "head":
            return await self._hold_back(head)
        return None

    @property
    def _connection(self) -> UpstreamConnection:
        assert self.attempt is not None
        assert self.attempt.connection is not None
        return self.attempt.connection

    async def _is_too_long(self, head: ResponseHead) -> bool:
        """Whether the response says that the prompt is too long for the model. Nothing of it is lost."""
        if not head.framing:
            return False
        assert self.attempt is not None
        self._clock.enter("idle", perf_counter())
        peek = Peek(self._connection, head.framing, _MAX_REFUSAL)
        found = is_too_long(await self.attempt.until(peek.look()))
        peek.put_back()
        return found

    async def _hold_back(self, head: ResponseHead) -> Failure | None:
        """Holds back what `retry.until` says. Returns why it is not the answer, or None if it is."""
        question, exchange, attempt = self.question, self._exchange, self.attempt
        assert attempt is not None
        options, kind = question.route.retry, headers.body_kind(head.fields)
        streams = self.streams(kind)
        if head.framing is None or headers.is_encoded(head.fields) or not question.dialect.generates:
            return None
        if options.until == "first_token" and not streams:
            return None
        record = Exchange("", "", UNOBSERVED, "", attempt.began_at)
        record.status = head.status
        record.is_stream = kind == "events" or (kind == "open" and streams)
        begun_at = perf_counter()
        hold = self._hold = Hold(
            self._connection,
            head.framing,
            record,
            inspector_of(self._request.method, head, kind, question.dialect, record, self._proxy.limits.event),
            self._clock,
            until=options.until,
            natural=question.dialect.natural,
            most=options.hold,
            room=self._ticket.hold,
        )
        if kind == "events" and question.route.heartbeat is not None:
            self._begin_early(head, question.route.heartbeat)
        try:
            held = await attempt.until(hold.look())
        finally:
            self._ticket.release(hold.size)
        if held != "answer":
            return Failure(held)
        self._hold = None
        now = perf_counter()
        exchange.observer.held(now - begun_at)
        if hold.has_content:
            # The first token has come in time, whenever it is handed on.
            attempt.began_at = now
        if options.until == "end":
            exchange.was_held = True
            exchange.observer = exchange.observer.of_whole_answers()
        hold.put_back()
        return None

    def _begin_early(self, head: ResponseHead, interval: float) -> None:
        """From now on, the client gets heartbeats, whichever endpoint will answer."""
        if self.early is None and head.status == 200:
            (content_type, *_) = head.fields.named(b"content-type")
            self.early = EarlyHead(
                self._request.connection,
                partial(self._early_head, content_type),
                interval,
                self.question.dialect.style,
                chunked=self._request.version == (1, 1),
            )

    def _fitting(self, asked: Asked) -> Asked:
        """`asked`, if it can still be the response. Otherwise raises `UpstreamError`.

        When a head has gone out, only a stream can follow it, and not in a content coding that it does not name.
        """
        if self.early is not None:
            self.early.stop()
            fields = asked.head.fields
            streams = asked.head.status == 200 and headers.body_kind(fields) == "events"
            if self.early.sent and not (streams and not headers.is_encoded(fields)):
                raise UpstreamError("answer", cause=f"status {asked.head.status}")
        return asked

    def _release(self, failure: Failure) -> None:
        """Lets the client have what was held back of the last attempt, which has failed.

        If the client is to get a whole answer or none, and this is a part of one, raises `UpstreamError`.
        """
        hold = self._hold
        if hold is None:
            return
        if self.question.route.retry.until == "end" and not (failure.reason == "error" and not hold.has_content):
            raise Truncated() if failure.reason in ("truncated", "reset") else UpstreamError("answer")
        self._hold = None
        hold.put_back()

    def _discard(self) -> None:
        """Counts the tokens of what is held back, because nobody gets it."""
        hold, self._hold = self._hold, None
        if hold is not None and hold.usage is not None:
            self._exchange.observer.discarded(hold.usage)

    def _has_our_key(self, endpoint: Endpoint) -> bool:
        """Whether the request has our key for `endpoint`, so that a refusal of the key says something of it."""
        return endpoint.credential is not None and self.question.with_key

    def _note(self, failure: Failure, step: Step) -> None:
        """Records what the failure of an attempt says of its endpoint."""
        assert self.attempt is not None
        verdict: Verdict = "refused" if failure.reason == "connect" else "failed"
        if failure.reason == "429":
            # Another key, or another model, may be free. The client's own key is not ours to judge.
            if self._has_our_key(step.endpoint) and failure.retry_after:
                model = step.target.model or self.question.model or ""
                step.upstream.rest(step.endpoint, model, failure.retry_after)
            verdict = "open"
        elif failure.reason in ("503", "529") and failure.retry_after:
            step.upstream.rest(step.endpoint, None, failure.retry_after)
            verdict = "open"
        elif failure.reason == "pending_connects":
            verdict = "open"
        elif failure.reason == "context":
            verdict = "succeeded"
        self.attempt.judge(failure.reason, verdict)

    # --- one endpoint ---

    async def _ask(
        self, upstream: Upstream, endpoint: Endpoint, target: Target | None, *, later: bool = False, keeps: int = 0
    ) -> Asked:
        """Asks `endpoint`. Up to `keeps` bytes of the body are kept, in case another attempt follows.

        Usage is requested, where the route wants it. If the upstream refuses the option, it is asked without it.
        """
        question, body = self.question, self._request.body
        read, other_model = question.read, None if target is None else target.model
        model = other_model or question.model
        splices = _renaming(question, other_model)
        asking: Splice | None = None
        if question.wants_usage and read is not None and upstream.takes_stream_options(model) is not False:
            asking = read.with_usage()
            if asking is not None and not upstream.takes_stream_options(model) and not body.hold():
                # If the upstream refused the option, there would be no copy of the client's own body to send.
                asking = None
        # As long as it is not known whether the upstream accepts the option, the body may have to be sent again.
        self._ticket.spare = asking is None or upstream.takes_stream_options(model) is True
        if asking is None:
            return Asked(await self._attempt(upstream, endpoint, splices, later, keeps), endpoint, False)
        head = await self._attempt(upstream, endpoint, [*splices, asking], later, keeps)
        if await self._refuses_stream_options(head):
            self._ticket.spare = True
            head = await self._attempt(upstream, endpoint, splices, later, keeps)
            # The error may have had another reason, and only quote the option. If the same request streams without the
            # option, the upstream has refused the option.
            if head.status < 300 and headers.body_kind(head.fields) in ("events", "open"):
                upstream.remember_stream_options(model, taken=False)
            return Asked(head, endpoint, False)
        if head.status < 300:
            upstream.remember_stream_options(model, taken=True)
        return Asked(head, endpoint, True)

    async def _attempt(
        self, upstream: Upstream, endpoint: Endpoint, splices: Sequence[Splice], later: bool, keeps: int
    ) -> ResponseHead:
        """Phases 3 to 5. Returns the response head.

        This takes one attempt, or two if the first one met a pooled connection that the upstream had already closed.
        The body is sent with `splices`.
        """
        question, request, body = self.question, self._request, self._request.body
        idempotent, spare = self._is_idempotent, self._ticket.spare
        # A client's key is for the first upstream of the route: another one may be somebody else's. With `clients`, it
        # is for this proxy.
        first = upstream.name == question.route.upstream[0].name
        meant = endpoint.credential is None and first and self._proxy.clients is None
        query = question.query if meant else without_key(question.query)
        target = routes.upstream_path(question.route, endpoint.base_path, question.path) + query

        def outgoing(reused: bool) -> Outgoing:
            whole = body.whole
            framing = request.framing
            if whole is None:
                body.keeps = max(keeps, _MAX_REPEATED if reused else 0)
                parts = []
            else:
                size = sum(map(len, whole))
                body.keeps = size if reused or not spare or size <= keeps else 0
                parts = changed(body.take(), splices) if splices else body.take()
                framing = None if framing is None else sum(map(len, parts))
            fields = request.fields if first else request.fields.without(_OF_THE_FIRST)
            head = self._head_out(endpoint, target, framing, fields, credentials=meant)
            rest = body if whole is None else None
            if rest is not None:
                request.send_continue()
            return Outgoing(request.method, head, parts, rest, framing == "chunked", idempotent, self._interim)

        again = False
        while True:
            attempt = self.attempt = Attempt(
                upstream, endpoint, self._exchange, self._clock, self._fail, self._released, later=later
            )
            try:
                return await attempt.head(outgoing, fresh=again)
            except UpstreamError:
                attempt.end()
                if again or not attempt.can_be_repeated or not body.begin_again():
                    raise
                again = True

    @property
    def _is_idempotent(self) -> bool:
        return self._request.method in _SAFE_METHODS or bool(self._request.fields.named(b"idempotency-key"))

    def _head_out(
        self, endpoint: Endpoint, target: str, framing: Framing | None, fields: headers.Fields, *, credentials: bool
    ) -> bytes:
        """The request head for `endpoint`, with the client's `fields`, and its `credentials` or without them."""
        request, connection = self._request, self._request.connection
        peer = connection.address
        return headers.serialize(
            b"%b %b HTTP/1.1" % (request.method.encode(), target.encode("utf-8", "surrogateescape")),
            headers.to_upstream(
                fields,
                version=request.version,
                host=endpoint.host,
                framing=framing_fields(framing),
                peer=peer.encode() or b"unknown",
                trusted=self._proxy.trusts(peer),
                scheme=b"https" if connection.is_tls else b"http",
                request_id=request.id,
                credentials=credentials,
                credential=endpoint.credential if self._has_our_key(endpoint) else None,
                inspect=self.question.inspect,
            ),
        )

    def _interim(self, head: ResponseHead) -> None:
        """Forwards an interim response (RFC 9110, section 15.2)."""
        # Another endpoint may have to answer, and what the client gets is from one only.
        if not self._several:
            made = response_head(head, self._request.id, framing=(), event_stream=False, connection=None, date=None)
            self._request.send_interim(head.status, made)

    def _released(self) -> None:
        gone_at = self._request.connection.gone_at
        if gone_at is not None:
            self._exchange.observer.released(perf_counter() - gone_at)

    async def _refuses_stream_options(self, head: ResponseHead) -> bool:
        """Whether the response refuses `stream_options`. If it does, the attempt is ended; if not, nothing is lost."""
        attempt, connection = self.attempt, self._connection
        assert attempt is not None
        if head.status not in REFUSAL_STATUSES or not head.framing or not self._request.body.repeatable:
            return False
        self._clock.enter("idle", perf_counter())
        peek = Peek(connection, head.framing, _MAX_REFUSAL)
        if REFUSED not in await attempt.until(peek.look()):
            peek.put_back()
            return False
        if peek.whole and not attempt.uploads:
            connection.release(reusable=head.reusable)
        # If the request is still being sent, the connection cannot be reused, and is aborted.
        attempt.end()
        self._request.body.begin_again()
        return True


def _renaming(question: Question, model: str | None) -> list[Splice]:
    """What replaces the model of a body by `model`: nothing, if it is None or cannot be replaced."""
    read = question.read
    # A compressed body has nothing at the places that were found in what it stands for.
    if model is None or question.coding != b"" or not isinstance(read, RequestReader):
        return []
    splice = read.with_model(model)
    return [] if splice is None else [splice]
