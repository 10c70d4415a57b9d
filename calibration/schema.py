"""Fitting arrays to a model's inputs: dtype, rank, static dimensions, finite values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError, NotSupported
from ..graph.model import TensorSpec

Array = npt.NDArray[Any]
Feeds = dict[str, Array]


def near_names(wanted: str, known: Iterable[str]) -> str:
    """A hint " (did you mean 'x'?)" where a known name is close to `wanted`, else ""."""
    close = difflib.get_close_matches(wanted, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def quoted(names: Iterable[str]) -> str:
    """Names as a comma-separated list in quotes, or "none"."""
    return ", ".join(repr(name) for name in names) or "none"


def numpy_type(spec: TensorSpec) -> np.dtype[Any] | None:
    """The NumPy type of an input, None where the model does not say.

    Raises:
        NotSupported: if NumPy cannot hold the type (bfloat16, float8, int4).
    """
    if spec.dtype == "unknown":
        return None
    if spec.dtype == "string":
        return np.dtype(np.str_)
    try:
        return np.dtype(spec.dtype)
    except TypeError as error:
        raise NotSupported(
            f"input {spec.name!r} has type {spec.dtype}, which calibration data cannot hold",
            remedy="give the model float32 or integer inputs",
        ) from error


def check_layout(shape: Sequence[int], dtype: np.dtype[Any], spec: TensorSpec, where: str) -> None:
    """Raise unless arrays of `shape` (batch axis included) and `dtype` can feed the input.

    Raises:
        DataError: if the type is of another kind, or the rank or a static dimension differs; the
            remedy names the NumPy call for channels-last images and for a missing axis.
    """
    target = numpy_type(spec)
    bad_type = target is not None and not _same_kind(dtype, target)
    bad_shape = spec.shape is not None and not _fits(shape, spec.shape)
    if not (bad_type or bad_shape):
        return
    raise DataError(
        f"data for input {spec.name!r} is {dtype.name} {_dims(shape)}, "
        f"but the model takes {spec.dtype} {_dims(spec.shape)}",
        where=where,
        why=_layout_cause(shape, dtype, spec, bad_type=bad_type, bad_shape=bad_shape),
        remedy=_layout_remedy(shape, spec, bad_type=bad_type),
    )


def _same_kind(dtype: np.dtype[Any], target: np.dtype[Any]) -> bool:
    if target.kind == "f":
        return dtype.kind == "f"
    if target.kind in "iub":
        return dtype.kind in "iub"
    return dtype.kind == target.kind or (target.kind == "U" and dtype.kind == "S")


def _fits(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    """Whether a shape agrees with every static dimension but the first, which is the batch."""
    return len(shape) == len(wanted) and all(
        not isinstance(want, int) or want == have for have, want in zip(shape[1:], wanted[1:], strict=True)
    )


def _dims(shape: Sequence[int | str | None] | None) -> str:
    if shape is None:
        return "of any shape"
    return "(" + ", ".join("?" if dim is None else str(dim) for dim in shape) + ")"


def _channels_last(shape: Sequence[int], spec: TensorSpec) -> bool:
    wanted = spec.shape
    if wanted is None or len(wanted) != 4 or len(shape) != 4:
        return False
    moved = (shape[0], shape[3], shape[1], shape[2])
    return not _fits(shape, wanted) and _fits(moved, wanted)


def _missing_axis(shape: Sequence[int], spec: TensorSpec) -> bool:
    wanted = spec.shape
    return (
        wanted is not None
        and len(shape) == len(wanted) - 1
        and len(wanted) > 1
        and wanted[1] == 1
        and _fits((shape[0], 1, *shape[1:]), wanted)
    )


def _layout_cause(
    shape: Sequence[int], dtype: np.dtype[Any], spec: TensorSpec, *, bad_type: bool, bad_shape: bool
) -> str:
    causes = []
    if bad_shape:
        if _channels_last(shape, spec):
            causes.append("the images are channels-last (NHWC), the model is channels-first (NCHW)")
        elif spec.shape is not None and len(shape) != len(spec.shape):
            causes.append(f"the array has {len(shape)} axes, the input {len(spec.shape)}")
        else:
            causes.append("a dimension that the model fixes differs")
    if bad_type:
        causes.append(f"{dtype.name} is not converted to {spec.dtype} silently: scaling would be guessed")
    return "; ".join(causes)


def _layout_remedy(shape: Sequence[int], spec: TensorSpec, *, bad_type: bool) -> str:
    steps = []
    if _channels_last(shape, spec):
        steps.append("x = x.transpose(0, 3, 1, 2)")
    elif _missing_axis(shape, spec):
        steps.append("x = x[:, None]")
    if bad_type and spec.dtype.startswith("float"):
        steps.append(f"scale x as in training, e.g. x = ((x / 255 - mean) / std).astype(np.{spec.dtype})")
    elif bad_type:
        steps.append(f"x = x.astype(np.{spec.dtype})")
    if not steps:
        return f"save the array with shape {_dims(spec.shape)}, samples along the first axis"
    return "prepare the array before saving it: " + "; ".join(steps)


def fit_array(values: Array, spec: TensorSpec, where: str) -> tuple[Array, bool]:
    """Cast one sample to its input's type and check its values; also says whether float64 was rounded.

    Integers change their width only where every value survives; wider floats are rounded to the
    input's type, but never to infinity.

    Args:
        values: one sample or batch, any shape, of the input's kind (see `check_layout`).
        spec: the input.
        where: the file or sample, for messages.

    Raises:
        DataError: if a value is NaN or infinite, or does not survive the cast.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise DataError(
            f"data for input {spec.name!r} holds {bad} NaN or infinite values",
            where=where,
            remedy="remove or repair these samples",
        )
    target = numpy_type(spec)
    if target is None or values.dtype == target:
        return values, False
    if target.kind == "U":
        return values.astype(np.str_), False
    with np.errstate(over="ignore"):
        cast = values.astype(target)
    same = bool((cast == values).all())
    if not same and (target.kind != "f" or not np.isfinite(cast).all()):
        raise DataError(
            f"data for input {spec.name!r} does not fit {spec.dtype} without loss",
            where=where,
            why=f"{values.dtype.name} values lie outside what {spec.dtype} can hold",
            remedy=f"save values that {spec.dtype} can hold",
        )
    return cast, not same


def match_names(ranks: Mapping[str, int], inputs: Sequence[TensorSpec], where: str) -> dict[str, str]:
    """Which array feeds which input: a map from input name to array name.

    A model with one input takes a lone array under any name, or the only one with as many axes as
    the input (`labels` and the names of classes may lie beside it).

    Args:
        ranks: name -> number of axes of every array.
        inputs: the model's inputs.
        where: the file or sample, for messages.

    Raises:
        DataError: if an input has no array.
    """
    names = list(ranks)
    missing = [spec.name for spec in inputs if spec.name not in ranks]
    if not missing:
        return {spec.name: spec.name for spec in inputs}
    if len(inputs) == 1:
        free = [name for name in names if name != "labels"]
        wanted = inputs[0].shape
        alike = [name for name in free if wanted is not None and ranks[name] == len(wanted) > 1]
        if len(free) == 1 or len(alike) == 1:
            return {inputs[0].name: (free if len(free) == 1 else alike)[0]}
    raise DataError(
        f"no data for input {missing[0]!r}{near_names(missing[0], names)}",
        where=where,
        why=f"the model's inputs are {quoted(spec.name for spec in inputs)}; the data holds {quoted(names)}",
        remedy="name the arrays like the model's inputs: np.savez(file, input_name=array)",
    )
