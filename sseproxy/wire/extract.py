"""What is wanted of a large JSON text, found as it comes, in bounded time and memory.

A small text is decoded whole, by whoever wants something of it. Of a large one only an `Extract` is: the same object
with nothing in it but what is wanted, and that cut to size. It is made from parts of any size, and whatever they hold,
the work for a part is bounded, no part is kept, and nothing recurses.

What is not wanted is passed over by counting its brackets. So a text is taken for JSON if its strings end, its brackets
are balanced, and what was looked at is JSON.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Final

import msgspec
from msgspec.inspect import ListType, StructType, Type, UnionType, type_info

WHOLE: Final = 16 * 1024
"""Bytes of a text that is decoded whole. No list in it can take longer than some milliseconds to build."""

# A value that is longer is told apart from an empty one, and no more. Usage, with all its details, is within 1 KiB.
_MAX_VALUE: Final = 2 * 1024
# What stands for it: something, and neither a text nor a number.
_SOMETHING: Final = b"[0]"
# A name or a number; as much as Python takes for an integer.
_MAX_TOKEN: Final = 4300
# So many items of a list are looked at: OpenAI's most choices in an answer.
_MAX_ITEMS: Final = 128
# Members that are looked at in all. Each takes some microseconds.
_MAX_MEMBERS: Final = 1024
_MAX_EXTRACT: Final = 64 * 1024

_SPACE: Final = re.compile(rb"[ \t\n\r]*+")
# A member's name and colon, and that there is a value.
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
_BETWEEN: Final = re.compile(rb"[ \t\n\r,]+")
_PIECE: Final = 1024
# What is passed over in one step, at most, and what is looked at bracket by bracket.
_STEP, _FINE = 16 * 1024, 64


class Members(dict[bytes, "Wanted"]):
    """An object: its wanted members by name."""


class Items:
    """A list, and what is wanted of each of its items."""

    def __init__(self, item: Wanted) -> None:
        self.item = item


Wanted = Members | Items | None
"""None: the value as it is."""


def wanted(*structs: type[msgspec.Struct]) -> Members:
    """What the decoders of `structs` read; the first that has a member says what of it."""
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


# What comes next.
_VALUE, _FIRST_MEMBER, _MEMBER, _FIRST_ITEM, _NEXT, _END = (
    "value",
    "first member",
    "member",
    "first item",
    "next",
    "end",
)
# What goes on: a string, what is passed over, and the items of a list that are too many.
_STRING, _PASSING, _TOO_MANY = "string", "passing", "too many"
_QUOTE, _COMMA, _OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_LIST, _CLOSE_LIST = b'",{}[]'


class Extract:
    """What is wanted of one object. `feed` takes its text in any split.

    Nothing may come after it, unless it is `one_of` several.

    `spans` has where in the text the outermost values are that are wanted as they are, the last one of each name;
    `closed_at` is where its last bracket is.
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
        """There was more than is looked at."""
        self._broken = False
        self._out = bytearray()
        # So much of it ends with a value.
        self._sound = 0
        self._state = _VALUE
        # The last bytes that came, if they are no token yet, and how many came before them.
        self._rest = b""
        self._offset = 0
        # What is wanted of the containers that are open; items and members so far.
        self._open: list[Members | Items] = []
        self._items = self._members = 0
        # The value: the name of the last member, what is wanted, whether nothing is, where it begins, what is kept.
        self._name = b""
        self._wanted: Wanted = members
        self._passed = False
        self._start = 0
        self._kept: bytearray | None = None
        # In what is passed over: how many brackets are open, and whether it is in a string.
        self._depth = 0
        self._quoted = False

    def feed(self, part: bytes) -> None:
        if self.given_up:
            return
        text = plain = self._rest + part
        if b"\\" in text:
            # As long as it was, and every quotation mark that is left begins or ends a string.
            plain = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")
            if plain.endswith(b"\\"):
                plain = plain[:-1]
        at = self._walk(text, plain)
        self._rest = text[at:]
        self._offset += at
        # What is broken leaves the rest as it is.
        self.too_much |= len(self._rest) > _MAX_TOKEN and not self._broken

    @property
    def given_up(self) -> bool:
        """What came is no object, or too much."""
        return self._broken or self.too_much

    def text(self) -> bytes | None:
        """The extract; None if what came is not one whole object, or too much."""
        return bytes(self._out) if self._state is _END and not self.given_up else None

    def after(self) -> bytes | None:
        """What came after the end of one of several; None if it has not ended."""
        return self._rest if self._state is _END else None

    def so_far(self) -> bytes:
        """The extract of the members that have come, of an object that has no wanted containers in it."""
        return bytes(self._out[: self._sound] or b"{") + b"}"

    def _walk(self, text: bytes, plain: bytes) -> int:
        """How far `text` can be read by now; `plain` is the same without escapes."""
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
        """Reads a name and its colon; returns where its value begins, or 0 if that is not there yet."""
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
        """Begins a value, or reads it; returns where to go on, or 0 if it is not whole."""
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
        """What comes after a value, or instead of the first."""
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
        """The innermost container ends."""
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
        """The value ends."""
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
        """A token of `length` is none. One that is too long is so however it ends."""
        if length > _MAX_TOKEN:
            self.too_much = True
        else:
            self._broken = True

    def _pass(self, plain: bytes, at: int) -> int:
        """Where what is passed over ends, or 0 if it goes on."""
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
        """Where in `piece` what is passed over ends, or 0 if it goes on."""
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
    """The name that is spelled `raw`; None if that is no Unicode."""
    try:
        text = raw.decode()
        return _decode_text(b'"%b"' % raw).encode() if "\\" in text else raw
    except UnicodeDecodeError:
        return None
    except msgspec.DecodeError:
        # Half a surrogate pair, as JavaScript may write it, is in no name that is wanted.
        return b""


