"""Attention as current exporters write it: guards that never fire, projections that share an input."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, constant, is_constant, producer, rank, scalar, small_constant, static_dim
from ...graph.rewrite import Refused, Verdict


class DropNanGuard(NamedTuple):
    """Where(IsNaN(softmax), 0, softmax) -> softmax, if no row can be masked with minus infinity.

    Softmax of finite numbers is never NaN. torch writes the guard for masks that hold -inf.
    """

    name: str = "nan-guard"
    roots: frozenset[str] = frozenset({"Where"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        test = producer(node.inputs[0], "IsNaN")
        probabilities = producer(node.inputs[2], "Softmax")
        if test is None or probabilities is None or test.inputs[0] is not node.inputs[2]:
            return False
        if scalar(node.inputs[1]) != 0.0 or node.inputs[2] is None:
            return False
        if rank(node.outputs[0]) != rank(node.inputs[2]):
            return Refused("the zero gives the result more axes than the scores have")
        if node.inputs[2].dtype != ir.DataType.FLOAT:
            return Refused("the scores are not known to be float32")
        if _bounds(probabilities.inputs[0]) is None:
            return Refused("the mask may hold -inf: a fully masked row must become 0, not NaN")
        editor.replace(node.outputs[0], node.inputs[2])
        return True


_Interval = tuple[float, float]
_PRODUCT_LIMIT = 1e30
_MOVES = ("Cast", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Identity", "Slice")


def _bounds(value: ir.Value | None, depth: int = 8) -> _Interval | None:
    """Limits of the finite float32 values of `value`, or None where one may be infinite.

    Products of activations are taken to stay below 1e30 (the weights are finite), integer and
    boolean masks to hold 0 and 1. Sums count: the lowest float twice is -inf.
    """
    node = producer(value)
    if value is None or depth == 0:
        return None
    if is_constant(value):
        known = small_constant(value, 1 << 20)
        if known is None or known.size == 0 or known.dtype.kind not in "fiub":
            return None
        return _in_range((float(known.min()), float(known.max())))
    if value.dtype is not None and not value.dtype.is_floating_point():
        return 0.0, 1.0
    if node is None:
        return None
    if node.op_type == "MatMul":
        return -_PRODUCT_LIMIT, _PRODUCT_LIMIT
    if node.op_type in _MOVES:
        return _bounds(node.inputs[0], depth - 1)
    if node.op_type not in ("Add", "Sub", "Mul", "Div", "Where"):
        return None
    first, second = (_bounds(operand, depth - 1) for operand in node.inputs[-2:])
    return None if first is None or second is None else _in_range(_combined(node.op_type, first, second))


def _combined(op_type: str, first: _Interval, second: _Interval) -> _Interval:
    """Interval arithmetic of one operator."""
    if op_type == "Where":
        return min(first[0], second[0]), max(first[1], second[1])
    if op_type == "Add":
        return first[0] + second[0], first[1] + second[1]
    if op_type == "Sub":
        return first[0] - second[1], first[1] - second[0]
    if op_type == "Div":
        if second[0] <= 0.0 <= second[1]:
            return -np.inf, np.inf
        second = 1.0 / second[1], 1.0 / second[0]
    corners = [left * right for left in first for right in second]
    return min(corners), max(corners)


def _in_range(limits: _Interval) -> _Interval | None:
    """The limits, if both round to finite float32 numbers."""
    with np.errstate(over="ignore"):
        return limits if bool(np.isfinite(np.array(limits).astype(np.float32)).all()) else None


_SPLIT_OPSET = 13


class PackSharedInput(NamedTuple):
    """MatMuls of one tensor with constant weights (query, key, value) -> one MatMul and a Split.

    On by `switches` only: in dynamic INT8 it was within the noise of three MatMulInteger that share one
    DynamicQuantizeLinear (onnxruntime 1.31.1, x86-64 with AMX, MiniLM at 1 x 128 tokens, 1 thread).
    """

    name: str = "packed-qkv"
    roots: frozenset[str] = frozenset({"MatMul"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        source = node.inputs[0]
        if source is None or not _is_projection(node, node):
            return False
        readers = [use.node for use in source.uses() if use.idx == 0 and _is_projection(use.node, node)]
        # The loop visits nodes in order and takes all at once: `node` stands in front of the others.
        group = list(dict.fromkeys([node, *readers]))
        if len(group) < 2:
            return False
        if editor.model.opset < _SPLIT_OPSET:
            return Refused(f"Split needs operator set {_SPLIT_OPSET}, the model has {editor.model.opset}")
        widths = [static_dim(member.inputs[1], 1) for member in group]
        weights = [constant(member.inputs[1]) for member in group]
        if any(width is None for width in widths) or node.graph is None:
            return Refused("a weight's shape is not known")
        if any(value.is_graph_output() for member in group for value in member.outputs):
            return Refused("a projection is a graph output")
        graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
        joined = np.concatenate([np.asarray(weight) for weight in weights], axis=1)
        weight_value = editor.tensor(ir.tensor(joined), f"{_stem(group)}.packed", graph)
        product = editor.value(
            "MatMul",
            [source, weight_value],
            before=node,
            stem=f"{node.outputs[0].name}/packed",
            dtype=node.outputs[0].dtype,
        )
        sizes = editor.constant(np.array(widths, np.int64), "sizes", graph)
        split = editor.node(
            "Split",
            [product, sizes],
            {"axis": -1},
            before=node,
            stem=f"{node.outputs[0].name}/split",
            outputs=len(group),
        )
        for member, part in zip(group, split.outputs, strict=True):
            part.shape, part.type = member.outputs[0].shape, member.outputs[0].type
            editor.replace(member.outputs[0], part)
        return True


def _is_projection(node: ir.Node, like: ir.Node) -> bool:
    if node.op_type != "MatMul" or node.domain or node.graph is not like.graph:
        return False
    weight = node.inputs[1]
    return is_constant(weight) and weight is not None and weight.shape is not None and len(weight.shape) == 2


def _stem(group: list[ir.Node]) -> str:
    """The common beginning of the weights' names."""
    names = [str(member.inputs[1].name) for member in group if member.inputs[1] is not None]
    shared = names[0]
    while shared and not all(name.startswith(shared) for name in names):
        shared = shared[:-1]
    return shared.rstrip("._/") or names[0]
