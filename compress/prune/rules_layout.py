"""How axes hang together in operators that move elements: Transpose, Concat, Split, Slice, Pad, Expand, …"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, axes_of, int_attribute, integers, operand, permutation, rank
from .spaces import Indices, as_indices, ranged
from .tracer import Axes, Axis, Change, Kept, Tracer


def transpose(tracer: Tracer, node: ir.Node) -> None:
    """Axes in another order."""
    source, order = tracer.read(node, 0), permutation(node)
    if order is None:
        tracer.keep_all(node, "its permutation is not known")
        return
    tracer.write(node, [source[place] for place in order])
    if tracer.reads_weight(node, 0):
        # What a constant's axes are is known only to the reader behind.
        tracer.weight(node, 0).roles[:] = ["" for _ in source]


def squeeze(tracer: Tracer, node: ir.Node) -> None:
    """Axes of size 1 go."""
    source, axes = tracer.read(node, 0), axes_of(node)
    if axes is None:
        sizes = [tracer.size(node.inputs[0], place) for place in range(len(source))]
        if operand(node, 1) is not None or None in sizes:
            tracer.keep_all(node, "the axes that it drops are not constant")
            return
        axes = [place for place, size in enumerate(sizes) if size == 1]
    gone = {axis % len(source) for axis in axes}
    tracer.write(node, [axis for place, axis in enumerate(source) if place not in gone])


def unsqueeze(tracer: Tracer, node: ir.Node) -> None:
    """Axes of size 1 come."""
    source, axes = tracer.read(node, 0), axes_of(node)
    if axes is None:
        tracer.keep_all(node, "the axes that it adds are not constant")
        return
    width = len(source) + len(axes)
    added, left = {axis % width for axis in axes}, iter(source)
    tracer.write(node, [None if place in added else next(left) for place in range(width)])


def concat(tracer: Tracer, node: ir.Node) -> None:
    """Elements one after another along one axis; the others are joined."""
    parts = [tracer.read(node, place) for place in range(len(node.inputs))]
    width = len(parts[0])
    at = int_attribute(node, "axis", 0) % max(width, 1)
    result: Axes = [
        None if place == at else tracer.same(node, *[part[place] for part in parts]) for place in range(width)
    ]
    sizes = [tracer.size(value, at) for value in node.inputs]
    if any(size is None for size in sizes):
        tracer.keep(node, [part[at] for part in parts], "it joins pieces of unknown size along this axis")
    else:
        known = [size for size in sizes if size is not None]
        result[at] = tracer.spaces.new(sum(known))
        start = 0
        for part, size in zip(parts, known, strict=True):
            tracer.link(result[at], ranged(start, size), part[at], ranged(0, size), node)
            start += size
    tracer.write(node, result)


def split(tracer: Tracer, node: ir.Node) -> None:
    """Pieces of one axis, each with a space of its own."""
    source = tracer.read(node, 0)
    at = int_attribute(node, "axis", 0) % max(len(source), 1)
    sizes = [tracer.size(value, at) for value in node.outputs]
    space = source[at]
    rest = [source[:at], source[at + 1 :]]
    if space is None or any(size is None for size in (*sizes, tracer.size(node.inputs[0], at))):
        tracer.keep(node, [space], "it cuts pieces of unknown size from this axis")
        for output in range(len(node.outputs)):
            tracer.write(node, [*rest[0], None, *rest[1]], output)
        return
    start, pieces = 0, list[Axis]()
    for output, size in enumerate(sizes):
        assert size is not None
        piece = tracer.spaces.new(size) if size > 1 else None
        tracer.link(piece, ranged(0, size), space, ranged(start, size), node)
        tracer.write(node, [*rest[0], piece, *rest[1]], output)
        pieces.append(piece)
        start += size
    tracer.adjust(node, [space, *pieces], _resized_pieces(pieces))


def _resized_pieces(pieces: Sequence[Axis]) -> Change:
    def change(node: ir.Node, kept: Kept, editor: Editor) -> None:
        sizes = [1 if piece is None else kept.count(piece) for piece in pieces]
        node.attributes.pop("num_outputs", None)
        if "split" in node.attributes:
            node.attributes["split"] = ir.AttrInt64s("split", sizes)
            return
        put_constant(node, 1, sizes, editor)

    return change


def put_constant(node: ir.Node, position: int, values: Sequence[int], editor: Editor) -> None:
    """Let an input be a constant vector of integers."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    if position >= len(node.inputs):
        node.resize_inputs(position + 1)
    node.replace_input_with(position, editor.constant(as_indices(values), "sizes", graph))


