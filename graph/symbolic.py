"""Sizes as terms: what a tensor of integers says about the axes of other tensors.

A term is an int (known), a str (a named dynamic axis such as "batch"), or `(value id, axis)` for an
axis that nothing is known about. Equal terms mean equal sizes; different terms mean nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import onnx_ir as ir

from .edit import axes_of, int_attribute, integers, operand, producer, rank, small_constant

Term = int | str | tuple[int, int]
_DEPTH = 16
# What exporters write for an axis that they know nothing about; two such axes may differ.
_NO_NAMES = (None, "", "?", "None", "unk", "unknown")
_SAME_NUMBERS = frozenset({"Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity"})
# Types that hold every size; a Cast to int8 or bool would not.
_SIZE_TYPES = (ir.DataType.INT32, ir.DataType.INT64)


def axis_terms(value: ir.Value | None) -> list[Term] | None:
    """One term per axis of `value`, or None if its rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [_axis_term(value, axis) for axis in range(len(value.shape))]


def _axis_term(value: ir.Value, axis: int) -> Term:
    assert value.shape is not None
    dim = value.shape[axis]
    if isinstance(dim, int):
        return dim
    return (id(value), axis) if dim.value in _NO_NAMES else dim.value


def size_terms(value: ir.Value | None) -> list[Term] | None:
    """The terms that a small integer vector holds (a Reshape target, an Expand shape), or None.

    Understands constants, Shape, and Gather, Slice, Concat, Squeeze, Unsqueeze, Reshape and Cast of
    them, as long as every value in between is a scalar or a vector.
    """
    known = _terms(value, _DEPTH)
    return known if isinstance(known, list) else None


def scalar_term(value: ir.Value | None) -> Term | None:
    """Like `size_terms`, for an integer scalar or a vector of one integer."""
    known = _terms(value, _DEPTH)
    if isinstance(known, list):
        return known[0] if len(known) == 1 else None
    return None if known is None else known.term


def constant_sizes(value: ir.Value | None) -> list[int] | int | None:
    """Like `size_terms`, where every term is a known number; an int for a scalar."""
    known = _terms(value, _DEPTH)
    if isinstance(known, _Scalar):
        return known.term if isinstance(known.term, int) else None
    if known is None or not all(isinstance(term, int) for term in known):
        return None
    return [term for term in known if isinstance(term, int)]


class _Scalar(NamedTuple):
    """The term of a tensor of rank 0 (a list stands for rank 1)."""

    term: Term


def _terms(value: ir.Value | None, depth: int) -> list[Term] | _Scalar | None:
    array = small_constant(value)
    if array is not None:
        if array.dtype.kind not in "iu" or array.ndim > 1:
            return None
        return [int(item) for item in array] if array.ndim else _Scalar(int(array))
    node = producer(value)
    if node is None or depth == 0:
        return None
    if node.op_type == "Shape":
        axes = axis_terms(node.inputs[0])
        if axes is None:
            return None
        return axes[int_attribute(node, "start", 0) : int_attribute(node, "end", len(axes))]
    if node.op_type == "Concat":
        return _concat_terms(node, depth)
    if node.op_type not in _SAME_NUMBERS and node.op_type not in ("Gather", "Slice"):
        return None
    source = _terms(operand(node, 0), depth - 1)
    if source is None:
        return None
    if node.op_type == "Gather":
        return _gather_terms(node, source)
    if node.op_type == "Slice":
        return _slice_terms(node, source)
    return _regrouped(node, source)


def _regrouped(node: ir.Node, source: list[Term] | _Scalar) -> list[Term] | _Scalar | None:
    """Terms after an operator that keeps the numbers, if the result is still a scalar or a vector."""
    if node.op_type == "Cast":
        return source if int_attribute(node, "to", 0) in _SIZE_TYPES else None
    if node.op_type == "Unsqueeze":
        one_axis = isinstance(source, _Scalar) and axes_of(node) in ([0], [-1])
        return [source.term] if isinstance(source, _Scalar) and one_axis else None
    if node.op_type == "Squeeze":
        if isinstance(source, _Scalar) or len(source) != 1:
            return source if isinstance(source, _Scalar) else None
        explicit = "axes" in node.attributes or operand(node, 1) is not None
        return _Scalar(source[0]) if not explicit or axes_of(node) in ([0], [-1]) else None
    if node.op_type == "Reshape":
        flat = [source.term] if isinstance(source, _Scalar) else source
        target = integers(operand(node, 1))
        if target in ([-1], [len(flat)]):
            return flat
        return _Scalar(flat[0]) if target == [] and len(flat) == 1 else None
    return source


