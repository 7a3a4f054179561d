"""Draws configs/doctor.png: the report of the doctor on a real stack, as Chromium shows it.

    make doctor-picture

The stack is nginx without the lines of `configs/front`, and sseproxy in front of it. The machine should be quiet.
"""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from tests.doctor import TOKEN, probe
from tests.harness import kept_port
from tests.served import serve
from tests.test_front import BUFFERING, NGINX, running

PICTURE = Path(__file__).parent.parent / "configs" / "doctor.png"
# Pixels. The verdict, the strips and the first finding are in it.
WIDTH, HEIGHT, WHOLE = 900, 650, 2000
# Without a sandbox, because it may run as root, and without anything that asks for a network.
CHROMIUM = (
    *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *(f"--window-size={WIDTH},{WHOLE}", "--virtual-time-budget=1000"),
)


async def examine(page: Path, directory: Path) -> None:
    """Writes the report on the stack to `page`."""
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(probe())
        nginx = stack.enter_context(kept_port())
        await stack.enter_async_context(running(NGINX, directory, nginx, origin, *BUFFERING))
        served = await stack.enter_async_context(
            serve("--upstream", f"http://localhost:{nginx}/v1", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
        )
        urls = [f"http://localhost:{port}/v1" for port in (origin, nginx, served.port)]
        doctor = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sseproxy", "doctor", *urls, "--html", str(page)),
            env=os.environ | {"SSEPROXY_PROBE_TOKEN": TOKEN},
        )
        await doctor.wait()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def cropped(png: bytes, height: int) -> bytes:
    """The first rows of a PNG of 8-bit colours. A row depends only on those above it."""
    parts: dict[bytes, bytes] = {}
    at = 8
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        parts[kind] = parts.get(kind, b"") + png[at + 8 : at + 8 + size]
        at += size + 12
    width, _, _, colours = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    row = 1 + width * {2: 3, 6: 4}[colours]
    pixels = zlib.decompress(parts[b"IDAT"])[: height * row]
    head = struct.pack(">II", width, height) + parts[b"IHDR"][8:]
    return png[:8] + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        page, picture = directory / "report.html", directory / "report.png"
        uvloop.run(examine(page, directory))
        command = [*CHROMIUM, f"--user-data-dir={name}/chromium", f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        PICTURE.write_bytes(cropped(picture.read_bytes(), HEIGHT))


if __name__ == "__main__":
    main()
