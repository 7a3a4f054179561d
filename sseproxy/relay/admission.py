"""Limits on connections, requests, and the memory for request bodies.

Counts are those of all workers together, in the ledger. The memory for bodies is limited in each worker.

Each request has one `Ticket`. The ticket counts what the request occupies. The last phase releases all of it at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..errors import ExchangeError, RequestError
from ..ledger.endpoints import address_counts, endpoint_counts, labels, later_attempts, of_host
from ..wire.headers import client_block
from . import clients
from .body import RequestBody

if TYPE_CHECKING:
    from ..config import Config, Limits
    from ..ledger.table import Row

# The names in the ledger of all client connections and all requests.
CONNECTIONS: Final = "connections"
ACTIVE: Final = "active"
# Connections above the limit whose requests are still answered with an error. Each needs a file descriptor. Further
# connections are closed immediately.
_MAX_EXTRA = 500
# If there is no room for a body, a sixteenth of all the memory for bodies is freed at once.
_FREED_AT_ONCE = 16


def extra_connections(connections: int) -> int:
    """How many connections above the limit `connections` still get an error response before they are closed."""
    return min(_MAX_EXTRA, -(-connections // 8))


def connections_within(descriptors: int) -> int:
    """The largest limit of connections for which so many file descriptors are enough.

    Each connection needs two descriptors, its own and one to the upstream. Each extra connection needs one.
    """
    return max((descriptors - 1) * 8 // 17, (descriptors - _MAX_EXTRA) // 2)


def counted(config: Config) -> list[str]:
    """The names of all counts in the ledger."""
    names = [CONNECTIONS, ACTIVE, *(on_route(route.name) for route in config.routes)]
    names += clients.counted(config.clients or ())
    fleet = fleet_upstreams(config)
    for upstream in config.upstreams:
        names.append(pending(upstream.name))
        if upstream.name in fleet:
            names.append(later_attempts(upstream.name))
            for label in labels([endpoint.url for endpoint in upstream.endpoints]):
                names += endpoint_counts(upstream.name, label)
            if upstream.resolve is not None:
                names += address_counts(of_host(upstream.name, upstream.endpoints[0].url))
    return names


def fleet_upstreams(config: Config) -> set[str]:
    """The names of the upstreams whose attempts are counted: those that have several endpoints or checks, and those of
    routes with several upstreams or attempts. With all others there is nothing to choose.
    """
    fleet = {up.name for up in config.upstreams if up.urls or up.resolve is not None or up.health is not None}
    routes = (route for route in config.routes if len(route.upstream) > 1 or "same" in route.retry.on)
    return fleet | {target.name for route in routes for target in route.upstream}


def on_route(name: str) -> str:
    """The name in the ledger of the requests on a route."""
    return f"route {name}"


def pending(upstream: str) -> str:
    """The name in the ledger of the connections to an upstream that are being established."""
    return f"pending {upstream}"


class Connections:
    """Counts the open connections of clients, in total and for each client address.

    `row` is the worker's row in the ledger. This worker can have at most `most_here` connections.
    """

    def __init__(self, limits: Limits, row: Row, most_here: int) -> None:
        self._most = limits.connections
        self._most_here = most_here
        self._extra = extra_connections(min(limits.connections, most_here))
        self._most_of_one = limits.connections_per_client
        self._count = row.count(CONNECTIONS)
        self._of_others = row.clients
        # The counted connections, each with the address block of its client. The block is empty without an address.
        self._block_of: dict[object, str] = {}
        self._of: Counter[str] = Counter()
        # The connections above a limit that are still open.
        self._refused: set[object] = set()

    @property
    def open(self) -> int:
        """How many connections of this worker are counted."""
        return len(self._block_of)

    @property
    def refused(self) -> int:
        """How many connections above a limit are still open."""
        return len(self._refused)

    @property
    def crowded(self) -> bool:
        """Whether so many connections were refused that the newest one is closed without a response."""
        return self.refused > self._extra

    def add(self, connection: object, client: str) -> RequestError | None:
        """Counts `connection` until it is removed. `client` is the address of the client, or empty if it has none.

        Returns None if it is within the limits. Otherwise it is not counted, and the result is the error for every
        request on it.
        """
        block = client_block(client)
        refusal = self._refusal(block)
        if refusal is not None:
            self._refused.add(connection)
            return refusal
        self._block_of[connection] = block
        self._count.add(1)
        if block:
            self._of[block] += 1
            if self._most_of_one is not None:
                self._of_others.add(block, 1)
        return None

    def _refusal(self, block: str) -> RequestError | None:
        if self._count.total() >= self._most or self.open >= self._most_here:
            return RequestError("connections")
        if self._most_of_one is not None and block:
            own = self._of[block]
            if own >= self._most_of_one or own + self._of_others.others(block) >= self._most_of_one:
                return RequestError("connections_per_client")
        return None

    def remove(self, connection: object) -> None:
        """Forgets `connection`, counted or refused."""
        self._refused.discard(connection)
        block = self._block_of.pop(connection, None)
        if block is None:
            return
        self._count.add(-1)
        if block:
            self._of[block] -= 1
            if not self._of[block]:
                del self._of[block]
            if self._most_of_one is not None:
                self._of_others.add(block, -1)


class Admission:
    """Counts the active requests of a worker and the memory for their bodies, and enforces the limits.

    `lag` returns how late the worker's timers fire, in seconds. `row` is the worker's row in the ledger.
    """

    def __init__(self, config: Config, lag: Callable[[], float], row: Row) -> None:
        self._limits = config.limits
        self._lag = lag
        self._most_on_route = {route.name: route.limits.active_requests for route in config.routes}
        self._on_route = {route.name: row.count(on_route(route.name)) for route in config.routes}
        self._active = row.count(ACTIVE)
        self._held = 0
        # The tickets that hold memory for a body, in the order in which they began to.
        self._holders: dict[Ticket, None] = {}

    def ticket(self, body: RequestBody, refuse: Callable[[ExchangeError], None]) -> Ticket:
        """A ticket for a request with `body`, which occupies nothing yet. `refuse` ends the request with an error."""
        ticket = Ticket(self, body, refuse)
        body.charge_to(ticket)
        return ticket

    @property
    def empty(self) -> bool:
        """Whether nothing is occupied."""
        on_routes = any(count.own for count in self._on_route.values())
        return not (self._active.own or self._held or self._holders or on_routes)

    def _room(self, size: int, asker: Ticket) -> bool:
        """Whether there is room for `size` more bytes of a body. Frees memory of other bodies if necessary."""
        most = self._limits.held
        if self._held + size <= most:
            return True
        # Frees more than is needed now, so that this loop does not run for each part of a body.
        enough = most - most // _FREED_AT_ONCE - size
        for ticket in [ticket for ticket in self._holders if ticket.spare and ticket is not asker]:
            if self._held <= enough:
                break
            ticket.body.forget()
        stays = True
        if asker.collects and self._held + size > most:
            # The requests whose clients are slowest are refused, so slow clients cannot block fast ones.
            waiting = sorted((ticket for ticket in self._holders if ticket.collects), key=lambda one: one.body.waited)
            while waiting and self._held > enough:
                slowest = waiting.pop()
                slowest.body.close()
                if slowest is asker:
                    stays = False
                else:
                    slowest.refuse(RequestError("held"))
        return stays and self._held + size <= most


class Ticket:
    """Counts what one request occupies."""

    __slots__ = ("_admission", "_admitted", "_held", "_route", "body", "collects", "refuse", "spare")

    def __init__(self, admission: Admission, body: RequestBody, refuse: Callable[[ExchangeError], None]) -> None:
        self._admission: Admission | None = admission
        self._admitted = False
        self._held = 0
        self._route: str | None = None
        self.body = body
        self.refuse = refuse
        self.collects = False
        """Whether the body is being collected, so the memory it needs grows with what the client sends."""
        self.spare = False
        """Whether the held bytes are only needed if the request has to be sent again, so they may be dropped."""

    def admit(self) -> None:
        """Counts the request as active. Raises `RequestError` if too many are, or if the worker is overloaded."""
        admission = self._admission
        assert admission is not None
        limits = admission._limits
        if limits.active_requests is not None and admission._active.total() >= limits.active_requests:
            raise RequestError("active_requests")
        if limits.lag is not None and admission._lag() > limits.lag:
            raise RequestError("overloaded")
        admission._active.add(1)
        self._admitted = True

    def enter(self, route: str) -> None:
        """Counts the request for `route`. Raises `RequestError` if too many requests of this route are active."""
        admission = self._admission
        assert admission is not None
        most = admission._most_on_route[route]
        count = admission._on_route[route]
        if most is not None and count.total() >= most:
            raise RequestError("active_requests")
        count.add(1)
        self._route = route

    def hold(self, size: int) -> bool:
        admission = self._admission
        if admission is None or not admission._room(size, self):
            return False
        admission._held += size
        admission._holders[self] = None
        self._held += size
        return True

    def release(self, size: int) -> None:
        admission = self._admission
        if admission is not None and size:
            admission._held -= size
            self._held -= size
            if not self._held:
                del admission._holders[self]

    def give_back(self) -> None:
        """Releases everything. Called when the request has ended."""
        admission, self._admission = self._admission, None
        if admission is None:
            return
        if self._admitted:
            admission._active.add(-1)
        if self._route is not None:
            admission._on_route[self._route].add(-1)
        if self._held:
            admission._held -= self._held
            del admission._holders[self]
            self._held = 0
