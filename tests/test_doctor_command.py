"""`sseproxy doctor` and `sseproxy probe` as a person runs them: what is printed, and the exit status."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
import trustme
from aiohttp import web

from sseproxy.demo import MODEL, Pace, backend
from sseproxy.doctor.client import Connection
from sseproxy.doctor.examine import examine, target_of
from sseproxy.doctor.observed import Event, Hop, Stream
from sseproxy.doctor.report import Failure, as_json, as_page, conclude, printable, strip
from sseproxy.errors import CannotExamine

from .doctor import QUICK, TOKEN, by_time, changes, hop, look_at, probe, url_of
from .harness import DEADLINE, STREAM_HEAD, Peer, ScriptedUpstream
from .served import run

ENVIRONMENT = {"SSEPROXY_PROBE_TOKEN": TOKEN}


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with probe() as port:
        yield port


async def test_two_hops_are_examined_within_a_minute_and_reported_in_three_ways(port: int, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    async with hop(port, changes(b"text/event-stream; charset=utf-8", b"text/plain; charset=utf-8       ")) as outer:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sseproxy", "doctor", url_of(port), url_of(outer), "--json", "--html", str(page)),
            env=os.environ | ENVIRONMENT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(30):
            out, errors = await process.communicate()
    assert (process.returncode, errors) == (1, b"")
    report = json.loads(out)
    verdict = f"The second hop, {url_of(outer)}, changes the Content-Type of a stream to text/plain; charset=utf-8."
    assert report["verdict"] == verdict
    assert not report["good"]
    first, second = report["hops"]
    assert first["findings"] == []
    (finding,) = second["findings"]
    assert (finding["kind"], finding["own"], finding["note"]) == ("content-type", True, False)
    assert len(second["observed"]["steady"]["events"]) == 60
    assert second["observed"]["upload"]["size"] > 20 << 20
    text = page.read_text()
    assert verdict in text
    assert TOKEN not in out.decode() + text


async def test_an_api_is_judged_by_its_arrival_times() -> None:
    runner = web.AppRunner(backend(Pace(ttft=0.1, rate=80, tokens=200)), handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        right = url_of(site.port)
        status, out, errors = await run("doctor", "--model", MODEL, right, SSEPROXY_PROBE_TOKEN="")
        assert (status, errors) == (0, "")
        assert out.startswith("No fault found: this path is unbuffered")
        async with hop(site.port, by_time(lambda: 0.3)) as outer:
            status, out, errors = await run("doctor", "--model", MODEL, right, url_of(outer), "--json")
        assert status == 1
        report = json.loads(out)
        assert [[finding["kind"] for finding in one["findings"]] for one in report["hops"]] == [[], ["buffered"]]
        assert report["hops"][1]["arrival"]["how"] == "time"
        status, out, _ = await run("doctor", "--model", "none", url_of(1), "--api-key-env", "A_KEY", A_KEY="sk-x")
        assert status == 2
        assert "it cannot be connected to (connection refused)" in " ".join(out.split())
    finally:
        await runner.cleanup()


async def test_what_cannot_be_examined_says_why(port: int, upstream: ScriptedUpstream) -> None:
    async def why(url: str, token: str = TOKEN) -> str:
        with pytest.raises(CannotExamine) as raised:
            await examine(target_of(url, token=token), url, lambda _: None, QUICK)
        assert "secret" not in str(raised.value)
        return str(raised.value)

    assert "it answers 401" in await why(url_of(port), "a-wrong-token")
    assert "is the token right" in await why(url_of(port), "a-wrong-token")
    assert "it answers 404" in await why(f"http://127.0.0.1:{port}/v2")
    assert "run sseproxy probe, or set the option probe" in (await why(f"http://127.0.0.1:{port}/v2")).lower()
    assert "connection refused" in await why(url_of(1))
    assert "no TLS connection can be made" in await why(f"https://127.0.0.1:{port}/v1")
    for url in ("edge.example", "ftp://edge.example", "https://user:secret@edge.example/v1", "https://e/v1?key=secret"):
        assert "it is not a base URL such as" in await why(url)

    async def answered(*data: bytes) -> str:
        asked = asyncio.ensure_future(why(upstream.url + "/v1"))
        peer = await upstream.accept()
        await peer.message()
        peer.send(*data)
        peer.close()
        return await asked

    assert "it closes the connection when the probe is asked" in await answered(b"")
    assert "it is not HTTP/1.1" in await answered(b"SSH-2.0-OpenSSH\r\n\r\n")
    page = b"<html><body><h1>Bad\x1b[31m Gateway</h1>" + b"x" * 5000
    said = await answered(b"HTTP/1.1 502 Bad\r\nContent-Length: %d\r\n\r\n%b" % (len(page), page))
    assert "it answers 502" in said
    assert "\x1b" not in said
    assert len(said) < 500
    assert "is there a probe behind it? For an API, use --model." in await answered(STREAM_HEAD, b"0\r\n\r\n")
    assert re.search(r"it answers 200 and closes the connection after [\d.]+ s when", await answered(STREAM_HEAD))


async def test_a_key_and_a_token_that_are_sent_back_are_not_told() -> None:
    async def echoes(peer: Peer) -> None:
        request = await peer.message()
        said = json.dumps({"error": {"message": f"{request.get('authorization')} {request.body.decode()}"}}).encode()
        peer.send(b"HTTP/1.1 403 No\r\nX-Key: %b\r\nContent-Length: %d\r\n\r\n%b" % (b"sk-secret", len(said), said))
        await peer.gone()

    async with ScriptedUpstream(echoes) as upstream:
        url = upstream.url + "/v1"
        with pytest.raises(CannotExamine) as raised:
            await examine(target_of(url, token=TOKEN, key="sk-secret"), url, lambda _: None, QUICK)
    assert "Bearer ***" in str(raised.value)
    assert "sk-secret" not in str(raised.value)
    assert TOKEN not in str(raised.value)


async def test_tls_is_verified(port: int, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)

    async def relay(peer: Peer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def back() -> None:
            with suppress(ConnectionError):
                while data := await reader.read(65536):
                    peer.send(data)
            peer.close()

        task = asyncio.ensure_future(back())
        try:
            while data := await peer.reader.read(65536):
                writer.write(data)
        finally:
            task.cancel()
            writer.transport.abort()

    async with ScriptedUpstream(relay, tls=context) as upstream:
        url = f"https://localhost:{upstream.port}/v1"
        with pytest.raises(CannotExamine, match=r"its certificate is not trusted .* name its authority with --ca-file"):
            await examine(target_of(url, token=TOKEN), url, lambda _: None, QUICK)
        target = target_of(url, token=TOKEN, ca_file=str(tmp_path / "ca.pem"))
        examined = conclude([await examine(target, url, lambda _: None, QUICK)], [])
        assert not examined.faulty, examined.verdict
    with pytest.raises(CannotExamine, match="--ca-file: not a readable file"):
        target_of("https://h/v1", ca_file=str(tmp_path / "none"))


USAGE = {
    ("doctor", "http://h/v1"): "--token, or SSEPROXY_PROBE_TOKEN, is missing",
    ("doctor", "http://h/v1", "--token", "t", "--silence", "5"): "--silence: expected a time such as 65s",
    ("doctor", "http://h/v1", "--token", "t", "--silence", "5m"): "--silence: expected a time such as 65s",
    ("doctor", "http://h/v1", "--model", "m", "--silence", "5s"): "--silence: only a probe can be silent",
    ("doctor", "http://h/v1", "--model", "m", "--api-key-env", "NONE"): "--api-key-env: the variable NONE has no key",
}


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
async def test_wrong_usage_is_no_examination(arguments: tuple[str, ...]) -> None:
    status, out, errors = await run(*arguments, SSEPROXY_PROBE_TOKEN="")
    assert (status, out) == (2, "")
    assert errors.startswith(f"sseproxy: {USAGE[arguments]}")


async def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    status, _, errors = await run("doctor", url_of(1), "--html", str(tmp_path), **ENVIRONMENT)
    assert status == 2
    assert errors == f"sseproxy: --html: cannot write {tmp_path}: is a directory\n"


async def test_the_probe_says_how_to_use_it_and_ends_when_it_is_told_to(port: int) -> None:
    for listen, arguments, environment in (
        ("127.0.0.1:0", [], {}),
        ("127.0.0.1:0", ["--token", TOKEN], {}),
        (":0", [], ENVIRONMENT),
    ):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sseproxy", "probe", "--listen", listen, *arguments),
            env=os.environ | {"SSEPROXY_PROBE_TOKEN": ""} | environment,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            said = (await process.stdout.readuntil(b"URL...\n")).decode()
        token, url = re.findall(r"^  (?:SSEPROXY_PROBE_TOKEN=(\S+) )?sseproxy doctor (\S+) URL", said, re.M)[0]
        assert url.startswith("http://127.0.0.1:")
        assert bool(token) != bool(arguments or environment)
        assert TOKEN not in said
        token = token or TOKEN
        assert len(token) >= 16
        connection = await Connection.open(target_of(url, token=token))
        connection.close()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE):
            assert await process.wait() == 0
    status, _, errors = await run("probe", "--listen", f"127.0.0.1:{port}")
    assert (status, errors) == (
        1,
        (
            f"sseproxy: --listen: cannot listen on 127.0.0.1:{port}: address already in use; "
            "is sseproxy running already? --listen chooses another address\n"
        ),
    )
    status, _, errors = await run("probe", "--listen", "here")
    assert (status, errors) == (1, "sseproxy: --listen: expected HOST:PORT, got 'here'\n")


# --- reports ---


class _Page(HTMLParser):
    """Counts tags, and collects what a page loads from outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


