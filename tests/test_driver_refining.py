"""Static INT8 brought closer in a compile: what is kept is measured, pinned, and can be switched off."""

import numpy as np
import onnx
import pytest
from driver_case import cnn, images
from edgepress.compress.recipe import Recipe, read_recipe
from edgepress.compress.refine.entry import FLOAT_ENTRY
from edgepress.compress.refine.equalize import EQUALIZE
from edgepress.compress.refine.learned import LEARNED_ROUNDING
from edgepress.driver import refining
from edgepress.driver.compile import compile_model
from edgepress.runtimes.timing import BenchmarkResult, Comparison

OFF = dict.fromkeys((EQUALIZE, LEARNED_ROUNDING, FLOAT_ENTRY), False)


def compiled(tmp_path, out, *, target="raspberry-pi-5", recipe=None, **fields):
    fields.setdefault("skip", ("benchmark",))
    asked = recipe or Recipe(target=target, precision="int8", quantization="static", **fields)
    return compile_model(
        tmp_path / "m.onnx", target=target, output=tmp_path / out, recipe=asked, calib=str(tmp_path / "d.npz")
    )


@pytest.fixture(autouse=True)
def files(tmp_path):
    cnn(tmp_path / "m.onnx")
    images(tmp_path / "d.npz")


def notes_about(result, name):
    return [note for note in result.notes if note.startswith(name)]


def test_steps_are_kept_only_where_the_error_falls(tmp_path):
    result = compiled(tmp_path, "a")
    for name in (EQUALIZE, LEARNED_ROUNDING):
        (note,) = notes_about(result, name)
        errors = [float(word) for word in note.replace(",", "").split() if word.startswith("0.")]
        assert ("kept" in note) == (errors[0] < errors[1])
    assert notes_about(result, FLOAT_ENTRY) == []


def test_switched_off_nothing_is_refined_and_the_weights_are_the_nearest(tmp_path):
    result = compiled(tmp_path, "a", fusions=OFF)
    assert not any(notes_about(result, name) for name in OFF)
    model = onnx.load(result.bundle / "model.onnx")
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    source = onnx.load(tmp_path / "m.onnx").graph.initializer
    weight = onnx.numpy_helper.to_array(next(item for item in source if item.name == "second.weight"))
    scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True).astype("f4") / np.float32(127)
    np.testing.assert_array_equal(stored["second.weight.int8"], np.rint(weight / scale).astype(np.int8))


def test_the_recipe_of_a_bundle_replays_what_was_kept(tmp_path):
    first = compiled(tmp_path, "a")
    again = compiled(tmp_path, "b", recipe=read_recipe(first.bundle / "recipe.toml"))
    assert (first.bundle / "model.onnx").read_bytes() == (again.bundle / "model.onnx").read_bytes()


def timed(ratio):
    comparison = Comparison(
        baseline="static", candidate="x", ratio=ratio, pair_ratios=(ratio,), low=ratio, high=ratio
    )
    return lambda *_, **__: BenchmarkResult(timings=(), comparisons=(comparison,), pairs=1, runs_per_pair=1)


@pytest.mark.parametrize(("ratio", "kept"), [(1.05, True), (0.9, False)])
def test_the_first_layer_goes_back_to_float_only_where_that_is_no_slower(tmp_path, monkeypatch, ratio, kept):
    monkeypatch.setattr(refining, "time_against_baseline", timed(ratio))
    # One bright pixel makes the steps of the quantized input coarse.
    x = np.random.default_rng(0).standard_normal((40, 3, 16, 16)).astype("f4")
    x[:, 0, 0, 0] = 40
    np.savez(tmp_path / "d.npz", image=x)
    steps = {EQUALIZE: False, LEARNED_ROUNDING: False}
    result = compiled(
        tmp_path, "a", target="host", fusions=steps, skip=("golden",), benchmark_rounds=2, measure_seconds=0
    )
    form = {item.node: item.form for item in result.plan.decisions}
    assert (form["first"] == "float") == kept
    relays = [node for node in form if node.endswith("/relay/Conv")]
    assert bool(relays) == kept
    if not kept:
        return
    assert result.recipe.pins.fusions[FLOAT_ENTRY]
    monkeypatch.setattr(refining, "time_against_baseline", None)
    again = compiled(tmp_path, "b", target="host", recipe=read_recipe(result.bundle / "recipe.toml"))
    assert (result.bundle / "model.onnx").read_bytes() == (again.bundle / "model.onnx").read_bytes()


def test_with_a_calibration_cache_nothing_needs_the_data(tmp_path):
    asked = Recipe(target="raspberry-pi-5", precision="int8", quantization="static", skip=("benchmark",))
    common = {"target": "raspberry-pi-5", "recipe": asked, "calib_cache": tmp_path / "cache.json"}
    first = compile_model(tmp_path / "m.onnx", output=tmp_path / "a", calib=str(tmp_path / "d.npz"), **common)
    again = compile_model(tmp_path / "m.onnx", output=tmp_path / "b", **common)
    assert any("left out with a calibration cache" in note for note in first.notes)
    assert (first.bundle / "model.onnx").read_bytes() == (again.bundle / "model.onnx").read_bytes()
