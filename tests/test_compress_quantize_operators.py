"""Operator by operator between two convolutions: integer kernels, needless Q/DQ, numbers, reasons."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.audit import audit
from edgepress.graph.save import save_model
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.ort_runtime import optimised_graph
from edgepress.targets.registry import load_target
from operators_case import C, net


def lowered(body, target, tmp_path, outputs="(float[N,O,P,Q] y)"):
    model, feeds = net(body, outputs)
    profile = load_target(target)
    plan = case.plan_of(model, profile, quantization="static")
    made = case.quantized(model, plan, feeds)
    save_model(made, tmp_path / "m.onnx")
    for shown in feeds:
        wanted = case.run(model, shown)
        for optimise in (False, True):
            pairs = zip(wanted, case.run(made, shown, optimise=optimise), strict=True)
            assert all(case.sqnr_db(a, b) > 25 for a, b in pairs)
    return plan, audit(tmp_path / "m.onnx", plan, profile)


INTEGER = {
    "conv-dilated": (
        "[m] t = Conv <dilations = [2, 2], pads = [2, 2, 2, 2]> (r, u)",
        "QLinearConv 3",
    ),
    "conv-depthwise-dilated": (
        "[m] t = Conv <dilations = [2, 2], pads = [2, 2, 2, 2], group = 8> (r, d)",
        "QLinearConv 3",
    ),
    "conv-grouped": (
        "[m] t = Conv <pads = [1, 1, 1, 1], group = 4> (r, g)",
        "QLinearConv 3",
    ),
    "conv-asymmetric": (
        "[m] t = Conv <pads = [0, 1, 2, 3]> (r, u)",
        "QLinearConv 3",
    ),
    "conv-upper": (
        '[m] t = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (r, u)',
        "QLinearConv 3",
    ),
    "conv-lower": (
        '[m] t = Conv <auto_pad = "SAME_LOWER"> (r, even)',
        "QLinearConv 3",
    ),
    "transposed": (
        "[m] t = ConvTranspose <pads = [1, 1, 1, 1], strides = [2, 2]> (r, even)",
        "QLinearConv 3, Reshape 2",
    ),
    "residual": (
        "[m] s = Conv SAME (r, u) [o] t = Add(s, r)",
        "QLinearConv 3, QLinearAdd 1",
    ),
    "broadcast": (
        "[q] g0 = GlobalAveragePool(r) [o] t = Add(r, g0)",
        "QLinearConv 2, QLinearGlobalAveragePool 1, QLinearAdd 1",
    ),
    "product": (
        "[m] s = Conv SAME (r, u) [o] t = Mul(s, r)",
        "QLinearConv 3, QLinearMul 1",
    ),
    "scaled": (
        "[o] t = Mul(r, chan)",
        "QLinearConv 2, QLinearMul 1",
    ),
    "minus": (
        "[o] t = Sub(r, chan)",
        "QLinearConv 2, QLinearAdd 1",
    ),
    "over": (
        "[o] t = Div(r, three)",
        "QLinearConv 2, QLinearMul 1",
    ),
    "where": (
        "[m] s = Conv SAME (r, u) [o] t = Where(mask, s, r)",
        "QLinearConv 3, QLinearWhere 1",
    ),
    "where-constant": (
        "[o] t = Where(mask, r, zero)",
        "QLinearConv 2, QLinearWhere 1",
    ),
    "concat": (
        "[m] s = Conv SAME (r, u) [o] j = Concat <axis = 1> (s, r) [n] t = Conv(j, wide)",
        "QLinearConv 4, QLinearConcat 1",
    ),
    "concat-constant": (
        "[o] j = Concat <axis = 1> (r, other) [n] t = Conv(j, wide)",
        "QLinearConv 3, QLinearConcat 1",
    ),
    "concat-rows": (
        "[m] s = Conv SAME (r, u) [o] t = Concat <axis = -1> (s, r)",
        "QLinearConv 3, QLinearConcat 1",
    ),
    "split": (
        "e, f = Split <axis = 1, num_outputs = 2> (r) [m] s = Conv(e, half) [n] q = Conv(f, half) [o]"
        " t = Add(s, q)",
        "QLinearConv 4, Split 1, QLinearAdd 1",
    ),
    "split-sizes": (
        "e, f = Split <axis = 1> (r, parts) [m] s = Conv(e, few) [n] q = Conv(f, mostly) [o] t = Add(s, q)",
        "QLinearConv 4, Split 1, QLinearAdd 1",
    ),
    "split-concat": (
        "e, f = Split <axis = 1, num_outputs = 2> (r) [o] t = Concat <axis = 1> (f, e)",
        "QLinearConv 2, Split 1, QLinearConcat 1",
    ),
    "shuffle": (
        "e = Reshape(r, grouped) f = Transpose <perm = [0, 2, 1, 3, 4]> (e) h = Reshape(f, joined) i,"
        " l = Split <axis = 1, num_outputs = 2> (h) [n] q = Conv(i, half) [o] m = Conv(l, half) [k] t"
        " = Add(q, m)",
        "QLinearConv 5, QLinearAdd 1, Split 1",
    ),
    "slice": (
        "t = Slice(r, from, to, hw)",
        "QLinearConv 2, Slice 1",
    ),
    "pad": (
        "t = Pad(r, edge)",
        "QLinearConv 2",
    ),
    "pad-valid": (
        't0 = Pad(r, edge) [m] t = Conv <auto_pad = "VALID"> (t0, even)',
        "QLinearConv 3",
    ),
    "pad-read-twice": (
        "e = Pad(r, edge) [m] q = Conv(e, u) [k] f = Conv(e, u) [n] t = Add(q, f)",
        "QLinearConv 4, QLinearAdd 1, Pad 1",
    ),
    "pad-channels": (
        "e = Pad(r, deeper) [m] t = Conv(e, wide)",
        "QLinearConv 3, Pad 1",
    ),
    "pad-reflect": (
        't = Pad <mode = "reflect"> (r, edge)',
        "QLinearConv 2, Pad 1",
    ),
    "pad-edge": (
        't = Pad <mode = "edge"> (r, edge)',
        "QLinearConv 2, Pad 1",
    ),
    "max-pool": (
        "t = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (r)",
        "QLinearConv 2, NhwcMaxPool 1",
    ),
    "average-pool": (
        "[o] t = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (r)",
        "QLinearConv 3",
    ),
    "average-pool-padded": (
        "[o] t = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (r)",
        "QLinearConv 3",
    ),
    "resize": (
        't = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = '
        '"floor"> (r, , twice)',
        "QLinearConv 2, Resize 1",
    ),
    "depth-to-space": (
        "e = DepthToSpace <blocksize = 2> (r) [m] t = Conv(e, few)",
        "QLinearConv 3, DepthToSpace 1",
    ),
    "space-to-depth": (
        "e = SpaceToDepth <blocksize = 2> (r) [m] t = Conv(e, many)",
        "QLinearConv 3, SpaceToDepth 1",
    ),
    "gather": (
        "t = Gather <axis = 1> (r, turned)",
        "QLinearConv 2, Gather 1",
    ),
    "tile": (
        "t = Tile(r, tiles)",
        "QLinearConv 2, Tile 1",
    ),
    "expand": (
        "[q] e = GlobalAveragePool(r) t = Expand(e, full)",
        "QLinearConv 2, QLinearGlobalAveragePool 1, Expand 1",
    ),
    "squeeze": (
        "e = Unsqueeze(r, one) t = Squeeze(e, one)",
        "QLinearConv 2, Unsqueeze 1, Squeeze 1",
    ),
    "relu-beside": (
        "[m] s = Conv SAME (r, u) [o] e = Add(s, r) [k] f = Relu(e) [n] h = Conv SAME (f, u) [q] t = "
        "Add(e, h)",
        "QLinearConv 4, QLinearAdd 2, QLinearLeakyRelu 1",
    ),
    "leaky": (
        "[m] s = Conv SAME (r, u) [o] t = LeakyRelu(s)",
        "QLinearConv 3, QLinearLeakyRelu 1",
    ),
    "clip": (
        "[m] s = Conv SAME (r, u) t = Clip(s, low, high)",
        "QLinearConv 3",
    ),
    "clip-six": (
        "[m] s = Conv SAME (r, u) t = Clip(s, zero, six)",
        "QLinearConv 3",
    ),
    "sigmoid": (
        "[m] s = Conv SAME (r, u) [o] t = Sigmoid(s)",
        "QLinearConv 3, QLinearSigmoid 1",
    ),
    "silu": (
        "[m] s = Conv SAME (r, u) [k] e = Sigmoid(s) [o] t = Mul(s, e)",
        "QLinearConv 3, QLinearSigmoid 1, QLinearMul 1",
    ),
    "hard-sigmoid": (
        "[m] s = Conv SAME (r, u) [o] t = HardSigmoid <alpha = 0.3, beta = 0.4> (s)",
        "QLinearConv 3, QLinearAdd 1",
    ),
    "hard-swish": (
        "[m] s = Conv SAME (r, u) [o] t = HardSwish(s)",
        "QLinearConv 3, QLinearAdd 1, QLinearMul 1",
    ),
}


@pytest.mark.parametrize("target", [case.X86, case.ARM])
@pytest.mark.parametrize("name", INTEGER)
def test_operators_between_convolutions(name, target, tmp_path):
    body, kernels = INTEGER[name]
    plan, result = lowered(body, target, tmp_path)
    assert {item.form for item in plan.decisions} == {"static"}
    assert (result.silent_floats, result.unplanned) == ((), ())
    found = dict(result.operators)
    assert (found.pop("QuantizeLinear"), found.pop("DequantizeLinear")) == (1, 1)
    found.pop("Transpose")
    assert found == {name: int(times) for name, times in (item.split() for item in kernels.split(", "))}


FLOAT = {
    "minus": (
        "[m] s = Conv SAME (r, u) [o] t = Sub(s, r)",
        "onnxruntime has no integer Sub, and its second operand is no constant",
    ),
    "over-zero": (
        "[o] t = Div(r, zero)",
        "it divides by zero",
    ),
    "largest": (
        "[m] s = Conv SAME (r, u) [o] t = Max(s, r)",
        "x86-64-avx512-vnni has no static kernel for Max",
    ),
    "tanh": (
        "[m] s = Conv SAME (r, u) [o] t = Tanh(s)",
        "x86-64-avx512-vnni has no static kernel for Tanh",
    ),
    "gelu": (
        "[m] s = Conv SAME (r, u) [o] t = Gelu(s)",
        "x86-64-avx512-vnni has no static kernel for Gelu",
    ),
    "softmax": (
        "[m] s = Conv SAME (r, u) [o] t = Softmax <axis = 1> (s)",
        "QLinearSoftmax runs, but took 16.6 %",
    ),
    "linear": (
        '[o] t = Resize <mode = "linear"> (r, , twice)',
        "the runtime interpolates (linear) integers at 0.47 to 0.50x",
    ),
    "cubic": (
        '[o] t = Resize <mode = "cubic"> (r, , twice)',
        "the runtime interpolates (cubic) integers at 0.72 to 0.77x",
    ),
    "pad-three": (
        "[o] t = Pad(r, edge, three)",
        "its border is neither zero nor taken from the image",
    ),
    "slope": (
        "[m] s = Conv SAME (r, u) [o] t = HardSigmoid <alpha = -0.2> (s)",
        "its slope is not above zero",
    ),
}


@pytest.mark.parametrize("name", FLOAT)
def test_what_stays_float_between_integers_says_why(name):
    body, reason = FLOAT[name]
    model, feeds = net(body)
    plan = case.plan_of(model, quantization="static")
    item = case.by_node(plan)["o"]
    assert item.form == "float"
    assert item.reason.startswith(reason)
    if name != "over-zero":
        made = case.quantized(model, plan, feeds)
        wanted, found = case.run(model, feeds[0])[0], case.run(made, feeds[0], optimise=True)[0]
        assert case.sqnr_db(wanted, found) > 25


@pytest.mark.parametrize("target", [case.X86, case.ARM])
@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("alpha = 0.5", "N,32"),
        ("beta = 2.0", "N,32"),
        ("alpha = -2.0, beta = 0.25, transB = 1", "N,32"),
        ("transA = 1, alpha = 3.0", "32,N"),
    ],
)
def test_gemm_takes_its_factors_into_its_constants(attributes, shape, target):
    nodes = f"[g] h = Gemm <{attributes}> (x, w, b) [m] y = Gemm(h, v)"
    text = f"(float[{shape}] x) => (float[N,64] y) {{ {nodes} }}"
    weights = {
        "w": case.random(1, *((48, 32) if "transB" in attributes else (32, 48))),
        "b": case.random(2, 48),
    }
    model = case.parse(text, weights | {"v": case.random(3, 48, 64)})
    feeds = [{"x": case.random(4, *((5, 32) if shape[0] == "N" else (32, 5)))}]
    plan = case.plan_of(model, target, quantization="static")
    assert case.by_node(plan)["g"].form == "static"
    made = case.quantized(model, plan, feeds)
    config = dict(load_target(target).audit_config)
    kinds = [node.op_type for node in optimised_graph(made, SessionOptions(config=config)).graph.all_nodes()]
    assert kinds.count("QGemm") >= 1
    for optimise in (False, True):
        assert case.sqnr_db(case.run(model, feeds[0])[0], case.run(made, feeds[0], optimise=optimise)[0]) > 30
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), weights["w"])


def test_a_hard_swish_saturates_where_the_formula_does():
    """Far outside of [-3, 3] nothing but the output's own step may be off."""
    model, _ = net("[m] s = Conv SAME (r, u) [o] t = HardSwish(s)", "(float[N,O,P,Q] y, float[N,O,P,Q] t)")
    feeds = [{"x": case.random(3, 2, C, 8, 8, scale=20.0)}]
    plan = case.plan_of(model, quantization="static")
    assert case.by_node(plan)["o"].reason == "its result leaves the graph: 8 bits would only cost precision"
    model, _ = net("[m] s = Conv SAME (r, u) [o] t = HardSwish(s)")
    made = case.quantized(model, case.plan_of(model, quantization="static"), feeds)
    gates = [node for node in made.graph if node.op_type == "Add"]
    (reader,) = (use.node for use in gates[0].outputs[0].uses())
    assert reader.op_type == "QuantizeLinear"
    assert float(reader.inputs[1].const_value.numpy()) == np.float32(1 / 255)
    assert int(reader.inputs[2].const_value.numpy()) == 0
    assert case.sqnr_db(case.run(model, feeds[0])[0], case.run(made, feeds[0], optimise=True)[0]) > 30
