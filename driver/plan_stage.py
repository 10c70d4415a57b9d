"""The stage of a compile that decides, node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ..compress.emulate.predict import isa_notes
from ..compress.propose import Request, is_quantized, propose
from ..compress.recipe import INT8_PRECISIONS
from ..compress.typed.request import check_interface
from ..graph.errors import NotSupported
from .build_stage import PINNED
from .prune_stage import PruneStages
from .typed_plan import lifted_for, propose_typed

if TYPE_CHECKING:
    from ..compress.typed.request import TypedForm

INT8, FUSIONS = "int8", "fusions"
"""What a slower form is rolled back to lose, as pins name it."""


class PlanStages(PruneStages):
    """What `_Compile` does to plan.

    Attributes:
        typed: the 16-bit form that the precision means, None where it means none.
        rolled_back: what was slower as a whole, as pins name it.
    """

    typed: TypedForm | None
    rolled_back: tuple[str, ...]

    def plan(self) -> None:
        """Decide node by node; with pins, as they say."""
        recipe, pins = self.recipe, self.recipe.pins
        quantization = (pins.quantization if pins else None) or recipe.quantization
        request = Request(
            quantization=quantization,
            keep_float=recipe.keep_float,
            calibrated=self.sets.calibrated,
            shapes=recipe.shapes,
            allow_unmeasured=recipe.allow_unmeasured,
        )
        if self.typed is None:
            settled = request if is_quantized(self.source.model) else self.settle_forms(request)
            plan = propose(self.prepared, self.profile, settled)
        else:
            self.prepared, records = lifted_for(self.prepared, self.profile, self.typed)
            self.records += records
            plan, notes = propose_typed(
                self.prepared,
                self.profile,
                self.typed,
                recipe,
                data=self.sets.calibrate,
                reporter=self.reporter,
            )
            self.notes += notes
        everything = frozenset(plan.groups)
        if recipe.precision == "fp32":
            plan = plan.revert(everything, "--precision fp32")
        elif is_quantized(self.source.model):
            self._refuse_or_note("the model is quantized already; its operators are left as they are")
            plan = plan.revert(everything, "the model is quantized already")
            notes = isa_notes(self.source.model, plan, self.profile)
            plan = msgspec.structs.replace(plan, notes=(*plan.notes, *notes))
        elif not everything:
            reasons = sorted({item.reason for item in plan.decisions})
            what = "run in INT8" if self.typed is None else f"take the form {self.typed}"
            self._refuse_or_note(f"nothing can {what} on {self.profile.name}: {'; '.join(reasons[:3])}")
        if pins is not None:
            if not self.may_time:
                plan = plan.revert(frozenset(pins.reverted), PINNED)
            if pins.data_sha256 is not None and pins.data_sha256 != self.sets.calibration_digest:
                self.warn("the recipe's choices were pinned on other calibration data")
            if INT8 in pins.rolled_back or FUSIONS in pins.rolled_back:
                plan = plan.revert(frozenset(plan.groups), "rolled back: slower, pinned by the recipe")
            self.reverted, self.rolled_back = pins.reverted, pins.rolled_back
        refusals = tuple(refusal for record in self.records for refusal in record.refused)
        seen = (*self.samples, *self.expected)
        io_dtype, note = check_interface(self.source.model, recipe.io_dtype, seen)
        self.notes += [note] if note else []
        self.current_plan = msgspec.structs.replace(
            plan,
            io_dtype=io_dtype,
            pruning=self.pruning,
            notes=(*plan.notes, *([note] if note else [])),
            passes=tuple(self.records),
            refusals=refusals,
        )
        if self.completion is not None and not self.may_time:  # else when INT8 holds the limits
            self.current_plan, notes = self.completion.plan(self.prepared, self.current_plan)
            self.notes += [self.completion.described(self.current_plan), *notes]

    def _refuse_or_note(self, text: str) -> None:
        if self.recipe.precision in INT8_PRECISIONS:
            raise NotSupported(
                text, where=self.source.model.origin.name, remedy="use --precision auto or fp32"
            )
        self.notes.append(text)
        self.reporter.warn(text)
