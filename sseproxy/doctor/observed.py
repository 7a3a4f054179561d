"""What was observed of a hop, as plain data."""

from __future__ import annotations

from typing import Literal

import msgspec

End = Literal["complete", "fin", "reset", "unread"]
"""How a response body ended: by its framing, by a FIN or a reset before that; or it was not read to its end."""


class Event(msgspec.Struct, frozen=True, array_like=True):
    """An event of generated text. Times are in seconds from the request; `sent` by the clock of the probe, if known."""

    sent: float | None
    received: float
    size: int


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """A response. Times are in seconds from the request."""

    status: int = 0
    """0 if no response head was received."""
    version: str = ""
    fields: dict[str, str] = {}
    """The header fields, by their names in lower case."""
    head_at: float | None = None
    events: list[Event] = []
    end: End = "unread"
    ended_at: float = 0.0
    comments: int = 0
    rewritten: bool = False
    """The bytes of the body are not those that the probe has sent."""
    garbled: bool = False
    """Events are missing, double, changed, or in another order."""
    error_event: bool = False
    """The stream reports an error in an event of its own."""
    asked_in: str = ""
    """The version of HTTP in which the probe was asked."""
    message: str = ""
    """The beginning of an answer that is not a stream."""

    @property
    def intact(self) -> bool:
        return self.status == 200 and self.end == "complete" and not self.error_event


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """Three streams with a silence of so many `seconds`: before the head, between two events, and with heartbeats."""

    seconds: float
    before: Stream
    quiet: Stream
    beats: Stream | None = None
    """Only asked for if the second one was cut."""
    every: float = 0.0
    """Seconds between two heartbeats."""


Moment = Literal["before the head", "in mid-stream"]


class Leaving(msgspec.Struct, frozen=True, kw_only=True):
    """A client that left while the probe was silent, and how long after it the probe noticed it."""

    when: Moment
    silent: float
    """How long after the client had left the probe sent again."""
    noticed: float | None = None
    """None if the probe sent its stream to the end."""


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """A large request. The client sends its second half only after a pause."""

    size: int
    status: int
    pause: float = 0.0
    took: float = 0.0
    """Seconds from the head to the last byte, as the probe received them."""
    accepted: int = 0
    refused: int | None = None
    """The largest size that was accepted and the smallest that was refused; None if none was."""
    message: str = ""


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """All that was observed at one URL."""

    url: str
    probed: bool = True
    """Whether a probe answers there, and not an API."""
    steady: Stream
    following: Stream | None = None
    """The answer to the next request, on the same connection if that could be used again: two events."""
    again: Stream | None = None
    """A second stream with another pace, if the first one was in doubt."""
    slow: Stream | None = None
    """A third one with a slow pace."""
    lag: float = 0.0
    """How late the timers of client and probe fired during the first stream, in seconds; the 90th percentile."""
    deaths: dict[Literal["fin", "reset"], Stream] = {}
    """Streams whose origin died in the middle."""
    leaving: list[Leaving] = []
    silence: Silence | None = None
    upload: Upload | None = None
    reused: bool | None = None
    """Whether a second request could be sent on the same connection."""
    continued: bool | None = None
    """Whether `Expect: 100-continue` was answered before the body was sent."""
