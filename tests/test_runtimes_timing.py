"""The timing loop: order, interleaving, statistics against slow loops, memory of a child process."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from edgepress.graph.errors import DataError, ModelError, RuntimeUnavailable
from edgepress.graph.model import Model, Origin
from edgepress.graph.save import to_bytes
from edgepress.runtimes import device_runner
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.cpu import peak_memory_bytes, resident_memory_bytes
from edgepress.runtimes.ort_runtime import OrtSession
from edgepress.runtimes.peak_memory import measure_cold_start, measure_peak_memory
from edgepress.runtimes.timing import (
    BenchmarkResult,
    Candidate,
    Schedule,
    benchmark,
    compare,
    result_of,
)
from hypothesis import given
from hypothesis import strategies as st


class _Clock:
    """A clock that moves only when a runner runs."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


class _Runner:
    inputs = ()
    outputs = ()
    load_ms = 2.0

    def __init__(self, name: str, clock: _Clock, log: list[str], cost_ns: Callable[[int], int]) -> None:
        self.name, self.clock, self.log, self.cost_ns = name, clock, log, cost_ns
        self.count = 0

    def run(self, feeds: dict[str, np.ndarray], _names: object = None) -> dict[str, np.ndarray]:
        self.log.append(f"{self.name}{int(feeds['x'][0])}")
        self.clock.now_ns += self.cost_ns(self.count)
        self.count += 1
        return {}


def _candidate(
    name: str, clock: _Clock, log: list[str], cost_ns: Callable[[int], int], *, feeds: int = 1, batch: int = 1
) -> Candidate:
    def open_session() -> _Runner:
        log.append(f"open {name}")
        return _Runner(name, clock, log, cost_ns)

    sets = [{"x": np.array([index])} for index in range(feeds)]
    return Candidate(name=name, open=open_session, feeds=sets, samples_per_run=batch)


def test_sessions_alternate_and_runs_are_interleaved() -> None:
    clock, log = _Clock(), []
    candidates = [_candidate(name, clock, log, lambda _: 1000) for name in "ab"]
    benchmark(candidates, Schedule(pairs=2, runs=3, warm_up_runs=1), clock_ns=clock)
    warm_up = 10  # two windows of five, equal at once
    first = ["open a", "open b", *["a0"] * warm_up, *["b0"] * warm_up, *["a0", "b0"] * 3]
    second = ["open b", "open a", *["b0"] * warm_up, *["a0"] * warm_up, *["b0", "a0"] * 3]
    # one warm-up run is the least, ten times as many the most
    assert log == first + second


def test_warm_up_lasts_until_runs_are_steady() -> None:
    clock, log = _Clock(), []
    # twelve slow runs, then steady
    candidate = _candidate("a", clock, log, lambda count: 9000 if count < 12 else 1000)
    result = benchmark([candidate], Schedule(pairs=1, runs=4, warm_up_runs=5), clock_ns=clock)
    assert result.timings[0].warm_up_runs == 10  # the first ten agree: steady, though slow
    clock, log = _Clock(), []
    candidate = _candidate("a", clock, log, lambda count: 1000 + max(0, 20 - count) * 1000)
    result = benchmark([candidate], Schedule(pairs=1, runs=4, warm_up_runs=5), clock_ns=clock)
    assert 20 < result.timings[0].warm_up_runs <= 50
    assert result.timings[0].p50_ms == pytest.approx(0.001)


def test_warm_up_ends_even_if_runs_never_settle() -> None:
    clock, log = _Clock(), []
    candidate = _candidate("a", clock, log, lambda count: 1000 * 2**count)
    result = benchmark([candidate], Schedule(pairs=1, runs=1, warm_up_runs=2), clock_ns=clock)
    assert result.timings[0].warm_up_runs == 20


def test_feeds_are_taken_in_turn() -> None:
    clock, log = _Clock(), []
    benchmark(
        [_candidate("a", clock, log, lambda _: 1, feeds=3)],
        Schedule(pairs=1, runs=4, warm_up_runs=1),
        clock_ns=clock,
    )
    assert log[1:] == [f"a{index % 3}" for index in range(10 + 4)]  # the warm-up takes them, too


