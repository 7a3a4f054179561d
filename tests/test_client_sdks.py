"""What the SDKs of OpenAI, Anthropic and Google make of keys and limits: each raises its own exception, and waits."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, NamedTuple

import anthropic
import msgspec
import openai
import pytest
from google import genai
from google.genai import errors as genai_errors

from sseproxy import config
from sseproxy.config.values import Rate
from sseproxy.relay import clients

from .clients import NODE, Child
from .conftest import PlayScript, StartProxy
from .harness import Peer, RunningProxy, ScriptedUpstream
from .test_clients import KEY, OTHER, client

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
ANSWERS = {
    "chat": {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    },
    "messages": {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "Hi"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1, "output_tokens": 1},
    },
    "generate": {
        "candidates": [{"content": {"role": "model", "parts": [{"text": "Hi"}]}, "finishReason": "STOP"}],
        "usageMetadata": {"promptTokenCount": 1, "candidatesTokenCount": 1},
    },
}


async def answers(api: Peer) -> None:
    while True:
        asked = await api.message()
        assert "sseproxy_" not in str(asked.fields) + asked.start_line
        (body,) = [answer for name, answer in ANSWERS.items() if name in asked.start_line]
        encoded = msgspec.json.encode(body)
        api.send(HEAD % (len(encoded), encoded))


class Failed(NamedTuple):
    """The name of an exception, and the status that it has."""

    name: str
    status: int


Ask = Callable[[str, str, int], Awaitable[str | Failed]]
"""Asks the API under a URL with a key, with so many retries. Returns the answer's text, or how it failed."""


def _openai(url: str, key: str, retries: int) -> str | Failed:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries) as sdk:
        try:
            made = sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
        except openai.APIStatusError as error:
            return Failed(type(error).__name__, error.status_code)
        return made.choices[0].message.content or ""


def _azure(url: str, key: str, retries: int) -> str | Failed:
    with openai.AzureOpenAI(base_url=f"{url}/v1", api_key=key, api_version="1", max_retries=retries) as sdk:
        try:
            made = sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
        except openai.APIStatusError as error:
            return Failed(type(error).__name__, error.status_code)
        return made.choices[0].message.content or ""


def _anthropic(url: str, key: str, retries: int) -> str | Failed:
    with anthropic.Anthropic(base_url=url, api_key=key, max_retries=retries) as sdk:
        try:
            made = sdk.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "Hi"}])
        except anthropic.APIStatusError as error:
            return Failed(type(error).__name__, error.status_code)
        (block,) = made.content
        assert block.type == "text"
        return block.text


def _google(url: str, key: str, retries: int) -> str | Failed:
    retry = genai.types.HttpRetryOptions(attempts=8 * retries + 1, initial_delay=0.5, max_delay=1.0)
    options = genai.types.HttpOptions(base_url=url, api_version="v1", retry_options=retry)
    with genai.Client(api_key=key, http_options=options) as sdk:
        try:
            return sdk.models.generate_content(model="m", contents="Hi").text or ""
        except genai_errors.APIError as error:
            return Failed(type(error).__name__, error.code)


def in_thread(ask: Callable[[str, str, int], str | Failed]) -> Ask:
    @functools.wraps(ask)
    async def asks(url: str, key: str, retries: int) -> str | Failed:
        return await asyncio.to_thread(ask, url, key, retries)

    return asks


SCRIPT = """\
import OpenAI from "openai";
const client = new OpenAI({ baseURL: "@URL@/v1", apiKey: "@KEY@", maxRetries: @RETRIES@ });
try {
  const made = await client.chat.completions.create({ model: "m", messages: [{ role: "user", content: "Hi" }] });
  console.log(JSON.stringify(made.choices[0].message.content));
} catch (error) {
  console.log(JSON.stringify([error.constructor.name, error.status]));
}
"""


async def _node(url: str, key: str, retries: int) -> str | Failed:
    source = SCRIPT.replace("@URL@", url).replace("@KEY@", key).replace("@RETRIES@", str(retries))
    async with Child(NODE, "--input-type=module", "-e", source) as child:
        _, printed = await child.end()
    found: Any = msgspec.json.decode(printed)
    return found if isinstance(found, str) else Failed(*found)


GOOGLE = in_thread(_google)
USUAL = ("AuthenticationError", "PermissionDeniedError", "RateLimitError")
SDKS: dict[str, tuple[Ask, tuple[str, str, str]]] = {
    "openai for Python": (in_thread(_openai), USUAL),
    "openai for Azure": (in_thread(_azure), USUAL),
    "openai for Node": (_node, USUAL),
    "anthropic": (in_thread(_anthropic), USUAL),
    "google-genai": (GOOGLE, ("ClientError",) * 3),
}
EACH = pytest.mark.parametrize(("ask", "names"), [*SDKS.values()], ids=[*SDKS])


@pytest.fixture
async def api(play: PlayScript) -> ScriptedUpstream:
    return await play(answers)


