"""The supervisor's part in a fleet: which endpoints are used, active checks, and the addresses of names.

Workers write into the ledger what they see of each endpoint. The supervisor reads it a few times a second, decides
(`ejection`), and tells all workers in its own row. If an upstream has `health`, the supervisor also checks the
endpoints itself. If no upstream has several endpoints or checks, and no route has several upstreams, nothing of this
runs.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Final, NamedTuple

from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, hdrs
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from .. import __version__
from ..ledger.endpoints import Standing, address_key, address_label, labels, of_host
from ..ledger.table import Ledger, Row
from ..observe import metrics
from ..observe.metrics import Labels, Recorder
from ..relay.admission import counted, fleet_upstreams
from ..relay.pool import micros
from ..wire.headers import credential
from .discovery import JITTER, Address, Discovery, look_up
from .ejection import Admitted, Ejected, Fleet, OnTrial

if TYPE_CHECKING:
    import ssl

    from ..config import Config
    from ..config import Endpoint as EndpointConfig
    from ..config import Health as HealthConfig
    from ..config import Upstream as UpstreamConfig

log = logging.getLogger(__name__)

# Seconds between two looks at the ledger. So long an endpoint is still used after the failure that ejects it.
_INTERVAL: Final = 0.25
# Seconds that workers wait for the addresses of names before they start. Without addresses they connect to the name.
_FIRST_LOOK_UP: Final = 2.0
# Seconds until the first check of an endpoint, at most.
_FIRST_CHECK: Final = 1.0
# Characters of an error in the log. Libraries quote what the endpoint has sent.
_LONGEST_REASON: Final = 200
_SECOND: Final = 1_000_000


class _Resolver(AbstractResolver):
    """Resolves the name of an endpoint: to `address`, or if that is None, by looking it up."""

    def __init__(self, address: Address | None) -> None:
        self._address = address
        self._looking: asyncio.Task[list[Address]] | None = None

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = await self._look_up(host, port) if self._address is None else [self._address]
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def _look_up(self, host: str, port: int) -> list[Address]:
        # If the name server does not answer, the next check waits for the same look-up: each one needs a thread.
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(look_up(host, port))
        return await asyncio.shield(self._looking)

    async def close(self) -> None:
        pass


async def check(
    url: URL, resolver: AbstractResolver, fields: Mapping[str, str], seconds: float, tls: ssl.SSLContext | None
) -> str | None:
    """Asks `url` on a new connection. Returns what is wrong, or None if it is well."""
    connector = TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True, ssl=tls or True)
    try:
        async with (
            ClientSession(
                connector=connector, cookie_jar=DummyCookieJar(), timeout=ClientTimeout(total=seconds)
            ) as session,
            session.get(url, headers=fields, allow_redirects=False) as response,
        ):
            return None if 200 <= response.status < 300 else f"status {response.status}"
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except (ClientError, OSError, ValueError) as error:
        return (str(error) or type(error).__name__)[:_LONGEST_REASON]


class _Endpoint(NamedTuple):
    """One endpoint of an upstream. Of two with the same `key`, the same is counted in the ledger."""

    label: str
    key: str
    standing: Standing
    config: EndpointConfig
    address: Address | None


class _Upstream:
    """Follows the endpoints of one upstream."""

    def __init__(
        self, config: UpstreamConfig, row: Row, discovery: Discovery | None, recorder: Recorder, serials: Iterator[int]
    ) -> None:
        self.fleet = Fleet(config.ejection.failures, int(config.ejection.time * _SECOND))
        self.endpoints: dict[str, _Endpoint] = {}
        """By their labels."""
        self._recorder = recorder
        self._serials = serials
        self._checks: dict[str, asyncio.Task[None]] = {}
        # What was wrong in the last check of an endpoint.
        self._wrong: dict[str, str] = {}
        self.configure(config, row, discovery)

    def configure(self, config: UpstreamConfig, row: Row, discovery: Discovery | None) -> None:
        """Follows the endpoints of `config` from now on. What is known of those that stay is kept."""
        self.config = config
        self.discovery = discovery
        self._row = row
        self._tls: ssl.SSLContext | None = None
        self.fleet.failures, self.fleet.time = config.ejection.failures, int(config.ejection.time * _SECOND)
        self._end_checks()
        self.refresh()

    def refresh(self) -> None:
        """Follows the endpoints that there are now."""
        now = micros()
        found = {endpoint.label: endpoint for endpoint in self._found()}
        for label, endpoint in [*self.endpoints.items()]:
            if label not in found or found[label].key != endpoint.key:
                self._remove(endpoint)
        for label, endpoint in found.items():
            if label not in self.endpoints:
                self.fleet.add(label, now, out=endpoint.standing.is_out)
                # Counters start at 0, so that the first event is an increase that an alert can see.
                for reason in ("failures", "refused", *(["health"] if self.config.health is not None else [])):
                    self._recorder.count(metrics.ENDPOINT_EJECTIONS, (self.config.name, label, reason), 0)
            self.endpoints[label] = endpoint
            if self.config.health is None:
                self.fleet.checked(label, True)
            elif label not in self._checks:
                self._checks[label] = asyncio.get_running_loop().create_task(self._check(endpoint, self.config.health))

    def _found(self) -> Iterator[_Endpoint]:
        config, discovery = self.config, self.discovery
        if discovery is not None and discovery.addresses:
            for place, address in discovery.addresses.items():
                label, key = address_label(address, discovery.port), f"{discovery.name} {address_key(place)}"
                yield _Endpoint(label, key, discovery.standing(place), config.endpoints[0], address)
        else:
            for each, label in zip(config.endpoints, labels([each.url for each in config.endpoints]), strict=True):
                yield _Endpoint(label, f"{config.name} {label}", Standing(self._row, config.name, label), each, None)

    def _remove(self, endpoint: _Endpoint) -> None:
        label = endpoint.label
        endpoint.standing.admit(0)
        del self.endpoints[label]
        self.fleet.remove(label)
        self._wrong.pop(label, None)
        if (task := self._checks.pop(label, None)) is not None:
            task.cancel()

    async def _check(self, endpoint: _Endpoint, options: HealthConfig) -> None:
        """Checks the endpoint until it is cancelled."""
        label = endpoint.label
        url = URL(endpoint.config.url, encoded=True).origin().with_path(options.path, encoded=True)
        fields: dict[str, str] = {hdrs.USER_AGENT: f"sseproxy/{__version__}"}
        if (key := endpoint.config.key or self.config.key) is not None:
            name, value = credential(self.config.api_key_header, key.reveal())
            fields[name.decode()] = value.decode()
        resolver = _Resolver(endpoint.address)
        await asyncio.sleep(random.uniform(0, min(_FIRST_CHECK, options.interval)))
        while True:
            wrong: str | None
            try:
                tls = self._context() if url.scheme == "https" else None
            except (OSError, ValueError) as error:
                wrong = f"the TLS options cannot be used: {error}"
            else:
                wrong = await check(url, resolver, fields, options.timeout, tls)
            self._wrong[label] = wrong or ""
            self.fleet.checked(label, wrong is None)
            await asyncio.sleep(options.interval * random.uniform(1 - JITTER, 1 + JITTER))

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = self.config.tls.context()
        return self._tls

    def decide(self, workers: Sequence[int], now: int) -> None:
        """Looks at the ledger, and tells the workers what has changed. `workers` are the rows of those that accept."""
        evidence = {label: endpoint.standing.evidence() for label, endpoint in self.endpoints.items()}
        for decision in self.fleet.decide(evidence, workers, now):
            standing = self.endpoints[decision.endpoint].standing
            match decision:
                case Ejected(label, reason, again=again):
                    standing.eject(next(self._serials), None)
                    self._recorder.count(metrics.ENDPOINT_EJECTIONS, (self.config.name, label, reason))
                    # An endpoint that is gone for a day fails thousands of trials.
                    level = logging.DEBUG if again else logging.WARNING
                    log.log(
                        level, "upstream %s: endpoint %s is ejected%s", self.config.name, label, self._why(decision)
                    )
                case OnTrial(worker=worker):
                    standing.eject(next(self._serials), worker)
                case Admitted(label, time, at):
                    standing.admit(at)
                    log.info(
                        "upstream %s: endpoint %s is in use again, after %.1f s",
                        self.config.name,
                        label,
                        time / _SECOND,
                    )

    def _why(self, decision: Ejected) -> str:
        label, reason, failures, time, again = decision
        if reason == "health":
            return f" until a health check passes: {failures} have failed, the last one with: {self._wrong[label]}"
        what = f"{failures} times no connection could be made" if reason == "refused" else f"{failures} failures"
        return f" for {time / _SECOND:g} s: {what} {'in its trial' if again else 'since its last success'}"

    def _end_checks(self) -> None:
        for task in self._checks.values():
            task.cancel()
        self._checks.clear()

    def close(self) -> None:
        self._end_checks()


class Health:
    """Follows the endpoints of all upstreams, in the supervisor.

    `workers` returns the rows of the workers that accept requests. The methods are called in the running loop.
    """

    def __init__(self, ledger: Ledger, recorder: Recorder, workers: Callable[[], Sequence[int]]) -> None:
        self._ledger = ledger
        self._recorder = recorder
        self._workers = workers
        self._upstreams: dict[str, _Upstream] = {}
        # By `of_host`.
        self._discoveries: dict[str, Discovery] = {}
        self._prepared: Config | None = None
        self._task: asyncio.Task[None] | None = None
        # It begins at a time, so that no number is the same as one that an earlier version has used.
        self._serials = itertools.count(int(perf_counter() * 1000) + 1)

    async def prepare(self, config: Config, columns: Mapping[str, int]) -> None:
        """Call this before workers with `config` start. Returns when names are resolved, or after two seconds.

        Call `follow` when the workers have started, or with the configuration before if they have not.
        """
        self._prepared = config
        row = self._ledger.own(columns)
        names = [upstream for upstream in config.upstreams if upstream.resolve is not None]
        for upstream in names:
            name = of_host(upstream.name, upstream.endpoints[0].url)
            if name not in self._discoveries:
                self._discoveries[name] = Discovery(upstream, row, self._addresses_changed)
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_LOOK_UP if names else None):
                for upstream in names:
                    await self._discoveries[of_host(upstream.name, upstream.endpoints[0].url)].first()

    def follow(self, config: Config, columns: Mapping[str, int]) -> None:
        """Follows the endpoints of `config`, and those of no other configuration. It was prepared before.

        Workers of other configurations use all endpoints that only they have.
        """
        self._prepared = None
        row = self._ledger.own(columns)
        fleet = fleet_upstreams(config)
        wanted = {upstream.name: upstream for upstream in config.upstreams if upstream.name in fleet}
        for name in self._upstreams.keys() - wanted.keys():
            self._upstreams.pop(name).close()
        for name, upstream in wanted.items():
            discovery = self._discovery(upstream)
            if discovery is not None and upstream.resolve is not None:
                discovery.interval = upstream.resolve
            if name in self._upstreams:
                self._upstreams[name].configure(upstream, row, discovery)
            else:
                self._upstreams[name] = _Upstream(upstream, row, discovery, self._recorder, self._serials)
        used = {upstream.discovery.name for upstream in self._upstreams.values() if upstream.discovery is not None}
        for name in self._discoveries.keys() - used:
            self._discoveries.pop(name).close()
        self._ledger.withdraw(counted(config))
        if self._upstreams and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        elif not self._upstreams:
            self._stop()

    def _discovery(self, upstream: UpstreamConfig) -> Discovery | None:
        return (
            None if upstream.resolve is None else self._discoveries[of_host(upstream.name, upstream.endpoints[0].url)]
        )

    def _addresses_changed(self) -> None:
        for upstream in self._upstreams.values():
            if upstream.discovery is not None:
                upstream.refresh()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL)
            workers, now = self._workers(), micros()
            for upstream in self._upstreams.values():
                upstream.decide(workers, now)

    def gauges(self) -> Iterator[tuple[str, Labels, float]]:
        """The gauges of all endpoints, as they are now."""
        for name, upstream in self._upstreams.items():
            for label, endpoint in upstream.endpoints.items():
                yield metrics.ENDPOINT_UP.name, (name, label), int(upstream.fleet.is_used(label))
                yield metrics.ENDPOINT_ACTIVE.name, (name, label), endpoint.standing.active.total()

    def known(self) -> set[tuple[str, str]]:
        """The upstream and the label of each endpoint, also of those that workers are just being started for."""
        found = {(name, label) for name, upstream in self._upstreams.items() for label in upstream.endpoints}
        if self._prepared is not None:
            for upstream in self._prepared.upstreams:
                found |= {(upstream.name, label) for label in labels([each.url for each in upstream.endpoints])}
                if (discovery := self._discovery(upstream)) is not None:
                    addresses = discovery.addresses.values()
                    found |= {(upstream.name, address_label(address, discovery.port)) for address in addresses}
        return found

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def close(self) -> None:
        """Ends all checks and look-ups."""
        self._stop()
        for upstream in self._upstreams.values():
            upstream.close()
        for discovery in self._discoveries.values():
            discovery.close()
