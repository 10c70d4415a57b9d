"""Samples from texts: tokenized on the fly with the model's own tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..graph.errors import DataError
from ..graph.model import TensorSpec
from .rows import Row, read_rows
from .schema import Array, Feeds, fit_array, quoted
from .source import Labels, Opened, Pairs, class_indices, draw

if TYPE_CHECKING:
    from ..frontends.text import TextEncoder

_MADE_BY_TOKENIZERS = ("input_ids", "attention_mask", "token_type_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """The tokens that a sequence is padded to at least, and cut at (None: the tokenizer's own limit)."""

    least: int = 1
    most: int | None = None


class TextSource:
    """Texts (with second texts, for cross-encoders) that are tokenized whenever they are read.

    Args:
        texts: the texts that were drawn; only they are kept.
        seconds: the second text of each, or None.
        encoder: the model's tokenizer.
        inputs: the model's inputs; a static length is padded to and cut at.
        lengths: the least length that texts are padded to, and the one at which they are cut.
    """

    sequential = False
    uniform = False

    def __init__(
        self,
        texts: Sequence[str],
        seconds: Sequence[str] | None,
        encoder: TextEncoder,
        inputs: Sequence[TensorSpec],
        lengths: Lengths,
    ) -> None:
        self._texts = texts
        self._seconds = seconds
        self._encoder = encoder
        self._inputs = inputs
        static = {spec.shape[1] for spec in inputs if spec.shape is not None and len(spec.shape) == 2}
        fixed = [length for length in static if isinstance(length, int)]
        self._length = fixed[0] if fixed else None
        most = [] if lengths.most is None else [lengths.most]
        self._limit = min([*fixed, *most], default=encoder.max_length)
        self._least = lengths.least

    @property
    def padding(self) -> str:
        """How texts of unequal length become one batch."""
        if self._length is not None:
            return f"to {self._length} tokens (static)"
        if self._least > 1:
            return f"to the longest of the batch, at least {self._least} tokens"
        return "to the longest of the batch"

    def read(self, positions: Sequence[int], batch_size: int) -> Iterator[Feeds]:
        """Feeds of `batch_size` texts at a time, arrays of shape (batch, tokens)."""
        for start in range(0, len(positions), batch_size):
            yield self._encode([int(position) for position in positions[start : start + batch_size]])

    def _encode(self, chunk: Sequence[int]) -> Feeds:
        texts = [self._texts[position] for position in chunk]
        seconds = None if self._seconds is None else [self._seconds[position] for position in chunk]
        encoded = self._encoder.encode(texts, seconds)
        arrays: dict[str, Array] = dict(encoded)
        if next(iter(arrays.values())).shape[1] > self._limit:
            arrays = _cut(arrays, self._limit)
        arrays = self._pad(arrays, self._length or self._least)
        return {spec.name: fit_array(arrays[spec.name], spec, "text")[0] for spec in self._inputs}

    def _pad(self, arrays: dict[str, Array], length: int) -> dict[str, Array]:
        """Append what the tokenizer itself pads with (seen where two texts differ in length)."""
        missing = length - next(iter(arrays.values())).shape[1]
        if missing <= 0:
            return arrays
        probe = self._encoder.encode(["a", "a b c d e f g h"])
        left = probe["attention_mask"][0, 0] == 0
        widths = ((0, 0), (missing, 0) if left else (0, missing))
        return {
            name: np.pad(values, widths, constant_values=probe[name][0, 0 if left else -1])
            for name, values in arrays.items()
        }


def _cut(arrays: dict[str, Array], limit: int) -> dict[str, Array]:
    """Cut sequences at `limit` tokens; a text that was longer keeps its closing token."""
    cut = {name: np.zeros((len(values), limit), values.dtype) for name, values in arrays.items()}
    for row, mask in enumerate(arrays["attention_mask"]):
        attended = np.flatnonzero(mask)
        kept = np.append(attended[: limit - 1], attended[-1]) if len(attended) > limit else np.arange(limit)
        if len(attended) <= limit and mask[:limit].sum() < len(attended):
            kept = np.arange(len(mask) - limit, len(mask))  # padded on the left
        for name, values in arrays.items():
            cut[name][row] = values[row, kept]
    return cut


def open_text(
    path: Path,
    inputs: Sequence[TensorSpec],
    samples: int | None,
    seed: int,
    *,
    encoder: TextEncoder | None,
    lengths: Lengths,
    classes: Sequence[str],
) -> Opened:
    """Open a .txt, .jsonl, .csv or .tsv file; only the rows that are drawn stay in memory.

    Rows with `score` are similarity pairs: their distinct sentences become the samples (`samples`
    counts rows).

    Raises:
        DataError: if no tokenizer is there, an input is none that a tokenizer makes, or the file
            is malformed.
    """
    require_texts_fit(encoder, inputs, path.name)
    total, names = _survey(path)
    rows = _take(path, draw(total, samples, seed).tolist())
    return samples_of_rows(
        rows, names, inputs, encoder=encoder, lengths=lengths, classes=classes, where=path.name
    )


def require_texts_fit(encoder: TextEncoder | None, inputs: Sequence[TensorSpec], where: str) -> None:
    """Raise unless a tokenizer is there and makes every input; `where` names the data.

    Raises:
        DataError: saying what is missing.
    """
    if encoder is None:
        raise DataError(
            "texts need a tokenizer",
            where=where,
            why="the model came without one",
            remedy="pass --tokenizer PATH (a tokenizer.json or its folder)",
        )
    foreign = [spec.name for spec in inputs if spec.name not in _MADE_BY_TOKENIZERS]
    if foreign:
        raise DataError(
            f"a tokenizer does not make the input {foreign[0]!r}",
            where=where,
            why=f"it makes {quoted(_MADE_BY_TOKENIZERS)}",
            remedy="pass the data as .npz with one array per model input",
        )


def samples_of_rows(
    rows: Sequence[Row],
    names: Sequence[str],
    inputs: Sequence[TensorSpec],
    *,
    encoder: TextEncoder | None,
    lengths: Lengths,
    classes: Sequence[str],
    where: str,
) -> Opened:
    """The samples that rows of texts stand for; all rows have the same columns.

    Args:
        rows: at least one; all are drawn already.
        names: all class names of the data, where its labels are names.
        inputs: the model's inputs.
        encoder: the model's tokenizer.
        lengths: limits on the sequence length.
        classes: the model's class names.
        where: names the data in messages.

    Raises:
        DataError: if no tokenizer is there, or an input is none that a tokenizer makes.
    """
    require_texts_fit(encoder, inputs, where)
    assert encoder is not None
    labels, class_names, notes = _labels(rows, classes, names, where)
    if rows[0].kind == "similarity":
        return _open_pairs(rows, encoder, inputs, lengths)
    seconds = None if rows[0].second is None else [row.second or "" for row in rows]
    return Opened(
        source=TextSource([row.text for row in rows], seconds, encoder, inputs, lengths),
        positions=np.arange(len(rows)),
        contents=tuple(_exact(row.text, row.second) for row in rows),
        identities=tuple(_identity(row.text, row.second) for row in rows),
        labels=labels,
        class_names=class_names,
        notes=notes,
    )


def _survey(path: Path) -> tuple[int, list[str]]:
    """The number of rows, and all class names (an index must not depend on which rows are drawn)."""
    total, names, named = 0, set(), False
    for row in read_rows(path):
        total += 1
        if row.label is not None:
            named |= isinstance(row.label, str)
            names.add(str(row.label))
    return total, sorted(names) if named else []


def _take(path: Path, chosen: Sequence[int]) -> list[Row]:
    """The rows at `chosen`, in that order."""
    order = {position: index for index, position in enumerate(chosen)}
    numbered = itertools.islice(enumerate(read_rows(path)), max(chosen) + 1)
    found = {order[position]: row for position, row in numbered if position in order}
    return [found[index] for index in range(len(found))]


def _open_pairs(
    rows: Sequence[Row], encoder: TextEncoder, inputs: Sequence[TensorSpec], lengths: Lengths
) -> Opened:
    positions: dict[str, int] = {}
    first, second, scores = [], [], []
    for row in rows:
        first.append(positions.setdefault(row.text, len(positions)))
        second.append(positions.setdefault(row.second or "", len(positions)))
        scores.append(row.score)
    texts = list(positions)
    return Opened(
        source=TextSource(texts, None, encoder, inputs, lengths),
        positions=np.arange(len(texts)),
        contents=tuple(_exact(text, None) for text in texts),
        identities=tuple(_identity(text, None) for text in texts),
        pairs=Pairs(
            first=np.array(first, np.int64),
            second=np.array(second, np.int64),
            score=np.array(scores, np.float64),
        ),
    )


def _exact(text: str, second: str | None) -> bytes:
    return hashlib.sha256(repr((text, second)).encode()).digest()


def _identity(text: str, second: str | None) -> bytes:
    """Texts that differ only in case or white space count as the same sample."""
    return _exact(_plain(text), None if second is None else _plain(second))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _labels(
    rows: Sequence[Row], classes: Sequence[str], names: Sequence[str], where: str
) -> tuple[Labels | None, tuple[str, ...], tuple[str, ...]]:
    """Labels as indices, the class names by index, and notes."""
    if rows[0].label is None:
        return None, (), ()
    if not names:
        values = np.array([row.label for row in rows], np.int64)
        if values.min() < 0:
            raise DataError("a label is negative", where=where, remedy="class indices start at 0")
        return values, (), ()
    index, class_names, notes = class_indices(names, classes)
    return np.array([index[str(row.label)] for row in rows], np.int64), class_names, notes
