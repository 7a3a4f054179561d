"""Examines correct stacks with the doctor, on a machine that is busy: a finding is a false alarm.

    make proof RUNS=200

A stack is nginx with the file of `configs/front`, in front of `sseproxy serve` with a probe. Several are examined at
the same time, while processes that only compute take all cores. The exit status is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import uvloop

from tests.harness import kept_port
from tests.served import serve
from tests.test_front import NGINX, running

TOKEN = "a-token-for-the-proof"
CONFIG = f"""\
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
workers: 1
trusted_proxies: 127.0.0.1
probe: {{token: {TOKEN}}}
upstreams: [{{name: api, url: "http://127.0.0.1:1/v1"}}]
routes: [{{name: api, match: {{path: /v1}}, upstream: api}}]
"""
SPIN = "while True: pass"


class Proof:
    def __init__(self, runs: int) -> None:
        self._left = runs
        self._began = perf_counter()
        self.done = 0
        self.alarms = 0
        self.late: list[float] = []

    async def examine_often(self, urls: list[str]) -> None:
        """Examines a stack until there are enough runs."""
        while self._left > 0:
            self._left -= 1
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "sseproxy", "doctor", "--json", *urls),
                env=os.environ | {"SSEPROXY_PROBE_TOKEN": TOKEN},
                stdout=asyncio.subprocess.PIPE,
            )
            out, _ = await process.communicate()
            self._record(json.loads(out))

    def _record(self, report: Any) -> None:
        self.done += 1
        self.alarms += not report["good"]
        latest = [hop["arrival"]["latest"] for hop in report["hops"]]
        self.late += latest
        late = ", ".join(f"{seconds * 1000:.0f} ms" for seconds in latest)
        sys.stdout.write(
            f"{perf_counter() - self._began:6.0f} s  run {self.done}: {report['verdict']} "
            f"The latest event of each hop was late by {late}.\n"
        )
        if not report["good"]:
            for hop in report["hops"]:
                del hop["observed"]["upload"]
                sys.stdout.write(f"{json.dumps(hop)}\n")
        sys.stdout.flush()


async def make_stack(stack: AsyncExitStack, directory: Path) -> list[str]:
    """Starts sseproxy, and nginx in front of it. Returns their URLs for the doctor."""
    directory.mkdir()  # noqa: ASYNC240 - nothing else runs yet
    file = directory / "sseproxy.yaml"
    file.write_text(CONFIG)
    served = await stack.enter_async_context(serve("-c", str(file)))
    port = stack.enter_context(kept_port())
    await stack.enter_async_context(running(NGINX, directory, port, served.port))
    return [f"http://127.0.0.1:{one}/sseproxy-probe/v1" for one in (served.port, port)]


async def run(runs: int, stacks: int, burners: int) -> int:
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = [await make_stack(stack, directory / str(number)) for number in range(stacks)]
        for _ in range(burners):
            busy = await asyncio.create_subprocess_exec(sys.executable, "-c", SPIN)
            stack.push_async_callback(busy.wait)
            stack.callback(busy.kill)
        proof = Proof(runs)
        await asyncio.gather(*(proof.examine_often(each) for each in urls))
    late = sorted(proof.late)
    sys.stdout.write(
        f"{proof.done} runs, each of 2 hops, beside {burners} busy processes: {proof.alarms} false alarms. The latest "
        f"event was late by {median(late) * 1000:.0f} ms at the median of all, and by {late[-1] * 1000:.0f} ms at "
        "most.\n"
    )
    return 1 if proof.alarms else 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Examine correct stacks on a busy machine: nothing may be found.")
    parser.add_argument("runs", type=int, nargs="?", default=200)
    parser.add_argument("--stacks", type=int, default=4, help="examined at the same time (%(default)s)")
    parser.add_argument("--burners", type=int, default=2 * (os.cpu_count() or 1), help="busy processes (%(default)s)")
    options = parser.parse_args()
    sys.exit(uvloop.run(run(options.runs, options.stacks, options.burners)))


if __name__ == "__main__":
    main()
