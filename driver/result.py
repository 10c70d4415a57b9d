"""What `compile_model` gives back: the bundle's place, every decision, and every figure measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..compress.plan import Plan
from ..compress.recipe import Recipe
from ..graph.passes import Refusal
from ..targets.profile import Evidence

if TYPE_CHECKING:
    from ..calibration.drift import DriftReport
    from ..runtimes.timing import Comparison


class Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes on disk of the model that went in and of the one that came out (None: none was written).

    The source is its ONNX form with all weights, whatever format it came in.
    """

    source_bytes: int
    bundle_model_bytes: int | None


class CompileResult(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one compile.

    `bundle` is the finished folder, None after a dry run. `drift` and `benchmark` are None where
    they were skipped. `evidence` is the grade of the weakest choice in the plan: only
    "measured-on-target" entitles to "not slower". `recipe` carries the pins that replay it.
    `stamps` mark every figure ("data-free"). `next_commands` are whole command lines to try next.
    """

    bundle: Path | None
    target: str
    evidence: Evidence
    plan: Plan
    recipe: Recipe
    drift: DriftReport | None
    benchmark: Comparison | None
    sizes: Sizes
    refusals: tuple[Refusal, ...] = ()
    stamps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    next_commands: tuple[str, ...] = ()
