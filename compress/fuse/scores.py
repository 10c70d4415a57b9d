"""Attention scores: factors go into a projection, masks of nothing go, shared biases are summed once."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, is_constant, only_use, producer, rank, scalar, small_constant
from ...graph.rewrite import Refused, Verdict
from ...graph.symbolic import axis_terms, starts_at_zero
from .linear_path import Absorption, is_computed_from_constants, sole_reader
from .polynomial import number

_SMALLEST, _LARGEST = 1e-6, 1e6
_MOST_READERS = 1024
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "GatherElements")


class ScoreScale(NamedTuple):
    """softmax((q s) (k s)^T), softmax(q k^T / sqrt d) and the like -> the factors in a projection's weight.

    A number that multiplies either operand of a product of activations, or the product itself, moves
    along Reshape, Transpose, Split, rotary embedding and whatever else is linear into the weight and bias
    that made the left operand, else the right one; two factors that cannot become one. Exports of
    scaled_dot_product_attention scale queries and keys by d^(-1/4) each.
    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1 (the scale); the product is linear in each.
    """

    name: str = "score-scale"
    roots: frozenset[str] = frozenset({"MatMul"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        if any(value is None or is_constant(value) for value in node.inputs):
            return False
        if node.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        found = [_factor_above(node, place) for place in (0, 1)] + [_factor_below(node.outputs[0])]
        factors = [item for item in found if item is not None]
        if not factors:
            return False
        scale = math.prod(item.scale for item in factors)
        if not _SMALLEST < abs(scale) < _LARGEST:
            return Refused("the factor is 0, or too small or large for float32 weights")
        reasons = []
        for place in (0, 1):
            absorption = Absorption(node, place, passing=frozenset(item.node for item in factors))
            if absorption.found():
                absorption.apply(scale, editor)
                for item in factors:
                    _bypass(item, editor)
                return True
            reasons.append(absorption.reason)
        if found[0] is not None and found[1] is not None:
            _scale_once(found[0], found[1], editor)
            return True
        return Refused(next((reason for reason in reasons if reason), "no linear layer is in front of it"))


class _Factor(NamedTuple):
    """A Mul or Div by a number: the node, which input it scales, and the factor."""

    node: ir.Node
    place: int
    scale: float


def _factor(node: ir.Node | None) -> _Factor | None:
    if node is None or node.op_type not in ("Mul", "Div") or node.domain or len(node.inputs) != 2:
        return None
    by = number(node.inputs[1])
    if by is not None and (node.op_type == "Mul" or by != 0.0):
        factor = _Factor(node, 0, by if node.op_type == "Mul" else 1.0 / by)
    else:
        by = number(node.inputs[0])
        if by is None or node.op_type == "Div":
            return None
        factor = _Factor(node, 1, by)
    scaled = node.inputs[factor.place]
    if scaled is None or is_constant(scaled) or is_computed_from_constants(scaled):
        return None  # the runtime multiplies those when it loads the model
    if rank(scaled) is None or rank(scaled) != rank(node.outputs[0]):
        return None
    return factor


def _factor_above(product: ir.Node, place: int) -> _Factor | None:
    """The factor of an operand of `product`, behind moves that nothing else reads."""
    value = product.inputs[place]
    while value is not None and sole_reader(value) is not None:
        factor = _factor(producer(value))
        if factor is not None:
            return factor if factor.node.graph is product.graph else None
        move = producer(value, *_MOVES)
        value = None if move is None else move.inputs[0]
    return None


def _factor_below(result: ir.Value) -> _Factor | None:
    """The factor of a product, behind moves that nothing else reads."""
    reader = sole_reader(result)
    while reader is not None and reader.op_type in _MOVES and not reader.domain:
        if reader.inputs[0] is not result:
            return None
        result = reader.outputs[0]
        reader = sole_reader(result)
    factor, owner = _factor(reader), result.producer()
    return factor if factor is not None and owner is not None and factor.node.graph is owner.graph else None


def _bypass(factor: _Factor, editor: Editor) -> None:
    scaled = factor.node.inputs[factor.place]
    assert scaled is not None
    editor.replace(factor.node.outputs[0], scaled)


def _scale_once(left: _Factor, right: _Factor, editor: Editor) -> None:
    """One Mul on the left operand in place of one on each."""
    assert left.node.graph is not None
    graph = left.node.graph if isinstance(left.node.graph, ir.Graph) else editor.model.graph
    result = left.node.outputs[0]
    by = editor.constant(np.array(left.scale * right.scale, np.float32), "scale", graph)
    once = editor.value(
        "Mul", [left.node.inputs[left.place], by], before=left.node, stem=result.name or "scaled", like=result
    )
    editor.replace(result, once)
    _bypass(right, editor)


class ZeroMask(NamedTuple):
    """scores + Where(true everywhere, 0, -inf) -> scores.

    Exports of encoders that see all of their input (ViT, BEiT, wav2vec2) carry such masks.
    """

    name: str = "zero-mask"
    roots: frozenset[str] = frozenset({"Add"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        wide = axis_terms(node.outputs[0])
        if node.outputs[0].dtype != ir.DataType.FLOAT or wide is None or len(node.inputs) != 2:
            return False
        for place in (0, 1):
            kept, other = node.inputs[place], node.inputs[1 - place]
            if kept is None or other is None or axis_terms(kept) != wide:
                continue
            if not is_constant(other) and _is_zero(other):
                editor.replace(node.outputs[0], kept)
                return True
            rest = _without_zero(producer(other, "Add"))
            if rest is not None:
                result = node.outputs[0]
                stem = result.name or "masked"
                total = editor.value("Add", [kept, rest], before=node, stem=stem, like=result)
                editor.replace(result, total)
                return True
        return False


def _without_zero(node: ir.Node | None) -> ir.Value | None:
    """The other operand of an Add of zeros."""
    if node is None or len(node.inputs) != 2:
        return None
    for place in (0, 1):
        zero = node.inputs[place]
        if not is_constant(zero) and _is_zero(zero):
            return node.inputs[1 - place]
    return None


_LAYOUTS = ("Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity", "Slice", "Tile")
_LARGEST_MASK = 1 << 20


def _is_zero(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether a float mask is known to hold nothing but zeros."""
    if value is None or depth == 0:
        return False
    known = small_constant(value, _LARGEST_MASK)
    if known is not None:
        return known.dtype.kind == "f" and known.size > 0 and not known.any()
    node = producer(value, "Where", *_LAYOUTS)
    if node is None:
        return False
    if node.op_type == "Where":
        return _is_true(node.inputs[0]) and _is_zero(node.inputs[1], depth - 1)
    return _is_zero(node.inputs[0], depth - 1)


