"""Weights in memory-mapped files: one map per data file, confined to the model's folder."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from .errors import ModelError

_COPY_CHUNK_BYTES = 1 << 22


class SharedMap:
    """A read-only map of one whole file, shared by all tensors stored in it.

    The descriptor is closed at once (the map keeps the file alive), so that a model of thousands
    of tensors needs no open file per tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._map)

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview:
        """A read-only window on the mapped bytes."""
        return memoryview(self._map)[offset_bytes : offset_bytes + length_bytes]

    def give_back(self) -> None:
        """Tell the system that the pages read so far are not needed any more."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


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

    def __dlpack__(self, *, stream: object = None) -> object:
        return self.__array__(self.dtype.numpy()).__dlpack__()  # type: ignore[misc]

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


def confine(folder: Path, location: str, *, tensor: str) -> Path:
    """The file of an external tensor, proved to lie inside `folder`.

    `folder` is resolved first: hub caches keep a model as links to blobs, so both the folder
    that is named and the one that the model file's link leads to are given by the caller.

    Raises:
        ModelError: if the location is absolute, climbs out of the folder, or is no regular file.
    """
    where = f"tensor {tensor!r}, location {location!r}"
    if not location or "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(
            "external data points outside the model's folder",
            where=where,
            why="a model file may only name files beside it",
            remedy="re-export the model with its data file beside it; do not trust this file otherwise",
        )
    path = folder / location
    if not path.is_file():
        raise ModelError(
            "external data file is missing",
            where=where,
            why=f"{path.name} is not beside the model file",
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
