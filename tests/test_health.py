"""A fleet as its supervisor sees it: endpoints that fail and come back, active checks, names whose addresses change."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import trustme
from aiohttp import ClientSession
from dnslib import QTYPE, RCODE, RR, A, DNSRecord  # type: ignore[import-untyped]

from sseproxy import config
from sseproxy.ledger.endpoints import MAX_ADDRESSES
from sseproxy.ledger.table import Ledger
from sseproxy.observe.metrics import Recorder
from sseproxy.process.health import Health
from sseproxy.relay.admission import counted

from .fleet import Act, good, silent, status, then_resets
from .harness import (
    DEADLINE,
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Message,
    Peer,
    ScriptedUpstream,
    chunk,
    delta,
    kept_port,
    post,
)
from .served import Served, program, python_runs_first, serve, until_true, workers_run_first

SERVE = (sys.executable, "-m", "sseproxy")


class Place:
    """An endpoint that may come and go, at one address. It answers each request in its `usual` way."""

    def __init__(self, port: int, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.address = host, port
        self.usual: Act = good()
        self.health = 200
        self.go_on = asyncio.Event()
        self.requests: list[Message] = []
        self.checks: list[Message] = []
        self._tls = tls
        self._server: ScriptedUpstream | None = None

    @property
    def label(self) -> str:
        return "{}:{}".format(*self.address)

    @property
    def url(self) -> str:
        return f"http://{self.label}/v1"

    async def _serve(self, peer: Peer) -> None:
        while True:
            request = await peer.message()
            if request.start_line.split()[1].startswith("/v1/"):
                self.requests.append(request)
                await self.usual(peer)
            else:
                self.checks.append(request)
                await status(self.health)(peer)

    async def opened(self, peer: Peer) -> None:
        """A stream that ends when this place may go on."""
        peer.send(STREAM_HEAD, chunk(delta("Hi")))
        await self.go_on.wait()
        peer.send(chunk(DONE), LAST_CHUNK)

    async def begin(self) -> None:
        self._server = await ScriptedUpstream(self._serve, self._tls, self.address).__aenter__()

    async def end(self) -> None:
        if self._server is not None:
            await self._server.__aexit__()
            self._server = None


@asynccontextmanager
async def places(*hosts: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[list[Place]]:
    """Endpoints at an address each. Without `hosts` there are two, at ports of their own."""
    async with AsyncExitStack() as stack:
        if hosts:
            port = stack.enter_context(kept_port())
            found = [Place(port, host, tls) for host in hosts]
        else:
            found = [Place(stack.enter_context(kept_port())) for _ in range(2)]
        for place in found:
            await place.begin()
            stack.push_async_callback(place.end)
        yield found


class File:
    """A configuration file with one route to the upstream `gpus`."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "sseproxy.yaml"

    def write(self, upstream: str, *, workers: int = 1, retry: str = "{}", timeouts: str = "{}") -> None:
        """`upstream` are the options of the upstream."""
        self.path.write_text(
            "listen: 127.0.0.1:0\n"
            "admin: {listen: '127.0.0.1:0'}\n"
            f"workers: {workers}\n"
            f"upstreams: [{{name: gpus, {upstream}}}]\n"
            f"routes: [{{name: api, match: {{path: /v1}}, upstream: gpus, retry: {retry}, timeouts: {timeouts}}}]\n"
        )

    @asynccontextmanager
    async def serve(self, before: Sequence[str] = (), **environment: str) -> AsyncIterator[Served]:
        async with serve("-c", str(self.path), program=(*before, *SERVE), **environment) as served:
            yield served


def urls(*members: Place, ejection: str = "{failures: 3, time: 1s}") -> str:
    return f"urls: [{', '.join(repr(member.url) for member in members)}], ejection: {ejection}"


async def ask(served: Served) -> int:
    """A request on a connection of its own. Returns the status of the answer."""
    client = Peer(*await asyncio.open_connection("127.0.0.1", served.port))
    try:
        client.send(post())
        return (await client.message()).status
    finally:
        client.writer.transport.abort()


async def is_up(served: Served, label: str, value: int) -> None:
    """Sends requests until the endpoint is in use, or is not."""
    async with asyncio.timeout(DEADLINE):
        while await served.sample(rf'endpoint_up\{{endpoint="{label}",upstream="gpus"\}}') != value:
            await asyncio.gather(*(ask(served) for _ in range(4)))


