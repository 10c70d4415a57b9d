"""The float type of a graph's inputs and outputs: float32 as the model has them, or 16 bits."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import msgspec
import onnx_ir as ir

from ...graph.edit import Editor, is_constant, remove_dead
from ...graph.passes import Outcome, Pass
from .convert import is_float
from .formats import TYPE_NAMES, TYPES, Format, rounded_tensor

if TYPE_CHECKING:
    from ...graph.model import Model, TensorSpec
    from ...graph.passes import Interface


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertInterface(Pass):
    """Let the graph take and give 16-bit floats where it has float32; names, order and shapes stay.

    What computes in that type already reads the input and makes the output itself; elsewhere one Cast
    stands behind an input and one in front of an output. Other types are left alone.
    """

    kind: Format

    def interface(self, before: Interface) -> Interface:
        """Every float32 tensor of the interface in 16 bits."""
        inputs, outputs = (tuple(self._changed(spec) for spec in specs) for specs in before)
        return inputs, outputs

    def _changed(self, spec: TensorSpec) -> TensorSpec:
        made = TYPE_NAMES[self.kind] if spec.dtype == "float32" else spec.dtype
        return msgspec.structs.replace(spec, dtype=made)

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome, editor = Outcome(), Editor(model)
        dtype = TYPES[self.kind]
        for value in model.graph.inputs:
            if is_float(value) and value.name not in model.graph.initializers:
                _take(value, dtype, editor)
                outcome.count("input")
        for value in tuple(dict.fromkeys(model.graph.outputs)):
            if is_float(value):
                _give(value, self.kind, editor)
                outcome.count("output")
        remove_dead(model)
        return outcome


def _take(value: ir.Value, dtype: ir.DataType, editor: Editor) -> None:
    """Change an input's type; who reads float32 reads it behind one Cast."""
    readers = list(value.uses())
    value.type = ir.TensorType(dtype)
    others = []
    for use in readers:
        made = use.node.outputs[0] if use.node.op_type == "Cast" and use.node.outputs else None
        if made is not None and made.dtype == dtype and not made.is_graph_output():
            ir.convenience.replace_all_uses_with(made, value)
        else:
            others.append(use)
    if others:
        real = editor.value(
            "Cast",
            [value],
            {"to": int(ir.DataType.FLOAT)},
            before=editor.model.graph[0],
            stem=f"{value.name}/float",
            like=value,
            dtype=ir.DataType.FLOAT,
        )
        for use in others:
            use.node.replace_input_with(use.idx, real)


def _give(value: ir.Value, kind: Format, editor: Editor) -> None:
    """Make the 16-bit form of a value the graph's output, under the same name."""
    graph, name, maker = editor.model.graph, value.name, value.producer()
    low = maker.inputs[0] if maker is not None and maker.op_type == "Cast" else None
    if is_constant(value) and value.const_value is not None:
        low = editor.tensor(rounded_tensor(value.const_value, kind), f"{name}.{kind}", graph)
    elif low is None or low.dtype != TYPES[kind] or low.producer() is None or low.is_graph_output():
        low = editor.value(
            "Cast", [value], {"to": int(TYPES[kind])}, after=maker, stem=f"{name}/low", like=value,
            dtype=TYPES[kind],
        )  # fmt: skip
    _rename(value, editor.fresh_name(f"{name}/float"), graph)
    _rename(low, name or "", graph)
    low.shape = copy.copy(value.shape)
    for place, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[place] = low


def _rename(value: ir.Value, name: str, graph: ir.Graph) -> None:
    """Give a value another name, in the graph's table of constants, too."""
    stored = graph.initializers.pop(value.name or "", None) if value.const_value is not None else None
    value.name = name
    if stored is not None:
        graph.register_initializer(value)
