"""The admin listener: metrics, health, the live view, reload. It has a port of its own, which clients cannot reach.

With `admin.token`, everything but health needs the token, or a browser's session (`login`).

Any web page can make an operator's browser send requests to this listener. Two checks protect the live view, and
everything that changes something. Requests from pages of other sites are refused; a link to a page may be followed. And
the `Host` must be a known name, because a foreign name can be made to resolve to this address (DNS rebinding), and then
the page would not count as one of another site.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Collection

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler
from yarl import URL

from .. import __version__
from ..config import Admin
from ..errors import ProtocolError, ReloadError, SseproxyError
from ..observe.registry import Registry, exposition
from ..wire import headers
from . import login, pages
from .live import Live

# These are read-only, and probes send all kinds of `Host` fields.
_UNDER_ANY_NAME = frozenset({"/metrics", "/livez", "/readyz"})
# These need no token: they are for logging in, or for probes, which know none.
_OPEN = frozenset({"/livez", "/readyz", "/login"})
_PAGES = frozenset({"/", "/live"})
# Bytes of a request body. The only one is that of the form with the token.
_MAX_BODY = 16 * 1024


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
    options: Callable[[], Admin],
    live: Live,
) -> web.Application:
    """Serves what `GET /` lists.

    `ready` returns why this proxy is not ready, or None if it is. `reload` raises `SseproxyError` if it fails.
    `options` returns the current options.
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
        if request.path not in _UNDER_ANY_NAME and not known(authority, options().hosts):
            return web.Response(
                status=421,
                text="This host name is not allowed. Use an IP address or localhost, or add the name to admin.hosts.\n",
            )
        costs = request.method == hdrs.METH_POST or request.path == "/live/events"
        if costs and of_another_site(request, authority):
            return web.Response(status=403, text="Pages of other sites are not allowed to do this.\n")
        token = options().token
        if token is None or request.path in _OPEN or login.admits(request, token.reveal()):
            return await handler(request)
        if request.path in _PAGES and "text/html" in request.headers.get(hdrs.ACCEPT, ""):
            response = pages.LOGIN.response(401, to=request.path, problem="")
        else:
            response = web.Response(status=401, text="This needs admin.token: Authorization: Bearer TOKEN\n")
        # RFC 9110, section 11.6.1, and RFC 6750, section 3.
        response.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="sseproxy"'
        return response

    async def index(request: web.Request) -> web.Response:
        return pages.INDEX.response(version=__version__, cancel="on" if options().cancel else "off (admin.cancel)")

    async def live_page(request: web.Request) -> web.Response:
        return pages.LIVE.response()

    async def log_in(request: web.Request) -> web.Response:
        form, token = await request.post(), options().token
        to = str(form.get("to", "/"))
        to = to if to in _PAGES else "/"
        if token is not None and not login.is_token(str(form.get("token", "")), token.reveal()):
            return pages.LOGIN.response(401, to=to, problem="This is not the token.")
        response = web.Response(status=303, headers={hdrs.LOCATION: to, hdrs.CACHE_CONTROL: "no-store"})
        if token is not None:
            login.log_in(response, token.reveal(), secure=request.secure)
        return response

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

    async def begin(app: web.Application) -> None:
        live.begin()

    async def end(app: web.Application) -> None:
        live.end()

    async def hide_versions(request: web.Request, response: web.StreamResponse) -> None:
        # By default, aiohttp sends its version and that of Python.
        response.headers[hdrs.SERVER] = "sseproxy"

    app = web.Application(middlewares=[guard], client_max_size=_MAX_BODY)
    app.on_response_prepare.append(hide_versions)
    app.on_startup.append(begin)
    app.on_shutdown.append(end)
    app.add_routes(
        [
            web.get("/", index),
            web.get("/live", live_page),
            *live.routes(),
            web.post("/login", log_in),
            web.get("/metrics", metrics),
            web.get("/livez", livez),
            web.get("/readyz", readyz),
            web.post("/-/reload", reloaded),
        ]
    )
    return app
