"""What was measured on the way: from the compile through the bundle to what inspect prints."""

from __future__ import annotations

import io
import json
from argparse import Namespace

import msgspec
import numpy as np
import pytest
from driver_case import cnn, images, mlp, vectors
from edgepress.compress.drift_limit import DriftLimit
from edgepress.compress.recipe import Recipe
from edgepress.driver import budget as budget_module
from edgepress.driver.candidate import build
from edgepress.driver.cli import main
from edgepress.driver.compile import compile_model
from edgepress.driver.inspect_command import run as inspect
from edgepress.driver.output import json_text, render
from edgepress.driver.pareto import ParetoPoint, ParetoTable, pareto_blocks, read_pareto
from edgepress.driver.reporter import SilentReporter
from edgepress.driver.summary import document_of, summary_blocks
from edgepress.export.verify import verify_bundle
from edgepress.graph.errors import DriftExceeded, ModelError, RecipeError


def asked(limit, metric="l2", **fields):
    defaults = {"skip": ("benchmark",), "fusions": {"migrate-outliers": False}, "precision": "int8"}
    return Recipe(target="any", max_drift=(DriftLimit(metric=metric, limit=limit),), **(defaults | fields))


def compiled(tmp_path, source, calib, recipe, output="out"):
    return compile_model(
        source, target="x86-64-avx512-vnni", calib=calib, output=tmp_path / output, recipe=recipe
    )


@pytest.fixture
def bad_layer(tmp_path):
    return compiled(
        tmp_path, mlp(tmp_path / "m.onnx", outlier_layer=1), vectors(tmp_path / "d.npz"), asked(0.03)
    )


def test_the_bad_layer_alone_is_kept_in_float_after_two_measurements(bad_layer):
    table = bad_layer.pareto
    assert [point.name for point in table.points] == ["as planned", "1 groups in float"]
    first, second = table.points
    assert (first.met, second.met) == (False, True)
    assert first.drift["l2"] > 10 * second.drift["l2"]
    assert second.groups_in_float == bad_layer.recipe.pins.reverted
    assert {item.node for item in bad_layer.plan.decisions if item.form == "float"} == {"matmul1"}
    assert (first.chosen, second.chosen) == (False, True)
    assert first.model_bytes < second.model_bytes
    assert table.sensitivities.groups[0].group == second.groups_in_float[0]
    assert second.drift["l2"] == bad_layer.drift.l2


def test_the_table_is_kept_in_the_bundle_and_printed(bad_layer):
    verify_bundle(bad_layer.bundle)
    answer = inspect(Namespace(model_or_bundle=str(bad_layer.bundle)), SilentReporter())
    document = json.loads(json_text(answer.document))
    assert msgspec.convert(document["bundle"]["pareto"], ParetoTable) == bad_layer.pareto
    told, short = render(answer.blocks, io.StringIO()), render(summary_blocks(bad_layer), io.StringIO())
    for text in (told, short):
        assert "Measured on the way" in text
        assert "1 groups in float" in text
    assert "Drift that each group causes alone" in told
    assert "Drift that each group causes alone" not in short
    assert json.loads(json_text(document_of(bad_layer)))["pareto"] == document["bundle"]["pareto"]


