"""A fault in whatever the life of a request calls, one call after the other: nothing is left, nothing false is told.

Every function and method of the relay, and what it calls of `wire` and `observe`, is wrapped. An exchange is recorded
first; then it is played again for each call that it made, which raises before it did anything, or after it did all, or
in which the task is cancelled. `FAULTS=all` plays all of them. Otherwise each function fails in each of these ways in
one of the kinds of exchange that call it, and an even selection of all else is played.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import logging
import os
import pkgutil
import socket
import ssl
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from types import FunctionType, ModuleType
from typing import Any, Literal, NamedTuple, cast, get_args

import pytest
import trustme

import sseproxy.relay
import sseproxy.wire
import sseproxy.wire.dialects
from sseproxy import config
from sseproxy.config.values import Rate, Source
from sseproxy.observe import metrics
from sseproxy.relay import downstream

from .fleet import FAULT, ROLE, occupied
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    chunk,
    delta,
    post,
    start_proxy,
    until,
    usage,
)

# One of so many calls is made to fail, if not all are, beside those that fail nowhere else.
ONE_OF = 1 if os.environ.get("FAULTS") == "all" else 60

When = Literal["before", "after", "cancelled"]

# --- what does not fail ---

NO_FAULTS = {
    "LoopLag": "belongs to no request",
    "DownstreamProtocol.__init__": "sets attributes; uvloop accepts nothing any more if it fails",
    "DownstreamProtocol.connection_made": "only has `_begin` do it, and ends the connection if that fails",
    "DownstreamServer.__call__": "only constructs; uvloop accepts nothing any more if it fails",
    "RequestHeads.__init__": "sets attributes; uvloop accepts nothing any more if it fails",
    "_Accepted.__init__": "sets attributes; uvloop accepts nothing any more if it fails",
    "_Target.is_ssl": "compares two strings",
    "Endpoint.connections": "belongs to no request",
    "Upstream.connections": "belongs to no request",
    "Telemetry._settle": "belongs to no request",
    "Telemetry.report": "belongs to no request",
}
ROOT = "is where the loop begins: what fails before its first line is the loop"
COUNTS = "begins with what it is there for, an addition or a subtraction"
HANDS = "what it returns has an owner in the same step"
ENDS = "begins with the end of the attempt, which begins with what it is there for"
NOT_BEFORE = {
    "Asking.end": ENDS,
    "Attempt.end": COUNTS,
    "BoundedReads._go_on": ROOT,
    "BoundedReads.buffer_updated": ROOT,
    "BoundedReads.connection_lost": ROOT,
    "BoundedReads.get_buffer": ROOT,
    "BoundedReads.take": ROOT,
    "Client.give_back": COUNTS,
    "Client.take": COUNTS,
    "Clock._fire": ROOT,
    "Connections.remove": COUNTS,
    "DownstreamProtocol._serve": ROOT,
    "DownstreamProtocol.connection_lost": ROOT,
    "DownstreamProtocol.data_received": ROOT,
    "DownstreamServer._handshake_ended": COUNTS,
    "DownstreamServer._check_empty": COUNTS,
    "DownstreamServer._forget": COUNTS,
    "DownstreamServer.lost": COUNTS,
    "Exchange.begin": COUNTS,
    "Exchange.finish": COUNTS,
    "HangupWatch.remove": COUNTS,
    "Pump.data_received": ROOT,
    "Relay._end": ROOT,
    "Relay._record": COUNTS,
    "RouteObserver.finished": COUNTS,
    "RouteObserver.started": COUNTS,
    "RouteObserver.stream_started": COUNTS,
    "Ticket.give_back": COUNTS,
    "Visit.release": COUNTS,
    "_Accepted._handshake": ROOT,
    "_Reads.connection_lost": ROOT,
    "_Run.data_received": ROOT,
}
NOT_AFTER = {"HangupWatch.add": HANDS, "Endpoint.connect": HANDS}


# --- faults ---


class Fault(Exception):
    """What nobody expects."""


class Point(NamedTuple):
    """The `nth` call of a function, and when in it the fault comes."""

    function: str
    nth: int
    when: When


class Faults:
    """Counts calls while it is `armed`, and has one of them fail."""

    def __init__(self) -> None:
        self.armed = False
        self.point: Point | None = None
        self.called: Counter[str] = Counter()
        self.entered: Counter[str] = Counter()
        self.awaited: set[str] = set()

    def arm(self, point: Point | None) -> None:
        self.armed, self.point = True, point
        self.called.clear()
        self.entered.clear()

    def at(self, function: str) -> When | None:
        """A call begins. When in it a fault is to come, if one is."""
        if not self.armed:
            return None
        self.called[function] += 1
        point, when = self.point, None
        if point is not None and point.function == function and point.nth == self.called[function]:
            when = point.when
        self.entered[function] += when != "before"
        return when

    def wrap(self, function: FunctionType) -> Callable[..., Any]:
        name = function.__qualname__
        if inspect.iscoroutinefunction(function):
            self.awaited.add(name)

            @functools.wraps(function)
            async def waits(*args: Any, **options: Any) -> Any:
                when = self.at(name)
                if when == "before":
                    raise Fault(name)
                if when == "cancelled":
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                result = await function(*args, **options)
                if when == "after":
                    raise Fault(name)
                return result

            return waits

        @functools.wraps(function)
        def calls(*args: Any, **options: Any) -> Any:
            when = self.at(name)
            if when == "before":
                raise Fault(name)
            result = function(*args, **options)
            if when == "after":
                if inspect.iscoroutine(result):
                    result.close()
                raise Fault(name)
            return result

        return calls


def modules() -> Iterator[ModuleType]:
    for package in (sseproxy.relay, sseproxy.wire, sseproxy.wire.dialects):
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            yield importlib.import_module(found.name)
    for name in ("telemetry", "access"):
        yield importlib.import_module(f"sseproxy.observe.{name}")


def fails(name: str) -> bool:
    return not any(name == root or name.startswith(root + ".") for root in NO_FAULTS)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults = Faults()
    # A client that leaves while it is told why it gets nothing is seen gone at the latest then.
    monkeypatch.setattr(downstream, "SILENCE", 0.2)
    wrapped = list(modules())
    known: defaultdict[FunctionType, list[tuple[ModuleType, str]]] = defaultdict(list)
    for name, module in list(sys.modules.items()):
        if name.startswith("sseproxy."):
            for known_as, value in vars(module).items():
                if isinstance(value, FunctionType):
                    known[value].append((module, known_as))
    for module in wrapped:
        for value in list(vars(module).values()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if isinstance(value, FunctionType) and fails(value.__qualname__):
                failing = faults.wrap(value)
                for other, known_as in known[value]:
                    monkeypatch.setattr(other, known_as, failing)
            elif isinstance(value, type) and not getattr(value, "_is_protocol", False):
                wrap_methods(value, faults, monkeypatch)
    return faults


def wrap_methods(owner: type, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in list(vars(owner).items()):
        if isinstance(value, FunctionType) and value.__module__ == owner.__module__ and fails(value.__qualname__):
            monkeypatch.setattr(owner, name, faults.wrap(value))
        elif isinstance(value, property) and isinstance(value.fget, FunctionType) and fails(value.fget.__qualname__):
            monkeypatch.setattr(owner, name, property(faults.wrap(value.fget)))
        elif isinstance(value, staticmethod) and fails(value.__func__.__qualname__):
            monkeypatch.setattr(owner, name, staticmethod(faults.wrap(cast(FunctionType, value.__func__))))


# --- both sides ---

MODELS = b'{"data":["m"]}'
JSON = b'{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
DELTAS = [delta(text) for text in "abcdef"]
LONG = b"x" * 1_000_000
# The kernel's buffers between proxy and client, and more than they take.
BUFFER = 64 * 1024
FLOOD = b"x" * 1_000_000
ASKED = b'{"model":"m","stream":true,"messages":[]}'
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: p\r\n\r\n"


async def in_parts(api: Peer, events: list[bytes]) -> None:
    api.send(STREAM_HEAD)
    for event in events:
        api.send(chunk(event))
        await api.drain()
        await asyncio.sleep(0)


async def answers(api: Peer) -> None:
    """What the upstream does depends on the path."""
    reused = False
    while True:
        head = await api.head()
        path = head.start_line.split()[1].removeprefix("/v1/")
        if path.startswith(("sick/", "well/")):
            path = path.removesuffix("/chat/completions")
        if path == "early":
            api.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
            await api.rest()
            return
        body, _ = await api._body(head)
        if path == "dies" and reused:
            return
        if path == "chat/completions" and b"stream_options" in body and b'"old"' in body:
            refusal = b'{"error":"what is stream_options?"}'
            api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(refusal), refusal))
        elif path == "chat/completions" and b'"bad"' in body:
            api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad")
        elif path == "chat/completions" and b"true" in body:
            await in_parts(api, DELTAS)
            if b"stream_options" in body:
                api.send(chunk(usage(1, 6)))
            api.send(chunk(DONE), LAST_CHUNK)
        elif path == "chat/completions":
            api.send(JSON_HEAD % len(JSON), JSON)
        elif path == "silent":
            api.send(STREAM_HEAD, chunk(DELTAS[0]))
            await api.rest()
            return
        elif path in ("never", "sick/never"):
            await api.rest()
            return
        elif path in ("cut", "sick/cut"):
            api.send(STREAM_HEAD, chunk(DELTAS[0]))
            return
        elif path == "sick/busy":
            api.send(b"HTTP/1.1 503 Busy\r\nRetry-After: 0.01\r\nContent-Length: 2\r\n\r\nno")
        elif path == "sick/long":
            said = b'{"error":{"code":"context_length_exceeded"}}'
            api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))
        elif path == "sick/fault":
            api.send(STREAM_HEAD, chunk(ROLE), chunk(FAULT), LAST_CHUNK)
        elif path.startswith("well/"):
            await in_parts(api, [ROLE, *DELTAS])
            api.send(chunk(DONE), LAST_CHUNK)
        elif path == "close":
            api.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", MODELS)
            api.close()
            return
        elif path == "long":
            api.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(FLOOD), LAST_CHUNK)
        elif path == "moved":
            api.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
            api.send(b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /v1/models\r\nContent-Length: 0\r\n\r\n")
        elif path == "none":
            api.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        else:
            api.send(JSON_HEAD % len(MODELS), MODELS)
        reused = True


class Client:
    """Asks, and looks whether what it gets is true."""

    def __init__(self, proxy: RunningProxy, peer: Peer) -> None:
        self.proxy = proxy
        self.peer = peer

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.peer.send(part)
            await self.peer.drain()
            for _ in range(20):
                await asyncio.sleep(0)

    async def gets(self, *wanted: bytes, bodiless: bool = False) -> None:
        """A response: one of `wanted`, whole or known not to be, or one that says that something failed."""
        response = await self.peer.message(bodiless=bodiless)
        if response.status < 300:
            body = response.body.replace(b": heartbeat\n", b"").partition(b"event: error\ndata: ")[0]
            assert any(one.startswith(body) for one in wanted), body[-300:]
            assert not response.complete or body in wanted, "short, and clean"
        if not response.complete:
            raise ConnectionResetError

    async def nothing_more(self) -> None:
        """Nothing comes that was not asked for."""
        await self.proxy.idle()
        await until(lambda: not any(one._busy for one in self.proxy.worker.proxy.server.connections))
        for _ in range(5):
            await asyncio.sleep(0)
        more = bytes(self.peer.reader._buffer)  # type: ignore[attr-defined]
        assert not more, more[:40]


Kind = Callable[[Client], Awaitable[None]]


async def json_answer(client: Client) -> None:
    await client.send(post(b'{"model":"m"}'))
    await client.gets(JSON)


async def stream(client: Client) -> None:
    await client.send(post(ASKED.replace(b"}", b',"stream_options":{"include_usage":false}}')))
    await client.gets(b"".join(DELTAS) + usage(1, 6) + DONE)


async def asks_for_usage(client: Client) -> None:
    await client.send(post(ASKED)[:-10], post(ASKED)[-10:])
    await client.gets(b"".join(DELTAS) + DONE)


async def refused_usage(client: Client) -> None:
    client.proxy.worker.proxy.upstreams["up"]._stream_options.clear()
    await client.send(post(ASKED.replace(b'"m"', b'"old"')))
    await client.gets(b"".join(DELTAS) + DONE)


async def bad_request(client: Client) -> None:
    client.proxy.worker.proxy.upstreams["up"]._stream_options.clear()
    await client.send(post(ASKED.replace(b'"m"', b'"bad"')))
    await client.gets(b"")


async def no_head_in_time(client: Client) -> None:
    await client.send(post(path="/hasty/never"))
    await client.gets(b"")


async def no_more_in_time(client: Client) -> None:
    await client.send(post(path="/hasty/silent"))
    await client.gets(DELTAS[0])


async def upload(client: Client) -> None:
    head = b"POST /v1/files HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n"
    await client.send(head + chunk(b"x" * 9), chunk(b"y" * 9), LAST_CHUNK)
    await client.gets(MODELS)


async def large_upload(client: Client) -> None:
    await client.send(post(LONG, "/v1/files").replace(b"Host", b"Expect: 100-continue\r\nHost"))
    await client.gets(MODELS)


async def read_for_its_model(client: Client) -> None:
    request = post(ASKED, "/m/files")
    await client.send(request[:-10], request[-10:-5], request[-5:])
    await client.gets(MODELS)


async def leaves(client: Client) -> None:
    await client.send(post(ASKED, "/v1/silent"))
    await client.peer.read(100)
    client.peer.writer.transport.abort()


async def leaves_its_upload(client: Client) -> None:
    await client.send(b"POST /v1/files HTTP/1.1\r\nHost: p\r\nContent-Length: 99\r\n\r\n", b"x")
    client.peer.writer.transport.abort()


async def cut(client: Client) -> None:
    await client.send(post(ASKED, "/v1/cut"))
    await client.gets(DELTAS[0] + DONE)


async def upstream_is_down(client: Client) -> None:
    await client.send(post(path="/down"))
    await client.gets(b"")


async def dead_connection(client: Client) -> None:
    await client.send(GET)
    await client.gets(MODELS)
    await client.send(post(path="/v1/dies"))
    await client.gets(MODELS)


async def early_answer(client: Client) -> None:
    await client.send(b"POST /v1/early HTTP/1.1\r\nHost: p\r\nContent-Length: 99\r\n\r\n", b"x")
    await client.gets(b"")


async def slow_client(client: Client) -> None:
    client.peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await client.send(post(path="/v1/long"))
    connections = client.proxy.worker.proxy.server.connections
    await until(lambda: any(one.writing_paused for one in connections) or not client.proxy.worker.proxy.active)
    client.peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
    await client.gets(FLOOD)


async def pipelines(client: Client) -> None:
    await client.send(GET * 7)
    for _ in range(7):
        await client.gets(MODELS)


async def head_and_none(client: Client) -> None:
    await client.send(GET.replace(b"GET", b"HEAD"))
    await client.gets(b"", bodiless=True)
    await client.send(GET.replace(b"models", b"none"))
    await client.gets(b"")


async def old_client(client: Client) -> None:
    await client.send(GET.replace(b"models HTTP/1.1", b"close HTTP/1.0"))
    await client.gets(MODELS)


async def moved(client: Client) -> None:
    await client.send(GET.replace(b"models", b"moved"))
    await client.gets(b"")


async def about_the_server(client: Client) -> None:
    await client.send(b"OPTIONS * HTTP/1.1\r\nHost: p\r\n\r\n", b"OPTIONS http://q/v1/models HTTP/1.2\r\n")
    await client.send(b"Host: p\r\nMax-Forwards: 1\r\n\r\n")
    await client.gets(b"")
    await client.gets(MODELS)


async def over_a_fleet(client: Client, path: str, *first: bytes) -> None:
    """`first` is what the first upstream begins with. It is forwarded if sseproxy itself fails to hold it back."""
    relay = client.proxy.worker.proxy
    for name in ("sick", "well"):
        # Nobody is ejected here, so only the order could differ between two plays.
        relay.upstreams[name]._turn = 0
    await client.send(post(ASKED, path)[:-10], post(ASKED, path)[-10:])
    await client.gets(ROLE + b"".join(DELTAS) + DONE, *first)


async def retried(client: Client) -> None:
    """The first endpoint refuses connections, the second one is busy, and so is the upstream."""
    await over_a_fleet(client, "/fleet/head/busy/chat/completions")


async def retried_after_a_pause(client: Client) -> None:
    await client.send(post(ASKED, "/fleet/same/busy/chat/completions"))
    await client.gets(b"")


async def another_model(client: Client) -> None:
    await over_a_fleet(client, "/fleet/model/long/chat/completions")


async def held_until_its_first_token(client: Client) -> None:
    await over_a_fleet(client, "/fleet/first_token/fault/chat/completions", ROLE + FAULT)


async def held_until_its_end(client: Client) -> None:
    await over_a_fleet(client, "/fleet/end/cut/chat/completions", DELTAS[0] + b"never whole")


async def leaves_what_is_held(client: Client) -> None:
    await client.send(post(ASKED, "/fleet/first_token/never/chat/completions"))
    client.peer.writer.transport.abort()


async def malformed(client: Client) -> None:
    await client.send(GET[:20])
    await client.send(b"\r\nno field\r\n\r\n")
    await client.gets(b"")


def with_a_key(request: bytes) -> bytes:
    return request.replace(b"/v1/", b"/key/").replace(b"Host: proxy", b"Host: proxy\r\nx-api-key: key")


async def has_a_key(client: Client) -> None:
    await client.send(with_a_key(post(ASKED))[:-10], with_a_key(post(ASKED))[-10:])
    await client.gets(b"".join(DELTAS) + DONE)


async def has_a_key_and_leaves(client: Client) -> None:
    await client.send(with_a_key(post(ASKED, "/v1/silent")))
    await client.peer.read(100)
    client.peer.writer.transport.abort()


async def is_above_a_limit(client: Client) -> None:
    await client.send(with_a_key(post(ASKED)).replace(b": key", b": none left"))
    await client.gets(b"")


KINDS: list[Kind] = [
    has_a_key,
    has_a_key_and_leaves,
    is_above_a_limit,
    json_answer,
    stream,
    asks_for_usage,
    refused_usage,
    bad_request,
    no_head_in_time,
    no_more_in_time,
    upload,
    large_upload,
    read_for_its_model,
    leaves,
    leaves_its_upload,
    cut,
    upstream_is_down,
    dead_connection,
    early_answer,
    slow_client,
    pipelines,
    head_and_none,
    old_client,
    moved,
    about_the_server,
    retried,
    retried_after_a_pause,
    another_model,
    held_until_its_first_token,
    held_until_its_end,
    leaves_what_is_held,
    malformed,
]
ENCRYPTED: list[Kind] = [json_answer, asks_for_usage, large_upload, leaves, dead_connection, slow_client, old_client]


# --- the proxy ---


class Encryption(NamedTuple):
    """TLS on both sides, with one certificate for both servers and who trusts it."""

    listener: config.TLS
    upstream: config.UpstreamTLS
    server: ssl.SSLContext
    client: ssl.SSLContext


@pytest.fixture(scope="module")
def encryption(tmp_path_factory: pytest.TempPathFactory) -> Encryption:
    folder: Path = tmp_path_factory.mktemp("tls")
    authority, files = trustme.CA(), [str(folder / name) for name in ("ca.pem", "certificate.pem")]
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(files[0])
    issued.private_key_and_cert_chain_pem.write_to_path(files[1])
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    issued.configure_cert(server)
    authority.configure_trust(client)
    return Encryption(config.TLS(cert_file=files[1]), config.UpstreamTLS(ca_file=files[0]), server, client)


def over_fleets(kind: str, timeouts: config.Timeouts) -> config.Route:
    """A route over two upstreams, the first of which is sick."""
    retry: dict[str, Any] = {"until": kind if kind in ("first_token", "end") else "head"}
    if kind == "same":
        retry |= {"on": ("connect", "503", "same"), "attempts": 3}
    names = ("sick",) if kind == "same" else ("sick", "well")
    return config.Route(
        name=kind,
        open=True,
        match=config.Match(path=f"/fleet/{kind}"),
        upstream=tuple(
            config.Target(name=name, model="m" if kind == "model" and name == "well" else None) for name in names
        ),
        retry=config.Retry(**retry),
        timeouts=timeouts,
        heartbeat=0.2,
    )


def options(upstream: str, tls: Encryption | None) -> config.Config:
    timeouts = config.Timeouts(connect=0.5, head=0.5, first_token=0.5, idle=0.5, body=0.5, write=0.5)
    hasty = config.Timeouts(connect=0.5, head=0.03, first_token=0.03, idle=0.03, body=0.5, write=0.5)
    trust = config.UpstreamTLS() if tls is None else tls.upstream
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{closed.getsockname()[1]}"
    asks = config.UsageOptions(request=True)
    free: dict[str, Any] = {"open": True}
    return config.Config(
        listen=(config.Address("127.0.0.1", 0),),
        tls=None if tls is None else tls.listener,
        limits=config.Limits(active_requests=9, request_head_time=0.5),
        metrics=config.Metrics(models=("m",)),
        upstreams=(
            config.Upstream(name="up", url=f"{upstream}/v1", tls=trust),
            config.Upstream(name="down", url=down),
            config.Upstream(
                name="sick",
                urls=(config.Endpoint(url=down), config.Endpoint(url=f"{upstream}/v1/sick")),
                tls=trust,
                affinity=(Source("field", "user"), Source("prefix", "64")),
            ),
            config.Upstream(name="well", url=f"{upstream}/v1/well", tls=trust),
        ),
        routes=(
            config.Route(
                **free,
                name="api",
                match=config.Match(path="/v1"),
                upstream=(config.Target(name="up"),),
                timeouts=timeouts,
                usage=asks,
            ),
            config.Route(
                **free,
                name="m",
                match=config.Match(path="/m", model=("m",)),
                upstream=(config.Target(name="up"),),
                timeouts=timeouts,
                heartbeat=0.2,
            ),
            config.Route(
                **free,
                name="hasty",
                match=config.Match(path="/hasty"),
                upstream=(config.Target(name="up"),),
                timeouts=hasty,
                heartbeat=0.01,
            ),
            config.Route(
                **free,
                name="down",
                match=config.Match(path="/down"),
                upstream=(config.Target(name="down"),),
                timeouts=timeouts,
            ),
            config.Route(
                name="key",
                match=config.Match(path="/key"),
                upstream=(config.Target(name="up"),),
                timeouts=timeouts,
                usage=asks,
            ),
            *(over_fleets(until, timeouts) for until in ("head", "first_token", "end", "model", "same")),
        ),
        clients=tuple(
            config.Client(
                name=name,
                keys=(f"sha256:{sha256(key).hexdigest()}",),
                models=("m",),
                limits=config.ClientLimits(active_requests=5, requests=Rate(requests, 86_400), tokens=Rate(10**9, 60)),
            )
            # A request that fails with a fault counts; whoever has none left has none from the first one on.
            for name, key, requests in (("a", b"key", 10**6), ("b", b"none left", 1))
        ),
    )


def counted(proxy: RunningProxy) -> int:
    """How many outcomes there were."""
    proxy.worker.telemetry.report()
    return int(sum(proxy.registry._counters[metrics.REQUESTS.name].values()))


def what_is_left(proxy: RunningProxy, scripted: ScriptedUpstream, others: set[asyncio.Task[Any]]) -> list[str]:
    """What an exchange has left behind, in words. `others` are tasks that are not the proxy's."""
    running = [task.get_coro() for task in asyncio.all_tasks() - others]
    tasks = [name for one in running if (name := getattr(one, "__qualname__", "")) != "ScriptedUpstream._play"]
    relay = proxy.worker.proxy
    server, admission = relay.server, relay.admission
    in_use, idle = (
        sum(counts) for counts in zip(*(one.connections() for one in relay.upstreams.values()), strict=True)
    )
    proxy.worker.telemetry.report()
    gauges = proxy.registry._gauges[1]
    found = {
        "exchanges": relay.active,
        "exchanges that are told of": proxy.worker.telemetry.running,
        "connections": server.connections,
        "handshakes": server._handshakes,
        "not empty": not server.empty.is_set(),
        "places of connections": server.slots.open,
        "addresses": +server.slots._of,
        "watches": server.hangups._watched,
        "places of requests": admission._active.own,
        "places on routes": {name for name, count in admission._on_route.items() if count.own},
        "places of clients": proxy.row.count("client a").own + proxy.row.count("client b").own,
        "reserved tokens": proxy.row.count("reserved a").own + proxy.row.count("reserved b").own,
        "bytes held": admission._held,
        "who holds bytes": admission._holders,
        "connecting": [name for name, one in relay.upstreams.items() if one._pending.own],
        "attempts": occupied(proxy),
        "upstream connections in use": in_use,
        "upstream connections of nobody": scripted.open - idle,
        "gauges": [key for key, value in gauges.items() if value and "active" in key[0] + "".join(key[1])],
    }
    found["tasks"] = tasks
    return [f"{name}: {value}" for name, value in found.items() if value]


