"""Runs on their way into the history and out of it: after a command, from bundles and files, by name."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ... import __version__
from ...export.runs import read_runs
from ...graph.errors import DataError, OutputError, RecipeError
from ..opened import Opened, is_bundle
from ..reporter import Reporter
from .documents import (
    EXPORT_FORMAT,
    VERIFY_FORMAT,
    Source,
    bundle_facts,
    read_document,
)
from .rows import Measurement, RecordedRun
from .store import History, history_file

SHORT_ID = 10
_LEAST_ID = 6
_HEX = re.compile(rf"[0-9a-f]{{{_LEAST_ID},64}}")
_BASELINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
_LIMIT_BYTES = 256 << 20


def utc_now() -> str:
    """The time, as documents have it."""
    return _utc(datetime.datetime.now(datetime.UTC).timestamp())


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def keep(runs: Sequence[RecordedRun], reporter: Reporter) -> bool:
    """Add runs to the history; one that cannot be used is warned of and no obstacle."""
    try:
        with History(history_file()) as history:
            history.add(runs)
    except OutputError as error:
        why = f"{error.what}: {error.why}" if error.why else error.what
        reporter.warn(f"this run is not in the history ({error.where}): {why}; {error.remedy}")
        return False
    return True


def runs_of_bundle(bundle: Path) -> tuple[list[RecordedRun], list[str]]:
    """The runs that a bundle keeps in its runs/, and what is wrong with the others, one line each.

    Records that are no measurement of time or outputs (of golden samples, of a search) are left out.

    Raises:
        ModelError: if it is no bundle.
    """
    facts = bundle_facts(bundle)
    records, problems = read_runs(bundle)
    found: list[RecordedRun] = []
    for name, record in records.items():
        if record.name not in ("benchmark", "device"):
            continue
        file = bundle / "runs" / name
        source = Source(where=str(file), bundle=facts, started=_utc(file.stat().st_mtime))
        try:
            found += read_document(record.payload, source)
        except DataError as error:
            problems.append(f"runs/{name}: {error.what} ({error.why})")
    return found, problems


def runs_of_file(path: Path) -> list[RecordedRun]:
    """The runs in a JSON file that edgepress or the device runner wrote.

    Raises:
        DataError: if it cannot be read or holds none.
    """
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise DataError("the file is too large for a result", where=str(path), remedy="check the path")
        document = msgspec.json.decode(path.read_bytes())
        started = _utc(path.stat().st_mtime)
    except OSError as error:
        raise DataError(
            "the file cannot be read", where=str(path), why=error.strerror, remedy="check the path"
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            "the file is no JSON", where=str(path), why=str(error), remedy="name a result in JSON"
        ) from error
    return read_document(document, Source(where=str(path), started=started))


def runs_at(path: Path) -> tuple[list[RecordedRun], list[str]]:
    """Those of a bundle's folder or of a JSON file, and what is wrong with others.

    Raises:
        DataError: if it is neither.
        ModelError: if a bundle is damaged.
    """
    if path.is_dir():
        if is_bundle(path):
            return runs_of_bundle(path)
        raise DataError(
            "this folder is no bundle",
            where=str(path),
            remedy="name a folder that `edgepress compile … -o` wrote, or a JSON file",
        )
    return runs_of_file(path), []


def check_baseline_name(name: str) -> str:
    """The name itself.

    Raises:
        RecipeError: if it is empty, too long, has odd characters, or could be a run's id.
    """
    if not _BASELINE.fullmatch(name) or _HEX.fullmatch(name):
        raise RecipeError(
            f"{name!r} cannot be a baseline's name",
            where="--save-baseline",
            why="it is up to 100 letters, digits, dots, slashes and dashes, and not a run's id",
            remedy="choose a name such as main or v1.2",
        )
    return name


def referred(history: History | None, reference: str, *, where: str) -> list[Measurement]:
    """The rows that a reference names: a baseline, a bundle or JSON file, or a run by its id's beginning.

    Of a bundle's folder it is the latest run that counts, from the history and its runs/.

    Args:
        history: None where it cannot be used: then only files can be named.
        reference: as the user wrote it.
        where: the option or argument, for errors.

    Raises:
        RecipeError: if nothing is called that, or an id fits several runs.
        DataError: if a file is no result, or no run of a bundle counts.
    """
    names = {} if history is None else history.baselines()
    if history is not None and reference in names:
        return [row for run in names[reference] for row in history.rows([("run = ?", run)])]
    path = Path(reference)
    if _exists(path):
        return _referred_path(history, path)
    if history is not None and _HEX.fullmatch(reference):
        rows = history.rows([("run >= ?", reference), ("run < ?", reference + "g")])
        if len({row.run for row in rows}) > 1:
            raise RecipeError(
                f"several runs begin with {reference}",
                where=where,
                why=", ".join(sorted({row.run[: SHORT_ID + 4] for row in rows})),
                remedy="give more of the id",
            )
        if rows:
            return rows
    known = f"; baselines: {', '.join(names)}" if names else ""
    raise RecipeError(
        f"there is no run, baseline, bundle or file {reference!r}",
        where=where,
        remedy=f"`edgepress history list` shows the runs{known}; a first run is given the name by "
        f"--save-baseline {reference}"
        if _BASELINE.fullmatch(reference) and not _HEX.fullmatch(reference)
        else f"`edgepress history list` shows the runs{known}",
    )


def _exists(path: Path) -> bool:
    """Whether it exists, as far as one may see; a name that no file can have does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _referred_path(history: History | None, path: Path) -> list[Measurement]:
    runs, _ = runs_at(path)
    rows = [row for run in runs for row in run.measurements]
    if not is_bundle(path):
        return rows
    digest = bundle_facts(path).digest
    if history is not None:
        kept = history.rows([("bundle_digest = ?", digest)])
        known = {row.run for row in kept}
        rows = sorted([*kept, *(row for row in rows if row.run not in known)], key=lambda row: row.started)
    own = [row for row in rows if row.bundle_digest == digest and not row.void and row.kind != "verify"]
    if not own:
        raise DataError(
            "the bundle was never measured, or no run of it counts",
            where=str(path),
            remedy=f"run `edgepress benchmark {path}` first",
        )
    return _latest_of_each(own)


