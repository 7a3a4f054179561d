"""Which route a request takes, and where it goes from there."""

from __future__ import annotations

import re
from itertools import pairwise, product
from time import perf_counter
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sseproxy.config import Match, Route, Target
from sseproxy.errors import RequestError
from sseproxy.relay.routes import (
    Router,
    check_method,
    choose,
    normal_path,
    unreachable,
    upstream_path,
)
from sseproxy.wire.credentials import without_key
from sseproxy.wire.target import split_target


def route(path: str, *model: str, name: str = "", methods: tuple[str, ...] = ()) -> Route:
    match = Match(path=path, model=model, methods=methods)
    return Route(name=name or "r", match=match, upstream=(Target(name="up"),))


def taken(routes: list[Route], path: str, method: str = "POST", model: str | None = None) -> str | None:
    """The name of the route that is taken, the same in whatever order the routes are given."""
    found: set[str | None] = set()
    for order in (routes, routes[::-1]):
        router = Router(order)
        chosen = choose(router.candidates(method, path), model)
        found.add(None if chosen is None else chosen.name)
        assert router.no_route(method, path, model).reason == "no_route"
    (name,) = found
    return name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "all"),
        ("/v2", "all"),
        ("/v10", "all"),
        ("/v10/chat", "all"),
        ("/v", "all"),
        ("/V1/models", "all"),
        ("/%61/models", "all"),
        ("//v1", "all"),
        ("/v1;a/models", "all"),
        ("/v1", "v1"),
        ("/v1/", "v1"),
        ("/v1/models", "v1"),
        ("/v1//chat", "v1"),
        ("/%761", "v1"),
        ("/%76%31/models", "v1"),
        ("/v1%2Fchat", "all"),
        ("/v1/%2Fchat", "v1"),
        ("/v1/%43hat", "v1"),
        ("/v1/c%2568at", "v1"),
        ("/v1/c%68at", "chat"),
        ("/v1/%63%68%61%74", "chat"),
        ("/v1/c%68at/completions", "chat"),
        ("/v1/c%68atter", "v1"),
        ("/v1/chatter", "v1"),
        ("/v1/chat%2Fcompletions", "v1"),
        ("/v1/chat", "chat"),
        ("/v1/chat/", "chat"),
        ("/v1/chat/completions", "chat"),
    ],
)
def test_the_longest_prefix_wins_on_segment_boundaries(path: str, name: str) -> None:
    routes = [route("/v1", name="v1"), route("/", name="all"), route("/v1/chat", name="chat")]
    assert taken(routes, path) == name


def test_a_path_that_nothing_matches_has_no_route() -> None:
    assert taken([route("/v1"), route("/v2/x", name="other")], "/v2") is None
    assert taken([], "/") is None


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("GET", "/v1/files", "read"),
        ("HEAD", "/v1/files", "read"),
        ("POST", "/v1/files", "v1"),
        ("get", "/v1/files", "v1"),
        ("DELETE", "/v1/batches", "v1"),
        ("POST", "/x", None),
        ("PUT", "/x", "put"),
    ],
)
def test_a_route_may_be_for_some_methods_only(method: str, path: str, name: str | None) -> None:
    routes = [
        route("/v1", name="v1"),
        route("/v1/files", name="read", methods=("GET", "HEAD")),
        route("/", name="put", methods=("PUT",)),
    ]
    assert taken(routes, path, method) == name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o", "gpt"),
        ("gpt-", "gpt"),
        ("gpt", "rest"),
        ("GPT-4o", "rest"),
        ("my-gpt-4o", "rest"),
        ("o1", "gpt"),
        ("o1-mini", "rest"),
        ("org/llama-3", "llama"),
        ("org/team/llama-3", "llama"),
        ("", "rest"),
        (None, "rest"),
    ],
)
def test_globs_tell_models_apart_before_the_route_for_any(model: str | None, name: str) -> None:
    routes = [
        route("/v1", name="rest"),
        route("/v1", "gpt-*", "o1", name="gpt"),
        route("/v1", "*/llama-?", name="llama"),
    ]
    assert taken(routes, "/v1/chat/completions", model=model) == name


def test_a_model_that_no_long_prefix_takes_falls_to_a_shorter_one() -> None:
    routes = [route("/v1/chat", "gpt-*", name="chat"), route("/v1", "*", name="models"), route("/", name="all")]
    assert taken(routes, "/v1/chat/completions", model="gpt-4o") == "chat"
    assert taken(routes, "/v1/chat/completions", model="llama") == "models"
    assert taken(routes, "/v1/chat/completions", model=None) == "all"
    assert taken(routes[:1], "/v1/chat/completions", model="llama") is None