def _slow_percentile(values: list[float], percent: int) -> float | None:
    """The least value with more than so many per cent of all at or below it; None where none lies above."""
    if len(values) * (100 - percent) < 100:
        return None
    return next(
        value for value in sorted(values) if 100 * sum(v <= value for v in values) > percent * len(values)
    )


@given(costs=st.lists(st.integers(1, 10**9), min_size=1, max_size=40))
def test_statistics_equal_a_slow_loop(costs: list[int]) -> None:
    clock, log = _Clock(), []
    warm_up = 10

    def cost_ns(count: int) -> int:
        return 5 if count < warm_up else costs[count - warm_up]

    candidate = _candidate("a", clock, log, cost_ns, batch=4)
    plan = Schedule(pairs=1, runs=len(costs), warm_up_runs=1)
    timing = benchmark([candidate], plan, clock_ns=clock).timings[0]
    values_ms = [cost / 1e6 for cost in costs]
    assert timing.runs == len(costs)
    assert timing.mean_ms == pytest.approx(sum(values_ms) / len(values_ms))
    assert timing.min_ms == min(values_ms)
    if len(costs) > 1:
        assert timing.p50_ms == pytest.approx(_slow_percentile(values_ms, 50))
    assert timing.p90_ms == pytest.approx(_slow_percentile(values_ms, 90))
    assert timing.p99_ms is timing.p99_9_ms is None  # too few runs
    low, high = timing.intervals_ms.get("p50", (None, None))
    assert low is None or low <= timing.p50_ms
    assert high is None or high >= timing.p50_ms
    assert timing.throughput_per_s == pytest.approx(4 * len(costs) / (sum(costs) / 1e9))
    assert timing.load_ms == 2.0


def test_ratios_are_those_of_the_medians_pair_by_pair() -> None:
    comparison = compare("a", "b", [[10, 30, 20], [40, 40, 40]], [[10, 10, 10], [10, 20, 30]])
    assert comparison.pair_ratios == (2.0, 2.0)
    comparison = compare("a", "b", [[30], [20], [100], [30]], [[10], [10], [10], [10]])
    assert (comparison.ratio, comparison.low, comparison.high) == (3.0, 2.0, 10.0)
    assert comparison.ratio == statistics.median(comparison.pair_ratios)
    assert comparison.mean_ratio == pytest.approx((3 * 2 * 10 * 3) ** (1 / 4))
    assert comparison.interval is not None
    assert comparison.interval[0] < comparison.mean_ratio < comparison.interval[1]
    assert compare("a", "b", [[2]], [[1]]).interval is None  # one pair shows no spread


def test_the_figures_are_those_of_the_device_runner() -> None:
    draw = np.random.default_rng(0)
    found = {
        name: {
            "series_ns": [[int(value) for value in draw.lognormal(13, 0.1, 60)] for _ in range(4)],
            "load_ms": [1.0, 2.0, 3.0, 4.0],
            "warm_up_runs": 40,
        }
        for name in ("base", "other")
    }
    result = result_of(found, {"base": 4, "other": 4})
    for name, timed in found.items():
        there, here = device_runner.latency_of(timed, 4), result.timing(name)
        for key in (
            "runs",
            "sessions",
            "p50_ms",
            "p90_ms",
            "p99_ms",
            "p99_9_ms",
            "mean_ms",
            "throughput_per_s",
        ):
            assert getattr(here, key) == there[key]
        assert {key: list(value) for key, value in here.intervals_ms.items()} == there["intervals_ms"]
    assert result.timing("base").p99_ms is not None
    there, (here,) = device_runner.compare(found["base"], found["other"]), result.comparisons
    assert (here.mean_ratio, here.interval) == (there["ratio"], (there["low"], there["high"]))
    assert list(here.pair_ratios) == there["pair_ratios"]


def test_a_schedule_is_a_plan_of_the_device_runner() -> None:
    names = {field.name for field in dataclasses.fields(device_runner.Plan)}
    assert {field.name for field in dataclasses.fields(Schedule)} == names
    plan = Schedule(runs=7, most_pair_s=2.0).as_plan()
    assert (plan["runs"], plan["most_pair_s"]) == (7, 2.0)
    assert "warm_up_limit_s" not in plan  # without an end: no number that JSON has


