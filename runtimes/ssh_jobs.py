"""A device by ssh as the planner uses it: many jobs in one call, models with their weights, nothing left."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from ..graph.errors import EdgepressError, ModelError, RuntimeUnavailable
from ..graph.load import load_model
from ..targets.host import HostFacts
from ..targets.profile import Evidence
from .base import Array, SessionOptions
from .device import DeviceFeatures, Form, Progress, names_of
from .ssh_forms import json_of, no_times, result_of
from .ssh_session import ProgramEnd
from .timing import BenchmarkResult, Schedule
from .timing_jobs import JobOutcome, TimingJob

_PROGRAMS = ("remote_jobs.py", "remote_run.py", "device_runner.py")
_GROUP_S, _FIRST_GROUP_S = 6.0, 2.0
_GROUP_BYTES = 16 << 20
_SLOWER = 3.0
"""How much longer than estimated things take on a board, until the first group has told."""
_LEAST_SLOWER, _MOST_SLOWER = 0.2, 100.0
_NO_LIMIT_S = 3600.0


class Board(Protocol):
    """What of `SshDevice` is used here; an object like it does as well."""

    name: str
    where: str
    evidence: Evidence

    def features(self) -> DeviceFeatures:
        """See `Device.features`."""

    def host_facts(self) -> HostFacts:
        """See `SshDevice.host_facts`."""

    def run_bundle(
        self,
        bundle: Path,
        commands: Sequence[str],
        options: Sequence[str] = (),
        *,
        limit_s: float | None = None,
    ) -> dict[str, Any]:
        """See `SshDevice.run_bundle`."""

    def put(self, files: Sequence[Path]) -> Path:
        """See `Device.put`."""

    def put_files(self, files: Mapping[str, Path]) -> str:
        """See `SshDevice.put_files`."""

    def remove_files(self, folder: str) -> None:
        """See `SshDevice.remove_files`."""

    def run(self, model: Path, feeds: Mapping[str, Array], options: SessionOptions) -> dict[str, Array]:
        """See `Device.run`."""

    def run_program(
        self,
        files: Mapping[str, Path],
        words: Sequence[str],
        *,
        result: str = "result.json",
        limit_s: float | None = None,
        keep: bool = True,
    ) -> ProgramEnd:
        """See `SshDevice.run_program`."""


class SshTimer:
    """A board that the planner times on; implements `Device` and `JobTimer`.

    Jobs travel and run in groups, so that connecting, copying and starting the runtime are paid once for
    many; after each group its times are known here, whatever happens to the connection later. Use it in a
    `with` block: models that were copied for it are removed from the board when the block ends well.

    Args:
        board: the device; who opened it closes it.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self.evidence = board.evidence
        self.where = board.where
        self._features: DeviceFeatures | None = None
        self._put: dict[Path, Path] = {}
        self._copied: dict[str, None] = {}  # folders there that go at the end, in order
        self._slower, self._known = _SLOWER, False

    def __enter__(self) -> SshTimer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, RuntimeUnavailable):
            return  # it is away: asking it would only wait
        with contextlib.suppress(EdgepressError):
            for folder in self._copied:
                self.board.remove_files(folder)
        self._copied.clear()
        self._put.clear()

    @property
    def name(self) -> str:
        """What the device is: its board or its processor, not where it is reached."""
        features = self.features()
        return features.board or features.core

    def features(self) -> DeviceFeatures:
        """See `Device.features`; asked once."""
        if self._features is None:
            self._features = self.board.features()
        return self._features

    def processor(self) -> DeviceFeatures:
        """Its features before anything is installed there; no runtime version where it has none yet."""
        facts = self.board.host_facts()
        return DeviceFeatures(
            architecture=facts.architecture,
            core=facts.core,
            isa_features=tuple(sorted(facts.features)),
            runtime="onnxruntime",
            runtime_version=facts.runtime_version or "",
            board=facts.board,
        )

    def run_bundle(
        self, bundle: Path, commands: Sequence[str], options: Sequence[str] = ()
    ) -> dict[str, Any]:
        """See `SshDevice.run_bundle`."""
        return self.board.run_bundle(bundle, commands, options)

    def put(self, files: Sequence[Path]) -> Path:
        """See `Device.put`; of a single model its weights' files go with it, and nothing travels twice."""
        if files[0] not in self._put:
            every = list(files) if len(files) > 1 else _with_weights(files[0])
            self._put[files[0]] = self.board.put(every)
            self._copied[self._put[files[0]].parent.as_posix()] = None
        return self._put[files[0]]

    def run(self, model: Path, feeds: Mapping[str, Array], options: SessionOptions) -> dict[str, Array]:
        """See `Device.run`."""
        return self.board.run(model, feeds, options)

    def time(
        self,
        forms: Sequence[Form],
        feeds: Mapping[str, Array],
        schedule: Schedule,
        *,
        progress: Progress | None = None,
    ) -> BenchmarkResult:
        """See `Device.time`."""
        names = names_of(forms)
        (outcome,) = self.time_jobs(
            [TimingJob(build=lambda: (forms, feeds), schedule=schedule)], budget_s=math.inf
        )
        if outcome.result is None:
            raise ModelError(
                "the model does not run on the device",
                where=f"{self.where}, {', '.join(names)}",
                why=outcome.reason,
                remedy=f"`edgepress doctor --device {self.where}` shows the runtime there",
            )
        if progress is not None:
            progress(schedule.pairs, schedule.pairs)
        return outcome.result

    def time_jobs(self, jobs: Iterable[TimingJob], *, budget_s: float) -> Iterator[JobOutcome]:
        """See `timing_jobs.time_jobs`.

        Raises:
            RuntimeUnavailable: if the device goes away, or its runtime does not start.
            OutputError: if the device's disk is full.
        """
        left_s, group = budget_s, _Group()
        for index, job in enumerate(jobs):
            if job.estimate_s * self._slower >= left_s - group.estimate_s * self._slower:
                if group.entries:  # what it has taken says how fast the board is
                    left_s -= yield from self._timed(group, left_s)
                    group = _Group()
                if job.estimate_s * self._slower >= left_s:
                    continue
            group.add(index, job)
            enough_s = _GROUP_S if self._known else _FIRST_GROUP_S
            if group.estimate_s * self._slower >= enough_s or group.size_bytes >= _GROUP_BYTES:
                left_s -= yield from self._timed(group, left_s)
                group = _Group()
        if group.entries:
            yield from self._timed(group, left_s)

    def _timed(self, group: _Group, left_s: float) -> Generator[JobOutcome, None, float]:
        """The outcomes of a group, and the seconds that its timing took."""
        with tempfile.TemporaryDirectory(prefix="edgepress-jobs-") as scratch:
            archive = Path(scratch) / "jobs.npz"
            group.save(archive, min(left_s, _NO_LIMIT_S))
            there = self.board.put_files({archive.name: archive})
        self._copied[there] = None
        end = self.board.run_program(
            {name: Path(__file__).with_name(name) for name in _PROGRAMS},
            ["{files}/remote_jobs.py", f"{there}/{archive.name}"],
            result="jobs.json",
        )
        self.board.remove_files(there)
        del self._copied[there]
        if end.status != 0 or end.result is None:
            raise RuntimeUnavailable(
                "nothing can be timed on the device",
                where=self.where,
                why=next((line for line in reversed(end.told) if line), f"exit status {end.status}"),
                remedy=f"`edgepress doctor --device {self.where}` shows the runtime there",
            )
        found = group.outcomes(json_of(end.result, self.where), self.where)
        if found.timed_s > 0 and found.estimate_s > 0:
            self._slower = min(max(found.timed_s / found.estimate_s, _LEAST_SLOWER), _MOST_SLOWER)
            self._known = True
        yield from found.outcomes
        return found.spent_s


