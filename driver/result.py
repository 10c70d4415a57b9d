"""What `compile_model` gives back: the bundle's place, every decision, and every figure measured."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..compress.plan import Plan
from ..compress.recipe import Recipe
from ..graph.passes import Refusal
from ..targets.profile import Evidence
from .measuring.device_planning import BundleRunner, DeviceRecord

if TYPE_CHECKING:
    from ..calibration.drift import DriftReport
    from ..runtimes.device import Device
    from ..runtimes.timing import BenchmarkResult
    from .pareto import ParetoTable


_EVIDENCE_ORDER: tuple[Evidence, ...] = ("none", "modelled", "measured-elsewhere", "measured-on-target")


class Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes on disk of the model that went in and of the one that came out (None: none was written).

    The source is its ONNX form with all weights, whatever format it came in.
    """

    source_bytes: int
    bundle_model_bytes: int | None


class CompileResult(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one compile.

    Attributes:
        bundle: the finished folder, None after a dry run.
        evidence: the grade of the weakest choice in the plan: only "measured-on-target" entitles to
            "not slower".
        recipe: as it was resolved, with the pins that replay it.
        drift: None where it was skipped.
        pareto: every plan whose drift was measured on the way; None where none was.
        benchmark: None where it was skipped; the first timing is the baseline's, the second the
            bundle's as it is loaded, further ones are named for what they are.
        stamps: marks on every figure ("data-free").
        next_commands: whole command lines to try next.
        device: the device that it was timed on; None for this machine.
    """

    bundle: Path | None
    target: str
    evidence: Evidence
    plan: Plan
    recipe: Recipe
    drift: DriftReport | None
    benchmark: BenchmarkResult | None
    sizes: Sizes
    pareto: ParetoTable | None = None
    refusals: tuple[Refusal, ...] = ()
    stamps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    next_commands: tuple[str, ...] = ()
    device: DeviceRecord | None = None


def weakest_evidence(plan: Plan) -> Evidence:
    """The grade of the weakest choice among the operators that do the work; "none" if there is none.

    Tables and connecting operators are chosen for their bytes, not for their speed.
    """
    chosen = (item for item in plan.decisions if item.form != "float")
    grades = [item.evidence for item in chosen if item.macs is not None]
    return min(grades, key=_EVIDENCE_ORDER.index, default="none")


def next_commands(place: Path | None, model: str, device: Device | None = None) -> tuple[str, ...]:
    """Whole command lines to try next on the bundle at `place` that came of `model`, and of its device."""
    if place is None:
        return ()
    folder = shlex.quote(str(place))
    if isinstance(device, BundleRunner):
        there = f"--device {shlex.quote(device.where)}"
        return (
            f"edgepress inspect {folder}",
            f"edgepress verify {folder} {there}",
            f"edgepress benchmark {folder} --baseline {shlex.quote(model)} {there}",
        )
    return (
        f"edgepress inspect {folder}",
        f"edgepress verify {folder}",
        f"edgepress benchmark {folder} --baseline {shlex.quote(model)}",
    )
