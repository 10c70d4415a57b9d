"""Samples from arrays: one .npz or .npy file, or a folder of them (a folder per class gives labels)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..graph.errors import DataError
from ..graph.model import TensorSpec
from .schema import Array, Feeds, check_layout, fit_array, match_names, quoted
from .source import Labels, Opened, class_indices, content_key, draw, stack
from .stored import StoredArray, open_arrays

SUFFIXES = (".npy", ".npz")
_AS_THEY_ARE = "none (arrays are fed as they are)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    """The arrays of one file, matched to the inputs."""

    arrays: dict[str, StoredArray]
    labels: StoredArray | None
    unused: tuple[str, ...]
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FileFacts:
    """What is kept of each file of a folder; the file itself is closed again."""

    count: int
    labels: Labels | None
    unused: tuple[str, ...]
    name: str


class ArraySource:
    """Rows of the arrays of one file; `rounded` is set once a float64 value had to be rounded."""

    sequential = False
    padding = _AS_THEY_ARE

    def __init__(self, file: _File, inputs: Sequence[TensorSpec]) -> None:
        self.uniform = True
        self.rounded = False
        self._file = file
        self._inputs = inputs

    def read(self, positions: Sequence[int], batch_size: int) -> Iterator[Feeds]:
        """Feeds of `batch_size` rows at a time; one batch is in memory."""
        for start in range(0, len(positions), batch_size):
            chunk = positions[start : start + batch_size]
            yield stack([self.sample(int(position)) for position in chunk], self._file.name)

    def sample(self, position: int) -> Feeds:
        """Row `position` as feeds with batch axis 1."""
        feeds = {}
        where = f"{self._file.name}, sample {position}"
        for spec in self._inputs:
            array = self._file.arrays[spec.name]
            row = array.row(position)
            if not _has_own_batch(array.shape, spec):
                row = row[None]
            feeds[spec.name], rounded = fit_array(row, spec, where)
            self.rounded |= rounded
        return feeds


class FolderSource:
    """Files read one after another in order of their names; the last one stays open."""

    sequential = True
    padding = _AS_THEY_ARE

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], inputs: Sequence[TensorSpec]) -> None:
        self.uniform = False
        self.rounded = False
        self._paths = paths
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._inputs = inputs

    def read(self, positions: Sequence[int], batch_size: int) -> Iterator[Feeds]:
        """Feeds of `batch_size` samples at a time, `positions` ascending; one batch is in memory."""
        pending: list[Feeds] = []
        opened, file = -1, None
        for position in positions:
            index = int(np.searchsorted(self._starts, position, side="right")) - 1
            if file is None or index != opened:
                opened, file = index, _match_file(self._paths[index], self._inputs)
            pending.append(self._sample(file, int(position - self._starts[index])))
            if len(pending) == batch_size:
                yield stack(pending, file.name)
                pending = []
        if pending and file is not None:
            yield stack(pending, file.name)

    def _sample(self, file: _File, row: int) -> Feeds:
        feeds = {}
        for spec in self._inputs:
            array = file.arrays[spec.name]
            values = array.whole()[None] if _is_lone_sample(array.shape, spec) else array.row(row)[None]
            feeds[spec.name], rounded = fit_array(values, spec, file.name)
            self.rounded |= rounded
        return feeds


def _has_own_batch(shape: Sequence[int], spec: TensorSpec) -> bool:
    """Whether each row already carries the model's batch axis (or the input has no axes at all)."""
    return spec.shape is not None and len(shape) == len(spec.shape) + 1


def _is_lone_sample(shape: Sequence[int], spec: TensorSpec) -> bool:
    """Whether a file of a folder holds one sample without batch axis."""
    return spec.shape is not None and len(shape) == len(spec.shape) - 1


def _match_file(path: Path, inputs: Sequence[TensorSpec]) -> _File:
    arrays = open_arrays(path)
    if path.suffix.lower() == ".npy" and len(inputs) != 1:
        raise DataError(
            f"a .npy file holds one array, but the model has {len(inputs)} inputs",
            where=path.name,
            remedy=f"save an .npz with the arrays {quoted(spec.name for spec in inputs)}",
        )
    matched = match_names({name: len(array.shape) for name, array in arrays.items()}, inputs, path.name)
    is_input = "labels" in matched.values()
    unused = sorted(set(arrays) - set(matched.values()) - ({"labels"} if not is_input else set()))
    return _File(
        arrays={name: arrays[key] for name, key in matched.items()},
        labels=None if is_input else arrays.get("labels"),
        unused=tuple(unused),
        name=path.name,
    )


def open_array_file(path: Path, inputs: Sequence[TensorSpec], samples: int | None, seed: int) -> Opened:
    """Open one .npz (keys = input names, first axis = samples, `labels` = labels) or .npy file.

    Every drawn sample is read once here: cast, checked and hashed.

    Raises:
        DataError: if the file cannot be read or does not fit the inputs.
    """
    file = _match_file(path, inputs)
    total = _count_rows(file, inputs)
    labels = _read_labels(file, total)
    positions = draw(total, samples, seed)
    source = ArraySource(file, inputs)
    contents = tuple(content_key(feeds) for feeds in source.read(positions.tolist(), 1))
    return Opened(
        source=source,
        positions=positions,
        contents=contents,
        identities=contents,
        labels=None if labels is None else labels[positions],
        notes=_notes(file.unused, rounded=source.rounded),
    )


