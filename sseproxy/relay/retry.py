"""Whether a request is sent again, and where to.

By default only what was certainly not begun, or was refused for load, is sent again, and only to another endpoint. An
answer is never repeated once a byte of it was sent to the client. A retry that may be paid for twice
must be allowed by `retry.on` or `retry.until`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import perf_counter
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from ..errors import TooManyConnects, UpstreamError, UpstreamTimeout
from ..wire.headers import Fields
from .pool import Upstream
from .upstream import Endpoint

if TYPE_CHECKING:
    from ..config import Retry, Target

Repeatable = Literal["always", "refused", "connect"]
"""When a request may be repeated. `always`: whatever `retry.on` names. `refused`: if it was refused for load or was not
begun, because it changes something at the upstream. `connect`: if it was not begun, because it belongs to something
that one endpoint keeps."""

# Seconds. The pause before the same endpoint is asked again, if it does not say how long to wait.
_PAUSE: Final = 0.25, 0.75
# Statuses of an endpoint that is broken. It may be ejected for them. 529 is Anthropic's for overload.
_SERVER_ERRORS: Final = range(500, 600)
_LOAD: Final = frozenset({"429", "503", "529"})
# Reasons of failures that came before anything was sent.
_NOT_BEGUN: Final = frozenset({"connect", "pending_connects"})
# Reasons of failures for which no other endpoint of the same upstream is asked.
_OF_THE_UPSTREAM: Final = frozenset({"context", "pending_connects"})
_KEY_REFUSED: Final = frozenset({401, 403})
_SECONDS: Final = re.compile(rb"[0-9]{1,6}(?:\.[0-9]{1,6})?")


class Failure(NamedTuple):
    """Why an attempt is not the answer.

    `reason` is what `retry.on` calls it, or `key` (our key was refused), `context` (the prompt is too long for the
    model), `pending_connects`, or before the commit `truncated`, `error` (an error in the stream) or `empty` (a stream
    without content).
    """

    reason: str
    retry_after: float | None = None
    """Seconds that the upstream asks to wait."""


class Step(NamedTuple):
    """An attempt that is to be made, after a pause of so many seconds."""

    target: Target
    upstream: Upstream
    endpoint: Endpoint
    pause: float = 0.0
    later: bool = False
    """Whether it is a later attempt at something that may be under way already, and so is counted as one."""


def failure_of(error: UpstreamError | TooManyConnects, *, begun: bool) -> Failure:
    """The failure that `error` is. `begun`: a part of the request was sent."""
    if isinstance(error, TooManyConnects):
        return Failure(error.reason)
    if not begun or (isinstance(error, UpstreamTimeout) and error.phase == "connect"):
        return Failure("connect")
    return Failure("timeout" if isinstance(error, UpstreamTimeout) else "reset")


def failure_in(status: int, fields: Fields, *, our_key: bool) -> Failure | None:
    """The failure that a response head is, or None if it is an answer. `our_key`: it was not the client's key."""
    if status < 400:
        return None
    if our_key and status in _KEY_REFUSED:
        return Failure("key")
    if status == 429 or status in _SERVER_ERRORS:
        return Failure(str(status), retry_after(fields))
    return None


def retry_after(fields: Fields) -> float | None:
    """How many seconds a response asks to wait (RFC 9110, section 10.2.3, and `retry-after-ms` of OpenAI's API)."""
    for name, unit in ((b"retry-after-ms", 0.001), (b"retry-after", 1.0)):
        for value in fields.named(name):
            if _SECONDS.fullmatch(value):
                return float(value) * unit
            # Dates of other years and zones than there are raise these.
            with suppress(ValueError, TypeError, OverflowError):
                at = parsedate_to_datetime(value.decode("latin-1"))
                return max(0.0, (at - datetime.now(UTC)).total_seconds())
    return None


