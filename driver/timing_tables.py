"""Timings as tables: latencies with their intervals, load time, memory, and the ratio to the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..runtimes.timing import BenchmarkResult, Comparison, Interval
from .output import Table, format_bytes, format_ms

PERCENTILES = (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p99_9", "p99.9"))
"""As results name them, and as people do."""
INTERVALS_TITLE = "95 % intervals of the percentiles"


def timing_table(result: BenchmarkResult) -> Table:
    """One row per candidate, the baseline first."""
    ratios = {comparison.candidate: format_ratio(comparison) for comparison in result.comparisons}
    rows = tuple(
        (
            timing.name,
            *(
                format_known_ms(value)
                for value in (timing.p50_ms, timing.p90_ms, timing.p99_ms, timing.p99_9_ms)
            ),
            f"{timing.throughput_per_s:.1f}",
            format_ms(timing.load_ms),
            format_known_ms(timing.cold_start_ms),
            "" if timing.peak_memory_bytes is None else format_bytes(timing.peak_memory_bytes),
            ratios.get(timing.name, "baseline"),
        )
        for timing in result.timings
    )
    numeric = ("p50", "p90", "p99", "p99.9", "samples/s", "load", "cold start", "peak memory")
    return Table(columns=("model", *numeric, "speed (95 % interval)"), rows=rows, numeric=frozenset(numeric))


def interval_table(names: Sequence[str], latencies: Sequence[Mapping[str, Interval]]) -> Table:
    """A row per candidate with the 95 % interval of each percentile.

    Args:
        names: of the candidates.
        latencies: of each, the intervals in ms by percentile ("p50", "p99_9").
    """
    rows = tuple(
        (name, *(format_interval(found.get(key)) for key, _ in PERCENTILES))
        for name, found in zip(names, latencies, strict=True)
    )
    shown = tuple(label for _, label in PERCENTILES)
    return Table(columns=("model", *shown), rows=rows, numeric=frozenset(shown), title=INTERVALS_TITLE)


def format_interval(bounds: Sequence[float | None] | None) -> str:
    """Both sides, such as "11.7 ms to 11.9 ms"; a side that so few runs do not bound is left out."""
    low, high = bounds or (None, None)
    sides = (("from", low), ("to", high)) if low is None or high is None else (("", low), ("to", high))
    return " ".join(f"{word} {format_ms(side)}".strip() for word, side in sides if side is not None)


def format_known_ms(value: float | None) -> str:
    """A duration; nothing where it was not measured, or so few runs do not show it."""
    return "" if value is None else format_ms(value)


def format_ratio(comparison: Comparison) -> str:
    """How many times as fast as the baseline: the mean over the pairs with its 95 % interval.

    Where there is no interval, the median with the range over the pairs of sessions.
    """
    if comparison.mean_ratio is None or comparison.interval is None:
        return f"{comparison.ratio:.2f}x ({comparison.low:.2f} to {comparison.high:.2f})"
    low, high = comparison.interval
    return f"{comparison.mean_ratio:.2f}x ({low:.2f} to {high:.2f})"


def measured_how(result: BenchmarkResult) -> str:
    """One line: how often and in which order the runs were made."""
    runs = result.timings[0].runs
    return f"{runs} runs each in {result.pairs} pairs of sessions ({result.method})"
