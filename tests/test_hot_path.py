"""The work for a chunk, counted in calls instead of seconds, which do not depend on the machine's mood."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import sseproxy

from .harness import STREAM_HEAD, RunningProxy, ScriptedUpstream, begin, chunk, delta

PACKAGE = str(Path(sseproxy.__file__).parent)
CHUNKS = 200
# The calls for one delta in a run: _Run.data_received, DeltaMatcher.size_of, Exchange.generated. They call into
# C: the clock, lengths, and the bytes, the transport and the list that are their work. For some there are samples.
CALLS = 3
CALLS_INTO_C = 10
SAMPLES = 1


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
