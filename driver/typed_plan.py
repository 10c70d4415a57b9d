"""16-bit floats in the compile loop: the plan with its ranges, and the drift on cores that have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ..calibration.collect import collect_ranges
from ..calibration.drift import measure_drift
from ..calibration.limits import check_limits
from ..compress.emulate.float16_run import Float16Runner
from ..compress.operands import CONVOLUTIONS, is_liftable
from ..compress.typed.convert import is_float
from ..compress.typed.propose import propose_compute, propose_storage
from ..compress.typed.request import describe
from ..compress.typed.storage import STORAGE_FORMATS, unfolded_casts
from ..graph.cleanup import LiftOpset
from ..graph.errors import ModelError, NotSupported, RuntimeUnavailable
from ..graph.passes import run_passes
from ..graph.shapes import InferShapes
from ..runtimes.base import SessionOptions
from .budget import steps

if TYPE_CHECKING:
    from ..calibration.data import CalibrationData
    from ..compress.plan import Plan
    from ..compress.recipe import Recipe
    from ..compress.typed.formats import Format
    from ..compress.typed.request import TypedForm
    from ..graph.model import Model
    from ..graph.passes import PassRecord
    from ..targets.profile import TargetProfile
    from .budget import Budget
    from .candidate import Candidate
    from .reporter import Reporter

_BFLOAT16_CONV_OPSET = 22
_RANGE_SAMPLES = 16
_ESTIMATE_SAMPLES = 8
_ESTIMATE_MACS = 4e9
_LARGEST_MACS = 2e10


def lifted_for(model: Model, profile: TargetProfile, form: TypedForm) -> tuple[Model, list[PassRecord]]:
    """The model in an operator set whose convolutions know bfloat16, where it is to compute in that.

    Convolutions take bfloat16 from operator set 22 on; a target that reads none so new gets them in
    float32, and the plan says why.
    """
    has_convolutions = any(node.op_type in CONVOLUTIONS for node in model.graph)
    if (
        form != "bf16"
        or not has_convolutions
        or not model.opset < _BFLOAT16_CONV_OPSET <= profile.runtime.max_opset
        or not is_liftable(model, _BFLOAT16_CONV_OPSET)
    ):
        return model, []
    made = model.fork()
    return made, run_passes(made, [LiftOpset(minimum=_BFLOAT16_CONV_OPSET)])


def propose_typed(
    model: Model,
    profile: TargetProfile,
    form: TypedForm,
    recipe: Recipe,
    *,
    data: CalibrationData | None,
    reporter: Reporter,
) -> tuple[Plan, list[str]]:
    """The plan for a 16-bit form, and what has to be said about it.

    The notes stand in the plan, too. Where the target computes in 16 bits, the activations of a first
    plan are looked at on up to 16 calibration samples; what comes near the format's limit stays float32
    in the second.
    """
    inferred = model.fork()
    run_passes(inferred, [InferShapes()])
    if form in STORAGE_FORMATS:
        plan = propose_storage(inferred, profile, form, keep_float=recipe.keep_float)
        stored = len({item.weight for item in plan.decisions if item.form == form})
        return _noted(plan, describe(profile, form, stored)) if stored else (plan, [])
    kind: Format = "fp16" if form == "fp16" else "bf16"
    plan = propose_compute(inferred, profile, kind, keep_float=recipe.keep_float)
    if not plan.groups:
        return plan, []
    if data is None:
        note = f"the ranges of activations were not looked at: there is no data; {kind} may overflow"
        return _noted(plan, describe(profile, form, 0), note)
    largest = largest_seen(inferred, plan, data, recipe, reporter)
    plan = propose_compute(inferred, profile, kind, keep_float=recipe.keep_float, largest=largest)
    return _noted(plan, describe(profile, form, 0))


def largest_seen(
    inferred: Model, plan: Plan, data: CalibrationData, recipe: Recipe, reporter: Reporter
) -> dict[str, float]:
    """The largest magnitude of every float tensor that nodes planned in 16 bits read or make.

    Looked at on up to 16 samples; infinite where a tensor holds masked values.

    Args:
        inferred: the float graph, its value types inferred.
        plan: which nodes are planned in 16 bits.
        data: calibration samples.
        recipe: threads.
        reporter: progress.
    """
    names = _converted(inferred, plan)
    few = data.select(range(min(len(data), _RANGE_SAMPLES)), data.split)
    with reporter.stage("looking at the ranges of activations", len(few)) as stage:
        observers = collect_ranges(
            inferred,
            names,
            few,
            method="minmax",
            options=SessionOptions(threads=recipe.threads, graph_optimization_level="basic"),
            progress=steps(stage.advance),
        )
    return {
        name: float("inf")
        if observer.masked
        else max(-observer.histogram.minimum, observer.histogram.maximum, 0.0)
        for name, observer in observers.items()
    }


def _noted(plan: Plan, *notes: str) -> tuple[Plan, list[str]]:
    return msgspec.structs.replace(plan, notes=(*plan.notes, *notes)), list(notes)


def _converted(model: Model, plan: Plan) -> list[str]:
    """The float tensors that nodes planned in 16 bits read or make, weights left out."""
    planned = {item.node for item in plan.decisions if item.form in ("fp16", "bf16")}
    fed = {spec.name for spec in model.inputs}
    made = {value.name for node in model.graph for value in node.outputs}
    names: dict[str, None] = {}
    for node in model.graph:
        if node.name in planned:
            for value in (*node.inputs, *node.outputs):
                if is_float(value) and value is not None and value.name in fed | made:
                    names[str(value.name)] = None
    return list(names)


def storage_doubts(candidate: Candidate, profile: TargetProfile) -> list[str]:
    """A warning where the runtime casts stored weights on every run instead of once."""
    stored = any(item.form in STORAGE_FORMATS for item in candidate.plan.decisions)
    if not stored or profile.runtime.name != "onnxruntime":
        return []
    left = unfolded_casts(candidate.file, profile)
    if not left:
        return []
    return [
        f"the runtime casts {len(left)} stored weights on every run ({', '.join(left[:3])}): slower than "
        "float32; keep them in float with --keep-float"
    ]


class Estimate(NamedTuple):
    """What the measured drift leaves out where the target computes in 16 bits and this machine does not.

    `doubts` are limits that would not hold with the target's arithmetic; `known` says whether that was
    found out, or there was nothing to find out.
    """

    notes: list[str]
    doubts: list[str]
    known: bool = True


def estimate_drift(
    candidate: Candidate, profile: TargetProfile, budget: Budget, reporter: Reporter
) -> Estimate:
    """The drift with float16 arithmetic emulated on a few samples, and whether the limits would hold."""
    if profile.gpu is not None:
        text = [
            "drift was measured with float32 arithmetic and rounded results; TensorRT's kernels add in "
            "another order and precision: check the engine on the device"
        ]
        return Estimate(text, [], known=False)
    if candidate.plan.precision not in ("fp16", "int8+fp16") or profile.kind == "host":
        return Estimate([], [])
    plain = (
        f"drift was measured with float32 arithmetic and Casts, as this machine runs the file; "
        f"{profile.name} adds in float16 and is further off"
    )
    macs = sum(item.macs or 0 for item in candidate.plan.decisions if item.form == "fp16")
    if macs > _LARGEST_MACS:
        text = [f"{plain}: check it there (the model is too large to emulate here)"]
        return Estimate(text, [], known=False)
    count = int(max(1, min(_ESTIMATE_SAMPLES, _ESTIMATE_MACS // max(macs, 1), len(budget.data))))
    few = budget.data.select(range(count), budget.data.split)
    try:
        with reporter.stage("emulating float16 arithmetic", count) as stage:
            runner = Float16Runner(candidate.model)
            report = measure_drift(budget.baseline, runner, few, budget.task, progress=steps(stage.advance))
    except (NotSupported, ModelError, RuntimeUnavailable) as error:
        return Estimate([f"{plain}; {error.what}"], [], known=False)
    figures = (("cosine", report.cosine), ("l2", report.l2))
    found = ", ".join(f"{name} {value * 100:.3g} %" for name, value in figures if value is not None)
    notes = [f"{plain}: {found} on {count} samples with its arithmetic emulated"]
    broken = [item for item in check_limits(report, budget.limits) if not item.met and item.value is not None]
    doubts = [
        f"with float16 arithmetic emulated on {count} samples {item.metric} is {item.value:.3g}, beyond the "
        f"limit of {item.limit:.3g}: check the bundle on the board, or use --precision fp32"
        for item in broken
    ]
    if report.non_finite_candidate:
        doubts.append(f"with float16 arithmetic emulated on {count} samples answers are not finite")
    return Estimate(notes, doubts)
