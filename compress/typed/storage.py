"""Weights stored in 16 bits and computed with in float32: half the file, the same kernels.

A runtime without 16-bit kernels folds the Cast behind a stored weight when it loads the file, and
runs what it runs for float32. Of a table only the rows that are looked up are cast: it stays small
in memory too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from ...graph.edit import Editor, bodies, is_constant, remove_dead
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ...runtimes.base import SessionOptions
from ...runtimes.ort_runtime import optimised_graph
from ...targets.profile import TargetProfile
from ..operands import COMPUTE_OPS, RECURRENT_OPS, TABLE_OPS, reads_rows
from ..plan import Decision
from .formats import TYPES, Format, Loss, rounded_tensor, tensor_loss

STORED_OPS = COMPUTE_OPS | RECURRENT_OPS | frozenset({"Gather"})
STORAGE_FORMATS: Mapping[str, Format] = {"bf16-storage": "bf16", "fp16-storage": "fp16"}
SMALLEST_ELEMENTS = 1024
"""Smaller weights stay float32: all of a model's together are a small part of its file."""


def weights_of(node: ir.Node) -> Iterator[ir.Value]:
    """The constant operands of a node that hold its weights: biases and norm scales are none."""
    if node.op_type not in STORED_OPS or node.domain not in ("", "ai.onnx"):
        return
    if node.op_type in RECURRENT_OPS:
        places = [1, 2]
    elif node.op_type == "Gather":
        places = [0]
    else:
        places = [1] if node.op_type in ("Conv", "ConvTranspose") else [0, 1]
    for place in places:
        value = node.inputs[place] if place < len(node.inputs) else None
        if value is not None and is_constant(value):
            yield value


def storable(value: ir.Value, kind: Format) -> tuple[str | None, Loss | None]:
    """(why a weight cannot be stored in 16 bits or None, what storing it so loses if that was looked at)."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return f"its type is {'unknown' if tensor is None else tensor.dtype.name}, not FLOAT", None
    if tensor.size < SMALLEST_ELEMENTS:
        return f"it has fewer than {SMALLEST_ELEMENTS:,} elements", None
    if value.is_graph_output():
        return "it is an output of the graph", None
    loss = tensor_loss(tensor, kind)
    return loss.reason(kind), loss


def unfolded_casts(model_file: Path, profile: TargetProfile) -> list[str]:
    """The stored weights that the runtime still casts on every run, by name; none is what is planned.

    Args:
        model_file: a model with stored weights.
        profile: gives the config entries under which this machine's runtime optimises like the target's.
    """
    graph = optimised_graph(model_file, SessionOptions(config=dict(profile.audit_config))).graph
    stored = set(TYPES.values())
    return [
        str(value.name)
        for node in graph.all_nodes()
        if node.op_type == "Cast" and (value := node.inputs[0]) is not None
        if value.producer() is None and value.dtype in stored
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreWeights(Pass):
    """Store the weights of the planned nodes as bfloat16 or float16, behind a Cast to float32.

    The Cast takes the weight's name, and every reader reads it, also those that were not planned:
    a weight is stored once. The rows of a table that is only looked up are cast one by one.
    """

    decisions: tuple[Decision, ...]

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome, editor = Outcome(), Editor(model)
        planned = {item.node: item.form for item in self.decisions if item.form in STORAGE_FORMATS}
        seen: set[int] = set()
        for node in tuple(model.graph.all_nodes()):
            form = planned.get(node.name or "")
            if form is None:
                continue
            for value in weights_of(node):
                if id(value) in seen:
                    continue
                seen.add(id(value))
                kind = STORAGE_FORMATS[form]
                if storable(value, kind)[0] is None:
                    outcome.count(form)
                    _store(value, kind, editor)
        if outcome.applied:
            remove_dead(model)
        return outcome


def _store(value: ir.Value, kind: Format, editor: Editor) -> None:
    owner, tensor, name = value.graph, value.const_value, value.name or "weight"
    if not isinstance(owner, ir.Graph) or tensor is None:
        raise InternalError("a planned weight stands in no graph", where=name)
    stored = editor.tensor(rounded_tensor(tensor, kind), f"{name}.{kind}", owner)
    readers = list(value.uses())
    if readers and all(_looks_up(use.node, value) for use in readers):
        for use in readers:
            _cast_rows(use.node, stored, kind, editor)
        return
    first = owner[0]
    real = editor.value("Cast", [stored], {"to": int(ir.DataType.FLOAT)}, before=first, stem=name, like=value)
    ir.convenience.replace_all_uses_with(value, real)
    del owner.initializers[name]
    real.name = name


def _looks_up(node: ir.Node, table: ir.Value) -> bool:
    """Whether a node only takes whole rows of a table, and hands them to nobody's subgraph."""
    return node.op_type in TABLE_OPS and reads_rows(node, table) and not bodies(node)


def _cast_rows(node: ir.Node, stored: ir.Value, kind: Format, editor: Editor) -> None:
    rows = node.outputs[0]
    node.replace_input_with(0, stored)
    real = editor.value(
        "Cast", [rows], {"to": int(ir.DataType.FLOAT)}, after=node, stem=f"{rows.name}/float", like=rows
    )
    rows.type = ir.TensorType(TYPES[kind])
    readers = [use for use in rows.uses() if use.node is not real.producer()]
    for use in readers:
        use.node.replace_input_with(use.idx, real)
    if rows.is_graph_output():
        name = rows.name
        for place, output in enumerate(editor.model.graph.outputs):
            if output is rows:
                editor.model.graph.outputs[place] = real
        rows.name = editor.fresh_name(f"{name}/stored")
        real.name = name
