"""A client that leaves, in every phase and in every way: the upstream is let go at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from sseproxy.relay.downstream import DownstreamProtocol

from .conftest import PlayScript, StartProxy
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
    never_accepting,
    post,
    until,
)

Leave = Callable[[Peer], None]
WAYS = pytest.mark.parametrize("leave", [Peer.close, Peer.reset, Peer.half_close], ids=["fin", "rst", "half-close"])


@WAYS
async def test_while_waiting_for_the_response_head(
    proxy: RunningProxy, upstream: ScriptedUpstream, leave: Leave
) -> None:
    client, api = await begin(proxy, upstream)
    leave(client)
    await api.gone()
    assert await proxy.ended() == {"client_gone_before_head": 1}
    assert proxy.sample("requests_total", code="499") == 1
    assert proxy.sample("upstream_release_seconds_count") == 1


@WAYS
async def test_between_the_head_and_the_first_token(
    proxy: RunningProxy, upstream: ScriptedUpstream, leave: Leave
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("")))
    await client.read_until(delta("") + b"\r\n")
    leave(client)
    await api.gone()
    assert await proxy.ended() == {"client_gone_before_first_token": 1}
    assert proxy.sample("streams_active") == 0


@WAYS
async def test_between_the_chunks_of_a_silent_stream(
    proxy: RunningProxy, upstream: ScriptedUpstream, leave: Leave
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(delta("Hi") + b"\r\n")
    leave(client)
    await api.gone()
    assert await proxy.ended() == {"client_gone_mid_stream": 1}
    assert proxy.sample("time_to_first_token_seconds_count") == 1
    assert proxy.sample("streams_without_usage_total", reason="client_gone") == 1


@WAYS
async def test_while_the_body_of_its_request_arrives(
    proxy: RunningProxy, upstream: ScriptedUpstream, leave: Leave
) -> None:
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 1000\r\n\r\nabc")
    api = await upstream.accept()
    await api.head()
    assert await api.read(3) == b"abc"
    leave(client)
    await api.gone()
    assert await proxy.ended() == {"client_gone_before_head": 1}


@pytest.mark.parametrize("leave", [Peer.close, Peer.reset], ids=["fin", "rst"])
async def test_while_the_upstream_does_not_take_the_upload(
    proxy: RunningProxy, upstream: ScriptedUpstream, leave: Leave
) -> None:
    """Reading from the client is paused then: nothing but a hang-up watch can see it leave."""
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 1000000000\r\n\r\n")
    api = await upstream.accept()
    await api.head()
    api.writer.transport.pause_reading()  # type: ignore[attr-defined]
    server = proxy.worker.proxy.server
    async with asyncio.timeout(10):
        while not server.hangups._watched:
            client.send(b"x" * 16384)
            await client.writer.drain()
            await asyncio.sleep(0)
    leave(client)
    await proxy.idle()
    assert await proxy.ended() == {"client_gone_before_head": 1}
    api.writer.transport.resume_reading()  # type: ignore[attr-defined]
    await api.gone()


async def test_while_connecting(start: StartProxy) -> None:
    with never_accepting() as url:
        proxy = await start(url)
        client = await proxy.connect()
        client.send(post())
        await proxy.busy()
        client.close()
        assert await proxy.ended() == {"client_gone_before_head": 1}


@WAYS
async def test_while_it_takes_nothing_of_a_fast_stream(start: StartProxy, play: PlayScript, leave: Leave) -> None:
    async def flood(api: Peer) -> None:
        await api.message()
        api.send(STREAM_HEAD)
        while True:
            api.send(chunk(delta("x" * 10_000)))
            await api.writer.drain()

    upstream = await play(flood)
    proxy = await start(upstream.url)
    client = await proxy.connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(post())
    server = proxy.worker.proxy.server
    await until(lambda: any(connection.writing_paused for connection in server.connections))
    leave(client)
    assert await proxy.ended() == {"client_gone_mid_stream": 1}
    await until(lambda: not upstream.open)


async def test_after_it_pipelined_more_than_can_wait(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client = await proxy.connect()
    client.send(post() * 60)
    api = await upstream.accept()
    await api.message()
    client.close()
    await api.gone()
    assert await proxy.ended() == {"client_gone_before_head": 1}
    assert upstream.connections == 1


@WAYS
async def test_after_the_end_marker_it_has_not_cancelled_anything(
    proxy: RunningProxy, upstream: ScriptedUpstream, leave: Leave
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(DONE))
    await client.read_until(DONE + b"\r\n")
    leave(client)
    await api.gone()
    assert await proxy.ended() == {"completed": 1}


async def test_usage_that_came_before_it_left_is_counted(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    running = delta("Hi", usage={"prompt_tokens": 5, "completion_tokens": 1})
    api.send(STREAM_HEAD, chunk(running))
    await client.read_until(running + b"\r\n")
    client.close()
    await api.gone()
    assert await proxy.ended() == {"client_gone_mid_stream": 1}
    assert proxy.sample("tokens_total", type="input") == 5


async def test_one_client_leaving_touches_no_other(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    leaver, stayer = await proxy.connect(), await proxy.connect()
    leaver.send(post())
    first = await upstream.accept()
    await first.message()
    stayer.send(post())
    second = await upstream.accept()
    await second.message()
    leaver.reset()
    await first.gone()
    second.send(STREAM_HEAD, chunk(DONE), LAST_CHUNK)
    assert (await stayer.message()).complete


async def test_a_cancelled_connection_is_never_reused(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    client.close()
    await api.gone()
    await proxy.idle()
    assert proxy.sample("upstream_connections") == 0
    client = await proxy.connect()
    client.send(post())
    await upstream.accept()
    assert upstream.connections == 2


@pytest.mark.parametrize(
    ("last_words", "outcome"),
    [(LAST_CHUNK, "completed"), (b"zz\r\n", "upstream_error")],
    ids=["completed", "broken"],
)
async def test_what_ended_the_body_first_is_what_counts(
    proxy: RunningProxy, upstream: ScriptedUpstream, last_words: bytes, outcome: str
) -> None:
    """The client leaves on the last bytes, before the exchange's task has had a turn to hear of the end."""
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(chunk(delta("Hi")))
    (relay,) = proxy.worker.proxy.active
    (connection,) = proxy.worker.proxy.server.connections
    assert isinstance(connection, DownstreamProtocol)
    assert relay._pump is not None
    relay._pump.data_received(last_words)
    connection.eof_received()
    assert await proxy.ended() == {outcome: 1}
    assert proxy.sample("upstream_errors_total") == (outcome == "upstream_error")
