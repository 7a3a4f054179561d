"""The probe: whom it answers, what it sends, and its bounds. Alone, and inside a running proxy."""

from __future__ import annotations

import asyncio
import signal
import socket
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.doctor import origin as origin_module
from sseproxy.doctor.client import Answer, Connection, Target, until
from sseproxy.doctor.examine import target_of
from sseproxy.doctor.origin import NAMES, Origin
from sseproxy.doctor.script import (
    HEARTBEAT,
    MAX_RATE,
    MAX_SECONDS,
    MAX_STREAMS,
    MAX_UPLOAD,
    MODEL,
    Asked,
    Mark,
    Report,
    Writer,
    asked_at_start,
    asked_in,
    is_unaltered,
    mark_in,
    report_in,
    request,
    text_in,
)
from sseproxy.ledger.table import Ledger
from sseproxy.wire.framing import LAST_CHUNK, frame

from .doctor import TOKEN, probe, url_of
from .harness import DEADLINE, Peer, ScriptedUpstream
from .served import ConfigFile, run


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with probe() as port:
        yield port


async def ask(port: int, body: bytes, *, path: str = "/v1", seconds: float = DEADLINE) -> Answer:
    """The whole answer to a request with this body."""
    target = target_of(f"http://127.0.0.1:{port}{path}")
    connection = await Connection.open(target)
    try:
        answer = connection.ask(target.head(len(body)) + body, Asked())
        await until(answer, seconds)
        return answer
    finally:
        connection.close()


def asking(**more: Any) -> bytes:
    usual: dict[str, Any] = {"token": TOKEN, "events": 2, "every": 0.01}
    return request(Asked(**usual | more))


# --- what it sends ---


@given(st.integers(256, 65536), st.lists(st.floats(0, 300), min_size=1, max_size=20), st.booleans())
def test_each_event_has_its_size_its_number_and_its_time(size: int, times: list[float], beats: bool) -> None:
    writer = Writer(size, "1.1")
    events = [writer.event(sent) for sent in times]
    assert {len(event) for event in events} == {size}
    marks = [mark_in(text_in(event.removeprefix(b"data: "))) for event in events]
    assert [mark.number for mark in marks if mark] == list(range(len(times)))
    assert all(mark and abs(mark.sent - sent) < 1e-5 for mark, sent in zip(marks, times, strict=True))
    known = [mark for mark in marks if mark]
    stream = (HEARTBEAT if beats else b"").join(events) + writer.end()
    assert is_unaltered(stream, size, known, ended=True)
    assert is_unaltered(stream[: -len(writer.end())], size, known, ended=False)
    assert not is_unaltered(stream, size, known, ended=False)


@given(st.data())
def test_any_byte_that_is_changed_is_noticed(data: st.DataObject) -> None:
    writer = Writer(256, "1.1")
    stream = b"".join(writer.event(0.1 * number) for number in range(4)) + writer.end()
    at = data.draw(st.integers(0, len(stream) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != stream[at]))
    changed = stream[:at] + bytes([other]) + stream[at + 1 :]
    events = [event for event in changed.split(b"\n\n") if event]
    marks = [mark for event in events if (mark := mark_in(text_in(event.removeprefix(b"data: "))))]
    # Four events with their digests cannot be another stream of the probe.
    assert not (len(marks) == 4 and is_unaltered(changed, 256, marks, ended=True))


@given(st.binary())
def test_anything_may_come_as_a_request_or_as_an_answer(body: bytes) -> None:
    for read in (asked_in, asked_at_start):
        try:
            read(body)
        except ValueError:
            pass
    assert report_in(body) is None
    assert text_in(body) == ""
    assert mark_in(body.decode("latin-1")) is None


def an_answer(coding: bytes = b"") -> bytes:
    """The bytes of an answer of the probe with three events, after an interim one."""
    writer = Writer(256, "1.1")
    parts = [*(writer.event(0.1 * number) for number in range(3)), HEARTBEAT, writer.end()]
    if coding:
        deflater = zlib.compressobj(wbits=31 if coding == b"gzip" else 15)
        parts = [*(deflater.compress(part) + deflater.flush(zlib.Z_SYNC_FLUSH) for part in parts), deflater.flush()]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    head += b"Content-Encoding: %b\r\n" % coding if coding else b""
    return b"HTTP/1.1 100 Continue\r\n\r\n" + head + b"\r\n" + b"".join(map(frame, parts)) + LAST_CHUNK


