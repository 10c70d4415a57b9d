"""How axes hang together in Reshape and Flatten: heads x head size, groups x channels, channels x places."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import onnx_ir as ir

from ...graph.edit import (
    axes_of,
    int_attribute,
    integers,
    only_use,
    operand,
    permutation,
    producer,
    rank,
    scalar,
    static_dim,
)
from ...graph.symbolic import Term, axis_terms, reshape_terms
from .rules_layout import counted_sizes, sizes_of_parts
from .spaces import ranged
from .tracer import Axes, Axis, Tracer

_FOLDED = "it is folded into an axis of unknown size"
_INNER = "it is one factor of a reshaped axis; the cut goes along the other"


def reshape(tracer: Tracer, node: ir.Node) -> None:
    """Axes that are split or merged: elements go together along the outer factor (whole heads)."""
    value = node.outputs[0]
    if value.shape is None or node.inputs[0] is None or node.inputs[0].shape is None:
        tracer.keep_all(node, "the shape that it reads or makes is not known")
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
        block = [before[place] for place in left], [after[place] for place in right]
        if len(left) == len(right) == 1 and block[0] == block[1]:
            result[right[0]] = source[left[0]]
            continue
        factors = _refined(*_of_folded(tracer, block, source[left[0]] if left else None))
        if factors is None:
            tracer.keep(node, [source[place] for place in left], _FOLDED)
            continue
        picked = {
            f for place, run in zip(right, factors[2], strict=True) if _picked(value, place) for f in run
        }
        made = _refactored(tracer, node, [source[place] for place in left], factors, picked)
        for place, space in zip(right, made, strict=True):
            result[place] = space
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


def _of_folded(tracer: Tracer, block: Sequence[list[Term]], first: Axis) -> Sequence[list[Term]]:
    """Sizes without the unknown factor of a block, where both sides begin with an axis of unknown size.

    Attention that folds its heads into the batch makes (batch x heads, length, size): of such an axis
    position i holds head i modulo the heads, so it has the heads' space. What is unknown (the batch) is the
    outermost factor of both sides, and what is left of the first axis has as many elements as its space.
    """
    before, after = block
    if not before or not after or _counts(before[0]) or _counts(after[0]):
        return block
    if not all(map(_counts, (*before[1:], *after[1:]))):
        return block
    known = 1 if first is None else tracer.spaces.size(first)
    whole = known * math.prod(size for size in before[1:] if isinstance(size, int))
    inner = math.prod(size for size in after[1:] if isinstance(size, int))
    if whole % inner:
        return block
    return [known, *before[1:]], [whole // inner, *after[1:]]


def _counts(term: Term) -> bool:
    return isinstance(term, int) and term > 0


def _picked(value: ir.Value, axis: int) -> bool:
    """Whether an axis is only there to be taken apart: the 3 of (3, heads, size) in packed projections."""
    while True:
        uses = [use.node for use in value.uses() if use.idx == 0]
        if not uses or len(uses) != len(value.uses()) or value.is_graph_output():
            return False
        if all(node.op_type in ("Gather", "Split") for node in uses):
            return all(_takes_one(node, axis) for node in uses)
        node = uses[0]
        moved = _moved(node, axis) if len(uses) == 1 else None
        if moved is None:
            return False
        value, axis = node.outputs[0], moved


def _takes_one(node: ir.Node, axis: int) -> bool:
    """Whether a Gather takes one position of an axis, a Split one in each piece."""
    if int_attribute(node, "axis", 0) % (rank(node.inputs[0]) or 1) != axis:
        return False
    if node.op_type == "Gather":
        return scalar(operand(node, 1)) is not None
    return all(static_dim(piece, axis) == 1 for piece in node.outputs)


def _moved(node: ir.Node, axis: int) -> int | None:
    """Where an axis is behind a Transpose, Squeeze or Unsqueeze; None behind anything else."""
    if node.op_type == "Transpose":
        order = permutation(node) or []
        return order.index(axis) if axis in order else None
    axes, before, after = axes_of(node), rank(node.inputs[0]), rank(node.outputs[0])
    if axes is None or before is None or after is None:
        return None
    if node.op_type == "Squeeze":
        gone = {item % before for item in axes}
        return None if axis in gone else axis - sum(item < axis for item in gone)
    if node.op_type == "Unsqueeze":
        added = {item % after for item in axes}
        return [place for place in range(after) if place not in added][axis]
    return None


def _refactored(tracer: Tracer, node: ir.Node, source: Axes, factors: Factors, picked: set[int]) -> Axes:
    """The spaces of a block's output axes; each input axis goes by at most one of its factors."""
    sizes, before, after = factors
    fixed = picked | {f for space, run in zip(source, before, strict=True) if space is None for f in run}
    live = _live(factors, fixed, node)
    spaces = dict[int, int]()
    for space, run in zip(source, before, strict=True):
        chosen = [factor for factor in run if factor in live]
        if space is None:
            continue
        if not chosen:
            tracer.keep(node, [space], _INNER)
        elif len(run) == 1:
            spaces[chosen[0]] = space
        else:
            spaces[chosen[0]] = tracer.spaces.new(sizes[chosen[0]])
            _spread(tracer, space, spaces[chosen[0]], _repeats(sizes, run, chosen[0]))
    result: Axes = []
    for run in after:
        chosen = [factor for factor in run if factor in spaces]
        made: Axis = spaces[chosen[0]] if chosen else None
        if made is not None and len(run) > 1:
            wide = tracer.spaces.new(math.prod(sizes[place] for place in run))
            _spread(tracer, wide, made, _repeats(sizes, run, chosen[0]))
            made = wide
        result.append(made)
    return result


def _repeats(sizes: Sequence[int], run: Sequence[int], factor: int) -> int:
    """How many neighbours in the product axis have the same element of a factor."""
    return math.prod(sizes[place] for place in run if place > factor)


def _spread(tracer: Tracer, wide: int, narrow: int, repeats: int) -> None:
    """Link each element of a product axis to the element of one of its factors."""
    every = ranged(0, tracer.spaces.size(wide))
    tracer.spaces.link(wide, every, narrow, every // repeats % tracer.spaces.size(narrow))


Factors = tuple[list[int], list[list[int]], list[list[int]]]


def _refined(before: Sequence[Term], after: Sequence[Term]) -> Factors | None:
    """The common factors of both sides' sizes, and which of them make each input and output axis."""
    if not all(map(_counts, (*before, *after))):
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
