"""Choices that only the whole model can decide, by time on the host: fusions, plans, session options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from ...compress.choice import Verdict
from ...compress.lower import apply_plan, fusion_passes
from ...compress.quantize.static import static_layout
from ...compress.recipe import INT8_PRECISIONS
from ...graph.passes import run_passes
from ...graph.save import to_bytes
from ...runtimes.base import SessionOptions
from ...runtimes.device import Device
from ...runtimes.device import Form as DeviceForm
from ...runtimes.timing import BenchmarkResult, Comparison, Schedule
from ...runtimes.timing_cache import TimingCache, ratio_of
from .forms import MARGIN_FRACTION, Measured, measure_forms
from .local_benchmark import BASELINE, COMPILED, WITHOUT_OPTIONS
from .operator_models import plausible_ranges

if TYPE_CHECKING:
    from ...compress.plan import Plan
    from ...compress.propose import Request
    from ...compress.recipe import Recipe
    from ...graph.model import Model
    from ...graph.passes import PassRecord
    from ...runtimes.base import Array
    from ...targets.profile import Evidence, Form, TargetProfile
    from ..candidate import Candidate
    from ..reporter import Reporter

IN_FLOAT = "after, in float"
UNBLOCKED = "after, convolutions in the model's own layout"
PINNED = "pinned by the recipe"
_TIMED_EARLIER = "timed when the recipe's pins were made, on whatever machine that was"
TIMED_SWITCHES = ("attention", "packed-qkv", "rotary")
"""Fusions whose gain depends on the target and the model; all others are as fast or faster everywhere."""

_DISABLE_KEY = "optimization.disable_specified_optimizers"
_BLOCKED_LAYOUT_OPS = frozenset({"ReorderInput", "ReorderOutput"})
_LAYOUT_OPTIMIZER = "NchwcTransformer"
_LARGEST_SWITCHED_BYTES = 1 << 28
_LEAST_FOR_SWITCHES_S = 1.0
_SHARE_OF_SWITCHES, _SHARE_OF_OPERATORS, SHARE_OF_PLANS = 0.2, 0.5, 0.3
"""Of `measure_seconds`, for the three stages that they bound."""
_WEAK_RATIO = 1.3


def is_measured(recipe: Recipe, *, on_target: bool) -> bool:
    """Whether a compile makes its choices by time: on the target, unless pinned or told not to time."""
    return (
        on_target
        and recipe.pins is None
        and recipe.measure_seconds > 0
        and recipe.precision in ("auto", *INT8_PRECISIONS)
        and "benchmark" not in recipe.skip
    )


def settle_forms(
    request: Request,
    model: Model,
    profile: TargetProfile,
    recipe: Recipe,
    *,
    device: Device,
    cache: Callable[[], TimingCache],
    may_time: bool,
    reporter: Reporter,
    on_target: bool,
    evidence: Evidence = "measured-on-target",
) -> tuple[Request, Measured]:
    """The request with the forms that are settled: pinned ones, or those that timing chose.

    Args:
        request: as the recipe says.
        model: the float graph.
        profile: the target's.
        recipe: `pins`, `measure_seconds`, `precision` and `threads` count.
        device: where to time.
        cache: opens the timings of that device.
        may_time: False asks the cache only (a dry run).
        reporter: progress.
        on_target: whether the device is the target, so that its times decide.
        evidence: their grade.
    """
    pins = recipe.pins
    if pins is not None:
        verdicts = {
            name: Verdict(form=form, reason=PINNED, evidence="measured-elsewhere", source=_TIMED_EARLIER)
            for name, form in pins.forms.items()
        }
        settled = dataclasses.replace(
            request, verdicts=verdicts, static_activation=pins.static_activation or request.static_activation
        )
        return settled, Measured()
    if not is_measured(recipe, on_target=on_target):
        return request, Measured()
    measured = measure_forms(
        model,
        profile,
        request,
        device=device,
        cache=cache(),
        threads=recipe.threads,
        budget_s=recipe.measure_seconds * _SHARE_OF_OPERATORS if may_time else 0.0,
        reporter=reporter,
        evidence=evidence,
    )
    if recipe.precision in INT8_PRECISIONS:  # by name: the fastest integer form, even where float is faster
        kept = {name: item for name, item in measured.verdicts.items() if item.form != "float"}
        measured = dataclasses.replace(measured, verdicts=kept)
    return with_verdicts(request, measured, measured.verdicts), measured


def with_verdicts(request: Request, measured: Measured, verdicts: Mapping[str, Verdict]) -> Request:
    """The request with these forms, and the type of static activations that was the fastest."""
    activation = measured.static_activation or request.static_activation
    return dataclasses.replace(request, verdicts=verdicts, static_activation=activation)


def other_switches(model: Model, profile: TargetProfile, recipe: Recipe) -> list[dict[str, bool]]:
    """The recipe's fusion switches with one more turned on, for each that would change the fused graph."""
    found = []
    for name in TIMED_SWITCHES:
        if name in recipe.fusions:
            continue
        switches = {**recipe.fusions, name: True}
        trial = model.fork()
        before = trial.structure_hash()
        run_passes(trial, fusion_passes(trial, profile, switches))
        if trial.structure_hash() != before:
            found.append(switches)
    return found


