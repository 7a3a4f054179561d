"""`sseproxy demo`: the proxy in front of the built-in backend. Three streams show what is special about it.

The first answer streams to its end, and the client measures it. In the second, the client leaves, and the request to
the backend is cancelled. In the third, the backend dies, and the client receives an error. The figures at the end come
from the proxy's `/metrics`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import pairwise
from statistics import median
from typing import Any, cast

import msgspec
from aiohttp import ClientSession, web
from aiohttp.typedefs import Handler
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from . import config
from .config import AccessLog, Config
from .demo import MODEL, Pace, backend
from .errors import ListenError, SseproxyError
from .process.forkserver import ForkServer
from .process.supervisor import Supervisor
from .wire.framing import ChunkedDecoder
from .wire.sse import Event, EventParser

_QUESTION = "What does a streaming proxy do?"
# The second and the third answer end after so many tokens, or after half of their tokens if that is less.
_TOKENS_BEFORE_AN_END = 12
_EVENT_LIMIT = 1 << 20
# The width of text in characters: easy to read, and at most the width of the terminal.
_MAX_WIDTH = 88
_MIN_WIDTH = 40
_INDENT = "   "

_NEXT = """\
The proxy runs until you press Ctrl-C. Try it from another terminal, with curl:

{blue}curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'{plain}

with OpenAI's SDK, in a virtual environment of its own:

{blue}python3 -m venv /tmp/sseproxy-demo && /tmp/sseproxy-demo/bin/pip install --quiet openai
/tmp/sseproxy-demo/bin/python - <<'EOF'
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="unused")
stream = client.chat.completions.create(
    model="{model}", stream=True, messages=[{{"role": "user", "content": "Hello"}}])
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
EOF{plain}

and see what it measured:

