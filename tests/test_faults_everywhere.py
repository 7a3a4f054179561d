"""A fault wherever an exchange waits, and in every call that is made for it, one after the other.

Nothing is left of the exchange, it has one outcome, and the next one is served.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

import pytest

import sseproxy.relay
import sseproxy.wire
from sseproxy import config
from sseproxy.relay.phases import Relay

from .conftest import PlayScript, StartProxy
from .harness import DONE, LAST_CHUNK, STREAM_HEAD, Message, Peer, RunningProxy, chunk, delta, post, until, usage


class Fault(Exception):
    """What nobody expects."""


async def answers(api: Peer) -> None:
    while True:
        head = await api.message()
        if head.start_line.startswith("GET"):
            api.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        elif b'"refused"' in head.body and b"stream_options" in head.body:
            said = b'{"error":{"message":"unknown: stream_options"}}'
            api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(said), said)
        elif b'"json"' in head.body:
            said = b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
            api.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(said), said
            )
        elif "files" in head.start_line:
            api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        else:
            api.send(STREAM_HEAD, chunk(delta("a")), chunk(usage(1, 1)), chunk(DONE), LAST_CHUNK)


UPLOAD = b"POST /v1/files HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"x" * 9)
REQUESTS = {
    "get": [b"GET /v1/models HTTP/1.1\r\nHost: p\r\n\r\n"],
    "chat": [post()],
    "json": [post(b'{"model":"json"}')],
    "refused options": [post(b'{"model":"refused","stream":true}')],
    "chat in parts": [post()[:-10], post()[-10:]],
    "upload": [UPLOAD, chunk(b"y" * 9) + LAST_CHUNK],
}


async def settled(proxy: RunningProxy, tasks: int) -> int:
    """Waits until nothing is left of an exchange, and tells how many have ended so far."""
    await until(lambda: not proxy.worker.proxy.active and proxy.worker.proxy.server.empty.is_set())
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    assert proxy.worker.proxy.admission.empty
    samples, ended = proxy.samples(), 0.0
    for (name, labels), value in samples.items():
        if name in ("sseproxy_requests_active", "sseproxy_streams_active"):
            assert value == 0, name
        elif name == "sseproxy_upstream_connections" and ("state", "active") in labels:
            assert value == 0, name
        elif name == "sseproxy_requests_total":
            ended += value
    return int(ended)


async def ask(proxy: RunningProxy, parts: list[bytes]) -> None:
    client = await proxy.connect()
    try:
        for part in parts:
            client.send(part)
            await client.drain()
            for _ in range(20):
                await asyncio.sleep(0)
        await client.message()
        for _ in range(20):
            await asyncio.sleep(0)
        # There is one answer to a request.
        assert not client.reader._buffer  # type: ignore[attr-defined]
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        client.writer.transport.abort()
        proxy.peers.remove(client)


@pytest.fixture
async def proxy(start: StartProxy, play: PlayScript, caplog: pytest.LogCaptureFixture) -> RunningProxy:
    caplog.set_level(logging.CRITICAL)
    upstream = await play(answers)
    match = config.Match(path="/v1")
    route = config.Route(name="api", match=match, upstream="up", usage=config.UsageOptions(request=True))
    limits = config.Limits(active_requests=3)
    return await start(upstream.url, routes=(route,), limits=limits, metrics=config.Metrics(models=("m",)))


async def fail_the_wait(proxy: RunningProxy, nth: int) -> bool:
    """What the exchange waits for when it waits for the `nth` time fails; returns False if it never does."""
    await proxy.busy()
    waits: list[object] = []
    while proxy.worker.proxy.active:
        (relay,) = proxy.worker.proxy.active
        waiter = getattr(getattr(relay, "_task", None), "_fut_waiter", None)
        if waiter is not None and not waiter.done() and waiter not in waits:
            waits.append(waiter)
            if len(waits) == nth:
                waiter.set_exception(Fault(f"wait {nth}"))
                return True
        await asyncio.sleep(0)
    return False


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_fault_wherever_an_exchange_waits_leaves_nothing(proxy: RunningProxy, name: str) -> None:
    await ask(proxy, REQUESTS[name])
    await until(proxy.worker.proxy.server.empty.is_set)
    tasks, nth, failed = len(asyncio.all_tasks()), 0, True
    ended = await settled(proxy, tasks)
    while failed:
        nth += 1
        asking = asyncio.get_running_loop().create_task(ask(proxy, REQUESTS[name]))
        failed = await fail_the_wait(proxy, nth)
        await asking
        before, ended = ended, await settled(proxy, tasks)
        assert ended - before == 1, nth
    assert nth > 1


# --- in every call ---

# Others of them are made for no exchange.
MODULES: list[ModuleType] = [
    import_module(module.name)
    for package in (sseproxy.relay, sseproxy.wire)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
# What gives back what was taken, or tells others of an end. Nobody can do that in their place, so these do what they do
# before they fail.
GIVES_BACK = frozenset(
    {
        *("Relay.run", "Relay._end", "Relay._record", "Relay._gone", "Exchange.finish", "Ticket.give_back"),
        *("Ticket.release", "RequestBody.close", "RequestBody.forget", "Clock.stop", "Pump.stop", "Attempt.end"),
        *("UpstreamConnection.abort", "UpstreamConnection.release", "RelayProtocol.connection_lost"),
        *("DownstreamProtocol._serve", "DownstreamProtocol._answer", "DownstreamProtocol.connection_lost"),
        *("DownstreamProtocol.connection_made", "DownstreamProtocol._gone", "DownstreamProtocol.eof_received"),
        *("_Reads.connection_lost", "BoundedReads.connection_lost", "_Reads.eof_received", "DownstreamServer.lost"),
        *("Connections.gone", "Attempt._send_rest", "Watch.__init__"),
    }
)
# What takes something for whoever calls: nobody has it yet who could give it back.
TAKES = frozenset(
    {"Admission.ticket", "Upstream.connect", "HangupWatch.add", "Connections.come", "Exchange.__init__", "Proxy.handle"}
)
# What makes the protocol of a connection: the loop keeps one that has none, whatever we do, until it is timed out.
MAKES = frozenset(
    {
        *("DownstreamServer.__call__", "DownstreamProtocol.__init__", "RequestHeads.__init__"),
        *("DownstreamProtocol.connection_made", "RelayProtocol.connection_made", "RelayProtocol.__init__"),
    }
)
EVERY = bool(os.environ.get("EXCHANGES"))


def functions() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """All functions and methods of these modules: who has it, under which name."""
    for module in MODULES:
        found: dict[str, Any] = dict(vars(module))
        for name, value in found.items():
            if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                function: Callable[..., Any] = value
                for user in [one for key, one in sys.modules.items() if key.startswith("sseproxy.")]:
                    if vars(user).get(name) is value:
                        yield user, name, function
            elif inspect.isclass(value) and value.__module__ == module.__name__:
                methods: dict[str, Any] = dict(vars(value))
                for attribute, method in methods.items():
                    # The target of a connection is aiohttp's to ask.
                    if isinstance(method, FunctionType) and name != "_Target":
                        yield value, attribute, method


class Calls:
    """Counts the calls of all functions, and makes one of them fail, before or after it has done what it does."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self.fails: tuple[str, int, bool] | None = None
        self.failed = False

    def begin(self, fails: tuple[str, int, bool] | None = None) -> None:
        self.made.clear()
        self.fails, self.failed = fails, False

    def _check(self, name: str, number: int, after: bool) -> None:
        if self.fails == (name, number, after):
            self.failed = True
            raise Fault(f"{name}, call {number}, {'after' if after else 'before'}")

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__qualname__

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self.made[name] += 1
            number = self.made[name]
            self._check(name, number, after=False)
            result = function(*arguments, **named)
            self._check(name, number, after=True)
            return result

        @functools.wraps(function)
        async def call_and_wait(*arguments: Any, **named: Any) -> Any:
            self.made[name] += 1
            number = self.made[name]
            self._check(name, number, after=False)
            result = await function(*arguments, **named)
            self._check(name, number, after=True)
            return result

        return call_and_wait if inspect.iscoroutinefunction(function) else call


