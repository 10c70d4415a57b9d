"""Loading: every kind of bad file is refused with what, why and what to do; what is good stays whole."""

import os
import struct

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.errors import EdgepressError, ModelError, NotSupported
from edgepress.graph.load import load_model, require_no_nan
from edgepress.graph.metadata import drop_metadata
from edgepress.graph.passes import run_passes
from edgepress.graph.save import to_bytes
from edgepress.graph.weights import MappedTensor, SharedMap
from onnx import TensorProto, helper, numpy_helper

RELU = "g (float[N,4] x) => (float[N,4] y) <float[4] w = {1,2,3,4}> { a = Add(x, w)  y = Relu(a) }"


def write(folder, proto):
    path = folder / "model.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def refused(path, what, why="", kind=ModelError):
    """Loading fails with these words, and with a remedy."""
    with pytest.raises(kind) as caught:
        load_model(path)
    error = caught.value
    assert what in error.what
    assert why in (error.why or "")
    assert error.remedy
    assert error.where
    return error


def with_external(tmp_path, *, location="w.bin", offset=None, length=None, data=None, dims=(4,), data_type=1):
    """A model whose weight w lies in a data file."""
    proto = zoo.parse(RELU)
    proto.graph.initializer[0].Clear()
    tensor = proto.graph.initializer[0]
    tensor.name, tensor.data_type, tensor.data_location = "w", data_type, TensorProto.EXTERNAL
    tensor.dims.extend(dims)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    if data is not None:
        (tmp_path / "w.bin").write_bytes(data)
    return write(tmp_path, proto)


FOUR = np.array([1, 2, 3, 4], "<f4").tobytes()

# Files that are no models


def test_missing(tmp_path):
    refused(tmp_path / "no.onnx", "the model file does not exist")


def test_a_name_too_long_for_the_system(tmp_path):
    refused(tmp_path / ("n" * 5000), "the model file does not exist")


def test_a_dangling_link(tmp_path):
    (tmp_path / "model.onnx").symlink_to(tmp_path / "gone")
    refused(tmp_path / "model.onnx", "the model is not a file")


def test_a_folder(tmp_path):
    refused(tmp_path, "the model is not a file")


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "the model is not a file")


def test_empty(tmp_path):
    refused(write(tmp_path, b""), "the model file is empty")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"PK\x03\x04\x14\0\0\0", "a zip archive"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a git-lfs pointer"),
        (b"\x80\x02}q\x00.", "a Python pickle"),
        (b"\x80\x04\x95\x00", "a Python pickle"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n\n<html>", "a web page"),
        (b'{"graph": {}}', "a JSON file"),
        (b"\x1c\0\0\0TFL3\0\0", "a TensorFlow Lite model"),
        (b"\x1c\0\0\0ORTM\0\0", "onnxruntime's own .ort format"),
        (struct.pack("<Q", 2) + b"{}", "a safetensors file"),
        (b"\xff" * 100, "truncated, damaged or of another format"),
        (np.random.default_rng(0).bytes(4096), "truncated, damaged or of another format"),
    ],
)
def test_other_formats_are_named(tmp_path, data, kind):
    refused(write(tmp_path, data), "the file is not a readable ONNX model", kind)


def test_truncated_anywhere(tmp_path):
    data = zoo.parse(RELU).SerializeToString()
    for size in range(1, len(data), 7):
        with pytest.raises(ModelError) as caught:
            load_model(write(tmp_path, data[:size]))
        assert caught.value.remedy


@pytest.mark.parametrize("field", ["graph", "opset_import"])
def test_no_graph_or_no_operator_set(tmp_path, field):
    proto = zoo.parse(RELU)
    proto.ClearField(field)
    refused(write(tmp_path, proto), "the file is not an ONNX model")


# Graphs that are none


def changed(change, text=RELU):
    proto = zoo.parse(text)
    change(proto)
    return proto


def swap_nodes(proto):
    first, second = proto.graph.node[0], proto.graph.node[1]
    copy = onnx.NodeProto()
    copy.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(copy)


