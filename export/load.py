"""`load`: a bundle as a Python callable, set up the way it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..compress.typed.twin import open_session
from ..frontends.text import TextEncoder
from ..graph.errors import DataError, ModelError, VerifyFailed
from ..graph.model import TensorSpec
from ..runtimes.base import Runner
from ..runtimes.feeds import check_feeds
from .checksums import check_sums
from .manifest import Manifest
from .verify import read_manifest

Array = npt.NDArray[Any]


class LoadedModel:
    """A bundle in memory: call it with one keyword per input, get a dict of outputs.

    Use it as a context manager, or call `close`, to give the memory back at once.
    """

    def __init__(self, path: Path, manifest: Manifest, session: Runner) -> None:
        self.path = path
        self.manifest = manifest
        self._session: Runner | None = session
        self._encoder: TextEncoder | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a call takes."""
        return self.manifest.model.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a call returns."""
        return self.manifest.model.outputs

    def __call__(self, **inputs: npt.ArrayLike) -> dict[str, Array]:
        """Run the model on one batch.

        Numbers written in Python take the input's type; arrays are cast where no value changes.
        Names that are no Python identifiers go in as `model(**{"input.1": x})`.

        Returns:
            output name → array, in the model's order.

        Raises:
            DataError: if an input is missing, unknown, of a type that would lose information, or
                of a shape that the model does not take.
            ModelError: if the model has been closed.
        """
        if self._session is None:
            raise ModelError("the model has been closed", where=str(self.path), remedy="load it again")
        specs = {spec.name: spec for spec in self.inputs}
        feeds = {
            name: _fitted(value, specs[name]) if name in specs else np.asarray(value)
            for name, value in inputs.items()
        }
        _require_one_size_per_axis(self.inputs, check_feeds(self.inputs, feeds))
        return self._session.run(feeds)

    def encode(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> dict[str, Array]:
        """Turn sentences into the model's inputs: `model(**model.encode(["a sentence"]))`.

        Args:
            texts: the sentences.
            text_pairs: the second sentence of each pair, where the model takes pairs.

        Returns:
            input name → int64 array of shape [len(texts), length].

        Raises:
            DataError: if the texts are no strings, or the model has inputs that no tokenizer makes.
            ModelError: if the bundle carries no tokenizer.
            RuntimeUnavailable: if the `tokenizers` package is not installed.
        """
        if self._encoder is None:
            if "tokenizer.json" not in self.manifest.assets:
                raise ModelError(
                    "the bundle carries no tokenizer",
                    where=str(self.path),
                    remedy="pass arrays, or compile with --tokenizer PATH",
                )
            self._encoder = TextEncoder.load(self.path / "assets")
        names = [spec.name for spec in self.inputs]
        return dict(self._encoder.encode(texts, text_pairs, names=names))

    def close(self) -> None:
        """Release the runtime's session; further calls are errors."""
        self._session = None

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load(path: str | Path, *, threads: int | None = None, verify_sums: bool = False) -> LoadedModel:
    """Load a bundle with its own session options.

    Args:
        path: the bundle's folder.
        threads: threads of the session; None takes what the bundle was measured with, or 1.
        verify_sums: recompute every file's digest first.

    Raises:
        ModelError: if the folder is not a bundle or the runtime refuses its model.
        VerifyFailed: if `verify_sums` finds a file that has changed.
        NotSupported: if the bundle is of a newer schema version.
        RuntimeUnavailable: if onnxruntime cannot be used here.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if verify_sums and (problems := check_sums(folder)):
        raise VerifyFailed(
            "the bundle is not what it says it is",
            where=str(folder),
            why="; ".join(problems),
            remedy="copy it again from where it came from, or compile the model again",
        )
    recorded = manifest.golden.threads if manifest.golden is not None else 1
    options = manifest.session_options.options(threads=recorded if threads is None else threads)
    precision = manifest.precision
    session = open_session(folder / "model.onnx", options, precision.form, precision.io_dtype)
    return LoadedModel(folder, manifest, session)


def _fitted(value: npt.ArrayLike, spec: TensorSpec) -> Array:
    """The value as an array of the input's type.

    Raises:
        DataError: if it is ragged, or a value would change.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(
            f"the value for input {spec.name!r} is not a regular array",
            why=str(error),
            remedy="pad its rows to one length",
        ) from error
    if spec.dtype == "string":
        return _text(array, spec)
    try:
        wanted = np.dtype(spec.dtype)
    except TypeError:
        return array  # a type that NumPy lacks: the runtime judges
    if array.dtype == wanted:
        return array
    is_literal = not hasattr(value, "dtype")
    if array.dtype.kind not in "biuf":
        raise _lossy(array, spec, f"{array.dtype} is no number")
    if is_literal and wanted.kind == "f":
        return array.astype(wanted)
    if np.can_cast(array.dtype, wanted, "safe"):
        return array.astype(wanted)
    with np.errstate(invalid="ignore", over="ignore"):
        cast = array.astype(wanted)
        if np.array_equal(cast.astype(array.dtype), array, equal_nan=array.dtype.kind == "f"):
            return cast
    raise _lossy(array, spec, "the cast would change values")


def _text(array: Array, spec: TensorSpec) -> Array:
    if array.dtype.kind in "UO" and all(isinstance(item, str) for item in array.ravel()):
        return array.astype(object)
    raise _lossy(array, spec, "it takes text")


def _lossy(array: Array, spec: TensorSpec, why: str) -> DataError:
    return DataError(
        f"input {spec.name!r} takes {spec.dtype}, not {array.dtype}",
        why=why,
        remedy=f"convert it yourself if that is what you mean: {spec.name}.astype({spec.dtype!r})",
    )


def _require_one_size_per_axis(specs: tuple[TensorSpec, ...], feeds: dict[str, Array]) -> None:
    """Check that axes of one name have one size in all inputs, which a runtime reports cryptically.

    Raises:
        DataError: naming both inputs and the axis.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        for size, axis in zip(feeds[spec.name].shape, spec.shape or (), strict=False):
            if not isinstance(axis, str):
                continue
            first = sizes.setdefault(axis, (size, spec.name))
            if first[0] != size:
                raise DataError(
                    f"inputs disagree about axis {axis!r}",
                    where=spec.name,
                    why=f"{first[1]!r} has {first[0]}, {spec.name!r} has {size}",
                    remedy="pass arrays of one batch and length",
                )
