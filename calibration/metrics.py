"""Drift and accuracy metrics: pure functions of arrays, and sums that grow with no data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Interval = tuple[float, float]

# Neighbours are searched among at most this many samples: the work grows with their square.
NEIGHBOUR_SAMPLES = 8192
_NEIGHBOUR_BLOCK = 512
# Half-width of a 95 % interval in standard deviations.
_Z95 = 1.959963984540054
_PROBABILITY_TOLERANCE = 1e-3


def cosine_distances(reference: Array, candidate: Array) -> Floats:
    """1 - cosine similarity of each pair of rows; equal directions give 0, opposite ones 2.

    Args:
        reference: shape (rows, features).
        candidate: the same shape.

    Returns:
        shape (rows,); two zero rows have distance 0, a zero row and another one have 1.
    """
    left, right = reference.astype(np.float64), candidate.astype(np.float64)
    norms = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    product = norms[0] * norms[1]
    cosine = (left * right).sum(axis=1) / np.where(product > 0, product, 1.0)
    # Equal rows are exactly 0 apart, whatever the rounding above; so are two zero rows.
    equal = (left == right).all(axis=1)
    result: Floats = np.where(equal, 0.0, 1.0 - np.clip(cosine, -1.0, 1.0))
    return result


@dataclasses.dataclass(kw_only=True)
class ErrorSums:
    """Sums over all values of two outputs, from which relative L2, SQNR and the largest error follow."""

    error: float = 0.0
    signal: float = 0.0
    max_abs: float = 0.0

    def add(self, reference: Array, candidate: Array) -> None:
        """Add outputs of any shape, the same for both."""
        left = reference.astype(np.float64)
        difference = candidate.astype(np.float64) - left
        self.error += float((difference * difference).sum())
        self.signal += float((left * left).sum())
        self.max_abs = max(self.max_abs, float(np.abs(difference).max(initial=0.0)))

    @property
    def relative_l2(self) -> float:
        """Norm of the difference over norm of the reference; inf where only the reference is zero."""
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / self.signal) if self.signal > 0 else math.inf

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio, 10 log10(signal / error), in decibels; inf where equal."""
        if self.error == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.error) if self.signal > 0 else -math.inf


@dataclasses.dataclass(kw_only=True)
class MeanSum:
    """A running mean with its 95 % interval (normal approximation)."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Array) -> None:
        """Add values of any shape."""
        wide = values.astype(np.float64)
        self.count += wide.size
        self.total += float(wide.sum())
        self.squares += float((wide * wide).sum())

    @property
    def mean(self) -> float:
        """The mean; nan of nothing."""
        return self.total / self.count if self.count else math.nan

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the mean, None for fewer than 2 values."""
        if self.count < 2:
            return None
        variance = max(self.squares - self.total**2 / self.count, 0.0) / (self.count - 1)
        half = _Z95 * math.sqrt(variance / self.count)
        return self.mean - half, self.mean + half


def is_probability(values: Array) -> bool:
    """Whether every row of the last axis is non-negative and sums to 1."""
    rows = values.astype(np.float64)
    return bool((rows >= 0).all() and (np.abs(rows.sum(axis=-1) - 1) <= _PROBABILITY_TOLERANCE).all())


