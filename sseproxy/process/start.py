"""Imports what a worker needs, and forks the server of workers from this process."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - a worker that connects to a host needs it
import gc
import ssl

from ..errors import SseproxyError
from ..observe import logs
from .forkserver import ForkServer, Main


def load() -> Main:
    """Imports the worker, and returns its `main`."""
    # Collections would visit the imported objects again and again, although they live as long as the process.
    gc.disable()
    # aiohttp creates two TLS contexts when it is imported, and loads the system's CA certificates into each. This takes
    # a fifth of the CPU of all imports. A worker creates its own contexts (`config.files`). The ones that aiohttp
    # creates now trust no certificate.
    ssl.SSLContext.set_default_verify_paths = lambda self: None  # type: ignore[method-assign]
    try:
        from .worker import main
    finally:
        # Now the method of the base class is visible again.
        del ssl.SSLContext.set_default_verify_paths
        gc.enable()
    return main


def fork_server() -> ForkServer:
    """Starts a fork server. Call it before there are any threads. Raises `SseproxyError`."""
    logs.open_standard_streams()
    main = load()
    try:
        return ForkServer(main)
    except OSError as error:
        raise SseproxyError(f"no process can be started: {error.strerror}") from None
