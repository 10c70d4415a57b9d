"""Looking into the runtime's own optimised graph: does what was planned in integers run in integers?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec
import onnx_ir as ir

from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import optimised_graph
from ..targets.profile import TargetProfile
from .plan import Decision, Plan

INTEGER_OPS = frozenset(
    {
        "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits",
        "NhwcMaxPool", "QAttention", "QGemm", "QLinearAdd", "QLinearAveragePool", "QLinearConcat",
        "QLinearConv", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMatMul", "QLinearMul",
        "QLinearSigmoid", "QLinearSoftmax", "Gather",
    }
)  # fmt: skip
_RENAMED = re.compile(r"_token_\d+$")
_STORED = (".int8", ".blocks")


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of one planned node: the runtime's operator, and whether it computes in integers."""

    node: str
    runtime_op: str | None
    integer: bool


class Audit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The runtime's optimised graph, held against a plan."""

    findings: tuple[Finding, ...]
    operators: dict[str, int]

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
    graph = optimised_graph(model_file, SessionOptions(config=dict(profile.audit_config))).graph
    nodes = list(graph.all_nodes())
    by_input: dict[str, list[ir.Node]] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.name:
                by_input.setdefault(value.name, []).append(node)
    by_name = {_RENAMED.sub("", node.name or ""): node for node in nodes}
    findings = tuple(_find(item, by_input, by_name) for item in plan.quantized())
    return Audit(findings=findings, operators=dict(sorted(Counter(node.op_type for node in nodes).items())))


def _find(item: Decision, by_input: dict[str, list[ir.Node]], by_name: dict[str, ir.Node]) -> Finding:
    readers: Iterable[ir.Node] = ()
    if item.weight is not None:
        readers = [node for suffix in _STORED for node in by_input.get(item.weight + suffix, ())]
    if not readers and item.node in by_name:
        readers = [by_name[item.node]]
    ops = sorted({node.op_type for node in readers})
    integer = any(op in INTEGER_OPS for op in ops)
    return Finding(node=item.node, runtime_op=ops[0] if ops else None, integer=integer)


def demote_silent_floats(plan: Plan, result: Audit) -> Plan:
    """The plan without the nodes that the runtime would compute in float: their Q/DQ only cost."""
    floats = {finding.node: finding.runtime_op for finding in result.silent_floats}
    decisions = tuple(
        msgspec.structs.replace(
            item,
            form="float",
            activation=None,
            weight_scheme=None,
            reason="the runtime does not turn it into an integer kernel "
            f"(its optimised graph has {floats[item.node] or 'another form of it'})",
        )
        if item.node in floats
        else item
        for item in plan.decisions
    )
    return msgspec.structs.replace(plan, decisions=decisions)
