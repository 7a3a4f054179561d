"""A generation: the workers of one configuration, started together, replaced when they end unasked, retired together.

A worker that ends unasked is replaced, at once the first time, later and later if its successors end early as well.
What it had under way counts as lost. One that says nothing, although it was asked, is ended so that it is replaced: it
stands still, and so do the clients that it has accepted.

After an upgrade there are workers of the earlier code as well: `Predecessors`. Only their signals are known.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from math import ceil
from time import perf_counter

from ..config import Config
from ..errors import Outcome, ReloadError
from ..observe import metrics
from ..observe.metrics import Labels, Recorder, Report
from ..observe.registry import Registry, of_process
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


def _patience(config: Config) -> int:
    """By how much a worker is given more time than where little lag is allowed."""
    return ceil(max(1.0, config.limits.lag or 0.0))


class _Workers:
    """What workers are told, by signals. Nothing here waits until they have heard it."""

    finishing = False
    """Others have taken over."""

    def _tell(self, number: signal.Signals) -> None:
        raise NotImplementedError

    def retire(self) -> None:
        """No more accepting; exchanges go on as `reload.drain_timeout` has it."""
        self.finishing = True
        self._tell(signal.SIGHUP)

    def expire(self) -> None:
        """No more accepting; exchanges are ended."""
        self._tell(signal.SIGINT)

    def drain(self) -> None:
        """No more accepting; exchanges go on as `drain_timeout` has it."""
        self._tell(signal.SIGTERM)

    def kill(self) -> None:
        self._tell(signal.SIGKILL)


class Generation(_Workers):
    """The workers of `config`, which accept on `sockets` until they are told otherwise.

    `numbers` tells the workers of all generations apart in the registry; `changed` is called when one is ready, or
    has ended. Before one is replaced, `same_code` raises `ReloadError` if the code on disk is not the one that runs.
    """

    def __init__(
        self,
        config: Config,
        sockets: Sequence[socket.socket],
        numbers: Iterator[int],
        registry: Registry,
        recorder: Recorder,
        changed: Callable[[], None],
        same_code: Callable[[], Awaitable[None]],
    ) -> None:
        self.config = config
        self.size = cores() if config.workers == "auto" else config.workers
        self.ready: set[int] = set()
        """The workers that accept, by their numbers."""
        self.last_exit = ""
        """How the latest worker ended that did so unasked."""
        self._of_a_worker = config.share(self.size)
        self._sockets = sockets
        self._numbers = numbers
        self._registry = registry
        self._recorder = recorder
        self._changed = changed
        self._same_code = same_code
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        # Which of the workers each is, as its label says, and the CPU time that was counted of it.
        self._places: dict[int, tuple[str, float]] = {}
        self._channels: dict[int, socket.socket] = {}
        self._spawning = 0
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
        self._keepers = [loop.create_task(self._keep_worker(str(place))) for place in range(1, self.size + 1)]

    def complete(self) -> bool:
        """Whether every worker accepts."""
        return len(self.ready) == self.size

    def missing(self) -> str:
        """Who does not accept, and what is known of why."""
        why = f": one {self.last_exit}" if self.last_exit else ""
        return f"{self.size - len(self.ready)} of {self.size} new workers did not come to accept connections{why}"

    def _tell(self, number: signal.Signals) -> None:
        self._told = number
        self._closing.set()
        for process in self._processes.values():
            # One that has just ended is still among them.
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def settled(self) -> bool:
        """Whether no worker is being started, nor has ended without its supervisor having heard so."""
        return not self._spawning and self._processes.keys() == self._reports.keys()

    def channels(self) -> list[tuple[int, int]]:
        """The process id of each worker, and the descriptor of its channel, or -1 if that is closed."""
        return [(process.pid, self._channels[number].fileno()) for number, process in self._processes.items()]

    async def report(self) -> None:
        """Waits until the registry has what each worker knows now, after what the system knows of each."""
        for number, process in self._processes.items():
            place, used = self._places[number]
            seen = of_process(process.pid)
            self._places[number] = place, max(used, seen.cpu_seconds)
            gauges: list[tuple[str, Labels, float]] = [
                (metrics.WORKER_MEMORY.name, (place,), seen.resident_bytes),
                (metrics.WORKER_FDS.name, (place,), seen.open_fds),
                (metrics.WORKER_MAX_FDS.name, (place,), seen.max_fds),
            ]
            cpu = (metrics.WORKER_CPU.name, (place,), max(0.0, seen.cpu_seconds - used))
            self._registry.add(number, Report([cpu], gauges, [], []))
        await asyncio.gather(*(reports.latest() for reports in self._reports.values()))

    async def ended(self) -> None:
        """Waits until every worker has ended, after they were told to."""
        await asyncio.wait(self._keepers)

    async def _keep_worker(self, place: str) -> None:
        """Keeps one worker running in `place`."""
        backoff = 0.0
        replaces = False
        while not self._closing.is_set():
            started = perf_counter()
            try:
                if replaces:
                    await self._same_code()
                last_exit = f"ended with status {await self._run_worker(place)}"
                ended = True
            except (OSError, ReloadError) as error:
                # Out of descriptors, processes or memory; there may be some again. Or the code on disk is another.
                last_exit, ended = f"could not be started ({error})", False
            replaces = True
            if self._closing.is_set():
                return
            if ended:
                self._recorder.count(metrics.RESTARTS, ())
            lived = perf_counter() - started
            backoff = 0.0 if lived >= _HEALTHY_AFTER else min(max(2 * backoff, _BACKOFF_MIN), _BACKOFF_MAX)
            log.error("a worker %s after %.1fs; the next starts in %.1fs", last_exit, lived, backoff)
            self.last_exit = last_exit
            self._changed()
            try:
                await asyncio.wait_for(self._closing.wait(), backoff)
            except TimeoutError:
                continue

    async def _run_worker(self, place: str) -> int:
        """Runs one worker to its end; returns its exit status. Raises `OSError` if there is no starting one."""
        ours, theirs = socket.socketpair()
        number = next(self._numbers)
        fds = [theirs.fileno(), *(sock.fileno() for sock in self._sockets)]
        self._spawning += 1
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
            finally:
                self._spawning -= 1
        self._processes[number] = process
        self._places[number] = place, 0.0
        self._channels[number] = ours
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
            # As it is where the package on disk has become another one while the worker was started.
            log.exception("a worker says what this version does not understand: it is killed")
            process.kill()
        self.ready.discard(number)
        self._reports.pop(number, None)
        status = await process.wait()
        watch.cancel()
        writer.close()
        del self._processes[number], self._places[number], self._channels[number]
        self._changed()
        for labels, lost in self._registry.drop(number).items():
            # Neither its model nor its status is known here.
            self._recorder.count(metrics.REQUESTS, (*labels, "", "", Outcome.PROXY_ERROR.value), lost)
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
        patience = _patience(self.config)
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


class Predecessors(_Workers):
    """Workers of one configuration that the code before an upgrade has started. They are not replaced when they end.

    `workers` are their process ids, and the descriptors of their channels, or -1. What they report is thrown away,
    because it is of another version; but one that reports nothing, although it was asked, is killed.
    """

    def __init__(
        self, workers: Sequence[tuple[int, int]], config: Config, recorder: Recorder, changed: Callable[[], None]
    ) -> None:
        self.ready = {pid for pid, _ in workers}
        """Those that may still accept."""
        self._channels = dict(workers)
        self._killed_after = _KILLED_AFTER * _patience(config)
        self._recorder = recorder
        self._changed = changed
        self._keepers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Listens to them."""
        self._recorder.move(metrics.WORKERS, (), len(self._channels))
        self._keepers = [
            asyncio.get_running_loop().create_task(self._follow(pid, fd)) for pid, fd in self._channels.items()
        ]

    def settled(self) -> bool:
        return True

    def channels(self) -> list[tuple[int, int]]:
        return [*self._channels.items()]

    def retire(self) -> None:
        self._recorder.move(metrics.WORKERS, (), -len(self._channels))
        self._recorder.move(metrics.WORKERS_FINISHING, (), len(self._channels))
        super().retire()

    def _tell(self, number: signal.Signals) -> None:
        # None has been waited for, so its id is still its own.
        for pid in self._channels:
            os.kill(pid, number)

    async def report(self) -> None:
        """Waits for nothing: they are not counted."""

    async def ended(self) -> None:
        await asyncio.wait(self._keepers)

    async def _follow(self, pid: int, fd: int) -> None:
        if fd >= 0:
            await self._until_closed(pid, fd)
        # The process id is its own until it is taken from here as well.
        await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._forget(pid)

    def _forget(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        del self._channels[pid]
        self.ready.discard(pid)
        self._recorder.move(metrics.WORKERS_FINISHING if self.finishing else metrics.WORKERS, (), -1)
        self._changed()
        if status:
            log.error("a worker of the earlier code ended with status %d", os.waitstatus_to_exitcode(status))

    async def _until_closed(self, pid: int, fd: int) -> None:
        """Waits until a worker closes its channel. As in `Generation`, turns are counted in which it says nothing."""
        reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=fd))
        silent = 0
        with suppress(ConnectionError):
            while True:
                try:
                    async with asyncio.timeout(_ASKED_EVERY):
                        if not await reader.read(65536):
                            break
                except TimeoutError:
                    silent += 1
                    if not writer.transport.is_closing():
                        writer.write(b"?")
                    if silent == self._killed_after:
                        log.error("the worker %d has said nothing for %d s: it is killed", pid, silent)
                        os.kill(pid, signal.SIGKILL)
                    continue
                silent = 0
                if self.finishing:
                    # It has had its turn since it was told to stop accepting.
                    self.ready.discard(pid)
                    self._changed()
        # Should it be handed over once more.
        self._channels[pid] = -1
        writer.close()
