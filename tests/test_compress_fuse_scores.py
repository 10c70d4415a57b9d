"""ScoreScale, ZeroMask and SharedBias: factors, masks and biases of attention scores."""

import re

import compress_case as case
import numpy as np
import onnx_ir as ir
import pytest
from edgepress.compress.fuse.scores import ScoreScale, SharedBias, ZeroMask
from edgepress.graph.edit import Editor

LOWEST = np.float32(np.finfo(np.float32).min)
FEEDS = [
    {"x": case.random(seed, batch, size, 8)} for seed, (batch, size) in enumerate([(1, 3), (2, 5), (3, 1)])
]
WEIGHTS = {
    "wq": case.random(10, 8, 8), "wk": case.random(11, 8, 8), "wv": case.random(12, 8, 8),
    "bq": case.random(13, 8), "bk": case.random(14, 8), "w3": case.random(15, 8, 24),
    "b3": case.random(16, 24), "heads": np.array([0, 0, 2, 4]), "half": np.float32(0.5),
    "third": np.float32(1 / 3), "two": np.float32(2), "zero": np.float32(0), "tiny": np.float32(1e-20),
    "vector": case.random(17, 4), "table": case.random(18, 2, 4, 6), "sizes": np.array([8, 8, 8]),
    "cos": case.random(19, 1, 1, 1, 4), "sin": case.random(20, 1, 1, 1, 4), "conv": case.random(21, 8, 8, 1),
    "s0": np.array([0]), "s2": np.array([2]), "s4": np.array([4]), "last": np.array([-1]),
}  # fmt: skip


def model(body, result="float[N,H,S,T] y", shape="float[N,S,8] x", **weights):
    known = WEIGHTS | weights
    used = {name: array for name, array in known.items() if re.search(rf"\b{name}\b", body)}
    return case.parse(f"({shape}) => ({result}) {{ {body} }}", used)


def heads(name, weight, bias=""):
    """[N, S, 8] -> [N, 2, S, 4] as {name}, with a bias or without."""
    biased, source = (f"{name}a = Add({name}m, {bias})", f"{name}a") if bias else ("", f"{name}m")
    return (
        f"{name}m = MatMul(x, {weight}) {biased} {name}r = Reshape({source}, heads)"
        f" {name} = Transpose <perm = [0, 2, 1, 3]> ({name}r)"
    )


Q, K = heads("q", "wq", "bq"), heads("k", "wk", "bk")
TURN = "t = Transpose <perm = [0, 1, 3, 2]> (k)"


def names(changed):
    return set(changed.graph.initializers)


@pytest.mark.parametrize(
    "scores",
    [
        "u = Mul(q, half) v = Mul(t, half) y = MatMul(u, v)",
        "u = Mul(third, q) y = MatMul(u, t)",
        "v = Div(t, two) y = MatMul(q, v)",
        "m = MatMul(q, t) y = Div(m, two)",
        "m = MatMul(q, t) y = Mul(half, m)",
        "u = Mul(q, half) v = Mul(t, third) m = MatMul(u, v) y = Div(m, two)",
    ],
)
def test_factors_of_scores_go_into_the_query_projection(scores):
    changed = case.assert_rewritten(model(f"{Q} {K} {TURN} {scores}"), ScoreScale(), FEEDS)
    assert case.operators(changed) == {"MatMul": 3, "Add": 2, "Reshape": 2, "Transpose": 3}
    assert names(changed) == {"wq", "wk", "bq", "bk", "heads"}  # weights keep their names
    np.testing.assert_array_equal(changed.graph.initializers["wk"].const_value.numpy(), WEIGHTS["wk"])


def test_the_model_that_was_forked_keeps_its_weights():
    before = model(f"{Q} {K} {TURN} u = Mul(q, half) y = MatMul(u, t)")
    fingerprint = before.fingerprint()
    changed, applied, _ = case.rewrite(before, ScoreScale())
    assert applied == {"score-scale": 1}
    assert before.fingerprint() == fingerprint != changed.fingerprint()
    np.testing.assert_array_equal(before.graph.initializers["wq"].const_value.numpy(), WEIGHTS["wq"])


