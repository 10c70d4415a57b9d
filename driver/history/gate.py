"""Limits that a run is held to, for CI: `p90>+5%`, `p90>12ms`, `peak_memory>50MB`, with noise counted in."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Literal

import msgspec

from ...graph.errors import RecipeError
from ...runtimes.device_runner import ratio_interval
from ..output import format_figure, format_percent
from .compare import Pair, Spread, change
from .rows import METRICS_BY_NAME, Measurement, Metric, Unit

State = Literal["passed", "failed", "undecided", "void", "not measured", "no reference", "other conditions"]
_TEXT = re.compile(
    r"\s*(?P<metric>[A-Za-z0-9_.-]+)\s*>\s*(?P<plus>\+?)\s*"
    r"(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?)\s*(?P<unit>%|[A-Za-z]*)\s*"
)
_UNITS: dict[Unit, dict[str, float]] = {
    "ms": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "bytes": {
        "B": 1.0,
        "kB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "KiB": 2.0**10,
        "MiB": 2.0**20,
        "GiB": 2.0**30,
    },
    "fraction": {"": 1.0, "%": 0.01},
    "joules": {"uJ": 1e-6, "mJ": 1e-3, "J": 1.0},
    "count": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
}
_EXAMPLE = "write METRIC>+5% against an earlier run, or METRIC>LIMIT such as p90>12ms or peak_memory>50MB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """One limit.

    Attributes:
        text: as it was written.
        growth_fraction: the most that the figure may grow by against the reference.
        growth: the same as an amount in the metric's unit.
        limit: the most that the figure itself may be, in the metric's unit.
    """

    text: str
    metric: Metric
    growth_fraction: float | None = None
    growth: float | None = None
    limit: float | None = None

    @property
    def is_relative(self) -> bool:
        """Whether it needs a reference."""
        return self.limit is None


class GateResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of one gate on one row.

    Attributes:
        subject: what was held to it.
        holds: whether the exit code may be 0; of an undecided one this depends on --strict-gate.
    """

    gate: str
    subject: str
    state: State
    holds: bool
    text: str


