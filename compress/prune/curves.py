"""What each group loses when it has fewer units, and in which order they go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .branches import closing_layer
from .coupling import Coupling, Group
from .cut import marked, mask
from .elimination import Moments, removal, solve
from .observe import Asked, Progress, moments_of, own_moments
from .readers import Layer, layer_of, unit_rows
from .report import Importance
from .tracer import WeightUse

if TYPE_CHECKING:
    from ...calibration.data import CalibrationData
    from .effect import OutputError

Trial = Callable[[Sequence[int]], float]
"""Classes that go -> the error of the model's outputs in parts of their variance."""
_MOMENT_BYTES = 256 << 20
_FEW_UNITS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """How a group shrinks.

    Attributes:
        group: the group.
        order: its units (classes), the first to go first.
        errors: error of the readers' outputs in parts of their energy, when that many units are left;
            shape (units + 1,). With `magnitude` and `batchnorm` it is the energy of what went.
        fitted: whether every reader can be fitted by least squares.
        may_go: whether all units may go, and with them the residual branch that they make.
        effects: error of the model's outputs in parts of their energy when this group alone has so many
            units left, as far as that was measured.
    """

    group: Group
    order: tuple[int, ...]
    errors: npt.NDArray[np.float64]
    fitted: bool
    may_go: bool = False
    effects: dict[int, float] = dataclasses.field(default_factory=dict)

    def losses(self) -> npt.NDArray[np.float64]:
        """`errors` as the model's output shows them: times what was measured at some widths."""
        points = sorted(
            (left, np.log(max(effect, 1e-12) / max(self.errors[left], 1e-12)))
            for left, effect in self.effects.items()
        )
        if not points:
            return self.errors
        widths, gains = zip(*points, strict=True)
        return np.asarray(self.errors * np.exp(np.interp(np.arange(len(self.errors)), widths, gains)))

    def removed(self, left: int) -> tuple[int, ...]:
        """The units that go when so many are left."""
        return self.order[: len(self.order) - left]


