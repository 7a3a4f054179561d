"""What one side may try in order to hurt the proxy, the other side, or other clients."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import ssl
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from sseproxy import config
from sseproxy.errors import ExchangeError, RequestError
from sseproxy.relay.admission import Ticket, connections_within, extra_connections
from sseproxy.relay.body import RequestBody
from sseproxy.relay.hangups import HangupWatch

from .conftest import PlayScript, StartProxy
from .harness import (
    DEADLINE,
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    begin,
    chunk,
    delta,
    post,
    until,
    usage,
)

SHORT = 0.3
MIB = 1 << 20
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ASKING = {"usage": config.UsageOptions(request=True)}


def by_model(**limits: Any) -> dict[str, Any]:
    """A route for which the whole body is read first."""
    match = config.Match(path="/v1", model=("m*",))
    route = config.Route(
        name="m", match=match, upstream=(config.Target(name="up"),), timeouts=config.Timeouts(body=SHORT)
    )
    return {"routes": (route,), "limits": config.Limits(**limits)}


async def served(client: Peer, upstream: ScriptedUpstream) -> None:
    """A request of `client` is answered, on a connection of its own."""
    client.send(post())
    api = await upstream.accept()
    await api.message()
    api.send(OK)
    assert (await client.message()).body == b"ok"


# --- a client that is reset while nothing is read from it ---


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA, tmp_path: Path) -> config.TLS:
    file = tmp_path / "server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(file))
    return config.TLS(cert_file=str(file))


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """Who trusts nobody else: to read the certificates of the system takes longer than a handshake."""
    return ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())


async def encrypted(proxy: RunningProxy, authority: trustme.CA) -> Peer:
    peer = Peer(*await asyncio.open_connection("127.0.0.1", proxy.port, ssl=trusting(authority)))
    proxy.peers.append(peer)
    return peer


def reset(peer: Peer) -> None:
    """RST, without a word of TLS."""
    sock = peer.writer.get_extra_info("socket")
    raw = socket.socket(fileno=sock.fileno())
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.detach()
    peer.writer.transport.abort()


async def pipelines(client: Peer) -> None:
    client.send(b"GET /v1/files HTTP/1.1\r\nHost: p\r\n\r\n" * 12)


async def uploads(client: Peer) -> None:
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: p\r\nContent-Length: 1000000000\r\n\r\n")
    client.send(b"x" * 300_000)


@pytest.mark.parametrize("blocked", [pipelines, uploads])
async def test_a_reset_while_reading_is_paused_leaves_nothing(
    start: StartProxy,
    play: PlayScript,
    tls: config.TLS,
    authority: trustme.CA,
    blocked: Callable[[Peer], Awaitable[None]],
) -> None:
    async def large(api: Peer) -> None:
        head = await api.head()
        if head.start_line.startswith("POST"):
            # It takes nothing of the upload.
            api.reader._transport.pause_reading()  # type: ignore[attr-defined]
            await api.writer.wait_closed()
        api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        while True:
            api.send(b"x" * 100_000)
            await api.writer.drain()

    upstream = await play(large)
    proxy = await start(upstream.url, listener_tls=tls)
    server = proxy.worker.proxy.server
    for _ in range(12):
        clients = [await encrypted(proxy, authority) for _ in range(5)]
        for client in clients:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await blocked(client)
        await until(lambda: len(server.hangups._watched) == 5)
        # New sockets take the numbers of those that are closed.
        for client in clients:
            reset(client)
            await proxy.connect()
    await proxy.idle()
    for peer in proxy.peers:
        peer.writer.transport.abort()
    await until(server.empty.is_set)
    assert proxy.worker.proxy.admission.empty
    assert not server.hangups._watched
    assert proxy.sample("requests_active") == 0
    await until(lambda: proxy.sample("upstream_connections", state="active") == 0)


async def test_a_number_that_is_used_again_keeps_its_own_watch() -> None:
    loop = asyncio.get_running_loop()
    hangups = HangupWatch(loop)
    seen: list[str] = []
    try:
        first, other = socket.socketpair()
        number = first.fileno()
        old = hangups.add(number, lambda: seen.append("first"))
        # As a transport does before it tells.
        first.close()
        second, peer = socket.socketpair()
        assert second.fileno() == number
        new = hangups.add(number, lambda: seen.append("second"))
        hangups.remove(old)
        peer.close()
        await until(lambda: bool(seen))
        assert seen == ["second"]
        second.close()
        hangups.remove(new)
        assert not hangups._watched
        other.close()
    finally:
        hangups.close()


# --- connections that are silent ---


async def test_a_silent_handshake_has_a_place_as_any_connection(
    start: StartProxy, upstream: ScriptedUpstream, tls: config.TLS, authority: trustme.CA
) -> None:
    limits = config.Limits(connections=8, request_head_time=2 * SHORT)
    proxy = await start(upstream.url, listener_tls=tls, limits=limits)
    silent = [await proxy.connect() for _ in range(9)]
    # One more than these is closed immediately.
    assert await (await proxy.connect()).rest() == (b"", "fin")
    # The others have a time.
    for peer in silent:
        await peer.rest()
    client = await encrypted(proxy, authority)
    await served(client, upstream)


async def test_silent_handshakes_of_one_address_leave_room_for_others(
    start: StartProxy, upstream: ScriptedUpstream, tls: config.TLS, authority: trustme.CA
) -> None:
    limits = config.Limits(connections=8, connections_per_client=2)
    proxy = await start(upstream.url, listener_tls=tls, limits=limits)
    silent = [await proxy.connect() for _ in range(12)]
    for peer in silent[2:]:
        assert await peer.rest() == (b"", "fin")
    context = trusting(authority)
    other = Peer(*await asyncio.open_connection("127.0.0.1", proxy.port, ssl=context, local_addr=("127.0.0.2", 0)))
    proxy.peers.append(other)
    await served(other, upstream)


async def test_a_client_that_sends_much_before_its_handshake_is_refused_at_once(
    start: StartProxy, upstream: ScriptedUpstream, tls: config.TLS, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await start(upstream.url, listener_tls=tls, limits=config.Limits(request_head_time=60.0))
    proxy.worker._accepting._sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MIB)
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        # More than TLS takes at once is there before it is asked.
        client.sendall(b"no TLS" * 100_000)
        await until(lambda: bool(proxy.worker.proxy.server.slots.open))
        await until(lambda: not proxy.worker.proxy.server.slots.open)
    await until(proxy.worker.proxy.server.empty.is_set)
    assert not caplog.records


async def test_a_handshake_that_is_under_way_is_not_cut_by_a_reload(
    start: StartProxy, play: PlayScript, tls: config.TLS, authority: trustme.CA
) -> None:
    async def answer(api: Peer) -> None:
        while True:
            await api.message()
            api.send(OK)

    upstream = await play(answer)
    proxy = await start(upstream.url, listener_tls=tls)
    client = await proxy.connect()
    await until(lambda: proxy.worker.proxy.server.slots.open == 1)
    retiring = asyncio.get_running_loop().create_task(proxy.worker.retire(asyncio.Event()))
    await until(lambda: proxy.worker.proxy.retiring)
    context = trusting(authority)
    await client.writer.start_tls(context, server_hostname="127.0.0.1")
    client.send(post())
    assert (await client.message()).body == b"ok"
    async with asyncio.timeout(DEADLINE):
        await retiring


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_connection_that_ends_before_its_handshake_leaves_no_place(
    start: StartProxy, upstream: ScriptedUpstream, tls: config.TLS, how: str
) -> None:
    proxy = await start(upstream.url, listener_tls=tls, limits=config.Limits(request_head_time=SHORT))
    server = proxy.worker.proxy.server
    for sent in (b"", b"x", b"\x16\x03\x01\x02\x00\x01"):
        for _ in range(20):
            client = socket.create_connection(("127.0.0.1", proxy.port))
            if how == "rst":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.sendall(sent)
            client.close()
        await until(lambda: server.slots.open > 0)
        await until(lambda: not server.slots.open and not server._handshakes)


async def test_a_handshake_that_comes_in_pieces_or_is_none(
    start: StartProxy, upstream: ScriptedUpstream, tls: config.TLS, authority: trustme.CA
) -> None:
    proxy = await start(upstream.url, listener_tls=tls)
    for junk in (post(), b"\x16\x03\x01\x00", b"\x00" * 5000):
        peer = await proxy.connect()
        peer.send(junk)
        peer.half_close()
        await peer.rest()
    await until(lambda: not proxy.worker.proxy.server.slots.open)
    client = await encrypted(proxy, authority)
    await served(client, upstream)


async def test_a_request_that_comes_with_the_end_of_the_handshake(
    start: StartProxy, play: PlayScript, tls: config.TLS, authority: trustme.CA
) -> None:
    """The first records of the application may be read together with the client's last of the handshake."""

    async def answer(api: Peer) -> None:
        while True:
            await api.message()
            api.send(OK)

    upstream = await play(answer)
    proxy = await start(upstream.url, listener_tls=tls)
    context = trusting(authority)
    for _ in range(20):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        peer = await proxy.connect()
        while True:
            try:
                session.do_handshake()
                break
            except ssl.SSLWantReadError:
                peer.send(outgoing.read())
                incoming.write(await peer.reader.read(65536))
        session.write(post())
        peer.send(outgoing.read())
        received = b""
        async with asyncio.timeout(DEADLINE):
            while not received.endswith(b"ok"):
                try:
                    received += session.read(65536)
                except ssl.SSLWantReadError:
                    incoming.write(await peer.reader.read(65536))
        peer.writer.transport.abort()


