"""OpenAI's audio and images."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from ..deltas import text_under
from ..extract import wanted
from ..meaning import FAILED, NOTHING, NULL, UNREADABLE, Meaning, Rest, filled, read_rest, read_usage
from .chat import Chunk, read_completion
from .dialect import Dialect


class _MediaEvent(msgspec.Struct, gc=False):
    type: str = ""
    audio: msgspec.Raw = NULL
    delta: msgspec.Raw = NULL
    text: msgspec.Raw = NULL
    b64_json: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL
    choices: msgspec.Raw = NULL


# A delta in a stream that has an end marker for each of its parts, so an earlier one was not the last.
_DELTA_OF_A_PART: Final = Meaning(delta=True, more=True)
_decode_media_event: Final = msgspec.json.Decoder(_MediaEvent).decode
_MEMBERS: Final = wanted(Chunk, _MediaEvent, Rest)


def read_media(kind: bytes, data: bytes) -> Meaning:
    """https://platform.openai.com/docs/api-reference/audio and /images: speech, transcripts and images."""
    try:
        event = _decode_media_event(data)
    except UNREADABLE:
        return read_rest(kind, data)
    if event.type == "error" or kind == b"error" or filled(event.error):
        return FAILED
    if event.type.endswith((".done", ".completed")):
        finish = "completed" if event.type.endswith(".completed") else event.type
        return Meaning(delta=filled(event.b64_json), usage=read_usage(event.usage), finish=finish, end=True)
    if event.type:
        blob = filled(event.audio) or filled(event.b64_json)
        return _DELTA_OF_A_PART if blob or filled(event.delta) or filled(event.text) else NOTHING
    if event.choices is not NULL:
        # vLLM's and SGLang's transcripts are chunks like those of a completion.
        return read_completion(kind, data)
    return Meaning(usage=read_usage(event.usage))


SPEECH: Final = Dialect(
    "speech", re.compile(r"/audio/speech$", re.IGNORECASE), read_media, _MEMBERS, text_under("delta")
)
TRANSCRIPTIONS: Final = Dialect(
    "transcriptions",
    re.compile(r"/audio/(transcriptions|translations)$", re.IGNORECASE),
    read_media,
    _MEMBERS,
    text_under("delta"),
)
IMAGES: Final = Dialect(
    "images", re.compile(r"/images/(generations|edits)$", re.IGNORECASE), read_media, _MEMBERS, text_under("delta")
)
