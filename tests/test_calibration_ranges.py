"""Histograms that grow, and the ranges taken from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from edgepress.calibration.histogram import MASK_MAGNITUDE, SIDE_BINS, Histogram
from edgepress.calibration.ranges import METHODS, RangeObserver, quantization_error
from edgepress.graph.errors import DataError
from edgepress.graph.scheme import Scheme, affine_parameters, dequantize, quantize
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

SYMMETRIC = Scheme(dtype="int8", symmetric=True)
AFFINE = Scheme(dtype="uint8", symmetric=False)
REDUCED = Scheme(dtype="uint8", symmetric=False, reduced_range=True)
SCHEMES = (SYMMETRIC, AFFINE, REDUCED, Scheme(dtype="int8", symmetric=False))

floats = st.floats(-1e6, 1e6, width=32, allow_subnormal=True)
arrays = hnp.arrays(np.float32, st.integers(1, 50), elements=floats)


def histogram_of(*parts):
    result = Histogram()
    for part in parts:
        result.add(part, "t")
    return result


def same(left, right):
    return left.to_bytes() == right.to_bytes()


@given(st.lists(arrays, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_histogram_does_not_depend_on_order_or_grouping(parts, random):
    together = np.concatenate(parts)
    shuffled = together.copy()
    random.shuffle(shuffled)
    assert same(histogram_of(*parts), histogram_of(together))
    assert same(histogram_of(together), histogram_of(shuffled))


@given(arrays, arrays, arrays)
def test_merge_is_exact_associative_and_commutative(a, b, c):
    x, y, z = (histogram_of(part) for part in (a, b, c))
    assert same(x.merge(y), y.merge(x))
    assert same(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert same(x.merge(y).merge(z), histogram_of(a, b, c))
    assert same(x.merge(Histogram()), x)


@given(arrays)
def test_every_value_is_counted_in_the_bin_that_holds_it(values):
    histogram = histogram_of(values)
    slow = np.zeros(2 * SIDE_BINS, int)
    for value in values.tolist():
        slow[math.floor(value / histogram.width) + SIDE_BINS] += 1
    assert (histogram.counts == slow).all()
    assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
    assert histogram.zeros == sum(value == 0 for value in values.tolist())
    largest = max(abs(float(value)) for value in values)
    if largest > 2.0**-80:
        assert largest >= histogram.width * SIDE_BINS / 2  # the bins are as fine as they can be


@given(arrays)
def test_round_trip_through_bytes(values):
    observer = RangeObserver("t", method="mse", percentile=99.0, histogram=histogram_of(values))
    again = RangeObserver.from_bytes(observer.to_bytes())
    assert again.to_bytes() == observer.to_bytes()
    assert (again.name, again.method, again.percentile) == ("t", "mse", 99.0)


@pytest.mark.parametrize("data", [b"", b"\x80", b"nonsense", RangeObserver("t").to_bytes()[:-2]])
def test_damaged_bytes_are_a_data_error(data):
    with pytest.raises(DataError, match="calibration ranges"):
        RangeObserver.from_bytes(data)


@given(arrays, st.sampled_from(SCHEMES), st.sampled_from(METHODS))
def test_limits_lie_within_what_was_seen_and_zero(values, scheme, method):
    observer = RangeObserver("t", method=method, histogram=histogram_of(values))
    low, high = observer.limits(scheme)
    assert low <= high
    assert min(values.min(), 0.0) <= low
    assert high <= max(values.max(), 0.0)
    if method == "minmax":
        assert (low, high) == (values.min(), values.max())


@given(hnp.arrays(np.float32, st.integers(1, 3000), elements=floats), st.sampled_from([90.0, 99.0, 99.9]))
def test_percentile_keeps_what_it_promises(values, percentile):
    for scheme in (SYMMETRIC, AFFINE):
        observer = RangeObserver(
            "t", method="percentile", percentile=percentile, histogram=histogram_of(values)
        )
        low, high = observer.limits(scheme)
        inside = ((values >= low) & (values <= high)).mean()
        assert inside >= percentile / 100 - 1e-12


def test_percentile_cuts_outliers():
    values = np.random.default_rng(0).standard_normal(100_000).astype("f4")
    values[0] = 50.0
    for scheme in (SYMMETRIC, AFFINE):
        low, high = RangeObserver("t", method="percentile", histogram=histogram_of(values)).limits(scheme)
        assert -5 < low < -3 < 3 < high < 5


def true_error(values, low, high, scheme):
    scale, zero_point = affine_parameters(np.array(low), np.array(high), scheme)
    restored = dequantize(quantize(values, scale, zero_point, scheme), scale, zero_point, None)
    return float(((restored.astype(np.float64) - values) ** 2).mean())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("clip", [0.05, 0.4, 1.0])
def test_estimated_error_is_the_true_one(scheme, clip):
    random = np.random.default_rng(7)
    drawn = random.standard_normal(60_000), random.gamma(2, 2, 60_000), random.uniform(-1, 9, 60_000)
    for values in (part.astype("f4") for part in drawn):
        low, high = clip * values.min(), clip * values.max()
        estimate = quantization_error(histogram_of(values), low, high, scheme)
        assert estimate == pytest.approx(true_error(values, low, high, scheme), rel=0.03)


def test_error_of_a_constant_and_of_zeros():
    assert (
        RangeObserver("t", histogram=histogram_of(np.zeros(9, "f4"))).choose(AFFINE).mean_squared_error == 0
    )
    constant = RangeObserver("t", histogram=histogram_of(np.full(9, 3.3, "f4")))
    assert constant.choose(AFFINE, "minmax").mean_squared_error < 1e-9


@given(arrays, st.sampled_from(SCHEMES))
def test_least_squares_is_never_worse_than_the_full_range(values, scheme):
    observer = RangeObserver("t", histogram=histogram_of(values))
    full = observer.choose(scheme, "minmax").mean_squared_error
    assert observer.choose(scheme, "mse").mean_squared_error <= full
    assert observer.choose(scheme, "auto").mean_squared_error <= full


@pytest.mark.parametrize("scheme", [SYMMETRIC, AFFINE])
def test_least_squares_against_a_slow_search(scheme):
    values = np.random.default_rng(3).standard_t(3, 20_000).astype("f4")
    observer = RangeObserver("t", histogram=histogram_of(values))
    choice = observer.choose(scheme, "mse")
    found = true_error(values, choice.low, choice.high, scheme)
    bound = float(np.abs(values).max())
    slow = min(true_error(values, -f * bound, f * bound, scheme) for f in np.linspace(0.02, 1, 200))
    assert found <= slow * 1.03


def test_auto_keeps_the_full_range_where_clipping_does_not_pay():
    values = np.random.default_rng(1).uniform(-1, 1, 50_000).astype("f4")
    assert RangeObserver("t", histogram=histogram_of(values)).choose(AFFINE).method == "minmax"
    values[:5] = 40.0
    assert RangeObserver("t", histogram=histogram_of(values)).choose(SYMMETRIC).method != "minmax"


def slow_divergence(counts, kept, levels):
    """Migacz 2017, slide 36, as the loop that it describes."""
    p = [float(count) for count in counts[:kept]]
    p[-1] += sum(counts[kept:])
    q = [0.0] * kept
    for level in range(levels):
        members = [i for i in range(kept) if i * levels // kept == level and counts[i]]
        for member in members:
            q[member] = sum(counts[m] for m in members) / len(members)
    total_p, total_q = sum(p), sum(q)
    return sum(
        a / total_p * math.log(a / total_p / (b / total_q)) for a, b in zip(p, q, strict=True) if a > 0
    )


def test_entropy_against_a_slow_search():
    values = np.abs(np.random.default_rng(5).standard_normal(30_000)).astype("f4")
    values[:3] = 8.0 - 2**-8
    observer = RangeObserver("t", method="entropy", histogram=histogram_of(values))
    width = 2 * observer.histogram.width
    counts = np.bincount(np.floor(values / width).astype(int)).tolist()
    _, high = observer.limits(SYMMETRIC)
    filled = [i + 1 for i, count in enumerate(counts) if count and i + 1 >= 128]
    best = min(slow_divergence(counts, kept, 128) for kept in filled[::20] + filled[-1:])
    found = slow_divergence(counts, round(high / width), 128)
    assert found <= best * 1.0001
    assert high < 6


def test_entropy_is_not_minmax_on_a_long_tail():
    values = np.random.default_rng(2).standard_t(3, size=100_000).astype("f4")
    for scheme in (SYMMETRIC, AFFINE):
        observer = RangeObserver("t", histogram=histogram_of(values))
        entropy, full = observer.choose(scheme, "entropy"), observer.choose(scheme, "minmax")
        assert entropy.high - entropy.low < 0.9 * (full.high - full.low)


@pytest.mark.parametrize("mask", [-math.inf, -3.4e38, math.inf, -1.1e30])
def test_masks_do_not_destroy_the_range(mask):
    values = np.random.default_rng(0).standard_normal(1000).astype("f4")
    masked = values.copy()
    masked[::7] = mask
    observer, plain = RangeObserver("t"), RangeObserver("t")
    observer.update(masked)
    plain.update(np.delete(values, np.s_[::7]))
    assert observer.masked == len(values[::7])
    assert abs(mask) > MASK_MAGNITUDE
    for method in METHODS:
        assert observer.choose(AFFINE, method) == plain.choose(AFFINE, method)


def test_only_masks_is_an_error_that_says_so():
    observer = RangeObserver("mask")
    with pytest.raises(DataError, match="no finite value"):
        observer.limits(AFFINE)
    observer.update(np.full(4, -np.inf, "f4"))
    with pytest.raises(DataError, match="no finite value") as caught:
        observer.limits(AFFINE)
    assert "4 values" in str(caught.value)
    assert "mask" in str(caught.value)


def test_nan_names_the_tensor():
    with pytest.raises(DataError, match="NaN") as caught:
        RangeObserver("layer3/out").update(np.array([[1, np.nan]], "f4"))
    assert "layer3/out" in str(caught.value)


@given(hnp.arrays(st.sampled_from([np.float16, np.float64, np.int32]), 20, elements=st.integers(-100, 100)))
def test_other_types_count_like_float32(values):
    assume(values.size)
    assert same(histogram_of(values), histogram_of(values.astype("f4")))


def test_size_does_not_grow_with_the_data():
    observer = RangeObserver("t")
    random = np.random.default_rng(0)
    sizes = []
    for scale in (1e-20, 1.0, 1e5, 1e20):
        observer.update(random.standard_normal(1000).astype("f4") * np.float32(scale))
        sizes.append(observer.histogram.counts.nbytes)
    assert set(sizes) == {2 * SIDE_BINS * 8}
    assert observer.histogram.total == 4000


def test_wrong_method_or_percentile():
    with pytest.raises(ValueError, match="method"):
        RangeObserver("t", method="best")
    with pytest.raises(ValueError, match="percentile"):
        RangeObserver("t", percentile=0.9999)
