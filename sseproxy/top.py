"""`sseproxy top`: the live view in a terminal. It reads the same event stream as the page does.

    up, down    select a request            s    sort by the next column
    /           filter                      r    reverse the order
    p           pause                       x    cancel the selected request
    q           quit

If the output is not a terminal, it prints what is under way once, and ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import termios
import tty
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from time import perf_counter
from typing import Any, Final

import aiohttp
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from yarl import URL

from .errors import SseproxyError

# Seconds of silence, as on the page: after 10 s most people believe that nothing will come, and after 60 s many proxies
# cut a connection.
_AMBER, _RED = 10.0, 60.0
# Seconds that a row stays after its end, and that the curve shows.
_LINGERS, _CURVE = 8.0, 20
# Seconds between two pictures, and until a lost connection is made again.
_INTERVAL, _RETRY = 0.25, 1.0
# Seconds in which nothing comes: the server sends a comment every 15.
_SILENCE = 40.0
# Bytes of an event. A snapshot of a thousand rows has some 300 kB.
_MOST = 8 << 20
_BARS: Final = "▁▂▃▄▅▆▇█"
_COLUMNS: Final = ("silence", "since", "route", "endpoint", "model", "client", "first token", "tokens/s")
_KEYS: Final = "arrows select  / filter  s sort  r reverse  p pause  x cancel  q quit"


def _clean(text: object) -> str:
    """Text from outside, without characters that mean something to a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text or "-"))


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"


class Request:
    """A row, and how many tokens a second came in the last seconds."""

    def __init__(self, told: dict[str, Any], now: float) -> None:
        self.told = told
        self.rates: deque[float] = deque(maxlen=_CURVE)
        self._counted, self._counted_at = told["deltas"], now
        self.ended_at: float | None = None

    @property
    def outcome(self) -> str | None:
        outcome: str | None = self.told["outcome"]
        return outcome

    @property
    def rate(self) -> float:
        return self.rates[-1] if self.rates and self.outcome is None else 0.0

    def count(self, now: float) -> None:
        """Counts the tokens since the last time, about once a second."""
        past = now - self._counted_at
        if past >= 0.9 and self.outcome is None:
            self.rates.append((self.told["deltas"] - self._counted) / past)
            self._counted, self._counted_at = self.told["deltas"], now

    def silence(self, now: float) -> float | None:
        quiet_since = self.told["quiet_since"]
        return None if quiet_since is None or self.outcome else max(0.0, now - quiet_since)

    def first_token(self, now: float) -> float | None:
        """Seconds until the first token, or so far. None where none is awaited."""
        if (seconds := self.told["first_token_seconds"]) is not None:
            return float(seconds)
        return None if self.silence(now) is None else max(0.0, now - self.told["since"])

    def key(self, column: str, now: float) -> float | str:
        """What it is sorted by."""
        match column:
            case "silence":
                # In whole seconds, so that rows do not change places with each token.
                return -1.0 if (silence := self.silence(now)) is None else int(silence)
            case "first token":
                return -1.0 if (first := self.first_token(now)) is None else first
            case "tokens/s":
                return self.rate
            case "since":
                return float(self.told["since"])
            case "endpoint":
                return f"{self.told['upstream']} {self.told['endpoint']}"
        return str(self.told[column] or "")

    def matches(self, words: list[str]) -> bool:
        told = self.told
        names = ("route", "upstream", "endpoint", "model", "client", "outcome")
        text = " ".join(str(told[name] or "") for name in names).lower()
        return all(word in text for word in words)