async def series(served: Served, metric: str) -> dict[str, float]:
    """The samples of a metric by endpoint, added up."""
    found: dict[str, float] = {}
    for name, value in (await served.samples()).items():
        if name.startswith(f"{metric}{{"):
            label = name.partition('endpoint="')[2].partition('"')[0]
            found[label] = found.get(label, 0) + value
    return found


async def post_reload(served: Served) -> tuple[int, str]:
    async with ClientSession() as session, session.post(f"http://127.0.0.1:{served.admin}/-/reload") as response:
        return response.status, await response.text()


async def reload(served: Served) -> None:
    assert await post_reload(served) == (200, "reloaded\n")


async def until_known(served: Served, *labels: str) -> None:
    """Waits until these are the endpoints."""
    async with asyncio.timeout(DEADLINE):
        while (await series(served, "endpoint_up")).keys() != set(labels):  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.02)


async def active(served: Served, requests: int) -> None:
    """Waits until so many requests are counted. One may be counted for a moment after its client has the answer."""
    await served.until(r"endpoint_requests_active\{.*\}", requests)


async def says(served: Served, *parts: str, times: int = 1) -> None:
    """It has logged so many lines with all `parts`."""
    await until_true(lambda: sum(all(part in line for part in parts) for line in served.messages) == times)


