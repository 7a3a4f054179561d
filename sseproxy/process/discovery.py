"""Looks up the addresses of a name, once for all workers, and gives each address a place in the ledger.

An address keeps its place as long as the name has it. A place is used for another address only when no exchange is left
with the address before, so that what is counted in a place is always about one address.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from threading import Thread
from typing import TYPE_CHECKING, Final

from yarl import URL

from ..ledger.endpoints import MAX_ADDRESSES, Addresses, Standing, address_key, of_host
from ..ledger.table import Row
from ..relay.pool import micros
from ..signals import hold_back

if TYPE_CHECKING:
    from ..config import Upstream

log = logging.getLogger(__name__)

Address = IPv4Address | IPv6Address

# The share of the interval by which look-ups, and checks, are early or late. So those of many machines spread out.
JITTER: Final = 0.1


async def look_up(host: str, port: int) -> list[Address]:
    """The addresses of `host`, as the system's resolver orders them, for families that this machine has.

    Raises `OSError`, or `UnicodeError` if `host` cannot be the name of a host.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[Address]] = loop.create_future()

    def settle(addresses: list[Address] | BaseException) -> None:
        if found.cancelled():
            return
        if isinstance(addresses, BaseException):
            found.set_exception(addresses)
        else:
            found.set_result(addresses)

    def work() -> None:
        hold_back()
        result: list[Address] | BaseException
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
            # An address with a scope ("%eth0") is of one link only, and has no place in a table of addresses.
            result = [ip_address(to[0]) for *_, to in entries if "%" not in str(to[0])]
        except (OSError, UnicodeError) as error:
            result = error
        # The loop may be closed by now.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result)

    # A thread of its own, and not `loop.getaddrinfo`: a process waits at its end for look-ups that are under way, which
    # take 10 seconds or more if the name server does not answer.
    try:
        Thread(target=work, name="look-up", daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from None
    return await found


class Places:
    """The addresses of a name by place. `taken` are those that are known from before."""

    def __init__(self, taken: Mapping[int, Address]) -> None:
        self.taken = dict(taken)
        # The other places, with the address that each had last. The first one has been free for the longest time.
        self._free: dict[int, Address | None] = {place: None for place in range(MAX_ADDRESSES) if place not in taken}

    def replace(self, found: Iterable[Address], busy: Callable[[int], bool]) -> int:
        """Gives each address in `found` a place, and takes away the places of all others.

        A place that is `busy` is only used for the address that it had last. Returns how many addresses have no place.
        """
        left = dict.fromkeys(found)
        for place, address in [*self.taken.items()]:
            if address in left:
                del left[address]
            else:
                self._free[place] = self.taken.pop(place)
        for address in [*left]:
            ours = (place for place, last in self._free.items() if last == address)
            free = next(ours, None)
            if free is None:
                free = next((place for place in self._free if not busy(place)), None)
            if free is not None:
                del self._free[free], left[address]
                self.taken[free] = address
        return len(left)


class Discovery:
    """Looks up the host in the URL of `upstream` until it is closed. `changed` is called when its addresses change.

    `row` is that of the supervisor.
    """

    def __init__(self, upstream: Upstream, row: Row, changed: Callable[[], None]) -> None:
        url = URL(upstream.endpoints[0].url, encoded=True)
        self.name = of_host(upstream.name, upstream.endpoints[0].url)
        self.interval = upstream.resolve or 0.0
        """Seconds between two look-ups."""
        self.port = url.port or 0
        self._upstream = upstream.name
        self._host = url.raw_host or ""
        self._addresses = Addresses(row, self.name)
        self._places = Places(self._addresses.read())
        self._standings = [Standing(row, self.name, address_key(place)) for place in range(MAX_ADDRESSES)]
        self._changed = changed
        self._failed = self._overflowed = False
        self._looked_up = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def addresses(self) -> Mapping[int, Address]:
        """The addresses by place. Empty if none has been found yet."""
        return self._places.taken

    def standing(self, place: int) -> Standing:
        return self._standings[place]

    async def first(self) -> None:
        """Waits until addresses are known, or a look-up has failed."""
        if not self.addresses:
            await self._looked_up.wait()

    async def _run(self) -> None:
        while True:
            try:
                found = await look_up(self._host, self.port)
            except (OSError, UnicodeError) as error:
                self._lost(getattr(error, "strerror", None) or str(error))
            else:
                if found:
                    self._found(found)
                else:
                    self._lost("it has no address")
            self._looked_up.set()
            await asyncio.sleep(self.interval * random.uniform(1 - JITTER, 1 + JITTER))

    def _lost(self, why: str) -> None:
        if not self._failed:
            known = len(self.addresses)
            log.warning(
                "upstream %s: %s cannot be resolved (%s): %s",
                self._upstream,
                self._host,
                why,
                f"its last addresses ({known}) stay in use" if known else "no address of it is known yet",
            )
        self._failed = True

    def _found(self, found: list[Address]) -> None:
        if self._failed:
            log.info("upstream %s: %s can be resolved again", self._upstream, self._host)
            self._failed = False
        before = dict(self.addresses)
        # The order of a name server changes from answer to answer.
        without = self._places.replace(sorted(found, key=int), lambda place: self._standings[place].active.total() > 0)
        if without and not self._overflowed:
            log.warning(
                "upstream %s: %s has %d addresses, of which %d are not used: there may be %d, and no other address "
                "takes the place of one that still has requests",
                self._upstream,
                self._host,
                len(set(found)),
                without,
                MAX_ADDRESSES,
            )
            self._overflowed = True
        if before != self.addresses:
            now = micros()
            for place, address in self.addresses.items():
                if before.get(place) != address:
                    self._standings[place].admit(now)
            self._addresses.replace(self.addresses, now)
            self._changed()

    def close(self) -> None:
        """Ends the look-ups. Workers keep the addresses."""
        self._task.cancel()
