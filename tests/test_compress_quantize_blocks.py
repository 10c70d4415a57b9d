"""Blocks of known architectures: only the entry and the exit keep Q/DQ, everything between is integer."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.audit import audit
from edgepress.compress.lower import fusion_passes
from edgepress.graph.passes import run_passes
from edgepress.graph.save import save_model
from edgepress.targets.registry import load_target

PAD = "pads = [1, 1, 1, 1]"
HALF = "kernel_shape = [2, 2], strides = [2, 2]"


def weight(seed, *shape):
    return case.random(seed, *shape, scale=float(np.prod(shape[1:])) ** -0.5)


def resnet():
    """A basic block, and one that halves the image with a projection."""
    body = f"""[c0] a0 = Conv <{PAD}> (x, w0, b) r0 = Relu(a0) m0 = MaxPool <{HALF}> (r0)
        [c1] a1 = Conv <{PAD}> (m0, w1, b) r1 = Relu(a1) [c2] a2 = Conv <{PAD}> (r1, w2, b)
        [s1] s1 = Add(a2, m0) r2 = Relu(s1)
        [c3] a3 = Conv <{PAD}, strides = [2, 2]> (r2, w1, b) r3 = Relu(a3) [c4] a4 = Conv <{PAD}> (r3, w2, b)
        [p] q = Conv <strides = [2, 2]> (r2, k) [s2] s2 = Add(a4, q) r4 = Relu(s2)
        [g] g = GlobalAveragePool(r4) [f] y = Conv(g, k)"""
    weights = {"w0": weight(0, 16, 4, 3, 3), "w1": weight(1, 16, 16, 3, 3), "w2": weight(2, 16, 16, 3, 3)}
    return body, weights | {"b": case.random(3, 16), "k": weight(4, 16, 16, 1, 1)}


def mobilenet():
    """MobileNet v3: expand, depthwise, squeeze-and-excite, project; hard-swish, and HardSigmoid as gate."""
    body = f"""[c0] a0 = Conv <{PAD}> (x, w0, b) [h0] r0 = HardSwish(a0)
        [c1] a1 = Conv(r0, up, b2) [h1] r1 = HardSwish(a1)
        [c2] a2 = Conv <{PAD}, group = 32> (r1, deep, b2) [h2] r2 = HardSwish(a2)
        g = ReduceMean <keepdims = 1> (r2, hw) [c3] q1 = Conv(g, down) q2 = Relu(q1) [c4] q3 = Conv(q2, up)
        [h3] q4 = HardSigmoid <alpha = 0.16666667> (q3) [m] e = Mul(r2, q4)
        [c5] p = Conv(e, down) [s] s = Add(p, r0)
        [c6] z1 = Conv(s, up, b2) [h4] z2 = HardSwish(z1) [c7] y = Conv(z2, down)"""
    weights = {"w0": weight(0, 16, 4, 3, 3), "up": weight(1, 32, 16, 1, 1), "down": weight(2, 16, 32, 1, 1)}
    weights |= {"deep": weight(3, 32, 1, 3, 3), "b": case.random(4, 16), "b2": case.random(5, 32)}
    return body, weights | {"hw": np.array([2, 3])}


def unet():
    """One way up by ConvTranspose, one by Resize, each joined with the way down."""
    nearest = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
    body = f"""[c0] a0 = Conv <{PAD}> (x, w0, b) r0 = Relu(a0) m0 = MaxPool <{HALF}> (r0)
        [c1] a1 = Conv <{PAD}> (m0, w1, b) r1 = Relu(a1) m1 = MaxPool <{HALF}> (r1)
        [c2] a2 = Conv <{PAD}> (m1, w1, b) r2 = Relu(a2)
        [t] u1 = ConvTranspose <strides = [2, 2]> (r2, wt, b) [j1] j1 = Concat <axis = 1> (u1, r1)
        [c3] a3 = Conv <{PAD}> (j1, w2, b) r3 = Relu(a3)
        u0 = Resize <{nearest}> (r3, , twice) [j0] j0 = Concat <axis = 1> (u0, r0)
        [c4] a4 = Conv <{PAD}> (j0, w2, b) r4 = Relu(a4) [c5] y = Conv(r4, k)"""
    weights = {"w0": weight(0, 16, 4, 3, 3), "w1": weight(1, 16, 16, 3, 3), "w2": weight(2, 16, 32, 3, 3)}
    weights |= {"wt": weight(3, 16, 16, 2, 2), "b": case.random(4, 16), "k": weight(5, 4, 16, 1, 1)}
    return body, weights | {"twice": np.array([1, 1, 2, 2], np.float32)}


def inception():
    """Four branches, one behind an average with counted padding, and a reduction with MaxPool."""
    body = f"""[c0] a0 = Conv <{PAD}> (x, w0, b) r0 = Relu(a0)
        [c1] a1 = Conv(r0, k, b) r1 = Relu(a1) [c2] a2 = Conv(r0, k, b) r2 = Relu(a2)
        [c3] a3 = Conv <{PAD}> (r2, w1, b) r3 = Relu(a3)
        [c4] a4 = Conv <pads = [0, 1, 0, 1]> (r2, row, b) [c5] a5 = Conv <pads = [1, 0, 1, 0]> (a4, column, b)
        r5 = Relu(a5) [p] p = AveragePool <kernel_shape = [3, 3], {PAD}, count_include_pad = 1> (r0)
        [c6] a6 = Conv(p, k, b) r6 = Relu(a6) [j] j = Concat <axis = 1> (r1, r3, r5, r6)
        [c7] a7 = Conv <strides = [2, 2], kernel_shape = [2, 2]> (j, w2, b) r7 = Relu(a7)
        m = MaxPool <{HALF}> (j) [j2] j2 = Concat <axis = 1> (r7, m) [c8] y = Conv(j2, last)"""
    weights = {"w0": weight(0, 16, 4, 3, 3), "w1": weight(1, 16, 16, 3, 3), "k": weight(2, 16, 16, 1, 1)}
    weights |= {"row": weight(3, 16, 16, 1, 3), "column": weight(4, 16, 16, 3, 1), "b": case.random(5, 16)}
    return body, weights | {"w2": weight(6, 16, 64, 2, 2), "last": weight(7, 8, 80, 1, 1)}


def shufflenet():
    """Split, grouped and depthwise convolutions, and the channel shuffle."""
    body = f"""[c0] a0 = Conv <{PAD}> (x, w0, b) r0 = Relu(a0)
        l, h = Split <axis = 1, num_outputs = 2> (r0) [c1] a1 = Conv <group = 2> (h, g) r1 = Relu(a1)
        [c2] a2 = Conv <{PAD}, group = 8> (r1, deep) [c3] a3 = Conv(a2, k) r3 = Relu(a3)
        [j] j = Concat <axis = 1> (l, r3) e1 = Reshape(j, apart) e2 = Transpose <perm = [0, 2, 1, 3, 4]> (e1)
        e3 = Reshape(e2, whole) [c4] y = Conv <{PAD}> (e3, w1)"""
    weights = {"w0": weight(0, 16, 4, 3, 3), "w1": weight(1, 8, 16, 3, 3), "g": weight(2, 8, 4, 1, 1)}
    weights |= {"deep": weight(3, 8, 1, 3, 3), "k": weight(4, 8, 8, 1, 1), "b": case.random(5, 16)}
    return body, weights | {"apart": np.array([0, 2, 8, 16, 16]), "whole": np.array([0, 16, 16, 16])}


BLOCKS = (resnet, mobilenet, unet, inception, shufflenet)


@pytest.mark.parametrize("target", [case.X86, case.ARM])
@pytest.mark.parametrize("block", BLOCKS)
def test_only_the_entry_and_the_exit_keep_q_and_dq(block, target, tmp_path):
    body, weights = block()
    model = case.parse(f"(float[N,4,16,16] x) => (float[N,O,P,Q] y) {{ {body} }}", weights)
    profile = load_target(target)
    run_passes(model, fusion_passes(model, profile, {}))
    feeds = [{"x": case.random(80 + seed, 2, 4, 16, 16)} for seed in range(3)]
    plan = case.plan_of(model, profile, quantization="static")
    assert [(item.node, item.reason) for item in plan.decisions if item.form != "static"] == []
    made = case.quantized(model, plan, feeds)
    save_model(made, tmp_path / "m.onnx")
    result = audit(tmp_path / "m.onnx", plan, profile)
    assert (result.silent_floats, result.unplanned) == ((), ())
    assert (result.operators["QuantizeLinear"], result.operators["DequantizeLinear"]) == (1, 1)
    others = {name for name in result.operators if not name.startswith("QLinear")}
    assert others <= {
        "QuantizeLinear",
        "DequantizeLinear",
        "Transpose",
        "NhwcMaxPool",
        "Reshape",
        "Resize",
        "Split",
    }
    for shown in feeds:
        wanted = case.run(model, shown)[0]
        assert all(case.sqnr_db(wanted, case.run(made, shown, optimise=way)[0]) > 24 for way in (False, True))


@pytest.mark.parametrize("block", BLOCKS)
def test_any_node_back_in_float_leaves_a_right_model(block):
    body, weights = block()
    model = case.parse(f"(float[N,4,16,16] x) => (float[N,O,P,Q] y) {{ {body} }}", weights)
    run_passes(model, fusion_passes(model, load_target(case.X86), {}))
    feeds = [{"x": case.random(80, 2, 4, 16, 16)}]
    plan = case.plan_of(model, quantization="static")
    wanted = case.run(model, feeds[0])[0]
    for group in plan.groups:
        made = case.quantized(model, plan.revert(frozenset({group}), "test"), feeds)
        found = case.run(made, feeds[0], optimise=True)[0]
        assert case.sqnr_db(wanted, found) > 24, group
