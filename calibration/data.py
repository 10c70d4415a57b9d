"""`CalibrationData`: samples that can be read again and again, and how they are opened and split."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ..frontends.imports import is_import_path
from ..graph.errors import DataError
from ..graph.model import TensorSpec
from . import arrays, hub_datasets, images, programs, rows, text
from .generated import generated_source
from .schema import Feeds, near_names, quoted
from .shape_range import ShapeRanges, lengths_of, require_inside
from .source import Labels, Opened, Pairs, SampleSource

if TYPE_CHECKING:
    from ..frontends.text import TextEncoder

Split = Literal["calibrate", "evaluate", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationData:
    """Samples for calibration or evaluation: read lazily, one at a time, as often as wanted.

    Attributes:
        name: the last part of the source's path, or the import path; no folder of this machine.
        schema: the model inputs that every sample feeds.
        origin: "generated" stamps every figure that comes of made-up data.
        split: which side of a split this is.
        labels: class index per sample, shape (samples,), or None.
        class_names: what the labels mean, where the data says so.
        pairs: similarity pairs over the samples, or None.
        notes: what was done to the data, for the report.
        positions: position of each sample in the source, shape (samples,).
        contents: SHA-256 of each sample.
        identities: SHA-256 of what counts as the same sample (texts: case and white space apart).
    """

    name: str
    schema: tuple[TensorSpec, ...]
    origin: Literal["real", "generated"]
    split: Split
    source: SampleSource
    positions: npt.NDArray[np.int64]
    contents: tuple[bytes, ...]
    identities: tuple[bytes, ...]
    labels: Labels | None = None
    class_names: tuple[str, ...] = ()
    pairs: Pairs | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Feeds]:
        """Every sample as input name -> array with batch axis 1."""
        return self.source.read(self.positions.tolist(), 1)

    def batches(self, batch_size: int) -> Iterator[tuple[Feeds, int]]:
        """Feeds of `batch_size` samples and how many of them count.

        Where the model fixes its batch, the last batch is filled up by repeating its last sample.
        """
        static = self.static_batch
        for feeds in self.source.read(self.positions.tolist(), batch_size):
            count = max((len(values) for values in feeds.values() if values.ndim), default=1)
            if static is not None and count < batch_size:
                feeds = {  # noqa: PLW2901 - the filled batch takes its place
                    name: np.concatenate([values, values[-1:].repeat(batch_size - count, 0)])
                    for name, values in feeds.items()
                }
            yield feeds, count

    @property
    def static_batch(self) -> int | None:
        """The batch size that the model fixes, None where it is free."""
        sizes = {spec.shape[0] for spec in self.schema if spec.shape}
        size = sizes.pop() if len(sizes) == 1 else None
        return size if isinstance(size, int) else None

    @property
    def padding(self) -> str:
        """How samples of unequal length become one batch, in words."""
        return self.source.padding

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over all samples, labels and scores; does not depend on their order."""
        labels = [None] * len(self) if self.labels is None else self.labels.tolist()
        parts = [repr((key, label)) for key, label in zip(self.contents, labels, strict=True)]
        if self.pairs is not None:
            ends = zip(self.pairs.first, self.pairs.second, self.pairs.score.tolist(), strict=True)
            parts += [repr((self.contents[a], self.contents[b], score)) for a, b, score in ends]
        return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()

    def largest_sample(self) -> Feeds:
        """The sample with most bytes (the longest text); the first where all are alike."""
        samples = iter(self)
        largest = next(samples)
        if not self.source.uniform:
            for feeds in samples:
                if _nbytes(feeds) > _nbytes(largest):
                    largest = feeds
        return largest

    def select(self, chosen: Sequence[int], split: Split, *notes: str) -> CalibrationData:
        """The samples at `chosen` (indices into this data); pairs stay where both ends do."""
        kept = sorted(chosen)
        index = np.array(kept, np.int64)
        return dataclasses.replace(
            self,
            split=split,
            positions=self.positions[index],
            contents=tuple(self.contents[i] for i in kept),
            identities=tuple(self.identities[i] for i in kept),
            labels=None if self.labels is None else self.labels[index],
            pairs=None if self.pairs is None else _select_pairs(self.pairs, index, len(self)),
            notes=(*self.notes, *notes),
        )


def _nbytes(feeds: Feeds) -> int:
    return sum(values.nbytes for values in feeds.values())


