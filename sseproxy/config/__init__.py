"""The configuration: a frozen, typed model, and how it is read, with file:line:col in every error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .model import (
    TLS,
    AccessLog,
    Admin,
    Config,
    Limits,
    Match,
    Metrics,
    Reload,
    Route,
    RouteLimits,
    Timeouts,
    Upstream,
    UpstreamTLS,
    UsageOptions,
)
from .values import Address, Listen, PassedSocket, UnixAddress

if TYPE_CHECKING:
    from .loading import load, override, parse, resolved, schema, single

__all__ = [
    "TLS",
    "AccessLog",
    "Address",
    "Admin",
    "Config",
    "Limits",
    "Listen",
    "Match",
    "Metrics",
    "PassedSocket",
    "Reload",
    "Route",
    "RouteLimits",
    "Timeouts",
    "UnixAddress",
    "Upstream",
    "UpstreamTLS",
    "UsageOptions",
    "load",
    "override",
    "parse",
    "resolved",
    "schema",
    "single",
]

_READING = frozenset({"load", "override", "parse", "resolved", "schema", "single"})


def __getattr__(name: str) -> object:
    """What reads and writes files: a worker, which does neither, does not import a YAML parser."""
    if name not in _READING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import loading

    return getattr(loading, name)
