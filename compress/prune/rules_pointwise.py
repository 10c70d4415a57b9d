"""How axes hang together in operators that treat elements one by one, reduce, pool or look up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, axes_of, int_attribute, integers, operand, rank, small_constant
from .spaces import Indices, as_indices, ranged
from .tracer import Axes, Axis, Change, Kept, Tracer

_LARGEST_CHOICE = 1 << 16

UNARY = frozenset(
    {
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu",
        "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
        "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu",
        "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt",
        "Swish", "Tan", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
"""Each output element comes from one input element; further inputs are scalars."""
BROADCAST = frozenset(
    {
        "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Clip", "Div", "Equal",
        "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or",
        "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
    }
)  # fmt: skip
REDUCTIONS = frozenset(
    {
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
        "ReduceProd", "ReduceSum", "ReduceSumSquare",
    }
)  # fmt: skip
POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"})
ALONG = frozenset({"CumSum", "Hardmax", "LogSoftmax", "Softmax"})


def unary(tracer: Tracer, node: ir.Node) -> None:
    """The output's axes are the input's."""
    for output in range(len(node.outputs)):
        tracer.write(node, tracer.read(node, 0), output)


def broadcast(tracer: Tracer, node: ir.Node) -> None:
    """Axes of more than one element are aligned from the right and joined."""
    places = [place for place, value in enumerate(node.inputs) if value is not None]
    read = {place: tracer.read(node, place) for place in places}
    width = max(len(axes) for axes in read.values())
    result: Axes = []
    for axis in range(-width, 0):
        here = [place for place in places if len(read[place]) >= -axis]
        wide = [place for place in here if tracer.size(node.inputs[place], axis) != 1]
        spaces = [read[place][axis] for place in wide]
        result.append(tracer.same(node, *spaces) if spaces else None)
    if node.op_type in ("Add", "Sum") and not any(tracer.reads_weight(node, place) for place in places):
        tracer.sums.update(axis for axis in result if axis is not None)
    tracer.write(node, result)


def reduction(tracer: Tracer, node: ir.Node) -> None:
    """What is reduced has to stay: a mean over fewer elements is another mean."""
    source = tracer.read(node, 0)
    axes = axes_of(node)
    if axes is None:
        given = operand(node, 1) is not None
        if given or int_attribute(node, "noop_with_empty_axes", 0):
            tracer.keep_all(node, "the axes that it reduces are not constant")
            return
        axes = list(range(len(source)))
    gone = {axis % len(source) for axis in axes} if source else set()
    tracer.keep(node, [source[axis] for axis in gone], "it reduces over this axis")
    if int_attribute(node, "keepdims", 1):
        tracer.write(node, [None if place in gone else axis for place, axis in enumerate(source)])
    else:
        tracer.write(node, [axis for place, axis in enumerate(source) if place not in gone])


def arg_extreme(tracer: Tracer, node: ir.Node) -> None:
    """ArgMax, ArgMin: positions along an axis mean nothing once some are gone."""
    source = tracer.read(node, 0)
    at = int_attribute(node, "axis", 0) % max(len(source), 1)
    tracer.keep(node, source[at : at + 1], "it looks for a position along this axis")
    rest: list[Axis] = [None] if int_attribute(node, "keepdims", 1) else []
    tracer.write(node, [*source[:at], *rest, *source[at + 1 :]])


def first_input(tracer: Tracer, node: ir.Node) -> None:
    """CastLike and Trilu: the second input is a type, or a diagonal of the last two axes."""
    source = tracer.read(node, 0)
    if node.op_type == "Trilu":
        tracer.keep(node, source[-2:], "it blanks a triangle of this axis")
    tracer.write(node, source)


def sampled(tracer: Tracer, node: ir.Node) -> None:
    """GridSample: channels pass through, places come from the grid."""
    source = tracer.read(node, 0)
    tracer.keep(node, [*source[:1], *source[2:], *tracer.read(node, 1)], "it picks places along this axis")
    tracer.write(node, [None, source[1], *[None] * (len(source) - 2)])


def neighbours(tracer: Tracer, node: ir.Node) -> None:
    """LRN: each channel is divided by those beside it."""
    source = tracer.read(node, 0)
    tracer.keep(node, source[1:2], "it normalises over neighbours along this axis")
    tracer.write(node, source)


def pooling(tracer: Tracer, node: ir.Node) -> None:
    """Batch and channels pass through."""
    source = tracer.read(node, 0)
    for output in range(len(node.outputs)):
        tracer.write(node, [*source[:2], *([None] * (len(source) - 2))], output)
    tracer.keep(node, source[2:], "it pools over this axis")


def along(tracer: Tracer, node: ir.Node) -> None:
    """Softmax and the like: the axis that they run along has to stay."""
    source = tracer.read(node, 0)
    at = integers(operand(node, 1)) if node.op_type == "CumSum" else None
    axis = at[0] if at else int_attribute(node, "axis", -1 if tracer.model.opset >= 13 else 1)
    span = (
        source[axis:]
        if tracer.model.opset < 13 and node.op_type != "CumSum"
        else source[axis : axis + 1 or None]
    )
    tracer.keep(node, span, "it normalises or sums along this axis")
    tracer.write(node, source)


def shape(tracer: Tracer, node: ir.Node) -> None:
    """A size that is read at run time has to stay; axes that no reader picks are free."""
    source = tracer.read(node, 0)
    first, last, _ = slice(int_attribute(node, "start", 0), int_attribute(node, "end", len(source))).indices(
        len(source)
    )
    seen: set[int] = set()
    for use in node.outputs[0].uses():
        reader = use.node
        picks = integers(operand(reader, 1)) if reader.op_type == "Gather" and use.idx == 0 else None
        if reader.op_type == "Slice" and use.idx == 0:
            picks = _sliced(reader, last - first)
        span = list(range(first, last))
        seen.update(span if picks is None else [span[pick] for pick in picks])
    if node.outputs[0].is_graph_output():
        seen.update(range(first, last))
    tracer.keep(node, [source[place] for place in seen], "its size is read at run time")
    tracer.write(node, [None])


def _sliced(node: ir.Node, length: int) -> list[int] | None:
    starts, ends = integers(operand(node, 1)), integers(operand(node, 2))
    if starts is None or ends is None or len(starts) != 1 or len(ends) != 1 or operand(node, 4) is not None:
        return None
    return list(range(length))[starts[0] : ends[0]]


def gather(tracer: Tracer, node: ir.Node) -> None:
    """Rows of a table by computed indices, or a constant choice of elements along an axis."""
    source, indices = tracer.read(node, 0), operand(node, 1)
    axis = int_attribute(node, "axis", 0) % max(len(source), 1)
    picks = small_constant(indices, _LARGEST_CHOICE)
    space = source[axis]
    middle: Axes = [None] * (rank(indices) or 0)
    if picks is None or picks.ndim > 1 or space is None or tracer.size(node.inputs[0], axis) is None:
        tracer.keep(node, [space], "it picks positions along this axis")
        if tracer.reads_weight(node, 0):
            use = tracer.weight(node, 0)
            use.roles[:] = ["" if place == axis else "out" for place in range(len(source))]
    else:
        chosen = as_indices(picks).reshape(-1) % tracer.spaces.size(space)
        if len(chosen) > 1:
            middle = [tracer.spaces.new(len(chosen))]
        new = middle[0] if middle else None
        tracer.link(new, ranged(0, len(chosen)), space, chosen, node)
        tracer.adjust(node, [space, new], _renumbered(space, new, chosen, picks.ndim))
    tracer.write(node, [*source[:axis], *middle, *source[axis + 1 :]])


def gather_nd(tracer: Tracer, node: ir.Node) -> None:
    """Entries by tuples of positions in the first axes; the axes behind those pass through."""
    source, indices = tracer.read(node, 0), operand(node, 1)
    depth, width = tracer.size(indices, -1), rank(indices) or 0
    if int_attribute(node, "batch_dims", 0) or depth is None or depth > len(source):
        tracer.keep_all(node, "its positions have no rule")
        return
    tracer.keep(node, [*source[:depth], *tracer.read(node, 1)], "it picks positions along this axis")
    tracer.write(node, [*[None] * (width - 1), *source[depth:]])


def gather_elements(tracer: Tracer, node: ir.Node) -> None:
    """Elements along one axis by positions of the same shape; the other axes are joined."""
    source, indices = tracer.read(node, 0), tracer.read(node, 1)
    axis = int_attribute(node, "axis", 0) % max(len(source), 1)
    tracer.keep(node, [source[axis], indices[axis]], "it picks positions along this axis")
    tracer.write(
        node,
        [
            None if place == axis else tracer.same(node, *pair)
            for place, pair in enumerate(zip(source, indices, strict=True))
        ],
    )


def _renumbered(space: int, new: Axis, chosen: Indices, dimensions: int) -> Change:
    """The same elements under the numbers that they have after the cut."""

    def change(node: ir.Node, kept: Kept, editor: Editor) -> None:
        left = chosen if new is None else chosen[kept.of(new)]
        places = np.searchsorted(kept.of(space), left)
        if dimensions == 0:
            places = places.reshape(())
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        node.replace_input_with(1, editor.constant(places.astype(np.int64), "indices", graph))

    return change
