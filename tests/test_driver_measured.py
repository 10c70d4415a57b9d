"""Choosing forms by operator timings: what is timed, in which forms, and what the figures decide."""

import compress_case as case
import msgspec
import numpy as np
import pytest
from edgepress.compress.propose import Request, alternatives
from edgepress.driver.measuring.forms import in_float, measure_forms
from edgepress.driver.measuring.operator_models import float_model, lowered_forms, plausible_ranges, trial_of
from edgepress.driver.reporter import SilentReporter
from edgepress.graph.errors import ModelError
from edgepress.runtimes.device import DeviceFeatures, LocalDevice
from edgepress.runtimes.ort_runtime import OrtSession
from edgepress.runtimes.timing import BenchmarkResult, Timing, compare
from edgepress.runtimes.timing_cache import TimingCache
from edgepress.targets.registry import load_target

FEATURES = DeviceFeatures(
    architecture="x86-64", core="fake", isa_features=(), runtime="onnxruntime", runtime_version="1.0"
)
WEIGHTS = {"w": case.random(0, 64, 64), "v": case.random(1, 64, 64), "k": case.random(2, 64, 64, 3, 3)}
THREE = """(float[N,S,64] x) => (float[N,S,64] y, float[N,S,64] z) { [q] a = MatMul(x, w)
    [k1] b = MatMul(x, v) c = Add(a, b) g = Gelu(c) [o] y = MatMul(g, w) h = Gelu(y) [p] z = MatMul(h, v) }"""
CONVS = """(float[1,64,8,8] x) => (float[1,64,2,2] y) { [c1] a = Conv(x, k) r = Relu(a) [c2] b = Conv(r, k)
    [c3] y = Conv(b, k) }"""


class FakeDevice:
    """A device whose latencies (ms) are looked up: form -> ms, or a function of the pair of sessions."""

    name, evidence = "fake", "measured-on-target"

    def __init__(self, **cost_ms):
        self.cost_ms = {name.replace("_", "-"): cost for name, cost in cost_ms.items()}
        self.asked = []

    def features(self):
        return FEATURES

    def time(self, forms, _feeds, _schedule, **_options):
        self.asked.append([form.name for form in forms])
        series = {form.name: [[self.ms(form.name, pair) * 1e6] for pair in range(4)] for form in forms}
        timings = [
            Timing(
                name=name, runs=4, sessions=4, warm_up_runs=0, mean_ms=1, min_ms=1, p50_ms=values[0][0] / 1e6,
                p90_ms=1, p99_ms=1, throughput_per_s=1, load_ms=1,
            )
            for name, values in series.items()
        ]  # fmt: skip
        first = forms[0].name
        comparisons = [compare(first, name, series[first], series[name]) for name in list(series)[1:]]
        return BenchmarkResult(
            timings=tuple(timings), comparisons=tuple(comparisons), pairs=4, runs_per_pair=1
        )

    def ms(self, name, pair):
        cost = self.cost_ms.get(name, 1.0)
        return cost(pair) if callable(cost) else cost


def measured(tmp_path, device, text=THREE, *, budget_s=10.0, profile=case.X86, request=None):
    model = case.parse(text, {key: array for key, array in WEIGHTS.items() if f", {key})" in text})
    return measure_forms(
        model,
        load_target(profile) if isinstance(profile, str) else profile,
        request or Request(calibrated=True),
        device=device,
        cache=TimingCache(tmp_path, FEATURES),
        threads=1,
        budget_s=budget_s,
        reporter=SilentReporter(),
    )


def forms(result):
    return {name: verdict.form for name, verdict in result.verdicts.items()}


def test_equal_operators_are_timed_once_and_readers_of_one_tensor_together(tmp_path):
    device = FakeDevice(dynamic=0.5, weight_only=0.7)
    result = measured(tmp_path, device)
    assert (result.operators, result.timed) == (2, 2)
    assert device.asked == [["float", "dynamic", "weight-only"]] * 2
    assert forms(result) == dict.fromkeys(("q", "k1", "o", "p"), "dynamic")
    names = {item.key.operator for item in TimingCache(tmp_path, FEATURES).timings()}
    assert names == {"MatMul", "2 MatMul"}
    assert "dynamic 2.00x of float (2.00 to 2.00)" in result.verdicts["q"].reason


@pytest.mark.parametrize(
    ("cost", "form"),
    [
        ({"dynamic": 0.5, "weight_only": 0.40}, "weight-only"),
        ({"dynamic": 0.5, "weight_only": 0.495}, "dynamic"),  # 1 %: inside the margin
        (
            {"dynamic": 0.5, "weight_only": lambda pair: 0.6 if pair == 3 else 0.4},
            "dynamic",
        ),  # inside the noise
        ({"dynamic": 1.5, "weight_only": 1.2}, "float"),
        ({"dynamic": 1.5, "weight_only": 0.8}, "weight-only"),
        ({"dynamic": 1.01, "weight_only": 1.2}, "dynamic"),  # a tie with float
        ({"dynamic": lambda pair: 0.9 if pair == 2 else 1.5, "weight_only": 9}, "dynamic"),
    ],
)
def test_the_fastest_outside_margin_and_noise_wins_else_the_plan_s_own_form(tmp_path, cost, form):
    assert set(forms(measured(tmp_path, FakeDevice(**cost))).values()) == {form}


