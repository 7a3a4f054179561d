"""The clients that people use, through the proxy: they see what the API said, and the API hears when they leave."""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections.abc import Callable

import msgspec
import pytest

from sseproxy.demo import MODEL, Pace, answer, backend
from sseproxy.errors import Truncated
from sseproxy.wire.dialects import OPENAI

from . import clients
from .clients import AT_FIRST_TEXT, BEFORE_HEAD, BEFORE_TEXT, NODE, READERS, SDKS, Ask, Child, Leaver, Reader, asking
from .conftest import StartProxy
from .harness import DEADLINE, DONE, LAST_CHUNK, STREAM_HEAD, Peer, RunningProxy, ScriptedUpstream, chunk, delta, usage
from .test_demo_backend import Watch, served

AT_ONCE = Pace(ttft=0, rate=math.inf, tokens=20)
TWENTY = "".join(answer(20))
ENDLESS = Pace(ttft=0, rate=200, tokens=1_000_000)
CUT = str(Truncated())


def each(cases: dict[str, Reader] | dict[str, Leaver], name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, list(cases.values()), ids=list(cases))


EACH_READER = each(READERS, "read")
EACH_SDK = each(SDKS, "read")


async def asked(upstream: ScriptedUpstream) -> Peer:
    """The connection on which a whole request has come."""
    api = await upstream.accept()
    await api.message()
    return api


EXAMPLES = {
    "python": (
        (sys.executable, "-c"),
        """\
from openai import OpenAI
client = OpenAI(base_url="BASE_URL", api_key="sk-test")
stream = client.chat.completions.create(
    model="qwen3-max",
    messages=[{"role": "user", "content": "Stream a 200-word reply."}],
    stream=True,
)
for chunk in stream:
    delta = chunk.choices[0].delta.content
    if delta:
        print(delta, end="", flush=True)
print()
""",
    ),
    "node": (
        (NODE, "--input-type=module", "-e"),
        """\
import OpenAI from "openai";
const client = new OpenAI({
  baseURL: "BASE_URL",
  apiKey: "sk-test",
});
const stream = await client.chat.completions.create({
  model: "qwen3-max",
  messages: [{ role: "user", content: "Stream a 200-word reply." }],
  stream: true,
});
for await (const chunk of stream) {
  const delta = chunk.choices[0]?.delta?.content;
  if (delta) process.stdout.write(delta);
}
""",
    ),
    "curl": (
        ("sh", "-c"),
        """\
curl BASE_URL/chat/completions \\
  -H "Authorization: Bearer sk-test" \\
  -H "Content-Type: application/json" \\
  -N \\
  -d '{
    "model": "qwen3-max",
    "messages": [{"role":"user","content":"Stream please"}],
    "stream": true
  }'
""",
    ),
}


@pytest.mark.parametrize("language", EXAMPLES)
async def test_the_examples_of_the_documentation_print_the_whole_answer(start: StartProxy, language: str) -> None:
    command, source = EXAMPLES[language]
    async with served(backend(AT_ONCE)) as url:
        proxy = await start(url.removesuffix("/v1"))
        async with Child(*command, source.replace("BASE_URL", f"{proxy.url}/v1")) as child:
            status, printed = await child.end()
        assert status == 0
        assert await proxy.ended() == {"completed": 1}
    if language == "curl":
        *events, end, rest = printed.split(b"\n\n")
        assert (end, rest) == (b"data: [DONE]", b"")
        assert "".join(clients.content(clients.parse(event)) for event in events) == TWENTY
    else:
        assert printed.decode().removesuffix("\n") == TWENTY


