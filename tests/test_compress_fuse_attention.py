"""FuseAttention: attention with its masks and biases as one operator, and near misses with their reasons."""

import re

import compress_case as case
import msgspec
import numpy as np
import pytest
from edgepress.compress.fuse.multihead import FuseAttention, count_attention
from edgepress.compress.lower import fusion_passes
from edgepress.graph.passes import run_passes
from edgepress.targets.profile import RuntimeOp
from edgepress.targets.registry import load_target

LOWEST = np.float32(np.finfo(np.float32).min)
SIZES = [(1, 3), (2, 5), (3, 1)]
WEIGHTS = {
    "wq": case.random(10, 8, 8), "wk": case.random(11, 8, 8), "wv": case.random(12, 8, 8),
    "heads": np.array([0, 0, 2, 4]), "joined": np.array([0, 0, 8]), "half": np.float32(0.5),
    "two": np.float32(2), "zero": np.float32(0), "lowest": LOWEST, "infinite": np.float32(-np.inf),
    "shallow": np.float32(-1e4), "bias": case.random(13, 1, 2, 1, 1), "rows": np.array([0]),
    "step": np.array(1), "none": np.array(0), "front": np.array([0, 1]), "column": np.array([1]),
    "row": np.array([0]), "vector": case.random(14, 4), "tables": case.random(15, 2, 8, 8),
    "folded": np.array([-1, 5, 4]), "unfolded": np.array([-1, 2, 5, 5]), "back": np.array([-1, 2, 5, 4]),
}  # fmt: skip
Q = "qm = MatMul(x, wq) qr = Reshape(qm, heads) q = Transpose <perm = [0, 2, 1, 3]> (qr)"
K = "km = MatMul(x, wk) kr = Reshape(km, heads) k = Transpose <perm = [0, 2, 3, 1]> (kr)"
V = "vm = MatMul(x, wv) vr = Reshape(vm, heads) v = Transpose <perm = [0, 2, 1, 3]> (vr)"
TAIL = """p = Softmax <axis = -1> (s) c = MatMul(p, v) ct = Transpose <perm = [0, 2, 1, 3]> (c)
    y = Reshape(ct, joined)"""
CAUSAL = """size = Shape <start = 1, end = 2> (x) n = Squeeze(size) r = Range(none, n, step)
    a1 = Unsqueeze(r, column) a0 = Unsqueeze(r, row) ahead = Greater(a0, a1)"""


def attention(
    scores, *, q=Q, k=K, v=V, tail=TAIL, result="float[B,S,8] y", sides="", named="int64[S] r", **weights
):
    body = f"{q} {k} {v} {scores} {tail}"
    known = WEIGHTS | weights
    used = {name: array for name, array in known.items() if re.search(rf"\b{name}\b[,)]", body)}
    inputs = "float[B,S,8] x" + (f", {sides}" if sides else "")
    sizes = f"<{named}>" if named and "Range" in body else ""
    return case.parse(f"({inputs}) => ({result}) {sizes} {{ {body} }}", used)


def feeds(**sides):
    """x of three shapes, with what `sides` makes of each."""
    made = []
    for seed, (batch, size) in enumerate(SIZES):
        item = {"x": case.random(seed, batch, size, 8)}
        made.append(item | {name: make(batch, size) for name, make in sides.items()})
    return made


