"""`targets probe --measure`: the standard set, what its timings say, and the profile that they make."""

import json
import sys

import numpy as np
import pytest
import ssh_case
from edgepress.driver.cli import main
from edgepress.driver.measuring import probe_models
from edgepress.driver.measuring.operator_models import FLOAT16, WITH_CONVERSIONS
from edgepress.driver.measuring.operator_times import time_kinds
from edgepress.driver.measuring.probe import probe
from edgepress.driver.measuring.probe_models import float16_forms, probed_kinds
from edgepress.driver.measuring.profile import kernel_speeds
from edgepress.driver.reporter import SilentReporter
from edgepress.graph.errors import ModelError, RuntimeUnavailable
from edgepress.runtimes.device import DeviceFeatures, LocalDevice
from edgepress.runtimes.ort_runtime import OrtSession
from edgepress.runtimes.timing import BenchmarkResult, Timing, compare
from edgepress.runtimes.timing_cache import OperatorTiming, TimingCache, TimingKey
from edgepress.targets.registry import load_target

FEATURES = DeviceFeatures(
    architecture="x86-64", core="fake", isa_features=(), runtime="onnxruntime", runtime_version="1.0"
)


class Fake:
    """A device on which integers take half the time of float, the pairs apart by `noise`."""

    name, evidence = "fake", "measured-on-target"

    def __init__(self, *, noise=0.0, lost_after=None, refuses=""):
        self.noise, self.lost_after, self.refuses, self.calls = noise, lost_after, refuses, 0

    def features(self):
        return FEATURES

    def time(self, forms, _feeds, _schedule, **_options):
        self.calls += 1
        if self.lost_after is not None and self.calls > self.lost_after:
            raise RuntimeUnavailable("the device went away")
        if any(form.name.startswith(self.refuses) for form in forms if self.refuses):
            raise ModelError("no kernel")
        shift = [1 - self.noise, 1 + self.noise] * 2
        ms = {
            form.name: [[(1.0 if form.name == "float" else 0.5 * factor) * 1e6] for factor in shift]
            for form in forms
        }
        timings = [
            Timing(
                name=name, runs=4, sessions=4, warm_up_runs=0, mean_ms=1, min_ms=1, p50_ms=values[0][0] / 1e6,
                p90_ms=1, p99_ms=1, throughput_per_s=1, load_ms=1,
            )
            for name, values in ms.items()
        ]  # fmt: skip
        first = forms[0].name
        ratios = [compare(first, name, ms[first], ms[name]) for name in list(ms)[1:]]
        return BenchmarkResult(timings=tuple(timings), comparisons=tuple(ratios), pairs=4, runs_per_pair=1)


def probed(tmp_path, device, *, budget_s=1000.0, target="x86-64-avx512-vnni"):
    return probe(
        device,
        load_target(target),
        cache=TimingCache(tmp_path, FEATURES),
        threads=1,
        budget_s=budget_s,
        name="mine",
        reporter=SilentReporter(),
    )


@pytest.fixture
def few(monkeypatch):
    """A small part of the set: making all its forms takes seconds."""
    small = {sample.op: sample for sample in reversed(probe_models.WORKING)}
    monkeypatch.setattr(probe_models, "WORKING", tuple(small[op] for op in ("MatMul", "Conv", "LSTM")))
    monkeypatch.setattr(probe_models, "OTHERS", probe_models.OTHERS[:1])


def test_the_set_covers_the_kernels_that_compute():
    kinds = probed_kinds(load_target("raspberry-pi-5"))
    found = {(kind.trial.operator, key.form) for kind in kinds for key in kind.keys(1)}
    for op in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        assert {(op, "static-uint8"), (op, "static-int8"), (op, f"static-int8{WITH_CONVERSIONS}")} <= found
    assert {("MatMul", "dynamic"), ("MatMul", "weight-only"), ("LSTM", "dynamic")} <= found
    assert {(op, FLOAT16) for op in ("MatMul", "Gemm", "Conv", "Add", "Gelu", "MaxPool", "Clip")} <= found
    assert ("Conv", "dynamic") not in found  # slower than float everywhere: the profiles refuse it
    keys = [key for kind in kinds for key in kind.keys(1)]
    assert len(set(keys)) == len(keys)
    fewer = {kind.trial.operator for kind in probed_kinds(load_target("x86-64-avx2"))}
    assert "Gelu" not in fewer  # no float16 kernel, nothing to time


def test_every_kind_runs_in_all_its_forms():
    for kind in probed_kinds(load_target("raspberry-pi-5")):
        if (kind.trial.macs or 0) > 2e7:
            continue
        forms, feeds = kind.forms(1)
        assert [form.name for form in forms[1:]] == [key.form for key in kind.keys(1)]
        for form in forms:
            session = OrtSession(form.model, form.options)
            outputs = session.run(feeds if form.feeds is None else form.feeds)
            assert all(np.isfinite(values.astype(np.float32)).all() for values in outputs.values())


def test_float16_is_the_same_function_in_half():
    kind = next(item for item in probed_kinds(load_target("raspberry-pi-5")) if item.names == (FLOAT16,))
    full, half = float16_forms(kind.trial)
    expected = OrtSession(full.model).run(full.feeds)
    found = OrtSession(half.model).run(half.feeds)
    for name, values in expected.items():
        assert found[name].dtype == np.float16
        np.testing.assert_allclose(found[name].astype(np.float32), values, atol=0.02 * np.abs(values).max())


