"""Bundles on devices: benchmark and verify by ssh, on one device or on many side by side."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from ...export.runs import append_run
from ...export.verify import read_manifest
from ...graph.errors import (
    EXIT_CHECK,
    EdgepressError,
    OutputError,
    RecipeError,
    RuntimeUnavailable,
    UserError,
)
from ...runtimes import device_runner
from ...runtimes.device_file import DeviceEntry, choose_devices, read_devices
from ...runtimes.remote import parse_device_url
from ...runtimes.ssh import SshDevice, runner_result, void_error
from ...runtimes.ssh_connection import SshSettings
from ...runtimes.ssh_environment import RuntimeWish
from ..history.after_run import Request, finish
from ..history.record import device_run, keep
from ..history.rows import RecordedRun
from ..opened import is_bundle, open_named
from ..output import Answer, Table, format_ms
from ..reporter import Reporter
from .emulated import instruction_table, is_emulated, open_emulated, set_up
from .fleet import Closable, Outcome, exit_code_of, only_error, run_on_devices
from .scenario_options import LEAST_LIMIT_S, least_limit_s, runner_commands, runner_words
from .scenario_tables import further_tables

Result = dict[str, Any]
Told = Callable[[Closable], None]
_LOCAL = "local"
THIS_MACHINE = DeviceEntry(name=_LOCAL, url=_LOCAL)
_RUN_NAME = "device"


def devices_of(arguments: argparse.Namespace) -> tuple[DeviceEntry, ...]:
    """The devices that a command line names; empty where it works on this machine as ever.

    Raises:
        RecipeError: if options contradict each other, or a URL or the devices file is wrong.
        NotSupported: if a URL is of a kind that is not supported yet.
    """
    named = list(dict.fromkeys(arguments.device or ()))
    if arguments.group is not None and arguments.devices is None:
        raise RecipeError("--group chooses from a devices file", where="--group", remedy="add --devices FILE")
    entries = [_entry(url, arguments) for url in named]
    if arguments.devices is not None:
        listed = choose_devices(read_devices(Path(arguments.devices)), group=arguments.group)
        entries += [_with_options(entry, arguments) for entry in listed]
    if all(entry.url == _LOCAL for entry in entries) and len(entries) <= 1:
        _refuse_unused(arguments)
        return ()
    return tuple(entries)


def _entry(url: str, arguments: argparse.Namespace) -> DeviceEntry:
    return _with_options(DeviceEntry(name=str(parse_device_url(url)), url=url), arguments)


def _with_options(entry: DeviceEntry, arguments: argparse.Namespace) -> DeviceEntry:
    """The entry with what the command line says of all devices; that goes before the file."""
    wheels = arguments.wheels
    if wheels is not None and not Path(wheels).is_dir():
        raise RecipeError("there is no such folder", where=f"--wheels {wheels}", remedy="check the path")
    config = arguments.ssh_config
    if config is not None and not Path(config).is_file():
        raise RecipeError("there is no such file", where=f"--ssh-config {config}", remedy="check the path")
    return msgspec.structs.replace(
        entry,
        wheels=wheels or entry.wheels,
        ssh_config=config or entry.ssh_config,
        python=arguments.device_python or entry.python,
    )


def _refuse_unused(arguments: argparse.Namespace) -> None:
    for option in ("wheels", "ssh_config", "device_python"):
        if getattr(arguments, option) is not None:
            flag = f"--{option.replace('_', '-')}"
            raise RecipeError(
                f"{flag} is about devices by ssh", where=flag, remedy="add --device ssh://USER@HOST"
            )


def open_entry(entry: DeviceEntry, reporter: Reporter, version: str | None, told: Told) -> SshDevice:
    """The device of an entry, not connected yet.

    Args:
        entry: one by ssh, or an emulated board.
        reporter: told what a person should know.
        version: of onnxruntime, that it shall have.
        told: told the device, so that an interrupt can end its work.
    """
    if is_emulated(entry):
        emulated = open_emulated(entry, version, reporter)
        told(emulated)
        return emulated
    settings = SshSettings(config=None if entry.ssh_config is None else Path(entry.ssh_config))
    if entry.python is not None:
        settings = SshSettings(config=settings.config, python=entry.python)
    device = SshDevice(
        parse_device_url(entry.url),
        name=entry.name,
        settings=settings,
        wish=RuntimeWish(
            version=version,
            wheels=None if entry.wheels is None else Path(entry.wheels),
            any_version=entry.python is not None,
        ),
        log=reporter.note,
    )
    told(device)
    return device


def benchmark(
    arguments: argparse.Namespace,
    entries: Sequence[DeviceEntry],
    reporter: Reporter,
    request: Request | None = None,
) -> Answer:
    """Check, verify and time bundles on every device; bundles keep the results in runs/.

    Raises:
        RecipeError: if an option is not for devices, or what is named is no bundle.
        EdgepressError: of a single device, what ended its work.
    """
    for option in ("shape", "seed"):
        if getattr(arguments, option) is not None:
            raise RecipeError(
                f"--{option} is for this machine",
                where=f"--{option}",
                why="a device times the inputs that the bundle itself carries",
                remedy=f"leave --{option} out, or compile with the shape that shall be timed",
            )
    words = runner_words(arguments)
    with tempfile.TemporaryDirectory(prefix="edgepress-benchmark-") as scratch:
        baseline = _baseline(arguments, reporter, Path(scratch))
        bundles = [_bundle(name) for name in dict.fromkeys(arguments.bundle_or_model)]
        outcomes = _measure(
            entries,
            bundles,
            runner_commands(arguments),
            reporter,
            words=words,
            limit_s=least_limit_s(arguments),
            threads=arguments.threads,
            baseline=baseline,
        )
    for outcome in outcomes:
        for bundle, result in zip(bundles, outcome.value or (), strict=False):
            _keep(bundle, result, reporter)
    rows = tuple(
        row
        for outcome in outcomes
        for bundle, result in zip(bundles, outcome.value or (), strict=False)
        for row in _latency_rows(outcome.entry.name, bundle, result)
    )
    columns = ("device", "bundle", "timed", "p50", "p90", "p99", "load", "outputs", "counts")
    numeric = frozenset({"p50", "p90", "p99", "load"})
    counts = instruction_table(
        (outcome.entry.name, bundle, _outputs(result), result)
        for outcome in outcomes
        for bundle, result in zip(bundles, outcome.value or (), strict=False)
    )
    tables = [Table(columns=columns, rows=rows, numeric=numeric), *([] if counts is None else [counts])]
    tables += further_tables(
        [
            (outcome.entry.name, str(bundle), result)
            for outcome in outcomes
            for bundle, result in zip(bundles, outcome.value or (), strict=False)
        ]
    )
    answer = _answer(outcomes, bundles, tables)
    return finish(request or Request(), _runs(outcomes, bundles, reporter), answer, reporter)


def verify(arguments: argparse.Namespace, entries: Sequence[DeviceEntry], reporter: Reporter) -> Answer:
    """Check a bundle's hashes and golden samples on every device.

    Raises:
        VerifyFailed: on a single device, if the bundle or its outputs are not what it says.
        EdgepressError: of a single device, what ended its work.
    """
    bundles = [_bundle(arguments.bundle)]
    outcomes = _measure(entries, bundles, ("verify",), reporter)
    rows = tuple(
        (outcome.entry.name, str(bundle), _outputs(result), (result["runtime"] or {}).get("version") or "")
        for outcome in outcomes
        for bundle, result in zip(bundles, outcome.value or (), strict=False)
    )
    table = Table(columns=("device", "bundle", "outputs", "onnxruntime"), rows=rows)
    if not arguments.no_history:
        keep(_runs(outcomes, bundles, reporter), reporter)
    return _answer(outcomes, bundles, [table])


def _runs(
    outcomes: Sequence[Outcome[list[Result]]], bundles: Sequence[Path], reporter: Reporter
) -> list[RecordedRun]:
    """The results as runs of the history; one that cannot be read is warned of."""
    found = []
    for outcome in outcomes:
        for bundle, result in zip(bundles, outcome.value or (), strict=False):
            try:
                found.append(
                    device_run(result, device=outcome.entry.name, url=outcome.entry.url, bundle=bundle)
                )
            except UserError as error:
                reporter.warn(f"the run on {outcome.entry.name} is not in the history: {error.what}")
    return found


def _measure(
    entries: Sequence[DeviceEntry],
    bundles: Sequence[Path],
    commands: Sequence[str],
    reporter: Reporter,
    *,
    words: Sequence[str] = (),
    threads: int | None = None,
    baseline: Path | None = None,
    limit_s: float = LEAST_LIMIT_S,
) -> tuple[Outcome[list[Result]], ...]:
    version = read_manifest(bundles[0]).versions.get("onnxruntime")

    def work(entry: DeviceEntry, told: Told) -> list[Result]:
        count = threads or entry.threads
        options = [*words, *(["--threads", str(count)] if count else [])]
        if entry.url == _LOCAL:
            more = [] if baseline is None else ["--baseline", str(baseline)]
            return [_run_here(bundle, commands, [*options, *more], limit_s) for bundle in bundles]
        with ExitStack() as stack:
            device = stack.enter_context(open_entry(entry, reporter, version, told))
            if baseline is not None:
                options += ["--baseline", _baseline_there(device, baseline)]
            return [device.run_bundle(bundle, commands, options, limit_s=limit_s) for bundle in bundles]

    set_up(entries, version, reporter)
    with reporter.stage(f"{' and '.join(commands)} on {', '.join(entry.name for entry in entries)}"):
        outcomes = run_on_devices(entries, work)
    only_error(outcomes)
    return outcomes


def _run_here(bundle: Path, commands: Sequence[str], options: Sequence[str], limit_s: float) -> Result:
    """The device runner on this machine, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="edgepress-device-") as folder:
        out = Path(folder) / "result.json"
        words = [sys.executable, device_runner.__file__, *commands, "--bundle", str(bundle)]
        try:
            done = subprocess.run(
                [*words, "--out", str(out), *options],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeUnavailable(
                f"the device runner did not end within {error.timeout:g} s", where=_LOCAL
            ) from None
        if not out.is_file():
            raise RuntimeUnavailable(
                "the device runner wrote no result",
                where=_LOCAL,
                why=(done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1],
                remedy="`edgepress doctor` says what is missing",
            )
        return runner_result(out.read_bytes(), done.returncode, _LOCAL)


def _bundle(name: str) -> Path:
    if not is_bundle(Path(name)):
        raise RecipeError(
            "a device runs bundles",
            where=name,
            remedy="name a folder that `edgepress compile … -o` wrote; a model to compare with is --baseline",
        )
    return Path(name)


def _baseline(arguments: argparse.Namespace, reporter: Reporter, scratch: Path) -> Path | None:
    """A model's file or a bundle's folder to compare with, in a form that the device runner takes."""
    if arguments.baseline is None:
        return None
    opened = open_named(arguments.baseline, reporter, threads=1)
    return opened.bundle or opened.saved(scratch)


def _baseline_there(device: SshDevice, baseline: Path) -> str:
    if baseline.is_dir():
        return device.put_bundle(baseline)
    from ...graph.load import load_model

    weights = load_model(baseline).origin.files
    files = [baseline, *(baseline.parent / name for name in weights if name != baseline.name)]
    return device.put([file for file in files if file.is_file()]).as_posix()


def _keep(bundle: Path, result: Result, reporter: Reporter) -> None:
    try:
        append_run(bundle, _RUN_NAME, result)
    except OutputError as error:
        reporter.warn(f"the result was not kept in {bundle}: {error.why or error.what}")


def _latency_rows(device: str, bundle: Path, result: Result) -> list[tuple[str, ...]]:
    counts = "; ".join(result["void_reasons"]) if result["void"] else "yes"
    latency: Mapping[str, Any] = (result["benchmark"] or {}).get("latency") or {}
    head = (device, str(bundle))
    if result["emulated"]:
        return []
    if not latency:
        return [(*head, "not timed", "", "", "", "", _outputs(result), counts)]
    return [
        (
            *head,
            name,
            *(format_ms(item[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "load_ms")),
            _outputs(result),
            counts,
        )
        for name, item in latency.items()
    ]


def _outputs(result: Result) -> str:
    outputs = result["outputs"]
    if outputs is None:
        return "no golden samples"
    state = "within tolerance" if outputs["within_tolerance"] else "out of tolerance"
    return f"{outputs['samples']} golden samples {state}"


def _answer(
    outcomes: Sequence[Outcome[list[Result]]], bundles: Sequence[Path], tables: Sequence[Table]
) -> Answer:
    """The tables of those that worked, the errors of the others, and every result in the document."""
    blocks: list[str | Table] = [table for table in tables if table.rows]
    notes = dict.fromkeys(
        f"{outcome.entry.name}: {note}"
        for outcome in outcomes
        for result in outcome.value or ()
        for note in result["notes"]
    )
    if notes:
        blocks.append("\n".join(notes))
    voids = [
        error
        for outcome in outcomes
        for result in outcome.value or ()
        if (error := void_error(result, outcome.entry.name)) is not None
    ]
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    blocks += [f"error: {error}" for error in (*failed, *voids)]
    devices = [
        {
            "name": outcome.entry.name,
            "url": outcome.entry.url,
            "results": [
                {"bundle": str(bundle), "result": result}
                for bundle, result in zip(bundles, outcome.value or (), strict=False)
            ],
            "error": _error_document(outcome.error),
        }
        for outcome in outcomes
    ]
    code = exit_code_of(outcomes) or (EXIT_CHECK if voids else 0)
    return Answer(document={"devices": devices}, blocks=blocks, exit_code=code)


def _error_document(error: EdgepressError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {
        "what": error.what,
        "where": error.where,
        "why": error.why,
        "remedy": error.remedy,
        "exit_code": error.exit_code,
    }
