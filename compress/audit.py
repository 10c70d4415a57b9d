"""Looking into the runtime's own optimised graph: does what was planned in integers run in integers?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec
import onnx_ir as ir

from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import optimised_graph
from ..targets.profile import Form, TargetProfile
from .operands import TABLE_OPS
from .plan import Decision, Plan

INTEGER_OPS = frozenset(
    {
        "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger",
        "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QGemm", "QLinearAdd", "QLinearAveragePool",
        "QLinearConcat", "QLinearConv", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMatMul",
        "QLinearMul", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere",
    }
)  # fmt: skip
"""What counts where a profile names no `runtime_ops` for a kernel."""

_RENAMED = re.compile(r"_token_\d+$")  # the suffix that onnxruntime's layout change appends to names
_STORED = re.compile(r"(?P<weight>.+)\.(int8|blocks)(_\d+)?")


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of one planned node: the runtime's operator, and whether it computes in integers."""

    node: str
    runtime_op: str | None
    integer: bool


class Audit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The runtime's optimised graph, held against a plan.

    `findings` has every node planned in integers, `unplanned` those planned in float that the
    runtime computes in integers by itself.
    """

    findings: tuple[Finding, ...]
    operators: dict[str, int]
    unplanned: tuple[Finding, ...] = ()

    @property
    def silent_floats(self) -> tuple[Finding, ...]:
        """Planned nodes that the runtime computes in float after all."""
        return tuple(finding for finding in self.findings if not finding.integer)


def audit(model_file: Path, plan: Plan, profile: TargetProfile) -> Audit:
    """Let the runtime optimise a quantized model as the target would, and look up every planned node.

    Args:
        model_file: the quantized model.
        plan: its plan.
        profile: gives the config entries under which this machine's runtime optimises like the target's.
    """
    if profile.runtime.name != "onnxruntime":  # another runtime's engine says nothing before it is built
        return Audit(findings=(), operators={})
    graph = optimised_graph(model_file, SessionOptions(config=dict(profile.audit_config))).graph
    nodes = list(graph.all_nodes())
    readers: dict[str, list[ir.Node]] = {}
    for node in nodes:
        for value in node.inputs:
            stored = _STORED.fullmatch(value.name or "") if value is not None else None
            if stored is not None:
                readers.setdefault(stored["weight"], []).append(node)
    by_name = {_RENAMED.sub("", node.name or ""): node for node in nodes}
    unplanned = []
    for item in plan.decisions:
        found = by_name.get(item.node)
        if (
            item.form == "float"
            and found is not None
            and found.op_type != item.op  # an operator of the same name may well compute in float
            and found.op_type in _expected(profile, item.op, "static")
        ):
            unplanned.append(Finding(node=item.node, runtime_op=found.op_type, integer=True))
    return Audit(
        findings=tuple(_find(item, profile, readers, by_name) for item in plan.quantized()),
        operators=dict(sorted(Counter(node.op_type for node in nodes).items())),
        unplanned=tuple(unplanned),
    )


def _expected(profile: TargetProfile, op: str, form: Form) -> frozenset[str]:
    """The runtime's operators that prove an integer kernel of `op`, or that a table is stored as int8."""
    if form == "weight-only" and op in TABLE_OPS:
        return TABLE_OPS
    kernels = [kernel for kernel in profile.kernels if (kernel.op, kernel.form) == (op, form)]
    return frozenset(name for kernel in kernels for name in kernel.runtime_ops) or INTEGER_OPS


def _find(
    item: Decision,
    profile: TargetProfile,
    readers: Mapping[str, list[ir.Node]],
    by_name: Mapping[str, ir.Node],
) -> Finding:
    """Look a planned node up: under its own name, else as the readers of its stored weight.

    The runtime keeps a static node's name in its integer kernel. A dynamic or weight-only one is
    several nodes with other names; then every reader of the weight must be an integer kernel (a
    DequantizeLinear is none), so that a tied weight's one reader does not hide the other.
    """
    expected = _expected(profile, item.op, item.form)
    if item.node in by_name:
        found = [by_name[item.node].op_type]
    else:
        found = [node.op_type for node in readers.get(item.weight or "", ())]
    integer = bool(found) and all(op in expected for op in found)
    fused = [node.op_type for name, node in by_name.items() if name.startswith(f"{item.node}/")]
    shown = found if integer or not fused else fused
    return Finding(node=item.node, runtime_op=shown[0] if shown else None, integer=integer)


def demote_silent_floats(plan: Plan, result: Audit) -> Plan:
    """The plan without the nodes that the runtime would compute in float: their Q/DQ only cost."""
    floats = {finding.node: finding.runtime_op for finding in result.silent_floats}
    return plan.with_decisions(
        item.in_float(
            "the runtime does not turn it into an integer kernel "
            f"(its optimised graph has {floats[item.node] or 'another form of it'})"
        )
        if item.node in floats
        else item
        for item in plan.decisions
    )
