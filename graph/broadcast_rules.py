"""Exact rewrite rules for masks and positions: what exporters of attention write around a broadcast."""

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
    operand,
    producer,
    rank,
    scalar,
    small_constant,
)
from .rewrite import Refused, Verdict
from .symbolic import Term, axis_terms, scalar_term, starts_at_zero, unsqueezed_axis

_ELEMENTWISE = frozenset({"And", "Or", "Where", "Add", "Sub", "Mul", "Div", "Max", "Min", "Not", "Cast"})
# Operator sets before 7 align operands by an `axis` attribute instead of from the right.
_OLD_ALIGNMENT = ("axis", "broadcast")
_UNSQUEEZE_INPUT_OPSET = 13
# A narrower value is followed through this many readers; further ones are never worth it.
_MOST_READERS = 64
_MOST_POSITIONS = 1 << 16


class AlwaysTrue(NamedTuple):
    """And with something that is true everywhere -> the other operand.

    Range(0, n) >= 0 is such a condition; exports of bidirectional attention masks carry it.
    """

    name: str = "always-true"
    roots: frozenset[str] = frozenset({"And"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        if any(name in node.attributes for name in _OLD_ALIGNMENT):
            return False
        for truth, other in ((0, 1), (1, 0)):
            kept = node.inputs[other]
            if kept is not None and _is_true(node.inputs[truth]):
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
    return scalar(node.inputs[1]) == 0.0 and starts_at_zero(node.inputs[0]) is not None


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
    readers = _narrowed_by(node.outputs[0], axis_terms(source))
    if isinstance(readers, Refused):
        return readers
    editor.replace(node.outputs[0], source)
    _refresh_shapes(readers)
    return True


def _narrowed_by(result: ir.Value, narrow: list[Term] | None) -> list[ir.Node] | Refused:
    """The element-wise nodes that would see a narrower shape too, if `result` had the axes `narrow`.

    Refused if some reader outside of them could tell: `narrow` must broadcast to the shape of
    `result`, and every path of readers must reach another operand that has all of its axes.
    """
    wide = axis_terms(result)
    if wide is None or narrow is None or len(narrow) > len(wide):
        return Refused("the shapes are not known")
    if wide == narrow:
        return []
    narrowed: dict[ir.Value, ir.Node | None] = {result: None}
    pending, covered = [result], list[ir.Node]()
    while pending:
        value = pending.pop()
        if value.is_graph_output() or len(narrowed) > _MOST_READERS:
            return Refused("a reader needs the broadcast shape")
        covered += [use.node for use in value.uses()]
        for reader in tuple(covered):  # all again: what covered a reader may be narrow itself by now
            if reader.outputs[0] in narrowed:
                continue
            if not _is_plain_elementwise(reader, result):
                return Refused("a reader needs the broadcast shape")
            others = [axis_terms(item) for item in reader.inputs if item not in narrowed]
            if not any(other is not None and _covers(other, wide) for other in others):
                narrowed[reader.outputs[0]] = reader
                pending.append(reader.outputs[0])
    return [reader for reader in narrowed.values() if reader is not None]


def _is_plain_elementwise(reader: ir.Node, beside: ir.Value) -> bool:
    maker = beside.producer()
    if reader.op_type not in _ELEMENTWISE or reader.domain or maker is None:
        return False
    return reader.graph is maker.graph and not any(name in reader.attributes for name in _OLD_ALIGNMENT)


def _covers(axes: list[Term], wide: list[Term]) -> bool:
    if len(axes) < len(wide):
        return False
    return all(term in (1, own) for term, own in zip(wide[::-1], axes[::-1], strict=False))


def _refresh_shapes(readers: list[ir.Node]) -> None:
    """Recompute the broadcast shapes of element-wise nodes, each after the ones that it reads."""
    waiting = {reader.outputs[0]: reader for reader in readers}
    while waiting:
        for value, reader in tuple(waiting.items()):
            if not any(item in waiting for item in reader.inputs):
                value.shape = _broadcast_shape(reader)
                del waiting[value]


def _broadcast_shape(node: ir.Node) -> ir.Shape | None:
    shapes = [value.shape for value in node.inputs if value is not None]
    known: list[list[int | ir.SymbolicDim]] = [list(shape) for shape in shapes if shape is not None]
    if len(known) != len(shapes):
        return None
    size = max(len(shape) for shape in known)
    columns = zip(*([*[1] * (size - len(shape)), *shape] for shape in known), strict=True)
    return ir.Shape([_broadcast_dim(column) for column in columns])


def _broadcast_dim(column: tuple[int | ir.SymbolicDim, ...]) -> int | ir.SymbolicDim | None:
    """The common size of one axis; None (unknown) where a dynamic axis may or may not be 1."""
    wide = [dim for dim in column if dim != 1]
    fixed = [dim for dim in wide if isinstance(dim, int)]
    if fixed or not wide:
        return fixed[0] if fixed else 1
    return wide[0] if all(dim == wide[0] for dim in wide) else None


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
        if source is None or indices is None or axes is None or int_attribute(node, "batch_dims", 0):
            return False
        if len(indices.inputs) != len(axes):
            return False
        if int_attribute(indices, "axis", 0) not in (-1, (rank(node.inputs[1]) or 0) - 1):
            return Refused("the indices are not joined on their last axis")
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
        return _unsqueeze_mask(node, source, places, size, editor)


def _unsqueeze_mask(node: ir.Node, source: ir.Value, places: list[int], size: int, editor: Editor) -> Verdict:
    assert source.shape is not None
    shape = ir.Shape([source.shape[places.index(axis)] if axis in places else 1 for axis in range(size)])
    terms = axis_terms(source) or []
    narrow = [terms[places.index(axis)] if axis in places else 1 for axis in range(size)]
    readers = _narrowed_by(node.outputs[0], narrow)  # the indices may be expanded along further axes
    if isinstance(readers, Refused):
        return readers
    added = [axis for axis in range(size) if axis not in places]
    result = _unsqueeze(source, added, node, editor, "mask")
    result.shape = shape
    editor.replace(node.outputs[0], result)
    _refresh_shapes(readers)
    return True


def _unsqueeze(source: ir.Value, axes: list[int], before: ir.Node, editor: Editor, word: str) -> ir.Value:
    """Unsqueeze of `source`, in the form of the model's operator set."""
    assert before.graph is not None
    stem = before.outputs[0].name or word
    if editor.model.opset < _UNSQUEEZE_INPUT_OPSET:
        return editor.value(
            "Unsqueeze", [source], {"axes": axes}, before=before, stem=stem, dtype=source.dtype
        )
    where = editor.constant(np.array(axes, np.int64), "axes", before.graph)
    return editor.value("Unsqueeze", [source, where], before=before, stem=stem, dtype=source.dtype)


def _range_place(value: ir.Value | None) -> tuple[Term, int, int] | None:
    """(length, axis, rank) of an index part: a Range along one axis, expanded, unsqueezed at the end."""
    last = producer(value, "Unsqueeze")
    expand = producer(last.inputs[0], "Expand") if last is not None else None
    if last is None or expand is None or axes_of(last) not in ([-1], [rank(last.inputs[0])]):
        return None
    vector = unsqueezed_axis(expand.inputs[0])
    source = starts_at_zero(vector[0]) if vector is not None else None
    if vector is None or source is None:
        return None
    length = scalar_term(source.inputs[1])
    return None if length is None else (length, vector[1], vector[2])


class SliceOfPositions(NamedTuple):
    """Gather of rows 0..n of a table -> Slice of the table (position embeddings)."""

    name: str = "slice-of-positions"
    roots: frozenset[str] = frozenset({"Gather"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        table, cut = node.inputs[0], producer(node.inputs[1], "Slice")
        if cut is None or table is None or int_attribute(node, "axis", 0) != 0 or not is_constant(table):
            return False
        positions = small_constant(cut.inputs[0], _MOST_POSITIONS)
        if positions is None or positions.ndim != 2 or positions.shape[0] != 1 or rank(table) != 2:
            return False
        if not np.array_equal(positions[0], np.arange(positions.shape[1])):
            return False
        starts, axes = integers(operand(cut, 1)), integers(operand(cut, 3))
        steps = [1] if operand(cut, 4) is None else integers(operand(cut, 4))
        if starts is None or len(starts) != 1 or axes not in ([1], [-1]) or steps != [1]:
            return Refused("the positions are not one plain range")
        if table.shape is None or table.shape[0] != positions.shape[1]:
            return Refused("the table has other rows than the positions")
        rows = _sliced_rows(table, cut, node, editor)
        result = _unsqueeze(rows, [0], node, editor, "positions")
        editor.replace(node.outputs[0], result)
        return True


def _sliced_rows(table: ir.Value, cut: ir.Node, before: ir.Node, editor: Editor) -> ir.Value:
    starts, ends = cut.inputs[1], cut.inputs[2]
    assert before.graph is not None
    assert starts is not None
    # All of Slice's integers have one type.
    axis = editor.constant(np.zeros(1, (starts.dtype or ir.DataType.INT64).numpy()), "axes", before.graph)
    stem = before.outputs[0].name or "positions"
    return editor.value("Slice", [table, starts, ends, axis], before=before, stem=stem, dtype=table.dtype)
