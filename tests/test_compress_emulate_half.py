"""float16 products added one by one: against plain loops with one rounding a step."""

from fractions import Fraction

import numpy as np
import pytest
from edgepress.compress.emulate.half import conv_float16, matmul_float16


def fma(total, a, b):
    """total + a * b, exact, then rounded once to float16 (ties to even) by searching the neighbours."""
    exact = Fraction(float(total)) + Fraction(float(a)) * Fraction(float(b))
    guess = np.float16(float(exact))
    near = [guess, np.nextafter(guess, np.float16(np.inf)), np.nextafter(guess, np.float16(-np.inf))]
    near = [item for item in near if np.isfinite(item)]
    best = min(abs(Fraction(float(item)) - exact) for item in near)
    ties = [item for item in near if abs(Fraction(float(item)) - exact) == best]
    return next((item for item in ties if not item.view(np.uint16) & 1), ties[0])


def halves(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float16)


def test_products_are_fused_and_added_in_order_from_the_bias():
    a, b, bias = halves(0, 3, 40), halves(1, 40, 4, scale=0.3), halves(2, 4)
    found = matmul_float16(a, b, bias)
    for row in range(3):
        for column in range(4):
            total = bias[column]
            for k in range(40):
                total = fma(total, a[row, k], b[k, column])
            assert found[row, column] == total


def test_subnormal_and_cancelling_sums():
    a = np.array([[1, 1, 2**-12, 1]], np.float16)
    b = np.array([[2**-14], [2**-23], [2**-13], [-(2.0**-14)]], np.float16)
    assert matmul_float16(a, b)[0, 0] == np.float16(2**-23)  # the third step adds half a unit: ties to even


def test_overflow_is_infinite():
    assert matmul_float16(np.full((1, 2), 300, np.float16), np.full((2, 1), 300, np.float16))[0, 0] == np.inf


def test_leading_axes_broadcast():
    a, b = halves(0, 2, 1, 3, 8), halves(1, 4, 8, 5)
    found = matmul_float16(a, b)
    assert found.shape == (2, 4, 3, 5)
    np.testing.assert_array_equal(found[1, 2], matmul_float16(a[1, 0], b[2]))


@pytest.mark.parametrize("group", [1, 2, 4])
def test_convolution_adds_rows_columns_then_channels(group):
    data, weight, bias = halves(0, 1, 4, 6, 5), halves(1, 8, 4 // group, 3, 2, scale=0.3), halves(2, 8)
    found = conv_float16(data, weight, bias, strides=(2, 1), pads=(1, 0, 1, 1), dilations=(1, 2), group=group)
    padded = np.pad(data, ((0, 0), (0, 0), (1, 1), (0, 1)))
    assert found.shape == (1, 8, 3, 4)
    for place in ((0, 0, 0), (3, 1, 2), (7, 2, 3)):
        channel, row, column = place
        total = bias[channel]
        first = channel // (8 // group) * (4 // group)
        for i in range(3):
            for j in range(2):
                for c in range(4 // group):
                    value = padded[0, first + c, row * 2 + i, column + j * 2]
                    total = fma(total, value, weight[channel, c, i, j])
        assert found[0, channel, row, column] == total