def padding(batch, size):
    mask = np.ones((batch, 1, 1, size), np.bool_)
    mask[-1, ..., size - size // 2 :] = False
    return mask


PLAIN = "s = MatMul(q, k)"


@pytest.mark.parametrize(
    "scores",
    [
        PLAIN,
        "m = MatMul(q, k) s = Mul(m, half)",
        "m = MatMul(q, k) s = Div(m, two)",
        "m = MatMul(q, k) s = Add(m, bias)",
        "m = MatMul(q, k) d = Div(m, two) s = Add(bias, d)",
    ],
)
def test_without_a_mask(scores):
    changed = case.assert_rewritten(attention(scores), FuseAttention(), feeds())
    assert case.operators(changed)["MultiHeadAttention"] == 1
    assert case.operators(changed)["Transpose"] == 0
    node = case.node_of(changed, "MultiHeadAttention")
    assert node.attributes["num_heads"].as_int() == 2
    assert node.attributes["scale"].as_float() == (0.5 if "half" in scores or "two" in scores else 1.0)


@pytest.mark.parametrize(
    "scores",
    [
        "a = Where(mask, zero, lowest) m = MatMul(q, k) s = Add(m, a)",
        "a = Where(mask, zero, lowest) m = MatMul(q, k) b = Add(m, bias) s = Add(b, a)",
        "m = MatMul(q, k) s = Where(mask, m, lowest)",
        "not = Not(mask) m = MatMul(q, k) s = Where(not, lowest, m)",
        "m = MatMul(q, k) d = Div(m, two) b = Add(d, bias) s = Where(mask, b, lowest)",
        f"{CAUSAL} m = MatMul(q, k) w = Where(ahead, lowest, m) a = Where(mask, zero, lowest) s = Add(w, a)",
    ],
)
def test_with_a_padding_mask(scores):
    before = attention(scores, sides="bool[B,1,1,S] mask")
    changed = case.assert_rewritten(before, FuseAttention(), feeds(mask=padding))
    assert case.operators(changed)["MultiHeadAttention"] == 1


def test_rows_without_any_token_are_as_before():
    before = attention("m = MatMul(q, k) s = Where(mask, m, lowest)", sides="bool[B,1,1,S] mask")
    none = feeds(mask=lambda batch, size: np.zeros((batch, 1, 1, size), np.bool_))
    case.assert_rewritten(before, FuseAttention(), none)
    before = attention(
        "a = Where(mask, zero, lowest) m = MatMul(q, k) s = Add(m, a)", sides="bool[B,1,1,S] mask"
    )
    case.assert_rewritten(before, FuseAttention(), none)


@pytest.mark.parametrize("axes", ["1,1,S,S", "B,1,S,S", "1,2,S,S", "B,2,S,S", "2,S,S", "S,S", "S", "B,1,S,1"])
def test_biases_of_all_layouts(axes):
    scores = "m = MatMul(q, k) s = Add(m, b)"
    before = attention(scores, sides=f"float[{axes}] b")

    def bias(batch, size):
        sizes = {"B": batch, "S": size}
        return case.random(7, *(sizes.get(axis) or int(axis) for axis in axes.split(",")))

    case.assert_rewritten(before, FuseAttention(), feeds(b=bias))


def test_causal_attention():
    scores = f"{CAUSAL} m = MatMul(q, k) d = Mul(m, half) s = Where(ahead, lowest, d)"
    changed = case.assert_rewritten(attention(scores), FuseAttention(), feeds())
    assert "Expand" not in case.operators(changed)


def test_a_mask_of_unknown_shape_is_refused():
    scores = f"{CAUSAL} m = MatMul(q, k) d = Mul(m, half) s = Where(ahead, lowest, d)"
    before = attention(scores, named="")
    case.assert_refused(before, FuseAttention(), SHAPE)


def test_heads_that_are_computed_further_get_a_transpose():
    q, k = f"{Q} z = Relu(q)", f"{K} h = Relu(k)"
    changed = case.assert_rewritten(attention("s = MatMul(z, h)", q=q, k=k), FuseAttention(), feeds())
    assert case.operators(changed)["MultiHeadAttention"] == 1
    swapped = K.replace("[0, 2, 3, 1]> (kr)", "[0, 2, 1, 3]> (kr) kt = Transpose <perm = [0, 1, 3, 2]> (k)")
    changed = case.assert_rewritten(attention("s = MatMul(q, kt)", k=swapped), FuseAttention(), feeds())
    assert "Transpose" not in case.operators(changed)


def test_keys_of_another_length_and_values_of_another_width():
    k = "km = MatMul(other, wk) kr = Reshape(km, heads) k = Transpose <perm = [0, 2, 3, 1]> (kr)"
    v = "vm = MatMul(other, wide) vr = Reshape(vm, three) v = Transpose <perm = [0, 2, 1, 3]> (vr)"
    before = attention(
        "m = MatMul(q, k) s = Where(mask, m, lowest)", k=k, v=v, tail=TAIL.replace("joined", "six"),
        result="float[B,S,6] y", sides="float[B,L,8] other, bool[B,1,1,L] mask",
        wide=case.random(3, 8, 6), three=np.array([0, 0, 2, 3]), six=np.array([0, 0, 6]),
    )  # fmt: skip
    sides = {"other": lambda batch, size: case.random(9, batch, size + 2, 8),
             "mask": lambda batch, size: padding(batch, size + 2)}  # fmt: skip
    case.assert_rewritten(before, FuseAttention(), feeds(**sides))


SIZED = """n0 = Shape(ct) b0 = Gather(n0, none) s0 = Gather(n0, step) b1 = Unsqueeze(b0, rows)
    s1 = Unsqueeze(s0, rows) target = Concat <axis = 0> (b1, s1, rest) y = Reshape(ct, target)"""


def test_sizes_read_from_the_result_as_older_exporters_do():
    tail = TAIL.replace("y = Reshape(ct, joined)", SIZED)
    before = attention(PLAIN, tail=tail, result="float[B,S,E] y", rest=np.array([-1]))
    changed = case.assert_rewritten(before, FuseAttention(), feeds())
    assert case.operators(changed)["Softmax"] == 0
    before = attention(
        PLAIN, tail=f"{tail} z = Neg(n0)", result="float[B,S,E] y, int64[4] z", rest=np.array([-1])
    )
    case.assert_refused(before, FuseAttention(), "the result per head is also used elsewhere")


def test_heads_that_are_joined_otherwise():
    tail = TAIL.replace("joined", "other")
    before = attention(PLAIN, tail=tail, result="float[M,8] y", other=np.array([-1, 8]))
    case.assert_refused(before, FuseAttention(), "the heads are not known to be joined to one axis")


def test_layers_share_the_mask():
    second = re.sub(r"\b(qm|qr|q|km|kr|k|vm|vr|v|m|s|p|c|ct)\b", r"\g<1>2", f"{Q} {K} {V}").replace(
        "(x,", "(y,"
    )
    scores = "a = Where(mask, zero, lowest) m = MatMul(q, k) s = Add(m, a)"
    more = f"""{second} m2 = MatMul(q2, k2) s2 = Add(m2, a) p2 = Softmax <axis = -1> (s2) c2 = MatMul(p2, v2)
        ct2 = Transpose <perm = [0, 2, 1, 3]> (c2) z = Reshape(ct2, joined)"""
    before = attention(scores, tail=f"{TAIL} {more}", result="float[B,S,8] z", sides="bool[B,1,1,S] mask")
    assert count_attention(before) == 2
    fused = before.fork()
    run_passes(fused, fusion_passes(fused, load_target(case.X86), {"attention": True}))
    operators = case.operators(fused)
    assert (operators["MultiHeadAttention"], operators["Expand"], operators["Where"]) == (2, 1, 1)
    for item in feeds(mask=padding):
        np.testing.assert_allclose(case.run(fused, item)[0], case.run(before, item)[0], rtol=1e-5, atol=1e-5)


def test_counting_changes_nothing():
    model = attention(PLAIN)
    before = model.structure_hash()
    assert count_attention(model) == 1
    assert (model.structure_hash(), len(model.records)) == (before, len(model.records))
    assert "MultiHeadAttention" not in case.operators(model)


SHAPE = "a mask or bias is not known to broadcast to [batch, heads, queries, keys]"
OTHER = "the scores come from Relu, not from queries and keys"


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ("m = MatMul(q, k) b = Add(m, bias) s = Mul(b, half)",
         "a mask is added before the scores are scaled"),
        ("m = MatMul(q, k) s = Where(mask, m, infinite)",
         "masked scores are -inf: a row without any token would be NaN"),
        ("m = MatMul(q, k) s = Where(mask, m, shallow)",
         "masked scores are not low enough to be what a sum with them gives"),
        ("m = MatMul(q, k) s = Where(mask, m, bias)", "a Where puts no constant number in place of scores"),
        ("m = MatMul(q, k) s = Relu(m)", OTHER),
        ("m = MatMul(q, k) s = Mul(m, bias)",
         "the scores are multiplied by something that is no constant number"),
        ("m = Relu(q) s = Add(m, bias)", "no operand of an Add comes from queries and keys"),
        ("m = MatMul(q, k) s = Add(m, wide)",
         SHAPE),
    ],
)  # fmt: skip
def test_scores_that_the_operator_does_not_compute(scores, reason):
    used = {"sides": "bool[B,1,1,S] mask"} if "mask" in scores else {}
    used |= {"sides": "float[M,1,1,S] wide"} if "wide" in scores else {}
    if "Relu(q)" in scores:
        scores, used["k"] = "m = Relu(q) s = Add(m, bias)", ""
        used["v"] = "v = Identity(values)"
        used["sides"] = "float[B,2,4,4] values"
    case.assert_refused(attention(scores, **used), FuseAttention(), reason)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (TAIL.replace("axis = -1", "axis = 2"), "the softmax is not over the keys"),
        (TAIL.replace("ct = Transpose <perm = [0, 2, 1, 3]>", "ct = Transpose <perm = [0, 2, 3, 1]>"),
         "the heads are joined in another order"),
        (TAIL + " z = Relu(p)", "the attention weights are also used elsewhere"),
        (TAIL + " z = Relu(c)", "the result per head is also used elsewhere"),
        (TAIL + " z = Relu(s)", "the scores are also used elsewhere"),
        (TAIL.replace("c = MatMul(p, v)", "i = IsNaN(p) g = Where(i, zero, p) c = MatMul(g, v)"),
         "rows without any token are treated apart (Where behind the softmax)"),
    ],
)  # fmt: skip
def test_ends_that_the_operator_does_not_have(tail, reason):
    more = ", float[B,2,S,T] z" if "z =" in tail else ""
    case.assert_refused(attention(PLAIN, tail=tail, result=f"float[B,S,8] y{more}"), FuseAttention(), reason)