def slice_(tracer: Tracer, node: ir.Node) -> None:
    """A range of one axis or several, by constant bounds."""
    source = tracer.read(node, 0)
    bounds = _bounds(node, len(source))
    if bounds is None:
        tracer.keep_all(node, "its bounds are not constant")
        return
    result = list(source)
    for axis, (start, end, step) in bounds.items():
        space = source[axis]
        if space is None or tracer.size(node.inputs[0], axis) is None:
            tracer.keep(node, [space], "it cuts a piece from this axis, whose size is unknown")
            result[axis] = None
            continue
        chosen = as_indices(range(*slice(start, end, step).indices(tracer.spaces.size(space))))
        new = tracer.spaces.new(len(chosen)) if len(chosen) > 1 else None
        if step != 1:
            tracer.keep(node, [space], "it takes every so many elements of this axis")
        tracer.link(new, ranged(0, len(chosen)), space, chosen, node)
        tracer.adjust(node, [space, new], _moved_bounds(axis, space, chosen))
        result[axis] = new
    tracer.write(node, result)


def _bounds(node: ir.Node, width: int) -> dict[int, tuple[int, int, int]] | None:
    if "starts" in node.attributes:
        starts, ends = (list(node.attributes[name].as_ints()) for name in ("starts", "ends"))
        axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else None
        steps = None
    else:
        found = [integers(operand(node, place)) for place in range(1, 5)]
        if found[0] is None or found[1] is None:
            return None
        if any(operand(node, place) is not None and found[place - 1] is None for place in (3, 4)):
            return None
        starts, ends, axes, steps = found[0], found[1], found[2], found[3]
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    return {
        axis % width: (start, end, step)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }


def _moved_bounds(axis: int, space: int, chosen: Indices) -> Change:
    """The bounds that enclose what is left of the range."""

    def change(node: ir.Node, kept: Kept, editor: Editor) -> None:
        bounds = _bounds(node, rank(node.inputs[0]) or 1)
        assert bounds is not None
        stay = kept.of(space)
        first = int(np.searchsorted(stay, chosen[0])) if len(chosen) else 0
        last = int(np.searchsorted(stay, chosen[-1] + 1)) if len(chosen) else 0
        if bounds[axis][2] != 1:
            return  # kept whole
        bounds[axis] = (first, last, 1)
        starts, ends, steps = (list(column) for column in zip(*bounds.values(), strict=True))
        if "starts" in node.attributes:
            for name, values in (("starts", starts), ("ends", ends), ("axes", list(bounds))):
                node.attributes[name] = ir.AttrInt64s(name, values)
            return
        for position, values in ((1, starts), (2, ends), (3, list(bounds)), (4, steps)):
            put_constant(node, position, values, editor)

    return change


def pad(tracer: Tracer, node: ir.Node) -> None:
    """New elements before and after; they are elements of the result alone."""
    source = tracer.read(node, 0)
    amounts = _pads(node, len(source))
    if amounts is None:
        tracer.keep_all(node, "its amounts are not constant")
        return
    result = list(source)
    for axis, (before, after) in enumerate(amounts):
        space = source[axis]
        if not before and not after:
            continue
        mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
        known = tracer.size(node.inputs[0], axis) is not None
        if space is None or not known or before < 0 or after < 0 or mode != "constant":
            tracer.keep(node, [space], "it repeats or drops elements at the ends of this axis")
            result[axis] = None
            continue
        size = tracer.spaces.size(space)
        wide = tracer.spaces.new(size + before + after)
        tracer.link(wide, ranged(before, size), space, ranged(0, size), node)
        tracer.adjust(node, [space, wide], _moved_pads(axis, wide, before, size))
        result[axis] = wide
    tracer.write(node, result)


