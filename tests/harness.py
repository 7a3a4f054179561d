"""What the tests stand on: a scripted upstream, a client that does as it is told, and a proxy in the test's own loop.

Everything is real sockets on loopback. Nothing here sleeps: whoever waits, waits for an event with a deadline.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from sseproxy import config
from sseproxy.config.options import Reading, Secret, Section, SectionOf
from sseproxy.ledger.table import Row, alone
from sseproxy.observe.metrics import Report
from sseproxy.observe.registry import Registry, exposition
from sseproxy.process.listeners import listen
from sseproxy.process.worker import Worker, counted_by_a_worker

DEADLINE = 20.0
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop turn until `condition` holds; for what has no event to wait on."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - the conditions are other objects' states
            await asyncio.sleep(0)


@contextmanager
def kept_port() -> Iterator[int]:
    """A port that refuses connections until a server is started on it, and that nobody else is given meanwhile.

    It is kept by a socket that is bound to it and does not listen. Linux lets a server listen beside that one if both
    have SO_REUSEADDR, as servers do, and gives the port to nobody who asks for any.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]


@contextmanager
def never_accepting() -> Iterator[str]:
    """The URL of a server that accepts no connection. Its backlog is full, so the kernel does not answer a SYN."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as waiting:
        for _ in range(4):
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"


def chunk(payload: bytes) -> bytes:
    """`payload` as one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def delta(text: str, **more: object) -> bytes:
    """A chat completion event that generates `text`."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return (
        b"data: "
        + msgspec.json.encode({"id": "c", "object": "chat.completion.chunk", "choices": [choice]} | more)
        + b"\n\n"
    )


def usage(prompt: int, completion: int) -> bytes:
    """The event that only tells usage."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return b"data: " + msgspec.json.encode({"id": "c", "choices": [], "usage": counts}) + b"\n\n"


DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Message:
    """A request or a response, its body without framing. `complete` is False if it broke off."""

    start_line: str
    fields: list[tuple[str, str]]
    body: bytes = b""
    complete: bool = True

    @property
    def status(self) -> int:
        return int(self.start_line.split()[1])

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower() == name]

    def get(self, name: str) -> str | None:
        found = self.all(name)
        return found[0] if found else None

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Peer:
    """One side of one connection, in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *data: bytes) -> None:
        """Raises ConnectionError if this side of the connection is closed."""
        if self.writer.transport.is_closing():
            raise ConnectionResetError
        self.writer.write(b"".join(data))

    async def drain(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self.writer.drain()

    async def read(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        async with asyncio.timeout(DEADLINE):
            return await self.reader.readexactly(size)

    async def read_until(self, separator: bytes) -> bytes:
        async with asyncio.timeout(DEADLINE):
            return await self.reader.readuntil(separator)

    async def rest(self) -> tuple[bytes, str]:
        """Everything up to the end of the connection, and which end that was: `fin` or `reset`."""
        received = bytearray()
        try:
            async with asyncio.timeout(DEADLINE):
                while part := await self.reader.read(65536):
                    received += part
        except ConnectionError:
            return bytes(received), "reset"
        return bytes(received), "fin"

    async def head(self) -> Message:
        text = (await self.read_until(b"\r\n\r\n")).decode("latin-1")
        start_line, *lines = text[:-4].split("\r\n")
        return Message(
            start_line, [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        )

    async def message(self, *, bodiless: bool = False) -> Message:
        """A whole message, interim responses skipped. `bodiless` is for the response to a HEAD."""
        head = await self.head()
        while re.match(r"HTTP/1\.1 1\d\d", head.start_line):
            head = await self.head()
        if bodiless or re.match(r"HTTP/1\.1 (204|304)", head.start_line):
            return head
        body, complete = await self._body(head)
        return Message(head.start_line, head.fields, body, complete)

    async def _body(self, head: Message) -> tuple[bytes, bool]:
        if head.get("transfer-encoding") == "chunked":
            body = bytearray()
            try:
                while size := int(await self.read_until(b"\r\n"), 16):
                    body += (await self.read(size + 2))[:-2]
                await self.read(2)
            except (asyncio.IncompleteReadError, ConnectionError):
                return bytes(body), False
            return bytes(body), True
        length = head.get("content-length")
        if length is not None:
            try:
                return await self.read(int(length)), True
            except asyncio.IncompleteReadError as error:
                return error.partial, False
        if head.start_line.startswith("HTTP/"):
            body_bytes, how = await self.rest()
            return body_bytes, how == "fin"
        return b"", True

    def close(self) -> None:
        """FIN, after what is still to be sent."""
        self.writer.close()

    def half_close(self) -> None:
        self.writer.write_eof()

    def reset(self) -> None:
        """RST, now."""
        if self.writer.transport.is_closing():
            return
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Waits until the other side has closed, whatever it still sent."""
        await self.rest()


Script = Callable[["Peer"], Awaitable[None]]


