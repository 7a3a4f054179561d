"""Who calls: keys are found wherever an SDK puts them, checked, and never seen again."""

from __future__ import annotations

import gzip
import re
import signal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy import config
from sseproxy.errors import ConfigError
from sseproxy.relay.clients import WrongKeys
from sseproxy.wire import headers
from sseproxy.wire.credentials import digest, keys_in, new_key, public_part, strays, without_key
from sseproxy.wire.form import FormReader
from sseproxy.wire.headers import Fields
from sseproxy.wire.request import ModelAudit, RequestReader, reader_of

from .conftest import StartProxy
from .harness import Message, Peer, RunningProxy, ScriptedUpstream
from .served import ConfigFile, run, serve
from .splits import splits, steps

KEY, OTHER = new_key(), new_key()
JSON = b'{"model":"m"}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def client(name: str = "team-a", *keys: str, **more: Any) -> config.Client:
    spelled = tuple(f"sha256:{digest(key.encode()).hex()}" for key in keys or (KEY,))
    return config.Client(name=name, keys=spelled, **more)


def request(
    *fields: str,
    path: str = "/v1/chat/completions",
    method: str = "POST",
    body: bytes = JSON,
    kind: str | None = "application/json",
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: proxy", *([f"Content-Type: {kind}"] if kind else []), *fields]
    length = [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, *length, "", ""]).encode("latin-1") + body


def bearer(key: str = KEY) -> str:
    return f"Authorization: Bearer {key}"


async def refused(proxy: RunningProxy, wanted: bytes) -> Message:
    peer = await proxy.connect()
    peer.send(wanted)
    return await peer.message()


async def reaches(proxy: RunningProxy, upstream: ScriptedUpstream, wanted: bytes) -> Message:
    """The request as the upstream gets it; the client gets a 200."""
    peer = await proxy.connect()
    peer.send(wanted)
    api = await upstream.accept()
    got = await api.message()
    api.send(ANSWER)
    assert (await peer.message()).status == 200
    api.close()
    peer.close()
    return got


def text_of(message: Message) -> str:
    return "\n".join([message.start_line, *(f"{name}: {value}" for name, value in message.fields)])


PLACES = {
    "OpenAI": ((bearer(),), "/v1/chat/completions"),
    "in lower case": ((f"authorization: bearer {KEY}",), "/v1/chat/completions"),
    "Anthropic": ((f"x-api-key: {KEY}",), "/v1/messages"),
    "Google": ((f"x-goog-api-key: {KEY}",), "/v1/models/m:generateContent"),
    "Azure": ((f"api-key: {KEY}",), "/v1/deployments/m/chat/completions?api-version=1"),
    "Gemini's query": ((), f"/v1/models/m:generateContent?alt=sse&key={KEY}"),
    "a query that is encoded": ((), f"/v1/models/m:generateContent?%6bey={quote(KEY).replace('s', '%73')}"),
    "several times the same": ((bearer(), f"x-api-key: {KEY}", f"X-API-KEY: {KEY}"), f"/v1/x?key={KEY}"),
    "beside another credential": ((bearer(), "Authorization: Basic dTpw", "x-api-key:"), "/v1/x"),
}


@pytest.mark.parametrize("api_key", ["sk-upstream", None])
@pytest.mark.parametrize("place", PLACES)
async def test_a_key_is_found_where_an_sdk_puts_it_and_goes_no_further(
    start: StartProxy, upstream: ScriptedUpstream, place: str, api_key: str | None
) -> None:
    proxy = await start(upstream.url, api_key=api_key, clients=(client(),))
    fields, path = PLACES[place]
    got = await reaches(proxy, upstream, request(*fields, path=path))
    assert "sseproxy_" not in text_of(got)
    assert got.all("authorization") == ([] if api_key is None else ["Bearer sk-upstream"])
    assert not [name for name in ("x-api-key", "x-goog-api-key", "api-key") if got.all(name)]
    await proxy.idle()
    assert proxy.sample("client_requests_total", client="team-a", outcome="completed") == 1
    assert proxy.sample("client_requests_active", client="team-a") == 0


STRAYS = {
    "a field of its own": (f"X-Own: {KEY}", "/v1/x"),
    "a cookie": (f"Cookie: a=1; key={KEY}", "/v1/x"),
    "the host": (f"X-Forwarded-Host: {KEY}", "/v1/x"),
    "an id": (f"X-Request-Id: {KEY}", "/v1/x"),
    "a spelling that CGI folds": (f"X_API_KEY: {KEY}", "/v1/x"),
    "Basic": (f"Authorization: Basic {KEY}", "/v1/x"),
    "another parameter": ("X-Plain: 1", f"/v1/x?a=1&token={quote(KEY).replace('_', '%5F')}"),
    "the user agent": (f"User-Agent: app/{KEY}", "/v1/x"),
}


