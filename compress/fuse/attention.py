"""Attention as current exporters write it: guards that never fire, projections that share an input."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, constant, is_constant, producer, scalar, small_constant, static_dim
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
        if not _finite(probabilities.inputs[0]):
            return Refused("the mask may hold -inf: a fully masked row must become 0, not NaN")
        editor.replace(node.outputs[0], node.inputs[2])
        return True


def _finite(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether the values added to the scores are finite constants (the scores are products)."""
    node = producer(value)
    if value is None or depth == 0:
        return False
    if is_constant(value):
        known = small_constant(value, 1 << 20)
        return known is not None and bool(np.isfinite(known).all())
    if node is None:
        return False
    if node.op_type == "MatMul":
        return True
    if node.op_type in ("Add", "Sub", "Mul", "Div"):
        return all(_finite(operand, depth - 1) for operand in node.inputs)
    if node.op_type == "Where":
        return all(_finite(operand, depth - 1) for operand in node.inputs[1:3])
    if node.op_type in ("Cast", "Unsqueeze", "Reshape", "Transpose", "Expand", "Identity", "Not", "Slice"):
        if node.op_type in ("Cast", "Not") and _from_integers(node.inputs[0]):
            return True
        return _finite(node.inputs[0], depth - 1)
    return False


def _from_integers(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and not value.dtype.is_floating_point()


class PackSharedInput(NamedTuple):
    """MatMuls of one tensor with constant weights (query, key, value) -> one MatMul and a Split."""

    name: str = "packed-qkv"
    roots: frozenset[str] = frozenset({"MatMul"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        source = node.inputs[0]
        if source is None or not _is_projection(node, node):
            return False
        group = [use.node for use in source.uses() if use.idx == 0 and _is_projection(use.node, node)]
        group = list(dict.fromkeys(group))
        if len(group) < 2 or group[0] is not node:
            return False
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
