"""GemmToMatMul, PackSharedInput and DropNanGuard, and which fusions a target gets."""

import re

import compress_case as case
import msgspec
import numpy as np
import pytest
from edgepress.compress.fuse.attention import DropNanGuard, PackSharedInput
from edgepress.compress.fuse.linear import FlatLinear, GemmToMatMul
from edgepress.compress.lower import fusion_passes
from edgepress.graph.passes import run_passes
from edgepress.targets.profile import RuntimeOp
from edgepress.targets.registry import load_target


def gemm(attributes="", bias=(6,), transposed=False, opset=20):
    operands = "x, w" if bias is None else "x, w, b"
    call = f"Gemm <{attributes}> ({operands})" if attributes else f"Gemm({operands})"
    weights = {"w": case.random(1, *((6, 4) if transposed else (4, 6)))}
    if bias is not None:
        weights["b"] = case.random(2, *bias)
    return case.parse(f"(float[N,4] x) => (float[N,6] y) {{ y = {call} }}", weights, opset)


X = [{"x": case.random(3, 1, 4)}, {"x": case.random(4, 5, 4)}]


@pytest.mark.parametrize("bias", [None, (6,), (1, 6), (1,), ()])
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_becomes_matmul_and_add(bias, transposed):
    model = gemm("transB = 1" if transposed else "", bias, transposed)
    changed = case.assert_rewritten(model, GemmToMatMul(), X)
    assert case.operators(changed) == ({"MatMul": 1, "Add": 1} if bias is not None else {"MatMul": 1})


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ("alpha = 2.0", "it scales its operands"),
        ("beta = 0.5", "it scales its operands"),
    ],
)
def test_gemm_refusals(attributes, reason):
    case.assert_refused(gemm(attributes), GemmToMatMul(), reason)


def test_gemm_of_a_transposed_input_or_computed_weight_is_refused():
    model = case.parse(
        "(float[4,N] x) => (float[N,6] y) { y = Gemm <transA = 1> (x, w) }", {"w": case.random(1, 4, 6)}
    )
    case.assert_refused(model, GemmToMatMul(), "its first operand is transposed")
    model = case.parse("(float[N,4] x, float[4,6] w) => (float[N,6] y) { y = Gemm(x, w) }")
    case.assert_refused(model, GemmToMatMul(), "its weight is computed")


def test_a_tied_weight_is_transposed_once():
    text = (
        "(float[N,4] x) => (float[N,4] y) { a = Gemm <transB = 1> (x, w) b = "
        "Relu(a) y = Gemm <transB = 1> (b, w) }"
    )
    changed = case.assert_rewritten(case.parse(text, {"w": case.random(1, 4, 4)}), GemmToMatMul(), X, times=2)
    assert list(changed.graph.initializers) == ["w.transposed"]


def test_another_weight_of_the_transposed_name_is_not_taken():
    text = "(float[N,4] x) => (float[N,4] y) { a = Gemm <transB = 1> (x, w) n = MatMul(x, v) y = Add(a, n) }"
    model = case.parse(text, {"w": case.random(1, 4, 4), "v": case.random(2, 4, 4)})
    value = model.graph.initializers.pop("v")
    value.name = "w.transposed"
    value.const_value.name = "w.transposed"
    model.graph.register_initializer(value)
    case.assert_rewritten(model, GemmToMatMul(), X)


def test_packed_projections():
    text = """(float[N,S,4] x) => (float[N,S,9] y) {
        q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) n = Relu(k) y = Concat <axis = -1>
        (q, n, v) }"""
    weights = {
        f"layer.w{name}": case.random(i, 4, size)
        for i, (name, size) in enumerate(zip("qkv", (4, 3, 2), strict=True))
    }
    model = case.parse(text, {name.split(".")[1]: array for name, array in weights.items()})
    feeds = [{"x": case.random(1, 2, 3, 4)}, {"x": case.random(2, 1, 5, 4)}]
    changed = case.assert_rewritten(model, PackSharedInput(), feeds)
    assert case.operators(changed) == {"MatMul": 1, "Split": 1, "Relu": 1, "Concat": 1}
    assert case.node_of(changed, "MatMul").inputs[1].shape.numpy() == (4, 9)


def test_packing_ignores_what_is_no_projection():
    text = """(float[2,3,4] x, float[4,4] u) => (float[2,3,4] y) {
        q = MatMul(x, wq) k = MatMul(x, u) t = MatMul(x, wide) a = Add(q, k) y = Add(a, t) }"""
    model = case.parse(text, {"wq": case.random(1, 4, 4), "wide": case.random(2, 1, 4, 4)})
    case.assert_refused(model, PackSharedInput())


