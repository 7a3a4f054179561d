"""A worker: one event loop, one immutable configuration, the relay.

The fork server starts it with file descriptors: its channel to the supervisor, the ledger, and listening sockets. The
worker receives its instructions as the first frame of the channel, and then sends reports through the channel.

    SIGTERM, or the channel is closed   drains: exchanges may take `drain_timeout`, then they are ended
    SIGHUP                              retires, because new workers have taken over: exchanges may take
                                        `reload.drain_timeout`, then they are ended
    SIGINT                              ends its exchanges now
    SIGUSR2                             nothing: it is for the supervisor, but may be sent to all processes of a service
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import uvloop
from msgspec.structs import replace

from ..config.model import Config
from ..doctor.origin import NAMES as PROBE_NAMES
from ..doctor.origin import Origin
from ..ledger.table import Row, opened
from ..observe import metrics
from ..observe.access import AccessLog, to_standard_output
from ..observe.live import Reader, Reading
from ..observe.logs import log_as, set_up_logging
from ..observe.metrics import Labels, Metric, Report
from ..observe.telemetry import CANCEL, LOOK, Telemetry, encode_report, questions
from ..relay.admission import counted
from ..relay.proxy import Proxy
from . import accepting
from .accepting import Accepting
from .forkserver import hide

log = logging.getLogger(__name__)

# Bytes of reports that wait for a supervisor that does not read. Above that, the worker sends no report: the next one
# that can be sent includes the changes of those that were not.
_MAX_UNREAD_REPORTS = 1024 * 1024
# Seconds after the last reading of the live view, until the ids of the exchanges in it are forgotten.
_REMEMBERED_FOR = 10.0
# Seconds for exchanges that were ended at the deadline of a drain to write their last bytes.
_FLUSH_TIMEOUT = 2.0
# Variables that the interpreter and its libraries read. A worker keeps them even if the configuration uses them, for
# example ${HOME} in a path. It has the values of all others in its configuration.
_KEPT_VARIABLES = frozenset(
    {"HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "TZ"}
    | {"SSL_CERT_DIR", "SSL_CERT_FILE"}
)

_HEADER = struct.Struct("!I")


class Instructions(NamedTuple):
    """What a worker needs to start."""

    config: Config
    row: int
    """The row of the worker in the ledger."""
    columns: dict[str, int]
    """The columns of the ledger that it uses, by name."""
    most_connections: int
    """How many client connections it has file descriptors for."""

    def encoded(self) -> bytes:
        """The first frame of a worker's channel. It is a pickle, which only a child of this process ever reads."""
        body = pickle.dumps((self.config.for_workers(), *self[1:]))
        return _HEADER.pack(len(body)) + body


async def _read_instructions(reader: asyncio.StreamReader) -> Instructions:
    (size,) = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    return Instructions(*pickle.loads(await reader.readexactly(size)))


def counted_by_a_worker(config: Config) -> list[str]:
    """The names in the ledger of all that a worker counts."""
    names = [*accepting.NAMES, *counted(config)]
    if config.probe is not None:
        names += PROBE_NAMES
    return names