def cycle(proto):
    proto.graph.node[0].input[1] = "y"


def duplicate_value(proto):
    proto.graph.node[1].output[0] = "a"
    proto.graph.node.append(helper.make_node("Neg", ["a"], ["y"]))


def duplicate_weight(proto):
    proto.graph.initializer.append(proto.graph.initializer[0])


@pytest.mark.parametrize("change", [swap_nodes, cycle, duplicate_value, duplicate_weight])
def test_cyclic_unsorted_or_defined_twice(tmp_path, change):
    refused(write(tmp_path, changed(change)), "cyclic, unsorted, or defines a value twice")


def unknown_operator(proto):
    proto.graph.node[1].op_type = "Relux"


def test_unknown_operator(tmp_path):
    error = refused(write(tmp_path, changed(unknown_operator)), "the unknown operator 'Relux'")
    assert "standard ONNX operators" in error.remedy


def too_new(proto):
    proto.opset_import[0].version = 99


def test_an_operator_set_of_the_future(tmp_path):
    error = refused(write(tmp_path, changed(too_new)), "needs operator set 99, which is not known here")
    assert "or older" in error.remedy


def missing_input(proto):
    proto.graph.node[1].input[0] = "nowhere"


def missing_attribute(proto):
    proto.graph.node[1].op_type = "Cast"


def undeclared_domain(proto):
    proto.graph.node[1].domain = "acme"


def unmade_output(proto):
    proto.graph.output[0].name = "nowhere"


def untyped_input(proto):
    proto.graph.input[0].ClearField("type")


@pytest.mark.parametrize(
    "change", [missing_input, missing_attribute, undeclared_domain, unmade_output, untyped_input]
)
def test_what_the_checker_finds(tmp_path, change):
    with pytest.raises(ModelError) as caught:
        load_model(write(tmp_path, changed(change)))
    assert caught.value.why
    assert caught.value.remedy


def stray_reference(proto):
    attribute = proto.graph.node[1].attribute.add()
    attribute.name, attribute.ref_attr_name, attribute.type = "alpha", "slope", onnx.AttributeProto.FLOAT
    proto.graph.node[1].op_type = "LeakyRelu"


def test_a_reference_to_a_functions_attribute_outside_of_one(tmp_path):
    refused(write(tmp_path, changed(stray_reference)), "refers to a function's attribute")


def test_functions_that_explode(tmp_path):
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    functions = [
        helper.make_function("f", "F0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)
    ]
    for depth in range(1, 40):
        calls = [
            helper.make_node(f"F{depth - 1}", [source], [target], domain="f")
            for source, target in (("a", "m"), ("m", "b"))
        ]
        functions.append(helper.make_function("f", f"F{depth}", ["a"], ["b"], calls, opsets))
    x, y = (helper.make_tensor_value_info(name, 1, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("F39", ["x"], ["y"], domain="f")], "g", [x], [y])
    proto = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=8)
    refused(write(tmp_path, proto), f"the model has {2**39} nodes once its functions are inlined")


def test_functions_that_call_themselves(tmp_path):
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    call = helper.make_node("F", ["a"], ["b"], domain="f")
    function = helper.make_function("f", "F", ["a"], ["b"], [call], opsets)
    x, y = (helper.make_tensor_value_info(name, 1, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("F", ["x"], ["y"], domain="f")], "g", [x], [y])
    proto = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)
    with pytest.raises(ModelError, match="checker"):
        load_model(write(tmp_path, proto))


def test_maps_and_sparse_tensors_are_not_supported(tmp_path):
    proto = zoo.parse(RELU)
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, []))
    proto.graph.output.append(helper.make_value_info("probabilities", kind))
    refused(write(tmp_path, proto), "'probabilities', whose type is a map,", kind=NotSupported)
    proto = zoo.parse(RELU)
    values = helper.make_tensor("s", 1, [1], [5.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [1], [2]), [4])
    proto.graph.sparse_initializer.append(sparse)
    refused(write(tmp_path, proto), "sparse weights cannot be compiled", kind=NotSupported)
    proto = zoo.parse(RELU)
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["k"], sparse_value=sparse))
    refused(write(tmp_path, proto), "sparse constants cannot be compiled", kind=NotSupported)


