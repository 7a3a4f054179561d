"""What is written for people: whole lines, and nobody waits for whoever reads them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from select import PIPE_BUF

import pytest
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.observe import logs
from sseproxy.observe.logs import Lines, _Json

from .harness import DEADLINE, ScriptedUpstream
from .served import ConfigFile, Served, children, end, python_runs_first, until_true, workers_of

# Writes as a worker does, from several processes at once: numbered lines of many lengths, and long ones.
WRITER = """
import sys
from sseproxy.observe.logs import STANDARD_OUTPUT, Lines
name, number = sys.argv[1], int(sys.argv[2])
lines = Lines(STANDARD_OUTPUT)
# All begin together.
sys.stderr.write("!")
sys.stderr.flush()
sys.stdin.read()
for n in range(number):
    lines.write(f"{name} {n} {name * (n * 37 % 4000)} end\\n".encode())
    if n % 7 == 0:
        lines.flush()
lines.finish()
"""


def drain(descriptor: int) -> bytes:
    """Everything until the end, read more slowly than it is written."""
    found = bytearray()
    while part := os.read(descriptor, 500):
        found += part
    return bytes(found)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        for descriptor in (reader, writer):
            try:
                os.close(descriptor)
            except OSError:
                continue


def test_a_reader_that_does_not_read_costs_lines_but_neither_time_nor_memory() -> None:
    number = 20_000
    with pipe() as (reader, writer):
        lines = Lines(writer)
        for n in range(number):
            lines.write(b"%0200d\n" % n)
            lines.flush()
        taken = bytearray()
        collecting = threading.Thread(target=lambda: taken.extend(drain(reader)))
        collecting.start()
        lines.finish()
        lines.write(b"last\n")
        lines.finish()
        os.close(writer)
        collecting.join()
    *found, last = bytes(taken).splitlines()
    assert last == b"last"
    (told,) = [line for line in found if b"dropped" in line]
    (dropped,) = re.findall(rb"(\d+) lines were dropped", told)
    assert len(found) - 1 + int(dropped) == number
    assert 1 << 19 < len(taken) < 1 << 22
    kept = [int(line) for line in found if line != told]
    assert kept == list(range(len(kept)))


def test_a_reader_that_has_gone_is_noticed_once_and_what_it_missed_is_told_to_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pipe() as (reader, writer):
        lines = Lines(writer)
        os.close(reader)
        for _ in range(3):
            lines.write(b"lost\n")
            lines.finish()
        assert [record.getMessage() for record in caplog.records] == [
            f"nothing can be written to descriptor {writer}: Broken pipe"
        ]
        with pipe() as (again, other):
            os.dup2(other, writer)
            os.close(other)
            for text in (b"one\n", b"two\n"):
                lines.write(text)
                lines.finish()
            os.close(writer)
            assert drain(again).splitlines() == [
                b"one",
                b"3 lines were dropped: nobody read them",
                b"two",
            ]


@pytest.mark.parametrize("kind", ["pipe", "socket", "file", "nonblocking"])
def test_lines_of_several_processes_are_never_mixed(kind: str, tmp_path: Path) -> None:
    number, names = 400, ("a", "b", "c")
    reader, writer = os.pipe()
    if kind == "socket":
        os.close(reader)
        os.close(writer)
        ours, theirs = socket.socketpair()
        reader, writer = ours.detach(), theirs.detach()
    elif kind == "file":
        os.close(reader)
        os.close(writer)
        writer = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
        reader = os.open(tmp_path / "log", os.O_RDONLY)
    elif kind == "nonblocking":
        os.set_blocking(writer, False)
    (waiting, begin), (started, start) = os.pipe(), os.pipe()
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, name, str(number)], stdin=waiting, stdout=writer, stderr=start)
        for name in names
    ]
    ready = b""
    while len(ready) < len(names):
        ready += os.read(started, 1)
    for descriptor in (waiting, begin, started, start, writer):
        os.close(descriptor)
    if kind == "file":
        assert [process.wait() for process in writers] == [0, 0, 0]
    found = drain(reader)
    assert [process.wait() for process in writers] == [0, 0, 0]
    os.close(reader)
    seen: dict[str, list[int]] = {name: [] for name in names}
    for line in found.decode().splitlines():
        whole = re.fullmatch(r"(\w) (\d+) (\1*)( end| \[\.\.\.\])", line)
        assert whole, line
        assert len(line) < PIPE_BUF
        seen[whole[1]].append(int(whole[2]))
    assert seen == {name: list(range(number)) for name in names}


@given(st.lists(st.binary(max_size=6000).map(lambda line: line.replace(b"\n", b"") + b"\n"), max_size=20))
def test_a_write_has_whole_lines_and_is_never_split(lines: list[bytes]) -> None:
    bounded = [line[: PIPE_BUF - 1] + b"\n" if len(line) > PIPE_BUF else line for line in lines]
    batches = list(logs._batches(bounded))
    assert b"".join(batches) == b"".join(bounded)
    assert all(len(batch) <= PIPE_BUF and batch[-1:] in (b"\n", b"") for batch in batches)


# Runs `sseproxy` with standard output and standard error that nobody reads, and with a worker that can be made to log.
NOISY = """
import logging, os, signal, sys
if "serve" in sys.orig_argv:
    def noise(*_):
        for n in range(3000):
            logging.getLogger("noise").error("%s", "x" * 200)
        sys.stderr.write("and this\\n" * 3000)
    signal.signal(signal.SIGUSR1, noise)
