"""Ranges by the error at the outputs: measured against a plain search with onnxruntime over the whole net."""

import compress_case as case
import numpy as np
import onnx
import onnxruntime
import pytest
from edgepress.calibration.data import open_data
from edgepress.compress.quantize.static import static_layout
from edgepress.compress.refine.output_ranges import choose_output_ranges, samples_for
from edgepress.graph.save import to_bytes

SAME = "<pads = [1, 1, 1, 1]>"
WEIGHTS = case._conv_weights(w=(8, 4, 3, 3), b=(8,), v=(8, 8, 3, 3), c=(8,), p=(8, 8, 3, 3), d=(8,))
BODY = (
    f"[c1] a = Conv {SAME} (x, w, b) r = Relu(a) [c2] e = Conv {SAME} (r, v, c) [add] t = Add(e, r)"
    f" u = Relu(t) [c3] y = Conv {SAME} (u, p, d)"
)


@pytest.fixture
def model():
    return case.parse(f"(float[N,4,8,8] x) => (float[N,8,8,8] y) {{ {BODY} }}", WEIGHTS)


@pytest.fixture
def data(tmp_path, model):
    np.save(tmp_path / "x.npy", case.random(3, 24, 4, 8, 8))
    return open_data(str(tmp_path / "x.npy"), model.inputs)


def wide(model, plan, data):
    """Ranges twice as wide as what the tensors reach."""
    found = case.true_ranges(model, static_layout(model, plan.decisions).observed, list(data))
    return {name: (2 * low, 2 * high) for name, (low, high) in found.items()}


def error_alone(model, name, limits, feeds):
    """Squared relative error of the output with one tensor alone quantized to uint8: by onnx's operators."""
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    scale = np.float32((high - low) / 255)
    proto = onnx.load_from_string(to_bytes(model))
    for node in proto.graph.node:
        for place, item in enumerate(node.input):
            if item == name:
                node.input[place] = "rounded"
    zero = np.uint8(np.clip(np.rint(-low / scale), 0, 255))
    for key, value in (("step", scale), ("zero", zero)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), key))
    made = [
        onnx.helper.make_node("QuantizeLinear", [name, "step", "zero"], ["integers"]),
        onnx.helper.make_node("DequantizeLinear", ["integers", "step", "zero"], ["rounded"]),
    ]
    places = [i for i, node in enumerate(proto.graph.node) if name in node.output]
    for node in reversed(made):
        proto.graph.node.insert(places[0] + 1 if places else 0, node)
    sessions = [
        onnxruntime.InferenceSession(item.SerializeToString(), providers=["CPUExecutionProvider"])
        for item in (onnx.load_from_string(to_bytes(model)), proto)
    ]
    wanted, found = (np.concatenate([item.run(None, one)[0] for one in feeds]) for item in sessions)
    return case.relative_l2(wanted, found) ** 2


def test_every_choice_lowers_the_error_that_its_tensor_alone_makes(model, data):
    plan = case.plan_of(model, quantization="static")
    feeds = list(data)
    before = wide(model, plan, data)
    after = choose_output_ranges(model, plan.decisions, before, data)
    moved = [name for name in before if after[name] != before[name]]
    assert {"x", "r", "e"} <= set(moved)
    for name in moved:
        errors = [error_alone(model, name, limits[name], feeds) for limits in (before, after)]
        assert errors[1] < 0.9 * errors[0]


def test_it_is_the_same_every_time_and_other_ranges_stay(model, data):
    plan = case.plan_of(model, quantization="static")
    before = {**wide(model, plan, data), "other": (-1.0, 2.0)}
    steps = []
    found = [
        choose_output_ranges(
            model, plan.decisions, before, data, progress=lambda done, total: steps.append((done, total))
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert found[0]["other"] == (-1.0, 2.0)
    assert steps[-1] == (len(before) - 1, len(before) - 1)


def test_what_is_copied_shares_the_range_of_its_source(data):
    copy = np.eye(8, dtype="f4").reshape(8, 8, 1, 1)
    body = BODY.replace("Relu(a) [c2]", "Relu(a) [relay] z = Conv (r, i) [c2]").replace("(e, r)", "(e, z)")
    model = case.parse(f"(float[N,4,8,8] x) => (float[N,8,8,8] y) {{ {body} }}", WEIGHTS | {"i": copy})
    plan = case.plan_of(model, quantization="static")
    before = wide(model, plan, data)
    after = choose_output_ranges(model, plan.decisions, before, data)
    assert after["r"] == after["z"]
    assert after["r"] != before["r"]


def test_outputs_without_floats_leave_the_ranges_alone(data):
    text = f"(float[N,4,8,8] x) => (int64[N,1,8,8] k) {{ {BODY} k = ArgMax <axis = 1> (y) }}"
    model = case.parse(text, WEIGHTS)
    plan = case.plan_of(model, quantization="static")
    before = wide(model, plan, data)
    assert choose_output_ranges(model, plan.decisions, before, data) == before


@pytest.mark.parametrize(("tensors", "samples"), [(1, 64), (29, 64), (64, 32), (1000, 16)])
def test_more_tensors_are_looked_at_with_fewer_samples(tensors, samples):
    assert samples_for(tensors) == samples