@pytest.mark.parametrize("coding", [b"", b"gzip", b"deflate"])
def test_an_answer_is_read_however_it_is_split(coding: bytes) -> None:
    data = an_answer(coding)
    for at in range(len(data) + 1):
        answer = Answer(perf_counter(), Asked(events=3))
        for part in (data[:at], data[at:]):
            if part:
                answer.feed(part)
        read = answer.stream()
        assert (read.intact, len(read.events), read.garbled, read.rewritten, read.comments) == (
            True,
            3,
            False,
            False,
            1,
        )
        assert answer.continued
        assert answer.reusable


@given(st.data())
def test_an_answer_that_was_changed_is_read_without_harm(data: st.DataObject) -> None:
    whole = an_answer(data.draw(st.sampled_from([b"", b"gzip"])))
    at, until_ = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    changed = whole[:at] + data.draw(st.binary(max_size=30)) + whole[until_:]
    answer = Answer(perf_counter(), Asked(events=3))
    cut = data.draw(st.integers(0, len(changed)))
    answer.feed(changed[:cut])
    answer.feed(changed[cut:])
    answer.lost(data.draw(st.sampled_from([None, ConnectionResetError()])))
    assert answer.over
    read = answer.stream()
    assert all(one.isprintable() for value in read.fields.values() for one in value)


async def test_a_stream_is_what_a_client_of_openai_reads(port: int) -> None:
    async with openai.AsyncOpenAI(base_url=url_of(port), api_key="unused", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            stream=True,
            messages=[{"role": "user", "content": "probe"}],
            extra_body={"probe": {"token": TOKEN, "events": 3, "every": 0.01}},
        )
        texts = [chunk.choices[0].delta.content async for chunk in stream]
    assert [mark.number for text in texts if text and (mark := mark_in(text))] == [0, 1, 2]


async def test_a_silence_a_beat_and_a_death_come_when_they_are_asked_for(port: int) -> None:
    answer = await ask(port, asking(events=4, lull=2, silence=0.3, heartbeat=0.1))
    times = [event.received for event in answer.events]
    assert answer.stream().intact
    assert answer.stream().comments == 2
    assert times[2] - times[1] >= 0.2
    for reset, end in ((False, "fin"), (True, "reset")):
        stream = (await ask(port, asking(events=4, cut=2, reset=reset))).stream()
        assert (len(stream.events), stream.end, stream.garbled) == (2, end, False)


# --- whom it answers ---

