"""Graphs that compute in 16-bit floats: which nodes, where the Casts stand, ranges, and the peer's form."""

import msgspec
import numpy as np
import onnx
import pytest
from compress_case import ARM, X86, operators, parse, random, run
from edgepress.compress.emulate.float16_run import Float16Runner, run_float16
from edgepress.compress.lower import apply_plan
from edgepress.compress.typed.propose import propose_compute
from edgepress.graph.passes import run_passes
from edgepress.graph.save import to_bytes
from edgepress.graph.shapes import InferShapes
from edgepress.targets.registry import load_target

BLOCK = """(float[B,T,32] x, float[B,T,T] mask) => (float[B,T,32] y) {
    n = LayerNormalization(x, g, b)
    q0 = MatMul(n, wq)
    q = Add(q0, bq)
    k0 = MatMul(n, wk)
    k = Add(k0, bk)
    kt = Transpose<perm = [0, 2, 1]>(k)
    s = MatMul(q, kt)
    m = Add(s, mask)
    p = Softmax<axis = -1>(m)
    c = MatMul(p, q)
    f0 = MatMul(c, w1)
    f = Add(f0, b1)
    a = Gelu(f)
    h0 = MatMul(a, w2)
    h = Add(h0, b2)
    y = Add(h, x)
}"""
CNN = """(float[N,3,12,12] x) => (float[N,5] y) {
    c0 = Conv<pads = [1, 1, 1, 1]>(x, k0, b0)
    r0 = Relu(c0)
    c1 = Conv<pads = [1, 1, 1, 1], group = 8>(r0, k1, b1)
    r1 = Relu(c1)
    p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(r1)
    f = Flatten(p)
    y = Gemm<transB = 1>(f, w, bw)
}"""


def block_weights():
    sizes = {"wq": (32, 32), "wk": (32, 32), "w1": (32, 64), "w2": (64, 32)}
    made = {name: random(place, *shape, scale=0.2) for place, (name, shape) in enumerate(sizes.items())}
    biases = {"bq": 32, "bk": 32, "b1": 64, "b2": 32, "b": 32}
    return made | {name: random(20, size, scale=0.1) for name, size in biases.items()} | {"g": random(31, 32)}


def block_feeds():
    mask = np.triu(np.full((6, 6), -1e9, np.float32), 1)
    return {"x": random(7, 2, 6, 32), "mask": np.stack([mask] * 2)}


def cnn_weights():
    return {
        "k0": random(0, 8, 3, 3, 3, scale=0.2),
        "b0": random(1, 8),
        "k1": random(2, 8, 1, 3, 3, scale=0.3),
        "b1": random(3, 8),
        "w": random(4, 5, 288, scale=0.1),
        "bw": random(5, 5),
    }


def converted(model, target=ARM, kind="fp16", **options):
    profile = load_target(target) if isinstance(target, str) else target
    plan = propose_compute(model, profile, kind, **options)
    made, _ = apply_plan(model, plan)
    onnx.checker.check_model(onnx.load_from_string(to_bytes(made)), full_check=True)
    assert (made.inputs, made.outputs) == (model.inputs, model.outputs)
    return plan, made


def forms(plan):
    return {item.node.rpartition("/")[2]: item.form for item in plan.decisions}


def no_pairs(model):
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert not [node for node in casts if (maker := node.inputs[0].producer()) and maker.op_type == "Cast"]
    read = [(node.inputs[0].name, node.attributes["to"].as_int()) for node in casts]
    assert len(read) == len(set(read))
    return len(casts)


def close(model, made, feeds, fraction):
    for wanted, found in zip(run(model, feeds), run(made, feeds), strict=True):
        assert found.dtype == wanted.dtype
        assert np.linalg.norm(found - wanted) <= fraction * np.linalg.norm(wanted)


def test_products_compute_in_float16_and_sensitive_operators_in_float32():
    model = parse(BLOCK, block_weights())
    plan, made = converted(model)
    assert plan.precision == "fp16"
    by_op = {(item.op, item.form) for item in plan.decisions}
    assert {("MatMul", "fp16"), ("Gelu", "fp16"), ("Transpose", "fp16")} <= by_op
    assert {("LayerNormalization", "float"), ("Softmax", "float")} <= by_op
    assert ("MatMul", "float") not in by_op
    close(model, made, block_feeds(), 3e-3)


def test_casts_stand_once_behind_each_value_and_never_in_pairs():
    made = converted(parse(BLOCK, block_weights()))[1]
    # Down: the norm (read twice) and the softmax; up: the scores and the last product.
    assert no_pairs(made) == 4


def test_biases_join_their_product_on_onnxruntime_and_residual_adds_stay_float32():
    plan, made = converted(parse(BLOCK, block_weights()))
    adds = [(item.form, item.reason) for item in plan.decisions if item.op == "Add"]
    assert adds.count(("fp16", "the product starts from it")) == 4
    assert [reason for form, reason in adds if form == "float"] == [
        "takes about 16 times the instructions of float32 in float16"
    ] * 2
    assert (operators(made)["Gemm"], operators(made)["Add"]) == (4, 2)


def test_gemm_takes_its_constant_the_plain_way_round():
    model = parse(CNN, cnn_weights())
    _, made = converted(model)
    (gemm,) = (node for node in made.graph if node.op_type == "Gemm")
    assert gemm.attributes["transB"].as_int() == 0
    assert gemm.inputs[1].shape == [288, 5]
    close(model, made, {"x": random(6, 2, 3, 12, 12)}, 3e-3)


