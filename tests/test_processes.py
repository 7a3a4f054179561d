"""The supervisor and its workers, as processes: starting, replacing, draining, dying."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from sseproxy import config
from sseproxy.errors import SseproxyError
from sseproxy.ledger.table import Ledger
from sseproxy.observe.metrics import Recorder
from sseproxy.observe.registry import Registry, exposition
from sseproxy.observe.telemetry import REPORT_INTERVAL, Reports, encode_report
from sseproxy.process import accepting
from sseproxy.process.forkserver import ForkServer
from sseproxy.process.generation import cores
from sseproxy.process.listeners import listen
from sseproxy.process.supervisor import Supervisor
from sseproxy.process.worker import Instructions
from sseproxy.relay.admission import counted

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
    begin_head,
    chunk,
    delta,
    post,
    settings,
    until,
    usage,
)
from .served import (
    ConfigFile,
    Flaky,
    Served,
    alive,
    end,
    fork_server_of,
    python_runs_first,
    run,
    serve,
    until_refused,
    until_true,
    workers_of,
    workers_run_first,
)

ANYWHERE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")


async def begin_stream(served: Served, upstream: ScriptedUpstream) -> tuple[Peer, Peer]:
    """A client and an upstream in the middle of a stream, of which the first token was received."""
    client = await served.connect()
    client.send(post())
    api = await upstream.accept()
    await api.message()
    # Every stream is a connection of its own, whatever worker it comes from.
    api.send(STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), chunk(delta("Hi")))
    await client.read_until(chunk(delta("Hi")))
    return client, api


async def finish_stream(client: Peer, api: Peer) -> None:
    api.send(chunk(usage(7, 2)), chunk(DONE), LAST_CHUNK)
    assert (await client.read_until(LAST_CHUNK)).endswith(DONE + b"\r\n" + LAST_CHUNK)


async def test_it_says_where_it_listens_and_measures_what_passes(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", f"{upstream.url}/v1", *ANYWHERE, "--workers", "1") as served:
        assert served.lines[0].startswith("sseproxy ")
        assert f"/v1  ->  {upstream.url}/v1" in served.lines
        await finish_stream(*await begin_stream(served, upstream))
        await served.until(r'requests_total\{code="200",.*outcome="completed",.*\}', 1)
        assert await served.sample(r"time_to_first_token_seconds_count\{.*\}") == 1
        assert await served.sample(r'tokens_total\{.*type="input".*\}') == 7
        assert await served.sample("workers") == 1
        assert await served.sample("process_open_fds") > 0


async def test_the_admin_listener_negotiates_and_tells_health(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "1") as served:
        await finish_stream(*await begin_stream(served, upstream))
        await served.until(r"requests_total\{.*\}", 1)
        status, content_type, text = await served.get("/metrics", "application/openmetrics-text; version=1.0.0")
        assert status == 200
        assert content_type.startswith("application/openmetrics-text")
        assert text.endswith("# EOF\n")
        assert re.search(r'time_to_first_token_seconds_bucket\{.*\} 1.0 # \{request_id="\w+"\}', text)
        assert "_created" not in text
        status, content_type, text = await served.get("/metrics")
        assert content_type.startswith("text/plain")
        assert "# EOF" not in text
        assert (await served.get("/livez"))[0] == 200
        assert (await served.get("/readyz"))[0] == 200
        assert (await served.get("/nothing"))[0] == 404


async def test_two_workers_share_the_port(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "2") as served:
        assert len(served.workers) == 2
        assert await served.sample("workers") == 2
        streams = [await begin_stream(served, upstream) for _ in range(20)]
        await served.until(r"streams_active\{.*\}", 20)
        for stream in streams:
            await finish_stream(*stream)
        await served.until(r"requests_total\{.*\}", 20)
        await served.until(r"(streams|requests)_active\{.*\}", 0)


async def test_each_worker_serves_alone_while_the_other_stands_still(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "2") as served:
        for worker in served.workers:
            os.kill(worker, signal.SIGSTOP)
            await finish_stream(*await begin_stream(served, upstream))
            os.kill(worker, signal.SIGCONT)
        await served.until(r'requests_total\{.*outcome="completed".*\}', 2)


async def test_a_scrape_is_told_what_has_happened_by_then(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "2") as served:
        streams = [await begin_stream(served, upstream) for _ in range(4)]
        for number, (client, api) in enumerate(streams, 1):
            api.send(chunk(delta("there")))
            await client.read_until(chunk(delta("there")))
            assert await served.sample(r"inter_token_latency_seconds_count\{.*\}") == number
        served.process.send_signal(signal.SIGTERM)
        await until_true(lambda: "draining" in served.stderr)
        for number, (client, api) in enumerate(streams, 5):
            api.send(chunk(delta("more")))
            await client.read_until(chunk(delta("more")))
            assert await served.sample(r"inter_token_latency_seconds_count\{.*\}") == number
        for stream in streams:
            await finish_stream(*stream)
        assert await served.ended() == 0


async def test_a_scrape_does_not_wait_for_ever_for_a_worker_that_stands_still(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "1") as served:
        client, api = await begin_stream(served, upstream)
        await served.until(r"streams_active\{.*\}", 1)
        (worker,) = served.workers
        os.kill(worker, signal.SIGSTOP)
        for _ in range(2):
            assert await served.sample(r"streams_active\{.*\}") == 1
        os.kill(worker, signal.SIGCONT)
        await finish_stream(client, api)
        await served.until(r"streams_active\{.*\}", 0)


async def test_a_killed_worker_is_replaced_and_its_streams_are_cut_and_counted(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "1") as served:
        await finish_stream(*await begin_stream(served, upstream))
        client, api = await begin_stream(served, upstream)
        await served.until(r"streams_active\{.*\}", 1)
        (worker,) = served.workers
        os.kill(worker, signal.SIGKILL)
        received, _ = await client.rest()
        assert not received.endswith(LAST_CHUNK)
        await api.gone()
        await until_true(lambda: worker not in served.workers and len(served.workers) == 1)
        await served.until("workers", 1)
        assert await served.sample("worker_restarts_total") == 1
        assert await served.sample(r"(streams|requests)_active\{.*\}") == 0
        assert await served.sample(r'requests_total\{.*outcome="proxy_error".*\}') == 1
        assert await served.sample(r'requests_total\{.*outcome="completed".*\}') == 1
        await finish_stream(*await begin_stream(served, upstream))
        await served.until(r'requests_total\{.*outcome="completed".*\}', 2)


async def test_workers_that_die_again_and_again_are_started_later_and_later(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "1") as served:
        for deaths in range(1, 5):
            await until_true(lambda: bool(served.workers))
            os.kill(served.workers[0], signal.SIGKILL)
            await until_true(lambda expected=deaths: served.stderr.count("the next starts in") == expected)  # type: ignore[misc]
        assert re.findall(r"the next starts in ([\d.]+)s", served.stderr) == ["0.1", "0.2", "0.4", "0.8"]


IGNORES_CHILDREN = """\
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-m", "sseproxy", *sys.argv[1:]])
"""


async def test_a_parent_that_ignores_its_children_does_no_harm(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with serve("-c", str(file.path), program=(sys.executable, "-c", IGNORES_CHILDREN)) as served:
        (worker,) = served.workers
        os.kill(worker, signal.SIGKILL)
        await served.until("worker_restarts_total", 1)
        await served.until("workers", 1)
        served.process.terminate()
        assert await served.ended() == 0


async def test_a_worker_whose_supervisor_dies_while_it_starts_ends_in_silence(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    slow = workers_run_first("time.sleep(0.5)")
    file = ConfigFile(tmp_path, upstream)
    async with file.serve(**python_runs_first(slow, tmp_path)) as served:
        forked, old = fork_server_of(served), served.workers
        served.process.send_signal(signal.SIGHUP)
        await until_true(lambda: len(served.workers) == 2)
        processes = [forked, *served.workers]
        assert set(old) < set(processes)
        served.process.kill()
        await until_true(lambda: not any(map(alive, processes)))
        assert "Traceback" not in served.stderr


async def test_a_worker_that_has_to_be_killed_at_the_end_is_counted_and_leaves_no_socket(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    file = ConfigFile(tmp_path, upstream, listen=f"['127.0.0.1:0', 'unix:{path}']", drain_timeout="100ms")
    async with file.serve() as served:
        await begin_stream(served, upstream)
        await served.until(r"streams_active\{.*\}", 1)
        (worker,) = served.workers
        os.kill(worker, signal.SIGSTOP)
        served.process.terminate()
        assert await served.ended() == 0
        assert any(message.endswith("; 1 request was cut off") for message in served.messages)
    assert not path.exists()


# What Python runs first: a worker, if it is the first, says something else than workers of this version.
OTHER_VERSION = workers_run_first("""
once = os.path.join(os.path.dirname(__file__), "once")
if os.path.exists(once):
    os.rmdir(once)
    os.write(descriptors[0], bytes.fromhex("00000002 91a0"))
    signal.pause()
