"""Golden samples: inputs with the outputs they gave when the bundle was made, and how far off is fine.

A quantized network is chaotic at float noise: one rounding moves one 8-bit value, the next layer's
scale follows. So what is asked of another machine is a distance, measured at compile time between
lowerings of the very same file that are numerically equal (onnxruntime's optimizations on and off), and
with its float constants a rounding away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx_ir as ir

from ..compress.typed.twin import open_graph, open_session
from ..graph.errors import DataError, ModelError, Unavailable, UserError
from ..graph.model import Model
from ..runtimes.base import Runner, SessionOptions
from .environment import numeric_environment
from .manifest import (
    GoldenRecord,
    GoldenSample,
    GraphOptimizationLevel,
    OutputTolerance,
    SessionSettings,
)
from .npz import npz_bytes
from .nudged import nudged
from .samples import Array, Feeds, candidate_inputs, probe_inputs

Numerics = Literal["float32", "float16", "bfloat16", "int8"]

Opener = Callable[[SessionOptions], Runner]

# Outputs of some inputs, and the outputs of the same inputs another time or another way.
_Variant = tuple[Sequence[Feeds], Sequence[Feeds]]
_MARGIN = 4.0
_NUDGES = 2
# The least that is allowed, whatever was measured: relative L2, and the fraction of differing
# integers. float32: other summation orders. 16-bit floats: a few roundings of their own (fp16
# arithmetic was seen 0.016 apart between two cores). int8: one step of the 8-bit grid.
_FLOORS: dict[Numerics, tuple[float, float]] = {
    "float32": (1e-4, 0.0),
    "float16": (2e-2, 0.02),
    "bfloat16": (5e-2, 0.05),
    "int8": (1 / 127, 0.05),
}
# Two results a float32 rounding apart may fall to neighbours of a coarser type: one step of it.
_OUTPUT_STEPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
_EXTREMES: tuple[GraphOptimizationLevel | None, ...] = ("ORT_DISABLE_ALL", None)
_BETWEEN: tuple[GraphOptimizationLevel, ...] = ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED")
# Beyond this, lowerings of one file have nothing in common that a check could hold on to.
_UNREPEATABLE = 0.5
_LOOKUPS = frozenset({"Gather", "Slice"})
_QUANTIZING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QAttention", "DynamicQuantizeMatMul"})
METHOD = (
    f"{_MARGIN:g} x the largest drift between onnxruntime sessions of this file with the bundle's "
    "options and with graph optimizations off or at the default and (for int8) with float constants "
    "moved by a unit in the last place, over the golden samples and (for int8) eight further generated "
    "inputs; not below a floor for the arithmetic in use"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenSet:
    """Golden samples in memory, (inputs, outputs) each, with the record for the manifest.

    `environment` is where the outputs were made: there, and only there, they repeat bit by bit.
    """

    samples: tuple[tuple[Feeds, Feeds], ...]
    record: GoldenRecord
    environment: dict[str, str]

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
    source: Literal["generated", "data"] | None = None,
    seed: int = 0,
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    form: str = "",
    io_dtype: str = "fp32",
) -> GoldenSet:
    """Run golden samples through the finished file and measure the tolerance of every output.

    Args:
        model: the graph that was written, for shapes, vocabulary sizes and its arithmetic.
        model_file: the file as it will be in the bundle.
        settings: the bundle's session options.
        inputs: the user's own samples, or such as were made already; None generates them from `seed`.
        source: where `inputs` come from; the user's data by default.
        seed: for generated inputs; recorded.
        threads: threads of the recorded run.
        shapes: sizes for dynamic axes of generated inputs.
        form: the plan's precision, which says how the file is run here.
        io_dtype: the plan's type of inputs and outputs, likewise.

    Raises:
        ModelError: if the model runs on none of the generated inputs.
        DataError: if the user's samples are none, or the model does not run on them.
    """
    numerics = arithmetic(model)
    opened = functools.partial(open_session, model_file, form=form, io_dtype=io_dtype)
    reference = _session(model, opened, settings.options(threads=threads))
    samples, outputs = _run_first(model, reference, inputs, seed=seed, shapes=shapes)
    # Whether a rounding flips is a matter of luck with three inputs: look at more of them.
    probes = probe_inputs(model, seed=seed + 1, shapes=shapes) if numerics == "int8" else ()
    pairs = [*zip(samples, outputs, strict=True), *_runnable(reference, probes)]
    repeats = [reference.run(sample) for sample in samples]
    del reference
    variants = [(outputs, repeats), *_other_lowerings(model, opened, settings, threads, pairs)]
    if numerics == "int8":
        reopened = functools.partial(open_graph, form=form, io_dtype=io_dtype)
        variants += _nudged_runs(model, reopened, settings.options(threads=threads), pairs)
    record = GoldenRecord(
        source=source or ("generated" if inputs is None else "data"),
        seed=seed,
        threads=threads,
        samples=tuple(
            GoldenSample(inputs=f"golden/inputs_{index:03}.npz", outputs=f"golden/outputs_{index:03}.npz")
            for index in range(len(samples))
        ),
        numerics=numerics,
        method=METHOD,
        tolerances=tuple(_tolerance(spec.name, variants, numerics) for spec in model.outputs),
    )
    return GoldenSet(
        samples=tuple(zip(samples, outputs, strict=True)),
        record=record,
        environment=numeric_environment(settings, threads),
    )


def arithmetic(model: Model) -> Numerics:
    """The coarsest arithmetic in a graph: 8-bit integers, then bfloat16, float16, float32."""
    types = set()
    for graph in model.all_graphs():
        for node in graph:
            if node.op_type in _QUANTIZING or "Integer" in node.op_type or node.op_type.startswith("QLinear"):
                return "int8"
            if node.op_type not in _LOOKUPS and not _only_leaves(node):
                types |= {value.dtype.name for value in node.outputs if value.dtype is not None}
        types |= {
            value.dtype.name
            for value in graph.initializers.values()
            if value.dtype is not None and not _only_cast(value)
        }
    return "bfloat16" if "BFLOAT16" in types else "float16" if "FLOAT16" in types else "float32"


def _only_leaves(node: ir.Node) -> bool:
    """Whether a node is the Cast that gives an output its type: what it rounds is no arithmetic."""
    return node.op_type == "Cast" and node.outputs[0].is_graph_output() and not node.outputs[0].uses()


def _only_cast(value: ir.Value) -> bool:
    """Whether a stored weight, or the rows looked up in it, only go into Casts."""
    return all(
        use.node.op_type == "Cast"
        or (use.node.op_type in _LOOKUPS and use.idx == 0 and _only_cast(use.node.outputs[0]))
        for use in value.uses()
    )


def difference(reference: Array, candidate: Array) -> Difference:
    """Distance of `candidate` from `reference`, both of one shape, over all their elements.

    cosine distance = 1 - <r, c> / (|r| |c|); relative L2 = |c - r| / |r|; for other than floats the
    fraction of elements that differ. Values that are not finite must stand in the same places,
    else both distances are infinite; they count no further.
    """
    identical = _same_bits(reference, candidate)
    if not _is_float(reference):
        differs = reference != candidate
        return Difference(
            mismatch_fraction=float(np.mean(differs)) if differs.size else 0.0, identical=identical
        )
    r, c = np.asarray(reference, np.float64).ravel(), np.asarray(candidate, np.float64).ravel()
    finite = np.isfinite(r)
    if not (
        np.array_equal(finite, np.isfinite(c)) and np.array_equal(r[~finite], c[~finite], equal_nan=True)
    ):
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


def _run_first(
    model: Model,
    session: Runner,
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
        except UserError as error:
            reason = reason or error
    raise ModelError(
        "the model runs on none of the generated golden inputs",
        where=model.origin.name,
        why=None if reason is None else reason.why or reason.what,
        remedy="give sizes with --shape NAME:1x128, your own data with --golden data, or --skip golden",
    ) from reason


def _runnable(session: Runner, probes: Iterable[Feeds]) -> list[tuple[Feeds, Feeds]]:
    """The probes that the model takes, with their outputs."""
    found = []
    for probe in probes:
        with contextlib.suppress(UserError):
            found.append((probe, session.run(probe)))
    return found


def _session(model: Model, opened: Opener, options: SessionOptions) -> Runner:
    return opened(options.for_answers(model.weight_bytes))


def _other_lowerings(
    model: Model,
    opened: Opener,
    settings: SessionSettings,
    threads: int,
    pairs: Sequence[tuple[Feeds, Feeds]],
) -> list[_Variant]:
    """The same inputs at optimization levels that change the kernels, but not the mathematics."""
    own = settings.graph_optimization_level
    extremes = [level for level in _EXTREMES if level != own]
    between = [level for level in _BETWEEN if level != own]
    found: list[_Variant] = []
    for level in (*extremes, *between):
        if len(found) >= len(extremes):
            break
        # Without optimizations some operators have no kernel; then a level between has to do.
        with contextlib.suppress(UserError, Unavailable):
            options = msgspec.structs.replace(settings, graph_optimization_level=level)
            session = _session(model, opened, options.options(threads=threads))
            found.append(([output for _, output in pairs], [session.run(sample) for sample, _ in pairs]))
    return found


def _nudged_runs(
    model: Model,
    opened: Callable[[Model, SessionOptions], Runner],
    options: SessionOptions,
    pairs: Sequence[tuple[Feeds, Feeds]],
) -> list[_Variant]:
    """The same inputs with float constants a rounding away, as kernels of another machine are.

    The very same operators have just run on these inputs, so nothing is left out here.
    """
    found: list[_Variant] = []
    for seed in range(_NUDGES):
        if (other := nudged(model, seed)) is not None:
            session = opened(other, options.for_answers(model.weight_bytes))
            found.append(([output for _, output in pairs], [session.run(sample) for sample, _ in pairs]))
    return found


def _tolerance(name: str, variants: Sequence[_Variant], numerics: Numerics) -> OutputTolerance:
    pairs = [
        (reference[name], other[name])
        for references, others in variants
        for reference, other in zip(references, others, strict=True)
    ]
    complete = all(reference.shape == other.shape for reference, other in pairs)
    if not complete:
        return OutputTolerance(name=name)
    found = [difference(reference, other) for reference, other in pairs]
    floor_l2, floor_mismatch = _FLOORS[numerics]
    floor_l2 = max(floor_l2, _OUTPUT_STEPS.get(pairs[0][0].dtype.name, 0.0))
    if not _is_float(pairs[0][0]):
        worst = max(item.mismatch_fraction or 0.0 for item in found)
        if worst > _UNREPEATABLE:
            return OutputTolerance(name=name)
        return OutputTolerance(name=name, mismatch_fraction=_limit(worst, floor_mismatch))
    l2 = max(item.relative_l2 or 0.0 for item in found)
    if not l2 <= _UNREPEATABLE:
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
