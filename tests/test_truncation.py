"""A stream that ends too early raises in the SDK of its API, and what it raises carries our message."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import anthropic
import openai
import pytest

from .conftest import PlayScript, StartProxy
from .harness import STREAM_HEAD, Peer, chunk, delta


def typed(document: dict[str, object]) -> bytes:
    return f"event: {document['type']}\ndata: {json.dumps(document)}\n\n".encode()


RESPONSE: dict[str, object] = {"id": "r", "object": "response", "status": "in_progress", "output": [], "usage": None}
MESSAGE: dict[str, object] = {"id": "m", "type": "message", "role": "assistant", "content": [], "usage": {}}
EVENTS = {
    "chat": [delta("Hi")],
    "responses": [
        typed({"type": "response.created", "sequence_number": 0, "response": RESPONSE}),
        typed({"type": "response.output_text.delta", "sequence_number": 1, "item_id": "i", "delta": "Hi"}),
    ],
    "messages": [
        typed({"type": "message_start", "message": MESSAGE}),
        typed({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}}),
    ],
}


async def chat(url: str) -> AsyncIterator[object]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        async for event in await client.chat.completions.create(model="m", stream=True, messages=[]):
            yield event


async def responses(url: str) -> AsyncIterator[object]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        async for event in await client.responses.create(model="m", stream=True, input="Hello"):
            yield event


async def messages(url: str) -> AsyncIterator[object]:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as client:
        async for event in await client.messages.create(
            model="m", max_tokens=9, stream=True, messages=[{"role": "user", "content": "Hello"}]
        ):
            yield event


CLIENTS: dict[str, Callable[[str], AsyncIterator[object]]] = {
    "chat": chat,
    "responses": responses,
    "messages": messages,
}


@pytest.mark.parametrize("api", CLIENTS)
@pytest.mark.parametrize("end", [Peer.close, Peer.reset], ids=["fin", "rst"])
async def test_a_cut_between_events_raises_with_our_message(
    start: StartProxy, play: PlayScript, api: str, end: Callable[[Peer], None]
) -> None:
    async def cut(peer: Peer) -> None:
        await peer.message()
        peer.send(STREAM_HEAD, *map(chunk, EVENTS[api]))
        await peer.drain()
        end(peer)

    upstream = await play(cut)
    proxy = await start(upstream.url)
    received = []
    with pytest.raises((openai.APIError, anthropic.APIError)) as raised:
        async for event in CLIENTS[api](proxy.url):
            received.append(event)  # noqa: PERF401 - what came before the error counts
    assert "closed the connection before the response was complete" in str(raised.value)
    if end is Peer.close:
        assert len(received) == len(EVENTS[api])
    assert await proxy.ended() == {"truncated": 1}


@pytest.mark.parametrize("api", CLIENTS)
async def test_a_cut_within_an_event_raises_as_well(start: StartProxy, play: PlayScript, api: str) -> None:
    async def cut(peer: Peer) -> None:
        await peer.message()
        peer.send(STREAM_HEAD, *map(chunk, EVENTS[api]), chunk(EVENTS[api][-1][:-10]))
        await peer.drain()
        peer.close()

    upstream = await play(cut)
    proxy = await start(upstream.url)
    # Anthropic's SDK lets its transport's exception through, OpenAI's wraps it.
    with pytest.raises(Exception, match=r"incomplete chunked read|Connection error") as raised:
        async for _ in CLIENTS[api](proxy.url):
            pass
    assert "incomplete chunked read" in f"{raised.value!r} {raised.value.__cause__!r}"
    assert await proxy.ended() == {"truncated": 1}


@pytest.mark.parametrize("api", CLIENTS)
@pytest.mark.parametrize("phase", ["idle", "total"])
async def test_a_timeout_raises_with_its_own_message(start: StartProxy, play: PlayScript, api: str, phase: str) -> None:
    async def fall_silent(peer: Peer) -> None:
        await peer.message()
        peer.send(STREAM_HEAD, *map(chunk, EVENTS[api]))
        await peer.rest()

    upstream = await play(fall_silent)
    proxy = await start(upstream.url, timeouts={phase: 0.3})
    with pytest.raises((openai.APIError, anthropic.APIError)) as raised:
        async for _ in CLIENTS[api](proxy.url):
            pass
    assert "within 0.3 seconds" in str(raised.value)
    assert await proxy.ended() == {f"upstream_timeout_{phase}": 1}


async def test_the_error_event_of_responses_has_its_number_and_its_fields_at_the_top(
    start: StartProxy, play: PlayScript
) -> None:
    async def cut(peer: Peer) -> None:
        await peer.message()
        peer.send(STREAM_HEAD, *map(chunk, EVENTS["responses"]))
        await peer.drain()
        peer.close()

    upstream = await play(cut)
    proxy = await start(upstream.url)
    client = await proxy.connect()
    client.send(b"POST /v1/responses HTTP/1.1\r\nHost: proxy\r\nContent-Length: 2\r\n\r\n{}")
    await client.read_until(EVENTS["responses"][-1] + b"\r\n")
    _, _, event = (await client.rest())[0].partition(b"\r\n")
    assert event.startswith(b"event: error\ndata: ")
    document = json.loads(event[len(b"event: error\ndata: ") :])
    assert document["sequence_number"] == 2
    assert (document["code"], document["param"]) == ("upstream_disconnected", None)
    assert document["message"] == document["error"]["message"]
