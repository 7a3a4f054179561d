"""The fork server, and its workers: what they have, whose children they are, and how they end."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest

from sseproxy.process.forkserver import ForkServer, ForkServerGone, Process, forget_orphans, hide

from .harness import DEADLINE
from .served import alive, children, name_of, until_true

MakeServer = Callable[[Callable[[Sequence[int]], None]], ForkServer]


@pytest.fixture
def serving() -> Iterator[MakeServer]:
    """`serving(main)`: a fork server whose workers run `main`."""
    servers: list[ForkServer] = []

    def begin(main: Callable[[Sequence[int]], None]) -> ForkServer:
        servers.append(ForkServer(main))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


def told(sock: socket.socket) -> str:
    """What a worker tells until its end."""
    sock.settimeout(DEADLINE)
    text = b""
    while part := sock.recv(65536):
        text += part
    return text.decode()


async def forked(server: ForkServer, more: Sequence[int] = ()) -> tuple[Process, socket.socket]:
    """A worker, and the other end of the socket that is its first descriptor."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            return await server.fork([theirs.fileno(), *more]), ours
        except BaseException:
            ours.close()
            raise


def tells_its_id(descriptors: Sequence[int]) -> None:
    os.write(descriptors[0], b"%d" % os.getpid())


async def tells_its_own(server: ForkServer) -> None:
    """A worker that `tells_its_id` does so, and ends."""
    process, ours = await forked(server)
    with ours:
        assert await asyncio.to_thread(told, ours) == str(process.pid)
    assert await process.wait() == 0


async def test_a_worker_is_a_child_of_its_supervisor_in_a_session_of_its_own(serving: MakeServer) -> None:
    def main(descriptors: Sequence[int]) -> None:
        ids = os.getpid(), os.getsid(0), threading.active_count(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
        os.write(descriptors[0], f"{ids} {Path('/proc/self/comm').read_text().rstrip()}".encode())
        signal.pause()

    server = serving(main)
    process, ours = await forked(server)
    with ours:
        said = await asyncio.to_thread(ours.recv, 1000)
        assert said.decode() == f"{(process.pid, process.pid, 1, set[int]())} sse-worker"
        assert process.pid in children(os.getpid())
        assert not children(server.pid)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == -signal.SIGTERM
    # Its id may be that of another process by now.
    process.send_signal(signal.SIGKILL)


def open_files(pid: int) -> set[str]:
    """What the descriptors of a process are, without those of standard streams."""
    found: set[str] = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        # That of the directory is closed by now.
        with suppress(FileNotFoundError):
            if int(path.name) > 2:
                found.add(os.readlink(path))
    return found


@pytest.mark.parametrize("number", [0, 1, 199, 200, 450])
async def test_a_worker_has_the_descriptors_that_were_sent_and_none_that_was_handed_over(
    serving: MakeServer, number: int
) -> None:
    def main(descriptors: Sequence[int]) -> None:
        os.write(descriptors[0], str([os.fstat(descriptor).st_ino for descriptor in descriptors[1:]]).encode())
        signal.pause()

    handed_over = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(handed_over, True)
    server = serving(main)
    await until_true(lambda: "/dev/zero" not in open_files(server.pid))
    at_first = open_files(server.pid)
    for _ in range(2):
        pipes = [os.pipe() for _ in range(number)]
        sent = [reading for reading, _ in pipes]
        process, ours = await forked(server, sent)
        with ours:
            text = await asyncio.to_thread(ours.recv, 1 << 20)
        assert text.decode() == str([os.fstat(descriptor).st_ino for descriptor in sent])
        had = open_files(process.pid)
        assert had >= {os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in sent}
        assert "/dev/zero" not in had
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == -signal.SIGTERM
        for descriptor in (descriptor for pair in pipes for descriptor in pair):
            os.close(descriptor)
    assert open_files(server.pid) == at_first
    os.close(handed_over)


async def test_workers_that_are_started_together_are_each_told_apart(serving: MakeServer) -> None:
    server = serving(tells_its_id)
    started = await asyncio.gather(*(forked(server) for _ in range(20)))
    for process, ours in started:
        with ours:
            assert await asyncio.to_thread(told, ours) == str(process.pid)
        assert await process.wait() == 0


async def test_who_does_not_wait_any_more_changes_nothing_for_the_others(serving: MakeServer) -> None:
    server = serving(tells_its_id)
    for _ in range(5):
        impatient = asyncio.ensure_future(forked(server))
        await asyncio.sleep(0)
        impatient.cancel()
        with suppress(asyncio.CancelledError):
            await impatient
        await tells_its_own(server)


async def test_an_error_of_a_worker_is_told_and_is_its_status(
    serving: MakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    def main(descriptors: Sequence[int]) -> None:
        raise ValueError("of a worker")

    server = serving(main)
    process, ours = await forked(server)
    ours.close()
    assert await process.wait() == 1
    assert alive(server.pid)


async def test_where_descriptors_lack_no_worker_is_started_and_later_one_is(serving: MakeServer) -> None:
    server = serving(tells_its_id)
    await tells_its_own(server)
    at_first = open_files(server.pid)
    limit = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    # Enough for what it has, for some of what it is sent, for all of that, but not for the pipe.
    for possible, sent in ((4, 1), (6, 10), (5, 1)):
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (possible, limit[1]))
        with pytest.raises(OSError, match="Too many open files"):
            await forked(server, [0] * (sent - 1))
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limit)
    await tells_its_own(server)
    assert open_files(server.pid) == at_first


