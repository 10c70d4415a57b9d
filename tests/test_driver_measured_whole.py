"""Choices by the whole model's time: forms, session options, rolling back in steps, and their pins."""

import json

import compress_case as case
import msgspec
import numpy as np
import pytest
from driver_case import cnn, images, mlp, vectors
from edgepress.compress.choice import Verdict
from edgepress.compress.recipe import DriftLimit, Recipe, parse_recipe, read_recipe, to_toml
from edgepress.driver.compile import compile_model
from edgepress.driver.measuring import stages
from edgepress.driver.measuring.forms import Measured
from edgepress.driver.measuring.local_benchmark import BASELINE, COMPILED, WITHOUT_OPTIONS
from edgepress.driver.measuring.whole_model import (
    IN_FLOAT,
    UNBLOCKED,
    beaten_by,
    between,
    faster_fusions,
    faster_options,
    fastest_graph,
    is_tie,
    is_undecided,
    other_switches,
    pinned_forms,
    renamed,
)
from edgepress.driver.reporter import SilentReporter
from edgepress.runtimes.device import LocalDevice
from edgepress.runtimes.timing import BenchmarkResult, Comparison, Timing
from edgepress.targets.registry import load_target


def timing(**ratios):
    """A result whose candidates have these ratios to the baseline: one, or one per pair."""
    names = {"compiled": COMPILED, "floats": IN_FLOAT, "plain": WITHOUT_OPTIONS, "unblocked": UNBLOCKED}
    comparisons, timings = [], [entry(BASELINE)]
    for key, given in ratios.items():
        pairs = given if isinstance(given, tuple) else (given,) * 3
        timings.append(entry(names[key]))
        comparisons.append(
            Comparison(
                baseline=BASELINE, candidate=names[key], ratio=float(np.median(pairs)), pair_ratios=pairs,
                low=min(pairs), high=max(pairs),
            )
        )  # fmt: skip
    return BenchmarkResult(timings=tuple(timings), comparisons=tuple(comparisons), pairs=3, runs_per_pair=1)


def entry(name):
    return Timing(
        name=name, runs=3, sessions=3, warm_up_runs=0, mean_ms=1, min_ms=1, p50_ms=1, p90_ms=1, p99_ms=1,
        throughput_per_s=1, load_ms=1,
    )  # fmt: skip


def test_forms_are_compared_pair_by_pair():
    result = timing(compiled=(2.0, 4.0, 3.0), floats=(1.0, 1.0, 2.0))
    assert between(result, IN_FLOAT, COMPILED).pair_ratios == (2.0, 4.0, 1.5)
    assert between(result, BASELINE, COMPILED).ratio == 3.0
    assert between(result, COMPILED, "something else") is None


@pytest.mark.parametrize(
    ("ratios", "winner"),
    [
        ({"compiled": 1.5, "floats": 1.0}, None),
        ({"compiled": 0.9}, BASELINE),
        ({"compiled": 0.99}, None),  # inside the margin
        ({"compiled": (0.9, 0.9, 1.01)}, None),  # inside the noise
        ({"compiled": 1.2, "floats": 1.5}, IN_FLOAT),
        ({"compiled": 0.8, "floats": 0.9}, BASELINE),
    ],
)
def test_the_fastest_of_those_that_beat_the_candidate(ratios, winner):
    found = beaten_by(timing(**ratios))
    assert (found and found[0]) == winner


def test_what_is_undecided_is_decided_by_the_median_of_a_longer_look():
    noisy = timing(compiled=(0.9, 0.9, 1.01))
    assert is_undecided(noisy)
    assert beaten_by(noisy, by_median=True)[0] == BASELINE
    assert not is_undecided(timing(compiled=0.9))
    assert not is_undecided(timing(compiled=(0.99, 0.9, 1.01)))


def test_a_tie_is_inside_the_margin():
    assert is_tie(timing(compiled=1.01, floats=1.0))
    assert not is_tie(timing(compiled=1.1, floats=1.0))
    assert not is_tie(timing(compiled=1.0))  # nothing to compare with


def test_session_options_ship_only_where_they_win():
    names = [WITHOUT_OPTIONS]
    assert faster_options(timing(compiled=1.5, plain=1.0), names) == COMPILED
    assert faster_options(timing(compiled=1.51, plain=1.5), names) == WITHOUT_OPTIONS
    assert faster_options(timing(compiled=1.0, unblocked=1.2), [UNBLOCKED]) == UNBLOCKED
    assert faster_options(timing(compiled=1.0, unblocked=1.01), [UNBLOCKED]) == COMPILED


