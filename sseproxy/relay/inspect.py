"""Inspectors: what reads along with a body that is forwarded elsewhere.

They tell the exchange what they read, and the pump whether it is progress.
"""

from __future__ import annotations

from ..errors import ExchangeError
from ..wire.alike import Alike, alike
from ..wire.dialects import Dialect
from ..wire.extract import Gist
from ..wire.meaning import DELTA, NOTHING
from ..wire.sse import EventParser
from .exchange import Exchange

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
    """An event stream in `dialect`; of an event, at most `max_event` bytes."""

    __slots__ = ("_alike_since", "_meaning_of", "_text", "_tries", "alike", "awaits_token")

    def __init__(self, exchange: Exchange, dialect: Dialect, max_event: int) -> None:
        parser = EventParser(max_event, dialect.members)
        super().__init__(exchange, parser, numbered=dialect.numbered)
        self._meaning_of = dialect.meaning_of
        self._text = dialect.text
        self.awaits_token = dialect.generates
        # For how many events more it is worth to make an `alike`, and how many there had been at the last one.
        self._tries = _TRIES
        self._alike_since = 0
        self.alike = None

    def look(self, payload: bytes, read_at: float) -> bool:
        exchange, parser = self._exchange, self._parser
        fresh, meaning = parser.fresh, NOTHING
        if self.alike is not None and exchange.events > self._alike_since:
            self._tries = _TRIES
        events = parser.feed(payload)
        for kind, data in events:
            if data is None:
                exchange.unread = "oversize"
            meaning = NOTHING if data is None else self._meaning_of(kind, data)
            exchange.happened(meaning, read_at)
        self.alike = None
        if meaning is DELTA and len(events) == 1 and fresh and parser.fresh and self._tries:
            self._tries -= 1
            self._alike_since = exchange.events
            self.alike = alike(payload, self._text)
        if self.awaits_token:
            self.awaits_token = exchange.first_token_at is None
            return not self.awaits_token
        return bool(events)

    def failed(self) -> Inspector:
        # The parser has had all that came: where the stream stands is known.
        self._exchange.unread = "failed"
        return EventInspector(self._exchange, self._parser, numbered=self._numbered)


class JsonInspector(Inspector):
    """A JSON body in `dialect`."""

    __slots__ = ("_gist", "_meaning_of")

    def __init__(self, exchange: Exchange, dialect: Dialect) -> None:
        super().__init__(exchange)
        self._meaning_of = dialect.meaning_of
        self._gist = Gist(dialect.members)

    def look(self, payload: bytes, read_at: float) -> bool:
        self._gist.feed(payload)
        return True

    def end(self) -> None:
        text = self._gist.text()
        if text is None:
            self._exchange.unread = "oversize"
        else:
            self._exchange.answered(self._meaning_of(b"", text))
