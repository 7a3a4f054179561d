"""Runs at the start of every interpreter that finds it: on SIGUSR1, a process tells what it has allocated.

The kernel only knows how large a heap has become, and that rises for a while, by chance and by steps, whatever is
freed. `PROBE` is the directory for the file, named by the process id: blocks of Python's allocator, and bytes of
malloc's (mallinfo2(3)) that are in use.
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
