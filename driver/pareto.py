"""What was measured on the way to a bundle: drift, latency and size of every plan, and what was ranked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..compress.sensitivity import Sensitivities
from ..graph.errors import ModelError
from .output import Block, Table, format_bytes, format_ms, format_percent

if TYPE_CHECKING:
    from ..calibration.drift import DriftReport
    from ..calibration.limits import LimitResult
    from ..runtimes.timing import BenchmarkResult
    from .candidate import Candidate

RUN_NAME = "pareto"
"""Its record in a bundle's runs/: latencies are of one machine and one day, the bundle's files are not."""
_RANKED = 12
_SHOWN_GROUPS = 3


class ParetoPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One plan that was measured.

    Attributes:
        name: what sets it apart.
        groups_in_float: the groups that the search took back to float for it.
        quantized_groups: how many are left.
        drift: metric -> value, of relative L2 and of every metric that is limited; None where infinite.
        limits: metric -> its limit, as it was asked for.
        intervals: metric -> 95 % interval, where there is one.
        met: whether all limits hold.
        straddles: whether a limit lies inside an interval.
        model_bytes: size of its files.
        latency_ms: median, where it was timed; `speedup` is over the untouched model.
        chosen: the one in the bundle.
        best: no other measured plan has less drift and size, and less time where both were timed.
    """

    name: str
    groups_in_float: tuple[str, ...] = ()
    quantized_groups: int
    drift: dict[str, float | None]
    limits: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    met: bool
    straddles: bool = False
    model_bytes: int
    latency_ms: float | None = None
    speedup: float | None = None
    chosen: bool = False
    best: bool = False


class ParetoTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All plans that were measured in one compile, in their order, and the ranking of the groups."""

    points: tuple[ParetoPoint, ...] = ()
    sensitivities: Sensitivities | None = None


@dataclasses.dataclass(kw_only=True)
class ParetoLog:
    """Collects points while a compile measures; files tell its candidates apart."""

    points: dict[Path, ParetoPoint] = dataclasses.field(default_factory=dict)
    sensitivities: Sensitivities | None = None

    def measured(
        self,
        candidate: Candidate,
        report: DriftReport,
        results: Sequence[LimitResult],
        reverted: Iterable[str] = (),
    ) -> None:
        """Keep a candidate's drift and size."""
        back = tuple(reverted)
        drift = {"l2": report.l2} | {result.metric: result.value for result in results}
        self.points[candidate.file] = ParetoPoint(
            name=_name(candidate, back),
            groups_in_float=back,
            quantized_groups=len(candidate.plan.groups),
            drift=drift,
            limits={item.metric: item.limit for item in results},
            intervals={item.metric: item.interval for item in results if item.interval is not None},
            met=all(result.met for result in results),
            straddles=any(result.straddles for result in results),
            model_bytes=candidate.file_bytes,
        )

    def timed(self, candidate: Candidate, timing: BenchmarkResult) -> None:
        """Add the latency of a candidate whose drift was measured."""
        point = self.points.get(candidate.file)
        if point is None or len(timing.timings) < 2 or not timing.comparisons:
            return
        self.points[candidate.file] = msgspec.structs.replace(
            point, latency_ms=timing.timings[1].p50_ms, speedup=timing.comparisons[0].ratio
        )

    def table(self, chosen: Candidate) -> ParetoTable | None:
        """Everything measured, with the chosen candidate marked; None where no drift was."""
        if not self.points:
            return None
        points = tuple(
            msgspec.structs.replace(point, chosen=file == chosen.file, best=_is_best(point, self.points))
            for file, point in self.points.items()
        )
        return ParetoTable(points=points, sensitivities=self.sensitivities)


def _name(candidate: Candidate, reverted: Sequence[str]) -> str:
    if not candidate.plan.groups:
        return "all in float"
    rest = candidate.plan.precision.partition("+")[2]
    name = "as planned" if not reverted else f"{len(reverted)} groups in float"
    return f"{name}, the rest in {rest}" if rest else name


def _is_best(point: ParetoPoint, points: Mapping[Path, ParetoPoint]) -> bool:
    return not any(_dominates(other, point) for other in points.values() if other is not point)


def _dominates(one: ParetoPoint, other: ParetoPoint) -> bool:
    pairs = [(_l2(one), _l2(other)), (one.model_bytes, other.model_bytes)]
    if one.latency_ms is not None and other.latency_ms is not None:
        pairs.append((one.latency_ms, other.latency_ms))
    elif one.latency_ms is not None or other.latency_ms is not None:
        pairs.append((-one.quantized_groups, -other.quantized_groups))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _l2(point: ParetoPoint) -> float:
    value = point.drift.get("l2")
    return float("inf") if value is None else value


def read_pareto(payload: object, where: str) -> ParetoTable:
    """The table from the record of a bundle's runs/.

    Raises:
        ModelError: if it is no such table.
    """
    try:
        return msgspec.convert(payload, ParetoTable)
    except msgspec.ValidationError as error:
        raise ModelError(
            "the bundle's table of measured plans cannot be read",
            where=where,
            why=str(error),
            remedy="remove that file, or compile the model again",
        ) from error


def pareto_blocks(table: ParetoTable, *, whole: bool) -> list[Block]:
    """The table for people: the plans, and where asked for the ranking of the groups.

    Nothing where one plan was measured only, unless the whole is asked for.
    """
    blocks: list[Block] = []
    if whole or len(table.points) > 1:
        blocks.append(_point_table(table.points))
    if whole and table.sensitivities is not None:
        blocks.append(_ranking(table.sensitivities))
    return blocks


def _point_table(points: Sequence[ParetoPoint]) -> Table:
    metrics = list(dict.fromkeys(metric for point in points for metric in point.drift))
    rows = tuple(
        (
            point.name,
            *(_metric(metric, point.drift.get(metric)) for metric in metrics),
            _held(point),
            "" if point.latency_ms is None else format_ms(point.latency_ms),
            "" if point.speedup is None else f"{point.speedup:.2f}x",
            format_bytes(point.model_bytes),
            ", ".join(point.groups_in_float[:_SHOWN_GROUPS])
            + (", …" if len(point.groups_in_float) > _SHOWN_GROUPS else ""),
            ", ".join(word for word, said in (("best", point.best), ("chosen", point.chosen)) if said),
        )
        for point in points
    )
    columns = ("plan", *metrics, "met", "latency", "speedup", "size", "in float", "")
    return Table(
        title="Measured on the way",
        columns=columns,
        rows=rows,
        numeric=frozenset({*metrics, "latency", "speedup", "size"}),
    )


def _held(point: ParetoPoint) -> str:
    return ("yes" if point.met else "NO") + (", unsure" if point.straddles else "")


def _metric(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if metric == "sqnr":
        return f"{value:.1f} dB"
    return f"{value:.3g}" if metric == "kl" else format_percent(value)


def _ranking(found: Sensitivities) -> Table:
    rows = tuple(
        (
            item.group,
            item.form,
            "not finite" if item.l2 is None else format_percent(item.l2),
            "" if item.local_l2 is None else format_percent(item.local_l2),
        )
        for item in found.groups[:_RANKED]
    )
    more = f", {_RANKED} of {len(found.groups)}" if len(found.groups) > _RANKED else ""
    return Table(
        title=f"Drift that each group causes alone{more} ({found.forwards} forwards)",
        columns=("group", "form", "of the answers", "of its results"),
        rows=rows,
        numeric=frozenset({"of the answers", "of its results"}),
    )
