"""GELU in the many spellings of exporters -> the standard Gelu operator."""

from __future__ import annotations

import math
from typing import NamedTuple

import onnx_ir as ir

from ...graph.edit import Editor, only_use, producer
from ...graph.rewrite import Refused, Verdict
from .polynomial import Expansion, Polynomial, close

_GELU_OPSET = 20


class GeluFromParts(NamedTuple):
    """x/2 * (1 + erf(x/sqrt 2)) -> Gelu; the tanh approximation -> Gelu(approximate="tanh").

    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
    """

    name: str = "gelu"
    roots: frozenset[str] = frozenset({"Mul", "Add", "Div"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        reader = only_use(node.outputs[0])
        if reader is not None and reader.op_type in self.roots and _reaches_curve(reader):
            return False  # an inner node of the formula: the outermost one is the root
        if not _reaches_curve(node):
            return False
        expansion = Expansion()
        outer = expansion.of(node.outputs[0])
        if outer is None or len(expansion.leaves) != 2:
            return False
        for curve_place, argument_place in ((0, 1), (1, 0)):
            places = curve_place, argument_place
            verdict = _match(node, expansion, outer, places, editor)
            if verdict is not False:
                return verdict
        return False


def _match(
    node: ir.Node,
    expansion: Expansion,
    outer: Polynomial,
    places: tuple[int, int],
    editor: Editor,
) -> Verdict:
    curve_place, argument_place = places
    curve = producer(expansion.leaves[curve_place], "Erf", "Tanh")
    argument = expansion.leaves[argument_place]
    if curve is None:
        return False
    alone = ((argument_place, 1),)
    both = tuple(sorted(((argument_place, 1), (curve_place, 1))))
    inner_expansion = Expansion(stop_at=argument, shared=True)
    inner = inner_expansion.of(curve.inputs[0])
    if inner is None or [id(leaf) for leaf in inner_expansion.leaves] != [id(argument)]:
        return False
    if not close(outer, {alone: 0.5, both: 0.5}):
        return Refused(f"x and {curve.op_type.lower()}(x) are not combined as in GELU")
    slope = math.sqrt(2.0 / math.pi)
    if curve.op_type == "Erf" and close(inner, {((0, 1),): math.sqrt(0.5)}):
        approximate = "none"
    elif curve.op_type == "Tanh" and close(inner, {((0, 1),): slope, ((0, 3),): slope * 0.044715}):
        approximate = "tanh"
    else:
        return Refused(f"the argument of {curve.op_type} is not that of GELU")
    if editor.model.opset < _GELU_OPSET:
        return Refused(f"Gelu needs operator set {_GELU_OPSET}, the model has {editor.model.opset}")
    result = editor.value(
        "Gelu",
        [argument],
        {"approximate": approximate},
        before=node,
        stem=node.outputs[0].name or "gelu",
        like=node.outputs[0],
    )
    editor.replace(node.outputs[0], result)
    return True


def _reaches_curve(node: ir.Node, depth: int = 4) -> bool:
    """Whether an Erf or Tanh lies close above the node."""
    for operand in node.inputs:
        if producer(operand, "Erf", "Tanh") is not None:
            return True
        above = producer(operand, "Mul", "Add", "Div")
        if above is not None and depth and _reaches_curve(above, depth - 1):
            return True
    return False
