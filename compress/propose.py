"""Deciding, node by node, what runs in integers on a target: `propose` makes the first plan."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir

from ..graph.edit import int_attribute, is_constant, only_use, rank
from ..graph.model import Model
from ..graph.scheme import Scheme
from ..targets.profile import Form, Kernel, TargetProfile
from .cost import bind_axes, node_macs
from .plan import Decision, Plan

_SMALL_WEIGHT_ELEMENTS = 1024
_SMALL_TABLE_BYTES = 1 << 14
_HEAD_SHARE = 0.01
_COMPUTE_OPS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_CARRIED_OPS = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid")
PASS_THROUGH_OPS = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}
)
ABSORBED_OPS = frozenset({"Relu", "Clip"})
_MOVING_OPS = PASS_THROUGH_OPS | ABSORBED_OPS | {"Slice", "Pad", "Split", "Expand", "Gather"}
_QUANTIZED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "QLinearConv",
        "QLinearMatMul",
        "MatMulNBits",
        "QGemm",
        "QAttention",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked of quantization.

    `keep_float` are regular expressions searched in node and weight names; `calibrated` says that
    data for static ranges is there; `shapes` fixes input shapes for counting work.
    """

    quantization: Literal["auto", "dynamic", "static", "weight-only"] = "auto"
    keep_float: tuple[str, ...] = ()
    calibrated: bool = False
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    tables: bool = True


def propose(model: Model, profile: TargetProfile, request: Request) -> Plan:
    """The fastest plan that the target's kernel table knows for this graph, before any measuring.

    Every MatMul, Gemm, convolution, embedding table and connecting operator gets a decision with
    its reason; what stays float also gets the remedy, where there is one.
    """
    proposer = _Proposer(model, profile, request)
    decisions = proposer.decide()
    forms = {item.form for item in decisions if item.op != "Gather"} - {"float"}
    if not forms:
        forms = {item.form for item in decisions} - {"float"}
    quantization = "none" if not forms else next(iter(forms)) if len(forms) == 1 else "mixed"
    return Plan(
        target=profile.name,
        precision="int8" if forms else "fp32",
        quantization=quantization,  # type: ignore[arg-type]  # forms without "float"
        decisions=tuple(decisions),
    )


def is_quantized(model: Model) -> bool:
    """Whether the graph already holds quantized operators."""
    return any(node.op_type in _QUANTIZED_OPS for node in model.graph.all_nodes())


