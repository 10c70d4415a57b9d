"""QuantizeStatic: where the pairs stand, what is stored, and that the runtime makes integer kernels of it."""

import re

import compress_case as case
import numpy as np
import onnx_ir as ir
import pytest
from edgepress.compress.lower import apply_plan
from edgepress.compress.plan import Decision, Plan
from edgepress.compress.quantize.static import static_layout
from edgepress.graph.errors import DataError, InternalError
from edgepress.graph.scheme import Scheme
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.ort_runtime import optimised_graph
from edgepress.targets.registry import load_target

# The integer kernels of each net in the runtime's optimised graph; float ones are listed in FLOATS.
KERNELS = {
    "relu": {"QLinearConv": 2},
    "no-bias": {"QLinearConv": 2},
    "clip": {"QLinearConv": 2},
    "grouped": {"QLinearConv": 2},
    "depthwise": {"QLinearConv": 3},
    "leaky": {"QLinearConv": 2, "QLinearLeakyRelu": 1},
    "average-pool": {"QLinearConv": 3},
    "max-pool": {"QLinearConv": 2, "NhwcMaxPool": 1},
    "concat": {"QLinearConv": 3, "QLinearConcat": 1},
    "hard-swish": {"QLinearConv": 2, "QLinearAdd": 1, "QLinearMul": 1},
    "hard-swish-parts": {"QLinearConv": 2, "QLinearAdd": 1, "QLinearMul": 2},
    "silu": {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearMul": 1},
    "residual": {"QLinearConv": 3, "QLinearAdd": 1},
    "two-heads": {"QLinearConv": 3},
    "output-in-the-middle": {"QLinearConv": 2, "QLinearLeakyRelu": 1},
    "pool-first": {"QLinearConv": 2},
    "squeeze-excite": {"QLinearConv": 3, "QLinearGlobalAveragePool": 1, "QLinearSigmoid": 1, "QLinearMul": 1},
    "classifier": {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 2},
    "matmul-3d": {"MatMulIntegerToFloat": 2},
}
FLOATS = {
    "output-in-the-middle": {},
    "pool-first": {"MaxPool": 1},
    "classifier": {"Softmax": 1, "Flatten": 1},
    "matmul-3d": {"Add": 2, "BiasGelu": 1},
}
_MOVES = {"Transpose", "QuantizeLinear", "DequantizeLinear"}


def kernels(model, target):
    options = SessionOptions(config=dict(load_target(target).audit_config))
    counts = {}
    for node in optimised_graph(model, options).graph.all_nodes():
        if node.op_type not in _MOVES:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def static(name, target=case.X86):
    model, feeds = case.zoo(name)
    plan = case.plan_of(model, target, quantization="static")
    return model, plan, case.quantized(model, plan, feeds), feeds


@pytest.mark.parametrize("target", [case.X86, case.ARM])
@pytest.mark.parametrize("name", case.ZOO)
def test_the_zoo_runs_in_integer_kernels(name, target):
    model, plan, lowered, feeds = static(name, target)
    assert {item.form for item in plan.decisions} == {"static"}
    assert kernels(lowered, target) == KERNELS[name] | FLOATS.get(name, {})
    assert (lowered.inputs, lowered.outputs) == (model.inputs, model.outputs)
    activation = "UINT8" if target == case.X86 else "INT8"
    quantizers = [node for node in lowered.graph if node.op_type == "QuantizeLinear"]
    assert {node.outputs[0].dtype.name for node in quantizers} == {activation}
    for shown in feeds:
        reference = case.run(model, shown)
        for optimise in (False, True):
            found = case.run(lowered, shown, optimise=optimise)
            assert all(case.sqnr_db(a, b) > 27 for a, b in zip(reference, found, strict=True))


def test_zoo_tables_are_complete():
    assert set(KERNELS) == set(case.ZOO)


def layout_of(name):
    model, _ = case.zoo(name)
    plan = case.plan_of(model, quantization="static")
    return static_layout(model, plan.decisions)


def test_pairs_stand_behind_absorbed_activations_and_share_ranges_across_moves():
    assert layout_of("relu").source == {"x": "x", "r": "r", "y": "y"}
    assert layout_of("clip").observed == ("x", "r", "y")
    assert layout_of("residual").observed == ("x", "r", "d", "u", "y")
    pooled = layout_of("max-pool")
    assert pooled.source == {"x": "x", "r": "r", "q": "r", "y": "y"}
    assert pooled.rerouted == {"r", "q", "y"}
    # Nothing integer makes x: the pool in front of the first convolution keeps its own range.
    assert layout_of("pool-first").source == {"q": "q", "r": "r", "y": "y"}
    assert layout_of("output-in-the-middle").observed == ("x", "a", "r", "y")
    classifier = layout_of("classifier")
    assert classifier.source == {"x": "x", "r": "r", "q": "q", "f": "q", "k": "k", "l": "l"}
    matmul = layout_of("matmul-3d")
    assert matmul.source == {"x": "x", "g": "g"}
    assert matmul.rerouted == set()


def parameters(model, name):
    """(scale, zero point) of the QuantizeLinear that reads a tensor."""
    (node,) = (n for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == name)
    return tuple(value.const_value.numpy() for value in node.inputs[1:])


def test_moved_tensors_have_the_same_scale():
    _, _, lowered, _ = static("max-pool")
    assert [float(p) for p in parameters(lowered, "r")] == [float(p) for p in parameters(lowered, "q")]
    assert int(parameters(lowered, "r")[1]) == 0  # behind a ReLU the lowest integer is zero


def test_float_readers_take_the_integers_result_only_where_integers_make_it():
    text = """(float[N,4,8,8] x) => (float[N,8,8,8] y, float[N,4,8,8] z, float[N,8,8,8] e) {
        [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu(a) z = Exp(x) e = Exp(r)
        [c2] y = Conv <pads = [1, 1, 1, 1]> (r, v) }"""
    model = case.parse(text, {"w": case.random(1, 8, 4, 3, 3), "v": case.random(2, 8, 8, 3, 3)})
    feeds = [{"x": case.random(3, 2, 4, 8, 8, scale=0.3)}]
    plan = case.plan_of(model, quantization="static")
    lowered = case.quantized(model, plan, feeds)
    makers = {node.outputs[0].name: node.inputs[0] for node in lowered.graph if node.op_type == "Exp"}
    assert makers["z"].is_graph_input()  # made in float: read in float
    assert makers["e"].producer().op_type == "DequantizeLinear"
    np.testing.assert_array_equal(case.run(lowered, feeds[0])[1], case.run(model, feeds[0])[1])


def test_a_pool_beside_another_reader_of_the_input():
    """x is quantized for c1, pooled for c2 and an output by the pool: one range, kept names."""
    text = """(float[N,4,8,8] x) => (float[N,8,8,8] y, float[N,8,4,4] z, float[N,4,4,4] p) {
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) [c2] z = Conv <pads = [1, 1, 1, 1]> (p, w)
        [c1] y = Conv <pads = [1, 1, 1, 1]> (x, w) }"""
    model = case.parse(text, {"w": case.random(1, 8, 4, 3, 3)})
    feeds = [{"x": case.random(3, 2, 4, 8, 8)}]
    plan = case.plan_of(model, quantization="static")
    layout = static_layout(model, plan.decisions)
    assert layout.source == {"p": "x", "z": "z", "x": "x", "y": "y"}
    lowered = case.quantized(model, plan, feeds)
    assert lowered.outputs == model.outputs
    assert case.node_of(lowered, "MaxPool").inputs[0].producer().op_type == "DequantizeLinear"
    assert all(
        case.sqnr_db(a, b) > 30
        for a, b in zip(case.run(model, feeds[0]), case.run(lowered, feeds[0]), strict=True)
    )


def test_tied_weights_are_stored_once_and_biases_per_scale():
    _, _, lowered, _ = static("residual")  # c2 and c3 share v and c, at two input scales
    stored = [name for name, value in lowered.graph.initializers.items() if value.const_value.nbytes > 250]
    assert sorted(stored) == ["v.int8", "w.int8"]
    assert {"c.int32", "c.int32_1"} <= set(lowered.graph.initializers)
    text = """(float[N,S,64] x) => (float[N,S,64] y) { [m1] a = MatMul(x, w) [m2] y = MatMul(a, w) }"""
    model = case.parse(text, {"w": case.random(1, 64, 64)})
    feeds = [{"x": case.random(2, 2, 3, 64)}]
    lowered = case.quantized(model, case.plan_of(model, quantization="static"), feeds)
    assert sum(value.const_value.nbytes == 64 * 64 for value in lowered.graph.initializers.values()) == 1


def test_stored_integers_and_biases_against_numpy():
    _, _, lowered, _ = static("relu")
    w, b = case.ZOO["relu"][1]["w"], case.ZOO["relu"][1]["b"]
    scale = (np.abs(w).max(axis=(1, 2, 3)).astype(np.float64) / 127).astype(np.float32)
    initializers = lowered.graph.initializers
    np.testing.assert_array_equal(initializers["w.int8.scale"].const_value.numpy(), scale)
    expected = np.rint(w / scale[:, None, None, None])
    np.testing.assert_array_equal(initializers["w.int8"].const_value.numpy(), expected)
    unit = (scale.astype(np.float64) * float(parameters(lowered, "x")[0])).astype(np.float32)
    bias = initializers["b.int32"].const_value.numpy()
    assert bias.dtype == np.int32
    np.testing.assert_array_equal(bias, np.rint(b.astype(np.float64) / unit))


def test_a_bias_that_would_overflow_widens_its_weight_scale():
    text = "(float[N,4,8,8] x) => (float[N,8,6,6] y) { [c1] y = Conv(x, w, b) }"
    w, b = case.random(1, 8, 4, 3, 3, scale=1e-6), np.zeros(8, np.float32)
    b[3] = 500.0
    model = case.parse(text, {"w": w, "b": b})
    feeds = [{"x": case.random(2, 1, 4, 8, 8, scale=1e-3)}]
    lowered = case.quantized(model, case.plan_of(model, quantization="static"), feeds)
    found = case.run(lowered, feeds[0])[0]
    np.testing.assert_allclose(found[:, 3], 500.0, rtol=0.01)
    stored = lowered.graph.initializers["b.int32"].const_value.numpy()
    assert abs(int(stored[3])) <= 2**30 + 1
    scales = lowered.graph.initializers["w.int8.scale"].const_value.numpy()
    narrow = np.abs(w).max(axis=(1, 2, 3)) / 127
    assert scales[3] > narrow[3] * 100
    np.testing.assert_allclose(np.delete(scales, 3), np.delete(narrow, 3), rtol=1e-6)


def test_a_range_of_nothing_is_harmless():
    model, _ = case.zoo("relu")
    feeds = [{"x": np.zeros((1, 4, 8, 8), np.float32)}]
    lowered = case.quantized(model, case.plan_of(model, quantization="static"), feeds)
    assert np.isfinite(case.run(lowered, feeds[0])[0]).all()


@pytest.mark.parametrize("bias", [(64,), (1, 64), (1,), ()])
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_biases_of_every_shape(bias, transposed):
    """QGemm wants one bias per output: a broadcast one is written out."""
    text = f"""(float[N,4,8,8] x) => (float[N,64] y) {{ [c1] a = Conv(x, w) f = Flatten(a)
        [g1] g = Gemm <transB = {transposed}> (f, m, b) [g2] y = Gemm <transB = {transposed}> (g, n, b) }}"""
    weights = {"w": case.random(1, 2, 4, 5, 5), "b": case.random(2, *bias)}
    weights |= {"m": case.random(3, *((64, 32) if transposed else (32, 64))), "n": case.random(4, 64, 64)}
    model = case.parse(text, weights)
    feeds = [{"x": case.random(5, 4, 4, 8, 8)}]
    lowered = case.quantized(model, case.plan_of(model, quantization="static"), feeds)
    assert kernels(lowered, case.X86) == {"QLinearConv": 1, "Flatten": 1, "QGemm": 2}
    assert case.sqnr_db(case.run(model, feeds[0])[0], case.run(lowered, feeds[0])[0]) > 27


@pytest.mark.parametrize("shape", ["N,64", "2,4,64"])
def test_a_product_that_the_runtime_would_fuse_into_a_float_gemm_gives_integers(shape):
    """2-D or with fixed sizes, MatMul + Add would become a float Gemm: see has_float_output."""
    text = (
        f"(float[{shape}] x) => (float[{shape}] y) {{ [m1] a = MatMul(x, w) g = "
        f"Add(a, b) [m2] y = MatMul(g, v) }}"
    )
    model = case.parse(
        text, {"w": case.random(1, 64, 64), "b": case.random(2, 64), "v": case.random(3, 64, 64)}
    )
    feeds = [{"x": case.random(4, *((3, 64) if shape[0] == "N" else (2, 4, 64)))}]
    plan = case.plan_of(model, quantization="static")
    assert static_layout(model, plan.decisions).rerouted == {"a"}
    lowered = case.quantized(model, plan, feeds)
    assert kernels(lowered, case.X86) == {"QLinearMatMul": 1, "Add": 1, "MatMulIntegerToFloat": 1}
    assert kernels(lowered, case.ARM) == {"QLinearMatMul": 1, "Add": 1, "MatMulIntegerToFloat": 1}


ATTENTION = """(float[N,S,32] x, float[N,1,1,S] mask) => (float[N,S,32] y) {
    [q] q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
    [k] k0 = MatMul(x, wk) k1 = Reshape(k0, heads) k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
    [v] v0 = MatMul(x, wv) v1 = Reshape(v0, heads) v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
    [scores] s = MatMul(q2, k2) m = Add(s, mask) p = Softmax <axis = -1> (m)
    [context] c = MatMul(p, v2) t = Transpose <perm = [0, 2, 1, 3]> (c) j = Reshape(t, joined)
    [o] o0 = MatMul(j, wo) [bias] o1 = Add(o0, b) y = Add(o1, x) }"""


def attention():
    weights = {f"w{name}": case.random(place, 32, 32, scale=0.2) for place, name in enumerate("qkvo")}
    weights |= {"b": case.random(9, 32), "heads": np.array([0, 0, 4, 8]), "joined": np.array([0, 0, 32])}
    model = case.parse(ATTENTION, weights)
    mask = np.zeros((2, 1, 1, 5), np.float32)
    mask[1, :, :, 3:] = np.finfo(np.float32).min
    return model, [{"x": case.random(11, 2, 5, 32), "mask": mask}]


@pytest.mark.parametrize("target", [case.X86, case.ARM])
def test_attention_keeps_its_inner_products_and_mask_in_float(target):
    model, feeds = attention()
    plan = case.plan_of(model, target, quantization="static")
    forms = {item.node: item.form for item in plan.decisions}
    assert forms == {
        "q": "static",
        "k": "static",
        "v": "static",
        "o": "static",
        "scores": "float",
        "context": "float",
    }
    assert set(static_layout(model, plan.decisions).source) == {"x", "j"}
    lowered = case.quantized(model, plan, feeds)
    found = kernels(lowered, target)
    assert found["MatMulIntegerToFloat"] == 4
    assert found.get("MatMul", 0) + found.get("FusedMatMul", 0) == 2
    reference = case.run(model, feeds[0])[0]
    assert case.sqnr_db(reference, case.run(lowered, feeds[0])[0]) > 30


def test_constants_become_stored_integers():
    _, _, lowered, _ = static("hard-swish-parts")
    assert {"three.uint8", "sixth.uint8"} <= set(lowered.graph.initializers)
    assert lowered.graph.initializers["three.uint8"].dtype == ir.DataType.UINT8
    assert not any(
        n.op_type == "QuantizeLinear" and n.inputs[0].const_value is not None for n in lowered.graph
    )


def test_missing_and_unusable_ranges():
    model, feeds = case.zoo("relu")
    plan = case.plan_of(model, quantization="static")
    with pytest.raises(InternalError, match="no calibrated range"):
        apply_plan(model, plan, {})
    ranges = case.true_ranges(model, ("x", "r", "y"), feeds)
    for wrong in ((0.0, np.inf), (np.nan, 1.0), (2.0, 1.0)):
        with pytest.raises(DataError, match="not usable") as raised:
            apply_plan(model, plan, ranges | {"r": wrong})
        assert "'r'" in raised.value.where
        assert "--keep-float" in raised.value.remedy


def test_a_planned_node_without_constant_weight_is_a_bug():
    model = case.parse("(float[N,S,8] x, float[8,8] w) => (float[N,S,8] y) { [m] y = MatMul(x, w) }")
    scheme = Scheme(dtype="int8", symmetric=True, granularity="per-channel", axis=1)
    activation = Scheme(dtype="uint8", symmetric=False)
    decision = Decision(
        node="m",
        op="MatMul",
        group="m",
        form="static",
        activation=activation,
        weight_scheme=scheme,
        reason="",
    )
    plan = Plan(target="t", precision="int8", quantization="static", decisions=(decision,))
    with pytest.raises(InternalError, match="no constant weight"):
        apply_plan(model, plan, {"x": (0.0, 1.0)})


def test_a_plan_without_static_nodes_changes_nothing():
    model, _ = case.zoo("relu")
    plan = case.plan_of(model, quantization="static")
    plan = plan.revert(frozenset(plan.groups), "test")
    lowered, records = apply_plan(model, plan, {})
    assert records == []
    assert lowered.structure_hash() == model.structure_hash()


@pytest.mark.parametrize("opset", [7, 9, 11, 12])
def test_old_operator_sets_are_lifted_and_nodes_keep_their_names(opset):
    text = case.ZOO["relu"][0]
    model = case.parse(text, case.ZOO["relu"][1], opset)
    feeds = [{"x": case.random(1, 2, 4, 8, 8)}]
    lowered = case.quantized(model, case.plan_of(model, quantization="static"), feeds)
    assert lowered.opset == 13
    assert kernels(lowered, case.X86) == {"QLinearConv": 2}


INTEGER_OF = {
    "Conv": "QLinearConv",
    "AveragePool": "QLinearConv",
    "Gemm": "QGemm",
    "MatMul": "MatMulIntegerToFloat",
}


REVERTED = [
    (name, node) for name, (text, _) in case.ZOO.items() for node in re.findall(r"\[(\w+)\] \w+ = ", text)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "node"), REVERTED)
