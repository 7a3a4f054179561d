"""`sseproxy top`: the live view in a terminal, and once for a pipe."""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sseproxy.top import Top

from .harness import DEADLINE, STREAM_HEAD, ScriptedUpstream, chunk, delta
from .served import ConfigFile, end, run, until_true
from .test_live import ADMIN, TOKEN, request

NOW = 1_800_000_000.0


def told(id: str, **more: Any) -> dict[str, Any]:
    usual = {
        "id": id,
        "since": NOW - 5,
        "route": "api",
        "upstream": "up",
        "endpoint": "h",
        "model": f"model-{id}",
        "client": "192.0.2.1",
        "status": None,
        "stream": False,
        "first_token_seconds": None,
        "quiet_since": NOW - 5,
        "deltas": 0,
        "outcome": None,
        "duration_seconds": None,
    }
    return usual | more


def showing(*rows: dict[str, Any], more: int = 0, cancel: bool = True) -> Top:
    top = Top()
    top.heard("snapshot", {"now": NOW, "cancel": cancel, "more": more, "rows": list(rows)})
    return top


def drawn(top: Top, width: int = 160, height: int | None = 40) -> str:
    written = io.StringIO()
    Console(width=width, file=written, force_terminal=False).print(top.picture(width, height))
    return written.getvalue()


def shown(top: Top, **size: Any) -> list[str]:
    """The models, from above."""
    return re.findall(r"model-(\w+)", drawn(top, **size))


def test_the_longest_silences_come_first_and_turn_amber_then_red() -> None:
    streams = {"stream": True, "status": 200, "first_token_seconds": 0.5, "deltas": 3}
    top = showing(
        told("a"),
        told("b", since=NOW - 90, quiet_since=NOW - 61, **streams),
        told("c", since=NOW - 90, quiet_since=NOW - 0.2, **streams),
        told("d", since=NOW - 90, quiet_since=NOW - 11, **streams),
        told("e", quiet_since=None),
    )
    assert shown(top) == ["b", "d", "a", "c", "e"]
    text = drawn(top)
    assert "5 under way" in text
    assert "1 wait for the first token" in text
    assert "2 silent for 10 s  1 for 60 s" in text
    assert "▲ 61 s" in text
    assert "△ 11 s" in text
    assert re.search(r"model-a .* 5\.\d s …", text)


def test_it_follows_the_changes() -> None:
    top = showing(told("a"), told("b"), told("c"))
    change = {"id": "a", "outcome": "cancelled", "duration_seconds": 6.0}
    top.heard("changes", {"now": NOW + 1, "more": 7, "rows": [change, told("d")], "left": ["b"]})
    text = drawn(top)
    assert sorted(shown(top)) == ["a", "c", "d"]
    assert "9 under way  7 of them not shown" in text
    assert "1 cancelled" in text
    # Another snapshot replaces all but what has ended.
    top.heard("snapshot", {"now": NOW + 2, "cancel": True, "more": 0, "rows": [told("d")]})
    assert sorted(shown(top)) == ["a", "d"]
    top.heard("changes", {"now": NOW + 30, "more": 0, "rows": [], "left": []})
    top.count()
    assert shown(top) == ["d"]


def test_tokens_a_second_are_counted() -> None:
    top = showing(told("a", stream=True))
    for second in range(1, 5):
        change = {"id": "a", "deltas": 10 * second * second, "quiet_since": NOW + second}
        top.heard("changes", {"now": NOW + second, "more": 0, "rows": [change], "left": []})
        top.count()
    assert [round(rate) for rate in top.requests["a"].rates] == [10, 30, 50, 70]
    assert re.search(r" 70 ▂▄▆█", drawn(top))
    assert "70 tokens/s" in drawn(top)


def test_keys_filter_sort_select_and_ask_before_they_cancel() -> None:
    top = showing(told("a", since=NOW - 3), told("b", since=NOW - 9), told("c", since=NOW - 6, route="other"))
    for key in "/Other":
        top.pressed(key)
    assert shown(top) == ["c"]
    assert top.pressed("q") is None
    top.pressed("\x7f")
    top.pressed("\r")
    assert top.filter == "Other"
    top.pressed("/")
    top.pressed("\x1b")
    assert len(shown(top)) == 3
    top.pressed("s")
    assert (top.sort, shown(top)) == ("since", ["b", "c", "a"])
    top.pressed("r")
    assert shown(top) == ["a", "c", "b"]
    assert top.pressed("x") is None
    assert not top.asked
    top.pressed("\x1b[B")
    top.pressed("j")
    top.pressed("j")
    top.pressed("\x1b[A")
    assert top.selected == "c"
    top.pressed("x")
    assert "Cancel the selected request?" in drawn(top)
    assert top.pressed("n") is None
    assert "Cancel the selected request?" not in drawn(top)
    top.pressed("x")
    assert (top.pressed("y"), top.asked) == ("cancel", "c")
    assert showing().pressed("q") == "quit"
    assert showing().pressed("p") == "pause"


