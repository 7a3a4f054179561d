"""Sends the worst inputs of each kind to a running `sseproxy serve`: how long do others wait, how much memory is used?

Each situation has a new proxy with one worker, over loopback, and a paced stream through the same worker. There are
three results: the largest gap of this stream while the input is processed (see `bench.pace`); its largest gap when
there is nothing else; and the largest memory of supervisor and worker, above that before the situation (see
`bench.watch`). Each input is sent twice, and the smaller gap counts, because a busy machine causes gaps as well.

`make hostile` prints the table for bench/README.md. The result of each single input goes to standard error.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import trustme
import uvloop

from tests.harness import LAST_CHUNK, STREAM_HEAD, Message, Peer, ScriptedUpstream, chunk, post
from tests.served import ConfigFile, Served

from . import pace
from .watch import GET, KIB, MIB, NO_DEBUG, Watch, human, say, small_buffers, standstill, stop_reading, watching

# Seconds after which a situation has failed. The longest, of large events, takes about a minute.
PATIENCE = 180.0
# Seconds for measuring the stream while there is nothing else.
QUIET = 0.5
# Just below the limits. Above them a body is refused (max_body), and an event is forwarded without being read
# (limits.event).
BODY, EVENT = 31 * MIB, 32 * MIB - KIB
ANSWER = 64 * MIB
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
CHOSEN, ASKED = "/chosen/chat/completions", "/asked/chat/completions"


@dataclass(frozen=True)
class Bound:
    """Limits for a situation: seconds of the gap above that of a quiet stream, and bytes of memory."""

    situation: str
    gap: float
    size: int


BODIES_CHOSEN = Bound("Request bodies, read for their model", 0.05, 3 * BODY)
BODIES_ASKED = Bound("Request bodies, read to ask for usage", 0.05, 3 * BODY)
UNFINISHED = Bound("Request bodies that never end", 0.05, 96 * MIB)
EVENTS = Bound("Events of a stream", 0.01, 16 * MIB)
ANSWERS = Bound("JSON answers", 0.01, 16 * MIB)
TINY_CHUNKS = Bound("Bodies in chunks of one byte", 0.05, 16 * MIB)
SILENT = Bound("TLS connections without a handshake", 0.05, 400 * 128 * KIB)
HOPS = Bound("Trusted hops in X-Forwarded-For", 0.05, 8 * MIB)
PIPELINED = Bound("Pipelined requests", 0.05, 8 * MIB)
RESETS = Bound("TLS clients that do not read, then reset", 0.05, 96 * MIB)


@dataclass(frozen=True)
class Figures:
    bound: Bound
    sent: str
    quiet: float
    gap: float
    """The largest gap of the stream in seconds: `quiet` alone, `gap` with the worst input."""
    growth: int
    """The largest memory of the proxy, in bytes above that before the situation."""

    @property
    def within(self) -> bool:
        return self.gap <= self.quiet + self.bound.gap and self.growth <= self.bound.size


@dataclass
class Attacked:
    """A proxy under attack, its memory, and the stream through it."""

    served: Served
    tls: ssl.SSLContext | None
    watch: Watch
    pace: pace.Pace
    quiet: float
    worst: float = 0.0
    """The largest gap so far, in seconds."""

    async def connect(self) -> Peer:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.served.port, ssl=self.tls))
        self.served.peers.append(peer)
        return peer

    async def suffer(self, what: str, attack: Callable[[], Awaitable[None]]) -> None:
        gaps = []
        for _ in range(2):
            await self.pace.gap()
            await attack()
            gaps.append(await self.pace.gap())
        self.worst = max(self.worst, min(gaps))
        text = f"  {what}: {' and '.join(map(milliseconds, gaps))} ms; {human(self.watch.growth)} so far\n"
        sys.stderr.write(text)

    async def ask(self, request: bytes) -> None:
        """Sends a request that the upstream answers, and reads the answer to its end."""
        client = await self.connect()
        client.send(request)
        head = await client.head()
        assert head.status == 200, head
        await to_the_end(client, head)
        client.close()

    def figures(self, bound: Bound, sent: str) -> Figures:
        return Figures(bound, sent, self.quiet, self.worst, self.watch.growth)


async def to_the_end(client: Peer, head: Message) -> None:
    length = head.get("content-length")
    if length is not None:
        left = int(length)
        while left:
            left -= len(await read_some(client))
        return
    tail = b""
    while not tail.endswith(LAST_CHUNK):
        tail = (tail + await read_some(client))[-len(LAST_CHUNK) :]


async def read_some(client: Peer) -> bytes:
    part = await client.reader.read(MIB)
    if not part:
        raise ConnectionResetError
    return part


async def answer_ok(api: Peer, _: Message) -> None:
    api.send(OK % (2, b"ok"))


@asynccontextmanager
async def attacked(
    answer: Callable[[Peer, Message], Awaitable[None]] = answer_ok, *, tls: bool = False
) -> AsyncIterator[Attacked]:
    """A proxy whose upstream reads complete requests and answers each with `answer`."""

    async def play(api: Peer) -> None:
        while True:
            await answer(api, await api.message())

    async with (
        asyncio.timeout(PATIENCE),
        ScriptedUpstream(play) as upstream,
        pace.pace() as stream,
    ):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            options, context = encrypted(directory) if tls else ({}, None)
            file = ConfigFile(directory, upstream, **routes(upstream, stream), **options)
            async with file.serve(**NO_DEBUG) as served:
                await stream.begin(served.port, tls=tls)
                quiet = []
                for _ in range(2):
                    await stream.gap()
                    await asyncio.sleep(QUIET)
                    quiet.append(await stream.gap())
                async with watching(served) as watch:
                    yield Attacked(served, context, watch, stream, min(quiet))


def routes(upstream: ScriptedUpstream, stream: pace.Pace) -> dict[str, str]:
    here = f"{{name: up, url: '{upstream.url}/v1'}}"
    beside = f"{{name: paced, url: 'http://127.0.0.1:{stream.port}'}}"
    return {
        "upstreams": f"[{here}, {beside}]",
        "routes": "["
        f"{{name: paced, match: {{path: {pace.PATH}}}, upstream: paced}},"
        "{name: chosen, match: {path: /chosen, model: 'm*'}, upstream: up},"
        "{name: others, match: {path: /chosen}, upstream: up},"
        "{name: asked, match: {path: /asked}, upstream: up, usage: {request: true}},"
        "{name: all, match: {path: /v1}, upstream: up},"
        "{name: gemini, match: {path: /v1beta}, upstream: up, dialect: gemini}"
        "]",
        "trusted_proxies": "[127.0.0.0/8, 10.0.0.0/8]",
        "access_log": "{exchanges: off}",
    }


def encrypted(directory: Path) -> tuple[dict[str, str], ssl.SSLContext]:
    ca = trustme.CA()
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(directory / "tls.pem")
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return {"tls": f"{{cert_file: '{directory}/tls.pem'}}"}, context


def filled(begin: bytes, item: bytes, end: bytes, size: int) -> bytes:
    """`begin`, then `item` again and again up to `size` bytes, then `end`. The first `item` loses its leading comma."""
    times = (size - len(begin) - len(end)) // len(item)
    return begin + (item * times).removeprefix(b",") + end


def bodies() -> Iterator[tuple[str, bytes]]:
    depth = BODY // 7
    yield "lists", filled(b'{"stream":true,"model":[', b",[]", b"]}", BODY)
    yield "nested", b'{"stream":true,"a":' + b'{"a":' * depth + b"1" + b"}" * (depth + 1)
    yield "a long name", filled(b'{"stream":true,"model":"', b"m", '\N{GRINNING FACE}"}'.encode(), BODY)
    yield "a name of escapes", filled(b'{"stream":true,"model":"', b"\\u00e9", b'"}', BODY)
    yield "no Unicode", filled(b'{"stream":true,"model":"', b"\xff", b'"}', BODY)
    yield "members", filled(b'{"stream":true,', b',"a":1', b"}", BODY)
    yield "brackets", b"[" * BODY


async def request_bodies(bound: Bound, path: str) -> Figures:
    async with attacked() as proxy:
        for what, body in bodies():
            await proxy.suffer(what, partial(proxy.ask, post(body, path)))
        return proxy.figures(
            bound, "31 MiB: lists, nesting, a long name, escapes, bytes that are no Unicode, members, brackets"
        )


async def unfinished_bodies(count: int = 24, seconds: float = 4.0) -> Figures:
    """Clients send a body without its end, and then one byte a second. Another client sends requests meanwhile."""
    others: Counter[int] = Counter()
    async with attacked() as proxy:
        begun = post(b"x" * BODY, CHOSEN)[:-64]

        async def crawl(client: Peer) -> None:
            with suppress(ConnectionError):
                client.send(begun)
                await client.writer.drain()
                while True:
                    client.send(b"x")
                    await asyncio.sleep(1)

        async def attack() -> None:
            clients = [await proxy.connect() for _ in range(count)]
            crawling = [asyncio.ensure_future(crawl(client)) for client in clients]
            end = perf_counter() + seconds
            while perf_counter() < end:
                other = await proxy.connect()
                other.send(post(b'{"model":"m"}', CHOSEN))
                others[(await other.message()).status] += 1
                other.close()
                await asyncio.sleep(0.05)
            for client, task in zip(clients, crawling, strict=True):
                task.cancel()
                client.reset()
            await proxy.served.until(r"requests_active\{.*\"(chosen|others)\".*", 0)

        await proxy.suffer("unfinished", attack)
        said = ", ".join(f"{number} x {status}" for status, number in sorted(others.items()))
        return proxy.figures(
            UNFINISHED, f"{count} of 31 MiB, then a byte a second; the answers of another client: {said}"
        )


@dataclass(frozen=True)
class Sent:
    """What an upstream sends in answer to a request for `path`."""

    what: str
    path: str
    body: bytes


def events() -> list[Sent]:
    """Streams of one event, or of many."""
    chat, gemini = "/v1/chat/completions", "/v1beta/models/m:streamGenerateContent"
    parts = b'data: {"candidates":[{"content":{"parts":['
    completed = b'data: {"type":"response.completed","response":{"output":['
    output = b',{"type":"message","role":"assistant","content":[{"type":"output_text","text":"' + b"x" * 900 + b'"}]}'
    counts = b'],"usage":{"input_tokens":1,"output_tokens":2}}}\n\n'
    picture = b'data: {"type":"image_generation.partial_image","b64_json":"'
    return [
        Sent("Gemini's parts", gemini, filled(parts, b",{}", b"]}}]}\n\n", EVENT)),
        Sent("an image", "/v1/images/generations", filled(picture, b"AAAA", b'"}\n\n', EVENT)),
        Sent("outputs", "/v1/responses", filled(completed, output, counts, EVENT)),
        Sent("choices", chat, filled(b'data: {"choices":[', b",{}", b"]}\n\n", EVENT)),
        Sent("nested", chat, filled(b'data: {"choices":', b"[", b"\n\n", EVENT)),
        Sent("one line", chat, filled(b"data: ", b"x", b"\n\n", EVENT)),
        Sent("empty lines of data", chat, filled(b"", b"data:\n", b"\n", EVENT)),
        Sent("comments", chat, filled(b"", b":\n", b"\n", EVENT)),
        Sent("events without data", chat, filled(b"", b"x\r\r", b"\n\n", EVENT)),
        Sent("events that are no JSON", chat, filled(b"", b"data:1\n\n", b"\n\n", 4 * MIB)),
        Sent("usage in all events", ASKED, filled(b"", b'data:{"usage":1,"choices":[]}\n\n', b"\n\n", EVENT)),
    ]


def answers() -> list[Sent]:
    path = "/v1/embeddings"
    numbers = b',{"object":"embedding","embedding":[' + b"0.0123," * 1535 + b"0.5]}"
    counts = b'],"usage":{"prompt_tokens":1,"total_tokens":1}}'
    return [
        Sent("embeddings", path, filled(b'{"object":"list","data":[', numbers, counts, ANSWER)),
        Sent("lists", path, filled(b"[", b",[]", b"]", ANSWER)),
        Sent("lists as usage", path, filled(b'{"usage":[', b",[]", b"]}", ANSWER)),
        Sent("members", path, filled(b"{", b',"a":1', b"}", ANSWER)),
        Sent("a list of Gemini's", "/v1beta/models/m:streamGenerateContent", filled(b"[", b",{}", b"]", 4 * MIB)),
    ]


async def what_upstreams_send(
    bound: Bound, sent: str, all_sent: list[Sent], frame: Callable[[bytes], bytes]
) -> Figures:
    """The upstream sends each of `all_sent`. The query of a request is its number."""

    async def answer(api: Peer, request: Message) -> None:
        number = request.start_line.split()[1].partition("?")[2]
        api.send(frame(all_sent[int(number)].body))
        await api.writer.drain()

    async with attacked(answer) as proxy:
        for number, one in enumerate(all_sent):
            await proxy.suffer(one.what, partial(proxy.ask, post(path=f"{one.path}?{number}")))
        return proxy.figures(bound, sent)


def streamed(body: bytes) -> bytes:
    return STREAM_HEAD + chunk(body) + LAST_CHUNK


def answered(body: bytes) -> bytes:
    return OK % (len(body), body)


async def tiny_chunks(count: int = 500_000) -> Figures:
    """A body in chunks of one byte: as a stream, as an upload that is forwarded, and as a request that is read."""
    tiny = chunk(b"x") * count + LAST_CHUNK
    stream = STREAM_HEAD + tiny

    async def script(api: Peer, request: Message) -> None:
        api.send(stream if "stream" in request.start_line else answered(b"ok"))

    async with attacked(script) as proxy:
        await proxy.suffer("a stream", partial(proxy.ask, post(path="/v1/chat/completions?stream")))
        for what, path in (("an upload", "/v1/files"), ("a body that is read", CHOSEN)):
            head = f"POST {path} HTTP/1.1\r\nHost: proxy\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            await proxy.suffer(what, partial(proxy.ask, head + tiny))
        return proxy.figures(TINY_CHUNKS, f"{count:,} chunks: a stream, an upload, a body that is read for its model")


async def silent_connections(count: int = 400) -> Figures:
    """TCP connections to a TLS listener that send nothing. Another client sends requests meanwhile."""
    async with attacked(tls=True) as proxy:

        async def attack() -> None:
            silent = [await proxy.served.connect() for _ in range(count)]
            for _ in range(10):
                await proxy.ask(GET)
                await asyncio.sleep(0.1)
            for client in silent:
                client.reset()

        await proxy.suffer("silent", attack)
        return proxy.figures(SILENT, f"{count} that send nothing; another client is served meanwhile")


async def trusted_hops(hops: int = 3_400, times: int = 100) -> Figures:
    addresses = b",".join([b"10.0.0.1"] * hops)
    request = GET.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: " + addresses + b"\r\n\r\n")
    async with attacked() as proxy:

        async def attack() -> None:
            for _ in range(times):
                await proxy.ask(request)

        await proxy.suffer("hops", attack)
        return proxy.figures(HOPS, f"{hops:,} hops in each of {times} requests")


async def pipelined(count: int = 3_000) -> Figures:
    """Many requests, sent all at once on one connection."""
    async with attacked() as proxy:

        async def attack() -> None:
            client = await proxy.connect()
            client.send(GET * count)
            for _ in range(count):
                assert (await client.message()).status == 200

        await proxy.suffer("pipelined", attack)
        return proxy.figures(PIPELINED, f"{count:,} at once, all answered")


async def resets(count: int = 84, requests: int = 12) -> Figures:
    """TLS clients send several requests with large answers, read nothing, and reset the connection."""
    large = answered(b"x" * MIB)
    taken = 0

    async def answer(api: Peer, _: Message) -> None:
        nonlocal taken
        for at in range(0, len(large), 64 * KIB):
            api.send(large[at : at + 64 * KIB])
            await api.writer.drain()
            taken += 1

    async with attacked(answer, tls=True) as proxy:

        async def attack() -> None:
            clients = []
            for _ in range(count):
                client = await proxy.connect()
                small_buffers(client)
                stop_reading(client)
                client.send(GET * requests)
                clients.append(client)
            await standstill(lambda: taken)
            for client in clients:
                client.reset()
            # Raises TimeoutError if a request is left over.
            await proxy.served.until(r"requests_active\{.*\"all\".*", 0)

        await proxy.suffer("resets", attack)
        return proxy.figures(RESETS, f"{count} with {requests} requests each; no exchange is left afterwards")


SITUATIONS: tuple[Callable[[], Coroutine[Any, Any, Figures]], ...] = (
    partial(request_bodies, BODIES_CHOSEN, CHOSEN),
    partial(request_bodies, BODIES_ASKED, ASKED),
    unfinished_bodies,
    lambda: what_upstreams_send(
        EVENTS,
        "32 MiB: parts, outputs, an image, choices, nesting, one line, many lines, many events, usages",
        events(),
        streamed,
    ),
    lambda: what_upstreams_send(
        ANSWERS, "64 MiB: embeddings, lists, members; 4 MiB: a list of Gemini's", answers(), answered
    ),
    tiny_chunks,
    silent_connections,
    trusted_hops,
    pipelined,
    resets,
)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"


def row(figures: Figures) -> str:
    gap = f"{milliseconds(figures.gap)} ms, {milliseconds(figures.quiet)} ms alone"
    return f"| {figures.bound.situation} | {figures.sent} | {gap} | {human(figures.growth)} |"


def main() -> int:
    begun = perf_counter()
    say("| situation | what is sent | largest gap of the stream | memory at most |\n|---|---|---|---|")
    broken = []
    for situation in SITUATIONS:
        figures = uvloop.run(situation())
        say(row(figures))
        if not figures.within:
            broken.append(figures.bound.situation)
    sys.stderr.write(f"{perf_counter() - begun:.0f} s; over their bound: {', '.join(broken) or 'none'}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
