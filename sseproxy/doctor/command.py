"""`sseproxy doctor`: examines one hop after the other, and reports what was found."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from io import StringIO
from pathlib import Path

import msgspec
from rich.console import Console

from ..errors import CannotExamine, SseproxyError
from .examine import Plan, examine, examine_api, target_of
from .observed import Hop
from .report import Examined, Failure, as_json, as_page, conclude, printable, show
from .script import MAX_SECONDS

GOOD, FOUND, NOT_EXAMINED = 0, 1, 2

_TIME = re.compile(r"(?:([0-9]{1,3})m)?(?:([0-9]{1,4})s)?")
# Seconds. The probe sends for at most five minutes, and the stream has events before and after its silence.
_LONGEST_SILENCE = MAX_SECONDS - 30.0


async def run(options: argparse.Namespace, write: Callable[[str], None]) -> int:
    """Returns the exit status. `write` gets the report."""
    try:
        plan = msgspec.structs.replace(Plan(), silence=_silence(options))
        key = _key(options)
        token = options.token or os.environ.get("SSEPROXY_PROBE_TOKEN", "")
        if not (token or options.model):
            raise SseproxyError(
                "--token, or SSEPROXY_PROBE_TOKEN, is missing. The probe prints its token at its start; in the file of "
                "a proxy it is probe.token. For an API without a probe, use --model."
            )
    except SseproxyError as error:
        _complain(str(error))
        return NOT_EXAMINED
    hops: list[Hop] = []
    failures: list[Failure] = []
    errors = Console(stderr=True)
    status = errors.status("") if errors.is_terminal else nullcontext()
    with status as shown:
        for index, url in enumerate(options.urls):

            def progress(what: str, hop: str = f"{index + 1} of {len(options.urls)}  {url}") -> None:
                if shown is not None:
                    shown.update(printable(f"{hop}  {what}").replace("[", r"\["))

            try:
                target = target_of(url, token=token, key=key, ca_file=options.ca_file)
                if options.model:
                    hops.append(await examine_api(target, url, options.model, progress))
                else:
                    hops.append(await examine(target, url, progress, plan))
            except CannotExamine as error:
                failures.append(Failure(url=url, why=str(error)))
    report = conclude(hops, failures)
    if options.html:
        try:
            Path(options.html).write_text(as_page(report), encoding="utf-8")  # noqa: ASYNC240 - nothing else waits
        except OSError as error:
            _complain(f"--html: cannot write {options.html}: {(error.strerror or '').lower()}")
            return NOT_EXAMINED
    if options.json:
        write(as_json(report))
    else:
        write(_text(report))
    return NOT_EXAMINED if failures else FOUND if report.faulty else GOOD


def _complain(text: str) -> None:
    # If it cannot be written, the exit status still tells.
    with suppress(OSError):
        sys.stderr.write(f"sseproxy: {text}\n")


def _silence(options: argparse.Namespace) -> float | None:
    if options.silence is None:
        return None
    match = _TIME.fullmatch(options.silence)
    seconds = 60.0 * int(match[1] or 0) + int(match[2] or 0) if match else 0.0
    if not 0 < seconds <= _LONGEST_SILENCE:
        raise SseproxyError("--silence: expected a time such as 65s or 2m, and at most 4m30s")
    if options.model:
        raise SseproxyError("--silence: only a probe can be silent; leave out --model, or --silence")
    return seconds


def _key(options: argparse.Namespace) -> str | None:
    if options.api_key_env is None:
        return None
    key = os.environ.get(options.api_key_env, "")
    if not (key and key.isascii() and key.isprintable()):
        raise SseproxyError(f"--api-key-env: the variable {options.api_key_env} has no key; export it first")
    return key


def _text(report: Examined) -> str:
    """The report as the terminal, or a file, gets it."""
    text = StringIO()
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    show(report, Console(file=text, force_terminal=sys.stdout.isatty(), width=width, highlight=False))
    return text.getvalue()
