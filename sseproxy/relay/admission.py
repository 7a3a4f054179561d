"""What requests and connections occupy, and the limits on it, which are those of all workers together.

A request has one `Ticket`. Whatever it occupies is taken through that, and given back by one call, in the last phase.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..errors import ExchangeError, RequestError
from ..wire.headers import client_block
from .body import RequestBody

if TYPE_CHECKING:
    from ..config import Config, Limits
    from ..ledger.table import Row

# Under these names all connections and all requests are counted.
CONNECTIONS: Final = "connections"
ACTIVE: Final = "active"
# Connections above their limit that are still told so; more are closed without a word. Each needs a descriptor.
_MOST_TOLD = 500
# Where there is no room for bodies, this part of all of it is made free.
_FREED_AT_ONCE = 16


def told(connections: int) -> int:
    """How many connections beyond `connections` are answered before they are closed."""
    return min(_MOST_TOLD, -(-connections // 8))


def connections_within(descriptors: int) -> int:
    """How many connections may be served with so many descriptors: two for each, and one for each that is only told."""
    return max((descriptors - 1) * 8 // 17, (descriptors - _MOST_TOLD) // 2)


def counted(config: Config) -> list[str]:
    """The names of what is counted in the ledger."""
    routes, upstreams = config.routes, config.upstreams
    return [CONNECTIONS, ACTIVE, *(on_route(route.name) for route in routes), *(pending(up.name) for up in upstreams)]


def on_route(name: str) -> str:
    """Under which name the exchanges on a route are counted."""
    return f"route {name}"


def pending(upstream: str) -> str:
    """Under which name the connections that are being made to an upstream are counted."""
    return f"pending {upstream}"


class Connections:
    """The connections of clients: how many there are, in all workers, and of each client.

    `row` is this worker's. This worker can have `most_here` itself.
    """

    def __init__(self, limits: Limits, row: Row, most_here: int) -> None:
        self._most = limits.connections
        self._most_here = most_here
        self._most_told = told(min(limits.connections, most_here))
        self._most_of_one = limits.connections_per_client
        self._count = row.count(CONNECTIONS)
        self._of_others = row.clients
        # Those that have a place, with the block of their client's address, empty where it has none.
        self._block_of: dict[object, str] = {}
        self._of: Counter[str] = Counter()
        # Those that have none, and are told so.
        self._refused: set[object] = set()

    @property
    def open(self) -> int:
        """How many have a place in this worker."""
        return len(self._block_of)

    @property
    def refused(self) -> int:
        """How many are still to be told that they have none."""
        return len(self._refused)

    @property
    def crowded(self) -> bool:
        """So many were refused that the latest one is not even worth an answer."""
        return self.refused > self._most_told

    def come(self, connection: object, client: str) -> RequestError | None:
        """`connection` was accepted from the address `client`, empty where it has none. It has a place until it is
        `gone`, or none: then the result says why no request is taken on it.
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

    def gone(self, connection: object) -> None:
        """`connection` has ended, whether it had a place or not."""
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
    """The requests that are under way in a worker, and what they may occupy.

    `lag` tells for how long the worker's timers have been late, in seconds. `row` is this worker's.
    """

    def __init__(self, config: Config, lag: Callable[[], float], row: Row) -> None:
        self._limits = config.limits
        self._lag = lag
        self._most_on_route = {route.name: route.limits.active_requests for route in config.routes}
        self._on_route = {route.name: row.count(on_route(route.name)) for route in config.routes}
        self._active = row.count(ACTIVE)
        self._held = 0
        # Those that hold something of their bodies, in the order in which they began to.
        self._holders: dict[Ticket, None] = {}

    def ticket(self, body: RequestBody, refuse: Callable[[ExchangeError], None]) -> Ticket:
        """For a request with `body`, which `refuse` ends. Nothing is occupied yet."""
        ticket = Ticket(self, body, refuse)
        body.held_in(ticket)
        return ticket

    @property
    def empty(self) -> bool:
        """Whether nothing is occupied."""
        on_routes = any(count.own for count in self._on_route.values())
        return not (self._active.own or self._held or self._holders or on_routes)

    def _room(self, size: int, asker: Ticket) -> bool:
        """Whether there is room for `size` bytes more of a body, or could be made."""
        most = self._limits.held
        if self._held + size <= most:
            return True
        # More than is asked for, so that this is not to be done again for each who asks.
        enough = most - most // _FREED_AT_ONCE - size
        for ticket in [ticket for ticket in self._holders if ticket.spare and ticket is not asker]:
            if self._held <= enough:
                break
            ticket.body.forget()
        stays = True
        if asker.collects and self._held + size > most:
            # Clients that take their time hold nobody up who does not.
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
    """What one request occupies."""

    __slots__ = ("_admission", "_admitted", "_held", "_route", "body", "collects", "refuse", "spare")

    def __init__(self, admission: Admission, body: RequestBody, refuse: Callable[[ExchangeError], None]) -> None:
        self._admission: Admission | None = admission
        self._admitted = False
        self._held = 0
        self._route: str | None = None
        self.body = body
        self.refuse = refuse
        self.collects = False
        """Its body is collected: what is held grows with what the client sends."""
        self.spare = False
        """What is held is needed only if the connection that it was sent on turns out to be dead."""

    def admit(self) -> None:
        """It is under way. Raises `RequestError` if too many are, or the worker cannot keep up."""
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
        """It is a request on `route`. Raises `RequestError` if there are too many."""
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
        """The request has ended. Nothing is occupied any more, whatever it was."""
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
