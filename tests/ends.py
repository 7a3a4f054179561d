"""One stream of each API, read to its end with every SDK: how it ended, as an application sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import anthropic
import openai

from .clients import NODE, NODE_DIRECTORY
from .harness import DEADLINE, DONE, Message, delta


def typed(document: dict[str, object]) -> bytes:
    return f"event: {document['type']}\ndata: {json.dumps(document)}\n\n".encode()


RESPONSE: dict[str, object] = {"id": "r", "object": "response", "status": "in_progress", "output": [], "usage": None}
MESSAGE: dict[str, object] = {"id": "m", "type": "message", "role": "assistant", "content": [], "usage": {}}
TEXT: dict[str, object] = {"type": "text", "text": ""}
# Each begins without generated content, and ends with it.
EVENTS = {
    "chat": [delta(""), delta("Hi")],
    "responses": [
        typed({"type": "response.created", "sequence_number": 0, "response": RESPONSE}),
        typed({"type": "response.output_text.delta", "sequence_number": 1, "item_id": "i", "delta": "Hi"}),
    ],
    "messages": [
        typed({"type": "message_start", "message": MESSAGE})
        + typed({"type": "content_block_start", "index": 0, "content_block": TEXT}),
        typed({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}}),
    ],
}
LAST_EVENTS = {
    "chat": DONE,
    "responses": typed(
        {"type": "response.completed", "sequence_number": 2, "response": {**RESPONSE, "status": "completed"}}
    ),
    "messages": typed({"type": "content_block_stop", "index": 0})
    + typed({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}})
    + typed({"type": "message_stop"}),
}
PATHS = {"/v1/chat/completions": "chat", "/v1/responses": "responses", "/v1/messages": "messages"}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def api_of(request: Message) -> str:
    return PATHS[request.start_line.split()[1].partition("?")[0]]


class Ended(NamedTuple):
    """How a stream ended for an application."""

    api: str
    events: int
    error: str
    """The class, the message and the cause of what was raised; empty if nothing was."""
    code: str | None = None


async def _consume(api: str, url: str) -> AsyncIterator[object]:
    if api == "messages":
        async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as client:
            async for event in await client.messages.create(model="m", max_tokens=9, stream=True, messages=HELLO):
                yield event
    elif api == "messages_helper":
        async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as helped:
            async with helped.messages.stream(model="m", max_tokens=9, messages=HELLO) as stream:
                async for step in stream:
                    yield step
    else:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as other:
            if api == "chat":
                async for piece in await other.chat.completions.create(model="m", stream=True, messages=HELLO):
                    yield piece
            else:
                async for part in await other.responses.create(model="m", stream=True, input="Hello"):
                    yield part


def _consume_in_turn(api: str, url: str) -> Iterator[object]:
    """As `_consume`, with the synchronous clients."""
    if api == "messages":
        with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
            yield from client.messages.create(model="m", max_tokens=9, stream=True, messages=HELLO)
    elif api == "messages_helper":
        with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
            with client.messages.stream(model="m", max_tokens=9, messages=HELLO) as stream:
                yield from stream
    else:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as other:
            if api == "chat":
                yield from other.chat.completions.create(model="m", stream=True, messages=HELLO)
            else:
                yield from other.responses.create(model="m", stream=True, input="Hello")


def _told(api: str, events: int, error: Exception | None) -> Ended:
    if error is None:
        return Ended(api, events, "")
    code = getattr(error, "code", None)
    return Ended(api, events, f"{type(error).__name__}: {error} ({error.__cause__})", code)


async def _python(api: str, url: str) -> Ended:
    events = 0
    try:
        async for _ in _consume(api, url):
            events += 1
    except Exception as error:  # noqa: BLE001 - whatever an SDK raises counts
        return _told(api, events, error)
    return _told(api, events, None)


def _python_in_turn(api: str, url: str) -> Ended:
    events = 0
    try:
        for _ in _consume_in_turn(api, url):
            events += 1
    except Exception as error:  # noqa: BLE001 - whatever an SDK raises counts
        return _told(api, events, error)
    return _told(api, events, None)


APIS = ("chat", "responses", "messages", "messages_helper")


async def read_with_python(url: str) -> list[Ended]:
    return list(await asyncio.gather(*(_python(api, url) for api in APIS)))


async def read_with_python_in_turn(url: str) -> list[Ended]:
    return list(await asyncio.gather(*(asyncio.to_thread(_python_in_turn, api, url) for api in APIS)))


async def read_with_node(url: str) -> list[Ended]:
    process = await asyncio.create_subprocess_exec(
        *(str(NODE), "ends.mjs", url), cwd=NODE_DIRECTORY, stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 2 * DEADLINE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    ended = []
    for line in out.splitlines():
        seen = json.loads(line)
        error = seen["error"] or {}
        text = f"{error['name']}: {error['message']} ({error['cause']})" if error else ""
        ended.append(Ended(seen["api"], seen["events"], text, error.get("code")))
    return ended


READERS = {"python": read_with_python, "python, sync": read_with_python_in_turn, "node": read_with_node}
