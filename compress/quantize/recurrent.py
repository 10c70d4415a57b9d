"""Dynamic INT8 of recurrent layers: onnxruntime's DynamicQuantizeLSTM."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import Editor, constant, remove_dead
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ...graph.scheme import Scheme
from ..plan import Decision
from .weights import Float32Array, require_finite, weight_integers, weight_scale

_LSTM_INPUTS = 8
"""X, W, R, B, sequence_lens, initial_h, initial_c, P."""


def recurrent_weight(weight: Float32Array, scheme: Scheme) -> tuple[npt.NDArray[np.int8], Float32Array]:
    """Integers and scales of the weights of a recurrent layer, as DynamicQuantizeLSTM takes them.

    Args:
        weight: float32 [directions, gates * hidden, inputs], as LSTM has it.
        scheme: symmetric int8; each direction has scales of its own.

    Returns:
        integers: int8 [directions, inputs, gates * hidden].
        scale: float32 [directions, gates * hidden], one per output, strictly positive.

    Source: onnxruntime contrib operator com.microsoft.DynamicQuantizeLSTM.
    """
    columns = msgspec.structs.replace(scheme, axis=0)
    scales = [weight_scale(side, columns) for side in weight]
    integers = [weight_integers(side, scale, columns).T for side, scale in zip(weight, scales, strict=True)]
    return np.ascontiguousarray(np.stack(integers)).astype(np.int8), np.stack(scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeRecurrent(Pass):
    """Turn planned LSTM nodes into com.microsoft.DynamicQuantizeLSTM.

    The input is quantized once and the state at every step, both while running; the gates, the
    biases, peepholes and the cell state stay float. Every other attribute and input stays as it is.
    """

    decisions: tuple[Decision, ...]

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        planned = {item.node: item for item in self.decisions if item.form == "dynamic" and item.op == "LSTM"}
        for graph in model.all_graphs():
            for node in tuple(graph):
                decision = planned.get(node.name or "")
                if decision is not None and node.op_type == "LSTM":
                    _to_integers(node, decision, graph, editor)
                    outcome.count("LSTM-dynamic")
        if outcome.applied:
            remove_dead(model)
        return outcome


def _to_integers(node: ir.Node, decision: Decision, graph: ir.Graph, editor: Editor) -> None:
    if decision.weight_scheme is None:
        raise InternalError("a planned LSTM has no weight scheme", where=decision.node)
    inputs = [*node.inputs, *[None] * (_LSTM_INPUTS - len(node.inputs))]
    for place in (1, 2):
        value = node.inputs[place]
        contents = constant(value)
        if value is None or contents is None:
            raise InternalError("a planned node has no constant weight", where=decision.node)
        weight = np.asarray(contents, np.float32)
        require_finite(weight, value.name)
        integers, scale = recurrent_weight(weight, decision.weight_scheme)
        owner = value.graph if isinstance(value.graph, ir.Graph) else graph
        inputs[place] = editor.tensor(ir.tensor(integers), f"{value.name}.int8", owner)
        inputs += [
            editor.constant(scale, f"{value.name}.scale", owner),
            editor.constant(np.zeros(scale.shape, np.int8), f"{value.name}.zero_point", owner),
        ]
    made = ir.node(
        "DynamicQuantizeLSTM",
        inputs,
        attributes={name: item for name, item in node.attributes.items() if name != "layout"},
        domain="com.microsoft",
        num_outputs=len(node.outputs),
    )
    model = editor.model.graph
    model.opset_imports.setdefault("com.microsoft", 1)
    node.prepend(made)
    for old, new in zip(node.outputs, made.outputs, strict=True):
        _take_over(old, new, editor)
    graph.remove(node, safe=True)
    made.name = node.name


def _take_over(old: ir.Value, new: ir.Value, editor: Editor) -> None:
    name, was_output = str(old.name), old.is_graph_output()
    new.name = editor.fresh_name(f"{name}/int8")
    if not (old.uses() or was_output):
        new.name = ""  # an output that nothing reads is left out, as it was
        return
    editor.replace(old, new)
    if not was_output:
        old.name = editor.fresh_name(f"{name}/before")
        new.name = name