REFUSED = {
    "no token": (request(Asked()), 401, "The token is wrong."),
    "another token": (request(Asked(token="x" * 30)), 401, "The token is wrong."),
    "half a character": (b'{"probe":{"token":"\\ud800"}}', 40, ""),
    "no member": (b'{"model":"m","messages":[]}', 400, "no member probe"),
    "no JSON": (b"{", 400, "not valid"),
    "nested": (b'{"x":' + b"[" * 20_000, 400, "not valid"),
    "no Unicode": (b'{"probe":{"token":"\xff"}}', 400, "not valid"),
    "a wrong type": (b'{"probe":{"token":1}}', 400, "not valid"),
    "too fast": (asking(size=65536, every=0.001), 400, "at most 256 KiB a second"),
    "too long": (asking(events=30_000, every=1.0), 400, "at most 300 seconds"),
    "too long a silence": (asking(silence=299.0, before=299.0), 400, "at most 300 seconds"),
    "larger than a request": (request(Asked(token=TOKEN), filler=100_000), 413, "at most 65536 bytes"),
    "an upload of somebody else": (request(Asked(upload=True), filler=100_000), 401, "The token is wrong."),
    "no member in an upload": (b'{"messages":"' + b"." * 100_000, 400, "no member probe"),
    "an upload without end": (request(Asked(token=TOKEN, upload=True), filler=MAX_UPLOAD), 413, "at most"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_it_does_not_answer_it_refuses_and_says_why(case: str, port: int) -> None:
    body, status, why = REFUSED[case]
    answer = await ask(port, body)
    assert str(answer.status).startswith(str(status))
    assert why in answer.stream().message
    assert TOKEN not in bytes(answer.body).decode()
    assert (await ask(port, asking())).stream().intact, "it goes on"


async def test_it_answers_no_sooner_than_an_api(port: int) -> None:
    # A hop that has not yet seen the end of the request may cut an answer that comes sooner. Timers of a loop may be
    # early by the age of its clock, so the bound is half of what the probe waits.
    for body in (asking(id=1), asking(left=1), request(Asked(token=TOKEN, upload=True), filler=1 << 20)):
        head_at = (await ask(port, body)).stream().head_at
        assert head_at is not None
        assert head_at >= 0.005


async def test_it_answers_nothing_else(port: int) -> None:
    peer = Peer(*await asyncio.open_connection("127.0.0.1", port))
    for start in (b"GET /v1/chat/completions", b"POST /v1/completions", b"POST /"):
        peer.send(start + b" HTTP/1.1\r\nHost: probe\r\nContent-Length: 0\r\n\r\n")
        answer = await peer.message()
        assert answer.status == 404
        assert "POST /v1/chat/completions" in answer.json()["error"]["message"]
    peer.close()


async def test_two_at_a_time_are_answered_by_all_workers_together() -> None:
    ledger = Ledger(rows=2)
    columns = ledger.columns(NAMES, ())
    rows = [ledger.row(ledger.take_row(), columns) for _ in range(2)]
    origins = [Origin(TOKEN, row) for row in rows]
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in origins]
    for origin, sock in zip(origins, socks, strict=True):
        await origin.start(sock)
    ports = [sock.getsockname()[1] for sock in socks]
    streams, held = [], []
    for place in range(MAX_STREAMS):
        target = target_of(url_of(ports[place % 2]))
        held.append(await Connection.open(target))
        body = asking(events=2, every=100.0)
        streams.append(held[-1].ask(target.head(len(body)) + body, Asked()))
        await until(streams[-1], DEADLINE, events=1)
    answer = await ask(ports[0], asking())
    assert (answer.status, answer.stream().fields["retry-after"]) == (429, "1")
    held[0].close()
    async with asyncio.timeout(DEADLINE):
        while (await ask(ports[1], asking())).status == 429:
            pass
    for connection in held:
        connection.close()
    for origin in origins:
        await origin.close()
    assert ledger.count(NAMES[0]).total() == 0


async def test_a_client_that_leaves_is_reported_by_any_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(rows=2)
    columns = ledger.columns(NAMES, ())
    origins = [Origin(TOKEN, ledger.row(ledger.take_row(), columns)) for _ in range(2)]
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in origins]
    for origin, sock in zip(origins, socks, strict=True):
        await origin.start(sock)
    one, other = [sock.getsockname()[1] for sock in socks]
    for stream in (5, 6):
        target = target_of(url_of(one))
        connection = await Connection.open(target)
        body = asking(id=stream, events=2, every=100.0)
        answer = connection.ask(target.head(len(body)) + body, Asked())
        await until(answer, DEADLINE, events=1)
        connection.close()
    for stream in (5, 6):
        report = report_in(bytes((await ask(other, asking(left=stream))).body))
        assert report is not None
        assert report.known
        assert report.left is not None
    await ask(one, asking(id=7))
    report = report_in(bytes((await ask(other, asking(left=7))).body))
    assert report == Report(known=True, left=None, version="1.1")
    monkeypatch.setattr(origin_module, "_LOOK_FOR", 0.05)
    report = report_in(bytes((await ask(other, asking(left=8))).body))
    assert report == Report(known=False, version="1.1")
    for origin in origins:
        await origin.close()


def test_the_bounds_are_those_that_are_promised() -> None:
    assert (MAX_STREAMS, MAX_RATE, MAX_SECONDS) == (2, 256 * 1024, 300)


# --- inside a proxy ---

PROBE = f"{{token: {TOKEN}}}"
INSIDE = "/sseproxy-probe/v1"


