"""Timing a compiled candidate against the untouched model on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from ..calibration.data import generated_data
from ..graph.errors import RuntimeUnavailable
from ..graph.tables import index_bounds
from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import OrtSession
from ..runtimes.peak_memory import measure_peak_memory
from ..runtimes.timing import BenchmarkResult, Schedule, benchmark
from ..runtimes.timing import Candidate as Timed
from .budget import steps
from .input_shapes import input_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ..compress.recipe import Recipe
    from ..frontends.source import Source
    from ..runtimes.base import Array, Runner
    from .reporter import Reporter

BASELINE = "before"
COMPILED = "after"
WITHOUT_OPTIONS = "after, default session options"
_RUNS = 16
_LIMIT_PER_ROUND_S = 6.0


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


def slowness(timing: BenchmarkResult, form: str) -> str | None:
    """What to say of a form that was timed slower than the model that went in; None if it was not."""
    comparison = next(item for item in timing.comparisons if item.candidate == COMPILED)
    if not comparison.is_slower():
        return None
    return f"{form} runs at {comparison.ratio:.2f}x of the model that went in, on this machine"


def time_against_baseline(
    baseline: Path,
    candidates: Sequence[tuple[str, Path, SessionOptions]],
    feeds: Mapping[str, Array],
    threads: int,
    reporter: Reporter,
    *,
    rounds: int = 5,
    with_memory: bool = True,
) -> BenchmarkResult:
    """Interleaved timing of model files; the first entry of the result is the baseline.

    Args:
        baseline: the untouched model's file, run with default options.
        candidates: (name, file, options) of each candidate.
        feeds: one set of inputs.
        threads: for the baseline; the candidates' options carry their own.
        reporter: progress.
        rounds: interleaved pairs of sessions.
        with_memory: also measure the peak memory of a fresh process per file.
    """
    files = {BASELINE: (baseline, SessionOptions(threads=threads))}
    files |= {name: (file, options) for name, file, options in candidates}
    timed = [
        Timed(name=name, open=_opener(file, options), feeds=(feeds,), samples_per_run=_batch(feeds))
        for name, (file, options) in files.items()
    ]
    schedule = Schedule(pairs=rounds, runs=_RUNS, limit_s=_LIMIT_PER_ROUND_S * rounds)
    with reporter.stage("timing on this machine", rounds) as stage:
        result = benchmark(timed, schedule, progress=steps(stage.advance))
    if not with_memory:
        return result
    return msgspec.structs.replace(
        result,
        timings=tuple(
            msgspec.structs.replace(timing, peak_memory_bytes=_peak_bytes(*files[timing.name], feeds))
            for timing in result.timings
        ),
    )


def _peak_bytes(file: Path, options: SessionOptions, feeds: Mapping[str, Array]) -> int | None:
    """Peak memory of a fresh process, or None where the system does not account it."""
    try:
        return measure_peak_memory(file, feeds, options)["peak_bytes"]
    except RuntimeUnavailable:
        return None


def _opener(file: Path, options: SessionOptions) -> Callable[[], Runner]:
    return lambda: OrtSession(file, options)


def _batch(feeds: Mapping[str, Array]) -> int:
    first = next(iter(feeds.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1
