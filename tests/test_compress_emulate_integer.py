"""Integer kernels in NumPy against onnxruntime's own, bit by bit, on random and extreme inputs.

Weights keep to 7 bits, so that the products are exact on every processor that runs the tests.
"""

import numpy as np
import onnxruntime
import pytest
from compress_case import operators, parse, random, run
from edgepress.compress.emulate.integer import (
    Affine,
    Quantized,
    dynamic_quantize_linear,
    dynamic_quantize_matmul,
    matmul_integer,
    qlinear_add,
    qlinear_conv,
    qlinear_matmul,
    requantize,
    scale_to_float,
)
from edgepress.compress.lower import apply_plan
from edgepress.compress.propose import Request, propose
from edgepress.targets.host import read_host
from edgepress.targets.registry import load_target
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

TYPES = (np.uint8, np.int8)
NAMES = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.int8): TensorProto.INT8}
single = np.float32


def runtime(op, inputs, result, domain="", **attributes):
    """One operator in onnxruntime; the first input is fed, the others are constants."""
    fed, *constants = inputs.items()
    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), ["y"], domain=domain, **attributes)],
        "one",
        [helper.make_tensor_value_info(fed[0], NAMES[fed[1].dtype], fed[1].shape)],
        [helper.make_tensor_value_info("y", result, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict([fed]))[0]


def whole(rng, dtype, *shape):
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


def weight(rng, *shape):
    return rng.integers(-63, 64, shape).astype(np.int8)


EXTREME = [
    np.zeros((3, 4), single),
    np.full((2, 2), 7.5, single),
    np.full((2, 2), -1e-30, single),
    np.array([[3e38, -3e38]], single),
    np.array([[1e-42, 0.0, 5e-43]], single),
    np.arange(-8, 8, dtype=single).reshape(4, 4) / 255,
]


@pytest.mark.parametrize("case", range(len(EXTREME) + 12))
def test_dynamic_quantize_linear(case):
    if case < len(EXTREME):
        values = EXTREME[case]
    else:
        shift = (case % 3 - 1) * 4.0
        values = (random(case, 9, 37, scale=10.0 ** (case - 12)) + single(shift)).astype(single)
    model = parse("(float[N,M] x) => (uint8[N,M] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }")
    with np.errstate(over="ignore", invalid="ignore"):
        found = dynamic_quantize_linear(values)
    expected = run(model, {"x": values})
    if np.isfinite(expected[1]):
        np.testing.assert_array_equal(found.scale, expected[1])
        np.testing.assert_array_equal(found.zero_point, expected[2])
        np.testing.assert_array_equal(found.values, expected[0])
    else:
        assert not np.isfinite(found.scale)


@pytest.mark.parametrize("dtype", TYPES)
def test_integer_products(dtype):
    rng = np.random.default_rng(0)
    left, right = whole(rng, dtype, 9, 33), weight(rng, 33, 17)
    zero = dtype(100)
    expected = runtime("MatMulInteger", {"a": left, "b": right, "az": zero}, TensorProto.INT32)
    np.testing.assert_array_equal(matmul_integer(left, right, int(zero)), expected)


def test_integer_products_wrap_around():
    left, right = np.full((1, 70_000), 255, np.uint8), np.full((70_000, 1), 127, np.int8)
    exact = 255 * 127 * 70_000
    assert matmul_integer(left, right)[0, 0] == (exact + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("optimise", [True, False])
def test_a_planned_dynamic_product(bias, optimise):
    w, b = random(0, 96, 64, scale=0.1), random(1, 64)
    text = "m = MatMul(x, w) y = Add(m, b)" if bias else "y = MatMul(x, w)"
    model = parse(f"(float[N,96] x) => (float[N,64] y) {{ {text} }}", {"w": w, "b": b} if bias else {"w": w})
    profile = load_target("x86-64-avx2")  # weights of 7 bits
    plan = propose(model, profile, Request(quantization="dynamic", allow_unmeasured=True))
    lowered = apply_plan(model, plan)[0]
    assert operators(lowered)["MatMulInteger"] == 1
    stored = {name: value.const_value.numpy() for name, value in lowered.graph.initializers.items()}
    x = random(2, 7, 96, scale=3.0)
    (expected,) = run(lowered, {"x": x}, optimise=optimise)
    found = dynamic_quantize_matmul(x, stored["w.int8"], stored["w.scale"], b if bias else None)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("step", [0.011, 0.3, 4.0])
def test_products_with_quantized_results(dtype, bias, step):
    rng = np.random.default_rng(3)
    left, right, scales = whole(rng, dtype, 9, 65), weight(rng, 65, 18), rng.uniform(0.001, 0.01, 18)
    scales = scales.astype(single)
    addend = rng.integers(-20000, 20000, 18).astype(np.int32)
    inputs = {
        "a": left, "as": single(0.013), "az": dtype(90), "b": right, "bs": scales,
        "bz": np.zeros(18, np.int8),
    }  # fmt: skip
    inputs |= {"c": addend} if bias else {}
    inputs |= {"ys": single(step), "yz": dtype(17)}
    op, domain = ("QGemm", "com.microsoft") if bias else ("QLinearMatMul", "")
    expected = runtime(op, inputs, NAMES[left.dtype], domain)
    zero = np.int8(0)
    found = qlinear_matmul(
        Quantized(left, single(0.013), dtype(90)),
        Quantized(right, scales, zero),
        Affine(single(step), dtype(17)),
        bias=addend if bias else None,
    )
    np.testing.assert_array_equal(found, expected)


CONVOLUTIONS = [
    {},
    {"strides": (2, 2), "pads": (0, 1, 1, 0)},
    {"group": 8, "pads": (1, 1, 1, 1)},
    {"group": 2, "pads": (1, 1, 1, 1)},
    {"dilations": (2, 1), "pads": (2, 2, 2, 2)},
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolutions(dtype, options):
    rng = np.random.default_rng(4)
    data, kernel = whole(rng, dtype, 2, 8, 9, 10), weight(rng, 16, 8 // options.get("group", 1), 3, 3)
    scales = rng.uniform(0.001, 0.01, 16).astype(single)
    bias = rng.integers(-20000, 20000, 16).astype(np.int32)
    inputs = {
        "x": data, "xs": single(0.02), "xz": dtype(90), "w": kernel, "ws": scales,
        "wz": np.zeros(16, np.int8), "ys": single(0.05), "yz": dtype(17), "b": bias,
    }  # fmt: skip
    expected = runtime("QLinearConv", inputs, NAMES[data.dtype], **options)
    found = qlinear_conv(
        Quantized(data, single(0.02), dtype(90)),
        Quantized(kernel, scales, np.int8(0)),
        Affine(single(0.05), dtype(17)),
        bias=bias,
        **options,
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif("fma" not in read_host().features, reason="the sum of x86 cores with FMA")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("step", [0.02, 0.026, 0.03, 0.04, 0.05, 0.052])
def test_sums(dtype, step):
    rng = np.random.default_rng(5)
    left, right = whole(rng, dtype, 40, 64), whole(rng, dtype, 40, 64)
    inputs = {
        "a": left, "as": single(0.013), "az": dtype(90), "b": right, "bs": single(0.027), "bz": dtype(33),
        "ys": single(step), "yz": dtype(17),
    }  # fmt: skip
    expected = runtime("QLinearAdd", inputs, NAMES[left.dtype], "com.microsoft")
    found = qlinear_add(
        Quantized(left, single(0.013), dtype(90)),
        Quantized(right, single(0.027), dtype(33)),
        Affine(single(step), dtype(17)),
    )
    np.testing.assert_array_equal(found, expected)


@given(st.integers(-(2**31), 2**31 - 1), st.floats(2.0**-20, 1.0, width=32), st.integers(0, 255))
@settings(max_examples=200)
def test_requantized_values_are_within_half_a_step_or_at_a_limit(total, factor, zero):
    found = int(requantize(np.array([[total]], np.int32), single(factor), np.uint8(zero))[0, 0])
    exact = total * float(factor) + zero
    assert found in (0, 255) or abs(found - exact) <= 0.5 + abs(exact - zero) * 2.0**-22
    assert abs(found - min(max(exact, 0), 255)) <= 0.5 + 256 * 2.0**-20


def test_scaling_rounds_each_step():
    sums = np.array([[2**24 + 1, -(2**24) - 1]], np.int32)
    found = scale_to_float(sums, single(0.1), np.array([0.3, 0.7], single), np.array([1.0, 2.0], single))
    factor = np.array([single(0.1) * single(0.3), single(0.1) * single(0.7)], single)
    expected = np.array([single(2**24) * factor[0], single(-(2**24)) * factor[1]], single)
    np.testing.assert_array_equal(found[0], expected + np.array([1.0, 2.0], single))
