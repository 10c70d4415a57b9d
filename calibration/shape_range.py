"""Ranges of input shapes: the lengths that they leave to texts, and whether samples lie inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..graph.errors import DataError
from .text import Lengths

if TYPE_CHECKING:
    from .data import CalibrationData

ShapeRanges = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Input name -> (least shape, largest shape)."""


def lengths_of(shapes: Mapping[str, tuple[int, ...]], ranges: ShapeRanges) -> Lengths:
    """The sequence lengths that inputs of shape (batch, tokens) leave to texts."""
    fixed = [shape[1] for name, shape in shapes.items() if len(shape) == 2 and name not in ranges]
    limits = [(least[1], most[1]) for least, most in ranges.values() if len(most) == 2]
    return Lengths(
        least=max((least for least, _ in limits), default=1),
        most=min([*fixed, *(most for _, most in limits)], default=None),
    )


def require_inside(data: CalibrationData, ranges: ShapeRanges) -> None:
    """Raise unless every sample's shapes lie inside the ranges; the batch axis does not count.

    Args:
        data: samples with batch axis 1.
        ranges: input name -> (least shape, largest shape).

    Raises:
        DataError: naming the first sample and input that lie outside.
    """
    for number, feeds in enumerate(data):
        for name, (least, most) in ranges.items():
            shape = feeds[name].shape
            inside = len(shape) == len(least) and all(
                low <= size <= high for low, size, high in zip(least[1:], shape[1:], most[1:], strict=True)
            )
            if not inside:
                raise DataError(
                    f"a sample of input {name!r} lies outside its range of shapes",
                    where=f"{data.name}, sample {data.positions[number]}",
                    why=f"its shape is {_times(shape)}, the range is {_times(least)} to {_times(most)}",
                    remedy="widen the range given with --shape, or leave such samples out",
                )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
