"""Samples from the user's own generator, named as `module:function`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..frontends.imports import USER_FAILURES, import_module
from ..graph.errors import DataError
from ..graph.model import TensorSpec
from .arrays import check_labels
from .schema import Array, Feeds, check_layout, fit_array, match_names, near_names
from .source import Opened, content_key, draw, stack

# A generator is read once to its end before anything is drawn; one that never ends is stopped here.
MAX_SAMPLES = 200_000


class ProgramSource:
    """Items that a user's function yields; the function is called again for every pass.

    Raises while reading:
        DataError: if a pass yields other samples than the first one did.
    """

    sequential = True
    uniform = False
    padding = "none (arrays are fed as they are)"

    def __init__(self, name: str, inputs: Sequence[TensorSpec]) -> None:
        self.rounded = False
        self._name = name
        self._inputs = inputs
        self._keys: list[bytes] = []

    def read(self, positions: Sequence[int], batch_size: int) -> Iterator[Feeds]:
        """Feeds of `batch_size` samples at a time, `positions` ascending."""
        wanted = iter(positions)
        target = next(wanted, None)
        pending: list[Feeds] = []
        for number, (feeds, _) in enumerate(self.items()):
            if target is None:
                break
            if number != target:
                continue
            if content_key(feeds) != self._keys[number]:
                raise self._unstable(number)
            pending.append(feeds)
            if len(pending) == batch_size:
                yield stack(pending, self._name)
                pending = []
            target = next(wanted, None)
        if pending:
            yield stack(pending, self._name)
        if target is not None:
            raise self._unstable(int(target))

    def survey(self) -> list[Any]:
        """Read every sample once and remember what it was; returns the labels (None where absent)."""
        labels = []
        for feeds, label in self.items():
            self._keys.append(content_key(feeds))
            labels.append(label)
            if len(labels) > MAX_SAMPLES:
                raise DataError(
                    f"the generator yields more than {MAX_SAMPLES:,} samples",
                    where=self._name,
                    remedy="let it end after as many samples as are needed",
                )
        return labels

    def keys(self, positions: Iterable[int]) -> tuple[bytes, ...]:
        """SHA-256 of the samples at `positions`."""
        return tuple(self._keys[position] for position in positions)

    def items(self) -> Iterator[tuple[Feeds, Any]]:
        """Samples with batch axis 1, each with its label or None."""
        for number, item in enumerate(self._call()):
            where = f"{self._name}, item {number}"
            label = None
            if isinstance(item, tuple) and len(item) == 2:
                item, label = item  # noqa: PLW2901 - the pair is taken apart
            if not isinstance(item, Mapping):
                raise DataError(
                    f"the generator yields a {type(item).__name__}",
                    where=where,
                    remedy="yield a dict from input name to array, or (dict, label)",
                )
            yield from self._samples(item, label, where)

    def _call(self) -> Iterator[object]:
        with _failures(self._name):
            iterator = iter(_find(self._name)())
        while True:
            with _failures(self._name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _samples(self, item: Mapping[Any, Any], label: Any, where: str) -> Iterator[tuple[Feeds, Any]]:
        arrays = {str(name): _as_array(values, where) for name, values in item.items()}
        names = match_names({name: values.ndim for name, values in arrays.items()}, self._inputs, where)
        batch: Feeds = {}
        for spec in self._inputs:
            values = arrays[names[spec.name]]
            if spec.shape is not None and values.ndim == len(spec.shape) - 1:
                values = values[None]
            check_layout(values.shape, values.dtype, spec, where)
            batch[spec.name], rounded = fit_array(values, spec, where)
            self.rounded |= rounded
        counts = {len(values) for values in batch.values() if values.ndim}
        if len(counts) > 1:
            raise DataError("the item's arrays hold different numbers of samples", where=where)
        count = counts.pop() if counts else 1
        labels = [None] * count if label is None else _as_array(label, where).reshape(-1).tolist()
        if len(labels) != count:
            raise DataError(f"{len(labels)} labels for {count} samples", where=where)
        for row in range(count):
            yield {name: v[row : row + 1] if v.ndim else v for name, v in batch.items()}, labels[row]

    def _unstable(self, number: int) -> DataError:
        return DataError(
            "the generator yields other samples on its second pass",
            where=f"{self._name}, sample {number}",
            why="data is read more than once: for calibration, and to compare both models",
            remedy="make the function start anew on each call, with a fixed random seed",
        )


def open_program(source: str, inputs: Sequence[TensorSpec], samples: int | None, seed: int) -> Opened:
    """Open a generator function; it is run once to its end to count and check its samples.

    Raises:
        DataError: if it cannot be imported, fails, does not end, or yields what does not fit.
    """
    program = ProgramSource(source, inputs)
    labels = program.survey()
    positions = draw(len(labels), samples, seed, sequential=True)
    labelled = [label is not None for label in labels]
    if any(labelled) and not all(labelled):
        raise DataError("some samples have a label and some do not", where=source, remedy="label all or none")
    contents = program.keys(positions.tolist())
    known = check_labels(np.array(labels), len(labels), source) if all(labelled) else None
    return Opened(
        source=program,
        positions=positions,
        contents=contents,
        identities=contents,
        labels=None if known is None else known[positions],
        notes=("floats were rounded to the input's narrower type",) if program.rounded else (),
    )


def _as_array(values: object, where: str) -> Array:
    try:
        array: Array = np.asarray(values)
    except ValueError as error:
        raise DataError("the item is no array", where=where, why=str(error)) from error
    if array.dtype.hasobject:
        raise DataError(
            f"the item holds a {type(values).__name__}, which is no array of numbers",
            where=where,
            remedy="yield NumPy arrays",
        )
    return array


def _find(source: str) -> Any:
    module_name, function_name = source.split(":")
    module = import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        hint = near_names(function_name, dir(module))
        raise DataError(
            f"module {module_name!r} has no function {function_name!r}{hint}",
            where=source,
            remedy="pass --calib module:function, where function() yields samples",
        )
    return function


@contextmanager
def _failures(source: str) -> Iterator[None]:
    try:
        yield
    except USER_FAILURES as error:
        raise DataError(
            "the data generator fails",
            where=source,
            why=f"{type(error).__name__}: {error}",
            remedy="run the function on its own and repair it",
        ) from error
