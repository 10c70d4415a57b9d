"""Timings as a table: latencies, load time, memory, and the ratio to the baseline."""

from __future__ import annotations

from ..runtimes.timing import BenchmarkResult, Comparison
from .output import Table, format_bytes, format_ms


def timing_table(result: BenchmarkResult) -> Table:
    """One row per candidate, the baseline first."""
    ratios = {comparison.candidate: format_ratio(comparison) for comparison in result.comparisons}
    rows = tuple(
        (
            timing.name,
            format_ms(timing.p50_ms),
            format_ms(timing.p90_ms),
            format_ms(timing.p99_ms),
            f"{timing.throughput_per_s:.1f}",
            format_ms(timing.load_ms),
            "" if timing.peak_memory_bytes is None else format_bytes(timing.peak_memory_bytes),
            ratios.get(timing.name, "baseline"),
        )
        for timing in result.timings
    )
    columns = ("model", "p50", "p90", "p99", "samples/s", "load", "peak memory", "speed (range over pairs)")
    return Table(columns=columns, rows=rows, numeric=frozenset(columns[1:7]))


def format_ratio(comparison: Comparison) -> str:
    """How many times as fast as the baseline, with the range over the pairs of sessions."""
    return f"{comparison.ratio:.2f}x ({comparison.low:.2f} to {comparison.high:.2f})"


def measured_how(result: BenchmarkResult) -> str:
    """One line: how often and in which order the runs were made."""
    runs = result.timings[0].runs
    return f"{runs} runs each in {result.pairs} pairs of sessions ({result.method})"
