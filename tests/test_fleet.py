"""Several endpoints behind one name: which one is asked, what is tried again, and what never is."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from sseproxy import config
from sseproxy.config.options import Secret
from sseproxy.config.values import RETRIES, Source

from .conftest import StartProxy
from .fleet import (
    FAULT,
    ROLE,
    Act,
    Node,
    ask,
    attempts,
    fleet,
    good,
    nodes,
    occupied,
    silent,
    status,
    streams,
    then_resets,
    upstream,
)
from .harness import DONE, LAST_CHUNK, STREAM_HEAD, Peer, chunk, delta, kept_port, post, until, usage

KEY = Secret("sk-ours")


async def test_each_endpoint_gets_as_many_streams(start: StartProxy) -> None:
    opened = streams(delta("Hi"), end=False)

    async def stays(peer):  # type: ignore[no-untyped-def]
        await opened(peer)
        await peer.gone()

    async with nodes(*(Node(usual=stays) for _ in range(3))) as three:
        proxy = await start("http://unused", **fleet(upstream("gpus", *three)))
        clients = [await proxy.connect() for _ in range(30)]
        for client in clients:
            client.send(post())
            await client.read_until(delta("Hi"))
        assert [len(node.requests) for node in three] == [10, 10, 10]
        # A place that becomes free is taken next.
        for client in clients[:6:3]:
            client.reset()
        await until(lambda: occupied(proxy) == 28)
        await until(lambda: sum(node.server.open for node in three) == 28)
        for client in clients:
            client.reset()
        await proxy.idle()
        assert occupied(proxy) == 0


async def test_what_cannot_be_connected_to_is_not_noticed(start: StartProxy) -> None:
    with kept_port() as port:
        async with nodes(Node()) as (node,):
            proxy = await start("http://unused", **fleet(upstream("gpus", f"http://127.0.0.1:{port}/v1", node)))
            for _ in range(4):
                answer = await ask(proxy, post())
                assert (answer.status, answer.complete, answer.get("x-should-retry")) == (200, True, None)
            assert len(node.requests) == 4
            refused = proxy.sample("attempts_total", endpoint=f"127.0.0.1:{port}", result="connect")
            assert refused >= 1
            assert proxy.sample("retries_total", route="api", upstream="gpus", reason="connect") == refused
            assert proxy.sample("attempts_total", endpoint=node.label, result="completed") == 4
            assert await proxy.ended() == {"completed": 4}
            assert occupied(proxy) == 0


@pytest.mark.parametrize("code", [429, 503, 529])
async def test_what_was_refused_for_load_is_asked_elsewhere(start: StartProxy, code: int) -> None:
    async with nodes(Node(usual=status(code)), Node(usual=status(code)), Node()) as three:
        proxy = await start("http://unused", **fleet(upstream("gpus", *three), retry={"attempts": 3}))
        request = post()
        for _ in range(3):
            assert (await ask(proxy, request)).status == 200
        assert len(three[2].requests) == 3
        assert {message.body for node in three for message in node.requests} == {request.partition(b"\r\n\r\n")[2]}
        assert await proxy.ended() == {"completed": 3}


@pytest.mark.parametrize("code", [400, 404, 422, 500, 502, 504])
async def test_other_statuses_are_the_answer(start: StartProxy, code: int) -> None:
    async with nodes(Node(usual=status(code)), Node(usual=status(code))) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two)))
        assert (await ask(proxy, post())).status == code
        assert sum(len(node.requests) for node in two) == 1


@pytest.mark.parametrize(
    ("act", "on"),
    [
        (status(500), "500"),
        (status(502), "502"),
        (status(504), "504"),
        (then_resets(), "reset"),
        (silent, "timeout"),
    ],
    ids=["500", "502", "504", "reset", "timeout"],
)
async def test_what_may_be_paid_for_twice_is_opted_in(start: StartProxy, act: Act, on: str) -> None:
    async with nodes(Node(usual=act), Node(usual=act), Node()) as three:
        proxy = await start(
            "http://unused",
            **fleet(upstream("gpus", *three), retry={"on": (on,), "attempts": 3}, timeouts={"head": 0.05}),
        )
        for _ in range(3):
            assert (await ask(proxy, post())).status == 200
        assert len(three[2].requests) == 3
        assert await proxy.ended() == {"completed": 3}


async def test_the_last_answer_is_what_the_client_gets(start: StartProxy) -> None:
    async with nodes(Node(usual=status(503)), Node(usual=status(503))) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two)))
        answer = await ask(proxy, post())
        assert (answer.status, answer.get("x-should-retry"), answer.body) == (
            503,
            "false",
            b'{"error":{"message":"no"}}',
        )
        assert [len(node.requests) for node in two] == [1, 1]
    async with nodes(Node(usual=status(503, b"Retry-After: 7")), Node(usual=status(503, b"Retry-After: 7"))) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two)))
        answer = await ask(proxy, post())
        assert (answer.status, answer.get("x-should-retry"), answer.get("retry-after")) == (503, None, "7")


async def test_our_own_errors_say_how_many_were_tried(start: StartProxy) -> None:
    with kept_port() as one, kept_port() as other:
        up = upstream("gpus", f"http://127.0.0.1:{one}/v1", f"http://127.0.0.1:{other}/v1")
        proxy = await start("http://unused", **fleet(up))
        answer = await ask(proxy, post())
        assert (answer.status, answer.get("x-should-retry")) == (502, "false")
        assert "This was the last of 2 attempts." in answer.json()["error"]["message"]
        assert await proxy.ended() == {"upstream_error": 1}
        assert occupied(proxy) == 0


async def test_nothing_is_repeated_after_the_head(start: StartProxy) -> None:
    """Whatever is opted in: a byte of the answer has been sent."""
    everything = RETRIES
    async with nodes(
        Node(usual=then_resets(streams(ROLE, end=False))), Node(usual=then_resets(streams(ROLE, end=False)))
    ) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry={"on": everything, "attempts": 5}))
        answer = await ask(proxy, post())
        assert (answer.status, answer.complete) == (200, False)
        assert sum(len(node.requests) for node in two) == 1
        assert await proxy.ended() == {"truncated": 1}


@pytest.mark.parametrize("code", [401, 403])
async def test_our_key_that_is_refused_is_not_the_clients_fault(start: StartProxy, code: int) -> None:
    async with nodes(Node(usual=status(code)), Node()) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two, api_key=KEY)))
        for _ in range(2):
            assert (await ask(proxy, post())).status == 200
        assert proxy.sample("retries_total", reason="key") >= 1
    async with nodes(Node(usual=status(code)), Node(usual=status(code))) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two)))
        assert (await ask(proxy, post())).status == code
        assert sum(len(node.requests) for node in two) == 1


async def test_the_next_upstream_has_another_model_and_the_same_bytes(start: StartProxy) -> None:
    body = (
        b'{ "messages" : [{"role":"user","content":"\\u00e9 model"}],\n "model" :  "llama-3", "stream":true, "x": 1e5 }'
    )
    async with nodes(Node(usual=status(503)), Node(), Node()) as (first, second, _):
        proxy = await start(
            "http://unused",
            **fleet(upstream("gpus", first), upstream("openai", second), models=(None, "gpt-4o-mini")),
            metrics=config.Metrics(models=("llama-*", "gpt-*")),
        )
        assert (await ask(proxy, post(body))).status == 200
        assert first.requests[0].body == body
        assert second.requests[0].body == body.replace(b'"llama-3"', b'"gpt-4o-mini"')
        assert second.requests[0].get("content-length") == str(len(body) + 4)
        assert proxy.sample("requests_total", upstream="openai", model="gpt-*", outcome="completed") == 1
        assert proxy.sample("requests_total", upstream="gpus") == 0
        assert proxy.sample("requests_active") == 0
        assert proxy.sample("retries_total", upstream="gpus", reason="503") == 1


@pytest.mark.parametrize(
    "text",
    [
        b'{"error":{"message":"x","type":"invalid_request_error","code":"context_length_exceeded"}}',
        b'{"object":"error","message":"This model\'s maximum context length is 8192 tokens. However, ...","code":400}',
        b'{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 21 > 20"}}',
        b'{"error":{"code":400,"message":"The input token count (11) exceeds the maximum number of tokens"}}',
        b'{"error":{"code":400,"type":"exceed_context_size_error","message":"the request exceeds it"}}',
    ],
    ids=["openai", "vllm", "anthropic", "gemini", "llama.cpp"],
)
async def test_a_prompt_that_is_too_long_goes_to_the_next_upstream(start: StartProxy, text: bytes) -> None:
    async with nodes(Node(usual=status(400, body=text)), Node(usual=status(400, body=text)), Node()) as (
        one,
        two,
        large,
    ):
        proxy = await start("http://unused", **fleet(upstream("small", one, two), upstream("large", large)))
        assert (await ask(proxy, post())).status == 200
        assert len(one.requests) + len(two.requests) == 1
        # It is no fault of the endpoint.
        assert proxy.sample("retries_total", reason="context") == 1


async def test_another_400_is_the_answer_to_the_byte(start: StartProxy) -> None:
    text = b'{"error":{"message":"content_filter","code":"content_filter"}}'
    async with nodes(Node(usual=status(400, body=text)), Node()) as (one, other):
        proxy = await start("http://unused", **fleet(upstream("a", one), upstream("b", other)))
        answer = await ask(proxy, post())
        assert (answer.status, answer.body, other.requests) == (400, text, [])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", b'{"model":"m","background":true,"input":"x"}'),
        ("/v1/responses", b'{"model":"m","previous_response_id":"resp_1","input":"x"}'),
        ("/v1/responses", b'{"model":"m","conversation":"conv_1","input":"x"}'),
        ("/v1/threads/t/runs", b'{"assistant_id":"a"}'),
    ],
)
async def test_what_belongs_to_a_state_is_sent_again_only_if_it_was_not_sent(
    start: StartProxy, path: str, body: bytes
) -> None:
    async with nodes(Node(usual=status(503)), Node(usual=status(503))) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two)))
        assert (await ask(proxy, post(body, path))).status == 503
        assert sum(len(node.requests) for node in two) == 1
    with kept_port() as port:
        async with nodes(Node(usual=status(200, body=b"{}"))) as (node,):
            proxy = await start("http://unused", **fleet(upstream("gpus", f"http://127.0.0.1:{port}/v1", node)))
            for _ in range(2):
                assert (await ask(proxy, post(body, path))).status == 200


async def test_a_body_that_is_too_large_to_be_kept_is_sent_once(start: StartProxy) -> None:
    async with nodes(Node(usual=status(503)), Node(usual=status(503))) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry={"max_body": 1024}))
        large = b'{"model":"m","x":"' + b"x" * 2048 + b'"}'
        assert (await ask(proxy, post(large))).status == 503
        assert sum(len(node.requests) for node in two) == 1
        assert (await ask(proxy, post())).status == 503
        assert sum(len(node.requests) for node in two) == 3


async def test_the_same_endpoint_is_asked_again_if_that_is_wanted(start: StartProxy) -> None:
    async with nodes(Node(status(429, b"retry-after-ms: 1"))) as (node,):
        retry = {"on": ("429", "same")}
        proxy = await start("http://unused", **fleet(upstream("gpus", node), retry=retry))
        assert (await ask(proxy, post())).status == 200
        assert len(node.requests) == 2
        # Only once.
        node.acts.extend([status(429, b"retry-after-ms: 1")] * 2)
        assert (await ask(proxy, post())).status == 429
        # Not if it takes long.
        node.acts.extend([status(429, b"retry-after: 20")])
        assert (await ask(proxy, post())).status == 429
        assert len(node.requests) == 5


async def test_a_key_rests_for_the_model_that_was_refused(start: StartProxy) -> None:
    async with nodes(Node(status(429, b"Retry-After: 30")), Node(status(429, b"Retry-After: 30"))) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two, api_key=KEY)))
        answer = await ask(proxy, post())
        assert (answer.status, answer.get("retry-after")) == (429, "30")
        # Both rest, so both are used all the same.
        assert (await ask(proxy, post())).status == 200
    async with nodes(Node(status(429, b"Retry-After: 30")), Node()) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two, api_key=KEY)))
        for _ in range(6):
            assert (await ask(proxy, post())).status == 200
        assert len(two[0].requests) <= 1
        assert len(two[1].requests) == 6
        if two[0].requests:
            await ask(proxy, post(b'{"model":"other","messages":[]}'))
            await ask(proxy, post(b'{"model":"other","messages":[]}'))
            assert len(two[0].requests) == 2


@pytest.mark.parametrize(
    ("source", "one", "other"),
    [
        (
            Source("header", "X-Session"),
            {"headers": b"x-session: 1\r\n"},
            {"headers": b"x-session: 2\r\n"},
        ),
        (Source("field", "prompt_cache_key"), {"prompt_cache_key": "1"}, {"prompt_cache_key": "2"}),
        (
            Source("prefix", "64"),
            {"messages": [{"role": "user", "content": "1" * 80}]},
            {"messages": [{"content": "2"}]},
        ),
    ],
    ids=["header", "field", "prefix"],
)
async def test_requests_with_the_same_key_go_to_the_same_endpoint(
    start: StartProxy, source: Source, one: dict[str, object], other: dict[str, object]
) -> None:
    def request(parts: dict[str, object], number: int) -> bytes:
        body = {"model": "m", **{key: value for key, value in parts.items() if key != "headers"}, "n": number}
        head, blank, rest = post(msgspec.json.encode(body)).partition(b"\r\n\r\n")
        extra = parts.get("headers", b"")
        assert isinstance(extra, bytes)
        return head + b"\r\n" + extra + blank[2:] + rest

    async with nodes(*(Node() for _ in range(5))) as five:
        proxy = await start("http://unused", **fleet(upstream("gpus", *five, affinity=(source,))))
        for number in range(8):
            assert (await ask(proxy, request(one, number))).status == 200
        assert sorted(len(node.requests) for node in five) == [0, 0, 0, 0, 8]
        for number in range(30):
            parts = msgspec.json.decode(
                msgspec.json.encode(other | {"headers": ""}).replace(b"2", str(number + 10).encode())
            )
            parts["headers"] = b"x-session: %d\r\n" % number
            await ask(proxy, request(parts, number))
        # Other keys are spread.
        assert sum(bool(node.requests) for node in five) >= 3


@pytest.mark.parametrize(
    "act",
    [
        streams(ROLE, FAULT, DONE),
        then_resets(streams(ROLE, end=False)),
        streams(ROLE, DONE),
        streams(DONE),
        then_resets(),
        silent,
    ],
    ids=["error", "truncated", "empty", "only an end", "reset", "silent"],
)
@pytest.mark.parametrize("until_", ["first_token", "end"])
async def test_what_fails_before_its_first_token_is_asked_elsewhere(start: StartProxy, act: Act, until_: str) -> None:
    async with nodes(Node(usual=act), Node(usual=act), Node(usual=streams(ROLE, delta("Hi"), DONE))) as three:
        proxy = await start(
            "http://unused",
            **fleet(
                upstream("gpus", *three),
                retry={"until": until_, "attempts": 3},
                timeouts={"head": 0.1, "first_token": 0.1},
            ),
        )
        for _ in range(3):
            answer = await ask(proxy, post())
            assert (answer.status, answer.complete, answer.body) == (200, True, ROLE + delta("Hi") + DONE)
        assert await proxy.ended() == {"completed": 3}
        assert len(three[2].requests) == 3
        assert proxy.sample("held_seconds_count") == 3
        assert occupied(proxy) == 0


async def test_a_stream_is_sent_from_its_first_token_on(start: StartProxy) -> None:
    async def act(peer):  # type: ignore[no-untyped-def]
        await streams(ROLE, delta("Hi"), end=False)(peer)
        await peer.gone()

    async with nodes(Node(usual=act), Node(usual=act)) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry={"until": "first_token"}))
        client = await proxy.connect()
        client.send(post())
        await client.read_until(chunk(ROLE) + chunk(delta("Hi")))
        client.reset()
        assert await proxy.ended() == {"client_gone_mid_stream": 1}
        assert sum(len(node.requests) for node in two) == 1


async def test_after_its_first_token_a_stream_is_not_repeated(start: StartProxy) -> None:
    act = then_resets(streams(delta("Hi"), end=False))
    async with nodes(Node(usual=act), Node(usual=act)) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry={"until": "first_token"}))
        answer = await ask(proxy, post())
        assert not answer.complete
        assert answer.body.startswith(delta("Hi"))
        assert sum(len(node.requests) for node in two) == 1


@pytest.mark.parametrize(
    "act",
    [
        streams(delta("Half"), FAULT, DONE),
        then_resets(streams(delta("Half"), usage(3, 4), end=False)),
        then_resets(streams(delta("Half"), end=False)),
    ],
    ids=["error", "truncated after usage", "truncated"],
)
async def test_a_whole_answer_or_none(start: StartProxy, act: Act) -> None:
    async with nodes(Node(usual=act), Node(usual=act), Node(usual=streams(delta("Whole"), usage(3, 2), DONE))) as three:
        proxy = await start("http://unused", **fleet(upstream("gpus", *three), retry={"until": "end", "attempts": 3}))
        for _ in range(3):
            answer = await ask(proxy, post())
            assert (answer.status, answer.complete, answer.body) == (200, True, delta("Whole") + usage(3, 2) + DONE)
        assert await proxy.ended() == {"completed": 3}
        assert proxy.sample("tokens_total", type="output") == 6
        thrown = sum(len(node.requests) for node in three[:2])
        told = proxy.sample("discarded_tokens_total", type="output")
        assert told in (0, 4 * thrown)
        assert proxy.sample("inter_token_latency_seconds_count") == 0
        assert occupied(proxy) == 0
    async with nodes(Node(usual=act), Node(usual=act)) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry={"until": "end"}))
        answer = await ask(proxy, post())
        assert b"Half" not in answer.body
        assert (answer.status, answer.complete, answer.get("x-should-retry")) == (502, True, "false")
        assert await proxy.ended() in ({"upstream_error": 1}, {"truncated": 1})


async def test_an_answer_that_is_too_large_to_be_held_is_sent(start: StartProxy) -> None:
    async def act(peer):  # type: ignore[no-untyped-def]
        await streams(*[delta("x" * 500)] * 10, end=False)(peer)
        await peer.gone()

    async with nodes(Node(usual=act), Node(usual=act)) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry={"until": "end", "hold": 4096}))
        client = await proxy.connect()
        client.send(post())
        await client.read_until(chunk(delta("x" * 500)))
        client.reset()
        await proxy.idle()


@pytest.mark.parametrize("until_", ["head", "first_token", "end"])
async def test_a_client_that_leaves_ends_the_attempt_and_no_other_begins(start: StartProxy, until_: str) -> None:
    async def act(peer):  # type: ignore[no-untyped-def]
        if until_ != "head":
            await streams(ROLE, end=False)(peer)
        await peer.gone()

    async with nodes(Node(usual=act), Node(usual=act)) as two:
        retry = {"until": until_, "on": RETRIES}
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry=retry))
        client = await proxy.connect()
        client.send(post())
        await until(lambda: sum(len(node.requests) for node in two) == 1)
        client.reset()
        await proxy.idle()
        await until(lambda: not any(node.server.open for node in two))
        assert sum(len(node.requests) for node in two) == 1
        assert occupied(proxy) == 0


async def test_total_counts_over_all_attempts(start: StartProxy) -> None:
    async with nodes(Node(usual=silent), Node(usual=silent), Node(usual=silent)) as three:
        proxy = await start(
            "http://unused",
            **fleet(
                upstream("gpus", *three),
                retry={"on": ("timeout",), "attempts": 3},
                timeouts={"head": 0.2, "total": 0.3},
            ),
        )
        answer = await ask(proxy, post())
        assert answer.status == 504
        assert sum(len(node.requests) for node in three) == 2
        assert "This was the last of 2 attempts." in answer.json()["error"]["message"]
        assert await proxy.ended() == {"upstream_timeout_total": 1}


async def test_no_attempt_begins_late(start: StartProxy) -> None:
    async with nodes(Node(usual=silent), Node(usual=silent)) as two:
        retry = {"on": ("timeout",), "within": 0.05}
        proxy = await start("http://unused", **fleet(upstream("gpus", *two), retry=retry, timeouts={"head": 0.1}))
        assert (await ask(proxy, post())).status == 504
        assert sum(len(node.requests) for node in two) == 1


async def test_a_sick_fleet_is_not_hit_twice_as_hard(start: StartProxy) -> None:
    """Of requests that all fail, few are tried again."""
    async with nodes(Node(usual=silent), Node(usual=silent)) as two:
        proxy = await start(
            "http://unused", **fleet(upstream("gpus", *two), retry={"on": ("timeout",)}, timeouts={"head": 0.3})
        )
        clients = [await proxy.connect() for _ in range(40)]
        for client in clients:
            client.send(post())
        await until(lambda: sum(len(node.requests) for node in two) >= 40)
        await asyncio.gather(*(client.message() for client in clients))
        assert sum(len(node.requests) for node in two) <= 40 + 9
        assert occupied(proxy) == 0


async def test_an_upload_that_is_still_coming_is_sent_from_its_beginning(start: StartProxy) -> None:
    body = b'{"model":"m","messages":["' + b"x" * 3000 + b'"]}'
    request = post(body)
    async with nodes(Node(usual=status(503)), Node(usual=status(503)), Node()) as three:
        proxy = await start("http://unused", **fleet(upstream("gpus", *three), retry={"attempts": 3}))
        client = await proxy.connect()
        client.send(request[:-1000])
        # An endpoint of this kind waits for the whole body before it answers.
        await until(lambda: bool(proxy.worker.proxy.active))
        client.send(request[-1000:])
        assert (await client.message()).status == 200
        assert {message.body for node in three for message in node.requests} == {body}
    assert attempts(proxy)


async def test_heads_of_the_same_stream_name_nothing_of_others(start: StartProxy) -> None:
    async with nodes(Node(usual=status(503, b"X-Node: first")), Node(usual=good())) as two:
        proxy = await start("http://unused", **fleet(upstream("gpus", *two)))
        for _ in range(2):
            answer = await ask(proxy, post())
            assert (answer.status, answer.get("x-node")) == (200, None)


# --- heartbeats while an answer is held back ---


async def test_heartbeats_begin_before_it_is_known_who_answers(start: StartProxy) -> None:
    async def dies_late(peer: Peer) -> None:
        peer.send(STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nX-Node: first\r\n\r\n"), chunk(ROLE))
        await dying.wait()
        peer.reset()

    dying = asyncio.Event()
    mark = b"\xef\xbb\xbf"
    async with nodes(Node(usual=dies_late), Node(usual=streams(mark + ROLE, delta("Hi"), DONE))) as two:
        proxy = await start(
            "http://unused",
            **fleet(upstream("a", two[0]), upstream("b", two[1]), retry={"until": "first_token"}, heartbeat=0.05),
        )
        client = await proxy.connect()
        client.send(post())
        head = await client.head()
        assert (head.status, head.get("content-type"), head.get("x-node")) == (
            200,
            "text/event-stream; charset=utf-8",
            None,
        )
        await client.read_until(chunk(b": heartbeat\n"))
        dying.set()
        rest = await client.read_until(LAST_CHUNK)
        # What began the first answer, and the mark, which may only be at the beginning, are not in it.
        assert rest.removeprefix(chunk(b": heartbeat\n")) == chunk(ROLE + delta("Hi") + DONE) + LAST_CHUNK
        client.send(post())
        assert (await client.message()).complete
        assert await proxy.ended() == {"completed": 2}


async def test_when_all_fail_after_a_heartbeat_the_stream_says_so(start: StartProxy) -> None:
    async def dies_late(peer: Peer) -> None:
        peer.send(STREAM_HEAD, chunk(ROLE))
        await dying.wait()
        peer.reset()

    dying = asyncio.Event()
    async with nodes(Node(usual=dies_late), Node(usual=status(503))) as two:
        proxy = await start(
            "http://unused",
            **fleet(upstream("a", two[0]), upstream("b", two[1]), retry={"until": "first_token"}, heartbeat=0.05),
        )
        client = await proxy.connect()
        client.send(post())
        await client.read_until(chunk(b": heartbeat\n"))
        dying.set()
        rest, _ = await client.rest()
        assert b"event: error\n" in rest
        assert b"This was the last of 2 attempts." in rest
        assert not rest.endswith(LAST_CHUNK)
        assert await proxy.ended() == {"upstream_error": 1}
        assert proxy.sample("streams_active") == 0
        assert proxy.sample("requests_active") == 0
        assert occupied(proxy) == 0


async def test_a_client_that_leaves_after_a_heartbeat_has_seen_no_token(start: StartProxy) -> None:
    async with nodes(Node(usual=streams(ROLE, end=False)), Node()) as two:
        proxy = await start(
            "http://unused",
            **fleet(upstream("a", two[0]), upstream("b", two[1]), retry={"until": "first_token"}, heartbeat=0.05),
        )
        client = await proxy.connect()
        client.send(post())
        await client.read_until(chunk(b": heartbeat\n"))
        client.reset()
        assert await proxy.ended() == {"client_gone_before_first_token": 1}
        assert not two[1].requests


async def test_what_other_routes_see_of_an_endpoint_is_counted(start: StartProxy) -> None:
    """A route with one upstream, which is also that of a route with a choice."""
    async with nodes(Node(usual=status(500)), Node()) as (sick, other):
        options = fleet(upstream("a", sick), upstream("b", other))
        match = config.Match(path="/alone")
        options["routes"] += (config.Route(name="alone", match=match, upstream=(config.Target(name="a"),)),)
        proxy = await start("http://unused", **options)
        assert (await ask(proxy, post(path="/alone/chat/completions"))).status == 500
        (endpoint,) = proxy.worker.proxy.upstreams["a"].endpoints
        assert endpoint.standing is not None
        assert endpoint.standing.evidence().failures == 1
        assert attempts(proxy) == {(sick.label, "500"): 1}
