"""`edgepress verify`: is a bundle what it says it is?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..graph.errors import ModelError, RecipeError, VerifyFailed
from .devices.options import on_devices
from .history.record import keep, utc_now, verify_run
from .output import Answer, Table, format_bytes
from .reporter import Reporter, Stage


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Recompute the digests and re-run the golden samples; with --kernels, compare kernel by kernel.

    Raises:
        VerifyFailed: with everything that is wrong.
        ModelError: if the folder is not a bundle.
        RecipeError: if options contradict each other.
    """
    if arguments.kernels:
        from .devices import commands as device_commands
        from .devices import kernel_replay

        entries = device_commands.devices_of(arguments) if on_devices(arguments) else ()
        return kernel_replay.run(arguments, entries, reporter)
    if arguments.baseline is not None:
        raise RecipeError(
            "--baseline is for --kernels",
            where="--baseline",
            remedy="add --kernels, or use `edgepress drift`",
        )
    if on_devices(arguments):
        from .devices import commands as device_commands

        if entries := device_commands.devices_of(arguments):
            return device_commands.verify(arguments, entries, reporter)
    from ..export.verify import verify_bundle

    bundle, started = Path(arguments.bundle), utc_now()
    try:
        with ExitStack() as stages:
            report = verify_bundle(bundle, progress=_Progress(reporter, stages))
    except VerifyFailed as error:
        if not arguments.no_history:
            _keep(bundle, {"verified": False, "error": str(error)}, started, reporter)
        raise
    golden = "none in this bundle"
    if report.golden_samples:
        how = "equal bit by bit" if report.exact else "within the tolerance of the manifest"
        golden = f"{report.golden_samples} samples, {how}"
    rows = (
        ("files", f"{report.files} ({format_bytes(report.size_bytes)}), every digest holds"),
        ("golden samples", golden),
        ("later measurements", ", ".join(report.runs) or "none"),
        ("digest", report.digest),
    )
    document = {
        "bundle": report.bundle,
        "verified": True,
        "digest": report.digest,
        "files": report.files,
        "size_bytes": report.size_bytes,
        "golden_samples": report.golden_samples,
        "golden_exact": report.exact,
        "runs": report.runs,
    }
    if not arguments.no_history:
        _keep(bundle, document, started, reporter)
    return Answer(
        document=document,
        blocks=(
            f"{report.bundle} is what it says it is.",
            Table(columns=("checked", "result"), rows=rows),
        ),
    )


def _keep(bundle: Path, document: Mapping[str, Any], started: str, reporter: Reporter) -> None:
    """Add the verification to the history; a bundle too damaged to say what it is has no place there."""
    try:
        keep([verify_run(bundle, document, started)], reporter)
    except ModelError as error:
        reporter.warn(f"this run is not in the history: {error.what}")


class _Progress:
    """Turns (stage, done, total) calls into stages of the reporter."""

    def __init__(self, reporter: Reporter, stages: ExitStack) -> None:
        self._reporter = reporter
        self._stages = stages
        self._name: str | None = None
        self._stage: Stage | None = None
        self._done = 0

    def __call__(self, name: str, done: int, total: int) -> None:
        if name != self._name or self._stage is None:
            self._stages.close()
            self._stage = self._stages.enter_context(self._reporter.stage(name, total=total))
            self._name, self._done = name, 0
        self._stage.advance(done - self._done)
        self._done = done