""")


async def test_a_worker_that_is_not_understood_is_replaced(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    arguments = ("--upstream", f"{upstream.url}/v1", *ANYWHERE, "--workers", "1")
    async with serve(*arguments, **python_runs_first(OTHER_VERSION, tmp_path)) as served:
        await served.until("worker_restarts_total", 1)
        assert "a worker sent a report that cannot be decoded" in served.stderr
        await served.until("workers", 1)
        await finish_stream(*await begin_stream(served, upstream))


async def test_a_worker_that_stands_still_is_not_ready_until_it_goes_on(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "1") as served:
        client, api = await begin_stream(served, upstream)
        await served.until("workers", 1)
        (worker,) = served.workers
        os.kill(worker, signal.SIGSTOP)
        await served.until("workers", 0)
        status, _, reason = await served.get("/readyz")
        assert (status, reason) == (503, "no worker accepts connections\n")
        assert f"worker {worker} has sent no report for 5 s: it is treated as not ready" in served.stderr
        os.kill(worker, signal.SIGCONT)
        await served.until("workers", 1)
        assert (await served.get("/readyz"))[0] == 200
        await finish_stream(client, api)
        await served.until(r'requests_total\{.*outcome="completed".*\}', 1)
        assert served.workers == [worker]
        assert await served.sample("worker_restarts_total") == 0


# A supervisor that is twenty times less patient, and a worker that hangs when it is told to.
IMPATIENT = """
import signal, sys
if "serve" in sys.orig_argv:
    from sseproxy.process import generation
    generation._REPORT_REQUEST_INTERVAL = 0.05
    def hang(*_):
        while True:
            pass
    signal.signal(signal.SIGUSR1, hang)