async def upgraded(served: Served) -> None:
    """An upgrade to the same code. It starts the workers twice, which takes long on a busy machine."""
    served.process.send_signal(signal.SIGUSR2)
    async with asyncio.timeout(3 * DEADLINE):
        while not any("upgraded from version" in line for line in served.messages):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def test_an_endpoint_that_refuses_is_out_until_it_is_back(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with places() as (one, other):
        file.write(urls(one, other))
        async with file.serve() as served:
            await is_up(served, other.label, 1)
            await other.end()
            await is_up(served, other.label, 0)
            assert {await ask(served) for _ in range(20)} == {200}
            # Trials that fail are no news.
            async with asyncio.timeout(DEADLINE):
                while await served.sample(r'endpoint_ejections_total\{.*reason="refused".*\}') < 2:
                    assert await ask(served) == 200
            assert await served.sample(r'endpoint_ejections_total\{.*reason="refused".*\}') >= 1
            assert await served.sample(r'endpoint_ejections_total\{.*reason="failures".*\}') == 0
            assert await served.sample(rf'endpoint_ejections_total\{{endpoint="{one.label}".*\}}') == 0
            await says(
                served, f"upstream gpus: endpoint {other.label} is ejected for 1 s", "no connection could be made"
            )
            await other.begin()
            await is_up(served, other.label, 1)
            await says(served, f"upstream gpus: endpoint {other.label} is in use again")
            before = len(other.requests)
            for _ in range(10):
                assert await ask(served) == 200
            assert len(other.requests) - before == 5


async def truncated(peer: Peer) -> None:
    peer.send(STREAM_HEAD, chunk(delta("Hi")))
    await peer.drain()
    peer.close()


@pytest.mark.parametrize("act", [status(500), then_resets(), silent], ids=["500", "resets", "hangs"])
async def test_an_endpoint_that_fails_is_tried_by_one_request_at_a_time(tmp_path: Path, act: Act) -> None:
    file = File(tmp_path)
    async with places() as (one, other):
        retry, timeouts = "{on: [connect, '500', reset, timeout]}", "{head: 300ms}"
        file.write(urls(one, other), workers=4, retry=retry, timeouts=timeouts)
        async with file.serve() as served:
            other.usual = act
            await is_up(served, other.label, 0)
            await served.until(rf'endpoint_requests_active\{{endpoint="{other.label}".*\}}', 0)
            before = len(other.requests)
            # All workers know. So after a second there is one trial, and not one for each worker.
            async with asyncio.timeout(DEADLINE):
                while await served.sample(r'endpoint_ejections_total\{.*reason="failures".*\}') < 2:
                    assert await ask(served) == 200
            assert len(other.requests) - before == 1
            other.usual = good()
            await is_up(served, other.label, 1)
            assert await served.sample(rf'endpoint_ejections_total\{{endpoint="{one.label}".*\}}') == 0


async def test_an_endpoint_whose_streams_break_off_is_ejected(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with places() as (one, other):
        file.write(urls(one, other))
        async with file.serve() as served:
            other.usual = truncated
            await is_up(served, other.label, 0)
            other.usual = good()
            await is_up(served, other.label, 1)


async def test_a_worker_that_dies_takes_no_success_with_it(tmp_path: Path) -> None:
    """Nor does it leave anything: what it had under way is no longer counted."""
    file = File(tmp_path)
    async with places() as (one, other):
        file.write(urls(one, other), workers=2)
        async with file.serve() as served:
            one.usual = other.usual = silent
            client = await served.connect()
            client.send(post())
            await served.until(r"endpoint_requests_active\{.*\}", 1)
            for worker in served.workers:
                os.kill(worker, signal.SIGKILL)
            await served.until(r"endpoint_requests_active\{.*\}", 0)
            await served.until("workers", 2)
            one.usual = other.usual = good()
            assert await ask(served) == 200
            assert await series(served, "endpoint_up") == {one.label: 1, other.label: 1}


async def test_checks_take_an_endpoint_out_and_in(tmp_path: Path) -> None:
    file = File(tmp_path)
    checks = "health: {path: /health, interval: 100ms, timeout: 1s}, api_key: sk-ours, api_key_header: x-api-key"
    async with places() as (one, other):
        file.write(f"{urls(one, other)}, {checks}")
        async with file.serve() as served:
            other.health = 503
            await served.until(rf'endpoint_up\{{endpoint="{other.label}".*\}}', 0)
            assert await served.sample(rf'endpoint_up\{{endpoint="{one.label}".*\}}') == 1
            assert await served.sample(r'endpoint_ejections_total\{.*reason="health".*\}') == 1
            await says(served, f"endpoint {other.label} is ejected until a health check passes", "status 503")
            for _ in range(6):
                assert await ask(served) == 200
            assert (len(one.requests), len(other.requests)) == (6, 0)
            other.health = 200
            await served.until(rf'endpoint_up\{{endpoint="{other.label}".*\}}', 1)
            assert await ask(served) == await ask(served) == 200
            assert len(other.requests) == 1
            # As requests, it has the name in the URL, and our key.
            check = one.checks[0]
            assert check.start_line == "GET /health HTTP/1.1"
            assert (check.get("host"), check.get("x-api-key")) == (one.label, "sk-ours")
            # What does not accept, or does not answer, does not pass.
            await other.end()
            await served.until(rf'endpoint_up\{{endpoint="{other.label}".*\}}', 0)
            await other.begin()
            await served.until(rf'endpoint_up\{{endpoint="{other.label}".*\}}', 1)
            assert "sk-ours" not in served.stderr


async def test_a_passed_check_does_not_lift_an_ejection(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with places() as (one, other):
        file.write(
            f"{urls(one, other, ejection='{failures: 3, time: 1m}')}, health: {{path: /health, interval: 50ms}}",
            retry="{on: ['500']}",
        )
        async with file.serve() as served:
            other.usual = status(500)
            await is_up(served, other.label, 0)
            checked = len(other.checks)
            other.usual = good()
            await until_true(lambda: len(other.checks) > checked + 10)
            assert await served.sample(rf'endpoint_up\{{endpoint="{other.label}".*\}}') == 0


async def test_a_reload_forgets_what_it_no_longer_has(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with places() as (one, other):
        file.write(urls(one, other, ejection="{failures: 3, time: 1m}"))
        async with file.serve() as served:
            await other.end()
            await is_up(served, other.label, 0)
            file.write(f"url: {one.url!r}")
            await reload(served)
            for metric in ("endpoint_up", "endpoint_requests_active", "endpoint_ejections_total", "attempts_total"):
                assert await series(served, metric) == {}
            await other.begin()
            file.write(urls(one, other, ejection="{failures: 3, time: 1m}"))
            await reload(served)
            assert await series(served, "endpoint_up") == {one.label: 1, other.label: 1}
            assert await ask(served) == await ask(served) == 200
            assert other.requests[-1:]


# Workers that end at once, as soon as there is a file.
ENDING = workers_run_first("""
if os.path.exists(os.path.join(os.path.dirname(__file__), "end")):
    return
""")


async def test_a_reload_that_fails_goes_on_with_the_endpoints_before(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with places() as (one, other):
        file.write(urls(one, other, ejection="{failures: 3, time: 1m}"))
        async with file.serve(**python_runs_first(ENDING, tmp_path)) as served:
            await other.end()
            await is_up(served, other.label, 0)
            file.write(urls(one))
            (tmp_path / "end").touch()
            status_code, text = await post_reload(served)
            assert (status_code, "did not start" in text) == (503, True)
            assert await series(served, "endpoint_up") == {one.label: 1, other.label: 0}


async def test_an_upgrade_does_not_eject_for_ever(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with places() as (one, other):
        file.write(urls(one, other, ejection="{failures: 3, time: 1m}"))
        async with file.serve() as served:
            await other.end()
            await is_up(served, other.label, 0)
            await upgraded(served)
            # It is still out, so nobody is sent there but one request, which tries it.
            assert await series(served, "endpoint_up") == {one.label: 1, other.label: 0}
            await other.begin()
            await is_up(served, other.label, 1)


async def test_an_upgrade_to_a_configuration_without_the_endpoint_leaves_nothing(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with places() as (one, other):
        file.write(urls(one, other, ejection="{failures: 3, time: 1m}"))
        async with file.serve() as served:
            await other.end()
            await is_up(served, other.label, 0)
            file.write(f"url: {one.url!r}")
            await upgraded(served)
            file.write(urls(one, other, ejection="{failures: 3, time: 1m}"))
            await reload(served)
            assert await series(served, "endpoint_up") == {one.label: 1, other.label: 1}


async def test_nothing_runs_where_there_is_no_choice() -> None:
    one = config.Upstream(name="up", url="http://127.0.0.1:9/v1")
    settings = config.Config(
        upstreams=(one,),
        routes=(config.Route(name="api", match=config.Match(path="/v1"), upstream=(config.Target(name="up"),)),),
    )
    ledger = Ledger(rows=4)
    columns = ledger.columns(counted(settings), ())
    before = asyncio.all_tasks()
    health = Health(ledger, Recorder(), list)
    await health.prepare(settings, columns)
    health.follow(settings, columns)
    assert asyncio.all_tasks() == before
    assert ([*health.gauges()], health.known()) == ([], set())
    health.close()
    ledger.close()


class NameServer(asyncio.DatagramProtocol):
    """A name server at an address of its own. Machines that only ask it resolve only what it knows."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.fails = self.is_silent = False
        self.asked = 0
        self.host = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.asked += 1
        if self.is_silent:
            return
        request = DNSRecord.parse(data)
        answer = request.reply()
        name = str(request.q.qname).rstrip(".")
        if self.fails:
            answer.header.rcode = RCODE.SERVFAIL
        elif name not in self.names:
            answer.header.rcode = RCODE.NXDOMAIN
        elif request.q.qtype == QTYPE.A:
            # As many name servers do, in another order each time.
            for address in random.sample(self.names[name], len(self.names[name])):
                answer.add_answer(RR(name, QTYPE.A, rdata=A(address), ttl=0))
        self.transport.sendto(answer.pack(), addr)


@asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    """A name server, on the port of name servers."""
    needs_root()
    server, loop = NameServer(), asyncio.get_running_loop()
    while not server.host:
        host = f"127.{random.randrange(64, 255)}.{random.randrange(256)}.{random.randrange(1, 255)}"
        with suppress(OSError):
            await loop.create_datagram_endpoint(lambda: server, local_addr=(host, 53))
            server.host = host
    try:
        yield server
    finally:
        server.transport.close()


def asking(server: NameServer, directory: Path) -> list[str]:
    """The beginning of a command for a process that asks `server`. Only that process has another /etc/resolv.conf."""
    resolv = directory / "resolv.conf"
    resolv.write_text(f"nameserver {server.host}\noptions timeout:1 attempts:1\n")
    return mounting(resolv, "/etc/resolv.conf")


def mounting(file: Path, at: str) -> list[str]:
    """The beginning of a command for a process that has another file `at` a path."""
    needs_root()
    return [program("unshare"), "-m", "sh", "-c", f'mount --bind "$0" {at} && exec "$@"', str(file)]


def needs_root() -> None:
    """Only root can listen on port 53, and mount. Who is not root skips the test; CI is."""
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("only root can do this")


def named(port: int, *, resolve: str = "100ms", scheme: str = "http", more: str = "") -> str:
    return f"url: '{scheme}://gpu.test:{port}/v1', resolve: {resolve}, ejection: {{failures: 3, time: 1s}}{more}"


async def test_each_address_of_a_name_is_an_endpoint(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with name_server() as dns, places("127.0.0.2", "127.0.0.3", "127.0.0.4") as three:
        port = three[0].address[1]
        dns.names["gpu.test"] = ["127.0.0.2", "127.0.0.3"]
        file.write(named(port), workers=2)
        async with file.serve(asking(dns, tmp_path)) as served:
            # They are known before the first request.
            assert await series(served, "endpoint_up") == {three[0].label: 1, three[1].label: 1}
            for _ in range(8):
                assert await ask(served) == 200
                await active(served, 0)
            # Each worker takes turns, beginning with any of them.
            counts = [len(place.requests) for place in three]
            assert (sum(counts), counts[2], min(counts[:2]) >= 3) == (8, 0, True)
            assert {request.get("host") for request in three[0].requests} == {f"gpu.test:{port}"}
            # One address goes while it has an exchange, and another one comes.
            three[0].usual, three[1].usual = three[0].opened, three[1].opened
            streams = [await served.connect() for _ in range(2)]
            for stream in streams:
                stream.send(post())
                await stream.read_until(b"Hi")
            dns.names["gpu.test"] = ["127.0.0.3", "127.0.0.4"]
            await until_known(served, three[1].label, three[2].label)
            assert (await series(served, "attempts_total")).keys() <= {three[1].label, three[2].label}
            before = len(three[0].requests)
            for _ in range(4):
                assert await ask(served) == 200
                # The address that is gone is not counted.
                await active(served, 1)
            assert len(three[2].requests) == 4
            assert len(three[0].requests) == before
            # It also goes to an end, and then leaves no series.
            for place in three[:2]:
                place.go_on.set()
            for stream in streams:
                await stream.read_until(LAST_CHUNK)
            await served.until(r"requests_active\{.*\}", 0)
            assert (await series(served, "attempts_total")).keys() == {three[1].label, three[2].label}
            assert await served.sample(r"endpoint_requests_active\{.*\}") == 0


async def test_a_name_that_cannot_be_resolved_keeps_its_addresses(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with name_server() as dns, places("127.0.0.2", "127.0.0.3") as (one, other):
        dns.names["gpu.test"] = ["127.0.0.2", "127.0.0.3"]
        file.write(named(one.address[1]))
        async with file.serve(asking(dns, tmp_path)) as served:
            for attribute, broken in (("fails", True), ("is_silent", True), ("names", {})):
                well = getattr(dns, attribute)
                setattr(dns, attribute, broken)
                asked = dns.asked
                await until_true(lambda: dns.asked >= asked + 3)  # noqa: B023
                assert await series(served, "endpoint_up") == {one.label: 1, other.label: 1}
                assert await ask(served) == 200
                setattr(dns, attribute, well)
                times = 1 + ["fails", "is_silent", "names"].index(attribute)
                await says(served, "gpu.test can be resolved again", times=times)
                # It is said once, and not at each look-up.
                await says(served, "gpu.test cannot be resolved", "its last addresses (2) stay in use", times=times)
            # After a reload and an upgrade they are known as well.
            dns.fails = True
            await reload(served)
            await upgraded(served)
            assert await series(served, "endpoint_up") == {one.label: 1, other.label: 1}
            assert await ask(served) == 200


async def test_a_name_server_that_is_silent_holds_up_neither_the_start_nor_the_end(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with name_server() as dns, places("127.0.0.2") as (one,):
        dns.is_silent = True
        file.write(named(one.address[1]))
        before = asking(dns, tmp_path)
        # This resolver waits for longer than a test may.
        (tmp_path / "resolv.conf").write_text(f"nameserver {dns.host}\noptions timeout:30 attempts:2\n")
        async with file.serve(before) as served:
            assert await series(served, "endpoint_up") == {f"gpu.test:{one.address[1]}": 1}
            served.process.send_signal(signal.SIGTERM)
            await served.ended()


async def test_a_name_that_is_resolved_later_is_used_then(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with name_server() as dns, places("127.0.0.2", "127.0.0.3") as (one, other):
        file.write(named(one.address[1]))
        async with file.serve(asking(dns, tmp_path)) as served:
            assert await ask(served) == 502
            assert (await series(served, "endpoint_up")).keys() == {f"gpu.test:{one.address[1]}"}
            await says(served, "gpu.test cannot be resolved", "no address of it is known yet")
            dns.names["gpu.test"] = ["127.0.0.2", "127.0.0.3"]
            await until_known(served, one.label, other.label)
            assert await ask(served) == 200


async def test_another_host_of_the_same_upstream_has_other_addresses(tmp_path: Path) -> None:
    """Requests that old workers still have never go to the new host."""
    file = File(tmp_path)
    async with name_server() as dns, places("127.0.0.2", "127.0.0.3") as (one, other):
        dns.names = {"gpu.test": ["127.0.0.2"], "new.test": ["127.0.0.3"]}
        file.write(named(one.address[1]))
        async with file.serve(asking(dns, tmp_path)) as served:
            one.usual = one.opened
            stream = await served.connect()
            stream.send(post())
            await stream.read_until(b"Hi")
            file.write(named(one.address[1]).replace("gpu.test", "new.test"))
            await reload(served)
            assert await series(served, "endpoint_up") == {other.label: 1}
            for _ in range(3):
                assert await ask(served) == 200
            assert {request.get("host") for request in other.requests} == {f"new.test:{one.address[1]}"}
            one.go_on.set()
            await stream.read_until(LAST_CHUNK)
            assert len(one.requests) == 1


async def test_an_address_that_fails_is_ejected_and_its_place_is_another_ones_then(tmp_path: Path) -> None:
    file = File(tmp_path)
    async with name_server() as dns, places("127.0.0.2", "127.0.0.3", "127.0.0.4") as (one, other, third):
        dns.names["gpu.test"] = ["127.0.0.2", "127.0.0.3"]
        file.write(named(one.address[1]).replace("time: 1s", "time: 1m"))
        async with file.serve(asking(dns, tmp_path)) as served:
            await other.end()
            await is_up(served, other.label, 0)
            dns.names["gpu.test"] = ["127.0.0.2", "127.0.0.4"]
            await until_known(served, one.label, third.label)
            assert await series(served, "endpoint_up") == {one.label: 1, third.label: 1}
            # Each address that comes is new, also the one that was ejected.
            await other.begin()
            dns.names["gpu.test"] = ["127.0.0.2", "127.0.0.3"]
            await until_known(served, one.label, other.label)
            assert await series(served, "endpoint_up") == {one.label: 1, other.label: 1}
            for _ in range(4):
                assert await ask(served) == 200
            assert len(other.requests) >= 2


async def test_no_more_than_64_addresses_are_used(tmp_path: Path) -> None:
    file = File(tmp_path)
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"127.77.0.{number} gpu.test\n" for number in range(10, 80)))
    async with places("127.77.0.10") as (one,):
        file.write(named(one.address[1]))
        async with file.serve(mounting(hosts, "/etc/hosts")) as served:
            labels = [f"127.77.0.{number}:{one.address[1]}" for number in range(10, 10 + MAX_ADDRESSES + 1)]
            assert (await series(served, "endpoint_up")).keys() == set(labels[:-1])
            await says(served, "gpu.test has 70 addresses, of which 6 are not used")
            # Another one is only used when one is gone. The file is changed at once, and not emptied before.
            with hosts.open("r+") as changed:
                changed.write(hosts.read_text().replace("127.77.0.10 ", "127.77.0.80 "))
            await until_known(served, *labels[1:])
            await says(served, "are not used")


async def test_requests_and_checks_at_an_address_are_for_the_name_in_the_url(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("gpu.test").configure_cert(context)
    told: list[str | None] = []

    def sni(_: object, name: str | None, __: object) -> None:
        told.append(name)

    context.sni_callback = sni
    file = File(tmp_path)
    async with name_server() as dns, places("127.0.0.2", "127.0.0.3", tls=context) as (one, other):
        dns.names["gpu.test"] = ["127.0.0.2", "127.0.0.3"]
        more = f", tls: {{ca_file: {tmp_path / 'ca.pem'}}}, health: {{path: /health, interval: 100ms, timeout: 2s}}"
        file.write(named(one.address[1], scheme="https", more=more))
        async with file.serve(asking(dns, tmp_path)) as served:
            other.health = 500
            await served.until(rf'endpoint_up\{{endpoint="{other.label}".*\}}', 0)
            for _ in range(4):
                assert await ask(served) == 200
            assert len(one.requests) == 4
            assert {check.get("host") for check in one.checks} == {f"gpu.test:{one.address[1]}"}
            assert set(told) == {"gpu.test"}