class Stage:
    """Plays one kind of exchange in front of a proxy."""

    def __init__(
        self,
        faults: Faults,
        kind: Kind,
        tls: Encryption | None,
    ) -> None:
        self.faults = faults
        self.kind = kind
        self._tls = tls

    @property
    def name(self) -> str:
        return f"{self.kind.__name__} {self._tls is not None}"

    async def open(self) -> None:
        self.scripted = ScriptedUpstream(answers, None if self._tls is None else self._tls.server)
        await self.scripted.__aenter__()
        self.proxy = await start_proxy(options(self.scripted.url, self._tls))
        # Who is accepted has the buffers of the socket that listens.
        self.proxy.worker._accepting._sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self.proxy.row.window("requests b", 86_400).add(1, perf_counter())
        self._others = asyncio.all_tasks()

    def _is_empty(self) -> bool:
        """Whether nothing is left. Most of what is left is an exchange, or a connection, which is quickly seen."""
        relay = self.proxy.worker.proxy
        return not relay.active and not relay.server.connections and not self._left()

    def _left(self) -> list[str]:
        armed, self.faults.armed = self.faults.armed, False
        left = what_is_left(self.proxy, self.scripted, self._others)
        self.faults.armed = armed
        return left

    async def close(self) -> None:
        """Ends all of it, whatever is left."""
        worker = self.proxy.worker
        worker._accepting.stop()
        for connection in list(worker.proxy.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        worker.proxy.loop_lag.stop()
        worker.proxy.server.hangups.close()
        for upstream in worker.proxy.upstreams.values():
            await upstream.close()
        await self.scripted.__aexit__()

    async def _client(self) -> Client:
        trust = None if self._tls is None else self._tls.client
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.proxy.port))
        host = None if trust is None else "127.0.0.1"
        return Client(self.proxy, Peer(*await asyncio.open_connection(sock=sock, ssl=trust, server_hostname=host)))

    async def ask(self, kind: Kind) -> bool:
        """Whether all went well."""
        try:
            async with asyncio.timeout(2):
                client = await self._client()
        except OSError:
            return False
        try:
            async with asyncio.timeout(2):
                await kind(client)
                if client.peer.writer.transport.is_closing():
                    return True
                await client.nothing_more()
                await client.send(GET)
                await client.gets(MODELS)
                await client.nothing_more()
        except (ConnectionError, asyncio.IncompleteReadError):
            return False
        finally:
            client.peer.writer.transport.abort()
        return True

    async def play(self, point: Point | None) -> str | None:
        """Plays with a fault at `point`; returns what is wrong then."""
        before = counted(self.proxy)
        self.faults.arm(point)
        try:
            await self.ask(self.kind)
            try:
                async with asyncio.timeout(1.5):
                    await until(self._is_empty)
            finally:
                self.faults.armed = False
        except TimeoutError:
            return "; ".join(self._left()) or "the client waits"
        except AssertionError as error:
            return f"the client got {error}"
        began, outcomes = self.faults.entered["Exchange.begin"], counted(self.proxy) - before
        if outcomes != began or began < self.faults.entered["Relay.run"]:
            return f"{outcomes} outcomes of {began} exchanges"
        if not await self.ask(json_answer):
            return "the next request failed"
        await until(self._is_empty)
        return None