"""


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGUSR1], ids=["stopped", "looping"])
async def test_a_worker_that_hangs_is_killed_and_replaced(
    upstream: ScriptedUpstream, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = ("--upstream", upstream.url, *ANYWHERE, "--workers", "2")
    async with serve(*arguments, **python_runs_first(IMPATIENT, tmp_path)) as served:
        client, api = await begin_stream(served, upstream)
        await served.until(r"streams_active\{.*\}", 1)
        workers = served.workers
        for worker in workers:
            os.kill(worker, number)
        await api.gone()
        await client.rest()
        await served.until("worker_restarts_total", 2)
        await served.until("workers", 2)
        assert not set(workers) & set(served.workers)
        for worker in workers:
            assert f"worker {worker} has sent no report for 20 s: it is killed" in served.stderr
        assert await served.sample(r'requests_total\{.*outcome="proxy_error".*\}') == 1
        assert (await served.get("/readyz"))[0] == 200
        await finish_stream(*await begin_stream(served, upstream))


async def test_a_worker_that_finishes_and_hangs_is_killed(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with file.serve(**python_runs_first(IMPATIENT, tmp_path)) as served:
        _, api = await begin_stream(served, upstream)
        (old,) = served.workers
        served.process.send_signal(signal.SIGHUP)
        await served.until("workers_finishing", 1)
        os.kill(old, signal.SIGSTOP)
        await api.gone()
        await served.until("workers_finishing", 0)
        assert not alive(old)
        assert await served.sample("worker_restarts_total") == 0


# A worker that closes its channel, with a question in it, and hangs.
SILENCED = IMPATIENT + workers_run_first("""
def close_and_hang(*_):
    time.sleep(0.3)
    os.close(descriptors[0])
    hang()
