"""A stream that ends too early raises in the SDK of its API, and what it raises carries our message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import anthropic
import openai
import pytest

from .clients import NODE, NODE_DIRECTORY
from .conftest import PlayScript, StartProxy
from .harness import DEADLINE, DONE, LAST_CHUNK, STREAM_HEAD, Peer, RunningProxy, ScriptedUpstream, chunk, delta, until


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
PATHS = {"/v1/chat/completions": "chat", "/v1/responses": "responses", "/v1/messages": "messages"}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


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


class Way(NamedTuple):
    """A way of ending too early: what the upstream sends of its events, and does then; the proxy's timeouts."""

    sends: Callable[[list[bytes]], Iterable[bytes]]
    then: Callable[[Peer], None] | None
    says: str
    code: str
    outcome: str
    timeouts: dict[str, float]


def _all(events: list[bytes]) -> Iterable[bytes]:
    return map(chunk, events)


CLOSED = "closed the connection before the response was complete"
WAYS = {
    "fin": Way(_all, Peer.close, CLOSED, "upstream_disconnected", "truncated", {}),
    "rst": Way(_all, Peer.reset, CLOSED, "upstream_disconnected", "truncated", {}),
    "broken chunk": Way(
        lambda events: [*map(chunk, events), b"no size\r\n"],
        None,
        "not valid HTTP",
        "upstream_protocol",
        "upstream_error",
        {},
    ),
    "first token": Way(
        lambda events: [chunk(events[0])],
        None,
        "did not generate a first token within 0.3 seconds",
        "upstream_timeout",
        "upstream_timeout_first_token",
        {"first_token": 0.3},
    ),
    "idle": Way(
        _all,
        None,
        "did not send anything within 0.3 seconds",
        "upstream_timeout",
        "upstream_timeout_idle",
        {"idle": 0.3},
    ),
    "total": Way(
        _all, None, "did not finish within 1 seconds", "upstream_timeout", "upstream_timeout_total", {"total": 1.0}
    ),
    "drain": Way(_all, None, "shutting down", "draining", "drained", {}),
}


async def act(way: Way, peer: Peer) -> None:
    request = await peer.message()
    events = EVENTS[PATHS[request.start_line.split()[1].partition("?")[0]]]
    peer.send(STREAM_HEAD, *way.sends(events))
    await peer.drain()
    if way.then is not None:
        way.then(peer)
    await peer.rest()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", WAYS)
async def test_every_sdk_raises_with_our_message(start: StartProxy, play: PlayScript, name: str, reader: str) -> None:
    way = WAYS[name]
    upstream = await play(partial(act, way))
    proxy = await start(upstream.url, timeouts=way.timeouts)
    reading = asyncio.ensure_future(READERS[reader](proxy.url))
    if way.outcome == "drained":
        await until(lambda: proxy.sample("time_to_first_token_seconds_count") == len(APIS))
        proxy.worker.proxy.end_exchanges()
    ended = await reading
    assert [end.api for end in ended] == list(APIS)
    for end in ended:
        assert way.says in end.error, end
        assert "APIError" in end.error or "APIStatusError" in end.error, end
        if end.api in ("chat", "responses"):
            assert end.code == way.code
        if way.then is not Peer.reset:
            assert end.events >= (1 if name == "first token" else 2), end
    assert await proxy.ended() == {way.outcome: len(APIS)}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("reader", READERS)
async def test_every_sdk_raises_on_a_cut_within_an_event(start: StartProxy, play: PlayScript, reader: str) -> None:
    """Nothing can be said within an event; that the body breaks off is what is left to tell."""
    way = Way(lambda events: [*map(chunk, events), chunk(events[-1][:-10])], Peer.close, "", "", "truncated", {})
    upstream = await play(partial(act, way))
    proxy = await start(upstream.url)
    for end in await READERS[reader](proxy.url):
        assert end.events >= 2
        assert any(words in end.error for words in ("incomplete chunked read", "terminated", "other side closed")), end
    assert await proxy.ended() == {"truncated": len(APIS)}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("reader", READERS)
async def test_an_sdk_that_has_seen_the_end_does_not_raise(start: StartProxy, play: PlayScript, reader: str) -> None:
    ends = {
        "chat": DONE,
        "responses": typed(
            {"type": "response.completed", "sequence_number": 2, "response": {**RESPONSE, "status": "completed"}}
        ),
        "messages": typed({"type": "content_block_stop", "index": 0})
        + typed({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}})
        + typed({"type": "message_stop"}),
    }

    async def end_well(peer: Peer) -> None:
        while True:
            request = await peer.message()
            api = PATHS[request.start_line.split()[1].partition("?")[0]]
            peer.send(STREAM_HEAD, *map(chunk, EVENTS[api]), chunk(ends[api]), LAST_CHUNK)

    upstream = await play(end_well)
    proxy = await start(upstream.url)
    for end in await READERS[reader](proxy.url):
        assert end.events >= 2
        assert end.error == "", end
    assert await proxy.ended() == {"completed": len(APIS)}
    assert proxy.sample("stream_ends_total", end="marker") == len(APIS)


async def test_the_error_event_of_responses_has_its_number_and_its_fields_at_the_top(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(b"POST /v1/responses HTTP/1.1\r\nHost: proxy\r\nContent-Length: 2\r\n\r\n{}")
    api = await upstream.accept()
    await api.message()
    api.send(STREAM_HEAD, *map(chunk, EVENTS["responses"]))
    await client.read_until(EVENTS["responses"][-1] + b"\r\n")
    api.close()
    _, _, event = (await client.rest())[0].partition(b"\r\n")
    assert event.startswith(b"event: error\ndata: ")
    document = json.loads(event[len(b"event: error\ndata: ") :])
    assert document["sequence_number"] == 2
    assert (document["code"], document["param"]) == ("upstream_disconnected", None)
    assert document["message"] == document["error"]["message"]
