"""sseproxy next to its peers, on the same work in one run: `make bench`.

Every proxy has one worker or thread, and one core; this process, which is backend and clients in one so that both read
the same clock, has another. Rounds are interleaved. What is printed is the median of each proxy's rounds, with the
least and the most, and as a ratio to nginx. How, and why that is fair: bench/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from time import clock_gettime, perf_counter
from typing import Any, ClassVar

import uvloop

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
_CPUCLOCK_SCHED = 2
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


# As many requests a second for all, because a proxy that is waited for is woken up for less of them.
SHORT_RATE, SHORT_CONNECTIONS = 1000, 50
# Texts of the lengths that tokens have.
CHUNKS = [framed(EVENT % text) for text in (b"a", b"of", b"the", b"token", b"streams", b"answering")]
END = framed(USAGE) + b"0\r\n\r\n"


class Backend(asyncio.Protocol):
    """Begins a stream for each request that wants one, with `first`; `streams` are those under way."""

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
            # In pieces, and a gateway sends a request of its own.
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
    """Reads a stream. `received` counts the chunks of all streams."""

    received = 0
    finished = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(STREAM)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        StreamClient.received += data.count(b'"content"')
        StreamClient.finished += data.endswith(b"0\r\n\r\n")


class TimedClient(StreamClient):
    """Also takes the time of chunks that say when they were sent."""

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
    """Takes chunks that say which stream they are of, and has the backend send the next one of it."""

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
    """Takes the answers to requests on one connection. `answered` counts those of all."""

    answered = 0

    def data_received(self, data: bytes) -> None:
        ShortClient.answered += data.count(b"HTTP/1.1 200 ")


class Peer:
    """A proxy that can be started on a port in front of an upstream. `needs` is what it cannot do without.

    What cannot take the usual load gets a `share` of it, and only the measures in `only`. `more` are measures that only
    some proxies can be part of.
    """

    def __init__(
        self,
        name: str,
        needs: Path | str,
        *command: str,
        files: tuple[str, ...] = (),
        share: float = 1.0,
        only: tuple[str, ...] = (),
        more: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.share = share
        self.measures = only or (*EVERYWHERE, *more)
        self.needs = shutil.which(needs) if isinstance(needs, str) else (str(needs) if needs.exists() else None)
        self._command = command
        self._files = files

    def start(
        self, port: int, upstream: int, directory: Path, cores: Iterable[int], workers: int
    ) -> subprocess.Popen[bytes]:
        values = {
            "PORT": port,
            "UPSTREAM": upstream,
            "DIRECTORY": directory,
            "HERE": HERE / "peers",
            "WORKERS": workers,
        }
        for name in self._files:
            template = string.Template((HERE / "peers" / name).read_text())
            (directory / name).write_text(template.safe_substitute(values))
        command = [string.Template(word).safe_substitute(values) for word in self._command]
        return subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


# The measures that all can be part of.
EVERYWHERE = ("cpu_per_chunk", "cpu_per_request", "latency", "first_token", "capacity", "release", "memory")
GO = ("env", "GOMAXPROCS=1")
PEERS = [
    Peer(
        "nginx",
        "nginx",
        *("nginx", "-c", "$DIRECTORY/nginx.conf", "-p", "$DIRECTORY"),
        files=("nginx.conf",),
        more=("workers",),
    ),
    Peer(
        "nginx+lua",
        Path("/usr/lib/nginx/modules/ngx_http_lua_module.so"),
        *("nginx", "-c", "$DIRECTORY/nginx_lua.conf", "-p", "$DIRECTORY"),
        files=("nginx_lua.conf",),
    ),
    Peer("haproxy", "haproxy", "haproxy", "-db", "-f", "$DIRECTORY/haproxy.cfg", files=("haproxy.cfg",)),
    Peer(
        "envoy",
        BIN / "envoy",
        *(
            str(BIN / "envoy"),
            "-c",
            "$DIRECTORY/envoy.yaml",
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "-l",
            "off",
        ),
        files=("envoy.yaml",),
    ),
    Peer(
        "caddy",
        BIN / "caddy",
        *(*GO, str(BIN / "caddy"), "run", "--adapter", "caddyfile", "--config", "$DIRECTORY/Caddyfile"),
        files=("Caddyfile",),
    ),
    Peer(
        "traefik",
        BIN / "traefik",
        *(*GO, str(BIN / "traefik"), "--configFile=$DIRECTORY/traefik.yaml"),
        files=("traefik.yaml", "traefik-routes.yaml"),
    ),
    Peer("aiohttp", sys.executable, sys.executable, "$HERE/plain_relay.py", "$PORT", "$UPSTREAM"),
    Peer(
        "sseproxy",
        sys.executable,
        *(sys.executable, "-m", "sseproxy", "serve", "-c", "$DIRECTORY/sseproxy.yaml"),
        files=("sseproxy.yaml",),
        more=("workers",),
    ),
    Peer(
        "litellm",
        HERE / ".venv/bin/litellm",
        *(str(HERE / ".venv/bin/litellm"), "--config", "$DIRECTORY/litellm.yaml", "--host", "127.0.0.1"),
        *("--port", "$PORT", "--num_workers", "1"),
        files=("litellm.yaml",),
        share=0.05,
        only=("cpu_per_chunk",),
    ),
]
# No proxy: what backend, clients and the kernel take themselves.
DIRECT = Peer("direct", "true", "sleep", "infinity", only=("latency", "first_token", "capacity"))


def tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from tree(int(child))


def cpu(pid: int) -> float:
    """Seconds of user and system time so far of `pid` and its descendants, all threads of them.

    By the scheduler's clock of a process (clock_getcpuclockid(3)), because what `stat` tells is counted in ticks.
    """
    return sum(clock_gettime((~each << 3) | _CPUCLOCK_SCHED) for each in tree(pid))


def memory(pid: int) -> float:
    """Bytes of anonymous memory of `pid` and its descendants."""
    kilobytes = 0
    for each in tree(pid):
        rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
        kilobytes += int(rollup.partition("Anonymous:")[2].split()[0])
    return kilobytes * 1024.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def answering(port: int) -> None:
    """Waits until a stream through the proxy begins."""
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
    """So many streams through the proxy on `port`, as a context."""

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
        StreamClient.received = StreamClient.finished = 0
        return self

    async def pace(self, rate: float, seconds: float, chunk: Callable[[int], bytes]) -> int:
        """Sends `rate` chunks a second on every stream; returns how many in all."""
        start, sent = perf_counter(), 0
        while sent < self._number * rate * seconds:
            due = int((perf_counter() - start) * self._number * rate)
            for _ in range(due - sent):
                self.order[sent % self._number].write(chunk(sent))
                sent += 1
            await asyncio.sleep(0.001)
        await until(lambda: StreamClient.received == sent)
        return sent

    async def __aexit__(self, *_: object) -> None:
        for backend in self.order:
            backend.write(END)
        await until(lambda: StreamClient.finished == self._number)
        for transport in self._transports:
            transport.close()  # type: ignore[attr-defined]
        Backend.streams.clear()


# Of a core, for each of two workers: what is left of two cores is the generator's.
SHARE = 0.4
RELEASE = "us from client's close to upstream's, p50"
CAPACITY = "streams at 50 chunks/s with p99 below 10 ms"
Measure = Callable[[int, int, argparse.Namespace], Awaitable[dict[str, float]]]


async def cpu_per_chunk(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    async with Streams(port, options.streams) as streams:
        before = cpu(pid)
        sent = await streams.pace(options.rate, options.seconds, lambda n: CHUNKS[n % len(CHUNKS)])
        return {"us of CPU per chunk": (cpu(pid) - before) / sent * 1e6}


async def cpu_per_request(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    transports = [(await loop.create_connection(ShortClient, "127.0.0.1", port))[0] for _ in range(SHORT_CONNECTIONS)]

    async def requests(number: int) -> None:
        ShortClient.answered, start, sent = 0, perf_counter(), 0
        while sent < number:
            due = min(number, int((perf_counter() - start) * SHORT_RATE))
            for _ in range(due - sent):
                transports[sent % len(transports)].write(SHORT)
                sent += 1
            await asyncio.sleep(0.001)
        await until(lambda: ShortClient.answered == number)

    # Until the connections to the backend are there.
    await requests(10 * SHORT_CONNECTIONS)
    before, number = cpu(pid), int(SHORT_RATE * options.seconds)
    await requests(number)
    spent = cpu(pid) - before
    for transport in transports:
        transport.close()
    return {"us of CPU per short request": spent / number * 1e6}


def _stamped(number: int) -> bytes:
    """One chunk in ten says when it was sent."""
    return framed(EVENT % (b"@%.7f" % perf_counter() if number % 10 == 0 else b"token"))


async def latency(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    TimedClient.delays.clear()
    async with Streams(port, options.streams, TimedClient) as streams:
        await streams.pace(options.rate, options.seconds, _stamped)
    cuts = statistics.quantiles(TimedClient.delays, n=1000)
    return {f"us to pass, {name}": cuts[index] * 1e6 for name, index in (("p50", 499), ("p99", 989), ("p99.9", 998))}


async def first_token(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    times = []
    Backend.first = CHUNKS[0]
    try:
        for _ in range(300):
            Backend.streams.clear()
            StreamClient.received = 0
            asked_at = perf_counter()
            transport, _ = await loop.create_connection(StreamClient, "127.0.0.1", port)
            async with asyncio.timeout(10):
                while not StreamClient.received:  # noqa: ASYNC110 - an event would be later by a turn of the loop
                    await asyncio.sleep(0)
            times.append(perf_counter() - asked_at)
            for backend in Backend.streams:
                backend.write(END)
            transport.close()
    finally:
        Backend.first = b""
    return {"us to the first token, p50": statistics.median(times) * 1e6}


async def capacity(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    """In steps of a fifth, until chunks are late, or until the generator is all that is measured."""
    best, number = 0, options.streams
    while True:
        TimedClient.delays.clear()
        busy, started = sum(os.times()[:2]), perf_counter()
        async with Streams(port, number, TimedClient) as streams:
            await streams.pace(options.rate, 2.5, _stamped)
        share = (sum(os.times()[:2]) - busy) / (perf_counter() - started)
        late = statistics.quantiles(TimedClient.delays, n=100)[98]
        say(f"  {number} streams: p99 {late * 1e3:.1f} ms (generator {share:.0%} busy)")
        if late >= 0.01:
            return {CAPACITY: best}
        best, number = number, number * 6 // 5


async def release(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    times = []
    for _ in range(50):
        Backend.streams.clear()
        transport, _ = await loop.create_connection(StreamClient, "127.0.0.1", port)
        await until(lambda: len(Backend.streams) == 1)
        (backend,) = Backend.streams
        StreamClient.received = 0
        backend.write(CHUNKS[0])
        await until(lambda: StreamClient.received == 1)
        left_at = perf_counter()
        transport.abort()
        try:
            async with asyncio.timeout(2):
                while Backend.streams:  # noqa: ASYNC110 - an event would be later by a turn of the loop
                    await asyncio.sleep(0)
            times.append(Backend.lost_at - left_at)
        except TimeoutError:
            # It does not let go at all.
            backend.abort()
            return {RELEASE: 2e6}
    return {RELEASE: statistics.median(times) * 1e6}


async def memory_per_stream(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    before = memory(pid)
    async with Streams(port, options.open_streams) as streams:
        for number, backend in enumerate(streams.order):
            backend.write(CHUNKS[number % len(CHUNKS)])
        await until(lambda: StreamClient.received == options.open_streams)
        return {"KiB per open stream": (memory(pid) - before) / options.open_streams / 1024}


class Quota:
    """A control group in which a process has `SHARE` of a core. Raises OSError where there is none to be had."""

    def __init__(self, pid: int) -> None:
        root = Path("/sys/fs/cgroup")
        unified = (root / "cgroup.controllers").exists()
        self._group = (root if unified else root / "cpu") / f"bench-{pid}"
        self._group.mkdir()
        period = 10_000
        quota = int(SHARE * period)
        if unified:
            (self._group / "cpu.max").write_text(f"{quota} {period}")
        else:
            (self._group / "cpu.cfs_period_us").write_text(str(period))
            (self._group / "cpu.cfs_quota_us").write_text(str(quota))
        (self._group / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Once the process has ended."""
        self._group.rmdir()


