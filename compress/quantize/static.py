"""Static INT8: Q/DQ pairs placed so that the runtime really runs integer kernels."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, constant, only_use, operand, producer, remove_dead, scalar
from ...graph.errors import DataError, InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ...graph.scheme import IntArray, Scheme, affine_parameters
from ..operands import ABSORBED_OPS, INTEGER_BY_ITSELF_OPS, moves_data
from ..plan import Decision
from .constants import WEIGHTED, Rounding, Stored, graph_of, store_constants
from .layout import Layout, static_layout
from .respell import respell
from .weights import Float32Array

__all__ = ["Layout", "QuantizeStatic", "Ranges", "static_layout"]

_DIRECT = frozenset({"Pad", "SpaceToDepth"})
_HALF_A_STEP = 0.501  # and what float32 loses of the scale

Ranges = Mapping[str, tuple[float, float]]
"""Tensor name -> (minimum, maximum) of its values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeStatic(Pass):
    """Insert the Q/DQ pairs of a layout and store the planned weights as int8, biases as int32.

    Weights in `rounding` are stored as they stand there, all others rounded to nearest.
    """

    decisions: tuple[Decision, ...]
    layout: Layout
    ranges: Ranges = dataclasses.field(default_factory=dict, repr=False)
    rounding: Rounding = dataclasses.field(default_factory=dict, repr=False)

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome, layout, activation = Outcome(), self.layout, self.layout.activation
        if activation is None:
            return outcome
        editor = Editor(model)
        planned = {item.node: item for item in self.decisions if item.form == "static"}
        for node in model.graph:
            if (node.name or "") in planned:
                outcome.count(f"{node.op_type}-static")
        respelled = respell(model, planned, layout.source, editor)
        planned = respelled.planned
        layout = dataclasses.replace(
            layout,
            source=layout.source | respelled.source,
            rerouted=layout.rerouted | frozenset(respelled.source),
        )
        by_name = {value.name: value for value in model.graph.inputs}
        by_name |= {value.name: value for node in model.graph for value in node.outputs}
        stored = Stored(editor, self.rounding)
        ranges = {**self.ranges, **respelled.fixed}
        scales = {name: _parameters(source, ranges, layout) for name, source in layout.source.items()}
        # Weights first: they read the scale of the data input, whose name is still the original one.
        for node in tuple(model.graph):
            decision = planned.get(node.name or "")
            if decision is not None:
                store_constants(node, decision, activation, scales, stored)
        by_name |= _screened(model, layout, planned, editor, outcome)
        outcome.count("q-dq-pair", _insert_pairs(layout, by_name, ranges, planned, editor))
        for node, factor in respelled.stretched:
            _stretch(node, factor, editor)
        for node in tuple(model.graph):
            if node.op_type in _DIRECT and moves_data(node):
                _compute_directly(node)
        if outcome.applied:
            remove_dead(model)
        return outcome


def _insert_pairs(
    layout: Layout,
    by_name: Mapping[str | None, ir.Value],
    ranges: Ranges,
    planned: Mapping[str, Decision],
    editor: Editor,
) -> int:
    """Put every pair of a layout into the graph; returns how many there are."""
    if layout.activation is None:
        return 0
    quantized = frozenset(id(by_name[name]) for name in layout.source)
    inserted = 0
    for name, source in layout.source.items():
        value = by_name[name]
        readers = [
            (use.node, use.idx)
            for use in value.uses()
            if name in layout.rerouted or _takes_integers(use.node, quantized, planned)
        ]
        is_output = value.is_graph_output() and name in layout.rerouted
        if readers or is_output:
            parameters = _parameters(source, ranges, layout)
            real = _insert_pair(value, parameters, layout.activation, readers, editor)
            inserted += 1
            if is_output:
                _hand_over_output(value, real, editor.model.graph, editor)
    return inserted


