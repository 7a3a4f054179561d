"""New code takes the place of what runs: nothing is refused, nothing is cut, and broken code changes nothing.

Each test serves from a copy of the package, and changes the copy.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import sseproxy
from sseproxy import __version__
from sseproxy.signals import FOR_SUPERVISOR

from .harness import (
    DEADLINE,
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    ScriptedUpstream,
    chunk,
    delta,
    post,
)
from .served import (
    ConfigFile,
    Served,
    alive,
    children,
    end,
    fork_server_of,
    name_of,
    run,
    serve,
    until_refused,
    until_true,
)
from .test_listeners import Systemd
from .test_processes import ANYWHERE
from .test_reload import answer, asked, reload, streaming

NOWHERE = b"GET /nowhere HTTP/1.1\r\nHost: p\r\nConnection: close\r\n\r\n"


class Installation:
    """A copy of the package, and the environment in which Python runs it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "installed" / "sseproxy"
        # With what Python has compiled, whose times are copied as well.
        shutil.copytree(Path(sseproxy.__file__).parent, self.root)
        # The current directory is not looked into.
        self.environment = {"PYTHONPATH": str(self.root.parent), "PYTHONSAFEPATH": "1"}

    def change(self, module: str, old: str, new: str) -> None:
        path = self.root / module
        text = path.read_text()
        assert old in text
        modified = path.stat().st_mtime
        path.write_text(text.replace(old, new, 1))
        # What Python has compiled goes by seconds.
        os.utime(path, (modified + 10, modified + 10))

    def install(self, version: str, *, before: str = __version__) -> None:
        """Another version, which says in an answer which it is."""
        self.change("__init__.py", f'"{before}"', f'"{version}"')
        before = "there are" if before == __version__ else f"version {before} has"
        self.change(
            "relay/routes.py", f"; {before} routes for {{paths}}", f"; version {version} has routes for {{paths}}"
        )


@pytest.fixture
def installed(tmp_path: Path) -> Installation:
    return Installation(tmp_path)


def script_in(directory: Path) -> Path:
    """A script that runs sseproxy, as an installation has one."""
    script = directory / "sseproxy"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom sseproxy.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return script


async def upgraded(served: Served, version: str, *, before: str = __version__) -> None:
    """SIGUSR2, and the workers of `version` have taken over."""
    served.process.send_signal(signal.SIGUSR2)
    await until_true(lambda: any(f"from version {before} to {version}:" in message for message in served.messages))


async def refused(served: Served, *reasons: str) -> None:
    """SIGUSR2, and it is said why nothing has changed: one line has each of `reasons`."""
    served.process.send_signal(signal.SIGUSR2)
    await served.until(r'config_reloads_total\{result="failure"\}', 1)
    for reason in reasons:
        # Lines are written by a thread.
        await until_true(lambda: any("not upgraded: " in said and reason in said for said in served.messages))  # noqa: B023
    assert await served.sample("config_last_reload_successful") == 0


async def answers_as(client: Peer, version: str) -> None:
    client.send(NOWHERE)
    response = await client.message()
    assert response.status == 404
    expected = "there are routes" if version == __version__ else f"version {version} has routes"
    assert expected in response.json()["error"]["message"]


async def serves(served: Served, version: str) -> None:
    """New requests are answered by the code of `version`, which the metrics name as well."""
    await answers_as(await served.connect(), version)
    assert await served.sample(rf'build_info\{{.*version="{re.escape(version)}"\}}') == 1
    assert await served.sample(r"build_info\{.*\}") == 1


async def finish(client: Peer, api: Peer) -> None:
    api.send(chunk(DONE), LAST_CHUNK)
    assert (await client.read_until(LAST_CHUNK)).endswith(chunk(DONE) + LAST_CHUNK)
    client.close()


def none_is_a_zombie(served: Served) -> bool:
    return all(map(alive, children(served.pid)))


