"""The fork server: a process that has imported what a worker needs, and from which all workers are forked.

Most of the time that a worker needs to start, and half of its memory, are for imports. The fork server has done them
once. So a worker starts within milliseconds, and its code is in memory that all workers share. A worker always runs the
code that its supervisor runs, even if another version has been installed meanwhile.

The supervisor forks the fork server before it has threads, an event loop or a configuration, so a worker inherits none
of them.

A supervisor must learn how its workers end, so they have to be its children and not those of the fork server. This also
holds after an upgrade, when there is a new fork server. So the fork server forks a process that forks the worker and
ends. A process whose parent has ended gets a new parent: the nearest ancestor that is a subreaper (prctl(2),
PR_SET_CHILD_SUBREAPER). The supervisor makes itself one.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, NoReturn

from ..observe import logs
from ..signals import FOR_SUPERVISOR, hold_back

Main = Callable[[Sequence[int]], None]
"""What a worker runs, with its descriptors."""

# linux/prctl.h
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
# The signals for a supervisor may be sent to all processes of a service. A worker handles these; until it has set its
# handlers, they end it. It ignores the rest. The fork server ignores all of them: it ends when the supervisor closes
# its socket.
_WORKER_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# How many descriptors one message has at most. The kernel allows 253 (unix(7)).
_MOST_DESCRIPTORS: Final = 200
_MORE, _LAST = b"+", b"."
_MAX_ANSWER: Final = 32
# Seconds to wait for an answer, which normally takes milliseconds.
_ANSWER_TIMEOUT: Final = 10.0
# Process names have at most 15 bytes (proc(5), comm). They do not contain "sseproxy", so that `pkill sseproxy` only
# finds the supervisor.
_NAME, _WORKER_NAME = b"sse-forkserver", b"sse-worker"


class ForkServer:
    """The supervisor's handle to the fork server. `main` is what workers run.

    Create it before there are any threads. Raises `OSError` if the fork server cannot be started.
    """

    def __init__(self, main: Main) -> None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Signals are held back until the new process ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_SUPERVISOR)
        try:
            self.pid = os.fork()
            """Its process id."""
            if not self.pid:
                self._sock.close()
                _run(_NAME, (), partial(_serve, theirs, main))
        except OSError:
            self._sock.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._sock.setblocking(False)
        self._asking = asyncio.Lock()
        self._gone = False

    async def fork(self, descriptors: Sequence[int]) -> Process:
        """Starts a worker that has these `descriptors`.

        Raises `ForkServerGone`, or another `OSError` if the worker cannot be started.
        """
        # If the caller is cancelled, the answer must still be read, or the next caller would take it for its own.
        return await asyncio.shield(self._fork(descriptors))

    async def _fork(self, descriptors: Sequence[int]) -> Process:
        async with self._asking:
            if self._gone:
                raise ForkServerGone
            try:
                for first in range(0, len(descriptors), _MOST_DESCRIPTORS):
                    last = first + _MOST_DESCRIPTORS >= len(descriptors)
                    part = descriptors[first : first + _MOST_DESCRIPTORS]
                    socket.send_fds(self._sock, [_LAST if last else _MORE], part)
                async with asyncio.timeout(_ANSWER_TIMEOUT):
                    answer = await asyncio.get_running_loop().sock_recv(self._sock, _MAX_ANSWER)
            except (ConnectionError, TimeoutError):
                answer = b""
            if not answer:
                # If it still answered later, the answer would be taken for that of another request.
                self._gone = True
                os.kill(self.pid, signal.SIGKILL)
                raise ForkServerGone
        if (pid := int(answer)) < 0:
            raise OSError(-pid, os.strerror(-pid))
        try:
            return Process(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            _status_of(pid)
            raise

    def close(self) -> None:
        """Ends the fork server. The workers go on."""
        self._sock.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


class ForkServerGone(OSError):
    """The fork server has ended: somebody has killed it, or it did not answer and was killed."""

    def __str__(self) -> str:
        return "the fork server (sse-forkserver) has ended"


class Process:
    """The process of a worker. Raises `OSError` if there is no descriptor left for it.

    The descriptor (pidfd_open(2)) is there from the beginning. So waiting for the process needs nothing that may be
    lacking then, such as a thread.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor: int | None = os.pidfd_open(pid)

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing if it has been waited for."""
        if self._descriptor is not None:
            signal.pidfd_send_signal(self._descriptor, number)

    async def wait(self) -> int:
        """Waits until it has ended. Returns its exit status, or minus the number of the signal that has ended it."""
        descriptor, loop, ended = self._descriptor, asyncio.get_running_loop(), asyncio.Event()
        assert descriptor is not None
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
        self._descriptor = None
        os.close(descriptor)
        return _status_of(self.pid)


def _status_of(pid: int) -> int:
    """The exit status of a child that has ended, or is about to. It is forgotten then."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def forget_orphans(known: Container[int]) -> None:
    """Waits for children that have ended and are not `known`, so that they do not stay as zombies.

    A subreaper gets all descendants whose parents have ended, so a trial or an earlier version may have left some.
    """
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in known:
            os.waitpid(ended.si_pid, 0)


