"""Where a body ends: any split gives the same payload, and what is not exactly HTTP/1.1 is refused."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sseproxy.errors import BrokenBodyError, ProtocolError
from sseproxy.wire.framing import (
    LAST_CHUNK,
    MAX_SIZE_LINE,
    MAX_TRAILERS,
    ChunkedDecoder,
    CloseDecoder,
    Framing,
    LengthDecoder,
    decoder,
    frame,
    framing_fields,
    payload_of,
    response_framing,
    whole_chunks,
)
from sseproxy.wire.headers import Fields

from .splits import cut, splits, steps

EXTENSIONS = st.sampled_from([b"", b";a", b";a=1", b' ; name="a b"', b"\t;", b";\xff\t" + b"x" * 200])
TRAILERS = st.sampled_from([b"X-Trailer: 1\r\n", b"a:\r\n", b"Server-Timing:\tdb;dur=53\r\n", b"x: \xff\r\n"])


@st.composite
def chunked_bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A payload, and one of the ways to write it as a chunked body."""
    payloads = draw(st.lists(st.binary(min_size=1, max_size=40) | st.just(b"\r\n0\r\n\r\n"), max_size=5))
    wire = b""
    for payload in [*payloads, b""]:
        digits = "".join(draw(st.sampled_from([digit, digit.upper()])) for digit in f"{len(payload):x}")
        zeros = "0" * draw(st.integers(0, 16 - len(digits)))
        wire += (zeros + digits).encode() + draw(EXTENSIONS) + b"\r\n" + payload + (b"\r\n" if payload else b"")
    return b"".join(payloads), wire + b"".join(draw(st.lists(TRAILERS, max_size=3))) + b"\r\n"


def decode(pieces: list[bytes]) -> tuple[ChunkedDecoder, bytes, bool]:
    """The decoder, the payload it gave, and whether it refused the rest."""
    chunked = ChunkedDecoder()
    payload = b""
    try:
        for piece in pieces:
            payload += chunked.feed(piece)
    except BrokenBodyError as error:
        return chunked, payload + error.payload, True
    return chunked, payload, False


@settings(max_examples=300, deadline=None)
@given(st.data(), chunked_bodies(), st.binary(max_size=5))
def test_any_split_of_a_chunked_body_gives_back_its_payload(
    data: st.DataObject, body: tuple[bytes, bytes], tail: bytes
) -> None:
    payload, wire = body
    chunked, decoded, refused = decode(data.draw(splits(wire + tail)))
    assert not refused
    assert decoded == payload
    assert chunked.done
    assert chunked.end()
    assert chunked.excess == len(tail)


@settings(max_examples=100, deadline=None)
@given(st.data(), chunked_bodies())
def test_no_part_of_a_chunked_body_is_taken_for_all_of_it(data: st.DataObject, body: tuple[bytes, bytes]) -> None:
    payload, wire = body
    cut_off = wire[: data.draw(st.integers(0, len(wire) - 1))]
    chunked, decoded, refused = decode(data.draw(splits(cut_off)))
    assert not refused
    assert payload.startswith(decoded)
    assert not chunked.done
    assert not chunked.end()


def test_the_decoder_is_at_the_start_only_between_chunks() -> None:
    wire = b"3\r\nabc\r\n2;x\r\nde\r\n" + LAST_CHUNK
    chunked = ChunkedDecoder()
    starts = {0: chunked.at_start}
    for offset, byte in enumerate(steps(wire), 1):
        chunked.feed(byte)
        starts[offset] = chunked.at_start
    assert [offset for offset, at_start in starts.items() if at_start] == [0, 8, 17]