async def test_signals_that_are_for_all_processes_of_a_service_leave_the_server(serving: MakeServer) -> None:
    server = serving(tells_its_id)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        os.kill(server.pid, number)
    await tells_its_own(server)


async def test_a_worker_ignores_what_it_does_not_handle_and_loses_no_signal(serving: MakeServer) -> None:
    server = serving(lambda descriptors: signal.pause())
    for _ in range(30):
        process, ours = await forked(server)
        with ours:
            process.send_signal(signal.SIGUSR2)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == -signal.SIGTERM


async def test_a_worker_is_killed_if_nobody_could_wait_for_it(
    serving: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serving(lambda descriptors: signal.pause())
    before = children(os.getpid())

    def fails(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("os.pidfd_open", fails)
    with pytest.raises(OSError, match="Too many open files"):
        await forked(server)
    assert children(os.getpid()) == before


async def test_waiting_needs_no_thread(serving: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    server = serving(lambda descriptors: signal.pause())
    process, ours = await forked(server)
    monkeypatch.setattr("threading.Thread.start", fails)
    with ours:
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL


async def test_if_the_process_in_between_is_killed_no_worker_is_started_and_the_next_one_is(
    serving: MakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fork, supervisor = os.fork, os.getpid()

    def forks() -> int:
        # The fork server is a child of the supervisor, and the process in between is not.
        if supervisor not in (os.getpid(), os.getppid()) and not marked.exists():
            marked.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return fork()

    marked = tmp_path / "killed"
    monkeypatch.setattr("os.fork", forks)
    server = serving(tells_its_id)
    with pytest.raises(OSError, match="temporarily unavailable"):
        await forked(server)
    await tells_its_own(server)


async def test_a_server_that_was_killed_is_gone(serving: MakeServer) -> None:
    server = serving(lambda descriptors: None)
    os.kill(server.pid, signal.SIGKILL)
    await until_true(lambda: not alive(server.pid))
    for _ in range(2):
        with pytest.raises(ForkServerGone, match="has ended"):
            await server.fork([0])


async def test_a_server_that_does_not_answer_is_killed(serving: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serving(tells_its_id)
    await tells_its_own(server)
    monkeypatch.setattr("sseproxy.process.forkserver._ANSWER_TIMEOUT", 0.1)
    os.kill(server.pid, signal.SIGSTOP)
    for _ in range(2):
        with pytest.raises(ForkServerGone):
            await forked(server)
    await until_true(lambda: not alive(server.pid))


async def test_a_server_that_stands_still_is_closed_and_its_workers_go_on() -> None:
    with closing(ForkServer(lambda descriptors: signal.pause())) as server:
        process, ours = await forked(server)
        os.kill(server.pid, signal.SIGSTOP)
    assert not name_of(server.pid)
    assert alive(process.pid)
    process.send_signal(signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL
    ours.close()


def in_a_process(test: Callable[[], None]) -> int:
    """The exit status of a process that runs `test` alone."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        test()
        status = 0
    finally:
        os._exit(status)


def test_orphans_are_forgotten_and_those_that_are_known_are_not() -> None:
    def test() -> None:
        server = ForkServer(lambda descriptors: None)
        known, orphan = os.fork(), 0
        if not known:
            os._exit(7)
        os.waitid(os.P_PID, known, os.WEXITED | os.WNOWAIT)
        forget_orphans({known, server.pid})
        assert os.waitstatus_to_exitcode(os.waitpid(known, 0)[1]) == 7
        orphan = os.fork()
        if not orphan:
            os._exit(0)
        os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
        forget_orphans({server.pid})
        assert not name_of(orphan)
        server.close()
        # Without any child.
        forget_orphans(())

    assert in_a_process(test) == 0


def test_what_is_hidden_is_in_no_environment() -> None:
    def test() -> None:
        os.environ["SET_LATER"] = "planted"
        before = b"\0" + Path("/proc/self/environ").read_bytes()
        path = b"\0PATH=" + os.environb[b"PATH"]
        assert path in before
        hide(["PATH", "SET_LATER", "NOT_SET"])
        shown = b"\0" + Path("/proc/self/environ").read_bytes()
        assert shown == before.replace(path, b"\0PATH=" + bytes(len(path) - len(b"\0PATH=")))
        assert not {"PATH", "SET_LATER"} & os.environ.keys()

    assert in_a_process(test) == 0
