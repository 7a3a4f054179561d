"""How many tokens a request may need, estimated before it is sent.

The input is a quarter of the text, in bytes, as OpenAI counts English. Pictures and sound in base64 are left out: they
need few tokens for their size. The output is what the request limits it to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import msgspec

from .meaning import NULL, UNREADABLE
from .request import OutputLimits, RequestReader

OUTPUT: Final = 1_000
"""Tokens of an answer to a request that does not limit it."""
# https://platform.openai.com/tokenizer
_BYTES_OF_A_TOKEN: Final = 4
# No word of a language is as long. It is looked for only where a run begins, so each byte is looked at once or twice.
_LEAST_BASE64: Final = 200
_BASE64: Final = re.compile(rb"(?<![A-Za-z0-9+/_=-])[A-Za-z0-9+/_-]{%d,}" % _LEAST_BASE64)
# Digits of a number of tokens.
_MAX_DIGITS: Final = 12


_decode_limits: Final = msgspec.json.Decoder(OutputLimits).decode


class Demand:
    """What a request that `reader` reads may need. `feed` takes the parts of its body, and passes them to `then`."""

    __slots__ = ("_reader", "_text", "_then")

    def __init__(self, reader: RequestReader, then: Callable[[bytes], None]) -> None:
        self._reader = reader
        self._then = then
        self._text = 0

    def feed(self, part: bytes) -> None:
        self._then(part)
        self._text += len(_BASE64.sub(b"", part)) if len(part) >= _LEAST_BASE64 else len(part)

    @property
    def input(self) -> int:
        """Tokens of the text so far."""
        return -(-self._text // _BYTES_OF_A_TOKEN)

    @property
    def output(self) -> int:
        """Tokens that may be generated."""
        try:
            limits = _decode_limits(self._reader.text)
        except UNREADABLE:
            return OUTPUT
        most = _largest(limits.max_tokens, limits.max_completion_tokens, limits.max_output_tokens)
        times = _largest(limits.n, limits.best_of)
        for gemini in (limits.generationConfig, limits.generation_config):
            if gemini is not None:
                most = max(most, _largest(gemini.maxOutputTokens, gemini.max_output_tokens))
                times = max(times, _largest(gemini.candidateCount, gemini.candidate_count))
        return (most or OUTPUT) * (times or 1)


def _largest(*values: msgspec.Raw) -> int:
    """The largest of `values` that is a count. 0 if there is none."""
    largest = 0
    for value in values:
        if value is not NULL:
            digits = bytes(value)
            if digits.isdigit() and len(digits) <= _MAX_DIGITS and (number := int(digits)) > largest:
                largest = number
    return largest
