"""Task metrics: accuracy, F1, Spearman's correlation, and the user's own, for two models and the change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..frontends.imports import USER_FAILURES, import_module
from ..graph.errors import DataError, RecipeError
from . import metrics
from .schema import near_names

if TYPE_CHECKING:
    from .data import CalibrationData

Array = npt.NDArray[Any]
Interval = tuple[float, float]


class TaskMetric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A task metric against labels, as fractions (Spearman: the coefficient), and its change."""

    name: str
    baseline: float
    candidate: float
    change: float
    change_interval: Interval | None = None


def label_metrics(
    left: Array, right: Array, data: CalibrationData, classes: int
) -> tuple[float, float, tuple[TaskMetric, ...]]:
    """Accuracy and F1 of both models, after the shares that only the first, or the second, has right.

    Args:
        left: the reference's classes, shape (samples,).
        right: the candidate's.
        data: has the labels.
        classes: how many there are.

    Raises:
        DataError: if a label is beyond the classes.
    """
    labels = data.labels
    if labels is None or int(labels.max()) >= classes:
        raise DataError(
            f"label {None if labels is None else int(labels.max())} is beyond the model's {classes} classes",
            where=data.name,
            remedy="class indices start at 0 and follow the model's outputs",
        )
    was, now = left == labels, right == labels
    lost, won, total = int((was & ~now).sum()), int((~was & now).sum()), len(labels)
    accuracy = TaskMetric(
        name="accuracy",
        baseline=float(was.mean()),
        candidate=float(now.mean()),
        change=(won - lost) / total,
        change_interval=metrics.paired_interval(lost, won, total),
    )
    before, after = metrics.f1_score(labels, left), metrics.f1_score(labels, right)
    interval = metrics.bootstrap_interval(
        lambda index: (
            metrics.f1_score(labels[index], right[index]) - metrics.f1_score(labels[index], left[index])
        ),
        total,
        rounds=200,
    )
    f1 = TaskMetric(
        name="f1", baseline=before, candidate=after, change=after - before, change_interval=interval
    )
    return lost / total, won / total, (accuracy, f1)


def spearman_metric(left: Array, right: Array, data: CalibrationData) -> TaskMetric:
    """Spearman of the cosine of pooled embeddings against the scores, for both models.

    Args:
        left: the reference's embeddings, shape (samples, features).
        right: the candidate's.
        data: has the scored pairs.

    Raises:
        DataError: if there are fewer than two pairs, or all have one score.
    """
    pairs = data.pairs
    if pairs is None or len(pairs) < 2 or len(np.unique(pairs.score)) < 2:
        raise DataError(
            "Spearman needs at least two pairs with different scores",
            where=data.name,
            remedy="pass more pairs with --eval",
        )
    similar = [1 - metrics.cosine_distances(rows[pairs.first], rows[pairs.second]) for rows in (left, right)]
    # Embeddings that are all alike order nothing: that counts as no correlation.
    before, after = (np.nan_to_num(metrics.spearman(pairs.score, values)) for values in similar)
    before, after = float(before), float(after)

    def change(index: npt.NDArray[np.int64]) -> float:
        scores = pairs.score[index]
        return metrics.spearman(scores, similar[1][index]) - metrics.spearman(scores, similar[0][index])

    return TaskMetric(
        name="spearman",
        baseline=before,
        candidate=after,
        change=after - before,
        change_interval=metrics.bootstrap_interval(change, len(pairs), rounds=200),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model answered, sample by sample, in the form that is compared (see `Representation`)."""

    samples: tuple[Mapping[str, Array], ...]

    def arrays(self) -> dict[str, Any]:
        """Output -> array of shape (samples, ...), or a list of arrays where their shapes differ."""
        found: dict[str, Any] = {}
        for name in self.samples[0]:
            rows = [sample[name] for sample in self.samples]
            if len({values.shape for values in rows}) > 1:
                found[name] = rows
            else:
                found[name] = np.concatenate(rows) if len(rows[0]) == 1 else np.stack(rows)
        return found


def own_metric(name: str, before: Answers, after: Answers, data: CalibrationData) -> TaskMetric:
    """A metric of the user's own, `module:function`, for both models.

    The function is called once for each model, as `function(outputs, labels)`, and gives one number,
    larger for better. `outputs` maps each compared output to its values: class scores of shape
    (samples, classes), embeddings of shape (samples, features), or a list of arrays (tokens, classes).
    `labels` are class indices of shape (samples,); for scored pairs a dict of the arrays "first" and
    "second" (positions of samples) and "score"; None without either.

    Naming the function lets its module run, as naming a data generator does.

    Args:
        name: `module:function`; modules beside the caller are found, too.
        before: the reference's answers.
        after: the candidate's.
        data: the labels or pairs.

    Raises:
        RecipeError: if it cannot be imported or called, or gives no finite number.
    """
    function = _find(name)
    labels: Any = data.labels
    if labels is None and data.pairs is not None:
        labels = {"first": data.pairs.first, "second": data.pairs.second, "score": data.pairs.score}
    first, second = (_figure(name, function, answers, labels) for answers in (before, after))
    return TaskMetric(name=name, baseline=first, candidate=second, change=second - first)


def require_own_metrics(names: Iterable[str]) -> None:
    """Raise unless each `module:function` can be imported: before hours are spent on what it is for.

    Raises:
        RecipeError: naming the first that cannot.
    """
    for name in names:
        _find(name)


def _find(name: str) -> Callable[[Any, Any], Any]:
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except USER_FAILURES as error:
        raise _unusable(name, "its module cannot be imported", error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        hint = near_names(function_name, dir(module))
        raise RecipeError(
            f"module {module_name!r} has no function {function_name!r}{hint}",
            where=f"drift metric {name}",
            remedy="name module:function, where function(outputs, labels) gives a number",
        )
    return function  # type: ignore[no-any-return]


def _figure(name: str, function: Callable[[Any, Any], Any], answers: Answers, labels: Any) -> float:
    try:
        value = float(function(answers.arrays(), labels))
    except USER_FAILURES as error:
        raise _unusable(name, "it fails, or gives no number", error) from error
    if not math.isfinite(value):
        raise RecipeError(
            f"the drift metric gives {value}",
            where=f"drift metric {name}",
            remedy="let it give a finite number, larger for better",
        )
    return value


def _unusable(name: str, what: str, error: BaseException) -> RecipeError:
    return RecipeError(
        f"the drift metric cannot be used: {what}",
        where=f"drift metric {name}",
        why=f"{type(error).__name__}: {error}",
        remedy="run function(outputs, labels) on its own and repair it",
    )
