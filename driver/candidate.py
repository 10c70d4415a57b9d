"""One lowered form of the model on disk: how it is made, opened and held against the baseline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from ..compress.audit import Audit, audit, demote_silent_floats
from ..compress.lower import apply_plan, fusion_passes
from ..compress.quantize.static import static_layout
from ..compress.sensitivity_graphs import missing_ranges
from ..compress.typed.apply import interface_passes
from ..compress.typed.twin import open_session
from ..export.samples import candidate_inputs, inputs_of_shapes
from ..graph.cleanup import exact_cleanup
from ..graph.errors import EdgepressError, InternalError, ModelError, RecipeError, UserError
from ..graph.passes import PassRecord, run_passes
from ..graph.save import save_model
from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import OrtSession
from .input_shapes import extreme_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..calibration.data import CalibrationData
    from ..compress.plan import Plan
    from ..compress.quantize.constants import Rounding
    from ..compress.quantize.static import Ranges
    from ..compress.recipe import Recipe
    from ..compress.typed.twin import Bfloat16Session
    from ..graph.model import Model
    from ..runtimes.base import Array
    from ..targets.profile import TargetProfile
    from .reporter import Reporter

_EXACT_FRACTION = 1e-4
_CHECK_SAMPLES = 3
SLOW_FUSIONS = {"SkipLayerNormalization": "SkipLayerNormFusion"}
_DISABLE_KEY = "optimization.disable_specified_optimizers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model in the form that would ship: graph, plan, file, options, and the runtime's view of it.

    `prepared` is the float graph that it was lowered from, with the ranges of what is static
    and the weights that are not rounded to nearest.
    """

    model: Model
    plan: Plan
    file: Path
    files: tuple[Path, ...]
    config: dict[str, str]
    audit: Audit
    prepared: Model | None = None
    ranges: Ranges = dataclasses.field(default_factory=dict, repr=False)
    rounding: Rounding = dataclasses.field(default_factory=dict, repr=False)

    @property
    def file_bytes(self) -> int:
        """Bytes of the model's files."""
        return sum(path.stat().st_size for path in self.files)

    def options(self, threads: int) -> SessionOptions:
        """Session options as the bundle will have them."""
        return SessionOptions(threads=threads, config=dict(self.config))

    def session(self, threads: int) -> OrtSession | Bfloat16Session:
        """A session to compare answers with; not for timing, since large weights stay mapped."""
        options = self.options(threads).for_answers(self.file_bytes)
        return open_session(self.file, options, self.plan.precision, self.plan.io_dtype)


def check_samples(
    model: Model, data: CalibrationData | None, recipe: Recipe, baseline: OrtSession
) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """A few inputs for comparing two forms of one model, and what the untouched model answers to them.

    The user's samples, else generated ones: of those the first sizes that the model takes. Where ranges
    of shapes are asked for, generated ones of the least and the largest are added.

    Raises:
        ModelError: if the model runs on none of the generated inputs.
        RecipeError: if it does not run on the least or the largest shapes that were asked for.
    """
    ends = check_range(model, recipe, baseline)
    if ends or (data is not None and len(data)):
        own = [feeds for feeds, _ in zip(data or (), range(_CHECK_SAMPLES), strict=False)]
        return own + [feeds for feeds, _ in ends], [
            *(baseline.run(feeds) for feeds in own),
            *(outputs for _, outputs in ends),
        ]
    refused: ModelError | None = None
    for made in candidate_inputs(model, seed=recipe.seed, count=_CHECK_SAMPLES, shapes=recipe.shapes):
        samples = [dict(sample) for sample in made]
        try:
            return samples, [baseline.run(feeds) for feeds in samples]
        except ModelError as error:
            refused = error
    if refused is None:
        raise InternalError("no inputs could be generated", where=model.origin.name)
    raise refused


def check_range(
    model: Model, recipe: Recipe, baseline: OrtSession
) -> list[tuple[dict[str, Array], dict[str, Array]]]:
    """Inputs of the least and the largest shapes that were asked for, and what the model answers to them.

    Raises:
        RecipeError: if it does not run on them.
    """
    shapes = extreme_shapes(model, recipe)
    found = []
    for entry, end in zip(shapes[::2], ("least", "largest"), strict=False):
        feeds = dict(inputs_of_shapes(model, [entry], seed=recipe.seed)[0])
        try:
            found.append((feeds, baseline.run(feeds)))
        except UserError as error:
            written = ", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in entry.items())
            raise RecipeError(
                f"the model does not run at the {end} shapes that --shape allows",
                where=written,
                why=error.why or error.what,
                remedy="narrow the range to what the model takes",
            ) from error
    return found


