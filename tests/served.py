"""`sseproxy` as a person runs it: a process, its lines, its ports."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import ClientSession

from sseproxy.config import Admin
from sseproxy.observe.live import View
from sseproxy.process import worker
from sseproxy.process.live import Live

from .harness import DEADLINE, Peer, ScriptedUpstream


def program(name: str) -> str:
    """The path of the program `name`, of the environment or the system. Where it is missing, the test is skipped.

    In CI it fails: there every program is.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        missing = f"{name} is not installed"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


async def until_true(condition: Callable[[], bool]) -> None:
    """Polls a condition of another process, which has no event to wait on."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.02)


def nobody_looks() -> Live:
    """The live view of an admin listener without workers."""

    async def look() -> None:
        raise AssertionError

    return Live(View(), look, lambda worker, id: None, Admin)


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        # A thread may end meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, (task / "children").read_text().split())
    return found


def fork_server_of(served: Served) -> int:
    (pid,) = (child for child in children(served.pid) if name_of(child) == "sse-forkserver")
    return pid


def name_of(pid: int) -> str:
    """The name of a process, as `pgrep` finds it."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip()
    except OSError:
        return ""


def workers_of(pid: int) -> list[int]:
    """The workers of the supervisor `pid`."""
    return [child for child in children(pid) if name_of(child) == "sse-worker"]


def alive(pid: int) -> bool:
    """False for a zombie as well: it only waits for its parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Served:
    """A running `sseproxy serve`."""

    process: asyncio.subprocess.Process
    lines: list[str]
    port: int
    admin: int
    errors: bytearray
    logged: bytearray
    """What it wrote to standard output after its lines."""
    peers: list[Peer] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def workers(self) -> list[int]:
        return workers_of(self.pid)

    @property
    def messages(self) -> list[str]:
        """What it has said on standard error, line by line."""
        return [message_of(line) for line in bytes(self.errors).splitlines(keepends=True) if line.endswith(b"\n")]

    @property
    def stderr(self) -> str:
        return self.errors.decode()

    async def connect(self) -> Peer:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.port))
        self.peers.append(peer)
        return peer

    async def get(self, path: str, accept: str = "text/plain") -> tuple[int, str, str]:
        """Status, content type and body from the admin listener."""
        async with (
            ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.admin}{path}", headers={"Accept": accept}) as response,
        ):
            return response.status, response.headers["Content-Type"], await response.text()

    async def samples(self) -> dict[str, float]:
        """`/metrics`, by its lines without their values."""
        status, _, text = await self.get("/metrics")
        assert status == 200, self.stderr
        found = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name.removeprefix("sseproxy_"): float(value) for name, _, value in found}

    async def sample(self, pattern: str) -> float:
        """The sum of the samples whose whole line before the value matches `pattern`."""
        return sum(value for name, value in (await self.samples()).items() if re.fullmatch(pattern, name))

    async def until(self, pattern: str, value: float, within: float = DEADLINE) -> None:
        async with asyncio.timeout(within):
            while await self.sample(pattern) != value:  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.02)

    async def ended(self) -> int:
        async with asyncio.timeout(DEADLINE):
            return await self.process.wait()


class ConfigFile:
    """A configuration file with one worker, one route and one upstream, whatever else a test has in it."""

    def __init__(self, directory: Path, upstream: ScriptedUpstream, **more: str) -> None:
        self.path = directory / "sseproxy.yaml"
        self.write(upstream, **more)

    def write(self, upstream: ScriptedUpstream, **more: str) -> None:
        """`more` are options in YAML; `key` is for the upstream."""
        options = {
            "listen": "127.0.0.1:0",
            "admin": "{listen: '127.0.0.1:0'}",
            "workers": "1",
            "upstreams": f"[{{name: up, url: '{upstream.url}/v1', {more.pop('key', '')}}}]",
            "routes": "[{name: api, match: {path: /v1}, upstream: up}]",
        }
        self.path.write_text("".join(f"{key}: {value}\n" for key, value in (options | more).items()))

    def serve(self, **environment: str) -> AbstractAsyncContextManager[Served]:
        return serve("-c", str(self.path), **environment)


def python_runs_first(code: str, directory: Path) -> dict[str, str]:
    """The environment in which Python runs `code` before anything else, from `directory`."""
    (directory / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))}


WORKERS_RUN_FIRST = """
import os, signal, sys, time
if "serve" in sys.orig_argv:
    from sseproxy.process import worker
    main = worker.main
    def work(descriptors):
        {code}
        main(descriptors)
    worker.main = work
