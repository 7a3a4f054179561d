"""What a worker holds: its routes, its upstreams, its clients' connections, and the exchanges that are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import TYPE_CHECKING

from ..errors import Draining, RequestError
from ..wire import headers
from . import routes
from .admission import Admission
from .answers import Answer
from .downstream import Request
from .exchange import Exchange, Kept, Observer
from .phases import Relay
from .server import DownstreamServer
from .upstream import Upstream

if TYPE_CHECKING:
    from ..config import Config

# Once others take the requests: a client that has sent none for so long is not about to.
_IDLE_BEFORE_CLOSE = 5.0
# Often enough to see an overload begin, and end, within a second or so.
_LATENESS_INTERVAL = 0.25


class Lateness:
    """How late the timers of a loop fire. `measured` is told each time, in seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, measured: Callable[[float], None]) -> None:
        self._loop = loop
        self._measured = measured
        self._latest = 0.0
        self.lasting = 0.0
        """Of the latest two timers the one that was less late: a single pause is no overload."""
        self._begin()

    def _begin(self) -> None:
        self._timer = self._loop.call_later(_LATENESS_INTERVAL, self._fired, perf_counter() + _LATENESS_INTERVAL)

    def _fired(self, due: float) -> None:
        before, self._latest = self._latest, max(0.0, perf_counter() - due)
        self.lasting = min(before, self._latest)
        self._measured(self._latest)
        self._begin()

    def stop(self) -> None:
        self._timer.cancel()


class Proxy:
    """The relay of one worker.

    `observer(route, upstream, model)` gives what these labels are recorded by; the first two are empty where there is
    no route. `lagged` is told how late the loop is. Create, and close, in the running loop.
    """

    def __init__(
        self, config: Config, observer: Callable[[str, str, str], Observer], lagged: Callable[[float], None]
    ) -> None:
        self.lateness = Lateness(asyncio.get_running_loop(), lagged)
        self.limits = config.limits
        self.max_body = config.max_body
        self.models = config.metrics.models
        self.names_models = config.access_log.exchanges != "off"
        self.router = routes.Router(config.routes)
        self.observer = observer
        self.upstreams = {upstream.name: Upstream(upstream, config.limits) for upstream in config.upstreams}
        self.admission = Admission(config, lambda: self.lateness.lasting)
        self._trusted = config.trusted_proxies
        self.kept = Kept()
        self.active: set[Relay] = set()
        self.retiring = False
        self.draining = False
        self._closing_idle: asyncio.TimerHandle | None = None
        self.server = DownstreamServer(self.handle, self._malformed, self.limits)

    def handle(self, request: Request) -> Coroutine[None, None, Answer]:
        return Relay(self, request).run()

    def trusts(self, address: str) -> bool:
        """Whether a client at `address` is believed where its requests come from."""
        return bool(self._trusted) and headers.is_within(address, self._trusted)

    def retire(self) -> None:
        """Others take what comes from now on, and there is no hurry: `server.empty` tells when all has ended.

        A client that was promised that its connection stays may be about to use it, so such connections end after
        their next response, which says so, or when they have been idle for a while.
        """
        self.retiring = True
        self.server.close_idle_for(_IDLE_BEFORE_CLOSE)
        self._closing_idle = asyncio.get_running_loop().call_later(_IDLE_BEFORE_CLOSE / 5, self.retire)

    def drain(self) -> None:
        """Connections end after the exchange that is on them, idle ones now; `server.empty` tells when all have."""
        self.draining = True
        self.server.close_idle_for(0.0)

    def end_exchanges(self) -> None:
        """The drain is over: what is still under way ends with an error."""
        for relay in list(self.active):
            relay.fail(Draining())

    async def close(self) -> None:
        if self._closing_idle is not None:
            self._closing_idle.cancel()
        self.lateness.stop()
        await self.server.shutdown(1.0)
        self.server.hangups.close()
        for upstream in self.upstreams.values():
            await upstream.close()

    def _malformed(self, error: RequestError) -> None:
        observer = self.observer("", "", routes.OTHER)
        exchange = Exchange("", "", observer, "", perf_counter())
        exchange.status, exchange.reason, exchange.cause = error.status, error.code, error.cause
        exchange.response_bytes = len(error.body())
        try:
            exchange.begin()
            observer.rejected(error.reason)
        finally:
            exchange.finish(error.outcome)
