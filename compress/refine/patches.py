"""What a Conv, Gemm or MatMul multiplies its weight with, as columns: X in Y = W X."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import float_attribute, int_attribute

Floats = npt.NDArray[np.floating[Any]]


class Window(NamedTuple):
    """The geometry of a convolution: one entry per spatial axis each, of `pads` two."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int


def window_of(node: ir.Node, weight_shape: tuple[int, ...]) -> Window | None:
    """The geometry of a Conv, None where its padding follows from the input's size (auto_pad)."""
    axes = len(weight_shape) - 2
    mode = node.attributes.get("auto_pad")
    if axes < 1 or (mode is not None and mode.as_string() not in ("NOTSET", "VALID")):
        return None

    def listed(name: str, default: int, count: int) -> tuple[int, ...]:
        found = node.attributes.get(name)
        return (default,) * count if found is None else tuple(found.as_ints())

    return Window(
        kernel=tuple(weight_shape[2:]),
        strides=listed("strides", 1, axes),
        dilations=listed("dilations", 1, axes),
        pads=listed("pads", 0, 2 * axes),
        groups=int_attribute(node, "group", 1),
    )


def patches(values: Floats, window: Window, every: int = 1, start: int = 0) -> Floats:
    """The values under positions of a convolution's kernel (im2col).

    Args:
        values: shape (batch, channels, *sizes).
        window: the convolution.
        every: take every so many positions along each spatial axis.
        start: the first of these.

    Returns:
        Shape (groups, channels / groups * kernel elements, batch * positions), in the order in which
        the weight's axes 1.. are flattened.
    """
    axes = len(window.kernel)
    before, after = window.pads[:axes], window.pads[axes:]
    padded = np.pad(values, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    spans = tuple((size - 1) * step + 1 for size, step in zip(window.kernel, window.dilations, strict=True))
    spatial = tuple(range(2, 2 + axes))
    views = np.lib.stride_tricks.sliding_window_view(padded, spans, spatial)
    places = tuple(slice(start * stride, None, every * stride) for stride in window.strides)
    taps = tuple(slice(None, None, step) for step in window.dilations)
    views = views[(slice(None), slice(None), *places, *taps)]
    # (batch, channels, *positions, *kernel) -> (channels, *kernel, batch, *positions)
    columns = views.transpose(1, *range(2 + axes, 2 + 2 * axes), 0, *spatial)
    rows = values.shape[1] // window.groups * math.prod(window.kernel)
    return np.ascontiguousarray(columns).reshape(window.groups, rows, -1)


def as_rows(node: ir.Node, weight: Floats) -> Floats | None:
    """A weight as (groups, outputs / groups, inputs): what multiplies the columns; None if it cannot be.

    Args:
        node: a Conv, Gemm or MatMul.
        weight: Conv: (outputs, inputs / groups, *kernel); Gemm, MatMul: a matrix.
    """
    if node.op_type == "Conv":
        groups = int_attribute(node, "group", 1)
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    if weight.ndim != 2 or not _is_plain(node):
        return None
    return weight[None] if int_attribute(node, "transB", 0) else np.ascontiguousarray(weight.T)[None]


def from_rows(node: ir.Node, rows: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The inverse of `as_rows`: an array of the weight's own shape."""
    if node.op_type == "Conv" or int_attribute(node, "transB", 0):
        return np.ascontiguousarray(rows.reshape(shape))
    return np.ascontiguousarray(rows[0].T)


def _is_plain(node: ir.Node) -> bool:
    factors = (float_attribute(node, "alpha", 1.0), float_attribute(node, "beta", 1.0))
    return node.op_type == "MatMul" or (factors == (1.0, 1.0) and not int_attribute(node, "transA", 0))


def columns_of(values: Floats, window: Window | None, every: int = 1, start: int = 0) -> Floats:
    """The columns that a node's weight multiplies, shape (groups, inputs, columns).

    Args:
        values: what it reads: (batch, channels, *sizes), or (…, inputs).
        window: the geometry of a Conv.
        every: take every so many positions along each spatial axis, or rows.
        start: the first of these.
    """
    if window is not None:
        return patches(values, window, every, start)
    return np.ascontiguousarray(values.reshape(-1, values.shape[-1])[start::every].T)[None]
