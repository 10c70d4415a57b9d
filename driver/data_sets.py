"""The two data sets of a compile: what ranges are calibrated on, and what drift is measured on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..calibration.data import CalibrationData, generated_data, open_data, require_disjoint, split_data
from ..graph.errors import DataError
from ..graph.tables import index_bounds
from .input_shapes import input_shapes, shape_ranges

if TYPE_CHECKING:
    from ..calibration.cache_file import CalibratedOn
    from ..compress.recipe import Recipe
    from ..frontends.source import Source
    from ..graph.model import Model
    from .calib_cache import CalibCache

DATA_FREE_STAMP = "data-free"
_GENERATED_SAMPLES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSets:
    """Calibration and evaluation samples, disjoint; either may be absent.

    `cached` is what a calibration cache was made of, where there is one and no calibration data.
    `stamps` mark every figure that comes of them; `notes` say what was done to them.
    """

    calibrate: CalibrationData | None = None
    evaluate: CalibrationData | None = None
    cached: CalibratedOn | None = None
    stamps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether anything is known about activations: from data, or from a cache."""
        return self.calibrate is not None or self.cached is not None

    @property
    def calibration_digest(self) -> str | None:
        """The digest of the data that ranges come of."""
        if self.calibrate is not None:
            return self.calibrate.digest
        return None if self.cached is None else self.cached.digest


def open_data_sets(
    source: Source,
    recipe: Recipe,
    calib: str | None,
    evaluate: str | None,
    cache: CalibCache | None = None,
) -> DataSets:
    """Open what was given; split 80/20 when only calibration data was; generate it when asked to.

    A calibration cache that was there stands in for calibration data; without evaluation data no drift
    is measured then.

    Raises:
        DataError: if data is unusable, or drift has to be measured and there is none.
    """
    cached = None if cache is None or cache.known is None else cache.known.data
    stamps = (DATA_FREE_STAMP,) if cached is not None and cached.origin == "generated" else ()
    if calib is None and evaluate is None:
        if recipe.data_free:
            return _generated(source.model, recipe, source.encoder.vocab_size if source.encoder else None)
        if cached is not None:
            return DataSets(cached=cached, stamps=stamps)
        if cache is not None:
            raise cache.absent()
        if "drift" not in recipe.skip:
            raise DataError(
                "there is no data to measure the drift on",
                why="neither --calib nor --eval was given",
                remedy="pass --calib DATA (an .npz, a folder, a .txt/.jsonl/.csv of texts), or --data-free "
                "for made-up inputs (every figure is stamped), or --skip drift",
            )
        return DataSets()

    ranges = {name: (item.min, item.max) for name, item in shape_ranges(source.model, recipe).items()}

    def opened(path: str, samples: int | None) -> CalibrationData:
        return open_data(
            path,
            source.model.inputs,
            encoder=source.encoder,
            samples=samples,
            seed=recipe.seed,
            shapes=recipe.shapes,
            shape_ranges=ranges,
            classes=source.model.task.classes,
            preprocessor=source.files.get("preprocessor_config.json"),
        )

    if calib is None:
        assert evaluate is not None
        held_out = opened(evaluate, recipe.eval_samples)
        return DataSets(evaluate=held_out, cached=cached, stamps=stamps, notes=held_out.notes)
    calibrate = opened(calib, recipe.samples)
    if evaluate is not None:
        calibrate, held_out, removed = require_disjoint(calibrate, opened(evaluate, recipe.eval_samples))
        note = (
            (f"{removed} calibration samples also stand in the evaluation data: left out",) if removed else ()
        )
        return DataSets(
            calibrate=calibrate, evaluate=held_out, notes=(*calibrate.notes, *held_out.notes, *note)
        )
    if "drift" in recipe.skip:  # nothing is measured on held-out data, so none is held out
        return DataSets(calibrate=calibrate, notes=calibrate.notes)
    if len(calibrate) < 2:
        raise DataError(
            "one sample cannot serve calibration and evaluation both",
            where=calibrate.name,
            why="drift is measured on data that was not used for calibration",
            remedy="pass more samples, or others with --eval",
        )
    kept, held_out = split_data(calibrate, seed=recipe.seed)
    if recipe.eval_samples is not None:
        held_out = held_out.select(range(min(len(held_out), recipe.eval_samples)), "evaluate")
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