async def test_curl_prints_the_stream_as_the_upstream_wrote_it(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    body = (
        b": hello\n\ndata:{}\r\n\r\nevent: odd\nid: 1\ndata: \xe6\x9d\xb1\ndata: \xff\n\n" + delta("Größe 東京") + DONE
    )
    async with clients.curl(proxy.url, Ask()) as child:
        api = await asked(upstream)
        api.send(STREAM_HEAD, *(chunk(body[at : at + 7]) for at in range(0, len(body), 7)), LAST_CHUNK)
        assert await child.end() == (0, body)


@EACH_READER
async def test_the_application_has_a_token_before_the_next_one_is_made(
    proxy: RunningProxy, upstream: ScriptedUpstream, read: Reader
) -> None:
    async with asking(read, proxy.url) as application:
        api = await asked(upstream)
        api.send(STREAM_HEAD)
        for token in ("One", " two", " drei", " 四"):
            api.send(chunk(delta(token)))
            assert await application.text() == token
        api.send(chunk(DONE), LAST_CHUNK)
    assert application.seen.text == "One two drei 四"
    assert application.seen.chunks == 4
    assert await proxy.ended() == {"completed": 1}


@EACH_READER
async def test_usage_is_on_the_last_chunk_and_is_what_the_metrics_say(start: StartProxy, read: Reader) -> None:
    async with served(backend(AT_ONCE)) as url:
        proxy = await start(url.removesuffix("/v1"))
        seen = await read(proxy.url, Ask("Three words here", usage=True))
        assert await proxy.ended() == {"completed": 1}
    assert seen.text == TWENTY
    assert seen.finish == "stop"
    assert seen.usage == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
    assert proxy.sample("tokens_total", type="input") == 3
    assert proxy.sample("tokens_total", type="output") == 20
    assert proxy.sample("streams_without_usage_total") == 0


@EACH_READER
async def test_a_stream_that_was_not_asked_for_usage_counts_as_one_without(start: StartProxy, read: Reader) -> None:
    async with served(backend(AT_ONCE)) as url:
        proxy = await start(url.removesuffix("/v1"))
        seen = await read(proxy.url, Ask())
        assert await proxy.ended() == {"completed": 1}
    assert seen.text == TWENTY
    assert seen.usage is None
    assert proxy.sample("streams_without_usage_total", reason="not_reported") == 1
    assert proxy.sample("tokens_total") == 0


@each(BEFORE_HEAD, "leaver")
async def test_an_application_that_leaves_before_the_head_lets_the_upstream_go(
    proxy: RunningProxy, upstream: ScriptedUpstream, leaver: Leaver
) -> None:
    async with leaver(proxy.url) as leave:
        api = await asked(upstream)
        leave()
        await api.gone()
        assert await proxy.ended() == {"client_gone_before_head": 1}


@each(BEFORE_TEXT, "leaver")
async def test_an_application_that_leaves_before_the_first_token_lets_the_upstream_go(
    proxy: RunningProxy, upstream: ScriptedUpstream, leaver: Leaver
) -> None:
    async with leaver(proxy.url):
        api = await asked(upstream)
        api.send(STREAM_HEAD)
        await api.gone()
        assert await proxy.ended() == {"client_gone_before_first_token": 1}
        assert proxy.sample("streams_active") == 0


@each(AT_FIRST_TEXT, "leaver")
async def test_an_application_that_leaves_a_silent_stream_lets_the_upstream_go(
    proxy: RunningProxy, upstream: ScriptedUpstream, leaver: Leaver
) -> None:
    async with leaver(proxy.url):
        api = await asked(upstream)
        api.send(STREAM_HEAD, chunk(delta("")), chunk(delta("Hi")))
        await api.gone()
        assert await proxy.ended() == {"client_gone_mid_stream": 1}
        assert proxy.sample("streams_active") == 0
        assert proxy.sample("streams_without_usage_total", reason="client_gone") == 1


@each(AT_FIRST_TEXT, "leaver")
async def test_an_application_that_leaves_a_running_stream_ends_the_handler_that_makes_it(
    start: StartProxy, leaver: Leaver
) -> None:
    watch = Watch()
    async with served(watch.on(backend(ENDLESS))) as url:
        proxy = await start(url.removesuffix("/v1"))
        async with leaver(proxy.url):
            async with asyncio.timeout(DEADLINE):
                await watch.ended.wait()
            assert await proxy.ended() == {"client_gone_mid_stream": 1}
            assert proxy.sample("streams_active") == 0


@pytest.mark.parametrize("read", [SDKS["python-sync"], SDKS["python-async"]], ids=["python-sync", "python-async"])
async def test_an_application_that_closes_after_the_end_marker_has_read_to_the_end(
    proxy: RunningProxy, upstream: ScriptedUpstream, read: Reader
) -> None:
    """The SDKs for Python do not wait, or not long, for the end of the body that comes after the end marker."""
    async with asking(read, proxy.url) as application:
        api = await asked(upstream)
        api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(DONE))
        await api.gone()
    assert (application.seen.text, application.seen.error) == ("Hi", None)
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("streams_active") == 0


@EACH_SDK
async def test_what_is_not_streamed(start: StartProxy, read: Reader) -> None:
    async with served(backend(AT_ONCE)) as url:
        proxy = await start(url.removesuffix("/v1"))
        whole = await read(proxy.url, Ask("Three words here", do="complete"))
        models = await read(proxy.url, Ask(do="models"))
        missing = await read(proxy.url, Ask(do="model", model="other"))
        assert await proxy.ended() == {"completed": 3}
    assert (whole.text, whole.finish, whole.error) == (TWENTY, "stop", None)
    assert whole.usage == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
    assert proxy.sample("tokens_total", type="input") == 3
    assert proxy.sample("tokens_total", type="output") == 20
    assert models.models == [MODEL]
    assert missing.error is not None
    assert (missing.error.name, missing.error.status) == ("NotFoundError", 404)
    assert missing.error.body is not None
    assert missing.error.body["message"] == "The model 'other' does not exist"


