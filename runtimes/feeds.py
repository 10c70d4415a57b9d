"""Compare arrays with what a model's inputs declare, before a runtime sees them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from ..graph.errors import DataError
from ..graph.model import TensorSpec
from .base import Array


def check_feeds(specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds in the model's order, each of the declared type and shape.

    Args:
        specs: the model's inputs; named and unknown axes take any size.
        feeds: one array per input.

    Raises:
        DataError: if an input is missing or unknown, or its type, rank or a fixed axis differs.
    """
    known = [spec.name for spec in specs]
    unknown = [name for name in feeds if name not in known]
    missing = [name for name in known if name not in feeds]
    if unknown or missing:
        raise _wrong_names(known, unknown, missing)
    return {spec.name: _checked(spec, feeds[spec.name]) for spec in specs}


def describe(spec: TensorSpec) -> str:
    """An input as a person writes it: `float32[batch, 3, 32, 32]`."""
    if spec.shape is None:
        return f"{spec.dtype} of any shape"
    return f"{spec.dtype}[{', '.join('?' if dim is None else str(dim) for dim in spec.shape)}]"


def _wrong_names(known: list[str], unknown: list[str], missing: list[str]) -> DataError:
    parts = []
    if missing:
        parts.append(f"missing: {', '.join(missing)}")
    if unknown:
        parts.append(f"not an input: {', '.join(unknown)}")
    lowered = {name.lower(): name for name in missing}
    near = {name: difflib.get_close_matches(name.lower(), lowered, n=1) for name in unknown}
    renames = [f"{name} -> {lowered[match[0]]}" for name, match in near.items() if match]
    return DataError(
        "the inputs given are not the model's inputs",
        where=", ".join(missing or unknown),
        why="; ".join(parts),
        remedy=f"rename {', '.join(renames)}"
        if renames
        else f"the model takes: {', '.join(known) or 'none'}",
    )


def _checked(spec: TensorSpec, value: Array) -> Array:
    array = np.asarray(value)
    wanted = "string" if spec.dtype == "string" else spec.dtype
    given = "string" if array.dtype.kind in "UOS" else array.dtype.name
    if given != wanted:
        raise DataError(
            f"input {spec.name!r} has the wrong type",
            where=spec.name,
            why=f"the model takes {describe(spec)}, the array is {given}",
            remedy=f"convert it: array.astype({wanted!r})",
        )
    if spec.shape is None:
        return array
    if array.ndim != len(spec.shape):
        raise DataError(
            f"input {spec.name!r} has {array.ndim} axes instead of {len(spec.shape)}",
            where=spec.name,
            why=f"the model takes {describe(spec)}, the array has shape {list(array.shape)}",
            remedy="add or remove axes (a single sample needs its batch axis: array[None])",
        )
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            raise DataError(
                f"axis {axis} of input {spec.name!r} has size {size} instead of {dim}",
                where=spec.name,
                why=f"the model takes {describe(spec)}, the array has shape {list(array.shape)}",
                remedy=f"give arrays with size {dim} on axis {axis}, or export the model with a dynamic axis",
            )
    return array
