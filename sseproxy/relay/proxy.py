"""The relay of one worker: its routes, upstreams, client connections and active exchanges."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import TYPE_CHECKING

from ..errors import Cancelled, Draining, RequestError
from ..ledger.remote import Remote
from ..wire import headers
from . import affinity, routes
from .admission import Admission, Connections, fleet_upstreams, pending
from .answers import Answer
from .clients import Clients
from .downstream import Request, new_request_id
from .exchange import Exchange, Observer
from .models import ModelLists
from .phases import Relay
from .pool import Upstream
from .server import DownstreamServer

if TYPE_CHECKING:
    from ..config import Config
    from ..ledger.table import Row

# Seconds. When new workers have taken over, a client connection without a request for so long is closed: its client is
# unlikely to be just about to use it.
_IDLE_BEFORE_CLOSE = 5.0
# Seconds between two measurements: the beginning and the end of an overload are noticed within a second or so.
_LAG_INTERVAL = 0.25


class LoopLag:
    """Measures how late the timers of an event loop fire. `measured` is called with each value, in seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, measured: Callable[[float], None]) -> None:
        self._loop = loop
        self._measured = measured
        self._latest = 0.0
        self.lasting = 0.0
        """The smaller one of the last two values, in seconds: a single pause is not an overload."""
        self._begin()

    def _begin(self) -> None:
        # A CPU quota stops a worker at regular times, every 100 ms. Timers with equal intervals could miss all of them.
        interval = _LAG_INTERVAL * random.uniform(0.8, 1.2)
        self._timer = self._loop.call_later(interval, self._fired, perf_counter() + interval)

    def _fired(self, due: float) -> None:
        before, self._latest = self._latest, max(0.0, perf_counter() - due)
        self.lasting = min(before, self._latest)
        self._measured(self._latest)
        self._begin()

    def stop(self) -> None:
        self._timer.cancel()


class Proxy:
    """The relay of one worker.

    `observer(route, upstream, model)` returns the observer for an exchange with these labels. Without a route, the
    first two are empty. `lagged` is called with the lag of the loop, in seconds. `row` is the worker's row in the
    ledger. It can have `most_connections` client connections. Create and close the `Proxy` in the running loop.
    """

    def __init__(
        self,
        config: Config,
        observer: Callable[[str, str, str], Observer],
        lagged: Callable[[float], None],
        row: Row,
        most_connections: int,
    ) -> None:
        self.loop_lag = LoopLag(asyncio.get_running_loop(), lagged)
        self.limits = config.limits
        self.max_body = config.max_body
        self.models = config.metrics.models
        self.names_models = config.access_log.exchanges != "off"
        self.router = routes.Router(config.routes)
        self.observer = observer
        fleet = fleet_upstreams(config)
        self.upstreams = {
            upstream.name: Upstream(
                upstream, config.limits, row, row.count(pending(upstream.name)), counted=upstream.name in fleet
            )
            for upstream in config.upstreams
        }
        self.only = {
            route.name: (upstream, upstream.only)
            for route in config.routes
            for target in route.upstream
            if len(route.upstream) == 1
            and target.model is None
            and "same" not in route.retry.on
            and (upstream := self.upstreams[target.name]).only is not None
            and target.name not in fleet
        }
        """The upstream and the endpoint of each route for which there is never another one, and nothing is counted."""
        self.alone = {
            route.name: self.upstreams[target.name]
            for route in config.routes
            for target in route.upstream
            if len(route.upstream) == 1
            and target.model is None
            and route.retry.until == "head"
            and not self.upstreams[target.name].affinity
            and target.name in fleet
        }
        """The upstream of each route with only one, whose first endpoint depends on nothing in the request."""
        self.models_of = {
            route.name: ModelLists(
                [self.upstreams[one.name] for one in route.upstream if one.model is None],
                route.upstream[0].name if config.clients is None else None,
            )
            for route in config.routes
            if route.merge_models
        }
        """The lists of models of the routes that merge them. An upstream whose model is set has none to choose from."""
        self.reads_bodies = frozenset(
            route.name
            for route in config.routes
            if any(target.model is not None for target in route.upstream)
            or affinity.reads_body(self.upstreams[route.upstream[0].name].affinity)
        )
        """The routes whose bodies are read in advance, to replace the model or to assign the request to an endpoint."""
        self.clients: Clients | None = None
        if config.clients is not None:
            self.clients = Clients(config.clients, row, self._server(config, row))
        self.admission = Admission(config, lambda: self.loop_lag.lasting, row)
        self._trusted = config.trusted_proxies
        self.counted = row.counted
        self.active: set[Relay] = set()
        self.inflating = asyncio.Lock()
        self.retiring = False
        self.draining = False
        self._closing_idle: asyncio.TimerHandle | None = None
        slots = Connections(self.limits, row, most_connections)
        self.server = DownstreamServer(self.handle, self._malformed, self.limits, slots)

    def _server(self, config: Config, row: Row) -> Remote | None:
        """What counts the use of clients on several machines."""
        if config.ledger.url is None:
            return None
        failed = self.observer("", "", routes.OTHER).ledger_failed
        refuses = config.ledger.on_failure == "refuse"
        return Remote(config.ledger.url.reveal(), row.machine, failed, refuses=refuses)

    def handle(self, request: Request) -> Coroutine[None, None, Answer]:
        return Relay(self, request).run()

    def trusts(self, address: str) -> bool:
        """Whether a client at `address` is a trusted proxy, whose forwarding fields are believed."""
        return bool(self._trusted) and headers.is_within(address, self._trusted)

    def retire(self) -> None:
        """Ends all connections without haste, because other workers have taken over. `server.empty` is set at the end.

        The client of a keep-alive connection may be just about to send a request. So such a connection is closed after
        its next response, which says `Connection: close`, or when it has been idle for a while.
        """
        self.retiring = True
        self.server.close_idle_for(_IDLE_BEFORE_CLOSE)
        self._closing_idle = asyncio.get_running_loop().call_later(_IDLE_BEFORE_CLOSE / 5, self.retire)

    def drain(self) -> None:
        """Closes idle connections now, and others after their current exchange. `server.empty` is set at the end."""
        self.draining = True
        self.server.close_idle_for(0.0)

    def end_exchanges(self) -> None:
        """Ends all active exchanges with an error, because the drain timeout has passed."""
        for relay in list(self.active):
            relay.fail(Draining())

    def cancel(self, exchange: Exchange) -> None:
        """Ends `exchange`, if it is active, because an operator wants that."""
        for relay in list(self.active):
            if relay.exchange is exchange:
                relay.fail(Cancelled())

    async def close(self) -> None:
        if self._closing_idle is not None:
            self._closing_idle.cancel()
        self.loop_lag.stop()
        await self.server.shutdown(1.0)
        self.server.hangups.close()
        for models in self.models_of.values():
            await models.close()
        for upstream in self.upstreams.values():
            await upstream.close()
        if self.clients is not None and self.clients.server is not None:
            await self.clients.server.close()

    def _malformed(self, error: RequestError) -> Answer:
        observer, request_id = self.observer("", "", routes.OTHER), new_request_id()
        exchange = Exchange("", "", observer, request_id.decode(), perf_counter())
        exchange.status, exchange.reason, exchange.cause = error.status, error.code, error.cause
        answer = Answer.of(error, extra=[(b"X-Request-Id", request_id)])
        exchange.response_bytes = len(answer.body)
        try:
            exchange.begin()
            observer.rejected(error.reason)
        finally:
            exchange.finish(error.outcome)
        return answer