def test_a_factor_in_front_of_the_transpose():
    body = f"{Q} {K} s = Mul(k, half) t = Transpose <perm = [0, 1, 3, 2]> (s) y = MatMul(q, t)"
    changed = case.assert_rewritten(model(body), ScoreScale(), FEEDS)
    assert "Mul" not in case.operators(changed)


def test_one_part_of_a_packed_projection_is_scaled():
    body = """m = MatMul(x, w3) a = Add(m, b3) p, r, v = Split <axis = 2> (a, sizes)
        qr = Reshape(p, heads) q = Transpose <perm = [0, 2, 1, 3]> (qr) kr = Reshape(r, heads)
        k = Transpose <perm = [0, 2, 3, 1]> (kr) u = Mul(q, half) w = Mul(k, half) y = MatMul(u, w)
        z = Relu(v)"""
    changed = case.assert_rewritten(model(body, "float[N,H,S,T] y, float[N,S,8] z"), ScoreScale(), FEEDS)
    assert "Mul" not in case.operators(changed)
    weight, bias = (changed.graph.initializers[name].const_value.numpy() for name in ("w3", "b3"))
    np.testing.assert_array_equal(weight, np.concatenate([WEIGHTS["w3"][:, :8] / 4, WEIGHTS["w3"][:, 8:]], 1))
    np.testing.assert_array_equal(bias, np.concatenate([WEIGHTS["b3"][:8] / 4, WEIGHTS["b3"][8:]]))


def test_readers_of_the_shape_do_not_mind():
    body = f"{Q} {K} {TURN} u = Mul(q, half) y = MatMul(u, t) z = Shape(q) n = Shape(u)"
    changed = case.assert_rewritten(
        model(body, "float[N,H,S,T] y, int64[4] z, int64[4] n"), ScoreScale(), FEEDS
    )
    assert "Mul" not in case.operators(changed)


def test_through_a_rotary_embedding():
    turned = """a = Mul(q, cos) l = Slice(q, s0, s2, last) r = Slice(q, s2, s4, last) n = Neg(r)
        c = Concat <axis = -1> (n, l) d = Mul(sin, c) e = Add(a, d)"""
    body = f"{Q} {K} {TURN} {turned} u = Mul(e, half) y = MatMul(u, t)"
    changed = case.assert_rewritten(model(body), ScoreScale(), FEEDS)
    assert case.operators(changed)["Mul"] == 2
    np.testing.assert_array_equal(changed.graph.initializers["bq"].const_value.numpy(), WEIGHTS["bq"] / 2)


def test_a_convolution_is_a_projection_too():
    body = f"{K} {TURN} xt = Transpose <perm = [0, 2, 1]> (x) c = Conv(xt, conv, bq)"
    body += " ct = Transpose <perm = [0, 2, 1]> (c) cr = Reshape(ct, heads)"
    body += " q = Transpose <perm = [0, 2, 1, 3]> (cr) u = Mul(q, third) y = MatMul(u, t)"
    changed = case.assert_rewritten(model(body), ScoreScale(), FEEDS)
    assert "Mul" not in case.operators(changed)


def test_keys_that_come_of_constants_are_scaled_when_the_model_is_loaded():
    body = f"{Q} n = Exp(table) g = Relu(q) m = MatMul(g, n) y = Div(m, two)"
    changed = case.assert_rewritten(model(body), ScoreScale(), FEEDS)
    scaled = case.node_of(changed, "Mul")
    assert scaled.inputs[0].producer().op_type == "Exp"


def test_two_factors_become_one_where_no_projection_is():
    body = f"{Q} {K} g = Relu(q) h = Relu(k) t = Transpose <perm = [0, 1, 3, 2]> (h)"
    body += " u = Mul(g, half) v = Mul(t, third) y = MatMul(u, v)"
    before = model(body)
    changed, applied, reasons = case.rewrite(before, ScoreScale())
    assert applied == {"score-scale": 1}
    assert reasons == ["no linear layer is in front of it"]
    assert case.operators(changed)["Mul"] == 1
    for feeds in FEEDS:
        np.testing.assert_allclose(
            case.run(changed, feeds)[0], case.run(before, feeds)[0], rtol=1e-5, atol=1e-5
        )


USED = "the unscaled values are also used elsewhere"
TIED = "the projection's weight is also used elsewhere (tied weights)"


