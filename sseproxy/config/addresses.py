"""Listening addresses."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Final

_ADDRESS: Final = r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[A-Za-z0-9._-]*)):(?P<port>[0-9]{1,5})"
_PASSED_SOCKET: Final = r"systemd(?::(?P<name>[A-Za-z0-9_.@-]+))?"
_UNIX_ADDRESS: Final = r"unix:(?P<path>/[^|\x00]*[^/|\x00])(?:\|(?P<mode>0?[0-7]{3}))?"
# sun_path without its final zero byte (unix(7)).
_MAX_UNIX_PATH = 107


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address. An empty host means all interfaces; port 0 means any free port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `HOST:PORT`, `[IPV6]:PORT` or `:PORT`; the inverse of `str`. Raises `ValueError`."""
        match = re.fullmatch(_ADDRESS, text)
        if match is None or int(match["port"]) > 65535:
            raise ValueError("not HOST:PORT")
        if match["v6"] is not None:
            ipaddress.IPv6Address(match["v6"])
        return cls(match["v6"] or match["host"], int(match["port"]))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket. `mode` has the permissions of its file; a client needs write permission to connect."""

    path: str
    mode: int = 0o660

    @classmethod
    def parse(cls, text: str) -> UnixAddress:
        """Read `unix:PATH` or `unix:PATH|MODE` with an octal mode; the inverse of `str`. Raises `ValueError`."""
        match = re.fullmatch(_UNIX_ADDRESS, text)
        if match is None or len(os.fsencode(match["path"])) > _MAX_UNIX_PATH:
            raise ValueError("not unix:PATH")
        return cls(match["path"], int(match["mode"], 8)) if match["mode"] else cls(match["path"])

    def __str__(self) -> str:
        return f"unix:{self.path}|{self.mode:04o}"


@dataclass(frozen=True, slots=True)
class PassedSocket:
    """Sockets that the service manager passes (sd_listen_fds(3)): those called `name`, or all."""

    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> PassedSocket:
        """Read `systemd` or `systemd:NAME`; the inverse of `str`. Raises `ValueError`."""
        match = re.fullmatch(_PASSED_SOCKET, text)
        if match is None:
            raise ValueError("not systemd or systemd:NAME")
        return cls(match["name"])

    def __str__(self) -> str:
        return "systemd" if self.name is None else f"systemd:{self.name}"


Listen = Address | UnixAddress | PassedSocket