INSIDE, OUTSIDE = "static_uint8", "static_uint8 with conversions"


@pytest.mark.parametrize(
    ("inside", "outside", "form", "in_context"),
    [
        (0.5, 0.7, "static", False),
        (0.8, 1.2, "static", True),  # pays between integers only: float would need the conversions there
        (1.2, 1.7, "static", True),  # float 1.0 and the conversions 0.5 are more than 1.2
        (1.7, 1.9, "float", False),
    ],
)
def test_a_static_form_counts_with_and_without_its_conversions(tmp_path, inside, outside, form, in_context):
    device = FakeDevice(**{INSIDE: inside, OUTSIDE: outside})
    result = measured(tmp_path, device, CONVS)
    assert device.asked[0] == ["float", "static-uint8 with conversions", "static-uint8"]
    assert set(forms(result).values()) == {form}
    assert bool(result.in_context) is in_context
    if in_context:
        changed = in_float(result, result.in_context, "tried")
        assert {verdict.form for verdict in changed.values()} == {"float"}
        assert changed["c1"].reason.startswith("tried (timed on fake, Conv of this size")


def test_both_signs_are_timed_where_the_profile_has_both(tmp_path):
    cost = {INSIDE: 0.5, OUTSIDE: 0.6, "static_int8": 0.4, "static_int8 with conversions": 0.5}
    chosen = measured(tmp_path / "a", FakeDevice(**cost), CONVS, profile="raspberry-pi-4")
    assert chosen.static_activation == "int8"  # the profile's own is uint8
    assert "static-int8 2.50x" in chosen.verdicts["c1"].reason
    cost["static_int8"] = 0.497
    assert (
        measured(tmp_path / "b", FakeDevice(**cost), CONVS, profile="raspberry-pi-4").static_activation
        is None
    )
    device = FakeDevice(**cost)
    measured(tmp_path / "c", device, CONVS)  # on x86 the profile knows signed convolutions to be slower
    assert device.asked[0][1:] == ["static-uint8 with conversions", "static-uint8"]


def test_without_time_the_cache_answers_and_nothing_is_timed(tmp_path):
    device = FakeDevice(dynamic=0.5)
    nothing = measured(tmp_path, device, budget_s=0.0)
    assert (nothing.operators, nothing.timed, nothing.known, nothing.verdicts) == (2, 0, 0, {})
    assert "2 left to the profile" in nothing.note
    measured(tmp_path, device)
    before = len(device.asked)
    known = measured(tmp_path, device, budget_s=0.0)
    assert (known.timed, known.known, len(known.verdicts)) == (0, 2, 4)
    assert len(device.asked) == before == 2


def test_a_large_operator_is_left_out_where_time_is_short(tmp_path):
    device = FakeDevice(dynamic=0.5)
    result = measured(tmp_path, device, THREE.replace("[N,S,64]", "[N,50000,64]"), budget_s=0.5)
    assert (result.operators, result.timed, device.asked) == (2, 0, [])


def test_what_nothing_is_known_of_comes_first(tmp_path):
    mixed = """(float[N,S,64] x, float[1,64,8,8] i) => (float[N,S,64] y, float[1,64,6,6] j) {
        [m] y = MatMul(x, w) [c] j = Conv(i, k) }"""
    device, profile = FakeDevice(), load_target(case.X86)
    measured(tmp_path / "a", device, mixed, request=Request(calibrated=True, shapes={"x": (1, 9, 64)}))
    assert ["dynamic" in asked for asked in device.asked] == [True, False]  # the product is smaller
    kernels = [
        msgspec.structs.replace(item, evidence="none") if item.name == "conv-static-u8s8" else item
        for item in profile.kernels
    ]
    unknown = msgspec.structs.replace(profile, kernels=tuple(kernels))
    device = FakeDevice(**{INSIDE: 0.5})
    result = measured(tmp_path / "b", device, mixed, profile=unknown)
    assert ["dynamic" in asked for asked in device.asked] == [False, True]
    assert result.verdicts["c"].form == "static"


def test_a_form_that_the_runtime_refuses_leaves_the_choice_to_the_profile(tmp_path):
    class Refusing(FakeDevice):
        def time(self, *_arguments, **_options):
            raise ModelError("no kernel")

    result = measured(tmp_path, Refusing())
    assert result.verdicts == {}
    assert TimingCache(tmp_path, FEATURES).timings() == ()


def test_a_model_without_anything_to_quantize_has_nothing_to_tell(tmp_path):
    result = measured(tmp_path, FakeDevice(), "(float[2,64] x) => (float[2,64] y) { y = Relu(x) }")
    assert (result.note, result.operators) == (None, 0)