def test_heads_in_the_batch_axis_are_refused():
    text = """(float[B,2,5,4] q, float[B,2,4,5] k, float[B,2,5,4] v) => (float[B,5,8] y) {
        q3 = Reshape(q, folded) k3 = Reshape(k, turned) v3 = Reshape(v, folded) m = MatMul(q3, k3)
        p = Softmax <axis = -1> (m) c3 = MatMul(p, v3) c = Reshape(c3, back)
        ct = Transpose <perm = [0, 2, 1, 3]> (c) y = Reshape(ct, joined) }"""
    used = {name: WEIGHTS[name] for name in ("folded", "back", "joined")} | {"turned": np.array([-1, 4, 5])}
    case.assert_refused(case.parse(text, used), FuseAttention(), "the heads are folded into the batch axis")


@pytest.mark.parametrize(
    ("sizes", "fires"),
    [([0, 2, -1, 4], True), ([0, 2, 5, 4], True), ([-1, 2, 5, 4], False), ([5, 2, -1, 4], False)],
)
def test_a_reshape_between_must_keep_the_shape(sizes, fires):
    tail = TAIL.replace("(c)", "(kept)").replace("ct =", "kept = Reshape(c, same) ct =")
    before = attention(PLAIN, tail=tail, result="float[B,S,8] y", same=np.array(sizes))
    feeds = [{"x": case.random(1, 5, 5, 8)}]
    if fires:
        case.assert_rewritten(before, FuseAttention(), feeds)
    else:
        reason = "the result per head is reshaped, and not known to keep its shape"
        case.assert_refused(before, FuseAttention(), reason)


def test_what_is_no_attention():
    text = "(float[B,S,2,4] x) => (float[B,S,8] y) { r = Relu(x) y = Reshape(r, joined) }"
    case.assert_refused(case.parse(text, {"joined": WEIGHTS["joined"]}), FuseAttention())


def test_the_profile_and_the_switch_decide():
    profile = load_target(case.X86)
    entry = profile.runtime_op("MultiHeadAttention")
    others = tuple(item for item in profile.runtime_ops if item is not entry)
    found = {}
    for grade in ("faster", "same"):
        known = RuntimeOp(op="MultiHeadAttention", replaces="parts", grade=grade, source="here",
                          evidence="measured-elsewhere")  # fmt: skip
        asked = msgspec.structs.replace(profile, runtime_ops=(*others, known))
        for switches in ({}, {"attention": True}, {"attention": False}):
            model = attention(PLAIN)
            run_passes(model, fusion_passes(model, asked, switches))
            found[grade, *switches.values()] = case.operators(model)["MultiHeadAttention"]
    assert found == {
        ("faster",): 1, ("faster", True): 1, ("faster", False): 0,
        ("same",): 0, ("same", True): 1, ("same", False): 0,
    }  # fmt: skip
