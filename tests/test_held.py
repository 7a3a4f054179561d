"""What is held back of an answer: whose it is in the end, what it has cost, and what may follow a heartbeat."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import pytest

from .conftest import StartProxy
from .fleet import FAULT, ROLE, Act, Node, ask, fleet, good, nodes, occupied, says, streams, then_resets, upstream
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Message,
    Peer,
    RunningProxy,
    chunk,
    delta,
    kept_port,
    post,
    until,
    usage,
)

SILENT = {
    "/v1/models/g:streamGenerateContent?alt=sse": (
        b'data: {"candidates":[{"content":{"role":"model"},"finishReason":"%b"}],'
        b'"usageMetadata":{"promptTokenCount":5}}\n\n'
    ),
    "/v1/responses": (
        b'data: {"type":"response.completed","response":{"id":"r","status":"%b","output":[],'
        b'"usage":{"input_tokens":5,"output_tokens":0}}}\n\n'
    ),
    "/v1/messages": (
        b'data: {"type":"message_start","message":{"usage":{"input_tokens":5,"output_tokens":1}}}\n\n'
        b'data: {"type":"message_delta","delta":{"stop_reason":"%b"},"usage":{"output_tokens":0}}\n\n'
        b'data: {"type":"message_stop"}\n\n'
    ),
}
"""Answers without content, which end for a reason."""
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
NOTHING = says(EVENTS, b"Content-Length: 0\r\n\r\n")


class AfterAHeartbeat:
    """A client whose stream has begun with a heartbeat. `goes_on` ends the answer that was held back until then."""

    def __init__(self, start: StartProxy, then: Act, request: bytes | None = None, **route: Any) -> None:
        self.first = Node(usual=self._dies_late)
        self.second = Node(usual=then)
        self._start = start
        self._request = request or post()
        self._route: dict[str, Any] = {"retry": {"until": "first_token"}, "heartbeat": 0.05} | route
        self._dying = asyncio.Event()

    async def _dies_late(self, peer: Peer) -> None:
        peer.send(STREAM_HEAD, chunk(ROLE))
        await self._dying.wait()
        peer.reset()

    async def rest(self) -> tuple[RunningProxy, bytes]:
        """The rest of the connection after the heartbeat."""
        proxy = await self._start(
            "http://unused", **fleet(upstream("a", self.first), upstream("b", self.second), **self._route)
        )
        client = await proxy.connect()
        head, blank, body = self._request.partition(b"\r\n\r\n")
        client.send(head, b"\r\nConnection: close", blank, body)
        await client.read_until(chunk(b": heartbeat\n"))
        self._dying.set()
        rest, _ = await client.rest()
        return proxy, rest.replace(chunk(b": heartbeat\n"), b"")


@pytest.mark.parametrize("until_", ["first_token", "end"])
@pytest.mark.parametrize("end", [(FAULT, DONE), (DONE,), ()], ids=["error", "empty", "truncated"])
async def test_tokens_are_counted_once(start: StartProxy, until_: str, end: tuple[bytes, ...]) -> None:
    """Those of the last answer are the client's, if it gets the answer; all others are discarded."""

    async def act(peer: Peer) -> None:
        await streams(ROLE, usage(10, 0), *end, end=bool(end))(peer)
        if not end:
            peer.close()

    async with nodes(Node(usual=act), Node(usual=act)) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry={"until": until_}))
        answer = await ask(proxy, post())
        await proxy.idle()
        got = 10 if b'"prompt_tokens":10' in answer.body else 0
        assert (until_ == "first_token") <= bool(got)
        assert proxy.sample("tokens_total", type="input") == got
        assert proxy.sample("discarded_tokens_total", type="input") == 20 - got
        assert occupied(proxy) == 0


async def test_tokens_of_an_answer_that_its_client_left_are_discarded(start: StartProxy) -> None:
    async def act(peer: Peer) -> None:
        await streams(ROLE, delta("Hi"), usage(10, 1), end=False)(peer)
        await peer.gone()

    async with nodes(Node(usual=act), Node(usual=act)) as two:
        proxy = await start(
            "http://unused", **fleet(upstream("gpus", *two), retry={"until": "end"}, timeouts={"total": 0.3})
        )
        assert (await ask(proxy, post())).status == 504
        assert proxy.sample("discarded_tokens_total", type="input") == 10
        assert proxy.sample("tokens_total") == 0


@pytest.mark.parametrize("until_", ["first_token", "end"])
async def test_a_stream_of_no_bytes_is_empty(start: StartProxy, until_: str) -> None:
    async with nodes(Node(usual=NOTHING), Node()) as two:
        proxy = await start(
            "http://unused", **fleet(upstream("a", two[0]), upstream("b", two[1]), retry={"until": until_})
        )
        for _ in range(2):
            answer = await ask(proxy, post())
            assert (answer.status, answer.body) == (200, delta("Hi") + DONE)
        assert proxy.sample("retries_total", reason="empty") == 2
    async with nodes(Node(usual=NOTHING), Node(usual=NOTHING)) as two:
        proxy = await start(
            "http://unused", **fleet(upstream("a", two[0]), upstream("b", two[1]), retry={"until": until_})
        )
        answer = await ask(proxy, post())
        assert (answer.status, answer.complete) == (200 if until_ == "first_token" else 502, True)