def trials(text, weights=None, **asked):
    used = weights or {key: array for key, array in WEIGHTS.items() if f", {key})" in text}
    model = case.parse(text, used)
    offered = alternatives(model, load_target(case.X86), Request(calibrated=True, **asked))
    nodes = {node.name: node for node in model.graph}
    for name, decisions in offered.items():
        yield name, trial_of([nodes[name]], decisions[:1], {"N": 1, "S": 16}), decisions


def test_the_model_of_one_operator_computes_what_the_operator_computes():
    found = {name: trial for name, trial, _ in trials(CONVS)}
    assert found["c1"].shapes == ((1, 64, 8, 8), (64, 64, 3, 3))
    assert found["c1"].attributes == "then Relu"
    model, feeds = float_model(found["c1"])
    (result,) = OrtSession.from_model(model).run(feeds).values()
    (x,) = feeds.values()
    weight = next(iter(model.graph.initializers.values())).const_value.numpy()
    windows = np.lib.stride_tricks.sliding_window_view(x[0], (3, 3), axis=(1, 2))
    expected = np.maximum(np.einsum("chwij,ocij->ohw", windows, weight), 0)
    np.testing.assert_allclose(result[0], expected, rtol=1e-3, atol=1e-3)


def test_static_forms_come_with_conversions_and_between_integers():
    (_, trial, decisions), *_ = trials(CONVS)
    float_form, outside, inside = lowered_forms(trial, [decisions[:1]])
    assert [form.name for form in (float_form, outside, inside)] == [
        "float", "static-uint8 with conversions", "static-uint8",
    ]  # fmt: skip
    assert {array.dtype.name for array in outside.feeds.values()} == {"float32"}
    assert {array.dtype.name for array in inside.feeds.values()} == {"uint8"}
    for form, kind in ((outside, "float32"), (inside, "uint8")):
        session = OrtSession(form.model)
        (result,) = session.run(form.feeds).values()
        assert result.dtype.name == kind
    (real,) = OrtSession(float_form.model).run(float_form.feeds).values()
    (quantized,) = OrtSession(outside.model).run(outside.feeds).values()
    inside_range = real < 4.0  # the made-up range
    np.testing.assert_allclose(quantized[inside_range], real[inside_range], atol=0.15)


def test_dynamic_and_weight_only_forms_compute_the_product():
    (_, trial, decisions), *_ = trials(THREE)
    made = lowered_forms(trial, [[item] for item in decisions])
    assert [form.name for form in made] == ["float", "dynamic", "weight-only"]
    (real,) = OrtSession(made[0].model).run(made[0].feeds).values()
    for form in made[1:]:
        (found,) = OrtSession(form.model).run(form.feeds).values()
        assert np.linalg.norm(found - real) < 0.03 * np.linalg.norm(real)


def test_an_lstm_keeps_its_absent_inputs_and_its_outputs():
    text = """(float[8,1,64] x) => (float[8,1,1,128] y, float[1,1,128] h) {
        [l] y, h = LSTM <hidden_size = 128> (x, w, r) }"""
    weights = {"w": case.random(0, 1, 512, 64), "r": case.random(1, 1, 512, 128)}
    ((_, trial, decisions),) = trials(text, weights)
    made = lowered_forms(trial, [decisions])
    real, found = (OrtSession(form.model).run(form.feeds) for form in made)
    for name, values in real.items():
        assert np.linalg.norm(found[name] - values) < 0.05 * np.linalg.norm(values)


def test_unknown_sizes_are_not_timed():
    model = case.parse(THREE, {key: WEIGHTS[key] for key in "wv"})
    offered = alternatives(model, load_target(case.X86), Request())
    node = next(node for node in model.graph if node.name == "o")
    assert trial_of([node], offered["o"][:1], {"N": 1}) is None
    assert trial_of([node], offered["o"][:1], {"N": 1, "S": 4}) is not None
    assert trial_of([node], offered["o"][:1], {"N": 1, "S": 1 << 24}) is None  # gigabytes


def test_made_up_ranges_saturate_where_an_activation_does():
    text = """(float[4] x) => (float[4] a, float[4] b, float[4] c, float[4] d) { a = Relu(x)
        b = Clip(x, low, high) c = Sigmoid(x) d = Neg(x) }"""
    limits = {"low": np.float32(0), "high": np.float32(6)}
    found = plausible_ranges(case.parse(text, limits), ["x", "a", "b", "c", "d"])
    assert found == {"x": (-4, 4), "a": (0, 4), "b": (0, 6), "c": (0, 4), "d": (-4, 4)}


def test_this_machine_times_real_forms(tmp_path):
    result = measured(tmp_path, LocalDevice(), CONVS, budget_s=20.0)
    timings = TimingCache(tmp_path, FEATURES).timings()
    assert {item.key.form for item in timings} == {"static-uint8", "static-uint8 with conversions"}
    assert set(forms(result)) == {"c1", "c2", "c3"}