def test_cancelling_that_is_off_is_said() -> None:
    top = showing(told("a"), cancel=False)
    top.pressed("j")
    top.pressed("x")
    assert not top.asked
    assert "admin.cancel" in drawn(top)


@pytest.mark.parametrize(("width", "height"), [(20, 5), (60, 12), (99, 24), (100, 24), (400, 100)])
def test_it_fits_into_any_terminal(width: int, height: int) -> None:
    top = showing(*(told(str(number)) for number in range(200)))
    for _ in range(150):
        top.pressed("j")
    lines = drawn(top, width, height).splitlines()
    assert all(len(line) <= width for line in lines)
    if height >= 12:
        assert len(lines) <= height
        assert "149" in shown(top, width=width, height=height)


def test_nothing_from_outside_reaches_the_terminal_as_a_command() -> None:
    evil = "\x1b]0;title\x07\x1b[2J[bold]x[/bold]\u202e"
    top = showing(told("a", model=evil, route=evil, client=evil, upstream=evil, endpoint=evil, outcome=evil))
    text = drawn(top, 400)
    assert "?[2J[bold]x[/bold]?" in text
    assert not {"\x1b", "\x07", "\u202e"} & {*text}


async def test_a_pipe_gets_what_is_under_way_once(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream, admin=ADMIN).serve() as served:
        url = f"http://127.0.0.1:{served.admin}"
        _, api = await request(served, upstream, "model-x")
        api.send(STREAM_HEAD, chunk(delta("Hi")))
        status, text, errors = await run("top", "--url", url, SSEPROXY_ADMIN_TOKEN=TOKEN, COLUMNS="150")
        assert (status, errors) == (0, "")
        assert "1 under way" in text
        assert re.search(r" api +up · 127\.0\.0\.1:\d+ +model-x +127\.0\.0\.1 ", text)
        assert "\x1b" not in text
        status, text, errors = await run("top", "--url", url, "--token", "another")
        assert (status, text) == (1, "")
        assert errors.startswith(f"sseproxy: {url} needs another token")
        status, text, errors = await run("top", "--url", url)
        assert (status, text) == (1, "")
        assert errors.startswith(f"sseproxy: {url} needs a token")


async def test_mistakes_are_told_in_one_line(upstream: ScriptedUpstream) -> None:
    for url, says in (
        ("http://127.0.0.1:1", "no answer from http://127.0.0.1:1: connection refused\n"),
        ("nowhere", "--url: expected a URL such as http://127.0.0.1:9464, got 'nowhere'"),
        ("http://h:99999", "--url: expected a URL"),
    ):
        status, text, errors = await run("top", "--url", url)
        assert (status, text) == (1, "")
        assert errors.startswith(f"sseproxy: {says}")
        assert errors.count("\n") == 1
    running = asyncio.ensure_future(run("top", "--url", upstream.url))
    api = await upstream.accept()
    await api.message()
    api.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    assert "status 404, and not an event stream of sseproxy" in (await running)[2]


async def test_in_a_terminal_it_shows_changes_and_cancels(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream, admin=ADMIN).serve() as served:
        client, _ = await request(served, upstream, "model-x")
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 150, 0, 0))
        before = termios.tcgetattr(theirs)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sseproxy", "top", "--url", f"http://127.0.0.1:{served.admin}"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"SSEPROXY_ADMIN_TOKEN": TOKEN, "TERM": "xterm"},
        )
        seen = bytearray()
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, lambda: seen.extend(os.read(ours, 65536)))

        async def until_it_shows(text: str) -> None:
            await until_true(lambda: text in seen.decode(errors="replace"))
            seen.clear()

        try:
            await until_it_shows("model-x")
            os.write(ours, b"p")
            await until_it_shows("sseproxy paused")
            os.write(ours, b"p")
            await until_it_shows("sseproxy live")
            os.write(ours, b"\x1b[Bx")
            await until_it_shows("Cancel the selected request?")
            os.write(ours, b"y")
            answer = await client.message()
            assert (answer.status, answer.get("x-should-retry")) == (503, "false")
            await until_it_shows("The request has ended: cancelled.")
            os.write(ours, b"q")
            async with asyncio.timeout(DEADLINE):
                assert await process.wait() == 0
            assert termios.tcgetattr(theirs) == before
        finally:
            await end(process)
            loop.remove_reader(ours)
            os.close(ours)
            os.close(theirs)
