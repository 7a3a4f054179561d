"""The admin listener: metrics and health. It has a port of its own, so that no client can reach it."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import hdrs, web

from ..observe.metrics import Registry, exposition


def application(registry: Callable[[], Registry], ready: Callable[[], str | None]) -> web.Application:
    """`/metrics`, `/livez` and `/readyz`. `ready` tells why requests should not come here, or None if they should."""

    async def metrics(request: web.Request) -> web.Response:
        body, content_type = exposition(registry(), ",".join(request.headers.getall(hdrs.ACCEPT, [])))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    async def livez(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(request: web.Request) -> web.Response:
        reason = ready()
        return web.Response(text="ok\n") if reason is None else web.Response(status=503, text=f"{reason}\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/livez", livez), web.get("/readyz", readyz)])
    return app