def _select_pairs(pairs: Pairs, index: npt.NDArray[np.int64], total: int) -> Pairs | None:
    moved = np.full(total, -1, np.int64)
    moved[index] = np.arange(len(index))
    both = (moved[pairs.first] >= 0) & (moved[pairs.second] >= 0)
    if not both.any():
        return None
    return Pairs(first=moved[pairs.first[both]], second=moved[pairs.second[both]], score=pairs.score[both])


def open_data(
    source: str,
    inputs: Sequence[TensorSpec],
    *,
    encoder: TextEncoder | None = None,
    samples: int | None = None,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    shape_ranges: ShapeRanges | None = None,
    classes: Sequence[str] = (),
    preprocessor: Path | None = None,
) -> CalibrationData:
    """Open calibration or evaluation data for a model.

    Args:
        source: a .npz, .npy, .txt, .jsonl, .csv or .tsv file, a folder of .npy/.npz files or of
            images (.jpg, .png, .bmp, .webp), a Hugging Face dataset `hf:NAME[:CONFIG][:SPLIT]` (see
            `hub_datasets.parse_reference`), or the import path `module:function` of a generator.
        inputs: the model's inputs.
        encoder: the model's tokenizer; texts need it.
        samples: how many to draw, all by default (of similarity pairs: rows; of a Hugging Face
            dataset 512 by default).
        seed: seed of the shuffle that draws them; never a prefix of the file is taken.
        shapes: deployed input shapes; texts are cut at their sequence length.
        shape_ranges: the least and the largest shape of inputs; texts are padded to the one and cut
            at the other, arrays must lie between them (the batch axis apart).
        classes: the model's class names, which give class names in the data their index.
        preprocessor: the model's preprocessor_config.json; images need it.

    Raises:
        DataError: if the data is missing, malformed, or does not fit the inputs.
        NotSupported: if a Hugging Face dataset is made by code of its own.
        RuntimeUnavailable: if Pillow (for images) or datasets (for `hf:`) is missing, or the hub
            cannot be reached.
    """
    path = Path(source)
    ranges = shape_ranges or {}
    lengths = lengths_of(shapes or {}, ranges)
    if hub_datasets.is_hub_dataset(source):
        opened, name = hub_datasets.open_hub_dataset(
            source,
            inputs,
            samples,
            seed,
            encoder=encoder,
            lengths=lengths,
            classes=classes,
            preprocessor=preprocessor,
        )
    elif is_import_path(source) and not path.exists():
        opened = programs.open_program(source, inputs, samples, seed)
        name = source
    else:
        opened = _open_path(
            path,
            inputs,
            samples,
            seed,
            encoder=encoder,
            lengths=lengths,
            classes=classes,
            preprocessor=preprocessor,
        )
        name = path.resolve().name
    data = CalibrationData(
        name=name,
        schema=tuple(inputs),
        origin="real",
        split="all",
        source=opened.source,
        positions=opened.positions,
        contents=opened.contents,
        identities=opened.identities,
        labels=opened.labels,
        class_names=opened.class_names,
        pairs=opened.pairs,
        notes=opened.notes,
    )
    if ranges:
        require_inside(data, ranges)
    return data


def _open_path(
    path: Path,
    inputs: Sequence[TensorSpec],
    samples: int | None,
    seed: int,
    *,
    encoder: TextEncoder | None,
    lengths: text.Lengths,
    classes: Sequence[str],
    preprocessor: Path | None,
) -> Opened:
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError("data does not exist", where=str(path), remedy=f"check the path{_siblings(path)}")
    try:
        if path.is_dir() and images.holds_images(path):
            return images.open_images(path, inputs, samples, seed, preprocessor=preprocessor, classes=classes)
        if path.is_dir():
            return arrays.open_folder(path, inputs, samples, seed, classes)
        if suffix in arrays.SUFFIXES:
            return arrays.open_array_file(path, inputs, samples, seed)
        if suffix in rows.SUFFIXES:
            return text.open_text(
                path, inputs, samples, seed, encoder=encoder, lengths=lengths, classes=classes
            )
    except OSError as error:
        raise DataError("data cannot be read", where=path.name, why=error.strerror or str(error)) from error
    raise DataError(
        f"files of type {suffix or 'without suffix'!r} are not read as data",
        where=path.name,
        remedy=f"pass one of {quoted((*arrays.SUFFIXES, *rows.SUFFIXES))}, a folder of arrays, "
        "hf:NAME or module:function",
    )


