"""Fields on their way through, in both directions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.errors import ProtocolError
from sseproxy.wire import headers
from sseproxy.wire.headers import Field, Fields, check_head, serialize

HOP_BY_HOP: list[Field] = [
    (b"Connection", b"keep-alive, X-Named"),
    (b"connection", b"x-other\t,, "),
    (b"Keep-Alive", b"timeout=5"),
    (b"Proxy-Connection", b"keep-alive"),
    (b"Proxy-Authenticate", b"Basic"),
    (b"Proxy-Authorization", b"Basic Zm9v"),
    (b"TE", b"gzip"),
    (b"Trailer", b"X-T"),
    (b"Transfer-Encoding", b"chunked"),
    (b"UPGRADE", b"h2c"),
    (b"X-Named", b"1"),
    (b"x-NAMED", b"2"),
    (b"X-Other", b"3"),
]
END_TO_END: list[Field] = [
    (b"X-Two", b"1"),
    (b"Content-Type", b"text/plain"),
    (b"x-two", b"2"),
    (b"X-Odd", b" caf\xc3\xa9 \xff\t"),
    (b"X-Empty", b""),
    (b"X-Two", b"1"),
    (b"Via", b"1.1 elsewhere"),
    (b"X-Names", b"not named"),
]


def named(fields: Sequence[Field], name: bytes) -> list[bytes]:
    return list(Fields(fields).named(name))


def upstream(
    *fields: Field,
    framing: Sequence[Field] = (),
    credential: tuple[bytes, bytes] | None = None,
    inspect: bool = False,
    scheme: bytes = b"http",
    trusted: bool = False,
) -> list[Field]:
    return headers.to_upstream(
        Fields(fields),
        version=(1, 1),
        host=b"api.example:8000",
        framing=framing,
        peer=b"192.0.2.7",
        trusted=trusted,
        scheme=scheme,
        request_id=b"id-1",
        credentials=credential is None,
        credential=credential,
        inspect=inspect,
    )


def downstream(
    *fields: Field, framing: Sequence[Field] | None = (), event_stream: bool = False, connection: bytes | None = None
) -> list[Field]:
    return headers.to_downstream(
        Fields(fields),
        version=(1, 1),
        framing=framing,
        event_stream=event_stream,
        request_id=b"id-1",
        connection=connection,
        date=None,
    )


OURS_UPSTREAM = [
    (b"X-Forwarded-For", b"192.0.2.7"),
    (b"X-Forwarded-Proto", b"http"),
    (b"X-Request-Id", b"id-1"),
    (b"Via", b"1.1 sseproxy"),
]
OURS_DOWNSTREAM = [(b"X-Request-Id", b"id-1"), (b"Via", b"1.1 sseproxy")]


def interleaved() -> list[Field]:
    longest = max(len(HOP_BY_HOP), len(END_TO_END))
    return [field for index in range(longest) for part in (HOP_BY_HOP, END_TO_END) for field in part[index : index + 1]]


def test_hop_by_hop_fields_end_here_and_the_rest_goes_upstream_in_order() -> None:
    assert upstream(*interleaved()) == [(b"Host", b"api.example:8000"), *END_TO_END, *OURS_UPSTREAM]


def test_hop_by_hop_fields_end_here_and_the_rest_goes_downstream_in_order() -> None:
    assert downstream(*interleaved()) == [*END_TO_END, *OURS_DOWNSTREAM]


NAMES = st.sampled_from([b"X-A", b"x-a", b"X-B", b"Accept", b"Set-Cookie", b"ETag"])


@given(st.lists(st.tuples(NAMES, st.binary(max_size=8))))
def test_what_is_end_to_end_keeps_its_bytes_order_and_repetition(fields: list[Field]) -> None:
    assert upstream(*fields) == [(b"Host", b"api.example:8000"), *fields, *OURS_UPSTREAM]
    assert downstream(*fields) == [*fields, *OURS_DOWNSTREAM]


@pytest.mark.parametrize("te", [b"trailers", b"gzip;q=0.5, Trailers", b"trailers , deflate", b"", b"gzip"])
def test_nobody_asks_for_the_trailers_that_are_dropped(te: bytes) -> None:
    assert upstream((b"TE", te), (b"Connection", b"TE, X-A"), (b"X-A", b"1")) == upstream()


CREDENTIALS: list[Field] = [
    (b"Authorization", b"Bearer client"),
    (b"authorization", b"Basic client"),
    (b"API-Key", b"client"),
    (b"X-Api-Key", b"client"),
    (b"x-goog-api-key", b"client"),
    (b"X-Own-Key", b"client"),
]


def test_without_a_key_the_clients_credentials_go_upstream() -> None:
    assert upstream(*CREDENTIALS)[1:7] == CREDENTIALS


@pytest.mark.parametrize("name", [b"Authorization", b"x-api-key", b"x-own-key"])
def test_a_key_replaces_every_credential_of_the_client(name: bytes) -> None:
    out = upstream(*CREDENTIALS, (b"Cookie", b"a=b"), credential=(name, b"upstream"))
    found = [(key, value) for key, value in out if key.lower() in {known.lower() for known, _ in CREDENTIALS}]
    assert found == [(name, b"upstream")] if name == b"x-own-key" else [(b"X-Own-Key", b"client"), (name, b"upstream")]
    assert named(out, b"cookie") == [b"a=b"]


@pytest.mark.parametrize(
    ("cookies", "left"),
    [
        (b"sseproxy_admin=1.ab", []),
        (b"a=b; sseproxy_admin=1.ab; c=d", [b"a=b; c=d"]),
        (b"sseproxy_admin=1.ab;c=d", [b"c=d"]),
        (b"a=b;sseproxy_admin=", [b"a=b"]),
        (b"sseproxy_admin=1; a=b; sseproxy_admin=2", [b"a=b"]),
        (b"a=sseproxy_admin=1; not_sseproxy_admin=2", [b"a=sseproxy_admin=1; not_sseproxy_admin=2"]),
        (b"", [b""]),
    ],
)
def test_nobody_gets_the_session_of_the_admin_listener(cookies: bytes, left: list[bytes]) -> None:
    """RFC 6265, section 8.5: cookies are the same for all ports of a host."""
    assert named(upstream((b"Cookie", cookies)), b"cookie") == left


@pytest.mark.parametrize("name", [b"X_Api_Key", b"x_goog-api_key", b"API_KEY", b"X_Own_Key", b"X-Own_Key"])
def test_a_key_replaces_a_credential_in_any_spelling(name: bytes) -> None:
    assert named(upstream((name, b"client")), name.lower()) == [b"client"]
    out = upstream((name, b"client"), credential=(b"x-own-key", b"upstream"))
    assert b"client" not in [value for _, value in out]


def test_a_key_may_be_sent_in_a_field_with_an_underscore() -> None:
    fields = [
        (b"X-Own-Key", b"client"),
        (b"x_own_key", b"client"),
        (b"Connection", b"x_named"),
        (b"X_Named", b"client"),
    ]
    out = upstream(*fields, credential=(b"x_own_key", b"upstream"))
    assert [value for name, value in out if b"own" in name.lower()] == [b"upstream"]
    assert b"client" not in [value for _, value in out]


PROXY_ONLY = b"""
    Forwarded X-Forwarded X-Forwarded-For X-Forwarded-Host X-Forwarded-Proto X-Forwarded-Port X-Forwarded-Prefix
    X-Forwarded-Ssl X-Forwarded-Server X-Forwarded-Uri X-Forwarded-Method X-Forwarded-User X-Forwarded-Email
    X-Forwarded-Groups X-Forwarded-Access-Token X-Forwarded-Client-Cert X-Forwarded-Tls-Client-Cert X-Real-IP
    X-Client-IP Client-IP X-Cluster-Client-IP True-Client-IP CF-Connecting-IP CF-Connecting-IPv6 CF-Pseudo-IPv4
    Fastly-Client-IP Fly-Client-IP X-Azure-ClientIP X-Azure-SocketIP X-AppEngine-User-IP X-Envoy-External-Address
    X-Envoy-Internal X-Original-URL X-Original-Forwarded-For X-Original-Host X-Rewrite-URL Script-Name Path-Info
    X-Scheme X-Url-Scheme Front-End-Https X-Remote-User X-Remote-Group Remote-User Remote-Groups X-Auth-Request-User
    X-Auth-Request-Email X-Client-Cert Client-Cert Client-Cert-Chain SSL-Client-Cert SSL-Client-Verify
    X-SSL-Client-Subject-DN X-Amzn-Mtls-Clientcert X-Amzn-Oidc-Identity X-Goog-Authenticated-User-Email
    Cf-Access-Authenticated-User-Email Tailscale-User-Login
