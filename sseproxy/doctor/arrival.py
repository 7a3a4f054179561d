"""How events arrive: alone, or held by a buffer or a timer. Pure functions: no I/O, no clock.

The probe sends events of equal size at an equal pace, and says when. The clocks of the two machines differ by an
unknown amount, so only differences count: an event is late by how much longer it took than the fastest one. It was
held if it was late by more than half a gap. A buffer holds at least every second event, at any pace. A busy machine
holds events as well, but not for long, and not all the time. So a stream is held if a quarter of its events are, in
each third of it, and if the same is true of a second stream, and of a slow one. Short delays do not hold the events of
a slow stream. They are only told from those of a busy machine if the client and the probe were not late themselves.

The second stream has another pace. A buffer that is emptied when it is full sends bursts of the same size in both
streams. One that a timer empties has held the first event of each burst for the same time in both. If neither is so,
or bursts of one stream differ among themselves, events are held irregularly. If nothing came before the end, the whole
was held, or the buffer is larger than the stream.

Without a probe only arrival times are known. Then a stream is held if all of it came at once, or in bursts of equal
sizes or at equal times. Models do not write like that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Final, Literal, NamedTuple

import msgspec

from .observed import Event

How = Literal["alone", "whole", "bytes", "time", "irregularly"]

# A held stream has at least this share of held events: a buffer of two events holds every second one.
_HELD: Final = 0.25
# Bursts that differ by more than this from their median are not regular, and neither are sizes of two streams.
SPREAD: Final = 0.3
_REGULAR: Final = 0.8
# Seconds. A machine whose timers are no later than this is not busy.
_CALM: Final = 0.01
# The whole was held if this share of it came at the end.
_WHOLE: Final = 0.9
# Buffers have sizes that are powers of two. Framing takes some percent of them.
_NEAR_POWER: Final = 0.12
# An estimate of fewer events than this is none.
_FEWEST: Final = 8
# Seconds for an event. No model writes faster.
_FASTEST: Final = 0.0005
# Seconds. An API that answers so fast may well have nothing to stream.
_SHORT: Final = 0.5


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """How events arrive: each alone, or held. `late` and `latest` are the median and the most, in seconds."""

    how: How
    size: int = 0
    """Bytes that are collected, about; or, if the whole is held, how many at least."""
    seconds: float = 0.0
    """The interval of the timer, about."""
    late: float = 0.0
    latest: float = 0.0


class _Burst(NamedTuple):
    """Events that arrived together. `held`: how late the first one was."""

    held: float
    size: int
    at: float


class _Timing(NamedTuple):
    late: list[float]
    held: float
    """The share of held events, in that third of the stream where it is least."""
    bursts: list[_Burst]
    """Without the last one, which the end of the stream has sent, and without the first one if there are others."""
    size: int
    """All bytes, and of the last burst."""
    last: int
    duration: float


def _timing(events: Sequence[Event]) -> _Timing:
    took = [event.received - (event.sent or 0.0) for event in events]
    least = min(took)
    late = [one - least for one in took]
    gaps = [(after.sent or 0.0) - (before.sent or 0.0) for before, after in pairwise(events)]
    pace = median(gaps)
    held = [one > max(gap, pace) / 2 for one, gap in zip(late, gaps, strict=False)]
    third = len(held) // 3
    share = min(fmean(part) for part in (held[:third], held[third:-third], held[-third:]))
    bursts = list(_bursts(events, late, pace / 2))
    size = sum(event.size for event in events)
    last = bursts.pop()
    # The first burst has the response head in it, and a timer may have begun before it.
    return _Timing(
        late, share, bursts[len(bursts) > 1 :], size, last.size, (events[-1].sent or 0.0) - (events[0].sent or 0.0)
    )


def _bursts(events: Sequence[Event], late: Sequence[float], apart: float) -> Iterator[_Burst]:
    """Events that arrived less than `apart` after one another are a burst."""
    first, size = 0, 0
    for index, event in enumerate(events):
        if index and event.received - events[index - 1].received > apart:
            yield _Burst(late[first], size, events[first].received)
            first, size = index, 0
        size += event.size
    yield _Burst(late[first], size, events[first].received)


def arrival(
    first: Sequence[Event],
    second: Sequence[Event] | None = None,
    slow: Sequence[Event] | None = None,
    lag: float = 0.0,
) -> Arrival:
    """How the events of a probe arrive, by one stream or by several of different pace.

    `lag`: how late the client and the probe themselves were, in seconds.
    """
    if len(first) < _FEWEST:
        return Arrival(how="alone")
    one = _timing(first)
    others = [_timing(stream) for stream in (second, slow) if stream is not None and len(stream) >= _FEWEST]
    found = _held_how([one, *others[:1]])
    if one.held < _HELD or (others and others[0].held < _HELD):
        found = Arrival(how="alone")
    elif len(others) > 1 and others[1].held < _HELD and found.how != "time":
        found = Arrival(how="irregularly")
    if len(others) > 1 and others[1].held < _HELD and lag > _CALM:
        found = Arrival(how="alone")
    return msgspec.structs.replace(found, late=median(one.late), latest=max(one.late))


def _held_how(streams: Sequence[_Timing]) -> Arrival:
    """How events are held, given that they are."""
    if all(timing.last >= _WHOLE * timing.size for timing in streams):
        return Arrival(how="whole", size=streams[-1].size)
    sizes, times = _by_size(streams), _by_time(streams)
    if sizes is not None and (times is None or sizes <= times):
        return Arrival(how="bytes", size=round_size(_mean_size(streams)))
    if times is not None:
        # Of a faster stream, the first event of a burst comes sooner after the timer has begun.
        held = median(burst.held for burst in min(streams, key=_pace_of).bursts)
        return Arrival(how="time", seconds=float(f"{held:.1g}" if held >= 0.01 else f"{held:.3f}"))
    return Arrival(how="irregularly")


def needs_another(first: Sequence[Event]) -> Literal["", "faster", "larger"]:
    """Whether a second stream has to be asked for, and which: one that is faster, or one with far more bytes."""
    if len(first) < _FEWEST:
        return ""
    timing = _timing(first)
    if timing.held < _HELD:
        return ""
    return "faster" if len(timing.bursts) >= 2 else "larger"


def _pace_of(timing: _Timing) -> float:
    return timing.duration / max(1, len(timing.late) - 1)


def _mean_size(streams: Sequence[_Timing]) -> float:
    """The mean size of a burst, in the stream with the smallest events that has any: an event more is least there."""
    seen = [timing for timing in streams if timing.bursts]
    bursts = [burst.size for burst in min(seen, key=lambda timing: timing.size / len(timing.late)).bursts]
    return fmean(bursts)


def _by_size(streams: Sequence[_Timing]) -> float | None:
    """How unequal the sizes of the bursts of all `streams` are; None if they are too unequal."""
    least = [timing.size / len(timing.late) for timing in streams]
    measured = [[float(burst.size) for burst in timing.bursts] for timing in streams]
    return _unequal(measured, least, [0.9 * timing.size for timing in streams])


def _by_time(streams: Sequence[_Timing]) -> float | None:
    """The same for the times for which the first events of the bursts were held."""
    least = [_pace_of(timing) for timing in streams]
    measured = [[burst.held for burst in timing.bursts] for timing in streams]
    return _unequal(measured, least, [0.9 * timing.duration for timing in streams])


def _unequal(measured: Sequence[Sequence[float]], steps: Sequence[float], beyond: Sequence[float]) -> float | None:
    """How unequal `measured` is over all streams, as the logarithm of a ratio; None if it is too unequal.

    `steps`: what one event more or less makes. `beyond`: if a stream has no burst, it is at least this.
    """
    middles: list[float] = []
    for values, step in zip(measured, steps, strict=True):
        if not values:
            continue
        middle = median(values)
        near = sum(abs(value - middle) <= max(SPREAD * middle, step) for value in values)
        if near < min(_REGULAR * len(values), len(values) - 1):
            return None
        middles.append(middle)
    least = max((bound for values, bound in zip(measured, beyond, strict=True) if not values), default=0.0)
    if not middles or min(middles) < least:
        return None
    # One event more or less is no difference.
    low, high = min(middles), max(middles)
    tolerance = max(SPREAD * high, sum(steps))
    if high - low > tolerance:
        return None
    return math.log(max(high, 1e-9) / max(low, 1e-9))


def round_size(size: float) -> int:
    """A size of a buffer as people would give it: a power of two if one is near, or else two digits."""
    power: int = 2 ** round(math.log2(max(size, 1.0)))
    if abs(size - power) <= _NEAR_POWER * power:
        return power
    digits = max(0, int(math.log10(max(size, 1.0))) - 1)
    factor: int = 10**digits
    return round(size / factor) * factor


def arrival_without_probe(events: Sequence[Event]) -> Arrival:
    """How the events of an API arrive, by their arrival times alone."""
    if len(events) < _FEWEST:
        return Arrival(how="alone")
    first, last = events[0].received, events[-1].received
    size = sum(event.size for event in events)
    if last > _SHORT and last - first < _FASTEST * len(events) and len(events) >= 2 * _FEWEST:
        return Arrival(how="whole", size=size)
    apart = max(0.005, (last - first) / (len(events) - 1) / 2)
    bursts = list(_bursts(events, [0.0] * len(events), apart))[:-1]
    if len(bursts) < 4 or len(events) < 3 * len(bursts):
        return Arrival(how="alone")
    step = size / len(events)
    sizes = _unequal([[float(burst.size) for burst in bursts]], [0.0], [0.0])
    gaps = [after.at - before.at for before, after in pairwise(bursts)]
    times = _unequal([gaps], [0.0], [0.0])
    # Models that write several tokens at a time send small bursts, at times that are as irregular as they are.
    if sizes is not None and fmean(burst.size for burst in bursts) >= 4 * step and (times is None or _even(bursts)):
        return Arrival(how="bytes", size=round_size(fmean(burst.size for burst in bursts)))
    if times is not None:
        return Arrival(how="time", seconds=float(f"{median(gaps):.1g}"))
    return Arrival(how="alone")


def _even(bursts: Sequence[_Burst]) -> bool:
    """Whether the sizes of bursts differ by less than their times do."""
    gaps = [after.at - before.at for before, after in pairwise(bursts)]
    sizes = [burst.size for burst in bursts]

    def spread(values: Sequence[float]) -> float:
        return (max(values) - min(values)) / fmean(values)

    return spread(sizes) <= spread(gaps)
