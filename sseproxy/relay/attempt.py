"""One attempt at an upstream: a connection, the request on it, and the head of the response.

Deadlines of these phases fail the attempt, not the exchange. An attempt ends its connection on the way out, unless a
pump, or the pool, took it over before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter
from typing import Final, Literal, NamedTuple

from ..errors import ExchangeError, InternalError
from ..wire.framing import LAST_CHUNK, frame
from .body import RequestBody
from .clock import Clock
from .exchange import Exchange
from .heads import ResponseHead
from .upstream import Upstream, UpstreamConnection

log = logging.getLogger(__name__)

# What is written together with the head, and of a large body at once: the pace of the upstream is waited for.
_MOST_AT_ONCE: Final = 64 * 1024
# An upstream whose connection ends so soon after it was written to had closed it before: nobody generates yet.
_STALE_WITHIN: Final = 1.0


class Outgoing(NamedTuple):
    """A request as it goes upstream. Of the body, `parts` are sent before what is read of the client's, if any is."""

    method: str
    head: bytes
    parts: list[bytes]
    body: RequestBody | None
    chunked: bool
    idempotent: bool
    """Sent twice it does no more than once (RFC 9110, section 9.2.2), by its method or as the client says."""


class Attempt:
    """One try of `exchange` at `upstream`.

    `failed` is told of what is wrong with the client's body, which ends the exchange; `released` is called when the
    connection is aborted.
    """

    __slots__ = (
        "_clock",
        "_error",
        "_exchange",
        "_failed",
        "_idempotent",
        "_released",
        "_task",
        "_upload",
        "_upstream",
        "_written_at",
        "connection",
    )

    def __init__(
        self,
        upstream: Upstream,
        exchange: Exchange,
        clock: Clock,
        failed: Callable[[ExchangeError], None],
        released: Callable[[], None],
    ) -> None:
        self._upstream = upstream
        self._exchange = exchange
        self._clock = clock
        self._failed = failed
        self._released = released
        self._task: asyncio.Task[object] | None = None
        self._error: ExchangeError | None = None
        self._idempotent = False
        self._upload: asyncio.Task[None] | None = None
        self._written_at: float | None = None
        self.connection: UpstreamConnection | None = None

    async def head(self, outgoing: Callable[[bool], Outgoing], *, fresh: bool) -> ResponseHead:
        """Phases 3 to 5: the response's head.

        `outgoing` makes the request once there is a connection, and is told whether that is a reused one; it never is
        if it is to be `fresh`. Raises `UpstreamError`, or `RequestError` if too many connections are being made.
        """
        # No name for the task: one that is cancelled would refer to this frame, and the frame to it.
        self._task = asyncio.current_task()
        assert self._task is not None
        cancelled = self._task.cancelling()
        try:
            await self._connect(fresh)
            return await self._send(outgoing)
        except asyncio.CancelledError:
            if self._error is None or self._task.uncancel() > cancelled:
                raise
            raise self._error from None
        finally:
            self._task = None

    def fail(self, error: ExchangeError) -> bool:
        """Ends the wait for the head with `error`; returns whether it was still waited for."""
        if self._task is None:
            return False
        if self._error is None:
            self._error = error
            self._task.cancel()
        return True

    @property
    def can_be_repeated(self) -> bool:
        """After it failed: whether the upstream cannot have acted on it, or may act on it twice.

        So it is on a reused connection that brought not one byte of an answer: the upstream may have closed it while
        the request was on its way (RFC 9112, section 9.3.1).
        """
        connection, written_at = self.connection, self._written_at
        if connection is None or not connection.reused or connection.protocol.heard or self._error is not None:
            return False
        return written_at is None or self._idempotent or perf_counter() - written_at < _STALE_WITHIN

    @property
    def uploads(self) -> bool:
        """Whether something of the request's body is still to be sent."""
        return self._upload is not None and not self._upload.done()

    def end(self) -> None:
        """Neither the response is wanted any more, nor the rest of the request sent."""
        if self._upload is not None:
            self._upload.cancel()
        if self.connection is not None:
            self.connection.abort()

    async def _connect(self, fresh: bool) -> None:
        """Phase 3: Connect."""
        begun = perf_counter()
        self._clock.enter("connect", begun)
        self.connection = await self._upstream.connect(self._released, fresh=fresh)
        self._exchange.observer.connected(perf_counter() - begun, reused=self.connection.protocol.requests > 0)

    async def _send(self, make: Callable[[bool], Outgoing]) -> ResponseHead:
        """Phases 4, Send, and 5, Head."""
        connection = self.connection
        assert connection is not None
        out = make(connection.protocol.requests > 0)
        self._idempotent = out.idempotent
        connection.protocol.expect_head(out.method)
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
        # No name for it: one that fails would refer to this frame, and the frame to it.
        return await connection.protocol.head()

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
                part = await body.read(self._clock.patience)
                # The upstream's time to answer begins when it has what it is to answer.
                self._waits_for("head")
                if not part:
                    break
                await self._send_part(connection, part, chunked=chunked)
            if chunked:
                await connection.protocol.send(LAST_CHUNK)
        except ConnectionError:
            # One side is gone. If it is the upstream, its response, or that there is none, is about to say so.
            return
        except ExchangeError as error:
            self._failed(error)
        except Exception:
            # The exchange ends here, also from a mistake of ours: nobody else waits for this task.
            log.exception("a request's body could not be sent on")
            self._failed(InternalError())

    async def _send_part(self, connection: UpstreamConnection, part: bytes, *, chunked: bool) -> None:
        self._exchange.request_bytes += len(part)
        await connection.protocol.send(frame(part) if chunked else part)

    def _waits_for(self, phase: Literal["body", "head"]) -> None:
        if self._exchange.head_at is None:
            self._clock.enter(phase, perf_counter())
