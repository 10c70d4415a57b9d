"""`edgepress history`: the runs that were made here, listed, compared, plotted, exchanged, removed."""

from __future__ import annotations

import argparse
import datetime
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...export.checksums import bundle_digest
from ...graph.errors import OutputError, RecipeError
from ..opened import is_bundle
from ..output import Answer, Block, Table, format_figure
from ..reporter import Reporter
from .after_run import (
    gate_exit_code,
    gated,
    gates_of,
    judge_all,
    lacking_reference,
    warn_of_undecided,
)
from .compare import Pair, match, spreads_of
from .formats import write_whole
from .gate import figure_interval
from .plot import DEFAULT_METRICS, html_page, series_of, sparkline, svg_figure
from .record import SHORT_ID, export_document, referred, runs_at, utc_now
from .rows import METRICS, METRICS_BY_NAME, Measurement, Metric
from .store import History, history_file
from .tables import (
    comparison_document,
    comparison_records,
    comparison_table,
    gate_cases,
    gate_table,
    label,
    measurement_record,
    row_cases,
)

_LISTED = 50
_DAY = "%Y-%m-%d"


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Answer the subcommand.

    Raises:
        RecipeError: if an option's value is wrong or nothing is called as a reference is.
        DataError: if a file or a bundle holds no run.
        OutputError: if the history or a file cannot be used.
    """
    if arguments.subcommand == "compare":
        return _compare(arguments, reporter)
    with History(history_file()) as history:
        return _SUBCOMMANDS[arguments.subcommand](arguments, history, reporter)


def _chosen(arguments: argparse.Namespace, history: History, limit: int | None) -> list[Measurement]:
    """The rows that the filters leave, the oldest first."""
    conditions: list[tuple[str, Any]] = []
    for option in ("model", "target", "kind"):
        if getattr(arguments, option) is not None:
            conditions.append((f"{option} = ?", getattr(arguments, option)))
    if arguments.device is not None:
        conditions.append(("? IN (device, url, board)", arguments.device))
    if arguments.bundle is not None:
        conditions.append(("bundle_digest = ?", _digest(Path(arguments.bundle))))
    if arguments.since is not None:
        conditions.append(("started >= ?", since(arguments.since)))
    if arguments.no_void:
        conditions.append(("void = ?", 0))
    return history.rows(conditions, limit=arguments.limit or limit)


def _digest(bundle: Path) -> str:
    if not is_bundle(bundle):
        raise RecipeError("this is no bundle", where=f"--bundle {bundle}", remedy="name a bundle's folder")
    return bundle_digest(bundle)


def since(text: str, now: datetime.datetime | None = None) -> str:
    """The time that --since means, as the history has it: a day, or so many days or hours ago.

    Raises:
        RecipeError: if it is neither.
    """
    found = re.fullmatch(r"([0-9]{1,5})([dh])", text)
    if found is not None:
        ago = datetime.timedelta(**{"d": {"days": int(found[1])}, "h": {"hours": int(found[1])}}[found[2]])
        return ((now or datetime.datetime.now(datetime.UTC)) - ago).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        return f"{datetime.datetime.strptime(text, _DAY).strftime(_DAY)}T00:00:00Z"
    except ValueError:
        raise RecipeError(
            f"{text!r} is no day", where="--since", remedy="write 2026-01-31, or 30d or 12h for the last ones"
        ) from None


def _list(arguments: argparse.Namespace, history: History, _: Reporter) -> Answer:
    rows = _chosen(arguments, history, _LISTED)
    named: dict[str, list[str]] = {}
    for name, runs in history.baselines().items():
        for one in runs:
            named.setdefault(one, []).append(name)
    table = Table(
        columns=(
            *("run", "started (UTC)", "what", "device", "threads", "p50", "p90", "p99"),
            *("instructions", "peak memory", "size", "drift", "counts", "baseline"),
        ),
        rows=tuple(_listed(row, rows, named.get(row.run, [])) for row in rows),
        numeric=frozenset({"threads", "p50", "p90", "p99", "instructions", "peak memory", "size", "drift"}),
    )
    blocks: list[Block] = [_filled(table) if rows else "No run is in the history that fits."]
    return Answer(
        document={"file": str(history.path), "measurements": rows, "baselines": history.baselines()},
        blocks=blocks,
        records=[measurement_record(row) for row in rows],
        cases=row_cases(rows),
    )


def _listed(row: Measurement, rows: Sequence[Measurement], names: Sequence[str]) -> tuple[str, ...]:
    counts = "void" if row.void else "outputs differ" if row.outputs_ok is False else "yes"
    what = label(row, of=rows).removesuffix(f" on {row.device}")
    return (
        row.run[:SHORT_ID],
        row.started[:16].replace("T", " "),
        what if row.kind == "benchmark" else f"{what} ({row.kind})",
        row.device,
        "" if row.threads is None else str(row.threads),
        *(
            format_figure(METRICS_BY_NAME[name].of(row), METRICS_BY_NAME[name].unit)
            for name in ("p50", "p90", "p99", "instructions", "peak_memory", "size", "drift")
        ),
        counts,
        ", ".join(names),
    )


def _filled(table: Table) -> Table:
    """The table without the columns in which nothing stands."""
    kept = [index for index in range(len(table.columns)) if any(row[index] for row in table.rows)]
    return Table(
        columns=tuple(table.columns[index] for index in kept),
        rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
        title=table.title,
        numeric=table.numeric & {table.columns[index] for index in kept},
    )


def _show(arguments: argparse.Namespace, history: History, _: Reporter) -> Answer:
    rows = referred(history, arguments.run, where="RUN")
    documents: dict[str, dict[str, Any] | None] = {}
    for one in dict.fromkeys(row.run for row in rows):
        try:
            documents[one] = history.document(one)
        except KeyError:  # a file that was never imported
            documents[one] = None
    return Answer(
        document={"measurements": rows, "documents": documents},
        blocks=[block for row in rows for block in _shown(row, rows)],
        records=[measurement_record(row) for row in rows],
        cases=row_cases(rows),
    )


def _shown(row: Measurement, rows: Sequence[Measurement]) -> list[Block]:
    about = [
        ("run", row.run),
        ("started (UTC)", row.started),
        ("kind", row.kind),
        ("device", " ".join(filter(None, [row.device, row.url if row.url != row.device else None]))),
        ("board", row.board),
        ("processor", row.cpu),
        ("emulated", "yes" if row.emulated else None),
        ("runtime", row.runtime),
        ("threads", row.threads),
        ("inputs", row.shapes),
        ("bundle", row.bundle_path),
        ("digest", row.bundle_digest),
        ("timed runs", row.runs),
        ("outputs", {True: "within tolerance", False: "out of tolerance", None: None}[row.outputs_ok]),
        ("counts", f"no: {'; '.join(row.void_reasons)}" if row.void else "yes"),
        ("edgepress", row.edgepress),
    ]
    texts = tuple((name, str(value)) for name, value in about if value is not None)
    figures = tuple(_figure(metric, row) for metric in METRICS if metric.of(row) is not None)
    blocks: list[Block] = [Table(columns=("of the run", "is"), rows=texts, title=label(row, of=rows))]
    if figures:
        columns = ("figure", "value", "95 % interval")
        blocks.append(Table(columns=columns, rows=figures, numeric=frozenset({"value"})))
    return blocks


def _figure(metric: Metric, row: Measurement) -> tuple[str, str, str]:
    low, high = (None, None) if metric.exact else figure_interval(metric, row)
    interval = ""
    if low is not None or high is not None:
        sides = (format_figure(side, metric.unit) or "?" for side in (low, high))
        interval = " to ".join(sides)
    return metric.name, format_figure(metric.of(row), metric.unit), interval


def _compare(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    gates = gates_of(arguments)
    try:
        with History(history_file()) as history:
            before = referred(history, arguments.before, where="BEFORE")
            after = referred(history, arguments.after, where="AFTER")
            earlier = [
                row for model in {row.model for row in after} for row in history.rows([("model IS ?", model)])
            ]
    except OutputError as error:
        try:  # files need no history
            before = referred(None, arguments.before, where="BEFORE")
            after = referred(None, arguments.after, where="AFTER")
        except RecipeError:
            raise error from None
        earlier = []
    own = {row.run for row in after}
    noise = [row for row in earlier if row.run not in own]
    pairs = [Pair(before=old, after=new, spreads=spreads_of(noise, new)) for old, new in match(before, after)]
    if not pairs:
        raise RecipeError(
            "the two have nothing in common that was measured",
            where=f"{arguments.before} and {arguments.after}",
            why=f"{', '.join(row.role for row in before)} against {', '.join(row.role for row in after)}",
            remedy="name two runs of bundles, or two of models",
        )
    blocks: list[Block] = []
    for pair in pairs:
        blocks.append(comparison_table(pair))
        if differences := pair.differences():
            blocks.append("Not the same in both runs:\n" + "\n".join(f"  {line}" for line in differences))
    held = gated(after) or [pair.after for pair in pairs]
    results = judge_all(gates, held, pairs, strict=arguments.strict_gate)
    warn_of_undecided(results, reporter)
    if results:
        blocks.append(gate_table(results))
    lacking = lacking_reference(results, "name an earlier run that counts and has this figure")
    if lacking is not None:
        blocks.append(f"error: {lacking}")
    return Answer(
        document={
            "comparison": [comparison_document(pair) for pair in pairs],
            "gates": msgspec.to_builtins(results),
        },
        blocks=blocks,
        exit_code=gate_exit_code(results),
        records=[item for pair in pairs for item in comparison_records(pair)],
        cases=gate_cases(results) or row_cases(after),
    )


def _plot(arguments: argparse.Namespace, history: History, reporter: Reporter) -> Answer:
    rows = [row for row in _chosen(arguments, history, None) if row.kind != "verify"]
    names = arguments.metric or DEFAULT_METRICS
    for name in names:
        if name not in METRICS_BY_NAME:
            raise RecipeError(
                f"{name!r} is no metric", where="--metric", remedy=f"use {', '.join(METRICS_BY_NAME)}"
            )
    metrics = [METRICS_BY_NAME[name] for name in names]
    # What is plotted only by default is left out where nobody measured it.
    metrics = [one for one in metrics if any(one.of(row) is not None for row in rows)]
    if not metrics:
        raise RecipeError(
            "there is nothing to plot",
            where="history plot",
            why="no run fits that has one of " + ", ".join(names),
            remedy="give fewer filters, or run `edgepress benchmark` first",
        )
    series = series_of(rows)
    document = {
        "series": [{"name": one.name, "measurements": one.rows} for one in series],
        "metrics": [one.name for one in metrics],
    }
    if arguments.output is None:
        rows_of_table = tuple(line for one in series for line in _lines(one.name, one.rows, metrics))
        table = Table(
            columns=("what", "figure", "runs", "first", "last", "least", "most", "over the runs"),
            rows=rows_of_table,
            numeric=frozenset({"runs", "first", "last", "least", "most"}),
        )
        return Answer(document=document, blocks=[table])
    path = Path(arguments.output)
    if path.suffix.lower() not in (".html", ".svg"):
        raise OutputError(
            "a plot is an .html or .svg file", where=f"--output {path}", remedy=f"write --output {path}.html"
        )
    made = (
        html_page(series, metrics, utc_now())
        if path.suffix.lower() == ".html"
        else svg_figure(series, metrics)
    )
    write_whole(path, made)
    reporter.note(f"{path}: {len(metrics)} figures of {sum(len(one.rows) for one in series)} rows")
    return Answer(
        document={**document, "file": str(path)}, blocks=[f"{path} is written: open it in a browser."]
    )


def _lines(name: str, rows: Sequence[Measurement], metrics: Sequence[Metric]) -> list[tuple[str, ...]]:
    found = []
    for metric in metrics:
        values = [value for row in rows if not row.void and (value := metric.of(row)) is not None]
        if values:
            shown = (
                format_figure(value, metric.unit)
                for value in (values[0], values[-1], min(values), max(values))
            )
            found.append((name, metric.name, str(len(values)), *shown, sparkline(values)))
    return found


def _export(arguments: argparse.Namespace, history: History, _: Reporter) -> Answer:
    chosen = dict.fromkeys(row.run for row in _chosen(arguments, history, None))
    rows = [row for one in chosen for row in history.rows([("run = ?", one)])]
    document = export_document(history, rows)
    if arguments.output is None and arguments.format is None:
        arguments.format = "json"
    return Answer(
        document=document,
        blocks=[f"{len(chosen)} runs exported."],
        records=[measurement_record(row) for row in rows],
        cases=row_cases(rows),
    )


def _import(arguments: argparse.Namespace, history: History, reporter: Reporter) -> Answer:
    found, new = 0, 0
    for name in arguments.path:
        runs, problems = runs_at(Path(name))
        for line in problems:
            reporter.warn(f"{name}: {line}")
        found += len(runs)
        new += history.add(runs)
    return Answer(
        document={"found": found, "new": new, "file": str(history.path)},
        blocks=[f"{found} runs found, {new} of them new to {history.path}."],
    )


def _prune(arguments: argparse.Namespace, history: History, _: Reporter) -> Answer:
    if not any((arguments.keep, arguments.older_than, arguments.void, arguments.baseline)):
        raise RecipeError(
            "nothing says what to remove",
            where="history prune",
            remedy="add --keep N, --older-than DAYS, --void or --baseline NAME",
        )
    baselines = history.baselines()
    if arguments.baseline is not None and arguments.baseline not in baselines:
        raise RecipeError(
            f"there is no baseline {arguments.baseline!r}",
            where="--baseline",
            remedy=f"there are {', '.join(baselines)}" if baselines else "none was saved yet",
        )
    runs: dict[str, list[Measurement]] = {}
    for row in history.rows():
        runs.setdefault(row.run, []).append(row)
    kept = {run for name, own in baselines.items() if name != arguments.baseline for run in own}
    gone = [run for run in _unwanted(arguments, runs) if run not in kept]
    if not arguments.dry_run:
        history.remove(gone, arguments.baseline)
        history.shrink()
    would = "would be " if arguments.dry_run else ""
    text = f"{len(gone)} of {len(runs)} runs {would}removed."
    if arguments.baseline is not None:
        text += f" The name {arguments.baseline!r} {would or 'is '}forgotten."
    return Answer(document={"removed": gone, "of": len(runs), "dry_run": arguments.dry_run}, blocks=[text])


def _unwanted(arguments: argparse.Namespace, runs: dict[str, list[Measurement]]) -> list[str]:
    """The runs that any of the options is about, the oldest first."""
    gone: dict[str, None] = {}
    if arguments.keep is not None:
        gone |= dict.fromkeys(list(runs)[: -arguments.keep])
    if arguments.older_than is not None:
        limit = since(f"{min(arguments.older_than, 99999)}d")
        gone |= dict.fromkeys(run for run, rows in runs.items() if rows[0].started < limit)
    if arguments.void:
        gone |= dict.fromkeys(run for run, rows in runs.items() if rows[0].void)
    return list(gone)


_SUBCOMMANDS: dict[str, Callable[[argparse.Namespace, History, Reporter], Answer]] = {
    "list": _list,
    "show": _show,
    "plot": _plot,
    "export": _export,
    "import": _import,
    "prune": _prune,
}
