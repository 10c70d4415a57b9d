"""Pruning inside a compile: what was asked is cut, goals are reached or refused, a replay cuts the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from driver_case import cnn, images, mlp, vectors
from edgepress.compress.recipe import DriftLimit, Recipe, read_recipe
from edgepress.driver.compile import compile_model
from edgepress.driver.options import parse_arguments, recipe_from
from edgepress.export.verify import verify_bundle
from edgepress.graph.errors import CheckFailed, DriftExceeded, NotSupported, RecipeError
from edgepress.runtimes.timing import BenchmarkResult, Comparison
from test_driver_compile import Heard


def recipe(target="raspberry-pi-5", **fields):
    fields = {"skip": ("benchmark",), "measure_seconds": 0, "max_drift": (), **fields}
    return Recipe(target=target, **fields)


def compiled(model, tmp_path, asked, out="bundle", **arguments):
    return compile_model(model, target=asked.target, output=tmp_path / out, recipe=asked, **arguments)


def test_the_asked_part_is_cut_and_the_rest_quantized(tmp_path):
    source = mlp(tmp_path / "m.onnx")
    data = vectors(tmp_path / "d.npz", samples=60)
    result = compiled(source, tmp_path, recipe(prune=0.4), calib=data)
    pruning = result.plan.pruning
    assert pruning.macs_after <= 0.6 * pruning.macs_before
    assert result.plan.quantization == "dynamic"
    verify_bundle(result.bundle)
    proto = onnx.load(result.bundle / "model.onnx")
    assert [dim.dim_param or dim.dim_value for dim in proto.graph.output[0].type.tensor_type.shape.dim][
        -1
    ] == 64
    assert pruning.drift["l2"] <= result.drift.l2 * 1.5
    assert pruning.repaired
    assert any("fewer multiply-accumulates" in note for note in result.notes)
    assert pruning.kept


def test_pruning_alone_stays_in_float(tmp_path):
    source = cnn(tmp_path / "c.onnx")
    asked = recipe(prune=0.3, precision="fp32")
    result = compiled(source, tmp_path, asked, calib=images(tmp_path / "d.npz"))
    assert result.plan.precision == "fp32"
    assert result.sizes.bundle_model_bytes < result.sizes.source_bytes


def test_a_replay_cuts_the_same_without_ranking(tmp_path, monkeypatch):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", samples=60)
    first = compiled(source, tmp_path, recipe(prune=0.4), calib=data)
    assert first.recipe.pins.pruned

    def refuse(*_arguments, **_options):
        raise AssertionError("a replay ranks nothing")

    monkeypatch.setattr("edgepress.driver.prune_stage.open_pruner", refuse)
    again = compiled(source, tmp_path, read_recipe(first.bundle / "recipe.toml"), out="again", calib=data)
    assert (first.bundle / "model.onnx").read_bytes() == (again.bundle / "model.onnx").read_bytes()
    assert (first.bundle / "recipe.toml").read_bytes() == (again.bundle / "recipe.toml").read_bytes()


def test_a_size_is_reached_by_cutting(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", samples=60)
    plain = compiled(source, tmp_path, recipe(precision="fp32"), calib=data, out="plain")
    goal = int(0.7 * plain.sizes.bundle_model_bytes)
    result = compiled(source, tmp_path, recipe(precision="fp32", max_size_bytes=goal), calib=data)
    assert result.sizes.bundle_model_bytes <= goal
    assert result.plan.pruning is not None
    assert any("it was cut" in note for note in result.notes)


def test_nothing_is_cut_for_a_size_that_is_met(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", samples=60)
    result = compiled(source, tmp_path, recipe(max_size_bytes=10**6), calib=data)
    assert result.plan.pruning is None
    assert result.recipe.pins.pruned == {}


def test_a_size_out_of_reach_is_refused_and_leaves_nothing(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", samples=60)
    with pytest.raises(CheckFailed, match="cannot be cut so far") as caught:
        compiled(source, tmp_path, recipe(precision="fp32", max_size_bytes=1000), calib=data)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "bundle").exists()


def timings(ratios):
    """Stands for timing: these speed-ups in turn, the last one stays."""
    left = list(ratios)

    def timed(*_arguments, **_options):
        ratio = left.pop(0) if len(left) > 1 else left[0]
        comparison = Comparison(
            baseline="before", candidate="after", ratio=ratio, pair_ratios=(ratio,), low=ratio, high=ratio
        )
        return BenchmarkResult(timings=(), comparisons=(comparison,), pairs=1, runs_per_pair=1)

    return timed


class Milliseconds:
    """Stands for `WidthTimes`: the multiply-accumulates of the model."""

    def __init__(self, pruner, _sizes, **_options):
        self.pruner = pruner
        self.total, self.of_group = pruner.macs.total, pruner.macs.of_group


def test_a_speed_is_reached_by_cutting_until_it_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("edgepress.driver.measuring.stages.time_against_baseline", timings([1.1, 1.3, 1.7]))
    monkeypatch.setattr("edgepress.driver.prune_stage.WidthTimes", Milliseconds)
    monkeypatch.setattr("edgepress.driver.prune_stage.PruneStages.baseline_ms", lambda _self: 1.0)
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", samples=60)
    asked = recipe("host", min_speedup=1.5, skip=("golden",), precision="fp32")
    result = compiled(source, tmp_path, asked, calib=data)
    pruning = result.plan.pruning
    assert pruning.macs_after < pruning.macs_before * 1.1 / 1.5
    assert result.benchmark.comparisons[0].ratio == 1.7


def test_a_speed_that_no_cut_reaches_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("edgepress.driver.measuring.stages.time_against_baseline", timings([1.4]))
    monkeypatch.setattr("edgepress.driver.prune_stage.WidthTimes", Milliseconds)
    monkeypatch.setattr("edgepress.driver.prune_stage.PruneStages.baseline_ms", lambda _self: 1.0)
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", samples=60)
    asked = recipe("host", min_speedup=1.5, skip=("golden",), precision="fp32")
    with pytest.raises(CheckFailed, match=r"not 1\.5x") as caught:
        compiled(source, tmp_path, asked, calib=data)
    assert "after 4 cuts" in caught.value.why


def test_a_speed_elsewhere_is_predicted_and_said_so(tmp_path):
    heard = Heard()
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", samples=60)
    result = compiled(source, tmp_path, recipe(min_speedup=1.5), calib=data, reporter=heard)
    assert result.plan.pruning.macs_after <= result.plan.pruning.macs_before / 1.5
    assert any("predicted" in text for text in heard.warnings)


def test_a_cut_past_a_given_limit_is_refused(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", samples=60)
    limits = (DriftLimit(metric="l2", limit=1e-4),)
    with pytest.raises(DriftExceeded, match="the cut alone"):
        compiled(source, tmp_path, recipe(prune=0.5, max_drift=limits), calib=data)
    assert not (tmp_path / "bundle").exists()


def test_without_calibration_data_magnitude_ranks_and_a_warning_tells(tmp_path):
    heard = Heard()
    source = mlp(tmp_path / "m.onnx")
    result = compiled(source, tmp_path, recipe(prune=0.3, data_free=True), reporter=heard)
    assert result.plan.pruning.importance == "magnitude"
    assert any("ranked by magnitude" in text for text in heard.warnings)


def test_a_model_of_which_nothing_can_go_is_refused(tmp_path):
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="only")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "m.onnx",
    )
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32))
    with pytest.raises(NotSupported, match="nothing of this model can be cut") as caught:
        compiled(tmp_path / "m.onnx", tmp_path, recipe(prune=0.3), calib=str(tmp_path / "d.npz"))
    assert "output" in caught.value.why


def test_a_calibration_cache_does_not_go_with_pruning(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    with pytest.raises(RecipeError, match="--calib-cache"):
        compiled(source, tmp_path, recipe(prune=0.3), calib=data, calib_cache=tmp_path / "ranges.json")


def options(*words):
    return recipe_from(parse_arguments(["compile", "m.onnx", "--target", "host", *words]))


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (("--prune", "0.5"), "prune", 0.5),
        (("--prune", "50%"), "prune", 0.5),
        (("--prune", "12.5%"), "prune", 0.125),
        (("--min-speedup", "2x"), "min_speedup", 2.0),
        (("--min-speedup", "1.5"), "min_speedup", 1.5),
        (("--max-size", "10MB"), "max_size_bytes", 10_000_000),
    ],
)
def test_options_become_fields_and_lift_the_default_limit(words, field, value):
    asked = options(*words)
    assert getattr(asked, field) == pytest.approx(value)
    assert asked.max_drift == ()
    assert options(*words, "--max-drift", "2%").max_drift == (DriftLimit(limit=0.02),)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--prune", "1.5"), "--prune"),
        (("--prune", "0"), "--prune"),
        (("--prune", "100%"), "--prune"),
        (("--prune", "half"), "--prune"),
        (("--prune", "."), "--prune"),
        (("--min-speedup", "0.5x"), "--min-speedup"),
        (("--min-speedup", "fast"), "--min-speedup"),
        (("--max-size", "big"), "--max-size"),
    ],
)
def test_bad_amounts_are_refused_by_name(words, option):
    with pytest.raises(RecipeError) as caught:
        options(*words)
    assert caught.value.where == option


@pytest.mark.parametrize("fields", [{"prune": 1.0}, {"min_speedup": 1.0}, {"max_size_bytes": 0}])
def test_a_recipe_with_bad_amounts_is_refused(fields):
    with pytest.raises(RecipeError):
        recipe(**fields)


def test_a_speed_cannot_be_held_without_the_benchmark(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    with pytest.raises(RecipeError, match="without the benchmark"):
        compiled(source, tmp_path, recipe("host", min_speedup=2.0), calib=data)


def test_a_dry_run_cuts_nothing_and_says_so(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    result = compile_model(
        source, target="raspberry-pi-5", calib=data, recipe=recipe(prune=0.4), dry_run=True
    )
    assert result.plan.pruning is None
    assert any("dry run cuts nothing" in note for note in result.notes)


def test_a_replay_does_not_fail_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr("edgepress.driver.measuring.stages.time_against_baseline", timings([1.1, 1.7, 1.2]))
    monkeypatch.setattr("edgepress.driver.prune_stage.WidthTimes", Milliseconds)
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", samples=60)
    asked = recipe("host", min_speedup=1.5, skip=("golden",), precision="fp32")
    first = compiled(source, tmp_path, asked, calib=data)
    again = compiled(source, tmp_path, first.recipe, out="again", calib=data)
    assert (first.bundle / "model.onnx").read_bytes() == (again.bundle / "model.onnx").read_bytes()


def test_a_clean_up_that_changes_the_answers_is_not_what_is_cut(tmp_path, monkeypatch):
    from edgepress.driver import prune_stage

    true = prune_stage.difference
    calls = []

    def doubting(model, samples, expected):
        calls.append(model)
        return "made up" if len(calls) == 1 else true(model, samples, expected)

    monkeypatch.setattr(prune_stage, "difference", doubting)
    heard = Heard()
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz", samples=60)
    result = compiled(source, tmp_path, recipe(prune=0.3), calib=data, reporter=heard)
    assert any("clean-up changed the results" in text for text in heard.warnings)
    assert result.plan.pruning.macs_after < result.plan.pruning.macs_before
