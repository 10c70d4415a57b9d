"""Pruning a model to a budget: `open_pruner` looks once, `Pruner.cut` may be asked again and again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.errors import RecipeError
from ...graph.model import Model
from .branches import Branch, closing_layer, drop_branches
from .coupling import Coupling, Group, couple
from .curves import Curve, curves_of
from .cut import Removed, cut, marked, mask
from .effect import OutputError
from .elimination import RIDGE
from .readers import layer_of
from .repair import Fitted, repair
from .report import Importance, Pruning, pruned_groups, reasons_kept, repaired_layers
from .widths import Cost, choose_widths, widths_of
from .work import Products, macs_of, weight_bytes_of

if TYPE_CHECKING:
    from ...calibration.data import CalibrationData

Told = Callable[[int, int], None]
"""Called with (steps done, steps)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruner:
    """A model with everything that is known about cutting it.

    Attributes:
        coupling: of the model.
        curves: of every group that may be cut.
        macs: multiply-accumulates by widths.
        weights: bytes of the weights by widths.
        alignment: channel counts that fill the target's vectors.
        importance: how units were ranked.
    """

    coupling: Coupling
    curves: tuple[Curve, ...]
    macs: Products
    weights: Products
    alignment: int
    importance: Importance

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that may be cut."""
        return tuple(curve.group for curve in self.curves)

    def chosen(self, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The places of the units that go, by the group's own name; what `pinned_pruner` takes."""
        names = dict(zip(map(id, self.coupling.prunable), group_names(self.coupling.prunable), strict=True))
        return {
            names[id(curve.group)]: item.removed
            for curve, item in zip(self.curves, pruned_groups(self.curves, widths), strict=True)
            if item.removed
        }

    @property
    def units(self) -> list[int]:
        """How many units each group has."""
        return [len(group.units) for group in self.groups]

    def least(self, cost: Cost) -> float:
        """The least cost that any cut can reach."""
        floor = [widths_of(curve, self.alignment)[0] for curve in self.curves]
        return cost.total(self.removed(floor))

    def widths(self, cost: Cost, budget: float) -> list[int] | None:
        """The widths of least loss within a budget, None where it cannot be met."""
        return choose_widths(self.curves, cost, budget, alignment=self.alignment)

    def removed(self, widths: Sequence[int]) -> list[int]:
        """How many units of each group go."""
        return [count - left for count, left in zip(self.units, widths, strict=True)]

    def cut(self, widths: Sequence[int]) -> Model:
        """The model with these widths, its weights as they were."""
        return self._cut(widths)[0]

    def _cut(self, widths: Sequence[int]) -> tuple[Model, dict[str, Branch]]:
        """The cut model, and the branches that went as a whole, by the layer that ended them."""
        model = cut(self.coupling, self._removed(widths))
        names = [
            str(curve.group.readers[0].node.name)
            for curve, left in zip(self.curves, widths, strict=True)
            if not left
        ]
        return model, drop_branches(model, names)

    def masked(self, widths: Sequence[int]) -> Model:
        """The whole model in which the same units count for nothing: its answers are the cut's."""
        gone = [unit for curve, left in zip(self.curves, widths, strict=True) for unit in curve.removed(left)]
        return mask(self.coupling, marked(self.coupling, gone))

    def _removed(self, widths: Sequence[int]) -> Removed:
        """Flags for what goes; of a branch that goes as a whole one unit is left until it is dropped."""
        gone = [
            unit
            for curve, left in zip(self.curves, widths, strict=True)
            for unit in curve.removed(max(left, 1))
        ]
        return marked(self.coupling, gone)

    def touched(self, widths: Sequence[int]) -> int:
        """How many layers a repair fits."""
        return len(self._touched(widths))

    def repaired(
        self,
        widths: Sequence[int],
        data: CalibrationData | None,
        *,
        ridge: float = RIDGE,
        thorough: bool = False,
        threads: int = 1,
        told: Told | None = None,
    ) -> tuple[Model, Pruning]:
        """The model with these widths, every layer that lost inputs fitted anew, and what was done.

        Args:
            widths: units that each group has left.
            data: calibration samples; None leaves the weights as they are.
            ridge: see `elimination.solve`.
            thorough: see `repair.repair`.
            threads: of the runtime.
            told: hears of progress.
        """
        model, dropped = self._cut(widths)
        fitted: list[Fitted] = []
        output_error = None
        if data is not None:
            fitted = repair(
                self.coupling.model,
                model,
                self._touched(widths),
                data,
                dropped=dropped,
                ridge=ridge,
                thorough=thorough,
                threads=threads,
                told=told,
            )
            output_error = OutputError(self.coupling.model, data, threads=threads).of(model)
        gone = self.removed(widths)
        none = [0] * len(gone)
        return model, Pruning(
            importance=self.importance,
            macs_before=round(self.macs.total(none)),
            macs_after=round(self.macs.total(gone)),
            weight_bytes_before=round(self.weights.total(none)),
            weight_bytes_after=round(self.weights.total(gone)),
            groups=pruned_groups(self.curves, widths),
            repaired=repaired_layers(fitted),
            unrepaired=() if data is None else self._unfittable(widths),
            samples=0 if data is None else len(data),
            output_error=output_error,
            kept=reasons_kept(self.coupling),
        )

    def _touched(self, widths: Sequence[int]) -> dict[str, npt.NDArray[np.int64] | None]:
        """The layers that read cut groups, and those behind the first of them, in graph order.

        With each the places of its outputs that are left, where some go.
        """
        place = {node: index for index, node in enumerate(self.coupling.model.graph)}
        cut_readers = {
            use.node
            for curve, left in zip(self.curves, widths, strict=True)
            if left < len(curve.group.units)
            for use in curve.group.readers
        }
        every = {use.node for curve in self.curves for use in curve.group.readers}
        first = min((place[node] for node in cut_readers), default=len(place))
        chosen = sorted((node for node in every if place[node] >= first), key=place.__getitem__)
        removed = self._removed(widths)
        return {str(node.name): self._outputs_left(node, removed) for node in chosen}

    def _unfittable(self, widths: Sequence[int]) -> tuple[str, ...]:
        """The layers that lose inputs and cannot be fitted."""
        return tuple(
            dict.fromkeys(
                str(use.node.name)
                for curve, left in zip(self.curves, widths, strict=True)
                if left < len(curve.group.units)
                for use in curve.group.readers
                if layer_of(use.node) is None
            )
        )

    def _outputs_left(self, node: ir.Node, removed: Removed) -> npt.NDArray[np.int64] | None:
        axes = self.coupling.tracer.axes[node.outputs[0]]
        space = axes[1] if node.op_type == "Conv" else axes[-1]
        if space is None or not removed[self.coupling.classes.of(space)].any():
            return None
        return self.coupling.classes.kept(space, removed)