signal.signal(signal.SIGUSR1, close_and_hang)
""")


async def test_a_worker_that_hangs_without_its_channel_is_killed(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with file.serve(**python_runs_first(SILENCED, tmp_path)) as served:
        await served.until("workers", 1)
        (worker,) = served.workers
        os.kill(worker, signal.SIGUSR1)
        await served.until("worker_restarts_total", 1)
        assert not alive(worker)
        await served.until("workers", 1)


async def test_nobody_is_killed_because_all_stood_still(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    arguments = ("--upstream", upstream.url, *ANYWHERE, "--workers", "2")
    async with serve(*arguments, **python_runs_first(IMPATIENT, tmp_path)) as served:
        client, api = await begin_stream(served, upstream)
        family = [served.pid, *served.workers]
        for pid in family:
            os.kill(pid, signal.SIGSTOP)
        # Longer than a worker may say nothing, as a machine that sleeps.
        await asyncio.sleep(3)
        for pid in family:
            os.kill(pid, signal.SIGCONT)
        await finish_stream(client, api)
        await served.until(r'requests_total\{.*outcome="completed".*\}', 1)
        await served.until("workers", 2)
        assert served.workers == family[1:]
        assert "has sent no report" not in served.stderr


@pytest.mark.parametrize("lag", [None, 0.1, 3.5])
async def test_a_worker_is_given_more_time_where_more_lag_is_allowed(
    upstream: ScriptedUpstream,
    lag: float | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fork_server: ForkServer,
) -> None:
    monkeypatch.setattr("sseproxy.process.generation._REPORT_REQUEST_INTERVAL", 0.02)
    anywhere = config.Admin(listen=config.Address("127.0.0.1", 0))
    supervisor = Supervisor(
        settings(upstream.url, workers=1, admin=anywhere, limits=config.Limits(lag=lag)), fork_server
    )
    supervisor.bind()
    try:
        await supervisor.start()
        (worker,) = workers_of(os.getpid())
        os.kill(worker, signal.SIGSTOP)
        await until_true(lambda: not alive(worker))
    finally:
        await supervisor.close()
    patience = 4 if lag == 3.5 else 1
    (killed,) = [record.getMessage() for record in caplog.records if "it is killed" in record.getMessage()]
    assert killed == f"worker {worker} has sent no report for {20 * patience} s: it is killed"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have 3 s to come up, two of them."""
    monkeypatch.setattr("sseproxy.process.supervisor._START_TIMEOUT", 1.0)


@pytest.mark.usefixtures("hurried")
async def test_a_start_without_any_worker_is_an_error(upstream: ScriptedUpstream, flaky_server: ForkServer) -> None:
    anywhere = config.Admin(listen=config.Address("127.0.0.1", 0))
    supervisor = Supervisor(settings(upstream.url, workers=2, admin=anywhere), flaky_server)
    supervisor.bind()
    with pytest.raises(
        SseproxyError, match=r"^no worker accepts connections: 2 of 2 new workers .*: one ended with status 3$"
    ):
        await supervisor.start()
    assert not workers_of(os.getpid())


@pytest.mark.usefixtures("hurried")
async def test_a_start_goes_on_with_the_workers_that_there_are(
    upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture, flaky: Flaky, flaky_server: ForkServer
) -> None:
    anywhere = config.Admin(listen=config.Address("127.0.0.1", 0))
    supervisor = Supervisor(settings(upstream.url, workers=2, admin=anywhere), flaky_server)
    supervisor.bind()
    try:
        flaky.may_work(1)
        await supervisor.start()
        assert supervisor._unready() is None
        assert any(
            "1 of 2 new workers did not start to accept connections: one ended with status 3" in record.getMessage()
            for record in caplog.records
        )
    finally:
        await supervisor.close()


async def test_a_worker_that_cannot_be_started_is_started_as_soon_as_it_can_be(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "1") as served:
        (worker,) = served.workers
        limit = resource.prlimit(served.pid, resource.RLIMIT_NOFILE)
        # Below what is in use since the start: nothing can be opened any more.
        resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (8, limit[1]))
        os.kill(worker, signal.SIGKILL)
        await until_true(lambda: "could not be started" in served.stderr)
        resource.prlimit(served.pid, resource.RLIMIT_NOFILE, limit)
        await served.until("workers", 1)
        assert await served.sample("worker_restarts_total") == 1
        await finish_stream(*await begin_stream(served, upstream))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(upstream: ScriptedUpstream, number: signal.Signals) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "2") as served:
        client, api = await begin_stream(served, upstream)
        idle, other = await begin_stream(served, upstream)
        await finish_stream(idle, other)
        served.process.send_signal(number)
        await idle.gone()
        status, _, reason = await served.get("/readyz")
        assert (status, reason) == (503, "draining\n")
        assert (await served.get("/livez"))[0] == 200
        await until_refused(served.port)
        await finish_stream(client, api)
        assert await served.ended() == 0
    (said,) = (message for message in served.messages if "draining ended" in message)
    assert re.fullmatch(r"draining ended after [\d.]+s; no request was cut off", said)


