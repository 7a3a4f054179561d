"""What the tests stand on does what it says."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from .harness import kept_port

# Of Linux 6.3: the ports, lowest and highest, from which a socket is given any.
_IP_LOCAL_PORT_RANGE = 51


def given_any_of(port: int) -> socket.socket:
    """A socket that is given any port, as long as it is `port`. Raises `OSError` if it is not to be had."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, struct.pack("=I", port << 16 | port))
        sock.bind(("127.0.0.1", 0))
    except OSError as error:
        sock.close()
        if error.errno == errno.ENOPROTOOPT:
            pytest.skip("this Linux has no IP_LOCAL_PORT_RANGE")
        raise
    return sock


def test_a_kept_port_is_given_to_nobody_and_a_server_may_listen_on_it() -> None:
    with kept_port() as port:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        with pytest.raises(OSError, match="in use"):
            given_any_of(port)
        for host in ("127.0.0.1", ""):
            with socket.create_server((host, port)), socket.create_connection(("127.0.0.1", port)):
                pass
        with pytest.raises(OSError, match="in use"):
            given_any_of(port)
    with given_any_of(port) as other:
        assert other.getsockname()[1] == port
