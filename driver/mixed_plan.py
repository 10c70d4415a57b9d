"""The float remainder of an INT8 candidate in 16 bits: planned, measured, and taken back where it must be."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import msgspec

from ..compress.operands import is_quantized
from ..compress.recipe import INT8_PRECISIONS
from ..compress.typed.formats import TYPE_NAMES
from ..compress.typed.mixed import remainder
from ..compress.typed.request import remainder_form
from ..compress.typed.storage import STORAGE_FORMATS
from ..graph.passes import run_passes
from ..graph.shapes import InferShapes
from .typed_plan import largest_seen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..calibration.data import CalibrationData
    from ..calibration.drift import DriftReport
    from ..compress.plan import Plan
    from ..compress.recipe import Recipe
    from ..compress.typed.formats import Format
    from ..compress.typed.request import TypedForm
    from ..graph.model import Model
    from ..graph.passes import PassRecord
    from ..targets.profile import TargetProfile
    from .budget import Budget
    from .candidate import Candidate
    from .pareto import ParetoLog
    from .reporter import Reporter

_SHARES = (1.0, 0.5, 0.25)
"""Of the groups, the largest first: what is tried until the drift limit holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What the float remainder of a plan becomes on one target.

    Attributes:
        profile: the target.
        form: the 16-bit form.
        recipe: keep_float, shapes, threads; pins name the groups that went back earlier.
        data: calibration samples to look at ranges on; None where there are none.
        reporter: progress.
    """

    profile: TargetProfile
    form: TypedForm
    recipe: Recipe
    data: CalibrationData | None
    reporter: Reporter

    def plan(self, model: Model, plan: Plan) -> tuple[Plan, list[str]]:
        """The INT8 plan with its remainder in 16 bits, and what has to be said about it.

        Args:
            model: the float graph that the plan was made for; not changed.
            plan: the INT8 plan.
        """
        inferred = model.fork()
        run_passes(inferred, [InferShapes()])
        prefix = self.name_of("")
        pinned = self.recipe.pins.reverted if self.recipe.pins is not None else ()
        excluded = [name.removeprefix(prefix) for name in pinned if name.startswith(prefix)]

        def proposed(largest: dict[str, float] | None) -> Plan:
            return remainder(
                inferred,
                self.profile,
                plan,
                self.form,
                keep_float=self.recipe.keep_float,
                largest=largest,
                shapes=self.recipe.shapes,
                excluded=excluded,
            )

        made = proposed(None)
        if not made.typed_groups():
            return plan, []
        notes = []
        if self.form not in STORAGE_FORMATS:
            if self.data is None:
                notes.append(f"the ranges of activations were not looked at: {self.form} may overflow")
            else:
                made = proposed(largest_seen(inferred, made, self.data, self.recipe, self.reporter))
        if not made.typed_groups():
            return plan, []
        return msgspec.structs.replace(made, notes=(*made.notes, *notes)), notes

    def names_in(self, plan: Plan) -> tuple[str, ...]:
        """The 16-bit groups of a plan, as pins name those that stay float32."""
        return tuple(self.name_of(group) for group in plan.typed_groups())

    def name_of(self, group: str) -> str:
        """How pins name a group whose remainder stays float32."""
        return f"{self.form}:{group}"

    def described(self, plan: Plan) -> str:
        """One sentence on what the remainder of a plan became."""
        kind: Format = "fp16" if self.form.startswith("fp16") else "bf16"
        count = sum(item.form == self.form for item in plan.decisions)
        if self.form in STORAGE_FORMATS:
            return (
                f"{self.profile.name} does not compute in {TYPE_NAMES[kind]}: what INT8 leaves in float is "
                f"stored in it ({self.form}, {count} operators) and computed with in float32"
            )
        return f"what INT8 leaves in float computes in {TYPE_NAMES[kind]} where that pays ({count} operators)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completed:
    """A candidate with its remainder in 16 bits.

    Attributes:
        candidate: the one that went in where nothing could be done or the limit forbade it.
        drift: its drift; None where it was not measured.
        notes: what has to be said.
        back: the groups that stay float32 for the drift limit, as pins name them.
    """

    candidate: Candidate
    drift: DriftReport | None
    notes: tuple[str, ...] = ()
    back: tuple[str, ...] = ()


def completion_of(
    model: Model,
    profile: TargetProfile,
    recipe: Recipe,
    data: CalibrationData | None,
    reporter: Reporter,
) -> Completion | None:
    """What becomes of the remainder of `model`'s INT8 plan; None where it stays float32.

    So it does, too, in models that are quantized already and where a recipe pins that INT8 did not pay.

    Raises:
        NotSupported: as `form_of`.
    """
    form = remainder_form(profile, recipe.precision)
    if recipe.precision == "auto" and data is None:  # nobody asked for a type that may overflow
        return None
    if form is None or is_quantized(model) or (recipe.pins is not None and recipe.pins.rolled_back):
        return None
    return Completion(profile=profile, form=form, recipe=recipe, data=data, reporter=reporter)


def complete(
    candidate: Candidate,
    completion: Completion,
    *,
    lower: Callable[[Plan, Path], Candidate],
    folder: Path,
    passes: tuple[PassRecord, ...],
    budget: Budget | None,
    drift: DriftReport | None = None,
    log: ParetoLog | None = None,
) -> Completed:
    """Put the float remainder of a candidate in 16 bits, as much of it as the drift limit allows.

    All of it is tried first, then the half and the quarter of its groups with the most work.

    Args:
        candidate: an INT8 candidate that holds the limits.
        completion: what the remainder becomes.
        lower: makes a candidate of a plan in a folder.
        folder: for candidates' files.
        passes: what was done to the graph before it was lowered; lowering is recorded anew.
        budget: limits and evaluation data; None measures nothing.
        drift: the candidate's own.
        log: keeps what was measured.
    """
    unchanged = Completed(candidate=candidate, drift=drift)
    if candidate.prepared is None:
        return unchanged
    plan, notes = completion.plan(candidate.prepared, candidate.plan)
    groups = _by_work(plan)
    if not groups:
        asked = completion.recipe.precision in INT8_PRECISIONS
        text = f"what INT8 leaves in float stays float32: none of it takes the form {completion.form}"
        return dataclasses.replace(unchanged, notes=(text,) if asked else ())
    plan = msgspec.structs.replace(plan, passes=passes)
    if budget is None:
        made = lower(plan, folder / "completed")
        return Completed(candidate=made, drift=drift, notes=(completion.described(plan), *notes))
    for count in dict.fromkeys(max(1, int(share * len(groups))) for share in _SHARES):
        back = groups[count:]
        trial = plan.revert(frozenset(back), "float32 to hold the drift limit")
        made = lower(trial, folder / f"completed-{count}")
        report, results = budget.measure(made, completion.reporter)
        if log is not None:
            log.measured(made, report, results)
        if all(result.met for result in results):
            named = tuple(completion.name_of(group) for group in back)
            said = (completion.described(trial), *notes)
            return Completed(candidate=made, drift=report, notes=said, back=named)
    named = tuple(completion.name_of(group) for group in groups)
    text = f"what INT8 leaves in float stays float32: {completion.form} exceeds the drift limit"
    return dataclasses.replace(unchanged, notes=(text,), back=named)


def _by_work(plan: Plan) -> Sequence[str]:
    """The 16-bit groups, those with the most multiply-accumulates first."""
    work = dict.fromkeys(plan.typed_groups(), 0)
    for item in plan.decisions:
        if item.group in work:
            work[item.group] += item.macs or 0
    return sorted(work, key=lambda group: -work[group])