def test_a_node_that_goes_back_to_float_really_computes_in_float(name, node):
    """onnxruntime quantizes the weights of a float Conv between Q/DQ by itself (WeightBiasQuantization)."""
    model, feeds = case.zoo(name)
    plan = case.plan_of(model, quantization="static")
    op = case.by_node(plan)[node].op
    lowered = case.quantized(model, plan.revert(frozenset({node}), "test"), feeds)
    integer = INTEGER_OF.get(op, f"QLinear{op}")
    assert kernels(lowered, case.X86).get(integer, 0) == KERNELS[name][integer] - 1
    assert (lowered.inputs, lowered.outputs) == (model.inputs, model.outputs)
    assert case.sqnr_db(case.run(model, feeds[0])[0], case.run(lowered, feeds[0], optimise=True)[0]) > 27


def test_the_screen_in_front_of_a_float_layer_is_free():
    model, feeds = case.zoo("residual")
    plan = case.plan_of(model, quantization="static").revert(frozenset({"c2"}), "test")
    lowered = case.quantized(model, plan, feeds)
    assert case.operators(lowered)["LeakyRelu"] == 1
    options = SessionOptions()
    nodes = list(optimised_graph(lowered, options).graph.all_nodes())
    assert not any(node.op_type == "LeakyRelu" for node in nodes)
    (float_conv,) = (node for node in nodes if node.op_type in ("Conv", "FusedConv"))
    assert float_conv.attributes["activation"].as_string() == "LeakyRelu"


