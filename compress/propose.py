"""Deciding, node by node, what runs in integers on a target: `propose` makes the first plan."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

import msgspec
import onnx_ir as ir

from ..graph.edit import is_constant, only_use, rank
from ..graph.errors import InternalError
from ..graph.model import Model
from ..graph.scheme import IntegerType, Scheme
from ..targets.profile import Form, TargetProfile
from .choice import UNMEASURED_REMEDY, Choice, Verdict, choose_kernel, does_not_pay, unmeasured
from .cost import bind_axes, led_by_convolutions, node_macs
from .operands import (
    ABSORBED_OPS,
    CARRIED_OPS,
    COMPUTE_OPS,
    CONVOLUTIONS,
    FLOAT_OUTPUT_OPS,
    FORM_OPSETS,
    ISLAND_OPS,
    RECURRENT_OPS,
    TABLE_OPS,
    channel_axis,
    computed_once,
    data_operands,
    is_liftable,
    is_quantized,
    moves_data,
    only_leaves_graph,
    output_tail,
    reads_rows,
    resize_mode,
    unfit,
    unfit_carried,
    unfit_recurrent,
    unfit_weight,
    weight_name,
)
from .plan import Decision, Plan

__all__ = ["Request", "alternatives", "is_quantized", "propose"]

_SMALL_TABLE_BYTES = 1 << 14
_HEAD_SHARE = 0.01
_STATIC_REMEDY = "pass --quantization static with --calib DATA"
_DYNAMIC_REMEDY = "pass --quantization auto or dynamic"
_WORKING_OPS = COMPUTE_OPS | RECURRENT_OPS
_OTHER_FORMS: Mapping[Form, tuple[Form, ...]] = {"dynamic": ("weight-only",), "static": ("dynamic",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked of quantization, and what is settled already.

    `keep_float` are regular expressions searched in node and weight names; `calibrated` says that
    data for static ranges is there; `shapes` fixes input shapes for counting work. `allow_unmeasured`
    takes lowerings that have no evidence at all; `verdicts` are forms of nodes that were timed or
    pinned, `static_activation` the type of static activations, both in place of the profile's word.
    """

    quantization: Literal["auto", "dynamic", "static", "weight-only"] = "auto"
    keep_float: tuple[str, ...] = ()
    calibrated: bool = False
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    tables: bool = True
    allow_unmeasured: bool = False
    verdicts: Mapping[str, Verdict] = dataclasses.field(default_factory=dict)
    static_activation: IntegerType | None = None


def propose(model: Model, profile: TargetProfile, request: Request) -> Plan:
    """The fastest plan that the target's kernel table knows for this graph, before any measuring.

    Every MatMul, Gemm, convolution, embedding table and connecting operator gets a decision with
    its reason; what stays float also gets the remedy, where there is one.
    """
    proposer = _Proposer(model, profile, request)
    decisions = proposer.decide()
    unused = [pattern.pattern for pattern in proposer.patterns if pattern not in proposer.matched]
    plan = Plan(
        target=profile.name,
        precision="fp32",
        quantization="none",
        decisions=(),
        notes=tuple(f"--keep-float {text!r} matches nothing that would be quantized" for text in unused),
    )
    return plan.with_decisions(decisions)


def alternatives(model: Model, profile: TargetProfile, request: Request) -> dict[str, tuple[Decision, ...]]:
    """Of every node that the plan quantizes: its decision, and those for other forms it could take.

    Products that are dynamic may also be weight-only, which is more exact; a static product of a net of
    convolutions may be dynamic. Forms that the profile refuses or knows to be slower are left out.
    """
    proposer = _Proposer(model, profile, dataclasses.replace(request, allow_unmeasured=True))
    found: dict[str, tuple[Decision, ...]] = {}
    nodes = {node.name: node for node in model.graph.all_nodes() if node.op_type in _WORKING_OPS}
    for decision in proposer.decide():
        node = nodes.get(decision.node)
        if node is None or decision.form == "float":
            continue
        others = _OTHER_FORMS.get(decision.form, ()) if request.quantization == "auto" else ()
        made = [proposer.in_form(node, form) for form in others if node.op_type == "MatMul"]
        found[decision.node] = (decision, *(item for item in made if item.form != "float"))
    return found


