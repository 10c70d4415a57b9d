"""Calibration statistics of one shard of the data as JSON: made on many machines, merged exactly on one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from ..graph.errors import DataError
from .cache_file import CalibratedOn, write_whole
from .histogram import Histogram, HistogramState
from .ranges import DEFAULT_PERCENTILE, Method, RangeObserver

if TYPE_CHECKING:
    from .data import CalibrationData

SCHEMA_VERSION = 1


class CalibrationStatistics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was seen of a model's tensors: counts, from which every method's ranges follow.

    Attributes:
        model_sha256: the fingerprint of the graph whose tensors these are.
        shards: the data that was looked at, ordered by digest; each counts once.
        tensors: name -> histogram, ordered by name.
    """

    format: Literal["edgepress-statistics"] = "edgepress-statistics"
    schema_version: int = SCHEMA_VERSION
    model_sha256: str
    shards: tuple[CalibratedOn, ...]
    tensors: dict[str, HistogramState]

    def observers(
        self, *, method: Method = "auto", percentile: float = DEFAULT_PERCENTILE
    ) -> dict[str, RangeObserver]:
        """Observers that have seen all shards, as `collect_ranges` on all of the data gives them.

        Raises:
            DataError: if a histogram contradicts itself.
        """
        return {
            name: RangeObserver(
                name, method=method, percentile=percentile, histogram=Histogram.from_state(state)
            )
            for name, state in self.tensors.items()
        }


def statistics_of(
    observers: Mapping[str, RangeObserver], data: CalibrationData, model_sha256: str
) -> CalibrationStatistics:
    """What `collect_ranges` found on one shard.

    Args:
        observers: tensor -> its observer.
        data: the shard.
        model_sha256: the fingerprint of the graph that was run.
    """
    shard = CalibratedOn(name=data.name, digest=data.digest, origin=data.origin, samples=len(data))
    return CalibrationStatistics(
        model_sha256=model_sha256,
        shards=(shard,),
        tensors={name: observers[name].histogram.state() for name in sorted(observers)},
    )


def merge_statistics(one: CalibrationStatistics, other: CalibrationStatistics) -> CalibrationStatistics:
    """The statistics of both sets of shards: exact, associative and commutative, bit for bit.

    Raises:
        DataError: if they are of different graphs or tensors, share a shard, or are damaged.
    """
    if one.model_sha256 != other.model_sha256:
        raise _apart("they are of different graphs")
    if one.tensors.keys() != other.tensors.keys():
        raise _apart(f"they differ in {len(one.tensors.keys() ^ other.tensors.keys())} tensors")
    shared = {shard.digest for shard in one.shards} & {shard.digest for shard in other.shards}
    if shared:
        name = next(shard.name for shard in one.shards if shard.digest in shared)
        raise _apart(f"both have seen {name}, which would count twice")
    merged = {
        name: Histogram.from_state(one.tensors[name]).merge(Histogram.from_state(other.tensors[name])).state()
        for name in sorted(one.tensors)
    }
    shards = sorted((*one.shards, *other.shards), key=lambda shard: shard.digest)
    return CalibrationStatistics(model_sha256=one.model_sha256, shards=tuple(shards), tensors=merged)


def _apart(why: str) -> DataError:
    return DataError(
        "these calibration statistics cannot be merged",
        why=why,
        remedy="merge statistics of one prepared model, each of other samples",
    )


def write_statistics(statistics: CalibrationStatistics, path: Path) -> None:
    """Write statistics as JSON, whole or not at all; equal ones give equal bytes.

    Raises:
        OutputError: if the file cannot be written.
    """
    write_whole(msgspec.json.encode(statistics, order="deterministic") + b"\n", path)


def read_statistics(path: Path) -> CalibrationStatistics:
    """Read what `write_statistics` wrote.

    Raises:
        DataError: if the file is missing, cannot be read, or holds no sound statistics.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=CalibrationStatistics)
    except OSError as error:
        raise DataError(
            "the calibration statistics cannot be read", where=str(path), why=error.strerror
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(
            "the file holds no calibration statistics",
            where=str(path),
            why=str(error),
            remedy="name a file that write_statistics wrote",
        ) from error
    if found.schema_version > SCHEMA_VERSION:
        raise DataError(
            f"the statistics have schema version {found.schema_version}",
            where=str(path),
            why=f"this edgepress reads {SCHEMA_VERSION}",
            remedy="upgrade edgepress",
        )
    for state in found.tensors.values():
        Histogram.from_state(state)
    return found
