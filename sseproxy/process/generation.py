"""A generation: the workers of one configuration, started together, replaced when they end unasked, retired together.

A worker that ends unasked is replaced, at once the first time, later and later if its successors end early as well.
What it had under way counts as lost. One that says nothing, although it was asked, is ended so that it is replaced: it
stands still, and so do the clients that it has accepted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import ceil
from time import perf_counter

from ..config import Config
from ..errors import Outcome
from ..observe import metrics
from ..observe.metrics import Recorder, Report
from ..observe.registry import Registry
from ..observe.telemetry import Reports
from ..relay.admission import connections_within
from .worker import encode_config

log = logging.getLogger(__name__)

# A worker that lived this long was not part of a crash loop.
_HEALTHY_AFTER = 10.0
_BACKOFF_MIN, _BACKOFF_MAX = 0.1, 10.0
# A worker is asked so often whether it is there, if it does not say so unasked.
_ASKED_EVERY = 1.0
# So often in a row it says nothing until it counts as not ready, and until it is killed, where `limits.lag` is a second
# or less; more is given where that is more. A turn of a worker's loop takes milliseconds, and in one that is overloaded
# as long as `limits.lag` allows. A kill cuts streams, and is for what will not get better: gunicorn waits 30 seconds.
_UNREADY_AFTER, _KILLED_AFTER = 5, 20
# In the same count, until it accepts: it takes a sixth of a second of CPU, and on a small machine many start at once.
_STARTED_AFTER = 60
# What a worker has besides connections.
_DESCRIPTORS_OF_ITS_OWN = 50
# What the interpreter and its libraries go by themselves; a file may have used it for a path.
_NEEDED = frozenset(
    {"HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "TZ"}
    | {"SSL_CERT_DIR", "SSL_CERT_FILE"}
)


def cores() -> int:
    """The cores this process may use: its affinity, and its control group's quota, rounded up."""
    available = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return max(1, min(available, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return available


def within_descriptors(config: Config) -> Config:
    """`config`, of a worker, with no more connections than there may be descriptors for.

    This process and its children may have as many as the system lets them from now on.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    wanted = config.limits.connections
    possible = max(1, connections_within(most - _DESCRIPTORS_OF_ITS_OWN))
    if most == resource.RLIM_INFINITY or wanted <= possible:
        return config
    if "connections" in config.limits.model_fields_set:
        log.warning(
            "a worker takes %d connections instead of %d: it may have %d descriptors (ulimit -n)",
            possible,
            wanted,
            most,
        )
    return config.model_copy(update={"limits": config.limits.model_copy(update={"connections": possible})})


def environment(config: Config) -> dict[str, str]:
    """What a worker inherits: not the variables that `config` took its keys from, which are handed to it."""
    return {name: value for name, value in os.environ.items() if name not in config.variables - _NEEDED}


class Generation:
    """The workers of `config`, which accept on `sockets` until they are told otherwise.

    `numbers` tells the workers of all generations apart in the registry; `changed` is called when one is ready, or
    has ended.
    """

    def __init__(
        self,
        config: Config,
        sockets: Sequence[socket.socket],
        numbers: Iterator[int],
        registry: Registry,
        recorder: Recorder,
        changed: Callable[[], None],
    ) -> None:
        self.config = config
        self.size = cores() if config.workers == "auto" else config.workers
        self.ready: set[int] = set()
        """The workers that accept, by their numbers."""
        self.fate = ""
        """How the latest worker ended that did so unasked."""
        self.finishing = False
        """Another configuration has taken over."""
        self._of_a_worker = config.share(self.size)
        self._sockets = sockets
        self._numbers = numbers
        self._registry = registry
        self._recorder = recorder
        self._changed = changed
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        # Of the workers that report, which they do once they accept.
        self._reports: dict[int, Reports] = {}
        self._keepers: list[asyncio.Task[None]] = []
        # What workers that have just been started are to be told as well.
        self._told: signal.Signals | None = None
        self._closing = asyncio.Event()

    def start(self) -> None:
        """Starts the workers; `ready` tells which of them accept."""
        self._of_a_worker = within_descriptors(self._of_a_worker)
        loop = asyncio.get_running_loop()
        self._keepers = [loop.create_task(self._keep_worker()) for _ in range(self.size)]

    def complete(self) -> bool:
        """Whether every worker accepts."""
        return len(self.ready) == self.size

    def missing(self) -> str:
        """Who does not accept, and what is known of why."""
        why = f": one {self.fate}" if self.fate else ""
        return f"{self.size - len(self.ready)} of {self.size} new workers did not come to accept connections{why}"

    def retire(self) -> None:
        """No more accepting; exchanges go on as `reload.drain_timeout` has it. Returns at once."""
        self.finishing = True
        self._tell(signal.SIGHUP)

    def expire(self) -> None:
        """No more accepting; exchanges are ended. Returns at once."""
        self._tell(signal.SIGINT)

    def drain(self) -> None:
        """No more accepting; exchanges go on as `drain_timeout` has it. Returns at once."""
        self._tell(signal.SIGTERM)

    def kill(self) -> None:
        self._tell(signal.SIGKILL)

    def _tell(self, number: signal.Signals) -> None:
        self._told = number
        self._closing.set()
        for process in self._processes.values():
            # One that has just ended is still among them.
            with suppress(ProcessLookupError):
                process.send_signal(number)

    async def report(self) -> None:
        """Waits until the registry has what each worker knows now."""
        await asyncio.gather(*(reports.latest() for reports in self._reports.values()))

    async def ended(self) -> None:
        """Waits until every worker has ended, after they were told to."""
        await asyncio.wait(self._keepers)

    async def _keep_worker(self) -> None:
        """Keeps one worker running."""
        backoff = 0.0
        while not self._closing.is_set():
            started = perf_counter()
            try:
                fate = f"ended with status {await self._run_worker()}"
                ended = True
            except OSError as error:
                # Out of descriptors, processes or memory; there may be some again.
                fate, ended = f"could not be started ({error})", False
            if self._closing.is_set():
                return
            if ended:
                self._recorder.count(metrics.RESTARTS, ())
            lived = perf_counter() - started
            backoff = 0.0 if lived >= _HEALTHY_AFTER else min(max(2 * backoff, _BACKOFF_MIN), _BACKOFF_MAX)
            log.error("a worker %s after %.1fs; the next starts in %.1fs", fate, lived, backoff)
            self.fate = fate
            self._changed()
            try:
                await asyncio.wait_for(self._closing.wait(), backoff)
            except TimeoutError:
                continue

    async def _run_worker(self) -> int:
        """Runs one worker to its end; returns its exit status. Raises `OSError` if there is no starting one."""
        ours, theirs = socket.socketpair()
        number = next(self._numbers)
        fds = [theirs.fileno(), *(sock.fileno() for sock in self._sockets)]
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "sseproxy.process.start", *map(str, fds)),
                    env=environment(self.config),
                    pass_fds=fds,
                    # The terminal's Ctrl-C goes to a whole process group; what it means is decided here.
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        self._processes[number] = process
        if self._told is not None:
            with suppress(ProcessLookupError):
                process.send_signal(self._told)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        writer.write(encode_config(self._of_a_worker))

        def ask(question: bytes) -> None:
            # One that has reset its end has no answer, and may hang all the same.
            if not writer.transport.is_closing():
                writer.write(question)

        reports = Reports(reader, ask)
        watch = asyncio.get_running_loop().create_task(self._watch(number, process, reports))
        try:
            await self._follow(number, reports)
        except Exception:
            # As it is where the package on disk has become another one since the supervisor was started.
            log.exception("a worker says what this version does not understand: it is killed; restart to upgrade")
            process.kill()
        self.ready.discard(number)
        self._reports.pop(number, None)
        status = await process.wait()
        watch.cancel()
        writer.close()
        del self._processes[number]
        for labels, lost in self._registry.drop(number).items():
            self._recorder.count(metrics.REQUESTS, (*labels, "", Outcome.PROXY_ERROR.value), lost)
        return status

    async def _follow(self, number: int, reports: Reports) -> None:
        """Keeps what a worker reports, until it reports no more."""
        async for report in reports:
            self._reports[number] = reports
            if self.finishing:
                # What a state is now, those say who have the configuration that is in use.
                report.states.clear()
            self._add(number, report)

    def _add(self, number: int, report: Report) -> None:
        self._registry.add(number, report)
        accepts = bool(self._registry.gauge(number, metrics.WORKERS))
        if accepts != (number in self.ready):
            (self.ready.add if accepts else self.ready.discard)(number)
            self._changed()

    async def _watch(self, number: int, process: asyncio.subprocess.Process, reports: Reports) -> None:
        """Notices when a worker says nothing, and kills it when it goes on so.

        What is counted are turns of this process in which it heard nothing, not time: while the whole machine sleeps,
        or this process stands still, nobody is at fault.
        """
        silent = 0
        patience = ceil(max(1.0, self.config.limits.lag or 0.0))
        killed_after = _KILLED_AFTER * patience
        while True:
            heard = reports.number
            await asyncio.sleep(_ASKED_EVERY)
            if reports.number != heard:
                silent = 0
                continue
            reports.ask()
            silent += 1
            if silent == _UNREADY_AFTER * patience and number in self.ready:
                log.warning("the worker %d has said nothing for %d s: it is not ready", process.pid, silent)
                # What it said last does not hold; it is ready again when it says so.
                self._add(number, Report([], [(metrics.WORKERS.name, (), 0)], [], []))
            if silent == (killed_after if reports.number else max(killed_after, _STARTED_AFTER)):
                log.error("the worker %d has said nothing for %d s: it is killed", process.pid, silent)
                with suppress(ProcessLookupError):
                    process.kill()
