"""From what was observed of each hop to findings, and to one sentence. Pure functions: no I/O, no clock."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, Literal, get_args

import msgspec

from .arrival import SPREAD, Arrival, arrival, arrival_without_probe
from .observed import End, Hop, Stream

Kind = Literal[
    "buffered",
    "limit",
    "endless",
    "silence",
    "truncation",
    "hanging",
    "leaving",
    "garbled",
    "compressed",
    "content-type",
    "content-length",
    "caching",
    "head",
    "refused",
    "collected",
    "http10",
    "rewritten",
    "keep-alive",
    "continue",
]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a hop does. `text` completes the sentence "This hop …". A note harms no stream by itself."""

    kind: Kind
    text: str
    measure: float = 1.0
    """How bad it is. A hop is blamed for what is clearly worse than at the hop before it."""
    note: bool = False


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """The findings of one hop: all, and those that are its own and not of a hop behind it."""

    arrival: Arrival
    findings: list[Finding]
    own: list[Finding]
    claims: list[str]
    """The names of the programs that it seems to be, by its own words."""


# A finding is a hop's own if it is so much worse than behind it.
_WORSE: Final = 1.3
# Seconds. A head that arrives this long before the first event did not wait for it; the probe waits for longer.
_HEAD_EARLY: Final = 0.1
# What keeps caches from answering with what they have kept (RFC 9111, section 5.2.2). The probe sends the first.
_FRESH: Final = re.compile(r"\b(?:no-cache|no-store|private)\b", re.IGNORECASE)
# Seconds. Whoever notices within this time did not wait for an event.
_SOON: Final = 1.0


def diagnose(hops: Sequence[Hop]) -> list[Diagnosis]:
    """The findings of each of the `hops`, which are in order from the inside out."""
    diagnoses: list[Diagnosis] = []
    before: dict[Kind, Finding] = {}
    said: list[str] = []
    for hop in hops:
        how = arrival_of(hop)
        findings = list(_findings(hop, how))
        own = [
            finding
            for finding in findings
            if finding.kind not in before or finding.measure > _WORSE * before[finding.kind].measure
        ]
        claims = claims_of(hop.steady.fields)
        diagnoses.append(
            Diagnosis(arrival=how, findings=findings, own=own, claims=[name for name in claims if name not in said])
        )
        before = before | {finding.kind: finding for finding in findings}
        said = claims
    return diagnoses


def arrival_of(hop: Hop) -> Arrival:
    if hop.probed:
        second, slow = (stream.events if stream is not None else None for stream in (hop.again, hop.slow))
        return arrival(hop.steady.events, second, slow, hop.lag)
    return arrival_without_probe(hop.steady.events)


def _findings(hop: Hop, how: Arrival) -> Iterator[Finding]:
    yield from _of_arrival(how)
    yield from _of_cuts(hop)
    yield from _of_truncation(hop)
    yield from _of_leaving(hop)
    yield from _of_transformation(hop, how)
    yield from _of_uploads(hop)
    yield from _of_protocol(hop)


def _of_arrival(how: Arrival) -> Iterator[Finding]:
    match how.how:
        case "whole":
            text = f"holds the answer back until it ends, or until there is more than {format_size(how.size)}"
        case "bytes":
            text = f"collects {format_size(how.size)} before it forwards"
        case "time":
            text = f"holds events back for about {format_seconds(how.seconds)}, by a timer"
        case "irregularly":
            text = f"holds events back irregularly, for up to {format_seconds(how.latest)}"
        case _:
            return
    # By what a reader notices: how long events are held.
    yield Finding(kind="buffered", text=text, measure=max(how.latest, 0.01))


_ENDS: Final[dict[End, str]] = {
    "fin": "by closing the connection",
    "reset": "by a reset",
    "complete": "with an end that looks complete",
    "unread": "without closing the connection",
}


def _ending(stream: Stream) -> str:
    if stream.status != 200 and stream.status:
        return f"with an error page ({stream.status})"
    return "with an error event" if stream.error_event else _ENDS[stream.end]


def _of_cuts(hop: Hop) -> Iterator[Finding]:
    limit = _limit_of(hop)
    if limit is not None:
        after, stream = limit
        text = f"cuts an answer after {format_seconds(after)}, although events come, {_ending(stream)}"
        yield Finding(kind="limit", text=text, measure=1 / after)
    elif hop.probed and hop.steady.end == "unread":
        yield Finding(kind="endless", text="does not end an answer that its origin has ended")
    silence = hop.silence
    if silence is None or (limit is not None and limit[1] is not hop.steady):
        return
    before, quiet = silence.before, silence.quiet
    if not quiet.intact:
        after = _silent(quiet)
        text = f"cuts an answer after {format_seconds(after)} of silence, {_ending(quiet)}"
        if not before.intact:
            text += f", or one that has not begun, {_ending(before)}"
        if silence.beats is not None and silence.beats.intact:
            text += f"; a heartbeat every {format_seconds(silence.every)} keeps it open"
    elif not before.intact:
        after = _silent(before)
        text = f"cuts an answer if it has not begun after {format_seconds(after)}, {_ending(before)}"
    else:
        return
    yield Finding(kind="silence", text=text, measure=1 / max(after, 0.001))