class _Proposer:
    def __init__(self, model: Model, profile: TargetProfile, request: Request) -> None:
        self.model = model
        self.profile = profile
        self.request = request
        self.sizes = bind_axes(model, request.shapes)
        self.patterns = [re.compile(text) for text in request.keep_float]
        self.matched: set[re.Pattern[str]] = set()
        self.static_activation = _static_activation(profile, request.static_activation)
        self.made_in_integers: set[str] = set()
        self.read_as_integers: set[ir.Value] = set()
        self.liftable: dict[int, bool] = {}
        self.computed_once = computed_once(model)
        compute = [node for node in model.graph.all_nodes() if node.op_type in _WORKING_OPS]
        self.led_by_convolutions = led_by_convolutions(model, self.sizes)
        self.total_macs = sum(self.macs(node) or 0 for node in compute)

    def decide(self) -> list[Decision]:
        decisions: list[Decision] = []
        decision: Decision | None
        for node in self.model.graph.all_nodes():
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type in COMPUTE_OPS:
                decision = self.compute(node)
            elif node.op_type in RECURRENT_OPS:
                decision = self.recurrent(node)
            elif node.op_type in TABLE_OPS:
                decision = self.table(node)
            elif node.op_type in CARRIED_OPS:
                decision = self.carried(node)
            elif node.op_type in ISLAND_OPS:
                decision = self.island(node)
            else:
                continue
            if decision is None:
                continue
            if decision.form == "static":
                self.read_as_integers.update(data_operands(node))
            if decision.form == "static" and node.op_type not in FLOAT_OUTPUT_OPS:
                self.made_in_integers.add(decision.node)
            decisions.append(decision)
        return decisions

    def stays(self, node: ir.Node, reason: str, remedy: str | None = None) -> Decision:
        return Decision(
            node=node.name or "",
            op=node.op_type,
            group=node.name or "",
            form="float",
            reason=reason,
            remedy=remedy,
            weight=weight_name(node),
            macs=self.macs(node),
        )

    def macs(self, node: ir.Node) -> int | None:
        return node_macs(node, self.sizes) if node.op_type in _WORKING_OPS else None

    def kept_by_user(self, node: ir.Node) -> Decision | None:
        names = [name for name in (node.name, weight_name(node)) if name]
        matching = [pattern for pattern in self.patterns if any(pattern.search(name) for name in names)]
        self.matched.update(matching)
        if not matching:
            return None
        return self.stays(node, f"kept in float by --keep-float {matching[0].pattern!r}")

    def compute(self, node: ir.Node) -> Decision:
        kept = self.kept_by_user(node)
        if kept is not None:
            return kept
        problem = unfit_weight(node)
        if problem is not None:
            reason, remedy = problem
            return self.stays(node, self.computed_product(node) or reason, remedy)
        if node.inputs[0] in self.computed_once:
            return self.stays(node, "its input is constant: the runtime computes it once, when it loads")
        form, reason, remedy = self.wanted_form(node)
        if form == "float":
            return self.stays(node, reason, remedy)
        if form == "static" and node.graph is not self.model.graph:
            return self.stays(node, "it stands in the body of a control-flow operator")
        if form == "static" and self.is_head(node):
            return self.stays(node, "the last layer: under 1 % of the work, and 8-bit scores flip classes")
        return self.as_settled(node, form)

    def as_settled(self, node: ir.Node, form: Form) -> Decision:
        """In the form that a verdict names, else in `form`."""
        verdict = self.request.verdicts.get(node.name or "")
        if verdict is None:
            return self.in_form(node, form)
        if verdict.form == "float":
            return self.stays(node, verdict.reason)
        return self.in_form(node, verdict.form)

    def computed_product(self, node: ir.Node) -> str | None:
        """Why the target multiplies two computed tensors (attention) in float, or None if that is not it."""
        if node.op_type != "MatMul" or any(is_constant(value) for value in node.inputs):
            return None
        form: Form = "static" if self.request.quantization == "static" else "dynamic"
        return self.choice("MatMul:computed", form).refusal or None

    def recurrent(self, node: ir.Node) -> Decision:
        """LSTM, GRU and RNN: dynamic, for their state has no calibrated range."""
        kept = self.kept_by_user(node)
        if kept is not None:
            return kept
        problem = unfit_recurrent(node)
        if problem is not None:
            return self.stays(node, *problem)
        if self.request.quantization in ("static", "weight-only"):
            reason = f"{self.profile.name} has no {self.request.quantization} kernel for {node.op_type}"
            return self.stays(node, reason, _DYNAMIC_REMEDY)
        return self.as_settled(node, "dynamic")

    def is_head(self, node: ir.Node) -> bool:
        """Whether a node is the small classifier at the very end."""
        if node.op_type not in ("Gemm", "MatMul") or (self.macs(node) or 0) >= _HEAD_SHARE * self.total_macs:
            return False
        return only_leaves_graph(node.outputs[0])

    def remedy_static(self, node: ir.Node) -> str | None:
        return _STATIC_REMEDY if self.profile.kernel(node.op_type, "static") is not None else None

    def wanted_form(self, node: ir.Node) -> tuple[Form, str, str | None]:
        """(form, reason, remedy) by the request and the operator."""
        asked = self.request.quantization
        if asked == "weight-only":
            return "weight-only", "", None
        convolution = node.op_type in CONVOLUTIONS
        if asked == "dynamic" or (asked == "auto" and not convolution and not self.led_by_convolutions):
            return "dynamic", "", None
        if self.request.calibrated:
            return "static", "", None
        if asked == "auto" and node.op_type == "MatMul":
            return "dynamic", "", None
        return "float", "static ranges need calibration data", "pass --calib DATA"

    def in_form(self, node: ir.Node, form: Form) -> Decision:
        """A decision for `form`, or float with the reason why the target or the node refuses it."""
        problem = unfit(node, form) if node.op_type in COMPUTE_OPS else None
        if problem is not None:
            return self.stays(node, problem)
        if not self.is_liftable(FORM_OPSETS[form]):
            reason = f"operator set {self.model.opset} cannot be lifted to the {FORM_OPSETS[form]} it needs"
            return self.stays(node, reason, f"export the model with opset {FORM_OPSETS[form]} or newer")
        verdict = self.request.verdicts.get(node.name or "")
        if verdict is not None and verdict.form == form:
            found = choose_kernel(self.profile, node.op_type, form, self.static_activation)
        else:
            verdict, found = None, self.choice(node.op_type, form)
        if found.kernel is None:
            remedy = self.remedy_static(node) if form != "static" else None
            return self.stays(node, found.refusal, found.remedy or remedy)
        decision = self.decision(node, form, found)
        if verdict is None:
            return decision
        return msgspec.structs.replace(
            decision,
            reason=f"kernel {found.kernel.name}: {verdict.reason}",
            evidence=verdict.evidence,
            source=verdict.source,
        )

    def is_liftable(self, opset: int) -> bool:
        if opset not in self.liftable:
            self.liftable[opset] = is_liftable(self.model, opset)
        return self.liftable[opset]

    def choice(self, op: str, form: Form) -> Choice:
        """The kernel that the lowering of `form` uses, if the target has it and it pays; else why not."""
        found = choose_kernel(self.profile, op, form, self.static_activation)
        if found.kernel is None:
            return found
        slow = does_not_pay(found.kernel)
        if slow is not None:
            return Choice(refusal=slow)
        if op in _WORKING_OPS and found.evidence == "none" and not self.request.allow_unmeasured:
            return Choice(refusal=unmeasured(op, form, self.profile.name), remedy=UNMEASURED_REMEDY)
        return found

    def decision(self, node: ir.Node, form: Form, found: Choice) -> Decision:
        """The decision to compute `node` in integers, or (weight-only) with a weight in blocks."""
        kernel = found.kernel
        if kernel is None:
            raise InternalError("a decision needs a kernel", where=node.name)
        activation = weight_scheme = None
        if form == "static":
            activation = self.static_activation
        elif form == "dynamic":
            # DynamicQuantizeLinear knows no other: signed or symmetric activations would cost MiniLM
            # 0.18 relative L2 instead of 0.11 as well.
            activation = Scheme(dtype="uint8", symmetric=False)
        if form != "weight-only" and node.op_type in _WORKING_OPS:
            weight_scheme = Scheme(
                dtype="int8",
                symmetric=True,
                granularity="per-channel",
                axis=channel_axis(node),
                reduced_range=kernel.reduced_range,
            )
        group = node.name or ""
        if form == "dynamic" and node.inputs[0] is not None:
            group = f"readers of {node.inputs[0].name}"
        speed = "" if kernel.speedup_over_float is None else f", {kernel.speedup_over_float:.2f}x of float"
        return Decision(
            node=node.name or "",
            op=node.op_type,
            group=group,
            form=form,
            activation=activation,
            weight_scheme=weight_scheme,
            weight=weight_name(node),
            reason=f"kernel {kernel.name} ({kernel.grade}{speed})",
            evidence=found.evidence,
            source=found.source,
            macs=self.macs(node),
        )

    def table(self, node: ir.Node) -> Decision | None:
        table = node.inputs[0]
        if table is None or not is_constant(table) or table.const_value is None:
            return None
        tensor = table.const_value
        if tensor.dtype != ir.DataType.FLOAT or rank(table) != 2 or not reads_rows(node, table):
            return None
        if node.outputs[0] in self.computed_once:
            return None  # rows that are always the same: nothing is looked up
        kept = self.kept_by_user(node)
        if kept is not None:
            return kept
        if not self.request.tables:
            return self.stays(node, "tables were not asked to be quantized")
        if tensor.nbytes < _SMALL_TABLE_BYTES:
            return self.stays(node, f"its table has only {tensor.nbytes} bytes")
        obstacle = self.table_obstacle(table)
        if obstacle is not None:
            return self.stays(node, obstacle)
        kernel = self.profile.kernel("Gather", "weight-only", granularity="per-row")
        if kernel is None:
            why = self.profile.refusal("Gather", "weight-only", granularity="per-row")
            return self.stays(node, why or "no kernel")
        return Decision(
            node=node.name or "",
            op=node.op_type,
            group=f"table {table.name}",
            form="weight-only",
            weight_scheme=Scheme(dtype="int8", symmetric=True, granularity="per-row", axis=0),
            weight=table.name,
            reason="a quarter of the table's bytes; the rows looked up become float again",
            evidence=kernel.evidence,
            source=kernel.source,
        )

    def table_obstacle(self, table: ir.Value) -> str | None:
        """Why the float table must stay in the file in any case, so that an int8 copy only adds to it."""
        if table.is_graph_output():
            return "its table is a graph output"
        for use in table.uses():
            if use.node.op_type not in TABLE_OPS:
                return f"its table is also read by {use.node.op_type} (tied weights)"
            if not reads_rows(use.node, table):
                return "its table is also read in another way"
            if self.kept_by_user(use.node) is not None:
                return "another reader of its table is kept in float by --keep-float"
        return None

    def carried(self, node: ir.Node) -> Decision | None:
        """Add, pooling… between integer operators: in integers as well, to save the way through float."""
        if not self.stands_between_integers(node) or self.is_absorbed(node):
            return None
        kept = self.kept_by_user(node)
        if kept is not None:
            return kept
        if node.graph is not self.model.graph:
            return self.stays(node, "it stands in the body of a control-flow operator")
        if output_tail(node).is_graph_output():
            return self.stays(node, "its result leaves the graph: 8 bits would only cost precision")
        if self.static_activation is None:
            return self.stays(node, f"{self.profile.name} has no static kernels")
        problem = unfit_carried(node, self.static_activation)
        if problem is not None:
            return self.stays(node, problem)
        found = self.choice(node.op_type, "static")
        return (
            self.stays(node, found.refusal) if found.kernel is None else self.decision(node, "static", found)
        )

    def island(self, node: ir.Node) -> Decision | None:
        """An operator that computes in float between integer ones: the decision only says why."""
        if moves_data(node) or node.outputs[0].is_graph_output() or not self.stands_between_integers(node):
            return None
        if node.op_type == "Pad":
            return self.stays(node, "its border is neither zero nor taken from the image")
        op = f"Resize:{resize_mode(node)}" if node.op_type == "Resize" else node.op_type
        return self.stays(node, self.choice(op, "static").refusal or f"no lowering of {op} is known")

    def stands_between_integers(self, node: ir.Node) -> bool:
        """Whether all that a node computes with comes out of integer kernels.

        All but one operand may be made in float, if an integer kernel reads it, too: then its integers
        are there in any case.
        """
        made = [self.comes_from_integers(value) for value in data_operands(node)]
        read = [value in self.read_as_integers for value in data_operands(node)]
        return any(made) and all(made[place] or read[place] for place in range(len(made)))

    def is_absorbed(self, node: ir.Node) -> bool:
        """Whether a Relu disappears in the quantization of the integer kernel's result in front of it."""
        value = node.inputs[0]
        if node.op_type not in ABSORBED_OPS or value is None or only_use(value) is not node:
            return False
        maker = value.producer()
        return maker is not None and (maker.name or "") in self.made_in_integers

    def comes_from_integers(self, value: ir.Value) -> bool:
        """Whether a kernel with quantized output makes the value, looking through moving operators."""
        node = value.producer()
        while node is not None and (node.name or "") not in self.made_in_integers:
            if not moves_data(node) and (node.op_type not in ABSORBED_OPS or node.domain):
                return False
            source = node.inputs[0]
            node = None if source is None else source.producer()
        return node is not None


def _static_activation(profile: TargetProfile, asked: IntegerType | None) -> Scheme | None:
    """The one activation scheme of a static plan: tensors between two operators have one type."""
    dtype = asked or profile.static_activation_type
    if dtype is None:
        return None
    free = [
        profile.kernel(op, "static", activation=dtype, symmetric_activation=False)
        for op in ("Conv", "MatMul", "Gemm")
    ]
    return Scheme(dtype=dtype, symmetric=all(kernel is None for kernel in free))
