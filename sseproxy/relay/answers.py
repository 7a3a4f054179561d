"""Responses that sseproxy itself sends."""

from __future__ import annotations

from collections.abc import Sequence
from email.utils import formatdate
from functools import lru_cache
from time import time  # noqa: TID251 - a timestamp is exported
from typing import Final

import msgspec

from ..errors import ExchangeError
from ..wire import headers
from ..wire.dialects import OPENAI, Style
from .heads import ResponseHead

_REASONS: Final = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    408: b"Request Timeout",
    413: b"Content Too Large",
    414: b"URI Too Long",
    415: b"Unsupported Media Type",
    417: b"Expectation Failed",
    421: b"Misdirected Request",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
    508: b"Loop Detected",
}

# What APIs are asked with; any other method that the parser knows, but CONNECT and TRACE, is relayed as well.
_ALLOW: Final = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"


@lru_cache(maxsize=1)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()


def date() -> bytes:
    """Now, as the value of a Date (RFC 9110, section 5.6.7). It is written once a second."""
    return _date(int(time()))


def status_line(status: int, reason: bytes | None = None) -> bytes:
    return b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b"") if reason is None else reason)


def response_head(
    head: ResponseHead,
    request_id: bytes,
    *,
    framing: Sequence[headers.Field] | None,
    event_stream: bool,
    connection: bytes | None,
    date: bytes | None,
    allowances: Sequence[headers.Field] | None = None,
) -> bytes:
    """The head of an upstream's response as it goes to the client."""
    return headers.serialize(
        status_line(head.status, head.reason),
        headers.to_downstream(
            head.fields,
            version=head.version,
            framing=framing,
            event_stream=event_stream,
            request_id=request_id,
            connection=connection,
            date=date,
            allowances=allowances,
        ),
    )


class Answer(msgspec.Struct, frozen=True):
    """What is left to send for a request: an error response, or nothing if the response was already sent.

    It consists of bytes and not of an aiohttp response, which would add fields such as Server and Content-Type.
    """

    keep_alive: bool
    head: bytes = b""
    body: bytes = b""

    @staticmethod
    def of(
        error: ExchangeError,
        style: Style = OPENAI,
        *,
        keep_alive: bool = False,
        extra: Sequence[headers.Field] = (),
    ) -> Answer:
        body = style.refusal(error)
        fields = [
            (b"Date", date()),
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"%d" % len(body)),
            *extra,
            *(() if keep_alive else ((b"Connection", b"close"),)),
        ]
        return Answer(keep_alive, headers.serialize(status_line(error.status), fields), body)

    @staticmethod
    def of_json(body: bytes, *, keep_alive: bool, extra: Sequence[headers.Field]) -> Answer:
        """A response with `body`, which is JSON."""
        fields = [
            (b"Date", date()),
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"%d" % len(body)),
            *extra,
            *(() if keep_alive else ((b"Connection", b"close"),)),
        ]
        return Answer(keep_alive, headers.serialize(status_line(200), fields), body)

    @staticmethod
    def to_options(*, keep_alive: bool, extra: Sequence[headers.Field]) -> Answer:
        """To an OPTIONS request that asks about this server itself (RFC 9110, section 9.3.7)."""
        fields = [
            (b"Date", date()),
            (b"Allow", _ALLOW),
            (b"Content-Length", b"0"),
            *extra,
            *(() if keep_alive else ((b"Connection", b"close"),)),
        ]
        return Answer(keep_alive, headers.serialize(status_line(200), fields))