class Worker:
    """The relay, on listening `sockets`. `send` sends a report; it returns False if it cannot send one now.

    `row` is the worker's row in the ledger. It can have `most_connections` client connections.
    """

    def __init__(
        self,
        config: Config,
        sockets: Sequence[socket.socket],
        send: Callable[[Report], bool],
        row: Row,
        most_connections: int,
        access: AccessLog | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._probe: tuple[Origin, socket.socket] | None = None
        if config.probe is not None:
            config = self._make_probe(config, row)
        self._config = config
        self.telemetry = Telemetry(loop, send, self._gauges, access, detailed=config.metrics.detail == "full")
        self.proxy = Proxy(config, self.telemetry.observer, self.telemetry.lagged, row, most_connections)
        # What the live view reads, while it has viewers.
        self._reader: Reader | None = None
        self._forgetting: asyncio.TimerHandle | None = None
        tls = config.tls.context() if config.tls is not None else None
        self._accepting = Accepting(sockets, functools.partial(self.proxy.server, tls), row)

    def _make_probe(self, config: Config, row: Row) -> Config:
        """Makes the probe. Returns `config` with its port."""
        assert config.probe is not None
        sock = socket.create_server(("127.0.0.1", 0))
        self._probe = Origin(config.probe.token.reveal(), row), sock
        # The upstream of the probe is the last one (`Config.with_probe`).
        *upstreams, upstream = config.upstreams
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        return replace(config, upstreams=(*upstreams, replace(upstream, url=url)))

    def _stop_accepting(self) -> None:
        self._accepting.stop()
        self._report_accepting(False)

    def _report_accepting(self, accepting: bool) -> None:
        """Reports to the supervisor whether this worker accepts connections."""
        self.telemetry.recorder.set(metrics.WORKERS, (), int(accepting))
        self.telemetry.recorder.set(metrics.WORKERS_FINISHING, (), int(not accepting))
        self.telemetry.report()

    def _gauges(self) -> Iterator[tuple[Metric, Labels, float]]:
        """The current values of the gauges."""
        yield metrics.CLIENT_CONNECTIONS, (), self.proxy.server.slots.open
        for name, upstream in self.proxy.upstreams.items():
            in_use, idle = upstream.connections()
            yield metrics.CONNECTIONS, (name, "active"), in_use - upstream.connecting
            yield metrics.CONNECTIONS, (name, "connecting"), upstream.connecting
            yield metrics.CONNECTIONS, (name, "idle"), idle

    async def look(self) -> Reading:
        """What is under way now. The ids in it are known until the next call, or for `_REMEMBERED_FOR` seconds."""
        if self._reader is None:
            upstreams = self.proxy.upstreams.items()
            hosts = {name: upstream.only.host.decode() for name, upstream in upstreams if upstream.only is not None}
            self._reader = Reader(hosts)
        reader = self._reader
        if self._forgetting is not None:
            self._forgetting.cancel()
        self._forgetting = asyncio.get_running_loop().call_later(_REMEMBERED_FOR, self._forget)
        running = list(self.telemetry.running)
        chosen = reader.choose(running)
        if len(chosen) < len(running):
            # To choose among many takes as long as to make the rows: the others have their turns in between.
            await asyncio.sleep(0)
        return reader.read(chosen, len(running))

    def last_look(self) -> Reading | None:
        """What has ended since the last call of `look`. None if nobody looks."""
        return self._reader.read((), 0) if self._reader is not None else None

    def _forget(self) -> None:
        self._reader = self._forgetting = None

    def cancel(self, id: str) -> None:
        """Ends the exchange with this id in the latest reading, if it is still active."""
        if self._reader is not None and (exchange := self._reader.find(id)) is not None:
            self.proxy.cancel(exchange)

    async def start(self) -> None:
        """Starts to accept connections, and reports it."""
        if self._probe is not None:
            probe, sock = self._probe
            await probe.start(sock)
        await self._accepting.start()
        self._report_accepting(True)

    async def retire(self, over: asyncio.Event) -> None:
        """Stops accepting, and waits until all exchanges have ended: for `reload.drain_timeout`, or until `over`."""
        self._stop_accepting()
        self.proxy.retire()
        waiting = [asyncio.ensure_future(event.wait()) for event in (self.proxy.server.empty, over)]
        timeout = self._config.reload.drain_timeout
        ended, _ = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiting:
            waiter.cancel()
        if not ended:
            cut = len(self.proxy.active)
            log.warning("requests of an earlier configuration cut off by reload.drain_timeout (%gs): %d", timeout, cut)

    async def drain(self, seconds: float | None = None) -> None:
        """Stops accepting, and waits for exchanges for `seconds`; the default is `drain_timeout`.

        Then ends those that are left, and closes everything.
        """
        self._stop_accepting()
        self.proxy.drain()
        try:
            async with asyncio.timeout(self._config.drain_timeout if seconds is None else seconds):
                await self.proxy.server.empty.wait()
        except TimeoutError:
            self.proxy.end_exchanges()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.proxy.server.empty.wait(), _FLUSH_TIMEOUT)
        await self.proxy.close()
        if self._probe is not None:
            await self._probe[0].close()
        self.telemetry.close()
        if self._forgetting is not None:
            self._forgetting.cancel()


async def _serve(channel_fd: int, ledger_fd: int, listener_fds: Sequence[int]) -> None:
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
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=channel_fd))
    try:
        config, number, columns, most_connections = await _read_instructions(reader)
    except (EOFError, ConnectionError):
        # The supervisor has ended, or could not use this worker.
        return
    hide(config.variables - _KEPT_VARIABLES)
    log_as(config)
    row = opened(ledger_fd, number, columns)

    def write(report: Report | Reading) -> bool:
        if writer.transport.is_closing():
            # The supervisor has ended. Nobody needs the report, so it counts as sent.
            return True
        if writer.transport.get_write_buffer_size() > _MAX_UNREAD_REPORTS and not ending.is_set():
            return False
        writer.write(encode_report(report))
        return True

    sockets = [socket.socket(fileno=fd) for fd in listener_fds]
    worker = Worker(config, sockets, write, row, most_connections, to_standard_output(config.access_log))
    await worker.start()
    # The objects that exist now live as long as the process. Frozen, they are not visited by any collection.
    gc.freeze()
    gc.enable()

    async def look() -> None:
        try:
            write(await worker.look())
        except Exception:
            # An error in the live view must not end requests.
            log.exception("internal error in the live view")

    async def watch_supervisor() -> None:
        try:
            async for question, id in questions(reader):
                if question == LOOK:
                    await look()
                elif question == CANCEL:
                    worker.cancel(id)
                else:
                    worker.telemetry.report(asked=True)
        finally:
            # In a `finally`: if the supervisor died with unread reports, `read` raises ConnectionResetError.
            end()

    watch = loop.create_task(watch_supervisor())
    await retiring.wait()
    if not ending.is_set():
        await worker.retire(over)
    await worker.drain(None if ending.is_set() else 0.0)
    watch.cancel()
    if (reading := worker.last_look()) is not None:
        write(reading)
    writer.close()
    # The supervisor may have ended, or may not read.
    with suppress(OSError, TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), _FLUSH_TIMEOUT)


def main(descriptors: Sequence[int]) -> None:
    set_up_logging()
    channel, ledger, *listeners = descriptors
    uvloop.run(_serve(channel, ledger, listeners))