def test_operators_without_a_float16_kernel_stay_float32():
    plan, made = converted(parse(CNN, cnn_weights()))
    reasons = {item.op: item.reason for item in plan.decisions if item.form == "float"}
    assert set(reasons) == {"AveragePool", "Flatten"}
    no_pairs(made)


def test_what_overflows_keeps_its_producer_and_its_readers_in_float32():
    model = parse(BLOCK, block_weights())
    plan = propose_compute(model, load_target(ARM), "fp16", largest={"s": 40000.0})
    made = {item.op: item for item in plan.decisions if "reaches" in item.reason}
    assert "'s' reaches 4e+04 on the data, beyond half of float16's 65504" in made["MatMul"].reason
    assert sum(item.op == "MatMul" and item.form == "fp16" for item in plan.decisions) == 5
    fine = propose_compute(model, load_target(ARM), "fp16", largest={"s": 30000.0})
    assert sum(item.op == "MatMul" and item.form == "fp16" for item in fine.decisions) == 6


def test_a_weight_that_does_not_fit_keeps_its_node_in_float32():
    own = block_weights()
    own["w1"][0, 0] = 7e4
    plan, _ = converted(parse(BLOCK, own))
    (kept,) = (item for item in plan.decisions if item.op == "MatMul" and item.form != "fp16")
    assert (kept.form, kept.weight) == ("float", "w1")
    assert "beyond float16's 65504" in kept.reason


def test_a_reverted_group_goes_back_with_all_that_follows_it():
    model = parse(BLOCK, block_weights())
    plan, _ = converted(model)
    group = next(item.group for item in plan.decisions if item.weight == "w1")
    back = plan.revert(frozenset({group}), "for the drift limit")
    assert {item.op for item in back.decisions if item.reason == "for the drift limit"} == {
        "MatMul", "Add", "Gelu",
    }  # fmt: skip
    made, _ = apply_plan(model, back)
    close(model, made, block_feeds(), 3e-3)
    no_pairs(made)


def test_graph_outputs_and_captured_values_stay_float32():
    text = """(float[N,32] x, bool c) => (float[N,32] h, float[N,32] y) {
        h = MatMul(x, w)
        y = If(c) <
            then_branch = yes () => (float[N,32] a) { a = Neg(h) },
            else_branch = no () => (float[N,32] b) { b = Identity(h) }
        >
    }"""
    model = parse(text, {"w": random(0, 32, 32)})
    made = converted(model)[1]
    for flag in (True, False):
        close(model, made, {"x": random(1, 4, 32), "c": np.array(flag)}, 2e-3)


def test_bfloat16_needs_an_operator_set_that_has_it():
    profile = load_target(X86)
    kernels = tuple(
        msgspec.structs.replace(item, grade="fast") if item.activation == "bfloat16" else item
        for item in profile.kernels
    )
    able = msgspec.structs.replace(profile, kernels=kernels)
    made = {}
    for opset in (20, 22):
        plan, _ = converted(parse(CNN, cnn_weights(), opset), able, "bf16")
        made[opset] = {item.op: item.reason for item in plan.decisions if item.form != "bf16"}
    assert made[20]["Conv"] == "operator set 20 has no Conv in bfloat16"
    assert "Conv" not in made[22]


def test_a_tensorrt_target_gets_its_typed_graph():
    model = parse(BLOCK, block_weights())
    for kind in ("fp16", "bf16"):
        plan, made = converted(model, "a100-40gb", kind)
        assert plan.precision == kind
        assert sum(item.form == kind for item in plan.decisions if item.op == "MatMul") == 6
        assert {item.form for item in plan.decisions if item.op == "Softmax"} == {"float"}
        assert operators(made)["Add"] == operators(model)["Add"]  # its builder joins biases itself
        no_pairs(made)


def test_no_further_from_float32_than_the_peer():
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    for text, weights, feeds in (
        (BLOCK, block_weights(), block_feeds()),
        (CNN, cnn_weights(), {"x": random(6, 2, 3, 12, 12)}),
    ):
        model = parse(text, weights)
        made = converted(model)[1]
        proto = onnx.load_from_string(to_bytes(model))
        peer = float16.convert_float_to_float16(proto, keep_io_types=True).SerializeToString()
        reference, ours, theirs = (run(item, feeds)[0] for item in (model, made, peer))
        error = np.linalg.norm(ours - reference)
        assert error <= 1.2 * np.linalg.norm(theirs - reference)
        assert error > 0


def test_emulated_arithmetic_is_further_off_than_a_check_on_x86():
    model = parse(BLOCK, block_weights())
    made = converted(model)[1]
    run_passes(made, [InferShapes()])
    (reference,), (here,) = run(model, block_feeds()), run(made, block_feeds())
    there = run_float16(made, block_feeds())["y"]
    assert np.linalg.norm(there - reference) > 1.2 * np.linalg.norm(here - reference)
    assert np.linalg.norm(there - reference) < 0.05 * np.linalg.norm(reference)
    runner = Float16Runner(made)
    np.testing.assert_array_equal(runner.run(block_feeds(), ["y"])["y"], there)
    assert [spec.name for spec in runner.inputs] == ["x", "mask"]
