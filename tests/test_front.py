"""The configurations in `configs/front`, each in its proxy, in front of a running `sseproxy serve`.

And what the proxies do without them: a file is varied by replacing one of its lines, and a timeout that is there an
hour is a second in the variant, so that nothing here waits for more than that.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import pytest

from sseproxy.relay.downstream import KEEPALIVE

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
    kept_port,
    post,
)
from .served import Served, end, program, serve, until_true

CONFIGS = Path(__file__).parent.parent / "configs" / "front"
README = (CONFIGS / "README.md").read_text()
CLIENT = "127.0.0.2"
"""Where clients connect from: not what the proxies' own connections come from."""


@dataclass(frozen=True)
class Front:
    """A proxy, its files in `configs/front` (the first is what it is started with) and how it is started."""

    program: str
    files: tuple[str, ...]
    listens: str
    """The text in its files that says where it listens, with the port 80."""
    command: Callable[[str, Path], list[str]]
    """From the program's path and its first file to the command that runs it in the foreground."""


# What /etc/nginx/nginx.conf has around a file of conf.d, as far as it is needed. Master and worker are one process,
# with the rights of the tests, that does one thing after the other.
NGINX_CONF = """
master_process off;
pid {directory}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {file};
}}
"""


def _nginx(program: str, file: Path) -> list[str]:
    main = file.with_name("main.conf")
    main.write_text(NGINX_CONF.format(directory=file.parent, file=file))
    return [program, "-e", "stderr", "-p", str(file.parent), "-c", str(main), "-g", "daemon off;"]


def _haproxy(program: str, file: Path) -> list[str]:
    return [program, "-db", "-f", str(file)]


def _caddy(program: str, file: Path) -> list[str]:
    return [program, "run", "--adapter", "caddyfile", "--config", str(file)]


def _traefik(program: str, file: Path) -> list[str]:
    return [program, f"--configFile={file}"]


def _envoy(program: str, file: Path) -> list[str]:
    return [program, "-c", str(file), "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"]


NGINX = Front("nginx", ("nginx.conf",), "listen 80;", _nginx)
HAPROXY = Front("haproxy", ("haproxy.cfg",), "bind :80", _haproxy)
CADDY = Front("caddy", ("Caddyfile",), ":80 {", _caddy)
TRAEFIK = Front("traefik", ("traefik.yaml", "traefik-sseproxy.yaml"), 'address: ":80"', _traefik)
ENVOY = Front("envoy", ("envoy.yaml",), "port_value: 80}", _envoy)
FRONTS = (NGINX, HAPROXY, CADDY, TRAEFIK, ENVOY)


def replaced(texts: dict[str, str], old: str, new: str) -> None:
    """Replaces `old`, which has to be in exactly one line of all of `texts`, comments aside."""
    found = [
        (name, line) for name, text in texts.items() for line in text.splitlines() if old in line.partition("#")[0]
    ]
    assert len(found) == 1, (old, found)
    ((name, line),) = found
    assert texts[name].count(f"{line}\n") == 1, line
    texts[name] = texts[name].replace(f"{line}\n", line.replace(old, new) + "\n")


@dataclass
class RunningFront:
    port: int
    peers: list[Peer] = field(default_factory=list)

    async def connect(self) -> Peer:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.port, local_addr=(CLIENT, 0)))
        self.peers.append(peer)
        return peer


async def _forwards(port: int) -> bool:
    """True if it is sseproxy that answers. Traefik accepts connections before it knows where to send requests."""
    try:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", port))
    except OSError:
        return False
    try:
        peer.send(b"GET /not-routed HTTP/1.1\r\nHost: front\r\nConnection: close\r\n\r\n")
        return (await peer.message()).get("content-type") == "application/json"
    except (ConnectionError, asyncio.IncompleteReadError):
        return False
    finally:
        peer.writer.transport.abort()


