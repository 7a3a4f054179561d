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
from .form import OPENAI, Form
from .gemini import GEMINI, GOOGLE
from .media import IMAGES, SPEECH, TRANSCRIPTIONS
from .messages import ANTHROPIC, MESSAGES
from .responses import RESPONSES

__all__ = ["DIALECTS", "DIALECT_NAMES", "OPENAI", "Dialect", "Form", "dialect_of", "form_of", "model_in"]

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

DIALECT_NAMES: Final = tuple(dialect.name for dialect in DIALECTS)


def model_in(path: str) -> str | None:
    """The model that `path` names, as Gemini's, Vertex AI's and Azure's do; as short as in a body, or none."""
    match = _MODEL_IN_PATH.search(path)
    return match[1] if match else None


# Few paths are many requests; a path may have as many bytes as a head, and there are few of them here.
@functools.lru_cache(maxsize=64)
def dialect_of(path: str, name: str = "auto") -> Dialect:
    """The dialect `name`, or for `auto` the one spoken on `path`, the path of the request that goes upstream."""
    return next(
        dialect for dialect in DIALECTS if (dialect.path.search(path) if name == "auto" else dialect.name == name)
    )


_FORMS: Final = (ANTHROPIC, GOOGLE, OPENAI)


def form_of(path: str, name: str = "auto") -> Form:
    """In what form the clients of the dialect `name`, or for `auto` those that ask for `path`, read an error."""
    dialect = dialect_of(path, name)
    if dialect is not GENERIC or name != "auto":
        return dialect.form
    return next(form for form in _FORMS if form.paths.search(path))
