"""Notices that a peer has closed its connection, although the socket is not being read."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from contextlib import suppress


class Watch:
    """A watched socket. It is an object, because the kernel reuses the numbers of file descriptors."""

    __slots__ = ("fd", "hung_up")

    def __init__(self, fd: int, hung_up: Callable[[], None]) -> None:
        self.fd = fd
        self.hung_up = hung_up


class HangupWatch:
    """Watches sockets for hang-ups while reading is paused. An event loop otherwise notices a FIN only by reading.

    This is an epoll set of its own, which waits only for hang-ups (epoll_ctl(2), EPOLLRDHUP). If a watched socket is
    closed, the kernel removes it from the set, and its number may be reused by another socket.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._watched: dict[int, Watch] = {}
        loop.add_reader(self._epoll.fileno(), self._ready)

    def add(self, fd: int, hung_up: Callable[[], None]) -> Watch:
        """Calls `hung_up` once when the peer of `fd` hangs up, unless the returned watch is removed before."""
        watch = self._watched[fd] = Watch(fd, hung_up)
        try:
            self._epoll.register(fd, select.EPOLLRDHUP)
        except FileExistsError:
            # The socket is already being watched.
            self._epoll.modify(fd, select.EPOLLRDHUP)
        except OSError:
            # The socket is closed. Its transport will report that.
            pass
        return watch

    def remove(self, watch: Watch) -> None:
        """Removes `watch`. Does nothing if it was removed before or its socket is closed."""
        if self._watched.get(watch.fd) is watch:
            del self._watched[watch.fd]
            with suppress(OSError):
                self._epoll.unregister(watch.fd)

    def _ready(self) -> None:
        for fd, _ in self._epoll.poll(0):
            watch = self._watched.get(fd)
            if watch is not None:
                self.remove(watch)
                watch.hung_up()

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._watched.clear()
        self._epoll.close()