# Weights inside the file


def weight(**fields):
    def change(proto):
        tensor = proto.graph.initializer[0]
        tensor.Clear()
        tensor.MergeFrom(TensorProto(**{"name": "w", "data_type": 1, "dims": [4], **fields}))

    return changed(change)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"raw_data": FOUR[:-1]}, "needs 16 bytes, the file holds 15"),
        ({"raw_data": FOUR * 100}, "the file holds 1600"),
        ({"float_data": [1, 2]}, "needs 16 bytes, the file holds 8"),
        ({"float_data": [1] * 1000}, "the file holds 4000"),
        ({"dims": [400], "float_data": [1] * 399}, "needs 1600 bytes, the file holds 1596"),
        ({"data_type": 10, "int32_data": [1, 2, 3]}, "the file holds 12"),
        ({"data_type": 12, "uint64_data": [1, 2, 3]}, "the file holds 12"),
        ({"data_type": 22, "int32_data": [1]}, "needs 2 bytes, the file holds 4"),
        ({"data_type": 8, "string_data": [b"a"]}, "needs 4 strings, the file holds 1"),
        ({}, "needs 16 bytes, the file holds 0"),
    ],
)
def test_data_that_does_not_fit_its_shape(tmp_path, fields, words):
    error = refused(write(tmp_path, weight(**fields)), "")
    assert words in (error.why or "") or "checker" in error.what


@pytest.mark.parametrize("fields", [{"dims": [-4]}, {"dims": [-2, -2]}, {"data_type": 99}, {"data_type": 0}])
def test_types_and_shapes_that_are_none(tmp_path, fields):
    refused(write(tmp_path, weight(raw_data=FOUR, **fields)), "")


@pytest.mark.parametrize(
    ("data_type", "field", "entries"),
    [
        (TensorProto.INT4, "int32_data", 2),
        (TensorProto.FLOAT16, "int32_data", 4),
        (TensorProto.BFLOAT16, "int32_data", 4),
        (TensorProto.BOOL, "int32_data", 4),
        (TensorProto.UINT8, "int32_data", 4),
        (TensorProto.UINT32, "uint64_data", 4),
        (TensorProto.COMPLEX64, "float_data", 8),
        (TensorProto.DOUBLE, "double_data", 4),
        (TensorProto.INT64, "int64_data", 4),
    ],
)
def test_every_typed_field_of_the_right_length_is_taken(tmp_path, data_type, field, entries):
    proto = zoo.parse(RELU)
    proto.graph.initializer.append(
        TensorProto(name="v", data_type=data_type, dims=[4], **{field: [1] * entries})
    )
    model = load_model(write(tmp_path, proto))
    assert model.graph.initializers["v"].const_value.numpy().shape == (4,)


def test_a_declared_type_that_is_not_the_datas(tmp_path):
    proto = zoo.parse(RELU)
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.INT64, [4]))
    refused(write(tmp_path, proto), "declared type is not that of its data")


# Weights in files beside it


@pytest.mark.parametrize(
    ("external", "what"),
    [
        ({"location": "no.bin"}, "external data file is missing"),
        ({"location": ""}, "points outside the model's folder"),
        ({"location": "/etc/passwd"}, "points outside the model's folder"),
        ({"location": "../w.bin"}, "points outside the model's folder"),
        ({"location": "a/../../w.bin"}, "points outside the model's folder"),
        ({"location": "."}, "external data file is missing"),
        ({"location": "n" * 5000}, "external data file is missing"),
        ({"data": b""}, "external data file is empty"),
        ({"data": FOUR[:-1]}, "external data does not fit its tensor"),
        ({"data": FOUR, "length": 15}, "external data does not fit its tensor"),
        ({"data": FOUR, "length": 17}, "external data does not fit its tensor"),
        ({"data": FOUR, "offset": 1}, "external data does not fit its tensor"),
        ({"data": FOUR, "offset": -4}, "external data does not fit its tensor"),
        ({"data": FOUR, "offset": "four"}, "external data does not fit its tensor"),
        ({"data": FOUR, "length": "1e9"}, "external data does not fit its tensor"),
        ({"data": FOUR, "offset": 10**30}, "external data does not fit its tensor"),
        ({"data": FOUR, "dims": (2**62, 4)}, "external data does not fit its tensor"),
        ({"data": FOUR, "dims": (-2, -2)}, "a tensor has no valid type or shape"),
        ({"data": FOUR, "data_type": 8}, "a tensor has no valid type or shape"),
        ({"data": FOUR, "data_type": 77}, ""),
    ],
)
def test_bad_external_data(tmp_path, external, what):
    refused(with_external(tmp_path, **external), what)


