"""The proxies: how each one is started, and how much CPU and memory its processes use."""

from __future__ import annotations

import os
import shutil
import signal
import string
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import clock_gettime

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
_CPUCLOCK_SCHED = 2


class Peer:
    """A proxy that can be started on a port in front of an upstream. `needs` is the program or file that must exist.

    A proxy that cannot take the usual load gets a `share` of it, and only the measures in `only`. `more` are additional
    measures, which not all proxies can do.
    """

    def __init__(
        self,
        name: str,
        needs: Path | str,
        *command: str,
        files: tuple[str, ...] = (),
        share: float = 1.0,
        only: tuple[str, ...] = (),
        more: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.share = share
        self.measures = only or (*EVERYWHERE, *more)
        self.needs = shutil.which(needs) if isinstance(needs, str) else (str(needs) if needs.exists() else None)
        self._command = command
        self._files = files

    def start(
        self, port: int, upstream: int, directory: Path, cores: Iterable[int], workers: int
    ) -> subprocess.Popen[bytes]:
        values = {
            "PORT": port,
            "UPSTREAM": upstream,
            "DIRECTORY": directory,
            "HERE": HERE / "peers",
            "WORKERS": workers,
        }
        for name in self._files:
            template = string.Template((HERE / "peers" / name).read_text())
            (directory / name).write_text(template.safe_substitute(values))
        command = [string.Template(word).safe_substitute(values) for word in self._command]
        return subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


# The measures for all proxies.
EVERYWHERE = ("chunks", "requests", "first_token", "release", "capacity", "memory")
GO = ("env", "GOMAXPROCS=1")
PEERS = [
    Peer(
        "nginx",
        "nginx",
        *("nginx", "-c", "$DIRECTORY/nginx.conf", "-p", "$DIRECTORY"),
        files=("nginx.conf",),
        more=("workers",),
    ),
    Peer(
        "nginx+lua",
        Path("/usr/lib/nginx/modules/ngx_http_lua_module.so"),
        *("nginx", "-c", "$DIRECTORY/nginx_lua.conf", "-p", "$DIRECTORY"),
        files=("nginx_lua.conf",),
    ),
    Peer("haproxy", "haproxy", "haproxy", "-db", "-f", "$DIRECTORY/haproxy.cfg", files=("haproxy.cfg",)),
    Peer(
        "envoy",
        BIN / "envoy",
        *(
            str(BIN / "envoy"),
            "-c",
            "$DIRECTORY/envoy.yaml",
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "-l",
            "off",
        ),
        files=("envoy.yaml",),
    ),
    Peer(
        "caddy",
        BIN / "caddy",
        *(*GO, str(BIN / "caddy"), "run", "--adapter", "caddyfile", "--config", "$DIRECTORY/Caddyfile"),
        files=("Caddyfile",),
    ),
    Peer(
        "traefik",
        BIN / "traefik",
        *(*GO, str(BIN / "traefik"), "--configFile=$DIRECTORY/traefik.yaml"),
        files=("traefik.yaml", "traefik-routes.yaml"),
    ),
    Peer("aiohttp", sys.executable, sys.executable, "$HERE/plain_relay.py", "$PORT", "$UPSTREAM"),
    Peer(
        "sseproxy",
        sys.executable,
        *(sys.executable, "-m", "sseproxy", "serve", "-c", "$DIRECTORY/sseproxy.yaml"),
        files=("sseproxy.yaml",),
        more=("workers",),
    ),
    Peer(
        "litellm",
        HERE / ".venv/bin/litellm",
        # Otherwise it downloads a list of prices when it starts.
        *("env", "LITELLM_LOCAL_MODEL_COST_MAP=True"),
        *(str(HERE / ".venv/bin/litellm"), "--config", "$DIRECTORY/litellm.yaml", "--host", "127.0.0.1"),
        *("--port", "$PORT", "--num_workers", "1"),
        files=("litellm.yaml",),
        share=0.05,
        only=("chunks",),
    ),
]
# No proxy: the cost of backend, clients and kernel.
DIRECT = Peer("direct", "true", "sleep", "infinity", only=("chunks", "first_token", "capacity"))


def tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from tree(int(child))


def cpu(pid: int) -> float:
    """Seconds of user and system time so far, of `pid` and its descendants with all their threads.

    It reads the CPU clock of each process (clock_getcpuclockid(3)), because /proc/PID/stat counts in ticks of 10 ms.
    """
    return sum(clock_gettime((~each << 3) | _CPUCLOCK_SCHED) for each in tree(pid))


def memory(pid: int) -> float:
    """Bytes of anonymous memory of `pid` and its descendants."""
    kilobytes = 0
    for each in tree(pid):
        rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
        kilobytes += int(rollup.partition("Anonymous:")[2].split()[0])
    return kilobytes * 1024.0


def stop(pid: int) -> None:
    """Stops `pid` and its descendants until `go`."""
    for each in tree(pid):
        os.kill(each, signal.SIGSTOP)


def go(pid: int) -> None:
    for each in tree(pid):
        os.kill(each, signal.SIGCONT)
