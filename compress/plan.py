"""What was decided for one model on one target, node by node, with the reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from ..graph.passes import PassRecord, Refusal
from ..graph.scheme import Scheme
from ..targets.profile import Evidence, Form
from .operands import TABLE_OPS
from .prune.report import Pruning
from .recipe import IoDtype

SCHEMA_VERSION = 1

PlannedQuantization = Literal["none", "dynamic", "static", "weight-only", "mixed"]
TypedForm = Literal["fp16", "bf16", "fp16-storage", "bf16-storage"]
PlannedPrecision = Literal[
    "int8", "fp32", "fp16", "bf16", "fp16-storage", "bf16-storage",
    "int8+fp16", "int8+bf16", "int8+fp16-storage", "int8+bf16-storage",
]  # fmt: skip

TYPED_FORMS: tuple[TypedForm, ...] = ("fp16", "bf16", "fp16-storage", "bf16-storage")
"""Forms in 16-bit floats; a plan with one that computes in them is named for that one."""
_MIXED: Mapping[TypedForm, PlannedPrecision] = {
    "fp16": "int8+fp16",
    "bf16": "int8+bf16",
    "fp16-storage": "int8+fp16-storage",
    "bf16-storage": "int8+bf16-storage",
}
_NOT_INTEGER: frozenset[str] = frozenset({"float", *TYPED_FORMS})


class Decision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one node computes.

    `group` names the nodes that are decided together (they share a quantized tensor); it is the
    unit of going back to float. `weight` is the name of the weight concerned, if any. `remedy`
    says what the user can do about a node that stays float, if anything. `macs` counts the
    multiply-accumulates of one sample at the planned shapes, None where a shape is not known.
    """

    node: str
    op: str
    group: str
    form: Form
    activation: Scheme | None = None
    weight_scheme: Scheme | None = None
    weight: str | None = None
    reason: str
    remedy: str | None = None
    evidence: Evidence = "none"
    source: str = ""
    macs: int | None = None

    def in_float(self, reason: str) -> Decision:
        """The same node in float, for `reason`; what was known about its integer kernel goes."""
        return msgspec.structs.replace(
            self, form="float", activation=None, weight_scheme=None, reason=reason, evidence="none", source=""
        )


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All decisions for one model on one target, and everything that was looked at and refused.

    `pruning` is what was cut out of the graph before anything else; `io_dtype` the type that float32
    inputs and outputs of the graph get (fp32: they keep it).
    """

    schema_version: int = SCHEMA_VERSION
    target: str
    precision: PlannedPrecision
    quantization: PlannedQuantization
    io_dtype: IoDtype = "fp32"
    decisions: tuple[Decision, ...]
    passes: tuple[PassRecord, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    pruning: Pruning | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that are not plain float32, in plan order."""
        return tuple(dict.fromkeys(item.group for item in self.decisions if item.form != "float"))

    def typed_groups(self) -> tuple[str, ...]:
        """The groups that are stored or computed in 16-bit floats, in plan order."""
        return tuple(dict.fromkeys(item.group for item in self.decisions if item.form in TYPED_FORMS))

    def quantized(self) -> tuple[Decision, ...]:
        """The decisions for integers."""
        return tuple(item for item in self.decisions if item.form not in _NOT_INTEGER)

    def with_decisions(self, decisions: Iterable[Decision]) -> Plan:
        """The plan with other decisions; precision and quantization follow from them."""
        made = tuple(decisions)
        quantization, forms = quantization_of(made), {item.form for item in made}
        typed = next((form for form in TYPED_FORMS if form in forms), None)
        precision: PlannedPrecision = typed or "fp32"
        if quantization != "none":
            precision = "int8" if typed is None else _MIXED[typed]
        return msgspec.structs.replace(self, decisions=made, quantization=quantization, precision=precision)

    def revert(self, groups: frozenset[str], reason: str) -> Plan:
        """The plan with these groups back in float, for `reason`."""
        return self.with_decisions(
            item.in_float(reason) if item.group in groups and item.form != "float" else item
            for item in self.decisions
        )

    def integer_share(self) -> float | None:
        """The fraction of known multiply-accumulates that run in integers, or None if none is known."""
        known = [(item.macs, item.form) for item in self.decisions if item.macs]
        total = sum(macs for macs, _ in known)
        if not total:
            return None
        return sum(macs for macs, form in known if form in ("dynamic", "static")) / total


def quantization_of(decisions: Iterable[Decision]) -> PlannedQuantization:
    """The one form of what is quantized, or "mixed"; tables count only where nothing else is."""
    quantized = [item for item in decisions if item.form not in _NOT_INTEGER]
    forms = {item.form for item in quantized if item.op not in TABLE_OPS} or {item.form for item in quantized}
    if len(forms) > 1:
        return "mixed"
    form: Form = next(iter(forms), "float")
    if form == "dynamic" or form == "static" or form == "weight-only":  # noqa: PLR1714 - narrows the type
        return form
    return "none"
