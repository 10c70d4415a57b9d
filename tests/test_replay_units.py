"""Cutting a quantized graph into units: which there are, and that each computes what the whole graph does."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import replay_case
from edgepress.export.replay_record import record_units
from edgepress.export.replay_units import (
    cut_units,
    in_bodies,
    is_integer_kernel,
    is_integer_operator,
)
from edgepress.runtimes.base import SessionOptions
from onnx import TensorProto, helper


def operators(unit):
    return [item.op_type for item in unit.nodes]


def recorded(bundle_folder, feeds, folder, **more):
    """A recording of a model file; the bundle's folder needs nothing but the model."""
    (bundle_folder / "source.onnx").rename(bundle_folder / "model.onnx")
    return record_units(bundle_folder, feeds, SessionOptions(), folder, **more)


def test_units_of_a_static_net(tmp_path):
    units = cut_units(replay_case.static_net(tmp_path))
    assert [operators(unit) for unit in units] == [
        ["QuantizeLinear"],
        [*["DequantizeLinear"] * 3, "Conv", "Relu", "QuantizeLinear"],
        [*["DequantizeLinear"] * 2, "Conv", "QuantizeLinear"],
        [*["DequantizeLinear"] * 2, "Add", "QuantizeLinear"],
        ["DequantizeLinear", "Reshape", "DequantizeLinear", "MatMul"],
    ]
    assert [[value.name for value in unit.inputs] for unit in units] == [
        ["x"], ["xq"], ["rq"], ["rq", "eq"], ["aq"],
    ]  # fmt: skip
    assert [[value.name for value in unit.outputs] for unit in units] == [
        ["xq"],
        ["rq"],
        ["eq"],
        ["aq"],
        ["m"],
    ]


def test_a_shared_quantization_is_a_unit_of_its_own_and_one_of_a_single_reader_is_not(tmp_path):
    units = cut_units(replay_case.dynamic_net(tmp_path))
    product = ["MatMulInteger", "Cast", "Mul", "Mul", "Add"]
    assert [operators(unit) for unit in units] == [
        ["DynamicQuantizeLinear"],
        product,
        product,
        ["DynamicQuantizeLinear", *product],
    ]
    assert {value.name for value in units[1].inputs} == {"x.q", "x.s", "x.z"}


@pytest.mark.parametrize("net", [replay_case.static_net, replay_case.dynamic_net])
def test_a_unit_computes_what_the_whole_graph_does(net, tmp_path):
    model = net(tmp_path)
    shape = (2, 3, 8, 8) if net is replay_case.static_net else (2, 32)
    feeds = {"x": np.random.default_rng(2).standard_normal(shape).astype(np.float32)}
    proto = onnx.load(tmp_path / "source.onnx")
    names = {value.name for unit in cut_units(model) for value in unit.outputs}
    own = {value.name for value in proto.graph.output}
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sorted(names - own))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options)
    whole = dict(zip([item.name for item in session.get_outputs()], session.run(None, feeds), strict=True))
    recording = recorded(tmp_path, [feeds], tmp_path)
    assert recording.units == len(recording.models) == len(cut_units(model))
    for item, files in zip(recording.models, recording.feeds, strict=True):
        single = ort.InferenceSession(item.data, options)
        given = {f"i{place}": np.load(tmp_path / name) for place, name in enumerate(files[0])}
        for value, result in zip(item.unit.outputs, single.run(None, given), strict=True):
            assert result.tobytes() == whole[value.name].tobytes(), item.name


def test_equal_units_are_one_model_that_is_fed_at_both_places(tmp_path):
    replay_case.dynamic_net(tmp_path, twice=True)
    feeds = [{"x": np.full((1, 32), value, np.float32)} for value in (0.5, -2.0)]
    recording = recorded(tmp_path, feeds, tmp_path)
    equal = [item for item in recording.models if len(item.places) > 1]
    assert [len(item.places) for item in equal] == [2]
    assert sum(len(item.places) for item in recording.models) == recording.units
    files = recording.feeds[recording.models.index(equal[0])]
    assert len(files) == 2 * len(feeds)


def test_a_limit_leaves_out_samples_and_then_units_and_counts_them(tmp_path):
    replay_case.static_net(tmp_path)
    feeds = [{"x": np.zeros((1, 3, 8, 8), np.float32)}] * 3
    recording = recorded(tmp_path, feeds, tmp_path, limit_bytes=1_500)
    assert recording.samples == 1
    left = recording.units - sum(len(item.places) for item in recording.models)
    assert left > 0
    assert list(recording.left_out.values()) == [left]


def test_constants_between_are_no_units_and_bodies_are_counted(tmp_path):
    body = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("d", TensorProto.FLOAT, ["N", 4])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, ["N", 4])],
    )
    nodes = [
        replay_case.node("DequantizeLinear", ["w", "s", "z"], "wd"),
        replay_case.node("If", ["condition"], "chosen", then_branch=body, else_branch=other),
        replay_case.node("MatMul", ["chosen", "wd"], "y"),
    ]
    weights = {
        "w": np.ones((4, 3), np.uint8),
        "s": np.float32(0.5),
        "z": np.uint8(0),
        "condition": np.array(True),
    }
    model = replay_case.model_of(
        tmp_path, nodes, {"x": (TensorProto.FLOAT, ["N", 4])}, {"y": (TensorProto.FLOAT, ["N", 3])}, weights
    )
    assert cut_units(model) == ()
    assert in_bodies(model) == 2


def test_a_float_operator_between_pairs_is_no_unit_but_its_quantizations_are(tmp_path):
    nodes = [
        replay_case.node("QuantizeLinear", ["x", "s", "z"], "xq"),
        replay_case.node("DequantizeLinear", ["xq", "s", "z"], "xd"),
        replay_case.node("Tanh", ["xd"], "t"),
        replay_case.node("QuantizeLinear", ["t", "s", "z"], "tq"),
        replay_case.node("DequantizeLinear", ["tq", "s", "z"], "y"),
    ]
    kinds = {"x": (TensorProto.FLOAT, ["N", 4])}, {"y": (TensorProto.FLOAT, ["N", 4])}
    model = replay_case.model_of(tmp_path, nodes, *kinds, {"s": np.float32(0.1), "z": np.uint8(0)})
    assert [operators(unit) for unit in cut_units(model)] == [
        ["QuantizeLinear"],
        ["DequantizeLinear"],
        ["QuantizeLinear"],
        ["DequantizeLinear"],
    ]


def test_what_counts_as_an_integer_kernel():
    assert is_integer_operator("QLinearConv")
    assert is_integer_operator("MatMulNBits")
    assert not is_integer_operator("Conv")
    assert is_integer_kernel(["Transpose", "QLinearConv"])
    assert is_integer_kernel(["QuantizeLinear"])
    assert not is_integer_kernel(["DequantizeLinear", "Conv", "QuantizeLinear"])
    assert not is_integer_kernel([])
