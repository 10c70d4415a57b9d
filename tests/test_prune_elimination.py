"""Least squares and the order in which units go, against fits by `numpy.linalg.lstsq`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from edgepress.compress.prune.elimination import Moments, error, removal, solve

TINY = 1e-12


def layer(inputs: int, outputs: int, *, seed: int, columns: int = 400, groups: int = 1):
    """Correlated inputs with a constant one, what a random layer makes of them, and their moments."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(groups, inputs, inputs)) @ random.normal(size=(groups, inputs, columns)) + 0.5
    ones = np.concatenate([x, np.ones((groups, 1, columns))], axis=1)
    y = random.normal(size=(groups, outputs, inputs + 1)) @ ones
    moments = Moments(
        gram=ones @ ones.transpose(0, 2, 1) / columns,
        cross=ones @ y.transpose(0, 2, 1) / columns,
        energy=float((y**2).sum() / columns),
        constant=True,
    )
    return ones, y, moments


def loss_of(x, y, rows):
    """The mean squared error of the best fit on some inputs, summed over outputs and groups, by lstsq."""
    total = 0.0
    for inputs, outputs in zip(x, y, strict=True):
        chosen = inputs[[*rows, -1]]
        fit = np.linalg.lstsq(chosen.T, outputs.T, rcond=None)[0]
        total += float(((outputs.T - chosen.T @ fit) ** 2).sum() / inputs.shape[1])
    return total


@pytest.mark.parametrize("groups", [1, 3])
def test_a_fit_on_some_inputs_is_the_least_squares_one(groups):
    x, y, moments = layer(8, 3, seed=1, groups=groups)
    rows = np.array([0, 2, 5, 7])
    weights = solve(moments, rows, ridge=TINY)
    assert weights.shape == (groups, 5, 3)
    assert error(moments, rows, weights) == pytest.approx(loss_of(x, y, rows), rel=1e-6)


def test_all_inputs_give_the_layer_back():
    _, _, moments = layer(6, 2, seed=2)
    rows = np.arange(6)
    weights = solve(moments, rows, ridge=TINY)
    assert error(moments, rows, weights) == pytest.approx(0.0, abs=1e-6 * moments.energy)


def test_a_large_ridge_keeps_the_prior():
    _, _, moments = layer(6, 2, seed=3)
    rows = np.arange(4)
    prior = np.random.default_rng(0).normal(size=(1, 5, 2))
    weights = solve(moments, rows, ridge=1e9, prior=prior)
    np.testing.assert_allclose(weights[:, :4], prior[:, :4], rtol=1e-4)


def test_without_a_constant_input_there_is_no_bias():
    _, _, moments = layer(5, 2, seed=4)
    plain = Moments(moments.gram[:, :-1, :-1], moments.cross[:, :-1], moments.energy, constant=False)
    assert solve(plain, np.array([0, 3]), ridge=TINY).shape == (1, 2, 2)


def test_errors_of_a_removal_are_those_of_fits():
    x, y, moments = layer(12, 4, seed=5)
    units = [np.arange(3 * unit, 3 * unit + 3) for unit in range(4)]
    found = removal([moments], [units], scales=[1.0], ridge=TINY)
    assert sorted(found.order) == [0, 1, 2, 3]
    for left in range(5):
        stay = sorted(set(range(4)) - set(found.order[: 4 - left]))
        rows = [row for unit in stay for row in units[unit]]
        assert found.errors[left] == pytest.approx(loss_of(x, y, rows), rel=1e-4, abs=1e-6)


def test_the_first_unit_to_go_is_the_one_whose_loss_is_least():
    x, y, moments = layer(10, 3, seed=6)
    units = [np.array([row]) for row in range(10)]
    found = removal([moments], [units], scales=[1.0], ridge=TINY)
    losses = [loss_of(x, y, [row for row in range(10) if row != gone]) for gone in range(10)]
    assert found.order[0] == int(np.argmin(losses))


def test_a_unit_that_others_replace_goes_before_a_small_one_of_its_own():
    random = np.random.default_rng(7)
    x = random.normal(size=(3, 500))
    x = np.stack([x[0], x[0] + 1e-3 * x[1], 0.1 * x[2]])
    y = np.array([[1.0, 1.0, 1.0]]) @ x
    moments = Moments((x @ x.T / 500)[None], (x @ y.T / 500)[None], float((y**2).sum() / 500), constant=False)
    found = removal([moments], [[np.array([row]) for row in range(3)]], ridge=TINY)
    assert found.order[0] in (0, 1)


def test_several_readers_share_their_units():
    one = layer(6, 2, seed=8)[2]
    other = layer(6, 5, seed=9)[2]
    units = [np.array([row]) for row in range(6)]
    both = removal([one, other], [units, units], scales=[1.0, 1.0], ridge=TINY)
    alone = [removal([item], [units], scales=[1.0], ridge=TINY) for item in (one, other)]
    assert both.errors[0] == pytest.approx(sum(item.errors[0] for item in alone), rel=1e-6)
    assert both.errors[3] >= sum(item.errors[3] for item in alone) - 1e-6


def test_going_together_is_no_better_than_one_by_one():
    _, _, moments = layer(16, 4, seed=10)
    units = [np.array([row]) for row in range(16)]
    single = removal([moments], [units], ridge=TINY)
    pairs = removal([moments], [units], ridge=TINY, together=4)
    assert sorted(pairs.order) == list(range(16))
    for left in (12, 8, 4, 0):
        assert pairs.errors[left] >= single.errors[left] * 0.999 - 1e-9
    assert all(one >= two for one, two in itertools.pairwise(pairs.errors))
