"""What `--precision bf16`, `bf16-compute` and `fp16` mean on a target."""

from __future__ import annotations

from typing import Literal

from ...graph.errors import NotSupported
from ...targets.profile import Form, Kernel, TargetProfile
from .formats import TYPE_NAMES, Format

_HEAVY_OPS = ("MatMul", "Gemm", "Conv")

TypedForm = Literal["fp16", "bf16", "fp16-storage", "bf16-storage"]


def form_of(profile: TargetProfile, precision: str) -> TypedForm | None:
    """The 16-bit form that a precision means on a target, or None for precisions that mean none.

    `bf16` and `fp16` compute in that type where the target has kernels that are faster in it, and
    store the weights in it elsewhere; `bf16-compute` insists on computing.

    Args:
        profile: the target; one of onnxruntime.
        precision: as a recipe has it.

    Raises:
        NotSupported: if bfloat16 arithmetic is asked for where no kernel has it.
    """
    if precision == "fp16":
        return "fp16" if _computes(profile, "fp16") else "fp16-storage"
    if precision == "bf16":
        return "bf16" if _computes(profile, "bf16") else "bf16-storage"
    if precision == "bf16-compute":
        if _usable(profile, "bf16"):
            return "bf16"
        raise NotSupported(
            f"{profile.name} does not compute in bfloat16",
            where="--precision bf16-compute",
            why=profile.refusal("MatMul", "float", activation="bfloat16"),
            remedy="use --precision bf16: weights stored in bfloat16, half the file, arithmetic in float32",
        )
    return None


def describe(profile: TargetProfile, form: Form, stored: int) -> str:
    """One sentence that says what a 16-bit form is on a target; `stored` counts weights kept in 16 bits."""
    if form in ("bf16-storage", "fp16-storage"):
        kind: Format = "bf16" if form == "bf16-storage" else "fp16"
        return (
            f"{kind} on {profile.name} is storage ({form}): {stored} weights are {TYPE_NAMES[kind]} in the "
            f"file and float32 when it is loaded; results are those of rounded weights, speed is float32's"
        )
    return f"products and convolutions compute in {TYPE_NAMES['fp16' if form == 'fp16' else 'bf16']}"


def _computes(profile: TargetProfile, kind: Format) -> bool:
    """Whether a heavy operator is known to be faster in a format, on a core that has its instructions."""
    features = profile.device.isa_features
    if kind == "fp16" and profile.device.architecture == "aarch64" and "asimdhp" not in features:
        return False
    return any(kernel.grade == "fast" for kernel in _usable(profile, kind))


def _usable(profile: TargetProfile, kind: Format) -> list[Kernel]:
    found = (profile.kernel(op, "float", activation=TYPE_NAMES[kind]) for op in _HEAVY_OPS)
    return [kernel for kernel in found if kernel is not None]
