"""Runs a proxy under mixed load for a long time: nothing may grow, nothing may be left over, nothing may be wrong.

    make soak SECONDS=3600

Clients arrive at a steady rate and send a few requests each. They read everything, read slowly or do not read, leave at
random, upload, keep their connection or close it, and send bytes that are not a request. The upstream answers with the
recorded streams of `tests/wire`, in random pieces, and fails in every way. If a client receives a complete response, it
is compared with the recording.

At the end all clients leave. The run fails if one of these is true:

- memory rose after the warm-up (measured by a line fitted to the samples)
- descriptors were not closed, or there are more threads
- a gauge is not zero
- a worker was replaced, or a request ended as `proxy_error`
- a body differs from what was sent
- a client was still waiting
- the proxy logged a warning or an error

The same seed gives the same clients and answers again, but at other moments.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from time import perf_counter

import uvloop

from tests.harness import DEADLINE, LAST_CHUNK, Peer, chunk
from tests.served import Served, serve
from tests.test_shapes import SHAPES, Shape

HERE = Path(__file__).parent
MIB = 1 << 20
# Seconds between two samples. Each sample prints a line.
SAMPLE = 10.0
# How much the fitted lines may rise in the last two thirds of a run, for all processes together. Python's blocks in use
# vary by one or two thousand with the load, and malloc's bytes by some MiB. The heap, as the kernel sees it, grows in
# steps for a long time.
MAX_BLOCKS, MAX_IN_USE, MAX_MEMORY = 5_000, 8 * MIB, 48 * MIB
# Seconds after which everything must be closed at the end. The pool keeps a connection for 4 s, and the timeouts below
# are shorter.
SETTLING = 30.0
# Bytes that are sent to a client that does not read: more than the kernel's buffers hold.
FLOOD = 24 * MIB
# The run stops after so many errors.
ENOUGH = 20

CONFIG = """\
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
workers: 2
limits: {{request_head_time: 2s}}
upstreams:
  - {{name: api, url: "http://127.0.0.1:{port}"}}
  - {{name: refusing, url: "http://127.0.0.1:{refusing}"}}
routes:
  - name: plain
    match: {{path: /}}
    upstream: api
    timeouts: {{head: 2s, first_token: 4s, idle: 2s, body: 2s, write: 3s, total: 30s}}
  - name: asking
    match: {{path: /asking}}
    upstream: api
    usage: {{request: true}}
    heartbeat: 100ms
    timeouts: {{head: 2s, first_token: 4s, idle: 2s, body: 2s, write: 3s, total: 30s}}
  - name: refusing
    match: {{path: /refusing}}
    upstream: refusing
