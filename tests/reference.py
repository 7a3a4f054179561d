"""What a whole event stream says, read slowly and plainly: nothing here is shared with what it is compared to.

`Reference` is WHATWG's interpretation of an event stream, character by character; `read` is the README's definitions on
top of it, for the APIs that are fuzzed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Reference:
    """The whole stream `text` by the letter of the specification, one character after the other.

    `events` are (type, data), `comments` counts; `pending` is true if a line or an event is incomplete at the end.
    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """

    def __init__(self, stream: bytes) -> None:
        self.events: list[tuple[str, str]] = []
        self.comments = 0
        self.data = self.kind = ""
        lines, rest = self._lines(stream.decode("utf-8", "replace"))
        fields = 0
        for number, line in enumerate(lines):
            if number == 0 and line.startswith("\ufeff"):
                line = line[1:]
            if line == "":
                self._dispatch()
                fields = 0
            elif line[0] == ":":
                self.comments += 1
            elif ":" in line:
                colon = line.index(":")
                value = line[colon + 1 :]
                self._field(line[:colon], value[1:] if value[:1] == " " else value)
                fields += 1
            else:
                self._field(line, "")
                fields += 1
        self.pending = rest != "" or fields > 0

    @staticmethod
    def _lines(text: str) -> tuple[list[str], str]:
        lines, line, at = [], "", 0
        while at < len(text):
            if text[at] in "\r\n":
                lines.append(line)
                line = ""
                at += 2 if text[at : at + 2] == "\r\n" else 1
            else:
                line += text[at]
                at += 1
        return lines, line

    def _field(self, name: str, value: str) -> None:
        if name == "event":
            self.kind = value
        elif name == "data":
            self.data += value + "\n"

    def _dispatch(self) -> None:
        if self.data != "":
            self.events.append((self.kind, self.data[:-1]))
        self.data = self.kind = ""


@dataclass(frozen=True)
class Number:
    """A number as it is spelled."""

    text: str

    @property
    def count(self) -> int | None:
        """The count it is; fractions, exponents, signs and what no counter could hold are none."""
        return int(self.text) if self.text.isdigit() and len(self.text) <= 15 else None


@dataclass
class Seen:
    """What a stream says."""

    events: int = 0
    deltas: list[int] = field(default_factory=list)
    """The indices of the events with generated content."""
    usage: dict[str, int] | None = None
    finish: str | None = None
    ended: bool = False
    failed: bool = False
    garbled: int = 0


class NotAsExpectedError(Exception):
    """The event is no object, or one of its parts is not of the type that the API gives it."""


def _refuse(_: str) -> None:
    raise ValueError("not JSON")


def _object(data: str) -> dict[str, Any]:
    value = json.loads(data, parse_int=Number, parse_float=Number, parse_constant=_refuse)
    if not isinstance(value, dict):
        raise NotAsExpectedError
    return value


def _part(value: dict[str, Any], key: str, kind: type) -> Any:
    """The member `key`, which is of `kind`, or null, or not there."""
    found = value.get(key)
    if found is not None and not isinstance(found, kind):
        raise NotAsExpectedError
    return found if found is not None else kind()


def _parts(value: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = _part(value, key, list)
    if not all(isinstance(item, dict) for item in found):
        raise NotAsExpectedError
    return list(found)


def _kind(event: dict[str, Any]) -> str:
    if not isinstance(event.get("type", ""), str):
        raise NotAsExpectedError
    return str(event.get("type", ""))


def _filled(value: object) -> bool:
    return value not in (None, "", [], {})


def _usage(value: object) -> dict[str, int] | None:
    if not isinstance(value, dict):
        return None

    def count(*paths: str) -> int | None:
        for path in paths:
            found: object = value
            for key in path.split("."):
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, Number) and found.count is not None:
                return found.count
        return None

    counts = {
        "input": count("prompt_tokens", "input_tokens", "promptTokenCount"),
        "output": count("completion_tokens", "output_tokens", "candidatesTokenCount"),
        "cached_input": count(
            "prompt_tokens_details.cached_tokens",
            "input_tokens_details.cached_tokens",
            "prompt_cache_hit_tokens",
            "cache_read_input_tokens",
            "cachedContentTokenCount",
        ),
        "reasoning": count(
            "completion_tokens_details.reasoning_tokens",
            "output_tokens_details.reasoning_tokens",
            "thoughtsTokenCount",
        ),
    }
    told = {name: number for name, number in counts.items() if number is not None}
    return told if "input" in told or "output" in told else None


def _chat(seen: Seen, kind: str, event: dict[str, Any]) -> None:
    finish = None
    delta = False
    for choice in _parts(event, "choices"):
        generated = _part(choice, "delta", dict)
        names = (
            *("content", "reasoning_content", "reasoning", "refusal"),
            *("tool_calls", "function_call", "audio", "images"),
        )
        delta |= _filled(choice.get("text")) or any(_filled(generated.get(name)) for name in names)
        if isinstance(choice.get("finish_reason"), str) and choice["finish_reason"]:
            finish = choice["finish_reason"]
    groq = _part(event, "x_groq", dict)
    seen.usage = _usage(event.get("usage")) or _usage(groq.get("usage")) or seen.usage
    seen.finish = finish or seen.finish
    seen.failed |= kind == "error" or _filled(event.get("error")) or finish == "error"
    seen.failed |= _filled(groq.get("error"))
    seen.failed |= event.get("choices") is None and event.get("object") == "error"
    if delta:
        seen.deltas.append(seen.events)


def _responses(seen: Seen, kind: str, event: dict[str, Any]) -> None:
    name, response = _kind(event), _part(event, "response", dict)
    if name in ("response.completed", "response.incomplete", "response.failed", "response.cancelled"):
        seen.usage = _usage(response.get("usage")) or seen.usage
        seen.finish = response["status"] if isinstance(response.get("status"), str) else seen.finish
        seen.ended = True
        seen.failed |= name == "response.failed"
    elif name == "error" or kind == "error" or (not name and _filled(event.get("error"))):
        seen.failed = True
    elif name.endswith(".delta"):
        if _filled(event.get("delta")):
            seen.deltas.append(seen.events)


def _messages(seen: Seen, kind: str, event: dict[str, Any]) -> None:
    name, message, delta = _kind(event), _part(event, "message", dict), _part(event, "delta", dict)
    if name == "content_block_delta":
        if any(_filled(delta.get(part)) for part in ("text", "thinking", "partial_json", "citation")):
            seen.deltas.append(seen.events)
    elif name == "message_start":
        seen.usage = _usage(message.get("usage")) or seen.usage
    elif name == "message_delta":
        later = _usage(event.get("usage"))
        seen.usage = {**(seen.usage or {}), **later} if later else seen.usage
        seen.finish = delta["stop_reason"] if isinstance(delta.get("stop_reason"), str) else seen.finish
    elif name == "message_stop":
        seen.ended = True
    elif name == "error" or kind == "error":
        seen.failed = True


def _gemini(seen: Seen, _: str, event: dict[str, Any]) -> None:
    generated, finish = False, None
    for candidate in _parts(event, "candidates"):
        for part in _parts(_part(candidate, "content", dict), "parts"):
            generated |= _filled(part.get("text")) or _filled(part.get("functionCall"))
        if finish is None and _filled(candidate.get("finishReason")):
            finish = candidate["finishReason"]
    seen.usage = _usage(event.get("usageMetadata")) or seen.usage
    if isinstance(finish, str):
        seen.finish, seen.ended = finish, True
    elif generated:
        # Another candidate goes on.
        seen.ended = False
    seen.failed |= _filled(event.get("error"))
    if generated:
        seen.deltas.append(seen.events)


APIS: dict[str, Callable[[Seen, str, dict[str, Any]], None]] = {
    "chat": _chat,
    "responses": _responses,
    "messages": _messages,
    "gemini": _gemini,
}


def read(api: str, stream: bytes) -> Seen:
    """What `stream` says in `api`."""
    seen = Seen()
    for kind, data in Reference(stream).events:
        try:
            if data == "[DONE]" and api in ("chat", "responses"):
                seen.ended = True
            else:
                APIS[api](seen, kind, _object(data))
        except (ValueError, NotAsExpectedError):
            seen.garbled += 1
            seen.failed |= kind == "error"
            try:
                event = _object(data)
                seen.usage = _usage(event.get("usage")) or seen.usage
                seen.failed |= _filled(event.get("error"))
            except (ValueError, NotAsExpectedError):
                pass
        seen.events += 1
    return seen
