"""The admin listener: metrics and health. It has a port of its own, so that no client can reach it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from ..errors import ReloadError, SseproxyError
from ..observe.metrics import Registry, exposition


def application(
    registry: Callable[[], Awaitable[Registry]], ready: Callable[[], str | None], reload: Callable[[], Awaitable[None]]
) -> web.Application:
    """`/metrics`, `/livez`, `/readyz` and, to POST to, `/-/reload`.

    `ready` tells why requests should not come here, or None if they should. `reload` raises what is in its way.
    """

    async def metrics(request: web.Request) -> web.Response:
        body, content_type = exposition(await registry(), ",".join(request.headers.getall(hdrs.ACCEPT, [])))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

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

    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", metrics),
            web.get("/livez", livez),
            web.get("/readyz", readyz),
            web.post("/-/reload", reloaded),
        ]
    )
    return app
