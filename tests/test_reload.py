"""A configuration takes the place of another: nothing is refused, nothing is cut, and mistakes change nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer

from sseproxy import config
from sseproxy.errors import ReloadError
from sseproxy.observe.registry import Registry
from sseproxy.process.admin import application
from sseproxy.process.forkserver import ForkServer
from sseproxy.process.supervisor import Supervisor

from .conftest import StartProxy
from .harness import (
    DEADLINE,
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
    settings,
    until,
)
from .served import (
    ConfigFile,
    Flaky,
    Served,
    alive,
    fork_server_of,
    nobody_looks,
    python_runs_first,
    until_true,
    workers_of,
    workers_run_first,
)

RELOADS = 100
SHORT = b'{"object":"list","data":[]}'


async def reload(served: Served) -> tuple[int, str]:
    async with (
        ClientSession() as session,
        session.post(f"http://127.0.0.1:{served.admin}/-/reload") as response,
    ):
        return response.status, await response.text()


async def answer(peer: Peer, body: bytes = SHORT) -> None:
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


async def asked(served: Served, upstream: ScriptedUpstream) -> Peer:
    """A new request has arrived at `upstream`, and is answered."""
    client = await served.connect()
    client.send(post())
    api = await upstream.accept()
    message = await api.message()
    await answer(api, str(message.get("authorization")).encode())
    assert (await client.message()).status == 200
    return client


async def streaming(served: Served, upstream: ScriptedUpstream) -> tuple[Peer, Peer]:
    """A client and an upstream in the middle of a stream."""
    client = await served.connect()
    client.send(post())
    api = await upstream.accept()
    await api.message()
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(delta("Hi"))
    return client, api


async def by_signal(served: Served) -> None:
    before = await served.sample(r'config_reloads_total\{result="success"\}')
    served.process.send_signal(signal.SIGHUP)
    await served.until(r'config_reloads_total\{result="success"\}', before + 1)


async def by_request(served: Served) -> None:
    assert await reload(served) == (200, "reloaded\n")


@pytest.mark.parametrize("begin_reload", [by_signal, by_request], ids=["signal", "request"])
async def test_new_requests_go_by_the_new_configuration_and_streams_end_by_the_old(
    upstream: ScriptedUpstream, tmp_path: Path, begin_reload: Callable[[Served], Awaitable[None]]
) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with ScriptedUpstream() as other, file.serve() as served:
        assert await served.sample("config_last_reload_successful") == 1
        loaded_at = await served.sample("config_last_reload_success_timestamp_seconds")
        client, api = await streaming(served, upstream)
        (old,) = served.workers
        file.write(other)
        await begin_reload(served)
        await asked(served, other)
        assert await served.sample("workers") == 1
        assert await served.sample("workers_finishing") == 1
        assert await served.sample("config_last_reload_success_timestamp_seconds") > loaded_at
        api.send(chunk(DONE), LAST_CHUNK)
        await client.read_until(chunk(DONE) + LAST_CHUNK)
        client.close()
        await until_true(lambda: old not in served.workers)
        await served.until("workers_finishing", 0)
        assert await served.sample("worker_restarts_total") == 0
        await served.until(r'requests_total\{.*outcome="completed".*\}', 2)
        assert await served.sample(r"(streams|requests)_active\{.*\}") == 0


async def test_a_configuration_with_mistakes_changes_nothing_and_says_the_same_everywhere(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with file.serve() as served:
        workers = served.workers
        file.write(upstream, workers="none", lsten=":80")
        status, text = await reload(served)
        assert status == 400
        lines = text.splitlines()
        assert [re.sub(r"^\S+/sseproxy.yaml:(\d+).*?: (\w+): .*", r"\1 \2", line) for line in lines] == [
            "3 workers",
            "6 lsten",
        ]
        await until_true(lambda: all(f"not reloaded: {line}" in served.messages for line in lines))
        assert await served.sample("config_last_reload_successful") == 0
        assert await served.sample(r'config_reloads_total\{result="failure"\}') == 1
        await asked(served, upstream)
        assert served.workers == workers
        file.write(upstream)
        assert (await reload(served))[0] == 200
        assert await served.sample("config_last_reload_successful") == 1


async def test_an_address_that_is_taken_changes_nothing(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with file.serve() as served:
            workers = served.workers
            file.write(upstream, listen=f"['127.0.0.1:0', '{address}']")
            assert await reload(served) == (400, f"listen: cannot listen on {address}: address already in use\n")
            await asked(served, upstream)
            assert served.workers == workers


async def test_a_listener_goes_although_a_worker_that_has_it_stands_still(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with file.serve() as served:
        client, api = await streaming(served, upstream)
        (old,) = served.workers
        os.kill(old, signal.SIGSTOP)
        file.write(upstream, listen=f"unix:{tmp_path / 's'}")
        assert (await reload(served))[0] == 200
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", served.port)
        os.kill(old, signal.SIGCONT)
        api.send(chunk(DONE), LAST_CHUNK)
        assert (await client.read_until(LAST_CHUNK)).endswith(chunk(DONE) + LAST_CHUNK)
        client.close()
        await until_true(lambda: not alive(old))
        assert "Traceback" not in served.stderr


async def test_listeners_come_and_go(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream)
    path = tmp_path / "s"
    async with file.serve() as served:
        file.write(upstream, listen=f"unix:{path}", admin=f"{{listen: 'unix:{tmp_path / 'admin'}'}}")
        assert (await reload(served))[0] == 200
        client = Peer(*await asyncio.open_unix_connection(str(path)))
        client.send(post())
        api = await upstream.accept()
        await api.message()
        await answer(api)
        assert (await client.message()).status == 200
        client.close()
        for port in (served.port, served.admin):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
        admin = Peer(*await asyncio.open_unix_connection(str(tmp_path / "admin")))
        admin.send(b"GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert (await admin.message()).status == 200
        admin.close()
        served.process.terminate()
        assert await served.ended() == 0
    assert not path.exists()


@pytest.mark.parametrize("adds", [True, False])
async def test_an_end_during_a_reload_leaves_no_socket(
    upstream: ScriptedUpstream, tmp_path: Path, *, adds: bool
) -> None:
    path, file = tmp_path / "s", ConfigFile(tmp_path, upstream)
    more = {"listen": f"['127.0.0.1:0', 'unix:{path}']"}
    if not adds:
        file.write(upstream, **more)
    async with file.serve() as served:
        file.write(upstream, **more if adds else {})
        # The reload waits for it: for a new worker, or for the old one to stop accepting.
        (old,) = served.workers
        awaited = fork_server_of(served) if adds else old
        os.kill(awaited, signal.SIGSTOP)
        served.process.send_signal(signal.SIGHUP)
        await until_true(path.exists if adds else lambda: len(served.workers) == 2)
        served.process.terminate()
        await until_true(lambda: any("draining for at most" in message for message in served.messages))
        os.kill(awaited, signal.SIGCONT)
        assert await served.ended() == 0
        assert "Traceback" not in served.stderr
    assert not path.exists()


async def test_a_route_that_no_request_can_take_is_a_warning_at_the_start_and_at_each_reload(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream)
    first, second = (
        f"{{name: {name}, match: {{path: /v1, model: {glob}}}, upstream: up}}"
        for name, glob in (("gpt", "gpt-*"), ("mini", "gpt-4*"))
    )
    file.write(upstream, routes=f"[{first}, {second}]")
    column = f"routes: [{first}, {second}]".rindex("match") + 1
    said = f"{file.path}:5:{column}: routes[1].match: no request can take this route: gpt takes its requests"
    async with file.serve() as served:
        assert [message.startswith(said) for message in served.messages] == [True]
        assert (await reload(served))[0] == 200
        await until_true(lambda: sum(message.startswith(said) for message in served.messages) == 2)
        file.write(upstream, routes=f"[{second}, {first}]")
        assert (await reload(served))[0] == 200
        assert sum("no request can take" in message for message in served.messages) == 2


async def test_a_key_behind_an_open_port_is_a_warning_at_the_start_and_at_each_reload(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream, key="api_key: sk-1", listen="':0'")
    said = f"{file.path}: listen: everybody who can reach :0 spends the key of up; "
    async with file.serve() as served:
        assert [message.startswith(said) for message in served.messages] == [True]
        assert (await reload(served))[0] == 200
        await until_true(lambda: sum(message.startswith(said) for message in served.messages) == 2)
        assert "sk-1" not in served.stderr


async def test_keys_are_read_anew(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-old\n")
    file = ConfigFile(tmp_path, upstream, key=f"api_key_file: '{key}'")
    async with file.serve() as served:
        for expected in ("sk-old", "sk-new"):
            key.write_text(f"{expected}\n")
            assert (await reload(served))[0] == 200
            client = await served.connect()
            client.send(post())
            api = await upstream.accept()
            assert (await api.message()).get("authorization") == f"Bearer {expected}"
        assert "sk-" not in served.stderr


async def test_what_is_watched_is_reloaded_when_its_content_changes(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """As Kubernetes does it: what is read is a link to a link, and the inner one is replaced."""
    versions = [tmp_path / name for name in ("one", "two")]
    for version in versions:
        version.mkdir()
    file = ConfigFile(versions[0], upstream, reload="{watch: 50ms}")
    async with ScriptedUpstream() as other:
        ConfigFile(versions[1], other, reload="{watch: 50ms}")
        (tmp_path / "..data").symlink_to(versions[0])
        (tmp_path / "sseproxy.yaml").symlink_to(tmp_path / "..data" / "sseproxy.yaml")
        file.path = tmp_path / "sseproxy.yaml"
        async with file.serve() as served:
            await asked(served, upstream)
            (tmp_path / "next").symlink_to(versions[1])
            (tmp_path / "next").rename(tmp_path / "..data")
            await served.until(r'config_reloads_total\{result="success"\}', 1)
            await asked(served, other)
            # What is refused is not tried again until it changes again.
            (versions[1] / "sseproxy.yaml").write_text("nonsense")
            await served.until(r'config_reloads_total\{result="failure"\}', 1)
            file.path = versions[1] / "sseproxy.yaml"
            file.write(upstream)
            await served.until(r'config_reloads_total\{result="success"\}', 2)
            assert await served.sample(r'config_reloads_total\{result="failure"\}') == 1
            await asked(served, upstream)


@asynccontextmanager
async def started(
    upstream: ScriptedUpstream, flaky: Flaky, flaky_server: ForkServer, *, workers: int
) -> AsyncIterator[Supervisor]:
    """A supervisor in this process, and so many workers that work."""
    anywhere = config.Admin(listen=config.Address("127.0.0.1", 0))
    supervisor = Supervisor(settings(upstream.url, workers=workers, admin=anywhere), flaky_server)
    supervisor.bind()
    try:
        flaky.may_work(workers)
        await supervisor.start()
        yield supervisor
    finally:
        await supervisor.close()


async def test_workers_that_do_not_come_up_change_nothing(
    upstream: ScriptedUpstream, flaky: Flaky, flaky_server: ForkServer
) -> None:
    async with started(upstream, flaky, flaky_server, workers=2) as supervisor:
        workers = workers_of(os.getpid())
        with pytest.raises(
            ReloadError, match="2 of 2 new workers did not start to accept connections: one ended with status 3"
        ):
            await supervisor.reload()
        assert workers_of(os.getpid()) == workers
        assert (await supervisor.registry())._gauges[0]["config_last_reload_successful", ()] == 0
        flaky.may_work(2)
        await supervisor.reload()
        await until_true(lambda: not any(map(alive, workers)))
    assert not workers_of(os.getpid())


async def test_workers_of_which_only_some_come_up_change_nothing(
    upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, flaky: Flaky, flaky_server: ForkServer
) -> None:
    monkeypatch.setattr("sseproxy.process.supervisor._START_TIMEOUT", 5.0)
    async with started(upstream, flaky, flaky_server, workers=2) as supervisor:
        workers = workers_of(os.getpid())
        flaky.may_work(1)
        with pytest.raises(ReloadError, match=r"^1 of 2 new workers did not start .*: one ended with status 3$"):
            await supervisor.reload()
        assert workers_of(os.getpid()) == workers
        flaky.may_work(2)
        await supervisor.reload()


async def test_a_reload_that_fails_cuts_no_stream_of_the_workers_that_came_up(
    upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, flaky: Flaky, flaky_server: ForkServer
) -> None:
    monkeypatch.setattr("sseproxy.process.supervisor._START_TIMEOUT", 3.0)
    monkeypatch.setattr("sseproxy.process.supervisor._TAKE_OVER_TIMEOUT", 1.0)
    async with started(upstream, flaky, flaky_server, workers=2) as supervisor:
        workers = workers_of(os.getpid())
        flaky.may_work(1)
        reloading = asyncio.get_running_loop().create_task(supervisor.reload())
        await until_true(lambda: bool(supervisor._generations[-1].ready) and len(supervisor._generations) == 2)
        port = int(supervisor.urls[0].rpartition(":")[2])
        streams: list[tuple[Peer, Peer]] = []
        # One of three workers is new, and connections are shared evenly.
        for _ in range(9):
            client = Peer(*await asyncio.open_connection("127.0.0.1", port))
            client.send(post())
            api = await upstream.accept()
            await api.message()
            api.send(STREAM_HEAD, chunk(delta("a")))
            await client.read_until(chunk(delta("a")))
            streams.append((client, api))
        with pytest.raises(ReloadError, match="1 of 2 new workers"):
            await reloading
        assert len(workers_of(os.getpid())) == 3
        for client, api in streams:
            api.send(chunk(DONE), LAST_CHUNK)
            assert (await client.read_until(LAST_CHUNK)).endswith(chunk(DONE) + LAST_CHUNK)
            client.close()
            api.close()
        await until_true(lambda: workers_of(os.getpid()) == workers)


async def test_a_worker_that_hangs_while_it_starts_changes_nothing(
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
    flaky: Flaky,
    flaky_server: ForkServer,
) -> None:
    monkeypatch.setattr("sseproxy.process.supervisor._START_TIMEOUT", 0.5)
    async with started(upstream, flaky, flaky_server, workers=1) as supervisor:
        workers = workers_of(os.getpid())
        flaky.hang()
        with pytest.raises(ReloadError, match=r"^1 of 1 new workers did not start to accept connections$"):
            await supervisor.reload()
        assert workers_of(os.getpid()) == workers


# Workers that take their time to start, so that much is asked meanwhile.
SLOW = workers_run_first("time.sleep(0.5)")


async def test_reloads_that_are_asked_for_together_are_two_at_most(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with file.serve(**python_runs_first(SLOW, tmp_path)) as served:
        answers = await asyncio.gather(*(reload(served) for _ in range(50)))
        assert answers == [(200, "reloaded\n")] * 50
        assert 1 <= await served.sample(r'config_reloads_total\{result="success"\}') <= 2
        # What one of many is told, all are.
        file.write(upstream, workers="none")
        answers = await asyncio.gather(*(reload(served) for _ in range(50)))
        assert {status for status, _ in answers} == {400}
        assert len(set(answers)) == 1
        assert 1 <= await served.sample(r'config_reloads_total\{result="failure"\}') <= 50


async def test_a_hundred_signals_are_a_few_reloads(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream).serve(**python_runs_first(SLOW, tmp_path)) as served:
        for _ in range(100):
            served.process.send_signal(signal.SIGHUP)
            # The supervisor has a turn in between.
            assert (await served.get("/livez"))[0] == 200
        assert (await reload(served))[0] == 200
        assert await served.sample(r'config_reloads_total\{result="success"\}') < 20
        await until_true(lambda: len(served.workers) == 1)


async def test_what_asks_during_a_reload_gets_what_is_configured_by_then(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with ScriptedUpstream() as other, file.serve(**python_runs_first(SLOW, tmp_path)) as served:
        first = asyncio.get_running_loop().create_task(reload(served))
        await until_true(lambda: len(served.workers) == 2)
        file.write(other)
        assert await reload(served) == (200, "reloaded\n")
        assert first.done()
        await asked(served, other)


async def test_earlier_configurations_that_finish_are_bounded(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream, reload="{generations: 2}")
    async with file.serve() as served:
        clients: list[Peer] = []
        for number in range(6):
            streamer, _ = await streaming(served, upstream)
            clients.append(streamer)
            assert (await reload(served))[0] == 200
            assert len(served.workers) == min(number + 1, 2) + 1
        for client in clients[:-2]:
            received, _ = await client.rest()
            assert b'"code": "draining"' in received
        await until_true(lambda: served.stderr.count("the requests of the oldest are ended") == 4)
        said = [message for message in served.messages if message.startswith("configuration reloaded: 1 worker; ")]
        assert said[0].endswith("; workers of 1 earlier configuration are finishing")
        assert said[1].endswith("; workers of 2 earlier configurations are finishing")
        assert await served.sample("workers_finishing") == 2
        await served.until(r'requests_total\{.*outcome="drained".*\}', 4)
        assert await served.sample(r"streams_active\{.*\}") == 2


async def test_an_upload_in_each_of_twenty_configurations_leaves_few_workers(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream, reload="{generations: 3}")
    async with file.serve() as served:
        uploads: deque[Peer] = deque()
        for number in range(20):
            uploads.append(await served.connect())
            uploads[-1].send(b"POST /v1/files HTTP/1.1\r\nHost: p\r\nContent-Length: 100\r\n\r\nx")
            await (await upstream.accept()).head()
            reloading = asyncio.get_running_loop().create_task(reload(served))
            if len(uploads) > 3:
                oldest = uploads.popleft()
                ended = await oldest.message()
                assert (ended.status, ended.json()["error"]["code"]) == (503, "draining")
                oldest.close()
            assert (await reloading)[0] == 200
            assert len(served.workers) == min(number + 1, 3) + 1
        assert await served.sample("workers_finishing") == 3


async def test_the_end_ends_those_that_finish_as_well(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream, drain_timeout="300ms")
    async with file.serve() as served:
        client, _ = await streaming(served, upstream)
        assert (await reload(served))[0] == 200
        workers = served.workers
        assert len(workers) == 2
        served.process.terminate()
        received, _ = await client.rest()
        assert b'"code": "draining"' in received
        assert await served.ended() == 0
        await until_true(lambda: not any(map(alive, workers)))


async def refused_request(served: Served, upstream: ScriptedUpstream) -> None:
    """An exchange that the upstream does not answer."""
    client = await served.connect()
    client.send(post())
    api = await upstream.accept()
    await api.message()
    api.close()
    assert (await client.message()).status == 502


async def test_what_a_configuration_no_longer_has_has_no_state(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    def upstreams(**urls: str) -> str:
        return "[" + ", ".join(f"{{name: {name}, url: '{url}/v1'}}" for name, url in urls.items()) + "]"

    def routes(name: str) -> str:
        return f"[{{name: api, match: {{path: /v1}}, upstream: {name}}}]"

    up = r'upstream_up\{upstream="%s"\}'
    file = ConfigFile(tmp_path, upstream)
    async with ScriptedUpstream() as other, file.serve() as served:

        async def states() -> dict[str, float]:
            return {name: value for name, value in (await served.samples()).items() if name.startswith("upstream_up")}

        client, api = await streaming(served, upstream)
        await served.until(up % "up", 1)
        await refused_request(served, upstream)
        await served.until(r'requests_total\{.*outcome="upstream_error".*upstream="up"\}', 1)
        assert await states() == {'upstream_up{upstream="up"}': 0}
        # It stays what it is where nothing changed.
        assert (await reload(served))[0] == 200
        assert await states() == {'upstream_up{upstream="up"}': 0}
        # Another server of the same name; then one that no route uses; then none.
        for present in ({"up": other.url}, {"up": upstream.url, "new": other.url}, {"new": other.url}):
            file.write(upstream, upstreams=upstreams(**present), routes=routes([*present][-1]))
            assert (await reload(served))[0] == 200
            assert await states() == {}
        # An exchange of an earlier configuration changes nothing of that.
        second = await served.sample(r'requests_total\{.*outcome="truncated".*upstream="up"\}')
        api.close()
        await client.rest()
        await served.until(r'requests_total\{.*outcome="truncated".*upstream="up"\}', second + 1)
        assert await states() == {}
        await asked(served, other)
        await served.until(up % "new", 1)
        assert await states() == {'upstream_up{upstream="new"}': 1}
        # What was counted of it is still there, so that sums do not fall.
        assert await served.sample(r'requests_total\{.*outcome="upstream_error".*upstream="up"\}') == 1


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:9464"}, 200),
        ({"Host": "192.0.2.7:80"}, 200),
        ({"Host": "[2001:db8::1]:80"}, 200),
        ({"Host": socket.gethostname()}, 200),
        ({"Host": "proxy.example:9464"}, 200),
        ({"Host": "rebound.example"}, 421),
        ({"Host": "localhost.rebound.example"}, 421),
        ({"Host": "192.0.2.7.rebound.example"}, 421),
        ({"Host": "localhost@rebound.example"}, 400),
        ({"Host": ""}, 400),
        ({"Host": "localhost", "Sec-Fetch-Site": "none"}, 200),
        ({"Host": "localhost", "Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "localhost", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost:8080"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"}, 403),
    ],
    ids=str,
)
async def test_no_web_page_can_reload(fields: dict[str, str], status: int) -> None:
    reloads = 0

    async def reload() -> None:
        nonlocal reloads
        reloads += 1

    async def registry() -> Registry:
        return Registry()

    app = application(registry, lambda: None, reload, lambda: config.Admin(hosts=("proxy.example",)), nobody_looks())
    async with TestServer(app) as server, ClientSession() as session:
        async with session.post(server.make_url("/-/reload"), headers=fields) as response:
            assert response.status == status, await response.text()
            assert (await response.text()).endswith("\n")
        assert reloads == (status == 200)
        for path in ("/metrics", "/livez", "/readyz"):
            async with session.get(server.make_url(path), headers=fields) as response:
                assert response.status == (400 if status == 400 else 200)
        async with session.get(server.make_url("/other"), headers=fields) as response:
            assert response.status == (status if status in (400, 421) else 404)


async def test_names_under_which_reloads_are_served_come_with_a_reload(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with file.serve() as served:

        async def under(name: str) -> int:
            async with (
                ClientSession(headers={"Host": name}) as session,
                session.post(f"http://127.0.0.1:{served.admin}/-/reload") as response,
            ):
                return response.status

        assert await under("proxy.example") == 421
        file.write(upstream, admin="{listen: '127.0.0.1:0', hosts: Proxy.Example}")
        assert await under("localhost") == 200
        assert await under("proxy.example") == 200
        assert await under("other.example") == 421


async def test_a_file_that_has_become_a_pipe_holds_up_nothing(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-x\n")
    file = ConfigFile(tmp_path, upstream, key=f"api_key_file: '{key}'", reload="{watch: 50ms}")
    async with file.serve() as served:
        key.unlink()
        os.mkfifo(key)
        await served.until(r'config_reloads_total\{result="failure"\}', 1)
        assert (await served.get("/readyz"))[0] == 200


async def test_exchanges_from_before_a_reload_may_be_given_a_time(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream, reload="{drain_timeout: 100ms}")
    async with file.serve() as served:
        client, _ = await streaming(served, upstream)
        assert (await reload(served))[0] == 200
        received, _ = await client.rest()
        assert b'"code": "draining"' in received
        await served.until(r'requests_total\{.*outcome="drained".*\}', 1)
        await until_true(
            lambda: "requests of an earlier configuration cut off by reload.drain_timeout (0.1s): 1" in served.messages
        )
        await asked(served, upstream)


async def test_a_connection_that_a_client_keeps_serves_its_next_request_and_says_that_it_is_the_last(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    await answer(api)
    assert (await client.message()).get("connection") is None
    fresh = await proxy.connect()
    await until(lambda: len(proxy.worker.proxy.server.connections) == 2)
    ending = asyncio.Event()
    retiring = asyncio.get_running_loop().create_task(proxy.worker.retire(ending))
    await until(lambda: proxy.worker.proxy.retiring)
    for peer in (client, fresh):
        peer.send(post())
        await api.message()
        await answer(api)
        assert (await peer.message()).get("connection") == "close"
        assert await peer.rest() == (b"", "fin")
    async with asyncio.timeout(DEADLINE):
        await retiring


async def test_idle_connections_of_a_worker_that_finishes_end_in_the_end(
    start: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sseproxy.relay.proxy._IDLE_BEFORE_CLOSE", 0.2)
    proxy = await start(upstream.url)
    idle, fresh = await proxy.connect(), await proxy.connect()
    idle.send(post())
    api = await upstream.accept()
    await api.message()
    await answer(api)
    assert (await idle.message()).status == 200
    async with asyncio.timeout(DEADLINE):
        await proxy.worker.retire(asyncio.Event())
    assert await idle.rest() == (b"", "fin")
    assert await fresh.rest() == (b"", "fin")


@pytest.mark.timeout(300)
async def test_a_hundred_reloads_under_load_refuse_nothing_and_cut_nothing(tmp_path: Path) -> None:
    over = asyncio.Event()

    async def model(api: Peer) -> None:
        while True:
            request = await api.message()
            if b"stream" not in request.body:
                await answer(api)
                continue
            api.send(STREAM_HEAD)
            for number in range(20):
                api.send(chunk(delta(str(number))))
                # The pace of a model.
                await asyncio.sleep(0.02)
            api.send(chunk(DONE), LAST_CHUNK)

    async def keep_asking(served: Served, body: bytes, *, keep: bool) -> int:
        """Request after request until the end; raises if one of them is not answered whole."""
        answered = 0
        client: Peer | None = None
        while not over.is_set():
            if client is None:
                client = Peer(*await asyncio.open_connection("127.0.0.1", served.port))
            client.send(post(body))
            response = await client.message()
            assert (response.status, response.complete) == (200, True)
            answered += 1
            if not keep or response.get("connection") == "close":
                client.close()
                client = None
            await asyncio.sleep(0.005)
        if client is not None:
            client.close()
        return answered

    async with ScriptedUpstream(model) as upstream:
        file = ConfigFile(tmp_path, upstream, reload="{generations: 100}")
        async with file.serve() as served:
            work = [(b'{"stream":true}', True), (b'{"stream":true}', False), (b"{}", True), (b"{}", False)]
            tasks = [
                asyncio.get_running_loop().create_task(keep_asking(served, body, keep=keep)) for body, keep in 2 * work
            ]
            for number in range(RELOADS):
                # Streams take longer than several reloads.
                changed = {"drain_timeout": f"{number + 1}s", "workers": str(1 + number % 2)}
                file.write(upstream, reload="{generations: 100}", **changed)
                assert await reload(served) == (200, "reloaded\n")
                assert not any(task.done() for task in tasks), [task for task in tasks if task.done()]
            over.set()
            answered = sum(await asyncio.gather(*tasks))
            await served.until("workers_finishing", 0)
            assert await served.sample(r"requests_total\{.*\}") == answered
            assert await served.sample(r'requests_total\{.*outcome="completed".*\}') == answered
            assert await served.sample(r'config_reloads_total\{result="success"\}') == RELOADS
            assert await served.sample(r"(streams|requests)_active\{.*\}") == 0
            assert await served.sample("worker_restarts_total") == 0
