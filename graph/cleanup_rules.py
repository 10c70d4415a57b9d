"""Exact rewrite rules: what exporters leave behind, in the form that computes the same with less."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from .broadcast_rules import AlwaysTrue, GatherWholeMask, NeedlessExpand, SliceOfPositions
from .edit import (
    Editor,
    axes_of,
    int_attribute,
    integers,
    operand,
    permutation,
    producer,
    rank,
    scalar,
    small_constant,
    split_constant,
    static_dim,
)
from .rewrite import Refused, Rule, Verdict
from .symbolic import Term, axis_terms, reshape_terms, size_terms

_FULL_SLICE_END = (1 << 31) - 1
_SPLIT_INPUT_OPSET = 13


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


class SplitWithoutSequence(NamedTuple):
    """SplitToSequence whose parts are picked by constant positions -> Split.

    The form in which torch exports `split` and `chunk`; the runtime copies every part of a sequence.
    """

    name: str = "split-without-sequence"
    roots: frozenset[str] = frozenset({"SplitToSequence"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        source, axis = node.inputs[0], int_attribute(node, "axis", 0)
        sizes = _split_sizes(node, static_dim(source, axis))
        if source is None or sizes is None:
            return Refused("the sizes of the parts are not known")
        picks = [(use.node, scalar(operand(use.node, 1))) for use in node.outputs[0].uses()]
        if node.outputs[0].is_graph_output() or not all(
            reader.op_type == "SequenceAt"
            and reader.graph is node.graph
            and place is not None
            and -len(sizes) <= place < len(sizes)
            for reader, place in picks
        ):
            return Refused("the sequence is used as a whole")
        parts = _split(node, source, axis, sizes, editor)
        for reader, place in picks:
            editor.replace(reader.outputs[0], parts[int(place or 0)])
        return True


def _split_sizes(node: ir.Node, length: int | None) -> list[int] | None:
    split = small_constant(operand(node, 1))
    if split is None or split.ndim > 1 or split.dtype.kind not in "iu":
        return None
    if split.ndim:
        return [int(size) for size in split]
    size = int(split.item())
    if length is None or size <= 0:
        return None
    return [min(size, length - start) for start in range(0, length, size)]


def _split(
    node: ir.Node, source: ir.Value, axis: int, sizes: list[int], editor: Editor
) -> Sequence[ir.Value]:
    """A Split into parts of these sizes, in the form of the model's operator set."""
    assert node.graph is not None
    stem = node.outputs[0].name or "parts"
    inputs: list[ir.Value | None] = [source]
    attributes: dict[str, int | list[int]] = {"axis": axis}
    if editor.model.opset >= _SPLIT_INPUT_OPSET:
        inputs.append(editor.constant(np.array(sizes, np.int64), "sizes", node.graph))
    else:
        attributes["split"] = sizes
    made = editor.node("Split", inputs, attributes, before=node, stem=stem, outputs=len(sizes))
    for part in made.outputs:
        part.type = copy.copy(source.type)
    return made.outputs


EXACT_RULES: tuple[Rule, ...] = (
    NoOpArithmetic(),
    FullSlice(),
    NoOpTranspose(),
    ShapeRoundTrip(),
    MergeUnsqueeze(),
    SwapLastTwo(),
    NoOpReshape(),
    SplitWithoutSequence(),
    AlwaysTrue(),
    NeedlessExpand(),
    GatherWholeMask(),
    SliceOfPositions(),
)
