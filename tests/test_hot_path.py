"""The work for a chunk, counted in calls instead of seconds, which do not depend on the machine's mood."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import sseproxy
from sseproxy import config

from .conftest import PlayScript, StartProxy
from .harness import STREAM_HEAD, Peer, RunningProxy, ScriptedUpstream, begin, chunk, delta, post

PACKAGE = str(Path(sseproxy.__file__).parent)
CHUNKS = 200
# The calls for one delta in a run: _Run.data_received, DeltaMatcher.size_of, Exchange.generated. They call into
# C: the clock, lengths, and the bytes, the transport and the list that are their work. For some there are samples.
CALLS = 3
CALLS_INTO_C = 10
SAMPLES = 1
# The calls that a request over three endpoints takes, in addition to those of one endpoint.
CALLS_OF_A_FLEET = 48


async def test_a_chunk_costs_no_more_calls_than_it_has_to(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    called, into_c = await counted(proxy, upstream, at_once=1)
    assert sum(called.values()) / CHUNKS <= CALLS + SAMPLES, called
    assert sum(into_c.values()) / CHUNKS <= CALLS_INTO_C + SAMPLES, into_c
    assert len(called) >= CALLS


async def test_nor_do_chunks_that_a_late_worker_reads_at_once(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    called, _ = await counted(proxy, upstream, at_once=10)
    # They are cut apart.
    assert sum(called.values()) / CHUNKS <= CALLS + SAMPLES + 0.5, called


async def counted(
    proxy: RunningProxy, upstream: ScriptedUpstream, *, at_once: int
) -> tuple[Counter[str], Counter[str]]:
    """The calls of functions of ours, and of theirs into C, for `CHUNKS` chunks of which so many come in one piece."""
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD)
    for warm_up in range(5):
        piece = chunk(delta(f"warm {warm_up}"))
        api.send(piece)
        await client.read_until(piece)

    called: Counter[str] = Counter()
    into_c: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        # What is done every so often, reports and clocks, is not for a chunk.
        if not code.co_filename.startswith(PACKAGE) or "/observe/" in code.co_filename:
            return
        if event == "call":
            called[code.co_qualname] += 1
        elif event == "c_call":
            into_c[f"{code.co_qualname} {getattr(argument, '__name__', argument)}"] += 1

    sys.setprofile(count)
    try:
        for number in range(0, CHUNKS, at_once):
            piece = b"".join(chunk(delta(f"token {number + of}")) for of in range(at_once))
            api.send(piece)
            await client.read_until(piece)
    finally:
        sys.setprofile(None)
    del called["LoopLag._fired"], called["LoopLag._begin"]
    return called, into_c


async def test_a_fleet_costs_a_request_few_calls_more(start: StartProxy, play: PlayScript) -> None:
    one, three = [await calls_for_a_request(start, play, endpoints) for endpoints in (1, 3)]
    more = {name: calls - one[name] for name, calls in three.items() if calls > one[name]}
    assert sum(three.values()) - sum(one.values()) <= CALLS_OF_A_FLEET, more


async def calls_for_a_request(start: StartProxy, play: PlayScript, endpoints: int) -> Counter[str]:
    """The calls of functions of ours for a short request, with so many endpoints."""

    async def answers(api: Peer) -> None:
        while True:
            await api.message()
            api.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")

    servers = [await play(answers) for _ in range(endpoints)]
    urls = tuple(config.Endpoint(url=f"{server.url}/v1") for server in servers)
    upstream = config.Upstream(name="up", url=urls[0].url) if endpoints == 1 else config.Upstream(name="up", urls=urls)
    proxy = await start("http://unused", upstreams=(upstream,))
    client = await proxy.connect()
    called: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE) and "/observe/" not in name:
            called[frame.f_code.co_qualname] += 1

    for number in range(endpoints + 1):
        # The first ones connect.
        sys.setprofile(count if number == endpoints else None)
        client.send(post(b'{"model":"m","messages":[]}'))
        await client.message()
        await proxy.idle()
    sys.setprofile(None)
    del called["LoopLag._fired"], called["LoopLag._begin"]
    return called
