"""Examines one hop: asks it for streams, and notes what arrives. The conclusions are drawn in `verdict`.

A hop that does no harm takes about six seconds. Each fault adds some seconds, and a silence adds its own
length.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Final, Literal

import msgspec
from yarl import URL

from ..config.files import trusting
from ..errors import CannotExamine
from .arrival import needs_another
from .client import Answer, Connection, Target, until
from .observed import Hop, Leaving, Moment, Silence, Stream, Upload
from .script import MAX_RATE, MAX_SECONDS, Asked, Report, report_in, request


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How thoroughly to examine. Times are in seconds, sizes in bytes."""

    events: int = 60
    every: float = 0.05
    wait: float = 0.3
    """Between the head and the first event."""
    pause: float = 0.5
    """Of the client, in the middle of an upload."""
    leave_after: float = 0.5
    silent: float = 2.0
    """Of the probe, after the client has left. Then it sends for half of that time."""
    upload: int = 20 << 20
    silence: float | None = None
    heartbeat: float = 15.0
    patience: float = 15.0
    """How long to wait for what should have come."""


_PLAN: Final = Plan()
# Sizes of requests that are tried to find a limit: the defaults of servers, and what lies between.
_SIZES: Final = tuple(
    round(number * 2**exponent) for exponent in range(16, 25) for number in (1, 1.5) if number * 2**exponent < 20 << 20
)
# Seconds for an answer to the head of a request.
_CONTINUE_TIME: Final = 1.5
# How often a stream is asked for again if others use the probe, and the seconds before each.
_BUSY_TIMES: Final = 10
_BUSY_WAIT: Final = 1.0
# Seconds for an upload.
_MAX_UPLOAD_TIME: Final = 60.0
# The gap of a slow stream: at least so many times that of a steady one, and so many times what timers are late.
_SLOWER: Final = 4
_OF_LAG: Final = 8
# But at most so many seconds.
_SLOWEST: Final = 1.0
# Seconds. A client that left is noticed within milliseconds.
_DOUBTFUL: Final = 0.25
# Seconds between two measurements of how late timers are.
_TICK: Final = 0.01
# Of an API: what it is asked for, and how much of the answer is enough.
_PROMPT: Final = "Count from 1 to 60. Write each number as a word, on a line of its own, and nothing else."
_ENOUGH: Final = 200
_API_TIME: Final = 60.0


def target_of(url: str, *, token: str = "", key: str | None = None, ca_file: str | None = None) -> Target:
    """Where to send requests for the base URL `url`. Raises `CannotExamine`."""
    try:
        base = URL(url)
        usable = base.scheme in ("http", "https") and bool(base.host) and not (base.user or base.query_string)
    except ValueError:
        usable = False
    if not usable:
        raise CannotExamine("it is not a base URL such as https://edge.example/v1, without user name and query")
    tls = None
    if base.scheme == "https":
        try:
            tls = trusting(ca_file)
        except OSError as error:
            raise CannotExamine(f"--ca-file: not a readable file of PEM certificates ({error.strerror})") from None
        # A hop that also speaks HTTP/2 is asked for HTTP/1.1.
        tls.set_alpn_protocols(["http/1.1"])
    path = base.raw_path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return Target(base.with_path(path, encoded=True).with_fragment(None), tls, key, token)


async def examine(target: Target, url: str, progress: Callable[[str], None], plan: Plan = _PLAN) -> Hop:
    """Examines a probe through the hop at `url`. Raises `CannotExamine`."""
    return await _Examination(target, url, progress, plan).run()


async def examine_api(target: Target, url: str, model: str, progress: Callable[[str], None]) -> Hop:
    """Examines an API by its arrival times alone. Raises `CannotExamine`."""
    progress("arrival of events")
    document = {"model": model, "stream": True, "messages": [{"role": "user", "content": _PROMPT}]}
    body = msgspec.json.encode(document)
    connection = await Connection.open(target)
    try:
        answer = connection.ask(target.head(len(body)) + body)
        await until(answer, _API_TIME, events=_ENOUGH)
        stream = answer.stream()
        if stream.status != 200 or not stream.events:
            raise _cannot(answer, "the API", "does it stream chat completions of this model? Is the key right?")
        return Hop(url=url, probed=False, steady=stream)
    finally:
        connection.close()


