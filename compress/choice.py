"""Choosing among a target's kernels: which one a lowering uses, whether it pays, and how that is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import msgspec

from ..graph.scheme import IntegerType, Scheme
from ..targets.profile import Evidence, Form, Kernel, TargetProfile
from .operands import COMPUTE_OPS

SAME_ARITHMETIC: Mapping[str, str] = {"Gemm": "MatMul", "ConvTranspose": "Conv"}
"""Operators that the runtime computes with the integer kernel of another one (Gemm), or that are written
as it (ConvTranspose: a convolution whose outputs are interleaved)."""

UNMEASURED_REMEDY = "pass --allow-unmeasured, or a profile of your own that names a figure and its source"


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The form of one node that is settled from outside the profile: timed on the target, or pinned.

    Attributes:
        reason: goes into the plan.
        evidence: how the choice is known; empty `source` where the reason says it all.
    """

    form: Form
    reason: str
    evidence: Evidence = "measured-on-target"
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernel that serves a lowering, with its evidence, or why there is none (`kernel` None)."""

    kernel: Kernel | None = None
    evidence: Evidence = "none"
    source: str = ""
    refusal: str = ""
    remedy: str | None = None


def choose_kernel(profile: TargetProfile, op: str, form: Form, activation: Scheme | None) -> Choice:
    """The kernel that the lowering of `form` uses on a target, whatever its speed; else why not.

    Args:
        profile: the target.
        op: ONNX operator, or its variant as in `Kernel.op`.
        form: not float.
        activation: the one scheme of a static plan; None where the target has no static kernels.
    """
    asymmetric = None
    weight: Literal["int8", "uint8"] | None = "int8"
    kind: IntegerType | None = None
    if form == "static" and activation is not None:
        kind, asymmetric = activation.dtype, None if activation.symmetric else False
        weight = "int8" if op in COMPUTE_OPS else None
    granularity: Literal["block"] | None = None
    if form == "weight-only":
        weight, granularity = "uint8", "block"
    kernel = profile.kernel(
        op, form, activation=kind, weight=weight, granularity=granularity, symmetric_activation=asymmetric
    )
    if kernel is None:
        why = profile.refusal(
            op, form, activation=kind, weight=weight, granularity=granularity, symmetric_activation=asymmetric
        )
        return Choice(refusal=why or f"{profile.name} has no {form} kernel for {op}")
    evidence, source = _evidence(profile, kernel)
    return Choice(kernel=kernel, evidence=evidence, source=source)


def _evidence(profile: TargetProfile, kernel: Kernel) -> tuple[Evidence, str]:
    """A kernel's own evidence, or that of the kernel whose arithmetic it shares."""
    other = SAME_ARITHMETIC.get(kernel.op)
    if kernel.evidence != "none" or other is None:
        return kernel.evidence, kernel.source
    for shared in profile.candidates(other, forms=(kernel.form,)):
        if (shared.activation, shared.weight) == (kernel.activation, kernel.weight):
            if shared.evidence != "none":
                return shared.evidence, f"as {other}, whose kernel it shares: {shared.source}"
            break
    return "none", kernel.source


def does_not_pay(kernel: Kernel) -> str | None:
    """Why a kernel is left alone although it works: the profile knows it to be slower than float."""
    speedup = kernel.speedup_over_float
    if speedup is None or speedup >= 1.0:
        return None
    return f"in {kernel.form} form it runs at {speedup:.2f}x of float here ({kernel.source})"


def unmeasured(op: str, form: Form, target: str) -> str:
    """Why a lowering without any evidence stays float."""
    return f"nobody has measured whether {form} {op} is faster than float on {target}"
