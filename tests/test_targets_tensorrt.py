"""The check of a model against TensorRT's operator tables: one small model per rule."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.graph.errors import TargetError
from edgepress.graph.model import Model, Origin
from edgepress.targets.operator_table import first_support, operator_table, operator_tables
from edgepress.targets.registry import list_targets, load_target
from edgepress.targets.tensorrt import check_operators
from onnx import TensorProto, helper, numpy_helper

ON_GPU = [summary.name for summary in list_targets() if load_target(summary.name).runtime.name == "tensorrt"]
NEVER = (
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearConv",
    "QLinearMatMul",
)


def _model(nodes, *, opset=17, kind=TensorProto.FLOAT, shape=(1, 4, 8, 8), out=None, domains=(), **weights):
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    outputs = [helper.make_tensor_value_info("y", out or kind, None)]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return Model(ir.from_proto(proto), origin=Origin(kind="onnx", name="m.onnx"))


def _node(op, inputs=("x",), outputs=("y",), **attributes):
    return helper.make_node(op, list(inputs), list(outputs), name=f"the_{op}", **attributes)


def _check(model, target="jetson-orin-nx", *overrides):
    return check_operators(model, load_target(target, overrides))


def _found(check, level="blocked"):
    return [item for item in check.findings if item.level == level]


def _only(model, target="jetson-orin-nx", level="blocked"):
    (item,) = _found(_check(model, target), level)
    return item


def test_a_plain_model_is_ready_everywhere():
    model = _model([_node("Relu")], opset=13)
    for name in ON_GPU:
        check = _check(model, name)
        assert check.ready
        # A strongly typed network keeps the file's FP32.
        assert [item.level for item in check.findings] == (["note"] if name == "jetson-thor" else [])
        assert check.verdict.startswith(f"READY for {name}")
        assert "No engine was built" in check.verdict


@pytest.mark.parametrize("op", NEVER)
@pytest.mark.parametrize("target", ["jetson-nano", "jetson-xavier-nx", "jetson-orin-nx", "a100-80gb"])
def test_integer_operators_are_never_taken(op, target):
    item = _only(_model([_node(op)], opset=13), target)
    assert (item.rule, item.op, item.nodes) == ("operator", op, (f"the_{op}",))
    assert "symmetric INT8" in item.remedy
    assert "no table read takes it" in item.reason


@pytest.mark.parametrize(
    ("opset", "target", "limit"),
    [
        (17, "jetson-nano", "13"),
        (18, "jetson-xavier-nx", "17"),
        (21, "jetson-orin-nano", "20"),
        (25, "a100-40gb", "24"),
    ],
)
def test_an_opset_that_is_too_new(opset, target, limit):
    check = _check(_model([_node("Relu")], opset=opset), target)
    (item,) = _found(check)
    assert (item.rule, item.op) == ("opset", "(model)")
    assert f"newer than {limit}" in item.reason
    assert f"opset_version={limit}" in item.remedy
    assert check.verdict.startswith("NOT READY")
    assert "the opset" in check.verdict


def test_an_opset_that_is_too_old():
    model = _model([_node("Relu")], opset=8)
    assert "older than 9" in _only(model).reason
    assert _check(model, "jetson-nano").ready


def test_layer_normalization_on_8_5_is_to_be_exported_decomposed():
    model = _model([_node("LayerNormalization", ("x", "s"))], s=np.ones(8, np.float32))
    item = _only(model, "jetson-xavier-nx")
    assert "opset 16" in item.remedy
    assert "8.6 is the first" in item.reason
    assert _check(model).ready


def test_its_second_output_may_not_be_used():
    nodes = [
        _node("LayerNormalization", ("x", "s"), ("n", "mean")),
        helper.make_node("Add", ["n", "mean"], ["y"]),
    ]
    item = _only(_model(nodes, s=np.ones(8, np.float32)))
    assert (item.rule, item.op) == ("restriction", "LayerNormalization")


def test_other_domains_need_a_plugin():
    model = _model([_node("Gelu", domain="com.microsoft")], domains=("com.microsoft",))
    item = _only(model)
    assert (item.rule, item.op) == ("domain", "com.microsoft::Gelu")


def _quantized(zero_point, scale=0.1, **more):
    nodes = [
        _node("QuantizeLinear", ("x", "s", "z"), ("q",)),
        _node("DequantizeLinear", ("q", "s", "z"), ("y",)),
    ]
    return _model(nodes, s=np.float32(scale), z=zero_point, **more)


def test_symmetric_q_dq_is_taken_where_the_gpu_has_int8():
    model = _quantized(np.int8(0), opset=13)
    for name in ON_GPU:
        assert _check(model, name).ready == (name != "jetson-nano")
    item = _only(model, "jetson-nano")
    assert item.rule == "precision"
    assert "no INT8" in item.reason


@pytest.mark.parametrize(
    ("zero_point", "why"),
    [(np.int8(3), "not 0"), (np.uint8(0), "UINT8"), (np.uint8(128), "UINT8"), (np.int16(0), "INT16")],
)
def test_asymmetric_q_dq_is_refused(zero_point, why):
    check = _check(_quantized(zero_point))
    assert [item.op for item in _found(check)] == ["QuantizeLinear", "DequantizeLinear"]
    assert all(why in item.reason and "symmetrically" in item.remedy for item in _found(check))


def test_a_missing_zero_point_means_uint8_and_an_int8_constant_node_is_read():
    nodes = [_node("QuantizeLinear", ("x", "s"), ("y",))]
    assert "UINT8" in _only(_model(nodes, out=TensorProto.UINT8, s=np.float32(1))).reason
    zero = helper.make_node("Constant", [], ["z"], value=numpy_helper.from_array(np.int8(5)))
    nodes = [zero, _node("QuantizeLinear", ("x", "s", "z"), ("y",))]
    assert "not 0" in _only(_model(nodes, out=TensorProto.INT8, s=np.float32(1))).reason


def test_scales_are_constants_and_per_channel_only_for_weights():
    nodes = [_node("ReduceMax", ("x",), ("s",), keepdims=0), _node("QuantizeLinear", ("x", "s", "z"), ("y",))]
    model = _model(nodes, out=TensorProto.INT8, z=np.int8(0))
    assert "scale is computed" in _only(model).reason
    nodes = [_node("QuantizeLinear", ("x", "s", "z"), ("y",), axis=1)]
    scales = {"s": np.ones(4, np.float32), "z": np.zeros(4, np.int8)}
    assert "per channel" in _only(_model(nodes, out=TensorProto.INT8, **scales)).reason
    nodes = [
        _node("QuantizeLinear", ("w", "s", "z"), ("q",), axis=0),
        _node("DequantizeLinear", ("q", "s", "z"), ("d",), axis=0),
        _node("Conv", ("x", "d")),
    ]
    weights = {**scales, "w": np.ones((4, 4, 3, 3), np.float32)}
    assert _check(_model(nodes, opset=13, **weights), "jetson-xavier-nx").ready


def test_int32_biases_stay_in_float():
    nodes = [
        _node("DequantizeLinear", ("b", "s"), ("d",)),
        _node("Add", ("x", "d")),
    ]
    item = _only(_model(nodes, b=np.ones(8, np.int32), s=np.float32(1)))
    assert "INT32" in item.reason


@pytest.mark.parametrize(
    ("node", "weights", "target", "word"),
    [
        (_node("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]), {}, "jetson-orin-nx", "dilations"),
        (_node("AveragePool", kernel_shape=[2]), {}, "jetson-orin-nx", "one axis"),
        (_node("Conv", ("x", "w")), {"w": np.ones((4, 4, 3), np.float32)}, "jetson-nano", "1 spatial"),
        (
            _node("TopK", ("x", "k"), ("y", "i"), sorted=0),
            {"k": np.array([2])},
            "jetson-orin-nx",
            "sorted is 0",
        ),
        (_node("TopK", ("x", "k"), ("y", "i")), {"k": np.array([3840])}, "jetson-orin-nx", "K is 3840"),
        (
            _node("ScatterND", ("x", "i", "u"), reduction="add"),
            {"i": np.zeros((1, 1), np.int64), "u": np.ones((1, 4, 8, 8), np.float32)},
            "jetson-orin-nx",
            "'add'",
        ),
        (
            _node("Resize", ("x", "", "s"), mode="cubic"),
            {"s": np.ones(4, np.float32)},
            "jetson-nano",
            "cubic",
        ),
        (
            _node("Resize", ("x", "", "s"), coordinate_transformation_mode="tf_crop_and_resize"),
            {"s": np.ones(4, np.float32)},
            "jetson-orin-nx",
            "tf_crop",
        ),
        (
            _node("LSTM", ("x", "w", "w"), ("y",), layout=1, hidden_size=2),
            {"w": np.ones(2, np.float32)},
            "jetson-orin-nx",
            "layout",
        ),
        (
            _node(
                "GRU",
                ("x", "w", "w"),
                direction="bidirectional",
                hidden_size=2,
                activations=["Sigmoid", "Tanh", "Sigmoid", "Relu"],
            ),
            {"w": np.ones(2, np.float32)},
            "jetson-xavier-nx",
            "directions",
        ),
        (_node("Dropout", ("x", "", "t")), {"t": np.True_}, "jetson-orin-nx", "training"),
        (_node("Einsum", equation="...i->..."), {}, "jetson-nano", "...i"),
    ],
)
def test_restrictions_that_a_node_shows(node, weights, target, word):
    check = _check(_model([node], opset=13 if target == "jetson-nano" else 17, **weights), target)
    found = [item for item in _found(check) if item.rule == "restriction"]
    assert len(found) == 1
    assert word in found[0].reason
    assert found[0].nodes == (node.name,)
    assert found[0].remedy


@pytest.mark.parametrize(
    ("op", "opset", "target"),
    [("Slice", 17, "jetson-orin-nx"), ("ReduceSum", 17, "jetson-orin-nx"), ("Unsqueeze", 13, "jetson-nano")],
)
def test_inputs_that_must_be_constants(op, opset, target):
    axes = _node("Cast", ("f",), ("a",), to=TensorProto.INT64)
    inputs = ("x", "k", "k", "a") if op == "Slice" else ("x", "a")
    given = {"f": np.array([1], np.float32), "k": np.array([1])}
    item = _only(_model([axes, _node(op, inputs)], opset=opset, **given), target)
    assert (item.rule, item.op) == ("restriction", op)
    assert "is computed" in item.reason
    inputs = tuple("k" if name == "a" else name for name in inputs)
    assert _check(_model([_node(op, inputs)], opset=opset, **given), target).ready


def test_four_axes_of_attention_and_grid_sample():
    given = {"g": np.zeros((1, 2, 2, 2), np.float32)}
    assert _check(_model([_node("GridSample", ("x", "g"))], **given)).ready
    flat = _model([_node("GridSample", ("x", "g"))], shape=(1, 4, 8, 8, 8), **given)
    assert "5 axes" in _only(flat).reason
    assert _check(_model([_node("Attention", ("x", "x", "x"))], opset=23), "jetson-thor").ready
    attention = _model([_node("Attention", ("x", "x", "x"), softcap=2.0)], opset=23, shape=(1, 4, 8))
    check = _check(attention, "jetson-thor")
    assert [re.match(r"Q, K|softcap", item.reason) is not None for item in _found(check)] == [True, True]


def test_restrictions_that_cannot_be_read_are_left_to_the_reader():
    item = _only(_model([_node("RandomUniformLike")]), level="check")
    assert "seed" in item.reason
    assert "1 to check" in _check(_model([_node("RandomUniformLike")])).verdict


def test_types():
    assert "FP16" in _only(_model([_node("And", ("x", "x"))], kind=TensorProto.FLOAT16)).reason
    strings = _model([_node("Identity")], kind=TensorProto.STRING)
    moved = [_node("Transpose", ("x",), perm=[0, 2, 3, 1])]
    assert "before QuantizeLinear" in _only(_model(moved, kind=TensorProto.INT8), level="check").remedy
    assert "no type STRING" in _only(strings).reason
    whole = _model([_node("Sqrt")], kind=TensorProto.INT32)
    assert _only(whole, level="check").rule == "type"
    double = _only(_model([_node("Relu")], kind=TensorProto.DOUBLE), level="note")
    assert "FP32" in double.reason
    narrowed = _only(_model([_node("Add", ("x", "x"))], kind=TensorProto.INT64), "jetson-xavier-nx", "note")
    assert "INT32" in narrowed.reason
    assert not _check(_model([_node("Add", ("x", "x"))], kind=TensorProto.INT64)).findings


@pytest.mark.parametrize(
    ("target", "level"),
    [
        ("jetson-xavier-nx", "blocked"),
        ("jetson-orin-nx", "check"),
        ("a100-40gb", None),
        ("jetson-thor", None),
    ],
)
def test_bfloat16_depends_on_the_gpu(target, level):
    check = _check(_model([_node("Add", ("x", "x"))], kind=TensorProto.BFLOAT16), target)
    assert [item.level for item in check.findings] == ([] if level is None else [level])
    assert check.ready == (level != "blocked")


def test_nodes_with_the_same_fault_are_one_finding_and_branches_are_looked_into():
    nodes = [helper.make_node("Det", ["x"], [f"d{place}"], name=f"n{place}") for place in range(3)]
    nodes.append(helper.make_node("Sum", ["d0", "d1", "d2"], ["y"]))
    assert _only(_model(nodes)).nodes == ("n0", "n1", "n2")
    body = helper.make_graph(
        [helper.make_node("Det", ["x"], ["inner"], name="within")],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    branch = helper.make_node("If", ["c"], ["y"], name="if", then_branch=body, else_branch=body)
    blocked = _found(_check(_model([branch], c=np.True_)))
    assert "within" in blocked[0].nodes


def test_functions_of_the_model_itself_are_looked_into_not_refused():
    body = [helper.make_node("Det", ["a"], ["b"], name="within")]
    opset = [helper.make_opsetid("", 17)]
    function = helper.make_function("mine", "Mine", ["a"], ["b"], body, opset)
    model = _model([_node("Mine", domain="mine")], domains=("mine",))
    proto = ir.to_proto(model.ir)
    proto.functions.append(function)
    item = _only(Model(ir.from_proto(proto), origin=model.origin))
    assert (item.op, item.nodes) == ("Det", ("within",))


def test_the_model_is_left_as_it_is():
    model = _model([_node("Relu", ("x",), ("r",)), _node("Relu", ("r",), ("y",))])
    before = model.fingerprint()
    _check(model)
    assert model.fingerprint() == before


def test_tables():
    tables = operator_tables()
    assert "onnx-tensorrt" in tables.source
    assert tables.license.startswith("Apache-2.0")
    counts = {
        name: (table.opset_max, len(table.operators), len(table.unsupported))
        for name, table in tables.versions.items()
    }
    # As counted in the tables themselves.
    assert counts == {
        "8.2": (13, 129, 36),
        "8.5": (17, 139, 41),
        "8.6": (17, 145, 36),
        "10.1": (20, 150, 46),
        "10.15": (24, 158, 42),
    }
    assert [name for name, table in tables.versions.items() if table.hand_transcribed] == ["10.15"]
    assert first_support("LayerNormalization") == "8.6"
    assert first_support("MatMulInteger") is None
    for table in tables.versions.values():
        assert not set(table.operators) & set(table.unsupported)
        assert set(NEVER) <= set(table.unsupported)


def test_every_target_stands_on_a_table_of_its_opset():
    for name in ON_GPU:
        runtime = load_target(name).runtime
        assert runtime.operator_table is not None
        assert runtime.max_opset == operator_table(runtime.operator_table).opset_max


def test_a_table_or_a_target_that_does_not_exist():
    model = _model([_node("Relu")])
    with pytest.raises(TargetError, match=r"no operator table of TensorRT 9\.9"):
        _check(model, "jetson-nano", "target.runtime.operator_table='9.9'")
    with pytest.raises(TargetError, match="no TensorRT target"):
        _check(model, "raspberry-pi-5")
