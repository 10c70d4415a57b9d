"""What the history keeps of a run: one row per timed thing, with every figure's unit in its name."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Literal

import msgspec

Kind = Literal["benchmark", "verify", "compile"]
Unit = Literal["ms", "bytes", "fraction", "joules", "count"]


class Measurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that was timed or verified in one run on one device; what was not measured is None.

    Attributes:
        run: the run's id: SHA-256 of its document, so that one run is kept once, however it comes.
        thing: as the run names it ("bundle", "baseline", a path).
        role: what runs are matched by: "bundle", "model" or "baseline", and "batch 4" or
            "SingleStream" of a sweep or a scenario.
        started: UTC, "2026-01-31T12:00:00Z".
        device: the device's name for people; url how it was reached, None where the document says not.
        shapes: "name:1x128" of every input, in the order of the names.
        bundle_digest, bundle_path: of the bundle; None for a model.
        drift_cosine: mean cosine distance to the untouched model, from the bundle's own drift report.
        instructions: per inference, counted on an emulated board, which has no figure in ms.
        sessions_ms: "load", "mean" and percentiles, one value per session; "cold_start" per process.
        outputs_ok: whether the golden samples were within tolerance; None where none were run.
        edgepress: the version that made the run.
    """

    run: str
    thing: str
    role: str
    kind: Kind
    started: str
    device: str
    url: str | None = None
    board: str | None = None
    cpu: str | None = None
    emulated: bool = False
    runtime: str | None = None
    threads: int | None = None
    shapes: str | None = None
    bundle_digest: str | None = None
    bundle_path: str | None = None
    model: str | None = None
    target: str | None = None
    runs: int | None = None
    mean_ms: float | None = None
    min_ms: float | None = None
    p50_ms: float | None = None
    p50_low_ms: float | None = None
    p50_high_ms: float | None = None
    p90_ms: float | None = None
    p90_low_ms: float | None = None
    p90_high_ms: float | None = None
    p99_ms: float | None = None
    p99_low_ms: float | None = None
    p99_high_ms: float | None = None
    p99_9_ms: float | None = None
    p99_9_low_ms: float | None = None
    p99_9_high_ms: float | None = None
    throughput_per_s: float | None = None
    load_ms: float | None = None
    cold_start_ms: float | None = None
    peak_memory_bytes: int | None = None
    file_bytes: int | None = None
    drift_cosine: float | None = None
    joules_per_inference: float | None = None
    instructions: float | None = None
    sessions_ms: dict[str, tuple[float, ...]] = {}
    outputs_ok: bool | None = None
    max_abs_diff: float | None = None
    void: bool = False
    void_reasons: tuple[str, ...] = ()
    edgepress: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run: its whole document and the rows that were read out of it."""

    id: str
    document: dict[str, Any]
    measurements: tuple[Measurement, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure that runs are compared by; less is better for every one of them.

    Attributes:
        name: as gates and options have it.
        field: of `Measurement`.
        exact: it is the bundle's own, wherever and however that is run: there is no noise.
        sessions: its key in `sessions_ms`.
        usual_spread: the standard deviation of its logarithm from run to run that is assumed where the
            history has no repeats to tell.
    """

    name: str
    field: str
    unit: Unit
    exact: bool = False
    sessions: str | None = None
    usual_spread: float = 0.0

    def of(self, row: Measurement) -> float | None:
        """The figure of one row."""
        value = getattr(row, self.field)
        return None if value is None else float(value)

    def interval(self, row: Measurement) -> tuple[float | None, float | None]:
        """Its 95 % interval within the run: the figure itself where it is exact."""
        if self.exact:
            return self.of(row), self.of(row)
        stem = self.field.removesuffix("_ms")
        low, high = getattr(row, f"{stem}_low_ms", None), getattr(row, f"{stem}_high_ms", None)
        return low, high


METRICS = (
    Metric(name="p50", field="p50_ms", unit="ms", sessions="p50", usual_spread=0.01),
    Metric(name="p90", field="p90_ms", unit="ms", sessions="p90", usual_spread=0.01),
    Metric(name="p99", field="p99_ms", unit="ms", sessions="p99", usual_spread=0.02),
    Metric(name="p99.9", field="p99_9_ms", unit="ms", sessions="p99_9", usual_spread=0.05),
    Metric(name="mean", field="mean_ms", unit="ms", sessions="mean", usual_spread=0.01),
    Metric(name="load", field="load_ms", unit="ms", sessions="load", usual_spread=0.03),
    Metric(name="cold_start", field="cold_start_ms", unit="ms", sessions="cold_start", usual_spread=0.03),
    Metric(name="peak_memory", field="peak_memory_bytes", unit="bytes", usual_spread=0.005),
    Metric(name="size", field="file_bytes", unit="bytes", exact=True),
    Metric(name="drift", field="drift_cosine", unit="fraction", exact=True),
    Metric(name="energy", field="joules_per_inference", unit="joules", usual_spread=0.03),
    # A run of 16 million differs from the next by a thousand: where memory lies decides some branches.
    Metric(name="instructions", field="instructions", unit="count", usual_spread=0.0001),
)
METRICS_BY_NAME = {metric.name: metric for metric in METRICS}


def run_id(document: object) -> str:
    """The id of a run: SHA-256 of its document as JSON with sorted keys."""
    return hashlib.sha256(msgspec.json.encode(document, order="deterministic")).hexdigest()


def comparable(one: Measurement, other: Measurement) -> bool:
    """Whether two rows are of the same model, target, device, threads and shapes, in the same role.

    A device is known by how it was reached, its board and its processor; what one of the two runs does
    not say is no difference.
    """
    same = ("role", "kind", "model", "target", "threads", "shapes", "emulated")
    if any(getattr(one, name) != getattr(other, name) for name in same):
        return False
    return all(
        getattr(one, name) is None
        or getattr(other, name) is None
        or getattr(one, name) == getattr(other, name)
        for name in ("url", "board", "cpu")
    )