def evil() -> Hop:
    """A hop that says what a page or a terminal might obey."""
    text = "<script>alert(1)</script>\x1b[31m\u202e"
    events = [Event(0.1 * number, 0.1 * number + 0.01, 256) for number in range(20)]
    fields = {"server": text, "via": text, "content-type": text}
    return Hop(url=f"http://h/{text}", steady=Stream(status=200, version="1.1", fields=fields, events=events))


async def test_a_page_is_whole_and_safe(port: int) -> None:
    examined = conclude([await look_at(port), evil()], [Failure(url="http://third/v1", why="<b>it is away</b>")])
    text = as_page(examined)
    page = _Page(text)
    assert page.outside == []
    assert "url(" not in text
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.tags.count("svg") == 3
    assert page.tags.count("circle") >= 2 * 15
    assert all(one.isprintable() or one == "\n" for one in text)
    assert "http://third/v1 could not be examined" in text
    assert json.loads(as_json(examined))["not_examined"] == [{"url": "http://third/v1", "why": "<b>it is away</b>"}]


async def test_what_could_not_be_examined_is_said_first(port: int) -> None:
    """A reader who stops after "No fault found" would take a path for good that nobody has seen."""
    verdict = conclude([await look_at(port)], [Failure(url="http://third/v1", why="it is away")]).verdict
    assert verdict.startswith(
        "http://third/v1 could not be examined: it is away. As far as the path was examined: No fault found"
    )


def test_a_terminal_gets_nothing_to_obey(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from sseproxy.doctor.report import show

    show(conclude([evil()], []), Console(width=100))
    out = capsys.readouterr().out
    assert all(one.isprintable() or one == "\n" for one in out)
    assert "<script>" in out
    assert printable("a\x1b[31mb") == "a?[31mb"


def test_a_strip_has_a_dot_where_events_were() -> None:
    assert strip([0.0, 1.0], 1.0, 10) == "·        ·"
    assert strip([0.5] * 5, 1.0, 10) == "     ●    "
    assert strip([0.5, 0.55], 1.0, 10) == "     •    "
    assert strip([], 1.0, 3) == "   "


def test_a_page_has_a_comment_of_nginx_on_a_line_of_its_own() -> None:
    fields = {"server": "nginx", "content-type": "text/event-stream", "content-encoding": "gzip"}
    events = [Event(0.1 * number, 0.1 * number, 256) for number in range(20)]
    steady = Stream(status=200, version="1.1", fields=fields, events=events)
    assert "<code>gzip off;<br># or gzip_types" in as_page(conclude([Hop(url="http://h/v1", steady=steady)], []))
