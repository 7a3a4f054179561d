"""A real Chromium, Debian's, by its remote debugging: https://chromedevtools.github.io/devtools-protocol/."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

from .harness import DEADLINE
from .served import program

# Seconds. The start of a browser on a busy machine, and what it has to draw, takes longer than what a proxy does.
_PATIENCE = 4 * DEADLINE


class Tab:
    """One page. What it complains about is in `complaints`."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self._socket = socket
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._session = ""
        self.complaints: list[str] = []

    async def read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                answer = self._answers.pop(said["id"])
                if not answer.done():
                    answer.set_result(said)
            elif said["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(said["params"]))
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.complaints.append(said["params"]["entry"]["text"])

    async def command(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        asked: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            asked["sessionId"] = self._session
        await self._socket.send_json(asked)
        async with asyncio.timeout(_PATIENCE):
            said = await answer
        assert "error" not in said, said
        result: dict[str, Any] = said["result"]
        return result

    async def begin(self) -> None:
        target = await self.command("Target.createTarget", url="about:blank")
        attached = await self.command("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.command(f"{domain}.enable")

    async def go(self, url: str) -> None:
        await self.command("Page.navigate", url=url)

    async def evaluate(self, expression: str) -> Any:
        said = await self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, expression: str) -> None:
        """Waits until `expression` is true in the page, also over a navigation."""
        async with asyncio.timeout(_PATIENCE):
            while True:
                said = await self.command("Runtime.evaluate", expression=expression, returnByValue=True)
                if said["result"].get("value") is True:
                    return
                await asyncio.sleep(0.02)

    async def size(self, width: int, height: int) -> None:
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    async def scheme(self, name: str) -> None:
        """`light` or `dark`."""
        await self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    async def screenshot(self) -> bytes:
        """The page as a PNG."""
        said = await self.command("Page.captureScreenshot", format="png")
        return base64.b64decode(said["data"])


@asynccontextmanager
async def chromium(directory: Path) -> AsyncIterator[Tab]:
    """A tab of a browser that keeps its files in `directory`."""
    process = await asyncio.create_subprocess_exec(
        *(program("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-dev-shm-usage"),
        *("--remote-debugging-port=0", f"--user-data-dir={directory}"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    rest: asyncio.Task[bytes] | None = None
    reading: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(_PATIENCE):
            url = ""
            while not url:
                line = (await process.stderr.readline()).decode()
                assert line, "the browser has ended"
                url = "".join(re.findall(r"DevTools listening on (ws://\S+)", line))
        rest = asyncio.get_running_loop().create_task(process.stderr.read())
        async with ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            tab = Tab(socket)
            reading = asyncio.get_running_loop().create_task(tab.read())
            await tab.begin()
            yield tab
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), DEADLINE)
            except TimeoutError:
                process.kill()
                await process.wait()
        for task in (rest, reading):
            if task is not None:
                await asyncio.wait((task,))
