"""One list of the models of all endpoints of a route."""

from __future__ import annotations

import msgspec
import pytest

from sseproxy.config.options import Secret
from sseproxy.relay import models
from sseproxy.wire.credentials import new_key

from .conftest import StartProxy
from .fleet import Act, Node, ask, fleet, nodes, says, silent, status, upstream
from .harness import Peer, kept_port, post
from .test_clients import KEY as TEAM_A
from .test_clients import OTHER, bearer, client

GET = b"GET /v1/models HTTP/1.1\r\nHost: proxy\r\n%b\r\n"
KEY = Secret("sk-ours")
THIRD = new_key()


def lists(*models: str, **more: object) -> Act:
    """An endpoint that lists `models`, and answers everything else with its name."""
    data = [{"id": model, "object": "model", "owned_by": models[0]} | more for model in models]
    return status(200, body=msgspec.json.encode({"object": "list", "data": data}))


def completes(name: str) -> Act:
    return status(200, body=b'{"choices":[],"by":"%b"}' % name.encode())


def ids(body: bytes) -> list[str]:
    return [model["id"] for model in msgspec.json.decode(body)["data"]]


async def test_the_models_of_all_upstreams_are_listed_and_route_requests(start: StartProxy) -> None:
    async with nodes(
        Node(lists("llama", "both"), usual=completes("a")), Node(lists("gpt", "both"), usual=completes("b"))
    ) as (a, b):
        proxy = await start(
            "http://unused",
            **fleet(upstream("a", a, api_key=KEY), upstream("b", b, api_key=KEY), merge_models=True),
        )
        answer = await ask(proxy, GET % b"")
        assert (answer.status, answer.get("content-type"), ids(answer.body)) == (
            200,
            "application/json",
            ["llama", "both", "gpt"],
        )
        # What an upstream tells of a model stays.
        assert answer.json()["data"][0] == {"id": "llama", "object": "model", "owned_by": "llama"}
        # It is kept for a while.
        await ask(proxy, GET % b"")
        assert [len(node.requests) for node in (a, b)] == [1, 1]
        assert a.requests[0].get("authorization") == "Bearer sk-ours"
        for model, by in (("llama", "a"), ("gpt", "b"), ("both", "a"), ("unknown", "a")):
            body = msgspec.json.encode({"model": model, "messages": []})
            assert (await ask(proxy, post(body))).json()["by"] == by
        assert await proxy.ended() == {"completed": 6}


async def test_the_first_request_is_routed_by_a_list_that_was_not_asked_for(start: StartProxy) -> None:
    async with nodes(Node(lists("llama"), usual=completes("a")), Node(lists("gpt"), usual=completes("b"))) as (a, b):
        proxy = await start("http://unused", **fleet(upstream("a", a), upstream("b", b), merge_models=True))
        assert (await ask(proxy, post(b'{"model":"gpt","messages":[]}'))).json()["by"] == "b"


async def test_who_has_no_key_of_ours_sees_what_its_own_key_may(start: StartProxy) -> None:
    async def own(peer: Peer) -> None:
        key = node.requests[-1].get("authorization") or "nobody"
        await lists(key)(peer)

    node = Node(usual=own)
    async with nodes(node):
        proxy = await start("http://unused", **fleet(upstream("a", node), merge_models=True))
        for key in ("Bearer one", "Bearer two"):
            assert ids((await ask(proxy, GET % f"Authorization: {key}\r\n".encode())).body) == [key]
        assert ids((await ask(proxy, GET % b"")).body) == ["nobody"]
        assert ids((await ask(proxy, GET % b"Authorization: Bearer one\r\n")).body) == ["Bearer one"]
        assert len(node.requests) == 3


