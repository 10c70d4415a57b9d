"""Why two processors' kernels give other bits: how a bias is added to a product, how integers are summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..compress.emulate import arm
from ..compress.emulate.integer import (
    Affine,
    Quantized,
    dynamic_quantize_linear,
    matmul_integer,
    qlinear_add,
)
from ..graph.edit import constant, producer
from ..runtimes.base import Array
from .replay_units import Unit

Rounding = Literal["fused", "separate", "fixed point", "float"]
TOLD = {
    "fused": "bias added to the scaled product with one rounding",
    "separate": "bias added after the scaled product was rounded",
    "fixed point": "summed in fixed point, halves away from zero",
    "float": "summed in float32, halves to even",
}
"""Roundings in words."""


def rounding_of(unit: Unit, feeds: Sequence[Array], result: Array) -> Rounding | None:
    """Which of the known kernels' arithmetic gives a result bit for bit; None if none does, or both do.

    Args:
        unit: a scaled product with a bias, or a sum between Q/DQ pairs.
        feeds: its inputs in order.
        result: what a machine made of it.
    """
    if unit.operator == "Add":
        return sum_arithmetic(unit, feeds, result)
    return bias_rounding(unit, feeds, result)


def sum_arithmetic(unit: Unit, feeds: Sequence[Array], result: Array) -> Rounding | None:
    """How a quantized sum was computed: in fixed point as on Arm, or in float as on x86.

    Args:
        unit: DequantizeLinear (two), Add, what is absorbed, QuantizeLinear.
        feeds: its inputs in order.
        result: integers, what a machine made of it.
    """
    values: dict[int, Array] = {id(value): array for value, array in zip(unit.inputs, feeds, strict=True)}
    add = next((node for node in unit.nodes if node.op_type == "Add"), None)
    into = [node for node in unit.nodes if node.op_type == "QuantizeLinear"]
    fronts = [] if add is None else [producer(value, "DequantizeLinear") for value in add.inputs]
    if len(into) != 1 or len(fronts) != 2:
        return None
    operands: list[Quantized] = []
    for front in fronts:
        parts = [] if front is None else [values.get(id(value), constant(value)) for value in front.inputs]
        if len(parts) != 3 or any(part is None for part in parts):
            return None
        operands.append(Quantized(*parts))  # type: ignore[arg-type]
    scale, zero = (constant(value) for value in into[0].inputs[1:3])
    if scale is None or zero is None or scale.size != 1:
        return None
    target = Affine(np.asarray(scale, np.float32), zero)  # type: ignore[arg-type]
    left, right = operands
    there, here = arm.qlinear_add(left, right, target), qlinear_add(left, right, target)
    matches: list[Rounding] = []
    if there is not None and np.array_equal(there, result):
        matches.append("fixed point")
    if np.array_equal(here, result):
        matches.append("float")
    return matches[0] if len(matches) == 1 else None


def bias_rounding(unit: Unit, feeds: Sequence[Array], result: Array) -> Rounding | None:
    """How a result of MatMulInteger, scaling and bias was rounded, if the rest of it is right bit for bit.

    With integer sums s, factor f = activation scale * weight scale and bias b: "separate" is
    round(round(s f) + b), "fused" round(s f + b); both are of float32 operands. None is a unit of
    another form, or a result that is neither.

    Args:
        unit: DynamicQuantizeLinear (or none), MatMulInteger, Cast, Mul, Add.
        feeds: its inputs in order.
        result: float32, what a machine made of it.
    """
    values: dict[int, Array] = {id(value): array for value, array in zip(unit.inputs, feeds, strict=True)}
    product: tuple[Array, Array] | None = None
    separate = fused = None
    for node in unit.nodes:
        operands = [
            None if value is None else values.get(id(value), constant(value)) for value in node.inputs
        ]
        if any(operand is None for operand in operands):
            return None
        given = [np.asarray(operand) for operand in operands]
        if node.op_type == "DynamicQuantizeLinear":
            quantized = dynamic_quantize_linear(given[0].astype(np.float32))
            made: tuple[Array, ...] = (
                quantized.values,
                np.asarray(quantized.scale),
                np.asarray(quantized.zero_point),
            )
        elif node.op_type == "MatMulInteger" and all(zero.size == 1 for zero in given[2:]):
            made = (_sums(given),)
        elif node.op_type == "Cast":
            made = (given[0].astype(np.float32),)
        elif node.op_type == "Mul":
            product = (given[0], given[1])
            scaled = given[0].astype(np.float32) * given[1].astype(np.float32)
            made = (scaled,)
        elif node.op_type == "Add" and product is not None:
            bias = next((item for item in node.inputs if item is not None and id(item) not in values), None)
            added = constant(bias)
            if added is None:
                return None
            first, second = (item.astype(np.float64) for item in product)
            fused = (first * second + added.astype(np.float64)).astype(np.float32)
            separate = scaled + added.astype(np.float32)
            made = (separate,)
        else:
            return None
        values |= {id(value): array for value, array in zip(node.outputs, made, strict=True)}
    if separate is None or fused is None or separate.shape != result.shape:
        return None
    if separate.tobytes() == result.tobytes():
        return "separate"
    return "fused" if fused.tobytes() == result.tobytes() else None


def _sums(given: Sequence[Array]) -> Array:
    zeros = [int(zero.reshape(())) for zero in given[2:]]
    return matmul_integer(given[0], given[1], *zeros)  # type: ignore[arg-type]
