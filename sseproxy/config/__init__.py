"""The configuration: a frozen, typed model, and the code that reads it. Every error has file:line:col."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .addresses import Address, Listen, PassedSocket, UnixAddress
    from .loading import load, override, parse, resolved, schema, single
    from .model import (
        TLS,
        AccessLog,
        Admin,
        Client,
        ClientLimits,
        Config,
        Ejection,
        Endpoint,
        Health,
        Ledger,
        Limits,
        Log,
        Match,
        Metrics,
        Probe,
        Reload,
        Retry,
        Route,
        RouteLimits,
        Target,
        Timeouts,
        Upstream,
        UpstreamTLS,
        UsageOptions,
    )

__all__ = [
    "TLS",
    "AccessLog",
    "Address",
    "Admin",
    "Client",
    "ClientLimits",
    "Config",
    "Ejection",
    "Endpoint",
    "Health",
    "Ledger",
    "Limits",
    "Listen",
    "Log",
    "Match",
    "Metrics",
    "PassedSocket",
    "Probe",
    "Reload",
    "Retry",
    "Route",
    "RouteLimits",
    "Target",
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
_ADDRESSES = frozenset({"Address", "Listen", "PassedSocket", "UnixAddress"})


def __getattr__(name: str) -> object:
    """Imports a name when it is first used. So a worker, which reads no file, does not import PyYAML."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "loading" if name in _READING else "addresses" if name in _ADDRESSES else "model"
    return getattr(import_module(f".{module}", __name__), name)
