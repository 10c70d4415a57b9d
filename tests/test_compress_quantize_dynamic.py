"""QuantizeDynamic, QuantizeTables and QuantizeBlocks against NumPy, and what they share."""

import compress_case as case
import numpy as np
import onnx_ir as ir
import pytest
from edgepress.compress.lower import apply_plan
from edgepress.compress.plan import Decision, Plan
from edgepress.compress.quantize.blocks import quantize_blocks
from edgepress.graph.errors import InternalError
from edgepress.graph.scheme import Scheme

COLUMNS = Scheme(dtype="int8", symmetric=True, granularity="per-channel", axis=1)
ROWS = Scheme(dtype="int8", symmetric=True, granularity="per-row", axis=0)


def dynamic(node, **more):
    fields = {"op": "MatMul", "group": node, "form": "dynamic", "weight_scheme": COLUMNS, "reason": ""}
    return Decision(node=node, **(fields | more))


def table(node):
    return dynamic(node, op="Gather", form="weight-only", weight_scheme=ROWS)


def blocks(node):
    return dynamic(node, form="weight-only", weight_scheme=None)


def apply(model, *decisions):
    plan = Plan(target="t", precision="int8", quantization="dynamic", decisions=decisions)
    return apply_plan(model, plan)


def emulate(x, weight, reduced=False):
    """ONNX DynamicQuantizeLinear, MatMulInteger and the scaling, in the operators' own float32 steps."""
    low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = np.float32(high - low) / np.float32(255)
    zero = np.clip(np.rint(np.float32(0) - low / scale), 0, 255)
    integers = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64)
    limit = 63 if reduced else 127
    largest = np.abs(weight).max(axis=0)
    unit = np.where(largest > 0, largest.astype(np.float64) / limit, 1.0).astype(np.float32)
    columns = np.clip(np.rint(weight / unit), -limit, limit).astype(np.int64)
    sums = (integers - int(zero)) @ columns
    return sums.astype(np.float32) * (scale * unit)


@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (2, 5, 24), (2, 2, 3, 24)])
@pytest.mark.parametrize("width", [7, 24])
@pytest.mark.parametrize("reduced", [False, True])
def test_bit_by_bit(shape, width, reduced):
    axes = ",".join("ABCD"[: len(shape) - 1])
    text = f"(float[{axes},24] x) => (float[{axes},{width}] y) {{ [m] y = MatMul(x, w) }}"
    weight = case.random(1, 24, width)
    weight[:, 0] = 0
    model = case.parse(text, {"w": weight})
    scheme = Scheme(dtype="int8", symmetric=True, granularity="per-channel", axis=1, reduced_range=reduced)
    lowered, records = apply(model, dynamic("m", weight_scheme=scheme))
    assert records[-1].applied == {"MatMul-dynamic": 1}
    assert case.operators(lowered) == {
        "DynamicQuantizeLinear": 1, "MatMulInteger": 1, "Cast": 1, "Mul": 2,
    }  # fmt: skip
    for seed in range(3):
        x = case.random(seed, *shape, scale=10.0**seed)
        np.testing.assert_array_equal(case.run(lowered, {"x": x})[0], emulate(x, weight, reduced))
    assert (lowered.inputs, lowered.outputs) == (model.inputs, model.outputs)
    assert case.operators(model) == {"MatMul": 1}


def test_readers_of_one_tensor_share_its_quantization():
    text = """(float[N,S,8] x) => (float[N,S,8] y) { [q] a = MatMul(x, w) [k] b = MatMul(x, v)
        c = Add(a, b) [o] d = MatMul(c, w) y = Add(d, x) }"""
    model = case.parse(text, {"w": case.random(1, 8, 8), "v": case.random(2, 8, 8)})
    lowered, _ = apply(model, dynamic("q"), dynamic("k"), dynamic("o"))
    operators = case.operators(lowered)
    assert (operators["DynamicQuantizeLinear"], operators["MatMulInteger"]) == (2, 3)
    stored = {name: value.dtype.name for name, value in lowered.graph.initializers.items()}
    assert stored == {"w.int8": "INT8", "w.scale": "FLOAT", "v.int8": "INT8", "v.scale": "FLOAT"}


def test_a_weight_that_a_float_node_also_reads_stays():
    text = "(float[N,8] x) => (float[N,8] y) { [q] a = MatMul(x, w) b = Neg(w) [k] y = MatMul(a, b) }"
    model = case.parse(text, {"w": case.random(1, 8, 8)})
    lowered, _ = apply(model, dynamic("q"))
    assert {"w", "w.int8"} <= set(lowered.graph.initializers)


BRANCHES = """(bool f, float[2,8] x) => (float[2,8] y) { [outer] a = MatMul(x, w)
    y = If (f) <then_branch = t () => (float[2,8] y1) { [inner] b = MatMul(x, w) y1 = Add(a, b) },
                else_branch = e () => (float[2,8] y2) { [other] c = MatMul(a, w) y2 = Relu(c) }> }"""


@pytest.mark.parametrize("make", [dynamic, blocks])
def test_branches_share_the_stored_weight(make):
    model = case.parse(BRANCHES, {"w": case.random(1, 8, 8)})
    lowered, records = apply(model, make("outer"), make("inner"), make("other"))
    assert sum(sum(record.applied.values()) for record in records) == 3
    assert all(not graph.initializers for graph in lowered.graph.subgraphs())
    assert sum(value.const_value.nbytes >= 64 for value in lowered.graph.initializers.values()) == 1
    for flag in (True, False):
        feeds = {"f": np.array(flag), "x": case.random(3, 2, 8)}
        assert case.sqnr_db(case.run(model, feeds)[0], case.run(lowered, feeds)[0]) > 30