def fastest_graph(
    models: Sequence[Model], feeds: Mapping[str, Array], threads: int, *, device: Device, limit_s: float
) -> int:
    """The place of the fastest of a model's forms; the first, unless another wins by the margin."""
    options = SessionOptions(threads=threads)
    forms = [
        DeviceForm(name=f"form {place}", model=to_bytes(model, with_shapes=False), options=options)
        for place, model in enumerate(models)
    ]
    schedule = Schedule(
        pairs=4,
        runs=8,
        warm_up_runs=1,
        limit_s=limit_s,
        least_pair_s=0.05,
        most_pair_s=max(limit_s / 4, 0.1),
        warm_up_limit_s=0.3,
    )
    result = device.time(forms, feeds, schedule)
    best, ratio = 0, 1.0
    for place, item in enumerate(result.comparisons, start=1):
        if item.is_faster(MARGIN_FRACTION) and item.ratio > ratio:
            best, ratio = place, item.ratio
    return best


def fastest_plan(
    model: Model,
    plans: Sequence[Plan],
    feeds: Mapping[str, Array],
    threads: int,
    *,
    device: Device,
    limit_s: float,
) -> int:
    """The place of the plan whose lowering is the fastest; the first, unless another wins by the margin.

    Nothing is calibrated for it: latency does not depend on the ranges (see `plausible_ranges`).
    """
    lowered = []
    for plan in plans:
        ranges = plausible_ranges(model, static_layout(model, plan.decisions).observed)
        lowered.append(apply_plan(model, plan, ranges)[0])
    return fastest_graph(lowered, feeds, threads, device=device, limit_s=limit_s)


def weak_nodes(measured: Measured, *, further: bool) -> frozenset[str]:
    """The nodes to try in float where the whole model does not pay: those that pay only in context.

    With `further`, also those that gain less than 1.3x on their own.
    """
    if not further:
        return measured.in_context
    return measured.in_context | {name for name, ratio in measured.ratios.items() if ratio < _WEAK_RATIO}


def other_options(candidate: Candidate) -> list[tuple[str, dict[str, str]]]:
    """Further config entries that a candidate could be faster with."""
    if not _BLOCKED_LAYOUT_OPS & candidate.audit.operators.keys():
        return []
    disabled = [name for name in (candidate.config.get(_DISABLE_KEY), _LAYOUT_OPTIMIZER) if name]
    return [(UNBLOCKED, {**candidate.config, _DISABLE_KEY: ";".join(disabled)})]


def faster_options(timing: BenchmarkResult, names: Sequence[str]) -> str:
    """Which of the same file's sets of options to ship: the runtime's defaults, unless others win.

    Args:
        timing: has `COMPILED`, and the others of `names`.
        names: forms that are the candidate's file under other options.
    """
    usual = WITHOUT_OPTIONS if WITHOUT_OPTIONS in names else COMPILED
    best = usual
    for name in (COMPILED, *names):
        against = between(timing, best, name)
        if against is not None and against.is_faster(MARGIN_FRACTION):
            best = name
    return best


def between(timing: BenchmarkResult, baseline: str, candidate: str) -> Comparison | None:
    """`candidate` against `baseline`, pair by pair; None where one of them was not timed."""
    ratios = {item.candidate: item.pair_ratios for item in timing.comparisons}
    if candidate not in ratios or (baseline not in ratios and baseline != BASELINE) or baseline == candidate:
        return None
    if baseline == BASELINE:
        return ratio_of(ratios[candidate], baseline, candidate)
    pairs = zip(ratios[baseline], ratios[candidate], strict=True)
    return ratio_of([theirs / ours for ours, theirs in pairs], baseline, candidate)


def is_undecided(timing: BenchmarkResult) -> bool:
    """Whether the candidate is slower at the median, but not in every pair: it needs a longer look."""
    against = _inverse(timing)
    return against is not None and against.low <= 1 and against.ratio >= 1 + MARGIN_FRACTION


