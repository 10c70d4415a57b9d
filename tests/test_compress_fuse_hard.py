"""HardActivation: hard sigmoid and hard swish in their spellings, and what only looks like them."""

import re

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.fuse.hard import HardActivation

NUMBERS = {
    "three": np.float32(3), "six": np.float32(6), "zero": np.float32(0), "sixth": np.float32(1 / 6),
    "one": np.float32(1), "half": np.float32(0.5), "fifth": np.float32(0.2), "low": np.float32(-1),
    "gain": case.random(1, 4, 1, 1), "wide": np.full((1, 1, 1, 1, 1), 6, np.float32),
}  # fmt: skip
FEEDS = [{"x": case.random(seed, batch, 4, 3, 5, scale=4.0)} for seed, batch in enumerate((1, 2, 3))]
CLIP = "a = Add(x, three) c = Clip(a, zero, six)"


def hard(body, result="float[N,4,3,5] y", opset=20):
    used = {name: array for name, array in NUMBERS.items() if re.search(rf"\b{name}\b", body)}
    return case.parse(f"(float[N,4,3,5] x) => ({result}) {{ {body} }}", used, opset)


@pytest.mark.parametrize(
    "body",
    [
        f"{CLIP} m = Mul(x, c) y = Div(m, six)",
        f"{CLIP} m = Mul(c, x) y = Mul(m, sixth)",
        f"{CLIP} d = Div(c, six) y = Mul(x, d)",
        f"{CLIP} d = Mul(sixth, c) y = Mul(d, x)",
        f"{CLIP} u = Mul(x, sixth) y = Mul(u, c)",
        "a = Add(three, x) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
        "k = Mul(x, sixth) a = Add(k, half) c = Clip(a, zero, one) y = Mul(x, c)",
    ],
)
def test_hard_swish(body):
    changed = case.assert_rewritten(hard(body), HardActivation(), FEEDS)
    assert case.operators(changed) == {"HardSwish": 1}


@pytest.mark.parametrize(
    ("body", "slope", "shift"),
    [
        (f"{CLIP} y = Div(c, six)", 1 / 6, 0.5),
        (f"{CLIP} y = Mul(c, sixth)", 1 / 6, 0.5),
        ("k = Mul(x, fifth) a = Add(k, half) c = Clip(a, zero, six) y = Div(c, six)", 0.2 / 6, 0.5 / 6),
        ("a = Sub(x, three) c = Clip(a, zero, six) y = Div(c, six)", 1 / 6, -0.5),
    ],
)
def test_hard_sigmoid(body, slope, shift):
    changed = case.assert_rewritten(hard(body), HardActivation(), FEEDS)
    node = case.node_of(changed, "HardSigmoid")
    assert node.attributes["alpha"].as_float() == pytest.approx(slope)
    assert node.attributes["beta"].as_float() == pytest.approx(shift)


def test_limits_as_attributes():
    body = "a = Add(x, three) c = Clip <min = 0.0, max = 6.0> (a) y = Div(c, six)"
    changed = case.assert_rewritten(hard(body, opset=10), HardActivation(), FEEDS)
    assert case.operators(changed) == {"HardSigmoid": 1}


def test_x_that_is_a_sum_itself():
    body = "b = Add(x, gain) a = Add(b, three) c = Clip(a, zero, six) d = Div(c, six) y = Mul(b, d)"
    changed = case.assert_rewritten(hard(body), HardActivation(), FEEDS)
    assert case.operators(changed) == {"Add": 1, "HardSwish": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Add(x, three) c = Clip(a, low, six) y = Div(c, six)",
         "Clip does not begin at 0 and end at a number above"),
        ("a = Add(x, three) c = Clip(a, zero) y = Div(c, six)",
         "Clip does not begin at 0 and end at a number above"),
        (f"{CLIP} y = Div(c, three)", "the clipped value is not scaled to 1"),
    ],
)  # fmt: skip
def test_refusals(body, reason):
    case.assert_refused(hard(body), HardActivation(), reason)


@pytest.mark.parametrize("opset", [13, 14])
def test_what_has_no_operator_of_its_own_is_a_hard_sigmoid_and_a_product(opset):
    gated = {"HardSigmoid": 1, "Mul": 1}
    body = f"{CLIP} m = Mul(x, c) y = Div(m, six)"
    changed = case.assert_rewritten(hard(body, opset=opset), HardActivation(), FEEDS)
    assert case.operators(changed) == (gated if opset < 14 else {"HardSwish": 1})
    other = hard("a = Add(x, half) c = Clip(a, zero, one) y = Mul(x, c)", opset=opset)
    assert case.operators(case.assert_rewritten(other, HardActivation(), FEEDS)) == gated


@pytest.mark.parametrize(
    "body",
    [
        f"{CLIP} y = Mul(c, gain)",
        f"{CLIP} m = Mul(c, c) y = Div(m, six)",
        f"{CLIP} y = Div(six, c)",
        "b = Add(x, gain) a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Mul(b, d)",
        "c = Relu(x) y = Div(c, six)",
    ],
)
def test_look_alikes(body):
    changed, applied, _ = case.rewrite(hard(body), HardActivation())
    assert "HardSwish" not in case.operators(changed)
    if "b =" not in body:  # there the hard sigmoid inside is one
        assert applied == {}


def test_a_clipped_value_that_others_read_stays():
    body = f"{CLIP} y = Div(c, six) z = Relu(c)"
    case.assert_refused(hard(body, "float[N,4,3,5] y, float[N,4,3,5] z"), HardActivation())


def test_hard_swish_in_int8_is_what_its_parts_are():
    text, weights = case.ZOO["hard-swish-parts"]
    feeds = [{"x": case.random(100 + seed, 4, 4, 8, 8)} for seed in range(2)]
    used = {key: array for key, array in weights.items() if re.search(rf"\b{key}\b", text.split("=>")[1])}
    parts = case.parse(text, used)
    fused, applied, _ = case.rewrite(parts, HardActivation())
    assert applied == {"hard-activation": 1}
    reference = np.concatenate([case.run(parts, item)[0] for item in feeds])
    loss = []
    for model in (parts, fused):
        made = case.quantized(model, case.plan_of(model), feeds)
        loss.append(case.relative_l2(reference, np.concatenate([case.run(made, item)[0] for item in feeds])))
    assert loss[1] <= loss[0] * 1.1
