"""How one tensor is quantized (`Scheme`) and the pure arithmetic of affine quantization."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

IntegerType = Literal["int8", "uint8"]
Granularity = Literal["per-tensor", "per-channel", "per-row"]

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]


class Scheme(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the values of one tensor map to integers: real = scale * (integer - zero_point).

    Source: Jacob et al. 2018, arXiv:1712.05877, equation 1.

    `axis` is the axis that carries one scale per index (`per-channel`, `per-row`), None for
    `per-tensor`. `reduced_range` keeps one bit free (7 bits), against the saturation of x86
    cores without VNNI.
    """

    dtype: IntegerType
    symmetric: bool
    granularity: Granularity = "per-tensor"
    axis: int | None = None
    reduced_range: bool = False

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.granularity == "per-tensor"):
            raise ValueError(f"granularity {self.granularity!r} does not fit axis {self.axis!r}")

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and largest integer used, both inclusive.

        Symmetric int8 leaves -128 out, so that the range is the same on both sides.
        """
        bits = 7 if self.reduced_range else 8
        if self.dtype == "uint8":
            return 0, 2**bits - 1
        half = 2 ** (bits - 1)
        return (-half + 1 if self.symmetric else -half), half - 1

    @property
    def numpy_dtype(self) -> np.dtype[np.integer]:
        """The NumPy type that stores the integers."""
        return np.dtype(self.dtype)


def affine_parameters(
    minimum: FloatArray, maximum: FloatArray, scheme: Scheme
) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Scale and zero point that map [minimum, maximum] onto the scheme's integers.

    The range is widened to contain zero, so that zero is represented exactly (padding, ReLU).
    Symmetric schemes use max(|minimum|, |maximum|) and the middle as zero point. A range of
    zero width gets scale 1.

    Args:
        minimum: shape () or (channels,), finite.
        maximum: the same shape, not below `minimum`.
        scheme: the scheme to serve.

    Returns:
        scale: float32, the shape of `minimum`, strictly positive.
        zero_point: the scheme's dtype, same shape.

    Raises:
        ValueError: if a limit is not finite or minimum exceeds maximum.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.
    """
    low = np.minimum(np.asarray(minimum, np.float64), 0.0)
    high = np.maximum(np.asarray(maximum, np.float64), 0.0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("range limits must be finite")
    if (np.asarray(minimum) > np.asarray(maximum)).any():
        raise ValueError("range minimum exceeds its maximum")
    smallest, largest = scheme.limits
    tiny = np.finfo(np.float32).tiny
    if scheme.symmetric:
        middle = 0 if scheme.dtype == "int8" else (smallest + largest + 1) // 2
        scale64 = np.maximum(-low, high) / (largest - middle)
        scale = np.where(scale64 < tiny, 1.0, scale64).astype(np.float32)
        zero_point = np.full(scale.shape, middle)
    else:
        scale64 = (high - low) / (largest - smallest)
        scale = np.where(scale64 < tiny, 1.0, scale64).astype(np.float32)
        zero_point = np.clip(np.rint(smallest - low / scale), smallest, largest)
    return scale, zero_point.astype(scheme.numpy_dtype)


def _along(parameter: npt.NDArray[np.generic], rank: int, axis: int | None) -> npt.NDArray[np.generic]:
    """Reshape a per-axis parameter so that it broadcasts against a tensor of `rank` axes."""
    if axis is None or parameter.ndim == 0:
        return parameter
    shape = [1] * rank
    shape[axis] = -1
    return parameter.reshape(shape)


def quantize(values: FloatArray, scale: FloatArray, zero_point: IntArray, scheme: Scheme) -> IntArray:
    """Integers of `values`: clip(round_half_even(values / scale) + zero_point).

    Args:
        values: float tensor of any shape.
        scale: shape () or (channels,) along `scheme.axis`.
        zero_point: the same shape as `scale`.
        scheme: gives the integer limits and the axis.

    Returns:
        An array of the shape of `values` and the scheme's dtype.

    Source: ONNX operator QuantizeLinear.
    """
    smallest, largest = scheme.limits
    with np.errstate(over="ignore"):  # what overflows lands on a limit all the same
        steps = np.rint(values / _along(scale, values.ndim, scheme.axis).astype(values.dtype))
    shifted = steps + _along(zero_point, values.ndim, scheme.axis).astype(values.dtype)
    integers: IntArray = np.clip(shifted, smallest, largest).astype(scheme.numpy_dtype)
    return integers


def dequantize(
    integers: IntArray, scale: FloatArray, zero_point: IntArray, axis: int | None
) -> npt.NDArray[np.float32]:
    """Real values of `integers`: (integers - zero_point) * scale, in float32.

    Args:
        integers: integer tensor of any shape.
        scale: shape () or (channels,) along `axis`.
        zero_point: the same shape as `scale`.
        axis: the axis that carries the scales, or None.

    Source: ONNX operator DequantizeLinear.
    """
    centred = integers.astype(np.int32) - _along(zero_point, integers.ndim, axis).astype(np.int32)
    factor = _along(scale, integers.ndim, axis).astype(np.float32)
    result: npt.NDArray[np.float32] = centred.astype(np.float32) * factor
    return result