def test_a_link_that_leads_out_of_the_folder(tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "w.bin").write_bytes(FOUR)
    (inside / "w.bin").symlink_to(tmp_path / "w.bin")
    refused(with_external(inside), "points outside the model's folder", "a link that leads out")


def test_a_folder_link_that_leads_out(tmp_path):
    inside, outside = tmp_path / "model", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "w.bin").write_bytes(FOUR)
    (inside / "sub").symlink_to(outside)
    refused(with_external(inside, location="sub/w.bin"), "points outside the model's folder")


def test_external_data_of_a_constant(tmp_path):
    proto = zoo.parse("""g (float[N] x) => (float[N] y) {
        k = Constant <value = float[1] {1}> ()  y = Add(x, k) }""")
    tensor = proto.graph.node[0].attribute[0].t
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / "w.bin").write_bytes(FOUR)
    refused(write(tmp_path, proto), "a node attribute has external data")


def test_external_data_is_mapped_and_equal(tmp_path):
    model = load_model(with_external(tmp_path, data=b"\0" * 8 + FOUR, offset=8, length=16))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    np.testing.assert_array_equal(tensor.numpy(), [1, 2, 3, 4])
    assert not tensor.numpy().flags.writeable
    assert sorted(model.origin.files) == ["model.onnx", "w.bin"]
    zoo.assert_same(zoo.parse(RELU), model)