_decode_text: Final = msgspec.json.Decoder(str).decode


class Gist:
    """What matters of a JSON text that comes in parts: all of it if it is small, and what is wanted of a large one."""

    __slots__ = ("_members", "_parts", "_size", "extract")

    def __init__(self, members: Members) -> None:
        self._members = members
        self._parts: list[bytes] = []
        self._size = 0
        self.extract: Extract | None = None
        """Of a large text."""

    def feed(self, part: bytes) -> None:
        if self.extract is not None:
            self.extract.feed(part)
            return
        self._parts.append(part)
        self._size += len(part)
        if self._size > WHOLE:
            self.extract = Extract(self._members)
            for early in self._parts:
                self.extract.feed(early)
            self._parts.clear()

    def so_far(self) -> bytes:
        """The extract of what has come, be it broken behind that."""
        extract = self.extract
        if extract is None:
            extract = Extract(self._members)
            for part in self._parts:
                extract.feed(part)
        return extract.so_far()

    def text(self) -> bytes | None:
        """The small text, or the extract of the large one. None if there is too much in it; empty if it is no JSON."""
        if self.extract is None:
            return b"".join(self._parts)
        return None if self.extract.too_much else self.extract.text() or b""


class Elements:
    """The objects in a list, which are extracted one after the other as they come; `feed` takes its text in any split.

    `given_up`: there is something else in it, or too much in one.
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
                    # There may be thousands of these in a read.
                    found.append(b"{}")
                    at += 2
                else:
                    at += self._begin(part[at : at + 1])
                continue
            # Of what follows an object, no more than this is copied.
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
        """Takes what begins with `mark`; returns how much of that is no part of an object."""
        if not mark:
            return 0
        if self._begun and mark == b"{":
            self._extract = Extract(self._members, one_of=True)
            return 0
        self.ended = self._begun and mark == b"]"
        self.given_up = not self.ended and (self._begun or mark != b"[")
        self._begun = True
        return 1
