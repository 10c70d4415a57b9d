"""Where x86 cores without VNNI saturate: VPMADDUBSW adds two products in 16 bits.

AVX2 and AVX512 without VNNI multiply unsigned activations by signed weights two along K at a time:
a[2j] w[2j] + a[2j + 1] w[2j + 1], clipped to int16, then added up in int32. Signed activations
behind Q/DQ are shifted by 128 when the runtime loads the graph, and saturate alike; its kernel for
signed activations itself, and that of depthwise convolutions, widen to 16 bits first and are exact.
Arm cores, VNNI and AMX add in int32 and never saturate.
Weights of 7 bits cannot saturate: 255 * (63 + 63) = 32,130 <= 32,767 and 255 * (-64 - 64) = -32,640
>= -32,768.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...graph.scheme import IntArray
from .integer import Int32Array

LOWEST, HIGHEST = -(2**15), 2**15 - 1
_LARGEST_ACTIVATION = 255
_SIGN_SHIFT = 128


class Risk(NamedTuple):
    """What the pairs of one weight can come to, over all activations from 0 to a largest one.

    `saturating` of `pairs` (along K, for every column) can leave 16 bits; `lowest` and `highest` are
    the extreme sums of a pair.
    """

    pairs: int
    saturating: int
    lowest: int
    highest: int

    @property
    def possible(self) -> bool:
        """Whether any pair can saturate."""
        return self.saturating > 0


def worst_case(weight: IntArray, largest_activation: int = _LARGEST_ACTIVATION) -> Risk:
    """The extreme sums of each pair of weights, if activations may be anything up to the largest.

    Args:
        weight: int8 (K, columns), in the order in which the kernel adds along K.
        largest_activation: the largest unsigned activation, 255 unless less is known.
    """
    first, second = _pairs(weight, axis=0)
    highest = largest_activation * (np.maximum(first, 0) + np.maximum(second, 0))
    lowest = largest_activation * (np.minimum(first, 0) + np.minimum(second, 0))
    return Risk(
        pairs=highest.size,
        saturating=int(np.count_nonzero((highest > HIGHEST) | (lowest < LOWEST))),
        lowest=int(lowest.min(initial=0)),
        highest=int(highest.max(initial=0)),
    )


def observed(activation: IntArray, weight: IntArray) -> tuple[int, int]:
    """(products of pairs that saturate, all products of pairs) for recorded activations.

    Args:
        activation: uint8 (rows, K), or int8, which counts as shifted by 128.
        weight: int8 (K, columns).
    """
    sums = _pair_sums(activation, weight)
    return int(np.count_nonzero((sums > HIGHEST) | (sums < LOWEST))), sums.size


def matmul_vpmaddubsw(left: IntArray, right: IntArray, left_zero: int = 0) -> Int32Array:
    """(left - left_zero) @ right with the saturating pair sums of x86 without VNNI.

    The zero point is taken off afterwards, by column sums of the weights, as the kernel does.

    Args:
        left: uint8 (rows, K), or int8, which is shifted by 128 with its zero point.
        right: int8 (K, columns), zero point 0.
        left_zero: zero point of `left`.

    Returns:
        int32 (rows, columns).

    Equal bit by bit to onnxruntime 1.31.1 under QEMU -cpu Haswell (MatMulInteger and QLinearConv).
    Source: onnxruntime, MLAS, GemmU8S8KernelAvx2; Intel SDM volume 2, VPMADDUBSW.
    """
    shift = _SIGN_SHIFT if left.dtype == np.int8 else 0
    sums = np.clip(_pair_sums(left, right), LOWEST, HIGHEST).sum(axis=1, dtype=np.int64)
    columns = np.asarray(right, np.int64).sum(axis=0)
    result: Int32Array = (sums - (left_zero + shift) * columns).astype(np.int32)
    return result


def _pair_sums(activation: IntArray, weight: IntArray) -> npt.NDArray[np.int32]:
    """Sums of two products before they are clipped: (rows, ceil(K / 2), columns)."""
    unsigned = np.asarray(activation, np.int32) + (_SIGN_SHIFT if activation.dtype == np.int8 else 0)
    left_first, left_second = _pairs(unsigned, axis=1)
    first, second = _pairs(weight, axis=0)
    sums: npt.NDArray[np.int32] = (
        left_first[:, :, None] * first[None] + left_second[:, :, None] * second[None]
    )
    return sums


def _pairs(values: IntArray, axis: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Even and odd elements along an axis (an odd length is padded with zero), in int32."""
    wide = np.asarray(values, np.int32)
    if wide.shape[axis] % 2:
        widths = [(0, 1) if place == axis else (0, 0) for place in range(wide.ndim)]
        wide = np.pad(wide, widths)
    even, odd = [slice(None)] * wide.ndim, [slice(None)] * wide.ndim
    even[axis], odd[axis] = slice(0, None, 2), slice(1, None, 2)
    return wide[tuple(even)], wide[tuple(odd)]
