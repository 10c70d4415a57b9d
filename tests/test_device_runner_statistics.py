"""The device runner's percentiles, intervals, early stopping, scenarios: against slow loops, LoadGen."""

import itertools
import json
import math
import random
import re
import statistics
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from edgepress.runtimes import device_runner as runner
from hypothesis import given
from hypothesis import strategies as st

LOADGEN = json.loads((Path(__file__).with_name("data_device") / "loadgen.json").read_text())
chances = st.sampled_from(
    [Fraction(1, 1000), Fraction(1, 100), Fraction(1, 10), Fraction(1, 2), Fraction(9, 10)]
)


def slow_cdf(successes, trials, chance):
    """P(X <= successes), term by term in exact fractions."""
    terms = (
        math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k)
        for k in range(min(successes, trials) + 1)
    )
    return sum(terms, Fraction(0))


@given(trials=st.integers(1, 120), chance=chances, data=st.data())
def test_binomial_cdf_equals_exact_fractions(trials, chance, data):
    successes = data.draw(st.integers(-1, trials + 1))
    exact = slow_cdf(successes, trials, chance)
    assert runner.binomial_cdf(successes, trials, float(chance)) == pytest.approx(float(exact), rel=1e-10)


def test_binomial_cdf_of_many_trials_is_quick_and_near_the_normal_one():
    for trials, chance in ((1_000_000, 0.1), (10_000_000, 0.01)):
        middle, spread = trials * chance, math.sqrt(trials * chance * (1 - chance))
        for z in (-2.0, 0.0, 2.0):
            normal = statistics.NormalDist().cdf(z)
            found = runner.binomial_cdf(round(middle + z * spread), trials, chance)
            assert found == pytest.approx(normal, abs=2e-3)
    assert runner.binomial_cdf(5, 10, 0.0) == 1.0
    assert runner.binomial_cdf(5, 10, 1.0) == 0.0


@given(values=st.lists(st.integers(1, 10**6), min_size=1, max_size=300))
def test_percentile_is_the_rank_that_loadgen_takes(values):
    ordered = sorted(values)
    for _, fraction in runner.QUANTILES:
        found = runner.percentile(ordered, fraction)
        assert found == ordered[math.floor(len(values) * fraction)]
        assert sum(value <= found for value in values) > len(values) * fraction - 1e-9
    assert runner.percentile(ordered, 0.0) == ordered[0]


@pytest.mark.parametrize(("values", "fraction"), [([], 0.5), ([1.0], 1.0), ([1.0], -0.1)])
def test_a_percentile_of_nothing_or_beyond_all(values, fraction):
    with pytest.raises(ValueError, match="percentile"):
        runner.percentile(values, fraction)


@given(n=st.integers(1, 60), fraction=st.sampled_from([Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)]))
def test_quantile_interval_equals_a_slow_search(n, fraction):
    tail = Fraction(1, 40)
    lows = [rank for rank in range(1, n + 1) if slow_cdf(rank - 1, n, fraction) <= tail]
    highs = [rank for rank in range(1, n + 1) if 1 - slow_cdf(rank - 1, n, fraction) <= tail]
    ordered = [float(rank) for rank in range(1, n + 1)]  # each value is its rank
    expected = (float(max(lows)) if lows else None, float(min(highs)) if highs else None)
    assert runner.quantile_interval(ordered, float(fraction)) == expected


def test_quantile_intervals_hold_the_true_quantile_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for fraction in (0.5, 0.9):
        truth = -math.log(1 - fraction)  # of the exponential distribution
        hits = 0
        for _ in range(400):
            low, high = runner.quantile_interval(sorted(rng.exponential(size=200)), fraction)
            hits += low <= truth <= high
        assert hits >= 0.95 * 400 - 3 * math.sqrt(400 * 0.95 * 0.05)


