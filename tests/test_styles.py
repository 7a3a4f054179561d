"""What is written here for a client is in the style of the API that it asked, and the API's own clients read it."""

from __future__ import annotations

import json
from time import perf_counter
from typing import Any

import pytest
from msgspec.structs import replace

from sseproxy import config
from sseproxy.errors import (
    Cancelled,
    Draining,
    ExchangeError,
    InternalError,
    LimitExceeded,
    RequestError,
    StalledClient,
    TooManyConnects,
    Truncated,
    UpstreamError,
    UpstreamTimeout,
)
from sseproxy.relay.routes import normal_path
from sseproxy.wire.dialects import DIALECTS, OPENAI, Dialect, Style, dialect_of, style_of
from sseproxy.wire.dialects.gemini import GOOGLE
from sseproxy.wire.dialects.messages import ANTHROPIC
from sseproxy.wire.sse import EventParser

from .conftest import PlayScript, StartProxy
from .ends import AI_SDK, EVENTS, READERS, Ended, api_of
from .harness import (
    STREAM_HEAD,
    Peer,
    RunningProxy,
    ScriptedUpstream,
    begin,
    chunk,
    post,
)

EVERY_ERROR: list[ExchangeError] = [
    *map(RequestError, RequestError._TABLE),
    TooManyConnects(),
    LimitExceeded("tokens", "5 tokens per minute", 3.0),
    *map(UpstreamError, UpstreamError._TABLE),
    *(UpstreamTimeout(phase, 3) for phase in UpstreamTimeout._WAITED_FOR),
    *(Truncated(), StalledClient("took", 3), Draining(), Cancelled(), InternalError()),
]
EACH_ERROR = pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: f"{type(error).__name__} {error.code}")
EACH_DIALECT = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
NUMBER = 7
# https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
GOOGLE_STATUSES = set(
    "CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED UNAUTHENTICATED "
    "RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS".split()
)
# https://docs.anthropic.com/en/api/errors
ANTHROPIC_TYPES = set(
    "invalid_request_error authentication_error billing_error permission_error not_found_error request_too_large "
    "rate_limit_error api_error timeout_error overloaded_error".split()
)


