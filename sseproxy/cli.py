"""The command line. Errors go to standard error, and the exit status is 1. Wrong usage exits with 2, from argparse.

Each command imports what it needs only when it runs. A health check runs every few seconds and must be cheap; it needs
neither the proxy nor the model of the configuration. `tests/test_imports.py` checks what each command imports.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from . import __version__, config
from .errors import ListenError, SseproxyError

if TYPE_CHECKING:
    from .config import Config
    from .process.forkserver import ForkServer
    from .process.supervisor import Supervisor
    from .process.upgrade import Handover

# Seconds. Less than what Docker and others give a health check, so that this command can still report the error.
_HEALTH_TIMEOUT = 3.0
# Bytes of the reason why the proxy is not ready, and of the whole answer.
_MAX_REASON = 1000
_MAX_ANSWER = 16 * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except SseproxyError as error:
        # If the text cannot be written, for example to a full disk, the exit status still reports the failure.
        with suppress(OSError):
            sys.stderr.writelines(f"sseproxy: {line}\n" for line in f"{error}{_advice(error)}".splitlines())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _advice(error: SseproxyError) -> str:
    """What to do about an error at the start, beside what the error says. A reload cannot follow this advice."""
    if isinstance(error, ListenError) and error.in_use:
        flag = "--admin" if error.option == "admin.listen" else "--listen"
        return f"; is sseproxy running already? {flag} chooses another address"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sseproxy",
        description="A reverse proxy for OpenAI-compatible APIs: it forwards streams immediately and unchanged, and "
        "measures them.",
    )
    parser.add_argument("--version", action="version", version=f"sseproxy {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the proxy", description="Run the proxy.")
    source = serve.add_mutually_exclusive_group(required=True)
    source.add_argument("-c", "--config", metavar="FILE", help="configuration file")
    source.add_argument("--upstream", metavar="URL", help="no configuration file: send all requests to this API")
    note = "; overrides the file"
    serve.add_argument("--workers", metavar="N", help=f"number of worker processes, or auto for one per core{note}")
    _add_listeners(serve, note)
    # An upgrade tries the new code with this option, before the new code takes over.
    serve.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)
    serve.set_defaults(run=_serve)

    check = commands.add_parser(
        "check-config",
        help="check a configuration file",
        description="Check a configuration file and list all its mistakes.",
    )
    check.add_argument("file", metavar="FILE", help="configuration file")
    check.add_argument("--resolved", action="store_true", help="print the effective configuration; secrets are masked")
    check.set_defaults(run=_check)

    health = commands.add_parser(
        "healthcheck",
        help="check whether the proxy on this machine is ready",
        description="Ask the admin listener whether the proxy is ready. The exit status is 0 if it is, and 1 if not.",
    )
    health.add_argument(
        "--admin", default="127.0.0.1:9464", metavar="HOST:PORT", help="address of the admin listener (%(default)s)"
    )
    health.set_defaults(run=_healthcheck)

    top = commands.add_parser(
        "top",
        help="show the requests that are under way",
        description="Show the requests that are under way, as they change. Without a terminal, print them once.",
    )
    top.add_argument(
        "--url", default="http://127.0.0.1:9464", metavar="URL", help="URL of the admin listener (%(default)s)"
    )
    top.add_argument(
        "--token",
        metavar="T",
        help="the token in admin.token; SSEPROXY_ADMIN_TOKEN is better: others on this machine can see options",
    )
    top.set_defaults(run=_top)
    key = commands.add_parser(
        "key",
        help="make a new key for a client",
        description="Print a new key, which is not stored anywhere, and the entry for the configuration file.",
    )
    key.add_argument("name", metavar="NAME", help="name of the client")
    key.set_defaults(run=_key)

    schema = commands.add_parser(
        "schema",
        help="print the JSON Schema of the configuration file",
        description="Print the JSON Schema of the configuration file, for editors.",
    )
    schema.set_defaults(run=_schema)

    demo = commands.add_parser(
        "demo",
        help="run the demonstration, without an API",
        description="Run the proxy in front of a built-in backend, and show what it does with streams.",
    )
    demo.add_argument("--once", action="store_true", help="exit when the demonstration has ended")
    # The defaults are those of `Pace`. The help texts repeat them, because importing `demo` takes half a second.
    demo.add_argument("--ttft", type=_not_negative, metavar="S", help="seconds to the first token (0.5)")
    demo.add_argument("--rate", type=_positive, metavar="N", help="tokens per second (30)")
    demo.add_argument("--tokens", type=_count, metavar="N", help="tokens per answer (60)")
    _add_listeners(demo)
    demo.set_defaults(run=_demo)

    probe = commands.add_parser(
        "probe",
        help="take the place of an API while sseproxy doctor examines the hops",
        description="Run the probe: put it in the place of an API, and examine the hops in front of it with "
        "sseproxy doctor.",
    )
    probe.add_argument(
        "--listen", default="127.0.0.1:8081", metavar="HOST:PORT", help="address for the hops (%(default)s)"
    )
    probe.add_argument(
        "--token",
        metavar="T",
        help="the secret that the doctor must send; by default SSEPROXY_PROBE_TOKEN, or a new one that is printed",
    )
    probe.set_defaults(run=_probe)
    _add_doctor(commands)
    return parser


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="find out which hop holds streams back, cuts them, or harms them in another way",
        description="Examine the hops between a client and an API. Name their base URLs from the inside out: first the "
        "one next to the API, or to the probe, last the one that clients use. The exit status is 0 if all is well, 1 "
        "if something was found, and 2 if a hop could not be examined.",
    )
    doctor.add_argument("urls", nargs="+", metavar="URL", help="a base URL such as https://llm.example.com/v1")
    doctor.add_argument("--token", metavar="T", help="the token of the probe; by default SSEPROXY_PROBE_TOKEN")
    doctor.add_argument(
        "--model",
        metavar="M",
        help="examine an API without a probe, with this model",
    )
    doctor.add_argument(
        "--api-key-env", metavar="NAME", help="the environment variable with the key for the API or for a gateway"
    )
    doctor.add_argument(
        "--silence", metavar="TIME", help="also examine a silence of this length, such as 65s; at most 4m30s"
    )
    doctor.add_argument("--ca-file", metavar="FILE", help="certificates of the authorities to trust for https, in PEM")
    doctor.add_argument("--html", metavar="FILE", help="also write the report as one page of HTML")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.set_defaults(run=_doctor)


def _add_listeners(parser: argparse.ArgumentParser, note: str = "") -> None:
    parser.add_argument("--listen", metavar="HOST:PORT", help=f"address for clients (127.0.0.1:8080){note}")
    parser.add_argument(
        "--admin", metavar="HOST:PORT", help=f"address for /metrics and health checks (127.0.0.1:9464){note}"
    )


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0 up, got {text!r}")
    return number


def _positive(text: str) -> float:
    if not _not_negative(text):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return float(text)


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    from .process import start

    with closing(start.fork_server()) as fork_server:
        return _serve_with(options, fork_server)


def _serve_with(options: argparse.Namespace, fork_server: ForkServer) -> int:
    import uvloop

    from .observe.logs import log_as, set_up_logging
    from .process import upgrade

    handover = upgrade.receive()
    flags = {"listen": options.listen, "admin": options.admin, "workers": options.workers}

    def read() -> Config:
        if options.upstream is not None:
            return config.single(options.upstream, **flags)
        return config.override(config.load(options.config), **flags)

    settings = read()
    if options.trial:
        # Without logging, errors are plain lines. The process that started the trial writes them to its log.
        return uvloop.run(_try(settings, fork_server, handover))
    set_up_logging()
    log_as(settings)
    return uvloop.run(_run(settings, fork_server, read, options.config, handover))


async def _try(settings: Config, fork_server: ForkServer, handover: Handover | None) -> int:
    from .process.supervisor import Supervisor

    supervisor = Supervisor(settings, fork_server, handover=handover)
    supervisor.bind()
    await supervisor.trial()
    return 0


async def _run(
    settings: Config,
    fork_server: ForkServer,
    reread: Callable[[], Config],
    path: str | None,
    handover: Handover | None,
) -> int:
    import logging

    from .observe.logs import STANDARD_OUTPUT, Lines
    from .process import upgrade
    from .process.supervisor import Supervisor
    from .signals import hold_back

    supervisor = Supervisor(settings, fork_server, reread, path, upgrade.command(), handover)
    supervisor.bind()
    await supervisor.start()
    banner = summary(supervisor)
    if sys.stdout.isatty():
        out = Lines(STANDARD_OUTPUT)
        out.write(banner.encode())
        out.flush()
    else:
        # Here standard output has only the access log, so programs can read it.
        for line in banner.splitlines():
            logging.getLogger(__name__).info("%s", line.strip())
    status = await supervisor.run()
    # The loop removes its handlers when it closes. A signal after that must not change the exit status.
    hold_back()
    return status


def summary(supervisor: Supervisor) -> str:
    """Plain lines that list the addresses of the proxy and its routes."""
    settings = supervisor.config
    width = max(len(route.match.path) for route in settings.routes)
    lines = [f"sseproxy {__version__} listens on {', '.join(supervisor.urls)}"]
    for route in settings.routes:
        conditions = [*route.match.methods, *(f"model {glob}" for glob in route.match.model)]
        when = f" ({', '.join(conditions)})" if conditions else ""
        upstreams = [settings.upstream(target.name) for target in route.upstream]
        urls = ", ".join(endpoint.url for upstream in upstreams for endpoint in upstream.endpoints)
        lines.append(f"  {route.match.path:<{width}}  ->  {urls}{when}")
    if settings.probe is not None:
        lines.append(f"  {settings.probe.path:<{width}}  ->  the probe for sseproxy doctor")
    lines.append(f"  metrics and health: {supervisor.admin_url}/metrics /livez /readyz /live")
    lines.append(f"  workers: {supervisor.workers}")
    return "\n".join(lines) + "\n"


def _print(text: str) -> None:
    """Writes to standard output. Raises `SseproxyError` if that fails, for example because the disk is full."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, for example `head`, has ended. This is not an error.
        _discard_output()
    except OSError as error:
        _discard_output()
        raise SseproxyError(f"standard output: {(error.strerror or '').lower()}") from None


