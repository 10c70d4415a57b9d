"""ConvTranspose as a convolution whose outputs are interleaved: the arithmetic, the graph, the refusals."""

import itertools

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.quantize.transposed import phase_weights
from edgepress.graph.edit import is_constant
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.ort_runtime import optimised_graph
from edgepress.targets.registry import load_target
from hypothesis import given, settings
from hypothesis import strategies as st


def transposed_by_definition(data, weight, strides, pads, sizes):
    """Every input value times the whole window, added where the window lies in the output."""
    result = np.zeros((weight.shape[1], *sizes))
    for place in itertools.product(*(range(size) for size in data.shape[1:])):
        for tap in itertools.product(*(range(size) for size in weight.shape[2:])):
            at = [s * i - p + t for s, i, (p, _), t in zip(strides, place, pads, tap, strict=True)]
            if all(0 <= a < size for a, size in zip(at, sizes, strict=True)):
                result[(slice(None), *at)] += data[(slice(None), *place)] @ weight[(..., *tap)]
    return result


def interleaved_by_definition(data, weights, padding, strides):
    """A plain convolution by loops, its phases put between one another."""
    count = int(np.prod(strides))
    outputs = weights.shape[0] // count
    padded = np.pad(data, [(0, 0), *padding])
    sizes = data.shape[1:]
    result = np.zeros((outputs, *(size * step for size, step in zip(sizes, strides, strict=True))))
    for number, phase in enumerate(itertools.product(*(range(step) for step in strides))):
        window = weights[number * outputs : (number + 1) * outputs]
        for place in itertools.product(*(range(size) for size in sizes)):
            seen = padded[
                (slice(None), *(slice(i, i + k) for i, k in zip(place, window.shape[2:], strict=True)))
            ]
            at = [s * i + r for s, i, r in zip(strides, place, phase, strict=True)]
            result[(slice(None), *at)] = np.tensordot(window, seen, axes=seen.ndim)
    return result


@st.composite
def geometries(draw):
    axes = draw(st.integers(1, 2))
    kernels, strides, pads = [], [], []
    for _ in range(axes):
        step = draw(st.integers(1, 3))
        begin, end = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        extra = draw(st.integers(0, step - 1))
        size = step + begin + end - extra
        kernels.append(size)
        strides.append(step)
        pads.append((begin, end))
    return kernels, strides, pads


@settings(max_examples=40, deadline=None)
@given(geometries(), st.integers(0, 1000))
def test_phases_are_the_transposed_convolution(geometry, seed):
    kernels, strides, pads = geometry
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((2, *([3, 2][: len(kernels)])))
    weight = rng.standard_normal((2, 3, *kernels)).astype(np.float32)
    weights, padding = phase_weights(weight, strides, pads)
    sizes = [size * step for size, step in zip(data.shape[1:], strides, strict=True)]
    wanted = transposed_by_definition(data, weight, strides, pads, sizes)
    found = interleaved_by_definition(data, weights, padding, strides)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def net(attributes, window, *, behind="", image="8,8", bias=True, outputs=None):
    """Conv, ConvTranspose (and what stands behind it), Conv; `image` may name axes."""
    axes = len(window)
    outputs = outputs or f"(float[{','.join('NOPQR'[: axes + 2])}] y)"
    pads = f"<pads = {[1] * (2 * axes)}>"
    rest = f"{behind.replace('OUT', 't')} " if behind else ""
    made = "u" if behind else "t"
    text = f"""(float[N,4,{image}] x) => {outputs} {{ [c1] a = Conv {pads} (x, w) r = Relu(a)
        [t] {made} = ConvTranspose <{attributes}> (r, k{", b" if bias else ""}) {rest}
        [c2] y = Conv {pads} (t, v) }}"""
    weights = {"w": case.random(1, 8, 4, *[3] * axes), "v": case.random(2, 8, 6, *[3] * axes)}
    weights |= {"k": case.random(3, 8, 6, *window), "b": case.random(4, 6)} if bias else {}
    weights |= {} if bias else {"k": case.random(3, 8, 6, *window)}
    return case.parse(text, weights | {"low": np.float32(0), "high": np.float32(6)})


STRIDE = "strides = [2, 2]"