def test_every_error_is_tried() -> None:
    def below(kind: type[ExchangeError]) -> set[type[ExchangeError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    assert {type(error) for error in EVERY_ERROR} == below(ExchangeError) - {ExchangeError}


@EACH_ERROR
def test_an_error_as_openai_has_it(error: ExchangeError) -> None:
    expected = {"message": str(error), "type": error.type, "param": None, "code": error.code}
    assert json.loads(OPENAI.refusal(error)) == {"error": expected}
    kind, data = event_of(OPENAI, error)
    assert (kind, data) == (b"error", {"type": "error", "error": expected})


@EACH_ERROR
def test_an_error_as_anthropic_has_it(error: ExchangeError) -> None:
    body = json.loads(ANTHROPIC.refusal(error))
    kind = body["error"]["type"]
    assert body == {"type": "error", "error": {"type": kind, "message": str(error)}}
    assert kind in ANTHROPIC_TYPES
    assert (kind in ("api_error", "overloaded_error", "timeout_error")) == (error.status >= 500)
    assert event_of(ANTHROPIC, error) == (b"error", body)


@EACH_ERROR
def test_an_error_as_google_has_it(error: ExchangeError) -> None:
    body = json.loads(GOOGLE.refusal(error))
    assert body == {"error": {"code": error.status, "message": str(error), "status": body["error"]["status"]}}
    assert body["error"]["status"] in GOOGLE_STATUSES
    assert event_of(GOOGLE, error) == (b"", body)
    assert GOOGLE.error_event(error, NUMBER).startswith(b'data: {"error":')


def event_of(style: Style, error: ExchangeError) -> tuple[bytes, Any]:
    ((kind, data),) = EventParser(1 << 20).feed(style.error_event(error, NUMBER))
    assert data is not None
    return kind, json.loads(data)


@EACH_DIALECT
def test_an_error_event_is_an_error_to_the_reader_of_its_own_api(dialect: Dialect) -> None:
    """As it is to a proxy like this one in front."""
    for error in EVERY_ERROR:
        ((kind, data),) = EventParser(1 << 20).feed(dialect.style.error_event(error, NUMBER))
        assert data is not None
        assert dialect.read(kind, data).error


@EACH_DIALECT
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_heartbeat_is_no_event_and_changes_none(dialect: Dialect, end: bytes) -> None:
    event = b"event: x" + end + b"data: y" + end + end
    beat = dialect.style.heartbeat
    assert EventParser(100).feed(beat + beat + event + beat + event + beat) == 2 * [(b"x", b"y")]


@pytest.mark.parametrize(
    ("path", "style"),
    [
        ("/v1/chat/completions", OPENAI),
        ("/v1/embeddings", OPENAI),
        ("/v1/models", OPENAI),
        ("/v1/models/ft:gpt-4o-mini:acme::Abc", OPENAI),
        ("/v1/models/llama3:latest", OPENAI),
        ("/v1/threads/t/messages", OPENAI),
        ("/v1/threads/messages", OPENAI),
        ("/v1/chat/completions/c/messages", OPENAI),
        ("/v1beta/openai/chat/completions", OPENAI),
        ("/v1beta/openai/embeddings", OPENAI),
        ("/v1beta1/projects/p/locations/l/endpoints/openapi/chat/completions", OPENAI),
        ("/", OPENAI),
        ("*", OPENAI),
        ("/v1/messages", ANTHROPIC),
        ("/anthropic/v1/messages", ANTHROPIC),
        ("/v1/messages/count_tokens", ANTHROPIC),
        ("/v1/messages/batches", ANTHROPIC),
        ("/v1/messages/batches/b/results", ANTHROPIC),
        ("/v1/projects/p/locations/l/publishers/anthropic/models/m:rawPredict", ANTHROPIC),
        ("/v1beta1/projects/p/locations/l/publishers/anthropic/models/m:streamRawPredict", ANTHROPIC),
        ("/v1beta/models/m:streamGenerateContent", GOOGLE),
        ("/v1/models/m:generateContent", GOOGLE),
        ("/v1/models/m:countTokens", GOOGLE),
        ("/v1/models/m:embedContent", GOOGLE),
        ("/v1/models/m:batchEmbedContents", GOOGLE),
        ("/v1beta/models", GOOGLE),
        ("/upload/v1beta/files", GOOGLE),
        ("/v1beta1/projects/p/locations/l/publishers/google/models/m:predict", GOOGLE),
        ("/v1beta1/projects/p/locations/l/endpoints/e:predict", GOOGLE),
    ],
)
def test_a_path_tells_the_style(path: str, style: Style) -> None:
    assert style_of(path) is style


HOSTILE = [
    "/v1beta/",
    "/threads/",
    "/completions/a",
    ":count",
    "/messages",
    "/v1beta/projects/",
    "/endpoints/",
    "//",
    "::",
]


@pytest.mark.parametrize("begins", HOSTILE)
@pytest.mark.parametrize("ends", ["", "/endpoints/" + "x/" * 10_000, "/messages/" + "m" * 10_000, ":" + "p" * 10_000])
def test_no_path_takes_long_to_tell(begins: str, ends: str) -> None:
    path = begins * (30_000 // len(begins)) + ends
    started = perf_counter()
    style_of(path)
    assert perf_counter() - started < 1


def test_responses_have_an_error_event_of_their_own() -> None:
    assert style_of("/v1/responses") == replace(OPENAI, error_event=dialect_of("/v1/responses").style.error_event)


@EACH_DIALECT
def test_a_route_that_names_its_dialect_tells_the_style(dialect: Dialect) -> None:
    assert style_of("/v1/messages", dialect.name) is dialect.style


@pytest.mark.parametrize(
    ("path", "style"),
    [
        ("/other/messages", ANTHROPIC),
        ("/other/m%65ssages", ANTHROPIC),
        ("/other/m:generateContent", GOOGLE),
        ("/other/responses", OPENAI),
    ],
)
async def test_what_no_route_takes_is_refused_by_its_path(proxy: RunningProxy, path: str, style: Style) -> None:
    client = await proxy.connect()
    client.send(post(path=path + "?key=:generateContent"))
    response = await client.message()
    said = RequestError("no_route", f"No route for POST {normal_path(path)}; there are routes for /v1.")
    assert (response.status, response.body) == (404, style.refusal(said))
    assert response.get("content-type") == "application/json"


async def test_what_a_route_takes_is_refused_as_the_upstreams_api(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    base = config.Upstream(name="up", url=f"{upstream.url}/v1")
    match = config.Match(path="/claude")
    by_path = config.Route(
        name="a", match=match, upstream=(config.Target(name="up"),), timeouts=config.Timeouts(head=0.2)
    )
    named = config.Route(
        name="b",
        match=config.Match(path="/b"),
        upstream=(config.Target(name="up"),),
        dialect="gemini",
        timeouts=by_path.timeouts,
    )
    proxy = await start(upstream.url, upstreams=(base,), routes=(by_path, named))
    late = UpstreamTimeout("head", 0.2)
    for path, style in (("/claude/messages", ANTHROPIC), ("/claude/completions", OPENAI), ("/b/whatever", GOOGLE)):
        client, _ = await begin(proxy, upstream, post(path=path))
        response = await client.message()
        assert (response.status, response.body) == (504, style.refusal(late))


async def test_what_is_no_request_is_refused_as_openai_does(proxy: RunningProxy) -> None:
    client = await proxy.connect()
    client.send(b"POST /v1/messages HTTP/1.1\r\nHost : proxy\r\n\r\n")
    assert json.loads((await client.message()).body)["error"].keys() == {"message", "type", "param", "code"}


# What each SDK raises for a status of an error response.
RAISED = {
    401: ("AuthenticationError", "ClientError", "ApiError"),
    404: ("NotFoundError", "ClientError", "ApiError"),
    429: ("RateLimitError", "ClientError", "ApiError"),
    503: ("InternalServerError", "ServiceUnavailableError", "ServerError", "ApiError"),
}
GOOGLES = ("ClientError", "ServerError", "ApiError")
REFUSALS = {
    404: "No route for POST /elsewhere/v1/",
    429: str(RequestError("connections_per_client")),
    503: str(RequestError("active_requests")),
}


def check_refused(ended: list[Ended], status: int, says: str) -> None:
    for end in ended:
        name, _, message = end.error.partition(":")
        assert says in message, end
        assert status in (end.status, end.code), end
        if end.api in AI_SDK:
            assert name == "APICallError", end
        else:
            assert name in RAISED[status], end
            assert (name in GOOGLES) == (end.api == "gemini"), end


@pytest.mark.parametrize("reader", READERS)
async def test_every_sdk_raises_what_it_has_for_our_refusals(
    start: StartProxy, upstream: ScriptedUpstream, reader: str
) -> None:
    apis, read = READERS[reader]
    for status, says in REFUSALS.items():
        most: dict[int, dict[str, Any]] = {429: {"connections_per_client": 1}, 503: {"active_requests": 1}}
        proxy = await start(upstream.url, limits=config.Limits(**most.get(status, {})))
        await begin(proxy, upstream)
        ended = await read(f"{proxy.url}/elsewhere" if status == 404 else proxy.url)
        assert [end.api for end in ended] == list(apis)
        check_refused(ended, status, says)
        assert proxy.outcomes() == {"rejected": len(apis)}


UNAUTHORIZED: dict[str, dict[str, object]] = {
    "messages": {"type": "error", "error": {"type": "authentication_error", "message": "No."}},
    "gemini": {"error": {"code": 401, "message": "No.", "status": "UNAUTHENTICATED"}},
}


@pytest.mark.parametrize("reader", READERS)
async def test_every_sdk_raises_what_it_has_for_the_upstreams(start: StartProxy, play: PlayScript, reader: str) -> None:
    async def refuse(api: Peer) -> None:
        while True:
            usual = {"error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": "invalid"}}
            body = UNAUTHORIZED.get(api_of(await api.message()), usual)
            text = json.dumps(body).encode()
            head = b"HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            api.send(head % len(text), text)

    proxy = await start((await play(refuse)).url)
    apis, read = READERS[reader]
    ended = await read(proxy.url)
    assert [end.api for end in ended] == list(apis)
    check_refused(ended, 401, "No.")


async def test_an_error_event_of_gemini_has_no_line_but_data(proxy: RunningProxy, upstream: ScriptedUpstream) -> None:
    client, api = await begin(proxy, upstream, post(path="/v1/models/m:streamGenerateContent"))
    api.send(STREAM_HEAD, *map(chunk, EVENTS["gemini"]))
    api.close()
    received, _ = await client.rest()
    assert received.endswith(chunk(GOOGLE.error_event(Truncated(), 2)))
