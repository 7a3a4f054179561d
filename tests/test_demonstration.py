"""`make demo`, or what it runs: what a newcomer sees first."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from sseproxy.demo import TEXT, Pace
from sseproxy.demonstration import _Client, _rhythm
from sseproxy.errors import SseproxyError

from .harness import DEADLINE
from .served import alive, end, run, until_true, workers_of

# Slow enough that a client can leave in mid-stream on a machine that is busy.
FAST = ("--ttft", "0.05", "--rate", "100")
ANYWHERE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")


class Demo:
    """A running `sseproxy demo`, whose output is read as it comes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""

    async def read_until(self, text: str) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            while text not in self.output:
                part = await self.process.stdout.read(4096)
                assert part, self.output
                self.output += part.decode()

    async def rest(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            self.output += (await self.process.stdout.read()).decode()
            await self.process.wait()
        return self.output


Start = Callable[..., Awaitable[Demo]]


@pytest.fixture
async def demo() -> AsyncIterator[Start]:
    """`await demo(*arguments)`: a demonstration, which is ended with the test if it has not."""
    started: list[asyncio.subprocess.Process] = []

    async def begin(*arguments: str, stdout: int = asyncio.subprocess.PIPE, **environment: str) -> Demo:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sseproxy", "demo", *arguments),
            # As a shell does it, so that a signal can be sent as a terminal sends it.
            start_new_session=True,
            # What is seen at once has to be seen at once by everybody.
            env={name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "NO_COLOR")}
            | environment,
            stdout=stdout,
            stderr=asyncio.subprocess.STDOUT,
        )
        started.append(process)
        return Demo(process)

    yield begin
    for process in started:
        await end(process)


def in_one_line(output: str) -> str:
    """Without line breaks and indents, which are those of the terminal's width."""
    return " ".join(output.split())


async def test_an_answer_is_whole_and_the_client_and_the_backend_leave(demo: Start) -> None:
    running = await demo("--once", *FAST, *ANYWHERE)
    await running.read_until("1. ")
    workers = workers_of(running.process.pid)
    assert len(workers) == 1
    async with asyncio.timeout(DEADLINE):
        assert await running.process.wait() == 0
    assert not alive(workers[0])
    output = in_one_line(await running.rest())
    whole, left, died, figures = re.split(r"[234]\. ", output[output.index("1. ") :])
    assert TEXT in whole
    ((first, gap),) = re.findall(
        r"The client measured: first token ([\d.]+) s, median gap ([\d.]+) ms, 60 tokens\.", whole
    )
    assert 0.05 <= float(first) < 2
    assert float(gap) < 1000

    start = " ".join(TEXT.split()[:12])
    assert f"{start} [the client closes its connection]" in left
    (cancelled,) = re.findall(
        r"The client left after 12 of 60 tokens\. ([\d.]+) ms later the request to the backend was cancelled", left
    )
    assert 0 < float(cancelled) < 1000

    assert start in died
    assert "[the backend's connection breaks] The backend died after 12 of 60 tokens." in died
    (event,) = re.findall(r"event: error data: (\{.*\})", died)
    assert json.loads(event)["error"]["code"] == "upstream_disconnected"
    assert "Then it closed the connection without the last chunk of the body." in died

    (first,) = re.findall(r"first token after ([\d.]+) s mean of 3 answers", figures)
    assert 0.05 <= float(first) < 2
    assert "output tokens 60 as the backend counted them" in figures
    assert re.search(r"delay in the proxy [\d.]+ ms mean of \d+ chunks", figures)
    assert "requests: 1 completed, 1 client_gone_mid_stream, 1 truncated" in figures
    assert "\x1b" not in running.output
    assert "Traceback" not in running.output


def test_the_usual_answer_ends_where_a_sentence_does() -> None:
    assert len(TEXT.split()) == Pace().tokens
    assert TEXT.endswith(".")


async def test_an_answer_that_is_too_fast_to_leave_is_said_to_be(demo: Start) -> None:
    running = await demo("--once", "--ttft", "0", "--rate", "1e9", "--tokens", "1", *ANYWHERE)
    output = in_one_line(await running.rest())
    assert running.process.returncode == 0
    assert "The answer ended before the client left." in output
    assert "The answer ended before the backend died." in output
    assert "requests: 3 completed" in output
    assert re.search(r"first token [\d.]+ s, 1 token\.", output)


def test_one_late_token_does_not_change_the_gap_that_is_shown() -> None:
    assert _rhythm([0.51, 0.54, 0.57, 2.57, 2.6]) == "first token 0.51 s, median gap 30 ms, 5 tokens"


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
async def test_there_is_colour_on_a_terminal(demo: Start, environment: dict[str, str], coloured: bool) -> None:
    terminal, other_end = pty.openpty()
    try:
        running = await demo("--once", *FAST, *ANYWHERE, stdout=other_end, **{"TERM": "xterm"} | environment)
        os.close(other_end)
        output = await asyncio.to_thread(read_terminal, terminal)
    finally:
        os.close(terminal)
    async with asyncio.timeout(DEADLINE):
        assert await running.process.wait() == 0
    assert "requests:" in output
    assert ("\x1b[" in output) is coloured


