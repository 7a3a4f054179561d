"""Where a backend was asked for usage that the client did not ask for: keeping from the client what came only of that.

Chat completions and completions tell the usage of a stream only where `stream_options.include_usage` wants it, in an
event of its own before the end marker. The client sees what it would have seen: every other byte passes unchanged.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

from .meaning import UNREADABLE
from .sse import BOM, LINE_END, EventParser

# How a backend answers that takes no `stream_options`: with one of these, naming it in the body.
REFUSAL_STATUSES: Final = frozenset({400, 422})
REFUSED: Final = b"stream_options"

_NULL: Final = b"null"
_EMPTY_CHOICES: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
# All that an event which only tells usage may have; one with anything else was not sent for the sake of usage alone.
_KEYS: Final = frozenset(
    "id object created model system_fingerprint service_tier obfuscation timings usage choices".split()
)
# An event that only tells usage is below 1 KiB; one above this is something else.
_MAX_HELD: Final = 64 * 1024

_decode_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _tells_only_usage(data: bytes) -> bool:
    if not _EMPTY_CHOICES.search(data):
        return False
    try:
        event = _decode_object(data)
    except UNREADABLE:
        return False
    choices = bytes(event.get("choices", _NULL)).translate(None, b" \t\r\n")
    return choices == b"[]" and bytes(event.get("usage", _NULL)) != _NULL and event.keys() <= _KEYS


class UsageStripper:
    """Takes the events that only tell usage out of a stream; `feed` takes the stream's bytes in any split.

    Of an event that may be one of those, what has come of it is held until it is whole, or has shown to be another.
    """

    __slots__ = ("_after_cr", "_comment", "_first", "_held", "_in_line", "_line_at", "_passing")

    def __init__(self) -> None:
        # The first bytes of the stream, until they show whether they are a byte order mark.
        self._first: bytes | None = b""
        self._held = bytearray()
        self._line_at = 0
        self._in_line = False
        self._comment = False
        self._passing = False
        # What became of the line whose CR was the last byte so far: an LF that comes next is a part of it.
        self._after_cr: Literal["", "held", "forwarded", "dropped"] = ""

    def feed(self, payload: bytes) -> bytes:
        """What of `payload`, and of what was held before it, goes downstream now; `payload` itself if it all does."""
        if (
            # The shape of nearly every read: one event of one data line.
            payload[:5] == b"data:"
            and payload[-2:] == b"\n\n"
            and not self._first
            and not self._held
            and not self._in_line
            and not self._passing
            and payload.find(b"\n") == len(payload) - 2
            and b"\r" not in payload
            and not _EMPTY_CHOICES.search(payload)
        ):
            self._after_cr = ""
            self._first = None
            return payload
        out = self._walk(payload) if self._first is None else self._begin(self._first + payload)
        return payload if out == payload else bytes(out)

    def end(self) -> bytes:
        """What is held of an event that will not become whole."""
        held = (self._first or b"") + bytes(self._held)
        self._held.clear()
        return held

    def _begin(self, payload: bytes) -> bytes:
        if len(payload) < len(BOM) and BOM.startswith(payload):
            self._first = payload
            return b""
        self._first = None
        mark = BOM if payload.startswith(BOM) else b""
        return mark + self._walk(payload[len(mark) :])

    def _walk(self, payload: bytes) -> bytearray:
        out = bytearray()
        start = 0
        if self._after_cr and payload[:1] == b"\n":
            start = 1
            if self._after_cr != "dropped":
                to = out if self._after_cr == "forwarded" else self._held
                to += b"\n"
        if payload:
            self._after_cr = ""
        for end in LINE_END.finditer(payload, start):
            self._add(payload[start : end.start()], out)
            fate = self._end_line(end[0], out)
            start = end.end()
            if start == len(payload) and end[0] == b"\r":
                self._after_cr = fate
        self._add(payload[start:], out)
        return out

    def _add(self, part: bytes, out: bytearray) -> None:
        """`part` belongs to the line that has begun, or begins one."""
        if not part:
            return
        if not self._in_line:
            self._in_line = True
            self._line_at = len(self._held)
            self._comment = part[0] == 0x3A and not self._held
        if self._passing or self._comment:
            out += part
            return
        self._held += part
        if len(self._held) > _MAX_HELD or self._shows_no_object():
            self._passing = True
            out += self._held
            self._held.clear()

    def _shows_no_object(self) -> bool:
        """Whether the first data of the event does not begin as an object does."""
        line = self._held[self._line_at : self._line_at + 64]
        data = line[5:].lstrip(b" \t") if line.startswith(b"data:") else b""
        return bool(data) and data[0] != 0x7B and b"data:" not in self._held[: self._line_at]

    def _end_line(self, end: bytes, out: bytearray) -> Literal["held", "forwarded", "dropped"]:
        blank, self._in_line = not self._in_line, False
        if blank and self._held:
            return self._end_event(end, out)
        forwarded = self._passing or self._comment or blank
        to = out if forwarded else self._held
        to += end
        self._comment = False
        if blank:
            self._passing = False
        return "forwarded" if forwarded else "held"

    def _end_event(self, end: bytes, out: bytearray) -> Literal["forwarded", "dropped"]:
        """The event that is held is whole."""
        event = bytes(self._held) + end
        self._held.clear()
        # The empty line tells the parser that this is not where a byte order mark could be.
        events = EventParser(_MAX_HELD).feed(b"\n" + event)
        if any(data is not None and _tells_only_usage(data) for _, data in events):
            # Comments are of nobody's event.
            for line in event.splitlines(keepends=True):
                if line.startswith(b":"):
                    out += line
            return "dropped"
        out += event
        return "forwarded"
