"""The search for widths: the knapsack against every combination, and products of widths."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest
from edgepress.compress.prune.allocation import Choices, allocate
from edgepress.compress.prune.curves import Curve
from edgepress.compress.prune.widths import aligned_widths, choose_widths
from edgepress.compress.prune.work import Products
from hypothesis import given, settings
from hypothesis import strategies as st


def choices(seed: int, count: int) -> Choices:
    random = np.random.default_rng(seed)
    widths = np.arange(1, count + 1)
    return Choices(widths, np.sort(random.random(count))[::-1].copy(), widths * float(random.integers(1, 9)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.floats(0.3, 1.0))
def test_the_knapsack_finds_the_least_error_of_all_combinations(seeds, part):
    groups = [choices(seed, 4) for seed in seeds]
    budget = part * sum(float(group.costs.max()) for group in groups)
    best = np.inf
    for picks in itertools.product(range(4), repeat=len(groups)):
        cost = sum(group.costs[pick] for group, pick in zip(groups, picks, strict=True))
        if cost <= budget * (1 - len(groups) / 4096):
            best = min(best, sum(group.errors[pick] for group, pick in zip(groups, picks, strict=True)))
    found = allocate(groups, budget)
    if found is None:
        assert not np.isfinite(best) or sum(group.costs.min() for group in groups) > budget
        return
    places = [
        int(np.flatnonzero(group.widths == width)[0]) for group, width in zip(groups, found, strict=True)
    ]
    assert sum(group.costs[place] for group, place in zip(groups, places, strict=True)) <= budget * (1 + 1e-3)
    assert sum(group.errors[place] for group, place in zip(groups, places, strict=True)) <= best + 1e-12


def test_a_budget_below_the_cheapest_choices_is_not_met():
    assert allocate([choices(1, 4)], 0.5) is None
    assert allocate([choices(1, 4)], -1.0) is None


@pytest.mark.parametrize(
    ("units", "alignment", "expected"),
    [
        (4, 16, [1, 2, 3, 4]),
        (16, 16, list(range(2, 17, 2))),
        (12, 8, list(range(1, 13))),
        (64, 16, list(range(8, 65, 8))),
        (1536, 16, list(range(16, 1537, 16))),
        (100, 16, [*range(8, 97, 8), 100]),
    ],
)
def test_narrow_groups_have_finer_widths(units, alignment, expected):
    assert aligned_widths(units, alignment) == expected


def curve(units: int, errors) -> Curve:
    group = types.SimpleNamespace(units=tuple(range(units)))
    return Curve(group=group, order=tuple(range(units)), errors=np.asarray(errors, float), fitted=True)


def chain() -> Products:
    """Three layers in a row: the one between two groups costs the product of their widths."""
    return Products(
        base=np.array([10.0, 100.0, 10.0]),
        axes=((0,), (0, 1), (1,)),
        shares=np.array([[0.125, 0.0], [0.0, 0.125]]),
    )


def test_the_cost_of_a_layer_between_two_groups_is_a_product():
    cost = chain()
    assert cost.total([0, 0]) == 120.0
    assert cost.total([4, 4]) == pytest.approx(5.0 + 25.0 + 5.0)
    np.testing.assert_allclose(cost.of_group(0, [0, 4], [0, 4, 8]), [60.0, 30.0, 0.0])


def test_widths_hold_the_budget_where_costs_are_products():
    falling = np.linspace(1.0, 0.0, 9) ** 2
    curves = [curve(8, falling), curve(8, 4 * falling)]
    widths = choose_widths(curves, chain(), 40.0)
    assert widths is not None
    assert chain().total([8 - width for width in widths]) <= 40.0
    best = min(
        curves[0].errors[a] + curves[1].errors[b]
        for a in range(1, 9)
        for b in range(1, 9)
        if chain().total([8 - a, 8 - b]) <= 40.0
    )
    assert curves[0].errors[widths[0]] + curves[1].errors[widths[1]] <= best * 1.25
    assert widths[1] > widths[0]


def test_a_budget_that_no_width_meets_gives_none():
    flat = np.zeros(9)
    assert choose_widths([curve(8, flat), curve(8, flat)], chain(), 1.0) is None


def test_measured_effects_scale_a_curve():
    item = Curve(
        group=types.SimpleNamespace(units=tuple(range(4))),
        order=(0, 1, 2, 3),
        errors=np.array([1.0, 0.5, 0.25, 0.1, 0.0]),
        fitted=True,
        effects={1: 1.0, 2: 0.25},
    )
    np.testing.assert_allclose(item.losses(), [2.0, 1.0, 0.25, 0.1, 0.0])
    assert item.removed(3) == (0,)