async def test_a_connection_on_which_nothing_comes_does_not_stay(
    proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sseproxy.relay.downstream.KEEPALIVE", SHORT)
    for sent in (b"", b"\r\n"):
        client = await proxy.connect()
        client.send(sent)
        assert await client.rest() == (b"", "fin")
    await until(proxy.worker.proxy.server.empty.is_set)
    client = await proxy.connect()
    await until(lambda: not proxy.worker.proxy.server.empty.is_set())
    sent_at = 0.0

    def gone() -> bool:
        """Whether the connection has ended, though an empty line comes again and again."""
        nonlocal sent_at
        if perf_counter() > sent_at + SHORT / 10 and not client.writer.is_closing():
            sent_at = perf_counter()
            client.writer.write(b"\r\n")
        return proxy.worker.proxy.server.empty.is_set()

    await until(gone)


async def test_connections_of_a_unix_socket_are_nobodys(start: StartProxy, play: PlayScript, tmp_path: Path) -> None:
    async def answer(api: Peer) -> None:
        while True:
            await api.message()
            api.send(OK)

    upstream = await play(answer)
    path = str(tmp_path / "s")
    proxy = await start(
        upstream.url, listen=(config.UnixAddress(path),), limits=config.Limits(connections_per_client=1)
    )
    for _ in range(5):
        client = Peer(*await asyncio.open_unix_connection(path))
        proxy.peers.append(client)
        client.send(post())
        assert (await client.message()).body == b"ok"


@given(st.integers(min_value=3, max_value=10_000_000))
def test_what_is_served_and_told_fits_the_descriptors(descriptors: int) -> None:
    connections = connections_within(descriptors)
    assert 2 * connections + extra_connections(connections) <= descriptors
    assert 2 * (connections + 2) + extra_connections(connections + 2) > descriptors - 2


# --- bodies that are collected ---


async def slowly(proxy: RunningProxy, size: int) -> Peer:
    """A client that has sent nearly all of `size` bytes of a body, and no more for now."""
    client = await proxy.connect()
    client.send(b"POST /v1/chat HTTP/1.1\r\nHost: p\r\nContent-Type: application/json\r\n")
    client.send(b"Content-Length: %d\r\n\r\n" % size, b" " * (size - 100))
    await client.drain()
    return client


async def test_bodies_that_are_collected_have_a_bound_and_who_dawdles_makes_room(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, max_body=MIB, **by_model(held=4 * MIB, request_body_rate=None))
    admission = proxy.worker.proxy.admission
    dawdlers = []
    for number in range(1, 5):
        dawdlers.append(await slowly(proxy, MIB))
        await until(lambda: admission._held == number * (MIB - 100))  # noqa: B023
    client = await proxy.connect()
    body = b'{"messages":"%b","model":"m"}' % (b"x" * (MIB // 2))
    client.send(post(body))
    api = await upstream.accept()
    assert (await api.message()).body == body
    assert admission._held <= 4 * MIB
    refused = await dawdlers[0].message()
    assert (refused.status, refused.json()["error"]["code"]) == (503, "held")
    assert refused.get("retry-after")
    api.send(OK)
    assert (await client.message()).body == b"ok"
    for dawdler in dawdlers[1:]:
        dawdler.send(b" " * 98, b"{}")
        assert (await dawdler.message()).status == 404
    await proxy.idle()
    assert admission.empty
    assert proxy.sample("requests_rejected_total", reason="held") == 1


async def test_where_the_slowest_one_asks_for_room_nobody_else_makes_it(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, max_body=2 * MIB, **by_model(held=2 * MIB, request_body_rate=None))
    admission = proxy.worker.proxy.admission
    dawdler = await proxy.connect()
    large = post(b" " * (2 * MIB))
    dawdler.send(large[:MIB])
    await until(lambda: admission._held > MIB - 1000)
    client = await proxy.connect()
    body = b'{"messages":"%b","model":"m"}' % (b"x" * (MIB - 20_000))
    client.send(post(body)[:-10])
    await until(lambda: admission._held > MIB + len(body) - 1000)
    dawdler.send(large[MIB : MIB + 100_000])
    assert (await dawdler.message()).status == 503
    client.send(post(body)[-10:])
    api = await upstream.accept()
    assert (await api.message()).body == body
    api.send(OK)
    assert (await client.message()).body == b"ok"
    await proxy.idle()
    assert admission.empty
    assert proxy.sample("requests_rejected_total", reason="held") == 1


async def test_room_is_not_looked_for_again_for_each_who_asks(start: StartProxy, upstream: ScriptedUpstream) -> None:
    count, looked = 1_000, 0

    class Body(RequestBody):
        @property
        def waited(self) -> float:
            nonlocal looked
            looked += 1
            return 1.0

    limits = config.Limits(held=MIB)
    proxy = await start(upstream.url, limits=limits, max_body=MIB)
    admission = proxy.worker.proxy.admission
    refused: list[ExchangeError] = []

    async def collect() -> Ticket:
        body = Body(MIB, limits, lambda: None)
        ticket = admission.ticket(body, refused.append)
        ticket.collects = True
        body.feed(b"x" * (MIB // count))
        with suppress(RequestError):
            await body.collect(DEADLINE)
        return ticket

    tickets = [await collect() for _ in range(count)]
    assert looked == 0
    tickets += [await collect() for _ in range(count // 2)]
    for ticket in tickets:
        ticket.give_back()
    assert admission.empty
    # It is looked for once for each sixteenth of all the room.
    assert 0 < looked <= count * (16 // 2 + 1)
    assert 0 < len(refused) <= count // 2 + count // 16


@pytest.mark.parametrize("size", [1, 2, 100, 5000])
@pytest.mark.parametrize("reads", ["collected", "waits", "kept"])
async def test_a_body_in_tiny_reads_takes_no_more_memory_than_is_counted(reads: str, size: int) -> None:
    class Room:
        def hold(self, size: int) -> bool:
            return True

        def release(self, size: int) -> None: ...

    total = 10_000
    body = RequestBody(total + 1, config.Limits(), lambda: None)
    body.charge_to(Room())
    body.keeps = total
    gc.collect()
    tracemalloc.start()
    try:
        for start in range(0, total, size):
            body.feed(bytes([start % 256]) * size)
            if reads == "collected":
                await body.collect(1.0)
            elif reads == "kept":
                await body.read(1.0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1.5 * total + 4096


async def test_a_request_of_which_nothing_can_be_kept_is_not_changed(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    """A backend that refuses what was put into it could not be asked again."""
    options = by_model(held=MIB, request_body_rate=None)
    chat = config.Match(path="/v1/asks")
    asks = config.Route(
        name="chat", match=chat, upstream=(config.Target(name="up"),), usage=config.UsageOptions(request=True)
    )
    options["routes"] += (asks,)
    proxy = await start(upstream.url, max_body=MIB, **options)
    body = b'{"model":"m","stream":true,"messages":["%b"]}' % (b"x" * 200)
    for held in (True, False):
        if held:
            slow = await slowly(proxy, MIB)
            await until(lambda: proxy.worker.proxy.admission._held == MIB - 100)
        else:
            slow.close()
            await proxy.idle()
        client = await proxy.connect()
        client.send(post(body, "/v1/asks/completions"))
        api = await upstream.accept()
        assert ((await api.message()).body == body) == held
        api.send(OK)
        assert (await client.message()).body == b"ok"
        api.close()


async def test_one_body_alone_may_be_as_large_as_is_promised(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, max_body=MIB, **by_model(held=MIB))
    client = await proxy.connect()
    body = b'{"messages":"%b","model":"m"}' % (b"x" * (MIB - 40))
    client.send(post(body))
    api = await upstream.accept()
    assert (await api.message()).body == body


async def test_a_body_that_begins_fast_and_goes_on_slowly_is_cut(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, max_body=MIB, **by_model(request_body_rate=1000))
    client = await slowly(proxy, MIB)

    async def dribble() -> None:
        while True:
            await asyncio.sleep(SHORT / 3)
            client.send(b" ")

    dribbling = asyncio.get_running_loop().create_task(dribble())
    response = await client.message()
    dribbling.cancel()
    assert (response.status, response.json()["error"]["code"]) == (408, "stalled_client")
    assert await proxy.ended() == {"stalled_client": 1}
    assert proxy.worker.proxy.admission.empty


async def test_the_total_counts_while_a_body_is_collected(start: StartProxy, upstream: ScriptedUpstream) -> None:
    match = config.Match(path="/v1", model=("m*",))
    timeouts = config.Timeouts(total=SHORT)
    proxy = await start(
        upstream.url,
        routes=(config.Route(name="m", match=match, upstream=(config.Target(name="up"),), timeouts=timeouts),),
    )
    client = await slowly(proxy, 1000)
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (504, "upstream_timeout")
    assert await proxy.ended() == {"upstream_timeout_total": 1}


@pytest.mark.parametrize("body", [b"\xff" * 100, b"[" * 100_000, b'{"a":' * 1100, b'{"model":"\xff"}', b"{" * 1100])
async def test_a_body_that_is_no_json_is_relayed_as_it_is(
    start: StartProxy, upstream: ScriptedUpstream, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await start(upstream.url, route=ASKING, metrics=config.Metrics(models=("m",)))
    client = await proxy.connect()
    client.send(post(body))
    api = await upstream.accept()
    assert (await api.message()).body == body
    api.send(OK)
    assert (await client.message()).body == b"ok"
    assert await proxy.ended() == {"completed": 1}
    assert not caplog.records


# --- what ends must end whole ---


async def test_an_upload_that_is_answered_early_is_whole_or_has_no_end(start: StartProxy, play: PlayScript) -> None:
    """The upstream reads slowly, answers in between, and goes on to read."""
    size = 200_000
    whole, cut, wrong = 0, 0, 0

    async def answers_early(api: Peer) -> None:
        nonlocal whole, cut, wrong
        head = await api.head()
        dice = random.Random(head.get("x-seed"))
        api.reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(dice.randrange(60)):
            await asyncio.sleep(0)
        api.send(STREAM_HEAD, chunk(delta("a")))
        for _ in range(dice.randrange(60)):
            await asyncio.sleep(0)
        api.reader._transport.resume_reading()  # type: ignore[attr-defined]
        body, complete = await api._body(head)
        whole += complete
        cut += not complete
        wrong += complete and len(body) != size
        api.send(chunk(DONE), LAST_CHUNK)

    upstream = await play(answers_early)
    proxy = await start(upstream.url)

    async def upload(seed: int) -> None:
        client = await proxy.connect()
        client.send(
            b"POST /v1/files HTTP/1.1\r\nHost: p\r\nX-Seed: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % seed,
            *(chunk(b"x" * 10_000) for _ in range(size // 10_000)),
            LAST_CHUNK,
        )
        assert (await client.message()).status == 200
        client.writer.transport.abort()

    for start_at in range(0, 200, 10):
        await asyncio.gather(*(upload(start_at + number) for number in range(10)))
    await until(lambda: not upstream.open)
    assert not wrong
    assert whole > 50


@pytest.mark.parametrize("name_size", [1, 200, 400])
async def test_trailers_are_never_fields_of_the_next_request(
    proxy: RunningProxy, upstream: ScriptedUpstream, name_size: int
) -> None:
    extended = b"3;%b=1\r\nabc\r\n0\r\nAuthorization: Bearer evil\r\nX-Evil: 1\r\n\r\n" % (b"e" * name_size)
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n", extended, post(), post())
    if name_size > 256:
        assert (await client.message()).status == 400
        assert await client.rest() == (b"", "fin")
        assert not upstream.connections
        return
    api = await upstream.accept()
    for _ in range(3):
        message = await api.message()
        assert message.get("authorization") is None
        assert message.get("x-evil") is None
        api.send(OK)
        assert (await client.message()).body == b"ok"


@pytest.mark.parametrize("coding", [b"chunked\t", b"chunked \t", b"chunked\t ", b"chunked ", b"\tChunked"])
async def test_a_coding_with_white_space_around_it_is_the_coding(
    proxy: RunningProxy, upstream: ScriptedUpstream, coding: bytes
) -> None:
    head = b"POST /v1/files HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: " + coding + b"\r\n"
    client = await proxy.connect()
    client.send(head + b"\r\nGET /v1/smuggled HTTP/1.1\r\nHost: p\r\n\r\n")
    assert (await client.message()).status == 400
    assert await client.rest() == (b"", "fin")
    client = await proxy.connect()
    client.send(head + b"Content-Length: 3\r\n\r\n" + chunk(b"abc") + LAST_CHUNK)
    assert (await client.message()).status == 400
    assert not upstream.connections
    client = await proxy.connect()
    client.send(head + b"\r\n" + chunk(b"abc") + LAST_CHUNK)
    assert (await (await upstream.accept()).message()).body == b"abc"


@pytest.mark.parametrize(
    ("request_head", "answer"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 30\r\n\r\n"),
    ],
    ids=["head", "204", "304"],
)
async def test_a_body_that_comes_late_where_none_may_be_reaches_nobody(
    start: StartProxy, play: PlayScript, request_head: bytes, answer: bytes
) -> None:
    async def says_more(api: Peer) -> None:
        while True:
            head = await api.message()
            if "evil" in head.start_line:
                api.send(answer)
                await asyncio.sleep(0)
                api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
            else:
                api.send(OK)

    upstream = await play(says_more)
    proxy = await start(upstream.url)
    first, second = await proxy.connect(), await proxy.connect()
    for _ in range(50):
        first.send(request_head + b" /v1/evil HTTP/1.1\r\nHost: p\r\n\r\n")
        await first.message(bodiless=True)
        second.send(post())
        assert (await second.message()).body == b"ok"


async def test_what_came_on_an_idle_connection_meets_no_request(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    """It is in the kernel's buffer when the next request takes the connection: the loop has not read it yet."""
    client, api = await begin(proxy, upstream)
    api.send(OK)
    assert (await client.message()).body == b"ok"
    await until(lambda: proxy.sample("upstream_connections", state="idle") == 1)
    (up,) = proxy.worker.proxy.upstreams["up"].endpoints
    connection = up.reuse(lambda: None)
    assert connection is not None
    connection.release(reusable=True)
    # Written and looked for in the same turn of the loop.
    raw = socket.socket(fileno=api.writer.get_extra_info("socket").fileno())
    raw.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    raw.detach()
    assert up.reuse(lambda: None) is None
    assert up.connections() == (0, 0)


# --- what gives a secret away, or takes accounting away ---


@pytest.mark.parametrize("method", [b"TRACE", b"TRACK", b"CONNECT"])
async def test_a_method_that_gives_back_what_was_sent_is_refused(
    start: StartProxy, upstream: ScriptedUpstream, method: bytes
) -> None:
    proxy = await start(upstream.url, api_key="secret")
    client = await proxy.connect()
    target = b"p:80" if method == b"CONNECT" else b"/v1/models"
    client.send(b"%b %b HTTP/1.1\r\nHost: p\r\n\r\n" % (method, target))
    assert (await client.message()).status in (400, 501)
    assert not upstream.connections


@pytest.mark.parametrize("second", [b"429 Too Many Requests", b"500 Internal Server Error", b"401 Unauthorized"])
async def test_a_refusal_that_only_quotes_takes_no_accounting_away(
    start: StartProxy, upstream: ScriptedUpstream, second: bytes
) -> None:
    proxy = await start(upstream.url, route=ASKING)
    body = b'{"model":"m","stream":true,"messages":["stream_options"]}'
    client = await proxy.connect()
    client.send(post(body))
    api = await upstream.accept()
    await api.message()
    quote = b'{"error":"what does stream_options mean?"}'
    api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(quote), quote))
    assert (await api.message()).body == body
    api.send(b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\nno" % second)
    assert (await client.message()).body == b"no"
    client.send(post())
    assert (await api.message()).json()["stream_options"] == {"include_usage": True}


async def test_a_refusal_that_comes_while_the_body_is_sent_leaves_its_connection(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, route=ASKING)
    body = b'{"model":"m","stream":true,"messages":["%b"]}' % (b"x" * 8 * MIB)
    client = await proxy.connect()
    client.send(post(body))
    api = await upstream.accept()
    await api.head()
    api.reader._transport.pause_reading()  # type: ignore[attr-defined]
    refusal = b'{"error":"no stream_options"}'
    api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(refusal), refusal))
    again = await upstream.accept()
    assert (await again.message()).body == body
    api.reader._transport.resume_reading()  # type: ignore[attr-defined]
    received, _ = await api.rest()
    assert b"HTTP/1.1" not in received
    assert len(received) < len(body)
    again.send(OK)
    assert (await client.message()).body == b"ok"


@pytest.mark.parametrize(("length", "known"), [(128, True), (129, False), (20_000, False)])
async def test_a_model_is_short_wherever_it_is_named(
    start: StartProxy, upstream: ScriptedUpstream, length: int, known: bool
) -> None:
    proxy = await start(upstream.url, route=ASKING)
    name = "m" * length
    client = await proxy.connect()
    client.send(post(b'{"stream":true}', f"/v1/deployments/{name}/chat/completions"))
    api = await upstream.accept()
    assert f"/{name}/" in (await api.message()).start_line
    (relay,) = proxy.worker.proxy.active
    assert relay._exchange is not None
    assert relay._exchange.model == (name if known else None)
    api.send(OK)
    assert (await client.message()).body == b"ok"
    assert set(proxy.worker.proxy.upstreams["up"]._stream_options) == {name if known else None}


# --- a connection that was already dead ---

GET = b"GET /v1/models HTTP/1.1\r\nHost: p\r\n\r\n"
KEYED = post().replace(b"Host: proxy\r\n", b"Host: proxy\r\nIdempotency-Key: k\r\n")
UPLOAD = b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000


@pytest.mark.parametrize(
    ("request_", "late", "status"),
    [
        (GET, False, 200),
        (GET, True, 200),
        (post(), False, 200),
        (post(), True, 502),
        (KEYED, True, 200),
        (UPLOAD, False, 200),
    ],
    ids=["get", "get late", "post", "post late", "keyed late", "upload"],
)
async def test_a_request_on_a_connection_that_the_upstream_closes_goes_to_a_new_one_once(
    proxy: RunningProxy,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
    request_: bytes,
    late: bool,
    status: int,
) -> None:
    if late:
        monkeypatch.setattr("sseproxy.relay.attempt._STALE_WITHIN", 0.0)
    client, api = await begin(proxy, upstream)
    api.send(OK)
    assert (await client.message()).body == b"ok"
    client.send(request_)
    await api.read(10)
    api.reset()
    if status == 200:
        again = await upstream.accept()
        sent = await again.message()
        assert sent.body == request_.partition(b"\r\n\r\n")[2]
        again.send(OK)
    assert (await client.message()).status == status
    assert upstream.connections == 1 + (status == 200)
    await proxy.idle()
    assert proxy.worker.proxy.admission.empty
    assert proxy.sample("requests_active") == 0


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 2"])
async def test_no_request_is_repeated_on_a_connection_that_was_new_or_has_answered(
    proxy: RunningProxy, upstream: ScriptedUpstream, said: bytes
) -> None:
    if said:
        client, api = await begin(proxy, upstream)
        api.send(OK)
        assert (await client.message()).body == b"ok"
        client.send(GET)
        await api.message()
        api.send(said)
        await api.drain()
        api.close()
    else:
        client, api = await begin(proxy, upstream, GET)
        api.close()
    assert (await client.message()).status == 502
    assert upstream.connections == 1


async def test_usage_is_asked_for_again_where_a_request_is_repeated(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, route=ASKING)
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("a")), chunk(usage(1, 1) + DONE), LAST_CHUNK)
    await client.message()
    await until(lambda: proxy.sample("upstream_connections", state="idle") == 1)
    client.send(post())
    await api.read(10)
    api.reset()
    again = await upstream.accept()
    assert (await again.message()).json()["stream_options"] == {"include_usage": True}
    again.send(STREAM_HEAD, chunk(delta("a")), chunk(usage(1, 1) + DONE), LAST_CHUNK)
    assert (await client.message()).body == delta("a") + DONE
    assert await proxy.ended() == {"completed": 2}
    assert proxy.sample("tokens_total", type="output") == 2
