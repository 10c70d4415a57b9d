"""Weights stored in 16 bits: rounding, which tensors, the runtime's graph, and results bit by bit."""

import ml_dtypes
import msgspec
import numpy as np
import onnx
import pytest
from compress_case import ARM, X86, operators, parse, random, run, session
from edgepress.compress.lower import apply_plan
from edgepress.compress.typed.formats import rounded, rounding_loss
from edgepress.compress.typed.propose import propose_storage
from edgepress.compress.typed.request import form_of
from edgepress.compress.typed.storage import unfolded_casts
from edgepress.graph.errors import NotSupported
from edgepress.graph.save import save_model, to_bytes
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.ort_runtime import optimised_graph
from edgepress.targets.registry import load_target
from hypothesis import given
from hypothesis import strategies as st

NUMPY = {"bf16-storage": ml_dtypes.bfloat16, "fp16-storage": np.float16}
NET = """(int64[N] ids, float[1,8,6,6] image) => (float[N,4] y, float[1,16,6,6] z) {
    rows = Gather(table, ids)
    h = MatMul(rows, w1)
    a = Add(h, b1)
    r = Relu(a)
    y = Gemm(r, w2, b2)
    z = Conv<pads = [1, 1, 1, 1]>(image, k, kb)
}"""


def weights(seed=0):
    return {
        "table": random(seed, 50, 64),
        "w1": random(seed + 1, 64, 512, scale=0.1),
        "b1": random(seed + 2, 512),
        "w2": random(seed + 3, 512, 4, scale=0.1),
        "b2": random(seed + 4, 4),
        "k": random(seed + 5, 16, 8, 3, 3, scale=0.1),
        "kb": random(seed + 6, 16),
    }


def feeds():
    return {"ids": np.array([3, 0, 49]), "image": random(9, 1, 8, 6, 6)}


def stored(model, form, **options):
    plan = propose_storage(model, load_target(X86), form, **options)
    return plan, apply_plan(model, plan)[0]


