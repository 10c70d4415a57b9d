"""Made-up inputs for `--data-free`, and what may be fed to an integer input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..graph.errors import DataError, NotSupported
from ..graph.model import TensorSpec
from .schema import Array, Feeds, near_names, numpy_type, quoted
from .source import content_key, stack


class RandomSource:
    """Random samples that depend only on the seed and the position; nothing is stored.

    Args:
        shapes: the full shape of each input, with batch axis 1.
        limits: the exclusive upper bound of each integer input's values.
        ranges: the (low, high) of float inputs, uniform; standard normal where absent.
    """

    sequential = False
    uniform = True
    padding = "none (generated at full length)"

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        shapes: Mapping[str, tuple[int, ...]],
        seed: int,
        limits: Mapping[str, int],
        ranges: Mapping[str, tuple[float, float]],
    ) -> None:
        self._inputs = inputs
        self._shapes = shapes
        self._seed = seed
        self._limits = limits
        self._ranges = ranges

    def read(self, positions: Sequence[int], batch_size: int) -> Iterator[Feeds]:
        """Feeds of `batch_size` samples at a time."""
        for start in range(0, len(positions), batch_size):
            chunk = positions[start : start + batch_size]
            yield stack([self.sample(int(position)) for position in chunk], "generated data")

    def sample(self, position: int) -> Feeds:
        """Sample `position`, with batch axis 1."""
        random = np.random.default_rng([self._seed, position])
        return {spec.name: self._values(spec, random) for spec in self._inputs}

    def key(self, position: int) -> bytes:
        """SHA-256 of sample `position`."""
        return content_key(self.sample(position))

    def _values(self, spec: TensorSpec, random: np.random.Generator) -> Array:
        shape, dtype, name = self._shapes[spec.name], np.dtype(spec.dtype), spec.name.lower()
        if dtype.kind == "f":
            low, high = self._ranges.get(spec.name, (0.0, 0.0))
            drawn = random.uniform(low, high, shape) if high > low else random.standard_normal(shape)
            return drawn.astype(dtype)
        if dtype.kind == "b" or "mask" in name:
            return np.ones(shape, dtype)
        if "token_type" in name or "segment" in name:
            return np.zeros(shape, dtype)
        if "position" in name:
            return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape or (1,)).astype(dtype).copy()
        return random.integers(0, self._limits[spec.name], shape).astype(dtype)


def generated_source(
    inputs: Sequence[TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    *,
    ranges: Mapping[str, tuple[float, float]],
    index_limits: Mapping[str, int],
    vocab_size: int | None,
) -> RandomSource:
    """A source of made-up samples: ids inside the vocabulary, masks one, token types zero.

    Raises:
        DataError: if an input's shape is not known in full, or a name in `shapes` is no input.
        NotSupported: for string inputs.
    """
    for spec in inputs:
        kind = numpy_type(spec)
        if kind is None or kind.kind not in "fiub":
            raise NotSupported(
                f"inputs of type {spec.dtype} are not generated",
                where=f"input {spec.name!r}",
                remedy="pass real data with --calib",
            )
    full = {name: (1, *shape[1:]) if shape else () for name, shape in resolve_shapes(inputs, shapes).items()}
    # Where no table bounds an integer input and no vocabulary is known, only 0 and 1 are safe.
    fallback = vocab_size or 2
    limits = {spec.name: index_limits.get(spec.name, fallback) for spec in inputs}
    return RandomSource(inputs, full, seed, limits, ranges)


def resolve_shapes(
    inputs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The full shape of every input: batch 1, static sizes, `shapes`, and axes of the same name.

    Raises:
        DataError: if a dynamic axis is left without a size, or `shapes` contradicts the model.
    """
    by_name = {spec.name: spec for spec in inputs}
    for name, shape in shapes.items():
        if name not in by_name:
            raise DataError(
                f"--shape names {name!r}, which is no input{near_names(name, by_name)}",
                remedy=f"the model's inputs are {quoted(by_name)}",
            )
        wanted = by_name[name].shape
        if wanted is not None and not _agrees(shape, wanted):
            raise DataError(f"shape {shape} does not fit input {name!r}", why=f"the model takes {wanted}")
    axes: dict[str, int] = {}
    for name, shape in shapes.items():
        named = by_name[name].shape or ()
        axes.update({axis: size for axis, size in zip(named, shape, strict=False) if isinstance(axis, str)})
    return {spec.name: _full_shape(spec, shapes, axes) for spec in inputs}


def _agrees(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    return len(shape) == len(wanted) and all(
        size >= 1 and (not isinstance(want, int) or want == size)
        for size, want in zip(shape, wanted, strict=True)
    )


def _full_shape(
    spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, int]
) -> tuple[int, ...]:
    given = shapes.get(spec.name)
    template = spec.shape if given is None else given
    sizes: list[int] = []
    for index, axis in enumerate(template or ()):
        if index == 0 and not (spec.shape and isinstance(spec.shape[0], int)):
            sizes.append(1)
        elif isinstance(axis, int):
            sizes.append(axis)
        elif isinstance(axis, str) and axis in axes:
            sizes.append(axes[axis])
        else:
            raise _unknown_size(spec)
    if template is None:
        raise _unknown_size(spec)
    return tuple(sizes)


def _unknown_size(spec: TensorSpec) -> DataError:
    example = "x".join(str(axis) if isinstance(axis, int) else "1" for axis in spec.shape or (1, 128))
    return DataError(
        f"input {spec.name!r} has a dynamic axis whose size is not known",
        why=f"the model declares {spec.shape}",
        remedy=f"pass --shape {spec.name}:{example} with the sizes that will be used",
    )
