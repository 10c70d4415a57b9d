"""The stages of a compile that choose by time on the host: fusions, forms, session options, what is kept."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import msgspec

from ...compress.operands import TABLE_OPS
from ...compress.propose import Request, propose
from ...compress.quantize.static import static_layout
from ...runtimes.base import SessionOptions
from ...runtimes.device import Device, LocalDevice
from ...runtimes.timing_cache import TimingCache
from ..cache import cache_folder
from ..input_shapes import input_shapes
from ..result import weakest_evidence
from .device_planning import fit_device
from .forms import Measured, in_float
from .local_benchmark import COMPILED, WITHOUT_OPTIONS, time_against_baseline, timing_inputs
from .whole_model import (
    IN_FLOAT,
    SHARE_OF_PLANS,
    beaten_by,
    faster_fusions,
    faster_options,
    fastest_plan,
    is_measured,
    is_tie,
    is_undecided,
    other_options,
    pinned_forms,
    renamed,
    settle_forms,
    weak_nodes,
    with_verdicts,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ...compress.choice import Verdict
    from ...compress.plan import Plan
    from ...compress.quantize.static import Ranges
    from ...compress.recipe import Quantization, Recipe
    from ...frontends.source import Source
    from ...graph.model import Model
    from ...graph.passes import PassRecord
    from ...runtimes.timing import BenchmarkResult
    from ...targets.profile import Evidence, Form, TargetProfile
    from ..candidate import Candidate
    from ..pareto import ParetoLog
    from ..reporter import Reporter
    from .device_planning import Fit

_LARGEST_RIVALS_BYTES = 1 << 29
_WORTH_A_TIE_FRACTION = 0.5
"""Of the file: where INT8 and float are equally fast, INT8 is kept if it saves that much."""
_NOT_ALONE = "gains little by itself, and the whole model was slower with it"

TimedForm = tuple[str, "Path", "SessionOptions"]


class MeasuredStages(ABC):
    """What `_Compile` does by time; the attributes are its own."""

    recipe: Recipe
    reporter: Reporter
    profile: TargetProfile
    source: Source
    model: Model
    folder: Path
    prepared: Model
    plain: Model
    records: list[PassRecord]
    ranges: Ranges
    current_plan: Plan
    candidate: Candidate
    baseline_file: Path
    pareto: ParetoLog
    timing: BenchmarkResult | None
    reverted: tuple[str, ...]
    notes: list[str]
    source_bytes: int
    device: Device
    fit: Fit | None
    request: Request
    measured: Measured
    verdicts: Mapping[str, Verdict]
    may_time: bool
    fusions: dict[str, bool]
    session_config: dict[str, str] | None

    def __init__(self) -> None:
        self.device, self.fit = LocalDevice(), None
        self.may_time = True
        self.begin()

    def open_device(self, device: Device | None) -> None:
        """Time on a device from here on, if it is the target.

        Raises:
            TargetError: if it is not.
            NotSupported: if nothing of this target can be timed on a device.
            RuntimeUnavailable: if it does not answer.
        """
        if device is None:
            return
        with self.reporter.stage("looking at the device"):
            self.fit = fit_device(device, self.profile, allow_unmeasured=self.recipe.allow_unmeasured)
        self.device = device
        for note in self.fit.notes:
            self.reporter.note(note)

    @property
    def on_target(self) -> bool:
        """Whether what is timed is timed on the target, so that times decide."""
        return self.profile.kind == "host" if self.fit is None else self.fit.decides

    @property
    def grade(self) -> Evidence:
        """The grade of times that decide."""
        return "measured-on-target" if self.fit is None else self.fit.evidence

    @property
    def timed_where(self) -> str:
        """Where things are timed, in words."""
        return "on this machine" if self.fit is None else f"on {self.device.name}"

    def begin(self) -> None:
        """Forget what was chosen: the stages may start on another model."""
        self.measured = Measured()
        self.verdicts = {}
        self.fusions = {}
        self.session_config = None

    @abstractmethod
    def prepare_with(self, recipe: Recipe) -> tuple[Model, list[PassRecord]]:
        """The cleaned and fused graph for a recipe's switches."""

    @abstractmethod
    def lower(self, plan: Plan, folder: Path) -> Candidate:
        """A plan carried out, in files of its own."""

    @abstractmethod
    def replace(self, candidate: Candidate, rivals: Sequence[TimedForm] = ()) -> None:
        """Take another candidate, with its own drift and timing."""

    @abstractmethod
    def warn(self, text: str) -> None:
        """Tell it and keep it."""

    def time(self, rivals: Sequence[TimedForm] = (), rounds: int | None = None) -> BenchmarkResult:
        """Time the candidate beside the model that went in and rivals."""
        feeds = timing_inputs(self.source, self.recipe)
        threads = self.recipe.threads
        forms = [(COMPILED, self.candidate.file, self.candidate.options(threads))]
        if self.candidate.config:
            forms.append((WITHOUT_OPTIONS, self.candidate.file, SessionOptions(threads=threads)))
        timing = time_against_baseline(
            self.baseline_file,
            [*forms, *rivals],
            feeds,
            threads,
            self.reporter,
            rounds=rounds or self.recipe.benchmark_rounds,
            with_memory=isinstance(self.device, LocalDevice),  # elsewhere the device's runner measures it
            device=self.device,
            inputs=self.candidate.model.inputs,
        )
        self.pareto.timed(self.candidate, timing)
        return timing

    def evidence(self) -> Evidence:
        """Measured on the target only where the whole model was timed there."""
        if self.on_target and self.timing is not None:
            return self.grade
        weakest = weakest_evidence(self.candidate.plan)
        return "measured-elsewhere" if weakest == "measured-on-target" else weakest

    def settle_fusions(self) -> None:
        """Turn those fusions on that are faster here; with pins, as they say."""
        pins = self.recipe.pins
        if pins is not None:
            self.fusions = dict(pins.fusions)
        self.prepared, self.records = self.prepare_with(self._switched())
        if self.may_time and is_measured(self.recipe, on_target=self.on_target):
            (self.prepared, self.records), chosen = faster_fusions(
                self.model,
                (self.prepared, self.records),
                self.profile,
                self.recipe,
                prepare_with=self.prepare_with,
                feeds=lambda: timing_inputs(self.source, self.recipe),
                device=self.device,
                reporter=self.reporter,
            )
            self.fusions |= chosen

    def _switched(self) -> Recipe:
        return msgspec.structs.replace(self.recipe, fusions={**self.fusions, **self.recipe.fusions})

    def settle_forms(self, request: Request) -> Request:
        """The request with the forms that timing operators here chose, or that the recipe pins."""
        encoder = self.source.encoder
        longest = encoder.max_length if encoder else None
        shapes = input_shapes(self.source.model, self.recipe, longest)
        if is_measured(self.recipe, on_target=self.on_target):
            request = dataclasses.replace(request, shapes=shapes)
        self.request, self.measured = settle_forms(
            request,
            self.prepared,
            self.profile,
            self.recipe,
            device=self.device,
            cache=lambda: TimingCache(cache_folder(), self.device.features()),
            may_time=self.may_time,
            reporter=self.reporter,
            on_target=self.on_target,
            evidence=self.grade,
        )
        self.verdicts = self.measured.verdicts
        if self.measured.note is not None:
            self.notes.append(self.measured.note)
            self.reporter.note(self.measured.note)
        if self.verdicts and self.may_time and self.source_bytes <= _LARGEST_RIVALS_BYTES:
            self._settle_plans(request)
        return self.request

    def _settle_plans(self, untimed: Request) -> None:
        """Of the plans that the timings suggest the one that is the fastest as a whole, before calibration.

        What an operator gains by itself its neighbours may lose: a convolution in float between integer
        ones can cost the additions behind it their integers.
        """
        beside = in_float(self.measured, weak_nodes(self.measured, further=False), _NOT_ALONE)
        ways = [self.verdicts, {}, beside]
        requests = [with_verdicts(untimed, self.measured, verdicts) for verdicts in ways]
        plans: dict[str, tuple[Plan, Request]] = {}
        for request in requests:
            plan = propose(self.prepared, self.profile, request)
            forms = "\n".join(f"{item.node} {item.form}" for item in plan.decisions)
            plans.setdefault(forms, (plan, request))
        if len(plans) < 2:
            return
        with self.reporter.stage("timing plans", len(plans)):
            best = fastest_plan(
                self.prepared,
                [plan for plan, _ in plans.values()],
                timing_inputs(self.source, self.recipe),
                self.recipe.threads,
                device=self.device,
                limit_s=self.recipe.measure_seconds * SHARE_OF_PLANS,
            )
        self.request = list(plans.values())[best][1]
        if best > 0:
            text = ("as the profile says", "without what pays only beside integers")
            way = requests.index(self.request) - 1
            self.notes.append(f"the whole plan is faster {text[way]} than with each operator's fastest form")
        self.verdicts = self.request.verdicts

    def rivals(self) -> list[TimedForm]:
        """What the candidate is timed beside: its own float form, and itself with other session options."""
        measured = is_measured(self.recipe, on_target=self.on_target)
        if not measured or self.source_bytes > _LARGEST_RIVALS_BYTES:
            return []
        threads = self.recipe.threads
        plan = self.candidate.plan
        found: list[TimedForm] = []
        if plan.groups:
            made = self.lower(plan.revert(frozenset(plan.groups), "timed in float"), self.folder / "in-float")
            found.append((IN_FLOAT, made.file, made.options(threads)))
        for name, config in other_options(self.candidate):
            other = dataclasses.replace(self.candidate, config=config)
            found.append((name, other.file, other.options(threads)))
        return found

    def settle_options(self, rivals: Sequence[TimedForm]) -> None:
        """Ship the session options that were the fastest: none, unless they win by the margin."""
        assert self.timing is not None
        names = [name for name, file, _ in rivals if file == self.candidate.file]
        names += [WITHOUT_OPTIONS] if self.candidate.config else []
        if not names or not is_measured(self.recipe, on_target=self.on_target):
            return
        best = faster_options(self.timing, names)
        if best == COMPILED:
            return
        configs = {name: dict(options.config) for name, _, options in rivals} | {WITHOUT_OPTIONS: {}}
        self.session_config = configs[best]
        self.candidate = dataclasses.replace(self.candidate, config=configs[best])
        dropped = frozenset() if configs[best] else frozenset({WITHOUT_OPTIONS} - {best})
        self.timing = renamed(self.timing, best, dropped=dropped)

    def keep_what_pays(self) -> str | None:
        """Take groups back that do not pay by themselves while the whole model is beaten; what beats it then.

        At most two further forms are made; each is timed with the whole model.
        """
        for further in (False, True):
            text = self.beaten()
            if text is None:
                return None
            trimmed = self._trimmed(further=further)
            if trimmed is None:
                continue
            plan, groups = trimmed
            self.warn(f"{text}: {len(groups)} groups that gain little by themselves go back to float")
            self.reverted += groups
            self.session_config = None
            made = self.lower(plan, self.folder / f"kept-{further}")
            rivals = [rival for rival in self.rivals_in_float() if made.plan.groups]
            self.replace(made, rivals)
        return self.beaten()

    def rivals_in_float(self) -> list[TimedForm]:
        """The float form that `rivals` has made."""
        folder = self.folder / "in-float"
        options = self.candidate.options(self.recipe.threads)
        return [(IN_FLOAT, folder / "model.onnx", options)] if folder.is_dir() else []

    def beaten(self) -> str | None:
        """What is faster than the candidate, in words; None if nothing is."""
        assert self.timing is not None
        by_median = is_undecided(self.timing)
        if by_median:
            rounds = 2 * self.recipe.benchmark_rounds
            self.timing = self.time(self.rivals_in_float() if self.candidate.plan.groups else (), rounds)
        found = beaten_by(self.timing, by_median=by_median)
        if found is None:
            saved = 1 - self.candidate.file_bytes / max(self.source_bytes, 1)
            if is_tie(self.timing) and saved < _WORTH_A_TIE_FRACTION:
                return (
                    f"INT8 is no faster than float {self.timed_where}, and saves {saved:.0%} of the file only"
                )
            return None
        name, against = found
        than = "its own float form" if name == IN_FLOAT else "the model that went in"
        return f"INT8 runs at {1 / against.ratio:.2f}x of {than}, {self.timed_where}"

    def _trimmed(self, *, further: bool) -> tuple[Plan, tuple[str, ...]] | None:
        """The plan without weak groups, and those; None where nothing would be left, or nothing changes."""
        nodes, plan = weak_nodes(self.measured, further=further), self.candidate.plan
        groups = tuple(dict.fromkeys(item.group for item in plan.quantized() if item.node in nodes))
        trimmed = plan.revert(frozenset(groups), _NOT_ALONE)
        observed = static_layout(self.prepared, trimmed.decisions).observed
        kept = [item for item in trimmed.quantized() if item.op not in TABLE_OPS]
        if not groups or not kept or any(name not in self.ranges for name in observed):
            return None
        passes = self.current_plan.passes  # what lowering did to the candidate is done anew
        return msgspec.structs.replace(trimmed, passes=passes), groups

    def pinned_forms(self, quantization: Quantization) -> dict[str, Form]:
        """The forms that timing chose against the tables, as a replay needs them."""
        if not self.verdicts:
            return {}
        asked = dataclasses.replace(self.request, quantization=quantization, verdicts={})
        table = {item.node: item.form for item in propose(self.plain, self.profile, asked).decisions}
        return pinned_forms(table, self.verdicts)
