"""The admin listener: metrics, health, reload. It has a port of its own, so clients of the proxy cannot reach it.

The browser of somebody who can reach it may send requests that any web page asks for. Two checks protect `/-/reload`.
Requests from pages of other sites are refused. And the `Host` must be a known name, because a foreign name can be made
to resolve to this address (DNS rebinding), and then the page would not count as one of another site.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Collection

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler
from yarl import URL

from ..errors import ProtocolError, ReloadError, SseproxyError
from ..observe.registry import Registry, exposition
from ..wire import headers

# These are read-only, and anybody who reaches the listener may read them. Probes send all kinds of `Host` fields.
_UNDER_ANY_NAME = frozenset({"/metrics", "/livez", "/readyz"})


def _host(authority: str) -> str | None:
    """The host of a `Host` field, in lower case; None if there is none."""
    try:
        return URL.build(scheme="http", authority=authority, encoded=True).host
    except ValueError:
        return None


def known(authority: str, hosts: Collection[str]) -> bool:
    """Whether `authority` is an IP address, `localhost`, this machine's name, or one of `hosts`."""
    host = _host(authority)
    if host is None:
        return False
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return host in ("localhost", socket.gethostname().lower(), *hosts)


def of_another_site(request: web.Request, authority: str) -> bool:
    """Whether a page of another site has caused `request`, according to the browser. `authority` is the request's host.

    Browsers say so in `Sec-Fetch-Site` (Fetch Metadata) and `Origin` (RFC 6454, section 7).
    """
    origin = request.headers.get(hdrs.ORIGIN)
    site = request.headers.get("Sec-Fetch-Site", "none")
    own = f"{request.scheme}://{authority}"
    return site not in ("same-origin", "none") or origin not in (None, own)


def takes_gzip(accepted: str) -> bool:
    """Whether a field `Accept-Encoding` has gzip, or anything, with a weight that is not zero (RFC 9110, 12.5.3)."""
    weights = {}
    for item in accepted.lower().split(","):
        coding, _, parameter = item.partition(";")
        weights[coding.strip()] = parameter.replace(" ", "")
    return re.fullmatch(r"q=0(\.0{0,3})?", weights.get("gzip", weights.get("*", "q=0"))) is None


def application(
    registry: Callable[[], Awaitable[Registry]],
    ready: Callable[[], str | None],
    reload: Callable[[], Awaitable[None]],
    hosts: Callable[[], Collection[str]],
) -> web.Application:
    """Serves `GET /metrics`, `/livez` and `/readyz`, and `POST /-/reload`.

    `ready` returns why this proxy is not ready, or None if it is. `reload` raises `SseproxyError` if it fails. `hosts`
    returns further host names (`admin.hosts`) that are allowed.
    """

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.version > HttpVersion11:
            return web.Response(status=505, text="Only HTTP/1.1 and HTTP/1.0 are supported.\n")
        try:
            fields = headers.check_request(request.version, request.raw_path, headers.Fields(request.raw_headers))
        except ProtocolError as error:
            return web.Response(status=400, text=f"The request is not valid HTTP/1.1: {error}.\n")
        authority = b"".join(fields.named(b"host")).decode()
        if request.path not in _UNDER_ANY_NAME and not known(authority, hosts()):
            return web.Response(
                status=421,
                text="This host name is not allowed. Use an IP address or localhost, or add the name to admin.hosts.\n",
            )
        if request.method == hdrs.METH_POST and of_another_site(request, authority):
            return web.Response(status=403, text="Pages of other sites are not allowed to do this.\n")
        return await handler(request)

    async def metrics(request: web.Request) -> web.Response:
        body, content_type = exposition(await registry(), ",".join(request.headers.getall(hdrs.ACCEPT, [])))
        headers = {hdrs.CONTENT_TYPE: content_type, hdrs.VARY: hdrs.ACCEPT_ENCODING}
        # What is large is compressed by a thread.
        response = web.Response(body=body, headers=headers)
        if takes_gzip(",".join(request.headers.getall(hdrs.ACCEPT_ENCODING, []))):
            response.enable_compression(web.ContentCoding.gzip)
        return response

    async def livez(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(request: web.Request) -> web.Response:
        reason = ready()
        return web.Response(text="ok\n") if reason is None else web.Response(status=503, text=f"{reason}\n")

    async def reloaded(request: web.Request) -> web.Response:
        try:
            await reload()
        except ReloadError as error:
            return web.Response(status=503, text=f"{error}\n")
        except SseproxyError as error:
            return web.Response(status=400, text=f"{error}\n")
        return web.Response(text="reloaded\n")

    app = web.Application(middlewares=[guard])
    app.add_routes(
        [
            web.get("/metrics", metrics),
            web.get("/livez", livez),
            web.get("/readyz", readyz),
            web.post("/-/reload", reloaded),
        ]
    )
    return app