@pytest.mark.parametrize(
    ("body", "result", "reason"),
    [
        (f"{Q} {K} {TURN} g = Relu(k) u = Mul(q, half) y = MatMul(u, t) z = Relu(q)",
         "float[N,H,S,T] y, float[N,H,S,E] z, float[N,H,S,F] g", USED),
        (f"{heads('q', 'wq', 'bq')} {heads('k', 'wq', 'bk')} {TURN} u = Mul(q, half) y = MatMul(u, t)",
         "float[N,H,S,T] y", TIED),
        (f"{Q} {K} {TURN} u = Mul(q, zero) y = MatMul(u, t)", "float[N,H,S,T] y",
         "the factor is 0, or too small or large for float32 weights"),
        (f"{Q} {K} {TURN} u = Mul(q, tiny) y = MatMul(u, t)", "float[N,H,S,T] y",
         "the factor is 0, or too small or large for float32 weights"),
        ("u = Mul(x, half) g = Transpose <perm = [0, 2, 1]> (x) y = MatMul(u, g)", "float[N,S,T] y",
         "no linear layer is in front of it"),
    ],
)  # fmt: skip
def test_where_the_factor_stays(body, result, reason):
    case.assert_refused(model(body, result), ScoreScale(), reason)


@pytest.mark.parametrize(
    "scores",
    [
        "y = MatMul(q, t)",
        "u = Mul(q, vector) y = MatMul(u, t)",
        "u = Mul(q, q) y = MatMul(u, t)",
        "v = Div(two, t) y = MatMul(q, v)",
        "u = Mul(q, half) r = Relu(u) y = MatMul(r, t)",
    ],
)
def test_what_is_no_factor(scores):
    case.assert_refused(model(f"{Q} {K} {TURN} {scores}"), ScoreScale())


def test_a_projection_that_is_a_graph_output_keeps_its_values():
    body = f"{Q} {K} {TURN} u = Mul(q, half) y = MatMul(u, t)"
    changed = case.assert_rewritten(model(body, "float[N,H,S,T] y, float[N,S,8] qa"), ScoreScale(), FEEDS)
    np.testing.assert_array_equal(changed.graph.initializers["wq"].const_value.numpy(), WEIGHTS["wq"])


def test_a_bias_that_others_read_is_copied():
    body = f"{heads('q', 'wq', 'bq')} {heads('k', 'wk', 'bq')} {TURN} u = Mul(q, half) y = MatMul(u, t)"
    changed = case.assert_rewritten(model(body), ScoreScale(), FEEDS)
    assert len(names(changed)) == 5


def test_a_weight_on_disk_is_not_read():
    before = model(f"{Q} {K} {TURN} u = Mul(q, half) y = MatMul(u, t)")
    weight = before.graph.initializers["wq"]
    reads = []
    array = weight.const_value.numpy()

    def read():
        reads.append(1)
        return ir.tensor(array)

    weight.const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape), name="wq")
    changed = before.fork()
    product = [node for node in changed.graph if node.op_type == "MatMul"][-1]
    assert ScoreScale().apply(product, Editor(changed)) is True
    assert reads == []
    np.testing.assert_array_equal(changed.graph.initializers["wq"].const_value.numpy(), array / 2)


SCORES = {"s": case.random(1, 2, 2, 3, 5), "m": case.random(2, 2, 1, 3, 5)}


def masked(body, result="float[N,2,S,T] y", **weights):
    known = {
        "true": np.ones((1, 1, 3, 1), np.bool_), "some": np.array([[[[True], [False], [True]]]]),
        "zero": np.float32(0), "lowest": LOWEST, "zeros": np.zeros((1, 2, 3, 5), np.float32),
        "one": np.float32(1), "none": np.int64(0), "step": np.int64(1), "axes": np.array([0, 1, 3]),
        "first": np.array([0]), **weights,
    }  # fmt: skip
    used = {name: array for name, array in known.items() if re.search(rf"\b{name}\b[,)]", body)}
    return case.parse(f"(float[N,2,S,T] s, float[N,1,S,T] m) => ({result}) {{ {body} u = Relu(m) }}", used)


