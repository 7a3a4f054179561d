"""Imports what a worker needs, and starts the fork server."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - a worker that connects to a host needs it
import gc
import resource
import signal
import ssl

from ..errors import SseproxyError
from ..observe import logs
from .forkserver import ForkServer, Main


def load() -> Main:
    """Imports the worker, and returns its `main`."""
    # Collections would visit the imported objects again and again, although they live as long as the process.
    gc.disable()
    # aiohttp creates two TLS contexts when it is imported, and loads the system's CA certificates into each. This takes
    # a fifth of the CPU of all imports. The two that are created during this import have no CA certificates, and are
    # not used: a worker creates its own contexts (`config.files`).
    ssl.SSLContext.set_default_verify_paths = lambda self: None  # type: ignore[method-assign]
    try:
        from .worker import main
    finally:
        # Restores the original method, which is that of the base class.
        del ssl.SSLContext.set_default_verify_paths
        gc.enable()
    return main


def fork_server() -> ForkServer:
    """Starts the fork server. Call it before there are any threads. Raises `SseproxyError`.

    Raises this process's limit of descriptors to the hard limit. All processes inherit that.
    """
    logs.open_standard_streams()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Where the parent ignores it, nobody could wait for a child.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    main = load()
    try:
        return ForkServer(main)
    except OSError as error:
        raise SseproxyError(f"the fork server cannot be started: {error.strerror}") from None