@pytest.mark.parametrize(
    ("baseline", "candidate", "faster", "slower"),
    [
        ([[110], [120]], [[100], [100]], True, False),
        ([[101], [101]], [[100], [100]], False, False),  # below the margin
        ([[150], [99]], [[100], [100]], False, False),  # one pair says otherwise
        ([[90], [80]], [[100], [100]], False, True),
        ([[100], [100]], [[100], [100]], False, False),
    ],
)
def test_a_verdict_needs_margin_and_agreement(
    baseline: list[list[int]], candidate: list[list[int]], faster: bool, slower: bool
) -> None:
    comparison = compare("a", "b", baseline, candidate)
    assert (comparison.is_faster(), comparison.is_slower()) == (faster, slower)


def test_results_compare_with_the_first_and_serialise() -> None:
    clock, log = _Clock(), []
    costs = {"base": 3000, "half": 1500, "same": 3000}
    candidates = [_candidate(name, clock, log, lambda _, cost=cost: cost) for name, cost in costs.items()]
    calls: list[tuple[int, int]] = []
    plan = Schedule(pairs=3, runs=5, warm_up_runs=1)
    result = benchmark(candidates, plan, clock_ns=clock, progress=lambda *call: calls.append(call))
    assert [(item.candidate, item.ratio) for item in result.comparisons] == [("half", 2.0), ("same", 1.0)]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert (result.pairs, result.timing("half").sessions, result.timing("half").runs) == (3, 3, 15)
    with pytest.raises(KeyError):
        result.timing("none")
    assert msgspec.json.decode(msgspec.json.encode(result), type=BenchmarkResult) == result


def test_time_limit_ends_after_two_pairs() -> None:
    clock, log = _Clock(), []
    candidate = _candidate("a", clock, log, lambda _: 10**9)
    result = benchmark([candidate], Schedule(pairs=9, runs=2, warm_up_runs=1, limit_s=1.0), clock_ns=clock)
    assert result.pairs == 2


def test_nothing_to_time_is_an_error() -> None:
    clock, log = _Clock(), []
    one = _candidate("a", clock, log, lambda _: 1)
    with pytest.raises(DataError, match="nothing to time"):
        benchmark([])
    with pytest.raises(DataError, match="one name"):
        benchmark([one, one])
    with pytest.raises(DataError, match="no input"):
        benchmark([Candidate(name="a", open=one.open, feeds=[])])
    with pytest.raises(ValueError, match="at least 1"):
        Schedule(pairs=0)


def _model_file(folder: Path, megabytes: int = 0) -> Path:
    weight = np.ones((max(1, megabytes) * 256, 1024), np.float32)
    model = ir.from_onnx_text(
        """
        <ir_version: 9, opset_import: ["" : 17]>
        g (int64[n] ids) => (float[n, 1024] y) { y = Gather (w, ids) }
        """,
        initializers=[ir.Tensor(weight, name="w")],
    )
    path = folder / f"m{megabytes}.onnx"
    path.write_bytes(to_bytes(Model(model, origin=Origin(kind="memory", name="m"))))
    return path


@pytest.mark.skipif(peak_memory_bytes() is None, reason="the system does not account memory")
def test_peak_memory_is_the_childs_own(tmp_path: Path) -> None:
    ballast = np.ones(400 << 20, np.uint8)  # the parent is large: none of it may be counted
    feeds = {"ids": np.array([1, 2], np.int64)}
    small = measure_peak_memory(_model_file(tmp_path, 1), feeds, SessionOptions())
    large = measure_peak_memory(_model_file(tmp_path, 100), feeds, SessionOptions())
    assert (peak_memory_bytes() or 0) >= ballast.nbytes
    assert small["imports_bytes"] <= small["peak_bytes"] < 300 << 20
    assert large["peak_bytes"] - small["peak_bytes"] > 90 << 20


