"""Compare the speed of loaded models fairly: fresh sessions, alternating order, interleaved runs.

Two sessions of the very same file differ by some 0.3 % for as long as they live, because of where
their memory lies. So several rounds of fresh sessions are timed, each round opening them in the
other order, and the spread of the rounds' ratios is part of the result.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from ..graph.errors import DataError
from .base import Array, Runner

Feeds = Mapping[str, Array]

_WARM_UP_WINDOW = 5
_WARM_UP_TOLERANCE = 0.05
_LEAST_WARM_UP_RUNS, _LEAST_RUNS, _MOST_FOLD = 2, 3, 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One thing to time: how to open it and what to run it on.

    Attributes:
        name: as it appears in the results.
        open: opens a fresh session; called once a pair of rounds.
        feeds: sets of inputs, taken in turn.
        samples_per_run: how many samples one run handles (the batch size), for the throughput.
    """

    name: str
    open: Callable[[], Runner]
    feeds: Sequence[Feeds]
    samples_per_run: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How much to measure.

    Attributes:
        pairs: how often all candidates are opened afresh.
        runs: timed runs of each candidate in one pair.
        warm_up_runs: untimed runs at least; more until two windows of 5 agree within 5 %, at most
            ten times as many.
        limit_s: stop after so many seconds, once two pairs are complete.
        least_pair_s: go on beyond `runs` until a pair has taken so many seconds, up to 50 times as
            many: the median of few short runs is mostly the clock's noise.
        most_pair_s: stop before `runs` once a pair has taken so many seconds and 3 runs of each.
        warm_up_limit_s: likewise for the warm-up of one session, after 2 runs.
    """

    pairs: int = 6
    runs: int = 20
    warm_up_runs: int = 5
    limit_s: float = 120.0
    least_pair_s: float = 0.0
    most_pair_s: float = math.inf
    warm_up_limit_s: float = math.inf

    def __post_init__(self) -> None:
        if min(self.pairs, self.runs, self.warm_up_runs) < 1:
            raise ValueError("pairs, runs and warm_up_runs must be at least 1")


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The latency of one candidate over all its timed runs.

    Attributes:
        runs: how many runs were timed; `sessions` how many sessions they are spread over.
        throughput_per_s: samples a second at the mean latency, one run after another.
        load_ms: median time to open a session.
        peak_memory_bytes: of a process that does nothing else; None where not measured.
    """

    name: str
    runs: int
    sessions: int
    warm_up_runs: int
    mean_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    throughput_per_s: float
    load_ms: float
    peak_memory_bytes: int | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much faster a candidate is than the baseline: baseline time / candidate time.

    Attributes:
        ratio: median over the pairs of (baseline's median / candidate's median).
        pair_ratios: one ratio per pair of fresh sessions.
        low, high: the smallest and largest of them.
    """

    baseline: str
    candidate: str
    ratio: float
    pair_ratios: tuple[float, ...]
    low: float
    high: float

    def is_faster(self, margin_fraction: float = 0.02) -> bool:
        """Whether the candidate wins by the margin, and in every single pair."""
        return self.ratio >= 1 + margin_fraction and self.low > 1

    def is_slower(self, margin_fraction: float = 0.02) -> bool:
        """Whether the candidate loses by the margin, and in every single pair."""
        return self.ratio <= 1 / (1 + margin_fraction) and self.high < 1


class BenchmarkResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Timings of all candidates, and each against the first."""

    timings: tuple[Timing, ...]
    comparisons: tuple[Comparison, ...]
    pairs: int
    runs_per_pair: int
    method: str = "fresh sessions in alternating order, runs interleaved round robin"

    def timing(self, name: str) -> Timing:
        """The timing of the candidate called `name`.

        Raises:
            KeyError: if there is none.
        """
        for timing in self.timings:
            if timing.name == name:
                return timing
        raise KeyError(name)


