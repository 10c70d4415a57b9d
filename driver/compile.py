"""`compile_model`: from a model and a target's name to a verified bundle, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..compress.operands import TABLE_OPS
from ..compress.plan import Plan
from ..compress.propose import Request, is_quantized, propose
from ..compress.recipe import Pins, Recipe
from ..export.place import check_output
from ..export.verify import verify_bundle
from ..frontends.source import Source, load_source
from ..graph.errors import NotSupported, RecipeError
from ..graph.load import require_no_nan
from ..graph.save import save_model
from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import OrtSession
from ..targets.registry import load_target
from .budget import hold, open_budget
from .bundling import bundle
from .cache import cache_folder
from .calib_cache import CalibCache
from .candidate import Candidate, build, check_samples, difference, prepare
from .data_sets import DataSets, open_data_sets
from .input_shapes import check_shapes
from .local_benchmark import COMPILED, WITHOUT_OPTIONS, slowness, time_against_baseline, timing_inputs
from .observing import centred, observe_ranges, ranges_digest
from .reporter import Reporter, SilentReporter
from .result import CompileResult, Sizes, next_commands, weakest_evidence
from .workspace import workspace

if TYPE_CHECKING:
    from ..calibration.data import CalibrationData
    from ..calibration.drift import DriftReport
    from ..compress.quantize.static import Ranges
    from ..graph.model import Model
    from ..graph.passes import PassRecord
    from ..runtimes.base import Array
    from ..runtimes.timing import BenchmarkResult
    from ..targets.profile import Evidence, TargetProfile

INT8, FUSIONS = "int8", "fusions"
"""What a slower form is rolled back to lose, as pins name it."""


def compile_model(
    model: str | Path,
    *,
    target: str,
    output: str | Path | None = None,
    calib: str | None = None,
    eval_data: str | None = None,
    calib_cache: str | Path | None = None,
    recipe: Recipe | None = None,
    tokenizer: str | None = None,
    preprocessor: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> CompileResult:
    """Compile a model for a target into a bundle: smaller, not slower, with its drift measured.

    Args:
        model: an .onnx file, a Hugging Face folder, or a hub id.
        target: a built-in target's name ("raspberry-pi-5", "host") or a profile's path.
        output: the bundle's folder; None measures without writing one.
        calib: calibration data (see `calibration.data.open_data`).
        eval_data: evaluation data; without it 20 % of `calib` are held out.
        calib_cache: a file of calibrated ranges: used if it is there (then `calib` may be left out, and
            without `eval_data` no drift is measured), else written.
        recipe: everything else that can be asked for; its `target` gives way to `target`.
        tokenizer: a tokenizer.json or folder, if it is not beside the model.
        preprocessor: a preprocessor_config.json or folder, if it is not beside the model.
        overwrite: replace an existing bundle at `output`, once the new one is whole.
        dry_run: stop at the plan: nothing is calibrated, timed or written.
        reporter: hears of progress; silent by default.

    Raises:
        UserError: if the model, data, target, recipe or output place is unusable (exit code 2).
        CheckFailed: if the drift limit cannot be held, or the bundle does not verify (3).
        Unavailable: if a package or runtime is missing, or the request is not supported yet (4).
    """
    asked = msgspec.structs.replace(recipe or Recipe(target=target), target=target)
    work = _Compile(asked, reporter or SilentReporter())
    work.open_target()
    if output is not None and not dry_run:
        check_output(Path(output), overwrite)
    work.open_source(str(model), tokenizer, preprocessor)
    with workspace() as folder:
        work.folder = folder
        work.open_data(calib, eval_data, calib_cache)
        work.prepare(str(model))
        work.plan()
        if dry_run:
            return work.result(None)
        work.build()
        work.hold_limits()
        work.benchmark()
        place = work.write(Path(output), overwrite) if output is not None else None
        return work.result(place, str(model))


class _Compile:
    """The state of one compile; each method is a stage that needs the ones before it."""

    source: Source
    profile: TargetProfile
    folder: Path
    sets: DataSets
    cache: CalibCache | None
    baseline_file: Path
    baseline: OrtSession
    samples: list[dict[str, Array]]
    expected: list[dict[str, Array]]
    prepared: Model
    current_plan: Plan
    candidate: Candidate

    def __init__(self, recipe: Recipe, reporter: Reporter) -> None:
        self.recipe = recipe
        self.reporter = reporter
        self.ranges: Ranges = {}
        self.records: list[PassRecord] = []
        self.notes: list[str] = []
        self.drift: DriftReport | None = None
        self.timing: BenchmarkResult | None = None
        self.reverted: tuple[str, ...] = ()
        self.rolled_back: tuple[str, ...] = ()
        self.source_bytes = 0
        self.built = False

    def open_target(self) -> None:
        self.profile = load_target(self.recipe.target, self.recipe.override_texts)
        if self.profile.runtime.name == "tensorrt":
            name = self.profile.name
            raise NotSupported(
                f"compiling for {name} is not there yet: its runtime is TensorRT",
                where="--target",
                why="artifacts are made for onnxruntime on CPUs so far; TensorRT's come with a later version",
                remedy=f"see whether the model fits its parser now: edgepress inspect MODEL --target {name}",
            )
        if self.recipe.precision in ("bf16", "fp16"):
            raise NotSupported(
                f"precision {self.recipe.precision} is not supported yet",
                where="--precision",
                why="typed float graphs come with a later version; onnxruntime's CPU kernels compute "
                "BF16 nowhere, and FP16 only on cores with asimdhp",
                remedy="use --precision auto, int8 or fp32",
            )

    def open_source(self, model: str, tokenizer: str | None, preprocessor: str | None) -> None:
        with self.reporter.stage("loading the model"):
            self.source = load_source(
                model,
                tokenizer=tokenizer,
                preprocessor=preprocessor,
                trust_code=self.recipe.trust_code,
                cache_folder=cache_folder(),
                progress=self.reporter.note,
            )
            require_no_nan(self.source.model)
        check_shapes(self.source.model, self.recipe)
        pins = self.recipe.pins
        if pins is not None and pins.model_sha256 != self.source.model.fingerprint():
            raise RecipeError(
                "the recipe's pinned choices belong to another model",
                where="pins.model_sha256",
                why=f"{self.source.model.origin.name} has another graph or other weights",
                remedy="remove the [pins] table to let the choices be made anew",
            )

    def open_data(self, calib: str | None, eval_data: str | None, calib_cache: str | Path | None) -> None:
        self.cache = None if calib_cache is None else CalibCache(Path(calib_cache))
        with self.reporter.stage("reading the data"):
            self.sets = open_data_sets(self.source, self.recipe, calib, eval_data, self.cache)
        for note in self.sets.notes:
            self.reporter.note(note)
        if self.cache is not None:
            doubt = self.cache.check(self.source.model, self.sets.calibrate, self.recipe.calib_method)
            if doubt is not None:
                self._warn(doubt)
            if self.sets.evaluate is None and "drift" not in self.recipe.skip:
                self._warn("drift is not measured, and no limit is held: there is no data (add --eval DATA)")

    def prepare(self, model: str) -> None:
        """Open the untouched baseline, then clean up and fuse a fork, checked against it."""
        path = Path(model).expanduser()
        if self.source.model.origin.kind == "onnx" and path.is_file():
            self.baseline_file = path
            names = self.source.model.origin.files
            self.source_bytes = sum((path.parent / name).stat().st_size for name in names)
        else:
            folder = self.folder / "baseline"
            folder.mkdir()
            files = save_model(self.source.model.fork(), folder / "model.onnx")
            self.baseline_file = files[0]
            self.source_bytes = sum(file.stat().st_size for file in files)
        with self.reporter.stage("cleaning up and fusing"):
            options = SessionOptions(threads=self.recipe.threads).for_answers(self.source_bytes)
            self.baseline = OrtSession(self.baseline_file, options)
            data = self.sets.evaluate or self.sets.calibrate
            self.samples, self.expected = check_samples(self.source.model, data, self.recipe, self.baseline)
            if self.keeps_source_graph():
                self.prepared = self.source.model.fork()
                return
            self.prepared, self.records = prepare(
                self.source.model,
                self.profile,
                self.recipe,
                samples=self.samples,
                expected=self.expected,
                reporter=self.reporter,
            )

    def keeps_source_graph(self) -> bool:
        """Whether the recipe pins that even the float form was slower, so that nothing is changed."""
        return self.recipe.pins is not None and FUSIONS in self.recipe.pins.rolled_back

    def plan(self) -> None:
        """Decide node by node; with pins, as they say."""
        recipe, pins = self.recipe, self.recipe.pins
        quantization = (pins.quantization if pins else None) or recipe.quantization
        request = Request(
            quantization=quantization,
            keep_float=recipe.keep_float,
            calibrated=self.sets.calibrated,
            shapes=recipe.shapes,
        )
        plan = propose(self.prepared, self.profile, request)
        everything = frozenset(plan.groups)
        if recipe.precision == "fp32":
            plan = plan.revert(everything, "--precision fp32")
        elif is_quantized(self.source.model):
            self._refuse_or_note("the model is quantized already; its operators are left as they are")
            plan = plan.revert(everything, "the model is quantized already")
        elif not everything:
            reasons = sorted({item.reason for item in plan.decisions})
            self._refuse_or_note(f"nothing can run in INT8 on {self.profile.name}: {'; '.join(reasons[:3])}")
        if pins is not None:
            plan = plan.revert(frozenset(pins.reverted), "pinned by the recipe")
            if pins.data_sha256 is not None and pins.data_sha256 != self._data_digest():
                self._warn("the recipe's choices were pinned on other calibration data")
            if INT8 in pins.rolled_back or FUSIONS in pins.rolled_back:
                plan = plan.revert(frozenset(plan.groups), "rolled back: slower, pinned by the recipe")
            self.reverted, self.rolled_back = pins.reverted, pins.rolled_back
        refusals = tuple(refusal for record in self.records for refusal in record.refused)
        self.current_plan = msgspec.structs.replace(plan, passes=tuple(self.records), refusals=refusals)

    def _refuse_or_note(self, text: str) -> None:
        if self.recipe.precision == "int8":
            raise NotSupported(
                text, where=self.source.model.origin.name, remedy="use --precision auto or fp32"
            )
        self.notes.append(text)
        self.reporter.warn(text)

    def build(self) -> None:
        """Centre what is dynamic, calibrate what is static, apply the plan, let the runtime confirm it."""
        data = self.sets.calibrate
        if self.sets.calibrated:
            self._centre(data)
            self._calibrate(data)
        if self.cache is not None and data is not None:
            note = self.cache.write(self.source.model, data, self.recipe.calib_method)
            if note is not None:
                self.notes.append(note)
        with self.reporter.stage("applying the plan"):
            self.candidate = self.lower(self.current_plan, self.folder / "candidate")
        self.built = True
        for finding in self.candidate.audit.unplanned:
            self._warn(
                f"{finding.node} is planned in float, but the runtime makes {finding.runtime_op} of it"
            )

    def _calibrate(self, data: CalibrationData | None) -> None:
        self.ranges, notes = observe_ranges(
            self.prepared,
            self.current_plan,
            data,
            self.recipe,
            reporter=self.reporter,
            cache=self.cache,
        )
        self.notes += notes
        pins = self.recipe.pins
        if pins is not None and self.ranges and pins.ranges_sha256 not in (None, ranges_digest(self.ranges)):
            self._warn("calibration found other ranges than those that the recipe pins")

    def _centre(self, data: CalibrationData | None) -> None:
        made = centred(
            self.prepared,
            self.current_plan,
            data,
            self.recipe,
            reporter=self.reporter,
            cache=self.cache,
        )
        if made is None:
            return
        problem = difference(made[0], self.samples, self.expected)
        if problem is not None:
            self._warn(f"centring changed the results ({problem}): left out")
            return
        self.prepared = made[0]
        passes = (*self.current_plan.passes, *made[1])
        self.current_plan = msgspec.structs.replace(self.current_plan, passes=passes)

    def lower(self, plan: Plan, folder: Path) -> Candidate:
        return build(
            self.prepared, plan, self.ranges, self.profile, folder, with_shapes=self.keeps_source_graph()
        )

    def hold_limits(self) -> None:
        if "drift" in self.recipe.skip or self.sets.evaluate is None:
            return
        task = self.source.model.task
        with open_budget(self.baseline, self.sets.evaluate, task, self.recipe, self.reporter) as budget:
            self.candidate, self.drift, reverted = hold(
                self.candidate,
                budget,
                self.lower,
                ranking_data=self.sets.calibrate,
                folder=self.folder,
                reporter=self.reporter,
            )
        self.reverted += reverted

    def benchmark(self) -> None:
        """Time the candidate here; on the host itself a form that does not pay is rolled back."""
        if "benchmark" in self.recipe.skip:
            return
        self.timing = self._time()
        if self.profile.kind != "host" or self.recipe.pins is not None:
            return
        if self.candidate.plan.groups:
            text = slowness(self.timing, "INT8")
            if text is None:
                return
            if self.recipe.precision == "int8":
                self._warn(f"{text}; kept because --precision int8 asks for it")
                return
            self._warn(f"{text}: rolled back to float")
            self.rolled_back += (INT8,)
            groups = frozenset(self.candidate.plan.groups)
            plan = self.candidate.plan.revert(groups, f"rolled back: {text}")
            self._replace(self.lower(plan, self.folder / "float"))
        text = slowness(self.timing, "the cleaned and fused float form")
        if text is not None:
            self._warn(f"{text}: the graph that went in is kept as it is")
            self.rolled_back += (FUSIONS,)
            plan = msgspec.structs.replace(self.candidate.plan, passes=())
            source = self.source.model.fork()
            folder = self.folder / "source"
            self._replace(build(source, plan, {}, self.profile, folder, with_shapes=True))

    def _replace(self, candidate: Candidate) -> None:
        """Take another candidate, with its own drift and timing."""
        self.candidate = candidate
        if self.drift is not None:
            self.drift = None
            self.hold_limits()
        self.timing = self._time()

    def _data_digest(self) -> str | None:
        return self.sets.calibration_digest

    def _warn(self, text: str) -> None:
        self.notes.append(text)
        self.reporter.warn(text)

    def _time(self) -> BenchmarkResult:
        feeds = timing_inputs(self.source, self.recipe)
        threads = self.recipe.threads
        forms = [(COMPILED, self.candidate.file, self.candidate.options(threads))]
        if self.candidate.config:
            forms.append((WITHOUT_OPTIONS, self.candidate.file, SessionOptions(threads=threads)))
        return time_against_baseline(
            self.baseline_file, forms, feeds, threads, self.reporter, rounds=self.recipe.benchmark_rounds
        )

    def evidence(self) -> Evidence:
        timed_there = self.profile.kind == "host" and self.timing is not None
        return "measured-on-target" if timed_there else weakest_evidence(self.candidate.plan)

    def pinned(self) -> Recipe:
        """The recipe with the choices that were made, so that a replay times nothing."""
        plan = self.candidate.plan
        compute = {item.form for item in plan.quantized() if item.op not in TABLE_OPS}
        pins = Pins(
            model_sha256=self.source.model.fingerprint(),
            data_sha256=self._data_digest(),
            precision="int8" if plan.groups else "fp32",
            quantization=next(iter(compute)) if len(compute) == 1 else self.recipe.quantization,  # type: ignore[arg-type]
            calib_method=self.recipe.calib_method if self.ranges else None,
            fusions=dict(self.recipe.fusions),
            reverted=self.reverted,
            rolled_back=self.rolled_back,
            ranges_sha256=ranges_digest(self.ranges) if self.ranges else None,
        )
        return msgspec.structs.replace(self.recipe, pins=pins)

    def write(self, output: Path, overwrite: bool) -> Path:
        place = bundle(
            output,
            self.source,
            self.profile,
            self.candidate,
            recipe=self.pinned(),
            sets=self.sets,
            drift=self.drift,
            timing=self.timing,
            evidence=self.evidence(),
            overwrite=overwrite,
            reporter=self.reporter,
        )
        with self.reporter.stage("verifying the bundle"):
            verify_bundle(place)
        return place

    def result(self, place: Path | None, model: str = "") -> CompileResult:
        plan = self.candidate.plan if self.built else self.current_plan
        return CompileResult(
            bundle=place,
            target=self.profile.name,
            evidence=self.evidence() if self.built else "none",
            plan=plan,
            recipe=self.pinned() if self.built else self.recipe,
            drift=self.drift,
            benchmark=self.timing,
            sizes=Sizes(
                source_bytes=self.source_bytes,
                bundle_model_bytes=self.candidate.file_bytes if place is not None else None,
            ),
            refusals=plan.refusals,
            stamps=self.sets.stamps,
            notes=(self.source.baseline_note, *self.sets.notes, *self.notes),
            next_commands=next_commands(place, model),
        )
