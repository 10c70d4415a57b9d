"""Rounding that the layer's output steers, and the columns that a layer multiplies."""

import hypothesis.strategies as st
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from edgepress.compress.refine.patches import Window, as_rows, columns_of, from_rows, patches, window_of
from edgepress.compress.refine.rounding import output_error, round_weight
from hypothesis import given
from onnx import TensorProto, helper


def second_moments(seed, inputs, columns=200):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((inputs, inputs)) @ rng.standard_normal((inputs, columns))
    extended = np.concatenate([mixed + 0.5, np.ones((1, columns))])
    return extended @ extended.T


def slow_rounding(weight, second, scale, limits, damping):
    """Optimal brain quantization as its paper has it: one column at a time, the inverse updated each time."""
    inputs = weight.shape[1] - 1
    hessian = second + np.eye(inputs + 1) * damping * np.mean(np.diag(second))
    order = sorted(range(inputs), key=lambda column: -second[column, column])
    rest, integers = weight.copy(), np.zeros((len(weight), inputs), int)
    left = [*range(inputs + 1)]
    for column in order:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        place = left.index(column)
        nearest = np.clip(np.rint(rest[:, column] / scale), *limits)
        integers[:, column] = nearest
        error = (rest[:, column] - nearest * scale) / inverse[place, place]
        rest[:, left] -= np.outer(error, inverse[place])
        left.remove(column)
    return integers, rest[:, inputs]


@pytest.mark.parametrize("inputs", [1, 5, 70, 130])
def test_rounding_is_that_of_the_paper(inputs):
    weight = np.random.default_rng(1).standard_normal((3, inputs + 1))
    second, scale = second_moments(2, inputs, 2 * inputs + 9), np.abs(weight[:, :-1]).max(axis=1) / 7
    wanted, bias = slow_rounding(weight, second, scale, (-7, 7), 0.01)
    found, moved = round_weight(weight, second, scale, (-7, 7), 0.01)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(moved, bias, atol=1e-8)


@given(st.integers(0, 10**6), st.integers(2, 20))
def test_integers_stay_in_range_and_a_zero_moment_rounds_to_nearest(seed, inputs):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((4, inputs + 1)) * 3
    scale = np.full(4, 0.25)
    found, bias = round_weight(weight, np.zeros((inputs + 1, inputs + 1)), scale, (-7, 7))
    np.testing.assert_array_equal(found, np.clip(np.rint(weight[:, :-1] / 0.25), -7, 7))
    np.testing.assert_allclose(bias, weight[:, -1])
    steered, _ = round_weight(weight, second_moments(seed, inputs), scale, (-7, 7))
    assert steered.min() >= -7
    assert steered.max() <= 7


def test_the_output_changes_less_than_with_nearest_integers():
    weight = np.random.default_rng(3).standard_normal((16, 41))
    second, scale = second_moments(4, 40), np.abs(weight[:, :-1]).max(axis=1) / 127
    integers, bias = round_weight(weight, second, scale, (-127, 127))
    steered = np.concatenate([integers * scale[:, None], bias[:, None]], axis=1) - weight
    nearest = weight.copy()
    nearest[:, :-1] = np.rint(weight[:, :-1] / scale[:, None]) * scale[:, None]
    assert output_error(steered, second) < 0.5 * output_error(nearest - weight, second)


def test_output_error_is_that_of_the_columns():
    rng = np.random.default_rng(5)
    change, columns = rng.standard_normal((3, 4)), rng.standard_normal((4, 9))
    assert output_error(change, columns @ columns.T) == pytest.approx(np.square(change @ columns).sum())


CONVOLUTIONS = [
    {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [0, 1, 2, 0]},
    {"kernel_shape": [2, 2], "dilations": [2, 3], "group": 2},
    {"kernel_shape": [1, 1], "group": 4},
]


@pytest.mark.parametrize("attributes", CONVOLUTIONS)
def test_weight_times_columns_is_the_convolution(attributes):
    rng = np.random.default_rng(6)
    groups = attributes.get("group", 1)
    x = rng.standard_normal((2, 4, 9, 8)).astype("f4")
    weight = rng.standard_normal((8, 4 // groups, *attributes["kernel_shape"])).astype("f4")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.ravel())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    expected = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    node = ir.from_proto(model).graph[0]
    window = window_of(node, weight.shape)
    rows = as_rows(node, weight)
    columns = columns_of(x, window)
    found = (rows @ columns).reshape(8, 2, *expected.shape[2:]).swapaxes(0, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(from_rows(node, rows, weight.shape), weight)


def test_sparse_positions_are_some_of_all():
    x = np.random.default_rng(7).standard_normal((1, 2, 7, 6)).astype("f4")
    window = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 1)
    every = patches(x, window).reshape(18, 7, 6)
    np.testing.assert_array_equal(patches(x, window, 3, 1).reshape(18, 2, 2), every[:, 1::3, 1::3])


def test_padding_that_follows_from_the_size_is_left_alone():
    node = ir.node("Conv", [ir.val("x"), ir.val("w")], attributes={"auto_pad": "SAME_UPPER"})
    assert window_of(node, (8, 4, 3, 3)) is None


@pytest.mark.parametrize("turned", [0, 1])
def test_matrices_turn_into_rows_and_back(turned):
    weight = np.arange(6.0).reshape(2, 3)
    node = ir.node("Gemm", [ir.val("x"), ir.val("w")], attributes={"transB": turned})
    rows = as_rows(node, weight)
    np.testing.assert_array_equal(rows[0], weight if turned else weight.T)
    np.testing.assert_array_equal(from_rows(node, rows, weight.shape), weight)
    scaled = ir.node("Gemm", [ir.val("x"), ir.val("w")], attributes={"alpha": 2.0})
    assert as_rows(scaled, weight) is None