def test_a_hub_caches_links_to_blobs_load(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    path = with_external(tmp_path, location="model.onnx.data")
    path.rename(blobs / "sha-one")
    (blobs / "sha-two").write_bytes(FOUR)
    (snapshot / "model.onnx").symlink_to(blobs / "sha-one")
    (snapshot / "model.onnx.data").symlink_to("../../blobs/sha-two")
    model = load_model(snapshot / "model.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), [1, 2, 3, 4])


def test_a_data_file_in_a_folder_of_its_own(tmp_path):
    (tmp_path / "weights").mkdir()
    path = with_external(tmp_path, location="weights/w.bin")
    (tmp_path / "weights" / "w.bin").write_bytes(FOUR)
    assert load_model(path).weight_bytes == 16


def test_external_data_of_a_branch(tmp_path):
    proto = zoo.parse("""g (float[N] x, bool c) => (float[N] y) {
        y = If (c) <then_branch = t () => (float[N] o) <float[1] k = {5}> { o = Mul(x, k) },
                    else_branch = e () => (float[N] o) { o = Identity(x) }> }""")
    plain = zoo.run(proto, {"x": np.ones(2, np.float32), "c": np.array(True)})
    tensor = next(item.g for item in proto.graph.node[0].attribute if item.name == "then_branch").initializer[
        0
    ]
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    path = write(tmp_path, proto)
    refused(path, "external data file is missing")
    (tmp_path / "w.bin").write_bytes(np.array([5], "<f4").tobytes())
    found = zoo.run(load_model(path), {"x": np.ones(2, np.float32), "c": np.array(True)})
    np.testing.assert_array_equal(found[0], plain[0])


TYPES = ["float32", "float64", "float16", "int8", "uint16", "int64", "bool", "complex64"]
TYPES += ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4", "float4_e2m1fn"]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_mapped_tensors_of_every_type(tmp_path, name, shape):
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    values = (np.arange(np.prod(shape, dtype=int)) % 5).reshape(shape).astype(dtype)
    plain = ir.tensor(values)
    (tmp_path / "data").write_bytes(b"??" + plain.tobytes() + b"!")
    mapped = MappedTensor("w", plain.dtype, ir.Shape(shape), SharedMap(tmp_path / "data"), 2)
    assert (mapped.nbytes, mapped.size, mapped.tobytes()) == (plain.nbytes, values.size, plain.tobytes())
    assert mapped.numpy().dtype == values.dtype
    np.testing.assert_array_equal(mapped.numpy(), values)
    np.testing.assert_array_equal(np.array(mapped), values)
    with (tmp_path / "copy").open("wb") as file:
        mapped.tofile(file)
    assert (tmp_path / "copy").read_bytes() == plain.tobytes()


def test_mapped_tensors_speak_the_array_protocols(tmp_path):
    (tmp_path / "data").write_bytes(FOUR)
    mapped = MappedTensor("w", ir.DataType.FLOAT, ir.Shape([4]), SharedMap(tmp_path / "data"), 0)
    np.testing.assert_array_equal(np.from_dlpack(mapped), [1, 2, 3, 4])
    assert np.asarray(mapped, dtype=np.float64).dtype == np.float64
    assert "MappedTensor('w', FLOAT, [4])" in repr(mapped)


def test_a_data_file_that_is_replaced_while_in_use_is_noticed(tmp_path):
    (tmp_path / "data").write_bytes(FOUR)
    source = SharedMap(tmp_path / "data", keep_open=False)
    assert bytes(source.view(4, 4)) == FOUR[4:8]
    (tmp_path / "other").write_bytes(FOUR)
    (tmp_path / "other").replace(tmp_path / "data")
    with pytest.raises(ModelError, match="a data file changed while it was in use"):
        source.view(0, 4)
    (tmp_path / "data").unlink()
    with pytest.raises(ModelError) as caught:
        source.view(0, 4)
    assert caught.value.remedy


# NaN


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn"])
def test_nan_weights(tmp_path, name):
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    proto = zoo.parse(RELU)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, np.nan, 3]).astype(dtype), "bad"))
    model = load_model(write(tmp_path, proto))
    with pytest.raises(ModelError, match="NaN weights") as caught:
        require_no_nan(model)
    assert "'bad'" in caught.value.where


def test_nan_weights_of_a_branch_and_of_mapped_data(tmp_path):
    model = zoo.load("""g (float[N] x, bool c) => (float[N] y) {
        y = If (c) <then_branch = t () => (float[N] o) <float[1] k = {5}> { o = Mul(x, k) },
                    else_branch = e () => (float[N] o) { o = Identity(x) }> }""")
    require_no_nan(model)
    (body,) = [graph for graph in model.graph.subgraphs() if graph.initializers]
    body.initializers["k"].const_value = ir.tensor(np.array([np.nan], np.float32))
    with pytest.raises(ModelError, match="NaN weights"):
        require_no_nan(model)
    data = np.array([1, 2, 3, np.nan], "<f4").tobytes()
    with pytest.raises(ModelError, match="NaN weights"):
        require_no_nan(load_model(with_external(tmp_path, data=data)))


def test_infinities_integers_and_strings_are_no_nan(tmp_path):
    proto = zoo.parse(zoo.ZOO["strings"])
    for name, values in (("inf", np.array([np.inf, -np.inf], np.float32)), ("n", np.array([1, -1], np.int8))):
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    require_no_nan(load_model(write(tmp_path, proto)))


# What loading makes of a model


@pytest.mark.parametrize("ir_version", [3, 8])
def test_defaults_that_could_be_overridden_become_constants(tmp_path, ir_version):
    proto = zoo.parse(RELU, opset=8, ir_version=ir_version)
    proto.graph.input.insert(0, helper.make_tensor_value_info("w", 1, [4]))
    model = load_model(write(tmp_path, proto))
    assert [spec.name for spec in model.inputs] == ["x"]
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.ir.ir_version == 8
    zoo.assert_same(proto, model, reference=False)


