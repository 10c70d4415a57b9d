"""Getting a float graph ready for dynamic INT8: the same function, with less for quantization to spoil."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from ..calibration.collect import SPREAD, TYPICAL, collect_channel_limits
from ..calibration.drift import measure_drift
from ..calibration.reference import ReferenceOutputs
from ..compress.fuse.sequence_major import SEQUENCE_MAJOR, SequenceMajor
from ..compress.lower import apply_plan
from ..compress.operands import RECURRENT_OPS, weight_name
from ..compress.quantize.centre import CENTRE, CentreActivations, centrable, moved_limits
from ..compress.quantize.outlier_choice import choose_outliers
from ..compress.quantize.outliers import MIGRATE, MigrateOutliers, migratable
from ..compress.quantize.split import SPLIT, SplitOutliers, splittable
from ..graph.errors import DataError, ModelError
from ..graph.passes import Pass, run_passes
from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import OrtSession
from .budget import steps
from .candidate import difference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..calibration.data import CalibrationData
    from ..compress.plan import Plan
    from ..compress.quantize.centre import Limits
    from ..compress.recipe import Recipe
    from ..graph.model import Model, Task
    from ..runtimes.base import Array
    from ..runtimes.device import Device
    from ..targets.profile import TargetProfile
    from .calib_cache import CalibCache
    from .reporter import Reporter

_MEASURED_SAMPLES, _BATCH = 32, 8
_EDGEPRESS = "edgepress"
_LAYOUT_OP = "SequenceMajor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a graph is conditioned with (data and cache may be missing), and what it is held against.

    `device` is where forms are timed, this machine by default; `on_target` says whether it is the target.
    """

    data: CalibrationData | None
    cache: CalibCache | None
    recipe: Recipe
    profile: TargetProfile
    baseline: OrtSession
    task: Task
    samples: Sequence[Mapping[str, Array]]
    expected: Sequence[Mapping[str, Array]]
    reporter: Reporter
    device: Device | None = None
    on_target: bool = False

    def wants(self, name: str) -> bool:
        """Whether the recipe leaves a step on."""
        return self.recipe.fusions.get(name, True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioned:
    """A graph of the same function, its plan, and what is worth a note."""

    model: Model
    plan: Plan
    notes: tuple[str, ...] = ()


def condition(model: Model, plan: Plan, given: Conditions) -> Conditioned:
    """Centre activations, migrate and split outlier channels, and lay attention out sequence first.

    For what the plan computes in dynamic INT8 alone. Every step keeps the function (checked on samples); the
    first three need calibration, and each is kept only if the error of the quantized model on calibration
    data falls. `fusions` of the recipe switches each off.
    """
    forms = {item.form for item in plan.decisions if item.op not in RECURRENT_OPS}
    current = Conditioned(model=model, plan=plan)
    if "dynamic" not in forms:
        return current
    limits = _limits(current, given)
    if limits:
        with _error_meter(given, measured="static" not in forms) as error:
            current = _closer(current, limits, given, error)
    if "static" not in forms and _likes_sequence_major(given):
        current = _step(current, [SequenceMajor()], given) or current
    return current


def _likes_sequence_major(given: Conditions) -> bool:
    """On the host (it is timed there), or where the profile knows it to be faster; unless switched."""
    known = given.profile.kind == "host" or given.profile.is_faster(_LAYOUT_OP, _EDGEPRESS)
    return given.recipe.fusions.get(SEQUENCE_MAJOR, known)


def _limits(current: Conditioned, given: Conditions) -> Limits:
    """What calibration says of the channels of activations that can be treated; empty without any."""
    model, decisions = current.model, current.plan.decisions
    centred = centrable(model, decisions) if given.wants(CENTRE) else []
    treated = migratable(model, decisions) if given.wants(MIGRATE) else []
    treated += splittable(model, decisions) if given.wants(SPLIT) else []
    keys = [*centred, *(name + kind for name in dict.fromkeys(treated) for kind in (TYPICAL, SPREAD))]
    known = None if given.cache is None or not keys else given.cache.channels(model, keys)
    if known is not None or not keys or given.data is None:
        return known or {}
    found = _observe(model, list(dict.fromkeys([*centred, *treated])), given.data, given)
    if given.cache is not None:
        given.cache.keep_channels({key: found[key] for key in keys})
    return found


def _observe(model: Model, names: list[str], data: CalibrationData, given: Conditions) -> Limits:
    """Limits of channels in batches, as a server forms them; one sample at a time where that fails."""

    def collect(batch_size: int) -> Limits:
        with given.reporter.stage("looking for outlier channels", len(data)) as stage:
            return collect_channel_limits(
                model,
                names,
                data,
                typical=True,
                batch_size=batch_size,
                options=SessionOptions(threads=given.recipe.threads, graph_optimization_level="basic"),
                progress=steps(stage.advance),
            )

    try:
        return collect(_BATCH)
    except (DataError, ModelError):  # samples of many shapes, or a model that only claims a dynamic batch
        return collect(1)


def _closer(
    current: Conditioned, limits: Limits, given: Conditions, error: Callable[[Conditioned], float | None]
) -> Conditioned:
    least = error(current)

    def keep_if_closer(made: Conditioned | None, name: str) -> bool:
        nonlocal current, least
        if made is None:
            return False
        found = error(made)
        if found is not None and least is not None and found >= least:
            note = (
                f"{name}: left out, the error on calibration data is {found:.4f} with it, {least:.4f} without"
            )
            current = dataclasses.replace(current, notes=(*current.notes, note))
            return False
        current, least = made, found
        return True

    names = centrable(current.model, current.plan.decisions) if given.wants(CENTRE) else []
    chosen = {name: limits[name] for name in names if name in limits}
    before = current.model
    if keep_if_closer(_step(current, [CentreActivations(limits=chosen)], given), CENTRE):
        limits = moved_limits(before, current.model, limits)
    choice = choose_outliers(
        current.model, current.plan.decisions, limits, migrate=given.wants(MIGRATE), split=given.wants(SPLIT)
    )
    plan = msgspec.structs.replace(current.plan, refusals=(*current.plan.refusals, *choice.refused))
    current = dataclasses.replace(current, plan=plan)
    keep_if_closer(_step(current, [MigrateOutliers(factors=choice.factors)], given), MIGRATE)
    keep_if_closer(_step(current, [SplitOutliers(channels=choice.channels)], given), SPLIT)
    return current


def _step(current: Conditioned, passes: Sequence[Pass], given: Conditions) -> Conditioned | None:
    """A fork that passes changed, with the plan told; None if they left it alone, or changed its results."""
    made = current.model.fork()
    records = run_passes(made, passes)
    if not any(record.changed for record in records):
        return None
    problem = difference(made, given.samples, given.expected)
    if problem is not None:
        given.reporter.warn(
            f"{records[0].name} changed the results ({problem}): left out; please report this model"
        )
        return None
    nodes = {node.name: node for node in made.graph.all_nodes()}
    decisions = [
        msgspec.structs.replace(item, weight=weight_name(nodes[item.node]))
        if item.weight is not None and item.node in nodes
        else item
        for item in current.plan.decisions
    ]
    plan = msgspec.structs.replace(
        current.plan.with_decisions(decisions), passes=(*current.plan.passes, *records)
    )
    return dataclasses.replace(current, model=made, plan=plan)


@contextlib.contextmanager
def _error_meter(given: Conditions, *, measured: bool) -> Iterator[Callable[[Conditioned], float | None]]:
    """The relative L2 error of a quantized graph on some calibration samples.

    None where it cannot be measured: without data, or where static ranges are not calibrated yet.
    """
    data = given.data
    if data is None or not measured or not len(data):
        yield lambda _: None
        return
    few = data.select(range(min(len(data), _MEASURED_SAMPLES)), data.split)
    with ReferenceOutputs.collect(given.baseline, few, given.task) as reference:

        def error(made: Conditioned) -> float | None:
            lowered, _ = apply_plan(made.model, made.plan)
            session = OrtSession.from_model(lowered, SessionOptions(threads=given.recipe.threads))
            return measure_drift(given.baseline, session, few, given.task, reference_cache=reference).l2

        yield error
