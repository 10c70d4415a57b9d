"""Quantizing weights: one scale per output channel (or row), rounded to nearest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.errors import ModelError
from ...graph.scheme import FloatArray, IntArray, Scheme, affine_parameters, quantize
from ...graph.weights import MappedTensor

Float32Array = npt.NDArray[np.float32]


class QuantizedWeight(NamedTuple):
    """Integers with the shape of the weight, and float32 scales of shape () or (channels,)."""

    integers: ir.TensorProtocol
    scale: Float32Array


def weight_scale(weight: FloatArray, scheme: Scheme) -> Float32Array:
    """Scales of a symmetric weight scheme from the largest magnitude per channel.

    Args:
        weight: any shape, finite.
        scheme: symmetric; `axis` carries the channels.

    Returns:
        float32, shape () or (channels,); all-zero channels get 1.
    """
    axes = tuple(axis for axis in range(weight.ndim) if axis != scheme.axis)
    largest = np.abs(weight).max(axis=axes if scheme.axis is not None else None, initial=0.0)
    scale, _ = affine_parameters(-largest, largest, scheme)
    return scale


def weight_integers(weight: FloatArray, scale: Float32Array, scheme: Scheme) -> IntArray:
    """The integers of `weight` (any shape) under a symmetric scheme with zero point 0."""
    return quantize(weight, scale, np.zeros(scale.shape, scheme.numpy_dtype), scheme)


def quantize_weight(tensor: ir.TensorProtocol, scheme: Scheme) -> QuantizedWeight:
    """Quantize a weight tensor; a mapped one stays on disk and is read again when it is written.

    Args:
        tensor: float weight.
        scheme: symmetric int8 scheme.

    Raises:
        ModelError: if a weight is infinite or NaN.
    """

    def source() -> FloatArray:
        return np.asarray(tensor.numpy(), np.float32)

    shape = ir.Shape(tensor.shape.numpy())
    values = source()
    require_finite(values, tensor.name)
    scale = weight_scale(values, scheme)
    del values
    dtype = ir.DataType.INT8 if scheme.dtype == "int8" else ir.DataType.UINT8
    if not isinstance(tensor, (MappedTensor, ir.LazyTensor)):
        integers = np.ascontiguousarray(weight_integers(source(), scale, scheme))
        return QuantizedWeight(ir.tensor(integers), scale)

    def compute() -> ir.TensorProtocol:
        integers = np.ascontiguousarray(weight_integers(source(), scale, scheme))
        if isinstance(tensor, MappedTensor):
            tensor.release()
        return ir.tensor(integers)

    if isinstance(tensor, MappedTensor):
        tensor.release()
    return QuantizedWeight(ir.LazyTensor(compute, dtype=dtype, shape=shape), scale)


def require_finite(weight: FloatArray, name: str | None) -> None:
    """Refuse a weight (any shape) that no scale can hold.

    Raises:
        ModelError: if a value is infinite or NaN.
    """
    if not np.isfinite(weight).all():
        raise ModelError(
            "a weight holds infinite values and cannot be quantized",
            where=f"initializer {name!r}",
            why="training diverged, or the value is meant as a mask",
            remedy=f"keep it in float: --keep-float '{name}'",
        )