def test_a_cold_start_is_more_than_its_parts(tmp_path: Path) -> None:
    feeds = {"ids": np.array([1, 2], np.int64)}
    found = measure_cold_start(_model_file(tmp_path, 1), feeds, SessionOptions(), repeats=2)
    assert found.processes == len(found.each_ms) == 2
    assert min(found.import_ms, found.load_ms, found.first_run_ms) > 0
    assert found.cold_start_ms == statistics.median(found.each_ms)
    assert max(found.each_ms) > found.import_ms + found.load_ms


def test_a_model_that_fails_in_the_child(tmp_path: Path) -> None:
    path = _model_file(tmp_path)
    with pytest.raises(ModelError) as caught:
        measure_peak_memory(path, {"ids": np.array([1 << 40], np.int64)}, SessionOptions())
    assert "m0.onnx" in (caught.value.where or "")
    assert caught.value.why


def test_a_child_that_takes_too_long(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="too long"):
        measure_peak_memory(
            _model_file(tmp_path), {"ids": np.array([1], np.int64)}, SessionOptions(), timeout_s=0.001
        )


def test_a_killed_child_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_args: object, **_more: object) -> device_runner.ChildEnd:
        return device_runner.ChildEnd(stages=[], at_ms=[], code=-9, message="")

    monkeypatch.setattr(device_runner, "run_child", killed)
    with pytest.raises(RuntimeUnavailable, match="killed"):
        measure_peak_memory(_model_file(tmp_path), {"ids": np.array([1], np.int64)}, SessionOptions())


@pytest.mark.skipif(peak_memory_bytes() is None, reason="the system does not account memory")
def test_own_memory_is_read() -> None:
    assert 1 << 20 < (resident_memory_bytes() or 0) <= (peak_memory_bytes() or 0)


def test_a_pair_of_short_runs_goes_on_for_its_least_time() -> None:
    clock, log = _Clock(), []
    candidates = [_candidate(name, clock, log, lambda _: 1_000_000) for name in "ab"]
    schedule = Schedule(pairs=1, runs=4, warm_up_runs=1, least_pair_s=0.05)
    result = benchmark(candidates, schedule, clock_ns=clock)
    assert (result.timings[0].runs, result.runs_per_pair) == (25, 25)  # 25 times both is 50 ms
    endless = dataclasses.replace(schedule, least_pair_s=1e9)
    assert benchmark(candidates, endless, clock_ns=clock).runs_per_pair == 50 * 4


def test_long_runs_end_at_the_limits_of_pair_and_warm_up() -> None:
    clock, log = _Clock(), []
    candidates = [_candidate(name, clock, log, lambda _: 1_000_000_000) for name in "ab"]
    schedule = Schedule(pairs=1, runs=20, warm_up_runs=5, most_pair_s=1.0, warm_up_limit_s=0.5)
    result = benchmark(candidates, schedule, clock_ns=clock)
    assert result.timings[0].runs == 3
    assert result.timings[0].warm_up_runs == 2


def test_a_session_is_timed_without_checking_its_inputs_each_time(tmp_path: Path) -> None:
    session = OrtSession(_model_file(tmp_path), SessionOptions())
    feeds = {"ids": np.array([3, 1], np.int64)}
    once = session.repeated(feeds)
    (values,) = once()
    np.testing.assert_array_equal(values, session.run(feeds)["y"])
    with pytest.raises(DataError):
        session.repeated({"ids": np.array([3.0], np.float32)})
    broken = session.repeated({"ids": np.array([1 << 40], np.int64)})
    with pytest.raises(ModelError):
        broken()
    checks: list[int] = []

    class Counted(OrtSession):
        def repeated(self, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
            checks.append(1)
            return super().repeated(feeds)

        def run(self, *_: object) -> dict[str, np.ndarray]:
            raise AssertionError("the checked way is not what is timed")

    made = Candidate(
        name="a", open=lambda: Counted(_model_file(tmp_path), SessionOptions()), feeds=[feeds] * 2
    )
    result = benchmark([made], Schedule(pairs=2, runs=3, warm_up_runs=1))
    assert (len(checks), result.timings[0].runs) == (4, 6)  # each of two inputs, once a session