@pytest.mark.parametrize("target", [case.X86, case.ARM])
@pytest.mark.parametrize(
    ("attributes", "window", "options"),
    [
        (STRIDE, (2, 2), {}),
        (STRIDE, (2, 2), {"bias": False}),
        (STRIDE, (2, 2), {"behind": "OUT = Relu(u)"}),
        (STRIDE, (2, 2), {"behind": "OUT = Clip(u, low, high)"}),
        (STRIDE, (2, 2), {"behind": "OUT = Relu(u)", "outputs": "(float[N,O,P,Q] y, float[N,6,16,16] t)"}),
        (STRIDE, (2, 2), {"image": "H,8"}),
        (STRIDE, (2, 2), {"image": "8,W"}),
        (f"{STRIDE}, pads = [1, 1, 1, 1]", (4, 4), {}),
        (f"{STRIDE}, pads = [1, 1, 1, 1], output_padding = [1, 1]", (3, 3), {}),
        ("strides = [3, 2], pads = [0, 1, 2, 1]", (5, 4), {}),
        ("pads = [1, 1, 1, 1]", (3, 3), {}),
        ("strides = [4], pads = [2, 2]", (8,), {"image": "L"}),
        (STRIDE, (3, 3), {}),
        (f"{STRIDE}, pads = [1, 1, 1, 1]", (3, 3), {"behind": "OUT = Relu(u)"}),
        (f"{STRIDE}, pads = [0, 1, 0, 0]", (3, 3), {"image": "H,8"}),
        ("strides = [3, 2], output_padding = [2, 1]", (1, 7), {}),
        ("pads = [0, 1, 0, 0]", (3, 3), {}),
        ("strides = [2, 2, 2]", (2, 2, 2), {"image": "4,4,4"}),
    ],
)
def test_transposed_convolutions_run_in_integer_kernels(attributes, window, options, target):
    model = net(attributes, window, **options)
    feeds = [
        {"x": case.random(9 + seed, 2, 4, *[8 if len(window) < 3 else 4] * len(window))} for seed in range(2)
    ]
    plan = case.plan_of(model, target, quantization="static")
    assert case.by_node(plan)["t"].form == "static"
    lowered = case.quantized(model, plan, feeds)
    assert (lowered.inputs, lowered.outputs) == (model.inputs, model.outputs)
    config = dict(load_target(target).audit_config)
    nodes = list(optimised_graph(lowered, SessionOptions(config=config)).graph.all_nodes())
    kinds = [node.op_type for node in nodes]
    assert kinds.count("QLinearConv") == 3
    assert not {"ConvTranspose", "Relu", "Clip"} & set(kinds)
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (1, 1 + len(model.outputs[1:]))
    assert [node.op_type for node in nodes if str(node.name).split("_token")[0] == "t"] == ["QLinearConv"]
    for shown in feeds:
        for optimise in (False, True):
            pairs = zip(case.run(model, shown), case.run(lowered, shown, optimise=optimise), strict=True)
            assert all(case.sqnr_db(wanted, found) > 27 for wanted, found in pairs)


def test_the_outer_transposes_cancel_against_the_runtimes_own():
    model = net(STRIDE, (2, 2))
    feeds = [{"x": case.random(9, 1, 4, 8, 8)}]
    lowered = case.quantized(model, case.plan_of(model, quantization="static"), feeds)
    kinds = [node.op_type for node in optimised_graph(lowered).graph.all_nodes()]
    assert kinds.count("Transpose") == 3  # in, out, and the interleaving
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (1, 1)


NO_KERNEL = "and onnxruntime has no integer ConvTranspose"
UNUSUAL = f"it has dilations or output_shape, {NO_KERNEL}"


@pytest.mark.parametrize(
    ("attributes", "window", "image", "reason"),
    [
        ("strides = [2, 2], dilations = [2, 1]", (2, 2), "8,8", UNUSUAL),
        ("output_shape = [16, 16], strides = [2, 2]", (2, 2), "8,8", UNUSUAL),
        ('strides = [2, 2], auto_pad = "SAME_UPPER"', (3, 3), "8,8", f"it has auto_pad, {NO_KERNEL}"),
        ("pads = [0, 1, 0, 1]", (3, 1), "8,8", f"its padding is as wide as its window, {NO_KERNEL}"),
        ("strides = [2, 2]", (2, 2), "H,W", f"more than one side of its image is not fixed, {NO_KERNEL}"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_so_stays_float_with_its_reason(attributes, window, image, reason):
    model = net(attributes, window, image=image)
    item = case.by_node(case.plan_of(model, quantization="static"))["t"]
    assert (item.form, item.reason) == ("float", reason)


def test_groups_stay_float():
    text = """(float[N,4,8,8] x) => (float[N,O,P,Q] y) { [c1] a = Conv(x, w)
        [t] t = ConvTranspose <group = 2, strides = [2, 2]> (a, k) [c2] y = Conv(t, v) }"""
    weights = {
        "w": case.random(1, 8, 4, 1, 1),
        "k": case.random(2, 8, 3, 2, 2),
        "v": case.random(3, 8, 6, 1, 1),
    }
    item = case.by_node(case.plan_of(case.parse(text, weights), quantization="static"))["t"]
    reason = f"it has groups, whose interleaving costs more than integers save, {NO_KERNEL}"
    assert (item.form, item.reason) == ("float", reason)


def test_a_weight_that_another_node_reads_stays_as_it_is():
    text = """(float[N,4,8,8] x) => (float[N,O,P,Q] y, float[A,B,C,D] s) { [c1] a = Conv(x, w)
        [t] t = ConvTranspose <strides = [2, 2]> (a, k) [c2] y = Conv(t, v) s = Exp(k) }"""
    weights = {
        "w": case.random(1, 8, 4, 1, 1),
        "k": case.random(2, 8, 6, 2, 2),
        "v": case.random(3, 8, 6, 1, 1),
    }
    model = case.parse(text, weights)
    feeds = [{"x": case.random(9, 1, 4, 8, 8)}]
    lowered = case.quantized(model, case.plan_of(model, quantization="static"), feeds)
    np.testing.assert_array_equal(case.run(lowered, feeds[0])[1], case.run(model, feeds[0])[1])
    assert is_constant(lowered.graph.initializers["k"])
