"""An OpenAI-compatible backend without a model: every answer is the same text, sent at the speed of a model.

`sseproxy demo`, the tests and the benchmarks run against it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Annotated, Any, ClassVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

MODEL = "demo"
# 60 words. This is the default length of an answer, so it ends with a complete sentence.
TEXT = (
    "A language model writes one token at a time, and streaming shows each token when it is written. "
    "The first token tells you how long you waited. The gaps after it tell you how fast the model is. "
    "A good proxy changes nothing: what comes in goes out at once. "
    "When the reader leaves, the model is told to stop."
)
_MAX_BODY = 64 * 1024 * 1024


@dataclass(frozen=True)
class Pace:
    """The rhythm of every answer. With `ttft=0` and `rate=math.inf` there are no pauses at all."""

    ttft: float = 0.5  # seconds from the request to the first token
    rate: float = 30.0  # tokens per second from there on
    tokens: int = 60  # the length of an answer, unless the request's limit is lower

    def due(self, index: int) -> float:
        """Seconds from the request to the token at `index`."""
        return self.ttft + index / self.rate


_DEFAULT_PACE = Pace()
_PACE = web.AppKey("pace", Pace)


def backend(pace: Pace = _DEFAULT_PACE) -> web.Application:
    """The backend. Run it with `handler_cancellation=True`, so that it stops immediately when the client leaves."""
    app = web.Application(middlewares=[_errors], client_max_size=_MAX_BODY)
    app[_PACE] = pace
    app.router.add_post("/v1/chat/completions", partial(_complete, _Chat))
    app.router.add_post("/v1/completions", partial(_complete, _Completion))
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/v1/models/{id}", _model)
    return app


def answer(tokens: int) -> Iterator[str]:
    """Yields so many tokens. A token is a word with the space before it. After the end, the text starts again."""
    for index, word in enumerate(islice(cycle(TEXT.split()), tokens)):
        yield f" {word}" if index else word


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


_Limit = Annotated[int, msgspec.Meta(ge=1)]


class _Request(msgspec.Struct, kw_only=True):
    """The fields that both endpoints have. Other fields are ignored."""

    model: str = MODEL
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: _Limit | None = None
    max_completion_tokens: _Limit | None = None


class _ContentPart(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[_ContentPart] | None = None


class _Chat(_Request, kw_only=True):
    messages: list[_Message]

    id_prefix: ClassVar = "chatcmpl-"
    whole_object: ClassVar = "chat.completion"
    chunk_object: ClassVar = "chat.completion.chunk"
    opening: ClassVar = ({"delta": {"role": "assistant", "content": ""}},)
    closing: ClassVar[dict[str, Any]] = {"delta": {}}

    def texts(self) -> Iterator[str]:
        for message in self.messages:
            if isinstance(message.content, str):
                yield message.content
            else:
                yield from (part.text for part in message.content or ())

    @staticmethod
    def delta(text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    @staticmethod
    def whole(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


class _Completion(_Request, kw_only=True):
    prompt: str | list[str]

    id_prefix: ClassVar = "cmpl-"
    whole_object: ClassVar = "text_completion"
    chunk_object: ClassVar = "text_completion"
    opening: ClassVar = ()
    closing: ClassVar = {"text": ""}

    def texts(self) -> Iterable[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @staticmethod
    def delta(text: str) -> dict[str, Any]:
        return {"text": text}

    whole = delta


async def _complete(kind: type[_Chat | _Completion], request: web.Request) -> web.StreamResponse:
    start = asyncio.get_running_loop().time()
    try:
        asked = msgspec.json.decode(await request.read(), type=kind)
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    pace = request.app[_PACE]
    count = min(pace.tokens, asked.max_completion_tokens or asked.max_tokens or pace.tokens)
    finish_reason = "length" if count < pace.tokens else "stop"
    prompt_tokens = sum(len(text.split()) for text in asked.texts())
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}
    document: dict[str, Any] = {
        "id": asked.id_prefix + uuid.uuid4().hex,
        "object": asked.chunk_object if asked.stream else asked.whole_object,
        "created": int(time.time()),  # noqa: TID251
        "model": asked.model,
    }

    def choices(content: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return document | {"choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}]}

    if not asked.stream:
        await _until(start + pace.due(count - 1))
        return web.json_response(choices(asked.whole("".join(answer(count))), finish_reason) | {"usage": usage})

    include_usage = asked.stream_options is not None and asked.stream_options.include_usage
    if include_usage:
        document["usage"] = None
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    )

    async def send(chunk: dict[str, Any]) -> None:
        await response.write(b"data: " + msgspec.json.encode(chunk) + b"\n\n")

    with contextlib.suppress(ConnectionError):
        await response.prepare(request)
        for content in asked.opening:
            await send(choices(content))
        for index, token in enumerate(answer(count)):
            await _until(start + pace.due(index))
            await send(choices(asked.delta(token)))
        await send(choices(asked.closing, finish_reason))
        if include_usage:
            await send(document | {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
    return response


async def _until(deadline: float) -> None:
    """Waits until `deadline` on the clock of the event loop. Returns immediately if it has passed."""
    if (left := deadline - asyncio.get_running_loop().time()) > 0:
        await asyncio.sleep(left)


_MODEL_DOCUMENT = {"id": MODEL, "object": "model", "created": 0, "owned_by": "sseproxy"}


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [_MODEL_DOCUMENT]})


async def _model(request: web.Request) -> web.Response:
    if request.match_info["id"] != MODEL:
        raise web.HTTPNotFound(text=f"The model '{request.match_info['id']}' does not exist")
    return web.json_response(_MODEL_DOCUMENT)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives errors the same JSON body that OpenAI's API uses."""
    try:
        return await handler(request)
    except web.HTTPError as error:
        document = {"message": error.text, "type": "invalid_request_error", "param": None, "code": None}
        error.content_type = "application/json"
        error.body = msgspec.json.encode({"error": document})
        raise