class Course:
    """The attempts of one exchange, at the `upstreams` of its `targets`, in this order.

    By its `key`, the request is assigned to an endpoint. `model` is the one that it asks for.
    """

    __slots__ = (
        "_again",
        "_key",
        "_made",
        "_model",
        "_options",
        "_received_at",
        "_targets",
        "_tried",
        "attempts",
        "several",
    )

    def __init__(
        self,
        options: Retry,
        targets: Sequence[tuple[Target, Upstream]],
        model: str | None,
        key: bytes | None,
        received_at: float,
    ) -> None:
        self._options = options
        self._targets = list(targets)
        self._model = model
        self._key = key
        self._received_at = received_at
        self._tried: list[Endpoint] = []
        # Attempts at the present upstream, and whether an endpoint was asked a second time.
        self._made = 0
        self._again = False
        self.attempts = 0
        """How many attempts were made, at all upstreams together."""
        self.several = False
        """Whether more than one attempt is possible. It is known once the first one is."""

    @property
    def has_fallback(self) -> bool:
        """Whether there is an upstream after the present one."""
        return len(self._targets) > 1

    def first(self, chosen: Endpoint | None = None) -> Step | None:
        """The first attempt, at the endpoint that was `chosen`, if one was. None if there is no endpoint at all."""
        # An upstream with no endpoint left is one as well: what is held back does not depend on who is ejected.
        fallback = self.has_fallback
        step = self._first() if chosen is None else self._step(chosen)
        self.several = fallback or len(self._targets[0][1].endpoints) > 1 or "same" in self._options.on
        return step

    def _first(self) -> Step | None:
        for place, (target, upstream) in enumerate(self._targets):
            endpoint = upstream.choose(target.model or self._model, self._key)
            if endpoint is not None:
                del self._targets[:place]
                return self._step(endpoint)
        # If nothing is left, all are used.
        target, upstream = self._targets[0]
        endpoint = upstream.choose(target.model or self._model, self._key, any_state=True)
        return None if endpoint is None else self._step(endpoint)

    def next(self, failure: Failure, repeatable: Repeatable) -> Step | None:
        """The attempt after `failure`, or None if there is none."""
        options, reason = self._options, failure.reason
        left = float("inf") if options.until == "end" else self._received_at + options.within - perf_counter()
        if left <= 0 or not self._may_repeat(reason, repeatable):
            return None
        if reason not in _OF_THE_UPSTREAM and self._made < options.attempts:
            target, upstream = self._targets[0]
            model = target.model or self._model
            if (endpoint := upstream.choose(model, self._key, self._tried)) is not None:
                return self._later(endpoint, reason)
            if (pause := self._pause(failure)) is not None and pause < left:
                self._again = True
                return self._later(self._tried[-1], reason, pause)
        return self._elsewhere(reason)

    def _elsewhere(self, reason: str) -> Step | None:
        """The next attempt at another upstream."""
        for place, (target, upstream) in enumerate(self._targets[1:], 1):
            endpoint = upstream.choose(target.model or self._model, self._key)
            if endpoint is not None:
                del self._targets[:place]
                self._tried.clear()
                self._made, self._again = 0, False
                return self._later(endpoint, reason)
        return None

    def _later(self, endpoint: Endpoint, reason: str, pause: float = 0.0) -> Step | None:
        # What was not begun has cost nothing, so this is not hitting a sick fleet twice as hard.
        later = reason not in _NOT_BEGUN
        if later and not self._targets[0][1].has_room_for_later:
            return None
        return self._step(endpoint, pause, later)

    def _step(self, endpoint: Endpoint, pause: float = 0.0, later: bool = False) -> Step:
        if endpoint not in self._tried:
            self._tried.append(endpoint)
        self._made += 1
        self.attempts += 1
        return Step(*self._targets[0], endpoint, pause, later)

    def _may_repeat(self, reason: str, repeatable: Repeatable) -> bool:
        on = self._options.on
        if reason == "pending_connects":
            # Nobody was asked yet.
            return True
        if reason in ("key", "context"):
            return repeatable != "connect"
        if reason in ("truncated", "error", "empty"):
            return repeatable == "always"
        if reason in ("reset", "timeout") and self._options.until != "head":
            return repeatable == "always"
        if reason not in on:
            return False
        return repeatable == "always" or reason == "connect" or (repeatable == "refused" and reason in _LOAD)

    def _pause(self, failure: Failure) -> float | None:
        """Seconds until the same endpoint is asked again. None if it is not."""
        if "same" not in self._options.on or self._again or failure.reason in ("timeout", "key"):
            return None
        if failure.retry_after is None:
            return random.uniform(*_PAUSE)
        return failure.retry_after if failure.retry_after <= self._options.wait else None