def _silent(stream: Stream) -> float:
    """How long a stream that was cut had been silent."""
    return stream.ended_at - (stream.events[-1].received if stream.events else 0.0)


def _limit_of(hop: Hop) -> tuple[float, Stream] | None:
    """After how many seconds an answer is cut that was not silent."""
    stream = hop.steady
    if stream.status == 200 and (stream.end in ("fin", "reset") or stream.error_event):
        # Some proxies close the connection only a while after the last byte.
        return max(stream.events[-1].received if stream.events else stream.ended_at, 0.001), stream
    silence = hop.silence
    if silence is not None and silence.beats is not None and not silence.beats.intact:
        quiet, beats = silence.quiet.ended_at, silence.beats.ended_at
        if abs(quiet - beats) < max(1.0, SPREAD * quiet):
            return beats, silence.beats
    return None


def _of_truncation(hop: Hop) -> Iterator[Finding]:
    deaths = {"fin": "closes the connection", "reset": "resets the connection"}
    complete = " or ".join(deaths[how] for how, stream in hop.deaths.items() if stream.intact)
    if complete:
        text = f"makes an answer look complete although the origin {complete} in the middle"
        yield Finding(kind="truncation", text=text)
    waiting = " or ".join(deaths[how] for how, stream in hop.deaths.items() if stream.end == "unread")
    if waiting:
        yield Finding(kind="hanging", text=f"leaves the client waiting when the origin {waiting} in the middle")


def _of_leaving(hop: Hop) -> Iterator[Finding]:
    late = [one for one in hop.leaving if one.noticed is None or one.noticed > min(_SOON, one.silent / 2)]
    if not late:
        return
    worst = max(late, key=lambda one: math.inf if one.noticed is None else one.noticed)
    where = " or ".join(one.when for one in late)
    if worst.noticed is None:
        text = f"never tells the origin that a client has left {where}"
    elif worst.noticed >= worst.silent - 0.1:
        text = f"notices that a client has left {where} only when the next event comes"
    else:
        text = f"notices only after {format_seconds(worst.noticed)} that a client has left {where}"
    yield Finding(kind="leaving", text=text, measure=10.0 if worst.noticed is None else worst.noticed)


def _of_transformation(hop: Hop, how: Arrival) -> Iterator[Finding]:
    stream = hop.steady
    coding = stream.fields.get("content-encoding", "identity").lower()
    if coding != "identity":
        yield Finding(kind="compressed", text=f"compresses the stream ({coding})")
    if stream.status == 200 and not stream.fields.get("content-type", "").lower().startswith("text/event-stream"):
        now = stream.fields.get("content-type", "")[:80] or "none"
        yield Finding(kind="content-type", text=f"changes the Content-Type of a stream to {now}")
    if "content-length" in stream.fields and stream.status == 200:
        yield Finding(kind="content-length", text="gives a stream a Content-Length, so it has collected all of it")
    if hop.probed and stream.status == 200 and not _FRESH.search(stream.fields.get("cache-control", "")):
        yield Finding(kind="caching", text="takes Cache-Control: no-cache away, so a cache may keep answers", note=True)
    if stream.garbled:
        yield Finding(kind="garbled", text="loses, repeats or changes events")
    elif stream.rewritten and stream.intact:
        yield Finding(
            kind="rewritten", text="writes events anew: their text is the same, their bytes are not", note=True
        )
    if hop.probed and how.how == "alone" and _head_waits(stream):
        # A busy machine may have read both at once, but not twice.
        if hop.following is None or _head_waits(hop.following):
            yield Finding(kind="head", text="sends the response head only together with the first event")


def _head_waits(stream: Stream) -> bool:
    """Whether the response head came only with the first event."""
    if stream.head_at is None or not stream.events:
        return False
    return stream.events[0].received - stream.head_at < _HEAD_EARLY


def _of_uploads(hop: Hop) -> Iterator[Finding]:
    upload = hop.upload
    if upload is None:
        return
    if upload.refused is not None:
        limit = format_size(upload.accepted)
        text = f"refuses requests of more than {limit} ({upload.status})"
        if not upload.accepted:
            text = f"refuses requests of {format_size(upload.refused)} ({upload.status})"
        yield Finding(kind="refused", text=text, measure=1 / max(upload.accepted, 1))
    elif upload.status == 200 and upload.took < upload.pause / 2:
        text = f"collects an upload of {format_size(upload.size)} before it forwards it"
        yield Finding(kind="collected", text=text)


