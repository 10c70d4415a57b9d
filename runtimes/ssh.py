"""A device that OpenSSH reaches: a board at the other end of a cable; implements `Device`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from ..graph.errors import (
    CheckFailed,
    EdgepressError,
    ModelError,
    RuntimeUnavailable,
    VerifyFailed,
)
from ..targets.host import HostFacts, read_host
from ..targets.profile import Evidence
from .base import Array, SessionOptions
from .device import DeviceFeatures, Form, Progress, names_of
from .remote import DeviceUrl
from .ssh_call import Log, Reply
from .ssh_connection import SshConnection, SshSettings
from .ssh_copy import ByteProgress, copy_files
from .ssh_environment import DevicePython, RuntimeWish, prepare_python, try_runtime
from .ssh_forms import json_of, outputs_of, result_of, write_request
from .ssh_session import ProgramEnd, SessionLimits, SshSession
from .timing import BenchmarkResult, Schedule

_MODEL_FAILED = 3
_RUNS = "runs"


class SshDevice:
    """One board; what it needs is made there on first use and kept for the next run.

    Use it in a `with` block: other runs are kept off the device until the block ends.

    Args:
        url: where it is.
        name: as a person calls it; its URL by default.
        settings: how it is reached.
        wish: which runtime it shall have.
        limits: how long to wait for what.
        log: told what a person should know meanwhile.
        progress: told (bytes there, bytes in all) of files that are copied.
        boot_id_file: where it says which start of it this is; its kernel's own by default.
        connection: the way to it, where that is not made of `url` and `settings`.
    """

    evidence: Evidence = "measured-on-target"

    def __init__(
        self,
        url: DeviceUrl,
        *,
        name: str | None = None,
        settings: SshSettings | None = None,
        wish: RuntimeWish | None = None,
        limits: SessionLimits | None = None,
        log: Log | None = None,
        progress: ByteProgress | None = None,
        boot_id_file: str | None = None,
        connection: SshConnection | None = None,
    ) -> None:
        self.name = name or str(url)
        self.where = str(url)
        self._wish = wish or RuntimeWish()
        self._progress = progress
        connection = connection or SshConnection(url, settings or SshSettings(), agent_source())
        self._session = SshSession(connection, limits=limits, log=log, boot_id_file=boot_id_file)
        self._facts: Reply | None = None
        self._python: DevicePython | None = None

    def __enter__(self) -> SshDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the device free and close the connection; may be called twice."""
        self._facts = self._python = None
        self._session.close()

    def facts(self) -> Reply:
        """What the device says of itself (see `remote_agent.probe`); nothing is written there.

        Raises:
            RuntimeUnavailable: if it cannot be reached or has no Python.
        """
        if self._facts is None:
            self._facts = self._session.probe()
        return self._facts

    def host_facts(self) -> HostFacts:
        """Processor, caches, memory and board, read from the device's own /proc and /sys.

        Raises:
            RuntimeUnavailable: if it cannot be reached or has no Python.
        """
        facts = self.facts()
        with tempfile.TemporaryDirectory(prefix="edgepress-device-") as folder:
            for name, text in facts["facts"].items():
                place = Path(folder) / PurePosixPath(name)
                if ".." in place.parts or not place.is_relative_to(folder):
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(text, encoding="utf-8")
            host = read_host(Path(folder))
        runtime = facts["packages"].get("onnxruntime")
        return dataclasses.replace(host, runtime_version=runtime)

    def hold(self) -> None:
        """Keep other runs off the device until `close`; waits for one that is there.

        Raises:
            RuntimeUnavailable: if it cannot be reached, or another run stays too long.
            OutputError: if its folder cannot be written.
        """
        self.facts()
        self._session.hold()

    def python(self) -> DevicePython:
        """The Python that runs models there, installed if need be.

        Raises:
            RecipeError: if the folder of wheels holds none that fits.
            RuntimeUnavailable: if there is no runtime and none can be installed.
            OutputError: if its disk is full.
        """
        if self._python is None:
            self.hold()
            self._python = prepare_python(self._session, self.facts(), self._wish, progress=self._progress)
        return self._python

    def try_runtime(self) -> str:
        """Load the runtime in a process of its own; the versions as one line.

        Raises:
            RuntimeUnavailable: if it does not load, or the process dies of it.
        """
        return try_runtime(self._session, self.python())

    def features(self) -> DeviceFeatures:
        """See `Device.features`."""
        python, host = self.python(), self.host_facts()
        return DeviceFeatures(
            architecture=host.architecture,
            core=host.core,
            isa_features=tuple(sorted(host.features)),
            runtime="onnxruntime",
            runtime_version=python.runtime_version,
            board=host.board,
        )

    def put(self, files: Sequence[Path]) -> Path:
        """See `Device.put`; files keep their names below the first one's folder."""
        base = files[0].parent
        for file in files:
            if not file.is_file():
                raise ModelError("the model file does not exist", where=str(file), remedy="check the path")
            if not file.is_relative_to(base):
                raise ModelError(
                    "a model's file lies outside of its folder", where=str(file), remedy=f"move it to {base}"
                )
        folder = self.put_files({file.relative_to(base).as_posix(): file for file in files})
        return Path(folder) / files[0].name

    def put_files(self, files: Mapping[str, Path]) -> str:
        """Copy files by the names that they get there; the folder of exactly these contents.

        Raises:
            ModelError: if a file cannot be read here.
            OutputError: if its disk is full or not writable.
            RuntimeUnavailable: if the device goes away.
        """
        self.hold()
        return copy_files(self._session, files, progress=self._progress).folder

    def put_bundle(self, bundle: Path) -> str:
        """Copy a bundle without its runs/; the folder there.

        Raises:
            ModelError: if it is no folder, or holds something that is neither file nor folder.
            OutputError: if the device's disk is full or not writable.
            RuntimeUnavailable: if the device goes away.
        """
        files = {}
        for path in sorted(bundle.rglob("*")):
            name = path.relative_to(bundle).as_posix()
            if path.is_dir() and not path.is_symlink():
                continue
            if path.is_symlink() or not path.is_file():
                raise ModelError(
                    "a bundle holds plain files only", where=str(path), remedy="compile it again"
                )
            if name.partition("/")[0] != _RUNS:
                files[name] = path
        if not files:
            raise ModelError("not an edgepress bundle", where=str(bundle), remedy="name a bundle's folder")
        return self.put_files(files)

    def run_program(
        self,
        files: Mapping[str, Path],
        words: Sequence[str],
        *,
        result: str = "result.json",
        limit_s: float | None = None,
        keep: bool = True,
    ) -> ProgramEnd:
        """Run a Python program of these files in an empty folder, and bring back what it writes.

        Args:
            files: the program and what it needs, by name; words that begin with `{files}/` name them.
            words: the arguments of the device's Python.
            result: the file that it writes into its folder.
            limit_s: the program is ended after so many seconds.
            keep: leave the files there for the next run.

        Raises:
            RuntimeUnavailable: if there is no runtime, the program dies or takes too long, or the device
                goes away or restarts.
            OutputError: if the device's disk is full.
        """
        python, folder = self.python(), self.put_files(files)
        end = self._session.run_program(
            [python.program, *(word.replace("{files}", folder, 1) for word in words)],
            result=result,
            environment=python.variables,
            limit_s=limit_s,
        )
        if not keep:
            self.remove_files(folder)
        return end

    def remove_files(self, folder: str) -> None:
        """Remove what `put_files` brought, by the folder that it gave; raises as `put_files` does."""
        root = self._session.root
        self._session.ask("remove", {"root": root, "names": [folder.removeprefix(f"{root}/")]})

    def run_bundle(
        self,
        bundle: Path,
        commands: Sequence[str],
        options: Sequence[str] = (),
        *,
        limit_s: float | None = None,
    ) -> dict[str, Any]:
        """Let the device runner check or measure a bundle there; its result as plain values.

        Args:
            bundle: its folder here.
            commands: of the device runner: check, verify, benchmark.
            options: more words for it.
            limit_s: it is ended after so many seconds.

        Raises:
            VerifyFailed: if the bundle or its outputs are not what it says.
            ModelError: if it is no bundle, or an option is wrong.
            RuntimeUnavailable: if the runtime is missing or dies there, or the device goes away.
            OutputError: if the device's disk is full.
        """
        self.python()  # a device without a runtime need not wait for a copy
        folder = self.put_bundle(bundle)
        end = self.run_program(
            {"device_runner.py": _own_path("device_runner.py")},
            ["{files}/device_runner.py", *commands, "--bundle", folder, "--out", "result.json", *options],
            limit_s=limit_s,
        )
        return runner_result(_required(end, self.where), end.status, self.where)

    def run(self, model: Path, feeds: Mapping[str, Array], options: SessionOptions) -> dict[str, Array]:
        """See `Device.run`."""
        end = self._run_forms("run", [Form(name="model", model=model, options=options)], feeds, {})
        return outputs_of(_required(end, self.where), self.where)

    def time(
        self,
        forms: Sequence[Form],
        feeds: Mapping[str, Array],
        schedule: Schedule,
        *,
        progress: Progress | None = None,
    ) -> BenchmarkResult:
        """See `Device.time`; by the device runner's loop there."""
        names = names_of(forms)
        plan = schedule.as_plan()
        written = _required(self._run_forms("time", forms, feeds, plan), self.where)
        if progress is not None:
            progress(schedule.pairs, schedule.pairs)
        return result_of(json_of(written, self.where), names, feeds, self.where)

    def _run_forms(
        self, what: str, forms: Sequence[Form], feeds: Mapping[str, Array], plan: Mapping[str, float]
    ) -> ProgramEnd:
        with tempfile.TemporaryDirectory(prefix="edgepress-device-") as scratch:
            own = {name: _own_path(name) for name in ("remote_run.py", "device_runner.py")}
            files = own | write_request(forms, feeds, plan, Path(scratch), self._model_there)
            words = ["{files}/remote_run.py", what, "{files}/request.json"]
            result = "outputs.npz" if what == "run" else "times.json"
            end = self.run_program(files, words, result=result, keep=False)
        if end.status == _MODEL_FAILED:
            raise ModelError(
                "the model does not run on the device",
                where=f"{self.where}, {', '.join(form.name for form in forms)}",
                why=next((line for line in reversed(end.told) if line), None),
                remedy=f"`edgepress doctor --device {self.where}` shows the runtime there",
            )
        return end

    def _model_there(self, form: Form, scratch: Path) -> str:
        """Where a form's model lies on the device; one in memory is copied by way of `scratch`."""
        if isinstance(form.model, bytes):
            scratch.write_bytes(form.model)
            return self.put([scratch]).as_posix()
        return form.model.as_posix()


