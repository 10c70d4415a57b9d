"""`edgepress benchmark`: time bundles and models against each other on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from .. import __version__
from ..calibration.data import generated_data
from ..compress.recipe import Recipe
from ..export.environment import numeric_environment
from ..export.manifest import SessionSettings
from ..export.runs import append_run
from ..graph.errors import OutputError, RecipeError, RuntimeUnavailable
from ..graph.tables import index_bounds
from ..runtimes.base import Array
from ..runtimes.device_runner import own_affinity
from ..runtimes.feeds import fit_floats
from ..runtimes.ort_runtime import OrtSession
from ..runtimes.peak_memory import ColdStart, measure_cold_start
from ..runtimes.timing import BenchmarkResult, Candidate, Schedule, benchmark
from .devices.options import on_devices
from .devices.scenario_options import asks_for_runner
from .history.after_run import finish, request_of
from .history.record import local_run, measured, utc_now
from .input_shapes import input_shapes
from .opened import Opened, open_named
from .options import shapes_from
from .output import Answer
from .reporter import Reporter, absolute_progress
from .timing_tables import interval_table, measured_how, timing_table

Feeds = Mapping[str, Array]
_INPUT_SETS = 4
# As much as the device runner measures on a board.
_SCHEDULE = Schedule(pairs=8, runs=30, least_pair_s=0.2)


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Time everything that was named, the baseline first; bundles keep the figures in runs/.

    Raises:
        ModelError: if something named cannot be opened.
        DataError: if the models do not take the same inputs.
        RecipeError: if --shape names no input of them.
    """
    request = request_of(arguments)
    if on_devices(arguments) or asks_for_runner(arguments):
        from .devices import commands as device_commands

        entries = device_commands.devices_of(arguments)
        if not entries and asks_for_runner(arguments):
            entries = (device_commands.THIS_MACHINE,)
        if entries:
            return device_commands.benchmark(arguments, entries, reporter, request)
    started = utc_now()
    named = list(dict.fromkeys([*filter(None, [arguments.baseline]), *arguments.bundle_or_model]))
    threads = 1 if arguments.threads is None else arguments.threads
    opened = [open_named(name, reporter, threads=threads) for name in named]
    compiled_for = next((item.shapes for item in opened if item.shapes), {})
    usual = {name: item.opt for name, item in compiled_for.items()}
    feeds = _inputs(opened[0], usual | shapes_from(arguments.shape), arguments.seed or 0)
    batch = next((len(values) for values in feeds[0].values() if values.ndim), 1)
    schedule = dataclasses.replace(
        _SCHEDULE, pairs=arguments.rounds or _SCHEDULE.pairs, runs=arguments.runs or _SCHEDULE.runs
    )
    with tempfile.TemporaryDirectory(prefix="edgepress-benchmark-") as scratch:
        files = [item.saved(_subfolder(scratch, index)) for index, item in enumerate(opened)]
        candidates = [
            Candidate(
                name=item.name,
                open=functools.partial(OrtSession, file, item.options),
                feeds=[fit_floats(item.inputs, one) for one in feeds],
                samples_per_run=batch,
            )
            for item, file in zip(opened, files, strict=True)
        ]
        with reporter.stage("benchmark", total=schedule.pairs) as stage:
            result = benchmark(candidates, schedule, progress=absolute_progress(stage))
        with reporter.stage("cold start", total=len(opened)) as stage:
            starts = []
            for item, file in zip(opened, files, strict=True):
                starts.append(_cold_start(item, file, feeds[0], reporter))
                stage.advance()
        about = [
            measured(item, file, role="baseline" if item.name == arguments.baseline else "")
            for item, file in zip(opened, files, strict=True)
        ]
    result = _with_starts(result, starts)
    shape_texts = [f"{name}:{'x'.join(map(str, values.shape))}" for name, values in feeds[0].items()]
    document = {
        "started": started,
        "edgepress": __version__,
        "threads": threads,
        "affinity": own_affinity(),
        "inputs": shape_texts,
        "measured": about,
        "environment": numeric_environment(SessionSettings(config={}), threads),
        "benchmark": result,
    }
    for item in opened:
        _keep(item, document, reporter)
    answer = Answer(
        document=document,
        blocks=(
            f"Threads: {threads}; inputs {', '.join(shape_texts)}; {measured_how(result)}.",
            timing_table(result),
            interval_table(
                [item.name for item in result.timings], [item.intervals_ms for item in result.timings]
            ),
        ),
    )
    return finish(request, [local_run(document, "benchmark")], answer, reporter)


def _inputs(opened: Opened, shapes: dict[str, tuple[int, ...]], seed: int) -> Sequence[Feeds]:
    """A few sets of generated inputs of the shapes asked for, or that a bundle was compiled for.

    Other axes are 1 (batch) and 128.
    """
    model = opened.graph()
    known = [spec.name for spec in model.inputs]
    for name in shapes:
        if name not in known:
            raise RecipeError(
                f"{opened.name} has no input {name!r}",
                where="--shape",
                remedy=f"its inputs are {', '.join(map(repr, known))}",
            )
    chosen = input_shapes(model, Recipe(target="host", shapes=shapes))
    batch = next((shape[0] for shape in chosen.values() if shape), 1)
    data = generated_data(
        model.inputs, chosen, _INPUT_SETS * batch, seed=seed, index_limits=index_bounds(model)
    )
    return [feeds for feeds, _ in data.batches(batch)]


def _subfolder(scratch: str, index: int) -> Path:
    folder = Path(scratch) / str(index)
    folder.mkdir()
    return folder


def _cold_start(opened: Opened, file: Path, feeds: Feeds, reporter: Reporter) -> ColdStart | None:
    try:
        return measure_cold_start(file, fit_floats(opened.inputs, feeds), opened.options)
    except RuntimeUnavailable as error:
        reporter.warn(f"cold start and peak memory of {opened.name} were not measured: {error.what}")
        return None


def _with_starts(result: BenchmarkResult, starts: Sequence[ColdStart | None]) -> BenchmarkResult:
    timings = tuple(
        timing
        if start is None
        else msgspec.structs.replace(
            timing,
            cold_start_ms=start.cold_start_ms,
            peak_memory_bytes=start.peak_memory_bytes,
            session_ms={**timing.session_ms, "cold_start": start.each_ms},
        )
        for timing, start in zip(result.timings, starts, strict=True)
    )
    return msgspec.structs.replace(result, timings=timings)


def _keep(opened: Opened, document: Mapping[str, object], reporter: Reporter) -> None:
    """Add the figures to a bundle's runs/; a bundle that cannot be written to is no obstacle."""
    if opened.bundle is None:
        return
    try:
        append_run(opened.bundle, "benchmark", msgspec.to_builtins(document))
    except OutputError as error:
        reporter.warn(f"the figures were not kept in {opened.bundle}: {error.why or error.what}")
