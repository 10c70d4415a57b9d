"""What is said of two runs: changes, their intervals, and how often they are wrong about equal runs."""

import contextlib
import math
import statistics

import msgspec
import numpy as np
import pytest
from edgepress.driver.history.compare import Pair, Spread, change, latest_before, match, spreads_of
from edgepress.driver.history.gate import judge, parse_gate
from edgepress.driver.history.rows import METRICS_BY_NAME, Measurement
from edgepress.graph.errors import RecipeError
from edgepress.runtimes import device_runner
from hypothesis import given
from hypothesis import strategies as st

P50, P90, SIZE, MEMORY = (METRICS_BY_NAME[name] for name in ("p50", "p90", "size", "peak_memory"))


def row(run="a", **fields):
    given = {
        "thing": "bundle", "role": "bundle", "kind": "benchmark", "started": "2026-01-31T12:00:00Z",
        "device": "local", "url": "local", "cpu": "Cortex", "threads": 1, "shapes": "x:1x3", "model": "net",
        "target": "host", "bundle_digest": "d1",
    }  # fmt: skip
    return Measurement(run=run, **(given | fields))


def timed(values_ms, run="a", **fields):
    """A row of latencies given session by session, in ms."""
    series = [[round(value * 1e6) for value in session] for session in values_ms]
    found = device_runner.latency_of({"series_ns": series, "load_ms": [1.0] * len(series), "warm_up_runs": 5})
    intervals = {
        f"{name}_{side}_ms": bound
        for name, sides in found["intervals_ms"].items()
        for side, bound in zip(("low", "high"), sides, strict=True)
    }
    figures = {f"{name}_ms": found[f"{name}_ms"] for name in ("p50", "p90", "p99", "mean")}
    sessions = {name: tuple(values) for name, values in found["session_ms"].items()}
    return row(run, sessions_ms=sessions, runs=found["runs"], **{**figures, **intervals, **fields})


def drawn(rng, run, *, factor=1.0, run_spread=0.0, session_spread=0.01, sessions=8, runs=30):
    base = 10 * factor * math.exp(rng.normal(0, run_spread))
    return timed(
        [
            base * math.exp(rng.normal(0, session_spread)) * np.exp(rng.gamma(2, 0.01, runs))
            for _ in range(sessions)
        ],
        run,
    )


def test_a_change_by_sessions_has_students_interval():
    before = row("a", p50_ms=10.0, sessions_ms={"p50": (9.9, 10.0, 10.2, 10.1)})
    after = row("b", p50_ms=12.0, sessions_ms={"p50": (12.1, 11.9, 12.3, 11.6)})
    logs = [math.log(b / a) for a, b in zip((9.9, 10.0, 10.2, 10.1), (12.1, 11.9, 12.3, 11.6), strict=True)]
    half = 3.182 * statistics.stdev(logs) / 2
    found = change(P50, before, after, Spread(deviation=1e-6, degrees=5))
    middle = math.exp(sum(logs) / 4)
    assert found.ratio == pytest.approx(middle)
    assert found.low == pytest.approx(middle * math.exp(-half), rel=1e-9)
    assert found.high == pytest.approx(middle * math.exp(half), rel=1e-9)
    assert (found.basis, found.verdict) == ("sessions", "higher")
    # The figures of the whole run lie elsewhere: the interval holds them, too.
    torn = change(P50, before, msgspec.structs.replace(after, p50_ms=5.0), Spread(deviation=1e-6, degrees=5))
    assert (torn.ratio, torn.low, torn.verdict) == (found.ratio, 0.5, "no difference")


