"""Workers that share the work: limits are those of all of them together, and connections come to each alike."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Self

import pytest

from sseproxy.ledger.table import Ledger
from sseproxy.process import accepting
from sseproxy.process.accepting import Accepting
from sseproxy.relay.admission import CONNECTIONS

from .conftest import PlayScript
from .harness import (
    DEADLINE,
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    ScriptedUpstream,
    chunk,
    delta,
    never_accepting,
    post,
    until,
)
from .served import ConfigFile, Served, alive, end, until_true
from .test_listeners import Systemd
from .test_reload import reload

FIRST = chunk(delta("a"))
Connect = Callable[[], Awaitable[Peer]]


async def streams(api: Peer) -> None:
    """Begins a stream, and ends it when the proxy does."""
    await api.message()
    api.send(STREAM_HEAD, FIRST)
    await api.rest()


@pytest.fixture
async def model(play: PlayScript) -> ScriptedUpstream:
    return await play(streams)


class Clients:
    """Long streams, each on a connection of its own."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self.open: list[Peer] = []

    async def begin(self) -> int:
        """One more. The status of its response."""
        client = await self._connect()
        client.send(post())
        head = await client.head()
        if head.status == 200:
            assert await client.read(len(FIRST)) == FIRST
            self.open.append(client)
        else:
            client.writer.transport.abort()
        return head.status

    def leave(self, number: int) -> None:
        for client in self.open[:number]:
            client.writer.transport.abort()
        del self.open[:number]


@pytest.fixture
async def opened() -> AsyncIterator[Callable[[Connect], Clients]]:
    made: list[Clients] = []

    def clients(connect: Connect) -> Clients:
        made.append(Clients(connect))
        return made[-1]

    yield clients
    for each in made:
        each.leave(len(each.open))


OpenClients = Callable[[Connect], Clients]


def to(served: Served) -> Connect:
    """Connections whose clients are let go by the test."""
    return lambda: tcp(served.port)


async def tcp(port: int) -> Peer:
    return Peer(*await asyncio.open_connection("127.0.0.1", port))


# --- limits ---

LIMITS = {
    "active_requests": ("limits: {active_requests: 6}", 503),
    "connections": ("limits: {connections: 6}", 503),
    "connections_per_client": ("limits: {connections_per_client: 6}", 429),
    "of a route": ("", 503),
}


def limited(limit: str) -> dict[str, str]:
    """The options of a file with four workers, that allow six streams by `limit`."""
    text, _ = LIMITS[limit]
    options = {"workers": "4", **dict([text.split(": ", 1)] if text else [])}
    if limit == "of a route":
        options["routes"] = "[{name: api, match: {path: /v1}, upstream: up, limits: {active_requests: 6}}]"
    return options


async def until_refused(clients: Clients, status: int) -> int:
    """How many streams can be begun, one after the other."""
    begun = 0
    while (answer := await clients.begin()) == 200:
        begun += 1
        assert begun < 30
    assert answer == status
    return begun


async def until_begun(clients: Clients) -> None:
    """Another stream begins, once a worker has noticed that one has ended."""
    async with asyncio.timeout(DEADLINE):
        while await clients.begin() != 200:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("limit", LIMITS)
async def test_a_limit_is_that_of_all_workers_whatever_becomes_of_them(
    model: ScriptedUpstream, tmp_path: Path, opened: OpenClients, limit: str
) -> None:
    _, status = LIMITS[limit]
    file = ConfigFile(tmp_path, model, **limited(limit))
    async with file.serve() as served:
        clients = opened(to(served))
        # It is neither felt below its number nor exceeded: nobody asks at the same time.
        assert await until_refused(clients, status) == 6
        clients.leave(2)
        for _ in range(2):
            await until_begun(clients)
        assert await clients.begin() == status
        # Streams that an earlier configuration still has are counted.
        file.write(model, **limited(limit) | {"workers": "2"})
        assert (await reload(served))[0] == 200
        assert await clients.begin() == status
        clients.leave(1)
        await until_begun(clients)
        assert await clients.begin() == status
        # What a worker had that was killed is not.
        for worker in served.workers:
            os.kill(worker, signal.SIGKILL)
        await until_true(lambda: len(served.workers) == 2 and all(map(alive, served.workers)))
        await served.until("workers", 2)
        clients.leave(len(clients.open))
        assert await until_refused(clients, status) == 6


