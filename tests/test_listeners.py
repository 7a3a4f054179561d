"""Where clients connect: several addresses, Unix sockets, sockets that systemd passes, and TLS."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from sseproxy.config import UnixAddress
from sseproxy.errors import ListenError
from sseproxy.process.listeners import clean_up, listen

from .harness import DEADLINE, DONE, LAST_CHUNK, STREAM_HEAD, Peer, ScriptedUpstream, chunk, delta, post
from .served import ConfigFile, Served, end, run, until_true


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def certificate(ca: trustme.CA, directory: Path) -> str:
    """A new certificate for 127.0.0.1, in the files that `tls` names; returns it in DER."""
    issued = ca.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(directory / "tls.crt")
    issued.private_key_pem.write_to_path(directory / "tls.key")
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode()).hex()


def encrypted(directory: Path, **more: str) -> str:
    options = {"cert_file": directory / "tls.crt", "key_file": directory / "tls.key"} | more
    return "{" + ", ".join(f"{key}: '{value}'" for key, value in options.items()) + "}"


def trusting(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


async def connect(served: Served, context: ssl.SSLContext) -> Peer:
    peer = Peer(*await asyncio.open_connection("127.0.0.1", served.port, ssl=context))
    served.peers.append(peer)
    return peer


async def streamed(client: Peer, upstream: ScriptedUpstream) -> str | None:
    """A stream that arrives chunk by chunk; what the upstream was told of the client's scheme."""
    client.send(post())
    api = await upstream.accept()
    request = await api.message()
    api.send(STREAM_HEAD.replace(b"200 OK", b"200 OK\r\nConnection: close"))
    for number in range(3):
        api.send(chunk(delta(str(number))))
        await client.read_until(chunk(delta(str(number))))
    api.send(chunk(DONE), LAST_CHUNK)
    await client.read_until(chunk(DONE) + LAST_CHUNK)
    return request.get("x-forwarded-proto")


async def test_clients_that_want_tls_get_it(upstream: ScriptedUpstream, tmp_path: Path, ca: trustme.CA) -> None:
    certificate(ca, tmp_path)
    async with ConfigFile(tmp_path, upstream, tls=encrypted(tmp_path)).serve() as served:
        assert served.lines[0].endswith(f"listens on https://127.0.0.1:{served.port}")
        client = await connect(served, trusting(ca))
        assert await streamed(client, upstream) == "https"
        client.close()
        await served.until(r'requests_total\{.*outcome="completed".*\}', 1)


@pytest.mark.parametrize("slow", [False, True], ids=["reading", "stalled"])
async def test_a_client_that_leaves_is_noticed_through_tls(
    upstream: ScriptedUpstream, tmp_path: Path, ca: trustme.CA, slow: bool
) -> None:
    certificate(ca, tmp_path)
    async with ConfigFile(tmp_path, upstream, tls=encrypted(tmp_path)).serve() as served:
        client = await connect(served, trusting(ca))
        client.send(post())
        api = await upstream.accept()
        await api.message()
        api.send(STREAM_HEAD, chunk(delta("Hi")))
        await client.read_until(delta("Hi"))
        if slow:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            api.send(chunk(b"x" * 4_000_000))
        client.writer.transport.abort()
        await api.gone()
        await served.until(r'requests_total\{.*outcome="client_gone_mid_stream".*\}', 1)


async def test_certificates_are_read_anew_and_streams_keep_theirs(
    upstream: ScriptedUpstream, tmp_path: Path, ca: trustme.CA
) -> None:
    first = certificate(ca, tmp_path)
    file = ConfigFile(tmp_path, upstream, tls=encrypted(tmp_path), reload="{watch: 50ms}")
    async with file.serve() as served:
        before = await connect(served, trusting(ca))
        second = certificate(ca, tmp_path)
        await until_true(lambda: b"reloaded:" in served.errors)
        after = await connect(served, trusting(ca))
        shown = [
            peer.writer.get_extra_info("ssl_object").getpeercert(binary_form=True).hex() for peer in (before, after)
        ]
        assert shown == [first, second]
        for client in (before, after):
            await streamed(client, upstream)
            client.close()


async def test_what_is_older_than_configured_is_refused(
    upstream: ScriptedUpstream, tmp_path: Path, ca: trustme.CA
) -> None:
    certificate(ca, tmp_path)
    async with ConfigFile(tmp_path, upstream, tls=encrypted(tmp_path, min_version="1.3")).serve() as served:
        old = trusting(ca)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await connect(served, old)
        client = await connect(served, trusting(ca))
        await streamed(client, upstream)
        client.close()