def _is_true(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether a condition is known to be true everywhere."""
    if value is None or depth == 0:
        return False
    known = small_constant(value, _LARGEST_MASK)
    if known is not None:
        return known.dtype == np.bool_ and known.size > 0 and bool(known.all())
    node = producer(value, "And", "GreaterOrEqual", *_LAYOUTS)
    if node is None:
        return False
    if node.op_type == "And":
        return all(_is_true(operand, depth - 1) for operand in node.inputs)
    if node.op_type == "GreaterOrEqual":
        return scalar(node.inputs[1]) == 0.0 and starts_at_zero(node.inputs[0]) is not None
    return _is_true(node.inputs[0], depth - 1)


class SharedBias(NamedTuple):
    """(scores + bias) + mask in every layer -> scores + (bias + mask), the sum computed once.

    T5 and MPNet share one relative position bias between their layers, and one mask. Rounds in another
    order; fires only where two layers or more read the same two.
    """

    name: str = "shared-bias"
    roots: frozenset[str] = frozenset({"Add"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        for outer, inner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            pair = _bias_and_mask(node, outer, inner)
            if pair is None:
                continue
            bias, mask, _ = pair
            group = _readers_of_both(bias, mask, node)
            if len(group) < 2:
                continue
            # The loop visits nodes in order and takes all at once: `node` stands in front of the others.
            total = editor.value("Add", [bias, mask], before=node, stem=f"{mask.name}/shared", like=bias)
            total.shape = _joint_shape(bias, mask)
            for reader, scores in group.items():
                result = reader.outputs[0]
                stem = result.name or "masked"
                editor.replace(
                    result, editor.value("Add", [scores, total], before=reader, stem=stem, like=result)
                )
            return True
        return False


def _bias_and_mask(node: ir.Node, outer: int, inner: int) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(bias, mask, scores) if `node` is (scores + bias) + mask, of the shape of the scores, in this order."""
    if node.op_type != "Add" or node.domain or len(node.inputs) != 2:
        return None
    before, mask = producer(node.inputs[outer], "Add"), node.inputs[1 - outer]
    if before is None or mask is None or is_constant(mask) or before.graph is not node.graph:
        return None
    bias, scores = before.inputs[inner], before.inputs[1 - inner]
    wide = axis_terms(node.outputs[0])
    if bias is None or scores is None or bias is scores or only_use(before.outputs[0]) is not node:
        return None
    if node.outputs[0].dtype != ir.DataType.FLOAT or wide is None or axis_terms(scores) != wide:
        return None
    return bias, mask, scores


def _readers_of_both(bias: ir.Value, mask: ir.Value, like: ir.Node) -> dict[ir.Node, ir.Value]:
    """The nodes that compute (scores + bias) + mask in the graph of `like`, with their scores."""
    found: dict[ir.Node, ir.Value] = {}
    uses = mask.uses()
    for use in uses if len(uses) <= _MOST_READERS else ():
        if use.node.graph is not like.graph or use.node in found:
            continue
        for inner in (0, 1):
            triple = _bias_and_mask(use.node, 1 - use.idx, inner) if use.idx < 2 else None
            if triple is not None and triple[0] is bias:
                found[use.node] = triple[2]
    return found


def _joint_shape(first: ir.Value, second: ir.Value) -> ir.Shape | None:
    """The shape of the sum of two values of known shapes and equal rank."""
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return None
    pairs = zip(first.shape, second.shape, strict=True)
    return ir.Shape([right if left == 1 else left for left, right in pairs])