"""


async def test_nobody_reads_standard_error_and_everybody_is_served(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    socket_path, admin_path = tmp_path / "s", tmp_path / "admin"
    file = ConfigFile(tmp_path, upstream, listen=f"unix:{socket_path}", admin=f"{{listen: 'unix:{admin_path}'}}")
    with pipe() as (_, writer):
        # Full, before anything was written.
        os.set_blocking(writer, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writer, b"x" * PIPE_BUF)
        os.set_blocking(writer, True)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sseproxy", "serve", "-c", str(file.path)),
            env=os.environ | python_runs_first(NOISY, tmp_path),
            stdout=writer,
            stderr=writer,
        )
        os.close(writer)
        try:
            await until_true(admin_path.exists)

            async def ask(where: Path, method: str, path: str) -> int:
                async with asyncio.timeout(DEADLINE):
                    reading, writing = await asyncio.open_unix_connection(str(where))
                    writing.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                    head = await reading.readline()
                    writing.transport.abort()
                return int(head.split()[1])

            while await ask(admin_path, "GET", "/readyz") != 200:  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.02)
            (worker,) = workers_of(process.pid)
            for _ in range(3):
                os.kill(worker, signal.SIGUSR1)
                assert await ask(socket_path, "GET", "/nowhere") == 404
            file.path.write_text("nonsense: [" + "1," * 3000 + "]\n" + "".join(f"x{n}: 1\n" for n in range(500)))
            for _ in range(10):
                assert await ask(admin_path, "POST", "/-/reload") == 400
            assert await ask(admin_path, "GET", "/readyz") == 200
            assert workers_of(process.pid) == [worker]
            # The end comes, though nobody takes the last lines.
            process.terminate()
            async with asyncio.timeout(DEADLINE):
                assert await process.wait() == 0
        finally:
            await end(process)


@pytest.mark.parametrize("full", ["stdout", "stderr", "both"])
async def test_a_full_disk_keeps_nobody_from_serving(upstream: ScriptedUpstream, tmp_path: Path, full: str) -> None:
    admin_path = tmp_path / "admin"
    file = ConfigFile(tmp_path, upstream, listen=f"unix:{tmp_path / 's'}", admin=f"{{listen: 'unix:{admin_path}'}}")
    other, device = os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY), os.open("/dev/full", os.O_WRONLY)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sseproxy", "serve", "-c", str(file.path)),
        stdout=other if full == "stderr" else device,
        stderr=other if full == "stdout" else device,
    )
    os.close(other)
    os.close(device)
    try:
        await until_true(lambda: len(workers_of(process.pid)) == 1 and admin_path.exists())
        # The access log is on standard output, all else on standard error.
        await until_true((tmp_path / "s").exists)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.write(b"GET /nowhere HTTP/1.1\r\nHost: p\r\nConnection: close\r\n\r\n")
        assert b"404" in await reader.readline()
        writer.close()
        if full == "stdout":
            await until_true(
                lambda: "nothing can be written to descriptor 1: No space left" in (tmp_path / "other").read_text()
            )
        elif full == "stderr":
            await until_true(lambda: '"outcome":"rejected"' in (tmp_path / "other").read_text())
        process.terminate()
        async with asyncio.timeout(DEADLINE):
            assert await process.wait() == 0
    finally:
        await end(process)
    assert "Traceback" not in (tmp_path / "other").read_text()


async def test_processes_that_were_started_without_standard_streams_give_their_numbers_to_nobody(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    admin_path = tmp_path / "admin"
    file = ConfigFile(tmp_path, upstream, listen=f"unix:{tmp_path / 's'}", admin=f"{{listen: 'unix:{admin_path}'}}")
    command = f'exec "{sys.executable}" -m sseproxy serve -c "{file.path}" <&- >&- 2>&-'
    process = await asyncio.create_subprocess_exec("bash", "-c", command)
    try:
        await until_true(lambda: admin_path.exists() and len(workers_of(process.pid)) == 1)
        for pid in (process.pid, *children(process.pid)):
            assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)} == {"/dev/null"}
    finally:
        await end(process)


# --- what is written, and how ---


async def test_what_a_process_says_is_json_where_the_access_log_is(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with file.serve() as served:
        assert await reloaded(served) == 200
        await until_true(lambda: b"reloaded" in served.errors)
        for line in bytes(served.errors).splitlines():
            said = json.loads(line)
            assert datetime.fromisoformat(said["time"]).tzinfo is not None
            assert (said["level"], said["logger"]) == ("info", "sseproxy.process.supervisor")
        # Format and level come with a reload, and so does what is said of it.
        file.write(upstream, access_log="{format: text}")
        assert await reloaded(served) == 200
        await until_true(lambda: b" INFO sseproxy.process.supervisor: configuration reloaded: " in served.errors)
        file.write(upstream, log="{level: warning}")
        before = served.stderr
        assert await reloaded(served) == 200
        file.write(upstream, workers="none")
        assert await reloaded(served) == 400
        await until_true(lambda: '"level":"error"' in served.stderr)
        assert '"info"' not in served.stderr.removeprefix(before)


async def reloaded(served: Served) -> int:
    async with ClientSession() as session, session.post(f"http://127.0.0.1:{served.admin}/-/reload") as response:
        return response.status


@given(st.text(max_size=9000), st.booleans())
def test_a_record_is_one_short_line_of_json(text: str, failed: bool) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        info = sys.exc_info() if failed else None
    record = logging.makeLogRecord({"name": "n", "levelname": "ERROR", "msg": "%s", "args": (text,), "exc_info": info})
    line = _Json().format(record)
    assert "\n" not in line
    assert len(line.encode()) < PIPE_BUF
    said = json.loads(line)
    assert text.startswith(said["message"])
    assert ("exception" in said) == failed