def test_summary_leaves_out_what_the_count_cannot_show():
    found = runner.summarise([value * 1_000_000 for value in range(1, 51)])
    assert (found["runs"], found["min_ms"], found["max_ms"], found["mean_ms"]) == (50, 1.0, 50.0, 25.5)
    assert (found["p50_ms"], found["p90_ms"]) == (26.0, 46.0)
    assert found["p99_ms"] is found["p99_9_ms"] is None
    low, high = found["intervals_ms"]["p50"]
    assert 15 <= low < 26 < high <= 36
    assert found["intervals_ms"]["p90"][1] == 50.0
    many = runner.summarise(list(range(1, 1001)))
    assert many["p99_9_ms"] == 1000 / 1e6
    assert many["intervals_ms"]["p99_9"][1] is None  # nothing that was seen bounds it


def slow_min_passing(over, fraction):
    for passing in itertools.count(1):
        if slow_cdf(over, passing + over, 1 - fraction) < Fraction(1, 100):
            return passing
    raise AssertionError


@pytest.mark.parametrize("over", [0, 1, 2, 5, 9])
def test_least_passing_queries_equal_a_slow_search(over):
    assert runner.min_passing_queries(over, 0.9) == slow_min_passing(over, Fraction(9, 10))


def test_least_passing_queries_are_those_of_mlperf():
    # What LoadGen's summaries say: 64 queries for the 90th, 662 for the 99th percentile.
    assert runner.min_passing_queries(1, 0.9) + 1 == 64
    assert runner.min_passing_queries(1, 0.99) + 1 == 662
    counts = [runner.min_passing_queries(over, 0.99) for over in range(0, 400, 20)]
    assert all(later - earlier >= 20 * 99 for earlier, later in itertools.pairwise(counts))


def check_against_loadgen(record):
    """Percentiles and early stopping of latencies, against what LoadGen's summary said of them."""
    ordered = sorted(record["latencies_ns"])
    for percent, latency_ns in record["percentiles_ns"].items():
        assert runner.percentile(ordered, float(percent) / 100) == latency_ns
    assert sum(ordered) // len(ordered) == record["mean_ns"]
    said = "\n".join(record["early_stopping"])
    satisfied = record["early_stopping_satisfied"] == "Yes"
    if record["scenario"] == "Server":
        plan = runner.ScenarioPlan(bound_ms=record["target_latency_ns"] / 1e6)
        found = runner.server_result(ordered, plan, len(ordered))
        assert found["early_stopping"]["met"] is satisfied
        assert found["valid"] is (record["result"] == "VALID")
        more = re.search(r"at least (\d+) more", said)
        assert found["early_stopping"]["more_queries"] == (int(more[1]) if more else 0)
        return
    fraction = runner.SCENARIO_FRACTIONS[record["scenario"]]
    assert runner.percentile(ordered, fraction) == record["headline"]
    found = runner.early_stopping(ordered, fraction)
    assert found["met"] is satisfied
    if not satisfied:
        assert found["least_queries"] == int(re.search(r"at least (\d+) queries", said)[1])
        return
    assert found["discarded"] == int(re.search(r"discard (\d+)", said)[1])
    assert found["estimate"] == int(re.search(r"estimate: (\d+)", said)[1])
    result = runner.stream_result(record["scenario"], ordered)
    assert result["early_stopping"]["estimate_ms"] == found["estimate"] / 1e6
    assert result["valid"] is True


@pytest.mark.parametrize("name", sorted(LOADGEN))
def test_the_same_latencies_give_what_loadgen_recorded(name):
    check_against_loadgen(LOADGEN[name])


LOADGEN_PROGRAM = """
import queue, random, sys, threading, time
import mlperf_loadgen as lg
scenario, count, folder, bound_ns = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
draw, waiting = random.Random(3), queue.Queue()
def work():
    while True:
        ids = waiting.get()
        time.sleep(2e-4 * draw.lognormvariate(0, 0.5))
        lg.QuerySamplesComplete([lg.QuerySampleResponse(item, 0, 0) for item in ids])
threading.Thread(target=work, daemon=True).start()
sut = lg.ConstructSUT(lambda samples: waiting.put([s.id for s in samples]), lambda: None)
qsl = lg.ConstructQSL(64, 64, lambda _: None, lambda _: None)
settings = lg.TestSettings()
settings.scenario = getattr(lg.TestScenario, scenario)
settings.mode = lg.TestMode.PerformanceOnly
settings.min_duration_ms, settings.min_query_count, settings.max_query_count = 10, count, count
settings.multi_stream_samples_per_query = 8
settings.server_target_qps, settings.server_target_latency_percentile = 1000, 0.99
settings.server_target_latency_ns = bound_ns
output, log = lg.LogOutputSettings(), lg.LogSettings()
output.outdir = folder
log.log_output, log.enable_trace = output, True
lg.StartTestWithLogSettings(sut, qsl, settings, log)
"""


