"""Bringing static INT8 closer to float, by steps that are kept only where the measured error falls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..calibration.drift import measure_drift
from ..calibration.reference import ReferenceOutputs
from ..compress.cost import bind_axes, led_by_convolutions
from ..compress.lower import apply_plan
from ..compress.refine.entry import FLOAT_ENTRY, RelayEntry, entries, entry_in_float
from ..compress.refine.equalize import EQUALIZE, EqualizeChannels, collect_magnitudes, equalizable
from ..compress.refine.learned import LEARNED_ROUNDING, learn_rounding, learnable
from ..compress.refine.output_ranges import OUTPUT_RANGES, choose_output_ranges
from ..compress.refine.shortcut import SHORTCUT, ConvolveShortcuts, convolved, shortcuts
from ..graph.errors import EdgepressError
from ..graph.passes import run_passes
from ..graph.save import save_model
from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import OrtSession
from .budget import steps
from .candidate import difference
from .measuring.local_benchmark import time_against_baseline
from .observing import observe_ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..calibration.data import CalibrationData
    from ..compress.plan import Plan
    from ..compress.quantize.constants import Rounding
    from ..compress.quantize.static import Ranges
    from ..graph.model import Model
    from ..runtimes.base import Array
    from .conditioning import Conditions

_SAMPLES = 256
_WORTHWHILE = 0.99
_STATIC, _ENTRY, _CONVOLVED = "static", "first layer in float", "shortcuts convolved"

TIMED = frozenset({FLOAT_ENTRY, SHORTCUT})
"""The steps that depend on a timing: a recipe pins what came of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refined:
    """A graph of the same function, its plan, ranges and rounded weights, and what is worth a note."""

    model: Model
    plan: Plan
    ranges: Ranges
    rounding: Rounding = dataclasses.field(default_factory=dict)
    reverted: tuple[str, ...] = ()
    fusions: dict[str, bool] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def refine(
    model: Model, plan: Plan, given: Conditions, *, folder: Path, feeds: Mapping[str, Array] | None
) -> Refined:
    """Calibrate a plan, and take the steps that bring its static part closer to the float model.

    In turn: layers of few channels at the graph's inputs back to float (on the host alone, and only if that
    is no slower), weights rounded on recorded inputs, channels equalized, ranges chosen by the error at the
    outputs; at last strided shortcuts as convolutions (on the host alone, and only if that is no slower).
    `fusions` of the recipe switches each off; with a calibration cache none is taken.

    Args:
        model: the prepared graph.
        plan: what was decided.
        given: data, cache, recipe and what to hold the graph against.
        folder: for files that are timed.
        feeds: inputs for timing; None where nothing may be timed.
    """
    ranges, notes = observe_ranges(
        model, plan, given.data, given.recipe, reporter=given.reporter, cache=given.cache
    )
    current = Refined(model=model, plan=plan, ranges=ranges, notes=tuple(notes))
    if "static" not in {item.form for item in plan.decisions} or not ranges or given.data is None:
        return current
    if given.cache is not None:
        # A replay from the cache has no data for these steps: both must compile to the same model.
        note = "equalization and learned rounding are left out with a calibration cache: they need the data"
        return dataclasses.replace(current, notes=(*current.notes, note))
    pins = given.recipe.pins
    if pins is not None and pins.fusions.get(FLOAT_ENTRY, False) and given.wants(FLOAT_ENTRY):
        current = _entry_in_float(current, given) or current
    with _error_meter(given, given.data) as error:
        least = error(current)
        steps_in_turn: list[tuple[str, Callable[[Refined], Refined | None]]] = [
            (FLOAT_ENTRY, lambda now: _float_entry(now, given, folder, feeds)),
            (LEARNED_ROUNDING, lambda now: _rounded(now, given)),
            (EQUALIZE, lambda now: _equalized(now, given, error)),
            (OUTPUT_RANGES, lambda now: _output_ranges(now, given)),
        ]
        for name, step in steps_in_turn:
            made = step(current) if given.wants(name) else None
            found = None if made is None else error(made)
            if made is None or found is None or least is None:
                continue
            kept = found < least
            text = f"{name}: {'kept' if kept else 'left out'}, the error on calibration data is "
            notes = [*current.notes, f"{text}{found:.4f} with it, {least:.4f} without"]
            if kept:
                current, least = made, found
            fusions = {**current.fusions, name: kept}
            current = dataclasses.replace(current, notes=tuple(notes), fusions=fusions)
    return _shortcuts(current, given, folder, feeds) if given.wants(SHORTCUT) else current


