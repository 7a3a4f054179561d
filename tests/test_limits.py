"""What is over a limit is answered, at once, with a reason that clients and operators understand; the rest goes on."""

from __future__ import annotations

import asyncio
import resource
import ssl
import sys
from pathlib import Path

import pytest
import trustme

from sseproxy import config
from sseproxy.errors import RequestError
from sseproxy.wire.dialects import OPENAI

from .conftest import PlayScript, StartProxy
from .harness import (
    DEADLINE,
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Message,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    begin,
    begin_head,
    chunk,
    delta,
    kept_port,
    never_accepting,
    post,
    until,
)
from .served import ConfigFile, end, fork_server_of, message_of, serve

# Long enough for a loaded machine to do what it has to before, short enough to wait for.
SHORT = 0.3
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"POST /v1/files HTTP/1.1\r\nHost: proxy\r\nTransfer-Encoding: chunked\r\n\r\n"


async def limited(start: StartProxy, upstream: ScriptedUpstream, **limits: object) -> RunningProxy:
    return await start(upstream.url, limits=config.Limits(**limits))  # type: ignore[arg-type]


def refused(response: Message, reason: str, proxy: RunningProxy, route: str = "") -> None:
    """`response` says what is over its limit, and so do the metrics."""
    error = RequestError(reason)
    assert response.status == error.status
    assert response.body == OPENAI.refusal(error)
    assert (response.get("retry-after") is not None) == (error.status in (429, 503))
    assert proxy.sample("requests_rejected_total", reason=reason, route=route) == 1


async def finish(client: Peer, api: Peer) -> None:
    api.send(chunk(delta("Hi") + DONE), LAST_CHUNK)
    assert (await client.message()).complete


