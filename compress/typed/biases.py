"""Biases into the products they stand behind, and weights the way round that float16 kernels take them."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...graph.edit import (
    Editor,
    int_attribute,
    is_constant,
    only_use,
    producer,
    rank,
    remove_dead,
    static_dim,
)
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ...graph.weights import MappedTensor
from ..plan import Decision
from .formats import TYPES, Format

_SHAPE_SLICE_OPSET = 15


def bias_of(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """(the MatMul, the bias) of an Add that adds a number per column to a product with a constant matrix."""
    if node.op_type != "Add" or len(node.inputs) != 2:
        return None
    for product, bias in (node.inputs, tuple(reversed(node.inputs))):
        maker = producer(product, "MatMul")
        if maker is None or product is None or bias is None or only_use(product) is not node:
            continue
        weight = maker.inputs[1]
        columns = static_dim(weight, 1)
        if not is_constant(weight) or rank(weight) != 2 or rank(maker.inputs[0]) is None:
            continue
        if (rank(maker.inputs[0]) or 0) >= 2 and is_constant(bias) and _sizes(bias) == [columns]:
            return maker, bias
    return None


def _sizes(value: ir.Value) -> list[int]:
    return [] if value.const_value is None else [int(size) for size in value.const_value.shape.numpy()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinBiases(Pass):
    """Turn converted MatMul + Add into Gemm, and Gemm with a transposed constant into the plain one.

    An Add is joined where its decision names the bias.

    onnxruntime 1.31.1 adds float16 numbers one by one on Arm (16 times the instructions of float32),
    but starts a product from its bias at no cost; and it multiplies by a transposed float16 matrix
    without vectors (320 times the instructions). Inputs of more than two axes are flattened to rows.
    """

    decisions: tuple[Decision, ...]
    kind: Format

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome, editor = Outcome(), Editor(model)
        planned = {item.node: item for item in self.decisions if item.form == self.kind}
        rows: dict[int, tuple[ir.Value, ir.Value]] = {}
        turned: dict[int, ir.Value] = {}
        for node in tuple(model.graph):
            decision = planned.get(node.name or "")
            if decision is None or node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type == "Gemm" and int_attribute(node, "transB", 0) and is_constant(node.inputs[1]):
                _turn(node, turned, editor)
                outcome.count("weight-turned")
                continue
            found = bias_of(node) if decision.weight is not None else None
            if found is None or model.opset < _SHAPE_SLICE_OPSET or found[0].name not in planned:
                continue
            _join(node, found[0], found[1], rows=rows, editor=editor, dtype=TYPES[self.kind])
            outcome.count("bias-joined")
        if outcome.applied:
            remove_dead(model)
        return outcome


def _turn(node: ir.Node, turned: dict[int, ir.Value], editor: Editor) -> None:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:
        raise InternalError("a planned Gemm has no constant weight", where=node.name)
    tensor = weight.const_value
    if id(weight) not in turned:

        def transposed() -> ir.TensorProtocol:
            made = ir.tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype)
            if isinstance(tensor, MappedTensor):
                tensor.release()
            return made

        shape = ir.Shape([int(size) for size in reversed(tensor.shape.numpy())])
        owner = weight.graph if isinstance(weight.graph, ir.Graph) else editor.model.graph
        lazy = ir.LazyTensor(transposed, dtype=tensor.dtype, shape=shape)
        turned[id(weight)] = editor.tensor(lazy, f"{weight.name}.turned", owner)
    node.replace_input_with(1, turned[id(weight)])
    node.attributes["transB"] = ir.AttrInt64("transB", 0)


def _join(
    add: ir.Node,
    product: ir.Node,
    bias: ir.Value,
    *,
    rows: dict[int, tuple[ir.Value, ir.Value]],
    editor: Editor,
    dtype: ir.DataType,
) -> None:
    data, weight, result = product.inputs[0], product.inputs[1], add.outputs[0]
    if data is None or weight is None:
        raise InternalError("a planned product has no operands", where=product.name)
    name, inner, columns = product.name, static_dim(weight, 0), static_dim(weight, 1)
    flat = data
    if rank(data) != 2:
        if id(data) not in rows:
            rows[id(data)] = _as_rows(data, inner, product, editor, dtype)
        flat = rows[id(data)][0]
    like = result if rank(data) == 2 else None
    gemm = editor.node(
        "Gemm", [flat, weight, bias], before=add, stem=f"{result.name}/rows", like=like, dtype=dtype
    )
    made = gemm.outputs[0]
    if rank(data) != 2:
        graph = editor.model.graph
        width = editor.constant(np.asarray([columns], np.int64), f"{result.name}/width", graph)
        shape = editor.value(
            "Concat", [rows[id(data)][1], width], {"axis": 0}, before=add, stem=f"{result.name}/shape",
            dtype=ir.DataType.INT64,
        )  # fmt: skip
        made = editor.value(
            "Reshape", [made, shape], before=add, stem=f"{result.name}/unrolled", like=result, dtype=dtype
        )
    editor.replace(result, made)
    product.name = editor.fresh_name(f"{name}/before")
    gemm.name = name


def _as_rows(
    data: ir.Value, inner: int | None, before: ir.Node, editor: Editor, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """(the values as rows, their leading sizes), made once for all products that read them."""
    target = editor.constant(np.asarray([-1, inner], np.int64), f"{data.name}/rows/shape", editor.model.graph)
    flat = editor.value("Reshape", [data, target], before=before, stem=f"{data.name}/rows", dtype=dtype)
    leading = editor.value(
        "Shape", [data], {"start": 0, "end": -1}, before=before, stem=f"{data.name}/leading",
        dtype=ir.DataType.INT64,
    )  # fmt: skip
    return flat, leading
