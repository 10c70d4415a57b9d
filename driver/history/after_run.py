"""After a benchmark: keep it in the history, compare it with an earlier run, hold it to gates."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...graph.errors import (
    EXIT_CHECK,
    EXIT_OK,
    EXIT_USER,
    CheckFailed,
    EdgepressError,
    OutputError,
    RecipeError,
)
from ..output import Answer, Block, Case
from ..reporter import Reporter
from .compare import Pair, latest_before, match, spreads_of
from .gate import Gate, GateResult, judge, parse_gate
from .record import check_baseline_name, keep, referred, runs_of_bundle
from .rows import Measurement, RecordedRun
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

_NOISE_ROWS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be done after a run.

    Attributes:
        reference: the rows that were named; None where the last run counts, or there is none yet.
        compare: whether to compare with an earlier run; `named` how it was named.
        beside: whether growth is against the --baseline of the same run.
        first: the reference does not exist yet and is made by this run.
    """

    gates: tuple[Gate, ...] = ()
    compare: bool = False
    beside: bool = False
    named: str = ""
    reference: tuple[Measurement, ...] | None = None
    first: bool = False
    strict: bool = False
    save_baseline: str | None = None
    keep: bool = True


def request_of(arguments: argparse.Namespace) -> Request:
    """What a command line asks for; a reference that is named is looked up before any long work.

    Raises:
        RecipeError: if a gate or a name is wrong, options contradict each other, or nothing is called as the
            reference is.
        DataError: if the reference is a file without a result.
        OutputError: if the history, where it is needed, cannot be used.
    """
    gates = gates_of(arguments)
    beside = arguments.compare is None and arguments.baseline is not None
    growth = any(gate.is_relative for gate in gates)
    compare = arguments.compare is not None or (growth and not beside)
    name = arguments.save_baseline
    if name is not None:
        check_baseline_name(name)
        if arguments.no_history:
            raise RecipeError(
                "a baseline is a run in the history",
                where="--save-baseline",
                remedy="leave --no-history out",
            )
    request = Request(
        gates=gates,
        compare=compare,
        beside=beside and growth,
        named=arguments.compare or "",
        strict=arguments.strict_gate,
        save_baseline=name,
        keep=not arguments.no_history,
    )
    return _with_reference(request) if request.named else request


def gates_of(arguments: argparse.Namespace) -> tuple[Gate, ...]:
    """The gates of --fail-if.

    Raises:
        RecipeError: if one is wrong, or there is none for --strict-gate.
    """
    gates = tuple(parse_gate(text) for text in arguments.fail_if or ())
    if arguments.strict_gate and not gates:
        raise RecipeError(
            "there is no gate to be strict about", where="--strict-gate", remedy="add --fail-if"
        )
    return gates


def _with_reference(request: Request) -> Request:
    try:
        with History(history_file()) as history:
            if request.save_baseline == request.named and request.named not in history.baselines():
                return dataclasses.replace(request, first=True)
            rows = referred(history, request.named, where="--compare")
    except OutputError as error:
        try:  # a file or a bundle needs no history
            rows = referred(None, request.named, where="--compare")
        except RecipeError:
            raise error from None
    counting = tuple(row for row in rows if not row.void)
    if not counting:
        raise RecipeError(
            "the run to compare with is void" if rows else "there is nothing in the run to compare with",
            where=f"--compare {request.named}",
            remedy="name another run: `edgepress history list`",
        )
    return dataclasses.replace(request, reference=counting)


def finish(
    request: Request,
    runs: Sequence[RecordedRun],
    answer: Answer,
    reporter: Reporter,
) -> Answer:
    """The answer with what the history says: the run is kept, compared and held to the gates.

    Args:
        request: what was asked for.
        runs: those just made.
        answer: of the benchmark itself.
        reporter: told of a history that cannot be used.
    """
    rows = [row for run in runs for row in run.measurements]
    kept = keep(runs, reporter) if request.keep and runs else False
    document = {**_mapping(answer.document), "run": [run.id for run in runs]}
    answer = dataclasses.replace(
        answer, document=document, records=[measurement_record(row) for row in rows], cases=row_cases(rows)
    )
    if request.compare or request.gates:
        answer = _held(request, rows, answer, reporter)
    if request.save_baseline is not None and rows:
        good = answer.exit_code == EXIT_OK
        text = _save(request.save_baseline, rows, kept=kept, good=good, reporter=reporter)
        answer = dataclasses.replace(answer, blocks=[*answer.blocks, text])
    return answer


