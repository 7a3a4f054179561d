"""Listening sockets: TCP, Unix, or passed by the service manager (sd_listen_fds(3))."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterable
from contextlib import suppress

from ..config.addresses import Address, Listen, PassedSocket, UnixAddress
from ..errors import ListenError

Sockets = dict[Listen, list[socket.socket]]
"""The listening sockets on each configured address."""

BACKLOG = 1024
# The first descriptor that a service manager passes.
_LISTEN_FDS_START = 3


def listen(option: str, address: Listen) -> list[socket.socket]:
    """Listening sockets on `address`: one, or for `PassedSocket` as many as were passed.

    An empty host means every interface, with IPv6 if the machine has it. Raises `ListenError`, which names `option`.
    """
    try:
        match address:
            case Address():
                return [_listen_tcp(address)]
            case UnixAddress():
                return [_listen_unix(address)]
            case PassedSocket():
                return _passed(address)
    except OSError as error:
        raise ListenError(option, str(address), error) from None


def _listen_tcp(address: Address) -> socket.socket:
    if not address.host:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", address.port), family=family, backlog=BACKLOG, dualstack_ipv6=dual)
    family, *_, sockaddr = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(sockaddr[:2], family=family, backlog=BACKLOG)


def _listen_unix(address: UnixAddress) -> socket.socket:
    _remove_abandoned(address.path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(address.path)
        os.chmod(address.path, address.mode)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _remove_abandoned(path: str) -> None:
    """Removes the socket at `path` if no process listens on it. Raises `OSError` (EADDRINUSE) if a process does."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _passed(address: PassedSocket) -> list[socket.socket]:
    number = int(os.environ.get("LISTEN_FDS", "0")) if os.environ.get("LISTEN_PID") == str(os.getpid()) else 0
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    names += [""] * (number - len(names))
    fds = [
        fd for fd, name in enumerate(names[:number], _LISTEN_FDS_START) if address.name is None or name == address.name
    ]
    if not fds:
        raise OSError(0, "no such socket was passed by the service manager")
    # Copies, so that a later reload can use the passed descriptors again.
    return [socket.socket(fileno=os.dup(fd)) for fd in fds]


def refuse(address: Listen, sockets: Iterable[socket.socket]) -> None:
    """Stops `sockets` from accepting connections, even if other processes still have them open.

    Sockets that the service manager has passed are left alone, because they are its own as well.
    """
    if not isinstance(address, PassedSocket):
        for sock in sockets:
            sock.shutdown(socket.SHUT_RDWR)


def clean_up(addresses: Iterable[Listen]) -> None:
    """Removes the files of Unix sockets on `addresses`, unless another process listens on them."""
    for address in addresses:
        if isinstance(address, UnixAddress):
            with suppress(OSError):
                _remove_abandoned(address.path)


def without(sockets: Sockets, others: Sockets) -> Sockets:
    """The sockets on addresses that are not in `others`."""
    return {address: bound for address, bound in sockets.items() if address not in others}


def flat(sockets: Sockets) -> list[socket.socket]:
    """All of `sockets`, in order."""
    return [sock for bound in sockets.values() for sock in bound]


def close(sockets: Sockets) -> None:
    """Closes `sockets` in this process."""
    for sock in flat(sockets):
        sock.close()


def close_and_remove(sockets: Sockets) -> None:
    """Closes `sockets`, and removes the files of Unix sockets."""
    close(sockets)
    clean_up(sockets)


def url(sock: socket.socket, scheme: str = "http") -> str:
    """The address of `sock`: a URL, or `unix:` and a path."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port, *_ = sock.getsockname()
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
