"""Looking at activations on the calibration data: static ranges, and the middles of dynamic ones."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from ..calibration.collect import collect_channel_limits, collect_ranges
from ..compress.quantize.centre import CENTRE, CentreActivations, centrable
from ..compress.quantize.static import static_layout
from ..graph.passes import run_passes
from ..runtimes.base import SessionOptions
from .budget import steps

if TYPE_CHECKING:
    from ..calibration.data import CalibrationData
    from ..compress.plan import Plan
    from ..compress.quantize.static import Ranges
    from ..compress.recipe import Recipe
    from ..graph.model import Model
    from ..graph.passes import PassRecord
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


def centred(
    model: Model,
    plan: Plan,
    data: CalibrationData | None,
    recipe: Recipe,
    *,
    reporter: Reporter,
    cache: CalibCache | None = None,
) -> tuple[Model, list[PassRecord]] | None:
    """A fork with normalised activations centred on the data or a cache: the same function, finer steps.

    Returns:
        The fork and what the pass did; None where the plan has nothing to centre, or the recipe
        switches it off.
    """
    names = centrable(model, plan.decisions)
    if not names or not recipe.fusions.get(CENTRE, True):
        return None
    limits = None if cache is None else cache.channels(model, names)
    if limits is None:
        if data is None:
            return None
        with reporter.stage("centring activations", len(data)) as stage:
            limits = collect_channel_limits(
                model, names, data, options=_options(recipe), progress=steps(stage.advance)
            )
        if cache is not None:
            cache.keep_channels(limits)
    made = model.fork()
    return made, run_passes(made, [CentreActivations(limits=limits)])


def ranges_digest(ranges: Ranges) -> str:
    """SHA-256 of ranges, in hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(sorted(ranges.items()))).hexdigest()


def _options(recipe: Recipe) -> SessionOptions:
    return SessionOptions(threads=recipe.threads, graph_optimization_level="basic")