""".split()
PASSED = b"""
    Accept Accept-Language User-Agent Origin Referer HTTP-Referer X-Title Cookie Content-Type Idempotency-Key Prefer
    OpenAI-Organization OpenAI-Project OpenAI-Beta Anthropic-Version Anthropic-Beta X-Goog-Api-Client
    X-Goog-User-Project X-Stainless-OS X-Stainless-Retry-Count X-Ms-Client-Request-Id Traceparent Tracestate Baggage
    X-B3-TraceId X-Client-Id X-User X-User-Id X-Session-Id X-Tenant Helicone-Auth CF-Ray X-Requested-With X_Under
    X-Forward Forward X-Real Remote
    X-Http-Method-Override Max-Forwards Client
""".split()


@pytest.mark.parametrize("name", PROXY_ONLY)
def test_what_only_a_proxy_says_is_said_by_nobody_who_is_not_trusted(name: bytes) -> None:
    for spelling in (name, name.lower(), name.upper(), name.replace(b"-", b"_"), name.replace(b"-", b"_", 1)):
        assert upstream((spelling, b"claimed")) == upstream()


@pytest.mark.parametrize("name", PROXY_ONLY)
def test_it_passes_from_whom_is_trusted_but_not_in_a_spelling_that_it_may_have_overlooked(name: bytes) -> None:
    assert any(b"said" in value for _, value in upstream((name, b"said"), trusted=True))
    if b"-" in name:
        assert upstream((name.replace(b"-", b"_"), b"said"), trusted=True) == upstream()


@pytest.mark.parametrize("name", PASSED)
def test_what_any_client_says_passes(name: bytes) -> None:
    assert (name, b"said") in upstream((name, b"said"))


@given(st.sampled_from(PROXY_ONLY), st.data())
def test_no_spelling_of_it_passes(name: bytes, data: st.DataObject) -> None:
    letters = [data.draw(st.sampled_from([c.lower(), c.upper()] if c != "-" else "-_")) for c in name.decode()]
    assert upstream(("".join(letters).encode(), b"claimed")) == upstream()


def test_what_a_client_claims_about_its_way_here_is_replaced_by_what_was_seen() -> None:
    out = upstream(
        (b"Forwarded", b"for=6.6.6.6"),
        (b"X-Forwarded-For", b"6.6.6.6"),
        (b"x-forwarded-for", b"6.6.6.7"),
        (b"X-Forwarded-Host", b"evil.example"),
        (b"X-Forwarded-Proto", b"https"),
        (b"X-Request-Id", b"claimed"),
        (b"HOST", b"proxy.example:80"),
        (b"Via", b"1.0 before"),
    )
    assert named(out, b"forwarded") == []
    assert named(out, b"x-forwarded-for") == [b"192.0.2.7"]
    assert named(out, b"x-forwarded-host") == [b"proxy.example:80"]
    assert named(out, b"x-forwarded-proto") == [b"http"]
    assert named(out, b"x-request-id") == [b"id-1"]
    assert named(out, b"host") == [b"api.example:8000"]
    assert named(out, b"via") == [b"1.0 before", b"1.1 sseproxy"]


def test_the_scheme_of_the_client_is_told() -> None:
    assert named(upstream(scheme=b"https"), b"x-forwarded-proto") == [b"https"]


def test_connection_cannot_take_away_what_is_ours() -> None:
    names = b"Host, X-Forwarded-For, X-Request-Id, Via, Content-Length"
    out = upstream((b"Connection", names), framing=[(b"Content-Length", b"5")])
    assert out == [(b"Host", b"api.example:8000"), (b"Content-Length", b"5"), *OURS_UPSTREAM]
    out = downstream((b"Connection", names), (b"X-Request-Id", b"theirs"))
    assert out == OURS_DOWNSTREAM


def test_the_framing_of_a_request_is_ours_and_told_once() -> None:
    fields = [(b"Content-Length", b"7"), (b"content-length", b"7"), (b"Expect", b"100-continue")]
    out = upstream(*fields, framing=[(b"Content-Length", b"5")])
    assert named(out, b"content-length") == [b"5"]
    assert named(out, b"expect") == []
    assert named(upstream(*fields), b"content-length") == []


def test_only_where_the_response_is_read_its_coding_is_refused() -> None:
    field = (b"Accept-Encoding", b"gzip, br")
    assert named(upstream(field, field, inspect=True), b"accept-encoding") == [b"identity"]
    assert named(upstream(field, field), b"accept-encoding") == [b"gzip, br", b"gzip, br"]
    assert named(upstream(), b"accept-encoding") == []


def test_the_policy_of_a_stream_replaces_that_of_the_upstream() -> None:
    fields = [(b"cache-control", b"public"), (b"Cache-Control", b"max-age=1"), (b"x-accel-buffering", b"yes")]
    out = downstream(*fields, (b"ETag", b"e"), event_stream=True)
    assert named(out, b"cache-control") == [b"no-cache, no-transform"]
    assert named(out, b"x-accel-buffering") == [b"no"]
    assert named(out, b"etag") == [b"e"]
    assert downstream(*fields)[:3] == fields


def test_the_framing_of_a_response_is_ours_unless_there_is_no_body() -> None:
    length = (b"Content-Length", b"7")
    assert named(downstream(length, framing=[(b"Transfer-Encoding", b"chunked")]), b"content-length") == []
    assert named(downstream(length, framing=[(b"Content-Length", b"5")]), b"content-length") == [b"5"]
    assert named(downstream(length, framing=()), b"content-length") == []
    assert named(downstream(length, framing=None), b"content-length") == [b"7"]


def test_the_upstreams_own_request_id_goes_before_ours() -> None:
    assert named(downstream((b"x-request-id", b"req_1")), b"x-request-id") == [b"req_1"]
    assert named(downstream(), b"x-request-id") == [b"id-1"]


@pytest.mark.parametrize("connection", [None, b"close", b"keep-alive"])
def test_the_connection_to_the_client_is_ours_to_speak_of(connection: bytes | None) -> None:
    out = downstream((b"Connection", b"close"), (b"Keep-Alive", b"timeout=5"), connection=connection)
    assert named(out, b"connection") == ([] if connection is None else [connection])
    assert named(out, b"keep-alive") == []


def test_a_head_is_serialized_as_its_fields_are() -> None:
    assert serialize(b"HTTP/1.1 200 OK", []) == b"HTTP/1.1 200 OK\r\n\r\n"
    assert serialize(b"GET / HTTP/1.1", [(b"A", b""), (b"a", b"\xff")]) == b"GET / HTTP/1.1\r\nA: \r\na: \xff\r\n\r\n"


def test_lists_are_read_over_all_their_fields() -> None:
    fields = [(b"A", b"x, Y"), (b"B", b"n"), (b"a", b",\t z\t,"), (b"a", b"")]
    assert named(fields, b"a") == [b"x, Y", b",\t z\t,", b""]
    assert Fields(fields).tokens(b"a") == [b"x", b"y", b"z"]


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\nA: b\tc\r\n\r\n", b"HTTP/1.1 200 \r\nA:\r\nB: \x80\xff\r\n\r\n", b"HTTP/1.1 204\r\n\r\n"],
)
def test_a_plain_head_passes(head: bytes) -> None:
    check_head(head)


@pytest.mark.parametrize(
    "broken",
    [
        *(b"A: b\nC: d", b"A: b\rC: d", b"A: b\r\r\nC: d", b"A: b\r", b"\n\nA: b", b"A: b\n\r\nC: d"),
        *(b"Content-Length : 5", b"Content-Length\t: 5", b"A b: c", b": b", b" : b", b"A", b"A b", b"A: b\r\n\r\nC: d"),
        *(b"\xe9: b", b"A: b\r\nC", b"A: b\r\n: c"),
        *(b"A: b\r\n c", b"A: b\r\n\tc", b" A: b", b"A: b\r\n \r\nC: d"),
        *(b"A: b%bc" % bytes([control]) for control in (0, 1, 8, 11, 12, 14, 27, 31, 127)),
    ],
)
def test_a_head_that_may_be_read_in_two_ways_is_refused(broken: bytes) -> None:
    with pytest.raises(ProtocolError):
        check_head(b"HTTP/1.1 200 OK\r\n" + broken + b"\r\n\r\n")


LINES = st.one_of(
    st.sampled_from([b"A: b", b"Content-Length: 5", b"A:", b"a:b:c", b"X-Odd: \xff\t", b"", b"A : b", b"A", b" A: b"]),
    st.text("aZ0-_: \t\r\n\0\x7f\xe9", max_size=6).map(lambda text: text.encode("latin-1")),
)


def read_slowly(head: bytes) -> bool:
    """Whether `head` is a status line and fields, each as RFC 9112 wants it."""
    status, *lines = head.split(b"\r\n")
    if lines[-2:] != [b"", b""] or not status:
        return False
    plain = all(c == 9 or (c >= 32 and c != 127) for line in (status, *lines) for c in line)
    names = [line.partition(b":")[0] for line in lines[:-2]]
    return plain and all(
        b":" in line and name and all(33 <= c < 127 for c in name) for line, name in zip(lines[:-2], names, strict=True)
    )


@given(st.lists(LINES, max_size=5), st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.1 200 ", b""]))
def test_a_head_is_refused_as_one_that_is_read_slowly(lines: list[bytes], status: bytes) -> None:
    head = b"\r\n".join([status, *lines, b"", b""])
    try:
        check_head(head)
    except ProtocolError:
        assert not read_slowly(head)
    else:
        assert read_slowly(head)


@pytest.mark.parametrize(
    ("value", "kind", "is_json"),
    [
        (b"text/event-stream", "events", False),
        (b"Text/Event-Stream ; charset=utf-8", "events", False),
        (b"text/event-stream2", "open", False),
        (b"text/plain", "open", False),
        (b"application/octet-stream", "open", False),
        (b"application/json", "json", True),
        (b" application/JSON;charset=utf-8", "json", True),
        (b"application/problem+json", "json", False),
        (b"text/json", "json", False),
        (b"application/json-seq", "other", False),
        (b"audio/mpeg", "other", False),
        (b"application/vnd.amazon.eventstream", "other", False),
        (b"application/x; a=text/event-stream", "other", False),
        (b"", "open", False),
    ],
)
def test_the_content_type_tells_streams_and_json(value: bytes, kind: str, is_json: bool) -> None:
    fields = [(b"Content-TYPE", value)]
    assert headers.body_kind(Fields(fields)) == kind
    assert headers.is_json(Fields(fields)) == is_json
    assert headers.body_kind(Fields([(b"Accept", value)])) == "open"
    assert not headers.is_json(Fields([]))


@pytest.mark.parametrize(
    ("values", "encoded"),
    [
        ([], False),
        ([b""], False),
        ([b"identity"], False),
        ([b"none"], False),
        ([b"None, identity"], False),
        ([b"gzip"], True),
        ([b"none", b"br"], True),
        ([b"unknown"], True),
    ],
)
def test_only_a_content_coding_hides_a_body(values: list[bytes], encoded: bool) -> None:
    assert headers.is_encoded(Fields([(b"Content-Encoding", value) for value in values])) == encoded


@pytest.mark.parametrize(
    ("value", "accepts"),
    [(b"text/event-stream", True), (b"application/json, Text/Event-Stream;q=0.9", True), (b"*/*", False), (b"", False)],
)
def test_who_accepts_events_says_so(value: bytes, accepts: bool) -> None:
    assert headers.accepts_events(Fields([(b"Accept", value)])) == accepts


@pytest.mark.parametrize(
    ("values", "encoded"),
    [
        ([], False),
        ([b""], False),
        ([b"Identity"], False),
        ([b"gzip"], True),
        ([b"identity, br"], True),
        ([b"", b"x"], True),
    ],
)
def test_any_coding_but_identity_is_one(values: list[bytes], encoded: bool) -> None:
    assert headers.is_encoded(Fields([(b"Content-Encoding", value) for value in values])) == encoded


@pytest.mark.parametrize("value", [b"a", b"req_0-1.Z:9", b"x" * 128])
def test_a_harmless_request_id_is_taken_over(value: bytes) -> None:
    assert headers.request_id(Fields([(b"X-REQUEST-ID", value)])) == value


@pytest.mark.parametrize(
    "values",
    [[], [b""], [b"x" * 129], [b"a b"], [b"a\n"], [b"a\r\nb: c"], [b"caf\xc3\xa9"], [b'a"'], [b"a", b"a"], [b"a,b"]],
)
def test_any_other_request_id_is_not(values: list[bytes]) -> None:
    assert headers.request_id(Fields([(b"X-Request-Id", value) for value in values])) is None


SAID: list[Field] = [
    (b"X-Forwarded-For", b"203.0.113.9"),
    (b"x-forwarded-for", b"198.51.100.1"),
    (b"X-Forwarded-Proto", b"https"),
    (b"X-Forwarded-Host", b"public.example"),
    (b"Forwarded", b"for=203.0.113.9"),
]


def test_what_a_trusted_proxy_says_is_added_to() -> None:
    fields = upstream((b"Host", b"h"), *SAID, trusted=True)
    assert named(fields, b"x-forwarded-for") == [b"203.0.113.9, 198.51.100.1, 192.0.2.7"]
    assert named(fields, b"x-forwarded-proto") == [b"https"]
    assert named(fields, b"x-forwarded-host") == [b"public.example"]
    assert named(fields, b"forwarded") == [b"for=203.0.113.9, for=192.0.2.7;host=h;proto=http"]


def test_what_a_trusted_proxy_does_not_say_is_ours() -> None:
    fields = upstream((b"Host", b"h"), trusted=True)
    assert fields == upstream((b"Host", b"h"))


def test_what_anybody_else_says_is_replaced() -> None:
    fields = upstream((b"Host", b"h"), *SAID)
    assert fields == upstream((b"Host", b"h"))


@pytest.mark.parametrize(
    ("peer", "host", "element"),
    [
        (b"192.0.2.7", [b"h"], b"for=192.0.2.7;host=h;proto=http"),
        (b"192.0.2.7:80", [b"h:80"], b'for="192.0.2.7:80";host="h:80";proto=http'),
        (b"2001:db8::1", [b"[::1]:80"], b'for="[2001:db8::1]";host="[::1]:80";proto=http'),
        (b"[2001:db8::1]:80", [], b'for="[2001:db8::1]:80";proto=http'),
        (b"unknown", [b"h;a=b"], b'for=unknown;host="h;a=b";proto=http'),
    ],
)
def test_the_element_that_is_added_to_forwarded(peer: bytes, host: list[bytes], element: bytes) -> None:
    assert headers.forwarded_element(peer, host, b"http") == element


def elements(forwarded: str) -> list[dict[str, str]]:
    """`Forwarded` as RFC 7239, section 4, has it, read a second time."""
    found: list[dict[str, str]] = [{}]
    rest = forwarded
    while rest:
        name, value, end = re.fullmatch(
            r"""([a-z]+)=("(?:[^"\\]|\\.)*"|[\w!#$%&'*+.^`|~-]+)(.*)""", rest, re.S
        ).groups()  # type: ignore[union-attr]
        assert name not in found[-1]
        found[-1][name] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value[0] == '"' else value
        if end.startswith(", "):
            found.append({})
        else:
            assert not end or end.startswith(";")
        rest = end.lstrip(", ;")
    return found


