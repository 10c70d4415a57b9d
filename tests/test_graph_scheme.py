"""The arithmetic of affine quantization, against the formula and onnxruntime's operators, bit by bit."""

import hypothesis
import msgspec
import numpy as np
import onnx
import pytest
import zoo
from edgepress.graph.scheme import Scheme, affine_parameters, dequantize, quantize
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import helper

DTYPES = ("int8", "uint8")
SCHEMES = [
    Scheme(dtype=dtype, symmetric=symmetric, reduced_range=reduced)
    for dtype in DTYPES
    for symmetric in (True, False)
    for reduced in (False, True)
]
LIMIT = st.floats(-1e6, 1e6, width=32)


def label(scheme):
    return f"{scheme.dtype}-{'sym' if scheme.symmetric else 'asym'}{'-7bit' if scheme.reduced_range else ''}"


@pytest.mark.parametrize(
    ("dtype", "symmetric", "reduced", "limits"),
    [
        ("int8", True, False, (-127, 127)),
        ("int8", False, False, (-128, 127)),
        ("int8", True, True, (-63, 63)),
        ("int8", False, True, (-64, 63)),
        ("uint8", True, False, (0, 255)),
        ("uint8", False, False, (0, 255)),
        ("uint8", False, True, (0, 127)),
        ("uint8", True, True, (0, 127)),
    ],
)
def test_limits(dtype, symmetric, reduced, limits):
    scheme = Scheme(dtype=dtype, symmetric=symmetric, reduced_range=reduced)
    assert scheme.limits == limits
    assert scheme.numpy_dtype == np.dtype(dtype)


@pytest.mark.parametrize(
    "fields", [{"granularity": "per-channel"}, {"axis": 0}, {"granularity": "per-tensor", "axis": 1}]
)
def test_granularity_and_axis_belong_together(fields):
    with pytest.raises(ValueError, match="does not fit axis"):
        Scheme(dtype="int8", symmetric=True, **fields)


def test_schemes_serialise_and_refuse_what_they_do_not_know():
    scheme = Scheme(dtype="int8", symmetric=True, granularity="per-channel", axis=-1)
    assert msgspec.json.decode(msgspec.json.encode(scheme), type=Scheme) == scheme
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"dtype": "int4", "symmetric": true}', type=Scheme)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"dtype": "int8", "symmetric": true, "bits": 4}', type=Scheme)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (np.nan, 1, "must be finite"),
        (0, np.inf, "must be finite"),
        (-np.inf, 0, "must be finite"),
        (2, 1, "minimum exceeds"),
        ([0, 2], [1, 1], "minimum exceeds"),
    ],
)
def test_ranges_that_are_none(low, high, words):
    with pytest.raises(ValueError, match=words):
        affine_parameters(np.array(low, float), np.array(high, float), SCHEMES[0])


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@hypothesis.given(LIMIT, LIMIT, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_error_inside_the_range_is_at_most_half_a_step(scheme, one, other, places):
    low, high = min(one, other), max(one, other)
    scale, zero_point = affine_parameters(np.array(low), np.array(high), scheme)
    values = np.array([low + (high - low) * place for place in places], np.float32)
    values = np.clip(values, np.float32(min(low, 0)), np.float32(max(high, 0)))
    integers = quantize(values, scale, zero_point, scheme)
    found = dequantize(integers, scale, zero_point, None)
    smallest, largest = scheme.limits
    assert integers.dtype == scheme.numpy_dtype
    assert smallest <= integers.min() <= integers.max() <= largest
    # The last terms: float32's own rounding of the scale, the quotient and the product.
    room = scale * 0.5 + np.abs(values) * 4 * np.finfo(np.float32).eps + scale * 2e-5
    assert (np.abs(found.astype(float) - values) <= room).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@hypothesis.given(LIMIT, LIMIT)
def test_zero_is_exact(scheme, one, other):
    scale, zero_point = affine_parameters(np.array(min(one, other)), np.array(max(one, other)), scheme)
    zero = np.zeros(3, np.float32)
    assert scale > 0
    assert scale.dtype == np.float32
    assert (quantize(zero, scale, zero_point, scheme) == zero_point).all()
    assert (dequantize(quantize(zero, scale, zero_point, scheme), scale, zero_point, None) == 0).all()
    smallest, largest = scheme.limits
    assert smallest <= zero_point <= largest
    if scheme.symmetric:
        assert zero_point == {"int8": 0, "uint8": (largest + 1) // 2}[scheme.dtype]


@pytest.mark.parametrize("scheme", [item for item in SCHEMES if item.symmetric], ids=label)
@hypothesis.given(LIMIT)
def test_symmetric_schemes_are_odd(scheme, limit):
    scale, zero_point = affine_parameters(np.array(-abs(limit)), np.array(abs(limit)), scheme)
    values = np.linspace(-abs(limit), abs(limit), 17).astype(np.float32)
    there = dequantize(quantize(values, scale, zero_point, scheme), scale, zero_point, None)
    back = dequantize(quantize(-values, scale, zero_point, scheme), scale, zero_point, None)
    np.testing.assert_array_equal(there, -back)


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1e-45), (-1e-40, 1e-40)])
def test_ranges_without_width_have_scale_one(scheme, low, high):
    scale, zero_point = affine_parameters(np.array(float(low)), np.array(float(high)), scheme)
    assert scale == 1
    assert quantize(np.zeros(1, np.float32), scale, zero_point, scheme)[0] == zero_point