def test_weights_need_not_be_inputs_in_old_files(tmp_path):
    model = load_model(write(tmp_path, zoo.parse(RELU, opset=8, ir_version=3)))
    assert [spec.name for spec in model.inputs] == ["x"]


def test_unknown_ranks_load(tmp_path):
    proto = zoo.parse(RELU)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    model = load_model(write(tmp_path, proto))
    assert (model.inputs[0].shape, model.outputs[0].shape) == (None, None)
    run_passes(model, exact_cleanup())
    assert (model.inputs[0].shape, model.outputs[0].shape) == (None, None)


def test_sizes_of_minus_one_are_unknown_sizes(tmp_path):
    proto = zoo.parse(RELU)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert load_model(write(tmp_path, proto)).inputs[0].shape == (None, 4)


def test_the_long_name_of_the_standard_domain(tmp_path):
    proto = zoo.parse(RELU)
    proto.opset_import[0].domain = "ai.onnx"
    proto.graph.node[0].domain = "ai.onnx"
    model = load_model(write(tmp_path, proto))
    assert model.opset == 17
    assert {node.domain for node in model.graph} == {""}
    zoo.run(model, zoo.feeds(zoo.parse(RELU), zoo.SIZES[0]))


def test_every_node_gets_a_name_of_its_own(tmp_path):
    proto = zoo.parse(zoo.ZOO["captures in a branch"])
    for node in proto.graph.node:
        node.name = "same"
    for attribute in proto.graph.node[-1].attribute:
        attribute.g.node[0].name = "same"
    names = [node.name for node in load_model(write(tmp_path, proto)).graph.all_nodes()]
    assert names == ["same", "same_1", "same_2", "same_3", "same_4", "same_5"]


def test_nodes_without_names_are_called_after_what_they_make():
    assert [node.name for node in zoo.load(RELU).graph] == ["Add/a", "Relu/y"]


def test_functions_are_inlined():
    text = """<ir_version: 8, opset_import: ["" : 17, "f" : 1]> g (float[N] x) => (float[N] y)
        { a = f.Twice <by = 2.0> (x)  y = f.Twice <by = 3.0> (a) }
        <domain: "f", opset_import: ["" : 17]> Twice <by> (p) => (q) {
        k = Constant <value_float: float = @by> ()  r = Mul(p, k)  q = Relu(r) }"""
    proto = zoo.parse(text)
    model = zoo.load(proto)
    assert zoo.operators(model) == ["Mul", "Relu", "Mul", "Relu"]
    zoo.assert_same(proto, model)


@pytest.mark.parametrize(
    "attribute", ['value_string = "ü"', 'value_strings = ["ü", "b"]', "value_ints = [1, 2]"]
)
def test_constants_of_every_form(attribute):
    kind = "int64" if "ints" in attribute else "string"
    shape = "" if "string =" in attribute else "[2]"
    proto = zoo.parse(
        f"g (float[N] x) => ({kind}{shape} y) {{ k = Constant <{attribute}> ()  y = Identity(k) }}"
    )
    model = zoo.load(proto)
    assert zoo.operators(model) == ["Identity"]
    zoo.assert_same(proto, model)


def test_the_runtimes_own_operators_load():
    proto = zoo.parse("g (float[N,4] x) => (float[N,4] y) { a = com.microsoft.FastGelu(x)  y = Relu(a) }")
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    assert zoo.operators(model) == ["FastGelu", "Relu"]
    zoo.assert_same(proto, model, reference=False)


def test_operators_of_an_unknown_domain_load_and_stay():
    """Whether the runtime has them only the runtime knows; it says so when the model is first run."""
    header = '<ir_version: 8, opset_import: ["" : 17, "acme" : 1]>'
    text = header + "g (float[N] x) => (float[N] y) { y = acme.Do(x) }"
    model = zoo.load(text)
    run_passes(model, exact_cleanup())
    assert [(node.domain, node.op_type) for node in model.graph] == [("acme", "Do")]


# What must not stay in a model

PLACE = "/home/somebody/train.py"


