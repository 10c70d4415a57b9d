"""Where a model is run and timed: the `Device` seam, and this machine as the first implementation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from ..graph.errors import DataError, ModelError
from ..targets.host import read_host
from ..targets.profile import Evidence
from .base import Array, SessionOptions
from .ort_runtime import OrtSession, runtime_version
from .timing import BenchmarkResult, Candidate, Schedule, benchmark

Progress = Callable[[int, int], None]


class DeviceFeatures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides how fast a kernel is: timings made under other features say nothing here.

    Attributes:
        core: the processor's own name, or its part number.
        isa_features: the instruction sets that kernels ask for, sorted.
        board: where the system names one.
    """

    architecture: str
    core: str
    isa_features: tuple[str, ...]
    runtime: str
    runtime_version: str
    board: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """One form of a model to be timed.

    Attributes:
        name: as it appears in the result.
        model: a serialised model, or a file that lies on the device (see `Device.put`).
        options: what its sessions are opened with.
        feeds: inputs of its own in place of the common ones, where its inputs have other types.
    """

    name: str
    model: Path | bytes
    options: SessionOptions
    feeds: Mapping[str, Array] | None = None


def names_of(forms: Sequence[Form]) -> list[str]:
    """The forms' names.

    Raises:
        DataError: if there is none, or two have one name.
    """
    names = [form.name for form in forms]
    if not names:
        raise DataError("there is nothing to time", remedy="name at least one form")
    if len(set(names)) != len(names):
        raise DataError("two forms have one name", why=", ".join(names), remedy="name them apart")
    return names


class Device(Protocol):
    """A machine that runs models: this one, a board at the other end of a cable, an emulator.

    Attributes:
        name: as a person calls it.
        evidence: the grade that its timings have where the target is this very device.
    """

    @property
    def name(self) -> str:
        """As a person calls it."""

    @property
    def evidence(self) -> Evidence:
        """The grade of its timings; an emulator that only counts instructions says `modelled`."""

    def features(self) -> DeviceFeatures:
        """Processor and runtime version, as read there.

        Raises:
            RuntimeUnavailable: if the device or its runtime does not answer.
        """

    def put(self, files: Sequence[Path]) -> Path:
        """Bring a model's files (the .onnx file first) onto the device; where the first one lies there.

        Raises:
            ModelError: if a file is missing.
            RuntimeUnavailable: if the device does not take them.
        """

    def run(self, model: Path, feeds: Mapping[str, Array], options: SessionOptions) -> dict[str, Array]:
        """Outputs by name of one run in a fresh session; `model` lies on the device.

        Raises:
            DataError: if the inputs do not fit the model.
            ModelError: if the model fails to load or run there.
        """

    def time(
        self,
        forms: Sequence[Form],
        feeds: Mapping[str, Array],
        schedule: Schedule,
        *,
        progress: Progress | None = None,
    ) -> BenchmarkResult:
        """Time forms against the first of them: interleaved runs, fresh sessions each round.

        Raises:
            DataError: if two forms have one name, or the inputs do not fit.
            ModelError: if a form fails to load or run.
        """


@dataclasses.dataclass(frozen=True)
class LocalDevice:
    """This machine, in this process; implements `Device`."""

    name: str = "this machine"
    evidence: Evidence = "measured-on-target"

    def features(self) -> DeviceFeatures:
        """See `Device.features`."""
        host = read_host()
        return DeviceFeatures(
            architecture=host.architecture,
            core=host.core,
            isa_features=tuple(sorted(host.features)),
            runtime="onnxruntime",
            runtime_version=host.runtime_version or runtime_version(),
            board=host.board,
        )

    def put(self, files: Sequence[Path]) -> Path:
        """The first file where it is: nothing needs to be copied."""
        for file in files:
            if not file.is_file():
                raise ModelError("the model file does not exist", where=str(file), remedy="check the path")
        return files[0]

    def run(self, model: Path, feeds: Mapping[str, Array], options: SessionOptions) -> dict[str, Array]:
        """See `Device.run`."""
        return OrtSession(model, options).run(feeds)

    def time(
        self,
        forms: Sequence[Form],
        feeds: Mapping[str, Array],
        schedule: Schedule,
        *,
        progress: Progress | None = None,
    ) -> BenchmarkResult:
        """See `Device.time`."""
        candidates = [
            Candidate(
                name=form.name,
                open=functools.partial(OrtSession, form.model, form.options, name=form.name),
                feeds=(feeds if form.feeds is None else form.feeds,),
                samples_per_run=_batch(feeds),
            )
            for form in forms
        ]
        return benchmark(candidates, schedule, progress=progress)


def _batch(feeds: Mapping[str, Array]) -> int:
    first = next(iter(feeds.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1
