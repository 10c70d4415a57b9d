"""Constant folding: what does not depend on the inputs is computed once, here.

Written here because onnxscript's folder writes forms of newer operator sets into older graphs, loses
the rank of shapes on its way through Reshape, names outputs that were left out, and changes the
declared shapes of inputs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as stock
from onnx.reference import ReferenceEvaluator

from .edit import (
    Array,
    Editor,
    bodies,
    can_stand_for,
    detach_bodies,
    integers,
    is_constant,
    operand,
    remove_dead,
    small_constant,
)
from .model import Model
from .passes import Outcome, Pass
from .symbolic import constant_sizes

_INPUT_ELEMENTS = 1 << 13
_OUTPUT_ELEMENTS = 1 << 18
_DROPOUT_WITHOUT_FLAG = 7
# Operators whose NumPy result is the runtime's, up to float noise. What is not named is not folded:
# random numbers, quantization (its form is wanted), ConstantOfShape (small as it is), control flow.
# fmt: off
_FOLDED = frozenset(
    {"Abs", "Acos", "Add", "Atan", "Ceil", "Clip", "Cos", "CumSum", "Div", "Erf", "Exp", "Floor",
     "Log", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Round",
     "Sigmoid", "Sign", "Sin", "Softmax", "Sqrt", "Sub", "Sum", "Tanh"}
    | {"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or",
     "Where", "Xor"}
    | {"ArgMax", "ArgMin", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"}
    | {"Cast", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "NonZero",
     "OneHot", "Range", "Reshape", "ScatterElements", "ScatterND", "Shape", "Size", "Slice", "Squeeze",
     "Tile", "Transpose", "Trilu", "Unsqueeze"}
)
# fmt: on
# onnx's reference operators raise whatever NumPy raises on what the operator does not allow.
_EVALUATION_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Compute small constant sub-graphs, sizes that shapes tell, and constant conditions now."""

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        before = _count_constants(model)
        stock.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model.ir)
        outcome.count("lifted", before - _count_constants(model))
        editor = Editor(model)
        for graph in tuple(model.all_graphs()):
            _fold_graph(graph, editor, outcome)
        if outcome.applied:
            remove_dead(model)
        return outcome


def _count_constants(model: Model) -> int:
    return sum(node.op_type == "Constant" for node in model.graph.all_nodes())


def _fold_graph(graph: ir.Graph, editor: Editor, outcome: Outcome) -> None:
    waiting = list(graph)[::-1]
    while waiting:
        node = waiting.pop()
        if node.domain or not any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        if node.op_type == "If" and (branch := _branch_taken(node)) is not None:
            waiting += _inline_branch(node, branch, editor)[::-1]
            outcome.count("branch")
        elif (cast := _as_cast(node, editor)) is not None:
            waiting.append(cast)
            outcome.count("cast-like")
        elif (source := _passed_through(node, editor.model.opset)) is not None:
            editor.replace(node.outputs[0], source)
            outcome.count("no-op")
        elif (array := _sizes(node)) is not None or (array := _value(node, editor, outcome)) is not None:
            editor.replace(node.outputs[0], editor.constant(array, node.outputs[0].name or "folded", graph))
            outcome.count("constant")


def _as_cast(node: ir.Node, editor: Editor) -> ir.Node | None:
    """The Cast that a CastLike is, where the type is known."""
    like = operand(node, 1) if node.op_type == "CastLike" and "saturate" not in node.attributes else None
    if like is None or like.dtype is None:
        return None
    result = node.outputs[0]
    to = {"to": int(like.dtype)}
    stem = result.name or "cast"
    cast = editor.node("Cast", [node.inputs[0]], to, before=node, stem=stem, like=result, dtype=like.dtype)
    editor.replace(result, cast.outputs[0])
    return cast


