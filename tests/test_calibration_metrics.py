"""Metrics against slow loops written from their formulas."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
from edgepress.calibration import metrics
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

values = st.floats(-100, 100, width=32, allow_subnormal=False).map(lambda v: 0.0 if abs(v) < 1e-3 else v)
matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(2, 5)), elements=values)
pairs = st.tuples(st.integers(1, 6), st.integers(2, 5)).flatmap(
    lambda shape: st.tuples(*(hnp.arrays(np.float32, shape, elements=values) for _ in range(2)))
)


@given(pairs)
def test_cosine_distance(pair):
    left, right = pair
    for found, a, b in zip(metrics.cosine_distances(left, right), left.tolist(), right.tolist(), strict=True):
        norm_a, norm_b = (math.sqrt(sum(v * v for v in row)) for row in (a, b))
        if norm_a == 0 or norm_b == 0:
            assert found == (0.0 if norm_a == norm_b else 1.0)
        else:
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            assert found == pytest.approx(1 - dot / (norm_a * norm_b), abs=1e-9)


@given(pairs)
def test_l2_sqnr_and_largest_error_in_parts_and_at_once(pair):
    left, right = pair
    parts, whole = metrics.ErrorSums(), metrics.ErrorSums()
    whole.add(left, right)
    for a, b in zip(left, right, strict=True):
        parts.add(a, b)
    error = sum((a - b) ** 2 for a, b in zip(left.ravel().tolist(), right.ravel().tolist(), strict=True))
    signal = sum(a * a for a in left.ravel().tolist())
    assert parts.max_abs == max(
        abs(a - b) for a, b in zip(left.ravel().tolist(), right.ravel().tolist(), strict=True)
    )
    for sums in (parts, whole):
        if error == 0:
            assert (sums.relative_l2, sums.sqnr_db) == (0.0, math.inf)
        elif signal == 0:
            assert (sums.relative_l2, sums.sqnr_db) == (math.inf, -math.inf)
        else:
            assert sums.relative_l2 == pytest.approx(math.sqrt(error / signal))
            assert sums.sqnr_db == pytest.approx(10 * math.log10(signal / error))


@given(pairs)
def test_kl_of_logits_and_of_probabilities(pair):
    left, right = pair
    found = metrics.kl_divergences(left / 10, right / 10)
    for index in range(len(left)):
        p, q = ([math.exp(v / 10) for v in rows[index].tolist()] for rows in (left, right))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        slow = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found[index] == pytest.approx(slow, abs=1e-5)
        both = np.array([p]), np.array([q])
        assert metrics.is_probability(both[0])
        assert metrics.kl_divergences(*both)[0] == pytest.approx(slow, abs=1e-9)


def test_kl_survives_a_probability_of_zero():
    assert math.isfinite(metrics.kl_divergences(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))[0])
    assert not metrics.is_probability(np.array([[0.5, 0.6]]))
    assert not metrics.is_probability(np.array([[1.5, -0.5]]))


def slow_ranks(items):
    return [sum(o < v for o in items) + (sum(o == v for o in items) + 1) / 2 for v in items]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25))
def test_spearman_with_ties(points):
    a, b = ([float(p[i]) for p in points] for i in (0, 1))
    assert metrics.average_ranks(np.array(a)).tolist() == slow_ranks(a)
    found = metrics.spearman(np.array(a), np.array(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(found)
        return
    ra, rb = slow_ranks(a), slow_ranks(b)
    ma, mb = sum(ra) / len(ra), sum(rb) / len(rb)
    top = sum((x - ma) * (y - mb) for x, y in zip(ra, rb, strict=True))
    norm = math.sqrt(sum((x - ma) ** 2 for x in ra) * sum((y - mb) ** 2 for y in rb))
    assert found == pytest.approx(top / norm, abs=1e-12)
    if importlib.util.find_spec("scipy"):
        from scipy.stats import spearmanr

        assert found == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_f1(points):
    labels, predictions = (np.array([p[i] for p in points]) for i in (0, 1))

    def one(index):
        hits = sum(a == b == index for a, b in points)
        named = sum(a == index for a, _ in points) + sum(b == index for _, b in points)
        return 2 * hits / named if named else 0.0

    present = sorted({v for p in points for v in p})
    slow = one(1) if present[-1] <= 1 else sum(map(one, present)) / len(present)
    assert metrics.f1_score(labels, predictions) == pytest.approx(slow)


@pytest.mark.parametrize(("hits", "total"), [(1, 4), (3, 20), (19, 20), (7, 150), (600, 1000)])
def test_binomial_interval_against_sums_of_the_distribution(hits, total):
    def upper_tail(share, least):
        terms = range(least, total + 1)
        return math.fsum(math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in terms)

    low, high = metrics.binomial_interval(hits, total)
    assert upper_tail(low, hits) == pytest.approx(0.025, rel=1e-6)
    assert 1 - upper_tail(high, hits + 1) == pytest.approx(0.025, rel=1e-6)


def test_binomial_interval_at_the_ends():
    assert metrics.binomial_interval(0, 0) is None
    low, high = metrics.binomial_interval(0, 30)
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 30)))
    low, high = metrics.binomial_interval(30, 30)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 30)), 1.0)


def test_ratio_interval_of_a_mean_and_of_a_ratio():
    random = np.random.default_rng(2)
    values, weights = random.exponential(size=300), random.integers(1, 9, 300).astype(float)
    low, high = metrics.ratio_interval(values, np.ones(300))
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(300), rel=0.15)
    # Delta method for a ratio of sums.
    ratio = values.sum() / weights.sum()
    spread = (values - ratio * weights).std() / weights.mean() / math.sqrt(300)
    low, high = metrics.ratio_interval(values, weights)
    assert low < ratio < high
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.15)
    assert metrics.ratio_interval(values, weights) == (low, high)
    assert metrics.ratio_interval(values[:1], weights[:1]) is None
    assert metrics.ratio_interval(values, np.zeros(300)) is None


def test_intervals_have_known_values():
    low, high = metrics.paired_interval(0, 0, 100)
    assert low < 0 < high
    low, high = metrics.paired_interval(5, 30, 200)
    assert 0 < low < 25 / 200 < high


def test_paired_interval_covers_the_truth_about_95_times_in_100():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        lost, won, _ = random.multinomial(150, [0.05, 0.12, 0.83])
        low, high = metrics.paired_interval(int(lost), int(won), 150)
        hits += low <= 0.07 <= high
    assert 0.92 <= hits / 400 <= 0.985


def test_bootstrap_interval_of_a_mean():
    sample = np.random.default_rng(1).standard_normal(400)
    low, high = metrics.bootstrap_interval(lambda index: float(sample[index].mean()), 400)
    assert (low + high) / 2 == pytest.approx(sample.mean(), abs=0.01)
    assert (high - low) / 2 == pytest.approx(1.96 * sample.std() / 20, rel=0.15)
    assert metrics.bootstrap_interval(lambda _: math.nan, 5) is None


def test_nearest_neighbours_block_by_block(monkeypatch):
    monkeypatch.setattr(metrics, "_NEIGHBOUR_BLOCK", 3)
    rows = np.random.default_rng(0).standard_normal((11, 4)).astype("f4")
    slow = []
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        slow.append(max(others, key=lambda j: row @ rows[j] / np.linalg.norm(row) / np.linalg.norm(rows[j])))
    assert metrics.nearest_neighbours(rows).tolist() == slow
    moved = rows.copy()
    moved[0] = -moved[0]
    kept = sum(a == b for a, b in zip(slow, metrics.nearest_neighbours(moved).tolist(), strict=True))
    assert metrics.neighbour_agreement(rows, moved) == (kept, 11)
    assert metrics.neighbour_agreement(rows[:1], rows[:1]) == (0, 0)
