"""The APIs: what an event, or a JSON body, means in each of them.

A `Dialect` has the name of an API, its paths, and a function from an event to its `Meaning`. Each API has a file of its
own here, with everything that is special about it. The table below has all of them. No code outside this package
depends on a particular API.
"""

from __future__ import annotations

import functools
import re
from typing import Final
from urllib.parse import unquote

from ..meaning import MAX_MODEL
from .assistants import ASSISTANTS
from .chat import CHAT, COMPLETIONS, GENERIC
from .dialect import Dialect
from .gemini import GEMINI, GOOGLE
from .media import IMAGES, SPEECH, TRANSCRIPTIONS
from .messages import ANTHROPIC, MESSAGES
from .responses import RESPONSES
from .style import OPENAI, Allowance, Style

__all__ = [
    "DIALECTS",
    "DIALECT_NAMES",
    "OPENAI",
    "Allowance",
    "Dialect",
    "Style",
    "as_read",
    "asks_for_stream",
    "dialect_of",
    "model_in",
    "models_in",
    "style_of",
]

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
"""Tried in this order. The last one matches every path, and finds usage in the format of OpenAI's API."""


_MODEL_IN_PATH: Final = re.compile(rf"/(?:models|deployments)/([^/:]{{1,{MAX_MODEL}}})(?=[/:])")
# All that some API takes for a model: a member of a collection of models, and what a method of Google's generates with.
# Azure AI has `/models/chat/completions`, without one.
_METHOD: Final = r":(?=[a-z]+$)[a-z]*?(?:generate|predict|embed|count|compute)"
_MODELS_IN_PATH: Final = re.compile(
    rf"/(?:tunedModels|models?|deployments|engines)/(?!(?:chat/completions|embeddings)$)([^/]+?)(?=/|$|{_METHOD})"
    rf"|/([^/:]+)(?={_METHOD})",
    re.IGNORECASE,
)
# Parameters of a segment (RFC 3986, section 3.3), and slashes that say nothing.
_PASSED_OVER: Final = re.compile(r";[^/]*|/+(?=[/;]|$)")

# Google's methods that stream, which answer in a list where the query does not ask for events; and what GET
# /responses/{id} is asked for.
_STREAMING_PATH: Final = re.compile(r":stream[A-Z][A-Za-z]*$")
_STREAMING_QUERY: Final = re.compile(r"[?&](?:alt=sse|stream=true)(?:&|$)", re.IGNORECASE)

DIALECT_NAMES: Final = tuple(dialect.name for dialect in DIALECTS)


def model_in(path: str) -> str | None:
    """The model in `path`, as in the APIs of Gemini, Vertex AI and Azure. None if there is none, or it is too long."""
    match = _MODEL_IN_PATH.search(path)
    return match[1] if match else None


def models_in(path: str) -> list[str]:
    """All that may be a model in `path`, to whatever server."""
    return [found[1] or found[2] for found in _MODELS_IN_PATH.finditer(as_read(path))]


def asks_for_stream(path: str, query: str) -> bool:
    """Whether a request asks for a stream by its `path` or its `query`, which is empty or begins with `?`."""
    return bool(_STREAMING_PATH.search(path) or _STREAMING_QUERY.search(query))


def as_read(path: str) -> str:
    """`path` as the most lenient server reads it: many decode a slash, merge several, or do not mind one at the end."""
    return _PASSED_OVER.sub("", unquote(path, errors="surrogateescape").replace("\\", "/"))


# Cached, because most requests have one of a few paths. The cache is small, because a path may be as long as a head.
@functools.lru_cache(maxsize=64)
def dialect_of(path: str, name: str = "auto") -> Dialect:
    """The dialect called `name`. For `auto`, the one that matches `path`, the path of the request to the upstream."""
    if name != "auto":
        return next(dialect for dialect in DIALECTS if dialect.name == name)
    path = as_read(path)
    return next(dialect for dialect in DIALECTS if dialect.path.search(path))


_STYLES: Final = (ANTHROPIC, GOOGLE, OPENAI)


def style_of(path: str, name: str = "auto") -> Style:
    """In what style the clients of the dialect `name`, or for `auto` those that ask for `path`, read an error."""
    dialect = dialect_of(path, name)
    if dialect is not GENERIC or name != "auto":
        return dialect.style
    return next(style for style in _STYLES if style.paths.search(path))
