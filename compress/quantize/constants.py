"""The constants of a static plan, stored as integers: weights, biases, and what a node adds or multiplies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import Editor, constant
from ...graph.errors import InternalError
from ...graph.scheme import IntArray, Scheme, affine_parameters, quantize
from ..plan import Decision
from .weights import Float32Array, QuantizedWeight, quantize_weight, weight_integers

WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
_INT32_LIMIT = 2**31 - 1


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that a node stands in.

    Raises:
        InternalError: if it stands in none.
    """
    if not isinstance(node.graph, ir.Graph):
        raise InternalError("a node stands in no graph", where=node.name)
    return node.graph


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rounded:
    """The weight of one node rounded by other means than to nearest, and the bias that goes with it.

    Attributes:
        integers: int8, the shape of the weight.
        scale: float32, shape () or (channels,).
        bias: float64, shape (channels,), or None where the node's own is right.
    """

    integers: IntArray
    scale: Float32Array
    bias: npt.NDArray[np.float64] | None = None


Rounding = Mapping[str, Rounded]
"""Node name -> its weight's integers; the weight is read by that node alone."""


class Stored:
    """Constants in integers: each is stored once, however many nodes read it with the same scale.

    Args:
        editor: of the graph.
        rounding: weights that are rounded already.
    """

    def __init__(self, editor: Editor, rounding: Rounding | None = None) -> None:
        self.editor = editor
        self.rounding = rounding or {}
        self._weights: dict[tuple[int, Scheme], QuantizedWeight] = {}
        self._values: dict[tuple[int, bytes], ir.Value] = {}

    def weight(self, value: ir.Value, scheme: Scheme) -> QuantizedWeight:
        """The integers and scales of a weight."""
        key = id(value), scheme
        if key not in self._weights:
            if value.const_value is None:
                raise InternalError("a planned node has no constant weight", where=value.name)
            self._weights[key] = quantize_weight(value.const_value, scheme)
        return self._weights[key]

    def dequantized(
        self,
        origin: ir.Value,
        contents: QuantizedWeight,
        zero_point: IntArray,
        *,
        node: ir.Node,
        suffix: str,
        axis: int | None = None,
    ) -> ir.Value:
        """A DequantizeLinear of stored integers in front of `node`, one for each reader."""
        (integers, scale), graph = contents, graph_of(node)
        stem = f"{origin.name}.{suffix}"
        # Two nodes may read one bias and have it corrected differently at one scale.
        own = b"" if node.name not in self.rounding else str(node.name).encode()
        key = id(origin), scale.tobytes() + zero_point.tobytes() + suffix.encode() + own
        if key not in self._values:
            self._values[key] = self.editor.tensor(integers, stem, graph)
        stored = self._values[key]
        unit = self.editor.constant(np.asarray(scale, np.float32), f"{stem}.scale", graph)
        zero = self.editor.constant(zero_point, f"{stem}.zero_point", graph)
        return self.editor.value(
            "DequantizeLinear",
            [stored, unit, zero],
            {} if axis is None else {"axis": axis},
            before=node,
            stem=f"{stem}/dq",
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(integers.shape.numpy()),
        )


def store_constants(
    node: ir.Node,
    decision: Decision,
    activation: Scheme,
    scales: Mapping[str, tuple[Float32Array, IntArray]],
    stored: Stored,
) -> None:
    """Let a planned node read its weight and bias, or the constants it adds, from stored integers."""
    if node.op_type in WEIGHTED:
        _store_weight(node, decision, scales, stored)
        return
    for place, value in enumerate(node.inputs):
        contents = constant(value)
        if value is None or contents is None or contents.dtype != np.float32:
            continue
        scale, zero_point = affine_parameters(contents.min(), contents.max(), activation)
        integers = quantize(contents.astype(np.float32), scale, zero_point, activation)
        made = QuantizedWeight(ir.tensor(integers), scale)
        node.replace_input_with(
            place, stored.dequantized(value, made, zero_point, node=node, suffix=activation.dtype)
        )


def _store_weight(
    node: ir.Node,
    decision: Decision,
    scales: Mapping[str, tuple[Float32Array, IntArray]],
    stored: Stored,
) -> None:
    data, weight, scheme = node.inputs[0], node.inputs[1], decision.weight_scheme
    if data is None or weight is None or weight.const_value is None or scheme is None:
        raise InternalError("a planned node has no constant weight", where=decision.node)
    contents, refined = stored.weight(weight, scheme), stored.rounding.get(decision.node)
    if refined is not None:
        contents = QuantizedWeight(ir.tensor(refined.integers), refined.scale)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    bias_values = constant(bias)
    if bias is not None and bias_values is not None:
        data_scale = scales[str(data.name)][0]
        if refined is not None and refined.bias is not None:
            bias_values = refined.bias
        flat = np.broadcast_to(bias_values.astype(np.float64).reshape(-1), contents.scale.shape)
        widened = _scale_for_bias(contents.scale, data_scale, flat)
        if not np.array_equal(widened, contents.scale):
            weight_values = np.asarray(weight.const_value.numpy(), np.float32)
            contents = QuantizedWeight(ir.tensor(weight_integers(weight_values, widened, scheme)), widened)
        unit = (contents.scale.astype(np.float64) * float(data_scale)).astype(np.float32)
        bias_integers = np.clip(np.rint(flat / unit), -_INT32_LIMIT, _INT32_LIMIT).astype(np.int32)
        made = QuantizedWeight(ir.tensor(bias_integers), unit)
        zeros = np.zeros(unit.shape, np.int32)
        node.replace_input_with(2, stored.dequantized(bias, made, zeros, node=node, suffix="int32", axis=0))
    zero_point = np.zeros(contents.scale.shape, np.int8)
    node.replace_input_with(
        1, stored.dequantized(weight, contents, zero_point, node=node, suffix="int8", axis=scheme.axis)
    )


def _scale_for_bias(
    scale: Float32Array, data_scale: Float32Array, bias: npt.NDArray[np.float64]
) -> Float32Array:
    """Weight scales large enough that each bias fits 31 bits at scale weight_scale * data_scale.

    Args:
        scale: (channels,).
        data_scale: ().
        bias: (channels,).
    """
    widened: Float32Array = np.maximum(scale, np.abs(bias) / (float(data_scale) * 2**30)).astype(np.float32)
    return widened
