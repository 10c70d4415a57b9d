"""Two runs against each other: every figure before and after, and whether the difference is beyond noise."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from ...runtimes.device_runner import balanced_interval, ratio_interval, student_95
from .rows import METRICS, Measurement, Metric, Unit, comparable

Basis = Literal["exact", "sessions", "percentiles", "run to run", "assumed"]
Verdict = Literal["equal", "no difference", "higher", "lower", "noise unknown"]
# Fewer degrees of freedom than this say too little about how far repeats of one run lie apart.
_LEAST_DEGREES = 2
_NORMAL_95 = 1.960
_MOST_REPEATS = 20
_CONDITIONS = ("kind", "model", "target", "threads", "shapes", "runtime", "emulated", "board", "cpu", "url")
# Where these differ, times and memory say nothing about the change that is looked for.
_DECIDING = ("kind", "threads", "shapes", "emulated", "board", "cpu", "url")


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure before and after.

    Attributes:
        ratio: after / before; None where one is missing or before is 0. Of sessions the geometric mean of
            their ratios, which need not be that of the two figures.
        low, high: its 95 % interval; None where the noise is not known.
        basis: what the interval comes from; the widest of what is known counts.
        verdict: "higher" and "lower" only where the interval does not hold 1.
    """

    metric: str
    unit: Unit
    before: float | None
    after: float | None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    basis: Basis | None = None
    verdict: Verdict | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """How far repeats of one run lie apart: standard deviation of logarithms, and degrees of freedom."""

    deviation: float
    degrees: int

    def half(self, runs: int) -> float:
        """Half of the 95 % interval of a single run's logarithm (1), or of the difference of two (2)."""
        return student_95(self.degrees) * self.deviation * math.sqrt(runs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A row and the earlier one that it is compared with.

    Attributes:
        spreads: by metric, what repeats in the history say of the noise from run to run.
    """

    before: Measurement
    after: Measurement
    spreads: dict[str, Spread] = dataclasses.field(default_factory=dict)

    def changes(self) -> list[Change]:
        """Every metric that one of the two has."""
        found = (change(metric, self.before, self.after, self.spreads.get(metric.name)) for metric in METRICS)
        return [item for item in found if item.before is not None or item.after is not None]

    def differences(self, *, deciding: bool = False) -> list[str]:
        """In which conditions the two differ, one line each; with `deciding` those that spoil times."""
        found = []
        interleaved = ("target", "model") if self.before.run == self.after.run else ()
        for name in _DECIDING if deciding else _CONDITIONS:
            if name in interleaved:
                continue
            before, after = getattr(self.before, name), getattr(self.after, name)
            unsaid = name in ("board", "cpu", "url", "runtime") and (before is None or after is None)
            if before != after and not unsaid:
                found.append(f"{name}: {_said(before)} before, {_said(after)} after")
        return found


def _said(value: object) -> str:
    return "not told" if value is None else str(value)


def change(metric: Metric, before: Measurement, after: Measurement, spread: Spread | None = None) -> Change:
    """One metric of two rows.

    The ratio is after / before. Of what repeats by session it is the geometric mean of the sessions'
    ratios, with Student's interval on their logarithms, extended to hold the ratio of the two figures:
    where sessions and the whole run disagree, nothing is decided. Else the interval is made of the
    percentiles' own ones, low / high and high / low, which is wider than 95 %. Sessions of one process are
    more alike than two runs are: the spread of repeats in the history, t · s · √2, is the least half-width,
    and where there are none, the one that is usual comes on top. Of two rows of one run, which were
    interleaved, the sessions alone count.
    """
    old, new = metric.of(before), metric.of(after)
    if old is None or new is None or old <= 0 or new <= 0:
        verdict: Verdict | None = None
        if old is not None and new is not None:
            verdict = "equal" if old == new else "higher" if new > old else "lower"
        return Change(metric=metric.name, unit=metric.unit, before=old, after=new, verdict=verdict)
    ratio, low, high, basis = _within(metric, before, after)
    half, wider = _from_run_to_run(metric, before, after, spread)
    if wider is not None:
        inner = (low, high)
        closes = wider == "run to run" or metric.sessions is None
        low = _further(low, ratio, -half, adds=wider == "assumed", closes=closes)
        high = _further(high, ratio, half, adds=wider == "assumed", closes=closes)
        if (low, high) != inner and (basis is None or wider == "run to run"):
            basis = wider
    return Change(
        metric=metric.name,
        unit=metric.unit,
        before=old,
        after=new,
        ratio=ratio,
        low=low,
        high=high,
        basis=basis,
        verdict=_verdict(ratio, low, high, exact=metric.exact),
    )


def _further(side: float | None, ratio: float, half: float, *, adds: bool, closes: bool) -> float | None:
    """A side of the interval, moved away from the ratio.

    Args:
        side: as the runs' own noise has it; None stays open unless `closes`: few runs may not bound it.
        ratio: above 0.
        half: on the logarithm, below 0 for the lower side.
        adds: the noise comes on top of the runs' own (root of the sum of squares); else it contains that.
    """
    if side is None:
        return ratio * math.exp(half) if closes else None
    own = math.log(side / ratio)
    further = math.hypot(own, half) if adds else max(abs(own), abs(half))
    return ratio * math.exp(math.copysign(further, half))


def _from_run_to_run(
    metric: Metric, before: Measurement, after: Measurement, spread: Spread | None
) -> tuple[float, Basis | None]:
    """The least half-width of the interval, on the logarithm, and where it comes from; None if nowhere."""
    interleaved = before.run == after.run and metric.sessions is not None
    if metric.exact or interleaved:
        return 0.0, None
    if spread is not None:
        return spread.half(2), "run to run"
    return _NORMAL_95 * metric.usual_spread * math.sqrt(2), "assumed"


def _within(
    metric: Metric, before: Measurement, after: Measurement
) -> tuple[float, float | None, float | None, Basis | None]:
    """Ratio and interval from the two runs alone, both with the figure above 0."""
    ratio = (metric.of(after) or 0.0) / (metric.of(before) or 1.0)
    if metric.exact:
        return ratio, ratio, ratio, "exact"
    if metric.sessions is not None:
        old, new = before.sessions_ms.get(metric.sessions, ()), after.sessions_ms.get(metric.sessions, ())
        count = min(len(old), len(new))
        if count >= 2 and min(*old, *new) > 0:
            ratios = [late / early for early, late in zip(old[:count], new[:count], strict=True)]
            paired = before.run == after.run and metric.name != "cold_start"  # opened in alternating order
            interval = balanced_interval if paired else ratio_interval
            middle, low, high = interval(ratios)
            if low is not None and high is not None:
                return middle, min(low, ratio), max(high, ratio), "sessions"
    (old_low, old_high), (new_low, new_high) = metric.interval(before), metric.interval(after)
    low = new_low / old_high if new_low is not None and old_high else None
    high = new_high / old_low if new_high is not None and old_low else None
    return ratio, low, high, None if low is None and high is None else "percentiles"


def _verdict(ratio: float, low: float | None, high: float | None, *, exact: bool) -> Verdict:
    if ratio == 1 and exact:
        return "equal"
    if low is not None and low > 1:
        return "higher"
    if high is not None and high < 1:
        return "lower"
    return "noise unknown" if low is None or high is None else "no difference"


def spreads_of(rows: Iterable[Measurement], like: Measurement) -> dict[str, Spread]:
    """How far repeats lie apart, by metric: rows of one bundle under the conditions of `like`, pooled.

    Args:
        rows: of the history, the oldest first.
        like: what is compared.

    The variance is pooled within bundles: sum of squares about each bundle's own mean, over the sum of
    (runs - 1). Void runs do not count, nor do runs less than half as long as `like`, which are noisier. Of
    a bundle the latest 20 count: a machine is not what it was a year ago.

    Source: Box, Hunter & Hunter, Statistics for Experimenters, 2nd ed., 2005, §3.5 (pooled variance).
    """
    groups: dict[str, list[Measurement]] = {}
    for row in rows:
        long_enough = row.runs is None or like.runs is None or 2 * row.runs >= like.runs
        if row.bundle_digest is not None and not row.void and long_enough and comparable(row, like):
            groups.setdefault(row.bundle_digest, []).append(row)
    found = {}
    for metric in METRICS:
        squares, degrees = 0.0, 0
        for group in groups.values():
            latest = group[-_MOST_REPEATS:]
            logs = [math.log(value) for row in latest if (value := metric.of(row)) is not None and value > 0]
            if len(logs) >= 2:
                squares += statistics.variance(logs) * (len(logs) - 1)
                degrees += len(logs) - 1
        if degrees >= _LEAST_DEGREES and not metric.exact:
            found[metric.name] = Spread(deviation=math.sqrt(squares / degrees), degrees=degrees)
    return found


def match(
    before: Sequence[Measurement], after: Sequence[Measurement]
) -> list[tuple[Measurement, Measurement]]:
    """For every row after, the row before of the same role that is most like it; one and one always match.

    Args:
        before: the rows of a reference, the oldest first.
        after: the rows to compare.
    """
    if len(before) == 1 and len(after) == 1:
        return [(before[0], after[0])]
    names = ("url", "device", "model", "target", "threads", "shapes", "thing", "bundle_path")
    found = []
    for row in after:
        alike = [other for other in before if other.role == row.role]
        if alike:

            def likeness(item: tuple[int, Measurement], row: Measurement = row) -> tuple[int, int]:
                same = sum(getattr(item[1], name) == getattr(row, name) for name in names)
                return same, item[0]

            found.append((max(enumerate(alike), key=likeness)[1], row))
    return found


def latest_before(rows: Sequence[Measurement], row: Measurement) -> Measurement | None:
    """The last run that counts under the same conditions, of the same place if there is one.

    Args:
        rows: earlier ones, the oldest first.
        row: what is to be compared.
    """
    alike = [other for other in rows if not other.void and comparable(other, row)]
    same_place = [other for other in alike if other.bundle_path == row.bundle_path]
    return next(reversed(same_place or alike), None)
