"""An upstream that fails: the client never sees a clean end, and it is known why."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import StartProxy
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    begin,
    chunk,
    delta,
    kept_port,
    post,
    usage,
)

ENDS = pytest.mark.parametrize("end", [Peer.close, Peer.reset], ids=["fin", "rst"])


@ENDS
async def test_a_cut_between_events_is_announced_in_band(
    proxy: RunningProxy, upstream: ScriptedUpstream, end: object
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(chunk(delta("Hi")))
    end(api)  # type: ignore[operator]
    received, _ = await client.rest()
    size, _, event = received.partition(b"\r\n")
    assert int(size, 16) == len(event) - 2
    assert event.startswith(b'event: error\ndata: {"type": "error", "error": {"message": "')
    assert b'"code": "upstream_disconnected"' in event
    assert event.endswith(b"\n\n\r\n")
    assert await proxy.ended() == {"truncated": 1}
    assert proxy.sample("upstream_errors_total", type="reset") == 1
    assert proxy.sample("streams_active") == 0


@ENDS
async def test_a_cut_inside_an_event_ends_without_a_word(
    proxy: RunningProxy, upstream: ScriptedUpstream, end: object
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(b'data: {"cho'))
    await client.read_until(chunk(b'data: {"cho'))
    end(api)  # type: ignore[operator]
    assert (await client.rest())[0] == b""
    assert await proxy.ended() == {"truncated": 1}


async def test_a_cut_inside_a_chunk_delivers_what_came(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, b"100\r\nhalf")
    api.close()
    response = await client.message()
    assert (response.body, response.complete) == (b"half", False)
    assert await proxy.ended() == {"truncated": 1}


async def test_short_of_its_length_is_incomplete(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    api.close()
    response = await client.message()
    assert (response.body, response.complete) == (b"half", False)
    assert await proxy.ended() == {"truncated": 1}


async def test_a_close_delimited_body_that_is_reset_is_incomplete(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream, post(path="/v1/files"))
    api.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
    await client.read_until(b"half\r\n")
    api.reset()
    assert (await client.rest())[0] == b""
    assert await proxy.ended() == {"truncated": 1}


async def test_an_http_1_0_client_sees_a_reset_instead_of_an_end(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream, post(path="/v1/files").replace(b"HTTP/1.1", b"HTTP/1.0"))
    api.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(b"half"))
    await client.read_until(b"half")
    api.close()
    assert await client.rest() == (b"", "reset")
    assert await proxy.ended() == {"truncated": 1}


@ENDS
async def test_gone_before_its_head_is_a_502(proxy: RunningProxy, upstream: ScriptedUpstream, end: object) -> None:
    client, api = await begin(proxy, upstream)
    end(api)  # type: ignore[operator]
    response = await client.message()
    assert response.status == 502
    assert response.json()["error"]["code"] == "upstream_disconnected"
    assert "127.0.0.1" not in response.body.decode()
    assert await proxy.ended() == {"upstream_error": 1}
    assert proxy.sample("upstream_errors_total", type="reset") == 1


async def test_nobody_listening_is_a_502_and_the_client_may_go_on(start: StartProxy) -> None:
    with kept_port() as port:
        proxy = await start(f"http://127.0.0.1:{port}")
        client = await proxy.connect()
        for _ in range(2):
            client.send(post())
            response = await client.message()
            assert response.status == 502
            assert response.json()["error"]["code"] == "upstream_unreachable"
    assert await proxy.ended() == {"upstream_error": 2}
    assert proxy.sample("upstream_errors_total", type="connect") == 2


async def test_a_name_that_does_not_resolve_is_a_502(start: StartProxy) -> None:
    proxy = await start("http://does-not-exist.invalid:80")
    client = await proxy.connect()
    client.send(post())
    assert (await client.message()).json()["error"]["code"] == "upstream_unresolvable"
    assert proxy.sample("upstream_errors_total", type="dns") == 1


async def test_no_tls_where_tls_is_expected_is_a_502(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url.replace("http:", "https:"))
    client = await proxy.connect()
    client.send(post())
    api = await upstream.accept()
    await api.read(5)
    api.send(b"HTTP/1.1 400 This is not TLS\r\n\r\n")
    assert (await client.message()).json()["error"]["code"] == "upstream_tls"
    assert proxy.sample("upstream_errors_total", type="tls") == 1


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: \x01\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: %b\r\n\r\n" % (b"a" * 40_000),
    ],
)
async def test_a_head_that_is_not_http_1_1_is_a_502(
    proxy: RunningProxy, upstream: ScriptedUpstream, head: bytes
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(head, b"ok")
    response = await client.message()
    assert response.status == 502
    assert response.json()["error"]["code"] == "upstream_protocol"
    await api.gone()
    assert await proxy.ended() == {"upstream_error": 1}
    assert proxy.sample("upstream_errors_total", type="protocol") == 1


@pytest.mark.parametrize("broken", [b"zz\r\n", b"+5\r\nhello\r\n", b"5\nhello\r\n", b"f" * 300])
async def test_broken_chunked_framing_is_never_forwarded(
    proxy: RunningProxy, upstream: ScriptedUpstream, broken: bytes
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")))
    await client.read_until(chunk(delta("Hi")))
    api.send(broken)
    received, _ = await client.rest()
    assert b'"code": "upstream_protocol"' in received
    assert not received.endswith(LAST_CHUNK)
    assert b"hello" not in received
    await api.gone()
    assert await proxy.ended() == {"upstream_error": 1}


async def test_bytes_beyond_the_length_are_not_forwarded_and_the_connection_not_reused(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    assert (await client.message()).body == b"ok"
    await api.gone()
    client.send(post())
    api = await upstream.accept()
    await api.message()
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
    assert (await client.message()).body == b"good"


async def test_an_answer_nobody_asked_for_ends_the_idle_connection(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (await client.message()).body == b"ok"
    await proxy.idle()
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    await api.gone()
    client.send(post())
    api = await upstream.accept()
    await api.message()
    api.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
    assert (await client.message()).body == b"good"


async def test_an_error_event_of_the_upstream_is_its_error(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(b'data: {"error":{"message":"overloaded"}}\n\n'), chunk(DONE), LAST_CHUNK)
    assert (await client.message()).complete
    assert await proxy.ended() == {"upstream_error": 1}


async def test_a_head_and_body_and_close_in_one_write_are_a_whole_response(
    proxy: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api = await begin(proxy, upstream)
    api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(usage(3, 1)), chunk(DONE), LAST_CHUNK)
    api.close()
    assert (await client.message()).complete
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("tokens_total", type="output") == 1


def fall_silent(api: Peer) -> None:
    """Until the time for that is over."""


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"], ids=["1.1", "1.0"])
@pytest.mark.parametrize("end", [Peer.close, Peer.reset, fall_silent, "drain"], ids=["fin", "rst", "silence", "drain"])
async def test_what_follows_the_end_marker_changes_nothing_but_is_no_clean_end(
    start: StartProxy, upstream: ScriptedUpstream, end: Callable[[Peer], None] | str, version: bytes
) -> None:
    proxy = await start(upstream.url, timeouts={"idle": 0.3} if end is fall_silent else {})
    client, api = await begin(proxy, upstream, post().replace(b"HTTP/1.1", version))
    api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(DONE))
    await client.read_until(DONE + b"\r\n" if version == b"HTTP/1.1" else DONE)
    if callable(end):
        end(api)
    else:
        proxy.worker.proxy.end_exchanges()
    received, how = await client.rest()
    assert received == b""
    # Where the end of the connection is that of the body, nothing else can tell.
    assert how == "reset" or version == b"HTTP/1.1"
    await api.gone()
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("stream_ends_total", end="marker") == 1
    assert proxy.sample("upstream_errors_total") == 0
    assert proxy.sample("streams_active") == 0
