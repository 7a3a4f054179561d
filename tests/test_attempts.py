"""What an attempt may not do: show a key to somebody else, mix two answers, or take the time of another one."""

from __future__ import annotations

import asyncio
import gzip

import pytest

from sseproxy import config
from sseproxy.config.options import Secret
from sseproxy.config.values import Source
from sseproxy.relay.affinity import key_of
from sseproxy.wire.headers import Fields

from .conftest import StartProxy
from .fleet import Act, Node, ask, fleet, good, nodes, occupied, says, status, streams, then_resets, upstream
from .harness import Message, Peer, delta, kept_port, never_accepting, post, until

CREDENTIALS = b"Authorization: Bearer sk-client\r\nx-api-key: sk-client\r\nX-Goog-Api-Key: sk-client\r\n"
STATEFUL = b'{"model":"m","background":true,"input":"' + b"x" * 200 + b'"}'


def with_fields(request: bytes, fields: bytes) -> bytes:
    return request.replace(b"\r\n", b"\r\n" + fields, 1)


def shown(message: Message) -> str:
    return message.start_line + repr(message.fields)


async def test_a_clients_key_goes_to_the_first_upstream_only(start: StartProxy) -> None:
    async with nodes(Node(usual=status(503)), Node()) as (first, other):
        proxy = await start("http://unused", **fleet(upstream("a", first), upstream("b", other)))
        request = with_fields(post(path="/v1/chat/completions?key=sk-client"), CREDENTIALS + b"Cookie: s=sk-client\r\n")
        assert (await ask(proxy, request)).status == 200
        assert shown(first.requests[0]).count("sk-client") == 5
        assert "sk-client" not in shown(other.requests[0])


async def test_a_clients_key_lists_the_models_of_the_first_upstream_only(start: StartProxy) -> None:
    listed = status(200, body=b'{"data":[{"id":"m"}]}')
    async with nodes(Node(usual=listed), Node(usual=listed)) as (first, other):
        proxy = await start("http://unused", **fleet(upstream("a", first), upstream("b", other), merge_models=True))
        request = with_fields(b"GET /v1/models HTTP/1.1\r\nHost: p\r\n\r\n", CREDENTIALS)
        assert (await ask(proxy, request)).status == 200
        assert "sk-client" in shown(first.requests[0])
        assert "sk-client" not in shown(other.requests[0])


async def test_endpoints_of_the_first_upstream_get_the_clients_key(start: StartProxy) -> None:
    async with nodes(Node(usual=status(503)), Node(usual=status(503))) as two:
        proxy = await start("http://unused", **fleet(upstream("a", *two)))
        assert (await ask(proxy, with_fields(post(), CREDENTIALS))).status == 503
        assert [shown(node.requests[0]).count("sk-client") for node in two] == [3, 3]


@pytest.mark.parametrize(
    "encoding", [b"", b"Content-Encoding: gzip\r\n", b"Content-Type: text/plain\r\n"], ids=["late", "gzip", "text"]
)
async def test_a_request_that_may_belong_to_a_state_is_not_repeated(start: StartProxy, encoding: bytes) -> None:
    """Its body is still coming, or cannot be read."""

    async def early(peer: Peer) -> None:
        await status(503)(peer)
        await peer.gone()

    class Hasty(Node):
        async def _message(self, peer: Peer) -> Message:
            return await peer.head()

    async with nodes(Hasty(usual=early), Hasty(usual=early)) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two)))
        body = gzip.compress(STATEFUL) if b"gzip" in encoding else STATEFUL
        request = post(body, "/v1/responses")
        if b"text" in encoding:
            request = request.replace(b"Content-Type: application/json\r\n", encoding)
        else:
            request = with_fields(request, encoding)
        client = await proxy.connect()
        client.send(request if encoding else request[:-100])
        assert (await client.message()).status == 503
        assert sum(len(node.requests) for node in two) == 1


async def test_an_upstream_that_accepts_no_connections_leaves_requests_to_the_next_one(start: StartProxy) -> None:
    async with nodes(Node()) as (other,):
        with never_accepting() as url:
            limits = config.Limits(pending_connects=1)
            two = fleet(upstream("a", f"{url}/a", f"{url}/b"), upstream("b", other))
            proxy = await start("http://unused", **two, limits=limits)
            client = await proxy.connect()
            client.send(post())
            await proxy.busy()
            # Nothing is learned of an endpoint that was not asked.
            for _ in range(6):
                assert (await ask(proxy, post())).status == 200
            assert proxy.sample("retries_total", upstream="a", reason="pending_connects") == 6
            assert proxy.sample("upstream_errors_total", upstream="a") == 0
            client.close()
            assert await proxy.ended() == {"completed": 6, "client_gone_before_head": 1}
            assert occupied(proxy) == 0


