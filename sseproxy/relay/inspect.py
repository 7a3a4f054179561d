"""Inspectors: they get the bytes of a body after these have been forwarded, and find out what they mean.

They record the meaning in the exchange, and tell the pump whether the bytes are progress.
"""

from __future__ import annotations

from ..errors import ExchangeError
from ..wire.deltas import DeltaMatcher, delta_matcher
from ..wire.dialects import Dialect, Form
from ..wire.extract import Gist
from ..wire.meaning import DELTA, NOTHING
from ..wire.sse import EventParser
from .exchange import Exchange

# So many matchers are made in a row without a match. If none of them has matched, the events of this stream differ too
# much, and no more matchers are made.
_TRIES = 8


class Inspector:
    """Inspects a body, and records its meaning in the exchange. This base class reads nothing: any byte is progress.

    An inspector can neither stop nor delay the bytes. It counts what it does not understand, and ignores it.
    """

    __slots__ = ("_exchange",)

    awaits_token = False
    """Whether the first token has still to come. Until then, only the first token is progress."""
    matcher: DeltaMatcher | None = None
    """Matches reads that are one delta like the last one. Such reads need not be passed to `look`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def look(self, payload: bytes, read_at: float) -> bool:
        """Inspects `payload`, which was read at `read_at` and has been forwarded. Returns whether it is progress."""
        return True

    def end(self) -> None:
        """Called when the body is complete."""

    @property
    def begun(self) -> bool:
        """Whether a line of a stream has come: a byte order mark can be only before it."""
        return True

    def failed(self) -> Inspector:
        """Called after an exception. Returns the inspector that replaces this one."""
        self._exchange.unread = "failed"
        return Inspector(self._exchange)

    def heartbeat(self) -> bytes:
        """The bytes of a heartbeat, or none if a heartbeat cannot be inserted here."""
        return b""

    def farewell(self, error: ExchangeError) -> bytes:
        """The bytes of an error event that ends the body, or none if an event cannot be inserted here."""
        return b""


class EventInspector(Inspector):
    """Follows an event stream only to know where its events begin and end. Its clients understand `form`."""

    __slots__ = ("_form", "_parser")

    def __init__(self, exchange: Exchange, parser: EventParser, form: Form) -> None:
        super().__init__(exchange)
        self._parser = parser
        self._form = form

    def look(self, payload: bytes, read_at: float) -> bool:
        self._parser.feed(payload)
        return True

    @property
    def begun(self) -> bool:
        return self._parser.begun

    def heartbeat(self) -> bytes:
        # It must not be inserted between a CR and its LF, because then the LF would be a blank line.
        parser = self._parser
        harmless = parser.at_boundary and not parser.in_line_end and not self._exchange.marker_seen
        return self._form.heartbeat if harmless else b""

    def farewell(self, error: ExchangeError) -> bytes:
        if not self._parser.at_boundary or self._exchange.marker_seen:
            return b""
        return self._form.farewell(error, self._exchange.events)


class StreamInspector(EventInspector):
    """Inspects an event stream in `dialect`. `max_event` is the limit in bytes of an event (`limits.event`)."""

    __slots__ = ("_matcher_made_at", "_read", "_text", "_tries", "awaits_token", "matcher")

    def __init__(self, exchange: Exchange, dialect: Dialect, max_event: int) -> None:
        parser = EventParser(dialect.max_event(max_event), dialect.members)
        super().__init__(exchange, parser, dialect.form)
        self._read = dialect.read
        self._text = dialect.text
        self.awaits_token = dialect.generates
        # How many more matchers may be made, and the number of events when the last one was made.
        self._tries = _TRIES
        self._matcher_made_at = 0
        self.matcher = None

    def look(self, payload: bytes, read_at: float) -> bool:
        exchange, parser = self._exchange, self._parser
        fresh, meaning = parser.fresh, NOTHING
        if self.matcher is not None and exchange.events > self._matcher_made_at:
            self._tries = _TRIES
        events = parser.feed(payload)
        for kind, data in events:
            if data is None:
                exchange.unread = "oversize"
            meaning = NOTHING if data is None else self._read(kind, data)
            exchange.happened(meaning, read_at)
        self.matcher = None
        if meaning is DELTA and len(events) == 1 and fresh and parser.fresh and self._tries:
            self._tries -= 1
            self._matcher_made_at = exchange.events
            self.matcher = delta_matcher(payload, self._text)
        if self.awaits_token:
            self.awaits_token = exchange.first_token_at is None
            return not self.awaits_token
        return bool(events)

    def failed(self) -> Inspector:
        # The parser has got all bytes so far, so it still knows where events begin and end.
        self._exchange.unread = "failed"
        return EventInspector(self._exchange, self._parser, self._form)


class JsonInspector(Inspector):
    """Inspects a JSON body in `dialect`."""

    __slots__ = ("_gist", "_read")

    def __init__(self, exchange: Exchange, dialect: Dialect) -> None:
        super().__init__(exchange)
        self._read = dialect.read
        self._gist = Gist(dialect.members)

    def look(self, payload: bytes, read_at: float) -> bool:
        self._gist.feed(payload)
        return True

    def end(self) -> None:
        text = self._gist.text()
        if text is None:
            self._exchange.unread = "oversize"
        else:
            self._exchange.usage = self._read(b"", text).usage
