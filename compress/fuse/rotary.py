"""Rotary position embedding as one operator of onnxruntime, where a target computes that faster."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import (
    Editor,
    axes_of,
    int_attribute,
    integers,
    only_use,
    operand,
    producer,
    rank,
    small_constant,
    static_dim,
)
from ...graph.rewrite import Refused, Verdict
from ...graph.symbolic import axis_terms
from .polynomial import number

_AXES = 4
_STEPS = 12
_LARGEST_TABLE = 1 << 20
_SQUEEZE_OPSET = 13


class FuseRotary(NamedTuple):
    """x * cos + concat(-right half of x, left half) * sin -> com.microsoft.RotaryEmbedding.

    x is [batch, heads, length, width]; cos and sin are [1, 1, length, width] and hold each angle twice, as
    Llama's do. Off unless the target computes it faster: `runtime_ops.RotaryEmbedding` of the profiles.
    Source: Su et al. 2021, arXiv:2104.09864, equation 34 (halves in place of neighbours).
    """

    name: str = "rotary"
    roots: frozenset[str] = frozenset({"Add"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        found = _rotation(node)
        if found is None:
            return False
        source, cos, sin, inner = found
        result, width = node.outputs[0], static_dim(source, -1)
        if source.dtype != ir.DataType.FLOAT or rank(source) != _AXES or width is None:
            return Refused("x is not known to be float32 of four axes, the last one fixed")
        if any(only_use(value) is None for value in inner):
            return Refused("a part of the sum is also used elsewhere")
        axes = axis_terms(source)
        if axes is None or any(axis_terms(value) != [1, 1, axes[2], width] for value in (cos, sin)):
            return Refused("cos and sin differ between samples or heads, or their shapes are not known")
        if not (_holds_twice(cos) and _holds_twice(sin)):
            return Refused("cos or sin does not hold each angle twice")
        if editor.model.opset < _SQUEEZE_OPSET:
            return Refused(f"it needs operator set {_SQUEEZE_OPSET}, the model has {editor.model.opset}")
        tables = [_table(value, width, node, editor) for value in (cos, sin)]
        graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
        first = editor.constant(np.array([0], np.int64), "first", graph)
        rotated = editor.value(
            "RotaryEmbedding",
            [source, first, *tables],
            {"interleaved": 0},
            before=node,
            stem=result.name or "rotated",
            like=result,
            domain="com.microsoft",
        )
        editor.replace(result, rotated)
        return True


def _rotation(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, list[ir.Value]] | None:
    """(x, cos, sin, values in between) if `node` is x * cos + rotated(x) * sin."""
    for plain, turned in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        straight, crossed = producer(plain, "Mul"), producer(turned, "Mul")
        if straight is None or crossed is None or plain is None or turned is None:
            continue
        for place in (0, 1):
            joined, sin = producer(crossed.inputs[place], "Concat"), crossed.inputs[1 - place]
            source = _halves_of(joined) if joined is not None else None
            if source is None or joined is None or sin is None or source not in straight.inputs:
                continue
            cos = straight.inputs[1 - straight.inputs.index(source)]
            if cos is not None and cos is not source:
                return source, cos, sin, [plain, turned, joined.outputs[0]]
    return None


def _halves_of(joined: ir.Node) -> ir.Value | None:
    """x, if a Concat of the last axis is (-right half of x, left half of x)."""
    size = rank(joined.outputs[0])
    if len(joined.inputs) != 2 or size is None or int_attribute(joined, "axis", 0) not in (-1, size - 1):
        return None
    negated = producer(joined.inputs[0], "Neg")
    if negated is None:
        return None
    right, left = _half(negated.inputs[0]), _half(joined.inputs[1])
    if right is None or left is None or right[0] is not left[0]:
        return None
    return right[0] if (right[1], left[1]) == (1, 0) else None


def _half(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(x, 0 or 1) if `value` is the left or right half of the last axis of x (Slice or Split)."""
    node = producer(value, "Slice", "Split")
    source = None if node is None else node.inputs[0]
    width, size = static_dim(source, -1), rank(source)
    if node is None or source is None or width is None or size is None or width % 2:
        return None
    if node.op_type == "Split":
        last = int_attribute(node, "axis", 0) in (-1, size - 1)
        even = len(node.outputs) == 2 and all(static_dim(part, -1) == width // 2 for part in node.outputs)
        return (source, int(node.outputs[1] is value)) if last and even else None
    starts, ends = integers(operand(node, 1)), integers(operand(node, 2))
    axes, steps = integers(operand(node, 3)), integers(operand(node, 4))
    if axes not in ([-1], [size - 1]) or steps not in (None, [1]) or (steps is None and operand(node, 4)):
        return None
    if starts is None or ends is None:
        return None
    if starts[0] == 0 and ends[0] in (width // 2, -(width // 2)):
        return source, 0
    right = starts[0] in (width // 2, -(width // 2)) and ends[0] >= width
    return (source, 1) if right else None


def _holds_twice(value: ir.Value | None) -> bool:
    """Whether both halves of the last axis are equal: Concat(a, a), then what acts on each number alone."""
    for _ in range(_STEPS):
        array = small_constant(value, _LARGEST_TABLE)
        if array is not None:
            middle = array.shape[-1] // 2
            return array.shape[-1] % 2 == 0 and np.array_equal(array[..., :middle], array[..., middle:])
        node, size = producer(value), rank(value)
        if node is None or size is None:
            return False
        if node.op_type == "Concat":
            last = int_attribute(node, "axis", 0) in (-1, size - 1)
            return last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        if node.op_type in ("Unsqueeze", "Squeeze"):
            axes = axes_of(node)
            wide = size if node.op_type == "Unsqueeze" else rank(node.inputs[0])
            if axes is None or wide is None or any(axis in (-1, wide - 1) for axis in axes):
                return False
        elif node.op_type == "Mul":
            if number(node.inputs[1]) is None:
                return False
        elif node.op_type not in ("Cos", "Sin", "Identity", "Cast"):
            return False
        value = node.inputs[0]
    return False


def _table(value: ir.Value, width: int, node: ir.Node, editor: Editor) -> ir.Value:
    """[length, width / 2] of [1, 1, length, width]; computed once for all layers."""
    graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
    assert value.shape is not None
    ends = [editor.constant(np.array([end], np.int64), "end", graph) for end in (0, width // 2, -1)]
    half = editor.value("Slice", [value, *ends], before=node, stem=f"{value.name}/half", like=value)
    half.shape = ir.Shape([1, 1, value.shape[2], width // 2])
    axes = editor.constant(np.array([0, 1], np.int64), "axes", graph)
    table = editor.value("Squeeze", [half, axes], before=node, stem=f"{value.name}/table", like=value)
    table.shape = ir.Shape([value.shape[2], width // 2])
    return table
