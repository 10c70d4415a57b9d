"""Drift: how far a candidate's answers are from the reference model's, on data it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError
from ..graph.model import Task
from . import metrics
from .data import CalibrationData
from .reference import Progress, ReferenceOutputs, run_batches
from .representation import count_non_finite

if TYPE_CHECKING:
    from ..runtimes.base import Runner

Array = npt.NDArray[Any]
Interval = tuple[float, float]


# Embeddings of both models kept for the neighbour search; of larger outputs the first ones are taken.
KEPT_BYTES = 256 * 2**20


class OutputDrift(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Drift of one compared output.

    `sqnr_db` is None where it is infinite: no difference, or (with `max_abs` > 0) a reference that
    is zero everywhere, for which `l2` is None, too.
    """

    name: str
    cosine: float
    l2: float | None
    sqnr_db: float | None
    max_abs: float


class TaskMetric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A task metric against labels, as fractions (Spearman: the coefficient), and its change."""

    name: str
    baseline: float
    candidate: float
    change: float
    change_interval: Interval | None = None


class DriftReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was compared on which data, and how far apart the answers are.

    Metrics that do not apply are None. With several outputs `cosine`, `l2`, `sqnr_db` and
    `max_abs` are of the worst one. Where the candidate (or the reference) answers NaN or infinity,
    no metric is given at all.

    Attributes:
        samples: how many samples; `tokens` rows where each attended token counts.
        padding: how samples of unequal length became one batch.
        cosine: mean cosine distance, 0 to 2.
        l2: norm of the difference over norm of the reference, over all samples.
        sqnr_db: 10 log10(signal / error); None with `l2` = 0 means no difference.
        kl: mean KL divergence from the reference's class distribution, nats.
        top1: share of samples (tokens) with the same class; for embeddings: the same nearest neighbour.
        flips: share of samples (tokens) whose class changed.
        correct_to_wrong: share of samples that only the reference has right.
        wrong_to_correct: share of samples that only the candidate has right.
    """

    samples: int
    tokens: int | None = None
    pairs: int | None = None
    batch_size: int
    padding: str
    data_name: str
    data_digest: str
    data_origin: str
    data_split: str
    task: str
    compared: str
    cosine: float | None = None
    cosine_interval: Interval | None = None
    l2: float | None = None
    sqnr_db: float | None = None
    kl: float | None = None
    top1: float | None = None
    top1_interval: Interval | None = None
    top1_meaning: str | None = None
    flips: float | None = None
    flips_interval: Interval | None = None
    correct_to_wrong: float | None = None
    wrong_to_correct: float | None = None
    max_abs: float | None = None
    outputs: tuple[OutputDrift, ...] = ()
    task_metrics: tuple[TaskMetric, ...] = ()
    non_finite_reference: int = 0
    non_finite_candidate: int = 0


def measure_drift(
    reference: Runner,
    candidate: Runner,
    data: CalibrationData,
    task: Task,
    *,
    batch_size: int = 1,
    reference_cache: ReferenceOutputs | None = None,
    progress: Progress | None = None,
) -> DriftReport:
    """Compare a candidate with the reference model, sample by sample.

    Args:
        reference: the untouched model; not run when `reference_cache` is given.
        candidate: the changed model.
        data: evaluation samples, with labels or scored pairs for task metrics.
        task: decides what is compared and which metrics apply.
        batch_size: samples per batch; a batch size that the model fixes wins.
        reference_cache: the reference's answers to the same data (`ReferenceOutputs.collect`).
        progress: called with (samples run, samples to run), reference and candidate apart.

    Raises:
        DataError: if there are no samples, a label is beyond the classes, or shapes differ.
        InternalError: if `reference_cache` is of other data, task or batch size.
    """
    if reference_cache is not None:
        reference_cache.require_same(data, task, batch_size)
        return _compare(reference_cache, candidate, data, task, progress)
    with ReferenceOutputs.collect(
        reference, data, task, batch_size=batch_size, progress=progress
    ) as collected:
        return _compare(collected, candidate, data, task, progress)


def _compare(
    known: ReferenceOutputs,
    candidate: Runner,
    data: CalibrationData,
    task: Task,
    progress: Progress | None,
) -> DriftReport:
    sums = _Sums(task, keep_all=data.pairs is not None)
    representation = known.representation
    if representation is None:
        raise DataError("the evaluation data holds no samples", where=data.name)
    answers = iter(known)
    bad = done = 0
    for feeds, outputs, count in run_batches(candidate, data, known.batch_size):
        missing = [name for name in representation.names if name not in outputs]
        if missing:
            raise DataError(
                f"the candidate has no output {missing[0]!r}",
                where=", ".join(outputs),
                remedy="compare two forms of the same model",
            )
        bad += count_non_finite(outputs)
        for sample in representation.rows(outputs, feeds, count):
            expected = next(answers)
            if not (bad or known.non_finite):
                sums.add(expected, sample)
        done += count
        if progress is not None:
            progress(done, len(data))
    padded = "static" in data.padding or "at least" in data.padding
    facts = DriftReport(
        samples=len(data),
        pairs=None if data.pairs is None else len(data.pairs),
        batch_size=known.batch_size,
        padding="none (one sample at a time)" if known.batch_size == 1 and not padded else data.padding,
        data_name=data.name,
        data_digest=data.digest,
        data_origin=data.origin,
        data_split=data.split,
        task=task.kind,
        compared=representation.description,
        non_finite_reference=known.non_finite,
        non_finite_candidate=bad,
    )
    if bad or known.non_finite:
        return facts
    return msgspec.structs.replace(facts, **sums.result(data))


