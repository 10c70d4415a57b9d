"""Attention as one operator of onnxruntime, where a target computes that faster."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import (
    Editor,
    int_attribute,
    is_constant,
    only_use,
    permutation,
    producer,
    rank,
    static_dim,
)
from ...graph.model import Model
from ...graph.passes import run_passes
from ...graph.rewrite import Refused, Rewrite, Verdict
from ...graph.symbolic import Term, axis_terms, size_terms
from .linear_path import sole_reader
from .multihead_operands import AXES, HEADS_FIRST, Block, Mask, Operands
from .polynomial import number

_LOW_ENOUGH = -1e30
_STEPS = 32
_RESHAPED = "the result per head is reshaped, and not known to keep its shape"
_SIZES = ("Shape", "Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Cast", "Mul")
_OTHER_SHAPE = "a mask or bias is not known to broadcast to [batch, heads, queries, keys]"


class FuseAttention(NamedTuple):
    """softmax(q k^T * scale + masks) v, heads split and joined -> com.microsoft.MultiHeadAttention.

    Takes what exports of scaled_dot_product_attention and of written-out attention have in common once
    they are cleaned up: any number of Adds of masks or position biases, masks as Where(mask, scores, low)
    in either order, a factor on the scores. Masks of one row are laid out for all rows once. Off by
    default: see `runtime_ops.MultiHeadAttention` of the profiles. Source: Vaswani et al. 2017,
    arXiv:1706.03762, section 3.2; operator: onnxruntime docs/ContribOperators.md.
    """

    name: str = "attention"
    roots: frozenset[str] = frozenset({"Reshape"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        context = _context(node)
        if context is None or isinstance(context, Refused):
            return context or False
        block = _block(node, context)
        if isinstance(block, Refused):
            return block
        build = Operands(node, editor)
        query, key = build.tokens(block.query), build.tokens(block.key, transposed=True)
        value = build.tokens(block.value)
        bias = build.bias(block, query, key)
        result = node.outputs[0]
        fused = editor.value(
            "MultiHeadAttention",
            [query, key, value, None, None, bias][: 6 if bias is not None else 3],
            {"num_heads": block.heads, "scale": block.scale},
            before=node,
            stem=result.name or "attention",
            like=result,
            domain="com.microsoft",
        )
        editor.replace(result, fused)
        return True


def count_attention(model: Model) -> int:
    """How many attention blocks `FuseAttention` recognises; the model is left as it is."""
    trial = model.fork()
    (record,) = run_passes(trial, [Rewrite(rules=(FuseAttention(),))])
    return record.applied.get(FuseAttention().name, 0)


def _context(node: ir.Node) -> ir.Node | Refused | None:
    """The product of probabilities and values whose heads `node` joins, if it does."""
    turned = producer(node.inputs[0], "Transpose")
    if turned is None or rank(turned.outputs[0]) != AXES:
        return None
    inner = _behind_needless_reshape(turned.inputs[0])
    product = producer(inner, "MatMul")
    if product is None:
        reshaped = producer(inner, "Reshape")
        folded = producer(reshaped.inputs[0], "MatMul") if reshaped is not None else None
        if folded is not None and _probabilities(folded) is not None:
            deep = rank(folded.outputs[0]) == AXES
            return Refused(_RESHAPED if deep else "the heads are folded into the batch axis")
        return None
    if _probabilities(product) is None:
        return None
    if permutation(turned) != HEADS_FIRST:
        return Refused("the heads are joined in another order")
    chain = (node.inputs[0], turned.inputs[0], product.outputs[0])
    if any(value is None or not _read_for(value, node) for value in chain):
        return Refused("the result per head is also used elsewhere")
    return product


def _read_for(value: ir.Value, end: ir.Node) -> bool:
    """Whether one node reads the numbers of `value`, and what is made of its shape goes into `end` alone."""
    if sole_reader(value) is None:
        return False
    pending = [use.node for use in value.uses() if use.node.op_type == "Shape"]
    for _ in range(_STEPS):
        if not pending:
            return True
        node = pending.pop()
        if node is not end and (node.op_type not in _SIZES or node.outputs[0].is_graph_output()):
            return False
        pending += [] if node is end else [use.node for use in node.outputs[0].uses()]
    return False


def _probabilities(product: ir.Node) -> ir.Node | None:
    """The Softmax that is the left operand, behind Where and Reshape."""
    value = product.inputs[0]
    node = producer(value)
    while node is not None and node.op_type in ("Where", "Reshape", "Dropout", "Cast"):
        node = producer(node.inputs[-1] if node.op_type == "Where" else node.inputs[0])
    return node if node is not None and node.op_type == "Softmax" and not node.domain else None


def _behind_needless_reshape(value: ir.Value | None) -> ir.Value | None:
    """What is in front of a Reshape that changes at most one axis: the number of elements fixes that too."""
    node = producer(value, "Reshape")
    if node is None:
        return value
    before, after = axis_terms(node.inputs[0]), axis_terms(value)
    if before is None or after is None or len(before) != len(after):
        return value
    differing = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    same = [left for left, right in zip(before, after, strict=True) if left == right]
    return node.inputs[0] if len(differing) <= 1 and 0 not in same else value


def _block(node: ir.Node, context: ir.Node) -> Block | Refused:
    """The parts of the attention that ends in `context`, or why it is none that the operator computes."""
    softmax = producer(context.inputs[0], "Softmax")
    if softmax is None:
        return Refused("rows without any token are treated apart (Where behind the softmax)")
    if only_use(softmax.outputs[0]) is None:
        return Refused("the attention weights are also used elsewhere")
    if int_attribute(softmax, "axis", -1) not in (-1, AXES - 1):
        return Refused("the softmax is not over the keys")
    found = _scores(softmax.inputs[0])
    if isinstance(found, Refused):
        return found
    product, terms, scale = found
    query, key, value = product.inputs[0], product.inputs[1], context.inputs[1]
    axes = [axis_terms(item) for item in (query, key, value)]
    if query is None or key is None or value is None or any(a is None or len(a) != AXES for a in axes):
        return Refused("queries, keys or values have not four axes")
    (batch, heads, _, _), keys, values = axes[0] or [], axes[1] or [], axes[2] or []
    if not isinstance(heads, int) or keys[:2] != [batch, heads] or values[:2] != [batch, heads]:
        return Refused("queries, keys and values differ in batch or heads, or their number is unknown")
    if any(item.dtype != ir.DataType.FLOAT for item in (query, key, value)):
        return Refused("queries, keys or values are not known to be float32")
    rows, columns, width = (axes[0] or [])[2], keys[3], static_dim(value, -1)
    if width is None or not _joins(node, [batch, rows], heads * width):
        return Refused("the heads are not known to be joined to one axis")
    for term in terms:
        for item in (term.condition, term.low) if isinstance(term, Mask) else (term,):
            if not _broadcasts(axis_terms(item), [batch, heads, rows, columns]):
                return Refused(_OTHER_SHAPE)
    return Block(query=query, key=key, value=value, heads=heads, scale=scale, terms=tuple(terms))


def _joins(node: ir.Node, leading: list[Term], width: int) -> bool:
    """Whether a Reshape of [batch, queries, heads, width of one] gives [batch, queries, width of all]."""
    made, target = axis_terms(node.outputs[0]), size_terms(node.inputs[1])
    if made is not None and len(made) == 3 and made[-1] == width:
        return True
    if target is None or len(target) != 3 or target[-1] not in (-1, width):
        return False
    return all(term in (0, own) for term, own in zip(target, leading, strict=False))


def _scores(value: ir.Value | None) -> tuple[ir.Node, list[Mask | ir.Value], float] | Refused:
    """(product of queries and keys, what is added to it, factor), looking up from the softmax."""
    terms: list[Mask | ir.Value] = []
    scale = 1.0
    while value is not None:
        node = producer(value, "Add", "Where", "Mul", "Div", "MatMul")
        if node is None:
            maker = value.producer()
            found = "an input" if maker is None else maker.op_type
            return Refused(f"the scores come from {found}, not from queries and keys")
        if only_use(value) is None:
            return Refused("the scores are also used elsewhere")
        if node.op_type == "MatMul":
            return node, terms[::-1], scale
        if node.op_type in ("Mul", "Div"):
            by = number(node.inputs[1])
            if by is None or by == 0.0:
                return Refused("the scores are multiplied by something that is no constant number")
            scale = scale * by if node.op_type == "Mul" else scale / by
            value = node.inputs[0]
            continue
        if scale != 1.0:
            return Refused("a mask is added before the scores are scaled")
        step = _masked(node) if node.op_type == "Where" else _biased(node)
        if isinstance(step, Refused):
            return step
        term, value = step
        terms.append(term)
    return Refused("the scores are not computed")


def _masked(node: ir.Node) -> tuple[Mask, ir.Value] | Refused:
    """(mask, scores) of Where(condition, low, scores) or Where(condition, scores, low)."""
    condition, *sides = node.inputs
    for place in (0, 1):
        low, scores = sides[place], sides[1 - place]
        by = number(low)
        if by is None or low is None or scores is None or condition is None:
            continue
        if not np.isfinite(by):
            return Refused("masked scores are -inf: a row without any token would be NaN")
        if by > _LOW_ENOUGH:
            return Refused("masked scores are not low enough to be what a sum with them gives")
        return Mask(condition, low, inverted=place == 1), scores
    return Refused("a Where puts no constant number in place of scores")


def _biased(node: ir.Node) -> tuple[ir.Value, ir.Value] | Refused:
    """(bias, scores) of an Add; the scores are what leads to a product of two activations."""
    for place in (0, 1):
        bias, scores = node.inputs[1 - place], node.inputs[place]
        if bias is None or scores is None or is_constant(scores) or not _leads_to_product(scores):
            continue
        return bias, scores
    return Refused("no operand of an Add comes from queries and keys")


def _leads_to_product(value: ir.Value) -> bool:
    """Whether scores as `_scores` follows them end in a MatMul of two computed operands."""
    pending, left = [value], _STEPS
    while pending and left:
        left -= 1
        node = producer(pending.pop(), "Add", "Where", "Mul", "Div", "MatMul")
        if node is not None and node.op_type == "MatMul":
            if not any(is_constant(operand) for operand in node.inputs):
                return True
        elif node is not None:
            places = node.inputs[1:] if node.op_type == "Where" else node.inputs
            pending += [item for item in places if item is not None and not is_constant(item)]
    return False


def _broadcasts(axes: list[Term] | None, wide: list[Term]) -> bool:
    """Whether a tensor of these axes broadcasts to `wide` without giving it more."""
    if axes is None or len(axes) > len(wide):
        return False
    return all(term in (1, own) for term, own in zip(axes[::-1], wide[::-1], strict=False))
