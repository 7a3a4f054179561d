"""The live view: what is under way, as it changes, for whoever looks; and cancelling."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import anthropic
import msgspec
import openai
import pytest
from aiohttp import ClientSession, ClientTimeout
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.config import Admin
from sseproxy.config.options import Secret
from sseproxy.errors import Outcome
from sseproxy.observe import live
from sseproxy.observe.live import MOST_ROWS, Reader, Reading, Row, View
from sseproxy.observe.metrics import Report
from sseproxy.observe.registry import Registry
from sseproxy.observe.telemetry import CANCEL, LOOK, Reports, encode_report, questions
from sseproxy.process.admin import application
from sseproxy.process.live import Live
from sseproxy.relay.exchange import Exchange
from sseproxy.wire.meaning import DELTA

from .harness import (
    DEADLINE,
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    begin,
    chunk,
    delta,
    post,
    until,
    usage,
)
from .served import ConfigFile, Served

TOKEN = "a-token-of-the-tests"
ADMIN = "{listen: '127.0.0.1:0', token: a-token-of-the-tests, cancel: true}"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@dataclass
class Looker:
    """Reads `/live/events` and does with it what the page does."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    ended: list[dict[str, Any]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    more: int = 0
    cancel: bool | None = None

    def take(self, event: bytes) -> None:
        kind, _, data = event.decode().removeprefix("event: ").partition("\ndata: ")
        message = json.loads(data)
        self.kinds.append(kind)
        self.more = message["more"]
        if kind == "snapshot":
            self.rows.clear()
            self.cancel = message["cancel"]
        for id in message.get("left", ()):
            del self.rows[id]
        for told in message["rows"]:
            row = self.rows.setdefault(told["id"], {})
            row.update(told)
            if row["outcome"] is not None:
                self.ended.append(self.rows.pop(told["id"]))


class Watching(Looker):
    """A looker at a running proxy. `until` reads on until a condition holds."""

    def __init__(self, read: Callable[[], Awaitable[bytes]]) -> None:
        super().__init__()
        self._read = read

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                event = await self._read()
                if not event:
                    raise EOFError
                if event.startswith(b"event: "):
                    self.take(event)


