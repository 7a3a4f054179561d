"""A parser of server-sent events, as WHATWG defines them. It works on bytes and does not decode text.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

The stream is forwarded elsewhere, so the parser never delays it. The parser keeps at most one event, and of a large
event only an extract. It skips the content of an event above the limit, and goes on with the next event.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from .extract import WHOLE, Extract, Members

LINE_END: Final = re.compile(rb"\r\n|\n|\r")
BOM: Final = b"\xef\xbb\xbf"

# Whole lines whose field is neither `data` nor `event`.
_OTHERS: Final = rb"(?:(?!data|event)[^\r\n]++(?:\r\n|\n|\r))*"
# The end of a line, and the bytes after it that need not be parsed line by line: other lines of the same event, then
# the blank line that ends it, and everything up to the next `data` or `event`.
_LINE_ENDS: Final = re.compile(rb"(?:\r\n|\n|\r)(%b)((?:[\r\n]++%b)*)" % (_OTHERS, _OTHERS))
_FIELD: Final = re.compile(rb"(?<![^\r\n])[^:\r\n]")

# Bytes that are kept of a line above the limit: enough to tell whether it is `data`, another field or a comment.
_LINE_STUB: Final = 16


def last_event_end(payload: bytes, start: int, limit: int) -> int:
    """The position of the last end of an event between `start` and `limit`, or 0 if no event ends there."""
    last = max(payload.rfind(ends, start, limit) for ends in (b"\n\n", b"\r\r", b"\n\r"))
    if last < 0:
        return 0
    end = last + 2
    return end + 1 if payload[end - 1 : end + 1] == b"\r\n" else end


Event = tuple[bytes, bytes | None]
"""(type, data). The type is `b""` if the event has none. The data is None if the event is larger than the limit.

