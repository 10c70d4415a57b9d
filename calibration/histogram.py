"""A histogram of one tensor that grows with its range: constant memory, exact under any order of data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError

# Bins on each side of zero; the larger side always fills more than half of its own.
SIDE_BINS = 4096
# Masks are written as -inf, -3.4e38 or the like: no activation that can be quantized reaches this.
MASK_MAGNITUDE = 1e30
_CHUNK = 2**16
# Powers of two between which the bin width stays, so that scaling by it is exact in float32.
_MIN_EXPONENT, _MAX_EXPONENT = -100, 100

Counts = npt.NDArray[np.int64]


class HistogramState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A histogram as plain data: the counts from the first to the last bin that is not empty.

    `minimum` and `maximum` are None where there is no value.
    """

    exponent: int
    first_bin: int
    counts: list[int]
    minimum: float | None
    maximum: float | None
    zeros: int
    masked_low: int
    masked_high: int


@dataclasses.dataclass(kw_only=True, eq=False)
class Histogram:
    """Counts of values in 2 * SIDE_BINS bins of width 2**exponent, aligned to zero.

    The width is the smallest power of two that holds every value seen, so bins merge pairwise when
    the range grows, and the same values give the same histogram in any order and any grouping.
    Values beyond ±MASK_MAGNITUDE are counted apart and are in no bin.

    Attributes:
        exponent: the bin width is 2**exponent; bin i covers [i, i + 1) * width, i from -SIDE_BINS.
        counts: int64, shape (2 * SIDE_BINS,).
        minimum: exact smallest value in the bins (inf if none).
        maximum: exact largest value in the bins (-inf if none).
        zeros: how many values are exactly zero (they are in the bins, too).
        masked_low: values below -MASK_MAGNITUDE, -inf included.
        masked_high: values above MASK_MAGNITUDE, inf included.
    """

    exponent: int = _MIN_EXPONENT
    counts: Counts = dataclasses.field(default_factory=lambda: np.zeros(2 * SIDE_BINS, np.int64))
    minimum: float = math.inf
    maximum: float = -math.inf
    zeros: int = 0
    masked_low: int = 0
    masked_high: int = 0

    @property
    def total(self) -> int:
        """How many values are in the bins."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """The width of one bin."""
        return math.ldexp(1.0, self.exponent)

    def add(self, values: npt.NDArray[Any], name: str) -> None:
        """Count the values of an array of any shape.

        Raises:
            DataError: if a value is NaN; `name` says where.
        """
        flat = np.ascontiguousarray(values).reshape(-1)
        if flat.dtype != np.float32:
            flat = flat.astype(np.float32 if flat.dtype == np.float16 else np.float64)
        for start in range(0, flat.size, _CHUNK):
            self._add_chunk(flat[start : start + _CHUNK], name)

    def _add_chunk(self, values: npt.NDArray[np.floating], name: str) -> None:
        low, high = float(values.min()), float(values.max())
        if math.isnan(low) or math.isnan(high):
            raise DataError(
                "an activation is NaN",
                where=f"tensor {name!r}",
                why=f"{int(np.isnan(values).sum())} of {values.size} values in one sample",
                remedy="check the model and the calibration data in float first",
            )
        if low < -MASK_MAGNITUDE or high > MASK_MAGNITUDE:
            below, above = values < -MASK_MAGNITUDE, values > MASK_MAGNITUDE
            self.masked_low += int(below.sum())
            self.masked_high += int(above.sum())
            values = values[~(below | above)]
            if not values.size:
                return
            low, high = float(values.min()), float(values.max())
        self._widen(low, high)
        # Exact: the width is a power of two, and floor keeps every value in its own bin.
        scaled = values * values.dtype.type(math.ldexp(1.0, -self.exponent))
        bins = np.floor(scaled, out=scaled).astype(np.intp)
        bins += SIDE_BINS
        self.counts += np.bincount(bins, minlength=2 * SIDE_BINS)
        self.zeros += values.size - int(np.count_nonzero(values))

    def _widen(self, low: float, high: float) -> None:
        # Adding 0.0 makes -0.0 a plain zero: which of the two came first must not matter.
        self.minimum, self.maximum = min(self.minimum, low + 0.0), max(self.maximum, high + 0.0)
        exponent = max(self.exponent, _exponent_for(low, high))
        if exponent > self.exponent:
            self.counts = _merged_bins(self.counts, exponent - self.exponent)
            self.exponent = exponent

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both sets of values together; exact, associative and commutative."""
        exponent = max(self.exponent, other.exponent)
        return Histogram(
            exponent=exponent,
            counts=_merged_bins(self.counts, exponent - self.exponent)
            + _merged_bins(other.counts, exponent - other.exponent),
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            zeros=self.zeros + other.zeros,
            masked_low=self.masked_low + other.masked_low,
            masked_high=self.masked_high + other.masked_high,
        )

    def merged(self, doublings: int) -> Histogram:
        """The same values in bins that are 2**doublings times as wide."""
        return dataclasses.replace(
            self, exponent=self.exponent + doublings, counts=_merged_bins(self.counts, doublings)
        )

    def occupied(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Lower edge, upper edge and count of each bin that is not empty, ascending; shape (bins,) each.

        Exact zeros are left out: every scheme represents them exactly. The outermost edges are the
        exact minimum and maximum.
        """
        counts = self.counts.copy()
        counts[SIDE_BINS] -= self.zeros
        index = np.flatnonzero(counts)
        low = np.maximum((index - SIDE_BINS) * self.width, self.minimum)
        high = np.minimum((index - SIDE_BINS + 1) * self.width, self.maximum)
        return low, np.maximum(low, high), counts[index].astype(np.float64)

    def state(self) -> HistogramState:
        """The histogram as plain data; the same values give the same data."""
        index = np.flatnonzero(self.counts)
        first, last = (int(index[0]), int(index[-1]) + 1) if index.size else (0, 0)
        return HistogramState(
            exponent=self.exponent,
            first_bin=first,
            counts=self.counts[first:last].tolist(),
            minimum=self.minimum if index.size else None,
            maximum=self.maximum if index.size else None,
            zeros=self.zeros,
            masked_low=self.masked_low,
            masked_high=self.masked_high,
        )

    @classmethod
    def from_state(cls, state: HistogramState) -> Histogram:
        """The histogram that `state` gave.

        Raises:
            DataError: if it contradicts itself.
        """
        if not _is_sound(state):
            raise DataError("stored calibration ranges are damaged", remedy="calibrate again")
        counts = np.zeros(2 * SIDE_BINS, np.int64)
        counts[state.first_bin : state.first_bin + len(state.counts)] = state.counts
        return cls(
            exponent=state.exponent,
            counts=counts,
            minimum=math.inf if state.minimum is None else state.minimum,
            maximum=-math.inf if state.maximum is None else state.maximum,
            zeros=state.zeros,
            masked_low=state.masked_low,
            masked_high=state.masked_high,
        )

    def to_bytes(self) -> bytes:
        """A compact form for `from_bytes`; the same histogram gives the same bytes."""
        return msgspec.msgpack.encode(self.state())

    @classmethod
    def from_bytes(cls, data: bytes) -> Histogram:
        """The histogram that `to_bytes` wrote.

        Raises:
            DataError: if the bytes are not such a histogram.
        """
        try:
            state = msgspec.msgpack.decode(data, type=HistogramState)
        except msgspec.DecodeError as error:
            raise DataError("stored calibration ranges cannot be read", why=str(error)) from error
        return cls.from_state(state)


def _is_sound(state: HistogramState) -> bool:
    last = state.first_bin + len(state.counts)
    counted = (*state.counts, state.zeros, state.masked_low, state.masked_high)
    if not 0 <= state.first_bin <= last <= 2 * SIDE_BINS or not 0 <= min(counted) <= max(counted) < 2**62:
        return False
    if not _MIN_EXPONENT <= state.exponent <= _MAX_EXPONENT or sum(state.counts) >= 2**62:
        return False
    if state.minimum is None or state.maximum is None:
        return state.minimum is state.maximum is None and not any(state.counts)
    side = math.ldexp(float(SIDE_BINS), state.exponent)
    return any(state.counts) and -side <= state.minimum <= state.maximum < side


def _exponent_for(low: float, high: float) -> int:
    """The smallest exponent whose bins hold both values: -N * width <= low and high < N * width."""
    side = SIDE_BINS.bit_length() - 1
    need = _MIN_EXPONENT
    if high > 0:
        # frexp: high = m * 2**e with 0.5 <= m < 1, so high < 2**e.
        need = max(need, math.frexp(high)[1] - side)
    if low < 0:
        mantissa, exponent = math.frexp(-low)
        need = max(need, exponent - side - (mantissa == 0.5))
    return need


def _merged_bins(counts: Counts, doublings: int) -> Counts:
    """Counts after the bin width was doubled `doublings` times: bin i goes to floor(i / 2**doublings)."""
    if doublings == 0:
        return counts
    index = np.flatnonzero(counts)
    target = ((index - SIDE_BINS) >> min(doublings, 62)) + SIDE_BINS
    merged = np.zeros_like(counts)
    np.add.at(merged, target, counts[index])
    return merged