"""


def workers_run_first(code: str) -> str:
    """For `python_runs_first`: workers run `code`, which may use `descriptors`, or `return`, before anything else."""
    return WORKERS_RUN_FIRST.format(code=code.strip().replace("\n", "\n        "))


def message_of(line: bytes) -> str:
    """What a line on standard error says, as JSON or as text."""
    if not line.startswith(b"{"):
        return re.sub(r"^\S+ [A-Z]+ [\w.]+: ", "", line.decode().rstrip())
    message: str = json.loads(line)["message"]
    return message


@asynccontextmanager
async def serve(
    *arguments: str, program: Sequence[str] = (sys.executable, "-m", "sseproxy"), **environment: str
) -> AsyncIterator[Served]:
    """Runs `sseproxy serve ARGUMENTS` until it listens, and ends it and its workers if the test has not."""
    process = await asyncio.create_subprocess_exec(
        *(*program, "serve", *arguments),
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors, logged = bytearray(), bytearray()
    log: asyncio.Task[None] | None = None
    reader: asyncio.Task[None] | None = None
    workers: list[int] = []
    served: Served | None = None
    try:
        lines: list[str] = []
        async with asyncio.timeout(DEADLINE):
            while not lines or not lines[-1].startswith("workers:"):
                line = await process.stderr.readline()
                assert line, errors.decode()
                said = message_of(line)
                if lines or " listens on " in said:
                    lines.append(said)
                else:
                    errors += line
        reader = asyncio.get_running_loop().create_task(_collect(process.stderr, errors))
        text = "\n".join(lines)
        port, *_ = [*re.findall(r"listens on .*?https?://\S+?:(\d+)", text), "0"]
        (admin,) = re.findall(r"metrics and health: http://\S+:(\d+)/metrics", text)
        workers = children(process.pid)
        log = asyncio.get_running_loop().create_task(_collect(process.stdout, logged))
        served = Served(process, lines, int(port), int(admin), errors, logged)
        yield served
    finally:
        for peer in served.peers if served is not None else ():
            peer.writer.transport.abort()
            # With TLS, it takes some turns of the loop, and the test may be over before.
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await peer.writer.wait_closed()
        if process.returncode is None:
            workers += children(process.pid)
            process.kill()
            await process.wait()
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        # The pipes are open as long as a worker holds its end of them.
        await (log if log is not None else process.stdout.read())
        await (reader if reader is not None else process.stderr.read())


class Flaky:
    """Workers of which some work and the others end after a second. `directory` has a file for each that will work."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def may_work(self, times: int) -> None:
        """Lets so many work."""
        for file in self._directory.glob("works*"):
            file.unlink()
        for number in range(times):
            (self._directory / f"works{number}").touch()

    def hang(self) -> None:
        """Lets those that do not work hang."""
        (self._directory / "hangs").touch()

    def main(self, descriptors: Sequence[int]) -> None:
        for file in self._directory.glob("works*"):
            try:
                file.unlink()
            except FileNotFoundError:
                continue
            worker.main(descriptors)
            return
        time.sleep(1000 if (self._directory / "hangs").exists() else 1)
        os._exit(3)


async def end(process: asyncio.subprocess.Process) -> None:
    """Ends a process and its children, if they have not ended."""
    if process.returncode is not None:
        return
    family = [process.pid, *children(process.pid)]
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await process.wait()


async def run(*arguments: str, **environment: str) -> tuple[int | None, str, str]:
    """Runs `sseproxy ARGUMENTS` to its end: the exit status, what it wrote, and what it complained about."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sseproxy", *arguments),
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DEADLINE):
            out, errors = await process.communicate()
    finally:
        await end(process)
    return process.returncode, out.decode(), errors.decode()


async def _collect(stream: asyncio.StreamReader, into: bytearray) -> None:
    while part := await stream.read(65536):
        into += part


async def refused(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return True
    writer.transport.abort()
    return False


async def until_refused(port: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while not await refused(port):  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.02)
