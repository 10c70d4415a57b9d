"""Sensitivities: against models in which one group alone is quantized, within the promised cost."""

from __future__ import annotations

import compress_case as case
import driver_case
import numpy as np
import pytest
from edgepress.calibration.collect import collect_ranges
from edgepress.calibration.data import open_data
from edgepress.calibration.metrics import spearman
from edgepress.compress.lower import apply_plan
from edgepress.compress.plan import Decision
from edgepress.compress.propose import Request, propose
from edgepress.compress.quantize.constants import Rounded
from edgepress.compress.quantize.static import static_layout
from edgepress.compress.quantize.weights import weight_scale
from edgepress.compress.sensitivity import measure_sensitivity
from edgepress.compress.sensitivity_graphs import missing_ranges, parts_of, recorder, replay
from edgepress.compress.sensitivity_shares import combine, interpolate
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.runtimes.ort_runtime import OrtSession
from edgepress.targets.registry import load_target


class Case:
    """A prepared model with its plan, ranges and samples."""

    def __init__(self, path, data, quantization="auto"):
        self.model = load_model(path)
        run_passes(self.model, exact_cleanup())
        self.data = open_data(data, self.model.inputs)
        request = Request(quantization=quantization, calibrated=True)
        self.plan = propose(self.model, load_target(case.X86), request)
        layout = static_layout(self.model, self.plan.decisions)
        self.ranges = {}
        if layout.observed:
            found = collect_ranges(self.model, layout.observed, self.data)
            self.ranges = {name: item.limits(layout.activation) for name, item in found.items()}

    def alone(self, group):
        """A session of the model in which one group is quantized."""
        plan = self.plan.revert(frozenset(self.plan.groups) - {group}, "alone")
        wanted = static_layout(self.model, plan.decisions).observed
        ranges = {**self.ranges, **missing_ranges(self.model, wanted, self.ranges)}
        return OrtSession.from_model(apply_plan(self.model, plan, ranges)[0])

    def truth(self):
        """Group -> relative L2 over all samples, from whole models."""
        plain = OrtSession.from_model(self.model)
        (output,) = (spec.name for spec in self.model.outputs)
        expected = [plain.run(feeds)[output].astype(np.float64) for feeds in self.data]
        found = {}
        for group in self.plan.groups:
            session = self.alone(group)
            pairs = zip(expected, self.data, strict=True)
            error = sum(float(((session.run(feeds)[output] - values) ** 2).sum()) for values, feeds in pairs)
            found[group] = (error / sum(float((values**2).sum()) for values in expected)) ** 0.5
        return found


@pytest.fixture(params=["mlp", "cnn"])
def quantized(request, tmp_path):
    if request.param == "mlp":
        return Case(driver_case.mlp(tmp_path / "m.onnx"), driver_case.vectors(tmp_path / "d.npz"))
    return Case(
        driver_case.cnn(tmp_path / "m.onnx", batch_norm=True),
        driver_case.images(tmp_path / "d.npz", samples=24),
    )


def test_an_injected_error_does_what_quantizing_the_group_alone_does(quantized):
    parts, others = parts_of(quantized.model, quantized.plan)
    assert [part.group for part in parts] == list(quantized.plan.groups)
    assert others == ()
    recording = recorder(quantized.model, parts)
    pieces = replay(quantized.model, quantized.plan, parts, quantized.ranges)
    float_run, replay_run = (OrtSession.from_model(made.model) for made in (recording, pieces))
    feeds = next(iter(quantized.data))
    zeros = {name: np.zeros((), np.float32) for name in recording.deltas.values()}
    names = [*recording.outputs, *recording.recorded.values()]
    plain = float_run.run({**feeds, **zeros}, list(dict.fromkeys(names)))
    known = {**feeds, **{name: plain[output] for name, output in recording.recorded.items()}}
    found = replay_run.run({name: known[source] for name, source in pieces.feeds.items()})
    (output,) = recording.outputs
    for part, results in zip(parts, pieces.results, strict=True):
        errors = {recording.deltas[name]: found[made] - known[name] for made, name in results.items()}
        moved = float_run.run({**feeds, **zeros, **errors}, [output])[output]
        truth = quantized.alone(part.group).run(feeds)[output]
        change = np.linalg.norm(truth - plain[output])
        assert change > 0
        # One rounding may fall differently where the runtime fuses more in the whole model.
        assert np.linalg.norm(moved - truth) < 0.05 * change, part.group


