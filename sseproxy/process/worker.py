"""A worker: one event loop, one immutable configuration, the relay.

Started by the supervisor as `python -m sseproxy.process.worker CHANNEL LISTENER...`, which are inherited file
descriptors. The configuration comes as the first frame of the channel; reports go back over it. The end of the
channel is the end of the supervisor, and then the worker drains and goes, as it does on SIGTERM.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import uvloop

from ..config import Config
from ..observe.metrics import Report
from ..observe.telemetry import Telemetry, encode_report
from ..relay.proxy import Proxy

log = logging.getLogger(__name__)

BACKLOG = 1024
# Reports that wait for a supervisor that does not read; beyond it the worker adds up, and sends later.
_UNREAD_REPORTS = 1024 * 1024
# How long exchanges that were ended at the drain's deadline may take to write their last bytes.
_LAST_WORDS = 2.0

_HEADER = struct.Struct("!I")


def encode_config(config: Config) -> bytes:
    """The frame that a worker is started with. Only ever read back by a child of this process."""
    body = pickle.dumps(config)
    return _HEADER.pack(len(body)) + body


async def _read_config(reader: asyncio.StreamReader) -> Config:
    (size,) = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    config = pickle.loads(await reader.readexactly(size))
    assert isinstance(config, Config)
    return config


class Worker:
    """The relay on its sockets. `send` takes a report, and says False if it cannot take one now."""

    def __init__(self, config: Config, sockets: Sequence[socket.socket], send: Callable[[Report], bool]) -> None:
        loop = asyncio.get_running_loop()
        self._config = config
        self._sockets = sockets
        self._servers: list[asyncio.Server] = []
        self.telemetry = Telemetry(loop, send, self._connections)
        self.proxy = Proxy(config, self.telemetry.observer)

    def _connections(self) -> list[tuple[str, int, int]]:
        return [(name, *upstream.connections()) for name, upstream in self.proxy.upstreams.items()]

    async def start(self) -> None:
        """Accepts, and reports so."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            self._servers.append(await loop.create_server(self.proxy.server, sock=sock, backlog=BACKLOG))
        self.telemetry.flush()

    async def drain(self) -> None:
        """Stops accepting, lets exchanges end until the drain timeout, then ends them and closes everything."""
        for server in self._servers:
            server.close()
        self.proxy.drain()
        try:
            await asyncio.wait_for(self.proxy.server.empty.wait(), self._config.drain_timeout)
        except TimeoutError:
            log.warning("%d exchanges are ended by the drain timeout", len(self.proxy.active))
            self.proxy.end_exchanges()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.proxy.server.empty.wait(), _LAST_WORDS)
        await self.proxy.close()
        self.telemetry.close()


async def _serve(channel_fd: int, listener_fds: Sequence[int]) -> None:
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ending.set)
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=channel_fd))
    config = await _read_config(reader)

    def send(report: Report) -> bool:
        if writer.transport.is_closing():
            # The supervisor is gone, and with it whoever could be told.
            return True
        if writer.transport.get_write_buffer_size() > _UNREAD_REPORTS and not ending.is_set():
            return False
        writer.write(encode_report(report))
        return True

    worker = Worker(config, [socket.socket(fileno=fd) for fd in listener_fds], send)
    await worker.start()
    # What was imported and built so far lives as long as the process; collections need not look at it again.
    gc.collect()
    gc.freeze()

    async def supervisor_gone() -> None:
        try:
            await reader.read()
        finally:
            # A supervisor that died with reports unread is a reset, not an end.
            ending.set()

    watch = loop.create_task(supervisor_gone())
    await ending.wait()
    watch.cancel()
    await worker.drain()
    writer.close()
    # The supervisor may be gone, or take nothing.
    with suppress(OSError, TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), _LAST_WORDS)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    channel, *listeners = map(int, sys.argv[1:])
    uvloop.run(_serve(channel, listeners))


if __name__ == "__main__":
    main()
