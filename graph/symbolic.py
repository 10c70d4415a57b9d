"""Sizes as terms: what a tensor of integers says about the axes of other tensors.

A term is an int (known), a str (a named dynamic axis such as "batch"), or `(value id, axis)` for an
axis that nothing is known about. Equal terms mean equal sizes; different terms mean nothing.
"""

from __future__ import annotations

import onnx_ir as ir

from .edit import axes_of, int_attribute, integers, producer, rank

Term = int | str | tuple[int, int]
_DEPTH = 16


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
    return dim.value if dim.value is not None else (id(value), axis)


def size_terms(value: ir.Value | None, depth: int = _DEPTH) -> list[Term] | None:
    """The terms that a small integer tensor holds (a Reshape target, an Expand shape), or None.

    Understands constants, Shape, and Gather, Slice, Concat, Squeeze, Unsqueeze, Reshape and Cast of them.
    """
    if value is None or depth == 0:
        return None
    known = integers(value)
    if known is not None:
        return list(known)
    node = producer(value)
    if node is None:
        return None
    if node.op_type == "Shape":
        terms = axis_terms(node.inputs[0])
        if terms is None:
            return None
        end = int_attribute(node, "end", len(terms))
        return terms[int_attribute(node, "start", 0) : end]
    if node.op_type in ("Squeeze", "Unsqueeze", "Cast", "Identity"):
        return size_terms(node.inputs[0], depth - 1)
    if node.op_type == "Reshape":
        return size_terms(node.inputs[0], depth - 1) if integers(node.inputs[1]) in ([-1], [1], []) else None
    if node.op_type == "Concat":
        return _concat_terms(node, depth)
    if node.op_type == "Gather":
        return _gather_terms(node, depth)
    if node.op_type == "Slice":
        return _slice_terms(node, depth)
    return None


def _concat_terms(node: ir.Node, depth: int) -> list[Term] | None:
    joined: list[Term] = []
    for part in node.inputs:
        terms = size_terms(part, depth - 1)
        if terms is None:
            return None
        joined += terms
    return joined


def _gather_terms(node: ir.Node, depth: int) -> list[Term] | None:
    terms, picks = size_terms(node.inputs[0], depth - 1), integers(node.inputs[1])
    if terms is None or picks is None or any(not -len(terms) <= pick < len(terms) for pick in picks):
        return None
    return [terms[pick] for pick in picks]


def _slice_terms(node: ir.Node, depth: int) -> list[Term] | None:
    terms = size_terms(node.inputs[0], depth - 1)
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    steps = integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    if terms is None or starts is None or ends is None or steps is None or len(starts) != 1 or len(ends) != 1:
        return None
    return terms[starts[0] : ends[0] : steps[0]] if steps[0] > 0 else None


def reshape_terms(node: ir.Node) -> list[Term] | None:
    """The axes that a Reshape gives its output: its target with 0 (copy) and -1 (rest) resolved.

    A -1 stays -1 when the rest is not plainly one of the input's axes.
    """
    target, source = size_terms(node.inputs[1]), axis_terms(node.inputs[0])
    if target is None:
        return None
    if source is not None and not int_attribute(node, "allowzero", 0):
        target = [
            source[place] if term == 0 and place < len(source) else term for place, term in enumerate(target)
        ]
    if source is None or target.count(-1) != 1:
        return target
    rest: list[Term] = list(source)
    for term in target:
        if term != -1:
            if term not in rest:
                return _resolve_by_product(target, source)
            rest.remove(term)
    rest = [term for term in rest if term != 1]
    if len(rest) == 1:
        return [rest[0] if term == -1 else term for term in target]
    if not rest:
        return [1 if term == -1 else term for term in target]
    return target


def _resolve_by_product(target: list[Term], source: list[Term]) -> list[Term]:
    """Resolve -1 when the dynamic axes are the same on both sides and the rest are numbers."""
    dynamic_target = sorted(str(term) for term in target if not isinstance(term, int))
    dynamic_source = sorted(str(term) for term in source if not isinstance(term, int))
    if dynamic_target != dynamic_source:
        return target
    have, want = 1, 1
    for term in source:
        have *= term if isinstance(term, int) else 1
    for term in target:
        want *= term if isinstance(term, int) and term != -1 else 1
    if want <= 0 or have % want:
        return target
    return [have // want if term == -1 else term for term in target]


def starts_at_zero(value: ir.Value | None) -> bool:
    """Whether the tensor holds 0, 1, 2, … (a Range from 0 by 1, reshaped without reordering)."""
    node = producer(value, "Range", "Unsqueeze", "Squeeze", "Identity", "Cast")
    while node is not None and node.op_type != "Range":
        node = producer(node.inputs[0], "Range", "Unsqueeze", "Squeeze", "Identity", "Cast")
    if node is None:
        return False
    return integers(node.inputs[0]) == [0] and integers(node.inputs[2]) == [1]


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
