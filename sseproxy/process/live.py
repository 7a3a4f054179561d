"""The live view: `/live/events`, and `/live/{id}/cancel`.

While there are viewers, the workers are asked four times a second. All viewers share one reading. Nothing is queued for
them: a viewer that has not read the last event gets no further ones, and later a new snapshot. Without viewers, nothing
happens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from aiohttp import hdrs, web

from ..config import Admin
from ..observe.live import View

log = logging.getLogger(__name__)

# Seconds between two readings: a person sees no more.
_INTERVAL = 0.25
# Event streams at the same time. Each holds up to one snapshot.
_MOST_VIEWERS = 32
# Seconds after which a comment is sent, if there is nothing else: less than the idle timeouts of proxies, 60 s.
_KEEPALIVE = 15.0
# Seconds that a viewer may read nothing. Then the connection is closed; a browser makes a new one.
_STALLED_AFTER = 60.0
# Seconds that a cancelled request may take to end until the answer says that it has not ended yet.
_END_TIMEOUT = 2.0
# The milliseconds after which a browser connects again.
_RETRY = b"retry: 1000\n\n"
_UNKNOWN = "The live view shows no request with this id.\n"
_EVENTS = {hdrs.CONTENT_TYPE: "text/event-stream", hdrs.CACHE_CONTROL: "no-store", "X-Accel-Buffering": "no"}


class Live:
    """What all viewers share.

    `look` asks all workers, and returns when the `view` has their readings. `cancel` tells a worker to cancel the
    request with an id. `options` returns the current options.
    """

    def __init__(
        self,
        view: View,
        look: Callable[[], Awaitable[None]],
        cancel: Callable[[int, str], None],
        options: Callable[[], Admin],
    ) -> None:
        self._view = view
        self._look = look
        self._cancel = cancel
        self._options = options
        self._viewers = 0
        self._turn = asyncio.Event()
        self._due = 0.0
        self._reading: asyncio.Task[None] | None = None
        self._ending = False

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/live/events", self._events, allow_head=False),
            web.post("/live/{id:[0-9a-f]{16}}/cancel", self._cancelled),
        ]

    def begin(self) -> None:
        """The listener opens."""
        self._ending = False
        self._turn = asyncio.Event()

    def end(self) -> None:
        """The listener closes: ends all event streams."""
        self._ending = True
        self._turn.set()

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Adds a viewer."""
        self._viewers += 1
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._read())
        try:
            yield
        finally:
            self._viewers -= 1

    async def _read(self) -> None:
        """Reads what the workers have under way, as long as there are viewers."""
        while True:
            await asyncio.sleep(self._due - perf_counter())
            if not self._viewers or self._ending:
                return
            self._due = perf_counter() + _INTERVAL
            await self._look()
            self._view.step()
            self._turn.set()
            self._turn = asyncio.Event()

    async def _next(self) -> bool:
        """Waits for the next reading. Returns False if the listener closes."""
        await self._turn.wait()
        return not self._ending

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._viewers >= _MOST_VIEWERS:
            return web.Response(status=503, text=f"The live view has {_MOST_VIEWERS} viewers already; close one.\n")
        options = self._options()
        response = web.StreamResponse(headers=_EVENTS)
        try:
            with self._looking():
                await response.prepare(request)
                await response.write(_RETRY)
                # What this event stream shows was allowed by these options, and ends with them.
                await self._tell(request, response, lambda: self._options() == options)
        except ConnectionError:
            # The viewers have left.
            pass
        return response

    async def _tell(self, request: web.Request, response: web.StreamResponse, allowed: Callable[[], bool]) -> None:
        view, told_at = self._view, perf_counter()
        told: int | None = None
        while await self._next():
            transport = request.transport
            if transport is None or transport.is_closing() or not allowed():
                return
            silent = perf_counter() - told_at
            if transport.get_write_buffer_size():
                if silent > _STALLED_AFTER:
                    transport.abort()
                continue
            if told == view.number:
                event = b":\n\n" if silent > _KEEPALIVE else b""
            elif told == view.number - 1 and told is not None:
                event = view.changes
            else:
                event = view.snapshot(cancel=self._options().cancel)
            if event:
                told, told_at = view.number, perf_counter()
                try:
                    async with asyncio.timeout(_STALLED_AFTER):
                        await response.write(event)
                except TimeoutError:
                    transport.abort()

    async def _cancelled(self, request: web.Request) -> web.Response:
        if not self._options().cancel:
            return web.Response(status=403, text="This is off. To turn it on, set admin.cancel and admin.token.\n")
        id = request.match_info["id"]
        if (found := self._view.find(id)) is None:
            return web.Response(status=404, text=_UNKNOWN)
        worker, row = found
        log.info("%s cancels a request of %s on the route %s", request.remote or "somebody", row.client, row.route)
        with self._looking():
            self._cancel(worker, id)
            try:
                async with asyncio.timeout(_END_TIMEOUT):
                    while id not in self._view.ended:
                        if not await self._next():
                            raise TimeoutError
                        if id not in self._view.ended and self._view.find(id) is None:
                            return web.Response(status=404, text=_UNKNOWN)
            except TimeoutError:
                return web.Response(status=202, text="The request has not ended yet.\n")
            return web.json_response({"id": id, "outcome": self._view.ended[id].outcome})
