"""The device runner at work: on devices by ssh, on emulated boards and on this machine, side by side."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...export.verify import read_manifest
from ...graph.errors import RuntimeUnavailable
from ...graph.load import load_model
from ...runtimes import device_runner
from ...runtimes.device_file import DeviceEntry
from ...runtimes.ssh import SshDevice, runner_result
from ..reporter import Reporter
from .emulated import set_up
from .fleet import Closable, Outcome, only_error, run_on_devices

Result = dict[str, Any]
Told = Callable[[Closable], None]
Outcomes = tuple[Outcome[list[Result]], ...]
Opener = Callable[[DeviceEntry, Reporter, "str | None", Told], SshDevice]
LOCAL = "local"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What the device runner shall do with bundles, the same on every device.

    Attributes:
        commands, words: its commands, and its options.
        threads: of every session; None leaves it to the devices file, then to the bundle.
        baseline: a model's file or a bundle's folder to compare with.
        limit_s: after which it counts as hung.
        check: called with every result; what it raises says that the result is not of the known form.
        keep: called with every result as soon as it is there.
    """

    bundles: Sequence[Path]
    commands: Sequence[str]
    words: Sequence[str] = ()
    threads: int | None = None
    baseline: Path | None = None
    limit_s: float
    check: Callable[[Result], object]
    keep: Callable[[Path, Result], None] | None = None


def results_of(outcomes: Outcomes, bundles: Sequence[Path]) -> Iterator[tuple[DeviceEntry, Path, Result]]:
    """Every device with every bundle that it got to, and the result."""
    for outcome in outcomes:
        for bundle, result in zip(bundles, outcome.value or (), strict=False):
            yield outcome.entry, bundle, result


def run_task(task: Task, entries: Sequence[DeviceEntry], open_device: Opener, reporter: Reporter) -> Outcomes:
    """Run it on every device; what a device measured before it failed is there beside its error.

    Raises:
        EdgepressError: of a single device that measured nothing.
    """
    version = read_manifest(task.bundles[0]).versions.get("onnxruntime")
    found: dict[DeviceEntry, list[Result]] = {entry: [] for entry in entries}
    ready = set_up(entries, version, reporter)

    def work(entry: DeviceEntry, told: Told) -> list[Result]:
        ready(entry)
        with ExitStack() as stack:
            run = _runner(task, entry, lambda: open_device(entry, reporter, version, told), told, stack)
            for bundle in task.bundles:
                result = _checked(run(bundle), task, entry.name)
                found[entry].append(result)
                if task.keep is not None:
                    task.keep(bundle, result)
        return found[entry]

    with reporter.stage(f"{' and '.join(task.commands)} on {', '.join(entry.name for entry in entries)}"):
        outcomes = run_on_devices(entries, work)
    outcomes = tuple(dataclasses.replace(one, value=found[one.entry] or None) for one in outcomes)
    if not any(found.values()):
        only_error(outcomes)
    return outcomes


def _runner(
    task: Task, entry: DeviceEntry, open_device: Callable[[], SshDevice], told: Told, stack: ExitStack
) -> Callable[[Path], Result]:
    """What runs one bundle there; the device stays open until the stack is left."""
    count = task.threads or entry.threads
    options = [*task.words, *(["--threads", str(count)] if count else [])]
    if entry.url == LOCAL:
        more = [] if task.baseline is None else ["--baseline", str(task.baseline)]
        here = LocalRunner()
        told(here)
        return lambda bundle: here.run(bundle, task.commands, [*options, *more], task.limit_s)
    device = stack.enter_context(open_device())
    if task.baseline is not None:
        options += ["--baseline", _baseline_there(device, task.baseline)]
    return lambda bundle: device.run_bundle(bundle, task.commands, options, limit_s=task.limit_s)


def _checked(result: Result, task: Task, where: str) -> Result:
    """The result, if it is of the form that docs/benchmark.schema.json describes, as far as that is read.

    Raises:
        RuntimeUnavailable: if it is not: what comes from a device may be anything.
    """
    try:
        task.check(result)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RuntimeUnavailable(
            "the device runner's result is not of the form that this edgepress knows",
            where=where,
            why=f"{type(error).__name__}: {error}",
            remedy="compile the bundle again with this edgepress, which brings its own runner along",
        ) from error
    return result


def _baseline_there(device: SshDevice, baseline: Path) -> str:
    if baseline.is_dir():
        return device.put_bundle(baseline)
    weights = load_model(baseline).origin.files
    files = [baseline, *(baseline.parent / name for name in weights if name != baseline.name)]
    return device.put([file for file in files if file.is_file()]).as_posix()


class LocalRunner:
    """The device runner on this machine, in a process of its own, which another thread may end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def close(self) -> None:
        """End what runs, and run nothing more."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def run(self, bundle: Path, commands: Sequence[str], options: Sequence[str], limit_s: float) -> Result:
        """See `SshDevice.run_bundle`.

        Raises:
            EdgepressError: as the runner reports it.
            RuntimeUnavailable: if it does not end in time, or writes no result.
        """
        with tempfile.TemporaryDirectory(prefix="edgepress-device-") as folder:
            out = Path(folder) / "result.json"
            words = [sys.executable, device_runner.__file__, *commands, "--bundle", str(bundle)]
            status, told = self._ended([*words, "--out", str(out), *options], limit_s)
            if not out.is_file():
                raise RuntimeUnavailable(
                    "the device runner wrote no result",
                    where=LOCAL,
                    why=(told.strip().splitlines() or [f"exit status {status}"])[-1],
                    remedy="`edgepress doctor` says what is missing",
                )
            return runner_result(out.read_bytes(), status, LOCAL)

    def _ended(self, words: Sequence[str], limit_s: float) -> tuple[int, str]:
        """Exit status, and what it wrote on stderr."""
        with subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as process:
            self._process = process
            try:
                if self._closed:
                    process.kill()
                _, told = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise RuntimeUnavailable(
                    f"the device runner did not end within {limit_s:g} s",
                    where=LOCAL,
                    remedy="ask for fewer scenarios, sweeps or rounds",
                ) from None
            except BaseException:
                process.kill()
                raise
        return process.returncode, told
