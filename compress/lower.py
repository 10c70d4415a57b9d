"""Carrying decisions out: the fusions that a target likes, and the quantization that a plan names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..graph.cleanup import LiftOpset, RemoveUnused
from ..graph.duplicates import MergeDuplicates
from ..graph.model import Model
from ..graph.passes import Pass, PassRecord, run_passes
from ..graph.rewrite import Rewrite, Rule
from ..targets.profile import TargetProfile
from .cost import bind_axes, led_by_convolutions
from .fuse.activation import GeluFromParts
from .fuse.attention import DropNanGuard, PackSharedInput
from .fuse.convolution import FoldBatchNorm, FoldBias
from .fuse.hard import HardActivation
from .fuse.linear import FlatLinear, GemmToMatMul
from .fuse.multihead import FuseAttention
from .fuse.normalization import FoldWeightNorm, InstanceNormAffine, LayerNormFromParts, RmsNormAsQuotient
from .fuse.padding import EmptyPad
from .fuse.pooling import GlobalPool
from .fuse.rotary import FuseRotary
from .fuse.scaling import FoldScale, FoldShift
from .fuse.scores import ScoreScale, SharedBias, ZeroMask
from .operands import FORM_OPSETS, RECURRENT_OPS, is_liftable
from .plan import Plan
from .quantize.blocks import QuantizeBlocks
from .quantize.constants import Rounding
from .quantize.dynamic import QuantizeDynamic, QuantizeTables
from .quantize.recurrent import QuantizeRecurrent
from .quantize.static import QuantizeStatic, Ranges, static_layout
from .typed.apply import typed_passes

_FUSION_OPSET = 20
"""Gelu became an operator in 20, LayerNormalization in 17."""

STANDARD_RULES: tuple[Rule, ...] = (
    FoldBatchNorm(),
    FoldBias(),
    LayerNormFromParts(),
    RmsNormAsQuotient(),
    GeluFromParts(),
    DropNanGuard(),
    FlatLinear(),
    GlobalPool(),
    EmptyPad(),
    FoldScale(),
    FoldShift(),
    InstanceNormAffine(),
    FoldWeightNorm(),
    HardActivation(),
    ZeroMask(),
    ScoreScale(),
    SharedBias(),
)


def fusion_passes(model: Model, profile: TargetProfile, switches: Mapping[str, bool]) -> list[Pass]:
    """The fusions for a target: standard operators always, runtime-specific ones where they pay.

    Args:
        model: decides what is needed (an old operator set is lifted only for a fusion that needs it).
        profile: names the fused operators that are faster on the target.
        switches: rule name -> on or off, as the recipe has it; overrides the profile.
    """
    rules = [rule for rule in STANDARD_RULES if switches.get(rule.name, True)]
    if not led_by_convolutions(model, bind_axes(model, {})) and switches.get("gemm-to-matmul", True):
        rules.append(GemmToMatMul())
    if switches.get("packed-qkv", profile.is_faster("PackedQKV", "edgepress")):
        rules.append(PackSharedInput())
    if switches.get("rotary", profile.is_faster("RotaryEmbedding")):
        rules.append(FuseRotary())
    if switches.get("attention", profile.is_faster("MultiHeadAttention")):
        rules.append(FuseAttention())
    passes: list[Pass] = []
    if model.opset < _FUSION_OPSET <= profile.runtime.max_opset and _gains_by_lifting(model, rules):
        passes.append(LiftOpset(minimum=_FUSION_OPSET))
    passes += [Rewrite(rules=tuple(rules)), MergeDuplicates(), RemoveUnused()]
    return passes


def _gains_by_lifting(model: Model, rules: Sequence[Rule]) -> bool:
    """Whether GELU or layer normalization is spelled out here, and the operator set can be lifted for it."""
    wanted = tuple(rule for rule in rules if isinstance(rule, (GeluFromParts, LayerNormFromParts)))
    if not _spelled_out(model) or not wanted or not is_liftable(model, _FUSION_OPSET):
        return False
    trial = model.fork()
    return run_passes(trial, [LiftOpset(minimum=_FUSION_OPSET), Rewrite(rules=wanted)])[-1].changed


def _spelled_out(model: Model) -> bool:
    """Whether the operators of a GELU or a layer normalization are there at all."""
    ops = {node.op_type for node in model.graph.all_nodes()}
    if "Erf" in ops or {"Tanh", "Mul"} <= ops:
        return True
    return "ReduceMean" in ops and bool(ops & {"Sqrt", "Pow"})


def apply_plan(
    model: Model, plan: Plan, ranges: Ranges | None = None, rounding: Rounding | None = None
) -> tuple[Model, list[PassRecord]]:
    """A fork of `model` with the plan carried out.

    Args:
        model: the fused float graph that the plan was made for.
        plan: the decisions.
        ranges: tensor name -> (minimum, maximum) for static decisions.
        rounding: node name -> the integers of its weight, where they are not the nearest.

    Returns:
        The quantized model (the original is untouched) and what each pass did.
    """
    forms = {item.form for item in plan.decisions}
    needed = max((FORM_OPSETS[form] for form in forms), default=0)
    passes: list[Pass] = [LiftOpset(minimum=needed)] if model.opset < needed else []
    if "static" in forms:
        # Laid out before an old operator set is lifted, as the ranges were: lifting may lose shapes.
        layout = static_layout(model, plan.decisions)
        passes.append(
            QuantizeStatic(
                decisions=plan.decisions, layout=layout, ranges=ranges or {}, rounding=rounding or {}
            )
        )
    if "dynamic" in forms:
        recurrent = {item.op in RECURRENT_OPS for item in plan.decisions if item.form == "dynamic"}
        passes += [QuantizeRecurrent(decisions=plan.decisions)] if True in recurrent else []
        passes += [QuantizeDynamic(decisions=plan.decisions)] if False in recurrent else []
    if "weight-only" in forms:
        passes += [QuantizeTables(decisions=plan.decisions), QuantizeBlocks(decisions=plan.decisions)]
    lowered = model.fork()
    return lowered, run_passes(lowered, [*passes, *typed_passes(plan.decisions)])
