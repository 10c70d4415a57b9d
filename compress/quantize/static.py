"""Static INT8: Q/DQ pairs placed so that the runtime really runs integer kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import Editor, constant, is_constant, producer, remove_dead
from ...graph.errors import DataError, InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ...graph.scheme import IntArray, Scheme, affine_parameters, quantize
from ..operands import ABSORBED_OPS, CARRIED_OPS, COMPUTE_OPS, PASS_THROUGH_OPS, has_float_output, output_tail
from ..plan import Decision
from .weights import Float32Array, QuantizedWeight, quantize_weight, weight_integers

_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
_TRANSPARENT = PASS_THROUGH_OPS | ABSORBED_OPS
_MADE_INTEGER = COMPUTE_OPS | CARRIED_OPS | {"Softmax"}
_INT32_LIMIT = 2**31 - 1

Ranges = Mapping[str, tuple[float, float]]
"""Tensor name -> (minimum, maximum) of its values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tensors get a Q/DQ pair.

    `source` maps each such tensor's name to the one whose range it shares: operators that only
    move data keep scale and zero point. `activation` is the scheme of all of them. `rerouted`
    are tensors made by integer operators: every reader takes the dequantized value.
    """

    source: dict[str, str]
    rerouted: frozenset[str]
    activation: Scheme | None

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the tensors whose ranges calibration must find, in graph order."""
        return tuple(dict.fromkeys(self.source.values()))


def static_layout(model: Model, decisions: Sequence[Decision]) -> Layout:
    """Place Q/DQ pairs for the nodes that are planned static.

    Inputs of every planned node are quantized; so are their outputs, behind a Relu or Clip that the
    runtime absorbs. A MatMul's output stays float (see `has_float_output`) unless a planned node
    reads it. Where pooling or reshaping stands between, both sides share one range.
    Everything else, the mask of an attention above all, is never quantized.
    """
    planned = {item.node: item for item in decisions if item.form == "static"}
    wanted: dict[str, ir.Value] = {}
    rerouted: set[str] = set()
    for node in model.graph:
        if (node.name or "") not in planned:
            continue
        for value in node.inputs if node.op_type not in _WEIGHTED else node.inputs[:1]:
            if value is not None and not is_constant(value):
                wanted.setdefault(str(value.name), value)
        tail = output_tail(node)
        if not has_float_output(node):
            wanted.setdefault(str(tail.name), tail)
            rerouted.add(str(tail.name))
    source: dict[str, str] = {}
    for name, value in wanted.items():
        shared = _range_owner(value, wanted)
        source[name] = str(shared.name)
        if shared is not value:
            rerouted.add(name)
    scheme = next((item.activation for item in planned.values() if item.activation is not None), None)
    return Layout(source=source, rerouted=frozenset(rerouted), activation=scheme)