With `members`, the data of a large event is an extract of it, and empty if it was not a JSON object.
"""


class Stripper(Protocol):
    """Removes something from a stream while it is forwarded."""

    def feed(self, payload: bytes) -> bytes:
        """What of `payload`, and of what was held before it, goes downstream now; `payload` itself if it all does."""

    def end(self) -> bytes:
        """What is held at the end of the stream."""


class MarkStripper:
    """Removes the byte order mark of a stream. The rest goes through `then`.

    The mark is only at the start of a stream. It is a part of the first line where something of ours came before it.
    """

    __slots__ = ("_first", "_then")

    def __init__(self, then: Stripper | None) -> None:
        # The first bytes, until they show whether they are a mark.
        self._first: bytes | None = b""
        self._then = then

    def feed(self, payload: bytes) -> bytes:
        if self._first is not None:
            payload = self._first + payload
            if len(payload) < len(BOM) and BOM.startswith(payload):
                self._first = payload
                return b""
            self._first = None
            payload = payload.removeprefix(BOM)
        return payload if self._then is None else self._then.feed(payload)

    def end(self) -> bytes:
        return (self._first or b"") + (b"" if self._then is None else self._then.end())


class EventParser:
    """Parses the bytes of an event stream into events. `feed` takes the bytes, however they are split.

    `limit` is the largest event in bytes. With `members`, less memory is used: of large data, only these members are
    extracted while it arrives. `comments` counts comment lines. `oversize` counts events above the limit, whose content
    was skipped. A last event without a blank line is dropped, as the specification and the SDKs do.
    """

    __slots__ = (
        "_after_cr",
        "_data",
        "_data_lines",
        "_extract",
        "_extracted",
        "_extracting",
        "_has_field",
        "_line",
        "_line_cut",
        "_members",
        "_over",
        "_room",
        "_start",
        "_type",
        "comments",
        "limit",
        "oversize",
    )

    def __init__(self, limit: int, members: Members | None = None) -> None:
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
        self._members = members
        # Bytes of a line, and of data, that are kept.
        self._room = limit if members is None else min(limit, WHOLE)
        self._extract: Extract | None = None
        # How many bytes were given to the extract, and whether the current line is given to it.
        self._extracted = 0
        self._extracting = False

    @property
    def at_boundary(self) -> bool:
        """Whether bytes can be inserted here without becoming a part of an event of the stream."""
        return not (self._has_field or self._line)

    @property
    def begun(self) -> bool:
        """True once a line has come: a byte order mark can be only before it."""
        return not self._start

    @property
    def in_line_end(self) -> bool:
        """Whether the last byte was a CR. An LF after it would be a part of the same line end."""
        return self._after_cr

    @property
    def fresh(self) -> bool:
        """Whether the next byte begins an event, and no earlier byte affects it."""
        return not (self._has_field or self._line or self._after_cr or self._start)

    def feed(self, payload: bytes) -> list[Event]:
        """The events that are complete with `payload`, in their order."""
        if (
            # A fast path for nearly every read of an LLM stream: one event with one data line.
            payload[:5] == b"data:"
            and payload[-2:] == b"\n\n"
            and not self._line
            and not self._has_field
            and payload.find(b"\n") == len(payload) - 2
            and b"\r" not in payload
            and len(payload) <= self._room
        ):
            self._after_cr = self._start = False
            return [(b"", payload[6 if payload[5] == 0x20 else 5 : -2])]
        return self._walk(payload)

    def _walk(self, payload: bytes) -> list[Event]:
        if not payload:
            return []
        if self._after_cr and payload[0] == 0x0A:
            # The CR at the end of the last read belongs to a CRLF.
            payload = payload[1:]
        events: list[Event] = []
        pos = 0
        for end in _LINE_ENDS.finditer(payload):
            start, after = end.span()
            event = self._end_line(payload[pos:start])
            if event is not None:
                events.append(event)
            others, blank = end[1], end[2]
            if others:
                self._skip(others)
            if blank:
                event = self._end_line(b"")
                if event is not None:
                    events.append(event)
                if len(blank) > 2:
                    self._skip(blank)
            pos = after
        self._after_cr = payload.endswith(b"\r")
        if pos < len(payload):
            self._keep(payload[pos:])
        return events

    def _skip(self, lines: bytes) -> None:
        """Skips comments, other fields, and blank lines after the end of an event."""
        if b":" in lines:
            self.comments += lines.startswith(b":") + lines.count(b"\n:") + lines.count(b"\r:")
        if not self._has_field:
            begun = lines[last_event_end(lines, 0, len(lines)) :].lstrip(b"\r\n")
            self._has_field = _FIELD.search(begun) is not None

    def _keep(self, part: bytes) -> None:
        """Adds `part` to the current line, as long as there is room."""
        line = len(self._line) + len(part)
        event = line + len(self._type) + len(self._data) + self._extracted
        if self._extracting:
            self._add_to_extract(part, len(part))
        elif self._line_cut:
            self._line = (self._line + part[:_LINE_STUB])[:_LINE_STUB]
        elif event <= self._room or (line <= self._room and event <= self.limit):
            self._line += part
        elif event <= self.limit and self._is_data(part):
            self._extract_line(part)
        else:
            self._line_cut = True
            self._line = (self._line + part[:_LINE_STUB])[:_LINE_STUB]

    def _end_line(self, rest: bytes) -> Event | None:
        if (
            self._line
            or self._extracting
            or len(rest) + len(self._type) + len(self._data) + self._extracted > self._room
        ):
            self._keep(rest)
            if self._extracting:
                self._extracting = False
                return None
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
        # `id` and `retry` are about reconnecting. They are forwarded like all bytes, and ignored here.
        return None

    def _add_data(self, value: bytes, cut: bool) -> None:
        if self._data_lines:
            self._data += b"\n"
        self._data_lines += 1
        if cut or self._over or len(self._type) + len(self._data) + len(value) + self._extracted > self.limit:
            self._let_go()
        elif len(self._data) + len(value) > self._room:
            self._add_to_extract(value, len(value))
        else:
            self._data += value

    def _let_go(self) -> None:
        """Skips the content of the current event, because it is above the limit."""
        self._over = True
        self._data.clear()
        self._extract = None

    def _is_data(self, part: bytes) -> bool:
        """Whether the current line, which continues with `part`, is a data line."""
        line = bytes(self._line[:_LINE_STUB]) + part[:_LINE_STUB]
        return (line.removeprefix(BOM) if self._start else line).startswith(b"data:")

    def _extract_line(self, part: bytes) -> None:
        """Starts to extract the current data line, which continues with `part`, instead of keeping it."""
        line = bytes(self._line) + part
        self._line.clear()
        if self._start:
            self._start = False
            line = line.removeprefix(BOM)
        if self._data_lines:
            self._data += b"\n"
        self._data_lines += 1
        self._extracting = self._has_field = True
        self._add_to_extract(line[5:].removeprefix(b" "), len(line))

    def _add_to_extract(self, value: bytes, size: int) -> None:
        """Gives `value` to the extract: data of a large event, which took `size` bytes of the stream."""
        self._extracted += len(self._data) + size
        if self._over or len(self._type) + self._extracted > self.limit:
            self._let_go()
            return
        if self._extract is None:
            assert self._members is not None
            self._extract = Extract(self._members)
        self._extract.feed(bytes(self._data))
        self._extract.feed(value)
        self._data.clear()

    def _dispatch(self) -> Event | None:
        kind, data, lines, over = self._type, bytes(self._data), self._data_lines, self._over
        self._type, self._data_lines, self._over, self._has_field = b"", 0, False, False
        self._data.clear()
        if self._extracted:
            extract, self._extract, self._extracted = self._extract, None, 0
            if extract is not None:
                extract.feed(data)
            over = extract is None or extract.too_much
            data = (extract.text() if extract is not None else None) or b""
        if not lines:
            return None
        if over:
            self.oversize += 1
            return kind, None
        return kind, data
