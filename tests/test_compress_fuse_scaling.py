"""FoldScale, FoldShift and EmptyPad: factors and sums behind linear layers, padding by nothing."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.fuse.padding import EmptyPad
from edgepress.compress.fuse.scaling import FoldScale, FoldShift

FEEDS = [{"x": case.random(1, 2, 3, 4)}, {"x": case.random(2, 1, 7, 4)}]
WEIGHTS = {
    "w": case.random(3, 4, 6), "b": case.random(4, 6), "s": case.random(5, 6), "half": np.float32(0.5),
    "one": case.random(6, 1), "column": case.random(7, 3, 1), "whole": np.int64(2),
    "huge": np.float32(3e38), "zero": np.float32(0), "far": case.random(8, 6), "shift": case.random(9, 1),
}  # fmt: skip


def linear(body, result="float[B,S,6] y", shape="float[B,S,4] x", **weights):
    known = {**WEIGHTS, **weights}
    words = body.replace(",", " ").replace("(", " ").replace(")", " ").split()
    used = {name: array for name, array in known.items() if name in words}
    return case.parse(f"({shape}) => ({result}) {{ {body} }}", used)


@pytest.mark.parametrize(
    "body",
    [
        "m = MatMul(x, w) a = Add(m, b) y = Mul(a, s)",
        "m = MatMul(x, w) a = Add(b, m) y = Mul(s, a)",
        "m = MatMul(x, w) a = Add(m, b) y = Mul(a, half)",
        "m = MatMul(x, w) a = Add(m, one) y = Mul(a, s)",
        "m = MatMul(x, w) y = Mul(m, s)",
        "m = MatMul(x, w) y = Mul(one, m)",
        "m = MatMul(x, w) a = Add(m, b) y = Div(a, s)",
        "m = MatMul(x, w) y = Div(m, half)",
    ],
)
def test_a_factor_folds_into_weight_and_bias(body):
    changed = case.assert_rewritten(linear(body), FoldScale(), FEEDS)
    assert case.operators(changed) == ({"MatMul": 1, "Add": 1} if "Add" in body else {"MatMul": 1})


def test_two_factors_fold_one_after_the_other():
    model = linear("m = MatMul(x, w) a = Add(m, b) c = Mul(a, half) y = Mul(c, s)")
    changed = case.assert_rewritten(model, FoldScale(), FEEDS, times=2)
    assert case.operators(changed) == {"MatMul": 1, "Add": 1}


USED = "the unscaled result is also used elsewhere"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("m = MatMul(x, w) a = Add(m, b) c = Mul(a, s) y = Add(a, c)", USED),
        ("m = MatMul(x, w) a = Add(m, b) c = Mul(a, s) y = Add(m, c)", USED),
        ("m = MatMul(x, w) n = MatMul(x, w) c = Mul(m, s) y = Add(c, n)",
         "its weight is also used elsewhere (tied weights)"),
        ("m = MatMul(x, w) y = Mul(m, huge)", "the scaled weight is not finite"),
        ("m = MatMul(x, w) y = Div(m, zero)", "the scaled weight is not finite"),
        ("m = MatMul(x, w) a = Add(m, column) y = Mul(a, s)",
         "factor or bias is not one number, or one per output"),
    ],
)  # fmt: skip
def test_refusals(body, reason):
    weights = {"w": case.random(3, 4, 6) * 10} if "huge" in body else {}
    rows = 3 if "column" in body else "S"
    shape, result = f"float[B,{rows},4] x", f"float[B,{rows},6] y"
    case.assert_refused(linear(body, result, shape, **weights), FoldScale(), reason)


@pytest.mark.parametrize(
    "body",
    [
        "m = MatMul(x, w) r = Relu(m) y = Mul(r, s)",
        "m = MatMul(x, w) y = Mul(m, m)",
        "m = MatMul(x, w) y = Div(s, m)",
        "m = MatMul(x, w) y = Mul(m, column)",
    ],
)
def test_what_is_no_scaled_linear_layer(body):
    rows = 3 if "column" in body else "S"
    shape, result = f"float[B,{rows},4] x", f"float[B,{rows},6] y"
    case.assert_refused(linear(body, result, shape), FoldScale())


@pytest.mark.parametrize("sums", ["a = Add(m, b) y = Add(a, far)", "a = Add(b, m) y = Add(far, a)"])
def test_two_shifts_become_one(sums):
    changed = case.assert_rewritten(linear(f"m = MatMul(x, w) {sums}"), FoldShift(), FEEDS)
    assert case.operators(changed) == {"MatMul": 1, "Add": 1}


def test_shifts_that_stay():
    result = "float[B,S,6] y, float[B,S,6] z"
    body = "m = MatMul(x, w) a = Add(m, b) y = Add(a, far) z = Relu(a)"
    case.assert_refused(linear(body, result), FoldShift(), "the first sum is also used elsewhere")
    for body in (
        "m = MatMul(x, w) a = Add(m, b) y = Add(a, shift)",
        "m = MatMul(x, w) a = Mul(m, b) y = Add(a, far)",
        "m = MatMul(x, w) y = Add(m, b)",
    ):
        case.assert_refused(linear(body), FoldShift())


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_padding_by_nothing_goes(mode):
    text = f'(float[B,S,4] x) => (float[B,S,4] y) {{ p = Pad <mode = "{mode}"> (x, none) y = Relu(p) }}'
    changed = case.assert_rewritten(case.parse(text, {"none": np.zeros(6, np.int64)}), EmptyPad(), FEEDS)
    assert case.operators(changed) == {"Relu": 1}


def test_real_padding_stays():
    text = "(float[B,S,4] x) => (float[B,S,5] y) { y = Pad(x, sides) }"
    case.assert_refused(case.parse(text, {"sides": np.array([0, 0, 0, 0, 0, 1])}), EmptyPad())
    text = "(float[B,S,4] x, int64[6] sides) => (float[B,T,U] y) { y = Pad(x, sides) }"
    case.assert_refused(case.parse(text), EmptyPad())
    text = "(float[B,S,4] x) => (float[B,S,4] y) { y = Pad(x, sides) }"
    case.assert_refused(case.parse(text, {"sides": np.array([0, 0, 1, 0, 0, -1])}), EmptyPad())
