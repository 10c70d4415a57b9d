"""LayerNormFromParts: the ways of writing the quotient, and what only looks like it."""

import re

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.fuse.normalization import (
    FoldWeightNorm,
    InstanceNormAffine,
    LayerNormFromParts,
    RmsNormAsQuotient,
)

NUMBERS = {
    "eps": np.float32(1e-5),
    "one": np.float32(1.0),
    "two": np.float32(2.0),
    "half": np.float32(0.5),
    "minus_half": np.float32(-0.5),
    "gain": case.random(1, 8),
    "shift": case.random(2, 8),
    "axis": np.array([-1], np.int64),
}
FEEDS = [{"x": case.random(3, 1, 4, 8)}, {"x": case.random(4, 3, 2, 8, scale=5.0)}]

SQUARES = {"pow": "q = Pow(d, two)", "product": "q = Mul(d, d)"}
QUOTIENTS = {
    "div": "s = Sqrt(b) n = Div(d, s)",
    "div-pow": "s = Pow(b, half) n = Div(d, s)",
    "reciprocal": "s = Sqrt(b) r = Reciprocal(s) n = Mul(d, r)",
    "reciprocal-left": "s = Sqrt(b) r = Reciprocal(s) n = Mul(r, d)",
    "one-over": "s = Sqrt(b) r = Div(one, s) n = Mul(d, r)",
    "pow": "r = Pow(b, minus_half) n = Mul(d, r)",
}
AFFINE = {
    "both": "m = Mul(n, gain) y = Add(m, shift)",
    "both-left": "m = Mul(gain, n) y = Add(shift, m)",
    "gain-only": "y = Mul(n, gain)",
}


def norm(
    square="pow",
    quotient="div",
    affine="both",
    *,
    opset=18,
    variance="v = ReduceMean(q, axis)",
    mean="u = ReduceMean(x, axis)",
    biased="b = Add(v, eps)",
    weights=None,
):
    body = f"{mean} d = Sub(x, u) {SQUARES[square]} {variance} {biased}"
    body += f" {QUOTIENTS[quotient]} {AFFINE.get(affine, affine)}"
    text = f"(float[B,S,8] x) => (float[B,S,8] y) {{ {body} }}"
    return case.parse(text, NUMBERS | (weights or {}), opset)


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("quotient", QUOTIENTS)
@pytest.mark.parametrize("affine", AFFINE)
def test_every_spelling(square, quotient, affine):
    changed = case.assert_rewritten(norm(square, quotient, affine), LayerNormFromParts(), FEEDS)
    node = case.node_of(changed, "LayerNormalization")
    assert case.operators(changed) == {"LayerNormalization": 1}
    assert len(node.inputs) == (2 if affine == "gain-only" else 3)
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-5)


@pytest.mark.parametrize("axes", ["-1", "2"])
def test_axes_as_an_attribute(axes):
    reduced = f"v = ReduceMean <axes = [{axes}]> (q)"
    model = norm(mean=f"u = ReduceMean <axes = [{axes}]> (x)", variance=reduced, opset=17)
    case.assert_rewritten(model, LayerNormFromParts(), FEEDS)


def test_an_add_behind_that_is_no_shift_stays():
    text = "m = Mul(n, gain) y = Add(m, x)"
    changed = case.assert_rewritten(norm(affine=text), LayerNormFromParts(), FEEDS)
    assert case.operators(changed) == {"LayerNormalization": 1, "Add": 1}


@pytest.mark.parametrize(
    ("what", "reasons"),
    [
        ({"mean": "w = ReduceMean(x, axis) u = Mul(w, half)"}, []),
        ({"variance": "v = ReduceMean <keepdims = 1> (q)"}, []),
        ({"biased": "b = Mul(v, eps)"}, []),
        ({"biased": "b = Add(v, shift)"}, []),
        ({"affine": "y = Neg(n)"}, ["no constant gain along the last axis follows"]),
        ({"affine": "m = Mul(n, x) y = Add(m, shift)"}, ["no constant gain along the last axis follows"]),
        (
            {"affine": "y = Mul(n, gain)", "weights": {"gain": case.random(0, 1, 8)}},
            ["no constant gain along the last axis follows"],
        ),
        (
            {"affine": "y = Mul(n, gain)", "weights": {"gain": case.random(0, 1)}},
            ["gain or shift is not one number per element of the last axis"],
        ),
        (
            {"weights": {"shift": case.random(0, 1)}},
            ["gain or shift is not one number per element of the last axis"],
        ),
        ({"opset": 16, "mean": ("u = ReduceMean <axes = [-1]> "
"(x)"), "variance": "v = ReduceMean <axes = [-1]> (q)"},
         ["LayerNormalization needs operator set 17, the model has 16"]),
        ({"mean": ("u = ReduceMean <axes = [1]> "
"(x)"), "variance": "v = ReduceMean <axes = [1]> (q)", "opset": 17}, []),
    ],
)  # fmt: skip
def test_look_alikes(what, reasons):
    case.assert_refused(norm(**what), LayerNormFromParts(), *reasons)


