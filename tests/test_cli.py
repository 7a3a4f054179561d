"""The command line, as it is typed."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from math import inf
from pathlib import Path

import pytest
from aiohttp import web
from openai import AsyncOpenAI

from sseproxy import __version__, cli
from sseproxy.demo import Pace, answer, backend

from .harness import DONE, LAST_CHUNK, STREAM_HEAD, ScriptedUpstream, chunk, post
from .served import run, serve, until_true

ANYWHERE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--workers", "1")
GOOD = """\
upstreams:
  - name: up
    url: http://127.0.0.1:1/v1
    api_key: ${KEY:-}
routes:
  - {name: api, match: {path: /v1}, upstream: up}
"""


def test_a_good_file_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    assert cli.main(["check-config", str(file)]) == 0
    assert capsys.readouterr() == (f"{file}: ok (1 route, 1 upstream)\n", "")


def test_all_problems_of_a_file_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(GOOD.replace("upstream: up", "upstream: down") + "drain_timeout: 30\nlisten: nowhere\n")
    assert cli.main(["check-config", str(file)]) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert [line.removeprefix(f"sseproxy: {file}:").split(": ")[1] for line in errors.splitlines()] == [
        "routes[0].upstream",
        "drain_timeout",
        "listen",
    ]


def test_a_route_that_no_request_can_take_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "shadow.yaml"
    file.write_text(GOOD + '  - {name: any, match: {path: "/%761", methods: [GET]}, upstream: up}\n')
    for arguments in ([], ["--resolved"]):
        assert cli.main(["check-config", str(file), *arguments]) == 0
        assert capsys.readouterr().err == (
            f"sseproxy: warning: {file}:7:17: routes[1].match: no request can take this route: api takes its requests; "
            "give it a higher place in the list, or remove it\n"
        )


def test_a_key_behind_an_open_port_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "open.yaml"
    digest = "sha256:" + 64 * "0"
    clients = f"clients: [{{name: team-a, keys: ['{digest}']}}]\n"
    of_endpoint = "upstreams: [{name: up, urls: [{url: http://h/v1, api_key: sk-1}]}]\n" + GOOD[GOOD.index("routes") :]
    for listen, key, more, said in (
        ("0.0.0.0:80", "sk-1", "", "0.0.0.0:80"),
        ("['[::1]:1', ':80', 'unix:/s', '10.0.0.5:81']", "sk-1", "", ":80 or 10.0.0.5:81"),
        ("0.0.0.0:80", "", "", None),
        ("0.0.0.0:80", "sk-1", clients, None),
        ("['127.0.0.2:1', 'localhost:1', '[::1]:1', 'unix:/s', systemd]", "sk-1", "", None),
    ):
        monkeypatch.setenv("KEY", key)
        file.write_text(f"{GOOD}listen: {listen}\n{more}")
        assert cli.main(["check-config", str(file)]) == 0
        warning = (
            f"sseproxy: warning: {file}: listen: everybody who can reach {said} spends the key of up; name clients "
            "(sseproxy key NAME), or make sure that only a private network reaches it\n"
        )
        assert capsys.readouterr().err == (warning if said else "")
    file.write_text(of_endpoint + "listen: :80\n")
    assert cli.main(["check-config", str(file)]) == 0
    assert "everybody who can reach :80 spends the key of up" in capsys.readouterr().err


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "-c", "/nowhere/sseproxy.yaml"]) == 1
    assert capsys.readouterr().err == "sseproxy: /nowhere/sseproxy.yaml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--upstream", "not a url"], "--upstream"),
        (["--upstream", "http://127.0.0.1:1", "--listen", "here"], "--listen"),
        (["--upstream", "http://127.0.0.1:1", "--admin", "here"], "--admin"),
        (["--upstream", "http://127.0.0.1:1", "--workers", "none"], "--workers"),
    ],
)
def test_a_flag_that_makes_no_sense_is_named(
    arguments: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sseproxy: {flag}: expected ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve"],
        ["serve", "-c", "x", "--upstream", "y"],
        ["check-config"],
        ["demo", "--rate", "0"],
        ["demo", "--ttft", "-1"],
        ["demo", "--ttft", "soon"],
        ["demo", "--tokens", "1.5"],
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "usage: sseproxy" in err
    assert "invalid _" not in err  # argparse would name our function


def test_all_flags_that_make_no_sense_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--upstream", "u", "--listen", "l", "--admin", "a", "--workers", "0"]) == 1
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "--upstream",
        "--listen",
        "--admin",
        "--workers",
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["serve", "check-config", "demo", "probe", "doctor", "--version"]),
        (["probe"], ["--listen HOST:PORT", "--token T"]),
        (
            ["doctor"],
            ["URL", "--token T", "--model M", "--api-key-env NAME", "--silence TIME", "--html FILE", "--json"],
        ),
        (["serve"], ["--config FILE", "--upstream URL", "--workers N", "--listen HOST:PORT", "--admin HOST:PORT"]),
        (["check-config"], ["FILE"]),
        (["demo"], ["--once", "--ttft S", "--rate N", "--tokens N", "--listen HOST:PORT", "--admin HOST:PORT"]),
    ],
)
def test_help_names_every_option(arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(" ".join(["usage: sseproxy", *arguments]))
    assert [option for option in named if option not in out] == []


def test_help_tells_the_demonstrations_pace(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert f"seconds to the first token ({Pace().ttft:g})" in out
    assert f"tokens per second ({Pace().rate:g})" in out
    assert f"tokens per answer ({Pace().tokens})" in out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"sseproxy {__version__}\n"


@pytest.fixture
async def demo_port() -> AsyncIterator[int]:
    runner = web.AppRunner(backend(Pace(ttft=0, rate=inf, tokens=5)), handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield site.port
    await runner.cleanup()


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
async def test_an_upstream_with_and_without_a_path_serves_the_same_clients(demo_port: int, path: str) -> None:
    async with serve("--upstream", f"http://127.0.0.1:{demo_port}{path}", *ANYWHERE) as served:
        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="k", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="demo", stream=True, messages=[{"role": "user", "content": "Hello"}]
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == "".join(answer(5))


async def test_a_key_from_the_environment_goes_upstream_and_nowhere_else(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = tmp_path / "sseproxy.yaml"
    file.write_text(GOOD.replace("http://127.0.0.1:1", upstream.url))
    async with serve("-c", str(file), *ANYWHERE, KEY="sk-planted") as served:
        client = await served.connect()
        client.send(post().replace(b"Host:", b"Authorization: Bearer sk-of-the-client\r\nHost:"))
        api = await upstream.accept()
        assert (await api.message()).all("authorization") == ["Bearer sk-planted"]
        api.send(STREAM_HEAD, chunk(DONE), LAST_CHUNK)
        received = (await client.message()).body
        await served.until(r"requests_total\{.*\}", 1)
        client.send(post())
        await api.message()
        api.send(b"HTTP/9.9 garbage\r\n\r\n")
        received += (await client.message()).body
        _, _, metrics = await served.get("/metrics")
        served.process.terminate()
        await served.ended()
        said = "\n".join([*served.lines, served.stderr, metrics, received.decode()])
        assert "sk-" not in said
        assert str(upstream.port) not in received.decode()


async def test_flags_go_before_the_file_and_each_route_is_told(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = tmp_path / "sseproxy.yaml"
    more = "  - {name: some, match: {path: /v1/models, model: [a, b*], methods: [get]}, upstream: up}\n"
    file.write_text(GOOD + more + "listen: 192.0.2.1:1\nadmin: {listen: '192.0.2.1:2'}\nworkers: 7\n")
    async with serve("-c", str(file), *ANYWHERE) as served:
        assert served.lines == [
            f"sseproxy {__version__} listens on http://127.0.0.1:{served.port}",
            "/v1         ->  http://127.0.0.1:1/v1",
            "/v1/models  ->  http://127.0.0.1:1/v1 (GET, model a, model b*)",
            f"metrics and health: http://127.0.0.1:{served.admin}/metrics /livez /readyz /live",
            "workers: 1",
        ]


async def test_a_file_that_cannot_be_used_starts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(GOOD.replace("upstream: up", "upstream: down"))
    status, out, errors = await run("serve", "-c", str(file), *ANYWHERE)
    assert (status, out) == (1, "")
    assert errors.startswith(f"sseproxy: {file}:6:")
    assert errors.count("\n") == 1


async def test_a_configuration_may_be_another_programs_output(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    command = 'exec "$0" -m sseproxy check-config <(cat good.yaml)'
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", command, sys.executable), cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert out.startswith(b"/dev/fd/")
    assert out.endswith(b": ok (1 route, 1 upstream)\n")


async def test_a_pipe_in_place_of_a_key_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    file = tmp_path / "bad.yaml"
    file.write_text(GOOD.replace("api_key: ${KEY:-}", f"api_key_file: {tmp_path / 'key'}"))
    status, out, errors = await run("check-config", str(file))
    assert (status, out) == (1, "")
    assert errors.endswith("api_key_file: expected a readable file with an API key (not a regular file)\n")


async def test_the_module_runs_as_the_command_does() -> None:
    assert await run("--version") == (0, f"sseproxy {__version__}\n", "")


async def test_nothing_is_served_without_the_parser_that_was_tested() -> None:
    status, out, errors = await run("serve", "--upstream", "http://127.0.0.1:1", AIOHTTP_NO_EXTENSIONS="1")
    assert (status, out) == (1, "")
    assert errors.startswith("sseproxy: aiohttp has no C parser here; ")
    assert len(errors.splitlines()) == 1


async def test_health_is_that_of_the_admin_listener(upstream: ScriptedUpstream) -> None:
    async with serve(
        "--upstream", upstream.url, "--listen", "127.0.0.1:0", "--admin", ":0", "--workers", "1"
    ) as served:
        for host in ("", "0.0.0.0", "127.0.0.1"):
            assert await run("healthcheck", "--admin", f"{host}:{served.admin}") == (0, "", "")
        client = await served.connect()
        client.send(post())
        await (await upstream.accept()).message()
        served.process.terminate()
        await until_true(lambda: "draining" in served.stderr)
        status, out, errors = await run("healthcheck", "--admin", f"127.0.0.1:{served.admin}")
        assert (status, out, errors) == (1, "", "sseproxy: not ready: draining\n")
    status, _, errors = await run("healthcheck", "--admin", f"127.0.0.1:{served.admin}")
    assert status == 1
    assert errors == f"sseproxy: no answer from 127.0.0.1:{served.admin}: connection refused\n"
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-x\r\n")

        port = other.getsockname()[1]
        _, found = await asyncio.gather(asyncio.to_thread(answer), run("healthcheck", "--admin", f"127.0.0.1:{port}"))
        assert found == (1, "", f"sseproxy: no answer from 127.0.0.1:{port}: it is not HTTP\n")
    assert await run("healthcheck", "--admin", "x") == (1, "", "sseproxy: --admin: expected HOST:PORT, got 'x'\n")