def read_terminal(terminal: int) -> str:
    """What is written to a terminal until all its writers have closed it, which it tells by an error."""
    output = b""
    with suppress(OSError):
        while part := os.read(terminal, 4096):
            output += part
    return output.decode()


async def test_a_reader_that_has_seen_enough_is_no_error(demo: Start) -> None:
    command = (
        f"{sys.executable} -m sseproxy demo --once {' '.join((*FAST, *ANYWHERE))} | head -n 1; exit ${{PIPESTATUS[0]}}"
    )
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, errors = await asyncio.wait_for(process.communicate(), DEADLINE)
    finally:
        await end(process)
    assert (process.returncode, len(out.splitlines()), errors) == (0, 1, b"")


async def test_tokens_are_shown_as_they_arrive(demo: Start) -> None:
    running = await demo("--ttft", "0", "--rate", "0.01", *ANYWHERE)
    await running.read_until("token by token\n\n   A")
    assert running.output.endswith("A")
    workers = workers_of(running.process.pid)
    os.killpg(running.process.pid, signal.SIGINT)
    await running.rest()
    await until_true(lambda: not any(map(alive, workers)))
    assert "Traceback" not in running.output


async def test_taken_ports_are_said_and_replaced(demo: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [taken.getsockname()[1] for taken in (one, other)]
        arguments = ("--listen", f"127.0.0.1:{ports[0]}", "--admin", f"127.0.0.1:{ports[1]}")
        running = await demo("--once", *FAST, *arguments)
        output = await running.rest()
    assert running.process.returncode == 0
    assert f"listen: cannot listen on 127.0.0.1:{ports[0]}: address already in use; using another port." in output
    assert f"admin.listen: cannot listen on 127.0.0.1:{ports[1]}: address already in use; using another port." in output
    assert TEXT in in_one_line(output)


async def test_the_demonstration_needs_a_port() -> None:
    status, _, errors = await run("demo", "--once", "--listen", "unix:/tmp/demo.sock", "--admin", "127.0.0.1:0")
    assert (status, errors) == (1, "sseproxy: --listen: the demonstration needs HOST:PORT\n")


async def test_an_ipv6_address_does_as_well(demo: Start) -> None:
    running = await demo("--once", *FAST, "--listen", "[::1]:0", "--admin", "[::1]:0")
    output = await running.rest()
    assert running.process.returncode == 0
    assert "client -> sseproxy on [::1]:" in output
    assert "requests: 1 completed, 1 client_gone_mid_stream, 1 truncated" in output


async def test_an_address_that_is_not_of_this_machine_is_one_line() -> None:
    status, out, errors = await run("demo", "--once", "--listen", "192.0.2.1:0", "--admin", "127.0.0.1:0")
    assert (status, out) == (1, "")
    assert errors == "sseproxy: listen: cannot listen on 192.0.2.1:0: cannot assign requested address\n"


async def test_an_answer_other_than_a_stream_is_told() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions"
    async with server, asyncio.timeout(DEADLINE):
        async with _Client.asking(url, {}) as client:
            with pytest.raises(SseproxyError, match=r"failed: HTTP.1.1 503"):
                await anext(client.events())


async def test_what_it_says_to_try_works_as_it_stands(demo: Start) -> None:
    running = await demo(*FAST, *ANYWHERE)
    await running.read_until("/metrics | grep ^sseproxy_")
    (curl,) = re.findall(r"^(curl -N .*\n.*)$", running.output, re.M)
    assert "data: [DONE]" in await shell(curl)
    (venv, script) = re.findall(r"^(python3 -m venv .*)\n\S+ - <<'EOF'\n(.*?)\nEOF$", running.output, re.M | re.S)[0]
    # It is Debian's pip that refuses to install outside of one; here the SDK is installed already.
    assert venv.endswith("/bin/pip install --quiet openai")
    assert (await shell(f"{sys.executable} - <<'EOF'\n{script}\nEOF")).strip() == TEXT
    (metrics,) = re.findall(r"^(curl -s .*/metrics \| grep .*)$", running.output, re.M)
    assert 'outcome="completed"' in await shell(metrics)
    running.process.send_signal(signal.SIGINT)
    output = await running.rest()
    assert running.process.returncode == 0
    assert "Traceback" not in output


async def shell(command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", command, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parent
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), DEADLINE)
    finally:
        await end(process)
    assert process.returncode == 0
    return out.decode()
