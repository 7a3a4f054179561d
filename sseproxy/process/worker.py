"""A worker: one event loop, one immutable configuration, the relay.

Started by the supervisor by way of `start`, with CHANNEL LISTENER... as arguments, which are inherited file
descriptors. The configuration comes as the first frame of the channel; reports go back over it. The end of the
channel is the end of the supervisor, and then the worker drains and goes, as it does on SIGTERM. On SIGHUP it does so
as well, but as a worker whose successor has already taken over: in its own time. On SIGINT it ends what it still has.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import pickle
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import uvloop

from ..observe import metrics
from ..observe.access import AccessLog, to_standard_output
from ..observe.logs import log_as, set_up_logging
from ..observe.metrics import Labels, Metric, Report
from ..observe.telemetry import Telemetry, encode_report
from ..relay.proxy import Proxy
from .listeners import BACKLOG

if TYPE_CHECKING:
    from ..config import Config

log = logging.getLogger(__name__)

# Reports that wait for a supervisor that does not read; beyond it the worker adds up, and sends later.
_UNREAD_REPORTS = 1024 * 1024
# How long exchanges that were ended at the drain's deadline may take to write their last bytes.
_LAST_WORDS = 2.0

_HEADER = struct.Struct("!I")


def encode_config(config: Config) -> bytes:
    """The frame that a worker is started with. Only ever read back by a child of this process."""
    body = pickle.dumps(config.plain())
    return _HEADER.pack(len(body)) + body


async def _read_config(reader: asyncio.StreamReader) -> Config:
    (size,) = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    return cast("Config", pickle.loads(await reader.readexactly(size)))


class Worker:
    """The relay on its sockets. `send` takes a report, and says False if it cannot take one now."""

    def __init__(
        self,
        config: Config,
        sockets: Sequence[socket.socket],
        send: Callable[[Report], bool],
        access: AccessLog | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._config = config
        self._sockets = sockets
        self._servers: list[asyncio.Server] = []
        self.telemetry = Telemetry(loop, send, self._gauges, access, detailed=config.metrics.detail == "full")
        self.proxy = Proxy(config, self.telemetry.observer, self.telemetry.lagged)

    def _stop_accepting(self) -> None:
        for server in self._servers:
            server.close()
        self._accepts(False)

    def _accepts(self, accepts: bool) -> None:
        """Tells the supervisor which it is."""
        self.telemetry.recorder.set(metrics.WORKERS, (), int(accepts))
        self.telemetry.recorder.set(metrics.WORKERS_FINISHING, (), int(not accepts))
        self.telemetry.report()

    def _gauges(self) -> Iterator[tuple[Metric, Labels, float]]:
        """What is as it is now."""
        yield metrics.CLIENT_CONNECTIONS, (), self.proxy.server.places.open
        for name, upstream in self.proxy.upstreams.items():
            in_use, idle = upstream.connections()
            yield metrics.CONNECTIONS, (name, "active"), in_use - upstream.connecting
            yield metrics.CONNECTIONS, (name, "connecting"), upstream.connecting
            yield metrics.CONNECTIONS, (name, "idle"), idle

    async def start(self) -> None:
        """Accepts, and reports so."""
        loop = asyncio.get_running_loop()
        tls = self._config.tls.context() if self._config.tls is not None else None
        for sock in self._sockets:
            server = await loop.create_server(functools.partial(self.proxy.server, tls), sock=sock, backlog=BACKLOG)
            self._servers.append(server)
        self._accepts(True)

    async def retire(self, over: asyncio.Event) -> None:
        """Stops accepting, and lets exchanges end, as long as a reload allows, or until it is `over`."""
        self._stop_accepting()
        self.proxy.retire()
        waiting = [asyncio.ensure_future(event.wait()) for event in (self.proxy.server.empty, over)]
        await asyncio.wait(waiting, timeout=self._config.reload.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiting:
            waiter.cancel()

    async def drain(self, seconds: float | None = None) -> None:
        """Stops accepting, lets exchanges end for `seconds` (`drain_timeout`), then ends them and closes everything."""
        self._stop_accepting()
        self.proxy.drain()
        try:
            async with asyncio.timeout(self._config.drain_timeout if seconds is None else seconds):
                await self.proxy.server.empty.wait()
        except TimeoutError:
            log.warning("%d exchanges are ended by the drain timeout", len(self.proxy.active))
            self.proxy.end_exchanges()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.proxy.server.empty.wait(), _LAST_WORDS)
        await self.proxy.close()
        self.telemetry.close()


async def _serve(channel_fd: int, listener_fds: Sequence[int]) -> None:
    loop = asyncio.get_running_loop()
    retiring, over, ending = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def expire() -> None:
        retiring.set()
        over.set()

    def end() -> None:
        ending.set()
        expire()

    loop.add_signal_handler(signal.SIGTERM, end)
    loop.add_signal_handler(signal.SIGINT, expire)
    loop.add_signal_handler(signal.SIGHUP, retiring.set)
    # It asks for an upgrade, and is the supervisor's; but whoever sends it may send it to all.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=channel_fd))
    config = await _read_config(reader)
    log_as(config)

    def send(report: Report) -> bool:
        if writer.transport.is_closing():
            # The supervisor is gone, and with it whoever could be told.
            return True
        if writer.transport.get_write_buffer_size() > _UNREAD_REPORTS and not ending.is_set():
            return False
        writer.write(encode_report(report))
        return True

    sockets = [socket.socket(fileno=fd) for fd in listener_fds]
    worker = Worker(config, sockets, send, to_standard_output(config.access_log))
    await worker.start()
    # What was imported and built so far lives as long as the process; collections need not look at it, not even once.
    gc.freeze()
    gc.enable()

    async def heed_supervisor() -> None:
        try:
            while await reader.read(1):
                worker.telemetry.report(asked=True)
        finally:
            # A supervisor that died with reports unread is a reset, not an end.
            end()

    watch = loop.create_task(heed_supervisor())
    await retiring.wait()
    if not ending.is_set():
        await worker.retire(over)
    await worker.drain(None if ending.is_set() else 0.0)
    watch.cancel()
    writer.close()
    # The supervisor may be gone, or take nothing.
    with suppress(OSError, TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), _LAST_WORDS)


def main() -> None:
    set_up_logging()
    channel, *listeners = map(int, sys.argv[1:])
    uvloop.run(_serve(channel, listeners))
