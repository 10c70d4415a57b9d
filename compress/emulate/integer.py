"""onnxruntime's integer kernels in NumPy, bit for bit as they compute on x86 with VNNI or AMX.

Products are exact in int32 there, and on Arm: what two processors can differ in is the float
arithmetic around them. Cores without VNNI multiply by other instructions: see `saturation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...graph.scheme import IntArray

FloatArray = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
_LEVELS = np.float32(255)


class Affine(NamedTuple):
    """A float32 scale (a scalar, or one per channel) and a zero point (a scalar of the integers' type)."""

    scale: FloatArray | np.float32
    zero_point: IntArray


class Quantized(NamedTuple):
    """Integers (any shape) with their scale and zero point as in `Affine`."""

    values: IntArray
    scale: FloatArray | np.float32
    zero_point: IntArray


def dynamic_quantize_linear(values: FloatArray) -> Quantized:
    """The range of `values` (any shape, finite), widened to zero, on 255 steps.

    scale = (maximum - minimum) / 255, zero_point = round(-minimum / scale), all in float32; a range
    of zero width gets scale 1. Source: ONNX operator DynamicQuantizeLinear.
    """
    array = np.asarray(values, np.float32)
    low, high = (np.float32(end) for end in (array.min(initial=0.0), array.max(initial=0.0)))
    scale = np.float32(1) if high == low else np.float32((high - low) / _LEVELS)
    zero = np.rint(np.clip(np.float32(0) - low / scale, np.float32(0), _LEVELS))
    point = np.asarray(zero, np.uint8)
    return Quantized(quantize_linear(array, scale, point), np.asarray(scale), point)


def quantize_linear(
    values: FloatArray, scale: FloatArray | np.float32, zero_point: IntArray
) -> npt.NDArray[np.uint8]:
    """clip(round_half_even(values / scale) + zero_point): the division in float32, one scale.

    Args:
        values: any shape.
        scale: a scalar.
        zero_point: a scalar; its type (uint8 or int8) is the result's.

    Source: ONNX operator QuantizeLinear.
    """
    zero = np.asarray(zero_point)
    limits = np.iinfo(zero.dtype)
    steps = np.asarray(values, np.float32) / np.float32(scale)
    low, high = np.float32(limits.min - int(zero)), np.float32(limits.max - int(zero))
    result: npt.NDArray[np.uint8] = (np.rint(np.clip(steps, low, high)).astype(np.int32) + int(zero)).astype(
        zero.dtype
    )
    return result


def matmul_integer(left: IntArray, right: IntArray, left_zero: int = 0, right_zero: int = 0) -> Int32Array:
    """(left - left_zero) @ (right - right_zero), in int32 with wrap-around.

    Args:
        left: uint8 or int8, (..., M, K).
        right: uint8 or int8, (..., K, N).
        left_zero: zero point of `left`.
        right_zero: zero point of `right`.

    Source: ONNX operator MatMulInteger.
    """
    a = np.asarray(left, np.float64) - left_zero
    b = np.asarray(right, np.float64) - right_zero
    sums = a @ b  # exact: below 2^53 for any K that memory holds
    wrapped: Int32Array = sums.astype(np.int64).astype(np.int32)
    return wrapped


def scale_to_float(
    sums: Int32Array,
    left_scale: FloatArray | np.float32,
    right_scale: FloatArray | np.float32,
    bias: FloatArray | None = None,
) -> FloatArray:
    """float(sums) * (left_scale * right_scale) + bias, each step rounded to float32 (no fused multiply-add).

    This is what MatMulIntegerToFloat and DynamicQuantizeMatMul do behind their product.

    Args:
        sums: (..., M, N).
        left_scale: a scalar.
        right_scale: a scalar or (N,).
        bias: (N,), or None.
    """
    factor = np.asarray(left_scale, np.float32) * np.asarray(right_scale, np.float32)
    scaled: FloatArray = sums.astype(np.float32) * factor
    if bias is not None:
        scaled += np.asarray(bias, np.float32)
    return scaled


def dynamic_quantize_matmul(
    data: FloatArray, weight: IntArray, weight_scale: FloatArray, bias: FloatArray | None = None
) -> FloatArray:
    """What a planned dynamic MatMul computes: float (..., M, K) by integers (K, N), float out.

    Args:
        data: float32 (..., M, K).
        weight: int8 (K, N), zero point 0.
        weight_scale: float32, a scalar or (N,).
        bias: float32 (N,), or None.
    """
    made = dynamic_quantize_linear(data)
    sums = matmul_integer(made.values, weight, int(made.zero_point))
    return scale_to_float(sums, made.scale, weight_scale, bias)


def requantize(sums: Int32Array, factor: FloatArray, zero_point: IntArray) -> IntArray:
    """round_half_even(clip(float(sums) * factor)) + zero_point, as MLAS requantizes.

    Args:
        sums: int32, the bias already added; channels last.
        factor: input scale * weight scale / output scale, float32, a scalar or (channels,).
        zero_point: a scalar; its type is the result's.

    Source: onnxruntime, MLAS, quantize.cpp (MlasRequantizeOutput); the scheme is that of
    Jacob et al. 2018, arXiv:1712.05877, section 2.2, with the multiplier in float32.
    """
    zero = np.asarray(zero_point)
    limits = np.iinfo(zero.dtype)
    scaled = sums.astype(np.float32) * np.asarray(factor, np.float32)
    low, high = np.float32(limits.min - int(zero)), np.float32(limits.max - int(zero))
    result: IntArray = (np.rint(np.clip(scaled, low, high)).astype(np.int32) + int(zero)).astype(zero.dtype)
    return result


def requantization_factor(
    data_scale: FloatArray | np.float32,
    weight_scale: FloatArray | np.float32,
    result_scale: FloatArray | np.float32,
) -> FloatArray:
    """data_scale * weight_scale / result_scale, rounded to float32 at each step, in this order."""
    product = np.asarray(data_scale, np.float32) * np.asarray(weight_scale, np.float32)
    factor: FloatArray = np.divide(product, np.asarray(result_scale, np.float32), dtype=np.float32)
    return factor


def qlinear_matmul(
    left: Quantized, right: Quantized, result: Affine, *, bias: Int32Array | None = None
) -> IntArray:
    """An integer product of integers; with a bias, what QGemm computes.

    Args:
        left: (..., M, K), one scale.
        right: (..., K, N), one scale or (N,).
        result: scale and zero point of the result, and by it the result's type.
        bias: int32 (N,), at scale left.scale * right.scale.

    Source: ONNX operator QLinearMatMul; com.microsoft operator QGemm.
    """
    sums = matmul_integer(left.values, right.values, int(left.zero_point), int(right.zero_point))
    if bias is not None:
        sums = (sums.astype(np.int64) + bias).astype(np.int32)
    factor = requantization_factor(left.scale, right.scale, result.scale)
    return requantize(sums, factor, result.zero_point)


def qlinear_conv(
    data: Quantized,
    weight: Quantized,
    result: Affine,
    *,
    bias: Int32Array | None = None,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
) -> IntArray:
    """A 2-d convolution in integers; padding is the data's zero point.

    Args:
        data: (N, C, H, W), one scale.
        weight: int8 (O, C / group, KH, KW), zero point 0, one scale or (O,).
        result: scale and zero point of the result, and by it the result's type.
        bias: int32 (O,).
        strides: two.
        pads: top, left, bottom, right.
        dilations: two.
        group: divides C and O.

    Returns:
        (N, O, OH, OW) of the type of `result.zero_point`.

    Source: ONNX operator QLinearConv.
    """
    zero = int(data.zero_point)
    products = convolution_products(
        data.values, zero, weight.values, strides=strides, pads=pads, dilations=dilations, group=group
    )
    total = np.concatenate([matmul_integer(rows, matrix, zero) for rows, matrix in products], axis=-1)
    if bias is not None:
        total = (total.astype(np.int64) + bias).astype(np.int32)
    factor = requantization_factor(data.scale, weight.scale, result.scale)
    return np.moveaxis(requantize(total, factor, result.zero_point), -1, 1)


def convolution_products(
    data: IntArray,
    padding: int,
    weight: IntArray,
    *,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
) -> list[tuple[IntArray, IntArray]]:
    """A 2-d convolution as one matrix product per group, in the order in which MLAS adds.

    K runs over kernel rows, kernel columns and input channels, the channels fastest.

    Args:
        data: (N, C, H, W).
        padding: the value that stands outside of it.
        weight: (O, C / group, KH, KW).
        strides: two.
        pads: top, left, bottom, right.
        dilations: two.
        group: divides C and O.

    Returns:
        For each group the rows (N, OH, OW, K) and the matrix (K, O / group).
    """
    top, left, bottom, right = pads
    edges = ((0, 0), (0, 0), (top, bottom), (left, right))
    padded = np.pad(data, edges, constant_values=padding)
    spread = [(size - 1) * gap + 1 for size, gap in zip(weight.shape[2:], dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(padded, spread, axis=(2, 3))
    views = views[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    patches = views.transpose(0, 2, 3, 4, 5, 1)  # (N, OH, OW, KH, KW, C)
    outputs, inputs = weight.shape[0] // group, weight.shape[1]
    found = []
    for index in range(group):
        rows = patches[..., index * inputs : (index + 1) * inputs]
        matrix = weight[index * outputs : (index + 1) * outputs].transpose(2, 3, 1, 0)
        found.append((rows.reshape(*rows.shape[:3], -1), matrix.reshape(-1, outputs)))
    return found


def qlinear_add(left: Quantized, right: Quantized, result: Affine) -> IntArray:
    """An element-wise sum in integers, as MLAS's AVX2 kernel computes it.

    With ratios r = scale / result.scale: round(left r_l + (right r_r + fixed)), where fixed =
    result.zero_point - (r_l left.zero_point + r_r right.zero_point); a product and the sum behind it
    are fused, rounded once.

    Args:
        left: any shape that broadcasts with `right`, one scale.
        right: as `left`.
        result: scale and zero point of the result, and by it the result's type.

    Source: onnxruntime, MLAS, qladd.cpp and qladd_avx2.cpp.
    """
    zero = np.asarray(result.zero_point)
    limits = np.iinfo(zero.dtype)
    first = np.float32(left.scale) / np.float32(result.scale)
    second = np.float32(right.scale) / np.float32(result.scale)
    offset = _fused(int(left.zero_point), first, second * np.float32(int(right.zero_point)))
    fixed = np.float32(int(zero)) - offset
    total = _fused(left.values, first, _fused(right.values, second, fixed))
    made: IntArray = np.clip(np.rint(total).astype(np.int64), limits.min, limits.max).astype(zero.dtype)
    return made


def _fused(value: IntArray | int, factor: np.float32, term: FloatArray | np.float32) -> FloatArray:
    """value * factor + term with one rounding to float32: the product is exact in float64."""
    total = np.asarray(value, np.float64) * float(factor) + np.asarray(term, np.float64)
    result: FloatArray = total.astype(np.float32)
    return result
