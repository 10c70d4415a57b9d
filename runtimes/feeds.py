"""Compare arrays with what a model's inputs declare, before a runtime sees them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from ..graph.errors import DataError
from ..graph.model import TensorSpec
from .base import Array

_HALVES = frozenset({"float16", "bfloat16"})


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


def fit_floats(specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds with float32 arrays rounded to the 16-bit floats that inputs declare, and halves widened.

    Everything else goes through as it is, to be judged by `check_feeds`.

    Args:
        specs: the model's inputs.
        feeds: arrays by name, of any shape.

    Raises:
        DataError: if a finite value lies beyond the declared type's largest number.
    """
    declared = {spec.name: spec.dtype for spec in specs}
    return {name: _fitted(name, declared.get(name, ""), value) for name, value in feeds.items()}


def widen_floats(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays with 16-bit floats as float32, which holds each of them exactly."""
    return {
        name: values.astype(np.float32) if values.dtype.name in _HALVES else values
        for name, values in arrays.items()
    }


def _fitted(name: str, declared: str, value: Array) -> Array:
    if value.dtype.name == declared or {value.dtype.name, declared} - {"float32", *_HALVES}:
        return value
    if declared == "bfloat16":
        import ml_dtypes

        wanted = np.dtype(ml_dtypes.bfloat16)
    else:
        wanted = np.dtype(declared)
    with np.errstate(over="ignore"):
        made = value.astype(wanted)
    lost = int(np.count_nonzero(np.isfinite(value) & ~np.isfinite(made)))
    if lost:
        raise DataError(
            f"{lost} values of input {name!r} lie beyond {declared}",
            where=name,
            why=f"the model takes {declared}, and the largest magnitude given is {np.abs(value).max():.4g}",
            remedy="scale the input, or compile with --io-dtype fp32",
        )
    return made


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