def _pads(node: ir.Node, width: int) -> list[tuple[int, int]] | None:
    flat = (
        list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else integers(operand(node, 1))
    )
    axes = list(range(width))
    if operand(node, 3) is not None:
        listed = integers(operand(node, 3))
        if listed is None:
            return None
        axes = [axis % width for axis in listed]
    if flat is None or len(flat) != 2 * len(axes):
        return None
    amounts = [(0, 0)] * width
    for place, axis in enumerate(axes):
        amounts[axis] = (flat[place], flat[place + len(axes)])
    return amounts


def _moved_pads(axis: int, wide: int, before: int, size: int) -> Change:
    def change(node: ir.Node, kept: Kept, editor: Editor) -> None:
        amounts = _pads(node, rank(node.inputs[0]) or 1)
        assert amounts is not None
        stay = kept.of(wide)
        amounts[axis] = (int((stay < before).sum()), int((stay >= before + size).sum()))
        flat = [first for first, _ in amounts] + [last for _, last in amounts]
        if "pads" in node.attributes:
            node.attributes["pads"] = ir.AttrInt64s("pads", flat)
            return
        put_constant(node, 1, flat, editor)
        if len(node.inputs) > 3:
            node.resize_inputs(3)

    return change


def resize(tracer: Tracer, node: ir.Node) -> None:
    """Batch and channels pass through where their scale is 1."""
    source, value = tracer.read(node, 0), node.outputs[0]
    width = len(source)
    sizes = operand(node, 3)
    given = [tracer.size(node.inputs[0], place) for place in range(width)]
    made = [tracer.size(value, place) if value.shape is not None else None for place in range(width)]
    result: Axes = []
    for place, axis in enumerate(source):
        same = axis is not None and given[place] == made[place] and place < 2
        if not same:
            tracer.keep(node, [axis], "it resizes this axis")
        result.append(axis if same else None)
    if sizes is not None and any(axis is not None for axis in result):
        if integers(sizes) is None and not sizes_of_parts(tracer, node, 3, result):
            result = [None] * width
        elif integers(sizes) is not None:
            tracer.adjust(node, result, counted_sizes(3, result))
    tracer.write(node, result)


def counted_sizes(position: int, axes: Sequence[Axis]) -> Change:
    """A constant vector of sizes with the new sizes of some axes; 0, 1 and -1 stay as they are."""

    def change(node: ir.Node, kept: Kept, editor: Editor) -> None:
        sizes = integers(operand(node, position))
        assert sizes is not None
        for place, axis in enumerate(axes):
            if axis is not None and sizes[place] > 1:
                sizes[place] = kept.count(axis)
        put_constant(node, position, sizes, editor)

    return change


def sizes_of_parts(tracer: Tracer, node: ir.Node, position: int, axes: Sequence[Axis]) -> bool:
    """Prepare a vector of sizes that a Concat makes of pieces: constant pieces are changed in a cut.

    Axes whose size a computed piece says are kept, and so is everything where the pieces are not plain.

    Returns:
        Whether the axes may be cut.
    """
    maker = None if node.inputs[position] is None else node.inputs[position].producer()  # type: ignore[union-attr]
    pieces = [] if maker is None or maker.op_type != "Concat" else list(maker.inputs)
    lengths = [tracer.size(piece, 0) if rank(piece) == 1 else None for piece in pieces]
    if not pieces or None in lengths or sum(length or 0 for length in lengths) != len(axes):
        tracer.keep(node, axes, "the sizes that it makes are computed at run time")
        return False
    start, changed = 0, dict[int, Axes]()
    for place, length in enumerate(lengths):
        part = list(axes[start : start + (length or 0)])
        start += length or 0
        if not any(axis is not None for axis in part):
            continue
        if integers(pieces[place]) is None:
            tracer.keep(node, part, "its size is computed at run time")
        else:
            changed[place] = part
    for place, part in changed.items():
        tracer.adjust(node, part, _changed_piece(position, place, part))
    return True


