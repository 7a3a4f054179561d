"""The supervisor: owns the sockets, the registry and the admin listener; starts, replaces and drains workers.

It never touches client traffic. A worker that ends unasked is replaced, at once the first time, later and later if
its successors end early as well. What it had under way counts as lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter

import aiohttp
from aiohttp import web

from .. import __version__
from ..config import Address, Config
from ..errors import ListenError, Outcome
from ..observe import metrics
from ..observe.metrics import Recorder, Registry
from ..observe.telemetry import read_reports
from .admin import application
from .worker import BACKLOG, encode_config

log = logging.getLogger(__name__)

# A worker that lived this long was not part of a crash loop.
_HEALTHY_AFTER = 10.0
_BACKOFF_MIN, _BACKOFF_MAX = 0.1, 10.0
# Of a connection that is served: the client's side and the upstream's.
_DESCRIPTORS, _DESCRIPTORS_OF_ITS_OWN = 2, 50
# What a draining worker may take beyond the drain timeout before it is killed.
_DRAIN_GRACE = 5.0


def listen(option: str, address: Address) -> socket.socket:
    """A listening socket on `address`; an empty host means every interface, IPv6 included where there is one.

    Raises `ListenError`.
    """
    try:
        if not address.host:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            return socket.create_server(("", address.port), family=family, backlog=BACKLOG, dualstack_ipv6=dual)
        family, *_, sockaddr = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(sockaddr[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ListenError(option, str(address), error) from None


def _url(listener: socket.socket | None) -> str:
    assert listener is not None
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
    possible = max(1, (most - _DESCRIPTORS_OF_ITS_OWN) // _DESCRIPTORS)
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


class Supervisor:
    """The parent of the workers. `start` it, then `run` it until its end."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.workers = cores() if config.workers == "auto" else config.workers
        self._of_a_worker = config.share(self.workers)
        self._recorder = Recorder()
        self._registry = Registry()
        self._listener: socket.socket | None = None
        self._admin_socket: socket.socket | None = None
        self._admin: web.AppRunner | None = None
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._ready: set[int] = set()
        self._changed = asyncio.Event()
        self._next_id = 1
        self._keepers: list[asyncio.Task[None]] = []
        self.stopping = asyncio.Event()
        """Set once a signal, or `close`, has asked for the end."""
        self._forced: signal.Signals | None = None

    @property
    def url(self) -> str:
        """Where clients connect to, once `bind` was called."""
        return _url(self._listener)

    @property
    def admin_url(self) -> str:
        return _url(self._admin_socket)

    def bind(self) -> None:
        """Binds both listeners. Raises `ListenError`; what was bound is closed then."""
        self._listener = listen("listen", self.config.listen)
        try:
            self._admin_socket = listen("admin.listen", self.config.admin.listen)
        except ListenError:
            self._listener.close()
            raise

    async def start(self) -> None:
        """Starts the admin listener and the workers, and returns when every worker accepts."""
        assert self._admin_socket is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        self._of_a_worker = within_descriptors(self._of_a_worker)
        self._recorder.set(metrics.BUILD_INFO, (__version__, platform.python_version(), aiohttp.__version__), 1)
        self._admin = web.AppRunner(application(self.registry, self._unready), access_log=None)
        await self._admin.setup()
        await web.SockSite(self._admin, self._admin_socket).start()
        self._keepers = [loop.create_task(self._keep_worker()) for _ in range(self.workers)]
        await self._until(lambda: len(self._ready) == self.workers or self.stopping.is_set())

    async def run(self) -> int:
        """Runs until a signal ends it; returns the exit status."""
        await self.stopping.wait()
        log.info("draining for at most %gs; a second signal ends at once", self.config.drain_timeout)
        await self.close()
        return 128 + self._forced if self._forced is not None else 0

    def _stop(self) -> None:
        self.stopping.set()
        self._changed.set()

    def _signalled(self, number: signal.Signals) -> None:
        if not self.stopping.is_set():
            self._stop()
            return
        self._forced = number
        self._tell_workers(signal.SIGKILL)

    def _tell_workers(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            # One that has just ended is still among them.
            with suppress(ProcessLookupError):
                process.send_signal(number)

    async def close(self) -> None:
        """Drains: not ready, no accepting, workers told; returns when all have ended."""
        self._stop()
        if self._listener is not None:
            self._listener.close()
        self._tell_workers(signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.gather(*self._keepers), self.config.drain_timeout + _DRAIN_GRACE)
        except TimeoutError:
            self._tell_workers(signal.SIGKILL)
        if self._admin is not None:
            await self._admin.cleanup()

    def registry(self) -> Registry:
        """All numbers, as they stand."""
        self._recorder.set(metrics.WORKERS, (), len(self._ready))
        self._registry.add(0, self._recorder.report())
        return self._registry

    def _unready(self) -> str | None:
        if self.stopping.is_set():
            return "draining"
        return None if self._ready else "no worker accepts connections"

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _keep_worker(self) -> None:
        """Keeps one worker running."""
        backoff = 0.0
        while not self.stopping.is_set():
            started = perf_counter()
            try:
                fate = f"ended with status {await self._run_worker()}"
                ended = True
            except OSError as error:
                # Out of descriptors, processes or memory; there may be some again.
                fate, ended = f"could not be started ({error})", False
            if self.stopping.is_set():
                return
            if ended:
                self._recorder.count(metrics.RESTARTS, ())
            lived = perf_counter() - started
            backoff = 0.0 if lived >= _HEALTHY_AFTER else min(max(2 * backoff, _BACKOFF_MIN), _BACKOFF_MAX)
            log.error("a worker %s after %.1fs; the next starts in %.1fs", fate, lived, backoff)
            try:
                await asyncio.wait_for(self.stopping.wait(), backoff)
            except TimeoutError:
                continue

    async def _run_worker(self) -> int:
        """Runs one worker to its end; returns its exit status. Raises `OSError` if there is no starting one."""
        assert self._listener is not None
        ours, theirs = socket.socketpair()
        number, self._next_id = self._next_id, self._next_id + 1
        fds = [theirs.fileno(), self._listener.fileno()]
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "sseproxy.process.worker", *map(str, fds)),
                    pass_fds=fds,
                    # The terminal's Ctrl-C goes to a whole process group; what it means is decided here.
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        self._processes[number] = process
        if self.stopping.is_set():
            with suppress(ProcessLookupError):
                process.terminate()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        writer.write(encode_config(self._of_a_worker))
        async for report in read_reports(reader):
            self._registry.add(number, report)
            if number not in self._ready:
                self._ready.add(number)
                self._changed.set()
        self._ready.discard(number)
        status = await process.wait()
        writer.close()
        del self._processes[number]
        for labels, lost in self._registry.drop(number).items():
            self._recorder.count(metrics.REQUESTS, (*labels, "", Outcome.PROXY_ERROR.value), lost)
        return status
