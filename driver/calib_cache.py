"""`--calib-cache FILE` in one compile: read and held against what is compiled, or filled and written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.cache_file import (
    CalibratedOn,
    CalibrationCache,
    channel_entries,
    missing_tensors,
    range_entries,
    read_cache,
    require_current,
    write_cache,
)
from ..export.manifest import package_versions
from ..graph.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..calibration.collect import Limits
    from ..calibration.data import CalibrationData
    from ..compress.recipe import CalibMethod
    from ..graph.model import Model
    from ..graph.scheme import Scheme

# What decides which ranges are found; the other packages only load and store.
_VERSIONED = ("edgepress", "numpy", "onnxruntime")


class CalibCache:
    """The cache file of one compile: `known` if it was there, else it is filled and written at the end.

    Args:
        path: the file.

    Raises:
        DataError: if the file is there and no calibration cache.
        OutputError: if it is not there, and its folder is not either.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = read_cache(path)
        self._activation: Scheme | None = None
        self._ranges: Mapping[str, tuple[float, float]] = {}
        self._channels: Mapping[str, tuple[Limits, Limits]] = {}

    def check(self, model: Model, data: CalibrationData | None, method: CalibMethod) -> str | None:
        """Hold a known cache against the model and the data; returns what is worth a note.

        Raises:
            DataError: if it is of something else, or there is neither a cache nor data to make it from.
        """
        if self.known is None:
            if data is None:
                raise self.absent()
            return None
        return require_current(
            self.known,
            self.path,
            model_sha256=model.fingerprint(),
            data_digest=None if data is None else data.digest,
            method=method,
            versions=_versions(),
        )

    def absent(self) -> DataError:
        """The error of a file that is not there, and cannot be made for want of data."""
        return DataError(
            "there is neither a calibration cache nor data to make one from",
            where=str(self.path),
            remedy="check the path given to --calib-cache, or add --calib DATA",
        )

    def ranges(self, names: Sequence[str], activation: Scheme) -> dict[str, tuple[float, float]] | None:
        """The known ranges of tensors, None if they have to be found.

        Raises:
            DataError: if the cache lacks one, or its ranges were chosen for other integers.
        """
        if self.known is None:
            return None
        known = self.known.range_pairs()
        missing = [name for name in names if name not in known]
        if missing or self.known.activation != activation:
            raise missing_tensors(self.path, missing or list(names))
        return {name: known[name] for name in names}

    def channels(self, model: Model, names: Sequence[str]) -> dict[str, tuple[Limits, Limits]] | None:
        """The known limits of the channels of LayerNormalization outputs, None if they have to be found.

        Raises:
            DataError: if the cache lacks one, or has another number of channels.
        """
        if self.known is None:
            return None
        known = self.known.channel_arrays()
        widths = {node.outputs[0].name: node.inputs[1] for node in model.graph if len(node.inputs) > 1}
        wrong = []
        for name in names:
            scale = widths.get(name)
            width = None if scale is None or scale.const_value is None else scale.const_value.size
            if name not in known or width not in (None, len(known[name][0])):
                wrong.append(name)
        if wrong:
            raise missing_tensors(self.path, wrong)
        return {name: known[name] for name in names}

    def keep_ranges(self, ranges: Mapping[str, tuple[float, float]], activation: Scheme) -> None:
        """Remember ranges that were found."""
        self._ranges, self._activation = ranges, activation

    def keep_channels(self, limits: Mapping[str, tuple[Limits, Limits]]) -> None:
        """Remember channel limits that were found."""
        self._channels = limits

    def write(self, model: Model, data: CalibrationData, method: CalibMethod) -> str | None:
        """Write what was found to a file that was not there; returns what is worth a note.

        Raises:
            OutputError: if it cannot be written.
        """
        if self.known is not None:
            return None
        if not self._ranges and not self._channels:
            return "nothing had to be calibrated: no calibration cache was written"
        cache = CalibrationCache(
            model=model.origin.name,
            model_sha256=model.fingerprint(),
            data=CalibratedOn(name=data.name, digest=data.digest, origin=data.origin, samples=len(data)),
            method=method,
            activation=self._activation,
            versions=_versions(),
            ranges=range_entries(self._ranges),
            channels=channel_entries(self._channels),
        )
        write_cache(cache, self.path)
        return f"the calibration was written to {self.path.name}"


def _versions() -> dict[str, str]:
    return {name: version for name, version in package_versions().items() if name in _VERSIONED}
