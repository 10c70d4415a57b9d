"""A drift report as tables: every metric that applies, and each limit held against it."""

from __future__ import annotations

from collections.abc import Sequence

from ..calibration.drift import DriftReport
from ..calibration.limits import Bound, LimitResult
from ..compress.drift_limit import DriftLimit
from .output import Block, Table, format_percent


def limits_by_metric(limits: Sequence[DriftLimit], default: str) -> dict[str, Bound]:
    """The limits as `calibration.limits.check_limits` takes them; a limit without metric is of `default`."""
    return {limit.metric or default: Bound(limit=limit.limit, absolute=limit.absolute) for limit in limits}


def drift_blocks(report: DriftReport, results: Sequence[LimitResult] = ()) -> list[Block]:
    """The report for people: how it was measured, the metrics, the limits."""
    blocks: list[Block] = [measured_on(report), _metrics(report)]
    if report.task_metrics:
        blocks.append(_task_metrics(report))
    if len(report.outputs) > 1:
        blocks.append(_outputs(report))
    if results:
        blocks.append(_limits(results))
    return blocks


def measured_on(report: DriftReport) -> str:
    """One line: the data, its size, the batch size and the padding."""
    made_up = (
        " of generated inputs, which say nothing about real data" if report.data_origin == "generated" else ""
    )
    return (
        f"Drift on {report.samples} samples{made_up} ({report.data_name}, {report.data_split}), "
        f"batch size {report.batch_size}, padding: {report.padding}; compared: {report.compared}."
    )


def format_metric(metric: str, value: float | None) -> str:
    """One metric's value with its unit, or "none" where it does not apply (SQNR: no difference)."""
    if value is None:
        return "no difference" if metric == "sqnr" else "none"
    if metric == "sqnr":
        return f"{value:.1f} dB"
    if metric in ("kl", "max abs"):
        return f"{value:.3g}"
    return format_percent(value)


def _metrics(report: DriftReport) -> Table:
    found = (
        ("cosine", report.cosine, report.cosine_interval),
        ("l2", report.l2, report.l2_interval),
        ("sqnr", report.sqnr_db, report.sqnr_interval),
        ("kl", report.kl, report.kl_interval),
        ("flips", report.flips, report.flips_interval),
        ("max abs", report.max_abs, None),
    )
    rows = [
        (name, format_metric(name, value), _interval(interval, name))
        for name, value, interval in found
        if value is not None or (name == "sqnr" and report.l2 == 0)
    ]
    if report.top1 is not None:
        rows.append(
            (report.top1_meaning or "top1", format_percent(report.top1), _interval(report.top1_interval))
        )
    for name, count in (
        ("reference", report.non_finite_reference),
        ("candidate", report.non_finite_candidate),
    ):
        if count:
            rows.append((f"NaN or infinite values of the {name}", str(count), ""))
    return Table(columns=("metric", "value", "95 % interval"), rows=tuple(rows), numeric=frozenset({"value"}))


def _task_metrics(report: DriftReport) -> Table:
    rows = tuple(
        (
            item.name,
            f"{item.baseline * 100:.2f}",
            f"{item.candidate * 100:.2f}",
            f"{item.change * 100:+.2f}",
            ""
            if item.change_interval is None
            else "{:+.2f} to {:+.2f}".format(*_points(item.change_interval)),
        )
        for item in report.task_metrics
    )
    columns = ("task metric (x 100)", "before", "after", "change", "95 % interval")
    return Table(columns=columns, rows=rows, numeric=frozenset(columns[1:4]))


def _points(interval: tuple[float, float]) -> tuple[float, float]:
    return interval[0] * 100, interval[1] * 100


def _outputs(report: DriftReport) -> Table:
    rows = tuple(
        (
            item.name,
            format_metric("cosine", item.cosine),
            format_metric("l2", item.l2),
            format_metric("sqnr", item.sqnr_db),
            format_metric("max abs", item.max_abs),
        )
        for item in report.outputs
    )
    columns = ("output", "cosine", "l2", "sqnr", "max abs")
    return Table(columns=columns, rows=rows, numeric=frozenset(columns[1:]))


def _limits(results: Sequence[LimitResult]) -> Table:
    rows = tuple(
        (
            item.metric,
            format_metric(item.metric, item.limit),
            item.reason if item.value is None else format_metric(item.metric, item.value),
            ("yes" if item.met else "NO") + (", unsure" if item.straddles else ""),
            _interval(item.interval, item.metric),
        )
        for item in results
    )
    columns = ("limit on", "limit", "measured", "met", "95 % interval")
    return Table(columns=columns, rows=rows, numeric=frozenset({"limit", "measured"}))


def _interval(interval: tuple[float, float] | None, metric: str = "") -> str:
    if interval is None:
        return ""
    return f"{format_metric(metric, interval[0])} to {format_metric(metric, interval[1])}"