def test_dropped_axes_are_no_layer_norm():
    text = """(float[8,8] x) => (float[8,8] y) { u = ReduceMean <keepdims = 0> (x, axis) d = Sub(x, u)
        q = Pow(d, two) v = ReduceMean <keepdims = 0> (q, axis) b = Add(v, eps) s = Sqrt(b) n = Div(d, s)
        m = Mul(n, gain) y = Add(m, shift) }"""
    case.assert_refused(case.parse(text, NUMBERS, 18), LayerNormFromParts())


def test_exponent_and_order_matter():
    for wrong in ("q = Pow(d, one)", "q = Pow(x, two)", "q = Mul(d, x)"):
        text = f"""(float[B,8] x) => (float[B,8] y) {{ u = ReduceMean(x, axis) d = Sub(x, u)
            {wrong} v = ReduceMean(q, axis) b = Add(v, eps) s = Sqrt(b) n = Div(d, s) y = Mul(n, gain) }}"""
        case.assert_refused(case.parse(text, NUMBERS, 18), LayerNormFromParts())
    text = """(float[B,8] x) => (float[B,8] y) { u = ReduceMean(x, axis) d = Sub(u, x) q = Pow(d, two)
        v = ReduceMean(q, axis) b = Add(v, eps) s = Sqrt(b) n = Div(d, s) y = Mul(n, gain) }"""
    case.assert_refused(case.parse(text, NUMBERS, 18), LayerNormFromParts())
    text = """(float[B,8] x) => (float[B,8] y) { u = ReduceMean(x, axis) d = Sub(x, u) q = Pow(d, two)
        v = ReduceMean(q, axis) b = Add(v, eps) s = Sqrt(b) n = Div(s, d) y = Mul(n, gain) }"""
    case.assert_refused(case.parse(text, NUMBERS, 18), LayerNormFromParts())