async def _throughput(port: int, options: argparse.Namespace) -> float:
    """Chunks a second, each sent when the one before it has arrived."""
    async with Streams(port, options.streams, EagerClient) as streams:
        EagerClient.order = streams.order
        for stream in range(options.streams):
            EagerClient.send(stream)
        await asyncio.sleep(1)
        received, started = StreamClient.received, perf_counter()
        await asyncio.sleep(options.seconds)
        rate = (StreamClient.received - received) / (perf_counter() - started)
        EagerClient.order = []
        return rate


async def workers(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    """Two next to one and something else that takes as much CPU: who is alone is woken up more expensively."""
    _, *processes = tree(pid)
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
    here = os.sched_getaffinity(0)
    quotas: list[Quota] = []
    try:
        os.sched_setaffinity(0, options.cores)
        quotas += map(Quota, [*processes, other.pid])
        # One that stands still accepts nothing.
        os.kill(processes[1], signal.SIGSTOP)
        one = await _throughput(port, options)
        other.kill()
        await other.wait()
        os.kill(processes[1], signal.SIGCONT)
        two = await _throughput(port, options)
    finally:
        if other.returncode is None:
            other.kill()
            await other.wait()
        os.sched_setaffinity(0, here)
        options.afterwards += [quota.remove for quota in quotas]
    return {"chunks/s of one worker": one, "chunks/s of two workers": two, "two workers, times one": two / one}


MEASURES: dict[str, Measure] = {
    "cpu_per_chunk": cpu_per_chunk,
    "cpu_per_request": cpu_per_request,
    "latency": latency,
    "first_token": first_token,
    "capacity": capacity,
    "release": release,
    "memory": memory_per_stream,
    "workers": workers,
}
# How many workers a proxy has for a measure, if not one.
WORKERS = {"workers": 2}


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


async def run(options: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", 0, backlog=4096)
    upstream = server.sockets[0].getsockname()[1]
    found: dict[str, dict[str, list[float]]] = {}
    wanted = [peer for peer in [DIRECT, *PEERS] if not options.peers or peer.name in options.peers.split(",")]
    for missing in [peer for peer in wanted if peer.needs is None]:
        say(
            f"{missing.name} is left out: apt-get install nginx-light libnginx-mod-http-lua haproxy, "
            "or pip install '.[dev]'"
        )
        wanted.remove(missing)
    names = options.measure.split(",") if options.measure else list(MEASURES)
    for number in range(options.rounds):
        for name in names:
            for peer in wanted:
                if name in peer.measures:
                    await _measure(name, peer, upstream, cores, options, f"round {number + 1}, {peer.name}", found)
    server.close()
    _report(found, options)


async def _measure(
    name: str,
    peer: Peer,
    upstream: int,
    cores: Sequence[int],
    options: argparse.Namespace,
    who: str,
    found: dict[str, dict[str, list[float]]],
) -> None:
    """One measure of a proxy that is new: what it did for another is not to be seen in it."""
    load = argparse.Namespace(
        **vars(options) | {"streams": max(1, int(options.streams * peer.share)), "cores": cores, "afterwards": []}
    )
    number = WORKERS.get(name, 1)
    with tempfile.TemporaryDirectory() as directory:
        port = upstream if peer is DIRECT else _free_port()
        process = peer.start(port, upstream, Path(directory), cores if number > 1 else cores[:1], number)
        try:
            await answering(port)
            busy, started = sum(os.times()[:2]), perf_counter()
            for what, value in (await MEASURES[name](port, process.pid, load)).items():
                found.setdefault(what, {}).setdefault(peer.name, []).append(value)
                share = (sum(os.times()[:2]) - busy) / (perf_counter() - started)
                say(f"{who}: {value:.1f} {what} (generator {share:.0%} busy)")
        except (OSError, TimeoutError, RuntimeError) as error:
            # RuntimeError: it has closed a connection that uvloop is to write to.
            say(f"{who}: {name} failed ({error!r})")
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for clean_up in load.afterwards:
                clean_up()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def _report(found: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> None:
    machine = f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    sys.stdout.write(f"{machine}; {options.streams} streams, {options.rate:g} chunks/s each, {options.rounds} rounds\n")
    rows: dict[str, Any] = {}
    for what, peers in found.items():
        sys.stdout.write(f"\n{what}\n")
        first = "nginx" if "nginx" in peers else next(iter(peers))
        base = statistics.median(peers[first])
        for name, values in peers.items():
            middle = statistics.median(values)
            rows.setdefault(what, {})[name] = {"median": middle, "ratio": middle / base, "rounds": values}
            spread = f"from {min(values):.1f} to {max(values):.1f}"
            sys.stdout.write(f"  {name:<10}{middle:9.1f}  {middle / base:6.2f} x {first}  ({spread})\n")
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "measures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", help="some of " + ",".join(peer.name for peer in PEERS))
    parser.add_argument("--measure", help="some of " + ",".join(MEASURES))
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--open-streams", type=int, default=2500)
    parser.add_argument("--rate", type=float, default=50.0, help="chunks per second and stream")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    uvloop.run(run(parser.parse_args()))
