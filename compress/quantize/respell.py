"""Writing planned operators as others, of the same function, for which the runtime has integer kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import msgspec
import numpy as np
import onnx_ir as ir

from ...graph.edit import (
    Attributes,
    Editor,
    constant,
    float_attribute,
    int_attribute,
    integers,
    only_use,
    operand,
    producer,
    rank,
    static_dim,
)
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.scheme import Scheme
from ..operands import moves_data
from ..plan import Decision
from .constants import graph_of
from .shuffle import channel_shuffle
from .transposed import interleaved_convolution

_EXACT_WEIGHTS = Scheme(dtype="int8", symmetric=True, granularity="per-channel", axis=0, reduced_range=True)
"""Of averages and permutations: weights are zero or the largest integer; 7 bits saturate in no kernel."""


@dataclasses.dataclass(kw_only=True)
class Respelled:
    """What respelling adds to a layout.

    Attributes:
        planned: node name -> decision, with the new nodes.
        source: a new tensor's name -> the tensor whose range it shares.
        fixed: a new tensor's name -> (minimum, maximum) that hold whatever the data.
        stretched: (node, factor): the node is to read its first operand multiplied by a factor,
            which costs nothing as another scale of the same integers.
    """

    planned: dict[str, Decision]
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    fixed: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    stretched: list[tuple[ir.Node, float]] = dataclasses.field(default_factory=list)


def respell(
    model: Model, planned: Mapping[str, Decision], source: Mapping[str, str], editor: Editor
) -> Respelled:
    """Rewrite planned nodes in place; node names and the names of their results stay.

    Relu becomes LeakyRelu of slope 0; x - c and x / c become x + (-c) and x * (1/c); HardSigmoid is
    an Add whose result saturates at 0 and 1, HardSwish x times that; an AveragePool is a depthwise
    convolution with equal weights, a ConvTranspose a convolution whose outputs are interleaved; a
    Gemm takes alpha and beta into its constants and a transposed operand through a Transpose. A
    channel shuffle on the way is a convolution that permutes; a Conv takes the Pad in front of it.

    Args:
        model: the float graph, changed in place.
        planned: node name -> static decision.
        source: tensor name -> the tensor whose range it shares, as laid out.
        editor: makes nodes.
    """
    made = Respelled(planned=dict(planned))
    for node in tuple(model.graph):
        if (node.name or "") not in planned or node.domain:
            continue
        match node.op_type:
            case "Conv":
                _take_padding(node, source)
            case "Relu":
                node.op_type = "LeakyRelu"
                node.attributes["alpha"] = ir.AttrFloat32("alpha", 0.0)
            case "Sub" | "Div":
                _move_into_constant(node, editor)
            case "HardSigmoid":
                _hard_sigmoid(node, made, editor)
            case "HardSwish":
                _hard_swish(node, made, editor)
            case "AveragePool":
                _average(node, made, editor)
            case "ConvTranspose":
                _transposed(node, made, source, editor)
            case "Gemm":
                _plain_gemm(node, made, source, editor)
    for node in tuple(model.graph):
        found = channel_shuffle(node, source)
        if found is not None and planned:
            _permuting_convolution(*found, made, editor)
    return made


def exchange(
    node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: Attributes, editor: Editor
) -> ir.Node:
    """Another node in the place of `node`, with its name and the name of its one result."""
    result, name = node.outputs[0], node.name
    stem = str(result.name)
    made = editor.node(op_type, inputs, attributes, before=node, stem=stem, like=result)
    was_output = result.is_graph_output()
    editor.replace(result, made.outputs[0])
    if not was_output:
        result.name = editor.fresh_name(f"{stem}/before")
        made.outputs[0].name = stem
    graph_of(node).remove(node, safe=True)
    made.name = name
    return made


def _take_padding(node: ir.Node, source: Mapping[str, str]) -> None:
    """Let a convolution pad by itself what a Pad of zeros in front of it pads."""
    pad = producer(node.inputs[0], "Pad")
    if pad is None or only_use(pad.outputs[0]) is not node or not moves_data(pad) or pad.inputs[0] is None:
        return
    mode = pad.attributes["mode"].as_string() if "mode" in pad.attributes else "constant"
    border, axes = integers(operand(pad, 1)), rank(pad.inputs[0])
    owner = source.get(str(pad.inputs[0].name))
    if mode != "constant" or operand(pad, 3) is not None or border is None or axes is None or owner is None:
        return
    begins, ends = border[:axes], border[axes:]
    automatic = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if any((*begins[:2], *ends[:2])) or min(border) < 0 or automatic not in ("NOTSET", "VALID"):
        return
    if source.get(str(pad.outputs[0].name)) != owner:
        return
    own = list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else [0] * (2 * (axes - 2))
    total = [mine + more for mine, more in zip(own, begins[2:] + ends[2:], strict=True)]
    node.attributes.pop("auto_pad", None)
    node.attributes["pads"] = ir.AttrInt64s("pads", total)
    node.replace_input_with(0, pad.inputs[0])


def _move_into_constant(node: ir.Node, editor: Editor) -> None:
    """x - c = x + (-c), x / c = x * (1/c)."""
    value = operand(node, 1)
    values = constant(value)
    if value is None or values is None or not isinstance(node.graph, ir.Graph):
        raise InternalError("a planned node has no constant operand", where=node.name)
    subtracts = node.op_type == "Sub"
    real = values.astype(np.float64)
    moved = -real if subtracts else 1.0 / real
    name = f"{value.name}.{'negated' if subtracts else 'inverse'}"
    node.op_type = "Add" if subtracts else "Mul"
    node.replace_input_with(1, editor.constant(np.asarray(moved, np.float32), name, node.graph))


def _hard_sigmoid(node: ir.Node, made: Respelled, editor: Editor) -> None:
    """clip(alpha x + beta, 0, 1) = saturated(Add(alpha x, beta)): its result is quantized within [0, 1]."""
    alpha, beta = float_attribute(node, "alpha", 0.2), float_attribute(node, "beta", 0.5)
    shift = editor.constant(np.asarray(beta, np.float32), f"{node.name}/beta", graph_of(node))
    added = exchange(node, "Add", [node.inputs[0], shift], {}, editor)
    made.stretched.append((added, alpha))


def _hard_swish(node: ir.Node, made: Respelled, editor: Editor) -> None:
    """x clip(x/6 + 1/2, 0, 1), the gate as in `_hard_sigmoid`."""
    data, name = node.inputs[0], str(node.name)
    shift = editor.constant(np.asarray(0.5, np.float32), f"{name}/half", graph_of(node))
    gate = editor.node("Add", [data, shift], before=node, stem=f"{name}/gate", like=node.outputs[0])
    product = exchange(node, "Mul", [data, gate.outputs[0]], {}, editor)
    made.planned[str(gate.name)] = made.planned[str(product.name)]
    made.source[str(gate.outputs[0].name)] = str(gate.outputs[0].name)
    made.fixed[str(gate.outputs[0].name)] = (0.0, 1.0)
    made.stretched.append((gate, 1.0 / 6.0))


def _average(node: ir.Node, made: Respelled, editor: Editor) -> None:
    channels = static_dim(node.inputs[0], 1)
    window = list(node.attributes["kernel_shape"].as_ints())
    if channels is None:
        raise InternalError("the channels of a planned pool are not known", where=node.name)
    weight = np.full((channels, 1, *window), 1.0 / np.prod(window), np.float32)
    kept: dict[str, list[int] | int | str] = {"group": channels, "kernel_shape": window}
    for name in ("strides", "pads", "dilations"):
        if name in node.attributes:
            kept[name] = list(node.attributes[name].as_ints())
    value = editor.tensor(ir.tensor(weight), f"{node.name}/equal", graph_of(node))
    pooled = exchange(node, "Conv", [node.inputs[0], value], kept, editor)
    decision = made.planned[str(pooled.name)]
    made.planned[str(pooled.name)] = msgspec.structs.replace(decision, weight_scheme=_EXACT_WEIGHTS)


def _permuting_convolution(
    data: ir.Value, last: ir.Node, order: list[int], made: Respelled, editor: Editor
) -> None:
    """A 1 x 1 convolution whose weights are zeros and ones: exact at one scale on both sides."""
    axes = 0 if data.shape is None else len(data.shape)
    weight = np.eye(len(order), dtype=np.float32)[order].reshape(len(order), len(order), *[1] * (axes - 2))
    value = editor.tensor(ir.tensor(np.ascontiguousarray(weight)), f"{last.name}/order", graph_of(last))
    permuted = exchange(last, "Conv", [data, value], {}, editor)
    template = next(iter(made.planned.values()))
    made.planned[str(permuted.name)] = msgspec.structs.replace(
        template, node=str(permuted.name), op="Conv", weight_scheme=_EXACT_WEIGHTS
    )


def _transposed(node: ir.Node, made: Respelled, source: Mapping[str, str], editor: Editor) -> None:
    name = str(node.name)
    decision, parts = made.planned[name], interleaved_convolution(node, editor)
    scheme = decision.weight_scheme
    if scheme is None:
        raise InternalError("a planned ConvTranspose has no weight scheme", where=name)
    owner = source[str(parts.result.name)]
    for value in parts.moved:
        made.source[str(value.name)] = owner
    made.planned[name] = msgspec.structs.replace(
        decision, weight_scheme=msgspec.structs.replace(scheme, axis=0)
    )


def _plain_gemm(node: ir.Node, made: Respelled, source: Mapping[str, str], editor: Editor) -> None:
    data = node.inputs[0]
    if int_attribute(node, "transA", 0) and data is not None:
        turned = editor.value(
            "Transpose", [data], {"perm": [1, 0]}, before=node, stem=f"{data.name}/turned",
            dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        if data.shape is not None:
            turned.shape = ir.Shape(list(data.shape)[::-1])
        node.replace_input_with(0, turned)
        node.attributes["transA"] = ir.AttrInt64("transA", 0)
        made.source[str(turned.name)] = source[str(data.name)]
    for place, name in ((1, "alpha"), (2, "beta")):
        factor, value = float_attribute(node, name, 1.0), operand(node, place)
        values = constant(value)
        if factor == 1.0:
            continue
        node.attributes[name] = ir.AttrFloat32(name, 1.0)
        if value is None or values is None:
            continue
        scaled = np.asarray(values.astype(np.float64) * factor, np.float32)
        node.replace_input_with(
            place, editor.tensor(ir.tensor(scaled), f"{value.name}.times-{name}", graph_of(node))
        )