def _of_protocol(hop: Hop) -> Iterator[Finding]:
    if hop.steady.asked_in == "1.0":
        yield Finding(kind="http10", text="asks the next hop with HTTP/1.0, whose answers have no recognisable end")
    if hop.reused is False:
        yield Finding(kind="keep-alive", text="closes the connection after an answer", note=True)
    if hop.continued is False:
        yield Finding(kind="continue", text="does not answer Expect: 100-continue", note=True)


# --- what hops say they are ---

# A field, what its value matches, and the program. The first of each program counts.
_CLAIMS: Final = (
    ("server", r"openresty|nginx", "nginx"),
    ("server", r"envoy|istio", "Envoy"),
    ("server", r"caddy", "Caddy"),
    ("via", r"\bcaddy", "Caddy"),
    ("server", r"apache", "Apache"),
    ("server", r"cloudflare", "Cloudflare"),
    ("cf-ray", r"", "Cloudflare"),
    ("server", r"awselb", "ALB"),
    ("apigw-requestid", r"", "API Gateway"),
    ("x-amz-apigw-id", r"", "API Gateway"),
    ("x-azure-ref", r"", "Azure Front Door"),
    ("server", r"haproxy", "HAProxy"),
    ("server", r"traefik", "Traefik"),
    ("x-powered-by", r"express", "Express"),
    ("x-powered-by", r"next\.js", "Next.js"),
    ("server", r"uvicorn|hypercorn", "FastAPI"),
    ("via", r"\bsseproxy\b", "sseproxy"),
)


def claims_of(fields: dict[str, str]) -> list[str]:
    """The programs that the header fields of a response name, in the order of the table."""
    found = (name for field, value, name in _CLAIMS if field in fields and re.search(value, fields[field], re.I))
    return list(dict.fromkeys(found))


# --- in words ---

_ORDINALS: Final = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def sentence(hops: Sequence[Hop], diagnoses: Sequence[Diagnosis]) -> str:
    """The verdict in one sentence, about the hop that does most harm."""
    faults = [
        (_KINDS.index(finding.kind), index, finding.text)
        for index, diagnosis in enumerate(diagnoses)
        for finding in diagnosis.own
        if not finding.note
    ]
    if not faults:
        whole = {1: "this path is", 2: "both hops are"}.get(len(hops), f"all {len(hops)} hops are")
        late = diagnoses[-1].arrival.late
        how = f", {format_seconds(late)} late at the median" if hops[-1].probed and late >= 0.0005 else ""
        return f"No fault found: {whole} unbuffered, and each event arrives alone{how}."
    _, index, text = min(faults)
    rest = len(faults) - 1
    more = f" ({rest} more finding{'s'[: rest > 1]} below)" if rest else ""
    return f"{_subject(index, hops)}{_saying(diagnoses[index].claims)} {text}{more}."


_KINDS: Final[Sequence[Kind]] = get_args(Kind)
"""The worst first."""


def _subject(index: int, hops: Sequence[Hop]) -> str:
    if len(hops) == 1:
        return f"This path, {hops[0].url}"
    ordinal = _ORDINALS[index] if index < len(_ORDINALS) else f"{index + 1}th"
    return f"The {ordinal} hop, {hops[index].url}"


def _saying(claims: Sequence[str]) -> str:
    return f", which says it is {' or '.join(claims)}," if claims else ","


def format_size(size: int) -> str:
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def format_seconds(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1000:.1f} ms" if seconds >= 0.00005 else "0 ms"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.3g} s"


# --- speed ---


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, at p50 and p99: how much longer than the probe said, until the first event of a stream and per gap."""

    first: tuple[float, float] | None = None
    gap: tuple[float, float] | None = None


def speed_of(hop: Hop) -> Speed:
    """What was added by all hops up to this one. Without a probe: the times themselves."""
    streams = [hop.steady, *hop.deaths.values()]
    firsts = [one.events[0].received - (one.events[0].sent or 0.0) for one in streams if one.events]
    gaps = [
        (after.received - before.received) - ((after.sent or 0.0) - (before.sent or 0.0))
        for before, after in pairwise(hop.steady.events)
    ]
    return Speed(first=_p50_p99(firsts), gap=_p50_p99([abs(gap) for gap in gaps]))


def _p50_p99(values: Iterable[float]) -> tuple[float, float] | None:
    ordered = sorted(values)
    if not ordered:
        return None
    last = len(ordered) - 1
    return ordered[min(last, len(ordered) // 2)], ordered[min(last, int(0.99 * len(ordered)))]