def _discard_output() -> None:
    """Discards what is still buffered. Otherwise the interpreter would try to write it again when it exits."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def _check(options: argparse.Namespace) -> int:
    from .relay.routes import unreachable

    settings = config.load(options.file)
    for route, why in unreachable(settings.routes):
        sys.stderr.write(f"sseproxy: warning: {settings.place(route, options.file)}: {why}\n")
    if exposed := settings.exposed_keys():
        sys.stderr.write(f"sseproxy: warning: {options.file}: {exposed}\n")
    if options.resolved:
        _print(config.resolved(settings))
        return 0
    routes, upstreams = len(settings.routes), len(settings.upstreams)
    _print(f"{options.file}: ok ({routes} route{'s'[: routes > 1]}, {upstreams} upstream{'s'[: upstreams > 1]})\n")
    return 0


def _healthcheck(options: argparse.Namespace) -> int:
    import socket

    from .config import Address

    try:
        address = Address.parse(options.admin)
    except ValueError:
        raise SseproxyError(f"--admin: expected HOST:PORT, got {options.admin!r}") from None
    # A listener on all interfaces can be reached on the loopback interface.
    host = "127.0.0.1" if address.host in ("", "0.0.0.0", "::") else address.host
    answer = b""
    try:
        with socket.create_connection((host, address.port), timeout=_HEALTH_TIMEOUT) as connection:
            # Without http.client, whose import takes as much CPU as the rest of this command.
            connection.sendall(b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n")
            while len(answer) < _MAX_ANSWER and (part := connection.recv(_MAX_ANSWER)):
                answer += part
    except OSError as error:
        raise SseproxyError(f"no answer from {options.admin}: {(error.strerror or str(error)).lower()}") from None
    head, _, reason = answer.partition(b"\r\n\r\n")
    protocol, _, status = head.partition(b" ")
    if not protocol.startswith(b"HTTP/1."):
        raise SseproxyError(f"no answer from {options.admin}: it is not HTTP")
    if status[:3] != b"200":
        raise SseproxyError(f"not ready: {reason[:_MAX_REASON].decode(errors='replace').strip()}")
    return 0


def _top(options: argparse.Namespace) -> int:
    import asyncio

    from . import top

    return asyncio.run(top.run(options.url, options.token or os.environ.get("SSEPROXY_ADMIN_TOKEN")))


def _key(options: argparse.Namespace) -> int:
    from .config.options import Expected
    from .config.values import read_name
    from .wire.credentials import digest, new_key, public_part

    try:
        name = read_name(options.name)
    except Expected as error:
        raise SseproxyError(f"NAME: {error}") from None
    key = new_key().encode()
    _print(
        f"{key.decode()}\n\n"
        "# The key is shown only now. Give it to the client. The file gets only its digest:\n"
        "clients:\n"
        f"  - name: {name}\n"
        f'    keys: ["sha256:{digest(key).hex()}"]  # {public_part(key)}\n'
    )
    return 0


def _schema(options: argparse.Namespace) -> int:
    import json

    _print(json.dumps(config.schema(), indent=2) + "\n")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .process import start

    with closing(start.fork_server()) as fork_server:
        return _demo_with(options, fork_server)


def _demo_with(options: argparse.Namespace, fork_server: ForkServer) -> int:
    import uvloop

    from . import demonstration
    from .demo import Pace
    from .observe.logs import set_up_logging

    given = {name: value for name in ("ttft", "rate", "tokens") if (value := getattr(options, name)) is not None}
    flags = {"listen": options.listen, "admin": options.admin, "once": options.once}
    set_up_logging()
    return uvloop.run(demonstration.run(Pace(**given), fork_server, **flags, write=_print))


def _probe(options: argparse.Namespace) -> int:
    import secrets

    import uvloop

    from .config import Address
    from .doctor import origin

    try:
        address = Address.parse(options.listen)
    except ValueError:
        raise SseproxyError(f"--listen: expected HOST:PORT, got {options.listen!r}") from None
    given = options.token or os.environ.get("SSEPROXY_PROBE_TOKEN")
    token = given or secrets.token_urlsafe(24)

    def listening(url: str) -> None:
        # A token that was given is a secret that is known already.
        variable = "" if given else f"SSEPROXY_PROBE_TOKEN={token} "
        _print(
            f"The probe answers at {url}\nExamine the hops in front of it, from the inside out"
            f"{', with the token that was given' if given else ''}:\n\n  {variable}sseproxy doctor {url} URL...\n\n"
        )

    uvloop.run(origin.serve(address, token, listening))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    import uvloop

    from .doctor import command

    return uvloop.run(command.run(options, _print))
