"""The calibration cache: what was found about a model's tensors, as JSON that a person can read.

It is refused when it belongs to anything else, unlike TensorRT's, which is believed whatever it is of.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from ..graph.errors import DataError, OutputError
from ..graph.scheme import Scheme
from .ranges import Method

if TYPE_CHECKING:
    from .collect import Limits

SCHEMA_VERSION = 1


class CalibratedOn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The calibration data by name and digest."""

    name: str
    digest: str
    origin: Literal["real", "generated"]
    samples: int


class TensorRange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The range of one tensor that the integers cover."""

    min: float
    max: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min) and math.isfinite(self.max) and self.min <= self.max):
            raise ValueError(f"{self.min} to {self.max} is no range")


class ChannelRanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The least and the largest value of each channel (last axis) of one tensor."""

    min: tuple[float, ...]
    max: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.min) != len(self.max) or not all(map(math.isfinite, (*self.min, *self.max))):
            raise ValueError("min and max are no finite numbers, one of each per channel")


class CalibrationCache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a compile takes from calibration, and what it is of.

    Attributes:
        model: the name of the model; `model_sha256` is its fingerprint as it came in.
        data: what it was calibrated on.
        method: the range estimator that was asked for.
        activation: how the ranges are quantized (some estimators choose the range for it); None
            without ranges.
        versions: of the packages that made it.
        ranges: tensor -> the range that static quantization covers.
        channels: tensor -> the ranges of its channels, by which dynamic activations are centred.
    """

    format: Literal["edgepress-calibration"] = "edgepress-calibration"
    schema_version: int = SCHEMA_VERSION
    model: str
    model_sha256: str
    data: CalibratedOn
    method: Method
    activation: Scheme | None = None
    versions: dict[str, str] = {}
    ranges: dict[str, TensorRange] = {}
    channels: dict[str, ChannelRanges] = {}

    def range_pairs(self) -> dict[str, tuple[float, float]]:
        """Tensor -> (least, largest)."""
        return {name: (item.min, item.max) for name, item in self.ranges.items()}

    def channel_arrays(self) -> dict[str, tuple[Limits, Limits]]:
        """Tensor -> (least, largest), each float32 of shape (channels,)."""
        return {
            name: (np.array(item.min, np.float32), np.array(item.max, np.float32))
            for name, item in self.channels.items()
        }


def range_entries(ranges: Mapping[str, tuple[float, float]]) -> dict[str, TensorRange]:
    """Ranges as a cache holds them."""
    return {name: TensorRange(min=low, max=high) for name, (low, high) in ranges.items()}


def channel_entries(limits: Mapping[str, tuple[Limits, Limits]]) -> dict[str, ChannelRanges]:
    """Channel limits, each of shape (channels,), as a cache holds them."""
    return {
        name: ChannelRanges(min=tuple(low.tolist()), max=tuple(high.tolist()))
        for name, (low, high) in limits.items()
    }


def read_cache(path: Path) -> CalibrationCache | None:
    """The cache in a file; None if there is no such file.

    Raises:
        DataError: if it cannot be read, is no calibration cache, or of a newer schema version.
        OutputError: if it could not be written there either: its folder does not exist.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise OutputError(
                "the calibration cache has no folder to lie in",
                where=str(path),
                remedy="make the folder first, or choose another place with --calib-cache",
            )
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            "the calibration cache cannot be read", where=str(path), why=error.strerror
        ) from error
    _refuse_newer(content, path)
    try:
        return msgspec.json.decode(content, type=CalibrationCache)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(
            "the file is no calibration cache",
            where=str(path),
            why=str(error),
            remedy="name a file that --calib-cache wrote, or one that does not exist yet",
        ) from error


def _refuse_newer(content: bytes, path: Path) -> None:
    try:
        head = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return
    version = head.get("schema_version") if isinstance(head, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise DataError(
            f"the calibration cache has schema version {version}, this edgepress reads {SCHEMA_VERSION}",
            where=str(path),
            remedy="upgrade edgepress, or name another file",
        )


def write_cache(cache: CalibrationCache, path: Path) -> None:
    """Write a cache, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    encoded = msgspec.json.encode(cache, order="deterministic")
    write_whole(msgspec.json.format(encoded, indent=2) + b"\n", path)


def write_whole(content: bytes, path: Path) -> None:
    """Write what calibration found, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            "what calibration found cannot be written",
            where=str(path),
            why=error.strerror,
            remedy="free some space, or choose another place",
        ) from error


def require_current(
    cache: CalibrationCache,
    path: Path,
    *,
    model_sha256: str,
    data_digest: str | None,
    method: Method,
    versions: Mapping[str, str],
) -> str | None:
    """Refuse a cache that is of another model, other data or another method.

    Args:
        cache: what the file holds.
        path: for messages.
        model_sha256: the fingerprint of the model as it came in.
        data_digest: of the calibration data at hand; None where there is none to compare with.
        method: the range estimator that is asked for.
        versions: of the packages that calibrate here. With other ones a cache is refused only where
            there is data to calibrate anew.

    Returns:
        What is worth a note about a cache that is used all the same, or None.

    Raises:
        DataError: saying what is different.
    """
    if cache.model_sha256 != model_sha256:
        raise _stale(path, f"it is of another model ({cache.model}: another graph or other weights)")
    if data_digest is not None and cache.data.digest != data_digest:
        raise _stale(
            path,
            f"it was made of other data: {cache.data.samples} samples of {cache.data.name}",
            "or leave the data (--calib, --data-free) out to use it as it is",
        )
    if cache.method != method:
        raise _stale(
            path,
            f"it was made with --calib-method {cache.method}, not {method}",
            f"or ask for --calib-method {cache.method}",
        )
    if cache.versions == dict(versions):
        return None
    other = ", ".join(f"{name} {version}" for name, version in cache.versions.items())
    if data_digest is not None:
        raise _stale(path, f"it was made with {other or 'unknown versions'}", "or leave --calib out")
    return f"the calibration cache was made with {other or 'unknown versions'}"


def _stale(path: Path, why: str, instead: str = "") -> DataError:
    remedy = "delete the file to calibrate anew, name another one with --calib-cache"
    return DataError(
        "the calibration cache does not belong to this compile",
        where=str(path),
        why=why,
        remedy=f"{remedy}, {instead}" if instead else remedy,
    )


def missing_tensors(path: Path, names: list[str]) -> DataError:
    """The error of a cache that lacks tensors which are needed."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return _stale(path, f"it has nothing about {len(names)} tensors that are quantized now: {shown}")
