"""`compile_model`: from a model and a target's name to a verified bundle, stage by stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..calibration.limits import own_metrics
from ..calibration.task_metrics import require_own_metrics
from ..compress.emulate.predict import isa_notes
from ..compress.operands import TABLE_OPS
from ..compress.recipe import INT8_PRECISIONS, Pins, Quantization, Recipe
from ..compress.typed.request import check_io_dtype, form_of
from ..export.place import check_output
from ..export.verify import verify_bundle
from ..frontends.source import load_source
from ..graph.errors import NotSupported, RecipeError
from ..graph.load import require_no_nan
from ..graph.save import save_model
from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import OrtSession
from ..targets.registry import load_target
from .bundling import bundle
from .cache import cache_folder
from .calib_cache import CalibCache
from .candidate import Candidate, build, check_samples, prepare
from .data_sets import open_data_sets
from .input_shapes import check_shapes
from .measuring.device_planning import record_of, try_bundle
from .measuring.local_benchmark import slowness
from .measuring.stages import TimedForm
from .mixed_plan import completion_of
from .observing import ranges_digest
from .pareto import ParetoLog
from .plan_stage import FUSIONS, INT8, PlanStages
from .reporter import Reporter, SilentReporter
from .result import CompileResult, Sizes, next_commands
from .typed_plan import storage_doubts
from .workspace import workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..calibration.drift import DriftReport
    from ..compress.quantize.constants import Rounding
    from ..compress.quantize.static import Ranges
    from ..graph.model import Model
    from ..graph.passes import PassRecord
    from ..runtimes.device import Device
    from ..runtimes.timing import BenchmarkResult

_FLOAT_PRECISIONS = ("fp16", "bf16", "bf16-compute", "fp32")


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
    device: Device | None = None,
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
        device: where forms are timed and choices made by time; by default this machine, which decides for
            the target "host" only.

    Raises:
        UserError: if the model, data, target, recipe or output place is unusable (exit code 2).
        CheckFailed: if the drift limit cannot be held, or the bundle does not verify (3).
        Unavailable: if a package or runtime is missing, or the request is not supported yet (4).
    """
    asked = msgspec.structs.replace(recipe or Recipe(target=target), target=target)
    work = _Compile(asked, reporter or SilentReporter())
    work.may_time = not dry_run
    work.open_target()
    work.open_device(device)
    require_own_metrics(own_metrics(limit.metric or "" for limit in asked.max_drift))
    if output is not None and not dry_run:
        check_output(Path(output), overwrite)
    work.open_source(str(model), tokenizer, preprocessor)
    with workspace() as folder:
        work.folder = folder
        work.open_data(calib, eval_data, calib_cache)
        work.open_baseline(str(model))
        if dry_run:
            if work.prunes:
                work.notes.append(
                    "a dry run cuts nothing: edgepress inspect --prunable MODEL lists what can be"
                )
            work.prepare()
            work.plan()
            return work.result(None)
        work.prune()
        work.make()
        while (missed := work.missed()) is not None:
            work.prune_further(missed)
            work.make()
        work.tell_of_processors(work.candidate.model)
        place = work.write(Path(output), overwrite) if output is not None else None
        return work.result(place, str(model))