def test_without_sessions_the_percentiles_intervals_are_divided():
    before = row("a", p90_ms=10.0, p90_low_ms=8.0, p90_high_ms=12.0)
    after = row("b", p90_ms=11.0, p90_low_ms=9.0, p90_high_ms=13.0)
    found = change(P90, before, after)
    # The usual spread of 1 % from run to run comes on top.
    usual = 1.96 * 0.01 * math.sqrt(2)
    low = 1.1 * math.exp(-math.hypot(math.log(1.1 / (9 / 12)), usual))
    high = 1.1 * math.exp(math.hypot(math.log((13 / 8) / 1.1), usual))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert low < 9 / 12 < 13 / 8 < high
    assert (found.basis, found.verdict) == ("percentiles", "no difference")
    open_ended = change(P90, before, row("b", p90_ms=11.0, p90_low_ms=9.0))
    assert open_ended.low == pytest.approx(low)
    assert open_ended.high is None
    assert open_ended.verdict == "noise unknown"
    assert change(P90, before, row("b", p90_ms=30.0, p90_low_ms=20.0)).verdict == "higher"


def test_repeats_in_the_history_widen_an_interval_and_close_an_open_one():
    before, after = row("a", p50_ms=10.0), row("b", p50_ms=10.5)
    assert change(P50, before, after).verdict == "noise unknown"
    found = change(P50, before, after, Spread(deviation=0.02, degrees=4))
    half = 2.776 * 0.02 * math.sqrt(2)
    assert (found.low, found.high) == pytest.approx((1.05 * math.exp(-half), 1.05 * math.exp(half)))
    assert (found.basis, found.verdict) == ("run to run", "no difference")


def test_peak_memory_has_a_usual_spread_and_sizes_none():
    found = change(MEMORY, row("a", peak_memory_bytes=1000), row("b", peak_memory_bytes=1030))
    assert (found.basis, found.verdict) == ("assumed", "higher")
    found = change(MEMORY, row("a", peak_memory_bytes=1000), row("b", peak_memory_bytes=1010))
    assert found.verdict == "no difference"
    assert change(SIZE, row("a", file_bytes=100), row("b", file_bytes=100)).verdict == "equal"
    assert change(SIZE, row("a", file_bytes=100), row("b", file_bytes=101)).verdict == "higher"


def test_what_one_side_lacks_is_given_without_a_verdict():
    found = change(P50, row("a", p50_ms=1.0), row("b"))
    assert (found.before, found.after, found.ratio, found.verdict) == (1.0, None, None, None)
    drift = METRICS_BY_NAME["drift"]
    assert change(drift, row("a", drift_cosine=0.0), row("b", drift_cosine=0.0)).verdict == "equal"
    found = change(drift, row("a", drift_cosine=0.0), row("b", drift_cosine=0.1))
    assert (found.ratio, found.verdict) == (None, "higher")


def test_the_spread_is_pooled_within_bundles():
    values = {"d1": [10.0, 10.4, 9.9], "d2": [20.0, 21.0], "d3": [5.0]}
    rows = [
        row(f"{digest}{index}", bundle_digest=digest, p50_ms=value)
        for digest, own in values.items()
        for index, value in enumerate(own)
    ]
    rows.append(row("void", bundle_digest="d1", p50_ms=99.0, void=True))
    rows.append(row("elsewhere", bundle_digest="d1", p50_ms=99.0, threads=4))
    squares = 0.0
    for own in values.values():
        logs = [math.log(value) for value in own]
        squares += sum((value - sum(logs) / len(logs)) ** 2 for value in logs)
    spread = spreads_of(rows, row("new"))["p50"]
    assert spread.degrees == 3
    assert spread.deviation == pytest.approx(math.sqrt(squares / 3))
    assert "size" not in spreads_of(rows, row("new"))
    # Short runs are noisier than those that are compared, and old ones are past.
    short = [row(f"s{index}", p50_ms=value, runs=10) for index, value in enumerate((1.0, 99.0, 1.0))]
    assert spreads_of([*rows, *short], row("new", runs=100))["p50"] == spread
    old = [row(f"o{index}", p50_ms=value) for index, value in enumerate((1.0, 99.0, 1.0))]
    recent = [row(f"n{index}", p50_ms=10.0 + index % 2) for index in range(20)]
    assert spreads_of([*old, *recent], row("new")) == spreads_of(recent, row("new"))
    assert spreads_of(rows[:2], row("new")) == {}