def _stretch(node: ir.Node, factor: float, editor: Editor) -> None:
    """Let a node read its first operand times `factor`: the same integers at another scale."""
    real = producer(node.inputs[0], "DequantizeLinear")
    scale = None if real is None else constant(real.inputs[1])
    if real is None or scale is None:
        raise InternalError("the operand of a planned node is not dequantized", where=node.name)
    unit = editor.constant(
        np.asarray(np.float64(scale) * factor, np.float32), f"{node.name}/unit", graph_of(node)
    )
    stretched = editor.value(
        "DequantizeLinear",
        [real.inputs[0], unit, real.inputs[2]],
        before=node,
        stem=f"{node.name}/stretched",
        like=real.outputs[0],
    )
    node.replace_input_with(0, stretched)


def _compute_directly(node: ir.Node) -> None:
    """Let a node between DQ and Q of one scale move integers: onnxruntime does not drop these pairs."""
    real, behind = producer(node.inputs[0], "DequantizeLinear"), only_use(node.outputs[0])
    if real is None or behind is None or behind.op_type != "QuantizeLinear":
        return
    pairs = zip(real.inputs[1:], behind.inputs[1:], strict=True)
    if not all(np.array_equal(np.asarray(constant(a)), np.asarray(constant(b))) for a, b in pairs):
        return
    moved, result = node.outputs[0], behind.outputs[0]
    node.replace_input_with(0, real.inputs[0])
    if node.op_type == "Pad":
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, real.inputs[2])
    moved.type = copy.copy(result.type)
    ir.convenience.replace_all_uses_with(result, moved)


def _screened(
    model: Model, layout: Layout, planned: Mapping[str, Decision], editor: Editor, outcome: Outcome
) -> dict[str | None, ir.Value]:
    """Put a LeakyRelu of slope 1 behind nodes that are to stay float between integers: name -> its output.

    With DQ in front and Q behind, onnxruntime 1.31.1 makes an integer kernel of such a node by itself,
    of a Conv or Gemm even with a float weight (WeightBiasQuantization, one scale for all channels):
    taking it back to float would change nothing. The LeakyRelu stops that and costs nothing, for it is
    fused into the Conv or Gemm; Identity, Reshape and Clip would be optimised away first.
    """
    screened: dict[str | None, ir.Value] = {}
    outputs = [value for node in model.graph for value in node.outputs if value.name in layout.source]
    makers = {id(node): node for value in outputs if (node := _maker_above_moves(value)) is not None}
    for node in makers.values():
        if node.name in planned or node.op_type not in INTEGER_BY_ITSELF_OPS or node.domain:
            continue
        if not _reads_integers(node, layout.rerouted, planned):
            continue
        result, readers = node.outputs[0], tuple(node.outputs[0].uses())
        screen = editor.value(
            "LeakyRelu", [result], {"alpha": 1.0}, after=node, stem=f"{result.name}/float", like=result
        )
        for use in readers:
            use.node.replace_input_with(use.idx, screen)
        screened[result.name] = screen
        outcome.count("kept-float")
    return screened


def _maker_above_moves(value: ir.Value) -> ir.Node | None:
    """The node that computes a value, above those that move it or are absorbed."""
    node = value.producer()
    while node is not None and _is_transparent(node) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def _is_transparent(node: ir.Node) -> bool:
    return moves_data(node) or (node.op_type in ABSORBED_OPS and not node.domain)


def _reads_integers(node: ir.Node, rerouted: frozenset[str], planned: Mapping[str, Decision]) -> bool:
    """Whether all that a node computes with is dequantized; a MatMul and its bias Add count as one Gemm."""
    product = next((maker for value in node.inputs if (maker := producer(value, "MatMul"))), None)
    if node.op_type == "Add" and product is not None and product.name not in planned:
        return _is_dequantized(product.inputs[0], rerouted)
    operands = node.inputs[:1] if node.op_type in WEIGHTED - {"MatMul"} else node.inputs
    operands = node.inputs[1:] if node.op_type == "Where" else operands
    return all(_is_dequantized(value, rerouted) for value in operands)


