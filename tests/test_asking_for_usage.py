"""A route that asks for usage: the operator gets the counts, the client what it would have got without."""

from __future__ import annotations

import gzip
import random
from typing import Any

import msgspec
import pytest

from sseproxy import config
from sseproxy.relay import reads

from .conftest import PlayScript, StartProxy
from .harness import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Message,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    chunk,
    delta,
    post,
    usage,
)
from .splits import steps

ASKING = {"usage": config.UsageOptions(request=True)}
REQUEST = b'{"model":"m","stream":true,"messages":[]}'
REFUSAL = b'{"detail":[{"loc":["body","stream_options"],"msg":"Extra inputs are not permitted"}]}'
STREAM = delta("Hel") + delta("lo") + usage(3, 2) + DONE
WANTED = delta("Hel") + delta("lo") + DONE


@pytest.fixture
async def asking(start: StartProxy, upstream: ScriptedUpstream) -> RunningProxy:
    return await start(upstream.url, route=ASKING)


def options(request: Message) -> Any:
    return request.json().get("stream_options")


def response(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


async def asked(proxy: RunningProxy, upstream: ScriptedUpstream, request: bytes) -> tuple[Peer, Peer, Message]:
    client = await proxy.connect()
    client.send(request)
    api = await upstream.accept()
    return client, api, await api.message()


@pytest.mark.parametrize(
    "sent",
    [
        [chunk(STREAM) + LAST_CHUNK],
        [chunk(delta("Hel")), chunk(delta("lo")), chunk(usage(3, 2)), chunk(DONE), LAST_CHUNK],
        [chunk(delta("Hel")), chunk(delta("lo") + usage(3, 2)[:30]), chunk(usage(3, 2)[30:] + DONE), LAST_CHUNK],
        [*map(chunk, steps(STREAM)), LAST_CHUNK],
        steps(chunk(STREAM) + LAST_CHUNK),
    ],
    ids=["one chunk", "a chunk each", "shared and split", "a chunk per byte", "a read per byte"],
)
async def test_the_operator_gets_the_counts_and_the_client_the_rest(
    asking: RunningProxy, upstream: ScriptedUpstream, sent: list[bytes]
) -> None:
    client, api, request = await asked(asking, upstream, post(REQUEST))
    assert request.json() == {**msgspec.json.decode(REQUEST), "stream_options": {"include_usage": True}}
    api.send(STREAM_HEAD)
    for part in sent:
        api.send(part)
        await api.drain()
    received = await client.message()
    assert (received.body, received.complete) == (WANTED, True)
    assert await asking.ended() == {"completed": 1}
    assert asking.sample("tokens_total", type="input") == 3
    assert asking.sample("tokens_total", type="output") == 2
    assert asking.sample("streams_without_usage_total") == 0
    assert asking.sample("response_bytes_total") == len(WANTED)


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
@pytest.mark.parametrize("framing", [b"Content-Length: %d\r\n" % len(STREAM), b"Connection: close\r\n"])
async def test_whatever_the_framing(
    asking: RunningProxy, upstream: ScriptedUpstream, framing: bytes, version: bytes
) -> None:
    client, api, _ = await asked(asking, upstream, post(REQUEST).replace(b"HTTP/1.1", version))
    api.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + framing + b"\r\n" + STREAM)
    api.close()
    received = await client.message()
    assert (received.body, received.complete) == (WANTED, True)
    assert asking.sample("tokens_total", type="output") == 2


