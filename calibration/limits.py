"""Drift limits: which figure of a report each one speaks of, and whether it is held."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ..graph.errors import RecipeError
from ..graph.model import Task, TensorSpec
from .drift import DriftReport


class LimitResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One limit held against a report: `value` is what the limit speaks of (drops are positive)."""

    metric: str
    limit: float
    value: float | None
    met: bool
    reason: str


def _drop(name: str) -> Callable[[DriftReport], float | None]:
    def read(report: DriftReport) -> float | None:
        return next((-metric.change for metric in report.task_metrics if metric.name == name), None)

    return read


def _sqnr(report: DriftReport) -> float | None:
    if report.sqnr_db is not None or report.max_abs is None:
        return report.sqnr_db
    return -math.inf if report.max_abs else math.inf


# What each limit speaks of; all but `sqnr` (decibels, at least) are upper bounds.
LIMIT_METRICS: Mapping[str, Callable[[DriftReport], float | None]] = {
    "cosine": lambda report: report.cosine,
    "l2": lambda report: math.inf if report.l2 is None and report.max_abs else report.l2,
    "sqnr": _sqnr,
    "kl": lambda report: report.kl,
    "top1": lambda report: None if report.top1 is None else 1 - report.top1,
    "flips": lambda report: report.flips,
    "accuracy": _drop("accuracy"),
    "f1": _drop("f1"),
    "spearman": _drop("spearman"),
}


def is_one_value(shape: Sequence[int | str | None]) -> bool:
    """Whether an output of this shape, batch axis first, holds one value for each sample."""
    return len(shape) >= 1 and all(size == 1 for size in shape[1:])


def check_limits(report: DriftReport, limits: Mapping[str, float]) -> list[LimitResult]:
    """Hold limits against a report, one result each in their order.

    Args:
        report: what was measured.
        limits: metric -> limit: `cosine`, `l2`, `kl` at most; `sqnr` at least, in dB; `top1` and
            `flips` the share that changes at most; `accuracy`, `f1`, `spearman` the drop at most,
            0.01 being one point.

    Raises:
        RecipeError: if a metric is unknown or does not apply to this model and data.
    """
    return [_check(report, metric, limit) for metric, limit in limits.items()]


def _check(report: DriftReport, metric: str, limit: float) -> LimitResult:
    if metric not in LIMIT_METRICS:
        raise RecipeError(f"unknown drift metric {metric!r}", remedy=f"one of {', '.join(LIMIT_METRICS)}")
    bad = report.non_finite_candidate
    if bad or report.non_finite_reference:
        who, count = ("candidate", bad) if bad else ("reference", report.non_finite_reference)
        reason = f"the {who}'s outputs hold {count} NaN or infinite values"
        return LimitResult(metric=metric, limit=limit, value=None, met=False, reason=reason)
    value = LIMIT_METRICS[metric](report)
    if value is None:
        usable = [name for name, read in LIMIT_METRICS.items() if read(report) is not None]
        raise RecipeError(
            f"drift metric {metric!r} does not apply to this {report.task} model and data",
            where=report.data_name,
            why="task metrics need labels (or scored pairs); class metrics need class scores",
            remedy=f"limit one of {', '.join(usable)}",
        )
    met = value >= limit if metric == "sqnr" else value <= limit
    if math.isinf(value):
        reason = "no difference" if met else "the reference answers nothing but zeros"
        return LimitResult(metric=metric, limit=limit, value=None, met=met, reason=reason)
    sign = {(True, True): ">=", (True, False): "<", (False, True): "<=", (False, False): ">"}
    reason = f"{value:.6g} {sign[metric == 'sqnr', met]} {limit:.6g}"
    return LimitResult(metric=metric, limit=limit, value=value, met=met, reason=reason)


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
