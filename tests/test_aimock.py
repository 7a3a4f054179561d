"""A mock server that is not ours: applications see the same of it with and without the proxy, or why they do not."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator

import msgspec
import pytest

from sseproxy.errors import Truncated

from .clients import NODE, NODE_DIRECTORY, SDKS, Ask, Reader
from .conftest import StartProxy
from .harness import RunningProxy

TEXT = "The quick brown fox jumps over the lazy dog. Größe, 東京!"
USAGE = {"prompt_tokens": 11, "completion_tokens": 17, "total_tokens": 28}
CUT = str(Truncated())
EACH_SDK = pytest.mark.parametrize("read", [SDKS["python-async"], SDKS["node"]], ids=["python-async", "node"])


@pytest.fixture(scope="module")
def aimock() -> Iterator[str]:
    """The mock's address."""
    with subprocess.Popen(
        [str(NODE), "aimock.mjs"], cwd=NODE_DIRECTORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{msgspec.json.decode(process.stdout.readline())['port']}"
        finally:
            process.kill()


@pytest.fixture
async def proxied(aimock: str, start: StartProxy) -> RunningProxy:
    """A proxy in front of the mock."""
    return await start(aimock)


@EACH_SDK
@pytest.mark.parametrize("prompt", ["text", "paced", "reasoning", "tool"])
async def test_an_answer_is_the_same_with_and_without_the_proxy(
    aimock: str, proxied: RunningProxy, read: Reader, prompt: str
) -> None:
    ask = Ask(prompt, usage=True)
    direct, seen = await asyncio.gather(read(aimock, ask), read(proxied.url, ask))
    assert seen == direct
    assert seen.error is None
    assert seen.text == ("" if prompt == "tool" else TEXT)
    assert seen.reasoning == ("Let me think." if prompt == "reasoning" else "")
    assert seen.tool == ('weather{"city":"Köln"}' if prompt == "tool" else "")
    assert seen.finish == ("tool_calls" if prompt == "tool" else "stop")
    assert seen.usage is not None
    assert prompt == "tool" or seen.usage == USAGE
    assert await proxied.ended() == {"completed": 1}
    assert proxied.sample("tokens_total", type="input") == seen.usage["prompt_tokens"]
    assert proxied.sample("tokens_total", type="output") == seen.usage["completion_tokens"]
    assert proxied.sample("time_to_first_token_seconds_count") == 1
    assert proxied.sample("time_per_output_token_seconds_count") == 1
    assert proxied.sample("streams_without_usage_total") == 0
    assert proxied.sample("stream_events_garbled_total") == 0


async def test_the_time_to_the_first_token_is_the_servers(proxied: RunningProxy) -> None:
    """The mock waits 200 ms with the first and 20 ms with each other of the twelve tokens."""
    await SDKS["python-async"](proxied.url, Ask("paced"))
    await proxied.ended()
    assert 0.15 < proxied.sample("time_to_first_token_seconds_sum") < 2
    assert proxied.sample("inter_token_latency_seconds_count") == 10
    assert 0.1 < proxied.sample("inter_token_latency_seconds_sum") < 2


@EACH_SDK
@pytest.mark.parametrize(("prompt", "name"), [("limited", "RateLimitError"), ("broken", "InternalServerError")])
async def test_an_error_is_the_same_with_and_without_the_proxy(
    aimock: str, proxied: RunningProxy, read: Reader, prompt: str, name: str
) -> None:
    direct, seen = await asyncio.gather(read(aimock, Ask(prompt)), read(proxied.url, Ask(prompt)))
    assert direct.error is not None
    assert seen.error is not None
    assert seen.error.name == direct.error.name == name
    assert (seen.error.message, seen.error.status) == (direct.error.message, direct.error.status)
    assert seen.error.body == direct.error.body
    # What concerns one connection or one moment differs.
    for name in ("connection", "date", "keep-alive", "transfer-encoding", "x-request-id"):
        seen.error.headers.pop(name, None)
        direct.error.headers.pop(name, None)
    assert seen.error.headers == direct.error.headers | {"via": "1.1 sseproxy"}
    assert seen.error.headers.get("retry-after") == ("7" if prompt == "limited" else None)
    assert await proxied.ended() == {"completed": 1}
    assert proxied.sample("time_to_first_token_seconds_count") == 0


@EACH_SDK
@pytest.mark.parametrize("prompt", ["truncated", "disconnected"])
async def test_a_stream_that_breaks_off_says_why_with_the_proxy(
    aimock: str, proxied: RunningProxy, read: Reader, prompt: str
) -> None:
    direct, seen = await asyncio.gather(read(aimock, Ask(prompt)), read(proxied.url, Ask(prompt)))
    assert direct.error is not None
    assert direct.error.body is None
    assert seen.error is not None
    assert seen.error.name == "APIError"
    assert seen.error.body is not None
    assert (seen.error.body["message"], seen.error.body["code"]) == (CUT, "upstream_disconnected")
    assert seen.text != ""
    assert TEXT.startswith(seen.text)
    assert prompt == "disconnected" or seen.text == direct.text
    assert await proxied.ended() == {"truncated": 1}
    assert proxied.sample("time_to_first_token_seconds_count") == 1
    assert proxied.sample("streams_active") == 0


@EACH_SDK
async def test_an_upstream_that_hangs_up_unanswered_is_a_bad_gateway(proxied: RunningProxy, read: Reader) -> None:
    seen = await read(proxied.url, Ask("unanswered"))
    assert seen.error is not None
    assert (seen.error.name, seen.error.status) == ("InternalServerError", 502)
    assert seen.error.body is not None
    assert seen.error.body["code"] == "upstream_disconnected"
    assert await proxied.ended() == {"upstream_error": 1}
    assert proxied.sample("time_to_first_token_seconds_count") == 0
