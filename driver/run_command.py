"""`edgepress run`: feed a bundle with the arrays of a file."""

from __future__ import annotations

import argparse
import secrets
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError, OutputError, RecipeError
from .output import Answer, Table
from .reporter import Reporter

Arrays = dict[str, npt.NDArray[Any]]


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Run the bundle once; write the outputs to a file or describe them.

    Raises:
        DataError: if the inputs' file cannot be read or does not fit the model.
        OutputError: if the outputs' file exists or cannot be written.
        ModelError: if the folder is not a bundle.
    """
    from ..export.load import load

    if arguments.inputs is None:
        raise RecipeError(
            "no inputs are named",
            where="--inputs",
            remedy="give --inputs FILE.npz with one array for every input",
        )
    place = None if arguments.output is None else Path(arguments.output)
    if place is not None:
        _require_free(place, overwrite=arguments.overwrite)
    inputs = _read_arrays(Path(arguments.inputs))
    with reporter.stage("run"), load(arguments.bundle, threads=arguments.threads) as model:
        outputs = model(**inputs)
    described = {name: _describe(values) for name, values in outputs.items()}
    if place is not None:
        _write_arrays(place, outputs)
    rows = tuple((name, *(str(cell) for cell in entry.values())) for name, entry in described.items())
    return Answer(
        document={"outputs": described, "file": place},
        blocks=(
            Table(columns=("output", "type", "shape", "smallest", "largest", "mean"), rows=rows),
            *((f"Written to {place}.",) if place is not None else ()),
        ),
    )


def _require_free(place: Path, *, overwrite: bool) -> None:
    if place.is_dir() or (place.exists() and not overwrite):
        raise OutputError(
            "the output already exists",
            where=str(place),
            remedy="choose another file" + ("" if place.is_dir() else ", or add --overwrite"),
        )


def _read_arrays(path: Path) -> Arrays:
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            raise DataError(
                "the inputs' file holds one array without a name",
                where=str(path),
                remedy="save it as .npz: np.savez(file, INPUT_NAME=array)",
            )
        with stored as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise DataError(
            "the inputs' file does not exist", where=str(path), remedy="check the path given to --inputs"
        ) from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            "the inputs' file cannot be read",
            where=str(path),
            why=str(error),
            remedy="give an .npz file of numeric arrays, as np.savez writes it",
        ) from error


def _write_arrays(place: Path, arrays: Arrays) -> None:
    """Write an .npz file whole or not at all."""
    from ..export.npz import npz_bytes
    from ..export.place import disk_errors

    part = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    with disk_errors(place):
        try:
            with part.open("xb") as file:
                file.write(npz_bytes(arrays))
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)


def _describe(values: npt.NDArray[Any]) -> dict[str, object]:
    """Type, shape and, for numbers, smallest, largest and mean value ("" where there is none)."""
    described: dict[str, object] = {"type": values.dtype.name, "shape": list(values.shape)}
    numeric = values.dtype.kind in "iuf" and values.size > 0
    for name, reduce in (("smallest", np.min), ("largest", np.max), ("mean", np.mean)):
        described[name] = float(f"{float(reduce(values)):.6g}") if numeric else ""
    return described
