"""An upstream behind TLS: whether it is the right one, and where what it sends ends."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from sseproxy import config
from sseproxy.relay.upstream import RelayProtocol, _tls_of

from .conftest import StartProxy
from .harness import (
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
from .served import ConfigFile

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CLOSE_DELIMITED = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def server(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    file: Path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    return str(file)


@pytest.fixture
async def upstream(authority: trustme.CA) -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(tls=server(authority, "127.0.0.1")) as scripted:
        yield scripted


async def test_a_stream_passes_and_the_connection_is_reused(
    start: StartProxy, upstream: ScriptedUpstream, ca_file: str
) -> None:
    proxy = await start(upstream.url, tls={"ca_file": ca_file})
    client, api = await begin(proxy, upstream)
    for number in range(2):
        if number:
            client.send(post())
            assert (await api.message()).get("host") == upstream.url.removeprefix("https://")
        api.send(STREAM_HEAD, chunk(delta("Hi")))
        assert (await client.read_until(chunk(delta("Hi")))).startswith(b"HTTP/1.1 200 OK\r\n")
        end = usage(3, 1) + DONE
        api.send(chunk(end), LAST_CHUNK)
        assert await client.read_until(LAST_CHUNK) == chunk(end) + LAST_CHUNK
    assert await proxy.ended() == {"completed": 2}
    assert proxy.sample("tokens_total", type="output") == 2
    assert proxy.sample("upstream_connections", state="idle") == upstream.connections == 1


@pytest.mark.parametrize("paused", [False, True], ids=["in the kernel", "in TLS"])
async def test_what_came_on_an_idle_connection_meets_no_request(
    start: StartProxy, authority: trustme.CA, ca_file: str, paused: bool
) -> None:
    context = server(authority, "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> ssl.SSLSocket:
            api = context.wrap_socket(listener.accept()[0], server_side=True)
            api.recv(65536)
            api.sendall(OK)
            return api

        proxy = await start(f"https://127.0.0.1:{listener.getsockname()[1]}", tls={"ca_file": ca_file})
        client = await proxy.connect()
        client.send(post())
        # Its socket blocks, so that what it sends is there at once.
        with await asyncio.to_thread(answer) as api:
            assert (await client.message()).body == b"ok"
            (up,) = proxy.worker.proxy.upstreams["up"].endpoints
            await until(lambda: up.connections() == (0, 1))
            (connection,) = up._idle
            protocol = connection.protocol
            assert isinstance(protocol, RelayProtocol)
            assert protocol.transport is not None
            assert protocol.is_quiet()
            if paused:
                # As it is while others have their turn.
                protocol.transport.pause_reading()
            api.sendall(OK.replace(b"ok", b"no"))
            if paused:
                fd = protocol.transport.get_extra_info("socket").fileno()
                await until(lambda: not select.select([fd], [], [], 0)[0])
            assert not protocol.is_quiet()
            protocol.abort()


async def test_a_certificate_that_nobody_trusts_is_a_502(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url)
    client = await proxy.connect()
    client.send(post())
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (502, "upstream_tls")
    assert "certificate" not in response.body.decode()
    assert await proxy.ended() == {"upstream_error": 1}
    assert proxy.sample("upstream_errors_total", type="tls") == 1
    assert upstream.connections == 0


async def test_the_authorities_of_the_system_are_trusted_where_none_are_named(
    upstream: ScriptedUpstream, ca_file: str, tmp_path: Path
) -> None:
    async with ConfigFile(tmp_path, upstream).serve(SSL_CERT_FILE=ca_file) as served:
        client = await served.connect()
        client.send(post())
        api = await upstream.accept()
        await api.message()
        api.send(STREAM_HEAD, chunk(DONE), LAST_CHUNK)
        assert (await client.message()).body == DONE


def test_a_worker_reads_authorities_once_and_a_reload_reads_them_again(ca_file: str) -> None:
    trusts = (config.UpstreamTLS(), config.UpstreamTLS(), config.UpstreamTLS(ca_file=ca_file))
    one, other, named = (_tls_of(tls) for tls in trusts)
    assert one is other
    assert one is not named
    one, other, named = (tls.context() for tls in trusts)
    assert len({one, other, named}) == 3


async def test_a_certificate_for_another_name_is_a_502(start: StartProxy, authority: trustme.CA, ca_file: str) -> None:
    async with ScriptedUpstream(tls=server(authority, "api.example.org")) as upstream:
        proxy = await start(upstream.url, tls={"ca_file": ca_file})
        client = await proxy.connect()
        client.send(post())
        response = await client.message()
        assert (response.status, response.json()["error"]["code"]) == (502, "upstream_tls")
        assert await proxy.ended() == {"upstream_error": 1}
        assert proxy.sample("upstream_errors_total", type="tls") == 1
        assert upstream.connections == 0


async def test_a_body_that_ends_with_its_connection_ends_by_close_notify(
    start: StartProxy, upstream: ScriptedUpstream, ca_file: str
) -> None:
    proxy = await start(upstream.url, tls={"ca_file": ca_file})
    client, api = await begin(proxy, upstream, post(path="/v1/files"))
    api.send(CLOSE_DELIMITED, b"whole")
    api.close()
    response = await client.message()
    assert (response.body, response.complete) == (b"whole", True)
    assert await proxy.ended() == {"completed": 1}


async def test_a_body_that_ends_without_close_notify_may_have_been_cut(
    start: StartProxy, upstream: ScriptedUpstream, ca_file: str
) -> None:
    """RFC 8446, section 6.1: anyone on the way can send a FIN."""
    proxy = await start(upstream.url, tls={"ca_file": ca_file})
    client, api = await begin(proxy, upstream, post(path="/v1/files"))
    api.send(CLOSE_DELIMITED, b"half")
    assert (await client.read_until(chunk(b"half"))).startswith(b"HTTP/1.1 200 OK\r\n")
    api.writer.transport.abort()
    assert (await client.rest())[0] == b""
    assert await proxy.ended() == {"truncated": 1}
    assert proxy.sample("upstream_errors_total", type="reset") == 1


async def fill(proxy: RunningProxy, client: Peer, api: Peer, head: bytes) -> int:
    """Lets the upstream answer with `head` and more, until the client blocks it. How much the body is then."""
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    (connection,) = proxy.worker.proxy.server.connections
    (relay,) = proxy.worker.proxy.active
    exchange = relay._recorded()
    api.send(head)
    size = 0
    while not connection.writing_paused:
        size += 10_000
        api.send(chunk(b"x" * 10_000) if head is CHUNKED else b"x" * 10_000)
        await until(lambda: connection.writing_paused or exchange.response_bytes == size)  # noqa: B023
    return size


# No more than uvloop's TLS takes in before it stops to read.
TAIL = bytes(range(256)) * 400


@pytest.mark.parametrize(
    ("head", "last"), [(CHUNKED, chunk(TAIL) + LAST_CHUNK), (CLOSE_DELIMITED, TAIL)], ids=["chunked", "close"]
)
async def test_what_tls_had_received_while_the_client_was_slow_is_not_lost_at_the_end(
    start: StartProxy, upstream: ScriptedUpstream, ca_file: str, head: bytes, last: bytes
) -> None:
    proxy = await start(upstream.url, tls={"ca_file": ca_file})
    client, api = await begin(proxy, upstream, post(path="/v1/files"))
    size = await fill(proxy, client, api, head)
    api.send(last)
    api.close()
    await until(lambda: proxy.sample("upstream_connections", state="active") == 0)
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    response = await client.message()
    assert response.body.endswith(TAIL)
    assert (len(response.body), response.complete) == (size + len(TAIL), True)
    assert await proxy.ended() == {"completed": 1}


async def test_nor_does_it_make_an_end_where_close_notify_is_missing(
    start: StartProxy, upstream: ScriptedUpstream, ca_file: str
) -> None:
    proxy = await start(upstream.url, tls={"ca_file": ca_file})
    client, api = await begin(proxy, upstream, post(path="/v1/files"))
    await fill(proxy, client, api, CLOSE_DELIMITED)
    api.send(TAIL)
    api.writer.transport.abort()
    await until(lambda: proxy.sample("upstream_connections", state="active") == 0)
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert not (await client.message()).complete
    assert await proxy.ended() == {"truncated": 1}


async def test_an_upstream_that_asks_for_a_certificate_gets_it(
    start: StartProxy, authority: trustme.CA, ca_file: str, tmp_path: Path
) -> None:
    asking = server(authority, "127.0.0.1")
    asking.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(asking)
    issued = authority.issue_cert("client@example.org")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "client.crt")
    issued.private_key_pem.write_to_path(tmp_path / "client.key")
    async with ScriptedUpstream(tls=asking) as scripted:
        ours = {"cert_file": str(tmp_path / "client.crt"), "key_file": str(tmp_path / "client.key")}
        proxy = await start(scripted.url, tls={"ca_file": ca_file} | ours)
        client, api = await begin(proxy, scripted)
        assert api.writer.get_extra_info("peercert")["subjectAltName"] == (("email", "client@example.org"),)
        api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(DONE), LAST_CHUNK)
        assert (await client.message()).complete
        stranger = await start(scripted.url, tls={"ca_file": ca_file})
        client = await stranger.connect()
        client.send(post())
        assert (await client.message()).status == 502
        await stranger.idle()
        assert stranger.sample("upstream_errors_total") == 1