async def test_one_line_says_how_many_requests_of_all_workers_were_cut_off(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with ConfigFile(tmp_path, upstream, workers="2", drain_timeout="500ms").serve() as served:
        for worker in served.workers:
            os.kill(worker, signal.SIGSTOP)
            await begin_stream(served, upstream)
            os.kill(worker, signal.SIGCONT)
        served.process.send_signal(signal.SIGTERM)
        assert await served.ended() == 0
    first, last = (message for message in served.messages if "drain" in message)
    assert first.startswith("draining for at most 0.5s")
    assert re.fullmatch(r"draining ended after [\d.]+s; 2 requests were cut off", last)


def write_config(path: Path, upstream: ScriptedUpstream, drain_timeout: str) -> str:
    file = path / "sseproxy.yaml"
    file.write_text(
        f"listen: 127.0.0.1:0\nadmin: {{listen: '127.0.0.1:0'}}\nworkers: 1\ndrain_timeout: {drain_timeout}\n"
        f"upstreams:\n  - {{name: up, url: '{upstream.url}/v1'}}\n"
        "routes:\n  - {name: api, match: {path: /v1}, upstream: up}\n"
    )
    return str(file)


async def test_what_is_still_running_at_the_end_of_the_drain_is_told_so(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with serve("-c", write_config(tmp_path, upstream, "500ms")) as served:
        client, api = await begin_stream(served, upstream)
        waiting = await served.connect()
        waiting.send(post())
        await (await upstream.accept()).message()
        served.process.send_signal(signal.SIGTERM)
        received, _ = await client.rest()
        assert b'event: error\ndata: {"type": "error"' in received
        assert b'"code": "draining"' in received
        assert not received.endswith(LAST_CHUNK)
        response = await waiting.message()
        assert response.status == 503
        assert response.json()["error"]["code"] == "draining"
        assert response.get("retry-after") == "1"
        await api.gone()
        assert await served.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_at_once(upstream: ScriptedUpstream, number: signal.Signals) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "2") as served:
        client, api = await begin_stream(served, upstream)
        workers = served.workers
        await served.until(r"streams_active\{.*\}", 1)
        served.process.send_signal(number)
        await until_true(lambda: "draining" in served.stderr)
        served.process.send_signal(number)
        assert await served.ended() == 128 + number
        received, _ = await client.rest()
        assert not received.endswith(LAST_CHUNK)
        await api.gone()
        await until_true(lambda: not any(map(alive, workers)))
    assert served.messages[-1].endswith("s; 1 request was cut off")


async def test_workers_whose_supervisor_died_finish_and_go(upstream: ScriptedUpstream) -> None:
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "2") as served:
        client, api = await begin_stream(served, upstream)
        workers = served.workers
        served.process.kill()
        await served.ended()
        await until_refused(served.port)
        await finish_stream(client, api)
        await until_true(lambda: not any(map(alive, workers)))
        assert "Traceback" not in served.stderr


async def test_workers_whose_supervisor_died_with_their_reports_unread_go_as_well(upstream: ScriptedUpstream) -> None:
    """To them that is no end of the channel but a reset."""
    async with serve("--upstream", upstream.url, *ANYWHERE, "--workers", "2") as served:
        client, api = await begin_stream(served, upstream)
        workers = served.workers
        served.process.send_signal(signal.SIGSTOP)
        for _ in range(20):
            await finish_stream(*await begin_stream(served, upstream))
        # A report is under way by then.
        await asyncio.sleep(1.5 * REPORT_INTERVAL)
        served.process.kill()
        await served.ended()
        await until_refused(served.port)
        await finish_stream(client, api)
        await until_true(lambda: not any(map(alive, workers)))
        assert "Traceback" not in served.stderr


