"""A ConvTranspose as a convolution with more outputs that are interleaved afterwards."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import Editor, constant, only_use, operand, static_dim
from ...graph.errors import InternalError
from ..operands import output_tail, transposed_pads, transposed_strides, transposed_surplus

Float32Array = npt.NDArray[np.float32]


class Interleaved(NamedTuple):
    """The convolution, every tensor between it and the result, and the result."""

    convolution: ir.Node
    moved: tuple[ir.Value, ...]
    result: ir.Value


def phase_weights(
    weight: Float32Array, strides: list[int], pads: list[tuple[int, int]]
) -> tuple[Float32Array, list[tuple[int, int]]]:
    """The weights of the convolution, and its padding (begin, end) per spatial axis.

    Output s i + r of a transposed convolution with stride s and padding p is
    sum_d x[i + d] w[r + p - s d]: for each of the s phases r a convolution of its own.

    Args:
        weight: (inputs, outputs, k_1, ..., k_n), as ConvTranspose has it.
        strides: s per spatial axis.
        pads: (begin, end) of the transposed convolution per spatial axis.

    Returns:
        weights: (s_1 * ... * s_n * outputs, inputs, taps_1, ..., taps_n), phases first.
        padding: of the convolution.

    Source: Shi et al. 2016, arXiv:1609.07009, section 2 (a transposed convolution is a convolution in
    low resolution and a periodic shuffle).
    """
    made = np.moveaxis(weight, 1, 0)  # (outputs, inputs, k...)
    padding: list[tuple[int, int]] = []
    for axis, (step, (begin, _)) in enumerate(zip(strides, pads, strict=True)):
        length = weight.shape[2 + axis]
        first, last = -((length - 1 - begin) // step), (step - 1 + begin) // step
        place = made.ndim - len(strides) + axis
        window = np.zeros((step, *made.shape[:place], last - first + 1, *made.shape[place + 1 :]), np.float32)
        for phase in range(step):
            for shift in range(first, last + 1):
                tap = phase + begin - step * shift
                if 0 <= tap < length:
                    target: list[int | slice] = [slice(None)] * window.ndim
                    target[0], target[place + 1] = phase, shift - first
                    window[tuple(target)] = np.take(made, tap, axis=place)
        made = window
        padding.append((-first, last))
    axes = len(strides)
    # The phase axes came in front one after the other: the last spatial axis' phase stands first.
    ordered = np.transpose(made, [*reversed(range(axes)), *range(axes, made.ndim)])
    return np.ascontiguousarray(ordered.reshape(-1, *ordered.shape[axes + 1 :])), padding


def interleaved_convolution(node: ir.Node, editor: Editor) -> Interleaved:
    """Write a ConvTranspose (and the Relu or Clip behind it) as Conv, the same, and moves of its result.

    The outputs are interleaved with the channels last, as the runtime's integer convolutions have
    them, so that the two outer transposes cancel against its own. `operands.unfit_transposed` says
    which nodes can be written so. Node name and result names stay.
    """
    graph, weight = node.graph, constant(node.inputs[1])
    if not isinstance(graph, ir.Graph) or weight is None:
        raise InternalError("a planned ConvTranspose has no constant weight", where=node.name)
    strides, tail, name = transposed_strides(node), output_tail(node), str(node.name)
    inputs, attributes = _convolution(node, np.asarray(weight, np.float32), strides, graph, editor)
    convolution = editor.node("Conv", inputs, attributes, before=node, stem=f"{name}/phases")
    value = convolution.outputs[0]
    value.type = ir.TensorType(ir.DataType.FLOAT)
    behind = only_use(node.outputs[0]) if tail is not node.outputs[0] else None
    if behind is not None:
        value = editor.value(
            behind.op_type, [value, *behind.inputs[1:]], before=behind, stem=f"{name}/absorbed",
            dtype=ir.DataType.FLOAT,
        )  # fmt: skip
    last = behind if behind is not None else node
    moved = [value]
    for op_type, arguments in _moves(node):
        if op_type == "Transpose":
            operands, settings = [moved[-1]], {"perm": arguments[0]}
        else:
            given = (
                editor.constant(np.asarray(item, np.int64), f"{name}/{op_type}", graph) for item in arguments
            )
            operands, settings = [moved[-1], *given], {}
        made = editor.value(
            op_type, operands, settings, before=last, stem=f"{name}/moved", dtype=ir.DataType.FLOAT
        )
        moved.append(made)
    _take_over(tail, moved[-1], editor)
    for gone in ([behind] if behind is not None else []) + [node]:
        graph.remove(gone, safe=True)
    convolution.name = name
    return Interleaved(convolution, tuple(moved[:-1]), moved[-1])


def _convolution(
    node: ir.Node, weight: Float32Array, strides: list[int], graph: ir.Graph, editor: Editor
) -> tuple[list[ir.Value | None], dict[str, list[int]]]:
    weights, padding = phase_weights(weight, strides, transposed_pads(node))
    stem = node.inputs[1].name if node.inputs[1] is not None else node.name
    inputs = [node.inputs[0], editor.tensor(ir.tensor(weights), f"{stem}.phases", graph)]
    bias = operand(node, 2)
    values = constant(bias)
    if bias is not None and values is not None:
        repeated = np.tile(values.reshape(-1), int(np.prod(strides)))
        inputs.append(editor.tensor(ir.tensor(repeated), f"{bias.name}.phases", graph))
    more = _more_places(node)
    pads = [begin for begin, _ in padding] + [
        end + extra for (_, end), extra in zip(padding, more, strict=True)
    ]
    return inputs, {"kernel_shape": list(weights.shape[2:]), "pads": pads}


def _more_places(node: ir.Node) -> list[int]:
    """How many outputs more than inputs the convolution has per spatial axis; what is too much is cut off."""
    pairs = zip(transposed_surplus(node), transposed_strides(node), strict=True)
    return [-(-surplus // step) for surplus, step in pairs]


def _moves(node: ir.Node) -> list[tuple[str, list[list[int]]]]:
    """The operators, with permutation or shapes, from [N, phases * channels, ...] to the result."""
    strides = transposed_strides(node)
    axes, channels = len(strides), static_dim(node.inputs[1], 1) or 0
    if all(step == 1 for step in strides):
        return []
    split = [0] * (1 + axes) + strides[:-1] + [strides[-1] * channels]
    order = [place for axis in range(axes) for place in (1 + axis, 1 + axes + axis)]
    sizes = [static_dim(node.inputs[0], 2 + axis) for axis in range(axes)]
    more, surplus = _more_places(node), transposed_surplus(node)
    joined = [
        -1 if size is None else (size + extra) * step
        for size, extra, step in zip(sizes, more, strides, strict=True)
    ]
    cut = [(axis, step * more[axis] - surplus[axis]) for axis, step in enumerate(strides)]
    cut = [(axis, count) for axis, count in cut if count]
    ends, beside = [-count for _, count in cut], [1 + axis for axis, _ in cut]
    return [
        ("Transpose", [[0, *range(2, 2 + axes), 1]]),
        ("Reshape", [split]),
        *([("Transpose", [[0, *order]])] if axes > 1 else []),
        ("Reshape", [[0, *joined, channels]]),
        *([("Slice", [[0] * len(cut), ends, beside])] if cut else []),
        ("Transpose", [[0, 1 + axes, *range(1, 1 + axes)]]),
    ]


def _take_over(old: ir.Value, new: ir.Value, editor: Editor) -> None:
    """Let `new` have the readers, the name and the place among the outputs of `old`."""
    name, was_output = str(old.name), old.is_graph_output()
    editor.replace(old, new)
    if not was_output:
        old.name = editor.fresh_name(f"{name}/before")
        new.name = name