def test_a_bundle_that_held_at_once_says_so_in_one_line(tmp_path):
    result = compiled(tmp_path, mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz"), asked(0.5))
    (point,) = result.pareto.points
    assert (point.name, point.chosen, point.best, point.groups_in_float) == ("as planned", True, True, ())
    assert result.pareto.sensitivities is None
    assert pareto_blocks(result.pareto, whole=False) == []


def test_a_damaged_table_is_the_bundles_fault():
    with pytest.raises(ModelError, match="measured plans"):
        read_pareto({"points": 3}, "runs/pareto.json")


def test_an_impossible_limit_names_the_best_found_and_the_ranking(tmp_path):
    source, data = cnn(tmp_path / "m.onnx", batch_norm=True), images(tmp_path / "d.npz")
    with pytest.raises(DriftExceeded) as caught:
        compiled(tmp_path, source, data, asked(1e-12))
    assert caught.value.exit_code == 3
    assert "first" in caught.value.where
    assert "with the drift of each alone" in caught.value.where
    assert "The best found has" in caught.value.why
    assert not (tmp_path / "out").exists()


def test_groups_that_cannot_be_cut_out_are_built_and_run_alone(tmp_path, monkeypatch):
    import dataclasses

    def without_source(*arguments, **options):
        return dataclasses.replace(build(*arguments, **options), prepared=None)

    monkeypatch.setattr("edgepress.driver.build_stage.build", without_source)
    cut = []
    monkeypatch.setattr(budget_module, "measure_sensitivity", lambda *_, **__: cut.append(1))
    result = compiled(
        tmp_path, mlp(tmp_path / "m.onnx", outlier_layer=1), vectors(tmp_path / "d.npz"), asked(0.03)
    )
    assert {item.node for item in result.plan.decisions if item.form == "float"} == {"matmul1"}
    assert cut == []
    assert result.pareto.sensitivities is None


def test_a_limit_on_the_users_own_metric_is_held(tmp_path, monkeypatch):
    (tmp_path / "own_limit_metric.py").write_text(
        "import numpy as np\ncalls = []\ndef closeness(outputs, labels):\n"
        "    calls.append(outputs['y'].shape)\n    return float(np.abs(outputs['y']).mean())\n"
    )
    monkeypatch.chdir(tmp_path)
    result = compiled(
        tmp_path,
        mlp(tmp_path / "m.onnx"),
        vectors(tmp_path / "d.npz"),
        asked(0.05, metric="own_limit_metric:closeness"),
    )
    assert "own_limit_metric:closeness" in result.pareto.points[0].drift
    assert result.drift.task_metrics[-1].name == "own_limit_metric:closeness"
    assert result.recipe.max_drift[0].metric == "own_limit_metric:closeness"


def test_a_metric_that_cannot_be_imported_is_told_before_any_work(tmp_path):
    with pytest.raises(RecipeError, match="cannot be imported"):
        compiled(tmp_path, tmp_path / "no model.onnx", None, asked(0.1, metric="no_such_module_here:f"))
    argv = ["drift", "a.onnx", "b.onnx", "--data", "c.npz", "--max-drift", "no_such_module_here:f=1%"]
    assert main(argv) == 2


def point(name, l2, size, latency=None, quantized=1):
    return ParetoPoint(
        name=name,
        quantized_groups=quantized,
        drift={"l2": l2},
        met=True,
        model_bytes=size,
        latency_ms=latency,
    )


def test_points_that_another_beats_everywhere_are_not_best(tmp_path):
    from edgepress.driver.pareto import ParetoLog

    log = ParetoLog()
    for place, entry in enumerate(
        [
            point("close", 0.1, 100, 5.0),
            point("worse in all", 0.2, 110, 6.0),
            point("smaller", 0.3, 50, 9.0),
            point("not timed, keeps more quantized", 0.15, 120, quantized=2),
            point("infinite", None, 40),
        ]
    ):
        log.points[tmp_path / str(place)] = entry
    chosen = Namespace(file=tmp_path / "2")
    found = {item.name: item for item in log.table(chosen).points}
    assert [name for name, item in found.items() if item.chosen] == ["smaller"]
    assert [name for name, item in found.items() if item.best] == [
        "close", "smaller", "not timed, keeps more quantized", "infinite",
    ]  # fmt: skip


def test_latencies_are_added_to_what_was_measured(bad_layer, tmp_path):
    result = compiled(
        tmp_path,
        tmp_path / "m.onnx",
        str(tmp_path / "d.npz"),
        asked(0.03, skip=(), benchmark_rounds=1),
        "timed",
    )
    chosen = next(item for item in result.pareto.points if item.chosen)
    assert chosen.latency_ms == result.benchmark.timings[1].p50_ms
    assert chosen.speedup == result.benchmark.comparisons[0].ratio
    same = [(item.name, item.drift) for item in bad_layer.pareto.points]
    assert [(item.name, item.drift) for item in result.pareto.points] == same
    assert np.isfinite(chosen.speedup)


def test_a_limit_inside_its_interval_is_told_at_the_end(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    loose = compiled(tmp_path, source, data, asked(0.5))
    low, high = loose.drift.l2_interval
    assert low < loose.drift.l2 < high
    tight = compiled(tmp_path, source, data, asked((loose.drift.l2 + high) / 2), "tight")
    told, silent = (render(summary_blocks(result), io.StringIO()) for result in (tight, loose))
    assert "More samples may decide otherwise" in " ".join(told.split())
    assert "More samples" not in silent
    assert [item.straddles for item in tight.pareto.points] == [True]
    assert tight.recipe.pins.reverted == ()
