"""Every exception that sseproxy raises, and the only table of status, body and outcome.

    SseproxyError
     +-- ConfigError                    the configuration is not valid
     +-- ListenError                    cannot listen on an address
     +-- ParserError                    aiohttp was installed without its C parser
     +-- ReloadError                    a new configuration, or new code, cannot take over now
     +-- CannotExamine                  the doctor cannot examine a hop
     +-- ProtocolError                  bytes that violate a wire format (raised by `sseproxy.wire`)
     |    +-- BrokenBodyError           in the framing of a body; has the payload before it
     +-- ExchangeError                  ends an exchange; has status, code and outcome
          +-- RequestError              the request is refused, and not sent to the upstream
          |    +-- LimitExceeded        its client has reached a limit
          +-- UpstreamError             the upstream's fault
          |    +-- UpstreamTimeout      the upstream did not meet a deadline
          |    +-- Truncated            the upstream closed the connection before the end of the response
          +-- StalledClient             the client does not read, or does not send
          +-- Draining                  the drain timeout has passed
          +-- Cancelled                 an operator has ended it
          +-- InternalError             a fault in sseproxy

Exceptions of libraries (aiohttp's, OSError) are translated where they first appear, in `relay.upstream`. All other code
handles only the exceptions above. A client that leaves is not an error: it cancels the task of its request.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Sequence
from typing import ClassVar, Literal

UpstreamErrorType = Literal["dns", "connect", "tls", "timeout", "reset", "protocol", "answer"]


class Outcome(enum.StrEnum):
    """Why an exchange ended. Every exchange has exactly one outcome. It is a metric label, so the set is closed."""

    # It equals its text. The hash of an enum would be another one, and is computed in Python.
    __hash__ = str.__hash__

    COMPLETED = "completed"
    """The response is complete: by the framing of its body, or by the end marker of the stream."""
    CLIENT_GONE_BEFORE_HEAD = "client_gone_before_head"
    CLIENT_GONE_BEFORE_FIRST_TOKEN = "client_gone_before_first_token"
    CLIENT_GONE_MID_STREAM = "client_gone_mid_stream"
    UPSTREAM_ERROR = "upstream_error"
    """The upstream was unreachable, closed the connection before a response head, sent invalid framing, or sent an
    error event."""
    UPSTREAM_TIMEOUT_CONNECT = "upstream_timeout_connect"
    UPSTREAM_TIMEOUT_HEAD = "upstream_timeout_head"
    UPSTREAM_TIMEOUT_FIRST_TOKEN = "upstream_timeout_first_token"
    UPSTREAM_TIMEOUT_IDLE = "upstream_timeout_idle"
    UPSTREAM_TIMEOUT_TOTAL = "upstream_timeout_total"
    TRUNCATED = "truncated"
    """The upstream closed the connection before the end of the response body."""
    STALLED_CLIENT = "stalled_client"
    REJECTED = "rejected"
    """sseproxy itself answered the request. A part of the body may have been sent to the upstream before."""
    DRAINED = "drained"
    """The drain timeout passed before the end of the exchange."""
    CANCELLED = "cancelled"
    """An operator ended the exchange, through the admin listener."""
    PROXY_ERROR = "proxy_error"
    """A fault in sseproxy, or the death of the worker."""


class SseproxyError(Exception):
    """The base class of all exceptions of sseproxy."""


class ConfigError(SseproxyError):
    """The configuration is not valid.

    `problems` has one line for each problem, in the order of their positions: `file:line:col: path: expected ...`.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class ListenError(SseproxyError):
    """Cannot listen on an address. `option` is the option that has the address."""

    def __init__(self, option: str, address: str, cause: OSError) -> None:
        # `getaddrinfo` errors have negative numbers, and only a text. For others the text is made from the number,
        # because the text of `bind` would repeat the address.
        reason = os.strerror(cause.errno) if cause.errno and cause.errno > 0 else str(cause.strerror)
        super().__init__(f"{option}: cannot listen on {address}: {reason.lower()}")
        self.option = option
        self.in_use = cause.errno == errno.EADDRINUSE


class ParserError(SseproxyError):
    """aiohttp has no C parser. Its Python parser follows other rules, which sseproxy is not tested with."""

    def __init__(self) -> None:
        super().__init__("aiohttp has no C parser here; install one of its wheels, and unset AIOHTTP_NO_EXTENSIONS")