def test_packing_refusals():
    text = (
        "(float[N,4] x) => (float[N,4] a, float[N,4] y) { a = MatMul(x, wq) b = MatMul(x, wk) y = Relu(b) }"
    )
    weights = {"wq": case.random(1, 4, 4), "wk": case.random(2, 4, 4)}
    reasons = ["a projection is a graph output"] * 2
    case.assert_refused(case.parse(text, weights), PackSharedInput(), *reasons)
    text = "(float[N,4] x) => (float[N,4] y) { a = MatMul(x, wq) b = MatMul(x, wk) y = Add(a, b) }"
    reasons = ["Split needs operator set 13, the model has 12"] * 2
    case.assert_refused(case.parse(text, weights, 12), PackSharedInput(), *reasons)


LOWEST = np.finfo(np.float32).min
GUARD = "p = Softmax <axis = -1> (s) n = IsNaN(p) y = Where(n, zero, p)"


def guarded(mask, inputs="float[2,3,4] q, float[2,4,3] k", guard=GUARD, **weights):
    text = f"({inputs}) => (float[2,3,3] y) {{ {mask} {guard} }}"
    return case.parse(text, {"zero": np.float32(0), "scale": np.float32(0.25), **weights})


def scores(seed=0):
    return {"q": case.random(seed, 2, 3, 4), "k": case.random(seed + 1, 2, 4, 3)}


@pytest.mark.parametrize(
    "mask",
    [
        "s = MatMul(q, k)",
        "m = MatMul(q, k) s = Mul(m, scale)",
        "m = MatMul(q, k) s = Div(m, scale)",
        "m = MatMul(q, k) s = Add(m, bias)",
        "m = MatMul(q, k) s = Where(allowed, m, lowest)",
        "a = Where(allowed, zero, lowest) m = MatMul(q, k) s = Add(m, a)",
        "f = Cast <to = 1> (ones) i = Sub(one, f) a = Mul(i, lowest) m = MatMul(q, k) s = Add(m, a)",
    ],
)
def test_a_guard_that_never_fires_goes(mask):
    weights = {
        "bias": np.array([0, -1e9, LOWEST], np.float32),
        "allowed": np.array([[True, False, True]]),
        "lowest": LOWEST,
        "one": np.float32(1),
        "ones": np.array([1, 0, 1], np.int64),
    }
    used = {name: array for name, array in weights.items() if name in mask}
    changed = case.assert_rewritten(guarded(mask, **used), DropNanGuard(), [scores(), scores(5)])
    assert "IsNaN" not in case.operators(changed)


INFINITE = "the mask may hold -inf: a fully masked row must become 0, not NaN"


@pytest.mark.parametrize(
    ("mask", "weights"),
    [
        ("m = MatMul(q, k) s = Add(m, bias)", {"bias": np.array([0, -np.inf, 0], np.float32)}),
        ("m = MatMul(q, k) s = Add(m, bias)", {"bias": np.array([0, np.nan, 0], np.float32)}),
        ("m = MatMul(q, k) s = Where(a, m, bias)", {"a": np.array([True]), "bias": np.float32(-np.inf)}),
        # Masked twice by the lowest number is -inf.
        (("m = MatMul(q, k) a = Add(m, bias) s = Add(a, "
"bias)"), {"bias": np.array([0, 0, LOWEST], np.float32)}),
        ("m = MatMul(q, k) s = Div(m, bias)", {"bias": np.float32(0)}),
        ("m = MatMul(q, k) s = Mul(m, bias)", {"bias": np.float32(1e30)}),
        ("m = MatMul(q, k) s = Log(m)", {}),
    ],
)  # fmt: skip
def test_masks_that_may_be_infinite_keep_the_guard(mask, weights):
    case.assert_refused(guarded(mask, **weights), DropNanGuard(), INFINITE)


def test_a_mask_that_is_fed_keeps_the_guard():
    model = guarded("m = MatMul(q, k) s = Add(m, fed)", "float[2,3,4] q, float[2,4,3] k, float[3,3] fed")
    case.assert_refused(model, DropNanGuard(), INFINITE)


