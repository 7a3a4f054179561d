"""The supervisor: owns the sockets, the registry and the admin listener; starts, reloads and drains generations.

It never touches client traffic. A reload starts the workers of the new configuration beside those of the old one, on
the same sockets, and only when all of them accept are the old ones told to finish: nothing is refused, nothing is cut.
An upgrade is the same with new code: it is tried, and then this process becomes it (`upgrade`).
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import platform
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import get_args

import aiohttp
from aiohttp import web

from .. import __version__
from ..config import Address, Config, Listen
from ..config.files import read_file
from ..errors import ListenError, Outcome, ReloadError, SseproxyError, UpstreamErrorType
from ..observe import metrics
from ..observe.logs import log_as
from ..observe.metrics import Labels, Recorder, Report
from ..observe.registry import Registry
from ..relay.heads import check_parser
from ..relay.routes import OTHER
from . import notify, upgrade
from .admin import application
from .generation import Generation, Predecessors
from .listeners import clean_up, listen, refuse, url
from .upgrade import Handover, RunningCode

log = logging.getLogger(__name__)

_Sockets = dict[Listen, list[socket.socket]]

# What a draining worker may take beyond the drain timeout before it is killed.
_DRAIN_GRACE = 5.0
_ENDING = "the proxy is shutting down"
_UPGRADING = "the proxy is being upgraded, and reads the configuration again as it starts"
# Of a file that is watched; larger ones are not read as what they are either.
_MAX_FILE = 4 << 20
# Who tells the registry what the configuration says: not the supervisor itself, because options come and go.
_CONFIGURATION = -1
_SELDOM = (("", Outcome.PROXY_ERROR), ("200", Outcome.TRUNCATED), ("502", Outcome.UPSTREAM_ERROR))
# For what a reload waits at most until workers have stopped accepting; it takes them a turn of their loop.
_TAKE_OVER = 5.0
# For what a start or a reload waits at most until workers accept: this, and a second for each. A worker takes half a
# second of CPU, and all begin at once.
_TO_COME_UP = 30.0
# For what a scrape waits at most until a worker has told what it knows; one that is not overloaded takes a millisecond.
_ANSWER = 1.0


class Supervisor:
    """The parent of the workers. `bind` and `start` it, then `run` it until its end.

    `reread` gives the configuration as it is now; `path` is the file that it comes from, if it is one. `command` runs
    the code that is installed; without it there are no upgrades. `handover` is what the code before an upgrade left.
    """

    def __init__(
        self,
        config: Config,
        reread: Callable[[], Config] | None = None,
        path: str | None = None,
        command: Sequence[str] = (),
        handover: Handover | None = None,
    ) -> None:
        self.config = config
        self._reread = reread or (lambda: config)
        self._path = path
        self._command = command
        self._code = RunningCode()
        self._handover = handover
        self._sockets: _Sockets = {}
        self._admin_sockets: _Sockets = {}
        served = application(self.registry, self._unready, self.reload, lambda: self.config.admin.hosts)
        self._admin = web.AppRunner(served, access_log=None, shutdown_timeout=_ANSWER)
        self._admin_sites: dict[socket.socket, web.SockSite] = {}
        # What the code before an upgrade listened on and this configuration does not.
        self._unused: tuple[_Sockets, _Sockets] = {}, {}
        self._recorder = Recorder()
        self._registry = Registry()
        self._numbers = itertools.count(1)
        self._generation: Generation | None = None
        # The oldest first. Those before the present one are among them until their last worker has ended.
        self._generations: list[Generation | Predecessors] = []
        self._reloading = asyncio.Lock()
        # The reload that whoever wants one now waits for, until it begins.
        self._next_reload: asyncio.Task[None] | None = None
        self._upgrading: asyncio.Task[None] | None = None
        # What was in the files when they were last read.
        self._seen: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.stopping = asyncio.Event()
        """Set once a signal, or `close`, has asked for the end."""
        self._forced: signal.Signals | None = None

    @property
    def urls(self) -> list[str]:
        """Where clients connect to, once `bind` was called."""
        scheme = "https" if self.config.tls is not None else "http"
        return [url(sock, scheme) for sockets in self._sockets.values() for sock in sockets]

    @property
    def admin_url(self) -> str:
        ((sock, *_),) = self._admin_sockets.values()
        return url(sock)

    @property
    def workers(self) -> int:
        """How many there are to be."""
        assert self._generation is not None
        return self._generation.size

    def bind(self) -> None:
        """Binds all listeners. Raises `ListenError`, and what was bound is closed then, or `ParserError`."""
        check_parser()
        if self._handover is not None:
            self._sockets = upgrade.opened(self._handover.clients)
            self._admin_sockets = upgrade.opened(self._handover.admin)
        clients, admin = self._bound(self.config)
        self._unused = _without(self._sockets, clients), _without(self._admin_sockets, admin)
        self._sockets, self._admin_sockets = clients, admin

    def _bound(self, config: Config) -> tuple[_Sockets, _Sockets]:
        """The sockets that `config` listens on, for clients and for administration: open ones, and new ones."""
        clients, admin = _Sockets(), _Sockets()
        try:
            for option, addresses, known, wanted in (
                ("listen", config.listen, self._sockets, clients),
                ("admin.listen", (config.admin.listen,), self._admin_sockets, admin),
            ):
                for address in addresses:
                    wanted[address] = known[address] if address in known else listen(option, address)
        except ListenError:
            _give_up(_without(clients, self._sockets))
            raise
        return clients, admin

    async def start(self) -> None:
        """Starts the admin listener and the workers, and returns when every worker accepts."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._begin(self._reload_unattended()))
        if self._command:
            loop.add_signal_handler(signal.SIGUSR2, self.upgrade)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, upgrade.HELD_BACK)
        self._recorder.set(metrics.BUILD_INFO, (__version__, platform.python_version(), aiohttp.__version__), 1)
        # What has not happened yet is 0, so that the first time is an increase.
        self._recorder.count(metrics.RESTARTS, (), 0)
        for result in ("success", "failure"):
            self._recorder.count(metrics.RELOADS, (result,), 0)
        for workers in self._handover.workers if self._handover is not None else ():
            predecessors = Predecessors(workers, self.config, self._recorder, self._changed.set)
            self._generations.append(predecessors)
            predecessors.start()
        await self._admin.setup()
        await self._administer(self._admin_sockets)
        async with self._reloading:
            self._seen = await asyncio.to_thread(self._content)
            generation = self._generation = self._generate(self.config, self._sockets)
            if not await self._come_up(generation, lambda: False):
                if self._unready() is not None:
                    self._kill()
                    await self.close()
                    raise SseproxyError(f"nothing is served: {generation.missing()}")
                go_on = "those that do are all there is" if generation.ready else "those of the code before go on"
                log.error("%s; %s", generation.missing(), go_on)
            self._loaded()
        if self._handover is not None:
            succeeding = self._begin(self._succeed(self._handover.version))
            if generation.ready:
                await asyncio.wait((succeeding,))
        notify.ready(f"{self.workers} workers")

    async def _succeed(self, version: str) -> None:
        """The workers of the code before an upgrade finish, as soon as one of this code accepts."""
        await self._until(lambda: self._generation is not None and bool(self._generation.ready))
        await self._take_over(*self._unused)
        log.info("upgraded from version %s to %s: %d workers", version, __version__, self.workers)
        await self._end_oldest()

    async def run(self) -> int:
        """Runs until a signal ends it; returns the exit status."""
        await self.stopping.wait()
        log.info("draining for at most %gs; a second signal ends at once", self.config.drain_timeout)
        await self.close()
        return 128 + self._forced if self._forced is not None else 0

    async def reload(self) -> None:
        """Reads the configuration anew, and replaces the workers by such as have it.

        All who ask while a reload is under way get one more, together: what it has read may not be what they mean.
        Raises `SseproxyError` if it cannot be done; everything stays as it was then.
        """
        if self._next_reload is None:
            self._next_reload = self._begin(self._reload_once())
        reloading = self._next_reload
        # Whoever asked may leave, and does not end it for the others.
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
                notify.ready(f"{self.workers} workers")
            self._recorder.count(metrics.RELOADS, ("success",))
            earlier = len(self._generations) - 1
            log.info("configuration reloaded: %d workers; %d earlier ones finish their streams", self.workers, earlier)
            await self._end_oldest()

    def _refused(self, what: str, error: SseproxyError) -> None:
        self._recorder.count(metrics.RELOADS, ("failure",))
        self._recorder.set(metrics.RELOADED, (), 0)
        for line in str(error).splitlines():
            log.error("not %s: %s", what, line)

    def upgrade(self) -> None:
        """Begins to try the code that is installed, and to become it. If it cannot be done, everything stays as it was.

        It is a reload with other code, and counted as one if it fails. If it does not, all counting begins anew.
        """
        if self._upgrading is None or self._upgrading.done():
            self._upgrading = self._begin(self._upgrade())
        else:
            log.warning("an upgrade is under way already")

    async def _upgrade(self) -> None:
        async with self._reloading:
            notify.reloading()
            try:
                if self.stopping.is_set():
                    raise ReloadError(_ENDING)
                log.info("upgrading: the code that is installed is tried")
                await upgrade.try_out(self._command, self._handed_over())
                await self._hand_over()
            except SseproxyError as error:
                self._refused("upgraded", error)
            finally:
                notify.ready(f"{self.workers} workers")

    async def _hand_over(self) -> None:
        """Becomes the code that is installed. Raises `ReloadError` if it cannot be done."""
        if self._next_reload is not None:
            # It would wait for this upgrade, which reads the configuration anew itself.
            self._next_reload.cancel()
            self._next_reload = None
        try:
            # Sites close their sockets.
            kept = {address: [sock.dup() for sock in bound] for address, bound in self._admin_sockets.items()}
        except OSError as error:
            raise ReloadError(f"the admin listener cannot be handed over: {error.strerror}") from None
        self._admin_sockets = kept
        self._admin_sites.clear()
        try:
            # Requests that the admin listener has begun to answer end. Who connects from now on waits for the new code.
            await self._admin.cleanup()
            async with asyncio.timeout(_TO_COME_UP):
                await self._until(lambda: self.stopping.is_set() or all(each.settled() for each in self._generations))
            if self.stopping.is_set():
                raise ReloadError(_ENDING)
            log.info("upgrading: this process becomes the code that is installed")
            upgrade.execute(self._command, self._handed_over([each.channels() for each in self._generations]))
        except TimeoutError:
            raise ReloadError("workers are being started all the time") from None
        except OSError as error:
            raise ReloadError(f"{self._command[0]} cannot be executed: {error.strerror}") from None
        finally:
            await self._admin.setup()
            await self._administer(self._admin_sockets)

    def _handed_over(self, workers: Sequence[list[tuple[int, int]]] = ()) -> Handover:
        return Handover(
            version=__version__,
            clients=upgrade.described(self._sockets),
            admin=upgrade.described(self._admin_sockets),
            workers=[each for each in workers if each],
        )

    async def trial(self) -> None:
        """Starts a worker as `start` would, of which no client knows, and ends it. Raises `SseproxyError`.

        What was handed over stays as it is; what was bound beside that is closed again.
        """
        known = self._handover.listening() if self._handover is not None else set()
        await self._admin.setup()
        anywhere = Address("127.0.0.1", 0)
        try:
            sockets: _Sockets = {anywhere: listen("listen", anywhere)}
            worker = self._generate(self.config.model_copy(update={"workers": 1}), sockets)
            if not await self._come_up(worker, lambda: bool(worker.last_exit)):
                raise ReloadError(worker.missing())
        finally:
            self._kill()
            for generation in self._generations:
                await generation.ended()
            await self._admin.cleanup()
            for bound in (self._sockets, self._admin_sockets):
                _give_up({address: sockets for address, sockets in bound.items() if str(address) not in known})

    async def close(self) -> None:
        """Drains: not ready, no accepting, workers told; returns when all have ended."""
        self._stop()
        for task in self._tasks:
            task.cancel()
        _close(self._sockets)
        for generation in self._generations:
            generation.drain()
        endings = [asyncio.ensure_future(generation.ended()) for generation in self._generations]
        try:
            await asyncio.wait_for(asyncio.gather(*endings), self.config.drain_timeout + _DRAIN_GRACE)
        except TimeoutError:
            self._kill()
        await self._admin.cleanup()
        _close(self._admin_sockets)
        clean_up([*self._sockets, *self._admin_sockets])

    async def registry(self) -> Registry:
        """All numbers, as they are now; those of a worker that does not answer as it told them last."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER):
                await asyncio.gather(*(generation.report() for generation in self._generations))
        self._registry.add(0, self._recorder.report())
        return self._registry

    def _unready(self) -> str | None:
        if self.stopping.is_set():
            return "draining"
        return None if any(generation.ready for generation in self._generations) else "no worker accepts connections"

    async def _administer(self, sockets: _Sockets) -> None:
        for sock in _flat(sockets):
            site = self._admin_sites[sock] = web.SockSite(self._admin, sock)
            await site.start()

    def _generate(self, config: Config, sockets: _Sockets) -> Generation:
        generation = Generation(
            config,
            _flat(sockets),
            self._numbers,
            self._registry,
            self._recorder,
            self._changed.set,
            self._same_code_or_upgrade,
        )
        self._generations.append(generation)
        generation.start()
        return generation

    async def _replace(self) -> None:
        if self.stopping.is_set():
            raise ReloadError(_ENDING)
        self._seen = await asyncio.to_thread(self._content)
        await self._same_code()
        # It may take a while to read, and this process has others to answer.
        config = await asyncio.to_thread(self._reread)
        clients, admin = self._bound(config)
        new = self._generate(config, clients)
        # If not even one accepts, the others will not either.
        came_up = await self._come_up(new, lambda: bool(new.last_exit) and not new.ready)
        try:
            if not came_up:
                raise ReloadError(new.missing())
            # It may have been replaced while they started.
            await self._same_code()
        except ReloadError:
            if came_up:
                # They have accepted clients by now.
                new.retire()
                self._begin(self._end(new))
            else:
                new.kill()
                await self._end(new)
            _give_up(_without(clients, self._sockets) | _without(admin, self._admin_sockets))
            raise
        await self._administer(_without(admin, self._admin_sockets))
        self._registry.forget_states(name for name, _ in _used(self.config) - _used(config))
        self._generation, self.config = new, config
        log_as(config)
        unused, unused_admin = _without(self._sockets, clients), _without(self._admin_sockets, admin)
        self._sockets, self._admin_sockets = clients, admin
        await self._take_over(unused, unused_admin)
        self._loaded()

    async def _take_over(self, unused: _Sockets, unused_admin: _Sockets) -> None:
        """The present generation accepts: those before it finish, and nobody listens on what is unused any more."""
        earlier = [each for each in self._generations if each is not self._generation and not each.finishing]
        for generation in earlier:
            generation.retire()
            self._begin(self._end(generation))
        with suppress(TimeoutError):
            async with asyncio.timeout(_TAKE_OVER):
                await self._until(lambda: not any(each.ready for each in earlier) or self.stopping.is_set())
        for address, sockets in unused.items():
            refuse(address, sockets)
        for sock in _flat(unused_admin):
            if sock in self._admin_sites:
                await self._admin_sites.pop(sock).stop()
        _give_up(unused | unused_admin)

    async def _same_code(self) -> None:
        """Raises `ReloadError` if the code on disk is not the one that runs: workers would not be of one version."""
        if (replaced := await asyncio.to_thread(self._code.replaced)) is not None:
            raise ReloadError(f"{replaced}: {'send SIGUSR2' if self._command else 'restart'} to upgrade")

    async def _same_code_or_upgrade(self) -> None:
        """For a worker that is to be replaced, which can only be done with the code on disk."""
        try:
            await self._same_code()
        except ReloadError:
            if self._command and (self._upgrading is None or self._upgrading.done()):
                log.warning("a worker has ended, and the code that it ran is no longer installed: upgrading")
                self.upgrade()
            raise

    async def _come_up(self, generation: Generation, failed: Callable[[], bool]) -> bool:
        """Waits until all of `generation` accept, and no longer if it `failed`, or when everything is to end.

        Tells whether it may go on: False if workers are missing.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_TO_COME_UP + generation.size):
                await self._until(lambda: generation.complete() or failed() or self.stopping.is_set())
        return generation.complete() or self.stopping.is_set()

    async def _end(self, generation: Generation | Predecessors) -> None:
        await generation.ended()
        self._generations.remove(generation)

    async def _end_oldest(self) -> None:
        """No more earlier configurations finish than may; what is left of the oldest ones is ended."""
        allowed = self.config.reload.generations
        oldest = [generation for generation in self._generations if generation is not self._generation]
        del oldest[max(0, len(oldest) - allowed) :]
        for generation in oldest:
            log.warning("more than %d earlier configurations are finishing: the exchanges of the oldest end", allowed)
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
        """The configuration is in use."""
        self._registry.drop(_CONFIGURATION)
        self._registry.add(_CONFIGURATION, Report([], [*_limits(self.config)], [], []))
        named = self.config.metrics
        models = (*named.models, OTHER) if named.detail == "full" else ("",)
        for route in self.config.routes:
            # What seldom happens is 0 until it does, so that the first time is an increase that alerts can see.
            labels = route.name, route.upstream
            for code, outcome in _SELDOM:
                for model in models if outcome is not Outcome.PROXY_ERROR else ("",):
                    self._recorder.count(metrics.REQUESTS, (*labels, model, code, outcome.value), 0)
            for kind in get_args(UpstreamErrorType):
                self._recorder.count(metrics.UPSTREAM_ERRORS, (*labels, kind), 0)
        self._recorder.set(metrics.RELOADED, (), 1)
        self._recorder.set(metrics.RELOADED_AT, (), time.time())  # noqa: TID251 - a point in time, not a duration
        if self.config.reload.watch is not None and (self._watching is None or self._watching.done()):
            self._watching = self._begin(self._watch())

    async def _watch(self) -> None:
        """Reloads when a file says something new, until a configuration wants no more of that."""
        while (interval := self.config.reload.watch) is not None:
            await asyncio.sleep(interval)
            if await asyncio.to_thread(self._content) != self._seen:
                await self._reload_unattended()

    def _content(self) -> list[bytes]:
        """What the configuration's files say, in short. A file that cannot be read says nothing."""
        paths = [self._path, *self.config.files()] if self._path is not None else self.config.files()
        digests = []
        for path in paths:
            try:
                digests.append(hashlib.sha256(read_file(path, _MAX_FILE)).digest())
            except OSError:
                digests.append(b"")
        return digests

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


def _limits(config: Config) -> Iterator[tuple[str, Labels, float]]:
    """The gauges of the numbers that `config` allows."""
    for option in ("connections", "connections_per_client", "active_requests", "pending_connects"):
        if (most := getattr(config.limits, option)) is not None:
            yield metrics.LIMIT.name, (option, ""), most
    for route in config.routes:
        if route.limits.active_requests is not None:
            yield metrics.LIMIT.name, ("active_requests", route.name), route.limits.active_requests


def _used(config: Config) -> set[tuple[str, str]]:
    """The upstreams that requests go to: name and URL."""
    return {(name, config.upstream(name).url) for name in (route.upstream for route in config.routes)}


def _without(sockets: _Sockets, others: _Sockets) -> _Sockets:
    """Those on addresses that are not among `others`."""
    return {address: bound for address, bound in sockets.items() if address not in others}


def _flat(sockets: _Sockets) -> list[socket.socket]:
    return [sock for bound in sockets.values() for sock in bound]


def _close(sockets: _Sockets) -> None:
    for sock in _flat(sockets):
        sock.close()


def _give_up(sockets: _Sockets) -> None:
    """Nothing of them is left, nor in the file system."""
    _close(sockets)
    clean_up(sockets)
