"""Endpoints that do what a test says, request by request, and a proxy in front of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from sseproxy import config

from .harness import DONE, LAST_CHUNK, STREAM_HEAD, Message, Peer, RunningProxy, ScriptedUpstream, chunk, delta, until

Act = Callable[[Peer], Awaitable[None]]
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'
FAULT = b'data: {"error":{"message":"out of memory","type":"server_error"}}\n\n'


def says(*parts: bytes) -> Act:
    async def act(peer: Peer) -> None:
        peer.send(*parts)

    return act


def status(code: int, *fields: bytes, body: bytes = b'{"error":{"message":"no"}}') -> Act:
    head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % (code, len(body))
    return says(head, *(field + b"\r\n" for field in fields), b"\r\n", body)


def streams(*events: bytes, end: bool = True) -> Act:
    return says(STREAM_HEAD, *map(chunk, events), LAST_CHUNK if end else b"")


def good(text: str = "Hi") -> Act:
    return streams(delta(text), DONE)


def then_resets(act: Act | None = None) -> Act:
    async def reset(peer: Peer) -> None:
        if act is not None:
            await act(peer)
            await peer.drain()
        peer.reset()

    return reset


async def silent(peer: Peer) -> None:
    await peer.gone()


class Node:
    """An endpoint. It answers each request with the next of its `acts`, or else with `usual`."""

    def __init__(self, *acts: Act, usual: Act | None = None) -> None:
        self.acts = deque(acts)
        self.usual = usual or good()
        self.requests: list[Message] = []
        self.server = ScriptedUpstream(self._serve)

    async def _serve(self, peer: Peer) -> None:
        while True:
            async with asyncio.timeout(None):
                self.requests.append(await self._message(peer))
            await (self.acts.popleft() if self.acts else self.usual)(peer)

    async def _message(self, peer: Peer) -> Message:
        # The harness has a deadline for each read; an idle connection may wait longer.
        first = await peer.reader.readexactly(1)
        peer.reader._buffer[:0] = first  # type: ignore[attr-defined]
        return await peer.message()

    @property
    def url(self) -> str:
        return self.server.url + "/v1"

    @property
    def label(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def asked(self, times: int) -> None:
        await until(lambda: len(self.requests) >= times)


@asynccontextmanager
async def nodes(*given: Node) -> AsyncIterator[Sequence[Node]]:
    async with AsyncExitStack() as stack:
        for node in given:
            await stack.enter_async_context(node.server)
        yield given


def upstream(name: str, *members: Node | str, **more: Any) -> config.Upstream:
    urls = [member.url if isinstance(member, Node) else member for member in members]
    return config.Upstream(name=name, urls=tuple(config.Endpoint(url=url) for url in urls), **more)


def fleet(*upstreams: config.Upstream, models: Sequence[str | None] = (), **route: Any) -> dict[str, Any]:
    """The options of a configuration whose one route has all `upstreams`, in this order."""
    route["retry"] = config.Retry(**route.pop("retry", {}))
    route["timeouts"] = config.Timeouts(**route.pop("timeouts", {}))
    names = [one.name for one in upstreams]
    targets = tuple(
        config.Target(name=name, model=model) for name, model in zip(names, models or [None] * len(names), strict=True)
    )
    match = config.Match(path="/v1")
    return {"upstreams": upstreams, "routes": (config.Route(name="api", match=match, upstream=targets, **route),)}


async def ask(proxy: RunningProxy, request: bytes) -> Message:
    client = await proxy.connect()
    client.send(request)
    return await client.message()


def attempts(proxy: RunningProxy) -> dict[tuple[str, str], int]:
    """How many attempts had which result, by endpoint."""
    return {
        (dict(labels)["endpoint"], dict(labels)["result"]): int(value)
        for (name, labels), value in proxy.samples().items()
        if name == "sseproxy_attempts_total"
    }


def occupied(proxy: RunningProxy) -> int:
    """What is counted in the ledger for endpoints."""
    return sum(
        (endpoint.standing.active.total() if endpoint.standing is not None else 0)
        + (upstream.later.total() if upstream.later is not None else 0)
        for upstream in proxy.worker.proxy.upstreams.values()
        for endpoint in upstream.endpoints
    )
