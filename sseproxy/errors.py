"""Every exception sseproxy raises, and the one table from an error to what becomes of the exchange.

    SseproxyError
     +-- ConfigError                    the operator's configuration cannot be used
     +-- ListenError                    an address cannot be listened on
     +-- ParserError                    aiohttp was installed without its C parser
     +-- ReloadError                    another configuration, or other code, cannot take over now
     +-- ProtocolError                  bytes that break a wire format (raised by `sseproxy.wire`)
     |    +-- BrokenBodyError           in a body, after some that do not
     +-- ExchangeError                  an exchange cannot go on; carries status, code and outcome
          +-- RequestError              the client's fault: never sent upstream
          +-- UpstreamError             the upstream's fault
          |    +-- UpstreamTimeout      it was given the time of its phase and did not use it
          |    +-- Truncated            it left after its response head
          +-- StalledClient             the client neither takes nor sends what it is to
          +-- Draining                  this process ends before the exchange does
          +-- InternalError             a defect of sseproxy

Foreign exceptions (aiohttp's, OSError) are translated where they are first seen, in `relay.upstream`, so that
everything above it handles only these. A client that leaves is not an error but a cancellation.
"""

from __future__ import annotations

import enum
import errno
import json
import os
from collections.abc import Sequence
from typing import ClassVar, Literal

UpstreamErrorType = Literal["dns", "connect", "tls", "timeout", "reset", "protocol"]


class Outcome(enum.StrEnum):
    """Why an exchange ended. Closed: every exchange has exactly one, and it is a metric label."""

    COMPLETED = "completed"
    """The response reached its end: the body's framing said so, or the stream's end marker was forwarded."""
    CLIENT_GONE_BEFORE_HEAD = "client_gone_before_head"
    CLIENT_GONE_BEFORE_FIRST_TOKEN = "client_gone_before_first_token"
    CLIENT_GONE_MID_STREAM = "client_gone_mid_stream"
    UPSTREAM_ERROR = "upstream_error"
    """No usable response: unreachable, reset before its head, broken framing, or an error event in the stream."""
    UPSTREAM_TIMEOUT_CONNECT = "upstream_timeout_connect"
    UPSTREAM_TIMEOUT_HEAD = "upstream_timeout_head"
    UPSTREAM_TIMEOUT_FIRST_TOKEN = "upstream_timeout_first_token"
    UPSTREAM_TIMEOUT_IDLE = "upstream_timeout_idle"
    UPSTREAM_TIMEOUT_TOTAL = "upstream_timeout_total"
    TRUNCATED = "truncated"
    """The upstream's connection ended before its body did."""
    STALLED_CLIENT = "stalled_client"
    REJECTED = "rejected"
    """Refused here. A part of the body may have been sent upstream before that."""
    DRAINED = "drained"
    """Still running at the end of the drain."""
    PROXY_ERROR = "proxy_error"
    """A defect of sseproxy, or a worker that died with the exchange in its hands."""


class SseproxyError(Exception):
    """Root of everything raised on purpose."""