def test_equal_runs_are_rarely_called_different():
    """Intervals of equal runs hold 1 in about 95 of 100 cases, with repeats in the history."""
    rng = np.random.default_rng(3)
    wrong = {"p50": 0, "p90": 0, "mean": 0}
    rounds = 200
    for _ in range(rounds):
        earlier = [drawn(rng, f"r{index}", run_spread=0.03) for index in range(6)]
        new = drawn(rng, "new", run_spread=0.03)
        spreads = spreads_of(earlier, new)
        for name in wrong:
            verdict = change(METRICS_BY_NAME[name], earlier[-1], new, spreads[name]).verdict
            wrong[name] += verdict in ("higher", "lower")
    # 12 of 200 and more than 20 would be beyond 5 % by three standard deviations.
    assert all(count <= 20 for count in wrong.values()), wrong


def test_without_repeats_equal_runs_on_a_steady_machine_are_rarely_called_different():
    rng = np.random.default_rng(4)
    verdicts = [
        change(P90, drawn(rng, "a", run_spread=0.01), drawn(rng, "b", run_spread=0.01)).verdict
        for _ in range(200)
    ]
    assert sum(verdict != "no difference" for verdict in verdicts) <= 20


def test_a_real_slowdown_is_found():
    rng = np.random.default_rng(5)
    gate = parse_gate("p90>+5%")
    states = []
    for _ in range(50):
        pair = Pair(before=drawn(rng, "a"), after=drawn(rng, "b", factor=1.15))
        states.append(judge(gate, pair.after, pair, subject="net", strict=False).state)
    assert states.count("failed") >= 45


def test_a_gate_rarely_fails_equal_runs():
    rng = np.random.default_rng(6)
    gate = parse_gate("p90>+5%")
    states = []
    for _ in range(200):
        pair = Pair(before=drawn(rng, "a", run_spread=0.01), after=drawn(rng, "b", run_spread=0.01))
        states.append(judge(gate, pair.after, pair, subject="net", strict=False).state)
    assert states.count("failed") == 0
    assert states.count("passed") >= 100


# ------------------------------------------------------------------------------------------ gates


@pytest.mark.parametrize(
    ("text", "metric", "kind", "value"),
    [
        ("p90>+5%", "p90", "growth_fraction", 0.05),
        (" p99.9 > 12 ms ", "p99.9", "limit", 12.0),
        ("p99_9>0.5s", "p99.9", "limit", 500.0),
        ("peak-memory>50MB", "peak_memory", "limit", 50e6),
        ("size>1KiB", "size", "limit", 1024.0),
        ("p50>+400us", "p50", "growth", 0.4),
        ("drift>1%", "drift", "limit", 0.01),
        ("drift>0.002", "drift", "limit", 0.002),
        ("drift>+10%", "drift", "growth_fraction", 0.1),
        ("energy>3mJ", "energy", "limit", 3e-3),
        ("instructions>1.5G", "instructions", "limit", 1.5e9),
        ("size>+0%", "size", "growth_fraction", 0.0),
    ],
)
def test_gates_are_read(text, metric, kind, value):
    gate = parse_gate(text)
    assert gate.metric.name == metric
    assert getattr(gate, kind) == pytest.approx(value)
    assert gate.is_relative == (kind != "limit")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("p90>5%", "p90>+5%"),
        ("p91>+5%", "did you mean p9"),
        ("latency>+5%", "use one of p50, p90"),
        ("p90<+5%", "METRIC>+5%"),
        ("p90>-5%", "METRIC>+5%"),
        ("p90>12", "us, ms, s"),
        ("p90>12MB", "us, ms, s"),
        ("size>1e300GB", "too large"),
        ("p90>+5%; rm", "METRIC>+5%"),
        ("", "METRIC>+5%"),
    ],
)
def test_what_is_no_gate_is_refused(text, says):
    with pytest.raises(RecipeError) as caught:
        parse_gate(text)
    assert says in str(caught.value)