def test_outputs_keep_their_names():
    text = (
        "(float[N,8] x) => (float[N,8] first, float[N,8] second) { [q] first = "
        "MatMul(x, w) second = Relu(first) }"
    )
    model = case.parse(text, {"w": case.random(1, 8, 8)})
    lowered, _ = apply(model, dynamic("q"))
    assert lowered.outputs == model.outputs


def test_a_plan_of_another_model_is_refused():
    model = case.parse("(float[N,8] x, float[8,8] w) => (float[N,8] y) { [q] y = MatMul(x, w) }")
    for decision in (dynamic("q"), blocks("q")):
        with pytest.raises(InternalError, match="no constant weight"):
            apply(model, decision)
    model = case.parse("(float[9,8] t, int64[N] i) => (float[N,8] y) { [g] y = Gather(t, i) }")
    with pytest.raises(InternalError, match="not constant"):
        apply(model, table("g"))


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_tables_bit_by_bit(shape):
    axes = "" if not shape else f"[{','.join('AB'[: len(shape)])}]"
    text = f"(int64{axes} i) => (float[{axes[1:-1] + ',' if shape else ''}16] y) {{ [g] y = Gather(t, i) }}"
    rows = case.random(1, 40, 16) * (10.0 ** np.arange(-2, 2, 0.1, dtype=np.float32))[:, None]
    rows[3] = 0
    model = case.parse(text, {"t": rows})
    lowered, records = apply(model, table("g"))
    assert records[0].applied == {"Gather-int8-rows": 1}
    assert {name: value.dtype.name for name, value in lowered.graph.initializers.items()} == {
        "t.int8": "INT8", "t.scale": "FLOAT",
    }  # fmt: skip
    index = np.random.default_rng(0).integers(-40, 40, shape)
    largest = np.abs(rows).max(axis=1)
    scale = np.where(largest > 0, largest.astype(np.float64) / 127, 1.0).astype(np.float32)
    integers = np.clip(np.rint(rows / scale[:, None]), -127, 127).astype(np.float32)
    expected = (integers * scale[:, None])[index]
    np.testing.assert_array_equal(case.run(lowered, {"i": index})[0], expected)


def test_two_lookups_share_a_table():
    text = "(int64[N] i) => (float[N,16] y) { [a] p = Gather(t, i) [b] q = Gather(t, i) y = Add(p, q) }"
    lowered, _ = apply(case.parse(text, {"t": case.random(1, 40, 16)}), table("a"), table("b"))
    assert sorted(lowered.graph.initializers) == ["t.int8", "t.scale"]


def test_a_slice_of_a_table_bit_by_bit():
    text = """(int64[1] n) => (float[N,16] y) <int64[1] zero = {0}> {
        [g] y = Slice(t, zero, n, zero) }"""
    rows = case.random(1, 40, 16)
    lowered, records = apply(
        case.parse(text, {"t": rows}),
        dynamic("g", op="Slice", form="weight-only", weight_scheme=ROWS),
    )
    assert records[0].applied == {"Slice-int8-rows": 1}
    scale = (np.abs(rows).max(axis=1).astype(np.float64) / 127).astype(np.float32)[:, None]
    expected = np.rint(rows / scale).astype(np.float32) * scale
    np.testing.assert_array_equal(case.run(lowered, {"n": np.array([7])})[0], expected[:7])


def test_a_table_in_a_branch():
    text = """(bool f, int64[2] i) => (float[2,16] y) {
        y = If (f) <then_branch = t () => (float[2,16] y1) { [g] y1 = Gather(t, i) },
                    else_branch = e () => (float[2,16] y2) { [h] z = Gather(t, i) y2 = Neg(z) }> }"""
    model = case.parse(text, {"t": case.random(1, 40, 16)})
    lowered, _ = apply(model, table("g"), table("h"))
    assert sorted(lowered.graph.initializers) == ["t.int8", "t.scale"]
    for flag in (True, False):
        feeds = {"f": np.array(flag), "i": np.array([1, 39])}
        assert case.sqnr_db(case.run(model, feeds)[0], case.run(lowered, feeds)[0]) > 40


@pytest.mark.parametrize("depth", [128, 256, 100, 300])
def test_blocks_in_the_runtime(depth):
    """MatMulNBits: float weights of the blocks times the activations, which it quantizes per block itself."""
    weight = case.random(1, depth, 12)
    text = f"(float[N,S,{depth}] x) => (float[N,S,12] y) {{ [m] y = MatMul(x, w) }}"
    model = case.parse(text, {"w": weight})
    lowered, _ = apply(model, blocks("m"))
    assert case.operators(lowered) == {"MatMulNBits": 1}
    integers, scales = quantize_blocks(weight, 128)
    real = ((integers.astype(np.float32) - 128) * scales[:, :, None]).reshape(12, -1)[:, :depth].T
    x = case.random(2, 2, 3, depth)
    found = case.run(lowered, {"x": x})[0]
    assert case.sqnr_db(x @ real, found) > 38  # its own int8 activations
    node = case.node_of(lowered, "MatMulNBits")
    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    np.testing.assert_allclose(case.run(lowered, {"x": x})[0], x @ real, rtol=1e-4, atol=1e-4)


def test_an_old_operator_set_is_lifted():
    model = case.parse(
        "(float[N,8] x) => (float[N,8] y) { [q] y = MatMul(x, w) }", {"w": case.random(1, 8, 8)}, 9
    )
    lowered, records = apply(model, dynamic("q"))
    assert (lowered.opset, model.opset) == (11, 9)
    assert [record.name for record in records] == ["LiftOpset", "QuantizeDynamic"]
    x = case.random(1, 3, 8)
    np.testing.assert_array_equal(
        case.run(lowered, {"x": x})[0], emulate(x, model.graph.initializers["w"].const_value.numpy())
    )