def noted():
    """A model with a note in every place that has room for one."""
    proto = zoo.parse("""<ir_version: 10, opset_import: ["" : 17, "f" : 1]>
        g (float[N] x, bool c) => (float[N] y) {
        k = Constant <value = float[1] {1}> ()  e = f.Same(x)  d = LeakyRelu <alpha = 0.5> (e)
        y = If (c) <then_branch = t () => (float[N] o) { o = Add(d, k) },
                    else_branch = e () => (float[N] o) { o = Identity(x) }> }
        <domain: "f", opset_import: ["" : 17]> Same (p) => (q) { q = Relu(p) }""")
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(300, np.float32), "w"))
    proto.graph.initializer.append(TensorProto(name="p", data_type=22, dims=[2], raw_data=b"\x21"))
    proto.graph.initializer.append(TensorProto(name="s", data_type=8, dims=[1], string_data=[b"a"]))
    _note(proto)
    return proto


def _note(message):
    for field in message.DESCRIPTOR.fields:
        if field.name == "doc_string":
            message.doc_string = PLACE
        elif field.name == "metadata_props":
            message.metadata_props.add(key="pkg.torch.stack_trace", value=PLACE)
        elif field.message_type is not None:
            value = getattr(message, field.name)
            repeated = hasattr(value, "add")
            for part in value if repeated else [value] if message.HasField(field.name) else []:
                if not hasattr(part, "key"):
                    _note(part)


def test_no_note_survives_loading_and_saving(tmp_path):
    proto = noted()
    assert proto.SerializeToString().count(b"somebody") > 20
    model = load_model(write(tmp_path, proto))
    assert b"somebody" not in to_bytes(model)
    assert b"stack_trace" not in to_bytes(model)
    run_passes(model, exact_cleanup())
    assert b"somebody" not in to_bytes(model)


def test_notes_of_a_model_in_memory_are_dropped():
    model = ir.from_proto(noted())
    drop_metadata(model)
    nodes = list(model.graph.all_nodes())
    assert not any(node.metadata_props or node.doc_string for node in nodes)
    assert not any(value.metadata_props or value.doc_string for node in nodes for value in node.outputs)
    assert not model.metadata_props
    assert not model.doc_string
    assert not model.graph.doc_string


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("names", "{0: 'cat', 1: 'dog'}", True),
        ("license", "https://www.apache.org/licenses/LICENSE-2.0", True),
        ("ratio", "and/or 1/2", True),
        ("data", "/data/set.yaml", False),
        ("args", "{'data': '/usr/src/coco.yaml'}", False),
        ("home", "~/models", False),
        ("windows", r"C:\models\x.pt", False),
        ("share", r"\\server\models", False),
        ("url", "file:///data/x", False),
        ("pkg.torch.export.graph_signature", "ExportedProgram", False),
    ],
)
def test_model_metadata_stays_unless_it_names_a_place(tmp_path, key, value, kept):
    proto = zoo.parse(RELU)
    proto.metadata_props.add(key=key, value=value)
    saved = onnx.load_from_string(to_bytes(load_model(write(tmp_path, proto))))
    assert {entry.key: entry.value for entry in saved.metadata_props} == ({key: value} if kept else {})


def test_a_graph_that_is_named_after_a_path(tmp_path):
    proto = zoo.parse(RELU)
    proto.graph.name = PLACE
    assert b"somebody" not in to_bytes(load_model(write(tmp_path, proto)))


# Damage of any kind


@pytest.mark.parametrize("name", ["captures in a branch", "strings", "a shape chain"])
def test_flipped_bytes_never_cause_anything_but_a_named_error(tmp_path, name):
    data = zoo.parse(zoo.ZOO[name]).SerializeToString()
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            damaged[place] = random.integers(0, 256)
        error = failure(write(tmp_path, bytes(damaged)))
        assert error is None or (error.exit_code in (2, 4) and error.remedy), error


def failure(path):
    """The error of edgepress's own that the model causes, if any."""
    try:
        model = load_model(path)
        run_passes(model, exact_cleanup())
        to_bytes(model)
    except EdgepressError as error:
        return error
    return None
