"""Responses that sseproxy itself sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ..errors import ExchangeError
from ..wire import headers
from ..wire.dialects import OPENAI, Form

_REASONS: Final = {
    400: b"Bad Request",
    404: b"Not Found",
    408: b"Request Timeout",
    413: b"Content Too Large",
    415: b"Unsupported Media Type",
    417: b"Expectation Failed",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    508: b"Loop Detected",
}


def status_line(status: int, reason: bytes | None = None) -> bytes:
    return b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b"") if reason is None else reason)


class Answer(NamedTuple):
    """What is left to send for a request: an error response, or nothing if the response was already sent.

    It consists of bytes and not of an aiohttp response, which would add fields such as Server and Date.
    """

    keep_alive: bool
    head: bytes = b""
    body: bytes = b""

    @staticmethod
    def of(
        error: ExchangeError,
        form: Form = OPENAI,
        *,
        keep_alive: bool = False,
        extra: Sequence[headers.Field] = (),
    ) -> Answer:
        body = form.refusal(error)
        fields = [
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"%d" % len(body)),
            *extra,
            *(() if keep_alive else ((b"Connection", b"close"),)),
        ]
        return Answer(keep_alive, headers.serialize(status_line(error.status), fields), body)
