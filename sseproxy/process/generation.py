"""A generation: the workers of one configuration. They start together and stop together.

A worker that ends without having been told to is replaced: immediately if it has lived for 10 seconds, otherwise after
a delay, which grows if its successors end early as well. Its exchanges are counted as lost. A worker that does not
answer requests for a report is killed, and so replaced: it hangs, and so do its clients.

After an upgrade there are also workers of the previous version, `Predecessors`. They understand the same signals, but
their reports are not read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import ceil
from time import perf_counter

from ..config import Config, Limits
from ..errors import Outcome
from ..ledger.table import Ledger
from ..observe import metrics
from ..observe.live import View
from ..observe.metrics import Labels, Recorder, Report
from ..observe.registry import Registry, of_process
from ..observe.telemetry import Reports
from ..relay.admission import connections_within
from .forkserver import Process
from .worker import Instructions

log = logging.getLogger(__name__)

# A worker that lived this long was not part of a crash loop.
_HEALTHY_AFTER = 10.0
_BACKOFF_MIN, _BACKOFF_MAX = 0.1, 10.0
# Seconds without a report after which a worker is asked for one.
_REPORT_REQUEST_INTERVAL = 1.0
# So many unanswered requests in a row until a worker is treated as not ready, and until it is killed. This holds if
# `limits.lag` is at most a second; for a larger lag the numbers are multiplied (`_lag_factor`). One turn of a worker's
# loop takes milliseconds; in an overloaded worker it takes as long as `limits.lag` allows. A kill cuts streams, so it
# is only for workers that will not recover. gunicorn waits 30 seconds.
_UNREADY_AFTER, _KILLED_AFTER = 5, 20
# The same for a worker that has not reported yet. It may have certificates and keys to load.
_STARTED_AFTER = 60
# File descriptors that a worker needs besides its connections.
_DESCRIPTORS_OF_ITS_OWN = 50


def cores() -> int:
    """How many cores this process may use: its affinity, limited by the CPU quota of its control group, rounded up."""
    available = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return max(1, min(available, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return available


def connections_of_a_worker(config: Config, workers: int) -> int:
    """How many client connections each of `workers` can have with its descriptors, at most `limits.connections`."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = config.limits.connections
    if most == resource.RLIM_INFINITY:
        return wanted
    possible = max(1, connections_within(most - _DESCRIPTORS_OF_ITS_OWN))
    # The default is no promise, so fewer are no warning.
    if workers * possible < wanted and wanted != Limits().connections:
        log.warning(
            "there can be %d connections instead of %d: each worker may have %d descriptors (ulimit -n)",
            workers * possible,
            wanted,
            most,
        )
    return min(possible, wanted)


def _lag_factor(config: Config) -> int:
    """The factor by which the waiting times for a worker's report grow with `limits.lag`; 1 for up to a second."""
    return ceil(max(1.0, config.limits.lag or 0.0))