class ReloadError(SseproxyError):
    """A new configuration, although valid, or new code cannot take over now. The old one stays in use."""


class CannotExamine(SseproxyError):
    """The doctor cannot examine a hop. The text says why, as a sentence about the hop, and what to do."""


class ProtocolError(SseproxyError):
    """Bytes violate a wire format. The text names the rule and never has the bytes, which may be secret."""


class BrokenBodyError(ProtocolError):
    """The framing of a body is invalid. `payload` is the valid payload before it in the same bytes."""

    def __init__(self, rule: str, payload: bytes) -> None:
        super().__init__(rule)
        self.payload = payload


class ExchangeError(SseproxyError):
    """Ends an exchange.

    `status` is the HTTP status, if no response head was sent yet. `code` and `type` are fields of the error body or
    error event of OpenAI's API; `wire.dialects` has the style of each API. `outcome` is what is recorded.
    """

    status: int = 502
    code: str = "upstream_error"
    type: str = "upstream_error"
    outcome: Outcome = Outcome.UPSTREAM_ERROR
    retry_after: float = 1.0
    """With the status 429 or 503: seconds after which the client may try again. By default it is soon, because another
    replica, or the workers after a restart, can take the request."""
    cause: str | None = None
    """What exactly failed, for the access log. Clients do not get it: it may name addresses and certificates."""
    attempts: int = 1
    """How many attempts were made. This error ended the last one."""
    final: bool = False
    """Whether the client must not try again. SDKs do so by themselves, unless a header field tells them not to."""

    @property
    def message(self) -> str:
        return str(self) if self.attempts == 1 else f"{self} This was the last of {self.attempts} attempts."


class RequestError(ExchangeError):
    """sseproxy refuses the request. `reason` is the label in `sseproxy_requests_rejected_total`."""

    type = "invalid_request_error"
    outcome = Outcome.REJECTED

    _TABLE: ClassVar[dict[str, tuple[int, str]]] = {
        "bad_request": (400, "The request is not valid HTTP/1.1."),
        "bad_target": (400, "The request target is not a plain path: dot segments and control characters are refused."),
        "missing_api_key": (
            401,
            "This request needs a key, in Authorization: Bearer, x-api-key, x-goog-api-key, api-key or ?key=.",
        ),
        "invalid_api_key": (401, "The key is not valid."),
        "too_many_wrong_keys": (429, "There were too many wrong keys from this address."),
        "route_not_allowed": (403, "This key may not use this route."),
        "model_not_allowed": (403, "This key may not use this model."),
        "ledger": (503, "The limits of clients cannot be checked now; please try again."),
        "rate_limit_exceeded": (429, "This key has reached a limit."),
        "model_twice": (400, "The request body names its model, or a list of models, more than once."),
        "no_route": (404, "No route matches this request."),
        "method": (501, "This method is not supported."),
        "version": (505, "Only HTTP/1.1 and HTTP/1.0 are supported."),
        "misdirected": (421, "A target that begins with https: has to come over TLS."),
        "target_too_long": (414, "The request target is too long."),
        "head_too_large": (431, "The request head is too large."),
        "head_timeout": (408, "The request head took too long."),
        "body_too_large": (413, "The request body is too large."),
        "encoding": (
            415,
            "The request body cannot be read for its model: send it as gzip, as deflate or uncompressed.",
        ),
        "expectation": (417, "Only Expect: 100-continue is supported."),
        "loop": (508, "The request has passed through this proxy too often."),
        "connections": (503, "There are too many connections."),
        "connections_per_client": (429, "There are too many connections from this address."),
        "active_requests": (503, "There are too many requests under way."),
        "held": (503, "Too many request bodies are being read in advance; please try again."),
        "overloaded": (503, "The proxy is overloaded; please try again."),
        "pending_connects": (503, "Too many requests wait for a connection to the upstream."),
    }

    def __init__(self, reason: str, message: str | None = None, cause: str | None = None) -> None:
        self.reason = self.code = reason
        self.status, usual = self._TABLE[reason]
        if self.status in (429, 503):
            self.type = "overloaded_error"
        self.cause = cause
        super().__init__(message or usual)


