"""Reads one stream of each API with LiteLLM as a client: for each base URL that comes as a line, prints a line of JSON,
a list of what `Ended` in ends.py has.

A process of its own, because LiteLLM takes seconds to import, and many threads and global variables.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from typing import Any

# It would fetch one.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
litellm: Any = importlib.import_module("litellm")
litellm.suppress_debug_info = True

# Under which name and base URL it speaks each API.
APIS = {"chat": ("openai/m", "/v1"), "messages": ("anthropic/m", ""), "gemini": ("gemini/m", "/v1")}


async def read(api: str, url: str) -> dict[str, object]:
    model, path = APIS[api]
    hello = [{"role": "user", "content": "Hello"}]
    options = {"model": model, "api_base": url + path, "api_key": "k", "messages": hello, "max_retries": 0}
    text = ""
    try:
        async for chunk in await litellm.acompletion(stream=True, **options):
            text += chunk.choices[0].delta.content or ""
    except Exception as error:  # noqa: BLE001 - whatever it raises counts
        status = getattr(error, "status_code", None)
        return {"api": api, "text": text, "error": f"{type(error).__name__}: {error}", "status": status}
    return {"api": api, "text": text, "error": ""}


async def main() -> None:
    print("[]", flush=True)  # noqa: T201 - what it is for
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        print(json.dumps(await asyncio.gather(*(read(api, line) for api in APIS))), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())
