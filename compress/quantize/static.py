"""Static INT8: Q/DQ pairs placed so that the runtime really runs integer kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import Editor, constant, is_constant, only_use, remove_dead
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ...graph.scheme import IntArray, Scheme, affine_parameters
from ..plan import Decision
from ..propose import ABSORBED_OPS, PASS_THROUGH_OPS
from .weights import Float32Array, QuantizedWeight, quantize_weight, weight_integers

_OUTPUT_STAYS_FLOAT = frozenset({"MatMul"})
_INT32_LIMIT = 2**31 - 1
QDQ_OPSET = 13

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
    runtime absorbs. A MatMul's output stays float (its kernel scales back at no cost) unless a
    planned node reads it. Where pooling or reshaping stands between, both sides share one range.
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
        if node.op_type not in _OUTPUT_STAYS_FLOAT:
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


_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})


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


def output_tail(node: ir.Node) -> ir.Value:
    """The output of a node, or of the Relu or Clip behind it if nothing else reads it."""
    value = node.outputs[0]
    reader = only_use(value)
    if reader is not None and reader.op_type in ABSORBED_OPS and not reader.domain:
        return reader.outputs[0]
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeStatic(Pass):
    """Insert the Q/DQ pairs of a layout and store the planned weights as int8, biases as int32."""

    decisions: tuple[Decision, ...]
    ranges: Ranges = dataclasses.field(default_factory=dict, repr=False)

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        layout = static_layout(model, self.decisions)
        if layout.activation is None:
            return outcome
        editor = Editor(model)
        by_name = {value.name: value for value in model.graph.inputs}
        by_name |= {value.name: value for node in model.graph for value in node.outputs}
        planned = {item.node: item for item in self.decisions if item.form == "static"}
        scales: dict[str, tuple[Float32Array, IntArray]] = {}
        # Weights first: they read the scale of the data input, whose name is still the original one.
        for name, source in layout.source.items():
            limits = self.ranges.get(source)
            if limits is None:
                raise InternalError("a tensor to quantize has no calibrated range", where=source)
            scales[name] = affine_parameters(np.array(limits[0]), np.array(limits[1]), layout.activation)
        for node in tuple(model.graph):
            decision = planned.get(node.name or "")
            if decision is not None:
                _store_constants(node, decision, layout, scales, editor)
                outcome.count(f"{node.op_type}-static")
        readers = set(planned)
        for name in layout.source:
            _insert_pair(by_name[name], scales[name], layout, readers, editor)
            outcome.count("q-dq-pair")
        remove_dead(model)
        return outcome


def _store_constants(
    node: ir.Node,
    decision: Decision,
    layout: Layout,
    scales: Mapping[str, tuple[Float32Array, IntArray]],
    editor: Editor,
) -> None:
    if node.op_type in _WEIGHTED:
        data, weight = node.inputs[0], node.inputs[1]
        if data is None or weight is None or weight.const_value is None or decision.weight_scheme is None:
            raise InternalError("a planned node has no constant weight", where=decision.node)
        integers, scale = quantize_weight(weight.const_value, decision.weight_scheme)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        data_scale = scales[str(data.name)][0]
        bias_values = None if bias is None else constant(bias)
        if bias_values is not None:
            widened = _scale_for_bias(scale, data_scale, bias_values.astype(np.float64))
            if not np.array_equal(widened, scale):
                weight_values = np.asarray(weight.const_value.numpy(), np.float32)
                integers = ir.tensor(weight_integers(weight_values, widened, decision.weight_scheme))
                scale = widened
        stored = _dequantized(
            QuantizedWeight(integers, scale), decision.weight_scheme.axis, f"{weight.name}.int8", node, editor
        )
        node.replace_input_with(1, stored)
        if bias is not None and bias_values is not None:
            unit = (scale.astype(np.float64) * float(data_scale)).astype(np.float32)
            bias_integers = np.rint(bias_values.astype(np.float64) / unit)
            clipped = np.clip(bias_integers, -_INT32_LIMIT, _INT32_LIMIT).astype(np.int32)
            axis = 0 if unit.ndim else None
            stored_bias = _dequantized(
                QuantizedWeight(ir.tensor(clipped), unit), axis, f"{bias.name}.int32", node, editor
            )
            node.replace_input_with(2, stored_bias)
        return
    for place, value in enumerate(node.inputs):
        contents = constant(value) if value is not None else None
        if value is not None and contents is not None and contents.dtype == np.float32 and layout.activation:
            scale, zero_point = affine_parameters(contents.min(), contents.max(), layout.activation)
            zero = editor.constant(zero_point, f"{value.name}.zero_point", _graph(node))
            unit_value = editor.constant(scale, f"{value.name}.scale", _graph(node))
            quantized = editor.value(
                "QuantizeLinear",
                [value, unit_value, zero],
                before=node,
                stem=f"{value.name}/q",
                like=value,
                dtype=_dtype(layout.activation),
            )
            real = editor.value(
                "DequantizeLinear",
                [quantized, unit_value, zero],
                before=node,
                stem=f"{value.name}/dq",
                like=value,
            )
            node.replace_input_with(place, real)


def _scale_for_bias(
    scale: Float32Array, data_scale: Float32Array, bias: npt.NDArray[np.float64]
) -> Float32Array:
    """Weight scales large enough that each bias fits 31 bits at scale weight_scale * data_scale."""
    needed = np.abs(bias) / (float(data_scale) * (2**30))
    widened: Float32Array = np.maximum(scale, needed if scale.ndim else needed.max(initial=0.0)).astype(
        np.float32
    )
    return widened


def _dequantized(
    stored: QuantizedWeight, axis: int | None, stem: str, node: ir.Node, editor: Editor
) -> ir.Value:
    """A DequantizeLinear of stored integers in front of `node`; symmetric, so the zero point is 0."""
    graph, (integers, scale) = _graph(node), stored
    contents = editor.tensor(integers, stem, graph)
    unit = editor.constant(np.asarray(scale, np.float32), f"{stem}.scale", graph)
    zero = editor.constant(np.zeros(scale.shape, integers.dtype.numpy()), f"{stem}.zero_point", graph)
    return editor.value(
        "DequantizeLinear",
        [contents, unit, zero],
        {} if axis is None else {"axis": axis},
        before=node,
        stem=f"{stem}/dq",
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(integers.shape.numpy()),
    )


def _insert_pair(
    value: ir.Value,
    parameters: tuple[Float32Array, IntArray],
    layout: Layout,
    planned: set[str],
    editor: Editor,
) -> None:
    """Put Q and DQ behind `value` and let the readers that the layout names take the result."""
    assert layout.activation is not None
    readers = [
        (use.node, use.idx)
        for use in value.uses()
        if str(value.name) in layout.rerouted or _takes_integers(use.node, layout, planned)
    ]
    is_output = value.is_graph_output() and str(value.name) in layout.rerouted
    if not readers and not is_output:
        return
    maker, graph = value.producer(), editor.model.graph
    first = next(iter(graph)) if maker is None else None
    scale, zero_point = parameters
    unit = editor.constant(scale, f"{value.name}.scale", graph)
    zero = editor.constant(zero_point, f"{value.name}.zero_point", graph)
    quantize = editor.node(
        "QuantizeLinear",
        [value, unit, zero],
        before=first,
        after=maker,
        stem=f"{value.name}/q",
        like=value,
        dtype=_dtype(layout.activation),
    )
    real = editor.value(
        "DequantizeLinear",
        [quantize.outputs[0], unit, zero],
        after=quantize,
        stem=f"{value.name}/dq",
        like=value,
    )
    for node, place in readers:
        node.replace_input_with(place, real)
    if is_output:
        _hand_over_output(value, real, graph, editor)


def _hand_over_output(value: ir.Value, real: ir.Value, graph: ir.Graph, editor: Editor) -> None:
    """Make `real` the graph output in the place and under the name of `value`."""
    place = next(index for index, output in enumerate(graph.outputs) if output is value)
    name = value.name
    graph.outputs[place] = real
    value.name = editor.fresh_name(f"{name}/real")
    real.name = name


def _takes_integers(node: ir.Node, layout: Layout, planned: set[str]) -> bool:
    """Whether a reader works on integers: a planned node, or one that moves data to a quantized tensor."""
    if (node.name or "") in planned:
        return True
    return node.op_type in PASS_THROUGH_OPS and str(node.outputs[0].name) in layout.source


def _graph(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise InternalError("a node stands in no graph", where=node.name)
    return node.graph


def _dtype(scheme: Scheme) -> ir.DataType:
    return ir.DataType.INT8 if scheme.dtype == "int8" else ir.DataType.UINT8
