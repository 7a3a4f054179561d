"""Compressed bodies, read in steps."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.wire.coding import READABLE, Inflater, coding_of

from .splits import splits, steps
from .test_extract import calls, held

MIB = 1 << 20
STEP = 32 * 1024


def raw(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


def members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(b"") + gzip.compress(data[half:])


WAYS: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "gzip": (b"gzip", gzip.compress),
    "members": (b"gzip", members),
    "deflate": (b"deflate", zlib.compress),
    "raw": (b"deflate", raw),
}


def inflated(coding: bytes, *parts: bytes, most: int = MIB) -> bytes:
    inflater = Inflater(coding, most)
    return b"".join(piece for part in parts for piece in inflater.pieces(part))


@pytest.mark.parametrize("way", WAYS)
@given(data=st.data(), body=st.binary(max_size=300) | st.just(b"x" * 200_000))
def test_a_body_is_the_same_in_any_split(way: str, data: st.DataObject, body: bytes) -> None:
    coding, compress = WAYS[way]
    compressed = compress(body)
    for parts in ([compressed], steps(compressed), data.draw(splits(compressed))):
        assert inflated(coding, *parts) == body
    # What is cut short is read as far as it goes.
    assert body.startswith(inflated(coding, compressed[: len(compressed) // 2]))


@pytest.mark.parametrize("way", WAYS)
def test_a_bomb_comes_in_pieces_and_no_further_than_is_wanted(way: str) -> None:
    coding, compress = WAYS[way]
    bomb = compress(b"\0" * (16 * MIB))
    for parts in ([bomb], steps(bomb, 1000)):
        inflater = Inflater(coding, MIB)
        sizes = [len(piece) for part in parts for piece in inflater.pieces(part)]
        assert inflater.too_much
        assert max(sizes) == STEP
        assert MIB - STEP <= sum(sizes) <= MIB
    exact = Inflater(coding, 16 * MIB)
    assert sum(len(piece) for piece in exact.pieces(bomb)) == 16 * MIB
    assert not exact.too_much


def reading(coding: bytes) -> Callable[[bytes], None]:
    inflater = Inflater(coding, 16 * MIB)

    def read(part: bytes) -> None:
        for _ in inflater.pieces(part):
            pass

    return read


@pytest.mark.parametrize("way", WAYS)
def test_the_memory_for_a_part_is_bounded(way: str) -> None:
    coding, compress = WAYS[way]
    # The part, what is left of it, the piece, and zlib's window.
    assert held(reading(coding), compress(b"\0" * (16 * MIB))) < 8 * STEP


def test_the_steps_for_a_part_are_bounded() -> None:
    assert calls(reading(b"gzip"), gzip.compress(b"") * 5_000) < STEP


@pytest.mark.parametrize("coding", READABLE)
@given(data=st.data(), body=st.binary(max_size=60), sound=st.booleans())
def test_what_is_broken_ends_with_what_was_sound(coding: bytes, data: st.DataObject, body: bytes, sound: bool) -> None:
    start = (gzip.compress if coding == b"gzip" else zlib.compress)(b"sound") if sound else b""
    for parts in ([start + body], data.draw(splits(start + body))):
        found = inflated(coding, *parts)
        assert found.startswith(b"sound") or not sound


@pytest.mark.parametrize(
    ("tokens", "coding"),
    [
        ([], b""),
        ([b"identity"], b""),
        ([b"gzip"], b"gzip"),
        ([b"x-gzip"], b"gzip"),
        ([b"deflate", b"identity"], b"deflate"),
        ([b"br"], None),
        ([b"zstd"], None),
        ([b"gzip", b"gzip"], None),
        ([b"none"], b""),
        ([b"nonsense"], None),
    ],
)
def test_one_coding_is_read(tokens: list[bytes], coding: bytes | None) -> None:
    assert coding_of(tokens) == coding