class _Workers:
    """Controls workers by signals. No method waits until the workers have reacted."""

    finishing = False
    """Whether newer workers have taken over, and these only finish their exchanges."""
    ready: set[int]
    """The workers that accept."""
    _rows: dict[int, int]

    def ready_rows(self) -> list[int]:
        """The rows in the ledger of the workers that accept."""
        return [self._rows[worker] for worker in self.ready if worker in self._rows]

    def _signal(self, number: signal.Signals) -> None:
        raise NotImplementedError

    def retire(self) -> None:
        """Stops accepting. Exchanges may go on for `reload.drain_timeout`."""
        self.finishing = True
        self._signal(signal.SIGHUP)

    def expire(self) -> None:
        """Stops accepting, and ends all exchanges."""
        self._signal(signal.SIGINT)

    def drain(self) -> None:
        """Stops accepting. Exchanges may go on for `drain_timeout`."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)


class Generation(_Workers):
    """The workers of `config`. They accept on `sockets` until `retire`, `expire`, `drain` or `kill` is called.

    `numbers` gives each worker a number that is unique among all generations; the registry and the `view` of what is
    under way use it. Each worker has a row in `ledger`, and `columns` are the columns that it uses. `changed` is called
    when a worker becomes ready or has ended. `fork` starts a worker that has descriptors; it raises `OSError`.
    """

    def __init__(
        self,
        config: Config,
        sockets: Sequence[socket.socket],
        numbers: Iterator[int],
        ledger: Ledger,
        columns: dict[str, int],
        registry: Registry,
        view: View,
        recorder: Recorder,
        changed: Callable[[], None],
        fork: Callable[[Sequence[int]], Awaitable[Process]],
    ) -> None:
        self.config = config
        self.size = cores() if config.workers == "auto" else config.workers
        self.ready: set[int] = set()
        """The numbers of the workers that accept."""
        self.last_exit = ""
        """How the last worker ended that was not told to end, in words. Empty if there was none."""
        self._sockets = sockets
        self._numbers = numbers
        self._ledger = ledger
        self._columns = columns
        self._most_connections = 0
        self._rows: dict[int, int] = {}
        self._registry = registry
        self._view = view
        self._recorder = recorder
        self._changed = changed
        self._fork = fork
        self._processes: dict[int, Process] = {}
        # The label of each worker, 1 to `size`, and how much of its CPU time the metrics have already.
        self._labels: dict[int, tuple[str, float]] = {}
        self._channels: dict[int, socket.socket] = {}
        self._spawning = 0
        # The reports of each worker that has reported. A worker reports for the first time when it accepts.
        self._reports: dict[int, Reports] = {}
        self._keepers: list[asyncio.Task[None]] = []
        # The last signal that was sent to all workers. Workers that were just being started get it, too.
        self._last_signal: signal.Signals | None = None
        self._closing = asyncio.Event()

    def start(self) -> None:
        """Starts the workers. Returns before they accept: see `ready` and `complete`."""
        self._most_connections = connections_of_a_worker(self.config, self.size)
        loop = asyncio.get_running_loop()
        self._keepers = [loop.create_task(self._keep_worker(str(label))) for label in range(1, self.size + 1)]

    def complete(self) -> bool:
        """Whether every worker accepts."""
        return len(self.ready) == self.size

    def missing(self) -> str:
        """An error text: how many workers do not accept, and how the last one ended."""
        why = f": one {self.last_exit}" if self.last_exit else ""
        return f"{self.size - len(self.ready)} of {self.size} new workers did not start to accept connections{why}"

    def _signal(self, number: signal.Signals) -> None:
        self._last_signal = number
        self._closing.set()
        for process in self._processes.values():
            process.send_signal(number)

    def give_up(self) -> None:
        """Kills the workers that do not accept. The others stop accepting, and finish the exchanges that they have."""
        for number, process in self._processes.items():
            if number not in self.ready:
                process.send_signal(signal.SIGKILL)
        self.retire()

    def settled(self) -> bool:
        """Whether every worker process has reported, so none is being started and none has just ended."""
        return not self._spawning and self._processes.keys() == self._reports.keys()

    def channels(self) -> list[tuple[int, int]]:
        """Of each worker, the process id and the descriptor of its channel, or -1 if the channel is closed."""
        return [(process.pid, self._channels[number].fileno()) for number, process in self._processes.items()]

    @property
    def names(self) -> set[str]:
        """The names in the ledger that its workers count under."""
        return set(self._columns)

    def rows(self) -> dict[int, int]:
        """The row of each worker in the ledger, by its process id."""
        return {process.pid: self._rows[number] for number, process in self._processes.items()}

    async def report(self) -> None:
        """Asks all workers for a report, and waits until the registry has all of them.

        First it reads what CPU, memory and descriptors each of them uses.
        """
        for number, process in self._processes.items():
            label, used = self._labels[number]
            seen = of_process(process.pid)
            self._labels[number] = label, max(used, seen.cpu_seconds)
            gauges: list[tuple[str, Labels, float]] = [
                (metrics.WORKER_MEMORY.name, (label,), seen.resident_bytes),
                (metrics.WORKER_FDS.name, (label,), seen.open_fds),
                (metrics.WORKER_MAX_FDS.name, (label,), seen.max_fds),
            ]
            cpu = (metrics.WORKER_CPU.name, (label,), max(0.0, seen.cpu_seconds - used))
            self._registry.add(number, Report([cpu], gauges, [], []))
        await asyncio.gather(*(reports.latest() for reports in self._reports.values()))

    async def look(self) -> None:
        """Asks all workers what they have under way, and waits until the view has all of it."""
        await asyncio.gather(*(reports.looked() for reports in self._reports.values()))

    def cancel(self, number: int, id: str) -> None:
        """Cancels the exchange of worker `number` that has this id in the view, if it is one of these workers."""
        if number in self._reports:
            self._reports[number].cancel(id)

    async def ended(self) -> None:
        """Waits until every worker has ended. Call `drain`, `retire`, `expire` or `kill` first."""
        await asyncio.wait(self._keepers)

    async def _keep_worker(self, label: str) -> None:
        """Runs the worker with this `label`, and replaces it when it ends, until the generation is closed."""
        backoff = 0.0
        while not self._closing.is_set():
            started = perf_counter()
            try:
                status = await self._run_worker(label)
            except OSError as error:
                # No descriptors, processes or memory are left now, but there may be some later.
                status, why = None, f"could not be started: {error}"
            else:
                why = f"ended with status {status}"
            if self._closing.is_set():
                # Now it may be settled.
                self._changed()
                return
            lived = perf_counter() - started
            backoff = 0.0 if lived >= _HEALTHY_AFTER else min(max(2 * backoff, _BACKOFF_MIN), _BACKOFF_MAX)
            if status is None:
                log.error("a worker %s; the next attempt is in %.1fs", why, backoff)
            else:
                self._recorder.count(metrics.RESTARTS, ())
                log.error("a worker %s after %.1fs; the next starts in %.1fs", why, lived, backoff)
            self.last_exit = why
            self._changed()
            try:
                await asyncio.wait_for(self._closing.wait(), backoff)
            except TimeoutError:
                continue

    async def _run_worker(self, label: str) -> int:
        """Runs one worker until it ends, and returns its exit status. Raises `OSError` if it cannot be started."""
        row = self._ledger.take_row()
        try:
            return await self._run_worker_on(row, label)
        finally:
            self._ledger.free_row(row)

    async def _run_worker_on(self, row: int, label: str) -> int:
        ours, theirs = socket.socketpair()
        number = next(self._numbers)
        fds = [theirs.fileno(), self._ledger.fd, *(sock.fileno() for sock in self._sockets)]
        self._spawning += 1
        with theirs:
            try:
                process = await self._fork(fds)
            except OSError:
                ours.close()
                raise
            finally:
                self._spawning -= 1
        self._processes[number] = process
        self._labels[number] = label, 0.0
        self._channels[number] = ours
        self._rows[number] = row
        if self._last_signal is not None:
            process.send_signal(self._last_signal)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        writer.write(Instructions(self.config, row, self._columns, self._most_connections).encoded())

        def ask(question: bytes) -> None:
            # A worker that has closed its end cannot answer. It may still hang, so `_watch` goes on.
            if not writer.transport.is_closing():
                writer.write(question)

        reports = Reports(reader, ask, partial(self._view.add, number))
        watch = asyncio.get_running_loop().create_task(self._watch(number, process, reports))
        try:
            await self._follow(number, reports)
        except Exception:
            # Whatever a broken worker sends: it is replaced, and the others go on.
            log.exception("a worker sent a report that cannot be decoded: the worker is killed")
            process.send_signal(signal.SIGKILL)
        self.ready.discard(number)
        self._reports.pop(number, None)
        status = await process.wait()
        watch.cancel()
        writer.close()
        del self._processes[number], self._labels[number], self._channels[number], self._rows[number]
        self._changed()
        self._view.drop(number)
        for labels, lost in self._registry.drop(number).items():
            # Neither its model nor its status is known here.
            self._recorder.count(metrics.REQUESTS, (*labels, "", "", Outcome.PROXY_ERROR.value), lost)
        return status

    async def _follow(self, number: int, reports: Reports) -> None:
        """Adds a worker's reports to the registry, until the worker closes its channel."""
        async for report in reports:
            self._reports[number] = reports
            if self.finishing:
                # Only workers of the current configuration report the current state of upstreams.
                report.states.clear()
            self._add(number, report)

    def _add(self, number: int, report: Report) -> None:
        self._registry.add(number, report)
        accepts = bool(self._registry.gauge(number, metrics.WORKERS))
        if accepts != (number in self.ready):
            (self.ready.add if accepts else self.ready.discard)(number)
            self._changed()

    async def _watch(self, number: int, process: Process, reports: Reports) -> None:
        """Notices when a worker sends no reports. If it does not recover, kills it.

        This counts intervals in which this process ran and received nothing, and not the time. So a worker is not
        blamed for a time in which the whole machine, or this process, was suspended.
        """
        silent = 0
        factor = _lag_factor(self.config)
        killed_after = _KILLED_AFTER * factor
        while True:
            heard = reports.number
            await asyncio.sleep(_REPORT_REQUEST_INTERVAL)
            if reports.number != heard:
                silent = 0
                continue
            reports.ask()
            silent += 1
            if silent == _UNREADY_AFTER * factor and number in self.ready:
                log.warning("worker %d has sent no report for %d s: it is treated as not ready", process.pid, silent)
                # Its last report says that it accepts. It becomes ready again with its next report.
                self._add(number, Report([], [(metrics.WORKERS.name, (), 0)], [], []))
            if silent == (killed_after if reports.number else max(killed_after, _STARTED_AFTER)):
                log.error("worker %d has sent no report for %d s: it is killed", process.pid, silent)
                process.send_signal(signal.SIGKILL)


