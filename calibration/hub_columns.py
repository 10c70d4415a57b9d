"""Which columns of a dataset hold what, and the samples that its rows are made into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..graph.errors import DataError
from ..graph.model import TensorSpec
from .images import EncodedImage, image_source
from .rows import Row, score_of
from .schema import near_names, quoted
from .source import Labels, Opened, class_indices, content_key
from .text import Lengths, samples_of_rows

if TYPE_CHECKING:
    from ..frontends.text import TextEncoder

# Pairs of text columns as datasets call them; the first that is there is taken.
_TEXT_COLUMNS = (
    ("text", "text_pair"),
    ("sentence", None),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "context"),
    ("question", "sentence"),
)
_IMAGE_COLUMNS = ("image", "img", "pixel_values")
_LABEL_COLUMNS = ("label", "labels")
_UNLABELLED = -1  # what GLUE and its like write where the label is kept secret


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """The column of each role; None where there is none, or (before `resolved`) none was named."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    score: str | None = None
    image: str | None = None

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that are read."""
        named = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def resolved(
        self, names: Sequence[str], features: Mapping[str, Any], inputs: Sequence[TensorSpec], where: str
    ) -> Columns:
        """These columns, and for what was not named the ones that the dataset's names tell.

        Args:
            names: the dataset's columns.
            features: their types, where they are known.
            inputs: the model's inputs: four axes mean images.
            where: names the data in messages.

        Raises:
            DataError: if a named column does not exist, or none can be told.
        """
        for role, column in ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self)):
            if column is not None and column not in names:
                raise DataError(
                    f"the dataset has no column {column!r}{near_names(column, names)}",
                    where=where,
                    why=f"its columns are {quoted(names)}",
                    remedy=f"name the column of the {role}: …,{role}=COLUMN",
                )
        takes_image = len(inputs) == 1 and len(inputs[0].shape or ()) == 4
        content = self if self.text or self.image else self._found(names, features, takes_image, where)
        label = self.label or _first(_LABEL_COLUMNS, names)
        score = self.score
        if content.text_pair is not None and score is None and self.label is None:
            score = _first(("score", "similarity_score"), names)
        if score is not None and content.text_pair is None:
            raise DataError(
                "a score needs two texts",
                where=where,
                remedy="name both: …,text=COLUMN,text_pair=COLUMN,score=COLUMN",
            )
        return dataclasses.replace(content, label=None if label == score else label, score=score)

    def _found(
        self, names: Sequence[str], features: Mapping[str, Any], takes_image: bool, where: str
    ) -> Columns:
        if takes_image:
            typed = [name for name in names if type(features.get(name)).__name__ == "Image"]
            image = typed[0] if typed else _first(_IMAGE_COLUMNS, names)
            if image is not None:
                return dataclasses.replace(self, image=image)
        for first, second in _TEXT_COLUMNS:
            if first in names and not takes_image:
                pair = self.text_pair or (second if second in names else None)
                return dataclasses.replace(self, text=first, text_pair=pair)
        kind = "image" if takes_image else "text"
        raise DataError(
            f"it is not known which column holds the {kind}s",
            where=where,
            why=f"the columns are {quoted(names)}",
            remedy=f"name it: …,{kind}=COLUMN"
            + ("" if takes_image else " (and text_pair=, label=, score= where there are such)"),
        )


def _first(wanted: Iterable[str], names: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def text_samples(
    rows: Sequence[Mapping[str, Any]],
    columns: Columns,
    features: Mapping[str, Any],
    inputs: Sequence[TensorSpec],
    *,
    encoder: TextEncoder | None,
    lengths: Lengths,
    classes: Sequence[str],
    where: str,
) -> Opened:
    """Rows of texts as samples; rows without a text are left out.

    Raises:
        DataError: if no row has a text, a value is of the wrong type, or the model takes no texts.
    """
    labels, names, notes = _label_values(rows, columns, features)
    made: list[Row] = []
    for row, label in zip(rows, labels, strict=True):
        first, second = row[str(columns.text)], row[columns.text_pair] if columns.text_pair else None
        if first is None or (columns.text_pair is not None and second is None):
            continue
        if not isinstance(first, str) or not isinstance(second, (str, type(None))):
            raise _wrong_type("text", first if not isinstance(first, str) else second, where)
        score = None
        if columns.score is not None:
            score = score_of(row[columns.score])
            if score is None:
                raise _wrong_type("score", row[columns.score], where)
        made.append(Row(text=first, second=second, score=score, label=label))
    if not made:
        raise DataError("no row holds a text", where=where, remedy="name another column or split")
    if len(made) < len(rows):
        notes = (*notes, f"{len(rows) - len(made)} rows without a text are left out")
    opened = samples_of_rows(
        made, names, inputs, encoder=encoder, lengths=lengths, classes=classes, where=where
    )
    return dataclasses.replace(opened, notes=(*notes, *opened.notes))


def image_samples(
    rows: Sequence[Mapping[str, Any]],
    columns: Columns,
    features: Mapping[str, Any],
    inputs: Sequence[TensorSpec],
    *,
    preprocessor: Path | None,
    classes: Sequence[str],
    where: str,
) -> Opened:
    """Rows of images as samples; the encoded bytes are kept, an image is decoded when it is read.

    Raises:
        DataError: if an image cannot be read, or the model takes none.
        RuntimeUnavailable: if Pillow is missing.
    """
    images = [
        EncodedImage(name=f"{where}, image {index}", content=_content(row[str(columns.image)], where))
        for index, row in enumerate(rows)
    ]
    source = image_source(images, inputs, preprocessor, where)
    contents = tuple(content_key(feeds) for feeds in source.read(range(len(images)), 1))
    values, names, notes = _label_values(rows, columns, features)
    labels: Labels | None = None
    class_names: tuple[str, ...] = ()
    if values[0] is not None and names:
        index, class_names, more = class_indices(names, classes)
        labels, notes = np.array([index[str(value)] for value in values], np.int64), (*notes, *more)
    elif values[0] is not None:
        labels = np.array(values, np.int64)
    return Opened(
        source=source,
        positions=np.arange(len(images)),
        contents=contents,
        identities=contents,
        labels=labels,
        class_names=class_names,
        notes=notes,
    )


def _content(value: Any, where: str) -> bytes:
    """The bytes of an image's file: in the row itself, or where the row says that they are."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    path = value.get("path") if isinstance(value, Mapping) else None
    if content is None and isinstance(path, str):
        import fsspec

        with fsspec.open(path, "rb") as file:
            content = file.read()
    if not isinstance(content, bytes):
        raise _wrong_type("image", value, where)
    return content