PORTS = st.none() | st.integers(0, 65535)


@given(
    st.tuples(st.ip_addresses(v=4).map(str), PORTS)
    | st.tuples(st.ip_addresses(v=6).map(lambda address: f"[{address}]"), PORTS)
    | st.tuples(st.just("unknown"), PORTS),
    st.none() | st.from_regex(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?", fullmatch=True),
    st.sampled_from([b"http", b"https"]),
    st.booleans(),
)
def test_whatever_is_added_to_forwarded_reads_as_it_was_meant(
    peer: tuple[str, int | None], host: bytes | None, scheme: bytes, bare: bool
) -> None:
    node = peer[0] if peer[1] is None else f"{peer[0]}:{peer[1]}"
    given_as = node[1:-1] if bare and node.endswith("]") else node
    element = headers.forwarded_element(given_as.encode(), [] if host is None else [host], scheme)
    *before, ours = elements(f'for=203.0.113.9;by="[::1]", {element.decode()}')
    assert before == [{"for": "203.0.113.9", "by": "[::1]"}]
    assert ours == {"for": node, "proto": scheme.decode()} | ({} if host is None else {"host": host.decode()})


def test_every_forwarded_of_a_trusted_proxy_comes_before_ours() -> None:
    said = [(b"Forwarded", b"for=1.1.1.1"), (b"forwarded", b"for=2.2.2.2, for=3.3.3.3")]
    assert named(upstream(*said, trusted=True), b"forwarded") == [
        b"for=1.1.1.1, for=2.2.2.2, for=3.3.3.3, for=192.0.2.7;proto=http"
    ]


@pytest.mark.parametrize(
    ("peer", "hops", "expected"),
    [
        ("fe80::1%eth0", b"", "fe80::1"),
        ("fe80::1%eth0", b"203.0.113.9", "203.0.113.9"),
        ("::1", b"fe80::2%evil", "fe80::2"),
        ("::1", b"[fe80::2%evil]:80", "fe80::2"),
        ("::1", b"fe80::2%", "::1"),
        ("::1", b"10.0.0.1%evil", "::1"),
        ("::ffff:192.0.2.1", b"", "192.0.2.1"),
        ("::1", b"::ffff:192.0.2.1", "192.0.2.1"),
        ("::1", b"2001:DB8:0::1", "2001:db8::1"),
        ("::1", b"1" * 200, "::1"),
        ("", b"203.0.113.9", ""),
    ],
)
def test_the_clients_address_is_a_plain_one(peer: str, hops: bytes, expected: str) -> None:
    fields = Fields([(b"X-Forwarded-For", hops)] if hops else [])
    networks = [ip_network("::1"), ip_network("fe80::1")]
    assert headers.client_address(fields, peer, lambda address: headers.is_within(address, networks)) == expected


HOPS = st.sampled_from([b"10.0.0.1", b"10.0.0.2 ", b"\t10.1.1.1:80", b"203.0.113.9", b"2001:db8::1", b"", b"unknown"])


@given(st.lists(st.lists(HOPS, min_size=1, max_size=60), max_size=3))
def test_no_more_than_the_nearest_hops_are_asked_about(lines: list[list[bytes]]) -> None:
    asked: list[str] = []

    def trusts(address: str) -> bool:
        asked.append(address)
        return address.startswith("10.")

    fields = [(b"X-Forwarded-For", b",".join(hops)) for hops in lines]
    found = headers.client_address(Fields(fields), "10.0.0.9", trusts)

    expected = "10.0.0.9"
    for hop in [hop for hops in lines for hop in hops][: -32 - 1 : -1]:
        address = hop.decode().strip().removesuffix(":80")
        if not expected.startswith("10.") or address in ("", "unknown"):
            break
        expected = address
    assert found == expected
    assert len(asked) <= 33


def test_thousands_of_trusted_hops_are_not_looked_at() -> None:
    asked: list[str] = []
    fields = Fields([(b"X-Forwarded-For", b", ".join([b"203.0.113.9", *[b"10.0.0.1"] * 3400]))])
    assert headers.client_address(fields, "10.0.0.2", lambda address: not asked.append(address)) == "10.0.0.1"  # type: ignore[func-returns-value]
    assert len(asked) == 33


@given(st.text(max_size=20) | st.from_regex(r"[0-9a-f:.]{1,20}%?[a-z0-9]*", fullmatch=True))
def test_whatever_is_no_address_is_within_nothing(text: str) -> None:
    try:
        ip_address(text)
    except ValueError:
        assert not headers.is_within(text, [ip_network("0.0.0.0/0"), ip_network("::/0")])
        assert headers.plain_address(text) == headers.client_block(text) == text
    else:
        assert headers.is_within(text, [ip_network("0.0.0.0/0"), ip_network("::/0")])
        assert "%" not in headers.plain_address(text) + headers.client_block(text)


@pytest.mark.parametrize(
    ("address", "block"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("fe80::1", "fe80::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("", ""),
    ],
)
def test_whom_an_address_is_counted_as(address: str, block: str) -> None:
    assert headers.client_block(address) == block


@given(st.ip_addresses(v=6, network="2000::/3"), st.ip_addresses(v=6, network="2000::/3"))
def test_a_client_is_its_network_of_64_bits(one: IPv6Address, other: IPv6Address) -> None:
    same = int(one) >> 64 == int(other) >> 64
    assert (headers.client_block(str(one)) == headers.client_block(str(other))) == same
    sibling = IPv6Address(int(one) >> 64 << 64 | int(other) & (1 << 64) - 1)
    assert headers.client_block(str(sibling)) == headers.client_block(str(one))


@given(st.ip_addresses(v=4))
def test_a_client_of_ipv4_is_its_address(address: IPv4Address) -> None:
    assert headers.client_block(str(address)) == headers.client_block(f"::ffff:{address}") == str(address)
