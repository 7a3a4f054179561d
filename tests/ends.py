"""One stream of each API, read to its end with every SDK: what an application saw of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import anthropic
import msgspec
import openai
from google import genai
from google.genai.types import HttpOptions, HttpRetryOptions

from .clients import NODE, NODE_DIRECTORY
from .harness import DEADLINE, DONE, Message, delta


def generated(text: str, **more: object) -> bytes:
    """An event of Gemini's, with the line ends of Google's servers."""
    candidate = {"content": {"parts": [{"text": text}], "role": "model"}, "index": 0}
    return f"data: {json.dumps({'candidates': [candidate | more]})}\r\n\r\n".encode()


def typed(document: dict[str, object]) -> bytes:
    return f"event: {document['type']}\ndata: {json.dumps(document)}\n\n".encode()


RESPONSE: dict[str, object] = {
    "id": "r",
    "object": "response",
    "created_at": 0,
    "model": "m",
    "status": "in_progress",
    "output": [],
    "usage": None,
}
USED: dict[str, object] = {"input_tokens": 1, "output_tokens": 1}
ITEM: dict[str, object] = {"type": "message", "id": "i", "status": "in_progress", "role": "assistant", "content": []}
MESSAGE: dict[str, object] = {
    "id": "m",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [],
    "usage": USED,
}
TEXT: dict[str, object] = {"type": "text", "text": ""}
# Each begins without generated content, and ends with it.
EVENTS = {
    "chat": [delta(""), delta("Hi")],
    "responses": [
        typed({"type": "response.created", "sequence_number": 0, "response": RESPONSE})
        + typed({"type": "response.output_item.added", "sequence_number": 1, "output_index": 0, "item": ITEM}),
        typed({"type": "response.output_text.delta", "sequence_number": 2, "item_id": "i", "delta": "Hi"}),
    ],
    "messages": [
        typed({"type": "message_start", "message": MESSAGE})
        + typed({"type": "content_block_start", "index": 0, "content_block": TEXT}),
        typed({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}}),
    ],
    "gemini": [generated(""), generated("Hi")],
}
LAST_EVENTS = {
    "chat": delta("", choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]) + DONE,
    "responses": typed(
        {
            "type": "response.completed",
            "sequence_number": 3,
            "response": RESPONSE | {"status": "completed", "usage": USED},
        }
    ),
    "messages": typed({"type": "content_block_stop", "index": 0})
    + typed({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}})
    + typed({"type": "message_stop"}),
    "gemini": generated("", finishReason="STOP"),
}
PATHS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/models/m:streamGenerateContent": "gemini",
}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def api_of(request: Message) -> str:
    return PATHS[request.start_line.split()[1].partition("?")[0]]


@dataclass(frozen=True)
class Ended:
    """How a stream ended for an application."""

    api: str
    text: str
    """All that it has got of the answer."""
    error: str
    """The class, the message and the cause of what was raised; empty if nothing was."""
    code: str | int | None = None
    status: int | None = None


async def _consume(api: str, url: str) -> AsyncIterator[Any]:
    if api == "messages":
        async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as client:
            async for event in await client.messages.create(model="m", max_tokens=9, stream=True, messages=HELLO):
                yield event
    elif api == "messages_helper":
        async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as helped:
            async with helped.messages.stream(model="m", max_tokens=9, messages=HELLO) as stream:
                async for step in stream:
                    yield step
    elif api == "gemini":
        async with _google(url).aio as google:
            async for answer in await google.models.generate_content_stream(model="m", contents="Hello"):
                yield answer
    else:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as other:
            if api == "chat":
                async for piece in await other.chat.completions.create(model="m", stream=True, messages=HELLO):
                    yield piece
            else:
                async for part in await other.responses.create(model="m", stream=True, input="Hello"):
                    yield part


def _consume_in_turn(api: str, url: str) -> Iterator[Any]:
    """As `_consume`, with the synchronous clients."""
    if api == "messages":
        with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
            yield from client.messages.create(model="m", max_tokens=9, stream=True, messages=HELLO)
    elif api == "messages_helper":
        with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
            with client.messages.stream(model="m", max_tokens=9, messages=HELLO) as stream:
                yield from stream
    elif api == "gemini":
        with _google(url) as google:
            yield from google.models.generate_content_stream(model="m", contents="Hello")
    else:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as other:
            if api == "chat":
                yield from other.chat.completions.create(model="m", stream=True, messages=HELLO)
            else:
                yield from other.responses.create(model="m", stream=True, input="Hello")


def _google(url: str) -> genai.Client:
    once = HttpRetryOptions(attempts=1)
    return genai.Client(api_key="k", http_options=HttpOptions(base_url=url, api_version="v1", retry_options=once))


def _text(api: str, event: Any) -> str:
    """What `event`, as an SDK has it, says of the answer."""
    match api:
        case "chat":
            return event.choices[0].delta.content or ""
        case "responses":
            return event.delta if event.type == "response.output_text.delta" else ""
        case "gemini":
            return event.text or ""
    # The helper has the same text in events of its own, too.
    return event.delta.text if event.type == "content_block_delta" else ""


def _failed(api: str, text: str, error: Exception) -> Ended:
    told = f"{type(error).__name__}: {error} ({error.__cause__})"
    return Ended(api, text, told, getattr(error, "code", None), getattr(error, "status_code", None))


async def _python(api: str, url: str) -> Ended:
    text = ""
    try:
        async for event in _consume(api, url):
            text += _text(api, event)
    except Exception as error:  # noqa: BLE001 - whatever an SDK raises counts
        return _failed(api, text, error)
    return Ended(api, text, "")


def _python_in_turn(api: str, url: str) -> Ended:
    text = ""
    try:
        for event in _consume_in_turn(api, url):
            text += _text(api, event)
    except Exception as error:  # noqa: BLE001 - whatever an SDK raises counts
        return _failed(api, text, error)
    return Ended(api, text, "")


SDKS = ("chat", "responses", "messages", "messages_helper", "gemini")
"""Read with the API's own SDK; and below, with the Vercel AI SDK."""
AI_SDK = ("ai_chat", "ai_responses", "ai_messages", "ai_gemini")


async def read_with_python(url: str) -> list[Ended]:
    return list(await asyncio.gather(*(_python(api, url) for api in SDKS)))


async def read_with_python_in_turn(url: str) -> list[Ended]:
    return list(await asyncio.gather(*(asyncio.to_thread(_python_in_turn, api, url) for api in SDKS)))


async def read_all_with_node(urls: Sequence[str]) -> list[list[Ended]]:
    """What `read_with_node` gets of each of `urls`, from one process: to start one takes longer than to read."""
    process = await asyncio.create_subprocess_exec(
        *(str(NODE), "ends.mjs", *urls), cwd=NODE_DIRECTORY, stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 2 * DEADLINE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    ended = [msgspec.json.decode(line, type=Ended) for line in out.splitlines()]
    apis = len(SDKS) + len(AI_SDK)
    return [ended[start : start + apis] for start in range(0, apis * len(urls), apis)]


async def read_with_node(url: str) -> list[Ended]:
    (ended,) = await read_all_with_node([url])
    return ended


class Reader(NamedTuple):
    """Reads one stream of each of `apis`."""

    apis: tuple[str, ...]
    read: Callable[[str], Awaitable[list[Ended]]]


READERS = {
    "python": Reader(SDKS, read_with_python),
    "python, sync": Reader(SDKS, read_with_python_in_turn),
    "node": Reader((*SDKS, *AI_SDK), read_with_node),
}
