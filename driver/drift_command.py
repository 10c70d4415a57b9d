"""`edgepress drift`: how far a candidate's answers are from a baseline's."""

from __future__ import annotations

import argparse

from ..calibration.data import open_data
from ..calibration.drift import measure_drift
from ..calibration.limits import check_limits, default_metric, own_metrics
from ..calibration.task_metrics import require_own_metrics
from ..compress.drift_limit import parse_drift_limits
from ..graph.errors import EXIT_CHECK, EXIT_OK, RecipeError
from .drift_tables import drift_blocks, limits_by_metric
from .opened import open_named
from .output import Answer
from .reporter import Reporter, absolute_progress


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Run both on the same data and compare; exit code 3 if a limit is not met.

    Raises:
        DataError: if the data does not fit, or the two have different outputs.
        ModelError: if one of them cannot be opened.
        RecipeError: if no data is named, or a limit does not apply.
    """
    if arguments.data is None:
        raise RecipeError(
            "no data is named",
            where="--data",
            remedy="give --data with .npz, a folder of arrays, texts, hf:NAME or module:function",
        )
    limits = () if arguments.max_drift is None else parse_drift_limits(arguments.max_drift)
    require_own_metrics(own_metrics(limit.metric or "" for limit in limits))
    threads = 1 if arguments.threads is None else arguments.threads
    baseline, candidate = (
        open_named(
            named, reporter, threads=threads, tokenizer=arguments.tokenizer, trust_code=arguments.trust_code
        )
        for named in (arguments.baseline, arguments.candidate)
    )
    shapes = candidate.shapes or baseline.shapes
    data = open_data(
        arguments.data,
        baseline.inputs,
        encoder=baseline.encoder or candidate.encoder,
        preprocessor=baseline.preprocessor or candidate.preprocessor,
        samples=arguments.samples,
        seed=arguments.seed or 0,
        shape_ranges={name: (item.min, item.max) for name, item in shapes.items()},
        classes=baseline.task.classes,
    )
    reference = baseline.session()
    has_labels = (data.pairs if baseline.task.kind == "embedding" else data.labels) is not None
    default = default_metric(baseline.task, has_labels, reference.outputs)
    bounds = limits_by_metric(limits, default)
    with reporter.stage("drift", total=2 * len(data)) as stage:
        report = measure_drift(
            reference,
            candidate.session(),
            data,
            baseline.task,
            own_metrics=own_metrics(bounds),
            progress=absolute_progress(stage),
        )
    results = check_limits(report, bounds)
    missed = [result for result in results if not result.met]
    for result in missed:
        reporter.warn(f"the drift limit on {result.metric} is not met: {result.reason}")
    return Answer(
        document={"baseline": baseline.name, "candidate": candidate.name, "drift": report, "limits": results},
        blocks=drift_blocks(report, results),
        exit_code=EXIT_CHECK if missed else EXIT_OK,
    )
