"""LSTM in dynamic INT8: the stored weights, the numbers beside the float layer, and who stays float."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.audit import audit
from edgepress.compress.lower import apply_plan
from edgepress.compress.quantize.recurrent import recurrent_weight
from edgepress.graph.errors import ModelError
from edgepress.graph.save import save_model
from edgepress.graph.scheme import Scheme
from edgepress.targets.registry import load_target

INPUTS, CELLS, STEPS, BATCH = 64, 128, 7, 3
SCHEME = Scheme(dtype="int8", symmetric=True, granularity="per-channel", axis=1)


def weights(directions, inputs=INPUTS, cells=CELLS, gates=4):
    wide = gates * cells
    return {
        "w": case.random(1, directions, wide, inputs, scale=inputs**-0.5),
        "r": case.random(2, directions, wide, cells, scale=cells**-0.5),
        "b": case.random(3, directions, 2 * wide, scale=0.3),
        "p": case.random(4, directions, 3 * cells, scale=0.3),
        "h": case.random(5, directions, BATCH, cells, scale=0.5),
        "c": case.random(6, directions, BATCH, cells, scale=0.5),
        "n": np.array([7, 2, 5], np.int32),
    }


def net(attributes="", operands="x, w, r, b", direction="forward", opset=20, **sizes):
    directions = 2 if direction == "bidirectional" else 1
    stored = weights(directions, **sizes)
    cells = sizes.get("cells", CELLS)
    ends = "(float[L,D,B,H] y, float[D,B,H] yh, float[D,B,H] yc)"
    text = f"""(float[L,{BATCH},{sizes.get("inputs", INPUTS)}] x) => {ends} {{
        [l] y, yh, yc = LSTM <{attributes}direction = "{direction}", hidden_size = {cells}> ({operands}) }}"""
    used = [item.strip() for item in operands.split(",")]
    return case.parse(text, {name: array for name, array in stored.items() if name in used}, opset)


def plan(model, **asked):
    return case.plan_of(model, **({"quantization": "dynamic"} | asked))


def feed(seed=7, inputs=INPUTS):
    return {"x": case.random(seed, STEPS, BATCH, inputs)}


@pytest.mark.parametrize("reduced", [False, True])
def test_weights_against_a_loop(reduced):
    weight = case.random(1, 2, 12, 5)
    weight[1, 4] = 0.0
    scheme = Scheme(dtype="int8", symmetric=True, granularity="per-channel", axis=1, reduced_range=reduced)
    integers, scale = recurrent_weight(weight, scheme)
    limit = 63 if reduced else 127
    assert (integers.shape, integers.dtype, scale.shape) == ((2, 5, 12), np.int8, (2, 12))
    for direction in range(2):
        for gate in range(12):
            row = weight[direction, gate].astype(np.float64)
            unit = np.float32(np.abs(row).max() / limit) if np.abs(row).max() else np.float32(1)
            assert scale[direction, gate] == unit
            np.testing.assert_array_equal(
                integers[direction, :, gate], np.rint(row.astype(np.float32) / unit)
            )


CASES = [
    ("", "x, w, r, b", "forward"),
    ("", "x, w, r", "forward"),
    ("", "x, w, r, b", "reverse"),
    ("", "x, w, r, b", "bidirectional"),
    ("", "x, w, r, b, n", "bidirectional"),
    ("", "x, w, r, b, , h, c", "forward"),
    ("", "x, w, r, b, n, h, c, p", "bidirectional"),
    ("clip = 0.5, ", "x, w, r, b", "forward"),
    ("input_forget = 1, ", "x, w, r, b", "forward"),
    ('activations = ["HardSigmoid", "Relu", "Tanh"], ', "x, w, r, b", "forward"),
]


@pytest.mark.parametrize(("attributes", "operands", "direction"), CASES)
def test_numbers_beside_the_float_layer(attributes, operands, direction):
    model = net(attributes, operands, direction)
    lowered, records = apply_plan(model, plan(model))
    assert [record.applied for record in records] == [{"LSTM-dynamic": 1}]
    assert case.operators(lowered) == {"DynamicQuantizeLSTM": 1}
    assert (lowered.inputs, lowered.outputs) == (model.inputs, model.outputs)
    # In float with the weights that the integers stand for: what is left is the rounding of the state.
    rounded = model.fork()
    stored = weights(2 if direction == "bidirectional" else 1)
    for name in ("w", "r"):
        integers, scale = recurrent_weight(stored[name], SCHEME)
        real = np.swapaxes(integers * scale[:, None, :], 1, 2).astype(np.float32)
        rounded = _with_weight(rounded, name, real)
    found = case.run(lowered, feed())
    for wanted, near, have in zip(case.run(model, feed()), case.run(rounded, feed()), found, strict=True):
        assert case.relative_l2(wanted, have) < 0.04
        assert case.relative_l2(near, have) < 0.04
        assert case.relative_l2(wanted, have) > 0  # it is quantized


def _with_weight(model, name, array):
    import onnx_ir as ir

    value = model.graph.initializers[name]
    value.const_value = ir.tensor(array, name=name)
    return model


def test_outputs_that_nothing_reads_stay_out():
    text = f"""(float[L,{BATCH},{INPUTS}] x) => (float[D,B,H] z) {{
        [l] y, yh, yc = LSTM <hidden_size = {CELLS}> (x, w, r, b) z = Identity(yh) }}"""
    stored = weights(1)
    model = case.parse(text, {name: stored[name] for name in "wrb"})
    lowered, _ = apply_plan(model, plan(model))
    (node,) = (node for node in lowered.graph if node.op_type == "DynamicQuantizeLSTM")
    assert [value.name for value in node.outputs] == ["", "yh", ""]
    assert case.relative_l2(case.run(model, feed())[0], case.run(lowered, feed())[0]) < 0.04


def test_the_smaller_file_is_a_quarter_and_audits_as_an_integer_kernel(tmp_path):
    model = net(direction="bidirectional")
    made = plan(model)
    lowered, _ = apply_plan(model, made)
    save_model(lowered, tmp_path / "m.onnx")
    for target in (case.X86, case.ARM):
        (finding,) = audit(tmp_path / "m.onnx", made, load_target(target)).findings
        assert (finding.node, finding.runtime_op, finding.integer) == ("l", "DynamicQuantizeLSTM", True)
    assert lowered.weight_bytes < 0.3 * model.weight_bytes


@pytest.mark.parametrize("opset", [7, 11, 14])
def test_old_operator_sets(opset):
    model = net(opset=opset)
    lowered, _ = apply_plan(model, plan(model))
    assert case.relative_l2(case.run(model, feed())[0], case.run(lowered, feed())[0]) < 0.04


def test_work_is_counted_and_auto_takes_it_without_data():
    model = net(direction="bidirectional")
    item = case.by_node(
        plan(model, quantization="auto", calibrated=False, shapes={"x": (STEPS, BATCH, INPUTS)})
    )["l"]
    assert item.form == "dynamic"
    assert item.macs == STEPS * BATCH * 2 * 4 * CELLS * (INPUTS + CELLS)
    assert item.reason.startswith("kernel lstm-dynamic-s8 (works, 2.30x of float)")


def reason(model, **asked):
    item = case.by_node(plan(model, **asked))["l"]
    assert item.form == "float"
    return item.reason, item.remedy


def test_what_stays_float_and_why():
    small = "its weights are too small to pay for quantizing the state at every step"
    assert reason(net(cells=96, inputs=64)) == (small, None)
    remedy = "pass --quantization auto or dynamic"
    for asked in ("static", "weight-only"):
        assert reason(net(), quantization=asked) == (f"{case.X86} has no {asked} kernel for LSTM", remedy)
    assert reason(net("layout = 1, ")) == (
        "onnxruntime runs no LSTM with the batch first (layout 1)",
        "export it with layout 0",
    )
    assert reason(net(), keep_float=("^l$",))[0] == "kept in float by --keep-float '^l$'"
    fed = case.parse(
        "(float[L,3,64] x, float[1,512,64] w, float[1,512,128] r) => (float[L,D,B,H] y) "
        "{ [l] y = LSTM <hidden_size = 128> (x, w, r) }"
    )
    assert reason(fed) == ("its weights are computed", None)


@pytest.mark.parametrize(("op", "gates"), [("GRU", 3), ("RNN", 1)])
def test_onnxruntime_has_no_other_recurrent_kernel(op, gates):
    stored = weights(1, gates=gates)
    text = (
        f"(float[L,3,{INPUTS}] x) => (float[L,D,B,H] y) {{ [l] y = {op} <hidden_size = {CELLS}> (x, w, r) }}"
    )
    model = case.parse(text, {name: stored[name] for name in "wr"})
    assert reason(model) == (f"onnxruntime has no integer kernel of {op}, only of LSTM", None)


def test_infinite_weights_are_refused():
    model = net()
    bad = weights(1)["w"]
    bad[0, 0, 0] = np.inf
    with pytest.raises(ModelError, match="infinite"):
        apply_plan(_with_weight(model, "w", bad), plan(model))
