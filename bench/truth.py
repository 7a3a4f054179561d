"""Compares what sseproxy's metrics say with what load generators measure: `make truth`.

aiperf and guidellm, one after the other, send requests through a served sseproxy to the backend of the demonstration.
bench/README.md says how their definitions differ. The exit status is 1 if a difference exceeds its bound.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from aiohttp import web

from sseproxy.demo import Pace, backend
from tests.served import Served, serve

PROGRAMS = Path(__file__).parent / ".venv-truth/bin"
PACE = Pace(ttft=0.1, rate=50, tokens=64)
REQUESTS, STREAMS = 40, 4
# Seconds. Each takes about ten; the first start after the installation, on a busy machine, takes minutes.
PATIENCE = 300.0
# A tokenizer is loaded by both, but only makes prompts: output tokens are counted by the backend.
TOKENIZER = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(200)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w1")
tokenizer.save_pretrained("tokenizer")
"""
# The largest difference: a share of sseproxy's figure. For the time to the first token it is in milliseconds: the
# generators also count the connection and their own delay, which are a few milliseconds in Python.
BOUNDS = {"requests": 0.0, "output tokens": 0.0, "TPOT ms": 0.01, "gap ms": 0.01, "TTFT ms": 10.0}


async def run(*command: str, directory: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=directory, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(PATIENCE):
            output, _ = await process.communicate()
    except TimeoutError:
        sys.exit(f"{command[0]} did not end within {PATIENCE:g} seconds. Run `make truth` again on a quiet machine.")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{output.decode()[-3000:]}")


async def aiperf(url: str, directory: str) -> dict[str, float]:
    await run(
        *(str(PROGRAMS / "aiperf"), "profile", "--model", "demo", "--url", url, "--endpoint-type", "chat"),
        *("--streaming", "--tokenizer", "./tokenizer", "--use-server-token-count", "--ui-type", "none"),
        *("--concurrency", str(STREAMS), "--request-count", str(REQUESTS), "--output-artifact-dir", "aiperf"),
        directory=directory,
    )
    found = json.loads((Path(directory) / "aiperf/profile_export_aiperf.json").read_text())
    names = (
        "request_count",
        "total_output_tokens",
        "inter_token_latency",
        "inter_chunk_latency",
        "time_to_first_token",
    )
    return dict(zip(BOUNDS, (found[name]["avg"] for name in names), strict=True))


async def guidellm(url: str, directory: str) -> dict[str, float]:
    target: dict[str, Any] = {"kind": "openai_http", "target": url, "model": "demo", "validate_backend": False}
    await run(
        *(str(PROGRAMS / "guidellm"), "run", "--disable-console"),
        *("--backend", json.dumps(target | {"request_format": "/v1/chat/completions"})),
        *("--profile", f"kind=concurrent,streams={STREAMS}", "--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--tokenizer", "kind=huggingface_auto,model=./tokenizer"),
        *("--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens={PACE.tokens}"),
        *("--output", "kind=json,path=guidellm.json"),
        directory=directory,
    )
    found = json.loads((Path(directory) / "guidellm.json").read_text())["benchmarks"][0]["metrics"]
    return {
        "requests": found["request_totals"]["successful"],
        "output tokens": found["output_token_count"]["successful"]["total_sum"],
        "TPOT ms": found["inter_token_latency_ms"]["successful"]["mean"],
        "TTFT ms": found["time_to_first_token_ms"]["successful"]["mean"],
    }


async def sseproxy(served: Served) -> dict[str, float]:
    async def mean(name: str) -> float:
        total = await served.sample(rf"{name}_seconds_sum\{{.*")
        return 1000 * total / await served.sample(rf"{name}_seconds_count\{{.*")

    # aiperf also asks for a page that the backend does not have.
    return {
        "requests": await served.sample(r'requests_total\{code="200",.*'),
        "output tokens": await served.sample(r'tokens_total\{.*type="output".*'),
        "TPOT ms": await mean("time_per_output_token"),
        "gap ms": await mean("inter_token_latency"),
        "TTFT ms": await mean("time_to_first_token"),
    }


async def main() -> int:
    runner = web.AppRunner(backend(PACE), handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    upstream = f"http://127.0.0.1:{runner.addresses[0][1]}"
    exceeded = False
    print(f"{'figure':<16}{'sseproxy':>12}{'generator':>12}{'difference':>12}{'bound':>8}")  # noqa: T201
    with tempfile.TemporaryDirectory() as directory:
        await run(str(PROGRAMS / "python"), "-c", TOKENIZER, directory=directory)
        for generator in (aiperf, guidellm):
            arguments = ("--upstream", upstream, "--workers", "1", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
            async with serve(*arguments) as served:
                theirs = await generator(f"http://127.0.0.1:{served.port}", directory)
                ours = await sseproxy(served)
            print(generator.__name__)  # noqa: T201
            for figure, value in theirs.items():
                bound, off = BOUNDS[figure], value - ours[figure]
                off = off if figure == "TTFT ms" else off / ours[figure]
                exceeded |= abs(off) > bound
                print(f"  {figure:<14}{ours[figure]:12.3f}{value:12.3f}{off:12.4f}{bound:8g}")  # noqa: T201
    await runner.cleanup()
    return int(exceeded)


if __name__ == "__main__":
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    sys.exit(asyncio.run(main()))
