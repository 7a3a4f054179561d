"""Removes usage events that sseproxy has requested, and not the client, from a stream.

A stream of chat completions or completions has usage only if the request has `stream_options.include_usage`. Then an
extra event before the end marker has it. If the client has not requested usage, this event is removed, and every other
byte passes unchanged. So the client receives the same stream as without sseproxy.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

from .meaning import NULL, UNREADABLE, filled
from .sse import BOM, LINE_END, EventParser, last_event_end

# A backend that does not know `stream_options` responds with one of these status codes, and names it in the body.
REFUSAL_STATUSES: Final = frozenset({400, 422})
REFUSED: Final = b"stream_options"

# An event may have usage. Many servers send `"usage": null` in all other events.
_USAGE: Final = re.compile(rb'"usage"(?!\s*:\s*null)')
# Bytes. A usage event is below 1 KiB, so a larger event is another one.
_MAX_HELD: Final = 64 * 1024

# The blank line that ends an event, with the end of the line before it.
_EVENT_END: Final = re.compile(rb"\n(?:\r\n?|\n)|\r\n(?:\r\n?|\n)|\r\r\n?")
# Comments and blank lines before an event.
_BETWEEN: Final = re.compile(rb"(?:(?::[^\r\n]*+)?(?:\r\n|\n|\r))+")
# The first byte of an event's data.
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
    """Removes usage events from a stream. `feed` takes the bytes of the stream, however they are split.

    The bytes of an event that may be a usage event are held until the event is complete, or until it is clear that it
    is another one.
    """

    __slots__ = ("_after_cr", "_first", "_held", "_in_comment", "_in_line", "_passing")

    def __init__(self) -> None:
        # The first bytes of the stream, as long as they may be a byte order mark. Then None.
        self._first: bytes | None = b""
        # The bytes of the current event that are held, or whether the event is forwarded as it arrives.
        self._held = bytearray()
        self._passing = False
        # Whether the last line of the current event, or of a comment before it, is not complete.
        self._in_line = False
        self._in_comment = False
        # If the last byte was a CR: what was done with its line. An LF after it is a part of the same line end.
        self._after_cr: Literal["", "held", "forwarded", "dropped"] = ""

    def feed(self, payload: bytes) -> bytes:
        """The bytes to forward now, from held bytes and `payload`. `payload` itself if nothing is changed."""
        if (
            # A fast path for nearly every read: one event with one data line.
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
        """Whether the next byte begins an event, or a line between events."""
        return not (self._held or self._passing or self._in_comment)

    def end(self) -> bytes:
        """The bytes that are held, at the end of the stream: the current event will not be complete."""
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
        """Skips bytes that certainly do not belong to a usage event. Returns the position after them."""
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
        """Handles the bytes of one event in `payload`. Returns the position after them, and what was done with them."""
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
            other = _begins_json(self._held) or (data is not None and data[1] != b"{")
            if other or len(self._held) > _MAX_HELD:
                self._passing = True
                out += self._held
                self._held.clear()
        return len(payload), "forwarded" if self._passing else "held"


def _begins_json(event: bytes | bytearray) -> bool:
    return event.lstrip(b" \t")[:1] in (b"{", b"[")


def _end_event(event: bytes, out: bytearray) -> Literal["forwarded", "dropped"]:
    """Adds the complete `event` to `out`, unless it is a usage event."""
    possible = len(event) <= _MAX_HELD and not _begins_json(event) and _USAGE.search(event)
    # After an empty line, the parser does not take the first bytes for a byte order mark.
    whole = event if event.startswith(b"data:") else b"\n" + event
    events = EventParser(_MAX_HELD).feed(whole) if possible else []
    if not any(data is not None and _tells_only_usage(data) for _, data in events):
        out += event
        return "forwarded"
    # Comments between the lines of an event do not belong to it, so they are forwarded.
    for line in event.splitlines(keepends=True):
        if line.startswith(b":"):
            out += line
    return "dropped"