def _held(request: Request, rows: Sequence[Measurement], answer: Answer, reporter: Reporter) -> Answer:
    """The answer with comparisons and gates."""
    pairs, problem = _pairs(request, rows)
    results = judge_all(request.gates, gated(rows), pairs, strict=request.strict, first=request.first)
    warn_of_undecided(results, reporter)
    error = problem or _missing(request, rows, results)
    blocks = [*answer.blocks, *_compared(request, pairs, rows)]
    cases = gate_cases(results) or list(answer.cases)
    code = answer.exit_code
    if results:
        blocks.append(gate_table(results))
    if error is not None:
        blocks.append(f"error: {error}")
        code = code or error.exit_code
        text = str(error)
        cases.append(Case(name="reference", group="edgepress", state="error", text=text, reason="missing"))
    compared = {
        "comparison": [comparison_document(pair) for pair in pairs],
        "gates": msgspec.to_builtins(results),
    }
    return dataclasses.replace(
        answer,
        document={**_mapping(answer.document), **compared},
        blocks=blocks,
        exit_code=code or gate_exit_code(results),
        records=[item for pair in pairs for item in comparison_records(pair)] or answer.records,
        cases=cases,
    )


def _mapping(document: object) -> dict[str, Any]:
    return document if isinstance(document, dict) else {"result": document}


def _pairs(request: Request, rows: Sequence[Measurement]) -> tuple[list[Pair], EdgepressError | None]:
    """Every row with what it is compared with, and why the history is of no help, if so."""
    problem: EdgepressError | None = None
    earlier: list[Measurement] = []
    try:
        if not request.beside and history_file().exists():
            with History(history_file()) as history:
                for like in dict.fromkeys(_like(row) for row in rows):
                    earlier += history.rows(like, limit=_NOISE_ROWS)
    except OutputError as error:
        problem = error if request.compare and request.reference is None and not request.first else None
    if not request.beside:
        earlier = _with_those_of_bundles(earlier, rows)
    own = frozenset(row.run for row in rows)
    earlier = [row for row in earlier if row.run not in own]
    if request.beside:
        found = _beside(rows)
    elif request.reference is not None:
        found = match(request.reference, rows)
    elif request.compare and not request.first:
        before = ((latest_before(earlier, row), row) for row in rows)
        found = [(old, row) for old, row in before if old is not None]
    else:
        found = []
    return [Pair(before=old, after=row, spreads=spreads_of(earlier, row)) for old, row in found], problem


def _like(row: Measurement) -> tuple[tuple[str, Any], ...]:
    """Conditions that every row meets that can be compared with this one, and few others do."""
    names = ("model", "target", "role", "kind", "threads", "shapes")
    url = () if row.url is None else (("url IS NULL OR url = ?", row.url),)
    return (*((f"{name} IS ?", getattr(row, name)) for name in names), *url)


def _with_those_of_bundles(earlier: Sequence[Measurement], rows: Sequence[Measurement]) -> list[Measurement]:
    """Earlier rows and those that the bundles bring along in their runs/, the oldest first."""
    known = {row.run for row in earlier}
    found = list(earlier)
    for path in dict.fromkeys(row.bundle_path for row in rows if row.bundle_path is not None):
        with contextlib.suppress(EdgepressError, OSError):  # the bundle itself has just been run
            runs, _ = runs_of_bundle(Path(path))
            found += [row for run in runs if run.id not in known for row in run.measurements]
            known |= {run.id for run in runs}
    return sorted(found, key=lambda row: row.started)