"""

# What an upstream does, with weights. With those in WHOLE a client may receive the complete response.
WHOLE = {"chunked": 12, "length": 3, "close": 2, "interim": 2}
FAULTS = {
    **{"cut": 3, "reset": 2, "short": 1, "stall": 1, "silent": 1, "garbage": 1, "bad chunk": 1, "early": 2},
    **{"error": 2, "empty": 1, "gone": 1},
}
# What a client does, with weights.
CLIENTS = {
    **{"reads": 12, "reads slowly": 3, "keeps": 8, "asks 1.0": 2, "pipelines": 1, "uploads": 3, "stops uploading": 1},
    **{"leaves in its request": 1, "leaves at once": 2, "leaves in the response": 6, "closes its side": 2},
    **{"is broken": 1, "is too long": 1, "is silent": 1, "does not read": 1, "is refused": 1, "asks for usage": 4},
}
GARBAGE = (b"junk\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"\x00" * 40_000)
BROKEN = (b"\x16\x03\x01\x00\r\n\r\n", b"GET / HTTP/1.1\r\nHost: p\r\nContent-Length: x\r\n\r\n", b"GET /\r\n\r\n")


def draw(dice: random.Random, weights: dict[str, int]) -> str:
    return dice.choices(list(weights), list(weights.values()))[0]


@dataclass(frozen=True)
class Answer:
    """What the upstream does with the request of this number. Client and upstream both compute it."""

    number: int
    shape: Shape
    way: str
    flood: bool

    @property
    def whole(self) -> bool:
        return self.way in WHOLE


def answer_to(seed: int, number: int, flood: bool) -> Answer:
    dice = random.Random(f"{seed} answer {number}")
    return Answer(number, dice.choice(SHAPES), "chunked" if flood else draw(dice, WHOLE | FAULTS), flood)


def pieces_of(dice: random.Random, data: bytes) -> list[bytes]:
    """Splits `data` at random, into about forty pieces at most."""
    pieces, start = [], 0
    while start < len(data):
        size = max(dice.choice([1, 30, 300, 9000]), len(data) // 40)
        pieces.append(data[start : start + size])
        start += size
    return pieces


@dataclass
class Soak:
    """One run: what its clients did, and what went wrong."""

    seed: int
    port: int = 0
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def upstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        api = Peer(reader, writer)
        try:
            while await self._answer(api):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            # The proxy has closed the connection, or no request came on an idle connection.
            pass
        finally:
            writer.transport.abort()

    async def _answer(self, api: Peer) -> bool:
        """Answers one request. Returns whether the connection may be used again."""
        head = await api.head()
        query = re.search(r"[?&]n=(\d+)(f?) ", head.start_line)
        assert query is not None, head.start_line
        answer = answer_to(self.seed, int(query[1]), bool(query[2]))
        dice = random.Random(f"{self.seed} upstream {answer.number}")
        body, way = answer.shape.body, answer.way
        if way == "gone":
            api.reset()
            return False
        if way == "early":
            api.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
            return False
        _, complete = await api._body(head)
        if not complete:
            return False
        if way == "silent":
            await api.reader.read()
            return False
        if way == "garbage":
            api.send(dice.choice(GARBAGE))
            await api.reader.read()
            return False
        if way in ("error", "empty"):
            api.send(
                b"HTTP/1.1 204 No Content\r\n\r\n"
                if way == "empty"
                else b"HTTP/1.1 500 Oops\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
            )
            return True
        if way == "interim":
            api.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        framing = {
            "length": b"Content-Length: %d\r\n" % len(body),
            "short": b"Content-Length: %d\r\n" % (len(body) + 1),
            "close": b"",
        }.get(way, b"Transfer-Encoding: chunked\r\n")
        content_type = str(answer.shape.truth["content_type"]).encode()
        api.send(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n" % (content_type, framing))
        parts = pieces_of(dice, body)
        if way in ("cut", "reset", "stall", "bad chunk"):
            parts = parts[: dice.randrange(len(parts))]
        chunked = framing.startswith(b"T")
        for part in parts:
            api.send(chunk(part) if chunked else part)
            await asyncio.sleep(dice.choice([0, 0, 0, 0.001, 0.01, 0.05]))
        if answer.flood:
            for _ in range(FLOOD // len(body)):
                api.send(chunk(body))
                await api.writer.drain()
        if way == "stall":
            await api.reader.read()
        elif way == "bad chunk":
            api.send(b"5\r\nhello!!!\r\n")
            await api.reader.read()
        elif way == "reset":
            api.reset()
        elif chunked and answer.whole:
            api.send(LAST_CHUNK)
            return True
        elif way == "length":
            return True
        api.close()
        await api.writer.wait_closed()
        return False

    def request(
        self, number: int, *, prefix: str = "", version: str = "1.1", more: bytes = b"", flood: bool = False
    ) -> bytes:
        """The head of a POST, up to the fields that describe its body."""
        path = answer_to(self.seed, number, flood).shape.path
        target = f"{prefix}{path}{'&' if '?' in path else '?'}n={number}{'f' if flood else ''}"
        line = f"POST {target} HTTP/{version}\r\nHost: p\r\nContent-Type: application/json\r\n".encode()
        return line + more

    async def client(self, number: int) -> None:
        """One client. Its kind is drawn at random."""
        dice = random.Random(f"{self.seed} client {number}")
        kind = draw(dice, CLIENTS)
        sock = socket.socket()
        sock.setblocking(False)
        if kind in ("does not read", "reads slowly"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            peer = Peer(*await asyncio.open_connection(sock=sock))
        except BaseException:
            sock.close()
            raise
        try:
            await self._act(kind, peer, dice, number)
        except (ConnectionError, asyncio.IncompleteReadError):
            # The proxy cut the connection, as it does when the upstream fails in mid-stream.
            pass
        except (TimeoutError, AssertionError) as error:
            self.wrong.append(f"client {number}, which {kind}: {error!r}")
        finally:
            dice.choice([peer.close, peer.reset, peer.writer.transport.abort])()
            peer.writer.transport.abort()
        self.done[kind] += 1

    async def _act(self, kind: str, peer: Peer, dice: random.Random, number: int) -> None:
        # The proxy ends everything that stalls for 2 or 3 s. A client that waits for the 10 s of the harness was
        # forgotten.
        small = b'{"stream":true,"model":"m","messages":[]}'
        body = b"Content-Length: %d\r\n\r\n%b" % (len(small), small)
        match kind:
            case "reads" | "keeps":
                for turn in range(1 if kind == "reads" else dice.randrange(2, 7)):
                    close = b"Connection: close\r\n" if kind == "reads" and dice.random() < 0.5 else b""
                    peer.send(self.request(number + turn, more=close), body)
                    if not await self._receive(peer, number + turn):
                        return
            case "asks 1.0":
                peer.send(self.request(number, version="1.0"), body)
                await self._receive(peer, number)
            case "pipelines":
                peer.send(*(self.request(number + turn) + body for turn in range(3)))
                for turn in range(3):
                    if not await self._receive(peer, number + turn):
                        return
            case "reads slowly":
                peer.send(self.request(number), body)
                for _ in range(50):
                    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
                    await asyncio.sleep(0.02)
                    peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
                    await asyncio.sleep(0)
                await self._receive(peer, number)
            case "uploads" | "stops uploading":
                upload = small + b" " * dice.choice([3000, 100_000, 2_000_000])
                parts = pieces_of(dice, upload)
                if kind == "stops uploading":
                    parts = parts[: dice.randrange(len(parts))]
                chunked = dice.random() < 0.5
                length = (
                    b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: %d\r\n\r\n" % len(upload)
                )
                peer.send(self.request(number, more=length))
                for part in parts:
                    peer.send(chunk(part) if chunked else part)
                    await peer.drain()
                if kind == "uploads" and chunked:
                    peer.send(LAST_CHUNK)
                await self._receive(peer, number)
            case "leaves in its request":
                request = self.request(number) + body
                peer.send(request[: dice.randrange(len(request))])
                await peer.drain()
            case "leaves at once":
                peer.send(self.request(number), body)
                await peer.drain()
            case "leaves in the response":
                peer.send(self.request(number), body)
                async with asyncio.timeout(DEADLINE):
                    await peer.reader.read(dice.randrange(1, 3000))
            case "closes its side":
                peer.send(self.request(number), body)
                await asyncio.sleep(dice.random() / 5)
                peer.half_close()
                await peer.rest()
            case "is broken":
                peer.send(dice.choice(BROKEN))
                await peer.rest()
            case "is too long":
                peer.send(b"GET / HTTP/1.1\r\nHost: p\r\nX: ", b"x" * 40_000)
                await peer.rest()
            case "is silent":
                await asyncio.sleep(dice.random() * 5)
            case "does not read":
                peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
                peer.send(self.request(number, flood=True), body)
                # Either the client leaves first, or the proxy cuts it after 3 s.
                await asyncio.sleep(dice.random() * 6)
                peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
                await peer.read(1)
            case "is refused":
                peer.send(self.request(number, prefix="/refusing"), body)
                response = await peer.message()
                assert response.status == 502, response.start_line
            case "asks for usage":
                peer.send(self.request(number, prefix="/asking"), body)
                response = await peer.message()
                if response.status == 200:
                    assert response.complete <= answer_to(self.seed, number, False).whole, (
                        "the response looks complete, but the upstream cut it"
                    )

    async def _receive(self, peer: Peer, number: int) -> bool:
        """Reads a response, and checks it if it is complete. Returns whether another request may follow."""
        answer = answer_to(self.seed, number, False)
        response = await peer.message()
        if response.status == 200 and response.complete:
            assert answer.whole, f"the response looks complete, but the upstream did: {answer.way}"
            assert response.body == answer.shape.body, f"{answer.shape.name} was changed by the proxy"
            self.done["received whole"] += 1
        return response.complete and response.get("connection") != "close"


@dataclass(frozen=True)
class Sample:
    at: float
    memory: int
    blocks: int
    in_use: int
    descriptors: int
    threads: int


async def sample(pids: list[int], probes: Path) -> Sample:
    """Measures all processes together. Memory is what they have allocated and used, in bytes."""
    memory = blocks = in_use = descriptors = threads = 0
    for pid in pids:
        process, probe = Path(f"/proc/{pid}"), probes / str(pid)
        (kib,) = re.findall(r"^Anonymous:\s+(\d+) kB", (process / "smaps_rollup").read_text(), re.M)
        memory += int(kib) * 1024
        descriptors += len(os.listdir(process / "fd"))
        threads += len(os.listdir(process / "task"))
        probe.unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR1)
        async with asyncio.timeout(DEADLINE):
            while not probe.exists():  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.01)
        told = probe.read_text().split()
        blocks, in_use = blocks + int(told[0]), in_use + int(told[1])
    return Sample(perf_counter(), memory, blocks, in_use, descriptors, threads)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def come_and_go(soak: Soak, rate: float, end: float, clients: set[asyncio.Task[None]]) -> None:
    """Starts `rate` clients a second until `end`, at random moments."""
    dice, number = random.Random(soak.seed), 0
    loop = asyncio.get_running_loop()
    due = perf_counter()
    while due < end and len(soak.wrong) < ENOUGH:
        due += dice.expovariate(rate)
        await asyncio.sleep(max(0.0, due - perf_counter()))
        # A client sends fewer than ten requests, and each has a number of its own.
        number += 10
        task = loop.create_task(soak.client(number))
        clients.add(task)
        task.add_done_callback(clients.discard)


async def watch(served: Served, pids: list[int], probes: Path, samples: list[Sample]) -> None:
    begun = then = perf_counter()
    before = 0.0
    while True:
        await asyncio.sleep(max(0.0, then + SAMPLE - perf_counter()))
        now = await sample(pids, probes)
        samples.append(now)
        exchanges, active = await served.sample(r"requests_total\{.*"), await served.sample(r"requests_active\{.*")
        say(
            f"{now.at - begun:6.0f} s  {exchanges:9.0f} requests ({(exchanges - before) / (now.at - then):5.1f}/s)"
            f"  {active:4.0f} active  {now.memory / MIB:6.1f} MiB, {now.in_use / MIB:5.1f} MiB in use in malloc"
            f"  {now.blocks:,} blocks  {now.descriptors} descriptors"
        )
        then, before = now.at, exchanges


async def settled(served: Served, pids: list[int], probes: Path, before: Sample) -> list[str]:
    """Waits until everything is closed. Returns what is still open after that, one line each."""
    gauges = r"(requests_active|streams_active|upstream_connections)\{.*"
    deadline = perf_counter() + SETTLING
    while True:
        now, left = await sample(pids, probes), await served.sample(gauges)
        if (not left and now.descriptors <= before.descriptors) or perf_counter() > deadline:
            break
        await asyncio.sleep(1)
    found = [
        f"{name} is {value:g}" for name, value in (await served.samples()).items() if value and re.match(gauges, name)
    ]
    if now.descriptors > before.descriptors:
        found.append(f"{now.descriptors} descriptors, {before.descriptors} before")
    return found


def rise(samples: list[Sample], what: Callable[[Sample], int]) -> float:
    """By how much a line fitted to `what` rises over the samples."""
    slope, _ = linear_regression([one.at for one in samples], [what(one) for one in samples])
    return slope * (samples[-1].at - samples[0].at)


async def run(seconds: float, rate: float, seed: int) -> bool:
    """One run. Returns whether nothing was wrong."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert seconds >= 6 * SAMPLE, "too short to see a rise"
    soak = Soak(seed)
    samples: list[Sample] = []
    clients: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory() as directory, socket.socket() as refusing:
        # Bound and not listening: connections are refused.
        refusing.bind(("127.0.0.1", 0))
        server = await asyncio.start_server(soak.upstream, "127.0.0.1", 0, backlog=1024)
        probes = Path(directory)
        file = probes / "sseproxy.yaml"
        port = server.sockets[0].getsockname()[1]
        file.write_text(CONFIG.format(port=port, refusing=refusing.getsockname()[1]))
        async with serve("-c", str(file), PYTHONPATH=str(HERE / "probe"), PROBE=directory) as served:
            soak.port = served.port
            workers = served.workers
            pids = [served.pid, *workers]
            await served.get("/metrics")
            before = await sample(pids, probes)
            say(f"seed {seed}, {rate:g} clients/s for {seconds:g} s; {before.memory / MIB:.1f} MiB at first")
            watching = loop.create_task(watch(served, pids, probes, samples))
            await come_and_go(soak, rate, perf_counter() + seconds, clients)
            watching.cancel()
            if clients:
                _, late = await asyncio.wait(clients, timeout=SETTLING)
                soak.wrong += [f"{len(late)} clients are still waiting"] if late else []
            soak.wrong += await settled(served, pids, probes, before)
            outcomes: Counter[str] = Counter()
            for name, value in (await served.samples()).items():
                if outcome := re.match(r"requests_total\{.*outcome=\"(\w+)\"", name):
                    outcomes[outcome[1]] += int(value)
            if outcomes["proxy_error"]:
                soak.wrong.append(f"{outcomes['proxy_error']} requests ended as proxy_error")
            recorded = int(await served.sample(r"request_duration_seconds_count\{.*"))
            if recorded != outcomes.total():
                soak.wrong.append(f"{outcomes.total()} requests, but {recorded} durations")
            if served.workers != workers or await served.sample("worker_restarts_total"):
                soak.wrong.append("a worker was replaced")
            last = await sample(pids, probes)
            served.process.send_signal(signal.SIGTERM)
            if status := await served.ended():
                soak.wrong.append(f"the proxy ended with {status}")
        server.close()
    # Standard output is a pipe, so log lines are JSON. A line that is not JSON is a crash.
    soak.wrong += [f"the proxy logged: {line}" for line in served.stderr.splitlines() if '"level":"info"' not in line]
    fitted = samples[len(samples) // 3 :]
    # libuv starts its threads when they are first needed, so the first third of the run does not count.
    if last.threads > fitted[0].threads:
        soak.wrong.append(f"{last.threads} threads, {fitted[0].threads} after the warm-up")
    say(f"outcomes: {', '.join(f'{name} {count}' for name, count in sorted(outcomes.items()))}")
    say(f"clients: {', '.join(f'{name} {count}' for name, count in sorted(soak.done.items()))}")
    blocks, in_use = rise(fitted, lambda one: one.blocks), rise(fitted, lambda one: one.in_use)
    memory = rise(fitted, lambda one: one.memory)
    say(
        f"in the last {fitted[-1].at - fitted[0].at:.0f} s: {blocks:+,.0f} blocks (at most {MAX_BLOCKS:,}), "
        f"{in_use / MIB:+.1f} MiB in use (at most {MAX_IN_USE / MIB:g}), "
        f"{memory / MIB:+.1f} MiB of memory (at most {MAX_MEMORY / MIB:g})"
    )
    if blocks > MAX_BLOCKS or in_use > MAX_IN_USE or memory > MAX_MEMORY:
        soak.wrong.append("memory has grown")
    for kind in CLIENTS:
        if not soak.done[kind]:
            soak.wrong.append(f"no client of the kind '{kind}': the run was too short")
    for line in soak.wrong[:ENOUGH]:
        say(f"wrong: {line}")
    say("failed" if soak.wrong else "all well")
    return not soak.wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rate", type=float, default=40.0, help="clients per second")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    return 0 if uvloop.run(run(options.seconds, options.rate, options.seed)) else 1


if __name__ == "__main__":
    sys.exit(main())
