"""The doctor in front of real proxies, right and wrong, and of hops made for the purpose: every verdict is right.

The right ones are the files of `configs/front`; a wrong one has a line of them replaced.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

import pytest

from sseproxy.doctor.arrival import How
from sseproxy.doctor.remedies import changes as remedied
from sseproxy.doctor.verdict import Kind

from .doctor import (
    Sent,
    at_random,
    by_bytes,
    by_time,
    changes,
    completes,
    found,
    hop,
    judge,
    probe,
)
from .harness import DEADLINE, kept_port
from .served import program
from .test_front import BUFFERING, CADDY, ENVOY, FRONTS, HAPROXY, HTTP_1_0, NGINX, TRAEFIK, Front, running

Put = Callable[..., Awaitable[int]]


@pytest.fixture
async def origin() -> AsyncIterator[int]:
    async with probe() as port:
        yield port


@pytest.fixture
async def put(origin: int, tmp_path: Path) -> AsyncIterator[Put]:
    """`await put(front, *variants)`: the port of a proxy in front of the probe, or of another proxy (`behind`)."""
    async with AsyncExitStack() as stack:
        count = 0

        async def place(front: Front, *variants: tuple[str, str], behind: int | None = None) -> int:
            nonlocal count
            count += 1
            directory = tmp_path / f"front{count}"
            directory.mkdir()
            port = stack.enter_context(kept_port())
            await stack.enter_async_context(running(front, directory, port, behind or origin, *variants))
            return port

        yield place


GZIP = ("gzip off;", "gzip on; gzip_types text/event-stream; gzip_proxied any; gzip_min_length 0;")


def buffer_filter(size: int) -> tuple[str, str]:
    return (
        "http_filters:",
        f"""http_filters:
                  - name: envoy.filters.http.buffer
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer
                      max_request_bytes: {size}""",
    )


COMPRESSOR = (
    "http_filters:",
    """http_filters:
                  - name: envoy.filters.http.compressor
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.compressor.v3.Compressor
                      response_direction_config:
                        common_config: {content_type: [text/event-stream], min_content_length: 0}
                      compressor_library:
                        name: gzip
                        typed_config:
                          "@type": type.googleapis.com/envoy.extensions.compression.gzip.compressor.v3.Gzip""",
)
COMPRESS = (
    ("middlewares: [not-forwarded]", "middlewares: [not-forwarded, squeeze]"),
    ("    not-forwarded:", "    squeeze: {compress: {minResponseBodyBytes: 1}}\n    not-forwarded:"),
)
ENCODE = ("reverse_proxy 127.0.0.1:8080 {", "encode gzip\n\treverse_proxy 127.0.0.1:8080 {")
# Caddy forwards event streams at once, whatever this is.
FLUSH_INTERVAL = ("header_up -Forwarded", "header_up -Forwarded\n\t\tflush_interval 500ms")
WRONG: dict[str, tuple[Front, tuple[tuple[str, str], ...], set[str], dict[str, Any]]] = {
    "nginx as it is by itself": (NGINX, BUFFERING, {"buffered", "truncation", "http10"}, {}),
    "nginx with gzip": (NGINX, (GZIP,), {"compressed"}, {}),
    "nginx with gzip as it is by itself": (
        NGINX,
        (*BUFFERING, GZIP),
        {"buffered", "compressed", "truncation", "http10"},
        {},
    ),
    "nginx and HTTP/1.0": (NGINX, HTTP_1_0, {"truncation", "http10"}, {}),
    "nginx and a silence": (
        NGINX,
        (("proxy_read_timeout 1h", "proxy_read_timeout 1s"),),
        {"silence"},
        {"silence": 2.0},
    ),
    "nginx and uploads": (NGINX, (("proxy_request_buffering off;", ""),), {"collected"}, {}),
    "nginx and large uploads": (NGINX, (("client_max_body_size 0;", ""),), {"refused"}, {}),
    "HAProxy and a silence": (HAPROXY, (("timeout server 1h", "timeout server 1s"),), {"silence"}, {"silence": 2.0}),
    "HAProxy and a client that leaves": (
        HAPROXY,
        (("option abortonclose", "no option abortonclose"),),
        {"leaving"},
        {},
    ),
    "Envoy with a buffer filter": (ENVOY, (buffer_filter(64 << 20),), {"collected"}, {}),
    "Envoy with a small buffer filter": (ENVOY, (buffer_filter(1 << 20),), {"refused"}, {}),
    "Envoy with a compressor": (ENVOY, (COMPRESSOR,), {"compressed"}, {}),
    "Envoy and its route timeout": (ENVOY, (("timeout: 0s", "timeout: 0.5s"),), {"limit"}, {}),
    "Traefik with compress": (TRAEFIK, COMPRESS, {"compressed", "head"}, {}),
    "Caddy with encode": (CADDY, (ENCODE,), {"compressed"}, {}),
    "Caddy with flush_interval": (CADDY, (FLUSH_INTERVAL,), set(), {}),
}


@pytest.mark.parametrize("front", FRONTS, ids=lambda front: front.program)
async def test_nothing_is_wrong_with_our_configurations(front: Front, put: Put) -> None:
    examined = await judge(await put(front), silence=1.5)
    assert found(examined) == [[]], examined.verdict
    assert not examined.faulty
    (one,) = examined.hops
    assert one.steady.events
    assert one.leaving
    assert one.upload is not None


@pytest.mark.parametrize("case", WRONG)
async def test_what_a_proxy_does_wrong_is_found(case: str, put: Put) -> None:
    front, variants, kinds, more = WRONG[case]
    examined = await judge(await put(front, *variants), **more)
    ((*own,),) = found(examined)
    assert set(own) == kinds, examined.verdict
    (diagnosis,) = examined.diagnoses
    if "buffered" in kinds and "compressed" not in kinds:
        assert (diagnosis.arrival.how, diagnosis.arrival.size) == ("bytes", 4096)


async def test_a_limit_of_uploads_is_told_with_its_size(put: Put) -> None:
    one_mib = "refuses requests of more than 1 MiB (413)"
    for front, variant in ((NGINX, ("client_max_body_size 0;", "")), (ENVOY, buffer_filter(1 << 20))):
        (diagnosis,) = (await judge(await put(front, variant))).diagnoses
        assert [finding.text for finding in diagnosis.own] == [one_mib]


async def test_the_first_of_two_hops_is_blamed_where_it_is_guilty(put: Put) -> None:
    wrong = await put(NGINX, *BUFFERING)
    examined = await judge(wrong, await put(HAPROXY, behind=wrong))
    first, second = found(examined)
    assert "buffered" in first
    assert not second, examined.verdict
    assert examined.verdict.startswith(f"The first hop, {examined.hops[0].url}, which says it is nginx, collects 4 KiB")


async def test_the_second_of_two_hops_is_blamed_where_it_is_guilty(put: Put) -> None:
    right = await put(HAPROXY)
    examined = await judge(right, await put(NGINX, *BUFFERING, behind=right))
    first, second = found(examined)
    assert not first, examined.verdict
    assert "buffered" in second
    assert examined.verdict.startswith(
        f"The second hop, {examined.hops[1].url}, which says it is nginx, collects 4 KiB"
    )


# Seconds that timers are late. Twenty milliseconds make a slow stream slower than the delays below.
BUSY = 0.02
DELAYS: dict[How, Sent] = {"bytes": by_bytes(2048), "time": by_time(lambda: 0.1), "irregularly": at_random(1)}


@pytest.mark.parametrize("how", DELAYS)
async def test_delays_are_told_apart(how: How, origin: int) -> None:
    async with hop(origin, DELAYS[how]) as port:
        for _ in range(5):
            ((diagnosis,), (one,)) = attrgetter("diagnoses", "hops")(await judge(port, events=40, upload=100_000))
            if diagnosis.arrival.how == how or one.lag < BUSY:
                break
    # A machine that was busy all the time may be what held the events, so nobody is blamed.
    assert diagnosis.arrival.how == how or (diagnosis.arrival.how == "alone" and one.lag >= BUSY), (diagnosis, one)
    if diagnosis.arrival.how == "bytes":
        assert diagnosis.arrival.size == 2048
    if diagnosis.arrival.how == "time":
        assert 0.07 <= diagnosis.arrival.seconds <= 0.2


async def test_a_hop_that_hides_a_death_is_found(origin: int) -> None:
    async with hop(origin, completes) as port:
        examined = await judge(port)
    assert found(examined) == [["truncation"]]
    assert "closes the connection or resets the connection" in examined.verdict


CHANGES = {
    "content-type": (b"text/event-stream; charset=utf-8", b"text/plain; charset=utf-8       "),
    "caching": (b"Cache-Control: no-cache", b"Cache-Control: max-age "),
    "garbled": (b"000004 ", b"000003 "),
    "rewritten": (b'"object":"chat.completion.chunk"', b'"object" :"chat.completionchunk"'),
}


@pytest.mark.parametrize("kind", CHANGES)
async def test_a_hop_that_changes_what_passes_is_found(kind: str, origin: int) -> None:
    async with hop(origin, changes(*CHANGES[kind])) as port:
        examined = await judge(port)
    assert found(examined, notes=True) == [[kind]]
    assert examined.faulty == (kind not in ("rewritten", "caching"))


def test_nginx_takes_all_changes_for_it_as_they_are_printed(tmp_path: Path) -> None:
    printed = [change for rows in remedied(get_args(Kind), ["nginx"]) for program, change in rows if program == "nginx"]
    # A comment that a terminal of 80 columns wraps would end in the middle.
    assert all(len(line) <= 63 for change in printed for line in change.splitlines() if "#" in line)
    file = tmp_path / "nginx.conf"
    file.write_text("\n".join(["server {", *(line for line in printed if line != "as above"), "}"]))
    done = subprocess.run(
        [*NGINX.command(program("nginx"), file), "-t"], capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