# How often which function was called, by the name of the stage.
Calls = dict[str, Counter[str]]


async def calls_of_all_kinds(faults: Faults, encryption: Encryption) -> Calls:
    found: Calls = {}
    for kinds, tls in ((KINDS, None), (ENCRYPTED, encryption)):
        for kind in kinds:
            stage = Stage(faults, kind, tls)
            await stage.open()
            try:
                assert await stage.play(None) is None
                found[stage.name] = faults.called.copy()
            finally:
                await stage.close()
    return found


@pytest.fixture(scope="module")
def recorded() -> Calls:
    """What each kind calls, once a test has found it out."""
    return {}


def number(text: str) -> int:
    """The same number for the same text in every process."""
    return zlib.crc32(text.encode())


# Always played: a connection that is neither kept nor closed is seen here; in other kinds it is closed all the same.
ALWAYS = {"old_client": {"RelayProtocol.finish", "RelayProtocol.read_bounded", "RelayProtocol.should_close"}}


def points(stage: Stage, calls: Calls) -> list[Point]:
    """The first, the second and the last call of each function that was called; of these, which are to be played."""
    faults = stage.faults
    found: list[Point] = []
    for function, times in sorted(faults.called.items()):
        for when in get_args(When):
            if function in {"before": NOT_BEFORE, "after": NOT_AFTER}.get(when, {}):
                continue
            if when == "cancelled" and function not in faults.awaited:
                continue
            here = [Point(function, nth, when) for nth in sorted({1, min(2, times), times})]
            always = function in ALWAYS.get(stage.kind.__name__, ())
            chosen = {point for point in here if always or number(f"{stage.name} {point}") % ONE_OF == 0}
            callers = [name for name, called in calls.items() if called[function]]
            if callers and stage.name == max(callers, key=lambda name: number(f"{name} {function} {when}")):
                chosen.add(here[number(f"{function} {when}") % len(here)])
            found += sorted(chosen)
    return found


