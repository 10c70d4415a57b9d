"""What every source of samples offers, and how samples are drawn, identified and put in batches."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError
from .schema import Array, Feeds

Labels = npt.NDArray[np.int64]


class SampleSource(Protocol):
    """Where samples come from; every source can be read again and again."""

    @property
    def sequential(self) -> bool:
        """Whether positions must be read in ascending order."""
        ...

    @property
    def uniform(self) -> bool:
        """Whether every sample has the same shapes."""
        ...

    @property
    def padding(self) -> str:
        """How samples of unequal length become one batch, in words."""
        ...

    def read(self, positions: Sequence[int], batch_size: int) -> Iterator[Feeds]:
        """Feeds of `batch_size` samples at a time (the last one may hold fewer), batch axis first."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Similarity pairs over samples: positions `first` and `second`, `score` by people; shape (pairs,)."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """What a reader found: a source and, for each drawn sample, its position, identity and label.

    `contents` is a SHA-256 (32 bytes) of each sample's exact content; `identities` of what counts
    as the same sample (texts: case and white space apart). `positions`, `labels`: shape (samples,);
    `pairs` index into the drawn samples.
    """

    source: SampleSource
    positions: npt.NDArray[np.int64]
    contents: tuple[bytes, ...]
    identities: tuple[bytes, ...]
    labels: Labels | None = None
    class_names: tuple[str, ...] = ()
    pairs: Pairs | None = None
    notes: tuple[str, ...] = ()


def content_key(feeds: Mapping[str, Array]) -> bytes:
    """SHA-256 (32 bytes) of one sample's names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(feeds):
        values = feeds[name]
        digest.update(f"{name}\0{values.dtype.str}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.digest()


def stack(samples: Sequence[Feeds], where: str) -> Feeds:
    """Join samples (batch axis 1 each) along the batch axis.

    Raises:
        DataError: if the samples' shapes differ beyond the batch axis.
    """
    if len(samples) == 1:
        return samples[0]
    joined = {}
    for name in samples[0]:
        parts = [sample[name] for sample in samples]
        if len({part.shape for part in parts}) != 1 or parts[0].ndim == 0:
            raise DataError(
                f"samples of input {name!r} cannot be put in one batch",
                where=where,
                why=f"their shapes differ: {sorted({part.shape for part in parts})[:3]}",
                remedy="use batch size 1, or pad the samples to one shape",
            )
        joined[name] = np.concatenate(parts)
    return joined


def draw(total: int, samples: int | None, seed: int, *, sequential: bool = False) -> npt.NDArray[np.int64]:
    """Positions of `samples` out of `total`, shuffled by `seed` (files are often sorted by class).

    Sequential sources get the same choice in ascending order.

    Raises:
        DataError: if there is nothing to draw from, or fewer than one sample is asked for.
    """
    if samples is not None and samples < 1:
        raise DataError(f"{samples} samples asked for", remedy="pass --samples 1 or more")
    if total == 0:
        raise DataError("the data holds no samples", remedy="pass data with at least one sample")
    chosen = np.random.default_rng([seed, 0xCA11]).permutation(total)[:samples]
    return np.sort(chosen) if sequential else chosen


def class_indices(
    names: Sequence[str], classes: Sequence[str]
) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]:
    """Index of each class name found in data, the names by index, and notes for the report.

    The model's `classes` decide (case apart); names that are all numbers are their own index; else
    the sorted order does, which the note says.
    """
    index = {name.casefold(): position for position, name in enumerate(classes)}
    if all(name.casefold() in index for name in names):
        return {name: index[name.casefold()] for name in names}, tuple(classes), ()
    if all(name.isascii() and name.isdigit() for name in names):
        return {name: int(name) for name in names}, (), ()
    ordered = sorted(names)
    note = f"class names in sorted order stand for the model's classes: {', '.join(ordered)}"
    return {name: position for position, name in enumerate(ordered)}, tuple(ordered), (note,)
