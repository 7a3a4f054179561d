"""The one timer of an exchange."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from ..errors import ExchangeError, InternalError, Phase, StalledClient, UpstreamTimeout

if TYPE_CHECKING:
    from ..config import Timeouts

log = logging.getLogger(__name__)


class Clock:
    """The one timer of an exchange. It has the deadlines of the current phase, of a blocked client, and of the whole.

    To move a deadline is only an assignment: when the timer fires, it checks whether the deadline has moved. So a chunk
    does not have to reset a timer. `fail` is called with the error when a deadline has passed.
    """

    __slots__ = (
        "_armed_for",
        "_blocked_at",
        "_fail",
        "_handle",
        "_limit",
        "_phase",
        "_stalled",
        "_timeouts",
        "_total_due",
        "loop",
        "touched",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, timeouts: Timeouts, started: float, fail: Callable[[ExchangeError], None]
    ) -> None:
        self.touched = started
        """When the current phase last made progress. Its timeout counts from here."""
        self._timeouts = timeouts
        self.loop = loop
        self._fail = fail
        self._phase: Phase | Literal["body"] = "connect"
        self._limit = timeouts.connect
        self._stalled: Callable[[], bool] | None = None
        self._blocked_at = 0.0
        self._total_due = started + timeouts.total if timeouts.total is not None else float("inf")
        self._armed_for = float("inf")
        self._handle: asyncio.TimerHandle | None = None

    def enter(self, phase: Phase | Literal["body"], since: float) -> None:
        """`phase` begins, and its timeout counts from `since`. The phase `body` waits for the client's request body."""
        self._phase = phase
        self._limit = getattr(self._timeouts, phase)
        self.touched = since
        self._arm()

    def client_blocked(self, stalled: Callable[[], bool]) -> None:
        """The client does not read. Until it does, the timeout of the phase is suspended and the write timeout counts.

        `stalled` returns whether the client has read nothing since its last call.
        """
        self._stalled = stalled
        self._blocked_at = perf_counter()
        self._arm()

    def client_unblocked(self) -> None:
        """The client reads again. The timeout of the phase starts again."""
        self._stalled = None
        self.touched = perf_counter()
        self._arm()

    def only_client(self, stalled: Callable[[], bool]) -> None:
        """The response is complete. From now on only the write timeout counts, for the last bytes to the client."""
        self._total_due = float("inf")
        self.client_blocked(stalled)

    def pause(self) -> None:
        """No phase is under way. Until the next one begins, only the total timeout counts."""
        self._limit = float("inf")

    @property
    def body_timeout(self) -> float:
        """`timeouts.body` of the route, in seconds."""
        return self._timeouts.body

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _due(self) -> float:
        own = self.touched + self._limit if self._stalled is None else self._blocked_at + self._timeouts.write
        return min(own, self._total_due)

    def _arm(self) -> None:
        due = self._due()
        if self._handle is not None:
            if self._armed_for <= due:
                return
            self._handle.cancel()
            self._handle = None
        if due == float("inf"):
            return
        self._armed_for = due
        self._handle = self.loop.call_later(max(0.0, due - perf_counter()), self._fire)

    def _fire(self) -> None:
        self._handle = None
        try:
            self._check()
        except Exception:
            # Without this, the exchange would never end.
            log.exception("internal error in the timer of an exchange")
            self._fail(InternalError())

    def _check(self) -> None:
        now = perf_counter()
        if now < self._due():
            self._arm()
        elif now >= self._total_due:
            self._fail(UpstreamTimeout("total", self._timeouts.total or 0.0))
        elif self._stalled is not None:
            if self._stalled():
                self._fail(StalledClient("took", self._timeouts.write))
            else:
                self._blocked_at = now
                self._arm()
        elif self._phase == "body":
            self._fail(StalledClient("sent", self._limit))
        else:
            self._fail(UpstreamTimeout(self._phase, self._limit))
