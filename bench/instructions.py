"""Counts the instructions for a short request: `python -m bench.instructions`.

With one endpoint and with three; without clients, with a client's key, and with all limits of a client. A worker runs
under callgrind (`apt-get install valgrind`), once for few requests and once for many. The difference is what the
requests took, without the start. What a worker does a few times in a second is left out, and so is the garbage
collector: a run of either may fall on any request. So, unlike times, instructions do not depend on the machine's mood.
The exit status is 1 if a bound is exceeded.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import uvloop

from sseproxy import config
from sseproxy.config.values import Rate
from sseproxy.observe import telemetry
from sseproxy.wire.credentials import digest
from tests.harness import Peer, ScriptedUpstream, settings, start_proxy

FEW, MANY = 40, 240
KEY = b"sseproxy_bench_0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"
ANSWER = b'{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
BODY = b'{"model":"m","messages":[]}'
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nAuthorization: Bearer %b\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (KEY, len(BODY), BODY)
)
LIMITS = config.ClientLimits(active_requests=100, requests=Rate(10**6, 60), tokens=Rate(10**9, 60))


class Setup(NamedTuple):
    """What is served: so many endpoints, to a client with a key and `limits` unless they are None.

    `usage`: it is asked for, as a limit of tokens needs. `beside` is what it is compared with, and `most` the bound.
    """

    name: str
    endpoints: int = 1
    limits: config.ClientLimits | None = None
    usage: bool = False
    beside: str = ""
    most: float | None = None


SETUPS: Final = {
    setup.name: setup
    for setup in (
        Setup("one endpoint"),
        Setup("three endpoints", 3, beside="one endpoint", most=1.03),
        Setup("a key", limits=config.ClientLimits(), beside="one endpoint"),
        Setup("usage asked for", usage=True),
        Setup("a key, all limits", limits=LIMITS, usage=True, beside="usage asked for"),
        Setup("a key, all limits, three endpoints", 3, LIMITS, usage=True, beside="usage asked for"),
    )
}


async def answers(api: Peer) -> None:
    while True:
        # The harness has a deadline for each read, and callgrind is slow.
        head = await api.reader.readuntil(b"\r\n\r\n")
        (size,) = re.findall(rb"content-length: (\d+)", head.lower())
        await api.reader.readexactly(int(size))
        api.send(RESPONSE)


async def worker(url: str, setup: Setup) -> None:
    """Serves until standard input is closed."""
    gc.disable()
    telemetry._SETTLE_INTERVAL = 3_600.0
    urls = tuple(config.Endpoint(url=f"{url}/{number}/v1") for number in range(setup.endpoints))
    only = config.Upstream(name="up", url=urls[0].url)
    upstream = only if setup.endpoints == 1 else config.Upstream(name="up", urls=urls)
    more: dict[str, Any] = {"route": {"usage": config.UsageOptions(request=setup.usage)}}
    if setup.limits is not None:
        keys = (f"sha256:{digest(KEY).hex()}",)
        more["clients"] = (config.Client(name="team", keys=keys, limits=setup.limits),)
    proxy = await start_proxy(settings(url, upstreams=(upstream,), **more).for_workers())
    proxy.worker.proxy.loop_lag.stop()
    print(proxy.port, flush=True)  # noqa: T201
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


async def instructions(requests: int, setup: Setup, directory: str) -> int:
    """How many a worker takes for its start and for so many requests."""
    out = Path(directory) / f"{requests}-{setup.name}"
    async with ScriptedUpstream(answers) as upstream:
        process = await asyncio.create_subprocess_exec(
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"),
            *(sys.executable, "-m", "bench.instructions", upstream.url, setup.name),
            # Both runs compile, or do not compile, the same modules.
            env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            port = int(await process.stdout.readline())
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(requests):
                writer.write(REQUEST)
                await reader.readuntil(ANSWER)
            writer.close()
            process.stdin.close()
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
    (total,) = re.findall(r"^(?:summary|totals): (\d+)$", out.read_text(), re.MULTILINE)[:1]
    return int(total)


async def for_a_request(setup: Setup, free: asyncio.Semaphore) -> float:
    """How many instructions a worker takes for a request."""
    async with free:
        with tempfile.TemporaryDirectory() as directory:
            few, many = [await instructions(requests, setup, directory) for requests in (FEW, MANY)]
    return (many - few) / (MANY - FEW)


async def main() -> None:
    free, failed = asyncio.Semaphore(os.cpu_count() or 1), False
    found = await asyncio.gather(*(for_a_request(setup, free) for setup in SETUPS.values()))
    each = dict(zip(SETUPS, found, strict=True))
    for name, setup in SETUPS.items():
        line = f"{name}: {each[name]:,.0f} instructions for a request"
        if setup.beside:
            ratio = each[name] / each[setup.beside]
            line += f", {ratio:.4f} of those of '{setup.beside}'"
            failed |= setup.most is not None and ratio > setup.most
        print(line, flush=True)  # noqa: T201
    sys.exit(failed)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        asyncio.run(main())
    else:
        # The loop of a real worker.
        uvloop.run(worker(sys.argv[1], SETUPS[sys.argv[2]]))