async def test_a_client_sees_only_the_models_that_it_may_use(start: StartProxy) -> None:
    async with nodes(Node(lists("llama-1", "both")), Node(lists("gpt-1", "llama-2", "both"))) as (a, b):
        proxy = await start(
            "http://unused",
            **fleet(upstream("a", a, api_key=KEY), upstream("b", b, api_key=KEY), merge_models=True),
            clients=(
                client("team-a", models=("llama-*",)),
                client("team-b", OTHER),
                client("team-c", THIRD, models=("x",)),
            ),
        )
        for key, allowed in (
            (TEAM_A, ["llama-1", "llama-2"]),
            (OTHER, ["llama-1", "both", "gpt-1", "llama-2"]),
            (THIRD, []),
        ):
            answer = await ask(proxy, GET % f"{bearer(key)}\r\n".encode())
            assert (answer.status, ids(answer.body)) == (200, allowed)
        # One list is kept for all.
        assert [len(node.requests) for node in (a, b)] == [1, 1]
        assert (await ask(proxy, GET % b"")).status == 401


async def test_endpoints_that_tell_nothing_are_left_out(start: StartProxy) -> None:
    with kept_port() as port:
        refusing = f"http://127.0.0.1:{port}/v1"
        bad = [
            status(500),
            status(200, body=b"[]"),
            status(200, body=b'{"data":[{"no":"id"}]}'),
            says(b"nonsense\r\n\r\n"),
        ]
        async with nodes(Node(usual=lists("llama")), *(Node(usual=act) for act in bad)) as members:
            proxy = await start(
                "http://unused", **fleet(upstream("a", refusing, *members), upstream("b", refusing), merge_models=True)
            )
            assert ids((await ask(proxy, GET % b"")).body) == ["llama"]
        proxy = await start("http://unused", **fleet(upstream("a", refusing), merge_models=True))
        answer = await ask(proxy, GET % b"")
        assert (answer.status, answer.json()["error"]["message"]) == (502, "No endpoint has listed its models.")
        assert await proxy.ended() == {"upstream_error": 1}


async def test_a_client_that_leaves_takes_nothing_from_others(start: StartProxy) -> None:
    async with nodes(Node(usual=silent)) as (node,):
        proxy = await start("http://unused", **fleet(upstream("a", node), merge_models=True))
        client = await proxy.connect()
        client.send(GET % b"")
        await node.asked(1)
        client.reset()
        assert await proxy.ended() == {"client_gone_before_head": 1}


async def test_without_the_option_the_list_is_that_of_one_endpoint(start: StartProxy) -> None:
    async with nodes(Node(usual=lists("llama")), Node(usual=lists("gpt"))) as (a, b):
        proxy = await start("http://unused", **fleet(upstream("a", a), upstream("b", b)))
        assert ids((await ask(proxy, GET % b"")).body) == ["llama"]
        proxy = await start("http://unused", **fleet(upstream("a", a), upstream("b", b), merge_models=True))
        # One model is not the list.
        assert (await ask(proxy, (GET % b"").replace(b"/models", b"/models/llama"))).get("content-length") is not None
        assert [message.start_line.split()[1] for message in b.requests] == ["/v1/models"]


async def test_requests_do_not_ask_again_for_what_nobody_tells(start: StartProxy) -> None:
    async with nodes(Node(status(404), usual=completes("a")), Node(status(404), usual=completes("b"))) as two:
        proxy = await start("http://unused", **fleet(upstream("a", two[0]), upstream("b", two[1]), merge_models=True))
        for _ in range(3):
            assert (await ask(proxy, post(b'{"model":"gpt","messages":[]}'))).json()["by"] == "a"
        assert [len(node.requests) for node in two] == [4, 1]
        # Who asks for the list gets it once there is one.
        two[1].acts.append(lists("gpt"))
        two[0].acts.append(status(404))
        assert ids((await ask(proxy, GET % b"")).body) == ["gpt"]


async def test_a_list_that_does_not_come_fails_no_request(start: StartProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_TIMEOUT", 0.4)
    async with nodes(Node(silent, usual=completes("a")), Node(silent, usual=completes("b"))) as two:
        proxy = await start(
            "http://unused",
            **fleet(upstream("a", two[0]), upstream("b", two[1]), merge_models=True, timeouts={"head": 0.2}),
        )
        assert (await ask(proxy, post(b'{"model":"gpt","messages":[]}'))).json()["by"] == "a"
