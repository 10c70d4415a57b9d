"""The stages of a compile that cut the model: to what was asked, and further where a goal is not reached."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import msgspec

from ..calibration.drift import measure_drift
from ..calibration.limits import check_limits, own_metrics
from ..compress.cost import bind_axes
from ..compress.propose import is_quantized
from ..compress.prune.prune import Pruner, open_pruner, pinned_pruner
from ..graph.cleanup import exact_cleanup
from ..graph.errors import CheckFailed, DriftExceeded, InternalError, NotSupported, RecipeError
from ..graph.passes import run_passes
from ..graph.shapes import InferShapes
from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import OrtSession
from .candidate import difference
from .input_shapes import input_shapes
from .limit_stage import LimitStages
from .measuring.local_benchmark import COMPILED
from .measuring.width_times import WidthTimes
from .output import format_bytes
from .reporter import absolute_progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..calibration.data import CalibrationData
    from ..compress.prune.report import Pruning
    from ..compress.prune.widths import Cost
    from ..graph.model import Model
    from ..runtimes.base import Array
    from ..runtimes.timing import BenchmarkResult
    from .budget import Budget

_SPARE = 1.03
"""A goal that was missed is aimed at with so much to spare."""
_ATTEMPTS = 4
_WORD = {"fraction": "--prune", "speedup": "--min-speedup", "size": "--max-size"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missed:
    """A goal that the compiled model does not reach: by how much it has to shrink, and what to say of it."""

    goal: str
    factor: float
    text: str


class PruneStages(LimitStages):
    """What `_Compile` does to cut the model.

    Attributes:
        model: what is compiled: the source, or what pruning made of it.
        pruning: what was cut; None where nothing was.
        cuts: group -> places of the units that went, for the recipe's pins.
        reference: answers as the float form of `model` gives them.
    """

    model: Model
    pruning: Pruning | None
    cuts: dict[str, tuple[int, ...]]
    reference: OrtSession
    timing: BenchmarkResult | None
    pruner: Pruner | None
    widths: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.pruning = self.pruner = None
        self.cuts, self.widths = {}, []
        self._width_times: WidthTimes | None = None
        self._attempts = 0
        self._whole_ms = 0.0
        self._answers: list[dict[str, Array]] = []

    @property
    def prunes(self) -> bool:
        """Whether the recipe asks for a cut, at once or for a goal."""
        recipe = self.recipe
        return any(item is not None for item in (recipe.prune, recipe.min_speedup, recipe.max_size_bytes))

    def check_pruning(self) -> None:
        """Refuse what cannot be cut or measured, before any long work.

        Raises:
            NotSupported: if the model is quantized already.
            RecipeError: if a goal needs a measurement that is skipped, or ranges of the uncut model come.
        """
        if not self.prunes:
            return
        if is_quantized(self.source.model):
            raise NotSupported(
                "a quantized model is not pruned",
                where=self.source.model.origin.name,
                why="its weights are integers with scales: what is cut could not be made up for",
                remedy="give the float model; --prune and INT8 work together in one compile",
            )
        if self.cache is not None:
            raise RecipeError(
                "--calib-cache does not go with pruning",
                where="--calib-cache",
                why="its ranges are those of the model before it was cut",
                remedy="leave it out; the ranges of the cut model are calibrated from --calib",
            )
        if self.recipe.min_speedup is not None and "benchmark" in self.recipe.skip and self.on_target:
            raise RecipeError(
                "--min-speedup cannot be held without the benchmark",
                where="--skip benchmark",
                remedy="leave --skip benchmark out, or ask for --prune FRACTION instead",
            )

    def prune(self) -> None:
        """Cut what --prune asks for, or what the recipe pins; a goal waits until all is measured."""
        self._answers = self.expected
        pins, recipe = self.recipe.pins, self.recipe
        if pins is not None:
            if pins.pruned:
                self._replay(pins.pruned)
            return
        if recipe.prune is not None:
            self._shrink(_macs, 1 - recipe.prune, "fraction")
        if recipe.min_speedup is not None and not self.on_target:
            self._shrink(_macs, 1 / recipe.min_speedup, "speedup")
            self.warn(
                f"--min-speedup on {self.profile.name} is predicted from multiply-accumulates: "
                "it was not measured there"
            )

    def missed(self) -> Missed | None:
        """The goal that the compiled model misses by most."""
        recipe, found = self.recipe, list[Missed]()
        if recipe.pins is not None:
            return None  # a replay makes what was made, whatever the clock says of it today
        if recipe.max_size_bytes is not None and self.candidate.file_bytes > recipe.max_size_bytes:
            size = self.candidate.file_bytes
            text = f"the model has {format_bytes(size)}, more than {format_bytes(recipe.max_size_bytes)}"
            found.append(Missed(goal="size", factor=size / recipe.max_size_bytes, text=text))
        if recipe.min_speedup is not None and self.on_target and self.timing is not None:
            ratios = [item.ratio for item in self.timing.comparisons if item.candidate == COMPILED]
            if ratios and ratios[0] < recipe.min_speedup:
                text = f"the model is {ratios[0]:.2f}x as fast as what went in, not {recipe.min_speedup:g}x"
                found.append(Missed(goal="speedup", factor=recipe.min_speedup / ratios[0], text=text))
        return max(found, key=lambda item: item.factor, default=None)

    def prune_further(self, missed: Missed) -> None:
        """Cut more, so that a goal is reached.

        Raises:
            CheckFailed: if it was tried often enough, or the model cannot be cut so far.
        """
        if self._attempts >= _ATTEMPTS:
            raise CheckFailed(
                missed.text,
                where=_WORD[missed.goal],
                why=f"after {self._attempts} cuts",
                remedy="ask for less, or combine it with another --precision",
            )
        self._attempts += 1
        if self.timing is not None and self.timing.timings:
            self._whole_ms = self.timing.timings[0].p50_ms
        self.reporter.note(f"{missed.text}: cutting it")
        # What was measured of the model as it was is forgotten; its files stay until the end.
        self.begin()
        self.notes.append(f"{missed.text}: it was cut")
        self.folder = self.folder / f"attempt-{self._attempts}"
        self.folder.mkdir()
        cost_of = self._times if missed.goal == "speedup" else _weights
        pruner = self._opened()
        cost = cost_of(pruner)
        left = cost.total(pruner.removed(self.widths)) / cost.total(pruner.removed(pruner.units))
        self._shrink(cost_of, left / (missed.factor * _SPARE), missed.goal)

    def _times(self, pruner: Pruner) -> WidthTimes:
        if self._width_times is None or self._width_times.pruner is not pruner:
            self._width_times = WidthTimes(
                pruner,
                self._sizes(),
                device=self.device,
                threads=self.recipe.threads,
                whole_ms=self.baseline_ms(),
                reporter=self.reporter,
            )
        return self._width_times

    def baseline_ms(self) -> float:
        """Milliseconds of the model that went in, as it was just timed."""
        return self._whole_ms

    def _sizes(self) -> dict[str, int]:
        encoder = self.source.encoder
        shapes = input_shapes(self.source.model, self.recipe, encoder.max_length if encoder else None)
        return bind_axes(self.source.model, shapes)

    def _cleaned(self) -> Model:
        """The model cleaned up, which is what is traced; only its shapes inferred where that changed it."""
        model = self.source.model.fork()
        run_passes(model, exact_cleanup())
        if difference(model, self.samples, self._answers) is None:
            return model
        self.warn(
            "clean-up changed the results: what is cut is the graph as it came; please report this model"
        )
        model = self.source.model.fork()
        run_passes(model, [InferShapes()])
        return model

    def _opened(self) -> Pruner:
        """What is known about cutting the model; found out once.

        Raises:
            NotSupported: if nothing of it can go.
        """
        if self.pruner is None:
            self._open(streams=False)
        assert self.pruner is not None
        if not self.pruner.groups:
            self._open(streams=True)
        if not self.pruner.groups:
            raise NotSupported(
                "nothing of this model can be cut",
                where=self.source.model.origin.name,
                why=self._why_not(self.pruner),
                remedy="edgepress inspect --prunable MODEL lists what hangs together",
            )
        return self.pruner

    def _open(self, *, streams: bool) -> None:
        """Rank the units; with streams also those that whole rows of layers add to, which cost the most."""
        data = self._data()
        alignment = self.profile.alignment_channels
        with self.reporter.stage("ranking what can be cut", None if data is None else len(data)) as stage:
            self.pruner = open_pruner(
                self._cleaned(),
                data,
                self._sizes(),
                alignment=1 if alignment is None else int(alignment.value),
                importance=self.recipe.prune_importance,
                include=(lambda _group: True) if streams else None,
                threads=self.recipe.threads,
                told=absolute_progress(stage),
            )
        if data is None and not streams:
            self.warn("without calibration data units are ranked by magnitude and nothing is repaired")
        self.widths = self.pruner.units

    @staticmethod
    def _why_not(pruner: Pruner) -> str:
        blocked = [group.blocked for group in pruner.coupling.groups if group.blocked is not None]
        return "; ".join(dict.fromkeys(f"{why.op} {why.node}: {why.reason}" for why in blocked[:5]))

    def _shrink(self, cost_of: Callable[[Pruner], Cost], part: float, goal: str) -> None:
        """The widths of least loss that leave a part of the uncut model's cost, cut and repaired.

        Raises:
            CheckFailed: if even the narrowest widths cost more.
        """
        pruner = self._opened()
        widths = self._widths(pruner, cost_of(pruner), part)
        if widths is None and len(pruner.groups) < len(pruner.coupling.prunable):
            self._open(streams=True)
            pruner = self._opened()
            if self.recipe.prune is not None and goal != "fraction":
                self.widths = self._widths(pruner, pruner.macs, 1 - self.recipe.prune) or self.widths
            widths = self._widths(pruner, cost_of(pruner), part)
        if widths is None:
            cost = cost_of(pruner)
            least = pruner.least(cost) / cost.total(pruner.removed(pruner.units))
            raise CheckFailed(
                "the model cannot be cut so far",
                where=_WORD[goal],
                why=f"with every group at its narrowest {least:.0%} are left, {part:.0%} were asked for",
                remedy="ask for less",
            )
        # A second goal never gives back what the first one took.
        self.widths = [min(new, old) for new, old in zip(widths, self.widths, strict=True)]
        self._carry_out(pruner)

    def _widths(self, pruner: Pruner, cost: Cost, part: float) -> list[int] | None:
        with self.reporter.stage("choosing widths"):
            return pruner.widths(cost, part * cost.total(pruner.removed(pruner.units)))

    def _data(self) -> CalibrationData | None:
        """Real calibration samples; generated ones say nothing about what matters."""
        return self.sets.calibrate if self.sets.calibrated and not self.recipe.data_free else None

    def _replay(self, removed: dict[str, tuple[int, ...]]) -> None:
        self.pruner, self.widths = pinned_pruner(
            self._cleaned(), removed, self._sizes(), importance=self.recipe.prune_importance
        )
        self._carry_out(self.pruner)

    def _carry_out(self, pruner: Pruner) -> None:
        data = self._data()
        self._check_cut(pruner)
        with self.reporter.stage("repairing layers", pruner.touched(self.widths)) as stage:
            self.model, self.pruning = pruner.repaired(
                self.widths,
                data,
                thorough=self.recipe.prune_repair == "thorough",
                threads=self.recipe.threads,
                told=absolute_progress(stage),
            )
        self.cuts = pruner.chosen(self.widths)
        self.reference = OrtSession.from_model(self.model, SessionOptions(threads=self.recipe.threads))
        self.expected = [self.reference.run(feeds) for feeds in self.samples]
        if self.pruning.unrepaired:
            self.warn(
                f"{len(self.pruning.unrepaired)} layers that lost inputs cannot be fitted by least squares "
                f"and keep their weights: {', '.join(self.pruning.unrepaired[:5])}"
            )
        gone = self.pruning.macs_before / max(self.pruning.macs_after, 1)
        self.notes.append(
            f"pruned: {gone:.2f}x fewer multiply-accumulates, "
            f"{self.pruning.weight_bytes_after / self.pruning.weight_bytes_before:.0%} of the weights' bytes"
        )

    def _check_cut(self, pruner: Pruner) -> None:
        """The cut must answer as the whole model does with the same units masked.

        Raises:
            InternalError: if it does not; nothing wrong is ever shipped.
        """
        masked = OrtSession.from_model(pruner.masked(self.widths))
        expected = [masked.run(feeds) for feeds in self.samples]
        problem = difference(pruner.cut(self.widths), self.samples, expected)
        if problem is not None:
            raise InternalError(
                "the cut model does not answer as the masked one",
                where=self.source.model.origin.name,
                why=problem,
                remedy="please report this model; without --prune it compiles",
            )

    def pinned_cuts(self) -> dict[str, tuple[int, ...]]:
        """What the recipe's pins hold of the cut."""
        earlier = self.recipe.pins
        return dict(earlier.pruned) if earlier is not None and not self.cuts else self.cuts

    def hold_before(self, budget: Budget) -> None:
        """Measure the drift of the cut float model alone, and hold the limits by it.

        Raises:
            DriftExceeded: if the cut alone is past a limit.
        """
        if self.pruning is None:
            return
        with self.reporter.stage("measuring the cut's own drift", len(budget.data)) as stage:
            report = measure_drift(
                self.baseline,
                self.reference,
                budget.data,
                budget.task,
                reference_cache=budget.reference,
                own_metrics=own_metrics(budget.limits),
                progress=absolute_progress(stage),
            )
        found = {"cosine": report.cosine, "l2": report.l2, "kl": report.kl, "flips": report.flips}
        found |= {item.name: item.change for item in report.task_metrics}
        drift = {name: float(value) for name, value in found.items() if value is not None}
        self.pruning = msgspec.structs.replace(self.pruning, drift=drift)
        self.current_plan = msgspec.structs.replace(self.current_plan, pruning=self.pruning)
        plan = msgspec.structs.replace(self.candidate.plan, pruning=self.pruning)
        self.candidate = dataclasses.replace(self.candidate, plan=plan)
        past = [item for item in check_limits(report, budget.limits) if not item.met]
        if past:
            raise DriftExceeded(
                "the cut alone is past the drift limit",
                where="--max-drift",
                why="; ".join(item.reason for item in past),
                remedy="ask for a smaller cut, give more calibration data, or allow more drift",
            )


def _macs(pruner: Pruner) -> Cost:
    return pruner.macs


def _weights(pruner: Pruner) -> Cost:
    return pruner.weights
