"""16-bit floats through the whole loop: what the bundle, the plan and the notes say."""

import msgspec
import numpy as np
import onnx
import onnxruntime
from driver_case import cnn, images, mlp, vectors
from edgepress.compress.plan import Plan
from edgepress.compress.recipe import DriftLimit, Recipe, read_recipe
from edgepress.driver.compile import compile_model
from edgepress.export.verify import read_manifest


def compiled(model, tmp_path, target, precision, *, calib, out="bundle", **fields):
    asked = Recipe(target=target, precision=precision, skip=("benchmark",), **fields)
    return compile_model(model, target=target, output=tmp_path / out, recipe=asked, calib=calib)


def test_bfloat16_is_storage_and_every_paper_says_so(tmp_path):
    source = mlp(tmp_path / "m.onnx")
    result = compiled(source, tmp_path, "raspberry-pi-4", "bf16", calib=vectors(tmp_path / "d.npz"))
    manifest = read_manifest(result.bundle)
    assert (manifest.precision.requested, manifest.precision.form) == ("bf16", "bf16-storage")
    assert manifest.precision.operators == {"bf16-storage": 3}
    assert manifest.golden.numerics == "float32"
    assert "bf16-storage" in (result.bundle / "README.md").read_text()
    plan = msgspec.json.decode((result.bundle / "plan.json").read_bytes(), type=Plan)
    assert plan.precision == "bf16-storage"
    assert any("bf16 on raspberry-pi-4 is storage (bf16-storage): 3 weights" in note for note in result.notes)
    assert result.sizes.bundle_model_bytes < 0.6 * result.sizes.source_bytes
    assert 0 < result.drift.l2 < 0.01


def test_the_bundle_answers_like_rounded_weights(tmp_path):
    source = mlp(tmp_path / "m.onnx")
    result = compiled(source, tmp_path, "raspberry-pi-4", "bf16", calib=vectors(tmp_path / "d.npz"))
    rounded = onnx.load(source)
    for tensor in rounded.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.size >= 1024:
            bits = values.view(np.uint32)
            kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(kept.copy(), tensor.name))
    x = np.random.default_rng(5).standard_normal((3, 4, 64)).astype(np.float32)
    answers = [
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for data in (rounded.SerializeToString(), (result.bundle / "model.onnx").read_bytes())
    ]
    np.testing.assert_array_equal(*answers)


def test_float16_that_another_core_computes_in_is_estimated_with_its_arithmetic(tmp_path):
    source, data = cnn(tmp_path / "c.onnx"), images(tmp_path / "d.npz")
    result = compiled(source, tmp_path, "raspberry-pi-5", "fp16", calib=data)
    assert read_manifest(result.bundle).precision.form == "fp16"
    (note,) = (note for note in result.notes if "float32 arithmetic and Casts" in note)
    assert "raspberry-pi-5 adds in float16" in note
    assert "samples with its arithmetic emulated" in note
    assert result.evidence == "modelled"
    assert note in result.plan.notes


def test_a_limit_that_only_holds_in_float32_arithmetic_is_doubted(tmp_path):
    source, data = cnn(tmp_path / "c.onnx"), images(tmp_path / "d.npz")
    result = compiled(
        source,
        tmp_path,
        "raspberry-pi-5",
        "fp16",
        calib=data,
        max_drift=(DriftLimit(metric="l2", limit=7e-4),),
    )
    there = [note for note in result.notes if "beyond the limit" in note]
    assert result.drift.l2 <= 7e-4
    assert len(there) == 1


def test_float16_is_storage_on_cores_without_it(tmp_path):
    source, data = cnn(tmp_path / "c.onnx"), images(tmp_path / "d.npz")
    result = compiled(source, tmp_path, "raspberry-pi-4", "fp16", calib=data)
    assert result.plan.precision == "fp16-storage"
    assert not any("emulated" in note for note in result.notes)


def test_a_storage_plan_gives_way_to_the_drift_limit_and_is_replayed(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    first = compiled(
        source,
        tmp_path,
        "raspberry-pi-4",
        "bf16",
        calib=data,
        max_drift=(DriftLimit(metric="l2", limit=2e-3),),
    )
    forms = {item.weight: item.form for item in first.plan.decisions}
    assert set(forms.values()) == {"float", "bf16-storage"}
    assert first.drift.l2 <= 2e-3
    replay = read_recipe(first.bundle / "recipe.toml")
    again = compile_model(
        source, target="raspberry-pi-4", output=tmp_path / "again", recipe=replay, calib=data
    )
    assert {item.weight: item.form for item in again.plan.decisions} == forms
    assert (again.bundle / "model.onnx").read_bytes() == (first.bundle / "model.onnx").read_bytes()


def test_a_target_without_vnni_is_told_that_nothing_saturates(tmp_path):
    source, data = cnn(tmp_path / "c.onnx"), images(tmp_path / "d.npz")
    loose = (DriftLimit(metric="l2", limit=0.5),)
    safe = compiled(
        source, tmp_path, "x86-64-avx2", "int8", calib=data, max_drift=loose, allow_unmeasured=True
    )
    assert any("no pair of products can saturate on x86-64-avx2" in note for note in safe.plan.notes)
    other = compiled(source, tmp_path, "x86-64-avx512-vnni", "int8", calib=data, out="vnni", max_drift=loose)
    assert not any("saturate" in note for note in other.plan.notes)
    there = compile_model(
        other.bundle / "model.onnx",
        target="x86-64-avx2",
        recipe=Recipe(target="x86-64-avx2", data_free=True),
        dry_run=True,
    )
    assert any("layers can saturate on x86-64-avx2" in note for note in there.plan.notes)
