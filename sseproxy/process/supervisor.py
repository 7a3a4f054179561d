"""The supervisor: owns the sockets, the registry and the admin listener; starts, reloads and drains generations.

It never handles client traffic. A reload starts workers with the new configuration on the same sockets. Only when all
of them accept connections, the old workers stop accepting and finish their exchanges. So no connection is refused, and
no stream is cut. An upgrade is a reload with new code: this process tries the new code, and then executes it in its own
place (`upgrade`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import platform
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import takewhile
from typing import TypeVar

import aiohttp
from aiohttp import web
from msgspec.structs import replace

from .. import __version__, signals

# `mistakes` is not used here. It is imported now so that no reload imports it from code that was installed later.
from ..config import Address, Config, Listen, mistakes  # noqa: F401
from ..config.files import digest
from ..errors import ListenError, Outcome, ReloadError, SseproxyError
from ..ledger.table import Ledger
from ..observe import metrics
from ..observe.live import View
from ..observe.logs import log_as
from ..observe.metrics import Recorder, Report
from ..observe.registry import Registry
from ..relay.heads import check_parser
from ..relay.routes import unreachable
from . import configured, notify, upgrade
from .admin import application
from .forkserver import ForkServer, ForkServerGone, Process, forget_orphans
from .generation import Generation, Predecessors, cores
from .health import Health
from .listeners import Sockets, clean_up, close, close_and_remove, flat, listen, refuse, url, without
from .live import Live
from .upgrade import Handover, RunningCode
from .worker import counted_by_a_worker

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds that a draining worker may take after the drain timeout, before it is killed.
_DRAIN_GRACE = 5.0
_ENDING = "the proxy is shutting down"
_UPGRADING = "the proxy is being upgraded; the new version reads the configuration when it starts"
# The number under which the registry has the limits. It is not the supervisor's own, 0, so that they can be dropped
# when the configuration changes.
_CONFIGURATION = -1
# The same for what is known of endpoints.
_FLEET = -2
# Seconds that a reload waits for the old workers to stop accepting. They need one turn of their loops.
_TAKE_OVER_TIMEOUT = 5.0
# Seconds that a start or a reload waits until the workers accept, plus one second for each worker. An upgrade waits
# until no worker is being started, without the additional seconds.
_START_TIMEOUT = 30.0
# Turns of the loop until the handlers of signals that have arrived have run. In uvloop, one turn ends with a look at
# what has arrived, and the next one calls the handlers. The first and the last one may be parts of a turn.
_TURNS_FOR_SIGNALS = 4
# Rows of the ledger, for the workers of all generations. A row that is not used takes no memory.
_ROWS, _ROWS_PER_CORE = 256, 8
# Seconds that a scrape waits for the reports of workers. A worker that is not overloaded takes a millisecond.
_REPORT_TIMEOUT = 1.0


class Supervisor:
    """The parent of the workers. Call `bind`, `start` and `run`, in this order.

    `fork_server` starts workers. `reread` reads the configuration again. `path` is its file, or None if it does not
    come from a file. `command` is the command line that runs the installed code; without it there are no upgrades.
    `handover` is what the previous version has left, if this process is the result of an upgrade.
    """

    def __init__(
        self,
        config: Config,
        fork_server: ForkServer,
        reread: Callable[[], Config] | None = None,
        path: str | None = None,
        command: Sequence[str] = (),
        handover: Handover | None = None,
    ) -> None:
        self.config = config
        self._fork_server = fork_server
        # Whether this was noticed since a generation was started: no more workers can come.
        self._fork_server_ended = False
        self._reread = reread or (lambda: config)
        self._path = path
        self._command = command
        self._code = RunningCode()
        self._handover = handover
        self._sockets: Sockets = {}
        self._admin_sockets: Sockets = {}
        self._view = View()
        live = Live(self._view, self._look, self._cancel, lambda: self.config.admin)
        served = application(self.registry, self._unready, self.reload, lambda: self.config.admin, live)
        self._admin = web.AppRunner(served, access_log=None, shutdown_timeout=_REPORT_TIMEOUT)
        self._admin_sites: dict[socket.socket, web.SockSite] = {}
        # Where this process has listened, also for a reload that has not ended.
        self._addresses: set[Listen] = set()
        # Sockets that the previous version listened on and this configuration does not, for clients and for admin.
        self._unused: tuple[Sockets, Sockets] = {}, {}
        self._recorder = Recorder()
        self._registry = Registry()
        self._ledger: Ledger
        self._health: Health
        self._numbers = itertools.count(1)
        self._generation: Generation | None = None
        # All generations that still have a worker, the oldest first. `_generation` is the current one.
        self._generations: list[Generation | Predecessors] = []
        self._reloading = asyncio.Lock()
        # A reload that has been requested and has not begun. All who request one meanwhile share it.
        self._next_reload: asyncio.Task[None] | None = None
        self._upgrading: asyncio.Task[None] | None = None
        # Digests of the configuration's files when they were last read.
        self._digests: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.stopping = asyncio.Event()
        """Set when a signal or `close` has asked this process to end."""
        self._forced: signal.Signals | None = None

    @property
    def urls(self) -> list[str]:
        """Where clients connect. Call `bind` first."""
        scheme = "https" if self.config.tls is not None else "http"
        return [url(sock, scheme) for sockets in self._sockets.values() for sock in sockets]

    @property
    def admin_url(self) -> str:
        ((sock, *_),) = self._admin_sockets.values()
        return url(sock)

    @property
    def workers(self) -> int:
        """How many workers the current configuration has."""
        assert self._generation is not None
        return self._generation.size

    def bind(self) -> None:
        """Binds all listeners. Raises `ListenError`, after closing what it had bound, or `ParserError`."""
        check_parser()
        if self._handover is not None:
            self._sockets = upgrade.opened(self._handover.clients)
            self._admin_sockets = upgrade.opened(self._handover.admin)
        clients, admin = self._bound(self.config)
        self._unused = without(self._sockets, clients), without(self._admin_sockets, admin)
        self._addresses |= self._sockets.keys() | self._admin_sockets.keys()
        self._sockets, self._admin_sockets = clients, admin

    def _bound(self, config: Config) -> tuple[Sockets, Sockets]:
        """The sockets of `config`, for clients and for admin. Sockets that are open already are used again."""
        clients, admin = Sockets(), Sockets()
        try:
            for option, addresses, known, wanted in (
                ("listen", config.listen, self._sockets, clients),
                ("admin.listen", (config.admin.listen,), self._admin_sockets, admin),
            ):
                for address in addresses:
                    wanted[address] = known[address] if address in known else listen(option, address)
                    self._addresses.add(address)
        except ListenError:
            close_and_remove(without(clients, self._sockets))
            raise
        return clients, admin

    async def start(self) -> None:
        """Starts the admin listener and the workers, and returns when every worker accepts.

        If some do not in time, it goes on with those that do, or with those of the previous version. If there are none
        because the fork server has ended, an upgrade follows. Otherwise it raises `SseproxyError`.
        """
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(initializer=signals.hold_back))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._begin(self._reload_unattended()))
        if self._command:
            loop.add_signal_handler(signal.SIGUSR2, self.upgrade)
        signals.let_through()
        self._recorder.set(metrics.BUILD_INFO, (__version__, platform.python_version(), aiohttp.__version__), 1)
        # Counters start at 0, so that the first event is an increase that an alert can see.
        self._recorder.count(metrics.RESTARTS, (), 0)
        for result in ("success", "failure"):
            self._recorder.count(metrics.RELOADS, (result,), 0)
        rows = self._open_ledger()
        self._health = Health(self._ledger, self._recorder, self._ready_rows)
        for workers in self._handover.workers if self._handover is not None else ():
            predecessors = Predecessors(workers, self.config, self._ledger, rows, self._recorder, self._changed.set)
            self._generations.append(predecessors)
            predecessors.start()
        await self._admin.setup()
        await self._administer(self._admin_sockets)
        async with self._reloading:
            self._digests = await asyncio.to_thread(self._read_digests)
            columns = self._columns(self.config)
            await self._health.prepare(self.config, columns)
            self._health.follow(self.config, columns)
            generation = self._generation = self._generate(self.config, self._sockets, columns)
            if not await self._wait_for_start(generation, lambda: False):
                if generation.ready:
                    go_on = "the other workers serve"
                elif self._unready() is None:
                    go_on = "the workers of the previous version continue"
                elif self._fork_server_ended and self._command:
                    go_on = "an upgrade starts a new fork server"
                else:
                    self._kill()
                    await self.close()
                    raise SseproxyError(f"no worker accepts connections: {generation.missing()}")
                log.error("%s; %s", generation.missing(), go_on)
            self._loaded()
        if self._handover is not None:
            succeeding = self._begin(self._take_over_from_predecessors(self._handover.version))
            if generation.ready:
                await asyncio.wait((succeeding,))
        if self._unready() is None:
            notify.ready(_counted(self.workers, "worker"))

    def _open_ledger(self) -> dict[int, int]:
        """Opens the ledger that the previous version has handed over, or creates one.

        Returns the rows of the workers of the previous version, by process id.
        """
        if self._handover is not None and self._handover.ledger >= 0:
            rows = self._handover.rows
            try:
                self._ledger = Ledger.left(self._handover.ledger, rows.values())
                return rows
            except ValueError:
                os.close(self._handover.ledger)
                log.warning("limits do not include the requests that workers of the previous version still have")
        self._ledger = Ledger(max(_ROWS, _ROWS_PER_CORE * cores()))
        return {}

    async def _take_over_from_predecessors(self, version: str) -> None:
        """Waits until one worker of this version accepts. Then the workers of the previous version finish."""
        await self._until(lambda: self._generation is not None and bool(self._generation.ready))
        await self._take_over(*self._unused)
        log.info("upgraded from version %s to %s: %s", version, __version__, _counted(self.workers, "worker"))
        await self._end_oldest()

    async def run(self) -> int:
        """Runs until a signal ends it. Returns the exit status."""
        await self.stopping.wait()
        log.info("draining for at most %gs; a second signal kills the workers immediately", self.config.drain_timeout)
        began, cut_before = time.perf_counter(), self._cut_off()
        unknown = any(isinstance(generation, Predecessors) for generation in self._generations)
        await self.close()
        cut = self._cut_off() - cut_before
        log.log(
            logging.WARNING if cut else logging.INFO,
            "draining ended after %.1fs; %s cut off%s",
            time.perf_counter() - began,
            {0: "no request was", 1: "1 request was"}.get(cut, f"{cut} requests were"),
            ", not counting those of workers of the previous version" if unknown else "",
        )
        return 128 + self._forced if self._forced is not None else 0

    async def reload(self) -> None:
        """Reads the configuration again, and replaces the workers.

        Requests during a reload share one more reload, because the current one may have read the files before they
        changed. Raises `SseproxyError` if the reload fails. Then everything stays as it was, but new workers that have
        requests finish them.
        """
        if self._next_reload is None:
            self._next_reload = self._begin(self._reload_once())
        reloading = self._next_reload
        # `wait` does not cancel the reload when this call is cancelled: others may be waiting for it.
        await asyncio.wait((reloading,))
        if reloading.cancelled():
            raise ReloadError(_ENDING if self.stopping.is_set() else _UPGRADING)
        await reloading

    async def _reload_once(self) -> None:
        async with self._reloading:
            self._next_reload = None
            notify.reloading()
            try:
                await self._replace()
            except SseproxyError as error:
                self._refused("reloaded", error)
                raise
            finally:
                notify.ready(_counted(self.workers, "worker"))
            self._recorder.count(metrics.RELOADS, ("success",))
            earlier = len(self._earlier())
            log.info(
                "configuration reloaded: %s%s",
                _counted(self.workers, "worker"),
                f"; workers of {_counted(earlier, 'earlier configuration')} are finishing" if earlier else "",
            )
            await self._end_oldest()

    def _refused(self, what: str, error: SseproxyError) -> None:
        self._recorder.count(metrics.RELOADS, ("failure",))
        self._recorder.set(metrics.RELOADED, (), 0)
        for line in str(error).splitlines():
            log.error("not %s: %s", what, line)

    def upgrade(self) -> None:
        """Starts an upgrade: tries the installed code, and then executes it in place of this process.

        If that fails, everything stays as it was, and it is counted as a failed reload. If it succeeds, all counters
        start at 0 again.
        """
        if self._upgrading is None or self._upgrading.done():
            self._upgrading = self._begin(self._upgrade())
        else:
            log.warning("an upgrade is already in progress")

    async def _upgrade(self) -> None:
        async with self._reloading:
            notify.reloading()
            try:
                if self.stopping.is_set():
                    raise ReloadError(_ENDING)
                log.info("upgrading: trying the installed code")
                await upgrade.try_out(self._command, self._handed_over())
                await self._hand_over()
            except SseproxyError as error:
                self._refused("upgraded", error)
            finally:
                notify.ready(_counted(self.workers, "worker"))

    async def _hand_over(self) -> None:
        """Executes the installed code in place of this process. Raises `ReloadError` if it fails."""
        # The admin listener answers meanwhile.
        await self._until_settled()
        try:
            # A site closes its socket, so the sockets are duplicated.
            kept = {address: [sock.dup() for sock in bound] for address, bound in self._admin_sockets.items()}
        except OSError as error:
            raise ReloadError(f"the admin listener cannot be handed over: {error.strerror}") from None
        reload_is_wanted = self._next_reload is not None
        if self._next_reload is not None:
            # It is not needed if this succeeds: the new code reads the configuration again when it starts.
            self._next_reload.cancel()
            self._next_reload = None
        self._admin_sockets = kept
        self._admin_sites.clear()
        try:
            # Waits for admin requests that have begun. New connections wait in the backlog for the new code.
            await self._admin.cleanup()
            await self._hold_back_when_settled()
            log.info("upgrading: this process executes the installed code")
            upgrade.execute(self._command, self._handed_over_with_workers())
        except OSError as error:
            raise ReloadError(f"{self._command[0]} cannot be executed: {error.strerror}") from None
        finally:
            signals.let_through()
            await self._admin.setup()
            await self._administer(self._admin_sockets)
            if reload_is_wanted and not self.stopping.is_set():
                self._begin(self._reload_unattended())

    async def _until_settled(self) -> None:
        """Waits until no worker is being started. Raises `ReloadError` if this process ends, or after a timeout."""
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                await self._until(lambda: self.stopping.is_set() or self._settled())
        except TimeoutError:
            raise ReloadError(f"workers were still starting after {_START_TIMEOUT:g} s") from None
        if self.stopping.is_set():
            raise ReloadError(_ENDING)

    async def _hold_back_when_settled(self) -> None:
        """Waits until no worker is being started, and holds back all signals from then on.

        Raises `ReloadError` as `_until_settled`, also if one of the signals that came before ends this process.
        """
        while True:
            await self._until_settled()
            signals.hold_back()
            # What arrived before that must be handled by this code: the new one would not know of it.
            for _ in range(_TURNS_FOR_SIGNALS):
                await asyncio.sleep(0)
            if self.stopping.is_set():
                raise ReloadError(_ENDING)
            if self._settled():
                return
            signals.let_through()

    def _settled(self) -> bool:
        """Whether every process of a worker has reported, so none is being started and none has just ended."""
        return all(each.settled() for each in self._generations)

    def _handed_over(self) -> Handover:
        """What a trial gets: the listening sockets."""
        return Handover(
            version=__version__,
            clients=upgrade.described(self._sockets),
            admin=upgrade.described(self._admin_sockets),
        )

    def _handed_over_with_workers(self) -> Handover:
        handover = self._handed_over()
        handover.workers = [channels for each in self._generations if (channels := each.channels())]
        handover.ledger = self._ledger.leave()
        handover.rows = {pid: row for each in self._generations for pid, row in each.rows().items()}
        return handover

    async def trial(self) -> None:
        """Tries whether this code can serve: starts one worker on a port of its own, and ends it.

        Raises `SseproxyError`. Sockets that were handed over stay open, those that `bind` has added are closed.
        """
        known = self._handover.listening() if self._handover is not None else set()
        trial = asyncio.current_task()
        assert trial is not None
        # `try_out` sends SIGTERM to a trial whose result is not needed any more.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, trial.cancel)
        await self._admin.setup()
        self._ledger = Ledger()
        anywhere = Address("127.0.0.1", 0)
        try:
            sockets: Sockets = {anywhere: listen("listen", anywhere)}
            config = replace(self.config, workers=1)
            worker = self._generate(config, sockets, self._columns(config))
            if not await self._wait_for_start(worker, lambda: bool(worker.last_exit)):
                raise ReloadError(worker.missing())
        finally:
            self._kill()
            for generation in self._generations:
                await generation.ended()
            await self._admin.cleanup()
            for bound in (self._sockets, self._admin_sockets):
                close_and_remove({address: sockets for address, sockets in bound.items() if str(address) not in known})

    async def close(self) -> None:
        """Drains: fails readiness, stops accepting, and ends the workers. Returns when all of them have ended."""
        self._stop()
        for task in self._tasks:
            task.cancel()
        for sockets in (self._sockets, *self._unused):
            close(sockets)
        for generation in self._generations:
            generation.drain()
        ending = {asyncio.ensure_future(generation.ended()) for generation in self._generations}
        if ending:
            _, ending = await asyncio.wait(ending, timeout=self.config.drain_timeout + _DRAIN_GRACE)
        if ending:
            self._kill()
            await asyncio.wait(ending, timeout=_DRAIN_GRACE)
        if self._upgrading is not None:
            # A trial removes the sockets that it has added.
            await asyncio.wait((self._upgrading,), timeout=_DRAIN_GRACE)
        await self._admin.cleanup()
        close(self._admin_sockets)
        clean_up(self._addresses)
        self._health.close()
        self._ledger.close()

    def _cut_off(self) -> int:
        """How many requests have been cut off, by the end of a drain or of a worker."""
        self._registry.add(0, self._recorder.report())
        return self._registry.ended(Outcome.DRAINED, Outcome.PROXY_ERROR)

    async def registry(self) -> Registry:
        """The current numbers of all workers. For a worker that does not answer in time, those of its last report."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_REPORT_TIMEOUT):
                await asyncio.gather(*(generation.report() for generation in self._generations))
        self._registry.add(0, self._recorder.report())
        self._registry.drop(_FLEET)
        self._registry.add(_FLEET, Report([], [*self._health.gauges()], [], []))
        self._registry.keep_endpoints(self._health.known())
        return self._registry

    async def _look(self) -> None:
        """Asks all workers what they have under way. Of one that does not answer in time, the last reading counts."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_REPORT_TIMEOUT):
                await asyncio.gather(*(generation.look() for generation in self._generations))

    def _cancel(self, worker: int, id: str) -> None:
        for generation in self._generations:
            generation.cancel(worker, id)

    def _unready(self) -> str | None:
        if self.stopping.is_set():
            return "draining"
        return None if any(generation.ready for generation in self._generations) else "no worker accepts connections"

    async def _administer(self, sockets: Sockets) -> None:
        for sock in flat(sockets):
            site = self._admin_sites[sock] = web.SockSite(self._admin, sock)
            await site.start()

    def _ready_rows(self) -> list[int]:
        """The rows in the ledger of the workers that accept, without those of generations that are finishing."""
        return [row for generation in self._generations if not generation.finishing for row in generation.ready_rows()]

    def _columns(self, config: Config) -> dict[str, int]:
        """The columns of the ledger for `config`. Raises `ReloadError` if there is too much to count."""
        in_use = set[str]().union(*(each.names for each in self._generations))
        try:
            return self._ledger.columns(counted_by_a_worker(config.with_probe()), in_use)
        except OSError as error:
            raise ReloadError(f"the ledger: {error.strerror}") from None

    def _generate(self, config: Config, sockets: Sockets, columns: dict[str, int]) -> Generation:
        """Starts the workers of `config`."""
        generation = Generation(
            config.with_probe(),
            flat(sockets),
            self._numbers,
            self._ledger,
            columns,
            self._registry,
            self._view,
            self._recorder,
            self._changed.set,
            self._fork,
        )
        self._generations.append(generation)
        generation.start()
        return generation

    async def _replace(self) -> None:
        if self.stopping.is_set():
            raise ReloadError(_ENDING)
        self._digests = await _in_thread(self._read_digests)
        if (other := await _in_thread(self._code.replaced)) is not None:
            log.warning(
                "%s: this reload uses the running code; to use the installed code, %s",
                other,
                f"send SIGUSR2 to process {os.getpid()}" if self._command else "restart",
            )
        # In a thread, because reading may take long, and the admin listener must answer meanwhile.
        config = await _in_thread(self._reread)
        clients, admin = self._bound(config)
        with ExitStack() as undo:
            undo.callback(close_and_remove, without(clients, self._sockets))
            undo.callback(close_and_remove, without(admin, self._admin_sockets))
            columns = self._columns(config)
            await self._health.prepare(config, columns)
            new = self._generate(config, clients, columns)
            # If a worker ends before any has accepted, the others will fail as well.
            if not await self._wait_for_start(new, lambda: bool(new.last_exit) and not new.ready):
                error = ReloadError(new.missing())
                new.give_up()
                await asyncio.wait((self._begin(self._end(new)),), timeout=_TAKE_OVER_TIMEOUT)
                self._health.follow(self.config, self._columns(self.config))
                raise error
            undo.pop_all()
        self._health.follow(config, columns)
        self._registry.forget_states(name for name, _ in _used(self.config) - _used(config))
        self._generation, self.config = new, config
        log_as(config)
        added_admin = without(admin, self._admin_sockets)
        unused, unused_admin = without(self._sockets, clients), without(self._admin_sockets, admin)
        self._sockets, self._admin_sockets = clients, admin
        await self._administer(added_admin)
        await self._take_over(unused, unused_admin)
        self._loaded()

    async def _take_over(self, unused: Sockets, unused_admin: Sockets) -> None:
        """Retires all generations but the current one, which accepts by now, and closes sockets that are not used."""
        earlier = [each for each in self._earlier() if not each.finishing]
        for generation in earlier:
            generation.retire()
            self._begin(self._end(generation))
        with ExitStack() as ends:
            ends.callback(close_and_remove, unused_admin)
            ends.callback(close_and_remove, unused)
            with suppress(TimeoutError):
                async with asyncio.timeout(_TAKE_OVER_TIMEOUT):
                    await self._until(lambda: not any(each.ready for each in earlier) or self.stopping.is_set())
            for address, sockets in unused.items():
                refuse(address, sockets)
            for sock in flat(unused_admin):
                if sock in self._admin_sites:
                    await self._admin_sites.pop(sock).stop()

    def _earlier(self) -> list[Generation | Predecessors]:
        """The generations before the current one, without one that is just being started."""
        return [*takewhile(lambda generation: generation is not self._generation, self._generations)]

    async def _fork(self, descriptors: Sequence[int]) -> Process:
        """Starts a worker. If the fork server has ended, starts an upgrade, which starts a new fork server."""
        try:
            return await self._fork_server.fork(descriptors)
        except ForkServerGone:
            self._fork_server_ended = True
            self._changed.set()
            if self._command and (self._upgrading is None or self._upgrading.done()):
                log.warning(
                    "the fork server (sse-forkserver) has ended, so no worker can be started: "
                    "upgrading to the installed code, which starts a new fork server"
                )
                self.upgrade()
            raise

    async def _wait_for_start(self, generation: Generation, failed: Callable[[], bool]) -> bool:
        """Waits until all workers of `generation` accept, until `failed`, until a timeout, or until this process ends.

        Returns False if workers are missing. If the fork server has ended, no more will come.
        """
        self._fork_server_ended = False

        def decided() -> bool:
            return generation.complete() or failed() or self._fork_server_ended or self.stopping.is_set()

        with suppress(TimeoutError):
            async with asyncio.timeout(_START_TIMEOUT + generation.size):
                await self._until(decided)
        return generation.complete() or self.stopping.is_set()

    async def _end(self, generation: Generation | Predecessors) -> None:
        await generation.ended()
        self._generations.remove(generation)
        # While code is being tried, or workers start, there are children that are not known yet.
        quiet = self._upgrading is None or self._upgrading.done()
        # Without a command, this may be a part of another process, whose children are its own.
        if self._command and quiet and self._settled():
            workers = {pid for each in self._generations for pid, _ in each.channels()}
            forget_orphans({self._fork_server.pid, *workers})

    async def _end_oldest(self) -> None:
        """Ends the oldest generations if more than `reload.generations` are finishing."""
        allowed = self.config.reload.generations
        oldest = self._earlier()
        del oldest[max(0, len(oldest) - allowed) :]
        for generation in oldest:
            log.warning(
                "more than %s finishing (reload.generations): the requests of the oldest are ended",
                "1 earlier configuration is" if allowed == 1 else f"{allowed} earlier configurations are",
            )
            generation.expire()
        for generation in oldest:
            try:
                await asyncio.wait_for(generation.ended(), _DRAIN_GRACE)
            except TimeoutError:
                generation.kill()

    async def _reload_unattended(self) -> None:
        with suppress(SseproxyError):
            await self.reload()

    def _loaded(self) -> None:
        """Called when the configuration is in use: sets the metrics about it, and starts to watch its files."""
        for unused, why in unreachable(self.config.routes):
            log.warning("%s: %s", self.config.place(unused, self._path), why)
        if exposed := self.config.exposed_keys():
            log.warning("%s: %s", self._path, exposed)
        self._registry.drop(_CONFIGURATION)
        self._registry.add(_CONFIGURATION, Report([], [*configured.limits(self.config)], [], []))
        configured.start_at_zero(self.config, self._recorder)
        self._recorder.set(metrics.RELOADED, (), 1)
        self._recorder.set(metrics.RELOADED_AT, (), time.time())  # noqa: TID251 - a point in time, not a duration
        if self.config.reload.watch is not None and (self._watching is None or self._watching.done()):
            self._watching = self._begin(self._watch())

    async def _watch(self) -> None:
        """Reloads when a file has changed. Ends when `reload.watch` is off."""
        while (interval := self.config.reload.watch) is not None:
            await asyncio.sleep(interval)
            # If no thread can be started now, there may be one next time.
            with suppress(ReloadError):
                if await _in_thread(self._read_digests) != self._digests:
                    await self._reload_unattended()

    def _read_digests(self) -> list[bytes]:
        """The digests of the configuration's files."""
        paths = self.config.files() if self._path is None else [self._path, *self.config.files()]
        return [*map(digest, paths)]

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _stop(self) -> None:
        notify.stopping()
        self.stopping.set()
        self._changed.set()

    def _signalled(self, number: signal.Signals) -> None:
        if not self.stopping.is_set():
            self._stop()
            return
        self._forced = number
        self._kill()

    def _kill(self) -> None:
        for generation in self._generations:
            generation.kill()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()


async def _in_thread(work: Callable[[], T]) -> T:
    """Does `work` in another thread. Raises `ReloadError` if no thread can be started."""
    try:
        done = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError as error:
        raise ReloadError(str(error)) from None
    return await done


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _used(config: Config) -> set[tuple[str, str]]:
    """The names and URLs of the upstreams that routes use."""
    names = (target.name for route in config.routes for target in route.upstream)
    return {(name, endpoint.url) for name in names for endpoint in config.upstream(name).endpoints}
