"""An upgrade: new code replaces the running code, in the same process and with the same sockets.

execve(2) keeps the process id, the inheritable descriptors and the child processes. So the supervisor executes the
command again that it was started with. An environment variable tells the new code which descriptors and workers it
takes over. The old workers accept connections until all new workers do; then they finish their exchanges. If some are
missing after half a minute, the old workers stop as soon as one new worker accepts.

Before that, the new code is tried: the same command with `--trial` must read the configuration and start a worker.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from .. import __version__
from ..config.values import read_address
from ..errors import ReloadError
from ..observe import logs
from .listeners import Sockets

_VARIABLE = "SSEPROXY_HANDOVER"
_PACKAGE = Path(__file__).parent.parent
# Seconds for a trial. Longer than a supervisor waits for one worker, so that the trial itself can report what is wrong.
_TRIAL_TIMEOUT = 60.0
# Seconds that a trial may take to end when it is not needed any more.
_TRIAL_GRACE = 2.0
# How much of the output of a failed trial goes to the log: enough for a traceback and the error message.
_LAST_LINES = 20
_LAST_BYTES = 8192
# TASK_COMM_LEN without its final zero byte (proc(5)).
_NAME_SIZE = 15


class Handover(msgspec.Struct, kw_only=True):
    """What the previous version passes to the next one: descriptors of sockets, and its workers.

    It is read by other versions. So fields keep their meaning, new fields have a default, and unknown ones are ignored.
    """

    version: str
    """The version that hands over."""
    pid: int = msgspec.field(default_factory=os.getpid)
    """The process that hands over. It is this process after the upgrade, and the parent process during the trial."""
    clients: dict[str, list[int]] = {}
    """For each configured address of `listen`, the descriptors of its listening sockets."""
    admin: dict[str, list[int]] = {}
    """The same for `admin.listen`."""
    workers: list[list[tuple[int, int]]] = []
    """For each generation, the oldest first, its workers: process id and descriptor of the channel (-1 if closed)."""
    ledger: int = -1
    """The descriptor of the ledger's file, or -1 if there is none."""
    rows: dict[int, int] = {}
    """The row of each worker in the ledger, by process id."""

    def listening(self) -> set[str]:
        """The addresses of all listening sockets."""
        return {*self.clients, *self.admin}

    def descriptors(self) -> list[int]:
        listening = [fd for found in (self.clients, self.admin) for fds in found.values() for fd in fds]
        others = [self.ledger, *(fd for workers in self.workers for _, fd in workers)]
        return listening + [fd for fd in others if fd >= 0]


def described(sockets: Sockets) -> dict[str, list[int]]:
    """Listening sockets in the form of a `Handover`."""
    return {str(address): [sock.fileno() for sock in bound] for address, bound in sockets.items()}


def opened(listening: Mapping[str, Iterable[int]]) -> Sockets:
    """The inverse of `described`."""
    return {read_address(text): [socket.socket(fileno=fd) for fd in fds] for text, fds in listening.items()}


def receive() -> Handover | None:
    """What the previous version has handed over, or None if this process was not started by an upgrade.

    Programs that this process executes later inherit neither the variable nor the descriptors. Raises `ReloadError` if
    the variable cannot be decoded.
    """
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None
    try:
        handover = msgspec.json.decode(text, type=Handover)
    except msgspec.MsgspecError as error:
        raise ReloadError(f"{_VARIABLE}, which an upgrade sets, cannot be decoded: {error}") from None
    if handover.pid not in (os.getpid(), os.getppid()):
        # The environment was copied from another process that was upgraded.
        return None
    for fd in handover.descriptors():
        os.set_inheritable(fd, False)
    return handover


def command() -> list[str]:
    """The command that this process was started with: a script, or the interpreter and its arguments."""
    # If the kernel has started the interpreter because of a script's first line (#!), the process has the name of the
    # script. `pgrep` finds it by that name, so the script is executed again.
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
    """Runs `command` with `--trial`. Raises `ReloadError` with the end of its output if the trial fails."""
    environment = _environment(handover)
    # The trial must not send notifications in the name of the service.
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
    output = b""
    try:
        async with asyncio.timeout(_TRIAL_TIMEOUT):
            while part := await process.stderr.read(_LAST_BYTES):
                output = (output + part)[-_LAST_BYTES:]
            status = await process.wait()
        why = f"the trial of the new code ended with status {status}"
    except TimeoutError:
        status, why = 1, f"the new code did not start within {_TRIAL_TIMEOUT:g} s"
    finally:
        if process.returncode is None:
            # It removes the Unix sockets that it has added.
            process.terminate()
            with suppress(TimeoutError):
                try:
                    await asyncio.wait_for(process.wait(), _TRIAL_GRACE)
                finally:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
    if status:
        raise ReloadError("\n".join([why, *output.decode(errors="replace").splitlines()[-_LAST_LINES:]]))


def execute(command: Sequence[str], handover: Handover) -> NoReturn:
    """Executes `command` in place of this process, and passes `handover` to it. On success it does not return.

    Signals must be held back: before the new code has its handlers, they would end the process. Raises `OSError` if
    `command` cannot be executed; then nothing has changed.
    """
    logs.finish()
    try:
        for fd in handover.descriptors():
            os.set_inheritable(fd, True)
        os.execve(command[0], [*command], _environment(handover))
    finally:
        for fd in handover.descriptors():
            os.set_inheritable(fd, False)


class RunningCode:
    """The running code: a digest of this package's files when the process started."""

    def __init__(self) -> None:
        self._digest = _digest()

    def replaced(self) -> str | None:
        """What to tell the operator if other code is installed now than is running, or else None."""
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
    """A digest of the names and contents of the package's files. It takes a few milliseconds."""
    digest = hashlib.sha256()
    # Unlike `Path.rglob`, `os.walk` does not fail if a directory disappears meanwhile.
    found = (os.path.join(directory, name) for directory, _, names in os.walk(_PACKAGE) for name in names)
    for path in sorted(path for path in found if path.endswith(".py")):
        try:
            text = Path(path).read_bytes()
        except OSError:
            text = b""
        digest.update(b"%b %d\n%b" % (os.path.relpath(path, _PACKAGE).encode(), len(text), text))
    return digest.digest()