def loadgen_record(scenario, folder):
    latencies = {}
    for line in (folder / "mlperf_log_trace.json").read_text().splitlines():
        found = re.search(r'"query_seq":(\d+).*"complete_ns":(\d+)', line)
        if found:
            latencies[found[1]] = max(latencies.get(found[1], 0), int(found[2]))
    summary = (folder / "mlperf_log_summary.txt").read_text()
    stopping = summary.split("Early Stopping Result:")[1].split("=====")[0]
    headline = re.search(r"th percentile latency \(ns\) : (\d+)", summary)
    return {
        "scenario": scenario,
        "latencies_ns": list(latencies.values()),
        "percentiles_ns": {
            percent: int(value)
            for percent, value in re.findall(
                r"^([\d.]+) percentile latency \(ns\)\s+: (\d+)", summary, re.MULTILINE
            )
        },
        "mean_ns": int(re.search(r"Mean latency \(ns\)\s+: (\d+)", summary)[1]),
        "early_stopping": [line.strip(" *") for line in stopping.splitlines()],
        "early_stopping_satisfied": re.search(r"Early stopping satisfied: (\w+)", summary)[1],
        "result": re.search(r"Result is : (\w+)", summary)[1],
        "target_latency_ns": int(re.search(r"target_latency \(ns\): (\d+)", summary)[1]),
        "headline": int(headline[1]) if headline else None,
    }


@pytest.mark.parametrize(
    ("scenario", "count", "bound_ns"),
    [
        ("SingleStream", 500, 0),
        ("MultiStream", 800, 0),
        ("Server", 900, 2_000_000),
        ("Server", 900, 10_000_000),
    ],
)
def test_the_same_latencies_give_what_loadgen_says_here(scenario, count, bound_ns, tmp_path):
    pytest.importorskip("mlperf_loadgen", reason="the official LoadGen is not installed")
    command = [sys.executable, "-c", LOADGEN_PROGRAM, scenario, str(count), str(tmp_path), str(bound_ns)]
    subprocess.run(command, check=True, timeout=120)
    record = loadgen_record(scenario, tmp_path)
    assert len(record["latencies_ns"]) == count
    check_against_loadgen(record)


def slow_student_cdf(x, degrees):
    """The distribution's integral by the midpoint rule."""
    factor = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    grid = (np.arange(200_000) + 0.5) * x / 200_000
    return 0.5 + factor * float(np.sum((1 + grid**2 / degrees) ** (-(degrees + 1) / 2))) * x / 200_000


@pytest.mark.parametrize("degrees", [1, 2, 5, 7, 17, 30, 31, 60, 200])
def test_student_quantiles_equal_the_integral(degrees):
    assert slow_student_cdf(runner.student_95(degrees), degrees) == pytest.approx(0.975, abs=2e-4)


def test_ratio_intervals_hold_the_truth_as_often_as_they_say():
    draw, hits = random.Random(5), 0
    for _ in range(2000):
        ratios = [1.25 * math.exp(draw.gauss(0, 0.01)) for _ in range(8)]
        middle, low, high = runner.ratio_interval(ratios)
        assert low < middle < high
        hits += low <= 1.25 <= high
    assert 0.93 * 2000 <= hits <= 0.97 * 2000
    assert runner.ratio_interval([2.0]) == (pytest.approx(2.0), None, None)
    assert runner.ratio_interval([2.0, 0.5])[0] == pytest.approx(1.0)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=40))
def test_a_pairs_ratio_is_the_median_of_neighbours(runs):
    ratios = sorted(Fraction(before, after) for before, after in runs)
    middle = len(ratios) // 2
    exact = ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2
    found = runner.pair_ratio([before for before, _ in runs], [after for _, after in runs])
    assert found == pytest.approx(float(exact))


