"""The configuration that a worker receives: the same options as in the model, without pydantic.

A worker does not validate options, and to import pydantic would add half to the CPU that its start takes. The classes
here have the same attributes as those of the model. So code that uses a configuration works with both.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Self

from .files import for_clients, for_upstream

if TYPE_CHECKING:
    import ssl


class Secret:
    """A key. Its `repr` does not contain the key, so it does not get into a log by mistake."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def get_secret_value(self) -> str:
        return self._value


class Rate(NamedTuple):
    """At most `number` within so many seconds."""

    number: int
    seconds: int


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


# Cached, because to load the system's CA certificates takes 20 ms. A worker has one configuration for all its life, so
# it does not need to read the files again.
_for_upstreams = functools.cache(for_upstream)