class TooManyConnects(RequestError):
    """Too many connections to the upstream are being established. Another upstream may have room."""

    def __init__(self) -> None:
        super().__init__("pending_connects")


class LimitExceeded(RequestError):
    """The client has reached its `limit`, which is the name of an option. It may try again in `retry_after` seconds."""

    def __init__(self, limit: str, most: str, retry_after: float) -> None:
        when = f"try again in {retry_after:.3g} seconds" if retry_after > 1 else "please try again"
        super().__init__("rate_limit_exceeded", f"This key has reached its limit of {most}; {when}.")
        self.limit = self.type = limit
        self.retry_after = retry_after


class UpstreamError(ExchangeError):
    """The upstream has failed. `kind` is the label `type` in `sseproxy_upstream_errors_total`."""

    _TABLE: ClassVar[dict[UpstreamErrorType, tuple[int, str, str]]] = {
        "dns": (502, "upstream_unresolvable", "The upstream's name could not be resolved."),
        "connect": (502, "upstream_unreachable", "The upstream could not be reached."),
        "tls": (502, "upstream_tls", "No trusted TLS connection to the upstream could be made."),
        "timeout": (504, "upstream_timeout", "The upstream did not answer in time."),
        "reset": (502, "upstream_disconnected", "The upstream closed the connection before it answered."),
        "protocol": (502, "upstream_protocol", "The upstream's response is not valid HTTP/1.1."),
        "answer": (502, "upstream_failed", "The upstream's answer had an error, or no content."),
    }

    def __init__(self, kind: UpstreamErrorType, message: str | None = None, cause: str | None = None) -> None:
        self.kind = kind
        self.cause = cause
        self.status, self.code, default = self._TABLE[kind]
        super().__init__(message or default)


Phase = Literal["connect", "head", "first_token", "idle", "total"]


class UpstreamTimeout(UpstreamError):
    """The upstream did not finish `phase` within `seconds`."""

    _WAITED_FOR: ClassVar[dict[Phase, str]] = {
        "connect": "accept a connection",
        "head": "start its response",
        "first_token": "generate a first token",
        "idle": "send anything",
        "total": "finish",
    }

    def __init__(self, phase: Phase, seconds: float) -> None:
        super().__init__("timeout", f"The upstream did not {self._WAITED_FOR[phase]} within {seconds:g} seconds.")
        self.phase = phase
        self.seconds = seconds
        self.outcome = Outcome(f"upstream_timeout_{phase}")


class Truncated(UpstreamError):
    """The upstream's connection ended after the response head, and before the end of the body."""

    outcome = Outcome.TRUNCATED

    def __init__(self, cause: str | None = None) -> None:
        super().__init__("reset", "The upstream closed the connection before the response was complete.", cause)


class StalledClient(ExchangeError):
    """The client is too slow. For `seconds` it has read nothing of the response (`took`), sent nothing of its request
    (`sent`), or sent too little of it (`little`).
    """

    status = 408
    code = type = "stalled_client"
    outcome = Outcome.STALLED_CLIENT

    _TABLE: ClassVar[dict[Literal["took", "sent", "little"], str]] = {
        "took": "The client read nothing of the response for {:.3g} seconds.",
        "sent": "The client sent nothing of its request for {:.3g} seconds.",
        "little": "The client sent too little of its request in {:.3g} seconds.",
    }

    def __init__(self, missed: Literal["took", "sent", "little"], seconds: float) -> None:
        super().__init__(self._TABLE[missed].format(seconds))


class Draining(ExchangeError):
    """The worker is stopping, and its drain timeout has passed."""

    status = 503
    code = "draining"
    type = "server_error"
    outcome = Outcome.DRAINED

    def __init__(self) -> None:
        super().__init__("The proxy is stopping or reloading; please try again.")


class Cancelled(ExchangeError):
    """An operator has ended the exchange, through the admin listener."""

    status = 503
    code = "cancelled"
    type = "server_error"
    outcome = Outcome.CANCELLED
    final = True

    def __init__(self) -> None:
        super().__init__("An operator has cancelled this request.")


class InternalError(ExchangeError):
    """A fault in sseproxy. The log has the traceback."""

    status = 500
    code = "internal_error"
    type = "server_error"
    outcome = Outcome.PROXY_ERROR

    def __init__(self) -> None:
        super().__init__("The proxy failed to handle this request.")
