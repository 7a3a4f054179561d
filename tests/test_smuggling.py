"""Requests that two readers could take for different ones: refused, and what follows them never executed."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .conftest import PlayScript, StartProxy
from .harness import Peer, RunningProxy, ScriptedUpstream
from .splits import cut, steps

POST = b"POST /v1/x HTTP/1.1\r\n"
HOST = b"Host: h\r\n"
CHUNKED = POST + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
# What an attacker wants to be taken for a request of its own.
NEXT = b"GET /v1/next HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"

REFUSED = {
    "transfer-encoding and content-length": POST
    + HOST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a list of lengths": POST + HOST + b"Content-Length: 1, 1\r\n\r\na",
    "a length with a plus": POST + HOST + b"Content-Length: +1\r\n\r\na",
    "a negative length": POST + HOST + b"Content-Length: -1\r\n\r\na",
    "a hexadecimal length": POST + HOST + b"Content-Length: 0x1\r\n\r\na",
    "an empty length": POST + HOST + b"Content-Length: \r\n\r\na",
    "a length with an underscore": POST + HOST + b"Content-Length: 1_0\r\n\r\na",
    "an endless length": POST + HOST + b"Content-Length: 99999999999999999999999\r\n\r\na",
    "a length in words": POST + HOST + b"Content-Length: one\r\n\r\na",
    "identity": POST + HOST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "gzip": POST + HOST + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    "gzip, chunked": POST + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked, gzip": POST + HOST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "an empty coding": POST + HOST + b"Transfer-Encoding: \r\n\r\n0\r\n\r\n",
    "xchunked": POST + HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding with parameters": POST + HOST + b"Transfer-Encoding: chunked;x=1\r\n\r\n0\r\n\r\n",
    "a quoted coding": POST + HOST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "a coding after a vertical tab": POST + HOST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and identity": POST + HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a space before the colon": POST + HOST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"POST /v1/x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare LF": b"POST /v1/x HTTP/1.1\nHost: h\nContent-Length: 0\n\n",
    "a bare LF in the fields": POST + b"Host: h\nContent-Length: 0\r\n\r\n",
    "a bare CR": POST + b"Host: h\rX: y\r\nContent-Length: 0\r\n\r\n",
    "a folded line": POST + HOST + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "a space in a name": POST + HOST + b"X y: a\r\nContent-Length: 0\r\n\r\n",
    "a space before the first name": POST + b" Host: h\r\nContent-Length: 0\r\n\r\n",
    "a NUL": POST + HOST + b"X: a\x00b\r\nContent-Length: 0\r\n\r\n",
    "a line without colon": POST + HOST + b"Xyz\r\nContent-Length: 0\r\n\r\n",
    "a field without name": POST + HOST + b": x\r\nContent-Length: 0\r\n\r\n",
    "no host": POST + b"Content-Length: 0\r\n\r\n",
    "two hosts": POST + HOST + HOST + b"Content-Length: 0\r\n\r\n",
    "a host with a user": POST + b"Host: a@b\r\nContent-Length: 0\r\n\r\n",
    "a host with a path": POST + b"Host: a/b\r\nContent-Length: 0\r\n\r\n",
    "an empty host": POST + b"Host: \r\nContent-Length: 0\r\n\r\n",
    "a list of hosts": POST + b"Host: a,b\r\nContent-Length: 0\r\n\r\n",
    "a host with a space": POST + b"Host: a b\r\nContent-Length: 0\r\n\r\n",
    "a host with a named port": POST + b"Host: a:b\r\nContent-Length: 0\r\n\r\n",
    "HTTP/0.9": b"GET /v1/x\r\n\r\n",
    "HTTP/0.9 in words": b"GET /v1/x HTTP/0.9\r\nHost: h\r\n\r\n",
    "HTTP/1.10": b"GET /v1/x HTTP/1.10\r\nHost: h\r\n\r\n",
    "HTTP/1.20": b"GET /v1/x HTTP/1.20\r\nHost: h\r\n\r\n",
    "HTTP/1.2 and a bad field": b"GET /v1/x HTTP/1.2\r\nHost: h\r\nX y: z\r\n\r\n",
    "HTTP/1.2 without a host": b"GET /v1/x HTTP/1.2\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a GET of the server": b"GET * HTTP/1.1\r\nHost: h\r\n\r\n",
    "HTTP/2": b"GET /v1/x HTTP/2\r\nHost: h\r\n\r\n",
    "http in lower case": b"GET /v1/x http/1.1\r\nHost: h\r\n\r\n",
    "a tab in the request line": b"GET\t/v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
    "an authority for a target": b"GET evil:80 HTTP/1.1\r\nHost: h\r\n\r\n",
    "a method that nobody knows": b"FOO /v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
    "a byte above ASCII in the target": b"GET /v1/\xff HTTP/1.1\r\nHost: h\r\n\r\n",
    "an absolute target without a host": b"GET http:///v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
    "an absolute target with a user": b"GET http://u@h/v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
    "an absolute target beside two hosts": b"GET http://h/v1/x HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n",
    "an absolute target without the host field": b"GET http://h/v1/x HTTP/1.1\r\n\r\n",
    "a chunk size that is none": CHUNKED + b"xx\r\n\r\n",
    "a negative chunk size": CHUNKED + b"-1\r\n\r\n",
    "a chunk size with 0x": CHUNKED + b"0x1\r\na\r\n0\r\n\r\n",
    "a chunk size with a plus": CHUNKED + b"+1\r\na\r\n0\r\n\r\n",
    "chunk lines that end in LF": CHUNKED + b"1\na\n0\n\n",
    "a chunk longer than its size": CHUNKED + b"1\r\nab0\r\n\r\n",
    "a chunk size that overflows": CHUNKED + b"10000000000000001\r\na\r\n0\r\n\r\n",
    "an LF in a chunk extension": CHUNKED + b"1;a\nb\r\na\r\n0\r\n\r\n",
    "a space after a chunk size": CHUNKED + b"1 \r\na\r\n0\r\n\r\n",
    "a length in the trailers": CHUNKED + b"1\r\na\r\n0\r\nContent-Length: 9\r\n\r\n",
    "a broken trailer": CHUNKED + b"1\r\na\r\n0\r\nX T: v\r\n\r\n",
}


class Taken(NamedTuple):
    """A request that is taken, and what goes upstream of it."""

    request: bytes
    target: str = "/v1/x"
    body: bytes = b""


TAKEN = {
    "chunked in capitals": Taken(POST + HOST + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n1\r\na\r\n0\r\n\r\n", body=b"a"),
    "a chunk extension": Taken(CHUNKED + b"1;a=b\r\na\r\n0\r\n\r\n", body=b"a"),
    "trailers": Taken(CHUNKED + b"1\r\na\r\n0\r\nX-T: v\r\nHost: evil\r\n\r\n", body=b"a"),
    "a body of a GET": Taken(b"GET /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab", body=b"ab"),
    "a host with an IPv6 address": Taken(b"GET /v1/x HTTP/1.1\r\nHost: [::1]:80\r\n\r\n"),
    "an absolute target": Taken(b"GET http://evil:1/v1/x?q HTTP/1.1\r\nHost: h\r\n\r\n", "/v1/x?q"),
    "HTTP/1.2": Taken(b"GET /v1/x HTTP/1.2\r\nHost: h\r\n\r\n"),
    "HTTP/1.9 with a body": Taken(
        b"POST /v1/x HTTP/1.9\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", body=b"a"
    ),
    "empty lines before it": Taken(b"\r\n\r\nGET /v1/x HTTP/1.1\r\nHost: h\r\n\r\n"),
    "an upgrade": Taken(b"GET /v1/x HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"),
    "an upgrade to h2c": Taken(
        b"GET /v1/x HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AA\r\n\r\n"
    ),
    "an upgrade with a body": Taken(
        POST + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\nab", body=b"ab"
    ),
    "a length with an underscore in its name": Taken(
        b"GET /v1/x HTTP/1.1\r\nHost: h\r\nContent_Length: 5\r\nTransfer_Encoding: chunked\r\n\r\n"
    ),
}


class Answering:
    """An upstream that answers everything, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []

    async def __call__(self, api: Peer) -> None:
        while True:
            request = await api.message()
            self.asked.append((request.start_line.split()[1], request.body))
            api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.fixture
