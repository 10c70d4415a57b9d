"""FuseRotary: rotary position embedding as one operator, and near misses with their reasons."""

import re

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.fuse.rotary import FuseRotary
from edgepress.compress.fuse.scores import ScoreScale

WEIGHTS = {
    "speeds": np.array([1.0, 0.25], np.float32), "zero": np.array([0]), "two": np.array([2]),
    "four": np.array([4]), "far": np.array([2**62]), "last": np.array([-1]), "one": np.array([1]),
    "none": np.array(0), "step": np.array(1), "column": np.array([0, 2]), "head": np.array([1]),
    "half": np.float32(0.5), "wq": case.random(1, 8, 8), "heads": np.array([0, 0, 2, 4]),
    "fixed": case.random(2, 1, 1, 5, 4), "pair": np.array([2, 2]),
}  # fmt: skip
ANGLES = """size = Shape <start = 2, end = 3> (x) n = Squeeze(size) i = Range(none, n, step)
    p = Unsqueeze(i, column) f = Cast <to = 1> (p) a = Mul(f, speeds) aa = Concat <axis = -1> (a, a)
    c3 = Cos(aa) s3 = Sin(aa) cos = Unsqueeze(c3, head) sin = Unsqueeze(s3, head)"""
PARTS = """left = Slice(x, zero, two, last, one) right = Slice(x, two, far, last, one)"""
TURN = "minus = Neg(right) turned = Concat <axis = -1> (minus, left) crossed = Mul(turned, sin)"
ROTATED = f"{ANGLES} {PARTS} {TURN} plain = Mul(x, cos) y = Add(plain, crossed)"
FEEDS = [
    {"x": case.random(seed, *shape)} for seed, shape in enumerate([(1, 2, 3, 4), (2, 2, 5, 4), (3, 2, 1, 4)])
]


def rotary(body=ROTATED, result="float[B,2,S,4] y", inputs="float[B,2,S,4] x", opset=20):
    used = {name: array for name, array in WEIGHTS.items() if re.search(rf"\b{name}\b[,)]", body)}
    text = f"({inputs}) => ({result}) <int64[S] i> {{ {body} }}"
    return case.parse(text, used, opset)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("Mul(turned, sin)", "Mul(sin, turned)"),
        ("Mul(x, cos)", "Mul(cos, x)"),
        ("Add(plain, crossed)", "Add(crossed, plain)"),
        (PARTS, "left, right = Split <axis = -1> (x, pair)"),
        (PARTS, "left, right = Split <axis = 3> (x, pair)"),
    ],
)
def test_one_operator_of_each_spelling(old, new):
    changed = case.assert_rewritten(rotary(ROTATED.replace(old, new)), FuseRotary(), FEEDS)
    operators = case.operators(changed)
    assert operators["RotaryEmbedding"] == 1
    assert {op: operators[op] for op in ("Neg", "Add", "Split")} == {"Neg": 0, "Add": 0, "Split": 0}


def test_the_tables_are_shared_and_scales_pass_through():
    body = ANGLES.replace("start = 2, end = 3> (x)", "start = 1, end = 2> (tokens)")
    for name, weight in (("q", "wq"), ("k", "wk")):
        rotated = f"{PARTS} {TURN} plain = Mul(x, cos) r = Add(plain, crossed)"
        renamed = re.sub(r"\b(left|right|minus|turned|crossed|plain|r|x)\b", rf"\g<1>{name}", rotated)
        body += f" m{name} = MatMul(tokens, {weight}) h{name} = Reshape(m{name}, heads)"
        body += f" x{name} = Transpose <perm = [0, 2, 1, 3]> (h{name}) {renamed}"
    body += " t = Transpose <perm = [0, 1, 3, 2]> (rk) u = Mul(rq, half) y = MatMul(u, t)"
    known = WEIGHTS | {"wk": case.random(4, 8, 8)}
    used = {name: array for name, array in known.items() if re.search(rf"\b{name}\b[,)]", body)}
    before = case.parse(f"(float[B,S,8] tokens) => (float[B,2,S,T] y) <int64[S] i> {{ {body} }}", used)
    changed, applied, reasons = case.rewrite(before, FuseRotary(), ScoreScale())
    assert applied == {"rotary": 2, "score-scale": 1}
    assert reasons == []
    for batch, size in ((1, 3), (2, 5), (3, 1)):
        feeds = {"tokens": case.random(batch, batch, size, 8)}
        np.testing.assert_allclose(
            case.run(changed, feeds)[0], case.run(before, feeds)[0], rtol=1e-5, atol=1e-5
        )


TWICE = "cos or sin does not hold each angle twice"
USED = "a part of the sum is also used elsewhere"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("aa = Concat <axis = -1> (a, a)", "b = Neg(a) aa = Concat <axis = -1> (a, b)", TWICE),
        ("y = Add(plain, crossed)", "y = Add(plain, crossed) z = Relu(turned)", USED),
        ("y = Add(plain, crossed)", "y = Add(plain, crossed) z = Relu(plain)", USED),
    ],
)
def test_refusals(old, new, reason):
    more = ", float[B,2,S,4] z" if "z =" in new else ""
    case.assert_refused(rotary(ROTATED.replace(old, new), f"float[B,2,S,4] y{more}"), FuseRotary(), reason)


def test_tables_that_differ_between_samples_are_refused():
    body = f"{PARTS} {TURN} plain = Mul(x, cos) y = Add(plain, crossed)"
    inputs = "float[B,2,S,4] x, float[B,1,S,4] cos, float[B,1,S,4] sin"
    reason = "cos and sin differ between samples or heads, or their shapes are not known"
    case.assert_refused(rotary(body, inputs=inputs), FuseRotary(), reason)
    case.assert_refused(rotary(body, inputs=inputs.replace("[B,1", "[1,1")), FuseRotary(), TWICE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("minus = Neg(right)", "minus = Relu(right)"),
        ("(minus, left)", "(left, minus)"),
        ("Slice(x, two, far, last, one)", "Slice(x, one, far, last, one)"),
        ("Slice(x, zero, two, last, one)", "Slice(x, two, four, last, one)"),
        ("y = Add", "y = Sub"),
        ("plain = Mul(x, cos)", "other = Relu(x) plain = Mul(other, cos)"),
    ],
)
def test_what_is_no_rotation(old, new):
    body = ROTATED.replace(old, new)
    if "one, far" in body:  # three of four elements: the sum would not have a shape
        body = body.replace("Slice(x, zero, two", "Slice(x, zero, one")
    case.assert_refused(rotary(body), FuseRotary())
