"""What a body is, and what it means, is told by what was asked and by what came; its label is one hint among others."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sseproxy import config
from sseproxy.wire.dialects import asks_for_stream
from sseproxy.wire.extract import WHOLE, Elements, Members

from .conftest import StartProxy
from .harness import DONE, LAST_CHUNK, Peer, RunningProxy, ScriptedUpstream, begin, chunk, delta, post, usage
from .splits import cut, splits, steps

STREAMING = b'{"model":"m","stream":true}'
STREAM = delta("Hel") + delta("lo") + usage(3, 2) + DONE
GEMINI = "/v1beta/models/gemini-x:streamGenerateContent"


def head(*fields: bytes, framing: bytes = b"Transfer-Encoding: chunked") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + b"".join(field + b"\r\n" for field in (*fields, framing)) + b"\r\n"


async def any_path(start: StartProxy, upstream: ScriptedUpstream, **route: Any) -> RunningProxy:
    return await start(
        upstream.url,
        upstreams=(config.Upstream(name="up", url=upstream.url),),
        routes=(config.Route(name="all", match=config.Match(path="/"), upstream=(config.Target(name="up"),), **route),),
    )


async def answered(
    proxy: RunningProxy, upstream: ScriptedUpstream, request: bytes, *answer: bytes, status: int = 200
) -> bytes:
    """The body that the client gets if the upstream answers so."""
    client, api = await begin(proxy, upstream, request)
    api.send(*answer)
    received = await client.message()
    assert (received.status, received.complete) == (status, True)
    client.close()
    await proxy.idle()
    return received.body


LABELS = {
    "an encoding that is none": (b"Content-Type: text/event-stream", b"Content-Encoding: none"),
    "identity": (b"Content-Type: text/event-stream", b"Content-Encoding: identity"),
    "text": (b"Content-Type: text/plain; charset=utf-8",),
    "markup": (b"Content-Type: text/html",),
    "bytes": (b"Content-Type: application/octet-stream",),
    "JSON": (b"Content-Type: application/json",),
    "nothing": (),
}


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("asking", [False, True], ids=["", "asking for usage"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
async def test_a_stream_is_one_whatever_its_label(
    start: StartProxy, upstream: ScriptedUpstream, label: str, asking: bool, split: bool
) -> None:
    proxy = await any_path(start, upstream, usage=config.UsageOptions(request=asking))
    chunks = [chunk(piece) for piece in (steps(STREAM, 7) if split else [STREAM])]
    body = await answered(
        proxy, upstream, post(STREAMING, "/v1/chat/completions"), head(*LABELS[label]), *chunks, LAST_CHUNK
    )
    # What we asked for, the client does not see.
    assert body == (delta("Hel") + delta("lo") + DONE if asking else STREAM)
    assert proxy.sample("time_to_first_token_seconds_count") == 1
    assert proxy.sample("tokens_total", type="output") == 2
    assert proxy.sample("stream_ends_total", end="marker") == 1
    assert proxy.sample("streams_without_usage_total") == 0
    assert proxy.sample("bodies_not_read_total") == 0
    assert proxy.sample("streams_active") == 0


@pytest.mark.parametrize("label", ["text", "bytes", "nothing"])
@pytest.mark.parametrize(
    ("path", "request_body", "accept"),
    [
        ("/v1/chat/completions", b'{"model":"m"}', b""),
        ("/v1/chat/completions", b'{"model":"m"}', b"Accept: text/event-stream\r\n"),
        ("/v1/chat/completions?stream=true", b"{}", b""),
    ],
)
async def test_a_stream_that_nobody_seems_to_have_asked_for_is_read(
    start: StartProxy, upstream: ScriptedUpstream, label: str, path: str, request_body: bytes, accept: bytes
) -> None:
    proxy = await any_path(start, upstream)
    request = post(request_body, path).replace(b"Host:", accept + b"Host:", 1)
    assert await answered(proxy, upstream, request, head(*LABELS[label]), chunk(STREAM), LAST_CHUNK) == STREAM
    assert proxy.sample("tokens_total", type="output") == 2
    assert proxy.sample("time_to_first_token_seconds_count") == 1
    assert proxy.sample("stream_ends_total", end="marker") == 1


ANSWER = b'{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":3,"completion_tokens":2}}'


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("asked", [STREAMING, b'{"model":"m"}'])
@pytest.mark.parametrize("asking", [False, True])
async def test_json_is_json_whatever_its_label_and_whatever_was_asked(
    start: StartProxy, upstream: ScriptedUpstream, label: str, asked: bytes, asking: bool
) -> None:
    proxy = await any_path(start, upstream, usage=config.UsageOptions(request=asking))
    chunks = [chunk(piece) for piece in steps(b" \n" + ANSWER, 9)]
    body = await answered(
        proxy, upstream, post(asked, "/v1/chat/completions"), head(*LABELS[label]), *chunks, LAST_CHUNK
    )
    assert body == b" \n" + ANSWER
    assert proxy.sample("tokens_total", type="output") == 2
    assert proxy.sample("bodies_not_read_total") == 0
    assert proxy.sample("answers_without_usage_total") == 0


@pytest.mark.parametrize("before", [b"\n", b"\r\n\r\n", b"\xef\xbb\xbf\n", b"\t\n"])
@pytest.mark.parametrize("streams", [True, False], ids=["a stream", "JSON"])
async def test_what_is_sent_before_a_body_to_keep_the_connection_alive_tells_nothing_about_it(
    proxy: RunningProxy, upstream: ScriptedUpstream, before: bytes, streams: bool
) -> None:
    """Blank lines come in a read of their own, and so do the name of a field and its value."""
    body = STREAM if streams else ANSWER
    client, api = await begin(proxy, upstream, post(STREAMING, "/v1/chat/completions"))
    api.send(head(b"Content-Type: text/event-stream"))
    await client.read_until(b"\r\n\r\n")
    for piece in (before, before, *steps(body, 6)):
        api.send(chunk(piece))
        assert await client.read(len(chunk(piece))) == chunk(piece)
    api.send(LAST_CHUNK)
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("tokens_total", type="output") == 2
    assert proxy.sample("bodies_not_read_total") == 0
    # Blank lines are no events, and neither is what is no stream.
    assert proxy.sample("stream_events_total") == (4 if streams else 0)
    assert proxy.sample("stream_ends_total", end="marker") == int(streams)


@pytest.mark.parametrize("parts", [(3,), (2,), ()], ids=["the mark alone", "a part of it alone", "all at once"])
@pytest.mark.parametrize(
    ("path", "body", "outcome", "tokens"),
    [
        ("/v1/chat/completions", ANSWER, "completed", 2),
        ("/v1/chat/completions", b'{"error":{"message":"overloaded"}}', "upstream_error", 0),
        (GEMINI, b'[{"usageMetadata":{"promptTokenCount":3,"candidatesTokenCount":2}}]', "completed", 2),
    ],
    ids=["an answer", "an error", "a list"],
)
async def test_json_behind_a_byte_order_mark_is_read(
    start: StartProxy,
    upstream: ScriptedUpstream,
    parts: tuple[int, ...],
    path: str,
    body: bytes,
    outcome: str,
    tokens: int,
) -> None:
    proxy = await any_path(start, upstream)
    client, api = await begin(proxy, upstream, post(STREAMING, path))
    api.send(head(b"Content-Type: text/event-stream"))
    await client.read_until(b"\r\n\r\n")
    for piece in cut(b"\xef\xbb\xbf" + body, {*parts}):
        api.send(chunk(piece))
        assert await client.read(len(chunk(piece))) == chunk(piece)
    api.send(LAST_CHUNK)
    assert await proxy.ended() == {outcome: 1}
    assert proxy.sample("tokens_total", type="output") == tokens
    assert proxy.sample("bodies_not_read_total") == 0


@pytest.mark.parametrize("label", [b"text/event-stream", b"application/json", b"text/plain"])
async def test_an_error_in_json_is_one_whatever_its_label(
    start: StartProxy, upstream: ScriptedUpstream, label: bytes
) -> None:
    proxy = await any_path(start, upstream)
    body = b'{"error":{"message":"overloaded"}}'
    request = post(STREAMING, "/v1/chat/completions")
    assert await answered(proxy, upstream, request, head(b"Content-Type: " + label), chunk(body), LAST_CHUNK) == body
    assert await proxy.ended() == {"upstream_error": 1}


NO_HEARTBEAT = [b"text/plain", b"application/json"]


@pytest.mark.parametrize("label", [b"text/event-stream", *NO_HEARTBEAT])
async def test_json_is_not_changed_by_a_heartbeat_nor_by_an_error_event(
    start: StartProxy, upstream: ScriptedUpstream, label: bytes
) -> None:
    proxy = await any_path(start, upstream, heartbeat=0.05, timeouts=config.Timeouts(idle=0.5, first_token=0.5))
    client, api = await begin(proxy, upstream, post(STREAMING, "/v1/chat/completions"))
    api.send(head(b"Content-Type: " + label), chunk(b'{"choices":[\n\n'))
    rest, _ = await client.rest()
    assert rest.partition(b"\r\n\r\n")[2] == chunk(b'{"choices":[\n\n')
    assert await proxy.ended() == {"upstream_timeout_idle": 1}


NOT_READ: dict[str, tuple[str, bytes, bytes]] = {
    "audio": ("/v1/audio/speech", b"audio/mpeg", b"\xff\xfb\x90d"),
    "binary events": ("/v1/chat/completions", b"application/vnd.amazon.eventstream", b"\x00\x00\x00\x10"),
    "text": ("/v1/audio/transcriptions", b"text/plain", b"And so, my fellow Americans"),
    "an event stream without events": ("/v1/chat/completions", b"text/event-stream", b"Internal Server Error"),
    "no JSON": ("/v1/chat/completions", b"application/json", b"<html>"),
    "JSON that ends too early": ("/v1/chat/completions", b"application/json", b'{"usage":'),
    "a list that ends too early": (GEMINI, b"application/json", b'[{"candidates":[]},'),
    "a list of something else": (GEMINI, b"application/json", b"[1,2]"),
    "a list of an API that is not known": ("/v1/other", b"application/json", b"[[0.1]]"),
}


@pytest.mark.parametrize("body", NOT_READ)
@pytest.mark.parametrize("known_length", [True, False])
async def test_what_cannot_be_read_is_counted_as_not_read(
    start: StartProxy, upstream: ScriptedUpstream, body: str, known_length: bool
) -> None:
    proxy = await any_path(start, upstream)
    path, label, content = NOT_READ[body]
    if known_length:
        sent = [head(b"Content-Type: " + label, framing=b"Content-Length: %d" % len(content)), content]
    else:
        sent = [head(b"Content-Type: " + label), chunk(content), LAST_CHUNK]
    assert await answered(proxy, upstream, post(STREAMING, path), *sent) == content
    assert proxy.sample("bodies_not_read_total", reason="unknown") == 1
    assert await proxy.ended() == {"completed": 1}


async def test_a_compressed_answer_is_counted_as_not_read(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await any_path(start, upstream)
    packed = gzip.compress(ANSWER)
    fields = (b"Content-Type: application/json", b"Content-Encoding: gzip")
    sent = head(*fields, framing=b"Content-Length: %d" % len(packed)) + packed
    assert await answered(proxy, upstream, post(b"{}", "/v1/chat/completions"), sent) == packed
    assert proxy.sample("bodies_not_read_total", reason="encoded") == 1


async def test_what_is_only_fetched_is_not_counted(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await any_path(start, upstream)
    fetch = b"GET /v1/files/f/content HTTP/1.1\r\nHost: p\r\nAccept-Encoding: gzip\r\n\r\n"
    fields = (b"Content-Type: application/jsonl", b"Content-Encoding: gzip")
    await answered(proxy, upstream, fetch, head(*fields, framing=b"Content-Length: 2") + b"\x1f\x8b")
    assert proxy.sample("bodies_not_read_total") == 0


async def test_what_is_no_success_is_not_counted(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await any_path(start, upstream)
    refusal = b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"
    await answered(proxy, upstream, post(STREAMING, "/v1/chat/completions"), refusal, status=502)
    assert proxy.sample("bodies_not_read_total") == 0
    assert proxy.sample("answers_without_usage_total") == 0


@pytest.mark.parametrize(
    ("path", "body", "lacks"),
    [
        ("/v1/chat/completions", {"choices": [{"message": {"content": "Hi"}}]}, True),
        ("/v1/chat/completions", {"choices": [], "usage": None}, True),
        ("/v1/messages", {"type": "message", "content": []}, True),
        ("/v1beta/models/m:generateContent", {"candidates": [{"content": {}}]}, True),
        ("/v1/images/generations", {"data": []}, True),
        ("/v1/chat/completions", {"usage": {"prompt_tokens": 1}}, False),
        ("/v1/chat/completions", {"error": {"message": "no"}}, False),
        ("/v1/responses", {"id": "r", "background": True, "status": "queued", "usage": None}, False),
        ("/v1/responses/input_tokens", {"object": "response.input_tokens", "input_tokens": 3}, False),
        ("/v1/files", {"id": "f"}, False),
    ],
)
async def test_an_answer_without_usage_is_counted(
    start: StartProxy, upstream: ScriptedUpstream, path: str, body: object, lacks: bool
) -> None:
    proxy = await any_path(start, upstream)
    text = json.dumps(body).encode()
    sent = head(b"Content-Type: application/json", framing=b"Content-Length: %d" % len(text)) + text
    await answered(proxy, upstream, post(b"{}", path), sent)
    assert proxy.sample("answers_without_usage_total") == lacks


COMPLAINTS: list[dict[str, Any]] = [
    {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
    {"error_code": 336003, "error_msg": "the max length is 20000"},
    {"code": "InvalidApiKey", "message": "Invalid API-key provided.", "request_id": "r"},
    {"code": 1301, "msg": "sensitive", "success": False},
    {"header": {"code": 10163, "message": "invalid request", "sid": "s"}},
    {"Response": {"Error": {"Code": "LimitExceeded", "Message": "no"}, "RequestId": "r"}},
    {"detail": "Not authenticated"},
    {"errors": [{"code": 7009, "message": "Upstream service unavailable"}], "success": False, "result": None},
    {"message": "Input is too long for requested model."},
    {"object": "error", "message": "does not exist", "code": 404},
    {"status": "error", "error_message": "no capacity"},
    {"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0}, "base_resp": {"status_code": 1000}},
    {"success": False, "result": None},
    {"code": "00010", "msg": "no"},
]
NO_COMPLAINTS: list[dict[str, Any]] = [
    {"code": 200, "msg": "ok", "data": {}},
    {"base_resp": {"status_code": 0, "status_msg": "success"}},
    {"code": 0, "message": "Success"},
    {"code": "00000", "success": True, "msg": "OK"},
    {"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}], "code": "x", "message": "a warning"},
    {"usage": {"prompt_tokens": 1}, "message": "a warning"},
    {"id": "x", "object": "chat.completion", "choices": []},
    {"errors": [], "message": "", "code": None},
]


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "JSON"])
@pytest.mark.parametrize(("body", "error"), [(b, True) for b in COMPLAINTS] + [(b, False) for b in NO_COMPLAINTS])
async def test_an_error_in_a_success_is_what_says_a_code_or_a_message_and_nothing_else(
    start: StartProxy, upstream: ScriptedUpstream, body: dict[str, Any], error: bool, streamed: bool
) -> None:
    proxy = await any_path(start, upstream)
    text = json.dumps(body, ensure_ascii=False).encode()
    if streamed:
        sent = [head(b"Content-Type: text/event-stream"), chunk(b"data: " + text + b"\n\n"), LAST_CHUNK]
    else:
        sent = [head(b"Content-Type: application/json", framing=b"Content-Length: %d" % len(text)), text]
    await answered(proxy, upstream, post(STREAMING, "/v1/chat/completions"), *sent)
    assert await proxy.ended() == {"upstream_error" if error else "completed": 1}


async def test_a_warning_beside_content_is_no_error(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await any_path(start, upstream)
    stream = b'data: {"code":"busy","message":"wait"}\n\n' + STREAM
    request = post(STREAMING, "/v1/chat/completions")
    await answered(proxy, upstream, request, head(b"Content-Type: text/event-stream"), chunk(stream), LAST_CHUNK)
    assert await proxy.ended() == {"completed": 1}


def generation(text: str, **more: object) -> dict[str, Any]:
    return {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}} | more]}


LIST: list[dict[str, Any]] = [
    generation("Hel") | {"usageMetadata": {"promptTokenCount": 3}},
    generation("lo"),
    generation("!", finishReason="STOP")
    | {"usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 4, "thoughtsTokenCount": 5}},
]


@pytest.mark.parametrize("size", [1, 13, 5000])
@pytest.mark.parametrize("indent", [None, 2])
async def test_a_list_of_gemini_is_a_stream(
    start: StartProxy, upstream: ScriptedUpstream, size: int, indent: int | None
) -> None:
    proxy = await any_path(start, upstream)
    body = json.dumps(LIST, indent=indent).encode()
    chunks = [chunk(piece) for piece in steps(body, size)]
    fields = head(b"Content-Type: application/json; charset=UTF-8")
    assert await answered(proxy, upstream, post(b"{}", GEMINI), fields, *chunks, LAST_CHUNK) == body
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("time_to_first_token_seconds_count") == 1
    assert proxy.sample("inter_token_latency_seconds_count") == 2
    assert proxy.sample("stream_events_total") == 3
    assert proxy.sample("stream_ends_total", end="marker") == 1
    assert proxy.sample("tokens_total", type="input") == 3
    assert proxy.sample("tokens_total", type="output") == 9
    assert proxy.sample("tokens_total", type="reasoning") == 5
    assert proxy.sample("bodies_not_read_total") == 0


async def test_a_list_is_read_as_it_comes(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await any_path(start, upstream)
    client, api = await begin(proxy, upstream, post(b"{}", GEMINI))
    api.send(head(b"Content-Type: application/json"))
    for number, event in enumerate(LIST):
        piece = chunk((b"," if number else b"[") + json.dumps(event).encode())
        api.send(piece)
        await client.read_until(piece)
        assert proxy.sample("streams_active") == 1
    assert proxy.sample("time_to_first_token_seconds_count") == 1
    client.close()
    # The answer had ended, but for its bracket.
    assert await proxy.ended() == {"completed": 1}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(['"', "\\", "[{", "}]", "],["]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abx"), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    objects=st.lists(st.dictionaries(st.sampled_from(["a", "b", "x", "]", '"}']), VALUES, max_size=4), max_size=5),
    indent=st.sampled_from([None, 1]),
    after=st.sampled_from(["", "\n"]),
)
def test_the_objects_of_a_list_are_found_at_every_split(
    data: st.DataObject, objects: list[dict[str, Any]], indent: int | None, after: str
) -> None:
    body = (json.dumps(objects, indent=indent) + after).encode()
    for pieces in ([body], steps(body), data.draw(splits(body))):
        elements = Elements(Members({b"a": None, b"b": None}))
        found = [json.loads(text) for piece in pieces for text in elements.feed(piece)]
        assert found == [{name: value for name, value in each.items() if name in "ab"} for each in objects]
        assert elements.ended
        assert not elements.given_up


@settings(max_examples=300, deadline=None)
@given(data=st.data(), body=st.binary(max_size=40) | st.text('[]{},: "\\a1', max_size=40).map(str.encode))
def test_no_bytes_make_a_list_raise_and_every_split_finds_the_same(data: st.DataObject, body: bytes) -> None:
    def read(pieces: list[bytes]) -> tuple[list[bytes], bool, bool]:
        elements = Elements(Members({b"a": None}))
        found = [text for piece in (b"[{},", *pieces) for text in elements.feed(piece)]
        return found, elements.ended, elements.given_up

    whole = read([body])
    assert read(steps(body)) == whole
    assert read(data.draw(splits(body))) == whole


def test_a_list_holds_no_more_than_one_object_whatever_its_size() -> None:
    elements = Elements(Members({b"a": None}))
    assert elements.feed(b"[") == []
    for _ in range(50):
        assert elements.feed(b'{"x":"' + b"y" * WHOLE * 4 + b'","a":1}') == [b'{"a":1}']
        assert elements.feed(b"," * 10_000) == []
    assert len(elements.feed(b"{}," * 20_000)) == 20_000
    assert elements.feed(b"]") == []
    assert elements.ended
    too_much = Elements(Members({b"a": None}))
    assert too_much.feed(b"[{" + b'"a":1,' * 5000) == []
    assert too_much.too_much


@pytest.mark.parametrize(
    ("path", "query", "asks"),
    [
        (GEMINI, "", True),
        (GEMINI, "?alt=sse", True),
        ("/v1beta/models/m:generateContent", "?key=x&alt=sse", True),
        ("/v1/responses/r", "?stream=true&starting_after=3", True),
        ("/v1/responses/r", "?Stream=True", True),
        ("/v1/responses/r", "", False),
        ("/v1/responses/r", "?stream=false", False),
        ("/v1/responses/r", "?xstream=true", False),
        ("/v1beta/models/m:generateContent", "", False),
        ("/v1/x:streamRawPredict", "", True),
    ],
)
def test_a_url_asks_for_a_stream(path: str, query: str, asks: bool) -> None:
    assert asks_for_stream(path, query) == asks


# --- answers that are kept ---


def response(identity: str, status: str, *, background: bool | None = True, tokens: int | None = 7) -> dict[str, Any]:
    told = None if tokens is None else {"input_tokens": 3, "output_tokens": tokens}
    return {"id": identity, "object": "response", "status": status, "background": background, "usage": told}


def as_json(body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    return head(b"Content-Type: application/json", framing=b"Content-Length: %d" % len(text)) + text


def as_stream(body: dict[str, Any]) -> bytes:
    event = {"type": "response.completed", "response": body}
    delta = b'data: {"type":"response.output_text.delta","delta":"Hi"}\n\n'
    return (
        head(b"Content-Type: text/event-stream")
        + chunk(delta)
        + chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
        + LAST_CHUNK
    )


class Kept:
    """A proxy whose client asks for responses."""

    def __init__(self, proxy: RunningProxy, upstream: ScriptedUpstream, client: Peer) -> None:
        self.proxy, self.upstream, self.client = proxy, upstream, client
        self.api: Peer | None = None

    async def _asked(self, request: bytes, answer: bytes) -> float:
        """The output tokens after that."""
        self.client.send(request)
        self.api = self.api or await self.upstream.accept()
        await self.api.message()
        self.api.send(answer)
        assert (await self.client.message()).complete
        await self.proxy.idle()
        return self.proxy.sample("tokens_total", type="output")

    async def post(self, answer: bytes, path: str = "/v1/responses") -> float:
        return await self._asked(post(STREAMING, path), answer)

    async def get(self, identity: str, answer: bytes, path: str = "/v1/responses/") -> float:
        return await self._asked(f"GET {path}{identity} HTTP/1.1\r\nHost: p\r\n\r\n".encode(), answer)


@pytest.fixture
async def kept(start: StartProxy, upstream: ScriptedUpstream) -> Kept:
    proxy = await any_path(start, upstream)
    return Kept(proxy, upstream, await proxy.connect())


async def test_what_is_generated_in_the_background_is_counted_once(kept: Kept) -> None:
    assert await kept.post(as_json(response("r1", "queued", tokens=None))) == 0
    assert await kept.get("r1", as_json(response("r1", "in_progress", tokens=None))) == 0
    assert await kept.get("r1", as_json(response("r1", "completed"))) == 7
    assert await kept.get("r1", as_json(response("r1", "completed"))) == 7
    assert await kept.get("r1?stream=true", as_stream(response("r1", "completed"))) == 7
    assert await kept.get("r2", as_json(response("r2", "completed"))) == 14
    # One that was streamed when it was asked for.
    assert await kept.post(as_stream(response("r3", "completed"))) == 21
    assert await kept.get("r3?stream=true", as_stream(response("r3", "completed"))) == 21
    assert await kept.post(as_json(response("r3", "completed")), "/v1/responses/r3/cancel") == 21
    assert await kept.proxy.ended() == {"completed": 9}
    assert kept.proxy.sample("streams_without_usage_total") == 0
    assert kept.proxy.sample("answers_without_usage_total") == 0


async def test_what_is_generated_at_once_is_counted_with_its_request_only(kept: Kept) -> None:
    for background in (False, None):
        counted = await kept.post(as_json(response("r1", "completed", background=background)))
        assert await kept.get("r1", as_json(response("r1", "completed", background=background))) == counted
        replayed = await kept.get("r1?stream=true", as_stream(response("r1", "completed", background=background)))
        assert replayed == counted
        # Another worker may have counted it.
        assert await kept.get("r0", as_json(response("r0", "completed", background=background))) == counted


async def test_a_run_is_counted_once(kept: Kept) -> None:
    run = {"id": "run_1", "object": "thread.run", "status": "queued", "usage": None}
    done = run | {"status": "completed", "usage": {"prompt_tokens": 3, "completion_tokens": 7}}
    assert await kept.post(as_json(run), "/v1/threads/t/runs") == 0
    assert await kept.get("run_1", as_json(done), "/v1/threads/t/runs/") == 7
    assert await kept.get("run_1", as_json(done), "/v1/threads/t/runs/") == 7
    assert kept.proxy.sample("answers_without_usage_total") == 0


async def test_what_failed_in_the_background_is_no_failure_of_who_asks(kept: Kept) -> None:
    failed = response("r1", "failed", tokens=None) | {"error": {"code": "server_error", "message": "no"}}
    await kept.get("r1", as_json(failed))
    assert await kept.proxy.ended() == {"completed": 1}