@asynccontextmanager
async def watching(port: int, headers: dict[str, str] = BEARER) -> AsyncIterator[Watching]:
    timeout = ClientTimeout(total=None)
    async with (
        ClientSession(read_bufsize=32 << 20, timeout=timeout) as session,
        session.get(f"http://127.0.0.1:{port}/live/events", headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        yield Watching(lambda: response.content.readuntil(b"\n\n"))


async def ask_to_cancel(port: int, id: str, headers: dict[str, str] = BEARER) -> tuple[int, str]:
    async with (
        ClientSession() as session,
        session.post(f"http://127.0.0.1:{port}/live/{id}/cancel", headers=headers) as response,
    ):
        return response.status, await response.text()


async def request(served: Served, upstream: ScriptedUpstream, model: str = "m") -> tuple[Peer, Peer]:
    """A client and an upstream that has not answered yet."""
    client = await served.connect()
    client.send(post(json.dumps({"model": model, "stream": True}).encode()))
    api = await upstream.accept()
    await api.message()
    return client, api


# --- readings and views, which do no I/O ---


class NoObserver:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def exchange(received_at: float, route: str = "r") -> Exchange:
    observer: Any = NoObserver()
    made = Exchange(route, "up", observer, "x", received_at)
    made.model = "m"
    return made


def test_a_row_has_what_is_known_and_no_more() -> None:
    reader, now = Reader({"up": "api.example:8443"}), perf_counter()
    one = exchange(now - 5)
    one.client, one.model, one.path = "192.0.2.1", "m\x1b[31m" + "x" * 500, "/v1/secret"
    (row,) = reader.read([one], 1).rows
    assert (row.route, row.upstream, row.endpoint, row.client) == ("r", "up", "api.example:8443", "192.0.2.1")
    assert row.model == "m?[31m" + "x" * 122
    assert (row.since, row.quiet_since, row.first_token_at, row.deltas) == (now - 5, now - 5, None, 0)
    assert (row.status, row.stream, row.outcome, row.ended_at) == (None, False, None, None)
    one.client_name, one.endpoint = "team-a", "gpu-2:8000"
    one.head_received(200, True)
    one.happened(DELTA, now)
    one.happened(DELTA, now + 1)
    (row,) = reader.read([one], 1).rows
    assert (row.client, row.endpoint) == ("team-a", "gpu-2:8000")
    assert (row.status, row.stream, row.deltas, row.quiet_since) == (200, True, 2, now + 1)
    assert row.first_token_at == one.first_token_at
    assert "secret" not in repr(row)


def test_silence_means_nothing_in_a_response_that_is_no_stream() -> None:
    reader, one = Reader({}), exchange(1.0)
    assert reader.read([one], 1).rows[0].quiet_since == 1.0
    one.head_received(200, False)
    assert reader.read([one], 1).rows[0].quiet_since is None


def test_an_id_stays_and_is_nobody_elses_and_its_end_is_told_once() -> None:
    reader = Reader({})
    exchanges = [exchange(float(number)) for number in range(50)]
    first = {row.since: row.id for row in reader.read(exchanges, 50).rows}
    assert len({*first.values()}) == 50
    exchanges[7].finish(Outcome.CANCELLED)
    assert reader.find(first[7.0]) is exchanges[7]
    again = reader.read([one for one in exchanges if one.outcome is None], 49).rows
    assert {row.since: row.id for row in again} == first
    assert [row.since for row in again if row.outcome == "cancelled"] == [7.0]
    assert not [row for row in reader.read(exchanges[8:], 42).rows if row.outcome]
    assert reader.find(first[7.0]) is None
    assert {row.id for row in Reader({}).read(exchanges, 50).rows}.isdisjoint(first.values())


def test_of_too_many_the_longest_silences_have_a_row_and_rows_do_not_come_and_go() -> None:
    reader, now = Reader({}), perf_counter()
    silent = [exchange(now - 100 - number) for number in range(MOST_ROWS // 2)]
    others = [exchange(now - 0.5) for _ in range(3 * MOST_ROWS)]
    running = others[:MOST_ROWS] + silent + others[MOST_ROWS:]
    chosen = reader.choose(running)
    reading = reader.read(chosen, len(running))
    assert len(reading.rows) == MOST_ROWS
    assert reading.more == len(running) - MOST_ROWS
    assert {*silent} <= {*chosen}
    assert {*reader.choose(running[::-1])} == {*chosen}


def row(id: str, deltas: int = 0, quiet_since: float | None = 0.0, outcome: str | None = None) -> Row:
    return Row(id, 0.0, "r", "up", "h", "m", "c", 200, True, None, quiet_since, deltas, outcome)


# What happens: a worker tells how far each of its exchanges is, and which have ended; or the worker ends.
TOLD = st.tuples(
    st.integers(0, 2),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 3)),
    st.sets(st.sampled_from("abcdef")),
    st.integers(0, 2),
)


@given(st.lists(st.lists(st.one_of(TOLD, st.integers(0, 2)), max_size=3), max_size=12))
def test_who_follows_the_changes_sees_what_a_snapshot_shows(steps: list[list[Any]]) -> None:
    view, follower, number = View(), Looker(), 0
    follower.take(view.snapshot(cancel=False))
    running: dict[int, dict[str, int]] = {}
    # Ids are random, so what has ended does not come back.
    over: set[tuple[int, str]] = set()
    for step in steps:
        for what in step:
            if isinstance(what, int):
                over.update((what, id) for id in running.pop(what, {}))
                view.drop(what)
                continue
            worker, now, ended, more = what
            before = running.get(worker, {})
            ends = {id for id in before if id in ended or id not in now}
            over.update((worker, id) for id in ends)
            rows = [row(f"{worker}{id}", before[id], outcome="completed") for id in ends]
            now = {id: max(deltas, before.get(id, 0)) for id, deltas in now.items() if (worker, id) not in over}
            view.add(worker, Reading(rows + [row(f"{worker}{id}", deltas) for id, deltas in now.items()], more))
            running[worker] = now
        view.step()
        assert view.number - number in (0, 1)
        if view.number != number:
            follower.take(view.changes)
        number = view.number
        fresh = Looker()
        fresh.take(view.snapshot(cancel=False))
        assert (follower.rows, follower.more) == (fresh.rows, fresh.more)
        assert {id: told["deltas"] for id, told in fresh.rows.items()} == {
            f"{worker}{id}": deltas for worker, rows in running.items() for id, deltas in rows.items()
        }


def test_a_row_in_the_changes_has_only_what_differs() -> None:
    view = View()
    view.add(1, Reading([row("a"), row("b")]))
    view.step()
    view.add(1, Reading([row("a", deltas=5, quiet_since=1.0), row("b")]))
    view.step()
    (told,) = json.loads(view.changes.partition(b"data: ")[2])["rows"]
    assert told.keys() == {"id", "deltas", "quiet_since"}
    number = view.number
    view.add(1, Reading([row("a", deltas=5, quiet_since=1.0), row("b")]))
    view.step()
    assert view.number == number


def test_a_snapshot_is_bounded_and_says_how_many_more_there_are() -> None:
    view, now = View(), perf_counter()
    for worker in range(3):
        rows = [row(f"{worker}-{number}", quiet_since=now - number) for number in range(MOST_ROWS)]
        view.add(worker, Reading(rows, 100))
    view.step()
    looker = Looker()
    looker.take(view.snapshot(cancel=False))
    assert len(looker.rows) == MOST_ROWS
    assert looker.more == 2 * MOST_ROWS + 300
    assert min(int(id.partition("-")[2]) for id in looker.rows) >= 2 * MOST_ROWS // 3 - 1


def test_when_the_systems_clock_is_set_all_rows_are_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    view, looker = View(), Looker()
    view.add(1, Reading([row("a"), row("b")]))
    view.step()
    looker.take(view.snapshot(cancel=False))
    before = looker.rows["a"]["since"]
    real = live._epoch
    monkeypatch.setattr(live, "_epoch", lambda: real() + 3600)
    view.add(1, Reading([row("a"), row("b", outcome="completed")]))
    view.step()
    looker.take(view.changes)
    assert looker.rows["a"]["since"] == pytest.approx(before + 3600, abs=1)
    assert [told["id"] for told in looker.ended] == ["b"]


def test_what_a_dead_worker_had_is_lost() -> None:
    view, looker = View(), Looker()
    view.add(1, Reading([row("a")]))
    view.add(2, Reading([row("b")]))
    view.step()
    looker.take(view.snapshot(cancel=False))
    view.drop(1)
    view.step()
    looker.take(view.changes)
    assert [(told["id"], told["outcome"]) for told in looker.ended] == [("a", "proxy_error")]
    assert looker.rows.keys() == {"b"}


@given(st.text())
def test_no_text_can_break_out_of_its_event(text: str) -> None:
    view = View()
    view.add(1, Reading([msgspec.structs.replace(row("a"), model=text, client=text)]))
    view.step()
    for event in (view.changes, view.snapshot(cancel=False)):
        lines = event.split(b"\n")
        assert [line.partition(b":")[0] for line in lines] == [b"event", b"data", b"", b""]
        assert json.loads(lines[1][6:])["rows"][0]["model"] == text


# --- the channel between a worker and its supervisor ---


async def test_questions_are_understood_however_they_come_and_a_broken_one_is_none() -> None:
    reader = asyncio.StreamReader()
    for byte in b"?lx0123456789abcdef?x0123":
        reader.feed_data(bytes([byte]))
    reader.feed_eof()
    asked = [question async for question in questions(reader)]
    assert asked == [(b"?", ""), (LOOK, ""), (CANCEL, "0123456789abcdef"), (b"?", "")]


async def test_readings_and_reports_share_a_channel() -> None:
    reader, asked, seen = asyncio.StreamReader(), bytearray(), list[Reading]()
    reports = Reports(reader, asked.extend, seen.append)
    iterating = asyncio.ensure_future(_all(reports))
    looking = [asyncio.ensure_future(reports.looked()) for _ in range(2)]
    await until(lambda: bool(asked))
    # The second one waits for the answer to the first one's question.
    assert bytes(asked) == LOOK
    reading = Reading([row("a", outcome="completed")], 3)
    reader.feed_data(
        encode_report(Report([], [], [], [])) + encode_report(reading) + encode_report(Report([], [], [], []))
    )
    for looker in looking:
        await looker
    assert seen == [reading]
    # A worker that ends leaves nobody waiting.
    last = asyncio.ensure_future(reports.looked())
    await until(lambda: bytes(asked) == LOOK + LOOK)
    reader.feed_eof()
    await last
    assert len(await iterating) == 2


async def _all(reports: Reports) -> list[Report]:
    return [report async for report in reports]


# --- who looks ---


class Workers:
    """What stands for all workers: it counts how often it is asked, and has the rows that a test gives it."""

    def __init__(self) -> None:
        self.view = View()
        self.asked_at: list[float] = []
        self.rows: list[Row] = []
        self.options = Admin()
        self.live = Live(self.view, self._look, lambda worker, id: None, lambda: self.options)

    async def _look(self) -> None:
        self.asked_at.append(perf_counter())
        self.view.add(1, Reading(self.rows))

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[int]:
        async def registry() -> Registry:
            return Registry()

        async def reload() -> None:
            raise AssertionError

        app = application(registry, lambda: None, reload, lambda: self.options, self.live)
        async with TestServer(app) as server:
            assert server.port is not None
            yield server.port


async def test_the_workers_are_asked_only_while_somebody_looks_and_once_for_all_who_do() -> None:
    workers = Workers()
    async with workers.serve() as port:
        async with watching(port) as one, watching(port) as other:
            await one.until(lambda: bool(one.kinds))
            await other.until(lambda: bool(other.kinds))
            for number in range(1, 5):
                workers.rows = [row("a", deltas=number)]
                await one.until(lambda told=number: one.rows.get("a", {}).get("deltas") == told)  # type: ignore[misc]
                await other.until(lambda told=number: other.rows.get("a", {}).get("deltas") == told)  # type: ignore[misc]
            assert one.kinds == other.kinds == ["snapshot", *["changes"] * 4]
        await until(lambda: not workers.live._viewers)
        await until(lambda: workers.live._reading is None or workers.live._reading.done())
        asked = len(workers.asked_at)
        # Whoever comes later is the first to be asked for.
        async with watching(port) as late:
            await late.until(lambda: bool(late.kinds))
        assert workers.asked_at[asked] - workers.asked_at[asked - 1] >= 0.2
    gaps = [after - before for before, after in zip(workers.asked_at, workers.asked_at[1:], strict=False)]
    assert min(gaps) >= 0.2


async def test_nothing_is_queued_for_a_slow_reader_who_gets_a_snapshot_later() -> None:
    workers = Workers()
    # More than the kernel holds for a reader.
    wide = [msgspec.structs.replace(row(f"{number}"), model="x" * 10_000) for number in range(MOST_ROWS)]
    workers.rows = wide
    async with workers.serve() as port:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", port))
            # What is not awaited of it is not read.
            slow = Peer(*await asyncio.open_connection(sock=sock))
            slow.send(b"GET /live/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            async with watching(port) as quick:
                for number in range(1, 6):
                    workers.rows = [msgspec.structs.replace(one, deltas=number) for one in wide]
                    await quick.until(lambda told=number: quick.rows.get("7", {}).get("deltas") == told)  # type: ignore[misc]
                assert quick.kinds == ["snapshot", *["changes"] * (len(quick.kinds) - 1)]
            await slow.head()
            received = bytearray()
            while received.count(b"\n\nevent: ") < 2 or not received.endswith(b"\n\n"):
                received += await slow.read(int(await slow.read_until(b"\r\n"), 16))
                await slow.read(2)
            slow.reset()
    # After the snapshot that was being written, all that came in between is in one more.
    first, second = [event for event in bytes(received).split(b"\n\n") if event.startswith(b"event: ")]
    late = Looker()
    late.take(first)
    late.take(second)
    assert late.kinds == ["snapshot", "snapshot"]
    assert late.rows["7"]["deltas"] == 5


async def test_a_stream_of_events_ends_when_what_is_allowed_changes() -> None:
    workers = Workers()
    async with workers.serve() as port, watching(port) as looker:
        await looker.until(lambda: bool(looker.kinds))
        workers.options = Admin(token=Secret(TOKEN))
        with pytest.raises(EOFError):
            await looker.until(lambda: False)
    assert Admin(token=Secret(TOKEN)) == Admin(token=Secret(TOKEN)) != Admin(token=Secret("another"))


async def test_a_listener_that_closes_and_opens_again_has_lost_nobody() -> None:
    """As in an upgrade that fails: whoever looked looks again, and a request that is being cancelled gets an answer."""
    workers = Workers()
    workers.options = Admin(token=Secret(TOKEN), cancel=True)
    workers.rows = [row("0123456789abcdef")]
    async with workers.serve() as port:
        async with watching(port) as looker:
            await looker.until(lambda: bool(looker.rows))
            cancelling = asyncio.ensure_future(ask_to_cancel(port, "0123456789abcdef"))
            await until(lambda: workers.live._viewers == 2)
            workers.live.end()
            with pytest.raises(EOFError):
                await looker.until(lambda: False)
            assert (await cancelling)[0] == 202
        workers.live.begin()
        async with watching(port) as again:
            await again.until(lambda: bool(again.rows))


async def test_there_are_at_most_so_many_who_look() -> None:
    workers = Workers()
    async with workers.serve() as port, ClientSession() as session:
        url = f"http://127.0.0.1:{port}/live/events"
        looking = [await session.get(url) for _ in range(32)]
        async with session.get(url) as response:
            assert response.status == 503
        for response in looking:
            response.close()
        await until(lambda: not workers.live._viewers)
        async with watching(port) as looker:
            await looker.until(lambda: bool(looker.kinds))


# --- a running proxy ---


async def test_streams_of_all_workers_are_seen_from_their_beginning_to_their_end(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream, admin=ADMIN, workers="2")
    async with file.serve() as served, watching(served.admin) as looker:
        await looker.until(lambda: bool(looker.kinds))
        assert (looker.kinds, looker.rows, looker.more, looker.cancel) == (["snapshot"], {}, 0, True)
        streams = [await request(served, upstream, f"model {number}") for number in range(10)]
        await looker.until(lambda: len(looker.rows) == 10)
        assert {told["model"] for told in looker.rows.values()} == {f"model {number}" for number in range(10)}
        for told in looker.rows.values():
            assert (told["route"], told["upstream"], told["client"]) == ("api", "up", "127.0.0.1")
            assert told["endpoint"] == f"127.0.0.1:{upstream.port}"
            assert (told["first_token_seconds"], told["outcome"]) == (None, None)
            assert told["quiet_since"] == told["since"]
        for _, api in streams:
            api.send(STREAM_HEAD, chunk(delta("one")), chunk(delta("two")))
        await looker.until(lambda: all(told["deltas"] == 2 for told in looker.rows.values()))
        for told in looker.rows.values():
            assert told["first_token_seconds"] > 0
            assert told["quiet_since"] > told["since"]
        for number, (client, api) in enumerate(streams):
            if number < 5:
                api.send(chunk(usage(1, 2)), chunk(DONE), LAST_CHUNK)
            elif number < 8:
                api.close()
            else:
                client.reset()
        await looker.until(lambda: len(looker.ended) == 10)
        outcomes = sorted(told["outcome"] for told in looker.ended)
        assert outcomes == ["client_gone_mid_stream"] * 2 + ["completed"] * 5 + ["truncated"] * 3
        assert all(told["duration_seconds"] > 0 for told in looker.ended)
        assert not looker.rows


async def test_a_reload_in_between_changes_nothing_for_who_looks(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream, admin=ADMIN)
    async with file.serve() as served, watching(served.admin) as looker:
        _, old = await request(served, upstream, "old")
        await looker.until(lambda: len(looker.rows) == 1)
        async with (
            ClientSession(headers=BEARER) as session,
            session.post(f"http://127.0.0.1:{served.admin}/-/reload") as response,
        ):
            assert response.status == 200
        _, new = await request(served, upstream, "new")
        await looker.until(lambda: {told["model"] for told in looker.rows.values()} == {"old", "new"})
        old.send(STREAM_HEAD, chunk(delta("Hi")))
        await looker.until(lambda: any(told["deltas"] for told in looker.rows.values()))
        for api in (old, new):
            api.send(*([STREAM_HEAD] if api is new else []), chunk(usage(1, 2)), chunk(DONE), LAST_CHUNK)
        await looker.until(lambda: len(looker.ended) == 2)
        assert sorted((told["model"], told["outcome"]) for told in looker.ended) == [
            ("new", "completed"),
            ("old", "completed"),
        ]
        assert "snapshot" not in looker.kinds[1:]


async def test_a_worker_that_stands_still_hides_nobody(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream, admin=ADMIN, workers="2")
    async with file.serve() as served, watching(served.admin) as looker:
        for _ in range(4):
            await request(served, upstream)
        await looker.until(lambda: len(looker.rows) == 4)
        still = served.workers[0]
        os.kill(still, signal.SIGSTOP)
        try:
            client, _ = await request(served, upstream, "later")
            await looker.until(lambda: any(told["model"] == "later" for told in looker.rows.values()))
            assert len(looker.rows) == 5
            client.reset()
            await looker.until(lambda: bool(looker.ended))
        finally:
            os.kill(still, signal.SIGCONT)


async def test_what_a_killed_worker_had_has_ended(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream, admin=ADMIN)
    async with file.serve() as served, watching(served.admin) as looker:
        await request(served, upstream)
        await looker.until(lambda: len(looker.rows) == 1)
        os.kill(served.workers[0], signal.SIGKILL)
        await looker.until(lambda: bool(looker.ended))
        assert looker.ended[0]["outcome"] == "proxy_error"


async def test_the_last_ends_are_told_before_a_worker_is_gone(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream, admin=ADMIN, reload="{drain_timeout: 100ms}")
    async with file.serve() as served, watching(served.admin) as looker:
        client, api = await request(served, upstream)
        api.send(STREAM_HEAD, chunk(delta("Hi")))
        await looker.until(lambda: len(looker.rows) == 1)
        async with (
            ClientSession(headers=BEARER) as session,
            session.post(f"http://127.0.0.1:{served.admin}/-/reload") as response,
        ):
            assert response.status == 200
        await looker.until(lambda: bool(looker.ended))
        assert looker.ended[0]["outcome"] == "drained"
        await client.rest()


async def test_the_model_of_a_body_that_comes_in_parts_is_seen(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    whole = post(b'{"model":"large","stream":true,"x":"' + b"x" * 200_000 + b'"}')
    client = await proxy.connect()
    client.send(whole[:100_000])
    api = await upstream.accept()
    client.send(whole[100_000:])
    await api.message()
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(b"Hi")
    (told,) = (await proxy.worker.look()).rows
    assert told.model == "large"


async def test_a_shutdown_does_not_wait_for_who_looks(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = ConfigFile(tmp_path, upstream, admin=ADMIN)
    async with file.serve() as served, watching(served.admin) as looker:
        await looker.until(lambda: bool(looker.kinds))
        served.process.terminate()
        with pytest.raises(EOFError):
            await looker.until(lambda: False)
        assert await served.ended() == 0


async def test_ids_are_forgotten_when_nobody_looks(
    proxy: RunningProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sseproxy.process.worker._REMEMBERED_FOR", 0.05)
    await begin(proxy, upstream)
    assert proxy.worker._reader is None
    assert proxy.worker.last_look() is None
    (told,) = (await proxy.worker.look()).rows
    await until(lambda: proxy.worker._reader is None)
    proxy.worker.cancel(told.id)
    assert len(proxy.worker.proxy.active) == 1


# --- cancelling ---


async def test_a_cancelled_stream_ends_with_an_error_event_and_its_upstream_is_let_go(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream, admin=ADMIN, workers="2")
    async with file.serve() as served, watching(served.admin) as looker:
        streams = [await request(served, upstream, f"{number}") for number in range(4)]
        for _, api in streams:
            api.send(STREAM_HEAD, chunk(delta("Hi")))
        await looker.until(lambda: sum(told["deltas"] for told in looker.rows.values()) == 4)
        (id,) = [id for id, told in looker.rows.items() if told["model"] == "2"]
        status, text = await ask_to_cancel(served.admin, id)
        assert (status, json.loads(text)) == (200, {"id": id, "outcome": "cancelled"})
        client, api = streams[2]
        await api.gone()
        received, end = await client.rest()
        assert received.endswith(b'"code": "cancelled"}}\n\n\r\n')
        assert b"event: error\n" in received
        assert end == "fin"
        await looker.until(lambda: bool(looker.ended))
        assert [(told["id"], told["outcome"]) for told in looker.ended] == [(id, "cancelled")]
        # The others go on.
        for number in (0, 1, 3):
            client, api = streams[number]
            api.send(chunk(usage(1, 1)), chunk(DONE), LAST_CHUNK)
            await client.read_until(LAST_CHUNK)
        await looker.until(lambda: len(looker.ended) == 4)
        async with (
            ClientSession(headers=BEARER) as session,
            session.get(f"http://127.0.0.1:{served.admin}/metrics") as response,
        ):
            metrics = await response.text()
        assert 'code="200",model="other",outcome="cancelled",route="api",upstream="up"} 1.0' in metrics
        assert (await ask_to_cancel(served.admin, id))[0] == 404
        assert (await ask_to_cancel(served.admin, "0" * 16))[0] == 404
        assert any("cancels a request of 127.0.0.1 on the route api" in line for line in served.messages)
        (logged,) = [line for line in bytes(served.logged).splitlines() if b'"outcome":"cancelled"' in line]
        assert json.loads(logged)["reason"] == "cancelled"


async def test_before_the_head_a_cancelled_request_is_answered_and_not_sent_again(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = ConfigFile(tmp_path, upstream, admin=ADMIN)
    async with file.serve() as served, watching(served.admin) as looker:
        client, api = await request(served, upstream)
        await looker.until(lambda: len(looker.rows) == 1)
        assert (await ask_to_cancel(served.admin, next(iter(looker.rows))))[0] == 200
        answer = await client.message()
        assert answer.status == 503
        assert answer.get("x-should-retry") == "false"
        assert answer.get("retry-after") is None
        assert answer.json()["error"]["code"] == "cancelled"
        await api.gone()


@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
async def test_no_sdk_sends_a_cancelled_request_again(
    proxy: RunningProxy, upstream: ScriptedUpstream, sdk: str
) -> None:
    async def ask() -> None:
        if sdk == "openai":
            async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="k", max_retries=2) as client:
                await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
        else:
            async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key="k", max_retries=2) as other:
                await other.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "Hi"}])

    asking = asyncio.ensure_future(ask())
    api = await upstream.accept()
    await api.message()
    for told in (await proxy.worker.look()).rows:
        proxy.worker.cancel(told.id)
    with pytest.raises((openai.APIStatusError, anthropic.APIStatusError), match="An operator has cancelled"):
        await asking
    assert upstream.connections == 1
    assert await proxy.ended() == {"cancelled": 1}


async def test_what_has_its_end_already_is_complete_although_it_is_cancelled(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(usage(1, 1)), chunk(DONE))
    await client.read_until(b"[DONE]")
    for told in (await proxy.worker.look()).rows:
        proxy.worker.cancel(told.id)
    received, _ = await client.rest()
    assert b"error" not in received
    assert await proxy.ended() == {"completed": 1}


@pytest.mark.parametrize("options", ["{listen: '127.0.0.1:0'}", "{listen: '127.0.0.1:0', token: a-token-of-the-tests}"])
async def test_cancelling_is_off_unless_it_is_allowed(upstream: ScriptedUpstream, tmp_path: Path, options: str) -> None:
    file = ConfigFile(tmp_path, upstream, admin=options)
    async with file.serve() as served, watching(served.admin) as looker:
        client, api = await request(served, upstream)
        await looker.until(lambda: len(looker.rows) == 1)
        assert looker.cancel is False
        assert (await ask_to_cancel(served.admin, next(iter(looker.rows))))[0] == 403
        api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert (await client.message()).status == 200
