"""Arithmetic sub-graphs as polynomials, so that every spelling of a formula matches one rule."""

from __future__ import annotations

import onnx_ir as ir

from ...graph.edit import only_use, producer, rank, scalar

Monomial = tuple[tuple[int, int], ...]
"""Sorted (leaf index, power) pairs; () is the constant term."""
Polynomial = dict[Monomial, float]

_TERMS_LIMIT = 16
_POWERS = (1.0, 2.0, 3.0, 4.0)


def number(value: ir.Value | None) -> float | None:
    """The number in a constant that gives no operand more axes (rank 0 or 1), or None."""
    return scalar(value) if (rank(value) or 0) <= 1 else None


class Expansion:
    """Expands Add, Sub, Mul, Div, Neg and Pow by numbers into a polynomial over leaf values.

    A node in between is expanded only if nothing else reads it: then the whole sub-graph can be
    replaced. `leaves` lists the values at which expansion stopped, in order of discovery.
    """

    def __init__(self, stop_at: ir.Value | None = None, *, shared: bool = False) -> None:
        self.leaves: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self._stop_at = stop_at
        self._shared = shared

    def of(self, value: ir.Value | None, *, root: bool = True, depth: int = 12) -> Polynomial | None:
        """The polynomial of `value`, or None when it has too many terms."""
        if value is None:
            return None
        constant = number(value)
        if constant is not None:
            return {(): constant}
        node = producer(value, "Add", "Sub", "Mul", "Div", "Neg", "Pow")
        opaque = node is None or value is self._stop_at or depth == 0
        if opaque or not (root or self._shared or only_use(value) is not None):
            return {((self._leaf(value), 1),): 1.0}
        assert node is not None
        parts = [self.of(operand, root=False, depth=depth - 1) for operand in node.inputs]
        result = _combine(node.op_type, parts)
        if result is None:
            return {((self._leaf(value), 1),): 1.0}
        self.nodes.append(node)
        return result if len(result) <= _TERMS_LIMIT else None

    def _leaf(self, value: ir.Value) -> int:
        for index, known in enumerate(self.leaves):
            if known is value:
                return index
        self.leaves.append(value)
        return len(self.leaves) - 1


def _combine(op_type: str, parts: list[Polynomial | None]) -> Polynomial | None:
    if any(part is None for part in parts):
        return None
    first = parts[0] or {}
    second = parts[1] if len(parts) > 1 and parts[1] is not None else {}
    if op_type == "Neg":
        return {key: -factor for key, factor in first.items()}
    if op_type in ("Add", "Sub"):
        sign = 1.0 if op_type == "Add" else -1.0
        total = dict(first)
        for key, factor in second.items():
            total[key] = total.get(key, 0.0) + sign * factor
        return total
    if op_type == "Mul":
        return _times(first, second)
    operand = second.get(()) if set(second) == {()} else None
    if operand is None:
        return None
    if op_type == "Div":
        return {key: factor / operand for key, factor in first.items()} if operand else None
    if operand not in _POWERS:
        return None
    result: Polynomial = {(): 1.0}
    for _ in range(int(operand)):
        result = _times(result, first)
    return result


def _times(first: Polynomial, second: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for left, left_factor in first.items():
        for right, right_factor in second.items():
            powers: dict[int, int] = {}
            for leaf, power in (*left, *right):
                powers[leaf] = powers.get(leaf, 0) + power
            key = tuple(sorted(powers.items()))
            product[key] = product.get(key, 0.0) + left_factor * right_factor
    return product


def close(polynomial: Polynomial, expected: Polynomial, tolerance: float = 2e-4) -> bool:
    """Whether two polynomials have the same terms, with factors equal to a relative tolerance."""
    terms = {key: factor for key, factor in polynomial.items() if factor}
    if set(terms) != set(expected):
        return False
    return all(abs(terms[key] - factor) <= tolerance * abs(factor) for key, factor in expected.items())