class ConfigError(SseproxyError):
    """The configuration cannot be used.

    `problems` holds one line each, in the order of their places: `file:line:col: path: expected ...`.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class ListenError(SseproxyError):
    """A listening socket cannot be had. `option` is where its address is configured."""

    def __init__(self, option: str, address: str, cause: OSError) -> None:
        # A name that does not resolve has a negative number of its own; what bind() says repeats the address.
        reason = os.strerror(cause.errno) if cause.errno and cause.errno > 0 else str(cause.strerror)
        super().__init__(f"{option}: cannot listen on {address}: {reason.lower()}")
        self.option = option
        self.in_use = cause.errno == errno.EADDRINUSE


class ParserError(SseproxyError):
    """Heads would be parsed by other rules than those that were tested."""

    def __init__(self) -> None:
        super().__init__("aiohttp has no C parser here; install one of its wheels, and unset AIOHTTP_NO_EXTENSIONS")


class ReloadError(SseproxyError):
    """A configuration that is right in itself, or new code, cannot take over; what was there before goes on."""


class ProtocolError(SseproxyError):
    """Bytes that break a wire format. The text names the rule, never the bytes."""


class BrokenBodyError(ProtocolError):
    """The framing of a body breaks; `payload` came before that in the same bytes."""

    def __init__(self, rule: str, payload: bytes) -> None:
        super().__init__(rule)
        self.payload = payload


class ExchangeError(SseproxyError):
    """An exchange cannot go on.

    `status` is the HTTP status if no response head was sent yet, `code` and `type` go into the OpenAI-shaped
    error body or error event, `outcome` is what is recorded.
    """

    status: int = 502
    code: str = "upstream_error"
    type: str = "upstream_error"
    outcome: Outcome = Outcome.UPSTREAM_ERROR
    cause: str | None = None
    """What exactly failed, for the log: addresses and certificates are nothing that a client is told."""

    @property
    def message(self) -> str:
        return str(self)

    def document(self) -> dict[str, object]:
        """The error object of an OpenAI-compatible API."""
        return {"message": self.message, "type": self.type, "param": None, "code": self.code}

    def body(self) -> bytes:
        """The body of an error response."""
        return json.dumps({"error": self.document()}).encode() + b"\n"

    def event(self, sequence_number: int | None = None) -> bytes:
        """The error as an event within a stream.

        `event: error` together with a nested `error` is the one form on which every SDK of OpenAI and Anthropic
        raises, whatever follows it on the connection. With a `sequence_number` it is the Responses API's as well,
        which has the same fields at the top level.
        """
        event: dict[str, object] = {"type": "error", "error": self.document()}
        if sequence_number is not None:
            flat = {"code": self.code, "message": self.message, "param": None}
            event = {"type": "error", "sequence_number": sequence_number, **flat, "error": self.document()}
        return b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n"


class RequestError(ExchangeError):
    """The request is refused here. `reason` is its label in `sseproxy_requests_rejected_total`."""

    type = "invalid_request_error"
    outcome = Outcome.REJECTED

    _TABLE: ClassVar[dict[str, tuple[int, str]]] = {
        "bad_request": (400, "The request is not valid HTTP/1.1."),
        "bad_target": (400, "The request target is not a plain path: dot segments and control characters are refused."),
        "no_route": (404, "No route matches this request."),
        "method": (501, "This method is not supported."),
        "head_too_large": (431, "The request head is too large."),
        "head_timeout": (408, "The request head took too long."),
        "body_too_large": (413, "The request body is too large."),
        "expectation": (417, "Only Expect: 100-continue can be met."),
        "loop": (508, "The request has come through here too often."),
        "connections": (503, "There are too many connections."),
        "connections_per_client": (429, "There are too many connections from this address."),
        "active_requests": (503, "There are too many requests under way."),
        "held": (503, "Too many request bodies are being read in advance; please try again."),
        "overloaded": (503, "The proxy has more to do than it can."),
        "pending_connects": (503, "Too many requests wait for a connection to the upstream."),
    }

    def __init__(self, reason: str, message: str | None = None, cause: str | None = None) -> None:
        self.reason = self.code = reason
        self.status, usual = self._TABLE[reason]
        if self.status in (429, 503):
            self.type = "overloaded_error"
        self.cause = cause
        super().__init__(message or usual)


class UpstreamError(ExchangeError):
    """The upstream could not be used. `kind` is its label in `sseproxy_upstream_errors_total`."""

    _TABLE: ClassVar[dict[UpstreamErrorType, tuple[int, str, str]]] = {
        "dns": (502, "upstream_unresolvable", "The upstream's name could not be resolved."),
        "connect": (502, "upstream_unreachable", "The upstream could not be reached."),
        "tls": (502, "upstream_tls", "No trusted TLS connection to the upstream could be made."),
        "timeout": (504, "upstream_timeout", "The upstream did not answer in time."),
        "reset": (502, "upstream_disconnected", "The upstream closed the connection before it answered."),
        "protocol": (502, "upstream_protocol", "The upstream's response is not valid HTTP/1.1."),
    }

    def __init__(self, kind: UpstreamErrorType, message: str | None = None, cause: str | None = None) -> None:
        self.kind = kind
        self.cause = cause
        self.status, self.code, default = self._TABLE[kind]
        super().__init__(message or default)


Phase = Literal["connect", "head", "first_token", "idle", "total"]


class UpstreamTimeout(UpstreamError):
    """The upstream did not do in `seconds` what `phase` waits for."""

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
    """The upstream's connection ended after its response head and before the end of its body."""

    outcome = Outcome.TRUNCATED

    def __init__(self, cause: str | None = None) -> None:
        super().__init__("reset", "The upstream closed the connection before the response was complete.", cause)


class StalledClient(ExchangeError):
    """For `seconds` the client `took` nothing of the response, or `sent` nothing, or too `little`, of its request."""

    status = 408
    code = type = "stalled_client"
    outcome = Outcome.STALLED_CLIENT

    _TABLE: ClassVar[dict[Literal["took", "sent", "little"], str]] = {
        "took": "The client took nothing of the response for {:.3g} seconds.",
        "sent": "The client sent nothing of its request for {:.3g} seconds.",
        "little": "The client sent too little of its request in {:.3g} seconds.",
    }

    def __init__(self, missed: Literal["took", "sent", "little"], seconds: float) -> None:
        super().__init__(self._TABLE[missed].format(seconds))


class Draining(ExchangeError):
    """This process stops and its drain timeout is over."""

    status = 503
    code = "draining"
    type = "server_error"
    outcome = Outcome.DRAINED

    def __init__(self) -> None:
        super().__init__("The proxy is shutting down; please try again.")


class InternalError(ExchangeError):
    """A defect of sseproxy; the log has the details."""

    status = 500
    code = "internal_error"
    type = "server_error"
    outcome = Outcome.PROXY_ERROR

    def __init__(self) -> None:
        super().__init__("The proxy failed to handle this request.")
