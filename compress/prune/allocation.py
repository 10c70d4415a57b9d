"""How much goes where: the widths of least error within a budget, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_STEPS = 4096


class Choices(NamedTuple):
    """What one group may become.

    Attributes:
        widths: how many units are left, shape (choices,).
        errors: what that loses, shape (choices,).
        costs: what that costs, shape (choices,), in the unit of the budget.
    """

    widths: npt.NDArray[np.int64]
    errors: npt.NDArray[np.float64]
    costs: npt.NDArray[np.float64]


def allocate(groups: Sequence[Choices], budget: float) -> list[int] | None:
    """One choice for each group: the least sum of errors whose costs stay within the budget.

    Costs are rounded up to 1/4096 of the budget, so the budget is never passed.

    Returns:
        The width of each group; None if even the cheapest choices pass the budget.

    Source: the knapsack of Kurtić et al. 2023, arXiv:2302.04089, §3.2 (ZipLM's structured search).
    """
    if budget <= 0 or sum(item.costs.min() for item in groups) > budget:
        return None
    unit = budget / _STEPS
    # The cheapest choices are rounded down, else rounding alone could leave no answer.
    best = np.zeros(_STEPS + 1)
    chosen: list[npt.NDArray[np.int64]] = []
    scaled = [_rounded(item.costs, unit) for item in groups]
    for item, costs in zip(groups, scaled, strict=True):
        table = np.full((len(costs), _STEPS + 1), np.inf)
        for place, (cost, loss) in enumerate(zip(costs.tolist(), item.errors.tolist(), strict=True)):
            if cost <= _STEPS:
                table[place, cost:] = best[: _STEPS + 1 - cost] + loss
        chosen.append(np.argmin(table, axis=0))
        best = np.min(table, axis=0)
    if not np.isfinite(best[_STEPS]):
        return None
    left, result = _STEPS, list[int]()
    for item, costs, picks in zip(reversed(groups), reversed(scaled), reversed(chosen), strict=True):
        pick = int(picks[left])
        result.append(int(item.widths[pick]))
        left -= int(costs[pick])
    return result[::-1]


def _rounded(costs: npt.NDArray[np.float64], unit: float) -> npt.NDArray[np.int64]:
    steps = np.ceil(costs / unit - 1e-9).astype(np.int64)
    cheapest = costs == costs.min()
    steps[cheapest] = np.floor(costs[cheapest] / unit + 1e-9).astype(np.int64)
    return steps
