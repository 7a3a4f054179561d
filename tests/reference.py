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
    reasoned: bool = False
    """Some of it was reasoning."""
    usage: dict[str, int] | None = None
    final: bool = False
    """The usage is that of all of it."""
    finish: str | None = None
    ended: bool = False
    failed: bool = False
    complained: bool = False
    """Something said a code or a message, and nothing else."""
    garbled: int = 0

    def counted(self, usage: dict[str, int] | None, *, final: bool = True) -> None:
        """Counts are cumulative, and never fall."""
        if usage is not None:
            before = self.usage or {}
            self.usage = before | {name: max(count, before.get(name, 0)) for name, count in usage.items()}
            self.final = final


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
    """The counts in one meaning: `input` is all of the prompt, `output` all that was generated."""
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

    def total(*counts: int | None) -> int | None:
        told = [number for number in counts if number is not None]
        return min(sum(told), 10**15 - 1) if told else None

    if any(name in value for name in ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount")):
        thoughts = count("thoughtsTokenCount")
        counts = {
            "input": total(count("promptTokenCount"), count("toolUsePromptTokenCount")),
            "output": total(count("candidatesTokenCount"), thoughts),
            "cached_input": count("cachedContentTokenCount"),
            "reasoning": thoughts,
        }
    elif "prompt_tokens" in value or "completion_tokens" in value:
        reasoning = count("completion_tokens_details.reasoning_tokens")
        counts = {
            "input": count("prompt_tokens", "input_tokens"),
            "output": count("completion_tokens", "output_tokens"),
            "cached_input": count(
                "prompt_tokens_details.cached_tokens",
                "prompt_cache_hit_tokens",
                "cached_tokens",
                "cache_read_input_tokens",
            ),
            "reasoning": reasoning,
            "cache_write": count("prompt_tokens_details.cache_write_tokens", "cache_creation_input_tokens"),
        }
        all_three = total(counts["input"], counts["output"], reasoning)
        if reasoning and counts["output"] is not None and count("total_tokens") == all_three:
            # xAI's come on top.
            counts["output"] = total(counts["output"], reasoning)
    else:
        read = count("cache_read_input_tokens")
        written = count("cache_creation_input_tokens")
        if written is None:
            written = total(
                count("cache_creation.ephemeral_5m_input_tokens"), count("cache_creation.ephemeral_1h_input_tokens")
            )
        told = count("input_tokens")
        counts = {
            "input": None if told is None else total(told, read, written),
            "output": count("output_tokens"),
            "cached_input": count("input_tokens_details.cached_tokens", "cached_tokens") if read is None else read,
            "reasoning": count("output_tokens_details.reasoning_tokens", "output_tokens_details.thinking_tokens"),
            "cache_write": count("input_tokens_details.cache_write_tokens") if written is None else written,
        }
    found = {name: number for name, number in counts.items() if number is not None}
    return found if "input" in found or "output" in found else None


def _complains(event: dict[str, Any], *, nested: bool = True) -> bool:
    """Whether it says a code that is no success, or a message."""
    for name, value in event.items():
        good = (0, 200, 20000, True, "0", "200", "ok", "success", "succeeded")
        value = value.count if isinstance(value, Number) and value.count is not None else value
        value = value.lower() if isinstance(value, str) else value
        if name in CODES and _filled(value) and not any(value == one and type(value) is type(one) for one in good):
            return True
        if name in MESSAGES and isinstance(value, str) and value and value not in good:
            return True
        if nested and name in AROUND and isinstance(value, dict) and _complains(value, nested=False):
            return True
    return False


def _zero(usage: dict[str, int] | None) -> bool:
    """Whether nothing was counted."""
    return usage is None or not any(usage.values())


CODES = ("code", "error_code", "status_code", "errors")
MESSAGES = ("message", "msg", "detail", "error_msg", "status_msg")
AROUND = ("base_resp", "header", "output")


def _chat(seen: Seen, kind: str, event: dict[str, Any]) -> None:
    finish = inner = None
    delta = reasoned = False
    for choice in _parts(event, "choices"):
        generated = _part(choice, "delta", dict)
        thought = any(
            _filled(generated.get(name))
            for name in ("reasoning_content", "reasoning", "reasoning_text", "reasoning_details")
        )
        other = any(
            _filled(value) and isinstance(value, str | list)
            for name, value in generated.items()
            if name not in ("role", "name", "id", "object", "type", "status", "model", "provider", "index")
            and name not in ("tool_call_id", "finish_reason", "stop_reason")
        )
        objects = any(_filled(generated.get(name)) for name in ("content", "refusal", "audio", "function_call"))
        first = _filled(choice.get("text")) or _filled(generated.get("content"))
        if not delta and thought and not first:
            reasoned = True
        delta |= first or thought or other or objects
        if isinstance(choice.get("finish_reason"), str) and choice["finish_reason"]:
            finish = choice["finish_reason"]
        if "usage" in choice:
            inner = choice["usage"]
    groq = _part(event, "x_groq", dict)
    failed = kind == "error" or _filled(event.get("error")) or _filled(groq.get("error"))
    failed |= finish in ("error", "ERROR", "insufficient_system_resource", "network_error", "abort")
    failed |= event.get("choices") is None and event.get("object") == "error"
    usage = _usage(event.get("usage")) or _usage(groq.get("usage")) or _usage(inner)
    seen.counted(usage, final=finish is not None or not delta)
    seen.finish = finish or seen.finish
    seen.failed |= failed
    seen.reasoned |= reasoned
    if delta:
        seen.deltas.append(seen.events)
    elif _zero(usage) and finish is None and not failed:
        seen.complained |= _complains(event)


def _responses(seen: Seen, kind: str, event: dict[str, Any]) -> None:
    name, response = _kind(event), _part(event, "response", dict)
    item, part = _part(event, "item", dict), _part(event, "part", dict)
    _kind(item)

    def ended(answer: dict[str, Any], statuses: tuple[str, ...] | None) -> None:
        status = answer.get("status")
        if isinstance(status, str) and (statuses is None or status in statuses):
            seen.finish = status
        seen.counted(_usage(answer.get("usage")))
        seen.failed |= status == "failed" or _filled(answer.get("error"))

    if name.removeprefix("response.") in ("completed", "incomplete", "failed", "cancelled", "done") and "." in name:
        ended(response, None)
        seen.ended = True
        seen.failed |= name == "response.failed" or _filled(event.get("error"))
    elif name == "error" or kind == "error" or (name and _filled(event.get("error"))):
        seen.failed = True
    elif (
        (name.endswith(".delta") and _filled(event.get("delta")))
        or (name == "response.output_item.added" and str(item.get("type", "")).endswith("_call"))
        or (name == "response.output_item.added" and item.get("type") in ("program", "mcp_approval_request"))
        or (name == "response.content_part.added" and _filled(part.get("text")))
        or name == "response.output_text.annotation.added"
        or (name == "response.image_generation_call.partial_image" and _filled(event.get("partial_image_b64")))
    ):
        seen.deltas.append(seen.events)
        seen.reasoned |= name == "response.reasoning_text.delta"
    elif not name:
        ended(event, ("completed", "incomplete", "failed", "cancelled"))
        told = not _zero(_usage(event.get("usage"))) or _filled(event.get("error"))
        told |= event.get("status") in ("completed", "incomplete", "failed", "cancelled")
        seen.complained |= not told and _complains(event)
    else:
        seen.complained |= _complains(event)


def _messages(seen: Seen, kind: str, event: dict[str, Any]) -> None:
    name, message, delta = _kind(event), _part(event, "message", dict), _part(event, "delta", dict)
    block = _part(event, "content_block", dict)
    _kind(block)
    said = False
    if name == "content_block_delta":
        said = any(_filled(delta.get(part)) for part in ("text", "thinking", "partial_json", "citation", "content"))
        seen.reasoned |= _filled(delta.get("thinking"))
    elif name == "content_block_start":
        empty = ("", "text", "thinking", "compaction", "fallback", "mcp_tool_listing")
        said = str(block.get("type", "")) not in empty
        said |= any(_filled(block.get(part)) for part in ("text", "thinking", "content"))
    if said:
        seen.deltas.append(seen.events)
    elif name == "message_start":
        usage = _usage(message.get("usage"))
        if usage is not None:
            # What was generated by then is not the usage of the message.
            usage = {key: usage[key] for key in usage if key not in ("output", "reasoning")}
            seen.counted(usage, final=False)
        seen.complained |= _zero(usage) and _complains(event)
    elif name in ("message_delta", "message", ""):
        later = _usage(event.get("usage"))
        reason = (delta if name == "message_delta" else event).get("stop_reason")
        reason = reason if isinstance(reason, str) and (reason or name == "message_delta") else None
        failed = name != "message_delta" and (kind == "error" or _filled(event.get("error")))
        seen.counted(later)
        seen.finish = seen.finish if reason is None else reason
        seen.failed |= failed
        seen.complained |= _zero(later) and reason is None and not failed and _complains(event)
    elif name == "message_stop":
        seen.ended = True
    elif name == "error" or (name not in ("content_block_delta", "content_block_start") and kind == "error"):
        seen.failed = True
    elif _filled(event.get("error")) and name not in ("content_block_delta", "content_block_start"):
        seen.failed = True
    else:
        seen.complained |= _complains(event)


def _gemini(seen: Seen, kind: str, event: dict[str, Any]) -> None:
    generated, finish, reasoned = False, None, False
    for candidate in _parts(event, "candidates"):
        for part in _parts(_part(candidate, "content", dict), "parts"):
            said = any(_filled(part.get(name)) for name in part if name not in ("thought", "thoughtSignature"))
            generated |= said
            reasoned |= said and part.get("thought") is True
        if finish is None and isinstance(candidate.get("finishReason"), str) and candidate["finishReason"]:
            finish = candidate["finishReason"]
    usage = _usage(event.get("usageMetadata"))
    seen.counted(usage, final=finish is not None)
    failed = kind == "error" or _filled(event.get("error"))
    seen.failed |= failed
    seen.reasoned |= reasoned
    if finish is not None:
        seen.finish, seen.ended = finish, True
    elif generated:
        # Another candidate goes on.
        seen.ended = False
    if generated:
        seen.deltas.append(seen.events)
    elif _zero(usage) and finish is None and not failed:
        seen.complained |= _complains(event)


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
            if data.strip(" \t\r\n\v\f") == "[DONE]":
                seen.ended = True
            else:
                APIS[api](seen, kind, _object(data))
        except (ValueError, NotAsExpectedError):
            seen.garbled += 1
            seen.failed |= kind == "error"
            try:
                event = _object(data)
                seen.counted(_usage(event.get("usage")))
                seen.failed |= _filled(event.get("error"))
            except (ValueError, NotAsExpectedError):
                pass
        seen.events += 1
    return seen