def _passed_through(node: ir.Node, opset: int) -> ir.Value | None:
    """The input that the node's only used output always equals, if there is one."""
    source = operand(node, 0)
    if source is None or any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return None
    if node.op_type == "Cast":
        return source if source.dtype is not None and source.dtype == node.attributes["to"].as_int() else None
    if node.op_type == "Identity":
        return source if can_stand_for(node.outputs[0], source) else None
    if node.op_type == "Concat":
        return source if len(node.inputs) == 1 else None
    if node.op_type == "Dropout" and opset >= _DROPOUT_WITHOUT_FLAG:
        training = operand(node, 2)
        flag = small_constant(training, 1)
        return source if training is None or (flag is not None and not flag.any()) else None
    return None


def _sizes(node: ir.Node) -> Array | None:
    """The integers that the node holds if the shapes of its operands say them all."""
    value = node.outputs[0]
    if node.op_type not in _FOLDED or value.dtype not in (None, ir.DataType.INT64, ir.DataType.INT32):
        return None
    sizes = constant_sizes(value)
    if sizes is None:
        return None
    return np.array(sizes, np.int32 if value.dtype == ir.DataType.INT32 else np.int64)


def _value(node: ir.Node, editor: Editor, outcome: Outcome) -> Array | None:
    """The node's result, if all of its inputs are small constants of plain numbers."""
    if node.op_type not in _FOLDED or len(node.outputs) != 1 or not node.inputs or bodies(node):
        return None
    steps = integers(operand(node, 4)) if node.op_type == "Slice" else None
    if steps is not None and min(steps, default=1) < 0:
        return None  # the reference and the runtime disagree on ends beyond the axis
    if not all(value is None or is_constant(value) for value in node.inputs):
        return None
    operands = [value for value in node.inputs if value is not None]
    arrays = {value.name or "": small_constant(value, _INPUT_ELEMENTS) for value in operands}
    if not all(array is not None and array.dtype.kind in "fiub" for array in arrays.values()):
        return None
    try:
        with np.errstate(all="ignore"):
            (result,) = ReferenceEvaluator(_alone(node, editor.model)).run(None, arrays)
    except _EVALUATION_ERRORS as error:
        outcome.refuse(node.name or node.op_type, "constant", f"it cannot be computed: {error}")
        return None
    array = np.asarray(result)
    wanted = node.outputs[0].dtype
    if wanted is not None and array.dtype != wanted.numpy():
        return None
    return array if array.dtype.kind in "fiub" and array.size <= _OUTPUT_ELEMENTS else None


def _alone(node: ir.Node, model: Model) -> onnx.ModelProto:
    """A model of this one node."""
    proto = onnx.ModelProto(ir_version=model.ir.ir_version)
    proto.opset_import.add(domain="", version=model.opset)
    graph = proto.graph
    graph.name = "node"
    ir.serde.serialize_node_into(graph.node.add(), node)
    for name in dict.fromkeys(value.name for value in node.inputs if value is not None):
        graph.input.add(name=name)
    graph.output.add(name=node.outputs[0].name)
    return proto


def _branch_taken(node: ir.Node) -> ir.Graph | None:
    condition = small_constant(operand(node, 0), 1)
    if condition is None or condition.dtype != np.bool_ or condition.size != 1:
        return None
    return node.attributes["then_branch" if condition.any() else "else_branch"].as_graph()


def _inline_branch(node: ir.Node, branch: ir.Graph, editor: Editor) -> list[ir.Node]:
    """Put the branch's nodes and weights in the place of the If; returns the nodes."""
    graph = node.graph
    assert graph is not None
    results, inner = list(branch.outputs), list(branch)
    branch.outputs.clear()
    branch.remove(inner)
    for name, weight in tuple(branch.initializers.items()):
        del branch.initializers[name]
        weight.name = editor.fresh_name(name)
        graph.register_initializer(weight)
    for moved in inner:
        for value in moved.outputs:
            if value.name:  # two branches may use the same name; their surroundings are one now
                value.name = editor.fresh_name(value.name)
        node.prepend(moved)
    for old, new in zip(node.outputs, results, strict=True):
        editor.replace(old, new)
    detach_bodies(node)
    graph.remove(node, safe=True)
    return inner
