"""A proxy as it is usually written with aiohttp, for comparison. Arguments: PORT UPSTREAM_PORT."""

from __future__ import annotations

import sys

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web


async def application() -> web.Application:
    app = web.Application()
    upstream = f"http://127.0.0.1:{sys.argv[2]}"
    session = ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None))

    async def relay(request: web.Request) -> web.StreamResponse:
        async with session.post(upstream + request.path_qs, data=await request.read()) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    async def close(app: web.Application) -> None:
        await session.close()

    app.router.add_post("/{path:.*}", relay)
    app.on_cleanup.append(close)
    return app


if __name__ == "__main__":
    uvloop.install()
    web.run_app(application(), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
