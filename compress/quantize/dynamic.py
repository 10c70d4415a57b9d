"""Dynamic INT8: activations quantized while the model runs, weights ahead of time."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, remove_dead
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ...graph.scheme import Scheme
from ..operands import RECURRENT_OPS, TABLE_OPS
from ..plan import Decision
from .weights import quantize_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeDynamic(Pass):
    """Turn planned MatMul nodes into DynamicQuantizeLinear + MatMulInteger.

    All nodes that read one tensor share one DynamicQuantizeLinear, so that it is quantized once.
    The weight is symmetric int8 with a scale per output channel (the last axis of [K, N]: any other
    axis is computed wrongly by onnxruntime when K = N).
    """

    decisions: tuple[Decision, ...]

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        planned = {
            item.node: item
            for item in self.decisions
            if item.form == "dynamic" and item.op not in RECURRENT_OPS
        }
        quantized = _Shared()
        for graph in model.all_graphs():
            for node in tuple(graph):
                decision = planned.get(node.name or "")
                if decision is not None:
                    _to_integers(node, decision, graph, editor, quantized)
                    outcome.count(f"{node.op_type}-dynamic")
        if outcome.applied:
            remove_dead(model)
        return outcome


class _Shared:
    """What several nodes read: quantized activations per tensor, stored weights per weight and scheme."""

    def __init__(self) -> None:
        self.activations: dict[tuple[int, int], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self.weights: dict[tuple[int, Scheme], tuple[ir.Value, ir.Value]] = {}

    def activation(
        self, value: ir.Value, node: ir.Node, graph: ir.Graph, editor: Editor
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(integers, scale, zero point) of an activation, computed once per tensor and graph."""
        key = (id(graph), id(value))
        if key not in self.activations:
            made = editor.node(
                "DynamicQuantizeLinear", [value], before=node, stem=f"{value.name}/quantized", outputs=3
            )
            integers, scale, zero_point = made.outputs
            integers.shape = None if value.shape is None else value.shape.copy()
            integers.type = ir.TensorType(ir.DataType.UINT8)
            scale.shape, scale.type = ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
            zero_point.shape, zero_point.type = ir.Shape([]), ir.TensorType(ir.DataType.UINT8)
            self.activations[key] = integers, scale, zero_point
        return self.activations[key]

    def weight(
        self, value: ir.Value, scheme: Scheme, graph: ir.Graph, editor: Editor
    ) -> tuple[ir.Value, ir.Value]:
        """(integers, scales) of a weight, stored once however many nodes read it."""
        key = (id(value), scheme)
        if key not in self.weights:
            if value.const_value is None:
                raise InternalError("a planned node has no constant weight", where=value.name)
            integers, scale = quantize_weight(value.const_value, scheme)
            stem, owner = value.name or "weight", value.graph if isinstance(value.graph, ir.Graph) else graph
            self.weights[key] = (
                editor.tensor(integers, f"{stem}.int8", owner),
                editor.constant(scale, f"{stem}.scale", owner),
            )
        return self.weights[key]


def _to_integers(node: ir.Node, decision: Decision, graph: ir.Graph, editor: Editor, shared: _Shared) -> None:
    data, weight, result = node.inputs[0], node.inputs[1], node.outputs[0]
    if data is None or weight is None or decision.weight_scheme is None:
        raise InternalError("a planned node has no constant weight", where=decision.node)
    weight_value, scale_value = shared.weight(weight, decision.weight_scheme, graph, editor)
    data_integers, data_scale, data_zero = shared.activation(data, node, graph, editor)
    sums = editor.value(
        "MatMulInteger",
        [data_integers, weight_value, data_zero],
        before=node,
        stem=f"{result.name}/sums",
        like=result,
        dtype=ir.DataType.INT32,
    )
    real = editor.value(
        "Cast", [sums], {"to": int(ir.DataType.FLOAT)}, before=node, stem=f"{result.name}/real", like=result
    )
    factor = editor.value(
        "Mul",
        [data_scale, scale_value],
        before=node,
        stem=f"{result.name}/factor",
        dtype=ir.DataType.FLOAT,
        shape=scale_value.shape,
    )
    product = editor.value("Mul", [real, factor], before=node, stem=f"{result.name}/scaled", like=result)
    editor.replace(result, product)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeTables(Pass):
    """Store planned embedding tables (Gather or Slice on axis 0) as int8 with one scale per row.

    The rows that are looked up become float again: a quarter of the memory traffic and file, and no
    error from rows that other rows would have stretched the range for.
    """

    decisions: tuple[Decision, ...]

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        planned = {
            item.node: item for item in self.decisions if item.form == "weight-only" and item.op in TABLE_OPS
        }
        stored: dict[int, tuple[ir.Value, ir.Value]] = {}
        for graph in model.all_graphs():
            for node in tuple(graph):
                decision = planned.get(node.name or "")
                if decision is not None:
                    _to_table(node, decision, graph, editor, stored)
                    outcome.count(f"{node.op_type}-int8-rows")
        if outcome.applied:
            remove_dead(model)
        return outcome


def _to_table(
    node: ir.Node,
    decision: Decision,
    graph: ir.Graph,
    editor: Editor,
    stored: dict[int, tuple[ir.Value, ir.Value]],
) -> None:
    table, rows = node.inputs[0], list(node.inputs[1:])
    if table is None or table.const_value is None or decision.weight_scheme is None:
        raise InternalError("a planned table is not constant", where=decision.node)
    if id(table) not in stored:
        name = table.name or "table"
        integers, scale = quantize_weight(table.const_value, decision.weight_scheme)
        owner = table.graph if isinstance(table.graph, ir.Graph) else graph
        stored[id(table)] = (
            editor.tensor(integers, f"{name}.int8", owner),
            editor.constant(np.ascontiguousarray(scale[:, None]), f"{name}.scale", owner),
        )
    integers_value, scale_value = stored[id(table)]
    result = node.outputs[0]
    attributes = {"axis": 0} if node.op_type == "Gather" else {}
    picked = editor.value(
        node.op_type,
        [integers_value, *rows],
        attributes,
        before=node,
        stem=f"{result.name}/int8",
        like=result,
        dtype=ir.DataType.INT8,
    )
    real = editor.value(
        "Cast", [picked], {"to": int(ir.DataType.FLOAT)}, before=node, stem=f"{result.name}/real", like=result
    )
    factor = editor.value(
        node.op_type,
        [scale_value, *rows],
        attributes,
        before=node,
        stem=f"{result.name}/scale",
        dtype=ir.DataType.FLOAT,
    )
    editor.replace(
        result, editor.value("Mul", [real, factor], before=node, stem=f"{result.name}/rows", like=result)
    )
