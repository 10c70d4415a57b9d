"""Repair of a cut model without labels: every layer that lost inputs is fitted anew, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...graph.edit import Editor
from ...graph.model import Model
from .blocks import block_of, fit_together
from .branches import Branch, put_constant
from .elimination import RIDGE, Moments, error, solve
from .observe import Asked, batches, moments_of, part_of
from .readers import Layer, layer_of

if TYPE_CHECKING:
    from ...calibration.data import CalibrationData

Told = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """What the repair of one layer did.

    Attributes:
        node: the layer.
        before: mean squared error of its result in parts of the energy, with the weights cut off.
        after: the same with its own weights fitted.
        together: whether it was then fitted further, together with the layer that makes its inputs.
    """

    node: str
    before: float
    after: float
    together: bool = False


def repair(
    original: Model,
    current: Model,
    nodes: Mapping[str, npt.NDArray[np.int64] | None],
    data: CalibrationData,
    *,
    dropped: Mapping[str, Branch] | None = None,
    ridge: float = RIDGE,
    thorough: bool = False,
    threads: int = 1,
    told: Told | None = None,
) -> list[Fitted]:
    """Fit weights and biases of layers of a cut model to what the original gives, one after another.

    Each layer is fitted on inputs as the model has them that was repaired up to there, to the original's
    result; where the result is added to another tensor, to the original's sum less that tensor. Weights
    change only where that lowers the error.

    Args:
        original: the untouched graph.
        current: the cut graph; its weights are replaced.
        nodes: names of layers, in graph order, with the places of the original's outputs that they have left
            (None: all).
        data: calibration samples, without labels.
        dropped: branches that went as a whole, by the layer that ended them: their constants are fitted.
        ridge: see `elimination.solve`.
        thorough: fit each layer further by gradients, together with the one that makes its inputs, where
            nothing else reads those; kept where samples that were held out say that it is better.
        threads: of the runtime.
        told: called with (layers done, layers).

    Source: He et al. 2017, arXiv:1707.06168, §3.2 (reconstruction of feature maps); here of the sums behind
        them, with the cut model's own inputs.
    """
    twins = {node.name: node for node in current.graph}
    editor = Editor(current)
    done = []
    for number, (name, outputs) in enumerate(nodes.items()):
        if dropped and name in dropped:
            branch = dropped[name]
            values = _missing_mean(original, current, branch, outputs, data, threads=threads)
            put_constant(twins[branch.adder], branch, values, editor)
        layer = layer_of(twins[name]) if name in twins else None
        if layer is not None:
            asked = Asked(layer, str(layer.total.name), outputs)
            (moments,) = moments_of(original, current, [asked], data, threads=threads)
            fitted = _fit(layer, moments, editor, ridge)
            block = block_of(layer) if thorough else None
            if block is not None and fit_together(
                original, current, block, asked, data, editor=editor, threads=threads
            ):
                fitted = dataclasses.replace(fitted, together=True)
            done.append(fitted)
        if told is not None:
            told(number + 1, len(nodes))
    return done


def _missing_mean(
    original: Model,
    current: Model,
    branch: Branch,
    outputs: npt.NDArray[np.int64] | None,
    data: CalibrationData,
    *,
    threads: int,
) -> npt.NDArray[np.float64]:
    """The mean of what a branch should have added, channel by channel."""
    first = part_of(original, [branch.total], threads)
    second = part_of(current, [branch.beside], threads)
    total, count = np.zeros(1), 0
    for feeds, _ in batches(data, len(data)):
        wanted = first(feeds)[branch.total]
        if outputs is not None:
            wanted = np.take(wanted, outputs, axis=branch.axis)
        missing = np.moveaxis(wanted - second(feeds)[branch.beside], branch.axis, -1)
        rows = missing.reshape(-1, missing.shape[-1])
        total = total + rows.sum(axis=0, dtype=np.float64)
        count += len(rows)
    return np.asarray(total / max(count, 1))


def _fit(layer: Layer, moments: Moments, editor: Editor, ridge: float) -> Fitted:
    every = np.arange(moments.gram.shape[1] - int(moments.constant))
    own = layer.rows()
    before = error(moments, every, own)
    rows = solve(moments, every, ridge=ridge)
    after = error(moments, every, rows)
    if after < before:
        layer.put(rows, editor)
    energy = max(moments.energy, 1e-30)
    return Fitted(node=str(layer.node.name), before=before / energy, after=min(after, before) / energy)
