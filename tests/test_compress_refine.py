"""Equalized channels and learned rounding on tiny nets: the same function, less error, all in bounds."""

import compress_case as case
import numpy as np
import onnx_ir as ir
import pytest
from edgepress.calibration.data import open_data
from edgepress.compress.lower import apply_plan
from edgepress.compress.quantize.static import static_layout
from edgepress.compress.refine import learned
from edgepress.compress.refine.channels import ChannelTies
from edgepress.compress.refine.equalize import EqualizeChannels, collect_magnitudes, equalizable
from edgepress.compress.refine.learned import learn_rounding, learnable
from edgepress.graph.passes import run_passes

W = case._conv_weights(w=(8, 4, 3, 3), b=(8,), v=(8, 8, 3, 3), c=(8,), p=(8, 8, 3, 3), d=(8,))
SHAPES = "(float[N,4,8,8] x) => (float[N,O,P,Q] y)"
SAME = "<pads = [1, 1, 1, 1]>"


def net(body, **more):
    spread = W | more
    # Channels of very different magnitude: what equalization is for.
    spread["w"] = spread["w"] * np.geomspace(0.02, 1.0, 8, dtype="f4").reshape(8, 1, 1, 1)
    text = f"{SHAPES} {{ {body} }}".replace("SAME", SAME)
    return case.parse(text, {key: array for key, array in spread.items() if f" {key}" in text})


RESIDUAL = (
    "[c1] a = Conv SAME (x, w, b) r = Relu(a) [c2] e = Conv SAME (r, v, c) [add] t = Add(e, r) u = Relu(t)"
    " [c3] y = Conv SAME (u, p, d)"
)
SHORTCUT = (
    "[c1] a = Conv SAME (x, w, b) r = Relu(a) [c2] e = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, k, f)"
    " s = Slice(r, start, end, axes, steps) q = Pad(s, pads) [add] t = Add(e, q) u = Relu(t)"
    " [c3] y = Conv SAME (u, l, d)"
)
SHORTCUT_MORE = {
    **case._conv_weights(k=(16, 8, 3, 3), f=(16,), l=(8, 16, 3, 3)),
    "start": np.array([0, 0]),
    "end": np.array([9999, 9999]),
    "axes": np.array([2, 3]),
    "steps": np.array([2, 2]),
    "pads": np.array([0, 4, 0, 0, 0, 4, 0, 0]),
}
NETS = {
    "chain": ("[c1] a = Conv SAME (x, w, b) r = Relu(a) [c2] y = Conv SAME (r, v, c)", {}),
    "residual": (RESIDUAL, {}),
    "shortcut": (SHORTCUT, SHORTCUT_MORE),
    "depthwise": (
        "[c1] a = Conv SAME (x, w, b) r = Relu(a) [c2] e = Conv <pads = [1, 1, 1, 1], group = 8> (r, k, c)"
        " s = Relu(e) [c3] y = Conv SAME (s, p, d)",
        case._conv_weights(k=(8, 1, 3, 3)),
    ),
    "pooled": (
        "[c1] a = Conv SAME (x, w, b) r = Relu(a) q = MaxPool <kernel_shape = [2, 2]> (r)"
        " [c2] y = Conv SAME (q, v, c)",
        {},
    ),
    "concat": (
        "[c1] a = Conv SAME (x, w, b) r = Relu(a) [c2] e = Conv SAME (r, v, c) s = Relu(e)"
        " [k] t = Concat <axis = 1> (r, s) [c3] y = Conv SAME (t, l, d)",
        case._conv_weights(l=(8, 16, 3, 3)),
    ),
}


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(8)
    mixed = rng.standard_normal((4, 4)).astype("f4")
    images = np.einsum("ij,njhw->nihw", mixed, rng.standard_normal((24, 4, 8, 8)).astype("f4"))
    np.save(tmp_path / "x.npy", images)
    return open_data(str(tmp_path / "x.npy"), net(RESIDUAL).inputs)


def equalized(model, plan, data):
    magnitudes = collect_magnitudes(model, equalizable(model, plan.decisions), data)
    made = model.fork()
    (record,) = run_passes(made, [EqualizeChannels(magnitudes=magnitudes)])
    return made, record, magnitudes


def error(model, plan, data, rounding=None, reference=None):
    feeds = list(data)
    observed = static_layout(model, plan.decisions).observed
    lowered, _ = apply_plan(model, plan, case.true_ranges(model, observed, feeds), rounding)
    runners = case.session(reference or model), case.session(lowered)
    wanted, found = (np.concatenate([item.run(None, f)[0] for f in feeds]) for item in runners)
    return case.relative_l2(wanted, found)


@pytest.mark.parametrize("name", NETS)
def test_equalization_keeps_the_function_and_evens_the_ranges(name, data):
    body, more = NETS[name]
    model = net(body, **more)
    plan = case.plan_of(model, quantization="static")
    made, record, before = equalized(model, plan, data)
    assert record.applied["equalize-channels"] >= 2
    runners = case.session(model), case.session(made)
    for feeds in data:
        wanted, found = (runner.run(None, feeds)[0] for runner in runners)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    after = collect_magnitudes(made, list(before), data)
    # Sums of the channels' shares of their tensor's range: what of it is used.
    used = [sum((item / item.max()).sum() for item in found.values()) for found in (before, after)]
    assert used[1] > 1.05 * used[0]
    assert model.structure_hash() != made.structure_hash()


