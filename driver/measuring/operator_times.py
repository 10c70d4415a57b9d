"""Operators timed in every form that they could take, each kind once; what the cache knows costs nothing."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...graph.errors import RuntimeUnavailable
from ...runtimes.base import SessionOptions
from ...runtimes.device import Device, LocalDevice
from ...runtimes.device import Form as DeviceForm
from ...runtimes.timing import Schedule
from ...runtimes.timing_cache import OperatorTiming, TimingCache, TimingKey
from ...runtimes.timing_jobs import TimingJob, time_jobs
from .operator_models import FLOAT, WITH_CONVERSIONS, LoweredForm, Trial, form_name, lowered_forms

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...compress.plan import Decision
    from ...runtimes.base import Array
    from ...runtimes.timing import BenchmarkResult
    from ..reporter import Reporter

Choices = list[list["Decision"]]
_SCHEDULE = Schedule(
    pairs=4, runs=8, warm_up_runs=1, least_pair_s=0.02, warm_up_limit_s=0.05, most_pair_s=0.2
)
_FLOAT_MACS_PER_S = 2e10
_SESSIONS_S = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedKind:
    """One kind of operator and the forms it is timed in.

    Attributes:
        trial: the operator.
        choices: per form, the decisions of the trial's nodes.
        names: of forms that `build` makes, where it is not by decisions; then `choices` is empty.
        build: makes the forms, float first; by default `lowered_forms` does.
    """

    trial: Trial
    choices: Choices = dataclasses.field(default_factory=list)
    names: tuple[str, ...] = ()
    build: Callable[[], list[LoweredForm]] | None = None

    def keys(self, threads: int) -> list[TimingKey]:
        """What its timings are kept under; float is not among them."""
        names = list(self.names)
        for decisions in self.choices:
            name = form_name(decisions[0])
            names += [f"{name}{WITH_CONVERSIONS}", name] if decisions[0].form == "static" else [name]
        trial = self.trial
        return [
            TimingKey(
                operator=trial.operator,
                form=name,
                shapes=trial.shapes,
                attributes=trial.attributes,
                threads=threads,
            )
            for name in names
        ]

    def estimate_s(self, forms: int) -> float:
        """About how long timing takes, from what a core multiplies in float."""
        run_s = (self.trial.macs or 0) / _FLOAT_MACS_PER_S
        if not run_s:
            return _SCHEDULE.pairs * (forms + 1) * _SESSIONS_S
        warm_up = min(10.0, max(2.0, _SCHEDULE.warm_up_limit_s / run_s))
        runs = min(float(_SCHEDULE.runs), max(3.0, _SCHEDULE.most_pair_s / (forms + 1) / run_s))
        return _SCHEDULE.pairs * (forms + 1) * ((warm_up + runs) * run_s + _SESSIONS_S)

    def forms(self, threads: int) -> tuple[list[DeviceForm], Mapping[str, Array]]:
        """The forms ready to be timed, float first, and the inputs of that."""
        made = lowered_forms(self.trial, self.choices) if self.build is None else self.build()
        options = SessionOptions(threads=threads)
        asked = [
            DeviceForm(name=form.name, model=form.model, options=options, feeds=form.feeds) for form in made
        ]
        return asked, made[0].feeds


def place_word(device: Device) -> str:
    """Where a device's times were made, in words."""
    return "here" if isinstance(device, LocalDevice) else f"on {device.name}"


def time_kinds(
    kinds: Sequence[TimedKind],
    *,
    device: Device,
    cache: TimingCache,
    threads: int,
    budget_s: float,
    reporter: Reporter,
) -> tuple[dict[int, dict[str, OperatorTiming]], int]:
    """Timings by place and form of every kind that is known or was timed, and how many were known.

    Each kind is timed in float and its forms in turn, in models of its own, and kept at once. One that the
    runtime refuses is there without timings.

    Args:
        kinds: in the order in which they are timed.
        device: where.
        cache: timings of that device.
        threads: of every session.
        budget_s: stop beginning new ones after so many seconds; 0 times nothing and asks the cache only.
        reporter: shows how far it is.

    Raises:
        RuntimeUnavailable: if the device goes away; what was timed until then is in the cache.
    """
    found: dict[int, dict[str, OperatorTiming]] = {}
    keys = [kind.keys(threads) for kind in kinds]
    for place, wanted in enumerate(keys):
        cached = {key.form: timing for key in wanted if (timing := cache.get(key)) is not None}
        if wanted and len(cached) == len(wanted):
            found[place] = cached
    known = len(found)
    open_places = [place for place in range(len(kinds)) if place not in found and keys[place]]
    with reporter.stage(f"timing operators{_stage_word(device)}", len(kinds)) as stage:
        stage.advance(known)
        if budget_s <= 0:
            return found, known
        jobs = (
            TimingJob(
                build=functools.partial(kinds[place].forms, threads),
                schedule=_SCHEDULE,
                estimate_s=kinds[place].estimate_s(len(keys[place])),
            )
            for place in open_places
        )
        try:
            for outcome in time_jobs(device, jobs, budget_s=budget_s):
                place = open_places[outcome.index]
                # Where the runtime has no kernel for a form after all, the profile decides.
                found[place] = {} if outcome.result is None else _timings(outcome.result, keys[place])
                cache.add(found[place].values())
                stage.advance()
        except RuntimeUnavailable:
            reporter.note(
                f"{len(found)} of {len(kinds)} operators are timed and kept: the next attempt goes on"
            )
            raise
    return dict(sorted(found.items())), known


def _stage_word(device: Device) -> str:
    return "" if isinstance(device, LocalDevice) else f" on {device.name}"


def _timings(result: BenchmarkResult, keys: Sequence[TimingKey]) -> dict[str, OperatorTiming]:
    by_form = {key.form: key for key in keys}
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {
        item.candidate: OperatorTiming(
            key=by_form[item.candidate],
            p50_ms=result.timing(item.candidate).p50_ms,
            float_p50_ms=result.timing(FLOAT).p50_ms,
            pair_ratios=item.pair_ratios,
            date=today,
        )
        for item in result.comparisons
    }
