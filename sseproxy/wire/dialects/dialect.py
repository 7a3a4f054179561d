"""How one API differs from another."""

from __future__ import annotations

import re
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from ..extract import Members
from ..meaning import NOTHING, Meaning, complains
from .style import OPENAI, Style


class Dialect(Struct, frozen=True):
    """One API.

    `path` matches the path of a request to the upstream, in any case, because some servers do not mind it.
    `read(type, data)` returns the meaning of an event as the API defines it, and `judged` what it means in the end.
    `members` are the members that `read` needs; of a large event, `read` gets only these. `text` finds generated text
    in an event. `style` is how its clients are told of errors, and what they take as a heartbeat.

    `generates`: its responses have content, and its streams have a first token. `asks_usage`: its streams have usage
    only if the request asks for it. `keeps`: its responses are kept by the upstream, and can be fetched later.
    `natural`: the finish reason of a complete answer.
    """

    name: str
    path: re.Pattern[str]
    read: Callable[[bytes, bytes], Meaning]
    members: Members
    text: re.Pattern[bytes]
    generates: bool = True
    style: Style = OPENAI
    asks_usage: bool = False
    keeps: bool = False
    natural: str = "stop"

    def meaning_of(self, kind: bytes, data: bytes) -> Meaning:
        """The meaning of an event, or of a JSON body."""
        return self.judged(self.read(kind, data), data)

    def judged(self, meaning: Meaning, data: bytes) -> Meaning:
        """`meaning` as returned by `read`. But if `data` has only a code or a message, it is a complaint.

        Counts that are all zero do not matter: MiniMax and others send them with the code.
        """
        usage = meaning.usage
        if meaning.delta:
            return meaning
        says_nothing = meaning == NOTHING if usage is None else usage.is_zero and meaning == Meaning(usage=usage)
        return replace(meaning, complaint=True) if says_nothing and self.generates and complains(data) else meaning
