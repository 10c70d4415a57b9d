"""How far the model's answers move when one group of nodes is quantized: every group, in few forwards.

Per sample the float model runs once and its tensors are recorded; every group is replayed on them
in its quantized form, by the runtime's own integer kernels; and the error that a group makes is
added to its results in the float model, whose answers then move just as far as in a model in which
this group alone is quantized. So that the cost stays within (formats + 2) forwards for each sample
of the data, as many samples are taken as that pays for; each serves all groups, because what a
sample does to all groups alike then cancels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from ..calibration.representation import Representation
from .sensitivity_graphs import Part, Recorder, Replay, parts_of, recorder, replay
from .sensitivity_shares import combine, interpolate

if TYPE_CHECKING:
    from ..calibration.data import CalibrationData
    from ..graph.model import Model
    from ..runtimes.base import Array, Runner
    from .plan import Plan
    from .quantize.constants import Rounding
    from .quantize.static import Ranges

Floats = npt.NDArray[np.float64]
Opener = Callable[["Model"], "Runner"]
_MOST_WITNESSES = 32
_Place = tuple[str, str, str]  # a form, a group of it, one of its results
_TINY = np.finfo(np.float64).tiny


class GroupSensitivity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one group in one form does to the model's answers.

    Attributes:
        group: its name in the plan.
        form: the name of the plan among those compared.
        l2: relative L2 change of the answers if this group alone is quantized; None where the
            answers become infinite or NaN.
        local_l2: relative L2 error of the group's own results on float operands.
    """

    group: str
    form: str
    l2: float | None
    local_l2: float | None