def benchmark(
    candidates: Sequence[Candidate],
    schedule: Schedule | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> BenchmarkResult:
    """Time candidates against each other; the first is the baseline.

    Args:
        candidates: at least one, with different names.
        schedule: how much to measure.
        progress: called with (pairs done, pairs in all).
        clock_ns: a monotonic clock in nanoseconds.

    Raises:
        DataError: if there is no candidate, no input, or two candidates have one name.
        EdgepressError: whatever opening or running a candidate raises.
    """
    plan = schedule or Schedule()
    _check(candidates)
    latencies: dict[str, list[list[int]]] = {candidate.name: [] for candidate in candidates}
    loads: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    warm_ups: dict[str, int] = dict.fromkeys(latencies, 0)
    started = clock_ns()
    for pair in range(plan.pairs):
        order = list(candidates) if pair % 2 == 0 else list(reversed(candidates))
        opened = [(candidate, candidate.open()) for candidate in order]
        for candidate, runner in opened:
            loads[candidate.name].append(runner.load_ms)
            warm_ups[candidate.name] += _warm_up(candidate, runner, plan, clock_ns)
        for name, series in _interleave(opened, plan, clock_ns).items():
            latencies[name].append(series)
        del opened, runner
        if progress is not None:
            progress(pair + 1, plan.pairs)
        if pair >= 1 and (clock_ns() - started) / 1e9 > plan.limit_s:
            break
    names = [candidate.name for candidate in candidates]
    return BenchmarkResult(
        timings=tuple(
            _timing(candidate, latencies[candidate.name], loads[candidate.name], warm_ups[candidate.name])
            for candidate in candidates
        ),
        comparisons=tuple(
            compare(names[0], name, latencies[names[0]], latencies[name]) for name in names[1:]
        ),
        pairs=len(latencies[names[0]]),
        runs_per_pair=min(len(series) for series in latencies[names[0]]),
    )


def compare(
    baseline: str,
    candidate: str,
    baseline_ns: Sequence[Sequence[int]],
    candidate_ns: Sequence[Sequence[int]],
) -> Comparison:
    """The ratios of medians, pair by pair.

    Args:
        baseline: the baseline's name.
        candidate: the candidate's name.
        baseline_ns: per pair, the latencies of the baseline in nanoseconds.
        candidate_ns: the same for the candidate, as many pairs.
    """
    ratios = tuple(
        statistics.median(before) / statistics.median(after)
        for before, after in zip(baseline_ns, candidate_ns, strict=True)
    )
    return Comparison(
        baseline=baseline,
        candidate=candidate,
        ratio=statistics.median(ratios),
        pair_ratios=ratios,
        low=min(ratios),
        high=max(ratios),
    )


def _check(candidates: Sequence[Candidate]) -> None:
    names = [candidate.name for candidate in candidates]
    if not names:
        raise DataError("there is nothing to time", remedy="name at least one bundle or model")
    if len(set(names)) != len(names):
        raise DataError("two candidates have one name", why=", ".join(names), remedy="name them apart")
    for candidate in candidates:
        if not candidate.feeds:
            raise DataError(
                "there is no input to run on", where=candidate.name, remedy="give inputs or --shape"
            )


def _timed(runner: Runner, feeds: Feeds, clock_ns: Callable[[], int]) -> int:
    started = clock_ns()
    runner.run(feeds)
    return max(1, clock_ns() - started)


def _warm_up(candidate: Candidate, runner: Runner, plan: Schedule, clock_ns: Callable[[], int]) -> int:
    """Run untimed until two windows of runs have the same median; how many runs that took."""
    at_least, series = plan.warm_up_runs, list[int]()
    while len(series) < 10 * at_least:
        series.append(_timed(runner, candidate.feeds[len(series) % len(candidate.feeds)], clock_ns))
        if len(series) >= max(at_least, 2 * _WARM_UP_WINDOW):
            before = statistics.median(series[-2 * _WARM_UP_WINDOW : -_WARM_UP_WINDOW])
            after = statistics.median(series[-_WARM_UP_WINDOW:])
            if abs(after - before) <= _WARM_UP_TOLERANCE * before:
                break
        if len(series) >= _LEAST_WARM_UP_RUNS and sum(series) / 1e9 > plan.warm_up_limit_s:
            break
    return len(series)


def _interleave(
    opened: Sequence[tuple[Candidate, Runner]], plan: Schedule, clock_ns: Callable[[], int]
) -> dict[str, list[int]]:
    """One run of each in turn, as often as the schedule says; the garbage collector waits."""
    series: dict[str, list[int]] = {candidate.name: [] for candidate, _ in opened}
    collecting = gc.isenabled()
    started, index = clock_ns(), 0
    gc.disable()
    try:
        while _goes_on(plan, index, (clock_ns() - started) / 1e9):
            for candidate, runner in opened:
                feeds = candidate.feeds[index % len(candidate.feeds)]
                series[candidate.name].append(_timed(runner, feeds, clock_ns))
            index += 1
    finally:
        if collecting:
            gc.enable()
    return series


def _goes_on(plan: Schedule, done: int, elapsed_s: float) -> bool:
    if done < plan.runs:
        return done < _LEAST_RUNS or elapsed_s <= plan.most_pair_s
    return done < _MOST_FOLD * plan.runs and elapsed_s < plan.least_pair_s


def _timing(
    candidate: Candidate, series_ns: Sequence[Sequence[int]], loads_ms: Sequence[float], warm_up_runs: int
) -> Timing:
    values_ms = np.array([value for series in series_ns for value in series], np.float64) / 1e6
    p50, p90, p99 = (float(value) for value in np.percentile(values_ms, (50, 90, 99)))
    mean_ms = float(values_ms.mean())
    return Timing(
        name=candidate.name,
        runs=len(values_ms),
        sessions=len(series_ns),
        warm_up_runs=warm_up_runs,
        mean_ms=mean_ms,
        min_ms=float(values_ms.min()),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        throughput_per_s=candidate.samples_per_run * 1000.0 / mean_ms,
        load_ms=statistics.median(loads_ms),
    )