def prepare(
    model: Model,
    profile: TargetProfile,
    recipe: Recipe,
    *,
    samples: Sequence[Mapping[str, Array]],
    expected: Sequence[Mapping[str, Array]],
    reporter: Reporter,
) -> tuple[Model, list[PassRecord]]:
    """Clean up and fuse a fork of the model; each stage is checked against the expected results.

    A stage that changes the results beyond float noise is dropped with a warning, never shipped.
    """
    current, records = model.fork(), []
    for stage_name in ("clean-up", "fusion"):
        trial = current.fork()
        passes = (
            exact_cleanup() if stage_name == "clean-up" else fusion_passes(trial, profile, recipe.fusions)
        )
        done = run_passes(trial, passes)
        problem = difference(trial, samples, expected)
        if problem is not None:
            reporter.warn(f"{stage_name} changed the results ({problem}): left out; please report this model")
            continue
        current = trial
        records += done
    return current, records


def difference(
    model: Model, samples: Sequence[Mapping[str, Array]], expected: Sequence[Mapping[str, Array]]
) -> str | None:
    """How a graph's results differ from the expected ones beyond float noise, or None."""
    try:
        session = OrtSession.from_model(model)
        results = [session.run(feeds) for feeds in samples]
    except EdgepressError as error:
        return error.what
    for wanted, found in zip(expected, results, strict=True):
        for name, reference in wanted.items():
            values = found[name]
            if reference.shape != values.shape:
                return f"output {name!r} has shape {values.shape}, not {reference.shape}"
            if reference.dtype.kind != "f":
                if not np.array_equal(reference, values):
                    return f"output {name!r} differs"
                continue
            scale = np.abs(reference[np.isfinite(reference)]).max(initial=0.0)
            if not np.allclose(
                values, reference, rtol=_EXACT_FRACTION, atol=_EXACT_FRACTION * scale, equal_nan=True
            ):
                worst = np.nanmax(np.abs(values.astype(np.float64) - reference.astype(np.float64)))
                return f"output {name!r} is up to {worst:.2g} off, at a scale of {scale:.2g}"
    return None


def build(
    prepared: Model,
    plan: Plan,
    ranges: Ranges,
    profile: TargetProfile,
    folder: Path,
    *,
    with_shapes: bool = False,
    rounding: Rounding | None = None,
) -> Candidate:
    """Carry a plan out, write the file, and look up in the runtime's graph what it makes of it.

    Nodes that the runtime would compute in float although they were planned in integers are taken
    back to float, with that reason, and the file is made again.
    """
    candidate = _write(prepared, plan, ranges, profile, folder, with_shapes=with_shapes, rounding=rounding)
    while candidate.audit.silent_floats:  # ends: every round takes at least one node out of the plan
        plan = demote_silent_floats(plan, candidate.audit)
        candidate = _write(
            prepared, plan, ranges, profile, folder, with_shapes=with_shapes, rounding=rounding
        )
    config = dict(profile.session_config)
    slow = [
        optimizer
        for op, optimizer in SLOW_FUSIONS.items()
        if op in candidate.audit.operators and _is_slower(profile, op)
    ]
    if slow:
        config[_DISABLE_KEY] = ";".join(slow)
    return dataclasses.replace(candidate, config=config)


def _write(
    prepared: Model,
    plan: Plan,
    ranges: Ranges,
    profile: TargetProfile,
    folder: Path,
    *,
    with_shapes: bool,
    rounding: Rounding | None,
) -> Candidate:
    layout = static_layout(prepared, plan.decisions)
    ranges = {**ranges, **missing_ranges(prepared, layout.observed, ranges)}
    missing = [name for name in layout.observed if name not in ranges]
    if missing:
        raise InternalError("tensors were not calibrated", where=", ".join(missing[:5]))
    lowered, records = apply_plan(prepared, plan, ranges, rounding)
    records += run_passes(lowered, interface_passes(lowered, plan.io_dtype))
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(save_model(lowered, folder / "model.onnx", with_shapes=with_shapes))
    done = msgspec.structs.replace(plan, passes=(*plan.passes, *records))
    return Candidate(
        model=lowered,
        plan=done,
        file=files[0],
        files=files,
        config={},
        audit=audit(files[0], plan, profile),
        prepared=prepared,
        ranges=ranges,
        rounding=rounding or {},
    )


def _is_slower(profile: TargetProfile, op: str) -> bool:
    entry = profile.runtime_op(op)
    return entry is not None and entry.grade == "slower"
