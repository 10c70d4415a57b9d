"""`--io-dtype`: the interface in 16 bits, where the Casts stand, and what runs on such a bundle."""

import msgspec
import numpy as np
import onnx
import pytest
from compress_case import operators, parse, random, run
from driver_case import cnn, images, mlp, vectors
from edgepress import load
from edgepress.compress.recipe import Recipe, read_recipe
from edgepress.compress.typed.apply import interface_passes
from edgepress.compress.typed.interface import ConvertInterface
from edgepress.compress.typed.request import check_interface, check_io_dtype
from edgepress.driver.compile import compile_model
from edgepress.driver.options import parse_arguments, recipe_from
from edgepress.export.verify import read_manifest, verify_bundle
from edgepress.graph.errors import DataError, NotSupported
from edgepress.graph.passes import run_passes
from edgepress.runtimes.feeds import fit_floats, widen_floats
from edgepress.targets.registry import load_target

PLAIN = """(float[N,4] x, int64[N,4] i) => (float[N,4] y, float[N,4] x2, int64[N,4] j) {
    r = Relu(x)
    y = Add(r, w)
    x2 = Mul(x, y)
    j = Identity(i)
}"""


def converted(text, kind="fp16", **weights):
    model = parse(text, weights)
    run_passes(model, [ConvertInterface(kind=kind)])
    return model


def feeds():
    return {"x": random(1, 3, 4), "i": np.arange(12).reshape(3, 4)}


def test_only_float_inputs_and_outputs_change_and_names_stay():
    model = converted(PLAIN, w=random(0, 4))
    assert [(spec.name, spec.dtype) for spec in model.inputs] == [("x", "float16"), ("i", "int64")]
    types = [(spec.name, spec.dtype) for spec in model.outputs]
    assert types == [("y", "float16"), ("x2", "float16"), ("j", "int64")]
    assert operators(model)["Cast"] == 3  # one for all readers of x, one for each output


def test_results_are_those_of_rounded_inputs_rounded():
    w, given = random(0, 4), feeds()
    before = parse(PLAIN, {"w": w})
    low = {**given, "x": given["x"].astype(np.float16)}
    wanted = run(before, {**given, "x": low["x"].astype(np.float32)})
    found = run(converted(PLAIN, w=w), low)
    assert [values.dtype.name for values in found] == ["float16", "float16", "int64"]
    for place, values in enumerate(found):
        np.testing.assert_array_equal(values, wanted[place].astype(values.dtype))


def test_an_input_that_is_an_output_and_a_constant_output():
    model = converted("(float[2] x) => (float[2] x, float[2] w) { unused = Relu(x) }", w=random(0, 2))
    assert [spec.dtype for spec in model.outputs] == ["float16", "float16"]
    assert [spec.name for spec in model.outputs] == ["x", "w"]


def test_casts_that_stand_already_go():
    text = """(float[N,4] x) => (float[N,4] y) {
        h = Cast<to = 10>(x)
        r = Relu(h)
        y = Cast<to = 1>(r)
    }"""
    assert operators(converted(text)) == {"Relu": 1}


def test_a_readers_body_keeps_reading_float():
    text = """(float[N] x, bool c) => (float[N] y) {
        y = If (c) <
            then_branch = yes () => (float[N] a) { a = Relu(x) },
            else_branch = no () => (float[N] b) { b = Neg(x) }
        >
    }"""
    model = converted(text)
    found = run(model, {"x": np.asarray([-1, 2], np.float16), "c": np.asarray(False)})
    np.testing.assert_array_equal(found[0], np.asarray([1, -2], np.float16))


def test_bfloat16_lifts_an_old_operator_set():
    model = parse("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", opset=11)
    run_passes(model, interface_passes(model, "bf16"))
    assert model.opset >= 13
    assert [spec.dtype for spec in (*model.inputs, *model.outputs)] == ["bfloat16"] * 2
    assert interface_passes(model, "fp32") == []