async def test_what_a_backend_adds_to_other_chunks_passes_as_it_came(
    asking: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api, _ = await asked(asking, upstream, post(REQUEST))
    body = delta("Hel", usage=None) + delta("lo", usage=None)
    api.send(STREAM_HEAD, *map(chunk, (body, usage(3, 2), DONE)), LAST_CHUNK)
    assert (await client.message()).body == body + DONE
    assert asking.sample("tokens_total", type="output") == 2


async def test_an_end_that_is_held_is_delivered_with_the_end(asking: RunningProxy, upstream: ScriptedUpstream) -> None:
    for framed in (STREAM_HEAD + chunk(WANTED + b'data: {"cho') + LAST_CHUNK, b""):
        client, api, _ = await asked(asking, upstream, post(REQUEST))
        api.send(framed or b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + WANTED + b'data: {"cho')
        api.close()
        received = await client.message()
        assert (received.body, received.complete) == (WANTED + b'data: {"cho', True)


async def test_a_stream_without_a_byte_ends(asking: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api, _ = await asked(asking, upstream, post(REQUEST))
    api.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 0\r\n\r\n")
    received = await client.message()
    assert (received.status, received.body, received.complete) == (200, b"", True)
    client.send(post(REQUEST))
    await api.message()
    api.send(STREAM_HEAD, chunk(STREAM), LAST_CHUNK)
    assert (await client.message()).body == WANTED


async def test_a_stream_that_breaks_off_says_so(asking: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api, _ = await asked(asking, upstream, post(REQUEST))
    api.send(STREAM_HEAD, chunk(delta("Hel") + usage(3, 2)))
    api.close()
    received = await client.message()
    assert received.body.startswith(delta("Hel") + b"event: error\n")
    assert not received.complete
    assert await asking.ended() == {"truncated": 1}
    assert asking.sample("tokens_total", type="output") == 2


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}',
        b'{"model":"m","stream":true,"stream_options":{"include_usage":false}}',
        b'{"model":"m","stream": false}',
        b'{"model":"m"}',
        b"no JSON",
    ],
)
async def test_a_request_that_says_what_it_wants_is_left_alone(
    asking: RunningProxy, upstream: ScriptedUpstream, body: bytes
) -> None:
    client, api, request = await asked(asking, upstream, post(body))
    assert request.body == body
    api.send(STREAM_HEAD, chunk(STREAM), LAST_CHUNK)
    assert (await client.message()).body == STREAM


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/audio/speech"])
async def test_only_where_it_is_an_option_of_the_api(
    asking: RunningProxy, upstream: ScriptedUpstream, path: str
) -> None:
    _, _, request = await asked(asking, upstream, post(REQUEST, path))
    assert request.body == REQUEST


