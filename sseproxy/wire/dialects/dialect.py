"""How one API differs from another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from ..extract import Members
from ..meaning import Meaning
from .form import OPENAI, Form


class Dialect(NamedTuple):
    """One API.

    `path` matches the path of a request to the upstream. `read(type, data)` returns the meaning of an event. `members`
    are the members that `read` needs; of a large event, `read` gets only these. `text` finds generated text in an
    event. `form` is how its clients are told of errors, and what they take as a heartbeat.

    `generates`: its streams have a first token. `large`: its events may have megabytes. `asks_usage`: its streams have
    usage only if the request asks for it.
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
        """The limit in bytes of an event that is inspected. `usual` is the limit for events without images.

        Six times the default of 4 MiB is enough for a PNG of 4096 x 4096 pixels in base64.
        """
        return 6 * usual if self.large else usual