def curves_of(
    coupling: Coupling,
    groups: Sequence[Group],
    data: CalibrationData | None,
    importance: Importance,
    *,
    effect: OutputError | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> list[Curve]:
    """The curve of every group.

    Args:
        coupling: the traced graph.
        groups: prunable ones.
        data: calibration samples; without any, magnitude is all there is.
        importance: `obs`: what is lost after the others took over; `activation`: mean square of what a unit
            puts into its readers; `magnitude`: L2 norm of its weights; `batchnorm`: its scale.
        effect: measures what changed weights do to the model's outputs; None: the readers' own errors count.
        threads: of the runtime.
        progress: called with (samples run, samples to run).
    """
    layers = {id(use): layer_of(use.node) for group in groups for use in group.readers}
    curves: dict[int, Curve] = {}
    waiting = list[int]()
    for index, group in enumerate(groups):
        fits = all(layers[id(use)] is not None and _is_even(coupling, use, group) for use in group.readers)
        if data is not None and fits and importance in ("obs", "activation"):
            waiting.append(index)
            continue
        curves[index] = _by_weights(coupling, group, importance)
        if effect is not None:
            curves[index] = _with_effects(
                curves[index], lambda gone: effect.of(mask(coupling, marked(coupling, gone)))
            )
    if data is not None and waiting:
        parts = _parts([(index, groups[index], layers) for index in waiting])
        for number, part in enumerate(parts):
            advance = _nested(progress, number, len(parts))
            for index, curve in _by_moments(
                coupling, part, data, importance, effect=effect, threads=threads, progress=advance
            ):
                curves[index] = curve
    return [curves[index] for index in range(len(groups))]


def _is_even(coupling: Coupling, use: WeightUse, group: Group) -> bool:
    """Whether every unit of a group takes equally many of the places that a layer sums over."""
    labels = coupling.classes.of(summed_axis(use))
    counts = np.bincount(labels, minlength=coupling.classes.count)[list(group.units)]
    return bool((counts == counts[0]).all())


def _nested(progress: Progress | None, number: int, parts: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, parts * total)


Waiting = tuple[int, Group, dict[int, Layer | None]]


def _parts(waiting: Sequence[Waiting]) -> list[list[Waiting]]:
    """Groups in order, as many at a time as the memory for their moments allows."""
    parts: list[list[Waiting]] = []
    used = 0.0
    for item in waiting:
        size = 0.0
        for use in item[1].readers:
            layer = item[2][id(use)]
            assert layer is not None
            size += 8.0 * float(layer.rows().shape[1]) ** 2 * layer.rows().shape[0]
        if not parts or used + size > _MOMENT_BYTES:
            parts.append([])
            used = 0.0
        parts[-1].append(item)
        used += size
    return parts


def _by_moments(
    coupling: Coupling,
    part: Sequence[Waiting],
    data: CalibrationData,
    importance: Importance,
    *,
    effect: OutputError | None,
    threads: int,
    progress: Progress | None,
) -> list[tuple[int, Curve]]:
    every: dict[int, Layer] = {}
    for _, group, layers in part:
        for use in group.readers:
            layer = layers[id(use)]
            assert layer is not None
            every[id(use)] = layer
    asked = [Asked(layer, str(layer.total.name)) for layer in every.values()]
    model = coupling.model
    found = moments_of(model, model, asked, data, threads=threads, progress=progress)
    known = {
        key: own_moments(moments, layer.rows())
        for (key, layer), moments in zip(every.items(), found, strict=True)
    }
    result = []
    for index, group, _ in part:
        moments = [known[id(use)] for use in group.readers]
        rows = [
            unit_rows(every[id(use)], coupling.classes.of(summed_axis(use)), group.units)
            for use in group.readers
        ]
        together = max(1, len(group.units) // _FEW_UNITS * 4)
        if importance == "obs":
            done = removal(moments, rows, together=together)
            order = tuple(group.units[place] for place in done.order)
            curve = Curve(
                group=group,
                order=order,
                errors=done.errors / len(moments),
                fitted=True,
                may_go=closing_layer(coupling, group) is not None,
            )
        else:
            curve = _by_activation(group, moments, rows)
        if effect is not None:
            curve = _with_effects(curve, _refitted(coupling, group, every, known, effect))
        result.append((index, curve))
    return result


def _refitted(
    coupling: Coupling,
    group: Group,
    layers: dict[int, Layer],
    known: dict[int, Moments],
    effect: OutputError,
) -> Trial:
    """Tries a group without some units, its readers fitted to what is left."""

    def of(gone: Sequence[int]) -> float:
        return effect(
            {
                layers[id(use)]: fitted_rows(coupling, use, layers[id(use)], known[id(use)], set(gone))
                for use in group.readers
            }
        )

    return of


def _with_effects(curve: Curve, trial: Trial) -> Curve:
    """The curve with what half, a quarter and the fewest of the units do to the model's outputs."""
    count = len(curve.group.units)
    found = {}
    for left in sorted({0 if curve.may_go else 1, max(count // 4, 1), max(count // 2, 1)}):
        if left == count:
            continue
        found[left] = trial(curve.removed(left))
    return dataclasses.replace(curve, effects=found)


def _by_activation(
    group: Group, moments: Sequence[Moments], rows: Sequence[Sequence[npt.NDArray[np.int64]]]
) -> Curve:
    """Ranked by the mean square of what each unit puts in; the error is what is left after a fit."""
    scores = np.zeros(len(group.units))
    for own, places in zip(moments, rows, strict=True):
        diagonal = np.diagonal(own.gram, axis1=1, axis2=2).mean(axis=0)
        scores += np.array([diagonal[unit].sum() for unit in places]) / max(diagonal.sum(), 1e-30)
    ranked = np.argsort(scores, kind="stable")
    lost = np.concatenate([[0.0], np.cumsum(scores[ranked])])[::-1]
    order = tuple(group.units[place] for place in ranked.tolist())
    return Curve(group=group, order=order, errors=lost / len(moments), fitted=True)


def _by_weights(coupling: Coupling, group: Group, importance: Importance) -> Curve:
    """Ranked by the weights alone."""
    scores = np.zeros(len(group.units))
    uses: list[tuple[WeightUse, int]] = []
    if importance == "batchnorm":
        uses = _scales(coupling, group)
    if not uses:
        uses = [
            (use, place)
            for use in (*group.makers, *group.readers)
            for place in _axes_of(coupling, use, group)
        ]
    for use, place in uses:
        tensor = use.value.const_value
        assert tensor is not None
        axis = use.axes[place]
        assert axis is not None
        array = np.asarray(tensor.numpy(), np.float64)
        energy = np.square(array).sum(axis=tuple(other for other in range(array.ndim) if other != place))
        labels = coupling.classes.of(axis)
        sums = np.bincount(labels, weights=energy, minlength=coupling.classes.count)[list(group.units)]
        scores += sums / max(float(sums.sum()), 1e-30)
    ranked = np.argsort(scores, kind="stable")
    lost = np.concatenate([[0.0], np.cumsum(scores[ranked])])[::-1] / max(len(uses), 1)
    order = tuple(group.units[place] for place in ranked.tolist())
    return Curve(group=group, order=order, errors=lost, fitted=False)


def _scales(coupling: Coupling, group: Group) -> list[tuple[WeightUse, int]]:
    """The scales of the batch normalisations that run over a group."""
    members = set(group.units)
    return [
        (use, 0)
        for use in coupling.tracer.uses.values()
        if use.node.op_type == "BatchNormalization"
        and use.position == 1
        and use.axes[0] is not None
        and members <= set(coupling.classes.of(use.axes[0]).tolist())
    ]


def _axes_of(coupling: Coupling, use: WeightUse, group: Group) -> list[int]:
    """The axes of a weight that hold the units of a group."""
    return [
        place
        for place, axis in enumerate(use.axes)
        if axis is not None and group.units[0] in coupling.classes.of(axis)
    ]


def summed_axis(use: WeightUse) -> int:
    """The space of the axis that a reader sums over."""
    axis = use.axes[use.roles.index("in")]
    assert axis is not None
    return axis


def fitted_rows(
    coupling: Coupling, use: WeightUse, layer: Layer, moments: Moments, gone: set[int]
) -> npt.NDArray[np.float64]:
    """Weights of a layer with some units gone and the others fitted; zero where the gone ones were."""
    labels = coupling.classes.of(summed_axis(use))
    taps = 1 if layer.window is None else int(np.prod(layer.window.kernel))
    stay = np.repeat(~np.isin(labels, list(gone)), taps)
    kept = np.flatnonzero(stay)
    solved = solve(moments, kept)
    full = np.zeros((moments.gram.shape[0], moments.gram.shape[1], moments.cross.shape[2]))
    places = np.append(kept, moments.gram.shape[1] - 1) if moments.constant else kept
    full[:, places] = solved
    return full