def open_pruner(
    model: Model,
    data: CalibrationData | None,
    sizes: Mapping[str, int],
    *,
    alignment: int = 1,
    importance: Importance = "obs",
    include: Callable[[Group], bool] | None = None,
    threads: int = 1,
    told: Told | None = None,
) -> Pruner:
    """Find out what may be cut from a model and what that would lose.

    Args:
        model: cleaned up, with shapes inferred; not changed.
        data: calibration samples without labels; without any, weights are ranked by magnitude.
        sizes: named dynamic axis -> its size, for counting.
        alignment: channel counts that fill the target's vectors.
        importance: how units are ranked.
        include: which groups may be cut; by default all but streams that layers add to.
        threads: of the runtime.
        told: hears of progress.
    """
    coupling = couple(model)
    chosen = include or _is_no_stream
    groups = [group for group in coupling.prunable if chosen(group)]
    ranked: Importance = importance if data is not None or importance == "batchnorm" else "magnitude"
    effect = None if data is None else OutputError(model, data, threads=threads)
    curves = curves_of(
        coupling,
        groups,
        data,
        ranked,
        effect=effect,
        threads=threads,
        progress=told,
    )
    return Pruner(
        coupling=coupling,
        curves=tuple(curves),
        macs=macs_of(coupling, groups, sizes),
        weights=weight_bytes_of(coupling, groups),
        alignment=alignment,
        importance=ranked,
    )


def pinned_pruner(
    model: Model, removed: Mapping[str, Sequence[int]], sizes: Mapping[str, int], *, importance: Importance
) -> tuple[Pruner, list[int]]:
    """The pruner that cuts what an earlier one chose, and its widths: nothing is ranked or measured.

    Args:
        model: cleaned up, with shapes inferred; not changed.
        removed: group as `Pruner.chosen` names it -> places of the units that go.
        sizes: named dynamic axis -> its size, for counting.
        importance: how the earlier one ranked units.

    Raises:
        RecipeError: if the model has no such group, or not so many units.
    """
    coupling = couple(model)
    names = group_names(coupling.prunable)
    unknown = sorted(set(removed) - set(names))
    curves, widths = [], []
    for name, group in zip(names, coupling.prunable, strict=True):
        gone = sorted(set(removed.get(name, ())))
        if gone and not 0 <= gone[0] <= gone[-1] < len(group.units):
            unknown.append(name)
            continue
        if name in removed or group.kind != "stream":
            stay = [place for place in range(len(group.units)) if place not in set(gone)]
            order = tuple(group.units[place] for place in (*gone, *stay))
            may_go = closing_layer(coupling, group) is not None
            if not (stay or may_go):
                unknown.append(name)
            errors = np.zeros(len(order) + 1)
            curves.append(Curve(group=group, order=order, errors=errors, fitted=False, may_go=may_go))
            widths.append(len(stay))
    if unknown:
        raise RecipeError(
            "the recipe's pinned cuts do not fit this model",
            where=f"pins.pruned.{unknown[0]}",
            remedy="remove the [pins] table to let the choices be made anew",
        )
    groups = [curve.group for curve in curves]
    made = Pruner(
        coupling=coupling,
        curves=tuple(curves),
        macs=macs_of(coupling, groups, sizes),
        weights=weight_bytes_of(coupling, groups),
        alignment=1,
        importance=importance,
    )
    return made, widths


def group_names(groups: Sequence[Group]) -> list[str]:
    """A name of its own for every group: the weight that makes it, numbered where that makes several."""
    seen: dict[str, int] = {}
    names = []
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        names.append(group.name if seen[group.name] == 1 else f"{group.name}#{seen[group.name]}")
    return names


def _is_no_stream(group: Group) -> bool:
    return group.kind != "stream"