def test_channels_of_a_residual_stream_share_a_factor():
    model = net(SHORTCUT, **SHORTCUT_MORE)
    ties = ChannelTies(model)
    labels = {value.name: ties.of(value) for value in ties.tensors()}
    np.testing.assert_array_equal(labels["q"][4:12], labels["r"])
    np.testing.assert_array_equal(labels["e"], labels["u"])
    np.testing.assert_array_equal(labels["e"][4:12], labels["r"])
    assert set(labels["y"]) == {-1}


def test_a_weight_that_two_layers_read_keeps_its_channels():
    model, feeds = case.zoo("residual")
    ties = ChannelTies(model)
    labels = {value.name: ties.of(value) for value in ties.tensors()}
    assert set(labels["r"]) == {-1}
    assert feeds


def test_what_no_factor_passes_keeps_its_channels():
    for op in ("Sigmoid", "Tanh"):
        model = net(f"[c1] a = Conv SAME (x, w, b) r = {op}(a) [c2] y = Conv SAME (r, v, c)")
        ties = ChannelTies(model)
        assert all((ties.of(value) == -1).all() for value in ties.tensors())


@pytest.mark.parametrize("name", NETS)
def test_learned_rounding_lowers_the_error(name, data):
    body, more = NETS[name]
    model = net(body, **more)
    plan = case.plan_of(model, quantization="static")
    rounding = learn_rounding(model, plan.decisions, data)
    assert rounding
    assert set(rounding) <= {layer.node.name for layer in learnable(model, plan.decisions)}
    again = learn_rounding(model, plan.decisions, data)
    for key, item in rounding.items():
        assert item.integers.dtype == np.int8
        assert np.abs(item.integers.astype(int)).max() <= 127
        np.testing.assert_array_equal(item.integers, again[key].integers)
    # Activations are rounded, too, and make up most of the error of so short a net.
    assert error(model, plan, data, rounding) < 1.05 * error(model, plan, data)
    assert weight_error(model, plan, rounding, data) < 0.9 * weight_error(model, plan, {}, data)


def weight_error(model, plan, rounding, data):
    """Relative L2 with real activations and rounded weights: written out without the code under test."""
    made = model.fork()
    planned = case.by_node(plan)
    for node in made.graph:
        if node.op_type != "Conv" or node.name not in planned:
            continue
        weight = node.inputs[1].const_value.numpy()
        item = rounding.get(node.name)
        axes = (1, 2, 3)
        scale = (np.abs(weight).max(axis=axes) / 127).reshape(-1, 1, 1, 1)
        integers = np.rint(weight / scale) if item is None else item.integers
        node.inputs[1].const_value = ir.tensor((integers * scale).astype("f4"))
        if item is not None:
            node.inputs[2].const_value = ir.tensor(item.bias.astype("f4"))
    runners = case.session(model), case.session(made)
    wanted, found = (np.concatenate([item.run(None, f)[0] for f in data]) for item in runners)
    return case.relative_l2(wanted, found)


def test_parts_that_do_not_fit_together_give_the_same_integers(data, monkeypatch):
    model = net(RESIDUAL)
    plan = case.plan_of(model, quantization="static")
    whole = learn_rounding(model, plan.decisions, data)
    monkeypatch.setattr(learned, "_SUMS_BYTES", 1)
    steps = []
    found = learn_rounding(
        model, plan.decisions, data, progress=lambda done, total: steps.append((done, total))
    )
    assert steps[-1] == (72, 72)
    for name, item in whole.items():
        np.testing.assert_array_equal(found[name].integers, item.integers)


def test_layers_that_cannot_be_learned_are_left_out(monkeypatch):
    model, _ = case.zoo("residual")
    plan = case.plan_of(model, quantization="static")
    assert [layer.node.name for layer in learnable(model, plan.decisions)] == ["c1"]
    monkeypatch.setattr(learned, "LARGEST_INPUTS", 9)
    assert learnable(model, plan.decisions) == []


def test_matrices_are_learned_too(tmp_path):
    model, _ = case.zoo("matmul-3d")
    rng = np.random.default_rng(2)
    mixed = rng.standard_normal((6, 16, 8)) @ rng.standard_normal((8, 64))
    np.save(tmp_path / "x.npy", mixed.astype("f4"))
    data = open_data(str(tmp_path / "x.npy"), model.inputs)
    plan = case.plan_of(model, quantization="static")
    rounding = learn_rounding(model, plan.decisions, data)
    assert set(rounding) == {"m1", "m2"}
    weight = model.graph.initializers["w"].const_value.numpy().astype(float)
    rows = mixed.reshape(-1, 64)
    scale = np.abs(weight).max(axis=0) / 127
    plain = rows @ (np.rint(weight / scale) * scale - weight)
    steered = rows @ (rounding["m1"].integers * scale - weight)
    assert np.linalg.norm(steered) < 0.8 * np.linalg.norm(plain)
    assert rounding["m1"].bias is None
