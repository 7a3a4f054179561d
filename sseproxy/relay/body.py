"""The body of a request, which has one owner: from the client's connection, which feeds it, to whoever sends it on.

It is read once, in order. Before that it may be collected, where something depends on all of it; after that, what was
read may be kept, so that it can be sent again. Both are held in a place that has its bounds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol

from ..errors import BrokenBodyError, RequestError, StalledClient
from ..wire.framing import BodyDecoder, Framing, decoder

if TYPE_CHECKING:
    from ..config import Limits

# Bytes that wait for whoever reads, before no more is taken from the client.
READ_BUFFER: Final = 32 * 1024
# Parts are joined up to so many bytes: each is an object, whose own size nobody counts.
_SMALL: Final = 4 * 1024


class Place(Protocol):
    """Room for what is held of a body."""

    def hold(self, size: int) -> bool:
        """Whether there is room for `size` bytes more; they are held then."""

    def release(self, size: int) -> None:
        """Of what is held, `size` bytes are not any more."""


class RequestBody:
    """A request's body, framed by `framing`; None is a request without one.

    `more` is called when there is room again for what the client sends.
    """

    __slots__ = (
        "_ahead",
        "_begun",
        "_closed",
        "_decoder",
        "_kept",
        "_kept_size",
        "_limits",
        "_look",
        "_more",
        "_parts",
        "_place",
        "_problem",
        "_size",
        "_waited",
        "_waiter",
        "_waiting_since",
        "_window",
        "ended",
        "keeps",
        "received",
    )

    def __init__(self, framing: Framing | None, limits: Limits, more: Callable[[], None]) -> None:
        self._decoder: BodyDecoder | None = decoder(framing) if framing else None
        self._limits = limits
        self._more = more
        # What has come and was not read; no more than a connection may hold.
        self._parts: list[bytes] = []
        self._size = 0
        # What was collected and not read, and what was read, as long as that is all that was. The place holds both.
        self._ahead: deque[bytes] = _NOTHING
        self._kept: list[bytes] | None = None
        self._kept_size = 0
        self._begun = False
        self._place: Place | None = None
        self._look: Callable[[bytes], None] | None = None
        self._problem: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._waiting_since = 0.0
        self._waited = 0.0
        # What `waited` and `received` were when the pace was last found good.
        self._window = (0.0, 0)
        self._closed = False
        self.ended = self._decoder is None
        """All of it has come from the client."""
        self.received = 0
        """Bytes that have come from the client."""
        self.keeps = 0
        """How many bytes are kept at most of what is read."""
        if isinstance(framing, int) and limits.request_body is not None and framing > limits.request_body:
            self._problem = RequestError("body_too_large")

    # --- the client's connection ---

    def feed(self, data: bytes) -> int:
        """Takes what the client has sent; returns how many bytes at the end of `data` are not of this body."""
        body = self._decoder
        assert body is not None
        try:
            payload = body.feed(data)
        except BrokenBodyError as error:
            payload = error.payload
            self._problem = self._problem or RequestError("bad_request")
        self.ended = body.done
        self.received += len(payload)
        most = self._limits.request_body
        if most is not None and self.received > most:
            self._problem = self._problem or RequestError("body_too_large")
        if payload and self._look is not None:
            self._look(payload)
        if payload and not self._closed:
            _add(payload, self._parts)
            self._size += len(payload)
        self._wake()
        return body.excess

    @property
    def full(self) -> bool:
        """More waits to be read than is good."""
        return self._size >= READ_BUFFER and not self._closed

    @property
    def broken(self) -> bool:
        """Its framing is broken: nobody knows where it ends."""
        return self._problem is not None and self._problem.reason == "bad_request"

    # --- the exchange ---

    @property
    def problem(self) -> RequestError | None:
        """Why it cannot be sent on, as far as that is known: its framing is broken, or it is too large."""
        return self._problem

    @property
    def waited(self) -> float:
        """Seconds for which the client was waited for."""
        return self._waited + (perf_counter() - self._waiting_since if self._waiter is not None else 0.0)

    def watched_by(self, look: Callable[[bytes], None]) -> None:
        """`look` is shown what has come and was not read, and whatever comes, as it comes."""
        for part in (*self._ahead, *self._parts):
            look(part)
        self._look = look

    def held_in(self, place: Place) -> None:
        """What is collected and kept is held in `place`. Before this there is no room for it."""
        self._place = place

    async def collect(self, patience: float) -> bytes:
        """Waits for more of the body, which stays to be read. Returns what came, empty at the end.

        Raises as `read` does, and `RequestError` if there is no room.
        """
        part = await self._next(patience)
        if not part:
            return part
        if self._place is None or not self._place.hold(len(part)):
            raise RequestError("held")
        if self._ahead is _NOTHING:
            self._ahead = deque()
        _add(part, self._ahead)
        return part

    def hold(self) -> bool:
        """Holds what has come and was not read, so that it can be read again. Returns False if there is no room."""
        if self._size:
            if self._place is None or not self._place.hold(self._size):
                return False
            self._ahead = deque((*self._ahead, *self._parts))
            self._parts, self._size = [], 0
        return True

    @property
    def whole(self) -> list[bytes] | None:
        """All of the body, in parts, if all of it has come and none of it was read."""
        if not self.ended or self._problem is not None or self._closed or self._begun:
            return None
        return [*self._ahead, *self._parts]

    def take(self) -> list[bytes]:
        """Reads all of a body that is `whole`, at once."""
        ahead, came = self._ahead, self._parts
        self._ahead, self._parts, self._size = _NOTHING, [], 0
        for part in ahead:
            self._keep(part, held=True)
        for part in came:
            self._keep(part, held=False)
        return [*ahead, *came]

    async def read(self, patience: float) -> bytes:
        """The next bytes, empty at the end.

        `patience` are the seconds within which a client must have sent what `limits.request_body_rate` asks for.
        Raises `RequestError` if the body is broken or too large, `StalledClient` if it comes too slowly, and
        ConnectionError if it was closed: a body that was cut short never ends.
        """
        if self._ahead:
            part = self._ahead.popleft()
            self._keep(part, held=True)
        else:
            part = await self._next(patience)
            self._keep(part, held=False)
        return part

    def begin_again(self) -> bool:
        """What was read is read once more, from the beginning. False if that is not kept."""
        if self._closed or (self._begun and self._kept is None):
            return False
        if self._kept is not None:
            self._ahead = deque((*self._kept, *self._ahead))
            self._kept, self._kept_size = None, 0
        self._begun = False
        return True

    def forget(self) -> None:
        """What was read, and what is read from now on, is not needed again."""
        self.keeps = 0
        if self._place is not None and self._kept_size:
            self._place.release(self._kept_size)
        self._kept, self._kept_size = None, 0

    def close(self) -> None:
        """Nobody reads it any more; what still comes is dropped."""
        self._closed = True
        self._look = None
        self.forget()
        if self._place is not None:
            self._place.release(sum(map(len, self._ahead)))
            self._place = None
        self._ahead = _NOTHING
        self._parts, self._size = [], 0
        self._wake()
        if not self.ended:
            self._more()

    async def _next(self, patience: float) -> bytes:
        """The next bytes that come from the client, empty at the end."""
        if not self._parts and not self.ended and self._problem is None and not self._closed:
            self._waiting_since = perf_counter()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
                self._waited += perf_counter() - self._waiting_since
        if self._problem is not None:
            raise self._problem
        if self._closed:
            raise ConnectionAbortedError("the body is closed")
        self._check_pace(patience)
        parts = self._parts
        if not parts:
            return b""
        part = parts[0] if len(parts) == 1 else b"".join(parts)
        self._parts, self._size = [], 0
        if not self.ended:
            self._more()
        return part

    def _check_pace(self, patience: float) -> None:
        rate, (waited, received) = self._limits.request_body_rate, self._window
        took = self._waited - waited
        if rate is None or took <= patience:
            return
        if self.received - received < rate * took:
            raise StalledClient("little", took)
        self._window = (self._waited, self.received)

    def _keep(self, part: bytes, *, held: bool) -> None:
        """`part` was read; the place may hold it already."""
        size, place = len(part), self._place
        if not size:
            return
        first, self._begun = not self._begun, True
        keeps = place is not None and (first or self._kept is not None) and self._kept_size + size <= self.keeps
        if place is not None and keeps and (held or place.hold(size)):
            self._kept = self._kept or []
            _add(part, self._kept)
            self._kept_size += size
            return
        if place is not None and held:
            place.release(size)
        self.forget()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _add(part: bytes, parts: list[bytes] | deque[bytes]) -> None:
    """`part` is the last of `parts`, or of the last of them."""
    if parts and len(parts[-1]) + len(part) <= _SMALL:
        parts[-1] += part
    else:
        parts.append(part)


_NOTHING: Final[deque[bytes]] = deque(maxlen=0)