async def test_a_pause_takes_nothing_of_the_time_for_a_head(start: StartProxy) -> None:
    async with nodes(Node(status(429, b"retry-after-ms: 400"))) as (node,):
        retry = {"on": ("429", "same")}
        proxy = await start(
            "http://unused", **fleet(upstream("gpus", node), retry=retry, timeouts={"head": 0.2, "connect": 0.2})
        )
        assert (await ask(proxy, post())).status == 200
        assert await proxy.ended() == {"completed": 1}


async def test_total_ends_a_pause(start: StartProxy) -> None:
    async with nodes(Node(status(429, b"retry-after: 2"))) as (node,):
        retry = {"on": ("429", "same")}
        proxy = await start("http://unused", **fleet(upstream("gpus", node), retry=retry, timeouts={"total": 0.2}))
        answer = await ask(proxy, post())
        assert answer.status == 504
        # The second one was not begun.
        assert "attempts" not in answer.json()["error"]["message"]
        assert await proxy.ended() == {"upstream_timeout_total": 1}
        assert occupied(proxy) == 0


async def test_a_client_that_leaves_in_a_pause_ends_it(start: StartProxy) -> None:
    async with nodes(Node(status(429, b"retry-after: 2"))) as (node,):
        proxy = await start("http://unused", **fleet(upstream("gpus", node), retry={"on": ("429", "same")}))
        client = await proxy.connect()
        client.send(post())
        await until(lambda: proxy.sample("retries_total") == 1)
        client.reset()
        assert await proxy.ended() == {"client_gone_before_head": 1}
        assert (len(node.requests), occupied(proxy)) == (1, 0)


async def test_no_pause_ends_too_late(start: StartProxy) -> None:
    async with nodes(Node(usual=status(429, b"retry-after: 2"))) as (node,):
        retry = {"on": ("429", "same"), "within": 1.0}
        proxy = await start("http://unused", **fleet(upstream("gpus", node), retry=retry))
        assert (await ask(proxy, post())).status == 429
        assert len(node.requests) == 1


@pytest.mark.parametrize("last", [then_resets(streams(delta("Half"), end=False)), status(503)], ids=["half", "503"])
async def test_the_last_upstream_is_like_the_others(start: StartProxy, last: Act) -> None:
    """It has one endpoint and none after it, but what comes of it is still held back."""
    async with nodes(Node(usual=status(503)), Node(usual=last)) as two:
        proxy = await start(
            "http://unused", **fleet(upstream("a", two[0]), upstream("b", two[1]), retry={"until": "end"})
        )
        answer = await ask(proxy, post())
        assert (answer.complete, answer.get("x-should-retry")) == (True, "false")
        assert answer.status in (502, 503)
        assert b"Half" not in answer.body


async def test_interim_responses_of_an_attempt_that_fails_do_not_reach_the_client(start: StartProxy) -> None:
    hints = says(b"HTTP/1.1 103 Early Hints\r\nLink: </first>\r\n\r\n")

    async def act(peer: Peer) -> None:
        await hints(peer)
        await status(503)(peer)

    async with nodes(Node(usual=act), Node()) as two:
        proxy = await start("http://unused", **fleet(upstream("a", two[0]), upstream("b", two[1])))
        client = await proxy.connect()
        client.send(post())
        assert (await client.head()).start_line == "HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    "value", ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "Mon, 01 Jan 2026 00:00:00 +" + "9" * 40, "x" * 9000]
)
async def test_a_time_to_wait_that_is_no_time_is_no_fault_of_ours(start: StartProxy, value: str) -> None:
    async with nodes(Node(usual=status(503, b"Retry-After: " + value.encode())), Node()) as two:
        proxy = await start("http://unused", **fleet(upstream("a", two[0]), upstream("b", two[1])))
        assert (await ask(proxy, post())).status == 200


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE"])
async def test_what_has_no_body_is_asked_elsewhere(start: StartProxy, method: bytes) -> None:
    async with nodes(Node(usual=status(503, body=b"")), Node(usual=status(200, body=b""))) as two:
        retry = {"until": "end"}
        proxy = await start("http://unused", **fleet(upstream("a", two[0]), upstream("b", two[1]), retry=retry))
        client = await proxy.connect()
        client.send(method + b" /v1/files/1 HTTP/1.1\r\nHost: p\r\n\r\n")
        answer = await client.message(bodiless=method == b"HEAD")
        assert (answer.status, [len(node.requests) for node in two]) == (200, [1, 1])


async def test_a_client_that_waits_to_be_told_is_told_once(start: StartProxy) -> None:
    async with nodes(Node(usual=status(503)), Node(usual=status(503)), Node(usual=good())) as three:
        proxy = await start("http://unused", **fleet(upstream("gpus", *three), retry={"attempts": 3}))
        head, blank, body = with_fields(post(), b"Expect: 100-continue\r\n").partition(b"\r\n\r\n")
        client = await proxy.connect()
        client.send(head + blank)
        assert (await client.head()).start_line == "HTTP/1.1 100 Continue"
        client.send(body)
        assert (await client.head()).start_line == "HTTP/1.1 200 OK"
        assert {message.body for node in three for message in node.requests} == {body}


