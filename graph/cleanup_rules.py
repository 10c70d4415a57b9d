"""Exact rewrite rules: what exporters leave behind, in the form that computes the same with less."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from .edit import (
    Editor,
    axes_of,
    int_attribute,
    integers,
    is_constant,
    permutation,
    producer,
    rank,
    scalar,
    small_constant,
    split_constant,
)
from .rewrite import Refused, Rule, Verdict
from .symbolic import Term, axis_terms, size_terms, starts_at_zero, unsqueezed_axis

_FULL_SLICE_END = (1 << 31) - 1


class NoOpArithmetic(NamedTuple):
    """x + 0, x - 0, x * 1, x / 1 -> x (the constant is one number and does not broadcast x)."""

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
        if len(node.inputs) < 3 or node.inputs[0] is None:
            return False
        starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
        steps = integers(node.inputs[4]) if len(node.inputs) > 4 else [1]
        if starts is None or ends is None or steps is None:
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
        wanted = integers(node.inputs[1]) if node.op_type == "Reshape" else axes_of(node)
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
        axes, flattened, target = axis_terms(source), size_terms(flat.inputs[1]), size_terms(node.inputs[1])
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
        source, target = axis_terms(node.inputs[0]), size_terms(node.inputs[1])
        if source is None or target is None or node.inputs[0] is None:
            return False
        if not int_attribute(node, "allowzero", 0):
            target = [
                source[place] if term == 0 and place < len(source) else term
                for place, term in enumerate(target)
            ]
        if not _equal_but_one_rest(target, source):
            return False
        editor.replace(node.outputs[0], node.inputs[0])
        return True


class AlwaysTrue(NamedTuple):
    """And with something that is true everywhere -> the other operand.

    Range(0, n) >= 0 is such a condition; exports of bidirectional attention masks carry it.
    """

    name: str = "always-true"
    roots: frozenset[str] = frozenset({"And"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        for truth, other in ((0, 1), (1, 0)):
            kept = node.inputs[other]
            if kept is None or not _is_true(node.inputs[truth]):
                continue
            return _replace_by_broadcast_source(node, kept, editor)
        return False


def _is_true(value: ir.Value | None) -> bool:
    known = small_constant(value)
    if known is not None:
        return known.dtype == np.bool_ and bool(known.all())
    node = producer(value, "GreaterOrEqual", "And")
    if node is None:
        return False
    if node.op_type == "And":
        return _is_true(node.inputs[0]) and _is_true(node.inputs[1])
    return scalar(node.inputs[1]) == 0.0 and starts_at_zero(node.inputs[0])


class NeedlessExpand(NamedTuple):
    """An Expand whose readers broadcast anyway -> its input."""

    name: str = "needless-expand"
    roots: frozenset[str] = frozenset({"Expand"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        source = node.inputs[0]
        if source is None or is_constant(source):
            return False
        return _replace_by_broadcast_source(node, source, editor)


def _replace_by_broadcast_source(node: ir.Node, source: ir.Value, editor: Editor) -> Verdict:
    """Replace a broadcast result by what was broadcast, if no reader can tell."""
    result = node.outputs[0]
    wide, narrow = axis_terms(result), axis_terms(source)
    if wide is None or narrow is None or len(narrow) > len(wide):
        return Refused("the shapes are not known")
    if wide == narrow:
        editor.replace(result, source)
        return True
    readers = _broadcast_readers(result, wide)
    if readers is None:
        return Refused("a reader needs the broadcast shape")
    editor.replace(result, source)
    for reader in readers:
        _refresh_shape(reader)
    return True


_ELEMENTWISE = frozenset({"And", "Or", "Where", "Add", "Sub", "Mul", "Div", "Max", "Min", "Not", "Cast"})


def _broadcast_readers(value: ir.Value, wide: list[Term]) -> list[ir.Node] | None:
    """Element-wise nodes from `value` up to where another operand has all of the axes `wide`.

    None if some path ends in a reader that would see the narrower shape.
    """
    if value.is_graph_output():
        return None
    readers: list[ir.Node] = []
    for use in value.uses():
        node = use.node
        if node.op_type not in _ELEMENTWISE or node.domain:
            return None
        others = [axis_terms(other) for other in node.inputs if other is not value]
        if any(other is not None and _covers(other, wide) for other in others):
            continue
        further = _broadcast_readers(node.outputs[0], wide)
        if further is None:
            return None
        readers += [node, *further]
    return readers


def _covers(axes: list[Term], wide: list[Term]) -> bool:
    if len(axes) < len(wide):
        return False
    return all(term in (1, own) for term, own in zip(wide[::-1], axes[::-1], strict=False))


def _refresh_shape(node: ir.Node) -> None:
    """Recompute the broadcast shape of an element-wise node's output; unknown if in doubt."""
    shapes = [value.shape for value in node.inputs if value is not None]
    output = node.outputs[0]
    if any(shape is None for shape in shapes):
        output.shape = None
        return
    size = max(len(shape) for shape in shapes if shape is not None)
    dims: list[int | ir.SymbolicDim] = []
    for place in range(size):
        candidates = [
            shape[len(shape) - size + place]
            for shape in shapes
            if shape is not None and len(shape) - size + place >= 0
        ]
        wide = [dim for dim in candidates if dim != 1]
        dims.append(wide[0] if wide else 1)
    output.shape = ir.Shape(dims)