def agent_source() -> str:
    """The program that carries out the calls on a device."""
    return _own_file("remote_agent.py").decode()


def runner_result(data: bytes, status: int, where: str) -> dict[str, Any]:
    """What the device runner wrote, or the error that it reports.

    Args:
        data: its result, as JSON.
        status: its exit status.
        where: the device.

    Raises:
        VerifyFailed: if the bundle or its outputs are not what it says.
        ModelError: if it is no bundle, or an option is wrong.
        RuntimeUnavailable: for everything else that it reports, or a result that is none.
    """
    try:
        result = json.loads(data)
        error = result["error"]
    except (ValueError, KeyError, TypeError) as found:
        raise RuntimeUnavailable(
            "the device runner wrote no valid result",
            where=where,
            why=f"{type(found).__name__}: {found}",
            remedy="try again; report it if it stays so",
        ) from found
    if error is None:
        return dict(result)
    kinds: dict[int, type[EdgepressError]] = {2: ModelError, 3: VerifyFailed}
    raise kinds.get(status, RuntimeUnavailable)(
        str(error["what"]),
        where=where,
        why=error["why"] or None,
        remedy=error["remedy"] or None,
    )


def void_error(result: Mapping[str, Any], where: str) -> CheckFailed | None:
    """The error for a run in which the board throttled or lost voltage; None for one that counts."""
    if not result.get("void"):
        return None
    return CheckFailed(
        "the run does not count",
        where=where,
        why="; ".join(result["void_reasons"]),
        remedy="cool the board, give it a stronger power supply, and measure again",
    )


def _required(end: ProgramEnd, where: str) -> bytes:
    if end.result is None:
        raise RuntimeUnavailable(
            "the program on the device wrote no result",
            where=where,
            why="; ".join([f"exit status {end.status}", *[line for line in end.told if line][-3:]]),
            remedy="what it wrote last says why; a missing package is brought with --wheels DIR",
        )
    return end.result


def _own_path(name: str) -> Path:
    return Path(__file__).with_name(name)


def _own_file(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()
