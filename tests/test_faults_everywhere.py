"""A fault wherever an exchange waits, one wait after the other.

Nothing is left of the exchange, it has one outcome, and the next one is served.
"""

from __future__ import annotations

import asyncio
import logging

import pytest

from sseproxy import config

from .conftest import PlayScript, StartProxy
from .harness import DONE, LAST_CHUNK, STREAM_HEAD, Peer, RunningProxy, chunk, delta, post, until, usage


class Fault(Exception):
    """What nobody expects."""


async def answers(api: Peer) -> None:
    while True:
        head = await api.message()
        if head.start_line.startswith("GET"):
            api.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        elif b'"refused"' in head.body and b"stream_options" in head.body:
            said = b'{"error":{"message":"unknown: stream_options"}}'
            api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(said), said)
        elif b'"json"' in head.body:
            said = b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
            api.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(said), said
            )
        elif "/sick/" in head.start_line and b'"busy"' in head.body:
            api.send(b"HTTP/1.1 503 Busy\r\nRetry-After-Ms: 1\r\nContent-Length: 2\r\n\r\nno")
        elif "/sick/" in head.start_line:
            api.send(STREAM_HEAD, chunk(delta("cut")))
            api.close()
        elif "files" in head.start_line:
            api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        else:
            api.send(STREAM_HEAD, chunk(delta("a")), chunk(usage(1, 1)), chunk(DONE), LAST_CHUNK)


UPLOAD = b"POST /v1/files HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"x" * 9)
REQUESTS = {
    "get": [b"GET /v1/models HTTP/1.1\r\nHost: p\r\n\r\n"],
    "chat": [post()],
    "json": [post(b'{"model":"json"}')],
    "refused options": [post(b'{"model":"refused","stream":true}')],
    "chat in parts": [post()[:-10], post()[-10:]],
    "retried": [post(b'{"model":"busy","stream":true}', "/head/chat/completions")],
    "retried in parts": [post(path="/head/chat/completions")[:-10], post()[-10:]],
    "another model": [post(b'{"model":"busy","stream":true}', "/model/chat/completions")],
    "held until its end": [post(path="/end/chat/completions")],
    "held until its first token": [post(path="/first_token/chat/completions")],
    "upload": [UPLOAD, chunk(b"y" * 9) + LAST_CHUNK],
}


async def settled(proxy: RunningProxy, tasks: int) -> int:
    """Waits until nothing is left of an exchange, and tells how many have ended so far."""
    await until(lambda: not proxy.worker.proxy.active and proxy.worker.proxy.server.empty.is_set())
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    assert proxy.worker.proxy.admission.empty
    samples, ended = proxy.samples(), 0.0
    for (name, labels), value in samples.items():
        if name in ("sseproxy_requests_active", "sseproxy_streams_active"):
            assert value == 0, name
        elif name == "sseproxy_upstream_connections" and ("state", "active") in labels:
            assert value == 0, name
        elif name == "sseproxy_requests_total":
            ended += value
    return int(ended)


async def ask(proxy: RunningProxy, parts: list[bytes]) -> None:
    client = await proxy.connect()
    try:
        for part in parts:
            client.send(part)
            await client.drain()
            for _ in range(20):
                await asyncio.sleep(0)
        await client.message()
        for _ in range(20):
            await asyncio.sleep(0)
        # There is one answer to a request.
        assert not client.reader._buffer  # type: ignore[attr-defined]
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        client.writer.transport.abort()
        proxy.peers.remove(client)


@pytest.fixture
async def proxy(start: StartProxy, play: PlayScript, caplog: pytest.LogCaptureFixture) -> RunningProxy:
    caplog.set_level(logging.CRITICAL)
    upstream = await play(answers)
    match = config.Match(path="/v1")
    route = config.Route(
        name="api", match=match, upstream=(config.Target(name="up"),), usage=config.UsageOptions(request=True)
    )
    upstreams = (
        config.Upstream(name="up", url=f"{upstream.url}/v1"),
        config.Upstream(name="sick", urls=tuple(config.Endpoint(url=f"{upstream.url}/sick/{n}") for n in range(2))),
    )
    limits = config.Limits(active_requests=3)
    return await start(
        upstream.url,
        upstreams=upstreams,
        routes=(route, *map(over_a_fleet, ("head", "model", "first_token", "end"))),
        limits=limits,
        metrics=config.Metrics(models=("m",)),
    )


def over_a_fleet(kind: str) -> config.Route:
    """A route over two endpoints that are sick, and an upstream that is well."""
    return config.Route(
        name=kind,
        match=config.Match(path=f"/{kind}"),
        upstream=(
            config.Target(name="sick"),
            config.Target(name="up", model="m" if kind == "model" else None),
        ),
        retry=config.Retry(until="head" if kind == "model" else kind),  # type: ignore[arg-type]
    )


async def fail_the_wait(proxy: RunningProxy, nth: int) -> bool:
    """What the exchange waits for when it waits for the `nth` time fails; returns False if it never does."""
    await proxy.busy()
    waits: list[object] = []
    while proxy.worker.proxy.active:
        (relay,) = proxy.worker.proxy.active
        waiter = getattr(getattr(relay, "_task", None), "_fut_waiter", None)
        if waiter is not None and not waiter.done() and waiter not in waits:
            waits.append(waiter)
            if len(waits) == nth:
                waiter.set_exception(Fault(f"wait {nth}"))
                return True
        await asyncio.sleep(0)
    return False


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_fault_wherever_an_exchange_waits_leaves_nothing(proxy: RunningProxy, name: str) -> None:
    await ask(proxy, REQUESTS[name])
    await until(proxy.worker.proxy.server.empty.is_set)
    tasks, nth, failed = len(asyncio.all_tasks()), 0, True
    ended = await settled(proxy, tasks)
    while failed:
        nth += 1
        asking = asyncio.get_running_loop().create_task(ask(proxy, REQUESTS[name]))
        failed = await fail_the_wait(proxy, nth)
        await asking
        before, ended = ended, await settled(proxy, tasks)
        assert ended - before == 1, nth
    assert nth > 1