class GatherWholeMask(NamedTuple):
    """GatherND of a tensor at (0..m, 0..n) indices laid out on other axes -> Unsqueeze.

    What `torch.vmap` over mask functions leaves behind in exports of transformer masks.
    """

    name: str = "gather-whole-mask"
    roots: frozenset[str] = frozenset({"GatherND"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        source, indices = node.inputs[0], producer(node.inputs[1], "Concat")
        axes = axis_terms(source)
        if source is None or indices is None or axes is None or node.graph is None:
            return False
        if int_attribute(node, "batch_dims", 0) != 0 or len(indices.inputs) != len(axes):
            return False
        places, size = [], None
        for part, axis_term in zip(indices.inputs, axes, strict=True):
            place = _range_place(part)
            if place is None:
                return Refused("the indices are not plain ranges")
            length, where, part_rank = place
            if length != axis_term:
                return Refused("a range does not cover its axis")
            if size not in (None, part_rank):
                return Refused("the index parts have different ranks")
            size = part_rank
            places.append(where)
        if size is None or places != sorted(set(places)):
            return Refused("the axes are transposed by the indices")
        added = [axis for axis in range(size) if axis not in places]
        unsqueeze = editor.constant(np.array(added, np.int64), "axes", node.graph)
        stem = node.outputs[0].name or "mask"
        result = editor.value("Unsqueeze", [source, unsqueeze], before=node, stem=stem, dtype=source.dtype)
        assert source.shape is not None
        result.shape = ir.Shape(
            [source.shape[places.index(axis)] if axis in places else 1 for axis in range(size)]
        )
        editor.replace(node.outputs[0], result)
        return True


def _range_place(value: ir.Value | None) -> tuple[Term, int, int] | None:
    """(length, axis, rank) of an index part: a Range along one axis, expanded, unsqueezed at the end."""
    last = producer(value, "Unsqueeze")
    expand = producer(last.inputs[0], "Expand") if last is not None else None
    if last is None or expand is None or axes_of(last) not in ([-1], [rank(last.inputs[0])]):
        return None
    vector = unsqueezed_axis(expand.inputs[0])
    if vector is None or not starts_at_zero(vector[0]):
        return None
    source = producer(vector[0], "Range")
    length = size_terms(source.inputs[1]) if source is not None else None
    return None if length is None or len(length) != 1 else (length[0], vector[1], vector[2])


class SliceOfPositions(NamedTuple):
    """Gather of rows 0..n of a table -> Slice of the table (position embeddings)."""

    name: str = "slice-of-positions"
    roots: frozenset[str] = frozenset({"Gather"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        table, cut = node.inputs[0], producer(node.inputs[1], "Slice")
        if cut is None or table is None or int_attribute(node, "axis", 0) != 0 or not is_constant(table):
            return False
        positions = small_constant(cut.inputs[0], 1 << 16)
        if positions is None or positions.ndim != 2 or positions.shape[0] != 1 or rank(table) != 2:
            return False
        if not np.array_equal(positions[0], np.arange(positions.shape[1])) or node.graph is None:
            return False
        starts, axes = integers(cut.inputs[1]), integers(cut.inputs[3]) if len(cut.inputs) > 3 else None
        steps = integers(cut.inputs[4]) if len(cut.inputs) > 4 else [1]
        if starts is None or len(starts) != 1 or starts[0] < 0 or axes not in ([1], [-1]) or steps != [1]:
            return Refused("the positions are not one plain range")
        if table.shape is None or table.shape[0] != positions.shape[1]:
            return Refused("the table has other rows than the positions")
        first_axis = editor.constant(np.array([0], np.int64), "axes", node.graph)
        stem = node.outputs[0].name or "positions"
        rows = editor.value(
            "Slice",
            [table, cut.inputs[1], cut.inputs[2], first_axis],
            before=node,
            stem=stem,
            dtype=table.dtype,
        )
        result = editor.value("Unsqueeze", [rows, first_axis], before=node, stem=stem, like=node.outputs[0])
        editor.replace(node.outputs[0], result)
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
