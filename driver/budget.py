"""Keeping the drift limit: measure, rank the groups, take the worst back to float, measure again."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.drift import DriftReport, measure_drift
from ..calibration.limits import LimitResult, check_limits, default_metric
from ..calibration.reference import ReferenceOutputs
from ..graph.errors import DriftExceeded
from .candidate import Candidate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..calibration.data import CalibrationData
    from ..compress.plan import Plan
    from ..compress.recipe import Recipe
    from ..graph.model import Task
    from ..runtimes.ort_runtime import OrtSession
    from .reporter import Reporter

REVERTED = "taken back to float to hold the drift limit"

Builder = Callable[["Plan", Path], Candidate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits of one compile, the data they hold on, and what the untouched model answers there."""

    limits: Mapping[str, float]
    data: CalibrationData
    task: Task
    reference: ReferenceOutputs
    baseline: OrtSession
    threads: int
    ranking_samples: int

    def measure(self, candidate: Candidate, reporter: Reporter) -> tuple[DriftReport, list[LimitResult]]:
        """The drift of a candidate on the evaluation data, and how the limits stand."""
        session = candidate.session(self.threads)
        with reporter.stage("measuring drift", len(self.data)) as stage:
            report = measure_drift(
                self.baseline,
                session,
                self.data,
                self.task,
                reference_cache=self.reference,
                progress=steps(stage.advance),
            )
        return report, check_limits(report, self.limits)


@contextmanager
def open_budget(
    baseline: OrtSession, data: CalibrationData, task: Task, recipe: Recipe, reporter: Reporter
) -> Iterator[Budget]:
    """Resolve the limits' metrics and run the baseline over the evaluation data once."""
    labelled = (data.pairs if task.kind == "embedding" else data.labels) is not None
    default = default_metric(task, labelled, baseline.outputs)
    limits = {limit.metric or default: limit.limit for limit in recipe.max_drift}
    with reporter.stage("running the baseline on the evaluation data", len(data)) as stage:
        reference = ReferenceOutputs.collect(baseline, data, task, progress=steps(stage.advance))
    with reference:
        yield Budget(
            limits=limits,
            data=data,
            task=task,
            reference=reference,
            baseline=baseline,
            threads=recipe.threads,
            ranking_samples=recipe.ranking_samples,
        )


def hold(
    candidate: Candidate,
    budget: Budget,
    build: Builder,
    *,
    ranking_data: CalibrationData | None,
    folder: Path,
    reporter: Reporter,
) -> tuple[Candidate, DriftReport, tuple[str, ...]]:
    """A candidate that holds the limits: groups go back to float, worst first, until it does.

    The number of reverted groups is found by doubling and then bisection, so that few full
    evaluations are needed; every accepted candidate was measured.

    Args:
        candidate: the first candidate.
        budget: limits and evaluation data.
        build: makes a candidate of a plan in a folder.
        ranking_data: data for ranking the groups (not the evaluation data, where there is other).
        folder: for candidates' files.
        reporter: progress.

    Returns:
        The candidate, its drift, and the groups that were reverted.

    Raises:
        DriftExceeded: if even the float graph does not hold the limits; lists what was measured.
    """
    report, results = budget.measure(candidate, reporter)
    if all(result.met for result in results):
        return candidate, report, ()
    reporter.note(f"over the drift limit ({_describe(results)}): looking for the layers that cause it")
    ranking = rank_groups(
        candidate.plan, budget, build, data=ranking_data or budget.data, folder=folder, reporter=reporter
    )
    tried: list[tuple[int, list[LimitResult]]] = [(0, results)]

    def attempt(count: int) -> tuple[Candidate, DriftReport, bool]:
        plan = candidate.plan.revert(frozenset(ranking[:count]), REVERTED)
        made = build(plan, folder / f"reverted-{count}")
        found, outcome = budget.measure(made, reporter)
        tried.append((count, outcome))
        return made, found, all(result.met for result in outcome)

    low, high = 0, 1
    best: tuple[int, Candidate, DriftReport] | None = None
    while best is None:
        count = min(high, len(ranking))
        made, found, met = attempt(count)
        if met:
            best = count, made, found
        elif count == len(ranking):
            raise _impossible(ranking, tried)
        else:
            low, high = count, 2 * high
    while best[0] - low > 1:
        middle = (low + best[0]) // 2
        made, found, met = attempt(middle)
        if met:
            best = middle, made, found
        else:
            low = middle
    reverted = tuple(ranking[: best[0]])
    reporter.note(f"{len(reverted)} of {len(ranking)} groups went back to float to hold the limit")
    return best[1], best[2], reverted


def rank_groups(
    plan: Plan,
    budget: Budget,
    build: Builder,
    *,
    data: CalibrationData,
    folder: Path,
    reporter: Reporter,
) -> list[str]:
    """Groups by the drift that each causes alone (all others in float), worst first.

    Measured as relative L2 on the first of the samples; ties keep the plan's order.
    """
    groups = plan.groups
    few = data.select(range(min(len(data), budget.ranking_samples)), data.split)
    drifts: dict[str, float] = {}
    with (
        ReferenceOutputs.collect(budget.baseline, few, budget.task) as reference,
        reporter.stage("ranking layers by the drift each causes", len(groups)) as stage,
    ):
        for group in groups:
            others = frozenset(groups) - {group}
            with tempfile.TemporaryDirectory(dir=folder, prefix="alone-") as place:
                alone = build(plan.revert(others, "float while another group is measured"), Path(place))
                session = alone.session(budget.threads)
                report = measure_drift(budget.baseline, session, few, budget.task, reference_cache=reference)
            drifts[group] = float("inf") if report.l2 is None and report.max_abs != 0 else report.l2 or 0.0
            stage.advance()
    return sorted(groups, key=lambda group: -drifts[group])


def _describe(results: Sequence[LimitResult]) -> str:
    return ", ".join(
        f"{item.metric} {_shown(item.value)} against {item.limit:.4g}" for item in results if not item.met
    )


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _impossible(ranking: Sequence[str], tried: Sequence[tuple[int, list[LimitResult]]]) -> DriftExceeded:
    measured = "; ".join(f"{count} groups in float: {_describe(results)}" for count, results in tried)
    return DriftExceeded(
        "the drift limit cannot be held, even with every layer in float",
        where=f"worst layers first: {', '.join(ranking[:5])}",
        why=measured,
        remedy="raise --max-drift, or check that the evaluation data fits the model",
    )


def steps(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    """A progress callback of (done, total) for a stage that counts steps."""
    seen = 0

    def progress(done: int, _total: int) -> None:
        nonlocal seen
        advance(done - seen)
        seen = done

    return progress
