"""Draws the picture of the live view in the guide: `make live-picture` writes `configs/live.png`.

It starts a proxy in front of a scripted backend, lets clients use it for a while, and takes a picture of the page with
headless Chromium. Backend and clients are invented, the page is real.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from pathlib import Path

from tests.chromium import chromium
from tests.harness import DONE, LAST_CHUNK, STREAM_HEAD, Peer, ScriptedUpstream, chunk, delta, usage
from tests.served import ConfigFile, Served

PICTURE = Path(__file__).parent.parent / "configs" / "live.png"
TOKEN = "of-the-picture"
SECONDS = 75
# For each model: its path, the tokens a second, the tokens of an answer, and the seconds to the first one.
MODELS = {
    "gpt-4o": ("/openai/v1/chat/completions", 60, 900, 0.4),
    "claude-sonnet-4-5": ("/anthropic/v1/chat/completions", 45, 900, 0.9),
    "llama-3.3-70b": ("/v1/chat/completions", 25, 600, 0.3),
    "o3": ("/openai/v1/chat/completions", 90, 2000, 30.0),
}


async def backend(api: Peer) -> None:
    asked = json.loads((await api.message()).body)
    _, rate, tokens, ttft = MODELS[asked["model"]]
    await asyncio.sleep(random.uniform(0.5, 2) * ttft)
    api.send(STREAM_HEAD)
    for number in range(max(random.randrange(tokens // 3, tokens), asked["hangs"] + 1)):
        await asyncio.sleep(random.uniform(0.4, 1.6) / rate)
        if number == asked["hangs"]:
            await asyncio.Event().wait()
        api.send(chunk(delta(" token")))
    api.send(chunk(usage(100, tokens)), chunk(DONE), LAST_CHUNK)


async def client(served: Served, number: int) -> None:
    """One request after the other. The first answer of some breaks off in the middle, and stays silent."""
    hangs = {1: 80, 2: 1000}.get(number, -1)
    while True:
        await asyncio.sleep(random.uniform(0, 3))
        model = "o3" if number in (4, 6) else list(MODELS)[number % 3]
        body = json.dumps({"model": model, "stream": True, "hangs": hangs}).encode()
        hangs = -1
        peer = await served.connect()
        peer.send(
            b"POST %b HTTP/1.1\r\nHost: proxy\r\nX-Forwarded-For: 192.0.2.%d\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\nConnection: close\r\n\r\n%b"
            % (MODELS[model][0].encode(), 10 + number % 7, len(body), body)
        )
        while await peer.reader.read(65536):
            pass
        peer.close()


async def picture(directory: Path) -> None:
    async with ScriptedUpstream(backend) as up:
        names = {"openai": "/openai", "anthropic": "/anthropic", "local": "/v1"}
        upstreams = ", ".join(f"{{name: {name}, url: '{up.url}'}}" for name in names)
        routes = ", ".join(
            f"{{name: {name}, match: {{path: {path}}}, upstream: {name}}}" for name, path in names.items()
        )
        file = ConfigFile(
            directory,
            up,
            workers="2",
            admin=f"{{listen: '127.0.0.1:0', token: {TOKEN}, cancel: true}}",
            trusted_proxies="127.0.0.1",
            upstreams=f"[{upstreams}]",
            routes=f"[{routes}]",
        )
        async with file.serve() as served, chromium(directory / "chromium") as tab:
            loop = asyncio.get_running_loop()
            clients = [loop.create_task(client(served, number)) for number in range(18)]
            await tab.size(1280, 640)
            await tab.scheme("light")
            await tab.go(f"http://127.0.0.1:{served.admin}/live")
            await tab.until("document.querySelector('#token') !== null")
            await tab.evaluate(f"document.querySelector('#token').value = {json.dumps(TOKEN)}")
            await tab.evaluate("document.querySelector('form').submit()")
            await asyncio.sleep(SECONDS)
            PICTURE.write_bytes(await tab.screenshot())
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(picture(Path(name)))


if __name__ == "__main__":
    main()