@contextlib.contextmanager
def _error_meter(given: Conditions, data: CalibrationData) -> Iterator[Callable[[Refined], float | None]]:
    """Measures relative L2 between the untouched model and a quantized one on calibration samples."""
    few = data.select(range(min(len(data), _SAMPLES)), data.split)
    options = SessionOptions(threads=given.recipe.threads)
    with ReferenceOutputs.collect(given.baseline, few, given.task) as reference:

        def error(form: Refined) -> float | None:
            lowered, _ = apply_plan(form.model, form.plan, form.ranges, form.rounding)
            with given.reporter.stage("measuring the error on calibration data", len(few)) as stage:
                try:
                    report = measure_drift(
                        given.baseline,
                        OrtSession.from_model(lowered, options),
                        few,
                        given.task,
                        reference_cache=reference,
                        progress=steps(stage.advance),
                    )
                except EdgepressError:
                    return None
            return report.l2

        yield error


def _entry_in_float(current: Refined, given: Conditions) -> Refined | None:
    """The form with its first layers in float, calibrated anew; None if there is nothing to change."""
    nodes = [str(node.name) for node in entries(current.model)]
    groups = {item.group for item in current.plan.decisions if item.node in nodes}
    shared = {item.node for item in current.plan.decisions if item.group in groups} - set(nodes)
    static = any(item.form == "static" and item.op == "Conv" for item in current.plan.decisions)
    if not nodes or shared or not static:
        return None
    made = current.model.fork()
    records = run_passes(made, [RelayEntry(nodes=tuple(nodes))])
    plan = entry_in_float(current.plan, made, nodes)
    if not any(item.form == "static" for item in plan.decisions):
        return None
    ranges, _ = observe_ranges(made, plan, given.data, given.recipe, reporter=given.reporter)
    return dataclasses.replace(
        current,
        model=made,
        plan=msgspec.structs.replace(plan, passes=(*plan.passes, *records)),
        ranges={**current.ranges, **ranges},
        reverted=tuple(sorted(groups)),
    )


def _float_entry(
    current: Refined, given: Conditions, folder: Path, feeds: Mapping[str, Array] | None
) -> Refined | None:
    """First layers in float, where that is not slower here: timed as a whole model, interleaved."""
    static = {item.node for item in current.plan.decisions if item.form == "static"}
    if feeds is None or not given.on_target or given.recipe.pins is not None:
        return None
    if not any(node.name in static for node in entries(current.model)):
        return None
    made = _entry_in_float(current, given)
    if made is None:
        return None
    return made if _is_no_slower((current, made), _ENTRY, given, folder, feeds) else None


def _shortcuts(
    current: Refined, given: Conditions, folder: Path, feeds: Mapping[str, Array] | None
) -> Refined:
    """Strided shortcuts as convolutions, where that is not slower here: they copy the same integers."""
    nodes = tuple(shortcuts(current.model, current.plan))
    convolutions = any(item.form == "static" and item.op == "Conv" for item in current.plan.decisions)
    pins = given.recipe.pins
    if not nodes or not convolutions or not given.on_target or (feeds is None and pins is None):
        return current
    if pins is not None and not pins.fusions.get(SHORTCUT, False):
        return current
    model = current.model.fork()
    records = run_passes(model, [ConvolveShortcuts(nodes=nodes)])
    plan, ranges = convolved(current.plan, current.model, model, current.ranges)
    plan = msgspec.structs.replace(plan, passes=(*plan.passes, *records))
    made = dataclasses.replace(current, model=model, plan=plan, ranges=ranges)
    if difference(model, given.samples, given.expected):
        return current
    if pins is None and not (
        feeds is not None and _is_no_slower((current, made), _CONVOLVED, given, folder, feeds)
    ):
        return dataclasses.replace(current, fusions={**current.fusions, SHORTCUT: False})
    return dataclasses.replace(made, fusions={**current.fusions, SHORTCUT: True})