def _range_owner(value: ir.Value, wanted: Mapping[str, ir.Value]) -> ir.Value:
    """The tensor whose scale `value` shares: the next quantized one above operators that move data."""
    origin = value
    while True:
        maker = origin.producer()
        if maker is None or maker.op_type not in PASS_THROUGH_OPS or maker.inputs[0] is None:
            return value
        origin = maker.inputs[0]
        if str(origin.name) in wanted:
            return origin if origin is value else _range_owner(origin, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeStatic(Pass):
    """Insert the Q/DQ pairs of a layout and store the planned weights as int8, biases as int32."""

    decisions: tuple[Decision, ...]
    layout: Layout
    ranges: Ranges = dataclasses.field(default_factory=dict, repr=False)

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome, layout = Outcome(), self.layout
        if layout.activation is None:
            return outcome
        editor = Editor(model)
        by_name = {value.name: value for value in model.graph.inputs}
        by_name |= {value.name: value for node in model.graph for value in node.outputs}
        planned = {item.node: item for item in self.decisions if item.form == "static"}
        stored = _Stored(editor)
        scales = {name: _parameters(source, self.ranges, layout) for name, source in layout.source.items()}
        # Weights first: they read the scale of the data input, whose name is still the original one.
        for node in tuple(model.graph):
            decision = planned.get(node.name or "")
            if decision is not None:
                _store_constants(node, decision, layout.activation, scales, stored)
                outcome.count(f"{node.op_type}-static")
        by_name |= _screened(model, layout, planned, editor, outcome)
        quantized = frozenset(id(by_name[name]) for name in layout.source)
        for name in layout.source:
            value, parameters = by_name[name], scales[name]
            readers = [
                (use.node, use.idx)
                for use in value.uses()
                if name in layout.rerouted or _takes_integers(use.node, quantized, planned)
            ]
            is_output = value.is_graph_output() and name in layout.rerouted
            if readers or is_output:
                real = _insert_pair(value, parameters, layout.activation, readers, editor)
                outcome.count("q-dq-pair")
                if is_output:
                    _hand_over_output(value, real, model.graph, editor)
        if outcome.applied:
            remove_dead(model)
        return outcome


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
        if node.name in planned or node.op_type not in _MADE_INTEGER or node.domain:
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
    while node is not None and node.op_type in _TRANSPARENT and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def _reads_integers(node: ir.Node, rerouted: frozenset[str], planned: Mapping[str, Decision]) -> bool:
    """Whether all that a node computes with is dequantized; a MatMul and its bias Add count as one Gemm."""
    product = next((maker for value in node.inputs if (maker := producer(value, "MatMul"))), None)
    if node.op_type == "Add" and product is not None and product.name not in planned:
        return _is_dequantized(product.inputs[0], rerouted)
    operands = node.inputs[:1] if node.op_type in _WEIGHTED - {"MatMul"} else node.inputs
    return all(_is_dequantized(value, rerouted) for value in operands)


def _is_dequantized(value: ir.Value | None, rerouted: frozenset[str]) -> bool:
    while value is not None and str(value.name) not in rerouted:
        maker = value.producer()
        value = maker.inputs[0] if maker is not None and maker.op_type in _TRANSPARENT else None
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


class _Stored:
    """Constants in integers: each is stored once, however many nodes read it with the same scale."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._weights: dict[tuple[int, Scheme], QuantizedWeight] = {}
        self._values: dict[tuple[int, bytes], ir.Value] = {}

    def weight(self, value: ir.Value, scheme: Scheme) -> QuantizedWeight:
        """The integers and scales of a weight."""
        key = id(value), scheme
        if key not in self._weights:
            if value.const_value is None:
                raise InternalError("a planned node has no constant weight", where=value.name)
            self._weights[key] = quantize_weight(value.const_value, scheme)
        return self._weights[key]

    def dequantized(
        self,
        origin: ir.Value,
        contents: QuantizedWeight,
        zero_point: IntArray,
        *,
        node: ir.Node,
        suffix: str,
        axis: int | None = None,
    ) -> ir.Value:
        """A DequantizeLinear of stored integers in front of `node`, one for each reader."""
        (integers, scale), graph = contents, _graph(node)
        stem = f"{origin.name}.{suffix}"
        key = id(origin), scale.tobytes() + zero_point.tobytes() + suffix.encode()
        if key not in self._values:
            self._values[key] = self.editor.tensor(integers, stem, graph)
        stored = self._values[key]
        unit = self.editor.constant(np.asarray(scale, np.float32), f"{stem}.scale", graph)
        zero = self.editor.constant(zero_point, f"{stem}.zero_point", graph)
        return self.editor.value(
            "DequantizeLinear",
            [stored, unit, zero],
            {} if axis is None else {"axis": axis},
            before=node,
            stem=f"{stem}/dq",
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(integers.shape.numpy()),
        )


def _store_constants(
    node: ir.Node,
    decision: Decision,
    activation: Scheme,
    scales: Mapping[str, tuple[Float32Array, IntArray]],
    stored: _Stored,
) -> None:
    """Let a planned node read its weight and bias, or the constants it adds, from stored integers."""
    if node.op_type in _WEIGHTED:
        _store_weight(node, decision, scales, stored)
        return
    for place, value in enumerate(node.inputs):
        contents = constant(value)
        if value is None or contents is None or contents.dtype != np.float32:
            continue
        scale, zero_point = affine_parameters(contents.min(), contents.max(), activation)
        integers = quantize(contents.astype(np.float32), scale, zero_point, activation)
        made = QuantizedWeight(ir.tensor(integers), scale)
        node.replace_input_with(
            place, stored.dequantized(value, made, zero_point, node=node, suffix=activation.dtype)
        )


def _store_weight(
    node: ir.Node,
    decision: Decision,
    scales: Mapping[str, tuple[Float32Array, IntArray]],
    stored: _Stored,
) -> None:
    data, weight, scheme = node.inputs[0], node.inputs[1], decision.weight_scheme
    if data is None or weight is None or weight.const_value is None or scheme is None:
        raise InternalError("a planned node has no constant weight", where=decision.node)
    contents = stored.weight(weight, scheme)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    bias_values = constant(bias)
    if bias is not None and bias_values is not None:
        data_scale = scales[str(data.name)][0]
        flat = np.broadcast_to(bias_values.astype(np.float64).reshape(-1), contents.scale.shape)
        widened = _scale_for_bias(contents.scale, data_scale, flat)
        if not np.array_equal(widened, contents.scale):
            weight_values = np.asarray(weight.const_value.numpy(), np.float32)
            contents = QuantizedWeight(ir.tensor(weight_integers(weight_values, widened, scheme)), widened)
        unit = (contents.scale.astype(np.float64) * float(data_scale)).astype(np.float32)
        bias_integers = np.clip(np.rint(flat / unit), -_INT32_LIMIT, _INT32_LIMIT).astype(np.int32)
        made = QuantizedWeight(ir.tensor(bias_integers), unit)
        zeros = np.zeros(unit.shape, np.int32)
        node.replace_input_with(2, stored.dequantized(bias, made, zeros, node=node, suffix="int32", axis=0))
    zero_point = np.zeros(contents.scale.shape, np.int8)
    node.replace_input_with(
        1, stored.dequantized(weight, contents, zero_point, node=node, suffix="int8", axis=scheme.axis)
    )


def _scale_for_bias(
    scale: Float32Array, data_scale: Float32Array, bias: npt.NDArray[np.float64]
) -> Float32Array:
    """Weight scales large enough that each bias fits 31 bits at scale weight_scale * data_scale.

    Args:
        scale: (channels,).
        data_scale: ().
        bias: (channels,).
    """
    widened: Float32Array = np.maximum(scale, np.abs(bias) / (float(data_scale) * 2**30)).astype(np.float32)
    return widened


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
        [value, unit, zero],
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
    return node.op_type in PASS_THROUGH_OPS and id(node.outputs[0]) in quantized


def _graph(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise InternalError("a node stands in no graph", where=node.name)
    return node.graph
