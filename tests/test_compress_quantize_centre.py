"""Centring activations: the same function, a smaller range, and every reason to leave one alone."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from edgepress.compress.plan import Decision
from edgepress.compress.quantize.centre import CENTRE, CentreActivations, centrable
from edgepress.graph.model import Model, Origin
from edgepress.graph.passes import run_passes
from edgepress.graph.save import to_bytes

BLOCK = """
<ir_version: 10, opset_import: ["" : 20]>
block (float[N,8] x) => (float[N,8] y) {
  n = LayerNormalization <axis = -1> (x, gamma, beta)
  p = MatMul(n, w1)
  q = Add(p, b1)
  r = Relu(q)
  s = MatMul(r, w2)
  t = Add(b2, s)
  u = Add(t, n)
  y = Relu(u)
}
"""


def block(text=BLOCK, *, outputs=()):
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(text)
    shapes = {"gamma": (8,), "beta": (8,), "w1": (8, 16), "b1": (16,), "w2": (16, 8), "b2": (8,), "m": (8, 8)}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name == "beta":
            values[3] += 20.0  # the outlier channel that stretches the range of all
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for name in outputs:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 8]))
    for index, node in enumerate(proto.graph.node):
        node.name = f"node{index}"
    return Model(ir.from_proto(proto), origin=Origin(kind="memory", name="block"))


def run(model, names=None):
    x = np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32)
    return ort.InferenceSession(to_bytes(model)).run(names, {"x": x})


def limits_of(model, name="n"):
    exposed = model.fork()
    value = next(value for node in exposed.graph for value in node.outputs if value.name == name)
    if not value.is_graph_output():
        exposed.graph.outputs.append(value)
    values = run(exposed, [name])[0]
    return {name: (values.min(axis=0), values.max(axis=0))}


def dynamic(node):
    return Decision(node=node, op="MatMul", group="g", form="dynamic", reason="test")


def test_function_is_kept_and_the_range_shrinks():
    model = block()
    assert centrable(model, [dynamic("node1")]) == ["n"]
    before, wide = run(model)[0], limits_of(model)["n"]
    record = run_passes(model, [CentreActivations(limits=limits_of(model))])[0]
    assert record.applied == {CENTRE: 1}
    np.testing.assert_allclose(run(model)[0], before, rtol=1e-5, atol=1e-5)
    low, high = limits_of(model)["n"]
    np.testing.assert_allclose(low, -high, atol=1e-5)
    assert high.max() - low.min() < 0.5 * (wide[1].max() - wide[0].min())


def test_second_run_changes_nothing():
    model = block()
    run_passes(model, [CentreActivations(limits=limits_of(model))])
    record = run_passes(model, [CentreActivations(limits=limits_of(model))])[0]
    assert record.applied == {}
    assert record.refused[0].reason == "its range would hardly shrink"


def test_tied_biases_move_apart():
    tied = BLOCK.replace("y = Relu(u)", "v = MatMul(n, w1)  w = Add(v, b1)  k = MatMul(w, w2)  y = Add(u, k)")
    model = block(tied)
    before = run(model)[0]
    assert run_passes(model, [CentreActivations(limits=limits_of(model))])[0].applied == {CENTRE: 1}
    np.testing.assert_allclose(run(model)[0], before, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("(x, gamma, beta)", "(x, gamma)", "it has no constant bias"),
        ("q = Add(p, b1)\n  r = Relu(q)", "r = Relu(p)", "a MatMul that reads it has no bias"),
        ("t = Add(b2, s)", "t = Neg(s)", "a residual branch that it is added to has no bias"),
        ("y = Relu(u)", "z = Tanh(n)  y = Add(u, z)", "Tanh reads it"),
        ("y = Relu(u)", "z = MatMul(m, n)  y = Add(u, z)", "MatMul reads it"),
        ("u = Add(t, n)", "u = Add(n, n)", "Add reads it"),
    ],
)
def test_what_cannot_take_up_the_shift_is_left_alone(old, new, reason):
    model = block(
        BLOCK.replace(old, new).replace("float[N,8] x", "float[8,8] x" if "m, n" in new else "float[N,8] x")
    )
    limits = {"n": (np.full(8, -1.0, np.float32), np.full(8, 30.0, np.float32))}
    assert centrable(model, [dynamic("node1")]) == []
    record = run_passes(model, [CentreActivations(limits=limits)])[0]
    assert record.applied == {}
    assert [refusal.reason for refusal in record.refused] == [reason]


def test_what_leaves_the_graph_is_left_alone():
    model = block(outputs=["n"])
    record = run_passes(model, [CentreActivations(limits=limits_of(model))])[0]
    assert record.refused[0].reason.startswith("its result leaves the graph")


def test_only_what_a_dynamic_product_reads_is_asked_for():
    assert centrable(block(), []) == []
    assert centrable(block(), [dynamic("node4")]) == []
