"""The signals that a supervisor handles, and how they wait.

They must only reach the main thread, where the event loop calls their handlers. While an upgrade replaces the program
(execve), the main thread blocks them, so they wait for the new program. Another thread would still receive them, and
they would be lost. So each other thread calls `hold_back` first.
"""

from __future__ import annotations

import signal
from typing import Final

FOR_SUPERVISOR: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def hold_back() -> None:
    """Blocks these signals in this thread. They wait if all threads block them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FOR_SUPERVISOR)


def let_through() -> None:
    """Lets these signals reach this thread, also those that have waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_SUPERVISOR)
