"""What a worker begins with: `python -m sseproxy.process.start CHANNEL LEDGER LISTENER...`.

Nearly all that it takes to start a worker are imports, and every reload starts as many as there are cores. So what
imports do that a worker has no use for is left out.
"""

from __future__ import annotations

import gc
import ssl
from collections.abc import Callable


def load() -> Callable[[], None]:
    """The worker's `main`, imported. Nothing is collected until it has frozen what was imported."""
    # Objects that live as long as the process are what collections would look at.
    gc.disable()
    # aiohttp makes two TLS contexts as it is imported, and reads all of the system's authorities for each, which is a
    # fifth of the CPU that the imports take. A worker makes its own (`config.files`); these trust nobody.
    ssl.SSLContext.set_default_verify_paths = lambda self: None  # type: ignore[method-assign]
    try:
        from .worker import main
    finally:
        # The class has it from its base again.
        del ssl.SSLContext.set_default_verify_paths
    return main


if __name__ == "__main__":
    load()()