def test_feeds_are_rounded_and_results_widened():
    model = converted(PLAIN, w=random(0, 4))
    fitted = fit_floats(model.inputs, feeds())
    assert {name: values.dtype.name for name, values in fitted.items()} == {"x": "float16", "i": "int64"}
    wide = widen_floats({"h": np.ones(2, np.float16), "i": np.ones(2, np.int64)})
    assert [values.dtype.name for values in wide.values()] == ["float32", "int64"]
    with pytest.raises(DataError, match="beyond float16") as caught:
        fit_floats(model.inputs, {"x": np.asarray([[70000.0, 0, 0, 0]], np.float32)})
    assert "--io-dtype fp32" in caught.value.remedy
    infinite = fit_floats(model.inputs, {"x": np.asarray([[-np.inf, 0, 0, 0]], np.float32)})["x"]
    assert np.isneginf(infinite[0, 0])


def test_targets_that_cannot_refuse_with_the_reason():
    with pytest.raises(NotSupported) as caught:
        check_io_dtype(load_target("raspberry-pi-5"), "bf16")
    assert "neither takes nor gives bfloat16 arrays" in caught.value.why
    with pytest.raises(NotSupported) as caught:
        check_io_dtype(load_target("jetson-nano"), "bf16")
    assert "FP32, FP16" in caught.value.why
    check_io_dtype(load_target("a100"), "bf16")
    check_io_dtype(load_target("raspberry-pi-4"), "fp16")


def test_values_beyond_the_type_and_models_without_floats():
    model = parse("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    assert check_interface(model, "fp32", []) == ("fp32", None)
    with pytest.raises(DataError, match="'y' does not fit float16"):
        check_interface(model, "fp16", [{"y": np.asarray([-1e6], np.float32)}])
    check_interface(model, "bf16", [{"y": np.asarray([-1e6, np.inf], np.float32)}])
    integers = parse("(int64[N] x) => (int64[N] y) { y = Identity(x) }")
    kind, note = check_interface(integers, "fp16", [])
    assert (kind, "changes nothing" in note) == ("fp32", True)


@pytest.mark.parametrize(
    ("target", "precision"), [("raspberry-pi-5", "fp16"), ("raspberry-pi-5", "int8"), ("host", "fp32")]
)
def test_a_bundle_with_half_precision_arrays(tmp_path, target, precision):
    source, data = cnn(tmp_path / "c.onnx"), images(tmp_path / "d.npz")
    recipe = Recipe(
        target=target,
        precision=precision,
        io_dtype="fp16",
        benchmark_rounds=1,
        measure_seconds=0,
        golden="data",
        skip=() if target == "host" else ("benchmark",),
    )
    result = compile_model(source, target=target, output=tmp_path / "out", recipe=recipe, calib=data)
    manifest = read_manifest(result.bundle)
    assert manifest.precision.io_dtype == "fp16"
    assert [spec.dtype for spec in (*manifest.model.inputs, *manifest.model.outputs)] == ["float16"] * 2
    assert result.plan.io_dtype == "fp16"
    assert 0 < result.drift.l2 < 0.01
    assert (result.benchmark is None) == (target != "host")
    assert verify_bundle(result.bundle).golden_samples == 3
    assert "float16" in (result.bundle / "README.md").read_text()
    with load(result.bundle) as model:
        assert model(image=np.zeros((1, 3, 16, 16), np.float16))["logits"].dtype == np.float16
    assert read_recipe(result.bundle / "recipe.toml").io_dtype == "fp16"


def test_a_float_model_with_half_precision_outputs_is_held_to_one_step(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    recipe = Recipe(target="raspberry-pi-4", precision="fp32", io_dtype="fp16", skip=("benchmark",))
    result = compile_model(
        source, target="raspberry-pi-4", output=tmp_path / "out", recipe=recipe, calib=data
    )
    golden = read_manifest(result.bundle).golden
    assert golden.numerics == "float32"
    assert golden.tolerances[0].relative_l2[1] == pytest.approx(2**-10, rel=1e-2)
    nodes = [node.op_type for node in onnx.load(result.bundle / "model.onnx").graph.node]
    assert (nodes[0], nodes[-1], nodes.count("Cast")) == ("Cast", "Cast", 2)


def test_the_command_line_says_it():
    words = ["compile", "m.onnx", "--target", "raspberry-pi-5", "--io-dtype", "fp16", "-o", "out"]
    recipe = recipe_from(parse_arguments(words))
    assert recipe.io_dtype == "fp16"
    assert msgspec.structs.replace(recipe, io_dtype="fp32") == Recipe(target="raspberry-pi-5")
