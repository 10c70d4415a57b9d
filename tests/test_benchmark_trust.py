"""The scripts that show whether measurements can be trusted: what they count, resume and refuse."""

import argparse
import json
import math

import pytest
from edgepress.benchmarks import loadgen_agreement, runner_overhead, self_comparison
from edgepress.benchmarks.float_chain import chain_feeds, open_session, write_chain
from edgepress.runtimes import device_runner as runner


def slow_least_hits(count):
    """The least k with P(X >= k) > 95 %, summed from the binomial formula."""
    chances = [math.comb(count, k) * 0.95**k * 0.05 ** (count - k) for k in range(count + 1)]
    return max(k for k in range(count + 1) if sum(chances[:k]) <= 0.05)


@pytest.mark.parametrize("count", [2, 5, 12, 20, 40, 100])
def test_how_many_intervals_have_to_hold_the_truth(count):
    assert self_comparison.least_hits(count) == slow_least_hits(count)


def test_forty_comparisons_ask_for_thirty_six():
    assert self_comparison.least_hits(40) == 36


def line(ratio, half, p50, *, key="k", void=False):
    return {
        **{"key": key, "ratio": ratio, "low": ratio - half, "high": ratio + half, "void": void},
        "p50_ms": {"bundle": p50, "baseline": p50 * ratio},
    }


def test_comparisons_are_summed_up():
    lines = [line(1.0, 0.01, 5.0), line(1.03, 0.02, 5.5), line(0.99, 0.03, 6.0, void=True)]
    found = self_comparison.summary(lines)
    assert (found["intervals_with_1"], found["asked"], found["void"]) == (2, [slow_least_hits(3), 3], 1)
    assert found["median_half_width"] == pytest.approx(0.02 / 1.03)
    assert found["largest_deviation"] == pytest.approx(0.03)
    assert found["p50_spread"] == pytest.approx(0.5 / 5.5)
    assert (found["p50_ms"]["low"], found["p50_ms"]["high"]) == (5.0, 6.0)


def test_a_record_counts_only_what_was_measured_in_the_same_way(tmp_path):
    record = tmp_path / "record.jsonl"
    assert self_comparison.recorded(record, "k") == []
    lines = [line(1.0, 0.01, 5.0), line(1.0, 0.01, 5.0, key="another"), line(1.1, 0.01, 5.0)]
    record.write_text("".join(json.dumps(item) + "\n" for item in lines))
    assert self_comparison.recorded(record, "k") == [lines[0], lines[2]]


def test_another_way_of_measuring_has_another_digest(monkeypatch):
    before = self_comparison.method_digest()
    assert before == self_comparison.method_digest()
    monkeypatch.setattr(runner, "pair_ratio", lambda before, after: before[0] / after[0])
    assert self_comparison.method_digest() != before


class Session:
    """A session whose runs take as many ticks as it is told."""

    def __init__(self, clock):
        self.clock = clock

    def run(self, _names, _feeds):
        self.clock.now += 1000


class Clock:
    """Nanoseconds that pass in runs only, and when the clock is read."""

    def __init__(self, tick):
        self.now, self.tick = 0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def test_blocks_time_a_run_with_what_the_loop_costs(monkeypatch):
    clock = Clock(10)
    monkeypatch.setattr(runner_overhead.time, "perf_counter_ns", clock)
    whole, reported = runner_overhead.bare_block(Session(clock), {}, 20)
    assert reported == 1010.0
    assert whole == pytest.approx(1020.0, abs=1.0)  # the clock is read twice for each run


def test_an_idle_loop_costs_next_to_nothing():
    assert runner_overhead.loop_cost_ns(rounds=5, runs=200) < 0.01 * 5e6


def test_the_chain_has_the_layers_that_it_is_asked_for(tmp_path):
    write_chain(tmp_path / "m.onnx", 2)
    (output,) = open_session(tmp_path / "m.onnx").run(None, chain_feeds())
    assert output.shape == (1, 64, 512)
    assert 0.1 < output.std() < 10  # neither dies out nor grows
    assert output.min() == 0.0


def stream(**changes):
    found = {
        **{"valid": True, "percentile_ms": 2.0},
        "latency": {"p50_ms": 1.0, "p90_ms": 2.0, "p99_ms": 3.0, "p99_9_ms": None},
        "early_stopping": {"met": True, "estimate_ms": 2.5, "discarded": 3, "least_queries": None},
    }
    return {**found, **changes}


def test_agreement_sees_every_difference():
    theirs = stream()
    assert all(same for *_, same in loadgen_agreement.compared(stream(), theirs))
    stopping = {**theirs["early_stopping"], "discarded": 4}
    latency = {**theirs["latency"], "p99_9_ms": 9.0}
    for changes in ({"valid": False}, {"percentile_ms": 2.000001}, {"early_stopping": stopping}):
        rows = loadgen_agreement.compared(stream(**changes), theirs)
        assert sum(not same for *_, same in rows) == 1
    assert sum(not same for *_, same in loadgen_agreement.compared(stream(latency=latency), theirs)) == 1
    offline = {"valid": True, "throughput_per_s": 1000.0}
    assert loadgen_agreement.compared({**offline, "throughput_per_s": 1000.001}, offline)[1][3] is True
    assert loadgen_agreement.compared({**offline, "throughput_per_s": 1001.0}, offline)[1][3] is False


def test_the_light_form_judges_offline_by_its_duration():
    case = loadgen_agreement.Case(
        title="", scenario="Offline", plan=runner.ScenarioPlan(seconds=1.0), typical_ms=1.0
    )
    found = loadgen_agreement.light(case, [500_000_000, 2_000_000_000], 400)
    assert found == {"throughput_per_s": 200.0, "valid": True}
    assert loadgen_agreement.light(case, [900_000_000], 400)["valid"] is False


def test_a_comparison_that_times_nothing_is_said(tmp_path):
    options = argparse.Namespace(pairs=1, runs=1)
    with pytest.raises(SystemExit, match="not an edgepress bundle"):
        self_comparison.compare_once(tmp_path, options)
