"""Weights: scales per channel against a slow loop, lazily read weights, what cannot be held."""

import compress_case as case
import numpy as np
import onnx_ir as ir
import pytest
from edgepress.compress.quantize.blocks import quantize_blocks
from edgepress.compress.quantize.weights import quantize_weight
from edgepress.graph.errors import ModelError
from edgepress.graph.load import load_model
from edgepress.graph.scheme import Scheme
from edgepress.graph.weights import MappedTensor
from hypothesis import given
from hypothesis import strategies as st


def per_channel(axis, reduced=False):
    granularity = "per-tensor" if axis is None else "per-channel"
    return Scheme(dtype="int8", symmetric=True, granularity=granularity, axis=axis, reduced_range=reduced)


def slow(weight, axis, largest_integer):
    """Jacob et al. 2018, section 2.1, symmetric: one channel after the other, one number after the other."""
    channels = [weight] if axis is None else list(np.moveaxis(weight, axis, 0))
    scales, rows = [], []
    for channel in channels:
        largest = max((abs(float(value)) for value in channel.ravel()), default=0.0)
        scale = np.float32(largest / largest_integer) if largest > 0 else np.float32(1)
        row = [int(np.rint(np.float32(value) / scale)) for value in channel.ravel()]
        rows.append(
            np.array([max(-largest_integer, min(largest_integer, item)) for item in row]).reshape(
                channel.shape
            )
        )
        scales.append(scale)
    if axis is None:
        return rows[0], scales[0]
    return np.moveaxis(np.stack(rows), 0, axis), np.array(scales)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 7), 0), ((5, 7), 1), ((6, 3, 3, 3), 0), ((2, 6, 3), 1), ((4, 4), None), ((1, 9), 1)],
)
def test_against_a_slow_loop(shape, axis, reduced):
    weight = case.random(1, *shape)
    weight[0] = 0
    integers, scale = quantize_weight(ir.tensor(weight), per_channel(axis, reduced))
    expected, expected_scale = slow(weight, axis, 63 if reduced else 127)
    assert integers.dtype == ir.DataType.INT8
    np.testing.assert_array_equal(integers.numpy(), expected)
    np.testing.assert_array_equal(scale, expected_scale)


@given(st.integers(0, 2**32 - 1), st.floats(1e-20, 1e20), st.sampled_from([0, 1, None]))
def test_error_is_at_most_half_a_step(seed, magnitude, axis):
    weight = case.random(seed, 4, 6, scale=magnitude)
    integers, scale = quantize_weight(ir.tensor(weight), per_channel(axis))
    step = scale if axis is None else scale.reshape((-1, 1) if axis == 0 else (1, -1))
    assert (np.abs(integers.numpy() * step.astype(np.float64) - weight) <= 0.5001 * step).all()


def test_a_mapped_weight_is_read_when_it_is_written(tmp_path):
    """What lies in a file stays there: the integers are computed at each use, and released."""
    import onnx

    weight = case.random(1, 64, 32)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N,64] x) => (float[N,32] y) { y = MatMul(x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="d", size_threshold=0)
    tensor = load_model(tmp_path / "m.onnx").graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    integers, scale = quantize_weight(tensor, per_channel(1))
    expected, expected_scale = slow(weight, 1, 127)
    assert isinstance(integers, ir.LazyTensor)
    assert (integers.dtype, tuple(integers.shape)) == (ir.DataType.INT8, (64, 32))
    np.testing.assert_array_equal(integers.numpy(), expected)
    np.testing.assert_array_equal(scale, expected_scale)


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_a_weight_without_a_scale(wrong):
    weight = case.random(1, 4, 4)
    weight[2, 1] = wrong
    with pytest.raises(ModelError, match="infinite values") as raised:
        quantize_weight(ir.tensor(weight, name="head.w"), per_channel(1))
    assert "head.w" in raised.value.where
    assert raised.value.remedy == "keep it in float: --keep-float 'head.w'"


@pytest.mark.parametrize(
    ("depth", "width", "size"), [(128, 3, 128), (100, 5, 32), (256, 4, 128), (16, 1, 16)]
)
def test_blocks_against_a_slow_loop(depth, width, size):
    weight = case.random(2, depth, width)
    weight[:size, 0] = 0
    integers, scales = quantize_blocks(weight, size)
    count = -(-depth // size)
    assert (integers.shape, scales.shape) == ((width, count, size), (width, count))
    for column in range(width):
        for block in range(count):
            values = weight[block * size : (block + 1) * size, column]
            largest = np.abs(values).max()
            scale = np.float32(largest / np.float32(127)) if largest > 0 else np.float32(1)
            assert scales[column, block] == pytest.approx(scale, rel=1e-6)
            expected = np.clip(np.rint(values / scales[column, block]), -127, 127) + 128
            np.testing.assert_array_equal(integers[column, block, : len(values)], expected)
            assert (integers[column, block, len(values) :] == 128).all()


def test_blocks_of_the_smallest_numbers():
    integers, scales = quantize_blocks(np.full((16, 1), 1e-44, np.float32), 16)
    assert (integers == 128).all()
    assert (scales > 0).all()
