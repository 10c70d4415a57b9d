"""Keeping the drift limit: measure, rank the groups, take what costs most back to float, measure again."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.drift import DriftReport, measure_drift
from ..calibration.limits import Bound, LimitResult, check_limits, default_metric, own_metrics
from ..calibration.reference import ReferenceOutputs
from ..compress.sensitivity import Sensitivities, measure_sensitivity
from ..graph.errors import DriftExceeded, ModelError
from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import OrtSession
from .candidate import Candidate
from .drift_tables import limits_by_metric
from .pareto import ParetoLog
from .search import Search, groups_of, room

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..calibration.data import CalibrationData
    from ..compress.plan import Plan
    from ..compress.recipe import Recipe
    from ..graph.model import Model, Task
    from .reporter import Reporter

REVERTED = "taken back to float to hold the drift limit"

Builder = Callable[["Plan", Path], Candidate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits of one compile, the data they hold on, and what the untouched model answers there."""

    limits: Mapping[str, Bound]
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
                own_metrics=own_metrics(self.limits),
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
    limits = limits_by_metric(recipe.max_drift, default)
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
    log: ParetoLog | None = None,
) -> tuple[Candidate, DriftReport, tuple[str, ...]]:
    """A candidate that holds the limits: where it does not, the groups that cost most go back to float.

    The sensitivity of every group is measured once (`rank_groups`); from it and what the candidate
    measured, `Search` predicts which groups have to go back, and every further plan that is built and
    measured corrects the prediction. Every accepted candidate was measured. A limit holds by the
    measured value; of several plans that hold, one whose 95 % intervals hold, too, is preferred.

    Args:
        candidate: the first candidate.
        budget: limits and evaluation data.
        build: makes a candidate of a plan in a folder.
        ranking_data: data for ranking the groups (not the evaluation data, where there is other).
        folder: for candidates' files.
        reporter: progress.
        log: keeps what was measured on the way.

    Returns:
        The candidate, its drift, and the groups that were reverted, the most harmful first.

    Raises:
        DriftExceeded: if even the float graph does not hold the limits; lists what was measured.
    """
    log = log or ParetoLog()
    report, results = budget.measure(candidate, reporter)
    log.measured(candidate, report, results)
    if all(result.met for result in results):
        for result in results:
            if result.straddles:
                reporter.note(f"the limit on {result.metric} holds, but not for sure: {result.reason}")
        return candidate, report, ()
    reporter.note(f"over the drift limit ({_describe(results)}): looking for the layers that cause it")
    data = ranking_data or budget.data
    ranking = rank_groups(candidate, budget, build, data=data, folder=folder, reporter=reporter, log=log)
    search = Search(groups=groups_of(candidate.plan, ranking, _weight_bytes(candidate)))
    search.learn((), results)
    made = {frozenset[str](): (candidate, report)}
    tried: list[tuple[int, list[LimitResult]]] = [(0, results)]
    while (chosen := search.next()) is not None:
        back = tuple(group for group in ranking if group in chosen)
        plan = candidate.plan.revert(chosen, REVERTED)
        trial = build(plan, Path(tempfile.mkdtemp(dir=folder, prefix=f"reverted-{len(back)}-")))
        found, outcome = budget.measure(trial, reporter)
        made[chosen] = trial, found
        tried.append((len(back), outcome))
        search.learn(chosen, outcome)
        log.measured(trial, found, outcome, back)
    if search.best is None:
        raise _impossible(ranking, tried)
    reverted = tuple(group for group in ranking if group in search.best)
    reporter.note(
        f"{len(reverted)} of {len(ranking)} groups went back to float to hold the limit "
        f"({len(tried)} plans were measured)"
    )
    return *made[search.best], reverted