@pytest.mark.parametrize("payload", [b"a", b"data: x\n\n", b"\r\n", b"x" * 10, b"x" * 0x10000])
def test_framed_payloads_are_whole_chunks(payload: bytes) -> None:
    data = frame(payload)
    assert whole_chunks(data) == [data]
    assert payload_of(data) == payload
    upper = b"000%X\r\n%b\r\n" % (len(payload), payload)
    assert whole_chunks(data + upper + data) == [data, upper, data]
    assert payload_of(upper) == payload
    for other in (data[:-1], data + b"\r", data[:-2] + b"\n\n", b" " + data, data + data[:-1], data + LAST_CHUNK):
        assert not whole_chunks(other)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"0\r\n\r\n", b"5\r\n", b"1;x\r\na\r\n", b"+1\r\na\r\n", b"0x1\r\na\r\n", b"1 \r\na\r\n", b"1\na\r\n",
        b"1\r\na\n\n", b"0" * 16 + b"1\r\na\r\n", b"-1\r\na\r\n", b"1_0\r\naaaaaaaaaaaaaaaa\r\n", b"\r\na\r\n",
    ],
)  # fmt: skip
def test_what_is_not_exactly_a_chunk_is_no_whole_chunk(data: bytes) -> None:
    assert not whole_chunks(data)
    assert not whole_chunks(frame(b"a") + data) or not data


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Chunks, some of their bytes replaced, removed or added."""
    wire = bytearray(b"".join(map(frame, draw(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=3)))))
    wire += draw(st.sampled_from([b"", LAST_CHUNK]))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(wire)))
        wire[at : at + draw(st.integers(0, 2))] = draw(st.sampled_from([b"", b"\r", b"\n", b"0", b";", b" ", b"f"]))
    return bytes(wire)


@settings(max_examples=300, deadline=None)
@given(damaged() | st.binary(max_size=12))
@example(b"1\r\na\r\n")
def test_whole_chunks_are_what_the_decoder_takes_them_for(data: bytes) -> None:
    chunks = whole_chunks(data)
    if chunks:
        assert b"".join(chunks) == data
        chunked, payload, refused = decode([data])
        assert not refused
        assert payload == b"".join(map(payload_of, chunks))
        assert all(map(payload_of, chunks))
        assert chunked.at_start


@settings(max_examples=400, deadline=None)
@given(st.data(), damaged() | st.binary(max_size=30))
def test_any_split_of_any_bytes_gets_the_same_verdict(data: st.DataObject, wire: bytes) -> None:
    whole, payload, refused = decode([wire])
    pieces, split_payload, split_refused = decode(data.draw(splits(wire)))
    assert (split_payload, split_refused) == (payload, refused)
    if not refused:
        assert (pieces.done, pieces.excess, pieces.at_start) == (whole.done, whole.excess, whole.at_start)


@pytest.mark.parametrize(
    ("wire", "valid"),
    [
        pytest.param(b"g\r\nabc\r\n", b"", id="bad hex"),
        pytest.param(b"+5\r\nabcde\r\n", b"", id="plus sign"),
        pytest.param(b"-1\r\na\r\n", b"", id="minus sign"),
        pytest.param(b"0x5\r\nabcde\r\n", b"", id="0x"),
        pytest.param(b"1_0\r\nabcdefghijklmnop\r\n", b"", id="underscore"),
        pytest.param(b"5 \r\nabcde\r\n", b"", id="trailing space"),
        pytest.param(b" 5\r\nabcde\r\n", b"", id="leading space"),
        pytest.param(b"\r\n", b"", id="empty size"),
        pytest.param(b";x\r\nabc\r\n", b"", id="extension without size"),
        pytest.param(b"5;\x00\r\nabcde\r\n", b"", id="NUL in an extension"),
        pytest.param(b"5;a\rb\r\nabcde\r\n", b"", id="bare CR in an extension"),
        pytest.param(b"5\nabcde\r\n", b"", id="bare LF after the size"),
        pytest.param(b"5;a\nabcde\r\n", b"", id="bare LF after an extension"),
        pytest.param(b"5\r\nabcde\n", b"abcde", id="bare LF after the data"),
        pytest.param(b"5\r\nabcdef\r\n", b"abcde", id="data longer than its size"),
        pytest.param(b"5\r\nabcde0\r\n\r\n", b"abcde", id="no CRLF after the data"),
        pytest.param(b"5\r\nabcde\r\r\n", b"abcde", id="CR CR LF after the data"),
        pytest.param(b"5\r\nabcde\rX", b"abcde", id="CR and no LF after the data"),
        pytest.param(b"2\r\nab\r\nzz\r\n", b"ab", id="bad hex in the second chunk"),
        pytest.param(b"0" * 16 + b"5\r\nabcde\r\n", b"", id="17 hexadecimal digits"),
        pytest.param(b"5;" + b"x" * (MAX_SIZE_LINE - 3) + b"\r\nabcde\r\n", b"", id="oversize size line"),
        pytest.param(b"f" * (MAX_SIZE_LINE + 1), b"", id="oversize size line without an end"),
        pytest.param(b"0\r\nx: " + b"y" * MAX_TRAILERS + b"\r\n\r\n", b"", id="oversize trailer"),
        pytest.param(b"0\r\n" + b"x: y\r\n" * (MAX_TRAILERS // 4 + 1) + b"\r\n", b"", id="oversize trailer section"),
        pytest.param(b"1\r\na\r\n0\r\nno colon\r\n\r\n", b"a", id="trailer without colon"),
        pytest.param(b"0\r\n: y\r\n\r\n", b"", id="trailer without name"),
        pytest.param(b"0\r\na b: y\r\n\r\n", b"", id="space in a trailer's name"),
        pytest.param(b"0\r\na : y\r\n\r\n", b"", id="space before a trailer's colon"),
        pytest.param(b"0\r\na: y\r\n folded\r\n\r\n", b"", id="folded trailer"),
        pytest.param(b"0\r\na: \x00\r\n\r\n", b"", id="NUL in a trailer"),
        pytest.param(b"0\r\na: y\n\r\n", b"", id="bare LF after a trailer"),
        pytest.param(b"0\r\n\n", b"", id="bare LF at the end"),
    ],
)
def test_broken_framing_is_refused_at_every_split(wire: bytes, valid: bytes) -> None:
    offsets = range(len(wire) + 1) if len(wire) < 400 else range(0, len(wire), 997)
    for pieces in ([wire], steps(wire), *(cut(wire, [offset]) for offset in offsets)):
        chunked, payload, refused = decode(pieces)
        assert refused
        assert payload == valid
        assert not chunked.done


def test_lines_just_within_their_limits_pass() -> None:
    size_line = b"5;" + b"x" * (MAX_SIZE_LINE - 4) + b"\r\nabcde\r\n"
    trailers = b"0\r\nx:" + b"y" * (MAX_TRAILERS - 4) + b"\r\n\r\n"
    for pieces in ([size_line + trailers], steps(size_line + trailers)):
        chunked, payload, refused = decode(pieces)
        assert (payload, refused, chunked.done) == (b"abcde", False, True)


CL, TE = b"Content-Length", b"Transfer-Encoding"


@pytest.mark.parametrize(
    ("method", "status", "version", "fields", "framing"),
    [
        ("GET", 200, (1, 1), [(TE, b"chunked")], "chunked"),
        ("GET", 200, (1, 1), [(b"transfer-encoding", b" Chunked\t")], "chunked"),
        ("GET", 200, (1, 1), [(CL, b"5")], 5),
        ("GET", 200, (1, 1), [(CL, b"0")], 0),
        ("GET", 200, (1, 0), [(CL, b"5")], 5),
        ("GET", 200, (1, 1), [(CL, b"5"), (b"content-length", b"5")], 5),
        ("GET", 200, (1, 1), [(CL, b"5,5")], 5),
        ("GET", 200, (1, 1), [(CL, b"5 , 5")], 5),
        ("GET", 200, (1, 1), [], "close"),
        ("GET", 200, (1, 0), [], "close"),
        ("HEAD", 200, (1, 1), [(CL, b"5")], None),
        ("HEAD", 200, (1, 1), [(TE, b"chunked")], None),
        ("HEAD", 200, (1, 1), [], None),
        ("GET", 204, (1, 1), [], None),
        ("GET", 304, (1, 1), [(CL, b"5")], None),
    ],
)
def test_a_clear_head_says_where_the_body_ends(
    method: str, status: int, version: tuple[int, int], fields: list[tuple[bytes, bytes]], framing: Framing | None
) -> None:
    assert response_framing(method, status, version, Fields(fields)) == framing


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("version", "fields"),
    [
        ((1, 1), [(CL, b"5"), (TE, b"chunked")]),
        ((1, 1), [(TE, b"chunked"), (CL, b"0")]),
        ((1, 1), [(CL, b"5"), (CL, b"6")]),
        ((1, 1), [(CL, b"5,6")]),
        ((1, 1), [(CL, b"5"), (CL, b"05")]),
        *(((1, 1), [(CL, value)]) for value in (b"", b"+5", b"-5", b"5,", b"0x5", b"5 5", b"5.0", b"9" * 19, b"\xb2")),
        *(((1, 1), [(TE, value)]) for value in (b"gzip", b"gzip, chunked", b"chunked, gzip", b"identity", b"xchunked")),
        ((1, 1), [(TE, b"chunked, chunked")]),
        ((1, 1), [(TE, b"chunked"), (TE, b"chunked")]),
        ((1, 1), [(TE, b"")]),
        ((1, 1), [(TE, b""), (CL, b"5")]),
        ((1, 0), [(TE, b"chunked")]),
    ],
)  # fmt: skip
def test_an_ambiguous_head_is_refused(method: str, version: tuple[int, int], fields: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(ProtocolError):
        response_framing(method, 200, version, Fields(fields))


@pytest.mark.parametrize("framing", ["chunked", "close", 0, 5])
def test_what_announces_a_framing_is_read_back_as_it(framing: Framing) -> None:
    assert response_framing("GET", 200, (1, 1), Fields(framing_fields(framing))) == framing


def test_no_body_is_announced_by_nothing() -> None:
    assert framing_fields(None) == []


@pytest.mark.parametrize("body", [b"", b"a", b"abcdef"])
@pytest.mark.parametrize("tail", [b"", b"X", b"HTTP/1.1 200 OK\r\n"])
def test_a_body_by_length_is_so_long_at_every_split(body: bytes, tail: bytes) -> None:
    for offset in range(len(body + tail) + 1):
        by_length = LengthDecoder(len(body))
        assert by_length.done == (not body)
        assert b"".join(map(by_length.feed, cut(body + tail, [offset]))) == body
        assert (by_length.done, by_length.excess, by_length.end()) == (True, len(tail), True)


def test_a_body_shorter_than_its_length_is_incomplete() -> None:
    by_length = LengthDecoder(5)
    assert by_length.feed(b"abcd") == b"abcd"
    assert (by_length.done, by_length.excess, by_length.end()) == (False, 0, False)


def test_a_body_that_ends_with_its_connection_is_complete_only_then() -> None:
    by_close = CloseDecoder()
    assert by_close.feed(b"abc") + by_close.feed(b"5\r\n") == b"abc5\r\n"
    assert (by_close.done, by_close.excess) == (False, 0)
    assert by_close.end()
    assert (by_close.done, by_close.excess) == (True, 0)


@pytest.mark.parametrize(
    ("framing", "kind"), [("chunked", ChunkedDecoder), ("close", CloseDecoder), (3, LengthDecoder)]
)
def test_each_framing_has_its_decoder(framing: Framing, kind: type) -> None:
    assert type(decoder(framing)) is kind
