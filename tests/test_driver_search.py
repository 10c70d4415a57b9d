"""The search for what goes back to float: against brute force, and on simulated models."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from edgepress.calibration.limits import LimitResult
from edgepress.compress.plan import Decision, Plan
from edgepress.driver.search import Group, Search, cheapest_reverts, cost_of, groups_of, power_left, room
from hypothesis import given
from hypothesis import strategies as st

numbers = st.floats(1e-6, 10)
several = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=7).map(
    lambda pairs: [
        Group(name=f"g{place}", power=power, cost=cost) for place, (power, cost) in enumerate(pairs)
    ]
)


def result(value, limit, *, metric="l2", interval=None):
    met = value >= limit if metric == "sqnr" else value <= limit
    straddles = interval is not None and interval[0] < limit < interval[1]
    return LimitResult(
        metric=metric, limit=limit, value=value, met=met, reason="", interval=interval, straddles=straddles
    )


@given(several, st.floats(0, 1))
def test_what_goes_back_is_enough_and_nothing_of_it_superfluous(groups, fraction):
    allowed = fraction * power_left(groups, ())
    taken = cheapest_reverts(groups, allowed)
    slack = 1e-9 * power_left(groups, ())
    assert power_left(groups, taken) <= allowed + slack or len(taken) == len(groups)
    for group in taken:
        assert power_left(groups, taken - {group}) > allowed - slack


def test_what_goes_back_costs_little_more_than_the_best_choice():
    random = np.random.default_rng(0)
    over = []
    for _ in range(60):
        groups = [
            Group(name=str(i), power=float(random.lognormal(0, 1.5)), cost=float(random.uniform(0.1, 1)))
            for i in range(8)
        ]
        allowed = 0.3 * power_left(groups, ())
        best = min(
            cost_of(groups, names)
            for count in range(9)
            for names in itertools.combinations([group.name for group in groups], count)
            if power_left(groups, names) <= allowed
        )
        over.append(cost_of(groups, cheapest_reverts(groups, allowed)) / best)
    assert np.median(over) < 1.05
    assert max(over) < 2


def test_groups_that_spoil_everything_go_back_whatever_is_allowed():
    groups = [Group(name="a", power=math.inf, cost=1), Group(name="b", power=1e-3, cost=1)]
    assert cheapest_reverts(groups, 1.0) == {"a"}
    assert cheapest_reverts(groups, 0.0) == {"a", "b"}


@pytest.mark.parametrize(
    ("metric", "value", "limit", "factor"),
    [
        ("l2", 0.2, 0.1, 0.25),  # the error has to be halved, its square quartered
        ("cosine", 0.02, 0.01, 0.5),  # 1 - cos is a square already
        ("kl", 0.02, 0.01, 0.5),
        ("flips", 0.02, 0.01, 0.25),
        ("sqnr", 20.0, 30.0, 0.1),
    ],
)
def test_room_follows_how_each_metric_grows(metric, value, limit, factor):
    found = room([result(value, limit, metric=metric)])
    assert factor * 0.85 < found < factor
    assert room([result(value, limit, metric=metric), result(0.0, 1.0)]) == found


def test_room_aims_inside_the_interval_at_a_bounded_price():
    point = room([result(0.1, 0.1)])
    narrow = room([result(0.1, 0.1, interval=(0.09, 0.11))])
    wide = room([result(0.1, 0.1, interval=(0.0, 9.0))])
    assert wide == pytest.approx(point / 2)
    assert wide < narrow < point
    assert room([result(0.0, 0.0)]) == math.inf


class Simulated:
    """A model whose drift is not quite the root of the sum of squares that its sensitivities promise."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        count = int(random.integers(5, 60))
        true = random.lognormal(0, 1.5, count)
        told = true * random.lognormal(0, 0.25, count)
        costs = random.uniform(0.01, 1, count)
        self.groups = [
            Group(name=str(i), power=float(p), cost=float(c))
            for i, (p, c) in enumerate(zip(told, costs, strict=True))
        ]
        self.true = {str(i): float(p) for i, p in enumerate(true)}
        self.scale, self.bend = float(random.lognormal(0, 1)), float(random.uniform(0.9, 1.1))

    def drift(self, reverted):
        left = sum(power for name, power in self.true.items() if name not in reverted)
        return (self.scale * left) ** (0.5 * self.bend)


def search(model, limit):
    found = Search(groups=model.groups)
    found.learn((), [result(model.drift(()), limit)])
    measured = 1
    while (chosen := found.next()) is not None:
        found.learn(chosen, [result(model.drift(chosen), limit)])
        measured += 1
    return found.best, measured


def test_search_ends_in_a_plan_that_holds_after_about_three_measurements():
    counts, lost = [], []
    for seed in range(120):
        model = Simulated(seed)
        limit = model.drift(()) * (0.2 + 0.7 * (seed % 8) / 8)
        best, measured = search(model, limit)
        assert model.drift(best) <= limit
        counts.append(measured)
        lost.append(cost_of(model.groups, best) / sum(group.cost for group in model.groups))
    assert np.mean(np.array(counts) <= 3) > 0.9
    assert max(counts) <= 8
    assert np.mean(lost) < 0.45


def test_search_tries_everything_before_it_gives_up():
    model = Simulated(1)
    best, measured = search(model, -1.0)
    assert best is None
    assert measured <= 8


def test_search_prefers_a_plan_whose_interval_holds():
    groups = [Group(name=str(i), power=1.0, cost=1.0) for i in range(10)]
    found = Search(groups=groups, most=9)
    found.learn((), [result(0.2, 0.1)])
    found.learn(["0"], [result(0.099, 0.1, interval=(0.08, 0.12))])
    found.learn(["0", "1"], [result(0.08, 0.1, interval=(0.07, 0.09))])
    assert found.best == {"0", "1"}


def test_groups_of_a_plan_carry_work_and_weights():
    decisions = tuple(
        Decision(node=node, op="MatMul", group=group, form="dynamic", weight=weight, macs=macs, reason="")
        for node, group, weight, macs in [
            ("a", "x", "wa", 300),
            ("b", "x", "wb", 100),
            ("c", "y", "wc", None),
        ]
    )
    plan = Plan(target="t", precision="int8", quantization="dynamic", decisions=decisions)
    first, second = groups_of(plan, {"x": 0.1, "y": math.inf}, {"wa": 10, "wb": 10, "wc": 80})
    assert (first.name, second.name) == ("x", "y")
    assert first.power == pytest.approx(0.01)
    assert math.isinf(second.power)
    # The one without known work counts as a quarter of the mean group that has some.
    assert first.cost == pytest.approx(0.8 + 0.05 * 0.2, abs=1e-3)
    assert second.cost == pytest.approx(0.2 + 0.05 * 0.8, abs=1e-3)
