"""Timings of single operators that are kept between compiles: one JSON file per processor and runtime."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from .device import DeviceFeatures
from .timing import Comparison, comparison_of

if sys.platform != "win32":
    import fcntl

SCHEMA_VERSION = 1
_LIMIT_BYTES = 1 << 24
_LIMIT_ENTRIES = 4096
_FOLDER = "timings"


class TimingKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one timing is about; processor and runtime are the file's.

    Attributes:
        operator: the ONNX operator.
        form: "dynamic", "static-uint8", "static-uint8 with conversions"…; never "float", which every
            form is timed against.
        shapes: of the inputs and weights, in the operator's order.
        attributes: what else decides the work, as text ("strides=2,2").
        dtype: of the float form.
        threads: inside the operator.
    """

    operator: str
    form: str
    shapes: tuple[tuple[int, ...], ...]
    attributes: str = ""
    dtype: str = "float32"
    threads: int = 1


class OperatorTiming(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One form of one operator, timed interleaved with its float form.

    Attributes:
        p50_ms, float_p50_ms: median latencies of the form and of float.
        pair_ratios: float / form, the medians of each pair of fresh sessions.
        date: of the day it was timed (UTC), such as "2026-11-22"; empty in timings of earlier versions.
    """

    key: TimingKey
    p50_ms: float
    float_p50_ms: float
    pair_ratios: tuple[float, ...]
    date: str = ""

    def __post_init__(self) -> None:
        numbers = (self.p50_ms, self.float_p50_ms, *self.pair_ratios)
        if not self.pair_ratios or not all(0 < number < 1e9 for number in numbers):
            raise ValueError("a timing needs pairs, and figures above zero")

    @property
    def comparison(self) -> Comparison:
        """The form against float."""
        return ratio_of(self.pair_ratios, "float", self.key.form)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema_version: int
    device: DeviceFeatures
    timings: tuple[OperatorTiming, ...]


def ratio_of(pair_ratios: Iterable[float], baseline: str, candidate: str) -> Comparison:
    """Ratios pair by pair as a comparison."""
    return comparison_of(baseline, candidate, pair_ratios)


class TimingCache:
    """The timings of one device, in a file below `folder`.

    A file that cannot be read, is damaged or has another version counts as empty and is replaced: all
    in it can be measured again. Writing takes a lock, reads what another process has added meanwhile,
    and swaps the new file in whole.
    """

    def __init__(self, folder: Path, device: DeviceFeatures) -> None:
        self.device = device
        digest = hashlib.sha256(msgspec.json.encode(device, order="sorted")).hexdigest()[:12]
        core = re.sub(r"[^a-z0-9]+", "-", device.core.lower()).strip("-")[:40]
        name = f"{device.runtime}-{device.runtime_version}-{core}-{digest}.json"
        self.path = folder / _FOLDER / name
        self._known = {timing.key: timing for timing in self._read()}

    def get(self, key: TimingKey) -> OperatorTiming | None:
        """The timing of a key, or None if it was never made."""
        return self._known.get(key)

    def timings(self) -> tuple[OperatorTiming, ...]:
        """All timings, the oldest first."""
        return tuple(self._known.values())

    def add(self, timings: Iterable[OperatorTiming]) -> bool:
        """Keep timings, in memory and in the file; False if the file cannot be written."""
        new = {timing.key: timing for timing in timings}
        self._known = {key: timing for key, timing in self._known.items() if key not in new} | new
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_name(f"{self.path.name}.lock")):
                there = {timing.key: timing for timing in self._read() if timing.key not in new}
                self._write(tuple((there | new).values())[-_LIMIT_ENTRIES:])
        except OSError:
            return False
        return True

    def _read(self) -> tuple[OperatorTiming, ...]:
        try:
            if self.path.stat().st_size > _LIMIT_BYTES:
                return ()
            stored = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return ()
        if stored.schema_version != SCHEMA_VERSION or stored.device != self.device:
            return ()
        return stored.timings

    def _write(self, timings: tuple[OperatorTiming, ...]) -> None:
        document = _File(schema_version=SCHEMA_VERSION, device=self.device, timings=timings)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            part.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1))
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)


def clear_timings(folder: Path) -> list[Path]:
    """Remove every file of timings below a cache folder; returns those removed.

    Raises:
        OSError: if one cannot be removed.
    """
    removed = []
    for path in sorted((folder / _FOLDER).glob("*.json")):
        path.unlink(missing_ok=True)
        removed.append(path)
    return removed


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes, where the system has one; elsewhere the last writer wins."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