@pytest.fixture
def calls() -> Iterator[Calls]:
    found = Calls()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, function in list(functions()):
            patch.setattr(owner, name, found.wrapped(function))
        yield found


def points(made: Counter[str]) -> list[tuple[str, int, bool]]:
    """Where it fails: in the first and the last call of each function, before and after it; `make faults` has all."""
    return [
        (name, number, after)
        for name, count in sorted(made.items())
        for number in (range(1, count + 1) if EVERY else sorted({1, count}))
        for after in (False, True)
        if name not in MAKES | (TAKES if after else GIVES_BACK)
    ]


async def leave_in_the_middle(proxy: RunningProxy, parts: list[bytes]) -> None:
    client = await proxy.connect()
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        client.send(*parts)
        await client.head()
    client.writer.transport.abort()
    proxy.peers.remove(client)


# A socket whose protocol could not be made is closed when it is forgotten.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "leaves"), [*((name, False) for name in REQUESTS), ("chat", True), ("upload", True)])
async def test_a_fault_in_any_call_leaves_nothing(calls: Calls, proxy: RunningProxy, name: str, leaves: bool) -> None:
    loop = asyncio.get_running_loop()
    # What is raised in a callback of a transport ends its connection, and is told here.
    loop.set_exception_handler(lambda _, context: None)
    asked: Callable[[RunningProxy, list[bytes]], Awaitable[None]] = leave_in_the_middle if leaves else ask
    for _ in range(2):
        calls.begin()
        await asked(proxy, REQUESTS[name])
        await until(proxy.worker.proxy.server.empty.is_set)
    tasks, failed = len(asyncio.all_tasks()), 0
    ended = await settled(proxy, tasks)
    for point in points(Counter(calls.made)):
        calls.begin(point)
        try:
            await asked(proxy, REQUESTS[name])
            calls.fails = None
            before, ended = ended, await settled(proxy, tasks)
        except (TimeoutError, AssertionError) as error:
            raise AssertionError(f"{point}: {error!r}") from error
        told = ended - before
        assert told == bool(calls.made[Relay.run.__qualname__]) or (told, point[0]) == (1, "Relay.__init__"), point
        failed += calls.failed
        calls.begin()
    assert await served(proxy)
    assert failed > 50


async def served(proxy: RunningProxy) -> bool:
    client = await proxy.connect()
    client.send(REQUESTS["get"][0])
    response: Message = await client.message()
    client.writer.transport.abort()
    proxy.peers.remove(client)
    await until(proxy.worker.proxy.server.empty.is_set)
    return response.status == 204
