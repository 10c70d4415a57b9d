"""Layers that sum over units, as least squares sees them: inputs, result, and what the result flows into."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import (
    Editor,
    constant,
    int_attribute,
    is_constant,
    only_use,
    operand,
    rank,
    split_constant,
)
from ..refine.patches import Window, as_rows, columns_of, from_rows, window_of
from .elimination import Matrix, Rows
from .spaces import Indices

Floats = npt.NDArray[np.floating[Any]]
_SUMS = ("Add", "Sum")
LARGEST_INPUTS = 11_000
"""Inputs of a layer that is still fitted: the moments of more would take a gigabyte."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A Conv, Gemm or MatMul whose weight and bias can be fitted.

    Attributes:
        node: the layer.
        window: the geometry of a convolution, None for a product.
        adder: the node that adds the bias of a MatMul, if one does.
        result: the tensor with the bias in it.
        total: the tensor that the result flows into, if that is all that reads it and it adds another
            computed tensor of the same rank (a residual connection); else the result.
        beside: what is added there, None where nothing is.
        rectified: whether the total is read by nothing but a Relu.
    """

    node: ir.Node
    window: Window | None
    adder: ir.Node | None
    result: ir.Value
    total: ir.Value
    beside: ir.Value | None
    rectified: bool

    @property
    def reads(self) -> ir.Value:
        """The tensor that the weight is multiplied with."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> Floats:
        """The weight in its own shape."""
        array = constant(self.node.inputs[1])
        assert array is not None
        return np.asarray(array, np.float32)

    @property
    def has_constant(self) -> bool:
        """Whether a bias is there or can be given to it."""
        return self.node.op_type != "MatMul" or self.adder is not None

    def rows(self) -> Matrix:
        """Weight and bias as least squares has them: (groups, inputs (+ 1), outputs / groups)."""
        plain = as_rows(self.node, self.weight)
        assert plain is not None
        turned = plain.transpose(0, 2, 1).astype(np.float64)
        if not self.has_constant:
            return turned
        groups, _, outputs = turned.shape
        bias = np.broadcast_to(self.bias(), (groups * outputs,)).astype(np.float64)
        return np.concatenate([turned, bias.reshape(groups, 1, outputs)], axis=1)

    def bias(self) -> Floats:
        """The bias, one number an output; zero where there is none."""
        place = self._bias_place()
        value = None if place is None else constant(place[0].inputs[place[1]])
        return np.zeros(1, np.float32) if value is None else np.asarray(value, np.float32).reshape(-1)

    def _bias_place(self) -> tuple[ir.Node, int] | None:
        if self.node.op_type != "MatMul":
            return (self.node, 2) if operand(self.node, 2) is not None else None
        if self.adder is None:
            return None
        return self.adder, 0 if is_constant(self.adder.inputs[0]) else 1

    def put(self, rows: Matrix, editor: Editor) -> None:
        """Replace weight and bias by fitted ones, of the form that `rows` gives."""
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        weights = rows[:, :-1] if self.has_constant else rows
        shape = self.weight.shape
        turned = np.ascontiguousarray(weights.transpose(0, 2, 1)).astype(np.float32)
        name = self.node.inputs[1].name if self.node.inputs[1] is not None else None
        new = np.asarray(from_rows(self.node, turned, shape), np.float32)
        self.node.replace_input_with(1, editor.constant(new, name or "weight", graph))
        if not self.has_constant:
            return
        bias = np.ascontiguousarray(rows[:, -1].reshape(-1)).astype(np.float32)
        place = self._bias_place()
        if place is None:
            self.node.resize_inputs(3)
            self.node.replace_input_with(2, editor.constant(bias, f"{name}/bias", graph))
            return
        node, position = place
        old = node.inputs[position]
        assert old is not None
        assert old.shape is not None
        # A bias keeps its rank: (1, outputs) stays so, a single number becomes one for each output.
        wide = bias.reshape(*[1] * (len(old.shape) - 1), -1) if len(old.shape) else bias
        node.replace_input_with(position, editor.constant(wide, old.name or "bias", graph))

    def columns(self, values: Floats, every: int = 1, start: int = 0) -> Floats:
        """The columns that the weight multiplies: (groups, inputs, n)."""
        return columns_of(values, self.window, every, start)

    def targets(self, values: Floats, every: int = 1, start: int = 0) -> Floats:
        """A tensor of the result's shape at the same positions: (groups, outputs / groups, n)."""
        if self.window is None:
            return np.ascontiguousarray(values.reshape(-1, values.shape[-1])[start::every].T)[None]
        places = (slice(start, None, every),) * len(self.window.kernel)
        taken = values[(slice(None), slice(None), *places)]
        moved = np.moveaxis(taken, 1, 0)
        groups = self.window.groups
        return np.ascontiguousarray(moved).reshape(groups, values.shape[1] // groups, -1)


def layer_of(node: ir.Node) -> Layer | None:
    """The layer that a node is, None where least squares cannot fit it."""
    weight = operand(node, 1)
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    if not is_constant(weight) or is_constant(node.inputs[0]) or weight is None or weight.shape is None:
        return None
    sizes = weight.shape.numpy()
    turned = node.op_type == "Conv" or int_attribute(node, "transB", 0)
    if (math.prod(sizes[1:]) if turned else sizes[0]) > LARGEST_INPUTS:
        return None
    if weight.dtype != ir.DataType.FLOAT or (node.op_type != "Conv" and len(weight.shape) != 2):
        return None
    window = None
    if node.op_type == "Conv":
        window = window_of(node, tuple(weight.shape.numpy()))
        if window is None:
            return None
    elif as_rows(node, np.empty((1, 1), np.float32)) is None:
        return None
    bias = operand(node, 2)
    if bias is not None and (not is_constant(bias) or _varies_by_row(bias)):
        return None
    adder = _adder(node) if node.op_type == "MatMul" else None
    result = node.outputs[0] if adder is None else adder.outputs[0]
    total, beside = _sum(result)
    after = only_use(total)
    return Layer(
        node=node,
        window=window,
        adder=adder,
        result=result,
        total=total,
        beside=beside,
        rectified=after is not None and after.op_type == "Relu",
    )


def _varies_by_row(bias: ir.Value) -> bool:
    return bias.shape is None or any(size != 1 for size in list(bias.shape)[:-1])


def _adder(node: ir.Node) -> ir.Node | None:
    """The Add that gives a MatMul its bias."""
    after = only_use(node.outputs[0])
    if after is None or after.op_type != "Add" or after.domain:
        return None
    parts = split_constant(after)
    if parts is None or parts[0] is not node.outputs[0]:
        return None
    return None if _varies_by_row(parts[1]) else after


def _sum(result: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Where a result is added to another computed tensor, and to which."""
    after = only_use(result)
    if after is None or after.domain or after.op_type not in _SUMS or len(after.inputs) != 2:
        return result, None
    other = after.inputs[1] if after.inputs[0] is result else after.inputs[0]
    if other is None or other is result or is_constant(other):
        return result, None
    shapes = (result.shape, after.outputs[0].shape, other.shape)
    if rank(other) != rank(result) or shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        return result, None
    return after.outputs[0], other


def unit_rows(layer: Layer, labels: Indices, units: tuple[int, ...]) -> list[Rows]:
    """For each unit the rows of the layer's weight that read it.

    Args:
        layer: the layer.
        labels: the class of each element of the weight's summed axis.
        units: classes.
    """
    taps = 1 if layer.window is None else int(np.prod(layer.window.kernel))
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    found = []
    for unit in units:
        first, last = np.searchsorted(ordered, [unit, unit + 1])
        places = np.sort(order[first:last])
        found.append((places[:, None] * taps + np.arange(taps)).reshape(-1))
    return found
