"""Drift limits as they are asked for: one bound each, and how it is written on a command line."""

from __future__ import annotations

import difflib
import math
import re

import msgspec

from ..graph.errors import RecipeError

# The names of calibration.limits.LIMIT_METRICS, which importing would make --help slow (a test compares).
METRICS = ("cosine", "l2", "sqnr", "kl", "top1", "flips", "accuracy", "f1", "spearman")
_RATIOS = ("l2", "sqnr")

_METRIC_NAME = re.compile(r"[a-z][a-z0-9_-]*", re.IGNORECASE)
_OWN_METRIC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|\.[0-9]+(?:e[+-]?[0-9]+)?"
_LIMIT = re.compile(rf"(?P<number>{_NUMBER})\s*(?P<unit>%|db|abs)?", re.IGNORECASE)


class DriftLimit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bound on the change against the reference model.

    `metric` is None for the model's default metric, else one of `METRICS` or the user's own as
    `module:function`. `limit` is a fraction (0.01 for 1 %) or, for `sqnr`, decibels; whether it bounds
    from above or below is the metric's own business. A task metric (accuracy, f1, spearman, the
    user's own) may lose that fraction of the baseline's figure; with `absolute`, it may lose that
    much of the metric itself (0.01 of accuracy is one point). The other metrics are changes against
    the baseline already: for them `absolute` means the same, and `l2` and `sqnr`, which are ratios,
    refuse it.
    """

    metric: str | None = None
    limit: float
    absolute: bool = False

    def __post_init__(self) -> None:
        if self.metric is not None and self.metric not in METRICS and not is_own_metric(self.metric):
            near = difflib.get_close_matches(self.metric, METRICS, n=2, cutoff=0.5)
            raise RecipeError(
                f"unknown drift metric {self.metric!r}",
                where="max_drift",
                remedy=f"did you mean {' or '.join(near)}?"
                if near
                else f"give one of {', '.join(METRICS)}, or your own as module:function",
            )
        if self.absolute and self.metric in _RATIOS:
            raise RecipeError(
                f"{self.metric} has no absolute limit",
                where="max_drift",
                why="it is a ratio to the reference's answers by definition",
                remedy="leave `abs` out",
            )
        if not math.isfinite(self.limit) or self.limit < 0:
            raise RecipeError(
                f"drift limit {self.limit!r} is not a number from 0 upwards",
                where="max_drift",
                remedy="give a limit such as 1%, cosine=0.01 or sqnr=30dB",
            )


def is_own_metric(metric: str) -> bool:
    """Whether a metric is the user's own, `module:function`."""
    return _OWN_METRIC.fullmatch(metric) is not None


def parse_drift_limits(text: str) -> tuple[DriftLimit, ...]:
    """Read `[METRIC=]LIMIT[,…]`: "1%", "cosine=1%,flips=0.02", "accuracy=0.01abs", "sqnr=30dB".

    Per cent become fractions; `sqnr` is in decibels, with or without the unit. What `abs` means is
    said at `DriftLimit`.

    Raises:
        RecipeError: if a part is empty, has no number, a negative or infinite one, a unit that
            does not fit its metric, or a metric that was already given.
    """
    limits = tuple(_parse_drift_limit(part.strip(), text) for part in text.split(","))
    check_metrics_once(limits)
    return limits


def _parse_drift_limit(part: str, whole: str) -> DriftLimit:
    metric, equals, number = part.rpartition("=")
    metric, number = metric.strip(), number.strip()
    metric = metric if is_own_metric(metric) else metric.lower()
    match = _LIMIT.fullmatch(number)
    if not match or (equals and not is_own_metric(metric) and not _METRIC_NAME.fullmatch(metric)):
        raise _bad_drift_limit(part, whole, "it is not [METRIC=]LIMIT with a number from 0 upwards")
    value = float(match["number"])
    unit = (match["unit"] or "").lower()
    if unit == "db" and metric != "sqnr":
        raise _bad_drift_limit(part, whole, "only sqnr is measured in dB")
    if unit == "%" and metric == "sqnr":
        raise _bad_drift_limit(part, whole, "sqnr is measured in dB, not in per cent")
    if not math.isfinite(value):
        raise _bad_drift_limit(part, whole, "the number is too large")
    if unit == "abs" and metric in _RATIOS:
        raise _bad_drift_limit(part, whole, f"{metric} is a ratio to the reference's answers by definition")
    return DriftLimit(
        metric=metric or None, limit=value / 100 if unit == "%" else value, absolute=unit == "abs"
    )


def _bad_drift_limit(part: str, whole: str, why: str) -> RecipeError:
    return RecipeError(
        f"{part!r} is not a drift limit",
        where=f"--max-drift {whole}",
        why=why,
        remedy="give --max-drift 1%, accuracy=0.01abs, cosine=1%,flips=0.02 or sqnr=30dB",
    )


def check_metrics_once(limits: tuple[DriftLimit, ...]) -> None:
    """Raise if a metric is limited twice.

    Raises:
        RecipeError: naming the metric.
    """
    metrics = [limit.metric for limit in limits]
    for metric in metrics:
        if metrics.count(metric) > 1:
            raise RecipeError(
                f"two drift limits for {metric or 'the default metric'}",
                where="max_drift",
                remedy="give each metric once",
            )
