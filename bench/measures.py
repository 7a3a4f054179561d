"""The measures.

Some differences between proxies are smaller than the changes of the machine's speed from one second to the next. For
these measures (`Load`), the proxies take turns of a second, and those without a turn are stopped. Measures that run one
proxy alone are functions.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import sys
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import ClassVar

from .load import (
    CHUNKS,
    END,
    Backend,
    EagerClient,
    Requests,
    StreamClient,
    Streams,
    TimedClient,
    timed,
    until,
)
from .proxies import DIRECT, Peer, cpu, memory, tree

# Seconds of a turn, and of the warm-up before it, which fills the processor's caches and does what was due while the
# proxy was stopped. Work that a proxy does once a second is in each turn once.
TURN, WARM_UP = 1.0, 0.1
# Connections in a turn, one after the other, and seconds after which we stop waiting for a proxy that never does it.
ONE_BY_ONE, NEVER = 30, 2.0
# The part of a core for each of two workers. The rest of two cores is for the generator.
SHARE = 0.4
CAPACITY = "streams at 50 chunks/s with p99 below 10 ms"


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


@contextmanager
def generator() -> Iterator[Callable[[], float]]:
    """Yields a function that returns, after the context, how busy this process was, from 0 to 1.

    Near 1 the generator is the bottleneck, and the figures are not those of the proxy.
    """
    spent, began, share = process_time(), perf_counter(), 0.0
    yield lambda: share
    share = (process_time() - spent) / (perf_counter() - began)


class Load(ABC):
    """A context with work for the proxy on `port` with the process `pid`. `figures` has the results of all turns."""

    def __init__(self, peer: Peer, port: int, pid: int, options: Namespace) -> None:
        self.peer, self.port, self.pid, self.options = peer, port, pid, options
        self.context = AsyncExitStack()

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.context.aclose()

    @abstractmethod
    async def turn(self) -> None:
        """One turn of work."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """The results of all turns together, by name."""


class Chunks(Load):
    """Paced streams: the CPU for a chunk, and the time a chunk takes to pass."""

    async def __aenter__(self) -> Load:
        number = max(1, int(self.options.streams * self.peer.share))
        self._streams = await self.context.enter_async_context(Streams(self.port, number, TimedClient))
        self._spent, self._sent = 0.0, 0
        self._delays: list[float] = []
        return self

    async def turn(self) -> None:
        await self._streams.pace(self.options.rate, WARM_UP, timed)
        TimedClient.delays.clear()
        before = cpu(self.pid)
        self._sent += await self._streams.pace(self.options.rate, TURN, timed)
        self._spent += cpu(self.pid) - before
        self._delays += TimedClient.delays

    def figures(self) -> dict[str, float]:
        found = {}
        if self.peer is not DIRECT:
            found["us of CPU per chunk"] = self._spent / self._sent * 1e6
        # With less load the times would not be comparable.
        if self.peer.share == 1:
            cuts = statistics.quantiles(self._delays, n=1000)
            for name, index in (("p50", 499), ("p99", 989), ("p99.9", 998)):
                found[f"us to pass, {name}"] = cuts[index] * 1e6
        return found


class ShortRequests(Load):
    """Paced short requests: the CPU for one."""

    async def __aenter__(self) -> Load:
        self._requests = await self.context.enter_async_context(Requests(self.port))
        # First the proxy opens its connections to the backend.
        await self._requests.pace(TURN)
        self._spent, self._sent = 0.0, 0
        return self

    async def turn(self) -> None:
        await self._requests.pace(WARM_UP)
        before = cpu(self.pid)
        self._sent += await self._requests.pace(TURN)
        self._spent += cpu(self.pid) - before

    def figures(self) -> dict[str, float]:
        return {"us of CPU per short request": self._spent / self._sent * 1e6}


class OneByOne(Load):
    """New connections, one after the other. The result is a median, and its name is `figure`."""

    figure: ClassVar[str]

    async def __aenter__(self) -> Load:
        self._times: list[float] = []
        return self

    @abstractmethod
    async def once(self) -> float:
        """One connection: the seconds that it took, or `NEVER`."""

    async def turn(self) -> None:
        for _ in range(ONE_BY_ONE):
            self._times.append(await self.once())
            if self._times[-1] == NEVER:
                return

    def figures(self) -> dict[str, float]:
        return {self.figure: statistics.median(self._times) * 1e6}


class FirstToken(OneByOne):
    """From the start of the client's connect to the first token."""

    figure = "us to the first token, p50"

    async def once(self) -> float:
        Backend.streams.clear()
        Backend.first, StreamClient.received = CHUNKS[0], 0
        try:
            asked_at = perf_counter()
            transport, _ = await asyncio.get_running_loop().create_connection(StreamClient, "127.0.0.1", self.port)
            async with asyncio.timeout(10):
                while not StreamClient.received:  # noqa: ASYNC110 - an event would come one turn of the loop later
                    await asyncio.sleep(0)
            took = perf_counter() - asked_at
        finally:
            Backend.first = b""
        for backend in Backend.streams:
            backend.write(END)
        transport.close()
        return took


