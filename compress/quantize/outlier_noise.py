"""What outlier channels add to the noise of dynamic INT8, and what is left of it when they are treated apart.

The noise that quantization adds to y = x W, with uniform rounding errors of variance step^2 / 12:

    activation, one step for the tensor:     R^2 / (255^2 12) sum_j e_j,   R the range, e_j = |W_j|^2
    weight, one step for an output channel:  sum_n (max_j |W_jn| / 127)^2 / 12 sum_j m_j

per row of x, where m_j is the mean square of channel j. Channels of x divided by s_j and rows of W times
s_j give the same y, another R, and e_j s_j^2, |W_jn| s_j, m_j / s_j^2 in their places. All noise is
given as a fraction of the energy of y, taken as sum_j m_j e_j.

Sources: the migration of Xiao et al. 2023 (SmoothQuant), arXiv:2211.10438, equation 3; here only channels
above a level are migrated, and the level is the one of least predicted noise instead of a fixed exponent.
Channels computed apart: Dettmers et al. 2022 (LLM.int8), arXiv:2208.07339, section 3.1; Zhao et al. 2019
(outlier channel splitting), arXiv:1901.09504.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.weights import MappedTensor

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_WEIGHT_STEPS = 127
_LARGEST_SHARE = 4
_SPLIT_COUNTS = (4, 8, 16, 32, 64, 128)


class Channels(NamedTuple):
    """Smallest and largest value and mean square of each channel of an activation, of shape (channels,)."""

    low: Float64s
    high: Float64s
    mean_square: Float64s

    @property
    def largest(self) -> Float64s:
        """The largest magnitude of each channel, shape (channels,)."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def divided(self, by: Float64s) -> Channels:
        """Each channel divided by a factor above zero."""
        return Channels(self.low / by, self.high / by, self.mean_square / np.square(by))

    def step(self) -> float:
        """The step of DynamicQuantizeLinear: the range, extended to hold zero, over 255."""
        return float(max(self.high.max(), 0.0) - min(self.low.min(), 0.0)) / 255


def channels_of(limits: tuple[Float32s, Float32s], spread: tuple[Float32s, Float32s]) -> Channels:
    """Channels with these limits, and with these means less and plus one standard deviation."""
    low, high, less, more = (np.asarray(side, np.float64) for side in (*limits, *spread))
    return Channels(low, high, (np.square(less) + np.square(more)) / 2)


class Factors(NamedTuple):
    """What each channel is divided by, shape (channels,), and the noise with and without."""

    by: Float64s
    before: float
    after: float


class Split(NamedTuple):
    """Channels to compute apart, ascending, and the activation's noise without and with that."""

    chosen: Indices
    before: float
    after: float


def row_energy(weight: Float32s) -> Float64s:
    """The squared norm of each row of a weight [K, N], shape (K,)."""
    energy: Float64s = np.einsum("kn,kn->k", weight, weight).astype(np.float64)
    return energy


def choose_factors(channels: Channels, weights: Sequence[Float32s]) -> Factors:
    """Factors >= 1 of the least predicted noise, for an activation that MatMuls with these weights read.

    With t the k-th largest magnitude, s_j = max(1, largest_j / t); k is searched over powers of sqrt(2)
    up to a quarter of the channels.

    Args:
        channels: what is known of the activation, K channels.
        weights: each [K, N].
    """
    largest = channels.largest
    order = np.argsort(-largest, kind="stable")
    energy = sum((row_energy(weight) for weight in weights), np.zeros(len(largest)))
    columns = [np.maximum(weight.max(axis=0), -weight.min(axis=0)).astype(np.float64) for weight in weights]
    signal = float(channels.mean_square @ energy)

    def noise(by: Float64s, count: int) -> float:
        scaled = channels.divided(by)
        activation = scaled.step() ** 2 * float(np.square(by) @ energy)
        top, steps = order[:count], 0.0
        for weight, column in zip(weights, columns, strict=True):
            rows = np.abs(weight[top]).astype(np.float64) * by[top, None]
            steps += float(np.square(np.maximum(rows.max(axis=0, initial=0.0), column)).sum())
        stored = steps / _WEIGHT_STEPS**2 * float(scaled.mean_square.sum())
        return (activation + stored) / 12 / signal

    if not signal > 0.0:
        return Factors(np.ones(len(largest)), 0.0, 0.0)
    before = noise(np.ones(len(largest)), 0)
    best = Factors(np.ones(len(largest)), before, before)
    for count in _counts(len(largest) // _LARGEST_SHARE):
        level = largest[order[count]]
        if not level > 0.0:
            break
        by = np.maximum(1.0, largest / level)
        left = noise(by, count)
        if left < best.after:
            best = Factors(by, before, left)
    return best


def split_options(channels: Channels, weight: Float32s) -> list[Split]:
    """The noise left where the largest 4, 8, 16, ... channels of an activation are computed apart in float.

    Args:
        channels: what is known of the activation, K channels.
        weight: what it is multiplied with, [K, N].

    Returns:
        At most a quarter of the channels each, the fewest first; none where nothing is quantized away.
    """
    energy, largest = row_energy(weight), channels.largest
    signal = float(channels.mean_square @ energy)
    if not signal > 0.0:
        return []

    def noise(rest: Indices) -> float:
        step = Channels(*(side[rest] for side in channels)).step()
        return step**2 / 12 * float(energy[rest].sum()) / signal

    order = np.argsort(-largest, kind="stable")
    before = noise(order)
    return [
        Split(np.sort(order[:count]), before, noise(order[count:]))
        for count in _SPLIT_COUNTS
        if count * _LARGEST_SHARE <= len(order)
    ]


def _counts(limit: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 11, 16, ... up to `limit`."""
    return sorted(
        {round(2 ** (power / 2)) for power in range(2 * max(limit, 1).bit_length())}
        & set(range(1, limit + 1))
    )


def changed_weight(
    tensor: ir.TensorProtocol,
    *,
    rows: Float64s | None = None,
    columns: Float64s | None = None,
    take_rows: Indices | None = None,
    take_columns: Indices | None = None,
) -> ir.TensorProtocol:
    """A weight with rows and columns multiplied or picked; a mapped one is read when it is used.

    Args:
        tensor: float32 [K, N] (or [N] with `columns` and `take_columns` alone).
        rows: factors, shape (K,).
        columns: factors, shape (N,).
        take_rows: indices of the rows to keep.
        take_columns: indices of the columns to keep.
    """
    shape = [int(size) for size in tensor.shape.numpy()]
    if take_rows is not None:
        shape[0] = len(take_rows)
    if take_columns is not None:
        shape[-1] = len(take_columns)

    def compute() -> ir.TensorProtocol:
        values = np.asarray(tensor.numpy())
        if take_columns is not None:
            values = values[..., take_columns]
        if take_rows is not None:
            values = values[take_rows]
        made = np.array(values, np.float32)
        if rows is not None:
            made *= rows.astype(np.float32)[:, None]
        if columns is not None:
            made *= columns.astype(np.float32)
        if isinstance(tensor, MappedTensor):
            tensor.release()
        return ir.tensor(made)

    if not isinstance(tensor, (MappedTensor, ir.LazyTensor)):
        return compute()
    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=ir.Shape(shape))