class ScriptedUpstream:
    """A server that does what a test says: connection by connection (`accept`), or all alike (`script`)."""

    def __init__(
        self,
        script: Script | None = None,
        tls: ssl.SSLContext | None = None,
        address: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self._address = address
        self._script = script
        self._tls = tls
        self._accepted: asyncio.Queue[Peer] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._peers: list[Peer] = []
        self._server: asyncio.Server | None = None
        self.connections = 0
        self.open = 0

    async def __aenter__(self) -> ScriptedUpstream:
        # As most servers do, it does not wait long for a close_notify in return for its own.
        patience = 0.1 if self._tls else None
        self._server = await asyncio.start_server(
            self._connected, *self._address, ssl=self._tls, ssl_shutdown_timeout=patience
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for peer in self._peers:
            peer.writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self._address[0]}:{self.port}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        peer = Peer(reader, writer)
        self._peers.append(peer)
        if self._script is None:
            self._accepted.put_nowait(peer)
            return
        task = asyncio.get_running_loop().create_task(self._play(self._script, peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _play(self, script: Script, peer: Peer) -> None:
        self.open += 1
        try:
            await script(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            peer.writer.transport.abort()

    async def hang_up(self) -> None:
        """Closes every connection, and waits until every script has ended."""
        for peer in self._peers:
            peer.close()
        await until(lambda: not self.open)

    async def accept(self) -> Peer:
        """The next connection."""
        async with asyncio.timeout(DEADLINE):
            return await self._accepted.get()


# Values by the name of the sample and its labels.
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class RunningProxy:
    """A worker in this loop, its reports going into a registry as a supervisor's would."""

    worker: Worker
    port: int
    registry: Registry
    row: Row
    """The worker's row in the ledger."""
    peers: list[Peer] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self) -> Peer:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.port))
        self.peers.append(peer)
        return peer

    async def busy(self) -> None:
        """Waits until an exchange is under way."""
        await until(lambda: bool(self.worker.proxy.active))

    async def idle(self) -> None:
        """Waits until no exchange is under way."""
        await until(lambda: not self.worker.proxy.active)

    def exposed(self, accept: str = "text/plain") -> str:
        self.worker.telemetry.report()
        return exposition(self.registry, accept)[0].decode()

    def samples(self, name: str = "") -> Samples:
        """All samples, or those of `name` only; not from `exposed`, which takes ten times as long."""
        self.worker.telemetry.report()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if name in ("", sample.name)
        }

    def sample(self, name: str, **labels: str) -> float:
        """The sum of all samples of `sseproxy_{name}` that have `labels`."""
        return total(self.samples(f"sseproxy_{name}"), name, **labels)

    def outcomes(self) -> dict[str, int]:
        """How many exchanges ended with which outcome."""
        counted: dict[str, int] = {}
        for (_, labels), value in self.samples("sseproxy_requests_total").items():
            outcome = dict(labels)["outcome"]
            counted[outcome] = counted.get(outcome, 0) + int(value)
        return counted

    async def ended(self) -> dict[str, int]:
        """Waits until no exchange is under way, and tells the outcomes."""
        await self.idle()
        return self.outcomes()


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of all `samples` of `sseproxy_{name}` that have `labels`."""
    return sum(
        value for (found, having), value in samples.items() if found == f"sseproxy_{name}" and labels.items() <= having
    )


async def start_proxy(settings: config.Config) -> RunningProxy:
    (sock,) = listen("listen", settings.listen[0])
    registry = Registry()
    decode = msgspec.msgpack.Decoder(Report).decode

    def send(report: Report) -> bool:
        registry.add(1, decode(msgspec.msgpack.encode(report)))
        return True

    row = alone(counted_by_a_worker(settings))
    worker = Worker(settings, [sock], send, row, settings.limits.connections)
    port = sock.getsockname()[1]
    await worker.start()
    return RunningProxy(worker, port, registry, row)


def settings(upstream_url: str, **more: Any) -> config.Config:
    """One route, `/v1`, to one upstream's `/v1`.

    `timeouts`, `api_key`, `tls` (the upstream's), `listener_tls`, `route` (what else a `Route` has) and what a `Config`
    has can be given.
    """
    timeouts = config.Timeouts(**more.pop("timeouts", {}))
    tls = config.UpstreamTLS(**more.pop("tls", {}))
    key = more.pop("api_key", None)
    upstream = config.Upstream(name="up", url=f"{upstream_url}/v1", api_key=key and Secret(key), tls=tls)
    match, options = config.Match(path="/v1"), more.pop("route", {})
    route = config.Route(name="api", match=match, upstream=(config.Target(name="up"),), timeouts=timeouts, **options)
    defaults: dict[str, Any] = {
        "listen": (config.Address("127.0.0.1", 0),),
        "drain_timeout": 5.0,
        "tls": more.pop("listener_tls", None),
        "upstreams": (upstream,),
        "routes": (route,),
    }
    return config.Config(**(defaults | more))


P = TypeVar("P", bound=Section)


def valid(kind: type[P], data: dict[str, Any]) -> P:
    """The section of a configuration that a document with `data` describes."""
    reading = Reading()
    found = SectionOf(kind).read(data, (), reading)
    assert isinstance(found, kind), reading.problems
    return found


def post(body: bytes = b'{"model":"m","stream":true,"messages":[]}', path: str = "/v1/chat/completions") -> bytes:
    """A client's request."""
    return b"POST %b HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        path.encode(),
        len(body),
        body,
    )


async def begin(proxy: RunningProxy, upstream: ScriptedUpstream, request: bytes | None = None) -> tuple[Peer, Peer]:
    """A client and an upstream, which has received the client's request (`post()`) and not yet answered it."""
    client = await proxy.connect()
    client.send(post() if request is None else request)
    api = await upstream.accept()
    await api.message()
    return client, api


async def begin_head(proxy: RunningProxy) -> tuple[Peer, bytes]:
    """A client of whose first request a part was read, and the rest of it."""
    client = await proxy.connect()
    client.send(post()[:40])
    await until(lambda: any(one._heads.begun for one in proxy.worker.proxy.server.connections))
    return client, post()[40:]
