"""Conditioning in a compile: closer results, each step switchable and kept only where the error falls."""

import numpy as np
import onnx
import pytest
from driver_case import mlp, vectors
from edgepress.calibration.collect import SPREAD, TYPICAL, collect_channel_limits
from edgepress.calibration.data import open_data
from edgepress.compress.quantize.centre import CentreActivations, moved_limits
from edgepress.compress.recipe import DriftLimit, Recipe
from edgepress.driver import conditioning
from edgepress.driver.compile import compile_model
from edgepress.graph.errors import ModelError
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.runtimes.ort_runtime import OrtSession
from onnx import TensorProto, helper, numpy_helper


def encoder(path, *, width=32, outlier=40.0):
    """x [N, S, width] -> normalization with an outlier channel -> feed-forward with another -> residual."""
    rng = np.random.default_rng(5)
    weights = {
        "gamma": np.where(np.arange(width) == 3, outlier, 1.0),
        "beta": np.where(np.arange(width) == 3, 6 * outlier, 0.1),
        "up": rng.standard_normal((width, 128)) / width,
        "up.bias": np.where(np.arange(128) == 70, outlier / 2, 0.1),
        "down": rng.standard_normal((128, width)) / 11,
        "down.bias": rng.standard_normal(width) / 10,
    }
    weights["up"][3] /= outlier
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], name="norm", axis=-1),
        helper.make_node("MatMul", ["n", "up"], ["p"], name="up"),
        helper.make_node("Add", ["p", "up.bias"], ["u"], name="up_bias"),
        helper.make_node("Gelu", ["u"], ["h"], name="gelu"),
        helper.make_node("MatMul", ["h", "down"], ["d"], name="down"),
        helper.make_node("Add", ["d", "down.bias"], ["e"], name="down_bias"),
        helper.make_node("Add", ["e", "n"], ["y"], name="residual"),
    ]
    shape = ["N", "S", width]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def compiled(source, folder, **fields):
    data = vectors(folder / "d.npz", width=32)
    asked = Recipe(target="raspberry-pi-5", skip=("benchmark", "golden"), **fields)
    return compile_model(source, target=asked.target, calib=data, recipe=asked)


def applied(result):
    return {name for record in result.plan.passes for name in record.applied}


STEPS = ("centre-activations", "migrate-outliers", "split-outliers")


def test_each_step_brings_the_results_closer(tmp_path):
    source = encoder(tmp_path / "m.onnx")
    errors = []
    for count in range(3):
        switches = {name: place < count for place, name in enumerate(STEPS)}
        result = compiled(source, tmp_path, fusions=switches)
        assert applied(result) & set(STEPS) == set(STEPS[:count])
        errors.append(result.drift.l2)
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.6 * errors[0]


def test_a_step_that_does_not_lower_the_error_is_left_out(tmp_path, monkeypatch):
    source = encoder(tmp_path / "m.onnx")
    real = conditioning.choose_outliers

    def harmful(*arguments, **options):
        choice = real(*arguments, **options)
        choice.factors.update({name: 1 / by**2 for name, by in choice.factors.items()})
        return choice

    monkeypatch.setattr(conditioning, "choose_outliers", harmful)
    result = compiled(source, tmp_path)
    assert applied(result) & set(STEPS) == {"centre-activations"}
    (note,) = (note for note in result.notes if note.startswith("migrate-outliers"))
    assert "left out, the error on calibration data is" in note


def test_what_is_not_worth_its_time_is_said(tmp_path):
    result = compiled(encoder(tmp_path / "m.onnx"), tmp_path)
    reasons = [item.reason for item in result.refusals if item.rule == "split-outliers"]
    assert len(reasons) == 1
    assert reasons[0].endswith("more time in its products")


def test_without_data_nothing_is_treated(tmp_path):
    recipe = Recipe(target="raspberry-pi-5", skip=("drift", "benchmark", "golden"))
    result = compile_model(encoder(tmp_path / "m.onnx"), target=recipe.target, recipe=recipe)
    assert not applied(result) & set(STEPS)