@pytest.mark.parametrize(
    ("method", "path", "model", "said"),
    [
        (
            "POST",
            "/chat/completions",
            None,
            "No route for POST /chat/completions; there are routes for /v1, /v1/files.",
        ),
        ("GET", "/v1/x", None, "No route for a request without a model; there are routes for gpt-*, llama-*."),
        ("POST", "/v1/x", "mistral", "No route for model 'mistral'; there are routes for gpt-*, llama-*."),
        (
            "POST",
            "/v1/x",
            "a\n" + "b" * 500,
            f"No route for model 'a?{'b' * 98}'; there are routes for gpt-*, llama-*.",
        ),
        ("PUT", "/v1/files/x", None, "No route for PUT /v1/files/x; there are routes for GET, POST."),
        (
            "POST",
            "/\x1b[1m" + "x" * 500,
            None,
            f"No route for POST /?[1m{'x' * 95}; there are routes for /v1, /v1/files.",
        ),
    ],
)
def test_who_finds_no_route_is_told_what_there_is(method: str, path: str, model: str | None, said: str) -> None:
    files = route("/v1/files", methods=("GET", "POST"))
    router = Router([route("/v1", "gpt-*"), route("/v1", "llama-*", "gpt-*"), files])
    assert router.no_route(method, path, model).message == said
    many = Router([route(f"/{number}") for number in range(20)]).no_route("GET", "/", None).message
    assert many.endswith(" and 12 more.")


@pytest.mark.parametrize(
    ("prefix", "base", "path", "expected"),
    [
        ("/", "", "/", "/"),
        ("/", "", "/v1/models", "/v1/models"),
        ("/", "", "//v1//models/", "//v1//models/"),
        ("/", "/api", "/", "/api/"),
        ("/", "/api", "/v1/models", "/api/v1/models"),
        ("/v1", "", "/v1", "/"),
        ("/v1", "", "/v1/", "/"),
        ("/v1", "", "/v1/models", "/models"),
        ("/v1", "/v1", "/v1", "/v1"),
        ("/v1", "/v1", "/v1/", "/v1/"),
        ("/v1", "/v1", "/v1/v1/models", "/v1/v1/models"),
        ("/v1", "/openai/v1", "/v1/models/org%2Fname", "/openai/v1/models/org%2Fname"),
        ("/v1", "/a", "/v1//models", "/a//models"),
        ("/team/v1", "/v1", "/team/v1/chat/completions", "/v1/chat/completions"),
        ("/v1", "/base%2Fx", "/v1/%C3%A9", "/base%2Fx/%C3%A9"),
        ("/v1", "/v2", "/%76%31", "/v2"),
        ("/v1", "/v2", "/%761/c%68at%2f", "/v2/c%68at%2f"),
        ("/v1", "", "/v%31/%61", "/%61"),
        ("/v1", "", "/v1/100%/%6", "/100%/%6"),
        ("/a%2fb", "/c", "/a%2Fb/%2f", "/c/%2f"),
        ("/%61%c3%a9", "/c", "/a%C3%A9/x", "/c/x"),
        ("/%61", "/c", "/a/x", "/c/x"),
        ("/", "/c", "/%61/x", "/c/%61/x"),
    ],
)
def test_the_prefix_of_the_route_becomes_that_of_the_upstream(prefix: str, base: str, path: str, expected: str) -> None:
    assert upstream_path(route(prefix), base, path) == expected


SEGMENTS = st.text("aZ09-._~:@!", min_size=1, max_size=6).filter(lambda text: text.strip(".") != "")


def respelled(data: st.DataObject, text: str) -> str:
    """`text`, some of its characters encoded that need not be, and some hexadecimal digits in the other case."""
    out = ""
    for piece in re.findall(r"%[0-9A-Fa-f]{2}|.", text):
        if len(piece) == 3:
            out += data.draw(st.sampled_from([piece.lower(), piece.upper()]))
        elif re.fullmatch(r"[A-Za-z0-9._~-]", piece) and data.draw(st.booleans()):
            out += data.draw(st.sampled_from(["%{:02x}", "%{:02X}"])).format(ord(piece))
        else:
            out += piece
    return out