def test_the_widest_range_of_float32_does_not_overflow():
    largest = float(np.finfo(np.float32).max)
    for scheme in SCHEMES:
        scale, zero_point = affine_parameters(np.array(-largest), np.array(largest), scheme)
        assert np.isfinite(scale)
        values = np.array([-largest, largest], np.float32)
        first = 1 if scheme.symmetric and scheme.dtype == "uint8" else 0
        limits = [scheme.limits[0] + first, scheme.limits[1]]
        found = quantize(values, scale, zero_point, scheme).astype(int)
        assert (abs(found - limits) <= 1).all()  # the range has an even number of steps or an odd one


def by_formula(values, scale, zero_point, limits):
    """Source: ONNX QuantizeLinear, one value at a time."""
    smallest, largest = limits
    return [
        int(min(max(round(float(np.float32(value) / np.float32(scale))) + zero_point, smallest), largest))
        for value in values
    ]


@hypothesis.given(
    arrays.arrays(np.float32, 12, elements=st.floats(-500, 500, width=32)),
    st.sampled_from([0.5, 1.0, 2.0, 0.1, 0.007874016]),
    st.sampled_from(SCHEMES),
)
def test_quantize_is_the_formula(values, scale, scheme):
    middle = {"int8": 0, "uint8": 64}[scheme.dtype]
    found = quantize(values, np.float32(scale), np.array(middle, scheme.dtype), scheme)
    assert found.tolist() == by_formula(values, scale, middle, scheme.limits)


def runtime(kind, dtype, axis, *inputs):
    """QuantizeLinear or DequantizeLinear in onnxruntime."""
    attributes = {} if axis is None else {"axis": axis}
    kinds = {"x": inputs[0].dtype, "s": inputs[1].dtype, "z": inputs[2].dtype}
    types = {name: helper.np_dtype_to_tensor_dtype(kind) for name, kind in kinds.items()}
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "s", "z"], ["y"], **attributes)],
        "g",
        [
            helper.make_tensor_value_info(name, types[name], array.shape)
            for name, array in zip("xsz", inputs, strict=True)
        ],
        [helper.make_tensor_value_info("y", dtype, inputs[0].shape)],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return zoo.run(model, dict(zip("xsz", inputs, strict=True)))[0]


def halves(scale, count=64):
    """Values that lie half-way between two steps, where only the rounding mode decides."""
    return (np.arange(-count, count) + 0.5).astype(np.float32) * np.float32(scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 0.0123, 3.7])
def test_bit_by_bit_as_the_runtime(dtype, scale):
    scheme = Scheme(dtype=dtype, symmetric=False)
    random = np.random.default_rng(0)
    values = np.concatenate([halves(scale), random.standard_normal(4096) * 100 * scale]).astype(np.float32)
    values = np.concatenate([values, np.array([0.0, -0.0, 3e38, -3e38], np.float32)])
    for zero_point in {"int8": (-128, -3, 0, 127), "uint8": (0, 7, 128, 255)}[dtype]:
        point, step = np.array(zero_point, dtype), np.array(scale, np.float32)
        found = quantize(values, step, point, scheme)
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        np.testing.assert_array_equal(found, runtime("QuantizeLinear", code, None, values, step, point))
        real = dequantize(found, step, point, None)
        wanted = runtime("DequantizeLinear", onnx.TensorProto.FLOAT, None, found, step, point)
        np.testing.assert_array_equal(real.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((3, 40), 0), ((40, 3), 1), ((2, 3, 5), 1), ((2, 5, 3), -1)])
def test_scales_along_an_axis_as_the_runtime(dtype, shape, axis):
    scheme = Scheme(dtype=dtype, symmetric=False, granularity="per-channel", axis=axis)
    random = np.random.default_rng(1)
    values = (random.standard_normal(shape) * 3).astype(np.float32)
    others = tuple(place for place in range(len(shape)) if place != axis % len(shape))
    scale, zero_point = affine_parameters(values.min(others), values.max(others), scheme)
    assert scale.shape == zero_point.shape == (3,)
    found = quantize(values, scale, zero_point, scheme)
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    np.testing.assert_array_equal(found, runtime("QuantizeLinear", code, axis, values, scale, zero_point))
    wanted = runtime("DequantizeLinear", onnx.TensorProto.FLOAT, axis, found, scale, zero_point)
    np.testing.assert_array_equal(dequantize(found, scale, zero_point, axis), wanted)


def test_each_channel_is_its_own_tensor():
    scheme = Scheme(dtype="int8", symmetric=True, granularity="per-channel", axis=0)
    alone = Scheme(dtype="int8", symmetric=True)
    values = np.random.default_rng(2).standard_normal((4, 9)).astype(np.float32) * [[1], [10], [0.1], [0]]
    values = values.astype(np.float32)
    scale, zero_point = affine_parameters(values.min(1), values.max(1), scheme)
    together = quantize(values, scale, zero_point, scheme)
    for row, integers in zip(values, together, strict=True):
        one_scale, one_point = affine_parameters(row.min(), row.max(), alone)
        np.testing.assert_array_equal(integers, quantize(row, one_scale, one_point, alone))
