"""A graph that computes in float16 or bfloat16: value types changed, Casts only where types meet."""

from __future__ import annotations

import copy
import dataclasses

import onnx_ir as ir

from ...graph.edit import Editor, is_constant, remove_dead
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ..plan import Decision
from .formats import TYPES, Format, rounded_tensor

__all__ = ["ConvertFloats", "is_float", "needs_float"]


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is known to be a float32 tensor."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def needs_float(node: ir.Node) -> list[int]:
    """The places of a node's float32 inputs."""
    return [place for place, value in enumerate(node.inputs) if is_float(value)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertFloats(Pass):
    """Let the nodes planned in a 16-bit form compute in it; all others, and the interface, stay float32.

    Each value has one type. Where a node reads the other one, a Cast stands directly behind the
    value's producer, one for all its readers, so that there are never two Casts in a row. Constants
    are rounded to nearest, ties to even, and stored in each type that is read.
    """

    decisions: tuple[Decision, ...]
    kind: Format

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        planned = {item.node for item in self.decisions if item.form == self.kind}
        nodes = [node for node in model.graph if (node.name or "") in planned]
        if not nodes:
            return outcome
        bridge = _Bridge(model, self.kind)
        for node in nodes:
            outcome.count(f"{node.op_type}-{self.kind}")
            for place in needs_float(node):
                value = node.inputs[place]
                if value is not None:
                    node.replace_input_with(place, bridge.lowered(value))
            for result in node.outputs:
                if is_float(result):
                    bridge.lower(result)
        outcome.count("cast", bridge.raise_readers({id(node) for node in nodes}) + bridge.casts)
        remove_dead(model)
        return outcome


class _Bridge:
    """The values that changed type, and the Casts and constants that carry others across."""

    def __init__(self, model: Model, kind: Format) -> None:
        self.model = model
        self.kind = kind
        self.dtype = TYPES[kind]
        self.editor = Editor(model)
        self.casts = 0
        self._low: dict[int, ir.Value] = {}
        self._carried: dict[int, ir.Value] = {}

    def lower(self, value: ir.Value) -> None:
        """Give the result of a converted node its new type."""
        value.type = ir.TensorType(self.dtype)
        self._low[id(value)] = value

    def lowered(self, value: ir.Value) -> ir.Value:
        """`value` (float32) in the 16-bit type: a constant of its own, or one Cast for all readers."""
        if id(value) not in self._carried:
            self._carried[id(value)] = self._constant(value) or self._cast(value, self.dtype, self.kind)
            self.casts += not is_constant(value)
        return self._carried[id(value)]

    def _constant(self, value: ir.Value) -> ir.Value | None:
        if not is_constant(value) or value.const_value is None:
            return None
        owner = value.graph if isinstance(value.graph, ir.Graph) else self.model.graph
        return self.editor.tensor(
            rounded_tensor(value.const_value, self.kind), f"{value.name}.{self.kind}", owner
        )

    def _cast(self, value: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Value:
        maker = value.producer()
        before = next(iter(self.model.graph)) if maker is None else None
        return self.editor.value(
            "Cast",
            [value],
            {"to": int(dtype)},
            before=before,
            after=maker,
            stem=f"{value.name}/{suffix}",
            like=value,
            dtype=dtype,
        )

    def raise_readers(self, converted: set[int]) -> int:
        """Let everything that still wants float32 read it behind a Cast; returns how many there are."""
        made = 0
        for value in self._low.values():
            readers = [use for use in value.uses() if id(use.node) not in converted]
            if not readers and not value.is_graph_output():
                continue
            real = self._cast(value, ir.DataType.FLOAT, "float")
            made += 1
            for use in readers:
                use.node.replace_input_with(use.idx, real)
            if value.is_graph_output():
                _hand_over(value, real, self.model.graph, self.editor)
        return made


def _hand_over(value: ir.Value, real: ir.Value, graph: ir.Graph, editor: Editor) -> None:
    """Make the float32 form of a value the graph's output, under the same name."""
    places = [place for place, output in enumerate(graph.outputs) if output is value]
    if not places:
        raise InternalError("a converted value is the output of another graph", where=value.name)
    name, value.name = value.name, editor.fresh_name(f"{value.name}/low")
    real.name = name
    real.shape = copy.copy(value.shape)
    for place in places:
        graph.outputs[place] = real