def test_a_cache_gives_the_same_form_without_data(tmp_path):
    source, data = encoder(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", width=32)
    recipe = Recipe(target="raspberry-pi-5", skip=("drift", "benchmark", "golden"))
    files = []
    for name, calib in (("a", data), ("b", None)):
        compile_model(
            source,
            target=recipe.target,
            output=tmp_path / name,
            calib=calib,
            calib_cache=tmp_path / "cache.json",
            recipe=recipe,
        )
        files.append((tmp_path / name / "model.onnx").read_bytes())
    assert files[0] == files[1]


def test_float_is_made_of_the_plain_graph(tmp_path):
    recipe = Recipe(target="raspberry-pi-5", precision="fp32", skip=("drift", "benchmark", "golden"))
    data = vectors(tmp_path / "d.npz", width=32)
    result = compile_model(encoder(tmp_path / "m.onnx"), target=recipe.target, calib=data, recipe=recipe)
    assert not applied(result) & set(STEPS)


@pytest.fixture
def observed(tmp_path):
    model = load_model(encoder(tmp_path / "m.onnx"))
    data = open_data(vectors(tmp_path / "d.npz", width=32), model.inputs)
    session = OrtSession.from_model(_showing(model, "n"))
    rows = [session.run(feeds)["n"].reshape(-1, 32) for feeds in data]
    return model, data, rows


def _showing(model, name):
    shown = model.fork()
    shown.graph.outputs.append(next(v for node in shown.graph for v in node.outputs if v.name == name))
    return shown


def test_typical_limits_and_deviations(observed):
    model, data, rows = observed
    found = collect_channel_limits(model, ["n"], data, typical=True)
    assert set(found) == {"n", "n" + TYPICAL, "n" + SPREAD}
    low, high = found["n" + TYPICAL]
    np.testing.assert_allclose(low, np.mean([part.min(axis=0) for part in rows], axis=0), rtol=1e-5)
    np.testing.assert_allclose(high, np.mean([part.max(axis=0) for part in rows], axis=0), rtol=1e-5)
    whole = np.concatenate(rows).astype(np.float64)
    less, more = found["n" + SPREAD]
    np.testing.assert_allclose((less + more) / 2, whole.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose((more - less) / 2, whole.std(axis=0), rtol=1e-3)


def test_a_typical_batch_has_the_limits_of_its_samples(observed):
    model, data, rows = observed
    low, high = collect_channel_limits(model, ["n"], data, typical=True, batch_size=8)["n" + TYPICAL]
    batches = [np.concatenate(rows[start : start + 8]) for start in range(0, len(rows), 8)]
    np.testing.assert_allclose(low, np.mean([part.min(axis=0) for part in batches], axis=0), rtol=1e-4)
    np.testing.assert_allclose(high, np.mean([part.max(axis=0) for part in batches], axis=0), rtol=1e-4)


def test_a_model_that_takes_no_batches_is_looked_at_sample_by_sample(tmp_path, monkeypatch):
    real, sizes = collect_channel_limits, []

    def picky(*arguments, batch_size, **options):
        sizes.append(batch_size)
        if batch_size > 1:
            raise ModelError("onnxruntime cannot run the model")
        return real(*arguments, **options)

    monkeypatch.setattr(conditioning, "collect_channel_limits", picky)
    result = compiled(encoder(tmp_path / "m.onnx"), tmp_path)
    assert sizes == [8, 1]
    assert "centre-activations" in applied(result)


def test_limits_move_with_the_middles(observed):
    model, data, _ = observed
    limits = collect_channel_limits(model, ["n"], data, typical=True)
    after = model.fork()
    run_passes(after, [CentreActivations(limits={"n": limits["n"]})])
    moved = moved_limits(model, after, limits)
    session = OrtSession.from_model(_showing(after, "n"))
    found = np.concatenate([session.run(feeds)["n"].reshape(-1, 32) for feeds in data])
    np.testing.assert_allclose(moved["n"][0], found.min(axis=0), atol=1e-3)
    np.testing.assert_allclose(moved["n"][1], found.max(axis=0), atol=1e-3)
    shift = moved["n"][0] - limits["n"][0]
    for kind in (TYPICAL, SPREAD):
        np.testing.assert_allclose(moved["n" + kind][0] - limits["n" + kind][0], shift, atol=1e-4)


def test_an_injected_bad_layer_is_repaired(tmp_path):
    """The layer that goes back to float for the drift limit computes in integers after all."""
    source, data = mlp(tmp_path / "m.onnx", outlier_layer=1), vectors(tmp_path / "d.npz")
    forms = []
    for on in (False, True):
        limits = (DriftLimit(metric="l2", limit=0.03),)
        switches = {"migrate-outliers": on}
        recipe = Recipe(
            target="raspberry-pi-5", skip=("benchmark", "golden"), max_drift=limits, fusions=switches
        )
        result = compile_model(source, target=recipe.target, calib=data, recipe=recipe)
        forms.append([item.form for item in result.plan.decisions if item.op == "MatMul"])
    # What is not in integers computes in float16 on this core.
    assert forms == [["dynamic", "fp16", "dynamic"], ["dynamic", "dynamic", "dynamic"]]