@given(
    st.lists(SEGMENTS | st.sampled_from(["a%2fb", "%C3%a9", "100%25"]), max_size=3),
    st.text("ab/%2f:;Z.", max_size=12).map(lambda rest: f"/{rest}") | st.just(""),
    st.data(),
)
def test_a_prefix_in_any_spelling_is_the_routes_and_the_rest_stays_as_it_came(
    segments: list[str], rest: str, data: st.DataObject
) -> None:
    prefix = "/" + "/".join(segments)
    admin, everything = route(respelled(data, prefix), name="admin"), route("/", name="all")
    path = respelled(data, prefix) + rest
    if prefix == "/":
        path = rest or "/"
    (found,) = Router([everything, admin]).candidates("GET", path)
    assert found in (admin, everything)
    assert normal_path(prefix) == "/" or found is admin
    assert upstream_path(admin, "/base", path) == "/base" + (path if prefix == "/" else rest)


TRIPLETS = st.integers(0x20, 0x7E).flatmap(lambda code: st.sampled_from([f"%{code:02x}", f"%{code:02X}"]))


@given(st.lists(st.sampled_from("aZ09/-._~:é") | TRIPLETS, max_size=12).map("".join))
def test_a_normal_path_reads_the_same_and_has_nothing_left_to_decode(path: str) -> None:
    normal = normal_path(path)
    assert unquote(normal) == unquote(path)
    for triplet in re.findall("%..", normal):
        assert triplet == triplet.upper()
        assert not re.fullmatch("[A-Za-z0-9._~-]", unquote(triplet))


def test_only_routes_before_the_first_that_takes_any_model_need_the_model() -> None:
    chat, any_chat = route("/v1/chat", "gpt-*", name="chat"), route("/v1/chat", name="any")
    models, posts = route("/v1", "*", name="models"), route("/v1", "b", name="posts", methods=("POST",))
    files = route("/v1/files", name="files")
    router = Router([chat, any_chat, models, posts, files])

    def names(method: str, path: str) -> list[str]:
        return [one.name for one in router.candidates(method, path)]

    assert names("GET", "/v1/files") == names("GET", "/v1/f%69les/x") == ["files"]
    assert names("GET", "/v1/chat") == ["chat", "any"]
    assert names("GET", "/v1/models") == ["models"]
    assert names("POST", "/v1/models") == ["models", "posts"]
    assert names("GET", "/") == []


@pytest.mark.parametrize("method", ["TRACE", "trace", "TRACK", "CONNECT", "connect"])
def test_a_method_that_echoes_or_tunnels_is_refused(method: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_method(method)
    assert (refused.value.reason, refused.value.status) == ("method", 501)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "TRACER"])
def test_any_other_method_is_not(method: str) -> None:
    check_method(method)


@pytest.mark.parametrize(
    ("query", "without"),
    [
        ("", ""),
        ("?", "?"),
        ("?a=b&monkey=1&keys=2&b=key", "?a=b&monkey=1&keys=2&b=key"),
        ("?key=x", ""),
        ("?key", ""),
        ("?key=", ""),
        ("?key=x&a=1", "?a=1"),
        ("?a=1&key=x", "?a=1"),
        ("?a=1&key=x&b=2", "?a=1&b=2"),
        ("?key=x&key=y", ""),
        ("?key=x&a&key=y&b&key", "?a&b"),
        ("?%6bey=x&a=%6bey", "?a=%6bey"),
        ("?a&%6B%65%79=x", "?a"),
        ("?%256bey=x", "?%256bey=x"),
        ("?KEY=x&Key=y&a", "?a"),
        ("?$key=x&%24key=y", ""),
        ("?access_token=x&a", "?a"),
        ("?a;key=x", "?a"),
        ("?a;key=x;b", "?a;b"),
        ("?a;key=x&b", "?a&b"),
        ("?a&key=x;b", "?a&b"),
        ("?key=a=b?c/d&alt=sse", "?alt=sse"),
        ("?&&a==%zz&&key=x&&", "?&&a==%zz&&&"),
    ],
)
def test_a_key_in_the_query_is_taken_out(query: str, without: str) -> None:
    assert without_key(query) == without


NAMES = st.sampled_from(
    ["key", "%6bey", "k%45y", "KEY", "$key", "access_token", "a", "keys", "%", "", "ke y", "é", "%FF"]
)
PARAMETERS = st.tuples(NAMES, st.text("ak=%6be?/+", max_size=5).map(lambda text: f"={text}") | st.just("")).map("".join)


