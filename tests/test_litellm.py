"""LiteLLM as a client, of which there is one for all APIs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from sseproxy import config
from sseproxy.errors import RequestError, Truncated

from .conftest import PlayScript, StartProxy
from .ends import EVENTS, LAST_EVENTS, Ended, api_of
from .harness import LAST_CHUNK, STREAM_HEAD, Peer, ScriptedUpstream, begin, chunk

APIS = ("chat", "messages", "gemini")
SHORT = 0.1
# It takes seconds to import, and more on a busy machine.
PATIENCE = 90

Read = Callable[[str], Awaitable[list[Ended]]]


@pytest.fixture
async def read() -> AsyncIterator[Read]:
    """What it sees of one stream of each API at a base URL."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.litellm_ends"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    async def answer() -> list[Ended]:
        async with asyncio.timeout(PATIENCE):
            return msgspec.json.decode(await stdout.readuntil(), type=list[Ended])

    async def ask(url: str) -> list[Ended]:
        stdin.write(f"{url}\n".encode())
        return await answer()

    try:
        assert await answer() == []
        yield ask
    finally:
        process.kill()
        stdin.close()
        await process.wait()


async def play_events(pause: float, api: Peer, *, cut: bool) -> None:
    while True:
        dialect = api_of(await api.message())
        api.send(STREAM_HEAD)
        for event in EVENTS[dialect]:
            # A silence is what is to be filled.
            await asyncio.sleep(pause)
            api.send(chunk(event))
        await asyncio.sleep(pause)
        if cut:
            api.close()
            return
        api.send(chunk(LAST_EVENTS[dialect]), LAST_CHUNK)


@pytest.mark.timeout(240)
async def test_it_reads_over_heartbeats_and_raises_with_our_message(
    start: StartProxy, play: PlayScript, upstream: ScriptedUpstream, read: Read
) -> None:
    paced = await play(partial(play_events, 2.5 * SHORT, cut=False))
    proxy = await start(paced.url, route={"heartbeat": SHORT})
    assert await read(proxy.url) == [Ended(api, "Hi", "") for api in APIS]
    assert await proxy.ended() == {"completed": 3}

    broken = await start((await play(partial(play_events, 0, cut=True))).url)
    for end in await read(broken.url):
        assert end.text == "Hi"
        assert str(Truncated()) in end.error, end
    assert await broken.ended() == {"truncated": 3}

    for reason, limits in (
        ("connections_per_client", config.Limits(connections_per_client=1)),
        ("active_requests", config.Limits(active_requests=1)),
    ):
        full = await start(upstream.url, limits=limits)
        await begin(full, upstream)
        error = RequestError(reason)
        for end in await read(full.url):
            assert error.message in end.error, end
            # It makes 500 of Anthropic's 503.
            assert end.status in (error.status, 500 if error.status == 503 else None), end
    for end in await read(f"{proxy.url}/elsewhere"):
        assert "No route for POST /elsewhere" in end.error
        assert end.status == 404
