"""How axes hang together in operators with weights: convolutions, products, recurrent layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir

from ...graph.edit import int_attribute, operand
from .spaces import ranged
from .tracer import FIXED, Axes, Axis, Tracer, counted_attributes


def convolution(tracer: Tracer, node: ir.Node) -> None:
    """Weights (outputs, inputs / groups, *kernel); groups stay equally large in a cut."""
    source, weight = tracer.read(node, 0), tracer.read(node, 1)
    tracer.keep(node, source[2:], "it convolves along this axis")
    tracer.keep(node, weight[2:], "it is the kernel's size")
    _keep_computed(tracer, node)
    tracer.role(node, 1, 0, "out")
    tracer.role(node, 1, 1, "in")
    if int_attribute(node, "group", 1) == 1:
        inner = tracer.same(node, *_wide(tracer, node, [(0, 1), (1, 1)]))
        made = weight[0]
    else:
        made, inner = _grouped(tracer, node), weight[1]
    if operand(node, 2) is not None and made is not None:
        made = tracer.same(node, made, *tracer.read(node, 2))
    tracer.works_on(node, [made, inner])
    tracer.write(node, [source[0], made, *[None] * (len(source) - 2)])


def _keep_computed(tracer: Tracer, node: ir.Node) -> None:
    """A removed element could not be masked in weights that the graph computes."""
    if not tracer.reads_weight(node, 1):
        reason = "its weights are computed at run time"
        tracer.keep(node, [tracer.read(node, 0)[1], *tracer.read(node, 1)[:2]], reason)


def _wide(tracer: Tracer, node: ir.Node, places: Sequence[tuple[int, int]]) -> list[Axis]:
    """The spaces of (input, axis) places of more than one element; all or none have one element."""
    return [
        tracer.read(node, position)[axis]
        for position, axis in places
        if tracer.size(node.inputs[position], axis) != 1
    ]


def _grouped(tracer: Tracer, node: ir.Node) -> Axis:
    """Whole groups go where these are more than the channels of a group; else the same one of each."""
    groups = int_attribute(node, "group", 1)
    source, (made, inner) = tracer.read(node, 0)[1], tracer.read(node, 1)[:2]
    if source is None or made is None:
        tracer.keep(node, [source, made, inner], FIXED)
        return None
    sizes = [tracer.spaces.size(space) // groups for space in (source, made)]
    if inner is None or groups >= min(sizes):
        _whole_groups(tracer, node, groups, (source, made))
        tracer.keep(node, [inner], "whole groups go")
        # What each output sums over belongs to its group: no choice of its own.
        tracer.role(node, 1, 1, "")
        if inner is None:
            # A depthwise kernel belongs to its channel: it neither makes one nor sums over several.
            tracer.role(node, 1, 0, "param")
        return made
    every = ranged(0, groups * sizes[0])
    tracer.link(source, every, inner, every % sizes[0], node)
    units = tracer.spaces.new(sizes[1])
    every = ranged(0, groups * sizes[1])
    tracer.link(made, every, units, every % sizes[1], node)
    return made


def _whole_groups(tracer: Tracer, node: ir.Node, groups: int, spaces: Sequence[int]) -> None:
    units = tracer.spaces.new(groups)
    for space in spaces:
        size = tracer.spaces.size(space)
        tracer.link(space, ranged(0, size), units, ranged(0, size) // (size // groups), node)
    tracer.adjust(node, [units], counted_attributes({"group": units}))


def transposed_convolution(tracer: Tracer, node: ir.Node) -> None:
    """Weights (inputs, outputs / groups, *kernel); of several groups whole ones go."""
    source, weight = tracer.read(node, 0), tracer.read(node, 1)
    groups = int_attribute(node, "group", 1)
    tracer.keep(node, source[2:], "it convolves along this axis")
    tracer.keep(node, weight[2:], "it is the kernel's size")
    _keep_computed(tracer, node)
    made: Axis = None
    if groups == 1:
        tracer.role(node, 1, 0, "in")
        tracer.role(node, 1, 1, "out")
        tracer.same(node, *_wide(tracer, node, [(0, 1), (1, 0)]))
        made = weight[1]
    else:
        tracer.role(node, 1, 0, "param" if weight[1] is None else "out")
        tracer.role(node, 1, 1, "")
        tracer.keep(node, weight[1:2], "whole groups go")
        joined = tracer.same(node, source[1], weight[0])
        if joined is not None:
            made = tracer.spaces.new(groups * (tracer.size(node.inputs[1], 1) or 1))
            _whole_groups(tracer, node, groups, (joined, made))
    if operand(node, 2) is not None:
        made = tracer.same(node, made, *tracer.read(node, 2))
    tracer.works_on(node, [source[1], made] if groups == 1 else [made])
    tracer.write(node, [source[0], made, *[None] * (len(source) - 2)])


def gemm(tracer: Tracer, node: ir.Node) -> None:
    """A @ B + C, each of A and B transposed if asked."""
    turned = [int_attribute(node, name, 0) for name in ("transA", "transB")]
    first, second = tracer.read(node, 0), tracer.read(node, 1)
    rows, inner = first[turned[0]], 1 - turned[0]
    deep, columns = turned[1], second[1 - turned[1]]
    _contract(tracer, node, (0, inner), (1, deep))
    tracer.role(node, 0, turned[0], "out")
    tracer.role(node, 1, 1 - turned[1], "out")
    if operand(node, 2) is not None:
        bias = tracer.read(node, 2)
        sides = [rows, columns]
        for place in range(1, len(bias) + 1):
            if tracer.size(node.inputs[2], len(bias) - place) != 1:
                sides[-place] = tracer.same(node, sides[-place], bias[-place])
        rows, columns = sides
    tracer.works_on(node, [rows, first[inner], columns])
    tracer.write(node, [rows, columns])


def _contract(tracer: Tracer, node: ir.Node, first: tuple[int, int], second: tuple[int, int]) -> None:
    """Join the two axes that a product sums over; without a weight a removed element could not be masked."""
    spaces = _wide(tracer, node, [first, second])
    if spaces:
        tracer.same(node, *spaces)
    constants = [tracer.reads_weight(node, position) for position, _ in (first, second)]
    if not any(constants):
        tracer.keep(node, spaces, "two computed tensors are multiplied over this axis")
    for (position, axis), is_weight in zip((first, second), constants, strict=True):
        if is_weight:
            tracer.role(node, position, axis, "in")


def matmul(tracer: Tracer, node: ir.Node) -> None:
    """(…, M, K) @ (…, K, N) with broadcast batch axes."""
    first, second = tracer.read(node, 0), tracer.read(node, 1)
    _contract(tracer, node, (0, len(first) - 1), (1, max(len(second) - 2, 0)))
    rows: Axes = first[-2:-1]
    columns: Axes = second[-1:] if len(second) > 1 else []
    if rows:
        tracer.role(node, 0, len(first) - 2, "out")
    if columns:
        tracer.role(node, 1, len(second) - 1, "out")
    batch: Axes = []
    for place in range(max(len(first), len(second)) - 2, 0, -1):
        sides = [
            (position, len(axes) - 2 - place)
            for position, axes in enumerate((first, second))
            if len(axes) - 2 >= place
        ]
        wide = _wide(tracer, node, sides)
        batch.append(tracer.same(node, *wide) if wide else None)
    tracer.heads.update(axis for axis in batch if axis is not None)
    made = [*batch, *rows, *columns]
    tracer.works_on(node, [*made, first[-1]])
    tracer.write(node, made)


def einsum(tracer: Tracer, node: ir.Node) -> None:
    """Letters name axes; those that the result lacks are summed over."""
    text = node.attributes["equation"].as_string().replace(" ", "")
    terms = text.split("->")
    inputs = terms[0].split(",")
    if "." in text or len(terms) != 2 or any(not re.fullmatch("[A-Za-z]*", term) for term in inputs):
        tracer.keep_all(node, "its equation has no rule")
        return
    found: dict[str, list[tuple[int, int]]] = {}
    for position, letters in enumerate(inputs):
        for axis, letter in enumerate(letters):
            found.setdefault(letter, []).append((position, axis))
    spaces = dict[str, Axis]()
    for letter, places in found.items():
        wide = _wide(tracer, node, places)
        spaces[letter] = tracer.same(node, *wide) if wide else None
        summed = letter not in terms[1]
        weights = [place for place in places if tracer.reads_weight(node, place[0])]
        if summed and (len(places) != 2 or not weights):
            tracer.keep(node, wide, "computed tensors are summed over this axis")
        for position, axis in weights:
            others = len(places) > 1 and not summed
            tracer.role(node, position, axis, "in" if summed else "param" if others else "out")
    tracer.works_on(node, spaces.values())
    tracer.write(node, [spaces[letter] for letter in terms[1]])


_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(tracer: Tracer, node: ir.Node) -> None:
    """Weights (directions, gates x hidden, inputs), (directions, gates x hidden, hidden), biases, states."""
    gates = _GATES[node.op_type]
    source, weight, recurrence = (tracer.read(node, place) for place in range(3))
    hidden = recurrence[2]
    constant = all(tracer.reads_weight(node, place) for place in (1, 2))
    if int_attribute(node, "layout", 0) or hidden is None or not constant:
        tracer.keep_all(node, "this layout of a recurrent layer has no rule")
        return
    tracer.same(node, *_wide(tracer, node, [(0, 2), (1, 2)]))
    size = tracer.spaces.size(hidden)
    blocks = [(weight[1], gates), (recurrence[1], gates)]
    if operand(node, 3) is not None:
        blocks.append((tracer.read(node, 3)[1], 2 * gates))
    for space, times in blocks:
        every = ranged(0, times * size)
        tracer.link(space, every, hidden, every % size, node)
    for position in (5, 6):
        if operand(node, position) is not None:
            tracer.same(node, hidden, tracer.read(node, position)[2])
    if operand(node, 7) is not None:
        peepholes = tracer.read(node, 7)[1]
        tracer.link(peepholes, ranged(0, 3 * size), hidden, ranged(0, 3 * size) % size, node)
    for position in range(1, len(node.inputs)):
        if operand(node, position) is not None and position != 4:
            tracer.keep(node, tracer.read(node, position)[:1], "it has one entry for each direction")
    tracer.role(node, 1, 1, "out")
    tracer.role(node, 1, 2, "in")
    tracer.role(node, 2, 1, "out")
    tracer.role(node, 2, 2, "in")
    tracer.adjust(node, [hidden], counted_attributes({"hidden_size": hidden}))
    tracer.works_on(node, [hidden])
    tracer.write(node, [source[0], None, source[1], hidden])
    for output in range(1, len(node.outputs)):
        tracer.write(node, [None, source[1], hidden], output)
