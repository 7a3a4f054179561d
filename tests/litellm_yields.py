"""As node/yields.mjs, with LiteLLM: `python -m tests.litellm_yields STREAMS BASE_URL…`.

A process of its own, as litellm_ends.py says.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from .litellm_ends import litellm

HELLO = [{"role": "user", "content": "Hello"}]


async def read(stream: dict[str, str], url: str) -> dict[str, object]:
    options: dict[str, Any] = {"api_base": url, "api_key": "k", "max_retries": 0, "stream": True}
    yielded: list[str] = []
    try:
        if stream["api"] == "chat":
            chunks = await litellm.acompletion(model=f"openai/{stream['name']}", messages=HELLO, **options)
        else:
            model = f"text-completion-openai/{stream['name']}"
            chunks = await litellm.atext_completion(model=model, prompt="Hello", **options)
        async for chunk in chunks:
            # It makes up what some chunks lack: an id, and the time.
            yielded.append(chunk.model_dump_json(exclude={"id", "created"}))  # noqa: PERF401 - as in the test
    except Exception as error:  # noqa: BLE001 - whatever it raises counts
        return {"yielded": yielded, "raised": f"{type(error).__name__}: {error}"}
    return {"yielded": yielded, "raised": None}


async def main(streams: str, *urls: str) -> None:
    seen = {
        stream["name"]: await asyncio.gather(*(read(stream, url) for url in urls)) for stream in json.loads(streams)
    }
    print(json.dumps({"litellm": seen}))  # noqa: T201 - what it is for


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
