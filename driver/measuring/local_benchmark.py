"""Timing a compiled candidate against the untouched model, on this machine or a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from ...calibration.data import generated_data
from ...graph.errors import RuntimeUnavailable
from ...graph.tables import index_bounds
from ...runtimes.base import SessionOptions
from ...runtimes.device import Device, Form, LocalDevice
from ...runtimes.feeds import fit_floats
from ...runtimes.peak_memory import measure_peak_memory
from ...runtimes.timing import BenchmarkResult, Schedule
from ..budget import steps
from ..input_shapes import input_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ...compress.recipe import Recipe
    from ...frontends.source import Source
    from ...graph.model import TensorSpec
    from ...runtimes.base import Array
    from ..reporter import Reporter

BASELINE = "before"
COMPILED = "after"
WITHOUT_OPTIONS = "after, default session options"
_RUNS = 16
_LIMIT_PER_ROUND_S = 6.0
_LEAST_PAIR_S = 0.1
_WARM_UP_LIMIT_S = 1.0


def timing_inputs(source: Source, recipe: Recipe) -> dict[str, Array]:
    """One generated input set of the recipe's shapes: ids inside the vocabulary, masks all ones.

    Latency does not depend on the values, so this needs no user data and is the same everywhere.
    """
    model, encoder = source.model, source.encoder
    shapes = input_shapes(model, recipe, encoder.max_length if encoder else None)
    vocab_size = encoder.vocab_size if encoder else None
    batch = next((shape[0] for shape in shapes.values() if shape), 1)
    made = generated_data(
        model.inputs, shapes, batch, recipe.seed, index_limits=index_bounds(model), vocab_size=vocab_size
    )
    feeds, _ = next(made.batches(batch))
    return {name: np.asarray(values) for name, values in feeds.items()}


def slowness(timing: BenchmarkResult, form: str, where: str = "on this machine") -> str | None:
    """What to say of a form that was timed slower than the model that went in; None if it was not."""
    comparison = next(item for item in timing.comparisons if item.candidate == COMPILED)
    if not comparison.is_slower():
        return None
    return f"{form} runs at {comparison.ratio:.2f}x of the model that went in, {where}"


def time_against_baseline(
    baseline: Path,
    candidates: Sequence[tuple[str, Path, SessionOptions]],
    feeds: Mapping[str, Array],
    threads: int,
    reporter: Reporter,
    *,
    rounds: int = 5,
    with_memory: bool = True,
    device: Device | None = None,
    inputs: Sequence[TensorSpec] = (),
) -> BenchmarkResult:
    """Interleaved timing of model files; the first entry of the result is the baseline.

    Args:
        baseline: the untouched model's file, run with default options.
        candidates: (name, file, options) of each candidate.
        feeds: one set of inputs, as the baseline takes them.
        threads: for the baseline; the candidates' options carry their own.
        reporter: progress.
        rounds: interleaved pairs of sessions.
        with_memory: also measure the peak memory of a fresh process for the baseline and the candidate.
        device: where to time; this machine by default.
        inputs: what the candidates take, where their float types differ from the baseline's.
    """
    place = device or LocalDevice()
    files = {BASELINE: (baseline, SessionOptions(threads=threads))}
    files |= {name: (file, options) for name, file, options in candidates}
    own = {
        file: fit_floats(inputs, feeds) if inputs and file != baseline else feeds
        for file, _ in files.values()
    }
    forms = [
        Form(name=name, model=place.put([file]), options=options, feeds=own[file])
        for name, (file, options) in files.items()
    ]
    schedule = Schedule(
        pairs=rounds,
        runs=_RUNS,
        limit_s=_LIMIT_PER_ROUND_S * rounds,
        least_pair_s=_LEAST_PAIR_S * len(forms),
        most_pair_s=_LIMIT_PER_ROUND_S,
        warm_up_limit_s=_WARM_UP_LIMIT_S,
    )
    with reporter.stage(f"timing on {place.name}", rounds) as stage:
        result = place.time(forms, feeds, schedule, progress=steps(stage.advance))
    if not with_memory:
        return result
    return msgspec.structs.replace(
        result,
        timings=tuple(
            msgspec.structs.replace(timing, peak_memory_bytes=_peak_bytes(*files[timing.name], own))
            if timing.name in (BASELINE, COMPILED, WITHOUT_OPTIONS)
            else timing
            for timing in result.timings
        ),
    )


def _peak_bytes(file: Path, options: SessionOptions, feeds: Mapping[Path, Mapping[str, Array]]) -> int | None:
    """Peak memory of a fresh process, or None where the system does not account it."""
    try:
        return measure_peak_memory(file, feeds[file], options)["peak_bytes"]
    except RuntimeUnavailable:
        return None
