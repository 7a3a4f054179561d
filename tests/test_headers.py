"""Fields on their way through, in both directions."""

from __future__ import annotations

from collections.abc import Sequence

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
    read: bool = False,
    scheme: bytes = b"http",
    trusted: bool = False,
) -> list[Field]:
    return headers.to_upstream(
        Fields(fields),
        host=b"api.example:8000",
        framing=framing,
        peer=b"192.0.2.7",
        trusted=trusted,
        scheme=scheme,
        request_id=b"id-1",
        credential=credential,
        read=read,
    )


def downstream(
    *fields: Field, framing: Sequence[Field] | None = (), event_stream: bool = False, connection: bytes | None = None
) -> list[Field]:
    return headers.to_downstream(
        Fields(fields), framing=framing, event_stream=event_stream, request_id=b"id-1", connection=connection
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


@pytest.mark.parametrize("te", [b"trailers", b"gzip;q=0.5, Trailers", b"trailers , deflate"])
def test_a_client_that_takes_trailers_is_announced_as_one(te: bytes) -> None:
    out = upstream((b"TE", te), (b"Connection", b"TE, X-A"), (b"X-A", b"1"))
    assert named(out, b"te") == [b"trailers"]
    assert named(out, b"connection") == [b"TE"]
    assert named(out, b"x-a") == []


@pytest.mark.parametrize("te", [b"", b"gzip", b"xtrailers"])
def test_a_client_that_takes_no_trailers_is_not(te: bytes) -> None:
    assert upstream((b"TE", te), (b"Connection", b"TE")) == upstream()


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
    assert named(upstream(field, field, read=True), b"accept-encoding") == [b"identity"]
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
        *(b"A: b\r\n c", b"A: b\r\n\tc", b" A: b", b"A: b\r\n \r\nC: d"),
        *(b"A: b%bc" % bytes([control]) for control in (0, 1, 8, 11, 12, 14, 27, 31, 127)),
    ],
)
def test_a_head_that_may_be_read_in_two_ways_is_refused(broken: bytes) -> None:
    with pytest.raises(ProtocolError):
        check_head(b"HTTP/1.1 200 OK\r\n" + broken + b"\r\n\r\n")


@pytest.mark.parametrize(
    ("value", "event_stream", "is_json"),
    [
        (b"text/event-stream", True, False),
        (b"Text/Event-Stream ; charset=utf-8", True, False),
        (b"text/event-stream2", False, False),
        (b"application/json", False, True),
        (b" application/JSON;charset=utf-8", False, True),
        (b"application/json-seq", False, False),
        (b"application/x; a=text/event-stream", False, False),
        (b"", False, False),
    ],
)
def test_the_content_type_tells_streams_and_json(value: bytes, event_stream: bool, is_json: bool) -> None:
    fields = [(b"Content-TYPE", value)]
    assert headers.is_event_stream(Fields(fields)) == event_stream
    assert headers.is_json(Fields(fields)) == is_json
    assert not headers.is_event_stream(Fields([(b"Accept", value)]))
    assert not headers.is_json(Fields([]))


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
    assert named(fields, b"forwarded") == [b"for=203.0.113.9"]


def test_what_a_trusted_proxy_does_not_say_is_ours() -> None:
    fields = upstream((b"Host", b"h"), trusted=True)
    assert fields == upstream((b"Host", b"h"))


def test_what_anybody_else_says_is_replaced() -> None:
    fields = upstream((b"Host", b"h"), *SAID)
    assert fields == upstream((b"Host", b"h"))
