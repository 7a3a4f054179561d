"""Which endpoint of an upstream is asked: the one with the fewest active requests, summed over all workers.

Of those that have equally many, each is asked in turn. Endpoints that are ejected or that rest are left out. With
affinity, requests with the same key go to the same endpoint, unless that has many more requests than the others.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from hashlib import blake2b
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from ..ledger.endpoints import (
    Addresses,
    Standing,
    address_key,
    address_label,
    labels,
    later_attempts,
    loads,
    of_host,
)
from .upstream import Endpoint

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

    from ..config import Limits
    from ..config import Upstream as UpstreamConfig
    from ..ledger.table import Count, Row

# Models of one upstream for which it is remembered whether they accept `stream_options`. Clients choose their names, so
# there must be a limit.
_MAX_MODELS: Final = 1024
# An endpoint gets the requests that belong to it, as long as it does not have more than so many times the mean.
# Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads" (2018).
_MOST_OF_MEAN: Final = 1.25
# Seconds that an endpoint rests at most, whatever its `retry-after` says.
_MAX_REST: Final = 60.0
# Later attempts that wait for a response head: at most this share of what is under way, and always so many.
_LATER_SHARE: Final = 0.2
_LATER_ALWAYS: Final = 3


def micros() -> int:
    """The time in whole microseconds, as it is stored in the ledger."""
    return perf_counter_ns() // 1_000


class Upstream:
    """A named API: its endpoints. Create and close it in the running loop.

    `pending` counts the connections to it that are being established. Its endpoints are counted in `row`, if they are
    `counted` there.
    """

    def __init__(self, config: UpstreamConfig, limits: Limits, row: Row, pending: Count, *, counted: bool) -> None:
        self.name = config.name
        self.affinity = config.affinity
        self._config = config
        self._limits = limits
        self._row = row
        self._pending = pending
        self.later = row.count(later_attempts(config.name)) if counted else None
        """Later attempts that wait for a response head."""
        self._rests = row.rests
        self.some_are_out = False
        """Whether some of its endpoints may have been ejected when the last one was chosen."""
        self._stream_options: dict[str | None, bool] = {}
        names = labels([endpoint.url for endpoint in config.endpoints])
        self._named = [
            Endpoint(each, config, limits, pending, label, Standing(row, config.name, label) if counted else None)
            for each, label in zip(config.endpoints, names, strict=True)
        ]
        self._use(self._named)
        # Those at addresses that were resolved, by place. One whose address is gone is kept while it has an exchange.
        self._resolved: dict[int, tuple[IPv4Address | IPv6Address, Endpoint]] = {}
        self._leaving: list[Endpoint] = []
        self._addresses = (
            Addresses(row, of_host(config.name, config.endpoints[0].url)) if config.resolve is not None else None
        )
        self._version = 0
        # The place after the endpoint that was chosen last. Workers begin at different ones.
        self._turn = random.randrange(len(names))

    @property
    def base_path(self) -> str:
        """The path of its URL, or of the first one."""
        return self._named[0].base_path

    @property
    def only(self) -> Endpoint | None:
        """Its one endpoint, if it has only one, for ever."""
        return self._named[0] if len(self._named) == 1 and self._addresses is None else None

    def takes_stream_options(self, model: str | None) -> bool | None:
        """Whether `model` accepts `stream_options`. None if that is not known yet."""
        return self._stream_options.get(model)

    def remember_stream_options(self, model: str | None, taken: bool) -> None:
        if self._stream_options.get(model) is taken:
            return
        while len(self._stream_options) >= _MAX_MODELS:
            del self._stream_options[next(iter(self._stream_options))]
        self._stream_options[model] = taken

    def choose(
        self, model: str | None, key: bytes | None, tried: Collection[Endpoint] = (), *, any_state: bool = False
    ) -> Endpoint | None:
        """The endpoint that is asked for `model`, or None if there is none left.

        `key` is what the request is assigned by, if anything. None of those `tried` is chosen. With `any_state`, those
        that are ejected or rest may be chosen as well.
        """
        if self._addresses is not None and self._addresses.version != self._version:
            self._read_addresses(self._addresses)
        left = self.endpoints
        active = None if tried or self._loads is None else self._loads.read()
        self.some_are_out = active is None
        if active is None:
            left = self._left(model, tried, micros(), any_state=any_state)
            on_trial = next((one for one in left if one.standing is not None and one.standing.is_out), None)
            if on_trial is not None and on_trial.standing is not None and not any_state:
                on_trial.standing.try_once()
                return on_trial
            if len(left) < 2:
                return left[0] if left else None
            active = [0 if one.standing is None else one.standing.active.total() for one in left]
        if key is not None:
            most = _MOST_OF_MEAN * (sum(active) + 1) / len(left)
            ranks = sorted(range(len(left)), key=lambda place: _rank(key, left[place]), reverse=True)
            # One is always below the mean.
            return left[next(place for place in ranks if active[place] < most)]
        number = len(left)
        place = self._turn % number
        if active[place]:
            # Another one may have fewer. None has fewer than 0.
            place = [*active, *active].index(min(active), place) % number
        self._turn = place + 1
        return left[place]

    def _left(self, model: str | None, tried: Collection[Endpoint], now: int, *, any_state: bool) -> list[Endpoint]:
        """The endpoints that can be chosen."""
        left = [one for one in self.endpoints if one not in tried]
        if any_state:
            return left
        left = [one for one in left if one.standing is None or one.standing.usable]
        return [one for one in left if not self._is_resting(one, model, now)] if self._rests.any(now) else left

    def _use(self, endpoints: list[Endpoint]) -> None:
        # In the order in which their loads are read.
        self.endpoints = sorted(endpoints, key=lambda one: -1 if one.standing is None else one.standing.place)
        standings = [one.standing for one in endpoints if one.standing is not None]
        self.has_several = len(endpoints) > 1
        """Whether it has more than one endpoint now."""
        # Of one endpoint there is nothing to compare.
        self._loads = loads(standings) if self.has_several and len(standings) == len(endpoints) else None

    def usable(self) -> list[Endpoint]:
        """The endpoints that are not ejected, or all if none is left."""
        if self._addresses is not None and self._addresses.version != self._version:
            self._read_addresses(self._addresses)
        return [one for one in self.endpoints if one.standing is None or not one.standing.is_out] or self.endpoints

    def rest(self, endpoint: Endpoint, model: str | None, seconds: float) -> None:
        """`endpoint` is not asked for `model`, or if that is None for anything, for so many seconds.

        An empty `model` is that of all requests whose model is not known.
        """
        until = micros() + int(min(seconds, _MAX_REST) * 1_000_000)
        self._rests.add(self._rest_name(endpoint, model), until)

    def _rest_name(self, endpoint: Endpoint, model: str | None) -> str:
        return f"{self.name} {endpoint.label}" if model is None else f"{self.name} {endpoint.label} {model}"

    def _is_resting(self, endpoint: Endpoint, model: str | None, now: int) -> bool:
        names = self._rest_name(endpoint, None), self._rest_name(endpoint, model or "")
        return any(self._rests.until(name, now) > now for name in names)

    @property
    def has_room_for_later(self) -> bool:
        """Whether one more later attempt may be made: so a sick fleet is not hit twice as hard."""
        assert self.later is not None
        waiting = self.later.total()
        if waiting < _LATER_ALWAYS:
            return True
        under_way = sum(one.standing.active.total() for one in self.endpoints if one.standing is not None)
        return waiting < _LATER_SHARE * under_way

    def _read_addresses(self, addresses: Addresses) -> None:
        """Takes over what the name resolves to now."""
        version = addresses.version
        found = addresses.read()
        config = self._config.endpoints[0]
        port = self._named[0].port
        for place, address in found.items():
            known = self._resolved.get(place)
            if known is None or known[0] != address:
                if known is not None:
                    self._leaving.append(known[1])
                standing = Standing(self._row, of_host(self.name, config.url), address_key(place))
                self._resolved[place] = (
                    address,
                    Endpoint(
                        config,
                        self._config,
                        self._limits,
                        self._pending,
                        address_label(address, port),
                        standing,
                        str(address),
                    ),
                )
        for place in self._resolved.keys() - found.keys():
            self._leaving.append(self._resolved.pop(place)[1])
        # Before the first address is known, connections go to the name.
        self._use([endpoint for _, endpoint in self._resolved.values()] or self._named)
        self._version = version

    def _all(self) -> Iterator[Endpoint]:
        yield from self._named
        yield from (endpoint for _, endpoint in self._resolved.values())
        yield from self._leaving

    @property
    def connecting(self) -> int:
        """How many of the connections in use are still being made."""
        return self._pending.own

    def connections(self) -> tuple[int, int]:
        """How many connections are (in use, idle)."""
        # Connections to addresses that are gone are closed by their keep-alive timeout.
        self._leaving = [endpoint for endpoint in self._leaving if any(endpoint.connections())]
        counts = [endpoint.connections() for endpoint in self._all()]
        return sum(used for used, _ in counts), sum(idle for _, idle in counts)

    async def close(self) -> None:
        for endpoint in self._all():
            await endpoint.close()


def _rank(key: bytes, endpoint: Endpoint) -> bytes:
    """Thaler and Ravishankar, "A name-based mapping scheme for rendezvous" (1996)."""
    return blake2b(endpoint.label.encode(), key=key, digest_size=8).digest()