@given(PARAMETERS, st.lists(st.tuples(st.sampled_from("&;"), PARAMETERS), max_size=6))
def test_no_key_is_left_in_a_query_and_nothing_else_is_lost(first: str, more: list[tuple[str, str]]) -> None:
    query = "?" + first + "".join(separator + parameter for separator, parameter in more)

    def is_key(parameter: str) -> bool:
        return unquote(parameter.split("=")[0]).lower() in ("key", "$key", "access_token")

    parameters = [first, *(parameter for _, parameter in more)]
    kept = [index for index, parameter in enumerate(parameters) if not is_key(parameter)]
    without = without_key(query)
    # Two that a & kept apart are still apart for a server that splits at & only.
    between = ["".join(separator for separator, _ in more[one:other]) for one, other in pairwise(kept)]
    separators = ["?", *("&" if "&" in found else ";" for found in between)] if kept else []
    assert without == "".join(separator + parameters[index] for separator, index in zip(separators, kept, strict=True))
    assert not any(is_key(parameter) for parameter in without[1:].split("&"))


MODELS = ["".join(text) for length in range(4) for text in product("ab4x", repeat=length)]
GLOBS = st.lists(st.sampled_from(["a", "b", "4", "*", "?", "[ab]", "[!a]", "[b-a]"]), min_size=1, max_size=3)
MATCHES = st.builds(
    route,
    st.sampled_from(["/", "/v1", "/v1", "/%761", "/v1/chat", "/v1/c%68at", "/v1/%2e%2e/x", "/a%00"]),
    name=st.uuids().map(str),
    methods=st.lists(st.sampled_from(["GET", "POST", "PUT", "TRACE", "get", "FOO"]), max_size=2).map(tuple),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(MATCHES, st.lists(GLOBS.map("".join), max_size=2)), min_size=1, max_size=6))
def test_a_route_is_called_unreachable_exactly_where_no_request_takes_it(
    drawn: list[tuple[Route, list[str]]],
) -> None:
    routes = [replace(one, match=replace(one.match, model=tuple(globs))) for one, globs in drawn]
    router = Router(routes)
    taken = set()
    paths = {one.match.path for one in routes} | {"/v1/chat/completions", "/x"}
    for path, method in product(paths, ["GET", "POST", "PUT", "TRACE", "DELETE"]):
        try:
            split_target(path)
            check_method(method)
        except RequestError:
            continue
        candidates = router.candidates(method, path)
        for model in [None, *MODELS]:
            chosen = choose(candidates, model)
            if chosen is not None:
                taken.add(chosen.name)
    called = {one.name for one, _ in unreachable(routes)}
    assert called == {one.name for one in routes} - taken


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        ([route("/v1", "gpt-*", name="a"), route("/v1", "gpt-4*", name="b")], {"b": "a takes its requests"}),
        ([route("/v1", "gpt-4*", name="a"), route("/v1", "gpt-*", name="b")], {}),
        ([route("/v1", name="a"), route("/v1", "gpt-*", name="b")], {}),
        ([route("/v1", name="a"), route("/v1/chat", name="b")], {}),
        ([route("/v1/chat", name="a"), route("/v1", name="b")], {}),
        ([route("/v1", name="a"), route("/%76%31", name="b")], {"b": "a takes its requests"}),
        ([route("/v1", "*", name="a"), route("/v1", name="b", methods=("GET",))], {}),
        ([route("/v1", name="a", methods=("GET",)), route("/v1", name="b", methods=("POST", "GET"))], {}),
        (
            [
                *(route("/v1", name=method, methods=(method,)) for method in ("GET", "POST")),
                *(route("/v1", name="c", methods=("GET", "POST")), route("/v1", "m", name="d", methods=("GET",))),
            ],
            {"c": "GET, POST take its requests"},
        ),
        ([route("/v1", "a*", name="a"), route("/v1", "b*", name="b"), route("/v1", "[ab]*", name="c")], {"c": "a, b"}),
        ([route("/v1", "[z-a]", name="a")], {"a": "no model matches [z-a]"}),
        ([route("/v1", name="a", methods=("TRACE", "FOO"))], {"a": "TRACE, FOO requests are refused"}),
        ([route("/v1/%2e%2e", name="a")], {"a": "paths with dot segments"}),
    ],
)
def test_why_no_request_can_take_a_route_is_told(routes: list[Route], said: dict[str, str]) -> None:
    found = {one.name: why for one, why in unreachable(routes)}
    assert found.keys() == said.keys()
    for name, why in said.items():
        assert why in found[name]


def test_hundreds_of_routes_are_looked_through_in_little_time() -> None:
    began = perf_counter()
    routes = [route("/v1", f"model-{number}*", name=f"r{number}") for number in range(300)]
    found = {one.name for one, _ in unreachable(routes)}
    assert found == {f"r{number}" for number in range(10, 300)}
    assert perf_counter() - began < 15