@asynccontextmanager
async def running(
    front: Front, directory: Path, port: int, upstream: int, *variants: tuple[str, str]
) -> AsyncIterator[RunningFront]:
    """Runs `front` with its files on `port`, in front of the port `upstream`, once sseproxy answers through it.

    Besides the ports, and where Traefik's files lie, only `variants` are replaced.
    """
    path = program(front.program)
    texts = {name: (CONFIGS / name).read_text() for name in front.files}
    for old, new in variants:
        replaced(texts, old, new)
    replaced(texts, front.listens, front.listens.replace("80", str(port), 1))
    if front is ENVOY:
        replaced(texts, "port_value: 8080}", f"port_value: {upstream}}}")
    else:
        replaced(texts, "127.0.0.1:8080", f"127.0.0.1:{upstream}")
    if front is TRAEFIK:
        replaced(texts, "/etc/traefik/sseproxy.yaml", str(directory / "traefik-sseproxy.yaml"))
    for name, text in texts.items():
        (directory / name).write_text(text)
    with (directory / "output").open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *front.command(path, directory / front.files[0]),
            stdout=output,
            stderr=output,
            # Caddy keeps its state in the home directory, and has an API on a fixed port.
            env=os.environ | {"HOME": str(directory), "CADDY_ADMIN": f"unix/{directory}/admin"},
        )
    proxy = RunningFront(port)
    try:
        async with asyncio.timeout(DEADLINE):
            while not await _forwards(port):
                assert process.returncode is None, (directory / "output").read_text()
                await asyncio.sleep(0.02)
        yield proxy
    finally:
        for peer in proxy.peers:
            peer.writer.transport.abort()
        await end(process)


Put = Callable[..., Awaitable[RunningFront]]


@pytest.fixture
async def served(upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Served]:
    """sseproxy in front of `upstream`, told of the proxy in front of it as the README says."""
    (trust,) = re.findall(r"^    (trusted_proxies: .*)$", README, re.M)
    file = tmp_path / "sseproxy.yaml"
    file.write_text(
        f'listen: 127.0.0.1:0\nadmin: {{listen: "127.0.0.1:0"}}\nworkers: 1\n{trust}\n'
        f'upstreams: [{{name: up, url: "{upstream.url}/v1"}}]\n'
        "routes: [{name: api, match: {path: /v1}, upstream: up}]\n"
    )
    async with serve("-c", str(file)) as running_proxy:
        yield running_proxy


@pytest.fixture
async def put(served: Served, tmp_path: Path) -> AsyncIterator[Put]:
    """`await put(front, *variants)`: a proxy in front of sseproxy."""
    async with AsyncExitStack() as stack:
        count = 0

        async def place(front: Front, *variants: tuple[str, str], upstream: int | None = None) -> RunningFront:
            nonlocal count
            count += 1
            directory = tmp_path / f"front{count}"
            directory.mkdir()
            port = stack.enter_context(kept_port())
            return await stack.enter_async_context(running(front, directory, port, upstream or served.port, *variants))

        yield place


async def begin(front: RunningFront, upstream: ScriptedUpstream) -> tuple[Peer, Peer]:
    """A client and an upstream that has received the client's request, and not yet answered it."""
    client = await front.connect()
    client.send(post())
    api = await upstream.accept()
    await api.message()
    # As an API takes longer. Traefik cuts about one of a hundred answers that begin before it has seen the end of the
    # request (traefik, issue 11767), and nobody can tell from outside when it has.
    await asyncio.sleep(0.01)
    return client, api


async def begin_stream(front: RunningFront, upstream: ScriptedUpstream) -> tuple[Peer, Peer]:
    """A client and an upstream in the middle of a stream, of which the first token was received."""
    client, api = await begin(front, upstream)
    api.send(EVENTS, chunk(delta("Hi")))
    await client.read_until(delta("Hi"))
    return client, api


async def finish_stream(client: Peer, api: Peer) -> None:
    api.send(chunk(DONE), LAST_CHUNK)
    assert DONE in await client.read_until(LAST_CHUNK)


async def pass_whole(front: RunningFront, upstream: ScriptedUpstream) -> None:
    """An exchange from beginning to end, after which `front` has seen what was sent to it before."""
    client, api = await begin_stream(front, upstream)
    await finish_stream(client, api)


def ended_as(outcome: str) -> str:
    return rf'requests_total\{{.*outcome="{outcome}".*\}}'


EVERY = pytest.mark.parametrize("front", FRONTS, ids=lambda front: front.program)
WAYS_TO_END: tuple[Callable[[Peer], None], ...] = (Peer.close, Peer.reset)
SPEECH = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
SPEECH_OF_KNOWN_LENGTH = SPEECH.replace(b"Transfer-Encoding: chunked", b"Content-Length: 12")
EVENTS = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
"""As `SPEECH`, so that every request is a connection of its own to the upstream, which is waited for."""