@pytest.mark.timeout(120)
async def test_two_upgrades_under_load_refuse_nothing_and_cut_nothing(tmp_path: Path, installed: Installation) -> None:
    over = asyncio.Event()
    uploaded = asyncio.get_running_loop().create_future()

    async def model(api: Peer) -> None:
        while True:
            request = await api.message()
            if b"paced" in request.body:
                api.send(STREAM_HEAD)
                number = 0
                while not over.is_set():
                    api.send(chunk(delta(str(number))))
                    number += 1
                    # The pace of a model.
                    await asyncio.sleep(0.02)
                api.send(chunk(DONE), LAST_CHUNK)
                return
            if request.start_line.startswith("POST /v1/files"):
                uploaded.set_result(request.body)
            await answer(api)

    async def stream(served: Served) -> int:
        """One stream from before the first upgrade to after the last; how many events came."""
        client = await served.connect()
        client.send(post(b'{"stream":true,"model":"paced"}'))
        assert (await client.head()).status == 200
        number = 0
        while (event := await client.read_until(b"\n\n\r\n")) != chunk(DONE):
            assert event == chunk(delta(str(number)))
            number += 1
        assert await client.read_until(LAST_CHUNK) == LAST_CHUNK
        return number

    async def upload(served: Served) -> bytes:
        client = await served.connect()
        client.send(b"POST /v1/files HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = b""
        while not over.is_set():
            part = b"%d," % len(sent)
            client.send(chunk(part))
            sent += part
            await asyncio.sleep(0.02)
        client.send(LAST_CHUNK)
        assert (await client.message()).status == 200
        return sent

    async def keep_asking(served: Served, *, keep: bool) -> int:
        """Request after request until the end; raises if one of them is not answered whole."""
        answered = 0
        client: Peer | None = None
        while not over.is_set():
            if client is None:
                client = Peer(*await asyncio.open_connection("127.0.0.1", served.port))
            client.send(post(b"{}"))
            response = await client.message()
            assert (response.status, response.complete) == (200, True)
            answered += 1
            if not keep or response.get("connection") == "close":
                client.close()
                client = None
            await asyncio.sleep(0.002)
        if client is not None:
            client.close()
        return answered

    async with ScriptedUpstream(model) as upstream:
        file = ConfigFile(tmp_path, upstream, workers="2")
        async with file.serve(**installed.environment) as served:
            await serves(served, __version__)
            descriptors = len(os.listdir(f"/proc/{served.pid}/fd"))
            begin = asyncio.get_running_loop().create_task
            streaming, uploading = begin(stream(served)), begin(upload(served))
            asking = [begin(keep_asking(served, keep=keep)) for keep in (True, False) * 3]
            versions = [__version__, "0.9.1", "0.9.2"]
            for before, version in pairwise(versions):
                workers = served.workers
                installed.install(version, before=before)
                await upgraded(served, version, before=before)
                await serves(served, version)
                assert set(served.workers) - set(workers)
                assert not any(task.done() for task in (streaming, uploading, *asking))
                assert await served.sample("workers") == 2
            assert await served.sample("workers_finishing") >= 1
            over.set()
            async with asyncio.timeout(DEADLINE):
                assert await streaming > 10
                assert await uploading == await uploaded
                answered = await asyncio.gather(*asking)
            assert min(answered) > 10
            await served.until("workers_finishing", 0)
            await until_true(lambda: len(served.workers) == 2)
            assert none_is_a_zombie(served)
            # Counting has begun anew, and only what this version has served is counted.
            assert 0 < await served.sample(r'requests_total\{.*outcome="completed".*\}') < sum(answered)
            assert await served.sample(r'requests_total\{.*outcome="proxy_error".*\}') == 0
            assert await served.sample("config_last_reload_successful") == 1
            await until_true(lambda: len(os.listdir(f"/proc/{served.pid}/fd")) <= descriptors)
            assert await reload(served) == (200, "reloaded\n")
            served.process.terminate()
            assert await served.ended() == 0


async def test_the_end_drains_what_both_versions_have(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    async with ConfigFile(tmp_path, upstream).serve(**installed.environment) as served:
        old = await streaming(served, upstream)
        installed.install("0.9.1")
        await upgraded(served, "0.9.1")
        new = await streaming(served, upstream)
        workers = served.workers
        assert len(workers) == 2
        served.process.terminate()
        await until_refused(served.port)
        for client, api in (old, new):
            api.send(chunk(delta("more")))
            await client.read_until(delta("more"))
        assert (await served.get("/readyz"))[0] == 503
        for client, api in (old, new):
            await finish(client, api)
        assert await served.ended() == 0
        assert not any(map(alive, workers))


async def test_what_both_versions_have_is_ended_when_the_drain_takes_too_long(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    file = ConfigFile(tmp_path, upstream, drain_timeout="300ms")
    async with file.serve(**installed.environment) as served:
        client, _ = await streaming(served, upstream)
        await upgraded(served, __version__)
        served.process.terminate()
        assert b'"code": "draining"' in (await client.rest())[0]
        assert await served.ended() == 0
    assert served.messages[-1].endswith("no request was cut off, not counting those of workers of the previous version")


async def test_exchanges_from_before_an_upgrade_are_bounded_as_those_from_before_a_reload(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    file = ConfigFile(tmp_path, upstream, reload="{generations: 1}")
    async with file.serve(**installed.environment) as served:
        oldest, _ = await streaming(served, upstream)
        await upgraded(served, __version__)
        client, api = await streaming(served, upstream)
        assert (await reload(served))[0] == 200
        assert b'"code": "draining"' in (await oldest.rest())[0]
        await served.until("workers_finishing", 1)
        await finish(client, api)


async def test_an_old_worker_that_hangs_is_killed(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    installed.change("process/generation.py", "_REPORT_REQUEST_INTERVAL = 1.0", "_REPORT_REQUEST_INTERVAL = 0.05")
    async with ConfigFile(tmp_path, upstream).serve(**installed.environment) as served:
        client, api = await streaming(served, upstream)
        (old,) = served.workers
        await upgraded(served, __version__)
        os.kill(old, signal.SIGSTOP)
        await api.gone()
        await client.rest()
        await served.until("workers_finishing", 0)
        assert f"worker {old} has sent no report for 20 s: it is killed" in served.messages
        assert "a worker of the previous version ended with status -9" in served.messages
        assert none_is_a_zombie(served)


@pytest.mark.parametrize(
    ("module", "old", "new", "reasons"),
    [
        ("process/supervisor.py", "import asyncio\n", "import asyncio as\n", ["SyntaxError"]),
        (
            "process/worker.py",
            "    set_up_logging()\n",
            "    raise RuntimeError('the new code is broken')\n",
            ["RuntimeError: the new code is broken", "1 of 1 new workers did not start to accept connections"],
        ),
        (
            "config/model.py",
            "    drain_timeout: Duration = 30.0\n",
            "    drain_time: Duration = 30.0\n",
            ["sseproxy.yaml:6:1: drain_timeout: unknown key"],
        ),
        ("cli.py", '"--trial"', '"--before-there-were-upgrades"', ["unrecognized arguments: --trial"]),
        ("cli.py", "    import uvloop\n", "    import time; time.sleep(60)\n", ["did not start within 5 s"]),
    ],
    ids=["syntax", "worker", "configuration", "older", "hangs"],
)
async def test_code_that_does_not_work_changes_nothing(
    upstream: ScriptedUpstream,
    tmp_path: Path,
    installed: Installation,
    module: str,
    old: str,
    new: str,
    reasons: list[str],
) -> None:
    if "within" in reasons[0]:
        installed.change("process/upgrade.py", "_TRIAL_TIMEOUT = 60.0", "_TRIAL_TIMEOUT = 5.0")
    file = ConfigFile(tmp_path, upstream, drain_timeout="20s")
    async with file.serve(**installed.environment) as served:
        client, api = await streaming(served, upstream)
        workers = served.workers
        installed.install("0.9.1")
        installed.change(module, old, new)
        await refused(served, *reasons)
        assert served.workers == workers
        await serves(served, __version__)
        installed.change(module, new, old)
        await upgraded(served, "0.9.1")
        await serves(served, "0.9.1")
        assert await served.sample("config_last_reload_successful") == 1
        await finish(client, api)


async def test_an_address_that_is_taken_changes_nothing(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    file = ConfigFile(tmp_path, upstream)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with file.serve(**installed.environment) as served:
            file.write(upstream, listen=f"['127.0.0.1:0', 'unix:{tmp_path / 's'}', '{address}']")
            await refused(served, f"listen: cannot listen on {address}: address already in use")
            assert not (tmp_path / "s").exists()
            await asked(served, upstream)


async def test_a_reload_never_runs_other_code(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    file = ConfigFile(tmp_path, upstream)
    async with ScriptedUpstream() as other, file.serve(**installed.environment) as served:
        installed.install("0.9.1")
        file.write(other)
        workers = served.workers
        assert await reload(served) == (200, "reloaded\n")
        await until_true(lambda: not any(map(alive, workers)))
        await asked(served, other)
        await serves(served, __version__)
        to_do = f"this reload uses the running code; to use the installed code, send SIGUSR2 to process {served.pid}"
        await until_true(lambda: f"version 0.9.1 is installed, {__version__} is running: {to_do}" in served.messages)
        installed.install(__version__, before="0.9.1")
        installed.change("relay/routes.py", f"version {__version__} has", "there are")
        assert await reload(served) == (200, "reloaded\n")
        assert served.stderr.count("running code") == 1
        installed.change("relay/pump.py", '"""', '"""New. ')
        assert await reload(served) == (200, "reloaded\n")
        await until_true(lambda: "have changed since it was started: this reload uses the running" in served.stderr)
        # No code at all, and workers that need more of it than before. A mistake is still told where it is.
        shutil.rmtree(installed.root)
        file.write(other, probe="{token: a-token-of-16-bytes}")
        assert await reload(served) == (200, "reloaded\n")
        await until_true(lambda: "is no longer installed in" in served.stderr)
        await serves(served, __version__)
        file.write(other, probes="{}")
        status, text = await reload(served)
        assert (status, text.count("probes: unknown key"), text.count("did you mean 'probe'?")) == (400, 1, 1)


async def test_what_is_watched_is_reloaded_by_the_running_code(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    file = ConfigFile(tmp_path, upstream, reload="{watch: 50ms}")
    async with ScriptedUpstream() as other, file.serve(**installed.environment) as served:
        installed.install("0.9.1")
        file.write(other, reload="{watch: 50ms}")
        await served.until(r'config_reloads_total\{result="success"\}', 1)
        await asked(served, other)
        await serves(served, __version__)
        await upgraded(served, "0.9.1")
        await asked(served, other)


async def test_a_worker_is_replaced_by_the_code_that_it_ran(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    async with ConfigFile(tmp_path, upstream).serve(**installed.environment) as served:
        installed.change("process/worker.py", "import asyncio\n", "import asyncio as\n")
        (worker,) = served.workers
        os.kill(worker, signal.SIGKILL)
        await served.until("worker_restarts_total", 1)
        await served.until("workers", 1)
        await serves(served, __version__)
        assert not any("upgrad" in message for message in served.messages)


async def test_a_fork_server_that_is_killed_is_replaced_by_an_upgrade(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    async with ConfigFile(tmp_path, upstream, workers="2").serve(**installed.environment) as served:
        client, api = await streaming(served, upstream)
        await served.until(r"streams_active\{.*\}", 1)
        os.kill(fork_server_of(served), signal.SIGKILL)
        os.kill(await idle_one(served), signal.SIGKILL)
        await until_true(lambda: any("upgraded from version" in said for said in served.messages))
        assert any("the fork server (sse-forkserver) has ended, so" in said for said in served.messages)
        await serves(served, __version__)
        assert await served.sample("workers") == 2
        await finish(client, api)
        await until_true(lambda: none_is_a_zombie(served))
        assert await reload(served) == (200, "reloaded\n")


async def test_a_fork_server_that_ends_while_new_code_starts_is_replaced_by_another_upgrade(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    async with ConfigFile(tmp_path, upstream, workers="2").serve(**installed.environment) as served:
        marked, before = tmp_path / "killed", "        await self._admin.setup()\n        await self._administer("
        kills = f"""\
        if not os.path.exists({str(marked)!r}):
            open({str(marked)!r}, "w").close()
            for pid in (self._fork_server.pid, *(pid for workers in self._handover.workers for pid, _ in workers)):
                os.kill(pid, signal.SIGKILL)
"""
        after = "self._admin_sockets)\n        async"
        installed.change("process/supervisor.py", f"{before}{after}", f"{kills}{before}{after}")
        served.process.send_signal(signal.SIGUSR2)
        await until_true(lambda: any("upgraded from version" in said for said in served.messages))
        assert marked.exists()
        await serves(served, __version__)
        assert await served.sample("workers") == 2


async def test_the_admin_listener_answers_while_an_upgrade_waits_for_a_worker(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    async with ConfigFile(tmp_path, upstream, workers="2").serve(**installed.environment) as served:
        stopped = fork_server_of(served)
        os.kill(stopped, signal.SIGSTOP)
        os.kill(served.workers[0], signal.SIGKILL)
        await until_true(lambda: "the next starts in" in served.stderr)
        trials = trials_of(served)
        served.process.send_signal(signal.SIGUSR2)
        await until_true(lambda: bool(trials()))
        await until_true(lambda: not trials())
        async with asyncio.timeout(DEADLINE / 2):
            assert (await served.get("/livez"))[0] == 200
        assert not any("executes the installed code" in message for message in served.messages)
        os.kill(stopped, signal.SIGCONT)
        await until_true(lambda: any("upgraded from version" in said for said in served.messages))
        assert await served.sample("workers") == 2


async def idle_one(served: Served) -> int:
    """A worker that has no connection to an upstream."""

    def sockets(pid: int) -> int:
        links = (os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir())
        return sum(link.startswith("socket:") for link in links)

    return min(served.workers, key=sockets)


async def test_no_trial_and_no_upgrade_leaves_a_process(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    installed.change("process/upgrade.py", "_TRIAL_TIMEOUT = 60.0", "_TRIAL_TIMEOUT = 6.0")
    async with ConfigFile(tmp_path, upstream).serve(**installed.environment) as served:
        installed.install("0.9.1")
        # Before there is a fork server, and when it has forked a worker.
        broken = (
            ("process/start.py", "from .worker import main\n", "raise ValueError\n"),
            ("process/supervisor.py", "  self._kill()\n            for gen", "  while True: pass\n            for gen"),
        )
        for failed, (module, old, new) in enumerate(broken, 1):
            installed.change(module, old, new)
            served.process.send_signal(signal.SIGUSR2)
            await served.until(r'config_reloads_total\{result="failure"\}', failed)
            installed.change(module, new, old)
        await upgraded(served, "0.9.1")
        assert await reload(served) == (200, "reloaded\n")
        await until_true(lambda: none_is_a_zombie(served))
        await until_true(lambda: sorted(children(served.pid)) == sorted([*served.workers, fork_server_of(served)]))


async def test_addresses_come_and_go_with_an_upgrade_and_unix_sockets_stay(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    kept, gone, new, admin = (str(tmp_path / name) for name in ("kept", "gone", "new", "admin"))
    file = ConfigFile(tmp_path, upstream, listen=f"['127.0.0.1:0', 'unix:{kept}', 'unix:{gone}']")
    async with file.serve(**installed.environment) as served:
        inode = os.stat(kept).st_ino
        file.write(
            upstream, listen=f"['unix:{kept}', 'unix:{new}', '127.0.0.2:0']", admin=f"{{listen: 'unix:{admin}'}}"
        )
        installed.install("0.9.1")
        await upgraded(served, "0.9.1")
        assert os.stat(kept).st_ino == inode
        await until_true(lambda: not Path(gone).exists())
        for port in (served.port, served.admin):
            await until_refused(port)
        for version in ("0.9.1", "0.9.2"):
            for path in (kept, new):
                client = Peer(*await asyncio.open_unix_connection(path))
                await answers_as(client, version)
                client.close()
            scraper = Peer(*await asyncio.open_unix_connection(admin))
            scraper.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert f'version="{version}"'.encode() in (await scraper.message()).body
            scraper.close()
            if version == "0.9.1":
                installed.install("0.9.2", before="0.9.1")
                await upgraded(served, "0.9.2", before="0.9.1")
        served.process.terminate()
        assert await served.ended() == 0
    assert not any(map(os.path.exists, (kept, gone, new, admin)))


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    passing = Systemd(tmp_path)
    yield passing
    passing.close()


async def test_systemd_keeps_its_sockets_and_is_told_of_an_upgrade(
    upstream: ScriptedUpstream,
    tmp_path: Path,
    systemd: Systemd,
    installed: Installation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in installed.environment.items():
        monkeypatch.setenv(name, value)
    file = ConfigFile(tmp_path, upstream, listen="systemd:http", admin="{listen: '127.0.0.1:0'}")
    process = await systemd.start("serve", "-c", str(file.path))
    try:
        assert (await systemd.hears())["READY"] == "1"
        before = __version__
        for version in ("0.9.1", "0.9.2"):
            installed.install(version, before=before)
            process.send_signal(signal.SIGUSR2)
            assert (await systemd.hears())["RELOADING"] == "1"
            assert (await systemd.hears())["READY"] == "1"
            client = Peer(*await asyncio.open_connection("127.0.0.1", systemd.port("http")))
            await answers_as(client, version)
            client.close()
            before = version
        # What was not listened on before is still passed.
        file.write(upstream, listen="systemd:http", admin="{listen: 'systemd:admin'}")
        process.send_signal(signal.SIGHUP)
        assert (await systemd.hears())["RELOADING"] == "1"
        assert (await systemd.hears())["READY"] == "1"
        admin = Peer(*await asyncio.open_connection("127.0.0.1", systemd.port("admin")))
        admin.send(b"GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert (await admin.message()).status == 200
        admin.close()
        process.terminate()
        assert await systemd.hears() == {"STOPPING": "1"}
        assert await process.wait() == 0
    finally:
        await end(process)


async def test_without_a_file_and_as_a_script_it_is_upgraded_as_well_and_keeps_its_name(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    script = script_in(tmp_path)
    arguments = ("--upstream", f"{upstream.url}/v1", *ANYWHERE, "--workers", "1")
    async with serve(*arguments, program=[str(script)], **installed.environment) as served:
        assert name_of(served.pid) == "sseproxy"
        client, api = await streaming(served, upstream)
        installed.install("0.9.1")
        await upgraded(served, "0.9.1")
        assert name_of(served.pid) == "sseproxy"
        await serves(served, "0.9.1")
        await finish(client, api)


async def test_a_worker_is_not_ended_by_a_signal_that_was_meant_for_its_supervisor(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    async with ConfigFile(tmp_path, upstream).serve(**installed.environment) as served:
        client, api = await streaming(served, upstream)
        (worker,) = served.workers
        os.kill(worker, signal.SIGUSR2)
        await finish(client, api)
        await serves(served, __version__)
        assert served.workers == [worker]


async def test_a_command_that_cannot_be_executed_any_more_changes_nothing(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    script = script_in(tmp_path)
    file = ConfigFile(tmp_path, upstream)
    async with serve("-c", str(file.path), program=[str(script)], **installed.environment) as served:
        client, api = await streaming(served, upstream)
        workers = served.workers
        # The trial is the last that it is good for.
        installed.change("cli.py", "    import uvloop\n", "    import uvloop\n    os.unlink(sys.argv[0])\n")
        await refused(served, f"{script} cannot be executed: No such file or directory")
        assert served.workers == workers
        await finish(client, api)
        await serves(served, __version__)
        await refused_again(served, f"{script} cannot be executed: No such file or directory")


async def refused_again(served: Served, reason: str) -> None:
    served.process.send_signal(signal.SIGUSR2)
    await served.until(r'config_reloads_total\{result="failure"\}', 2)
    await until_true(lambda: served.messages.count(f"not upgraded: {reason}") == 2)


async def test_a_reload_that_waits_for_an_upgrade_is_done_if_that_fails(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    script = script_in(tmp_path)
    file = ConfigFile(tmp_path, upstream)
    slow = "    import uvloop, time; os.unlink(sys.argv[0]); time.sleep(1)\n"
    async with (
        ScriptedUpstream() as other,
        serve("-c", str(file.path), program=[str(script)], **installed.environment) as served,
    ):
        installed.change("cli.py", "    import uvloop\n", slow)
        served.process.send_signal(signal.SIGUSR2)
        await until_true(lambda: "upgrading: trying the installed code" in served.messages)
        file.write(other)
        served.process.send_signal(signal.SIGHUP)
        await until_true(lambda: any("configuration reloaded" in message for message in served.messages))
        assert any("not upgraded: " in message for message in served.messages)
        await asked(served, other)


async def test_a_trial_that_is_ended_leaves_no_socket(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    path = tmp_path / "s"
    file = ConfigFile(tmp_path, upstream)
    async with file.serve(**installed.environment) as served:
        before = "            config = replace(self.config, workers=1)\n"
        installed.change("process/supervisor.py", before, f"            await asyncio.sleep(60)\n{before}")
        file.write(upstream, listen=f"['127.0.0.1:0', 'unix:{path}']")
        served.process.send_signal(signal.SIGUSR2)
        await until_true(path.exists)
        served.process.terminate()
        assert await served.ended() == 0
    assert not path.exists()


async def test_where_no_new_worker_comes_up_after_all_the_old_ones_go_on_until_one_does(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    well = tmp_path / "well"
    async with ConfigFile(tmp_path, upstream, workers="2").serve(**installed.environment) as served:
        client, api = await streaming(served, upstream)
        old = served.workers
        installed.install("0.9.1")
        # One, as in the trial, comes up.
        fails = f"if self.size > 1 and not os.path.exists({str(well)!r}):\n                    raise OSError('no')\n"
        forks = "process = await self._fork(fds)"
        installed.change("process/generation.py", forks, f"{fails}                {forks}")
        installed.change("process/supervisor.py", "_START_TIMEOUT = 30.0", "_START_TIMEOUT = 1.0")
        served.process.send_signal(signal.SIGUSR2)
        await until_true(
            lambda: any("the workers of the previous version continue" in message for message in served.messages)
        )
        assert (await served.get("/readyz"))[0] == 200
        assert await served.sample(r'build_info\{.*version="0.9.1"\}') == 1
        await answers_as(await served.connect(), __version__)
        assert set(old) <= set(served.workers)
        assert not any("upgraded from" in message for message in served.messages)
        well.touch()
        await until_true(lambda: any("upgraded from" in message for message in served.messages))
        await serves(served, "0.9.1")
        await finish(client, api)
        await until_true(lambda: not any(map(alive, old)))


async def test_a_late_upgrade_and_a_reload_do_not_disturb_each_other(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    well = tmp_path / "well"
    file = ConfigFile(tmp_path, upstream, workers="2")
    async with file.serve(**installed.environment) as served:
        forks = "                process = await self._fork(fds)\n"
        # The workers of the upgrade come up late, those of the reload slowly.
        late = f"""\
                if self.size == 2 and not os.path.exists({str(well)!r}):
                    raise OSError("no")
                if self.size == 3:
                    await asyncio.sleep(2)
"""
        installed.change("process/generation.py", forks, f"{late}{forks}")
        installed.change("process/supervisor.py", "_START_TIMEOUT = 30.0", "_START_TIMEOUT = 1.0")
        served.process.send_signal(signal.SIGUSR2)
        await until_true(
            lambda: any("the workers of the previous version continue" in message for message in served.messages)
        )
        file.write(upstream, workers="3")
        reloading = asyncio.get_running_loop().create_task(reload(served))
        well.touch()
        assert await reloading == (200, "reloaded\n")
        await until_true(lambda: len(served.workers) == 3)
        assert await served.sample("workers") == 3
        assert "Traceback" not in served.stderr


async def test_signals_that_come_while_the_code_is_exchanged_are_not_lost(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    async with ConfigFile(tmp_path, upstream).serve(**installed.environment) as served:
        client, api = await streaming(served, upstream)
        # It takes its time to become what it is to be.
        slow = "import sys, time\nif 'serve' in sys.argv:\n    time.sleep(1)\n"
        installed.change("__init__.py", "__version__", f"{slow}__version__")
        served.process.send_signal(signal.SIGUSR2)
        await until_true(lambda: any("trying the installed code" in message for message in served.messages))
        reloading = asyncio.get_running_loop().create_task(reload(served))
        await until_true(lambda: any("executes the installed code" in message for message in served.messages))
        # Who has asked before is answered.
        upgrading = "the proxy is being upgraded; the new version reads the configuration when it starts\n"
        assert await reloading == (503, upgrading)
        for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGTERM):
            served.process.send_signal(number)
        await until_true(lambda: any("draining for at most" in message for message in served.messages))
        await finish(client, api)
        assert await served.ended() == 0
        assert "Traceback" not in served.stderr


async def test_a_signal_that_came_just_before_ends_the_old_code(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    before = "            signals.hold_back()\n"
    installed.change("process/supervisor.py", before, f"            os.kill(os.getpid(), signal.SIGTERM)\n{before}")
    async with ConfigFile(tmp_path, upstream).serve(**installed.environment) as served:
        client, api = await streaming(served, upstream)
        served.process.send_signal(signal.SIGUSR2)
        await until_true(lambda: any("draining for at most" in message for message in served.messages))
        await finish(client, api)
        assert await served.ended() == 0
        assert not any("executes the installed code" in message for message in served.messages)


async def test_only_the_main_thread_receives_signals(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream).serve() as served:
        # In another thread.
        assert await reload(served) == (200, "reloaded\n")
        held_back = held_back_by(served.pid)
        assert not held_back.pop(served.pid)
        assert len(held_back) > 1
        assert all(signals == set(FOR_SUPERVISOR) for signals in held_back.values())


def held_back_by(pid: int) -> dict[int, set[signal.Signals]]:
    """The signals that each thread of a process blocks."""
    found: dict[int, set[signal.Signals]] = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        (blocked,) = re.findall(r"SigBlk:\t(.*)", (thread / "status").read_text())
        found[int(thread.name)] = {number for number in FOR_SUPERVISOR if int(blocked, 16) >> (number - 1) & 1}
    return found


def trials_of(served: Served) -> Callable[[], set[int]]:
    """The children that `served` has from now on."""
    before = children(served.pid)
    return lambda: set(children(served.pid)).difference(before)


async def test_signals_ask_for_one_upgrade_at_a_time_and_the_end_ends_it(
    upstream: ScriptedUpstream, tmp_path: Path, installed: Installation
) -> None:
    async with ConfigFile(tmp_path, upstream).serve(**installed.environment) as served:
        installed.change("cli.py", "    import uvloop\n", "    import time; time.sleep(60)\n")
        trials = trials_of(served)
        served.process.send_signal(signal.SIGUSR2)
        await until_true(lambda: len(trials()) == 1)
        (trial,) = trials()
        served.process.send_signal(signal.SIGUSR2)
        await until_true(lambda: "an upgrade is already in progress" in served.messages)
        served.process.terminate()
        assert await served.ended() == 0
        assert not alive(trial)


@pytest.mark.parametrize(
    ("handed_over", "status", "said"),
    [
        ("nonsense", 1, "sseproxy: SSEPROXY_HANDOVER, which an upgrade sets, cannot be decoded: JSON is malformed"),
        ('{"version": "0.9.1", "pid": 1, "workers": [[[1, 77]]]}', 1, "sseproxy: --upstream: "),
    ],
    ids=["garbled", "somebody else's"],
)
async def test_what_no_upgrade_has_left_is_not_used(handed_over: str, status: int, said: str) -> None:
    found, _, errors = await run("serve", "--upstream", "x", SSEPROXY_HANDOVER=handed_over)
    assert (found, errors.startswith(said)) == (status, True), errors