def _cannot(answer: Answer, who: str, hint: str) -> CannotExamine:
    stream = answer.stream()
    closes = {"fin": "closes the connection", "reset": "resets the connection"}.get(stream.end)
    if not stream.status:
        said = answer.problem or f"it {closes or 'does not answer'}"
        return CannotExamine(f"{said} when {who} is asked; {hint}")
    ends = f" and {closes} after {stream.ended_at:.3g} s" if closes else ""
    return CannotExamine(
        f"it answers {stream.status}{ends} when {who} is asked; {hint} It says: {stream.message or 'nothing'}"
    )


class _Examination:
    def __init__(self, target: Target, url: str, progress: Callable[[str], None], plan: Plan) -> None:
        self._target = target
        self._url = url
        self._progress = progress
        self._plan = plan

    async def run(self) -> Hop:
        plan, progress = self._plan, self._progress
        progress("arrival of events")
        steady, following, reused, lag = await self._steady()
        again: Stream | None = None
        slow: Stream | None = None
        if need := needs_another(steady.events):
            progress("arrival of events, a second time")
            faster = Asked(events=round(2.5 * plan.events), every=plan.every * 0.4, wait=plan.wait)
            larger = Asked(
                events=4 * plan.events,
                every=plan.every * 0.4,
                wait=plan.wait,
                size=round(0.4 * MAX_RATE * plan.every * 0.4),
            )
            again = await self._stream(faster if need == "faster" else larger)
            progress("arrival of events, a third time")
            pace = min(max(_SLOWER * plan.every, _OF_LAG * lag), _SLOWEST)
            slow = await self._stream(Asked(events=max(16, plan.events // 3), every=pace, wait=plan.wait))
        progress("an origin that dies")
        deaths = await self._deaths()
        progress("a client that leaves")
        leaving = await self._leaving(steady)
        progress("a large upload")
        upload, continued = await self._upload()
        silence = None
        if plan.silence is not None:
            silence = await self._silence(plan.silence)
        return Hop(
            url=self._url,
            steady=steady,
            following=following,
            again=again,
            slow=slow,
            lag=lag,
            deaths=deaths,
            leaving=leaving,
            silence=silence,
            upload=upload,
            reused=reused,
            continued=continued,
        )

    # --- requests ---

    def _request(self, asked: Asked) -> bytes:
        body = request(msgspec.structs.replace(asked, token=self._target.token))
        return self._target.head(len(body)) + body

    async def _ask(self, asked: Asked, seconds: float) -> tuple[Answer, Connection]:
        """The answer of the probe, when it is over or `seconds` have passed."""
        for _ in range(_BUSY_TIMES):
            connection = await Connection.open(self._target)
            answer = connection.ask(self._request(asked), asked)
            try:
                await until(answer, seconds)
            except BaseException:
                # Nobody else has the connection.
                connection.close()
                raise
            if answer.status != 429:
                return answer, connection
            connection.close()
            await asyncio.sleep(_BUSY_WAIT)
        raise CannotExamine("the probe is busy with other examinations; try again later")

    async def _stream(self, asked: Asked) -> Stream:
        answer, connection = await self._ask(asked, asked.due(asked.events) + self._plan.patience)
        connection.close()
        return answer.stream()

    async def _report(self, asked: Asked) -> Report | None:
        answer, connection = await self._ask(asked, MAX_SECONDS)
        connection.close()
        return report_in(bytes(answer.body)) if answer.status == 200 else None

    # --- what is examined ---

    async def _steady(self) -> tuple[Stream, Stream, bool, float]:
        """A stream, the next one, whether its connection was used for that, and how late client and probe were."""
        plan = self._plan
        asked = Asked(events=plan.events, every=plan.every, wait=plan.wait)
        own: list[float] = []
        measuring = asyncio.ensure_future(_measure(own))
        try:
            answer, connection = await self._ask(asked, asked.due(asked.events) + plan.patience)
        finally:
            measuring.cancel()
        probes = [(event.sent or 0.0) - asked.due(number) for number, event in enumerate(answer.events)]
        lag = max(_percentile(own), _percentile(probes))
        try:
            stream = answer.stream()
            if stream.status != 200 or not stream.events:
                raise _cannot(answer, "the probe", _hint(stream))
            asked, reused = Asked(events=2, every=plan.every, wait=plan.wait), False
            if answer.reusable:
                following = connection.ask(self._request(asked), asked)
                await until(following, plan.patience)
                reused = bool(following.status)
        finally:
            connection.close()
        return stream, following.stream() if reused else await self._stream(asked), reused, lag

    async def _deaths(self) -> dict[Literal["fin", "reset"], Stream]:
        plan, cut = self._plan, max(2, self._plan.events // 8)
        asked = Asked(events=2 * cut, every=plan.every, cut=cut)
        fin, reset = await asyncio.gather(self._stream(asked), self._stream(msgspec.structs.replace(asked, reset=True)))
        return {"fin": fin, "reset": reset}

    async def _leaving(self, steady: Stream) -> list[Leaving]:
        # The request must have reached the probe before the client leaves.
        plan = self._plan
        patience = plan.leave_after + min(1.0, 2 * (steady.head_at or 0.0))
        found: list[Leaving] = []
        silent = plan.silent + patience
        pace = Asked(events=round(plan.silent / 2 / plan.every) + 2, every=plan.every)
        moments: dict[Moment, Asked] = {
            "before the head": msgspec.structs.replace(pace, before=silent),
            "in mid-stream": msgspec.structs.replace(pace, lull=2, silence=silent),
        }
        for when, asked in moments.items():
            # A hop that seems to notice it late is asked again: perhaps the machine was busy.
            for _ in range(2):
                seen = await self._left(when, asked, patience)
                if seen is None:
                    break
                if not found or found[-1].when != when:
                    found.append(seen)
                elif seen.noticed is not None:
                    found[-1] = min(seen, found[-1], key=lambda one: math.inf if one.noticed is None else one.noticed)
                if seen.noticed is not None and seen.noticed < _DOUBTFUL:
                    break
        return found

    async def _left(self, when: Moment, asked: Asked, seconds: float) -> Leaving | None:
        """Leaves a stream after so many seconds. None if it had ended before, or the probe never heard of it."""
        asked = msgspec.structs.replace(asked, id=secrets.randbits(60) + 1)
        left = await self._leave(asked, seconds)
        report = None if left is None else await self._report(Asked(left=asked.id))
        if left is None or report is None or not report.known:
            return None
        noticed = None if report.left is None else max(0.0, report.left - left)
        return Leaving(when=when, silent=asked.due(2) - left, noticed=noticed)

    async def _leave(self, asked: Asked, seconds: float) -> float | None:
        """Leaves after so many seconds. Returns when that was, from the request on; None if the answer ended before."""
        connection = await Connection.open(self._target)
        try:
            answer = connection.ask(self._request(asked), asked)
            await until(answer, seconds)
            return None if answer.over else perf_counter() - answer.sent
        finally:
            connection.close()

    async def _upload(self) -> tuple[Upload | None, bool | None]:
        """A large request, and whether its head was answered with 100 Continue."""
        plan, target = self._plan, self._target
        body = request(Asked(token=target.token, upload=True), filler=plan.upload)
        connection = await Connection.open(target)
        answer = connection.ask(target.head(len(body), expect=True), Asked(upload=True))
        try:
            await _told(answer)
            continued = answer.continued or (None if answer.status else False)
            pause = 0.0
            if not answer.status:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_MAX_UPLOAD_TIME):
                        connection.send(body[: len(body) // 2])
                        await connection.drained()
                        began = perf_counter()
                        await asyncio.sleep(plan.pause)
                        pause = perf_counter() - began
                        connection.send(body[len(body) // 2 :])
                        await connection.drained()
                        await until(answer, _MAX_UPLOAD_TIME)
            if not answer.status:
                # The line is too slow, or the hop has closed the connection without a word.
                return None if answer.end == "unread" else Upload(
                    size=len(body), status=0, refused=len(body)
                ), continued
            if answer.status == 200:
                report = report_in(bytes(answer.body)) or Report()
                return Upload(size=len(body), status=200, pause=pause, took=report.took), continued
            stream = answer.stream()
            accepted, refused = 0, len(body)
            if answer.status == 413:
                accepted, refused = await self._limit(len(body), by_head=not (pause or answer.continued))
            return (
                Upload(
                    size=len(body), status=answer.status, accepted=accepted, refused=refused, message=stream.message
                ),
                continued,
            )
        finally:
            connection.close()

    async def _limit(self, refused: int, *, by_head: bool) -> tuple[int, int]:
        """The largest size of a request that is accepted, and the smallest that is refused, of those that are tried.

        `by_head`: a request is refused before its body is sent.
        """
        low, high = -1, bisect_left(_SIZES, refused)
        while high - low > 1:
            middle = (low + high) // 2
            if await self._accepts(_SIZES[middle], by_head=by_head):
                low = middle
            else:
                high = middle
        return (_SIZES[low] if low >= 0 else 0), min([refused, *_SIZES[high : high + 1]])

    async def _accepts(self, size: int, *, by_head: bool) -> bool:
        """Whether a request of so many bytes is not refused."""
        asked = Asked(token=self._target.token, upload=True)
        body = request(asked, filler=size - len(request(asked, filler=1)) + 1)
        connection = await Connection.open(self._target)
        try:
            answer = connection.ask(self._target.head(size, expect=True), asked)
            await _told(answer)
            if not (by_head or answer.status):
                connection.send(body)
                await until(answer, self._plan.patience)
            return answer.status != 413
        finally:
            connection.close()

    async def _silence(self, seconds: float) -> Silence:
        plan = self._plan
        self._progress(f"a silence of {seconds:g} s")
        pace = Asked(events=6, every=plan.every)
        silent = msgspec.structs.replace(pace, lull=3, silence=seconds)
        before, quiet = await asyncio.gather(
            self._stream(msgspec.structs.replace(pace, before=seconds)), self._stream(silent)
        )
        every = min(plan.heartbeat, seconds / 4)
        beats: Stream | None = None
        if not quiet.intact:
            self._progress(f"a silence of {seconds:g} s, with heartbeats")
            beats = await self._stream(msgspec.structs.replace(silent, heartbeat=every))
        return Silence(seconds=seconds, before=before, quiet=quiet, beats=beats, every=every)


async def _measure(late: list[float]) -> None:
    """Adds how late a timer fires, again and again."""
    while True:
        due = perf_counter() + _TICK
        await asyncio.sleep(_TICK)
        late.append(perf_counter() - due)


def _percentile(values: list[float]) -> float:
    """The 90th percentile; 0 if there is no value."""
    return sorted(values)[int(0.9 * len(values))] if values else 0.0


async def _told(answer: Answer) -> None:
    """Waits until the head of a request is answered, with a 100 or at all."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_CONTINUE_TIME):
            while not (answer.status or answer.continued or answer.over):
                answer.progress.clear()
                await answer.progress.wait()


def _hint(stream: Stream) -> str:
    match stream.status:
        case 401 | 403:
            return (
                "is the token right (--token, SSEPROXY_PROBE_TOKEN)? Does a gateway, or sseproxy with clients, want a "
                "key (--api-key-env)?"
            )
        case 404 | 405:
            return "is the path right, and is there a probe behind it? Run sseproxy probe, or set the option probe."
        case 200 | 400:
            return "is there a probe behind it? For an API, use --model."
        case _:
            return "examine the hops behind it first."
