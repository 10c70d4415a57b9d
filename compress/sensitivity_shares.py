"""From squared changes of a few samples to the share of every group: pure functions of arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# A tensor bears witness only of a fair share of the groups: its own scale has to be found first.
_WITNESS_FRACTION = 0.25
_WITNESS_GROUPS = 6
# However well a witness agrees, it is not trusted beyond this part of the spread between samples.
_LEAST_DOUBT = 0.2


def combine(moves: Floats, witnesses: Floats) -> Floats:
    """The share of each group in what all groups do to the answers, from a few samples.

    Samples count alike: each row of `moves` is divided by its level (`_levels`). An answer of few
    values moves by chance (its squared change has as few degrees of freedom); tensors on the way to it
    have many, and a group's error has moved them, too. A witness w predicts log share = log(its own
    move) + c, with one c for all groups before it. Its mean squared disagreement with the direct
    figures, less what these scatter by chance, is how far it can be trusted: direct figure and
    witnesses are averaged with weights of one over their variances (James and Stein 1961; Efron and
    Morris 1975, JASA 70, 311-319, eq. 1.4-1.6).

    Args:
        moves: squared change of the answers, shape (samples, groups); NaN where it was not measured,
            or is not finite.
        witnesses: squared change of tensors on the way, shape (samples, groups, tensors); 0 where a
            tensor is not behind the group.

    Returns:
        shape (groups,), summing to about 1; NaN where a group was never measured, infinite where the
        answers were.
    """
    shares = _combine_finite(moves, witnesses)
    result: Floats = np.where(np.isinf(moves).any(axis=0), np.inf, shares)
    return result


def _combine_finite(moves: Floats, witnesses: Floats) -> Floats:
    known = np.isfinite(moves)
    totals = _levels(moves)
    usable = (totals > 0).ravel()
    if not usable.any():
        still: Floats = np.where(known.any(axis=0), 0.0, np.nan)
        return still
    scaled = np.where(known, moves, np.nan)[usable] / totals[usable]
    scaled_witnesses = np.nan_to_num(witnesses, nan=0.0, posinf=0.0)[usable] / totals[usable][:, :, None]
    counts = np.isfinite(scaled).sum(axis=0)
    direct: Floats = np.where(counts > 0, np.nansum(scaled, axis=0) / np.maximum(counts, 1), np.nan)
    direct = direct / np.nansum(direct)
    live = np.flatnonzero(np.nan_to_num(direct) > 0)
    if counts.min() < 2 or live.size < _WITNESS_GROUPS:
        return direct
    mean = scaled[:, live].mean(axis=0)
    scatter = float(np.median((scaled[:, live].std(axis=0, ddof=1) / mean) ** 2)) / int(usable.sum())
    if scatter == 0:
        return direct
    logs = np.log(direct[live])
    precision, pull, best = np.zeros(live.size), np.zeros(live.size), np.zeros(live.size)
    for place in range(witnesses.shape[2]):
        seen = scaled_witnesses[:, live, place]
        behind = np.flatnonzero((seen > 0).all(axis=0))
        if behind.size < max(_WITNESS_GROUPS, _WITNESS_FRACTION * moves.shape[1]):
            continue
        told = np.log(seen[:, behind].sum(axis=0))
        offset = logs[behind] - told
        doubt = max(float(offset.var(ddof=1)) - scatter, _LEAST_DOUBT * scatter)
        precision[behind] += 1 / doubt
        pull[behind] += (told + offset.mean()) / doubt
        best[behind] = np.maximum(best[behind], 1 / doubt)
    # Witnesses repeat each other: together they weigh as much as the best of them.
    told = np.divide(pull, precision, out=logs.copy(), where=precision > 0)
    direct = direct.copy()
    direct[live] = np.exp((logs / scatter + told * best) / (1 / scatter + best))
    return direct


def _levels(moves: Floats) -> Floats:
    """How easily each sample's answers move, shape (samples, 1): the mean over the groups.

    Each group counts in units of its own mean, so that one that spoils a few samples badly is not
    hidden by being divided by itself. 0 where nothing moves a sample.
    """
    known = np.isfinite(moves)
    counts = np.maximum(known.sum(axis=0), 1)
    means = np.where(known, moves, 0.0).sum(axis=0) / counts
    units: Floats = np.where(known & (means > 0), moves, 0.0) / np.where(means > 0, means, 1.0)
    levels: Floats = units.mean(axis=1, keepdims=True)
    return levels


def interpolate(powers: Floats, local: Floats) -> Floats:
    """Squared drifts with those never measured filled in: the gain of their neighbours in the graph.

    Args:
        powers: shape (groups,) in graph order, NaN where not measured.
        local: squared error of each group's own results, shape (groups,).
    """
    missing = np.isnan(powers)
    if not missing.any():
        return powers
    places = np.flatnonzero(~missing & (local > 0) & (powers > 0))
    if places.size == 0:
        return np.where(missing, 0.0, powers)
    gains = np.exp(np.interp(np.arange(powers.size), places, np.log(powers[places]) - np.log(local[places])))
    filled: Floats = np.where(missing, gains * local, powers)
    return filled