@given(st.text() | st.from_regex(r"p90 ?>\+?[0-9.e+-]{1,12}(ms|%|s)?", fullmatch=True))
def test_any_text_is_a_gate_or_is_refused(text):
    with contextlib.suppress(RecipeError):
        gate = parse_gate(text)
        limits = [gate.growth_fraction, gate.growth, gate.limit]
        assert [math.isfinite(one) and one >= 0 for one in limits if one is not None] == [True]


def state(text, before, after, *, strict=False, spread=None):
    pair = None if before is None else Pair(before=before, after=after, spreads=spread or {})
    found = judge(parse_gate(text), after, pair, subject="net", strict=strict)
    return found.state, found.holds


def with_p90(run, middle, half, **fields):
    return row(run, p90_ms=middle, p90_low_ms=middle - half, p90_high_ms=middle + half, **fields)


def test_growth_is_judged_by_the_whole_interval():
    before = with_p90("a", 10.0, 0.01)
    assert state("p90>+5%", before, with_p90("b", 10.1, 0.01)) == ("passed", True)
    assert state("p90>+5%", before, with_p90("b", 12.0, 0.01)) == ("failed", False)
    assert state("p90>+5%", before, with_p90("b", 10.6, 0.5)) == ("undecided", True)
    assert state("p90>+5%", before, with_p90("b", 10.6, 0.5), strict=True) == ("undecided", False)
    assert state("p90>+1ms", before, with_p90("b", 12.0, 0.01)) == ("failed", False)
    assert state("p90>+3ms", before, with_p90("b", 12.0, 0.01)) == ("passed", True)


def test_a_figure_is_held_to_a_limit_of_its_own():
    assert state("p90>12ms", None, with_p90("b", 10.0, 1.0)) == ("passed", True)
    assert state("p90>12ms", None, with_p90("b", 11.9, 1.0)) == ("undecided", True)
    assert state("p90>12ms", None, with_p90("b", 14.0, 1.0)) == ("failed", False)
    assert state("peak_memory>1kB", None, row("b", peak_memory_bytes=1001)) == ("failed", False)
    assert state("size>1kB", None, row("b", file_bytes=1000)) == ("passed", True)
    load = row("b", load_ms=10.0, sessions_ms={"load": (9.0, 10.0, 11.0)})
    assert state("load>10ms", None, load) == ("undecided", True)
    assert state("load>20ms", None, load) == ("passed", True)


def test_what_cannot_pass_a_gate():
    good = with_p90("a", 10.0, 0.01)
    void = with_p90("b", 10.0, 0.01, void=True, void_reasons=("throttled",))
    assert state("p90>+5%", good, void) == ("void", False)
    assert state("p90>99ms", None, void) == ("void", False)
    assert state("p90>+5%", void, with_p90("c", 10.0, 0.01)) == ("no reference", False)
    assert state("p90>+5%", None, good) == ("no reference", False)
    assert state("energy>1J", None, good) == ("not measured", False)
    assert state("energy>+5%", good, with_p90("c", 1.0, 0.1, joules_per_inference=1.0)) == (
        "no reference",
        False,
    )
    assert state("p90>+5%", good, with_p90("c", 10.0, 0.01, threads=4)) == ("other conditions", False)
    assert state("p90>+5%", good, with_p90("c", 10.0, 0.01, cpu="Neoverse")) == ("other conditions", False)
    # Sizes do not depend on where they are measured.
    sized = row("c", file_bytes=10, cpu="Neoverse")
    assert state("size>+5%", row("a", file_bytes=10), sized) == ("passed", True)


