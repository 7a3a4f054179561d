"""Counts the instructions for a short request, with one endpoint and with three: `python -m bench.instructions`.

A worker runs under callgrind (`apt-get install valgrind`), once for few requests and once for many. The difference is
what the requests took, without the start. Unlike times, instructions do not depend on the machine's mood. The exit
status is 1 if three endpoints take more than 3 % more.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from pathlib import Path

from sseproxy import config
from tests.harness import Peer, ScriptedUpstream, post, settings, start_proxy

FEW, MANY = 40, 160
MOST = 1.03
ANSWER = b'{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)


async def answers(api: Peer) -> None:
    while True:
        # The harness has a deadline for each read, and callgrind is slow.
        head = await api.reader.readuntil(b"\r\n\r\n")
        (size,) = re.findall(rb"content-length: (\d+)", head.lower())
        await api.reader.readexactly(int(size))
        api.send(RESPONSE)


async def worker(url: str, endpoints: int) -> None:
    """Serves until standard input is closed."""
    urls = tuple(config.Endpoint(url=f"{url}/{number}/v1") for number in range(endpoints))
    upstream = config.Upstream(name="up", url=urls[0].url) if endpoints == 1 else config.Upstream(name="up", urls=urls)
    proxy = await start_proxy(settings(url, upstreams=(upstream,)))
    print(proxy.port, flush=True)  # noqa: T201
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


async def instructions(requests: int, endpoints: int, directory: str) -> int:
    """How many a worker takes for its start and so many requests."""
    out = Path(directory) / f"{requests}-{endpoints}"
    async with ScriptedUpstream(answers) as upstream:
        process = await asyncio.create_subprocess_exec(
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"),
            *(sys.executable, "-m", "bench.instructions", upstream.url, str(endpoints)),
            env=os.environ | {"PYTHONHASHSEED": "0"},
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
                writer.write(post(b'{"model":"m","messages":[]}'))
                await reader.readuntil(ANSWER)
            writer.close()
            process.stdin.close()
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
    (total,) = re.findall(r"^(?:summary|totals): (\d+)$", out.read_text(), re.MULTILINE)[:1]
    return int(total)


async def main() -> None:
    each = {}
    with tempfile.TemporaryDirectory() as directory:
        runs = [(requests, endpoints) for endpoints in (1, 3) for requests in (FEW, MANY)]
        counts = dict(zip(runs, await asyncio.gather(*(instructions(*run, directory) for run in runs)), strict=True))
    for endpoints in (1, 3):
        each[endpoints] = (counts[MANY, endpoints] - counts[FEW, endpoints]) / (MANY - FEW)
        print(f"{endpoints} endpoints: {each[endpoints]:,.0f} instructions for a request")  # noqa: T201
    ratio = each[3] / each[1]
    print(f"ratio: {ratio:.4f}")  # noqa: T201
    sys.exit(ratio > MOST)


if __name__ == "__main__":
    asyncio.run(main() if len(sys.argv) == 1 else worker(sys.argv[1], int(sys.argv[2])))
