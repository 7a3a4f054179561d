"""The page of the live view in a real Chromium, in front of a running proxy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession

from .chromium import Tab, chromium
from .harness import DONE, LAST_CHUNK, STREAM_HEAD, Peer, ScriptedUpstream, chunk, delta, usage
from .served import ConfigFile, Served
from .test_live import ADMIN, BEARER, TOKEN, request

pytestmark = pytest.mark.timeout(120)

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'&\u202e"
ROWS = "document.querySelectorAll('#rows tr')"
RUNNING = "document.querySelectorAll('#rows tr:not(.ended)').length"
ENDED = "document.querySelectorAll('#rows tr.ended').length"
MODELS = "[...document.querySelectorAll('#rows tr .model')].map(cell => cell.textContent)"


@pytest.fixture
async def served(upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Served]:
    async with ConfigFile(tmp_path, upstream, admin=ADMIN, workers="2").serve() as running:
        yield running


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Tab]:
    async with chromium(tmp_path / "chromium") as opened:
        yield opened


async def log_in(tab: Tab, served: Served) -> None:
    """As a person does: opens the page, and gives the token."""
    await tab.go(f"http://127.0.0.1:{served.admin}/live")
    await tab.until("document.querySelector('#token') !== null")
    await tab.evaluate(f"document.querySelector('#token').value = {json.dumps(TOKEN)}")
    await tab.evaluate("document.querySelector('form button').click()")
    await tab.until("document.querySelector('#state')?.textContent === 'connected'")


async def colors(tab: Tab) -> tuple[int, int]:
    """How bright text and background are, from 0 to 765."""
    script = "(name => getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"
    return await tab.evaluate(f"{script}('color')"), await tab.evaluate(f"{script}('backgroundColor')")


async def test_two_hundred_streams_from_their_beginning_to_their_end(
    served: Served, upstream: ScriptedUpstream, tab: Tab
) -> None:
    await tab.size(1280, 800)
    await log_in(tab, served)
    assert await tab.evaluate("document.querySelector('#empty').textContent") == "No request is under way."
    # It is not said while nothing is known.
    assert not await tab.evaluate("document.querySelector('#empty').hidden")
    assert await tab.evaluate("close(), render(), document.querySelector('#empty').hidden")
    await tab.evaluate("state('connecting'), open()")
    await tab.until("document.querySelector('#state').textContent === 'connected'")
    streams = [await request(served, upstream, f"model-{number:03}") for number in range(200)]
    await tab.until(f"{RUNNING} === 200")
    waits = "[...document.querySelectorAll('#rows .first')].filter(cell => cell.textContent.endsWith('…')).length"
    assert await tab.evaluate(waits) == 200
    for _, api in streams[:150]:
        api.send(STREAM_HEAD, chunk(delta("Hi")))
    await tab.until(f"{waits} === 50")
    assert await tab.evaluate("document.querySelector('#totals').textContent.startsWith('200 under way50 wait')")
    # The longest silences first, in whole seconds: those that have said nothing.
    waiting = "[...rows.values()].filter(row => row.first_token_seconds === null)"
    await tab.until(f"{waiting}.every(row => silence(row) > 1)")
    for _, api in streams[:150]:
        api.send(chunk(delta("there")))
    silent = json.dumps([f"model-{number:03}" for number in range(150, 200)])
    await tab.until(f"JSON.stringify({MODELS}.slice(0, 50).sort()) === JSON.stringify({silent})")

    # Tokens a second, as a number and as a curve.
    talking = asyncio.ensure_future(talk(streams[0][1]))
    curve = "document.querySelector(`tr[data-id='${[...rows.values()].find(row => row.model === 'model-000').id}']`)"
    await tab.until(f"{curve}.querySelector('polyline').getAttribute('points').split(' ').length >= 2")
    await tab.until(f"Number({curve}.querySelector('.rate').textContent) > 5")
    talking.cancel()

    # A reload in between: the streams go on and end in the old workers, and new ones are in the new workers.
    async with (
        ClientSession(headers=BEARER) as session,
        session.post(f"http://127.0.0.1:{served.admin}/-/reload") as response,
    ):
        assert response.status == 200
    streams.append(await request(served, upstream, EVIL))
    await tab.until(f"{RUNNING} === 201")
    for number, (client, api) in enumerate(streams[:40]):
        if number < 20:
            api.send(chunk(usage(1, 1)), chunk(DONE), LAST_CHUNK)
        elif number < 30:
            api.close()
        else:
            client.reset()
    await tab.until(f"{RUNNING} === 161")
    for outcome, number in (("completed", 20), ("truncated", 10), ("client_gone_mid_stream", 10)):
        assert f"{number} {outcome}" in await tab.evaluate("document.querySelector('#totals').textContent")

    # What comes from outside is text.
    await filter_by(tab, "onerror")
    assert await tab.evaluate(f"{ROWS}.length") == 1
    assert await tab.evaluate(f"{MODELS}[0]") == EVIL.replace("\u202e", "?")
    assert await tab.evaluate("document.querySelectorAll('main img, main script').length") == 0
    await filter_by(tab, "")

    # All of that ran without a complaint, but for the page that was refused before the log in.
    assert [text for text in tab.complaints if "401" not in text] == []
    assert await tab.evaluate("document.querySelector('#state').textContent") == "connected"


async def talk(api: Peer) -> None:
    while True:
        api.send(chunk(delta("token")))
        await asyncio.sleep(0.05)


async def filter_by(tab: Tab, words: str) -> None:
    await tab.evaluate(f"(at('filter').value = {json.dumps(words)}, at('filter').dispatchEvent(new Event('input')))")


async def test_filter_order_pause_cancel_and_what_it_looks_like(
    served: Served, upstream: ScriptedUpstream, tab: Tab
) -> None:
    await tab.size(1280, 800)
    await log_in(tab, served)
    streams = {}
    for name in ("zebra", "ape", "mole"):
        streams[name] = await request(served, upstream, name)
        await tab.until(f"{RUNNING} === {len(streams)}")
    assert await tab.evaluate(MODELS) == ["zebra", "ape", "mole"]
    await tab.evaluate("document.querySelector('th[data-name=model] button').click()")
    assert await tab.evaluate(MODELS) == ["ape", "mole", "zebra"]
    await tab.evaluate("document.querySelector('th[data-name=model] button').click()")
    assert await tab.evaluate(MODELS) == ["zebra", "mole", "ape"]
    assert await tab.evaluate("document.querySelector('th[data-name=model]').getAttribute('aria-sort')") == "descending"
    await filter_by(tab, "API mol")
    assert await tab.evaluate(MODELS) == ["mole"]
    await filter_by(tab, "nobody")
    assert await tab.evaluate("document.querySelector('#empty').textContent") == "No request matches the filter."
    await filter_by(tab, "")

    # While it is paused, nothing moves, and nobody looks.
    await tab.evaluate("at('pause').click()")
    streams["late"] = await request(served, upstream, "late")
    assert await tab.evaluate("source") is None
    assert len(await tab.evaluate(MODELS)) == 3
    await tab.evaluate("at('pause').click()")
    await tab.until(f"{RUNNING} === 4")

    # Silence turns amber, then red.
    assert await tab.evaluate("[0, 9.9, 10, 59.9, 60, 1e6].map(level)") == ["", "", "amber", "amber", "red", "red"]
    await tab.evaluate("heardAt -= 11000, render()")
    assert await tab.evaluate(f"{ROWS}[0].className") == "amber"
    await tab.evaluate("heardAt -= 60000, render()")
    assert await tab.evaluate(f"{ROWS}[0].className") == "red"

    # One click asks, the second one cancels.
    button = "[...rows.values()].find(row => row.model === 'ape').element.querySelector('button')"
    await tab.evaluate(f"{button}.click()")
    assert await tab.evaluate(f"{button}.textContent") == "Really?"
    await tab.evaluate(f"{button}.click()")
    answer = await streams["ape"][0].message()
    assert (answer.status, answer.get("x-should-retry")) == (503, "false")
    await tab.until(f"{ENDED} === 1")
    assert await tab.evaluate("document.querySelector('tr.ended .outcome').textContent") == "cancelled"

    # Dark and light, and on a telephone.
    for name in ("light", "dark"):
        await tab.scheme(name)
        ink, ground = await colors(tab)
        assert (ink < ground) == (name == "light")
    await tab.size(360, 740)
    assert await tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert await tab.evaluate(f"{ROWS}[0].getBoundingClientRect().width") <= 360
    for cell in ("model", "quiet", "route", "endpoint", "client", "first", "tokens", "since"):
        box = f"{ROWS}[0].querySelector('.{cell}').getBoundingClientRect()"
        assert await tab.evaluate(f"{box}.left >= 0 && {box}.right <= 360 && {box}.height > 0"), cell
    assert (await tab.screenshot()).startswith(b"\x89PNG")

    # A page that nobody sees does not look.
    hide = "Object.defineProperty(document, 'hidden', {get: () => %s, configurable: true})"
    await tab.evaluate(f"({hide % 'true'}, document.dispatchEvent(new Event('visibilitychange')))")
    assert await tab.evaluate("source") is None
    await tab.evaluate(f"({hide % 'false'}, document.dispatchEvent(new Event('visibilitychange')))")
    await tab.until("document.querySelector('#state').textContent === 'connected' && !stale")

    # It says so when the proxy is gone.
    served.process.terminate()
    for client, _ in streams.values():
        client.reset()
    await tab.until("document.querySelector('#state').textContent === 'disconnected'")
    assert [text for text in tab.complaints if "401" not in text and "ERR_" not in text] == []