async def test_connections_that_are_being_made_are_counted_over_all_workers(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    with never_accepting() as url:
        upstreams = f"[{{name: up, url: '{url}'}}]"
        file = ConfigFile(tmp_path, upstream, workers="4", limits="{pending_connects: 6}", upstreams=upstreams)
        async with file.serve() as served:
            for number in range(6):
                (await served.connect()).send(post())
                await served.until(r"requests_active\{.*\}", number + 1)
            client = await served.connect()
            client.send(post())
            assert (await client.message()).json()["error"]["code"] == "pending_connects"


async def test_a_response_that_is_fetched_by_way_of_several_workers_is_counted_once(
    play: PlayScript, tmp_path: Path
) -> None:
    async def keeps(api: Peer) -> None:
        usage = b'{"input_tokens":3,"output_tokens":7}'
        body = b'{"id":"resp_1","object":"response","status":"completed","background":true,"usage":%b}' % usage
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        while True:
            await api.message()
            api.send(head, body)

    async with ConfigFile(tmp_path, await play(keeps), workers="4").serve() as served:
        await served.until("workers", 4)
        clients = []
        # As many connections as are shared by all of them.
        for _ in range(12):
            clients.append(await served.connect())
            clients[-1].send(b"GET /v1/responses/resp_1 HTTP/1.1\r\nHost: p\r\n\r\n")
            assert (await clients[-1].message()).complete
        assert all(connections_of(worker) > 0 for worker in served.workers)
        assert await served.sample(r'tokens_total\{.*type="output".*\}') == 7


# --- connections ---


def accepted() -> set[str]:
    """The inodes of all TCP and Unix sockets on this machine that are connected, and were accepted (proc(5))."""
    tcp = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {fields[1] for fields in tcp if fields[3] == "0A"}
    unix = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    # Of two sockets that are connected, the one with a name was accepted.
    return {fields[9] for fields in tcp if fields[3] == "01" and fields[1] in listening} | {
        fields[6] for fields in unix if fields[5] == "03" and len(fields) == 8
    }


def connections_of(worker: int) -> int:
    """How many connections of clients a worker has."""
    inodes = accepted()
    found = 0
    for fd in Path(f"/proc/{worker}/fd").iterdir():
        try:
            found += os.readlink(fd).removeprefix("socket:[").removesuffix("]") in inodes
        except OSError:
            continue
    return found


async def shares(workers: list[int], begin: Callable[[], Awaitable[None]]) -> list[int]:
    """How many streams each of `workers` has of those that `begin` begins."""
    before = {worker: connections_of(worker) for worker in workers}
    await begin()
    return [connections_of(worker) - number for worker, number in before.items()]


def in_turn(clients: Clients, number: int) -> Callable[[], Awaitable[None]]:
    async def begin() -> None:
        for _ in range(number):
            assert await clients.begin() == 200

    return begin


def at_once(clients: Clients, number: int) -> Callable[[], Awaitable[None]]:
    async def begin() -> None:
        assert set(await asyncio.gather(*(clients.begin() for _ in range(number)))) == {200}

    return begin


def is_even(found: list[int], number: int) -> bool:
    return sum(found) == number and max(found) <= 1.3 * number / len(found) + 2


@pytest.mark.parametrize(
    ("workers", "number", "come"),
    [(2, 40, in_turn), (4, 40, in_turn), (4, 40, at_once), (8, 40, in_turn), (8, 40, at_once), (4, 400, at_once)],
)
async def test_connections_are_shared_evenly(
    model: ScriptedUpstream,
    tmp_path: Path,
    opened: OpenClients,
    workers: int,
    number: int,
    come: Callable[[Clients, int], Callable[[], Awaitable[None]]],
) -> None:
    async with ConfigFile(tmp_path, model, workers=str(workers)).serve() as served:
        await served.until("workers", workers)
        found = await shares(served.workers, come(opened(to(served)), number))
        assert is_even(found, number), found


async def test_so_are_those_of_unix_sockets(model: ScriptedUpstream, tmp_path: Path, opened: OpenClients) -> None:
    path = str(tmp_path / "socket")

    async def connect() -> Peer:
        return Peer(*await asyncio.open_unix_connection(path))

    async with ConfigFile(tmp_path, model, listen=f"'unix:{path}'", workers="4").serve() as served:
        await served.until("workers", 4)
        found = await shares(served.workers, in_turn(opened(connect), 40))
        assert is_even(found, 40), found


async def test_so_are_those_of_sockets_that_were_passed(
    model: ScriptedUpstream, tmp_path: Path, opened: OpenClients
) -> None:
    systemd = Systemd(tmp_path)
    file = ConfigFile(tmp_path, model, listen="systemd:http", admin="{listen: 'systemd:admin'}", workers="4")
    process = await systemd.start("serve", "-c", str(file.path))
    try:
        assert (await systemd.hears())["READY"] == "1"
        served = Served(process, [], systemd.port("http"), systemd.port("admin"), bytearray(), bytearray())
        found = await shares(served.workers, in_turn(opened(to(served)), 40))
        assert is_even(found, 40), found
    finally:
        await end(process)
        systemd.close()


async def test_a_worker_that_hangs_holds_up_nobody(
    model: ScriptedUpstream, tmp_path: Path, opened: OpenClients
) -> None:
    async with ConfigFile(tmp_path, model, workers="4").serve() as served:
        await served.until("workers", 4)
        clients = opened(to(served))
        hanging, *others = served.workers
        os.kill(hanging, signal.SIGSTOP)
        try:
            # It has none, and never will: the others would leave all to it.
            found = await shares(others, in_turn(clients, 45))
            assert is_even(found, 45), found
            found = await shares(others, at_once(clients, 45))
            assert sum(found) == 45
        finally:
            os.kill(hanging, signal.SIGCONT)
        # It is the least busy one now. On a busy machine it may be late again, and then the others do not wait for it.
        begun = 90
        while not is_even(held := [connections_of(worker) for worker in served.workers], begun):
            assert begun < 150, held
            await in_turn(clients, 10)()
            begun += 10


async def test_a_worker_that_was_killed_holds_up_nobody(
    model: ScriptedUpstream, tmp_path: Path, opened: OpenClients
) -> None:
    async with ConfigFile(tmp_path, model, workers="2").serve() as served:
        await served.until("workers", 2)
        clients = opened(to(served))
        await in_turn(clients, 20)()
        os.kill(served.workers[0], signal.SIGKILL)
        await in_turn(clients, 10)()


async def test_whole_streams_go_on_while_workers_come_and_go(play: PlayScript, tmp_path: Path) -> None:
    """No connection is refused, and no stream is cut, by a worker that leaves the listening sockets or comes back."""
    over = asyncio.Event()

    async def model(api: Peer) -> None:
        while True:
            await api.message()
            api.send(STREAM_HEAD, FIRST, chunk(DONE), LAST_CHUNK)

    upstream = await play(model)
    file = ConfigFile(tmp_path, upstream, workers="4")
    async with file.serve() as served:

        async def keep_asking() -> int:
            answered = 0
            while not over.is_set():
                client = await tcp(served.port)
                client.send(post())
                response = await client.message()
                assert (response.status, response.complete) == (200, True)
                client.close()
                answered += 1
            return answered

        asking = [asyncio.ensure_future(keep_asking()) for _ in range(8)]
        for workers in (2, 4, 1, 3):
            file.write(upstream, workers=str(workers))
            assert (await reload(served))[0] == 200
            assert not any(task.done() for task in asking)
        over.set()
        answered = sum(await asyncio.gather(*asking))
        await served.until("workers_finishing", 0)
        assert await served.sample(r'requests_total\{.*outcome="completed".*\}') == answered


class Scarce(socket.socket):
    """A listening socket that cannot be duplicated when there are no descriptors left."""

    left = True
    asked = 0

    def dup(self) -> Self:
        Scarce.asked += 1
        if not Scarce.left:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().dup()


async def test_a_worker_without_a_descriptor_comes_back_when_it_has_one() -> None:
    ledger = Ledger(rows=2)
    columns = ledger.columns([*accepting.NAMES, CONNECTIONS], ())
    mine, other = (ledger.row(ledger.take_row(), columns) for _ in range(2))
    came = asyncio.Queue[asyncio.BaseTransport]()

    class Accepted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            mine.count(CONNECTIONS).add(1)
            came.put_nowait(transport)

    with Scarce() as listening:
        listening.bind(("127.0.0.1", 0))
        accepts = Accepting([listening], Accepted, mine)
        await accepts.start()
        other.count("accepting").add(1)
        peers = [await tcp(listening.getsockname()[1]) for _ in range(2)]
        transports = [await came.get() for _ in peers]
        # It has two more than the other one, and leaves the sockets; then it has fewer.
        await until(lambda: not accepts._servers)
        Scarce.left, Scarce.asked = False, 0
        other.count(CONNECTIONS).add(9)
        await until(lambda: Scarce.asked > 2)
        Scarce.left = True
        peers.append(await tcp(listening.getsockname()[1]))
        async with asyncio.timeout(DEADLINE):
            transports.append(await came.get())
        accepts.stop()
    for transport in transports:
        transport.abort()  # type: ignore[attr-defined]
    for peer in peers:
        peer.close()
    ledger.close()