async def find_what_is_left(stage: Stage, calls: Calls) -> dict[Point, str]:
    """Plays all points, and tells what is wrong at which."""
    wrong: dict[Point, str] = {}
    await stage.open()
    try:
        assert await stage.play(None) is None
        for point in points(stage, calls):
            found = await stage.play(point)
            if found is not None:
                wrong[point] = found
                await stage.close()
                await stage.open()
    finally:
        await stage.close()
    return wrong


@pytest.fixture
def nothing_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each fault is logged; thousands of tracebacks would take longer than all else."""
    caplog.set_level(logging.CRITICAL)
    caplog.set_level(logging.CRITICAL + 1, logger="asyncio")


pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
    # What fails while aiohttp connects is closed as it is forgotten.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.timeout(60 if ONE_OF > 1 else 600),
    pytest.mark.usefixtures("nothing_logged"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_a_fault_in_any_call_leaves_nothing(
    faults: Faults, kind: Kind, encryption: Encryption, recorded: Calls
) -> None:
    if ONE_OF > 1 and not recorded:
        recorded |= await calls_of_all_kinds(faults, encryption)
    assert await find_what_is_left(Stage(faults, kind, None), recorded) == {}


@pytest.mark.parametrize("kind", ENCRYPTED, ids=lambda kind: kind.__name__)
async def test_nor_does_one_in_tls(faults: Faults, kind: Kind, encryption: Encryption, recorded: Calls) -> None:
    if ONE_OF > 1 and not recorded:
        recorded |= await calls_of_all_kinds(faults, encryption)
    assert await find_what_is_left(Stage(faults, kind, encryption), recorded) == {}


@pytest.mark.parametrize("function", ["ChunkedDecoder._walk", "Pump._walk", "Pump._forward"])
async def test_what_is_lost_at_the_end_of_a_body_is_missed(
    faults: Faults, encryption: Encryption, function: str
) -> None:
    """In TLS, uvloop reads on after a read that failed."""
    stage = Stage(faults, slow_client, encryption)
    await stage.open()
    try:
        assert await stage.play(None) is None
        nth = faults.called[function] - 1
        assert await stage.play(Point(function, nth, "before")) is None
        assert await stage.play(Point(function, nth, "after")) is None
    finally:
        await stage.close()
