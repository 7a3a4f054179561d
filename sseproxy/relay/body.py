"""The body of a request. A `RequestBody` owns it, from the bytes that the client's connection feeds to the upstream.

The body is read once, in order. Before that, it can be collected, if the route or the request depends on its content.
After that, it can be kept, so that it can be sent again. The bytes that are collected or kept count against a memory
budget.
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

# Bytes that may wait to be read. Above that, reading from the client is paused.
READ_BUFFER: Final = 32 * 1024
# Small parts are joined up to so many bytes: each part is an object, and the overhead of objects is not counted.
_SMALL: Final = 4 * 1024


class MemoryBudget(Protocol):
    """Limits the memory for a body."""

    def hold(self, size: int) -> bool:
        """Reserves `size` bytes. Returns False, and reserves nothing, if there is no room."""

    def release(self, size: int) -> None:
        """Releases `size` reserved bytes."""


class RequestBody:
    """The body of a request. `framing` is its framing, or None if the request has no body.

    `more` is called when there is room again for bytes from the client.
    """

    __slots__ = (
        "_ahead",
        "_begun",
        "_budget",
        "_closed",
        "_decoder",
        "_kept",
        "_kept_size",
        "_limits",
        "_look",
        "_more",
        "_parts",
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
        # Received and not read yet. `READ_BUFFER` limits them, so they are not charged to the budget.
        self._parts: list[bytes] = []
        self._size = 0
        # `_ahead`: collected and not read yet. `_kept`: all that was read, or None if it was not kept. Both are charged
        # to the budget.
        self._ahead: deque[bytes] = _NOTHING
        self._kept: list[bytes] | None = None
        self._kept_size = 0
        self._begun = False
        self._budget: MemoryBudget | None = None
        self._look: Callable[[bytes], None] | None = None
        self._problem: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._waiting_since = 0.0
        self._waited = 0.0
        # The values of `waited` and `received` when the rate was last checked.
        self._window = (0.0, 0)
        self._closed = False
        self.ended = self._decoder is None
        """Whether all of it has been received from the client."""
        self.received = 0
        """Bytes received from the client, without framing."""
        self.keeps = 0
        """How many of the bytes that are read may be kept."""
        if isinstance(framing, int) and limits.request_body is not None and framing > limits.request_body:
            self._problem = RequestError("body_too_large")

    # --- the client's connection ---

    def feed(self, data: bytes) -> int:
        """Takes bytes from the client. Returns how many bytes at the end of `data` do not belong to this body."""
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
        """Whether reading from the client should be paused, because too many bytes wait to be read."""
        return self._size >= READ_BUFFER and not self._closed

    @property
    def broken(self) -> bool:
        """Whether its framing is invalid, so the end of the body is unknown."""
        return self._problem is not None and self._problem.reason == "bad_request"

    # --- the exchange ---

    @property
    def problem(self) -> RequestError | None:
        """Why the body cannot be forwarded: its framing is invalid, or it is too large. None if all is well so far."""
        return self._problem

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the client."""
        return self._waited + (perf_counter() - self._waiting_since if self._waiter is not None else 0.0)

    def watched_by(self, look: Callable[[bytes], None]) -> None:
        """Calls `look` with all bytes that have not been read yet, and with all further bytes when they arrive."""
        for part in (*self._ahead, *self._parts):
            look(part)
        self._look = look

    def charge_to(self, budget: MemoryBudget) -> None:
        """Sets the budget for bytes that are collected or kept. Without a budget there is no room for any."""
        self._budget = budget

    async def collect(self, grace: float) -> bytes:
        """Waits for more of the body, and returns it; empty at the end. It can still be read later.

        Raises the same errors as `read`, and `RequestError` if there is no room.
        """
        part = await self._next(grace)
        if not part:
            return part
        if self._budget is None or not self._budget.hold(len(part)):
            raise RequestError("held")
        if self._ahead is _NOTHING:
            self._ahead = deque()
        _add(part, self._ahead)
        return part

    def hold(self) -> bool:
        """Charges the bytes that have not been read yet to the budget. Returns False if there is no room."""
        if self._size:
            if self._budget is None or not self._budget.hold(self._size):
                return False
            self._ahead = deque((*self._ahead, *self._parts))
            self._parts, self._size = [], 0
        return True

    @property
    def whole(self) -> list[bytes] | None:
        """The whole body, in parts. None unless all of it has been received and none has been read."""
        if not self.ended or self._problem is not None or self._closed or self._begun:
            return None
        return [*self._ahead, *self._parts]

    def take(self) -> list[bytes]:
        """Reads a `whole` body at once, and returns its parts."""
        ahead, came = self._ahead, self._parts
        self._ahead, self._parts, self._size = _NOTHING, [], 0
        for part in ahead:
            self._keep(part, held=True)
        for part in came:
            self._keep(part, held=False)
        return [*ahead, *came]

    async def read(self, grace: float) -> bytes:
        """Waits for the next bytes, and returns them; empty at the end.

        The rate of the client is checked each time when the client has been waited for `grace` seconds. Raises
        `RequestError` if the framing is invalid or the body is too large, `StalledClient` if the rate is lower than
        `limits.request_body_rate`, and `ConnectionError` if the body was closed.
        """
        if self._ahead:
            part = self._ahead.popleft()
            self._keep(part, held=True)
        else:
            part = await self._next(grace)
            self._keep(part, held=False)
        return part

    @property
    def repeatable(self) -> bool:
        """Whether the body can be read again, from its beginning: what was read has been kept."""
        return not self._closed and (not self._begun or self._kept is not None)

    def begin_again(self) -> bool:
        """Starts to read the body again, from its beginning. Returns False if it is not `repeatable`."""
        if not self.repeatable:
            return False
        if self._kept is not None:
            self._ahead = deque((*self._kept, *self._ahead))
            self._kept, self._kept_size = None, 0
        self._begun = False
        return True

    def forget(self) -> None:
        """Drops what was kept, and keeps nothing from now on."""
        self.keeps = 0
        if self._budget is not None and self._kept_size:
            self._budget.release(self._kept_size)
        self._kept, self._kept_size = None, 0

    def close(self) -> None:
        """Stops reading. Bytes that still arrive are dropped."""
        if self._closed and self._budget is None:
            # Each owner of a request closes its body, so most calls find nothing left.
            return
        self._closed = True
        self._look = None
        self.forget()
        if self._budget is not None:
            self._budget.release(sum(map(len, self._ahead)))
            self._budget = None
        self._ahead = _NOTHING
        self._parts, self._size = [], 0
        self._wake()
        if not self.ended:
            self._more()

    async def _next(self, grace: float) -> bytes:
        """Waits for the next bytes from the client, and returns them; empty at the end."""
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
        self._check_pace(grace)
        parts = self._parts
        if not parts:
            return b""
        part = parts[0] if len(parts) == 1 else b"".join(parts)
        self._parts, self._size = [], 0
        if not self.ended:
            self._more()
        return part

    def _check_pace(self, grace: float) -> None:
        rate, (waited, received) = self._limits.request_body_rate, self._window
        took = self._waited - waited
        if rate is None or took <= grace:
            return
        if self.received - received < rate * took:
            raise StalledClient("little", took)
        self._window = (self._waited, self.received)

    def _keep(self, part: bytes, *, held: bool) -> None:
        """Keeps `part`, which was read. If it cannot, drops all that was kept. `held`: the budget has it already."""
        size, budget = len(part), self._budget
        if not size:
            return
        first, self._begun = not self._begun, True
        keeps = budget is not None and (first or self._kept is not None) and self._kept_size + size <= self.keeps
        if budget is not None and keeps and (held or budget.hold(size)):
            self._kept = self._kept or []
            _add(part, self._kept)
            self._kept_size += size
            return
        if budget is not None and held:
            budget.release(size)
        self.forget()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _add(part: bytes, parts: list[bytes] | deque[bytes]) -> None:
    """Appends `part` to `parts`, or to the last one of `parts` if both are small."""
    if parts and len(parts[-1]) + len(part) <= _SMALL:
        parts[-1] += part
    else:
        parts.append(part)


_NOTHING: Final[deque[bytes]] = deque(maxlen=0)