def types(model):
    return {name: value.dtype.name for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize("form", ["bf16-storage", "fp16-storage"])
def test_results_are_those_of_rounded_weights_bit_by_bit(form):
    plan, made = stored(parse(NET, weights()), form)
    assert (plan.precision, plan.quantization) == (form, "none")
    big = ("table", "w1", "w2", "k")
    reference = {
        name: array.astype(NUMPY[form]).astype(np.float32) if name in big else array
        for name, array in weights().items()
    }
    expected = run(parse(NET, reference), feeds(), optimise=True)
    for wanted, found in zip(expected, run(made, feeds(), optimise=True), strict=True):
        np.testing.assert_array_equal(wanted, found)
    # Unfolded, a weight is no constant: the runtime packs it otherwise and sums in another order.
    for wanted, found in zip(expected, run(made, feeds()), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    onnx.checker.check_model(onnx.load_from_string(to_bytes(made)), full_check=True)


@pytest.mark.parametrize("form", ["bf16-storage", "fp16-storage"])
def test_the_runtime_folds_the_casts_and_runs_the_kernels_of_float32(tmp_path, form):
    model = parse(NET, weights())
    made = stored(model, form)[1]
    graphs = []
    for name, item in (("float", model), ("stored", made)):
        (file,) = save_model(item, tmp_path / f"{name}.onnx", with_shapes=False)
        graphs.append((file.stat().st_size, optimised_graph(file, SessionOptions())))
    kinds = [sorted(node.op_type for node in graph.graph) for _, graph in graphs]
    assert kinds[1] == sorted([*kinds[0], "Cast"])  # one left: of the rows that are looked up
    (cast,) = (node for node in graphs[1][1].graph if node.op_type == "Cast")
    assert cast.inputs[0].producer().op_type == "Gather"
    assert graphs[1][0] < 0.56 * graphs[0][0]


def test_casts_that_the_runtime_does_not_fold_are_found(tmp_path):
    made = stored(parse(NET, weights()), "bf16-storage")[1]
    (file,) = save_model(made, tmp_path / "stored.onnx", with_shapes=False)
    profile = load_target(X86)
    assert unfolded_casts(file, profile) == []
    never = {"optimization.disable_specified_optimizers": "ConstantFolding"}
    found = unfolded_casts(file, msgspec.structs.replace(profile, audit_config=never))
    assert sorted(found) == ["k.bf16", "w1.bf16", "w2.bf16"]


def test_biases_small_and_unfit_weights_stay_float32_with_their_reason():
    own = weights()
    own["w1"][0, 0] = 1e5
    own["k"] *= 1e-6
    plan, made = stored(parse(NET, own), "fp16-storage")
    reasons = {item.weight: item.reason for item in plan.decisions}
    assert "1 of its values lie beyond float16's 65504" in reasons["w1"]
    assert "too small for float16" in reasons["k"]
    kept = types(made)
    assert {kept[name] for name in ("w1", "b1", "b2", "k", "kb")} == {"FLOAT"}
    assert {kept["table.fp16"], kept["w2.fp16"]} == {"FLOAT16"}
    assert "w1.bf16" in types(stored(parse(NET, own), "bf16-storage")[1])  # bfloat16 has float32's range


def test_small_weights_stay_float32():
    model = parse("(float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", {"w": random(0, 8, 8)})
    plan, made = stored(model, "bf16-storage")
    assert plan.groups == ()
    assert plan.decisions[0].reason == "it has fewer than 1,024 elements"
    assert operators(made) == {"MatMul": 1}


def test_a_weight_is_stored_once_for_all_that_read_it():
    text = """(int64[N] ids, float[M,64] x) => (float[N,64] rows, float[M,50] y, float[50,64] more) {
        rows = Gather(table, ids)
        turned = Transpose<perm = [1, 0]>(table)
        y = MatMul(x, turned)
        more = Neg(table)
    }"""
    table = random(0, 50, 64)
    plan, made = stored(parse(text, {"table": table}), "bf16-storage")
    assert [item.form for item in plan.decisions] == ["bf16-storage"]
    assert types(made) == {"table.bf16": "BFLOAT16"}
    inputs = {"ids": np.array([1]), "x": random(1, 2, 64)}
    reference = {"table": table.astype(ml_dtypes.bfloat16).astype(np.float32)}
    for wanted, found in zip(run(parse(text, reference), inputs), run(made, inputs), strict=True):
        np.testing.assert_array_equal(wanted, found)


def test_rows_that_are_an_output_keep_its_name():
    text = "(int64[N] ids) => (float[N,64] rows) { rows = Gather(table, ids) }"
    model = parse(text, {"table": random(0, 50, 64)})
    made = stored(model, "bf16-storage")[1]
    assert made.outputs == model.outputs
    assert run(made, {"ids": np.array([4])})[0].dtype == np.float32


def test_weights_inside_a_body_are_stored():
    text = """(float[N,64] x, bool c) => (float[N,64] y) {
        y = If(c) <
            then_branch = yes () => (float[N,64] a) { a = MatMul(x, w) },
            else_branch = no () => (float[N,64] b) { b = Neg(x) }
        >
    }"""
    w = random(0, 64, 64)
    made = stored(parse(text, {"w": w}), "bf16-storage")[1]
    inputs = {"x": random(1, 2, 64), "c": np.array(True)}
    reference = parse(text, {"w": w.astype(ml_dtypes.bfloat16).astype(np.float32)})
    np.testing.assert_array_equal(run(reference, inputs)[0], run(made, inputs)[0])


def test_kept_by_the_user_and_reverted_groups_stay_float32():
    model = parse(NET, weights())
    plan, made = stored(model, "bf16-storage", keep_float=("w1", "nothing-like-it"))
    assert "w1" in types(made)
    assert plan.notes == ("--keep-float 'nothing-like-it' matches nothing that would be stored smaller",)
    reverted = plan.revert(frozenset({"w2"}), "for the drift limit")
    assert set(types(apply_plan(model, reverted)[0])) >= {"w2", "table.bf16"}


def test_old_operator_sets_are_lifted_for_bfloat16():
    model = parse("(float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", {"w": random(0, 64, 64)}, 9)
    made = stored(model, "bf16-storage")[1]
    assert made.opset >= 13
    assert session(made).run(None, {"x": random(1, 2, 64)})[0].shape == (2, 64)


def test_what_a_precision_means_on_each_target():
    assert form_of(load_target(X86), "fp16") == "fp16-storage"
    assert form_of(load_target("raspberry-pi-4"), "fp16") == "fp16-storage"
    assert form_of(load_target(ARM), "fp16") == "fp16"
    assert form_of(load_target("arm64-graviton3"), "fp16") == "fp16"
    for name in (X86, ARM, "arm64-graviton3"):
        assert form_of(load_target(name), "bf16") == "bf16-storage"
        with pytest.raises(NotSupported, match="does not compute in bfloat16") as caught:
            form_of(load_target(name), "bf16-compute")
        assert "no bfloat16 MatMul" in caught.value.why
    assert form_of(load_target(ARM), "auto") is None


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30))
def test_rounding_to_bfloat16_is_to_nearest_ties_to_even(numbers):
    values = np.array(numbers, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(rounded(values, "bf16").view(np.uint16), expected)


def test_loss_counts_what_overflows_and_vanishes():
    loss = rounding_loss(np.array([1.0, 65519.0, 65520.0, 1e-9, 0.0, np.inf], np.float32), "fp16")
    assert (loss.overflowed, loss.vanished) == (1, 1)
    assert rounding_loss(np.zeros(3, np.float32), "fp16").reason("fp16") is None
    assert rounding_loss(random(0, 1000), "fp16").reason("fp16") is None
    assert rounding_loss(random(0, 1000), "bf16").reason("bf16") is None
