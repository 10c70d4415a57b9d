"""Golden arrays on disk: .npz whose bytes depend on nothing but names and values."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError
from ..graph.model import TensorSpec
from .samples import Array, Feeds

_EPOCH = (1980, 1, 1, 0, 0, 0)


def npz_bytes(arrays: Mapping[str, Array]) -> bytes:
    """Arrays as an uncompressed .npz whose bytes depend on nothing but names and values.

    Text is stored as fixed-width unicode; types that NumPy's format does not know (bfloat16) as
    unsigned integers of their width. `read_npz` restores both from the tensor specs.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            member = io.BytesIO()
            np.lib.format.write_array(member, _storable(np.asarray(array)), allow_pickle=False)
            archive.writestr(entry, member.getvalue())
    return buffer.getvalue()


def read_npz(path: Path, specs: Iterable[TensorSpec]) -> Feeds:
    """The arrays of a golden file, in the order and types of `specs`.

    Raises:
        DataError: if the file is damaged, or an array is missing, extra or of another type.
    """
    try:
        # Opened here: np.load leaves a file open that it finds damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            stored = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            "a golden file cannot be read",
            where=path.name,
            why=str(error),
            remedy="restore it from where the bundle came from, or compile the model again",
        ) from error
    specs = tuple(specs)
    if set(stored) != {spec.name for spec in specs}:
        raise DataError(
            "a golden file holds other arrays than the model has",
            where=path.name,
            why=f"file: {sorted(stored)}; model: {sorted(spec.name for spec in specs)}",
            remedy="restore it from where the bundle came from, or compile the model again",
        )
    return {spec.name: _restored(stored[spec.name], spec.dtype) for spec in specs}


def _storable(array: Array) -> Array:
    if array.dtype.kind == "O":
        return np.asarray(array, dtype=np.str_)
    if array.dtype.kind == "V":
        return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    return np.ascontiguousarray(array) if array.ndim else array


def _restored(array: npt.NDArray[np.generic], dtype: str) -> Array:
    if dtype == "string":
        return np.asarray(array, dtype=object)
    if array.dtype.name == dtype:
        return array
    import ml_dtypes

    extension = getattr(ml_dtypes, dtype, None)
    if extension is None or np.dtype(extension).itemsize != array.dtype.itemsize:
        raise DataError(
            "a golden array has another type than the model",
            why=f"file: {array.dtype.name}; model: {dtype}",
            remedy="restore it from where the bundle came from, or compile the model again",
        )
    return array.view(extension)
