"""CPU per forwarded chunk of sseproxy and its peers, in one run, on the same work, as ratios to the first peer.

The proxies have one core and this process, which is backend and clients in one, has another. The CPU of a proxy is user
and system time of its whole process tree; rounds are interleaved, and the median of each proxy's rounds is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import statistics
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import ClassVar

import uvloop

HERE = Path(__file__).parent
TICKS = os.sysconf("SC_CLK_TCK")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chatcmpl-A1b2C3d4","object":"chat.completion.chunk","created":1781000000,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
BODY = b'{"model":"bench","stream":true,"messages":[]}'
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


class Backend(asyncio.Protocol):
    """Answers each request with a stream that it is part of until `streams` is told to end it."""

    streams: ClassVar[set[asyncio.Transport]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if data.endswith(BODY):
            self.transport.write(HEAD)
            self.streams.add(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.streams.discard(self.transport)


class Client(asyncio.Protocol):
    """One stream's reader. `chunks` counts for all of them."""

    chunks = 0
    finished = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(REQUEST)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        Client.chunks += data.count(b" token")
        Client.finished += data.endswith(b"0\r\n\r\n")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def sseproxy(port: int, upstream: int, directory: Path) -> list[str]:
    arguments = ["--listen", f"127.0.0.1:{port}", "--admin", "127.0.0.1:0", "--workers", "1"]
    return [sys.executable, "-m", "sseproxy", "serve", "--upstream", f"http://127.0.0.1:{upstream}", *arguments]


def plain_relay(port: int, upstream: int, directory: Path) -> list[str]:
    return [sys.executable, str(HERE / "plain_relay.py"), str(port), str(upstream)]


def nginx(port: int, upstream: int, directory: Path) -> list[str]:
    template = string.Template((HERE / "nginx.conf").read_text())
    path = directory / "nginx.conf"
    path.write_text(template.safe_substitute(PORT=port, UPSTREAM=upstream, DIRECTORY=directory))
    return ["nginx", "-c", str(path), "-p", str(directory)]


PEERS: dict[str, Callable[[int, int, Path], list[str]]] = {
    **({"nginx": nginx} if shutil.which("nginx") else {}),
    "aiohttp": plain_relay,
    "sseproxy": sseproxy,
}


def tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from tree(int(child))


def cpu(pid: int) -> float:
    """Seconds of user and system time so far of `pid` and its descendants."""
    fields = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in tree(pid)]
    return sum(int(stat[11]) + int(stat[12]) for stat in fields) / TICKS


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def listening(port: int) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return


async def measure(port: int, pid: int, streams: int, rate: float, seconds: float) -> float:
    """Microseconds of CPU per chunk."""
    loop = asyncio.get_running_loop()
    transports = [(await loop.create_connection(Client, "127.0.0.1", port))[0] for _ in range(streams)]
    await until(lambda: len(Backend.streams) == streams)
    order = list(Backend.streams)
    Client.chunks = Client.finished = 0
    before, start = cpu(pid), perf_counter()
    sent = 0
    while sent < streams * rate * seconds:
        due = int((perf_counter() - start) * streams * rate)
        for _ in range(due - sent):
            order[sent % streams].write(CHUNK)
            sent += 1
        await asyncio.sleep(0.001)
    await until(lambda: Client.chunks == sent)
    spent = cpu(pid) - before
    for backend in order:
        backend.write(END)
    Backend.streams.clear()
    await until(lambda: Client.finished == streams)
    for transport in transports:
        transport.close()
    return spent / sent * 1e6


async def run(options: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Backend, "127.0.0.1", 0, backlog=1024)
    upstream = server.sockets[0].getsockname()[1]
    os.sched_setaffinity(0, {cores[-1]})
    processes: list[subprocess.Popen[bytes]] = []
    found: dict[str, list[float]] = {name: [] for name in PEERS}
    with tempfile.TemporaryDirectory() as directory:
        try:
            ports: dict[str, int] = {}
            for name, command in PEERS.items():
                ports[name] = free_port()
                arguments = ["taskset", "-c", str(cores[0]), *command(ports[name], upstream, Path(directory))]
                processes.append(start(arguments))
                await listening(ports[name])
            for number in range(options.rounds):
                for process, name in zip(processes, PEERS, strict=True):
                    result = await measure(ports[name], process.pid, options.streams, options.rate, options.seconds)
                    found[name].append(result)
                    sys.stderr.write(f"round {number + 1}: {name} {result:.1f} us per chunk\n")
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(10)
    base = statistics.median(found[next(iter(PEERS))])
    sys.stdout.write(f"{options.streams} streams, {options.rate:g} chunks/s each, {options.rounds} rounds\n")
    for name, values in found.items():
        middle = statistics.median(values)
        sys.stdout.write(
            f"{name:<10}{middle:7.1f} us per chunk  {middle / base:5.2f} x {next(iter(PEERS))}"
            f"  (from {min(values):.1f} to {max(values):.1f})\n"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rate", type=float, default=50.0, help="chunks per second and stream")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    uvloop.run(run(parser.parse_args()))