@pytest.mark.parametrize(("onnx_type", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_other_types_are_refused(onnx_type, dtype):
    numbers = {k: v if v.dtype == np.int64 else v.astype(dtype) for k, v in NUMBERS.items()}
    text = f"""({onnx_type}[B,8] x) => ({onnx_type}[B,8] y) {{ u = ReduceMean(x, axis) d = Sub(x, u)
        q = Pow(d, two) v = ReduceMean(q, axis) b = Add(v, eps) s = Sqrt(b) n = Div(d, s) y =
        Mul(n, gain) }}"""
    case.assert_refused(case.parse(text, numbers, 18), LayerNormFromParts(), "x is not known to be float32")


def test_a_constant_that_adds_axes_is_refused():
    text = """(float[4,8] x) => (float[1,4,8] y) { u = ReduceMean(x, axis) d = Sub(x, u) q = Pow(d, two)
        v = ReduceMean(q, axis) b = Add(v, wide) s = Sqrt(b) n = Div(d, s) y = Mul(n, gain) }"""
    model = case.parse(text, NUMBERS | {"wide": np.full((1, 1, 1), 1e-5, np.float32)}, 18)
    case.assert_refused(model, LayerNormFromParts())


def test_outputs_in_the_middle():
    text = """(float[B,8] x) => (float[B,8] y, float[B,8] {0}) { u = ReduceMean(x, axis) d = Sub(x, u)
        q = Pow(d, two) v = ReduceMean(q, axis) b = Add(v, eps) s = Sqrt(b) n = Div(d, s) m = Mul(n, gain)
        y = Add(m, shift) }"""
    feeds = [{"x": case.random(0, 3, 8)}]
    left = {
        "d": {"LayerNormalization": 1, "ReduceMean": 1, "Sub": 1},
        "m": {"LayerNormalization": 1, "Add": 1},
    }
    for name, operators in left.items():
        model = case.parse(text.replace("{0}", name), NUMBERS, 18)
        assert case.operators(case.assert_rewritten(model, LayerNormFromParts(), feeds)) == operators
    model = case.parse(text.replace("{0}", "n"), NUMBERS, 18)
    case.assert_refused(model, LayerNormFromParts(), "no constant gain along the last axis follows")


def test_in_the_body_of_a_loop_with_outer_weights():
    text = """(int64 n, bool c, float[2,8] x) => (float[2,8] y) {
        y = Loop (n, c, x) <body = step (int64 i, bool go, float[2,8] a) => (bool go2, float[2,8] z) {
            go2 = Identity(go) u = ReduceMean(a, axis) d = Sub(a, u) q = Pow(d, two)
            v = ReduceMean(q, axis) b = Add(v, eps) s = Sqrt(b) k = Div(d, s) m = Mul(k, gain) z =
            Add(m, shift)
        }> }"""
    feeds = [{"n": np.array(3), "c": np.array(True), "x": case.random(0, 2, 8)}]
    changed = case.assert_rewritten(case.parse(text, NUMBERS, 18), LayerNormFromParts(), feeds)
    assert case.operators(changed)["LayerNormalization"] == 1


RMS = "p = Pow(x, two) m = ReduceMean(p, axis) a = Add(m, eps) s = Sqrt(a)"
RMS_NUMBERS = {
    "two": np.float32(2), "one": np.float32(1), "three": np.float32(3), "axis": np.array([-1]),
    "first": np.array([1]), "eps": np.float32(1e-6), "gain": case.random(9, 8), "narrow": case.random(9, 1),
}  # fmt: skip


def rms(tail, body=RMS, result="float[N,S,8] y"):
    words = f"{body} {tail}".replace(",", " ").replace("(", " ").replace(")", " ").split()
    weights = {name: array for name, array in RMS_NUMBERS.items() if name in words}
    return case.parse(f"(float[N,S,8] x) => ({result}) {{ {body} {tail} }}", weights)


RMS_FEEDS = [
    {"x": case.random(1, 2, 3, 8)},
    {"x": case.random(2, 1, 5, 8)},
    {"x": np.zeros((1, 1, 8), np.float32)},
]


@pytest.mark.parametrize("inverse", ["r = Reciprocal(s)", "r = Div(one, s)"])
@pytest.mark.parametrize("product", ["n = Mul(x, r)", "n = Mul(r, x)"])
@pytest.mark.parametrize("scaled", ["y = Mul(n, gain)", "y = Mul(gain, n)"])
def test_a_root_mean_square_norm_becomes_what_the_runtime_fuses(inverse, product, scaled):
    model = rms(f"{inverse} {product} {scaled}")
    changed = case.assert_rewritten(model, RmsNormAsQuotient(), RMS_FEEDS)
    assert case.operators(changed) == {"Pow": 1, "ReduceMean": 1, "Add": 1, "Sqrt": 1, "Div": 1, "Mul": 1}
    for feeds in RMS_FEEDS:
        x = feeds["x"].astype(np.float64)
        wanted = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * RMS_NUMBERS["gain"]
        for optimise in (False, True):
            np.testing.assert_allclose(
                case.run(changed, feeds, optimise=optimise)[0], wanted, rtol=1e-5, atol=1e-5
            )


NO_GAIN = "no constant gain along the last axis follows"


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ("r = Reciprocal(s) n = Mul(x, r) y = Neg(n)", NO_GAIN),
        ("r = Reciprocal(s) n = Mul(x, r) y = Mul(n, narrow)", NO_GAIN),
        ("r = Reciprocal(s) n = Mul(x, r) q = Mul(n, gain) y = Add(q, r)",
         "the reciprocal is also used elsewhere"),
    ],
)  # fmt: skip
def test_root_mean_square_norms_that_stay(tail, reason):
    case.assert_refused(rms(tail), RmsNormAsQuotient(), reason)


@pytest.mark.parametrize(
    "body",
    [
        RMS.replace("two", "three"),
        RMS.replace("axis", "first"),
        RMS.replace("Add(m, eps)", "Mul(m, eps)"),
        RMS.replace("s = Sqrt(a)", "s = Exp(a)"),
        "t = Neg(x) " + RMS.replace("Pow(x", "Pow(t"),
    ],
)
def test_what_is_no_root_mean_square_norm(body):
    case.assert_refused(rms("r = Reciprocal(s) n = Mul(x, r) y = Mul(n, gain)", body), RmsNormAsQuotient())