def upstream_that_answers() -> Answering:
    return Answering()


@pytest.fixture
async def answered(upstream_that_answers: Answering, play: PlayScript, start: StartProxy) -> RunningProxy:
    return await start((await play(upstream_that_answers)).url)


async def statuses(proxy: RunningProxy, pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    client = await proxy.connect()
    for piece in pieces:
        client.send(piece)
        await client.drain()
    received, _ = await client.rest()
    return re.findall(rb"HTTP/1\.1 (\d+)", received), received


@pytest.mark.parametrize("name", REFUSED)
async def test_it_is_refused_and_the_next_request_with_it(
    answered: RunningProxy, upstream_that_answers: Answering, name: str
) -> None:
    for pieces in ([REFUSED[name] + NEXT], [REFUSED[name], NEXT]):
        codes, received = await statuses(answered, pieces)
        assert codes == [b"400"]
        assert b"evil" not in received
    assert not any(target == "/v1/next" or body for target, body in upstream_that_answers.asked)
    outcomes = await answered.ended()
    assert outcomes == {"rejected": 2}
    assert answered.sample("requests_rejected_total", reason="bad_request") == 2


@pytest.mark.parametrize("name", TAKEN)
async def test_it_is_taken_and_the_next_request_is_another(
    answered: RunningProxy, upstream_that_answers: Answering, name: str
) -> None:
    taken = TAKEN[name]
    for pieces in ([taken.request + NEXT], [taken.request, NEXT], steps(taken.request + NEXT)):
        codes, _ = await statuses(answered, pieces)
        assert codes == [b"200", b"200"]
        assert upstream_that_answers.asked == [(taken.target, taken.body), ("/v1/next", b"")]
        upstream_that_answers.asked.clear()
    assert await answered.ended() == {"completed": 6}


@pytest.mark.parametrize("version", [b"2.0", b"2.1", b"3.0", b"9.9"])
async def test_another_major_version_is_refused_and_the_next_request_with_it(
    answered: RunningProxy, upstream_that_answers: Answering, version: bytes
) -> None:
    request = b"GET /v1/x HTTP/%b\r\nHost: h\r\n\r\n" % version
    for pieces in ([request + NEXT], [request, NEXT], steps(request + NEXT)):
        codes, received = await statuses(answered, pieces)
        assert codes == [b"505"]
        assert b"Connection: close" in received
    assert upstream_that_answers.asked == []
    assert answered.sample("requests_rejected_total", reason="version") == 3


@pytest.mark.parametrize("target", [b"ftp://h/v1/x", b"/v1/x#y", b"/v1/../x"])
async def test_a_target_that_is_no_path_is_refused_alone(
    answered: RunningProxy, upstream_that_answers: Answering, target: bytes
) -> None:
    codes, _ = await statuses(answered, [b"OPTIONS %b HTTP/1.1\r\nHost: h\r\n\r\n" % target + NEXT])
    assert codes == [b"400", b"200"]
    assert upstream_that_answers.asked == [("/v1/next", b"")]


async def test_what_was_asked_before_a_broken_request_is_answered(
    answered: RunningProxy, upstream_that_answers: Answering
) -> None:
    good = b"GET /v1/x HTTP/1.1\r\nHost: h\r\n\r\n"
    codes, _ = await statuses(answered, [good + good + b"junk\r\n\r\n" + NEXT])
    assert codes == [b"200", b"200", b"400"]
    assert [target for target, _ in upstream_that_answers.asked] == ["/v1/x", "/v1/x"]


@pytest.mark.parametrize("junk", [b"junk", b"\r\n\r\njunk\r\n\r\n", NEXT, b"\x00" * 100_000])
async def test_what_follows_a_request_that_closes_is_nobodys(
    answered: RunningProxy, upstream_that_answers: Answering, junk: bytes
) -> None:
    request = b"POST /v1/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 1\r\n\r\na"
    codes, _ = await statuses(answered, [request + junk])
    assert codes == [b"200"]
    assert upstream_that_answers.asked == [("/v1/x", b"a")]
    codes, _ = await statuses(answered, [b"GET /v1/x HTTP/1.0\r\n\r\n" + junk])
    assert codes == [b"200"]
    assert await answered.ended() == {"completed": 2}


async def test_connect_is_refused_with_what_follows_it(answered: RunningProxy) -> None:
    codes, _ = await statuses(answered, [b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n" + NEXT])
    assert codes == [b"501"]


async def test_trailers_reach_neither_this_request_nor_the_next(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(CHUNKED + b"3;x=y\r\nabc\r\n0\r\nAuthorization: Bearer evil\r\nX-Trailer: t\r\n\r\n" + NEXT)
    api = await upstream.accept()
    request = await api.message()
    assert request.body == b"abc"
    assert len(request.all("content-length") + request.all("transfer-encoding")) == 1
    assert request.get("x-trailer") is None
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    following = await api.message()
    assert following.get("x-trailer") is None
    assert following.get("authorization") is None
    client.close()


@settings(
    max_examples=60, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    order=st.lists(st.sampled_from([*TAKEN, *TAKEN, "junk"]), min_size=1, max_size=9),
    offsets=st.lists(st.integers(0, 3000), max_size=8),
)
async def test_any_split_of_pipelined_requests_is_answered_alike(
    answered: RunningProxy, upstream_that_answers: Answering, order: list[str], offsets: list[int]
) -> None:
    upstream_that_answers.asked.clear()
    sent = b"".join(TAKEN[name].request if name in TAKEN else b"junk\r\n\r\n" for name in order) + NEXT
    codes, _ = await statuses(answered, [piece for piece in cut(sent, [at % len(sent) for at in offsets]) if piece])
    whole = order.index("junk") if "junk" in order else len(order)
    expected = [(TAKEN[name].target, TAKEN[name].body) for name in order[:whole]]
    assert upstream_that_answers.asked == (expected if "junk" in order else [*expected, ("/v1/next", b"")])
    assert codes == [b"200"] * len(expected) + [b"400" if "junk" in order else b"200"]