def test_a_float_bias_product_between_integers():
    """MatMul + Add back in float: the runtime would make a Gemm, and of that an integer one."""
    text = """(float[N,64] x) => (float[N,64] y) { [m0] k = MatMul(x, u) [m1] a = MatMul(k, w) g = Add(a, b)
        [m2] y = MatMul(g, v) }"""
    weights = {"u": case.random(0, 64, 64), "w": case.random(1, 64, 64), "b": case.random(2, 64)}
    model = case.parse(text, weights | {"v": case.random(3, 64, 64)})
    feeds = [{"x": case.random(4, 3, 64)}]
    plan = case.plan_of(model, quantization="static").revert(frozenset({"m1"}), "test")
    lowered = case.quantized(model, plan, feeds)
    assert "QGemm" not in kernels(lowered, case.X86)
    assert sum(kernels(lowered, case.X86).get(op, 0) for op in ("QLinearMatMul", "MatMulIntegerToFloat")) == 2


def test_a_softmax_between_integers_stays_float():
    text = (
        f"{case.IN} => {case.OUT} {{ [c1] a = Conv (x, w) s = Softmax <axis = 1> (a) [c2] y = Conv (s, v) }}"
    )
    model = case.parse(text, {"w": case.random(0, 8, 4, 3, 3), "v": case.random(1, 8, 8, 3, 3)})
    feeds = [{"x": case.random(4, 3, 4, 8, 8)}]
    lowered = case.quantized(model, case.plan_of(model, quantization="static"), feeds)
    assert kernels(lowered, case.X86) == {"QLinearConv": 2, "Softmax": 1, "LeakyRelu": 1}