@pytest.mark.parametrize("place", STRAYS)
async def test_a_key_that_is_anywhere_else_as_well_goes_nowhere(
    start: StartProxy, upstream: ScriptedUpstream, place: str
) -> None:
    proxy = await start(upstream.url, clients=(client(),))
    field, path = STRAYS[place]
    got = await reaches(proxy, upstream, request(bearer(), field, "X-Kept: yes", path=path))
    assert "sseproxy_" not in text_of(got)
    assert "sseproxy%5F" not in text_of(got)
    assert got.get("x-kept") == "yes"


async def test_a_key_in_a_path_is_refused(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, clients=(client(),))
    answer = await refused(proxy, request(bearer(), path=f"/v1/{quote(KEY).replace('_', '%5f')}/x"))
    assert (answer.status, answer.json()["error"]["code"]) == (400, "bad_target")
    assert upstream.connections == 0


FORMS: dict[str, dict[int, dict[str, Any]]] = {
    "/v1/chat/completions": {
        401: {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"},
        403: {"type": "invalid_request_error", "param": None, "code": "model_not_allowed"},
    },
    "/v1/messages": {401: {"type": "authentication_error"}, 403: {"type": "permission_error"}},
    "/v1/models/m:generateContent": {
        401: {"code": 401, "status": "UNAUTHENTICATED"},
        403: {"code": 403, "status": "PERMISSION_DENIED"},
    },
}


@pytest.mark.parametrize("path", FORMS)
async def test_a_refusal_has_the_form_of_the_api(start: StartProxy, upstream: ScriptedUpstream, path: str) -> None:
    proxy = await start(upstream.url, clients=(client(models=("llama-*", "qwen")),))
    unknown = await refused(proxy, request(bearer(OTHER), path=path))
    assert (unknown.status, unknown.get("www-authenticate")) == (401, "Bearer")
    error = unknown.json()["error"]
    assert error.pop("message") == "The key is not valid."
    assert error == FORMS[path][401]
    denied = await refused(proxy, request(bearer(), path=path))
    assert denied.status == 403
    error = denied.json()["error"]
    assert error.pop("message") == "This key may not use the model 'm'; it may use llama-*, qwen."
    assert error == FORMS[path][403]
    assert upstream.connections == 0
    await proxy.idle()
    assert proxy.sample("client_keys_rejected_total") == 1
    assert proxy.sample("client_requests_total", client="team-a", outcome="rejected") == 1
    assert proxy.sample("requests_rejected_total", reason="model_not_allowed", route="api") == 1


MISSING = {
    "none": (),
    "another scheme": ("Authorization: Basic dXNlcjpwYXNz",),
    "no scheme": (f"Authorization: {KEY}",),
    "empty ones": ("Authorization: Bearer ", "x-api-key:"),
    "a token of another field": (f"X-Auth: Bearer {KEY}", f"Cookie: key={KEY}"),
}
WRONG = {
    "unknown": (bearer(OTHER),),
    "in upper case": (bearer(KEY.upper()),),
    "cut": (bearer(KEY[:-1]),),
    "longer": (bearer(KEY + "a"),),
    "two in one field": (f"Authorization: Bearer {KEY}, Bearer {KEY}",),
    "the digest": (bearer(digest(KEY.encode()).hex()),),
    "quoted": (f'Authorization: Bearer "{KEY}"',),
    "encoded in a field": (f"x-api-key: {quote(KEY).replace('_', '%5F')}",),
    "no Unicode": ("x-api-key: \xff\xfe",),
    "two": (bearer(), f"x-api-key: {OTHER}"),
    "two in the same field": (bearer(), bearer(OTHER)),
}


@pytest.mark.parametrize("fields", [*MISSING.values()], ids=[*MISSING])
async def test_without_a_key_nobody_is_let_in(
    start: StartProxy, upstream: ScriptedUpstream, fields: tuple[str, ...]
) -> None:
    proxy = await start(upstream.url, clients=(client(),))
    answer = await refused(proxy, request(*fields))
    assert (answer.status, answer.json()["error"]["code"]) == (401, "missing_api_key")
    assert upstream.connections == 0
    assert proxy.sample("client_keys_rejected_total") == 0


@pytest.mark.parametrize("fields", [*WRONG.values()], ids=[*WRONG])
async def test_a_wrong_key_lets_nobody_in(
    start: StartProxy, upstream: ScriptedUpstream, fields: tuple[str, ...]
) -> None:
    proxy = await start(upstream.url, clients=(client(),))
    answer = await refused(proxy, request(*fields))
    assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert "sseproxy_" not in text_of(answer) + answer.body.decode()
    assert upstream.connections == 0
    await proxy.idle()
    assert proxy.sample("client_keys_rejected_total") == 1


async def test_nothing_of_a_body_is_read_before_the_key_is_known(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, clients=(client(models=("m",)),))
    peer = await proxy.connect()
    peer.send(request("Expect: 100-continue", "Content-Length: 1000000", body=b""))
    answer = await peer.head()
    assert answer.status == 401
    assert answer.get("connection") == "close"


async def test_whoever_has_no_key_is_not_told_which_routes_there_are(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, clients=(client(),))
    assert (await refused(proxy, request(path="/nowhere"))).status == 401
    assert (await refused(proxy, request(bearer(), path="/nowhere"))).status == 404


def routes(**more: Any) -> tuple[config.Route, ...]:
    return (
        config.Route(name="api", match=config.Match(path="/v1"), upstream=(config.Target(name="up"),)),
        config.Route(
            name="health", match=config.Match(path="/v1/health"), upstream=(config.Target(name="up"),), **more
        ),
    )


@pytest.mark.parametrize("fields", [(), (bearer(OTHER),), (bearer(),)], ids=["none", "wrong", "right"])
async def test_an_open_route_needs_no_key_and_forwards_none(
    start: StartProxy, upstream: ScriptedUpstream, fields: tuple[str, ...]
) -> None:
    proxy = await start(upstream.url, clients=(client(),), routes=routes(open=True))
    got = await reaches(proxy, upstream, request(*fields, path="/v1/health", method="GET", body=b"", kind=None))
    assert got.all("authorization") == []
    await proxy.idle()
    assert proxy.sample("client_requests_total") == proxy.sample("client_keys_rejected_total") == 0


async def test_of_routes_that_differ_in_their_model_all_have_to_be_open(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    both = tuple(
        config.Route(
            name=name,
            match=config.Match(path="/v1", model=model),
            upstream=(config.Target(name="up"),),
            open=name == "open",
        )
        for name, model in (("open", ("m",)), ("closed", ()))
    )
    proxy = await start(upstream.url, clients=(client(),), routes=both)
    assert (await refused(proxy, request())).status == 401


async def test_a_client_may_use_its_routes_alone(start: StartProxy, upstream: ScriptedUpstream) -> None:
    proxy = await start(upstream.url, clients=(client(routes=("health",)),), routes=routes())
    await reaches(proxy, upstream, request(bearer(), path="/v1/health"))
    answer = await refused(proxy, request(bearer()))
    assert (answer.status, answer.json()["error"]["code"]) == (403, "route_not_allowed")
    assert answer.json()["error"]["message"] == "This key may not use the route api; it may use health."


@pytest.mark.parametrize("path", ["/v1/a%2Fb/x", "/v1//a/b", "/v1/a;c/b", "/v1/a%5Cb", "/v1/a/b;c/x"])
async def test_no_spelling_of_a_path_leads_around_the_routes_of_a_client(
    start: StartProxy, upstream: ScriptedUpstream, path: str
) -> None:
    more = (config.Route(name="b", match=config.Match(path="/v1/a/b"), upstream=(config.Target(name="up"),)),)
    proxy = await start(upstream.url, clients=(client(routes=("api",)), client("b", OTHER)), routes=routes()[:1] + more)
    answer = await refused(proxy, request(bearer(), path=path))
    assert (answer.status, answer.json()["error"]["message"]) == (
        403,
        "This key may not use the route b; it may use api.",
    )
    await reaches(proxy, upstream, request(bearer(), path=path.replace("b", "d")))
    await reaches(proxy, upstream, request(bearer(OTHER), path=path))


FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--b--\r\n'
ALLOWED: dict[str, dict[str, Any]] = {
    "in JSON": {"body": b'{"model":"good-1","stream":true}'},
    "compressed": {"fields": ("Content-Encoding: gzip",), "body": gzip.compress(b'{"model":"good-1"}')},
    "in a form": {
        "path": "/v1/audio/transcriptions",
        "kind": "multipart/form-data; boundary=b",
        "body": FORM % b"good-1",
    },
    "in a form of another SDK": {
        "path": "/v1/audio/transcriptions",
        "kind": 'multipart/form-data; charset=utf-8; boundary="b"',
        "body": b'--b\r\nContent-Type: audio/wav\r\nContent-Disposition: form-data; name="file"; filename="a\\b.wav"; '
        b"filename*=utf-8''%e2%82%ac.wav;\r\nContent-Length: 1\r\n\r\nx\r\n" + FORM % b"good-1",
    },
    "in the path": {"path": "/v1/models/good-1:generateContent", "body": b'{"contents":[]}'},
    "in a path with a tag": {"path": "/v1/models/good-1:latest", "method": "DELETE", "body": b"", "kind": None},
    "in the body, with a path of models": {"path": "/v1/models/chat/completions", "body": b'{"model":"good-1"}'},
    "without a body": {"path": "/v1/models", "method": "GET", "body": b"", "kind": None},
    "with others for the case that it fails": {
        "body": b'{"models":["good-2","good-1"],"model":"good-1","fallbacks":["good-3"]}'
    },
    "without others": {"body": b'{"models":[],"model":"good-1","fallbacks":null}'},
    "a nested name": {"body": b'{"messages":[{"model":"bad"}],"model":"good-1","x":"\\"model\\":"}'},
}
DENIED: dict[str, tuple[int, dict[str, Any]]] = {
    "another": (403, {"body": b'{"model":"bad"}'}),
    "in upper case": (403, {"body": b'{"model":"GOOD-1"}'}),
    "none": (403, {"body": b'{"messages":[]}'}),
    "a member that Go takes for it": (403, {"body": b'{"Model":"bad"}'}),
    "no text": (403, {"body": b'{"model":["good-1"]}'}),
    "twice": (400, {"body": b'{"model":"bad","model":"good-1"}'}),
    "twice in two cases": (400, {"body": b'{"model":"good-1","MODEL":"bad"}'}),
    "twice in two spellings": (400, {"body": b'{"model":"good-1","\\u006dodel":"bad"}'}),
    "twice in much": (400, {"body": b'{"model":"bad","x":"%b","model":"good-1"}' % (b"x" * 40_000)}),
    "in models": (403, {"body": b'{"model":"good-1","models":["good-1","bad"]}'}),
    "in models alone": (403, {"body": b'{"models":["good-1"]}'}),
    "in fallbacks": (403, {"body": b'{"fallbacks":["bad"],"model":"good-1"}'}),
    "in fallbacks of a path": (403, {"path": "/v1/models/good-1:generateContent", "body": b'{"fallbacks":["bad"]}'}),
    "in fallbacks that are objects": (403, {"body": b'{"model":"good-1","fallbacks":[{"model":"good-1"}]}'}),
    "in models that are one text": (403, {"body": b'{"model":"good-1","models":"bad"}'}),
    "in models in upper case": (403, {"body": b'{"model":"good-1","MODELS":["bad"]}'}),
    "in models with a long s": (403, {"body": '{"model":"good-1","model\u017f":["bad"]}'.encode()}),
    "in models twice": (400, {"body": b'{"model":"good-1","models":["bad"],"models":["good-1"]}'}),
    "in models twice in two cases": (400, {"body": b'{"model":"good-1","models":["good-1"],"Models":["bad"]}'}),
    "in many models": (403, {"body": b'{"model":"good-1","models":[%b"bad"]}' % (b'"good-1",' * 200)}),
    "in models behind much": (
        403,
        {"body": b'{"model":"good-1","x":"%b","models":["bad"]}' % (b"x" * 40_000)},
    ),
    "two objects": (403, {"body": b'{"model":"good-1"}{"model":"bad"}'}),
    "behind a mark": (403, {"body": b'\xef\xbb\xbf{"model":"good-1"}'}),
    "another Unicode": (403, {"body": '{"model":"good-1"}'.encode("utf-16")}),
    "no JSON": (403, {"body": b"model=good-1", "kind": "application/x-www-form-urlencoded"}),
    "under another type": (403, {"body": b'{"model":"bad"}', "kind": "text/plain"}),
    "under no type": (403, {"body": b'{"model":"bad"}', "kind": None}),
    "too large": (403, {"body": b'{"model":"good-1","x":"%b"}' % (b"x" * 70_000)}),
    "too large, with a path": (
        403,
        {"path": "/v1/models/good-1:generateContent", "body": b'{"x":"%b"}' % (b"x" * 70_000)},
    ),
    "an unknown coding": (403, {"fields": ("Content-Encoding: br",), "body": b'{"model":"good-1"}'}),
    "a coding that is not said": (403, {"body": gzip.compress(b'{"model":"good-1"}')}),
    "in the path": (403, {"path": "/v1/models/bad:generateContent", "body": b'{"model":"good-1"}'}),
    "in the body of a path": (403, {"path": "/v1/deployments/good-1/chat/completions", "body": b'{"model":"bad"}'}),
    "in the path twice": (403, {"path": "/v1/models/good-1/models/bad:generateContent", "body": b"{}"}),
    "in a path that is encoded": (403, {"path": "/v1/models/b%61d:generateContent", "body": b"{}"}),
    "in a path without a body": (403, {"path": "/v1/models/bad", "method": "DELETE", "body": b"", "kind": None}),
    "in a path of another case": (
        403,
        {"path": "/v1/Deployments/bad/chat/completions", "body": b'{"model":"good-1"}'},
    ),
    "behind an encoded slash": (403, {"path": "/v1/models%2Fbad:generateContent", "body": b'{"model":"good-1"}'}),
    "before an encoded colon": (403, {"path": "/v1/models/bad%3agenerateContent", "body": b'{"model":"good-1"}'}),
    "behind two slashes": (403, {"path": "/v1/models//bad:generateContent", "body": b'{"model":"good-1"}'}),
    "behind a backslash": (403, {"path": "/v1/models%5Cbad:generateContent", "body": b'{"model":"good-1"}'}),
    "behind a parameter of a segment": (
        403,
        {"path": "/v1/models;x/bad:generateContent", "body": b'{"model":"good-1"}'},
    ),
    "in a long path": (403, {"path": f"/v1/models/{'b' * 200}:generateContent", "body": b'{"model":"good-1"}'}),
    "in a path of tuned models": (403, {"path": "/v1/tunedModels/bad:generateContent", "body": b'{"model":"good-1"}'}),
    "in a path of engines": (403, {"path": "/v1/engines/bad/completions", "body": b'{"model":"good-1"}'}),
    "in JSON that may be a form": (
        403,
        {
            "kind": "application/x-www-form-urlencoded",
            "body": b'{"model":"good-1","x":"&model=bad&"}',
        },
    ),
    "in another charset": (
        403,
        {
            "kind": 'application/json; charset="utf-7"',
            "body": b'{"model":"good-1","+AG0AbwBkAGUAbA-":"bad"}',
        },
    ),
    **{
        f"in a form, {name}": (
            403,
            {
                "kind": f"multipart/form-data; {kind}",
                "path": "/v1/audio/transcriptions",
                "body": body + b"\r\n\r\nbad\r\n" + FORM % b"good-1",
            },
        )
        for name, kind, body in (
            ("with an encoded name", "boundary=b", b"--b\r\nContent-Disposition: form-data; name*=utf-8''model"),
            ("as an attachment", "boundary=b", b'--b\r\nContent-Disposition: attachment; name="model"'),
            (
                "with two dispositions",
                "boundary=b",
                b'--b\r\nContent-Disposition: form-data; name="x"\r\nContent-Disposition: form-data; name="model"',
            ),
            ("in a folded line", "boundary=b", b'--b\r\nContent-Disposition:\r\n form-data; name="model"'),
            (
                "with parameters that end early",
                "boundary=b",
                b'--b\r\nContent-Disposition: form-data; x; name="model"',
            ),
            ("with two boundaries", "boundary=b; boundary=bb", b'--bb\r\nContent-Disposition: form-data; name="model"'),
            (
                "with a boundary in two parts",
                "boundary=b; boundary*0=bb",
                b'--bb\r\nContent-Disposition: form-data; name="model"',
            ),
            ("with another boundary", "boundary=b", b'--bb\r\nContent-Disposition: form-data; name="model"'),
        )
    },
    "in a form twice": (
        400,
        {
            "kind": "multipart/form-data; boundary=b",
            "body": FORM[:-7] % b"bad" + FORM % b"good-1",
            "path": "/v1/audio/transcriptions",
        },
    ),
    **{
        f"in {name} of a form": (
            403,
            {
                "kind": "multipart/form-data; boundary=b",
                "body": FORM[:-7].replace(b'"model"', b'"%b"' % name.encode()) % b"good-1" + FORM % b"good-1",
                "path": "/v1/audio/transcriptions",
            },
        )
        for name in ("models", "Fallbacks", "models[]")
    },
    "before a form": (
        403,
        {"kind": "multipart/form-data; boundary=b", "body": b'{"model":"bad"}\r\n' + FORM % b"good-1"},
    ),
}


@pytest.mark.parametrize("what", [*ALLOWED.values()], ids=[*ALLOWED])
async def test_a_model_that_is_allowed_may_be_used(
    start: StartProxy, upstream: ScriptedUpstream, what: dict[str, Any]
) -> None:
    proxy = await start(upstream.url, clients=(client(models=("good-*",)),))
    options = {**what}
    got = await reaches(proxy, upstream, request(bearer(), *options.pop("fields", ()), **options))
    assert got.body == what["body"]


@pytest.mark.parametrize(("status", "what"), [*DENIED.values()], ids=[*DENIED])
async def test_no_other_model_is_reached_in_any_way(
    start: StartProxy, upstream: ScriptedUpstream, status: int, what: dict[str, Any]
) -> None:
    proxy = await start(upstream.url, clients=(client(models=("good-*",)),), max_body=65536)
    options = {**what}
    answer = await refused(proxy, request(bearer(), *options.pop("fields", ()), **options))
    assert answer.status == status
    assert answer.json()["error"]["message" if "generateContent" not in what.get("path", "") else "code"]
    assert upstream.connections == 0


# Bodies that name a model which is not allowed, or may to some parser. A model in the path makes them no better.
BODIES = {
    name: what
    for name, (_, what) in DENIED.items()
    if "/models" not in what.get("path", "") and "deployments" not in what.get("path", "").lower()
    if "/engines" not in what.get("path", "") and "tunedModels" not in what.get("path", "")
    if name not in ("none", "in models alone")
} | {
    "another behind a mark": {"body": b'\xef\xbb\xbf{"model":"bad"}'},
    "fallbacks behind a mark": {"body": b'\xef\xbb\xbf{"fallbacks":["bad"]}'},
    "another in another Unicode": {"body": '{"model":"bad"}'.encode("utf-16")},
    "behind many members": {"body": b"{%b}" % b",".join([*(b'"m%d":0' % n for n in range(1030)), b'"model":"bad"'])},
    "in the second object": {"body": b'{}{"model":"bad"}'},
    "in an object that does not end": {"body": b'{"fallbacks":["bad"]'},
    "in others before many blanks": {"body": b'{"models"' + b" " * 4400 + b':["bad"]}'},
    "twice before many blanks": {"body": b'{"model":"good-1","model"' + b" " * 4400 + b':"bad"}'},
    "in others of a form behind a long field": {
        "kind": "multipart/form-data; boundary=b",
        "body": FORM[:-7] % b"good-1"
        + b"--b\r\nX: %b\r\n" % (b"x" * 4200)
        + b'Content-Disposition: form-data; name="models[]"\r\n\r\nbad\r\n--b--\r\n',
        "path": "/v1/audio/transcriptions",
    },
}


@pytest.mark.parametrize("what", [*BODIES.values()], ids=[*BODIES])
async def test_a_model_in_the_path_does_not_make_up_for_what_the_body_names(
    start: StartProxy, upstream: ScriptedUpstream, what: dict[str, Any]
) -> None:
    proxy = await start(upstream.url, clients=(client(models=("good-*",)),), max_body=65536)
    options = {**what}
    options["path"] = "/v1/deployments/good-1" + options.pop("path", "/v1/chat/completions").removeprefix("/v1")
    assert (await refused(proxy, request(bearer(), *options.pop("fields", ()), **options))).status in (400, 403)
    assert upstream.connections == 0


# Those that are read.
READ = {name: what for name, what in BODIES.items() if "fields" not in what and len(what["body"]) < 65536}


@pytest.mark.parametrize("what", [*READ.values()], ids=[*READ])
@pytest.mark.parametrize("size", [1, 999, 4096, 4405])
def test_a_body_is_no_better_in_parts(what: dict[str, Any], size: int) -> None:
    kind = what.get("kind", "application/json")
    fields = Fields([(b"Content-Type", kind.encode())] if kind is not None else [])
    audit = ModelAudit(reader_of(fields), fields)
    for piece in steps(what["body"], size):
        audit.feed(piece)
    named = [audit.model] if audit.model is not None else []
    assert audit.twice or audit.others is None or not all(name.startswith("good-") for name in named + audit.others)


async def test_wrong_keys_are_limited_and_a_right_one_always_passes(
    start: StartProxy, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await start(upstream.url, clients=(client(),))
    peer = await proxy.connect()
    for _ in range(10):
        peer.send(request(bearer(OTHER)))
        assert (await peer.message()).status == 401
    peer.send(request(bearer(OTHER)))
    answer = await peer.message()
    assert (answer.status, answer.json()["error"]["code"]) == (429, "too_many_wrong_keys")
    assert 1 <= int(answer.get("retry-after") or 0) <= 60
    assert answer.get("connection") == "close"
    await reaches(proxy, upstream, request(bearer()))
    assert (await refused(proxy, request())).status == 401
    await proxy.idle()
    assert proxy.sample("client_keys_rejected_total") == 11
    assert "10 wrong keys came from 127.0.0.1" in caplog.text
    assert KEY not in caplog.text
    assert OTHER not in caplog.text


def test_wrong_keys_are_counted_by_address_for_a_minute_in_bounded_memory() -> None:
    now = 0.0
    wrong = WrongKeys(lambda: now)
    network = [f"2001:db8::{number:x}" for number in range(1, 12)]
    assert [wrong.refusal(address, None).status for address in network] == [401] * 10 + [429]
    now = 59.0
    error = wrong.refusal("2001:db8::ffff", "sseproxy_public")
    assert (error.status, error.retry_after, error.cause) == (429, 1.0, "the key sseproxy_public")
    assert wrong.refusal("192.0.2.1", None).status == 401
    now = 60.0
    assert wrong.refusal("2001:db8::1", None).status == 401
    for number in range(3_000):
        wrong.refusal(f"198.51.{number // 256}.{number % 256}", None)
    assert len(wrong._of) == 1_000


PREFLIGHT = ("Origin: https://app.example", "Access-Control-Request-Method: POST")


async def test_a_cors_preflight_needs_no_key_and_is_sent_without_one(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url, api_key="sk-upstream", clients=(client(),))
    asked = request(*PREFLIGHT, method="OPTIONS", body=b"", kind=None)
    got = await reaches(proxy, upstream, asked)
    assert got.all("authorization") == []
    for wrong in (
        request(*PREFLIGHT, method="OPTIONS"),
        request(*PREFLIGHT, body=b""),
        request(PREFLIGHT[0], method="OPTIONS", body=b""),
        request(*PREFLIGHT, method="OPTIONS", path="/nowhere", body=b""),
    ):
        assert (await refused(proxy, wrong)).status == 401


async def test_a_cors_preflight_tells_nothing_of_the_models_and_takes_the_first_route(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    by_model = config.Route(
        name="api", match=config.Match(path="/v1", model=("secret-*",)), upstream=(config.Target(name="up"),)
    )
    proxy = await start(upstream.url, clients=(client(),), routes=(by_model,))
    asked = request(*PREFLIGHT, method="OPTIONS", body=b"", kind=None)
    assert (await reaches(proxy, upstream, asked)).start_line == "OPTIONS /v1/chat/completions HTTP/1.1"


async def test_without_clients_anybody_may_call_and_a_clients_own_key_goes_upstream(
    start: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start(upstream.url)
    got = await reaches(proxy, upstream, request(bearer(), path=f"/v1/x?key={KEY}"))
    assert got.get("authorization") == f"Bearer {KEY}"
    assert got.start_line == f"POST /v1/x?key={KEY} HTTP/1.1"


# --- the places of a credential, at random ---

NAMES = st.sampled_from(
    ["Authorization", "x-api-key", "X-Goog-Api-Key", "api-key", "API_KEY", "X-Other", "Proxy-Authorization"]
)
TOKENS = st.sampled_from([KEY, OTHER, "", "x"])
VALUES = st.builds(
    "{}{}{}".format, st.sampled_from(["", "Bearer ", "bearer  ", "Basic ", "key=", "\t"]), TOKENS, st.just("")
)
PARAMETERS = st.builds(
    "{}={}".format,
    st.sampled_from(["key", "KEY", "%6bey", "$key", "%24key", "access_token", "a", "keys", ""]),
    TOKENS.map(lambda token: token.replace("_", "%5f")) | TOKENS,
)


@given(
    st.lists(st.tuples(NAMES, VALUES), max_size=6),
    st.lists(PARAMETERS, max_size=5),
    st.sampled_from(["&", ";", "&&", ";&"]),
    st.sampled_from([None, (b"Authorization", b"Bearer up"), (b"x-api-key", b"up")]),
)
def test_wherever_a_key_is_it_is_found_by_one_rule_and_goes_nowhere(
    fields: list[tuple[str, str]], parameters: list[str], between: str, credential: tuple[bytes, bytes] | None
) -> None:
    head = Fields([(name.encode(), value.encode()) for name, value in fields])
    query = "?" + between.join(parameters) if parameters else ""
    keys = keys_in(head, query)
    assert b"" not in keys
    for key in (KEY.encode(), OTHER.encode()):
        names = strays(head, key)
        rest, left = head.without(names), without_key(query, key)
        out = headers.to_upstream(
            rest,
            version=(1, 1),
            host=b"h",
            framing=(),
            peer=b"192.0.2.1",
            trusted=False,
            scheme=b"http",
            request_id=b"i",
            credential=credential,
            inspect=False,
            credentials=False,
        )
        assert key not in b"\n".join(value for _, value in out)
        assert key.decode() not in left.replace("%5f", "_")
        assert [field for field in out if field[0].lower() == (credential or (b"authorization", b""))[0].lower()] == (
            [] if credential is None else [credential]
        )
    assert not keys_in(Fields([]), without_key(query))


@given(st.binary(max_size=100), st.integers(0, 60))
def test_a_public_part_has_nothing_of_a_secret(noise: bytes, at: int) -> None:
    key = new_key().encode()
    assert public_part(key) == key[:21].decode()
    assert re.fullmatch(r"sseproxy_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}", key.decode())
    changed = key[:at] + noise + key[at:]
    assert (public_part(changed) is None) == (changed != key)


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(["model", "Model", "\\u006dodel", "messages", "modelx", "models", "fallbacks", "model\u017f"]),
        st.sampled_from(['"a"', '"b"', "1", '{"model":"c"}', '["model"]', '"\\"model\\":"', '["c", "d"]', "null"]),
    ),
    max_size=4,
)


@given(MEMBERS, st.data())
def test_a_model_is_one_only_if_every_parser_reads_the_same(
    members: list[tuple[str, str]], data: st.DataObject
) -> None:
    body = "{" + ",".join(f'"{name}":{value}' for name, value in members) + "}"
    audit = ModelAudit(RequestReader(), Fields([]))
    for piece in data.draw(splits(body.encode())):
        audit.feed(piece)
    named = [(name, value) for name, value in members if name.replace("\\u006d", "m").lower() == "model"]
    others = [(name, value) for name, value in members if name.casefold() in ("models", "fallbacks")]
    number = len({name.casefold() for name, _ in others})
    assert audit.twice == (len(named) > 1 or len(others) > number)
    if len(named) == 1 and named[0][0] != "Model" and named[0][1] in ('"a"', '"b"'):
        assert audit.model == named[0][1].strip('"')
    if audit.twice:
        return
    lists = {"null": [], '["model"]': ["model"], '["c", "d"]': ["c", "d"]}
    readable = all(name.isascii() and value in lists for name, value in others)
    readable &= not named or audit.model is not None
    found = audit.others
    assert (found is not None) == readable
    if found is not None:
        assert sorted(found) == sorted(name for _, value in others for name in lists[value])


def test_a_form_names_its_model_once_in_whatever_way_its_fields_are_written() -> None:
    for disposition, number in (
        ('name="model"', 1),
        ('name="Model"; filename="f"', 1),
        ('name="model"; name="x"', 1),
        ('name="x"', 0),
    ):
        form = FormReader(b"b")
        form.feed(b"--b\r\nContent-Disposition: form-data; %b\r\n\r\nm\r\n--b--\r\n" % disposition.encode())
        assert form.models == number


# --- the configuration ---

FILE = """\
upstreams: [{name: up, url: "http://h"}]
routes: [{name: api, match: {path: /v1}, upstream: up}]
clients:
"""
ONE, TWO = (f"sha256:{character * 64}" for character in "ab")
A_FILE = "expected a file with the digests of keys, one in a line, as sseproxy key prints them"
HINT = "expected the digest of a key, as sseproxy key prints it: sha256: and 64 hexadecimal digits"
MISTAKES = {
    "no client": ("  []", "f:3:1: clients: expected at least one entry"),
    "no key": (
        "  - name: a",
        "f:4:5: clients[0]: expected keys or keys_file; sseproxy key prints an entry with a new key",
    ),
    "a key itself": (f"  - {{name: a, keys: ['{KEY}']}}", f"f:4:22: clients[0].keys[0]: {HINT}"),
    "one name twice": (
        f"  - {{name: a, keys: '{ONE}'}}\n  - {{name: a, keys: '{TWO}'}}",
        "f:5:6: clients[1].name: expected a unique name, got that of clients[0]",
    ),
    "one key twice": (
        f"  - {{name: a, keys: '{ONE}'}}\n  - {{name: b, keys: ['{TWO}', '{ONE}']}}",
        "f:5:15: clients[1].keys: expected keys of its own, got one of clients[0]",
    ),
    "a route that is none": (
        f"  - {{name: a, keys: '{ONE}', routes: [apj]}}",
        f"f:4:{20 + len(ONE) + 5}: clients[0].routes: expected the names of routes (api), got 'apj'",
    ),
    "a file that is none": (
        "  - {name: a, keys_file: /nowhere}",
        f"f:4:15: clients[0].keys_file: {A_FILE} (no such file or directory)",
    ),
}


@pytest.mark.parametrize(("text", "problem"), [*MISTAKES.values()], ids=[*MISTAKES])
def test_a_mistake_is_named_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(FILE + text, "f", {})
    assert list(caught.value.problems) == [problem]
    assert "sseproxy_" not in problem


async def test_a_key_is_printed_once_with_its_entry() -> None:
    status, out, _ = await run("key", "team-a")
    key, _, entry = out.partition("\n\n")
    assert status == 0
    assert public_part(key.encode()) is not None
    (made,) = config.parse(FILE.replace("clients:\n", "") + entry, "f", {}).clients or ()
    assert (made.name, made.digests) == ("team-a", (digest(key.encode()).hex(),))
    assert key not in entry
    assert (await run("key", "team-a"))[1] != out
    status, _, errors = await run("key", "team a")
    assert (status, errors.startswith("sseproxy: NAME: expected a name")) == (1, True)


# --- processes ---


async def send(peer: Peer, *fields: str) -> int:
    peer.send(request(*fields, path="/nowhere"))
    return (await peer.message()).status


async def test_keys_are_read_again_at_a_reload_and_are_nowhere_in_what_is_written(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# the old one\nsha256:{digest(KEY.encode()).hex()}\n")
    file = ConfigFile(tmp_path, upstream, clients=f"[{{name: team-a, keys_file: '{keys}'}}]", access_log="{path: all}")
    answers = b""
    async with file.serve() as served:
        statuses = [await send(await served.connect(), bearer(key)) for key in (KEY, OTHER)]
        keys.write_text(f"sha256:{digest(OTHER.encode()).hex()}  # the new one\n")
        served.process.send_signal(signal.SIGHUP)
        await served.until("config_reloads_total.*success.*", 1)
        statuses += [await send(await served.connect(), bearer(key)) for key in (KEY, OTHER)]
        assert statuses == [404, 401, 401, 404]
        for fields, path in (
            ((bearer(), f"X-Request-Id: {KEY}"), "/v1/x"),
            ((f"api-key: {OTHER}", f"X-Request-Id: {OTHER}"), f"/v1/{OTHER}"),
            ((bearer(OTHER), bearer()), f"/v1/x?key={KEY}&token={OTHER}"),
            # Those that are refused before the key is looked for, and those that have it only where it is no key.
            ((bearer(OTHER), f"X-Request-Id: {OTHER}", "Expect: nothing"), f"/v1/{OTHER}/x"),
            ((f"X-Request-Id: {KEY}",), f"/v1/{KEY}/x"),
            ((), f"/v1/x%3Fkey={OTHER}"),
        ):
            peer = await served.connect()
            peer.send(request(*fields, path=path))
            answer = await peer.message()
            answers += text_of(answer).encode() + answer.body
        peer = await served.connect()
        peer.send(request(bearer(OTHER), body=b'{"model":"%b"}' % OTHER.encode()))
        api = await upstream.accept()
        await api.message()
        api.send(ANSWER)
        assert (await peer.message()).status == 200
        await served.until("client_keys_rejected_total", 4)
        _, _, metrics = await served.get("/metrics")
        served.process.terminate()
        await served.ended()
    written = served.stderr + served.logged.decode() + metrics + answers.decode()
    assert '"client_name":"team-a"' in written
    assert f"the key {public_part(KEY.encode())}" in written
    for key in (KEY, OTHER):
        assert key not in written
        assert digest(key.encode()).hex() not in written


async def test_every_worker_knows_every_key(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    entry = f"sha256:{digest(KEY.encode()).hex()}"
    file = ConfigFile(tmp_path, upstream, workers="2", clients=f"[{{name: team-a, keys: '{entry}'}}]")
    async with serve("-c", str(file.path)) as served:
        statuses = [await send(await served.connect(), bearer(key)) for key in (KEY, OTHER) for _ in range(6)]
        assert statuses == [404] * 6 + [401] * 6
