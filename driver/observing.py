"""Looking at activations on the calibration data: the ranges of static INT8."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from ..calibration.collect import collect_ranges
from ..compress.quantize.static import static_layout
from ..runtimes.base import SessionOptions
from .budget import steps

if TYPE_CHECKING:
    from ..calibration.data import CalibrationData
    from ..compress.plan import Plan
    from ..compress.quantize.static import Ranges
    from ..compress.recipe import Recipe
    from ..graph.model import Model
    from .calib_cache import CalibCache
    from .reporter import Reporter


def observe_ranges(
    model: Model,
    plan: Plan,
    data: CalibrationData | None,
    recipe: Recipe,
    *,
    reporter: Reporter,
    cache: CalibCache | None = None,
) -> tuple[Ranges, list[str]]:
    """Ranges of all that the plan computes with static ranges, from one pass over the data or a cache.

    Returns:
        Tensor name -> (minimum, maximum), empty if nothing is static; and what is worth a note.
    """
    layout = static_layout(model, plan.decisions)
    if not layout.observed:
        return {}, []
    assert layout.activation is not None
    known = None if cache is None else cache.ranges(layout.observed, layout.activation)
    if known is not None or data is None:
        return known or {}, []
    with reporter.stage("calibrating", len(data)) as stage:
        observers = collect_ranges(
            model,
            layout.observed,
            data,
            method=recipe.calib_method,
            options=_options(recipe),
            progress=steps(stage.advance),
            memory_limit_bytes=recipe.max_memory_bytes,
            announce=lambda cost: reporter.note(f"calibration: {cost}"),
        )
    notes = [
        f"{name}: {observer.masked} mask values left out of its range"
        for name, observer in observers.items()
        if observer.masked
    ]
    ranges = {name: observer.limits(layout.activation) for name, observer in observers.items()}
    if cache is not None:
        cache.keep_ranges(ranges, layout.activation)
    return ranges, notes


def ranges_digest(ranges: Ranges) -> str:
    """SHA-256 of ranges, in hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(sorted(ranges.items()))).hexdigest()


def _options(recipe: Recipe) -> SessionOptions:
    return SessionOptions(threads=recipe.threads, graph_optimization_level="basic")
