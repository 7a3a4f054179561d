"""`make demo`, or what it runs: what a newcomer sees first."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from sseproxy.demo import answer

from .harness import DEADLINE
from .served import alive, children, end, run, until_true

FAST = ("--ttft", "0.05", "--rate", "500", "--tokens", "20")
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

    async def begin(*arguments: str) -> Demo:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sseproxy", "demo", *arguments),
            # As a shell does it, so that a signal can be sent as a terminal sends it.
            start_new_session=True,
            # What is seen at once has to be seen at once by everybody.
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        started.append(process)
        return Demo(process)

    yield begin
    for process in started:
        await end(process)


async def test_one_answer_and_what_the_metrics_say_of_it(demo: Start) -> None:
    running = await demo("--once", *FAST, *ANYWHERE)
    await running.read_until("POST")
    workers = children(running.process.pid)
    assert len(workers) == 1
    async with asyncio.timeout(DEADLINE):
        assert await running.process.wait() == 0
    assert not alive(workers[0])
    output = await running.rest()
    assert "".join(answer(20)) in output
    assert re.search(r'sseproxy_requests_total\{code="200",outcome="completed",.*\} 1\.0', output)
    assert re.search(r'sseproxy_tokens_total\{.*type="output".*\} 20\.0', output)
    assert re.search(r"sseproxy_inter_token_latency_seconds_count\{.*\} 19\.0", output)
    (ttft,) = re.findall(r"sseproxy_time_to_first_token_seconds_sum\{.*\} ([\d.]+)", output)
    assert 0.05 <= float(ttft) < 2
    assert "Traceback" not in output


async def test_tokens_are_shown_as_they_arrive(demo: Start) -> None:
    running = await demo("--ttft", "0", "--rate", "0.01", *ANYWHERE)
    await running.read_until("\n\nA")
    assert running.output.endswith("A")
    workers = children(running.process.pid)
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
    assert "".join(answer(20)) in output


async def test_an_address_that_is_not_of_this_machine_is_one_line() -> None:
    status, out, errors = await run("demo", "--once", "--listen", "192.0.2.1:0", "--admin", "127.0.0.1:0")
    assert (status, out) == (1, "")
    assert errors == "sseproxy: listen: cannot listen on 192.0.2.1:0: cannot assign requested address\n"


async def test_what_it_says_to_try_works_as_it_stands(demo: Start) -> None:
    running = await demo(*FAST, *ANYWHERE)
    await running.read_until("/metrics | grep ^sseproxy_")
    (curl,) = re.findall(r"^  (curl -N .*\n.*)$", running.output, re.M)
    assert "data: [DONE]" in await shell(curl)
    (script,) = re.findall(r"python3 - <<'EOF'\n(.*?)\n  EOF", running.output, re.S)
    lines = "\n".join(line.removeprefix("  ") for line in script.splitlines())
    assert (await shell(f"{sys.executable} - <<'EOF'\n{lines}\nEOF")).strip() == "".join(answer(20))
    (metrics,) = re.findall(r"^  (curl -s .*/metrics \| grep .*)$", running.output, re.M)
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
