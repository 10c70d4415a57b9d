"""Bundles on devices: benchmark and verify by ssh, on one device or on many side by side."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...export.runs import append_run
from ...graph.errors import EXIT_CHECK, EdgepressError, OutputError, RecipeError, UserError
from ...runtimes.device_file import DeviceEntry, choose_devices, read_devices
from ...runtimes.remote import parse_device_url
from ...runtimes.ssh import SshDevice, void_error
from ...runtimes.ssh_connection import SshSettings
from ...runtimes.ssh_environment import RuntimeWish
from ..history.after_run import Request, finish
from ..history.record import device_run, keep
from ..history.rows import RecordedRun
from ..opened import is_bundle, open_named
from ..output import Answer, Table
from ..reporter import Reporter
from ..timing_tables import format_known_ms
from .emulated import instruction_table, is_emulated, open_emulated, refuse_unused
from .fleet import exit_code_of
from .running import LOCAL, Outcomes, Result, Task, Told, results_of, run_task
from .scenario_options import LEAST_LIMIT_S, about_time, least_limit_s, runner_commands, runner_words
from .scenario_tables import further_tables

THIS_MACHINE = DeviceEntry(name=LOCAL, url=LOCAL)
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
    entries = [DeviceEntry(name=str(parse_device_url(url)), url=url) for url in named]
    if arguments.devices is not None:
        entries += choose_devices(read_devices(Path(arguments.devices)), group=arguments.group)
    if not any(parse_device_url(entry.url).kind == "ssh" for entry in entries):
        _refuse_unused(arguments)
    entries = [_with_options(entry, arguments) for entry in entries]
    if all(entry.url == LOCAL for entry in entries) and len(entries) <= 1:
        if entries and getattr(arguments, "threads", None) is None:
            arguments.threads = entries[0].threads
        return ()
    return tuple(entries)


def _with_options(entry: DeviceEntry, arguments: argparse.Namespace) -> DeviceEntry:
    """The entry with what the command line says of all devices by ssh; that goes before the file."""
    if entry.url == LOCAL:
        refuse_unused(entry, "this machine runs the Python and the runtime of this edgepress")
    if parse_device_url(entry.url).kind != "ssh":
        return entry
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
                f"{flag} is about devices by ssh",
                where=flag,
                remedy=f"leave {flag} out, or add --device ssh://USER@HOST",
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
    _say_of_emulated(arguments, entries, reporter)
    words = runner_words(arguments)
    with tempfile.TemporaryDirectory(prefix="edgepress-benchmark-") as scratch:
        task = Task(
            bundles=[_bundle(name) for name in dict.fromkeys(arguments.bundle_or_model)],
            commands=runner_commands(arguments),
            words=words,
            threads=arguments.threads,
            baseline=_baseline(arguments, reporter, Path(scratch)),
            limit_s=least_limit_s(arguments),
            check=_check,
            keep=functools.partial(_keep, reporter),
        )
        outcomes = run_task(task, entries, open_entry, reporter)
    answer = _answer(outcomes, task.bundles, _tables(list(results_of(outcomes, task.bundles))))
    return finish(request or Request(), _runs(outcomes, task.bundles, reporter), answer, reporter)


def _say_of_emulated(
    arguments: argparse.Namespace, entries: Sequence[DeviceEntry], reporter: Reporter
) -> None:
    """Tell beforehand which options emulated boards cannot follow.

    Raises:
        RecipeError: if no device can.
    """
    flags = about_time(arguments)
    boards = [entry.name for entry in entries if is_emulated(entry)]
    if not flags or not boards:
        return
    if len(boards) == len(entries):
        raise RecipeError(
            f"an emulated board has no use for {', '.join(flags)}",
            where=", ".join(boards),
            why="it counts the instructions of an inference on one thread; its times say nothing",
            remedy=f"leave {', '.join(flags)} out, or name a real board: --device ssh://USER@HOST",
        )
    reporter.note(f"{', '.join(flags)}: not on {', '.join(boards)}, which count instructions only")


def _check(result: Result) -> None:
    """Read everything that is shown of a result; raises KeyError, TypeError or the like where it lies."""
    for name in ("notes", "void_reasons"):
        if not isinstance(result[name], list):
            raise TypeError(f"{name} is no list")
        "".join(result[name])
    _tables([(THIS_MACHINE, Path(), result)])


def _tables(results: Sequence[tuple[DeviceEntry, Path, Result]]) -> list[Table]:
    """What was measured: latencies, instructions, and everything further."""
    columns = ("device", "bundle", "timed", "p50", "p90", "p99", "load", "outputs", "counts")
    rows = tuple(
        row for entry, bundle, result in results for row in _latency_rows(entry.name, bundle, result)
    )
    counts = instruction_table(
        (entry.name, bundle, _outputs(result), result) for entry, bundle, result in results
    )
    return [
        Table(columns=columns, rows=rows, numeric=frozenset({"p50", "p90", "p99", "load"})),
        *([] if counts is None else [counts]),
        *further_tables([(entry.name, str(bundle), result) for entry, bundle, result in results]),
    ]


def verify(arguments: argparse.Namespace, entries: Sequence[DeviceEntry], reporter: Reporter) -> Answer:
    """Check a bundle's hashes and golden samples on every device.

    Raises:
        VerifyFailed: on a single device, if the bundle or its outputs are not what it says.
        EdgepressError: of a single device, what ended its work.
    """
    bundles = [_bundle(arguments.bundle)]
    task = Task(bundles=bundles, commands=("verify",), limit_s=LEAST_LIMIT_S, check=_verify_row)
    outcomes = run_task(task, entries, open_entry, reporter)
    rows = tuple(
        (entry.name, str(bundle), *_verify_row(result))
        for entry, bundle, result in results_of(outcomes, bundles)
    )
    table = Table(columns=("device", "bundle", "outputs", "onnxruntime"), rows=rows)
    if not arguments.no_history:
        keep(_runs(outcomes, bundles, reporter), reporter)
    return _answer(outcomes, bundles, [table])


def _verify_row(result: Result) -> tuple[str, str]:
    return _outputs(result), (result["runtime"] or {}).get("version") or ""


def _runs(outcomes: Outcomes, bundles: Sequence[Path], reporter: Reporter) -> list[RecordedRun]:
    """The results as runs of the history; one that cannot be read is warned of."""
    found = []
    for entry, bundle, result in results_of(outcomes, bundles):
        try:
            found.append(device_run(result, device=entry.name, url=entry.url, bundle=bundle))
        except UserError as error:
            reporter.warn(f"the run on {entry.name} is not in the history: {error.what}")
    return found


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


def _keep(reporter: Reporter, bundle: Path, result: Result) -> None:
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
            *(format_known_ms(item.get(key)) for key in ("p50_ms", "p90_ms", "p99_ms", "load_ms")),
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


def _answer(outcomes: Outcomes, bundles: Sequence[Path], tables: Sequence[Table]) -> Answer:
    """The tables of those that worked, the errors of the others, and every result in the document."""
    blocks: list[str | Table] = [table for table in tables if table.rows]
    results = list(results_of(outcomes, bundles))
    notes = dict.fromkeys(f"{entry.name}: {note}" for entry, _, result in results for note in result["notes"])
    if notes:
        blocks.append("\n".join(notes))
    voids = [error for entry, _, result in results if (error := void_error(result, entry.name)) is not None]
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
