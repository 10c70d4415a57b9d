"""The 16-bit float formats: their limits, rounding to them, and what rounding loses."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.scheme import FloatArray
from ...graph.weights import MappedTensor

Format = Literal["bf16", "fp16"]

TYPES: dict[Format, ir.DataType] = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}
TYPE_NAMES: dict[Format, Literal["bfloat16", "float16"]] = {"bf16": "bfloat16", "fp16": "float16"}
LARGEST: dict[Format, float] = {"bf16": 3.3895313892515355e38, "fp16": 65504.0}
"""The largest finite number of a format."""

_CHUNK_ELEMENTS = 1 << 20
_LOSS_KEY = "edgepress.loss"
_ROUNDING: dict[Format, float] = {"bf16": 2.0**-8, "fp16": 2.0**-11}


class Loss(NamedTuple):
    """What rounding an array to a 16-bit format does to it.

    `overflowed` counts finite values that become infinite, `vanished` those that become zero;
    `relative_l2` is |rounded - values| / |values| over what stays finite (0 for zeros).
    """

    overflowed: int
    vanished: int
    relative_l2: float

    def reason(self, kind: Format) -> str | None:
        """Why an array does not fit the format, or None if it does.

        A normal number is off by at most half a unit in the last place, 2^-8 of it in bfloat16
        and 2^-11 in float16; so a tensor that loses more has lost it to numbers below the normal
        range. Source: IEEE 754-2019, section 4.3.1 (roundTiesToEven).
        """
        name = TYPE_NAMES[kind]
        if self.overflowed:
            return f"{self.overflowed} of its values lie beyond {name}'s {LARGEST[kind]:.5g}"
        if self.relative_l2 > _ROUNDING[kind]:
            return (
                f"its values are too small for {name} ({self.vanished} become zero; "
                f"relative L2 {self.relative_l2:.2g})"
            )
        return None


def rounded(values: FloatArray, kind: Format) -> npt.NDArray[np.generic]:
    """`values` (any shape) in a 16-bit format, rounded to nearest, ties to even."""
    with np.errstate(over="ignore"):  # what overflows becomes infinite; `rounding_loss` counts it
        return np.ascontiguousarray(values).astype(TYPES[kind].numpy())


def rounding_loss(values: FloatArray, kind: Format) -> Loss:
    """What `rounded` loses of `values` (any shape)."""
    flat = np.asarray(values, np.float32).reshape(-1)
    overflowed = vanished = 0
    gap = norm = 0.0
    for start in range(0, flat.size, _CHUNK_ELEMENTS):
        exact = flat[start : start + _CHUNK_ELEMENTS]
        back = rounded(exact, kind).astype(np.float32)
        finite, kept = np.isfinite(exact), np.isfinite(back)
        overflowed += int(np.count_nonzero(finite & ~kept))
        vanished += int(np.count_nonzero((exact != 0) & (back == 0)))
        wide = exact[kept].astype(np.float64)
        off = wide - back[kept]
        norm, gap = norm + float(wide @ wide), gap + float(off @ off)
    relative = math.sqrt(gap / norm) if norm else 0.0
    return Loss(overflowed=overflowed, vanished=vanished, relative_l2=relative)


def rounded_tensor(tensor: ir.TensorProtocol, kind: Format) -> ir.TensorProtocol:
    """A float32 tensor in a 16-bit format; a mapped one stays on disk and is read when it is written."""

    def compute() -> ir.TensorProtocol:
        made = ir.tensor(rounded(np.asarray(tensor.numpy(), np.float32), kind), dtype=TYPES[kind])
        if isinstance(tensor, MappedTensor):
            tensor.release()
        return made

    if not isinstance(tensor, (MappedTensor, ir.LazyTensor)):
        return compute()
    return ir.LazyTensor(compute, dtype=TYPES[kind], shape=ir.Shape(tensor.shape.numpy()))


def tensor_loss(tensor: ir.TensorProtocol, kind: Format) -> Loss:
    """What a float32 tensor loses in a 16-bit format; looked up once, pages of a mapped one given back."""
    known = tensor.meta.get(f"{_LOSS_KEY}.{kind}")
    if isinstance(known, Loss):
        return known
    loss = tensor.meta[f"{_LOSS_KEY}.{kind}"] = rounding_loss(np.asarray(tensor.numpy(), np.float32), kind)
    if isinstance(tensor, MappedTensor):
        tensor.release()
    return loss