class Top:
    """What is known, and how it is shown."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.ended: Counter[str] = Counter()
        self.more = 0
        self.may_cancel = False
        self.state = "connecting"
        self.sort, self.down = "silence", True
        self.filter = ""
        self.typing = False
        self.paused = False
        self.selected: str | None = None
        self.asked: str | None = None
        """The request about which the user is asked whether to cancel it."""
        self.said = ""
        self._server_now, self._heard_at = 0.0, perf_counter()

    @property
    def now(self) -> float:
        """The server's clock."""
        return self._server_now + perf_counter() - self._heard_at

    def heard(self, kind: str, message: dict[str, Any]) -> None:
        """Takes an event of `/live/events`."""
        self._server_now, self._heard_at = message["now"], perf_counter()
        self.more = message["more"]
        if kind == "snapshot":
            self.may_cancel = message["cancel"]
            known = {told["id"] for told in message["rows"]}
            left = [id for id, found in self.requests.items() if id not in known and found.outcome is None]
        else:
            left = message["left"]
        for id in left:
            self.requests.pop(id, None)
        for told in message["rows"]:
            request = self.requests.get(told["id"])
            if request is None:
                request = self.requests[told["id"]] = Request(told, self.now)
            request.told = request.told | told
            if request.outcome is not None and request.ended_at is None:
                request.ended_at = self.now
                self.ended[request.outcome] += 1

    def count(self) -> None:
        """Counts tokens, and removes what has ended some time ago."""
        now = self.now
        for id, request in list(self.requests.items()):
            request.count(now)
            if request.ended_at is not None and now - request.ended_at > _LINGERS:
                del self.requests[id]

    def listed(self) -> list[Request]:
        """The requests that match the filter, in their order."""
        now, words = self.now, self.filter.lower().split()
        found = [request for request in self.requests.values() if request.matches(words)]
        found.sort(key=lambda request: float(request.told["since"]))
        found.sort(key=lambda request: request.key(self.sort, now), reverse=self.down)
        return found

    def picture(self, width: int, height: int | None) -> Group:
        """The picture for a terminal of this size. Without a `height`, all rows are shown."""
        now, listed = self.now, self.listed()
        # The totals, in two lines where it is narrow; the head of the table; the keys; and the lines between them.
        room = len(listed) if height is None else max(1, height - 7)
        first = 0
        if self.selected is not None and room < len(listed):
            ids = [request.told["id"] for request in listed]
            at = ids.index(self.selected) if self.selected in ids else 0
            first = max(0, min(at - room // 2, len(listed) - room))
        table = Table(expand=True, box=None, padding=(0, 1), header_style="bold", show_edge=False)
        narrow = width < 100
        for column in _COLUMNS:
            if narrow and column in ("since", "client", "endpoint"):
                continue
            arrow = (" ↓" if self.down else " ↑") if column == self.sort else ""
            right = column in ("silence", "since", "first token")
            table.add_column(column + arrow, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
        table.add_column("outcome", no_wrap=True, overflow="ellipsis")
        for request in listed[first : first + room]:
            style = "reverse" if request.told["id"] == self.selected else "dim" if request.outcome else ""
            table.add_row(*self._cells(request, now, narrow=narrow), style=style)
        lines: list[Text | Table] = [Text(self._totals(now)), Text(""), table]
        if height is not None:
            lines += [Text(""), Text(self._foot(len(listed), room), style="dim", no_wrap=True, overflow="ellipsis")]
        return Group(*lines)

    def _cells(self, request: Request, now: float, *, narrow: bool) -> Iterator[Text]:
        told, silence, first = request.told, request.silence(now), request.first_token(now)
        level = "" if silence is None or silence < _AMBER else "bold yellow" if silence < _RED else "bold red"
        mark = {"bold yellow": "△ ", "bold red": "▲ "}.get(level, "")
        yield Text(mark + _seconds(silence), style=level)
        if not narrow:
            yield Text(datetime.fromtimestamp(told["since"]).strftime("%H:%M:%S"))
        yield Text(_clean(told["route"]))
        if not narrow:
            yield Text(_clean(" · ".join(filter(None, (told["upstream"], told["endpoint"])))))
        yield Text(_clean(told["model"]))
        if not narrow:
            yield Text(_clean(told["client"]))
        waits = told["first_token_seconds"] is None and first is not None
        yield Text(_seconds(first) + (" …" if waits else ""))
        most = max(request.rates, default=0.0) or 1.0
        curve = "".join(_BARS[round(rate / most * (len(_BARS) - 1))] for rate in request.rates)
        yield Text(f"{request.rate:5.0f} {curve}" if told["stream"] else "")
        outcome = request.outcome
        yield Text(_clean(outcome) if outcome else "", style="green" if outcome == "completed" else "red")

    def _totals(self, now: float) -> str:
        running = [request for request in self.requests.values() if request.outcome is None]
        silences = [silence for request in running if (silence := request.silence(now)) is not None]
        waiting = sum(
            request.told["first_token_seconds"] is None for request in running if request.silence(now) is not None
        )
        parts = [
            f"sseproxy {'paused' if self.paused else self.state}: {len(running) + self.more} under way",
            f"{self.more} of them not shown" if self.more else "",
            f"{waiting} wait for the first token",
            f"{sum(request.rate for request in running):.0f} tokens/s",
            f"{sum(silence >= _AMBER for silence in silences)} silent for {_AMBER:g} s",
            f"{sum(silence >= _RED for silence in silences)} for {_RED:g} s",
            *(f"{number} {_clean(outcome)}" for outcome, number in sorted(self.ended.items())),
        ]
        return "  ".join(filter(None, parts))

    def _foot(self, listed: int, room: int) -> str:
        if self.typing:
            return f"filter: {self.filter}▏  (Enter: done, Esc: none)"
        if self.asked is not None:
            return "Cancel the selected request? y: yes, any other key: no"
        below = f"{listed - room} more below  " if listed > room else ""
        chosen = f"filter: {self.filter}  " if self.filter else ""
        return f"{self.said}  {below}{chosen}{_KEYS}".strip()

    def pressed(self, key: str) -> str | None:
        """Takes a key. Returns `quit`, `pause` or `cancel` where the caller has to do something."""
        self.said = ""
        if self.typing:
            if key in ("\r", "\n", "\x1b"):
                self.typing = False
                self.filter = "" if key == "\x1b" else self.filter
            elif key in ("\x7f", "\b"):
                self.filter = self.filter[:-1]
            elif key.isprintable():
                self.filter += key
            return None
        if self.asked is not None:
            if key == "y":
                return "cancel"
            self.asked = None
            return None
        match key:
            case "q" | "\x03":
                return "quit"
            case "p":
                self.paused = not self.paused
                return "pause"
            case "s":
                self.sort = _COLUMNS[(_COLUMNS.index(self.sort) + 1) % len(_COLUMNS)]
                self.down = self.sort in ("silence", "first token", "tokens/s")
            case "r":
                self.down = not self.down
            case "/":
                self.typing = True
            case "\x1b[A" | "k":
                self._select(-1)
            case "\x1b[B" | "j":
                self._select(1)
            case "x" if not self.may_cancel:
                self.said = "Cancelling is off: set admin.cancel and admin.token."
            case "x":
                self.asked = self.selected
        return None

    def _select(self, by: int) -> None:
        ids = [request.told["id"] for request in self.listed()]
        if ids:
            at = ids.index(self.selected) + by if self.selected in ids else 0
            self.selected = ids[max(0, min(at, len(ids) - 1))]


class _Server:
    """The admin listener at `url`. Raises `SseproxyError` if it refuses."""

    def __init__(self, session: aiohttp.ClientSession, url: URL) -> None:
        self._session = session
        self._url = url

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The events of `/live/events`, until the connection ends. Raises `aiohttp.ClientError` if there is none."""
        async with self._session.get(self._url / "live/events") as response:
            if response.status == 401:
                needs = "needs another token" if "Authorization" in self._session.headers else "needs a token"
                raise SseproxyError(
                    f"{self._url} {needs} (admin.token): give it in SSEPROXY_ADMIN_TOKEN, or by --token"
                )
            if response.status != 200 or response.content_type != "text/event-stream":
                raise SseproxyError(
                    f"{self._url}/live/events: status {response.status}, and not an event stream of sseproxy"
                )
            # At the end of the connection, it returns what there is.
            while (block := await response.content.readuntil(b"\n\n")).endswith(b"\n\n"):
                fields = dict(line.split(": ", 1) for line in block.decode().splitlines() if ": " in line)
                if "event" in fields:
                    yield fields["event"], json.loads(fields["data"])

    async def cancel(self, id: str) -> str:
        """Cancels a request. Returns what came of it, in words."""
        async with self._session.post(self._url / "live" / id / "cancel") as response:
            if response.status == 200:
                return f"The request has ended: {_clean((await response.json())['outcome'])}."
            return _clean((await response.text())[:200].strip())


def _keys(told: Callable[[str], None]) -> Callable[[], None]:
    """What reads keys from standard input. `told` gets each: a character, or the sequence of an arrow."""

    def read() -> None:
        text = os.read(sys.stdin.fileno(), 1024).decode(errors="replace")
        while text:
            size = 3 if text.startswith("\x1b[") else 1
            told(text[:size])
            text = text[size:]

    return read


@contextmanager
def _key_by_key() -> Iterator[None]:
    """Standard input gives each key when it is pressed."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


async def run(url: str, token: str | None) -> int:
    """Shows what is under way at the admin listener `url`, until the user quits. Returns the exit status."""
    try:
        address = URL(url)
    except ValueError:
        address = URL()
    if address.scheme not in ("http", "https") or not address.host:
        raise SseproxyError(f"--url: expected a URL such as http://127.0.0.1:9464, got {url!r}")
    headers = {} if not token else {"Authorization": f"Bearer {token}"}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=_SILENCE)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, read_bufsize=_MOST) as session:
        server, top = _Server(session, address), Top()
        try:
            if sys.stdout.isatty() and sys.stdin.isatty():
                await _show(server, top)
            else:
                await _print_once(server, top)
        except (aiohttp.ClientError, TimeoutError) as error:
            # The system's word for the failure. What asyncio and aiohttp put around it repeats the address.
            number = getattr(error, "errno", None) or 0
            why = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)
            raise SseproxyError(f"no answer from {url}: {(why or type(error).__name__).lower()}") from None
    return 0


