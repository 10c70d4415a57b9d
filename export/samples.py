"""Inputs made from a seed: shapes from a model's dynamic axes, indices inside their tables."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..graph.errors import ModelError
from ..graph.model import Model, TensorSpec
from ..graph.tables import index_bounds

Array = npt.NDArray[np.generic]
Feeds = dict[str, Array]

_BATCHES = (1, 3, 2)
# (lengths of sequence-like axes, sizes of the spatial axes of images), tried in this order: not
# every graph takes short sequences or small images.
_SIZES = (((16, 9, 24), (64, 96, 64)), ((128, 64, 96), (224, 256, 192)), ((1, 1, 1), (32, 32, 32)))
_PROBE_LENGTHS = (64, 128, 32, 96, 48, 112, 24, 80)
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog")


def candidate_inputs(
    model: Model, *, seed: int, count: int = 3, shapes: Mapping[str, Sequence[int]] | None = None
) -> Iterator[tuple[Feeds, ...]]:
    """Sets of `count` generated samples with different batch and length sizes, likeliest first.

    Floats are standard normal, indices uniform inside their table, masks one with a padded end
    in the later rows, other integers 0 or 1, uint8 images 0 to 255.

    Args:
        model: gives names, types, shapes, and the tables that integer inputs index.
        seed: equal seeds give equal samples.
        count: samples in each set.
        shapes: input name → sizes that dynamic axes take instead of the defaults (the batch axis
            still varies from sample to sample).

    Raises:
        ModelError: if an input has no known type or rank, or is no tensor of numbers or text.
    """
    for lengths, spatial in _SIZES:
        yield _samples(model, seed, range(count), sizes=(lengths, spatial), shapes=shapes or {})


def inputs_of_shapes(
    model: Model, shapes: Sequence[Mapping[str, Sequence[int]]], *, seed: int
) -> tuple[Feeds, ...]:
    """One generated sample for each entry of `shapes`, which gives every input its whole shape.

    Raises:
        ModelError: if an input is no tensor of numbers or text.
    """
    bounds = index_bounds(model)
    return tuple(
        {
            spec.name: _values(spec, tuple(entry[spec.name]), bounds.get(spec.name), _rng(spec, seed, index))
            for spec in model.inputs
        }
        for index, entry in enumerate(shapes)
    )


def _rng(spec: TensorSpec, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, zlib.crc32(spec.name.encode())])


def probe_inputs(
    model: Model, *, seed: int, shapes: Mapping[str, Sequence[int]] | None = None
) -> tuple[Feeds, ...]:
    """Eight further samples, mostly longer than the golden ones; not every model takes them all.

    Raises:
        ModelError: as `candidate_inputs`.
    """
    sizes = (_PROBE_LENGTHS, _SIZES[0][1])
    return _samples(model, seed, range(len(_PROBE_LENGTHS)), sizes=sizes, shapes=shapes or {})


def _samples(
    model: Model,
    seed: int,
    indices: Iterable[int],
    *,
    sizes: tuple[Sequence[int], Sequence[int]],
    shapes: Mapping[str, Sequence[int]],
) -> tuple[Feeds, ...]:
    bounds = index_bounds(model)
    samples = []
    for index in indices:
        feeds = {}
        for spec in model.inputs:
            shape = _shape(spec, index, sizes, shapes.get(spec.name))
            feeds[spec.name] = _values(spec, shape, bounds.get(spec.name), _rng(spec, seed, index))
        samples.append(feeds)
    return tuple(samples)


def _shape(
    spec: TensorSpec,
    sample: int,
    defaults: tuple[Sequence[int], Sequence[int]],
    fixed: Sequence[int] | None,
) -> tuple[int, ...]:
    if spec.shape is None:
        raise ModelError(
            "an input has no known rank, so no golden sample can be generated for it",
            where=f"input {spec.name!r}",
            remedy="give its shape with --shape, use your own data with --golden data, or --skip golden",
        )
    is_image = len(spec.shape) >= 4 and spec.dtype in {"float32", "float16", "uint8"}
    sizes = []
    for axis, dimension in enumerate(spec.shape):
        if isinstance(dimension, int):
            sizes.append(dimension)
        elif axis == 0:
            first = fixed[0] if fixed and len(fixed) == len(spec.shape) else 1
            sizes.append((first, *_BATCHES[1:])[sample % len(_BATCHES)])
        elif fixed is not None and len(fixed) == len(spec.shape):
            sizes.append(fixed[axis])
        else:
            table = defaults[1 if is_image else 0]
            sizes.append(table[sample % len(table)])
    return tuple(sizes)


def _values(spec: TensorSpec, shape: tuple[int, ...], bound: int | None, rng: np.random.Generator) -> Array:
    is_mask = "mask" in spec.name.lower() and bound is None
    if spec.dtype == "string":
        return np.asarray(rng.choice(np.array(_WORDS), size=shape), dtype=object)
    dtype = _numpy_dtype(spec)
    if is_mask and (dtype.kind in "biu"):
        return _mask(shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, size=shape).astype(dtype)
    if dtype.kind in "iu":
        high = bound or (256 if dtype == np.uint8 else 2)
        return rng.integers(0, high, size=shape).astype(dtype)
    return rng.standard_normal(size=shape).astype(dtype)


def _mask(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Ones; in every row but the first of the batch the last third of the last axis is zero."""
    mask = np.ones(shape, np.int64)
    if len(shape) >= 2 and shape[-1] >= 3:
        mask[1:, ..., shape[-1] - shape[-1] // 3 :] = 0
    return mask


def _numpy_dtype(spec: TensorSpec) -> np.dtype[np.generic]:
    try:
        return np.dtype(spec.dtype)
    except TypeError:
        pass
    import ml_dtypes

    extension = getattr(ml_dtypes, spec.dtype, None)
    if extension is None:
        raise ModelError(
            "an input has a type that no golden sample can be generated for",
            where=f"input {spec.name!r}",
            why=f"its type is {spec.dtype}",
            remedy="use your own data with --golden data, or --skip golden",
        )
    dtype: np.dtype[np.generic] = np.dtype(extension)
    return dtype