class Predecessors(_Workers):
    """Workers of one configuration that the previous version has started. They are not replaced when they end.

    `workers` has their process ids and the descriptors of their channels, or -1. `rows` has their rows in `ledger` by
    process id, if that is known. Their reports are dropped, because another version wrote them. But a worker that does
    not answer requests for a report is killed.
    """

    def __init__(
        self,
        workers: Sequence[tuple[int, int]],
        config: Config,
        ledger: Ledger,
        rows: Mapping[int, int],
        recorder: Recorder,
        changed: Callable[[], None],
    ) -> None:
        self.ready = {pid for pid, _ in workers}
        """The process ids of the workers that may still accept."""
        self._channels = dict(workers)
        self._processes = {pid: Process(pid) for pid, _ in workers}
        self._ledger = ledger
        self._rows = {pid: rows[pid] for pid, _ in workers if pid in rows}
        self.names = ledger.names if self._rows else set()
        """The names in the ledger that they may count under."""
        self._killed_after = _KILLED_AFTER * _lag_factor(config)
        self._recorder = recorder
        self._changed = changed
        self._keepers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Starts to read their channels."""
        self._recorder.move(metrics.WORKERS, (), len(self._channels))
        self._keepers = [
            asyncio.get_running_loop().create_task(self._follow(pid, fd)) for pid, fd in self._channels.items()
        ]

    def settled(self) -> bool:
        return True

    def channels(self) -> list[tuple[int, int]]:
        return [*self._channels.items()]

    def rows(self) -> dict[int, int]:
        return self._rows

    def retire(self) -> None:
        self._recorder.move(metrics.WORKERS, (), -len(self._channels))
        self._recorder.move(metrics.WORKERS_FINISHING, (), len(self._channels))
        super().retire()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            process.send_signal(number)

    async def report(self) -> None:
        """Returns immediately: their numbers are not in the registry."""

    async def look(self) -> None:
        """Returns immediately: what they have under way is not in the view."""

    def cancel(self, number: int, id: str) -> None:
        """Does nothing, for the same reason."""

    async def ended(self) -> None:
        await asyncio.wait(self._keepers)

    async def _follow(self, pid: int, fd: int) -> None:
        if fd >= 0:
            await self._until_closed(pid, fd)
        status = await self._processes[pid].wait()
        del self._channels[pid], self._processes[pid]
        if pid in self._rows:
            self._ledger.free_row(self._rows.pop(pid))
        self.ready.discard(pid)
        self._recorder.move(metrics.WORKERS_FINISHING if self.finishing else metrics.WORKERS, (), -1)
        self._changed()
        if status:
            log.error("a worker of the previous version ended with status %d", status)

    async def _until_closed(self, pid: int, fd: int) -> None:
        """Waits until a worker closes its channel. Kills it if it hangs, as `Generation._watch` does."""
        reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=fd))
        silent = 0
        with suppress(ConnectionError):
            while True:
                try:
                    async with asyncio.timeout(_REPORT_REQUEST_INTERVAL):
                        if not await reader.read(65536):
                            break
                except TimeoutError:
                    silent += 1
                    if not writer.transport.is_closing():
                        writer.write(b"?")
                    if silent == self._killed_after:
                        log.error("worker %d has sent no report for %d s: it is killed", pid, silent)
                        os.kill(pid, signal.SIGKILL)
                    continue
                silent = 0
                if self.finishing:
                    # It has run since it received the signal to retire, so it has stopped accepting.
                    self.ready.discard(pid)
                    self._changed()
        # -1 tells the next version that the channel is closed, should there be another upgrade.
        self._channels[pid] = -1
        writer.close()
