"""Ways to cut the same bytes into reads."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import strategies as st


def cut(data: bytes, offsets: Iterable[int]) -> list[bytes]:
    """`data` in pieces that begin at `offsets`; the same offset twice makes an empty piece."""
    return [data[start:end] for start, end in pairwise([0, *sorted(offsets), len(data)])]


def steps(data: bytes, size: int = 1) -> list[bytes]:
    """`data` in pieces of `size` bytes."""
    return [data[start : start + size] for start in range(0, len(data), size)]


def splits(data: bytes) -> st.SearchStrategy[list[bytes]]:
    """`data` in any pieces, empty ones among them."""
    return st.lists(st.integers(0, len(data)), max_size=12).map(lambda offsets: cut(data, offsets))
