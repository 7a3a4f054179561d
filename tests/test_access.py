"""What the access log says of an exchange, to whom, and that nobody waits for whoever reads it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
import statistics
import threading
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from select import PIPE_BUF
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from sseproxy import config
from sseproxy.errors import Outcome
from sseproxy.observe.access import AccessLog, _json, _text, describe
from sseproxy.relay.exchange import Exchange
from sseproxy.wire.headers import Fields, client_address
from sseproxy.wire.meaning import DELTA, Usage

from .harness import DONE, LAST_CHUNK, STREAM_HEAD, Peer, ScriptedUpstream, chunk, delta, post, usage
from .served import ConfigFile, Served, until_true
from .test_fuzz import Recording

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def lines(served: Served) -> list[dict[str, Any]]:
    return [json.loads(line) for line in served.logged.decode().splitlines()]


async def logged(served: Served, number: int) -> list[dict[str, Any]]:
    await until_true(lambda: served.logged.count(b"\n") >= number)
    return lines(served)


async def exchange(served: Served, upstream: ScriptedUpstream, *fields: bytes, status: bytes = b"200 OK") -> Peer:
    """An exchange that ends well: two tokens, and their usage."""
    client = await served.connect()
    client.send(post(b'{"model":"gpt\\u001b[1m","stream":true}').replace(b"\r\n", b"\r\n" + b"".join(fields), 1))
    api = await upstream.accept()
    await api.message()
    finish = delta("!", choices=[{"index": 0, "delta": {"content": "!"}, "finish_reason": "stop"}])
    api.send(STREAM_HEAD.replace(b"200 OK", status + b"\r\nConnection: close"), chunk(delta("Hi")))
    await client.read_until(delta("Hi"))
    api.send(chunk(finish), chunk(usage(7, 2)), chunk(DONE), LAST_CHUNK)
    await client.read_until(LAST_CHUNK)
    return client


async def test_a_line_says_what_happened_and_when(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream, trusted_proxies="127.0.0.1").serve() as served:
        fields = (
            b"X-Request-Id: my-id\r\n",
            b"Traceparent: %b\r\n" % TRACE.encode(),
            b"X-Forwarded-For: 203.0.113.9, 198.51.100.7:1234\r\n",
        )
        await exchange(served, upstream, *fields)
        (line,) = await logged(served, 1)
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    head, first, total = (line.pop(f"{name}_seconds") for name in ("head", "first_token", "duration"))
    assert 0 < head <= first <= total < 20
    assert 0 < line.pop("gap_p50_seconds") < 10
    assert 0 < line.pop("gap_max_seconds") <= total
    assert line.pop("response_bytes") > 100
    assert line == {
        "request_id": "my-id",
        "client": "198.51.100.7",
        "route": "api",
        "upstream": "up",
        "api": "chat",
        "model": "gpt?[1m",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "outcome": "completed",
        "stream": True,
        "events": 4,
        "request_bytes": 38,
        "usage": {"input": 7, "output": 2},
        "finish_reason": "stop",
        "traceparent": TRACE,
    }


async def test_a_form_that_passes_tells_its_model(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream).serve() as served:
        client = await served.connect()
        form = (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nRIFF\r\n'
            b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--x--\r\n'
        )
        request = post(form, "/v1/audio/transcriptions")
        head, _, body = request.replace(b"application/json", b"multipart/form-data; boundary=x").partition(b"RIFF")
        client.send(head)
        api = await upstream.accept()
        await api.head()
        client.send(b"RIFF" + body)
        assert await api.read(len(form)) == form
        api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await client.message()
        (line,) = await logged(served, 1)
    assert (line["api"], line["model"]) == ("transcriptions", "whisper-1")


async def test_a_line_says_why_nothing_happened(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream).serve() as served:
        client = await served.connect()
        client.send(post(path="/nowhere?secret=1"))
        response = await client.message()
        gone = await served.connect()
        gone.send(post())
        api = await upstream.accept()
        await api.message()
        gone.close()
        await api.gone()
        refused, left = await logged(served, 2)
    assert refused["request_id"] == response.get("x-request-id")
    assert (refused["status"], refused["outcome"], refused["reason"]) == (404, "rejected", "no_route")
    assert refused["client"] == "127.0.0.1"
    assert refused["path"] == "/*"
    assert "route" not in refused
    assert left["outcome"] == "client_gone_before_head"
    assert "status" not in left
    assert "secret" not in served.logged.decode()


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/files/file-abc123/content", "/v1/files/*/content"),
        ("/v1/threads/t_1/runs/r_2/submit_tool_outputs", "/v1/threads/*/runs/*/submit_tool_outputs"),
        ("/v1beta/models/gemini-2.5-pro:streamGenerateContent", "/v1beta/models/*:streamGenerateContent"),
        ("/v1beta/models/gemini:SECRET", "/v1beta/models/*:*"),
        ("/SECRET/v1/models", "/*/v1/models"),
        ("//v1//", "//v1//"),
        ("/v1/\x1b[1m", "/v1/*"),
    ],
)
def test_of_a_path_the_words_of_known_apis_are_told(path: str, known: str) -> None:
    exchange = Exchange("r", "up", Recording(), "id", 0.0)
    exchange.path, exchange.ended_at = path, 0.0
    assert describe(exchange, datetime.now(UTC)).path == known


@pytest.mark.parametrize(("option", "told"), [("all", "/v1/files/a%20b"), ("off", None)])
async def test_a_path_is_told_as_it_is_configured(
    upstream: ScriptedUpstream, tmp_path: Path, option: str, told: str | None
) -> None:
    async with ConfigFile(tmp_path, upstream, access_log=f"{{path: {option}}}").serve() as served:
        client = await served.connect()
        client.send(b"GET /v1/files/a%20b?secret=1 HTTP/1.1\r\nHost: p\r\n\r\n")
        api = await upstream.accept()
        await api.message()
        api.send(b"HTTP/1.1 204 No Content\r\nX-Request-Id: req_7\r\n\r\n")
        await client.message()
        (line,) = await logged(served, 1)
    assert line.get("path") == told
    assert line["upstream_request_id"] == "req_7"


async def test_of_a_target_with_a_host_the_path_is_told_and_no_secret(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    targets = ["http://proxy.example/v2?secret", "http://me:secret@h/v2", "http://me:secret@h?secret", "ftp://secret/"]
    async with ConfigFile(tmp_path, upstream, access_log="{path: all}").serve() as served:
        for target in targets:
            client = await served.connect()
            client.send(f"GET {target} HTTP/1.1\r\nHost: p\r\n\r\n".encode())
            assert (await client.message()).status in (400, 404)
        told = [line.get("path") for line in await logged(served, len(targets))]
    assert told == ["/v2", "/v2", None, None]
    assert b"secret" not in served.logged + served.errors


async def test_the_model_is_told_of_a_body_that_comes_apart_and_of_what_failed(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with ConfigFile(tmp_path, upstream).serve() as served:
        request = post(b'{"model":"m-1","messages":["' + b"x" * 50_000 + b'"]}')
        client = await served.connect()
        client.send(request[:200])
        api = await upstream.accept()
        client.send(request[200:])
        await api.message()
        api.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        await client.message()
        cut = await served.connect()
        cut.send(request[:300])
        api = await upstream.accept()
        await api.read_until(b"m-1")
        cut.reset()
        await api.gone()
        whole, gone = await logged(served, 2)
    assert (whole["outcome"], whole["model"]) == ("completed", "m-1")
    assert (gone["outcome"], gone["model"]) == ("client_gone_before_head", "m-1")


async def no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 no")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    ("fault", "code", "cause"),
    [
        ("refused", "upstream_unreachable", r"127\.0\.0\.1:\d+: connection refused"),
        ("no name", "upstream_unresolvable", r"nowhere\.invalid: .+"),
        ("unknown authority", "upstream_tls", r"127\.0\.0\.1: (unable to get local issuer|self-signed) certificate.*"),
        (
            "another's certificate",
            "upstream_tls",
            r"127\.0\.0\.1: IP address mismatch, .*",
        ),
        ("expired", "upstream_tls", r"127\.0\.0\.1: certificate has expired"),
        ("no TLS", "upstream_tls", r"127\.0\.0\.1:\d+: .*(wrong version number|record layer failure).*"),
        ("no HTTP", "upstream_protocol", r"Bad status line: Expected HTTP/, RTSP/ or ICE/, at the byte S"),
        ("no chunk", "upstream_protocol", r"a chunk size is not hexadecimal"),
        ("closes", "upstream_disconnected", r"the connection was closed"),
    ],
)
async def test_a_line_says_what_exactly_failed(
    upstream: ScriptedUpstream, tmp_path: Path, fault: str, code: str, cause: str
) -> None:
    authority, url, tls = trustme.CA(), upstream.url, ""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with AsyncExitStack() as stack:
        if fault in ("unknown authority", "another's certificate", "expired"):
            issued = authority.issue_cert(
                "other.test" if fault == "another's certificate" else "127.0.0.1",
                not_after=datetime(2020, 1, 1, tzinfo=UTC) if fault == "expired" else None,
                not_before=datetime(2019, 1, 1, tzinfo=UTC),
            )
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            issued.configure_cert(context)
            server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
            await stack.enter_async_context(server)
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            tls = "" if fault == "unknown authority" else f", tls: {{ca_file: '{tmp_path}/ca.pem'}}"
        elif fault == "refused":
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        elif fault == "no name":
            url = "http://nowhere.invalid"
        elif fault == "no TLS":
            plain = await asyncio.start_server(no_tls, "127.0.0.1", 0)
            await stack.enter_async_context(plain)
            url = f"https://127.0.0.1:{plain.sockets[0].getsockname()[1]}"
        upstreams = f"[{{name: up, url: '{url}/v1'{tls}}}]"
        served = await stack.enter_async_context(ConfigFile(tmp_path, upstream, upstreams=upstreams).serve())
        client = await served.connect()
        client.send(post())
        if fault in ("no HTTP", "no chunk", "closes"):
            api = await upstream.accept()
            await api.message()
            answer = {"no HTTP": b"SECRET-1\r\n\r\n", "no chunk": STREAM_HEAD + b"SECRET-1\r\n", "closes": b""}[fault]
            api.send(answer)
            if fault == "closes":
                api.close()
        received, _ = await client.rest() if fault == "no chunk" else ((await client.message()).body, "")
        (line,) = await logged(served, 1)
        assert line["reason"] == code
        assert re.fullmatch(cause, line["cause"]), line["cause"]
        # It is nothing that clients are told.
        assert line["cause"].encode() not in received
        assert "SECRET" not in served.logged.decode()


async def test_what_cannot_be_parsed_has_the_id_that_its_client_was_told(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with ConfigFile(tmp_path, upstream).serve() as served:
        client = await served.connect()
        client.send(b"nonsense\r\n\r\n")
        told = (await client.message()).get("x-request-id")
        (line,) = await logged(served, 1)
        assert line["request_id"] == told
        assert told


async def test_only_what_went_wrong_is_written_if_that_is_wanted(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream, access_log="{exchanges: errors}").serve() as served:
        await exchange(served, upstream)
        await exchange(served, upstream, status=b"429 Too Many Requests")
        (line,) = await logged(served, 1)
        assert line["status"] == 429


async def test_a_share_is_written_and_all_that_went_wrong(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream, access_log="{sample: 1.0e-9}").serve() as served:
        await exchange(served, upstream)
        await exchange(served, upstream, status=b"500 Oh")
        (line,) = await logged(served, 1)
        assert line["status"] == 500


async def test_nothing_is_written_if_that_is_wanted(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream, access_log="{exchanges: off}").serve() as served:
        await exchange(served, upstream, status=b"500 Oh")
        await served.until(r"requests_total\{.*\}", 1)
        served.process.terminate()
        await served.ended()
    assert served.logged == b""


async def test_people_get_text(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream, access_log="{format: text}").serve() as served:
        await exchange(served, upstream, b"X-Request-Id: my-id\r\n")
        await until_true(lambda: b"\n" in served.logged)
        _, *words = served.logged.decode().split()
    assert words[:6] == ["200", "completed", "api", "->", "up", "gpt?[1m"]
    assert words[-5:] == ["4", "events", "tokens", "7+2", "my-id"]


async def test_the_last_lines_are_written(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with ConfigFile(tmp_path, upstream).serve() as served:
        client = await served.connect()
        client.send(post(path="/nowhere"))
        await client.message()
        served.process.terminate()
        assert await served.ended() == 0
    assert len(lines(served)) == 1


def test_what_nobody_took_is_counted_in_a_line() -> None:
    reader, writer = os.pipe()
    log = AccessLog(config.AccessLog(), writer)
    ended = Exchange("r", "u", Recording(), "id", 0.0)
    ended.ended_at = 1.0
    number = 20_000
    for _ in range(number):
        log.ended(ended)
        log.flush()
    taken = bytearray()

    def collect() -> None:
        while part := os.read(reader, 1 << 16):
            taken.extend(part)

    collecting = threading.Thread(target=collect)
    collecting.start()
    log.close()
    os.close(writer)
    collecting.join()
    os.close(reader)
    said = [json.loads(line) for line in bytes(taken).splitlines()]
    (dropped,) = [line["dropped"] for line in said if "dropped" in line]
    assert len(said) - 1 + dropped == number


TEXT = st.text(max_size=200)


@given(TEXT, TEXT, TEXT)
def test_a_line_has_room_in_a_write_that_nobody_splits(model: str, method: str, reason: str) -> None:
    """`PIPE_BUF` bytes; what others say is bounded, and the rest is ours."""
    exchange = Exchange("r" * 64, "u" * 64, Recording(), "i" * 128, 0.0)
    exchange.ended_at = exchange.head_at = exchange.first_token_at = 1e6 / 7
    exchange.client, exchange.api, exchange.reason = "2001:db8:" * 6, "transcriptions", "connections_per_client"
    exchange.model, exchange.method, exchange.finish_reason = model * 9, method * 9, reason * 9
    exchange.traceparent, exchange.is_stream, exchange.longest_gap = TRACE, True, 1e6 / 7
    exchange.gaps = [1e6 / 7]
    exchange.request_bytes = exchange.response_bytes = exchange.events = 1 << 62
    exchange.usage = Usage(1 << 62, 1 << 62, 1 << 62, 1 << 62, 1e9 / 7)
    exchange.outcome, exchange.status = Outcome.UPSTREAM_TIMEOUT_FIRST_TOKEN, 504
    at = datetime.now(UTC)
    for write in (_json, _text):
        line = write(describe(exchange, at))
        assert len(line) < PIPE_BUF
        assert b"\n" not in line


@given(st.lists(st.floats(0.0005, 70), min_size=1, max_size=5000))
def test_the_gaps_are_a_fair_sample_however_many_there_were(gaps: list[float]) -> None:
    exchange = Recording().exchange
    at = 0.0
    for gap in [0.0, *gaps]:
        at += gap
        exchange.happened(DELTA, at)
    assert len(exchange.gaps) < 32
    exchange.ended_at = at
    said = describe(exchange, datetime.now(UTC))
    assert said.gap_max_seconds == pytest.approx(max(gaps), abs=1e-5)
    if len(gaps) < 32:
        assert said.gap_p50_seconds == pytest.approx(statistics.median(gaps), abs=1e-5)


@pytest.mark.parametrize(
    ("hops", "trusted", "expected"),
    [
        ([], {"10.0.0.1"}, "10.0.0.1"),
        (["203.0.113.9"], set(), "10.0.0.1"),
        (["203.0.113.9"], {"10.0.0.1"}, "203.0.113.9"),
        (["1.1.1.1, 203.0.113.9"], {"10.0.0.1"}, "203.0.113.9"),
        (["203.0.113.9, 10.0.0.2"], {"10.0.0.1", "10.0.0.2"}, "203.0.113.9"),
        (["203.0.113.9", "10.0.0.2"], {"10.0.0.1", "10.0.0.2"}, "203.0.113.9"),
        (["[2001:db8::1]:443"], {"10.0.0.1"}, "2001:db8::1"),
        (["2001:db8::1"], {"10.0.0.1"}, "2001:db8::1"),
        (["unknown, 10.0.0.2"], {"10.0.0.1", "10.0.0.2"}, "10.0.0.2"),
        (["\x1b[2J"], {"10.0.0.1"}, "10.0.0.1"),
    ],
)
def test_the_client_is_the_nearest_that_nobody_vouches_for(hops: list[str], trusted: set[str], expected: str) -> None:
    fields = [(b"X-Forwarded-For", hop.encode()) for hop in hops]
    assert client_address(Fields(fields), "10.0.0.1", trusted.__contains__) == expected