def _concat_terms(node: ir.Node, depth: int) -> list[Term] | None:
    joined: list[Term] = []
    for part in node.inputs:
        terms = _terms(part, depth - 1)
        if not isinstance(terms, list):
            return None
        joined += terms
    return joined


def _gather_terms(node: ir.Node, source: list[Term] | _Scalar) -> list[Term] | _Scalar | None:
    picks = small_constant(operand(node, 1))
    if isinstance(source, _Scalar) or picks is None or picks.ndim > 1 or picks.dtype.kind not in "iu":
        return None
    places = [int(pick) for pick in picks.reshape(-1)]
    if any(not -len(source) <= place < len(source) for place in places):
        return None
    return [source[place] for place in places] if picks.ndim else _Scalar(source[places[0]])


def _slice_terms(node: ir.Node, source: list[Term] | _Scalar) -> list[Term] | None:
    starts, ends = integers(operand(node, 1)), integers(operand(node, 2))
    steps = [1] if operand(node, 4) is None else integers(operand(node, 4))
    if isinstance(source, _Scalar) or starts is None or ends is None or steps is None:
        return None
    if not len(starts) == len(ends) == len(steps) == 1 or steps[0] <= 0:
        return None
    return source[starts[0] : ends[0] : steps[0]]


def reshape_terms(node: ir.Node) -> list[Term] | None:
    """The axes that a Reshape gives its output: its target with 0 (copy) and -1 (rest) resolved.

    A -1 stays -1 when the rest is not plainly one of the input's axes; None if a copied axis is unknown.
    """
    target, source = size_terms(operand(node, 1)), axis_terms(operand(node, 0))
    if target is None:
        return None
    if 0 in target and not int_attribute(node, "allowzero", 0):
        if source is None or target[len(source) :].count(0):
            return None
        target = [source[place] if term == 0 else term for place, term in enumerate(target)]
    if source is None or target.count(-1) != 1 or 0 in source:
        return target
    rest = list(source)
    for term in target:
        if term in rest:
            rest.remove(term)
        elif term not in (-1, 1):
            return _resolve_by_product(target, source)
    rest = [term for term in rest if term != 1]
    if len(rest) > 1:
        return _resolve_by_product(target, source)
    return [(rest[0] if rest else 1) if term == -1 else term for term in target]


def _resolve_by_product(target: list[Term], source: list[Term]) -> list[Term]:
    """Resolve -1 when the dynamic axes are the same on both sides and the rest are numbers."""
    dynamic = [sorted(str(term) for term in side if not isinstance(term, int)) for side in (target, source)]
    if dynamic[0] != dynamic[1]:
        return target
    have = math.prod(term for term in source if isinstance(term, int))
    want = math.prod(term for term in target if isinstance(term, int) and term != -1)
    if want <= 0 or have % want:
        return target
    return [have // want if term == -1 else term for term in target]


def starts_at_zero(value: ir.Value | None) -> ir.Node | None:
    """The Range from 0 by 1 that the tensor holds (0, 1, 2, …, laid out along one axis), or None."""
    node = producer(value, *_LAYOUT)
    while node is not None and node.op_type != "Range":
        if node.op_type == "Cast" and int_attribute(node, "to", 0) not in _SIZE_TYPES:
            return None  # a small integer type wraps around
        node = producer(node.inputs[0], *_LAYOUT)
    if node is None or integers(node.inputs[0]) != [0] or integers(node.inputs[2]) != [1]:
        return None
    return node if _holds_sizes(node.inputs[0]) else None


_LAYOUT = ("Range", "Unsqueeze", "Squeeze", "Identity", "Cast")


def _holds_sizes(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in _SIZE_TYPES


def unsqueezed_axis(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(1-D source, axis, rank) if `value` is a vector whose other axes all have size 1."""
    total, current = rank(value), value
    if total is None:
        return None
    chain = []
    while (node := producer(current, "Unsqueeze")) is not None:
        chain.append(node)
        current = node.inputs[0]
    if current is None or rank(current) != 1:
        return None
    axis, size = 0, 1
    for node in reversed(chain):
        added = axes_of(node)
        if added is None:
            return None
        size += len(added)
        taken = {place % size for place in added}
        axis = [place for place in range(size) if place not in taken][axis]
    return current, axis, size
