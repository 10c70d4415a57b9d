"""Which groups go back to float: a prediction of the drift of any plan, corrected by what is measured.

Groups disturb the answers almost independently, so that the squared drift of a plan is predicted as
the sum of its groups' squared sensitivities. Only ratios of it are used: one measured plan gives
the scale, and every further one corrects it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from ..calibration.limits import LimitResult
from ..compress.operands import TABLE_OPS
from ..compress.plan import Decision, Plan

# How a metric grows with the squared error of the answers: as its power. Shares of answers that
# change, and what follows from them, grow like the error itself.
_POWERS = {"cosine": 1.0, "kl": 1.0}
_OTHER_POWER = 0.5
# A prediction is a few per cent off: aim a little inside.
_MARGIN = 0.9
# An interval may cost this much of the squared error that the point estimate would allow.
_INTERVAL_PART = 0.5
# After so many misses the prediction is not trusted: the allowance is halved each time.
_TRUSTED_MISSES = 3
_SIZE_WEIGHT = 0.05
# An operator without a weight (Add, pooling…) has no multiply-accumulates, but in float it also breaks the
# chain of integer kernels: taken as this part of the mean group that has some.
_CONNECTING_PART = 0.25
_LEAST_COST = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """A quantized group as the search sees it.

    Attributes:
        name: as in the plan.
        power: squared sensitivity; infinite where it spoils the answers altogether.
        cost: what is lost if it goes back to float: its share of the quantized work, and a little
            for its share of the weights.
    """

    name: str
    power: float
    cost: float


def groups_of(plan: Plan, sensitivities: Mapping[str, float], weight_bytes: Mapping[str, int]) -> list[Group]:
    """The quantized groups of a plan, in its order.

    Args:
        plan: has the multiply-accumulates, which stand for the time that a group saves.
        sensitivities: group -> relative L2 change of the answers.
        weight_bytes: weight -> bytes in float.
    """
    members: dict[str, list[Decision]] = {name: [] for name in plan.groups}
    for item in plan.decisions:
        if item.form != "float":
            members[item.group].append(item)
    macs = {name: float(sum(item.macs or 0 for item in items)) for name, items in members.items()}
    working = [count for count in macs.values() if count]
    for name, items in members.items():
        if not macs[name] and any(item.op not in TABLE_OPS for item in items):
            macs[name] = _CONNECTING_PART * sum(working) / max(len(working), 1)
    size = {
        name: sum(weight_bytes.get(weight, 0) for weight in {item.weight for item in items if item.weight})
        for name, items in members.items()
    }
    work, weights = max(sum(macs.values()), 1.0), max(sum(size.values()), 1)
    return [
        Group(
            name=name,
            power=sensitivities[name] ** 2,
            cost=macs[name] / work + _SIZE_WEIGHT * size[name] / weights + _LEAST_COST,
        )
        for name in members
    ]


def cheapest_reverts(groups: Sequence[Group], allowed: float) -> frozenset[str]:
    """Groups to take to float so that the squared drift left is at most `allowed`, at little cost.

    Greedily by drift per cost, then those that turn out not to be needed are put back, the dearest
    first (the greedy rule for covering problems; Chvatal 1979, Mathematics of Operations Research 4).

    Args:
        groups: all that are quantized.
        allowed: squared drift, in the unit of the groups' powers; 0 or less takes all.
    """
    if allowed <= 0:
        return frozenset(group.name for group in groups)
    taken: list[Group] = []
    left = math.fsum(group.power for group in groups if math.isfinite(group.power))
    spoilt = [group for group in groups if not math.isfinite(group.power)]
    order = sorted(groups, key=lambda group: (-group.power / group.cost, group.cost))
    for group in order:
        if left <= allowed:
            break
        if math.isfinite(group.power):
            taken.append(group)
            left -= group.power
    needed = {group.name: group for group in taken}
    for group in sorted(taken, key=lambda group: -group.cost):
        if left + group.power <= allowed:
            del needed[group.name]
            left += group.power
    return frozenset(needed) | {group.name for group in spoilt}


def power_left(groups: Iterable[Group], reverted: Collection[str]) -> float:
    """The predicted squared drift with some groups in float."""
    return math.fsum(group.power for group in groups if group.name not in reverted)


def cost_of(groups: Iterable[Group], reverted: Collection[str]) -> float:
    """What is lost with some groups in float."""
    return math.fsum(group.cost for group in groups if group.name in reverted)


def room(results: Sequence[LimitResult]) -> float:
    """By which factor the squared error may change for all limits to hold, with a margin.

    The limit has to hold for the upper end of the interval, as long as that leaves at least half of
    what the measured value itself would allow: an interval of few samples may be wide of any limit.

    Args:
        results: of one measured plan.

    Returns:
        below 1 where a limit does not hold; 0 where a value is not finite or the limit is 0.
    """
    return min((_room(result) for result in results), default=math.inf)


def _room(result: LimitResult) -> float:
    if result.value is None:
        return math.inf if result.met else 0.0
    point = _factor(result.metric, result.value, result.limit)
    if result.interval is None:
        return _MARGIN * point
    worst = result.interval[0] if result.metric == "sqnr" else result.interval[1]
    inside = _factor(result.metric, worst, result.limit)
    return _MARGIN * max(inside, _INTERVAL_PART * point)


def _factor(metric: str, value: float, limit: float) -> float:
    if metric == "sqnr":
        return 10 ** ((value - limit) / 10)
    if value <= 0:
        return math.inf
    return float((limit / value) ** (1 / _POWERS.get(metric, _OTHER_POWER)))


@dataclasses.dataclass(kw_only=True)
class Search:
    """The plans tried so far, by the groups that they have in float; proposes the next one.

    Attributes:
        groups: all that can go back.
        most: full measurements that a search takes where one plan holds already.
    """

    groups: Sequence[Group]
    most: int = 3
    _tried: dict[frozenset[str], tuple[bool, bool, float]] = dataclasses.field(default_factory=dict)

    def learn(self, reverted: Collection[str], results: Sequence[LimitResult]) -> None:
        """Take in what one plan measured."""
        chosen = frozenset(reverted)
        met = all(result.met for result in results)
        inside = met and not any(result.straddles for result in results)
        left, factor = power_left(self.groups, chosen), room(results)
        self._tried[chosen] = met, inside, math.inf if math.isinf(factor) else left * factor

    @property
    def best(self) -> frozenset[str] | None:
        """Of the plans that hold: one whose intervals do, too, if there is one; then the cheapest."""
        held = [
            (not inside, cost_of(self.groups, chosen), chosen)
            for chosen, (met, inside, _) in self._tried.items()
            if met
        ]
        return min(held, key=lambda item: item[:2])[2] if held else None

    def next(self) -> frozenset[str] | None:
        """The groups to take back in the next plan to measure; None where the search is over."""
        everything = frozenset(group.name for group in self.groups)
        best = self.best
        if best is None:
            return self._stricter(everything)
        if len(self._tried) >= self.most or not best:
            return None
        return self._looser(best)

    def _stricter(self, everything: frozenset[str]) -> frozenset[str] | None:
        if everything in self._tried:
            return None
        misses = len(self._tried)
        least = min(power_left(self.groups, chosen) for chosen in self._tried)
        allowed = min(_MARGIN * least, *(target for _, _, target in self._tried.values()))
        if misses > _TRUSTED_MISSES:
            allowed = min(allowed, least / 2 ** (misses - _TRUSTED_MISSES))
        found = cheapest_reverts(self.groups, allowed)
        return everything if found in self._tried else found

    def _looser(self, best: frozenset[str]) -> frozenset[str] | None:
        """A cheaper plan between the best one and the ones that failed, if one is predicted to hold."""
        failed = [power_left(self.groups, chosen) for chosen, (met, _, _) in self._tried.items() if not met]
        held = power_left(self.groups, best)
        allowed = self._tried[best][2]
        if failed and allowed >= min(failed):
            allowed = math.sqrt(max(held, 0.0) * min(failed))
        found = cheapest_reverts(self.groups, allowed)
        gain = cost_of(self.groups, best) - cost_of(self.groups, found)
        return None if found in self._tried or gain <= _LEAST_COST * len(self.groups) else found