def _siblings(path: Path) -> str:
    parent = path.parent
    return near_names(path.name, (item.name for item in parent.iterdir())) if parent.is_dir() else ""


def generated_data(
    inputs: Sequence[TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    n: int,
    seed: int = 0,
    *,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    index_limits: Mapping[str, int] | None = None,
    vocab_size: int | None = None,
) -> CalibrationData:
    """`n` made-up samples, stamped "generated": floats standard normal, ids inside the vocabulary.

    Args:
        inputs: the model's inputs.
        shapes: sizes for dynamic axes, by input name.
        n: how many samples.
        seed: the same seed gives the same samples everywhere.
        ranges: (low, high) of uniform floats, by input name.
        index_limits: exclusive upper bound of integer inputs, by name (see `graph.tables.index_bounds`).
        vocab_size: the bound for integer inputs that are not in `index_limits`.

    Raises:
        DataError: if a dynamic axis has no size, or `n` is below 1.
        NotSupported: for string inputs.
    """
    if n < 1:
        raise DataError(f"{n} samples asked for", remedy="pass --samples 1 or more")
    source = generated_source(
        inputs, shapes, seed, ranges=ranges or {}, index_limits=index_limits or {}, vocab_size=vocab_size
    )
    contents = tuple(source.key(position) for position in range(n))
    return CalibrationData(
        name=f"generated (seed {seed})",
        schema=tuple(inputs),
        origin="generated",
        split="all",
        source=source,
        positions=np.arange(n),
        contents=contents,
        identities=contents,
        notes=("the inputs are made up: no figure that comes of them says anything about real data",),
    )


def split_data(
    data: CalibrationData, fraction: float = 0.8, seed: int = 0
) -> tuple[CalibrationData, CalibrationData]:
    """Split into a calibrate side of about `fraction` of the samples and an evaluate side, disjoint.

    Identical samples, and all sentences that pairs connect, stay on one side.

    Raises:
        DataError: if nothing would be left for one of the sides.
    """
    groups = _groups(data)
    order = np.random.default_rng([seed, 0x5711]).permutation(len(groups))
    wanted = round(fraction * len(data))
    calibrate: list[int] = []
    evaluate: list[int] = []
    for group in order:
        members = groups[group]
        fits = len(calibrate) + len(members) / 2 <= wanted
        (calibrate if fits else evaluate).extend(members)
    if len(groups) > 1 and not (calibrate and evaluate):
        evaluate = list(groups[order[-1]])
        calibrate = sorted(set(range(len(data))) - set(evaluate))
    if not calibrate or not evaluate:
        raise DataError(
            "the data cannot be split into calibration and evaluation",
            where=data.name,
            why=f"its {len(data)} samples are one single sample, or are all connected by pairs",
            remedy="pass more samples, or separate data with --eval",
        )
    note = f"split {len(calibrate)} calibrate / {len(evaluate)} evaluate, seed {seed}, disjoint by content"
    return data.select(calibrate, "calibrate", note), data.select(evaluate, "evaluate", note)


def _groups(data: CalibrationData) -> list[list[int]]:
    """Samples that must stay together: equal identities, and the two ends of every pair."""
    parent = list(range(len(data)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    first_seen: dict[bytes, int] = {}
    for index, identity in enumerate(data.identities):
        parent[root(index)] = root(first_seen.setdefault(identity, index))
    if data.pairs is not None:
        for first, second in zip(data.pairs.first.tolist(), data.pairs.second.tolist(), strict=True):
            parent[root(first)] = root(second)
    groups: dict[int, list[int]] = {}
    for index in range(len(data)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def require_disjoint(
    calibrate: CalibrationData, evaluate: CalibrationData
) -> tuple[CalibrationData, CalibrationData, int]:
    """Take samples that also stand in `evaluate` out of `calibrate`; returns both, and how many went.

    Raises:
        DataError: if nothing is left to calibrate on.
    """
    held_out = set(evaluate.identities)
    kept = [index for index, identity in enumerate(calibrate.identities) if identity not in held_out]
    removed = len(calibrate) - len(kept)
    if not kept:
        raise DataError(
            "every calibration sample is also an evaluation sample",
            where=calibrate.name,
            remedy="pass other data with --calib, or only --calib, which is split 80/20",
        )
    notes = (f"{removed} samples that also stand in the evaluation data were removed",) if removed else ()
    return (
        calibrate.select(kept, "calibrate", *notes),
        evaluate.select(range(len(evaluate)), "evaluate"),
        removed,
    )
