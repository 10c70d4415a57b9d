"""The first layer in float: its input is not rounded, and on x86 it costs no time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, constant, static_dim
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ..operands import output_tail
from ..plan import Plan
from ..quantize.constants import graph_of

FLOAT_ENTRY = "float-entry"
"""The name under which a recipe's `fusions` switches it."""

_FEW_CHANNELS = 4
_REASON = "in float it is no slower here, and the model's input is not rounded"


def entries(model: Model) -> list[ir.Node]:
    """Convolutions of at most 4 channels of a graph input: integer kernels have little to gain there."""
    inputs = set(model.graph.inputs)
    found = []
    for node in model.graph:
        if node.op_type != "Conv" or node.domain or node.inputs[0] not in inputs:
            continue
        width = static_dim(node.inputs[1], 1)
        if width is not None and width <= _FEW_CHANNELS and constant(node.inputs[1]) is not None:
            found.append(node)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelayEntry(Pass):
    """Hand the result of a float convolution on through a 1x1 convolution by the identity.

    Between Q/DQ of one scale it copies integers exactly. onnxruntime 1.31.1 lays integer kernels out
    channels last only from a QLinearConv on: a residual Add that reads a quantized float result as well
    would draw all of its stream back to channels first, with two transpositions a block (ResNet-20 at
    batch 1: 0.344 ms so, 0.322 ms with the relay).
    """

    nodes: tuple[str, ...]

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome, editor = Outcome(), Editor(model)
        for node in tuple(model.graph):
            if node.name not in self.nodes:
                continue
            tail, weight = output_tail(node), constant(node.inputs[1])
            readers = tuple(tail.uses())
            if weight is None or tail.is_graph_output() or all(use.node.op_type == "Conv" for use in readers):
                outcome.refuse(node.name or "", FLOAT_ENTRY, "only convolutions read its result")
                continue
            ones = [1] * (weight.ndim - 2)
            channels = weight.shape[0]
            identity = np.eye(channels, dtype=np.float32).reshape(channels, channels, *ones)
            stem = f"{node.name}/relay"
            copied = editor.node(
                "Conv",
                [tail, editor.tensor(ir.tensor(identity), f"{stem}.weight", graph_of(node))],
                {"kernel_shape": ones},
                after=tail.producer(),
                stem=stem,
                like=tail,
            )
            for use in readers:
                use.node.replace_input_with(use.idx, copied.outputs[0])
            outcome.count(FLOAT_ENTRY)
        return outcome


def entry_in_float(plan: Plan, model: Model, nodes: Sequence[str]) -> Plan:
    """The plan with these convolutions in float and the relays behind them in integers.

    Args:
        plan: for the model before `RelayEntry`.
        model: the model after it.
        nodes: names of the convolutions.
    """
    pattern = next(item for item in plan.decisions if item.form == "static" and item.op == "Conv")
    made = []
    for item in plan.decisions:
        made.append(item.in_float(_REASON) if item.node in nodes and item.form != "float" else item)
    named = {node.name: node for node in model.graph}
    for name in nodes:
        reader = next((use.node for use in output_tail(named[name]).uses()), None)
        weight = None if reader is None or len(reader.inputs) < 2 else reader.inputs[1]
        if reader is None or weight is None or reader.name in {item.node for item in made}:
            continue
        if reader.op_type == "Conv":
            relay = msgspec.structs.replace(
                pattern,
                node=str(reader.name),
                group=str(reader.name),
                weight=weight.name,
                reason="copies integers, so that the layers behind stay in their layout",
                macs=None,
            )
            made.append(relay)
    return plan.with_decisions(made)