def _count_rows(file: _File, inputs: Sequence[TensorSpec]) -> int:
    counts = {}
    for spec in inputs:
        array = file.arrays[spec.name]
        own = _has_own_batch(array.shape, spec)
        if own and array.shape[1:2] not in ((1,), ()):
            raise DataError(
                f"each sample of input {spec.name!r} is a batch of {array.shape[1]}",
                where=file.name,
                remedy="save one sample per row: shape (samples, …) or (samples, 1, …)",
            )
        check_layout(array.shape[1:] if own else array.shape, array.dtype, spec, file.name)
        if not array.shape:
            raise DataError(
                f"data for input {spec.name!r} has no sample axis",
                where=file.name,
                remedy="save an array whose first axis counts the samples",
            )
        counts[spec.name] = array.shape[0]
    if len(set(counts.values())) > 1:
        raise DataError(
            "the arrays hold different numbers of samples",
            where=file.name,
            why=", ".join(f"{name}: {count}" for name, count in counts.items()),
            remedy="give every input the same number of samples",
        )
    return next(iter(counts.values()), 0)


def _read_labels(file: _File, total: int) -> Labels | None:
    if file.labels is None:
        return None
    if len(file.labels.shape) != 1:
        raise DataError(
            f"labels have shape {file.labels.shape}",
            where=file.name,
            remedy="save one class index per sample: integers of shape (samples,)",
        )
    return check_labels(file.labels.whole(), total, file.name)


def check_labels(labels: Array, total: int, where: str) -> Labels:
    """Labels of shape (samples,) as int64.

    Raises:
        DataError: if they are not integers, not one per sample, or negative.
    """
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"labels are {labels.dtype.name}", where=where, remedy="save class indices as integers"
        )
    if len(labels) != total:
        raise DataError(
            f"{len(labels)} labels for {total} samples", where=where, remedy="save one label per sample"
        )
    if total and int(labels.min()) < 0:
        raise DataError("a label is negative", where=where, remedy="class indices start at 0")
    return labels.astype(np.int64)


def _notes(unused: Sequence[str], *, rounded: bool) -> tuple[str, ...]:
    notes = []
    if unused:
        notes.append(f"arrays without an input of that name are not used: {quoted(unused)}")
    if rounded:
        notes.append("floats were rounded to the input's narrower type")
    return tuple(notes)


def open_folder(
    path: Path,
    inputs: Sequence[TensorSpec],
    samples: int | None,
    seed: int,
    classes: Sequence[str] = (),
) -> Opened:
    """Open a folder of .npy/.npz files, one sample or one batch each; a sub-folder per class gives labels.

    Raises:
        DataError: if there are no such files, or one does not fit the inputs.
    """
    paths, folders = _list_folder(path)
    facts = [_describe_file(file, inputs) for file in paths]
    counts = [fact.count for fact in facts]
    labels, class_names, notes = _folder_labels(facts, folders, classes)
    source = FolderSource(paths, counts, inputs)
    positions = draw(sum(counts), samples, seed, sequential=True)
    contents = tuple(content_key(feeds) for feeds in source.read(positions.tolist(), 1))
    return Opened(
        source=source,
        positions=positions,
        contents=contents,
        identities=contents,
        labels=None if labels is None else labels[positions],
        class_names=class_names,
        notes=(*notes, *_notes(sorted({x for fact in facts for x in fact.unused}), rounded=source.rounded)),
    )


def _list_folder(path: Path) -> tuple[list[Path], list[str]]:
    """The data files in order, and the class folder of each (empty without class folders)."""
    direct = sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES and item.is_file())
    if direct:
        return direct, []
    nested = sorted(item for item in path.glob("*/*") if item.suffix.lower() in SUFFIXES and item.is_file())
    if not nested:
        others = sorted(item.name for item in path.iterdir())[:3]
        raise DataError(
            "the folder holds no .npy or .npz files",
            where=path.name,
            why=f"found {quoted(others)}",
            remedy="save the samples with np.save, one per file, or pass a .txt, .csv or .jsonl file",
        )
    return nested, [item.parent.name for item in nested]


def _describe_file(path: Path, inputs: Sequence[TensorSpec]) -> _FileFacts:
    file = _match_file(path, inputs)
    if all(_is_lone_sample(file.arrays[spec.name].shape, spec) for spec in inputs):
        for spec in inputs:
            array = file.arrays[spec.name]
            check_layout((1, *array.shape), array.dtype, spec, file.name)
        count = 1
    else:
        # In a folder the leading axis of a file is the batch: an extra axis has no meaning here.
        for spec in inputs:
            check_layout(file.arrays[spec.name].shape, file.arrays[spec.name].dtype, spec, file.name)
        count = _count_rows(file, inputs)
    return _FileFacts(count=count, labels=_read_labels(file, count), unused=file.unused, name=file.name)


def _folder_labels(
    facts: Sequence[_FileFacts], folders: Sequence[str], classes: Sequence[str]
) -> tuple[Labels | None, tuple[str, ...], tuple[str, ...]]:
    """Labels (from the files, or else from the class folders), class names and notes."""
    stored = [fact.labels for fact in facts if fact.labels is not None]
    if len(stored) == len(facts):
        return np.concatenate(stored), (), ()
    if stored:
        lacking = next(fact.name for fact in facts if fact.labels is None)
        raise DataError(
            "some files hold labels and some do not", where=lacking, remedy="label all files or none"
        )
    if not folders:
        return None, (), ()
    index, class_names, notes = class_indices(sorted(set(folders)), classes)
    counts = [fact.count for fact in facts]
    labels = np.repeat([index[folder] for folder in folders], counts).astype(np.int64)
    return labels, class_names, notes
