"""Starts a worker: `python -m sseproxy.process.start CHANNEL LEDGER LISTENER...`.

Imports take most of the time that a worker needs to start, and every reload starts one worker per core. So this module
skips the part of the imports that a worker does not need.
"""

from __future__ import annotations

import gc
import ssl
from collections.abc import Callable


def load() -> Callable[[], None]:
    """Imports the worker, and returns its `main`. Garbage collection is off until `main` has frozen these objects."""
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
    return main


if __name__ == "__main__":
    load()()
