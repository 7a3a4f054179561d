"""Signs of life from us in a silent event stream: only where they are harmless, and only if they are wanted."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy import config
from sseproxy.wire.sse import BOM, MarkStripper

from .conftest import PlayScript, StartProxy
from .ends import EVENTS, LAST_EVENTS, READERS, Ended, api_of
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Message,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    begin,
    chunk,
    delta,
    post,
)
from .splits import splits

SHORT = 0.1
BEAT = chunk(b": heartbeat\n")


async def beating(start: StartProxy, upstream: ScriptedUpstream, **more: object) -> RunningProxy:
    timeouts = config.Timeouts(**more)  # type: ignore[arg-type]
    match = config.Match(path="/v1")
    route = config.Route(
        name="api", match=match, upstream=(config.Target(name="up"),), heartbeat=SHORT, timeouts=timeouts
    )
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


@pytest.mark.parametrize("with_id", [False, True], ids=["plain", "with ids"])
async def test_every_sdk_reads_over_them(start: StartProxy, play: PlayScript, with_id: bool) -> None:
    async def pause_in_between(api: Peer) -> None:
        while True:
            dialect = api_of(await api.message())
            api.send(STREAM_HEAD)
            for event in (*EVENTS[dialect], LAST_EVENTS[dialect]):
                # A silence is what is to be filled.
                await asyncio.sleep(2 * SHORT)
                if dialect == "gemini":
                    # With the line ends of others, too; no client of Google's reads an id.
                    api.send(chunk(event.replace(b"\r\n", b"\n") if with_id else event))
                else:
                    api.send(chunk((b"id: 1\n" if with_id else b"") + event))
            api.send(LAST_CHUNK)

    upstream = await play(pause_in_between)
    silent, proxy = await start(upstream.url), await beating(start, upstream)
    raw = await proxy.connect()
    raw.send(post())
    assert (await raw.read_until(LAST_CHUNK)).count(BEAT) >= 2
    for apis, read in READERS.values():
        for ended in await asyncio.gather(read(proxy.url), read(silent.url)):
            assert ended == [Ended(api, "Hi", "") for api in apis]


async def test_google_gets_blank_lines(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await beating(start, upstream)
    client, api = await begin(proxy, upstream, post(path="/v1/models/m:streamGenerateContent"))
    api.send(STREAM_HEAD, *map(chunk, EVENTS["gemini"]))
    await client.head()
    expected = b"".join(map(chunk, EVENTS["gemini"])) + 2 * chunk(b"\n\n")
    assert await client.read(len(expected)) == expected


# The mark, in how many parts it comes, and what comes after it in the same read.
MARKED = [
    pytest.param((BOM + delta("Hi"),), id="at once"),
    pytest.param((BOM, delta("Hi")), id="by itself"),
    pytest.param((BOM[:1], BOM[1:2], BOM[2:] + delta("Hi")), id="in parts"),
    pytest.param((delta("Hi"),), id="none"),
    pytest.param((BOM[:2] + delta("Hi"),), id="no mark"),
]


@pytest.mark.parametrize("asks", [False, True], ids=["plain", "asking for usage"])
@pytest.mark.parametrize("parts", MARKED)
async def test_a_byte_order_mark_after_one_is_dropped(
    start: StartProxy, upstream: ScriptedUpstream, parts: tuple[bytes, ...], asks: bool
) -> None:
    usage = config.UsageOptions(request=asks)
    proxy = await start(upstream.url, route={"heartbeat": SHORT, "usage": usage})
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD)
    await client.head()
    assert await client.read(2 * len(BEAT)) == BEAT + BEAT
    for part in (*parts, delta(" there"), BOM + delta("!"), DONE):
        api.send(chunk(part))
    api.send(LAST_CHUNK)
    received = (await client._body(Message("", [("Transfer-Encoding", "chunked")])))[0]
    assert (
        received.replace(b": heartbeat\n", b"")
        == b"".join(parts).removeprefix(BOM) + delta(" there") + BOM + delta("!") + DONE
    )
    assert await proxy.ended() == {"completed": 1}


async def test_a_byte_order_mark_before_any_stays(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await beating(start, upstream)
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(BOM + delta("Hi")))
    await client.head()
    expected = chunk(BOM + delta("Hi")) + BEAT
    assert await client.read(len(expected)) == expected


@given(stream=st.binary(max_size=12).map(lambda rest: BOM + rest) | st.binary(max_size=12), data=st.data())
def test_the_mark_is_taken_off_in_any_split(stream: bytes, data: st.DataObject) -> None:
    stripper = MarkStripper(None)
    out = b"".join(map(stripper.feed, data.draw(splits(stream)))) + stripper.end()
    assert out == stream.removeprefix(BOM)
