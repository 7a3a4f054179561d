"""A configuration as a worker is handed it: the same options, without what it takes to read and check them.

A worker checks nothing, and pydantic would add half to the CPU that it takes to start. What the model makes of
itself here has its names and values, so that whoever uses a configuration need not know which of the two it has.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NoReturn, Self

from .files import for_clients, for_upstream

if TYPE_CHECKING:
    import ssl


class Secret:
    """A key, which nothing shows by mistake."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def get_secret_value(self) -> str:
        return self._value


class Options:
    """The options of one part of a configuration. Immutable."""

    def __init__(self, options: dict[str, object]) -> None:
        self.__dict__.update(options)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name} cannot be set: a configuration does not change")

    def model_copy(self, *, update: dict[str, object]) -> Self:
        return type(self)(self.__dict__ | update)


class TLS(Options):
    cert_file: str
    key_file: str | None
    min_version: str

    def context(self) -> ssl.SSLContext:
        return for_clients(self.cert_file, self.key_file, self.min_version)


class UpstreamTLS(Options):
    ca_file: str | None
    cert_file: str | None
    key_file: str | None

    def context(self) -> ssl.SSLContext:
        return _for_upstreams(self.ca_file, self.cert_file, self.key_file)


# A worker has one configuration, so that a file is what it was; to read the system's authorities takes 20 ms.
_for_upstreams = functools.cache(for_upstream)
