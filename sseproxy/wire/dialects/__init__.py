"""What one event, or one JSON body, means in each API.

A `Dialect` is a name, the paths it is spoken on, and a function from an event to its `Meaning`. Each API has a file
here that owns all that is the API's; the table below has them all, and nothing else knows the APIs apart.
"""

from __future__ import annotations

import functools
import re
from typing import Final

from ..meaning import MAX_MODEL
from .assistants import ASSISTANTS
from .chat import CHAT, COMPLETIONS, GENERIC
from .dialect import Dialect
from .gemini import GEMINI
from .media import IMAGES, SPEECH, TRANSCRIPTIONS
from .messages import MESSAGES
from .responses import RESPONSES

__all__ = ["DIALECTS", "DIALECT_NAMES", "Dialect", "asks_for_stream", "dialect_of", "model_in"]

DIALECTS: Final = (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    ASSISTANTS,
    MESSAGES,
    GEMINI,
    SPEECH,
    TRANSCRIPTIONS,
    IMAGES,
    GENERIC,
)
"""Tried in this order; the last one takes every path, and finds usage that looks like OpenAI's."""


_MODEL_IN_PATH: Final = re.compile(rf"/(?:models|deployments)/([^/:]{{1,{MAX_MODEL}}})[/:]")

# Google's methods that stream, which answer in a list where the query does not ask for events; and what GET
# /responses/{id} is asked for.
_STREAMING_PATH: Final = re.compile(r":stream[A-Z][A-Za-z]*$")
_STREAMING_QUERY: Final = re.compile(r"[?&](?:alt=sse|stream=true)(?:&|$)", re.IGNORECASE)

DIALECT_NAMES: Final = tuple(dialect.name for dialect in DIALECTS)


def model_in(path: str) -> str | None:
    """The model that `path` names, as Gemini's, Vertex AI's and Azure's do; as short as in a body, or none."""
    match = _MODEL_IN_PATH.search(path)
    return match[1] if match else None


def asks_for_stream(path: str, query: str) -> bool:
    """Whether a request does, by its `path` and its `query`, which begins with a question mark or is empty."""
    return bool(_STREAMING_PATH.search(path) or _STREAMING_QUERY.search(query))


# Few paths are many requests; a path may have as many bytes as a head, and there are few of them here.
@functools.lru_cache(maxsize=64)
def dialect_of(path: str, name: str = "auto") -> Dialect:
    """The dialect `name`, or for `auto` the one spoken on `path`, the path of the request that goes upstream."""
    return next(
        dialect for dialect in DIALECTS if (dialect.path.search(path) if name == "auto" else dialect.name == name)
    )