@pytest.mark.parametrize(
    ("path", "natural", "other"),
    [*zip(SILENT, (b"STOP", b"completed", b"end_turn"), (b"SAFETY", b"incomplete", b"refusal"), strict=True)],
    ids=["gemini", "responses", "messages"],
)
async def test_an_answer_that_says_nothing_is_empty_in_each_api(
    start: StartProxy, path: str, natural: bytes, other: bytes
) -> None:
    """Unless it says why it has no content."""
    for reason, asked in ((natural, 1), (other, 0)):
        async with nodes(Node(usual=streams(SILENT[path] % reason)), Node()) as two:
            proxy = await start(
                "http://unused", **fleet(upstream("a", two[0]), upstream("b", two[1]), retry={"until": "first_token"})
            )
            assert (await ask(proxy, post(path=path))).status == 200
            assert len(two[1].requests) == asked


async def test_a_stream_of_no_bytes_ends_after_a_heartbeat(start: StartProxy) -> None:
    told = AfterAHeartbeat(start, NOTHING)
    async with nodes(told.first, told.second):
        proxy, rest = await told.rest()
        assert rest == LAST_CHUNK
        assert await proxy.ended() == {"completed": 1}


async def test_no_compressed_stream_follows_a_heartbeat(start: StartProxy) -> None:
    """The head that went out says nothing of a coding."""
    packed = gzip.compress(delta("Hi") + DONE)
    head = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    told = AfterAHeartbeat(start, says(EVENTS, head, packed))
    async with nodes(told.first, told.second):
        proxy, rest = await told.rest()
        assert b"event: error\n" in rest
        assert packed not in rest
        assert await proxy.ended() == {"upstream_error": 1}


async def test_an_upstream_that_is_out_is_a_choice_as_well(start: StartProxy) -> None:
    """Half an answer is never sent, also while only one endpoint is left."""
    half = then_resets(streams(delta("Half"), end=False))
    with kept_port() as port:
        async with nodes(Node(usual=half)) as (node,):
            proxy = await start(
                "http://unused",
                **fleet(upstream("a", f"http://127.0.0.1:{port}/v1"), upstream("b", node), retry={"until": "end"}),
            )
            (endpoint,) = proxy.worker.proxy.upstreams["a"].endpoints
            assert endpoint.standing is not None
            # As the supervisor says it.
            endpoint.standing.eject(1, None)
            assert endpoint.standing.is_out
            answer = await ask(proxy, post())
            assert (answer.status, answer.complete, answer.get("x-should-retry")) == (502, True, "false")
            assert b"Half" not in answer.body


async def test_an_upload_takes_nothing_of_the_time_for_a_token(start: StartProxy) -> None:
    """The head has come, so the rest of the request is waited for no more."""

    class Hasty(Node):
        async def _message(self, peer: Peer) -> Message:
            return await peer.head()

    async def act(peer: Peer) -> None:
        peer.send(STREAM_HEAD, chunk(ROLE))
        await peer.read_until(b"]}")
        await asyncio.sleep(0.3)
        peer.send(chunk(delta("Hi")), chunk(DONE), LAST_CHUNK)
        await peer.gone()

    async with nodes(Hasty(usual=act), Hasty(usual=act)) as two:
        proxy = await start(
            "http://unused",
            **fleet(upstream("gpus", *two), retry={"until": "first_token"}, timeouts={"head": 0.2, "first_token": 5.0}),
        )
        request = post()
        client = await proxy.connect()
        client.send(request[:-5])
        await until(lambda: sum(len(node.requests) for node in two) == 1)
        client.send(request[-5:])
        assert (await client.message()).complete
        assert sum(len(node.requests) for node in two) == 1


async def test_a_client_is_not_blamed_for_an_endpoint_that_is_slow_after_a_heartbeat(start: StartProxy) -> None:
    """A head has gone out, but not of the attempt that is under way."""

    async def slow(peer: Peer) -> None:
        await asyncio.sleep(0.4)
        await good()(peer)

    large = post(b'{"model":"m","stream":true,"messages":["' + b"x" * 100_000 + b'"]}')
    told = AfterAHeartbeat(start, slow, large, timeouts={"body": 0.2, "head": 5.0})
    async with nodes(told.first, told.second):
        proxy, rest = await told.rest()
        assert rest == chunk(delta("Hi") + DONE) + LAST_CHUNK
        assert await proxy.ended() == {"completed": 1}


async def test_a_whole_answer_is_not_late_because_it_was_held_back(start: StartProxy) -> None:
    """It is so large that it is handed on in several turns."""
    event = b'data: {"choices":[{"index":0,"delta":{}}]}\n\n'

    async def act(peer: Peer) -> None:
        peer.send(STREAM_HEAD, chunk(event * 5_000), chunk(delta("Hi")))
        await peer.drain()
        await asyncio.sleep(1.0)
        peer.send(chunk(DONE), LAST_CHUNK)

    async with nodes(Node(usual=act), Node(usual=act)) as two:
        proxy = await start(
            "http://unused",
            **fleet(upstream("gpus", *two), retry={"until": "end"}, timeouts={"first_token": 0.8, "idle": 5.0}),
        )
        answer = await ask(proxy, post())
        assert (answer.complete, answer.body) == (True, event * 5_000 + delta("Hi") + DONE)
        assert await proxy.ended() == {"completed": 1}


@pytest.mark.parametrize("parts", [False, True], ids=["in one read", "in two reads"])
async def test_an_error_that_an_endpoint_tells_counts_although_what_follows_is_broken(
    start: StartProxy, parts: bool
) -> None:
    async def act(peer: Peer) -> None:
        peer.send(STREAM_HEAD, chunk(FAULT), *(() if parts else (b"no size\r\n",)))
        await peer.drain()
        if parts:
            await asyncio.sleep(0.1)
            peer.send(b"no size\r\n")

    async with nodes(Node(usual=act), Node(usual=act)) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry={"until": "end"}))
        answer = await ask(proxy, post())
        assert (answer.status, answer.complete) == (200, False)
        assert answer.body.startswith(FAULT)
        assert proxy.sample("retries_total", reason="error") == 1
