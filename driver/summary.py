"""The end of a compile for people: size, latency and drift before and after, and what to type next."""

from __future__ import annotations

from ..compress.recipe import to_toml
from ..runtimes.timing import BenchmarkResult, Timing
from .drift_tables import format_metric, measured_on
from .output import Block, Table, format_bytes, format_ms, format_percent
from .pareto import pareto_blocks
from .plan_tables import plan_blocks, plan_headline, plan_summary
from .pruning_tables import pruning_rows
from .result import CompileResult
from .timing_tables import format_ratio, measured_how

_COLUMNS = ("", "before", "after", "change")
Row = tuple[str, str, str, str]


def document_of(result: CompileResult) -> dict[str, object]:
    """The whole result for --json."""
    fields: dict[str, object] = {name: getattr(result, name) for name in result.__struct_fields__}
    before, after = result.sizes.source_bytes, result.sizes.bundle_model_bytes
    return {
        **fields,
        "word": speed_word(result),
        "size_fraction": None if after is None or not before else after / before,
        "plan_summary": plan_summary(result.plan),
    }


def speed_word(result: CompileResult) -> str | None:
    """What may be said of the speed: "not slower" only of what was timed on the target itself.

    None where nothing is known: no timing and no evidence.
    """
    if result.benchmark is None:
        return None if result.evidence == "none" else f"predicted ({result.evidence})"
    if result.evidence != "measured-on-target":
        return f"predicted ({result.evidence})"
    comparisons = result.benchmark.comparisons
    if not comparisons:
        return None
    if comparisons[0].is_faster():
        return "faster"
    return "slower" if comparisons[0].is_slower() else "not slower"


def summary_blocks(result: CompileResult) -> list[Block]:
    """The closing table of a compile, with how it was measured and what to type next."""
    pruned = pruning_rows(result.plan.pruning)
    rows = [_size_row(result), *pruned[:1], *_timing_rows(result), *_drift_rows(result), *pruned[1:]]
    blocks: list[Block] = []
    if result.bundle is not None:
        blocks.append(f"Bundle for {result.target}: {result.bundle}")
    blocks.append(plan_headline(result.plan))
    blocks.append(Table(columns=_COLUMNS, rows=tuple(rows), numeric=frozenset({"before", "after"})))
    if result.pareto is not None:
        blocks += pareto_blocks(result.pareto, whole=False)
    blocks.append("\n".join(_how(result)))
    if result.notes:
        blocks.append("Notes:\n" + "\n".join(f"  {note}" for note in result.notes))
    if result.next_commands:
        blocks.append("Next:\n" + "\n".join(f"  {command}" for command in result.next_commands))
    return blocks


def dry_run_blocks(result: CompileResult, *, every_node: bool) -> list[Block]:
    """The plan and the resolved recipe of a dry run."""
    blocks = plan_blocks(result.plan, every_node=every_node)
    if result.notes:
        blocks.append("Notes:\n" + "\n".join(f"  {note}" for note in result.notes))
    blocks.append(to_toml(result.recipe).rstrip("\n"))
    blocks.append("Nothing was written: this was a dry run.")
    return blocks


def _size_row(result: CompileResult) -> Row:
    before, after = result.sizes.source_bytes, result.sizes.bundle_model_bytes
    if after is None:
        return "model size", format_bytes(before), "", ""
    return "model size", format_bytes(before), format_bytes(after), f"{format_percent(after / before)} of it"


def _timing_rows(result: CompileResult) -> list[Row]:
    timed = result.benchmark
    if timed is None or len(timed.timings) < 2:
        return []
    before, after = timed.timings[0], timed.timings[1]
    rows: list[Row] = [
        ("latency, median", format_ms(before.p50_ms), format_ms(after.p50_ms), _change(result, timed)),
        *_p99_row(before, after),
        ("load time", format_ms(before.load_ms), format_ms(after.load_ms), ""),
    ]
    if before.peak_memory_bytes is not None and after.peak_memory_bytes is not None:
        peaks = format_bytes(before.peak_memory_bytes), format_bytes(after.peak_memory_bytes)
        rows.append(("peak memory", *peaks, ""))
    rows += [_further(timing, timed) for timing in timed.timings[2:]]
    return rows


def _p99_row(before: Timing, after: Timing) -> list[Row]:
    """Nothing where there were too few runs for it."""
    if before.p99_ms is None or after.p99_ms is None:
        return []
    return [("latency, p99", format_ms(before.p99_ms), format_ms(after.p99_ms), "")]


def _change(result: CompileResult, timed: BenchmarkResult) -> str:
    return f"{format_ratio(timed.comparisons[0])}, {speed_word(result)}"


def _further(timing: Timing, timed: BenchmarkResult) -> Row:
    """A candidate beyond the bundle as it is loaded, such as the bundle without session options."""
    ratio = next(format_ratio(item) for item in timed.comparisons if item.candidate == timing.name)
    return f"  {timing.name}", "", format_ms(timing.p50_ms), ratio


def _drift_rows(result: CompileResult) -> list[Row]:
    report = result.drift
    if report is None:
        return []
    limits = {limit.metric: limit.limit for limit in result.recipe.max_drift}
    rows: list[Row] = []
    for name, value in (
        ("cosine", report.cosine),
        ("l2", report.l2),
        ("sqnr", report.sqnr_db),
        ("kl", report.kl),
        ("flips", report.flips),
    ):
        if value is not None or name in limits:
            limit = f"limit {format_metric(name, limits[name])}" if name in limits else ""
            rows.append((f"drift, {name}", "", format_metric(name, value), limit))
    for item in report.task_metrics:
        change = f"{item.change * 100:+.2f} points"
        rows.append((item.name, f"{item.baseline * 100:.2f}", f"{item.candidate * 100:.2f}", change))
    return rows


def _unsure(result: CompileResult) -> list[str]:
    """A line where a limit lies inside the 95 % interval of what it bounds."""
    points = () if result.pareto is None else result.pareto.points
    told = [
        f"{metric} ({format_metric(metric, interval[0])} to {format_metric(metric, interval[1])})"
        for point in points
        if point.chosen and point.straddles
        for metric, interval in point.intervals.items()
        if interval[0] < point.limits[metric] < interval[1]
    ]
    if not told:
        return []
    return [
        "A drift limit holds by what was measured, but lies inside a 95 % interval: "
        f"{', '.join(told)}. More samples may decide otherwise."
    ]


def _how(result: CompileResult) -> list[str]:
    """How each figure came about, and what was left out."""
    lines = []
    if result.stamps:
        lines.append(f"{', '.join(result.stamps)}: the figures come of generated inputs, not of real data.")
    if result.benchmark is None:
        lines.append("Speed was not measured.")
    else:
        place = "this machine" if result.device is None else result.device.name
        where = "on the target" if result.evidence == "measured-on-target" else f"on {place}, not the target"
        lines.append(f"Speed {where}: threads {result.recipe.threads}, {measured_how(result.benchmark)}.")
    lines.append("Drift was not measured." if result.drift is None else measured_on(result.drift))
    lines += _unsure(result)
    return lines
