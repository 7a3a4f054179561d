"""The admin listener: metrics and health. It has a port of its own, so that no client can reach it.

Browsers of people who can reach it might be told to by any page that they look at. So what changes something is served
under known names only, because a name may be made to lead here (DNS rebinding), and never for another site.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Collection

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from yarl import URL

from ..errors import ReloadError, SseproxyError
from ..observe.registry import Registry, exposition

# Whoever reads these learns nothing that he could not see otherwise, and probes name whatever host they like.
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


def of_another_site(request: web.Request) -> bool:
    """Whether a browser says that another site's page is behind `request` (Fetch Metadata; RFC 6454, section 7)."""
    origin = request.headers.get(hdrs.ORIGIN)
    site = request.headers.get("Sec-Fetch-Site", "none")
    own = f"{request.scheme}://{request.headers.get(hdrs.HOST, '')}"
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
    """`/metrics`, `/livez`, `/readyz` and, to POST to, `/-/reload`.

    `ready` tells why requests should not come here, or None if they should. `reload` raises what is in its way. `hosts`
    are further names under which everything is served.
    """

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in _UNDER_ANY_NAME and not known(request.headers.get(hdrs.HOST, ""), hosts()):
            return web.Response(
                status=421, text="This name is not served; use an address, localhost, or list it in admin.hosts.\n"
            )
        if request.method == hdrs.METH_POST and of_another_site(request):
            return web.Response(status=403, text="Another site's page may not do this.\n")
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
