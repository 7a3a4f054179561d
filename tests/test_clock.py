"""The clock of an exchange, where no scripted upstream can bring about the order of things."""

from __future__ import annotations

import asyncio
from time import perf_counter

from sseproxy.config import Timeouts
from sseproxy.errors import ExchangeError, StalledClient, UpstreamTimeout
from sseproxy.relay.clock import Clock

SHORT, LONG = 0.05, 60.0


def clock(timeouts: Timeouts) -> tuple[Clock, asyncio.Future[ExchangeError]]:
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[ExchangeError] = loop.create_future()
    return Clock(loop, timeouts, perf_counter(), failed.set_result), failed


async def test_a_phase_that_begins_while_the_client_blocks_does_not_end_its_write_timeout() -> None:
    timed, failed = clock(Timeouts(write=SHORT, idle=LONG))
    timed.client_blocked(lambda: True)
    timed.enter("idle", perf_counter())
    assert isinstance(await failed, StalledClient)


async def test_an_upstream_is_not_idle_while_the_client_blocks() -> None:
    timed, failed = clock(Timeouts(write=10 * SHORT, idle=SHORT))
    timed.enter("idle", perf_counter())
    timed.client_blocked(lambda: True)
    assert isinstance(await failed, StalledClient)


async def test_the_phase_goes_on_when_the_client_takes_again() -> None:
    timed, failed = clock(Timeouts(write=LONG, first_token=SHORT))
    timed.enter("first_token", perf_counter())
    timed.client_blocked(lambda: True)
    timed.client_unblocked()
    error = await failed
    assert isinstance(error, UpstreamTimeout)
    assert error.phase == "first_token"


async def test_progress_moves_the_deadline_without_a_call() -> None:
    timed, failed = clock(Timeouts(idle=SHORT))
    started = perf_counter()
    timed.enter("idle", started)
    timed.touched = started + 5 * SHORT
    await failed
    assert perf_counter() >= started + 6 * SHORT


async def test_the_total_counts_whatever_happens() -> None:
    timed, failed = clock(Timeouts(total=SHORT, idle=LONG, write=LONG))
    timed.enter("idle", perf_counter())
    timed.client_blocked(lambda: False)
    error = await failed
    assert isinstance(error, UpstreamTimeout)
    assert error.phase == "total"


async def test_a_clock_that_was_stopped_never_fails() -> None:
    timed, failed = clock(Timeouts(idle=SHORT))
    timed.enter("idle", perf_counter())
    timed.stop()
    done, _ = await asyncio.wait([failed], timeout=3 * SHORT)
    assert not done
