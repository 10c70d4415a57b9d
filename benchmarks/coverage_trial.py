"""One model pruned at random: cut, checked, run, and compared with its masked and with its whole form."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from edgepress.compress.cost import bind_axes
from edgepress.compress.prune.coupling import Coupling, couple, cut_macs, work_macs
from edgepress.compress.prune.cut import Removed, cut, mask, nothing_removed
from edgepress.graph.model import Model
from edgepress.graph.save import to_bytes
from edgepress.runtimes.ort_runtime import OrtSession

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
ASKED_FRACTION = 0.3
"""Of the multiply-accumulates that a random cut has to remove."""
TOLERANCE = 1e-4
"""Of the largest number of an output: two orders of float additions through a deep random net."""
_ROUNDING = 1e-9
_UNITS_REMOVED = (0.2, 0.35, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of a random cut.

    Attributes:
        nodes: of the cleaned-up graph.
        coupling_s: seconds of the coupling analysis.
        groups: all groups, and how many of them can be cut.
        prunable: how many of them can be cut.
        macs_left_fraction: by the sizes that the cut graph's own analysis finds.
        worst: largest difference from the masked model, relative to the largest number of the output.
        moved: the same from the whole model; a cut that changes nothing shows nothing.
        failure: what is wrong, with the operators that keep most; "" if nothing is.
    """

    nodes: int
    coupling_s: float
    groups: int
    prunable: int
    macs_left_fraction: float
    worst: float
    moved: float
    failure: str


def try_cut(model: Model, samples: Sequence[Feeds], *, seed: int = 0) -> Trial:
    """Remove at least `ASKED_FRACTION` of the work at random and compare.

    Args:
        model: cleaned up, with shapes inferred; not changed.
        samples: inputs by name, of one shape or several.
        seed: of the choice of units.
    """
    started = time.perf_counter()
    coupling = couple(model)
    spent = time.perf_counter() - started
    sizes = bind_axes(model, {name: array.shape for name, array in samples[0].items()})
    macs = work_macs(coupling, sizes)
    removed = random_cut(coupling, macs, ASKED_FRACTION, seed=seed)
    pruned = cut(coupling, removed)
    again = couple(pruned)
    left = sum(work_macs(again, sizes)) / max(sum(macs), 1.0)
    onnx.checker.check_model(onnx.load_from_string(to_bytes(pruned)), full_check=True)
    changed = (pruned.inputs, pruned.outputs) != (model.inputs, model.outputs)
    results = [_outputs(form, samples) for form in (mask(coupling, removed), pruned, model)]
    worst, moved = difference(results[0], results[1]), difference(results[2], results[1])
    failures = [
        (f"{1 - left:.0%} removed; kept by {main_reasons(coupling)}", left > 1 - ASKED_FRACTION + _ROUNDING),
        ("inputs or outputs changed", changed),
        (f"differs from the masked model by {worst:.0e}", not worst <= TOLERANCE),
        ("equals the whole model", not moved > 10 * max(worst, 1e-6)),
    ]
    return Trial(
        nodes=sum(1 for _ in model.graph.all_nodes()),
        coupling_s=spent,
        groups=len(coupling.groups),
        prunable=len(coupling.prunable),
        macs_left_fraction=left,
        worst=worst,
        moved=moved,
        failure="; ".join(text for text, failed in failures if failed),
    )


def _outputs(model: Model, samples: Sequence[Feeds]) -> list[list[Array]]:
    session = OrtSession.from_model(model)
    return [list(session.run(dict(feeds)).values()) for feeds in samples]


def difference(expected: Sequence[Sequence[Array]], found: Sequence[Sequence[Array]]) -> float:
    """Largest difference over the largest expected number of its output; infinite where shapes differ."""
    worst = 0.0
    for wanted_outputs, got_outputs in zip(expected, found, strict=True):
        for wanted, got in zip(wanted_outputs, got_outputs, strict=True):
            if wanted.shape != got.shape or not np.isfinite(wanted).all():
                return float("inf")
            scale = max(float(np.abs(wanted).max(initial=0.0)), 1e-12)
            gap = np.abs(wanted.astype(np.float64) - got.astype(np.float64)).max(initial=0.0)
            worst = max(worst, float(gap) / scale)
    return worst


def random_cut(coupling: Coupling, macs: Sequence[float], fraction: float, *, seed: int) -> Removed:
    """Random units of every group, as few as remove this fraction of the work, at least one left of each.

    Layers' own units go first; those of streams that several layers add to only where that is not enough.
    """
    total = sum(macs)
    removed = nothing_removed(coupling)
    for chosen in _choices(coupling, seed):
        removed = chosen
        if cut_macs(coupling, macs, removed) <= (1 - fraction + _ROUNDING) * total:
            break
    return removed


def _choices(coupling: Coupling, seed: int) -> Iterator[Removed]:
    for with_streams in (False, True):
        for part in _UNITS_REMOVED:
            random = np.random.default_rng(seed)
            removed = nothing_removed(coupling)
            for group in coupling.prunable:
                if group.kind == "stream" and not with_streams:
                    continue
                count = min(max(1, int(len(group.units) * part)), len(group.units) - 1)
                removed[random.permutation(group.units)[:count]] = True
            yield removed


def main_reasons(coupling: Coupling, count: int = 2) -> str:
    """The operators that keep most elements, with what they do."""
    found = Counter[str]()
    for group in coupling.groups:
        if group.blocked is not None:
            found[f"{group.blocked.op or 'no operator'}: {group.blocked.reason}"] += len(group.units)
    return ", ".join(text for text, _ in found.most_common(count)) or "nothing"