async def in_front_of(
    api: ScriptedUpstream, start: StartProxy, limits: config.ClientLimits, **more: Any
) -> RunningProxy:
    return await start(api.url, api_key="sk-up", clients=(client(limits=limits, **more),))


@EACH
async def test_a_right_key_is_let_in_and_a_wrong_one_raises_what_the_sdk_has_for_it(
    api: ScriptedUpstream, start: StartProxy, ask: Ask, names: tuple[str, str, str]
) -> None:
    proxy = await in_front_of(api, start, config.ClientLimits())
    assert await ask(proxy.url, KEY, 0) == "Hi"
    assert await ask(proxy.url, OTHER, 2) == Failed(names[0], 401)
    await proxy.idle()
    # It is not tried again.
    assert proxy.sample("requests_rejected_total", reason="invalid_api_key") == 1


@EACH
async def test_a_model_that_is_not_allowed_raises_what_the_sdk_has_for_it(
    api: ScriptedUpstream, start: StartProxy, ask: Ask, names: tuple[str, str, str]
) -> None:
    proxy = await in_front_of(api, start, config.ClientLimits(), models=("other",))
    assert await ask(proxy.url, KEY, 0) == Failed(names[1], 403)


class Clock:
    """Stands still, or goes on from when it is first looked at."""

    def __init__(self, now: float, *, goes: bool) -> None:
        self._now = now
        self._goes = goes
        self._begun: float | None = None

    def __call__(self) -> float:
        if self._begun is None:
            self._begun = perf_counter()
        return self._now + (perf_counter() - self._begun if self._goes else 0.0)


@EACH
async def test_above_a_limit_an_sdk_waits_as_long_as_told_and_is_let_in(
    api: ScriptedUpstream, start: StartProxy, ask: Ask, names: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await in_front_of(api, start, config.ClientLimits(requests=Rate(4, 60)))
    assert proxy.worker.proxy.clients is not None
    limited = proxy.worker.proxy.clients.with_key(KEY.encode())
    assert limited is not None
    assert limited._requests is not None
    limited._requests[1].add(4, 30.0)
    # After 7.5 seconds of a minute, an eighth of the last minute is forgotten.
    monkeypatch.setattr(clients, "perf_counter", Clock(66.5, goes=False))
    assert await ask(proxy.url, KEY, 0) == Failed(names[2], 429)
    monkeypatch.setattr(clients, "perf_counter", Clock(66.5, goes=True))
    assert await ask(proxy.url, KEY, 2) == "Hi"
    await proxy.idle()
    refused = proxy.sample("client_limited_total", limit="requests")
    # Google's does not look at the time that it is told.
    assert refused == 2 or ask is GOOGLE


def _openai_without(url: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as sdk:
        with pytest.raises(openai.AuthenticationError) as caught:
            sdk.models.list(extra_headers={"Authorization": openai.omit})
    return str(caught.value)


def _anthropic_without(url: str) -> str:
    without = {"Authorization": anthropic.Omit()}
    # The type of `default_headers` is narrower than what is taken.
    with anthropic.Anthropic(base_url=url, api_key=None, max_retries=0, default_headers=without) as sdk:  # type: ignore[arg-type]
        with pytest.raises(anthropic.AuthenticationError) as caught:
            sdk.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "Hi"}])
    return str(caught.value)


def _google_without(url: str) -> str:
    options = genai.types.HttpOptions(base_url=url, api_version="v1", headers={"x-goog-api-key": ""})
    with genai.Client(api_key="unused", http_options=options) as sdk:
        with pytest.raises(genai_errors.ClientError) as caught:
            sdk.models.generate_content(model="m", contents="Hi")
    assert caught.value.code == 401
    return str(caught.value)


@pytest.mark.parametrize("ask", [_openai_without, _anthropic_without, _google_without])
async def test_without_a_key_an_sdk_that_sends_none_is_told_so(
    api: ScriptedUpstream, start: StartProxy, ask: Callable[[str], str]
) -> None:
    proxy = await in_front_of(api, start, config.ClientLimits())
    assert "This request needs a key, in Authorization: Bearer, x-api-key, " in await asyncio.to_thread(ask, proxy.url)
    assert proxy.sample("requests_rejected_total", reason="missing_api_key") == 1
    assert not api.connections


async def test_without_a_key_the_one_for_node_is_told_so(api: ScriptedUpstream, start: StartProxy) -> None:
    proxy = await in_front_of(api, start, config.ClientLimits())
    source = SCRIPT.replace("maxRetries", "defaultHeaders: { Authorization: null }, maxRetries")
    source = source.replace("@URL@", proxy.url).replace("@KEY@", "unused").replace("@RETRIES@", "0")
    async with Child(NODE, "--input-type=module", "-e", source) as child:
        _, printed = await child.end()
    assert msgspec.json.decode(printed) == ["AuthenticationError", 401]
    assert proxy.sample("requests_rejected_total", reason="missing_api_key") == 1
