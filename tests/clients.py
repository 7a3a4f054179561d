"""The clients that people use, as tests want them: the OpenAI SDKs for Python and Node, and curl.

A *reader* asks once and tells what its application saw, or was told went wrong. A *leaver* is an application that
leaves in the middle and then lives on, so that what a server sees of it is not the end of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any, Literal, Protocol

import msgspec
import openai
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from .harness import DEADLINE, DONE

NODE = Path(sys.executable).with_name("node")
NODE_DIRECTORY = Path(__file__).with_name("node")


@dataclass
class Failure:
    """An error as an SDK raised it. `body` is the API's error object, `headers` those of an error response."""

    name: str
    message: str
    status: int | None = None
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Seen:
    """What an application saw of an answer. `usage` is that of the last chunk."""

    text: str = ""
    reasoning: str = ""
    tool: str = ""
    chunks: int = 0
    finish: str | None = None
    usage: dict[str, Any] | None = None
    models: list[str] = field(default_factory=list)
    error: Failure | None = None

    def take(self, chunk: ChatCompletionChunk) -> str:
        """Reads one chunk, and tells the text in it."""
        self.chunks += 1
        self.usage = chunk.usage.to_dict() if chunk.usage is not None else None
        text = content(chunk)
        self.text += text
        if chunk.choices:
            choice = chunk.choices[0]
            self.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                self.tool += (call.function.name or "") + (call.function.arguments or "")
            self.finish = self.finish or choice.finish_reason
        return text

    def fail(self, error: openai.OpenAIError) -> None:
        name, body = type(error).__name__, getattr(error, "body", None)
        if isinstance(error, openai.APIStatusError):
            self.error = Failure(name, error.message, error.status_code, body, dict(error.response.headers))
        else:
            self.error = Failure(name, str(error), body=body)


@dataclass(frozen=True)
class Ask:
    """What an application asks for. `do` names a scenario of `sdk.mjs` as well."""

    prompt: str = "Hello"
    do: Literal["stream", "complete", "models", "model"] = "stream"
    model: str = "demo"
    usage: bool = False
    retries: int = 0

    @property
    def messages(self) -> list[ChatCompletionMessageParam]:
        return [{"role": "user", "content": self.prompt}]


Told = Callable[[str], None]


class Reader(Protocol):
    """Asks the API under `url`. `told` is called with each piece of text at the moment the application has it."""

    async def __call__(self, url: str, ask: Ask = ..., told: Told = ...) -> Seen: ...


def _nobody(text: str) -> None:
    pass


def content(chunk: ChatCompletionChunk) -> str:
    return (chunk.choices[0].delta.content or "") if chunk.choices else ""


def sync_client(url: str, **more: Any) -> openai.OpenAI:
    defaults: dict[str, Any] = {"api_key": "sk-test", "max_retries": 0, "timeout": DEADLINE}
    return openai.OpenAI(base_url=f"{url}/v1", **(defaults | more))


def async_client(url: str, **more: Any) -> openai.AsyncOpenAI:
    defaults: dict[str, Any] = {"api_key": "sk-test", "max_retries": 0, "timeout": DEADLINE}
    return openai.AsyncOpenAI(base_url=f"{url}/v1", **(defaults | more))


def _read_sync(url: str, ask: Ask, told: Told) -> Seen:
    seen = Seen()
    with sync_client(url, max_retries=ask.retries) as client:
        try:
            if ask.do == "models":
                seen.models = [model.id for model in client.models.list()]
            elif ask.do == "model":
                seen.models = [client.models.retrieve(ask.model).id]
            elif ask.do == "complete":
                completion = client.chat.completions.create(model=ask.model, messages=ask.messages)
                seen.text, seen.finish = completion.choices[0].message.content or "", completion.choices[0].finish_reason
                seen.usage = completion.usage.to_dict() if completion.usage is not None else None
            else:
                for chunk in client.chat.completions.create(
                    model=ask.model,
                    messages=ask.messages,
                    stream=True,
                    stream_options={"include_usage": True} if ask.usage else openai.omit,
                ):
                    if text := seen.take(chunk):
                        told(text)
        except openai.OpenAIError as error:
            seen.fail(error)
    return seen


async def read_with_python_sync(url: str, ask: Ask = Ask(), told: Told = _nobody) -> Seen:
    return await asyncio.to_thread(_read_sync, url, ask, partial(asyncio.get_running_loop().call_soon_threadsafe, told))


