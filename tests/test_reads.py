"""What one connection is read at once, and that others come in between."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy import config
from sseproxy.relay import reads
from sseproxy.relay.pump import Peek
from sseproxy.relay.reads import MAX_READ, BoundedReads
from sseproxy.wire.framing import ChunkedDecoder

from .conftest import PlayScript, StartProxy
from .harness import LAST_CHUNK, STREAM_HEAD, Peer, ScriptedUpstream, begin, chunk, delta, post

MIB = 1 << 20


class Turns:
    """Counts the turns of the loop for as long as it is open."""

    def __enter__(self) -> Turns:
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.call_soon(self._turn)
        return self

    def _turn(self) -> None:
        self.count += 1
        self._next = self._loop.call_soon(self._turn)

    def __exit__(self, *_: object) -> None:
        self._next.cancel()


@pytest.fixture
def everything_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "_TURN", 0.0)


@pytest.mark.usefixtures("everything_is_slow")
async def test_what_is_slow_to_look_at_leaves_others_their_turns(start: StartProxy, play: PlayScript) -> None:
    event = b":\n" * (MIB // 2) + b"\n"

    async def answer(api: Peer) -> None:
        await api.message()
        api.send(STREAM_HEAD, chunk(event), LAST_CHUNK)

    proxy = await start((await play(answer)).url)
    client = await proxy.connect()
    with Turns() as turns:
        client.send(post())
        assert (await client.message()).body == event
    # At its smallest, a read is 4 KiB.
    assert turns.count >= MIB // MAX_READ * 4
    assert await proxy.ended() == {"completed": 1}


@pytest.mark.usefixtures("everything_is_slow")
async def test_so_does_an_upload(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url)
    body = chunk(b"x") * (MIB // 6)
    client = await proxy.connect()
    with Turns() as turns:
        client.send(b"POST /v1/files HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n", body, LAST_CHUNK)
        assert (await (await upstream.accept()).message()).body == b"x" * (MIB // 6)
    assert turns.count >= MIB // MAX_READ * 4


@pytest.mark.usefixtures("everything_is_slow")
async def test_what_was_read_plainly_is_cut_as_well(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url)
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD)
    for number in range(5):
        alike = chunk(delta(f"token {number}"))
        api.send(alike)
        await client.read_until(alike)
    event, body, received = b":\n" * 60_000, ChunkedDecoder(), b""
    with Turns() as turns:
        api.send(chunk(event), LAST_CHUNK)
        while not body.done:
            received += body.feed(await client.reader.read(MIB))
    assert received == event
    assert turns.count >= len(event) // MAX_READ * 4
    assert await proxy.ended() == {"completed": 1}


@pytest.mark.usefixtures("everything_is_slow")
async def test_a_defect_in_a_later_turn_ends_the_connection_at_once(
    start: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the loop sees to for one that shows as it hands over what it has read."""
    proxy = await start(upstream.url, route={"usage": config.UsageOptions(request=True)})
    look, pieces = Peek.data_received, 0

    def fails_later(peek: Peek, data: bytes) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            raise ZeroDivisionError
        look(peek, data)

    monkeypatch.setattr(Peek, "data_received", fails_later)
    problems: list[Exception] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context["exception"]))
    client = await proxy.connect()
    client.send(post())
    api = await upstream.accept()
    await api.message()
    size = 2 * MAX_READ
    api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % size, b"x" * size)
    await api.gone()
    assert not (await client.message()).complete
    assert [type(problem) for problem in problems] == [ZeroDivisionError]
    assert await proxy.ended() == {"truncated": 1}


@given(
    st.sampled_from([b"data:1\n\n", b",{}", b"1\r\nx\r\n", b"x", b'data: {"a": "' + b"x" * 300 + b'"}\n\n']),
    st.integers(1, 40_000),
    st.sampled_from([4096, 8192, MAX_READ]),
)
def test_a_piece_has_no_more_small_things_than_take_a_few_milliseconds(thing: bytes, size: int, room: int) -> None:
    data = (thing * (size // len(thing) + 1))[:size]
    piece = data[: reads.piece_size(data, room)]
    assert 0 < len(piece) <= room
    marks = sum(piece.count(mark) for mark in (b"\n", b"\r", b"{"))
    assert marks <= 700 or len(piece) <= 2048
    # Other bytes are not cut.
    if thing.startswith((b"x", b"data: {")):
        assert len(piece) == min(size, room)


class Transport:
    """One that remembers whether it reads."""

    def __init__(self) -> None:
        self.reads = True

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        assert self.reads
        self.reads = False

    def resume_reading(self) -> None:
        assert not self.reads
        self.reads = True


class Taker:
    """Takes what is read, and says at times that it wants no more, or puts it back."""

    def __init__(self) -> None:
        self.transport = Transport()
        self.taken = b""
        self.lost = False

    def data_received(self, data: bytes) -> None:
        assert not self.lost
        self.taken += data

    def eof_received(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 200_000)),
        st.tuples(st.just("put back"), st.integers(0, 100_000)),
        st.tuples(st.sampled_from(["pause", "resume", "turn"]), st.just(0)),
    ),
    max_size=20,
)


@given(STEPS, st.booleans())
async def test_nothing_is_lost_nor_overtaken(steps: list[tuple[str, int]], slow: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads, "_TURN", 0.0 if slow else 1e9)
        taker = Taker()
        bounded = BoundedReads(taker)  # type: ignore[arg-type]
        sent = b""
        for what, size in steps:
            match what:
                case "read" if taker.transport.reads:
                    part = bytes(range(251)) * (size // 251 + 1)
                    part = part[len(sent) % 251 :][:size]
                    sent += part
                    bounded.take(part)
                case "put back":
                    back = taker.taken[len(taker.taken) - size :] if size else b""
                    taker.taken = taker.taken[: len(taker.taken) - len(back)]
                    bounded.put_back(back)
                case "pause":
                    bounded.pause()
                case "resume":
                    bounded.resume()
                case "turn":
                    await asyncio.sleep(0)
            assert sent.startswith(taker.taken)
            assert not (bounded.paused and taker.transport.reads)
        bounded.resume()
        if not slow:
            await asyncio.sleep(0)
            assert taker.taken == sent
            assert taker.transport.reads
        bounded.connection_lost(None)
        assert taker.lost
        assert taker.taken == sent


async def test_what_is_put_back_is_not_all_there_is() -> None:
    """Who is handed the end of a body sees that something came after it, which is for nobody."""
    taker = Taker()
    bounded = BoundedReads(taker)  # type: ignore[arg-type]
    saw: list[bool] = []

    def deliver(data: bytes) -> None:
        taker.data_received(data)
        saw.append(bounded.ahead)

    bounded.pause()
    bounded.take(b"x" * MAX_READ)
    bounded.deliver = deliver
    bounded.put_back(b"end")
    bounded.resume()
    await asyncio.sleep(0)
    assert taker.taken == b"end" + b"x" * MAX_READ
    assert saw[0]