def test_weights_rounded_by_other_means_are_replayed_as_they_are(tmp_path):
    own = Case(driver_case.cnn(tmp_path / "m.onnx"), driver_case.images(tmp_path / "d.npz", samples=24))
    (second,) = (item for item in own.plan.decisions if item.node == "second")
    weight = own.model.graph.initializers[second.weight].const_value.numpy()
    scale = weight_scale(weight, second.weight_scheme)
    rounded = np.floor(weight / scale.reshape(-1, 1, 1, 1)).clip(-127, 127).astype(np.int8)
    rounding = {"second": Rounded(integers=rounded, scale=scale)}
    local = []
    for given in ({}, rounding):
        found = measure_sensitivity(
            own.model,
            {"int8": own.plan},
            own.ranges,
            own.data,
            open_session=OrtSession.from_model,
            rounding=given,
        )
        local.append(next(item.local_l2 for item in found.groups if item.group == second.group))
    # Rounding down leaves an error of up to one step where rounding to nearest leaves half of one.
    assert local[1] > 1.5 * local[0]


class Counting:
    """An opener that counts the runs of all its sessions."""

    def __init__(self):
        self.runs = 0

    def __call__(self, model):
        session = OrtSession.from_model(model)
        run = session.run

        def counted(*arguments):
            self.runs += 1
            return run(*arguments)

        session.run = counted
        return session


