"""The backend and the clients for measuring a proxy. Both are in one process, so that they read the same clock."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from time import perf_counter
from typing import ClassVar

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chatcmpl-A1b2C3d4","object":"chat.completion.chunk","created":1781000000,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":" %b"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":400,"total_tokens":409}}\n\ndata: [DONE]\n\n'
)
BODY = b'{"model":"bench","stream":true,"messages":[]}'
FIELDS = b"Host: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
STREAM = b"POST /v1/chat/completions HTTP/1.1\r\n" + FIELDS
SHORT = b"POST /v1/embeddings HTTP/1.1\r\n" + FIELDS
ANSWER = b'{"object":"list","data":[],"usage":{"prompt_tokens":9,"total_tokens":9}}'
SHORT_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(ANSWER),
    ANSWER,
)


def framed(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


# Requests a second, the same for all proxies. At full speed a fast proxy would have fewer wake-ups for each request.
SHORT_RATE, SHORT_CONNECTIONS = 1000, 50
# Texts as long as tokens usually are.
CHUNKS = [framed(EVENT % text) for text in (b"a", b"of", b"the", b"token", b"streams", b"answering")]
END = framed(USAGE) + b"0\r\n\r\n"


class Backend(asyncio.Protocol):
    """Starts a stream, with the bytes `first`, for each request of one. `streams` are those in progress."""

    streams: ClassVar[dict[asyncio.Transport, None]] = {}
    first: ClassVar[bytes] = b""
    lost_at: ClassVar[float] = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.seen = b""

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"POST") and data.endswith(BODY):
            request = data
        else:
            # The request came in pieces, or a gateway has written its own head or body.
            self.seen += data
            head, _, body = self.seen.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            if length is None or len(body) < int(length[1]):
                return
            request, self.seen = self.seen, b""
        if b"/embeddings" in request:
            self.transport.write(SHORT_ANSWER)
        else:
            self.transport.write(HEAD + self.first)
            self.streams[self.transport] = None

    def connection_lost(self, exc: Exception | None) -> None:
        Backend.lost_at = perf_counter()
        self.streams.pop(self.transport, None)


class StreamClient(asyncio.Protocol):
    """Reads a stream. `received` counts the chunks of all streams together."""

    received = 0
    finished = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(STREAM)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        StreamClient.received += data.count(b'"content"')
        StreamClient.finished += data.endswith(b"0\r\n\r\n")


class TimedClient(StreamClient):
    """Also measures the delay of chunks that contain the time at which they were sent."""

    delays: ClassVar[list[float]] = []

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        super().data_received(data)
        at = data.find(b'"content":" @')
        while at >= 0:
            sent = data[at + 13 : data.index(b'"', at + 13)]
            self.delays.append(now - float(sent))
            at = data.find(b'"content":" @', at + 13)


class EagerClient(StreamClient):
    """Reads chunks that contain the number of their stream, and makes the backend send the next one of that stream."""

    order: ClassVar[list[asyncio.Transport]] = []

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        for stream in re.findall(rb'" #(\d+)"', data):
            self.send(int(stream))

    @classmethod
    def send(cls, stream: int) -> None:
        if cls.order:
            cls.order[stream].write(framed(EVENT % (b"#%d" % stream)))


class ShortClient(asyncio.Protocol):
    """Reads the answers on one connection. `answered` counts those of all connections together."""

    answered = 0

    def data_received(self, data: bytes) -> None:
        ShortClient.answered += data.count(b"HTTP/1.1 200 ")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def answering(port: int) -> None:
    """Waits until the proxy on `port` works: until a stream through it starts."""
    async with asyncio.timeout(90):
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(STREAM)
                async with asyncio.timeout(5):
                    await until(lambda: bool(Backend.streams))
                    for backend in Backend.streams:
                        backend.write(CHUNKS[0] + END)
                    answer = await reader.readuntil(b'"content"')
                writer.close()
                if answer.startswith(b"HTTP/1.1 200 "):
                    return
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                pass
            Backend.streams.clear()
            await asyncio.sleep(0.2)


class Streams:
    """A context with `number` open streams through the proxy on `port`."""

    def __init__(self, port: int, number: int, client: type[StreamClient] = StreamClient) -> None:
        self._port, self._number, self._client = port, number, client
        self._transports: list[asyncio.BaseTransport] = []
        self.order: list[asyncio.Transport] = []

    async def __aenter__(self) -> Streams:
        loop = asyncio.get_running_loop()
        Backend.streams.clear()
        for begun in range(self._number):
            self._transports.append((await loop.create_connection(self._client, "127.0.0.1", self._port))[0])
            if begun % 100 == 99:
                await until(lambda most=begun: len(Backend.streams) >= most - 50)  # type: ignore[misc]
        await until(lambda: len(Backend.streams) == self._number)
        self.order = list(Backend.streams)
        Backend.streams.clear()
        StreamClient.received = 0
        return self

    async def pace(self, rate: float, seconds: float, chunk: Callable[[int], bytes]) -> int:
        """Sends `rate` chunks a second on every stream. Returns how many in total, when all have arrived."""
        start, sent, StreamClient.received = perf_counter(), 0, 0
        while sent < self._number * rate * seconds:
            due = int((perf_counter() - start) * self._number * rate)
            for _ in range(due - sent):
                self.order[sent % self._number].write(chunk(sent))
                sent += 1
            await asyncio.sleep(0.001)
        await until(lambda: StreamClient.received == sent)
        return sent

    async def __aexit__(self, *_: object) -> None:
        StreamClient.finished = 0
        for backend in self.order:
            backend.write(END)
        await until(lambda: StreamClient.finished == self._number)
        for transport in self._transports:
            transport.close()


def timed(number: int) -> bytes:
    """A chunk for `Streams.pace`. One in eleven contains the time at which it was sent, for `TimedClient`."""
    return framed(EVENT % (b"@%.7f" % perf_counter())) if number % 11 == 0 else CHUNKS[number % len(CHUNKS)]


class Requests:
    """A context with keep-alive connections to the proxy on `port`, for short requests."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transports: list[asyncio.Transport] = []

    async def __aenter__(self) -> Requests:
        loop = asyncio.get_running_loop()
        for _ in range(SHORT_CONNECTIONS):
            self._transports.append((await loop.create_connection(ShortClient, "127.0.0.1", self._port))[0])
        return self

    async def pace(self, seconds: float) -> int:
        """Sends `SHORT_RATE` requests a second. Returns how many, when all are answered."""
        ShortClient.answered, start, sent, number = 0, perf_counter(), 0, int(SHORT_RATE * seconds)
        while sent < number:
            due = min(number, int((perf_counter() - start) * SHORT_RATE))
            for _ in range(due - sent):
                self._transports[sent % len(self._transports)].write(SHORT)
                sent += 1
            await asyncio.sleep(0.001)
        await until(lambda: ShortClient.answered == number)
        return number

    async def __aexit__(self, *_: object) -> None:
        for transport in self._transports:
            transport.close()
