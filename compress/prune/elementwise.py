"""Nodes between two layers that make a function of one number, and its derivative."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import float_attribute, is_constant, rank, scalar

Floats = npt.NDArray[np.floating[Any]]
Dual = tuple[Floats, Floats]
"""Values and their derivatives by what went in."""
_MOST_NODES = 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Between:
    """Nodes that turn one value into another, element by element.

    Attributes:
        source: what goes in.
        result: what comes out; the same where there is no node.
        nodes: that are between them.
    """

    source: ir.Value
    result: ir.Value
    nodes: frozenset[ir.Node]

    def __call__(self, values: Floats) -> Dual:
        """The function of each value, and its derivative there; both of the values' shape, float32."""
        known: dict[ir.Value, Dual] = {self.source: (values, np.ones_like(values))}
        found, slope = self._dual(self.result, known)
        return found, slope

    def _dual(self, value: ir.Value | None, known: dict[ir.Value, Dual]) -> Dual:
        assert value is not None
        number = scalar(value)
        if number is not None:
            return np.asarray(number, np.float32), np.zeros((), np.float32)
        if value not in known:
            node = value.producer()
            assert node is not None
            if node.op_type in _PAIRS:
                known[value] = _PAIRS[node.op_type](*(self._dual(item, known) for item in node.inputs))
            else:
                inner, slope = self._dual(node.inputs[0], known)
                outer, factor = _SINGLE[node.op_type](node, inner)
                known[value] = outer, np.asarray(factor * slope, np.float32)
        return known[value]


def between(result: ir.Value, reader: ir.Node) -> Between | None:
    """The nodes behind a value, down to the one that all of them come from.

    Args:
        result: what the reader reads.
        reader: the only node that may read it.

    Returns:
        None where another node reads a value in between, or several values go in.
    """
    nodes: set[ir.Node] = set()
    sources: set[ir.Value] = set()
    waiting = [result]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        inputs = None if node is None else _computed(node)
        if node is None or inputs is None:
            sources.add(value)
        elif node not in nodes:
            nodes.add(node)
            waiting += inputs
    if len(sources) != 1 or len(nodes) > _MOST_NODES:
        return None
    source = sources.pop()
    for value in [source, *(node.outputs[0] for node in nodes)]:
        allowed = nodes | {reader} if value is result else nodes
        if value.is_graph_output() or any(use.node not in allowed for use in value.uses()):
            return None
    if len(result.uses()) != 1:
        return None
    return Between(source=source, result=result, nodes=frozenset(nodes))


def _computed(node: ir.Node) -> list[ir.Value] | None:
    """The inputs of an element-wise node that are no constants, None if it is none with single numbers."""
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return None
    if node.op_type not in _PAIRS and node.op_type not in _SINGLE:
        return None
    found = []
    for value in node.inputs:
        if value is None:
            continue
        if not is_constant(value):
            found.append(value)
        elif scalar(value) is None or (rank(value) or 0) > (rank(node.outputs[0]) or 0):
            return None
    if node.op_type in _SINGLE and (not found or found[0] is not node.inputs[0] or len(found) > 1):
        return None
    return found


def erf(values: Floats) -> Floats:
    """The error function to 2e-7.

    Source: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, eq. 7.1.26.
    """
    size = np.abs(values)
    inner = 1 / (1 + np.float32(0.3275911) * size)
    series = np.zeros_like(size)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(factor)) * inner
    return np.asarray(np.sign(values) * (1 - series * np.exp(-size * size)))


def _erf(_node: ir.Node, values: Floats) -> Dual:
    return erf(values), np.float32(2 / math.sqrt(math.pi)) * np.exp(-values * values)


def _relu(_node: ir.Node, values: Floats) -> Dual:
    return np.maximum(values, 0), (values > 0).astype(np.float32)


def _leaky_relu(node: ir.Node, values: Floats) -> Dual:
    slope = np.where(values > 0, np.float32(1), np.float32(float_attribute(node, "alpha", 0.01)))
    return values * slope, slope


def _clip(node: ir.Node, values: Floats) -> Dual:
    low, high = _limit(node, 1, "min"), _limit(node, 2, "max")
    inside = ((values > low) & (values < high)).astype(np.float32)
    return np.clip(values, np.float32(low), np.float32(high)), inside


def _limit(node: ir.Node, position: int, name: str) -> float:
    """A bound of Clip, which old operator sets have as an attribute."""
    unbounded = -math.inf if name == "min" else math.inf
    if position < len(node.inputs) and node.inputs[position] is not None:
        found = scalar(node.inputs[position])
        assert found is not None
        return found
    return float_attribute(node, name, unbounded)


def _logistic(_node: ir.Node, values: Floats) -> Dual:
    found = 0.5 * (1 + np.tanh(0.5 * values))
    return found, found * (1 - found)


def _tanh(_node: ir.Node, values: Floats) -> Dual:
    found = np.tanh(values)
    return found, 1 - found * found


def _gelu(node: ir.Node, values: Floats) -> Dual:
    mode = node.attributes.get("approximate")
    if mode is not None and mode.as_string() == "tanh":
        factor, cubic = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
        inner = np.tanh(factor * (values + cubic * values**3))
        slope = (1 - inner * inner) * factor * (1 + 3 * cubic * values * values)
        return 0.5 * values * (1 + inner), 0.5 * (1 + inner) + 0.5 * values * slope
    part = 0.5 * (1 + erf(values * np.float32(math.sqrt(0.5))))
    density = np.exp(-0.5 * values * values) * np.float32(1 / math.sqrt(2 * math.pi))
    return values * part, part + values * density


def _negative(_node: ir.Node, values: Floats) -> Dual:
    return -values, np.full_like(values, -1)


def _add(first: Dual, second: Dual) -> Dual:
    return first[0] + second[0], first[1] + second[1]


def _subtract(first: Dual, second: Dual) -> Dual:
    return first[0] - second[0], first[1] - second[1]


def _multiply(first: Dual, second: Dual) -> Dual:
    return first[0] * second[0], first[1] * second[0] + first[0] * second[1]


def _divide(first: Dual, second: Dual) -> Dual:
    found = first[0] / second[0]
    return found, (first[1] - found * second[1]) / second[0]


_SINGLE: dict[str, Callable[[ir.Node, Floats], Dual]] = {
    "Relu": _relu,
    "LeakyRelu": _leaky_relu,
    "Clip": _clip,
    "Sigmoid": _logistic,
    "Tanh": _tanh,
    "Gelu": _gelu,
    "Erf": _erf,
    "Neg": _negative,
}
_PAIRS: dict[str, Callable[..., Dual]] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
}
