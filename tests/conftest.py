from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import uvloop

from sseproxy.process import worker
from sseproxy.process.forkserver import ForkServer

from .harness import RunningProxy, Script, ScriptedUpstream, settings, start_proxy
from .served import Flaky

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

# The hundreds of processes that tests start need not compile every module again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Tests wait for more than half of the time, so two cores have five of them."""
    return 5 * (os.cpu_count() or 1) // 2


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported for tests stays: half a million objects, which no collection of garbage need look at again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the loop that workers run."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def fork_server() -> Iterator[ForkServer]:
    """Forks workers for a supervisor that runs in this process."""
    with closing(ForkServer(worker.main)) as server:
        yield server


@pytest.fixture
def flaky(tmp_path: Path) -> Flaky:
    return Flaky(tmp_path)


@pytest.fixture
def flaky_server(flaky: Flaky) -> Iterator[ForkServer]:
    """Forks workers that are `flaky`."""
    with closing(ForkServer(flaky.main)) as server:
        yield server


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as scripted:
        yield scripted


StartProxy = Callable[..., Awaitable[RunningProxy]]


@pytest.fixture
async def start() -> AsyncIterator[StartProxy]:
    """`await start(url, **settings)`: a proxy in front of `url`."""
    started: list[RunningProxy] = []

    async def begin(url: str, **more: Any) -> RunningProxy:
        proxy = await start_proxy(settings(url, **more))
        started.append(proxy)
        return proxy

    yield begin
    for proxy in started:
        for peer in proxy.peers:
            peer.writer.transport.abort()
        if not proxy.worker.proxy.server.hangups._epoll.closed:
            # The test has not drained it to its end.
            proxy.worker.proxy.end_exchanges()
            await proxy.worker.drain()


@pytest.fixture
async def proxy(upstream: ScriptedUpstream, start: StartProxy) -> RunningProxy:
    """A proxy in front of `upstream`."""
    return await start(upstream.url)


PlayScript = Callable[[Script], Awaitable[ScriptedUpstream]]


@pytest.fixture
async def play() -> AsyncIterator[PlayScript]:
    """`await play(script)`: an upstream that runs `script` for each of its connections."""
    running: list[ScriptedUpstream] = []

    async def begin(script: Script) -> ScriptedUpstream:
        scripted = await ScriptedUpstream(script).__aenter__()
        running.append(scripted)
        return scripted

    yield begin
    for scripted in running:
        await scripted.__aexit__()
