"""Lets `bench.soak` ask a process how much it has allocated. Python imports this module when it starts.

On SIGUSR1 the process writes a file named by its process id into the directory `PROBE`. The file has two numbers:
blocks in use of Python's allocator, and bytes in use of malloc (mallinfo2(3)). The kernel knows only the size of the
heap, and that rises for a while, by chance and in steps, even if everything is freed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from pathlib import Path


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks"),
            "keepcost",
        )
    ]


_libc = ctypes.CDLL(None)
_libc.mallinfo2.restype = _Mallinfo


def _tell(*_: object) -> None:
    gc.collect()
    info = _libc.mallinfo2()
    file = Path(os.environ["PROBE"]) / str(os.getpid())
    written = file.with_suffix(".new")
    written.write_text(f"{sys.getallocatedblocks()} {info.uordblks + info.hblkhd}")
    written.rename(file)


signal.signal(signal.SIGUSR1, _tell)
