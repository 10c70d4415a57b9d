"""The compile loop: from a model to a bundle, with its limits held and nothing left behind."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from driver_case import cnn, images, mlp, vectors
from edgepress import load
from edgepress.compress.recipe import DriftLimit, Recipe, read_recipe
from edgepress.driver import candidate as candidate_module
from edgepress.driver import compile as compile_module
from edgepress.driver.compile import compile_model
from edgepress.driver.reporter import SilentReporter
from edgepress.export.verify import verify_bundle
from edgepress.graph.errors import DataError, DriftExceeded, NotSupported, OutputError, RecipeError
from edgepress.graph.passes import Outcome, Pass
from edgepress.runtimes.timing import BenchmarkResult, Comparison

QUICK = ("benchmark",)


def recipe(target="raspberry-pi-5", **fields):
    fields.setdefault("skip", QUICK)
    fields.setdefault("measure_seconds", 0)
    return Recipe(target=target, **fields)


class Heard(SilentReporter):
    def __init__(self):
        self.warnings, self.notes = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


def compiled(model, tmp_path, *, target="raspberry-pi-5", out="bundle", **arguments):
    asked = arguments.pop("recipe", None) or recipe(target)
    return compile_model(model, target=target, output=tmp_path / out, recipe=asked, **arguments)


def operators(bundle):
    return [node.op_type for node in onnx.load(bundle / "model.onnx").graph.node]


def test_transformer_like_model_becomes_dynamic_int8(tmp_path):
    source = mlp(tmp_path / "m.onnx", width=128)
    data = vectors(tmp_path / "d.npz", width=128)
    result = compiled(source, tmp_path, calib=data)

    assert result.plan.quantization == "dynamic"
    assert operators(result.bundle).count("MatMulInteger") == 3
    assert result.sizes.bundle_model_bytes < 0.3 * result.sizes.source_bytes
    assert result.drift.cosine < 0.01
    assert result.drift.data_split == "evaluate"
    verify_bundle(result.bundle)
    x = np.random.default_rng(9).standard_normal((2, 5, 128)).astype(np.float32)
    expected = ort.InferenceSession(source).run(None, {"x": x})[0]
    with load(result.bundle) as model:
        answer = model(x=x)["y"]
    assert answer.shape == expected.shape
    assert np.linalg.norm(answer - expected) < 0.05 * np.linalg.norm(expected)


def test_convolutions_become_static_int8_with_integer_kernels(tmp_path):
    result = compiled(
        cnn(tmp_path / "c.onnx"),
        tmp_path,
        calib=images(tmp_path / "d.npz"),
        recipe=recipe(max_drift=(DriftLimit(metric="l2", limit=0.2),)),
    )
    forms = {item.node: item.form for item in result.plan.decisions}
    assert forms["first"] == forms["second"] == forms["residual"] == "static"
    assert forms["head"] == "float"
    assert result.evidence == "modelled"
    stored = {tensor.name: tensor for tensor in onnx.load(result.bundle / "model.onnx").graph.initializer}
    assert stored["second.weight.int8"].data_type == onnx.TensorProto.INT8


def test_recipe_of_a_bundle_replays_it_byte_by_byte_without_ranking(tmp_path, monkeypatch):
    source, data = mlp(tmp_path / "m.onnx", outlier_layer=1), vectors(tmp_path / "d.npz")
    limits = (DriftLimit(metric="l2", limit=0.03),)
    asked = recipe(max_drift=limits, fusions={"migrate-outliers": False})
    first = compiled(source, tmp_path, calib=data, recipe=asked)
    assert first.recipe.pins.reverted

    def refuse(*_arguments, **_options):
        raise AssertionError("a replay ranks nothing")

    monkeypatch.setattr("edgepress.driver.budget.rank_groups", refuse)
    again = compiled(
        source, tmp_path, calib=data, out="again", recipe=read_recipe(first.bundle / "recipe.toml")
    )
    for name in ("model.onnx", "recipe.toml", "plan.json", "manifest.json"):
        same = (first.bundle / name).read_bytes() == (again.bundle / name).read_bytes()
        assert same or name == "plan.json", name  # the reasons tell how a choice was made


def test_only_the_bad_layer_goes_back_to_float(tmp_path):
    heard = Heard()
    result = compiled(
        mlp(tmp_path / "m.onnx", outlier_layer=1),
        tmp_path,
        calib=vectors(tmp_path / "d.npz"),
        # Left on, the outlier channel is migrated into the weights and no layer is bad any more.
        recipe=recipe(max_drift=(DriftLimit(metric="l2", limit=0.03),), fusions={"migrate-outliers": False}),
        reporter=heard,
    )
    forms = {item.node: item.form for item in result.plan.decisions if item.op == "MatMul"}
    # This core computes in float16 where it is not INT8.
    assert forms == {"matmul0": "dynamic", "matmul1": "fp16", "matmul2": "dynamic"}
    assert result.drift.l2 <= 0.03
    assert any("drift limit" in note for note in heard.notes)
    assert "drift limit" in next(item.reason for item in result.plan.decisions if item.node == "matmul1")


def test_limit_that_even_float_breaks_leaves_no_bundle(tmp_path):
    # Folding the batch normalization moves the result by float noise, which is over this limit.
    source = cnn(tmp_path / "m.onnx", batch_norm=True)
    with pytest.raises(DriftExceeded) as caught:
        compiled(
            source,
            tmp_path,
            calib=images(tmp_path / "d.npz"),
            recipe=recipe(max_drift=(DriftLimit(metric="l2", limit=1e-12),)),
        )
    assert caught.value.exit_code == 3
    assert "first" in caught.value.where or "second" in caught.value.where
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.npz", "m.onnx"]


def fake_timing(*ratios):
    """Timings with these ratios in turn; the last one stays."""
    left = list(ratios)

    def timed(*_arguments, **_options):
        ratio = left.pop(0) if len(left) > 1 else left[0]
        comparison = Comparison(
            baseline="before", candidate="after", ratio=ratio, pair_ratios=(ratio,), low=ratio, high=ratio
        )
        return BenchmarkResult(timings=(), comparisons=(comparison,), pairs=1, runs_per_pair=1)

    return timed


def test_float_form_that_is_slower_leaves_the_graph_that_went_in(tmp_path, monkeypatch):
    monkeypatch.setattr("edgepress.driver.measuring.stages.time_against_baseline", fake_timing(0.5, 0.9, 1.0))
    source, data = cnn(tmp_path / "m.onnx", batch_norm=True), images(tmp_path / "d.npz")
    heard = Heard()
    asked = recipe("host", skip=(), max_drift=(DriftLimit(metric="l2", limit=0.5),))
    result = compiled(source, tmp_path, target="host", calib=data, recipe=asked, reporter=heard)
    assert result.recipe.pins.rolled_back == ("int8", "fusions")
    assert operators(result.bundle) == [node.op_type for node in onnx.load(source).graph.node]
    assert result.drift.l2 == 0.0
    assert [warning.split(" runs at ")[0] for warning in heard.warnings if " runs at " in warning] == [
        "INT8",
        "the cleaned and fused float form",
    ]
    replayed = compiled(source, tmp_path, target="host", out="again", calib=data, recipe=result.recipe)
    assert (replayed.bundle / "model.onnx").read_bytes() == (result.bundle / "model.onnx").read_bytes()


def test_other_data_than_the_pinned_is_told(tmp_path):
    source = cnn(tmp_path / "c.onnx")
    asked = recipe(max_drift=(DriftLimit(metric="l2", limit=0.5),))
    first = compiled(source, tmp_path, calib=images(tmp_path / "d.npz"), recipe=asked)
    heard = Heard()
    other = images(tmp_path / "other.npz", seed=99)
    compiled(source, tmp_path, out="again", calib=other, recipe=first.recipe, reporter=heard)
    assert any("other calibration data" in warning for warning in heard.warnings)
    assert any("other ranges" in warning for warning in heard.warnings)


def test_golden_samples_of_data_need_data(tmp_path):
    asked = recipe(golden="data", skip=("drift", "benchmark"))
    with pytest.raises(DataError, match="golden"):
        compiled(mlp(tmp_path / "m.onnx"), tmp_path, recipe=asked)
    assert not (tmp_path / "bundle").exists()


def test_slower_int8_is_rolled_back_on_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr("edgepress.driver.measuring.stages.time_against_baseline", fake_timing(0.5, 1.0))
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    heard = Heard()
    result = compiled(
        source, tmp_path, target="host", calib=data, recipe=recipe("host", skip=()), reporter=heard
    )
    assert result.plan.groups == ()
    assert result.recipe.pins.rolled_back == ("int8",)
    assert any("rolled back" in warning for warning in heard.warnings)
    assert "MatMulInteger" not in operators(result.bundle)
    assert result.drift.l2 < 1e-5

    replayed = compiled(source, tmp_path, target="host", out="again", calib=data, recipe=result.recipe)
    assert (replayed.bundle / "model.onnx").read_bytes() == (result.bundle / "model.onnx").read_bytes()


def test_slower_int8_stays_when_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("edgepress.driver.measuring.stages.time_against_baseline", fake_timing(0.5))
    heard = Heard()
    result = compiled(
        mlp(tmp_path / "m.onnx"),
        tmp_path,
        target="host",
        calib=vectors(tmp_path / "d.npz"),
        recipe=recipe("host", skip=(), precision="int8"),
        reporter=heard,
    )
    assert len(result.plan.groups) == 3
    assert any("kept" in warning for warning in heard.warnings)


def test_timings_elsewhere_roll_nothing_back(tmp_path, monkeypatch):
    monkeypatch.setattr("edgepress.driver.measuring.stages.time_against_baseline", fake_timing(0.5))
    result = compiled(
        mlp(tmp_path / "m.onnx"), tmp_path, calib=vectors(tmp_path / "d.npz"), recipe=recipe(skip=())
    )
    assert result.recipe.pins.rolled_back == ()
    assert len(result.plan.groups) == 3


def test_pins_of_another_model_are_refused(tmp_path):
    data = vectors(tmp_path / "d.npz")
    first = compiled(mlp(tmp_path / "m.onnx"), tmp_path, calib=data)
    other = mlp(tmp_path / "other.onnx", outlier_layer=0)
    with pytest.raises(RecipeError, match="another model"):
        compiled(other, tmp_path, out="again", calib=data, recipe=first.recipe)


def test_dry_run_plans_and_writes_nothing(tmp_path):
    result = compile_model(
        mlp(tmp_path / "m.onnx"),
        target="host",
        output=tmp_path / "bundle",
        dry_run=True,
        calib=vectors(tmp_path / "d.npz"),
    )
    assert result.bundle is None
    assert {item.form for item in result.plan.decisions} == {"dynamic"}
    assert not (tmp_path / "bundle").exists()


def test_data_free_stamps_every_figure(tmp_path):
    result = compiled(
        cnn(tmp_path / "c.onnx"),
        tmp_path,
        recipe=recipe(data_free=True, max_drift=(DriftLimit(metric="l2", limit=0.5),)),
    )
    assert result.stamps == ("data-free",)
    assert result.drift.data_origin == "generated"
    manifest = json.loads((result.bundle / "manifest.json").read_bytes())
    assert manifest["stamps"] == ["data-free"]
    assert {record["origin"] for record in manifest["data"]} == {"generated"}


def test_no_data_is_an_error_unless_drift_is_skipped(tmp_path):
    source = mlp(tmp_path / "m.onnx")
    with pytest.raises(DataError, match="no data") as caught:
        compiled(source, tmp_path)
    assert "--data-free" in caught.value.remedy
    result = compiled(source, tmp_path, recipe=recipe(skip=("drift", "benchmark", "golden")))
    assert result.drift is None
    assert result.plan.quantization == "dynamic"
    assert not (result.bundle / "golden").exists()


def test_static_without_calibration_data_stays_float_and_says_what_to_do(tmp_path):
    result = compiled(
        cnn(tmp_path / "c.onnx"),
        tmp_path,
        eval_data=images(tmp_path / "d.npz"),
    )
    first = next(item for item in result.plan.decisions if item.node == "first")
    assert first.form == "float"
    assert "--calib" in first.remedy


def test_calibration_and_evaluation_data_are_made_disjoint(tmp_path):
    data = images(tmp_path / "d.npz", samples=12)
    more = images(tmp_path / "more.npz", samples=20)  # the same generator: begins with the same images
    result = compiled(
        cnn(tmp_path / "c.onnx"),
        tmp_path,
        calib=more,
        eval_data=data,
        recipe=recipe(max_drift=(DriftLimit(metric="l2", limit=0.5),)),
    )
    records = json.loads((result.bundle / "manifest.json").read_bytes())["data"]
    assert [(record["split"], record["samples"]) for record in records] == [
        ("calibrate", 8),
        ("evaluate", 12),
    ]


def test_labels_make_accuracy_the_metric(tmp_path):
    result = compiled(
        cnn(tmp_path / "c.onnx"),
        tmp_path,
        calib=images(tmp_path / "d.npz", labels=True),
        recipe=recipe(max_drift=(DriftLimit(limit=0.5),)),
    )
    assert result.drift.task_metrics[0].name == "accuracy"


def test_bfloat16_arithmetic_is_refused_where_no_kernel_has_it(tmp_path):
    with pytest.raises(NotSupported, match="does not compute in bfloat16"):
        compiled(mlp(tmp_path / "m.onnx"), tmp_path, recipe=recipe(precision="bf16-compute"))


def test_quantized_input_is_left_alone_or_refused(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    once = compiled(source, tmp_path, calib=data).bundle / "model.onnx"
    again = compiled(once, tmp_path, out="again", calib=data)
    assert "quantized already" in " ".join(again.notes)
    assert operators(again.bundle).count("MatMulInteger") == 3
    with pytest.raises(NotSupported, match="quantized already"):
        compiled(once, tmp_path, out="third", calib=data, recipe=recipe(precision="int8"))


def test_existing_output_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious").write_text("mine")
    monkeypatch.setattr(compile_module, "load_source", lambda *_a, **_k: pytest.fail("work was begun"))
    with pytest.raises(OutputError):
        compiled(mlp(tmp_path / "m.onnx"), tmp_path, calib=vectors(tmp_path / "d.npz"), overwrite=True)
    assert (tmp_path / "bundle" / "precious").read_text() == "mine"


class Spoil(Pass):
    """A pass with a bug: it changes the results."""

    def run(self, model):
        outcome = Outcome()
        for node in model.graph:
            if node.op_type == "Relu":
                node.op_type = "Neg"
                outcome.count("spoiled")
        return outcome


def test_stage_that_changes_results_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(candidate_module, "exact_cleanup", lambda: [Spoil()])
    heard = Heard()
    result = compiled(mlp(tmp_path / "m.onnx"), tmp_path, calib=vectors(tmp_path / "d.npz"), reporter=heard)
    assert any("clean-up changed the results" in warning for warning in heard.warnings)
    assert result.drift.cosine < 0.01
    assert "Neg" not in operators(result.bundle)


def test_temporary_files_are_gone_also_after_an_interrupt(tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("edgepress.driver.limit_stage.hold", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiled(mlp(tmp_path / "m.onnx"), tmp_path, calib=vectors(tmp_path / "d.npz"))
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "bundle").exists()


SCRIPT = """
import sys
from edgepress import compile_model
from edgepress.compress.recipe import Recipe
model, data, out = sys.argv[1:]
compile_model(model, target="raspberry-pi-4", calib=data, output=out,
              recipe=Recipe(target="raspberry-pi-4", skip=("benchmark",)))
"""


def test_two_processes_write_identical_bundles(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    for seed, out in (("0", "one"), ("4711", "two")):
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(source), data, str(tmp_path / out)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
    sums = [(tmp_path / out / "SHA256SUMS").read_bytes() for out in ("one", "two")]
    assert sums[0] == sums[1]


def test_result_serialises(tmp_path):
    result = compiled(mlp(tmp_path / "m.onnx"), tmp_path, calib=vectors(tmp_path / "d.npz"))
    decoded = json.loads(msgspec.json.encode(result, enc_hook=str))
    assert decoded["target"] == "raspberry-pi-5"
    assert Path(decoded["bundle"]).name == "bundle"
