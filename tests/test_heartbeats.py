"""Comments of ours in a silent event stream: only where they are harmless, and only if they are wanted."""

from __future__ import annotations

import asyncio

import pytest

from sseproxy import config

from .conftest import PlayScript, StartProxy
from .ends import EVENTS, LAST_EVENTS, READERS, api_of
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    begin,
    chunk,
    delta,
    post,
)

SHORT = 0.1
BEAT = chunk(b": heartbeat\n")


async def beating(start: StartProxy, upstream: ScriptedUpstream, **more: object) -> RunningProxy:
    timeouts = config.Timeouts(**more)  # type: ignore[arg-type]
    match = config.Match(path="/v1")
    route = config.Route(name="api", match=match, upstream="up", heartbeat=SHORT, timeouts=timeouts)
    return await start(upstream.url, routes=(route,))


async def test_a_silent_stream_gets_comments_between_its_events(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await beating(start, upstream)
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD)
    await client.head()
    assert await client.read(2 * len(BEAT)) == BEAT + BEAT
    api.send(chunk(delta("Hi")))
    assert await client.read(len(chunk(delta("Hi")))) == chunk(delta("Hi"))
    assert await client.read(len(BEAT)) == BEAT
    api.send(chunk(DONE), LAST_CHUNK)
    assert (await client.read_until(LAST_CHUNK)).endswith(chunk(DONE) + LAST_CHUNK)
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("stream_events_total") == 2


async def test_nothing_is_written_into_an_event_nor_after_the_end(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await beating(start, upstream, idle=5 * SHORT, first_token=5 * SHORT)
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(b'data: {"cho'))
    received, _ = await client.rest()
    assert received.endswith(chunk(b'data: {"cho'))
    assert BEAT not in received
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(DONE))
    received, _ = await client.rest()
    assert BEAT not in received.partition(DONE)[2]
    assert await proxy.ended() == {"upstream_timeout_first_token": 1, "completed": 1}


async def test_nothing_is_written_between_a_cr_and_its_lf(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await beating(start, upstream, idle=5 * SHORT, first_token=5 * SHORT)
    client, api = await begin(proxy, upstream)
    event = b"id: 1\r\n" + delta("Hi").replace(b"\n", b"\r\n")
    api.send(STREAM_HEAD, chunk(event[:-1]))
    received, _ = await client.rest()
    assert event[:-1] in received
    assert BEAT not in received.partition(event[:-1])[2]


async def test_nothing_is_written_before_the_status_nor_into_other_bodies(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await beating(start, upstream, head=5 * SHORT, idle=5 * SHORT)
    client, _ = await begin(proxy, upstream)
    assert (await client.message()).status == 504
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(b"{"))
    assert BEAT not in (await client.rest())[0]


async def test_they_do_not_keep_an_idle_stream_alive(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await beating(start, upstream, idle=5 * SHORT)
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    received, _ = await client.rest()
    assert BEAT in received
    assert b'"code": "upstream_timeout"' in received
    assert await proxy.ended() == {"upstream_timeout_idle": 1}


async def test_off_is_the_default(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, timeouts={"idle": 3 * SHORT})
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    assert BEAT not in (await client.rest())[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("with_id", [False, True], ids=["plain", "with ids"])
async def test_every_sdk_reads_over_them(start: StartProxy, play: PlayScript, with_id: bool) -> None:
    async def pause_in_between(api: Peer) -> None:
        while True:
            dialect = api_of(await api.message())
            api.send(STREAM_HEAD)
            for event in (*EVENTS[dialect], LAST_EVENTS[dialect]):
                api.send(chunk((b"id: 1\n" if with_id else b"") + event))
                # A silence is what is to be filled.
                await asyncio.sleep(2 * SHORT)
            api.send(LAST_CHUNK)

    upstream = await play(pause_in_between)
    silent, proxy = await start(upstream.url), await beating(start, upstream)
    raw = await proxy.connect()
    raw.send(post())
    assert (await raw.read_until(LAST_CHUNK)).count(BEAT) >= 2
    for name, read in READERS.items():
        with_comments, without = await asyncio.gather(read(proxy.url), read(silent.url))
        assert with_comments == without, name
        assert not any(end.error for end in with_comments), name
