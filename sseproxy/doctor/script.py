"""What a client asks of the probe, and the stream that the probe then sends. No I/O.

A request is a request for chat completions with one more member, `probe`. The answer is a stream of chat completions,
so any gateway forwards it. Everything that matters is in the text of an event, because gateways may rewrite the JSON:

    000012 0000603214 5f0c1d2e3a4b5c6d 1.1 ......

These are the number of the event; the microseconds from the request head, as the probe received it, to this event; a
digest of all events before it; the version of HTTP that the probe was asked in; and dots, up to the size of the event.
All but the time and the version is known in advance. So the client can write the stream itself, and compare every byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Annotated, Final, NamedTuple

import msgspec

MODEL: Final = "sseproxy-probe"
MAX_SECONDS: Final = 300.0
"""The longest stream. Idle timeouts of more than five minutes harm nobody."""
MAX_RATE: Final = 256 * 1024
"""Bytes per second of a stream: enough to fill a buffer of 1 MiB in a few seconds, and little for any network."""
MAX_STREAMS: Final = 2
"""Requests that are answered at the same time: one examination needs no more."""
MAX_UPLOAD: Final = 32 << 20
MIN_SIZE: Final = 256
MAX_SIZE: Final = 64 * 1024
# Bytes of a request that is not an upload, and at the beginning of an upload, where the member `probe` has to be.
MAX_REQUEST: Final = 64 * 1024
MAX_PREFIX: Final = 8 * 1024

HEARTBEAT: Final = b": heartbeat\n\n"
_FINISH: Final = (
    b'data: {"id":"chatcmpl-probe","object":"chat.completion.chunk","created":0,"model":"sseproxy-probe","choices":'
    b'[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
)
_END: Final = _FINISH + b"data: [DONE]\n\n"
_BEFORE: Final = (
    b'data: {"id":"chatcmpl-probe","object":"chat.completion.chunk","created":0,"model":"sseproxy-probe","choices":'
    b'[{"index":0,"delta":{"role":"assistant","content":"'
)
_AFTER: Final = b'"},"finish_reason":null}]}\n\n'
_TEXT: Final = re.compile(r"([0-9]{6}) ([0-9]{10}) ([0-9a-f]{16}) ([0-9]\.[0-9]) \.*")
_COMMENT: Final = re.compile(rb"(?:(?<=\n)|\A):[^\r\n]*(?:\r\n|\n|\r)(?:\r\n|\n|\r)?")
# The member `probe` of an upload, whose rest is not kept. It has no nested object.
_MEMBER: Final = re.compile(rb'"probe"\s*:\s*(\{[^{}]*\})')

Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)]


class Asked(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the member `probe` of a request asks for. Times are seconds.

    A stream begins `before` seconds after the request, with its head. After `wait` seconds the first of `events`
    follows, and then one `every` so many seconds, each of `size` bytes. After `lull` events there is a `silence`, with
    a comment every `heartbeat` seconds if that is not 0. `cut`: after so many events the connection is closed, or
    reset.

    With an `id`, the probe remembers when the client of this stream left, for a later request with `left`. `upload`:
    the request has a large body, and the answer says when it arrived.
    """

    token: str = ""
    events: Annotated[int, msgspec.Meta(ge=1, le=30_000)] = 60
    every: Annotated[float, msgspec.Meta(ge=0.001, le=MAX_SECONDS)] = 0.05
    size: Annotated[int, msgspec.Meta(ge=MIN_SIZE, le=MAX_SIZE)] = MIN_SIZE
    before: Seconds = 0.0
    wait: Seconds = 0.0
    lull: Annotated[int, msgspec.Meta(ge=1)] = 1
    silence: Seconds = 0.0
    heartbeat: Seconds = 0.0
    cut: Annotated[int, msgspec.Meta(ge=1)] | None = None
    reset: bool = False
    id: Annotated[int, msgspec.Meta(ge=0, lt=2**62)] = 0
    left: Annotated[int, msgspec.Meta(ge=0, lt=2**62)] = 0
    upload: bool = False

    def due(self, number: int) -> float:
        """Seconds from the request to the event `number`."""
        return self.before + self.wait + number * self.every + (self.silence if number >= self.lull else 0.0)

    def problem(self) -> str:
        """Why the probe does not send such a stream; empty if it does."""
        if self.size > self.every * MAX_RATE:
            return f"a probe sends at most {MAX_RATE // 1024} KiB a second"
        if self.due(self.events) > MAX_SECONDS:
            return f"a stream of a probe takes at most {MAX_SECONDS:g} seconds"
        return ""


