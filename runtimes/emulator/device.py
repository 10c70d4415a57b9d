"""An emulated board as a device: bundles are copied to it, checked and counted there; it has no times."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...graph.errors import NotSupported, RuntimeUnavailable
from ...targets.profile import Evidence
from ..base import Array
from ..device import Form, Progress
from ..remote import DeviceUrl
from ..ssh import SshDevice, agent_source
from ..ssh_call import Log, Reply
from ..ssh_copy import ByteProgress
from ..ssh_environment import DevicePython
from ..timing import BenchmarkResult, Schedule
from .boards import BOARDS, EmulatedBoard, board_named
from .counts import instructions_of, read_counts
from .install import Emulator, Step
from .instance import BoardInstance


class EmulatedDevice(SshDevice):
    """One emulated board; switched on by `with`, off when the block ends, and nothing of it stays.

    What is missing of the emulator is set up first (some 250 MB, half a minute). Where the host allows it the
    board is a whole one that is reached by ssh; elsewhere its programs run one by one.

    Args:
        url: `emulated:NAME`.
        home: the folder of all emulated boards.
        name: as a person calls it; its URL by default.
        version: of onnxruntime, that it shall have; this machine's by default.
        log: told what a person should know meanwhile.
        progress: told (bytes there, bytes in all) of files that are copied.
        step: opens a stage of the progress, by name, for what is set up.
    """

    evidence: Evidence = "modelled"

    def __init__(
        self,
        url: DeviceUrl,
        *,
        home: Path,
        name: str | None = None,
        version: str | None = None,
        log: Log | None = None,
        progress: ByteProgress | None = None,
        step: Step | None = None,
    ) -> None:
        self.board: EmulatedBoard = board_named(url.host)
        self.name = name or str(url)
        self.where = str(url)
        self._url, self._version = url, version
        self._log, self._bytes = log, progress
        self._step: Step = step or (lambda _: contextlib.nullcontext())
        self._emulator = Emulator(home)
        self._board: BoardInstance | None = None
        self._counting: Mapping[str, str] = {}
        self._runtime = ""

    def __enter__(self) -> EmulatedDevice:
        self._emulator.install([self.board], self._step)
        site = self._emulator.site(self._version, self._step)
        self._runtime = site.name.removeprefix("onnxruntime-").rpartition("-")[0]
        board = self._board = BoardInstance(self._emulator, self.board, site)
        board.open()
        try:
            if board.why_not_whole is None:
                login = board.start_server()
                super().__init__(
                    login.url,
                    name=self.name,
                    settings=login.settings,
                    log=self._log,
                    progress=self._bytes,
                )
            else:
                if self._log is not None:
                    self._log(
                        f"{self.where}: no whole board, its programs run one by one ({board.why_not_whole})"
                    )
                connection = board.connect(self._url, agent_source())
                super().__init__(
                    self._url,
                    name=self.name,
                    connection=connection,
                    log=self._log,
                    progress=self._bytes,
                )
        except BaseException:
            board.close()
            raise
        self.where = str(self._url)
        return self

    def close(self) -> None:
        """Switch the board off; may be called twice."""
        if self._board is None:
            return
        board, self._board = self._board, None
        try:
            super().close()
        finally:
            board.close()

    def facts(self) -> Reply:
        """See `SshDevice.facts`; the packages are those that were unpacked for the board."""
        known = self._facts is not None
        facts = super().facts()
        if not known:
            facts["packages"] |= {"onnxruntime": self._runtime}
        return facts

    def python(self) -> DevicePython:
        """See `SshDevice.python`; it is there already."""
        assert self._board is not None
        self.hold()
        return DevicePython(
            program=self._board.python,
            variables={**self._board.variables, **self._counting},
            runtime_version=self._runtime,
            origin="unpacked packages",
        )

    def time(
        self,
        forms: Sequence[Form],  # noqa: ARG002 - what `Device.time` takes
        feeds: Mapping[str, Array],  # noqa: ARG002
        schedule: Schedule,  # noqa: ARG002
        *,
        progress: Progress | None = None,  # noqa: ARG002
    ) -> BenchmarkResult:
        """Refused: an emulator's times say nothing about the board.

        Raises:
            NotSupported: always.
        """
        raise NotSupported(
            "an emulated board has no times",
            where=self.where,
            why="how long an emulator takes says nothing about the board",
            remedy=f"`edgepress benchmark BUNDLE --device {self.where}` counts instructions; times need the "
            "board itself: --device ssh://USER@HOST",
        )

    def run_bundle(
        self,
        bundle: Path,
        commands: Sequence[str],
        options: Sequence[str] = (),
        *,
        limit_s: float | None = None,
    ) -> dict[str, Any]:
        """See `SshDevice.run_bundle`; `benchmark` counts the instructions of an inference."""
        if "benchmark" not in commands:
            return super().run_bundle(bundle, commands, options, limit_s=limit_s)
        with self._counted() as (counts, why_not):
            result = super().run_bundle(bundle, commands, options, limit_s=limit_s)
            if counts is None:
                result["notes"].append(f"instructions: not counted, {why_not}")
            else:
                _fill(result, read_counts(counts))
        return result

    @contextlib.contextmanager
    def _counted(self) -> Iterator[tuple[Path | None, str]]:
        """Programs that are started meanwhile count; the file that they write, or None and why not."""
        assert self._board is not None
        try:
            variables, path = self._board.counting(f"counts-{secrets.token_hex(4)}")
        except RuntimeUnavailable as error:
            yield None, f"{error.why}; {error.remedy}"
            return
        self._counting = variables
        try:
            yield path, ""
        finally:
            self._counting = {}
            path.unlink(missing_ok=True)


def _fill(result: dict[str, Any], regions: Mapping[int, Mapping[str, int]]) -> None:
    """Put the counts into the device runner's result: the bundle's, and those of what it is compared with."""
    found = result["benchmark"]
    inferences = found["counted_inferences"]
    missing = [name for tag, name in enumerate(found["counted"]) if tag not in regions]
    if missing:
        raise RuntimeUnavailable(
            "the emulator counted no instructions",
            where=", ".join(missing),
            remedy="`edgepress emulator check` says whether it counts",
        )
    counted = {name: instructions_of(regions[tag], inferences) for tag, name in enumerate(found["counted"])}
    found["instructions"] = counted
    result["instructions"] = counted["bundle"]


def known_boards() -> tuple[str, ...]:
    """The names after `emulated:`."""
    return tuple(BOARDS)