@pytest.mark.parametrize("started", [1, 2])
async def test_a_signal_while_the_workers_start_ends_them_as_well(upstream: ScriptedUpstream, started: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sseproxy", "serve", "--upstream", upstream.url, *ANYWHERE, "--workers", "2"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        workers: list[int] = []
        while len(workers) < started:
            workers = workers_of(process.pid)
            await asyncio.sleep(0)
        process.terminate()
        async with asyncio.timeout(DEADLINE):
            _, errors = await process.communicate()
        assert process.returncode == 0
        assert b"Traceback" not in errors
        assert not any(map(alive, workers))
    finally:
        await end(process)


async def test_a_worker_that_is_just_being_started_when_the_end_comes_is_ended_as_well(
    upstream: ScriptedUpstream, fork_server: ForkServer
) -> None:
    anywhere = config.Admin(listen=config.Address("127.0.0.1", 0))
    supervisor = Supervisor(settings(upstream.url, workers=1, admin=anywhere, drain_timeout=3600.0), fork_server)
    supervisor.bind()
    starting = asyncio.get_running_loop().create_task(supervisor.start())
    await until(lambda: len(workers_of(os.getpid())) == 1)
    (worker,) = workers_of(os.getpid())
    # It is there, but its supervisor has not heard so.
    heard = supervisor._generation is not None and bool(supervisor._generation._processes)
    closing = asyncio.get_running_loop().create_task(supervisor.close())
    try:
        await until_true(lambda: not alive(worker))
        assert not heard
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        await closing
        await starting


async def test_the_last_report_of_a_worker_arrives_however_late_it_is_read(
    upstream: ScriptedUpstream, fork_server: ForkServer
) -> None:
    ours, theirs = socket.socketpair()
    # The channel is full of reports before the worker has sent any.
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            theirs.send(encode_report(Recorder().report()))
    theirs.setblocking(True)
    configured = settings(upstream.url)
    (listener,) = listen("listen", configured.listen[0])
    with theirs, listener:
        ledger = Ledger()
        columns = ledger.columns([*accepting.NAMES, *counted(configured)], ())
        port = listener.getsockname()[1]
        process = await fork_server.fork([theirs.fileno(), ledger.fd, listener.fileno()])
    ours.sendall(Instructions(configured, ledger.take_row(), columns, 100).encoded())
    try:
        client = Peer(*await asyncio.open_connection("127.0.0.1", port))
        client.send(b"GET /nowhere HTTP/1.1\r\nHost: p\r\n\r\n")
        assert (await client.message()).status == 404
        process.send_signal(signal.SIGTERM)
        # It drains, and has nothing left to do but to report.
        await client.gone()
        client.close()
        await asyncio.sleep(0.3)
        assert alive(process.pid)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        registry = Registry()
        async for report in Reports(reader, writer.write):
            registry.add(1, report)
        writer.close()
        assert (
            'sseproxy_requests_rejected_total{reason="no_route",route=""} 1.0' in exposition(registry, "")[0].decode()
        )
        assert await process.wait() == 0
    finally:
        process.send_signal(signal.SIGKILL)


async def drained(proxy: RunningProxy) -> asyncio.Task[None]:
    """The drain of a worker, begun."""
    draining = asyncio.get_running_loop().create_task(proxy.worker.drain())
    await until(lambda: proxy.worker.proxy.draining)
    return draining


async def test_a_request_that_waits_when_the_drain_begins_is_not_begun(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, drain_timeout=3600.0)
    client, api = await begin(proxy, upstream, post() * 2)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(chunk(delta("Hi")))
    draining = await drained(proxy)
    api.send(chunk(DONE), LAST_CHUNK)
    assert await client.rest() == (chunk(DONE) + LAST_CHUNK, "fin")
    async with asyncio.timeout(DEADLINE):
        await draining
    assert await api.rest() == (b"", "fin")
    assert proxy.outcomes() == {"completed": 1}
    assert upstream.connections == 1


async def test_connections_without_a_request_do_not_hold_up_the_drain(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, drain_timeout=3600.0)
    idle, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (await idle.message()).body == b"ok"
    server = proxy.worker.proxy.server
    connecting = asyncio.get_running_loop().create_task(proxy.connect())
    await until(lambda: len(server.connections) == 2)
    # On the one that is new nobody waits for a request yet.
    proxy.worker.proxy.drain()
    fresh = await connecting
    for client in (idle, fresh):
        assert (await client.rest())[0] == b""
    async with asyncio.timeout(DEADLINE):
        await server.empty.wait()
        await proxy.worker.drain()
    assert proxy.outcomes() == {"completed": 1}


async def test_a_request_of_which_a_part_has_come_when_the_drain_begins_is_answered(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, rest = await begin_head(proxy)
    draining = await drained(proxy)
    client.send(rest)
    api = await upstream.accept()
    await api.message()
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    response = await client.message()
    assert (response.body, response.get("connection")) == (b"ok", "close")
    assert await client.rest() == (b"", "fin")
    async with asyncio.timeout(DEADLINE):
        await draining
    assert proxy.outcomes() == {"completed": 1}


async def test_a_part_of_a_request_holds_up_the_drain_no_longer_than_a_head_may_take(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    limits = config.Limits(request_head_time=0.3)
    proxy = await start(upstream.url, drain_timeout=3600.0, limits=limits)
    client, _ = await begin_head(proxy)
    draining = await drained(proxy)
    assert (await client.message()).status == 408
    async with asyncio.timeout(DEADLINE):
        await draining


async def test_an_exchange_that_the_end_does_not_wait_for_was_not_left_by_its_client(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url)
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(chunk(delta("Hi")))
    await proxy.worker.proxy.server.shutdown(0.1)
    received, _ = await client.rest()
    assert not received.endswith(LAST_CHUNK)
    await api.gone()
    assert await proxy.ended() == {"drained": 1}
    assert proxy.sample("upstream_release_seconds_count") == 0


# A worker that says, when it is told to, whether it collects garbage, and whether it spares what it began with.
TALKATIVE = """
import gc, os, signal, sys
if "serve" in sys.orig_argv:
    def tell(*_):
        os.write(2, f"collects: {gc.isenabled()}, spares: {gc.get_freeze_count() > 10_000}".encode())
    signal.signal(signal.SIGUSR1, tell)
"""


async def test_a_worker_collects_garbage_but_not_among_what_it_began_with(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    arguments = ("--upstream", upstream.url, *ANYWHERE, "--workers", "1")
    async with serve(*arguments, **python_runs_first(TALKATIVE, tmp_path)) as served:
        await served.until("workers", 1)
        (worker,) = served.workers
        os.kill(worker, signal.SIGUSR1)
        await until_true(lambda: "collects: True, spares: True" in served.stderr)


@pytest.mark.parametrize("option", ["listen", "admin"])
async def test_a_port_that_is_taken_is_one_line(upstream: ScriptedUpstream, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, errors = await run(
            "serve", "--upstream", upstream.url, *ANYWHERE, f"--{option}", f"127.0.0.1:{port}"
        )
    name = {"listen": "listen", "admin": "admin.listen"}[option]
    assert errors == (
        f"sseproxy: {name}: cannot listen on 127.0.0.1:{port}: address already in use; is sseproxy running already? "
        f"--{option} chooses another address\n"
    )
    assert (status, out) == (1, "")


async def test_without_a_number_there_is_a_worker_for_every_core_it_may_use(upstream: ScriptedUpstream) -> None:
    assert 1 <= cores() <= len(os.sched_getaffinity(0))
    async with serve("--upstream", upstream.url, *ANYWHERE) as served:
        assert served.lines[-1] == f"workers: {cores()}"
        assert len(served.workers) == cores()
        assert await served.sample("workers") == cores()


def variables_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(line.split("=", 1) for line in lines if line)


async def test_a_worker_has_no_key_in_its_environment_but_what_the_interpreter_goes_by(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream, key="api_key: '${HOME}${SECRET_KEY}'")
    more = {"HOME": str(tmp_path), "OTHER": "kept"}
    async with file.serve(SECRET_KEY="sk-very-secret", **more) as served:
        (worker,) = served.workers
        expected = os.environ | more
        passed = variables_of(worker)
        assert {name: passed.get(name) for name in expected} == expected
        assert "sk-very-secret" not in "".join(passed.values())
        client = await served.connect()
        client.send(post())
        sent = await (await upstream.accept()).message()
        assert sent.get("authorization") == f"Bearer {tmp_path}sk-very-secret"
