"""The report of an examination: for a terminal, as one page of HTML, and as JSON."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

import msgspec
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .observed import Hop
from .remedies import changes, remedies
from .verdict import (
    Diagnosis,
    Finding,
    Kind,
    Speed,
    diagnose,
    format_seconds,
    format_size,
    sentence,
    speed_of,
)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A hop that could not be examined, and why."""

    url: str
    why: str


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """The hops from the inside out, and the findings about them."""

    verdict: str
    hops: list[Hop]
    diagnoses: list[Diagnosis]
    failures: list[Failure]

    @property
    def faulty(self) -> bool:
        return any(not finding.note for diagnosis in self.diagnoses for finding in diagnosis.findings)


def conclude(hops: Sequence[Hop], failures: Sequence[Failure]) -> Examined:
    diagnoses = diagnose(hops)
    # First what is not known: "no fault found" is only about the other hops.
    said = [f"{failure.url} could not be examined: {_sentence(failure.why)}" for failure in failures]
    if hops:
        about = "As far as the path was examined: " if failures else ""
        said.append(about + sentence(hops, diagnoses))
    return Examined(verdict=" ".join(said), hops=list(hops), diagnoses=diagnoses, failures=list(failures))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!", "…")) else f"{text}."


def as_json(examined: Examined) -> str:
    document = {
        "verdict": examined.verdict,
        "good": not (examined.faulty or examined.failures),
        "hops": [
            {
                "url": hop.url,
                "arrival": diagnosis.arrival,
                "says_it_is": diagnosis.claims,
                "findings": [
                    {
                        "kind": finding.kind,
                        "text": finding.text,
                        "note": finding.note,
                        "own": finding in diagnosis.own,
                        "change": dict(remedies(finding.kind, diagnosis.claims)) if finding in diagnosis.own else {},
                    }
                    for finding in diagnosis.findings
                ],
                "speed": speed_of(hop),
                "observed": hop,
            }
            for hop, diagnosis in zip(examined.hops, examined.diagnoses, strict=True)
        ],
        "not_examined": examined.failures,
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n"


# --- the cells of the table ---

State = Literal["good", "bad", "note", "none"]


class Cell(NamedTuple):
    text: str
    state: State = "none"


_UNKNOWN: Final = Cell("not examined")


def _rows(examined: Examined) -> Iterator[tuple[str, list[Cell]]]:
    """The rows of the table: what was examined, and a cell for each hop."""
    speeds = [speed_of(hop) for hop in examined.hops]
    columns = [
        _column(hop, diagnosis, speed, speeds[index - 1] if index else None)
        for index, (hop, diagnosis, speed) in enumerate(zip(examined.hops, examined.diagnoses, speeds, strict=True))
    ]
    for label in columns[0] if columns else ():
        yield label, [column[label] for column in columns]


def _column(hop: Hop, diagnosis: Diagnosis, speed: Speed, before: Speed | None) -> dict[str, Cell]:
    found: dict[Kind, Finding] = {finding.kind: finding for finding in diagnosis.findings}

    def cell(good: str, *kinds: Kind, known: bool = True) -> Cell:
        texts = [found[kind] for kind in kinds if kind in found]
        if not texts:
            return Cell(good, "good") if known else _UNKNOWN
        state: State = "note" if all(finding.note for finding in texts) else "bad"
        return Cell("; ".join(finding.text for finding in texts), state)

    how, stream = diagnosis.arrival, hop.steady
    upload = f"{format_size(hop.upload.size)} streams through" if hop.upload is not None else ""
    silence = f"survives {format_seconds(hop.silence.seconds)}" if hop.silence is not None else ""
    slowest = max((one.noticed or 0.0 for one in hop.leaving), default=0.0)
    head = f"{format_seconds(stream.head_at or 0.0)} after the request"
    return {
        "events": cell("each alone", "buffered", "content-length"),
        "late, p50 / most": Cell(f"{format_seconds(how.late)} / {format_seconds(how.latest)}")
        if hop.probed
        else Cell("known only with a probe"),
        "response head": cell(head, "head"),
        "bytes": cell(
            "unaltered" if hop.probed else "as they came",
            "compressed",
            "garbled",
            "content-type",
            "rewritten",
            "caching",
        ),
        "whole answer": cell("not cut", "limit"),
        "silence": cell(silence, "silence", known=hop.silence is not None),
        "client leaves": cell(f"noticed after {format_seconds(slowest)}", "leaving", known=bool(hop.leaving)),
        "origin dies": cell("the client can tell", "truncation", "hanging", known=bool(hop.deaths)),
        "upload": cell(upload, "refused", "collected", known=hop.upload is not None),
        "protocol": cell(_protocol(hop), "http10", "keep-alive", "continue"),
        "says it is": Cell(_said(hop)),
        "first event, p50 / p99": _speed(speed.first, before.first if before else None),
        "gaps, p50 / p99": _speed(speed.gap, before.gap if before else None),
    }


def _protocol(hop: Hop) -> str:
    parts = [f"HTTP/{hop.steady.version}"]
    if hop.reused:
        parts.append("keep-alive")
    if hop.continued:
        parts.append("100-continue")
    return ", ".join(parts)


def _said(hop: Hop) -> str:
    fields = hop.steady.fields
    said = [f"{name.title()}: {fields[name]}" for name in ("server", "via", "x-powered-by") if name in fields]
    return printable("; ".join(said)) or "nothing"


def _speed(now: tuple[float, float] | None, before: tuple[float, float] | None) -> Cell:
    """What was added, and by this hop alone if there is one before it."""
    if now is None:
        return _UNKNOWN
    if before is None:
        return Cell(" / ".join(format_seconds(value) for value in now))
    added = [round(value - other, 4) for value, other in zip(now, before, strict=True)]
    return Cell(" / ".join(f"{'-' if value < 0 else '+'}{format_seconds(abs(value))}" for value in added))


# Characters of a verdict with several URLs.
_LONGEST: Final = 4000


def printable(text: str, most: int = 120) -> str:
    """Text of others, without what a terminal would obey."""
    clean = "".join(one if one.isprintable() else "?" for one in text)
    return clean if len(clean) <= most else clean[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


# --- strips ---


def _strips(hops: Sequence[Hop]) -> Iterator[tuple[str, list[float]]]:
    """For the probe and each hop: a label, and when its events were sent or received, in seconds from the request."""
    sent = [event.sent for event in (hops[0].steady.events if hops else []) if event.sent is not None]
    if sent:
        yield "sent by the probe", sent
    for index, hop in enumerate(hops):
        yield f"{index + 1}  {hop.url}", [event.received for event in hop.steady.events]


def _end_of(hops: Sequence[Hop]) -> float:
    return max((hop.steady.events[-1].received for hop in hops if hop.steady.events), default=1.0) or 1.0


_WIDTH: Final = 64
# Dots for one event, a few and many in one column.
_DOTS: Final = ((1, "\N{MIDDLE DOT}"), (3, "\N{BULLET}"), (10**9, "\N{BLACK CIRCLE}"))


def strip(times: Sequence[float], end: float, width: int = _WIDTH) -> str:
    """A line of `width` characters: the more events arrived in a column, the larger its dot."""
    counts = [0] * width
    for time in times:
        counts[min(width - 1, max(0, int(time / end * width)))] += 1
    return "".join(next((dot for most, dot in _DOTS if count <= most), "") if count else " " for count in counts)


# --- in a terminal ---

_STYLES: Final[dict[State, str]] = {"good": "green", "bad": "red", "note": "yellow", "none": ""}


def show(examined: Examined, console: Console) -> None:
    """Writes the examination to a terminal or a file."""
    console.print(Group(*_parts(examined)))


def _parts(examined: Examined) -> Iterator[RenderableType]:
    bad = examined.faulty or examined.failures
    yield Text(printable(examined.verdict, _LONGEST), "bold red" if bad else "bold green")
    hops = examined.hops
    if not hops:
        return
    end = _end_of(hops)
    yield Text("")
    for label, times in _strips(hops):
        yield Text(f"  {printable(label)}", "dim")
        yield Text(f"  {strip(times, end)}", "cyan")
    scale = f"{end:.1f} s"
    yield Text(f"  0 s{scale:>{_WIDTH - 3}}", "dim")
    yield Text("")
    yield _table(examined)
    for index, diagnosis in enumerate(examined.diagnoses):
        rows = changes((finding.kind for finding in diagnosis.own), diagnosis.claims)
        for finding, change in zip(diagnosis.own, rows, strict=True):
            yield Text("")
            who = f"{index + 1}  {hops[index].url} " if len(hops) > 1 else ""
            yield Text.assemble(
                (printable(who), "bold"), (printable(finding.text, _LONGEST), "yellow" if finding.note else "red")
            )
            yield Padding(_changes(change), (0, 0, 0, 2))


def _table(examined: Examined) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for index in range(len(examined.hops)):
        table.add_column(str(index + 1) if len(examined.hops) > 1 else "", overflow="fold")
    for label, cells in _rows(examined):
        table.add_row(
            Text(label, "dim"), *(Text(printable(cell.text, _LONGEST), _STYLES[cell.state]) for cell in cells)
        )
    return table


def _changes(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for program, change in rows:
        table.add_row(Text(program, "dim"), Text(change))
    return table


# --- as a page ---

_STYLE: Final = """
:root { color-scheme: light dark; --text: #1a1d21; --dim: #5b6470; --back: #ffffff; --line: #dfe3e8; --dot: #0b63c5;
  --good: #14713d; --bad: #b3261e; --note: #8a5a00; --panel: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --text: #e7eaee; --dim: #9aa4b0; --back: #14171b; --line: #2c333b;
  --dot: #6db3ff; --good: #63d297; --bad: #ff8a80; --note: #f0c060; --panel: #1c2127; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.05rem; color: var(--dim); font-weight: 600; margin: 0 0 .5rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.verdict { font-size: 1.3rem; line-height: 1.35; font-weight: 600; margin: 0 0 1.5rem; padding-left: .8rem;
  border-left: .3rem solid currentColor; }
.strip { margin: 0 0 .7rem; }
.strip span { display: block; font-size: .85rem; color: var(--dim); }
svg { display: block; width: 100%; height: auto; background: var(--panel); border-radius: .3rem; }
circle { fill: var(--dot); fill-opacity: .75; }
.scale { display: flex; justify-content: space-between; font-size: .8rem; color: var(--dim); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line);
  min-width: 7rem; }
th { font-weight: 600; color: var(--dim); }
code { font: .88em/1.45 ui-monospace, monospace; }
.good { color: var(--good); } .bad { color: var(--bad); } .note { color: var(--note); }
.finding { background: var(--panel); border-radius: .4rem; padding: .7rem .9rem; margin: 0 0 .8rem; }
.finding p { margin: 0 0 .4rem; font-weight: 600; }
.finding td { border: 0; padding: .15rem .8rem .15rem 0; }
@media (max-width: 32rem) { .finding td { display: block; padding: 0; } .finding td + td { padding-bottom: .4rem; } }
"""
_STRIP_WIDTH: Final = 1000
_STRIP_HEIGHT: Final = 36
_RADIUS: Final = 4.0
_LARGEST: Final = 16.0


def as_page(examined: Examined) -> str:
    """One page of HTML that needs nothing from outside."""
    bad = examined.faulty or examined.failures
    body = [
        "<h1>sseproxy doctor</h1>",
        f'<p class="verdict {"bad" if bad else "good"}">{_escaped(examined.verdict)}</p>',
    ]
    if examined.hops:
        end = _end_of(examined.hops)
        body.append("<h2>When events were sent, and when they arrived</h2>")
        body += [
            f'<div class="strip"><span>{_escaped(printable(label))}</span>{_svg(label, times, end)}</div>'
            for label, times in _strips(examined.hops)
        ]
        body.append(f'<div class="scale"><span>0 s</span><span>{end:.1f} s</span></div>')
        body += _findings_html(examined)
        body.append('<h2>What was examined</h2><div class="wide"><table>')
        if len(examined.hops) > 1:
            heads = "".join(f"<th>{index + 1}</th>" for index in range(len(examined.hops)))
            body.append(f"<tr><th></th>{heads}</tr>")
        for label, cells in _rows(examined):
            row = "".join(f'<td class="{cell.state}">{_escaped(cell.text)}</td>' for cell in cells)
            body.append(f"<tr><th>{_escaped(label)}</th>{row}</tr>")
        body.append("</table></div>")
    lines = "\n".join(body)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>sseproxy doctor</title>
<style>{_STYLE}</style>
</head>
<body>
{lines}
</body>
</html>
"""


def _findings_html(examined: Examined) -> Iterator[str]:
    own = [
        (index, finding, change)
        for index, diagnosis in enumerate(examined.diagnoses)
        for finding, change in zip(
            diagnosis.own, changes((finding.kind for finding in diagnosis.own), diagnosis.claims), strict=True
        )
    ]
    if own:
        yield "<h2>What to change</h2>"
    for index, finding, changed in own:
        who = f"{index + 1}  {examined.hops[index].url}: " if len(examined.hops) > 1 else "It "
        rows = "".join(
            f"<tr><td>{_escaped(program)}</td><td><code>{_in_lines(change)}</code></td></tr>"
            for program, change in changed
        )
        state = "note" if finding.note else "bad"
        text = _escaped(printable(who) + finding.text)
        yield f'<div class="finding"><p class="{state}">{text}</p><table>{rows}</table></div>'


def _svg(label: str, times: Sequence[float], end: float) -> str:
    """Events as dots on a line. Events that would lie over one another are one dot, which is larger."""
    inner = _STRIP_WIDTH - 2 * _LARGEST
    dots: list[tuple[float, int]] = []
    for time in times:
        at = _LARGEST + time / end * inner
        if dots and at - dots[-1][0] < 2 * _RADIUS:
            dots[-1] = dots[-1][0], dots[-1][1] + 1
        else:
            dots.append((at, 1))
    circles = "".join(
        f'<circle cx="{at:.0f}" cy="{_STRIP_HEIGHT / 2:.0f}" r="{min(_RADIUS * count**0.5, _LARGEST):.1f}"/>'
        for at, count in dots
    )
    title = f"<title>{_escaped(f'{len(times)} events: {label}')}</title>"
    return f'<svg viewBox="0 0 {_STRIP_WIDTH} {_STRIP_HEIGHT}" role="img">{title}{circles}</svg>'


def _in_lines(text: str) -> str:
    return "<br>".join(_escaped(line) for line in text.splitlines())


def _escaped(text: str) -> str:
    return html.escape(printable(text, _LONGEST))
