"""The operands of com.microsoft.MultiHeadAttention, laid out in front of the attention that it replaces."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import Attributes, Editor, permutation, producer, rank
from ...graph.symbolic import Term, axis_terms

AXES = 4
HEADS_FIRST = [0, 2, 1, 3]
_KEYS_FIRST = [0, 2, 3, 1]
_SWAP_LAST = [0, 1, 3, 2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One attention: q [batch, heads, S, D], k [batch, heads, D, L], v [batch, heads, L, E].

    `terms` are what the scores are added to, or masked by, front to back.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    terms: tuple[Mask | ir.Value, ...]


class Mask(NamedTuple):
    """Where(condition, low, scores), or Where(condition, scores, low) if `inverted`."""

    condition: ir.Value
    low: ir.Value
    inverted: bool


class Operands:
    """Lays the operands of one attention out as the operator wants them, in front of one node."""

    def __init__(self, node: ir.Node, editor: Editor) -> None:
        self._node, self._editor = node, editor
        self._graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
        self._stem = node.outputs[0].name or "attention"

    def tokens(self, value: ir.Value, *, transposed: bool = False) -> ir.Value:
        """[batch, heads, L, D] (its last two axes swapped, if `transposed`) as [batch, L, heads * D]."""
        turned = producer(value, "Transpose")
        order = permutation(turned) if turned is not None else None
        split = turned.inputs[0] if turned is not None else None
        if transposed and order == _SWAP_LAST and split is not None:
            return self.tokens(split)
        if order != (_KEYS_FIRST if transposed else HEADS_FIRST) or split is None:
            order = [0, 3, 1, 2] if transposed else HEADS_FIRST
            split = self._value("Transpose", [value], {"perm": order}, like=value, order=order)
        axes = axis_terms(split)
        assert axes is not None
        assert split.shape is not None
        sizes = [term for term in axes[2:] if isinstance(term, int)]
        width = sizes[0] * sizes[1] if len(sizes) == 2 else None
        joined = producer(split, "Reshape")
        if joined is not None and axis_terms(joined.inputs[0]) == [*axes[:2], width]:
            assert joined.inputs[0] is not None
            return joined.inputs[0]
        target = self._editor.constant(np.array([0, 0, width or -1], np.int64), "sizes", self._graph)
        flat = self._value("Reshape", [split, target], {}, like=split)
        flat.shape = ir.Shape([split.shape[0], split.shape[1], width])
        return flat

    def bias(self, block: Block, query: ir.Value, key: ir.Value) -> ir.Value | None:
        """All that is added to the scores as one [1 or batch, 1 or heads, S, L], or None."""
        total: ir.Value | None = None
        for term in block.terms:
            if isinstance(term, Mask):
                total = self._under_mask(term, total)
            else:
                total = term if total is None else self._joint("Add", [total, term], (total, term))
        if total is None:
            return None
        if rank(total) != AXES:
            missing = AXES - (rank(total) or 0)
            axes = self._editor.constant(np.arange(missing, dtype=np.int64), "axes", self._graph)
            wider = self._value("Unsqueeze", [total, axes], {}, like=total)
            wider.shape = None if total.shape is None else ir.Shape([1] * missing + list(total.shape))
            total = wider
        return self._for_all_rows(total, block, query, key)

    def _under_mask(self, mask: Mask, below: ir.Value | None) -> ir.Value:
        if below is None:
            below = self._editor.constant(np.array(0.0, np.float32), "zero", self._graph)
        sides = [below, mask.low] if mask.inverted else [mask.low, below]
        return self._joint("Where", [mask.condition, *sides], (mask.condition, below))

    def _for_all_rows(self, bias: ir.Value, block: Block, query: ir.Value, key: ir.Value) -> ir.Value:
        """The operator broadcasts the first two axes only."""
        axes, scores = axis_terms(bias), axis_terms(block.query)
        keys = axis_terms(block.key)
        assert axes is not None
        assert scores is not None
        assert keys is not None
        if axes[2:] == [scores[2], keys[3]]:
            return bias
        one = self._editor.constant(np.array([1, 1], np.int64), "ones", self._graph)
        sizes = self._value(
            "Concat", [one, self._size(scores[2], query), self._size(keys[3], key)], {"axis": 0}
        )
        sizes.shape, sizes.type = ir.Shape([AXES]), ir.TensorType(ir.DataType.INT64)
        wide = self._value("Expand", [bias, sizes], {}, like=bias)
        if bias.shape is not None and block.query.shape is not None and block.key.shape is not None:
            wide.shape = ir.Shape([*list(bias.shape)[:2], block.query.shape[2], block.key.shape[3]])
        return wide

    def _size(self, term: Term, tokens: ir.Value) -> ir.Value:
        """A vector of the one size; from an input of the graph if that has it, so that layers share it."""
        if isinstance(term, int):
            return self._editor.constant(np.array([term], np.int64), "size", self._graph)
        for source in self._graph.inputs:
            axes = axis_terms(source) or []
            if term in axes:
                return self._shape_of(source, axes.index(term))
        return self._shape_of(tokens, 1)

    def _shape_of(self, value: ir.Value, axis: int) -> ir.Value:
        size = self._value("Shape", [value], {"start": axis, "end": axis + 1})
        size.shape, size.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
        return size

    def _joint(self, op_type: str, inputs: list[ir.Value], shaped: tuple[ir.Value, ir.Value]) -> ir.Value:
        """A float node of two operands that broadcast to each other."""
        value = self._value(op_type, inputs, {})
        value.type = ir.TensorType(ir.DataType.FLOAT)
        first, second = (list(item.shape) if item.shape is not None else [] for item in shaped)
        size = max(len(first), len(second))
        pairs = zip([1] * (size - len(first)) + first, [1] * (size - len(second)) + second, strict=True)
        value.shape = ir.Shape([right if left == 1 else left for left, right in pairs])
        return value

    def _value(
        self,
        op_type: str,
        inputs: list[ir.Value],
        attributes: Attributes,
        *,
        like: ir.Value | None = None,
        order: list[int] | None = None,
    ) -> ir.Value:
        value = self._editor.value(
            op_type, inputs, attributes, before=self._node, stem=f"{self._stem}/{op_type.lower()}", like=like
        )
        if order is not None and value.shape is not None:
            value.shape = ir.Shape([value.shape[axis] for axis in order])
        return value
