"""What a model of other widths costs: multiply-accumulates and bytes of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .coupling import Coupling, Group, work_macs
from .spaces import Classes

Vector = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Products:
    """A sum of products of axis sizes, as a function of how many units each group has left.

    Attributes:
        base: the value of each term with nothing cut, shape (terms,).
        axes: for each term the rows of `shares` that it is multiplied by.
        shares: part of an axis that one unit of each group is, shape (axes, groups).
    """

    base: Vector
    axes: tuple[tuple[int, ...], ...]
    shares: Vector

    def total(self, removed: Sequence[int]) -> float:
        """The sum when so many units of each group are gone."""
        return float(self.terms(removed).sum())

    def terms(self, removed: Sequence[int]) -> Vector:
        """The terms when so many units of each group are gone, shape (terms,)."""
        left = 1.0 - self.shares @ np.asarray(removed, np.float64)
        parts = np.array([float(np.prod(left[list(axes)])) for axes in self.axes])
        return np.asarray(self.base * parts, np.float64)

    def of_group(self, group: int, removed: Sequence[int], counts: Sequence[int]) -> Vector:
        """The terms that a group changes, summed, when `counts` units of it are gone and `removed` of others.

        Args:
            group: which one.
            removed: units gone of every group.
            counts: numbers of units gone of this one.

        Returns:
            Shape (counts,).
        """
        touched = [
            place for place, axes in enumerate(self.axes) if any(self.shares[axis, group] for axis in axes)
        ]
        left = 1.0 - self.shares @ np.asarray(removed, np.float64)
        own = self.shares[:, group]
        result = np.zeros(len(counts))
        for place in touched:
            product = np.full(len(counts), self.base[place])
            for axis in self.axes[place]:
                at = left[axis] + own[axis] * (removed[group] - np.asarray(counts, np.float64))
                product = product * at
            result += product
        return result


def macs_of(coupling: Coupling, groups: Sequence[Group], sizes: Mapping[str, int]) -> Products:
    """Multiply-accumulates as a function of the widths of groups.

    Args:
        coupling: the traced graph.
        groups: those whose widths vary.
        sizes: named dynamic axis -> its size.
    """
    base = np.array(work_macs(coupling, sizes))
    spaces = [work.spaces for work in coupling.tracer.works]
    return _products(coupling.classes, groups, base, spaces)


def weight_bytes_of(coupling: Coupling, groups: Sequence[Group]) -> Products:
    """Bytes of the weights as a function of the widths of groups; what several nodes read counts once."""
    seen: dict[int, tuple[float, tuple[int, ...]]] = {}
    for use in coupling.tracer.uses.values():
        tensor = use.value.const_value
        if tensor is not None:
            axes = tuple(axis for axis in use.axes if axis is not None)
            seen.setdefault(id(tensor), (float(tensor.nbytes), axes))
    base = np.array([size for size, _ in seen.values()])
    return _products(coupling.classes, groups, base, [axes for _, axes in seen.values()])


def _products(
    classes: Classes, groups: Sequence[Group], base: Vector, spaces: Sequence[tuple[int, ...]]
) -> Products:
    owner = np.full(max(classes.count, 1), -1)
    for index, group in enumerate(groups):
        owner[list(group.units)] = index
    rows: dict[int, int] = {}
    shares: list[Vector] = []
    axes: list[tuple[int, ...]] = []
    for term in spaces:
        here = []
        for space in term:
            root = classes.roots[space]
            if root not in rows:
                rows[root] = len(shares)
                shares.append(_share(classes, root, owner, groups))
            if shares[rows[root]].any():
                here.append(rows[root])
        axes.append(tuple(here))
    table = np.stack(shares) if shares else np.zeros((0, len(groups)))
    return Products(base=base, axes=tuple(axes), shares=table)


def _share(classes: Classes, root: int, owner: npt.NDArray[np.int64], groups: Sequence[Group]) -> Vector:
    """The part of an axis that one unit of each group is."""
    labels = classes.of(root)
    owners = owner[labels]
    counts = np.bincount(owners[owners >= 0], minlength=len(groups)).astype(np.float64)
    units = np.array([len(group.units) for group in groups], np.float64)
    return np.asarray(counts / np.maximum(units, 1) / max(len(labels), 1))
