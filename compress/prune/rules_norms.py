"""How axes hang together in normalisations and in attention as one operator."""

from __future__ import annotations

import onnx_ir as ir

from ...graph.edit import int_attribute, operand
from .spaces import Frozen, ranged
from .tracer import FIXED, Axes, Axis, Tracer, counted_attributes


def per_channel(tracer: Tracer, node: ir.Node) -> None:
    """BatchNormalization, InstanceNormalization: each channel has its own scale and shift."""
    source = tracer.read(node, 0)
    channels = source[1]
    for position in range(1, len(node.inputs)):
        channels = tracer.same(node, channels, *tracer.read(node, position))
    tracer.write(node, [source[0], channels, *source[2:]])
    for output in range(1, len(node.outputs)):
        tracer.write(node, [channels], output)


def group_normalisation(tracer: Tracer, node: ir.Node) -> None:
    """Whole groups go; scale and bias have one entry a group (opset 18) or a channel (21)."""
    source = tracer.read(node, 0)
    groups, channels = int_attribute(node, "num_groups", 1), source[1]
    scales = [tracer.read(node, 1)[0], tracer.read(node, 2)[0]]
    if channels is None or groups == 1 or None in scales:
        tracer.keep(node, [channels, *scales], "it normalises over all channels")
        tracer.write(node, [source[0], None, *source[2:]])
        return
    units = tracer.spaces.new(groups)
    size = tracer.spaces.size(channels)
    tracer.link(channels, ranged(0, size), units, ranged(0, size) // (size // groups), node)
    for scale in scales:
        assert scale is not None
        if tracer.spaces.size(scale) == groups:
            tracer.spaces.join(scale, units)
        else:
            tracer.same(node, channels, scale)
    tracer.adjust(node, [units], counted_attributes({"num_groups": units}))
    tracer.write(node, source)


def layer_normalisation(tracer: Tracer, node: ir.Node) -> None:
    """LayerNormalization, RMSNormalization: the axes that are normalised over join scale and bias."""
    source = tracer.read(node, 0)
    first = int_attribute(node, "axis", -1) % max(len(source), 1)
    _normalise(tracer, node, source, first, range(1, len(node.inputs)))


def skip_normalisation(tracer: Tracer, node: ir.Node) -> None:
    """com.microsoft's (Embed)SkipLayerNormalization family: sum of two inputs, normalised."""
    source = list(tracer.read(node, 0))
    source[-1] = tracer.same(node, source[-1], tracer.read(node, 1)[-1])
    _normalise(tracer, node, source, len(source) - 1, range(2, len(node.inputs)))


def _normalise(tracer: Tracer, node: ir.Node, source: Axes, first: int, scales: range) -> None:
    result = list(source)
    for position in scales:
        if operand(node, position) is None:
            continue
        axes = tracer.read(node, position)
        for place in range(1, len(axes) + 1):
            if tracer.size(node.inputs[position], -place) != 1:
                result[-place] = tracer.same(node, result[-place], axes[-place])
    for axis in result[first:]:
        if axis is not None:
            why = Frozen(node.name or "", node.op_type, "it normalises over this axis")
            tracer.normalised.append((axis, why))
    for output, value in enumerate(node.outputs):
        if value.shape is not None and len(value.shape) == len(result) and (output in (0, 3)):
            tracer.write(node, result, output)


def attention(tracer: Tracer, node: ir.Node) -> None:
    """Attention of (batch, heads, length, size) or (batch, length, heads x size) queries, keys, values."""
    parts = [tracer.read(node, place) for place in range(3)]
    extra = [place for place in range(3, len(node.inputs)) if operand(node, place) is not None]
    if any(place > 3 for place in extra) or len(node.outputs) > 1:
        tracer.keep_all(node, "its cache of keys and values has no rule")
        return
    queries, shared = (int_attribute(node, name, 0) for name in ("q_num_heads", "kv_num_heads"))
    if len(parts[0]) == 4:
        heads = [part[1] for part in parts]
        for part in parts:
            tracer.keep(node, part[2:], "it is the length or the size of a head")
        made: Axes = [parts[0][0], heads[0], parts[0][2], None]
    else:
        times = (queries, shared, shared)
        heads = [_heads(tracer, node, part[2], count) for part, count in zip(parts, times, strict=True)]
        made = [parts[0][0], parts[0][1], None]
    units = _shared_heads(tracer, node, heads)
    if len(parts[0]) == 3 and units is not None and heads[0] is not None:
        made[2] = _wide_heads(tracer, node, heads[0], tracer.size(node.outputs[0], 2))
        counts = {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
        tracer.adjust(node, counts.values(), counted_attributes(counts))
    if 3 in extra:
        mask = tracer.read(node, 3)
        if len(mask) > 2 and tracer.size(node.inputs[3], -3) != 1:
            tracer.same(node, heads[0], mask[-3])
        tracer.keep(node, mask[-2:], "it is a length")
    tracer.works_on(node, [heads[0]])
    tracer.write(node, made)


def _heads(tracer: Tracer, node: ir.Node, axis: Axis, count: int) -> Axis:
    """The heads of a folded (heads x size) axis."""
    if axis is None or count < 1:
        tracer.keep(node, [axis], "its heads are not known")
        return None
    size = tracer.spaces.size(axis)
    heads = tracer.spaces.new(count)
    tracer.link(axis, ranged(0, size), heads, ranged(0, size) // (size // count), node)
    return heads


def _wide_heads(tracer: Tracer, node: ir.Node, heads: int, size: int | None) -> Axis:
    if size is None:
        tracer.keep(node, [heads], "the size of its result is not known")
        return None
    wide = tracer.spaces.new(size)
    tracer.link(wide, ranged(0, size), heads, ranged(0, size) // (size // tracer.spaces.size(heads)), node)
    return wide


def _shared_heads(tracer: Tracer, node: ir.Node, heads: list[Axis]) -> Axis:
    """Queries that share keys and values go with them, whole shares at a time."""
    if any(axis is None for axis in heads):
        tracer.keep(node, heads, FIXED)
        return None
    queries, keys, values = (axis for axis in heads if axis is not None)
    tracer.spaces.join(keys, values)
    count, shared = tracer.spaces.size(queries), tracer.spaces.size(keys)
    tracer.link(queries, ranged(0, count), keys, ranged(0, count) // (count // shared), node)
    tracer.heads.update((queries, keys))
    return queries


def multi_head_attention(tracer: Tracer, node: ir.Node) -> None:
    """com.microsoft MultiHeadAttention with separate queries, keys and values."""
    plain = all(operand(node, place) is None for place in range(3, len(node.inputs)) if place not in (4, 5))
    if any(operand(node, place) is None for place in (1, 2)) or not plain or len(node.outputs) > 1:
        tracer.keep_all(node, "packed projections, biases or a cache have no rule")
        return
    parts = [tracer.read(node, place) for place in range(3)]
    if any(len(part) != 3 for part in parts):
        tracer.keep_all(node, "keys and values of this layout have no rule")
        return
    count = int_attribute(node, "num_heads", 0)
    heads = [_heads(tracer, node, part[2], count) for part in parts]
    made: Axes = [parts[0][0], parts[0][1], None]
    if _shared_heads(tracer, node, heads) is not None and heads[0] is not None:
        # The operator's shapes are not inferred: a head of the result is as large as one of the values.
        made[2] = _wide_heads(tracer, node, heads[0], tracer.size(node.inputs[2], 2))
        tracer.adjust(node, [heads[0]], counted_attributes({"num_heads": heads[0]}))
    for place in (4, 5):
        if operand(node, place) is not None:
            tracer.keep(node, tracer.read(node, place), "it is a mask or a bias of scores")
            axes = tracer.read(node, place)
            if place == 5 and len(axes) == 4 and tracer.size(node.inputs[place], 1) != 1:
                tracer.keep(node, heads, "its scores have a bias for each head")
    tracer.works_on(node, [heads[0]])
    tracer.write(node, made)


def rotary(tracer: Tracer, node: ir.Node) -> None:
    """RotaryEmbedding: heads pass through; the size of a head stays."""
    source = tracer.read(node, 0)
    for place in range(1, len(node.inputs)):
        if operand(node, place) is not None:
            tracer.keep(node, tracer.read(node, place), "it is a table of angles or positions")
    if len(source) == 4:
        tracer.keep(node, source[3:], "it turns pairs of elements of a head")
        tracer.write(node, [*source[:3], None])
        return
    count = int_attribute(node, "num_heads", 0)
    heads = _heads(tracer, node, source[2], count)
    if heads is not None:
        tracer.adjust(node, [heads], counted_attributes({"num_heads": heads}))
    tracer.write(node, source if heads is not None else [*source[:2], None])