def parse_gate(text: str) -> Gate:
    """Read `p90>+5%`, `p90>+0.4ms`, `p90>12ms`.

    Raises:
        RecipeError: if it is not of this form, or the metric or the unit is not known.
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        raise RecipeError(f"{text!r} is no gate", where="--fail-if", remedy=_EXAMPLE)
    name = found["metric"].lower().replace("-", "_").replace("p99_9", "p99.9")
    metric = METRICS_BY_NAME.get(name)
    if metric is None:
        near = difflib.get_close_matches(name, METRICS_BY_NAME, n=1)
        raise RecipeError(
            f"{found['metric']!r} is no metric",
            where=f"--fail-if {text!r}",
            remedy=f"did you mean {near[0]}?" if near else f"use one of {', '.join(METRICS_BY_NAME)}",
        )
    number, unit, plain = float(found["number"]), found["unit"], " ".join(text.split())
    if not math.isfinite(number):
        raise RecipeError("the limit is too large", where=f"--fail-if {text!r}", remedy=_EXAMPLE)
    if found["plus"] and unit == "%":
        return Gate(text=plain, metric=metric, growth_fraction=number / 100)
    units = _UNITS[metric.unit]
    if unit not in units:
        hint = (
            f"; for a change against an earlier run write {name}>+{found['number']}%" if unit == "%" else ""
        )
        raise RecipeError(
            f"{unit!r} is no unit of {name}" if unit else f"{name} needs a unit",
            where=f"--fail-if {text!r}",
            remedy=f"use {', '.join(filter(None, units)) or 'a plain number'}{hint}",
        )
    value = number * units[unit]
    if not math.isfinite(value):
        raise RecipeError("the limit is too large", where=f"--fail-if {text!r}", remedy=_EXAMPLE)
    return Gate(text=plain, metric=metric, **{"growth" if found["plus"] else "limit": value})


def judge(gate: Gate, row: Measurement, pair: Pair | None, *, subject: str, strict: bool) -> GateResult:
    """Hold one row to one gate.

    A gate fails where the whole 95 % interval lies beyond the limit, passes where the whole of it is
    within, and is undecided in between: the run was too short or the machine too restless. Where the noise
    is not known, a growth beyond the limit is undecided, and a figure beyond a limit of its own fails.

    Args:
        gate: the limit.
        row: what is held to it; a void one never passes.
        pair: the row with its reference; None where there is none.
        subject: what the row is, for people.
        strict: whether undecided counts as failed.
    """
    if row.void:
        state: State = "void"
        text = f"the run does not count: {'; '.join(row.void_reasons) or 'it is marked void'}"
    elif gate.metric.of(row) is None:
        state, text = "not measured", _not_measured(gate.metric, row)
    elif gate.is_relative:
        state, text = _judge_growth(gate, pair)
    else:
        state, text = _judge_limit(gate, row, pair)
    holds = state == "passed" or (state == "undecided" and not strict)
    return GateResult(gate=gate.text, subject=subject, state=state, holds=holds, text=text)


def _not_measured(metric: Metric, row: Measurement) -> str:
    if row.emulated and metric.unit == "ms":
        return f"an emulated board has no {metric.name}: hold it to instructions"
    if metric.name == "instructions" and not row.emulated:
        return "only an emulated board counts instructions"
    return f"{metric.name} was not measured"


def _judge_growth(gate: Gate, pair: Pair | None) -> tuple[State, str]:
    if pair is None:
        return "no reference", "there is no earlier run under the same conditions"
    if pair.before.void:
        return "no reference", "the earlier run is void"
    metric = gate.metric
    before, after = metric.of(pair.before), metric.of(pair.after)
    if before is None or after is None:
        return "no reference", f"the earlier run did not measure {metric.name}"
    if not metric.exact and (differences := pair.differences(deciding=True)):
        return "other conditions", "; ".join(differences)
    figures = f"{format_figure(before, metric.unit)} → {format_figure(after, metric.unit)}"
    found = change(metric, pair.before, pair.after, pair.spreads.get(metric.name))
    if found.ratio is None:  # from or to 0: any growth from 0 is beyond any part of it
        most = before + (gate.growth or 0.0)
        return ("failed" if after > most else "passed"), figures
    fraction = gate.growth / before if gate.growth is not None else gate.growth_fraction or 0.0
    text = f"{figures}, {format_growth(found.ratio, found.low, found.high)}"
    return _state(found.ratio, found.low, found.high, 1 + fraction, unknown="undecided"), text


def _judge_limit(gate: Gate, row: Measurement, pair: Pair | None) -> tuple[State, str]:
    metric, limit = gate.metric, gate.limit or 0.0
    value = metric.of(row) or 0.0
    spread = pair.spreads.get(metric.name) if pair is not None else None
    low, high = figure_interval(metric, row, spread)
    shown = format_figure(value, metric.unit)
    if low is not None and high is not None and not metric.exact:
        shown += f" ({format_figure(low, metric.unit)} to {format_figure(high, metric.unit)})"
    return _state(value, low, high, limit, unknown="failed"), shown


def figure_interval(
    metric: Metric, row: Measurement, spread: Spread | None = None
) -> tuple[float | None, float | None]:
    """The 95 % interval of one row's figure: of its percentile, else of its sessions; repeats widen it."""
    value = metric.of(row)
    low, high = metric.interval(row)
    series = row.sessions_ms.get(metric.sessions or "", ())
    if low is None and high is None and len(series) >= 2 and min(series) > 0:
        _, low, high = ratio_interval(series)
    if value is not None:  # where sessions and the whole run disagree, nothing is decided
        low = None if low is None else min(low, value)
        high = None if high is None else max(high, value)
    if value is not None and value > 0 and spread is not None and not metric.exact:
        wide_low, wide_high = value * math.exp(-spread.half(1)), value * math.exp(spread.half(1))
        low = wide_low if low is None else min(low, wide_low)
        high = wide_high if high is None else max(high, wide_high)
    return low, high


def _state(
    value: float,
    low: float | None,
    high: float | None,
    limit: float,
    *,
    unknown: Literal["undecided", "failed"],
) -> State:
    if low is None and high is None:
        return unknown if value > limit else "passed"
    if low is not None and low > limit:
        return "failed"
    if high is not None and high <= limit:
        return "passed"
    return "undecided"


def format_growth(ratio: float, low: float | None, high: float | None) -> str:
    """A ratio as a change with its interval: "+4.20 % (+1.10 % to +7.40 %)"."""
    middle = _signed(ratio)
    if low is None and high is None:
        return f"{middle} (noise unknown)"
    if low == high:
        return middle
    return f"{middle} ({'?' if low is None else _signed(low)} to {'?' if high is None else _signed(high)})"


def _signed(ratio: float) -> str:
    fraction = ratio - 1
    return f"{'+' if fraction > 0 else ''}{format_percent(round(fraction, 6))}"