class _Proposer:
    def __init__(self, model: Model, profile: TargetProfile, request: Request) -> None:
        self.model = model
        self.profile = profile
        self.request = request
        self.sizes = bind_axes(model, request.shapes)
        self.patterns = [re.compile(text) for text in request.keep_float]
        self.static: dict[str, Decision] = {}
        compute = [node for node in model.graph.all_nodes() if node.op_type in _COMPUTE_OPS]
        self.has_convolution = any(node.op_type in ("Conv", "ConvTranspose") for node in compute)
        self.total_macs = sum(self.macs(node) or 0 for node in compute)
        self.outputs = {id(value) for value in model.graph.outputs}

    def decide(self) -> list[Decision]:
        decisions: list[Decision] = []
        decision: Decision | None
        for node in self.model.graph.all_nodes():
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type in _COMPUTE_OPS:
                decision = self.compute(node)
            elif node.op_type == "Gather":
                decision = self.table(node)
            elif node.op_type in _CARRIED_OPS:
                decision = self.carried(node)
            else:
                continue
            if decision is None:
                continue
            if decision.form == "static":
                self.static[decision.node] = decision
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
            weight=_weight_name(node),
            macs=self.macs(node),
        )

    def macs(self, node: ir.Node) -> int | None:
        return node_macs(node, self.sizes) if node.op_type in _COMPUTE_OPS else None

    def kept_by_user(self, node: ir.Node) -> Decision | None:
        names = [node.name or "", _weight_name(node) or ""]
        for pattern in self.patterns:
            if any(pattern.search(name) for name in names if name):
                return self.stays(node, f"kept in float by --keep-float {pattern.pattern!r}")
        return None

    def compute(self, node: ir.Node) -> Decision:
        kept = self.kept_by_user(node)
        if kept is not None:
            return kept
        weight = node.inputs[1]
        if not is_constant(weight) or weight is None or weight.const_value is None:
            return self.stays(
                node,
                "both operands are computed (attention): quantizing both while running costs more than "
                "the integer product saves"
                if node.op_type == "MatMul"
                else "its weight is computed",
            )
        if weight.const_value.dtype != ir.DataType.FLOAT:
            return self.stays(node, f"its weight is {weight.const_value.dtype.name}, not FLOAT")
        if weight.const_value.size < _SMALL_WEIGHT_ELEMENTS and node.op_type in ("MatMul", "Gemm"):
            return self.stays(
                node, f"its weight has {weight.const_value.size} elements: too small to pay for quantizing"
            )
        form, reason, remedy = self.wanted_form(node)
        if form == "float":
            return self.stays(node, reason, remedy)
        if form == "static" and node.graph is not self.model.graph:
            return self.stays(node, "it stands in the body of a control-flow operator")
        if form == "static" and self.is_head(node):
            return self.stays(node, "the last layer: under 1 % of the work, and 8-bit scores flip classes")
        return self.in_form(node, form)

    def is_head(self, node: ir.Node) -> bool:
        """Whether a node is the small classifier at the very end."""
        if node.op_type not in ("Gemm", "MatMul") or (self.macs(node) or 0) >= _HEAD_SHARE * self.total_macs:
            return False
        return id(node.outputs[0]) in self.outputs or _only_feeds_output(node, self.outputs)

    def wanted_form(self, node: ir.Node) -> tuple[Form, str, str | None]:
        """(form, reason, remedy) by the request and the operator."""
        asked = self.request.quantization
        convolution = node.op_type in ("Conv", "ConvTranspose")
        if asked == "weight-only":
            return (
                (
                    "float",
                    self.profile.refusal(node.op_type, "weight-only")
                    or "convolutions keep their weights in float",
                    None,
                )
                if convolution
                else ("weight-only", "", None)
            )
        static = asked == "static" or (asked == "auto" and (convolution or self.has_convolution))
        if not static:
            if convolution:
                return (
                    "float",
                    self.profile.refusal(node.op_type, "dynamic") or "",
                    ("pass --quantization static with --calib DATA"),
                )
            return "dynamic", "", None
        if not self.request.calibrated:
            return "float", "static ranges need calibration data", "pass --calib DATA"
        return "static", "", None

    def in_form(self, node: ir.Node, form: Form) -> Decision:
        """A decision for `form`, or float with the reason why the target or the node refuses it."""
        unfit = _unfit(node, form)
        if unfit is not None:
            return self.stays(node, unfit)
        activation = self.profile.static_activation_type if form == "static" else None
        kernel = self.profile.kernel(node.op_type, form, activation=activation, weight="int8")
        if kernel is None and form == "static":
            kernel = self.profile.kernel(node.op_type, form, weight="int8")
        if form == "weight-only":
            kernel = self.profile.kernel(node.op_type, form, granularity="block")
        if kernel is None:
            why = self.profile.refusal(node.op_type, form)
            return self.stays(node, why or f"{self.profile.name} has no {form} kernel for {node.op_type}")
        if kernel.speedup_over_float is not None and kernel.speedup_over_float < 1.0:
            return self.stays(
                node,
                f"in {form} form it runs at {kernel.speedup_over_float:.2f}x of float here ({kernel.source})",
            )
        return self.decision(node, form, kernel)

    def decision(self, node: ir.Node, form: Form, kernel: Kernel) -> Decision:
        activation = None
        if form in ("dynamic", "static"):
            dtype: Literal["int8", "uint8"] = "int8" if kernel.activation == "int8" else "uint8"
            activation = Scheme(dtype=dtype, symmetric=kernel.symmetric_activation_only)
        weight_scheme = None
        if _weight_name(node) is not None:
            axis = _channel_axis(node)
            weight_scheme = Scheme(
                dtype="int8",
                symmetric=True,
                granularity="per-channel",
                axis=axis,
                reduced_range=kernel.reduced_range,
            )
        group = node.name or ""
        if form == "dynamic" and node.inputs[0] is not None:
            group = f"readers of {node.inputs[0].name}"
        return Decision(
            node=node.name or "",
            op=node.op_type,
            group=group,
            form=form,
            activation=activation,
            weight_scheme=weight_scheme,
            weight=_weight_name(node),
            reason=_reason(kernel),
            evidence=kernel.evidence,
            source=kernel.source,
            macs=self.macs(node),
        )

    def table(self, node: ir.Node) -> Decision | None:
        table = node.inputs[0]
        if table is None or not is_constant(table) or table.const_value is None:
            return None
        tensor = table.const_value
        if tensor.dtype != ir.DataType.FLOAT or rank(table) != 2 or int_attribute(node, "axis", 0) != 0:
            return None
        kept = self.kept_by_user(node)
        if kept is not None:
            return kept
        if not self.request.tables:
            return self.stays(node, "tables were not asked to be quantized")
        if tensor.nbytes < _SMALL_TABLE_BYTES:
            return self.stays(node, f"its table has only {tensor.nbytes} bytes")
        others = [use.node for use in table.uses() if use.node.op_type != "Gather"]
        if others:
            return self.stays(node, f"its table is also read by {others[0].op_type} (tied weights)")
        kernel = self.profile.kernel("Gather", "weight-only", granularity="per-row")
        if kernel is None:
            why = self.profile.refusal("Gather", "weight-only", granularity="per-row")
            return self.stays(node, why or "no kernel")
        return Decision(
            node=node.name or "",
            op="Gather",
            group=f"table {table.name}",
            form="weight-only",
            weight_scheme=Scheme(dtype="int8", symmetric=True, granularity="per-row", axis=0),
            weight=table.name,
            reason="a quarter of the table's bytes; the rows looked up become float again",
            evidence=kernel.evidence,
            source=kernel.source,
        )

    def carried(self, node: ir.Node) -> Decision | None:
        """Add, pooling… between integer operators: in integers as well, to save the way through float."""
        if not self.static:
            return None
        operands = [value for value in node.inputs if value is not None and not is_constant(value)]
        if not operands or not all(self.comes_from_static(value) for value in operands):
            return None
        kept = self.kept_by_user(node)
        if kept is not None:
            return kept
        activation = next(iter(self.static.values())).activation
        kernel = self.profile.kernel(
            node.op_type, "static", activation=None if activation is None else activation.dtype
        ) or self.profile.kernel(node.op_type, "static")
        if kernel is None:
            return self.stays(node, self.profile.refusal(node.op_type, "static") or "no kernel")
        return Decision(
            node=node.name or "",
            op=node.op_type,
            group=node.name or "",
            form="static",
            activation=activation,
            reason=_reason(kernel),
            evidence=kernel.evidence,
            source=kernel.source,
        )

    def comes_from_static(self, value: ir.Value) -> bool:
        """Whether the value is made by a static operator, looking through absorbed and moving ones."""
        node = value.producer()
        while node is not None and node.op_type in _MOVING_OPS:
            source = node.inputs[0]
            node = None if source is None else source.producer()
        return node is not None and (node.name or "") in self.static