class Sensitivities(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every group in every form, the most harmful first.

    Attributes:
        groups: one entry for each group and form.
        unmeasured: (form, group) of what cannot be taken out of the graph (bodies of If and Loop).
        data_samples: how many samples the data has.
        samples: how many of them were run.
        forwards: sample-forwards in all; a replay of all groups counts as one.
    """

    groups: tuple[GroupSensitivity, ...]
    unmeasured: tuple[tuple[str, str], ...] = ()
    data_samples: int
    samples: int
    forwards: int

    def of(self, form: str) -> dict[str, float]:
        """Group -> relative L2 change of the answers in this form, the most harmful first; inf where None."""
        return {
            item.group: float("inf") if item.l2 is None else item.l2
            for item in self.groups
            if item.form == form
        }


def measure_sensitivity(
    model: Model,
    plans: Mapping[str, Plan],
    ranges: Ranges,
    data: CalibrationData,
    *,
    open_session: Opener,
    rounding: Rounding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivities:
    """Measure what quantizing each group alone does to the model's answers.

    The errors of the first form's groups are added to the float model one group at a time; those of
    the other forms are known from their replay, and carry as far as the first form's at the same
    place.

    Args:
        model: the float graph that the plans were made for; its task says what is compared.
        plans: name of a form -> plan; the groups of each are replayed in that form.
        ranges: tensor name -> (minimum, maximum) for all that is static.
        data: samples; some of them are run (see the module).
        open_session: opens a graph in the runtime.
        rounding: node name -> the integers of its weight, where they are not the nearest.
        progress: called with (forwards done, forwards in all).

    Raises:
        ModelError: if the runtime refuses one of the two graphs.
    """
    forms = {name: parts_of(model, plan) for name, plan in plans.items()}
    unmeasured = tuple((name, group) for name, (_, others) in forms.items() for group in others)
    units = _units({name: parts for name, (parts, _) in forms.items()})
    if not units or len(data) == 0:
        return Sensitivities(groups=(), unmeasured=unmeasured, data_samples=len(data), samples=0, forwards=0)
    every = tuple(part for parts, _ in forms.values() for part in parts)
    recording = recorder(model, every)
    stand = _Stand(
        recording=recording,
        float_run=open_session(recording.model),
        replays=tuple(
            _Form(
                name=name,
                parts=forms[name][0],
                replay=(made := replay(model, plan, forms[name][0], ranges, rounding)),
                run=open_session(made.model),
            )
            for name, plan in plans.items()
            if forms[name][0]
        ),
        units=units,
    )
    found = _measured(stand, model, data, progress)
    return msgspec.structs.replace(found, unmeasured=unmeasured)


def _measured(
    stand: _Stand, model: Model, data: CalibrationData, progress: Callable[[int, int], None] | None
) -> Sensitivities:
    overhead, budget = 1 + len(stand.replays), (len(stand.replays) + 2) * len(data)
    size = data.static_batch or 1
    samples = min(len(data), max(size, budget // (overhead + len(stand.units)) // size * size))
    injected = min(len(stand.units), max(1, budget // samples - overhead))
    total, done = -(-samples // size) * (overhead + injected), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    sums = _Sums(stand, model, -(-samples // size), injected)
    taken = data.select(np.linspace(0, len(data) - 1, samples).round().astype(int).tolist(), data.split)
    for row, (feeds, count) in enumerate(taken.batches(size)):
        sums.add(row, feeds, count, advance)
    return Sensitivities(
        groups=sums.result(),
        data_samples=len(data),
        samples=samples,
        forwards=done * size,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unit:
    """A part whose error is added to the float model: of the first form, or of what only another has."""

    form: str
    part: Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """One form's replay and the session that runs it."""

    name: str
    parts: tuple[Part, ...]
    replay: Replay
    run: Runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stand:
    """The two kinds of sessions, and what is put to the test in them."""

    recording: Recorder
    float_run: Runner
    replays: tuple[_Form, ...]
    units: tuple[_Unit, ...]

    def record(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All recorded tensors by their own names, and the model's outputs by theirs."""
        names = dict.fromkeys((*self.recording.outputs, *self.recording.recorded.values()))
        found = self._run(feeds, {}, list(names))
        tensors = {name: found[output] for name, output in self.recording.recorded.items()}
        tensors |= {name: values for name, values in feeds.items() if name not in tensors}
        return tensors | {name: found[name] for name in self.recording.outputs}

    def moved(
        self, feeds: Mapping[str, Array], errors: Mapping[str, Array], watched: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The model's outputs, and the watched tensors, with errors added to some tensors."""
        names = {name: self.recording.recorded[name] for name in watched}
        found = self._run(feeds, errors, list(dict.fromkeys((*self.recording.outputs, *names.values()))))
        return (
            {name: found[name] for name in self.recording.outputs},
            {name: found[output] for name, output in names.items()},
        )

    def _run(
        self, feeds: Mapping[str, Array], errors: Mapping[str, Array], names: Sequence[str]
    ) -> dict[str, Array]:
        zero = np.zeros((), np.float32)
        deltas = {delta: errors.get(name, zero) for name, delta in self.recording.deltas.items()}
        own = {spec.name for spec in self.float_run.inputs}
        return self.float_run.run(
            {**{name: values for name, values in feeds.items() if name in own}, **deltas}, names
        )


def _units(forms: Mapping[str, Sequence[Part]]) -> tuple[_Unit, ...]:
    """The first form's parts, and of the others' those that share no result with what is there."""
    units: list[_Unit] = []
    covered: set[str] = set()
    for name, parts in forms.items():
        fresh = [part for part in parts if covered.isdisjoint(part.outputs)]
        units += [_Unit(form=name, part=part) for part in fresh]
        covered.update(output for part in fresh for output in part.outputs)
    return tuple(units)


class _Sums:
    """What is kept of each sample: a few numbers for each unit, whatever the size of the tensors."""

    def __init__(self, stand: _Stand, model: Model, samples: int, injected: int) -> None:
        self.stand = stand
        self.task = model.task
        self.injected = injected
        count = len(stand.units)
        self.results = tuple(dict.fromkeys(name for unit in stand.units for name in unit.part.outputs))
        picked = np.linspace(0, len(self.results) - 1, min(len(self.results), _MOST_WITNESSES)).round()
        self.watched = tuple(self.results[place] for place in picked.astype(int))
        self.moves: Floats = np.full((samples, count), np.nan)
        self.witnesses: Floats = np.full((samples, count, len(self.watched)), np.nan)
        self.signal = np.zeros(samples)
        # Sums of squares: of the replay's error in one place, and of the tensor itself.
        self.errors: dict[_Place, float] = {}
        self.energies: dict[str, float] = {}
        self.representation: Representation | None = None

    def add(
        self,
        row: int,
        feeds: Mapping[str, Array],
        count: int,
        advance: Callable[[], None],
    ) -> None:
        """Run one batch: record, replay every form, then one float forward for each injected unit."""
        stand = self.stand
        tensors = stand.record(feeds)
        outputs = {name: tensors[name] for name in stand.recording.outputs}
        advance()
        if self.representation is None:
            self.representation = Representation(self.task, outputs)
        reference = self._rows(outputs, feeds, count)
        self.signal[row] = sum(_energy(values) for values in reference)
        powers: dict[_Place, float] = {}
        errors = dict(self._replayed(tensors, powers, advance))
        energies = {name: _energy(tensors[name]) for name in self.results}
        for name, energy in energies.items():
            self.energies[name] = self.energies.get(name, 0.0) + energy
        local = [
            sum(powers[unit.form, unit.part.group, name] for name in unit.part.outputs)
            / max(sum(energies[name] for name in unit.part.outputs), _TINY)
            for unit in stand.units
        ]
        for place in np.argsort(-np.nan_to_num(local, nan=np.inf), kind="stable")[: self.injected]:
            unit = stand.units[place]
            added = {name: errors[unit.form, unit.part.group, name] for name in unit.part.outputs}
            found, behind = stand.moved(feeds, added, self.watched)
            advance()
            moved = self._rows(found, feeds, count)
            power = sum(_energy(after - before) for after, before in zip(moved, reference, strict=True))
            self.moves[row, place] = power if np.isfinite(power) else np.inf
            self.witnesses[row, place] = [_rough_energy(behind[name], tensors[name]) for name in self.watched]

    def _rows(self, outputs: Mapping[str, Array], feeds: Mapping[str, Array], count: int) -> list[Floats]:
        assert self.representation is not None
        samples = self.representation.rows(outputs, feeds, count)
        return [values.astype(np.float64) for rows in samples for values in rows.values()]

    def _replayed(
        self, tensors: Mapping[str, Array], powers: dict[_Place, float], advance: Callable[[], None]
    ) -> Iterator[tuple[_Place, Array]]:
        """(place, error) of every form's replay on the recorded tensors; fills in the errors' `powers`."""
        for form in self.stand.replays:
            found = form.run.run({name: tensors[source] for name, source in form.replay.feeds.items()})
            advance()
            for part, results in zip(form.parts, form.replay.results, strict=True):
                for output, name in results.items():
                    error = found.pop(output) - tensors[name]  # type: ignore[operator]
                    place = form.name, part.group, name
                    powers[place] = _energy(error)
                    self.errors[place] = self.errors.get(place, 0.0) + powers[place]
                    yield place, error

    def result(self) -> tuple[GroupSensitivity, ...]:
        """Every group of every form, the most harmful first."""
        shares = combine(self.moves, self.witnesses)
        finite = self.moves[np.isfinite(self.moves)]
        whole = float(finite.sum()) / max(float(self.signal.sum()), _TINY) if finite.size else 0.0
        local = np.array(
            [
                sum(self.errors[unit.form, unit.part.group, name] for name in unit.part.outputs)
                for unit in self.stand.units
            ]
        )
        powers = interpolate(shares * whole, local)
        gains = {
            name: _gain(float(power), float(error))
            for unit, power, error in zip(self.stand.units, powers, local, strict=True)
            for name in unit.part.outputs
        }
        found = []
        for form in self.stand.replays:
            for part in form.parts:
                error = sum(self.errors[form.name, part.group, name] for name in part.outputs)
                power = sum(
                    gains.get(name, 0.0) * self.errors[form.name, part.group, name] for name in part.outputs
                )
                energy = sum(self.energies.get(name, 0.0) for name in part.outputs)
                found.append(
                    GroupSensitivity(
                        group=part.group,
                        form=form.name,
                        l2=float(np.sqrt(power)) if np.isfinite(power) else None,
                        local_l2=float(np.sqrt(error / energy))
                        if energy > 0 and np.isfinite(error)
                        else None,
                    )
                )
        return tuple(sorted(found, key=lambda item: -(np.inf if item.l2 is None else item.l2)))


def _gain(power: float, error: float) -> float:
    """By how much a squared error grows on its way to the answers."""
    if not (np.isfinite(power) and np.isfinite(error)):
        return float("inf")
    return power / error if error > 0 else 0.0


def _root(power: float) -> float | None:
    return float(np.sqrt(power)) if np.isfinite(power) else None


def _energy(values: Array | Floats) -> float:
    """Sum of squares, in float64; not by BLAS, whose threads cost more than this does."""
    return float(np.square(values, dtype=np.float64).sum())


def _rough_energy(values: Array, reference: Array) -> float:
    """Sum of squares of a difference, in float32: of it only the logarithm counts."""
    difference = np.subtract(values, reference, dtype=np.float32)
    return float(np.square(difference, out=difference).sum())
