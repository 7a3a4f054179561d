"""Seeing that a peer hung up while nothing is read from its socket."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from contextlib import suppress


class Watch:
    """A socket that is watched. Descriptors are used again, so that a number alone does not tell whose it is."""

    __slots__ = ("fd", "hung_up")

    def __init__(self, fd: int, hung_up: Callable[[], None]) -> None:
        self.fd = fd
        self.hung_up = hung_up


class HangupWatch:
    """An event loop learns of a FIN by reading. Where reading is paused, an epoll set of its own tells it, which waits
    for nothing but hang-ups (epoll_ctl(2), EPOLLRDHUP).

    A socket may be closed while it is watched: the kernel forgets it then, and its number may already be another's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._watched: dict[int, Watch] = {}
        loop.add_reader(self._epoll.fileno(), self._ready)

    def add(self, fd: int, hung_up: Callable[[], None]) -> Watch:
        """Calls `hung_up`, once, when the peer of `fd` hangs up, until the watch that is returned is removed."""
        watch = self._watched[fd] = Watch(fd, hung_up)
        try:
            self._epoll.register(fd, select.EPOLLRDHUP)
        except FileExistsError:
            # Its socket is watched still.
            self._epoll.modify(fd, select.EPOLLRDHUP)
        except OSError:
            # It is closed, which its transport is about to say.
            pass
        return watch

    def remove(self, watch: Watch) -> None:
        """Does nothing if it was removed before, or its socket is closed; never touches another's watch."""
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
