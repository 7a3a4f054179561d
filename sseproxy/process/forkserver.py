"""The fork server: a process that has imported what a worker needs, and from which all workers are forked.

Imports take nearly all of the time and half of the memory of a worker. They are done once: a worker starts within
milliseconds, and its code is in memory that all of them share. A worker also runs the code that its supervisor runs,
whatever is installed meanwhile.

The supervisor forks the server before it has threads, an event loop or a configuration, so none of them is in a worker.
The server forks twice for each worker, and the process in between ends. So the worker is adopted by the nearest
ancestor that has asked for that (PR_SET_CHILD_SUBREAPER, prctl(2)), which is the supervisor: it learns how its workers
end, also after an upgrade, when there is another server.
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

Main = Callable[[Sequence[int]], None]
"""What a worker runs, with its descriptors."""

# linux/prctl.h
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
# Signals that are meant for the supervisor and may be sent to all processes of a service. The fork server ignores them:
# it ends when the supervisor has closed its socket.
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
# Descriptors in a message. The kernel allows 253 (unix(7)).
_MOST_DESCRIPTORS: Final = 200
_MORE, _LAST = b"+", b"."
_MAX_ANSWER: Final = 32
# Seconds for an answer. It takes milliseconds.
_ANSWER_TIMEOUT: Final = 10.0
# TASK_COMM_LEN has 15 bytes. `pkill sseproxy` must only find the supervisor.
_NAME, _WORKER_NAME = b"sse-forkserver", b"sse-worker"


class ForkServer:
    """The server, as its supervisor has it. `main` is what workers run. Create it before there are any threads."""

    def __init__(self, main: Main) -> None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # None of these signals may come before they are ignored.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self.pid = os.fork()
        """Its process id."""
        if not self.pid:
            self._sock.close()
            _run(_NAME, signal.SIG_IGN, partial(_serve, theirs, main))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._sock.setblocking(False)
        self._asking = asyncio.Lock()

    async def fork(self, descriptors: Sequence[int]) -> Process:
        """Starts a worker that has these `descriptors`. Raises `OSError` if it cannot be started."""
        # A request that nobody waits for any more still has its answer.
        return await asyncio.shield(self._fork(descriptors))

    async def _fork(self, descriptors: Sequence[int]) -> Process:
        async with self._asking:
            try:
                for first in range(0, len(descriptors), _MOST_DESCRIPTORS):
                    last = first + _MOST_DESCRIPTORS >= len(descriptors)
                    part = descriptors[first : first + _MOST_DESCRIPTORS]
                    socket.send_fds(self._sock, [_LAST if last else _MORE], part)
                async with asyncio.timeout(_ANSWER_TIMEOUT):
                    answer = await asyncio.get_running_loop().sock_recv(self._sock, _MAX_ANSWER)
            except ConnectionError:
                answer = b""
            except TimeoutError:
                # A later answer would be taken for that of another request.
                os.kill(self.pid, signal.SIGKILL)
                answer = b""
        if not answer:
            raise ForkServerGone
        if (pid := int(answer)) < 0:
            raise OSError(-pid, os.strerror(-pid))
        return Process(pid)

    def close(self) -> None:
        """Ends the server. Its workers go on."""
        self._sock.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


class ForkServerGone(OSError):
    """The fork server has been killed, or did not answer and was killed."""

    def __str__(self) -> str:
        return "the process that starts workers has been killed"


class Process:
    """The process of a worker."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended = False

    def send_signal(self, number: signal.Signals) -> None:
        # A process that has not been waited for still has its id.
        if not self._ended:
            os.kill(self.pid, number)

    async def wait(self) -> int:
        """Waits until it has ended, and returns its exit status; if a signal has ended it, minus the signal's number.

        Occupies a thread, so call it when the end is near.
        """
        await asyncio.to_thread(os.waitid, os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return self._forget()

    def _forget(self) -> int:
        self._ended = True
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def forget_orphans(known: Container[int]) -> None:
    """Lets the kernel forget children that have ended and are not `known`.

    They are what a trial or an earlier version has left: a subreaper adopts all descendants whose parents have ended.
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


def _run(name: bytes, handler: signal.Handlers, life: Callable[[], None]) -> NoReturn:
    """The rest of this process, which has just been forked: `life`, with `handler` for the signals of supervisors."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, handler)
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
    # What an earlier version or systemd has handed over is inheritable, and no worker's business.
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        # The directory that was listed is closed already.
        with suppress(OSError):
            if descriptor > 2 and os.get_inheritable(descriptor):
                os.close(descriptor)
    # A collection would write to the memory that is shared.
    gc.disable()
    gc.freeze()
    descriptors, lacking = list[int](), False
    while True:
        message, received, flags, _ = socket.recv_fds(sock, 1, _MOST_DESCRIPTORS)
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
        if not (between := os.fork()):
            _fork_once(sock, descriptors, main, reading, writing)
        os.waitpid(between, 0)
        return os.read(reading, _MAX_ANSWER)
    except OSError as error:
        return _failed(error.errno)
    finally:
        os.close(reading)
        os.close(writing)


def _fork_once(sock: socket.socket, descriptors: Sequence[int], main: Main, reading: int, writing: int) -> NoReturn:
    """The life of the process in between. It writes its answer to `writing`."""
    try:
        if not (worker := os.fork()):
            sock.close()
            os.close(reading)
            os.close(writing)
            _run(_WORKER_NAME, signal.SIG_DFL, partial(main, descriptors))
        os.write(writing, b"%d" % worker)
    except OSError as error:
        os.write(writing, _failed(error.errno))
    finally:
        os._exit(0)


def _failed(number: int | None) -> bytes:
    return b"-%d" % (number or errno.EIO)
