"""What all workers know about the endpoints of upstreams, and what the supervisor has decided about them.

Times are whole microseconds of `perf_counter`, which is the same in all processes of a machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from .table import Count, Loads, Row

MAX_ADDRESSES: Final = 64
"""Addresses of one name that are used. If there are more, the others are not used."""

# What is counted for an endpoint. Workers write all of these but the last one.
_COUNTS: Final = ("active", "failures", "refusals", "failing since", "succeeded at", "passed at", "out")
# Bits of `out` for the row of the worker that tries the endpoint, plus one. The upper bits number the trials.
_ROW_BITS: Final = 16
_ROW_MASK: Final = (1 << _ROW_BITS) - 1
_PORTS: Final = {"http": 80, "https": 443}
_LOW: Final = (1 << 64) - 1


def labels(urls: Sequence[str]) -> list[str]:
    """What the endpoints of an upstream with these `urls` are called, in metrics and in the ledger: `host:port`.

    With the path where several have the same host and port, and with a number where they have the same URL.
    """
    places = [urlsplit(url) for url in urls]
    hosts = [place.netloc if place.port else f"{place.netloc}:{_PORTS[place.scheme]}" for place in places]
    names = [host if hosts.count(host) == 1 else host + place.path for host, place in zip(hosts, places, strict=True)]
    return [
        name if not (before := names[:number].count(name)) else f"{name}#{before + 1}"
        for number, name in enumerate(names)
    ]


def endpoint_counts(upstream: str, key: str) -> list[str]:
    """The names in the ledger for the endpoint `key` of an upstream."""
    return [f"endpoint {upstream} {key} {what}" for what in _COUNTS]


def address_key(place: int) -> str:
    """The key of the endpoint whose address is at `place` among those that a name resolves to."""
    return f"#{place}"


def of_host(upstream: str, url: str) -> str:
    """The name of an upstream together with the host of its `url`.

    The addresses of an upstream are counted under this name. So workers whose configuration has another host for the
    upstream never use them.
    """
    (label,) = labels([url])
    return f"{upstream} {label}"


def address_counts(upstream: str) -> list[str]:
    """The names in the ledger for the addresses that a name resolves to, and their endpoints.

    `upstream` is what `of_host` returns.
    """
    names = [f"addresses {upstream}"]
    for place in range(MAX_ADDRESSES):
        names += _address(upstream, place) + endpoint_counts(upstream, address_key(place))
    return names


def address_label(address: IPv4Address | IPv6Address, port: int) -> str:
    """What an endpoint at an address that was resolved is called."""
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


def later_attempts(upstream: str) -> str:
    """The name in the ledger of the later attempts at an upstream that wait for a response head."""
    return f"later attempts {upstream}"


def _address(upstream: str, place: int) -> list[str]:
    return [f"address {upstream} {place} high", f"address {upstream} {place} low"]


class Evidence(NamedTuple):
    """What all workers together have seen of an endpoint."""

    failures: int
    """Since the last success."""
    refusals: int
    """Those of them in which no connection could be made."""
    succeeded_at: int
    passed_at: int
    """When a trial has passed: its first token was received, or its whole response."""
    active: list[int]
    """The exchanges that it answers, by row."""


class Standing:
    """One endpoint in the ledger. `row` is that of a worker, or of the supervisor."""

    __slots__ = (
        "_failing_since",
        "_failures",
        "_out",
        "_passed_at",
        "_refusals",
        "_row",
        "_succeeded_at",
        "_tried",
        "active",
    )

    def __init__(self, row: Row, upstream: str, key: str) -> None:
        active, failures, refusals, failing_since, succeeded_at, passed_at, out = endpoint_counts(upstream, key)
        self._row = row.number + 1
        self.active: Count = row.count(active)
        """The exchanges that it answers."""
        self._failures = row.count(failures)
        self._refusals = row.count(refusals)
        self._failing_since = row.count(failing_since)
        self._succeeded_at = row.count(succeeded_at)
        self._passed_at = row.count(passed_at)
        self._out = row.told(out)
        self._tried = 0

    # --- a worker ---

    @property
    def place(self) -> int:
        """Where its active exchanges are counted, in the order of `Loads`."""
        return self.active.column

    @property
    def usable(self) -> bool:
        """Whether this worker may use it now: it is not ejected, or this worker is to try it and has not yet."""
        out = self._out.own
        return not out or (out & _ROW_MASK == self._row and out != self._tried)

    @property
    def is_out(self) -> bool:
        """Whether it is ejected."""
        return bool(self._out.own)

    @property
    def on_trial(self) -> bool:
        """Whether it is ejected, and this worker is to try it."""
        return bool(self._out.own) and self.usable

    def try_once(self) -> None:
        """This worker tries it, and so must not try it again."""
        self._tried = self._out.own

    def succeeded(self, now: int) -> None:
        """An exchange with it has ended well."""
        self._succeeded_at.put(now)

    def passed(self, now: int) -> None:
        """A trial has passed."""
        self._passed_at.put(now)

    def failed(self, now: int, *, refused: bool) -> None:
        """An attempt has failed. `refused`: no connection could be made."""
        if max(self._succeeded_at.all()) >= self._failing_since.own:
            self._failures.put(0)
            self._refusals.put(0)
            self._failing_since.put(now)
        # In this order, so that the supervisor never reads fewer refusals than failures where each failure is one.
        self._refusals.add(int(refused))
        self._failures.add(1)

    # --- the supervisor ---

    def evidence(self) -> Evidence:
        """What all workers have seen of it. Keeps the newest success, because the row of a worker that ends is lost."""
        succeeded_at = max(self._succeeded_at.all())
        if succeeded_at > self._succeeded_at.own:
            self._succeeded_at.put(succeeded_at)
        # What a worker saw before the last success of another one does not count any more.
        late = [since > succeeded_at for since in self._failing_since.each()]
        failures = sum(number for number, counts in zip(self._failures.each(), late, strict=True) if counts)
        refusals = sum(number for number, counts in zip(self._refusals.each(), late, strict=True) if counts)
        return Evidence(failures, refusals, succeeded_at, max(self._passed_at.all()), self.active.each())

    def eject(self, serial: int, trial: int | None) -> None:
        """It is not used, but by the worker with the row `trial`, once. `serial` is above 0, and new in each call."""
        self._out.put(serial << _ROW_BITS | (0 if trial is None else trial + 1))

    def admit(self, now: int) -> None:
        """It is used. Failures until `now` do not count any more, no worker's."""
        self._succeeded_at.put(max(now, self._succeeded_at.own))
        self._out.put(0)