def _changed_piece(position: int, place: int, axes: Sequence[Axis]) -> Change:
    def change(node: ir.Node, kept: Kept, editor: Editor) -> None:
        source = operand(node, position)
        maker = None if source is None else source.producer()
        assert maker is not None
        if len(tuple(maker.outputs[0].uses())) > 1:
            # Other readers want other sizes: this one gets a vector of its own.
            maker = editor.node(
                "Concat", list(maker.inputs), {"axis": 0}, before=node, stem="sizes", like=source
            )
            node.replace_input_with(position, maker.outputs[0])
        sizes = integers(maker.inputs[place])
        assert sizes is not None
        counted = [
            kept.count(axis) if axis is not None and size > 1 else size
            for axis, size in zip(axes, sizes, strict=True)
        ]
        put_constant(maker, place, counted, editor)

    return change


def expand(tracer: Tracer, node: ir.Node) -> None:
    """Axes of more than one element pass through; copies of one element may be fewer."""
    source, value = tracer.read(node, 0), node.outputs[0]
    width = rank(value)
    if width is None:
        tracer.keep_all(node, "the rank that it makes is not known")
        return
    result: Axes = []
    for place, axis in enumerate((*[None] * (width - len(source)), *source)):
        size = tracer.size(value, place)
        before = place - (width - len(source))
        if before >= 0 and tracer.size(node.inputs[0], before) != 1:
            result.append(axis)
        else:
            result.append(tracer.spaces.new(size) if size is not None and size > 1 else None)
    if any(axis is not None for axis in result):
        _adjust_expand(tracer, node, result)
    tracer.write(node, result)


def _adjust_expand(tracer: Tracer, node: ir.Node, result: Axes) -> None:
    sizes = integers(operand(node, 1))
    if sizes is None:
        sizes_of_parts(tracer, node, 1, result)
    else:
        short = len(result) - len(sizes)
        tracer.adjust(node, result, counted_sizes(1, result[short:]))


def tile(tracer: Tracer, node: ir.Node) -> None:
    """Axes that are not repeated pass through."""
    source, repeats = tracer.read(node, 0), integers(operand(node, 1))
    if repeats is None:
        tracer.keep_all(node, "how often it repeats is not constant")
        return
    again = [axis for axis, times in zip(source, repeats, strict=True) if times != 1]
    tracer.keep(node, again, "it repeats this axis")
    tracer.write(node, [axis if times == 1 else None for axis, times in zip(source, repeats, strict=True)])


def depth_to_space(tracer: Tracer, node: ir.Node) -> None:
    """The block² channels that make one channel of the result go together."""
    block = int_attribute(node, "blocksize", 1)
    source = tracer.read(node, 0)
    space = source[1]
    new: Axis = None
    if space is not None:
        count = tracer.spaces.size(space) // block**2
        mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "DCR"
        owner = (
            np.tile(np.arange(count), block**2) if mode == "DCR" else np.repeat(np.arange(count), block**2)
        )
        new = tracer.spaces.new(count) if count > 1 else None
        tracer.link(new, as_indices(owner), space, ranged(0, len(owner)), node)
    tracer.write(node, [source[0], new, None, None])


def space_to_depth(tracer: Tracer, node: ir.Node) -> None:
    """A channel's block² copies go together."""
    block = int_attribute(node, "blocksize", 1)
    source = tracer.read(node, 0)
    space = source[1]
    new: Axis = None
    if space is not None:
        count = tracer.spaces.size(space)
        new = tracer.spaces.new(count * block**2)
        owner = np.tile(np.arange(count), block**2)
        tracer.link(new, ranged(0, len(owner)), space, as_indices(owner), node)
    tracer.write(node, [source[0], new, None, None])