def _latest_of_each(rows: Sequence[Measurement]) -> list[Measurement]:
    """Of every device, role, count of threads and set of shapes the last row; compiles' only if alone."""
    timed = [row for row in rows if row.kind == "benchmark"] or rows
    found = {(row.role, row.device, row.threads, row.shapes): row for row in timed}
    return list(found.values())


def export_document(history: History, rows: Sequence[Measurement]) -> dict[str, Any]:
    """The runs of rows as a document that can be imported elsewhere.

    Raises:
        OutputError: if the history cannot be read.
    """
    by_run: dict[str, list[Measurement]] = {}
    for row in rows:
        by_run.setdefault(row.run, []).append(row)
    return {
        "format": EXPORT_FORMAT,
        "schema_version": 1,
        "runs": [
            {"document": history.document(run), "measurements": msgspec.to_builtins(own)}
            for run, own in by_run.items()
        ],
    }


def device_run(result: Mapping[str, Any], *, device: str, url: str, bundle: Path) -> RecordedRun:
    """What the device runner found on a device, as a run of the history.

    Args:
        result: docs/benchmark.schema.json.
        device, url: as the devices file or the command line has them.
        bundle: the bundle that was run.

    Raises:
        DataError: if it is no such result.
        ModelError: if the bundle is gone.
    """
    source = Source(where=device, bundle=bundle_facts(bundle), device=device, url=url)
    (run,) = read_document(result, source)
    return run


def local_run(document: Mapping[str, Any], where: str) -> RecordedRun:
    """A benchmark or verification on this machine as a run of the history.

    Raises:
        DataError: if it is no such document.
    """
    plain = msgspec.json.decode(msgspec.json.encode(document))
    (run,) = read_document(plain, Source(where=where, device="local", url="local"))
    return run


def keep_compiled(bundle: Path, *, device: str, url: str, reporter: Reporter) -> None:
    """Keep what a device found in a bundle that was just compiled: it lies in the bundle's runs/.

    Args:
        bundle: its folder.
        device, url: as the devices file or the command line has them.
        reporter: told what could not be kept.
    """
    records, _ = read_runs(bundle)
    try:
        runs = [
            device_run(record.payload, device=device, url=url, bundle=bundle)
            for record in records.values()
            if record.name == "device"
        ]
    except DataError as error:
        reporter.warn(f"the run on {device} is not in the history: {error.what}")
        return
    if runs:
        keep(runs, reporter)


def verify_run(bundle: Path, document: Mapping[str, Any], started: str) -> RecordedRun:
    """A verification on this machine as a run of the history.

    Args:
        bundle: what was verified.
        document: what was found, "verified" at least.
        started: when, UTC.

    Raises:
        ModelError: if the bundle's manifest cannot be read.
        DataError: if the document is none of a verification.
    """
    source = Source(where=str(bundle), bundle=bundle_facts(bundle), device="local", url="local")
    head = {"format": VERIFY_FORMAT, "started": started, "edgepress": __version__}
    plain = msgspec.json.decode(msgspec.json.encode({**head, **document}, enc_hook=str))
    (run,) = read_document(plain, source)
    return run


def measured(opened: Opened, file: Path, *, role: str) -> dict[str, Any]:
    """What the document of a local benchmark says of one thing that it timed.

    Args:
        opened: a bundle or a model.
        file: the .onnx file that was run.
        role: "baseline", or "" for what the bundle or model is.
    """
    if opened.bundle is not None:
        facts = bundle_facts(opened.bundle)
        about = {
            "bundle_digest": facts.digest,
            "bundle_path": facts.path,
            "model": facts.model,
            "target": facts.target,
            "file_bytes": facts.file_bytes,
            "drift_cosine": facts.drift_cosine,
        }
        return {"name": opened.name, "role": role or "bundle", **about}
    origin = opened.graph().origin
    files = {file, *(file.parent / name for name in origin.files), file.with_name(f"{file.name}.data")}
    size_bytes = sum(path.stat().st_size for path in files if path.is_file())
    return {"name": opened.name, "role": role or "model", "model": origin.name, "file_bytes": size_bytes}
