"""Server-sent events, as WHATWG defines their interpretation, from bytes and in bytes.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

The parser reads along with a stream that is forwarded elsewhere: it never holds the stream back, keeps at most one
event, and gives up on the content of an event above its limit but not on the stream.
"""

from __future__ import annotations

import re
from typing import Final

LINE_END: Final = re.compile(rb"\r\n|\n|\r")
BOM: Final = b"\xef\xbb\xbf"

# Of a line above the limit so much is kept as tells data, another field and a comment apart.
_LINE_STUB: Final = 16

Event = tuple[bytes, bytes | None]
"""(type, data): the type is `b""` where the stream names none, the data is None where the event was above the limit."""


class EventParser:
    """Turns the bytes of an event stream into events; `feed` takes them in any split.

    `limit` bounds the bytes that are kept. `comments` counts comment lines, `oversize` the events whose content was
    let go. A last event without its blank line is not one (the specification drops it, and so do the SDKs).
    """

    __slots__ = (
        "_after_cr",
        "_data",
        "_data_lines",
        "_has_field",
        "_line",
        "_line_cut",
        "_over",
        "_start",
        "_type",
        "comments",
        "limit",
        "oversize",
    )

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.comments = 0
        self.oversize = 0
        self._line = bytearray()
        self._line_cut = False
        self._after_cr = False
        self._start = True
        self._data = bytearray()
        self._data_lines = 0
        self._type = b""
        self._over = False
        self._has_field = False

    @property
    def at_boundary(self) -> bool:
        """True where bytes of ours could be put into the stream without becoming part of one of its events."""
        return not (self._has_field or self._line)

    @property
    def fresh(self) -> bool:
        """True where the next byte begins an event, and nothing before it matters to that."""
        return not (self._has_field or self._line or self._after_cr or self._start)

    def feed(self, payload: bytes) -> list[Event]:
        """The events that `payload` completes, in order."""
        if (
            # The shape of nearly every read of an LLM stream: one event of one data line.
            payload[:5] == b"data:"
            and payload[-2:] == b"\n\n"
            and not self._line
            and not self._has_field
            and payload.find(b"\n") == len(payload) - 2
            and b"\r" not in payload
            and len(payload) <= self.limit
        ):
            self._after_cr = self._start = False
            return [(b"", payload[6 if payload[5] == 0x20 else 5 : -2])]
        return self._walk(payload)

    def _walk(self, payload: bytes) -> list[Event]:
        if not payload:
            return []
        if self._after_cr and payload[0] == 0x0A:
            # The CR that ended the last line was one half of a CRLF.
            payload = payload[1:]
        events: list[Event] = []
        pos = 0
        for end in LINE_END.finditer(payload):
            event = self._end_line(payload[pos : end.start()])
            if event is not None:
                events.append(event)
            pos = end.end()
        self._after_cr = payload.endswith(b"\r")
        if pos < len(payload):
            self._keep(payload[pos:])
        return events

    def _keep(self, part: bytes) -> None:
        """Adds to the line that is being read, as long as there is room."""
        if len(self._line) + len(part) + len(self._type) + len(self._data) <= self.limit:
            self._line += part
        else:
            self._line_cut = True
            self._line = (self._line + part[:_LINE_STUB])[:_LINE_STUB]

    def _end_line(self, rest: bytes) -> Event | None:
        if self._line or len(rest) + len(self._type) + len(self._data) > self.limit:
            self._keep(rest)
            line = bytes(self._line)
            self._line.clear()
        else:
            line = rest
        cut, self._line_cut = self._line_cut, False
        if self._start:
            self._start = False
            line = line.removeprefix(BOM)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        if not name:
            self.comments += 1
            return None
        self._has_field = True
        value = value.removeprefix(b" ")
        if name == b"data":
            self._add_data(value, cut)
        elif name == b"event":
            self._type = b"" if cut else value
            self._over |= cut
        # `id` and `retry` concern reconnection: they are forwarded and mean nothing here.
        return None

    def _add_data(self, value: bytes, cut: bool) -> None:
        if self._data_lines:
            self._data += b"\n"
        self._data_lines += 1
        if cut or self._over or len(self._type) + len(self._data) + len(value) > self.limit:
            self._over = True
            self._data.clear()
        else:
            self._data += value

    def _dispatch(self) -> Event | None:
        kind, data, lines, over = self._type, bytes(self._data), self._data_lines, self._over
        self._type, self._data_lines, self._over, self._has_field = b"", 0, False, False
        self._data.clear()
        if not lines:
            return None
        if over:
            self.oversize += 1
            return kind, None
        return kind, data
