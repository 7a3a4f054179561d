"""What tells one API from another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from ..extract import Members
from ..meaning import NOTHING, Meaning, complains


class Dialect(NamedTuple):
    """`read(type, data)` is the meaning of an event as its API has it, `judged` what it means in the end. `path`
    matches the path on the upstream's side; `text` finds generated text in an event. `members` are what `read` reads,
    and what it is shown of a large event.

    `generates`: its answers have content, and its streams a first token to wait for. `numbered`: its events carry their
    number in the stream. `asks_usage`: its streams tell usage only where the request asks for it. `keeps`: its answers
    are kept, and can be asked for when they are there, and again.
    """

    name: str
    path: re.Pattern[str]
    read: Callable[[bytes, bytes], Meaning]
    members: Members
    text: re.Pattern[bytes]
    generates: bool = True
    numbered: bool = False
    asks_usage: bool = False
    keeps: bool = False

    def meaning_of(self, kind: bytes, data: bytes) -> Meaning:
        """What an event, or a JSON body, means."""
        return self.judged(self.read(kind, data), data)

    def judged(self, meaning: Meaning, data: bytes) -> Meaning:
        """`meaning` as `read` has it, unless `data` says nothing that the API knows, and a code or a message.

        Counts that are all zero say nothing: MiniMax and others put them beside the code.
        """
        usage = meaning.usage
        if meaning.delta:
            return meaning
        says_nothing = meaning == NOTHING if usage is None else usage.is_zero and meaning == Meaning(usage=usage)
        return meaning._replace(complaint=True) if says_nothing and self.generates and complains(data) else meaning