@EVERY
async def test_each_chunk_is_with_the_client_before_the_next_is_sent(
    front: Front, put: Put, served: Served, upstream: ScriptedUpstream
) -> None:
    proxy = await put(front)
    client, api = await begin(proxy, upstream)
    api.send(EVENTS)
    head = await client.head()
    assert head.status == 200
    assert head.get("content-type") == "text/event-stream; charset=utf-8"
    for number in range(20):
        api.send(chunk(delta(f"token {number}")))
        await client.read_until(delta(f"token {number}"))
    await finish_stream(client, api)
    await served.until(ended_as("completed"), 1)

    client, api = await begin(proxy, upstream)
    api.send(SPEECH)
    for part in (b"first", b"second"):
        api.send(chunk(part))
        await client.read_until(part)


@EVERY
async def test_a_client_that_leaves_is_seen_at_once(
    front: Front, put: Put, served: Served, upstream: ScriptedUpstream
) -> None:
    proxy = await put(front)
    for leave in WAYS_TO_END:
        client, api = await begin(proxy, upstream)
        leave(client)
        await api.gone()
        client, api = await begin_stream(proxy, upstream)
        leave(client)
        await api.gone()
    await served.until(ended_as("client_gone_before_head"), len(WAYS_TO_END))
    await served.until(ended_as("client_gone_mid_stream"), len(WAYS_TO_END))


@EVERY
async def test_what_breaks_off_does_not_end_cleanly_at_the_client(
    front: Front, put: Put, served: Served, upstream: ScriptedUpstream
) -> None:
    proxy = await put(front)
    for end_too_early in WAYS_TO_END:
        client, api = await begin_stream(proxy, upstream)
        end_too_early(api)
        received, _ = await client.rest()
        assert b"event: error\n" in received
        assert not received.endswith(LAST_CHUNK)
        client, api = await begin(proxy, upstream)
        api.send(SPEECH, chunk(b"speech"))
        await client.read_until(b"speech")
        end_too_early(api)
        received, _ = await client.rest()
        assert not received.endswith(LAST_CHUNK)
    await served.until(ended_as("truncated"), 2 * len(WAYS_TO_END))