def test_counted_instructions_of_other_inputs_or_boards_judge_nothing():
    before = row("a", emulated=True, instructions=1e6)
    assert state("instructions>+1%", before, row("b", emulated=True, instructions=2e6))[0] == "failed"
    for other in ({"shapes": "x:1x9"}, {"cpu": "Cortex-A76"}, {"url": "emulated:x"}, {"threads": 4}):
        after = row("b", emulated=True, instructions=1e6, **other)
        assert state("instructions>+1%", before, after) == ("other conditions", False)


def test_counted_instructions_differ_a_little_from_run_to_run():
    """Two runs of one bundle on one emulated board, as they were counted."""
    before, after = (
        row(name, emulated=True, instructions=n) for name, n in (("a", 15816203), ("b", 15818113))
    )
    assert change(METRICS_BY_NAME["instructions"], before, after).verdict == "no difference"
    more = row("c", emulated=True, instructions=15816203 * 1.01)
    assert change(METRICS_BY_NAME["instructions"], before, more).verdict == "higher"


def test_what_an_emulated_board_is_held_to_is_said():
    def told(gate, held):
        return judge(parse_gate(gate), held, None, subject="net", strict=False).text

    assert "hold it to instructions" in told("p50>+5%", row(emulated=True, instructions=1.0))
    assert "only an emulated board" in told("instructions>+5%", row(p50_ms=1.0))


@pytest.mark.parametrize("text", ["p50>+" + "9" * 400 + "%", "p50>+1e999%", "p50>1e999ms"])
def test_a_limit_that_nothing_can_reach_is_refused(text):
    with pytest.raises(RecipeError, match="too large"):
        parse_gate(text)


def test_an_interval_holds_the_figure():
    """The mean of the sessions lies beyond the limit, the figure of the whole run does not."""
    load = row("b", load_ms=10.0, sessions_ms={"load": (11.0, 11.1, 11.2)})
    assert state("load>10.5ms", None, load) == ("undecided", True)


def test_growth_from_nothing():
    assert state("drift>+5%", row("a", drift_cosine=0.0), row("b", drift_cosine=0.0)) == ("passed", True)
    assert state("drift>+5%", row("a", drift_cosine=0.0), row("b", drift_cosine=1e-9)) == ("failed", False)
    assert state("drift>+0.01", row("a", drift_cosine=0.0), row("b", drift_cosine=1e-9)) == ("passed", True)


# --------------------------------------------------------------------------------------- matching


def test_the_last_comparable_run_is_the_reference():
    rows = [
        row("1", p50_ms=1.0),
        row("2", p50_ms=2.0, bundle_digest="d2"),
        row("3", void=True),
        row("4", threads=4),
        row("5", cpu="Neoverse"),
        row("6", model="other"),
        row("7", target="raspberry-pi-5"),
        row("8", shapes="x:1x4"),
        row("9", kind="verify"),
    ]
    assert latest_before(rows, row("new")).run == "2"
    assert latest_before(rows, row("new", model="third")) is None
    elsewhere = [row("1", bundle_path="/a"), row("2", bundle_path="/b")]
    assert latest_before(elsewhere, row("new", bundle_path="/a")).run == "1"
    assert latest_before(elsewhere, row("new", bundle_path="/c")).run == "2"
    # A document that does not say how the device was reached may be of this one.
    assert latest_before([row("1", url=None, cpu=None)], row("new")).run == "1"


def test_rows_are_matched_by_role_and_likeness():
    before = [row("a", device="pi4", url="pi4"), row("a", device="pi5", url="pi5"), row("a", role="baseline")]
    after = [row("b", device="pi5", url="pi5"), row("b", device="pi4", url="pi4"), row("b", role="model")]
    found = match(before, after)
    assert [(old.device, new.device) for old, new in found] == [("pi5", "pi5"), ("pi4", "pi4")]
    assert match([row("a", role="baseline")], [row("b")])[0][0].role == "baseline"
    later = match([row("a", p50_ms=1.0), row("b", p50_ms=2.0)], [row("c")])
    assert later[0][0].run == "b"
