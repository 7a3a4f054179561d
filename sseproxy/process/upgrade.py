"""New code takes the place of this one: same process, same sockets, and workers that finish what they have.

execve(2) keeps the process id, the descriptors that are inheritable and the children. So the supervisor executes the
command that it was started with again, and tells it in an environment variable what it has been given. The workers of
the old code go on accepting until those of the new code do.

Before that the new code is tried: the same command with `--trial` must bring up a worker on the same configuration.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from .. import __version__
from ..config import Listen
from ..config.values import read_address
from ..errors import ReloadError
from ..observe import logs

_VARIABLE = "SSEPROXY_HANDOVER"
_PACKAGE = Path(__file__).parent.parent
# Longer than a supervisor waits for one worker to accept, so that it can say what is wrong.
_TRIAL = 60.0
# What is said of a trial that failed: a traceback, and the line that sums it up.
_LAST_LINES = 20
_LAST_BYTES = 8192
# TASK_COMM_LEN without its final zero byte (proc(5)).
_NAME_SIZE = 15
# They are held back while the process is neither the old code nor the new: they would end it. Once the new code has its
# handlers, they arrive.
HELD_BACK = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2})


class Handover(msgspec.Struct, kw_only=True):
    """What the code before an upgrade leaves to the code after it: descriptors, and the process ids of its workers.

    Other versions read it. So fields keep their meaning, new ones have a default, and unknown ones are ignored.
    """

    version: str
    """The version that hands over."""
    pid: int = msgspec.field(default_factory=os.getpid)
    """The process that hands over: the one that this becomes, or the parent of one in which it is tried."""
    clients: dict[str, list[int]] = {}
    """The listening sockets for clients, by their addresses as they are configured."""
    admin: dict[str, list[int]] = {}
    workers: list[list[tuple[int, int]]] = []
    """Of each configuration, the oldest first: process id, and the channel's descriptor, or -1 if it is closed."""
    ledger: int = -1
    """The descriptor of the file of the ledger, or -1 if there is none."""
    rows: dict[int, int] = {}
    """The row of each worker in the ledger, by its process id."""

    def listening(self) -> set[str]:
        """The addresses of all listening sockets."""
        return {*self.clients, *self.admin}

    def descriptors(self) -> list[int]:
        listening = [fd for found in (self.clients, self.admin) for fds in found.values() for fd in fds]
        others = [self.ledger, *(fd for workers in self.workers for _, fd in workers)]
        return listening + [fd for fd in others if fd >= 0]


def described(sockets: Mapping[Listen, Iterable[socket.socket]]) -> dict[str, list[int]]:
    """Listening sockets as a `Handover` has them."""
    return {str(address): [sock.fileno() for sock in bound] for address, bound in sockets.items()}


def opened(listening: Mapping[str, Iterable[int]]) -> dict[Listen, list[socket.socket]]:
    """The inverse of `described`."""
    return {read_address(text): [socket.socket(fileno=fd) for fd in fds] for text, fds in listening.items()}


def receive() -> Handover | None:
    """What the code before has left, or None if this process is no upgrade. Nobody inherits it from here.

    Raises `ReloadError` if what it has left is not understood.
    """
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None
    try:
        handover = msgspec.json.decode(text, type=Handover)
    except msgspec.MsgspecError as error:
        raise ReloadError(f"{_VARIABLE}, which an upgrade sets, is not understood: {error}") from None
    if handover.pid not in (os.getpid(), os.getppid()):
        # Somebody has copied the environment of a process that was upgraded.
        return None
    for fd in handover.descriptors():
        os.set_inheritable(fd, False)
    return handover


def command() -> list[str]:
    """The command that this process was started with: a script, or the interpreter and its arguments."""
    # Where the kernel has found the interpreter in a script, it has named the process after the script. `pgrep` goes by
    # that name, so it is kept.
    if sys.orig_argv[1:2] == sys.argv[:1] and _process_name() == os.path.basename(sys.argv[0])[:_NAME_SIZE]:
        return [*sys.argv]
    return [sys.executable, *sys.orig_argv[1:]]


def _process_name() -> str:
    try:
        return Path("/proc/self/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def _environment(handover: Handover) -> dict[str, str]:
    return os.environ | {_VARIABLE: msgspec.json.encode(handover).decode()}


async def try_out(command: Sequence[str], handover: Handover) -> None:
    """Runs `command` with `--trial`. Raises `ReloadError`, with the last that it said, if it does not come up."""
    environment = _environment(handover)
    # It is not the service.
    environment.pop("NOTIFY_SOCKET", None)
    try:
        process = await asyncio.create_subprocess_exec(
            *(*command, "--trial"),
            env=environment,
            pass_fds=handover.descriptors(),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise ReloadError(f"{command[0]} cannot be executed: {error.strerror}") from None
    assert process.stderr is not None
    said = b""
    try:
        async with asyncio.timeout(_TRIAL):
            while part := await process.stderr.read(_LAST_BYTES):
                said = (said + part)[-_LAST_BYTES:]
            status = await process.wait()
        why = f"the new code ended its trial with status {status}"
    except TimeoutError:
        status, why = 1, f"the new code did not come up within {_TRIAL:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if status:
        raise ReloadError("\n".join([why, *said.decode(errors="replace").splitlines()[-_LAST_LINES:]]))


def execute(command: Sequence[str], handover: Handover) -> NoReturn:
    """Becomes `command`, which is left `handover`. Raises `OSError` if it cannot be executed; nothing has changed then.

    If it can, nothing of this code runs afterwards, not even a `finally`.
    """
    logs.finish()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        for fd in handover.descriptors():
            os.set_inheritable(fd, True)
        os.execve(command[0], [*command], _environment(handover))
    finally:
        for fd in handover.descriptors():
            os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RunningCode:
    """The code of this package as it was on disk when the process started, which is the code that runs."""

    def __init__(self) -> None:
        self._digest = _digest()

    def replaced(self) -> str | None:
        """In words, that other code is installed by now. None if it is still the same."""
        if _digest() == self._digest:
            return None
        try:
            text = (_PACKAGE / "__init__.py").read_text(errors="replace")
        except OSError:
            return f"version {__version__} is running, and is no longer installed in {_PACKAGE}"
        installed = re.search(r'^__version__ = "(.+)"$', text, re.M)
        if installed is None or installed[1] == __version__:
            return f"version {__version__} is running, and its files in {_PACKAGE} have changed since it was started"
        return f"version {installed[1]} is installed, {__version__} is running"


def _digest() -> bytes:
    """Of the names and contents of the package's files. It takes a few milliseconds."""
    digest = hashlib.sha256()
    # Unlike `Path.rglob`, it takes directories that vanish while it looks.
    found = (os.path.join(directory, name) for directory, _, names in os.walk(_PACKAGE) for name in names)
    for path in sorted(path for path in found if path.endswith(".py")):
        try:
            text = Path(path).read_bytes()
        except OSError:
            text = b""
        digest.update(b"%b %d\n%b" % (os.path.relpath(path, _PACKAGE).encode(), len(text), text))
    return digest.digest()