async def test_it_listens_on_several_addresses_of_all_kinds(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    path = tmp_path / "s"
    file = ConfigFile(tmp_path, upstream, listen=f"['127.0.0.1:0', '127.0.0.2:0', 'unix:{path}|0600']")
    async with file.serve() as served:
        first, second, third = served.lines[0].partition(" listens on ")[2].split(", ")
        for url in (first, second):
            host, port = re.fullmatch(r"http://(.*):(\d+)", url).groups()  # type: ignore[union-attr]
            client = Peer(*await asyncio.open_connection(host, int(port)))
            assert await streamed(client, upstream) == "http"
            client.close()
        assert third == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        client = Peer(*await asyncio.open_unix_connection(str(path)))
        await streamed(client, upstream)
        client.close()
        await served.until(r'requests_total\{.*outcome="completed".*\}', 3)
        # A thread writes the lines, and nobody waits for it.
        await until_true(lambda: served.logged.count(b"\n") == 3)
        assert served.logged.count(b'"client":"127.0.0.1"') == 2


def test_a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "s"))
    (left,) = listen("listen", address)
    with pytest.raises(ListenError, match=r"^listen: cannot listen on unix:.*/s\|0660: address already in use$"):
        listen("listen", address)
    left.close()
    (again,) = listen("listen", address)
    # Somebody else's by now.
    clean_up([address])
    assert Path(address.path).exists()
    again.close()
    clean_up([address])
    assert not Path(address.path).exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ListenError, match="address already in use"):
        listen("listen", UnixAddress(str(tmp_path / "s")))
    assert (tmp_path / "s").read_text() == "precious"


class Systemd:
    """Passes sockets as systemd does, and hears what it is told."""

    def __init__(self, directory: Path) -> None:
        self.sockets = {name: socket.create_server(("127.0.0.1", 0)) for name in ("http", "admin")}
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.bind(str(directory / "notify"))
        self.told.setblocking(False)
        self.directory = directory

    def port(self, name: str) -> int:
        port: int = self.sockets[name].getsockname()[1]
        return port

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        # LISTEN_PID is the id of the process that is to have them, so it is set there.
        script = (
            "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid());"
            "fds = list(map(int, sys.argv[1].split(',')));"
            "[os.dup2(fd, 3 + n) for n, fd in enumerate(fds)];"
            "os.execv(sys.executable, [sys.executable, '-m', 'sseproxy', *sys.argv[2:]])"
        )
        fds = [sock.fileno() for sock in self.sockets.values()]
        environment = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": ":".join(self.sockets)}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script, ",".join(map(str, fds)), *arguments),
            env=os.environ | environment | {"NOTIFY_SOCKET": str(self.directory / "notify")},
            pass_fds=fds,
            stdout=asyncio.subprocess.DEVNULL,
        )

    async def hears(self) -> dict[str, str]:
        async with asyncio.timeout(DEADLINE):
            text = await asyncio.get_running_loop().sock_recv(self.told, 4096)
        return dict(line.split("=", 1) for line in text.decode().splitlines())

    def close(self) -> None:
        for sock in (*self.sockets.values(), self.told):
            sock.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    passing = Systemd(tmp_path)
    yield passing
    passing.close()


async def test_systemd_passes_the_sockets_and_is_told_how_it_goes(
    upstream: ScriptedUpstream, tmp_path: Path, systemd: Systemd
) -> None:
    file = ConfigFile(tmp_path, upstream, listen="systemd:http", admin="{listen: 'systemd:admin'}")
    process = await systemd.start("serve", "-c", str(file.path))
    try:
        assert (await systemd.hears())["READY"] == "1"
        client = Peer(*await asyncio.open_connection("127.0.0.1", systemd.port("http")))
        await streamed(client, upstream)
        client.close()
        admin = Peer(*await asyncio.open_connection("127.0.0.1", systemd.port("admin")))
        admin.send(b"POST /-/reload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await admin.message()).status == 200
        admin.close()
        reloading = await systemd.hears()
        assert reloading["RELOADING"] == "1"
        assert int(reloading["MONOTONIC_USEC"]) > 0
        assert (await systemd.hears())["READY"] == "1"
        client = Peer(*await asyncio.open_connection("127.0.0.1", systemd.port("http")))
        await streamed(client, upstream)
        client.close()
        process.terminate()
        assert await systemd.hears() == {"STOPPING": "1"}
        assert await process.wait() == 0
    finally:
        await end(process)


async def test_a_socket_that_was_not_passed_is_one_line(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream, listen="systemd")
    status, _, errors = await run("serve", "-c", str(file.path))
    assert status == 1
    assert errors == "sseproxy: listen: cannot listen on systemd: no such socket was passed by the service manager\n"
