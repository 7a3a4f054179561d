"""By what a request is assigned to an endpoint: a header field, a member of its body, or the beginning of its messages.

Requests of one conversation have the same value, so the endpoint that has its prompt in a cache is asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from ..wire.extract import Extract, Members
from ..wire.headers import Fields

if TYPE_CHECKING:
    from ..config.values import Source

# The members that hold the messages: chat completions and Messages, Responses, Gemini, completions.
_MESSAGES: Final = (b"messages", b"input", b"contents", b"prompt")
# Bytes of a body that are read at once, and of a member that count. Reading 64 KiB takes up to 2 ms.
_AT_ONCE: Final = 64 * 1024
# Bytes of a key.
_SIZE: Final = 16


def reads_body(sources: Sequence[Source]) -> bool:
    """Whether the body is needed for `sources`."""
    return any(source.kind != "header" for source in sources)


async def key_of(sources: Sequence[Source], fields: Fields, parts: Sequence[bytes] | None) -> bytes | None:
    """The key of a request: of the first of `sources` that it has, or None. `parts` are those of a body in JSON.

    Others have their turns while a large body is read.
    """
    spans: dict[bytes, tuple[int, int]] | None = None
    for source in sources:
        if source.kind == "header":
            values = fields.named(source.what.lower().encode())
            if values:
                return _digest(source, values)
            continue
        if parts is None:
            continue
        if spans is None:
            spans = await _spans(sources, parts)
        if source.kind == "field":
            span = spans.get(source.what.encode())
            if span is None:
                continue
            start, stop = span
            value = b"".join(_cut(parts, start, min(stop, start + _AT_ONCE)))
            if value not in (b"null", b'""'):
                return _digest(source, [value])
            continue
        span = next((spans[name] for name in _MESSAGES if name in spans), None)
        if span is not None:
            start, stop = span
            return _digest(source, _cut(parts, start, min(stop, start + int(source.what))))
    return None


async def _spans(sources: Sequence[Source], parts: Sequence[bytes]) -> dict[bytes, tuple[int, int]]:
    names = [source.what.encode() for source in sources if source.kind == "field"]
    extract = Extract(Members(dict.fromkeys((*names, *_MESSAGES))))
    fed = 0
    for part in parts:
        for start in range(0, len(part), _AT_ONCE):
            extract.feed(part[start : start + _AT_ONCE])
            fed += min(_AT_ONCE, len(part) - start)
            if fed >= _AT_ONCE:
                fed = 0
                await asyncio.sleep(0)
    return extract.spans if extract.text() is not None else {}


def _cut(parts: Sequence[bytes], start: int, stop: int) -> Iterator[bytes]:
    at = 0
    for part in parts:
        if at < stop and at + len(part) > start:
            yield part[max(start - at, 0) : stop - at]
        at += len(part)


def _digest(source: Source, values: Sequence[bytes] | Iterator[bytes]) -> bytes:
    digest = blake2b(repr((source.kind, source.what)).encode(), digest_size=_SIZE)
    for value in values:
        digest.update(value)
    return digest.digest()