def test_the_options_that_won_become_the_candidate():
    result = renamed(timing(compiled=1.0, plain=0.5, unblocked=1.2), UNBLOCKED, dropped=frozenset())
    assert [item.name for item in result.timings] == [BASELINE, COMPILED, WITHOUT_OPTIONS]
    assert [(item.candidate, item.ratio) for item in result.comparisons] == [
        (COMPILED, 1.2), (WITHOUT_OPTIONS, 0.5),
    ]  # fmt: skip


def test_only_what_differs_from_the_tables_is_pinned():
    verdicts = {
        "a": Verdict(form="float", reason="r"),
        "b": Verdict(form="dynamic", reason="r"),
        "gone": Verdict(form="float", reason="r"),
    }
    assert pinned_forms({"a": "dynamic", "b": "dynamic"}, verdicts) == {"a": "float"}


ATTENTION = """(float[N,S,64] q, float[N,S,64] k, float[N,S,64] v) => (float[N,S,64] y) {
    q1 = Reshape(q, heads) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
    k1 = Reshape(k, heads) k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
    v1 = Reshape(v, heads) v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
    s = MatMul(q2, k2) t = Mul(s, scale) p = Softmax <axis = -1> (t) o = MatMul(p, v2)
    o1 = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape(o1, back) }"""
ATTENTION_W = {
    "heads": np.array([0, 0, 4, 16]), "back": np.array([0, 0, 64]), "scale": np.array(0.25, np.float32),
}  # fmt: skip


def test_switches_that_change_the_graph_are_tried():
    model, profile = case.parse(ATTENTION, ATTENTION_W), load_target(case.X86)
    assert other_switches(model, profile, Recipe(target="host")) == [{"attention": True}]
    assert other_switches(model, profile, Recipe(target="host", fusions={"attention": False})) == []
    plain = case.parse("(float[4] x) => (float[4] y) { y = Relu(x) }")
    assert other_switches(plain, profile, Recipe(target="host")) == []


class Quick(LocalDevice):
    """Looks the speed of each form up."""

    speeds = (1.0, 1.5)

    def time(self, forms, feeds, schedule, *, progress=None):
        real = super().time(forms, feeds, schedule, progress=progress)
        comparisons = [
            msgspec.structs.replace(item, ratio=speed, low=speed, high=speed)
            for item, speed in zip(real.comparisons, self.speeds[1:], strict=True)
        ]
        return msgspec.structs.replace(real, comparisons=tuple(comparisons))


@pytest.mark.parametrize(("speed", "on"), [(1.5, True), (1.01, False), (0.5, False)])
def test_a_fusion_is_turned_on_where_it_is_faster(monkeypatch, speed, on):
    model, fused = case.parse(ATTENTION, ATTENTION_W), case.parse(ATTENTION, ATTENTION_W)
    monkeypatch.setattr(Quick, "speeds", (1.0, speed))
    asked = []

    def prepare_with(recipe):
        asked.append(recipe.fusions)
        return fused, []

    feeds = {name: np.ones((1, 4, 64), np.float32) for name in "qkv"}
    (chosen, _), switches = faster_fusions(
        model, (model, []), load_target(case.X86), Recipe(target="host", measure_seconds=5),
        prepare_with=prepare_with, feeds=lambda: feeds, device=Quick(), reporter=SilentReporter(),
    )  # fmt: skip
    assert asked == [{"attention": True}]
    assert (chosen is fused, switches) == (on, {"attention": on})


def test_fusions_are_not_timed_in_a_hurry():
    model = case.parse(ATTENTION, ATTENTION_W)
    found = faster_fusions(
        model, (model, []), load_target(case.X86), Recipe(target="host", measure_seconds=3),
        prepare_with=lambda _: pytest.fail("no other graph is made"), feeds=dict, device=Quick(),
        reporter=SilentReporter(),
    )  # fmt: skip
    assert found == ((model, []), {})


def test_the_first_graph_stays_unless_another_is_faster():
    text = "(float[64,64] x) => (float[64,64] y) { y = MatMul(x, w) }"
    slow = "(float[64,64] x) => (float[64,64] y) { " + " ".join(
        f"t{place} = MatMul({'x' if place == 0 else f't{place - 1}'}, w)" for place in range(40)
    ) + " y = MatMul(t39, w) }"  # fmt: skip
    small, large = (case.parse(item, {"w": np.eye(64, dtype=np.float32)}) for item in (text, slow))
    feeds = {"x": np.ones((64, 64), np.float32)}
    assert fastest_graph([large, small], feeds, 1, device=LocalDevice(), limit_s=5.0) == 1
    assert fastest_graph([small, large], feeds, 1, device=LocalDevice(), limit_s=5.0) == 0


# --- the whole loop ------------------------------------------------------------------------------

LOOSE = (DriftLimit(metric="l2", limit=0.9),)