def _unfit(node: ir.Node, form: Form) -> str | None:
    """Why a node cannot take a form whatever the target, or None."""
    if node.op_type == "MatMul":
        if rank(node.inputs[1]) != 2:
            return f"its weight has {rank(node.inputs[1])} axes; integer kernels want [K, N]"
        if form in ("dynamic", "static") and (rank(node.inputs[0]) or 0) < 2:
            return "its input has fewer than two axes or an unknown rank"
    if node.op_type == "Gemm":
        for name in ("alpha", "beta"):
            if name in node.attributes and node.attributes[name].as_float() != 1.0:
                return f"{name} is not 1"
        if int_attribute(node, "transA", 0):
            return "its first operand is transposed"
    if len(node.inputs) > 2 and node.inputs[2] is not None and not is_constant(node.inputs[2]):
        return "its bias is computed"
    return None


def _channel_axis(node: ir.Node) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if int_attribute(node, "transB", 0) else 1
    return 1


def _weight_name(node: ir.Node) -> str | None:
    place = 0 if node.op_type == "Gather" else 1
    if node.op_type not in (*_COMPUTE_OPS, "Gather") or len(node.inputs) <= place:
        return None
    value = node.inputs[place]
    return value.name if is_constant(value) and value is not None else None


def _reason(kernel: Kernel) -> str:
    speed = "" if kernel.speedup_over_float is None else f", {kernel.speedup_over_float:.2f}x of float"
    return f"kernel {kernel.name} ({kernel.grade}{speed})"


def _only_feeds_output(node: ir.Node, outputs: set[int]) -> bool:
    reader = only_use(node.outputs[0])
    return (
        reader is not None
        and reader.op_type in ("Add", "Softmax", "Identity")
        and any(id(value) in outputs for value in reader.outputs)
    )
