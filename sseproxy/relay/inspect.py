"""Inspectors: they get the bytes of a body after these have been forwarded, and find out what they mean.

They record the meaning in the exchange, and tell the pump whether the bytes are progress.
"""

from __future__ import annotations

from ..errors import ExchangeError
from ..wire.deltas import DeltaMatcher, delta_matcher
from ..wire.dialects import Dialect, Style
from ..wire.extract import Elements, Gist
from ..wire.headers import BodyKind, is_encoded
from ..wire.meaning import DELTA, NOTHING, REASONING
from ..wire.sse import EventParser
from .exchange import Exchange
from .heads import ResponseHead

# The first byte of JSON, with which no useful line of an event stream begins, and what may be before it.
_JSON_MARKS = (b"{", b"[")
_BEFORE_JSON = b" \t\r\n\xef\xbb\xbf"
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

    def error_event(self, error: ExchangeError) -> bytes:
        """The bytes of an error event that ends the body, or none if an event cannot be inserted here."""
        return b""


class EventInspector(Inspector):
    """Follows an event stream only to know where its events begin and end. Its clients understand `style`."""

    __slots__ = ("_parser", "_style")

    def __init__(self, exchange: Exchange, parser: EventParser, style: Style) -> None:
        super().__init__(exchange)
        self._parser = parser
        self._style = style

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
        return self._style.heartbeat if harmless else b""

    def error_event(self, error: ExchangeError) -> bytes:
        if not self._parser.at_boundary or self._exchange.marker_seen:
            return b""
        return self._style.error_event(error, self._exchange.events)


class StreamInspector(EventInspector):
    """Inspects a body that may be an event stream, in `dialect`. `max_event` is the limit in bytes of an event.

    The body decides what it is. If it begins as JSON it is JSON, whatever the request and the Content-Type say. If
    these do not say that it is a stream, it is one from its first event on.
    """

    __slots__ = (
        "_begun",
        "_dialect",
        "_json",
        "_matcher_made_at",
        "_read",
        "_text",
        "_tries",
        "awaits_token",
        "matcher",
    )

    def __init__(self, exchange: Exchange, dialect: Dialect, max_event: int) -> None:
        parser = EventParser(max_event, dialect.members)
        super().__init__(exchange, parser, dialect.style)
        self._dialect = dialect
        self._read = dialect.read
        self._text = dialect.text
        self._begun = False
        self._json: JsonInspector | None = None
        self.awaits_token = dialect.generates and exchange.is_stream
        # How many more matchers may be made, and the number of events when the last one was made.
        self._tries = _TRIES
        self._matcher_made_at = 0
        self.matcher = None

    def look(self, payload: bytes, read_at: float) -> bool:
        exchange, parser = self._exchange, self._parser
        fresh, meaning = parser.fresh, NOTHING
        if not self._begun:
            self._begin(payload)
        if self._json is not None:
            return self._json.look(payload, read_at)
        if self.matcher is not None and exchange.events > self._matcher_made_at:
            self._tries = _TRIES
        events = parser.feed(payload)
        if events and not exchange.events:
            exchange.streams()
        for kind, data in events:
            if data is None:
                exchange.unread = "oversize"
            meaning = NOTHING if data is None else self._read(kind, data)
            if meaning is not DELTA and data is not None:
                meaning = self._dialect.judged(meaning, data)
            exchange.happened(meaning, read_at)
        self.matcher = None
        if (meaning is DELTA or meaning is REASONING) and len(events) == 1 and fresh and parser.fresh and self._tries:
            self._tries -= 1
            self._matcher_made_at = exchange.events
            self.matcher = delta_matcher(payload, self._text)
        if self.awaits_token:
            self.awaits_token = exchange.first_token_at is None
            return not self.awaits_token
        return bool(events)

    def _begin(self, payload: bytes) -> None:
        """Finds out whether the body is JSON. What is blank tells nothing: it keeps the connection alive."""
        mark = payload.lstrip(_BEFORE_JSON)[:1]
        self._begun = bool(mark)
        if mark in _JSON_MARKS:
            self._json = JsonInspector(self._exchange, self._dialect)

    def end(self) -> None:
        exchange = self._exchange
        if self._json is not None:
            self._json.end()
        elif self._begun and not (exchange.events or self._parser.comments):
            exchange.unread = "unknown"

    def failed(self) -> Inspector:
        if self._json is not None:
            return self._json.failed()
        # The parser has got all bytes so far, so it still knows where events begin and end.
        self._exchange.unread = "failed"
        return EventInspector(self._exchange, self._parser, self._style)

    def heartbeat(self) -> bytes:
        return super().heartbeat() if self._json is None else b""

    def error_event(self, error: ExchangeError) -> bytes:
        return super().error_event(error) if self._json is None else b""


class JsonInspector(Inspector):
    """Inspects a JSON body in `dialect`: a response, or a list of what are events in a stream."""

    __slots__ = ("_dialect", "_elements", "_gist")

    def __init__(self, exchange: Exchange, dialect: Dialect) -> None:
        super().__init__(exchange)
        self._dialect = dialect
        self._gist: Gist | None = None
        self._elements: Elements | None = None

    def look(self, payload: bytes, read_at: float) -> bool:
        if self._elements is not None:
            return self._look_at_elements(self._elements, payload, read_at)
        if self._gist is None:
            payload = payload.lstrip(_BEFORE_JSON)
            mark = payload[:1]
            if mark == b"[" and self._dialect.generates and self._exchange.succeeded:
                self._exchange.streams()
                self._elements = Elements(self._dialect.members)
                return self._look_at_elements(self._elements, payload, read_at)
            if not mark:
                return True
            self._gist = Gist(self._dialect.members)
        self._gist.feed(payload)
        return True

    def _look_at_elements(self, elements: Elements, payload: bytes, read_at: float) -> bool:
        exchange = self._exchange
        found = elements.feed(payload)
        for text in found:
            exchange.happened(self._dialect.meaning_of(b"", text), read_at)
        return bool(found) or elements.given_up

    def end(self) -> None:
        exchange, elements = self._exchange, self._elements
        if elements is not None:
            if not elements.ended:
                exchange.unread = "oversize" if elements.too_much else "unknown"
            return
        text = self._gist.text() if self._gist is not None else b""
        if text is None:
            exchange.unread = "oversize"
            return
        meaning = self._dialect.meaning_of(b"", text)
        exchange.answered(meaning)
        if meaning.usage is not None or exchange.fetches or not exchange.succeeded:
            return
        if not meaning.understood:
            exchange.unread = "unknown"
        # One that is generated in the background is told with it later.
        exchange.lacks_usage = self._dialect.generates and not exchange.reported_error and meaning.kept_as is None


def inspector_of(
    method: str, head: ResponseHead, kind: BodyKind, dialect: Dialect, exchange: Exchange, max_event: int
) -> Inspector:
    """What reads the body after `head`, by what was asked with `method` and by the `kind` that it is labelled as."""
    # What another GET fetches was counted when it was generated.
    posted = method == "POST"
    if not (kind == "events" or posted or dialect.keeps):
        return Inspector(exchange)
    if is_encoded(head.fields):
        exchange.unread = "encoded"
        return Inspector(exchange)
    may_stream = exchange.is_stream or (dialect.generates and exchange.succeeded)
    if kind == "json" and not (may_stream and not isinstance(head.framing, int)):
        return JsonInspector(exchange, dialect)
    if may_stream and kind != "other":
        return StreamInspector(exchange, dialect, max_event)
    if posted and exchange.succeeded:
        exchange.unread = "unknown"
    return Inspector(exchange)
