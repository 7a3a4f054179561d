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
    """The one timer of an exchange: the deadline of its present phase, of a client that blocks it, and of the whole.

    Moving a deadline is an assignment; the timer looks where it stands now when it fires, so that a chunk costs
    nothing here. `fail` is called with the error of the deadline that passed.
    """

    __slots__ = (
        "_armed_for",
        "_blocked_at",
        "_fail",
        "_handle",
        "_limit",
        "_loop",
        "_phase",
        "_stalled",
        "_timeouts",
        "_total_due",
        "touched",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, timeouts: Timeouts, started: float, fail: Callable[[ExchangeError], None]
    ) -> None:
        self.touched = started
        """When the phase's progress was last seen; its time counts from here."""
        self._timeouts = timeouts
        self._loop = loop
        self._fail = fail
        self._phase: Phase | Literal["body"] = "connect"
        self._limit = timeouts.connect
        self._stalled: Callable[[], bool] | None = None
        self._blocked_at = 0.0
        self._total_due = started + timeouts.total if timeouts.total is not None else float("inf")
        self._armed_for = float("inf")
        self._handle: asyncio.TimerHandle | None = None

    def enter(self, phase: Phase | Literal["body"], since: float) -> None:
        """`phase` begins; its time counts from `since`. In `body` it is the client's request that is waited for."""
        self._phase = phase
        self._limit = getattr(self._timeouts, phase)
        self.touched = since
        self._arm()

    def client_blocked(self, stalled: Callable[[], bool]) -> None:
        """The client does not take what it is sent, and the phase's time stands still.

        `stalled` tells whether it has taken nothing since asked last.
        """
        self._stalled = stalled
        self._blocked_at = perf_counter()
        self._arm()

    def client_unblocked(self) -> None:
        """The client takes again what it is sent; the phase's time counts anew."""
        self._stalled = None
        self.touched = perf_counter()
        self._arm()

    def only_client(self, stalled: Callable[[], bool]) -> None:
        """Nothing is waited for any more but that the client takes the last bytes."""
        self._total_due = float("inf")
        self.client_blocked(stalled)

    @property
    def patience(self) -> float:
        """Seconds that the client may take to send something of its request's body."""
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
        self._armed_for = due
        self._handle = self._loop.call_later(max(0.0, due - perf_counter()), self._fire)

    def _fire(self) -> None:
        self._handle = None
        try:
            self._check()
        except Exception:
            # Nobody else would end what waits.
            log.exception("a deadline could not be kept")
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
