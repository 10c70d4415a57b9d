"""FoldBatchNorm and FoldBias: what stands behind a convolution goes into its weights."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.fuse.convolution import FoldBatchNorm, FoldBias


def statistics(channels, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "gamma": rng.normal(1.0, 0.3, channels).astype(np.float32),
        "beta": rng.normal(0.0, 0.5, channels).astype(np.float32),
        "mean": rng.normal(0.0, 0.5, channels).astype(np.float32),
        "var": rng.uniform(0.2, 2.0, channels).astype(np.float32),
    }


BN = "BatchNormalization(c, gamma, beta, mean, var)"


def conv(*, op="Conv", attributes="", bias=False, weight=(6, 4, 3, 3), channels=6, norm=BN, opset=15, **more):
    operands = "x, w, b" if bias else "x, w"
    call = f"{op} <{attributes}> ({operands})" if attributes else f"{op}({operands})"
    text = f"(float[N,4,H,W] x) => (float[N,{channels},P,Q] y) {{ c = {call} y = {norm} }}"
    weights = {"w": case.random(5, *weight, scale=0.4), "b": case.random(6, channels)}
    return case.parse(text, weights | statistics(channels) | more, opset)


FEEDS = [{"x": case.random(7, 1, 4, 6, 6)}, {"x": case.random(8, 3, 4, 5, 7)}]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"attributes": "pads = [1, 1, 1, 1]"},
        {"attributes": "strides = [2, 2]"},
        {"attributes": "group = 2", "weight": (6, 2, 3, 3)},
        {"attributes": "group = 4", "weight": (4, 1, 3, 3), "channels": 4},
        {"attributes": "dilations = [2, 2]"},
        {"op": "ConvTranspose", "weight": (4, 6, 3, 3)},
        {"op": "ConvTranspose", "attributes": "strides = [2, 2]", "weight": (4, 6, 2, 2)},
    ],
)
def test_batch_norm_folds_into_every_convolution(shape, bias):
    model = conv(**shape, bias=bias)
    changed = case.assert_rewritten(model, FoldBatchNorm(), FEEDS, tolerance=2e-5)
    assert case.operators(changed) == {shape.get("op", "Conv"): 1}
    assert set(model.graph.initializers) >= {"w", "gamma"}  # the original is untouched


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (6,), (1, 6), (1,), ()])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_batch_norm_folds_into_gemm(transposed, bias, alpha):
    operands = "x, w" if bias is None else "x, w, b"
    text = f"""(float[N,4] x) => (float[N,6] y) {{
        c = Gemm <transB = {transposed}, alpha = {alpha}> ({operands}) y = {BN} }}"""
    weights = {"w": case.random(1, *((6, 4) if transposed else (4, 6)))}
    if bias is not None:
        weights["b"] = case.random(2, *bias)
    model = case.parse(text, weights | statistics(6), 15)
    case.assert_rewritten(model, FoldBatchNorm(), [{"x": case.random(3, 5, 4)}], tolerance=2e-5)


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 18])
def test_batch_norm_of_every_operator_set(opset):
    case.assert_rewritten(conv(opset=opset), FoldBatchNorm(), FEEDS, tolerance=2e-5)


def test_bias_then_batch_norm_become_one_convolution():
    text = f"(float[N,4,H,W] x) => (float[N,6,P,Q] y) {{ k = Conv(x, w) c = Add(k, b) y = {BN} }}"
    weights = {"w": case.random(1, 6, 4, 3, 3), "b": case.random(2, 6, 1, 1)}
    model = case.parse(text, weights | statistics(6), 15)
    changed, applied, refused = case.rewrite(model, FoldBatchNorm(), FoldBias())
    assert applied == {"conv-bias": 1, "conv-batch-norm": 1}
    assert refused == []
    assert case.operators(changed) == {"Conv": 1}
    for feeds in FEEDS:
        np.testing.assert_allclose(case.run(changed, feeds)[0], case.run(model, feeds)[0], atol=5e-5)


def test_a_tied_weight_keeps_its_other_reader():
    text = f"""(float[N,4,H,W] x) => (float[N,6,P,Q] y, float[N,6,P,Q] z) {{
        c = Conv(x, w) y = {BN} n = Neg(x) z = Conv(n, w) }}"""
    model = case.parse(text, {"w": case.random(1, 6, 4, 3, 3)} | statistics(6), 15)
    case.assert_rewritten(model, FoldBatchNorm(), FEEDS, tolerance=2e-5)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (
            {"norm": BN.replace("(c", " <training_mode = 0> (x"), "channels": 4},
            "there is no convolution in front of it",
        ),
        ({"op": "ConvTranspose", "attributes": "group = 2", "weight": (4, 3, 3, 3)},
         "grouped transposed convolutions keep their channels in two axes"),
        ({"var": np.full(6, -1.0, np.float32)}, "its variance is not positive"),
        ({"gamma": np.full(6, np.inf, np.float32)}, "its variance is not positive"),
    ],
)  # fmt: skip
def test_refusals(what, reason):
    case.assert_refused(conv(**what), FoldBatchNorm(), reason)


def test_training_mode_is_refused_in_every_operator_set():
    text = """(float[N,4,H,W] x) => (float[N,6,P,Q] y, float[6] m2) { c = Conv(x, w)
        y, m2, v2 = BatchNormalization <training_mode = 1> (c, gamma, beta, mean, var) }"""
    weights = {"w": case.random(1, 6, 4, 3, 3)} | statistics(6)
    case.assert_refused(case.parse(text, weights, 15), FoldBatchNorm(), "it runs in training mode")
    old = """(float[N,4,H,W] x) => (float[N,6,P,Q] y, float[6] m2) { c = Conv(x, w)
        y, m2, v2, sm, sv = BatchNormalization(c, gamma, beta, mean, var) }"""
    case.assert_refused(case.parse(old, weights, 9), FoldBatchNorm(), "it runs in training mode")
    older = "(float[N,4,H,W] x) => (float[N,6,P,Q] y) { c = Conv(x, w) y = BatchNormalization "
    tail = " (c, gamma, beta, mean, var) }"
    case.assert_refused(case.parse(older + tail, weights, 6), FoldBatchNorm(), "it runs in training mode")
    tested = case.parse(older + "<is_test = 1>" + tail, weights, 6)
    assert case.rewrite(tested, FoldBatchNorm())[1] == {"conv-batch-norm": 1}


def test_other_readers_and_outputs_are_refused():
    for extra in ("z = Neg(c)", ""):
        output = "z" if extra else "c"
        text = f"""(float[N,4,H,W] x) => (float[N,6,P,Q] y, float[N,6,P,Q] {output}) {{
            c = Conv(x, w) y = {BN} {extra} }}"""
        model = case.parse(text, {"w": case.random(1, 6, 4, 3, 3)} | statistics(6), 15)
        case.assert_refused(model, FoldBatchNorm(), "the convolution's result has other readers")


def test_computed_weights_and_statistics_are_refused():
    text = f"(float[N,4,H,W] x, float[6,4,3,3] w) => (float[N,6,P,Q] y) {{ c = Conv(x, w) y = {BN} }}"
    model = case.parse(text, statistics(6), 15)
    case.assert_refused(model, FoldBatchNorm(), "the convolution's weights are computed")
    text = f"(float[N,4,H,W] x, float[6] gamma) => (float[N,6,P,Q] y) {{ c = Conv(x, w) y = {BN} }}"
    rest = {name: array for name, array in statistics(6).items() if name != "gamma"}
    model = case.parse(text, rest | {"w": case.random(1, 6, 4, 3, 3)}, 15)
    case.assert_refused(model, FoldBatchNorm(), "its statistics are computed")


def test_a_scaled_gemm_bias_is_refused():
    text = f"(float[N,4] x) => (float[N,6] y) {{ c = Gemm <beta = 2.0> (x, w, b) y = {BN} }}"
    model = case.parse(text, {"w": case.random(1, 4, 6), "b": case.random(2, 6)} | statistics(6), 15)
    case.assert_refused(model, FoldBatchNorm(), "the Gemm scales its bias")


def test_statistics_per_element_are_refused():
    """Before operator set 9, spatial = 0 asked for statistics per element."""
    norm = BN.replace("(", " <spatial = 0> (")
    whole = {name: np.ones((6, 4, 4), np.float32) for name in ("gamma", "beta", "mean", "var")}
    text = f"(float[N,4,6,6] x) => (float[N,6,4,4] y) {{ c = Conv(x, w) y = {norm} }}"
    model = case.parse(text, {"w": case.random(1, 6, 4, 3, 3)} | whole, 7)
    case.assert_refused(model, FoldBatchNorm(), "it has not one factor per output channel")


def test_a_convolution_outside_of_the_branch_stays_outside():
    text = f"""(bool f, float[1,4,5,5] x) => (float[1,6,3,3] y) {{ c = Conv(x, w)
        y = If (f) <then_branch = t () => (float[1,6,3,3] y1) {{ y1 = {BN} }},
                    else_branch = e () => (float[1,6,3,3] y2) {{ y2 = Identity(zero) }}> }}"""
    weights = {"w": case.random(1, 6, 4, 3, 3), "zero": np.zeros((1, 6, 3, 3), np.float32)} | statistics(6)
    case.assert_refused(
        case.parse(text, weights, 15), FoldBatchNorm(), "there is no convolution in front of it"
    )


def test_inside_of_a_branch():
    text = f"""(bool f, float[1,4,5,5] x) => (float[1,6,3,3] y) {{
        y = If (f) <then_branch = t () => (float[1,6,3,3] y1) {{ c = Conv(x, w) y1 = {BN} }},
                    else_branch = e () => (float[1,6,3,3] y2) {{ k = Conv(x, w) y2 = Add(b, k) }}> }}"""
    weights = {"w": case.random(1, 6, 4, 3, 3), "b": case.random(2, 6, 1, 1)} | statistics(6)
    model = case.parse(text, weights, 15)
    feeds = [{"f": np.array(flag), "x": case.random(0, 1, 4, 5, 5)} for flag in (True, False)]
    case.assert_rewritten(model, FoldBatchNorm(), feeds, tolerance=2e-5)
    case.assert_rewritten(model, FoldBias(), feeds, tolerance=2e-5)


def biased(add, shape, *, op="Conv", attributes="", weight=(6, 4, 3, 3), channels=6):
    call = f"{op} <{attributes}> (x, w)" if attributes else f"{op}(x, w)"
    text = f"(float[N,4,H,W] x) => (float[N,{channels},P,Q] y) {{ c = {call} y = {add} }}"
    return case.parse(text, {"w": case.random(1, *weight), "b": case.random(2, *shape)}, 15)


@pytest.mark.parametrize("add", ["Add(c, b)", "Add(b, c)"])
@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
def test_bias_folds(add, shape):
    case.assert_rewritten(biased(add, shape), FoldBias(), FEEDS)


@pytest.mark.parametrize(
    "what",
    [
        {"op": "ConvTranspose", "weight": (4, 6, 3, 3)},
        {"op": "ConvTranspose", "weight": (4, 3, 3, 3), "attributes": "group = 2"},
        {"attributes": "group = 2", "weight": (6, 2, 3, 3)},
    ],
)
def test_bias_folds_with_groups_and_transposed(what):
    case.assert_rewritten(biased("Add(c, b)", (6, 1, 1), **what), FoldBias(), FEEDS)


def test_one_number_is_the_bias_of_one_channel():
    model = biased("Add(c, b)", (), weight=(1, 4, 3, 3), channels=1)
    case.assert_rewritten(model, FoldBias(), FEEDS)


@pytest.mark.parametrize("shape", [(), (1,), (6, 4, 4), (1, 1, 1, 4), (4, 1)])
def test_a_wrong_broadcast_is_no_bias(shape):
    text = "(float[1,4,6,6] x) => (float[1,6,4,4] y) { c = Conv(x, w) y = Add(c, b) }"
    model = case.parse(text, {"w": case.random(1, 6, 4, 3, 3), "b": case.random(2, *shape)}, 15)
    case.assert_refused(model, FoldBias(), "it does not add one number per channel")


def test_a_bias_that_adds_axes_is_refused():
    text = "(float[1,4,6,6] x) => (float[2,1,6,4,4] y) { c = Conv(x, w) y = Add(c, b) }"
    model = case.parse(text, {"w": case.random(1, 6, 4, 3, 3), "b": case.random(2, 2, 1, 6, 1, 1)})
    case.assert_refused(model, FoldBias(), "the shapes are not known")


def test_bias_refusals():
    text = "(float[N,4,H,W] x) => (float[N,6,P,Q] y) { c = Conv(x, w, b0) y = Add(c, b) }"
    weights = {"w": case.random(1, 6, 4, 3, 3), "b": case.random(2, 6, 1, 1), "b0": case.random(3, 6)}
    case.assert_refused(case.parse(text, weights), FoldBias(), "the convolution has a bias already")
    text = "(float[N,4,H,W] x) => (float[N,6,P,Q] y, float[N,6,P,Q] c) { c = Conv(x, w) y = Add(c, b) }"
    case.assert_refused(case.parse(text, weights), FoldBias(), "the convolution's result has other readers")
    text = "(float[N,4,H,W] x) => (float[N,6,P,Q] y) { c = Conv(x, w) y = Add(c, c) }"
    case.assert_refused(case.parse(text, weights), FoldBias())


def test_float16_folds_in_its_own_type():
    text = f"(float16[N,4,H,W] x) => (float16[N,6,P,Q] y) {{ c = Conv(x, w) y = {BN} }}"
    weights = {"w": case.random(1, 6, 4, 3, 3, scale=0.2)} | statistics(6)
    model = case.parse(text, {name: array.astype(np.float16) for name, array in weights.items()}, 15)
    changed, applied, _ = case.rewrite(model, FoldBatchNorm())
    assert applied == {"conv-batch-norm": 1}
    assert {value.dtype.name for value in changed.graph.initializers.values()} == {"FLOAT16"}
