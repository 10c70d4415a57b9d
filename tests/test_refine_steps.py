"""Ranges by the error at the outputs, and convolved shortcuts, as steps of a compile."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.recipe import Recipe, read_recipe
from edgepress.compress.refine.entry import FLOAT_ENTRY
from edgepress.compress.refine.equalize import EQUALIZE
from edgepress.compress.refine.learned import LEARNED_ROUNDING
from edgepress.compress.refine.output_ranges import OUTPUT_RANGES
from edgepress.compress.refine.shortcut import SHORTCUT
from edgepress.driver import refining
from edgepress.driver.compile import compile_model
from edgepress.graph.save import save_model
from edgepress.runtimes.timing import BenchmarkResult, Comparison

OTHERS = dict.fromkeys((EQUALIZE, LEARNED_ROUNDING, FLOAT_ENTRY), False)
SAME = "<pads = [1, 1, 1, 1]>"
NET = (
    f"(float[N,4,8,8] x) => (float[N,8,4,4] y) {{ [c1] a = Conv {SAME} (x, w, b) r = Relu(a)"
    " [c2] e = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, k, f) s = Slice(r, start, end, axes, steps)"
    f" [p] q = Pad(s, pads) [add] t = Add(e, q) u = Relu(t) [c3] y = Conv {SAME} (u, l, d) }}"
)
WEIGHTS = {
    **case._conv_weights(w=(8, 4, 3, 3), b=(8,), k=(16, 8, 3, 3), f=(16,), l=(8, 16, 3, 3), d=(8,)),
    "start": np.array([0, 0]),
    "end": np.array([9999, 9999]),
    "axes": np.array([2, 3]),
    "steps": np.array([2, 2]),
    "pads": np.array([0, 4, 0, 0, 0, 4, 0, 0]),
}


@pytest.fixture(autouse=True)
def files(tmp_path):
    save_model(case.parse(NET, WEIGHTS), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=case.random(5, 40, 4, 8, 8))


def compiled(tmp_path, out, recipe=None, **fields):
    asked = recipe or Recipe(
        target="host",
        precision="int8",
        quantization="static",
        skip=("golden",),
        benchmark_rounds=2,
        measure_seconds=0,
        **fields,
    )
    return compile_model(
        tmp_path / "m.onnx", target="host", output=tmp_path / out, recipe=asked, calib=str(tmp_path / "d.npz")
    )


def notes_about(result, name):
    return [note for note in result.notes if note.startswith(name)]


def timed(ratio):
    comparison = Comparison(
        baseline="static", candidate="x", ratio=ratio, pair_ratios=(ratio,), low=ratio, high=ratio
    )
    return lambda *_, **__: BenchmarkResult(timings=(), comparisons=(comparison,), pairs=1, runs_per_pair=1)


@pytest.mark.parametrize(("ratio", "kept"), [(1.03, True), (0.9, False)])
def test_shortcuts_are_convolved_only_where_that_is_no_slower(tmp_path, monkeypatch, ratio, kept):
    monkeypatch.setattr(refining, "time_against_baseline", timed(ratio))
    result = compiled(tmp_path, "a", fusions=OTHERS | {OUTPUT_RANGES: False})
    assert result.recipe.pins.fusions[SHORTCUT] == kept
    assert ("p/shortcut/Conv" in {item.node for item in result.plan.decisions}) == kept
    monkeypatch.setattr(refining, "time_against_baseline", None)  # a replay times nothing
    again = compiled(tmp_path, "b", recipe=read_recipe(result.bundle / "recipe.toml"))
    assert (result.bundle / "model.onnx").read_bytes() == (again.bundle / "model.onnx").read_bytes()


def test_ranges_by_the_outputs_are_kept_only_where_the_error_falls(tmp_path):
    result = compiled(tmp_path, "a", fusions=OTHERS | {SHORTCUT: False})
    (note,) = notes_about(result, OUTPUT_RANGES)
    errors = [float(word) for word in note.replace(",", "").split() if word.startswith("0.")]
    assert ("kept" in note) == (errors[0] < errors[1])


def test_switched_off_they_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(refining, "time_against_baseline", None)
    result = compiled(tmp_path, "a", fusions=OTHERS | {SHORTCUT: False, OUTPUT_RANGES: False})
    assert notes_about(result, OUTPUT_RANGES) == []
    assert not any("shortcut" in item.node for item in result.plan.decisions)
