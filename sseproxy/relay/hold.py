"""Holds back the beginning of an answer, or all of it, until it is clear that the answer is usable.

What is held is inspected like any body, but recorded nowhere. When it is released, the pump gets all of it at once, and
forwards it in one write.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter
from typing import Final, Literal, cast

from ..errors import BrokenBodyError, Outcome
from ..wire.dialects import Style
from ..wire.framing import Framing, decoder, frame
from ..wire.meaning import Usage
from .clock import Clock
from .downstream import DownstreamProtocol
from .exchange import Exchange, Observer
from .inspect import Inspector
from .upstream import UpstreamConnection

log = logging.getLogger(__name__)

# Until the first token: bytes and events that are held at most. More is sent.
_MAX_PRELUDE: Final = 64 * 1024
_MAX_EVENTS: Final = 64

Held = Literal["answer", "error", "truncated", "empty", "reset"]
"""What the held bytes are. `answer`: they can be sent."""


class _Unobserved:
    """An observer that records nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _ignore


def _ignore(*args: object, **keywords: object) -> None:
    pass


UNOBSERVED: Final = cast("Observer", _Unobserved())


class Hold:
    """Reads the body on `connection` until it is known whether it is a usable answer.

    `record` is an exchange that nobody observes, which began with the attempt, and `inspector` records in it. `until`
    is the `first_token` or the `end`. `natural` is the finish reason of a complete answer. At most `most` bytes are
    held; `room` takes room for so many, if there is any.
    """

    def __init__(
        self,
        connection: UpstreamConnection,
        framing: Framing,
        record: Exchange,
        inspector: Inspector,
        clock: Clock,
        *,
        until: str,
        natural: str,
        most: int,
        room: Callable[[int], bool],
    ) -> None:
        self._connection = connection
        self._record = record
        self._inspector = inspector
        self._clock = clock
        self._awaits_token = inspector.awaits_token
        self._whole = until == "end"
        self._natural = natural
        self._most = most if self._whole else min(most, _MAX_PRELUDE)
        self._room = room
        self._body = decoder(framing)
        self._raw = bytearray()
        self._found: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        self.size = 0
        """Bytes that are held, and for which room was taken."""

    async def look(self) -> Held:
        """Waits until it is known what the body is."""
        if self._awaits_token:
            self._clock.enter("first_token", self._record.received_at)
        else:
            self._clock.enter("idle", perf_counter())
        self._connection.protocol.feed_to(self)
        if self._body.done:
            # It has no bytes, so none will come.
            self._end()
        return await self._found

    def put_back(self) -> None:
        """Gives what is held to the next sink."""
        self._connection.protocol.unread(bytes(self._raw))

    @property
    def has_content(self) -> bool:
        """Whether a part of it was generated."""
        return self._record.first_token_at is not None

    @property
    def usage(self) -> Usage | None:
        """What it has told so far of the tokens that it took."""
        return self._record.usage

    def data_received(self, data: bytes) -> None:
        self._raw += data
        if self._found.done():
            # One more read may come before the next sink is there.
            return
        try:
            self._take(data)
        except Exception:
            # The pump will say what it is.
            log.exception("internal error while the beginning of a response body was held back; it is forwarded")
            self._decide("answer")

    def _take(self, data: bytes) -> None:
        read_at, broken = perf_counter(), False
        try:
            payload = self._body.feed(data)
        except BrokenBodyError as error:
            payload, broken = error.payload, True
        fits = self._room(len(data))
        self.size += len(data) if fits else 0
        if payload and self._inspector.look(payload, read_at):
            if self._awaits_token:
                self._awaits_token = False
                self._clock.enter("idle", read_at)
            else:
                self._clock.touched = read_at
        record = self._record
        if record.reported_error:
            # It came before what broke the framing, if both are in one read.
            self._decide("error")
        elif broken:
            self._decide("reset")
        elif self._body.done:
            self._end()
        elif self._whole:
            if not fits or len(self._raw) >= self._most:
                self._decide("answer")
        elif (
            record.first_token_at is not None
            or not fits
            or len(self._raw) >= self._most
            or record.events >= _MAX_EVENTS
        ):
            self._decide("answer")

    def connection_lost(self, clean: bool) -> None:
        if clean and self._body.end():
            self._end()
        else:
            self._decide("truncated")

    def _end(self) -> None:
        if self._found.done():
            return
        self._inspector.end()
        record = self._record
        if record.completed() is Outcome.UPSTREAM_ERROR:
            self._decide("error")
        elif record.is_stream and self._is_empty:
            self._decide("empty")
        else:
            self._decide("answer")

    @property
    def _is_empty(self) -> bool:
        """Whether the stream has ended without content, and without a reason why there is none."""
        record = self._record
        counted = record.usage is not None and bool(record.usage.output)
        return record.first_token_at is None and not counted and record.finish_reason in (None, self._natural)

    def _decide(self, held: Held) -> None:
        if not self._found.done():
            self._found.set_result(held)


class EarlyHead:
    """Keeps a client waiting while answers are held back, with heartbeats in the `style` of its API.

    After the first `interval` seconds, the head of the response goes out, and a heartbeat; then one in each interval.
    The head says nothing of the endpoint, because another one may answer. `head` makes it, and is called when it is
    sent.
    """

    __slots__ = ("_chunked", "_connection", "_head", "_interval", "_timer", "sent", "style")

    def __init__(
        self,
        connection: DownstreamProtocol,
        head: Callable[[], bytes],
        interval: float,
        style: Style,
        *,
        chunked: bool,
    ) -> None:
        self.style = style
        self.sent = False
        """Whether the head has gone out."""
        self._connection = connection
        self._head = head
        self._interval = interval
        self._chunked = chunked
        self._timer = asyncio.get_running_loop().call_later(interval, self._beat)

    def _beat(self) -> None:
        transport = self._connection.transport
        if transport is not None and not transport.is_closing() and not self._connection.writing_paused:
            self.write(self.style.heartbeat)
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._beat)

    def write(self, event: bytes) -> None:
        """Sends `event` in the response."""
        transport = self._connection.transport
        if transport is not None:
            head = b"" if self.sent else self._head()
            self.sent = True
            transport.write(head + (frame(event) if self._chunked else event))

    def stop(self) -> None:
        self._timer.cancel()
