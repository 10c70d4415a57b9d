"""The timing loop: order, interleaving, statistics against slow loops, memory of a child process."""

from __future__ import annotations

import dataclasses
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from edgepress.graph.errors import DataError, ModelError, RuntimeUnavailable
from edgepress.graph.model import Model, Origin
from edgepress.graph.save import to_bytes
from edgepress.runtimes import peak_memory
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.cpu import peak_memory_bytes, resident_memory_bytes
from edgepress.runtimes.peak_memory import measure_peak_memory
from edgepress.runtimes.timing import BenchmarkResult, Candidate, Schedule, benchmark, compare
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
    assert result.timings[0].p99_ms == pytest.approx(0.001)


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
    assert log[-4:] == ["a0", "a1", "a2", "a0"]


def _slow_percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, written out."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


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
    for percent, value in ((50, timing.p50_ms), (90, timing.p90_ms), (99, timing.p99_ms)):
        assert value == pytest.approx(_slow_percentile(values_ms, percent))
    assert timing.throughput_per_s == pytest.approx(4 * len(costs) / (sum(costs) / 1e9))
    assert timing.load_ms == 2.0


def test_ratios_are_those_of_the_medians_pair_by_pair() -> None:
    comparison = compare("a", "b", [[10, 30, 20], [40, 40, 40]], [[10, 10, 10], [10, 20, 30]])
    assert comparison.pair_ratios == (2.0, 2.0)
    comparison = compare("a", "b", [[30], [20], [100]], [[10], [10], [10]])
    assert (comparison.ratio, comparison.low, comparison.high) == (3.0, 2.0, 10.0)
    assert comparison.ratio == statistics.median(comparison.pair_ratios)


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


def test_the_child_imports_only_numpy_and_onnxruntime() -> None:
    code = (
        "import sys, edgepress.runtimes.peak_memory; "
        "print(sorted({'numpy', 'onnxruntime', 'onnx', 'onnx_ir', 'msgspec', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


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
    def killed(*_args: object, **_more: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(args=[], returncode=-9, stdout="", stderr="")

    monkeypatch.setattr(peak_memory.subprocess, "run", killed)
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
