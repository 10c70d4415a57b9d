"""Weights in memory-mapped files: one map per data file, confined to the model's folder."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from .errors import ModelError

_COPY_CHUNK_BYTES = 1 << 22


class SharedMap:
    """A read-only map of one whole file, shared by all tensors stored in it.

    Python keeps one descriptor per map. Of a model with very many data files (old exporters write
    one per tensor) none is kept open: each is mapped again while it is read, and must still be
    the file that it was.
    """

    def __init__(self, path: Path, *, keep_open: bool = True) -> None:
        self.path = path
        self._identity = _identity(path.stat())
        self._kept: mmap.mmap | None = None
        if keep_open:
            self._kept = self._open()

    def _open(self) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                if _identity(os.fstat(file.fileno())) == self._identity:
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            why = "it was replaced or written to after the model was loaded"
        except OSError as error:
            why = error.strerror or str(error)
        raise ModelError(
            "a data file changed while it was in use",
            where=self.path.name,
            why=why,
            remedy="start again, and leave the model's files alone meanwhile",
        )

    def __len__(self) -> int:
        return self._identity[0]

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview:
        """A read-only window on the mapped bytes."""
        mapped = self._kept if self._kept is not None else self._open()
        return memoryview(mapped)[offset_bytes : offset_bytes + length_bytes]

    def give_back(self) -> None:
        """Tell the system that the pages read so far are not needed any more."""
        if self._kept is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._kept.madvise(mmap.MADV_DONTNEED)


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns


class MappedTensor(ir.TensorProtocol):
    """A tensor whose bytes lie in a `SharedMap`; nothing is read before it is asked for."""

    def __init__(
        self, name: str | None, dtype: ir.DataType, shape: ir.Shape, source: SharedMap, offset_bytes: int
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.doc_string: str | None = None
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, object] = {}
        self._source = source
        self._offset_bytes = offset_bytes

    @property
    def raw(self) -> memoryview:
        """The mapped bytes."""
        return self._source.view(self._offset_bytes, self.nbytes)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape.numpy(), dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes in the file; types below 8 bits are packed."""
        return -(-self.size * self.dtype.bitwidth // 8)

    def numpy(self) -> npt.NDArray[np.generic]:
        """A read-only array of the tensor's shape: a view of the map for types of whole bytes."""
        if self.dtype.bitwidth < 8:
            return ir.serde.TensorProtoTensor(self._proto()).numpy()
        dtype = self.dtype.numpy().newbyteorder("<")
        flat: npt.NDArray[np.generic] = np.frombuffer(self.raw, dtype=dtype)
        return flat.reshape(self.shape.numpy())

    def __array__(self, dtype: object = None, copy: bool | None = None) -> npt.NDArray[np.generic]:
        array = self.numpy()
        if dtype is None or array.dtype == np.dtype(dtype):  # type: ignore[call-overload]
            return array.copy() if copy else array
        return array.astype(dtype)  # type: ignore[call-overload, no-any-return]

    def __dlpack__(self, **options: Any) -> object:
        return np.array(self.numpy()).__dlpack__(**options)  # a copy: the map is read-only

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU

    def tobytes(self) -> bytes:
        """A copy of the bytes, little endian; the pages are given back."""
        data = bytes(self.raw)
        self._source.give_back()
        return data

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes to an open file piece by piece, giving the pages back."""
        raw = self.raw
        for start in range(0, len(raw), _COPY_CHUNK_BYTES):
            file.write(raw[start : start + _COPY_CHUNK_BYTES])
            self._source.give_back()

    def release(self) -> None:
        """Give the pages back after use; the next access reads them again."""
        self._source.give_back()

    def _proto(self) -> onnx.TensorProto:
        proto = onnx.TensorProto(data_type=int(self.dtype), raw_data=self.tobytes())
        proto.dims.extend(self.shape.numpy())
        return proto

    def __repr__(self) -> str:
        return f"MappedTensor({self.name!r}, {self.dtype.name}, {list(self.shape.numpy())})"


def is_file(path: Path) -> bool:
    """Whether a regular file (or a link to one) is there; a name too long for the system is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def confine(folder: Path, location: str, *, tensor: str) -> Path:
    """The file of an external tensor, whose name does not lead out of `folder` (see `require_inside`).

    Raises:
        ModelError: if the location is absolute, climbs out of the folder, or is no regular file.
    """
    where = f"tensor {tensor!r}, location {location[:200]!r}"
    if not location or "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(
            "external data points outside the model's folder",
            where=where,
            why="a model file may only name files beside it",
            remedy="re-export the model with its data file beside it; do not trust this file otherwise",
        )
    path = folder / location
    if not is_file(path):
        raise ModelError(
            "external data file is missing",
            where=where,
            why=f"{path.name[:80]} is not beside the model file",
            remedy="copy the data file (often model.onnx.data) next to the .onnx file",
        )
    return path


def require_inside(path: Path, roots: tuple[Path, ...], *, tensor: str) -> Path:
    """Resolve `path` and prove that it stays below one of `roots` (both links followed).

    Raises:
        ModelError: if a link leads out of every root.
    """
    resolved = path.resolve()
    if not any(resolved.is_relative_to(root) for root in roots):
        raise ModelError(
            "external data points outside the model's folder",
            where=f"tensor {tensor!r}, file {path.name}",
            why="the file is a link that leads out of the folder",
            remedy="copy the data file itself next to the .onnx file",
        )
    return resolved