def log_softmax(logits: Array) -> Floats:
    """log(softmax) over the last axis, in float64, any shape."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_divergences(reference: Array, candidate: Array) -> Floats:
    """KL(reference || candidate) of each row, in nats.

    Rows that both are probabilities are taken as they are, else as logits.

    Args:
        reference: shape (rows, classes).
        candidate: the same shape.

    Returns:
        shape (rows,), not negative.
    """
    if is_probability(reference) and is_probability(candidate):
        # Below float32's smallest normal number a probability is as good as zero.
        tiny = float(np.finfo(np.float32).tiny)
        p_log = np.log(np.maximum(reference.astype(np.float64), tiny))
        q_log = np.log(np.maximum(candidate.astype(np.float64), tiny))
        p = reference.astype(np.float64)
    else:
        p_log, q_log = log_softmax(reference), log_softmax(candidate)
        p = np.exp(p_log)
    result: Floats = np.maximum((p * (p_log - q_log)).sum(axis=-1), 0.0)
    return result


def wilson_interval(hits: int, total: int) -> Interval | None:
    """95 % interval of a share, None of nothing. Source: Wilson 1927, JASA 22, 209-212."""
    if total == 0:
        return None
    share, z2 = hits / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def paired_interval(lost: int, won: int, total: int) -> Interval | None:
    """95 % interval of the change in accuracy, (won - lost) / total, when both models saw each sample.

    Args:
        lost: samples that only the first model has right.
        won: samples that only the second model has right.
        total: all samples.

    Source: Agresti and Min 2005, Statistics in Medicine 24, 729-740 (half a sample added to each cell).
    """
    if total == 0:
        return None
    b, c, n = lost + 0.5, won + 0.5, total + 2.0
    change = (c - b) / n
    half = _Z95 * math.sqrt(max(b + c - (c - b) ** 2 / n, 0.0)) / n
    return max(change - half, -1.0), min(change + half, 1.0)


def f1_score(labels: Indices, predictions: Indices) -> float:
    """F1 of class 1 where there are only the classes 0 and 1, else the mean over the classes present.

    Args:
        labels: class indices, shape (samples,).
        predictions: class indices, shape (samples,).
    """
    size = max(int(labels.max()), int(predictions.max()), 1) + 1
    hits = np.bincount(labels[labels == predictions], minlength=size)
    named = np.bincount(labels, minlength=size) + np.bincount(predictions, minlength=size)
    if size == 2:
        return float(2 * hits[1] / named[1]) if named[1] else 0.0
    present = named > 0
    return float((2 * hits[present] / named[present]).mean())


def average_ranks(values: Array) -> Floats:
    """Ranks from 1, ties share the mean of their ranks; shape (n,) in and out."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.append(starts, len(values)))
    ranks = np.empty(len(values), np.float64)
    ranks[order] = np.repeat(starts + (sizes + 1) / 2, sizes)
    return ranks


def spearman(left: Array, right: Array) -> float:
    """Spearman's rank correlation, -1 to 1: Pearson's of the average ranks; nan where one side is constant.

    Args:
        left: shape (n,).
        right: shape (n,).
    """
    first, second = average_ranks(left), average_ranks(right)
    first, second = first - first.mean(), second - second.mean()
    norm = math.sqrt(float((first**2).sum()) * float((second**2).sum()))
    return float((first * second).sum()) / norm if norm > 0 else math.nan


def bootstrap_interval(
    statistic: Callable[[Indices], float], total: int, *, seed: int = 0, rounds: int = 500
) -> Interval | None:
    """95 % percentile bootstrap interval of a statistic of resampled positions, shape (total,).

    None where the statistic is not defined on most of the resamples. Source: Efron and Tibshirani
    1993, chapter 13.
    """
    random = np.random.default_rng(seed)
    values = np.array([statistic(random.integers(0, total, total)) for _ in range(rounds)])
    known = values[np.isfinite(values)]
    if known.size < rounds // 2:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def nearest_neighbours(embeddings: Array) -> Indices:
    """Index of the most similar other row by cosine, block by block; ties go to the lower index.

    Args:
        embeddings: shape (rows, features), at least 2 rows.

    Returns:
        shape (rows,).
    """
    wide = embeddings.astype(np.float32)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = wide / np.where(norms > 0, norms, 1.0)
    nearest = np.empty(len(unit), np.int64)
    for start in range(0, len(unit), _NEIGHBOUR_BLOCK):
        block = unit[start : start + _NEIGHBOUR_BLOCK] @ unit.T
        rows = np.arange(len(block))
        block[rows, start + rows] = -np.inf
        nearest[start : start + _NEIGHBOUR_BLOCK] = block.argmax(axis=1)
    return nearest


def neighbour_agreement(reference: Array, candidate: Array) -> tuple[int, int]:
    """How many rows keep their nearest neighbour, and of how many; at most NEIGHBOUR_SAMPLES are used.

    Args:
        reference: shape (rows, features).
        candidate: the same shape.
    """
    left, right = reference[:NEIGHBOUR_SAMPLES], candidate[:NEIGHBOUR_SAMPLES]
    if len(left) < 2:
        return 0, 0
    kept = nearest_neighbours(left) == nearest_neighbours(right)
    return int(kept.sum()), len(left)