def _prctl(option: int, value: int | bytes) -> None:
    """Sets an attribute of this process. Raises `OSError`."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def hide(variables: Iterable[str]) -> None:
    """Removes `variables` from the environment of this process. /proc/PID/environ then shows them as empty."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    for name in variables:
        if (value := getenv(os.fsencode(name))) is not None:
            ctypes.memset(value, 0, len(ctypes.string_at(value)))
            os.environ.pop(name, None)


def _run(name: bytes, default: Container[signal.Signals], life: Callable[[], None]) -> NoReturn:
    """Runs `life` in this process, which has just been forked with signals held back, and exits.

    Signals in `default` have their default action. The others in `FOR_SUPERVISOR` are ignored.
    """
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in FOR_SUPERVISOR:
            signal.signal(number, signal.SIG_DFL if number in default else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # Ctrl-C in a terminal sends SIGINT to a whole process group. Only the supervisor must get it.
        os.setsid()
        _prctl(_PR_SET_NAME, name)
        life()
        status = 0
    except BaseException:  # noqa: BLE001 - nobody above may go on in this process
        sys.excepthook(*sys.exc_info())
    finally:
        logs.finish()
        os._exit(status)


def _serve(sock: socket.socket, main: Main) -> None:
    """Forks a worker for each request that comes by `sock`, until the supervisor has closed its end."""
    # Sockets that an earlier version or systemd has handed over are inheritable. No worker must keep them open.
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        # The list has the descriptor that `listdir` itself used. It is closed by now.
        with suppress(OSError):
            if descriptor > 2 and os.get_inheritable(descriptor):
                os.close(descriptor)
    # A garbage collection writes to each object that it visits. The kernel would then copy the memory, which would no
    # longer be shared with the workers.
    gc.disable()
    gc.freeze()
    descriptors, lacking = list[int](), False
    while True:
        try:
            message, received, flags, _ = socket.recv_fds(sock, 1, _MOST_DESCRIPTORS)
        except ConnectionError:
            # The supervisor was killed before it had read an answer.
            return
        if not message:
            return
        descriptors += received
        # This process may have fewer descriptors than were sent (RLIMIT_NOFILE).
        lacking |= bool(flags & socket.MSG_CTRUNC)
        if message == _LAST:
            answer = _failed(errno.EMFILE) if lacking else _fork_twice(sock, descriptors, main)
            for descriptor in descriptors:
                os.close(descriptor)
            descriptors, lacking = [], False
            with suppress(ConnectionError):
                sock.send(answer)


def _fork_twice(sock: socket.socket, descriptors: Sequence[int], main: Main) -> bytes:
    """Forks a worker that is no child of this process. Returns its process id, or minus an error number, in digits."""
    try:
        reading, writing = os.pipe()
    except OSError as error:
        return _failed(error.errno)
    try:
        try:
            if not (between := os.fork()):
                _fork_once(sock, descriptors, main, reading, writing)
        finally:
            os.close(writing)
        os.waitpid(between, 0)
        # Without an answer, the process in between was killed.
        return os.read(reading, _MAX_ANSWER) or _failed(errno.EAGAIN)
    except OSError as error:
        return _failed(error.errno)
    finally:
        os.close(reading)


def _fork_once(sock: socket.socket, descriptors: Sequence[int], main: Main, reading: int, writing: int) -> NoReturn:
    """Forks the worker from the process in between, which writes the answer to `writing` and ends."""
    try:
        # A signal that the supervisor sends at once must not get lost while the worker still ignores it.
        hold_back()
        if not (worker := os.fork()):
            sock.close()
            os.close(reading)
            os.close(writing)
            _run(_WORKER_NAME, _WORKER_SIGNALS, partial(main, descriptors))
        os.write(writing, b"%d" % worker)
    except OSError as error:
        os.write(writing, _failed(error.errno))
    finally:
        os._exit(0)


def _failed(number: int | None) -> bytes:
    return b"-%d" % (number or errno.EIO)