async def test_a_route_without_leaves_everything_alone(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api, request = await asked(proxy, upstream, post(REQUEST))
    assert request.body == REQUEST
    api.send(STREAM_HEAD, chunk(STREAM), LAST_CHUNK)
    assert (await client.message()).body == STREAM


@pytest.mark.parametrize("status", [b"400 Bad Request", b"422 Unprocessable Entity"])
async def test_a_backend_that_refuses_is_asked_as_the_client_did_and_remembered(
    asking: RunningProxy, upstream: ScriptedUpstream, status: bytes
) -> None:
    client, api, request = await asked(asking, upstream, post(REQUEST))
    assert options(request) == {"include_usage": True}
    api.send(response(status, REFUSAL))
    again = await api.message()
    assert again.body == REQUEST
    api.send(STREAM_HEAD, chunk(WANTED), LAST_CHUNK)
    assert (await client.message()).body == WANTED

    client.send(post(REQUEST))
    assert (await api.message()).body == REQUEST
    api.send(STREAM_HEAD, chunk(WANTED), LAST_CHUNK)
    assert (await client.message()).body == WANTED

    client.send(post(REQUEST.replace(b'"m"', b'"other"')))
    assert options(await api.message()) == {"include_usage": True}
    api.send(STREAM_HEAD, chunk(STREAM), LAST_CHUNK)
    assert (await client.message()).body == WANTED
    assert upstream.connections == 1
    assert await asking.ended() == {"completed": 3}
    assert asking.sample("streams_without_usage_total", reason="not_reported") == 2
    assert asking.sample("time_to_response_head_seconds_count") == 3


async def test_what_is_refused_the_second_time_is_the_answer(asking: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api, _ = await asked(asking, upstream, post(REQUEST))
    api.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + REFUSAL)
    api.close()
    api = await upstream.accept()
    assert (await api.message()).body == REQUEST
    api.send(response(b"400 Bad Request", REFUSAL))
    received = await client.message()
    assert (received.status, received.body) == (400, REFUSAL)


async def test_what_only_quotes_the_option_is_no_refusal_of_it(
    asking: RunningProxy, upstream: ScriptedUpstream
) -> None:
    client, api, _ = await asked(asking, upstream, post(REQUEST))
    api.send(response(b"422 Unprocessable Entity", REFUSAL))
    assert (await api.message()).body == REQUEST
    api.send(response(b"422 Unprocessable Entity", REFUSAL))
    assert (await client.message()).status == 422
    client.send(post(REQUEST))
    assert options(await api.message()) == {"include_usage": True}


@pytest.mark.parametrize("size", [0, 10, 65_000, 1_000_000])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_any_other_refusal_passes_as_it_is(
    asking: RunningProxy, upstream: ScriptedUpstream, size: int, framing: str
) -> None:
    body = random.Random(size).randbytes(size)
    client, api, _ = await asked(asking, upstream, post(REQUEST))
    head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
    if framing == "length":
        api.send(head + b"Content-Length: %d\r\n\r\n" % size + body)
    elif framing == "chunked":
        api.send(head + b"Transfer-Encoding: chunked\r\n\r\n", *map(chunk, steps(body, 9000)), LAST_CHUNK)
    else:
        api.send(head + b"\r\n" + body)
        api.close()
    received = await client.message()
    assert (received.status, received.body, received.complete) == (400, body, True)
    assert await asking.ended() == {"completed": 1}
    assert upstream.connections == 1


@pytest.mark.parametrize("size", [1_000, 8_000, 60_000])
async def test_a_refusal_whose_connection_has_ended_is_whole_however_slowly_it_is_handed_over(
    asking: RunningProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(reads, "_TURN", 0.0)
    body = random.Random(size).randbytes(size)
    client, api, _ = await asked(asking, upstream, post(REQUEST))
    api.send(b"HTTP/1.1 400 Bad Request\r\n\r\n" + body)
    api.close()
    received = await client.message()
    assert (received.status, received.body, received.complete) == (400, body, True)
    assert await asking.ended() == {"completed": 1}


async def test_a_refusal_that_breaks_off_or_is_no_http_is_no_answer(
    asking: RunningProxy, upstream: ScriptedUpstream
) -> None:
    head = b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n"
    for broken in (b"5\r\nhal", b"no size\r\n"):
        client, api, _ = await asked(asking, upstream, post(REQUEST))
        api.send(head + broken)
        api.close()
        assert not (await client.message()).complete
    assert await asking.ended() == {"truncated": 1, "upstream_error": 1}


async def test_a_client_that_leaves_while_a_refusal_is_read(asking: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api, _ = await asked(asking, upstream, post(REQUEST))
    api.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 100\r\n\r\nhalf")
    await asking.busy()
    client.close()
    await api.gone()
    assert await asking.ended() == {"client_gone_before_head": 1}


async def test_a_backend_that_does_not_stream_has_not_refused_the_option(
    asking: RunningProxy, upstream: ScriptedUpstream
) -> None:
    """Some read names in any case, and refuse `stream_options` only because the client's last word is not to stream."""
    body = b'{"model":"m","stream":true,"messages":[],"Stream":false}'
    client, api, request = await asked(asking, upstream, post(body))
    assert options(request)
    api.send(response(b"400 Bad Request", REFUSAL))
    assert (await api.message()).body == body
    api.send(response(b"200 OK", b"{}"))
    assert (await client.message()).body == b"{}"
    client.send(post(REQUEST))
    assert options(await api.message()) == {"include_usage": True}


async def test_a_compressed_stream_passes_as_it_is(asking: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api, request = await asked(asking, upstream, post(REQUEST))
    assert request.get("accept-encoding") == "identity"
    packed = gzip.compress(STREAM)
    api.send(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n"
        b"Content-Length: %d\r\n\r\n" % len(packed) + packed
    )
    received = await client.message()
    assert (received.body, received.get("content-length")) == (packed, str(len(packed)))
    assert await asking.ended() == {"completed": 1}
    assert asking.sample("bodies_not_read_total", reason="encoded") == 1


async def test_a_request_too_large_to_be_read_is_relayed_as_it_is(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    asking = await start(upstream.url, route=ASKING, max_body=1000)
    body = b'{"stream":true,"model":"m","messages":["%b"]}' % (b"x" * 500_000)
    client = await asking.connect()
    client.send(post(body)[:30_000])
    api = await upstream.accept()
    await api.head()
    client.send(post(body)[30_000:])
    assert await api.read(len(body)) == body
    api.send(STREAM_HEAD, chunk(STREAM), LAST_CHUNK)
    assert (await client.message()).body == STREAM
    assert await asking.ended() == {"completed": 1}
    assert asking.sample("request_bytes_total") == len(body)


async def test_a_chunked_request_stays_one(asking: RunningProxy, upstream: ScriptedUpstream) -> None:
    head, _, _ = post(b"").partition(b"Content-Length")
    client, _, request = await asked(
        asking,
        upstream,
        head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(REQUEST[:9]) + chunk(REQUEST[9:]) + LAST_CHUNK,
    )
    assert options(request) == {"include_usage": True}
    client.close()


async def test_every_byte_of_every_stream(start: StartProxy, play: PlayScript) -> None:
    events = [delta("Hi"), delta("é"), usage(1, 1), usage(2, 2), b": c\n\n", b'data: {"choices":[]}\n\n', b"id: 1\n\n"]
    ends = [b"\n", b"\r\n", b"\r"]
    streams: list[tuple[bytes, bytes]] = []
    for seed in range(300):
        dice = random.Random(seed)
        parts = [(dice.choice(events), dice.choice(ends)) for _ in range(dice.randrange(12))] + [(DONE, b"\n")]
        spelled = [(part.replace(b"\n", end), b'"usage"' in part) for part, end in parts]
        streams.append((b"".join(part for part, _ in spelled), b"".join(part for part, extra in spelled if not extra)))

    async def answer(api: Peer) -> None:
        while True:
            request = await api.message()
            number = int(request.json()["user"])
            dice = random.Random(number)
            stream = streams[number][0]
            api.send(STREAM_HEAD)
            while stream:
                size = dice.choice([1, 5, 50, 500])
                api.send(chunk(stream[:size]))
                stream = stream[size:]
                if dice.random() < 0.2:
                    await api.drain()
            api.send(LAST_CHUNK)

    upstream = await play(answer)
    for route, wanted in ((ASKING, 1), ({}, 0)):
        proxy = await start(upstream.url, route=route)
        client = await proxy.connect()
        for number, stream in enumerate(streams):
            client.send(post(b'{"stream":true,"user":"%d"}' % number))
            assert (await client.message()).body == stream[wanted], number
        assert await proxy.ended() == {"completed": len(streams)}


@pytest.fixture
async def labelling(start: StartProxy, upstream: ScriptedUpstream) -> RunningProxy:
    return await start(upstream.url, metrics=config.Metrics(models=("gpt-4o", "gpt-*", "gemini-*")))


@pytest.mark.parametrize(
    ("path", "model", "label"),
    [
        ("/v1/chat/completions", "gpt-4o", "gpt-4o"),
        ("/v1/chat/completions", "gpt-4o-mini", "gpt-*"),
        ("/v1/chat/completions", "o3", "other"),
        ("/v1/chat/completions", 'gpt-*"}', "gpt-*"),
        ("/v1/chat/completions", None, "other"),
        ("/v1/chat/completions", 4, "other"),
        ("/v1/deployments/gpt-4o/chat/completions?api-version=1", None, "gpt-4o"),
        ("/v1/models/gemini-2.5-pro/chat/completions", None, "gemini-*"),
    ],
)
async def test_a_models_label_is_of_the_configuration(
    labelling: RunningProxy, upstream: ScriptedUpstream, path: str, model: object, label: str
) -> None:
    body = msgspec.json.encode({"model": model, "stream": True})
    client, api, request = await asked(labelling, upstream, post(body, path))
    assert request.body == body
    api.send(STREAM_HEAD, chunk(delta("a")), chunk(delta("b")), chunk(usage(3, 2)), chunk(DONE), LAST_CHUNK)
    assert (await client.message()).complete
    await labelling.idle()
    for name in ("tokens_total", "time_to_first_token_seconds_count", "time_per_output_token_seconds_count"):
        labels = {dict(having)["model"] for metric, having in labelling.samples() if metric == f"sseproxy_{name}"}
        assert labels == {label}, name


def labelled(proxy: RunningProxy) -> int:
    """How many series there are of routes; that of the loop's lag begins when it likes."""
    return sum("route" in dict(labels) for _, labels in proxy.samples())


async def test_clients_make_no_labels(start: StartProxy, play: PlayScript) -> None:
    async def answer(api: Peer) -> None:
        while True:
            await api.message()
            api.send(STREAM_HEAD, chunk(delta("a") + usage(1, 1) + DONE), LAST_CHUNK)

    upstream = await play(answer)
    proxy = await start(upstream.url, metrics=config.Metrics(models=("a*", "b*")))
    # What a worker tells of itself once a second, it has told.
    proxy.worker.telemetry.lagged(0.0)
    client = await proxy.connect()
    series = 0
    for number in range(300):
        client.send(post(msgspec.json.encode({"model": f"{'abc'[number % 3]}{number}"})))
        await client.message()
        if number == 5:
            series = labelled(proxy)
    await proxy.idle()
    assert labelled(proxy) == series


async def test_a_request_whose_body_comes_late_is_labelled_all_the_same(
    labelling: RunningProxy, upstream: ScriptedUpstream
) -> None:
    request = post(b'{"stream":true,"model":"gpt-4o"}')
    client = await labelling.connect()
    client.send(request[:-10])
    await labelling.busy()
    assert labelling.sample("requests_active", route="api") == 1
    client.send(request[-10:])
    api = await upstream.accept()
    await api.message()
    api.send(STREAM_HEAD, chunk(delta("a") + usage(1, 1) + DONE), LAST_CHUNK)
    assert (await client.message()).complete
    await labelling.idle()
    assert labelling.sample("tokens_total", model="gpt-4o") == 2


async def test_a_file_is_not_read_for_a_label(labelling: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin_upload(labelling, upstream)
    client.send(b"half")
    assert await api.read(4) == b"half"


async def begin_upload(proxy: RunningProxy, upstream: ScriptedUpstream) -> tuple[Peer, Peer]:
    client = await proxy.connect()
    client.send(b"POST /v1/files HTTP/1.1\r\nHost: p\r\nContent-Type: multipart/form-data\r\nContent-Length: 9\r\n\r\n")
    api = await upstream.accept()
    await api.head()
    return client, api
