"""Layers at other widths, timed many at a time, and what is made of the times."""

import numpy as np
import pytest
from edgepress.compress.prune.prune import open_pruner
from edgepress.driver.measuring.width_times import WidthTimes
from edgepress.driver.reporter import SilentReporter
from edgepress.runtimes.ort_runtime import OrtSession
from edgepress.runtimes.timing import BenchmarkResult, Timing
from edgepress.runtimes.timing_jobs import JobOutcome
from prune_case import parse, weights

NET = """(float[N,8,8,8] x) => (float[N,4,8,8] y) { [first] a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a)
    [middle] b = Conv<pads=[1,1,1,1]>(r, v) s = Relu(b) [last] y = Conv<pads=[1,1,1,1]>(s, u) }"""
SHAPES = {"w": (16, 8, 3, 3), "v": (32, 16, 3, 3), "u": (4, 32, 3, 3)}


class Timer:
    """Milliseconds by a layer's bytes; the runtime refuses what has no weights."""

    name = "timer"

    def __init__(self):
        self.groups = []

    def time_jobs(self, jobs, *, budget_s):
        assert budget_s == float("inf")
        jobs = list(jobs)
        self.groups.append(len(jobs))
        for index, job in enumerate(jobs):
            (form,), feeds = job.build()
            OrtSession(form.model, form.options).run(feeds)  # it is a whole model
            if form.name == "Relu":
                yield JobOutcome(index=index, reason="not here")
            else:
                yield JobOutcome(index=index, result=result(len(form.model) / 4000))


def result(ms):
    timing = Timing(
        name="Conv", runs=1, sessions=1, warm_up_runs=0, mean_ms=ms, min_ms=ms, p50_ms=ms, p90_ms=ms,
        p99_ms=ms, throughput_per_s=1.0, load_ms=1.0,
    )  # fmt: skip
    return BenchmarkResult(timings=(timing,), comparisons=(), pairs=1, runs_per_pair=1)


@pytest.fixture
def pruner():
    return open_pruner(parse(NET, weights(**SHAPES)), None, {"N": 1}, importance="magnitude")


def test_layers_travel_together_and_narrower_ones_cost_less(pruner):
    timer = Timer()
    times = WidthTimes(pruner, {"N": 1}, device=timer, threads=1, whole_ms=100.0, reporter=SilentReporter())
    assert len(timer.groups) == 1 + len(pruner.groups)  # once for the layers as they are, once for each group
    assert timer.groups[0] >= 3
    nothing = [0] * len(pruner.groups)
    assert times.total(nothing) == pytest.approx(100.0)
    for group, count in enumerate(pruner.units):
        gone = [count // 2 if place == group else 0 for place in range(len(pruner.groups))]
        assert times.total(gone) < 100.0
        steps = times.of_group(group, nothing, range(count))
        assert (np.diff(steps) <= 1e-9).all()
        assert steps[0] > steps[-1]
