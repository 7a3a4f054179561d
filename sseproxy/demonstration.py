"""`sseproxy demo`: the proxy in front of the embedded backend, one answer streamed through it, and what it measured."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable

import msgspec
from aiohttp import ClientSession, web

from . import config
from .config import Config
from .demo import MODEL, Pace, backend
from .errors import ListenError, SseproxyError
from .process.supervisor import Supervisor

_SHOWN = (
    "sseproxy_requests_total",
    "sseproxy_time_to_response_head_seconds_sum",
    "sseproxy_time_to_first_token_seconds_sum",
    "sseproxy_inter_token_latency_seconds_count",
    "sseproxy_inter_token_latency_seconds_sum",
    "sseproxy_tokens_total",
)
_MESSAGES = [{"role": "user", "content": "What does a streaming proxy do?"}]

_NEXT = """
The proxy stays up until Ctrl-C. Try it:

  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'

  pip install openai && python3 - <<'EOF'
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="unused")
  stream = client.chat.completions.create(
      model="{model}", stream=True, messages=[{{"role": "user", "content": "Hello"}}])
  for chunk in stream:
      if chunk.choices:
          print(chunk.choices[0].delta.content or "", end="", flush=True)
  print()
  EOF

  curl -s {admin}/metrics | grep ^sseproxy_
"""


def _say(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()


async def run(pace: Pace, *, listen: str | None, admin: str | None, once: bool) -> int:
    """Runs the demonstration; returns the exit status."""
    runner = web.AppRunner(backend(pace), handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        supervisor = _bound(config.single(f"http://127.0.0.1:{site.port}/v1", listen=listen, admin=admin, workers=1))
        await supervisor.start()
        _say(f"A backend on port {site.port} makes {pace.rate:g} tokens a second; the proxy is {supervisor.urls[0]}.\n")
        loop = asyncio.get_running_loop()
        answer = loop.create_task(_stream_one(supervisor))
        stopped = loop.create_task(supervisor.stopping.wait())
        await asyncio.wait((answer, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not answer.cancel():
            answer.result()
            if once:
                await supervisor.close()
                return 0
            _say(_NEXT.format(url=supervisor.urls[0], admin=supervisor.admin_url, model=MODEL))
        return await supervisor.run()
    finally:
        await runner.cleanup()


def _bound(settings: Config) -> Supervisor:
    """A supervisor that listens; on other ports than asked for if those are taken."""
    try:
        supervisor = Supervisor(settings)
        supervisor.bind()
    except ListenError as error:
        if not error.in_use:
            raise
        _say(f"{error}; using another port.")
        settings = config.override(settings, **{error.option.partition(".")[0]: "127.0.0.1:0"})
        return _bound(settings)
    return supervisor


async def _stream_one(supervisor: Supervisor) -> None:
    _say(f"POST {supervisor.urls[0]}/v1/chat/completions\n")
    request = {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": _MESSAGES,
    }
    async with ClientSession() as session:
        async with session.post(f"{supervisor.urls[0]}/v1/chat/completions", json=request) as response:
            if response.status != 200:
                raise SseproxyError(f"the demonstration got status {response.status}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    for choice in msgspec.json.decode(line[6:])["choices"]:
                        _say(choice["delta"].get("content", ""), end="")
        _say("\n\nWhat /metrics says of it:\n")
        _say("\n".join(f"  {line}" for line in await _measured(session, supervisor.admin_url)))


async def _measured(session: ClientSession, admin: str) -> Iterable[str]:
    """The interesting lines of `/metrics`, once the exchange is in them."""
    while True:
        async with session.get(f"{admin}/metrics") as response:
            lines = (await response.text()).splitlines()
        shown = [line for line in lines if line.startswith(_SHOWN) and not line.endswith(" 0.0")]
        if any(line.startswith("sseproxy_requests_total{") for line in shown):
            return shown
        await asyncio.sleep(0.05)