WIDE = "n = Shape(m) e = Expand(true, n)"


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        (f"{WIDE} a = Where(e, zero, lowest) y = Add(s, a)", 0),
        (f"{WIDE} a = Where(e, zero, lowest) y = Add(a, s)", 0),
        ("a = Where(true, zero, lowest) y = Add(s, a)", 0),
        (f"{WIDE} f = And(e, true) a = Where(f, zero, lowest) b = Add(m, a) y = Add(s, b)", 1),
        ("n = Shape(s) e = Expand(zero, n) y = Add(s, e)", 0),
        ("""d = Shape <start = 2, end = 3> (s) q = Squeeze(d) r = Range(none, q, step)
            u1 = Unsqueeze(r, axes) g = GreaterOrEqual(u1, none) a = Where(g, zero, lowest)
            y = Add(s, a)""", 0),
    ],
)  # fmt: skip
def test_a_mask_that_hides_nothing_goes(mask, left):
    before = masked(mask, "float[N,2,S,T] y, float[N,1,S,T] u")
    changed = case.assert_rewritten(before, ZeroMask(), [SCORES])
    assert case.operators(changed)["Add"] == left
    assert "Where" not in case.operators(changed)


@pytest.mark.parametrize(
    "mask",
    [
        "a = Where(some, zero, lowest) y = Add(s, a)",
        "a = Where(true, lowest, zero) y = Add(s, a)",
        "a = Where(true, one, lowest) y = Add(s, a)",
        "y = Add(s, m)",
        "y = Add(s, zeros)",  # a table of the model that happens to be zero: another training may fill it
        "a = Where(true, zero, lowest) b = Add(m, a) y = Mul(s, b)",
    ],
)
def test_other_masks_stay(mask):
    case.assert_refused(masked(mask, "float[N,2,S,T] y, float[N,1,S,T] u"), ZeroMask())


def test_a_zero_that_widens_the_scores_stays():
    text = "(float[1,1,S,T] s, float[N,1,S,T] m) => (float[N,1,S,T] y) { n = Shape(m) e = Expand(zero, n)"
    case.assert_refused(case.parse(text + " y = Add(s, e) }", {"zero": np.float32(0)}), ZeroMask())


LAYERS = "a = Add(s, b) y = Add(a, m) r = Relu(y) c = Add({0}) z = Add({1})"
SHARED = [
    {"s": case.random(seed, batch, 2, size, size), "b": case.random(9, 1, 2, size, size),
     "m": case.random(8, batch, 1, 1, size)}
    for seed, (batch, size) in enumerate([(1, 3), (2, 5), (3, 1)])
]  # fmt: skip


def layers(body, bias="float[1,2,S,S] b"):
    text = (
        f"(float[N,2,S,S] s, {bias}, float[N,1,1,S] m) => (float[N,2,S,S] y, float[N,2,S,S] z) {{ {body} }}"
    )
    return case.parse(text)


@pytest.mark.parametrize("sums", [("r, b", "c, m"), ("b, r", "m, c")])
def test_a_bias_and_a_mask_of_two_layers_are_summed_once(sums):
    changed = case.assert_rewritten(layers(LAYERS.format(*sums)), SharedBias(), SHARED)
    assert case.operators(changed) == {"Add": 3, "Relu": 1}
    total = next(node for node in changed.graph if node.op_type == "Add")
    assert [str(size) for size in total.outputs[0].shape] == ["N", "2", "S", "S"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(s, b) y = Add(a, m) z = Relu(y)",  # one layer
        LAYERS.format("r, r", "c, m"),  # another bias
        LAYERS.format("r, b", "c, b"),  # no mask
        "a = Add(s, b) y = Add(a, m) r = Relu(a) c = Add(r, b) z = Add(c, m)",  # the first sum is read
    ],
)
def test_what_is_not_shared(body):
    case.assert_refused(layers(body), SharedBias())


def test_lowest_masks_give_the_same_softmax():
    body = "a = Add(s, b) t = Add(a, m) y = Softmax(t) c = Add(y, b) u = Add(c, m) z = Softmax(u)"
    mask = np.where(np.array([True, False, True, False, True]), np.float32(0), LOWEST).reshape(1, 1, 1, 5)
    feeds = [SHARED[1] | {"m": np.repeat(mask, 2, 0)}, SHARED[1] | {"m": np.full((2, 1, 1, 5), LOWEST)}]
    case.assert_rewritten(layers(body), SharedBias(), feeds)