def _beside(rows: Sequence[Measurement]) -> list[tuple[Measurement, Measurement]]:
    """Every gated row with the baseline that it was interleaved with."""
    baselines = {row.run: row for row in rows if row.role == "baseline"}
    return [(baselines[row.run], row) for row in gated(rows) if row.run in baselines]


def _compared(request: Request, pairs: Sequence[Pair], rows: Sequence[Measurement]) -> list[Block]:
    if not request.compare and not request.beside:
        return []
    if request.first:
        return [f"{request.named!r} is not known yet: there is nothing to compare with."]
    blocks: list[Block] = []
    for pair in pairs:
        blocks.append(comparison_table(pair))
        if differences := pair.differences():
            blocks.append("Not the same in both runs:\n" + "\n".join(f"  {line}" for line in differences))
    alone = [row for row in gated(rows) if not any(pair.after is row for pair in pairs)]
    if alone:
        names = ", ".join(label(row, of=rows) for row in alone)
        blocks.append(f"Nothing to compare with, under the same conditions: {names}.")
    return blocks


def gated(rows: Sequence[Measurement]) -> list[Measurement]:
    """The rows that gates are about: not what a run is compared with, no sweeps."""
    return [row for row in rows if row.role in ("bundle", "model") and row.kind != "verify"]


def judge_all(
    gates: Sequence[Gate],
    rows: Sequence[Measurement],
    pairs: Sequence[Pair],
    *,
    strict: bool,
    first: bool = False,
) -> list[GateResult]:
    """Every row held to every gate; with `first` growth is not asked about, as there is no reference yet."""
    found = []
    for row in rows:
        pair = next((pair for pair in pairs if pair.after is row), None)
        for gate in gates:
            if gate.is_relative and first and not row.void:
                continue
            found.append(judge(gate, row, pair, subject=label(row, of=rows), strict=strict))
    return found


def warn_of_undecided(results: Sequence[GateResult], reporter: Reporter) -> None:
    """Say on stderr what passes only because the noise leaves it open."""
    for item in results:
        if item.state == "undecided" and item.holds:
            reporter.warn(f"{item.gate} is undecided for {item.subject}: {item.text}; measure longer")


def gate_exit_code(results: Sequence[GateResult]) -> int:
    """0 if every gate holds, 3 if one does not, 2 if only references are missing."""
    broken = [item for item in results if not item.holds]
    if not broken:
        return EXIT_OK
    return EXIT_USER if all(item.state == "no reference" for item in broken) else EXIT_CHECK


def _missing(
    request: Request, rows: Sequence[Measurement], results: Sequence[GateResult]
) -> EdgepressError | None:
    """The error for gates without a reference, or with nothing to hold to them."""
    if request.gates and not gated(rows):
        return CheckFailed(
            "no run could be held to the gates",
            where=", ".join(gate.text for gate in request.gates),
            remedy="see what was said of the runs above",
        )
    name = request.named or "main"
    return lacking_reference(
        results,
        f"make a first run with --save-baseline {name}, then compare with --compare {name}; or name a "
        "bundle or a JSON result",
    )


def lacking_reference(results: Sequence[GateResult], remedy: str) -> RecipeError | None:
    """The error for gates that only lack what to hold a run against; None if none does, or worse happened."""
    lacking = [item for item in results if item.state == "no reference"]
    if not lacking or gate_exit_code(results) == EXIT_CHECK:
        return None
    return RecipeError(
        "there is no earlier run to hold this one against",
        where=", ".join(dict.fromkeys(item.gate for item in lacking)),
        why=lacking[0].text,
        remedy=remedy,
    )


def _save(name: str, rows: Sequence[Measurement], *, kept: bool, good: bool, reporter: Reporter) -> str:
    """Name the runs; says whether that was done."""
    if any(row.void for row in rows) or not good:
        return f"Not saved as baseline {name!r}: the run is void or a gate does not hold."
    if kept:
        try:
            with History(history_file()) as history:
                history.save_baseline(name, list(dict.fromkeys(row.run for row in rows)))
            return f"Saved as baseline {name!r}: compare with --compare {name}."
        except OutputError as error:
            reporter.warn(str(error))
    return f"Not saved as baseline {name!r}: the history cannot be used."
