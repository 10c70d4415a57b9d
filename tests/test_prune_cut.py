"""A cut equals its mask: on random graphs, on tiny architectures, and where graphs are awkward."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import prune_case as case
import pytest
from edgepress.compress.prune.coupling import couple, cut_macs, group_macs, work_macs
from edgepress.compress.prune.cut import cut, marked, mask, nothing_removed
from edgepress.graph.edit import remove_dead
from edgepress.graph.errors import InternalError
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.save import to_bytes
from edgepress.graph.shapes import InferShapes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Builder:
    """A graph that grows node by node; every weight has its own numbers."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.nodes, self.weights = [], []

    def add(self, kind, *inputs, outputs=1, **attributes):
        names = [f"v{len(self.nodes)}_{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, *shape):
        fan_in = max(int(np.prod(shape[1:])), 1)
        return self.constant((self.random.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32))

    def constant(self, array):
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def model(self, result, shape_in, shape_out):
        self.nodes.append(helper.make_node("Identity", [result], ["y"]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)
        graph = helper.make_graph(self.nodes, "random", [x], [y], self.weights)
        proto = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)])
        return loaded(proto)


def loaded(proto):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        model = load_model(path)
    run_passes(model, [InferShapes()])
    remove_dead(model)
    return model


def grow_image(build, draw, live):
    """One more value of (N, channels, 4, 4) from those there are: (name, channels)."""
    name, channels = draw(st.sampled_from(live))
    kind = draw(st.sampled_from(
        ["conv", "conv", "relu", "depthwise", "grouped", "add", "concat", "gate", "norm", "shuffle", "excite"]
    ))  # fmt: skip
    if kind == "conv":
        made, bias = draw(st.sampled_from([4, 6, 8])), draw(st.booleans())
        inputs = [name, build.weight(made, channels, 3, 3), *([build.weight(made)] if bias else [])]
        return build.add("Conv", *inputs, pads=[1, 1, 1, 1]), made
    if kind == "relu":
        return build.add(draw(st.sampled_from(["Relu", "Sigmoid", "Tanh"])), name), channels
    if kind == "depthwise":
        weight = build.weight(channels, 1, 3, 3)
        return build.add("Conv", name, weight, group=channels, pads=[1, 1, 1, 1]), channels
    if kind == "grouped" and channels % 2 == 0:
        made = draw(st.sampled_from([4, 8]))
        return build.add("Conv", name, build.weight(made, channels // 2, 1, 1), group=2), made
    others = [other for other, count in live if count == channels]
    if kind == "add":
        return build.add("Add", name, draw(st.sampled_from(others))), channels
    if kind == "concat" and channels <= 8:
        other, count = draw(st.sampled_from(live))
        return build.add("Concat", name, other, axis=1), channels + count
    if kind == "gate" and channels % 2 == 0:
        half = channels // 2
        sizes = build.constant(np.int64([half, half]))
        first, second = build.add("Split", name, sizes, outputs=2, axis=1)
        return build.add("Mul", first, build.add("Sigmoid", second)), half
    if kind == "norm":
        scale, shift = build.weight(channels), build.weight(channels)
        return build.add("InstanceNormalization", name, scale, shift), channels
    if kind == "shuffle" and channels % 2 == 0 and channels > 2:
        shape = build.constant(np.int64([0, 2, channels // 2, 4, 4]))
        opened = build.add("Transpose", build.add("Reshape", name, shape), perm=[0, 2, 1, 3, 4])
        return build.add("Reshape", opened, build.constant(np.int64([0, channels, 4, 4]))), channels
    pooled = build.add("GlobalAveragePool", name)
    narrow = build.add("Relu", build.add("Conv", pooled, build.weight(3, channels, 1, 1)))
    gate = build.add("Sigmoid", build.add("Conv", narrow, build.weight(channels, 3, 1, 1)))
    return build.add("Mul", name, gate), channels


@given(data=st.data(), seed=st.integers(0, 1000))
@SETTINGS
def test_cut_is_mask_on_random_convolutional_graphs(data, seed):
    build = Builder(seed)
    live = [(build.add("Conv", "x", build.weight(8, 3, 1, 1)), 8)]
    for _ in range(data.draw(st.integers(1, 9))):
        live.append(grow_image(build, data.draw, live[-4:]))
    name, channels = live[-1]
    flat = build.add("Flatten", build.add("Relu", name))
    result = build.add("Gemm", flat, build.weight(channels * 16, 5), build.weight(5))
    coupling = couple(build.model(result, ["N", 3, 4, 4], ["N", 5]))
    feeds = [{"x": case.random(seed + batch, batch, 3, 4, 4)} for batch in (1, 3)]
    compare(coupling, data.draw(st.integers(0, 99)), feeds)


def compare(coupling, seed, feeds):
    """As `agree`, without asking that something must move: a random net may have nothing to cut."""
    removed = case.half(coupling, seed)
    model, pruned, masked = coupling.model, cut(coupling, removed), mask(coupling, removed)
    assert (pruned.inputs, pruned.outputs) == (model.inputs, model.outputs)
    assert to_bytes(cut(couple(model), removed)) == to_bytes(pruned)
    first, second = (case.session(item) for item in (masked, pruned))
    for sample in feeds:
        for wanted, found in zip(first.run(None, sample), second.run(None, sample), strict=True):
            assert found.shape == wanted.shape
            scale = max(float(np.abs(wanted).max()), 1e-3)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * scale)
    sizes = {"N": 1}
    left = cut_macs(coupling, work_macs(coupling, sizes), removed)
    after = sum(work_macs(couple(pruned), sizes))
    if any(node.op_type == "GRU" for node in model.graph):
        assert after <= left  # its work falls with the square of what it keeps: more than is counted
    else:
        assert after == pytest.approx(left, rel=1e-6)


def attend(build, draw, name, width):
    """Self-attention of (N, 6, width): heads of 4, separate or packed projections, keys shared or not."""
    heads = draw(st.sampled_from([2, 3, 4]))
    inner = 4 * heads
    if draw(st.booleans()):
        packed = build.add("MatMul", name, build.weight(width, 3 * inner))
        shape = build.constant(np.int64([0, 0, 3, heads, 4]))
        parts = build.add("Transpose", build.add("Reshape", packed, shape), perm=[2, 0, 3, 1, 4])
        found = [build.add("Gather", parts, build.constant(np.int64(place)), axis=0) for place in range(3)]
    else:
        shape = build.constant(np.int64([0, 0, heads, 4]))
        wide = [build.add("MatMul", name, build.weight(width, inner)) for _ in range(3)]
        found = [build.add("Transpose", build.add("Reshape", v, shape), perm=[0, 2, 1, 3]) for v in wide]
    query, key, value = found
    folded = draw(st.booleans())
    if folded:  # as torch's bmm has it: (batch x heads, length, size)
        merged = build.constant(np.int64([-1, 6, 4]))
        query, key, value = (build.add("Reshape", item, merged) for item in (query, key, value))
    turned = build.add("Transpose", key, perm=[0, 2, 1] if folded else [0, 1, 3, 2])
    scores = build.add("MatMul", query, turned)
    if not folded and draw(st.booleans()):
        scores = build.add("Add", scores, build.weight(1, heads, 6, 6))
    mixed = build.add("MatMul", build.add("Softmax", scores, axis=-1), value)
    if folded:
        mixed = build.add("Reshape", mixed, build.constant(np.int64([-1, heads, 6, 4])))
    back = build.add("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = build.add("Reshape", back, build.constant(np.int64([0, 0, inner])))
    return build.add("MatMul", joined, build.weight(inner, width))


@given(data=st.data(), seed=st.integers(0, 1000))
@SETTINGS
def test_cut_is_mask_on_random_transformers(data, seed):
    build, width = Builder(seed), 12
    stream = build.add("MatMul", "x", build.weight(5, width))
    for _ in range(data.draw(st.integers(1, 3))):
        source = stream
        if data.draw(st.booleans()):
            source = build.add("LayerNormalization", stream, build.weight(width), build.weight(width))
        kind = data.draw(st.sampled_from(["attention", "attention", "dense", "gated", "recurrent"]))
        if kind == "attention":
            made = attend(build, data.draw, source, width)
        elif kind == "dense":
            inner = build.add("Add", build.add("MatMul", source, build.weight(width, 10)), build.weight(10))
            made = build.add("MatMul", build.add("Gelu", inner), build.weight(10, width))
        elif kind == "gated":
            left, right = (build.add("MatMul", source, build.weight(width, 9)) for _ in range(2))
            made = build.add(
                "MatMul", build.add("Mul", left, build.add("Tanh", right)), build.weight(9, width)
            )
        else:
            turned = build.add("Transpose", source, perm=[1, 0, 2])
            steps = build.add(
                "GRU", turned, build.weight(1, 24, width), build.weight(1, 24, 8), hidden_size=8
            )
            plain = build.add("Squeeze", steps, build.constant(np.int64([1])))
            made = build.add("MatMul", build.add("Transpose", plain, perm=[1, 0, 2]), build.weight(8, width))
        stream = build.add("Add", stream, made)
    result = build.add("MatMul", build.add("Relu", stream), build.weight(width, 4))
    coupling = couple(build.model(result, ["N", 6, 5], ["N", 6, 4]))
    feeds = [{"x": case.random(seed + batch, batch, 6, 5)} for batch in (1, 3)]
    compare(coupling, data.draw(st.integers(0, 99)), feeds)


def test_a_weight_that_two_nodes_read_is_cut_for_each():
    """ALBERT shares its layers' weights; here each reader cuts other elements."""
    coupling = case.coupled(
        "(float[N,5] x) => (float[N,5] y) { a = MatMul (x, w) b = Relu (a) c = MatMul (b, v) d = Tanh (c)"
        " e = MatMul (d, w) f = Relu (e) y = MatMul (f, v) }",
        w=(5, 8), v=(8, 5),
    )  # fmt: skip
    groups = [item for item in coupling.prunable if item.name == "w"]
    assert [len(item.units) for item in groups] == [8, 8]
    removed = marked(coupling, [*groups[0].units[:3], *groups[1].units[6:]])
    pruned = case.agree(coupling, removed, {"x": case.random(8, 3, 5)})
    shapes = [tuple(node.inputs[1].shape) for node in pruned.graph if node.op_type == "MatMul"]
    assert shapes == [(5, 5), (5, 5), (5, 6), (6, 5)]


def test_a_weight_that_callers_may_override_is_kept():
    text = "(float[N,5] x) => (float[N,4] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, v) }"
    model = case.parse(text, case.weights(w=(5, 6), v=(6, 4)))
    model.graph.inputs.append(model.graph.initializers["w"])
    coupling = couple(model)
    assert coupling.prunable == ()
    assert all(item.blocked for item in coupling.groups)


def test_what_the_body_of_control_flow_reads_is_kept():
    coupling = case.coupled(
        "(float[N,5] x, bool c) => (float[N,4] y) { a = MatMul (x, w) b = MatMul (x, u)"
        " d = If (c) <then_branch = t () => (float[N,6] o) { o = Relu (a) },"
        " else_branch = e () => (float[N,6] p) { p = Neg (a) }>"
        " f = MatMul (d, v) g = MatMul (b, s) y = Add (f, g) }",
        w=(5, 6), v=(6, 4), u=(5, 7), s=(7, 4),
    )  # fmt: skip
    assert [item.name for item in coupling.prunable] == ["u"]
    (held,) = (item for item in coupling.groups if item.name == "w" and item.makers)
    assert held.blocked.reason == "the body of control flow reads it"
    feeds = {"x": case.random(7, 2, 5), "c": np.array(True)}
    case.agree(coupling, case.half(coupling), [feeds, feeds | {"c": np.array(False)}])


def test_dynamic_axes_stay_dynamic():
    coupling = case.coupled(
        "(float[N,3,H,W] x) => (float[N,O,P,Q] y) { a = Conv (x, w) b = Relu (a) y = Conv (b, v) }",
        w=(8, 3, 3, 3), v=(4, 8, 1, 1),
    )  # fmt: skip
    feeds = [{"x": case.random(0, *shape)} for shape in ((1, 3, 5, 5), (2, 3, 7, 4))]
    pruned = case.agree(coupling, case.half(coupling), feeds)
    assert [list(value.shape)[1] for node in pruned.graph for value in node.outputs][:2] == [4, 4]


def test_heads_that_are_folded_into_the_batch_are_named_anew():
    build = Builder(0)
    wide = build.add("MatMul", "x", build.weight(5, 16))
    shape = build.constant(np.int64([0, 6, 4, 4]))
    heads = build.add("Transpose", build.add("Reshape", wide, shape), perm=[0, 2, 1, 3])
    folded = build.add("Tanh", build.add("Reshape", heads, build.constant(np.int64([-1, 6, 4]))))
    opened = build.add("Reshape", folded, build.constant(np.int64([-1, 4, 6, 4])))
    back = build.add("Transpose", opened, perm=[0, 2, 1, 3])
    joined = build.add("Reshape", back, build.constant(np.int64([0, 0, 16])))
    result = build.add("MatMul", joined, build.weight(16, 3))
    coupling = couple(build.model(result, ["N", 6, 5], ["N", 6, 3]))
    (item,) = coupling.prunable
    assert (item.width, len(item.units)) == (4, 4)
    feeds = [{"x": case.random(batch, batch, 6, 5)} for batch in (1, 2)]
    case.agree(coupling, marked(coupling, item.units[1:2]), feeds)


def test_nothing_removed_changes_nothing():
    coupling = case.coupled(
        "(float[N,5] x) => (float[N,4] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, v) }",
        w=(5, 6), v=(6, 4),
    )  # fmt: skip
    pruned = case.agree(coupling, nothing_removed(coupling), {"x": case.random(1, 2, 5)})
    assert pruned.structure_hash() == coupling.model.structure_hash()


def test_a_cut_refuses_what_has_to_stay_and_what_would_leave_nothing():
    coupling = case.coupled(
        "(float[N,5] x) => (float[N,4] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, v) }",
        w=(5, 6), v=(6, 4),
    )  # fmt: skip
    (kept,) = (item for item in coupling.groups if item.name == "v")
    with pytest.raises(InternalError, match="have to stay"):
        cut(coupling, marked(coupling, kept.units[:1]))
    item = case.group(coupling, "w")
    with pytest.raises(InternalError, match="without elements"):
        cut(coupling, marked(coupling, item.units))
    left = cut(coupling, marked(coupling, item.units[2:])).graph.initializers.values()
    assert sorted(tuple(value.shape.numpy()) for value in left) == [(2, 4), (5, 2)]


def test_work_is_counted_by_what_is_left():
    coupling = case.coupled(
        "(float[N,3,6,6] x) => (float[N,4,6,6] y) { a = Conv (x, w) b = Relu (a) y = Conv (b, v) }",
        w=(8, 3, 1, 1), v=(4, 8, 1, 1),
    )  # fmt: skip
    macs = work_macs(coupling, {"N": 2})
    assert macs == [2 * 36 * 3 * 8, 2 * 36 * 8 * 4]
    item = case.group(coupling, "w")
    removed = marked(coupling, item.units[:2])
    assert cut_macs(coupling, macs, removed) == pytest.approx(sum(macs) * 6 / 8)
    shares = dict(zip((group.name for group in coupling.groups), group_macs(coupling, macs), strict=False))
    assert shares["v"] == pytest.approx(macs[1])
    by_group = group_macs(coupling, macs)[coupling.groups.index(item)]
    assert by_group == pytest.approx(sum(macs))


def test_two_processes_make_the_same_bytes():
    program = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); import prune_case as case\n"
        "from edgepress.graph.save import to_bytes\n"
        "c = case.coupled('(float[N,5] x) => (float[N,4] y) { a = MatMul (x, w) y = MatMul (a, v) }',"
        " w=(5, 6), v=(6, 4))\n"
        "print(hashlib.sha256(to_bytes(case.cut(c, case.half(c)))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1