class _Body(msgspec.Struct):
    probe: Asked | None = None


def asked_in(body: bytes) -> Asked | None:
    """The member `probe` of a request, or None if it has none. Raises `ValueError` if it is not valid."""
    try:
        return msgspec.json.decode(body, type=_Body).probe
    except RecursionError:
        raise ValueError("the request is nested too deeply") from None


def asked_at_start(prefix: bytes) -> Asked | None:
    """The same, for the beginning of a large request."""
    member = _MEMBER.search(prefix, 0, MAX_PREFIX)
    return None if member is None else msgspec.json.decode(member[1], type=Asked)


def request(asked: Asked, *, filler: int = 0) -> bytes:
    """The body of a request, with a message of `filler` bytes. `probe` comes before the message."""
    document = {
        "model": MODEL,
        "stream": not (asked.left or asked.upload),
        "probe": asked,
        "messages": [{"role": "user", "content": "." * filler or "probe"}],
    }
    return msgspec.json.encode(document)


class Report(msgspec.Struct, omit_defaults=True):
    """What the probe answers to `left` and `upload`, as the text of a chat completion.

    `left`: when the client was seen to have left, in seconds from the request head; None if the stream came to its end.
    `known`: whether there was such a stream. `took`: seconds from the head of an upload to the last byte of its body.
    """

    known: bool = True
    left: float | None = None
    took: float = 0.0
    size: int = 0
    version: str = ""


def completion(report: Report) -> bytes:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": msgspec.json.encode(report).decode(), "refusal": None},
        "finish_reason": "stop",
    }
    document = {"id": "chatcmpl-probe", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
    return msgspec.json.encode(document)


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message = msgspec.field(default_factory=_Message)
    delta: _Message = msgspec.field(default_factory=_Message)


class _Completion(msgspec.Struct):
    choices: list[_Choice] = []


def report_in(body: bytes) -> Report | None:
    """The report in a chat completion; None if there is none."""
    try:
        (choice,) = msgspec.json.decode(body, type=_Completion).choices
        return msgspec.json.decode(choice.message.content or "", type=Report)
    except (ValueError, RecursionError):
        return None


def text_in(data: bytes) -> str:
    """The generated text in the data of an event of chat completions; empty if there is none."""
    try:
        choices = msgspec.json.decode(data, type=_Completion).choices
    except (ValueError, RecursionError):
        return ""
    return "".join(choice.delta.content or "" for choice in choices)


class Mark(NamedTuple):
    """What an event of the probe says about itself. `sent`: seconds from the request to this event."""

    number: int
    sent: float
    digest: str
    version: str


def mark_in(text: str) -> Mark | None:
    """The mark in the text of an event; None if it is not the probe's."""
    match = _TEXT.fullmatch(text)
    return Mark(int(match[1]), int(match[2]) / 1e6, match[3], match[4]) if match else None


class Writer:
    """Writes the events of one stream, each of `size` bytes."""

    def __init__(self, size: int, version: str) -> None:
        self._size = size
        self._version = version
        self._digest = blake2b(digest_size=8)
        self._number = 0

    def event(self, sent: float) -> bytes:
        """The next event. `sent`: seconds from the request to now."""
        microseconds = min(round(sent * 1e6), 10**10 - 1)
        text = f"{self._number:06d} {microseconds:010d} {self._digest.hexdigest()} {self._version} ".encode()
        padding = b"." * (self._size - len(_BEFORE) - len(text) - len(_AFTER))
        event = b"".join((_BEFORE, text, padding, _AFTER))
        self._digest.update(event)
        self._number += 1
        return event

    def end(self) -> bytes:
        return _END


def is_unaltered(payload: bytes, size: int, marks: Sequence[Mark], *, ended: bool) -> bool:
    """Whether `payload`, apart from comments, is exactly what the probe has sent: the events with these `marks`."""
    if not marks:
        return True
    writer = Writer(size, marks[0].version)
    expected = b"".join(writer.event(mark.sent) for mark in marks)
    if ended:
        expected += writer.end()
    return _COMMENT.sub(b"", payload) == expected
