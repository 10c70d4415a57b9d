"""Exact rewrite rules: what exporters leave behind, in the form that computes the same with less."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from .broadcast_rules import AlwaysTrue, GatherWholeMask, NeedlessExpand, SliceOfPositions
from .edit import (
    Editor,
    axes_of,
    integers,
    operand,
    permutation,
    producer,
    rank,
    scalar,
    split_constant,
)
from .rewrite import Refused, Rule, Verdict
from .symbolic import Term, axis_terms, reshape_terms, size_terms

_FULL_SLICE_END = (1 << 31) - 1


class NoOpArithmetic(NamedTuple):
    """x + 0, x - 0, x * 1, x / 1 -> x (the constant is one number and does not broadcast x).

    Exact but for one sign: -0.0 + 0.0 is 0.0, and stays -0.0 here.
    """

    name: str = "no-op-arithmetic"
    roots: frozenset[str] = frozenset({"Add", "Sub", "Mul", "Div"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        pair = split_constant(node)
        if pair is None:
            return False
        kept, number = pair
        neutral = 0.0 if node.op_type in ("Add", "Sub") else 1.0
        if scalar(number) != neutral or (node.op_type in ("Sub", "Div") and node.inputs[1] is not number):
            return False
        size, number_rank = rank(kept), rank(number)
        if size is None or number_rank is None or number_rank > size:
            return False
        editor.replace(node.outputs[0], kept)
        return True


class FullSlice(NamedTuple):
    """A Slice that takes everything along all its axes -> its input."""

    name: str = "full-slice"
    roots: frozenset[str] = frozenset({"Slice"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        starts, ends = integers(operand(node, 1)), integers(operand(node, 2))
        steps = [1] if operand(node, 4) is None else integers(operand(node, 4))
        if node.inputs[0] is None or starts is None or ends is None or steps is None:
            return False
        if any(starts) or any(end < _FULL_SLICE_END for end in ends) or any(step != 1 for step in steps):
            return False
        editor.replace(node.outputs[0], node.inputs[0])
        return True


class NoOpTranspose(NamedTuple):
    """Transpose that keeps the order -> its input; Transpose of a Transpose -> one Transpose."""

    name: str = "transpose"
    roots: frozenset[str] = frozenset({"Transpose"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        source, perm = node.inputs[0], permutation(node)
        if source is None or perm is None:
            return False
        if perm == sorted(perm):
            editor.replace(node.outputs[0], source)
            return True
        inner = producer(source, "Transpose")
        if inner is None or inner.inputs[0] is None or inner.graph is not node.graph:
            return False
        inner_perm = permutation(inner)
        if inner_perm is None or len(inner_perm) != len(perm):
            return False
        joined = [inner_perm[axis] for axis in perm]
        stem = node.outputs[0].name or "transposed"
        merged = editor.value(
            "Transpose", [inner.inputs[0]], {"perm": joined}, before=node, stem=stem, like=node.outputs[0]
        )
        editor.replace(node.outputs[0], merged)
        return True


class ShapeRoundTrip(NamedTuple):
    """Reshape(Squeeze(Shape[i:i+1]), [-1]) or Unsqueeze of it -> Shape[i:i+1]."""

    name: str = "shape-round-trip"
    roots: frozenset[str] = frozenset({"Reshape", "Unsqueeze"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        wanted = integers(operand(node, 1)) if node.op_type == "Reshape" else axes_of(node)
        expected = ([-1], [1]) if node.op_type == "Reshape" else ([0],)
        squeeze = producer(node.inputs[0], "Squeeze")
        if wanted not in expected or squeeze is None or squeeze.inputs[0] is None:
            return False
        if rank(squeeze.outputs[0]) != 0 or rank(squeeze.inputs[0]) != 1:
            return False
        editor.replace(node.outputs[0], squeeze.inputs[0])
        return True


class MergeUnsqueeze(NamedTuple):
    """Unsqueeze of an Unsqueeze -> one Unsqueeze (known axes and ranks)."""

    name: str = "merge-unsqueeze"
    roots: frozenset[str] = frozenset({"Unsqueeze"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        inner = producer(node.inputs[0], "Unsqueeze")
        if inner is None or inner.inputs[0] is None or node.graph is None or "axes" in node.attributes:
            return False
        first, second = axes_of(inner), axes_of(node)
        size = rank(inner.inputs[0])
        if first is None or second is None or size is None:
            return False
        middle = size + len(first)
        total = middle + len(second)
        outer = sorted(axis % total for axis in second)
        inner_axes = {axis % middle for axis in first}
        places = [axis for axis in range(total) if axis not in outer]
        joined = sorted([*outer, *(places[axis] for axis in inner_axes)])
        axes = editor.constant(np.array(joined, np.int64), "axes", node.graph)
        stem = node.outputs[0].name or "unsqueezed"
        merged = editor.value(
            "Unsqueeze", [inner.inputs[0], axes], before=node, stem=stem, like=node.outputs[0]
        )
        editor.replace(node.outputs[0], merged)
        return True


class SwapLastTwo(NamedTuple):
    """Reshape to [-1, a, b], Transpose(0, 2, 1), Reshape to [..., b, a] -> one Transpose.

    The form in which torch exports `key.transpose(-2, -1)` of scaled dot-product attention.
    """

    name: str = "swap-last-two"
    roots: frozenset[str] = frozenset({"Reshape"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        swap = producer(node.inputs[0], "Transpose")
        flat = producer(swap.inputs[0], "Reshape") if swap is not None else None
        if swap is None or flat is None or permutation(swap) != [0, 2, 1] or flat.inputs[0] is None:
            return False
        source = flat.inputs[0]
        axes = axis_terms(source)
        flattened, target = size_terms(operand(flat, 1)), size_terms(operand(node, 1))
        if axes is None or flattened is None or target is None or len(axes) < 3:
            return Refused("the reshapes around the transpose are not understood")
        swapped_axes = [*axes[:-2], axes[-1], axes[-2]]
        if len(flattened) != 3 or flattened[1:] != axes[-2:]:
            return Refused("the last two axes are regrouped before the transpose")
        if not _equal_but_one_rest(target, swapped_axes):
            return Refused("the axes are regrouped after the transpose")
        order = [*range(len(axes) - 2), len(axes) - 1, len(axes) - 2]
        stem = node.outputs[0].name or "swapped"
        result = editor.value(
            "Transpose", [source], {"perm": order}, before=node, stem=stem, like=node.outputs[0]
        )
        assert source.shape is not None
        result.shape = ir.Shape([source.shape[axis] for axis in order])
        editor.replace(node.outputs[0], result)
        return True


def _equal_but_one_rest(target: list[Term], axes: list[Term]) -> bool:
    """Whether a Reshape target spells `axes`, one of which may be written as -1."""
    if len(target) != len(axes) or target.count(-1) > 1:
        return False
    return all(term in (-1, axis) for term, axis in zip(target, axes, strict=True))


class NoOpReshape(NamedTuple):
    """Reshape to the shape that the tensor has -> its input."""

    name: str = "no-op-reshape"
    roots: frozenset[str] = frozenset({"Reshape"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        source, target = axis_terms(node.inputs[0]), reshape_terms(node)
        if source is None or target is None or node.inputs[0] is None:
            return False
        if not _equal_but_one_rest(target, source):
            return False
        editor.replace(node.outputs[0], node.inputs[0])
        return True


EXACT_RULES: tuple[Rule, ...] = (
    NoOpArithmetic(),
    FullSlice(),
    NoOpTranspose(),
    ShapeRoundTrip(),
    MergeUnsqueeze(),
    SwapLastTwo(),
    NoOpReshape(),
    AlwaysTrue(),
    NeedlessExpand(),
    GatherWholeMask(),
    SliceOfPositions(),
)
