"""Arrays in .npy and .npz files, read row by row: memory stays at one row however long the file is."""

from __future__ import annotations

import dataclasses
import io
import math
import tempfile
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..graph.errors import DataError
from .schema import Array

# Compressed members up to this size are kept in memory, larger ones go to an unnamed file.
IN_MEMORY_BYTES = 16 * 2**20
_COPY_BYTES = 2**20
_HEADER_BYTES = 2**16

# A file that is opened for each read, an unnamed open file, or the bytes themselves.
Content = Path | IO[bytes] | bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredArray:
    """One array of a file, shape (rows, …); rows are read by position, never mapped."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    content: Content
    offset_bytes: int
    name: str
    fortran_order: bool = False

    def row(self, index: int) -> Array:
        """Row `index`, shape `shape[1:]`, in native byte order."""
        if self.fortran_order:
            values = np.array(self.whole()[index])
        else:
            count = math.prod(self.shape[1:])
            size = count * self.dtype.itemsize
            values = self._read(self.offset_bytes + index * size, size).reshape(self.shape[1:])
        return values.astype(self.dtype.newbyteorder("="), copy=False)

    def whole(self) -> Array:
        """The whole array in native byte order, whatever its size."""
        values = self._read(self.offset_bytes, math.prod(self.shape) * self.dtype.itemsize)
        shaped = values.reshape(self.shape, order="F" if self.fortran_order else "C")
        return shaped.astype(self.dtype.newbyteorder("="), copy=False)

    def _read(self, offset_bytes: int, size_bytes: int) -> Array:
        data = read_at(self.content, offset_bytes, size_bytes)
        if len(data) < size_bytes:
            raise DataError("the array ends early", where=self.name, remedy="copy or write the file again")
        return np.frombuffer(data, self.dtype)


def read_at(content: Content, offset_bytes: int, size_bytes: int) -> bytes:
    """Up to `size_bytes` bytes from `offset_bytes` of a file (opened for this read), open file or bytes."""
    if isinstance(content, bytes):
        return content[offset_bytes : offset_bytes + size_bytes]
    # Unmapped reads: mapped pages would count as this process's memory and grow with the samples.
    if isinstance(content, Path):
        with content.open("rb", buffering=0) as file:
            return _read_fully(file, offset_bytes, size_bytes)
    return _read_fully(content, offset_bytes, size_bytes)


def _read_fully(file: IO[bytes], offset_bytes: int, size_bytes: int) -> bytes:
    file.seek(offset_bytes)
    parts = []
    while size_bytes > 0 and (part := file.read(size_bytes)):
        parts.append(part)
        size_bytes -= len(part)
    return b"".join(parts)


def open_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of a .npy (under its stem) or .npz file, headers checked, values not read yet.

    Raises:
        DataError: if the file is missing, not readable, truncated, not of its format, or holds
            pickled Python objects, which are never loaded.
    """
    try:
        if path.suffix.lower() == ".npy":
            return {path.stem: _parse(path, 0, path.stat().st_size, path.name)}
        return _open_npz(path)
    except FileNotFoundError as error:
        raise DataError("data file does not exist", where=path.name, remedy="check the path") from error
    except OSError as error:
        raise DataError(
            "data file cannot be read", where=path.name, why=error.strerror or str(error)
        ) from error


def _open_npz(path: Path) -> dict[str, StoredArray]:
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    continue
                where = f"{path.name}: {member.filename}"
                content, start = _member_content(archive, member, path)
                arrays[member.filename.removesuffix(".npy")] = _parse(content, start, member.file_size, where)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataError(
            "not a readable .npz file",
            where=path.name,
            why=str(error),
            remedy="write it again with np.savez (no password, not truncated)",
        ) from error
    return arrays


def _member_content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> tuple[Content, int]:
    """Where the member's bytes lie uncompressed, and at which offset."""
    encrypted = member.flag_bits & 1
    if member.compress_type == zipfile.ZIP_STORED and not encrypted:
        header = read_at(path, member.header_offset, 30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("member header is damaged")
        # Local header: 30 fixed bytes, then name and extra field, whose lengths stand at 26 and 28.
        name_bytes, extra_bytes = np.frombuffer(header, "<u2", 2, 26)
        return path, member.header_offset + 30 + int(name_bytes) + int(extra_bytes)
    if member.file_size <= IN_MEMORY_BYTES:
        return archive.read(member), 0
    unpacked: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the array
    with archive.open(member) as packed:
        while part := packed.read(_COPY_BYTES):
            unpacked.write(part)
    return unpacked, 0


def _parse(content: Content, start: int, size_bytes: int, where: str) -> StoredArray:
    """Read the .npy header that begins at `start` of `content`."""
    header = io.BytesIO(read_at(content, start, min(size_bytes, _HEADER_BYTES)))
    try:
        version = np.lib.format.read_magic(header)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(header)
        else:
            raise ValueError(f"version {version} of the .npy format is not read")
    except ValueError as error:
        raise DataError(
            "not a readable .npy array", where=where, why=str(error), remedy="write it again with np.save"
        ) from error
    if dtype.hasobject:
        raise DataError(
            "the array holds pickled Python objects, which could run code when loaded",
            where=where,
            remedy="save plain numeric arrays: ragged samples go one per file into a folder",
        )
    if dtype.names is not None:
        raise DataError("structured arrays are not read", where=where, remedy="save one array per input")
    header_bytes = header.tell()
    if any(dim < 0 for dim in shape) or header_bytes + math.prod(shape) * dtype.itemsize > size_bytes:
        raise DataError(
            "the array is truncated",
            where=where,
            why=f"its header promises {dtype.name} {shape}, the file holds {size_bytes} bytes",
            remedy="copy or write the file again",
        )
    array = StoredArray(
        shape=tuple(shape),
        dtype=dtype,
        content=content,
        offset_bytes=start + header_bytes,
        name=where,
        fortran_order=bool(fortran_order),
    )
    if not isinstance(content, (bytes, Path)):
        weakref.finalize(array, content.close)
    return array
