"""A quantized graph whose sums are spelled out as 64-bit Arm computes them, to be run on any processor."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..compress.emulate.arm import sum_multipliers
from ..graph.edit import Editor, constant, is_constant, producer, remove_dead
from ..graph.model import Model
from ..runtimes.base import Array
from .replay_units import Unit, cut_units

_WIDE = ir.DataType.INT64


def with_arm_sums(model: Model) -> tuple[Model, int]:
    """A fork in which every Add between Q/DQ pairs computes in integers as MLAS's NEON kernel does.

    sign(t) * floor((|t| + half) / 2^shift) + zero point, saturated, with t = m_l (left - z_l) + m_r (right -
    z_r): the arithmetic of `compress.emulate.arm.qlinear_add` in ONNX's int64 operators.

    Args:
        model: any graph; it is left as it is.

    Returns:
        The fork, and how many sums it spells out. Sums with a Clip, with a Relu that does not end where the
        integers do, or with scales that the kernel has another path for, stay.
    """
    fork = model.fork()
    editor, count = Editor(fork), 0
    for unit in cut_units(fork):
        if unit.operator == "Add":
            count += _spell_out(unit, editor)
    if count:
        remove_dead(fork)
    return fork, count


def _spell_out(unit: Unit, editor: Editor) -> bool:
    add = next(node for node in unit.nodes if node.op_type == "Add")
    into = [node for node in unit.nodes if node.op_type == "QuantizeLinear"]
    fronts = [producer(value, "DequantizeLinear") for value in add.inputs]
    between = {node.op_type for node in unit.nodes} - {"DequantizeLinear", "Add", "QuantizeLinear"}
    if len(into) != 1 or len(fronts) != 2 or not between <= {"Relu"}:
        return False
    parameters = [None if node is None else _parameters(node) for node in (*fronts, into[0])]
    if any(item is None for item in parameters):
        return False
    (left_scale, left_zero), (right_scale, right_zero), (scale, zero) = (item for item in parameters if item)
    found = sum_multipliers(left_scale, right_scale, scale)
    limits = np.iinfo(zero.dtype.name)
    if found is None or (between and int(zero) != limits.min):
        return False
    first, second, shift = found
    made = _Chain(editor, into[0])
    operands = [node.inputs[0] for node in fronts if node is not None and node.inputs[0] is not None]
    total = made.of(
        "Add",
        made.scaled(operands[0], int(left_zero), first),
        made.scaled(operands[1], int(right_zero), second),
    )
    size = made.of("Add", made.of("Abs", total), made.number(1 << (shift - 1)))
    steps = made.of("Mul", made.of("Sign", total), made.of("Div", size, made.number(1 << shift)))
    level = made.of("Add", steps, made.number(int(zero)))
    clipped = made.of("Clip", level, made.number(limits.min), made.number(limits.max))
    result = into[0].outputs[0]
    editor.replace(result, made.cast(clipped, ir.DataType.from_numpy(zero.dtype)))
    return True


def _parameters(node: ir.Node) -> tuple[np.float32, Array] | None:
    """Scale and zero point of a Q/DQ node with one of each."""
    if len(node.inputs) < 3 or is_constant(node.inputs[0]):
        return None
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
    if scale is None or zero is None or scale.size != 1 or zero.size != 1:
        return None
    return np.float32(scale.reshape(())), zero.reshape(())


class _Chain:
    """Makes int64 nodes in front of one."""

    def __init__(self, editor: Editor, before: ir.Node) -> None:
        self._editor, self._before = editor, before
        self._stem = str(before.outputs[0].name)

    def of(self, operator: str, *inputs: ir.Value) -> ir.Value:
        """The result of an operator on int64."""
        return self._editor.value(
            operator, list(inputs), before=self._before, stem=f"{self._stem}/{operator}", dtype=_WIDE
        )

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in another type."""
        return self._editor.value(
            "Cast", [value], {"to": int(dtype)}, before=self._before, stem=f"{self._stem}/cast", dtype=dtype
        )

    def number(self, value: int) -> ir.Value:
        """A constant."""
        graph = self._editor.model.graph
        return self._editor.constant(np.asarray(value, np.int64), f"{self._stem}/number", graph)

    def scaled(self, value: ir.Value, zero: int, factor: int) -> ir.Value:
        """(value - zero) * factor."""
        centred = self.of("Sub", self.cast(value, _WIDE), self.number(zero))
        return self.of("Mul", centred, self.number(factor))