async def _print_once(server: _Server, top: Top) -> None:
    """Prints what is under way, with the tokens of one second."""
    events = server.events()
    top.heard(*await anext(events))
    with suppress(TimeoutError):
        async with asyncio.timeout(1.1 if top.requests else 0):
            async for kind, message in events:
                top.heard(kind, message)
    top.state = "live"
    top.count()
    console = Console()
    console.print(top.picture(console.width, None))


async def _show(server: _Server, top: Top) -> None:
    """Shows what is under way, as it changes."""
    loop = asyncio.get_running_loop()
    quitting = asyncio.Event()
    reading: asyncio.Task[None] | None = None
    cancelling: set[asyncio.Task[None]] = set()

    async def read() -> None:
        known = False
        while True:
            try:
                async for kind, message in server.events():
                    known = True
                    top.state = "live"
                    top.heard(kind, message)
            except (aiohttp.ClientError, TimeoutError):
                # Later it may only be restarting.
                if not known:
                    raise
            top.state = "disconnected"
            await asyncio.sleep(_RETRY)

    async def cancel(id: str) -> None:
        try:
            top.said = await server.cancel(id)
        except (aiohttp.ClientError, TimeoutError) as error:
            top.said = f"The request was not cancelled: {error}"

    def pressed(key: str) -> None:
        nonlocal reading
        match top.pressed(key):
            case "quit":
                quitting.set()
            case "pause" if top.paused and reading is not None:
                reading.cancel()
            case "pause":
                reading = loop.create_task(read())
            case "cancel" if top.asked is not None:
                task = loop.create_task(cancel(top.asked))
                cancelling.add(task)
                task.add_done_callback(cancelling.discard)
                top.asked = None

    reading = loop.create_task(read())
    console = Console()
    with _key_by_key(), Live(console=console, screen=True, auto_refresh=False) as live:
        loop.add_reader(sys.stdin.fileno(), _keys(pressed))
        try:
            while not quitting.is_set():
                if reading.done() and not reading.cancelled():
                    reading.result()
                if not top.paused:
                    top.count()
                live.update(top.picture(console.width, console.height), refresh=True)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_INTERVAL):
                        await quitting.wait()
        finally:
            loop.remove_reader(sys.stdin.fileno())
            for task in (reading, *cancelling):
                task.cancel()
