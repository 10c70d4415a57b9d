"""Many small models, run on this machine or on a device by remote_replay.py, and what they gave."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..graph.errors import RuntimeUnavailable
from . import remote_replay
from .base import Array, SessionOptions
from .ssh_forms import ARCHIVE_FAILURES, stored_arrays
from .ssh_session import ProgramEnd

_PROGRAM = "remote_replay.py"
_REQUEST = "request.json"
_RESULT = "outputs.npz"
# The agent returns at most 64 MiB, some of which are names and the report.
_ROUND_OUTPUT_BYTES = 48 << 20
_ROUND_INPUT_BYTES = 192 << 20
_MOST_DEATHS = 4
_LIMIT_S = 3600.0
_LAST = re.compile(rf"last line: {remote_replay.MARK} (\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One model and what it is run on.

    Attributes:
        model: serialised, or the name of a file of the bundle (or a whole path on this machine).
        inputs: names of its inputs.
        feeds: for each sample the files of its inputs, in order.
        level: the optimization level by its enum's name, where it is not the common one.
    """

    model: bytes | str
    inputs: tuple[str, ...]
    feeds: tuple[tuple[str, ...], ...]
    level: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Played:
    """What one job gave.

    Attributes:
        outputs: per sample the outputs in the model's order; fewer samples where one failed.
        kernels: operator of the runtime -> how many of its kernels ran, over all samples.
        error: why it did not load or run.
    """

    outputs: tuple[tuple[Array, ...], ...] = ()
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @property
    def output_bytes(self) -> int:
        """Of all samples."""
        return sum(array.nbytes for sample in self.outputs for array in sample)


class Runs(Protocol):
    """Where remote_replay.py runs: called with its files by name, and the bundle's folder here."""

    def __call__(self, files: Mapping[str, Path], bundle: Path) -> bytes:
        """The archive of outputs.

        Raises:
            RuntimeUnavailable: if the program dies; its last line ends `why`.
        """


class _ProgramDevice(Protocol):
    def put_bundle(self, bundle: Path) -> str: ...

    def run_program(
        self,
        files: Mapping[str, Path],
        words: Sequence[str],
        *,
        result: str = ...,
        limit_s: float | None = ...,
        keep: bool = ...,
    ) -> ProgramEnd: ...


def on_device(device: _ProgramDevice, where: str) -> Runs:
    """The way to a device that copies files and runs programs: by ssh, or emulated."""

    def run(files: Mapping[str, Path], bundle: Path) -> bytes:
        folder = device.put_bundle(bundle)
        words = [f"{{files}}/{_PROGRAM}", f"{{files}}/{_REQUEST}", folder]
        end = device.run_program(files, words, result=_RESULT, limit_s=_LIMIT_S, keep=False)
        if end.result is None or end.status:
            raise _no_result(where, end.status, list(end.told))
        return end.result

    return run


def on_this_machine(files: Mapping[str, Path], bundle: Path) -> bytes:
    """remote_replay.py in a process of its own.

    Raises:
        RuntimeUnavailable: if it dies or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="edgepress-replay-") as folder:
        words = [sys.executable, str(files[_PROGRAM]), str(files[_REQUEST].resolve()), str(bundle.resolve())]
        try:
            done = subprocess.run(
                words,
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeUnavailable(
                f"{_PROGRAM} did not end within {error.timeout:g} s", where="local"
            ) from None
        lines = [line for line in done.stderr.splitlines() if line]
        if done.returncode < 0:
            raise RuntimeUnavailable(
                f"{_PROGRAM} died with signal {-done.returncode}",
                where="local",
                why=f"the process crashed; its last line: {lines[-1] if lines else ''}",
                remedy="try another version of onnxruntime, and report the model if it stays so",
            )
        result = Path(folder) / _RESULT
        if done.returncode or not result.is_file():
            raise _no_result("local", done.returncode, lines)
        return result.read_bytes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Where and how jobs run.

    Attributes:
        runs: this machine or a device.
        bundle: the bundle's folder on this machine.
        folder: holds the files that feed the jobs.
        options: of all sessions.
    """

    runs: Runs
    bundle: Path
    folder: Path
    options: SessionOptions