def test_other_work_that_comes_and_goes_does_not_move_a_ratio():
    # Twice as slow for some runs on end; one of the two has just one run more in the slow time.
    slow = [1.0] * 14 + [2.0] * 16
    before = [1250.0 * factor for factor in slow]
    after = [1000.0 * factor for factor in [1.0] * 16 + [2.0] * 14]
    assert runner.pair_ratio(before, after) == pytest.approx(1.25)
    assert statistics.median(before) / statistics.median(after) == pytest.approx(2.5)


def test_intervals_hold_the_truth_when_neighbours_share_the_noise():
    # Load that lasts for many runs, bursts that hit single runs, and an offset of each session.
    draw, hits, halves = random.Random(11), 0, []
    for _ in range(300):
        series, process = {"a": [], "b": []}, draw.gauss(0, runner._PROCESS_SPREAD)
        for _ in range(8):
            offsets = {name: draw.gauss(0, 0.003) + process * (name == "a") for name in series}
            load = 0.0
            for values in series.values():
                values.append([])
            for _ in range(30):
                load = 0.95 * load + draw.gauss(0, 0.1)
                for name, values in series.items():
                    burst = 0.5 if draw.random() < 0.05 else 0.0
                    values[-1].append(1e6 * math.exp(offsets[name] + load + burst + draw.gauss(0, 0.01)))
        found = runner.compare({"series_ns": series["a"]}, {"series_ns": series["b"]})
        hits += found["low"] <= 1.0 <= found["high"]
        halves.append((found["high"] - found["low"]) / 2)
    assert 0.92 * 300 <= hits <= 0.98 * 300
    assert statistics.median(halves) < 0.01  # though the load changes latencies by 30 %


def test_intervals_of_percentiles_hold_the_truth_though_runs_of_a_session_are_alike():
    draw, hits, pooled = random.Random(3), 0, 0
    for _ in range(200):
        offsets = [draw.gauss(0, 0.02) for _ in range(8)]
        series = [
            [round(1e6 * math.exp(offset + draw.gauss(0, 0.005))) for _ in range(40)] for offset in offsets
        ]
        found = runner.latency_of({"series_ns": series, "load_ms": [1.0] * 8, "warm_up_runs": 0})
        low, high = found["intervals_ms"]["p50"]
        hits += low <= 1.0 <= high
        low, high = runner.quantile_interval(sorted(value for one in series for value in one), 0.5)
        pooled += low <= 1e6 <= high
    assert hits >= 0.92 * 200
    assert pooled < 0.6 * 200  # as if all runs were independent


def test_a_tail_of_few_runs_is_bounded_by_order_statistics_alone():
    draw = random.Random(0)
    series = [[round(1e6 * draw.lognormvariate(0, 0.1)) for _ in range(150)] for _ in range(3)]
    series[0][7] = 10**9  # one run of 450
    found = runner.latency_of({"series_ns": series, "load_ms": [1.0] * 3, "warm_up_runs": 0})
    pooled = runner.summarise([value for one in series for value in one])["intervals_ms"]
    assert found["intervals_ms"]["p99"] == pooled["p99"]
    assert found["intervals_ms"]["p90"][1] >= pooled["p90"][1]


def test_a_percentile_is_not_below_a_lower_one():
    found = runner.in_order([[1.0, 2.0], [1.5, 9.0], [0.1, 7.0], [None, None]])
    assert found == [[1.0, 2.0], [1.5, 7.0], [1.5, 7.0], [None, None]]
    assert runner.in_order([[1.0, 8.0], [2.0, 5.0]]) == [[1.0, 5.0], [2.0, 5.0]]
    assert runner.in_order([]) == []


def test_an_interval_is_only_widened():
    assert runner.widened([9.0, 11.0], [10.0]) == [9.0, 11.0]
    assert runner.widened([9.0, 11.0], [10.0, 10.0, 10.0]) == [9.0, 11.0]
    low, high = runner.widened([9.9, None], [9.0, 10.0, 11.0])
    assert high is None
    assert low == pytest.approx(runner.ratio_interval([9.0, 10.0, 11.0])[1])


