"""What `--precision bf16`, `bf16-compute`, `fp16` and `--io-dtype` mean on a target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.errors import DataError, NotSupported
from ...graph.model import Model
from ...targets.profile import Form, Gpu, Kernel, TargetProfile
from ..plan import TypedForm as TypedForm  # noqa: PLC0414 - what `form_of` gives
from ..recipe import IoDtype
from .formats import LARGEST, TYPE_NAMES, TYPES, Format

Array = npt.NDArray[Any]

_FORMATS: Mapping[str, Format] = {"fp16": "fp16", "bf16": "bf16"}
_HEAVY_OPS = ("MatMul", "Gemm", "Conv")


def form_of(profile: TargetProfile, precision: str) -> TypedForm | None:
    """The 16-bit form that a precision means on a target, or None for precisions that mean none.

    `bf16` and `fp16` compute in that type where the target has kernels that are faster in it, and
    store the weights in it elsewhere; `bf16-compute` insists on computing.

    Args:
        profile: the target.
        precision: as a recipe has it.

    Raises:
        NotSupported: if bfloat16 arithmetic is asked for where no kernel has it, or either type of a
            graphics processor that does not compute in it.
    """
    if profile.gpu is not None and precision in TYPES and not _computes(profile, _FORMATS[precision]):
        raise NotSupported(
            f"{profile.name} does not compute in {TYPE_NAMES[_FORMATS[precision]]}",
            where=f"--precision {precision}",
            why=_precisions(profile.gpu),
            remedy="use --precision fp16 or fp32",
        )
    if precision == "fp16":
        return "fp16" if _computes(profile, "fp16") else "fp16-storage"
    if precision == "bf16":
        return "bf16" if _computes(profile, "bf16") else "bf16-storage"
    if precision == "bf16-compute":
        if _usable(profile, "bf16") or (profile.gpu is not None and _computes(profile, "bf16")):
            return "bf16"
        why = profile.refusal("MatMul", "float", activation="bfloat16")
        half = "use --precision bf16: weights stored in bfloat16, half the file, arithmetic in float32"
        raise NotSupported(
            f"{profile.name} does not compute in bfloat16",
            where="--precision bf16-compute",
            why=why if profile.gpu is None else _precisions(profile.gpu),
            remedy=half if profile.gpu is None else "use --precision fp16",
        )
    return None


def remainder_form(profile: TargetProfile, precision: str) -> TypedForm | None:
    """The 16-bit form for what an INT8 plan leaves in float, or None where it stays float32.

    `int8+fp16` and `int8+bf16` mean for the remainder what `fp16` and `bf16` mean for a whole model.
    `auto` computes it in float16 where the profile has evidence that heavy operators are faster so.
    """
    if precision == "int8+fp16":
        return form_of(profile, "fp16")
    if precision == "int8+bf16":
        return form_of(profile, "bf16")
    if precision == "auto" and _computes(profile, "fp16"):
        known = [kernel.evidence for kernel in _usable(profile, "fp16") if kernel.grade == "fast"]
        return "fp16" if set(known) - {"none"} else None
    return None


def check_io_dtype(profile: TargetProfile, io_dtype: IoDtype) -> None:
    """Refuse a type of inputs and outputs that the target's runtime does not take.

    Raises:
        NotSupported: for bfloat16 where the runtime's own Python interface has no arrays of it, and for
            types that the graphics processor does not compute in.
    """
    if io_dtype == "fp32":
        return
    if profile.gpu is not None:
        if io_dtype.upper() not in profile.gpu.precisions:
            raise NotSupported(
                f"{profile.name} has no {TYPE_NAMES[io_dtype]}",
                where=f"--io-dtype {io_dtype}",
                why=_precisions(profile.gpu),
                remedy="use --io-dtype fp16, or leave it out",
            )
    elif io_dtype == "bf16":
        raise NotSupported(
            "bfloat16 inputs and outputs are not for onnxruntime bundles",
            where="--io-dtype bf16",
            why="onnxruntime's Python interface neither takes nor gives bfloat16 arrays (1.31.1: 'can't be "
            "converted to MLDataType'), so such a bundle could be neither fed nor verified",
            remedy="use --io-dtype fp16, or leave it out: a bfloat16 is the upper half of a float32",
        )


def check_interface(
    model: Model, io_dtype: IoDtype, arrays: Iterable[Mapping[str, Array]]
) -> tuple[IoDtype, str | None]:
    """The type that a model's float32 inputs and outputs get, and what has to be said about it.

    Args:
        model: the graph that went in.
        io_dtype: as asked for.
        arrays: inputs and outputs that were seen.

    Raises:
        DataError: if one of them holds finite values beyond the type's largest number.
    """
    if io_dtype == "fp32":
        return io_dtype, None
    inputs, outputs = (
        [spec.name for spec in specs if spec.dtype == "float32"] for specs in (model.inputs, model.outputs)
    )
    names = {*inputs, *outputs}
    if not names:
        return "fp32", f"--io-dtype {io_dtype} changes nothing: no input or output is float32"
    for name, values in ((name, values) for seen in arrays for name, values in seen.items()):
        finite = np.abs(values[np.isfinite(values)]) if name in names else np.zeros(0)
        if finite.size and finite.max() > LARGEST[io_dtype]:
            raise DataError(
                f"{name!r} does not fit {TYPE_NAMES[io_dtype]}",
                where=f"--io-dtype {io_dtype}",
                why=f"it reaches {finite.max():.4g} on the data, the type {LARGEST[io_dtype]:.5g}",
                remedy="leave --io-dtype out, or scale that input or output",
            )
    counts = f"{len(inputs)} inputs and {len(outputs)} outputs"
    return io_dtype, f"{counts} are {TYPE_NAMES[io_dtype]} instead of float32"


def describe(profile: TargetProfile, form: Form, stored: int) -> str:
    """One sentence that says what a 16-bit form is on a target; `stored` counts weights kept in 16 bits."""
    if form in ("bf16-storage", "fp16-storage"):
        kind: Format = "bf16" if form == "bf16-storage" else "fp16"
        return (
            f"{kind} on {profile.name} is storage ({form}): {stored} weights are {TYPE_NAMES[kind]} in the "
            f"file and float32 when it is loaded; results are those of rounded weights, speed is float32's"
        )
    text = f"products and convolutions compute in {TYPE_NAMES['fp16' if form == 'fp16' else 'bf16']}"
    if profile.gpu is None:
        return text
    how = "--fp16" if profile.runtime.typing == "weak" else "--stronglyTyped"
    return (
        f"{text}: a typed ONNX graph, checked here with onnxruntime; TensorRT {profile.runtime.version} "
        f"builds the engine from it on the device (trtexec --onnx=model.onnx {how})"
    )


def _computes(profile: TargetProfile, kind: Format) -> bool:
    """Whether a heavy operator is known to be faster in a format, on a core that has its instructions.

    Of a graphics processor its list of precisions says so.
    """
    if profile.gpu is not None:
        return kind.upper() in profile.gpu.precisions
    features = profile.device.isa_features
    if kind == "fp16" and profile.device.architecture == "aarch64" and "asimdhp" not in features:
        return False
    return any(kernel.grade == "fast" for kernel in _usable(profile, kind))


def _precisions(gpu: Gpu) -> str:
    """What a graphics processor computes in, with what is disputed."""
    disputed = f"; {gpu.disputed_source}" if gpu.disputed_precisions else ""
    return f"its precisions are {', '.join(gpu.precisions)} ({gpu.precisions_source}){disputed}"


def _usable(profile: TargetProfile, kind: Format) -> list[Kernel]:
    found = (profile.kernel(op, "float", activation=TYPE_NAMES[kind]) for op in _HEAVY_OPS)
    return [kernel for kernel in found if kernel is not None]