@pytest.mark.usefixtures("few")
def test_kernels_get_their_speed_and_its_noise(tmp_path):
    made = probed(tmp_path, Fake(noise=0.05))
    assert (made.timed, made.known, made.left) == (made.operators, 0, 0)
    kernel = made.profile.kernel("MatMul", "dynamic", weight="int8")
    assert (kernel.speedup_over_float, kernel.evidence) == (2.01, "measured-on-target")
    assert kernel.source.startswith("timed operator by operator on fake, onnxruntime 1.0, threads 1: 2.01")
    assert "(1x128x384 * 384x384); noise 10%, 20" in kernel.source
    before = {item.name: item for item in load_target("x86-64-avx512-vnni").kernels}
    assert {item.name: item for item in made.profile.kernels}["add-static-u8"] == before["add-static-u8"]
    assert (made.profile.name, made.profile.kind) == ("mine", "cpu-class")


def timing(low, high, form="dynamic", size=64):
    middle = (low + high) / 2
    key = TimingKey(operator="MatMul", form=form, shapes=((1, size), (size, size)))
    return OperatorTiming(key=key, p50_ms=1.0, float_p50_ms=middle, pair_ratios=(low, middle, high))


@pytest.mark.parametrize(
    ("low", "high", "decided"),
    [(1.9, 2.1, True), (0.4, 0.5, True), (0.99, 1.01, True), (0.7, 1.4, False), (0.9, 1.12, False)],
)
def test_what_lies_around_one_is_undecided_unless_it_is_close(low, high, decided):
    (speed,) = kernel_speeds(load_target("x86-64-avx2"), [timing(low, high)]).values()
    assert speed.decided is decided
    assert speed.low < speed.ratio < speed.high


def test_undecided_kernels_keep_what_they_had(tmp_path):
    cache = TimingCache(tmp_path, FEATURES)
    cache.add([timing(0.6, 1.6, size=size) for size in (64, 128, 256)])
    made = probed(tmp_path, Fake(), budget_s=0)
    assert list(made.undecided) == ["matmul-dynamic-u8s8"]
    kernels = {item.name: item for item in made.profile.kernels}
    before = {item.name: item for item in load_target("x86-64-avx512-vnni").kernels}
    assert kernels["matmul-dynamic-u8s8"] == before["matmul-dynamic-u8s8"]
    assert (made.timed, made.left) == (0, made.operators)


@pytest.mark.usefixtures("few")
def test_a_device_that_goes_away_leaves_what_was_timed(tmp_path):
    with pytest.raises(RuntimeUnavailable):
        probed(tmp_path, Fake(lost_after=3))
    device = Fake()
    made = probed(tmp_path, device)
    assert (made.known, made.timed) == (3, made.operators - 3)
    assert device.calls == made.timed
    assert probed(tmp_path, Fake(lost_after=0)).known == made.operators


@pytest.mark.usefixtures("few")
def test_a_form_that_the_runtime_refuses_is_left_to_the_profile(tmp_path):
    kinds = probed_kinds(load_target("raspberry-pi-5"))
    found, _ = time_kinds(
        kinds,
        device=Fake(refuses=FLOAT16),
        cache=TimingCache(tmp_path, FEATURES),
        threads=1,
        budget_s=1000,
        reporter=SilentReporter(),
    )
    assert {kind.names == (FLOAT16,) for place, kind in enumerate(kinds) if not found[place]} == {True}


def test_compiles_profit_and_contribute(tmp_path):
    """One cache: what a compile timed of this device is in the profile that the command writes."""
    TimingCache(tmp_path, FEATURES).add([timing(2.9, 3.1, form="weight-only", size=4096)])
    made = probed(tmp_path, Fake(), budget_s=0)
    kernel = made.profile.kernel("MatMul", "weight-only", weight="uint8", granularity="block")
    assert (kernel.speedup_over_float, kernel.evidence) == (3.0, "measured-on-target")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_goes_on_where_it_was_and_writes_a_profile(home, capsys):
    assert main(["targets", "probe", "--measure", "--max-time", "1", "--export", "mine.toml"]) == 0
    first = capsys.readouterr()
    assert "left for want of time (--max-time; the next run goes on)" in first.err
    assert "use it with --target mine.toml" in first.err
    profile = load_target(home / "mine.toml")
    assert profile.device == load_target("host").device
    assert main(["targets", "probe", "--measure", "--max-time", "0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["probe"]["known"] > 0
    assert document["probe"]["timed"] == 0
    assert document["timings_file"].startswith(str(home / "cache"))
    assert main(["targets", "probe", "--measure", "--export", "mine.toml"]) == 2  # never over an old file
    assert "exists already" in capsys.readouterr().err
    assert main(["targets", "probe", "--measure", "--export", "mine.json"]) == 2
    assert main(["targets", "probe", "--threads", "2"]) == 2
    assert "add --measure" in capsys.readouterr().err


def test_the_command_measures_a_device(home, capsys, tmp_path_factory):
    with ssh_case.running_board(tmp_path_factory.mktemp("board")) as board:
        words = ["targets", "probe", "--measure", "--max-time", "1", "--export", "there.toml"]
        words += ["--device", board.url, "--ssh-config", str(board.config), "--device-python", sys.executable]
        assert main(words) == 0
        assert board.left() == []
    assert load_target(home / "there.toml").device.core == LocalDevice().features().core
    assert "probed over" not in capsys.readouterr().err
    assert TimingCache(home / "cache", LocalDevice().features()).timings()