@pytest.mark.parametrize(
    "guard",
    [
        "p = Softmax <axis = -1> (s) n = IsNaN(p) y = Where(n, one, p)",
        "p = Softmax <axis = -1> (s) n = IsNaN(s) y = Where(n, zero, p)",
        "p = Softmax <axis = -1> (s) n = IsNaN(p) y = Where(n, p, zero)",
        "p = Relu(s) n = IsNaN(p) y = Where(n, zero, p)",
    ],
)
def test_what_is_no_guard(guard):
    weights = {"one": np.float32(1)} if "one" in guard else {}
    case.assert_refused(guarded("s = MatMul(q, k)", guard=guard, **weights), DropNanGuard())


FLAT = "f = Reshape(x, flat) m = MatMul(f, w)"
BACK = """n = Shape <start = 0, end = 2> (x) t = Concat <axis = 0> (n, six)"""


def conv1d(body, shape="float[B,S,4] x", result="float[B,S,6] y", **weights):
    known = {"flat": np.array([-1, 4]), "six": np.array([6]), "w": case.random(1, 4, 6), **weights}
    used = {name: array for name, array in known.items() if re.search(rf"\b{name}\b[,)]", body)}
    return case.parse(f"({shape}) => ({result}) {{ {BACK} {body} }}", used | {"six": known["six"]})


BATCHES = [{"x": case.random(3, 1, 5, 4)}, {"x": case.random(4, 3, 2, 4)}]


@pytest.mark.parametrize(
    ("body", "operators"),
    [
        (f"{FLAT} y = Reshape(m, t)", {"MatMul": 1}),
        (f"{FLAT} a = Add(m, b) y = Reshape(a, t)", {"MatMul": 1, "Add": 1}),
        (f"{FLAT} a = Add(b, m) y = Reshape(a, t)", {"MatMul": 1, "Add": 1}),
    ],
)
def test_a_product_of_flattened_axes_keeps_them(body, operators):
    changed = case.assert_rewritten(conv1d(body, b=case.random(2, 6)), FlatLinear(), BATCHES)
    assert case.operators(changed) == operators