def _is_dequantized(value: ir.Value | None, rerouted: frozenset[str]) -> bool:
    while value is not None and str(value.name) not in rerouted:
        maker = value.producer()
        value = maker.inputs[0] if maker is not None and _is_transparent(maker) else None
    return value is not None


def _parameters(source: str, ranges: Ranges, layout: Layout) -> tuple[Float32Array, IntArray]:
    """Scale and zero point of a tensor from the range of `source`."""
    limits = ranges.get(source)
    if limits is None or layout.activation is None:
        raise InternalError("a tensor to quantize has no calibrated range", where=source)
    if not np.isfinite(limits).all() or limits[0] > limits[1]:
        raise DataError(
            "a calibrated range is not usable",
            where=f"tensor {source!r}: from {limits[0]} to {limits[1]}",
            why="the model computes infinite values or NaN on the calibration data",
            remedy="check the data, or keep the nodes around it in float with --keep-float",
        )
    return affine_parameters(np.array(limits[0]), np.array(limits[1]), layout.activation)


def _insert_pair(
    value: ir.Value,
    parameters: tuple[Float32Array, IntArray],
    activation: Scheme,
    readers: Sequence[tuple[ir.Node, int]],
    editor: Editor,
) -> ir.Value:
    """Put Q and DQ behind `value` and let `readers` (node, input place) take the result."""
    maker, graph = value.producer(), editor.model.graph
    first = next(iter(graph)) if maker is None else None
    scale, zero_point = parameters
    unit = editor.constant(scale, f"{value.name}.scale", graph)
    zero = editor.constant(zero_point, f"{value.name}.zero_point", graph)
    quantized = editor.node(
        "QuantizeLinear",
        [_before_clip(value, parameters, activation), unit, zero],
        before=first,
        after=maker,
        stem=f"{value.name}/q",
        like=value,
        dtype=ir.DataType.INT8 if activation.dtype == "int8" else ir.DataType.UINT8,
    )
    real = editor.value(
        "DequantizeLinear",
        [quantized.outputs[0], unit, zero],
        after=quantized,
        stem=f"{value.name}/dq",
        like=value,
    )
    for node, place in readers:
        node.replace_input_with(place, real)
    return real


def _before_clip(value: ir.Value, parameters: tuple[Float32Array, IntArray], activation: Scheme) -> ir.Value:
    """What a Clip in front of a QuantizeLinear reads, if the integers saturate where it does.

    Within half a step, that is: then nothing is lost. onnxruntime drops a Clip only where its limits
    are exactly representable, and computes the convolution in front of any other in float.
    """
    clip = producer(value, "Clip")
    if clip is None or clip.inputs[0] is None:
        return value
    scale, zero_point = (np.float64(item) for item in parameters)
    for place, side, limit in zip((1, 2), (-1, 1), activation.limits, strict=True):
        bound = operand(clip, place)
        number = scalar(bound)
        if bound is not None and number is None:
            return value
        if number is not None and side * ((limit - zero_point) * scale - number) > _HALF_A_STEP * scale:
            return value
    return clip.inputs[0]


def _hand_over_output(value: ir.Value, real: ir.Value, graph: ir.Graph, editor: Editor) -> None:
    """Make `real` the graph output in the place and under the name of `value`."""
    name = value.name
    for place, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[place] = real
    value.name = editor.fresh_name(f"{name}/real")
    real.name = name


def _takes_integers(node: ir.Node, quantized: frozenset[int], planned: Mapping[str, Decision]) -> bool:
    """Whether a reader works on integers: a planned node, or one that moves data to a quantized tensor."""
    if (node.name or "") in planned:
        return True
    return moves_data(node) and any(id(value) in quantized for value in node.outputs)
