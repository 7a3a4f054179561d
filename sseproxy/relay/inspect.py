"""Inspectors: what reads along with a body that is forwarded elsewhere.

They tell the exchange what they read, and the pump whether it is progress.
"""

from __future__ import annotations

from ..errors import ExchangeError
from ..wire.alike import Alike, alike
from ..wire.dialects import Dialect
from ..wire.extract import Elements, Gist
from ..wire.meaning import DELTA, NOTHING, REASONING
from ..wire.sse import EventParser
from .exchange import Exchange

# What JSON begins with, and no line of an event stream that means something does; and what may be before it.
_JSON_MARKS = (b"{", b"[")
_BEFORE_JSON = b" \t\r\n\xef\xbb\xbf"
# A stream whose events have not been alike for so many is none whose events are.
_TRIES = 8


class Inspector:
    """Reads along with a body, and tells the exchange what it meant. This one reads nothing: any byte is progress.

    It can neither stop nor delay the bytes: what it cannot follow it counts, and lets go.
    """

    __slots__ = ("_exchange",)

    awaits_token = False
    """Whether the body has a first token, which is the first progress."""
    alike: Alike | None = None
    """Recognises reads that are like the one that was looked at last, and need not be: each is another delta."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def look(self, payload: bytes, read_at: float) -> bool:
        """`payload` was written downstream, read from the upstream at `read_at`. Returns whether it is progress."""
        return True

    def end(self) -> None:
        """The body is complete."""

    def failed(self) -> Inspector:
        """What looks on where this one raised an exception."""
        self._exchange.unread = "failed"
        return Inspector(self._exchange)

    def heartbeat(self) -> bytes:
        """What may be forwarded now to show that the body goes on; empty where nothing may."""
        return b""

    def farewell(self, error: ExchangeError) -> bytes:
        """What may still be forwarded to say that `error` ends the body; empty where nothing can be understood."""
        return b""


class EventInspector(Inspector):
    """An event stream in `dialect`, of which only is known where its events begin and end."""

    __slots__ = ("_numbered", "_parser")

    def __init__(self, exchange: Exchange, parser: EventParser, *, numbered: bool) -> None:
        super().__init__(exchange)
        self._parser = parser
        self._numbered = numbered

    def look(self, payload: bytes, read_at: float) -> bool:
        self._parser.feed(payload)
        return True

    def heartbeat(self) -> bytes:
        # One line and no blank one: with a blank line, openai for Python fails on streams that have used `id`. Put
        # between a CR and its LF, it would make that LF a blank line.
        parser = self._parser
        harmless = parser.at_boundary and not parser.in_line_end and not self._exchange.marker_seen
        return b": heartbeat\n" if harmless else b""

    def farewell(self, error: ExchangeError) -> bytes:
        if not self._parser.at_boundary or self._exchange.marker_seen:
            return b""
        return error.event(self._exchange.events if self._numbered else None)


class StreamInspector(EventInspector):
    """An event stream in `dialect`; of an event, at most `max_event` bytes.

    The body decides what it is: one that begins as JSON is JSON, whatever was asked for and whatever its label. Where
    these do not tell that it is a stream, it is one from its first event on.
    """

    __slots__ = (
        "_alike_since",
        "_begun",
        "_dialect",
        "_json",
        "_read",
        "_text",
        "_tries",
        "alike",
        "awaits_token",
    )

    def __init__(self, exchange: Exchange, dialect: Dialect, max_event: int) -> None:
        parser = EventParser(max_event, dialect.members)
        super().__init__(exchange, parser, numbered=dialect.numbered)
        self._dialect = dialect
        self._read = dialect.read
        self._text = dialect.text
        self._begun = False
        self._json: JsonInspector | None = None
        self.awaits_token = dialect.generates and exchange.is_stream
        # For how many events more it is worth to make an `alike`, and how many there had been at the last one.
        self._tries = _TRIES
        self._alike_since = 0
        self.alike = None

    def look(self, payload: bytes, read_at: float) -> bool:
        exchange, parser = self._exchange, self._parser
        fresh, meaning = parser.fresh, NOTHING
        if not fresh and (self._json is not None or self._is_json(payload)):
            assert self._json is not None
            return self._json.look(payload, read_at)
        if self.alike is not None and exchange.events > self._alike_since:
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
        self.alike = None
        if (meaning is DELTA or meaning is REASONING) and len(events) == 1 and fresh and parser.fresh and self._tries:
            self._tries -= 1
            self._alike_since = exchange.events
            self.alike = alike(payload, self._text)
        if self.awaits_token:
            self.awaits_token = exchange.first_token_at is None
            return not self.awaits_token
        return bool(events)

    def _is_json(self, payload: bytes) -> bool:
        """Whether the body is JSON, if `payload` is its beginning."""
        if not self._begun:
            mark = payload.lstrip(_BEFORE_JSON)[:1]
            self._begun = bool(mark)
            if mark in _JSON_MARKS:
                self._json = JsonInspector(self._exchange, self._dialect)
        return self._json is not None

    def end(self) -> None:
        exchange = self._exchange
        if self._json is not None:
            self._json.end()
        elif self._begun and not (exchange.events or self._parser.comments):
            exchange.unread = "unknown"

    def failed(self) -> Inspector:
        if self._json is not None:
            return self._json.failed()
        # The parser has had all that came: where the stream stands is known.
        self._exchange.unread = "failed"
        return EventInspector(self._exchange, self._parser, numbered=self._numbered)

    def heartbeat(self) -> bytes:
        return super().heartbeat() if self._json is None else b""

    def farewell(self, error: ExchangeError) -> bytes:
        return super().farewell(error) if self._json is None else b""


class JsonInspector(Inspector):
    """A JSON body in `dialect`: an answer, or a list of what are events in a stream."""

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
            mark = payload.lstrip(_BEFORE_JSON)[:1]
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