{blue}curl -s {admin}/metrics | grep ^sseproxy_{plain}
"""


async def run(
    pace: Pace,
    fork_server: ForkServer,
    *,
    listen: str | None,
    admin: str | None,
    once: bool,
    write: Callable[[str], None],
) -> int:
    """Runs the demonstration. `write` gets its text. Returns the exit status.

    With `once` it returns when the demonstration has ended, and otherwise when a signal ends the proxy.
    """
    for flag, address in (("--listen", listen), ("--admin", admin)):
        if address is not None and address.startswith(("unix:", "systemd")):
            raise SseproxyError(f"{flag}: the demonstration needs HOST:PORT")
    screen = _Screen(write)
    watched = _Backend()
    app = backend(pace)
    app.middlewares.append(watched.watch)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        settings = config.single(f"http://127.0.0.1:{site.port}/v1", listen=listen, admin=admin, workers=1)
        # Lines of the access log would appear in the middle of the text.
        settings = replace(settings, access_log=AccessLog(exchanges="off"))
        supervisor = _bound(settings, fork_server, screen)
        await supervisor.start()
        loop = asyncio.get_running_loop()
        show = loop.create_task(_Show(supervisor, screen, watched, pace).run())
        stopped = loop.create_task(supervisor.stopping.wait())
        await asyncio.wait((show, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not show.cancel():
            show.result()
            if once:
                await supervisor.close()
                return 0
            screen.commands(_NEXT, url=supervisor.urls[0], admin=supervisor.admin_url, model=MODEL)
        return await supervisor.run()
    finally:
        await runner.cleanup()


def _bound(settings: Config, fork_server: ForkServer, screen: _Screen) -> Supervisor:
    """A supervisor that listens. If a port is in use, another one is chosen."""
    try:
        supervisor = Supervisor(settings, fork_server)
        supervisor.bind()
    except ListenError as error:
        if not error.in_use:
            raise
        screen.raw(f"{error}; using another port.\n")
        settings = config.override(settings, **{error.option.partition(".")[0]: "127.0.0.1:0"})
        return _bound(settings, fork_server, screen)
    return supervisor


class _Screen:
    """Writes text in paragraphs. It is in colour on a terminal, unless NO_COLOR is set (no-color.org)."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.raw = write
        self._column = 0
        self._width = max(_MIN_WIDTH, min(shutil.get_terminal_size().columns, _MAX_WIDTH))
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._styles = {
            name: f"\x1b[{number}m" if coloured else ""
            for name, number in (("plain", 0), ("bold", 1), ("red", 31), ("green", 32), ("blue", 36))
        }

    def _styled(self, text: str, style: str) -> str:
        return f"{self._styles[style]}{text}{self._styles['plain']}" if style != "plain" else text

    def heading(self, text: str) -> None:
        self.raw(f"{self._styled(text, 'bold')}\n\n")

    def paragraph(self, text: str, style: str = "plain") -> None:
        self.lines(*textwrap.wrap(text, self._width - len(_INDENT), break_on_hyphens=False), style=style)

    def lines(self, *lines: str, style: str = "plain") -> None:
        self.raw("".join(f"{_INDENT}{self._styled(line, style)}\n" for line in lines) + "\n")

    def figure(self, what: str, value: str, note: str) -> None:
        self.raw(f"{_INDENT}{what:<20}{self._styled(f'{value:>10}', 'bold')}   {note}\n")

    def event(self, kind: str, data: str) -> None:
        """Shows a received event as it is. Only its data line is wrapped."""
        width = self._width - len(_INDENT)
        self.lines(f"event: {kind}", *textwrap.wrap(f"data: {data}", width, subsequent_indent="      "), style="red")

    def token(self, text: str) -> None:
        """Shows a token of an answer immediately. If it does not fit into the line, it begins a new one."""
        if not self._column or self._column + len(text) > self._width:
            self.raw(("\n" if self._column else "") + _INDENT)
            self._column = len(_INDENT)
            text = text.lstrip()
        self._column += len(text)
        self.raw(text)

    def end_of_answer(self, mark: str = "") -> None:
        """Ends the text of an answer. `mark` says why the answer is not complete."""
        self._column = 0
        self.raw(f"\n{_INDENT}{self._styled(f'[{mark}]', 'red')}\n\n" if mark else "\n\n")

    def commands(self, template: str, **values: str) -> None:
        """Shows commands to copy. They are not indented, because Python would not accept that."""
        self.raw(template.format(**values, **self._styles))


class _Backend:
    """Observes the latest request in the backend."""

    def __init__(self) -> None:
        self._request: web.Request | None = None
        self.ended: asyncio.Future[float | None]
        """When the request was cancelled, by `time.perf_counter`. `None` if it was answered completely."""

    @web.middleware
    async def watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._request = request
        self.ended = ended = asyncio.get_running_loop().create_future()
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            ended.set_result(time.perf_counter())
            raise
        ended.set_result(None)
        return response

    def die(self) -> None:
        """Resets the connection of the request, as if the process of the backend was killed."""
        assert self._request is not None
        if self._request.transport is not None:
            self._request.transport.abort()


