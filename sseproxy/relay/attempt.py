"""One attempt at an endpoint: it connects, sends the request, and receives the response head.

A deadline of these phases fails the attempt, not the exchange. `Attempt.end` closes the connection, unless the
connection was released before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import msgspec

from ..errors import ExchangeError, InternalError
from ..wire.framing import LAST_CHUNK, frame
from .body import RequestBody
from .clock import Clock
from .exchange import Exchange
from .heads import ResponseHead
from .pool import Upstream, micros
from .upstream import Endpoint, UpstreamConnection

if TYPE_CHECKING:
    from ..ledger.table import Count

T = TypeVar("T")

log = logging.getLogger(__name__)

# Bytes. A body up to this size is written together with the head. Larger ones are written in parts of this size, and
# each part waits until the upstream accepts more.
_MOST_AT_ONCE: Final = 64 * 1024
# Seconds. If a reused connection ends so soon after the request was written, the upstream had probably closed it before
# the request arrived, so it has not begun to generate.
_STALE_WITHIN: Final = 1.0


class Outgoing(msgspec.Struct, frozen=True):
    """A request as it is sent to the upstream.

    First the `parts` of the body are sent. Then the bytes that are read from `body`, if there is one.
    """

    method: str
    head: bytes
    parts: list[bytes]
    body: RequestBody | None
    chunked: bool
    idempotent: bool
    """Whether the request may be sent twice: its method is safe, or it has an Idempotency-Key (RFC 9110, 9.2.2)."""
    interim: Callable[[ResponseHead], None]
    """Called with each interim response (1xx)."""


# What became of an attempt. An endpoint is ejected after several that failed.
Verdict = Literal["succeeded", "failed", "refused", "open"]


class Attempt:
    """One attempt to send the request of `exchange` to `endpoint` of `upstream`.

    `failed` is called with the error if the client's body is invalid; this ends the exchange. `released` is called when
    the connection is aborted. `later`: it is counted as a later attempt while it waits for the response head.
    """

    __slots__ = (
        "_active",
        "_awaits_head",
        "_clock",
        "_error",
        "_exchange",
        "_failed",
        "_idempotent",
        "_later",
        "_released",
        "_task",
        "_upload",
        "_written_at",
        "began_at",
        "connection",
        "endpoint",
        "judged",
    )

    def __init__(
        self,
        upstream: Upstream,
        endpoint: Endpoint,
        exchange: Exchange,
        clock: Clock,
        failed: Callable[[ExchangeError], None],
        released: Callable[[], None],
        *,
        later: bool = False,
    ) -> None:
        self.endpoint = endpoint
        self.began_at = perf_counter()
        """From here the time to its first token counts."""
        self.judged = endpoint.standing is None
        """Whether it is known what became of it, or that is not asked."""
        self._active: Count | None = None
        self._later = upstream.later if later else None
        self._exchange = exchange
        self._clock = clock
        self._failed = failed
        self._released = released
        self._task: asyncio.Task[object] | None = None
        self._error: ExchangeError | None = None
        self._idempotent = False
        # Until then, the clock tells what the request waits for; afterwards, what the answer does.
        self._awaits_head = True
        self._upload: asyncio.Task[None] | None = None
        self._written_at: float | None = None
        self.connection: UpstreamConnection | None = None

    async def head(self, outgoing: Callable[[bool], Outgoing], *, fresh: bool) -> ResponseHead:
        """Phases 3 to 5. Returns the response head.

        `outgoing` builds the request. It is called when there is a connection, and its argument says whether that
        connection was used before; with `fresh` it never was. Raises `UpstreamError`, or `TooManyConnects`.
        """
        if self.endpoint.standing is not None:
            self._active = self.endpoint.standing.active
            self._active.add(1)
        later, self._later = self._later, None
        if later is None:
            return await self.until(self._head(outgoing, fresh))
        later.add(1)
        try:
            return await self.until(self._head(outgoing, fresh))
        finally:
            later.add(-1)

    async def until(self, result: Coroutine[None, None, T]) -> T:
        """Waits for the `result` of a part of this attempt. Meanwhile `fail` ends the attempt."""
        # The task is not a local variable: a cancelled task refers to this frame, so this would be a reference cycle.
        self._task = asyncio.current_task(self._clock.loop)
        assert self._task is not None
        cancelled = self._task.cancelling()
        try:
            return await result
        except asyncio.CancelledError:
            if self._error is None or self._task.uncancel() > cancelled:
                raise
            raise self._error from None
        finally:
            self._task = None

    async def _head(self, outgoing: Callable[[bool], Outgoing], fresh: bool) -> ResponseHead:
        self.connection = None if fresh else self.endpoint.reuse(self._released)
        if self.connection is None:
            await self._connect()
        else:
            self._exchange.observer.reused()
        self._send(outgoing)
        # The future is not a local variable: its exception refers to this frame, so this would be a reference cycle.
        head = await self._connection.protocol.head()
        self._awaits_head = False
        return head

    def fail(self, error: ExchangeError) -> bool:
        """Ends `head` or `until` with `error`. Returns False if neither is waiting."""
        if self._task is None:
            return False
        if self._error is None:
            self._error = error
            self._task.cancel()
        return True

    @property
    def can_be_repeated(self) -> bool:
        """After a failure: whether the request can safely be sent again.

        It can on a reused connection that ended without one byte of a response, because the upstream may have closed
        the connection while the request was on its way (RFC 9112, section 9.3.1). In addition, the request must be
        idempotent, or so recent that the upstream cannot have acted on it.
        """
        connection, written_at = self.connection, self._written_at
        if connection is None or not connection.reused or connection.protocol.answer_begun or self._error is not None:
            return False
        return written_at is None or self._idempotent or perf_counter() - written_at < _STALE_WITHIN

    @property
    def begun(self) -> bool:
        """Whether a part of the request has been sent."""
        return self._written_at is not None

    def judge(self, result: str, verdict: Verdict) -> None:
        """Records what became of it: `result`, in words, and what that says of the endpoint. Only the first counts.

        `refused`: no connection could be made. `open`: it says nothing of the endpoint.
        """
        standing = self.endpoint.standing
        if standing is None or self.judged:
            return
        self.judged = True
        if verdict == "succeeded":
            standing.succeeded(micros())
        elif verdict != "open":
            standing.failed(micros(), refused=verdict == "refused")
        self._exchange.observer.attempted(self.endpoint.label, result)

    @property
    def uploads(self) -> bool:
        """Whether a part of the request's body has not been sent yet."""
        return self._upload is not None and not self._upload.done()

    def end(self) -> None:
        """Stops sending the request, and aborts the connection."""
        active, self._active = self._active, None
        if active is not None:
            active.add(-1)
        if self._upload is not None:
            self._upload.cancel()
        if self.connection is not None:
            self.connection.abort()

    @property
    def _connection(self) -> UpstreamConnection:
        assert self.connection is not None
        return self.connection

    async def _connect(self) -> None:
        """Phase 3: Connect, where no connection is idle."""
        begun = perf_counter()
        self._clock.enter("connect", begun)
        self.connection = await self.endpoint.connect(self._released)
        self._exchange.observer.connected(perf_counter() - begun)

    def _send(self, make: Callable[[bool], Outgoing]) -> None:
        """Phase 4: Send. What is not sent at once is sent by a task."""
        connection = self._connection
        out = make(connection.protocol.requests > 0)
        self._idempotent = out.idempotent
        connection.protocol.expect_head(out.method, out.interim)
        size = sum(map(len, out.parts))
        at_once = size <= _MOST_AT_ONCE
        if at_once and out.parts:
            payload = b"".join(out.parts)
            connection.transport.write(out.head + (frame(payload) if out.chunked else payload))
            self._exchange.request_bytes += size
        else:
            connection.transport.write(out.head)
        self._written_at = perf_counter()
        if at_once and out.body is None:
            self._clock.enter("head", self._written_at)
        else:
            self._clock.enter("body", self._written_at)
            sending = self._send_rest(connection, [] if at_once else out.parts, out.body, chunked=out.chunked)
            self._upload = asyncio.get_running_loop().create_task(sending)

    async def _send_rest(
        self, connection: UpstreamConnection, parts: list[bytes], body: RequestBody | None, *, chunked: bool
    ) -> None:
        try:
            self._waits_for("head")
            for part in parts:
                for start in range(0, len(part), _MOST_AT_ONCE):
                    await self._send_part(connection, part[start : start + _MOST_AT_ONCE], chunked=chunked)
            while body is not None:
                self._waits_for("body")
                part = await body.read(self._clock.body_timeout)
                # The head timeout starts when the upstream has received the last part of the request.
                self._waits_for("head")
                if not part:
                    break
                await self._send_part(connection, part, chunked=chunked)
            if chunked:
                await connection.protocol.send(LAST_CHUNK)
        except ConnectionError:
            # One side has closed its connection. If it is the upstream, `head` reports the error.
            return
        except ExchangeError as error:
            self._failed(error)
        except Exception:
            # Nothing awaits this task, so an unexpected error must end the exchange here.
            log.exception("internal error while a request body was being forwarded")
            self._failed(InternalError())

    async def _send_part(self, connection: UpstreamConnection, part: bytes, *, chunked: bool) -> None:
        self._exchange.request_bytes += len(part)
        await connection.protocol.send(frame(part) if chunked else part)

    def _waits_for(self, phase: Literal["body", "head"]) -> None:
        if self._awaits_head:
            self._clock.enter(phase, perf_counter())