def beaten_by(timing: BenchmarkResult, *, by_median: bool = False) -> tuple[str, Comparison] | None:
    """The form that is faster than the candidate, the fastest of them; None if there is none.

    Faster is by the margin and in every pair of sessions. With `by_median` (a longer look at what was
    undecided) the margin alone counts, against the model that went in.
    """
    found: tuple[str, Comparison] | None = None
    for name in (BASELINE, IN_FLOAT):
        against = between(timing, COMPILED, name) if name != BASELINE else _inverse(timing)
        if against is None or against.ratio < 1 + MARGIN_FRACTION:
            continue
        if against.low <= 1 and not (by_median and name == BASELINE):
            continue
        if found is None or against.ratio > found[1].ratio:
            found = name, against
    return found


def is_tie(timing: BenchmarkResult) -> bool:
    """Whether the candidate is not faster by the margin than its own float form, which was timed, too."""
    against = between(timing, IN_FLOAT, COMPILED)
    return against is not None and not against.is_faster(MARGIN_FRACTION)


def _inverse(timing: BenchmarkResult) -> Comparison | None:
    """The model that went in, against the candidate."""
    against = between(timing, BASELINE, COMPILED)
    if against is None:
        return None
    return ratio_of([1 / ratio for ratio in against.pair_ratios], COMPILED, BASELINE)


def pinned_forms(plan_forms: Mapping[str, Form], verdicts: Mapping[str, Verdict]) -> dict[str, Form]:
    """What timing chose against the tables: node -> form, where `plan_forms` has another one."""
    return {
        name: verdict.form
        for name, verdict in sorted(verdicts.items())
        if name in plan_forms and plan_forms[name] != verdict.form
    }


def faster_fusions(
    source: Model,
    prepared: tuple[Model, list[PassRecord]],
    profile: TargetProfile,
    recipe: Recipe,
    *,
    prepare_with: Callable[[Recipe], tuple[Model, list[PassRecord]]],
    feeds: Callable[[], Mapping[str, Array]],
    device: Device,
    reporter: Reporter,
) -> tuple[tuple[Model, list[PassRecord]], dict[str, bool]]:
    """The cleaned and fused graph with the switches that are the fastest here, and those switches.

    Switches that the recipe names are left as they are; each other one of `TIMED_SWITCHES` that would
    change the graph is turned on, and the float graphs are timed against each other.

    Args:
        source: the untouched model (its size bounds what is tried).
        prepared: the graph with the profile's own switches, and what the passes did.
        profile: the target's.
        recipe: what was asked.
        prepare_with: makes the graph, checked against the untouched model, for other switches.
        feeds: makes the inputs to time on; called only if there is something to time.
        device: where to time.
        reporter: progress.
    """
    limit_s = recipe.measure_seconds * _SHARE_OF_SWITCHES
    if source.weight_bytes > _LARGEST_SWITCHED_BYTES or limit_s < _LEAST_FOR_SWITCHES_S:
        return prepared, {}
    switches = other_switches(prepared[0], profile, recipe)
    if not switches:
        return prepared, {}
    with reporter.stage("timing fusions", len(switches)):
        forms = [prepared]
        forms += [prepare_with(msgspec.structs.replace(recipe, fusions=item)) for item in switches]
        best = fastest_graph(
            [model for model, _ in forms],
            feeds(),
            recipe.threads,
            device=device,
            limit_s=limit_s,
        )
    tried = {name: False for item in switches for name in item if name not in recipe.fusions}
    chosen = {} if best == 0 else {name: on for name, on in switches[best - 1].items() if name in tried}
    return forms[best], tried | chosen


def renamed(timing: BenchmarkResult, name: str, *, dropped: frozenset[str]) -> BenchmarkResult:
    """A timing in which the form `name` is the candidate: the same file, with options that were faster."""
    timings = [item for item in timing.timings if item.name != COMPILED and item.name not in dropped]
    chosen = [msgspec.structs.replace(item, name=COMPILED) for item in timings if item.name == name]
    others = [item for item in timings if item.name not in (name, BASELINE)]
    first = [item for item in timings if item.name == BASELINE]
    ratios = {
        item.candidate: item
        for item in timing.comparisons
        if item.candidate != COMPILED and item.candidate not in dropped
    }
    comparisons = [msgspec.structs.replace(ratios.pop(name), candidate=COMPILED), *ratios.values()]
    return msgspec.structs.replace(timing, timings=(*first, *chosen, *others), comparisons=tuple(comparisons))
