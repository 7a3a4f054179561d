"""Each phase has its own time, and its own outcome when that is over."""

from __future__ import annotations

import asyncio
import socket

from .conftest import PlayScript, StartProxy
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    ScriptedUpstream,
    begin,
    chunk,
    delta,
    never_accepting,
    post,
    until,
)

# Long enough for a loaded machine to do what it has to before, short enough to wait for.
SHORT = 0.3


async def test_connect(start: StartProxy) -> None:
    with never_accepting() as url:
        proxy = await start(url, timeouts={"connect": SHORT})
        client = await proxy.connect()
        client.send(post())
        response = await client.message()
        assert response.status == 504
        assert response.json()["error"]["code"] == "upstream_timeout"
        assert await proxy.ended() == {"upstream_timeout_connect": 1}
        assert proxy.sample("upstream_errors_total", type="timeout") == 1


async def test_head(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, timeouts={"head": SHORT})
    client, api = await begin(proxy, upstream)
    response = await client.message()
    assert response.status == 504
    assert "start its response" in response.json()["error"]["message"]
    await api.gone()
    assert await proxy.ended() == {"upstream_timeout_head": 1}
    client.send(post())
    assert (await (await upstream.accept()).message()).start_line.startswith("POST")


async def test_the_time_to_a_head_begins_when_the_upload_has_ended(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, timeouts={"head": 2 * SHORT})
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 10\r\n\r\n")
    api = await upstream.accept()
    await api.head()
    for _ in range(10):
        client.send(b"x")
        assert await api.read(1) == b"x"
        # To take its time is what makes an upload slow.
        await asyncio.sleep(SHORT / 2)
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (await client.message()).body == b"ok"
    assert await proxy.ended() == {"completed": 1}


async def test_first_token_is_not_met_by_comments_and_roles(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, timeouts={"first_token": SHORT, "idle": 0.1})
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(b": keep-alive\n\n"), chunk(delta("")))
    received, _ = await client.rest()
    assert b'"code": "upstream_timeout"' in received
    assert not received.endswith(LAST_CHUNK)
    await api.gone()
    assert await proxy.ended() == {"upstream_timeout_first_token": 1}


async def test_idle_after_the_first_token_and_comments_do_not_count(start: StartProxy, play: PlayScript) -> None:
    async def mutter(api: Peer) -> None:
        await api.message()
        api.send(STREAM_HEAD, chunk(delta("Hi")))
        gone = asyncio.get_running_loop().create_task(api.rest())
        while not gone.done():
            api.send(chunk(b": still here\n\n"))
            await asyncio.wait([gone], timeout=SHORT / 10)

    upstream = await play(mutter)
    proxy = await start(upstream.url, timeouts={"idle": SHORT})
    client = await proxy.connect()
    client.send(post())
    received, _ = await client.rest()
    assert b": still here" in received
    assert b'"code": "upstream_timeout"' in received
    assert not received.endswith(LAST_CHUNK)
    assert await proxy.ended() == {"upstream_timeout_idle": 1}


async def test_idle_of_other_bodies_counts_between_reads(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, timeouts={"idle": SHORT})
    client, api = await begin(proxy, upstream, post(path="/v1/files"))
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    response = await client.message()
    assert (response.body, response.complete) == (b"half", False)
    assert await proxy.ended() == {"upstream_timeout_idle": 1}


async def test_events_keep_a_stream_alive(start: StartProxy, play: PlayScript) -> None:
    async def pace(api: Peer) -> None:
        await api.message()
        api.send(STREAM_HEAD)
        gone = asyncio.get_running_loop().create_task(api.rest())
        for number in range(20):
            api.send(chunk(delta(str(number))))
            await asyncio.wait([gone], timeout=SHORT / 5)
        api.send(chunk(DONE), LAST_CHUNK)
        await gone

    upstream = await play(pace)
    proxy = await start(upstream.url, timeouts={"idle": 2 * SHORT})
    client = await proxy.connect()
    client.send(post())
    assert (await client.message()).complete
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("inter_token_latency_seconds_count") == 19


async def test_total(start: StartProxy, play: PlayScript) -> None:
    async def on_and_on(api: Peer) -> None:
        await api.message()
        api.send(STREAM_HEAD)
        gone = asyncio.get_running_loop().create_task(api.rest())
        while not gone.done():
            api.send(chunk(delta("la")))
            await asyncio.wait([gone], timeout=SHORT / 10)

    upstream = await play(on_and_on)
    proxy = await start(upstream.url, timeouts={"total": SHORT, "idle": 2 * SHORT})
    client = await proxy.connect()
    client.send(post())
    received, _ = await client.rest()
    assert b'"code": "upstream_timeout"' in received
    assert await proxy.ended() == {"upstream_timeout_total": 1}


