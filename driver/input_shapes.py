"""The shapes of a model's inputs: as asked for, checked against the model, and filled up where not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ..compress.cost import DEFAULT_BATCH, DEFAULT_LENGTH
from ..compress.recipe import ShapeRange
from ..graph.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..compress.recipe import Recipe, Shape
    from ..graph.model import Model, TensorSpec


def check_shapes(model: Model, recipe: Recipe) -> None:
    """Hold the shapes and ranges that were asked for against the model's inputs.

    Raises:
        RecipeError: if a name is no input, a shape contradicts a fixed axis, or two inputs give one
            axis different sizes.
    """
    known = {spec.name: spec for spec in model.inputs}
    takes = ", ".join(f"{spec.name!r} of {_dims(spec)}" for spec in model.inputs)
    for shapes in _all_shapes(recipe):
        sizes: dict[str, tuple[int, str]] = {}
        for name, shape in shapes.items():
            spec = known.get(name)
            if spec is None:
                raise RecipeError(
                    f"the model has no input {name!r}", where="--shape", remedy=f"the inputs are {takes}"
                )
            _check_shape(spec, shape)
            for axis, size in zip(spec.shape or (), shape, strict=False):
                other = sizes.setdefault(axis, (size, name)) if isinstance(axis, str) else (size, name)
                if other[0] != size:
                    raise RecipeError(
                        f"the axis {axis!r} has two sizes",
                        where="--shape",
                        why=f"it is {other[0]} in {other[1]!r} and {size} in {name!r}",
                        remedy="give both inputs the same size there, or leave one of them out: it follows",
                    )


def _all_shapes(recipe: Recipe) -> list[Mapping[str, Shape]]:
    """The usual shapes, the least ones and the largest ones, as they were asked for."""
    ranges = recipe.shape_ranges
    least = {name: ranges[name].min if name in ranges else shape for name, shape in recipe.shapes.items()}
    most = {name: ranges[name].max if name in ranges else shape for name, shape in recipe.shapes.items()}
    return [recipe.shapes, least, most] if ranges else [recipe.shapes]


def _check_shape(spec: TensorSpec, shape: Shape) -> None:
    dims = spec.shape
    fits = dims is None or (
        len(dims) == len(shape)
        and all(size == dim for size, dim in zip(shape, dims, strict=True) if isinstance(dim, int))
    )
    if not fits:
        raise RecipeError(
            f"input {spec.name!r} does not take the shape {'x'.join(map(str, shape))}",
            where="--shape",
            why=f"the model fixes it to {_dims(spec)}",
            remedy="give a size for every axis, and the model's own where it is fixed",
        )


def _dims(spec: TensorSpec) -> str:
    if spec.shape is None:
        return "any shape"
    return "x".join("?" if dim is None else str(dim) for dim in spec.shape)


def input_shapes(model: Model, recipe: Recipe, longest: int | None = None) -> dict[str, Shape]:
    """Shapes for generated inputs and timing: the recipe's, else batch 1 and 128 on other dynamic axes.

    Args:
        model: gives inputs and axes.
        recipe: `shapes` fixes inputs by name; axes of the same name follow.
        longest: a shorter limit than 128 for sequences, if the tokenizer has one.
    """
    length = min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    named = _named_axes(model, recipe.shapes)
    shapes = {}
    for spec in model.inputs:
        given = recipe.shapes.get(spec.name)
        if given is not None:
            shapes[spec.name] = given
            continue
        dims = [
            dim if isinstance(dim, int) else named.get(str(dim), DEFAULT_BATCH if place == 0 else length)
            for place, dim in enumerate(spec.shape or ())
        ]
        shapes[spec.name] = tuple(dims)
    return shapes


def _named_axes(model: Model, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Name of a dynamic axis -> its size, from the inputs that have a shape."""
    return {
        dim: size
        for spec in model.inputs
        for dim, size in zip(spec.shape or (), shapes.get(spec.name, ()), strict=False)
        if isinstance(dim, str)
    }


def shape_ranges(model: Model, recipe: Recipe) -> dict[str, ShapeRange]:
    """The ranges that were asked for, and those of inputs all of whose free axes follow them by name.

    Empty without a range in the recipe.
    """
    if not recipe.shape_ranges:
        return {}
    axes = set(_named_axes(model, {name: recipe.shapes[name] for name in recipe.shape_ranges}))
    least, most = (
        input_shapes(model, msgspec.structs.replace(recipe, shapes=shapes, shape_ranges={}))
        for shapes in _all_shapes(recipe)[1:]
    )
    found = {}
    for spec in model.inputs:
        free = {dim for dim in spec.shape or () if not isinstance(dim, int)}
        if spec.name in recipe.shape_ranges or (free and free <= axes and spec.name not in recipe.shapes):
            found[spec.name] = ShapeRange(min=least[spec.name], max=most[spec.name])
    return found


def extreme_shapes(model: Model, recipe: Recipe) -> list[dict[str, Shape]]:
    """The least, usual and largest shapes of all inputs; empty without a range in the recipe."""
    ranges = shape_ranges(model, recipe)
    if not ranges:
        return []
    usual = input_shapes(model, recipe)
    least = {name: ranges[name].min if name in ranges else shape for name, shape in usual.items()}
    most = {name: ranges[name].max if name in ranges else shape for name, shape in usual.items()}
    return [least, usual, most]
