"""Cost: large graphs in linear time, many weights in few descriptors."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import zoo
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.save import save_model, to_bytes
from onnx import TensorProto, helper, numpy_helper


def work(count):
    """A chain of `count` nodes with something to do for most rules and passes."""
    nodes, weights = [], []

    def weight(array):
        weights.append(numpy_helper.from_array(array, f"w{len(weights)}"))
        return weights[-1].name

    def add(kind, *inputs, **attributes):
        nodes.append(helper.make_node(kind, list(inputs), [f"v{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    zero, first = weight(np.zeros(1, np.float32)), weight(np.zeros(1, np.int64))
    current = "x"
    while len(nodes) < count:
        current = add("Relu", add("Transpose", add("Add", current, zero), perm=[0, 1]))
        current = add("Transpose", add("Transpose", current, perm=[1, 0]), perm=[1, 0])
        wide = add("Unsqueeze", add("Unsqueeze", current, first), first)
        current = add("ReduceMax", wide, axes=[0, 1], keepdims=0)
        current = add("Reshape", current, add("Shape", current))
        half = add("Constant", value=numpy_helper.from_array(np.array([0.25], np.float32)))
        current = add("Mul", current, add("Sqrt", half))
        current = add("Add", add("Identity", current), weight(np.full(4, 1.0, np.float32)))
        add("Expand", current, add("Shape", "x"))
        current = add("Add", nodes[-1].output[0], current)
    nodes.append(helper.make_node("Identity", [current], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def calls(act):
    """How many Python functions `act` calls: work that does not depend on the machine, and its result."""
    made = 0

    def count(_frame, event, _argument):
        nonlocal made
        made += event == "call"

    sys.setprofile(count)
    try:
        result = act()
    finally:
        sys.setprofile(None)
    return made, result


def cleaned(count):
    model = zoo.load(work(count))
    run_passes(model, exact_cleanup())
    return model


def test_clean_up_works_linearly():
    few, _ = calls(lambda: cleaned(500))
    many, model = calls(lambda: cleaned(2_000))
    assert many < 4.6 * few  # 4 if linear, 16 if quadratic; benchmarks/many_nodes.py prints the times
    assert {node.op_type for node in model.graph} == {"Relu", "ReduceMax", "Unsqueeze", "Mul", "Add"}


def test_the_chain_is_reduced_as_it_should_be():
    proto = work(60)
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    zoo.assert_same(proto, model, zoo.SIZES[:2])
    assert len(list(model.graph)) < 30


def test_fresh_names_of_one_stem_are_found_without_searching():
    from edgepress.graph.edit import Editor

    editor = Editor(zoo.load("g (float[N] x) => (float[N] y) { y = Relu(x) }"))

    def many(count):
        return {editor.fresh_name("axes") for _ in range(count)}

    few, _ = calls(lambda: many(100))
    more, names = calls(lambda: many(1_000))
    assert len(names) == 1_000
    assert more < 12 * few


def externals(folder, count, files):
    proto = zoo.parse("g (float[N,300] x) => (float[N,300] y) { y = Relu(x) }")
    handles = [(folder / f"w{place}").open("wb") for place in range(files)]
    for place in range(count):
        file = handles[place % files]
        tensor = proto.graph.initializer.add(name=f"w{place}", data_type=TensorProto.FLOAT, dims=[300])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", f"w{place % files}"), ("offset", str(file.tell()))):
            tensor.external_data.add(key=key, value=value)
        file.write(np.full(300, place, "<f4").tobytes())
    for file in handles:
        file.close()
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


OPEN = Path("/proc/self/fd")


def descriptors():
    return sum(1 for _ in OPEN.iterdir())


@pytest.mark.skipif(not OPEN.is_dir(), reason="counts descriptors in /proc")
@pytest.mark.parametrize("files", [1, 1000])
def test_many_weights_need_few_descriptors(tmp_path, files):
    path = externals(tmp_path, 2000 if files == 1 else 1000, files)
    before = descriptors()
    model = load_model(path)
    digest = model.fingerprint()
    assert descriptors() - before < 64
    assert model.graph.initializers["w7"].const_value.numpy()[0] == 7
    save_model(model, tmp_path / "out.onnx", external_threshold_bytes=0)
    assert descriptors() - before < 64
    assert load_model(tmp_path / "out.onnx").fingerprint() == digest


def branch(kind, source, name):
    out = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"])
    return helper.make_graph([helper.make_node(kind, [source], [name])], name, [], [out])


def branches(count):
    proto = zoo.parse("g (float[N] x, bool c) => (float[N] y) { y = Relu(x) }")
    del proto.graph.node[:]
    current = "x"
    for place in range(count):
        bodies = {"then_branch": branch("Abs", current, "t"), "else_branch": branch("Neg", current, "e")}
        proto.graph.node.append(helper.make_node("If", ["c"], [f"v{place}"], **bodies))
        current = f"v{place}"
    proto.graph.node.append(helper.make_node("Relu", [current], ["y"]))
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    return model


def test_many_branches():
    few, _ = calls(lambda: branches(50))
    many, model = calls(lambda: branches(200))
    assert many < 4.6 * few
    onnx.checker.check_model(onnx.load_from_string(to_bytes(model)))
