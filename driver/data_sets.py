"""The two data sets of a compile: what ranges are calibrated on, and what drift is measured on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..calibration.data import CalibrationData, generated_data, open_data, require_disjoint, split_data
from ..compress.cost import DEFAULT_BATCH, DEFAULT_LENGTH
from ..graph.errors import DataError, RecipeError
from ..graph.tables import index_bounds

if TYPE_CHECKING:
    from ..compress.recipe import Recipe
    from ..frontends.source import Source
    from ..graph.model import Model, TensorSpec

DATA_FREE_STAMP = "data-free"
_GENERATED_SAMPLES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSets:
    """Calibration and evaluation samples, disjoint; either may be absent.

    `stamps` mark every figure that comes of them; `notes` say what was done to them.
    """

    calibrate: CalibrationData | None = None
    evaluate: CalibrationData | None = None
    stamps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_data_sets(source: Source, recipe: Recipe, calib: str | None, evaluate: str | None) -> DataSets:
    """Open what was given; split 80/20 when only calibration data was; generate it when asked to.

    Raises:
        DataError: if data is unusable, or drift has to be measured and there is none.
    """
    if calib is None and evaluate is None:
        if recipe.data_free:
            return _generated(source.model, recipe, source.encoder.vocab_size if source.encoder else None)
        if "drift" not in recipe.skip:
            raise DataError(
                "there is no data to measure the drift on",
                why="neither --calib nor --eval was given",
                remedy="pass --calib DATA (an .npz, a folder, a .txt/.jsonl/.csv of texts), or --data-free "
                "for made-up inputs (every figure is stamped), or --skip drift",
            )
        return DataSets()

    def opened(path: str, samples: int | None) -> CalibrationData:
        return open_data(
            path,
            source.model.inputs,
            encoder=source.encoder,
            samples=samples,
            seed=recipe.seed,
            shapes=recipe.shapes,
            classes=source.model.task.classes,
            preprocessor=source.files.get("preprocessor_config.json"),
        )

    if calib is None:
        assert evaluate is not None
        return DataSets(evaluate=opened(evaluate, None))
    calibrate = opened(calib, recipe.samples)
    if evaluate is not None:
        calibrate, held_out, removed = require_disjoint(calibrate, opened(evaluate, None))
        note = (
            (f"{removed} calibration samples also stand in the evaluation data: left out",) if removed else ()
        )
        return DataSets(
            calibrate=calibrate, evaluate=held_out, notes=(*calibrate.notes, *held_out.notes, *note)
        )
    if len(calibrate) < 2:
        raise DataError(
            "one sample cannot serve calibration and evaluation both",
            where=calibrate.name,
            why="drift is measured on data that was not used for calibration",
            remedy="pass more samples, or others with --eval",
        )
    kept, held_out = split_data(calibrate, seed=recipe.seed)
    return DataSets(calibrate=kept, evaluate=held_out, notes=kept.notes)


def _generated(model: Model, recipe: Recipe, vocab_size: int | None) -> DataSets:
    total = recipe.samples or _GENERATED_SAMPLES
    made = generated_data(
        model.inputs,
        input_shapes(model, recipe),
        max(total, 2),
        recipe.seed,
        index_limits=index_bounds(model),
        vocab_size=vocab_size,
    )
    kept, held_out = split_data(made, seed=recipe.seed)
    return DataSets(calibrate=kept, evaluate=held_out, stamps=(DATA_FREE_STAMP,))


def check_shapes(model: Model, recipe: Recipe) -> None:
    """Hold the shapes that were asked for against the model's inputs.

    Raises:
        RecipeError: if a name is no input, or a shape contradicts a fixed axis.
    """
    known = {spec.name: spec for spec in model.inputs}
    takes = ", ".join(f"{spec.name!r} of {_dims(spec)}" for spec in model.inputs)
    for name, shape in recipe.shapes.items():
        spec = known.get(name)
        if spec is None:
            raise RecipeError(
                f"the model has no input {name!r}", where="--shape", remedy=f"the inputs are {takes}"
            )
        dims = spec.shape
        fits = dims is None or (
            len(dims) == len(shape)
            and all(size == dim for size, dim in zip(shape, dims, strict=True) if isinstance(dim, int))
        )
        if not fits:
            raise RecipeError(
                f"input {name!r} does not take the shape {'x'.join(map(str, shape))}",
                where="--shape",
                why=f"the model fixes it to {_dims(spec)}",
                remedy="give a size for every axis, and the model's own where it is fixed",
            )


def _dims(spec: TensorSpec) -> str:
    if spec.shape is None:
        return "any shape"
    return "x".join("?" if dim is None else str(dim) for dim in spec.shape)


def input_shapes(model: Model, recipe: Recipe, longest: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes for generated inputs and timing: the recipe's, else batch 1 and 128 on other dynamic axes.

    Args:
        model: gives inputs and axes.
        recipe: `shapes` fixes inputs by name; axes of the same name follow.
        longest: a shorter limit than 128 for sequences, if the tokenizer has one.
    """
    length = min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    named: dict[str, int] = {}
    for spec in model.inputs:
        for dim, size in zip(spec.shape or (), recipe.shapes.get(spec.name, ()), strict=False):
            if isinstance(dim, str):
                named[dim] = size
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
