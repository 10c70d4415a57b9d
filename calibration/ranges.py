"""From histograms to ranges: min-max, percentile, entropy, least squared error, or the best of them."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError
from ..graph.scheme import Scheme, affine_parameters
from .histogram import SIDE_BINS, Histogram

Method = Literal["auto", "minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = ("auto", "minmax", "percentile", "entropy", "mse")
DEFAULT_PERCENTILE = 99.99
# `auto` leaves the full range only for an estimated error that is smaller by more than this.
_MARGIN_FRACTION = 0.02
_GRID = 48
# Migacz starts where the bins are as many as the integers.
_ENTROPY_START_BIN = 128
_ENTROPY_STEPS = 256

Floats = npt.NDArray[np.float64]


class RangeChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The range of one tensor, by which method, and the mean squared error it is estimated to cost."""

    method: Method
    low: float
    high: float
    mean_squared_error: float


class _ObserverState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    method: Method
    percentile: float
    histogram: bytes


class RangeObserver:
    """Watches one tensor and says which range to quantize; its memory does not depend on the data.

    Every method reads the same histogram, so one calibration run serves them all.

    Args:
        name: the tensor's name, for messages.
        method: how `limits` chooses the range.
        percentile: share of the values, in percent, that the percentile method keeps.
        histogram: what was seen so far.
    """

    def __init__(
        self,
        name: str,
        *,
        method: Method = "auto",
        percentile: float = DEFAULT_PERCENTILE,
        histogram: Histogram | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"unknown calibration method {method!r}")
        if not 50.0 < percentile <= 100.0:
            raise ValueError(f"percentile {percentile} is not in (50, 100]")
        self.name = name
        self.method: Method = method
        self.percentile = percentile
        self.histogram = histogram or Histogram()

    @property
    def masked(self) -> int:
        """How many values lay beyond ±1e30 (masks) and were left out of the range."""
        return self.histogram.masked_low + self.histogram.masked_high

    def update(self, values: npt.NDArray[Any]) -> None:
        """Watch one activation of any shape.

        Raises:
            DataError: if a value is NaN.
        """
        self.histogram.add(values, self.name)

    def merge(self, other: RangeObserver) -> RangeObserver:
        """An observer that has seen what both have seen; exact and associative."""
        return RangeObserver(
            self.name,
            method=self.method,
            percentile=self.percentile,
            histogram=self.histogram.merge(other.histogram),
        )

    def limits(self, scheme: Scheme) -> tuple[float, float]:
        """The range (low, high) to map onto the scheme's integers.

        Raises:
            DataError: if no finite value was seen.
        """
        choice = self.choose(scheme)
        return choice.low, choice.high

    def choose(self, scheme: Scheme, method: Method | None = None) -> RangeChoice:
        """The range by `method` (the observer's own by default) with its estimated error.

        `auto` takes min-max, the percentile or the least-squares range, whichever the histogram says
        costs least; the full range stays unless another is better by more than 2 %.

        Raises:
            DataError: if no finite value was seen.
        """
        if self.histogram.maximum < self.histogram.minimum:
            raise DataError(
                "no finite value was seen of a tensor",
                where=f"tensor {self.name!r}",
                why=f"{self.masked} values lie beyond ±1e30" if self.masked else "it was never updated",
                remedy="keep this tensor in float",
            )
        wanted = method or self.method
        if wanted != "auto":
            return self._choice(wanted, scheme)
        best = self._choice("minmax", scheme)
        for candidate in (self._choice("percentile", scheme), self._choice("mse", scheme)):
            if candidate.mean_squared_error < best.mean_squared_error * (1 - _MARGIN_FRACTION):
                best = candidate
        return best

    def _choice(self, method: Method, scheme: Scheme) -> RangeChoice:
        histogram = self.histogram
        if method == "percentile":
            low, high = percentile_limits(histogram, scheme, self.percentile)
        elif method == "entropy":
            low, high = entropy_limits(histogram, scheme)
        elif method == "mse":
            low, high = mse_limits(histogram, scheme)
        else:
            low, high = histogram.minimum, histogram.maximum
        error = quantization_error(histogram, low, high, scheme)
        return RangeChoice(method=method, low=low, high=high, mean_squared_error=error)

    def to_bytes(self) -> bytes:
        """A compact form for `from_bytes`."""
        return msgspec.msgpack.encode(
            _ObserverState(
                name=self.name,
                method=self.method,
                percentile=self.percentile,
                histogram=self.histogram.to_bytes(),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> RangeObserver:
        """The observer that `to_bytes` wrote.

        Raises:
            DataError: if the bytes are not such an observer.
        """
        try:
            state = msgspec.msgpack.decode(data, type=_ObserverState)
        except msgspec.DecodeError as error:
            raise DataError("stored calibration ranges cannot be read", why=str(error)) from error
        histogram = Histogram.from_bytes(state.histogram)
        return cls(state.name, method=state.method, percentile=state.percentile, histogram=histogram)


def percentile_limits(histogram: Histogram, scheme: Scheme, percentile: float) -> tuple[float, float]:
    """The smallest range, to one bin, that keeps at least `percentile` percent of the values.

    Symmetric schemes cut the magnitude; others cut half of the rest from each side, or all of it from
    the one side that there is.
    """
    counts, total = histogram.counts, histogram.total
    outside = math.floor(total * (1 - percentile / 100))
    edges = (np.arange(-SIDE_BINS, SIDE_BINS + 1)) * histogram.width
    if scheme.symmetric:
        magnitude = counts[SIDE_BINS:] + counts[SIDE_BINS - 1 :: -1]
        keep = int(np.searchsorted(np.cumsum(magnitude), total - outside))
        bound = float(edges[SIDE_BINS + keep + 1])
        return max(-bound, histogram.minimum), min(bound, histogram.maximum)
    below = 0 if histogram.minimum >= 0 else outside if histogram.maximum <= 0 else outside // 2
    cumulative = np.cumsum(counts)
    first = int(np.searchsorted(cumulative, below, side="right"))
    last = int(np.searchsorted(cumulative, total - (outside - below)))
    low, high = float(edges[first]), float(edges[last + 1])
    return max(low, histogram.minimum), min(high, histogram.maximum)


def quantization_error(histogram: Histogram, low: float, high: float, scheme: Scheme) -> float:
    """Mean squared error of quantizing the histogram's values with the range [low, high].

    Within a bin the values are taken as uniform; exact zeros cost nothing.
    """
    return float(_Moments(histogram).errors(np.array([low]), np.array([high]), scheme)[0])


class _Moments:
    """Sums of 1, x and x² over the values below any point, from which the error of any range follows.

    The values that quantize to integer k (real value k d, d the step) lie between two boundaries
    (k ± 1/2) d; their squared error is M2 - 2 k d M1 + (k d)² M0 with the moments M0, M1, M2 between
    these. The first and the last integer take everything beyond, which is the clipping error.
    """

    def __init__(self, histogram: Histogram) -> None:
        low, high, counts = histogram.occupied()
        self.total = histogram.total
        # A value that is its bin's only content gets a width that is nothing beside any step.
        high = np.maximum(high, low + histogram.width / 1024)
        self.starts = low
        self._ends = high
        self._density = counts / (high - low)
        powers = ((high**k - low**k) / k for k in (1, 2, 3))
        self._below = [np.concatenate([[0.0], np.cumsum(self._density * power)]) for power in powers]

    def errors(self, lows: Floats, highs: Floats, scheme: Scheme) -> Floats:
        """Mean squared error for each range [low, high]; both shape (ranges,), and so is the result."""
        if not self.starts.size:
            return np.zeros(len(lows))
        scale, zero_point = affine_parameters(lows, highs, scheme)
        smallest, largest = scheme.limits
        integers = np.arange(smallest, largest + 1) - zero_point.astype(np.int64)[:, None]
        step = scale.astype(np.float64)[:, None]
        moments = [np.diff(below, axis=1) for below in self._cumulative((integers[:, :-1] + 0.5) * step)]
        real = integers * step
        errors: Floats = (moments[2] - 2 * real * moments[1] + real**2 * moments[0]).sum(axis=1)
        return np.maximum(errors, 0.0) / self.total

    def _cumulative(self, points: Floats) -> list[Floats]:
        """The three sums below each point, between a column of zeros and one of totals."""
        index = np.searchsorted(self.starts, points, side="right") - 1
        bin_index = np.maximum(index, 0)
        start = self.starts[bin_index]
        inside = np.clip(points, start, self._ends[bin_index])
        sums = []
        for power, below in enumerate(self._below, 1):
            part = below[bin_index] + self._density[bin_index] * (inside**power - start**power) / power
            edges = np.zeros((len(points), 1)), np.full((len(points), 1), below[-1])
            sums.append(np.concatenate([edges[0], part, edges[1]], axis=1))
        return sums


def mse_limits(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    """The range of least estimated squared error: a grid over both ends, then a finer one around it.

    The full range is among the candidates, so the result is never worse than it.
    """
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    moments = _Moments(histogram)
    grid = np.arange(_GRID, 0, -1) / _GRID
    around = 1 + np.arange(-7, 8) / (8 * _GRID)
    if scheme.symmetric:
        bound = max(-low, high)
        bounds = grid * bound
        best = float(bounds[int(np.argmin(moments.errors(-bounds, bounds, scheme)))])
        bounds = np.concatenate([[bound, best], np.minimum(best + (around - 1) * bound, bound)])
        bounds = bounds[bounds > 0] if bound > 0 else bounds
        best = float(bounds[int(np.argmin(moments.errors(-bounds, bounds, scheme)))])
        return max(-best, low), min(best, high)
    start = _descend(moments, (low, high), (low, high), grid, scheme)
    near = _descend(moments, start, (low, high), around, scheme)
    ends = np.array([[low, high], start, near])
    best_ends = ends[int(np.argmin(moments.errors(ends[:, 0], ends[:, 1], scheme)))]
    return float(best_ends[0]), float(best_ends[1])


def _descend(
    moments: _Moments,
    start: tuple[float, float],
    full: tuple[float, float],
    fractions: Floats,
    scheme: Scheme,
) -> tuple[float, float]:
    """Scale one end after the other by the fraction of least error, twice, never beyond `full`."""
    low, high = start
    for _ in range(2):
        if start[1] > 0:
            highs = np.minimum(np.append(fractions * start[1], high), full[1])
            high = float(highs[int(np.argmin(moments.errors(np.full(len(highs), low), highs, scheme)))])
        if start[0] < 0:
            lows = np.maximum(np.append(fractions * start[0], low), full[0])
            low = float(lows[int(np.argmin(moments.errors(lows, np.full(len(lows), high), scheme)))])
        if start[0] == 0 or start[1] == 0:
            break
    return low, high


def entropy_limits(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    """The clipping range whose quantized distribution loses least information (Kullback-Leibler).

    Works on magnitudes, in at most 2,048 bins as the source does; a candidate threshold T is applied
    to both sides as far as the tensor reaches, and the magnitudes up to T get the integers that the
    scheme has for them. Exact zeros are left out, as they would hide everything else of a ReLU's
    output. Thresholds end at bins that hold values: elsewhere the divergence is infinite.

    Source: Migacz 2017, "8-bit Inference with TensorRT", GTC S7310, pp. 28-36.
    """
    coarse = histogram.merged(1)
    counts = coarse.counts.copy()
    counts[SIDE_BINS] -= coarse.zeros
    magnitude = (counts[SIDE_BINS:] + counts[SIDE_BINS - 1 :: -1]).astype(np.float64)
    ends = np.flatnonzero(magnitude) + 1
    low, high = histogram.minimum, histogram.maximum
    if not ends.size:
        return low, high
    grid = np.linspace(min(_ENTROPY_START_BIN, ends[-1]), ends[-1], _ENTROPY_STEPS)
    kept_bins = np.unique(ends[np.searchsorted(ends, grid, side="right") - 1])[::-1]
    divergences = []
    for kept in kept_bins:
        bound = kept * coarse.width
        levels = _magnitude_levels(max(-bound, min(low, 0.0)), min(bound, max(high, 0.0)), bound, scheme)
        divergences.append(_divergence(magnitude[: ends[-1]], int(kept), levels))
    bound = float(kept_bins[int(np.argmin(divergences))]) * coarse.width
    return max(-bound, low), min(bound, high)


def _magnitude_levels(low: float, high: float, bound: float, scheme: Scheme) -> int:
    """How many integers the scheme spends on magnitudes from 0 to `bound` when it covers [low, high]."""
    smallest, largest = scheme.limits
    if scheme.symmetric:
        return (largest - smallest) // 2 + 1
    span = largest - smallest
    # The last bin may end far above tiny values: no more integers than there are.
    return min(max(round(span * min(bound / (high - low), 1.0)), 1), span) + 1


def _divergence(magnitude: Floats, kept: int, levels: int) -> float:
    """KL divergence, in nats, of the clipped distribution from its quantized form."""
    reference = magnitude[:kept].copy()
    inner = magnitude[:kept]
    reference[-1] += magnitude[kept:].sum()
    group = np.minimum(np.arange(kept) * levels // kept, levels - 1)
    filled = inner > 0
    sums = np.bincount(group, inner, minlength=levels)
    sizes = np.bincount(group, filled, minlength=levels)
    spread = np.where(filled, sums[group] / np.maximum(sizes[group], 1), 0.0)
    p, q = reference[filled] / reference.sum(), spread[filled] / spread.sum()
    return float((p * np.log(p / q)).sum())