def whole(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"\r\n".join((b"HTTP/1.1 " + status, *fields, b"Content-Length: %d" % len(body)))
    return head + b"\r\n\r\n" + body


async def test_embeddings(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    vector = [0.25, -1.5, 1e-9]
    document = {
        "object": "list",
        "model": "e",
        "data": [{"object": "embedding", "index": 0, "embedding": vector}],
        "usage": {"prompt_tokens": 8, "total_tokens": 8},
    }
    async with clients.async_client(proxy.url) as client, asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(client.embeddings.create(model="e", input=["text"], encoding_format="float"))
        api = await upstream.accept()
        request = await api.message()
        assert request.start_line == "POST /v1/embeddings HTTP/1.1"
        assert request.json() == {"model": "e", "input": ["text"], "encoding_format": "float"}
        api.send(whole(msgspec.json.encode(document), b"Content-Type: application/json"))
    assert asking.result().data[0].embedding == vector
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("tokens_total", type="input") == 8


async def test_a_file_goes_up_as_it_does_without_a_proxy(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    data = random.Random(5).randbytes(5_000_000)
    file = {"id": "file-1", "object": "file", "bytes": len(data), "filename": "odd näme.bin", "purpose": "batch"}

    async def upload(url: str) -> bytes:
        """The body that the upstream gets, with a boundary that does not differ."""
        async with clients.async_client(url) as client, asyncio.TaskGroup() as tasks:
            create = client.files.create(file=("odd näme.bin", data), purpose="batch")
            uploading = tasks.create_task(create)
            api = await upstream.accept()
            request = await api.message()
            api.send(whole(msgspec.json.encode(file), b"Content-Type: application/json"))
        assert uploading.result().id == "file-1"
        kind, _, boundary = (request.get("content-type") or "").partition("; boundary=")
        assert kind == "multipart/form-data"
        assert request.body.startswith(f"--{boundary}\r\n".encode())
        return request.body.replace(boundary.encode(), b"boundary")

    body = await upload(proxy.url)
    assert data in body
    assert body == await upload(upstream.url)
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("request_bytes_total") > len(data)


async def test_binary_comes_down_as_it_is(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    data = random.Random(6).randbytes(2_000_000)
    async with clients.async_client(proxy.url) as client:
        async with asyncio.TaskGroup() as tasks:
            speaking = tasks.create_task(client.audio.speech.create(model="tts", voice="alloy", input="Hello"))
            api = await asked(upstream)
            api.send(b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nTransfer-Encoding: chunked\r\n\r\n")
            api.send(*(chunk(data[at : at + 99_999]) for at in range(0, len(data), 99_999)), LAST_CHUNK)
        speech = speaking.result()
        assert speech.content == data
        assert speech.response.headers["content-type"] == "audio/mpeg"
        async with asyncio.TaskGroup() as tasks:
            fetching = tasks.create_task(client.files.content("file-1"))
            request = await api.message()
            assert request.start_line == "GET /v1/files/file-1/content HTTP/1.1"
            api.send(whole(data, b"Content-Type: application/octet-stream"))
        assert fetching.result().content == data
    assert await proxy.ended() == {"completed": 2}
    assert proxy.sample("response_bytes_total") == 2 * len(data)


ERRORS = [
    (b"429 Too Many Requests", "RateLimitError", "rate_limit_exceeded"),
    (b"401 Unauthorized", "AuthenticationError", "invalid_api_key"),
    (b"404 Not Found", "NotFoundError", "model_not_found"),
    (b"500 Internal Server Error", "InternalServerError", "server_error"),
]


@EACH_SDK
@pytest.mark.parametrize(("status", "name", "code"), ERRORS, ids=[name for _, name, _ in ERRORS])
async def test_an_error_of_the_api_is_raised_as_it_is(
    proxy: RunningProxy, upstream: ScriptedUpstream, read: Reader, status: bytes, name: str, code: str
) -> None:
    error = {"message": "Größe: nein.", "type": "some_error", "param": None, "code": code}
    fields = {"retry-after": "7", "x-request-id": "req-of-the-api", "x-ratelimit-remaining-requests": "0"}
    lines = [f"{field}: {value}".encode() for field, value in fields.items()]
    async with asking(read, proxy.url) as application:
        api = await asked(upstream)
        body = msgspec.json.encode({"error": error})
        api.send(whole(body, b"Content-Type: application/json", *lines, status=status))
    raised = application.seen.error
    assert raised is not None
    assert (raised.name, raised.status, raised.body) == (name, int(status[:3]), error)
    assert fields.items() <= raised.headers.items()
    assert await proxy.ended() == {"completed": 1}
    assert proxy.sample("requests_total", code=status[:3].decode()) == 1


@EACH_SDK
async def test_a_request_that_is_tried_again_succeeds(
    proxy: RunningProxy, upstream: ScriptedUpstream, read: Reader
) -> None:
    async with asking(read, proxy.url, Ask(retries=1)) as application:
        api = await upstream.accept()
        first = await api.message()
        api.send(whole(b"{}", b"Retry-After-Ms: 5", status=b"429 Too Many Requests"))
        again = await api.message()
        api.send(STREAM_HEAD, chunk(delta("Hi")), chunk(usage(1, 1)), chunk(DONE), LAST_CHUNK)
    assert (application.seen.text, application.seen.error) == ("Hi", None)
    assert [request.get("x-stainless-retry-count") for request in (first, again)] == ["0", "1"]
    assert again.body == first.body
    assert await proxy.ended() == {"completed": 2}


@EACH_SDK
async def test_an_upstream_that_cannot_be_reached_is_an_error_in_the_form_of_the_api(
    start: StartProxy, read: Reader
) -> None:
    async with ScriptedUpstream() as upstream:
        url = upstream.url
    proxy = await start(url)
    seen = await read(proxy.url, Ask())
    assert seen.error is not None
    assert (seen.error.name, seen.error.status) == ("InternalServerError", 502)
    assert seen.error.body == {
        "message": "The upstream could not be reached.",
        "type": "upstream_error",
        "param": None,
        "code": "upstream_unreachable",
    }
    assert await proxy.ended() == {"upstream_error": 1}


CUTS = pytest.mark.parametrize("cut", [Peer.close, Peer.reset], ids=["fin", "rst"])


@CUTS
@EACH_SDK
async def test_a_stream_cut_between_events_raises_and_says_why(
    proxy: RunningProxy, upstream: ScriptedUpstream, read: Reader, cut: Callable[[Peer], None]
) -> None:
    async with asking(read, proxy.url) as application:
        api = await asked(upstream)
        api.send(STREAM_HEAD, chunk(delta("Hi")))
        assert await application.text() == "Hi"
        cut(api)
    raised = application.seen.error
    assert raised is not None
    assert (raised.name, raised.status) == ("APIError", None)
    assert CUT in raised.message
    assert raised.body == {
        "message": CUT,
        "type": "upstream_error",
        "param": None,
        "code": "upstream_disconnected",
    }
    assert await proxy.ended() == {"truncated": 1}


@CUTS
@EACH_SDK
async def test_a_stream_cut_inside_an_event_raises(
    proxy: RunningProxy, upstream: ScriptedUpstream, read: Reader, cut: Callable[[Peer], None]
) -> None:
    async with asking(read, proxy.url) as application:
        api = await asked(upstream)
        api.send(STREAM_HEAD, chunk(delta("Hi") + delta(" there")[:-2]))
        assert await application.text() == "Hi"
        cut(api)
    raised = application.seen.error
    assert application.seen.text == "Hi"
    assert raised is not None
    assert raised.name == ("TypeError" if read is SDKS["node"] else "APIConnectionError")
    assert (raised.status, raised.body) == (None, None)
    assert await proxy.ended() == {"truncated": 1}


@CUTS
async def test_curl_fails_on_a_stream_that_is_cut(
    proxy: RunningProxy, upstream: ScriptedUpstream, cut: Callable[[Peer], None]
) -> None:
    async with clients.curl(proxy.url, Ask()) as child:
        api = await asked(upstream)
        api.send(STREAM_HEAD, chunk(delta("Hi")))
        assert await child.read_until(b"\n\n") == delta("Hi")
        cut(api)
        partial_file = 18
        assert await child.end() == (partial_file, OPENAI.error_event(Truncated(), 1))


@EACH_SDK
async def test_a_stream_that_falls_silent_raises_and_says_why(
    start: StartProxy, upstream: ScriptedUpstream, read: Reader
) -> None:
    proxy = await start(upstream.url, timeouts={"idle": 0.3})
    async with asking(read, proxy.url) as application:
        api = await asked(upstream)
        api.send(STREAM_HEAD, chunk(delta("Hi")))
        await api.gone()
    raised = application.seen.error
    assert application.seen.text == "Hi"
    assert raised is not None
    assert raised.name == "APIError"
    assert raised.body is not None
    assert raised.body["message"] == "The upstream did not send anything within 0.3 seconds."
    assert raised.body["code"] == "upstream_timeout"
    assert await proxy.ended() == {"upstream_timeout_idle": 1}