class Clock:
    """A clock in nanoseconds that moves when somebody works or sleeps, and by a little when it is read."""

    def __init__(self, tick_ns=10):
        self.now_ns, self.tick_ns = 0, tick_ns

    def __call__(self):
        self.now_ns += self.tick_ns
        return self.now_ns

    def work(self, ns):
        self.now_ns += ns

    def sleep(self, seconds):
        assert seconds > 0
        self.now_ns += round(seconds * 1e9)


def test_sessions_alternate_runs_interleave_and_gaps_are_not_timed():
    clock, log = Clock(0), []

    def entry(name, cost_ns):
        def opened():
            log.append(f"open {name}")
            return (lambda: (log.append(name), clock.work(cost_ns))), 2.0

        return runner.Entry(name, opened)

    def between():
        log.append("between")
        clock.work(10**12)

    plan = runner.Plan(pairs=2, runs=3, warm_up_runs=1, least_pair_s=0.0, limit_s=1e9)
    timed = runner.time_entries([entry("a", 3000), entry("b", 1500)], plan, between=between, clock_ns=clock)
    warm = 10  # two windows of five that agree
    first = ["open a", "open b", *["a"] * warm, *["b"] * warm, *["a", "b"] * 3, "between"]
    second = ["open b", "open a", *["b"] * warm, *["a"] * warm, *["b", "a"] * 3, "between"]
    assert log == first + second
    assert timed["a"]["series_ns"] == [[3000] * 3] * 2
    assert runner.compare(timed["a"], timed["b"])["pair_ratios"] == [2.0, 2.0]
    latency = runner.latency_of(timed["b"], samples_per_run=4)
    assert (latency["p50_ms"], latency["sessions"], latency["warm_up_runs"]) == (0.0015, 2, 20)
    assert latency["throughput_per_s"] == pytest.approx(4 / 1.5e-6)
    assert latency["load_ms"] == 2.0


def test_timing_stops_at_its_limit_and_goes_on_for_short_runs():
    clock = Clock(0)
    entry = runner.Entry("a", lambda: (lambda: clock.work(1_000_000), 0.0))
    plan = runner.Plan(pairs=9, runs=2, warm_up_runs=1, least_pair_s=0.05, limit_s=0.1)
    series = runner.time_entries([entry], plan, clock_ns=clock)["a"]["series_ns"]
    assert [len(item) for item in series] == [50, 50]  # 50 ms each, and two pairs whatever the limit


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (lambda _: 1000, 10),
        (lambda count: 1000 + max(0, 20 - count) * 1000, range(21, 51)),
        (lambda count: 1000 * 2**count, 50),  # never settles: ten times the least
    ],
)
def test_warm_up_lasts_until_runs_are_steady(cost, expected):
    clock, count = Clock(0), itertools.count()
    found = runner.warm_up(lambda: clock.work(cost(next(count))), runner.Plan(warm_up_runs=5), clock)
    assert found in (expected if isinstance(expected, range) else [expected])


def test_a_stream_lasts_for_all_of_its_minima():
    for plan, expected in (
        (runner.ScenarioPlan(seconds=0.0), 64),  # what early stopping asks for
        (runner.ScenarioPlan(seconds=0.0, queries=100), 100),
        (runner.ScenarioPlan(seconds=0.2), 200),
        (runner.ScenarioPlan(seconds=0.0, most_s=0.005), 5),
    ):
        clock = Clock(0)
        latencies = runner.stream_latencies(lambda clock=clock: clock.work(1_000_000), plan, 0.9, clock)
        assert latencies == [1_000_000] * expected


def test_arrivals_are_poisson_and_repeat():
    arrivals = runner.poisson_arrivals(50.0, 20_000, seed=1)
    assert arrivals == runner.poisson_arrivals(50.0, 20_000, seed=1)
    assert arrivals != runner.poisson_arrivals(50.0, 20_000, seed=2)
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)  # exponential: as large as the mean
    assert np.mean(gaps > 1 / 50) == pytest.approx(math.exp(-1), abs=0.02)


