"""The token of the admin listener: what needs it, how it is told, and the session of a browser."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st

from sseproxy import config
from sseproxy.errors import ConfigError
from sseproxy.process import login
from sseproxy.wire.credentials import SESSION_COOKIE

from .harness import ScriptedUpstream
from .served import ConfigFile, Served, run
from .test_grafana import prometheus

TOKEN = "a-token-of-the-tests"
VALID = """
upstreams: [{name: up, url: "http://127.0.0.1:9/v1"}]
routes: [{name: api, match: {path: /v1}, upstream: up}]
"""
# What there is, and with which status it answers who is let in.
SERVED = {
    ("GET", "/"): 200,
    ("GET", "/live"): 200,
    ("GET", "/live/events"): 200,
    ("GET", "/metrics"): 200,
    ("POST", "/live/0123456789abcdef/cancel"): 403,
    ("POST", "/-/reload"): 200,
    ("GET", "/nothing"): 404,
}
HEALTH = ("/livez", "/readyz")


@pytest.fixture
async def file(upstream: ScriptedUpstream, tmp_path: Path) -> ConfigFile:
    return ConfigFile(tmp_path, upstream, admin=f"{{listen: '127.0.0.1:0', token: {TOKEN}}}")


@pytest.fixture
async def served(file: ConfigFile) -> AsyncIterator[Served]:
    async with file.serve() as running:
        yield running


async def status_of(served: Served, method: str, path: str, **headers: str) -> int:
    async with (
        ClientSession() as session,
        session.request(method, f"http://127.0.0.1:{served.admin}{path}", headers=headers) as response,
    ):
        if response.status == 401:
            assert response.headers["WWW-Authenticate"] == 'Bearer realm="sseproxy"'
            assert TOKEN not in await response.text()
        return response.status


async def test_everything_but_health_needs_the_token(served: Served) -> None:
    for (method, path), status in SERVED.items():
        for wrong in (
            {},
            {"Authorization": "Bearer another-token"},
            {"Authorization": TOKEN},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": "Bearer \xff"},
            {"Cookie": f"{SESSION_COOKIE}={TOKEN}"},
            {"Cookie": f"{SESSION_COOKIE}={login.session('another-token', int(time.time()))}"},  # noqa: TID251
        ):
            assert await status_of(served, method, path, **wrong) == 401, (path, wrong)
        for right in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", f"BEARER {TOKEN} "):
            assert await status_of(served, method, path, Authorization=right) == status, path
    for path in HEALTH:
        assert await status_of(served, "GET", path) == 200
    assert (await run("healthcheck", "--admin", f"127.0.0.1:{served.admin}"))[0] == 0
    assert TOKEN not in served.stderr


async def test_nobody_learns_which_libraries_there_are(served: Served) -> None:
    async with ClientSession(f"http://127.0.0.1:{served.admin}") as session:
        for path in ("/", "/metrics", "/livez", "/nothing"):
            async with session.get(path) as response:
                assert response.headers["Server"] == "sseproxy"


async def test_without_a_token_everything_is_open(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream).serve() as served:
        for (method, path), status in SERVED.items():
            assert await status_of(served, method, path) == status


async def test_the_first_page_lists_what_there_is(served: Served) -> None:
    async with (
        ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
        session.get(f"http://127.0.0.1:{served.admin}/") as response,
    ):
        text = await response.text()
        for path in ("/live", "/metrics", "/livez", "/readyz"):
            assert f'<a href="{path}">' in text
        assert "POST /-/reload" in text
        for link in re.findall(r'href="(/[^"]*)"', text):
            async with session.get(f"http://127.0.0.1:{served.admin}{link}") as linked:
                assert linked.status == 200


async def test_a_browser_logs_in_once(served: Served, file: ConfigFile, upstream: ScriptedUpstream) -> None:
    url = f"http://127.0.0.1:{served.admin}"
    async with ClientSession(headers={"Accept": "text/html"}) as session:
        async with session.get(f"{url}/live") as response:
            assert response.status == 401
            text = await response.text()
            assert 'name="token"' in text
            assert 'name="to" value="/live"' in text
        async with session.post(f"{url}/login", data={"token": "wrong", "to": "/live"}) as response:
            assert response.status == 401
            assert "This is not the token." in await response.text()
            assert "Set-Cookie" not in response.headers
        form = {"token": TOKEN, "to": "/live"}
        async with session.post(f"{url}/login", data=form, allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (303, "/live")
            cookie, *attributes = response.headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=43200"} <= {*attributes}
        assert TOKEN not in cookie
        for (method, path), status in SERVED.items():
            assert await status_of(served, method, path, Cookie=cookie) == status
        # It is valid after a reload, and not with another token.
        assert await status_of(served, "GET", "/live", Cookie=cookie) == 200
        file.write(upstream, admin="{listen: '127.0.0.1:0', token: another-token}")
        assert await status_of(served, "POST", "/-/reload", Cookie=cookie) == 200
        assert await status_of(served, "GET", "/live", Cookie=cookie) == 401
        assert await status_of(served, "GET", "/live", Authorization="Bearer another-token") == 200


async def test_logging_in_leads_nowhere_else(served: Served) -> None:
    for to in ("https://evil.example/", "//evil.example", "/metrics", ""):
        async with (
            ClientSession() as session,
            session.post(
                f"http://127.0.0.1:{served.admin}/login", data={"token": TOKEN, "to": to}, allow_redirects=False
            ) as response,
        ):
            assert (response.status, response.headers["Location"]) == (303, "/")


async def test_no_page_of_another_site_gets_there_but_a_link_may_be_followed(served: Served) -> None:
    right = {"Authorization": f"Bearer {TOKEN}"}
    for method, path in (("GET", "/live/events"), ("POST", "/login"), ("POST", "/-/reload")):
        for fields in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
            assert await status_of(served, method, path, **right, **fields) == 403
        assert await status_of(served, method, path, **right, Host="rebound.example") == 421
    assert await status_of(served, "GET", "/live", **right, **{"Sec-Fetch-Site": "cross-site"}) == 200


async def test_pages_load_nothing_and_run_nothing_but_what_is_in_them(served: Served) -> None:
    for path in ("/", "/live"):
        for headers in ({"Authorization": f"Bearer {TOKEN}"}, {"Accept": "text/html"}):
            async with (
                ClientSession(headers=headers) as session,
                session.get(f"http://127.0.0.1:{served.admin}{path}") as response,
            ):
                policy = response.headers["Content-Security-Policy"]
                text = await response.text()
            assert policy.startswith("default-src 'none'; ")
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert "trusted-types 'none'" in policy
            assert policy.count("'sha256-") == len(re.findall("<(?:style|script)>", text))
            assert not re.search(r"<(?:script|style) |\son\w+=|\sstyle=|@import|url\(", text)
            assert not re.search(r"""(?:src|href)=["'](?!/|data:,)""", text)
            assert response.headers["Cache-Control"] == "no-store"