def _wrong_type(role: str, value: object, where: str) -> DataError:
    return DataError(
        f"the {role} column holds a {type(value).__name__}",
        where=where,
        remedy=f"name the column that holds the {role}: …,{role}=COLUMN",
    )


def _label_values(
    rows: Sequence[Mapping[str, Any]], columns: Columns, features: Mapping[str, Any]
) -> tuple[list[int | str | None], list[str], tuple[str, ...]]:
    """The label of each row, all class names where labels are names, and notes."""
    none: list[int | str | None] = [None] * len(rows)
    if columns.label is None or columns.score is not None:
        return none, [], ()
    values = [row[columns.label] for row in rows]
    if any(value is None or (isinstance(value, int) and value == _UNLABELLED) for value in values):
        return none, [], (f"the column {columns.label!r} has rows without a label: it is not used",)
    declared = getattr(features.get(columns.label), "names", None)
    whole = all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)
    if whole and isinstance(declared, list) and max(values) < len(declared):
        # Named classes go by their name: the model may number them otherwise.
        return [str(declared[value]) for value in values], [str(name) for name in declared], ()
    if whole:
        return list(values), [], ()
    if all(isinstance(value, str) and value for value in values):
        return list(values), sorted(set(values)), ()
    return none, [], (f"the column {columns.label!r} holds neither class indices nor names: it is not used",)
