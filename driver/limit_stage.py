"""The stages of a compile that hold its drift limits: INT8 first, then its float remainder in 16 bits."""

from __future__ import annotations

import dataclasses
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .budget import hold, open_budget
from .build_stage import BuildStages
from .mixed_plan import Completed, Completion, complete
from .typed_plan import estimate_drift

if TYPE_CHECKING:
    from ..calibration.drift import DriftReport
    from .budget import Budget
    from .pareto import ParetoLog


class LimitStages(BuildStages):
    """What `_Compile` does to hold the drift limits.

    Attributes:
        completion: what the float remainder of an INT8 plan becomes; None where it stays float32.
        drift: of the candidate, where it was measured.
        pareto: keeps what was measured on the way.
    """

    completion: Completion | None
    drift: DriftReport | None
    pareto: ParetoLog

    @abstractmethod
    def keep_in_plan(self, *notes: str) -> None:
        """Add notes to the plan that the bundle holds, each once."""

    @abstractmethod
    def hold_before(self, budget: Budget) -> None:
        """Hold the limits by what was done to the model before it was quantized."""

    def hold_limits(self) -> None:
        """Take groups back to float until the limits hold; then complete the plan in 16 bits."""
        self._without_remainder()
        if "drift" in self.recipe.skip or self.sets.evaluate is None:
            self._take(self._completed(None))
            return
        task = self.source.model.task
        with open_budget(self.baseline, self.sets.evaluate, task, self.recipe, self.reporter) as budget:
            self.hold_before(budget)
            self.candidate, self.drift, reverted = hold(
                self.candidate,
                budget,
                self.lower,
                ranking_data=self.sets.calibrate,
                folder=self.folder,
                reporter=self.reporter,
                log=self.pareto,
            )
            self.reverted += reverted
            done = self._completed(budget)
            notes, doubts, known = estimate_drift(done.candidate, self.profile, budget, self.reporter)
        if self.completion is not None and self.recipe.precision == "auto" and (doubts or not known):
            text = f"what INT8 leaves in float stays float32: {'; '.join(doubts or notes)}"
            back = (*done.back, *self.completion.names_in(done.candidate.plan))
            done = Completed(candidate=self.candidate, drift=self.drift, notes=(text,), back=back)
            notes, doubts = [], []
        self._take(done)
        self.notes += notes
        for doubt in doubts:
            self.warn(doubt)
        self.keep_in_plan(*notes, *doubts)

    def _without_remainder(self) -> None:
        """Take 16-bit forms back that stand beside INT8: the limits are held without them first."""
        typed = self.candidate.plan.typed_groups()
        if self.completion is None or not typed:
            return
        plan = self.candidate.plan.revert(frozenset(typed), "float32 while INT8 is looked at alone")
        plan = msgspec.structs.replace(plan, passes=self.current_plan.passes)
        config = self.candidate.config
        made = self.lower(plan, Path(tempfile.mkdtemp(dir=self.folder, prefix="int8-")))
        self.candidate = dataclasses.replace(made, config=config)

    def _completed(self, budget: Budget | None) -> Completed:
        """The candidate with what INT8 leaves in float in 16 bits, as the request or the profile says."""
        unasked = self.recipe.precision == "auto" and self.recipe.pins is None
        if self.completion is None or (budget is None and unasked):  # auto takes what was measured
            return Completed(candidate=self.candidate, drift=self.drift)
        return complete(
            self.candidate,
            self.completion,
            lower=self.lower,
            folder=Path(tempfile.mkdtemp(dir=self.folder, prefix="mixed-")),
            passes=self.current_plan.passes,
            budget=budget,
            drift=self.drift,
            log=self.pareto,
        )

    def _take(self, done: Completed) -> None:
        self.candidate, self.drift = done.candidate, done.drift
        self.reverted += done.back
        self.notes += done.notes
        self.keep_in_plan(*done.notes)