def loads(standings: Sequence[Standing]) -> Loads:
    """The active exchanges of two or more endpoints, as long as none is ejected."""
    return Loads([standing.active for standing in standings], [standing._out for standing in standings])


class Addresses:
    """The addresses that the name of an upstream resolves to. The supervisor writes them, and workers read them.

    `upstream` is what `of_host` returns. `row` is that of the worker or of the supervisor. IPv4 addresses are stored as
    IPv6 addresses that are mapped to them (RFC 4291, section 2.5.5.2).
    """

    def __init__(self, row: Row, upstream: str) -> None:
        self._version = row.told(f"addresses {upstream}")
        places = (_address(upstream, place) for place in range(MAX_ADDRESSES))
        self._cells = [(row.told(high), row.told(low)) for high, low in places]

    @property
    def version(self) -> int:
        """Another number after each change. 0 if no address has been found yet."""
        return self._version.own

    def read(self) -> dict[int, IPv4Address | IPv6Address]:
        """The addresses by place."""
        found = {}
        for place, (high, low) in enumerate(self._cells):
            if number := (high.own & _LOW) << 64 | low.own & _LOW:
                address = IPv6Address(number)
                found[place] = address.ipv4_mapped or address
        return found

    def replace(self, addresses: Mapping[int, IPv4Address | IPv6Address], now: int) -> None:
        """Stores `addresses` by place, in the supervisor. Places that are not in it become empty."""
        for place, (high, low) in enumerate(self._cells):
            address = addresses.get(place)
            number = 0 if address is None else int(address)
            if isinstance(address, IPv4Address):
                number |= 0xFFFF << 32
            high.put(_signed(number >> 64))
            low.put(_signed(number & _LOW))
        # A time, so that each version is another one, also if the name was not looked up for a while.
        self._version.put(now)


def _signed(number: int) -> int:
    """A cell holds a signed number of 64 bits."""
    return number - (1 << 64) if number >> 63 else number
