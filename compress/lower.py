"""Carrying decisions out: the fusions that a target likes, and the quantization that a plan names."""

from __future__ import annotations

from collections.abc import Mapping

from ..graph.cleanup import LiftOpset, MergeDuplicates, RemoveUnused
from ..graph.model import Model
from ..graph.passes import Pass, PassRecord, run_passes
from ..graph.rewrite import Rewrite, Rule
from ..targets.profile import TargetProfile
from .fuse.activation import GeluFromParts
from .fuse.attention import DropNanGuard, PackSharedInput
from .fuse.convolution import FoldBatchNorm, FoldBias
from .fuse.linear import GemmToMatMul
from .fuse.normalization import LayerNormFromParts
from .plan import Plan
from .quantize.blocks import QuantizeBlocks
from .quantize.dynamic import QuantizeDynamic, QuantizeTables
from .quantize.static import QDQ_OPSET, QuantizeStatic, Ranges

_FUSION_OPSET = 20
"""Gelu became an operator in 20, LayerNormalization in 17."""

STANDARD_RULES: tuple[Rule, ...] = (
    FoldBatchNorm(),
    FoldBias(),
    LayerNormFromParts(),
    GeluFromParts(),
    DropNanGuard(),
)


def fusion_passes(model: Model, profile: TargetProfile, switches: Mapping[str, bool]) -> list[Pass]:
    """The fusions for a target: standard operators always, runtime-specific ones where they pay.

    Args:
        model: decides what is needed (an old operator set is lifted only for a fusion that needs it).
        profile: names the fused operators that are faster on the target.
        switches: rule name -> on or off, as the recipe has it; overrides the profile.
    """
    rules = [rule for rule in STANDARD_RULES if switches.get(rule.name, True)]
    if not _has_convolution(model) and switches.get("gemm-to-matmul", True):
        rules.append(GemmToMatMul())
    if switches.get("packed-qkv", profile.is_faster("PackedQKV", "edgepress")):
        rules.append(PackSharedInput())
    passes: list[Pass] = []
    if _spelled_out(model) and model.opset < _FUSION_OPSET <= profile.runtime.max_opset:
        passes.append(LiftOpset(minimum=_FUSION_OPSET))
    passes += [Rewrite(rules=tuple(rules)), MergeDuplicates(), RemoveUnused()]
    return passes


def _has_convolution(model: Model) -> bool:
    return any(node.op_type in ("Conv", "ConvTranspose") for node in model.graph.all_nodes())


def _spelled_out(model: Model) -> bool:
    """Whether the graph may spell out GELU or layer normalization."""
    ops = {node.op_type for node in model.graph.all_nodes()}
    return "Erf" in ops or {"Tanh", "Pow"} <= ops or {"ReduceMean", "Sqrt"} <= ops


def apply_plan(model: Model, plan: Plan, ranges: Ranges | None = None) -> tuple[Model, list[PassRecord]]:
    """A fork of `model` with the plan carried out.

    Args:
        model: the fused float graph that the plan was made for.
        plan: the decisions.
        ranges: tensor name -> (minimum, maximum) for static decisions.

    Returns:
        The quantized model (the original is untouched) and what each pass did.
    """
    forms = {item.form for item in plan.decisions}
    passes: list[Pass] = []
    if "static" in forms:
        passes += [LiftOpset(minimum=QDQ_OPSET)]
        passes += [QuantizeStatic(decisions=plan.decisions, ranges=ranges or {})]
    if "dynamic" in forms:
        passes += [LiftOpset(minimum=11), QuantizeDynamic(decisions=plan.decisions)]
    if "weight-only" in forms:
        passes += [QuantizeTables(decisions=plan.decisions), QuantizeBlocks(decisions=plan.decisions)]
    lowered = model.fork()
    return lowered, run_passes(lowered, passes)
