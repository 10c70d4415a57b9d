"""From curves and a budget to the width of every group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .allocation import Choices, allocate
from .curves import Curve

_ROUNDS = 8
_FINEST = 8
"""A group has at least so many widths to choose from, where it has so many units."""


class Cost(Protocol):
    """What a model costs, as a function of how many units of each group are gone (`work.Products`)."""

    def total(self, removed: Sequence[int]) -> float:
        """The cost when so many units of each group are gone."""

    def of_group(self, group: int, removed: Sequence[int], counts: Sequence[int]) -> npt.NDArray[np.float64]:
        """The part that one group changes, when `counts` units of it are gone and `removed` of the others."""


def aligned_widths(units: int, alignment: int) -> list[int]:
    """The widths that a group may have: multiples of the alignment, of a finer one where it is narrow.

    Args:
        units: the width that it has.
        alignment: counts that are multiples of this fill a kernel's vectors.
    """
    step = 1
    while step * 2 <= alignment and step * 2 * _FINEST <= units:
        step *= 2
    return sorted({*range(step, units + 1, step), units})


def widths_of(curve: Curve, alignment: int) -> list[int]:
    """The widths that a group may have; none at all where the branch that it makes can go."""
    return [0] * curve.may_go + aligned_widths(len(curve.group.units), alignment)


def choose_widths(
    curves: Sequence[Curve], cost: Cost, budget: float, *, alignment: int = 1
) -> list[int] | None:
    """The widths that lose least within a budget.

    Where a layer lies between two groups its cost is a product of their widths: the costs of a group are
    taken with the others as they were chosen before, until nothing changes.

    Args:
        curves: of every group.
        cost: what is bounded.
        budget: its bound, in the same unit.
        alignment: see `aligned_widths`.

    Returns:
        How many units each group has left; None if the budget cannot be met.
    """
    units = [len(curve.group.units) for curve in curves]
    options = [widths_of(curve, alignment) for curve in curves]
    losses = [curve.losses() for curve in curves]
    floor = [count - widths[0] for count, widths in zip(units, options, strict=True)]
    if cost.total(floor) > budget:
        return None
    whole, least = cost.total([0] * len(units)), cost.total(floor)
    part = min(max((whole - budget) / max(whole - least, 1e-30), 0.0), 1.0)
    removed = [round(part * most) for most in floor]
    best: tuple[float, list[int]] | None = None
    bound = budget
    for _ in range(_ROUNDS):
        widths = _one_round(options, losses, units, cost, removed=removed, budget=bound)
        if widths is None:
            break
        new = [count - width for count, width in zip(units, widths, strict=True)]
        actual = cost.total(new)
        loss = sum(float(own[width]) for own, width in zip(losses, widths, strict=True))
        if actual <= budget * (1 + 1e-9):
            if best is None or loss < best[0]:
                best = loss, widths
            if new == removed:
                break
        else:
            # The linear picture promised more than there is: ask it for less.
            bound *= budget / actual
        removed = new
    if best is not None:
        return best[1]
    return _greedy(options, losses, units, cost, budget)


def _one_round(
    options: Sequence[Sequence[int]],
    losses: Sequence[npt.NDArray[np.float64]],
    units: Sequence[int],
    cost: Cost,
    *,
    removed: Sequence[int],
    budget: float,
) -> list[int] | None:
    """The best widths in the picture in which every group's cost is its own."""
    choices, own = [], 0.0
    for index, widths in enumerate(options):
        counts = [units[index] - width for width in widths]
        costs = cost.of_group(index, removed, [*counts, removed[index]])
        own += float(costs[-1])
        choices.append(Choices(np.array(widths), losses[index][list(widths)], costs[:-1]))
    return allocate(choices, budget - (cost.total(removed) - own))


def _greedy(
    options: Sequence[Sequence[int]],
    losses: Sequence[npt.NDArray[np.float64]],
    units: Sequence[int],
    cost: Cost,
    budget: float,
) -> list[int]:
    """One step at a time, always the least loss for what it saves; ends at the narrowest widths."""
    at = [len(widths) - 1 for widths in options]

    def removed() -> list[int]:
        return [count - widths[place] for count, widths, place in zip(units, options, at, strict=True)]

    while cost.total(removed()) > budget:
        now = removed()
        rates = []
        for index, place in enumerate(at):
            if place == 0:
                continue
            saved = cost.of_group(index, now, [now[index], units[index] - options[index][place - 1]])
            worse = losses[index][options[index][place - 1]] - losses[index][options[index][place]]
            rates.append((float(worse) / max(float(saved[0] - saved[1]), 1e-30), index))
        at[min(rates)[1]] -= 1
    return [widths[place] for widths, place in zip(options, at, strict=True)]
