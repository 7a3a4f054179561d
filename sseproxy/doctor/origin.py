"""The probe: a server in the place of the API, whose streams the doctor knows in advance.

It answers only requests that have its token, two at the same time, for five minutes each, and sends no more than 256
KiB a second. `sseproxy probe` is this server alone. With the option `probe`, each worker of a proxy has one, and a
route that leads to it.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec
from aiohttp import web

from ..errors import ListenError
from ..ledger.table import alone
from .script import (
    HEARTBEAT,
    MAX_REQUEST,
    MAX_SECONDS,
    MAX_STREAMS,
    MAX_UPLOAD,
    Asked,
    Report,
    Writer,
    asked_at_start,
    asked_in,
    completion,
)

if TYPE_CHECKING:
    from ..config import Address
    from ..ledger.table import Row

PATH: Final = "/v1/chat/completions"
# How many streams each worker remembers the end of, by their id.
_REMEMBERED: Final = 4
_ACTIVE: Final = "probe active"
NAMES: Final = (_ACTIVE, *(f"probe {what} {slot}" for what in ("id", "left") for slot in range(_REMEMBERED)))
"""The names in the ledger of what all workers count together: requests, and when clients of the last streams left."""
# Seconds for a request whose token is not known yet.
_REQUEST_TIME: Final = 10.0
# Seconds between a request and its answer, which no API is faster than. Traefik, and other programs that use Go's
# ReverseProxy, cut about one of a hundred answers that begin before they have seen the end of the request (golang/go,
# issue 40747).
_ANSWER_TIME: Final = 0.01
# Seconds between two looks at the ledger, and how long a client that asks about a stream waits at most.
_LOOK_EVERY: Final = 0.01
_LOOK_FOR: Final = 20.0
# The stream came to its end before its client left.
_NEVER: Final = -1

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class _Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Origin:
    """The probe in one event loop. `row` has the columns `NAMES`."""

    def __init__(self, token: str, row: Row) -> None:
        self._token = token.encode()
        self._active = row.count(_ACTIVE)
        self._ids = [row.count(f"probe id {slot}") for slot in range(_REMEMBERED)]
        self._left = [row.count(f"probe left {slot}") for slot in range(_REMEMBERED)]
        self._slot = 0
        self._server = web.Server(self._answer, handler_cancellation=True, access_log=None)
        self._listener: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        """Answers requests on the listening socket `sock`."""
        self._listener = await asyncio.get_running_loop().create_server(self._server, sock=sock)

    async def close(self) -> None:
        """Ends all streams."""
        if self._listener is not None:
            self._listener.close()
        await self._server.shutdown(0.0)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        began = perf_counter()
        version = _version(request)
        try:
            if request.method != "POST" or request.path != PATH:
                raise _Refused(404, f"This is the probe of sseproxy. It answers POST {PATH}.")
            asked, upload = await self._read(request)
            with self._place():
                if upload:
                    size = await self._rest(request, upload)
                    took = perf_counter() - began
                    await asyncio.sleep(_ANSWER_TIME)
                    return _json(Report(took=took, size=size, version=version))
                await asyncio.sleep(_ANSWER_TIME)
                if asked.left:
                    return _json(await self._when_left(asked.left, version))
                return await self._stream(request, asked, began, version)
        except _Refused as refused:
            response = _error(refused.status, str(refused))
            if refused.status == 413 or not request.content.at_eof():
                response.force_close()
            return response

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._active.total() >= MAX_STREAMS:
            raise _Refused(429, f"The probe answers {MAX_STREAMS} requests at the same time. Try again in a moment.")
        self._active.add(1)
        try:
            yield
        finally:
            self._active.add(-1)

    async def _read(self, request: web.BaseRequest) -> tuple[Asked, int]:
        """What the request asks for. For an upload, also the bytes that were read of its body, or else 0."""
        transport = request.transport
        if request.headers.get("Expect", "").lower() == "100-continue" and transport is not None:
            # The server of aiohttp leaves this to its routes, of which there are none here.
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray()
        try:
            async with asyncio.timeout(_REQUEST_TIME):
                while len(body) <= MAX_REQUEST and (part := await request.content.readany()):
                    body += part
        except TimeoutError:
            raise _Refused(408, "The request took too long.") from None
        large = len(body) > MAX_REQUEST
        try:
            asked = asked_at_start(bytes(body)) if large else asked_in(bytes(body))
        except (ValueError, msgspec.MsgspecError) as error:
            raise _Refused(400, f"The member probe of the request is not valid: {error}") from None
        if asked is None:
            raise _Refused(400, "The request has no member probe. Use: sseproxy doctor")
        if not hmac.compare_digest(asked.token.encode("utf-8", "surrogatepass"), self._token):
            raise _Refused(401, "The token is wrong. The probe has printed its token, or the file of the proxy has it.")
        if large and not asked.upload:
            raise _Refused(413, f"A request without upload has at most {MAX_REQUEST} bytes.")
        if problem := asked.problem():
            raise _Refused(400, f"Asked for too much: {problem}.")
        return asked, len(body) if asked.upload else 0

    async def _rest(self, request: web.BaseRequest, size: int) -> int:
        """Reads the rest of an upload, and returns the size of it all."""
        try:
            async with asyncio.timeout(MAX_SECONDS):
                while part := await request.content.readany():
                    size += len(part)
                    if size > MAX_UPLOAD:
                        raise _Refused(413, f"An upload has at most {MAX_UPLOAD} bytes.")
        except TimeoutError:
            raise _Refused(408, "The upload took too long.") from None
        return size

    async def _when_left(self, stream: int, version: str) -> Report:
        """When the client of the stream with this id left. Waits until that is known."""
        deadline = perf_counter() + _LOOK_FOR
        while perf_counter() < deadline:
            for ids, left in zip(self._ids, self._left, strict=True):
                for row, known in enumerate(ids.each()):
                    if known == stream:
                        after = left.each()[row]
                        return Report(left=None if after == _NEVER else after / 1e6, version=version)
            await asyncio.sleep(_LOOK_EVERY)
        return Report(known=False, version=version)

    def _remember(self, stream: int, left: int) -> None:
        slot, self._slot = self._slot, (self._slot + 1) % _REMEMBERED
        # In this order, because other workers may read in between.
        for count, value in ((self._ids[slot], 0), (self._left[slot], left), (self._ids[slot], stream)):
            count.add(value - count.own)

    async def _stream(self, request: web.BaseRequest, asked: Asked, began: float, version: str) -> web.StreamResponse:
        left = _NEVER
        try:
            return await self._send(request, asked, began, version)
        except (asyncio.CancelledError, ConnectionError):
            left = round((perf_counter() - began) * 1e6)
            raise
        finally:
            if asked.id:
                self._remember(asked.id, left)

    async def _send(self, request: web.BaseRequest, asked: Asked, began: float, version: str) -> web.StreamResponse:
        # As APIs send it: without a word to proxies such as X-Accel-Buffering, which not all of them send or obey.
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "Server": "sseproxy-probe",
            }
        )
        if request.version < (1, 1):
            # Only the end of the connection can end it, whatever the client would like to keep.
            response.force_close()
        await _until(began + asked.before)
        await response.prepare(request)
        writer = Writer(asked.size, version)
        for number in range(asked.events):
            if number == asked.cut:
                await _break(request, reset=asked.reset)
            due = began + asked.due(number)
            if number == asked.lull and asked.heartbeat:
                beats = math.ceil(asked.silence / asked.heartbeat) - 1
                for beat in range(beats, 0, -1):
                    await _until(due - beat * asked.heartbeat)
                    await response.write(HEARTBEAT)
            await _until(due)
            await response.write(writer.event(perf_counter() - began))
        await response.write(writer.end())
        return response


def _version(request: web.BaseRequest) -> str:
    """The version of HTTP in which the request was asked; 1.0 if a proxy says that it was on the way (Via)."""
    via = [one.strip() for one in ",".join(request.headers.getall("Via", ())).split(",")]
    if any(one.startswith("1.0 ") for one in via):
        return "1.0"
    return f"{request.version.major}.{request.version.minor}"


async def _until(when: float) -> None:
    """Waits until `when`, by `perf_counter`."""
    if (seconds := when - perf_counter()) > 0:
        await asyncio.sleep(seconds)


async def _break(request: web.BaseRequest, *, reset: bool) -> NoReturn:
    """Closes the connection as if the process had died: by a FIN after what was sent, or by a reset."""
    transport = request.transport
    if transport is not None:
        if reset:
            linger = socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE
            transport.get_extra_info("socket").setsockopt(*linger)
            transport.abort()
        else:
            transport.close()
    # The server cancels this task when the connection has ended.
    await asyncio.Event().wait()
    raise AssertionError


def _json(report: Report) -> web.Response:
    return web.Response(body=completion(report), content_type="application/json", headers={"Server": "sseproxy-probe"})


def _error(status: int, message: str) -> web.Response:
    """An error in the style of OpenAI's API."""
    kind = "invalid_request_error" if status < 429 else "overloaded_error"
    document = {"message": message, "type": kind, "param": None, "code": "probe"}
    headers = {"Server": "sseproxy-probe"} | ({"Retry-After": "1"} if status == 429 else {})
    body = msgspec.json.encode({"error": document})
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


async def serve(address: Address, token: str, listening: Callable[[str], None]) -> None:
    """`sseproxy probe`: runs the probe alone, until a signal ends it. `listening` is called with its base URL.

    Raises `ListenError`.
    """
    loop = asyncio.get_running_loop()
    try:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        sock = socket.create_server((address.host, address.port), family=family, backlog=64)
    except OSError as error:
        raise ListenError("--listen", str(address), error) from None
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    origin = Origin(token, alone(NAMES))
    await origin.start(sock)
    try:
        host, port = sock.getsockname()[:2]
        # "Every address" is not an address to connect to.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        listening(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        await stopped.wait()
    finally:
        with suppress(OSError):
            await origin.close()