class _Sums:
    """What is added up over the samples; of class scores only the classes are kept."""

    def __init__(self, task: Task, *, keep_all: bool) -> None:
        self._task = task
        self._keep_all = keep_all
        self._kept_bytes = 0
        self._errors: dict[str, metrics.ErrorSums] = {}
        self._cosines: dict[str, metrics.MeanSum] = {}
        self._kl = metrics.MeanSum()
        self._classes: tuple[list[Array], list[Array]] = ([], [])
        self._embeddings: tuple[list[Array], list[Array]] = ([], [])
        self._width = 0

    def add(self, expected: Mapping[str, Array], sample: Mapping[str, Array]) -> None:
        """Add the rows of one sample."""
        for name, left in expected.items():
            right = sample[name]
            if left.shape != right.shape:
                raise DataError(
                    f"the models' outputs {name!r} differ in shape: {left.shape} and {right.shape}",
                    remedy="compare two forms of the same model",
                )
            self._errors.setdefault(name, metrics.ErrorSums()).add(left, right)
            self._cosines.setdefault(name, metrics.MeanSum()).add(metrics.cosine_distances(left, right))
        left, right = (next(iter(rows.values())) for rows in (expected, sample))
        if self._task.kind == "embedding":
            self._keep(left, right)
            return
        self._width = left.shape[-1]
        if self._width == 1:  # one value: no class, and a distribution of one outcome
            return
        self._kl.add(metrics.kl_divergences(left, right))
        for classes, rows in zip(self._classes, (left, right), strict=True):
            classes.append(rows.argmax(axis=-1))

    def _keep(self, left: Array, right: Array) -> None:
        """Keep embeddings: all of them where pairs need them, else what the neighbour search takes."""
        enough = len(self._embeddings[0]) >= metrics.NEIGHBOUR_SAMPLES or self._kept_bytes > KEPT_BYTES
        if enough and not self._keep_all:
            return
        for kept, rows in zip(self._embeddings, (left, right), strict=True):
            kept.append(rows.astype(np.float32))
            self._kept_bytes += kept[-1].nbytes

    def result(self, data: CalibrationData) -> dict[str, Any]:
        """Fields of the report."""
        outputs = tuple(
            OutputDrift(
                name=name,
                cosine=self._cosines[name].mean,
                l2=_finite(errors.relative_l2),
                sqnr_db=_finite(errors.sqnr_db),
                max_abs=errors.max_abs,
            )
            for name, errors in self._errors.items()
        )
        worst = max(outputs, key=lambda drift: drift.cosine)
        fields: dict[str, Any] = {
            "outputs": outputs,
            "cosine": worst.cosine,
            "cosine_interval": self._cosines[worst.name].interval,
            "l2": _finite(max(errors.relative_l2 for errors in self._errors.values())),
            "sqnr_db": _finite(min(errors.sqnr_db for errors in self._errors.values())),
            "max_abs": max(drift.max_abs for drift in outputs),
        }
        if self._task.kind == "embedding":
            return fields | self._embedding_fields(data)
        return fields | self._class_fields(data)

    def _embedding_fields(self, data: CalibrationData) -> dict[str, Any]:
        shapes = {rows.shape for rows in self._embeddings[0]}
        if len(shapes) != 1 or math.prod(next(iter(shapes))) == 1:  # single values have no neighbours
            return {}
        left, right = (np.concatenate(rows) for rows in self._embeddings)
        kept, total = metrics.neighbour_agreement(left, right)
        fields: dict[str, Any] = {}
        if total:
            meaning = f"same nearest neighbour (cosine) among {total} samples"
            fields = {
                "top1": kept / total,
                "top1_interval": metrics.wilson_interval(kept, total),
                "top1_meaning": meaning,
            }
        if data.pairs is not None:
            fields["task_metrics"] = (_spearman_metric(left, right, data),)
        return fields

    def _class_fields(self, data: CalibrationData) -> dict[str, Any]:
        if self._width == 1:
            return {}
        left, right = (np.concatenate(classes) for classes in self._classes)
        flipped, total = int((left != right).sum()), len(left)
        fields: dict[str, Any] = {
            "kl": self._kl.mean,
            "top1": 1 - flipped / total,
            "top1_interval": metrics.wilson_interval(total - flipped, total),
            "top1_meaning": "same class",
            "flips": flipped / total,
            "flips_interval": metrics.wilson_interval(flipped, total),
        }
        if self._task.kind == "token-classification":
            return fields | {"tokens": total}
        if data.labels is not None:
            fields |= _label_fields(left, right, data, self._width)
        return fields


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


def _label_fields(left: Array, right: Array, data: CalibrationData, classes: int) -> dict[str, Any]:
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
    return {
        "correct_to_wrong": lost / total,
        "wrong_to_correct": won / total,
        "task_metrics": (accuracy, f1),
    }


def _spearman_metric(left: Array, right: Array, data: CalibrationData) -> TaskMetric:
    """Spearman of the cosine of pooled embeddings against the scores, for both models."""
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
