"""Extracts a few members of a large JSON text as it arrives, in bounded time and memory.

A small text is decoded as a whole by the caller. Of a large one, only an `Extract` is decoded: the same object with
only the wanted members, and with long values replaced. The text may arrive in parts of any size. Whatever it contains,
the work for a part is bounded, no part is kept, and nothing recurses.

Unwanted values are skipped by counting their brackets. So a text is accepted as JSON if its strings end, its brackets
are balanced, and the parts that were parsed are JSON.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Final

import msgspec
from msgspec.inspect import ListType, StructType, Type, UnionType, type_info

WHOLE: Final = 16 * 1024
"""The largest text in bytes that is decoded as a whole. To decode it takes at most a few milliseconds."""

# Bytes of a value that is kept. Of a longer one, it is only known that it is not empty. A usage object is below 1 KiB.
_MAX_VALUE: Final = 2 * 1024
# Replaces a longer value: it is not empty, and neither a string nor a number.
_SOMETHING: Final = b"[0]"
# Bytes of a name or a number: as many digits as Python accepts for an integer.
_MAX_TOKEN: Final = 4300
# Items of a list that are parsed: the largest number of choices in OpenAI's API.
_MAX_ITEMS: Final = 128
# Members that are parsed in total. Each takes a few microseconds.
_MAX_MEMBERS: Final = 1024
_MAX_EXTRACT: Final = 64 * 1024

_SPACE: Final = re.compile(rb"[ \t\n\r]*+")
# The name of a member and its colon, if a value follows.
_NAME: Final = re.compile(rb'"([^"]*+)"[ \t\n\r]*+:[ \t\n\r]*+(?=[^ \t\n\r])')
_BEGINS_NAME: Final = re.compile(rb'"[^"]*+(?:"[ \t\n\r]*+(?::[ \t\n\r]*+)?)?')
_SCALAR: Final = re.compile(
    rb"(?:true|false|null|-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?+[0-9]++)?)(?=[ \t\n\r,\]}])"
)
_AFTER_SCALAR: Final = re.compile(rb"[ \t\n\r,\]}]")
_BRACKET_OR_QUOTE: Final = re.compile(rb'["\[\]{}]')
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
# Opening brackets are 1, closing ones -1.
_SIGNS: Final = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")
# What may be between two objects in a list.
_BETWEEN: Final = re.compile(rb"[ \t\n\r,]+")
_PIECE: Final = 1024
# Bytes that are skipped in one step at most, and bytes that are searched bracket by bracket.
_STEP, _FINE = 16 * 1024, 64


class Members(dict[bytes, "Wanted"]):
    """The wanted members of an object, by their names."""


class Items:
    """A list. `item` is what is wanted of each item."""

    def __init__(self, item: Wanted) -> None:
        self.item = item


Wanted = Members | Items | None
"""What is wanted of a value. None means the whole value."""


def wanted(*structs: type[msgspec.Struct]) -> Members:
    """The members that the decoders of `structs` read. If several structs have a member, the first one counts."""
    members = Members()
    for struct in reversed(structs):
        found = _wanted(type_info(struct))
        assert isinstance(found, Members)
        members |= found
    return members


def _wanted(kind: Type) -> Wanted:
    match kind:
        case StructType():
            return Members({field.encode_name.encode(): _wanted(field.type) for field in kind.fields})
        case ListType():
            return Items(_wanted(kind.item_type))
        case UnionType():
            return next((found for found in map(_wanted, kind.types) if found is not None), None)
    return None


# States: what is expected next.
_VALUE, _FIRST_MEMBER, _MEMBER, _FIRST_ITEM, _NEXT, _END = (
    "value",
    "first member",
    "member",
    "first item",
    "next",
    "end",
)
# States within a value: in a string, in a container that is skipped, in the items of a list above the limit.
_STRING, _PASSING, _TOO_MANY = "string", "passing", "too many"
_QUOTE, _COMMA, _OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_LIST, _CLOSE_LIST = b'",{}[]'


class Extract:
    """The wanted members of one object. `feed` takes its text, however it is split.

    Nothing may follow the object, unless it is `one_of` several.

    `spans` has the positions in the text of the wanted values of the outermost object; if a name occurs several times,
    those of the last one. `closed_at` is the position of the last bracket.
    """

    __slots__ = (
        "_broken",
        "_depth",
        "_items",
        "_kept",
        "_members",
        "_name",
        "_offset",
        "_one_of",
        "_open",
        "_out",
        "_passed",
        "_quoted",
        "_rest",
        "_sound",
        "_start",
        "_state",
        "_wanted",
        "closed_at",
        "spans",
        "too_much",
    )

    def __init__(self, members: Members, *, one_of: bool = False) -> None:
        self.spans: dict[bytes, tuple[int, int]] = {}
        self._one_of = one_of
        self.closed_at = 0
        self.too_much = False
        """Whether the text exceeds one of the limits."""
        self._broken = False
        self._out = bytearray()
        # The length of `_out` up to the end of its last complete value.
        self._sound = 0
        self._state = _VALUE
        # The last bytes, if they are an incomplete token, and the number of bytes before them.
        self._rest = b""
        self._offset = 0
        # What is wanted of the open containers. The numbers of items and of members so far.
        self._open: list[Members | Items] = []
        self._items = self._members = 0
        # The current value: the name of its member, what is wanted of it, whether it is skipped, where it begins, and
        # the bytes that are kept of it.
        self._name = b""
        self._wanted: Wanted = members
        self._passed = False
        self._start = 0
        self._kept: bytearray | None = None
        # In a value that is skipped: how many brackets are open, and whether the position is in a string.
        self._depth = 0
        self._quoted = False

    def feed(self, part: bytes) -> None:
        if self.given_up:
            return
        text = plain = self._rest + part
        if b"\\" in text:
            # Escapes are replaced by as many other bytes. So every remaining quotation mark begins or ends a string.
            plain = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")
            if plain.endswith(b"\\"):
                plain = plain[:-1]
        at = self._walk(text, plain)
        self._rest = text[at:]
        self._offset += at
        # After an error, the rest is not parsed, so its length does not matter.
        self.too_much |= len(self._rest) > _MAX_TOKEN and not self._broken

    @property
    def given_up(self) -> bool:
        """Whether the text is not an object, or exceeds a limit."""
        return self._broken or self.too_much

    def text(self) -> bytes | None:
        """The extract. None if the text so far is not one complete object, or exceeds a limit."""
        return bytes(self._out) if self._state is _END and not self.given_up else None

    def after(self) -> bytes | None:
        """The text after the end of one of several objects. None if the object has not ended."""
        return self._rest if self._state is _END else None

    def so_far(self) -> bytes:
        """The extract of the members so far. Only for wanted members that are not containers."""
        return bytes(self._out[: self._sound] or b"{") + b"}"

    def _walk(self, text: bytes, plain: bytes) -> int:
        """Parses `text`, and returns up to where. `plain` is the same text with its escapes replaced."""
        at, size = 0, len(plain)
        while at < size and not (self._broken or self.too_much or (self._one_of and self._state is _END)):
            state, byte = self._state, plain[at]
            if state is _STRING or state is _PASSING:
                end = plain.find(b'"', at) + 1 if state is _STRING else self._pass(plain, at)
                self._keep(text, at, end or size)
                if end:
                    self._finish(end)
                at = end or size
            elif state is _TOO_MANY:
                end = self._pass(plain, at)
                if end:
                    self._close(end)
                at = end or size
            elif byte in b" \t\n\r":
                found = _SPACE.match(plain, at)
                at = found.end() if found else at
            else:
                if state is _MEMBER or (state is _FIRST_MEMBER and byte != _CLOSE_OBJECT):
                    end = self._member(text, plain, at)
                elif state is _VALUE or (state is _FIRST_ITEM and byte != _CLOSE_LIST):
                    end = self._value(text, plain, at)
                else:
                    end = at + 1
                    self._punctuation(byte, end)
                if not end:
                    return at
                at = end
        return at

    def _member(self, text: bytes, plain: bytes, at: int) -> int:
        """Parses a name and its colon. Returns the position of the value, or 0 if it has not arrived yet."""
        named = _NAME.match(plain, at)
        if named is None:
            begun = _BEGINS_NAME.match(plain, at)
            if begun is None or begun.end() < len(plain):
                self._fail(begun.end() - at if begun else 0)
            return 0
        self._members += 1
        self.too_much = named.end() - at > _MAX_TOKEN or self._members > _MAX_MEMBERS
        name = _name(text[named.start(1) : named.end(1)])
        members = self._open[-1]
        if name is None or not isinstance(members, Members):
            self._broken = True
            return 0
        self._name, self._wanted, self._passed = name, members.get(name), name not in members
        if not self._passed:
            self._out += b'"%b":' % name if self._out.endswith(b"{") else b',"%b":' % name
        self._state = _VALUE
        return named.end()

    def _value(self, text: bytes, plain: bytes, at: int) -> int:
        """Parses a value, or the beginning of one. Returns where to go on, or 0 if the value is not complete."""
        byte, wanted = plain[at], self._wanted
        if byte == _OPEN_OBJECT and isinstance(wanted, Members):
            self._out += b"{"
            self._open.append(wanted)
            self._state = _FIRST_MEMBER
            return at + 1
        if not self._open:
            self._broken = True
            return 0
        if byte == _OPEN_LIST and isinstance(wanted, Items):
            self._out += b"["
            self._open.append(wanted)
            self._state, self._wanted = _FIRST_ITEM, wanted.item
            return at + 1
        end = at + 1
        if byte == _QUOTE:
            self._state = _STRING
        elif byte in (_OPEN_OBJECT, _OPEN_LIST):
            self._state, self._depth, self._quoted = _PASSING, 1, False
        else:
            scalar = _SCALAR.match(plain, at)
            if scalar is None:
                after = _AFTER_SCALAR.search(plain, at)
                if after is not None:
                    self._fail(after.start() - at)
                return 0
            end = scalar.end()
            self.too_much = end - at > _MAX_TOKEN
        self._start = self._offset + at
        self._kept = None if self._passed else bytearray()
        self._keep(text, at, end)
        if self._state is _VALUE or self._state is _FIRST_ITEM:
            self._finish(end)
        return end

    def _punctuation(self, byte: int, end: int) -> None:
        """Parses the byte after a value, or the closing bracket of an empty container."""
        container = self._open[-1] if self._open else None
        if container is not None and byte == (_CLOSE_OBJECT if isinstance(container, Members) else _CLOSE_LIST):
            self._close(end)
        elif self._state is not _NEXT or byte != _COMMA:
            self._broken = True
        elif isinstance(container, Items):
            self._items += 1
            if self._items < _MAX_ITEMS:
                self._out += b","
                self._state, self._wanted, self._passed = _VALUE, container.item, False
            else:
                self._state, self._depth, self._quoted = _TOO_MANY, 1, False
        else:
            self._state = _MEMBER

    def _close(self, end: int) -> None:
        """Closes the innermost container."""
        self._out += b"}" if isinstance(self._open.pop(), Members) else b"]"
        self.closed_at = self._offset + end - 1
        self._after_value()

    def _keep(self, text: bytes, at: int, end: int) -> None:
        if self._kept is not None:
            if len(self._kept) + end - at > _MAX_VALUE:
                self._kept = None
            else:
                self._kept += text[at:end]

    def _finish(self, end: int) -> None:
        """Ends the current value."""
        if not self._passed:
            self._out += _SOMETHING if self._kept is None else self._kept
            if len(self._open) == 1:
                self.spans[self._name] = self._start, self._offset + end
        self._after_value()

    def _after_value(self) -> None:
        self._sound = len(self._out)
        self._state = _NEXT if self._open else _END
        self.too_much |= len(self._out) > _MAX_EXTRACT

    def _fail(self, length: int) -> None:
        """A token of `length` bytes is not valid: it is too long, or the text is not JSON."""
        if length > _MAX_TOKEN:
            self.too_much = True
        else:
            self._broken = True

    def _pass(self, plain: bytes, at: int) -> int:
        """The position at which the skipped value ends, or 0 if it continues."""
        step = _FINE
        end = self._closes(plain[at : at + step])
        if end:
            return at + end
        at += step
        while at < len(plain):
            piece = plain[at : at + step]
            brackets = b"".join(piece.split(b'"')[self._quoted :: 2]).translate(_SIGNS, _NOT_BRACKETS)
            closing = brackets.count(b"\xff")
            if closing < self._depth or self._depth + min(accumulate(memoryview(brackets).cast("b"))) > 0:
                self._depth += len(brackets) - 2 * closing
                self._quoted ^= bool(piece.count(b'"') & 1)
                at += len(piece)
                step = min(2 * step, _STEP)
            elif len(piece) > _FINE:
                step = len(piece) // 2
            else:
                return at + self._closes(piece)
        return 0

    def _closes(self, piece: bytes) -> int:
        """The position in `piece` at which the skipped value ends, or 0 if it continues."""
        depth, quoted = self._depth, self._quoted
        for found in _BRACKET_OR_QUOTE.finditer(piece):
            mark = found[0]
            if mark == b'"':
                quoted = not quoted
            elif not quoted:
                depth += 1 if mark in b"[{" else -1
                if not depth:
                    return found.end()
        self._depth, self._quoted = depth, quoted
        return 0


def _name(raw: bytes) -> bytes | None:
    """The name in the JSON string `raw`. None if it is not valid Unicode."""
    try:
        text = raw.decode()
        return _decode_text(b'"%b"' % raw).encode() if "\\" in text else raw
    except UnicodeDecodeError:
        return None
    except msgspec.DecodeError:
        # Half of a surrogate pair, which JavaScript may write. No wanted name has one.
        return b""


_decode_text: Final = msgspec.json.Decoder(str).decode


class Gist:
    """Collects a JSON text that arrives in parts: the whole text if it is small, or else the wanted members."""

    __slots__ = ("_begun", "_members", "extract")

    def __init__(self, members: Members) -> None:
        self._members = members
        # One buffer, so a text that arrives in thousands of parts is not read more slowly.
        self._begun = bytearray()
        self.extract: Extract | None = None
        """The extract, if the text is large."""

    def feed(self, part: bytes) -> None:
        if self.extract is not None:
            self.extract.feed(part)
            return
        self._begun += part
        if len(self._begun) > WHOLE:
            self.extract = Extract(self._members)
            self.extract.feed(bytes(self._begun))
            self._begun.clear()

    def so_far(self) -> bytes:
        """The extract of the text so far, even if it is not valid after that."""
        extract = self.extract
        if extract is None:
            extract = Extract(self._members)
            extract.feed(bytes(self._begun))
        return extract.so_far()

    def text(self) -> bytes | None:
        """The small text, or the extract of the large one. None if it exceeds a limit; empty if it is not JSON."""
        if self.extract is None:
            return bytes(self._begun)
        return None if self.extract.too_much else self.extract.text() or b""


class Elements:
    """Extracts the objects in a list, one after the other, as they arrive. `feed` takes its text, however it is split.

    `given_up`: the list has something other than objects, or an object exceeds a limit.
    """

    __slots__ = ("_begun", "_extract", "_members", "ended", "given_up", "too_much")

    def __init__(self, members: Members) -> None:
        self._members = members
        self._begun = False
        self._extract: Extract | None = None
        self.ended = self.given_up = self.too_much = False

    def feed(self, part: bytes) -> list[bytes]:
        """The extracts of the objects that `part` completes, in order."""
        found: list[bytes] = []
        at = 0
        while at < len(part) and not (self.ended or self.given_up):
            extract = self._extract
            if extract is None:
                between = _BETWEEN.match(part, at)
                at = between.end() if between else at
                if self._begun and part.startswith(b"{}", at):
                    # A fast path: a read may have thousands of empty objects.
                    found.append(b"{}")
                    at += 2
                else:
                    at += self._begin(part[at : at + 1])
                continue
            # `after` copies what follows an object, so a piece is small.
            piece = part[at : at + _PIECE]
            extract.feed(piece)
            rest, text = extract.after(), extract.text()
            at += len(piece) - len(rest or b"")
            if extract.given_up:
                self.given_up, self.too_much = True, extract.too_much
            elif text is not None:
                found.append(text)
                self._extract = None
        return found

    def _begin(self, mark: bytes) -> int:
        """Takes `mark`, the byte at which the next item begins. Returns 0 if it belongs to an object, otherwise 1."""
        if not mark:
            return 0
        if self._begun and mark == b"{":
            self._extract = Extract(self._members, one_of=True)
            return 0
        self.ended = self._begun and mark == b"]"
        self.given_up = not self.ended and (self._begun or mark != b"[")
        self._begun = True
        return 1
