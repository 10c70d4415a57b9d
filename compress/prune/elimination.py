"""Removing inputs of a linear layer one unit at a time while the rest takes over what they did.

All functions are of arrays. A layer is y = Wᵀ [x; 1]; it is known by the moments of its inputs and of what
it should give: G = E([x; 1] [x; 1]ᵀ), B = E([x; 1] yᵀ), each divided by the number of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

RIDGE = 1e-4
"""Added to the diagonal of G, in parts of its mean."""


class Moments(NamedTuple):
    """What least squares needs to know of a layer's data; per group of a grouped convolution.

    Attributes:
        gram: E(x xᵀ), shape (groups, inputs, inputs); the last input is the constant 1 if `constant`.
        cross: E(x yᵀ), shape (groups, inputs, outputs).
        energy: E(|y|²) summed over outputs and groups.
        constant: whether there is a constant input, for the bias.
    """

    gram: Matrix
    cross: Matrix
    energy: float
    constant: bool


class Removal(NamedTuple):
    """In which order units go, and what is lost.

    Attributes:
        order: positions of units, the first to go first.
        errors: the mean squared error summed over outputs, when that many units are left; shape (units + 1,).
    """

    order: tuple[int, ...]
    errors: Matrix


def solve(moments: Moments, rows: Rows, *, ridge: float = RIDGE, prior: Matrix | None = None) -> Matrix:
    """The weights on some inputs that come nearest: argmin E|y - Wᵀx|² + d |W - prior|².

    Args:
        moments: of all inputs.
        rows: the inputs that are left (the constant one is always used besides).
        ridge: d in parts of the mean of the diagonal of G.
        prior: shape (groups, rows (+ 1), outputs); zero if None.

    Returns:
        Shape (groups, rows (+ 1), outputs): the bias last where there is a constant input.
    """
    chosen = np.append(rows, moments.gram.shape[1] - 1) if moments.constant else rows
    gram = moments.gram[:, chosen[:, None], chosen]
    cross = moments.cross[:, chosen]
    damping = _damping(moments, len(chosen), ridge)
    if prior is not None:
        cross = cross + damping[:, :, None] * prior
    gram = gram + damping[:, :, None] * np.eye(len(chosen))
    return np.asarray(np.linalg.solve(gram, cross))


def _damping(moments: Moments, count: int, ridge: float) -> Matrix:
    """What is added to the diagonal, shape (groups, count); nothing to the constant's place."""
    diagonal = np.diagonal(moments.gram, axis1=1, axis2=2)
    if moments.constant:
        diagonal = diagonal[:, :-1]
    mean = diagonal.mean(axis=1) if diagonal.shape[1] else np.zeros(len(moments.gram))
    result = np.repeat(np.maximum(ridge * mean, 1e-12)[:, None], count, axis=1)
    if moments.constant:
        result[:, -1] = 0.0
    return result


def error(moments: Moments, rows: Rows, weights: Matrix) -> float:
    """E|y - Wᵀx|² summed over outputs, for weights as `solve` gives them."""
    chosen = np.append(rows, moments.gram.shape[1] - 1) if moments.constant else rows
    gram, cross = moments.gram[:, chosen[:, None], chosen], moments.cross[:, chosen]
    return float(moments.energy + np.sum(weights * (gram @ weights - 2.0 * cross)))


def removal(
    readers: Sequence[Moments],
    units: Sequence[Sequence[Rows]],
    *,
    scales: Sequence[float] | None = None,
    ridge: float = RIDGE,
    together: int = 1,
) -> Removal:
    """Take units away, always those whose loss is least, and let the others take over.

    A layer loses tr(Wuᵀ (H⁻¹uu)⁻¹ Wu) with unit u, H = G + damping, if the others are fitted anew; then
    W ← W - H⁻¹·u (H⁻¹uu)⁻¹ Wu and H⁻¹ ← H⁻¹ - H⁻¹·u (H⁻¹uu)⁻¹ H⁻¹u·.

    Args:
        readers: the layers that read the units.
        units: for each layer the rows of each unit, of equal number within a layer.
        scales: what a layer's error counts; 1 over the energy of its outputs if None.
        ridge: see `solve`.
        together: how many units go between two rankings.

    Source: Hassibi & Stork 1993 (optimal brain surgeon); in groups as Kurtić et al. 2023, arXiv:2302.04089,
        §3.1.
    """
    scales = [1.0 / max(item.energy, 1e-30) for item in readers] if scales is None else scales
    states = [
        _State(moments, np.stack([np.asarray(rows) for rows in own]), ridge)
        for moments, own in zip(readers, units, strict=True)
    ]
    count = len(units[0])
    alive, order = list(range(count)), list[int]()
    errors = np.zeros(count + 1)
    errors[count] = sum(scale * state.error for scale, state in zip(scales, states, strict=True))
    while alive:
        losses = sum(
            (scale * state.losses(alive) for scale, state in zip(scales, states, strict=True)),
            np.zeros(len(alive)),
        )
        going = [alive[place] for place in np.argsort(losses, kind="stable")[:together]]
        before, start = errors[len(alive)], len(alive)
        for state in states:
            state.remove(going)
        order += going
        alive = [unit for unit in alive if unit not in going]
        after = sum(scale * state.error for scale, state in zip(scales, states, strict=True))
        for step in range(1, len(going) + 1):
            errors[start - step] = before + (after - before) * step / len(going)
    return Removal(tuple(order), np.maximum.accumulate(np.maximum(errors, 0.0)[::-1])[::-1])


class _State:
    """H⁻¹ and W of one layer while units go."""

    def __init__(self, moments: Moments, units: npt.NDArray[np.int64], ridge: float) -> None:
        size = moments.gram.shape[1]
        damping = _damping(moments, size, ridge)
        self._inverse = np.linalg.inv(moments.gram + damping[:, :, None] * np.eye(size))
        self._weights = self._inverse @ moments.cross
        self._units = units
        self.error = float(moments.energy - np.sum(moments.cross * self._weights))

    def losses(self, alive: Sequence[int]) -> Matrix:
        """What the error grows by when each of these units goes."""
        rows = self._units[list(alive)]
        blocks = self._inverse[:, rows[:, :, None], rows[:, None, :]]
        own = self._weights[:, rows]
        return np.asarray(np.sum(own * np.linalg.solve(blocks, own), axis=(0, 2, 3)))

    def remove(self, units: Sequence[int]) -> None:
        """Take units away; the others take over what they can."""
        rows = self._units[list(units)].reshape(-1)
        block = self._inverse[:, rows[:, None], rows]
        own = self._weights[:, rows]
        solved = np.linalg.solve(block, own)
        self.error += float(np.sum(own * solved))
        across = np.array(self._inverse[:, :, rows])
        self._weights -= across @ solved
        self._inverse -= across @ np.linalg.solve(block, np.array(self._inverse[:, rows]))


def columns_sum(columns: npt.NDArray[Any], targets: npt.NDArray[Any]) -> tuple[Matrix, Matrix, float]:
    """X Xᵀ, X Yᵀ and |Y|² of columns (groups, inputs, n) and targets (groups, outputs, n)."""
    turned = columns.transpose(0, 2, 1)
    gram = (columns @ turned).astype(np.float64)
    cross = (columns @ targets.transpose(0, 2, 1)).astype(np.float64)
    return gram, cross, float(np.sum(np.square(targets, dtype=np.float64)))
