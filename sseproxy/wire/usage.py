"""Where a backend was asked for usage that the client did not ask for: keeping from the client what came only of that.

Chat completions and completions tell the usage of a stream only where `stream_options.include_usage` wants it, in an
event of its own before the end marker. The client sees what it would have seen: every other byte passes unchanged.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

from .meaning import NULL, UNREADABLE, filled
from .sse import BOM, LINE_END, EventParser, last_event_end

# How a backend answers that takes no `stream_options`: with one of these, naming it in the body.
REFUSAL_STATUSES: Final = frozenset({400, 422})
REFUSED: Final = b"stream_options"

# That an event may tell usage; many have a null there in every event.
_USAGE: Final = re.compile(rb'"usage"(?!\s*:\s*null)')
# An event that only tells usage is below 1 KiB; one above this is something else.
_MAX_HELD: Final = 64 * 1024

# The blank line that ends an event, with the end of the line before it.
_EVENT_END: Final = re.compile(rb"\n(?:\r\n?|\n)|\r\n(?:\r\n?|\n)|\r\r\n?")
# What is before an event and no part of it.
_BETWEEN: Final = re.compile(rb"(?:(?::[^\r\n]*+)?(?:\r\n|\n|\r))+")
# The first byte of an event's data that tells what it is.
_FIRST_DATA: Final = re.compile(rb"(?<![^\r\n])data:[ \t]*+([^ \t\r\n])")


class _Event(msgspec.Struct, gc=False):
    choices: list[dict[str, msgspec.Raw]] | None = None
    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


_decode_event: Final = msgspec.json.Decoder(_Event).decode


def _tells_only_usage(data: bytes) -> bool:
    """Whether there is usage, and no choice that says anything, whatever else there is but an error.

    Vendors put their own keys beside usage, leave the choices out, or have an empty one.
    """
    try:
        event = _decode_event(data)
    except UNREADABLE:
        return False
    return (
        bytes(event.usage) != b"null"
        and not filled(event.error)
        and not any(filled(said) for choice in event.choices or () for key, said in choice.items() if key != "index")
    )


class UsageStripper:
    """Takes the events that only tell usage out of a stream; `feed` takes the stream's bytes in any split.

    Of an event that may be one of those, what has come of it is held until it is whole, or has shown to be another.
    """

    __slots__ = ("_after_cr", "_first", "_held", "_in_comment", "_in_line", "_passing")

    def __init__(self) -> None:
        # The first bytes of the stream, until they show whether they are a byte order mark.
        self._first: bytes | None = b""
        # What has come of an event, or that it is forwarded as it comes.
        self._held = bytearray()
        self._passing = False
        # Whether its last line, or a comment before it, has no end yet.
        self._in_line = False
        self._in_comment = False
        # What became of the line whose CR was the last byte so far: an LF that comes next is a part of it.
        self._after_cr: Literal["", "held", "forwarded", "dropped"] = ""

    def feed(self, payload: bytes) -> bytes:
        """What of `payload`, and of what was held before it, goes downstream now; `payload` itself if it all does."""
        if (
            # The shape of nearly every read: one event of one data line.
            payload[:5] == b"data:"
            and payload[-2:] == b"\n\n"
            and not self._first
            and self._between
            and payload.find(b"\n") == len(payload) - 2
            and b"\r" not in payload
            and not _USAGE.search(payload)
        ):
            self._after_cr = ""
            self._first = None
            return payload
        out = self._walk(payload) if self._first is None else self._begin(self._first + payload)
        return payload if out == payload else bytes(out)

    @property
    def _between(self) -> bool:
        """Whether the next byte begins an event, or a line before one."""
        return not (self._held or self._passing or self._in_comment)

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
        at, size = 0, len(payload)
        if self._after_cr and payload[:1] == b"\n":
            at = 1
            if self._after_cr != "dropped":
                to = out if self._after_cr == "forwarded" else self._held
                to += b"\n"
        if payload:
            self._after_cr = ""
        while at < size:
            begun = at
            if self._in_comment:
                line = LINE_END.search(payload, at)
                at = line.end() if line else size
                self._in_comment = line is None
            elif self._between:
                at = self._pass_others(payload, at)
            if at > begun:
                out += payload[begun:at]
                became: Literal["held", "forwarded", "dropped"] = "forwarded"
            else:
                at, became = self._event(payload, at, out)
            if at == size and payload.endswith(b"\r"):
                self._after_cr = became
        return out

    def _pass_others(self, payload: bytes, at: int) -> int:
        """Where what is certainly no part of an event that only tells usage ends; `at` itself if there is nothing."""
        usage = _USAGE.search(payload, at)
        end = last_event_end(payload, at, usage.start() if usage else len(payload))
        if end:
            return end
        others = _BETWEEN.match(payload, at)
        if others is not None:
            return others.end()
        if payload[at] == 0x3A:
            self._in_comment = True
            return len(payload)
        return at

    def _event(self, payload: bytes, at: int, out: bytearray) -> tuple[int, Literal["held", "forwarded", "dropped"]]:
        """Takes what `payload` has of an event; returns where that ends, and what became of it."""
        begun = bool(self._held) or self._passing
        end = LINE_END.match(payload, at) if begun and not self._in_line else None
        end = end or _EVENT_END.search(payload, at)
        to = out if self._passing else self._held
        to += payload[at : end.end() if end else len(payload)]
        if end is not None:
            event = bytes(self._held)
            self._held.clear()
            self._in_line = self._passing = False
            return end.end(), _end_event(event, out)
        self._in_line = payload[-1] not in b"\r\n"
        if not self._passing:
            data = _FIRST_DATA.search(self._held)
            # What begins as JSON is no event, whatever it is labelled as.
            other = self._held[0] in b"{[" or (data is not None and data[1] != b"{")
            if other or len(self._held) > _MAX_HELD:
                self._passing = True
                out += self._held
                self._held.clear()
        return len(payload), "forwarded" if self._passing else "held"


def _end_event(event: bytes, out: bytearray) -> Literal["forwarded", "dropped"]:
    """What was held of an event, which is whole, goes to `out` unless it only tells usage."""
    possible = _USAGE.search(event)
    # An empty line tells the parser that this is not where a byte order mark could be.
    whole = event if event.startswith(b"data:") else b"\n" + event
    events = EventParser(_MAX_HELD).feed(whole) if possible else []
    if not any(data is not None and _tells_only_usage(data) for _, data in events):
        out += event
        return "forwarded"
    # Comments are of nobody's event.
    for line in event.splitlines(keepends=True):
        if line.startswith(b":"):
            out += line
    return "dropped"
