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

    def join(self, other: ErrorSums) -> None:
        """Add the sums of other values."""
        self.error += other.error
        self.signal += other.signal
        self.max_abs = max(self.max_abs, other.max_abs)

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


def binomial_interval(hits: int, total: int) -> Interval | None:
    """Exact 95 % interval of a share, None of nothing.

    Source: Clopper and Pearson 1934, Biometrika 26, 404-413: the shares at which `hits` or more, and
    `hits` or fewer, have a probability of 2.5 %.
    """
    if total == 0:
        return None
    low = 0.0 if hits == 0 else _beta_quantile(0.025, hits, total - hits + 1)
    high = 1.0 if hits == total else _beta_quantile(0.975, hits + 1, total - hits)
    return low, high


def _beta_quantile(probability: float, a: float, b: float) -> float:
    """The point below which a beta distribution has this probability, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if incomplete_beta(middle, a, b) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for 0 <= x <= 1 and positive a and b.

    Source: the continued fraction of DLMF 8.17.22, evaluated from the front by Lentz's method.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges fast
        return 1 - incomplete_beta(1 - x, b, a)
    tiny = 1e-300
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            value *= c * d
            change = c * d
        if abs(change - 1) < 1e-15:
            break
    return math.exp(front) * value / a


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


def ratio_interval(
    numerators: Floats, denominators: Floats, *, seed: int = 0, rounds: int = 1000
) -> Interval | None:
    """95 % bootstrap interval of sum / sum over resampled samples; of a mean with denominators of 1.

    Both sums are of the same resample, so that it is paired. None for fewer than 2 samples, or where
    a denominator becomes 0. Source: Efron and Tibshirani 1993, chapter 13.

    Args:
        numerators: one figure for each sample, shape (samples,), finite.
        denominators: shape (samples,), not negative.
        seed: of the resamples.
        rounds: how many resamples.
    """
    total = len(numerators)
    if total < 2:
        return None
    random = np.random.default_rng(seed)
    values = np.empty(rounds)
    for place in range(rounds):
        index = random.integers(0, total, total)
        below = float(denominators[index].sum())
        if below <= 0:
            return None
        values[place] = float(numerators[index].sum()) / below
    low, high = np.quantile(values, [0.025, 0.975])
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
