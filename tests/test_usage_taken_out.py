"""Every recorded stream whose usage event is removed, as real clients read it.

A client must see what it sees of the same stream from a server that sends no such event: nothing missing, nothing
raised. The stream without the event is read from the upstream itself, the other one through a proxy that requests it.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from sseproxy import config

from .clients import NODE, NODE_DIRECTORY, async_client, sync_client
from .conftest import PlayScript, StartProxy
from .harness import LAST_CHUNK, STREAM_HEAD, Peer, chunk
from .test_shapes import STREAMS, Shape

APIS = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
# One request on each connection: a slow client, on a busy machine, never meets one that was closed meanwhile.
CLOSING_HEAD = STREAM_HEAD[:-2] + b"Connection: close\r\n\r\n"
# LiteLLM takes seconds to import, and more on a busy machine.
PATIENCE = 200
BLANK_LINE = re.compile(rb"((?:\r\n|\n|\r)(?:\r\n|\n|\r))")


class Seen(msgspec.Struct, frozen=True):
    """What a client yielded of a stream, each item as JSON, and what it raised."""

    yielded: list[str]
    raised: str | None


Sightings = dict[str, list[Seen]]
"""For each stream, what was seen of it under each base URL."""


def only_usage(event: bytes) -> bool:
    """Whether `event` has usage, and no choice with anything but its index."""
    data = b"".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
    try:
        document = json.loads(data)
    except ValueError:
        return False
    if not isinstance(document, dict) or not document.get("usage"):
        return False
    return not any(value for choice in document.get("choices") or () for key, value in choice.items() if key != "index")


def without_usage(body: bytes) -> bytes:
    """`body` without the complete events that have only usage."""
    parts = BLANK_LINE.split(body)
    events = zip(parts[::2], [*parts[1::2], b""], strict=True)
    return b"".join(event + end for event, end in events if not (end and only_usage(event)))


def removed(shape: Shape) -> bool:
    return shape.path in APIS and without_usage(shape.body) != shape.body


SHAPES = [shape for shape in STREAMS if removed(shape)]
BY_NAME = {shape.name: shape for shape in SHAPES}
REQUESTED = json.dumps([{"name": shape.name, "api": APIS[shape.path]} for shape in SHAPES])


async def play_recorded(api: Peer) -> None:
    """Under /v1 the recorded stream that the model names, under /without/v1 the same without its usage event."""
    request = await api.message()
    shape = BY_NAME[request.json()["model"]]
    plain = "/without/" in request.start_line
    # To a client that requests usage itself, the event is forwarded: it must not.
    assert ("stream_options" in request.json()) is not plain
    api.send(CLOSING_HEAD, chunk(without_usage(shape.body) if plain else shape.body), LAST_CHUNK)
    await api.drain()
    api.close()


def arguments(shape: Shape) -> dict[str, Any]:
    if APIS[shape.path] == "chat":
        return {"model": shape.name, "stream": True, "messages": HELLO}
    return {"model": shape.name, "stream": True, "prompt": "Hello"}


def read_in_turn(url: str) -> list[Seen]:
    """Each stream, with the synchronous SDK."""
    seen = []
    with sync_client(url) as client:
        apis: dict[str, Any] = {"chat": client.chat.completions, "completions": client.completions}
        for shape in SHAPES:
            yielded: list[str] = []
            raised = None
            try:
                yielded.extend(part.to_json(indent=None) for part in apis[APIS[shape.path]].create(**arguments(shape)))
            except (openai.OpenAIError, ValueError) as error:
                raised = f"{type(error).__name__}: {error}"
            seen.append(Seen(yielded, raised))
    return seen


async def read_with_python_sync(*urls: str) -> dict[str, Sightings]:
    seen = [await asyncio.to_thread(read_in_turn, url) for url in urls]
    return {"python, sync": dict(zip(BY_NAME, map(list, zip(*seen, strict=True)), strict=True))}


async def read_with_python_async(*urls: str) -> dict[str, Sightings]:
    sightings: Sightings = {name: [] for name in BY_NAME}
    for url in urls:
        async with async_client(url) as client:
            apis: dict[str, Any] = {"chat": client.chat.completions, "completions": client.completions}
            for shape in SHAPES:
                yielded: list[str] = []
                raised = None
                try:
                    async for part in await apis[APIS[shape.path]].create(**arguments(shape)):
                        yielded.append(part.to_json(indent=None))  # noqa: PERF401 - kept also if the next one raises
                except (openai.OpenAIError, ValueError) as error:
                    raised = f"{type(error).__name__}: {error}"
                sightings[shape.name].append(Seen(yielded, raised))
    return {"python, async": sightings}


async def _read_with_child(*command: str | Path, urls: tuple[str, ...], directory: Path) -> dict[str, Sightings]:
    process = await asyncio.create_subprocess_exec(
        *command, REQUESTED, *(f"{url}/v1" for url in urls), cwd=directory, stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return msgspec.json.decode(out, type=dict[str, Sightings])


async def read_with_node(*urls: str) -> dict[str, Sightings]:
    return await _read_with_child(NODE, "yields.mjs", urls=urls, directory=NODE_DIRECTORY)


async def read_with_litellm(*urls: str) -> dict[str, Sightings]:
    root = Path(__file__).parent.parent
    return await _read_with_child(sys.executable, "-m", "tests.litellm_yields", urls=urls, directory=root)


@pytest.fixture
async def urls(start: StartProxy, play: PlayScript) -> AsyncIterator[tuple[str, str]]:
    """The proxy's base URL, and the upstream's, of the streams without usage."""
    recorded = await play(play_recorded)
    proxy = await start(recorded.url, route={"usage": config.UsageOptions(request=True)})
    yield proxy.url, f"{recorded.url}/without"
    assert proxy.sample("tokens_total", type="output") > 0


# One event of it is not JSON. The AI SDK yields the error and goes on.
NOT_JSON = "invalid_json_event"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("read", "clients"),
    [
        (read_with_python_sync, {"python, sync"}),
        (read_with_python_async, {"python, async"}),
        (read_with_node, {"openai", "ai"}),
        (read_with_litellm, {"litellm"}),
    ],
    ids=["python-sync", "python-async", "node", "litellm"],
)
async def test_a_client_sees_what_it_sees_without_the_usage_event(
    urls: tuple[str, str], read: Callable[..., Awaitable[dict[str, Sightings]]], clients: set[str]
) -> None:
    seen = await read(*urls)
    assert seen.keys() == clients
    for client in clients:
        assert seen[client].keys() == BY_NAME.keys()
        for name, (through, without) in seen[client].items():
            assert through == without, (client, name)
            assert through.yielded, (client, name)
            assert through.raised is None or name == NOT_JSON, (client, name, through.raised)


def test_the_streams_are_those_with_a_usage_event() -> None:
    """By the truth about each, which says whether a stream has an event with only usage."""
    said = {shape.name for shape in STREAMS if shape.path in APIS and shape.truth.get("usage_only")}
    assert said <= BY_NAME.keys()
    assert len(SHAPES) == 24
    for shape in SHAPES:
        assert len(BLANK_LINE.findall(shape.body)) > len(BLANK_LINE.findall(without_usage(shape.body)))
