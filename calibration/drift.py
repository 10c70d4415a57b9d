"""Drift: how far a candidate's answers are from the reference model's, on data it was not fitted to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
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
from .task_metrics import Answers, TaskMetric, label_metrics, own_metric, spearman_metric

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


class DriftReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was compared on which data, and how far apart the answers are.

    Metrics that do not apply are None. With several outputs `cosine`, `l2`, `sqnr_db` and
    `max_abs` are of the worst one. Where the candidate (or the reference) answers NaN or infinity,
    no metric is given at all.

    Intervals are of 95 %: exact binomial for shares of samples, paired bootstrap over the samples with
    a fixed seed for what is a mean or a ratio of sums over them.

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
    l2_interval: Interval | None = None
    sqnr_db: float | None = None
    sqnr_interval: Interval | None = None
    kl: float | None = None
    kl_interval: Interval | None = None
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
    own_metrics: Sequence[str] = (),
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
        own_metrics: the user's own metrics as `module:function` (see `task_metrics.own_metric`); for
            them all compared outputs stay in memory.
        progress: called with (samples run, samples to run), reference and candidate apart.

    Raises:
        DataError: if there are no samples, a label is beyond the classes, or shapes differ.
        RecipeError: if one of the user's own metrics cannot be called.
        InternalError: if `reference_cache` is of other data, task or batch size.
    """
    if reference_cache is not None:
        reference_cache.require_same(data, task, batch_size)
        return _compare(reference_cache, candidate, data, own_metrics, progress)
    with ReferenceOutputs.collect(
        reference, data, task, batch_size=batch_size, progress=progress
    ) as collected:
        return _compare(collected, candidate, data, own_metrics, progress)


def _compare(
    known: ReferenceOutputs,
    candidate: Runner,
    data: CalibrationData,
    own_metrics: Sequence[str],
    progress: Progress | None,
) -> DriftReport:
    task = known.task
    sums = _Sums(task, keep_all=data.pairs is not None, own_metrics=own_metrics)
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


@dataclasses.dataclass(kw_only=True)
class _PerSample:
    """Figures of each sample, from which intervals are drawn: a few numbers a sample."""

    error: list[float] = dataclasses.field(default_factory=list)
    signal: list[float] = dataclasses.field(default_factory=list)
    cosine: list[float] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)

    def add(self, sums: metrics.ErrorSums, cosines: Array) -> None:
        self.error.append(sums.error)
        self.signal.append(sums.signal)
        self.cosine.append(float(cosines.sum()))
        self.rows.append(len(cosines))


class _Sums:
    """What is added up over the samples; of class scores only the classes are kept."""

    def __init__(self, task: Task, *, keep_all: bool, own_metrics: Sequence[str] = ()) -> None:
        self._task = task
        self._keep_all = keep_all
        self._own_metrics = own_metrics
        self._answers: tuple[list[Mapping[str, Array]], list[Mapping[str, Array]]] = ([], [])
        self._kept_bytes = 0
        self._errors: dict[str, metrics.ErrorSums] = {}
        self._samples: dict[str, _PerSample] = {}
        self._kl: list[tuple[float, int]] = []
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
            own = metrics.ErrorSums()
            own.add(left, right)
            self._errors.setdefault(name, metrics.ErrorSums()).join(own)
            self._samples.setdefault(name, _PerSample()).add(own, metrics.cosine_distances(left, right))
        if self._own_metrics:
            for answers, given in zip(self._answers, (expected, sample), strict=True):
                answers.append(given)
        left, right = (next(iter(rows.values())) for rows in (expected, sample))
        if self._task.kind == "embedding":
            self._keep(left, right)
            return
        self._width = left.shape[-1]
        if self._width == 1:  # one value: no class, and a distribution of one outcome
            return
        divergences = metrics.kl_divergences(left, right)
        self._kl.append((float(divergences.sum()), len(divergences)))
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
                cosine=self._cosine(name),
                l2=_finite(errors.relative_l2),
                sqnr_db=_finite(errors.sqnr_db),
                max_abs=errors.max_abs,
            )
            for name, errors in self._errors.items()
        )
        worst = max(outputs, key=lambda drift: drift.cosine)
        loudest = max(self._errors, key=lambda name: self._errors[name].relative_l2)
        l2_interval = self._l2_interval(loudest)
        cosines = self._samples[worst.name]
        fields: dict[str, Any] = {
            "outputs": outputs,
            "cosine": worst.cosine,
            "cosine_interval": _mean_interval(cosines.cosine, cosines.rows),
            "l2": _finite(self._errors[loudest].relative_l2),
            "l2_interval": l2_interval,
            "sqnr_db": _finite(min(errors.sqnr_db for errors in self._errors.values())),
            "sqnr_interval": _in_decibels(l2_interval),
            "max_abs": max(drift.max_abs for drift in outputs),
        }
        more = self._embedding_fields(data) if self._task.kind == "embedding" else self._class_fields(data)
        if self._own_metrics:
            before, after = (Answers(samples=tuple(kept)) for kept in self._answers)
            own = tuple(own_metric(name, before, after, data) for name in self._own_metrics)
            more["task_metrics"] = (*more.get("task_metrics", ()), *own)
        return fields | more

    def _cosine(self, name: str) -> float:
        kept = self._samples[name]
        return sum(kept.cosine) / max(sum(kept.rows), 1)

    def _l2_interval(self, name: str) -> Interval | None:
        kept = self._samples[name]
        found = _mean_interval(kept.error, kept.signal)
        return None if found is None else (math.sqrt(found[0]), math.sqrt(found[1]))

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
                "top1_interval": metrics.binomial_interval(kept, total),
                "top1_meaning": meaning,
            }
        if data.pairs is not None:
            fields["task_metrics"] = (spearman_metric(left, right, data),)
        return fields

    def _class_fields(self, data: CalibrationData) -> dict[str, Any]:
        if self._width == 1:
            return {}
        left, right = (np.concatenate(classes) for classes in self._classes)
        flipped, total = int((left != right).sum()), len(left)
        flips_interval = metrics.binomial_interval(flipped, total)
        if self._task.kind == "token-classification":  # tokens of one sample are no independent draws
            changed = [int((a != b).sum()) for a, b in zip(*self._classes, strict=True)]
            flips_interval = _mean_interval(changed, [len(rows) for rows in self._classes[0]])
        divergences, rows = zip(*self._kl, strict=True)
        fields: dict[str, Any] = {
            "kl": sum(divergences) / max(sum(rows), 1),
            "kl_interval": _mean_interval(divergences, rows),
            "top1": 1 - flipped / total,
            "top1_interval": None
            if flips_interval is None
            else (1 - flips_interval[1], 1 - flips_interval[0]),
            "top1_meaning": "same class",
            "flips": flipped / total,
            "flips_interval": flips_interval,
        }
        if self._task.kind == "token-classification":
            return fields | {"tokens": total}
        if data.labels is not None:
            lost, won, found = label_metrics(left, right, data, self._width)
            fields |= {"correct_to_wrong": lost, "wrong_to_correct": won, "task_metrics": found}
        return fields


def _mean_interval(totals: Sequence[float], weights: Sequence[float]) -> Interval | None:
    return metrics.ratio_interval(np.asarray(totals, np.float64), np.asarray(weights, np.float64))


def _in_decibels(l2: Interval | None) -> Interval | None:
    """SQNR of relative L2, bounds exchanged; None where the error may be nothing."""
    if l2 is None or l2[0] == 0:
        return None
    return -20 * math.log10(l2[1]), -20 * math.log10(l2[0])


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
