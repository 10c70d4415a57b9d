"""Typed graphs for NVIDIA targets: what is written, and the twin that answers for bfloat16 here."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from compress_case import operators, parse, random
from driver_case import cnn, images, mlp, vectors
from edgepress import load
from edgepress.compress.recipe import Recipe
from edgepress.compress.typed.twin import Bfloat16Session, needs_twin
from edgepress.driver.compile import compile_model
from edgepress.export.verify import read_manifest, verify_bundle
from edgepress.graph.errors import NotSupported

TYPED = """(bfloat16[N,32] x) => (bfloat16[N,16] y, float[N,16] z) {
    a = MatMul(x, w)
    r = Relu(a)
    y = Add(r, b)
    z = Cast<to = 1>(r)
}"""


def rounded(values):
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def compiled(source, tmp_path, target, precision, calib, **fields):
    recipe = Recipe(target=target, precision=precision, **fields)
    return compile_model(source, target=target, output=tmp_path / "out", recipe=recipe, calib=calib)


def test_every_result_is_rounded_and_types_stay():
    w, b = random(0, 32, 16).astype(ml_dtypes.bfloat16), random(1, 16).astype(ml_dtypes.bfloat16)
    session = Bfloat16Session(parse(TYPED, {"w": w, "b": b}))
    x = random(2, 5, 32).astype(ml_dtypes.bfloat16)
    found = session.run({"x": x})
    product = rounded(x.astype(np.float32) @ w.astype(np.float32))
    wanted = rounded(np.maximum(product, 0) + b.astype(np.float32))
    assert found["y"].dtype == ml_dtypes.bfloat16
    assert [spec.dtype for spec in (*session.inputs, *session.outputs)] == ["bfloat16", "bfloat16", "float32"]
    np.testing.assert_array_equal(found["y"].astype(np.float32), wanted)
    np.testing.assert_array_equal(found["z"], np.maximum(product, 0))
    assert list(session.run({"x": x}, ["z"])) == ["z"]


def test_who_needs_a_twin():
    assert needs_twin("bf16", "fp32")
    assert needs_twin("int8+bf16", "fp32")
    assert needs_twin("fp32", "bf16")
    assert not needs_twin("bf16-storage", "fp32")
    assert not needs_twin("int8+bf16-storage", "fp16")


@pytest.mark.parametrize(("precision", "io_dtype"), [("fp16", "fp16"), ("bf16", "bf16"), ("bf16", "fp32")])
def test_a_typed_bundle_for_an_a100(tmp_path, precision, io_dtype):
    source, data = cnn(tmp_path / "c.onnx"), images(tmp_path / "d.npz")
    result = compiled(source, tmp_path, "a100", precision, data, io_dtype=io_dtype)
    manifest = read_manifest(result.bundle)
    assert (manifest.target.runtime, manifest.precision.form) == ("tensorrt", precision)
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[io_dtype]
    assert [spec.dtype for spec in (*manifest.model.inputs, *manifest.model.outputs)] == [dtype] * 2
    proto = onnx.load(result.bundle / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    low = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    types = {item.name: item.data_type for item in proto.graph.initializer}
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert {types[node.input[1]] for node in convolutions} == {low}
    assert 0 < result.drift.l2 < (0.002 if precision == "fp16" else 0.02)
    assert verify_bundle(result.bundle).golden_samples == 3
    readme = (result.bundle / "README.md").read_text()
    assert "trtexec --onnx=model.onnx" in readme
    assert (result.bundle / "snippets").is_dir() == (precision == "fp16")
    assert result.benchmark is None
    assert any("not timed" in note for note in result.notes)
    with load(result.bundle) as model:
        image = np.zeros((1, 3, 16, 16), ml_dtypes.bfloat16 if io_dtype == "bf16" else dtype)
        assert model(image=image)["logits"].dtype.name == dtype


def test_the_twin_is_further_off_than_float16_and_normalizations_stay_float32(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    result = compiled(source, tmp_path, "jetson-thor", "bf16-compute", data)
    assert {item.form for item in result.plan.decisions} == {"bf16"}
    assert 1e-3 < result.drift.l2 < 2e-2  # fp16 stays below 1e-3


def test_a_board_without_bfloat16_is_told_what_it_has(tmp_path):
    source = mlp(tmp_path / "m.onnx")
    for precision in ("bf16", "bf16-compute"):
        with pytest.raises(NotSupported) as caught:
            compiled(source, tmp_path, "jetson-orin-nano", precision, None)
        assert "FP16, INT8" in caught.value.why
        assert "--precision fp16" in caught.value.remedy


def test_operators_count_what_was_widened():
    graph = parse("(bfloat16[N] x) => (bfloat16[N] y) { y = Relu(x) }")
    assert operators(graph) == {"Relu": 1}
    found = Bfloat16Session(graph).run({"x": np.asarray([-1, 2], ml_dtypes.bfloat16)})
    assert found["y"].tolist() == [0, 2]