INSTANCE = {
    "ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32), "gamma": case.random(1, 4),
    "beta": case.random(2, 4), "gains": case.random(3, 4, 1), "shifts": case.random(4, 4, 1),
    "number": np.float32(0.5), "lines": case.random(5, 4, 6), "batchwise": case.random(6, 1, 4, 1),
    "huge": np.full((4, 1), 3e38, np.float32), "flat": case.random(7, 6),
}  # fmt: skip
IMAGES = [{"x": case.random(seed, batch, 4, 6)} for seed, batch in enumerate((1, 2, 3))]


def instance(body, result="float[N,4,6] y"):
    words = re.findall(r"\w+", body)
    used = {name: array for name, array in INSTANCE.items() if name in words}
    return case.parse(f"(float[N,4,6] x) => ({result}) {{ {body} }}", used)


@pytest.mark.parametrize(
    "body",
    [
        "i = InstanceNormalization(x, ones, zeros) m = Mul(i, gains) y = Add(m, shifts)",
        "i = InstanceNormalization <epsilon = 0.1> (x, gamma, beta) m = Mul(gains, i) y = Add(shifts, m)",
        "i = InstanceNormalization(x, gamma, beta) y = Mul(i, batchwise)",
        "i = InstanceNormalization(x, gamma, beta) a = Add(i, shifts) y = Mul(a, number)",
    ],
)
def test_gain_and_shift_go_into_an_instance_norm(body):
    changed = case.assert_rewritten(instance(body), InstanceNormAffine(), IMAGES)
    assert case.operators(changed) == {"InstanceNormalization": 1}


def test_instance_norms_that_stay():
    body = "i = InstanceNormalization(x, ones, zeros) m = Mul(i, gains) z = Relu(i) y = Add(m, z)"
    case.assert_refused(instance(body), InstanceNormAffine())
    for reader in ("y = Mul(i, lines)", "y = Mul(i, flat)", "y = Mul(i, x)", "y = Relu(i)"):
        case.assert_refused(
            instance(f"i = InstanceNormalization(x, ones, zeros) {reader}"), InstanceNormAffine()
        )
    body = "i = InstanceNormalization(x, gamma, beta) m = Mul(i, huge) y = Mul(m, huge)"
    case.assert_refused(instance(body), InstanceNormAffine(), "the joint gain or shift is not finite")


def weight_norm(body, **weights):
    known = {"v": case.random(1, 6, 4, 3), "g": np.abs(case.random(2, 1, 1, 3)), "axes": np.array([0, 1]),
             **weights}  # fmt: skip
    words = re.findall(r"\w+", body)
    used = {name: array for name, array in known.items() if name in words}
    return case.parse(f"(float[N,4,L] x) => (float[N,6,M] y) {{ {body} y = Conv(x, w) }}", used)


WAVES = [{"x": case.random(seed, batch, 4, size)} for seed, (batch, size) in enumerate([(1, 5), (2, 3)])]
LENGTH = "n = ReduceL2(v, axes) d = Div(g, n)"


@pytest.mark.parametrize("product", ["w = Mul(v, d)", "w = Mul(d, v)"])
def test_a_normalized_weight_is_computed_ahead(product):
    changed = case.assert_rewritten(weight_norm(f"{LENGTH} {product}"), FoldWeightNorm(), WAVES)
    assert case.operators(changed) == {"Conv": 1}
    assert set(changed.graph.initializers) == {"v_1"}


def test_normalized_weights_that_stay():
    body = f"{LENGTH} w = Mul(v, d)"
    zero = weight_norm(body, v=np.zeros((6, 4, 3), np.float32))
    case.assert_refused(zero, FoldWeightNorm(), "the weight is not finite, or a vector has length 0")
    text = f"(float[N,4,L] x, float[6,4,3] v) => (float[N,6,M] y) {{ {body} y = Conv(x, w) }}"
    fed = case.parse(text, {"g": np.ones((1, 1, 3), np.float32), "axes": np.array([0, 1])})
    case.assert_refused(fed, FoldWeightNorm(), "the weight is not constant")
    case.assert_refused(weight_norm(f"{LENGTH} w = Mul(v, g) z = Relu(d)"), FoldWeightNorm())