@given(
    gaps=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    costs=st.lists(st.integers(1, 30), min_size=40),
)
def test_a_server_queues_what_it_cannot_answer_yet(gaps, costs):
    # Whole milliseconds; the recursion is Lindley's.
    clock, cost = Clock(2000), iter(costs)
    arrivals = list(itertools.accumulate([0, *gaps]))[: len(gaps)]
    found = runner.serve(
        lambda: clock.work(next(cost) * 1_000_000),
        [arrival / 1e3 for arrival in arrivals],
        clock_ns=clock,
        sleep=clock.sleep,
    )
    free, expected = 0, []
    for arrival, taken in zip(arrivals, costs, strict=False):
        free = max(free, arrival) + taken
        expected.append(free - arrival)
    assert found == pytest.approx([value * 1e6 for value in expected], abs=400_000)


def test_offline_ends_in_time_and_is_not_valid_then():
    plan = runner.ScenarioPlan(seconds=0.0, queries=10**9, samples_per_query=2, most_s=0.01)
    found = runner.run_scenario("Offline", lambda _: lambda: None, plan)
    assert found["seconds"] < 5
    assert (found["valid"], found["samples"] >= 2) == (False, True)


def test_offline_and_the_choice_of_batches():
    asked = []

    def query(samples):
        asked.append(samples)
        return lambda: None

    plan = runner.ScenarioPlan(seconds=0.0, queries=100, samples_per_query=8)
    offline = runner.run_scenario("Offline", query, plan)
    assert (offline["samples"], offline["valid"]) == (104, True)
    assert offline["throughput_per_s"] == pytest.approx(104 / offline["seconds"])
    assert runner.run_scenario("MultiStream", query, plan)["latency"]["runs"] == 662
    assert runner.run_scenario("SingleStream", query, plan)["latency"]["runs"] == 100
    served = runner.ScenarioPlan(seconds=0.0, qps=1e6, bound_ms=1000.0)
    assert runner.run_scenario("Server", query, served)["early_stopping"] == {
        "met": True,
        "over": 0,
        "more_queries": 0,
    }
    assert asked == [8, 8, 1, 1]


@given(st.lists(st.floats(0.5, 2.0), min_size=6, max_size=12))
def test_an_interval_of_pairs_is_least_squares_with_the_order_as_a_second_unknown(ratios):
    logs, count = np.log(ratios), len(ratios)
    design = np.stack([np.ones(count), (-1.0) ** np.arange(count)], axis=1)
    found, *_ = np.linalg.lstsq(design, logs, rcond=None)
    noise = np.sum((logs - design @ found) ** 2) / (count - 2)
    own = runner.student_95(count - 2) * np.sqrt(noise * np.linalg.inv(design.T @ design)[0, 0])
    half = np.hypot(own, 1.960 * runner._PROCESS_SPREAD)
    middle, low, high = runner.balanced_interval(ratios)
    assert middle == pytest.approx(np.exp(found[0]))
    assert low == pytest.approx(np.exp(found[0] - half), abs=1e-9)
    assert high == pytest.approx(np.exp(found[0] + half), abs=1e-9)


def test_the_order_of_opening_widens_no_interval_and_moves_no_ratio():
    noise = [1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01, 0.99]
    ordered = [value * (1.05 if index % 2 == 0 else 1 / 1.05) for index, value in enumerate(noise)]
    assert runner.balanced_interval(ordered) == pytest.approx(runner.balanced_interval(noise))
    _, low, high = runner.ratio_interval(ordered)
    _, low_balanced, high_balanced = runner.balanced_interval(ordered)
    assert high_balanced - low_balanced < (high - low) / 3
    few, plain = runner.balanced_interval(ordered[:4]), runner.ratio_interval(ordered[:4])
    assert few[0] == plain[0]
    assert few[1] == pytest.approx(plain[1], rel=1e-3)
    assert few[1] < plain[1] < plain[2] < few[2]
    assert runner.balanced_interval([1.1])[1:] == (None, None)


def test_balanced_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(2000):
        common = generator.normal(0.02, runner._PROCESS_SPREAD)  # of all pairs of one process
        logs = 0.03 * (-1.0) ** np.arange(8) + generator.normal(common, 0.01, 8)
        _, low, high = runner.balanced_interval(np.exp(logs).tolist())
        hits += low <= math.exp(0.02) <= high
    assert 0.935 <= hits / 2000 <= 0.965