def test_ranking_is_that_of_whole_models_within_the_cost(quantized):
    opener, seen = Counting(), []
    found = measure_sensitivity(
        quantized.model,
        {"int8": quantized.plan},
        quantized.ranges,
        quantized.data,
        open_session=opener,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert opener.runs == found.forwards <= 3 * len(quantized.data)
    assert seen[-1] == (found.forwards, found.forwards)
    truth, told = quantized.truth(), found.of("int8")
    assert set(told) == set(truth)
    assert list(told.values()) == sorted(told.values(), reverse=True)
    assert spearman(np.array([truth[group] for group in told]), np.array(list(told.values()))) > 0.75
    for group, drift in told.items():
        assert drift == pytest.approx(truth[group], rel=0.4), group


def test_a_layer_with_outliers_is_named_first(tmp_path):
    bad = Case(driver_case.mlp(tmp_path / "m.onnx", outlier_layer=2), driver_case.vectors(tmp_path / "d.npz"))
    found = measure_sensitivity(
        bad.model, {"int8": bad.plan}, bad.ranges, bad.data, open_session=OrtSession.from_model
    )
    first, second = found.groups[:2]
    (worst,) = (item.group for item in bad.plan.decisions if item.node == "matmul2")
    assert first.group == worst
    assert first.l2 > 10 * second.l2
    assert first.local_l2 > 10 * second.local_l2


def test_one_sample_ranks_what_it_can_and_fills_in_the_rest(tmp_path):
    quantized = Case(driver_case.mlp(tmp_path / "m.onnx"), driver_case.vectors(tmp_path / "d.npz", samples=1))
    opener = Counting()
    found = measure_sensitivity(
        quantized.model, {"int8": quantized.plan}, {}, quantized.data, open_session=opener
    )
    assert opener.runs == found.forwards == 3
    assert all(item.l2 > 0 for item in found.groups)
    assert len(found.groups) == 3


def test_a_second_form_is_told_from_its_replay(tmp_path):
    path, data = driver_case.mlp(tmp_path / "m.onnx"), driver_case.vectors(tmp_path / "d.npz")
    dynamic, static = Case(path, data, "dynamic"), Case(path, data, "static")
    opener = Counting()
    found = measure_sensitivity(
        dynamic.model,
        {"dynamic": dynamic.plan, "static": static.plan},
        static.ranges,
        dynamic.data,
        open_session=opener,
    )
    assert opener.runs == found.forwards <= 4 * len(dynamic.data)
    for form, other in (("dynamic", dynamic), ("static", static)):
        truth, told = other.truth(), found.of(form)
        assert set(told) == set(truth)
        for group, drift in told.items():
            assert drift == pytest.approx(truth[group], rel=0.5), (form, group)


def test_answers_that_are_no_numbers_any_more_come_first(tmp_path):
    quantized = Case(driver_case.mlp(tmp_path / "m.onnx"), driver_case.vectors(tmp_path / "d.npz"))

    def opener(model):
        session = OrtSession.from_model(model)
        run = session.run

        def broken(feeds, names=None):
            found = run(feeds, names)
            if names is None:  # the replay: its second piece gives infinity
                found = {
                    name: v * np.float32(np.inf if place == 1 else 1)
                    for place, (name, v) in enumerate(found.items())
                }
            return found

        session.run = broken
        return session

    found = measure_sensitivity(
        quantized.model, {"int8": quantized.plan}, {}, quantized.data, open_session=opener
    )
    assert (found.groups[0].group, found.groups[0].l2) == (quantized.plan.groups[1], None)
    assert all(item.l2 is not None and item.l2 < 0.1 for item in found.groups[1:])
    assert np.isinf(found.of("int8")[quantized.plan.groups[1]])


def test_groups_inside_bodies_are_told_apart(quantized):
    inner = Decision(node="inside a body", op="MatMul", group="inner", form="dynamic", reason="")
    plan = quantized.plan.with_decisions([*quantized.plan.decisions, inner])
    parts, others = parts_of(quantized.model, plan)
    assert others == ("inner",)
    assert len(parts) == len(quantized.plan.groups)


def test_a_layer_behind_pooling_finds_its_range_when_its_neighbour_is_in_float():
    model = case.parse(
        """(float[1,3,8,8] x) => (float[1,4,4,4] y) {
            [first] a = Conv<pads=[1,1,1,1]>(x, v)
            b = Relu(a)
            [pool] c = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b)
            [second] y = Conv<pads=[1,1,1,1]>(c, w)
        }""",
        {"v": case.random(0, 4, 3, 3, 3), "w": case.random(1, 4, 4, 3, 3)},
    )
    plan = propose(model, load_target(case.X86), Request(quantization="static", calibrated=True))
    both = static_layout(model, plan.decisions)
    ranges = {name: (-1.0, float(place + 2)) for place, name in enumerate(both.observed)}
    back = plan.revert(frozenset(item.group for item in plan.decisions if item.node == "first"), "float")
    wanted = static_layout(model, back.decisions).observed
    assert [name for name in wanted if name not in ranges] == ["c"]
    assert missing_ranges(model, wanted, ranges) == {"c": ranges["b"]}
    assert missing_ranges(model, ["b", "no such tensor"], ranges) == {}


def test_shares_of_consistent_figures_are_exact():
    random = np.random.default_rng(0)
    true = random.lognormal(size=9)
    moves = random.lognormal(size=(5, 1)) * true
    for witnesses in (np.zeros((5, 9, 0)), moves[:, :, None] * np.array([3.0, 0.5])):
        assert combine(moves, witnesses) == pytest.approx(true / true.sum())


def test_a_group_that_spoils_some_samples_only_does_not_hide():
    moves = np.full((9, 3), 1e-3)
    moves[:7, 1] = 80.0
    shares = combine(moves, np.zeros((9, 3, 0)))
    assert shares[1] > 1e3 * shares[0]
    assert shares[0] == pytest.approx(shares[2])


def test_witnesses_make_up_for_answers_of_few_values():
    random, plain, helped = np.random.default_rng(3), [], []
    for _ in range(40):
        true = random.lognormal(0, 0.8, 30)
        # An answer of two values: its squared change scatters by a factor of two and more.
        moves = true * random.chisquare(2, (6, 30)) / 2
        witness = (true * random.chisquare(60, (6, 30)) / 60)[:, :, None]
        plain.append(spearman(combine(moves, np.zeros((6, 30, 0))), true))
        helped.append(spearman(combine(moves, witness), true))
    assert np.mean(helped) > np.mean(plain) + 0.05


def test_a_witness_that_knows_nothing_does_little_harm():
    random, plain, misled = np.random.default_rng(4), [], []
    for _ in range(40):
        true = random.lognormal(0, 0.8, 30)
        moves = true * random.chisquare(20, (6, 30)) / 20
        witness = random.lognormal(0, 2, (6, 30))[:, :, None]
        plain.append(spearman(combine(moves, np.zeros((6, 30, 0))), true))
        misled.append(spearman(combine(moves, witness), true))
    assert np.mean(misled) > np.mean(plain) - 0.01


def test_shares_of_nothing_and_of_infinity():
    empty = np.zeros((2, 3, 0))
    assert combine(np.zeros((2, 3)), empty).tolist() == [0, 0, 0]
    assert np.isnan(combine(np.full((2, 3), np.nan), empty)).all()
    shares = combine(np.array([[1.0, np.inf, 3.0], [1.0, 2.0, 3.0]]), empty)
    assert np.isinf(shares[1])
    assert shares[2] > shares[0] > 0


def test_groups_that_were_not_measured_take_the_gain_of_their_neighbours():
    powers = np.array([1.0, np.nan, 4.0, np.nan])
    local = np.array([1.0, 3.0, 1.0, 0.5])
    assert interpolate(powers, local) == pytest.approx([1.0, 3 * 2.0, 4.0, 0.5 * 4.0])
    assert interpolate(np.array([np.nan]), np.array([1.0])).tolist() == [0.0]
