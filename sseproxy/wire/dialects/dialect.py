"""What tells one API from another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from ..extract import Members
from ..meaning import COMPLAINT, END, NOTHING, Meaning, complains

# The end marker, perhaps with spaces around it.
_DONE: Final = b"[DONE]"
_LONGEST_DONE: Final = 16


class Dialect(NamedTuple):
    """`read(type, data)` is the meaning of an event as its API has it, `meaning_of` what it means in the end. `path`
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
        """What an event, or a JSON body, means. `[DONE]` ends a stream of any API."""
        if len(data) < _LONGEST_DONE and data.strip() == _DONE:
            return END
        meaning = self.read(kind, data)
        return COMPLAINT if meaning == NOTHING and self.generates and complains(data) else meaning
