"""What tells one API from another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from ..extract import Members
from ..meaning import Meaning
from .form import OPENAI, Form


class Dialect(NamedTuple):
    """`read(type, data)` is the meaning of an event; `path` matches the path on the upstream's side; `text`
    finds generated text in an event.
    `members` are what `read` reads, and what it is shown of a large event.

    `generates`: its streams have a first token to wait for. `large`: its events may have megabytes. `form`: how its
    clients are told what no upstream says. `asks_usage`: its streams tell usage only where the request asks for it.
    """

    name: str
    path: re.Pattern[str]
    read: Callable[[bytes, bytes], Meaning]
    members: Members
    text: re.Pattern[bytes]
    generates: bool = True
    large: bool = False
    form: Form = OPENAI
    asks_usage: bool = False

    def max_event(self, usual: int) -> int:
        """The bytes of an event that are looked at, where `usual` are of events without images.

        A 4096 x 4096 PNG in base64, and a line of 16 MiB with its field name, are within six times 4 MiB.
        """
        return 6 * usual if self.large else usual
