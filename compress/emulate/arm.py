"""onnxruntime's integer kernels as 64-bit Arm computes them where its arithmetic is not that of `integer`."""

from __future__ import annotations

import numpy as np

from ...graph.scheme import IntArray
from .integer import Affine, FloatArray, Quantized

_BITS = 21
_SMALLEST_RATIO, _LARGEST_RATIO = np.float32(2.0**-14), np.float32(2.0**8)


def qlinear_add(left: Quantized, right: Quantized, result: Affine) -> IntArray | None:
    """An element-wise sum in fixed point, as MLAS's NEON kernel computes it.

    With ratios r = scale / result.scale and e the exponent of the larger one, each r becomes the integer
    m = round(r 2^(21 - e)); the sum m_l (left - z_l) + m_r (right - z_r) is shifted right by 21 - e bits and
    rounded, halves away from zero. x86 sums in float32 and rounds halves to even: the two differ by one step
    where a sum lies (nearly) halfway between two integers.

    Args:
        left: any shape that broadcasts with `right`, one scale.
        right: as `left`.
        result: scale and zero point of the result, and by it the result's type.

    Returns:
        None where the ratios are outside of 2^-14 … 2^8, for which the kernel has another path.

    Source: onnxruntime, MLAS, qladd.cpp.
    """
    zero = np.asarray(result.zero_point)
    limits = np.iinfo(zero.dtype)
    found = sum_multipliers(left.scale, right.scale, result.scale)
    if found is None:
        return None
    first, second, shift = found
    total = first * (np.asarray(left.values, np.int64) - int(left.zero_point)) + second * (
        np.asarray(right.values, np.int64) - int(right.zero_point)
    )
    away = total - (total < 0)
    rounded = (away + (1 << (shift - 1))) >> shift
    made: IntArray = np.clip(rounded + int(zero), limits.min, limits.max).astype(zero.dtype)
    return made


def sum_multipliers(
    left: FloatArray | np.float32, right: FloatArray | np.float32, result: FloatArray | np.float32
) -> tuple[int, int, int] | None:
    """(m_l, m_r, bits of the shift) of `qlinear_add` from scales of one element each; None as there."""
    ratios = [np.float32(scale) / np.float32(result) for scale in (left, right)]
    if not all(_SMALLEST_RATIO <= ratio < _LARGEST_RATIO for ratio in ratios):
        return None
    shift = _BITS - (int(np.frexp(max(ratios))[1]) - 1)
    first, second = (int(np.rint(np.float64(ratio) * 2.0**shift)) for ratio in ratios)
    # A ratio just below a power of two can round up to it: the kernel then takes its other path.
    return (first, second, shift) if max(first, second) < 1 << (_BITS + 1) else None