async def test_a_client_that_takes_nothing_is_cut(start: StartProxy, play: PlayScript) -> None:
    async def flood(api: Peer) -> None:
        await api.message()
        api.send(STREAM_HEAD)
        while True:
            api.send(chunk(delta("x" * 10_000)))
            await api.writer.drain()

    upstream = await play(flood)
    proxy = await start(upstream.url, timeouts={"write": SHORT, "idle": SHORT / 3})
    client = await proxy.connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(post())
    await proxy.busy()
    assert await proxy.ended() == {"stalled_client": 1}
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    received, how = await client.rest()
    assert how == "reset"
    assert not received.endswith(LAST_CHUNK)


async def test_a_client_that_does_not_take_the_last_bytes_is_cut(start: StartProxy, play: PlayScript) -> None:
    async def burst(api: Peer) -> None:
        await api.message()
        api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n", b"x" * 20_000_000)
        await api.rest()

    upstream = await play(burst)
    proxy = await start(upstream.url, timeouts={"write": SHORT})
    client = await proxy.connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(post(path="/v1/files"))
    await proxy.busy()
    assert await proxy.ended() == {"stalled_client": 1}


async def test_a_slow_client_is_not_a_stalled_one(start: StartProxy, play: PlayScript) -> None:
    size = 8_000_000

    async def burst(api: Peer) -> None:
        await api.message()
        api.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, b"x" * size)
        await api.rest()

    upstream = await play(burst)
    # Longer than this process stands still on a busy machine.
    time = 4 * SHORT
    proxy = await start(upstream.url, timeouts={"write": time, "idle": time})
    client = await proxy.connect()
    client.send(post(path="/v1/files"))
    await client.read_until(b"\r\n\r\n")
    left, loop = size, asyncio.get_running_loop()
    started = loop.time()
    while left:
        taken = await client.reader.read(100_000)
        assert taken
        left -= len(taken)
        if loop.time() - started < 2 * time:
            # To take its time is what makes a client slow.
            await asyncio.sleep(SHORT / 10)
    assert await proxy.ended() == {"completed": 1}


async def test_an_upload_that_is_not_taken_ends_with_the_time_to_a_head(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, timeouts={"head": SHORT})
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nContent-Length: 1000000000\r\n\r\n")
    api = await upstream.accept()
    await api.head()
    api.writer.transport.pause_reading()  # type: ignore[attr-defined]
    hangups = proxy.worker.proxy.server.hangups
    # More than the kernel takes, whatever segments and windows it has.
    client.send(b"x" * (32 << 20))
    await until(lambda: bool(hangups._watched))
    assert (await client.message()).status == 504
    assert await proxy.ended() == {"upstream_timeout_head": 1}
    client.close()
    await until(lambda: not proxy.worker.proxy.server.connections)
    assert not hangups._watched


async def test_the_time_of_a_request_that_waited_begins_when_the_one_before_it_ended(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    waited = 4 * SHORT
    proxy = await start(upstream.url, timeouts={"first_token": 3 * SHORT})
    client, api = await begin(proxy, upstream, post() * 2)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(chunk(delta("Hi")))
    # To take its time is what makes the second wait.
    await asyncio.sleep(waited)
    api.send(chunk(DONE), LAST_CHUNK)
    await client.read_until(LAST_CHUNK)
    await api.message()
    api.send(STREAM_HEAD)
    await client.read_until(b"\r\n\r\n")
    api.send(chunk(delta("Hi")), chunk(DONE), LAST_CHUNK)
    assert (await client.read_until(LAST_CHUNK)).endswith(DONE + b"\r\n" + LAST_CHUNK)
    assert await proxy.ended() == {"completed": 2}
    assert proxy.sample("time_to_first_token_seconds_count") == 2
    assert proxy.sample("time_to_first_token_seconds_sum") < waited
    assert proxy.sample("upstream_errors_total") == 0


async def test_the_total_is_not_for_a_client_that_only_has_to_take_the_last_bytes(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, timeouts={"total": 2 * SHORT, "write": 3 * SHORT})
    client, api = await begin(proxy, upstream)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    (connection,) = proxy.worker.proxy.server.connections
    assert connection.transport is not None
    for transport, option in ((client.writer.transport, socket.SO_RCVBUF), (connection.transport, socket.SO_SNDBUF)):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 4096)
    api.send(STREAM_HEAD)
    while connection.transport.get_write_buffer_size() < 5_000:
        api.send(chunk(delta("x" * 5_000)))
        await asyncio.sleep(0.02)  # until the kernel takes no more
    # What it has no room for, but less than would pause the upstream.
    api.send(chunk(delta("x" * 30_000)), LAST_CHUNK)
    await until(lambda: proxy.sample("upstream_connections", state="idle") == 1)
    assert connection.transport.get_write_buffer_size()
    assert await proxy.ended() == {"stalled_client": 1}
    assert proxy.sample("upstream_errors_total") == 0
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    received, how = await client.rest()
    assert how == "reset"
    assert not received.endswith(LAST_CHUNK)
