from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import openai
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from openai.types.chat import ChatCompletionUserMessageParam

from sseproxy import demo
from sseproxy.demo import MODEL, TEXT, Pace, answer, backend

AT_ONCE = Pace(ttft=0, rate=math.inf, tokens=7)
SEVEN = "".join(answer(7))
WORDS: list[ChatCompletionUserMessageParam] = [
    {"role": "user", "content": "two words"},
    {"role": "user", "content": [{"type": "text", "text": " and three  more "}]},
]


class Watch:
    """Sees the first handler of an application begin and end."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.ended = asyncio.Event()

    def on(self, app: web.Application) -> web.Application:
        @web.middleware
        async def watch(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.running.set()
            try:
                return await handler(request)
            finally:
                self.ended.set()

        app.middlewares.append(watch)
        return app


@contextlib.asynccontextmanager
async def served(app: web.Application, *, handler_cancellation: bool = True) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=handler_cancellation)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/v1"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def sdk(pace: Pace = AT_ONCE) -> AsyncIterator[openai.AsyncOpenAI]:
    async with served(backend(pace)) as url:
        async with openai.AsyncOpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
            yield client


async def test_stream() -> None:
    async with sdk() as client:
        stream = await client.chat.completions.create(model="m", messages=WORDS, stream=True)
        assert stream.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        chunks = [chunk async for chunk in stream]
    first, *deltas, last = chunks
    assert first.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in deltas] == list(answer(7))
    assert last.choices[0].delta.to_dict() == {}
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 8 + ["stop"]
    assert {(chunk.id, chunk.model, chunk.object) for chunk in chunks} == {(first.id, "m", "chat.completion.chunk")}
    assert first.id.startswith("chatcmpl-")
    assert not any("usage" in chunk.to_dict() for chunk in chunks)


async def test_stream_with_usage() -> None:
    async with sdk() as client:
        stream = await client.chat.completions.create(
            model="m", messages=WORDS, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = [chunk async for chunk in stream]
    assert [chunk.to_dict()["usage"] for chunk in chunks] == [None] * 9
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.to_dict() == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


async def test_every_event_is_a_write_of_its_own_and_done_is_the_last() -> None:
    request = {"messages": [], "stream": True}
    pace = Pace(ttft=0, rate=1000, tokens=3)
    async with served(backend(pace)) as url, aiohttp.ClientSession() as session:
        async with session.post(f"{url}/chat/completions", json=request) as response:
            events = [data async for data, _ in response.content.iter_chunks()]
    assert all(event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2 for event in events)
    assert len(events) == 1 + 3 + 1 + 1
    assert events[-1] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_a_request_bounds_its_answer(limit: str) -> None:
    async with sdk() as client:
        bounded = await client.chat.completions.create(model="m", messages=WORDS, extra_body={limit: 2})
        unbounded = await client.chat.completions.create(model="m", messages=WORDS, extra_body={limit: 100})
    assert bounded.choices[0].message.content == "".join(answer(2))
    assert bounded.choices[0].finish_reason == "length"
    assert unbounded.choices[0].message.content == SEVEN
    assert unbounded.choices[0].finish_reason == "stop"


async def test_complete() -> None:
    async with sdk() as client:
        completion = await client.chat.completions.create(model="m", messages=WORDS)
    assert completion.object == "chat.completion"
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].message.content == SEVEN
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.to_dict() == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


async def test_completions_stream() -> None:
    async with sdk() as client:
        stream = await client.completions.create(
            model="m", prompt="three more words", stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks] == [*answer(7), ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 7 + ["stop"]
    assert chunks[0].id.startswith("cmpl-")
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.to_dict() == {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}


async def test_completions_complete() -> None:
    async with sdk() as client:
        completion = await client.completions.create(model="m", prompt=["a b", "c"])
    assert completion.object == "text_completion"
    assert completion.choices[0].text == SEVEN
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 3


async def test_models() -> None:
    async with sdk() as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
            await client.models.retrieve("other")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat/completions", b"{", "truncated"),
        ("chat/completions", b'{"messages":[{"role":"\xff"}]}', "utf-8"),
        ("chat/completions", b'{"messages":[],"x":' + b"[" * 100_000, "recursion"),
        ("chat/completions", b"{}", "missing required field `messages`"),
        ("chat/completions", b'{"messages":"hello"}', r"Expected `array`, got `str` - at `\$.messages`"),
        ("chat/completions", b'{"messages":[],"stream":"yes"}', r"got `str` - at `\$.stream`"),
        ("chat/completions", b'{"messages":[],"max_tokens":0}', r">= 1 - at `\$.max_tokens`"),
        ("completions", b"{}", "missing required field `prompt`"),
    ],
)
async def test_a_request_that_cannot_be_read(path: str, body: bytes, message: str) -> None:
    async with sdk() as client:
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            await client.post(f"/{path}", content=body, cast_to=object)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.response.headers["content-type"].startswith("application/json")


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/nothing", 404), ("GET", "/completions", 405)])
async def test_a_path_or_method_that_does_not_exist(method: str, path: str, status: int) -> None:
    async with served(backend()) as url, aiohttp.ClientSession() as session:
        async with session.request(method, url + path) as response:
            assert response.status == status
            assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_a_late_token_does_not_delay_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float] = []

    async def late(deadline: float, until: Callable[[float], Awaitable[None]] = demo._until) -> None:
        deadlines.append(deadline)
        await until(deadline + 0.004)

    monkeypatch.setattr(demo, "_until", late)
    start = asyncio.get_running_loop().time()
    async with sdk(Pace(ttft=0.05, rate=100, tokens=6)) as client:
        stream = await client.chat.completions.create(model="m", messages=WORDS, stream=True)
        assert len([chunk async for chunk in stream]) == 8
    assert deadlines[0] > start + 0.05
    assert [deadline - deadlines[0] for deadline in deadlines] == pytest.approx([0, 0.01, 0.02, 0.03, 0.04, 0.05])
    assert asyncio.get_running_loop().time() > deadlines[-1]


@pytest.mark.parametrize(
    ("pace", "chunks"),
    [
        pytest.param(Pace(ttft=3600), 1, id="before the first token"),
        pytest.param(Pace(ttft=0, rate=100, tokens=1_000_000), 3, id="between tokens"),
    ],
)
async def test_a_client_that_leaves_ends_the_handler(pace: Pace, chunks: int) -> None:
    watch = Watch()
    async with served(watch.on(backend(pace))) as url:
        async with openai.AsyncOpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
            stream = await client.chat.completions.create(model="m", messages=WORDS, stream=True)
            for _ in range(chunks):
                await anext(stream)
            assert not watch.ended.is_set()
            await stream.close()
            await watch.ended.wait()


async def test_a_client_that_leaves_before_its_answer_ends_the_handler() -> None:
    watch = Watch()
    async with served(watch.on(backend(Pace(ttft=3600)))) as url:
        async with openai.AsyncOpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
            waiting = asyncio.ensure_future(client.chat.completions.create(model="m", messages=WORDS))
            await watch.running.wait()
            assert not watch.ended.is_set()
            waiting.cancel()
            await watch.ended.wait()


async def test_a_write_to_a_client_that_has_left_ends_the_handler(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch()
    app = watch.on(backend(Pace(ttft=0, rate=1000, tokens=1_000_000)))
    async with served(app, handler_cancellation=False) as url:
        async with openai.AsyncOpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
            stream = await client.chat.completions.create(model="m", messages=WORDS, stream=True)
            await anext(stream)
            await stream.close()
            await watch.ended.wait()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_text_begins_again_after_its_end() -> None:
    assert "".join(answer(2 * len(TEXT.split()))) == f"{TEXT} {TEXT}"