class Release(OneByOne):
    """From a client that leaves in the middle of a stream to the end of the backend's connection."""

    figure = "us from client's close to upstream's, p50"

    async def once(self) -> float:
        Backend.streams.clear()
        transport, _ = await asyncio.get_running_loop().create_connection(StreamClient, "127.0.0.1", self.port)
        await until(lambda: len(Backend.streams) == 1)
        (backend,) = Backend.streams
        StreamClient.received = 0
        backend.write(CHUNKS[0])
        await until(lambda: StreamClient.received == 1)
        left_at = perf_counter()
        transport.abort()
        try:
            async with asyncio.timeout(NEVER):
                while Backend.streams:  # noqa: ASYNC110 - an event would come one turn of the loop later
                    await asyncio.sleep(0)
        except TimeoutError:
            backend.abort()
            return NEVER
        return Backend.lost_at - left_at


async def capacity(port: int, pid: int, options: Namespace) -> dict[str, float]:
    """The largest number of streams without late chunks, in steps of a fifth: first four at a time, then by halves."""

    def streams(step: int) -> int:
        return int(options.streams * 1.2**step)

    async def late(step: int) -> bool:
        TimedClient.delays.clear()
        async with Streams(port, streams(step), TimedClient) as load:
            with generator() as share:
                await load.pace(options.rate, 2, timed)
        slowest = statistics.quantiles(TimedClient.delays, n=100)[98]
        say(f"  {streams(step)} streams: p99 {slowest * 1e3:.1f} ms (generator {share():.0%} busy)")
        return slowest >= 0.01

    async def too_many(step: int) -> bool:
        """Late twice. Once may be a pause of the machine."""
        return await late(step) and await late(step)

    enough, most = -1, 0
    while not await too_many(most):
        enough, most = most, most + 4
    while most - enough > 1:
        middle = (enough + most) // 2
        if await too_many(middle):
            most = middle
        else:
            enough = middle
    return {CAPACITY: streams(enough) if enough >= 0 else 0}


async def memory_per_stream(port: int, pid: int, options: Namespace) -> dict[str, float]:
    before = memory(pid)
    async with Streams(port, options.open_streams) as streams:
        for number, backend in enumerate(streams.order):
            backend.write(CHUNKS[number % len(CHUNKS)])
        await until(lambda: StreamClient.received == options.open_streams)
        return {"KiB per open stream": (memory(pid) - before) / options.open_streams / 1024}


class Quota:
    """A control group that limits a process to `SHARE` of a core. Raises OSError if it cannot be made."""

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
        """Removes the group. The process must have ended."""
        self._group.rmdir()


async def _throughput(port: int, options: Namespace) -> float:
    """Chunks a second at full speed: the next chunk of a stream is sent when the last one has arrived."""
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


async def workers(port: int, pid: int, options: Namespace) -> dict[str, float]:
    """Two workers compared with one.

    While there is one, another process uses as much CPU as the second would. Otherwise the worker would often wake up
    from an idle core, which costs more.
    """
    _, *processes = tree(pid)
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
    here = os.sched_getaffinity(0)
    quotas: list[Quota] = []
    try:
        os.sched_setaffinity(0, options.cores)
        quotas += map(Quota, [*processes, other.pid])
        # A stopped worker accepts no connections, so the other one gets all streams.
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


LOADS: dict[str, type[Load]] = {
    "chunks": Chunks,
    "requests": ShortRequests,
    "first_token": FirstToken,
    "release": Release,
}
ALONE: dict[str, Callable[[int, int, Namespace], Awaitable[dict[str, float]]]] = {
    "capacity": capacity,
    "memory": memory_per_stream,
    "workers": workers,
}
# Workers of a proxy for a measure. All other measures use one.
WORKERS = {"workers": 2}