class _Client(asyncio.Protocol):
    """A client of one event stream. Unlike HTTP libraries, it keeps what it received before a connection broke."""

    def __init__(self) -> None:
        self._head = b""
        self._body = ChunkedDecoder()
        self._parser = EventParser(_EVENT_LIMIT)
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._transport: asyncio.Transport | None = None
        # The status line, if the status is not 200.
        self._refused: str | None = None

    @classmethod
    @asynccontextmanager
    async def asking(cls, url: str, request: dict[str, Any]) -> AsyncIterator[_Client]:
        """A client that has sent `request`. It closes its connection at the end of the block."""
        target = URL(url)
        assert target.host is not None and target.port is not None
        body = msgspec.json.encode(request)
        transport, client = await asyncio.get_running_loop().create_connection(cls, target.host, target.port)
        transport.write(
            f"POST {target.path} HTTP/1.1\r\nHost: {target.raw_authority}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        try:
            yield client
        finally:
            client.leave()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self._head.endswith(b"\r\n\r\n"):
            head, end, data = (self._head + data).partition(b"\r\n\r\n")
            self._head = head + end
            status_line = self._head.partition(b"\r\n")[0].decode("latin-1")
            if end and status_line.split()[1:2] != ["200"]:
                self._refused = status_line
                self.leave()
        if self._refused is None and data:
            for event in self._parser.feed(self._body.feed(data)):
                self._events.put_nowait(event)
            if self._body.done:
                self._events.put_nowait(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._events.put_nowait(None)

    @property
    def complete(self) -> bool:
        """Whether the last chunk of the body has been received."""
        return self._body.done

    def leave(self) -> None:
        assert self._transport is not None
        self._transport.close()

    async def events(self) -> AsyncIterator[tuple[str, str]]:
        """Type and data of each event, until the body ends or breaks off.

        Raises `SseproxyError` if the response has another status than 200.
        """
        while (event := await self._events.get()) is not None:
            kind, data = event
            yield kind.decode(), (data or b"").decode()
        if self._refused is not None:
            raise SseproxyError(f"the request of the demonstration failed: {self._refused}")


def _text(kind: str, data: str) -> str:
    """The text that an event adds to the answer, or an empty string."""
    if kind or data == "[DONE]":
        return ""
    return "".join(choice["delta"].get("content") or "" for choice in msgspec.json.decode(data)["choices"])


class _Show:
    """The parts of the demonstration, in their order."""

    def __init__(self, supervisor: Supervisor, screen: _Screen, watched: _Backend, pace: Pace) -> None:
        self._url = supervisor.urls[0]
        self._admin = supervisor.admin_url
        self._screen = screen
        self._watched = watched
        self._pace = pace

    async def run(self) -> None:
        self._screen.heading("sseproxy: what it does with streams")
        self._screen.lines(
            f"client -> sseproxy on {URL(self._url).raw_authority} -> backend, {self._pace.rate:g} tokens a second",
            "All of it runs on this machine. There is no API and no key.",
        )
        await self._whole_answer()
        await self._client_leaves()
        await self._backend_dies()
        await self._figures()

    def _asking(self) -> AbstractAsyncContextManager[_Client]:
        messages = [{"role": "user", "content": _QUESTION}]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return _Client.asking(f"{self._url}/v1/chat/completions", {"model": MODEL, **options, "messages": messages})

    async def _whole_answer(self) -> None:
        self._screen.heading("1. An answer streams through the proxy, token by token")
        arrivals: list[float] = []
        asked = time.perf_counter()
        async with self._asking() as client:
            async for event in client.events():
                if text := _text(*event):
                    arrivals.append(time.perf_counter() - asked)
                    self._screen.token(text)
        self._screen.end_of_answer()
        if arrivals:
            self._screen.paragraph(f"The client measured: {_rhythm(arrivals)}.", "green")

    async def _first_tokens(self, events: AsyncIterator[tuple[str, str]]) -> str:
        """Shows the first tokens of an answer. Returns how many, in words: `12 of 60 tokens`."""
        wanted = max(1, min(_TOKENS_BEFORE_AN_END, self._pace.tokens // 2))
        shown = 0
        async for event in events:
            if text := _text(*event):
                self._screen.token(text)
                shown += 1
                if shown == wanted:
                    break
        return f"{shown} of {self._pace.tokens} tokens"

    async def _client_leaves(self) -> None:
        self._screen.heading("2. A client leaves in the middle of an answer")
        async with self._asking() as client:
            so_far = await self._first_tokens(client.events())
            left = time.perf_counter()
        self._screen.end_of_answer("the client closes its connection")
        cancelled = await self._watched.ended
        if cancelled is None:
            self._screen.paragraph("The answer ended before the client left. Try it with a lower --rate.")
            return
        self._screen.paragraph(
            f"The client left after {so_far}. {_milliseconds(cancelled - left)} later the request to the backend was "
            "cancelled: no more tokens are generated that nobody reads.",
            "green",
        )

    async def _backend_dies(self) -> None:
        self._screen.heading("3. The backend dies in the middle of an answer")
        error = ""
        async with self._asking() as client:
            events = client.events()
            so_far = await self._first_tokens(events)
            self._watched.die()
            async for kind, data in events:
                if kind == "error":
                    error = data
                elif text := _text(kind, data):
                    self._screen.token(text)
        if client.complete:
            self._screen.end_of_answer()
            self._screen.paragraph("The answer ended before the backend died. Try it with a lower --rate.")
            return
        self._screen.end_of_answer("the backend's connection breaks")
        self._screen.paragraph(f"The backend died after {so_far}. The proxy told the client:")
        self._screen.event("error", error)
        self._screen.paragraph(
            "Then it closed the connection without the last chunk of the body. Client libraries raise an error, so "
            "no application takes half an answer for a whole one.",
            "green",
        )

    async def _figures(self) -> None:
        self._screen.heading(f"4. What the proxy measured, from {self._admin}/metrics")
        figures = await self._measured()
        for what, value, note in figures.rows():
            self._screen.figure(what, value, note)
        self._screen.raw("\n")
        self._screen.lines(f"requests: {figures.requests()}")

    async def _measured(self) -> _Figures:
        """Waits until all three exchanges are in the metrics, and returns the figures."""
        async with ClientSession() as session:
            while True:
                async with session.get(f"{self._admin}/metrics") as response:
                    figures = _Figures(await response.text())
                if sum(figures.outcomes.values()) >= 3:
                    return figures
                await asyncio.sleep(0.05)


class _Figures:
    """The figures in a metrics exposition, as text."""

    def __init__(self, exposition: str) -> None:
        self.outcomes: dict[str, float] = defaultdict(float)
        self._sums: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(exposition):
            for sample in family.samples:
                if sample.name == "sseproxy_requests_total":
                    self.outcomes[sample.labels["outcome"]] += sample.value
                if sample.name != "sseproxy_tokens_total" or sample.labels["type"] == "output":
                    self._sums[sample.name.removeprefix("sseproxy_")] += sample.value

    def _mean(self, name: str, of: str, shown: Callable[[float], str]) -> tuple[str, str] | None:
        count = self._sums[f"{name}_count"]
        return (shown(self._sums[f"{name}_sum"] / count), f"mean of {count:g} {of}") if count else None

    def rows(self) -> Iterator[tuple[str, str, str]]:
        for what, figure in (
            ("first token after", self._mean("time_to_first_token_seconds", "answers", lambda mean: f"{mean:.2f} s")),
            ("output tokens", (f"{self._sums['tokens_total']:g}   ", "as the backend counted them")),
            ("delay in the proxy", self._mean("chunk_forward_seconds", "chunks", _milliseconds)),
        ):
            if figure is not None:
                yield what, *figure

    def requests(self) -> str:
        ended = sorted(self.outcomes.items(), key=lambda item: item[0] != "completed")
        return ", ".join(f"{count:g} {outcome}" for outcome, count in ended if count)


def _rhythm(arrivals: Sequence[float]) -> str:
    """How an answer came, in words. `arrivals` has the seconds from the request to each of its tokens."""
    gaps = [after - before for before, after in pairwise(arrivals)]
    return ", ".join(
        (
            f"first token {arrivals[0]:.2f} s",
            *((f"median gap {_milliseconds(median(gaps))}",) if gaps else ()),
            f"{len(arrivals)} token{'s' if gaps else ''}",
        )
    )


def _milliseconds(seconds: float) -> str:
    milliseconds = seconds * 1000
    return f"{milliseconds:.{2 if milliseconds < 1 else 1 if milliseconds < 10 else 0}f} ms"
