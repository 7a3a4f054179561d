"""A stream that ends too early raises in the SDK of its API, and what it raises carries our message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import pytest

from .conftest import PlayScript, StartProxy
from .ends import AI_SDK, EVENTS, LAST_EVENTS, READERS, Ended, api_of, read_all_with_node
from .harness import (
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    chunk,
    until,
)


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
        _all, None, "did not finish within 2 seconds", "upstream_timeout", "upstream_timeout_total", {"total": 2.0}
    ),
    "drain": Way(_all, None, "stopping or reloading", "draining", "drained", {}),
    "cancel": Way(_all, None, "An operator has cancelled this request", "cancelled", "cancelled", {}),
}


# What each SDK raises where the API itself breaks off with an error event.
RAISED = {
    "chat": ("APIError",),
    "responses": ("APIError",),
    "messages": ("APIError", "APIStatusError"),
    "messages_helper": ("APIError", "APIStatusError"),
    "gemini": ("ApiError", "ServerError"),
} | dict.fromkeys(AI_SDK, ("APICallError", "StreamProviderError"))


# What they say where only the framing tells.
BROKEN = ("incomplete chunked read", "payload is not completed", "terminated", "other side closed")


async def act(way: Way, peer: Peer) -> None:
    events = EVENTS[api_of(await peer.message())]
    peer.send(STREAM_HEAD, *way.sends(events))
    await peer.drain()
    if way.then is not None:
        way.then(peer)
    await peer.rest()


async def behind(start: StartProxy, play: PlayScript, way: Way) -> RunningProxy:
    upstream = await play(partial(act, way))
    return await start(upstream.url, timeouts=way.timeouts)


async def end(proxy: RunningProxy, name: str, streams: int) -> None:
    """Ends all `streams` once they are under way, where that is not for the upstream or for a timeout to do."""
    if name not in ("drain", "cancel"):
        return
    relay = proxy.worker.proxy
    await until(lambda: len(relay.active) == streams and proxy.sample("time_to_first_token_seconds_count") == streams)
    if name == "drain":
        relay.end_exchanges()
    else:
        for row in (await proxy.worker.look()).rows:
            proxy.worker.cancel(row.id)


async def check(proxy: RunningProxy, name: str, apis: tuple[str, ...], ended: list[Ended]) -> None:
    way = WAYS[name]
    assert [each.api for each in ended] == list(apis)
    for each in ended:
        assert way.says in each.error, each
        assert each.error.partition(":")[0] in RAISED[each.api], each
        if each.api in ("chat", "responses"):
            assert each.code == way.code
        if way.then is not Peer.reset:
            assert each.text == ("" if name == "first token" else "Hi"), each
    assert await proxy.ended() == {way.outcome: len(apis)}


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "node"])
@pytest.mark.parametrize("name", WAYS)
async def test_every_sdk_raises_with_our_message(start: StartProxy, play: PlayScript, name: str, reader: str) -> None:
    apis, read = READERS[reader]
    proxy = await behind(start, play, WAYS[name])
    reading = asyncio.ensure_future(read(proxy.url))
    await end(proxy, name, len(apis))
    await check(proxy, name, apis, await reading)


async def test_every_sdk_of_node_raises_with_our_message(start: StartProxy, play: PlayScript) -> None:
    apis = READERS["node"].apis
    proxies = {name: await behind(start, play, way) for name, way in WAYS.items()}
    reading = asyncio.ensure_future(read_all_with_node([proxy.url for proxy in proxies.values()]))
    await asyncio.gather(*(end(proxy, name, len(apis)) for name, proxy in proxies.items()))
    for (name, proxy), ended in zip(proxies.items(), await reading, strict=True):
        await check(proxy, name, apis, ended)


@pytest.mark.parametrize("reader", READERS)
async def test_every_sdk_raises_on_a_cut_within_an_event(start: StartProxy, play: PlayScript, reader: str) -> None:
    """Nothing can be said within an event; that the body breaks off is what is left to tell."""
    way = Way(lambda events: [*map(chunk, events), chunk(events[-1][:-10])], Peer.close, "", "", "truncated", {})
    upstream = await play(partial(act, way))
    proxy = await start(upstream.url)
    apis, read = READERS[reader]
    for end in await read(proxy.url):
        assert end.text == "Hi", end
        assert any(words in end.error for words in BROKEN), end
    assert await proxy.ended() == {"truncated": len(apis)}


@pytest.mark.parametrize("reader", READERS)
async def test_an_sdk_that_has_seen_the_end_does_not_raise(start: StartProxy, play: PlayScript, reader: str) -> None:
    async def end_well(peer: Peer) -> None:
        while True:
            api = api_of(await peer.message())
            peer.send(STREAM_HEAD, *map(chunk, EVENTS[api]), chunk(LAST_EVENTS[api]), LAST_CHUNK)

    upstream = await play(end_well)
    proxy = await start(upstream.url)
    apis, read = READERS[reader]
    assert await read(proxy.url) == [Ended(api, "Hi", "") for api in apis]
    assert await proxy.ended() == {"completed": len(apis)}
    assert proxy.sample("stream_ends_total", end="marker") == len(apis)


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
    assert document["sequence_number"] == 3
    assert (document["code"], document["param"]) == ("upstream_disconnected", None)
    assert document["message"] == document["error"]["message"]
