"""Compare the speed of loaded models fairly: fresh sessions, alternating order, interleaved runs.

Two sessions of the very same file differ by some 0.3 % for as long as they live, because of where
their memory lies. So several rounds of fresh sessions are timed, each round opening them in the
other order, and the spread of the rounds' ratios is part of the result.

The loop, the percentiles and the intervals are the device runner's, so that a figure means the same on
this machine as on a board.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from ..graph.errors import DataError
from . import device_runner
from .base import Array, Runner

Feeds = Mapping[str, Array]
Interval = tuple[float | None, float | None]


@runtime_checkable
class Repeatable(Protocol):
    """A `Runner` that can run the same inputs again and again without checking them each time."""

    def repeated(self, feeds: Feeds) -> Callable[[], object]:
        """What runs the model on these inputs."""


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

    def as_plan(self) -> dict[str, float]:
        """The same as the device runner's `Plan` names it, for JSON: limits that are none are left out."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if math.isfinite(value)}


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The latency of one candidate over all its timed runs.

    A percentile is one of the latencies, by LoadGen's rank; None beyond what so many runs can show (p99
    takes 100 of them, p99.9 takes 1000).

    Attributes:
        runs: how many runs were timed; `sessions` how many sessions they are spread over.
        throughput_per_s: samples a second at the mean latency, one run after another.
        load_ms: median time to open a session.
        peak_memory_bytes: of a process that does nothing else; None where not measured.
        intervals_ms: 95 % intervals of p50, p90, p99 and p99_9 by order statistics, as wide as those of
            the sessions' own percentiles; None on a side that so many runs do not bound.
        cold_start_ms: from starting a process to its first result; None where not measured.
        session_ms: "load", "mean" and percentiles, one value per session.
    """

    name: str
    runs: int
    sessions: int
    warm_up_runs: int
    mean_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float | None
    p99_ms: float | None
    throughput_per_s: float
    load_ms: float
    peak_memory_bytes: int | None = None
    p99_9_ms: float | None = None
    intervals_ms: dict[str, Interval] = {}
    cold_start_ms: float | None = None
    session_ms: dict[str, tuple[float, ...]] = {}


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much faster a candidate is than the baseline: baseline time / candidate time.

    Attributes:
        ratio: median over the pairs: what choices are made by, since one odd pair does not move it.
        pair_ratios: one per pair of fresh sessions, the median ratio of neighbouring runs.
        low, high: the smallest and largest of them.
        mean_ratio: their mean, as the device runner gives it (`balanced_interval`); with `interval`, its
            95 % interval by Student's t, None where there is only one pair.
    """

    baseline: str
    candidate: str
    ratio: float
    pair_ratios: tuple[float, ...]
    low: float
    high: float
    mean_ratio: float | None = None
    interval: tuple[float, float] | None = None

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
    entries = [device_runner.Entry(item.name, functools.partial(_opened, item)) for item in candidates]
    done = itertools.count(1)
    found = device_runner.time_entries(
        entries,
        device_runner.Plan(**dataclasses.asdict(plan)),
        between=None if progress is None else lambda: progress(next(done), plan.pairs),
        clock_ns=clock_ns,
    )
    return result_of(found, {item.name: item.samples_per_run for item in candidates})


def _opened(candidate: Candidate) -> tuple[Callable[[], Any], float]:
    """A fresh session as something to run, its inputs taken in turn, and how long it took to open."""
    runner = candidate.open()
    if isinstance(runner, Repeatable):
        # Checking inputs takes some 10 us, as long as a small operator.
        steps = [runner.repeated(feeds) for feeds in candidate.feeds]
    else:
        steps = [functools.partial(runner.run, feeds) for feeds in candidate.feeds]
    if len(steps) == 1:
        return steps[0], runner.load_ms
    turns = itertools.cycle(steps)

    def step() -> object:
        return next(turns)()

    return step, runner.load_ms


def result_of(
    found: Mapping[str, Mapping[str, Any]],
    samples_per_run: Mapping[str, int],
    method: str = "fresh sessions in alternating order, runs interleaved round robin",
) -> BenchmarkResult:
    """What the device runner's `time_entries` found, here or on a device; the first is the baseline.

    Args:
        found: by name, in order: `series_ns` and `load_ms` of each session, and `warm_up_runs`.
        samples_per_run: by name.
        method: how the runs were made.
    """
    names = list(found)
    series = {name: found[name]["series_ns"] for name in names}
    return BenchmarkResult(
        timings=tuple(_timing(name, found[name], samples_per_run[name]) for name in names),
        comparisons=tuple(compare(names[0], name, series[names[0]], series[name]) for name in names[1:]),
        pairs=len(series[names[0]]),
        runs_per_pair=min(len(one) for one in series[names[0]]),
        method=method,
    )


def compare(
    baseline: str,
    candidate: str,
    baseline_ns: Sequence[Sequence[int]],
    candidate_ns: Sequence[Sequence[int]],
) -> Comparison:
    """The median ratios of neighbouring runs, pair by pair.

    Args:
        baseline: the baseline's name.
        candidate: the candidate's name.
        baseline_ns: per pair, the latencies of the baseline in nanoseconds, in the order of the runs.
        candidate_ns: the same for the candidate, as many pairs.
    """
    return comparison_of(
        baseline,
        candidate,
        (
            device_runner.pair_ratio(before, after)
            for before, after in zip(baseline_ns, candidate_ns, strict=True)
        ),
    )


def comparison_of(baseline: str, candidate: str, pair_ratios: Iterable[float]) -> Comparison:
    """The ratios of pairs, summed up.

    Args:
        baseline: the baseline's name.
        candidate: the candidate's name.
        pair_ratios: baseline / candidate of each pair of fresh sessions, at least one.
    """
    ratios = tuple(pair_ratios)
    mean, low, high = device_runner.balanced_interval(ratios)
    return Comparison(
        baseline=baseline,
        candidate=candidate,
        ratio=statistics.median(ratios),
        pair_ratios=ratios,
        low=min(ratios),
        high=max(ratios),
        mean_ratio=mean,
        interval=None if low is None or high is None else (low, high),
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


def _timing(name: str, timed: Mapping[str, Any], samples_per_run: int) -> Timing:
    found = device_runner.latency_of(timed, samples_per_run)
    flat = sorted(value for series in timed["series_ns"] for value in series)
    return Timing(
        name=name,
        # Even a single run has a median.
        p50_ms=device_runner.percentile(flat, 0.5) / 1e6,
        intervals_ms={key: (low, high) for key, (low, high) in found["intervals_ms"].items()},
        session_ms={key: tuple(values) for key, values in found["session_ms"].items()},
        **{key: found[key] for key in _TAKEN},
    )


_TAKEN = (
    *("runs", "sessions", "warm_up_runs", "mean_ms", "min_ms", "p90_ms", "p99_ms", "p99_9_ms"),
    *("throughput_per_s", "load_ms"),
)
