"""Which elements of which axes have to go together: index spaces, the maps between them, their classes.

A *space* is the set of positions of an axis. Axes that hold the same positions in the same order (the
output of a convolution and the bias that is added to it) share one space; where the order or the number
differs (Concat, Slice, heads x head size) elements of two spaces are linked one by one. Elements that are
joined by any chain of links form a class: they stay or go together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class Frozen(NamedTuple):
    """Why elements of a space cannot go: the node that stands in the way, and what it does with them."""

    node: str
    op: str
    reason: str


class Spaces:
    """Collects spaces, joins and links; cheap per axis, so that a large graph costs linear time."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._links: list[tuple[int, Indices, int, Indices]] = []
        self._frozen: list[tuple[int, Indices | None, Frozen]] = []

    def new(self, size: int) -> int:
        """A space of `size` elements of its own."""
        self._parent.append(len(self._parent))
        self._size.append(size)
        return len(self._parent) - 1

    def size(self, space: int) -> int:
        """How many elements a space has."""
        return self._size[space]

    def root(self, space: int) -> int:
        """The space that stands for all that were joined with this one."""
        parent = self._parent
        while parent[space] != space:
            parent[space] = parent[parent[space]]
            space = parent[space]
        return space

    def join(self, first: int, second: int) -> None:
        """Make two spaces of the same size one: element i of the one is element i of the other."""
        first, second = self.root(first), self.root(second)
        if self._size[first] != self._size[second]:
            raise ValueError(f"spaces of {self._size[first]} and {self._size[second]} elements")
        # The earlier one stays, so that numbering follows the graph's order.
        self._parent[max(first, second)] = min(first, second)

    def link(self, first: int, first_elements: Indices, second: int, second_elements: Indices) -> None:
        """Let element `first_elements[i]` of one space go with `second_elements[i]` of the other."""
        self._links.append((first, first_elements, second, second_elements))

    def freeze(self, space: int, why: Frozen, elements: Indices | None = None) -> None:
        """Keep elements of a space (None: all of them), and all that hang on them."""
        self._frozen.append((space, elements, why))

    def solve(self) -> Classes:
        """The classes that all joins and links make."""
        roots = [self.root(space) for space in range(len(self._parent))]
        starts = np.zeros(len(roots) + 1, np.int64)
        own = np.array([self._size[space] if roots[space] == space else 0 for space in range(len(roots))])
        np.cumsum(own, out=starts[1:])
        labels = np.arange(int(starts[-1]), dtype=np.int64)
        if self._links:
            ends = [np.stack([starts[roots[a]] + i, starts[roots[b]] + j]) for a, i, b, j in self._links]
            labels = _components(labels, np.concatenate(ends, axis=1))
        _, labels = np.unique(labels, return_inverse=True)
        reasons: dict[int, Frozen] = {}
        for space, elements, why in self._frozen:
            first = int(starts[roots[space]])
            span = np.arange(self._size[space]) if elements is None else elements
            for label in np.unique(labels[first + span]).tolist():
                reasons.setdefault(label, why)
        bundles = _components(
            np.arange(len(roots), dtype=np.int64),
            np.array(
                [
                    [s for s, _, _, _ in self._links] + list(range(len(roots))),
                    [t for _, _, t, _ in self._links] + roots,
                ],
                np.int64,
            ),
        )
        return Classes(roots=tuple(roots), starts=starts, labels=labels, frozen=reasons, bundle_of=bundles)


def _components(labels: Indices, edges: Indices) -> Indices:
    """The least label of each connected component, for every element; edges of shape (2, n).

    Hooks each root to the least neighbour's root and halves all paths, until nothing changes.
    """
    labels = labels.copy()
    first, second = edges
    while True:
        left, right = labels[first], labels[second]
        apart = left != right
        if not apart.any():
            return labels
        first, second, left, right = first[apart], second[apart], left[apart], right[apart]
        np.minimum.at(labels, np.maximum(left, right), np.minimum(left, right))
        while True:
            shorter = labels[labels]
            if np.array_equal(shorter, labels):
                break
            labels = shorter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """The solved relation: every element of every space has a class.

    Attributes:
        roots: space -> the space that stands for it.
        starts: where the elements of each root space begin in `labels`.
        labels: the class of every element.
        frozen: class -> why it has to stay.
        bundle_of: space -> the least of the spaces that it hangs together with at all.
    """

    roots: tuple[int, ...]
    starts: Indices
    labels: Indices
    frozen: dict[int, Frozen]
    bundle_of: Indices

    def of(self, space: int) -> Indices:
        """The class of each element of a space."""
        root = self.roots[space]
        return self.labels[self.starts[root] : self.starts[root + 1]]

    @property
    def count(self) -> int:
        """How many classes there are."""
        return int(self.labels.max(initial=-1)) + 1

    def kept(self, space: int, removed: npt.NDArray[np.bool_]) -> Indices:
        """The positions of a space that stay when the classes marked in `removed` (one flag each) go."""
        return np.flatnonzero(~removed[self.of(space)])

    def removable(self, classes: Iterable[int]) -> list[int]:
        """Those of the classes that nothing keeps."""
        return [label for label in classes if label not in self.frozen]


def ranged(start: int, count: int) -> Indices:
    """start, start + 1, …"""
    return np.arange(start, start + count, dtype=np.int64)


def as_indices(values: Any) -> Indices:
    """Positions as an array."""
    return np.asarray(values, np.int64)