async def test_a_body_that_is_read_for_its_key_lets_others_have_their_turns() -> None:
    body = b'{"messages":[' + b'{"a":"b"},' * 200_000 + b"1]}"
    turns, reading = 0, True

    async def count() -> None:
        nonlocal turns
        while reading:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.get_running_loop().create_task(count())
    assert await key_of((Source("prefix", "64"),), Fields([]), [body]) is not None
    reading = False
    await counting
    assert turns >= len(body) // 65536


async def test_two_answers_are_never_one(start: StartProxy) -> None:
    """The first one has generated more than is held back."""
    first = then_resets(streams(*[delta("first " + "x" * 100)] * 40, end=False))
    async with nodes(Node(usual=first), Node(usual=first)) as two:
        retry = {"until": "end", "hold": 1024}
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry=retry))
        answer = await ask(proxy, post())
        assert not answer.complete
        assert answer.body.startswith(delta("first " + "x" * 100))
        assert sum(len(node.requests) for node in two) == 1


@pytest.mark.parametrize("first", [None, "another"])
async def test_the_model_of_a_compressed_body_is_not_replaced(start: StartProxy, first: str | None) -> None:
    """It is read, for a label, but what was read is not where it is in the compressed bytes."""
    async with nodes(Node(usual=status(503)), Node()) as (one, other):
        proxy = await start(
            "http://unused",
            **fleet(upstream("a", one), upstream("b", other), models=(first, "another")),
            metrics=config.Metrics(models=("*",)),
        )
        body = gzip.compress(b'{"model":"m","stream":true,"messages":[]}')
        answer = await ask(proxy, with_fields(post(body), b"Content-Encoding: gzip\r\n"))
        assert answer.status == (503 if first is None else 415)
        assert [message.body for message in one.requests] == ([body] if first is None else [])
        assert not other.requests


async def test_a_body_above_the_limit_is_sent_once_on_a_reused_connection_too(start: StartProxy) -> None:
    """Such a connection may be closing just then. So the body is kept, but only for the same endpoint."""
    async with nodes(Node(good(), usual=status(503)), Node(good(), usual=status(503))) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry={"max_body": 1024}))
        for _ in range(2):
            assert (await ask(proxy, post())).status == 200
        large = post(b'{"model":"m","x":"' + b"x" * 2048 + b'"}')
        assert (await ask(proxy, large)).status == 503
        assert sum(len(node.requests) for node in two) == 3


async def test_a_body_above_the_limit_that_was_not_sent_goes_elsewhere(start: StartProxy) -> None:
    with kept_port() as port:
        async with nodes(Node()) as (node,):
            up = upstream("gpus", f"http://127.0.0.1:{port}/v1", node)
            proxy = await start("http://unused", **fleet(up, retry={"max_body": 1024}))
            for _ in range(2):
                large = post(b'{"model":"m","x":"' + b"x" * 2048 + b'"}')
                assert (await ask(proxy, large)).status == 200


@pytest.mark.parametrize("code", [401, 429])
async def test_who_has_no_key_takes_no_endpoint_from_others(start: StartProxy, code: int) -> None:
    """A CORS preflight is sent without our key, and anybody may send one. What refuses it does not refuse our key."""
    async with nodes(*(Node(usual=status(code, b"Retry-After: 30")) for _ in range(2))) as two:
        somebody = config.Client(name="team", keys=("sha256:" + "0" * 64,))
        fleets = fleet(upstream("a", *two, api_key=Secret("sk-ours")))
        proxy = await start("http://unused", clients=(somebody,), **fleets)
        preflight = (
            b"OPTIONS /v1/x HTTP/1.1\r\nHost: p\r\nOrigin: https://a\r\nAccess-Control-Request-Method: POST\r\n\r\n"
        )
        assert (await ask(proxy, preflight)).status == code
        for endpoint in proxy.worker.proxy.upstreams["a"].endpoints:
            assert endpoint.standing is not None
            assert endpoint.standing.evidence().failures == 0
        assert sum(len(node.requests) for node in two) == (1 if code == 401 else 2)
        # Neither rests for those that have a key.
        assert proxy.worker.proxy.upstreams["a"].choose("m", None) is not None


async def test_a_key_that_rests_for_no_model_is_used_for_those_that_are_named(start: StartProxy) -> None:
    async with nodes(Node(status(429, b"Retry-After: 30")), Node(status(429, b"Retry-After: 30"))) as two:
        proxy = await start("http://unused", **fleet(upstream("a", *two, api_key=Secret("sk-ours"))))
        assert (await ask(proxy, b"GET /v1/files HTTP/1.1\r\nHost: p\r\n\r\n")).status == 429
        chosen = proxy.worker.proxy.upstreams["a"].choose
        assert chosen("m", None) is not None
        assert chosen(None, None) is None
