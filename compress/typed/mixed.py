"""Plans with INT8 and 16-bit floats: the float remainder of an INT8 plan, where it pays."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec
import onnx_ir as ir

from ...graph.edit import is_constant
from ...graph.model import Model
from ...targets.profile import TargetProfile
from ..cost import bind_axes, concrete_shape
from ..plan import Decision, Plan, TypedForm
from .convert import is_float
from .formats import TYPE_NAMES, Format
from .propose import HEAVY_OPS, propose_compute, propose_storage
from .storage import STORAGE_FORMATS

CAST_MACS = 8.0
"""What casting one element costs, in float32 multiply-accumulates, rounded up: 2.1 instructions against
0.31 (64 x 1024 elements, a 64 x 1024 x 256 MatMul, onnxruntime 1.31.1, QEMU 7.2 -cpu cortex-a76): a model
of the cost, not time."""


def remainder(
    model: Model,
    profile: TargetProfile,
    plan: Plan,
    form: TypedForm,
    *,
    keep_float: Sequence[str] = (),
    largest: Mapping[str, float] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    excluded: Collection[str] = (),
) -> Plan:
    """The plan with the 16-bit form for what it leaves in float32; what is INT8 stays as it is.

    Where the target computes in 16 bits, nodes that follow one another are judged together: they stay
    float32 if the Casts around them cost more than they save. Elsewhere weights are stored in 16 bits.

    Args:
        model: the prepared float graph, its value types inferred; not changed.
        profile: the target.
        plan: an INT8 plan for that graph.
        form: as `request.remainder_form` says.
        keep_float: regular expressions searched in node and weight names.
        largest: tensor name -> largest magnitude that was seen, for computing forms.
        shapes: input name -> shape, for counting work.
        excluded: groups that stay float32 (the drift limit asked for it).
    """
    taken = {item.node: "it computes in INT8" for item in plan.quantized()}
    if form in STORAGE_FORMATS:
        typed = propose_storage(model, profile, form, keep_float=keep_float, taken=taken)
    else:
        kind: Format = "fp16" if form == "fp16" else "bf16"
        typed = propose_compute(model, profile, kind, keep_float=keep_float, largest=largest, taken=taken)
        if profile.runtime.name == "onnxruntime":
            typed = _without_costly_casts(model, profile, typed, kind, shapes or {})
    typed = typed.revert(frozenset(excluded) & set(typed.groups), "float32 to hold the drift limit")
    return _merged(model, plan, typed)


def _merged(model: Model, plan: Plan, typed: Plan) -> Plan:
    """The INT8 decisions, and the 16-bit ones for nodes that have none, in the graph's order."""
    known = {item.node: item for item in plan.decisions}
    found = {item.node: item for item in typed.decisions if item.form != "float"}
    made: dict[str, Decision] = {}
    for node in model.graph.all_nodes():
        name = node.name or ""
        earlier, other = known.get(name), found.get(name)
        if earlier is not None and (earlier.form != "float" or other is None):
            made[name] = earlier
        elif other is not None:
            why = "" if earlier is None else f"; not INT8: {earlier.reason}"
            made[name] = msgspec.structs.replace(other, reason=other.reason + why)
    return plan.with_decisions(made.values())


def _without_costly_casts(
    model: Model, profile: TargetProfile, typed: Plan, kind: Format, shapes: Mapping[str, tuple[int, ...]]
) -> Plan:
    """The typed plan without the islands whose Casts cost more than their arithmetic saves."""
    sizes = bind_axes(model, shapes)
    planned = {item.node: item for item in typed.decisions if item.form == kind}
    back: dict[str, str] = {}
    for island in _islands(node for node in model.graph if node.name in planned):
        saved = sum(_saved_macs(planned[node.name or ""], profile, kind) for node in island)
        if any(node.op_type in HEAVY_OPS and planned[node.name or ""].macs is None for node in island):
            continue
        elements = _cast_elements(island, sizes)
        if elements is not None and saved < CAST_MACS * elements:
            reason = (
                f"{TYPE_NAMES[kind]} would save the time of {saved:,.0f} multiply-accumulates and cast "
                f"{elements:,} elements"
            )
            back |= {node.name or "": reason for node in island}
    return typed.with_decisions(
        item.in_float(back[item.node]) if item.node in back else item for item in typed.decisions
    )


def _saved_macs(item: Decision, profile: TargetProfile, kind: Format) -> float:
    kernel = profile.kernel(item.op, "float", activation=TYPE_NAMES[kind])
    speedup = 1.0 if kernel is None or kernel.speedup_over_float is None else kernel.speedup_over_float
    return (item.macs or 0) * (1.0 - 1.0 / speedup)


def _islands(nodes: Iterable[ir.Node]) -> list[list[ir.Node]]:
    """Nodes that read one another's results, together; every node in the graph's order."""
    islands: dict[int, list[ir.Node]] = {}
    home: dict[int, int] = {}
    for node in nodes:
        makers = (None if value is None else value.producer() for value in node.inputs)
        joined = sorted({home[id(maker)] for maker in makers if maker is not None and id(maker) in home})
        own = joined[0] if joined else len(home)
        merged = [member for number in joined for member in islands.pop(number)] + [node]
        islands[own] = merged
        home |= {id(member): own for member in merged}
    return list(islands.values())


def _cast_elements(island: Sequence[ir.Node], sizes: Mapping[str, int]) -> int | None:
    """Elements of the float tensors that enter or leave an island; None where a shape is not known."""
    inside = {id(node) for node in island}
    crossing: dict[int, ir.Value] = {}
    for node in island:
        for value in node.inputs:
            if value is None or not is_float(value) or is_constant(value):
                continue
            if id(value.producer()) not in inside:
                crossing[id(value)] = value
        for value in node.outputs:
            if value.is_graph_output() or any(id(use.node) not in inside for use in value.uses()):
                crossing[id(value)] = value
    total = 0
    for value in crossing.values():
        shape = concrete_shape(value, sizes)
        if shape is None:
            return None
        size = 1
        for dim in shape:
            size *= dim
        total += size
    return total