@EVERY
async def test_an_upload_streams(front: Front, put: Put, upstream: ScriptedUpstream) -> None:
    half = b"u" * 2**21
    client = await (await put(front)).connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: %d\r\n\r\n" % (2 * len(half)), half)
    api = await upstream.accept()
    await api.head()
    received = await api.read(len(half) // 2)
    client.send(half)
    received += await api.read(2 * len(half) - len(received))
    assert received == 2 * half
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    assert (await client.message()).body == b"{}"


@EVERY
async def test_the_upstream_learns_who_the_client_is_and_not_what_it_claims(
    front: Front, put: Put, upstream: ScriptedUpstream
) -> None:
    client = await (await put(front)).connect()
    client.send(
        b"GET /v1/models/a%2Fb?c=%2f HTTP/1.1\r\nHost: llm.example.com\r\nX-Request-Id: mine\r\n"
        b"X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: evil.example.com\r\n"
        b"Forwarded: for=6.6.6.6\r\n\r\n"
    )
    request = await (await upstream.accept()).message()
    assert request.start_line == "GET /v1/models/a%2Fb?c=%2f HTTP/1.1"
    assert request.all("x-forwarded-for") == [f"{CLIENT}, 127.0.0.1"]
    assert request.all("x-forwarded-proto") == ["http"]
    assert request.all("x-forwarded-host") == ["llm.example.com"]
    assert request.all("forwarded") == []
    assert request.all("x-request-id") == ["mine"]


async def relay(port: int, peer: Peer) -> None:
    """What comes from `peer` goes to `port`, and what comes back to `peer`, until one of them closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)

    ways = [asyncio.ensure_future(copy(peer.reader, writer)), asyncio.ensure_future(copy(reader, peer.writer))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        writer.transport.abort()


@EVERY
async def test_the_next_request_takes_the_same_connection_to_sseproxy(
    front: Front, put: Put, play: PlayScript, served: Served, upstream: ScriptedUpstream
) -> None:
    between = await play(lambda peer: relay(served.port, peer))
    proxy = await put(front, upstream=between.port)
    client = await proxy.connect()
    connections = []
    for _ in range(3):
        client.send(post())
        api = await upstream.accept()
        await api.message()
        api.send(EVENTS)
        await finish_stream(client, api)
        connections.append(between.connections)
    assert connections[0] == connections[1] == connections[2]


IDLE = (
    (NGINX, "keepalive_timeout 60s", "keepalive_timeout 1s"),
    (CADDY, "keepalive 60s", "keepalive 1s"),
    (TRAEFIK, "idleConnTimeout: 60s", "idleConnTimeout: 1s"),
    (ENVOY, "idle_timeout: 60s", "idle_timeout: 1s"),
)


@pytest.mark.parametrize(("front", "ours", "shrunk"), IDLE, ids=lambda value: getattr(value, "program", None))
async def test_who_closes_an_idle_connection_first_is_the_one_in_front(
    front: Front, ours: str, shrunk: str, put: Put, play: PlayScript, served: Served, upstream: ScriptedUpstream
) -> None:
    assert KEEPALIVE > 60, "what the files have is too long"
    between = await play(lambda peer: relay(served.port, peer))
    proxy = await put(front, (ours, shrunk), upstream=between.port)
    client, api = await begin_stream(proxy, upstream)
    assert between.open
    await finish_stream(client, api)
    await until_true(lambda: not between.open)


# What a line of ours says, and what it says in the variant: the defaults of HAProxy's usual files and of the others, an
# hour and for ever becoming seconds.
SILENCES = (
    (NGINX, "proxy_read_timeout 1h", "proxy_read_timeout 1s"),
    (HAPROXY, "timeout server 1h", "timeout server 1s"),
    (ENVOY, "stream_idle_timeout: 3600s", "stream_idle_timeout: 1s"),
    (ENVOY, "timeout: 0s", "timeout: 1s"),
)


@pytest.mark.parametrize(("front", "ours", "shrunk"), SILENCES, ids=lambda value: getattr(value, "program", None))
async def test_a_silence_is_cut_by_the_usual_timeout_and_not_by_ours(
    front: Front, ours: str, shrunk: str, put: Put, served: Served, upstream: ScriptedUpstream
) -> None:
    kept = await begin_stream(await put(front), upstream)
    cut, api = await begin_stream(await put(front, (ours, shrunk)), upstream)
    received, _ = await cut.rest()
    assert not received.endswith(LAST_CHUNK)
    await api.gone()
    await served.until(ended_as("client_gone_mid_stream"), 1)
    await finish_stream(*kept)


HTTP_1_0 = (("proxy_http_version 1.1;", ""), ('proxy_set_header Connection "";', ""))
BUFFERING = (*HTTP_1_0, ("proxy_buffering off;", ""))
"""nginx as it is by itself, before 1.29.7."""


@pytest.mark.parametrize(
    ("variants", "parts"),
    [
        (BUFFERING, (SPEECH, chunk(b"speech"), chunk(b"ending") + LAST_CHUNK)),
        ((("proxy_buffering off;", ""),), (SPEECH_OF_KNOWN_LENGTH, b"speech", b"ending")),
    ],
    ids=["chunked over HTTP/1.0", "of known length"],
)
async def test_nginx_holds_speech_back_by_default_and_not_with_our_lines(
    variants: tuple[tuple[str, str], ...], parts: tuple[bytes, bytes, bytes], put: Put, upstream: ScriptedUpstream
) -> None:
    head, speech, ending = parts
    proxy = await put(NGINX, *variants)
    client, api = await begin(proxy, upstream)
    api.send(head, speech)
    part = asyncio.ensure_future(client.read_until(b"speech"))
    await pass_whole(proxy, upstream)
    assert not part.done()
    api.send(ending)
    await part

    client, api = await begin(await put(NGINX), upstream)
    api.send(head, speech)
    await client.read_until(b"speech")


async def test_nginx_does_not_hold_back_event_streams_because_sseproxys_head_says_so(
    put: Put, upstream: ScriptedUpstream
) -> None:
    client, api = await begin_stream(await put(NGINX, *BUFFERING), upstream)
    api.send(chunk(delta("there")))
    await client.read_until(delta("there"))

    deaf = await put(NGINX, *HTTP_1_0, ("proxy_buffering off;", "proxy_ignore_headers X-Accel-Buffering;"))
    client, api = await begin(deaf, upstream)
    api.send(EVENTS, chunk(delta("Hi")))
    event = asyncio.ensure_future(client.read_until(delta("Hi")))
    other, other_api = await begin(deaf, upstream)
    other_api.send(EVENTS, chunk(DONE), LAST_CHUNK)
    await other.read_until(LAST_CHUNK)
    assert not event.done()
    api.send(LAST_CHUNK)
    await event


async def test_nginx_collects_an_upload_first_and_refuses_a_large_one_by_default(
    put: Put, upstream: ScriptedUpstream
) -> None:
    proxy = await put(NGINX, ("proxy_request_buffering off;", ""))
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 200000\r\n\r\n", b"u" * 100_000)
    await pass_whole(proxy, upstream)  # this one, begun later, is the first that the upstream hears of
    client.send(b"u" * 100_000)
    api = await upstream.accept()
    assert len((await api.message()).body) == 200_000

    client = await (await put(NGINX, ("client_max_body_size 0;", ""))).connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 2000000\r\n\r\n")
    assert (await client.message()).status == 413


async def test_haproxy_does_not_see_a_client_leave_unless_told_to(put: Put, upstream: ScriptedUpstream) -> None:
    proxy = await put(HAPROXY, ("option abortonclose", "no option abortonclose"))
    client, api = await begin(proxy, upstream)
    gone = asyncio.ensure_future(api.gone())
    client.close()
    await pass_whole(proxy, upstream)
    assert not gone.done()
    api.close()
    await gone


async def seconds_for_ten_chunks(front: RunningFront, upstream: ScriptedUpstream) -> float:
    client, api = await begin_stream(front, upstream)
    began = perf_counter()
    for number in range(10):
        api.send(chunk(delta(f"token {number}")))
        await client.read_until(delta(f"token {number}"))
    return perf_counter() - began


async def test_haproxy_delays_each_chunk_unless_told_not_to(put: Put, upstream: ScriptedUpstream) -> None:
    delayed = await put(HAPROXY, ("option http-no-delay", "no option http-no-delay"))
    usual = await seconds_for_ten_chunks(delayed, upstream)
    assert usual > 1
    assert await seconds_for_ten_chunks(await put(HAPROXY), upstream) < usual / 2


async def test_traefik_cuts_an_upload_but_no_answer_that_takes_longer_than_its_read_timeout(
    put: Put, upstream: ScriptedUpstream
) -> None:
    async def begin_upload(proxy: RunningFront) -> tuple[Peer, Peer]:
        client = await proxy.connect()
        client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 80000\r\n\r\n", b"u" * 40_000)
        api = await upstream.accept()
        await api.head()
        await api.read(20_000)
        return client, api

    client, kept = await begin_upload(await put(TRAEFIK))
    shrunk = await put(TRAEFIK, ("readTimeout: 1h", "readTimeout: 1s"))
    stream = await begin_stream(shrunk, upstream)
    _, cut = await begin_upload(shrunk)
    await cut.gone()
    client.send(b"u" * 40_000)
    await kept.read(60_000)
    await finish_stream(*stream)  # answers are no matter of it


async def test_envoy_refuses_more_requests_than_its_circuit_breakers_let_pass(
    put: Put, upstream: ScriptedUpstream
) -> None:
    proxy = await put(ENVOY, ("max_requests: 10000", "max_requests: 1"))
    await begin_stream(proxy, upstream)
    client = await proxy.connect()
    client.send(post())
    assert (await client.message()).status == 503


async def test_envoy_lets_requests_wait_for_connections_that_its_circuit_breakers_do_not_let_it_make(
    put: Put, upstream: ScriptedUpstream
) -> None:
    one_waits = "max_connections: 1\n            max_pending_requests: 1"
    proxy = await put(ENVOY, ("max_connections: 10000", one_waits))
    first, api = await begin_stream(proxy, upstream)
    clients = [await proxy.connect(), await proxy.connect()]
    for client in clients:
        client.send(post())
    answers = [asyncio.ensure_future(client.head()) for client in clients]
    (refused,), (waiting,) = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
    assert refused.result().status == 503
    another = await proxy.connect()
    another.send(post())
    assert (await another.message()).status == 503, "the one that waits does so no longer"
    await finish_stream(first, api)
    api = await upstream.accept()
    await api.message()
    api.send(STREAM_HEAD)
    assert (await waiting).status == 200


def test_the_seconds_that_the_files_name_are_those_of_sseproxy() -> None:
    for front in FRONTS:
        texts = " ".join((CONFIGS / name).read_text() for name in front.files)
        assert f"{KEEPALIVE:.0f} seconds" in texts, front.program


def test_the_readme_leads_to_every_file_and_every_file_is_run() -> None:
    linked = {link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("../")}
    assert linked == {name for front in FRONTS for name in front.files}
    assert linked == {path.name for path in CONFIGS.iterdir()} - {"README.md"}
