"""What a client may send at most, and ahead of its responses."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from time import perf_counter

import pytest

from sseproxy.config import Limits
from sseproxy.relay import downstream
from sseproxy.relay import server as servers
from sseproxy.relay.downstream import MAX_PIPELINED

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
    post,
    until,
)

# Long enough for a loaded machine to do what it has to before, short enough to wait for.
SHORT = 0.3
MAX_HEAD = Limits().request_head
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
UPGRADE = b"GET /v1/ws HTTP/1.1\r\nHost: p\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def head_of(size: int) -> bytes:
    """A request head of `size` bytes, none of its lines long."""
    start, end = b"GET /v1/files HTTP/1.1\r\nHost: proxy\r\n", b"\r\n"
    count, rest = divmod(size - len(start) - len(end), 1000)
    fields = [b"X-%03d: %b\r\n" % (n, b"y" * (1000 - 9 + (rest if n == 0 else 0))) for n in range(count)]
    head = start + b"".join(fields) + end
    assert len(head) == size
    return head


def pieces(data: bytes) -> list[bytes]:
    return [data[start : start + 1000] for start in range(0, len(data), 1000)]


TOO_LARGE = {
    "in_one_write": [head_of(MAX_HEAD + 4000)],
    "in_pieces": pieces(head_of(MAX_HEAD + 4000)[: MAX_HEAD + 1]),
    "one_long_field": [b"GET /v1/files HTTP/1.1\r\nHost: proxy\r\nX: " + b"y" * MAX_HEAD + b"\r\n\r\n"],
    "long_target": [b"GET /v1/" + b"y" * MAX_HEAD + b" HTTP/1.1\r\nHost: proxy\r\n\r\n"],
    "no_end_of_a_field": pieces(b"GET /v1/files HTTP/1.1\r\nHost: proxy\r\nX: " + b"y" * (MAX_HEAD - 39)),
    "no_end_of_the_target": pieces(b"GET /v1/" + b"y" * (MAX_HEAD - 7)),
    "no_beginning": pieces(b"\r\n" * (MAX_HEAD // 2 + 1)),
}
EACH = pytest.mark.parametrize("sent", TOO_LARGE.values(), ids=TOO_LARGE)


async def dribble(proxy: RunningProxy, client: Peer, parts: list[bytes]) -> None:
    """Sends `parts`, each as a read of its own."""
    (connection,) = proxy.worker.proxy.server.connections
    assert isinstance(connection, downstream.DownstreamProtocol)
    for part in parts:
        before = connection.read_at
        client.send(part)
        await until(lambda: connection.read_at != before)  # noqa: B023


async def head_refused(proxy: RunningProxy, client: Peer, *, in_target: bool) -> None:
    status, code = (414, "target_too_long") if in_target else (431, "head_too_large")
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (status, code)
    assert response.get("connection") == "close"
    assert await client.rest() == (b"", "fin")
    await proxy.idle()
    assert proxy.sample("requests_rejected_total", reason=code) == 1
    assert proxy.sample("requests_total", code=str(status)) == 1


@EACH
async def test_a_head_that_is_too_large_is_refused(
    proxy: RunningProxy, upstream: ScriptedUpstream, sent: list[bytes]
) -> None:
    client = await proxy.connect()
    await until(lambda: bool(proxy.worker.proxy.server.connections))
    await dribble(proxy, client, sent)
    await head_refused(proxy, client, in_target=b" HTTP/1.1" not in b"".join(sent)[:MAX_HEAD] and b"GET" in sent[0])
    assert await proxy.ended() == {"rejected": 1}
    assert upstream.connections == 0


@EACH
async def test_a_head_that_is_too_large_waits_for_those_before_it(
    proxy: RunningProxy, upstream: ScriptedUpstream, sent: list[bytes]
) -> None:
    client, api = await begin(proxy, upstream, post() * 2)
    await dribble(proxy, client, sent)
    for number in range(2):
        if number:
            await api.message()
        api.send(STREAM_HEAD, chunk(delta("Hi")))
        await client.read_until(chunk(delta("Hi")))
        api.send(chunk(DONE), LAST_CHUNK)
        assert await client.read_until(LAST_CHUNK) == chunk(DONE) + LAST_CHUNK
    await head_refused(proxy, client, in_target=b" HTTP/1.1" not in b"".join(sent)[:MAX_HEAD] and b"GET" in sent[0])
    assert await proxy.ended() == {"completed": 2, "rejected": 1}


async def test_what_follows_a_head_that_is_too_large_is_not_kept(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    await dribble(proxy, client, TOO_LARGE["in_pieces"] + [b"y" * 1000] * 100)
    (connection,) = proxy.worker.proxy.server.connections
    assert len(connection._requests) == 1
    api.send(OK)
    assert (await client.message()).body == b"ok"
    assert (await client.message()).status == 431


REFUSED = {
    "a_large_head": TOO_LARGE["one_long_field"][0],
    "a_larger_head": TOO_LARGE["one_long_field"][0][:-4],
    "a_broken_head": b"BAD\0 x\r\n\r\n",
    "an_upload": b"POST /nowhere HTTP/1.1\r\nHost: h\r\nContent-Length: 9999999\r\n\r\n",
    "the_last_upload": b"POST /nowhere HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 9999999\r\n\r\n",
    "a_broken_upload": b"POST /nowhere HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    "more_after_the_last": b"GET /nowhere HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("head", REFUSED.values(), ids=REFUSED)
async def test_a_client_that_reads_when_it_has_sent_all_learns_that_it_was_refused(
    proxy: RunningProxy, caplog: pytest.LogCaptureFixture, head: bytes
) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.setblocking(False)
        await loop.sock_sendall(client, head + b"y")
        await until(lambda: proxy.outcomes() == {"rejected": 1})
        for _ in range(100):
            await loop.sock_sendall(client, b"y" * 10_000)
        answer = await loop.sock_recv(client, 65536)
        assert re.match(rb"HTTP/1.1 4\d\d .*Connection: close\r\n\r\n{.*}$", answer, re.S)
        assert await loop.sock_recv(client, 1) == b""
    assert not caplog.records


@pytest.mark.parametrize("head", REFUSED.values(), ids=REFUSED)
async def test_a_client_that_was_refused_and_falls_silent_is_not_waited_for(
    proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(downstream, "SILENCE", SHORT)
    client = await proxy.connect()
    client.send(head + b"y")
    assert 400 <= (await client.message()).status < 500
    assert await client.rest() == (b"", "fin")
    await until(lambda: not proxy.worker.proxy.server.connections)


async def test_a_client_that_was_refused_may_send_on_for_a_while(
    proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downstream, "SILENCE", SHORT)
    monkeypatch.setattr(downstream, "LINGER", 4 * SHORT)
    client = await proxy.connect()
    server, began = proxy.worker.proxy.server, perf_counter()

    def sends_on() -> bool:
        client.writer.write(b"y")
        return not server.connections

    client.send(REFUSED["an_upload"])
    await until(sends_on)
    assert perf_counter() - began >= 3 * SHORT


@pytest.mark.parametrize("in_pieces", [False, True], ids=["in_one_write", "in_pieces"])
async def test_a_head_of_nearly_that_size_passes(
    proxy: RunningProxy, upstream: ScriptedUpstream, in_pieces: bool
) -> None:
    head = head_of(MAX_HEAD - 100)
    client = await proxy.connect()
    await until(lambda: bool(proxy.worker.proxy.server.connections))
    await dribble(proxy, client, pieces(head) if in_pieces else [head])
    api = await upstream.accept()
    request = await api.message()
    assert request.start_line == "GET /v1/files HTTP/1.1"
    assert request.get("x-030") == "y" * 991
    api.send(OK)
    assert (await client.message()).body == b"ok"
    assert await proxy.ended() == {"completed": 1}


async def test_many_heads_together_are_none_that_is_too_large(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    head = head_of(20_000)
    client, api = await begin(proxy, upstream, head)
    for _ in range(3):
        await dribble(proxy, client, [head[:19_000], head[19_000:]])
    for number in range(4):
        if number:
            await api.message()
        api.send(OK)
        assert (await client.message()).body == b"ok"
    assert await proxy.ended() == {"completed": 4}


async def test_few_requests_wait_for_the_one_before_them_and_all_are_answered_in_order(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(*(b"GET /v1/files/%d HTTP/1.1\r\nHost: proxy\r\n\r\n" % number for number in range(400)))
    api = await upstream.accept()
    (connection,) = proxy.worker.proxy.server.connections
    for number in range(400):
        assert (await api.message()).start_line == f"GET /v1/files/{number} HTTP/1.1"
        assert len(connection._requests) <= MAX_PIPELINED
        assert len(proxy.worker.proxy.active) == 1
        api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n%03d" % number)
        assert (await client.message()).body == b"%03d" % number
    assert await proxy.ended() == {"completed": 400}
    assert upstream.connections == 1


async def test_requests_behind_an_upload_that_came_in_parts_are_not_forgotten(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    whole = post(b"x" * 10)
    client.send(whole[:-1])
    api = await upstream.accept()
    await api.head()
    client.send(whole[-1:], *(b"GET /v1/files/%d HTTP/1.1\r\nHost: proxy\r\n\r\n" % number for number in range(40)))
    assert await api.read(10) == b"x" * 10
    api.send(OK)
    for number in range(40):
        assert (await api.message()).start_line == f"GET /v1/files/{number} HTTP/1.1"
        api.send(OK)
    for _ in range(41):
        assert (await client.message()).body == b"ok"
    assert await proxy.ended() == {"completed": 41}


async def test_a_request_behind_one_for_an_upgrade_is_as_any_other(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream, UPGRADE)
    await dribble(proxy, client, [post(b"x" * 2 * MAX_HEAD)])
    api.send(OK)
    assert (await client.message()).status == 200
    assert (await api.message()).body == b"x" * 2 * MAX_HEAD
    client.send(UPGRADE * 1000, post(b"last"))
    for _ in range(1000):
        api.send(OK)
        assert (await client.message()).status == 200
        assert (await api.message()).start_line == "GET /v1/ws HTTP/1.1"
    api.send(OK)
    assert (await api.message()).body == b"last"
    api.send(OK)
    assert (await client.message()).status == 200
    await client.message()
    assert await proxy.ended() == {"completed": 1003}


async def bodiless(api: Peer) -> None:
    while True:
        await api.message()
        api.send(b"HTTP/1.1 204 No Content\r\nX-Padding: %b\r\n\r\n" % (b"y" * 1000))


# Many more than the kernels have room for answers.
REQUESTS = 1_000
UNREAD = pytest.mark.parametrize(
    ("request_head", "outcome"),
    [
        (b"GET /nowhere HTTP/1.1\r\nHost: p\r\n\r\n", "rejected"),
        (b"GET /v1/files HTTP/1.1\r\nHost: p\r\n\r\n", "completed"),
    ],
    ids=["answered_here", "bodiless"],
)


async def pipeline_until_blocked(proxy: RunningProxy, request_head: bytes) -> Peer:
    """A client that takes no answer, and has asked until one waits for it to take those before."""
    server = proxy.worker.proxy.server
    client = await proxy.connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: bool(server.connections))
    (connection,) = server.connections
    assert connection.transport is not None
    for transport, option in ((client.writer.transport, socket.SO_RCVBUF), (connection.transport, socket.SO_SNDBUF)):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 4096)
    client.send(request_head * REQUESTS)
    await until(lambda: connection.writing_paused)
    return client


async def settled(server: servers.DownstreamServer) -> None:
    """Waits until no request is handled any more."""
    handled = -1
    while server.requests_count != handled:
        handled = server.requests_count
        for _ in range(500):
            await asyncio.sleep(0)


@UNREAD
async def test_a_client_that_takes_no_answers_gets_no_more_of_them_and_is_cut(
    start: StartProxy, play: PlayScript, monkeypatch: pytest.MonkeyPatch, request_head: bytes, outcome: str
) -> None:
    monkeypatch.setattr(downstream, "LINGER", SHORT)
    upstream = await play(bodiless)
    proxy = await start(upstream.url, timeouts={"write": SHORT})
    client = await pipeline_until_blocked(proxy, request_head)
    server = proxy.worker.proxy.server
    held = queued = 0

    def cut() -> bool:
        nonlocal held, queued
        for connection in server.connections:
            if connection.transport is not None:
                held = max(held, connection.transport.get_write_buffer_size())
            queued = max(queued, len(connection._requests))
        return not server.connections

    await until(cut)
    # One answer is all that waits.
    assert 0 < held < 2_000
    assert 0 < queued <= MAX_PIPELINED
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert (await client.rest())[1] == "reset"
    outcomes = await proxy.ended()
    assert outcomes.pop("stalled_client", 0) == (outcome == "completed")
    assert outcomes == {outcome: server.requests_count - (outcome == "completed")}
    assert server.requests_count < REQUESTS / 2


@UNREAD
@pytest.mark.parametrize("leave", [Peer.close, Peer.reset, Peer.half_close], ids=["fin", "rst", "half-close"])
async def test_a_client_that_leaves_with_answers_unread_leaves_nothing_behind(
    start: StartProxy, play: PlayScript, leave: Callable[[Peer], None], request_head: bytes, outcome: str
) -> None:
    upstream = await play(bodiless)
    proxy = await start(upstream.url)
    server = proxy.worker.proxy.server
    tasks = len(asyncio.all_tasks())
    client = await pipeline_until_blocked(proxy, request_head)
    await until(lambda: not client.writer.transport.get_write_buffer_size())
    await settled(server)
    leave(client)
    await until(lambda: not server.connections)
    outcomes = await proxy.ended()
    assert outcomes.pop("client_gone_mid_stream", 0) == (outcome == "completed")
    assert set(outcomes) == {outcome}
    assert not server.hangups._watched
    assert server.empty.is_set()
    await upstream.hang_up()
    await until(lambda: len(asyncio.all_tasks()) == tasks)


async def test_a_defect_outside_an_exchange_ends_the_connection_and_is_logged(
    proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy.worker.proxy.server, "handle", None)
    client = await proxy.connect()
    client.send(post())
    # It may have been answered: a second answer would be that to another request.
    assert await client.rest() == (b"", "reset")
    (record,) = caplog.records
    assert "outside its own error handling" in record.message