def compiled(model, tmp_path, out="bundle", **arguments):
    fields = arguments.pop("fields", {})
    asked = arguments.pop("recipe", None) or Recipe(target="host", max_drift=LOOSE, **fields)
    return compile_model(model, target="host", output=tmp_path / out, recipe=asked, **arguments)


def settled(monkeypatch, verdicts, **more):
    """Let operators be measured with this outcome, and plans not be timed against each other."""
    found = {name: Verdict(form=form, reason="timed here") for name, form in verdicts.items()}
    measured = Measured(verdicts=found, operators=len(found), timed=len(found), **more)
    whole = "edgepress.driver.measuring.whole_model"
    monkeypatch.setattr(f"{whole}.measure_forms", lambda *_a, **_k: measured)
    monkeypatch.setattr(stages, "fastest_plan", lambda *_a, **_k: 0)


def timed_as(monkeypatch, *results):
    """Timings of the whole model in turn; the last one stays. Returns what was asked for."""
    left, asked = list(results), []

    def time(_baseline, forms, *_arguments, **options):
        asked.append(([name for name, *_ in forms], options["rounds"]))
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr("edgepress.driver.measuring.stages.time_against_baseline", time)
    return asked


def plan_forms(result):
    return {item.node: item.form for item in result.plan.decisions}


def test_forms_chosen_by_time_are_planned_pinned_and_replayed_without_timing(tmp_path, monkeypatch):
    settled(monkeypatch, {"matmul0": "float", "matmul1": "weight-only", "matmul2": "dynamic"})
    timed_as(monkeypatch, timing(compiled=1.5, floats=1.0))
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    first = compiled(source, tmp_path, calib=data)
    chosen = {"matmul0": "float", "matmul1": "weight-only", "matmul2": "dynamic"}
    assert plan_forms(first) == chosen
    assert first.recipe.pins.forms == {"matmul0": "float", "matmul1": "weight-only"}
    assert first.evidence == "measured-on-target"

    def refuse(*_arguments, **_options):
        raise AssertionError("a replay measures nothing")

    monkeypatch.setattr("edgepress.driver.measuring.whole_model.measure_forms", refuse)
    again = compiled(
        source, tmp_path, out="again", calib=data, recipe=read_recipe(first.bundle / "recipe.toml")
    )
    assert plan_forms(again) == chosen
    for name in ("model.onnx", "recipe.toml", "manifest.json"):
        assert (first.bundle / name).read_bytes() == (again.bundle / name).read_bytes(), name
    assert (
        next(item.reason for item in again.plan.decisions if item.node == "matmul0") == "pinned by the recipe"
    )


def test_int8_asked_for_by_name_takes_no_float_by_time(tmp_path, monkeypatch):
    settled(monkeypatch, {"matmul0": "float", "matmul1": "weight-only"})
    timed_as(monkeypatch, timing(compiled=1.5))
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    result = compiled(source, tmp_path, calib=data, fields={"precision": "int8"})
    assert plan_forms(result) == {"matmul0": "dynamic", "matmul1": "weight-only", "matmul2": "dynamic"}


@pytest.mark.parametrize("fields", [{"measure_seconds": 0}, {"skip": ("benchmark",)}, {"precision": "fp32"}])
def test_nothing_is_measured_where_it_was_not_wanted(tmp_path, monkeypatch, fields):
    def refuse(*_arguments, **_options):
        raise AssertionError("nothing was to be measured")

    monkeypatch.setattr("edgepress.driver.measuring.whole_model.measure_forms", refuse)
    asked = timed_as(monkeypatch, timing(compiled=1.5))
    compiled(mlp(tmp_path / "m.onnx"), tmp_path, calib=vectors(tmp_path / "d.npz"), fields=fields)
    assert [names for names, _ in asked] == ([] if "skip" in fields else [[COMPILED]])


def test_nodes_that_pay_little_go_first_when_the_whole_is_slower(tmp_path, monkeypatch):
    ratios = {"first": 1.1, "second": 1.8}
    settled(monkeypatch, dict.fromkeys(ratios, "static"), ratios=ratios, in_context=frozenset({"first"}))
    asked = timed_as(monkeypatch, timing(compiled=0.9, floats=1.0), timing(compiled=1.4, floats=1.0))
    told = []
    reporter = SilentReporter()
    reporter.warn = told.append
    source, data = cnn(tmp_path / "c.onnx"), images(tmp_path / "d.npz")
    result = compiled(source, tmp_path, calib=data, reporter=reporter)
    forms = plan_forms(result)
    assert (forms["first"], forms["second"]) == ("float", "static")
    assert [names[:2] for names, _ in asked] == [[COMPILED, IN_FLOAT]] * 2
    assert any("INT8 runs at 0.90x of the model that went in" in text and "1 groups" in text for text in told)
    assert (result.recipe.pins.rolled_back, result.recipe.pins.reverted) == ((), ("first",))
    again = compiled(source, tmp_path, out="again", calib=data, recipe=result.recipe)
    assert (again.bundle / "model.onnx").read_bytes() == (result.bundle / "model.onnx").read_bytes()