def _is_no_slower(
    forms: tuple[Refined, Refined],
    name: str,
    given: Conditions,
    folder: Path,
    feeds: Mapping[str, Array],
) -> bool:
    """Whether the second form is about as fast as the first, or faster: whole models, interleaved."""
    files = {}
    for title, form in zip((_STATIC, name), forms, strict=True):
        lowered, _ = apply_plan(form.model, form.plan, form.ranges, form.rounding)
        place = folder / f"{title}-for-{name}".replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        files[title] = save_model(lowered, place / "model.onnx")[0]
    threads = given.recipe.threads
    timed = time_against_baseline(
        files[_STATIC],
        [(name, files[name], SessionOptions(threads=threads))],
        feeds,
        threads,
        given.reporter,
        rounds=given.recipe.benchmark_rounds,
        with_memory=False,
        device=given.device,
    )
    return timed.comparisons[0].ratio >= _WORTHWHILE


def _output_ranges(current: Refined, given: Conditions) -> Refined | None:
    """Every tensor's range by the error that it alone makes at the outputs.

    Left out where products do most of the work: in transformers hundreds of tensors each take a forward of
    a large net for every candidate, minutes for a form that is not the one to choose there.
    """
    sizes = bind_axes(current.model, given.recipe.shapes)
    if given.data is None or not led_by_convolutions(current.model, sizes):
        return None
    with given.reporter.stage("choosing ranges by the error at the outputs", 100) as stage:
        advance = steps(stage.advance)
        ranges = choose_output_ranges(
            current.model,
            current.plan.decisions,
            current.ranges,
            given.data,
            options=_options(given),
            progress=lambda done, total: advance(100 * done // total, 100),
        )
    return None if ranges == dict(current.ranges) else dataclasses.replace(current, ranges=ranges)


def _equalized(
    current: Refined, given: Conditions, error: Callable[[Refined], float | None]
) -> Refined | None:
    """Channels scaled against each other, calibrated and rounded anew.

    Rounding is a part of it: finer activations cost coarser weights, which learned rounding makes good. Of
    the two ways (streams scaled as one, or not at all) the nearer one counts, weights at their nearest.
    """
    names = equalizable(current.model, current.plan.decisions)
    if not names or given.data is None:
        return None
    with given.reporter.stage("equalizing channels", len(given.data)) as stage:
        magnitudes = collect_magnitudes(
            current.model, names, given.data, options=_options(given), progress=steps(stage.advance)
        )
    forms = [
        found
        for shared in (False, True)
        if (found := _scaled(current, EqualizeChannels(magnitudes=magnitudes, shared=shared), given))
    ]
    if not forms:
        return None
    nearer = forms[0]
    if len({form.model.fingerprint() for form in forms}) > 1:
        errors = [math.inf if (l2 := error(form)) is None else l2 for form in forms]
        nearer = forms[errors.index(min(errors))]
    return (_rounded(nearer, given) if given.wants(LEARNED_ROUNDING) else None) or nearer


def _scaled(current: Refined, equalize: EqualizeChannels, given: Conditions) -> Refined | None:
    """A form with its channels scaled, calibrated anew, its weights rounded to nearest."""
    made = current.model.fork()
    records = run_passes(made, [equalize])
    if not any(record.applied for record in records) or difference(made, given.samples, given.expected):
        return None
    ranges, _ = observe_ranges(made, current.plan, given.data, given.recipe, reporter=given.reporter)
    plan = msgspec.structs.replace(current.plan, passes=(*current.plan.passes, *records))
    # What a reverted layer would need stays known: graph inputs, which no factor reaches.
    return dataclasses.replace(
        current, model=made, plan=plan, ranges={**current.ranges, **ranges}, rounding={}
    )


def _rounded(current: Refined, given: Conditions) -> Refined | None:
    """Weights rounded so that their layers' outputs change least."""
    static = tuple(item for item in current.plan.decisions if item.form == "static")
    if given.data is None or not learnable(current.model, static):
        return None
    few = given.data.select(range(min(len(given.data), _SAMPLES)), given.data.split)
    with given.reporter.stage("rounding weights on recorded inputs", 100) as stage:
        advance = steps(stage.advance)
        rounding = learn_rounding(
            current.model,
            static,
            few,
            options=_options(given),
            progress=lambda done, total: advance(100 * done // total, 100),
        )
    return dataclasses.replace(current, rounding=rounding) if rounding else None


def _options(given: Conditions) -> SessionOptions:
    return SessionOptions(threads=given.recipe.threads, graph_optimization_level="basic")