def rank_groups(
    candidate: Candidate,
    budget: Budget,
    build: Builder,
    *,
    data: CalibrationData,
    folder: Path,
    reporter: Reporter,
    log: ParetoLog | None = None,
) -> dict[str, float]:
    """Group -> the drift that it causes alone (all others in float), the most harmful first.

    Measured as relative L2 on the first of the samples, at most (forms + 2) forwards for each
    (`compress.sensitivity`). What cannot be cut out of the graph is built and run alone.
    """
    plan = candidate.plan
    few = data.select(range(min(len(data), budget.ranking_samples)), data.split)
    drifts: dict[str, float] = {}
    if candidate.prepared is not None:
        try:
            found = _replayed(candidate, candidate.prepared, budget, data=few, reporter=reporter)
        except ModelError as error:
            reporter.note(f"layers are ranked in whole models, as they cannot be replayed: {error.what}")
        else:
            drifts = found.of(plan.quantization)
            if log is not None:
                log.sensitivities = found
    others = [group for group in plan.groups if group not in drifts]
    if others:
        drifts |= _alone(others, plan, budget, build, data=few, folder=folder, reporter=reporter)
    order = {group: place for place, group in enumerate(plan.groups)}
    return dict(sorted(drifts.items(), key=lambda item: (-item[1], order[item[0]])))


def _replayed(
    candidate: Candidate, prepared: Model, budget: Budget, *, data: CalibrationData, reporter: Reporter
) -> Sensitivities:
    def opened(model: Model) -> OrtSession:
        options = SessionOptions(threads=budget.threads)
        return OrtSession.from_model(model, options.for_answers(model.weight_bytes))

    with reporter.stage("ranking layers by the drift each causes", 100) as stage:
        percent = steps(stage.advance)
        return measure_sensitivity(
            prepared,
            {candidate.plan.quantization: candidate.plan},
            candidate.ranges,
            data,
            open_session=opened,
            rounding=candidate.rounding,
            progress=lambda done, total: percent(100 * done // total, 100),
        )


def _alone(
    groups: Sequence[str],
    plan: Plan,
    budget: Budget,
    build: Builder,
    *,
    data: CalibrationData,
    folder: Path,
    reporter: Reporter,
) -> dict[str, float]:
    """Group -> the drift of a model in which it alone is quantized; all share the forwards of one pass."""
    few = data.select(range(max(1, min(len(data), len(data) // len(groups)))), data.split)
    drifts: dict[str, float] = {}
    with (
        ReferenceOutputs.collect(budget.baseline, few, budget.task) as reference,
        reporter.stage("ranking layers that cannot be cut out", len(groups)) as stage,
    ):
        for group in groups:
            others = frozenset(plan.groups) - {group}
            with tempfile.TemporaryDirectory(dir=folder, prefix="alone-") as place:
                alone = build(plan.revert(others, "float while another group is measured"), Path(place))
                session = alone.session(budget.threads)
                report = measure_drift(budget.baseline, session, few, budget.task, reference_cache=reference)
            drifts[group] = float("inf") if report.l2 is None and report.max_abs != 0 else report.l2 or 0.0
            stage.advance()
    return drifts


def _weight_bytes(candidate: Candidate) -> dict[str, int]:
    """Weight -> bytes in float."""
    source = candidate.prepared
    if source is None:
        return {}
    return {
        name: value.const_value.nbytes
        for graph in source.all_graphs()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def _describe(results: Sequence[LimitResult]) -> str:
    return ", ".join(
        f"{item.metric} {_shown(item.value)} against {item.limit:.4g}" for item in results if not item.met
    )


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _impossible(
    ranking: Mapping[str, float], tried: Sequence[tuple[int, list[LimitResult]]]
) -> DriftExceeded:
    measured = "; ".join(f"{count} groups in float: {_describe(results)}" for count, results in tried)
    best, held = max(tried, key=lambda item: room(item[1]))
    shown = ", ".join(f"{group} ({_shown(drift)})" for group, drift in list(ranking.items())[:5])
    return DriftExceeded(
        "the drift limit cannot be held, even with every layer in float",
        where=f"worst layers first, with the drift of each alone: {shown}",
        why=f"{measured}. The best found has {best} groups in float: {_describe(held)}",
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