async def test_inside_a_proxy_it_answers_only_who_has_the_token(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with ConfigFile(tmp_path, upstream, probe=PROBE, workers="2").serve() as served:
        for _ in range(4):
            assert (await ask(served.port, asking(), path=INSIDE)).stream().intact
        assert (await ask(served.port, request(Asked(token="x" * 30)), path=INSIDE)).status == 401
        target = target_of(f"http://127.0.0.1:{served.port}{INSIDE}")
        connection = await Connection.open(target)
        body = asking(id=9, events=2, every=100.0)
        answer = connection.ask(target.head(len(body)) + body, Asked())
        await until(answer, DEADLINE, events=1)
        left = perf_counter() - answer.sent
        connection.close()
        for _ in range(3):
            report = report_in(bytes((await ask(served.port, asking(left=9), path=INSIDE)).body))
            assert report is not None
            assert report.left is not None
            assert report.left - left < 1
        route = 'route="sseproxy-probe",upstream="sseproxy-probe"'
        await served.until(rf'requests_total\{{code="401".*{route}\}}', 1)
        await served.until(rf'requests_total\{{.*outcome="client_gone_mid_stream".*{route}\}}', 1)
        _, _, metrics = await served.get("/metrics")
        assert TOKEN not in metrics
    assert not upstream.connections
    assert TOKEN.encode() not in served.errors + served.logged


async def test_without_it_in_the_file_there_is_none(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    file = ConfigFile(tmp_path, upstream, probe=PROBE)
    async with file.serve() as served:
        assert (await ask(served.port, asking(), path=INSIDE)).status == 200
        file.write(upstream)
        served.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(DEADLINE):
            while (answer := await ask(served.port, asking(), path=INSIDE)).status == 200:
                pass
        assert answer.status == 404
        assert "No route for POST /sseproxy-probe/v1/chat/completions" in answer.stream().message


WRONG = {
    "{path: /probe}": "probe.token: required key is missing",
    "{token: short}": "probe.token: expected a token: at least 16 visible ASCII characters",
    f"{{token: '{TOKEN} {TOKEN}'}}": "probe.token: expected a token: at least 16 visible ASCII characters",
    f"{{token: {{{TOKEN}: x}}}}": "probe.token: expected a token: at least 16 visible ASCII characters",
    f"{{token: {TOKEN}, path: probe}}": "probe.path: expected a path such as /v1",
    f"{{token: {TOKEN}, path: /v1}}": "probe.path: expected a path that no route has, got that of routes[0]",
    f"{{token: {TOKEN}, paths: /v2}}": "probe.paths: unknown key; expected one of path, token; did you mean 'path'?",
}


@pytest.mark.parametrize("options", WRONG)
async def test_options_that_make_no_sense_are_refused(options: str, tmp_path: Path, upstream: ScriptedUpstream) -> None:
    file = ConfigFile(tmp_path, upstream, probe=options)
    status, _, errors = await run("check-config", str(file.path))
    assert status == 1
    (line,) = errors.splitlines()
    assert WRONG[options] in line
    assert line.startswith(f"sseproxy: {file.path}:")
    assert TOKEN not in line


async def test_the_path_and_the_names_are_its_own(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    routes = "[{name: sseproxy-probe, match: {path: /sseproxy-probe}, upstream: up}]"
    file = ConfigFile(tmp_path, upstream, probe=PROBE, routes=routes)
    _, _, errors = await run("check-config", str(file.path))
    assert "probe.path: expected a path that no route has, got that of routes[0]" in errors
    assert "routes[0].name: expected another name: sseproxy-probe is the name of the probe" in errors
    file.write(upstream, routes=routes)
    assert (await run("check-config", str(file.path)))[0] == 0


async def test_the_token_is_not_shown(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    file = ConfigFile(tmp_path, upstream, probe=PROBE)
    status, out, _ = await run("check-config", "--resolved", str(file.path))
    assert status == 0
    assert "probe:" in out
    assert TOKEN not in out


def test_a_target_shows_no_path_twice() -> None:
    for written in ("https://h/v1", "https://h/v1/", "https://h/v1/chat/completions"):
        assert isinstance(target_of(written), Target)
        assert str(target_of(written).url) == "https://h/v1/chat/completions"


def test_a_mark_is_nothing_else() -> None:
    assert mark_in("000001 0000000002 0123456789abcdef 1.1 ...") == Mark(1, 2e-6, "0123456789abcdef", "1.1")
    assert mark_in("Hello") is None
    assert msgspec.json.decode(request(Asked(token="t")))["model"] == MODEL
