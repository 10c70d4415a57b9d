"""Arrays in .npy and .npz files, read row by row: memory stays at one row however long the file is."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredArray:
    """One array of a file, shape (rows, …); rows are read by position, never mapped."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: IO[bytes]
    offset_bytes: int
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
        # An unmapped read: mapped pages would count as this process's memory and grow with the samples.
        data = bytearray()
        while len(data) < size_bytes:
            part = os.pread(self.file.fileno(), size_bytes - len(data), offset_bytes + len(data))
            if not part:
                raise DataError("the array ends early", where=Path(str(self.file.name)).name)
            data += part
        return np.frombuffer(data, self.dtype)


def open_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of a .npy (under its stem) or .npz file, headers checked, values not read yet.

    Raises:
        DataError: if the file is missing, not readable, truncated, not of its format, or holds
            pickled Python objects, which are never loaded.
    """
    try:
        if path.suffix.lower() == ".npy":
            file = path.open("rb", buffering=0)
            return {path.stem: _parse(file, 0, os.fstat(file.fileno()).st_size, path.name)}
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
                file, start = _member_file(archive, member, path)
                arrays[member.filename.removesuffix(".npy")] = _parse(file, start, member.file_size, where)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataError(
            "not a readable .npz file",
            where=path.name,
            why=str(error),
            remedy="write it again with np.savez (no password, not truncated)",
        ) from error
    return arrays


def _member_file(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> tuple[IO[bytes], int]:
    """An open file that holds the member's bytes uncompressed, and where they start."""
    encrypted = member.flag_bits & 1
    if member.compress_type == zipfile.ZIP_STORED and not encrypted:
        file = path.open("rb", buffering=0)
        header = os.pread(file.fileno(), 30, member.header_offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("member header is damaged")
        # Local header: 30 fixed bytes, then name and extra field, whose lengths stand at 26 and 28.
        name_bytes, extra_bytes = np.frombuffer(header, "<u2", 2, 26)
        return file, member.header_offset + 30 + int(name_bytes) + int(extra_bytes)
    unpacked: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the array
    with archive.open(member) as packed:
        while part := packed.read(_COPY_BYTES):
            unpacked.write(part)
    return unpacked, 0


def _parse(file: IO[bytes], start: int, size_bytes: int, where: str) -> StoredArray:
    """Read the .npy header that begins at `start` of `file`."""
    file.seek(start)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
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
    offset = file.tell()
    if any(dim < 0 for dim in shape) or offset - start + math.prod(shape) * dtype.itemsize > size_bytes:
        raise DataError(
            "the array is truncated",
            where=where,
            why=f"its header promises {dtype.name} {shape}, the file holds {size_bytes} bytes",
            remedy="copy or write the file again",
        )
    return StoredArray(
        shape=tuple(shape), dtype=dtype, file=file, offset_bytes=offset, fortran_order=bool(fortran_order)
    )
