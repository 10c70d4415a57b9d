"""How long layers take at other widths: measured on the device, layer by layer, for the search of widths."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...compress.cost import concrete_shape
from ...compress.prune.cut import cut, marked
from ...graph.errors import EdgepressError
from ...graph.save import to_bytes
from ...runtimes.base import SessionOptions
from ...runtimes.device import Form
from ...runtimes.timing import Schedule
from ...runtimes.timing_jobs import TimingJob, time_jobs
from .operator_models import Trial, float_model

if TYPE_CHECKING:
    from ...compress.prune.prune import Pruner
    from ...graph.model import Model
    from ...runtimes.base import Array
    from ...runtimes.device import Device
    from ..reporter import Reporter

_SCHEDULE = Schedule(
    pairs=2, runs=15, warm_up_runs=3, least_pair_s=0.01, most_pair_s=0.5, warm_up_limit_s=0.3
)
_PARTS = (0.25, 0.5, 0.75)
"""The parts of a group that it is timed with, besides the whole; in between is interpolated."""


_Key: TypeAlias = tuple[str, tuple[tuple[int, ...], ...], tuple[tuple[str, str], ...]]
_Job: TypeAlias = "tuple[Form, Mapping[str, Array]]"


class WidthTimes:
    """Milliseconds of a model by the widths of its groups; a `Cost` for the search.

    Each layer that a group touches is timed alone, whole and with parts of the group left. A layer between
    two groups takes the product of what each of them makes of it. What no group touches stays the same.

    Args:
        pruner: the model.
        sizes: named dynamic axis -> its size.
        device: where layers are timed.
        threads: of the runtime.
        whole_ms: of the whole model there, with the widths that it has.
        reporter: progress.
    """

    def __init__(
        self,
        pruner: Pruner,
        sizes: Mapping[str, int],
        *,
        device: Device,
        threads: int,
        whole_ms: float,
        reporter: Reporter,
    ) -> None:
        self.pruner, self._sizes = pruner, sizes
        self._device, self._threads = device, threads
        self._known: dict[_Key, float | None] = {}
        self._pending: dict[_Key, _Job] = {}
        works = pruner.coupling.tracer.works
        keys = [self._wanted(pruner.coupling.model, str(work.node.name)) for work in works]
        self._measure()
        self._own = np.array([self._ms(key) or 0.0 for key in keys])
        # Parts of a group's width and the part of the time that each layer takes there.
        self._tables: list[dict[int, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]] = []
        with reporter.stage("timing layers at other widths", len(pruner.groups)) as stage:
            for group in range(len(pruner.groups)):
                self._tables.append(self._table(group))
                stage.advance()
        untimed = sum(found is None for found in self._known.values())
        if untimed:
            reporter.note(f"{untimed} kinds of layers cannot be timed alone: their time counts as unchanged")
        self._rest = max(whole_ms - float(self._own.sum()), 0.0)

    def total(self, removed: Sequence[int]) -> float:
        """Milliseconds when so many units of each group are gone."""
        left = self._own.copy()
        for group, gone in enumerate(removed):
            for place, (widths, parts) in self._tables[group].items():
                left[place] *= np.interp(self.pruner.units[group] - gone, widths, parts)
        return self._rest + float(left.sum())

    def of_group(self, group: int, removed: Sequence[int], counts: Sequence[int]) -> npt.NDArray[np.float64]:
        """Milliseconds of the layers that a group touches, with `counts` units of it gone."""
        units = self.pruner.units
        result = np.zeros(len(counts))
        for place, (widths, parts) in self._tables[group].items():
            base = self._own[place]
            for other, gone in enumerate(removed):
                if other != group and place in self._tables[other]:
                    base *= np.interp(units[other] - gone, *self._tables[other][place])
            result += base * np.interp(units[group] - np.asarray(counts), widths, parts)
        return result

    def _table(self, group: int) -> dict[int, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        pruner = self.pruner
        classes, works = pruner.coupling.classes, pruner.coupling.tracer.works
        units = set(pruner.groups[group].units)
        touched = [
            place
            for place, work in enumerate(works)
            if self._own[place] and any(units & set(classes.of(space).tolist()) for space in work.spaces)
        ]
        count = len(units)
        widths = sorted({max(round(part * count), 1) for part in _PARTS} - {count})
        keys: dict[int, list[_Key | None]] = {place: [] for place in touched}
        for width in widths:
            model = cut(pruner.coupling, marked(pruner.coupling, pruner.curves[group].removed(width)))
            for place in touched:
                keys[place].append(self._wanted(model, str(works[place].node.name)))
        self._measure()
        rows = {place: [self._part(place, key) for key in keys[place]] for place in touched}
        grid = np.array([0.0, *widths, count], np.float64)
        return {
            place: (grid, np.maximum.accumulate(np.array([min(parts, default=1.0) / 2, *parts, 1.0])))
            for place, parts in rows.items()
        }

    def _part(self, place: int, key: _Key | None) -> float:
        """The part of a layer's time that is left; never more than the whole."""
        found, whole = self._ms(key), float(self._own[place])
        return (whole if found is None else min(found, whole)) / whole

    def _ms(self, key: _Key | None) -> float | None:
        return None if key is None else self._known.get(key)

    def _wanted(self, model: Model, name: str) -> _Key | None:
        """What one node of a model is timed under, once `_measure` has run; nodes alike are timed once."""
        node = next((node for node in model.graph if node.name == name), None)
        if node is None:
            return None
        shapes = tuple(
            () if value is None else (concrete_shape(value, self._sizes) or ()) for value in node.inputs
        )
        attributes = tuple(sorted((key, str(value.value)) for key, value in node.attributes.items()))
        key: _Key = (node.op_type, shapes, attributes)
        if key not in self._known and key not in self._pending:
            self._prepare(key, node, shapes)
        return key

    def _prepare(self, key: _Key, node: ir.Node, shapes: tuple[tuple[int, ...], ...]) -> None:
        trial = Trial(
            nodes=(str(node.name),),
            decisions=(),
            operator=node.op_type,
            shapes=shapes,
            attributes="",
            macs=None,
            originals=(node,),
            sizes=self._sizes,
        )
        try:
            model, feeds = float_model(trial)
            options = SessionOptions(threads=self._threads)
            self._pending[key] = Form(name=node.op_type, model=to_bytes(model), options=options), feeds
        except EdgepressError:
            # A node whose shapes are not known alone counts with what nothing touches.
            self._known[key] = None

    def _measure(self) -> None:
        """Time what is pending, in one go."""
        keys = list(self._pending)
        jobs = [
            TimingJob(build=functools.partial(_job, self._pending[key]), schedule=_SCHEDULE) for key in keys
        ]
        self._known |= dict.fromkeys(keys)
        for outcome in time_jobs(self._device, jobs, budget_s=math.inf):
            if outcome.result is not None:
                self._known[keys[outcome.index]] = outcome.result.timings[0].p50_ms
        self._pending.clear()


def _job(pending: _Job) -> tuple[list[Form], Mapping[str, Array]]:
    form, feeds = pending
    return [form], feeds