class _Group:
    """Jobs that travel together: their models and inputs as arrays of one archive."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.estimate_s = 0.0
        self.size_bytes = 0
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._names: dict[int, str] = {}
        self._places: list[int] = []
        self._jobs: list[tuple[TimingJob, Mapping[str, Array]]] = []

    def add(self, index: int, job: TimingJob) -> None:
        """Build a job and take it in."""
        forms, feeds = job.build()
        schedule = dataclasses.asdict(job.schedule)
        plan = {name: value for name, value in schedule.items() if math.isfinite(value)}
        self.entries.append({"plan": plan, "forms": [self._form(form, feeds) for form in forms]})
        self._places.append(index)
        self._jobs.append((job, feeds))
        self.estimate_s += job.estimate_s

    def _form(self, form: Form, feeds: Mapping[str, Array]) -> dict[str, Any]:
        own = feeds if form.feeds is None else form.feeds
        entry = {
            "name": form.name,
            "threads": form.options.threads,
            "level": form.options.level_name,
            "config": form.options.config,
            "feeds": {name: self._kept(np.asarray(values)) for name, values in own.items()},
        }
        if isinstance(form.model, bytes):
            return {**entry, "array": self._kept(np.frombuffer(form.model, np.uint8))}
        return {**entry, "model": form.model.as_posix()}

    def _kept(self, values: npt.NDArray[Any]) -> str:
        """The name of an array in the archive; one that is there already is not put there again."""
        if id(values) not in self._names:
            self._names[id(values)] = f"array_{len(self._arrays)}"
            self._arrays[self._names[id(values)]] = values
            self.size_bytes += values.nbytes
        return self._names[id(values)]

    def save(self, path: Path, budget_s: float) -> None:
        """Write the archive that remote_jobs.py reads."""
        request = msgspec.json.encode({"jobs": self.entries, "budget_s": budget_s})
        arrays: dict[str, Any] = {"request": np.frombuffer(request, np.uint8), **self._arrays}
        np.savez(path, **arrays)

    def outcomes(self, ended: Any, where: str) -> _Outcomes:
        """What became of each job that was begun.

        Args:
            ended: what remote_jobs.py wrote on the device.
            where: the device.

        Raises:
            RuntimeUnavailable: if the device wrote something else.
        """
        try:
            entries = msgspec.convert(ended, list[_Ended])
            places = [entry.index for entry in entries]
            if len(set(places)) != len(places) or any(place >= len(self._jobs) for place in places):
                raise ValueError(f"jobs {places} of {len(self._jobs)}")
        except (msgspec.ValidationError, ValueError) as error:
            raise no_times(where, error) from error
        found = _Outcomes()
        for entry in entries:
            (job, feeds), index = self._jobs[entry.index], self._places[entry.index]
            found.spent_s += entry.elapsed_s
            if entry.found is None:
                found.outcomes.append(JobOutcome(index=index, reason=entry.reason))
                continue
            names = [form["name"] for form in self.entries[entry.index]["forms"]]
            result = result_of(entry.found, names, feeds, where)
            found.outcomes.append(JobOutcome(index=index, result=result))
            found.timed_s += entry.elapsed_s
            found.estimate_s += job.estimate_s
        return found


@dataclasses.dataclass
class _Outcomes:
    """Outcomes of a group; the seconds that all of it took, that what was timed took, and was thought to."""

    outcomes: list[JobOutcome] = dataclasses.field(default_factory=list)
    spent_s: float = 0.0
    timed_s: float = 0.0
    estimate_s: float = 0.0


class _Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A line of remote_jobs.py on a job that is over."""

    index: Annotated[int, msgspec.Meta(ge=0)]
    elapsed_s: Annotated[float, msgspec.Meta(ge=0, lt=1e9)] = 0.0
    found: dict[str, Any] | None = None
    reason: str = ""


def _with_weights(file: Path) -> list[Path]:
    """A model's file and those of its weights, which lie beside it."""
    names = load_model(file).origin.files
    return [file, *(file.parent / name for name in names if name != file.name)]