async def test_prometheus_scrapes_with_the_token(served: Served, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    authorization = {"credentials_file": str(tmp_path / "token")}
    async with prometheus(tmp_path, served, authorization=authorization) as asked:
        assert await asked.answers("sseproxy_workers == 1")


def test_cancelling_without_a_token_is_a_mistake() -> None:
    with pytest.raises(ConfigError) as raised:
        config.parse(f"admin: {{cancel: true}}{VALID}", "f", {})
    assert raised.value.problems == (
        "f:1:1: admin: expected token beside cancel: true, because without one anybody could end requests",
    )
    assert config.parse(f"admin: {{cancel: true, token: t}}{VALID}", "f", {}).admin.cancel


@pytest.mark.parametrize("token", ["'two words'", "tökén", "[secret]", "{secret: 1}", '"a\\nb"'])
def test_a_token_that_cannot_be_sent_is_a_mistake_and_not_shown(token: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.parse(f"admin: {{token: {token}}}{VALID}", "f", {})
    assert raised.value.problems == ("f:1:9: admin.token: expected a token: text of visible ASCII characters",)


def test_a_token_is_shown_nowhere_and_no_worker_gets_it() -> None:
    loaded = config.parse(f"admin: {{token: {TOKEN}}}{VALID}", "f", {})
    assert TOKEN not in config.resolved(loaded)
    assert TOKEN not in repr(loaded)
    assert loaded.admin.token is not None
    assert loaded.for_workers().admin.token is None


@given(st.text(), st.text(min_size=1))
def test_only_the_token_is_the_token(told: str, token: str) -> None:
    assert login.is_token(told, token) == (told == token)
    assert login.is_token(token, token)


@given(st.integers(0, 2**36), st.integers(-100_000, 100_000), st.data())
def test_a_session_is_valid_for_its_time_and_only_as_it_was_made(now: int, later: int, data: st.DataObject) -> None:
    made = login.session(TOKEN, now)
    assert login.is_session(made, TOKEN, now + later) == (later < 12 * 3600)
    assert not login.is_session(made, f"{TOKEN}x", now)
    at = data.draw(st.integers(0, len(made) - 1))
    other = made[:at] + data.draw(st.characters(exclude_characters=made[at])) + made[at + 1 :]
    assert not login.is_session(other, TOKEN, now)


@given(st.text())
def test_no_other_text_is_a_session(told: str) -> None:
    assert not login.is_session(told, TOKEN, 0)
