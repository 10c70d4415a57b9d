"""From a finished candidate to a bundle on disk: manifest, golden samples, assets, recipe with pins."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from ..export.bundle import BundleContents, append_run, write_bundle
from ..export.golden import GoldenSet, measure_golden
from ..export.manifest import (
    DataRecord,
    InputShapes,
    Manifest,
    ModelRecord,
    PrecisionSummary,
    TargetRecord,
    package_versions,
    session_settings,
)
from ..export.samples import inputs_of_shapes
from ..graph.errors import DataError
from ..runtimes.feeds import fit_floats
from .input_shapes import extreme_shapes, input_shapes, shape_ranges
from .pareto import RUN_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from ..calibration.data import CalibrationData
    from ..calibration.drift import DriftReport
    from ..compress.recipe import Recipe
    from ..frontends.source import Source
    from ..graph.model import Model
    from ..runtimes.timing import BenchmarkResult
    from ..targets.profile import Evidence, TargetProfile
    from .candidate import Candidate
    from .data_sets import DataSets
    from .pareto import ParetoTable
    from .reporter import Reporter

_GOLDEN_SAMPLES = 3


def golden_samples(candidate: Candidate, recipe: Recipe, data: CalibrationData | None) -> GoldenSet | None:
    """Golden inputs and outputs of a candidate, unless the recipe skips them.

    Where ranges of shapes are asked for, generated ones are of the least, the usual and the largest.
    """
    if "golden" in recipe.skip:
        return None
    shapes = extreme_shapes(candidate.model, recipe)
    own = list(inputs_of_shapes(candidate.model, shapes, seed=recipe.seed)) if shapes else None
    if recipe.golden == "data":
        if data is None:
            raise DataError(
                "there is no data to take golden samples from",
                where="--golden data",
                remedy="pass --calib or --eval, or leave --golden out for generated samples",
            )
        samples = zip(data, range(_GOLDEN_SAMPLES), strict=False)
        own = [fit_floats(candidate.model.inputs, feeds) for feeds, _ in samples]
    return measure_golden(
        candidate.model,
        candidate.file,
        session_settings(candidate.options(recipe.threads)),
        inputs=own,
        source=recipe.golden,
        seed=recipe.seed,
        threads=recipe.threads,
        shapes=recipe.shapes or None,
        form=candidate.plan.precision,
        io_dtype=candidate.plan.io_dtype,
    )


def bundle(
    out: Path,
    source: Source,
    profile: TargetProfile,
    candidate: Candidate,
    *,
    recipe: Recipe,
    sets: DataSets,
    drift: DriftReport | None,
    timing: BenchmarkResult | None,
    pareto: ParetoTable | None,
    evidence: Evidence,
    overwrite: bool,
    reporter: Reporter,
    timed_on: str | None = None,
) -> Path:
    """Write the bundle atomically; the benchmark and what was measured on the way into its runs/.

    `timed_on` names the device of the benchmark; None is the machine that compiled.
    """
    with reporter.stage("golden samples"):
        golden = golden_samples(candidate, recipe, sets.evaluate)
    manifest = Manifest(
        model=ModelRecord(
            name=source.model.origin.name,
            files=tuple(path.name for path in candidate.files),
            fingerprint=candidate.model.fingerprint(),
            inputs=candidate.model.inputs,
            outputs=candidate.model.outputs,
            opset=candidate.model.opset,
            ir_version=candidate.model.ir.ir_version,
        ),
        source=source.model.origin,
        task=source.model.task,
        target=TargetRecord(name=profile.name, runtime=profile.runtime.name, profile_digest=_digest(profile)),
        data=tuple(_records(sets)),
        shapes=_shapes(source.model, recipe),
        evidence=evidence,
        precision=PrecisionSummary(
            requested=recipe.precision,
            form=candidate.plan.precision,
            io_dtype=candidate.plan.io_dtype,
            quantization=candidate.plan.quantization,
            operators=dict(sorted(Counter(item.form for item in candidate.plan.decisions).items())),
        ),
        session_options=session_settings(candidate.options(recipe.threads)),
        golden=None if golden is None else golden.record,
        assets=tuple(sorted(source.files)),
        stamps=sets.stamps,
        versions=package_versions(*(("torch", "transformers") if source.model.origin.exporter else ())),
    )
    contents = BundleContents(
        manifest=manifest,
        model_files=candidate.files,
        recipe=recipe,
        plan=candidate.plan,
        drift=drift,
        golden=golden,
        assets=source.files,
    )
    with reporter.stage("writing the bundle"):
        place = write_bundle(contents, out, overwrite=overwrite)
        if timing is not None:
            where = timed_on or "the machine that compiled"
            append_run(place, "benchmark", {"where": where, **msgspec.to_builtins(timing)})
        if pareto is not None:
            append_run(place, RUN_NAME, msgspec.to_builtins(pareto))
    return place


def _shapes(model: Model, recipe: Recipe) -> dict[str, InputShapes]:
    usual = input_shapes(model, recipe)
    return {
        name: InputShapes(min=item.min, opt=usual[name], max=item.max)
        for name, item in shape_ranges(model, recipe).items()
    }


def _records(sets: DataSets) -> list[DataRecord]:
    records = []
    if sets.cached is not None:
        known = sets.cached
        records.append(
            DataRecord(
                name=known.name,
                digest=known.digest,
                origin=known.origin,
                split="calibrate",
                samples=known.samples,
            )
        )
    for data, split in ((sets.calibrate, "calibrate"), (sets.evaluate, "evaluate")):
        if data is not None:
            records.append(
                DataRecord(
                    name=data.name,
                    digest=data.digest,
                    origin=data.origin,
                    split="calibrate" if split == "calibrate" else "evaluate",
                    samples=len(data),
                )
            )
    return records


def _digest(profile: TargetProfile) -> str:
    return hashlib.sha256(msgspec.json.encode(profile, order="sorted")).hexdigest()
