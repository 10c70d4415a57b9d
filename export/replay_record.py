"""What the units of a bundle's graph are fed: recorded while its golden samples run on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..graph.errors import ModelError, NotSupported, UserError
from ..graph.load import load_model
from ..graph.model import Model
from ..graph.passes import run_passes
from ..graph.shapes import InferShapes
from ..runtimes.base import Array, OptimizationLevel, Runner, SessionOptions
from ..runtimes.ort_runtime import OrtSession
from .manifest import Manifest
from .npz import read_npz
from .replay_units import Unit, UnitModel, cut_units, in_bodies, unit_models
from .samples import Feeds

RECORD_LIMIT_BYTES = 1 << 29
"""Recorded tensors of all units together; beyond it fewer samples, then fewer units."""
LARGEST_UNIT_BYTES = 1 << 29
_AT_ONCE = 16
_LEVELS: tuple[OptimizationLevel | None, ...] = ("disable_all", "basic", None)

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """The units that can be replayed, with what they are fed.

    Attributes:
        models: the units, equal ones once.
        feeds: model -> for each place and sample the files of its inputs (i0, i1, …), .npy in `folder`.
        folder: where they lie.
        units: how many units the graph has, equal ones counted each.
        left_out: reason -> how many units it concerns.
        samples: how many golden samples were recorded.
    """

    models: tuple[UnitModel, ...]
    feeds: tuple[tuple[tuple[str, ...], ...], ...]
    folder: Path
    units: int
    left_out: Mapping[str, int]
    samples: int


def golden_feeds(bundle: Path, manifest: Manifest) -> tuple[tuple[Feeds, Feeds], ...]:
    """(inputs, recorded outputs) of every golden sample of a bundle.

    Raises:
        NotSupported: if the bundle has none.
        DataError: if a file is damaged.
    """
    if manifest.golden is None or not manifest.golden.samples:
        raise NotSupported(
            "the bundle has no golden samples to record kernels' inputs with",
            where=str(bundle),
            remedy="compile it without --skip golden",
        )
    return tuple(
        (
            read_npz(bundle / sample.inputs, manifest.model.inputs),
            read_npz(bundle / sample.outputs, manifest.model.outputs),
        )
        for sample in manifest.golden.samples
    )


def record_units(
    bundle: Path,
    samples: Sequence[Feeds],
    options: SessionOptions,
    folder: Path,
    *,
    limit_bytes: int = RECORD_LIMIT_BYTES,
    progress: Progress | None = None,
) -> Recording:
    """Cut a bundle's graph into units and record what each of them reads.

    Tensors come from a session without graph optimizations, so that every one of them exists; a few are
    fetched at a time and written to disk.

    Args:
        bundle: its folder.
        samples: inputs by name.
        options: threads and config entries of the bundle's sessions.
        folder: where the tensors are written.
        limit_bytes: of all recorded tensors.
        progress: told (tensors recorded, tensors of all samples).

    Raises:
        ModelError: if the model cannot be read or does not run.
    """
    model = load_model(bundle / "model.onnx")
    run_passes(model, [InferShapes()])
    units = cut_units(model)
    left_out = _Counts()
    left_out.add("inside If, Loop or Scan bodies", in_bodies(model))
    wanted = [unit for unit in units if left_out.keep(unit)]
    tape = _Tape(model, wanted, samples, options, folder=folder, limit_bytes=limit_bytes, progress=progress)
    first = tape.first()
    whole = [unit for unit in wanted if all(value.name in first for value in unit.inputs)]
    left_out.add(f"the recorded tensors would be more than {limit_bytes >> 20} MiB", len(wanted) - len(whole))
    models = unit_models(whole, first, model.graph.opset_imports, model)
    taken = tape.further(dict.fromkeys(name for item in models for place in item.inputs for name in place))
    feeds = tuple(
        tuple(
            tuple(tape.file(name, sample) for name in place)
            for place in item.inputs
            for sample in range(taken)
        )
        for item in models
    )
    return Recording(
        models=models,
        feeds=feeds,
        folder=folder,
        units=len(units),
        left_out=left_out.found,
        samples=taken if models else len(samples),
    )


class _Counts:
    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def add(self, reason: str, count: int) -> None:
        if count:
            self.found[reason] = self.found.get(reason, 0) + count

    def keep(self, unit: Unit) -> bool:
        """Whether a unit can be made a model of its own; if not, it is counted."""
        weights = {
            id(value.const_value): value.const_value.nbytes
            for node in unit.nodes
            for value in node.inputs
            if value is not None and value.const_value is not None
        }
        if not unit.inputs:
            self.add("they read constants only, which the runtime folds when it loads the model", 1)
        elif sum(weights.values()) > LARGEST_UNIT_BYTES:
            self.add(f"their weights are more than {LARGEST_UNIT_BYTES >> 20} MiB", 1)
        else:
            return True
        return False


class _Tape:
    """Records tensors of the whole graph as .npy files, a few at a time, within a limit of bytes."""

    def __init__(
        self,
        model: Model,
        units: Sequence[Unit],
        samples: Sequence[Feeds],
        options: SessionOptions,
        *,
        folder: Path,
        limit_bytes: int,
        progress: Progress | None,
    ) -> None:
        self._model, self._samples, self._folder = model, samples, folder
        self._left_bytes, self._progress = limit_bytes, progress
        names = dict.fromkeys(str(value.name) for unit in units for value in unit.inputs)
        self._index = {name: index for index, name in enumerate(names)}
        self._fed = {spec.name for spec in model.inputs} & names.keys()
        self._session: Runner | None = None
        made = [name for name in names if name not in self._fed]
        if made:
            self._session = _recording_session(model, made, options)

    def file(self, name: str, sample: int) -> str:
        """The file of a tensor of one sample."""
        return f"t{self._index[name]}_s{sample}.npy"

    def first(self) -> dict[str, Array]:
        """The first sample: one tiny array per tensor of its type and rank, as far as the limit allows."""
        found: dict[str, Array] = {}
        for name, array in self._tensors(0, list(self._index)):
            if array.nbytes > self._left_bytes:
                continue
            self._keep(name, 0, array)
            found[name] = _shape_only(array)
        return found

    def further(self, names: Mapping[str, None]) -> int:
        """Record the other samples while they fit; how many there are in all."""
        first = sum((self._folder / self.file(name, 0)).stat().st_size for name in names)
        taken = 1
        for sample in range(1, len(self._samples)):
            # Samples may differ in size: what one takes is known when it is recorded, and half of the limit
            # is a margin for that.
            if 2 * first > self._left_bytes:
                break
            for name, array in self._tensors(sample, list(names)):
                self._keep(name, sample, array)
            taken += 1
        return taken

    def _keep(self, name: str, sample: int, array: Array) -> None:
        with (self._folder / self.file(name, sample)).open("wb") as file:
            np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        self._left_bytes -= array.nbytes

    def _tensors(self, sample: int, names: Sequence[str]) -> Iterator[tuple[str, Array]]:
        feeds = self._samples[sample]
        for name in names:
            if name in self._fed:
                yield name, np.asarray(feeds[name])
        made = [name for name in names if name not in self._fed]
        for start in range(0, len(made), _AT_ONCE):
            assert self._session is not None
            yield from self._session.run(feeds, made[start : start + _AT_ONCE]).items()
            if self._progress is not None:
                self._progress(
                    sample * len(self._index) + start + _AT_ONCE, len(self._samples) * len(self._index)
                )


def _shape_only(array: Array) -> Array:
    """An array of the same type and shape that takes no memory."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def _recording_session(model: Model, names: Sequence[str], options: SessionOptions) -> Runner:
    """A session of the graph whose outputs are the tensors of these names.

    Without optimizations some operators have no kernel; then a level above has to do.
    """
    fork = model.fork()
    made = {value.name: value for node in fork.graph for value in node.outputs}
    fork.graph.outputs.clear()
    fork.graph.outputs.extend(made[name] for name in names)
    reason: UserError | None = None
    for level in _LEVELS:
        try:
            plain = SessionOptions(
                threads=options.threads, graph_optimization_level=level, config=dict(options.config)
            )
            return OrtSession.from_model(fork, plain)
        except UserError as error:
            reason = reason or error
    raise ModelError(
        "the model does not run with its tensors in between as outputs",
        where=model.origin.name,
        why=None if reason is None else reason.why or reason.what,
        remedy="report it, with the bundle's manifest",
    ) from reason