def test_gpt2s_conv1d_becomes_one_product():
    model = conv1d("f = Reshape(x, flat) g = Gemm(f, w, b) y = Reshape(g, t)", b=case.random(2, 6))
    changed, applied, _ = case.rewrite(model, GemmToMatMul(), FlatLinear())
    assert applied == {"gemm-to-matmul": 1, "flat-linear": 1}
    assert case.operators(changed) == {"MatMul": 1, "Add": 1}
    for feeds in BATCHES:
        wanted, found = case.run(model, feeds)[0], case.run(changed, feeds)[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_heads_that_are_joined_and_flattened_at_once_are_joined_only():
    model = conv1d(f"{FLAT} a = Add(m, b) y = Reshape(a, t)", "float[B,S,2,2] x", b=case.random(2, 6))
    feeds = [{"x": case.random(3, 1, 5, 2, 2)}, {"x": case.random(4, 3, 2, 2, 2)}]
    changed = case.assert_rewritten(model, FlatLinear(), feeds)
    assert case.operators(changed) == {"Reshape": 1, "MatMul": 1, "Add": 1}
    shape = case.node_of(changed, "MatMul").inputs[0].shape  # what decides of INT8 must know the rank
    assert [str(size) for size in shape] == ["B", "S", "4"]


@pytest.mark.parametrize(
    ("body", "shape", "result", "reason"),
    [
        (f"{FLAT} z = Reshape(m, other) y = Relu(z)", "float[2,3,4] x", "float[3,2,6] y",
         "the result has other leading axes than the input"),
        ("f = Reshape(x, wider) m = MatMul(f, v) y = Reshape(m, back)", "float[2,M,4] x", "float[2,6] y",
         "more than the leading axes are flattened"),
        (f"{FLAT} r = Relu(m) y = Reshape(m, t)", "float[B,S,4] x", "float[B,S,6] y, float[M,6] r",
         "the flat result is also used elsewhere"),
    ],
)  # fmt: skip
def test_flat_products_that_stay(body, shape, result, reason):
    model = conv1d(
        body, shape, result, other=np.array([3, 2, 6]), wider=np.array([2, 8]), back=np.array([2, 6]),
        v=case.random(1, 8, 6),
    )  # fmt: skip
    case.assert_refused(model, FlatLinear(), reason)


@pytest.mark.parametrize(
    "body",
    [
        "m = MatMul(x, w) y = Reshape(m, t)",
        "f = Reshape(x, flat) m = MatMul(f, w) r = Relu(m) y = Reshape(r, t)",
        f"{FLAT} a = Add(m, wide) y = Reshape(a, t)",
    ],
)
def test_what_is_no_flat_product(body):
    case.assert_refused(conv1d(body, wide=case.random(5, 1, 6)), FlatLinear())


def test_the_fusions_of_a_target():
    profile = load_target(case.X86)
    linear = gemm()
    convolution = case.parse(
        (
            "(float[1,4,6,6] x) => (float[1,6] y) { c = Conv(x, k) p = "
            "GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, w) }"
        ),
        {"k": case.random(1, 4, 4, 3, 3), "w": case.random(2, 4, 6)},
    )
    assert _rules(fusion_passes(linear, profile, {})) == [
        "conv-batch-norm", "conv-bias", "layer-norm", "rms-norm", "gelu", "nan-guard", "flat-linear",
        "global-pool", "empty-pad", "linear-scale", "joint-shift", "instance-norm", "weight-norm",
        "hard-activation", "zero-mask", "score-scale", "shared-bias", "gemm-to-matmul", "rotary",
    ]  # fmt: skip
    assert "gemm-to-matmul" not in _rules(fusion_passes(convolution, profile, {}))
    assert "packed-qkv" in _rules(fusion_passes(linear, profile, {"packed-qkv": True}))
    off = dict.fromkeys(("gelu", "gemm-to-matmul", "layer-norm"), False)
    assert _rules(fusion_passes(linear, profile, off)) == [
        "conv-batch-norm", "conv-bias", "rms-norm", "nan-guard", "flat-linear", "global-pool",
        "empty-pad", "linear-scale", "joint-shift", "instance-norm", "weight-norm", "hard-activation",
        "zero-mask", "score-scale", "shared-bias", "rotary",
    ]  # fmt: skip
    packed = RuntimeOp(
        op="PackedQKV", domain="edgepress", replaces="3 MatMul", grade="faster", source="timed"
    )
    liking = msgspec.structs.replace(profile, runtime_ops=(packed,))
    assert _rules(fusion_passes(linear, liking, {})).count("packed-qkv") == 1
    assert "packed-qkv" not in _rules(fusion_passes(linear, liking, {"packed-qkv": False}))


def _rules(passes):
    return [rule.name for step in passes for rule in getattr(step, "rules", ())]


ERF = """a = Div(x, root2) e = Erf(a) t = Add(e, one) h = Mul(x, half) y = Mul(h, t)"""
NUMBERS = {"root2": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}


def test_an_old_model_is_lifted_only_for_a_fusion_that_is_there():
    profile = load_target(case.X86)
    gelu = case.parse(f"(float[N,4] x) => (float[N,4] y) {{ {ERF} }}", NUMBERS, 13)
    run_passes(gelu, fusion_passes(gelu, profile, {}))
    assert gelu.opset == 20
    assert case.operators(gelu) == {"Gelu": 1}
    only_erf = case.parse("(float[N,4] x) => (float[N,4] y) { y = Erf(x) }", opset=13)
    run_passes(only_erf, fusion_passes(only_erf, profile, {}))
    assert only_erf.opset == 13


def test_a_model_that_cannot_be_lifted_stays_as_it_is():
    profile = load_target(case.X86)
    tanh = """c = Mul(x, x) d = Mul(c, x) k = Mul(d, cubic) i = Add(x, k) a = Mul(i, slope) e = Tanh(a)
        t = Add(e, one) h = Mul(x, half) y = Mul(h, t)"""
    numbers = NUMBERS | {"cubic": np.float32(0.044715), "slope": np.float32((2 / np.pi) ** 0.5)}
    text = f"(float[1,4] x) => (float[1,4] y) {{ {tanh} }}"
    model = case.parse(text, numbers, 8)
    run_passes(model, fusion_passes(model, profile, {}))
    assert (model.opset, case.operators(model)) == (20, {"Gelu": 1})
    # Statistics per element have no successor in later operator sets.
    norm = "z = BatchNormalization <spatial = 0> (y, g, g, g, g)"
    model = case.parse(
        text.replace("[1,4] y", "[1,4] z").replace("}", norm + " }"),
        numbers | {"g": np.ones(4, np.float32)},
        8,
    )
    run_passes(model, fusion_passes(model, profile, {}))
    assert (model.opset, case.operators(model)["Tanh"]) == (8, 1)
    old_runtime = msgspec.structs.replace(
        profile, runtime=msgspec.structs.replace(profile.runtime, max_opset=19)
    )
    gelu = case.parse(f"(float[N,4] x) => (float[N,4] y) {{ {ERF} }}", NUMBERS, 13)
    run_passes(gelu, fusion_passes(gelu, old_runtime, {}))
    assert gelu.opset == 13
