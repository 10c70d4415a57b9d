"""Comparisons and gates as tables, documents, CSV records and JUnit cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..output import Case, CaseState, Table, format_figure
from .compare import Change, Pair
from .gate import GateResult, State, format_growth
from .record import SHORT_ID
from .rows import METRICS_BY_NAME, Measurement

_STATES: dict[State, CaseState] = {
    "passed": "passed",
    "undecided": "skipped",
    "no reference": "error",
    "other conditions": "error",
}


def label(row: Measurement, *, of: Sequence[Measurement] = ()) -> str:
    """What a row is, for people: model and target, and whatever tells it from the others of `of`."""
    name = row.model or row.thing
    if row.target is not None:
        name += f" for {row.target}"
    elif row.role == "baseline" or row.model is None:
        name = row.thing
    parts = [name]
    if row.role not in ("bundle", "model") and row.role != name:
        parts.append(row.role)
    if row.device != "local":
        parts.append(f"on {row.device}")
    same = [other for other in of if other.run == row.run and label(other) == " ".join(parts)]
    if same and any(other.thing != row.thing for other in same):
        parts.insert(1, f"({row.thing})")
    return " ".join(parts)


def when(row: Measurement) -> str:
    """Which run and when: "3f9a1c77b0, 2026-01-31 12:00"."""
    return f"{row.run[:SHORT_ID]}, {row.started[:16].replace('T', ' ')}"


def comparison_table(pair: Pair) -> Table:
    """A row per metric of a pair."""
    rows = tuple(_row(change) for change in pair.changes())
    return Table(
        columns=("figure", "before", "after", "change (95 % interval)", "difference"),
        rows=rows,
        title=f"{label(pair.after)}: against {_reference(pair)}",
        numeric=frozenset({"before", "after"}),
    )


def _reference(pair: Pair) -> str:
    return pair.before.thing if pair.before.run == pair.after.run else when(pair.before)


def _row(change: Change) -> tuple[str, ...]:
    growth = "" if change.ratio is None else format_growth(change.ratio, change.low, change.high)
    before, after = (
        format_figure(value, change.unit) or "not measured" for value in (change.before, change.after)
    )
    return change.metric, before, after, growth, change.verdict or ""


def comparison_document(pair: Pair) -> dict[str, Any]:
    """A pair for JSON."""
    return {
        "before": identity(pair.before),
        "after": identity(pair.after),
        "differences": pair.differences(),
        "figures": msgspec.to_builtins(pair.changes()),
    }


def identity(row: Measurement) -> dict[str, Any]:
    """Which row it is."""
    names = ("run", "thing", "role", "started", "device", "model", "target", "bundle_digest", "void")
    return {name: getattr(row, name) for name in names}


def comparison_records(pair: Pair) -> list[dict[str, object]]:
    """A record per metric of a pair; figures in the unit that stands beside them."""
    return [
        {
            "model": pair.after.model,
            "target": pair.after.target,
            "device": pair.after.device,
            "before_run": pair.before.run,
            "after_run": pair.after.run,
            "metric": change.metric,
            "unit": change.unit,
            "before_in_unit": change.before,
            "after_in_unit": change.after,
            "ratio": change.ratio,
            "ratio_low": change.low,
            "ratio_high": change.high,
            "interval_from": change.basis,
            "difference": change.verdict,
        }
        for change in pair.changes()
    ]


def measurement_record(row: Measurement) -> dict[str, object]:
    """A row as a record: the fields' names carry the units."""
    found = msgspec.structs.asdict(row)
    del found["sessions_ms"]
    return found


def gate_table(results: Sequence[GateResult]) -> Table:
    """A row per gate and subject."""
    return Table(
        columns=("gate", "of", "result", "found"),
        rows=tuple((item.gate, item.subject, _result(item), item.text) for item in results),
        title="Gates",
    )


def _result(item: GateResult) -> str:
    return item.state if item.state != "undecided" else f"undecided: {'passes' if item.holds else 'fails'}"


def gate_cases(results: Sequence[GateResult]) -> list[Case]:
    """A JUnit case per gate and subject: undecided ones are skipped, unless they fail."""
    found = []
    for item in results:
        state: CaseState = _STATES.get(item.state, "failed")
        if item.state == "undecided" and not item.holds:
            state = "failed"
        found.append(
            Case(
                name=item.gate,
                group=f"edgepress.{item.subject}",
                state=state,
                text=f"{item.gate}: {item.text}"
                + (" (undecided: too noisy)" if item.state == "undecided" else ""),
                reason=item.state,
                told=item.text,
            )
        )
    return found


def row_cases(rows: Sequence[Measurement]) -> list[Case]:
    """A JUnit case per row: whether the run counts, and the figures."""
    found = []
    for row in rows:
        wrong = "; ".join(row.void_reasons) or "the run is void" if row.void else ""
        if row.outputs_ok is False:
            wrong = "; ".join(filter(None, [wrong, "outputs are out of tolerance"]))
        figures = (
            f"{name}: {format_figure(metric.of(row), metric.unit)}"
            for name, metric in METRICS_BY_NAME.items()
            if metric.of(row) is not None
        )
        found.append(
            Case(
                name=f"{row.kind} {row.thing} {row.run[:SHORT_ID]}",
                group=f"edgepress.{label(row, of=rows)}",
                state="failed" if wrong else "passed",
                text=wrong,
                reason="void" if row.void else "outputs",
                told="\n".join(figures),
            )
        )
    return found