async def test_connections(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await limited(start, upstream, connections=1)
    client, api = await begin(proxy, upstream)
    other = await proxy.connect()
    other.send(post(), post())
    response = await other.message()
    refused(response, "connections", proxy)
    assert response.get("connection") == "close"
    await other.gone()
    api.send(STREAM_HEAD)
    await finish(client, api)
    assert await proxy.ended() == {"rejected": 1, "completed": 1}
    client.close()
    await until(proxy.worker.proxy.server.empty.is_set)
    (await proxy.connect()).send(post())
    await api.message()


async def test_connections_far_above_the_limit_are_closed_at_once(
    start: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await limited(start, upstream, connections=1)
    await begin(proxy, upstream)
    await proxy.connect()
    third = await proxy.connect()
    assert await third.rest() == (b"", "fin")


async def test_connections_of_one_address(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await limited(start, upstream, connections_per_client=1)
    client, api = await begin(proxy, upstream)
    other = await proxy.connect()
    other.send(post())
    refused(await other.message(), "connections_per_client", proxy)
    elsewhere = Peer(*await asyncio.open_connection("127.0.0.1", proxy.port, local_addr=("127.0.0.2", 0)))
    elsewhere.send(post())
    await (await upstream.accept()).message()
    elsewhere.close()
    api.send(STREAM_HEAD)
    await finish(client, api)
    client.close()
    await until(proxy.worker.proxy.server.empty.is_set)
    assert not proxy.worker.proxy.server.slots._of
    (await proxy.connect()).send(post())
    await api.message()


async def test_active_requests(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await limited(start, upstream, active_requests=1)
    client, api = await begin(proxy, upstream)
    other = await proxy.connect()
    other.send(post())
    refused(await other.message(), "active_requests", proxy)
    api.send(STREAM_HEAD)
    await finish(client, api)
    other.send(post())
    await api.message()
    api.send(STREAM_HEAD)
    await finish(other, api)
    assert await proxy.ended() == {"rejected": 1, "completed": 2}


async def test_active_requests_of_a_route(start: StartProxy, upstream: ScriptedUpstream) -> None:
    routes = tuple(
        config.Route(
            name=name,
            match=config.Match(path=path),
            upstream=(config.Target(name="up"),),
            limits=config.RouteLimits(**limits),
        )
        for name, path, limits in (("api", "/v1", {"active_requests": 1}), ("files", "/v1/files", {}))
    )
    proxy = await start(upstream.url, routes=routes)
    client, api = await begin(proxy, upstream)
    other = await proxy.connect()
    other.send(post())
    refused(await other.message(), "active_requests", proxy, route="api")
    other.send(post(path="/v1/files"))
    await (await upstream.accept()).message()
    client.close()
    await api.gone()
    await until(lambda: proxy.sample("requests_active", route="api") == 0)
    await begin(proxy, upstream)


async def test_pending_connects(start: StartProxy) -> None:
    with never_accepting() as url:
        proxy = await start(url, limits=config.Limits(pending_connects=1), timeouts={"connect": SHORT})
        client, other = await proxy.connect(), await proxy.connect()
        client.send(post())
        await proxy.busy()
        other.send(post())
        refused(await other.message(), "pending_connects", proxy, route="api")
        assert (await client.message()).status == 504
        client.send(post())
        assert (await client.message()).status == 504
        assert await proxy.ended() == {"rejected": 1, "upstream_timeout_connect": 2}


async def test_who_needs_no_new_connection_is_not_refused_for_those_that_are_being_made(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await limited(start, upstream, pending_connects=1)
    client, api = await begin(proxy, upstream)
    api.send(OK)
    assert (await client.message()).status == 200
    # As if another worker were connecting.
    proxy.worker.proxy.upstreams["up"]._pending.add(1)
    client.send(post())
    await api.message()
    other = await proxy.connect()
    other.send(post())
    refused(await other.message(), "pending_connects", proxy, route="api")
    api.send(OK)
    assert (await client.message()).status == 200
    assert upstream.connections == 1
    proxy.worker.proxy.upstreams["up"]._pending.add(-1)


@pytest.mark.parametrize("before", [b"", post(path="/nowhere")])
async def test_the_time_of_a_head(start: StartProxy, upstream: ScriptedUpstream, before: bytes) -> None:
    proxy = await limited(start, upstream, request_head_time=SHORT)
    client = await proxy.connect()
    client.send(before + b"GET /v1/models HTTP/1.1\r\nHost:")
    if before:
        assert (await client.message()).status == 404
    response = await client.message()
    refused(response, "head_timeout", proxy)
    await client.gone()


async def test_a_head_that_comes_in_time_may_be_followed_by_a_slow_answer(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await limited(start, upstream, request_head_time=SHORT)
    client, rest = await begin_head(proxy)
    client.send(rest)
    api = await upstream.accept()
    await api.message()
    done, _ = await asyncio.wait([asyncio.ensure_future(client.head())], timeout=2 * SHORT)
    assert not done
    api.send(OK)
    assert await proxy.ended() == {"completed": 1}


async def test_a_head_timeout_waits_for_the_answer_before_it(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await limited(start, upstream, request_head_time=SHORT)
    client, api = await begin(proxy, upstream)
    client.send(b"GET /v1/")
    api.send(STREAM_HEAD)
    done, _ = await asyncio.wait([asyncio.ensure_future(api.rest())], timeout=2 * SHORT)
    assert not done
    await finish(client, api)
    assert (await client.message()).status == 408
    assert await proxy.ended() == {"completed": 1, "rejected": 1}


@pytest.mark.parametrize("count", [3, 4])
async def test_fields(start: StartProxy, upstream: ScriptedUpstream, count: int) -> None:
    proxy = await limited(start, upstream, request_fields=4)
    client = await proxy.connect()
    client.send(b"GET /v1/x HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * count + b"\r\n")
    if count == 3:
        await (await upstream.accept()).message()
        client.close()
    else:
        assert (await client.message()).status == 400


async def test_a_body_that_says_it_is_too_large(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await limited(start, upstream, request_body=1000)
    client = await proxy.connect()
    client.send(post(b"x" * 1001))
    refused(await client.message(), "body_too_large", proxy)
    assert upstream.connections == 0
    client.send(post(b"x" * 1000))
    assert len((await (await upstream.accept()).message()).body) == 1000


async def test_a_body_that_becomes_too_large(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await limited(start, upstream, request_body=1000)
    client = await proxy.connect()
    client.send(CHUNKED, chunk(b"x" * 600))
    api = await upstream.accept()
    await api.head()
    client.send(chunk(b"x" * 600))
    refused(await client.message(), "body_too_large", proxy, route="api")
    received, _ = await api.rest()
    assert LAST_CHUNK not in received
    assert await proxy.ended() == {"rejected": 1}


async def test_a_body_that_comes_with_its_head_is_too_large_as_well(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await limited(start, upstream, request_body=1000)
    client = await proxy.connect()
    client.send(CHUNKED + chunk(b"x" * 1200) + LAST_CHUNK)
    refused(await client.message(), "body_too_large", proxy)


async def test_an_empty_line_begins_no_head(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await limited(start, upstream, request_head_time=SHORT)
    client = await proxy.connect()
    client.send(b"\r\n")
    done, _ = await asyncio.wait([asyncio.ensure_future(client.head())], timeout=2 * SHORT)
    assert not done


@pytest.mark.parametrize("by_model", [False, True])
async def test_a_body_that_comes_too_slowly(start: StartProxy, upstream: ScriptedUpstream, by_model: bool) -> None:
    more = {"metrics": config.Metrics(models=("m",))} if by_model else {}
    proxy = await start(upstream.url, limits=config.Limits(request_body_rate=1000), timeouts={"body": SHORT}, **more)
    client = await proxy.connect()
    client.send(post(b"x" * 1000, "/v1/embeddings")[:-1000])
    answered = asyncio.ensure_future(client.message())
    while not answered.done():
        client.send(b"x")
        # To take its time is what makes an upload slow.
        await asyncio.wait([answered], timeout=SHORT / 6)
    response = await answered
    assert response.status == 408
    assert "sent too little of its request" in response.json()["error"]["message"]
    assert await proxy.ended() == {"stalled_client": 1}


async def test_an_upload_is_not_slow_because_the_upstream_is(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, limits=config.Limits(request_body_rate=1 << 20), timeouts={"body": SHORT})
    body = b"x" * 8_000_000
    client = await proxy.connect()
    client.send(post(body))
    api = await upstream.accept()
    await api.head()
    api.reader._transport.pause_reading()  # type: ignore[attr-defined]
    done, _ = await asyncio.wait([asyncio.ensure_future(client.head())], timeout=2 * SHORT)
    assert not done
    api.reader._transport.resume_reading()  # type: ignore[attr-defined]
    assert await api.read(len(body)) == body


async def test_a_response_head(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await limited(start, upstream, response_head=1000)
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: " + b"y" * 1000 + b"\r\n\r\nok")
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (502, "upstream_protocol")


async def test_events_that_are_read(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await limited(start, upstream, event=1000)
    client, api = await begin(proxy, upstream)
    stream = delta("x" * 1000) + delta("Hi") + DONE
    api.send(STREAM_HEAD, chunk(stream), LAST_CHUNK)
    assert (await client.message()).body == stream
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("bodies_not_read_total", reason="oversize") == 1


async def test_a_request_that_goes_in_circles_ends(start: StartProxy, play: PlayScript) -> None:
    with kept_port() as port:
        proxy = await start(f"http://127.0.0.1:{port}", listen=(config.Address("127.0.0.1", port),))
    client = await proxy.connect()
    client.send(post())
    response = await client.message()
    assert (response.status, response.json()["error"]["code"]) == (508, "loop")
    outcomes = await proxy.ended()
    assert outcomes["rejected"] == 1
    assert sum(outcomes.values()) == 10


async def test_workers_have_all_the_descriptors_they_may_have(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0") as served:
        for pid in (served.pid, *served.workers):
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            assert soft == hard
        assert served.stderr == ""


@pytest.mark.parametrize("limits", ["", "limits: {connections: 1000}\n"], ids=["default", "configured"])
async def test_too_few_descriptors_are_fewer_connections(
    upstream: ScriptedUpstream, tmp_path: Path, limits: str
) -> None:
    file = tmp_path / "sseproxy.yaml"
    file.write_text(
        f'listen: 127.0.0.1:0\nadmin: {{listen: "127.0.0.1:0"}}\nworkers: 1\n{limits}'
        f'upstreams: [{{name: up, url: "{upstream.url}"}}]\n'
        "routes: [{name: all, match: {path: /}, upstream: up}]\n"
    )
    process = await with_descriptors(60, file)
    assert process.stdout is not None
    assert process.stderr is not None
    peers: list[Peer] = []
    try:
        async with asyncio.timeout(DEADLINE):
            if limits:
                line = (await process.stderr.readline()).decode()
                assert (
                    "there can be 4 connections instead of 1000: each worker may have 60 descriptors (ulimit -n)"
                    in line
                )
            port = await port_of(process)
            peers += [Peer(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(5)]
            peers[4].send(post())
            assert (await peers[4].message()).status == 503
            peers[0].send(post())
            await (await upstream.accept()).message()
    finally:
        for peer in peers:
            peer.writer.transport.abort()
        await end(process)
        # The pipes are open as long as a worker holds its end of them.
        await process.communicate()


async def test_silent_connections_take_no_more_descriptors_than_there_are(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "tls.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    file = ConfigFile(
        tmp_path,
        upstream,
        tls=f"{{cert_file: '{tmp_path}/tls.pem'}}",
        limits="{connections_per_client: 20}",
    )
    process = await with_descriptors(256, file.path)
    peers: list[Peer] = []
    try:
        async with asyncio.timeout(DEADLINE):
            port = await port_of(process)
            peers += [Peer(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(400)]
            other = Peer(*await asyncio.open_connection("127.0.0.1", port, ssl=context, local_addr=("127.0.0.2", 0)))
            peers.append(other)
            other.send(post())
            api = await upstream.accept()
            await api.message()
            api.send(OK)
            assert (await other.message()).body == b"ok"
    finally:
        for peer in peers:
            peer.writer.transport.abort()
        await end(process)
        _, errors = await process.communicate()
    assert b"Too many open files" not in errors


async def test_all_processes_may_have_as_many_descriptors_as_the_hard_limit_allows(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream)
    program = ("bash", "-c", 'ulimit -Sn 128; exec "$@"', "bash", sys.executable, "-m", "sseproxy")
    async with serve("-c", str(file.path), program=program) as served:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        for pid in (served.pid, fork_server_of(served), *served.workers):
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (most, most)


async def port_of(process: asyncio.subprocess.Process) -> int:
    """Where it says that it listens."""
    assert process.stderr is not None
    while found := await process.stderr.readline():
        if " listens on " in (said := message_of(found)):
            return int(said.rpartition(":")[2])
    raise AssertionError("it has ended")


async def with_descriptors(count: int, file: Path) -> asyncio.subprocess.Process:
    """`sseproxy serve -c FILE` that may have so many descriptors."""
    return await asyncio.create_subprocess_exec(
        *("bash", "-c", f"ulimit -n {count}; exec {sys.executable} -m sseproxy serve -c {file}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
