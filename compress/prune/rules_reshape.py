"""How axes hang together in Reshape and Flatten: heads x head size, groups x channels, channels x places."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...graph.edit import int_attribute, integers, only_use, operand, permutation, producer
from ...graph.symbolic import Term, axis_terms, reshape_terms
from .rules_layout import counted_sizes, sizes_of_parts
from .spaces import Indices, as_indices
from .tracer import Axes, Axis, Tracer

_FOLDED = "it is folded into an axis of unknown size"
_INNER = "it is one factor of a reshaped axis; the cut goes along the other"


def reshape(tracer: Tracer, node: ir.Node) -> None:
    """Axes that are split or merged: elements go together along the outer factor (whole heads)."""
    value = node.outputs[0]
    if value.shape is None:
        tracer.keep_all(node, "the shape that it makes is not known")
        return
    source = tracer.read(node, 0)
    before, after = axis_terms(node.inputs[0]), axis_terms(value)
    spelled = None if node.op_type == "Flatten" else reshape_terms(node)
    assert before is not None
    assert after is not None
    if spelled is not None and len(spelled) == len(after):
        after = [_known(own, term) for own, term in zip(after, spelled, strict=True)]
    result: Axes = [None] * len(after)
    for left, right in _blocks(before, after):
        _reshape_block(tracer, node, source, result, (before, left), (after, right))
    tracer.write(node, result)
    if node.op_type == "Reshape" and any(axis is not None for axis in result):
        if integers(operand(node, 1)) is not None:
            tracer.adjust(node, result, counted_sizes(1, result))
        else:
            sizes_of_parts(tracer, node, 1, result)


def _known(own: Term, spelled: Term) -> Term:
    return spelled if not isinstance(own, int) and spelled != -1 else own


Block = tuple[list[int], list[int]]


def _blocks(before: Sequence[Term], after: Sequence[Term]) -> list[Block]:
    """The least runs of input axes and output axes with equal products, in order.

    Runs that hold sizes of unknown product come out as one block.
    """
    start, head = _from_left(before, after)
    tail_blocks: list[Block] = []
    if start != (len(before), len(after)):
        rest_before, rest_after = before[start[0] :][::-1], after[start[1] :][::-1]
        used, found = _from_left(rest_before, rest_after)
        ends = len(before) - 1, len(after) - 1
        tail_blocks = [
            ([ends[0] - place for place in left][::-1], [ends[1] - place for place in right][::-1])
            for left, right in reversed(found)
        ]
        middle = (
            list(range(start[0], len(before) - used[0])),
            list(range(start[1], len(after) - used[1])),
        )
        if middle[0] or middle[1]:
            tail_blocks.insert(0, middle)
    return head + tail_blocks


def _from_left(before: Sequence[Term], after: Sequence[Term]) -> tuple[tuple[int, int], list[Block]]:
    """Blocks from the first axes on, as far as sizes are known; and how many axes they take."""
    found: list[Block] = []
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] == after[j] and before[i] != -1:
            found.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        left, right = [i], [j]
        while True:
            sizes = [[before[place] for place in left], [after[place] for place in right]]
            products = [
                math.prod(size for size in side if isinstance(size, int))
                if all(isinstance(size, int) and size > 0 for size in side)
                else None
                for side in sizes
            ]
            if None in products:
                return (i, j), found
            if products[0] == products[1]:
                break
            grow, limit = (left, len(before)) if products[0] < products[1] else (right, len(after))  # type: ignore[operator]
            if grow[-1] + 1 >= limit:
                return (i, j), found
            grow.append(grow[-1] + 1)
        found.append((left, right))
        i, j = left[-1] + 1, right[-1] + 1
    return (i, j), found


def _reshape_block(
    tracer: Tracer,
    node: ir.Node,
    source: Axes,
    result: Axes,
    left: tuple[Sequence[Term], list[int]],
    right: tuple[Sequence[Term], list[int]],
) -> None:
    (before, inputs), (after, outputs) = left, right
    if len(inputs) == len(outputs) == 1 and before[inputs[0]] == after[outputs[0]]:
        result[outputs[0]] = source[inputs[0]]
        return
    sizes = [[terms[place] for place in places] for terms, places in (left, right)]
    factors = _refined(*sizes)
    if factors is None:
        tracer.keep(node, [source[place] for place in inputs], _FOLDED)
        return
    fixed = {f for axis, run in zip(inputs, factors[1], strict=True) if source[axis] is None for f in run}
    live = _live(factors, fixed, node)
    spaces = dict[int, Axis]()
    for axis, run in zip(inputs, factors[1], strict=True):
        space = source[axis]
        chosen = [factor for factor in run if factor in live]
        if space is None:
            continue
        if not chosen:
            tracer.keep(node, [space], _INNER)
        elif len(run) == 1:
            spaces[chosen[0]] = space
        else:
            spaces[chosen[0]] = tracer.spaces.new(factors[0][chosen[0]])
            tracer.link(space, *_spread(space, spaces[chosen[0]], run, chosen[0], factors[0], tracer), node)
    for axis, run in zip(outputs, factors[2], strict=True):
        chosen = [factor for factor in run if factor in live and spaces.get(factor) is not None]
        if not chosen:
            continue
        factor = chosen[0]
        if len(run) == 1:
            result[axis] = spaces[factor]
            continue
        wide = tracer.spaces.new(math.prod(factors[0][place] for place in run))
        tracer.link(wide, *_spread(wide, spaces[factor], run, factor, factors[0], tracer), node)
        result[axis] = wide
    used = {factor for run in factors[2] for factor in run if factor in live}
    tracer.keep(node, [space for factor, space in spaces.items() if factor not in used], _INNER)


def _spread(
    wide: int, narrow: Axis, run: Sequence[int], factor: int, sizes: Sequence[int], tracer: Tracer
) -> tuple[Indices, Axis, Indices]:
    """All elements of the product axis, the factor's space, and which of its elements each belongs to."""
    inner = math.prod(sizes[place] for place in run if place > factor)
    everything = np.arange(tracer.spaces.size(wide))
    return as_indices(everything), narrow, as_indices(everything // inner % sizes[factor])


Factors = tuple[list[int], list[list[int]], list[list[int]]]


def _refined(before: Sequence[Term], after: Sequence[Term]) -> Factors | None:
    """The common factors of both sides' sizes, and which of them make each input and output axis."""
    if not all(isinstance(size, int) and size > 0 for size in (*before, *after)):
        return None
    cuts = []
    for side in (before, after):
        product, places = 1, [1]
        for size in side:
            product *= int(size)  # type: ignore[arg-type]
            places.append(product)
        cuts.append(places)
    if cuts[0][-1] != cuts[1][-1]:
        return None
    every = sorted(set(cuts[0]) | set(cuts[1]))
    if any(high % low for low, high in itertools.pairwise(every)):
        return None
    sizes = [high // low for low, high in itertools.pairwise(every)]
    runs = [
        [
            [place for place in range(len(sizes)) if low <= every[place] < high]
            for low, high in itertools.pairwise(places)
        ]
        for places in cuts
    ]
    return sizes, runs[0], runs[1]


def _live(factors: Factors, fixed: set[int], node: ir.Node) -> set[int]:
    """The factors along which elements may go: at most one of each axis, none of the fixed ones.

    Of the factors of an axis the last but one: heads of (heads, size) and of (3, heads, size); where a
    shuffle swaps two factors, the larger one.
    """
    sizes, before, after = factors
    live = {place for place, size in enumerate(sizes) if size > 1} - fixed
    for run in (*before, *after):
        here = [place for place in run if place in live]
        if len(here) > 1:
            best = max(here, key=sizes.__getitem__) if _is_shuffle(node) else here[-2]
            live -= set(here) - {best}
    return live


def _is_shuffle(node: ir.Node) -> bool:
    """Whether a Reshape opens or closes Reshape, Transpose of two neighbours, Reshape."""
    turn = only_use(node.outputs[0])
    if turn is not None and turn.op_type == "Transpose":
        close = only_use(turn.outputs[0])
        return _swaps_neighbours(turn) and close is not None and _undone(node, close)
    turn = producer(node.inputs[0], "Transpose")
    opening = None if turn is None else producer(turn.inputs[0], "Reshape")
    return turn is not None and opening is not None and _swaps_neighbours(turn) and _undone(opening, node)


def _undone(first: ir.Node, last: ir.Node) -> bool:
    """Whether a Reshape brings back the shape that another one started from."""
    shapes = [first.inputs[0].shape, last.outputs[0].shape] if first.inputs[0] is not None else []
    return last.op_type == "Reshape" and len(shapes) == 2 and shapes[0] is not None and shapes[0] == shapes[1]


def _swaps_neighbours(node: ir.Node) -> bool:
    order = permutation(node) or []
    moved = [place for place, axis in enumerate(order) if place != axis]
    return len(moved) == 2 and moved[1] - moved[0] == 1


def flatten(tracer: Tracer, node: ir.Node) -> None:
    """A Reshape to two axes."""
    if int_attribute(node, "axis", 1) == 0 and tracer.read(node, 0):
        tracer.keep_all(node, "it merges all axes into one")
        return
    reshape(tracer, node)