class _Compile(PlanStages):
    """The state of one compile; each method is a stage that needs the ones before it."""

    baseline_file: Path

    def __init__(self, recipe: Recipe, reporter: Reporter) -> None:
        super().__init__()
        self.recipe = recipe
        self.reporter = reporter
        self.source_bytes = 0

    def begin(self) -> None:
        """See `MeasuredStages.begin`."""
        super().begin()
        self.ranges: Ranges = {}
        self.rounding: Rounding = {}
        self.records: list[PassRecord] = []
        self.notes: list[str] = []
        self.drift: DriftReport | None = None
        self.pareto = ParetoLog()
        self.timing: BenchmarkResult | None = None
        self.reverted: tuple[str, ...] = ()
        self.rolled_back: tuple[str, ...] = ()
        self.built = False

    def open_target(self) -> None:
        self.profile = load_target(self.recipe.target, self.recipe.override_texts)
        if self.profile.runtime.name == "tensorrt" and self.recipe.precision not in _FLOAT_PRECISIONS:
            name = self.profile.name
            raise NotSupported(
                f"compiling for {name} is not there yet: its runtime is TensorRT",
                where="--target",
                why="INT8 plans and engines for it come with a later version",
                remedy="--precision fp16 (or bf16) writes the typed ONNX graph that TensorRT reads; "
                f"see whether the model fits its parser: edgepress inspect MODEL --target {name}",
            )
        self.typed = form_of(self.profile, self.recipe.precision)
        check_io_dtype(self.profile, self.recipe.io_dtype)

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
        calibrate = self.sets.calibrate
        self.completion = completion_of(
            self.source.model, self.profile, self.recipe, calibrate, self.reporter
        )
        if self.cache is not None:
            doubt = self.cache.check(self.source.model, self.sets.calibrate, self.recipe.calib_method)
            if doubt is not None:
                self.warn(doubt)
            if self.sets.evaluate is None and "drift" not in self.recipe.skip:
                self.warn("drift is not measured, and no limit is held: there is no data (add --eval DATA)")
        self.check_pruning()

    def make(self) -> None:
        """Everything from the float model to a measured candidate."""
        self.prepare()
        self.plan()
        self.build()
        self.hold_limits()
        self.benchmark()

    def open_baseline(self, model: str) -> None:
        """Open the untouched baseline, and run a few samples through it."""
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
        with self.reporter.stage("opening the baseline"):
            options = SessionOptions(threads=self.recipe.threads).for_answers(self.source_bytes)
            self.baseline = self.reference = OrtSession(self.baseline_file, options)
            data = self.sets.evaluate or self.sets.calibrate
            self.samples, self.expected = check_samples(self.source.model, data, self.recipe, self.baseline)
        self.model = self.source.model

    def prepare(self) -> None:
        """Clean up and fuse a fork of the model, checked against it."""
        with self.reporter.stage("cleaning up and fusing"):
            if self.keeps_source_graph():
                self.prepared = self.model.fork()
                return
            self.settle_fusions()

    def prepare_with(self, recipe: Recipe) -> tuple[Model, list[PassRecord]]:
        return prepare(
            self.model,
            self.profile,
            recipe,
            samples=self.samples,
            expected=self.expected,
            reporter=self.reporter,
        )

    def keeps_source_graph(self) -> bool:
        """Whether the recipe pins that even the float form was slower, so that nothing is changed."""
        return self.recipe.pins is not None and FUSIONS in self.recipe.pins.rolled_back

    def benchmark(self) -> None:
        """Time the candidate; on the target itself a form that does not pay is rolled back."""
        if "benchmark" in self.recipe.skip:
            return
        if self.profile.gpu is not None:
            self.notes.append("not timed: this machine's processor says nothing of TensorRT's speed")
            return
        asked_by_name = self.recipe.precision in INT8_PRECISIONS or self.typed is not None
        rivals = [] if asked_by_name else self.rivals()
        self.timing = self.time(rivals)
        if not self.on_target or self.recipe.pins is not None:
            return
        self.settle_options(rivals)
        if self.candidate.plan.groups:
            name = "INT8" if self.typed is None else self.typed
            text = slowness(self.timing, name, self.timed_where) if asked_by_name else self.keep_what_pays()
            if text is None:
                return
            if asked_by_name:
                self.warn(f"{text}; kept because --precision {self.recipe.precision} asks for it")
                return
            self.warn(f"{text}: rolled back to float")
            self.rolled_back += (INT8,)
            self.completion = None
            groups = frozenset(self.candidate.plan.groups)
            plan = self.candidate.plan.revert(groups, f"rolled back: {text}")
            self.verdicts, self.session_config = {}, None
            self.replace(self.lower(plan, self.folder / "float"))
        text = slowness(self.timing, "the cleaned and fused float form", self.timed_where)
        if text is not None:
            self.warn(f"{text}: the graph that went in is kept as it is")
            self.rolled_back += (FUSIONS,)
            self.completion = None
            plan = msgspec.structs.replace(self.candidate.plan, passes=())
            source = self.model.fork()
            folder = self.folder / "source"
            self.replace(build(source, plan, {}, self.profile, folder, with_shapes=True))

    def replace(self, candidate: Candidate, rivals: Sequence[TimedForm] = ()) -> None:
        """Take another candidate, with its own drift and timing."""
        self.candidate = candidate
        if self.drift is not None:
            self.drift = None
            self.hold_limits()
        self.timing = self.time(rivals)

    def tell_of_processors(self, model: Model) -> None:
        """Note in the plan what the target's processor makes of the integers of the finished graph."""
        plan = self.candidate.plan
        notes = isa_notes(model, plan, self.profile)
        self.notes += notes
        for doubt in storage_doubts(self.candidate, self.profile):
            self.warn(doubt)
        self.keep_in_plan(*notes)

    def keep_in_plan(self, *notes: str) -> None:
        """Add notes to the plan that the bundle holds, each once."""
        plan = self.candidate.plan
        every = tuple(dict.fromkeys((*plan.notes, *notes)))
        plan = msgspec.structs.replace(plan, notes=every)
        self.candidate = dataclasses.replace(self.candidate, plan=plan)

    def warn(self, text: str) -> None:
        """Tell it and keep it."""
        self.notes.append(text)
        self.reporter.warn(text)

    def pinned(self) -> Recipe:
        """The recipe with the choices that were made, so that a replay times nothing."""
        plan = self.candidate.plan
        compute = {item.form for item in plan.quantized() if item.op not in TABLE_OPS}
        quantization: Quantization = self.recipe.quantization
        if len(compute) == 1:
            (quantization,) = compute  # type: ignore[assignment]
        replay = None if self.typed else self.pinned_forms(quantization)
        earlier = self.recipe.pins
        pins = Pins(
            model_sha256=self.source.model.fingerprint(),
            data_sha256=self.sets.calibration_digest,
            precision=(self.recipe.precision if self.typed else "int8") if plan.groups else "fp32",
            quantization=quantization,
            calib_method=self.recipe.calib_method if self.ranges else None,
            fusions={**self.fusions, **self.recipe.fusions},
            forms=(earlier.forms if earlier else replay) or {},
            static_activation=earlier.static_activation if earlier else self.measured.static_activation,
            session_config=earlier.session_config if earlier else self.session_config,
            reverted=self.reverted,
            rolled_back=self.rolled_back,
            pruned=self.pinned_cuts(),
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
            pareto=self.pareto.table(self.candidate),
            evidence=self.evidence(),
            overwrite=overwrite,
            reporter=self.reporter,
            timed_on=None if self.fit is None else self.device.name,
        )
        with self.reporter.stage("verifying the bundle"):
            verify_bundle(place)
        if self.fit is not None:
            self.notes += try_bundle(self.device, place, self.recipe, self.reporter)
        return place

    def result(self, place: Path | None, model: str = "") -> CompileResult:
        plan = self.candidate.plan if self.built else self.current_plan
        fit_notes = () if self.fit is None else self.fit.notes
        return CompileResult(
            bundle=place,
            target=self.profile.name,
            evidence=self.evidence() if self.built else "none",
            plan=plan,
            recipe=self.pinned() if self.built else self.recipe,
            drift=self.drift,
            pareto=self.pareto.table(self.candidate) if self.built else None,
            benchmark=self.timing,
            sizes=Sizes(
                source_bytes=self.source_bytes,
                bundle_model_bytes=self.candidate.file_bytes if place is not None else None,
            ),
            refusals=plan.refusals,
            stamps=self.sets.stamps,
            notes=(self.source.baseline_note, *self.sets.notes, *fit_notes, *self.notes),
            next_commands=next_commands(place, model, self.device),
            device=record_of(self.device, self.fit),
        )
