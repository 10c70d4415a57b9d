"""Golden samples: inputs with the outputs they gave when the bundle was made, and how far off is fine.

A quantized network is chaotic at float noise: one rounding moves one 8-bit value, the next layer's
scale follows. So what is asked of another machine is a distance, measured at compile time between
lowerings of the very same file that are numerically equal (onnxruntime's optimizations on and off).
"""

from __future__ import annotations

import dataclasses
import io
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError, EdgepressError, ModelError
from ..graph.model import Model, TensorSpec
from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import OrtSession
from .manifest import (
    GoldenRecord,
    GoldenSample,
    GraphOptimizationLevel,
    OutputTolerance,
    SessionSettings,
)
from .samples import Array, Feeds, candidate_inputs

Numerics = Literal["float32", "float16", "bfloat16", "int8"]

_MARGIN = 4.0
# The least that is allowed, whatever was measured: relative L2, and the fraction of differing
# integers. float32: other summation orders. 16-bit floats: a few roundings of their own (fp16
# arithmetic was seen 0.016 apart between two cores). int8: one step of the 8-bit grid.
_FLOORS: dict[Numerics, tuple[float, float]] = {
    "float32": (1e-4, 0.0),
    "float16": (2e-2, 0.02),
    "bfloat16": (5e-2, 0.05),
    "int8": (1 / 127, 0.05),
}
_UNREPEATABLE_L2 = 0.5
_QUANTIZING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QAttention", "DynamicQuantizeMatMul"})
_EPOCH = (1980, 1, 1, 0, 0, 0)
METHOD = (
    f"{_MARGIN:g} x the largest drift between onnxruntime's sessions of this file with graph "
    "optimizations as configured and at lower levels, not below a floor for the arithmetic in use"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenSet:
    """Golden samples in memory, (inputs, outputs) each, with the record for the manifest."""

    samples: tuple[tuple[Feeds, Feeds], ...]
    record: GoldenRecord

    def files(self) -> dict[str, bytes]:
        """The files below the bundle, by relative name."""
        contents = {}
        for names, (inputs, outputs) in zip(self.record.samples, self.samples, strict=True):
            contents[names.inputs] = npz_bytes(inputs)
            contents[names.outputs] = npz_bytes(outputs)
        return contents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one output is from its record; None where a measure does not apply."""

    cosine_distance: float | None = None
    relative_l2: float | None = None
    mismatch_fraction: float | None = None
    identical: bool = False


def measure_golden(
    model: Model,
    model_file: Path,
    settings: SessionSettings,
    *,
    inputs: Sequence[Feeds] | None = None,
    seed: int = 0,
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> GoldenSet:
    """Run golden samples through the finished file and measure the tolerance of every output.

    Args:
        model: the graph that was written, for shapes, vocabulary sizes and its arithmetic.
        model_file: the file as it will be in the bundle.
        settings: the bundle's session options.
        inputs: the user's own samples; None generates them from `seed`.
        seed: for generated inputs; recorded.
        threads: threads of the recorded run.
        shapes: sizes for dynamic axes of generated inputs.

    Raises:
        ModelError: if the model runs on none of the generated inputs.
        DataError: if the user's samples are none, or the model does not run on them.
    """
    level = settings.graph_optimization_level
    reference = _session(model_file, level, settings, threads)
    samples, outputs = _run_first(model, reference, inputs, seed=seed, shapes=shapes)
    again = [reference.run(sample) for sample in samples]
    del reference
    variants = [again]
    lower = (name for name in get_args(GraphOptimizationLevel) if name != level)
    for name in (*lower, *((None,) if level is not None else ())):
        try:
            session = _session(model_file, name, settings, threads)
            variants.append([session.run(sample) for sample in samples])
        except EdgepressError:
            continue  # some levels cannot place every operator; the others still measure
    record = GoldenRecord(
        source="generated" if inputs is None else "data",
        seed=seed,
        threads=threads,
        samples=tuple(
            GoldenSample(inputs=f"golden/inputs_{index:03}.npz", outputs=f"golden/outputs_{index:03}.npz")
            for index in range(len(samples))
        ),
        numerics=(numerics := arithmetic(model)),
        method=METHOD,
        tolerances=tuple(_tolerance(spec.name, outputs, variants, numerics) for spec in model.outputs),
    )
    return GoldenSet(samples=tuple(zip(samples, outputs, strict=True)), record=record)


def arithmetic(model: Model) -> Numerics:
    """The coarsest arithmetic in a graph: 8-bit integers, then bfloat16, float16, float32."""
    types = set()
    for graph in model.all_graphs():
        for node in graph:
            if node.op_type in _QUANTIZING or "Integer" in node.op_type or node.op_type.startswith("QLinear"):
                return "int8"
            types |= {value.dtype.name for value in node.outputs if value.dtype is not None}
        types |= {value.dtype.name for value in graph.initializers.values() if value.dtype is not None}
    return "bfloat16" if "BFLOAT16" in types else "float16" if "FLOAT16" in types else "float32"


def difference(reference: Array, candidate: Array) -> Difference:
    """Distance of `candidate` from `reference`, both of one shape, over all their elements.

    cosine distance = 1 - <r, c> / (|r| |c|); relative L2 = |c - r| / |r|; for other than floats the
    fraction of elements that differ. Values that are not finite must stand in the same places,
    else both distances are infinite; they count no further.
    """
    identical = _same_bits(reference, candidate)
    if not _is_float(reference):
        differs = reference != candidate
        return Difference(mismatch_fraction=float(np.mean(differs)) if differs.size else 0.0, identical=identical)
    r, c = np.asarray(reference, np.float64).ravel(), np.asarray(candidate, np.float64).ravel()
    finite = np.isfinite(r)
    if not (np.array_equal(finite, np.isfinite(c)) and np.array_equal(r[~finite], c[~finite], equal_nan=True)):
        return Difference(cosine_distance=math.inf, relative_l2=math.inf)
    r, c = r[finite], c[finite]
    r_norm, c_norm = float(np.linalg.norm(r)), float(np.linalg.norm(c))
    gap = float(np.linalg.norm(c - r))
    if r_norm == 0.0 or c_norm == 0.0:
        alike = r_norm == c_norm
        far = math.inf if r_norm == 0.0 else gap / r_norm
        return Difference(
            cosine_distance=0.0 if alike else 1.0, relative_l2=0.0 if alike else far, identical=identical
        )
    cosine = max(0.0, 1.0 - float(r @ c) / (r_norm * c_norm))
    return Difference(cosine_distance=cosine, relative_l2=gap / r_norm, identical=identical)


def failures(tolerance: OutputTolerance, reference: Array, candidate: Array, *, exact: bool) -> list[str]:
    """What is wrong with one output against its golden record; nothing if it is within tolerance.

    Args:
        tolerance: the output's limits.
        reference: the recorded output.
        candidate: the output of this run.
        exact: ask for equality bit by bit (same runtime, CPU, options, threads and batch).
    """
    if reference.shape != candidate.shape or reference.dtype != candidate.dtype:
        return [
            f"{candidate.dtype}{list(candidate.shape)} instead of {reference.dtype}{list(reference.shape)}"
        ]
    found = difference(reference, candidate)
    limits = (
        ("cosine distance", found.cosine_distance, tolerance.cosine_distance),
        ("relative L2", found.relative_l2, tolerance.relative_l2),
        ("fraction of differing elements", found.mismatch_fraction, tolerance.mismatch_fraction),
    )
    wrong = [
        f"{label} {value:.3g} exceeds {limit[1]:.3g}"
        for label, value, limit in limits
        if limit is not None and value is not None and not value <= limit[1]
    ]
    repeats = any(limit is not None for _, _, limit in limits)
    if not wrong and exact and repeats and not found.identical:
        wrong = ["not bit-identical on the runtime, CPU, options and threads that it was recorded with"]
    return wrong


def npz_bytes(arrays: Mapping[str, Array]) -> bytes:
    """Arrays as an uncompressed .npz whose bytes depend on nothing but names and values.

    Text is stored as fixed-width unicode; types that NumPy's format does not know (bfloat16) as
    unsigned integers of their width. `read_npz` restores both from the tensor specs.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            member = io.BytesIO()
            np.lib.format.write_array(member, _storable(np.asarray(array)), allow_pickle=False)
            archive.writestr(entry, member.getvalue())
    return buffer.getvalue()


def read_npz(path: Path, specs: Iterable[TensorSpec]) -> Feeds:
    """The arrays of a golden file, in the order and types of `specs`.

    Raises:
        DataError: if the file is damaged, or an array is missing, extra or of another type.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            stored = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            "a golden file cannot be read",
            where=path.name,
            why=str(error),
            remedy="restore it from where the bundle came from, or compile the model again",
        ) from error
    specs = tuple(specs)
    if set(stored) != {spec.name for spec in specs}:
        raise DataError(
            "a golden file holds other arrays than the model has",
            where=path.name,
            why=f"file: {sorted(stored)}; model: {sorted(spec.name for spec in specs)}",
            remedy="restore it from where the bundle came from, or compile the model again",
        )
    return {spec.name: _restored(stored[spec.name], spec.dtype) for spec in specs}


def _session(
    model_file: Path, level: str | None, settings: SessionSettings, threads: int
) -> OrtSession:
    options = SessionOptions(
        threads=threads, graph_optimization_level=level, config=dict(settings.config)
    )
    return OrtSession(model_file, options)


def _run_first(
    model: Model,
    session: OrtSession,
    inputs: Sequence[Feeds] | None,
    *,
    seed: int,
    shapes: Mapping[str, Sequence[int]] | None,
) -> tuple[list[Feeds], list[Feeds]]:
    """The user's samples, or the first generated set that the model runs on, with the outputs."""
    if inputs is not None:
        if not inputs:
            raise DataError(
                "there is no sample to take as golden",
                remedy="give data with at least one sample, or leave --golden data out",
            )
        return list(inputs), [session.run(sample) for sample in inputs]
    reason = None
    for samples in candidate_inputs(model, seed=seed, shapes=shapes):
        try:
            return list(samples), [session.run(sample) for sample in samples]
        except EdgepressError as error:
            reason = reason or error
    raise ModelError(
        "the model runs on none of the generated golden inputs",
        where=model.origin.name,
        why=None if reason is None else reason.why or reason.what,
        remedy="give sizes with --shape NAME:1x128, your own data with --golden data, or --skip golden",
    ) from reason


def _tolerance(
    name: str, outputs: Sequence[Feeds], variants: Sequence[Sequence[Feeds]], numerics: Numerics
) -> OutputTolerance:
    found = [
        difference(reference[name], run[name])
        for run_outputs in variants
        for reference, run in zip(outputs, run_outputs, strict=True)
        if reference[name].shape == run[name].shape
    ]
    complete = len(found) == len(outputs) * len(variants)
    floor_l2, floor_mismatch = _FLOORS[numerics]
    if not _is_float(outputs[0][name]):
        worst = max((item.mismatch_fraction or 0.0 for item in found), default=1.0)
        if not complete or worst > _UNREPEATABLE_L2:
            return OutputTolerance(name=name)
        return OutputTolerance(name=name, mismatch_fraction=_limit(worst, floor_mismatch))
    l2 = max((item.relative_l2 or 0.0 for item in found), default=math.inf)
    if not complete or not l2 <= _UNREPEATABLE_L2:
        return OutputTolerance(name=name)
    cosine = max(item.cosine_distance or 0.0 for item in found)
    # Two vectors a relative L2 of f apart are at most this far apart in angle.
    floor_cosine = 1.0 - math.sqrt(1.0 - floor_l2**2)
    return OutputTolerance(
        name=name,
        cosine_distance=_limit(cosine, floor_cosine),
        relative_l2=_limit(l2, floor_l2),
    )


def _limit(measured: float, floor: float) -> tuple[float, float]:
    """[measured, allowed], to three digits: the last bits of a measurement are no information."""
    return float(f"{measured:.3g}"), float(f"{max(_MARGIN * measured, floor):.3g}")


def _is_float(array: Array) -> bool:
    # ml_dtypes' bfloat16 and float8 types are of kind "V" to NumPy.
    return array.dtype.kind == "f" or (array.dtype.kind == "V" and "float" in array.dtype.name)


def _same_bits(first: Array, second: Array) -> bool:
    if first.dtype.kind in "OU":
        return bool(np.array_equal(first, second))
    return first.shape == second.shape and first.tobytes() == second.tobytes()


def _storable(array: Array) -> Array:
    if array.dtype.kind == "O":
        return np.asarray(array, dtype=np.str_)
    if array.dtype.kind == "V":
        return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    return np.ascontiguousarray(array) if array.ndim else array


def _restored(array: npt.NDArray[np.generic], dtype: str) -> Array:
    if dtype == "string":
        return np.asarray(array, dtype=object)
    if array.dtype.name == dtype:
        return array
    import ml_dtypes

    extension = getattr(ml_dtypes, dtype, None)
    if extension is None or np.dtype(extension).itemsize != array.dtype.itemsize:
        raise DataError(
            "a golden array has another type than the model",
            why=f"file: {array.dtype.name}; model: {dtype}",
            remedy="restore it from where the bundle came from, or compile the model again",
        )
    return array.view(extension)