def test_at_most_three_more_timings_down_to_the_graph_that_went_in(tmp_path, monkeypatch):
    ratios = {"first": 1.1, "second": 1.2}
    settled(monkeypatch, dict.fromkeys(ratios, "static"), ratios=ratios, in_context=frozenset({"first"}))
    asked = timed_as(monkeypatch, timing(compiled=0.9, floats=1.0))
    result = compiled(cnn(tmp_path / "c.onnx", batch_norm=True), tmp_path, calib=images(tmp_path / "d.npz"))
    assert result.recipe.pins.rolled_back == ("int8", "fusions")
    assert result.recipe.pins.forms == {}
    assert len(asked) == 1 + 3


def test_an_undecided_timing_gets_a_longer_look(tmp_path, monkeypatch):
    settled(monkeypatch, {"matmul0": "dynamic"})
    noisy, clear = timing(compiled=(0.9, 0.9, 1.1), floats=0.5), timing(compiled=1.5, floats=1.0)
    asked = timed_as(monkeypatch, noisy, clear)
    result = compiled(mlp(tmp_path / "m.onnx"), tmp_path, calib=vectors(tmp_path / "d.npz"))
    assert [rounds for _, rounds in asked] == [5, 10]
    assert result.recipe.pins.rolled_back == ()


def test_a_tie_is_worth_a_quarter_of_the_file_but_not_a_tenth(tmp_path, monkeypatch):
    timed_as(monkeypatch, timing(compiled=1.0, floats=1.0))
    settled(monkeypatch, {"matmul0": "dynamic"})
    data = vectors(tmp_path / "d.npz", width=128)
    kept = compiled(mlp(tmp_path / "m.onnx", width=128), tmp_path, calib=data)
    assert kept.recipe.pins.rolled_back == ()
    settled(monkeypatch, dict.fromkeys(("matmul1", "matmul2"), "float"))
    back = compiled(mlp(tmp_path / "m.onnx", width=128), tmp_path, out="back", calib=data)
    assert back.recipe.pins.rolled_back == ("int8",)
    assert any("no faster than float" in note for note in back.notes)


def test_options_that_win_are_shipped_pinned_and_replayed(tmp_path, monkeypatch):
    settled(monkeypatch, {"first": "float"})
    options = [(UNBLOCKED, {"optimization.disable_specified_optimizers": "NchwcTransformer"})]
    monkeypatch.setattr(stages, "other_options", lambda _candidate: options)
    timed_as(monkeypatch, timing(compiled=1.2, floats=1.0, unblocked=1.5))
    source, data = cnn(tmp_path / "c.onnx"), images(tmp_path / "d.npz")
    result = compiled(source, tmp_path, calib=data)
    assert result.recipe.pins.session_config == options[0][1]
    manifest = json.loads((result.bundle / "manifest.json").read_bytes())
    assert manifest["session_options"]["config"] == options[0][1]
    assert result.benchmark.comparisons[0].ratio == 1.5
    monkeypatch.setattr(stages, "other_options", lambda _candidate: pytest.fail("nothing is tried"))
    again = compiled(source, tmp_path, out="again", calib=data, recipe=result.recipe)
    same = ("model.onnx", "manifest.json", "recipe.toml")
    assert all((again.bundle / name).read_bytes() == (result.bundle / name).read_bytes() for name in same)


def test_pins_are_written_and_read_back():
    recipe = parse_recipe(
        """target = "host"
        measure_seconds = 3
        allow_unmeasured = true
        [pins]
        model_sha256 = "0"
        precision = "int8"
        static_activation = "uint8"
        [pins.forms]
        a = "weight-only"
        [pins.session_config]
        key = "1"
        """
    )
    assert parse_recipe(to_toml(recipe)) == recipe
    assert recipe.pins.forms == {"a": "weight-only"}


def test_measuring_for_real_ends_in_a_plan_and_a_note(tmp_path):
    fields = {"measure_seconds": 2, "benchmark_rounds": 2}
    data = vectors(tmp_path / "d.npz", width=128)
    result = compiled(mlp(tmp_path / "m.onnx", width=128), tmp_path, calib=data, fields=fields)
    assert any("1 different operators: 1 timed here" in note for note in result.notes)
    assert {item.candidate for item in result.benchmark.comparisons} >= {COMPILED}
    assert set(plan_forms(result)) == {"matmul0", "matmul1", "matmul2"}