def play(
    jobs: Sequence[Job], stage: Stage, *, output_bytes: Sequence[int] | None = None
) -> tuple[Played, ...]:
    """Run jobs and bring back what they give, in as many rounds as their sizes ask for.

    A job that kills the process is reported as such, and the others are run again without it.

    Args:
        jobs: what to run.
        stage: where and how.
        output_bytes: of each job, where it is known; None where nothing limits what comes back.

    Raises:
        RuntimeUnavailable: if the runtime is missing there, the device goes away, or the process dies
            more than a few times.
    """
    found: dict[int, Played] = {}
    sizes = list(output_bytes) if output_bytes is not None else [0] * len(jobs)
    for index, size in enumerate(sizes):
        if size > _ROUND_OUTPUT_BYTES:
            found[index] = Played(error=f"its outputs ({size >> 20} MiB) are more than one run brings back")
    deaths = 0
    for group in _rounds(jobs, sizes, stage.folder, skip=found):
        left = list(group)
        while left:
            try:
                archive = _run_round(left, jobs, stage)
            except RuntimeUnavailable as error:
                match = _LAST.search(error.why or "")
                dead = None if match is None else int(match[1])
                deaths += 1
                if dead not in left or deaths > _MOST_DEATHS:
                    raise
                found[dead] = Played(error=error.what)
                left.remove(dead)
                continue
            found.update(_read(archive, left, jobs))
            break
    return tuple(found.get(index, Played(error="it was not run")) for index in range(len(jobs)))


def _rounds(
    jobs: Sequence[Job], sizes: Sequence[int], folder: Path, *, skip: Mapping[int, Played]
) -> list[list[int]]:
    groups: list[list[int]] = []
    inputs = outputs = 0
    for index, job in enumerate(jobs):
        if index in skip:
            continue
        given = sum((folder / name).stat().st_size for sample in job.feeds for name in sample)
        given += len(job.model) if isinstance(job.model, bytes) else 0
        full = inputs + given > _ROUND_INPUT_BYTES or outputs + sizes[index] > _ROUND_OUTPUT_BYTES
        if not groups or full:
            groups.append([])
            inputs = outputs = 0
        groups[-1].append(index)
        inputs, outputs = inputs + given, outputs + sizes[index]
    return groups


def _run_round(group: Sequence[int], jobs: Sequence[Job], stage: Stage) -> bytes:
    with tempfile.TemporaryDirectory(prefix="edgepress-replay-") as scratch:
        packed, request = Path(scratch) / remote_replay.PACKED, Path(scratch) / _REQUEST
        entries = []
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            names = dict.fromkeys(name for index in group for sample in jobs[index].feeds for name in sample)
            for name in names:
                archive.write(stage.folder / name, name)
            for index in group:
                job = jobs[index]
                entry = {"index": index, "inputs": job.inputs, "feeds": job.feeds, "level": job.level}
                if isinstance(job.model, bytes):
                    entry["model"] = f"m{index}.onnx"
                    archive.writestr(f"m{index}.onnx", job.model)
                else:
                    entry["file"] = job.model
                entries.append(entry)
        document = {
            "threads": stage.options.threads,
            "level": stage.options.level_name,
            "config": dict(stage.options.config),
            "units": entries,
        }
        request.write_text(json.dumps(document), encoding="utf-8")
        program = Path(__file__).with_name(_PROGRAM)
        return stage.runs({_PROGRAM: program, _REQUEST: request, remote_replay.PACKED: packed}, stage.bundle)


def _read(data: bytes, group: Sequence[int], jobs: Sequence[Job]) -> dict[int, Played]:
    """What a round brought back; a device that says less, or more, than it was asked for is not believed."""
    try:
        with stored_arrays(data) as stored:
            report = json.loads(stored[remote_replay.REPORT].tobytes())
            found = {item["index"]: _played(item, stored, jobs[item["index"]]) for item in report}
        if set(found) != set(group):
            raise ValueError(f"models {sorted(found)} instead of {sorted(group)}")
    except ARCHIVE_FAILURES as error:
        raise RuntimeUnavailable(
            "the program wrote no valid outputs",
            where=_PROGRAM,
            why=f"{type(error).__name__}: {error}",
            remedy="try again; report it if it stays so",
        ) from error
    return found


def _played(item: Mapping[str, Any], stored: Mapping[str, Array], job: Job) -> Played:
    """One entry of the report with its arrays; a job that failed has none."""
    if item["error"] is not None:
        return Played(kernels=dict(item["kernels"]), error=str(item["error"]))
    if item["samples"] != len(job.feeds) or not item["outputs"] > 0:
        raise ValueError(f"{item['samples']} samples of {item['outputs']} outputs")
    outputs = tuple(
        tuple(stored[f"u{item['index']}_s{sample}_o{place}"] for place in range(item["outputs"]))
        for sample in range(item["samples"])
    )
    return Played(outputs=outputs, kernels=dict(item["kernels"]))


def _no_result(where: str, status: int, lines: Sequence[str]) -> RuntimeUnavailable:
    told = [line for line in lines if line and not line.startswith(remote_replay.MARK)]
    return RuntimeUnavailable(
        f"{_PROGRAM} wrote no result",
        where=where,
        why="; ".join([f"exit status {status}", *told[-3:]]),
        remedy="what it wrote last says why; `edgepress doctor` shows the runtime",
    )
