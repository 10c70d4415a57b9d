"""GELU in the many spellings of exporters -> the standard Gelu operator."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import onnx_ir as ir

from ...graph.edit import Editor, only_use, producer, rank
from ...graph.rewrite import Refused, Verdict
from .polynomial import Expansion, Polynomial, close

_GELU_OPSET = 20
_ROOTS = frozenset({"Mul", "Add", "Div"})


class GeluFromParts(NamedTuple):
    """x/2 * (1 + erf(x/sqrt 2)) -> Gelu; the tanh approximation -> Gelu(approximate="tanh").

    The bias in front stays an Add of its own: com.microsoft.BiasGelu, written out, was 3 to 9 %
    slower than Add + Gelu (onnxruntime 1.31.1, x86-64 with AMX, 1 x 128 tokens, 1 thread).
    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
    """

    name: str = "gelu"
    roots: frozenset[str] = _ROOTS

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        parts = _parts(node)
        if parts is None:
            return False
        curve, argument, outer = parts
        approximate = _kind(curve, argument, outer)
        if isinstance(approximate, Refused):
            reader = only_use(node.outputs[0])
            inner = reader is not None and reader.op_type in _ROOTS and _parts(reader) is not None
            return False if inner else approximate
        result = node.outputs[0]
        if argument.dtype != ir.DataType.FLOAT:
            return Refused("x is not known to be float32")
        if None not in (rank(result), rank(argument)) and rank(result) != rank(argument):
            return Refused("a constant gives the result more axes than x")
        if editor.model.opset < _GELU_OPSET:
            return Refused(f"Gelu needs operator set {_GELU_OPSET}, the model has {editor.model.opset}")
        fused = editor.value(
            "Gelu",
            [argument],
            {"approximate": approximate},
            before=node,
            stem=result.name or "gelu",
            like=result,
        )
        editor.replace(result, fused)
        return True


def _parts(node: ir.Node) -> tuple[ir.Node, ir.Value, Polynomial] | None:
    """(curve, x, polynomial over x = leaf 0 and the curve = leaf 1) if the node combines just those."""
    if not _reaches_curve(node):
        return None
    expansion = Expansion()
    outer = expansion.of(node.outputs[0])
    if outer is None or len(expansion.leaves) != 2:
        return None
    for place, other in ((0, 1), (1, 0)):
        curve, argument = producer(expansion.leaves[place], "Erf", "Tanh"), expansion.leaves[other]
        if curve is None or _argument(curve, argument) is None:
            continue
        renamed: Polynomial = {}
        for powers, factor in outer.items():
            renamed[tuple(sorted((int(leaf == place), power) for leaf, power in powers))] = factor
        return curve, argument, renamed
    return None


def _argument(curve: ir.Node, argument: ir.Value) -> Polynomial | None:
    """What stands inside of the curve, as a polynomial of `argument` alone."""
    expansion = Expansion(stop_at=argument, shared=True)
    inner = expansion.of(curve.inputs[0])
    return inner if len(expansion.leaves) == 1 and expansion.leaves[0] is argument else None


def _kind(curve: ir.Node, argument: ir.Value, outer: Polynomial) -> Literal["none", "tanh"] | Refused:
    """Which GELU it is."""
    if not close(outer, {((0, 1),): 0.5, ((0, 1), (1, 1)): 0.5}):
        return Refused(f"x and {curve.op_type.lower()}(x) are not combined as in GELU")
    inner = _argument(curve, argument) or {}
    slope = math.sqrt(2.0 / math.pi)
    if curve.op_type == "Erf" and close(inner, {((0, 1),): math.sqrt(0.5)}):
        return "none"
    if curve.op_type == "Tanh" and close(inner, {((0, 1),): slope, ((0, 3),): slope * 0.044715}):
        return "tanh"
    return Refused(f"the argument of {curve.op_type} is not that of GELU")


def _reaches_curve(node: ir.Node, depth: int = 4) -> bool:
    """Whether an Erf or Tanh lies close above the node."""
    for operand in node.inputs:
        if producer(operand, "Erf", "Tanh") is not None:
            return True
        above = producer(operand, "Mul", "Add", "Div")
        if above is not None and depth and _reaches_curve(above, depth - 1):
            return True
    return False
