"""Drift limits: which figure of a report each one speaks of, and whether it is held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from ..graph.errors import RecipeError
from ..graph.model import Task, TensorSpec
from .drift import DriftReport, Interval


class Bound(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A limit on one metric; `absolute` concerns task metrics only (see `check_limits`)."""

    limit: float
    absolute: bool = False


class LimitResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One limit held against a report.

    Attributes:
        metric: which one.
        limit: as it was asked for.
        value: what the limit speaks of (drops are positive); None where it is infinite.
        met: whether the value is on the right side; its interval does not count here.
        reason: the comparison in words.
        interval: 95 % interval of the value, where there is one.
        straddles: the limit lies inside the interval: another draw of samples might decide otherwise.
    """

    metric: str
    limit: float
    value: float | None
    met: bool
    reason: str
    interval: Interval | None = None
    straddles: bool = False


def _sqnr(report: DriftReport) -> float | None:
    if report.sqnr_db is not None or report.max_abs is None:
        return report.sqnr_db
    return -math.inf if report.max_abs else math.inf


# What each limit speaks of; all but `sqnr` (decibels, at least) are upper bounds.
_CHANGES: Mapping[str, Callable[[DriftReport], float | None]] = {
    "cosine": lambda report: report.cosine,
    "l2": lambda report: math.inf if report.l2 is None and report.max_abs else report.l2,
    "sqnr": _sqnr,
    "kl": lambda report: report.kl,
    "top1": lambda report: None if report.top1 is None else 1 - report.top1,
    "flips": lambda report: report.flips,
}
TASK_METRICS = ("accuracy", "f1", "spearman")
LIMIT_METRICS = (*_CHANGES, *TASK_METRICS)
"""What can be limited, besides the user's own metrics."""
_INTERVALS: Mapping[str, Callable[[DriftReport], Interval | None]] = {
    "cosine": lambda report: report.cosine_interval,
    "l2": lambda report: report.l2_interval,
    "sqnr": lambda report: report.sqnr_interval,
    "kl": lambda report: report.kl_interval,
    "top1": lambda report: (
        report.top1_interval and (1 - report.top1_interval[1], 1 - report.top1_interval[0])
    ),
    "flips": lambda report: report.flips_interval,
}


def _measured(report: DriftReport, metric: str, bound: Bound) -> tuple[float | None, Interval | None]:
    """What a limit speaks of, and its interval; a task metric's drop is of the baseline unless absolute."""
    if metric in _CHANGES:
        return _CHANGES[metric](report), _INTERVALS[metric](report)
    found = next((item for item in report.task_metrics if item.name == metric), None)
    if found is None:
        return None, None
    unit = 1.0 if bound.absolute else abs(found.baseline)
    if unit == 0:  # nothing of nothing: any drop is beyond all bounds
        return (math.inf if found.change < 0 else 0.0), None
    interval = found.change_interval
    return -found.change / unit, interval and (-interval[1] / unit, -interval[0] / unit)


def is_one_value(shape: Sequence[int | str | None]) -> bool:
    """Whether an output of this shape, batch axis first, holds one value for each sample."""
    return len(shape) >= 1 and all(size == 1 for size in shape[1:])


def check_limits(report: DriftReport, limits: Mapping[str, float | Bound]) -> list[LimitResult]:
    """Hold limits against a report, one result each in their order.

    Args:
        report: what was measured.
        limits: metric -> limit: `cosine`, `l2`, `kl` at most; `sqnr` at least, in dB; `top1` and
            `flips` the share that changes at most; `accuracy`, `f1`, `spearman` and the user's own
            metrics the drop at most, as a fraction of the baseline's figure, or of the metric
            itself where the bound is absolute (0.01 being one point).

    Raises:
        RecipeError: if a metric is unknown or does not apply to this model and data, or an absolute
            limit is asked of a ratio.
    """
    return [
        _check(report, metric, limit if isinstance(limit, Bound) else Bound(limit=limit))
        for metric, limit in limits.items()
    ]


def own_metrics(limits: Iterable[str]) -> tuple[str, ...]:
    """The user's own metrics among those limited, as `measure_drift` takes them."""
    return tuple(metric for metric in limits if ":" in metric)


def _check(report: DriftReport, metric: str, bound: Bound) -> LimitResult:
    limit = bound.limit
    if metric not in LIMIT_METRICS and ":" not in metric:
        raise RecipeError(f"unknown drift metric {metric!r}", remedy=f"one of {', '.join(LIMIT_METRICS)}")
    if bound.absolute and metric in ("l2", "sqnr"):
        raise RecipeError(
            f"{metric} has no absolute limit",
            where=report.data_name,
            why="it is this model's default metric here, and a ratio by definition",
            remedy="leave `abs` out, or name another metric",
        )
    bad = report.non_finite_candidate
    if bad or report.non_finite_reference:
        who, count = ("candidate", bad) if bad else ("reference", report.non_finite_reference)
        reason = f"the {who}'s outputs hold {count} NaN or infinite values"
        return LimitResult(metric=metric, limit=limit, value=None, met=False, reason=reason)
    value, interval = _measured(report, metric, bound)
    if value is None:
        usable = [name for name in LIMIT_METRICS if _measured(report, name, bound)[0] is not None]
        raise RecipeError(
            f"drift metric {metric!r} does not apply to this {report.task} model and data",
            where=report.data_name,
            why="task metrics need labels (or scored pairs); class metrics need class scores",
            remedy=f"limit one of {', '.join(usable)}",
        )
    met = value >= limit if metric == "sqnr" else value <= limit
    if math.isinf(value):
        nothing = (
            "the baseline's figure is 0"
            if metric in TASK_METRICS
            else "the reference answers nothing but zeros"
        )
        reason = "no difference" if met else nothing
        return LimitResult(metric=metric, limit=limit, value=None, met=met, reason=reason)
    sign = {(True, True): ">=", (True, False): "<", (False, True): "<=", (False, False): ">"}
    reason = f"{value:.6g} {sign[metric == 'sqnr', met]} {limit:.6g}"
    straddles = interval is not None and interval[0] < limit < interval[1]
    if straddles and interval is not None:
        reason += f"; 95 % interval {interval[0]:.3g} to {interval[1]:.3g}: more samples may decide otherwise"
    return LimitResult(
        metric=metric,
        limit=limit,
        value=value,
        met=met,
        reason=reason,
        interval=interval,
        straddles=straddles,
    )


def default_metric(task: Task, has_labels: bool, outputs: Sequence[TensorSpec] = ()) -> str:
    """The metric of a limit that names none: the task's with labels, else cosine or flips.

    Where every sample's answer is one value (regression, reranking) it is `l2`: one value has no
    direction, and no class.

    Args:
        task: what the outputs mean.
        has_labels: whether the data has labels; for embeddings, scored pairs.
        outputs: the model's outputs, batch axis first.
    """
    if outputs and all(spec.shape is not None and is_one_value(spec.shape) for spec in outputs):
        return "l2"
    if task.kind == "embedding":
        return "spearman" if has_labels else "cosine"
    return "accuracy" if has_labels and task.kind == "classification" else "flips"
