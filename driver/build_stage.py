"""The stages of a compile that make the candidate: conditioning, calibrating, lowering."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING

from .candidate import Candidate, build
from .conditioning import Conditions, condition
from .measuring.local_benchmark import timing_inputs
from .measuring.stages import MeasuredStages
from .observing import ranges_digest
from .refining import TIMED, refine

if TYPE_CHECKING:
    from pathlib import Path

    from ..calibration.data import CalibrationData
    from ..compress.plan import Plan
    from ..compress.quantize.constants import Rounding
    from ..runtimes.base import Array
    from ..runtimes.ort_runtime import OrtSession
    from .calib_cache import CalibCache
    from .data_sets import DataSets


PINNED = "pinned by the recipe"
"""Why a group is in float that an earlier compile took back."""


class BuildStages(MeasuredStages):
    """What `_Compile` does to carry a plan out.

    Attributes:
        plain: the prepared graph without what was done for INT8; float forms are made of it.
        reference: answers of the float model that the plan is for: the baseline, or what was cut of it.
        rounding: learned integers of static weights.
        built: whether there is a candidate.
    """

    sets: DataSets
    cache: CalibCache | None
    baseline: OrtSession
    reference: OrtSession
    samples: list[dict[str, Array]]
    expected: list[dict[str, Array]]
    rounding: Rounding
    built: bool

    @abstractmethod
    def keeps_source_graph(self) -> bool:
        """Whether the recipe pins that nothing of the graph that went in is changed."""

    def build(self) -> None:
        """Ready what is dynamic, calibrate what is static, apply the plan, let the runtime confirm it."""
        data = self.sets.calibrate
        self.plain = self.prepared
        self._condition(data)
        if self.sets.calibrated:
            self._calibrate(data)
        if self.recipe.pins is not None:
            # Only now, as it came about: ranges and rounding were found with these groups in integers.
            self.current_plan = self.current_plan.revert(frozenset(self.recipe.pins.reverted), PINNED)
        if self.cache is not None and data is not None:
            note = self.cache.write(self.source.model, data, self.recipe.calib_method)
            if note is not None:
                self.notes.append(note)
        with self.reporter.stage("applying the plan"):
            self.candidate = self.lower(self.current_plan, self.folder / "candidate")
        self.built = True
        for finding in self.candidate.audit.unplanned:
            self.warn(f"{finding.node} is planned in float, but the runtime makes {finding.runtime_op} of it")

    def _calibrate(self, data: CalibrationData | None) -> None:
        pins = self.recipe.pins
        times = self.may_time and pins is None and "benchmark" not in self.recipe.skip
        made = refine(
            self.prepared,
            self.current_plan,
            self._conditions(data),
            folder=self.folder,
            feeds=timing_inputs(self.source, self.recipe) if times else None,
        )
        self.prepared, self.current_plan = made.model, made.plan
        self.ranges, self.rounding = made.ranges, made.rounding
        self.reverted = tuple(dict.fromkeys((*self.reverted, *made.reverted)))
        # Equalization and rounding are found again by the same data; what was timed is pinned.
        self.fusions |= {name: kept for name, kept in made.fusions.items() if name in TIMED}
        self.notes += made.notes
        if pins is not None and self.ranges and pins.ranges_sha256 not in (None, ranges_digest(self.ranges)):
            self.warn("calibration found other ranges than those that the recipe pins")

    def _condition(self, data: CalibrationData | None) -> None:
        """Ready the graph for dynamic INT8; `plain` is what a form without it is made of."""
        made = condition(self.prepared, self.current_plan, self._conditions(data))
        self.prepared, self.current_plan = made.model, made.plan
        self.notes += made.notes

    def _conditions(self, data: CalibrationData | None) -> Conditions:
        calibrated = self.sets.calibrated
        return Conditions(
            data=data if calibrated else None,
            cache=self.cache if calibrated else None,
            recipe=self.recipe,
            profile=self.profile,
            baseline=self.reference,
            task=self.source.model.task,
            samples=self.samples,
            expected=self.expected,
            reporter=self.reporter,
            device=self.device,
            on_target=self.on_target,
        )

    def lower(self, plan: Plan, folder: Path) -> Candidate:
        """A plan carried out in a folder of its own, with the session options that pins name."""
        pins = self.recipe.pins
        made = self._lowered(plan, folder)
        if pins is None or pins.session_config is None:
            return made
        return dataclasses.replace(made, config=dict(pins.session_config))

    def _lowered(self, plan: Plan, folder: Path) -> Candidate:
        computes = any(item.form in ("dynamic", "static") for item in plan.decisions)
        graph = self.prepared if computes else self.plain
        return build(
            graph,
            plan,
            self.ranges,
            self.profile,
            folder,
            with_shapes=self.keeps_source_graph(),
            rounding=self.rounding,
        )
