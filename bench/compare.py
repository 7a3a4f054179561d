"""Compares sseproxy with other proxies, on the same work in one run: `make bench`.

Every proxy has one worker or thread on one core. This process is the backend and the clients, on another core. It
prints for each proxy the median of its rounds, the minimum and maximum, and the ratio to nginx. bench/README.md
describes the method and why it is fair.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvloop

from .load import Backend, answering
from .measures import ALONE, LOADS, TURN, WORKERS, Load, generator, say
from .proxies import DIRECT, PEERS, Peer, go, stop

# uvloop raises RuntimeError for a write to a connection that the proxy has closed.
FAILURES = (OSError, TimeoutError, RuntimeError)


class Run:
    """All measures of all proxies. `found[measure][proxy]` has a figure for each round."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._cores = sorted(os.sched_getaffinity(0))
        self._upstream = 0
        self._round = 0
        self.found: dict[str, dict[str, list[float]]] = {}

    async def measure(self) -> None:
        os.sched_setaffinity(0, {self._cores[-1]})
        server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", 0, backlog=4096)
        self._upstream = server.sockets[0].getsockname()[1]
        peers = self._installed()
        for number in range(self._options.rounds):
            self._round = number + 1
            for name in self._options.measure:
                taking_part = [peer for peer in peers if name in peer.measures]
                if name in LOADS:
                    await self._by_turns(LOADS[name], taking_part)
                else:
                    for peer in taking_part:
                        await self._alone(name, peer)
        server.close()

    def _installed(self) -> list[Peer]:
        wanted = [peer for peer in [DIRECT, *PEERS] if peer.name in self._options.peers]
        for peer in wanted:
            if peer.needs is None:
                say(
                    f"{peer.name} is not installed and is left out: "
                    "apt-get install nginx-light libnginx-mod-http-lua haproxy, or pip install '.[dev]'"
                )
        return [peer for peer in wanted if peer.needs is not None]

    @asynccontextmanager
    async def _started(self, peer: Peer, workers: int = 1) -> AsyncIterator[tuple[int, subprocess.Popen[bytes]]]:
        """Starts a new process and yields its port. A new one, so that earlier measures have no effect on this one."""
        with tempfile.TemporaryDirectory() as directory:
            port = self._upstream if peer is DIRECT else _free_port()
            cores = self._cores if workers > 1 else self._cores[:1]
            process = peer.start(port, self._upstream, Path(directory), cores, workers)
            try:
                await answering(port)
                yield port, process
            finally:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    async def _by_turns(self, kind: type[Load], peers: list[Peer]) -> None:
        async with AsyncExitStack() as stack:
            loads: list[Load] = []
            busy: dict[Load, float] = {}
            for peer in peers:
                try:
                    port, process = await stack.enter_async_context(self._started(peer))
                    # A proxy that has failed may fail again when its load is closed.
                    stack.enter_context(suppress(*FAILURES))
                    load = await stack.enter_async_context(kind(peer, port, process.pid, self._options))
                except FAILURES as error:
                    self._failed(peer, error)
                    continue
                stop(process.pid)
                stack.callback(go, process.pid)
                loads.append(load)
                busy[load] = 0.0
            for _ in range(max(1, round(self._options.seconds / TURN))):
                for load in random.sample(loads, len(loads)):
                    try:
                        go(load.pid)
                        with generator() as share:
                            await load.turn()
                        stop(load.pid)
                        busy[load] = max(busy[load], share())
                    except FAILURES as error:
                        self._failed(load.peer, error)
                        loads.remove(load)
            for load in loads:
                self._record(load.peer, load.figures(), f" (generator at most {busy[load]:.0%} busy)")

    async def _alone(self, name: str, peer: Peer) -> None:
        options = argparse.Namespace(**vars(self._options), cores=self._cores, afterwards=[])
        try:
            async with self._started(peer, WORKERS.get(name, 1)) as (port, process):
                self._record(peer, await ALONE[name](port, process.pid, options))
        except FAILURES as error:
            self._failed(peer, error)
        for clean_up in options.afterwards:
            clean_up()

    def _record(self, peer: Peer, figures: dict[str, float], remark: str = "") -> None:
        for what, value in figures.items():
            self.found.setdefault(what, {}).setdefault(peer.name, []).append(value)
            say(f"round {self._round}, {peer.name}: {value:.1f} {what}{remark}")

    def _failed(self, peer: Peer, error: Exception) -> None:
        say(f"round {self._round}, {peer.name} failed: {error!r}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def report(found: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> None:
    machine = f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    sys.stdout.write(f"{machine}; {options.streams} streams, {options.rate:g} chunks/s each, {options.rounds} rounds\n")
    rows: dict[str, Any] = {}
    for what, peers in found.items():
        sys.stdout.write(f"\n{what}\n")
        first = "nginx" if "nginx" in peers else next(iter(peers))
        base = statistics.median(peers[first])
        direct = statistics.median(peers[DIRECT.name]) if DIRECT.name in peers and "us" in what.split() else None
        for name, values in peers.items():
            middle = statistics.median(values)
            row = {"median": middle, "ratio": middle / base, "rounds": values}
            line = f"  {name:<10}{middle:9.1f}  {middle / base:6.2f} x {first}"
            if direct is not None:
                row["added"] = middle - direct
                line += f"  {middle - direct:+9.1f} to {DIRECT.name}"
            sys.stdout.write(f"{line}  (from {min(values):.1f} to {max(values):.1f})\n")
            rows.setdefault(what, {})[name] = row
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "measures": rows}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [peer.name for peer in [DIRECT, *PEERS]]

    def some_of(known: list[str]) -> Any:
        def check(text: str) -> list[str]:
            unknown = set(text.split(",")) - set(known)
            if unknown:
                raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}: some of {','.join(known)}")
            return text.split(",")

        return check

    parser.add_argument("--peers", type=some_of(names), default=names, help="some of " + ",".join(names))
    measures = [*LOADS, *ALONE]
    parser.add_argument("--measure", type=some_of(measures), default=measures, help="some of " + ",".join(measures))
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--open-streams", type=int, default=2500)
    parser.add_argument("--rate", type=float, default=50.0, help="chunks per second and stream")
    parser.add_argument("--seconds", type=float, default=8.0, help="for the turns of each proxy in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


async def main() -> None:
    options = arguments()
    run = Run(options)
    await run.measure()
    report(run.found, options)


if __name__ == "__main__":
    uvloop.run(main())
