"""Rounding a weight so that the layer's output, not the weight, changes least: pure arithmetic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DAMPING = 0.01
"""Added to the diagonal of X Xᵀ, as a fraction of its mean; as in the source."""
_BLOCK = 64


def round_weight(
    weight: Floats, second: Floats, scale: Floats, limits: tuple[int, int], damping: float = DAMPING
) -> tuple[npt.NDArray[np.int8], Floats]:
    """Round one column after the other; the columns still to come take up each one's error.

    The last column is the bias: it stays real, and takes up what is left.

    Args:
        weight: real, the bias last, shape (outputs, inputs + 1).
        second: X Xᵀ over the layer's inputs with a row of ones below, shape (inputs + 1, inputs + 1).
        scale: of each output, shape (outputs,).
        limits: smallest and largest integer.
        damping: added to the diagonal of `second`, as a fraction of its mean.

    Returns:
        The integers, shape (outputs, inputs), and the bias that fits them, shape (outputs,).

    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1, with its order of columns: those of large
    second moment first.
    """
    inputs = weight.shape[1] - 1
    order = np.append(np.argsort(-np.diag(second)[:inputs], kind="stable"), inputs)
    hessian = second[np.ix_(order, order)].astype(np.float64)
    hessian[np.diag_indices_from(hessian)] += damping * float(np.mean(np.diag(hessian))) or 1.0
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    rest = weight[:, order].astype(np.float64)
    integers = np.zeros((weight.shape[0], inputs), np.int8)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = np.empty((weight.shape[0], stop - start))
        for column in range(start, stop):
            nearest = np.clip(np.rint(rest[:, column] / scale), *limits)
            integers[:, order[column]] = nearest
            error = (rest[:, column] - nearest * scale) / upper[column, column]
            rest[:, column + 1 : stop] -= np.outer(error, upper[column, column + 1 : stop])
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return integers, rest[:, inputs]


def output_error(change: Floats, second: Floats) -> float:
    """Sum over outputs and columns of (change @ X)², from X Xᵀ.

    Args:
        change: what a weight differs by, shape (outputs, inputs).
        second: X Xᵀ, shape (inputs, inputs).
    """
    return float(np.einsum("oi,oi->", change @ second, change))