async def read_with_python_async(url: str, ask: Ask = Ask(), told: Told = _nobody) -> Seen:
    seen = Seen()
    async with async_client(url, max_retries=ask.retries) as client:
        try:
            if ask.do == "models":
                seen.models = [model.id async for model in client.models.list()]
            elif ask.do == "model":
                seen.models = [(await client.models.retrieve(ask.model)).id]
            elif ask.do == "complete":
                completion = await client.chat.completions.create(model=ask.model, messages=ask.messages)
                seen.text, seen.finish = completion.choices[0].message.content or "", completion.choices[0].finish_reason
                seen.usage = completion.usage.to_dict() if completion.usage is not None else None
            else:
                async for chunk in await client.chat.completions.create(
                    model=ask.model,
                    messages=ask.messages,
                    stream=True,
                    stream_options={"include_usage": True} if ask.usage else openai.omit,
                ):
                    if text := seen.take(chunk):
                        told(text)
        except openai.OpenAIError as error:
            seen.fail(error)
    return seen


class Child:
    """A process that is ended, if it has not ended by itself, when its block is left."""

    def __init__(self, *command: str | Path) -> None:
        self._command = command

    async def __aenter__(self) -> Child:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, cwd=NODE_DIRECTORY, limit=1 << 24
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.communicate()

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def signal(self, number: Signals) -> None:
        self._process.send_signal(number)

    async def read_until(self, separator: bytes) -> bytes:
        async with asyncio.timeout(DEADLINE):
            return await self.stdout.readuntil(separator)

    async def end(self) -> tuple[int, bytes]:
        """Closes its input and waits for its end: its exit status, and the rest of what it printed."""
        async with asyncio.timeout(DEADLINE):
            rest, _ = await self._process.communicate()
            return await self._process.wait(), rest


def node(url: str, scenario: str, **options: Any) -> Child:
    return Child(NODE, "sdk.mjs", f"{url}/v1", scenario, msgspec.json.encode(options).decode())


def curl(url: str, ask: Ask, *more: str) -> Child:
    """`curl -N`, as the documentation of every API has it."""
    request: dict[str, Any] = {"model": ask.model, "messages": ask.messages, "stream": True}
    if ask.usage:
        request["stream_options"] = {"include_usage": True}
    headers = ("-H", "Authorization: Bearer sk-test", "-H", "Content-Type: application/json")
    data = msgspec.json.encode(request).decode()
    return Child("curl", f"{url}/v1/chat/completions", "-sS", *more, *headers, "-N", "-d", data)


async def read_with_node(url: str, ask: Ask = Ask(), told: Told = _nobody) -> Seen:
    scenario = "stream_usage" if ask.usage else ask.do
    async with node(url, scenario, prompt=ask.prompt, model=ask.model, retries=ask.retries, live=True) as child:
        while "delta" in (line := msgspec.json.decode(await child.read_until(b"\n"))):
            told(line["delta"])
        assert await child.end() == (0, b"")
    return msgspec.convert(line, Seen)


async def read_with_curl(url: str, ask: Ask = Ask(), told: Told = _nobody) -> Seen:
    """Reads to the end marker; an application that uses curl has to know the format."""
    seen = Seen()
    async with curl(url, ask) as child:
        while (event := await child.read_until(b"\n\n")) != DONE:
            chunk = ChatCompletionChunk.construct(**msgspec.json.decode(event.removeprefix(b"data: ")))
            if text := seen.take(chunk):
                told(text)
        assert await child.end() == (0, b"")
    return seen


SDKS: dict[str, Reader] = {
    "python-sync": read_with_python_sync,
    "python-async": read_with_python_async,
    "node": read_with_node,
}
READERS: dict[str, Reader] = SDKS | {"curl": read_with_curl}

Leave = Callable[[], None]
Leaver = Callable[[str], AbstractAsyncContextManager[Leave]]
"""Runs the application while its block lasts. It leaves when it has the first text, or else when it is told to."""


async def _first_text(stream: openai.AsyncStream[ChatCompletionChunk]) -> None:
    async for chunk in stream:
        if content(chunk):
            break


def _create(client: openai.AsyncOpenAI) -> Awaitable[openai.AsyncStream[ChatCompletionChunk]]:
    return client.chat.completions.create(model="demo", messages=Ask().messages, stream=True)


def _create_sync(client: openai.OpenAI) -> openai.Stream[ChatCompletionChunk]:
    return client.chat.completions.create(model="demo", messages=Ask().messages, stream=True)
